"""The identity of a run: everything that determines its rounds. A run never silently continues under another one."""

from collections.abc import Collection
from typing import Any

from fishermask import query_strategies
from fishermask.config import ExperimentConfig, ResourcesConfig, flatten
from fishermask.environment import loaded_version
from fishermask.experiment.inputs import load_pool
from fishermask.guard import guarded, short
from fishermask.paths import require_file
from fishermask.user_modules import find_local_modules, hash_file, split_file_name

Identity = dict[str, Any]
"""A JSON object: ``fishermask`` (version and source), ``code`` (hashes of the user's files and of the modules that they
import from their folders), ``data`` (hashes of the training and test images), ``device`` of trial and shards,
``threads`` of the trial, and ``settings`` with all defaults, including those of strategy parameters."""

DATA = {"data.train": "training", "data.test": "test"}
"""Dotted paths of the hashes in an identity, and the images that they stand for."""


def num_threads(resources: ResourcesConfig) -> int:
    """Return the number of CPU threads of a trial. It affects the rounding of sums."""
    return max(1, int(resources.cpus))


def devices(resources: ResourcesConfig) -> dict[str, str]:
    """Return ``cpu`` or ``cuda`` for a run's trial and for its shards."""
    gpus_of_shards = resources.gpus if resources.workers == "in_process" else resources.gpus_per_shard
    return {"trial": "cuda" if resources.gpus else "cpu", "shards": "cuda" if gpus_of_shards else "cpu"}


def identify(config: ExperimentConfig) -> Identity:
    """Return the identity of a run with these settings in this process.

    Raises:
        InputError: the data cannot be read, the strategy does not exist, or it does not have the given parameters.
    """
    return {
        "fishermask": loaded_version(),
        "code": _hash_user_files({"model.name": config.model.name, "strategy.name": config.strategy.name}),
        "data": load_pool(config.data, config.imbalance, config.seed).hashes,
        "device": devices(config.resources),
        "threads": num_threads(config.resources),
        "settings": identify_settings(config),
    }


def identify_settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return the ``settings`` of the identity of a run, without reading its data.

    Raises:
        InputError: the strategy does not exist, or does not have the given parameters.
    """
    settings = config.model_dump(mode="json", exclude={"resources": True, "strategy": {"label"}})
    params = query_strategies.load(config.strategy).params
    with guarded("strategy.params", "cannot be written as JSON"):
        settings["strategy"]["params"] = params.model_dump(mode="json")
    return settings


def _hash_user_files(names: dict[str, str]) -> dict[str, str]:
    """Return a hash of each of the user's files among ``names``, by the setting that names it.

    A local module that the file imports has the key ``SETTING/MODULE``.
    """
    hashes = {}
    for setting, name in names.items():
        if (parts := split_file_name(name)) is not None:
            require_file(parts[0], setting)
            with guarded(setting, f"{parts[0]} cannot be read"):
                hashes[setting] = hash_file(parts[0])
                modules = find_local_modules(parts[0])
                hashes |= {f"{setting}/{module}": hash_file(path) for module, path in modules.items()}
    return hashes


def describe_differences(recorded: Identity, current: Identity, ignored: Collection[str] = ()) -> list[str]:
    """Return a phrase for each value that differs between the identity in a run's folder and the current identity.

    Args:
        ignored: dotted paths of settings that may differ.
    """
    old, new = flatten(recorded), flatten(current)
    if "data" not in recorded:  # written by a version that did not hash the data
        new = {key: value for key, value in new.items() if key not in DATA}
    phrases = []
    for key in dict.fromkeys([*new, *old]):
        path, values = key.removeprefix("settings."), (old.get(key), new.get(key))
        if values[0] == values[1] or any(path == parent or path.startswith(f"{parent}.") for parent in ignored):
            continue
        if key in DATA:
            phrases.append(f"the {DATA[key]} images or their labels differ from those of the earlier rounds")
        elif path == "fishermask":
            phrases.append(f"fishermask {values[0]} in the folder, {values[1]} here")
        else:
            phrases.append(f"{path} is {short(values[0])} in the folder, {short(values[1])} here")
    return phrases
