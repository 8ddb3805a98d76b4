"""Time on the fake device: what was queued on which stream, and what the host has waited for.

Each stream has a vector clock, as has the host. An operation advances the clock of its stream;
an event hands the clock of a stream to another one, or to the host, which then knows of all
that happened before. Memory that is used on two streams, of which neither knows of the other's
use, is a race, and an error. A copy to the host has arrived when the host knows of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

Clock = dict[int, int]
PACKAGE = "/brain_lightning/"


@dataclass
class Wait:
    """The host waited for the device."""

    what: str
    # Innermost first, "file:line function".
    stack: list[str]
    thread: str

    @property
    def where(self) -> str:
        """The line of the package that waited, or of whoever did."""
        ours = (line for line in self.stack if PACKAGE in line and "/tests/" not in line)
        return next(ours, self.stack[0] if self.stack else "")

    def __str__(self) -> str:
        return f"{self.what} at {self.where.rpartition(PACKAGE)[2] or self.where}"


@dataclass
class Record:
    """What happened on the device."""

    # Names of operations, and the stream of each.
    calls: list[tuple[str, int]] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    # What is wrong, and can not be raised where it happens.
    errors: list[str] = field(default_factory=list)

    def waits_of(self, thread: str = "MainThread") -> list[Wait]:
        return [wait for wait in self.waits if wait.thread == thread]


@dataclass(eq=False)
class _Arrival:
    """A copy to memory of the host that is under way."""

    to: Tensor
    values: Tensor
    stream: int
    time: int


@dataclass(eq=False)
class _Departure:
    """A copy from pinned memory of the host, which has to stay as it is meanwhile."""

    source: Tensor
    values: Tensor
    stream: int
    time: int


class Host:
    """What the host knows of the device."""

    def __init__(self) -> None:
        self.record = Record()
        self._clock: Clock = {}
        self._arrivals: list[_Arrival] = []
        self._departures: list[_Departure] = []
        self._lock = threading.RLock()

    def knows(self, clock: Clock) -> bool:
        return all(self._clock.get(stream, 0) >= time for stream, time in clock.items())

    def learn(self, clock: Clock) -> None:
        """All of this has happened: the host has waited for it, or has asked."""
        with self._lock:
            _merge(self._clock, clock)
            for arrival in [a for a in self._arrivals if self._is_over(a)]:
                self._arrivals.remove(arrival)
                arrival.to.copy_(arrival.values)
            for departure in [d for d in self._departures if self._is_over(d)]:
                self._departures.remove(departure)
                if not torch.equal(bits(departure.source), bits(departure.values)):
                    self.record.errors.append("pinned memory changed while it was copied")

    def wait(self, clock: Clock, what: str) -> None:
        self.record.waits.append(Wait(what, _stack(), threading.current_thread().name))
        self.learn(clock)

    def receive(self, to: Tensor, stream: Stream) -> None:
        """A copy that is queued: what is read too early is garbage."""
        with self._lock:
            values = to.clone()
            self._arrivals.append(_Arrival(to, values, stream.stream_id, stream.time))
            bits(to).fill_(-1)

    def send(self, source: Tensor, stream: Stream) -> None:
        departure = _Departure(source, source.clone(), stream.stream_id, stream.time)
        self._departures.append(departure)

    def _is_over(self, copy: _Arrival | _Departure) -> bool:
        return self._clock.get(copy.stream, 0) >= copy.time


class Stream:
    """Stands for torch.Stream."""

    all: ClassVar[list[Stream]] = []

    def __init__(self, device: Any = None, *, priority: int = 0) -> None:
        self.stream_id = len(Stream.all)
        Stream.all.append(self)
        self.clock: Clock = {}
        self._before: list[Stream] = []

    @property
    def device(self) -> torch.device:
        return torch.device("fake:0")

    @property
    def time(self) -> int:
        return self.clock.get(self.stream_id, 0)

    def is_capturing(self) -> bool:
        """Whether a graph is recorded, which optimizers of torch 2.15 ask."""
        return False

    def advance(self) -> int:
        """Something is queued on it."""
        self.clock[self.stream_id] = self.time + 1
        return self.time

    def __enter__(self) -> Stream:
        self._before.append(current_stream())
        set_stream(self)
        return self

    def __exit__(self, *error: object) -> None:
        set_stream(self._before.pop())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event("fake")
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        _merge(self.clock, stream.clock)

    def query(self) -> bool:
        return HOST.knows(self.clock)

    def synchronize(self) -> None:
        HOST.wait(self.clock, "Stream.synchronize")


class Event:
    """Stands for torch.Event. A query says no once, unless the host has waited already."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        self._clock: Clock = {}
        self._asked = False

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_stream()
        stream.advance()
        self._clock = dict(stream.clock)
        self._asked = False

    def wait(self, stream: Stream | None = None) -> None:
        _merge((stream or current_stream()).clock, self._clock)

    def query(self) -> bool:
        if self._asked:
            HOST.learn(self._clock)
        self._asked = True
        return HOST.knows(self._clock)

    def synchronize(self) -> None:
        if not HOST.knows(self._clock):
            HOST.wait(self._clock, "Event.synchronize")


class Memory:
    """Memory of the device, which is the CPU's, and who has used it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self._home = current_stream()
        self._uses: dict[tuple[int, bool], int] = {}
        self._recorded: set[int] = set()

    def use(self, stream: Stream, writes: bool, what: str) -> None:
        for (other, wrote), time in self._uses.items():
            if (writes or wrote) and stream.clock.get(other, 0) < time:
                raise RuntimeError(
                    f"{what} on stream {stream.stream_id} does not wait for stream {other}, "
                    f"which {'writes' if wrote else 'reads'} the same memory"
                )
        self._uses[stream.stream_id, writes] = stream.time

    def record_stream(self, stream: Stream) -> None:
        self._recorded.add(stream.stream_id)

    def __del__(self) -> None:
        """The next tensor of its stream may get this memory."""
        for (other, _), time in self._uses.items():
            known = self._home.clock.get(other, 0) >= time or HOST.knows({other: time})
            if not known and other not in self._recorded:
                HOST.record.errors.append(f"memory was freed while stream {other} used it")


def current_stream(device: Any = None) -> Stream:
    """That of this thread; threads begin with the first one."""
    return getattr(_THREAD, "stream", DEFAULT)


def set_stream(stream: Stream) -> None:
    _THREAD.stream = stream


def synchronize(device: Any = None) -> None:
    everything = {stream.stream_id: stream.time for stream in Stream.all}
    HOST.wait(everything, "synchronize")


def bits(tensor: Tensor) -> Tensor:
    """A dense CPU tensor as bytes; all ones are NaN in each floating type."""
    storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (tensor.nbytes,), (1,))


@contextmanager
def recorded() -> Iterator[Record]:
    """What happens on the device meanwhile.

    Raises:
        AssertionError: Memory was used that another stream was still using.
    """
    before, HOST.record = HOST.record, Record()
    try:
        yield HOST.record
        assert not HOST.record.errors, HOST.record.errors
    finally:
        HOST.record = before


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


def _stack() -> list[str]:
    frame, lines = sys._getframe(2), []
    while frame is not None:
        code = frame.f_code
        if "/support/fake_" not in code.co_filename:
            lines.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return lines


_THREAD = threading.local()
HOST = Host()
DEFAULT = Stream()
