"""Settings of PyTorch for the whole process: attention kernels, freed memory, and repeatable GPU results."""

import ctypes
import sys
from contextlib import ExitStack
from contextvars import copy_context
from threading import Lock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class _PlainAttention:
    """Disable fused attention while any thread is inside ``with plain_attention:``.

    The fused path for inference calls no layers and has no gradient, and fused kernels do not support vmap. Shards of
    one process enter and leave independently: the first thread changes the setting, and the last restores it.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.undo = Lock(), 0, ExitStack()
        # ``sdpa_kernel`` sets a context variable, which the thread that leaves last could not reset in its own context.
        self.context = copy_context()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)
                self.context.run(self.undo.enter_context, sdpa_kernel(SDPBackend.MATH))
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.context.run(self.undo.close)


plain_attention = _PlainAttention()


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_trim = getattr(_libc, "malloc_trim", lambda _: None)  # of glibc only


def return_memory() -> None:
    """Return freed memory to the system. Gaps between live tensors would otherwise accumulate."""
    _trim(0)


def repeatable_gpu() -> None:
    """Disable TF32 and nondeterministic algorithms in convolutions on GPUs."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
