"""Reference implementations by definition: dense, one image at a time, in float64."""

import torch
from torch import Tensor, nn

from fishermask.tensors.embedding import dense


def autograd_rows(model: nn.Module, images: Tensor) -> Tensor:
    """Return sqrt(p_c) d log p_c / d theta for each image, [n, C, D], by plain autograd.

    Each image is twice in its batch, because batch norm may have wrong gradients for a single image in eval mode.
    Caches of the model are cleared before each pass.
    """
    parameters, rows = list(model.parameters()), []
    for image in images:
        model.train()
        model.eval()
        log_p = model(torch.stack([image, image]))[0].log_softmax(-1)
        jacobian = [
            torch.cat(
                [
                    (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
                    for parameter, gradient in zip(
                        parameters, torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True),
                        strict=True,
                    )
                ]
            )
            for value in log_p
        ]  # fmt: skip
        rows.append(log_p.detach().exp().sqrt()[:, None] * torch.stack(jacobian))
    model.train()
    model.eval()
    return torch.stack(rows)


def parameter_vector_jacobian(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p [C] and d log p_c / d theta [C, D] of one image, with parameters flat in the order of the model."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_probabilities(values):
        return torch.func.functional_call(model, values, image[None])[0].log_softmax(-1)

    jacobian = torch.func.jacrev(log_probabilities)(parameters)
    return log_probabilities(parameters), torch.cat([j.flatten(1) for j in jacobian.values()], dim=1)


def information_rows(model: nn.Module, images: Tensor, top_classes: int | None = None) -> Tensor:
    """Return sqrt(p_c) d log p_c / d theta for each image, [n, C, D], by ``torch.func``.

    With ``top_classes`` q, for a softmax over the q most probable classes of each image: [n, q, D], ascending classes.
    """
    rows = []
    for image in images:
        log_p, jacobian = parameter_vector_jacobian(model, image)
        if top_classes is not None:
            top = log_p.topk(top_classes).indices.sort().values
            log_p, jacobian = log_p[top].log_softmax(-1), jacobian[top]
            jacobian = jacobian - log_p.exp() @ jacobian
        rows.append(log_p.exp().sqrt()[:, None] * jacobian)
    return torch.stack(rows)


def every_column(embedding) -> Tensor:
    """Return V with the columns of the last class, [n, r, k], which are minus the sum of the other classes' columns."""
    v, width = dense(embedding), len(embedding.hidden)
    head = v[..., : embedding.head_size]
    last = -sum(head.split(width, dim=2)) if width else head
    return torch.cat([head, last, v[..., embedding.head_size :]], dim=2)


def assert_same_information(embeddings: Tensor, expected: Tensor) -> None:
    """Assert that V^T V of ``embeddings`` [n, r, k] and ``expected`` [n, C, k] are equal for each image.

    The diagonals are compared entry by entry, and the matrices by products with more random vectors than rows.
    """
    close = {"rtol": 1e-9, "atol": 1e-14}
    torch.testing.assert_close(embeddings.square().sum(1), expected.square().sum(1), **close)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(expected.shape[2], expected.shape[1] + 2, generator=generator, dtype=expected.dtype)
    actual, reference = embeddings @ vectors, expected @ vectors
    torch.testing.assert_close(actual.mT @ actual, reference.mT @ reference, rtol=1e-9, atol=1e-12)


def head_entries(model: nn.Module, head: str) -> Tensor:
    """Return the flat indices of the parameters of the last layer, in the order (o, e) with a bias as the last e."""
    positions, start = {}, 0
    for name, parameter in model.named_parameters():
        positions[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
        start += parameter.numel()
    weight = positions[f"{head}.weight"]
    if f"{head}.bias" in positions:
        weight = torch.cat([weight, positions[f"{head}.bias"][:, None]], dim=1)
    return weight.flatten()


def trace(matrix: Tensor, target: Tensor) -> float:
    """Return tr(M^-1 F)."""
    return float(torch.trace(torch.linalg.inv(matrix) @ target))


def greedy(rows: Tensor, candidates: list[int], start: Tensor, target: Tensor, budget: int, scale: float) -> list[int]:
    """Return ``budget`` candidates, each the one with the smallest tr(M^-1 F), the first of equal ones."""
    matrix, chosen = start.clone(), []
    for _ in range(budget):
        remaining = [c for c in candidates if c not in chosen]
        values = [trace(matrix + scale**2 * rows[c].mT @ rows[c], target) for c in remaining]
        best = remaining[min(range(len(remaining)), key=lambda i: values[i])]
        matrix += scale**2 * rows[best].mT @ rows[best]
        chosen.append(best)
    return chosen
