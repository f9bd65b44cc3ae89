"""The samples of a user's pool (tensors, arrays and data sets), and the model's inputs that are made from them."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fishermask.errors import InputError
from fishermask.guard import guarded, short
from fishermask.tensors.images import Images

Transform = Callable[[Tensor], Tensor]
"""Makes the model's inputs [b, ...] from samples [b, ...]."""

NUM_READS = 4
"""Number of times that samples are read and transformed to detect random augmentation."""

SCALING = "transform=lambda batch: batch.float() / 255"


class DatasetSamples:
    """Samples [n, ...] of a map-style data set, read when they are indexed.

    Args:
        dataset: its items are x or (x, y, ...), with x a tensor or an array.
        start: index of the first sample.
        length: number of samples.
        example: x of the first item, whose shape and type all items must have.
    """

    def __init__(self, dataset: Any, start: int, length: int, example: Tensor, lock: threading.Lock) -> None:
        self.dataset, self.start, self.length, self.example, self.lock = dataset, start, length, example, lock

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of samples, then the shape of one sample."""
        return (self.length, *self.example.shape)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, selection: slice | Tensor) -> Tensor:
        """Return the samples of a slice, or at an index tensor [m]."""
        positions = range(self.length)[selection] if isinstance(selection, slice) else selection.tolist()
        samples = torch.empty((len(positions), *self.example.shape), dtype=self.example.dtype)
        with self.lock:  # shards read in threads, and few data sets are thread-safe
            for row, position in enumerate(positions):
                sample = read_item(self.dataset, self.start + position)
                if sample.shape != self.example.shape or sample.dtype != self.example.dtype:
                    raise InputError(
                        f"pool: item {self.start + position} is {_describe(sample)}, and item 0 is "
                        f"{_describe(self.example)}; give all items one shape and type"
                    )
                samples[row] = sample
        return samples

    def narrow(self, dim: int, start: int, length: int) -> "DatasetSamples":
        """Return ``length`` samples from ``start``; ``dim`` is 0."""
        assert dim == 0
        return DatasetSamples(self.dataset, self.start + start, length, self.example, self.lock)


def read_item(dataset: Any, index: int) -> Tensor:
    """Return x of an item of a data set.

    Raises:
        InputError: the item cannot be read, or x is neither a tensor nor an array of numbers.
    """
    with guarded("pool", f"item {index} cannot be read"):
        item = dataset[index]
    sample = item[0] if isinstance(item, tuple | list) and len(item) else item
    if isinstance(sample, np.ndarray):
        sample = _from_numpy(sample, f"pool: item {index}")
    if not isinstance(sample, Tensor):
        raise InputError(
            f"pool: item {index} holds {type(sample).__name__} {short(sample)}; give the data set a transform that "
            "makes a tensor, such as torchvision.transforms.ToTensor()"
        )
    return sample.detach()


def as_samples(pool: object) -> Images:
    """Return the samples [n, ...] of ``pool`` without copying a tensor or an array.

    Raises:
        InputError: ``pool`` does not hold samples by position.
    """
    if isinstance(pool, np.ndarray):
        pool = _from_numpy(pool, "pool")
    if isinstance(pool, Tensor):
        if pool.device.type != "cpu" or pool.layout != torch.strided:
            raise InputError(f"pool: a {pool.layout} tensor on {pool.device}; give a dense tensor on the CPU")
        if pool.dim() < 2:
            raise InputError(f"pool: has shape {tuple(pool.shape)}; expected [n, ...], one row for each sample")
        samples: Images = pool.detach()
    else:
        samples = _dataset(pool)
    if len(samples) < 2:
        raise InputError(f"pool: holds {len(samples)} samples; give at least 2")
    return samples


def _dataset(pool: Any) -> DatasetSamples:
    if isinstance(pool, DataLoader):
        raise InputError("pool: is a DataLoader, which has no positions; give its data set, pool.dataset")
    if isinstance(pool, IterableDataset):
        raise InputError("pool: is an iterable-style data set, which has no positions; give a map-style data set")
    if isinstance(pool, str | bytes | dict) or not (hasattr(pool, "__getitem__") and hasattr(pool, "__len__")):
        raise InputError(
            f"pool: is {type(pool).__name__} {short(pool)}; give a tensor, an array or a map-style data set"
        )
    with guarded("pool", "its length cannot be read"):
        length = len(pool)
    if not length:
        raise InputError("pool: holds 0 samples; give at least 2")
    example = read_item(pool, 0)
    return DatasetSamples(pool, 0, length, example, threading.Lock())


def read_repeatedly(samples: Images, positions: Tensor) -> Tensor:
    """Return the samples at ``positions``.

    Raises:
        InputError: an item of a data set differs between reads.
    """
    first = samples[positions]
    for _ in range(NUM_READS - 1 if isinstance(samples, DatasetSamples) else 0):
        for position, before, after in zip(positions.tolist(), first, samples[positions], strict=True):
            if not torch.equal(before.nan_to_num(), after.nan_to_num()):
                raise InputError(
                    f"pool: item {position} differs when it is read again; leave random augmentation out of the "
                    "data set"
                )
    return first


def _from_numpy(array: np.ndarray, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{name}: is a masked array; replace the masked values, as array.filled(0.0) does")
    if not array.dtype.isnative:
        raise InputError(f"{name}: has another byte order; give array.astype(array.dtype.newbyteorder('='))")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the array is not writable; fishermask does not write to it
            return torch.from_numpy(array)
    except TypeError:
        raise InputError(f"{name}: has dtype {array.dtype}; expected numbers, as uint8 or float32") from None
    except ValueError:  # negative strides
        raise InputError(f"{name}: is a reversed view; give numpy.ascontiguousarray(array)") from None


class ModelInputs:
    """Makes the model's inputs from samples: the preprocessing of the shards.

    Args:
        transform: makes the inputs; without one, samples are cast to the model's type.

    Raises:
        InputError: without ``transform`` the samples are not floating-point numbers.
    """

    def __init__(self, samples: Images, transform: Transform | None) -> None:
        self.transform = transform
        self.shape: torch.Size | None = None
        """Shape of one input; None before the first batch."""
        example = samples[torch.zeros(1, dtype=torch.long)]
        if transform is not None and not callable(transform):
            raise InputError(f"transform: is {short(transform)}; expected a function that takes a batch of samples")
        if transform is None and not example.is_floating_point():
            remedy = SCALING if example.dtype == torch.uint8 else "transform=lambda batch: batch.float()"
            raise InputError(
                f"pool: {example.dtype} samples need a transform that makes the model's inputs from a batch, as in "
                f"training; for example {remedy}"
            )

    def __call__(self, samples: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the inputs [b, ...] of ``samples`` [b, ...], in new memory.

        Raises:
            InputError: the transform does not return one input of floating-point numbers for each sample, all of one
                shape, or an input is not finite.
        """
        # Copy, because transforms and models may write to the batch, and results could depend on its strides.
        batch = torch.empty(samples.shape, dtype=samples.dtype, device=samples.device).copy_(samples)
        inputs = batch if self.transform is None else self._transformed(self.transform, batch)
        if self.shape is None:
            self.shape = inputs.shape[1:]
        if len(inputs) != len(samples) or inputs.shape[1:] != self.shape:
            raise InputError(
                f"transform: made inputs of shape {tuple(inputs.shape)} from {len(samples)} samples; expected "
                f"{(len(samples), *self.shape)}"
            )
        inputs = inputs.to(dtype)
        if not inputs.isfinite().all():
            raise NotFiniteError("pool: holds NaN or infinite values")
        return inputs

    @staticmethod
    def _transformed(transform: Transform, batch: Tensor) -> Tensor:
        with guarded("transform", f"fails for a batch of shape {tuple(batch.shape)}"), torch.no_grad():
            inputs = transform(batch)
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not inputs.dim():
            text = _describe(inputs) if isinstance(inputs, Tensor) else f"{type(inputs).__name__} {short(inputs)}"
            raise InputError(f"transform: returned {text}; expected a floating-point tensor [{len(batch)}, ...]")
        return inputs

    def check(self, samples: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the inputs of ``samples``, after checking that the transform treats each sample independently.

        Raises:
            InputError: the transform is random, or the input of a sample depends on other samples of its batch.
        """
        inputs = self(samples, dtype)
        if self.transform is None:
            return inputs
        singles = [torch.cat([self(sample[None], dtype) for sample in samples]) for _ in range(NUM_READS)]
        batches = [inputs, *(self(samples, dtype) for _ in range(NUM_READS - 1))]
        if not all(torch.equal(made, results[0]) for results in (batches, singles) for made in results):
            raise InputError("transform: gives other inputs when it is called again; leave random augmentation out")
        if not torch.allclose(singles[0], inputs, rtol=1e-4, atol=1e-5):
            raise InputError(
                "transform: the input of a sample depends on its batch; use constants, not batch statistics"
            )
        return inputs


class NotFiniteError(InputError):
    """An input of the model is NaN or infinite."""


def first_not_finite(samples: Images, inputs: ModelInputs, dtype: torch.dtype) -> int | None:
    """Return the position of the first sample whose input is not finite; None if there is none."""
    for start in range(0, len(samples), 256):
        batch = samples[start : start + 256]
        for row, sample in enumerate(batch):
            try:
                inputs(sample[None], dtype)
            except NotFiniteError:
                return start + row
    return None


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
