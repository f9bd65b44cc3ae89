"""Batch that best covers the pool's Fisher information on the few parameters that matter (arXiv 2411.05752)."""

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.planning.workload import Workload, embedding_workload
from fishermask.pool.pool import Pool
from fishermask.pool.selection import TraceOptions, minimize_trace
from fishermask.tensors import mask as masks
from fishermask.tensors.gradient_plan import plan_gradients, warn_about_slow_parameters
from fishermask.tensors.mask import Mask

RANKED = {"global": masks.global_mask, "layerwise": masks.layerwise_mask, "relative": masks.relative_mask}


PRESETS: dict[str, dict[str, Any]] = {"fishermask-released": {"class_weighting": "none", "fisher_sample": "first"}}


class Params(Config):
    preset: Literal["fishermask-released"] | None = None
    """Options switched on together, where they are not given: the choices of the paper's released code."""
    fraction: float = Field(0.01, gt=0, le=1)
    """Masked share of all parameters: the whole last layer, and the rest as ``mask`` says."""
    mask: Literal["global", "layerwise", "relative", "random", "last_layer"] = "global"
    """The largest Fisher information of all layers together, of each layer, or relative to the layer's mean (above
    twice it); at random; or none outside the last layer, which is BAIT."""
    fisher_samples: int = Field(1024, ge=1)
    """Pool images that the Fisher information of each parameter is averaged over ..."""
    fisher_sample: Literal["random", "first"] = "random"
    """... drawn at random, or the first of the pool."""
    damping: float = Field(1.0, gt=0)
    """lambda: how much identity is added to the labeled images' information."""
    initial_information: bool = True
    """Whether the labeled images' information counts."""
    class_weighting: Literal["sqrt", "none"] = "sqrt"
    """With sqrt an image's embedding gives its Fisher information; the released code leaves it out."""
    top_classes: int | None = Field(None, ge=2)
    """An approximation, for many classes: only an image's most probable classes count, as if others were impossible."""
    batch_weighting: Literal["bait", "per_sample"] = "bait"
    """A candidate counts as much as the whole batch, as BAIT's code has it, or as much as a labeled image."""
    target: Literal["pool", "identity"] = "pool"
    """What is covered: the pool's information, or every direction alike."""
    oversample: float = Field(1.0, ge=1)
    """Choose this many times the budget, then take back what is missed least."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: dict[str, Any]) -> dict[str, Any]:
        preset = given.get("preset")
        return (PRESETS.get(preset, {}) if isinstance(preset, str) else {}) | given


def check(params: Params, model: nn.Module, images: Tensor) -> Workload:
    """The mask must hold the last layer."""
    plan = plan_gradients(model, images)
    warn_about_slow_parameters(plan.slow)
    body_size = masks.mask_size(model, plan, params.fraction) - masks.head_size(model, plan)
    if params.mask == "last_layer":
        body_size = masks.last_layer_mask(plan).body_size
    fisher_samples = params.fisher_samples if params.mask in RANKED and body_size else 0
    return embedding_workload(
        model,
        images,
        plan,
        body_size,
        fisher_samples=fisher_samples,
        top_classes=params.top_classes,
        oversample=params.oversample,
        weighting=params.class_weighting,
    )


def query(pool: Pool, budget: int, params: Params) -> Tensor:
    """Positions of ``budget`` candidates that greedily minimize the trace of the inverse information."""
    fields = TraceOptions.__dataclass_fields__
    options = TraceOptions(**{key: value for key, value in params.model_dump().items() if key in fields})
    return minimize_trace(pool, choose_mask(pool, params), budget, options)


def choose_mask(pool: Pool, params: Params) -> Mask:
    """The mask that ``params`` ask for."""
    plan = pool.plan_gradients()
    body_size = masks.mask_size(pool.model, plan, params.fraction) - masks.head_size(pool.model, plan)
    if params.mask == "last_layer":
        return masks.last_layer_mask(plan)
    if not body_size:
        return Mask(plan, {})
    if params.mask == "random":
        body = masks.body_parameters(pool.model, plan)
        return masks.random_mask(body, plan, body_size, pool.generator)
    diagonal = pool.fisher_diagonal(plan, params.fisher_samples, params.fisher_sample)
    return RANKED[params.mask](diagonal, plan, body_size)
