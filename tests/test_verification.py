"""Unusual models have the gradients of plain autograd, or are refused."""

import types
import warnings

import pytest
import reference
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from test_fisher import flat_mask
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fishermask.errors import InputError
from fishermask.planning.workload import LiveBytes
from fishermask.tensors.embedding import embed
from fishermask.tensors.gradient_plan import GradientPlan, plan_gradients
from fishermask.tensors.mask import (
    Mask,
    body_parameters,
    fisher_diagonal,
    global_mask,
    head_size,
    last_layer_mask,
    mask_size,
    random_mask,
)
from fishermask.tensors.slow_gradients import copy_model


class Net(nn.Module):
    """Two hidden layers and a head on the rows' mean of images [n, 1, 8, 8]; ``change`` makes it what it is called."""

    def __init__(self, change=None, forward=None):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.body = forward or (lambda net, h: net.b(net.a(h).tanh()).tanh())
        if change is not None:
            change(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self, images[:, 0].mean(1)))


def _shift(module, factor):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * factor + self.weight.mean()

    return types.MethodType(forward, module)


def _prune(net):
    nn.utils.prune.random_unstructured(net.a, "weight", amount=0.3)


class Scaled(nn.Linear):
    """A linear layer with a scale, by way of its weight: its ``forward`` is that of ``nn.Linear``."""

    def __init__(self, width, outputs):
        super().__init__(width, outputs)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_forward_pre_hook(lambda m, args: (args[0] * m.scale,))


class SequenceFirst(nn.Module):
    """Tokens first: the layers see [T, n, width]."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.a, self.head = tokens, nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        steps = images[:, 0, : self.tokens].transpose(0, 1)
        return self.head(self.a(steps).tanh().mean(0))


class Cached(nn.Module):
    """Caches a function of a parameter in eval mode, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(8, 5), nn.Linear(5, 3)
        self.biases, self.cache = nn.Parameter(torch.randn(4)), {}

    def train(self, mode=True):
        self.cache = {} if mode else self.cache
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training and "biases" not in self.cache:
            self.cache["biases"] = self.biases[[0, 1, 2, 3, 0]].exp()
        biases = self.biases[[0, 1, 2, 3, 0]].exp() if self.training else self.cache["biases"]
        return self.head((self.a(images[:, 0].mean(1)) + biases).tanh())


class Experts(nn.Module):
    """Each image goes to one of two layers, chosen by the argmax of a third."""

    def __init__(self):
        super().__init__()
        self.route, self.experts = nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0].mean(1)
        weights = self.route(rows).softmax(-1)
        chosen, out = weights.argmax(-1), rows.new_zeros(len(rows), 5)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(rows[chosen == i]) * weights[chosen == i, i : i + 1]
        return self.head(out.tanh())


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(8, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.cell(images[:, 0])[0].mean(1))


def _transposed_norm():
    """Return a model in which batch norm gets a transposed gradient, which PyTorch handles wrongly for one image."""
    return nn.Sequential(
        # No linear layer after the transpose: its gradient would be contiguous, and right.
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), _Transpose(), nn.Tanh()),
        *(nn.Flatten(), nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3)),
    )


class _Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def _without_gradients(net, h):
    with torch.no_grad():
        h = net.a(h).tanh()
    return net.b(h).tanh()


def _unneeded(net, h):
    net.b(net.a(h))
    return net.b(net.a(h).tanh()).tanh() * 0 + h[:, :5]


def _hooked(net):
    net.a.register_forward_pre_hook(lambda _m, args: (args[0] * args[0].norm(dim=1, keepdim=True),))
    net.b.register_forward_hook(lambda m, _args, output: output * m.weight.norm())


