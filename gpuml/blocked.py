"""Products of matrices that are larger than the device's memory, or than memory itself."""

from __future__ import annotations

import gc
import math
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gpuml.blocking import (
    EMPTY,
    FILL,
    IN,
    MULTIPLY,
    NOMINAL,
    OUT,
    BlockPlan,
    Rates,
    Step,
    parse_size,
    plan_blocks,
    size_text,
    smallest_memory,
)
from gpuml.devices import CPU, Array, Device, blas_threads, cpu_count, device_of, get_device
from gpuml.distributed import Communicator, together
from gpuml.errors import DataError, DeviceMemoryError
from gpuml.journal import Journal, Tile, fingerprint
from gpuml.matmul import (
    Precision,
    check_out,
    checked_precision,
    multiply_into,
    overlap_text,
    product_dtype,
    product_shape,
)
from gpuml.memory_maps import (
    check_length,
    drop_pages,
    in_memory,
    mapped_file,
    overlap,
    read_ahead,
)
from gpuml.sharing import (
    OnFirst,
    check_arguments,
    check_operands,
    check_shared,
    file_of,
    places,
    share,
)
from gpuml.staging import Stager, Trace, Transfer, copy_threads
from gpuml.timing import benchmark, duration

# The share of the free memory that is used unless a limit is given.
SAFE_SHARE = {"gpu": 0.8, "cpu": 0.5}
# What libraries take beside our buffers, out of the budget: cuBLAS 32 MiB and its kernels; on the
# CPU Python, NumPy and the BLAS buffers. Of a small budget at most this share.
RESERVE = {"gpu": 64 * 2**20, "cpu": 256 * 2**20}
RESERVED_SHARE = {"gpu": 1 / 8, "cpu": 1 / 2}

# Panels of each operand at once. On a GPU one is multiplied, and two are on their way: so copies
# go on while a finished tile makes room.
BUFFERS = {"gpu": 3, "cpu": 1}

COPIED_BYTES = 4  # times rows and columns of the matrices with which rates are measured

Progress: TypeAlias = bool | Callable[[int, int], None] | None

KINDS = {
    FILL: "host memory",
    IN: "bus",
    MULTIPLY: "arithmetic",
    OUT: "bus",
    EMPTY: "host memory",
}


