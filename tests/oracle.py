"""An independent implementation of a run: dense, in float64, one image and one class at a time.

It follows ``docs/method.md``, ``docs/architecture.md`` and the papers. It imports nothing from fishermask, so it cannot
repeat a mistake of fishermask. The documents also define the random draws:

* a stream is a torch generator seeded by numpy's ``SeedSequence([seed, crc32(purpose), round])``;
* the Fisher sample of m images is the first m of a random permutation of the pool;
* a random mask is the first entries of a random permutation of all parameters outside the last layer;
* ``random`` takes the first candidates of a random permutation of them;
* BADGE draws by Gumbel noise that belongs to a step and a block of pool positions.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stream_seed(seed: int, purpose: str, round_index: int = 0) -> int:
    """Return the seed of a stream: 63 bits."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), round_index])
    return int(entropy.generate_state(1, np.uint64)[0]) // 2


def stream(seed: int, purpose: str, round_index: int = 0) -> torch.Generator:
    """Return the generator of a stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, round_index))


# Query strategies


class Scores:
    """Predictions p [n, C] and scores d log p_c / d theta [n, C, D] of all images, by autograd, image by image."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        parameters = dict(model.named_parameters())
        self.layer_of = [name.rpartition(".")[0] for name, p in parameters.items() for _ in range(p.numel())]
        self.head = self.layer_of[-1]
        predictions, scores = [], []
        for image in inputs:
            # Twice, because batch norm may differentiate a single image wrongly in evaluation mode.
            log_p = model(torch.stack([image, image]))[0].log_softmax(-1)
            rows = [torch.autograd.grad(one, list(parameters.values()), retain_graph=True) for one in log_p]
            scores.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
            predictions.append(log_p.detach().exp())
        self.p, self.s = torch.stack(predictions), torch.stack(scores)

    @property
    def body(self) -> list[int]:
        """Positions of the parameters outside the last layer."""
        return [i for i, layer in enumerate(self.layer_of) if layer != self.head]

    @property
    def last_layer(self) -> list[int]:
        """Positions of the parameters of the last layer."""
        return [i for i, layer in enumerate(self.layer_of) if layer == self.head]


def body_size(scores: Scores, fraction: float | None, num_body_parameters: int = 1024) -> int:
    """Return how many parameters outside the last layer a mask holds."""
    if fraction is None:
        return min(num_body_parameters, len(scores.body))
    return round(fraction * len(scores.layer_of)) - len(scores.last_layer)


def masked_body(scores: Scores, size: int, mask: str, sample: list[int], draws: torch.Generator) -> list[int]:
    """Return the positions, ascending, of the ``size`` masked parameters outside the last layer."""
    body = scores.body
    if mask == "last_layer":
        return []
    if mask == "random":
        return sorted(body[i] for i in torch.randperm(len(body), generator=draws)[:size].tolist())
    diagonal = (scores.p[sample, :, None] * scores.s[sample].square()).sum(1).mean(0).tolist()

    def largest(positions: list[int], count: int, value: list[float]) -> list[int]:
        return sorted(positions, key=lambda i: (-value[i], i))[:count]

    layers = {name: [i for i in body if scores.layer_of[i] == name] for name in dict.fromkeys(scores.layer_of)}
    layers = {name: positions for name, positions in layers.items() if positions}
    if mask == "global":
        return sorted(largest(body, size, diagonal))
    if mask == "layerwise":
        share = {name: size * len(positions) / len(body) for name, positions in layers.items()}
        counts = {name: math.floor(value) for name, value in share.items()}
        by_remainder = sorted(share, key=lambda name: share[name] - counts[name], reverse=True)
        for name in by_remainder[: size - sum(counts.values())]:
            counts[name] += 1
        return sorted(i for name, positions in layers.items() for i in largest(positions, counts[name], diagonal))
    assert mask == "relative"
    ratio = list(diagonal)
    for positions in layers.values():
        mean = sum(diagonal[i] for i in positions) / len(positions)
        for i in positions:
            ratio[i] = diagonal[i] / mean
    return sorted(i for i in largest(body, size, ratio) if ratio[i] > 2)


