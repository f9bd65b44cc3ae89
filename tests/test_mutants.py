"""The list of deliberate mistakes in ``scripts/mutant_list.py``, and the script that puts them into the source."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # for mutants.py and mutant_list.py

import mutants  # noqa: E402
from mutant_list import MUTANTS, Mutant  # noqa: E402


def test_the_text_that_each_mutant_replaces_occurs_once_in_its_file():
    for mutant in MUTANTS:
        text = (ROOT / mutants.PACKAGE / mutant.file).read_text()
        assert mutants.apply_mutant(text, mutant) != text


def test_the_list_covers_all_layers_and_names_tests_that_exist():
    assert len(MUTANTS) >= 75
    layers = {mutant.file.split("/")[0] for mutant in MUTANTS}
    assert layers >= {
        "tensors",
        "pool",
        "query_strategies",
        "data",
        "experiment",
        "results",
        "sweeps",
        "cli.py",
        "config.py",
    }
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        for name in mutant.tests.split():
            assert (ROOT / f"tests/test_{name}.py").exists(), name


SOURCE = "def double(x):\n    return x + x\n\n\ndef zero():\n    return 0\n"
KILLED = Mutant("sums.py", "return x + x", "return x", "double is not double", "other sums")
SURVIVOR = Mutant("sums.py", "return 0", "return 1", "zero is one", "sums")
EXCUSED = SURVIVOR._replace(old="return 0", new="return 00", reason="it is the same number")


@pytest.fixture
def tree(tmp_path):
    """A package with one file and two functions, of which one has a test."""
    package, tests = tmp_path / "platform/fishermask", tmp_path / "tests"
    (package / "query_strategies").mkdir(parents=True)
    tests.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sums.py").write_text(SOURCE)
    (tests / "test_sums.py").write_text(
        "from fishermask import sums\n\ndef test_double():\n    assert sums.double(2) == 4\n"
    )
    (tests / "test_other.py").write_text("def test_nothing():\n    pass\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_mutants_are_killed_by_a_failing_test_and_survive_otherwise(tree, capsys):
    assert mutants.main([], tree, [KILLED, SURVIVOR, KILLED._replace(tests="sums other")]) == 1
    out = capsys.readouterr().out
    assert "2 of 3 mutants killed" in out
    assert "killed    sums.py                      double is not double  [test_sums.py::test_double" in out
    assert "survived: 2 sums.py: zero is one; NO REASON GIVEN" in out
    assert (tree / "platform/fishermask/sums.py").read_text() == SOURCE
    store = tree / "build/mutants.json"
    before = store.stat().st_mtime_ns
    assert mutants.main(["1"], tree, [KILLED, SURVIVOR]) == 0
    assert store.stat().st_mtime_ns == before  # nothing was run again
    (tree / "tests/test_sums.py").write_text("def test_nothing():\n    pass\n")
    assert mutants.main(["1"], tree, [KILLED, SURVIVOR]) == 1


def test_the_whole_suite_runs_for_a_survivor(tree, capsys):
    name = tree / "tests/test_zero.py"
    name.write_text("from fishermask import sums\n\ndef test_zero():\n    assert sums.zero() == 0\n")
    assert mutants.main([], tree, [SURVIVOR]) == 1
    assert mutants.main(["--whole-suite"], tree, [SURVIVOR, EXCUSED]) == 0
    assert "1 of 2 mutants killed" in capsys.readouterr().out


def test_a_text_that_is_not_unique_and_tests_that_fail_without_a_mutant_are_errors(tree):
    with pytest.raises(ValueError, match="'return' occurs 2 times; correct scripts/mutant_list.py"):
        mutants.main([], tree, [KILLED._replace(old="return")])
    (tree / "tests/test_sums.py").write_text("def test_wrong():\n    assert False\n")
    with pytest.raises(RuntimeError, match="test_sums.py does not pass without a mutant"):
        mutants.main([], tree, [SURVIVOR])
    with pytest.raises(RuntimeError, match="pytest ended with status 4"):
        mutants.is_killed(4, "no such file")


def test_mutants_are_chosen_by_number_range_and_file():
    listed = [Mutant(f"{name}.py", "", "", "", "") for name in ("a", "b", "ab", "c")]
    assert mutants.select_mutants([], listed) == [0, 1, 2, 3]
    assert mutants.select_mutants(["4", "1-2"], listed) == [0, 1, 3]
    assert mutants.select_mutants(["a"], listed) == [0, 2]