MODELS = {
    "weight read elsewhere": lambda: Net(forward=lambda net, h: net.b(F.linear(net.a(h), net.a.weight.t()[:6]).tanh())),
    "head read elsewhere": lambda: Net(forward=lambda net, h: net.b(net.a(h).tanh()) * net.head.weight.norm()),
    "own forward": lambda: Net(lambda net: setattr(net.a, "forward", _shift(net.a, 2.0))),
    "hooks": lambda: Net(_hooked),
    "weight norm by hook": lambda: Net(lambda net: torch.nn.utils.weight_norm(net.a)),
    "spectral norm by hook": lambda: Net(lambda net: torch.nn.utils.spectral_norm(net.a)),
    "weight norm": lambda: Net(lambda net: nn.utils.parametrizations.weight_norm(net.a)),
    "spectral norm": lambda: Net(lambda net: nn.utils.parametrizations.spectral_norm(net.a)),
    "head with weight norm": lambda: Net(lambda net: nn.utils.parametrizations.weight_norm(net.head)),
    "pruned": lambda: Net(_prune),
    "scaled": lambda: Net(lambda net: setattr(net, "a", Scaled(8, 6))),
    "2 tokens first": lambda: SequenceFirst(2),
    "5 tokens first": lambda: SequenceFirst(5),
    "cached": Cached,
    "scalar": lambda: Net(
        lambda net: net.register_parameter("gain", nn.Parameter(torch.tensor(1.5))),
        lambda net, h: net.b(net.a(h).tanh()) * net.gain,
    ),
    "no_grad": lambda: Net(forward=_without_gradients),
    "detached": lambda: Net(forward=lambda net, h: net.b(net.a(h).tanh().detach()).tanh()),
    "all but the head detached": lambda: Net(forward=lambda net, h: net.b(net.a(h)).tanh().detach()),
    "unneeded": lambda: Net(forward=_unneeded),
    "not called": lambda: Net(forward=lambda net, h: net.a(h).tanh()[:, :5]),
    "experts": Experts,
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM),
    "checkpointed": lambda: Net(
        forward=lambda net, h: checkpoint(lambda x: net.b(net.a(x).tanh()).tanh(), h, use_reentrant=False)
    ),
    "head alone": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    "batch norm, transposed": _transposed_norm,
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)),
}  # fmt: skip


def _sorted(net, h):
    order = (h @ torch.linspace(-1, 1, 8).to(h)).argsort()
    return net.b(net.a(h[order]).tanh())[order.argsort()].tanh()


def _own_tie(net):
    net.again, net.c = net.a, nn.Linear(8, 6)
    net.c.weight = net.a.weight


MODELS |= {
    "logits changed in place": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3), nn.LeakyReLU(0.3, inplace=True)
    ),
    "sorted": lambda: Net(forward=_sorted),
    "tied and under two names": lambda: Net(_own_tie, lambda net, h: net.b(net.again(h).tanh() + net.c(h)).tanh()),
}
NO_GRADIENT = {"no_grad", "detached", "all but the head detached", "unneeded", "not called"}


def model(name):
    torch.manual_seed(0)
    created = MODELS[name]()
    created(torch.randn(2, 1, 8, 8))
    return created.double().eval()


def images(count):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize("name", MODELS)
def test_unusual_models_have_the_gradients_of_autograd(name, count):
    original, batch = model(name), images(count)
    plan = plan_gradients(original, images(7))
    net = copy_model(original)  # as shards use it
    rows = reference.autograd_rows(net, batch)
    body = body_parameters(net, plan)
    outside = torch.ones(rows.shape[2], dtype=torch.bool)
    if plan.head is not None:
        outside[reference.head_entries(net, plan.head)] = False
    diagonal = torch.cat(list(fisher_diagonal(net, batch, plan).values()) or [torch.zeros(0).double()])
    expected = rows.square().sum((0, 1))[outside]
    torch.testing.assert_close(diagonal, expected, rtol=1e-9, atol=1e-14)
    assert name in NO_GRADIENT or not len(expected) or (expected > 0).double().mean() > 0.25
    full = Mask(plan, {name: torch.arange(p.numel()) for name, p in body.items()})
    sparse = random_mask(body, plan, min(20, len(expected)), torch.Generator().manual_seed(1))
    for mask in (full, sparse):
        columns = rows[:, :, flat_mask(net, mask)]
        reference.assert_same_information(reference.every_column(embed(net, batch, mask)), columns)


