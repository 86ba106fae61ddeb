"""A matrix product that ranks share: who does which part, and where the result comes together."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuml.devices import Array, Device
from gpuml.distributed import (
    Communicator,
    DistributedError,
    check_agreement,
    share_of,
    together,
)
from gpuml.memory_maps import MappedFile, mapped_file

UNIT = 64  # shares of large matrices are so many rows or columns, or a multiple: GPUs like that
FEWEST_UNITS = 64  # for each rank, so that one more or less is below 2 %
SAMPLES = 8  # rows, and columns, in which operands are compared
MESSAGE_BYTES = 64 * 2**20
LOOKS, PAUSE = 5, 0.2  # network file systems may show a new file late; seconds
TOKEN_BYTES = 16
PIECE_BYTES, TAKERS, POPULATE_WRITE = 16 * 2**20, 4, 23  # the last is Linux's number
MOST_NOTED = 1023  # finished tiles of a rank; of more than these nothing is known
FOLLOWED = 0.01  # seconds between two looks for tiles that others have finished

# File systems that keep what several hosts have mapped alike, page for page. On the others, NFS
# among them, a host writes back whole pages, with what it has not seen of other hosts' rows.
COHERENT = ("lustre", "gpfs", "ceph", "gfs2", "ocfs2")


@dataclass(frozen=True)
class Places:
    """Where the ranks are.

    Attributes
    ----------
    hosts : list of str
        The name of each rank's host.
    one_host : bool
        Whether all are on one.
    n_sharers : int
        How many ranks, this one too, compute in the memory that this one computes in.
    """

    hosts: list[str]
    one_host: bool
    n_sharers: int


def places(communicator: Communicator, where: Device) -> Places:
    """Find out where the ranks are, and who computes in the same memory; all must ask."""
    name, boot = socket.gethostname(), ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = together(communicator, lambda: _memory_of(where))
    every = communicator.gather([name, boot, memory])
    return Places(
        [place[0] for place in every],
        all(place[:2] == every[0][:2] for place in every),
        every.count(every[communicator.rank]),
    )


def _memory_of(where: Device) -> str:
    """Return a name of a device's memory; numbers would not do, of which each rank may see 0."""
    if where.kind == "cpu":
        return "host"
    import cupy

    return str(cupy.cuda.Device(where.index).pci_bus_id)


def share(m: int, n: int, communicator: Communicator) -> tuple[slice, slice]:
    """Return which rows and columns of an m × n result are this rank's.

    Whole rows, or whole columns where there are more columns: so less of the operands is read by
    all ranks.

    Examples
    --------
    >>> from gpuml.distributed import Alone
    >>> share(10, 20, Alone())
    (slice(0, 10, None), slice(0, 20, None))
    """
    if m >= n:
        return _cut(m, communicator), slice(0, n)
    return slice(0, m), _cut(n, communicator)


