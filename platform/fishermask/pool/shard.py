"""A contiguous slice of the pool and all the work on it. The same class runs in process and as a Ray actor.

Every computation goes block by block, and blocks are aligned to the whole pool's positions: how the pool is cut into
shards decides where a block is computed, never what is computed. For the same reason a shard computes on one CPU
thread, whoever calls it: the rounding of a sum over threads depends on their number. More shards use more cores.
"""

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fishermask.pool.blocks import ALIGNMENT, BLOCK, MIN_COLUMNS, PREDICTED, images_per_part
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import Embedding, concatenate, embed, information, information_diagonal, take
from fishermask.tensors.images import Images, Preprocess
from fishermask.tensors.layout import Layout
from fishermask.tensors.mask import Mask, fisher_diagonal
from fishermask.tensors.precision import Precision
from fishermask.tensors.runtime import repeatable_gpu, return_memory
from fishermask.tensors.slow_gradients import copy_model


class Scorer(Protocol):
    """What makes a greedy strategy: a state for each image, its change by a pick, and the gain read off it."""

    def start(self, embedding: Embedding, first: int) -> Tensor:
        """State of the images of ``embedding``, which are the pool's from position ``first``."""

    def advance(self, state: Tensor, embedding: Embedding, update: Any, step: int) -> None:
        """Bring the state up to date with a pick, the ``step``-th, in place."""

    def gains(self, state: Tensor, step: int, first: int) -> Tensor:
        """What each image would add after ``step`` picks, [n]."""


class Offer(NamedTuple):
    """A shard's best candidate."""

    gain: float
    position: int
    """In the whole pool."""
    embedding: Embedding
    """Of this one image."""


