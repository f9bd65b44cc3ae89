"""Run a sweep as trials of Ray Tune, as many concurrently as fit on the cluster."""

import functools
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from fishermask.sweeps import cluster  # noqa: F401  before Ray, which reads its settings when it is imported

# isort: split
import ray
from ray import tune
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.tune.error import TuneError
from rich.console import Console

from fishermask.environment import installed_version, loaded_version
from fishermask.errors import InputError
from fishermask.experiment.run_plan import RunPlan
from fishermask.planning.placement import Cluster, check_placement, equal_reservations
from fishermask.results.tables import varied_settings
from fishermask.sweeps import run_storage, source_version
from fishermask.sweeps.recorder import Recorder
from fishermask.sweeps.runner import (
    Plans,
    compute_rounds,
    create_folders,
    describe_failure,
    requested_bundles,
    unfinished_runs,
)
from fishermask.sweeps.sweep_file import Sweep

LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
"""Errors of a lost process or node, after which the run may continue elsewhere."""

# Tune logs each failure under the name of its trial; the recorder reports it under the name of the run.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

STAGE_SECONDS = 2.0
"""Time between two updates of the progress display."""


def run_on_ray(sweep: Sweep, plans: Plans, nodes: Cluster, console: Console) -> Recorder:
    """Compute the unfinished runs of a sweep. Ray must be connected to the cluster of ``nodes``.

    Trials send their rounds to this process, which writes the files, so the nodes need no shared file system. A trial
    whose process is lost restarts after the last written round.

    Raises:
        InputError: a run requests more than the cluster can ever have.
    """
    runs = unfinished_runs(sweep)
    requests = equal_reservations({run.name: requested_bundles(plans[run.name]) for run, _ in runs}, nodes)
    for problem in {check_placement(request, nodes) for request in requests.values()} - {None}:
        console.print(f"{problem}; these runs wait until the autoscaler has started nodes (see ray status)")
    create_folders(sweep, runs)
    restarts = max((run.config.resources.restarts for run, _ in runs), default=0)
    recorder = Recorder(runs, plans, varied_settings(sweep.folder), console, len(sweep.runs) - len(runs))
    configs = {run.name: (plans[run.name], requests[run.name][-1]["memory"]) for run, _ in runs}
    checked_nodes = {node["NodeID"] for node in ray.nodes()}
    storage = run_storage.start({run.name: run.folder.path for run, _ in runs})
    trainable = tune.with_resources(
        functools.partial(
            trial,
            runs=configs,
            storage=storage,
            folder=str(Path.cwd()),
            version=loaded_version(),
            nodes=checked_nodes,
        ),
        lambda settings: tune.PlacementGroupFactory(
            [{kind: amount for kind, amount in bundle.items() if amount} for bundle in requests[settings["run"]]]
        ),
    )
    # Tune's own files are temporary, because the recorder writes the rounds.
    with recorder, tempfile.TemporaryDirectory(prefix="fishermask-") as temporary_folder:
        run_config = tune.RunConfig(
            name="trials",
            storage_path=temporary_folder,
            verbose=0,
            callbacks=[_Listener(recorder, restarts, storage)],
            failure_config=tune.FailureConfig(max_failures=restarts),
        )
        tuner = tune.Tuner(
            trainable,
            param_space={"run": tune.grid_search(list(configs))},
            tune_config=tune.TuneConfig(trial_dirname_creator=lambda trial: trial.trial_id, reuse_actors=True),
            run_config=run_config,
        )
        try:
            tuner.fit()
        except TuneError as error:  # wraps errors of the recorder, such as a full disk
            raise (_find_input_error(error) or error) from None
    ray.kill(storage)
    return recorder


def _find_input_error(error: BaseException | None) -> InputError | None:
    """Return the input error among the causes of ``error``; None if there is none."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


class _Listener(tune.Callback):
    """Passes the reports of trials to a recorder."""

    def __init__(self, recorder: Recorder, restarts: int, storage: Any) -> None:
        self.recorder, self.restarts, self.storage = recorder, restarts, storage
        self.last_update = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks to restore them. This one is never restored, and a terminal cannot be pickled.
        return {}

    def on_step_end(self, iteration: int, trials: Any, **_: Any) -> None:
        if time.monotonic() - self.last_update < STAGE_SECONDS:
            return
        ready, _pending = ray.wait([self.storage.pop_progress.remote()], timeout=STAGE_SECONDS)
        for stages in ray.get(ready):
            for run, (stage, done, total) in stages.items():
                self.recorder.show_stage(run, stage, done, total)
        self.last_update = time.monotonic()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:
        if "round" in result:
            self.recorder.record(trial.config["run"], json.loads(result["round"]))
        elif "error" in result:
            trial.max_failures = 0  # an error of the run, which would occur again
            self.recorder.fail(trial.config["run"], result["error"])

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self.recorder.report_restart(trial.config["run"], trial.num_failures, self.restarts)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        if trial.config["run"] not in self.recorder.failed:
            reason = Path(trial.error_file).read_text() if trial.error_file else ""
            last_line = (
                f"its process was lost after {trial.num_failures - 1} restarts; raise resources.restarts, or check "
                "whether the node ran out of memory"
            )
            self.recorder.fail(trial.config["run"], f"{reason}\n{last_line}")


def trial(
    settings: dict[str, Any],
    runs: dict[str, tuple[RunPlan, float]],
    storage: Any,
    folder: str,
    version: str,
    nodes: set[str],
) -> None:
    """Compute the rounds of a run that are not written yet, and report each one.

    Args:
        runs: plan of each run, and the bytes that each of its Ray shards reserves.
        storage: the actor that reads and writes the run folders.
        folder: working folder of the driver, which relative paths start from; ignored on a node without it.
        version: fishermask's version on the driver. A node that joined after the start must have the same.
        nodes: ids of the nodes at the start of the sweep, which have been checked.
    """
    if Path(folder).is_dir():
        os.chdir(folder)
    name = settings["run"]
    plan, shard_memory = runs[name]
    try:
        if ray.get_runtime_context().get_node_id() not in nodes:
            source_version.require_version(version, installed_version(), ray.util.get_node_ip_address())
        history = ray.get(storage.history.remote(name))
        journal = run_storage.StoredJournal(storage, name)
        progress = run_storage.ProgressReporter(storage, name)

        def report(result: dict[str, Any]) -> None:
            tune.report({"round": json.dumps(result)})

        compute_rounds(plan, history, report, journal, progress, shard_memory)
    except LOST:
        raise
    except (Exception, SystemExit) as error:
        tune.report({"error": describe_failure(error)})
        # An exception ends this process, whose device may be in a bad state, so that no other run uses it. If the
        # process exited instead, Tune would treat it as lost and restart the trial.
        raise RuntimeError("the run failed") from error
