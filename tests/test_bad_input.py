"""Bad input: exit status 2, one line on stderr that names the setting, and no files left behind.

``bad_input_cases`` is the catalog of commands; ``bad_input_batch`` runs them in a few processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input_cases import CASES, STRATEGIES, TRACES, prepare, write_models

BATCHES = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the result of each case: exit status, stdout, stderr, traceback, new files."""
    root = tmp_path_factory.mktemp("bad")
    (root / "strategies").mkdir()
    (root / "logs").mkdir()
    write_models(root / "models")
    for number, content in enumerate(STRATEGIES.values()):
        (root / f"strategies/theirs_{number}.py").write_text(content)
    jobs = []
    for number, (name, details) in enumerate(CASES.items()):
        folder = root / f"cases/{number}"
        prepare(folder, details["files"])
        argv = [(word if isinstance(word, bytes) else word.encode()).hex() for word in details["argv"]]
        jobs.append({"id": name, "argv": argv, "folder": str(folder), "env": details["env"]})
    processes = []
    for batch in range(BATCHES):
        work = {"models": str(root / "models"), "strategies": str(root / "strategies"), "cases": jobs[batch::BATCHES]}
        (root / f"jobs{batch}").write_text(json.dumps(work))
        command = [
            sys.executable,
            Path(__file__).with_name("bad_input_batch.py"),
            root / f"jobs{batch}",
            root / f"results{batch}",
        ]
        settings = os.environ | {"TMPDIR": str(root / "logs"), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=root, env=settings, stderr=subprocess.PIPE, text=True))
    merged = {}
    try:
        for batch, process in enumerate(processes):
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            merged |= json.loads((root / f"results{batch}").read_text())
    finally:
        for process in processes:
            process.kill()
    return merged


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_that_names_the_setting(results, name):
    expected, result = CASES[name], results[name]
    assert not result["raised"]
    assert result["status"] == 2, result
    message = result["stderr"]
    assert message.endswith("\n")
    lines = message[:-1].split("\n")
    assert len(lines) == expected["lines"], message
    assert all(line.startswith("fishermask: ") and line.isprintable() for line in lines), message
    assert "Traceback" not in message
    for word in expected["words"]:
        assert word in message
    assert {path.removeprefix("results/") for path, _ in result["trace"]} == TRACES.get(name, set())
    if "; log: " in message:
        log = Path(message.rpartition("; log: ")[2].strip())
        assert "Traceback (most recent call last)" in log.read_text()


def test_the_catalog_has_more_than_500_cases():
    assert len(CASES) > 500


def test_the_log_contains_the_traceback_and_the_printed_text(results):
    for name, texts in {
        "a model raises ValueError": ["ValueError: boom", "their_models.py"],
        "a model writes to descriptor 2 and raises": ["from C", "ValueError: boom"],
        "a model warns and raises": ["UserWarning: careful"],
        "a model exits with 3": ["SystemExit: 3"],
        "a strategy raises when it is imported": ["theirs_", "RuntimeError: boom"],
    }.items():
        content = Path(results[name]["stderr"].rpartition("; log: ")[2].strip()).read_text()
        for text in texts:
            assert text in content, name


def test_a_grid_of_ten_billion_runs_is_refused_without_expanding_it(results):
    assert results["a grid of 10^10 runs"]["status"] == 2
