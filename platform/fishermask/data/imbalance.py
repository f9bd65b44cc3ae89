"""Selection of the training images that form the pool, by class: all of them, balanced, or with rare classes."""

import torch
from torch import Tensor

from fishermask.config import Balanced, Counts, Imbalance, LongTail, Natural, Step
from fishermask.errors import InputError
from fishermask.guard import short


def select_pool(
    labels: Tensor, num_classes: int, rule: Imbalance, generator: torch.Generator
) -> tuple[Tensor, list[int]]:
    """Return the rows of ``labels`` [n] that ``rule`` keeps, and their classes, both ascending.

    ``generator`` draws the rare classes and the images that each class keeps.

    Raises:
        InputError: a class has too few images, or the rule names a class that the data set does not have.
    """
    sizes = torch.bincount(labels, minlength=num_classes).tolist()
    if isinstance(rule, Natural):
        return torch.arange(len(labels)), [c for c, size in enumerate(sizes) if size]
    counts = class_counts(sizes, rule, generator)
    rows = []
    for c in sorted(counts):
        members = (labels == c).nonzero()[:, 0]
        rows.append(members[torch.randperm(len(members), generator=generator)[: counts[c]]])
    return torch.cat(rows).sort().values, sorted(counts)


def class_counts(
    sizes: list[int], rule: Balanced | Step | LongTail | Counts, generator: torch.Generator
) -> dict[int, int]:
    """Return class -> number of images to keep, for a data set whose classes have ``sizes`` images."""
    if isinstance(rule, Counts):
        counts = dict(rule.counts)
        _check_classes("imbalance.counts", list(counts), len(sizes))
        if rule.permute:
            classes = sorted(counts)
            order = torch.randperm(len(classes), generator=generator).tolist()
            counts = {c: rule.counts[classes[i]] for c, i in zip(classes, order, strict=True)}
    else:
        if 0 in sizes:
            raise InputError(
                f"imbalance: class {sizes.index(0)} has no training images; use none, or kind counts without this class"
            )
        largest = rule.per_class if rule.per_class is not None else min(sizes)
        counts = dict.fromkeys(range(len(sizes)), largest)
        if isinstance(rule, Step):
            for c in _rare_classes(rule, len(sizes), generator):
                counts[c] = _at_least_one(largest / rule.ratio, rule)
        elif isinstance(rule, LongTail):
            for rank, c in enumerate(_class_order(rule, len(sizes), generator)):
                counts[c] = _at_least_one(largest * rule.ratio ** (-rank / max(1, len(sizes) - 1)), rule)
    for c, count in counts.items():
        if count > sizes[c]:
            field = "counts" if isinstance(rule, Counts) else "per_class"
            raise InputError(
                f"imbalance.{field}: class {c}: {count} images requested, {sizes[c]} available; lower the number"
            )
    return counts


def _at_least_one(count: float, rule: Step | LongTail) -> int:
    if round(count) < 1:
        raise InputError(f"imbalance.ratio: {rule.ratio:g} leaves a class without images; lower it")
    return round(count)


def _rare_classes(rule: Step, num_classes: int, generator: torch.Generator) -> list[int]:
    # Drawn even if the rule names the rare classes, so that the later draws of images are the same.
    random_order = torch.randperm(num_classes, generator=generator).tolist()
    if rule.rare_classes is not None:
        _check_classes("imbalance.rare_classes", rule.rare_classes, num_classes)
        count = len(rule.rare_classes)
        if len(set(rule.rare_classes)) < count or not 1 <= count < num_classes:
            raise InputError(
                f"imbalance.rare_classes: must name 1 to {num_classes - 1} classes, each once, got "
                + short(rule.rare_classes)
            )
        if rule.rare not in (None, count):
            raise InputError(
                f"imbalance.rare: {rule.rare}, but imbalance.rare_classes lists {count}; remove one of the two settings"
            )
        return rule.rare_classes
    rare = rule.rare if rule.rare is not None else num_classes // 2
    if rare >= num_classes:
        raise InputError(f"imbalance.rare: {rare} of {num_classes} classes; at most {num_classes - 1} can be rare")
    return random_order[:rare]


def _class_order(rule: LongTail, num_classes: int, generator: torch.Generator) -> list[int]:
    random_order = torch.randperm(num_classes, generator=generator).tolist()
    if rule.order is None:
        return random_order
    if sorted(rule.order) != list(range(num_classes)):
        raise InputError(f"imbalance.order: must name each of the {num_classes} classes once, got {short(rule.order)}")
    return rule.order


def _check_classes(field: str, classes: list[int], num_classes: int) -> None:
    wrong = [c for c in classes if not 0 <= c < num_classes]
    if wrong:
        raise InputError(f"{field}: no class {wrong[0]}; the data set has classes 0 to {num_classes - 1}")
