"""Somebody else's function, run with a limit of time and of memory, in this process.

It needs arrays of a GPU, and names of a notebook, which no other process has. So it runs in a
thread. The main thread looks at the clock and at the memory, and stops it by an exception.

What that can do, and what not:

- A loop of Python's is stopped between two of its instructions, on every system. If it catches
  every exception (``except:``), it gets one that comes back as soon as it is caught. (Python 3.12
  has a gap: an empty handler of an error that comes in each round goes on.)
- One call of a library (a product, a sort, ``time.sleep``) is left to end by itself; the main
  thread goes on after a grace of two seconds, and says so.
- On Linux an array that is too large is refused when it is asked for; on a GPU by the limit of
  CuPy's pool. Elsewhere memory is looked at every few milliseconds. These limits are those of the
  whole process. Whoever goes on in the background keeps them in force.
- A call that keeps Python's lock, such as ``sum(itertools.count())``, and a kernel that never
  ends in the middle of the function: only a restart of the kernel stops these.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import io
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from gpuml.devices import Device
from gpuml.timing import resident_memory

LINUX = Path("/proc/self/statm").exists()
LOOK = 0.005  # seconds between two looks at the memory
GRACE = 2.0  # seconds that a function has to end, once it is told to
AT_EXIT = 10.0  # seconds that Python's end waits for who goes on
SLACK = 2**28  # bytes beside the limit that the system grants: stacks of threads, compiled code
MOST_PRINTED = 10_000  # characters that are kept

Verdict = Literal["returned", "raised", "too long", "too much"]


@dataclass
class Run:
    """How a call went.

    Attributes
    ----------
    verdict : {"returned", "raised", "too long", "too much"}
    value : object
        What was returned.
    error : BaseException or None
        What was raised.
    printed : str
        What went to standard output, its first part.
    ended : bool
        Whether it really ended, or goes on in the background.
    """

    verdict: Verdict = "returned"
    value: Any = None
    error: BaseException | None = None
    printed: str = ""
    ended: bool = True


class _Stop(BaseException):  # no Exception: `except Exception` in a loop must not catch it
    pass


# For a thread, by its number: raise this class before the next instruction; nothing, if it is NULL.
_have_raise = ctypes.PYFUNCTYPE(None, ctypes.c_ulong, ctypes.py_object)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)
_NULL = ctypes.py_object()


def _insistent(ident: int) -> type[_Stop]:
    """Return an exception that a thread raises again as soon as it has caught it.

    Whoever catches one makes an object of its class first. Here that is a call in C, so that the
    next one is raised in the handler, not here.
    """
    again = type("_Stop", (_Stop,), {})
    again.__init__ = staticmethod(partial(_have_raise, ident, again))  # type: ignore[misc]
    return again


class _Bounded(io.StringIO):
    """Text up to a length; what comes after is counted as written and forgotten."""

    def write(self, text: str) -> int:
        room = MOST_PRINTED - self.tell()
        if room > 0:
            super().write(text[:room])
        return len(text)

    def close(self) -> None:
        """Stay open, whoever closes it."""


def run_bounded(
    function: Callable[[], Any], *, device: Device, time_limit: float, memory_limit: int
) -> Run:
    """Call a function, and return what came of it within the limits.

    Parameters
    ----------
    function : callable
    device : Device
        Current while it runs, and waited for afterwards.
    time_limit : float
        Seconds.
    memory_limit : int
        Bytes more than before, in the host's memory, and as many on the device.

    Returns
    -------
    Run
    """
    _warm(device)
    run, printed, errors = Run(), _Bounded(), _Bounded()
    answer = _Answer(function, device, run, memory_limit)
    with redirect_stdout(printed), redirect_stderr(errors):
        before, start = memory_in_use(), time.perf_counter()
        answer.start()
        try:
            while answer.is_alive() and run.verdict == "returned":
                answer.join(LOOK)
                if time.perf_counter() - start > time_limit:
                    run.verdict = "too long"
                elif memory_in_use() - before > memory_limit:
                    run.verdict = "too much"
        except MemoryError:  # it has left nothing to look with
            run.verdict = "too much"
        finally:  # also when the user interrupts
            with _silent_stops():
                run.ended = answer.stop()
    run.printed = printed.getvalue()
    print(errors.getvalue(), end="", file=sys.stderr)
    if run.error is not None and run.verdict == "returned":
        lacking = isinstance(run.error, MemoryError)
        run.verdict = "too much" if lacking else "raised"
    return run


class _Answer(threading.Thread):
    """The thread of a call, which can be stopped."""

    def __init__(
        self, function: Callable[[], Any], device: Device, outcome: Run, memory_limit: int
    ) -> None:
        super().__init__(name="answer", daemon=True)
        self._call = function, device, outcome
        self._limits = _limits(device)
        self._memory_limit = memory_limit
        self._leaving = threading.Lock()  # whoever has it: the thread when it leaves, for good
        self._told = False  # to end

    def start(self) -> None:
        for limit in self._limits:
            limit.take(self, self._memory_limit)
        try:
            super().start()
        except BaseException:
            self._release()
            raise

    def run(self) -> None:
        function, device, outcome = self._call
        calm = partial(_have_raise, threading.get_ident(), _NULL)
        try:
            try:
                with device.use():
                    outcome.value = function()
                    device.synchronize()
            except _Stop:  # the main thread knows why
                calm()
            except BaseException as error:
                outcome.error = error
            self._leaving.acquire()
        except _Stop:  # told so after its end
            calm()
            self._leaving.acquire(blocking=False)
        self._release()
        if self._told:
            _settle()

    def stop(self) -> bool:
        """End it, if it has not ended, and say whether that worked."""
        begin = time.perf_counter()
        while self.is_alive() or (self._told and _simulated()):
            self._told = True
            waited = time.perf_counter() - begin
            if waited > GRACE:
                _settle()
                return not self.is_alive()
            # whoever is leaving must not be disturbed: Python's own clearing up would be
            if self._leaving.acquire(blocking=False):
                _raise_in(self, insistent=waited > GRACE / 4)
                self._leaving.release()
            for other in _simulated():
                _raise_in(other)  # perhaps it is only about to start, and cannot be joined
            if self.is_alive():
                self.join(0.01)
            else:
                time.sleep(0.01)
        self._release()
        if self._told:
            _settle()
        return True

    def _release(self) -> None:
        for limit in self._limits:
            limit.release(self)


def _simulated() -> list[threading.Thread]:
    """Return the threads of a kernel that Numba simulates."""
    return [t for t in threading.enumerate() if type(t).__module__.startswith("numba.")]


@atexit.register
def _leave() -> None:
    """Wait for who goes on in the background: BLAS cannot end with the process in a product."""
    running = [t for t in threading.enumerate() if isinstance(t, _Answer)]
    end = time.perf_counter() + AT_EXIT
    for answer in running:
        answer.join(max(0.0, end - time.perf_counter()))
    if any(answer.is_alive() for answer in running):
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(0 if getattr(sys, "last_value", None) is None else 1)


@cache
def _warm(device: Device) -> None:
    """Load what a first product loads, which is nobody's fault: hundreds of megabytes on a GPU."""
    if device.kind == "gpu":
        with device.use():
            for dtype in ("float32", "float64"):
                ones = device.xp.ones((2, 2), dtype)
                ones @ ones
            device.synchronize()


