"""Time to verify the gradients of a model, compared with a training step of 64 images.

python benchmarks/verification.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from table import machine, seconds, show
from torch import nn

from fishermask.learning import models
from fishermask.tensors.gradient_plan import VERIFICATION_SIZES, plan_gradients

STEP = 64
CASES: list[tuple[str, Callable[[], nn.Module], tuple[int, int, int]]] = [
    ("small_cnn", lambda: models.build("small_cnn", {}, (1, 28, 28), 10, seed=0), (1, 28, 28)),
    ("thin_resnet18", lambda: models.build("thin_resnet18", {}, (3, 32, 32), 10, seed=0), (3, 32, 32)),
    ("torchvision resnet18", lambda: torchvision.models.resnet18(num_classes=10), (3, 32, 32)),
    ("torchvision resnet18", lambda: torchvision.models.resnet18(num_classes=10), (3, 224, 224)),
]


def main() -> None:
    rows: list[list[object]] = []
    for name, make, shape in CASES:
        torch.manual_seed(0)
        model, images = make(), torch.randn(STEP, *shape)

        def step(model: nn.Module = model, images: torch.Tensor = images) -> None:
            F.cross_entropy(model(images), torch.zeros(STEP, dtype=torch.long)).backward()

        verified = seconds(lambda m=model, i=images: plan_gradients(m, i[: sum(VERIFICATION_SIZES)]), repeats=3)
        trained = seconds(step, repeats=3)
        cells = [name, "x".join(map(str, shape[1:])), f"{sum(p.numel() for p in model.parameters()):,}"]
        rows.append([*cells, verified, trained, verified / trained])
    header = ["model", "image", "parameters", "verification s", f"training step of {STEP} s", "ratio"]
    show(f"Verification of gradients. {machine()}", header, rows)


if __name__ == "__main__":
    main()
