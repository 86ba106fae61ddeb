"""Somebody else's function, run with a limit of time and of memory, in this process.

It needs arrays of a GPU, and names of a notebook, which no other process has. So it runs in a
thread. The main thread looks at the clock and at the memory, and stops it by an exception.

What that can do, and what not:

- A loop of Python's is stopped between two of its instructions, on every system.
- One call of a library (a product, a sort, ``time.sleep``) is left to end by itself; the main
  thread goes on after a grace of two seconds, and says so.
- On Linux an array that is too large is refused when it is asked for; on a GPU by the limit of
  CuPy's pool. Elsewhere memory is looked at every few milliseconds.
- A call that keeps Python's lock, such as ``sum(itertools.count())``, and a kernel that never
  ends in the middle of the function: only a restart of the kernel stops these.
"""

from __future__ import annotations

import ctypes
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from gpuml.devices import Device
from gpuml.timing import resident_memory

LINUX = Path("/proc/self/statm").exists()
LOOK = 0.005  # seconds between two looks at the memory
GRACE = 2.0  # seconds that a function has to end, once it is told to
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


class _Bounded(io.StringIO):
    """Text up to a length; what comes after is counted as written and forgotten."""

    def write(self, text: str) -> int:
        room = MOST_PRINTED - self.tell()
        if room > 0:
            super().write(text[:room])
        return len(text)


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
    run, printed = Run(), _Bounded()

    def work() -> None:
        try:
            with device.use(), _limited(device, memory_limit):
                run.value = function()
                device.synchronize()
        except _Stop:
            pass  # the main thread knows why
        except BaseException as error:
            run.error = error

    thread = threading.Thread(target=work, name="answer", daemon=True)
    with redirect_stdout(printed), _silent_stops():
        before, start = memory_in_use(), time.perf_counter()
        thread.start()
        try:
            while thread.is_alive() and run.verdict == "returned":
                thread.join(LOOK)
                if time.perf_counter() - start > time_limit:
                    run.verdict = "too long"
                elif memory_in_use() - before > memory_limit:
                    run.verdict = "too much"
        finally:  # also when the user interrupts
            run.ended = _stop(thread)
    run.printed = printed.getvalue()
    if run.error is not None and run.verdict == "returned":
        lacking = isinstance(run.error, MemoryError)
        run.verdict = "too much" if lacking else "raised"
    return run


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


def _stop(thread: threading.Thread) -> bool:
    """End a thread, if it has not ended, and those of a simulated kernel; say whether they did."""
    patience = time.perf_counter() + GRACE
    while thread.is_alive():
        if time.perf_counter() > patience:
            return False
        for one in threading.enumerate():
            simulated = type(one).__module__.startswith("numba.")
            if (one is thread or simulated) and one.ident is not None:
                _raise_in(one.ident)
        thread.join(0.05)
    return True


def _raise_in(ident: int) -> None:
    """Have a thread raise before its next instruction; nothing, if it has ended."""
    stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
    stop(ctypes.c_ulong(ident), ctypes.py_object(_Stop))


@contextmanager
def _silent_stops() -> Iterator[None]:
    """Print no traceback where a thread ends because it was told to."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs, /) -> None:
        if arguments.exc_type is not _Stop:
            usual(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


@contextmanager
def _limited(device: Device, n_bytes: int) -> Iterator[None]:
    """Have the system, and CuPy's pool, refuse what is beyond the limit."""
    with _limited_host(n_bytes):
        if device.kind == "cpu":
            yield
            return
        pool = device.xp.get_default_memory_pool()
        before = pool.get_limit()
        pool.set_limit(size=pool.used_bytes() + n_bytes)
        try:
            yield
        finally:
            pool.set_limit(size=before)


@contextmanager
def _limited_host(n_bytes: int) -> Iterator[None]:
    if not LINUX:  # elsewhere the limit may exist, but is not kept
        yield
        return
    import resource

    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[5]) * resource.getpagesize()
    wanted = now + n_bytes + SLACK
    for limit in (before, most):
        if limit != resource.RLIM_INFINITY:
            wanted = min(wanted, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))
