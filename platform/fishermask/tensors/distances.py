"""Scores by distance to the images chosen so far: k-center (Sener, Savarese 2018) and BADGE (Ash et al. 2020).

Both store the squared distance of each image to its nearest center, and update it for each new center. The gradient
embedding of BADGE is the outer product of p - one_hot(y) and h, where y is the most probable class. It is stored as
these two factors, never as [n, C E].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishermask.tensors.embedding import Embedding


@dataclass(frozen=True)
class KCenterScorer:
    """Squared distance between inputs of the last layer: of each image to the nearest labeled or picked image.

    Attributes:
        centers: inputs of the last layer for the labeled images, [E, n_L].
    """

    centers: Tensor

    def initial_state(self, embedding: Embedding, first_position: int) -> Tensor:
        """Return the squared distance to the nearest labeled image, [n]; infinity if no image is labeled."""
        state = embedding.hidden.new_full((embedding.hidden.shape[1],), torch.inf)
        for center in self.centers.unbind(1):
            _keep_nearest(state, (embedding.hidden - center[:, None]).square().sum(0))
        return state

    def update_state(self, state: Tensor, embedding: Embedding, update: Embedding, step: int) -> None:
        """Add the pick, ``update``, to the centers."""
        # The square is not expanded, because rounding could then give a negative distance.
        _keep_nearest(state, (embedding.hidden - update.hidden).square().sum(0))

    def gains(self, state: Tensor, step: int, first_position: int) -> Tensor:
        """Return the distances as gains, [n]. Without a center, all gains are equal."""
        return state.clamp_max(torch.finfo(state.dtype).max)


@dataclass(frozen=True)
class BadgeScorer:
    """k-means++ seeding on gradient embeddings.

    The first pick has the longest embedding. Each later pick is drawn with probability proportional to its squared
    distance d: it is the argmax of log d plus independent Gumbel noise. The noise depends on the step and on the pool
    position only, so the draw does not depend on the number of shards.
    """

    seed: int

    def noise_seed(self, step: int, first_position: int) -> int:
        """Return the seed of the noise of one step, for images that begin at pool position ``first_position``."""
        return ((self.seed * 1_000_003 + step) * 1_000_003 + first_position) % 2**63

    def initial_state(self, embedding: Embedding, first_position: int) -> Tensor:
        """Return the squared lengths of the gradient embeddings, [n]."""
        return _residual(embedding).square().sum(0) * embedding.hidden.square().sum(0)

    def update_state(self, state: Tensor, embedding: Embedding, update: Embedding, step: int) -> None:
        """Add the pick, ``update``, to the centers. Step 1 replaces the squared lengths with squared distances."""
        center = _residual(update)
        # For residuals u, u' and inputs h, h' of an image and the center, the difference of the outer products u (x) h
        # and u' (x) h' is u' (x) (h - h') + (u - u') (x) h. Its square subtracts no large numbers.
        residual_change, hidden_change = _residual(embedding) - center, embedding.hidden - update.hidden
        squares = center.square().sum(0) * hidden_change.square().sum(0)
        squares += residual_change.square().sum(0) * embedding.hidden.square().sum(0)
        cross = (center * residual_change).sum(0) * (hidden_change * embedding.hidden).sum(0)
        distance = (squares + 2 * cross).clamp_min(0)
        if step == 1:
            state.copy_(distance)
        else:
            _keep_nearest(state, distance)

    def gains(self, state: Tensor, step: int, first_position: int) -> Tensor:
        """Return the squared lengths at step 0, else log squared distances plus noise; low if equal to a center."""
        if step == 0:
            return state
        generator = torch.Generator().manual_seed(self.noise_seed(step, first_position))
        uniform = torch.rand(len(state), generator=generator, dtype=torch.float64).clamp_min(1e-300).to(state.device)
        noise = -torch.log(-torch.log(uniform))
        return (state.double().log() + noise).clamp_min(-1e300)


def _residual(embedding: Embedding) -> Tensor:
    """Return p - one_hot(y), [C, n]: the gradient of the loss for label y with respect to the logits."""
    p = embedding.probabilities
    return p - torch.zeros_like(p).scatter_(0, p.argmax(0, keepdim=True), 1.0)


def _keep_nearest(state: Tensor, distance: Tensor) -> None:
    """Replace each distance in ``state`` with the smaller of it and ``distance``, in place."""
    torch.minimum(state, distance, out=state)
