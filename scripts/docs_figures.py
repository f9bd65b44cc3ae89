"""Run the demo sweep, or reuse its finished results, and write its picture and its table into docs.

    python scripts/docs_figures.py              # write docs/demo_curves.png and docs/demo_results.md
    python scripts/docs_figures.py --check      # exit with status 1 if the picture does not match its table or sweep

The metadata of the PNG file holds two hashes: of the page with the table, and of the settings of all runs with their
defaults. A test compares them, so that a change of the page, the sweep file or a default requires a new picture.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from PIL import Image

from fishermask import cli, query_strategies
from fishermask.results import curves, report
from fishermask.results.tables import read_rounds
from fishermask.sweeps import sweep_file
from fishermask.sweeps.sweep_file import Sweep

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "sweeps/demo.yaml"
TABLE_KEY, SETTINGS_KEY = "Table SHA-256", "Settings SHA-256"


def figure_paths(sweep: Sweep, docs: Path) -> tuple[Path, Path]:
    """Return the paths of the picture and of the page with the table."""
    return docs / f"{sweep.config.name}_curves.png", docs / f"{sweep.config.name}_results.md"


def settings_hash(sweep: Sweep) -> str:
    """Return a hash of all settings that determine the results of the runs, including defaults."""
    settings = [
        [
            run.config.model_dump(mode="json", exclude={"resources"}),
            query_strategies.load(run.config.strategy).params.model_dump(mode="json"),
        ]
        for run in sweep.runs
    ]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_figures(sweep: Sweep, docs: Path) -> None:
    """Write the picture and the page from the finished results of ``sweep``."""
    picture, page = figure_paths(sweep, docs)
    table, unfinished = read_rounds(sweep.folder)
    if unfinished:
        raise SystemExit(f"docs_figures: {unfinished[0].name} is not finished; run the sweep again")
    text = report.format_page(report.create(sweep.folder, table, unfinished), table, sweep.config.name, picture.name)
    page.write_text(text, encoding="utf-8")
    metadata = {TABLE_KEY: hashlib.sha256(text.encode()).hexdigest(), SETTINGS_KEY: settings_hash(sweep)}
    curves.save(curves.draw(table, "balanced_accuracy", sweep.config.name), picture, metadata)


def find_mismatch(sweep: Sweep, docs: Path) -> str | None:
    """Return why the picture in ``docs`` does not match the page or the sweep; None if it matches."""
    picture, page = figure_paths(sweep, docs)
    metadata = Image.open(picture).text
    if metadata.get(TABLE_KEY) != hashlib.sha256(page.read_bytes()).hexdigest():
        return f"{picture.name} does not show the results in {page.name}; run make docs-figures"
    if metadata.get(SETTINGS_KEY) != settings_hash(sweep):
        return f"{picture.name} was made with other settings than those in the sweep file; run make docs-figures"
    return None


def main() -> int:
    """Write or check the figures; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the figures with their table")
    check = parser.parse_args().check
    sweep = sweep_file.expand(sweep_file.load(DEMO))
    if check:
        mismatch = find_mismatch(sweep, ROOT / "docs")
        print(mismatch or "the picture matches its table and its sweep file")
        return int(mismatch is not None)
    if status := cli.main(["sweep", str(DEMO)]):
        return status
    write_figures(sweep, ROOT / "docs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
