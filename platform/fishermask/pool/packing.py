"""Serialization of small messages between a coordinator and its shards, in pieces that Ray sends with a call.

Ray sends arguments of up to 100 kB with a call. It puts larger arguments into its object store first, which takes
milliseconds for each pick. Pickling a tensor is slow too. Only processes of this package exchange these bytes.
"""

import io
import pickle
from typing import Any

import torch
from torch import Tensor

PIECE = 64 * 1024
"""Largest size of a piece in bytes."""


class _Packer(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            # Raw bytes, because NumPy has no bfloat16.
            raw = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return _tensor, (raw, value.dtype, tuple(value.shape))
        return NotImplemented


def _tensor(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def pack(value: Any) -> list[bytes]:
    """Return ``value``, whose tensors are on the CPU, as pieces of at most ``PIECE`` bytes."""
    buffer = io.BytesIO()
    _Packer(buffer, protocol=5).dump(value)
    raw = buffer.getvalue()
    return [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]


def unpack(pieces: list[bytes]) -> Any:
    """Return the packed value; its tensors are writable copies."""
    return pickle.loads(b"".join(pieces))
