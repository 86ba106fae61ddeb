"""The errors that gpuml raises on purpose, where the course answers them, and misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# The questions of notebook 11, its headings, to which errors and the doctor refer.
QUESTIONS = {
    "slower": "Why is my GPU slower?",
    "freed": "Why is memory not freed?",
    "memory": "Out of memory: what now?",
    "differ": "Why do numbers differ a little?",
    "wheel": "Which wheel?",
    "synchronize": "Do I need to synchronize?",
    "precision": "float32 or float64?",
    "first_call": "Why does the first call take a second?",
}

MOST_COMPARED, MOST_NAMED = 1000, 30  # names, in a message about an unknown one


class GpumlError(Exception):
    """Base of gpuml's own errors; the message says what came, what was expected, what to do."""


class DistributedError(GpumlError, RuntimeError):
    """The ranks cannot work together; the message says which of them, and why."""


class DeviceError(GpumlError, RuntimeError):
    """The device asked for does not exist or does not answer."""


class DeviceMemoryError(GpumlError, MemoryError):
    """The memory of a device does not suffice; a note says where the course answers that."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        note_lack_of_memory(self)


class DataError(GpumlError, ValueError):
    """Data from outside (a file, a table) cannot be used as it is."""


class CheckpointError(DataError):
    """A checkpoint is damaged, foreign, newer than this version, or of another training run."""


class ModelFileError(GpumlError, ValueError):
    """A model file is damaged, truncated, foreign, or does not describe a model."""


def answered(*questions: str) -> str:
    """Say where the course answers these questions, and how to get it.

    Parameters
    ----------
    *questions : str
        Keys of `QUESTIONS`.

    Examples
    --------
    >>> answered("wheel")
    'More: notebook 11, "Which wheel?" (gpuml notebooks DIR)'
    """
    named = ", ".join(f'"{QUESTIONS[question]}"' for question in questions)
    return f"More: notebook 11, {named} (gpuml notebooks DIR)"


def note_lack_of_memory(error: MemoryError) -> None:
    """Add, once, where the course says what to do; also to errors of NumPy, CuPy and Python."""
    if answered("memory") not in getattr(error, "__notes__", ()):
        error.add_note(answered("memory"))


@contextmanager
def noting_memory_errors() -> Iterator[None]:
    """Do that for what is raised inside a ``with`` block."""
    try:
        yield
    except MemoryError as error:
        note_lack_of_memory(error)
        raise


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
    near = difflib.get_close_matches(name.lower(), names[:MOST_COMPARED], n=1, cutoff=0.5)
    hint = f" did you mean '{printable(near[0])}'?" if near else ""
    shown = ", ".join(map(printable, names[:MOST_NAMED]))
    more = f", … ({len(names):,} in all)" if len(names) > MOST_NAMED else ""
    return f"unknown {kind} '{printable(name)}':{hint} Known: {shown}{more}"


def printable(text: object, most: int = 80) -> str:
    r"""Return text from a file as a message may show it: short, on one line, nothing invisible.

    A terminal obeys some characters, which may hide or change what is printed about a file.

    Parameters
    ----------
    text : object
        What `str` makes of it is shown.
    most : int
        Characters; what is longer is cut.

    Examples
    --------
    >>> print(printable("red: \x1b[31m"))
    red: \x1b[31m
    """
    shown = str(text)[: most + 1]
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
