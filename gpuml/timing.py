"""Honest timing: one function, several devices, and what a device can do at most.

Work on a GPU is queued: a call returns before it is done. So a stopwatch around the call measures
nothing; here the device itself notes when work begins and ends.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any

import numpy as np

from gpuml.devices import CPU, Device, device_of, get_device, to_host
from gpuml.model_files import replacing

# A sample on the CPU lasts at least this long, in seconds, so that reading the clock (some 0.1 µs)
# does not count; a faster function is called several times in a sample.
SHORTEST_SAMPLE = 20e-6

MOST_SAMPLES = 10_000


@dataclass(frozen=True)
class Measurement:
    """How long a function takes.

    Attributes
    ----------
    seconds : float
        The median over all repeats.
    low, high : float
        The quartiles in seconds: half of the repeats lie between them.
    first : float
        Seconds of the very first call, which may load libraries, compile, and allocate.
    n_repeats : int
        How many samples the median is taken over; 1 if one call takes the whole budget.
    device : str
        On what it was measured.
    n_bytes, n_operations : float or None
        Bytes moved and arithmetic operations done by one call, where the caller said so.
    """

    seconds: float
    low: float
    high: float
    first: float
    n_repeats: int
    device: str
    n_bytes: float | None = None
    n_operations: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second, if the number of bytes is known."""
        return None if self.n_bytes is None else self.n_bytes / self.seconds

    @property
    def rate(self) -> float | None:
        """Operations per second, if their number is known."""
        return None if self.n_operations is None else self.n_operations / self.seconds

    def share(self, ceiling: float) -> float:
        """Return the share of a ceiling that is reached, from 0 to about 1.

        Parameters
        ----------
        ceiling : float
            Operations per second if the number of operations is known, else bytes per second;
            see :func:`device_ceilings`.

        Raises
        ------
        ValueError
            If neither bytes nor operations are known.
        """
        reached = self.bandwidth if self.n_operations is None else self.rate
        if reached is None:
            raise ValueError("give benchmark n_bytes or n_operations to compare with a ceiling")
        return reached / ceiling

    def __str__(self) -> str:
        text = f"{duration(self.seconds)} ({duration(self.low)} to {duration(self.high)})"
        if self.n_repeats == 1:
            text = f"{duration(self.seconds)}, measured once: longer than the time budget"
        if self.bandwidth is not None:
            text += f", {self.bandwidth / 1e9:.3g} GB/s"
        if self.rate is not None:
            text += f", {self.rate / 1e9:,.3g} GFLOP/s"
        return f"{text}; first call {duration(self.first)}; on {self.device}"


def benchmark(
    function: Callable[..., Any],
    *arguments: Any,
    device: Device | str | None = None,
    time_budget: float = 1.0,
    n_bytes: float | None = None,
    n_operations: float | None = None,
) -> Measurement:
    """Measure how long ``function(*arguments)`` takes, on the CPU or on a GPU.

    The first call is timed apart. After some calls to warm up, the function is repeated until
    the budget is spent. On a GPU each call is timed by the device, between two events in its
    queue; on the CPU by the clock. A first call of over ten budgets is all that is measured.

    Parameters
    ----------
    function : callable
        What it returns is dropped.
    *arguments
        Handed to it.
    device : Device or str, optional
        Where the work runs; that of the first array among the arguments unless given, or what
        :func:`gpuml.get_device` returns if there is none.
    time_budget : float
        Seconds to spend on repeats.
    n_bytes, n_operations : float, optional
        Bytes moved and operations done by one call; they make bandwidths and rates.

    Returns
    -------
    Measurement

    Raises
    ------
    ValueError
        If the budget is not positive.
    Exception
        Whatever the function raises.

    Examples
    --------
    >>> import numpy as np
    >>> measured = benchmark(np.sort, np.arange(1000), time_budget=0.01)
    >>> measured.low <= measured.seconds <= measured.high
    True
    """
    if not 0 < time_budget < math.inf:
        raise ValueError(f"time_budget must be a positive number of seconds, got {time_budget}")
    where = _device_for(device, arguments)
    clock = _cpu_clock if where.kind == "cpu" else _gpu_clock
    with where.use():
        where.synchronize()
        start = time.perf_counter()
        function(*arguments)
        where.synchronize()
        first = time.perf_counter() - start
        # A first call may be long because it compiles; one that is as long as this is not repeated.
        samples = [first]
        if first <= 10 * time_budget:
            samples = clock(function, arguments, time_budget)
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return Measurement(
        float(middle),
        float(low),
        float(high),
        first,
        len(samples),
        str(where),
        n_bytes,
        n_operations,
    )


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: ``"12.3 µs"``.

    Examples
    --------
    >>> duration(0.0000123), duration(2)
    ('12.3 µs', '2 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def returned_and_finished(
    work: Callable[[], Any], device: Device, n_calls: int = 100
) -> tuple[float, float]:
    """Time calls until they have returned, and until their work is finished.

    If both are equal, the device waits for the host; if not, the host for the device. On the CPU
    they are equal.

    Parameters
    ----------
    work : callable
        Without arguments; called once beforehand.
    device : Device
    n_calls : int

    Returns
    -------
    returned, finished : float
        Seconds for a call, the mean of all.
    """
    with device.use():
        work()
        device.synchronize()
        begin = time.perf_counter()
        for _ in range(n_calls):
            work()
        returned = time.perf_counter() - begin
        device.synchronize()
        return returned / n_calls, (time.perf_counter() - begin) / n_calls


