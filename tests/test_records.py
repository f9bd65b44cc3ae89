"""The report and the event files of a sweep, against numbers computed from its rounds."""

import json
import math
import platform
import random
import subprocess
from pathlib import Path
from statistics import mean, stdev

import oracle
import pandas as pd
import pytest
import ray
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fishermask import cli
from fishermask.config import ExperimentConfig, parse
from fishermask.environment import installed_version
from fishermask.results import curves, report
from fishermask.results.files import RunFolder
from fishermask.results.tables import METRICS, read_rounds, summarize
from fishermask.sweeps.tensorboard import RunEvents

ROOT = Path(__file__).parent.parent
STRATEGIES, RATIOS, SEEDS, LABELS = ("bait", "margin", "random"), (1.0, 20.0), (0, 1, 2), (10, 20, 30)


def draw_rounds(draws: random.Random) -> list[dict]:
    """Return three rounds with random numbers."""
    return [
        {
            "round": index,
            "labels": labels,
            **{metric: round(draws.random(), 4) for metric in METRICS},
            "recall": {"cat": round(draws.random(), 4), "dog": math.nan},
            "epochs": draws.randrange(3, 90),
            "train_accuracy": round(draws.random(), 4),
            "ended_by": draws.choice(["cap", "target"]),
            "seconds": {"train": draws.random(), "evaluate": draws.random(), "query": 0.5, "query: pick": 0.25},
            "batch": [f"{index}-{i}" for i in range(10)] if index < 2 else [],
            "batch_classes": {"cat": 7 - index, "dog": 3 + index} if index < 2 else {"cat": 0, "dog": 0},
            "notes": {"objective": draws.random()} if index < 2 else {},
        }
        for index, labels in enumerate(LABELS)
    ]


@pytest.fixture(scope="module")
def written_sweep(tmp_path_factory):
    """Return a sweep's folder, and its rounds by strategy, ratio and seed. For one seed, bait equals random."""
    folder, draws = tmp_path_factory.mktemp("records") / "sweep", random.Random(4)
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "s", "grid": {"imbalance.ratio": [], "seed": []}}))
    all_rounds = {(s, r, seed): draw_rounds(draws) for s in STRATEGIES for r in RATIOS for seed in SEEDS}
    for bait, baseline in zip(all_rounds["bait", 1.0, 1], all_rounds["random", 1.0, 1], strict=True):
        bait["balanced_accuracy"] = baseline["balanced_accuracy"]
    for (strategy, ratio, seed), results in all_rounds.items():
        settings = {"strategy": strategy, "imbalance": {"kind": "step", "ratio": ratio}, "seed": seed}
        settings["budget"] = {"initial": 10, "query": 10, "total": 30}
        run = RunFolder(folder / "runs" / f"{strategy}-{ratio}-{seed}")
        run.create(parse(ExperimentConfig, settings), {}, "p.csv")
        for result in results:
            run.append(result)
    report.write(folder)
    return folder, all_rounds


def test_summary_has_means_deviations_gains_and_wins_over_seeds(written_sweep):
    folder, all_rounds = written_sweep
    summary = summarize(read_rounds(folder)[0])
    by_key = summary.set_index(["imbalance.ratio", "strategy"])
    for ratio in RATIOS:
        for strategy in STRATEGIES:
            row = by_key.loc[(ratio, strategy)]
            runs = [all_rounds[strategy, ratio, seed] for seed in SEEDS]
            for metric in METRICS:
                means = [mean(r[metric] for r in run[1:]) for run in runs]
                final = [run[-1][metric] for run in runs]
                for name, values in ((f"mean_{metric}", means), (f"final_{metric}", final)):
                    assert row[name] == pytest.approx(mean(values))
                    assert row[f"{name}_sd"] == pytest.approx(stdev(values))
            gains = []
            for seed in SEEDS:
                pair = (all_rounds[name, ratio, seed] for name in (strategy, "random"))
                score, baseline = (mean(r["balanced_accuracy"] for r in run[1:]) for run in pair)
                gains.append(score - baseline)
            assert (row["seeds"], row["labels"]) == (3, 30)
            if strategy == "random":
                assert (row["wins"], row["pairs"]) == (0, 0)
                assert math.isnan(row["gain"])
                continue
            assert row["gain"] == pytest.approx(mean(gains))
            assert row["gain_sd"] == pytest.approx(stdev(gains))
            assert (row["wins"], row["pairs"]) == (sum(gain > 0 for gain in gains), 3)
    for _, panel in summary.groupby("imbalance.ratio", sort=False):
        assert panel["mean_balanced_accuracy"].is_monotonic_decreasing
    assert summary["imbalance.ratio"].is_monotonic_increasing


