"""Arrays that are files: how long the file is, which pages are in memory, what was written."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from gpuml.devices import cpu_count
from gpuml.errors import DataError

# When a byte of a mapped file is read, Linux maps the 64 KiB about it, if it has them in memory.
WINDOW_BYTES = 64 * 2**10
OVERLAP_WORK: Any = (
    10_000  # how hard to look for an element that two arrays share: below a millisecond
)
CHUNK_BYTES = 4 * 2**20  # of a file are in memory while it is copied,
MOST_THREADS = 8  # by so many threads together


@dataclass(frozen=True)
class MappedFile:
    """The part of a mapped file that an array shows.

    Attributes
    ----------
    map : mmap.mmap
    owner : numpy.memmap
        The array that the file was mapped for; the array in question is it, or a view of it.
    first, last : int
        The array's bytes, counted from the beginning of the map.
    """

    map: mmap.mmap
    owner: np.memmap[Any, Any]
    first: int
    last: int

    @property
    def begin(self) -> int:
        """Where the map begins in the file, in bytes."""
        return int(self.owner.offset - self.owner.offset % mmap.ALLOCATIONGRANULARITY)

    @property
    def shared(self) -> bool:
        """Whether the file holds what the array shows; not so if changes stay in memory."""
        return bool(self.owner.mode != "c")

    @property
    def path(self) -> str | None:
        """Where the file is; None if it has no name, as some temporary files."""
        return None if self.owner.filename is None else str(self.owner.filename)

    def whole_pages(self) -> tuple[int, int]:
        """Return offset and length, in the map, of the pages that hold the array."""
        first = self.first - self.first % mmap.PAGESIZE
        return first, self.last - first


def mapped_file(array: Any) -> MappedFile | None:
    """Return which part of which file an array shows, or None if it is in plain memory.

    Parameters
    ----------
    array : numpy.ndarray
        A memory map (:class:`numpy.memmap`) or a view of one.

    Returns
    -------
    MappedFile or None
    """
    if array.base is None:
        return None
    owner, base = None, array
    while base is not None and not isinstance(base, mmap.mmap):
        if isinstance(base, np.memmap):
            owner = base
        base = getattr(base, "base", None)
    if owner is None or base is None or array.size == 0:
        return None
    zero = np.frombuffer(base, np.uint8).ctypes.data
    low, high = byte_bounds(array)
    return MappedFile(base, owner, low - zero, high - zero)


def check_length(array: Any, name: str) -> None:
    """Make sure that a memory map's file is as long as the array: reading past it would kill us.

    Raises
    ------
    DataError
        If the file is shorter.
    """
    part = mapped_file(array)
    if part is not None and part.map.size() < part.begin + part.last:
        raise DataError(
            f"the file of {name}, {part.path or 'without a name'}, has {part.map.size()} bytes, "
            f"but the array needs {part.begin + part.last}: it was cut off"
        )


def drop_pages(array: Any) -> None:
    """Take the pages of an array out of this process's memory; the file keeps what they hold."""
    part = mapped_file(array)
    if part is not None and part.shared and hasattr(mmap, "MADV_DONTNEED"):
        part.map.madvise(mmap.MADV_DONTNEED, *part.whole_pages())


def chunks(array: Any, n_at_once: int = 1) -> Iterator[slice]:
    """Yield parts of the first axis of a matrix; so many bring some 4 MiB of its file to memory."""
    row_bytes = array.shape[1] * array.itemsize
    # Rows may repeat, or overlap: a copy has room for each.
    touched = max(row_bytes, min(abs(array.strides[0]), row_bytes + WINDOW_BYTES))
    rows = max(1, CHUNK_BYTES // n_at_once // max(1, touched))
    return (slice(i, i + rows) for i in range(0, len(array), rows))


def in_memory(array: Any, dtype: Any, place: Any = None) -> Any:
    """Return a matrix in plain memory: itself, or a copy for which few pages are mapped at once.

    Parameters
    ----------
    array : numpy.ndarray of shape (m, n)
    dtype : dtype
        Of the result.
    place : numpy.ndarray, optional
        A copy that is no longer needed. Its memory is used again where it fits: to take new
        memory from the system costs as much as the copy.

    Returns
    -------
    numpy.ndarray of shape (m, n)
    """
    part = mapped_file(array)
    if part is None or not part.shared:
        return np.asarray(array, dtype)
    if abs(array.strides[0]) < abs(array.strides[1]):
        return in_memory(array.T, dtype, None if place is None else place.T).T
    fits = place is not None and place.shape == array.shape and place.dtype == dtype
    copy = place if fits and place.flags.c_contiguous else np.empty(array.shape, dtype)

    def bring(rows: slice) -> None:
        np.copyto(copy[rows], array[rows], casting="unsafe")
        drop_pages(array[rows])

    n_threads = min(cpu_count(), MOST_THREADS)
    parts = list(chunks(array, n_threads))
    if len(parts) == 1:
        bring(parts[0])
    else:  # one thread cannot use the memory's bandwidth
        with ThreadPoolExecutor(n_threads) as pool:
            list(pool.map(bring, parts))
        drop_pages(array)  # what a thread brought beside its own part
    return copy


def read_ahead(array: Any) -> None:
    """Ask the system to read the file of an array before it is needed."""
    part = mapped_file(array)
    if part is not None and hasattr(mmap, "MADV_WILLNEED"):
        part.map.madvise(mmap.MADV_WILLNEED, *part.whole_pages())


def write_back(array: Any) -> None:
    """Wait until what was written to an array is in its file, on the disk."""
    part = mapped_file(array)
    if part is not None and part.shared:
        part.map.flush(*part.whole_pages())


def overlap(a: Any, b: Any) -> bool:
    """Return whether two host arrays may share elements, or bytes of a file mapped twice."""
    if np.may_share_memory(a, b, max_work=OVERLAP_WORK):
        return True
    x, y = mapped_file(a), mapped_file(b)
    if x is None or y is None or x.map is y.map or not _same_file(x, y):
        return False
    return x.begin + x.first < y.begin + y.last and y.begin + y.first < x.begin + x.last


def _same_file(x: MappedFile, y: MappedFile) -> bool:
    if x.path is None or y.path is None:
        return False
    try:
        return os.path.samefile(x.path, y.path)
    except OSError:  # one was deleted, or moved, after it was mapped
        return x.path == y.path
