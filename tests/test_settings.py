"""Settings: the identity of a run depends on each setting that can change a result, and types are strict."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from fishermask import query_strategies
from fishermask.config import Config, ExperimentConfig, parse
from fishermask.environment import installed_version
from fishermask.errors import InputError
from fishermask.experiment import identity as identity_module
from fishermask.experiment.identity import describe_differences, identify
from fishermask.query_strategies.bait import Params
from fishermask.sweeps import sweep_file
from fishermask.sweeps.sweep_file import SweepConfig

WITHOUT_EFFECT = {"strategy.label", *(f"resources.{name}" for name in ("shards", "workers", "memory", "restarts"))}
WITHOUT_EFFECT |= {"resources.cpus_per_shard", "resources.gpus_per_shard"}  # the device of in-process shards is gpus
"""Settings that change no result: the label, and the number and place of shards."""


def choose_another_value(value: Any) -> Any:
    """Return another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case dict():
            return value | {"another": 1}
    return f"{value} and more"


def list_variants(config: Config, prefix: str = "") -> dict[str, Config]:
    """Return ``config`` with another value of one setting, by the dotted path of that setting."""
    configs: dict[str, Config] = {}
    for name in type(config).model_fields:
        value, path = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, Config):
            inner = list_variants(value, f"{path}.")
            configs |= {key: config.model_copy(update={name: variant}) for key, variant in inner.items()}
        else:
            configs[path] = config.model_copy(update={name: choose_another_value(value)})
    return configs


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("imbalance", [{"kind": "step", "ratio": 2}, {"kind": "long_tail", "ratio": 2}])
def test_the_identity_of_a_run_depends_on_every_setting_that_can_change_a_result(imbalance, monkeypatch):
    # Another test covers parameters that the strategy does not have.
    monkeypatch.setattr(query_strategies, "load", lambda strategy: SimpleNamespace(params=Given(**strategy.params)))
    monkeypatch.setattr(identity_module, "load_pool", lambda *settings: SimpleNamespace(hashes={}))
    base = parse(ExperimentConfig, {"imbalance": imbalance})
    configs = list_variants(base)
    identities = {path: identify(config) for path, config in configs.items()}
    assert {path for path, identity in identities.items() if identity == identify(base)} == WITHOUT_EFFECT
    different = [json.dumps(identity) for path, identity in identities.items() if path not in WITHOUT_EFFECT]
    assert len(set(different)) == len(different)


class Given(BaseModel):
    model_config = ConfigDict(extra="allow")


def test_the_identity_holds_the_defaults_of_the_strategys_parameters():
    def identity(**params):
        return identify(parse(ExperimentConfig, {"strategy": {"name": "bait", "params": params}}))

    default = Params().damping
    assert identity() == identity(damping=default)
    assert describe_differences(identity(), identity(damping=0.5)) == [
        f"strategy.params.damping is {default} in the folder, 0.5 here"
    ]


def test_the_identity_holds_the_content_of_the_users_model_file(tmp_path):
    file = tmp_path / "mine.py"
    config = parse(ExperimentConfig, {"model": f"{file}:make", "strategy": "random"})
    with pytest.raises(InputError, match=f"^model.name: {file}"):
        identify(config)
    file.write_text("x = 1")
    original = identify(config)
    file.write_text("x = 2")
    (difference,) = describe_differences(original, identify(config))
    assert difference.startswith("code.model.name is ")


def test_the_identity_holds_the_modules_that_the_users_model_file_imports_from_its_folder(tmp_path):
    for name, text in {
        "mine.py": "import json, layers.blocks as b\nfrom helper import W\ndef make():\n    from . import ignored",
        "helper.py": "import mine\nW = 1",
        "layers/__init__.py": "from .norms import norm\nfrom .. import absent",
        "layers/blocks.py": "from . import linear",
        "layers/norms.py": "broken = (",
        "layers/linear.py": "from layers import norms",
        "unrelated.py": "x = 1",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    config = parse(ExperimentConfig, {"model": f"{tmp_path}/mine.py:make", "strategy": "random"})
    before = identify(config)
    modules = ["helper", "layers", "layers.blocks", "layers.linear", "layers.norms", "mine"]
    assert list(before["code"]) == ["model.name", *(f"model.name/{module}" for module in modules)]
    for path in ("helper.py", "layers/norms.py", "layers/__init__.py"):
        with (tmp_path / path).open("a") as file:
            file.write("\nW = 2")
        (difference,) = describe_differences(before, after := identify(config))
        assert difference.startswith(f"code.model.name/{path[:-3].replace('/', '.').removesuffix('.__init__')} is ")
        before = after


def test_the_identity_holds_version_source_devices_and_threads():
    def identity(**resources):
        return identify(parse(ExperimentConfig, {"resources": resources, "strategy": "random"}))

    assert identity()["fishermask"] == installed_version()
    assert identity(gpus=0.5)["device"] == {"trial": "cuda", "shards": "cuda"}
    assert identity(gpus=0.5) == identity(gpus=1)
    ray_shards = identity(workers="ray", gpus_per_shard=1)
    assert describe_differences(identity(), ray_shards) == ["device.shards is 'cpu' in the folder, 'cuda' here"]
    assert describe_differences(identity(), identity(cpus=2)) == ["threads is 1 in the folder, 2 here"]
    older_identity = identity() | {"fishermask": "0.0.9 (0123)"}
    assert describe_differences(older_identity, identity()) == [
        f"fishermask 0.0.9 (0123) in the folder, {installed_version()} here"
    ]


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"seed": "3"}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 3.0}, "seed"),
        ({"budget": {"query": "5"}}, "budget.query"),
        ({"training": {"learning_rate": "0.1"}}, "training.learning_rate"),
        ({"training": {"max_epochs": 2.0}}, "training.max_epochs"),
        ({"data": {"download": "yes"}}, "data.download"),
        ({"data": {"download": 1}}, "data.download"),
        ({"data": {"root": 5}}, "data.root"),
        ({"engine": {"drift": float("nan")}}, "engine.drift"),
        ({"engine": {"channels_last": "no"}}, "engine.channels_last"),
    ],
    ids=str,
)
def test_value_of_another_type_is_refused_in_one_line(settings, path):
    with pytest.raises(InputError, match=f"^{path}: ") as exception_info:
        parse(ExperimentConfig, settings)
    assert "\n" not in str(exception_info.value)


def test_runs_of_a_sweep_share_no_mutable_settings(tmp_path):
    variants = [{"name": "fisher_mask", "params": {"fraction": 0.1}}, "margin"]
    grid = {"strategy": variants, "training.max_epochs": [3, 5], "seed": [0, 1]}
    config = SweepConfig(name="s", base={"budget": {"query": 7}}, grid=grid, output=str(tmp_path))
    original = config.model_dump_json()
    runs = sweep_file.expand(config).runs
    assert config.model_dump_json() == original
    assert [run.config.training.max_epochs for run in runs] == [3, 3, 5, 5] * 2
    assert {run.config.budget.query for run in runs} == {7}
    assert [run.config.strategy.params for run in runs] == [{"fraction": 0.1}, {}] * 4
