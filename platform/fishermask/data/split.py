"""Images with their labels and ids."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """n images in the order of their source."""

    images: Tensor
    """uint8 [n, channels, height, width]"""
    labels: Tensor
    """int64 [n]"""
    ids: list[str]
    """What the source calls each image: a path or key, else split and row number."""

    def take(self, rows: Tensor) -> "Split":
        """The images at ``rows``."""
        return Split(self.images[rows], self.labels[rows], [self.ids[row] for row in rows.tolist()])

    def relabel(self, renamed: Tensor) -> "Split":
        """Label c becomes ``renamed[c]``."""
        return replace(self, labels=renamed[self.labels])


def row_ids(split: str, count: int) -> list[str]:
    """Ids for a source that names no image: ``train-00000042``."""
    return [f"{split}-{row:08d}" for row in range(count)]
