"""Guards around the user's code, errors during a run, and unusual input that is valid."""

import os
import resource
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from bad_input_cases import TINY

from fishermask import cli, guard, query_strategies
from fishermask.errors import InputError
from fishermask.guard import capture_stderr, guarded, one_line, reason, short, write_log
from fishermask.paths import check_path

MODELS = """
import os, sys
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, during_training=None):
        super().__init__()
        self.linear = nn.Linear(784, num_classes)
        self.during_training = during_training
    def forward(self, images):
        if self.training and self.during_training and images.any():  # estimates are made with blank images
            self.during_training()
        return self.linear(images.flatten(1))

def throw():
    raise ValueError("first line\\nsecond line")

def raises(num_classes):
    return Net(num_classes, throw)

def exits(num_classes):
    return Net(num_classes, lambda: sys.exit(3))

def talks(num_classes):
    print("to stdout")
    print("to stderr", file=sys.stderr)
    os.write(2, b"from C\\n")
    return Net(num_classes)

SHARED = Net(10)

def shared(num_classes):
    return SHARED
"""


class Unprintable(Exception):
    def __str__(self):
        raise KeyError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a working folder with a sweep file and an importable module of models."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/guard_test_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{os.environ.get('PYTHONPATH', '')}")
    yield tmp_path
    sys.modules.pop("guard_test_models", None)


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("boom"), "ValueError: boom"),
        (ValueError("a\n  b\x1b[31m"), "ValueError: a b [31m"),
        (ValueError(), "ValueError"),
        (KeyError("key"), "KeyError: 'key'"),
        (SystemExit(3), "SystemExit: it exits with status 3"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (MemoryError(), "MemoryError"),
        (Unprintable(), "Unprintable"),
        (FileNotFoundError(2, "No such file", "x"), "FileNotFoundError: No such file: x"),
        (StopIteration(), "StopIteration"),
        (GeneratorExit(), "GeneratorExit"),
        (BaseException("rare"), "BaseException: rare"),
    ],
)
def test_any_exception_is_converted_to_an_input_error_with_its_traceback(error, shown):
    with pytest.raises(InputError) as exception_info, guarded("model.name", "it does not work"):
        raise error
    assert str(exception_info.value) == f"model.name: it does not work ({shown})"
    assert exception_info.value.__cause__ is error
    assert "Traceback (most recent call last)" in exception_info.value.details
    assert "in test_any_exception_is_converted" in exception_info.value.details


@pytest.mark.parametrize("error", [InputError("seed: wrong"), KeyboardInterrupt()])
def test_input_errors_and_keyboard_interrupts_pass_unchanged(error):
    with pytest.raises(type(error)) as exception_info, guarded("model.name", "it does not work"):
        raise error
    assert exception_info.value is error


def test_a_guarded_generator_can_be_closed():
    def numbers():
        with guarded("data", "cannot be read", passing=(GeneratorExit,)):
            yield from range(3)

    generator = numbers()
    assert next(generator) == 0
    generator.close()


def test_text_for_messages_is_truncated_to_one_line():
    assert one_line("a\n\n b\tc\u2028d\0") == "a b c d"
    assert len(one_line("x" * 10**6)) == guard.MAX_REASON
    assert len(short([0] * 10**5)) == 60
    assert short(int("f" * 5000, 16)) == "a value of type int"
    assert "\n" not in reason(ValueError("x\n" * 10))


def test_stderr_is_captured_at_the_file_descriptor_and_restored(capfd):
    print("before", file=sys.stderr)
    with capture_stderr() as captured_stderr:
        print("from Python", file=sys.stderr)
        os.write(2, b"from C\n")
        subprocess.run("echo from a process >&2", shell=True, check=True)
        assert captured_stderr.pop_text().splitlines() == ["from Python", "from C", "from a process"]
        print("later", file=sys.stderr)
        assert captured_stderr.pop_text() == "later\n"
    print("after", file=sys.stderr)
    os.write(2, b"from C again\n")
    assert capfd.readouterr().err == "before\nafter\nfrom C again\n"


