"""One seed, separate named streams: what one part of a run draws never shifts what another draws."""

import zlib

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, round_index: int = 0) -> int:
    """A 63-bit seed for ``purpose`` in a round. Strategies do not enter: all start from the same streams."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), round_index])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream(seed: int, purpose: str, round_index: int = 0) -> torch.Generator:
    """The random generator for ``purpose`` in a round."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, round_index))
