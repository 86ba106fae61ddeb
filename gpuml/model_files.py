"""Arrays in safetensors files: written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from gpuml.errors import ModelFileError


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

    A reader sees the old file or the new one, never a part, even if the power fails.

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


def load_arrays(
    path: str | PathLike[str],
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, str]]:
    """Read the arrays and the metadata of a safetensors file.

    Parameters
    ----------
    path : path

    Returns
    -------
    arrays : dict of str to numpy.ndarray
    metadata : dict of str to str

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ModelFileError
        If it is not a safetensors file, or a damaged or truncated one.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"there is no file {source}")
    if not source.is_file():
        raise ModelFileError(f"{source} is not a file")
    _check_length(source)
    try:
        with safe_open(source, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return arrays, file.metadata() or {}
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ModelFileError(f"{source} is damaged: {error}") from None


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


def _check_length(source: Path) -> None:
    """Refuse a file whose first bytes cannot be a safetensors header, and say why.

    The format: 8 bytes with the length n of the header, little-endian; n bytes of JSON; data.
    """
    size = source.stat().st_size
    if size == 0:
        raise ModelFileError(f"{source} is empty")
    with source.open("rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        raise ModelFileError(f"{source} is not a safetensors file")
    if 8 + header > size:
        raise ModelFileError(f"{source} is truncated: its header needs {header} bytes")


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
