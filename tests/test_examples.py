"""The examples run unchanged and print results."""

import runpy
from pathlib import Path

import pytest
import ray
import yaml

import fishermask

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def one_process():
    """Start a Ray cluster with one CPU: starting more processes would take longer than the runs of the example."""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def execute(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_example_with_arrays_improves_the_accuracy(tmp_path, monkeypatch, capsys):
    out = execute("select_from_arrays.py", tmp_path, monkeypatch, capsys)
    accuracies = [float(line.split()[-1]) for line in out.splitlines() if "accuracy" in line]
    assert len(accuracies) == 4
    assert accuracies[-1] > accuracies[0]
    assert "Selection(16 positions by fisher_mask, objective" in out


def test_example_of_a_sweep_from_python_runs(tmp_path, monkeypatch, capsys, one_process):
    out = execute("sweep_from_python.py", tmp_path, monkeypatch, capsys)
    assert "4/4 runs" in out
    assert "fisher_mask" in out
    assert (tmp_path / "results/sweep_from_python/runs").is_dir()
    # The script continues: nothing is missing.
    assert "4/4 runs" not in execute("sweep_from_python.py", tmp_path, monkeypatch, capsys)


def test_strategy_file_beside_a_sweep_file_works_in_the_processes_of_ray(tmp_path, monkeypatch, one_process):
    project, working_folder = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    working_folder.mkdir()
    (project / "mine.py").write_text((EXAMPLES / "own_strategy.py").read_text())
    settings = {
        "name": "files",
        "base": {
            "imbalance": {"kind": "balanced", "per_class": 20},
            "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
            "training": {"max_epochs": 1},
            "budget": {"initial": 20, "query": 10, "total": 30},
        },
        "grid": {"strategy": ["./mine.py", "entropy"]},
    }
    (project / "sweep.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(working_folder)
    results = fishermask.sweep(project / "sweep.yaml", progress=False)
    assert not results.failed
    assert results.folder == working_folder / "results/files"
    rounds = results.rounds
    assert sorted(zip(rounds["strategy"], rounds["labels"], strict=True)) == [
        *(("entropy", 20), ("entropy", 30)),
        *(("mine", 20), ("mine", 30)),
    ]
    assert (results.folder / "summary.md").exists()


def test_example_with_a_users_strategy_runs(tmp_path, monkeypatch, capsys):
    out = execute("own_strategy.py", tmp_path, monkeypatch, capsys)
    assert "Selection(5 positions by query" in out
    assert [line.split()[1:3] for line in out.splitlines()[-2:]] == [["own_strategy", "20"], ["own_strategy", "40"]]


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_use_public_names_only(example):
    text = example.read_text()
    assert len(text.splitlines()) <= 40
    assert "from fishermask" not in text
