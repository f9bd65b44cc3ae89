"""Running a sweep as trials of Ray Tune, as many at once as the cluster holds."""

import functools
import json
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from fishermask.config import ExperimentConfig
from fishermask.results.tables import varied_settings
from fishermask.sweep.cluster import bundles, check_resources
from fishermask.sweep.plan import Sweep
from fishermask.sweep.recorder import Recorder
from fishermask.sweep.runner import History, create_folders, missing, rounds


def run_on_ray(sweep: Sweep, console: Console, fixed_size: bool) -> Recorder:
    """Run what is missing of a sweep; Ray must be connected.

    A trial sends its rounds to this process, which alone writes: workers need no common file system.

    Args:
        fixed_size: the cluster has all that it will ever have, so that a run which asks for more is refused.

    Raises:
        InputError: a run asks for more than the cluster has.
    """
    runs = missing(sweep)
    if fixed_size:
        for run, _ in runs:
            check_resources(run.config.resources)
    create_folders(sweep, runs)
    recorder = Recorder(runs, varied_settings(sweep.folder), console, len(sweep.runs) - len(runs))
    configs = {run.name: (run.config, history) for run, history in runs}
    trainable = tune.with_resources(
        functools.partial(trial, runs=configs, folder=str(Path.cwd())),
        lambda settings: tune.PlacementGroupFactory(bundles(configs[settings["run"]][0].resources)),
    )
    # Tune keeps records of its own, which are of no use once the rounds are written.
    with recorder, tempfile.TemporaryDirectory(prefix="fishermask-") as scratch:
        tune.Tuner(
            trainable,
            param_space={"run": tune.grid_search(list(configs))},
            tune_config=tune.TuneConfig(trial_dirname_creator=lambda trial: trial.trial_id, reuse_actors=True),
            run_config=tune.RunConfig(name="trials", storage_path=scratch, verbose=0, callbacks=[_Listener(recorder)]),
        ).fit()
    return recorder


class _Listener(tune.Callback):
    """Hands what trials report to a recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks to restore them; we never restore, and an open terminal cannot be pickled.
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:
        if "round" in result:
            self.recorder.record(trial.config["run"], json.loads(result["round"]))
        elif "error" in result:
            self.recorder.fail(trial.config["run"], result["error"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        if trial.config["run"] not in self.recorder.failed:
            self.recorder.fail(trial.config["run"], "the trial's process was lost")


def trial(settings: dict[str, Any], runs: dict[str, tuple[ExperimentConfig, History]], folder: str) -> None:
    """One run as a trial: each round is reported as it ends. Relative paths start at ``folder`` if it is there."""
    if Path(folder).is_dir():
        os.chdir(folder)
    config, history = runs[settings["run"]]
    try:
        rounds(config, history, lambda result: tune.report({"round": json.dumps(result)}))
    except Exception:
        tune.report({"error": traceback.format_exc()})
        raise
