"""Strategies of the user: files beside a sweep file, entry points of installed packages, functions."""

import sys
from importlib.metadata import EntryPoint

import pytest
import torch
import yaml

from fishermask import query_strategies
from fishermask.config import StrategyConfig
from fishermask.errors import InputError
from fishermask.sweeps import sweep_file

QUERY = '''"""The first candidates."""
import fishermask
from helper import OFFSET

class Params(fishermask.StrategyParams):
    offset: int = OFFSET

def query(pool, budget, params):
    return pool.candidates[params.offset :][:budget]

def last(pool, budget):
    return pool.candidates[-budget:].tolist()
'''


class FakePool:
    candidates = torch.arange(10, 20)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "helper.py").write_text("OFFSET = 2\n")
    (tmp_path / "mine.py").write_text(QUERY)
    return tmp_path


def load(name, params=None):
    return query_strategies.load(StrategyConfig(name=name, params=params or {}))


def test_file_is_a_strategy_with_params_and_imports_its_neighbors(folder):
    paths, modules = list(sys.path), set(sys.modules)
    assert load(f"{folder}/mine.py").query(FakePool, 3).tolist() == [12, 13, 14]
    assert load(f"{folder}/mine.py", {"offset": 0}).query(FakePool, 2).tolist() == [10, 11]
    assert load(f"{folder}/mine.py:last").query(FakePool, 2).tolist() == [18, 19]
    assert sys.path == paths
    assert set(sys.modules) - modules == {"helper"}
    assert sorted(file.name for file in folder.glob("*.py")) == ["helper.py", "mine.py"]
    sys.modules.pop("helper")


def test_changed_file_is_imported_again(tmp_path):
    file = tmp_path / "changing.py"
    for position in (12, 15):
        file.write_text(f"def query(pool, budget):\n    return [{position}]\n")
        assert load(str(file)).query(FakePool, 1).tolist() == [position]


def test_file_whose_local_module_changed_is_imported_again(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "offsets", raising=False)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "mine.py").write_text("from offsets import SIZE\ndef query(pool, budget):\n    return [SIZE]\n")
        for position in (12, 15 + len(folder.name), 18):
            (folder / "offsets.py").write_text(f"SIZE = {position}\n")
            assert load(f"{folder}/mine.py").query(FakePool, 1).tolist() == [position]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "mine.py", "strategy.name: .*mine.py cannot be read"),
        ("1 / 0", "mine.py", "strategy.name: .*mine.py cannot be imported .ZeroDivisionError"),
        ("x = 1", "mine.py", r"mine.py: needs a function query\(pool, budget, params\)"),
        ("def query(pool, budget): ...", "mine.py:best", "mine.py: needs a function best"),
        ("def query(pool): ...", "mine.py", r"mine.py: query takes \(pool\); expected a function \(pool, budget\) or"),
        ("def query(pool, budget, *, size): ...", "mine.py", "mine.py: query takes "),
        ("def three(num_classes, width=8): ...", "mine.py:three", r"three takes \(num_classes, width=8\); expected"),
        ("def three(num_classes, width): ...", "mine.py:three", "mine.py: three takes "),
        ("def three(pool, budget=8): ...", "mine.py:three", "mine.py: three takes .*, without a default of budget"),
        (
            "def query(pool, budget): ...\nclass Params: ...",
            "mine.py",
            "class that derives from fishermask.StrategyParams",
        ),
    ],
)
def test_file_without_a_usable_strategy_is_refused(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


def test_unknown_param_of_a_file_is_refused(folder):
    with pytest.raises(InputError, match="strategy.params.size: unknown key; there are offset"):
        load(f"{folder}/mine.py", {"size": 1})
    sys.modules.pop("helper")


def test_files_are_found_beside_the_sweep_file_and_named_without_their_folder(folder, monkeypatch, tmp_path_factory):
    settings = {
        "name": "files",
        "base": {"strategy": "./mine.py", "model": "./networks.py:make"},
        "grid": {"strategy": ["margin", "./mine.py:last", {"name": "./mine.py", "params": {"offset": 1}}]},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    runs = sweep_file.expand(sweep_file.load(folder / "sweep.yaml")).runs
    assert [run.config.strategy.name for run in runs] == ["margin", f"{folder}/mine.py:last", f"{folder}/mine.py"]
    assert [run.name for run in runs] == ["margin", "mine_last", "mine(offset=1)"]
    assert {run.config.model.name for run in runs} == {f"{folder}/networks.py:make"}
    assert query_strategies.load(runs[2].config.strategy).query(FakePool, 1).tolist() == [11]
    sys.modules.pop("helper")


def test_installed_package_adds_a_strategy_by_an_entry_point(monkeypatch, folder):
    (folder / "packaged_strategy.py").write_text(
        '"""A packaged strategy."""\ndef query(pool, budget):\n    return [19]\n'
    )
    monkeypatch.syspath_prepend(folder)
    point = EntryPoint(name="packaged_strategy", value="packaged_strategy", group="fishermask.strategies")
    monkeypatch.setattr(query_strategies, "entry_points", lambda group: [point] if group == point.group else [])
    assert "packaged_strategy" in query_strategies.available()
    assert query_strategies.describe("packaged_strategy")[0] == "A packaged strategy."
    assert load("packaged_strategy").query(FakePool, 1).tolist() == [19]


@pytest.mark.parametrize(
    ("function", "params", "expected"),
    [
        (lambda pool, budget: pool.candidates[:budget], None, [10, 11]),
        (lambda pool, budget, params: pool.candidates[params["skip"] :][:budget], {"skip": 3}, [13, 14]),
        (lambda *arguments: arguments[0].candidates[: arguments[1]], None, [10, 11]),
    ],
)
def test_function_is_a_strategy(function, params, expected):
    assert query_strategies.from_function(function, params).query(FakePool, 2).tolist() == expected


def test_function_with_other_arguments_is_refused():
    with pytest.raises(InputError, match=r"takes \(pool\); expected a function \(pool, budget\)"):
        query_strategies.from_function(lambda pool: [])
    with pytest.raises(InputError, match="params: <lambda> takes no params"):
        query_strategies.from_function(lambda pool, budget: [], {"x": 1})
