"""A contiguous slice of the pool and all the work on it. The same class runs in process and as a Ray actor.

Every computation goes block by block, and blocks are aligned to the whole pool's positions: how the pool is cut into
shards decides where a block is computed, never what is computed. For the same reason a shard computes on one CPU
thread, whoever calls it: the rounding of a sum over threads depends on their number. More shards use more cores.
"""

import copy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fishermask.tensors.embedding import Embedding, concatenate, embed, information, take
from fishermask.tensors.images import Images, Statistics, normalise
from fishermask.tensors.layout import Layout
from fishermask.tensors.mask import Mask, fisher_diagonal

BLOCK = 2048
"""Pool positions in a block; shards begin at multiples of it."""
WIDE_BODY = 1024
"""Masked parameters outside the head from which on a block is kept in narrower parts: a product then reads the
embeddings in an order that the memory delivers faster (see docs/performance.md)."""
NARROW = 256
GRADIENT_BATCH = 128
"""Images differentiated at once; divides ``BLOCK``."""


class Scorer(Protocol):
    """What makes a greedy strategy: a state for each image, its change by a pick, and the gain read off it."""

    def start(self, embedding: Embedding, first: int) -> Tensor:
        """State of the images of ``embedding``, which are the pool's from position ``first``."""

    def advance(self, state: Tensor, embedding: Embedding, update: Any) -> None:
        """Bring the state up to date with a pick, in place."""

    def gains(self, state: Tensor, step: int, first: int) -> Tensor:
        """What each image would add after ``step`` picks, [n]."""


class Offer(NamedTuple):
    """A shard's best candidate."""

    gain: float
    position: int
    """In the whole pool."""
    embedding: Embedding
    """Of this one image."""