def test_page_shows_the_summary_and_the_curves_as_numbers(written_sweep):
    folder, all_rounds = written_sweep
    page = (folder / "summary.md").read_text()
    final = [all_rounds["margin", 20.0, seed][-1]["accuracy"] for seed in SEEDS]
    row = next(line for line in page.splitlines() if line.startswith("| 20 | margin |"))
    assert row.startswith(f"| 20 | margin | 3 | 30 | {mean(final):.3f}±{stdev(final):.3f} |")
    section = page.split("### ratio = 20")[1]
    row = next(line for line in section.splitlines() if line.startswith("| margin |"))
    cells = []
    for index in range(3):
        values = [all_rounds["margin", 20.0, seed][index]["balanced_accuracy"] for seed in SEEDS]
        cells.append(f"{mean(values):.3f}±{stdev(values):.3f}")
    assert row == f"| margin | {' | '.join(cells)} |"
    num_capped = sum(r["ended_by"] == "cap" for run in all_rounds.values() for r in run)
    assert f"in {num_capped} of 54 rounds" in page
    assert num_capped != 27  # otherwise, both values of ended_by would occur equally often


def test_table_has_every_number_of_every_round(written_sweep):
    folder, all_rounds = written_sweep
    table = pd.read_csv(folder / "results.csv").set_index(["strategy", "imbalance.ratio", "seed", "round"])
    assert len(table) == 54
    for (strategy, ratio, seed), results in all_rounds.items():
        for result in results:
            row = table.loc[(strategy, ratio, seed, result["round"])]
            for key in ("labels", *METRICS, "epochs", "train_accuracy", "ended_by"):
                assert row[key] == result[key]
            for group in ("recall", "batch_classes", "seconds"):
                for name, value in result[group].items():
                    assert row[f"{group}.{name}"] == pytest.approx(value, nan_ok=True)


def test_curves_are_means_with_a_band_of_one_deviation_to_each_side(written_sweep):
    folder, all_rounds = written_sweep
    figure = curves.draw(read_rounds(folder)[0], "macro_f1", "sweep")
    for axis, ratio in zip(figure.axes, RATIOS, strict=True):
        for line, band, strategy in zip(axis.lines, axis.collections, STRATEGIES, strict=True):
            columns = [[all_rounds[strategy, ratio, seed][i]["macro_f1"] for seed in SEEDS] for i in range(3)]
            assert list(line.get_xdata()) == list(LABELS)
            assert list(line.get_ydata()) == pytest.approx([mean(values) for values in columns])
            corners = band.get_paths()[0].vertices
            for labels, values in zip(LABELS, columns, strict=True):
                heights = [y for x, y in corners.tolist() if x == labels]
                assert min(heights) == pytest.approx(mean(values) - stdev(values))
                assert max(heights) == pytest.approx(mean(values) + stdev(values))


def test_report_command_draws_the_requested_metric(written_sweep, capsys):
    folder, _ = written_sweep
    pictures = {}
    for metric in METRICS:
        assert cli.main(["report", str(folder), "--metric", metric]) == 0
        pictures[metric] = (folder / "curves.png").read_bytes()
        curves.save(curves.draw(read_rounds(folder)[0], metric, folder.name), folder / "expected.png")
        assert pictures[metric] == (folder / "expected.png").read_bytes()
    assert len(set(pictures.values())) == 3


def test_tensorboard_has_every_number_of_every_round_by_labels(tmp_path):
    results = draw_rounds(random.Random(1))
    config = parse(ExperimentConfig, {"strategy": "margin", "imbalance": {"kind": "step", "ratio": 4}})
    events = RunEvents(RunFolder(tmp_path), config, ["imbalance.ratio"], results[:1])
    for result in results[1:]:
        events.add(result)
    events.finish()
    events_file = EventAccumulator(str(tmp_path)).Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        values = {f"metrics/{metric}": result[metric] for metric in METRICS}
        values |= {"recall/cat": result["recall"]["cat"]}  # a class that the test set lacks has no recall
        values |= {f"seconds/{stage}": value for stage, value in result["seconds"].items()}
        values |= {f"notes/{name}": value for name, value in result["notes"].items()}
        values |= {"training/epochs": result["epochs"], "training/accuracy": result["train_accuracy"]}
        if result["batch"]:
            values |= {f"batch/{name}": count for name, count in result["batch_classes"].items()}
        for tag, value in values.items():
            expected.setdefault(tag, []).append((result["labels"], value))
    for metric in METRICS:
        expected[f"final/{metric}"] = [(30, results[-1][metric])]
        expected[f"mean/{metric}"] = [(30, mean(r[metric] for r in results[1:]))]
    assert set(events_file.Tags()["scalars"]) == set(expected)
    for tag, values in expected.items():
        assert [(event.step, event.value) for event in events_file.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in values
        ]


