"""What a server remembers between requests: states of its streams, and sessions of its clients.

Shapes: T time, D vector dim, R rows that a session has room for.
"""

import copy
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lvm.bank.bank import FloatArray
from lvm.models.predict import laid_out_for_steps
from lvm.windows.planning import first_read

MAX_BYTES = 2**28
MAX_NAME = 200  # characters of a session's name
# More new rows than this share of the context are read with it in one pass: a step takes as long as
# 20 rows of a pass (delta_memory) or 5 (memory_gru), both at 768 dims on one Xeon core.
STEPS_PER_ROW = 1 / 16
ENTRY_BYTES = 1024  # of an entry's key and objects
LOG_EVERY = 100
_log = logging.getLogger("mlflow.lvm")  # MLflow's servers show this logger's lines


@dataclass(frozen=True)
class State:
    """A stream after `num_rows` rows. It never changes: a later state is made from a copy."""

    prediction_D: FloatArray
    cache: Any
    num_rows: int

    @property
    def num_bytes(self) -> int:
        return self.prediction_D.nbytes + sum(_storages(self.cache).values())


@dataclass
class Session:
    """The context that a client has sent in parts: the first `num_rows` rows of `room_RD`.

    Requests of one session take turns by `turn`.
    """

    room_RD: FloatArray
    num_rows: int = 0
    state: State | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_bytes(self) -> int:
        return self.room_RD.nbytes + (self.state.num_bytes if self.state else 0)