@pytest.mark.parametrize("name", ["checkpointed", "experts", "gru", "cached", "5 tokens first"])
def test_unusual_models_in_float32_have_the_gradients_of_autograd(name):
    net, batch = model(name).float(), images(6).float()
    plan = plan_gradients(net, batch)
    rows = reference.autograd_rows(model(name), images(6))
    diagonal = torch.cat(list(fisher_diagonal(net, batch, plan).values()))
    outside = torch.ones(rows.shape[2], dtype=torch.bool)
    if plan.head is not None:
        outside[reference.head_entries(net, plan.head)] = False
    expected = rows.square().sum((0, 1))[outside]
    torch.testing.assert_close(diagonal.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


def test_layer_that_gets_some_of_the_images_is_handled_for_each_batch():
    """All verified images go to first_expert expert, later images to both, so the verification does not cover them."""
    net, batch = model("experts"), images(40)
    with torch.no_grad():
        chosen = net.route(batch[:, 0].mean(1)).argmax(-1)
    first_expert, second_expert = batch[chosen == 0], batch[chosen == 1]
    assert len(first_expert) >= 7
    assert len(second_expert) >= 2
    plan = GradientPlan("head", ("experts.0", "experts.1"), ("route.weight", "route.bias"), vectorized=False)
    for images_ in (first_expert[:3], torch.cat([first_expert[:2], second_expert[:2]])):
        rows = reference.autograd_rows(net, images_)
        body = body_parameters(net, plan)
        full = Mask(plan, {name: torch.arange(p.numel()) for name, p in body.items()})
        columns = rows[:, :, flat_mask(net, full)]
        reference.assert_same_information(reference.every_column(embed(net, images_, full)), columns)


def _batch_statistics(net, h):
    return net.b(F.batch_norm(net.a(h), None, None, training=True)).tanh()


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, h: net.b((h := net.a(h)) - h.mean(0)).tanh(),
        lambda net, h: net.b(net.a(h)).tanh() / len(h),
        lambda net, h: net.b(net.a(h)).tanh() + net.b(net.a(h)).roll(1, 0),
        lambda net, h: net.b(net.a(h)).softmax(0),
        _batch_statistics,
    ],
    ids=["mean", "length", "roll", "softmax over the batch", "batch statistics"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_that_mix_the_images_of_a_batch_are_refused(forward, dtype):
    with pytest.raises(InputError, match="^model: Net mixes the images of a batch: .*"):
        plan_gradients(Net(forward=forward).to(dtype), images(2).to(dtype))


def test_models_that_mix_images_are_refused_on_equal_images():
    with pytest.raises(InputError, match="mixes the images"):
        plan_gradients(Net(forward=lambda net, h: net.b((h := net.a(h)) - h.mean(0)).tanh()), torch.zeros(2, 1, 8, 8))


def test_models_that_are_random_in_eval_mode_are_refused():
    net = Net(forward=lambda net, h: net.b(F.dropout(net.a(h).tanh())))
    with pytest.raises(InputError, match="^model: Net is random in eval mode: .* self.training$"):
        plan_gradients(net, images(2).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits.long(), "must return floating-point logits, got torch.int64"),
        (lambda logits: logits / 0, "returns logits that are not finite in eval mode"),
        (lambda logits: logits[:-1], "must return logits \\[2, C\\], a row per image"),
        (lambda logits: logits[:, :1], "returns 1 logit; a binary classifier needs 2"),
        (lambda logits: (logits,), "must return logits \\[2, C\\], a row per image"),
    ],
)
def test_models_without_logits_are_refused(change, message):
    net = Net()
    net.register_forward_hook(lambda _m, _args, output: change(output))
    with pytest.raises(InputError, match=f"^model: Net {message}"):
        plan_gradients(net, images(2).float())


class NoGradient(Net):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class Detached(Net):
    def forward(self, images):
        return super().forward(images).detach()


@pytest.mark.parametrize("kind", [NoGradient, Detached])
def test_models_whose_logits_have_no_gradient_are_refused(kind):
    with pytest.raises(InputError, match="^model: its logits do not depend on its trained .*; remove detach"):
        plan_gradients(kind(), images(2).float())


@pytest.mark.parametrize("name", ["checkpointed", "experts", "gru", "cached", "spectral norm", "lazy"])
def test_verification_gives_the_same_plan_while_its_memory_is_measured(name):
    net = model(name)
    with LiveBytes() as counter:
        plan = plan_gradients(net, images(7))
    assert plan == plan_gradients(net, images(7))
    assert counter.peak > 0


def test_cache_that_is_never_cleared_raises():
    def keep(net, h):
        if not hasattr(net, "kept"):
            net.kept = net.gain.exp()
        return net.b(net.a(h).tanh()) * net.kept

    net = Net(lambda net: net.register_parameter("gain", nn.Parameter(torch.tensor(1.5))), keep)
    with pytest.raises(RuntimeError, match="second time"):
        plan_gradients(net, images(2).float())


