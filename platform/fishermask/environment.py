"""Software and hardware of this process: fishermask's version and source, other packages, CPU and GPU.

``installed_version`` is also sent to nodes that may lack fishermask, so this file imports only the standard library.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

GIT_TIMEOUT = 10
"""Maximum number of seconds to wait for git."""


def installed_version() -> str:
    """Return the version of the ``fishermask`` package that this process imports, with a hash of its source files."""
    spec = importlib.util.find_spec("fishermask")
    if spec is None or spec.origin is None:
        return "none"
    version = importlib.import_module("fishermask").__version__
    digest, folder = hashlib.sha256(), Path(spec.origin).parent
    # A user may link a folder of strategies into the package.
    folders = [(Path(path), sorted(names)) for path, _, names in os.walk(folder, followlinks=True)]
    for path in sorted(parent / name for parent, names in folders for name in names if name.endswith(".py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{version} ({digest.hexdigest()[:12]})"


@functools.cache
def loaded_version() -> str:
    """Return the result of the first call of ``installed_version`` in this process."""
    return installed_version()


def describe_environment(device: str) -> dict[str, Any]:
    """Return the versions and hardware that may change the last bits of a run's numbers, by name.

    Args:
        device: ``cpu`` or ``cuda``, where the process computes.
    """
    import torch

    return {
        "fishermask": loaded_version(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": importlib.metadata.version("ray"),
        "device": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_model() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the repository that tracks fishermask's source; None if there is none."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    # An installed package may lie in a folder that another project's repository ignores.
    return git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", Path(__file__).name) else None
