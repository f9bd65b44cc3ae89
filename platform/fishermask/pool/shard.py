"""A shard: a contiguous slice of the pool and all computations on it, in this process or as a Ray actor.

Every computation goes block by block, and blocks are aligned to positions in the whole pool, so the number of shards
does not affect the result of a block. For the same reason, a shard always computes on one CPU thread: the rounding of a
sum over threads depends on their number. To use more cores, use more shards.
"""

import math
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fishermask.pool.blocks import ALIGNMENT, BLOCK, MIN_COLUMNS, PREDICTED, images_per_part
from fishermask.tensors.contrasts import Weighting
from fishermask.tensors.embedding import Embedding, concatenate, embed, information, information_diagonal, take
from fishermask.tensors.gradient_plan import GradientPlan
from fishermask.tensors.images import Images, Preprocess
from fishermask.tensors.mask import Mask, fisher_diagonal
from fishermask.tensors.precision import Precision
from fishermask.tensors.runtime import repeatable_gpu, return_memory
from fishermask.tensors.slow_gradients import copy_model


class Scorer(Protocol):
    """The part of a greedy criterion that shards compute: a state (the scores) of each image, and its gain."""

    def initial_state(self, embedding: Embedding, first_position: int) -> Tensor:
        """Return the state of the images of ``embedding``, which begin at pool position ``first_position``."""

    def update_state(self, state: Tensor, embedding: Embedding, update: Any, step: int) -> None:
        """Update the state in place for pick number ``step``, counted from 1; ``Criterion.add`` made ``update``."""

    def gains(self, state: Tensor, step: int, first_position: int) -> Tensor:
        """Return the gain of each image after ``step`` picks, [n]."""


class ScoredCandidate(NamedTuple):
    """A candidate with its gain."""

    gain: float
    position: int
    """Position in the whole pool."""
    embedding: Embedding
    """Embedding of this image alone."""


