"""Settings as a whole: what a run's fingerprint depends on, and that no value of another type passes for a number."""

from typing import Any

import pytest

from fishermask.config import Config, ExperimentConfig, parse
from fishermask.errors import InputError
from fishermask.sweeps import sweep_file
from fishermask.sweeps.sweep_file import SweepConfig

WITHOUT_EFFECT = {"strategy.label", *(f"resources.{name}" for name in ("shards", "workers", "memory", "restarts"))}
WITHOUT_EFFECT |= {"resources.cpus_per_shard", "resources.gpus_per_shard"}
"""Settings that change no result: a name, and how the pool is cut into shards."""


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case dict():
            return value | {"another": 1}
    return f"{value} and more"


def variants(config: Config, prefix: str = "") -> dict[str, Config]:
    """Dotted path of each setting -> ``config`` with another value there."""
    found: dict[str, Config] = {}
    for name in type(config).model_fields:
        value, path = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, Config):
            inner = variants(value, f"{path}.")
            found |= {key: config.model_copy(update={name: one}) for key, one in inner.items()}
        else:
            found[path] = config.model_copy(update={name: changed(value)})
    return found


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("imbalance", [{"kind": "step", "ratio": 2}, {"kind": "long_tail", "ratio": 2}])
def test_a_fingerprint_depends_on_every_setting_that_can_change_a_result(imbalance):
    base = parse(ExperimentConfig, {"imbalance": imbalance})
    found = variants(base)
    same = {path for path, config in found.items() if config.fingerprint() == base.fingerprint()}
    assert same == WITHOUT_EFFECT
    fingerprints = [config.fingerprint() for path, config in found.items() if path not in WITHOUT_EFFECT]
    assert len(set(fingerprints)) == len(fingerprints)


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
def test_a_value_of_another_type_is_refused_in_one_line(settings, path):
    with pytest.raises(InputError, match=f"^{path}: ") as caught:
        parse(ExperimentConfig, settings)
    assert "\n" not in str(caught.value)


def test_the_runs_of_a_sweep_share_no_settings_with_it_or_with_each_other(tmp_path):
    variants = [{"name": "fisher_mask", "params": {"fraction": 0.1}}, "margin"]
    grid = {"strategy": variants, "training.max_epochs": [3, 5], "seed": [0, 1]}
    config = SweepConfig(name="s", base={"budget": {"query": 7}}, grid=grid, output=str(tmp_path))
    before = config.model_dump_json()
    runs = sweep_file.expand(config).runs
    assert config.model_dump_json() == before
    assert [run.config.training.max_epochs for run in runs] == [3, 3, 5, 5] * 2
    assert {run.config.budget.query for run in runs} == {7}
    assert [run.config.strategy.params for run in runs] == [{"fraction": 0.1}, {}] * 4
