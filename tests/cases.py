"""Small models for all gradient tests, in float64, with images for them."""

import functools

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import MobileNetV3
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from fishermask.learning import models


def _settle(model: nn.Module, like: Tensor) -> nn.Module:
    """Return the model in float64 and eval mode, with statistics and parameters away from special initial values."""
    generator = torch.Generator().manual_seed(7)
    model = model.double().requires_grad_(False).train()
    for parameter in model.parameters():
        size = max(0.05, float(0.3 * parameter.std())) if parameter.numel() > 1 else 0.05
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for _ in range(20):  # otherwise rectified units may be zero, and with them all gradients
        model(like)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=generator)
            module.running_var *= 0.5 + torch.rand(module.running_var.shape, generator=generator)
    return model.eval().requires_grad_()


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


def _norms() -> nn.Module:
    """Group norm, layer norm, one-dimensional batch norm, grouped and depthwise convolutions, every kind of padding."""
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding="same", padding_mode="reflect"), nn.GroupNorm(2, 4), nn.GELU()),
        *(nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular"), nn.LayerNorm([4, 8, 8]), nn.SiLU()),
        *(nn.Conv2d(4, 6, (3, 1), stride=2, groups=2, padding="valid", bias=False), nn.Hardswish(inplace=True)),
        *(nn.Conv2d(6, 4, 2, padding_mode="replicate", padding=1, dilation=(1, 2)), nn.Flatten()),
        *(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.LayerNorm(5, elementwise_affine=True), nn.Linear(5, 3)),
    )


class _Small(nn.Module):
    """Two 8 -> 8 layers and a last layer on the mean of the rows, in structures that no rule covers."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.first, self.inner, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 3)
        if kind == "tied":
            self.second = nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight
        if kind == "raw":
            self.scale = nn.Parameter(torch.ones(8))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.inner(self.first(images[:, 0].mean(1)).tanh()).tanh()
        if self.kind == "twice":
            hidden = self.inner(hidden).tanh()
        if self.kind == "tied":
            hidden = self.second(hidden).tanh()
        if self.kind == "raw":
            hidden = hidden * self.scale
        return self.head(hidden)


def _mobilenet() -> nn.Module:
    config = functools.partial(InvertedResidualConfig, width_mult=1.0, dilation=1)
    settings = [config(8, 3, 16, 8, True, "RE", 2), config(8, 5, 24, 16, False, "HS", 1)]
    return MobileNetV3(settings, last_channel=12, num_classes=3)


def _convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=3)


def _vgg() -> nn.Module:
    features = torchvision.models.vgg.make_layers([4, "M", 8, "M"], batch_norm=True)
    network = torchvision.models.VGG(features, num_classes=3)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Sequential(nn.Linear(8, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 3))
    return network


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 12, num_classes=3)


MODELS = {
    "mlp": lambda: models.mlp(1, 8, 4, width=6, depth=2),
    "small_cnn": lambda: models.small_cnn(1, 8, 3, width=2),
    "thin_resnet18": lambda: models.thin_resnet18(1, 8, 3),
    "convolutions": _convolutions,
    "tokens": _tokens,
    "norms": _norms,
    # torchvision's networks, all but resnet18 made smaller.
    "resnet18": lambda: torchvision.models.resnet18(num_classes=2),
    "vgg11_bn": _vgg,
    "mobilenet_v3_small": _mobilenet,
    "convnext_tiny": _convnext,
    "vit_b_16": _vit,
    # Models with parameters that are differentiated image by image.
    "twice": lambda: _Small("twice"),
    "tied": lambda: _Small("tied"),
    "raw": lambda: _Small("raw"),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
}
NAMES = list(MODELS)
CHANNELS = {"convolutions": 2, "resnet18": 3, "vgg11_bn": 3, "mobilenet_v3_small": 3, "convnext_tiny": 3, "vit_b_16": 3}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    created = MODELS[name]()
    if any(isinstance(module, nn.LazyLinear) for module in created.modules()):
        created(torch.zeros(2, CHANNELS.get(name, 1), 8, 8))
    return _settle(created, images(name, 32))


def images(name: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, CHANNELS.get(name, 1), 8, 8, generator=generator, dtype=torch.float64)