def information(scores: Scores, columns: list[int], weighting: str, top_classes: int | None) -> Tensor:
    """Return each image's information on ``columns``, [n, k, k]."""
    matrices = []
    for p, s in zip(scores.p, scores.s[:, :, columns], strict=True):
        if top_classes is not None:
            top = sorted(range(len(p)), key=lambda c, p=p: -float(p[c]))[:top_classes]
            p, s = p[top] / p[top].sum(), s[top]
            s = s - p @ s  # the scores of a softmax over the top logits
        weights = p if weighting == "sqrt" else torch.ones_like(p)
        matrices.append((weights[:, None] * s).mT @ s)
    return torch.stack(matrices)


def trace_batch(
    each: Tensor,
    labeled: list[int],
    budget: int,
    *,
    damping: float = 1.0,
    initial_information: bool = True,
    batch_weighting: str = "bait",
    target: str = "pool",
    oversample: float = 1.0,
) -> list[int]:
    """Return the batch that greedily minimizes tr(M^-1 F), from each image's information [n, k, k]."""
    n, size = each.shape[:2]
    identity, total = torch.eye(size, dtype=each.dtype), len(labeled) + budget
    f = each.mean(0) if target == "pool" else identity
    matrix = damping * identity
    if initial_information:
        matrix = matrix + each[labeled].sum(0) / total
    weight = (budget if batch_weighting == "bait" else 1) / total

    def objectives(matrices: Tensor) -> list[float]:
        return torch.linalg.solve(matrices, f.expand_as(matrices)).diagonal(dim1=1, dim2=2).sum(1).tolist()

    chosen: list[int] = []
    for _ in range(math.ceil(oversample * budget)):
        remaining = [i for i in range(n) if i not in labeled and i not in chosen]
        values = objectives(matrix + weight * each[remaining])
        chosen.append(remaining[values.index(min(values))])
        matrix = matrix + weight * each[chosen[-1]]
    while len(chosen) > budget:
        values = objectives(matrix - weight * each[chosen])
        matrix = matrix - weight * each[chosen.pop(values.index(min(values)))]
    return chosen


def badge_batch(
    p: Tensor, hidden: Tensor, labeled: list[int], budget: int, draws: torch.Generator, block: int
) -> list[int]:
    """Return BADGE's batch: k-means++ on (p - e_y) (x) h, y the predicted class, with the noise of ``draws``."""
    n = len(p)
    residual = p - F.one_hot(p.argmax(1), p.shape[1])
    gradients = torch.einsum("nc,ne->nce", residual, hidden).flatten(1)
    base = int(torch.randint(2**31, (1,), generator=draws))
    chosen: list[int] = []
    for step in range(budget):
        if step:
            distances = torch.stack([(gradients - gradients[i]).square().sum(1) for i in chosen]).amin(0)
            uniform = []
            for first in range(0, n, block):
                seed = ((base * 1_000_003 + step) * 1_000_003 + first) % 2**63
                noise_generator = torch.Generator().manual_seed(seed)
                uniform.append(torch.rand(min(block, n - first), generator=noise_generator, dtype=torch.float64))
            value = distances.log() - (-torch.cat(uniform).log()).log()
        else:
            value = gradients.square().sum(1)
        remaining = [i for i in range(n) if i not in labeled and i not in chosen]
        chosen.append(max(remaining, key=lambda i, value=value: float(value[i])))
    return chosen


# The loop