@dataclass
class BlockReport:
    """What a blocked product did: prints as a table, and draws its time line.

    Attributes
    ----------
    plan : BlockPlan
        The tiles; the last plan, if memory became scarce on the way.
    device : str
    seconds : float
        From the first copy to the last.
    spans : dict of str to numpy.ndarray of shape (n, 2)
        When each piece of work began and ended, in seconds, by kind of work.
    n_threads : dict of str to int
        How many threads of the host shared a kind of work.
    n_steps, n_tiles : int
        Steps and tiles done; fewer than the plan's if work was taken up again.
    notes : list of str
        What did not go as planned.
    rates : Rates or None
        What the machine can do, for the prediction.
    """

    plan: BlockPlan
    device: str
    seconds: float = 0.0
    spans: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict, compare=False)
    n_threads: dict[str, int] = field(default_factory=dict)
    n_steps: int = 0
    n_tiles: int = 0
    notes: list[str] = field(default_factory=list)
    rates: Rates | None = None

    @property
    def busy(self) -> dict[str, float]:
        """Seconds in which each kind of work was under way; of several threads, their mean."""
        return {
            kind: _union(spans)
            if kind not in self.n_threads
            else float((spans[:, 1] - spans[:, 0]).sum()) / self.n_threads[kind]
            for kind, spans in self.spans.items()
        }

    @property
    def bound(self) -> str:
        """What took longest: "bus", "host memory" or "arithmetic"."""
        busy = self.busy
        return KINDS[max(busy, key=busy.__getitem__)] if busy else "nothing"

    @property
    def overlap(self) -> float:
        """Share of the shorter work that went on beside other work, from 0 to 1.

        0 if all was done one after the other; 1 if it took no longer than the longest alone.
        """
        busy = list(self.busy.values())
        hidden = sum(busy) - max(busy, default=0)
        return 1.0 if hidden <= 0 else min(1.0, max(0.0, (sum(busy) - self.seconds) / hidden))

    @property
    def predicted(self) -> float | None:
        """Seconds that were to be expected of the whole product; None if rates are unknown."""
        return self.plan.predict(self.rates)["total"] if self.rates else None

    def __str__(self) -> str:
        lines = [str(self.plan), f"{duration(self.seconds)} on {self.device}"]
        expected = self.plan.predict(self.rates) if self.rates else {}
        if expected:
            lines[-1] += f"; predicted {duration(expected['total'])}"
        for kind, seconds in self.busy.items():
            line = f"  {kind:22}{duration(seconds):>9}  {seconds / self.seconds:5.0%}"
            if kind in expected:
                line += f"  predicted {duration(expected[kind])}"
            lines.append(line)
        if len(self.busy) > 1:
            lines.append(f"bound by {self.bound}; {self.overlap:.0%} of the rest overlapped")
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold; :meth:`from_json` reads it."""
        spans = {kind: np.round(spans, 6).tolist() for kind, spans in self.spans.items()}
        return asdict(self) | {"spans": spans}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> BlockReport:
        """Make a report again from what :meth:`to_json` returned."""
        made = {
            "plan": BlockPlan(**table["plan"]),
            "rates": table["rates"] and Rates(**table["rates"]),
            "spans": {kind: np.array(spans) for kind, spans in table["spans"].items()},
        }
        return cls(**(table | made))

    def plot(self, title: str = "", axis: Any = None) -> Any:
        """Draw the time line: what was under way when; see :func:`gpuml.plots.time_line`."""
        from gpuml import plots

        kinds = [kind for kind in KINDS if kind in self.spans]
        name = f"({self.plan.m:,} × {self.plan.k:,}) @ ({self.plan.k:,} × {self.plan.n:,})"
        spans = {kind: self.spans[kind] for kind in kinds}
        return plots.time_line(spans, title or f"{name}\n{self.device}", axis)


def blocked_matmul(
    a: Array,
    b: Array,
    *,
    memory_limit: int | str | None = None,
    out: Array | None = None,
    precision: Precision | None = None,
    device: Device | str | None = None,
    progress: Progress = None,
    resume: bool = False,
    return_report: bool = False,
    communicator: Communicator | None = None,
) -> Any:
    """Multiply matrices in host memory, or in files, that may be larger than the device.

    C = A B is computed tile by tile. On a GPU several host threads bring panels of A and B
    through pinned buffers while the device multiplies those that came before, and finished
    parts of C flow back. On a CPU the same tiles bound how much of a memory-mapped file is in
    memory.

    Parameters
    ----------
    a : numpy.ndarray of shape (M, K)
        Also a memory map. Any type of number, any strides.
    b : numpy.ndarray of shape (K, N)
    memory_limit : int or str, optional
        Bytes on the device, or on the CPU of this process: ``"4 GiB"``. A safe share of what is
        free unless given. On a GPU up to 1 GiB of host memory comes on top, and everywhere
        operands and results that are in no file.
    out : numpy.ndarray of shape (M, N), optional
        Where to write the result; also a memory map.
    precision : {"float32", "tf32", "bfloat16"}, optional
        How a GPU multiplies float32, as in :func:`gpuml.batched_matmul`.
    device : Device or str, optional
        Where to compute; what :func:`gpuml.get_device` returns unless given.
    progress : bool or callable, optional
        Whether to show a progress bar on standard error; if that is a terminal unless given. A
        function ``(n_done, n_tiles) -> None`` is called after each finished tile, with the
        number of those that this call has finished, and of all that it will.
    resume : bool
        Whether to go on with what an interrupted call left in a memory-mapped `out`. The
        finished tiles are noted in a file beside it, ``NAME.progress``, which is deleted at
        the end.
    return_report : bool
        Whether to return ``(out, report)``; of several ranks, each reports its part.
    communicator : Communicator, optional
        Ranks that share the work, see below: ``from gpuml.distributed import ranks``, and
        ``communicator=ranks()``. Unless given, each process multiplies by itself, under mpiexec
        as well.

    Returns
    -------
    numpy.ndarray of shape (M, N)
        `out` if given; of the type that NumPy's promotion gives. With `return_report` also a
        :class:`BlockReport`, or None if there was nothing to do. None for other ranks than the
        first, unless they all write to one file.

    Raises
    ------
    TypeError
        If an operand is not in host memory, or holds no numbers.
    ValueError
        If shapes do not fit, or `out` cannot take the result or overlaps an operand.
    DataError
        If the limit is below the smallest tile, a mapped file is too short, or `resume` meets
        the record of other operands.
    DeviceMemoryError
        If not even the smallest tile finds memory on the device.
    DistributedError
        On all ranks, if one was given something else, does not see the file of `out`, or cannot
        begin; the message names it.

    Warns
    -----
    ResourceWarning
        If memory was taken by others, and smaller tiles were used.

    Notes
    -----
    Several ranks are given the same operands, each as an array or a memory map of its own, and
    multiply a share of the rows of A each, or of the columns of B if there are more of them. If
    all give as `out` a memory map of the same file, each writes its part there, and what an
    interrupted call left can be taken up by any number of ranks. Else rank 0 gets the result, in
    its `out` if given. A rank that fails on the way ends all of them, and so does Ctrl-C.
    `memory_limit` is for each rank; unless given, those that compute in one memory divide it.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.ones((300, 200)), np.ones((200, 100))
    >>> blocked_matmul(a, b, memory_limit="200 KiB", device="cpu")[0, :3]
    array([200., 200., 200.])
    """
    options = _Options(memory_limit, precision, device, progress, resume, return_report)
    if communicator is not None and communicator.world_size > 1:
        out, report = _by_ranks(a, b, out, options, communicator)
        return (out, report) if return_report else out
    where, dtype = _checked(a, b, out, options)
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), dtype)
    if out.size == 0 or a.shape[1] == 0:
        out[...] = 0
        return (out, None) if return_report else out
    plan = _plan(a, b, options, where)
    journal = _open_journal(a, b, out, options)
    report = _computed(_Work(a, b, out, precision, where, journal), plan, options)
    if journal:
        journal.remove()  # as the last: until then nothing need be computed again
    return (out, report) if return_report else out


@dataclass(frozen=True)
class _Options:
    """How a product is to be computed."""

    memory_limit: int | str | None
    precision: Precision | None
    device: Device | str | None
    progress: Progress
    resume: bool
    return_report: bool

    @property
    def limit(self) -> int | None:
        """The limit of memory in bytes, if there is one."""
        return None if self.memory_limit is None else parse_size(self.memory_limit)


def _computed(work: _Work, plan: BlockPlan, options: _Options) -> BlockReport:
    """Compute what is not finished, and report."""
    report = BlockReport(plan, str(work.device))
    with _ProgressBar(options.progress, plan) as work.bar:
        _multiply(work, report, options.limit)
    if work.journal and work.journal.finished:
        n_before = len(work.journal.finished)
        report.notes.append(
            f"taken up again: {n_before} tiles were finished before, {report.n_tiles} "
            "now; what is predicted is the whole product"
        )
    if options.return_report:
        report.rates = _rates_for(
            report, work.device, work.out.dtype, work.precision, options.limit
        )
    return report


def _by_ranks(
    a: Array, b: Array, out: Array | None, options: _Options, communicator: Communicator
) -> tuple[Array | None, BlockReport | None]:
    """Compute this rank's share of a product, and bring the shares together."""
    first, names = communicator.rank == 0, ("precision", "memory_limit", "resume")
    settings = {name: getattr(options, name) for name in names}
    in_file = check_arguments(communicator, a, b, out, settings)
    if not in_file and not first:
        out = None
    where, dtype = together(communicator, lambda: _checked(a, b, out, options, in_file))
    check_operands(communicator, a, b)
    around = places(communicator, where)
    if in_file:
        check_shared(communicator, out, around)
    shape = a.shape[0], b.shape[1]
    rows, columns = share(*shape, communicator)
    mine = a[rows], b[:, columns]
    empty = 0 in (*mine[0].shape, mine[1].shape[1])
    plan = together(
        communicator, lambda: None if empty else _plan(*mine, options, where, around.n_sharers)
    )
    if 0 in shape:
        return (np.empty(shape, dtype) if out is None and first else out), None
    journal = gathered = report = None
    if in_file and a.shape[1] > 0:
        journal = _open_journal(a, b, out, options, communicator)
    try:
        if not in_file:
            gathered = OnFirst(communicator, out, shape, dtype)
            part = gathered.part(rows, columns)
        else:
            part = out[rows, columns]  # type: ignore[index]
        if plan is None:
            part[...] = 0
        else:
            corner, n_cores = (rows.start, columns.start), communicator.n_threads
            tell = gathered.note if gathered else None
            work = _Work(*mine, part, options.precision, where, journal, corner, n_cores, tell)
            report = _share_computed(work, plan, options, communicator)
        communicator.gather(None)  # all are done
        if journal:
            journal.remove()
        if gathered:
            out = gathered.bring(part, rows, columns)
        communicator.gather(None)  # none goes on, and perhaps away, before all is there
    except BaseException as error:
        communicator.end_all(error)  # the others do not know of it
        raise
    return out, report


