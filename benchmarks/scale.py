"""Selection from a pool of a million points on Ray: time per pick by pool size and shards, memory, and cost model.

    python benchmarks/scale.py [--parquet FOLDER] [--largest 1000000] [--picks 100]

C = 10, E = 128, k_body = 150. The points are embeddings of CIFAR-10 images (random images without ``--parquet``) by a
thin ResNet-18, repeated with noise. The noise depends on the pool position, so points do not depend on the shards.
"""

from fishermask.sweeps import cluster  # first, because it sets variables that ray reads at import

# isort: split
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from networks import CIFAR, trained
from pools import GRAY, blank, fill, local_pool, pool_on, random_embedding
from table import machine, seconds, show

import fishermask.sweeps.cluster  # noqa: F401
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
    """Return the embeddings of ``BASE`` images by a briefly trained thin ResNet-18."""
    model, images = trained(parquet, BASE)
    inputs = normalize(images, CIFAR)
    plan = plan_gradients(model, inputs[:2])
    mask = global_mask(fisher_diagonal(model, inputs[:64], plan), plan, 150)
    return concatenate([embed(model, batch, mask) for batch in inputs.split(128)])


def points(base, first, last):
    """Return the embeddings at pool positions ``first`` to ``last - 1``: those of the base in turn, with 5 % noise."""
    generator = torch.Generator().manual_seed(first)
    repeated = take(base, torch.arange(first, last) % BASE)

    def add_noise(part):
        return part * (1 + 0.05 * torch.randn(part.shape, generator=generator))

    p = add_noise(repeated.probabilities).abs()
    p = p / p.sum(0)
    return Embedding(p, add_noise(repeated.hidden), add_noise(repeated.body))


def select(shards, base, n, picks):
    """Return the seconds to the first pick, the seconds per pick, the peak bytes of each shard, and the batch."""
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
    batch = greedy(pool, criterion, picks)
    peaks = []
    if isinstance(shards, RayShards):
        peaks = cluster.ray.get([actor.__ray_call__.remote(lambda self: peak()) for actor in shards.actors])
    shards.close()
    return times[0] - started, float(np.median(np.diff(times))), peaks, [pick.position for pick in batch]


def peak():
    """Return the peak resident memory of this process in bytes."""
    return 1024.0 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def scale(base, largest, picks):
    sizes, rows, seconds_by_size = [n for n in (10_240, 32_768, 102_400, 327_680) if n < largest] + [largest], [], {}
    for n in sizes:
        by_count = {}
        for count in (1, 2):
            num_picks = picks if (n, count) == (largest, 2) else 12
            by_count[count] = select(RayShards(blank(n), GRAY, count, 1, 0), base, n, num_picks)
        (start1, pick1, _, chosen1), (start2, pick2, peaks, chosen2) = by_count[1], by_count[2]
        assert chosen1[:12] == chosen2[:12], "the shards changed the batch"
        seconds_by_size[n] = pick2
        rows.append([n, start1, pick1, start2, pick2, pick1 / (2 * pick2), max(peaks) / 1e9])
        print(f"  {n} points done", flush=True)
    header = ["n", "start s, 1 shard", "pick s, 1 shard", "start s, 2", "pick s, 2", "efficiency of 2", "GB per shard"]
    show(f"Picks by pool size, Ray shards, {picks} picks of the largest. {machine()}", header, rows)
    n, t = np.array(list(seconds_by_size)), np.array(list(seconds_by_size.values()))
    weights = np.stack([1 / t, n / t], axis=1)  # minimize relative errors
    fixed, slope = np.linalg.lstsq(weights, np.ones(len(t)), rcond=None)[0]
    worst = float(np.abs((fixed + slope * n) / t - 1).max())
    show(
        "Linear fit of the time per pick with 2 shards",
        ["fixed ms", "microseconds per point", "largest deviation"],
        [[fixed * 1e3, slope * 1e6, f"{worst:.1%}"]],
    )


def overhead(base):
    """Compare two local shards with two Ray shards."""
    rows = []
    for n in (4_096, 20_480):
        local = select(LocalShards(blank(n), GRAY, 2), base, n, 200)
        remote = select(RayShards(blank(n), GRAY, 2, 1, 0), base, n, 200)
        assert local[3] == remote[3], "Ray changed the batch"
        rows.append([n, local[1] * 1e3, remote[1] * 1e3, (remote[1] - local[1]) * 1e3])
    show("Overhead of Ray per pick, 2 shards", ["n", "local ms", "Ray ms", "difference ms"], rows)


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
    parser.add_argument("--parquet", help="folder of CIFAR-10 in Hugging Face's Parquet format")
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
