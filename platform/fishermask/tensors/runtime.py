"""What torch does in this process: which of its kernels it may use, and what becomes of memory that it has freed."""

import ctypes
import sys
from contextlib import ExitStack
from contextvars import copy_context
from threading import Lock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class _PlainAttention:
    """Attention takes its plain path while any thread is inside ``with plain_attention:``.

    The fused path for inference calls no layer and has no gradient, and fused kernels know no vmap. Shards of one
    process come and go here independently: the first switches, the last switches back.
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
_trim = getattr(_libc, "malloc_trim", lambda _: None)  # glibc has it; what others do is theirs


def return_memory() -> None:
    """Give freed memory back to the system. Gaps between tensors that stay would otherwise add up, by chance."""
    _trim(0)


def repeatable_gpu() -> None:
    """On a GPU float32 is float32, in convolutions too, and these add in the same order every time."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
