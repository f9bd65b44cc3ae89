"""Rounds of a small sweep with different instruction sets, shards and threads, compared with the default.

    python benchmarks/reproducibility.py

Each line of the table is the sweep in a new process: 7 strategies with ``small_cnn``, and 3 queries of 20 images from a
pool of 1,000. Runs are equal if all their batches and metrics are equal.
"""

import json
import os
import subprocess
import sys

from table import show

VARIANTS: dict[str, dict[str, str]] = {
    "default, in another process": {},
    "3 shards": {"SHARDS": "3"},
    "2 threads": {"CPUS": "2"},
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "ONEDNN_MAX_CPU_ISA=AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "ONEDNN_MAX_CPU_ISA=SSE41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "MKL_ENABLE_INSTRUCTIONS=AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "all three AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
STRATEGIES = ["random", "margin", "entropy", "coreset", "badge", "bait", "fisher_mask"]
SEEDS = (0,)


def child() -> None:
    """Print the rounds of all runs as JSON."""
    import torch

    from fishermask.config import ExperimentConfig, parse
    from fishermask.experiment.inputs import prepare_inputs
    from fishermask.experiment.loop import run
    from fishermask.pool.shards import LocalShards

    torch.set_num_threads(int(os.environ.get("CPUS", "1")))
    rounds = {}
    for seed in SEEDS:
        for strategy in STRATEGIES:
            params = {"fraction": 0.03, "fisher_samples": 256} if strategy == "fisher_mask" else {}
            settings = {
                "imbalance": {"kind": "balanced", "per_class": 100},
                "budget": {"initial": 40, "query": 20, "total": 100},
                "training": {"max_epochs": 15},
                "strategy": {"name": strategy, "params": params},
                "seed": seed,
            }
            inputs = prepare_inputs(parse(ExperimentConfig, settings))

            def make_shards(images, statistics):  # type: ignore[no-untyped-def]
                return LocalShards(images, statistics, int(os.environ.get("SHARDS", "1")))

            results = [result.as_dict() for result in run(inputs, make_shards)]
            rounds[f"{strategy}-{seed}"] = [{k: v for k, v in r.items() if k != "seconds"} for r in results]
    print(json.dumps(rounds))


def compute(variables: dict[str, str]) -> dict[str, list[dict]]:
    """Return the rounds of all runs with these environment variables."""
    process = subprocess.run(
        [sys.executable, __file__, "--child"],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])


def compare(variant: dict[str, list[dict]], default: dict[str, list[dict]]) -> list[object]:
    """Return the cells of one line of the table."""
    equal = sum(variant[name] == default[name] for name in default)
    same_batches = sum([r["batch"] for r in variant[name]] == [r["batch"] for r in default[name]] for name in default)
    shared, total, difference = 0, 0, 0.0
    for name, rounds in default.items():
        for ours, theirs in zip(rounds, variant[name], strict=True):
            shared += len(set(ours["batch"]) & set(theirs["batch"]))
            total += len(ours["batch"])
            difference = max(difference, abs(ours["accuracy"] - theirs["accuracy"]))
    first = sum(variant[name][0]["accuracy"] == default[name][0]["accuracy"] for name in default)
    final = [sum(runs[name][-1]["accuracy"] for name in runs) / len(runs) for runs in (variant, default)]
    runs = len(default)
    return [
        f"{equal}/{runs}",
        f"{same_batches}/{runs}",
        f"{100 * shared / total:.0f} %",
        f"{first}/{runs}",
        difference,
        final[0] - final[1],
    ]


def main() -> None:
    default = compute({})
    header = ["variant", "equal runs", "equal batches", "shared picks", "equal round 0", "max |accuracy|", "mean final"]
    rows = []
    for name, variables in VARIANTS.items():
        rows.append([name, *compare(compute(variables), default)])
        print(rows[-1], file=sys.stderr, flush=True)
    show("", header, rows)


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else main()