def _share_computed(
    work: _Work, plan: BlockPlan, options: _Options, communicator: Communicator
) -> BlockReport:
    """Compute one rank's share with its share of the cores; the first one shows how it goes on."""
    rank, (top, left), (height, width) = communicator.rank, work.corner, work.out.shape
    shown = options.progress if rank == 0 or callable(options.progress) else False
    with blas_threads(math.inf, work.n_cores):
        report = _computed(work, plan, replace(options, progress=shown))
    report.notes.append(
        f"rank {rank} of {communicator.world_size}: rows {top:,} to {top + height:,}, "
        f"columns {left:,} to {left + width:,}"
    )
    return report


def _rates_for(
    report: BlockReport,
    where: Device,
    dtype: np.dtype[Any],
    precision: Precision | None,
    limit: int | None,
) -> Rates | None:
    """Measure what limits a product that is done, unless there is no memory for that."""
    try:
        return measure_rates(where, dtype, precision, limit)
    except Exception as error:
        if where.kind == "cpu" or not _is_out_of_memory(error):
            raise
    report.notes.append("nothing predicted: there was no memory left to measure the rates")
    return None


def plan_for(
    a: Array,
    b: Array,
    *,
    memory_limit: int | str | None = None,
    precision: Precision | None = None,
    device: Device | str | None = None,
) -> BlockPlan:
    """Return how :func:`blocked_matmul` would cut the product of two matrices.

    Parameters
    ----------
    a : numpy.ndarray of shape (M, K)
    b : numpy.ndarray of shape (K, N)
    memory_limit, precision, device
        As in :func:`blocked_matmul`.

    Returns
    -------
    BlockPlan

    Raises
    ------
    TypeError
        If an operand is not an array, or holds no numbers.
    ValueError
        If the operands are no matrices of at least one element, or do not fit.
    DataError
        If the limit is below the smallest tile.
    DeviceMemoryError
        If no limit is given, and what is free is below the smallest tile.
    """
    options = _Options(memory_limit, precision, device, False, False, False)
    return _plan(a, b, options, get_device(device))