class Memory:
    """Predicts the row after a context; only rows that no earlier request had are read.

    States are found by the hash of the rows that they have read, sessions by name. Both take at
    most `max_bytes` together; those that were not used for longest are dropped. Thread-safe.
    """

    def __init__(self, model: nn.Module, ctx: int, max_bytes: int) -> None:
        self._model: Any = laid_out_for_steps(model).eval()
        self._ctx, self._max_bytes = ctx, max_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes | str, State | Session] = OrderedDict()
        self._size_of: dict[bytes | str, int] = {}
        self.num_bytes = self.num_hits = self.num_answers = self.num_dropped = 0

    def __str__(self) -> str:
        num_sessions = sum(isinstance(key, str) for key in self._held)
        return (
            f"cache: {self.num_hits:,} of {self.num_answers:,} contexts continued one that was "
            f"read before; {len(self._held) - num_sessions:,} states and {num_sessions:,} sessions "
            f"in {self.num_bytes / 2**20:.1f} of {self._max_bytes / 2**20:.1f} MiB, "
            f"{self.num_dropped:,} dropped"
        )

    def predict(self, unit_TD: FloatArray) -> FloatArray:
        """Return the predicted unit vector (D,) after a context of unit rows."""
        read_TD = np.ascontiguousarray(unit_TD[first_read(len(unit_TD), self._ctx) :])
        with self._lock:
            lengths = {held.num_rows for held in self._held.values() if isinstance(held, State)}
        digests = _digests(read_TD, lengths)
        with self._lock:
            longest = (digest for digest in reversed(digests.values()) if digest in self._held)
            known = next(longest, None)
            state = None if known is None else self._held[known]
        assert not isinstance(state, Session)
        found = self._read(read_TD, state)
        with self._lock:
            if known is not None and known in self._held:  # its successor is asked for next
                self._held.move_to_end(known, last=False)
            if found.num_bytes + ENTRY_BYTES <= self._max_bytes:
                self._put(digests[len(read_TD)], found)
        return found.prediction_D

    @contextmanager
    def session(
        self, name: str, unit_TD: FloatArray, position: int | None = None
    ) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Yield the context (T, D) of a session, `unit_TD` included, and the prediction (D,).

        The session keeps the new rows if the block succeeds. `position` is the number of rows that
        stand before them, None for all that were sent: rows from there on are replaced. Raises
        ValueError where the session has fewer, or does not fit into the memory.
        """
        if len(name) > MAX_NAME:
            raise ValueError(f"session: a name of {len(name):,} characters; at most {MAX_NAME}")
        with self._lock:
            held = self._held.get(name) or Session(unit_TD[:0])
            assert isinstance(held, Session)
            self._put(name, held)
        with held.turn:
            before = held.num_rows if position is None else position
            if before > held.num_rows:
                raise ValueError(
                    f"session: {name!r} has {held.num_rows:,} rows on this server, not {before:,}; "
                    "send its whole context with position 0"
                )
            room_RD = _with_rows(held, before, unit_TD)
            num_rows = before + len(unit_TD)
            start, context_TD = first_read(num_rows, self._ctx), room_RD[:num_rows]
            is_continued = before == held.num_rows and start == first_read(before, self._ctx)
            state = self._read(context_TD[start:], held.state if is_continued else None)
            found = Session(room_RD, num_rows, state, held.turn)
            if found.num_bytes + ENTRY_BYTES > self._max_bytes:
                raise ValueError(
                    f"session: {num_rows:,} rows take {found.num_bytes:,} bytes, more than the "
                    f"{self._max_bytes:,} of LVM_CACHE_BYTES; begin another session"
                )
            yield context_TD, state.prediction_D
            held.room_RD, held.num_rows, held.state = room_RD, num_rows, state
            with self._lock:
                self._put(name, held)

    def _read(self, read_TD: FloatArray, state: State | None) -> State:
        """Return the state after all rows, of which `state` has read the first ones."""
        num_known = 0 if state is None else state.num_rows
        new_TD = torch.from_numpy(read_TD[num_known:])
        is_hit = state is not None and len(new_TD) <= max(1, len(read_TD) * STEPS_PER_ROW)
        self._count(is_hit)
        with torch.inference_mode():
            if not is_hit:
                prediction_D, cache = self._model.begin(torch.from_numpy(read_TD))
                return State(prediction_D.float().numpy(), cache, len(read_TD))
            assert state is not None
            if not len(new_TD):
                return state
            cache = _copied(state.cache)
            for vector_D in new_TD:
                prediction_D = self._model.step(vector_D, cache)
        return State(prediction_D.float().numpy(), cache, len(read_TD))

    def _put(self, key: bytes | str, held: State | Session) -> None:
        """Put an entry last in the order of use; drop the first ones until all fit."""
        size = held.num_bytes + ENTRY_BYTES
        self.num_bytes += size - self._size_of.get(key, 0)
        self._held[key], self._size_of[key] = held, size
        self._held.move_to_end(key)
        while self.num_bytes > self._max_bytes:
            dropped, _ = self._held.popitem(last=False)
            self.num_bytes -= self._size_of.pop(dropped)
            self.num_dropped += 1

    def _count(self, is_hit: bool) -> None:
        with self._lock:
            self.num_answers += 1
            self.num_hits += is_hit
            text = str(self) if self.num_answers % LOG_EVERY == 0 else None
        if text is not None:
            _log.info(text)


def cache_bytes(text: str) -> int:
    """Return the bytes that LVM_CACHE_BYTES or `cache_bytes` allows, MAX_BYTES if it is empty."""
    if text and not text.isdecimal():
        raise ValueError(f"LVM_CACHE_BYTES: {text!r} is no number of bytes; give 0 for no cache")
    return int(text) if text else MAX_BYTES


def _digests(read_TD: FloatArray, lengths: set[int]) -> dict[int, bytes]:
    """Return the hash of the first rows for each of `lengths`, and of all rows, by length."""
    running, done, digests = hashlib.sha256(), 0, {}
    for length in sorted({one for one in lengths if one < len(read_TD)} | {len(read_TD)}):
        running.update(read_TD[done:length].data)
        digests[length], done = running.digest(), length
    return digests


def _with_rows(held: Session, before: int, unit_TD: FloatArray) -> FloatArray:
    """Return room with the first `before` rows of a session, then `unit_TD`.

    The session's own room is used if it is large enough and no row of it is replaced.
    """
    num_rows, room_RD = before + len(unit_TD), held.room_RD
    if before < held.num_rows or num_rows > len(room_RD):
        size = num_rows + num_rows // 2 if before else num_rows
        room_RD = np.empty((size, unit_TD.shape[1]), np.float32)
        room_RD[:before] = held.room_RD[:before]
    room_RD[before:num_rows] = unit_TD
    return room_RD


def _copied(part: Any) -> Any:
    """Return a copy of a stream's cache; `copy.deepcopy` takes ten times as long."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, list | tuple):
        return type(part)(map(_copied, part))
    if not hasattr(part, "__dict__"):
        return part
    copied = copy.copy(part)
    vars(copied).update({name: _copied(value) for name, value in vars(part).items()})
    return copied


def _storages(part: Any) -> dict[int, int]:
    """Return the bytes of every block of memory that a cache holds, by its address."""
    if isinstance(part, Tensor):
        return {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()}
    inner = part if isinstance(part, list | tuple) else getattr(part, "__dict__", {}).values()
    return {address: size for one in inner for address, size in _storages(one).items()}
