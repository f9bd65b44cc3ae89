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

    The fused path for inference calls no layers and has no gradient, and fused kernels do not support vmap. The shards
    of a process enter and leave independently: the first thread changes the settings, and the last thread restores
    them.
    """

    def __init__(self) -> None:
        self.lock, self.num_threads, self.restore_stack = Lock(), 0, ExitStack()
        # ``sdpa_kernel`` sets a context variable. The last thread can reset it only in the context of the first.
        self.context = copy_context()

    def __enter__(self) -> None:
        with self.lock:
            if not self.num_threads:
                is_fast = torch.backends.mha.get_fastpath_enabled()
                self.restore_stack.callback(torch.backends.mha.set_fastpath_enabled, is_fast)
                torch.backends.mha.set_fastpath_enabled(False)
                self.context.run(self.restore_stack.enter_context, sdpa_kernel(SDPBackend.MATH))
            self.num_threads += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.num_threads -= 1
            if not self.num_threads:
                self.context.run(self.restore_stack.close)


plain_attention = _PlainAttention()


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_trim = getattr(_libc, "malloc_trim", lambda _: None)  # of glibc only


def return_memory() -> None:
    """Return freed memory to the system, so that gaps between live tensors do not accumulate."""
    _trim(0)


def repeatable_gpu() -> None:
    """Disable TF32 and nondeterministic algorithms for convolutions on GPUs."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