def test_a_log_handler_created_during_the_capture_works_afterwards():
    code = (
        "import logging, sys\nfrom fishermask.guard import capture_stderr\n"
        "with capture_stderr():\n    handler = logging.StreamHandler()\n    logging.getLogger().addHandler(handler)\n"
        "    logging.error('captured')\nlogging.error('shown')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "shown\n"


def test_stderr_is_captured_without_linux_only_calls(monkeypatch):
    """macOS has no ``os.memfd_create``."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with capture_stderr() as captured_stderr:
        os.write(2, b"text\n")
        assert captured_stderr.pop_text() == "text\n"


def test_a_missing_temporary_folder_is_an_input_error(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(InputError, match="^TMPDIR: cannot make a temporary file .*; set TMPDIR"), capture_stderr():
        pass


def test_a_log_is_a_new_file_with_mode_600(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = Path(write_log("one")), Path(write_log("tw\udcff"))
    assert first.parent == tmp_path
    assert first != second
    assert first.read_text() == "one"
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    assert write_log("x") == "none, Not a directory"


def test_valid_paths_are_accepted():
    for path in (".", "a b/ü ☃.parquet", "/", "~/data", "x" * 255, "data[1].parquet", "C:\\data"):
        assert check_path(path) == path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_sweep_files_with_other_encodings_and_newlines_are_read(folder, capsys, encoding, newline):
    text = yaml.safe_dump(TINY | {"description": "grün\nund mehr"}, allow_unicode=True)
    Path("swéep ☃.yaml").write_bytes(text.replace("\n", newline).encode(encoding))
    assert cli.main(["sweep", "swéep ☃.yaml", "--dry-run"]) == 0
    assert "1 run, 0 finished" in capsys.readouterr().out


def test_yaml_anchors_and_merges_are_expanded(folder, capsys):
    Path("merged.yaml").write_text("""
name: merged
base:
  budget: &budget {initial: 5, query: 5, total: 10}
  imbalance: {kind: balanced, per_class: 10}
  model: {name: mlp, params: {width: 4}}
grid:
  strategy: [random, margin]
  budget: [*budget, {<<: *budget, total: 15}]
""")
    assert cli.main(["sweep", "merged.yaml", "--dry-run"]) == 0
    assert "4 runs, 0 finished, 10 rounds to go" in capsys.readouterr().out


def test_output_of_a_factory_goes_to_stdout(folder, capfd):
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "model=guard_test_models:talks"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    for text in ("to stdout", "to stderr", "from C", "1 run, 0 finished"):
        assert text in output.out
    assert cli.main(["sweep", "tiny.yaml", "--dry-run", "model=guard_test_models:talks", "budget.query=500"]) == 2
    output = capfd.readouterr()
    assert output.err.startswith("fishermask: budget.query: 500 exceeds")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "last"),
    [("raises", "ValueError: first line second line"), ("exits", "SystemExit: it exits with status 3")],
)
def test_a_model_that_raises_in_training_is_a_failed_run(folder, capfd, model, last):
    assert cli.main(["run", "tiny.yaml", f"model=guard_test_models:{model}"]) == 1
    lines = capfd.readouterr().err.splitlines()
    (log,) = folder.glob("results/*/runs/*/error.txt")
    assert lines == [f"fishermask: random-seed=0 failed: {last}", f"  log: {log}"]
    assert "Traceback (most recent call last)" in log.read_text()


QUERIES = {
    "raise KeyError('boom')": "KeyError: 'boom'",
    "raise SystemExit(7)": "RuntimeError: the strategy raises SystemExit (status 7)",
    "return None": "RuntimeError: the strategy returned NoneType None; expected a list, a range, an array or a tensor",
    "return [0.5] * budget": "RuntimeError: the strategy returned list [0.5, ",
    "return pool.candidates[:budget].double()": "RuntimeError: the strategy returned Tensor torch.float64 (10,); ",
    "return pool.candidates[:budget] > 0": "RuntimeError: the strategy returned Tensor torch.bool (10,); ",
    "return pool.candidates[:budget][None]": "RuntimeError: the strategy returned Tensor torch.int64 (1, 10); ",
    "return pool.candidates[:budget - 1]": "RuntimeError: the strategy returned 9 positions, 9 distinct, 9 of them",
    "return pool.candidates[:1].expand(budget)": "RuntimeError: the strategy returned 10 positions, 1 distinct",
    "return pool.candidates[:budget] + 10**6": "RuntimeError: the strategy returned 10 positions, 10 distinct, 0 of",
}


@pytest.mark.parametrize("body", QUERIES)
def test_a_query_that_raises_or_returns_invalid_positions_is_a_failed_run(folder, capfd, monkeypatch, body):
    name = f"junk_{list(QUERIES).index(body)}"  # a module is imported once
    (folder / f"modules/{name}.py").write_text(f"def query(pool, budget, params):\n    {body}\n")
    monkeypatch.setattr(query_strategies, "__path__", [*query_strategies.__path__, str(folder / "modules")])
    assert cli.main(["run", "tiny.yaml", f"strategy={name}"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith(f"fishermask: {name}-seed=0 failed: {QUERIES[body]}")
    assert second.startswith("  log: ")


def test_a_factory_that_returns_the_same_model_twice_is_refused(folder, capfd):
    """The second round would start from the weights that the first round trained."""
    assert cli.main(["run", "tiny.yaml", "model=guard_test_models:shared"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("fishermask: model.name: guard_test_models:shared returned the same model twice")
    assert error.count("\n") == 1


@pytest.mark.parametrize("limit", [1_000, 8_000, 20_000])
def test_a_full_disk_is_a_one_line_error(folder, capfd, limit):
    cli.main(["sweep", "tiny.yaml", "--dry-run"])  # decodes the data
    capfd.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        status = cli.main(["run", "tiny.yaml"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capfd.readouterr().err
    assert status == 2
    assert error.startswith(f"fishermask: output: cannot write {folder}/results/tiny-")
    assert error.count("\n") == 1
    assert not list(folder.rglob("*.partial"))


def test_stdout_that_cannot_be_written_is_a_one_line_error():
    command = [sys.executable, "-m", "fishermask.cli", "strategies"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "fishermask: stdout: cannot be written to (No space left on device)\n"
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_a_failed_run_of_a_sweep_prints_two_lines(folder):
    command = [sys.executable, "-m", "fishermask.cli", "sweep", "tiny.yaml", "model=guard_test_models:exits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    log = folder / "results/tiny/runs/random-seed=0/error.txt"
    last = "SystemExit: it exits with status 3"
    assert result.stderr.splitlines() == [f"fishermask: random-seed=0 failed: {last}", f"  log: {log}"]
    assert "SystemExit: 3" in log.read_text()


def test_an_input_error_is_extracted_from_a_tune_error():
    from ray.tune.error import TuneError

    from fishermask.sweeps.tune_runner import _find_input_error

    full = InputError("output: cannot write rounds.jsonl")
    try:
        try:
            raise full from OSError(28, "No space left on device")
        except InputError:
            raise TuneError("Traceback: ...") from None
    except TuneError as wrapped:
        assert _find_input_error(wrapped) is full
    assert _find_input_error(TuneError("another")) is None