@pytest.mark.parametrize("trained", ["a.bias", "b.weight", "head.bias", "head"])
def test_frozen_parameters_do_not_count_and_are_not_masked(trained):
    net = model("head read elsewhere" if trained == "head" else "no_grad")
    net = Net().double()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(trained) or name.startswith("b."))
    plan = plan_gradients(net, images(4))
    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    total = sum(p.numel() for p in trainable.values())
    assert plan.head == ("head" if trained == "head" else None)
    assert set(plan.frozen) == {name for name, _ in net.named_parameters()} - set(trainable)
    assert mask_size(net, plan, 1.0) == total
    diagonal = fisher_diagonal(net, images(4), plan)
    assert set(diagonal) | {name for name in trainable if name.startswith("head.") and plan.head} == set(trainable)
    mask = global_mask(diagonal, plan, total - head_size(net, plan))
    expected = reference.autograd_rows(net.requires_grad_(), images(4))[:, :, flat_mask(net, mask)]
    assert expected.shape[2] == total
    reference.assert_same_information(reference.every_column(embed(net, images(4), mask)), expected)


def test_model_without_trained_parameters_is_refused():
    with pytest.raises(InputError, match="all parameters of Net are frozen; set requires_grad"):
        plan_gradients(Net().requires_grad_(False), images(2).float())


def test_plan_gradients_does_not_change_the_model():
    net = model("head with weight norm")
    before = {name: (p.clone(), p.requires_grad) for name, p in net.named_parameters()}
    plan_gradients(net, images(3))
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert (parameter.requires_grad, parameter.grad) == (before[name][1], None)
    assert not any(module._forward_hooks for module in net.modules())


def test_pytorch_still_has_the_batch_norm_defect():
    """The reason why a single image is never differentiated alone. Fails when PyTorch has fixed it."""
    norm = nn.BatchNorm2d(2).double().eval()
    norm.running_var[1] = 4.0
    image = torch.arange(8.0, dtype=torch.float64).reshape(1, 2, 2, 2).requires_grad_()
    weights = torch.arange(8.0, dtype=torch.float64)

    def gradient(inputs):
        output = norm(inputs).flatten(2).transpose(1, 2).flatten(1)[0]
        return torch.autograd.grad((output * weights).sum(), image)[0]

    alone, twice = gradient(image), gradient(torch.cat([image, image]))
    # The output is linear in the image: its gradient is the weights, transposed back, by the standard deviation.
    expected = weights.view(4, 2).mT.reshape(1, 2, 2, 2) / (norm.running_var + norm.eps).sqrt().view(1, 2, 1, 1)
    torch.testing.assert_close(twice, expected)
    if torch.allclose(alone, expected):
        warnings.warn(f"PyTorch {torch.__version__} has mended batch norm: slow_gradients.pair can go", stacklevel=1)


def _reads_itself(net):
    net.decode = lambda h: F.linear(h, net.a.weight.t()[:6])


def _hook_over_itself(net):
    net.b.register_forward_pre_hook(lambda _m, args: (args[0] + net.a.weight.mean(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(_reads_itself, lambda net, h: net.b(net.decode(net.a(h)).tanh()).tanh()),
        lambda: Net(_hook_over_itself),
    ],
    ids=["lambda", "hook"],
)
def test_models_with_closures_over_themselves_are_refused(make, dtype):
    net = make().to(dtype)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    with pytest.raises(InputError, match="^model: Net holds a function that refers to the model itself"):
        plan_gradients(net, images(3).to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_complex_parameters_are_refused_by_name():
    net = Net(lambda net: net.register_parameter("c", nn.Parameter(torch.randn(6, 5, dtype=torch.cfloat))),
              lambda net, h: (net.a(h).to(net.c.dtype) @ net.c).abs())  # fmt: skip
    with pytest.raises(InputError, match="^model: parameter c is complex"):
        plan_gradients(net, images(3).float())


def test_irregular_last_layer_raises():
    class Again(Net):
        def forward(self, batch):
            h = self.b(self.a(batch[:, 0].mean(1)).tanh()).tanh()
            logits = self.head(h)
            unsure = batch.mean((1, 2, 3)) > 1
            return torch.where(unsure[:, None], self.head(h * 2), logits) if unsure.any() else logits

    net = Again().double().eval()
    plan = plan_gradients(net, images(7))
    assert plan.head == "head"
    embed(net, images(3), last_layer_mask(plan))
    with pytest.raises(InputError, match="for some images the logits of Again are not the output of its last layer"):
        embed(net, images(3) + 2, last_layer_mask(plan))


def test_verification_works_on_one_image_of_one_pixel():
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))
    assert plan_gradients(net, torch.zeros(1, 1, 1, 1)).head == "3"
