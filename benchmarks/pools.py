"""Pools with given embeddings, on local or Ray shards, for benchmarks of the selection alone."""

import torch

from fishermask.pool.blocks import images_per_part
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.shard import Shard
from fishermask.pool.shards import LocalShards
from fishermask.tensors.embedding import Embedding, take
from fishermask.tensors.images import Statistics

GRAY = Statistics((0.5,), (0.5,))


def random_embedding(n, num_classes, width, k_body, seed=0, device="cpu"):
    """Return embeddings similar to those of a trained network: peaked predictions, rectified features."""
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(num_classes, n, generator=generator)).softmax(0)
    hidden = torch.randn(width, n, generator=generator).relu_()
    body = torch.randn(num_classes - 1, k_body, n, generator=generator).mul_(0.3 * p[:-1].sqrt()[:, None])
    return Embedding(*(part.to(device) for part in (p, hidden, body)))


def fill(shard: Shard, make) -> None:
    """Set the embeddings of ``shard``; ``make(first, last)`` returns those at positions ``first`` to ``last - 1``."""
    rows, n = None, len(shard.images)
    shard.parts, shard.embeddings = [], []
    start = 0
    while start < n:
        rows = rows or images_per_part(make(shard.start, shard.start + 1).body.shape[1])
        end = min(n, start + rows)
        shard.parts.append(slice(start, end))
        shard.embeddings.append(make(shard.start + start, shard.start + end).map(torch.Tensor.contiguous))
        start = end


def blank(n):
    """Return ``n`` images of one pixel, which share their memory."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(n, 1, 1, 1)


def pool_on(shards, n, engine=None):
    """Return a pool of ``n`` images on ``shards``, without labeled images, and with a placeholder model."""
    no_positions = torch.tensor([], dtype=torch.long)
    streams = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    return Pool(shards, n, no_positions, no_positions, torch.nn.Linear(1, 1), *streams, engine=engine or Engine())


def local_pool(embedding, count, device="cpu", engine=None):
    """Return the pool of ``embedding`` on ``count`` local shards."""
    n = embedding.hidden.shape[1]
    pool = pool_on(LocalShards(blank(n), GRAY, count, device), n, engine)
    for shard in pool.shards.shards:
        fill(shard, lambda first, last: take(embedding, slice(first, last)))
    return pool
