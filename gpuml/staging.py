"""Copies between host memory and a GPU, through pinned buffers that several threads fill.

Only pinned memory, which the system may not move, can be copied while the GPU computes. Pinning
the user's arrays would cost more than copying them. So they pass through a few pinned buffers.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from gpuml.blocking import EMPTY, FILL, IN, OUT
from gpuml.devices import CPU, Array, Device, cpu_count

# On an NVIDIA H200 host with 16 cores: 1 MiB buffers 6, 2 MiB 11, 4 MiB 39, 8 MiB 50 GB/s with 12
# threads. The smaller they are, the more often the threads wait for Python's lock.
BUFFER_BYTES = 8 * 2**20
BUFFERS_EACH = 2  # for a thread: it fills one while the other is copied
MOST_THREADS = 16  # so that the buffers of both directions take half a GiB at most


def copy_threads(n_cores: int | None = None) -> int:
    """Return how many threads of the host should copy in one direction, on so many cores."""
    return max(1, min(MOST_THREADS, (n_cores or cpu_count()) * 3 // 4))


class Trace:
    """When each piece of work began and ended, on the host and on the device."""

    def __init__(self, device: Device) -> None:
        self._host: list[tuple[str, float, float]] = []
        self._device: list[tuple[str, Any, Any]] = []
        self._zero = None
        if device.kind == "gpu":
            device.synchronize()
            with device.use():  # events of two devices cannot be compared
                self._zero = self.event()
                self._zero.synchronize()  # no other stream would wait for it
        self._start = time.perf_counter()

    @classmethod
    def none(cls) -> Trace:
        """Return a trace that notes nothing."""
        return _NoTrace(CPU)

    @staticmethod
    def event() -> Any:
        """Return an event, recorded in the current stream."""
        import cupy

        event = cupy.cuda.Event()
        event.record()
        return event

    def on_host(self, kind: str, begin: float, end: float) -> None:
        """Note work on the host, by time.perf_counter()."""
        self._host.append((kind, begin, end))

    def on_device(self, kind: str, begin: Any, end: Any) -> None:
        """Note work between two events of the device."""
        self._device.append((kind, begin, end))

    def spans(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return begin and end of each piece of work, by kind.

        Returns
        -------
        dict of str to numpy.ndarray of shape (n, 2)
            Seconds since the trace began, in order. The device must be done.
        """
        found = [(kind, b - self._start, e - self._start) for kind, b, e in self._host]
        if self._device:
            from cupy.cuda import get_elapsed_time

            found += [
                (kind, *(get_elapsed_time(self._zero, event) / 1e3 for event in (b, e)))
                for kind, b, e in self._device
            ]
        found.sort()
        groups = itertools.groupby(found, key=lambda item: item[0])
        return {kind: np.array([item[1:] for item in group]) for kind, group in groups}


class _NoTrace(Trace):
    def on_host(self, kind: str, begin: float, end: float) -> None:
        pass

    def on_device(self, kind: str, begin: Any, end: Any) -> None:
        pass


