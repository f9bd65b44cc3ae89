"""Pools whose embeddings are given, on shards in this process or on Ray, for benchmarks of what comes after them."""

import torch

from fishermask.pool.blocks import images_per_part
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.shard import Shard
from fishermask.pool.shards import LocalShards
from fishermask.tensors.embedding import Embedding, take
from fishermask.tensors.images import Statistics

GREY = Statistics((0.5,), (0.5,))


def random_embedding(n, num_classes, width, k_body, seed=0, device="cpu"):
    """An embedding of the shape of a trained network's: peaked predictions, rectified features, decaying gradients."""
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(num_classes, n, generator=generator)).softmax(0)
    hidden = torch.randn(width, n, generator=generator).relu_()
    body = torch.randn(num_classes - 1, k_body, n, generator=generator).mul_(0.3 * p[:-1].sqrt()[:, None])
    return Embedding(*(part.to(device) for part in (p, hidden, body)))


def fill(shard: Shard, make) -> None:
    """Give a shard its embeddings: ``make(first, last)`` returns those of pool positions ``first`` to ``last``."""
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
    """``n`` images of one pixel, none of which takes memory."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(n, 1, 1, 1)


def pool_on(shards, n, engine=None):
    """A pool of ``n`` images on ``shards``, with nothing labeled and a model that is of no use but for its type."""
    none = torch.tensor([], dtype=torch.long)
    streams = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    return Pool(shards, n, none, none, torch.nn.Linear(1, 1), *streams, engine=engine or Engine())


def local_pool(embedding, count, device="cpu", engine=None):
    """The pool with ``embedding`` on ``count`` shards in this process."""
    n = embedding.hidden.shape[1]
    pool = pool_on(LocalShards(blank(n), GREY, count, device), n, engine)
    for shard in pool.shards.shards:
        fill(shard, lambda first, last: take(embedding, slice(first, last)))
    return pool
