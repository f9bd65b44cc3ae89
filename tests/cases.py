"""Small models that every gradient test runs through, in float64, with images that fit them."""

import torch
from torch import Tensor, nn

from fishermask.tensors import models


def _settle(model: nn.Module) -> nn.Module:
    """float64, eval mode, batch-norm statistics and all parameters away from their special initial values."""
    generator = torch.Generator().manual_seed(7)
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += torch.rand(module.running_mean.shape, generator=generator)
            module.running_var *= 0.5 + torch.rand(module.running_var.shape, generator=generator)
    return model


def _convolutions() -> nn.Module:
    """Stride, padding, dilation and rectangular kernels; activations that overwrite their input."""
    return nn.Sequential(
        *(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), nn.ReLU(inplace=True)),
        *(nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    )


def _tokens() -> nn.Module:
    """Linear layers on sequences: each row of pixels is a token."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = nn.Linear(8, 5), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(images[:, 0]).relu()).tanh().mean(1))

    return Tokens()


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = {
        "mlp": lambda: models.mlp(1, 8, 4, width=6, depth=2),
        "small_cnn": lambda: models.small_cnn(1, 8, 3, width=2),
        "thin_resnet18": lambda: models.thin_resnet18(1, 8, 3),
        "convolutions": _convolutions,
        "tokens": _tokens,
    }[name]()
    if name == "convolutions":
        made(torch.zeros(2, 2, 8, 8))
    return _settle(made)


NAMES = ["mlp", "small_cnn", "thin_resnet18", "convolutions", "tokens"]


def images(name: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 2 if name == "convolutions" else 1, 8, 8, generator=generator, dtype=torch.float64)
