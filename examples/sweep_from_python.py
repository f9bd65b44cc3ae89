"""Compare strategies over seeds, and read the results as a table."""

import fishermask

config = fishermask.Config(
    name="sweep_from_python",
    base={
        "data": {"name": "fashion_mnist_small"},
        "imbalance": {"kind": "balanced", "per_class": 30},
        "model": {"name": "mlp", "params": {"width": 16, "depth": 1}},
        "training": {"max_epochs": 5},
        "budget": {"initial": 20, "query": 20, "total": 40},
    },
    grid={"strategy": ["fisher_mask", "random"], "seed": [0, 1]},
)

if __name__ == "__main__":
    results = fishermask.sweep(config)  # run the script again to continue after an interruption
    assert not results.failed
    table = results.rounds
    print(table.pivot_table("balanced_accuracy", index="labels", columns="strategy").round(3))
    print(f"all columns: fishermask.read_results({str(results.folder)!r})")
