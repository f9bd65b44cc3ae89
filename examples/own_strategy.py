"""Your own strategy: as a function for one query, and as a file for runs and sweeps."""

import torch
from pydantic import Field

import fishermask


class Params(fishermask.StrategyParams):
    temperature: float = Field(2.0, gt=0)
    """Number that divides the logits before the entropy is computed; larger numbers soften the predictions."""


def query(pool: fishermask.Pool, budget: int, params: Params) -> torch.Tensor:
    """Return the candidates with the largest entropy of the softened prediction."""
    softened = (pool.probabilities().log() / params.temperature).softmax(-1)
    entropy = torch.special.entr(softened).sum(-1)
    return pool.candidates[entropy.sort(descending=True, stable=True).indices[:budget]]


if __name__ == "__main__":
    model, samples = torch.nn.Linear(8, 3), torch.randn(500, 8)
    print(fishermask.select(model, samples, labeled=[0, 1], budget=5, strategy=query, params=Params(temperature=3)))

    config = {
        "name": "own_strategy",
        "base": {
            "imbalance": {"kind": "balanced", "per_class": 30},
            "model": {"name": "mlp", "params": {"width": 8, "depth": 1}},
            "training": {"max_epochs": 2},
            "budget": {"initial": 20, "query": 20, "total": 40},
            "strategy": {"name": __file__, "params": {"temperature": 3.0}},  # "./own_strategy.py" in a sweep file
        },
    }
    print(fishermask.run(config).rounds[["strategy", "labels", "accuracy"]])
