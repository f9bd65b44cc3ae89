"""Random streams of a run. Each purpose has its own generator, so that draws for one purpose do not affect others."""

import zlib

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, round_index: int = 0) -> int:
    """Return the 63-bit seed for ``purpose`` in a round."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), round_index])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream(seed: int, purpose: str, round_index: int = 0) -> torch.Generator:
    """Return the random generator for ``purpose`` in a round."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, round_index))