def _device_for(device: Device | str | None, arguments: Sequence[Any]) -> Device:
    if device is not None:
        return get_device(device)
    for argument in arguments:
        if hasattr(argument, "__array_interface__") or hasattr(
            argument, "__cuda_array_interface__"
        ):
            return device_of(argument)
    return get_device()


def _cpu_clock(
    function: Callable[..., Any], arguments: Sequence[Any], budget: float
) -> list[float]:
    """Time samples of one or, for fast functions, several calls by the clock."""
    clock = time.perf_counter

    def sample(n_calls: int) -> float:
        start = clock()
        for _ in range(n_calls):
            function(*arguments)
        return (clock() - start) / n_calls

    end = clock() + budget
    alone = sample(1)
    if alone >= budget:
        return [alone]
    n_calls = math.ceil(SHORTEST_SAMPLE / max(alone, 1e-9))
    return _until(end, lambda: sample(n_calls))


def _gpu_clock(
    function: Callable[..., Any], arguments: Sequence[Any], budget: float
) -> list[float]:
    """Time calls between two events in the queue of the device."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()

    def sample() -> float:
        start.record()
        function(*arguments)
        stop.record()
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) / 1e3

    clock = time.perf_counter
    alone = sample()
    if alone >= budget:
        return [alone]
    _until(clock() + budget / 10, sample)  # a GPU takes a moment to reach its speed
    return _until(clock() + budget, sample)


def _until(end: float, sample: Callable[[], float]) -> list[float]:
    """Take samples until a moment of the clock, one at least."""
    samples = [sample()]
    while time.perf_counter() < end and len(samples) < MOST_SAMPLES:
        samples.append(sample())
    return samples


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Attributes
    ----------
    device : str
        ``"cpu"``, ``"gpu"``, ``"gpu:1"`` …
    size : int
    dtype : str
    transfers : bool
        Whether the way to the device and back is in the time.
    measurement : Measurement or None
        None if it was skipped.
    note : str
        Why it was skipped; empty otherwise.
    """

    device: str
    size: int
    dtype: str
    transfers: bool
    measurement: Measurement | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """One piece of work, timed over sizes and types on several devices.

    Attributes
    ----------
    name : str
        What was timed.
    devices : dict of str to str
        The full description of each device.
    rows : list of Row
    """

    name: str
    devices: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def seconds(self, device: str, size: int, dtype: str, *, transfers: bool) -> float | None:
        """Return the median of one row in seconds, or None if it was not measured."""
        for row in self.rows:
            if (row.device, row.size, row.dtype, row.transfers) == (device, size, dtype, transfers):
                return row.measurement.seconds if row.measurement else None
        return None

    def speedup(self, device: str, size: int, dtype: str, *, transfers: bool) -> float | None:
        """Return how many times faster than the CPU a device is, or None if unmeasured."""
        cpu = self.seconds("cpu", size, dtype, transfers=False)
        other = self.seconds(device, size, dtype, transfers=transfers)
        return None if cpu is None or other is None else cpu / other

    def _cells(self) -> Iterator[list[str]]:
        yield ["device", "size", "dtype", "transfers", "median", "quartiles", "GB/s", "GFLOP/s"]
        for row in self.rows:
            cells = [row.device, f"{row.size}", row.dtype, "with" if row.transfers else "without"]
            m = row.measurement
            if m is None:
                yield [*cells, row.note, "", "", ""]
                continue
            yield [
                *cells,
                duration(m.seconds),
                f"{duration(m.low)} to {duration(m.high)}",
                "" if m.bandwidth is None else f"{m.bandwidth / 1e9:.3g}",
                "" if m.rate is None else f"{m.rate / 1e9:.3g}",
            ]

    def __str__(self) -> str:
        rows = list(self._cells())
        # A note is as long as it is; it does not widen the column of times.
        widths = [max(len(r[i]) for r in rows if i < 4 or r[5]) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self.title, *lines])

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table as comma-separated values, times in seconds."""
        import csv

        with replacing(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            measured = [column.name for column in fields(Measurement) if column.name != "device"]
            writer.writerow(["device", "size", "dtype", "transfers", *measured, "note"])
            for row in self.rows:
                m = row.measurement
                numbers = ["" if m is None else getattr(m, name) for name in measured]
                writer.writerow(
                    [row.device, row.size, row.dtype, row.transfers, *numbers, row.note]
                )

    def to_json(self) -> dict[str, Any]:
        """Return the table as what JSON can hold; :meth:`from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Comparison:
        """Make a comparison again from what :meth:`to_json` returned."""
        rows = []
        for row in table["rows"]:
            measured = row["measurement"]
            rows.append(Row(**(row | {"measurement": measured and Measurement(**measured)})))
        return cls(table["name"], dict(table["devices"]), rows)

    @property
    def title(self) -> str:
        """What was timed, and on which devices."""
        return "\n".join([self.name, *(f"{name}: {text}" for name, text in self.devices.items())])

    def plot(self, title: str = "", axis: Any = None) -> Any:
        """Draw time against size, a line for each device and type; see gpuml.plots.times."""
        from gpuml import plots

        lines: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.rows:
            if row.measurement is not None:
                label = f"{row.device}, {row.dtype}" + ", with transfers" * row.transfers
                sizes, seconds = lines.setdefault(label, ([], []))
                sizes.append(row.size)
                seconds.append(row.measurement.seconds)
        return plots.times(lines, title or self.title, axis)

    def plot_crossover(self, title: str = "", axis: Any = None) -> Any:
        """Draw how many times faster the GPU is than the CPU; see gpuml.plots.crossover.

        Raises
        ------
        ValueError
            If the table has no GPU.
        """
        from gpuml import plots

        gpu = next((name for name in self.devices if name != "cpu"), "")
        if not gpu:
            raise ValueError("a crossover map needs a GPU: show a recorded one, gpuml.recorded()")
        sizes = sorted({row.size for row in self.rows})
        columns = {
            f"{dtype}\n{'with' if transfers else 'without'}\ntransfers": [
                self.speedup(gpu, size, dtype, transfers=transfers) for size in sizes
            ]
            for dtype in dict.fromkeys(row.dtype for row in self.rows)
            for transfers in (False, True)
        }
        return plots.crossover(sizes, columns, title or self.title, axis)


def compare_devices(
    work: Callable[..., Any],
    make_arguments: Callable[[int, str], Sequence[np.ndarray[Any, Any]]],
    *,
    sizes: Sequence[int],
    dtypes: Sequence[str] = ("float32",),
    devices: Sequence[Device | str] | None = None,
    name: str = "",
    n_bytes: Callable[[int, str], float] | None = None,
    n_operations: Callable[[int], float] | None = None,
    time_budget: float = 0.1,
) -> Comparison:
    """Time one piece of work over sizes and types, on each device.

    On a GPU each size is timed twice: with data and result on the device, and with the way there
    and back.

    Parameters
    ----------
    work : callable
        Takes arrays of one device and returns an array on it.
    make_arguments : callable
        ``(size, dtype) -> arrays`` in host memory.
    sizes : sequence of int
    dtypes : sequence of str
    devices : sequence of Device or str, optional
        The CPU, and the GPU if one answers, unless given.
    name : str
        What is timed, for titles.
    n_bytes : callable, optional
        ``(size, dtype) -> bytes`` moved by one call.
    n_operations : callable, optional
        ``(size) -> operations`` done by one call.
    time_budget : float
        Seconds for each entry of the table.

    Returns
    -------
    Comparison
        Sizes that do not fit into free memory are in it with a note instead of a time.

    Examples
    --------
    >>> import numpy as np
    >>> table = compare_devices(
    ...     lambda a: a + 1, lambda n, dtype: [np.ones(n, dtype)], sizes=[10, 1000],
    ...     devices=["cpu"], time_budget=0.01,
    ... )
    >>> [row.size for row in table.rows]
    [10, 1000]
    """
    if devices is None:
        here = get_device()
        devices = [CPU] if here == CPU else [CPU, here]
    chosen = {_short(device): device for device in map(get_device, devices)}
    table = Comparison(name, {short: str(device) for short, device in chosen.items()})
    for short, device in chosen.items():
        for dtype in dtypes:
            for size in sizes:
                for transfers in (False,) if device == CPU else (False, True):
                    measured, note = _compared(
                        work, make_arguments, device, size, dtype, transfers, time_budget,
                        None if n_bytes is None else n_bytes(size, dtype),
                        None if n_operations is None else n_operations(size),
                    )  # fmt: skip
                    table.rows.append(Row(short, size, dtype, transfers, measured, note))
    return table


def _short(device: Device) -> str:
    return device.kind if device.index == 0 else f"{device.kind}:{device.index}"


def _compared(
    work: Callable[..., Any],
    make_arguments: Callable[[int, str], Sequence[np.ndarray[Any, Any]]],
    device: Device,
    size: int,
    dtype: str,
    transfers: bool,
    time_budget: float,
    n_bytes: float | None,
    n_operations: float | None,
) -> tuple[Measurement | None, str]:
    """Measure one entry of a comparison, or say why it was skipped."""
    free, _ = device.memory()
    if n_bytes is not None and free is not None and n_bytes > free:
        return None, f"skipped: needs {n_bytes / 2**30:.3g} GiB, {free / 2**30:.3g} are free"
    try:
        on_host = make_arguments(size, dtype)
        on_device = [device.asarray(a) for a in on_host]
        if transfers:

            def timed() -> Any:
                return to_host(work(*[device.asarray(a) for a in on_host]))
        else:

            def timed() -> Any:
                return work(*on_device)

        return (
            benchmark(
                timed,
                device=device,
                time_budget=time_budget,
                n_bytes=n_bytes,
                n_operations=n_operations,
            ),
            "",
        )
    except MemoryError:
        return None, "skipped: not enough memory"


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most, measured.

    Attributes
    ----------
    device : str
    values : dict of str to float
        ``copy``, ``to_device_pageable``, ``to_device_pinned``, ``from_device_pageable``,
        ``from_device_pinned`` in bytes per second; ``gemm_float64``, ``gemm_float32``,
        ``gemm_tf32``, ``gemm_float16``, ``gemm_bfloat16`` in operations per second; ``launch`` in
        seconds. A CPU has no transfers.
    """

    device: str
    values: dict[str, float]

    def ridge(self, gemm: str = "gemm_float32") -> float:
        """Return the intensity, in operations per byte, at which arithmetic takes over."""
        return self.values[gemm] / self.values["copy"]

    def __str__(self) -> str:
        lines = [self.device]
        for name, value in self.values.items():
            if name == "launch":
                text = duration(value)
            elif name.startswith("gemm"):
                text = f"{value / 1e12:.3g} TFLOP/s"
            else:
                text = f"{value / 1e9:.3g} GB/s"
            lines.append(f"  {name.replace('_', ' '):22}{text:>16}")
        return "\n".join(lines)

    def plot(
        self, points: Mapping[str, Measurement] | None = None, title: str = "", axis: Any = None
    ) -> Any:
        """Draw the roofline and, on it, measurements with bytes and operations.

        Parameters
        ----------
        points : mapping of str to Measurement, optional
            Made by :func:`benchmark` with `n_bytes` and `n_operations`.
        title : str
            The device unless given.
        axis : matplotlib.axes.Axes, optional
            Where to draw.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from gpuml import plots

        placed = {}
        for name, m in (points or {}).items():
            if m.n_bytes is None or m.n_operations is None:
                raise ValueError(f"{name}: give benchmark n_bytes and n_operations")
            placed[name] = (m.n_operations / m.n_bytes, m.n_operations / m.seconds)
        return plots.roofline(self.values, placed, title or self.device, axis)


def device_ceilings(device: Device | str | None = None, *, time_budget: float = 8.0) -> Ceilings:
    """Measure bandwidths, arithmetic rates and the cost of a launch, the ceilings of a device.

    Parameters
    ----------
    device : Device or str, optional
        What :func:`gpuml.get_device` returns unless given.
    time_budget : float
        Seconds for all measurements together, setting up not counted.

    Returns
    -------
    Ceilings

    Notes
    -----
    A copy counts each byte twice, read and written. A product of two n × n matrices counts
    2 n³ operations.
    """
    where = get_device(device)
    measure = _cpu_ceilings if where == CPU else _gpu_ceilings
    with where.use():
        return Ceilings(str(where), measure(where, time_budget))


def _cpu_ceilings(device: Device, time_budget: float) -> dict[str, float]:
    budget = time_budget / 4
    source, target = np.ones(2**25, np.float32), np.zeros(2**25, np.float32)
    one = np.ones(1, np.float32)

    def rate(function: Callable[..., Any], *arguments: Any, n: float) -> float:
        return n / benchmark(function, *arguments, device=device, time_budget=budget).seconds

    values = {"copy": rate(np.copyto, target, source, n=2 * source.nbytes)}
    for dtype in ("float64", "float32"):
        a = np.random.default_rng(0).random((1024, 1024)).astype(dtype)
        values[f"gemm_{dtype}"] = rate(np.matmul, a, a, n=2 * 1024**3)
    values["launch"] = 1 / rate(np.add, one, one, n=1)
    return values


def _gpu_ceilings(device: Device, time_budget: float) -> dict[str, float]:
    import cupy
    import cupyx

    budget = time_budget / 11
    free, _ = device.memory()
    n = min(2**30, (free or 2**30) // 8) // 4

    def rate(function: Callable[..., Any], *arguments: Any, n: float) -> float:
        return n / benchmark(function, *arguments, device=device, time_budget=budget).seconds

    source, target = cupy.ones(n, cupy.float32), cupy.zeros(n, cupy.float32)
    values = {"copy": rate(cupy.copyto, target, source, n=2 * source.nbytes)}
    del source
    there = target[: n // 4]
    pageable, pinned = np.ones(n // 4, np.float32), cupyx.zeros_pinned(n // 4, np.float32)
    for kind, host in (("pageable", pageable), ("pinned", pinned)):
        values[f"to_device_{kind}"] = rate(there.set, host, n=host.nbytes)
    for kind, host in (("pageable", pageable), ("pinned", pinned)):
        values[f"from_device_{kind}"] = rate(_fetch, there, host, n=host.nbytes)
    del target, there

    for name in GEMMS:
        size = min(4096 if name == "gemm_float64" else 8192, math.isqrt(n) // 2)
        with gemm_type(name) as dtype:
            a = cupy.random.default_rng(0).random((size, size), dtype=np.float32).astype(dtype)
            values[name] = rate(cupy.matmul, a, a, n=2.0 * size**3)
    one = cupy.ones(1, cupy.float32)

    def launches() -> None:
        for _ in range(1000):
            cupy.add(one, one, out=one)
        device.synchronize()

    values["launch"] = benchmark(launches, device=CPU, time_budget=budget).seconds / 1000
    return values


GEMMS = ("gemm_float64", "gemm_float32", "gemm_tf32", "gemm_float16", "gemm_bfloat16")


@contextmanager
def gemm_type(name: str) -> Iterator[Any]:
    """Give the element type of one of the GEMMS on a GPU; tf32 is float32 multiplied coarsely."""
    import cupy
    from cupy._core import _routines_linalg as linalg

    if name == "gemm_bfloat16":
        import ml_dtypes

        yield ml_dtypes.bfloat16
        return
    float32 = cupy.dtype(np.float32)
    before = linalg.get_compute_type(float32)
    if name == "gemm_tf32":
        linalg.set_compute_type(float32, linalg.COMPUTE_TYPE_TF32)
    try:
        yield float32 if name == "gemm_tf32" else cupy.dtype(name.removeprefix("gemm_"))
    finally:
        linalg.set_compute_type(float32, before)


def _fetch(there: Any, host: np.ndarray[Any, Any]) -> None:
    there.get(out=host)


@dataclass
class MemoryUse:
    """How much more memory was in use, at most, than at the beginning: see :func:`watch_memory`.

    Attributes
    ----------
    most : int
        Bytes.
    """

    most: int = 0


def resident_memory() -> int:
    """Return the bytes of this process that are in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ImportError:
        return 0  # Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def watch_memory(device: Device | str | None = None) -> Iterator[MemoryUse]:
    """Watch how much memory is used inside a ``with`` block, by looking every millisecond.

    Parameters
    ----------
    device : Device or str, optional
        What :func:`gpuml.get_device` returns unless given. On a GPU the memory that its driver
        has given to all programs is watched; on the CPU this process's memory. It stays 0
        where the system does not say.

    Yields
    ------
    MemoryUse
        Grows while the block runs.

    Examples
    --------
    >>> import numpy as np
    >>> with watch_memory("cpu") as used:
    ...     ones = np.ones(40_000_000)
    >>> used.most == 0 or used.most > 280_000_000
    True
    """
    where, used, over = get_device(device), MemoryUse(), threading.Event()

    def look() -> None:
        if where.kind == "cpu":
            now = resident_memory()
        else:
            with where.use():
                free, total = where.xp.cuda.runtime.memGetInfo()
            now = total - free
        used.most = max(used.most, now - before) if before else now

    def watch() -> None:
        while not over.wait(1e-3):
            look()

    before = 0
    look()
    before, used.most = used.most, 0
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield used
    finally:
        look()
        over.set()
        watcher.join()


def transfer_bandwidths(
    device: Device, sizes: Sequence[int], *, time_budget: float = 0.1
) -> dict[str, list[float]]:
    """Measure how fast data go to a GPU and back, for several sizes.

    Pageable memory is what NumPy allocates; the driver copies it in pieces through a buffer of
    its own. Pinned memory stays where it is, so that the GPU can read it directly.

    Parameters
    ----------
    device : Device
        A GPU.
    sizes : sequence of int
        Bytes.
    time_budget : float
        Seconds for each size and direction.

    Returns
    -------
    dict of str to list of float
        Bytes per second: ``to device, pageable``, ``to device, pinned``, and from it.

    Raises
    ------
    ValueError
        If the device is the CPU: there is nothing to transfer.
    """
    if device.kind == "cpu":
        raise ValueError("the CPU transfers nothing: data are already in its memory")
    import cupyx

    bandwidths: dict[str, list[float]] = {}
    with device.use():
        for size in sizes:
            there = device.xp.zeros(size, np.uint8)
            hosts = {
                "pageable": np.ones(size, np.uint8),
                "pinned": cupyx.zeros_pinned(size, np.uint8),
            }
            for kind, host in hosts.items():
                ways = {"to": (there.set, host), "from": (_fetch, there, host)}
                for way, (function, *arguments) in ways.items():
                    m = benchmark(function, *arguments, device=device, time_budget=time_budget)
                    bandwidths.setdefault(f"{way} device, {kind}", []).append(size / m.seconds)
    return bandwidths