TINY = {
    "name": "tiny",
    "base": {
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
        "budget": {"initial": 10, "query": 10, "total": 20},
        "training": {"max_epochs": 2},
        "strategy": "random",
    },
    "grid": {"seed": [3]},
}


@pytest.fixture
def tiny_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return "tiny.yaml"


def test_round_0_records_the_initial_labels_of_the_runs_pool(tiny_yaml):
    assert cli.main(["run", tiny_yaml]) == 0
    (folder,) = Path("results").glob("*/runs/*")
    run = RunFolder(folder)
    table = pd.read_csv(folder.parent.parent / "pools" / run.provenance().pool)
    permutation = torch.randperm(300, generator=oracle.stream(3, "initial")).tolist()
    first = run.history()[0]
    assert first["initial"] == [table["id"][position] for position in sorted(permutation[:10])]
    assert set(first["batch"]) <= set(table["id"]) - set(first["initial"])
    assert table["class"].value_counts().tolist() == [30] * 10


def test_failed_run_ends_the_command_with_status_1_and_names_its_log(tiny_yaml, capsys):
    assert cli.main(["run", tiny_yaml, "training.learning_rate=1e30"]) == 1
    message = capsys.readouterr().err
    assert "seed=3 failed: " in message
    log = message.split("log: ")[1].strip()
    assert "lower training.learning_rate" in Path(log).read_text()


def test_rounds_are_valid_json_and_the_recall_of_a_missing_class_is_null(written_sweep):
    folder, _ = written_sweep
    for path in folder.glob("runs/*/rounds.jsonl"):
        lines = path.read_text().splitlines()
        records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
        assert [record["recall"]["dog"] for record in records] == [None] * 3
    assert read_rounds(folder)[0]["recall.dog"].isna().all()


def test_each_row_has_the_provenance_of_its_round(tiny_yaml, capsys):
    assert cli.main(["run", tiny_yaml]) == 0
    (folder,) = Path("results").iterdir()
    run = RunFolder(next((folder / "runs").iterdir()))
    first = run.rounds.read_text().splitlines(keepends=True)[0]
    run.rounds.write_text(first)
    provenance = json.loads((run.path / "provenance.json").read_text())
    identity = next(iter(provenance["identities"].values())) | {"fishermask": "0.0.9 (0123)"}
    environment = next(iter(provenance["environments"].values())) | {"fishermask": "0.0.9 (0123)", "cpu": "another CPU"}
    provenance |= {"identities": {"old": identity}, "environments": {"old": environment}}
    (run.path / "provenance.json").write_text(json.dumps(provenance))
    run.rounds.write_text(json.dumps(json.loads(first) | {"identity": "old", "environment": "old"}) + "\n")

    assert cli.main(["run", tiny_yaml]) == 2
    assert f"fishermask 0.0.9 (0123) in the folder, {installed_version()} here" in capsys.readouterr().err
    assert cli.main(["run", tiny_yaml, "--continue-anyway"]) == 0
    assert "continuing under another identity: random-seed=3: fishermask 0.0.9" in capsys.readouterr().out

    rounds = run.history()
    columns = pd.DataFrame(run.provenance().round_columns(rounds))
    assert columns["fishermask"].tolist() == ["0.0.9 (0123)", installed_version()]
    assert columns["continued"].tolist() == [False, True]
    assert "Runs that continued under another identity: 1;" in (folder / "summary.md").read_text()
    assert columns["cpu"][0] == "another CPU" != columns["cpu"][1]
    versions = (torch.__version__, ray.__version__, platform.python_version(), "cpu")
    assert tuple(columns[["torch", "ray", "python", "device"]].iloc[1]) == versions
    assert columns["config_hash"].nunique() == 1 and columns["config_hash"].notna().all()
    commit = subprocess.run(
        ["git", "rev-parse", "-q", "--verify", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert columns["git_commit"][1] == (commit.stdout.strip() or None)
    assert cli.main(["run", tiny_yaml]) == 0  # finished