def kept_images(labels: list[int], rule: dict, seed: int) -> list[int]:
    """Return the rows of the training images that ``rule`` keeps, an imbalance as in a sweep file."""
    draws = stream(seed, "imbalance")
    num_classes = max(labels) + 1
    members = [[row for row, label in enumerate(labels) if label == c] for c in range(num_classes)]
    largest = rule.get("per_class", min(map(len, members)))
    counts = dict.fromkeys(range(num_classes), largest)
    if rule["kind"] == "step":
        drawn = torch.randperm(num_classes, generator=draws).tolist()
        for c in rule.get("rare_classes", drawn[: rule.get("rare", num_classes // 2)]):
            counts[c] = round(largest / rule["ratio"])
    elif rule["kind"] == "long_tail":
        drawn = torch.randperm(num_classes, generator=draws).tolist()
        for rank, c in enumerate(rule.get("order", drawn)):
            counts[c] = round(largest / rule["ratio"] ** (rank / (num_classes - 1)))
    elif rule["kind"] == "counts":
        counts = rule["counts"]
        if rule.get("permute"):
            named = sorted(counts)
            dealt = torch.randperm(len(named), generator=draws).tolist()
            counts = {c: rule["counts"][named[i]] for c, i in zip(named, dealt, strict=True)}
    rows = []
    for c in sorted(counts):
        order = torch.randperm(len(members[c]), generator=draws).tolist()
        rows += [members[c][i] for i in order[: counts[c]]]
    return sorted(rows)


def crop_and_flip(images: Tensor, draws: torch.Generator) -> Tensor:
    """Return each image padded by 4 zeros, cropped at a random place, and mirrored with probability 1/2."""
    n, _, height, width = images.shape
    top, left = (torch.randint(9, (n,), generator=draws).tolist() for _ in range(2))
    mirrored = (torch.rand(n, generator=draws) < 0.5).tolist()
    crops = []
    for image, y, x, mirror in zip(F.pad(images, (4, 4, 4, 4)), top, left, mirrored, strict=True):
        crop = image[:, y : y + height, x : x + width]
        crops.append(crop.flip(2) if mirror else crop)
    return torch.stack(crops)


def batches(order: list[int], size: int) -> list[list[int]]:
    """Return ``order`` in parts of ``size``. If the last part has one image, it joins the part before it."""
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = parts[-1] + last
    return parts


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    statistics: tuple[np.ndarray, np.ndarray],
    seed: int,
    round_index: int,
    augment: bool,
    *,
    learning_rate: float,
    batch_size: int,
    target_accuracy: float,
    max_epochs: int,
    clip: float | None,
) -> tuple[int, float, str]:
    """Train ``model`` in place on uint8 ``images``; return the epochs, the last one's accuracy, and what ended it."""
    order, augmentation = stream(seed, "order", round_index), stream(seed, "augmentation", round_index)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.train()
    for epoch in range(max_epochs):
        permutation = torch.randperm(len(images), generator=order).tolist()
        correct = 0
        for rows in batches(permutation, batch_size):
            inputs = crop_and_flip(images[rows], augmentation) if augment else images[rows]
            logits = model(standardized(inputs, statistics))
            target = labels[rows]
            optimizer.zero_grad()
            (-logits.log_softmax(1)[range(len(rows)), target].mean()).backward()
            for parameter in model.parameters():
                if clip is not None:
                    parameter.grad.clamp_(-clip, clip)
            optimizer.step()
            correct += int((logits.argmax(1) == target).sum())
        if correct / len(images) >= target_accuracy:
            return epoch + 1, correct / len(images), "target"
    return max_epochs, correct / len(images), "cap"


def standardized(images: Tensor, statistics: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Return uint8 images on the scale 0 to 1, minus the mean and divided by the deviation of each channel."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in statistics)
    return (images.float() / 255 - mean) / std


def pool_statistics(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel, on the scale 0 to 1."""
    scaled = images.numpy().astype(np.float64) / 255
    return scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))


def recalls(predictions: list[int], labels: list[int], num_classes: int) -> list[float]:
    """Return the recall of each class that ``labels`` hold."""
    hits = [
        [p == label for p, label in zip(predictions, labels, strict=True) if label == c] for c in range(num_classes)
    ]
    return [sum(class_hits) / len(class_hits) for class_hits in hits if class_hits]
