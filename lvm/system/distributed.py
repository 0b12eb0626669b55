"""Processes that do the work of one command together, started by torchrun; one without it.

Rank 0 runs the command. The others wait in `World.assisted` and run the tasks that rank 0 shares
out, each on its part of the blocks. So a command takes one path whether it is shared or not, and
nothing but rank 0 logs, locks or writes results.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lvm.system import progress

if TYPE_CHECKING:  # torch takes a second to load, and a process alone may not need it
    import torch
    from torch import nn

Value = TypeVar("Value")
# Others wait while rank 0 reads or logs; a process that ended is noticed at once, see `_peers`.
PATIENCE = timedelta(days=1)
LAUNCHED = "TORCHELASTIC_RUN_ID"  # set by torchrun
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")


class Task(Protocol):
    """Work that several processes can share; it travels to them pickled."""

    def run(self, rank: int, size: int) -> Any:
        """Do part `rank` of `size` equal parts; return its result, which is pickled back."""


@dataclass(frozen=True)
class _Failure:
    """The error that ended a rank's part of a task."""

    error: Exception


@dataclass(frozen=True)
class World:
    """This process among `size` processes; rank 0 validates, logs and writes.

    `control` is a process group for Python values; gradients use the default group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> "torch.device":
        """Return the device `name`; on CUDA this process's own."""
        import torch

        own_cuda = name == "cuda" and self.size > 1
        return torch.device(name, self.local_rank) if own_cuda else torch.device(name)

    def wrap(self, module: "nn.Module", device: "torch.device") -> "nn.Module":
        """Return the module with gradients averaged over processes in each backward pass."""
        if self.size == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        devices = [device] if device.type == "cuda" else None
        # A context of one chunk writes no memory; the parameters of its write get no gradient.
        return DistributedDataParallel(module, devices, find_unused_parameters=True)

    def from_main(self, value: Value | None) -> Value:
        """Return rank 0's `value` on every rank; all ranks must call it."""
        holder = [value]
        if self.size > 1:
            from torch import distributed

            with _peers():
                distributed.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]  # type: ignore[return-value]

    def gathered(self, value: Value) -> list[Value]:
        """Return every rank's `value`, ordered by rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            from torch import distributed

            with _peers():
                distributed.all_gather_object(values, value, group=self.control)
        return values

    def mean(self, value: float) -> float:
        """Return the mean of every rank's `value`."""
        return sum(self.gathered(value)) / self.size if self.size > 1 else value

    @contextmanager
    def assisted(self) -> Iterator[bool]:
        """Let the other ranks run the tasks that rank 0 shares in this block; yield if this is it.

        All ranks must enter. The others come out when rank 0 does, and then skip the block's body:
        `with world.assisted() as leads: if leads: ...`.
        """
        if self.size == 1:
            yield True
        elif not self.is_main:
            self._assist()
            yield False
        else:
            yield from self._lead()

    def _lead(self) -> Iterator[bool]:
        _helped.worlds.append(self)
        is_reachable = True
        try:
            yield True
        except (ConnectionError, SystemExit, KeyboardInterrupt):
            is_reachable = False  # a rank is lost, or a signal came amid a task
            raise
        finally:
            _helped.worlds.remove(self)
            if is_reachable:
                self.from_main(None)

    def _assist(self) -> None:
        """Run the tasks of rank 0 until it sends none."""
        progress.silence()
        while (task := self.from_main(None)) is not None:  # type: ignore[var-annotated]
            self._to_main(self._own_part(task))

    def run(self, task: Task) -> list[Any]:
        """Share a task out, as rank 0 in a block of `assisted`; return the results by rank.

        An error in one part is raised here, once all parts have ended.
        """
        self.from_main(task)
        _helped.worlds.remove(self)  # a task does not share tasks: the others are busy with it
        try:
            results = self._to_main(self._own_part(task))
        finally:
            _helped.worlds.append(self)
        for one in results:
            if isinstance(one, _Failure):
                raise one.error
        return results

    def _own_part(self, task: Task) -> Any:
        try:
            return task.run(self.rank, self.size)
        except FAILURES as error:
            return _Failure(error)

    def _to_main(self, value: Any) -> list[Any]:
        """Return every rank's `value` on rank 0, nothing on the others."""
        from torch import distributed

        values = [None] * self.size if self.is_main else None
        with _peers():
            distributed.gather_object(value, values, dst=0, group=self.control)
        return values or []


@dataclass
class _Helped:
    """The world whose other ranks wait for tasks of this process, if there is one."""

    worlds: list[World] = field(default_factory=list)


_helped = _Helped()


def share(task: Task) -> list[Any]:
    """Run a task on this process and those that assist it; return the results by rank."""
    return _helped.worlds[-1].run(task) if _helped.worlds else [task.run(0, 1)]


def launched_rank() -> int:
    """Return the rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if _is_launched() else 0


def launched_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if _is_launched() else 1


def _is_launched() -> bool:
    return LAUNCHED in os.environ


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join torchrun's processes for the block: gloo on `device` cpu, nccl on cuda.

    Raises ConnectionError if another of the processes ends before its time.
    """
    if launched_size() == 1:
        yield World()
        return
    import torch
    from torch import distributed

    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    with _peers():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        try:
            control = distributed.new_group(backend="gloo", timeout=PATIENCE)
            yield World(distributed.get_rank(), distributed.get_world_size(), local_rank, control)
        finally:
            distributed.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    """Turn the errors of a broken connection into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        raise ConnectionError(
            f"processes: rank {launched_rank()} of {launched_size()} lost another rank, which was "
            "killed or failed; start the same command again, and it goes on from what is written"
        ) from None
