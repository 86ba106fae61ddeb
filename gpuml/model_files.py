"""Arrays in safetensors files: written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpuml.errors import ModelFileError, printable
from gpuml.plain_files import check_room, parse_json, read_bytes, within_memory

# What the file's format calls a type, and NumPy.
DTYPES = {"BOOL": "|b1", "I8": "|i1", "U8": "|u1"} | {
    f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "iuf" for size in (2, 4, 8)
}
LONGEST_HEADER = 8 * 2**20  # bytes, of a model: some 100,000 features with names
MOST_AXES, MOST_ARRAYS = 8, 10_000


def check_place(path: Path) -> None:
    """Refuse a path at which no file can be written.

    Parameters
    ----------
    path : pathlib.Path

    Raises
    ------
    OSError
        If there is no such folder, it may not be written to, or `path` is a folder, a device or
        the like.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"cannot write {path}: it is not a file")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: the folder {path.parent} is read-only for you")


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success sync that file and rename it to `path`.

    A reader sees the old file or the new one, never a part, even if the power fails. If `path`
    is a symbolic link, the link is replaced, and what it points to stays as it is: nobody who
    puts a link there can have another file overwritten. The temporary name cannot be guessed,
    and no link of that name is followed.

    Parameters
    ----------
    path : path
        The file to write; its folder must exist.

    Yields
    ------
    Path
        Where to write instead.

    Raises
    ------
    OSError
        As :func:`check_place` says, or if the disk is full.
    """
    target = Path(path)
    check_place(target)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp made it private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_arrays(
    path: str | PathLike[str],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Write named arrays to a safetensors file.

    Parameters
    ----------
    path : path
        The file; an existing one is replaced in one step.
    arrays : mapping of str to numpy.ndarray
        In host memory, of any layout.
    metadata : mapping of str to str
        Text kept in the file's header. With several keys, their order in the file may differ
        from one run to the next.

    Raises
    ------
    OSError
        If the file cannot be written.
    ModelFileError
        If the metadata are longer than :func:`load_arrays` would read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # safetensors writes the memory of an array as it lies: a transposed view would be garbage.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata))
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"cannot write {path}: {error}") from None
        with temporary.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ModelFileError(
                f"cannot write {path}: names and metadata would take {length:,} bytes, and at most "
                f"{LONGEST_HEADER:,} are read: shorten the names of features and classes"
            )


def load_arrays(
    path: str | PathLike[str],
    *,
    sha256: str | None = None,
    longest_header: int = LONGEST_HEADER,
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Read the arrays and the metadata of a safetensors file.

    The file is read once, into as much memory as it is long, after its header has been found to
    fit it to the byte.

    Parameters
    ----------
    path : path
    sha256 : str, optional
        What the file must have, in hexadecimal, as ``gpuml train`` and ``sha256sum`` print it.
    longest_header : int
        Bytes; a longer one is refused.

    Returns
    -------
    arrays : dict of str to numpy.ndarray
    metadata : dict of str to str

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ModelFileError
        If it is not a safetensors file, a damaged or truncated one, or has another SHA-256.
    DeviceMemoryError
        If it takes more memory than is free.
    ValueError
        If `sha256` cannot be one.
    """
    wanted = None if sha256 is None else _hexadecimal(sha256)
    source = Path(path)
    with within_memory(source), _opened(source) as (file, size):
        start = _read_start(file, source, size, longest_header)
        spans, metadata = _parse_header(start[8:], source, size - len(start))
        check_room(source, size)
        try:
            data = read_bytes(file, size - len(start))
        except EOFError as error:  # cut while it was read
            raise ModelFileError(f"{source} is truncated: {error}") from None
    if wanted is not None:
        digest = hashlib.sha256(start)
        digest.update(data.data)
        if digest.hexdigest() != wanted:
            raise ModelFileError(
                f"{source} is another file, or a changed one: its SHA-256 is {digest.hexdigest()}, "
                f"and {wanted} was asked for"
            )
    return {name: span.cut(data, source) for name, span in spans.items()}, metadata


def load_metadata(
    path: str | PathLike[str], *, longest_header: int = LONGEST_HEADER
) -> dict[str, str]:
    """Read only the metadata of a safetensors file; parameters and errors of `load_arrays`."""
    source = Path(path)
    with within_memory(source), _opened(source) as (file, size):
        start = _read_start(file, source, size, longest_header)
        return _parse_header(start[8:], source, size - len(start))[1]


