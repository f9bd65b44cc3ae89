"""The picture of the demo in the README, and the script that makes it."""

import sys
from pathlib import Path

import pytest
import yaml
from running import run_in_process

from fishermask.sweeps import sweep_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import docs_figures  # noqa: E402

TINY = {
    "name": "tiny",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "budget": {"initial": 10, "query": 10, "total": 20},
        "training": {"max_epochs": 2},
    },
    "grid": {"strategy": ["margin", "random"], "seed": [0]},
}


def load(folder, *overrides):
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | {"output": str(folder / "results")}))
    return sweep_file.expand(sweep_file.load(file, overrides))


def test_the_demo_picture_belongs_to_its_table_and_sweep_file():
    sweep = sweep_file.expand(sweep_file.load(docs_figures.DEMO))
    picture, page = docs_figures.figure_paths(sweep, ROOT / "docs")
    assert f"docs/{picture.name}" in (ROOT / "README.md").read_text()
    assert docs_figures.find_mismatch(sweep, ROOT / "docs") is None


def test_a_changed_table_or_setting_does_not_match_the_picture(tmp_path):
    sweep = load(tmp_path)
    run_in_process(sweep)
    docs_figures.write_figures(sweep, tmp_path)
    assert docs_figures.find_mismatch(sweep, tmp_path) is None
    changed = load(tmp_path, "training.max_epochs=3")
    assert "other settings" in docs_figures.find_mismatch(changed, tmp_path)
    page = tmp_path / "tiny_results.md"
    assert "![learning curves](tiny_curves.png)" in page.read_text()
    page.write_text(page.read_text().replace("| margin |", "| bait |"))
    assert "does not show the results in tiny_results.md" in docs_figures.find_mismatch(sweep, tmp_path)
    with sweep.runs[0].folder.rounds.open("r+") as file:
        file.readline()
        file.truncate(file.tell())
    with pytest.raises(SystemExit, match="margin-seed=0 is not finished"):
        docs_figures.write_figures(sweep, tmp_path)
