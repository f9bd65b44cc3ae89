"""Shards as Ray actors, inside the placement group of the process that creates them, if it has one.

If a shard is lost, it is rebuilt: a new actor replays the recorded calls that determine the state of the shard. Their
results are equal to the last bit, so the query selects the same batch as without the loss.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from torch import Tensor

from fishermask.errors import InputError
from fishermask.pool.blocks import shard_slices
from fishermask.pool.packing import pack, unpack
from fishermask.pool.shard import Shard
from fishermask.pool.shards import Args, Result, sum_rows
from fishermask.tensors.images import Images, Preprocess

logger = logging.getLogger(__name__)

START_TIMEOUT = 300
"""Seconds to wait for an actor to start; an actor that stays pending raises no error by itself."""
LOST = (RayActorError, ObjectLostError, OutOfMemoryError)
"""Errors that mean that an actor or its result is lost. Ray's memory monitor raises ``OutOfMemoryError``."""
MODEL, EMBEDDINGS, SELECTION, PICK = (
    method.__name__ for method in (Shard.set_model, Shard.store_embeddings, Shard.start_selection, Shard.apply_pick)
)
"""Methods that change the state of a shard, and are replayed when it is rebuilt."""


# Ray must not restart an actor: the new actor would answer calls, but would have lost the state of the shard.
@ray.remote(max_restarts=0, max_task_retries=0)
class ShardActor(Shard):
    def __init__(self, images: Images, start: int, preprocess: Preprocess, device: str) -> None:
        torch.set_num_threads(1)
        super().__init__(images, start, preprocess, device)

    def call_packed(self, method: str, *pieces: bytes) -> list[bytes]:
        """Call ``method`` with packed arguments and return its packed result."""
        return pack(getattr(self, method)(*unpack(list(pieces))))


class _Call(NamedTuple):
    method: str
    args: list[Any]
    """Plain values and references into Ray's object store; for ``PICK``, packed pieces."""

    def submit(self, actor: Any) -> Any:
        """Send the call to ``actor`` and return a reference to its result."""
        if self.method == PICK:
            return actor.call_packed.remote(self.method, *self.args)
        return getattr(actor, self.method).remote(*self.args)