def file_sha256(path: str | PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(arrays: Mapping[str, np.ndarray[Any, Any]], text: str) -> str:
    """Return the SHA-256 of named arrays and a text, in hexadecimal, to notice a changed bit.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        In host memory; their order does not matter.
    text : str

    Returns
    -------
    str
    """
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _hexadecimal(sha256: str) -> str:
    digits = sha256.strip().lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise ValueError(
            f"a SHA-256 has 64 hexadecimal digits, got '{printable(sha256)}': "
            "`gpuml train` prints it, and so does `sha256sum FILE`"
        )
    return digits


@contextmanager
def _opened(source: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a regular file, and give its length."""
    if not source.exists():
        raise FileNotFoundError(f"there is no file {source}")
    if not source.is_file():  # a pipe would be waited for
        raise ModelFileError(f"{source} is not a file")
    with source.open("rb") as file:
        yield file, os.fstat(file.fileno()).st_size


def _read_start(file: IO[bytes], source: Path, size: int, longest: int) -> bytes:
    """Return the length and the header, if they can be such.

    The format: 8 bytes with the length n of the header, little-endian; n bytes of JSON; data.
    """
    if size == 0:
        raise ModelFileError(f"{source} is empty")
    start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        raise ModelFileError(f"{source} is not a safetensors file")
    if 8 + header > size:
        raise ModelFileError(f"{source} is truncated: its header needs {header} bytes")
    if not 2 <= header <= longest:
        raise ModelFileError(
            f"{source} is damaged, or made to do harm: its header has {header:,} bytes, and at "
            f"most {longest:,} are read"
        )
    return start + file.read(header - 1)


@dataclass(frozen=True)
class _Span:
    """Where an array lies among the data of a file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int

    def cut(self, data: np.ndarray[Any, Any], source: Path) -> np.ndarray[Any, Any]:
        """Return the array, which shares the memory of the data where it can."""
        part = data[self.begin : self.end]
        if self.dtype.kind == "b" and part.size and part.max() > 1:
            raise ModelFileError(f"{source} is damaged: it has bools neither true nor false")
        if part.ctypes.data % self.dtype.itemsize:
            part = part.copy()
        return part.view(self.dtype).reshape(self.shape)


def _parse_header(
    header: bytes, source: Path, n_bytes: int
) -> tuple[dict[str, _Span], dict[str, str]]:
    """Return where the arrays are, and the metadata, if they fit the data to the byte."""
    try:
        table = parse_json(header)
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(text, str) for text in metadata.values()
        ):
            raise ValueError("its metadata are not text")
        if len(table) > MOST_ARRAYS:
            raise ValueError(f"it has {len(table):,} arrays, and at most {MOST_ARRAYS:,} are read")
        spans = {name: _span(name, entry) for name, entry in table.items()}
        place = 0
        for name, span in sorted(spans.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
            if span.begin != place:
                what = "overlaps another" if span.begin < place else "leaves bytes unused before it"
                raise ValueError(f"array '{printable(name)}' {what}")
            place = span.end
        if place != n_bytes:
            raise ValueError(f"its arrays take {place:,} bytes, and {n_bytes:,} are there")
    except ValueError as error:
        raise ModelFileError(f"{source} is damaged: {printable(error, 200)}") from None
    return spans, metadata


def _span(name: str, entry: Any) -> _Span:
    shown = f"array '{printable(name)}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} needs dtype, shape, data_offsets, and nothing else")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        known = ", ".join(DTYPES)
        raise ValueError(f"{shown} is of type {printable(kind, 20)}; known: {known}")
    for numbers in shape, offsets:
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 2**63 for n in numbers
        ):
            raise ValueError(f"{shown} has a shape or offsets that are no whole numbers")
    if len(shape) > MOST_AXES or len(offsets) != 2:
        raise ValueError(f"{shown} has {len(shape)} axes and {len(offsets)} offsets")
    dtype = np.dtype(DTYPES[kind])
    needed, there = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != there:
        raise ValueError(
            f"{shown} of shape {printable(tuple(shape))} and type {kind} takes {needed:,} bytes, "
            f"its offsets give it {there:,}"
        )
    return _Span(dtype, tuple(shape), *offsets)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself lasting; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