def _cut(n: int, communicator: Communicator) -> slice:
    unit = UNIT if n >= UNIT * FEWEST_UNITS * communicator.world_size else 1
    part = share_of(-(-n // unit), communicator)
    return slice(min(n, part.start * unit), min(n, part.stop * unit))


def check_arguments(
    communicator: Communicator, a: Any, b: Any, out: Any, settings: dict[str, Any]
) -> bool:
    """Make sure that the ranks were given the same; return whether all write to one file.

    Raises
    ------
    DistributedError
        On all ranks: it names the rank and what differs.
    """
    told = {"a": _form(a), "b": _form(b)} | settings
    outs = communicator.gather(_kind(out))
    # The first may be the only one that has a place for the result.
    if communicator.rank == 0 and set(outs[1:]) == {"None"}:
        check_agreement(communicator, told | {"out": "None"})
    else:
        check_agreement(communicator, told | {"out": _kind(out)})
    return set(outs) != {"None"} and outs[0] == outs[-1] and outs[0].startswith("a file")


def _form(x: Any) -> str:
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        return type(x).__name__
    return f"{x.dtype} of shape {tuple(x.shape)}"


def _kind(out: Any) -> str:
    if out is None:
        return "None"
    part = file_of(out)
    if part is None:
        return f"in memory, {_form(out)}"
    return f"a file, {_form(out)} from byte {part.begin + part.first} on"


def file_of(out: Any) -> MappedFile | None:
    """Return the part of a file, which has a name and can be written, that an array shows."""
    part = mapped_file(out) if isinstance(out, np.ndarray) else None
    return part if part is not None and part.path is not None and part.shared else None


def check_operands(communicator: Communicator, a: Array, b: Array) -> None:
    """Make sure that all ranks have the same numbers, by a look at a few of them.

    Raises
    ------
    DistributedError
        On all ranks: it names the rank and the operand.
    """
    named = {"a sample of a": a, "a sample of b": b}
    marks = together(communicator, lambda: {name: _mark(x) for name, x in named.items()})
    check_agreement(communicator, marks)


def _mark(x: Array) -> str:
    rows, columns = (np.unique(np.linspace(0, n - 1, SAMPLES).astype(int)) for n in x.shape)
    picked = np.ascontiguousarray(x[np.ix_(rows, columns)]) if x.size else x
    return hashlib.sha256(picked.tobytes()).hexdigest()[:16]


def check_shared(communicator: Communicator, out: Array, where: Places) -> None:
    """Make sure that the file of a result is one file, which all ranks see.

    Rank 0 puts a file of a random name beside it, for which the others look.

    Raises
    ------
    DistributedError
        On all ranks: it names the rank that does not see the file, or says why several hosts
        cannot write to it.
    """
    part = file_of(out)
    assert part is not None
    path = Path(str(part.path)).resolve()
    first, text = communicator.rank == 0, secrets.token_hex(TOKEN_BYTES)
    probe = together(communicator, lambda: _put(path, text) if first else "")
    try:
        name, text, probe = communicator.gather([path.name, text, probe])[0]
        seen = first or (path.name == name and _finds(path.with_name(probe), text))
        seen = seen and _is_at(path, part)
        answers = communicator.gather([seen, str(path), "" if where.one_host else _type_of(path)])
    finally:
        if first:
            path.with_name(probe).unlink(missing_ok=True)
    for rank, (sees, own, _) in enumerate(answers):
        if not sees and rank == 0:
            raise DistributedError(
                f"{own} is not the file that rank 0 has mapped: another was put in its place. "
                "Let one rank make the file, and the others map it afterwards"
            )
        if not sees:
            raise DistributedError(
                f"rank {rank} on {where.hosts[rank]} does not see {answers[0][1]} of rank 0 on "
                f"{where.hosts[0]}: its out is another file, {own}. Give all ranks one file, made "
                "by one of them, in a folder that all see; or out on rank 0 only, which then gets "
                "the result"
            )
    for rank, (_, own, kind) in enumerate(answers):
        if kind and kind not in COHERENT:
            raise DistributedError(
                f"the ranks are on several hosts, and {own} lies on {kind} for rank {rank} on "
                f"{where.hosts[rank]}, which does not keep alike what several hosts have mapped: "
                "give out on rank 0 only, which then gets the result"
            )


def _put(path: Path, text: str) -> str:
    """Write a text beside a file; return the name of its file."""
    number, probe = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".probe", dir=path.parent)
    with os.fdopen(number, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(number)
    return Path(probe).name


def _finds(file: Path, text: str) -> bool:
    for look in range(LOOKS):
        with suppress(OSError):
            if file.read_text() == text:
                return True
        time.sleep(PAUSE if look < LOOKS - 1 else 0)
    return False


def _is_at(path: Path, part: MappedFile) -> bool:
    """Return whether a mapped file is still the one at a path; True where nobody can say."""
    with suppress(OSError):
        with path.open("rb") as file:
            now = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
        return _inode(now) == _inode(part.map)
    return False  # there is none any more


def _inode(mapped: mmap.mmap) -> str:
    """Return device and number of a mapped file, as Linux tells them."""
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            begin, end = (int(edge, 16) for edge in line.split(maxsplit=1)[0].split("-"))
            if begin <= address < end:
                return " ".join(line.split()[3:5])
    return ""


def _type_of(path: Path) -> str:
    """Return the type of the file system that a file is on; "unknown" if nobody says."""
    best, kind = "", "unknown"
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            words = line.split()
            point = words[1].encode().decode("unicode_escape")
            if len(point) >= len(best) and path.is_relative_to(point):
                best, kind = point, words[2]
    return kind


# --- the result on rank 0 ----------------------------------------------------------------------


class OnFirst:
    """The place of a result that rank 0 gets, and the way of the other ranks' parts to it.

    On one Linux host all ranks write to the same memory; else the parts are sent. If rank 0 wants
    the result in memory of its own, it copies what others have finished while it computes.

    Parameters
    ----------
    communicator : Communicator
    out : numpy.ndarray, optional
        Where rank 0 wants the result; new memory unless given.
    shape, dtype
        Of the result.
    """

    def __init__(
        self,
        communicator: Communicator,
        out: Array | None,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
    ) -> None:
        self._ranks, self._out = communicator, out
        self._shape, self._dtype = shape, dtype
        size = -(-shape[0] * shape[1] * dtype.itemsize // 8) * 8
        notes = communicator.world_size, 1 + MOST_NOTED, 4
        memory = shared_memory(communicator, size + 8 * math.prod(notes))
        self._shared = None if memory is None else np.ndarray(shape, dtype, memory)
        # Of each rank: the number of finished tiles, then their edges.
        self._notes = None if memory is None else np.ndarray(notes, np.int64, memory, size)
        if communicator.rank == 0 and out is None:
            self._out = np.empty(shape, dtype) if self._shared is None else self._shared
        self._follower: _Follower | None = None
        if communicator.rank == 0 and self._shared is not None and self._out is not self._shared:
            self._follower = _Follower(self._out, self._shared, self._notes, communicator.n_threads)

    def part(self, rows: slice, columns: slice) -> Array:
        """Return where this rank has to write its part."""
        if self._shared is not None and (self._ranks.rank > 0 or self._out is self._shared):
            part = self._shared[rows, columns]
            if part.flags.c_contiguous:
                take_pages(part)
            return part
        if self._ranks.rank == 0:
            assert self._out is not None
            return self._out[rows, columns]
        return np.empty((rows.stop - rows.start, columns.stop - columns.start), self._dtype)

    def note(self, tile: tuple[int, int, int, int]) -> None:
        """Note that these rows and columns of the result, from and to, are finished."""
        if self._notes is None or self._ranks.rank == 0:
            return
        notes = self._notes[self._ranks.rank]
        n = int(notes[0, 0])
        if n < MOST_NOTED:
            notes[1 + n] = tile
            notes[0, 0] = n + 1  # as the last: now it can be read

    def bring(self, part: Array, rows: slice, columns: slice) -> Array | None:
        """Bring together what the ranks have written, when all are done; return it on rank 0."""
        first = self._ranks.rank == 0
        edges = [rows.start, rows.stop, columns.start, columns.stop]
        others = self._ranks.gather(edges)[1:]  # by then all have written
        missing = self._follower.finish() if self._follower is not None else ()
        for rank, (top, bottom, left, right) in enumerate(others, 1):
            place = slice(top, bottom), slice(left, right)
            if rank in missing:
                _copy(self._out[place], self._shared[place], self._ranks.n_threads)  # type: ignore[index]
            elif first and self._shared is None:
                target = self._out[place]  # type: ignore[index]
                for piece in _pieces(target):
                    message = np.empty(target[piece].shape, self._dtype)
                    self._ranks.receive(message, rank)
                    target[piece] = message
            elif rank == self._ranks.rank and self._shared is None:
                for piece in _pieces(part):
                    self._ranks.send(np.ascontiguousarray(part[piece]), 0)
        return self._out if first else None


class _Follower(threading.Thread):
    """Copies to rank 0 what other ranks finish, while all compute.

    Parameters
    ----------
    out, shared : numpy.ndarray of shape (M, N)
        Where to, and where the others write.
    notes : numpy.ndarray of shape (n_ranks, 1 + MOST_NOTED, 4)
        Of each rank the number of tiles that it has finished, then their edges.
    n_threads : int
        How many copy once nobody computes any more.
    """

    def __init__(self, out: Array, shared: Array, notes: Array, n_threads: int) -> None:
        super().__init__(daemon=True)
        self._out, self._shared, self._notes = out, shared, notes
        self._n_threads, self._n_copied = n_threads, [0] * len(notes)
        self._all_done, self._failed = threading.Event(), True
        self.start()

    def run(self) -> None:
        """Look for finished tiles, until all have finished."""
        last = False
        while not last:
            last = self._all_done.wait(FOLLOWED)
            for rank, notes in enumerate(self._notes):
                n = int(notes[0, 0])
                for top, bottom, left, right in notes[1 + self._n_copied[rank] : 1 + n]:
                    place = slice(top, bottom), slice(left, right)
                    n_threads = self._n_threads if self._all_done.is_set() else 1
                    _copy(self._out[place], self._shared[place], n_threads)
                self._n_copied[rank] = n
        self._failed = False

    def finish(self) -> list[int]:
        """Copy the rest; return the ranks of which more may be left than they have noted."""
        self._all_done.set()
        self.join()
        enough = () if self._failed else range(1, MOST_NOTED)
        return [rank for rank, n in enumerate(self._n_copied) if n not in enough]


def _pieces(x: Array) -> Iterator[tuple[slice, slice]]:
    """Yield parts of a matrix that are small enough for a message."""
    most = max(1, MESSAGE_BYTES // x.itemsize)
    width = max(1, min(x.shape[1], most))
    height = max(1, most // width)
    for top in range(0, x.shape[0], height):
        for left in range(0, x.shape[1], width):
            yield slice(top, top + height), slice(left, left + width)


def _copy(to: Array, source: Array, n_threads: int) -> None:
    """Copy a matrix, by several threads: one cannot use the memory's bandwidth."""

    def copy(piece: tuple[slice, slice]) -> None:
        to[piece] = source[piece]

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(copy, _pieces(to)))


def take_pages(x: Array) -> None:
    """Let threads ask for the pages of shared memory, where Linux can: it gives them one by one.

    A product on a GPU would else wait for them at the end. Nobody waits for these threads.
    """
    call = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if call is None:
        return
    call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    begin = -(-x.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (x.ctypes.data + x.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    pieces = iter(range(begin, end, PIECE_BYTES))

    def take(memory: Array) -> None:  # which holds the pages
        for place in pieces:
            call(place, min(PIECE_BYTES, end - place), POPULATE_WRITE)

    for _ in range(TAKERS if end - begin > PIECE_BYTES else 0):
        threading.Thread(target=take, args=(x,), daemon=True).start()


def shared_memory(communicator: Communicator, n_bytes: int) -> mmap.mmap | None:
    """Return zeros that all ranks see and may write to; None where that cannot be.

    It needs Linux, and ranks that see each other's processes. The memory has no name: it is given
    back when the last rank has let go of it, or is gone.
    """
    first, token = communicator.rank == 0, secrets.token_bytes(TOKEN_BYTES)
    number, made, n_all = -1, None, n_bytes + TOKEN_BYTES  # the token is behind the result
    if first and hasattr(os, "memfd_create"):
        with suppress(OSError):
            number = os.memfd_create("gpuml")
            os.ftruncate(number, n_all)
            made = mmap.mmap(number, n_all)
            made[n_bytes:] = token
    try:
        known = communicator.gather([f"/proc/{os.getpid()}/fd/{number}", token.hex()])
        path, text = known[0]
        if not first:
            with suppress(OSError, ValueError), open(path, "r+b") as file:
                made = mmap.mmap(file.fileno(), n_all)
            if made is not None and made[n_bytes:].hex() != text:
                made = None
        there = all(communicator.gather(made is not None))
    finally:
        if number >= 0:
            os.close(number)
    if there and made is not None and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            made.madvise(mmap.MADV_HUGEPAGE)
    return made if there else None