def cut(size: int, num_shards: int) -> list[tuple[int, int]]:
    """``num_shards`` slices (start, end) of ``size`` pool positions, whole blocks each, as even as that allows."""
    blocks = -(-size // BLOCK)
    edges = [min(size, BLOCK * (blocks * s // num_shards)) for s in range(num_shards + 1)]
    return list(zip(edges, edges[1:], strict=False))


class Shard:
    """The pool's images ``start`` to ``start + n``.

    Args:
        images: uint8 [n, channels, height, width], a tensor or a view of what is on disk.
        start: the pool position of the first image, a multiple of ``BLOCK``.
        device: where to compute.
    """

    def __init__(self, images: Images, start: int, statistics: Statistics, device: str) -> None:
        self.images, self.start, self.statistics, self.device = images, start, statistics, torch.device(device)
        self.blocks = [slice(i, min(i + BLOCK, len(images))) for i in range(0, len(images), BLOCK)]
        self.model: nn.Module = nn.Identity()
        self.embeddings: list[Embedding] = []
        self.parts: list[slice] = []
        """Rows that each of ``embeddings`` and of ``scores`` is of."""
        self.scores: list[Tensor] = []
        self.available = torch.zeros(len(images), dtype=torch.bool)
        self.scorer: Scorer
        self.step = 0

    def set_model(self, model: nn.Module) -> None:
        """Use ``model``, in eval mode, from now on; what was computed with another is dropped."""
        # A copy: the hooks of one shard must not see the passes of another in the same process.
        self.model = copy.deepcopy(model).to(self.device).eval().requires_grad_(False)
        self.clear()

    def clear(self) -> None:
        """Free the embeddings and scores."""
        self.embeddings, self.parts, self.scores = [], [], []

    def images_at(self, positions: Tensor) -> Tensor:
        """The images at those of the ascending pool ``positions`` that lie in this slice."""
        inside = (positions >= self.start) & (positions < self.start + len(self.images))
        return self.images[positions[inside] - self.start]

    @torch.no_grad()
    def probabilities(self, piece: int, pieces: int) -> Tensor:
        """Predicted probabilities [rows, C] of the images in the ``piece``-th of ``pieces`` runs of blocks."""
        found = [self.model(self._inputs(block)).softmax(-1).cpu() for block in self._run(piece, pieces)]
        return torch.cat(found) if found else torch.empty(0)

    def fisher_diagonals(self, batches: list[Tensor], layout: Layout) -> list[dict[str, Tensor]]:
        """Sum of the Fisher diagonal over each batch of uint8 images."""
        found = []
        for images in batches:
            inputs = normalise(images.to(self.device), self.statistics, self._dtype())
            diagonal = fisher_diagonal(self.model, inputs, layout)
            found.append({name: value.cpu() for name, value in diagonal.items()})
        return found

    def embed(self, mask: Mask, class_weighting: str, piece: int, pieces: int) -> None:
        """Embed the images in the ``piece``-th of ``pieces`` runs of blocks; call with each piece in turn."""
        mask = Mask(mask.layout, {name: entries.to(self.device) for name, entries in mask.entries.items()})
        for block in self._run(piece, pieces):
            batches = [
                embed(self.model, batch, mask, class_weighting) for batch in self._inputs(block).split(GRADIENT_BATCH)
            ]
            rows = BLOCK if mask.body_size <= WIDE_BODY else NARROW
            together = rows // GRADIENT_BATCH
            for first in range(0, len(batches), together):
                start = block.start + first * GRADIENT_BATCH
                self.embeddings.append(concatenate(batches[first : first + together]))
                self.parts.append(slice(start, min(start + rows, block.stop)))

    def information(self, labeled: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of ``V^T V`` over all images and over those at the pool positions ``labeled``: two [k, k], float64."""
        size = self.embeddings[0].size if self.embeddings else 0
        everything = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        known = everything.clone()
        for part, embedding in zip(self.parts, self.embeddings, strict=True):
            everything += information(embedding)
            first, last = self.start + part.start, self.start + part.stop
            rows = labeled[(labeled >= first) & (labeled < last)] - first
            if len(rows):
                known += information(take(embedding, rows.to(self.device)))
        return everything.cpu(), known.cpu()

    def hidden_at(self, positions: Tensor) -> list[Tensor]:
        """Hidden outputs [E] at those of the pool ``positions`` that lie in this slice, in their order."""
        found = [self._row(int(p) - self.start) for p in positions if self.start <= p < self.start + len(self.images)]
        return [embedding.hidden[:, 0].cpu() for embedding in found]

    def start_selection(self, scorer: Scorer, candidates: Tensor) -> Offer | None:
        """Score all images by ``scorer`` and offer the best of the pool positions ``candidates``."""
        inside = (candidates >= self.start) & (candidates < self.start + len(self.images))
        self.available = torch.zeros(len(self.images), dtype=torch.bool)
        self.available[candidates[inside] - self.start] = True
        self.scorer, self.step = scorer, 0
        firsts = [self.start + part.start for part in self.parts]
        self.scores = [scorer.start(e, first) for e, first in zip(self.embeddings, firsts, strict=True)]
        return self._offer()

    def advance(self, update: Any, taken: int) -> Offer | None:
        """Bring the scores up to date with the pick of pool position ``taken``; offer the next best."""
        update = _moved(update, self.embeddings[0].hidden) if self.embeddings else update
        self.step += 1
        if self.start <= taken < self.start + len(self.images):
            self.available[taken - self.start] = False
        for scores, embedding in zip(self.scores, self.embeddings, strict=True):
            self.scorer.advance(scores, embedding, update)
        return self._offer()

    def _offer(self) -> Offer | None:
        if not self.available.any():
            return None
        states = zip(self.scores, self.parts, strict=True)
        gain = torch.cat([self.scorer.gains(state, self.step, self.start + part.start) for state, part in states]).cpu()
        if not torch.isfinite(gain[self.available]).all():
            raise FloatingPointError(
                "a candidate's gain is not a number: the model's outputs overflow, or strategy.params.damping is too "
                "small for the information matrix to be inverted"
            )
        # argmax takes the first of equal values: ties go to the lowest position.
        row = int(torch.where(self.available, gain, -torch.inf).argmax())
        chosen = Embedding(*(part.cpu() for part in self._row(row)))
        return Offer(float(gain[row]), self.start + row, chosen)

    def _row(self, row: int) -> Embedding:
        index = next(i for i, part in enumerate(self.parts) if row < part.stop)
        inside = row - self.parts[index].start
        return take(self.embeddings[index], slice(inside, inside + 1))

    def _run(self, piece: int, pieces: int) -> list[slice]:
        count = len(self.blocks)
        return self.blocks[count * piece // pieces : count * (piece + 1) // pieces]

    def _inputs(self, block: slice) -> Tensor:
        return normalise(self.images[block].to(self.device), self.statistics, self._dtype())

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def _moved(update: Any, like: Tensor) -> Any:
    """An update's tensors with the device and type of ``like``; tuples keep their kind."""
    if isinstance(update, Tensor):
        return update.to(like)
    if isinstance(update, tuple):
        parts = [_moved(part, like) for part in update]
        return type(update)(*parts) if hasattr(update, "_fields") else tuple(parts)
    return update