class Shard:
    """The images at pool positions ``start`` to ``start + n - 1``.

    Args:
        images: samples [n, ...] of any shape, a tensor or a view of a data set on disk.
        start: pool position of the first image, a multiple of ``BLOCK``.
        preprocess: function from images to inputs of the model.
        device: device of the computations.
    """

    def __init__(self, images: Images, start: int, preprocess: Preprocess, device: str) -> None:
        self.images, self.start, self.preprocess, self.device = images, start, preprocess, torch.device(device)
        if self.device.type == "cuda":
            repeatable_gpu()
        self.blocks = [slice(i, min(i + BLOCK, len(images))) for i in range(0, len(images), BLOCK)]
        self.model: nn.Module = nn.Identity()
        self.embeddings: list[Embedding] = []
        self.parts: list[slice] = []
        """Indices of the images in each element of ``embeddings`` and ``scores``, whose last columns may be padding."""
        self.scores: list[Tensor] = []
        self.available = torch.zeros(len(images), dtype=torch.bool)
        self.scorer: Scorer
        self.scores_type = torch.float32
        self.step = 0
        self.precision = Precision()
        self.memory_format = torch.contiguous_format

    def set_model(self, model: nn.Module, precision: Precision) -> None:
        """Store a copy of ``model`` in eval mode, and free all results of an earlier model."""
        # A copy, because hooks of this shard must not run in forward passes of other shards of the process.
        self.model = copy_model(model).to(self.device).eval().requires_grad_(False)
        self.precision = precision
        self.scores_type = precision.scores or self._dtype()
        self.memory_format = torch.channels_last if precision.channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)
        self.clear()

    def clear(self) -> None:
        """Free the embeddings and scores."""
        self.embeddings, self.parts, self.scores = [], [], []
        return_memory()

    def images_at(self, positions: Tensor) -> Tensor:
        """Return the images at those ascending pool ``positions`` that are in this shard."""
        inside = (positions >= self.start) & (positions < self.start + len(self.images))
        return self.images[positions[inside] - self.start]

    def inputs_at(self, positions: Tensor) -> Tensor:
        """Return the inputs of the model at those ascending pool ``positions`` that are in this shard."""
        return self.preprocess(self.images_at(positions), self._dtype())

    @torch.no_grad()
    def probabilities(self, piece: int, num_pieces: int) -> Tensor:
        """Return the predicted probabilities of the images of one piece of this shard, [m, C]."""
        blocks = self._blocks_of(piece, num_pieces)
        result, done = torch.empty(0), 0
        for block in blocks:
            for images in self.images[block].split(PREDICTED):
                batch = self._predict(images)
                if not done:
                    # Allocated once, because small results would fragment the heap.
                    result = batch.new_empty(blocks[-1].stop - blocks[0].start, batch.shape[1])
                result[done : done + len(batch)] = batch
                done += len(batch)
                del batch
            return_memory()
        return result

    def _predict(self, images: Tensor) -> Tensor:
        inputs = _pad(self._inputs(images), self.memory_format)
        return self.model(inputs).softmax(-1)[: len(images)].cpu()

    def fisher_diagonal(self, images: Tensor, plan: GradientPlan) -> dict[str, Tensor]:
        """Return the sum of the Fisher diagonal over ``images``: body parameter -> flat tensor."""
        diagonal = fisher_diagonal(self.model, self._inputs(images), plan)
        return {name: value.cpu() for name, value in diagonal.items()}

    def store_embeddings(
        self, piece: int, num_pieces: int, mask: Mask, weighting: Weighting, top_classes: int | None, chunk: int
    ) -> None:
        """Compute and store the embeddings of one piece of this shard. Pieces must be stored in order.

        Args:
            chunk: number of images differentiated at once, a multiple of ``ALIGNMENT`` that divides ``NARROW``.
        """
        mask = mask.to(self.device)
        num_rows = images_per_part(mask.body_size)
        for block in self._blocks_of(piece, num_pieces):
            for images in self.images[block].split(num_rows):
                embedding = None
                for first in range(0, len(images), chunk):
                    chunk_embedding = self._embed(images[first : first + chunk], mask, weighting, top_classes)
                    if embedding is None:
                        embedding = _zeros_like(chunk_embedding, len(images) + -len(images) % MIN_COLUMNS)
                    _copy_into(embedding, first, chunk_embedding, len(images))
                    del chunk_embedding
                assert embedding is not None
                start = self.parts[-1].stop if self.parts else 0
                self.embeddings.append(self._to_storage(embedding))
                self.parts.append(slice(start, start + len(images)))
            return_memory()

    def _embed(self, images: Tensor, mask: Mask, weighting: Weighting, top_classes: int | None) -> Embedding:
        inputs = _pad(self._inputs(images), self.memory_format)
        return embed(self.model, inputs, mask, weighting, top_classes, self.precision.autocast)

    def embed_images(self, images: Tensor, mask: Mask, weighting: Weighting) -> Embedding:
        """Return the embeddings of any ``images``, with all classes; do not store them."""
        inputs, mask = self._inputs(images), mask.to(self.device)
        return concatenate([embed(self.model, part, mask, weighting) for part in inputs.split(ALIGNMENT)]).map(
            Tensor.cpu
        )

    def largest_information(self) -> float:
        """Return the largest entry of the sums of ``V^T V`` of all parts; NaN if an entry is NaN."""
        # The largest entry of a positive semidefinite matrix is on its diagonal.
        largest = [information_diagonal(self._load(i)).max() for i in range(len(self.parts))]
        return float(torch.stack(largest).max()) if largest else 0.0

    def information(self, labeled: Tensor, quantum: float) -> tuple[Tensor, Tensor]:
        """Return the sums of ``V^T V`` over all images and over the images at pool positions ``labeled``.

        Both sums are [k - E, k - E] integers in units of ``quantum``. Sums of integers are exact, so the order of parts
        and shards does not matter. A shard without images returns empty tensors [0, 0].
        """
        size = self.embeddings[0].size if self.embeddings else 0
        pool_sum = torch.zeros(size, size, dtype=torch.int64, device=self.device)
        labeled_sum = pool_sum.clone()
        for i, part in enumerate(self.parts):
            # A sum in float32 can have negative eigenvalues that are larger than a small damping.
            embedding = self.embeddings[i].to(torch.float64)
            _add_quantized(pool_sum, information(embedding), quantum)
            first, last = self.start + part.start, self.start + part.stop
            rows = labeled[(labeled >= first) & (labeled < last)].sort().values - first
            if len(rows):
                _add_quantized(labeled_sum, information(take(embedding, rows.to(self.device))), quantum)
        return pool_sum.cpu(), labeled_sum.cpu()

    def embeddings_at(self, positions: Tensor) -> dict[int, Embedding]:
        """Return pool position -> embedding of this image alone, for those ``positions`` that are in this shard."""
        inside = [int(p) for p in positions if self.start <= p < self.start + len(self.images)]
        return {position: self._embedding_of(position - self.start) for position in inside}

    def start_selection(
        self, scorer: Scorer, candidates: Tensor, step: int, dtype: torch.dtype
    ) -> ScoredCandidate | None:
        """Compute the scores of all images after ``step`` picks, and return the best candidate of this shard.

        Args:
            candidates: pool positions that may be picked.
            dtype: data type of the scores.

        Returns:
            The best of the candidates in this shard; None if the shard has no candidate.
        """
        self.scores_type = dtype
        inside = (candidates >= self.start) & (candidates < self.start + len(self.images))
        self.available = torch.zeros(len(self.images), dtype=torch.bool, device=self.device)
        self.available[candidates[inside].to(self.device) - self.start] = True
        self.scorer, self.step = to_type(scorer, self.scores_type, self.device), step
        self.scores = []  # free the old scores before the new ones are allocated
        for i, part in enumerate(self.parts):
            self.scores.append(self.scorer.initial_state(self._load(i), self.start + part.start))
        return self._best_candidate()

    def apply_pick(self, update: Any, position: int, return_candidate: bool) -> ScoredCandidate | None:
        """Update the scores for the pick at pool ``position``. Return the next best candidate if requested."""
        if self.embeddings:
            update = to_type(update, self.scores_type, self.device)
        self.step += 1
        if self.start <= position < self.start + len(self.images):
            self.available[position - self.start] = False
        for i, scores in enumerate(self.scores):
            self.scorer.update_state(scores, self._load(i), update, self.step)
        return self._best_candidate() if return_candidate else None

    def _best_candidate(self) -> ScoredCandidate | None:
        if not self.scores:
            return None
        all_gains = torch.cat([self._gains(state, part) for state, part in zip(self.scores, self.parts, strict=True)])
        # ``max`` returns the first of equal gains, and NaN or infinity if there is any.
        gain, row = torch.where(self.available, all_gains, -torch.inf).max(0)
        # Each copy from a GPU waits for the GPU, so all values are copied at once; float64 represents them exactly.
        values = torch.stack([gain.double(), row.double(), self.available.any().double()])
        best_gain, best_row, any_available = values.tolist()
        if not any_available:
            return None
        if not math.isfinite(best_gain):
            raise FloatingPointError(
                "a candidate's gain is not a number: the model's outputs overflow, or strategy.params.damping is too "
                "small for the information matrix to be inverted"
            )
        return ScoredCandidate(best_gain, self.start + int(best_row), self._embedding_of(int(best_row)))

    def _gains(self, state: Tensor, part: slice) -> Tensor:
        return self.scorer.gains(state, self.step, self.start + part.start)[: part.stop - part.start]

    def _embedding_of(self, row: int) -> Embedding:
        """Return a copy of the embedding of one image; a view would keep its whole part in memory."""
        index = next(i for i, part in enumerate(self.parts) if row < part.stop)
        column = row - self.parts[index].start
        return take(self.embeddings[index], slice(column, column + 1)).map(lambda tensor: tensor.cpu().clone())

    def _to_storage(self, embedding: Embedding) -> Embedding:
        """Return ``embedding`` with its two large tensors in the storage type."""
        storage = self.precision.storage or embedding.hidden.dtype
        stored = replace(embedding, hidden=embedding.hidden.to(storage), body=embedding.body.to(storage))
        if storage == torch.float16 and not (stored.hidden.isfinite().all() and stored.body.isfinite().all()):
            raise FloatingPointError("engine.storage: float16 cannot hold the embeddings; set bfloat16 or float32")
        return stored

    def _load(self, index: int) -> Embedding:
        """Return the embeddings of a part in the type of the scores."""
        return self.embeddings[index].to(self.scores_type)

    def _blocks_of(self, piece: int, num_pieces: int) -> list[slice]:
        count = len(self.blocks)
        return self.blocks[count * piece // num_pieces : count * (piece + 1) // num_pieces]

    def _inputs(self, images: Tensor) -> Tensor:
        return self.preprocess(images.to(self.device), self._dtype())

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


def to_type(value: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """Return a tensor, or a named tuple or dataclass of tensors, on ``device`` and with real numbers in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_type(part, dtype, device) for part in value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: to_type(getattr(value, f.name), dtype, device) for f in fields(value)})
    return value


def _pad(inputs: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return ``inputs``, with the last input repeated up to a multiple of ``ALIGNMENT``."""
    missing = -len(inputs) % ALIGNMENT
    padded = torch.cat([inputs, inputs[-1:].expand(missing, *inputs.shape[1:])]) if missing else inputs
    return padded.contiguous(memory_format=memory_format) if padded.dim() == 4 else padded.contiguous()


def _zeros_like(embedding: Embedding, count: int) -> Embedding:
    """Return embeddings of ``count`` images, filled with zeros, with the shapes and types of ``embedding``."""
    return embedding.map(lambda part: part.new_zeros(*part.shape[:-1], count))


def _copy_into(target: Embedding, first: int, source: Embedding, limit: int) -> None:
    """Copy the images of ``source`` to images ``first``, ``first + 1``, ... of ``target``, up to ``limit - 1``.

    Concatenating a list of chunks would fragment the heap.
    """
    count = min(source.hidden.shape[1], limit - first)
    for field in fields(Embedding):
        if isinstance(part := getattr(target, field.name), Tensor):
            part[..., first : first + count] = getattr(source, field.name)[..., :count]


def _add_quantized(total: Tensor, share: Tensor, quantum: float) -> None:
    """Add ``share`` to ``total`` in place, as integer multiples of ``quantum``, a few rows at a time."""
    for total_rows, share_rows in zip(total.split(512), share.split(512), strict=True):
        total_rows += (share_rows / quantum).round_().long()
