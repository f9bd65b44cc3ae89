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

import fishermask.sweep.cluster  # noqa: E402, F401  sets what else Ray reads at import


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray cluster for all tests that need it."""
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