def _plan(a: Array, b: Array, options: _Options, where: Device, n_sharers: int = 1) -> BlockPlan:
    """Return the plan of a product; so many processes share what memory is free."""
    m, n, k = _sizes(a, b)
    limit = options.limit or _safe_limit(where) // n_sharers
    reserve = _reserve(where, limit)
    dtype = product_dtype(a, b)
    itemsize, sum_itemsize = dtype.itemsize, _sum_dtype(dtype).itemsize
    buffers = BUFFERS[where.kind]
    # Converted operands and a product before it is added need as much again, beside the buffers.
    copies = 2 if where.kind == "cpu" or dtype.kind in "biu" else 1
    budget = (limit - reserve) // copies
    least = smallest_memory(m, n, k, itemsize, sum_itemsize=sum_itemsize, buffers=buffers)
    if budget < least:
        needs = (
            f"the smallest tile needs {size_text(copies * least)}, and {size_text(reserve)} are "
            "kept for the libraries"
        )
        if options.limit is None:
            raise DeviceMemoryError(f"the device has {size_text(limit)} to spare: {needs}")
        raise DataError(
            f"a memory limit of {size_text(limit)} is too small: {needs}; "
            f"memory_limit={_least_limit(where, copies * least)} would do"
        )
    speed = replace(NOMINAL, arithmetic=NOMINAL.arithmetic * _speed(dtype, options.precision))
    return plan_blocks(
        m, n, k, itemsize, budget, sum_itemsize=sum_itemsize, buffers=buffers, rates=speed
    )


def _sizes(a: Array, b: Array) -> tuple[int, int, int]:
    """Return M, N and K of a product of matrices, or say what is wrong with them."""
    device_of(a, b)
    m, n = product_shape(a.shape, b.shape)[-2:]
    for name, array in (("a", a), ("b", b)):
        if array.ndim != 2:
            raise ValueError(
                f"{name} has shape {array.shape}, and blocked_matmul takes matrices; for stacks "
                "call it for each, or gpuml.batched_matmul"
            )
    return m, n, a.shape[1]


def _safe_limit(where: Device) -> int:
    """Return how much memory may be used where the user does not say."""
    free, total = where.memory()
    if free is None:
        free = (total or 2**32) // 2
    return int(SAFE_SHARE[where.kind] * free)


def _reserve(where: Device, limit: int) -> int:
    """Return the bytes of a limit that are kept for libraries."""
    return min(RESERVE[where.kind], int(limit * RESERVED_SHARE[where.kind]))


def _least_limit(where: Device, n_bytes: int) -> int:
    """Return the least limit of which so many bytes are left beside what is kept."""
    share = math.ceil(n_bytes / (1 - RESERVED_SHARE[where.kind]))
    return min(n_bytes + RESERVE[where.kind], share)


def _speed(dtype: np.dtype[Any], precision: Precision | None) -> float:
    """Return about how many times faster than float32 a GPU multiplies."""
    if precision in ("tf32", "bfloat16") or _sum_dtype(dtype) != dtype:
        return 8
    return {"c": 1 / 4, "f": 1}.get(dtype.kind, 1 / 20)  # a complex product is four


def measure_rates(
    device: Device | str | None = None,
    dtype: Any = np.float32,
    precision: Precision | None = None,
    memory_limit: int | str | None = None,
) -> Rates:
    """Measure what limits blocked products: host memory, bus and arithmetic.

    Measured once for each device, type and precision: it takes about a second, and on a GPU
    half a GiB for float32.

    Parameters
    ----------
    device : Device or str, optional
        What :func:`gpuml.get_device` returns unless given.
    dtype : dtype
        Of the products.
    precision : {"float32", "tf32", "bfloat16"}, optional
        Of the products.
    memory_limit : int or str, optional
        Bytes that may be used on a GPU. Smaller matrices than usual are slower.

    Returns
    -------
    Rates
        On the CPU nothing is copied: the rates of copies are infinite.
    """
    where, size = get_device(device), 1024
    if where.kind == "gpu":
        size = _size_to_measure(where, np.dtype(dtype), memory_limit)
    return _measured(where, np.dtype(dtype).name, precision, size)


def _size_to_measure(where: Device, dtype: np.dtype[Any], limit: int | str | None) -> int:
    """Return the rows of the matrices to measure with: as many as a limit of memory allows."""
    size, room = 8192, math.inf
    if limit is not None:
        room = parse_size(limit) - _reserve(where, parse_size(limit))
    each = (dtype.itemsize + _sum_dtype(dtype).itemsize) / _slowness(dtype) ** 2
    while size > 256 and max(each, COPIED_BYTES) * size**2 > room:
        size //= 2
    return size


def _slowness(dtype: np.dtype[Any]) -> int:
    """Return how many times shorter matrices are measured, where products take long."""
    return 1 if dtype.kind in "fV" else 4


@cache
def _measured(device: Device, dtype: str, precision: Precision | None, size: int) -> Rates:
    copies = [np.inf] * 4
    with device.use():
        try:
            arithmetic = _arithmetic_rate(device, np.dtype(dtype), precision, size)
            if device.kind == "gpu":
                copies = _copy_rates(device, COPIED_BYTES * size**2)
        finally:
            if device.kind == "gpu":  # what is measured once needs no memory afterwards
                device.xp.get_default_memory_pool().free_all_blocks()
    return Rates(copies[0], copies[1], copies[2], copies[3], arithmetic)


