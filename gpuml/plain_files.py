"""Plain data from files of others: JSON, .npy and .npz, bounded in memory, and never run."""

from __future__ import annotations

import gc
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, FileIO
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpuml.devices import CPU
from gpuml.errors import DataError, DeviceMemoryError, printable

HostArray = np.ndarray[Any, Any]

# A file may ask for so many bytes of memory, or for so many times its own length, if that is more.
SMALL = 128 * 2**20
MOST_TIMES = 100
PIECE = 2**20  # of a compressed file is decompressed at once

LONGEST_READING = 2 * 2**20  # bytes of an archive at once: more is a list of too many members
LONGEST_HEADER = 10_000  # bytes, of an .npy file; NumPy's own limit
MOST_AXES = 32
_ENTRY = re.compile(
    r"""\s*(['"])(\w+)\1\s*:\s*(?:(['"])([^'"]*)\3|(True|False)|(\([\d\s,L]*\)))\s*(?:,|(?=\}))"""
)
_SHAPE = re.compile(r"\(\s*(?:\d{1,19}L?\s*,\s*)*(?:\d{1,19}L?)?\s*\)")
_PLAIN = re.compile(r"[<>|=]?(?:[biufcSU]\d{1,9}|[mM]8(?:\[\w+\])?)")


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says; ValueError also if it is nested too deep, or repeats a name.

    Parameters
    ----------
    text : str or bytes
        In UTF-8.

    Examples
    --------
    >>> parse_json('{"sizes": [3, 2]}')
    {'sizes': [3, 2]}
    >>> parse_json('{"sizes": [3, 2], "sizes": [3, 9]}')
    Traceback (most recent call last):
      ...
    ValueError: 'sizes' is there twice
    """
    try:
        decoded = text if isinstance(text, str) else text.decode()
        with _no_search_for_cycles():
            parsed = json.loads(decoded, object_pairs_hook=_unique)
        if "\\u" in decoded:  # half of a character, which no file can keep
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeError:
        raise ValueError("it is not text in UTF-8") from None
    return parsed


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """JSON has none, and of a large file's time the search for them takes more than half."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"'{printable(twice)}' is there twice")
    return table


