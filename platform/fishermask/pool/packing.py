"""Small messages between a coordinator and its shards, packed so that Ray carries them inside a call.

Ray sends arguments of up to 100 kB along with a call and puts larger ones into its object store first, which takes
milliseconds; and a tensor pickles slowly. Both matter once a pick. These bytes pass between our own processes only.
"""

import io
import pickle
from typing import Any

import torch
from torch import Tensor

PIECE = 64 * 1024
"""Bytes of one argument."""


class _Packer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # As bytes: numpy has no bfloat16.
            raw = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return _tensor, (raw, value.dtype, tuple(value.shape))
        return NotImplemented


def _tensor(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def pack(value: Any) -> list[bytes]:
    """``value``, in which tensors are on the CPU, as pieces of at most ``PIECE`` bytes."""
    buffer = io.BytesIO()
    _Packer(buffer, protocol=5).dump(value)
    raw = buffer.getvalue()
    return [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]


def unpack(pieces: list[bytes]) -> Any:
    """What was packed; its tensors are copies that may be written to."""
    return pickle.loads(b"".join(pieces))
