"""Choose the batch that best covers the Fisher information of the pool on the last layer (BAIT, Ash et al. 2021)."""

from pydantic import Field
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.planning.workload import Workload
from fishermask.pool.pool import Pool
from fishermask.pool.selection import TraceOptions, minimize_trace
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.mask import last_layer_mask


class Params(Config):
    damping: float = Field(1.0, gt=0)
    """Factor of the identity matrix that is added to the information of the labeled images (lambda in the paper)."""
    oversample: float = Field(1.0, ge=1)
    """Pick this many times the budget, then prune the picks that contribute least. BAIT's paper uses 1, its code 2."""
    top_classes: int | None = Field(None, ge=2)
    """Approximation for many classes: use only this number of most probable classes of each image, renormalized."""


def check(params: Params, model: nn.Module, images: Tensor) -> Workload:
    """Require a model that ends in a linear layer; return the workload of a query."""
    mask = last_layer_mask(plan_gradients(model, images))
    return Workload(mask.plan, top_classes=params.top_classes, oversample=params.oversample)


def query(pool: Pool, budget: int, params: Params) -> Tensor:
    """Return the positions of ``budget`` candidates that greedily minimize the trace of the inverse information."""
    return minimize_trace(pool, last_layer_mask(pool.plan_gradients()), budget, TraceOptions(**params.model_dump()))
