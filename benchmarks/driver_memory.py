"""Memory of the driver while it prepares a run, by the size of the pool; each measurement has its own process.

    python benchmarks/driver_memory.py [SIZE ...]

Private memory is memory that only this process has written (``Private_Dirty``). Pages mapped from the decoded images do
not count: all processes share them, and the system reclaims them. The peak is of anonymous memory, sampled.
"""

import io
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from table import show

CASES = {
    "decode and prepare": "none",
    "prepare, all images": "none",
    "prepare, step imbalance": {"kind": "step", "ratio": 2},
    "step imbalance, and write the pool": {"kind": "step", "ratio": 2},
}
"""Case -> imbalance. The first case decodes the images into the store that the other cases map."""


def write_source(path: Path, count: int) -> None:
    """Write ``count`` images of 10 classes with different paths to a Parquet file."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, count, 10_000):
            rows = range(start, min(start + 10_000, count))
            images = pa.array([{"bytes": buffer.getvalue(), "path": f"pool/{row:09d}.png"} for row in rows], kind)
            file.write_table(pa.table({"image": images, "label": [row % 10 for row in rows]}, schema))


def read_memory(file: str, field: str) -> int:
    """Return a field of a file in /proc/self, in bytes."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(case: str, train: str, warmup: str, folder: str) -> None:
    """Print the growth of private memory and of the peak in one case, in bytes."""
    from fishermask.config import ExperimentConfig, parse
    from fishermask.experiment.inputs import prepare_inputs
    from fishermask.sweeps import runner, sweep_file

    def settings(path: str) -> dict:
        data = {"name": "parquet", "train": path, "test": warmup}
        budget = {"initial": 10, "query": 10, "total": 50}
        return {"data": data, "imbalance": CASES[case], "budget": budget, "strategy": "random"}

    prepare_inputs(parse(ExperimentConfig, settings(warmup)))
    prepare_inputs(parse(ExperimentConfig, settings(warmup) | {"seed": 1}))
    before = read_memory("smaps_rollup", "Private_Dirty"), read_memory("status", "RssAnon")
    peak, done = [before[1]], threading.Event()

    def sample_peak() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], read_memory("status", "RssAnon"))

    sampler = threading.Thread(target=sample_peak)
    sampler.start()
    if "write" in case:
        sweep = sweep_file.expand(sweep_file.SweepConfig(name="s", output=folder, base=settings(train)))
        runner.create_folders(sweep, [(run, []) for run in sweep.runs])
    else:
        inputs = prepare_inputs(parse(ExperimentConfig, settings(train)))  # alive while memory is read
        assert inputs
    done.set()
    sampler.join()
    print(read_memory("smaps_rollup", "Private_Dirty") - before[0], peak[0] - before[1])


def main(sizes: list[int]) -> None:
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            train, warmup = Path(folder, "train.parquet"), Path(folder, "small.parquet")
            write_source(train, size)
            write_source(warmup, 1000)
            environment = os.environ | {"FISHERMASK_CACHE": f"{folder}/cache"}
            for case in CASES:
                command = [sys.executable, __file__, "--child", case, str(train), str(warmup), folder]
                output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
                private, peak = map(float, output.split())
                rows.append([case, f"{size:,}", size * 3072 / 1e6, private / 1e6, peak / 1e6])
    show("", ["case", "images", "pixels MB", "private growth MB", "peak growth MB"], rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        measure(*sys.argv[2:])
    else:
        main([int(size) for size in sys.argv[1:]] or [20_000, 200_000])
