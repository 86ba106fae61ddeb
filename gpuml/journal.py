"""A record, beside a memory-mapped result, of which parts of it are finished."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gpuml.devices import cpu_count
from gpuml.distributed import Alone, Communicator, share_of, together
from gpuml.errors import DataError, printable
from gpuml.memory_maps import chunks, drop_pages, write_back
from gpuml.plain_files import parse_json

MOST_THREADS = 16  # a few MiB of the file are in memory for each
LARGEST_FILE = 64 * 2**20  # bytes, of a record: some 500,000 tiles
MOST_READINGS = 4  # of the array; a made-up record could ask for one in each line
WORDS = 1024  # in a row, when the words of a block are summed

Tile = tuple[int, int, int, int]  # first and last row, first and last column


class Journal:
    """Which tiles of a memory-mapped array are finished and on the disk.

    A line is written only after the tile itself is on the disk. Each line has the fingerprint
    of its tile, so that a tile that was changed, or an array that was made anew, is noticed.

    Each rank but the first writes a file of its own, ``NAME.progress.1`` and so on. Who takes the
    work up again, one process or any number of ranks, reads all of them.

    Parameters
    ----------
    path : Path
        The file of the journal.
    out : numpy.memmap
        The whole array, on all ranks.
    facts : dict
        What the result depends on; must be the same when the work is taken up again.
    resume : bool
        Whether to go on from what the files record. Otherwise they are begun anew.
    communicator : Communicator, optional
        The ranks that write to the array; all of them must make a journal.

    Attributes
    ----------
    finished : list of Tile
        What need not be computed again, by whichever rank.

    Raises
    ------
    DataError
        If a file is about other operands, in which case the message names the difference; or
        if it is no such record.
    """

    def __init__(
        self,
        path: Path,
        out: Any,
        facts: dict[str, Any],
        *,
        resume: bool,
        communicator: Communicator | None = None,
    ) -> None:
        ranks = communicator or Alone()
        self.path = path.with_name(f"{path.name}.{ranks.rank}") if ranks.rank else path
        self._out = out
        first = ranks.rank == 0
        found = together(ranks, lambda: self._read_all(facts) if first and resume else [])
        found = ranks.gather(found)[0]
        mine = found[share_of(len(found), ranks)]
        good = together(ranks, lambda: [self._mark(tile) == mark for *tile, mark in mine])
        marks = [mark for each in ranks.gather(good) for mark in each]
        there = [line for line, is_good in zip(found, marks, strict=True) if is_good]
        self.finished: list[Tile] = [(line[0], line[1], line[2], line[3]) for line in there]
        together(ranks, lambda: self._begin_all(facts, there, resume) if first else None)
        together(ranks, lambda: None if first else self._begin(facts, []))

    def _begin_all(self, facts: dict[str, Any], lines: list[Any], resume: bool) -> None:
        """Begin the first file, and remove the others: they are of no use, or all is in it."""
        if not resume:
            _remove(self._others())
        self._begin(facts, lines)
        _remove(self._others())

    def _begin(self, facts: dict[str, Any], lines: list[Any]) -> None:
        # In one move: whenever we are stopped, there is the old record or the whole new one.
        anew = self.path.with_name(self.path.name + ".new")
        anew.unlink(missing_ok=True)  # of a killed run, or a link that somebody put there
        with anew.open("x", encoding="utf-8") as file:
            file.write(_line(facts))
            file.writelines(map(_line, lines))
            file.flush()
            os.fsync(file.fileno())
        anew.replace(self.path)

    def add(self, tile: Tile) -> None:
        """Wait until a tile is on the disk, then note it."""
        mark = self._mark(tile)
        write_back(self._view(tile))
        self._append(tile, mark)
        drop_pages(self._view(tile))

    def remove(self) -> None:
        """Delete the file: all is finished."""
        self.path.unlink(missing_ok=True)

    def _others(self) -> list[Path]:
        """Return the files of other ranks than the first, in the order of their numbers."""
        found = self.path.parent.glob(glob.escape(self.path.name) + ".*")
        return sorted(
            (file for file in found if file.suffix[1:].isdecimal()),
            key=lambda file: int(file.suffix[1:]),
        )

    def _view(self, tile: Sequence[int]) -> Any:
        return self._out[tile[0] : tile[1], tile[2] : tile[3]]

    def _mark(self, tile: Sequence[int]) -> str:
        return fingerprint(self._view(tile), n_threads=1)

    def _append(self, tile: Tile, mark: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line([*tile, mark]))
            file.flush()
            os.fsync(file.fileno())

    def _read_all(self, facts: dict[str, Any]) -> list[Any]:
        """Return what all files record: tiles, each with its mark."""
        files = [file for file in (self.path, *self._others()) if file.is_file()]
        n_bytes = sum(file.stat().st_size for file in files)
        unread = MOST_READINGS * self._out.size
        found: list[Any] = []
        for file in files:
            cure = f"to begin anew, call without resume=True or delete {file}"
            if n_bytes > LARGEST_FILE:
                raise DataError(f"{file} is not a record of a product: it is too long; {cure}")
            for tile, mark in self._read(file, facts, cure):
                unread -= (tile[1] - tile[0]) * (tile[3] - tile[2])
                if unread < 0:
                    return found
                found.append([*tile, mark])
        return found

    def _read(self, file: Path, facts: dict[str, Any], cure: str) -> Iterator[tuple[Tile, str]]:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        before = _parsed(lines[0]) if lines else None
        if not isinstance(before, dict):
            raise DataError(f"{file} is not a record of a product; {cure}")
        for name in facts | before:
            if facts.get(name) != before.get(name):
                raise DataError(
                    f"cannot resume: {printable(name)} was {printable(before.get(name))} and is "
                    f"{facts.get(name)}; {cure}"
                )
        n_rows, n_columns = self._out.shape
        for line in lines[1:]:
            match _parsed(line):
                case [int(top), int(bottom), int(left), int(right), str(mark)]:
                    pass
                case _:
                    return  # cut off while it was written: this tile and later ones are not done
            if not (0 <= top < bottom <= n_rows and 0 <= left < right <= n_columns):
                continue  # no tile
            yield (top, bottom, left, right), mark


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _line(content: Any) -> str:
    return json.dumps(content) + "\n"


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None


def fingerprint(
    array: Any, n_threads: int | None = None, communicator: Communicator | None = None
) -> str:
    """Return a short text that changes, in all likelihood, if any element of an array does.

    Reads the array once. Sums of its 64-bit words, block by block, are hashed: that finds
    damage and mix-ups, not forgery. Equal arrays that lie in memory in different ways, such as
    row by row and column by column, may get different texts.

    Parameters
    ----------
    array : numpy.ndarray of shape (m, n)
        A memory map too; its pages are given back.
    n_threads : int, optional
        As many as there are processors unless given.
    communicator : Communicator, optional
        Ranks that have the same array, and read a share of it each; all must call.

    Returns
    -------
    str
        Shape, type and 16 hexadecimal digits.

    Examples
    --------
    >>> import numpy as np
    >>> fingerprint(np.eye(2)) == fingerprint(np.eye(2))
    True
    >>> fingerprint(np.eye(2)) == fingerprint(np.ones((2, 2)))
    False
    """
    lines = array.T if abs(array.strides[0]) < abs(array.strides[1]) else array
    ranks = communicator or Alone()
    parts = list(chunks(lines))
    parts = parts[share_of(len(parts), ranks)]
    with ThreadPoolExecutor(n_threads or min(cpu_count(), MOST_THREADS)) as pool:
        sums = together(ranks, lambda: list(pool.map(_sums, (lines[part] for part in parts))))
    every = "".join(text for each in ranks.gather(sums) for text in each)
    digest = hashlib.sha256(every.encode())
    return f"{array.shape[0]}x{array.shape[1]} {array.dtype.str} {digest.hexdigest()[:16]}"


def _sums(block: Any) -> str:
    """Return a hash of the sums of one block, and give back its pages."""
    data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    whole = data.size // (8 * WORDS) * 8 * WORDS
    words = data[:whole].view(np.uint64).reshape(-1, WORDS)
    # along both axes, so that two exchanged words change a sum wherever they are
    sums = [words.sum(axis=axis, dtype=np.uint64).tobytes() for axis in (0, 1)]
    rest = data[whole:].tobytes()
    drop_pages(block)
    return hashlib.sha256(b"".join([*sums, rest])).hexdigest()
