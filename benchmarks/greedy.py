"""Time of a greedy step, compared with dense rescoring and with a lower bound, and its growth with the sizes.

    python benchmarks/greedy.py            # steps
    python benchmarks/greedy.py --large    # k = 7,014, 960 picks from 4,800: minutes

The lower bound is one structured product with 2 C columns, and one read and write of P and Q [C, C], with the same
number of threads. Dense rescoring follows the definition: V R V^T and V R F R V^T with V [C, k], by k x k products for
each image. It is timed on a few images with random numbers, and scaled to all images.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from pools import local_pool, random_embedding
from table import machine, seconds, show

from fishermask.pool.blocks import BLOCK
from fishermask.pool.selection import TraceCriterion, best_candidate, initial_objective
from fishermask.pool.shard import Shard
from fishermask.tensors.embedding import product, take

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Selection:
    """A selection on local shards, as in ``minimize_trace``, from given embeddings."""

    def __init__(self, embedding, shards, budget=100):
        self.pool = local_pool(embedding, shards, DEVICE)
        self.objective = initial_objective(self.pool, budget)
        self.criterion = TraceCriterion(self.objective, torch.float32)
        self.candidates = self.pool.shards.call(
            Shard.start_selection, self.criterion.scorer(), self.pool.candidates, 0, torch.float32
        )
        self.chosen = []

    def step(self):
        best = best_candidate(self.candidates)
        self.chosen.append(best.position)
        self.criterion.gain_error(best)
        self.candidates = self.pool.shards.call(Shard.apply_pick, self.criterion.add(best)[1], best.position, True)


def dense_step(v, inverse, sandwich):
    """Return tr((I + V R V^T)^-1 V H V^T) for each image of ``v`` [n, C, k], by k x k products."""
    p, q = v @ inverse @ v.mT, v @ sandwich @ v.mT
    eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    return torch.linalg.solve(eye + p, q).diagonal(dim1=1, dim2=2).sum(-1)


def lower_bound(embedding, threads):
    """Return a function to time: the structured product and a pass over P and Q, in blocks on ``threads`` threads."""
    n, num_classes = embedding.probabilities.shape[1], len(embedding.probabilities)
    blocks = [take(embedding, slice(i, i + BLOCK)).map(torch.Tensor.contiguous) for i in range(0, n, BLOCK)]
    scores = [torch.zeros(2, num_classes, num_classes, b.hidden.shape[1], device=DEVICE) for b in blocks]
    basis = torch.randn(embedding.size, 2 * num_classes, device=DEVICE)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def work(part):
        for block, score in list(zip(blocks, scores, strict=True))[part::threads]:
            product(block, basis)
            score.add_(1.0)

    return lambda: list(pool.map(work, range(threads)))


def steps(threads):
    n, num_classes, width, k_body = 20_000, 10, 128, 150
    embedding = random_embedding(n, num_classes, width, k_body, device=DEVICE)
    selection = Selection(embedding, threads)
    step = seconds(selection.step, repeats=40, warmup=3)
    bound = seconds(lower_bound(embedding, threads), repeats=40, warmup=3)
    k = num_classes * width + k_body
    sample, (inverse, sandwich) = torch.rand(500, num_classes, k, device=DEVICE), torch.rand(2, k, k, device=DEVICE)
    slow = seconds(lambda: dense_step(sample, inverse, sandwich), repeats=3) * n / len(sample)
    show(
        f"Greedy step, n = 20,000, C = 10, E = 128, k_body = 150 (k = 1,430), {threads} shards. {machine()}",
        ["dense s", "step ms", "bound ms", "dense/step", "step/bound"],
        [[slow, step * 1e3, bound * 1e3, slow / step, step / bound]],
    )


def growth(threads):
    base = {"n": 20_000, "num_classes": 10, "width": 128, "k_body": 150}
    rows = []
    for key, values in (
        ("n", (5_000, 10_000, 20_000, 40_000)),
        ("k_body", (75, 150, 300, 600)),
        ("num_classes", (5, 10, 20)),
    ):
        first = None
        for value in values:
            selection = Selection(random_embedding(**base | {key: value}), threads)
            step = seconds(selection.step, repeats=15, warmup=3)
            first = first or (value, step)
            rows.append([key, value, step * 1e3, value / first[0], step / first[1]])
    selection, times = Selection(random_embedding(**base), threads), []
    for _ in range(200):
        started = time.perf_counter()
        selection.step()
        times.append(time.perf_counter() - started)
    for first in (0, 50, 100, 150):
        step = sorted(times[first : first + 50])[25]
        rows.append(["picks so far", first + 25, step * 1e3, "", step / sorted(times[:50])[25]])
    show(f"Growth of a step. {machine()}", ["size", "value", "ms", "relative size", "relative time"], rows)


def large(threads, picks=960):
    embedding = random_embedding(4_800, 10, 128, 5_734)
    started = time.perf_counter()
    selection = Selection(embedding, threads, budget=picks)
    prepared = time.perf_counter()
    for pick in range(picks):
        selection.step()
        if pick in (9, 99):
            print(f"  {pick + 1} picks after {time.perf_counter() - prepared:.1f} s", flush=True)
    done = time.perf_counter()
    total = done - started
    show(
        f"k = {embedding.size + len(embedding.hidden):,} (k_body = 5,734), {picks} picks from 4,800. {machine()}",
        ["information and start s", "picks s", "total s", "V100 reference s", "reference/total"],
        [[prepared - started, done - prepared, total, 3961.0, 3961.0 / total]],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="largest selection of the paper; takes minutes")
    parser.add_argument(
        "--shards", type=int, default=torch.get_num_threads(), help="number of local shards (%(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.large:
        large(arguments.shards)
    else:
        for shards in sorted({1, arguments.shards}):
            steps(shards)
        growth(arguments.shards)


if __name__ == "__main__":
    main()
