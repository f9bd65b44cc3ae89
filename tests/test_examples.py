"""The examples run as they are, and finish with the results that they print."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def execute(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_select_from_arrays(tmp_path, monkeypatch, capsys):
    out = execute("select_from_arrays.py", tmp_path, monkeypatch, capsys)
    accuracies = [float(line.split()[-1]) for line in out.splitlines() if "accuracy" in line]
    assert len(accuracies) == 4
    assert accuracies[-1] > accuracies[0]
    assert "Selection(16 positions by fisher_mask, objective" in out


def test_sweep_from_python(tmp_path, monkeypatch, capsys, ray_session):
    out = execute("sweep_from_python.py", tmp_path, monkeypatch, capsys)
    assert "6/6 runs" in out
    assert "fisher_mask" in out
    assert (tmp_path / "results/sweep_from_python/runs").is_dir()
    # The script continues: nothing is missing.
    assert "6/6 runs" not in execute("sweep_from_python.py", tmp_path, monkeypatch, capsys)


def test_own_strategy(tmp_path, monkeypatch, capsys):
    out = execute("own_strategy.py", tmp_path, monkeypatch, capsys)
    assert "Selection(5 positions by query" in out
    assert "own_strategy(temperature=3.0)      20" in out or "own_strategy" in out


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_use_public_names_only(example):
    text = example.read_text()
    assert len(text.splitlines()) <= 40
    assert "from fishermask" not in text
