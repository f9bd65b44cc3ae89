"""Time of masked gradients and of the Fisher diagonal, compared with plain autograd and with a lower bound.

    python benchmarks/gradients.py

The model is thin ResNet-18. The lower bound is one forward pass and C backward passes to the outputs of layers, down to
the earliest masked layer. "Naive" is one autograd call for each sample and class through the graph of the batch, as in
the code of the paper. It is timed on a few samples, and scaled to the batch.
"""

import torch
from table import machine, seconds, show

from fishermask.learning import models
from fishermask.tensors.backprop import forward, output_gradients
from fishermask.tensors.embedding import embed, every_column
from fishermask.tensors.gradient_plan import plan_gradients
from fishermask.tensors.mask import fisher_diagonal, global_mask, head_size, mask_size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def naive(model, images, columns, samples):
    """Return sqrt(p_c) d log p_c / d theta of the first ``samples`` images, one autograd call per sample and class."""
    parameters = list(model.parameters())
    log_p = model(images).log_softmax(-1)
    rows = []
    for i in range(samples):
        for c in range(log_p.shape[1]):
            gradient = torch.autograd.grad(log_p[i, c], parameters, retain_graph=True)
            flat = torch.cat([g.flatten() for g in gradient])
            rows.append(flat[columns] * log_p[i, c].detach().exp().sqrt())
    return torch.stack(rows).view(samples, log_p.shape[1], -1)


def run_lower_bound(model, images, head, layers):
    """Run one forward pass and C backward passes to the outputs of ``layers``."""
    forward_pass = forward(model, images, head, layers)
    cotangents = torch.eye(forward_pass.logits.shape[1], device=images.device)[:, None].repeat(1, len(images), 1)
    for _ in output_gradients(forward_pass, cotangents):
        pass


def main():
    torch.manual_seed(0)
    model = models.build("thin_resnet18", {}, (3, 32, 32), 10, seed=0).eval().to(DEVICE)
    images = torch.randn(1024, 3, 32, 32, device=DEVICE)
    with torch.no_grad():  # set the statistics of batch norm
        model.train()(images[:256])
        model.eval()
    plan = plan_gradients(model, images[:2])
    head = plan.head
    model.requires_grad_(False)
    diagonal = fisher_diagonal(model, images[:64], plan)
    k = mask_size(model, plan, 0.00204)
    mask = global_mask(diagonal, plan, k - head_size(model, plan))
    earliest = mask.layers
    columns, start = [], 0
    for name, parameter in model.named_parameters():
        if name in mask.entries:
            columns.append(mask.entries[name] + start)
        if name.startswith(f"{head}."):
            columns.insert(0, torch.arange(start, start + parameter.numel(), device=DEVICE))
        start += parameter.numel()
    columns = torch.cat(columns)

    rows = []
    for batch, samples in ((16, 4), (128, 2)):
        model.requires_grad_(True)
        expected = naive(model, images[:batch], columns, samples)
        slow = seconds(lambda b=batch, s=samples: naive(model, images[:b], columns, s), repeats=3) / samples
        model.requires_grad_(False)
        actual = every_column(embed(model, images[:batch], mask))[:samples]
        # V is unique up to an orthogonal matrix; the sums of squares of its columns are unique.
        actual, expected = (v.square().sum(1) for v in (actual, expected))
        error = float((actual - expected).abs().max() / expected.abs().max())
        for format_name, memory_format in (
            ("default", torch.contiguous_format),
            ("channels last", torch.channels_last),
        ):
            model.to(memory_format=memory_format)
            part = images[:batch].contiguous(memory_format=memory_format)
            fast = seconds(lambda p=part: embed(model, p, mask), repeats=9) / batch
            bound = seconds(lambda p=part: run_lower_bound(model, p, head, earliest), repeats=9) / batch
            rows.append([batch, format_name, slow * 1e3, fast * 1e3, bound * 1e3, slow / fast, fast / bound, error])
        model.to(memory_format=torch.contiguous_format)
    show(
        f"Masked gradients, thin ResNet-18, 32x32x3, C = 10, k = {k} ({mask.body_size} outside the head). {machine()}",
        [
            "batch",
            "memory format",
            "naive ms/image",
            "fishermask ms/image",
            "bound ms/image",
            "naive/fishermask",
            "fishermask/bound",
            "error of squares",
        ],
        rows,
    )
    all_layers = list(dict.fromkeys(name.rpartition(".")[0] for name in diagonal))
    batches = images.split(32)
    time = seconds(lambda: [fisher_diagonal(model, batch, plan) for batch in batches], repeats=3)
    bound = seconds(lambda: [run_lower_bound(model, batch, head, all_layers) for batch in batches], repeats=3)
    show(
        f"Fisher diagonal of {start:,} parameters on 1,024 images. {machine()}",
        ["fishermask s", "bound s", "fishermask/bound"],
        [[time, bound, time / bound]],
    )


if __name__ == "__main__":
    main()
