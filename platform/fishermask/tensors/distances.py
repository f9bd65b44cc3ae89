"""Scores by distance to what is chosen: k-center (Sener, Savarese 2018) and BADGE (Ash et al. 2020).

Both keep, for each image, the squared distance to the nearest center so far, and need only the new center to go on.
BADGE's gradient embedding, ``(p - e_y) (x) h`` with y the predicted class, is kept as its two factors, never [n, C E].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishermask.tensors.embedding import Embedding


@dataclass(frozen=True)
class KCenterScorer:
    """Squared distance of the last hidden layer's output to the nearest labeled or chosen image.

    Attributes:
        centers: hidden outputs of the labeled images, [E, l].
    """

    centers: Tensor

    def initial_state(self, embedding: Embedding, first: int) -> Tensor:
        """Squared distance to the nearest labeled image, [n]; infinite if none is labeled."""
        state = embedding.hidden.new_full((embedding.hidden.shape[1],), torch.inf)
        for center in self.centers.unbind(1):
            _nearer(state, (embedding.hidden - center[:, None]).square().sum(0))
        return state

    def update_state(self, state: Tensor, embedding: Embedding, update: Embedding, step: int) -> None:
        """The pick, ``update``, is a center from now on."""
        # By differences: the square of a sum can fall below zero in rounding, this cannot.
        _nearer(state, (embedding.hidden - update.hidden).square().sum(0))

    def gains(self, state: Tensor, step: int, first: int) -> Tensor:
        """The distances. Infinite ones are equal: the first image is taken when there is no center at all."""
        return state.clamp_max(torch.finfo(state.dtype).max)


@dataclass(frozen=True)
class BadgeScorer:
    """k-means++ seeding on gradient embeddings: the first is the longest, then one in proportion to its distance.

    ``argmax(log d + g)`` with independent Gumbel noise g draws in proportion to d. The noise belongs to the pool's
    positions and the step, not to a shard, so the draw does not depend on how the pool is cut.
    """

    seed: int

    def noise_seed(self, step: int, first: int) -> int:
        """Seed of the noise of one step for the images from pool position ``first``."""
        return ((self.seed * 1_000_003 + step) * 1_000_003 + first) % 2**63

    def initial_state(self, embedding: Embedding, first: int) -> Tensor:
        """Squared lengths of the gradient embeddings, [n]."""
        return _residual(embedding).square().sum(0) * embedding.hidden.square().sum(0)

    def update_state(self, state: Tensor, embedding: Embedding, update: Embedding, step: int) -> None:
        """The pick, ``update``, is a center from now on; before the first there was no distance."""
        ours, theirs = _residual(embedding), _residual(update)
        # |a (x) h - b (x) k|^2 with a = b + (a - b): no difference of large squares.
        change, way = ours - theirs, embedding.hidden - update.hidden
        length = theirs.square().sum(0) * way.square().sum(0)
        length += change.square().sum(0) * embedding.hidden.square().sum(0)
        across = (theirs * change).sum(0) * (way * embedding.hidden).sum(0)
        distance = (length + 2 * across).clamp_min(0)
        if step == 1:
            state.copy_(distance)
        else:
            _nearer(state, distance)

    def gains(self, state: Tensor, step: int, first: int) -> Tensor:
        """Length at first, then log distance with noise. Images that equal a center come last, by position."""
        if step == 0:
            return state
        generator = torch.Generator().manual_seed(self.noise_seed(step, first))
        uniform = torch.rand(len(state), generator=generator, dtype=torch.float64).clamp_min(1e-300).to(state.device)
        noise = -torch.log(-torch.log(uniform))
        return (state.double().log() + noise).clamp_min(-1e300)


def _residual(embedding: Embedding) -> Tensor:
    """p - e_y with y the most probable class, [C, n]: the loss's gradient by the logits under the predicted label."""
    p = embedding.probabilities
    return p - torch.zeros_like(p).scatter_(0, p.argmax(0, keepdim=True), 1.0)


def _nearer(state: Tensor, distance: Tensor) -> None:
    torch.minimum(state, distance, out=state)
