"""Checkpoints: all from which a run can go on, in one file, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gpuml.devices import Array, device_of, to_host
from gpuml.errors import CheckpointError, GpumlError, ModelFileError, printable
from gpuml.journal import fingerprint
from gpuml.memory_maps import in_memory
from gpuml.model_files import checksum, load_arrays, load_metadata, replacing
from gpuml.plain_files import parse_json

# A file of a later format is refused, by this number. Raise it when older versions of gpuml
# would read a file wrongly.
FORMAT = 1
KEY = "gpuml_checkpoint"  # of the description among the file's metadata

# Data of up to so many bytes are read as a whole for their fingerprint; of larger ones so many
# blocks of rows, spread evenly from the first row to the last.
WHOLE_BYTES = 2**30
BLOCK_BYTES = 32 * 2**20
SAMPLED_BLOCKS = 256
SAMPLED_BYTES = 2**20

LONGEST_HEADER = 100_000_000  # bytes, which is what safetensors itself reads at most

CURE = "delete the file to begin anew"
KINDS = {"b": "bools", "i": "integers", "u": "integers", "f": "floats"}
DIFFERENCES_SHOWN = 3
LONGEST_SHOWN = 80  # characters of a value in a message


def save_checkpoint(
    path: str | PathLike[str],
    *,
    arrays: Mapping[str, Array],
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write arrays and plain data to one safetensors file, which :func:`load_checkpoint` reads.

    The file is written beside its place, synced, and renamed: killed at any moment, or with a
    full disk, the older one is still there. What a killed run left beside it is deleted, so two
    runs must not share a path.

    Parameters
    ----------
    path : path
        The file; an existing one is replaced. Its folder must exist.
    arrays : mapping of str to array
        On any device, of any shape, of real numbers or bools of up to 64 bits.
    state : mapping
        What else the run needs, as plain JSON: numbers, strings, bools, None, and lists and dicts
        of those. They come back exactly, also integers of more than 64 bits, as in the state of
        NumPy's default generator; but tuples come back as lists.
    facts : mapping
        Plain JSON too: what must be the same when the run is taken up again.

    Raises
    ------
    OSError
        If the file cannot be written.
    TypeError
        If an array or a value is of a type that no file keeps; the message says which.
    """
    from safetensors.numpy import save

    kept = {name: _storable(name, array) for name, array in arrays.items()}
    description = {
        "format": FORMAT,
        "state": _plain(state, "state"),
        "facts": _plain(facts, "facts"),
    }
    description["sha256"] = checksum(kept, json.dumps(description, sort_keys=True))
    for leftover in _leftovers(Path(path)):
        with suppress(OSError):
            leftover.unlink()
    try:
        with replacing(path) as temporary:
            # not save_file, which leaves a file of a name of its own when killed
            temporary.write_bytes(save(kept, {KEY: json.dumps(description)}))
    except OSError as error:  # such as a full disk
        if error.errno is None:  # it names the file already
            raise
        left = "the older one is kept" if Path(path).exists() else "there is none"
        message = f"cannot write the checkpoint: {error.strerror}; {left}"
        raise OSError(error.errno, message, str(path)) from None


