"""A pool of a million points on Ray: time of a pick against n, two shards against one, memory by shard, cost model.

    python benchmarks/scale.py [--parquet FOLDER] [--largest 1000000] [--picks 100]

C = 10, E = 128, k_body = 150. The points are embeddings of CIFAR-10 images (of random ones without ``--parquet``) by a
thin ResNet-18, repeated with seeded perturbation: drawn by pool position, so they do not depend on the shards.
"""

from fishermask.sweeps import cluster  # before anything that imports ray, which reads settings of ours

# isort: split
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from networks import CIFAR, trained
from pools import GREY, blank, fill, local_pool, pool_on, random_embedding
from table import machine, seconds, show

import fishermask.sweeps.cluster  # noqa: F401  what Ray reads when it is imported
from fishermask.planning.estimates import core_flops
from fishermask.pool.ray_shards import RayShards
from fishermask.pool.selection import TraceCriterion, greedy, initial_objective
from fishermask.pool.shard import Shard
from fishermask.pool.shards import LocalShards
from fishermask.tensors.embedding import Embedding, concatenate, embed, take
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.images import normalize
from fishermask.tensors.mask import fisher_diagonal, global_mask

BASE = 4096
"""Images that all points are made from."""


def base_embedding(parquet):
    """Embeddings of ``BASE`` images by a thin ResNet-18, trained for an instant."""
    model, images = trained(parquet, BASE)
    inputs = normalize(images, CIFAR)
    layout = plan_gradients(model, inputs[:2])
    mask = global_mask(fisher_diagonal(model, inputs[:64], layout), layout, 150)
    return concatenate([embed(model, batch, mask) for batch in inputs.split(128)])


def points(base, first, last):
    """The embeddings at pool positions ``first`` to ``last``: images of the base in turn, each number some 5 % off."""
    generator = torch.Generator().manual_seed(first)
    own = take(base, torch.arange(first, last) % BASE)

    def shaken(part):
        return part * (1 + 0.05 * torch.randn(part.shape, generator=generator))

    p = shaken(own.probabilities).abs()
    p = p / p.sum(0)
    return Embedding(p, shaken(own.hidden), shaken(own.body))


def select(shards, base, n, picks):
    """Seconds to the first offer and by pick, and each shard's peak memory in bytes."""
    pool = pool_on(shards, n)
    if isinstance(shards, RayShards):
        shared = cluster.ray.put(base)
        cluster.ray.get(
            [
                actor.__ray_call__.remote(lambda self, base: fill(self, lambda a, b: points(base, a, b)), shared)
                for actor in shards.actors
            ]
        )
    else:
        for shard in shards.shards:
            fill(shard, lambda a, b: points(base, a, b))
    times = []
    pool.progress = lambda stage, done, total: times.append(time.perf_counter()) if stage == "pick" else None
    started = time.perf_counter()
    criterion = TraceCriterion(initial_objective(pool, picks), torch.float32)
    chosen = greedy(pool, criterion, picks)
    peaks = []
    if isinstance(shards, RayShards):
        peaks = cluster.ray.get([actor.__ray_call__.remote(lambda self: peak()) for actor in shards.actors])
    shards.close()
    return times[0] - started, float(np.median(np.diff(times))), peaks, [offer.position for offer in chosen]


def peak():
    """This process's peak of resident memory, bytes."""
    return 1024.0 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def scale(base, largest, picks):
    sizes, rows, found = [n for n in (10_240, 32_768, 102_400, 327_680) if n < largest] + [largest], [], {}
    for n in sizes:
        by_count = {}
        for count in (1, 2):
            many = picks if (n, count) == (largest, 2) else 12
            by_count[count] = select(RayShards(blank(n), GREY, count, 1, 0), base, n, many)
        (start1, pick1, _, chosen1), (start2, pick2, peaks, chosen2) = by_count[1], by_count[2]
        assert chosen1[:12] == chosen2[:12], "the shards changed the batch"
        found[n] = pick2
        rows.append([n, start1, pick1, start2, pick2, pick1 / (2 * pick2), max(peaks) / 1e9])
        print(f"  {n} points done", flush=True)
    header = ["n", "start s, 1 shard", "pick s, 1 shard", "start s, 2", "pick s, 2", "efficiency of 2", "GB a shard"]
    show(f"Picks by pool size, Ray shards, {picks} picks of the largest. {machine()}", header, rows)
    n, t = np.array(list(found)), np.array(list(found.values()))
    weights = np.stack([1 / t, n / t], axis=1)  # by relative error
    fixed, slope = np.linalg.lstsq(weights, np.ones(len(t)), rcond=None)[0]
    worst = float(np.abs((fixed + slope * n) / t - 1).max())
    show(
        "A straight line through the picks of 2 shards",
        ["fixed ms", "microseconds a point", "largest deviation"],
        [[fixed * 1e3, slope * 1e6, f"{worst:.1%}"]],
    )


def overhead(base):
    """Ray's price for a pick: the same two shards in this process and as actors."""
    rows = []
    for n in (4_096, 20_480):
        here = select(LocalShards(blank(n), GREY, 2), base, n, 200)
        there = select(RayShards(blank(n), GREY, 2, 1, 0), base, n, 200)
        assert here[3] == there[3], "Ray changed the batch"
        rows.append([n, here[1] * 1e3, there[1] * 1e3, (there[1] - here[1]) * 1e3])
    show("Ray's overhead, 2 shards", ["n", "in process ms", "Ray ms", "difference ms"], rows)


def fit():
    """Fit the constants of ``planning.estimates`` by least squares of relative errors, on one core."""
    torch.set_num_threads(1)
    shapes = [(5, 128, 150), (10, 128, 150), (20, 128, 150), (10, 512, 0), (10, 128, 1200)]
    n, features, times = 8_192, [], []
    for num_classes, width, k_body in shapes:
        pool = local_pool(random_embedding(n, num_classes, width, k_body), 1)
        criterion = TraceCriterion(initial_objective(pool, 20), torch.float32)
        (best,) = pool.shards.call(Shard.start_selection, criterion.scorer(), pool.candidates, 0, torch.float32)
        _, update = criterion.add(best)
        times.append(seconds(lambda p=pool, u=update: p.shards.call(Shard.apply_pick, u, 0, True), repeats=15))
        rows = num_classes - 1
        features.append([4.0 * n * rows**2 * (width + k_body) / core_flops(), n * rows**2])
        pool.shards.close()
    a, t = np.array(features), np.array(times)
    constants = np.linalg.lstsq(a / t[:, None], np.ones(len(t)), rcond=None)[0]
    rows = [[*s, m * 1e3, e * 1e3, e / m] for s, m, e in zip(shapes, times, a @ constants, strict=True)]
    structured, pair = constants
    show(
        f"STRUCTURED = {structured:.2g}, PAIR_SECONDS = {pair:.2g}; {core_flops() / 1e9:.0f} Gflop/s",
        ["C", "E", "k_body", "measured ms", "model ms", "model/measured"],
        rows,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", help="folder of CIFAR-10 in Hugging Face's layout")
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--picks", type=int, default=100, help="from the largest pool (%(default)s)")
    parser.add_argument("--only", choices=["fit", "overhead", "scale"])
    arguments = parser.parse_args()
    if arguments.only in (None, "fit"):
        fit()
    if arguments.only == "fit":
        return
    base = base_embedding(arguments.parquet)
    with cluster.connect():
        if arguments.only in (None, "overhead"):
            overhead(base)
        if arguments.only in (None, "scale"):
            scale(base, arguments.largest, arguments.picks)


if __name__ == "__main__":
    main()
