"""Mini-batches: of data on the device, of data that stay on the host or on disk, or of a source."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np

from gpuml.devices import Array, Device, cpu_count, device_of
from gpuml.errors import DataError
from gpuml.memory_maps import drop_pages, mapped_file, read_ahead
from gpuml.staging import Stager, Trace, copy_threads

# Rows are gathered for several batches at once: one launch on a GPU instead of many, and a
# bounded amount of memory however large the data are.
GATHERED_BYTES = 8 * 2**20

# Data that are streamed pass in chunks of this size; on a GPU so many are under way at once. Those
# of plain arrays are large enough for all threads that copy; those of a file bound what is mapped.
CHUNK_BYTES = 256 * 2**20
MAPPED_CHUNK_BYTES = 64 * 2**20
CHUNKS = 3
# A memory map is shuffled by blocks of neighbouring rows, which are read in one go: blocks in
# random order, and the rows of a chunk of blocks among each other.
BLOCK_BYTES = 2**20

Batch: TypeAlias = tuple[Array, Array]
Share: TypeAlias = Callable[[int], slice]
Shared: TypeAlias = tuple[Array, Array, int]
Chunk: TypeAlias = tuple[list[slice], Any]  # runs of rows, and the order to put them in, or None


class Batches(Protocol):
    """What training asks of data.

    Attributes
    ----------
    n_samples, batch_size, n_steps : int
        Rows in each epoch, and in each batch but the last; batches in an epoch.
    streamed : bool
        Whether a full batch comes in parts, because the data are not on the device as a whole.
    """

    n_samples: int
    batch_size: int
    n_steps: int
    streamed: bool

    def epoch(self, generator: np.random.Generator | None) -> Iterator[Batch]:
        """Yield (x, y) of one epoch, on the device; shuffled if there is a generator."""
        ...


def batches(
    X: Array,
    y: Array,
    batch_size: int | None,
    *,
    generator: np.random.Generator | None = None,
) -> Iterator[Batch]:
    """Yield (x, y) batch by batch, every sample once; the last batch may be shorter.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
    y : array of shape (n_samples,) or (n_samples, n_outputs)
        On the same device as `X`.
    batch_size : int or None
        None, or more than there are samples: all of them as one batch, in their order.
    generator : numpy.random.Generator, optional
        Shuffles the samples; without it they come in their order. It draws on the host, so that
        the order is the same on every device.

    Yields
    ------
    x : array of shape (batch, n_features)
    y : array of shape (batch,) or (batch, n_outputs)
        Views; they hold good until the next batch is asked for.
    """
    n_samples = len(X)
    if batch_size is None or batch_size >= n_samples:
        yield X, y
        return
    device = device_of(X, y)
    order = None if generator is None else device.asarray(generator.permutation(n_samples))
    row_bytes = X[:1].nbytes + y[:1].nbytes
    gathered = max(1, GATHERED_BYTES // (row_bytes * batch_size)) * batch_size
    for first in range(0, n_samples, gathered):
        rows = slice(first, first + gathered)
        chunk_X, chunk_y = (
            (X[rows], y[rows])
            if order is None
            else (X.take(order[rows], axis=0), y.take(order[rows], axis=0))
        )
        for start in range(0, len(chunk_X), batch_size):
            yield chunk_X[start : start + batch_size], chunk_y[start : start + batch_size]


class ArrayBatches:
    """Batches of arrays that are on the device as a whole.

    Parameters
    ----------
    X, y : array
        As for :func:`batches`.
    batch_size : int

    Attributes
    ----------
    arrays : tuple of X and y
    """

    streamed = False

    def __init__(self, X: Array, y: Array, batch_size: int) -> None:
        self.arrays = self._X, self._y = X, y
        self.n_samples, self.batch_size = len(X), batch_size
        self.n_steps = -(-len(X) // batch_size)

    def epoch(self, generator: np.random.Generator | None) -> Iterator[Batch]:
        """Yield (x, y) of one epoch."""
        return batches(self._X, self._y, self.batch_size, generator=generator)

    def shares(self, generator: np.random.Generator | None, share: Share) -> Iterator[Shared]:
        """Yield some rows of each batch, gathered without the others; see :func:`shares`."""
        n, device = self.n_samples, device_of(self._X)
        starts = range(0, n, self.batch_size)
        sizes = [min(self.batch_size, n - start) for start in starts]
        parts = [share(size) for size in sizes]
        runs = [slice(a + p.start, a + p.stop) for a, p in zip(starts, parts, strict=True)]
        if generator is None or len(sizes) == 1:
            for run, size in zip(runs, sizes, strict=True):
                yield self._X[run], self._y[run], size
            return
        order = generator.permutation(n)
        order = device.asarray(np.concatenate([order[run] for run in runs]))
        ends = list(itertools.accumulate(run.stop - run.start for run in runs))
        row_bytes = self._X[:1].nbytes + self._y[:1].nbytes
        each = max(1, GATHERED_BYTES // (row_bytes * max(1, ends[0])))
        for first in range(0, len(sizes), each):
            begin = ends[first - 1] if first else 0
            rows = order[begin : ends[min(first + each, len(sizes)) - 1]]
            X, y = self._X.take(rows, axis=0), self._y.take(rows, axis=0)
            for i in range(first, min(first + each, len(sizes))):
                part = slice((ends[i - 1] if i else 0) - begin, ends[i] - begin)
                yield X[part], y[part], sizes[i]


def shares(data: Batches, generator: np.random.Generator | None, share: Share) -> Iterator[Shared]:
    """Yield of each batch the rows that one of several ranks works on.

    Parameters
    ----------
    data : Batches
    generator : numpy.random.Generator or None
        As for :meth:`Batches.epoch`; all ranks need the same.
    share : callable
        From the number of rows of a batch to the slice of them that is wanted.

    Yields
    ------
    x, y : array
    n_rows : int
        How many rows the whole batch has.
    """
    if isinstance(data, ArrayBatches):
        yield from data.shares(generator, share)
        return
    for x, y in data.epoch(generator):
        n_rows = len(x)
        yield x[share(n_rows)], y[share(n_rows)], n_rows
        del x, y  # before the next chunk takes as much again


class PoissonBatches:
    """Batches of rows drawn by chance, each row of the data by itself: for private training.

    Their sizes differ. So that few shapes have to be captured, batches are filled up to a
    multiple of a quarter of the usual size with rows whose label is -1, or whose targets are NaN.

    Parameters
    ----------
    X, y : array
        As for :func:`batches`.
    batch_size : int
        The mean number of rows in a batch.

    Attributes
    ----------
    probability : float
        With which a row is drawn for a batch: batch_size / n_samples.
    expected_rows : float
    n_rows : int
        How many rows of the last batch are not filled up.
    """

    streamed = False

    def __init__(self, X: Array, y: Array, batch_size: int) -> None:
        self.arrays = self._X, self._y = X, y
        self.n_samples, self.batch_size = len(X), batch_size
        self.n_steps = -(-len(X) // batch_size)
        self.probability, self.expected_rows = batch_size / len(X), float(batch_size)
        self.n_rows = 0
        self._unit = max(1, batch_size // 4)

    def epoch(self, generator: np.random.Generator | None) -> Iterator[Batch]:
        """Yield (x, y) of one epoch; without a generator each row once, in order."""
        if generator is None:
            for x, y in batches(self._X, self._y, self.batch_size):
                self.n_rows = len(x)
                yield x, y
            return
        device = device_of(self._X, self._y)
        missing = -1 if self._y.dtype.kind in "iu" else math.nan
        row_bytes = self._X[:1].nbytes + self._y[:1].nbytes
        drawn = deque(self._drawn(generator))
        while drawn:
            some: list[Any] = []
            n_padded = 0
            while drawn and (not some or n_padded * row_bytes < GATHERED_BYTES):
                some.append(drawn.popleft())
                n_padded += self._padded(len(some[-1]))
            order = np.full(n_padded, -1)
            starts = [0, *itertools.accumulate(self._padded(len(rows)) for rows in some)]
            for start, rows in zip(starts, some, strict=False):
                order[start : start + len(rows)] = rows
            there = device.asarray(np.maximum(order, 0))
            chunk_X, chunk_y = self._X.take(there, axis=0), self._y.take(there, axis=0)
            chunk_y[device.asarray(order < 0)] = missing
            for start, stop, rows in zip(starts, starts[1:], some, strict=False):
                self.n_rows = len(rows)
                yield chunk_X[start:stop], chunk_y[start:stop]

    def _padded(self, n_rows: int) -> int:
        return max(1, -(-n_rows // self._unit)) * self._unit

    def _drawn(self, generator: np.random.Generator) -> list[np.ndarray[Any, Any]]:
        """Return the rows of each batch of an epoch.

        Row after row and batch after batch, the distance to the next row that is drawn has a
        geometric distribution: one number for each row that is drawn, and none for the others.
        """
        n = self.n_samples
        places, last = [], -1
        while last < n * self.n_steps:
            distances = generator.geometric(self.probability, n + 1)
            places.append(last + np.cumsum(distances))
            last = int(places[-1][-1])
        places_in_epoch = np.concatenate(places)
        starts = np.searchsorted(places_in_epoch, np.arange(self.n_steps + 1) * n)
        rows = places_in_epoch % n
        return [rows[start:stop] for start, stop in pairwise(starts)]


class GivenBatches:
    """Batches from the user: anything that yields (x, y) pairs each time it is iterated over.

    Parameters
    ----------
    source : iterable of (x, y)
        A list, a data loader of another library, an object with ``__iter__``; not a generator,
        which would be used up after one epoch. It shuffles itself if it wants to.
    check : callable
        ``(x, y) -> (x, y, y_dtype)``: arrays, checked, and the type that y is to have.
    device : Device
        Where to bring them: to a GPU while it works on the batches before.
    x_dtype : dtype

    Raises
    ------
    TypeError
        If it cannot be iterated over more than once.
    ValueError
        If it is empty, yields something else than pairs, or not as many each time.
    """

    streamed = False

    def __init__(
        self,
        source: Iterable[Any],
        check: Callable[[Any, Any], tuple[Array, Array, Any]],
        device: Device,
        x_dtype: Any,
    ) -> None:
        if iter(source) is source:
            raise TypeError(
                "a generator is used up after one epoch: give a list of (x, y) pairs, or an "
                "object whose __iter__ begins anew"
            )
        self._source, self._check = source, check
        self._device, self._x_dtype = device, np.dtype(x_dtype)
        self.sizes = sizes = [len(x) for x, *_ in self._pairs()]
        if not sizes:
            raise ValueError("the source of batches is empty")
        self.n_samples, self.batch_size, self.n_steps = sum(sizes), max(sizes), len(sizes)

    def epoch(self, generator: np.random.Generator | None) -> Iterator[Batch]:
        """Yield (x, y) of one epoch, in the source's order."""
        bring = self._on_gpu if self._device.kind == "gpu" else self._on_host
        n = 0
        with closing(bring()) as pairs:
            for pair in itertools.islice(pairs, self.n_steps):
                yield pair
                del pair  # before the next is brought
                n += 1
            if n < self.n_steps or next(pairs, None) is not None:
                found = n if n < self.n_steps else "more"
                raise ValueError(
                    f"the source of batches yielded {self.n_steps} the first time, and now "
                    f"{found}: it must yield as many each time"
                )

    def _pairs(self) -> Iterator[tuple[Array, Array, Any]]:
        for pair in self._source:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError("the source of batches must yield pairs (x, y)")
            yield self._check(*pair)

    def _on_host(self) -> Generator[Batch]:
        for x, y, dtype in self._pairs():
            yield np.asarray(x, self._x_dtype), np.asarray(y, dtype)

    def _on_gpu(self) -> Generator[Batch]:
        """Yield batches on a GPU; two more are on their way, if they come from the host."""
        import cupy

        streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(CHUNKS)]
        coming: deque[_Coming] = deque()
        with Stager(self._device, copy_threads(), Trace.none()) as stager:
            try:
                for i, (x, y, dtype) in enumerate(self._pairs()):
                    types = self._x_dtype, dtype
                    coming.append(_Coming((x, y), types, streams[i % CHUNKS], stager))
                    if len(coming) == CHUNKS:
                        yield coming.popleft().arrays()
                while coming:
                    yield coming.popleft().arrays()
            finally:  # their memory is about to be reused
                for stream in streams:
                    stream.synchronize()


