"""Shared fixtures. Ray's settings must stand before it is imported, and its workers inherit the cache's place."""

import atexit
import os
import shutil
import tempfile

os.environ["FISHERMASK_CACHE"] = tempfile.mkdtemp(prefix="fishermask-cache-")
atexit.register(shutil.rmtree, os.environ["FISHERMASK_CACHE"], ignore_errors=True)
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ.pop("RAY_ADDRESS", None)

import pytest  # noqa: E402
import torch  # noqa: E402

import fishermask.sweeps.cluster  # noqa: E402, F401  sets what else Ray reads at import
from fishermask.config import ExperimentConfig, parse  # noqa: E402
from fishermask.experiment.inputs import prepare_inputs  # noqa: E402
from fishermask.experiment.streams import stream  # noqa: E402
from fishermask.learning.training import fit  # noqa: E402

# The tests' models are tiny. Threads only wait for each other then, for minutes where the machine has other work.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ray_session():
    """One local Ray cluster for a file's tests that need it."""
    import ray

    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def trained():
    """A CNN trained on 40 images of the bundled data, and the pool of 4,500 that they come from: three blocks."""
    settings = {"imbalance": {"kind": "balanced", "per_class": 450}, "budget": {"initial": 40}, "strategy": "random"}
    setup = prepare_inputs(parse(ExperimentConfig, settings))
    model = setup.build_model(0)
    training = setup.config.training.model_dump() | {"max_epochs": 20}
    train = setup.data.train
    fit(
        model,
        train.images[setup.initial],
        train.labels[setup.initial],
        setup.statistics,
        stream(0, "order"),
        **training,
        augmentation=None,
    )
    return setup, model
