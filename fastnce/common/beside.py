"""Compute independent work of a step at the same time, on CUDA streams of its own.

A convolution of one image fills about half of a large GPU. Methods and layers say here which work is independent:
`beside` runs two parts, `active()` offers to compute something aside. Without `streaming`, everything runs one after
another in the same order, with the same results.

Memory: PyTorch's allocator gives freed memory to the next allocation of the stream that allocated it, without waiting
for other streams. Three rules make that safe, in the warm-up as in a recording:

- what `aside` reads is kept until the stream that called it has waited for the work;
- results of the second part of `beside` are recorded for the stream that gets them;
- every stream begins its work by waiting for the stream that started it, and `join` waits for all of them. A caller
  keeps what the second part of `beside` reads until `join`.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .taps import Tap

First = TypeVar("First")
Second = TypeVar("Second")

IN_FLIGHT = 2
"""Computations aside that a stream may be ahead of. More would keep more maps in memory."""


class Streams(Protocol):
    """What `streaming` needs of a device."""

    def beside(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]: ...

    def aside(self, work: Callable[[], First], reads: tuple[Tensor, ...]) -> First: ...

    def join(self) -> None: ...

    def drop(self) -> None: ...


class _Active(threading.local):
    streams: Streams | None = None


_active = _Active()


def active() -> Streams | None:
    """The streams of the step that this thread runs now; None if it computes one thing after another.

    Autograd computes backward passes in threads of its own: keep the streams of the forward pass for them.
    """
    return None if torch.compiler.is_compiling() else _active.streams


@contextmanager
def streaming(streams: Streams | None) -> Iterator[None]:
    """Within: independent work runs on `streams`. All of it is joined at the end, or dropped after an error."""
    before, _active.streams = _active.streams, streams
    try:
        yield
        join()
    except BaseException:
        if streams is not None:
            streams.drop()
        raise
    finally:
        _active.streams = before


def beside(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """Compute two parts that do not depend on each other; returns both results.

    The host starts the first part first, so random numbers are those of the same calls one after another.
    """
    streams = active()
    return (first(), second()) if streams is None else streams.beside(first, second)


def join() -> None:
    """Let the current stream wait for all work that was started beside it or aside."""
    if streams := active():
        streams.join()


@functools.cache
def _stream(device: int, beside: bool, aside: bool) -> torch.cuda.Stream:
    """The streams of all steps on a device: libraries keep some ten MiB of scratch memory per stream."""
    return torch.cuda.Stream(device)


class CudaStreams:
    """At most four streams: the one of the step, one beside it, and for each one aside."""

    def __init__(self, device: torch.device):
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self._used: set[torch.cuda.Stream] = set()
        self._flights: dict[torch.cuda.Stream, deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]]] = {}

    def beside(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
        """Run `second` on another stream; the current one waits for it after `first`. Inner calls run in order."""
        here, there = torch.cuda.current_stream(self.index), _stream(self.index, True, False)
        if here == there:
            return first(), second()
        there.wait_stream(here)
        self._used.add(there)
        one = first()
        with torch.cuda.stream(there):
            other = second()
        here.wait_stream(there)
        _record(other, here)
        return one, other

    def aside(self, work: Callable[[], First], reads: tuple[Tensor, ...]) -> First:
        """Run `work`, whose results may be read after `join`, on a stream of its own for each stream that calls.

        Args:
            reads: the tensors that the work reads. They are kept until the caller's stream has waited for the work.
        """
        here = torch.cuda.current_stream(self.index)
        there = _stream(self.index, here == _stream(self.index, True, False), True)
        there.wait_stream(here)
        self._used.add(there)
        with torch.cuda.stream(there):
            result = work()
        flight = self._flights.setdefault(here, deque())
        flight.append((there.record_event(), reads))
        if len(flight) > IN_FLIGHT:
            event, _ = flight.popleft()
            here.wait_event(event)
        return result

    def join(self) -> None:
        here = torch.cuda.current_stream(self.index)
        for stream, flight in self._flights.items():  # the memory of what they keep belongs to these streams
            if flight:
                stream.wait_event(flight[-1][0])
        for stream in self._used - {here}:
            here.wait_stream(stream)
        self._flights.clear()

    def drop(self) -> None:
        """Keep nothing for work that was started. Nobody reads its results."""
        self._flights.clear()


def _record(value: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that a stream uses the tensors of a result, which another stream has made."""
    if isinstance(value, Tensor | Tap):
        value.record_stream(stream)
    elif isinstance(value, dict):
        _record(list(value.values()), stream)
    elif isinstance(value, list | tuple):
        for one in value:
            _record(one, stream)