class _Coming:
    """A batch on its way to a GPU; one that is there already is only converted."""

    def __init__(
        self, pair: tuple[Array, Array], dtypes: tuple[Any, Any], stream: Any, stager: Stager
    ) -> None:
        import cupy

        self._stream, self._transfers = stream, []
        self._shapes = [a.shape for a in pair]
        if device_of(*pair).kind == "gpu":
            self._there = [cupy.asarray(a, t) for a, t in zip(pair, dtypes, strict=True)]
            return
        tables = [a.reshape(len(a), -1) for a in pair]
        self._there = [cupy.empty(a.shape, t) for a, t in zip(tables, dtypes, strict=True)]
        # The memory may have been that of a batch which is still being worked on.
        stream.wait_event(cupy.cuda.get_current_stream().record())
        self._transfers = [
            stager.load(a, there, stream) for a, there in zip(tables, self._there, strict=True)
        ]

    def arrays(self) -> Batch:
        """Return x and y; work queued from now on waits until they are there."""
        import cupy

        for transfer in self._transfers:
            transfer.wait_queued()
        if self._transfers:
            cupy.cuda.get_current_stream().wait_event(self._stream.record())
        x, y = (a.reshape(s) for a, s in zip(self._there, self._shapes, strict=True))
        return x, y


