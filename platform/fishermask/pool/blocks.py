"""How the pool is divided: into shards, blocks and chunks of images, with sizes that keep results bit-identical."""

BLOCK = 2048
"""Pool positions in a block; shards begin at multiples of it."""
CHUNKS = (128, 64, 32, 16)
"""Images differentiated at once. From 16 on, and in multiples of it, an image's numbers do not depend on the chunk."""
ALIGNMENT = CHUNKS[-1]
PREDICTED = 128
"""Images predicted at once: a fixed number, as numbers may round with it; of more, activations leave the cache."""
DIAGONAL_BATCH = 32
"""Largest number of images whose Fisher diagonal is computed at once."""
WIDE_BODY = 1024
"""Masked parameters outside the head from which on a block is kept in narrower parts: a product then reads the
embeddings in an order that the memory delivers faster (see docs/performance.md)."""
NARROW = 256
"""Images in such a narrower part."""
MIN_COLUMNS = 128
"""Products of fewer columns may take another path, with another rounding: equal images would not score equally."""


def shard_slices(size: int, num_shards: int) -> list[tuple[int, int]]:
    """Return ``num_shards`` slices (start, end) of ``size`` pool positions, whole blocks each, as even as possible."""
    blocks = -(-size // BLOCK)
    edges = [min(size, BLOCK * (blocks * s // num_shards)) for s in range(num_shards + 1)]
    return list(zip(edges, edges[1:], strict=False))


def images_per_part(body_size: int) -> int:
    """Return the number of images whose embeddings are kept together."""
    return BLOCK if body_size <= WIDE_BODY else NARROW