def load_checkpoint(
    path: str | PathLike[str], facts: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote, if it is about the same facts.

    Parameters
    ----------
    path : path
    facts : mapping
        Must equal what was saved, entry by entry; tuples count as lists.

    Returns
    -------
    arrays : dict of str to numpy.ndarray
        In host memory.
    state : dict

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    CheckpointError
        If the file is damaged, no checkpoint, or one from a newer version; or if facts differ:
        the message says which, what they were, and what they are.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "run.safetensors")
    >>> generator = np.random.default_rng(0)
    >>> state = {"epoch": 3, "generator": generator.bit_generator.state}
    >>> save_checkpoint(path, arrays={"weight": np.eye(2)}, state=state, facts={"seed": 0})
    >>> arrays, again = load_checkpoint(path, {"seed": 0})
    >>> arrays["weight"].tolist(), again == state
    ([[1.0, 0.0], [0.0, 1.0]], True)
    >>> folder.cleanup()
    """
    try:
        arrays, metadata = load_arrays(path, longest_header=LONGEST_HEADER)
    except ModelFileError as error:
        raise CheckpointError(f"cannot resume: {error}; {CURE}") from None
    if KEY not in metadata:
        kind = "a model, which gpuml.load_model reads" if "gpuml" in metadata else "something else"
        raise CheckpointError(f"cannot resume: {path} is no checkpoint, but {kind}")
    description = _description(path, metadata[KEY])
    stated = description.pop("sha256", None)
    try:
        found = checksum(arrays, json.dumps(description, sort_keys=True))
    except RecursionError:
        raise CheckpointError(f"cannot resume: {path} is no checkpoint: nested too deep") from None
    if stated != found:
        raise CheckpointError(
            f"cannot resume: {path} is damaged: its checksum does not fit; {CURE}"
        )
    try:
        state, before = dict(description["state"]), dict(description["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot resume: {path} is no checkpoint: {printable(repr(error))}"
        ) from None
    _compare(path, before, _plain(facts, "facts"))
    return arrays, state


def saved_facts(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the facts in a checkpoint, unchecked; none if there is no file, or no such one.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str
    """
    try:
        metadata = load_metadata(path, longest_header=LONGEST_HEADER)
        return dict(parse_json(metadata[KEY])["facts"])
    except (OSError, GpumlError, ValueError, TypeError, KeyError):
        return {}


