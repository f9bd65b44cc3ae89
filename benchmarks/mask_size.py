"""Effect of the mask's size on the balanced accuracy of fisher_mask, and on the time and memory of its queries.

Runs a sweep on the bundled data, with and without rare classes. Balanced accuracy is compared with ``random``, seed by
seed, because runs of one seed start from the same labeled set and model. To resume after an interruption, run the
script again.

    python benchmarks/mask_size.py                  # 4 sizes and random, 2 pools, 5 seeds
    python benchmarks/mask_size.py --seeds 1 --rounds 1 --sizes 0 256 --per-class 50 --output /tmp/trial
"""

import argparse
import math

from table import machine, show

import fishermask
from fishermask.experiment.run_plan import plan_run
from fishermask.planning.placement import this_machine
from fishermask.sweeps.sweep_file import expand

METRIC = "balanced_accuracy"


def make_config(options):
    strategies = [
        {"name": "fisher_mask", "label": f"body {size}", "params": {"num_body_parameters": size}}
        for size in options.sizes
    ]
    return fishermask.Config(
        name=f"mask_size_{options.model}",
        output=options.output,
        base={
            "data": {"name": "fashion_mnist_small"},
            "imbalance": {"kind": "step", "rare": 5, "per_class": options.per_class},
            "model": options.model,
            "training": {"max_epochs": 60},
            "budget": {"initial": 20, "query": 20, "total": 20 + 20 * options.rounds},
            "resources": {"shards": 1},
        },
        grid={
            "strategy": [*strategies, "random"],
            "imbalance.ratio": [1, 20],
            "seed": list(range(options.seeds)),
        },
    )


def estimate_memory(config):
    """Return the estimated peak memory of a query in bytes, by strategy label and imbalance ratio."""
    memory = {}
    for run in expand(config).runs:
        key = run.config.strategy.label, run.config.imbalance.ratio
        if run.config.seed == 0 and run.config.strategy.label:
            memory[key] = plan_run(run.config, this_machine()).query.largest_bytes
    return memory


def mean_and_error(values):
    """Return the mean of ``values`` and its standard error, which is NaN for a single value."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def compare(rounds, config):
    """Return the rows of the table: one for each ratio and size."""
    rounds = rounds[rounds["finished"]]
    ratio = next(name for name in rounds.columns if name.endswith("ratio"))
    last = rounds["round"].max()
    memory, rows = estimate_memory(config), []
    for value, pool in rounds.groupby(ratio):
        trained = pool[pool["round"] > 0]  # all strategies share round 0
        scores = trained.pivot_table(METRIC, index=["seed", "round"], columns="strategy")
        differences = scores.drop(columns="random").sub(scores["random"], axis=0).dropna()
        seconds = pool[pool["round"] < last].groupby("strategy")["seconds.query"].median()
        for label in [strategy["label"] for strategy in config.grid["strategy"][:-1]]:
            curve = mean_and_error(differences[label].groupby("seed").mean())
            end = mean_and_error(differences[label].xs(last, level="round"))
            rows.append([
                f"{value:g}", label.removeprefix("body "), f"{100 * curve[0]:+.2f} ± {100 * curve[1]:.2f}",
                f"{100 * end[0]:+.2f} ± {100 * end[1]:.2f}", float(seconds[label]),
                float(seconds[label] / seconds["body 0"]) if "body 0" in seconds else math.nan,
                memory[label, value] / 1e6,
            ])  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--output", default="results", help="folder of the sweep's results")
    options = parser.parse_args()
    config = make_config(options)
    results = fishermask.sweep(config)
    for name, error in results.failed.items():
        print(f"failed: {name}: {error}")
    header = [
        "imbalance",
        "body parameters",
        "mean over rounds",
        "last round",
        "s per query",
        "x size 0",
        "MB (estimate)",
    ]
    title = (
        f"Balanced accuracy minus that of random, in points, ± standard error over {options.seeds} seeds. {machine()}"
    )
    show(title, header, compare(results.rounds, config))


if __name__ == "__main__":
    main()
