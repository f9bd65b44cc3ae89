"""Checks of a sweep's folder: it can be written to, and its rounds have the identity of the runs to continue."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fishermask.config import ExperimentConfig, parse
from fishermask.errors import InputError
from fishermask.experiment.identity import describe_differences, identify, identify_settings
from fishermask.experiment.inputs import load_pool
from fishermask.guard import guarded, plural
from fishermask.results.files import check_unlocked, pool_name
from fishermask.sweeps.sweep_file import Run, Sweep, SweepConfig, expand
from fishermask.yaml_files import read_yaml

MAX_DIFFERENCES = 5
"""Maximum number of differing values that a message lists."""


def check_folder(sweep: Sweep, continue_anyway: bool = False, dry_run: bool = False) -> list[str]:
    """Check that the folder of ``sweep`` is empty or holds results of the same sweep; return notes for the user.

    Two sweeps are the same if they have the same base and vary the same paths. The values of a path may differ.

    Args:
        continue_anyway: whether runs whose rounds have another identity may be continued.
        dry_run: whether another process may be writing to the folder.

    Raises:
        InputError: the folder cannot be written to, is in use by another process, holds something else, or holds
            rounds of another identity.
    """
    with guarded("output", f"{sweep.folder} cannot be used"):
        _check_writable(sweep.folder)
        if not dry_run:
            check_unlocked(sweep.folder)
        path = sweep.folder / "config.yaml"
        if not os.path.lexists(path):
            if sweep.folder.exists() and any(file.name != ".lock" for file in sweep.folder.iterdir()):
                raise InputError(
                    f"name: {sweep.folder} exists and holds no sweep's results; choose another name=NAME, or move it "
                    "away"
                )
            return []
        stored = parse(SweepConfig, read_yaml(path), f"{path}:")
        if set(stored.grid) != set(sweep.config.grid):
            raise InputError(
                f"name: {sweep.folder} holds another sweep's results, which vary "
                f"{', '.join(stored.grid) or 'nothing'}; choose another name=NAME, or move it away"
            )
        return _check_identities(sweep, stored, continue_anyway)


def check_pools(sweep: Sweep) -> None:
    """Check that the data of each run with rounds still give the pool of its rounds.

    Raises:
        InputError: a pool differs.
    """
    names: dict[str, str] = {}
    for run in sweep.runs:
        if run.folder.rounds.exists():
            key = pool_key(run.config)
            if key not in names:
                names[key] = pool_name(pool_images(run.config))
            run.folder.check_pool(names[key])


def pool_key(config: ExperimentConfig) -> str:
    """Return a text that is equal for runs with the same pool."""
    return config.model_dump_json(include={"data", "imbalance", "seed"})


def pool_images(config: ExperimentConfig) -> Iterator[tuple[str, str]]:
    """Return the id and class of each image in the pool of a run."""
    data = load_pool(config.data, config.imbalance, config.seed)
    classes = (data.classes[label] for label in data.train.label_numbers())
    return zip(data.train.ids, classes, strict=True)


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        # Create a folder, because permissions do not show whether root can write, as on a read-only file system.
        Path(tempfile.mkdtemp(prefix=".writable.", dir=existing)).rmdir()
    except OSError as error:
        raise InputError(
            f"output: cannot write to {folder} ({existing}: {error.strerror}); choose another with output=DIR"
        ) from None


def _check_identities(sweep: Sweep, stored: SweepConfig, continue_anyway: bool) -> list[str]:
    """Return notes on the rounds in the folder that have another identity than the current one."""
    varied = set(stored.grid) | ({"strategy.params"} if "strategy.name" in stored.grid else set())
    try:
        recorded = identify_settings(expand(stored).runs[0].config)
    except InputError as error:
        raise InputError(
            f"name: the settings in {sweep.folder} are not valid here ({error}); choose another name=NAME",
            error.details,
        ) from error
    current = identify_settings(sweep.runs[0].config)
    problems = [describe_differences({"settings": recorded}, {"settings": current}, varied)]
    finished_counts: dict[str, int] = {}
    for run in sweep.runs:
        rounds = run.folder.history()
        differences, same_settings = _compare(run) if rounds else ([], True)
        if differences and same_settings and len(rounds) >= run.config.budget.num_rounds:
            reason = _join(differences)
            finished_counts[reason] = finished_counts.get(reason, 0) + 1
        else:
            problems.append([f"{run.name}: {differences[0]}", *differences[1:]] if differences else [])
    notes = [
        f"{plural(count, 'finished run')} differ{'s' * (count == 1)}: {reason}"
        for reason, count in finished_counts.items()
    ]
    problem = next((_join(differences) for differences in problems if differences), None)
    if problem is None:
        return notes
    if not continue_anyway:
        raise InputError(
            f"name: {sweep.folder} holds rounds of another identity: {problem}; choose another name=NAME, or add "
            "--continue-anyway, which records the change in the rounds from there on"
        )
    return [*notes, f"continuing under another identity: {problem}"]


def _compare(run: Run) -> tuple[list[str], bool]:
    """Return how the identity of a run's rounds differs from the current one, and whether the settings are equal."""
    current, recorded = identify(run.config), run.folder.provenance().identity
    if recorded is None:  # written by a version that did not record identities
        config = run.folder.config()
        settings = current["settings"] if config is None else identify_settings(config)
        recorded = current | {"fishermask": "of an unknown version", "settings": settings}
    return describe_differences(recorded, current), recorded.get("settings") == current["settings"]


def _join(differences: list[str]) -> str:
    more = len(differences) - MAX_DIFFERENCES
    return "; ".join(differences[:MAX_DIFFERENCES] + ([f"{more} more"] if more > 0 else []))
