"""What a strategy sees of the pool.

There is one index space: *positions* in the pool, 0 to ``size - 1``. Positions become ids where a person or a file sees
them, and nowhere before.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fishermask.pool.shards import Shards
from fishermask.tensors.layout import Layout, inspect

PIECES = 20
"""Parts that a pass over the pool is called in, so that its progress can be shown."""
DIAGONAL_BATCH = 32

Progress = Callable[[str, int, int], None]
"""Told the stage, how much is done and how much there is."""


class Pool:
    """The pool in one round, with the model trained on what is labelled so far.

    Attributes:
        candidates: positions that may be queried, ascending, [u].
        labeled: positions that are labelled, in the order of labelling, [l].
        labels: their labels, [l].
        generator: the strategy's own random stream of this round.
        model: the trained model, in eval mode.
        shards: the pool's shards, which hold the same model.
    """

    def __init__(
        self,
        shards: Shards,
        size: int,
        labeled: Tensor,
        labels: Tensor,
        model: nn.Module,
        generator: torch.Generator,
        sample_generator: torch.Generator,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        unlabeled = torch.ones(size, dtype=torch.bool)
        unlabeled[labeled] = False
        self.candidates = unlabeled.nonzero()[:, 0]
        self.labeled, self.labels = labeled, labels
        self.size, self.shards, self.model = size, shards, model
        self.generator, self.progress = generator, progress
        self._sample_generator = sample_generator
        shards.call("set_model", model)

    def probabilities(self) -> Tensor:
        """Predicted probabilities of the candidates, [u, C]."""
        shards = [list[Tensor]() for _ in range(self.shards.count)]
        for found in self.in_pieces("predict", "probabilities"):
            for parts, part in zip(shards, found, strict=True):
                parts.append(part)
        return torch.cat([part for parts in shards for part in parts if len(part)])[self.candidates]

    def layout(self) -> Layout:
        """How the model's parameters are differentiated."""
        images = torch.cat(self.shards.call("images_at", torch.arange(min(2, self.size))))
        return inspect(copy.deepcopy(self.model).eval(), images.to(next(self.model.parameters())))

    def fisher_diagonal(self, layout: Layout, num_samples: int, which: str = "random") -> dict[str, Tensor]:
        """Mean Fisher diagonal of the parameters outside the last layer over a ``random`` sample of the whole pool.

        The paper's released code takes the ``first`` images instead.
        """
        order = torch.randperm(self.size, generator=self._sample_generator)
        sample = order[:num_samples].sort().values if which == "random" else torch.arange(min(num_samples, self.size))
        batches = torch.cat(self.shards.call("images_at", sample)).split(DIAGONAL_BATCH)
        total: dict[str, Tensor] = {}
        for first in range(0, len(batches), self.shards.count):
            self.progress("fisher diagonal", first, len(batches))
            args = [([batch], layout) for batch in batches[first : first + self.shards.count]]
            # Added batch by batch in the sample's order, whichever shard computed it.
            for diagonal in (d for found in self.shards.scatter("fisher_diagonals", args) for d in found):
                total = {name: total[name] + value if total else value for name, value in diagonal.items()}
        return {name: value / len(sample) for name, value in total.items()}

    def in_pieces(self, stage: str, method: str, *args: Any) -> list[list[Any]]:
        """Call a shard method that works in pieces with each piece in turn, reporting progress."""
        found = []
        for piece in range(PIECES):
            self.progress(stage, piece, PIECES)
            found.append(self.shards.call(method, *args, piece, PIECES))
        self.progress(stage, PIECES, PIECES)
        return found
