"""The errors that gpuml raises on purpose, and the nearest known name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GpumlError(Exception):
    """Base of gpuml's own errors; the message says what came, what was expected, what to do."""


class DistributedError(GpumlError, RuntimeError):
    """The ranks cannot work together; the message says which of them, and why."""


class DeviceError(GpumlError, RuntimeError):
    """The device asked for does not exist or does not answer."""


class DeviceMemoryError(GpumlError, MemoryError):
    """The memory of a device does not suffice."""


class DataError(GpumlError, ValueError):
    """Data from outside (a file, a table) cannot be used as it is."""


class CheckpointError(DataError):
    """A checkpoint is damaged, foreign, newer than this version, or of another training run."""


class ModelFileError(GpumlError, ValueError):
    """A model file is damaged, truncated, foreign, or does not describe a model."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, which are known, and which is nearest.

    Parameters
    ----------
    kind : str
        What the name should have named, such as ``"optimizer"``.
    name : str
        The name that came.
    known : iterable of str
        The names there are.

    Returns
    -------
    str
        One sentence for an error message.

    Examples
    --------
    >>> unknown_name("optimizer", "adm", ["adam", "gradient_descent"])
    "unknown optimizer 'adm': did you mean 'adam'? Known: adam, gradient_descent"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}':{hint} Known: {', '.join(names)}"