def _arithmetic_rate(
    device: Device, dtype: np.dtype[Any], precision: Precision | None, size: int
) -> float:
    """Return the operations per second of a product in the device's memory."""
    size //= _slowness(dtype)
    numbers = np.random.default_rng(0).random((size, size), np.float32).astype(dtype)
    x, out = device.asarray(numbers), device.xp.empty((size, size), _sum_dtype(dtype))

    def product() -> None:
        multiply_into(x, x, out, precision=precision)

    return 2 * size**3 / benchmark(product, device=device, time_budget=0.3).seconds


def _copy_rates(device: Device, n_bytes: int) -> list[float]:
    """Return the rates of all host threads into and out of pinned memory, and of the bus."""
    import cupyx

    host, there = np.ones(n_bytes, np.uint8), device.xp.empty(n_bytes, np.uint8)
    pinned = cupyx.zeros_pinned(n_bytes, np.uint8)
    edges = range(0, n_bytes + 1, n_bytes // (4 * cpu_count()))
    parts = [slice(*cut) for cut in pairwise(edges)]

    def copied(to: Array, source: Array) -> None:
        list(pool.map(lambda part: np.copyto(to[part], source[part]), parts))

    def seconds(function: Any, *arguments: Any, clock: Device = device) -> float:
        return benchmark(function, *arguments, device=clock, time_budget=0.1).seconds

    with ThreadPoolExecutor(cpu_count()) as pool:
        times = [seconds(copied, *way, clock=CPU) for way in ((pinned, host), (host, pinned))]
    times += [seconds(there.set, pinned), seconds(lambda: there.get(out=pinned))]
    return [n_bytes / t for t in times]


@dataclass
class _Work:
    """What is multiplied, where, and who is told of finished tiles."""

    a: Array
    b: Array
    out: Array
    precision: Precision | None
    device: Device
    journal: Journal | None
    corner: tuple[int, int] = (0, 0)  # of the whole result, at which `out` begins
    n_cores: int | None = None  # all unless given
    tell: Callable[[Tile], None] | None = None  # of tiles of the whole result
    bar: _ProgressBar = field(init=False)
    finished: list[Tile] = field(default_factory=list)

    def finish(self, tile: Tile) -> None:
        """Note that a tile of the result is in its place."""
        self.finished.append(tile)
        if self.journal:
            self.journal.add(_moved(tile, *self.corner))
        else:
            drop_pages(self.out[tile[0] : tile[1], tile[2] : tile[3]])
        if self.tell:
            self.tell(_moved(tile, *self.corner))
        self.bar.tell(len(self.finished))

    def steps(self, plan: BlockPlan) -> list[Step]:
        """Return what is left to do."""
        top, left = self.corner
        before = self.journal.finished if self.journal else []
        done = _Covered(self.finished + [_moved(tile, -top, -left) for tile in before])
        return [step for step in plan.steps() if step.tile not in done]


def _moved(tile: Tile, rows: int, columns: int) -> Tile:
    return tile[0] + rows, tile[1] + rows, tile[2] + columns, tile[3] + columns


class _Covered:
    """Which tiles lie within the union of others."""

    def __init__(self, tiles: list[Tile]) -> None:
        self._rows = np.unique([edge for tile in tiles for edge in tile[:2]])
        self._columns = np.unique([edge for tile in tiles for edge in tile[2:]])
        self._cells = np.zeros((len(self._rows), len(self._columns)), bool)
        for tile in tiles:
            self._cells[self._part(tile)] = True

    def _part(self, tile: Tile) -> tuple[slice, slice]:
        """Return the cells that a tile touches."""
        r, c = self._rows, self._columns
        rows = slice(np.searchsorted(r, tile[0], "right") - 1, np.searchsorted(r, tile[1], "left"))
        columns = slice(
            np.searchsorted(c, tile[2], "right") - 1, np.searchsorted(c, tile[3], "left")
        )
        return rows, columns

    def __contains__(self, tile: Tile) -> bool:
        if not self._cells.size or tile[0] < self._rows[0] or tile[1] > self._rows[-1]:
            return False
        if tile[2] < self._columns[0] or tile[3] > self._columns[-1]:
            return False
        return bool(self._cells[self._part(tile)].all())


def _multiply(work: _Work, report: BlockReport, limit: int | None) -> None:
    """Compute all tiles that are not finished; with smaller ones if memory runs out."""
    trace = Trace(work.device)
    begin = time.perf_counter()
    while True:
        plan = report.plan
        try:
            with work.device.use():
                steps = work.steps(plan)
                report.n_steps += len(steps)
                work.bar.begin(steps, len(work.finished))
                if work.device.kind == "gpu":
                    _multiply_on_gpu(work, plan, steps, trace, report.n_threads)
                else:
                    _multiply_on_host(work, plan, steps, trace)
            break
        except Exception as error:
            if work.device.kind == "cpu" or not _is_out_of_memory(error):
                raise
            why = _told(error)  # not the error itself, which would keep the buffers
        report.n_steps -= len(work.steps(plan))  # they were not done
        report.plan = _smaller(work, plan, why, report.notes)
    report.seconds = time.perf_counter() - begin
    report.n_tiles = len(work.finished)
    report.spans = trace.spans()


# What CuPy, the CUDA runtime, the driver and cuBLAS say; the last one when it cannot even begin.
OUT_OF_MEMORY = (
    "OutOfMemory",
    "MemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether CUDA or one of its libraries found no memory."""
    return any(word in _told(error) for word in OUT_OF_MEMORY)


def _told(error: Exception) -> str:
    return f"{type(error).__name__} {error}"


def _smaller(work: _Work, plan: BlockPlan, why: str, notes: list[str]) -> BlockPlan:
    """Return a plan for half the memory, or for what is free if that is less, and say so."""
    gc.collect()  # an error of a thread that copies and its transfer keep each other, and buffers
    work.device.xp.get_default_memory_pool().free_all_blocks()
    free, _ = work.device.memory()
    budget = min(plan.memory // 2, int(SAFE_SHARE["gpu"] * (free or 0)))
    try:
        smaller = plan_for(
            work.a,
            work.b,
            memory_limit=max(budget, 1),
            precision=work.precision,
            device=work.device,
        )
    except DataError as error:
        raise DeviceMemoryError(
            f"the device has {size_text(free or 0)} free, and tiles of "
            f"{size_text(plan.memory)} did not fit ({why}): {str(error).partition(';')[0]}"
        ) from None
    note = (
        f"the device's memory was taken by others: tiles of {size_text(plan.memory)} did not fit, "
        f"going on with {size_text(smaller.memory)}"
    )
    notes.append(note)
    warnings.warn(note, ResourceWarning, stacklevel=_caller())
    return smaller


def _caller() -> int:
    """Return how many calls the user's line is away from the function that asks."""
    level, frame = 0, sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level + 1


def _multiply_on_host(work: _Work, plan: BlockPlan, steps: list[Step], trace: Trace) -> None:
    """Compute tiles on the CPU, out of the arrays themselves."""
    dtype = work.out.dtype
    sum_dtype = _sum_dtype(dtype)
    a = _HostPanels(work.a, sum_dtype, plan.slots[0])
    b = _HostPanels(work.b, sum_dtype, plan.slots[1])
    tile: Any = None
    for step, after in zip(steps, [*steps[1:], None], strict=False):
        target = work.out[step.rows, step.columns]
        if after:
            read_ahead(work.a[after.rows, after.depth])
            read_ahead(work.b[after.depth, after.columns])
        begin = time.perf_counter()
        if step.first:
            tile = target if sum_dtype == dtype else np.empty(target.shape, sum_dtype)
        left, right = a.get((step.rows, step.depth)), b.get((step.depth, step.columns))
        multiply_into(left, right, np.asarray(tile), add=not step.first)
        if step.last and tile is not target:
            target[...] = tile
        trace.on_host(MULTIPLY, begin, time.perf_counter())
        if step.last:
            work.finish(step.tile)
        work.bar.update(step)
    a.drop()
    b.drop()


class _HostPanels:
    """The newest panels of one operand in memory, as many as a plan has room for."""

    def __init__(self, source: Array, dtype: Any, n_slots: int) -> None:
        self._source, self._dtype = source, dtype
        self._there: deque[tuple[tuple[slice, slice], Array]] = deque(maxlen=n_slots)

    def get(self, part: tuple[slice, slice]) -> Array:
        """Return a panel."""
        for there, panel in self._there:
            if there == part:
                return panel
        old = None
        if len(self._there) == self._there.maxlen:
            _, old = self._there.popleft()
            drop_pages(old)
            if not old.flags.owndata:
                old = None  # not a copy whose memory could be used again
        block = self._source[part]
        panel = block if self._fits(block) else in_memory(block, self._dtype, old)
        self._there.append((part, panel))
        return panel

    def _fits(self, block: Array) -> bool:
        """Return whether a part of a file can be multiplied where it is: all of its bytes count."""
        whole = block.flags.c_contiguous or block.flags.f_contiguous
        return whole and block.dtype == self._dtype and mapped_file(block) is not None

    def drop(self) -> None:
        """Give back the pages of files."""
        for _, panel in self._there:
            drop_pages(panel)


def _multiply_on_gpu(
    work: _Work, plan: BlockPlan, steps: list[Step], trace: Trace, n_threads: dict[str, int]
) -> None:
    """Compute tiles on a GPU: panels come, tiles go back, and the device multiplies meanwhile."""
    n_in = n_out = copy_threads(work.n_cores)
    n_threads |= {FILL: n_in, EMPTY: n_out}
    with (
        _arena(work.device, plan.memory) as memory,
        Stager(work.device, n_in, trace) as loader,
        Stager(work.device, n_out, trace) as storer,
    ):
        pipeline = _Pipeline(work, plan, memory, trace, loader, storer)
        n_loaded = 0
        for i, step in enumerate(steps):
            while n_loaded < min(len(steps), i + plan.buffers):
                if not pipeline.load(steps[n_loaded], n_loaded, i):
                    break
                n_loaded += 1
            pipeline.multiply(step)
        pipeline.drain()


@contextmanager
def _arena(device: Device, n_bytes: int) -> Iterator[Any]:
    """Give one piece of device memory, and return it to the driver when all work is done."""
    from cupy.cuda import Memory, MemoryPointer

    try:
        memory = Memory(n_bytes)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        device.xp.get_default_memory_pool().free_all_blocks()
        memory = Memory(n_bytes)
    try:
        yield MemoryPointer(memory, 0)
    finally:
        device.synchronize()


Part: TypeAlias = tuple[slice, slice]


@dataclass
class _Slot:
    """A buffer for a panel, and what is in it."""

    pointer: Any
    stream: Any
    part: Part | None = None
    panel: Any = None
    transfer: Transfer | None = None  # until the panel is known to have been queued
    last_step: int = -1  # the last that needs this panel, as far as is known
    used: Any = None  # the event after which the panel may be overwritten


class _Panels:
    """The panels of one operand on the device: the newest ones, as many as there are buffers."""

    def __init__(
        self, source: Array, dtype: Any, memory: Any, slot_bytes: int, n_slots: int
    ) -> None:
        from cupy.cuda import Stream

        # What lies column by column is brought as it lies, and turned on the device.
        self._turned = source.strides[0] == source.itemsize and source.shape[0] > 1
        self._source, self._dtype = source.T if self._turned else source, dtype
        pointers = [memory + i * slot_bytes for i in range(n_slots)]
        self._slots = deque(_Slot(pointer, Stream(non_blocking=True)) for pointer in pointers)

    def load(self, part: Part, number: int, n_done: int, loader: Stager) -> bool:
        """Begin to bring a panel, unless it is there; return whether there was room.

        There is room if the oldest panel is not needed by a step from `n_done` on.
        """
        import cupy

        slot = self._find(part)
        if slot is None:
            slot = self._slots[0]
            if slot.last_step >= n_done:
                return False
            self._slots.rotate(-1)
            block = self._block(part)
            if slot.used is not None:
                slot.stream.wait_event(slot.used)
            slot.part = part
            slot.panel = cupy.ndarray(block.shape, self._dtype, memptr=slot.pointer)
            slot.transfer = loader.load(block, slot.panel, slot.stream)
        slot.last_step = number
        return True

    def get(self, part: Part, compute: Any) -> _Slot:
        """Return the slot of a panel; work queued on `compute` from now on waits for the panel."""
        slot = self._find(part)
        assert slot is not None
        if slot.transfer is not None:
            slot.transfer.wait_queued()
            compute.wait_event(slot.stream.record())
            drop_pages(self._block(part))
            slot.transfer = None
            if self._turned:
                slot.panel = slot.panel.T
        return slot

    def _find(self, part: Part) -> _Slot | None:
        return next((slot for slot in self._slots if slot.part == part), None)

    def _block(self, part: Part) -> Array:
        return self._source[part[::-1] if self._turned else part]


class _Pipeline:
    """The buffers and queues of a blocked product on a GPU."""

    def __init__(
        self,
        work: _Work,
        plan: BlockPlan,
        memory: Any,
        trace: Trace,
        loader: Stager,
        storer: Stager,
    ) -> None:
        import cupy

        self._work, self._plan, self._trace = work, plan, trace
        self._loader, self._storer = loader, storer
        dtype = work.out.dtype
        self._sum_dtype = _sum_dtype(dtype)
        (n_a, n_b, n_c), (a_bytes, b_bytes, c_bytes) = plan.slots, plan.slot_bytes
        self._a = _Panels(work.a, dtype, memory, a_bytes, n_a)
        self._b = _Panels(work.b, dtype, memory + n_a * a_bytes, b_bytes, n_b)
        tiles = memory + n_a * a_bytes + n_b * b_bytes
        self._tiles = [tiles + i * c_bytes for i in range(n_c)]
        self._compute = cupy.cuda.Stream(non_blocking=True)
        self._out = cupy.cuda.Stream(non_blocking=True)
        self._n_tiles = -1  # begun so far, less one
        # What leaves each buffer, and at which of its bytes it begins.
        self._leaving: list[list[tuple[int, Transfer]]] = [[] for _ in self._tiles]
        self._unfinished: deque[tuple[Tile, list[Transfer]]] = deque()

    def load(self, step: Step, number: int, n_done: int) -> bool:
        """Begin to bring what a step needs; return whether there was room for it."""
        return self._a.load((step.rows, step.depth), number, n_done, self._loader) and self._b.load(
            (step.depth, step.columns), number, n_done, self._loader
        )

    def multiply(self, step: Step) -> None:
        """Queue the product of a step, and the way back of what it finishes."""
        import cupy

        a = self._a.get((step.rows, step.depth), self._compute)
        b = self._b.get((step.depth, step.columns), self._compute)
        self._n_tiles += step.first
        slot = self._n_tiles % len(self._tiles)
        height, width, _ = step.sizes
        c = cupy.ndarray((height, width), self._sum_dtype, memptr=self._tiles[slot])
        # A tile enters and leaves its buffer in strips: the next one may follow at its heels.
        n_strips = self._plan.strips if step.first or step.last else 1
        each = -(-height // n_strips)
        leaving = []
        with self._compute as compute:
            for top in range(0, height, each):
                strip = slice(top, min(top + each, height))
                if step.first:
                    self._wait_for_buffer(slot, c[: strip.stop].nbytes)
                begin = self._trace.event()
                multiply_into(
                    a.panel[strip],
                    b.panel,
                    c[strip],
                    add=not step.first,
                    precision=self._work.precision,
                )
                end = self._trace.event()
                self._trace.on_device(MULTIPLY, begin, end)
                if step.last:
                    rows = slice(step.rows.start + strip.start, step.rows.start + strip.stop)
                    target = self._work.out[rows, step.columns]
                    transfer = self._storer.store(c[strip], target, self._out, end)
                    self._leaving[slot].append((c[:top].nbytes, transfer))
                    leaving.append(transfer)
            a.used = b.used = compute.record()
        if step.last:
            self._unfinished.append((step.tile, leaving))
        self._work.bar.update(step)
        self._finish(wait=False)

    def _wait_for_buffer(self, slot: int, end: int) -> None:
        """Make the compute queue wait until what begins before a byte of a buffer has left it.

        Not strip for strip: at the edges tiles are smaller, and their strips lie elsewhere.
        """
        leaving = self._leaving[slot]
        in_the_way = [transfer for begin, transfer in leaving if begin < end]
        self._leaving[slot] = [(begin, transfer) for begin, transfer in leaving if begin >= end]
        for transfer in in_the_way:
            transfer.wait_queued()
        if in_the_way:
            self._compute.wait_event(self._out.record())

    def _finish(self, *, wait: bool) -> None:
        """Note the tiles that are in host memory."""
        while self._unfinished:
            tile, transfers = self._unfinished[0]
            if not wait and not all(transfer.done for transfer in transfers):
                return
            for transfer in transfers:
                transfer.wait()
            self._unfinished.popleft()
            self._work.finish(tile)

    def drain(self) -> None:
        """Wait until all tiles are in host memory."""
        self._finish(wait=True)


class _ProgressBar:
    """A bar of operations done, or calls of the user's function; nothing where none is wanted."""

    def __init__(self, wanted: Progress, plan: BlockPlan) -> None:
        self._tell = wanted if callable(wanted) else None
        self._bar: Any = None
        self._n_operations, self._n_tiles = plan.n_operations, plan.n_tiles
        if wanted is True or (wanted is None and sys.stderr.isatty()):
            from tqdm import tqdm

            self._bar = tqdm(
                total=plan.n_operations, unit="FLOP", unit_scale=True, dynamic_ncols=True
            )

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, steps: list[Step], n_done: int) -> None:
        """Take note of what is left to do, when so many tiles are done."""
        self._n_tiles = n_done + sum(step.last for step in steps)
        if self._bar is not None:
            left = sum(2 * math.prod(step.sizes) for step in steps)
            self._bar.initial = self._bar.n = self._n_operations - left
            self._bar.refresh()

    def update(self, step: Step) -> None:
        """Add one step."""
        if self._bar is not None:
            self._bar.update(2 * math.prod(step.sizes))

    def tell(self, n_done: int) -> None:
        """Tell the user's function of a finished tile."""
        if self._tell is not None:
            self._tell(n_done, self._n_tiles)


def _checked(
    a: Array, b: Array, out: Array | None, options: _Options, in_file: bool = True
) -> tuple[Device, np.dtype[Any]]:
    """Return where to compute and the result's type, or say what is wrong with the arguments.

    Only a result that is kept in a file, by all ranks, can be taken up again.
    """
    where = get_device(options.device)
    given = [a, b] if out is None else [a, b, out]
    if device_of(*given).kind != "cpu":
        raise TypeError(
            "blocked_matmul takes arrays in host memory, and these are on a GPU already: "
            "gpuml.batched_matmul(a, b) multiplies them there"
        )
    (m, n, _), dtype = _sizes(a, b), product_dtype(a, b)
    for name, array in (("a", a), ("b", b)):
        check_length(array, name)
    if out is not None:
        check_out(out, (m, n), dtype)
        check_length(out, "out")
        for name, array in (("a", a), ("b", b)):
            if array.size and out.size and overlap(out, array):
                raise ValueError(overlap_text(name))
    if options.resume and (out is None or not in_file):
        raise ValueError("to resume, give the memory-mapped out that was interrupted")
    if options.resume and out is not None and out.size and file_of(out) is None:
        raise ValueError("to resume, out must be a memory map of a file with a name, in mode 'r+'")
    checked_precision(options.precision, dtype)
    if options.memory_limit is not None:
        parse_size(options.memory_limit)
    return where, dtype


def _open_journal(
    a: Array,
    b: Array,
    out: Array | None,
    options: _Options,
    communicator: Communicator | None = None,
) -> Journal | None:
    """Return the record of finished tiles, if the result is kept in a file."""
    part = file_of(out)
    if out is None or part is None:
        return None
    facts = {
        "a": fingerprint(a, communicator=communicator),
        "b": fingerprint(b, communicator=communicator),
        "out": f"{out.shape[0]}x{out.shape[1]} {out.dtype.str} at {part.begin + part.first}",
        "precision": options.precision,
    }
    path = Path(f"{part.path}.progress")
    return Journal(path, out, facts, resume=options.resume, communicator=communicator)


def _sum_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which products of a type are summed."""
    short = dtype.itemsize == 2 and dtype.kind in "fV"
    return np.dtype(np.float32) if short else dtype


def _union(spans: np.ndarray[Any, Any]) -> float:
    """Return the length of the union of spans that are sorted by their beginning."""
    ends = np.maximum.accumulate(spans[:, 1])
    gaps = np.maximum(0, spans[1:, 0] - ends[:-1]).sum()
    return float(ends[-1] - spans[0, 0] - gaps)