class RayShards:
    """Shards as Ray actors.

    Args:
        images: the whole pool, [n, ...]. An actor gets a view of its slice. A view of a data set is sent as row
            numbers; the actor maps the pixels from the disk of its node, or decodes them from their source there.
        preprocess: function from images to inputs of the model.
        count: number of shards.
        cpus: CPUs of each actor; may be a fraction.
        gpus: GPUs of each actor; may be a fraction.
        restarts: total number of lost shards that are rebuilt before the run fails.
        memory: bytes of main memory of each actor.
    """

    def __init__(
        self,
        images: Images,
        preprocess: Preprocess,
        count: int,
        cpus: float,
        gpus: float,
        restarts: int = 3,
        memory: float = 0.0,
    ) -> None:
        self.count, self.restarts, self.num_rebuilt = count, restarts, 0
        resources = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory}
        create = ShardActor.options(**resources).remote  # type: ignore[attr-defined]
        device = "cuda" if gpus else "cpu"
        self._create = [
            partial(create, images.narrow(0, start, end - start), start, preprocess, device)
            for start, end in shard_slices(len(images), count)
        ]
        self._replayed_calls: list[_Call] = []
        self._last_stored: tuple[Any, Any] = (None, None)
        self.actors = [create() for create in self._create]
        for index in range(count):
            self._wait_until_started(index)

    def call(self, method: Callable[[Shard, *Args], Result], *args: *Args) -> list[Result]:
        call = self._prepare(method, args)
        results = [call.submit(actor) for actor in self.actors]
        return [self._get(index, result, call) for index, result in enumerate(results)]

    def scatter(self, method: Callable[[Shard, *Args], Result], args: Sequence[tuple[*Args]]) -> list[Result]:
        calls = [_Call(method.__name__, list(shard_args)) for shard_args in args]
        results = [call.submit(actor) for call, actor in zip(calls, self.actors, strict=False)]
        return [self._get(index, *pair) for index, pair in enumerate(zip(results, calls, strict=True))]

    def sum_results(self, method: Callable[[Shard, *Args], tuple[Tensor, ...]], *args: *Args) -> list[Tensor]:
        call = self._prepare(method, args)
        indices = {call.submit(actor): index for index, actor in enumerate(self.actors)}

        def results_as_they_arrive() -> Iterator[Any]:
            pending = list(indices)
            while pending:
                (ready,), pending = ray.wait(pending)
                yield self._get(indices.pop(ready), ready, call)

        return sum_rows(results_as_they_arrive())

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors, self._replayed_calls, self._last_stored = [], [], (None, None)

    def _prepare(self, method: Callable[..., Any], args: tuple[Any, ...]) -> _Call:
        """Return a call to send to all actors, and record it if the state of a shard depends on it."""
        name = method.__name__
        call = _Call(name, list(pack(args)) if name == PICK else [self._store(arg) for arg in args])
        # Remove the calls that no longer affect the state of a shard.
        if name == MODEL:
            self._replayed_calls = []
        elif name == SELECTION:
            self._replayed_calls = [c for c in self._replayed_calls if c.method not in (SELECTION, PICK)]
        elif name == Shard.clear.__name__:
            self._replayed_calls = self._replayed_calls[:1]
        if name in (MODEL, EMBEDDINGS, SELECTION, PICK):
            self._replayed_calls.append(call)
        return call

    def _store(self, arg: Any) -> Any:
        """Put ``arg`` into the object store, once for all shards and for consecutive calls with the same argument."""
        if isinstance(arg, int | float | str | None):
            return arg
        if self._last_stored[0] is not arg:
            self._last_stored = arg, ray.put(arg)
        return self._last_stored[1]

    def _get(self, index: int, reference: Any, call: _Call) -> Any:
        """Return the result of a call. If the shard is lost, rebuild it and repeat the call."""
        while True:
            try:
                result = ray.get(reference if reference is not None else self._rebuild_and_repeat(index, call))
                return unpack(result) if call.method == PICK else result
            except RayTaskError as error:  # the code of the shard raised it, and would raise it again
                raise _cause(error) from None
            except LOST as error:
                self._count_loss(index, error)
                reference = None

    def _rebuild_and_repeat(self, index: int, call: _Call) -> Any:
        """Create shard ``index`` again, replay its calls, repeat ``call``, and return a reference to the result."""
        ray.kill(self.actors[index])  # it may be alive and out of reach
        self.actors[index] = self._create[index]()
        self._wait_until_started(index)
        for replayed in self._replayed_calls:
            if replayed is not call:
                replayed.submit(self.actors[index])
        return call.submit(self.actors[index])

    def _wait_until_started(self, index: int) -> None:
        """Wait until an actor runs. If it is lost before, create it again.

        Raises:
            RuntimeError: no node has room for the actor, or too many shards were lost.
        """
        while True:
            try:
                ray.get(self.actors[index].clear.remote(), timeout=START_TIMEOUT)
                return
            except GetTimeoutError:
                raise RuntimeError(
                    f"shard {index}: no node had room for its process within {START_TIMEOUT} seconds"
                ) from None
            except LOST as error:
                if getattr(error, "actor_init_failed", False):  # its constructor raised an exception
                    last_line = str(error).strip().splitlines()[-1]
                    kind, _, message = last_line.partition(": ")
                    raise (InputError(message) if kind.endswith("InputError") else RuntimeError(last_line)) from None
                self._count_loss(index, error)
                self.actors[index] = self._create[index]()

    def _count_loss(self, index: int, error: Exception) -> None:
        """Count a lost shard.

        Raises:
            RuntimeError: more shards were lost than ``restarts`` allows.
        """
        if self.num_rebuilt == self.restarts:
            raise RuntimeError(
                f"shard {index} was lost after {self.num_rebuilt} lost shards were rebuilt; raise "
                f"resources.restarts or remove the cause: {_first_line(error)}"
            ) from None
        self.num_rebuilt += 1
        logger.warning("shard %d was lost; rebuilding it: %s", index, _first_line(error))


def _cause(error: RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, Exception) else error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