class Shard:
    """The pool's images ``start`` to ``start + n``.

    Args:
        images: samples [n, ...] of any shape, a tensor or a view of what is on disk.
        start: the pool position of the first image, a multiple of ``BLOCK``.
        preprocess: makes the model's inputs from images.
        device: where to compute.
    """

    def __init__(self, images: Images, start: int, preprocess: Preprocess, device: str) -> None:
        self.images, self.start, self.preprocess, self.device = images, start, preprocess, torch.device(device)
        if self.device.type == "cuda":
            repeatable_gpu()
        self.blocks = [slice(i, min(i + BLOCK, len(images))) for i in range(0, len(images), BLOCK)]
        self.model: nn.Module = nn.Identity()
        self.embeddings: list[Embedding] = []
        self.parts: list[slice] = []
        """Rows that each of ``embeddings`` and of ``scores`` is of; the last may be followed by padding."""
        self.scores: list[Tensor] = []
        self.available = torch.zeros(len(images), dtype=torch.bool)
        self.scorer: Scorer
        self.scores_type = torch.float32
        self.step = 0
        self.precision = Precision()
        self.layout = torch.contiguous_format

    def set_model(self, model: nn.Module, precision: Precision) -> None:
        """Use ``model``, in eval mode, from now on; what was computed with another is dropped."""
        # A copy: the hooks of one shard must not see the passes of another in the same process.
        self.model = copy_model(model).to(self.device).eval().requires_grad_(False)
        self.precision = precision
        self.scores_type = precision.scores or self._dtype()
        self.layout = torch.channels_last if precision.channels_last else torch.contiguous_format
        self.model.to(memory_format=self.layout)
        self.clear()

    def clear(self) -> None:
        """Free the embeddings and scores."""
        self.embeddings, self.parts, self.scores = [], [], []
        return_memory()

    def images_at(self, positions: Tensor) -> Tensor:
        """The images at those of the ascending pool ``positions`` that lie in this slice."""
        inside = (positions >= self.start) & (positions < self.start + len(self.images))
        return self.images[positions[inside] - self.start]

    def inputs_at(self, positions: Tensor) -> Tensor:
        """The images at those of the ascending pool ``positions`` that lie in this slice, as inputs of the model."""
        return self.preprocess(self.images_at(positions), self._dtype())

    @torch.no_grad()
    def probabilities(self, piece: int, pieces: int) -> Tensor:
        """Predicted probabilities [rows, C] of the images in the ``piece``-th of ``pieces`` runs of blocks."""
        blocks = self._run(piece, pieces)
        found, done = torch.empty(0), 0
        for block in blocks:
            for images in self.images[block].split(PREDICTED):
                own = self._predict(images)
                if not done:
                    # Results in memory of their own: between chunks they would keep the heap from using its gaps again.
                    found = own.new_empty(blocks[-1].stop - blocks[0].start, own.shape[1])
                found[done : done + len(own)] = own
                done += len(own)
                del own
            return_memory()
        return found

    def _predict(self, images: Tensor) -> Tensor:
        inputs = _aligned(self._inputs(images), self.layout)
        return self.model(inputs).softmax(-1)[: len(images)].cpu()

    def fisher_diagonals(self, batches: list[Tensor], layout: Layout) -> list[dict[str, Tensor]]:
        """Sum of the Fisher diagonal over each batch of images."""
        found = []
        for images in batches:
            diagonal = fisher_diagonal(self.model, self._inputs(images), layout)
            found.append({name: value.cpu() for name, value in diagonal.items()})
        return found

    def embed(
        self, mask: Mask, weighting: Weighting, top_classes: int | None, chunk: int, piece: int, pieces: int
    ) -> None:
        """Embed the images in the ``piece``-th of ``pieces`` runs of blocks; call with each piece in turn.

        Args:
            chunk: images differentiated at once, a multiple of ``ALIGNMENT`` that divides ``NARROW``.
        """
        mask = Mask(mask.layout, {name: entries.to(self.device) for name, entries in mask.entries.items()})
        rows = images_per_part(mask.body_size)
        for block in self._run(piece, pieces):
            for part in self.images[block].split(rows):
                found = None
                for first in range(0, len(part), chunk):
                    own = self._embedded(part[first : first + chunk], mask, weighting, top_classes)
                    if found is None:
                        found = _empty(own, len(part) + -len(part) % MIN_COLUMNS)
                    _put(found, first, own, len(part))
                    del own
                assert found is not None
                start = self.parts[-1].stop if self.parts else 0
                self.embeddings.append(self._stored(found))
                self.parts.append(slice(start, start + len(part)))
            return_memory()

    def _embedded(self, images: Tensor, mask: Mask, weighting: Weighting, top_classes: int | None) -> Embedding:
        inputs = _aligned(self._inputs(images), self.layout)
        return embed(self.model, inputs, mask, weighting, top_classes, self.precision.autocast)

    def embed_images(self, images: Tensor, mask: Mask, weighting: Weighting) -> Embedding:
        """Exact embeddings of ``images``, with all classes, not kept here."""
        inputs = self._inputs(images)
        mask = Mask(mask.layout, {name: entries.to(self.device) for name, entries in mask.entries.items()})
        return concatenate([embed(self.model, part, mask, weighting) for part in inputs.split(ALIGNMENT)]).map(
            Tensor.cpu
        )

    def largest_information(self) -> float:
        """Largest entry of any part's sum of ``V^T V``; on the diagonal, where all the largest are. NaN if any is."""
        largest = [information_diagonal(self._loaded(i)).max() for i in range(len(self.parts))]
        return float(torch.stack(largest).max()) if largest else 0.0

    def information(self, labeled: Tensor, quantum: float) -> tuple[Tensor, Tensor]:
        """Sums of ``V^T V`` over all images and over those at the pool positions ``labeled``, in units of ``quantum``.

        Two [k - E, k - E] of whole numbers: adding those is exact, so the order of parts and shards changes nothing.
        Empty [0, 0] from a shard without images.
        """
        size = self.embeddings[0].size if self.embeddings else 0
        everything = torch.zeros(size, size, dtype=torch.int64, device=self.device)
        known = everything.clone()
        for i, part in enumerate(self.parts):
            # Sums in float32 have eigenvalues below zero, which a small damping would not make up for.
            embedding = self.embeddings[i].to(torch.float64)
            _add_whole(everything, information(embedding), quantum)
            first, last = self.start + part.start, self.start + part.stop
            rows = labeled[(labeled >= first) & (labeled < last)].sort().values - first
            if len(rows):
                _add_whole(known, information(take(embedding, rows.to(self.device))), quantum)
        return everything.cpu(), known.cpu()

    def embeddings_at(self, positions: Tensor) -> dict[int, Embedding]:
        """Pool position -> embedding of that one image, for those of ``positions`` that lie in this slice."""
        inside = [int(p) for p in positions if self.start <= p < self.start + len(self.images)]
        return {position: self._row(position - self.start) for position in inside}

    def start_selection(self, scorer: Scorer, candidates: Tensor, step: int, dtype: torch.dtype) -> Offer | None:
        """Score all images by ``scorer``, in ``dtype``, and offer the best of the pool positions ``candidates``.

        ``step`` picks were made before.
        """
        self.scores_type = dtype
        inside = (candidates >= self.start) & (candidates < self.start + len(self.images))
        self.available = torch.zeros(len(self.images), dtype=torch.bool, device=self.device)
        self.available[candidates[inside].to(self.device) - self.start] = True
        self.scorer, self.step = moved(scorer, self.scores_type, self.device), step
        self.scores = []  # the old ones go before the new ones come
        for i, part in enumerate(self.parts):
            self.scores.append(self.scorer.start(self._loaded(i), self.start + part.start))
        return self._offer()

    def advance(self, update: Any, taken: int, offer: bool = True) -> Offer | None:
        """Bring the scores up to date with the pick of pool position ``taken``; ``offer`` the next best."""
        if self.embeddings:
            update = moved(update, self.scores_type, self.device)
        self.step += 1
        if self.start <= taken < self.start + len(self.images):
            self.available[taken - self.start] = False
        for i, scores in enumerate(self.scores):
            self.scorer.advance(scores, self._loaded(i), update, self.step)
        return self._offer() if offer else None

    def _offer(self) -> Offer | None:
        if not self.scores:
            return None
        gain = torch.cat([self._gains(state, part) for state, part in zip(self.scores, self.parts, strict=True)])
        # The first of equal ones; infinite or not a number if any of them is.
        gain, row = torch.where(self.available, gain, -torch.inf).max(0)
        # A device is waited for each time that something is read from it: once, in numbers that float64 holds exactly.
        best, position, any_left = torch.stack([gain.double(), row.double(), self.available.any().double()]).tolist()
        if not any_left:
            return None
        if not math.isfinite(best):
            raise FloatingPointError(
                "a candidate's gain is not a number: the model's outputs overflow, or strategy.params.damping is too "
                "small for the information matrix to be inverted"
            )
        return Offer(best, self.start + int(position), self._row(int(position)))

    def _gains(self, state: Tensor, part: slice) -> Tensor:
        return self.scorer.gains(state, self.step, self.start + part.start)[: part.stop - part.start]

    def _row(self, row: int) -> Embedding:
        """The embedding of one image, a copy: a view would keep its whole part alive."""
        index = next(i for i, part in enumerate(self.parts) if row < part.stop)
        inside = row - self.parts[index].start
        return take(self.embeddings[index], slice(inside, inside + 1)).map(lambda part: part.cpu().clone())

    def _stored(self, embedding: Embedding) -> Embedding:
        """``embedding`` as it is kept: the bulk of it in the storage type."""
        storage = self.precision.storage or embedding.hidden.dtype
        kept = replace(embedding, hidden=embedding.hidden.to(storage), body=embedding.body.to(storage))
        if storage == torch.float16 and not (kept.hidden.isfinite().all() and kept.body.isfinite().all()):
            raise FloatingPointError("engine.storage: float16 cannot hold the embeddings; set bfloat16 or float32")
        return kept

    def _loaded(self, index: int) -> Embedding:
        """A part's embeddings as scores are computed from them."""
        return self.embeddings[index].to(self.scores_type)

    def _run(self, piece: int, pieces: int) -> list[slice]:
        count = len(self.blocks)
        return self.blocks[count * piece // pieces : count * (piece + 1) // pieces]

    def _inputs(self, images: Tensor) -> Tensor:
        return self.preprocess(images.to(self.device), self._dtype())

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def moved(value: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A tensor, or a named tuple or dataclass of them, with its numbers in another type and on another device."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, dtype, device) for part in value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), dtype, device) for f in fields(value)})
    return value


def _aligned(images: Tensor, layout: torch.memory_format) -> Tensor:
    """``images`` repeated at the end up to a multiple of ``ALIGNMENT``: few images at a time may round otherwise."""
    missing = -len(images) % ALIGNMENT
    whole = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
    return whole.contiguous(memory_format=layout) if whole.dim() == 4 else whole.contiguous()


def _empty(like: Embedding, count: int) -> Embedding:
    """An embedding of ``count`` images, all zeros, of the kind of ``like``."""
    return like.map(lambda part: part.new_zeros(*part.shape[:-1], count))


def _put(target: Embedding, first: int, source: Embedding, limit: int) -> None:
    """Copy ``source`` to the images of ``target`` from ``first`` on, but not beyond ``limit``.

    Chunks that were kept until all are there would keep the heap from using the gaps between them again.
    """
    count = min(source.hidden.shape[1], limit - first)
    for field in fields(Embedding):
        if isinstance(part := getattr(target, field.name), Tensor):
            part[..., first : first + count] = getattr(source, field.name)[..., :count]


def _add_whole(total: Tensor, share: Tensor, quantum: float) -> None:
    """Add ``share`` to ``total`` in whole numbers of ``quantum``, in place, a few rows at a time."""
    for rows, own in zip(total.split(512), share.split(512), strict=True):
        rows += (own / quantum).round_().long()
