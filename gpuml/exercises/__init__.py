"""Exercises of the course, and the check of an answer: what is wrong with it, and a hint at why.

Answers run in this process, with limits of time and of memory; see ``bounds.py``
for what these can stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpuml.blocking import parse_size
from gpuml.devices import Device, get_device
from gpuml.errors import GpumlError, unknown_name

if TYPE_CHECKING:
    from gpuml.exercises.judging import Exercise

# The modules of exercises, in the order of the notebooks that they belong to.
SUBJECTS = {
    "arrays": ("there_and_back", "row_halves", "relative_error"),
    "timings": ("seconds_of", "intensity", "break_even", "predicted_seconds"),
    "threads": ("saxpy", "transpose", "count_positive", "sectors"),
    "products": ("split_rows", "times_transposed", "batch_size"),
    "tiles": ("tiled_product", "bytes_in", "double_buffered"),
    "descent": ("gradient", "descend", "largest_stable_rate", "momentum_step"),
    "networks": ("standardise", "softmax", "cross_entropy", "backward"),
    "speed": ("bound_by", "fused_update", "amdahl", "rounded_product"),
    "many_models": ("restarts_for", "layer_of_many", "update_many", "survivors"),
    "ranks": ("shards", "weighted_gradient", "tree_all_reduce", "ring_seconds"),
    "security": ("fgsm_step", "project_l2", "clipped_sum", "norms_without_gradients"),
    "questions": ("gpu_speedup", "rows_that_fit", "agree"),
}
_HOMES = {name: subject for subject, names in SUBJECTS.items() for name in names}


class AnswerError(GpumlError, AssertionError):
    """An answer to an exercise is wrong; the message says what, and hints at why."""

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the message, and not the way through this package."""
        return [f"{type(self).__name__}: {self}"]


def names() -> list[str]:
    """Return the names of all exercises.

    Examples
    --------
    >>> names()[:3]
    ['there_and_back', 'row_halves', 'relative_error']
    """
    return list(_HOMES)


def exercise(name: str) -> Exercise:
    """Return what is known about an exercise.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name not in _HOMES:
        raise ValueError(unknown_name("exercise", name, _HOMES))
    module = import_module(f"gpuml.exercises.{_HOMES[name]}")
    found: Exercise = module.EXERCISES[name]
    return found


def check(
    name: str,
    answer: Any,
    *,
    device: Device | str | None = None,
    time_limit: float = 20.0,
    memory_limit: int | str = "1 GiB",
) -> None:
    """Check an answer to an exercise; print that it is right, or raise what is wrong with it.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    answer : callable
        The function that the exercise asks for.
    device : Device or str, optional
        Where the arrays are that it is called with; what :func:`gpuml.get_device` returns unless
        given.
    time_limit : float
        Seconds for each call of the answer; then it is stopped.
    memory_limit : int or str
        Bytes that a call may take, such as ``"1 GiB"``.

    Raises
    ------
    AnswerError
        If the answer is wrong; the message says what it was called with, how its result differs
        from the right one, and, where the mistake is a known one, which it may be.
    ValueError, TypeError
        If there is no exercise of that name, or the check is called in another wrong way.

    Examples
    --------
    >>> check("amdahl", lambda share, factor: 1 / (1 - share + share / factor))
    amdahl: right.
    """
    from gpuml.exercises.judging import complaint

    with _in_short():
        if not isinstance(name, str):
            raise TypeError(
                "expected the name of an exercise, in quotes, and then the function, such as "
                f'check("gradient", gradient); got {type(name).__name__} for the name'
            )
        if not isinstance(device, Device | str | None):
            raise TypeError(f"expected a device or its name, such as 'cpu'; got {device!r}")
        if not (isinstance(time_limit, int | float) and time_limit > 0):
            raise ValueError(f"expected seconds above 0 for time_limit; got {time_limit!r}")
        known, place, n_bytes = exercise(name), get_device(device), parse_size(memory_limit)
    problem, printed = complaint(known, answer, place, time_limit=time_limit, memory_limit=n_bytes)
    if printed:
        print(printed, end="" if printed.endswith("\n") else "\n")
    if problem:
        raise AnswerError(f"{name}: {problem}") from None
    print(f"{name}: right.")


@contextmanager
def _in_short() -> Iterator[None]:
    """Have a notebook show only the message of what is raised inside a ``with`` block."""
    try:
        yield
    except (TypeError, ValueError, GpumlError) as error:
        shown = [f"{type(error).__name__}: {error}"]
        error.__dict__["_render_traceback_"] = lambda: shown
        raise