def read_bytes(file: IO[bytes], n_bytes: int) -> HostArray:
    """Return so many bytes of a file; EOFError if it has fewer."""
    data = np.empty(n_bytes, np.uint8)
    start = 0
    while start < n_bytes:
        piece = file.read(min(PIECE, n_bytes - start))
        if not piece:
            raise EOFError(f"{n_bytes} bytes expected, {start} are there")
        data[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
        start += len(piece)
    return data


def check_room(path: str | PathLike[str], n_bytes: int) -> None:
    """Refuse a file that takes more memory than is free, before any is taken.

    Raises
    ------
    DeviceMemoryError
    """
    free = CPU.memory()[0] if n_bytes > SMALL else None
    if free is not None and n_bytes > free:
        raise DeviceMemoryError(
            f"{path} takes {n_bytes:,} bytes of memory, and {free:,} are free: close other "
            "programs, or use a part of it, np.load(…, mmap_mode='r')[:n]"
        )


@contextmanager
def within_memory(path: str | PathLike[str]) -> Iterator[None]:
    """Say of which file it was if memory does not suffice."""
    try:
        yield
    except DeviceMemoryError:
        raise
    except MemoryError:
        raise DeviceMemoryError(
            f"{path} takes more memory than there is: close other programs, or use a part of it"
        ) from None


def read_npy(path: Path) -> HostArray:
    """Return the array in an .npy file, without pickle and without evaluating its header.

    Raises
    ------
    DataError
        If it is damaged, truncated, of another kind, or holds objects.
    """
    size = path.stat().st_size
    with _reading(path), path.open("rb") as file:
        if file.read(4).startswith(b"PK"):
            raise DataError(f"{path} is not an .npy file, but an archive: name it .npz")
        file.seek(0)
        return _read_array(file, size, path, str(path))


def read_npz(path: Path, names: Sequence[str]) -> dict[str, HostArray]:
    """Return some arrays of an .npz file, as :func:`read_npy` does; nothing else is unpacked.

    Parameters
    ----------
    path : pathlib.Path
    names : sequence of str
        Of the arrays wanted, in any case; the first must be there.

    Raises
    ------
    DataError
        If it is damaged, lacks the first array or has one twice, or would take more memory than
        a file of its length should.
    """
    with _reading(path), _Archive(FileIO(path)) as file:
        if file.read(6) == b"\x93NUMPY":
            raise DataError(f"{path} is not an archive of arrays, but one array: name it .npy")
        with zipfile.ZipFile(file) as archive:
            members: dict[str, zipfile.ZipInfo] = {}
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy").lower()
                if name in members and name in map(str.lower, names):
                    raise DataError(f"{path} has several arrays named {printable(name)}")
                members[name] = member
            if names[0].lower() not in members:
                shown = [printable(m.filename.removesuffix(".npy")) for m in archive.infolist()[:8]]
                more = f", … ({len(members)} in all)" if len(members) > len(shown) else ""
                wanted = " and ".join(names)
                raise DataError(
                    f"{path} needs arrays named {wanted}, it has: {', '.join(shown) or 'none'}"
                    + more
                )
            return {
                name: _read_member(archive, members[name.lower()], path, f"{name} in {path}")
                for name in names
                if name.lower() in members
            }


class _Archive(BufferedReader):
    """An archive, whose list of members :mod:`zipfile` reads at once, however long it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LONGEST_READING:
            raise DataError(
                f"{self.name} is damaged, or made to do harm: the list of what is in it has "
                f"{size:,} bytes, at most {LONGEST_READING:,} are read"
            )
        return super().read(size)


def _read_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, what: str
) -> HostArray:
    if not member.filename.endswith(".npy"):
        raise DataError(f"{path} is damaged: X and y in it are not arrays")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{what} is compressed in a way that np.load does not use: save it by "
            "np.savez_compressed"
        )
    with archive.open(member) as file:
        return _read_array(file, member.file_size, path, what)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in one way whatever Python raises about a file that cannot be read."""
    try:
        yield
    except (DataError, MemoryError, OSError) as error:
        if type(error) is OSError and error.errno is not None and error.filename is None:
            # such as a seek to where no file can be
            raise DataError(f"{path} is damaged: {error.strerror}") from None
        raise
    except Exception as error:  # of zlib, struct, zipfile: damage shows in many ways
        told = f": {printable(error)}" if str(error) else ""
        raise DataError(
            f"{path} is damaged, or not the kind of file that its name says{told}"
        ) from None


def _read_array(file: IO[bytes], size: int, path: Path, what: str) -> HostArray:
    """Read the format of .npy: 6 bytes of magic, 2 of version, 2 or 4 of length, header, data."""
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0"):
        raise DataError(f"{what} is damaged, or not the kind of file that its name says")
    n_digits = 2 if start[6] == 1 else 4
    length = int.from_bytes(file.read(n_digits), "little")
    if length > LONGEST_HEADER:
        raise DataError(
            f"{what} is damaged: its header has {length:,} bytes, at most {LONGEST_HEADER:,} are "
            "read"
        )
    header = bytes(read_bytes(file, length)).decode("latin-1")
    shape, dtype, fortran_order = _parse_header(header, what)
    n_numbers = math.prod(shape)
    n_bytes, there = n_numbers * dtype.itemsize, size - 8 - n_digits - length
    if n_bytes != there:
        cure = "its end is missing" if there < n_bytes else "np.savez keeps several arrays"
        raise DataError(
            f"{what} is damaged: its header says shape {_shape_text(shape)} of {dtype}, "
            f"{n_bytes:,} bytes, and there are {there:,}: {cure}"
        )
    taken = max(n_bytes, 8 * n_numbers)  # features become float64
    if taken > max(SMALL, MOST_TIMES * path.stat().st_size):
        raise DataError(
            f"{what} would grow to {taken:,} bytes, more than {MOST_TIMES} times the file: if "
            "you trust it, save it uncompressed, by np.savez"
        )
    check_room(path, taken)
    data = read_bytes(file, n_bytes)  # to the end, where an archive's checksum is compared
    _check_bits(data, dtype, what)
    array: HostArray = np.ndarray(shape, dtype, data, order="F" if fortran_order else "C")
    return array


def _parse_header(header: str, what: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Return shape, type and order. The header is a dict in Python; only its plain form is read."""
    text = header.strip()
    found: dict[str, str] = {}
    place = 1 if text.startswith("{") else len(text)
    while match := _ENTRY.match(text, place):
        if match[2] in found:
            raise DataError(f"{what} is damaged: its header says twice what {match[2]} is")
        if (match[2] == "descr") != (match[3] is not None):
            break  # the type alone is in quotes
        found[match[2]] = match[4] if match[3] else match[5] or match[6]
        place = match.end()
    if "descr" in found and re.fullmatch(r"[<>|=]?O\d*", found["descr"]):
        raise DataError(
            f"{what} holds an object array, which only pickle can read, and a pickle can run "
            "any program: save it as numbers, e.g. np.save(path, array.astype(float))"
        )
    fits = text[place:].strip() == "}" and set(found) == {"descr", "fortran_order", "shape"}
    if not (
        fits
        and _SHAPE.fullmatch(found["shape"])
        and found["fortran_order"] in ("True", "False")
        and _PLAIN.fullmatch(found["descr"])
    ):
        raise DataError(
            f"{what} is damaged, or no plain array of numbers or text: its header is "
            f"{printable(text)}"
        )
    shape = tuple(map(int, re.findall(r"\d+", found["shape"])))
    dtype = np.dtype(found["descr"])
    if dtype.itemsize == 0 or len(shape) > MOST_AXES:
        raise DataError(f"{what} is damaged: shape {_shape_text(shape)} of {dtype} cannot be")
    return shape, dtype, found["fortran_order"] == "True"


def _shape_text(shape: tuple[int, ...]) -> str:
    return printable(str(shape))


def _check_bits(data: HostArray, dtype: np.dtype[Any], what: str) -> None:
    """Refuse bytes that are no true or false, and no character."""
    if dtype.kind == "b" and data.size and data.max() > 1:
        raise DataError(f"{what} is damaged: it has bools that are neither true nor false")
    if dtype.kind == "U":
        points = data.view(np.dtype("u4").newbyteorder(dtype.byteorder))
        bad = (points > 0x10FFFF) | ((points >= 0xD800) & (points < 0xE000))
        if bad.any():
            raise DataError(f"{what} is damaged: it has numbers that are no characters")