@contextmanager
def reading_state(path: str | PathLike[str]) -> Iterator[None]:
    """Refuse a state that lacks what a run needs, or has something else in its place."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(
            f"cannot resume: {path} does not fit the run: {printable(repr(error))}; {CURE}"
        ) from None


def check_contents(
    path: str | PathLike[str],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    columns: Any,
    expected: Mapping[str, Array],
) -> None:
    """Refuse arrays and a history that no run of the same facts can have written.

    Parameters
    ----------
    path : path
        For the message.
    arrays : mapping of str to numpy.ndarray
        From the file.
    columns : dict of str to list
        Of the history in the file.
    expected : mapping of str to array
        Of which shapes and kinds the arrays must be. The weights must be finite as well.

    Raises
    ------
    CheckpointError
    """

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"cannot resume: {path} does not fit the run: {why}; {CURE}")

    for name in [*expected, *arrays]:
        found, wanted = (
            f"of {KINDS[table[name].dtype.kind]} and shape {table[name].shape}"
            if name in table
            else "none"
            for table in (arrays, expected)
        )
        if found != wanted:
            refuse(f"{printable(name)} should be {wanted}, the file has {found}")
    for name in "weights", "best":
        if name in arrays and not np.isfinite(arrays[name]).all():
            refuse(f"{name} has numbers that are not finite")
    if not isinstance(columns, dict) or not all(
        isinstance(column, list) and all(type(v) in (int, float) for v in column)
        for column in columns.values()
    ):
        refuse("its history is no table of numbers")
    epochs = columns.get("epoch", [])
    if any(len(column) != len(epochs) for column in columns.values()) or (
        epochs != list(range(1, len(epochs) + 1))
    ):
        refuse("its history does not count the epochs")
    if columns and "seconds" not in columns:
        refuse("its history lacks the seconds")


def fingerprint_data(X: Array, y: Array | None = None) -> dict[str, str]:
    """Return short texts that tell a data set from others, to be kept among the facts.

    Equal data give equal texts whatever their device and layout in memory. Arrays of up to 1 GiB
    are read as a whole, and a single changed number is noticed. Of larger ones 256 blocks of
    rows of 1 MiB each are read, spread evenly from the first row to the last: mixed-up files
    and orders, other lengths and types are noticed, a change between the blocks is not. It
    finds mistakes, not forgeries.

    Parameters
    ----------
    X : array of shape (n_samples, …)
        On any device, or a memory map, whose pages are given back.
    y : array of shape (n_samples, …), optional

    Returns
    -------
    dict
        ``"X"`` and ``"y"``: shape, type, and 16 hexadecimal digits.

    Raises
    ------
    TypeError
        If one is not an array.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.zeros((3, 2))
    >>> before = fingerprint_data(X)
    >>> X[2, 1] = 1
    >>> before == fingerprint_data(X), before == fingerprint_data(np.zeros((3, 2)))
    (False, True)
    """
    return {name: _fingerprint(a) for name, a in (("X", X), ("y", y)) if a is not None}


def _fingerprint(array: Array) -> str:
    device = device_of(array)
    table = array.reshape(len(array), math.prod(array.shape[1:]))
    digest = hashlib.sha256()
    with device.use():
        for rows in _read_rows(table) if table.size else ():
            block = to_host(table[rows])
            # in one layout and byte order, so that equal numbers are equal words
            block = np.ascontiguousarray(in_memory(block, block.dtype.newbyteorder("<")))
            digest.update(fingerprint(block).encode())
    shape = "x".join(map(str, array.shape))
    return f"{shape} {array.dtype.newbyteorder('=')} {digest.hexdigest()[:16]}"


def _read_rows(table: Array) -> Iterator[slice]:
    """Yield the rows to read, which depend on shape and type alone."""
    n_rows = len(table)
    row_bytes = table.shape[1] * table.itemsize
    if n_rows * row_bytes <= WHOLE_BYTES:
        step = max(1, BLOCK_BYTES // row_bytes)
        yield from (slice(i, i + step) for i in range(0, n_rows, step))
        return
    step = max(1, SAMPLED_BYTES // row_bytes)
    n_blocks = min(SAMPLED_BLOCKS, n_rows // step)
    for i in range(n_blocks):
        start = (n_rows - step) * i // max(1, n_blocks - 1)
        yield slice(start, start + step)


def _storable(name: str, array: Array) -> np.ndarray[Any, Any]:
    """Return an array in host memory, as a file can keep it."""
    device_of(array)  # refuses what is no array
    host = np.asarray(to_host(array))
    if host.dtype.kind not in "biuf" or host.itemsize > 8:
        raise TypeError(f"a checkpoint cannot keep {name}: it is of {host.dtype}")
    # safetensors writes the memory of an array as it lies
    return host.astype(host.dtype.newbyteorder("="), order="C", copy=False)


def _plain(value: Any, place: str) -> Any:
    """Return data as JSON gives it back, or say where it is not plain."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a checkpoint cannot keep {place}[{key!r}]: keys are strings")
        return {str(key): _plain(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise TypeError(f"a checkpoint cannot keep {place}: it is of {type(value).__name__}")


def _description(path: str | PathLike[str], text: str) -> dict[str, Any]:
    """Return the description of a file in a format that this version knows."""
    try:
        description = parse_json(text)
        written = description["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot resume: {path} is no checkpoint: {printable(repr(error))}"
        ) from None
    if type(written) is not int or written < 1:
        raise CheckpointError(
            f"cannot resume: {path} is no checkpoint: format {printable(written)}"
        )
    if written > FORMAT:
        raise CheckpointError(
            f"cannot resume: {path} is from a newer gpuml, in format {written}, and this version "
            f"reads up to format {FORMAT}: update gpuml, or {CURE}"
        )
    return dict(description)


def _compare(path: str | PathLike[str], before: Any, now: Any) -> None:
    """Refuse facts that differ, and say how."""
    found = list(_differences(before, now, ""))
    if found:
        more = len(found) - DIFFERENCES_SHOWN
        shown = [*found[:DIFFERENCES_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise CheckpointError(
            f"cannot resume from {path}: {'; '.join(shown)}. Run it as it was, or {CURE}"
        )


def _differences(before: Any, now: Any, place: str) -> Iterator[str]:
    """Yield a phrase for each entry that differs; dicts are compared entry by entry."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in before | now:
            inner = f"{place}, {printable(name)}" if place else printable(name)
            yield from _differences(before.get(name, _NONE), now.get(name, _NONE), inner)
    elif before != now and _text(before) != _text(now):  # NaN is not equal to NaN, but the same
        yield f"{place} was {_shown(before)} and is {_shown(now)}"


_NONE = object()  # what a missing entry has


def _text(value: Any) -> str:
    return "not given" if value is _NONE else json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else _text(value), LONGEST_SHOWN)


def _leftovers(path: Path) -> list[Path]:
    """Return files beside a path that :func:`gpuml.model_files.replacing` left when killed."""
    name = re.compile(rf"\.{re.escape(path.stem)}-[a-z0-9_]{{8}}{re.escape(path.suffix)}")
    try:
        return [found for found in path.parent.iterdir() if name.fullmatch(found.name)]
    except OSError:
        return []  # writing will say what is wrong with the folder
