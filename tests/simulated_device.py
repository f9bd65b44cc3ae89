"""A simulated second device: its tensors report another device, and are computed on the CPU.

The device is ``lazy``, a name that PyTorch knows and autograd supports, and that has no kernels. Inside a
``SimulatedDevice`` block every operation must follow CUDA's rules: it may not mix devices, except for CPU scalars in
elementwise operations, CPU indices into tensors of the device, and copies. Reads by the host are recorded.

PyTorch's ``FakeTensorMode`` cannot replace it: its tensors have no values, and it has no autograd without a GPU.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fishermask.pool.shards import LocalShards

CPU, DEVICE = torch.device("cpu"), torch.device("lazy")
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
SCALARS = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_}
"""Operations that accept a CPU scalar, although they are not tagged as elementwise."""
READING = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount}
"""Operations whose result, or its length, the host reads."""


class SimulatedTensor(Tensor):
    """A tensor on the device; ``cpu_tensor`` holds its values."""

    cpu_tensor: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu_tensor):
        sizes = cpu_tensor.shape, cpu_tensor.stride(), cpu_tensor.storage_offset()
        wrapper = Tensor._make_wrapper_subclass(cls, *sizes, dtype=cpu_tensor.dtype, device=DEVICE)
        wrapper.cpu_tensor = cpu_tensor
        return wrapper

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor on the device, in a process that has none")


class SimulatedDevice(TorchDispatchMode):
    """A block in which ``lazy`` is a device.

    Args:
        reads: list to which each read by the host is appended: the name of the operation and the shape of the tensor.
    """

    def __init__(self, reads=None):
        super().__init__()
        self.reads = [] if reads is None else reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
        target = kwargs.get("device") or (DEVICE if on_device else CPU)
        if target == DEVICE and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: expected a generator on {DEVICE}, found one on {CPU}")
        if on_device:
            _check(func, args, kwargs, tensors)
            if _reads(func, args, target):
                self.reads.append((func.overloadpacket.__name__, tuple(on_device[0].shape)))
        # An in-place operation returns its argument.
        arguments = {id(_on_cpu(tensor)): tensor for tensor in tensors}

        def to_device(leaf):
            if not isinstance(leaf, Tensor) or id(leaf) in arguments:
                return arguments.get(id(leaf), leaf)
            return SimulatedTensor(leaf) if target == DEVICE else leaf

        return tree_map(to_device, func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs)))


def _on_cpu(leaf):
    if isinstance(leaf, SimulatedTensor):
        return leaf.cpu_tensor
    return CPU if isinstance(leaf, torch.device) else leaf


def _check(func, args, kwargs, tensors):
    """Raise where CUDA would, because ``tensors`` are on both devices."""
    on_cpu, packet = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)], func.overloadpacket
    if not on_cpu or packet in COPIES:
        return
    if packet in INDEXING:
        allowed = isinstance(args[0], SimulatedTensor) and not any(
            isinstance(value, Tensor) and not isinstance(value, SimulatedTensor) and value.dim() for value in args[2:3]
        )
    else:
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        written = [
            named.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        allowed = (
            (torch.Tag.pointwise in func.tags or packet in SCALARS)
            and not any(tensor.dim() for tensor in on_cpu)
            and all(isinstance(tensor, SimulatedTensor) for tensor in written if tensor is not None)
        )
    if not allowed:
        found = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {found}")


def _reads(func, args, target):
    packet = func.overloadpacket
    if packet is aten._to_copy:
        return target == CPU
    if packet is aten.copy_:
        return not isinstance(args[0], SimulatedTensor)
    # The host also reads how many elements a mask selects.
    return packet in READING or (packet in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]))


class SimulatedShards(LocalShards):
    """Shards on the device, with a coordinator without a device. ``reads`` records the reads of the shards."""

    def __init__(self, images, statistics, count=1):
        super().__init__(images, statistics, count, DEVICE.type)
        self.reads = []

    def scatter(self, method, args):
        def call_on_device(shard, shard_args):
            with SimulatedDevice(self.reads):  # a dispatch mode applies to one thread
                return method(shard, *shard_args)

        calls = [self.threads.submit(call_on_device, *pair) for pair in zip(self.shards, args, strict=False)]
        return [call.result() for call in calls]


@contextlib.contextmanager
def simulate_device():
    """Replace functions of PyTorch that support ``cuda`` before dispatch, and refuse ``lazy``."""
    make, before = torch.tensor, torch.__future__.get_overwrite_module_params_on_conversion()

    def tensor(data, dtype=None, device=CPU):
        return make(data, dtype=dtype).to(device)

    def autocast(device_type, dtype=None, enabled=True):
        assert not enabled, "nothing is cast for a simulated device"
        return contextlib.nullcontext()

    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot change its class in place
    try:
        with mock.patch.multiple(torch, tensor=tensor, autocast=autocast):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
