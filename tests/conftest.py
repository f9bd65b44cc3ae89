"""Shared fixtures. Ray reads its settings at import, and its workers inherit the location of the cache."""

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

import fishermask.sweeps.cluster  # noqa: E402, F401  sets other variables that Ray reads at import
from fishermask.config import ExperimentConfig, parse  # noqa: E402
from fishermask.experiment.inputs import prepare_inputs  # noqa: E402
from fishermask.experiment.streams import stream  # noqa: E402
from fishermask.learning.training import fit  # noqa: E402

# The models of the tests are tiny. On a busy machine, several threads would wait for each other for minutes.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def ray_session():
    """Start a local Ray cluster for the tests of a file."""
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
    """Return a pool of 4,500 images of the bundled data (three blocks), and a CNN trained on 40 of its images."""
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
