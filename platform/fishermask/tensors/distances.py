"""Scores by distance to the images chosen so far: k-center (Sener, Savarese 2018) and BADGE (Ash et al. 2020).

Both store the squared distance of each image to its nearest center, and update it for each new center. The gradient
embedding of BADGE, ``(p - e_y) (x) h`` with y the predicted class, is stored as its two factors, never as [n, C E].
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
        """Return the squared distance to the nearest labeled image, [n]; infinite if none is labeled."""
        state = embedding.hidden.new_full((embedding.hidden.shape[1],), torch.inf)
        for center in self.centers.unbind(1):
            _keep_nearest(state, (embedding.hidden - center[:, None]).square().sum(0))
        return state

    def update_state(self, state: Tensor, embedding: Embedding, update: Embedding, step: int) -> None:
        """Add the pick, ``update``, to the centers."""
        # From differences: expanding the square could give a negative distance by rounding.
        _keep_nearest(state, (embedding.hidden - update.hidden).square().sum(0))

    def gains(self, state: Tensor, step: int, first: int) -> Tensor:
        """Return the distances. Without any center all are equal, and the first image is picked."""
        return state.clamp_max(torch.finfo(state.dtype).max)


@dataclass(frozen=True)
class BadgeScorer:
    """k-means++ seeding on gradient embeddings: first the longest, then draws in proportion to the squared distance.

    ``argmax(log d + g)`` with independent Gumbel noise g draws in proportion to d. The noise belongs to the step and to
    pool positions, so the draw does not depend on the number of shards.
    """

    seed: int

    def noise_seed(self, step: int, first: int) -> int:
        """Return the seed of the noise of one step, for the images from pool position ``first``."""
        return ((self.seed * 1_000_003 + step) * 1_000_003 + first) % 2**63

    def initial_state(self, embedding: Embedding, first: int) -> Tensor:
        """Return the squared lengths of the gradient embeddings, [n]."""
        return _residual(embedding).square().sum(0) * embedding.hidden.square().sum(0)

    def update_state(self, state: Tensor, embedding: Embedding, update: Embedding, step: int) -> None:
        """Add the pick, ``update``, to the centers. At step 1 it replaces the lengths by distances."""
        center = _residual(update)
        # |u (x) h - v (x) w|^2 = |v (x) (h - w) + (u - v) (x) h|^2, which subtracts no large squares.
        residual_change, hidden_change = _residual(embedding) - center, embedding.hidden - update.hidden
        squares = center.square().sum(0) * hidden_change.square().sum(0)
        squares += residual_change.square().sum(0) * embedding.hidden.square().sum(0)
        cross = (center * residual_change).sum(0) * (hidden_change * embedding.hidden).sum(0)
        distance = (squares + 2 * cross).clamp_min(0)
        if step == 1:
            state.copy_(distance)
        else:
            _keep_nearest(state, distance)

    def gains(self, state: Tensor, step: int, first: int) -> Tensor:
        """Return the lengths, or after a pick log distances with noise. Images equal to a center come last."""
        if step == 0:
            return state
        generator = torch.Generator().manual_seed(self.noise_seed(step, first))
        uniform = torch.rand(len(state), generator=generator, dtype=torch.float64).clamp_min(1e-300).to(state.device)
        noise = -torch.log(-torch.log(uniform))
        return (state.double().log() + noise).clamp_min(-1e300)


def _residual(embedding: Embedding) -> Tensor:
    """Return p - e_y with y the most probable class, [C, n]: gradient of the loss by the logits for the label y."""
    p = embedding.probabilities
    return p - torch.zeros_like(p).scatter_(0, p.argmax(0, keepdim=True), 1.0)


def _keep_nearest(state: Tensor, distance: Tensor) -> None:
    """Replace each distance in ``state`` by a smaller one."""
    torch.minimum(state, distance, out=state)
