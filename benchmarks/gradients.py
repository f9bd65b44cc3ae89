"""Masked gradients and the Fisher diagonal on thin ResNet-18, against autograd by the definition and against the floor.

    python benchmarks/gradients.py

The floor is what nobody can do without: one forward pass and C backward passes to activations, down to the earliest
masked layer. "Naive" is autograd for each sample and class through the graph of the whole batch, as the paper's code
does it; it is timed on a few samples of the batch and scaled.
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
    """w_c d log p_c / d theta of the first ``samples`` images, one autograd call for each sample and class."""
    parameters = list(model.parameters())
    log_p = model(images).log_softmax(-1)
    rows = []
    for i in range(samples):
        for c in range(log_p.shape[1]):
            gradient = torch.autograd.grad(log_p[i, c], parameters, retain_graph=True)
            flat = torch.cat([g.flatten() for g in gradient])
            rows.append(flat[columns] * log_p[i, c].detach().exp().sqrt())
    return torch.stack(rows).view(samples, log_p.shape[1], -1)


def floor(model, images, head, layers):
    """One forward pass and C backward passes to the outputs of ``layers``."""
    run = forward(model, images, head, layers)
    each = torch.eye(run.logits.shape[1], device=images.device)[:, None].repeat(1, len(images), 1)
    for _ in output_gradients(run, each):
        pass


def main():
    torch.manual_seed(0)
    model = models.build("thin_resnet18", {}, (3, 32, 32), 10, seed=0).eval().to(DEVICE)
    images = torch.randn(1024, 3, 32, 32, device=DEVICE)
    with torch.no_grad():  # let batch norm see data once, or the logits mean nothing
        model.train()(images[:256])
        model.eval()
    layout = plan_gradients(model, images[:2])
    head = layout.head
    model.requires_grad_(False)
    diagonal = fisher_diagonal(model, images[:64], layout)
    k = mask_size(model, layout, 0.00204)
    mask = global_mask(diagonal, layout, k - head_size(model, layout))
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
        found = every_column(embed(model, images[:batch], mask))[:samples]
        found, expected = (v.square().sum(1) for v in (found, expected))  # which rows those are is a choice
        error = float((found - expected).abs().max() / expected.abs().max())
        for layout_name, memory in (("default", torch.contiguous_format), ("channels last", torch.channels_last)):
            model.to(memory_format=memory)
            part = images[:batch].contiguous(memory_format=memory)
            fast = seconds(lambda p=part: embed(model, p, mask), repeats=9) / batch
            least = seconds(lambda p=part: floor(model, p, head, earliest), repeats=9) / batch
            rows.append([batch, layout_name, slow * 1e3, fast * 1e3, least * 1e3, slow / fast, fast / least, error])
        model.to(memory_format=torch.contiguous_format)
    show(
        f"Masked gradients, thin ResNet-18, 32x32x3, C = 10, k = {k} ({mask.body_size} outside the head). {machine()}",
        [
            "batch",
            "layout",
            "naive ms/image",
            "ours ms/image",
            "floor ms/image",
            "naive/ours",
            "ours/floor",
            "error of squares",
        ],
        rows,
    )
    everything = list(dict.fromkeys(name.rpartition(".")[0] for name in diagonal))
    batches = images.split(32)
    ours = seconds(lambda: [fisher_diagonal(model, batch, layout) for batch in batches], repeats=3)
    least = seconds(lambda: [floor(model, batch, head, everything) for batch in batches], repeats=3)
    show(
        f"Fisher diagonal of {start:,} parameters on 1,024 images. {machine()}",
        ["ours s", "floor s", "ours/floor"],
        [[ours, least, ours / least]],
    )


if __name__ == "__main__":
    main()
