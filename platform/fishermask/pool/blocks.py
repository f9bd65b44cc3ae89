"""Division of the pool into shards, blocks, parts and chunks, with sizes that keep results equal to the last bit."""

BLOCK = 2048
"""Number of pool positions in a block. Shards begin at multiples of it."""
CHUNKS = (128, 64, 32, 16)
"""Numbers of images that may be differentiated at once. Results do not depend on it: all are multiples of 16."""
ALIGNMENT = CHUNKS[-1]
"""Batches of images are padded to a multiple of this number, because rounding may depend on the size of a batch."""
PREDICTED = 128
"""Number of images predicted at once: fixed, because rounding may depend on it, and small enough for the CPU cache."""
DIAGONAL_BATCH = 32
"""Largest number of images whose Fisher diagonal is computed at once."""
WIDE_BODY = 1024
"""If a mask has more body parameters than this, embeddings are stored in parts of ``NARROW`` images: products then read
memory in a faster order (see docs/performance.md)."""
NARROW = 256
"""Number of images in a part for a large mask."""
MIN_COLUMNS = 128
"""Smallest number of images in a product. With fewer, rounding may differ, and equal images may get unequal scores."""


def shard_slices(size: int, num_shards: int) -> list[tuple[int, int]]:
    """Return ``num_shards`` slices (start, end) of ``size`` pool positions, in whole blocks, as equal as possible."""
    blocks = -(-size // BLOCK)
    edges = [min(size, BLOCK * (blocks * s // num_shards)) for s in range(num_shards + 1)]
    return list(zip(edges, edges[1:], strict=False))


def images_per_part(body_size: int) -> int:
    """Return the number of images whose embeddings are stored in one tensor."""
    return BLOCK if body_size <= WIDE_BODY else NARROW
