"""Division of the pool into shards, blocks and chunks, with sizes that keep results bit-identical."""

BLOCK = 2048
"""Pool positions in a block; shards begin at multiples of it."""
CHUNKS = (128, 64, 32, 16)
"""Numbers of images that may be differentiated at once. In multiples of 16, results do not depend on the chunk."""
ALIGNMENT = CHUNKS[-1]
PREDICTED = 128
"""Images predicted at once. The number is fixed because rounding may depend on it; larger ones exceed the cache."""
DIAGONAL_BATCH = 32
"""Largest number of images whose Fisher diagonal is computed at once."""
WIDE_BODY = 1024
"""Masked parameters of the body above which embeddings are stored in narrower parts: products then read memory in a
faster order (see docs/performance.md)."""
NARROW = 256
"""Images in a narrower part."""
MIN_COLUMNS = 128
"""Smallest number of columns of a product. Fewer may round differently, and equal images would get unequal scores."""


def shard_slices(size: int, num_shards: int) -> list[tuple[int, int]]:
    """Return ``num_shards`` slices (start, end) of ``size`` pool positions, in whole blocks, as even as possible."""
    blocks = -(-size // BLOCK)
    edges = [min(size, BLOCK * (blocks * s // num_shards)) for s in range(num_shards + 1)]
    return list(zip(edges, edges[1:], strict=False))


def images_per_part(body_size: int) -> int:
    """Return the number of images whose embeddings are stored in one tensor."""
    return BLOCK if body_size <= WIDE_BODY else NARROW
