"""Time and memory that lower precision and the memory format ``channels_last`` save, and their effect on the batch.

    python benchmarks/precision.py [--parquet FOLDER]

Each query selects 100 of 2,048 CIFAR-10 images (random images without ``--parquet``) with a thin ResNet-18 and the same
mask. The reference is float32 with scores in float64. The overlap is the number of images in both batches.
"""

import argparse

import torch
from networks import CIFAR, trained
from table import machine, show

from fishermask.experiment.loop import StageClock
from fishermask.pool.pool import Engine, Pool
from fishermask.pool.selection import TraceOptions, minimize_trace
from fishermask.pool.shards import LocalShards
from fishermask.tensors.mask import global_mask
from fishermask.tensors.precision import Precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "float32, scores in float64": Precision(scores=torch.float64),
    "float32": Precision(),
    "storage bfloat16": Precision(storage=torch.bfloat16),
    "storage float16": Precision(storage=torch.float16),
    "channels last": Precision(channels_last=True),
    "gradients bfloat16": Precision(autocast=torch.bfloat16),
    "gradients bfloat16, channels last": Precision(autocast=torch.bfloat16, channels_last=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parquet", help="folder of CIFAR-10 in Hugging Face's Parquet format")
    model, images = trained(parser.parse_args().parquet, 2048)
    mask, rows, reference, first = None, [], set(), None
    for name, precision in KINDS.items():
        shards, clock = LocalShards(images, CIFAR, 1, DEVICE), StageClock(lambda *_: None)
        labeled, generators = torch.arange(100), (torch.Generator(), torch.Generator().manual_seed(0))
        engine = Engine(precision)
        pool = Pool(shards, len(images), labeled, torch.zeros_like(labeled), model, *generators, clock, engine)
        if mask is None:
            plan = pool.plan_gradients()
            mask = global_mask(pool.fisher_diagonal(plan, 1024), plan, 150)
        batch = set(minimize_trace(pool, mask, 100, TraceOptions()).tolist())
        stages = clock.finish()
        embedding, picking = stages["embed"], stages["pick"]
        reference, first = reference or batch, first or (embedding, picking)
        error, rescores = pool.notes["largest gain error"], pool.notes.get("rescores", 0)
        size = (9 * 150 + 128) * (precision.storage or torch.float32).itemsize + 10 * 4
        common = f"{len(batch & reference)} of 100"
        rows.append([name, embedding, first[0] / embedding, picking, size, error, int(rescores), common])
        print(f"  {name}: {common}", flush=True)
        shards.close()
    header = ["engine", "embed s", "speedup", "picks s", "bytes per image", "largest gain error", "rescores", "overlap"]
    show(f"2,048 images, k = 1,430, 100 picks. {machine()}", header, rows)


if __name__ == "__main__":
    main()
