"""Choose the batch that best covers the pool's Fisher information on selected parameters (arXiv 2411.05752)."""

from dataclasses import fields
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from fishermask.config import Config
from fishermask.errors import InputError
from fishermask.planning.workload import Workload
from fishermask.pool.pool import Pool
from fishermask.pool.selection import TraceOptions, minimize_trace
from fishermask.tensors import mask as masks
from fishermask.tensors.gradient_plan import GradientPlan, plan_gradients, warn_about_slow_parameters
from fishermask.tensors.mask import Mask

RANKED = {"global": masks.global_mask, "layerwise": masks.layerwise_mask, "relative": masks.relative_mask}
PRESETS: dict[str, dict[str, Any]] = {"fishermask-released": {"class_weighting": "none", "fisher_sample": "first"}}


class Params(Config):
    preset: Literal["fishermask-released"] | None = None
    """``fishermask-released``: use the options of the paper's released code as defaults, class_weighting: none and
    fisher_sample: first."""
    num_body_parameters: int | None = Field(1024, ge=0)
    """Number of masked parameters outside the last layer. 0: mask the last layer only. If the model has fewer, all are
    masked."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Masked share of all trained parameters, last layer included: the setting of the paper, instead of
    ``num_body_parameters``."""
    mask: Literal["global", "layerwise", "relative", "random", "last_layer"] = "global"
    """Which parameters outside the last layer are masked. ``global``: those with the largest Fisher information.
    ``layerwise``: the same share of each layer. ``relative``: those with the largest ratio to the mean of their layer,
    if the ratio is above 2. ``random``: random parameters. ``last_layer``: none, as in BAIT."""
    fisher_samples: int = Field(1024, ge=1)
    """Number of pool images over which the Fisher information of each parameter is averaged."""
    fisher_sample: Literal["random", "first"] = "random"
    """Which images of the pool ``fisher_samples`` counts. ``random``: random images. ``first``: the first images."""
    damping: float = Field(1.0, gt=0)
    """Factor of the identity matrix that is added to the information of the labeled images (lambda in the paper)."""
    initial_information: bool = True
    """Whether the objective includes the information of the labeled images."""
    class_weighting: Literal["sqrt", "none"] = "sqrt"
    """Weight of each class in an embedding. ``sqrt``: the square root of its probability, which gives the Fisher
    information. ``none``: the same for all classes, as in the paper's released code."""
    top_classes: int | None = Field(None, ge=2)
    """Approximation for many classes: use only this number of most probable classes of each image, renormalized."""
    batch_weighting: Literal["bait", "per_sample"] = "bait"
    """Weight of a picked image. ``bait``: the batch size, as in BAIT. ``per_sample``: 1, like a labeled image."""
    target: Literal["pool", "identity"] = "pool"
    """Information that the batch covers. ``pool``: that of the pool. ``identity``: the same in all directions."""
    oversample: float = Field(1.0, ge=1)
    """Pick this many times the budget, then prune the picks that contribute least."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: dict[str, Any]) -> dict[str, Any]:
        preset = values.get("preset")
        return (PRESETS.get(preset, {}) if isinstance(preset, str) else {}) | values

    @model_validator(mode="before")
    @classmethod
    def _choose_size(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("fraction") is None:
            return values
        if values.get("num_body_parameters") is not None:
            raise ValueError("fraction and num_body_parameters both set the size of the mask; remove one of them")
        return values | {"num_body_parameters": None}

    @model_validator(mode="after")
    def _require_size(self) -> "Params":
        if self.num_body_parameters is None and self.fraction is None and self.mask != "last_layer":
            raise ValueError("the size of the mask is not set; set num_body_parameters or fraction")
        return self


def check(params: Params, model: nn.Module, images: Tensor) -> Workload:
    """Require a mask that is not empty and holds the last layer; return the workload of a query."""
    plan = plan_gradients(model, images)
    warn_about_slow_parameters(plan.slow)
    body_size = choose_body_size(params, model, plan)
    return Workload(
        plan,
        body_size,
        fisher_samples=params.fisher_samples if params.mask in RANKED and body_size else 0,
        top_classes=params.top_classes,
        oversample=params.oversample,
        weighting=params.class_weighting,
        fraction=params.fraction,
    )


def query(pool: Pool, budget: int, params: Params) -> Tensor:
    """Return the positions of ``budget`` candidates that greedily minimize the trace of the inverse information."""
    names = {field.name for field in fields(TraceOptions)}
    options = TraceOptions(**{name: value for name, value in params.model_dump().items() if name in names})
    return minimize_trace(pool, choose_mask(pool, params), budget, options)


def choose_body_size(params: Params, model: nn.Module, plan: GradientPlan) -> int:
    """Return the number of masked parameters outside the last layer.

    Raises:
        InputError: the mask would be empty, or ``fraction`` is too small to hold the last layer.
    """
    if params.mask == "last_layer":
        return masks.last_layer_mask(plan).body_size
    if params.fraction is not None:
        return masks.mask_size(model, plan, params.fraction) - masks.head_size(model, plan)
    assert params.num_body_parameters is not None
    if not params.num_body_parameters and plan.head is None:
        raise InputError("num_body_parameters: 0 leaves no parameter, because the model has no linear last layer")
    available = sum(parameter.numel() for parameter in masks.body_parameters(model, plan).values())
    return min(params.num_body_parameters, available)


def choose_mask(pool: Pool, params: Params) -> Mask:
    """Return the mask for the model of ``pool``."""
    plan = pool.plan_gradients()
    body_size = choose_body_size(params, pool.model, plan)
    if not body_size:
        return Mask(plan, {})
    if params.mask == "random":
        return masks.random_mask(masks.body_parameters(pool.model, plan), plan, body_size, pool.generator)
    diagonal = pool.fisher_diagonal(plan, params.fisher_samples, params.fisher_sample)
    return RANKED[params.mask](diagonal, plan, body_size)
