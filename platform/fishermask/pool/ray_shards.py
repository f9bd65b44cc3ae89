"""Shards as Ray actors: children of whichever process makes them, inside its placement group if it has one.

A lost actor is made again and told again what its predecessor was told since it got the model: everything a shard
computes follows from that, to the last bit, so the batch is the one that an undisturbed run chooses.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from torch import Tensor

from fishermask.errors import InputError
from fishermask.pool.blocks import shard_slices
from fishermask.pool.packing import pack, unpack
from fishermask.pool.shard import Shard
from fishermask.pool.shards import summed
from fishermask.tensors.images import Images, Preprocess

logger = logging.getLogger(__name__)

START_TIMEOUT = 300
"""Seconds until an actor that was never placed is given up: a pending actor raises no error by itself."""
LOST = (RayActorError, ObjectLostError, OutOfMemoryError)
"""An actor is gone, or what it answered; the last is how Ray's own watch over memory ends one."""
SMALL = {"advance"}
"""Methods called once a pick, whose arguments and results travel inside the call."""


# The coordinator must know of a lost shard: a restarted actor would be empty, and would answer all the same.
@ray.remote(max_restarts=0, max_task_retries=0)
class ShardActor(Shard):
    def __init__(self, images: Images, start: int, preprocess: Preprocess, device: str) -> None:
        torch.set_num_threads(1)
        super().__init__(images, start, preprocess, device)

    def packed(self, method: str, *pieces: bytes) -> list[bytes]:
        """Call ``method`` with packed arguments; its result, packed."""
        return pack(getattr(self, method)(*unpack(list(pieces))))


class RayShards:
    """``count`` actors, each with ``cpus``, ``gpus`` (fractions allowed) and ``memory`` (bytes) of its own.

    Args:
        images: the whole pool. An actor gets a view of its share, which travels as row numbers; it maps the pixels on
            its own machine, or reads them from their source there.
        preprocess: makes the model's inputs from images.
        restarts: how often in all a lost shard is made again before the run fails.
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
        self.count, self.restarts, self.rebuilt = count, restarts, 0
        device = "cuda" if gpus else "cpu"
        asked = {"num_cpus": cpus, "num_gpus": gpus, "memory": memory}
        options = ShardActor.options(**asked)  # type: ignore[attr-defined]
        slices = [(images.narrow(0, start, end - start), start) for start, end in shard_slices(len(images), count)]
        self._make = [lambda own=own: options.remote(own[0], own[1], preprocess, device) for own in slices]
        self._log: list[tuple[str, list[Any]]] = []
        self._last: tuple[Any, Any] = (None, None)
        self.actors = [make() for make in self._make]
        for index in range(count):
            self._start(index)

    def call(self, method: str, *args: Any) -> list[Any]:
        return [self._get(index, *call) for index, call in enumerate(self._submit(method, args))]

    def total(self, method: str, *args: Any) -> list[Tensor]:
        calls = {call[0]: (index, *call) for index, call in enumerate(self._submit(method, args))}

        def as_they_come() -> Iterator[Any]:
            waiting = list(calls)
            while waiting:
                (ready,), waiting = ray.wait(waiting)
                yield self._get(*calls.pop(ready))

        return summed(as_they_come())

    def scatter(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = [
            (getattr(actor, method).remote(*own), method, list(own))
            for actor, own in zip(self.actors, args, strict=False)
        ]
        return [self._get(index, *call) for index, call in enumerate(calls)]

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.actors, self._log, self._last = [], [], (None, None)

    def _submit(self, method: str, args: tuple[Any, ...]) -> list[tuple[Any, str, list[Any]]]:
        """Call ``method`` on all actors: for each, where its result will be, and what it was asked."""
        shared = pack(args) if method in SMALL else [self._put(arg) for arg in args]
        self._remember(method, shared)
        return [(_ask(actor, method, shared), method, shared) for actor in self.actors]

    def _put(self, arg: Any) -> Any:
        """``arg`` in the object store: once a node, not once a shard, nor for each piece that it is said again with."""
        if isinstance(arg, int | float | str | None):
            return arg
        if self._last[0] is not arg:
            self._last = arg, ray.put(arg)
        return self._last[1]

    def _remember(self, method: str, args: list[Any]) -> None:
        """Keep what a shard's state follows from: no more than was said since it got the model, and still counts."""
        match method:
            case "set_model":
                self._log = []
            case "start_selection":
                self._log = [call for call in self._log if call[0] not in ("start_selection", "advance")]
            case "clear":
                self._log = self._log[:1]
        if method in ("set_model", "embed", "start_selection", "advance"):
            self._log.append((method, args))

    def _get(self, index: int, result: Any, method: str, args: list[Any]) -> Any:
        """The result of a call, from the actor that was asked or, if that is lost, from one made in its place."""
        while True:
            try:
                found = ray.get(result if result is not None else self._again(index, method, args))
                return unpack(found) if method in SMALL else found
            except RayTaskError as error:  # the shard's own: it would come again
                raise _cause(error) from None
            except LOST as error:
                self._count(index, error)
                result = None

    def _again(self, index: int, method: str, args: list[Any]) -> Any:
        """Make shard ``index`` again, tell it what it was told, and repeat the call: where its result will be."""
        ray.kill(self.actors[index])  # it may only seem to be lost
        self.actors[index] = self._make[index]()
        self._start(index)
        actor = self.actors[index]
        for earlier, own in self._log:
            if own is not args:
                _ask(actor, earlier, own)
        return _ask(actor, method, args)

    def _start(self, index: int) -> None:
        """Wait until an actor is there, making it again when it is lost before.

        Raises:
            RuntimeError: there is no place for it, or it is lost too often.
        """
        while True:
            try:
                ray.get(self.actors[index].clear.remote(), timeout=START_TIMEOUT)
                return
            except GetTimeoutError:
                raise RuntimeError(f"shard {index} found no place within {START_TIMEOUT} seconds") from None
            except LOST as error:
                if getattr(error, "actor_init_failed", False):  # its own error
                    last = str(error).strip().splitlines()[-1]
                    kind, _, message = last.partition(": ")
                    raise (InputError(message) if kind.endswith("InputError") else RuntimeError(last)) from None
                self._count(index, error)
                self.actors[index] = self._make[index]()

    def _count(self, index: int, error: Exception) -> None:
        """Count a lost shard.

        Raises:
            RuntimeError: it is one too many.
        """
        if self.rebuilt == self.restarts:
            raise RuntimeError(
                f"shard {index} was lost, after {self.rebuilt} lost shards that were made again "
                f"(resources.restarts): {_first_line(error)}"
            ) from None
        self.rebuilt += 1
        logger.warning("shard %d was lost and is made again: %s", index, _first_line(error))


def _ask(actor: Any, method: str, args: list[Any]) -> Any:
    return actor.packed.remote(method, *args) if method in SMALL else getattr(actor, method).remote(*args)


def _cause(error: RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, Exception) else error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