class StreamedBatches:
    """Batches of data that stay in host memory or in a file, and pass chunk by chunk.

    On a GPU several threads gather the rows of the chunks to come, and copy them through pinned
    buffers while the device works on one. On the CPU the pages of a file are given back after use.

    Parameters
    ----------
    X : numpy.ndarray of shape (n_samples, n_features)
        Also a memory map.
    y : numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs)
    batch_size : int
    device : Device
    x_dtype, y_dtype : dtype
        What a chunk is converted to on the way.
    memory_limit : int, optional
        Bytes for the chunks under way together.
    smaller : bool
        Whether batches may be smaller if so many rows do not fit, as they may where nothing is
        learned from them.

    Raises
    ------
    DataError
        If a batch does not fit.

    Attributes
    ----------
    chunk_rows : int
        On which the order of a shuffled memory map depends.
    """

    streamed = True

    def __init__(
        self,
        X: Array,
        y: Array,
        batch_size: int,
        device: Device,
        x_dtype: Any,
        y_dtype: Any,
        memory_limit: int | None = None,
        *,
        smaller: bool = False,
    ) -> None:
        self._X, self._y, self._device = X, y, device
        self._types = np.dtype(x_dtype), np.dtype(y_dtype)
        self._widths = tuple(math.prod(a.shape[1:]) for a in (X, y))
        self._row_bytes = sum(
            width * dtype.itemsize for width, dtype in zip(self._widths, self._types, strict=True)
        )
        # Each chunk needs its place; one of a file as much again while its rows are put in order.
        mapped = mapped_file(X) is not None
        needed = 2 * CHUNKS if mapped else CHUNKS
        limit = min(
            MAPPED_CHUNK_BYTES if mapped else CHUNK_BYTES, (memory_limit or 2**62) // needed
        )
        most = (memory_limit or 2**62) // needed // self._row_bytes
        if smaller:
            batch_size = max(1, min(batch_size, most))
        rows = max(1, limit // self._row_bytes)
        if batch_size < len(X):  # batches do not straddle chunks
            if batch_size > most:
                lower = f", or lower batch_size to {most}" if most else ""
                raise DataError(
                    f"a memory_limit of {memory_limit:,} bytes is too small: {needed} batches "
                    f"under way take {needed * batch_size * self._row_bytes:,}. Raise it{lower}"
                )
            rows = max(1, rows // batch_size) * batch_size
        self.n_samples, self.batch_size = len(X), batch_size
        self.n_steps = -(-len(X) // batch_size)
        self.chunk_rows = min(rows, len(X))
        self.memory = needed * self.chunk_rows * self._row_bytes

    def epoch(self, generator: np.random.Generator | None) -> Iterator[Batch]:
        """Yield (x, y) of one epoch; a full batch in several parts."""
        chunks = self._chunks(generator)
        bring = self._on_gpu if self._device.kind == "gpu" else self._on_host
        with closing(bring(chunks)) as brought:  # as soon as an epoch is given up, too
            for x, y, order in brought:
                if order is not None:
                    order = self._device.asarray(order)
                    x, y = x.take(order, axis=0), y.take(order, axis=0)
                size = min(self.batch_size, len(x))
                for start in range(0, len(x), size):
                    yield x[start : start + size], y[start : start + size]
                del x, y  # before the next chunk takes as much again

    def _chunks(self, generator: np.random.Generator | None) -> Iterator[Chunk]:
        """Yield runs of neighbouring rows that make a chunk, and the order to put them in."""
        n, each = self.n_samples, self.chunk_rows
        if generator is None or self.batch_size >= n:
            for first in range(0, n, each):
                yield [slice(first, min(n, first + each))], None
            return
        if mapped_file(self._X) is None:
            order = generator.permutation(n)  # as for data that are on the device as a whole
            for first in range(0, n, each):
                yield [], order[first : first + each]
            return
        block = max(1, BLOCK_BYTES // self._row_bytes)
        starts = generator.permutation(-(-n // block)) * block
        runs = deque(slice(int(start), min(n, int(start) + block)) for start in starts)
        while runs:
            taken, size = [], 0
            while runs and size < each:
                run = runs.popleft()
                cut = min(run.stop, run.start + each - size)
                taken.append(slice(run.start, cut))
                size += cut - run.start
                if cut < run.stop:
                    runs.appendleft(slice(cut, run.stop))
            yield taken, generator.permutation(size)

    def _on_host(self, chunks: Iterator[Chunk]) -> Generator[tuple[Array, Array, Any]]:
        """Yield chunks on the CPU; the next one is read ahead."""
        after = next(chunks, None)
        with ThreadPoolExecutor(cpu_count()) as pool:
            while after is not None:
                (runs, order), after = after, next(chunks, None)
                for run in after[0] if after else ():
                    read_ahead(self._X[run])
                x, y = (
                    _gathered(array, runs, order, dtype, pool)
                    for array, dtype in zip((self._X, self._y), self._types, strict=True)
                )
                try:
                    yield x, y, None
                finally:  # also where nobody asks for more
                    del x, y
                    if runs and order is None:  # else they are copies
                        drop_pages(self._X[runs[0]])
                        drop_pages(self._y[runs[0]])

    def _on_gpu(self, chunks: Iterator[Chunk]) -> Generator[tuple[Array, Array, Any]]:
        """Yield chunks on a GPU; two more are on their way."""
        import cupy

        shapes = [(self.chunk_rows, width) for width in self._widths]
        every = [
            _Place([cupy.empty(s, t) for s, t in zip(shapes, self._types, strict=True)])
            for _ in range(CHUNKS)
        ]
        places = deque(every)
        coming: deque[tuple[_Place, Chunk, list[Any], int]] = deque()
        with (
            self._waiting_for(every),
            Stager(self._device, copy_threads(), Trace.none()) as stager,
        ):
            more = True
            while more or coming:
                while more and places:
                    chunk = next(chunks, None)
                    if chunk is None:
                        more = False
                        break
                    place = places.popleft()
                    coming.append((place, chunk, *self._load(place, chunk, stager)))
                if not coming:
                    break
                place, chunk, transfers, n_rows = coming.popleft()
                for transfer in transfers:
                    transfer.wait_queued()
                compute = cupy.cuda.get_current_stream()
                compute.wait_event(place.stream.record())
                for run in chunk[0]:
                    drop_pages(self._X[run])
                x, y = (array[:n_rows] for array in place.arrays)
                y = y.reshape(n_rows, *self._y.shape[1:])
                yield x, y, chunk[1] if chunk[0] else None
                place.used = compute.record()
                places.append(place)

    @staticmethod
    @contextmanager
    def _waiting_for(places: list[_Place]) -> Iterator[None]:
        """Wait at the end for chunks that nobody asked for: their memory is about to be reused."""
        try:
            yield
        finally:
            for place in places:
                place.stream.synchronize()

    def _load(self, place: _Place, chunk: Chunk, stager: Stager) -> tuple[list[Any], int]:
        """Begin to bring a chunk; return what to wait for, and its number of rows."""
        runs, order = chunk
        if place.used is not None:
            place.stream.wait_event(place.used)
        transfers = []
        hosts = [array.reshape(len(array), -1) for array in (self._X, self._y)]
        for host, there in zip(hosts, place.arrays, strict=True):
            if not runs:
                transfers.append(stager.load(host, there[: len(order)], place.stream, rows=order))
            start = 0
            for run in runs:
                stop = start + run.stop - run.start
                transfers.append(stager.load(host[run], there[start:stop], place.stream))
                start = stop
        return transfers, len(order) if not runs else start


class _Place:
    """The device arrays of one chunk, and the stream that fills them."""

    def __init__(self, arrays: list[Array]) -> None:
        import cupy

        self.arrays = arrays
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.used: Any = None


def _gathered(
    array: Array, runs: list[slice], order: Any, dtype: Any, pool: ThreadPoolExecutor
) -> Array:
    """Return the rows of a chunk on the host, in order; several threads bring the runs."""
    if not runs:
        return np.asarray(array.take(order, axis=0), dtype)
    if order is None:
        return np.asarray(array[runs[0]], dtype)
    places = np.empty_like(order)  # where each row goes: the inverse of the order
    places[order] = np.arange(len(order))
    rows = np.empty((len(order), *array.shape[1:]), dtype)
    ends = list(itertools.accumulate(run.stop - run.start for run in runs))

    def put(i: int) -> None:
        run = runs[i]
        with np.errstate(over="ignore"):  # a thread has its own; training will name the number
            rows[places[ends[i] - (run.stop - run.start) : ends[i]]] = array[run]
        drop_pages(array[run])

    list(pool.map(put, range(len(runs))))
    return rows