def memory_in_use() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not say."""
    if not LINUX:
        with suppress(ImportError):
            import psutil  # every notebook's kernel has it

            return int(psutil.Process().memory_info().rss)
    return resident_memory()


def give_back(device: Device) -> None:
    """Give free memory back to the system, which the allocators would keep for later.

    An array of more than a few megabytes goes back by itself. Lists and smaller arrays lie side by
    side with what is still in use, and the C library does not look for the gaps until it is told
    to.
    """
    gc.collect()
    if LINUX:
        with suppress(AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)
    if device.kind == "gpu":
        with device.use():
            device.xp.get_default_memory_pool().free_all_blocks()


def _raise_in(thread: threading.Thread, *, insistent: bool = False) -> None:
    """Have a thread raise before its next instruction; nothing, if it has ended."""
    if thread.ident is not None:
        _have_raise(thread.ident, _insistent(thread.ident) if insistent else _Stop)


def _settle() -> None:
    """Let this thread take a stop, after which Python looks for no others.

    Before version 3.13 it goes on looking if one was taken back, or its thread has ended: at every
    call, which costs time, and forever where calls are traced.
    """
    with suppress(_Stop):
        _have_raise(threading.get_ident(), _Stop)
        while True:
            pass


@contextmanager
def _silent_stops() -> Iterator[None]:
    """Print no traceback where a thread ends because it was told to, or its destructors do."""
    in_threads, unraisable = threading.excepthook, sys.unraisablehook
    caught: list[Any] = []

    def hook(arguments: threading.ExceptHookArgs, /) -> None:
        if not _is_stop(arguments):
            in_threads(arguments)

    threading.excepthook = hook
    sys.unraisablehook = caught.append  # a function in Python would be stopped, too
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = in_threads, unraisable
    for arguments in caught:
        if not _is_stop(arguments):
            unraisable(arguments)


def _is_stop(arguments: Any) -> bool:
    return arguments.exc_type is not None and issubclass(arguments.exc_type, _Stop)


# --- limits of the process ---------------------------------------------------------------------


class _Limit:
    """A limit of the whole process, as it was again when nobody needs it any more.

    An answer that nobody can stop may end during the next one, or after it.
    """

    def __init__(
        self, used: Callable[[], int], read: Callable[[], int], write: Callable[[int], Any]
    ) -> None:
        self._used, self._read, self._write = used, read, write
        self._lock = threading.Lock()
        self._holders: dict[object, int] = {}
        self._before = 0  # no positive number, if there was none

    def take(self, holder: object, n_bytes: int) -> None:
        """Refuse from now on what is beyond so many bytes more."""
        with self._lock:
            if not self._holders:
                self._before = self._read()
            wanted = self._used() + n_bytes
            self._holders[holder] = min(wanted, self._before) if self._before > 0 else wanted
            self._write(self._holders[holder])

    def release(self, holder: object) -> None:
        """Refuse it no longer for this holder, who may have done so before."""
        with self._lock:
            if self._holders.pop(holder, None) is not None:
                self._write([self._before, *self._holders.values()][-1])


def _granted() -> int:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return soft


def _grant(n_bytes: int) -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, most))


def _in_use() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[5]) * mmap.PAGESIZE + SLACK


# Elsewhere such a limit may exist, but is not kept.
_HOST_LIMITS = [_Limit(_in_use, _granted, _grant)] if LINUX else []


@cache
def _pool_limit(device: Device) -> _Limit:
    def in_its_pool(method: str, **options: int) -> int:
        with device.use():
            pool = device.xp.get_default_memory_pool()
            return int(getattr(pool, method)(**options) or 0)

    return _Limit(
        lambda: in_its_pool("used_bytes"),
        lambda: in_its_pool("get_limit"),
        lambda n_bytes: in_its_pool("set_limit", size=n_bytes),
    )


def _limits(device: Device) -> list[_Limit]:
    """Return what refuses memory that is asked for: the system, and CuPy's pool."""
    return [*_HOST_LIMITS, *([_pool_limit(device)] if device.kind == "gpu" else [])]
