"""A GPU of NumPy arrays and threads, to test the order of copies and products without one.

Each stream is a thread that does its work in order, each piece as late as chance will have it.
What a stream or an event does not order happens in any order, and memory begins as garbage: a
missing wait gives a wrong product, here in some of a few dozen runs. It knows as much of CuPy as
:mod:`gpuml.blocked` and :mod:`gpuml.staging` ask for.
"""

from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np

from gpuml.devices import Device


class Event:
    """A place in a stream's queue; recorded anew it is another place."""

    def __init__(self, block: bool = False) -> None:
        self.reached: threading.Event | None = None
        self.time = 0.0

    def record(self, stream=None) -> None:
        reached = self.reached = threading.Event()

        def reach() -> None:
            self.time = time.perf_counter()
            reached.set()

        (stream or Stream.current()).queue(reach)

    def synchronize(self) -> None:
        self.reached.wait()

    @property
    def done(self) -> bool:
        return self.reached.is_set()


class Stream:
    """A thread with a queue of work."""

    all: dict[int, Stream]
    delay: float  # seconds by which work may be late
    used = threading.local()

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr = id(self)
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        Stream.all[self.ptr] = self
        threading.Thread(target=self._run, name="stream", daemon=True).start()

    @staticmethod
    def current():
        return Stream.used.stack[-1]

    def _run(self) -> None:
        chance = random.Random(self.ptr)
        while (work := self._work.get()) is not None:
            if chance.random() < 0.5:
                time.sleep(chance.random() * Stream.delay)
            work()

    def queue(self, work) -> None:
        self._work.put(work)

    def stop(self) -> None:
        self._work.put(None)

    def record(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.queue(event.reached.wait)

    def synchronize(self) -> None:
        self.record().synchronize()

    def __enter__(self):
        Stream.used.stack.append(self)
        return self

    def __exit__(self, *_) -> None:
        Stream.used.stack.pop()


class Memory:
    def __init__(self, n_bytes: int) -> None:
        self.content = np.full(n_bytes, 0xFF, np.uint8)  # NaN, or -1


class MemoryPointer:
    def __init__(self, memory: Memory, first: int) -> None:
        self._memory, self._first = memory, first

    def __add__(self, n_bytes: int):
        return MemoryPointer(self._memory, self._first + n_bytes)

    def array(self, shape, dtype):
        last = self._first + int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert last <= len(self._memory.content), "beyond the memory that was asked for"
        return self._memory.content[self._first : last].view(dtype).reshape(shape)


class Array:
    """On the simulated device: what it holds is read and written by streams."""

    def __init__(self, shape, dtype, memptr) -> None:
        self._show(memptr.array(shape, dtype))

    def _show(self, content) -> None:
        self.content, self.data = content, SimpleNamespace(ptr=content.ctypes.data)
        self.shape, self.strides, self.dtype = content.shape, content.strides, content.dtype
        self.itemsize, self.nbytes = content.itemsize, content.nbytes

    def _view(self, content):
        view = object.__new__(Array)
        view._show(content)
        return view

    @property
    def T(self):  # noqa: N802
        return self._view(self.content.T)

    def __getitem__(self, part):
        return self._view(self.content[part])


class Runtime:
    memcpyHostToDevice, memcpyDeviceToHost, memoryTypeHost = 1, 2, 1  # noqa: N815
    is_hip = False
    pinned = False  # whether all host memory is

    @staticmethod
    def pointerGetAttributes(address):  # noqa: N802
        return SimpleNamespace(type=int(Runtime.pinned))

    @staticmethod
    def memcpyAsync(to, source, n_bytes, kind, stream):  # noqa: N802
        Runtime.memcpy2DAsync(to, n_bytes, source, n_bytes, n_bytes, 1, kind, stream)

    @staticmethod
    def memcpy2DAsync(to, to_pitch, source, source_pitch, width, height, kind, stream):  # noqa: N802
        assert min(to_pitch, source_pitch) >= width

        def copy() -> None:
            for i in range(height):
                ctypes.memmove(to + i * to_pitch, source + i * source_pitch, width)

        Stream.all[stream].queue(copy)


def multiply_into(a, b, out, *, add=False, precision=None) -> None:
    """Queue a product in the current stream."""

    def multiply() -> None:
        product = a.content.astype(out.dtype) @ b.content.astype(out.dtype)
        out.content[...] = out.content + product if add else product

    Stream.current().queue(multiply)


class SimulatedGPU(Device):
    @property
    def xp(self):
        pool = SimpleNamespace(free_all_blocks=lambda: None)
        return SimpleNamespace(get_default_memory_pool=lambda: pool)

    def use(self):
        return nullcontext()

    def memory(self):
        return 10**9, 10**9

    def synchronize(self) -> None:
        for stream in list(Stream.all.values()):
            stream.synchronize()

    def __str__(self) -> str:
        return "a simulated GPU"


def modules() -> dict[str, ModuleType]:
    """Return what to import as CuPy."""
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.cuda, cupy.ndarray = cuda, Array
    cuda.Stream, cuda.Event, cuda.runtime = Stream, Event, Runtime
    cuda.Memory, cuda.MemoryPointer = Memory, MemoryPointer
    cuda.alloc_pinned_memory = bytearray
    cuda.get_elapsed_time = lambda begin, end: 1e3 * (end.time - begin.time)
    Stream.all, Stream.delay, Stream.used = {}, 0.0, threading.local()
    Stream.used.stack = [Stream()]
    return {"cupy": cupy, "cupy.cuda": cuda}