class Transfer:
    """A block on its way between a host array and a device array of the same shape.

    It is cut into parts, rows by columns, that fit into a pinned buffer each. Made by
    :meth:`Stager.load` and :meth:`Stager.store`.
    """

    def __init__(
        self, host: Array, there: Array, stream: Any, after: Any, part_bytes: int | None
    ) -> None:
        self.host, self.there, self.stream, self.after = host, there, stream, after
        rows, columns = host.shape
        n = rows * columns if part_bytes is None else max(1, part_bytes // there.itemsize)
        self._columns = min(columns, n)
        self._rows = min(rows, n // self._columns)
        self._across = -(-columns // self._columns)
        self.n_parts = self._across * -(-rows // self._rows)
        self._taken = self._queued = self._finished = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.straight: Any = None  # the event after a copy from or to memory that is pinned itself

    def take(self) -> int | None:
        """Return the number of a part that nobody has taken, or None."""
        with self._changed:
            if self._taken == self.n_parts:
                return None
            self._taken += 1
            return self._taken - 1

    def part(self, i: int) -> Array:
        """Return part number i of the host array."""
        row, column = (i // self._across) * self._rows, (i % self._across) * self._columns
        return self.host[row : row + self._rows, column : column + self._columns]

    def copy(self, i: int, pinned: Array) -> tuple[Any, Any]:
        """Queue the copy of a part between a pinned array and the device.

        Returns
        -------
        tuple of two cupy.cuda.Event
            Before and after the copy.
        """
        import cupy

        runtime, there = cupy.cuda.runtime, self.there
        row, column = (i // self._across) * self._rows, (i % self._across) * self._columns
        address = there.data.ptr + row * there.strides[0] + column * there.itemsize
        height, width = pinned.shape[0], pinned.shape[1] * there.itemsize
        pitches = (there.strides[0], pinned.strides[0]) if height > 1 else (width, width)
        to, back = (address, pitches[0]), (pinned.ctypes.data, pitches[1])
        if self.after is not None:
            self.stream.wait_event(self.after)
            to, back = back, to
        way = runtime.memcpyHostToDevice if self.after is None else runtime.memcpyDeviceToHost
        begin, end = cupy.cuda.Event(block=True), cupy.cuda.Event(block=True)
        begin.record(self.stream)
        if pitches == (width, width):  # one piece: rows one by one may be slower
            runtime.memcpyAsync(to[0], back[0], width * height, way, self.stream.ptr)
        else:
            runtime.memcpy2DAsync(*to, *back, width, height, way, self.stream.ptr)
        end.record(self.stream)
        return begin, end

    def note(self, *, queued: int = 0, finished: int = 0, error: Any = None) -> None:
        """Count parts as queued or as finished, or keep an error."""
        with self._changed:
            self._queued += queued
            self._finished += finished
            self._error = self._error or error
            if self._error or self.n_parts in (self._queued, self._finished):
                self._changed.notify_all()

    @property
    def done(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        if self.straight is not None:
            return bool(self.straight.done)
        return self._error is not None or self._finished == self.n_parts

    def wait_queued(self) -> None:
        """Wait until all parts are in the stream's queue, though not yet copied."""
        self._wait(lambda: self._queued == self.n_parts)

    def wait(self) -> None:
        """Wait until nothing is left to do on the host: what was stored is there."""
        if self.straight is not None:
            self.straight.synchronize()
            return
        self._wait(lambda: self._finished == self.n_parts)

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or done())
        if self._error:
            raise self._error


class Stager:
    """Threads that move blocks between host arrays and one GPU, in one direction.

    Use as a context manager: at the end the threads are stopped and waited for; what is still
    under way is given up.

    Parameters
    ----------
    device : Device
        A GPU.
    n_threads : int
        Each has pinned buffers of its own.
    trace : Trace
        Gets the times of all copies.
    """

    def __init__(self, device: Device, n_threads: int, trace: Trace) -> None:
        self._device, self._trace = device, trace
        self._waiting: deque[Transfer] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._n_threads = n_threads
        self._threads: list[threading.Thread] = []  # begun when there is something to copy

    def __enter__(self) -> Stager:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            for transfer in self._waiting:
                transfer.note(error=RuntimeError("the transfer was given up"))
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def load(self, source: Array, target: Array, stream: Any, rows: Any = None) -> Transfer:
        """Copy a host array to the device, converted to its type on the way.

        Parameters
        ----------
        source : numpy.ndarray of shape (m, n)
            Any strides, any type.
        target : cupy.ndarray of shape (m, n)
            Its rows contiguous.
        stream : cupy.cuda.Stream
            Where the copies are queued.
        rows : numpy.ndarray of int, shape (m,), optional
            Which rows of `source` to gather; then it may have any number of rows.

        Returns
        -------
        Transfer
        """
        if rows is not None:
            source = _Gathered(source, rows, slice(None))
        return self._submit(source, target, stream, None)

    def store(self, source: Array, target: Array, stream: Any, after: Any) -> Transfer:
        """Copy a device array to the host, converted to the host array's type there.

        Parameters
        ----------
        source : cupy.ndarray of shape (m, n)
            Its rows contiguous.
        target : numpy.ndarray of shape (m, n)
            Any type, any strides.
        stream : cupy.cuda.Stream
            Where the copies are queued.
        after : cupy.cuda.Event
            The copies wait for it.

        Returns
        -------
        Transfer
        """
        return self._submit(target, source, stream, after)

    def _submit(self, host: Array, there: Array, stream: Any, after: Any) -> Transfer:
        if not isinstance(host, _Gathered) and host.dtype == there.dtype and _goes_straight(host):
            transfer = Transfer(host, there, stream, after, None)
            events = transfer.copy(0, host)
            self._trace.on_device(IN if after is None else OUT, *events)
            transfer.note(queued=1)
            transfer.straight = events[1]
            return transfer
        transfer = Transfer(host, there, stream, after, BUFFER_BYTES)
        with self._changed:
            self._waiting.append(transfer)
            self._changed.notify_all()
        while len(self._threads) < self._n_threads:
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        return transfer

    def _next(self) -> tuple[Transfer, int] | None:
        """Return a part to move, as soon as there is one; None at the end."""
        with self._changed:
            while not self._closed:
                while self._waiting:
                    i = self._waiting[0].take()
                    if i is not None:
                        return self._waiting[0], i
                    self._waiting.popleft()
                self._changed.wait()
        return None

    def _work(self) -> None:
        buffers: list[_Buffer] = []
        with self._device.use():
            while (job := self._next()) is not None:
                transfer, i = job
                try:
                    if len(buffers) < BUFFERS_EACH:
                        buffers.append(_Buffer())
                    buffers.append(buffers.pop(0))  # the one that has waited longest
                    move = self._fill if transfer.after is None else self._empty
                    move(transfer, i, buffers[-1])
                except BaseException as error:
                    transfer.note(error=error)
            for buffer in buffers:
                buffer.wait()  # nothing may be copied from memory that is given back

    def _fill(self, transfer: Transfer, i: int, buffer: _Buffer) -> None:
        buffer.wait()
        source = transfer.part(i)
        pinned = buffer.array(source.shape, transfer.there.dtype)
        begin = time.perf_counter()
        if isinstance(source, _Gathered):
            source.copy_to(pinned)
        else:
            with np.errstate(over="ignore"):  # what is too large becomes infinite
                np.copyto(pinned, source, casting="unsafe")
        self._trace.on_host(FILL, begin, time.perf_counter())
        events = transfer.copy(i, pinned)
        buffer.copied = events[1]
        self._trace.on_device(IN, *events)
        transfer.note(queued=1, finished=1)

    def _empty(self, transfer: Transfer, i: int, buffer: _Buffer) -> None:
        target = transfer.part(i)
        pinned = buffer.array(target.shape, transfer.there.dtype)
        events = transfer.copy(i, pinned)
        self._trace.on_device(OUT, *events)
        transfer.note(queued=1)
        events[1].synchronize()
        begin = time.perf_counter()
        with np.errstate(over="ignore"):  # what is too large for 16 bits becomes infinite
            np.copyto(target, pinned, casting="unsafe")
        self._trace.on_host(EMPTY, begin, time.perf_counter())
        transfer.note(finished=1)


@dataclass(frozen=True)
class _Gathered:
    """Some rows of a host array, gathered when they are copied."""

    source: Array
    rows: Any
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        first, last, _ = self.columns.indices(self.source.shape[1])
        return len(self.rows), last - first

    def __getitem__(self, part: tuple[slice, slice]) -> _Gathered:
        return _Gathered(self.source, self.rows[part[0]], part[1])

    def copy_to(self, pinned: Array) -> None:
        source = self.source[:, self.columns]
        if source.dtype == pinned.dtype and source.flags.c_contiguous:
            np.take(source, self.rows, axis=0, out=pinned, mode="clip")
        else:
            np.copyto(pinned, source[self.rows], casting="unsafe")


class _Buffer:
    """A pinned buffer, and the event after which it is free again."""

    def __init__(self) -> None:
        import cupy

        memory = cupy.cuda.alloc_pinned_memory(BUFFER_BYTES)
        self._bytes = np.frombuffer(memory, np.uint8, BUFFER_BYTES)
        self.copied: Any = None

    def array(self, shape: tuple[int, ...], dtype: Any) -> Array:
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        return self._bytes[:n_bytes].view(dtype).reshape(shape)

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def _goes_straight(host: Array) -> bool:
    """Return whether an array can be copied as it is: pinned, its rows contiguous and apart."""
    apart = len(host) == 1 or host.strides[0] >= host.shape[1] * host.itemsize
    return bool(host.strides[1] == host.itemsize and apart) and is_pinned(host)


def is_pinned(array: Array) -> bool:
    """Return whether all of a host array is pinned memory, such as ``cupyx.empty_pinned`` gives."""
    from cupy.cuda import runtime

    low, high = byte_bounds(array)
    ends = (runtime.pointerGetAttributes(address) for address in (low, high - 1))
    return all(end.type == runtime.memoryTypeHost for end in ends)
