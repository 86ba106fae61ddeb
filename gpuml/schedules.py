"""Learning-rate schedules: by what factor of its base the rate is multiplied in each epoch.

A schedule is a function ``(epoch, n_epochs) -> factor``, with epochs counted from 0. Those of
this module say what they are, and are equal when their settings are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, TypeAlias

from gpuml.errors import unknown_name

Schedule: TypeAlias = Callable[[int, int], float]


class _Named:
    """Prints a schedule as the call that makes it."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        settings = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.name}({', '.join(settings)})"


@dataclass(frozen=True, repr=False)
class _Constant(_Named):
    name = "constant"

    def __call__(self, epoch: int, n_epochs: int) -> float:
        return 1.0


@dataclass(frozen=True, repr=False)
class _Cosine(_Named):
    name = "cosine"
    warmup: int
    final: float

    def __call__(self, epoch: int, n_epochs: int) -> float:
        if n_epochs <= self.warmup:
            raise ValueError(
                f"a warm-up of {self.warmup} epochs needs more than {n_epochs} in all: "
                "lower warmup or raise n_epochs"
            )
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        done = (epoch - self.warmup) / (n_epochs - self.warmup)
        return 1 - (1 - self.final) * (1 - math.cos(math.pi * done)) / 2


@dataclass(frozen=True, repr=False)
class _StepDecay(_Named):
    name = "step_decay"
    every: int
    factor: float

    def __call__(self, epoch: int, n_epochs: int) -> float:
        return float(self.factor ** (epoch // self.every))


@dataclass(frozen=True, repr=False)
class _Exponential(_Named):
    name = "exponential"
    final: float

    def __call__(self, epoch: int, n_epochs: int) -> float:
        return float(self.final ** (epoch / n_epochs))


def constant() -> Schedule:
    """Return the schedule that leaves the rate as it is.

    Returns
    -------
    callable
        ``(epoch, n_epochs) -> 1.0``
    """
    return _Constant()


def cosine(*, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Return a rise in equal steps, then a fall along half a cosine wave.

    (epoch + 1) / (warmup + 1) while epoch < warmup; then
    final + (1 - final) (1 + cos(π t)) / 2, where t = (epoch - warmup) / (n_epochs - warmup).

    Parameters
    ----------
    warmup : int
        How many epochs the rise takes. Called with `n_epochs` no larger than that, the schedule
        raises ValueError.
    final : float
        From 0 to 1: where the fall would arrive after the last epoch.

    Returns
    -------
    callable
        ``(epoch, n_epochs) -> factor``

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Loshchilov, Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts. ICLR 2017.
    Equation 5, without restarts.

    Examples
    --------
    >>> schedule = cosine(warmup=1)
    >>> [round(schedule(epoch, 5), 3) for epoch in range(5)]
    [0.5, 1.0, 0.854, 0.5, 0.146]
    """
    return _Cosine(_whole("warmup", warmup, 0), _fraction("final", final, zero=True))


def step_decay(every: int, factor: float) -> Schedule:
    """Return a fall by the same factor after each so many epochs: factor^⌊epoch / every⌋.

    Parameters
    ----------
    every : int
        Epochs between two falls.
    factor : float
        Above 0, at most 1.

    Returns
    -------
    callable
        ``(epoch, n_epochs) -> factor``

    Raises
    ------
    ValueError
        If a number is out of range.

    Examples
    --------
    >>> schedule = step_decay(2, 0.1)
    >>> [round(schedule(epoch, 5), 3) for epoch in range(5)]
    [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    return _StepDecay(_whole("every", every, 1), _fraction("factor", factor, zero=False))


def exponential(final: float) -> Schedule:
    """Return a fall by the same factor after each epoch: final^(epoch / n_epochs).

    Parameters
    ----------
    final : float
        Above 0, at most 1: where the fall would arrive after the last epoch.

    Returns
    -------
    callable
        ``(epoch, n_epochs) -> factor``

    Raises
    ------
    ValueError
        If `final` is out of range.

    Examples
    --------
    >>> schedule = exponential(0.01)
    >>> [round(schedule(epoch, 4), 3) for epoch in range(4)]
    [1.0, 0.316, 0.1, 0.032]
    """
    return _Exponential(_fraction("final", final, zero=False))


MAKERS: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "exponential": exponential,
    "step_decay": step_decay,
}
# Examples of settings for those that have no usual ones
_EXAMPLES = {"exponential": "0.01", "step_decay": "10, 0.1"}


def get_schedule(schedule: str | Schedule) -> Schedule:
    """Return the schedule of that name with its usual settings, or the one that is given.

    Parameters
    ----------
    schedule : str or callable
        ``"constant"``, ``"cosine"``, or a function ``(epoch, n_epochs) -> factor``, which is
        returned as it is.

    Raises
    ------
    ValueError
        If there is no schedule of that name, or it has no usual settings.
    TypeError
        If it is a maker of schedules instead of a schedule, or neither a name nor callable.

    Examples
    --------
    >>> get_schedule("cosine")
    cosine(warmup=0, final=0.0)
    """
    if isinstance(schedule, str):
        if schedule not in MAKERS:
            raise ValueError(unknown_name("schedule", schedule, MAKERS))
        if schedule in _EXAMPLES:
            raise ValueError(f"{schedule} has no usual settings: give {_call(schedule)}")
        return MAKERS[schedule]()
    if not callable(schedule):
        raise TypeError(
            "expected the name of a schedule or a function (epoch, n_epochs) -> factor, "
            f"got {schedule!r}"
        )
    given: object = schedule
    for name, maker in MAKERS.items():
        if given is maker:
            raise TypeError(f"give a schedule, not its maker: {_call(name)}")
    return schedule


def factor_of(schedule: Schedule, epoch: int, n_epochs: int) -> float:
    """Return a schedule's factor for an epoch, if it is one.

    Parameters
    ----------
    schedule : callable
        ``(epoch, n_epochs) -> factor``
    epoch, n_epochs : int
        Counted from 0; how many there are.

    Raises
    ------
    ValueError
        If it is no number, not finite, or negative: steps would lead uphill.
    """
    factor = schedule(epoch, n_epochs)
    try:
        number = float(factor)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"the schedule gives {factor!r} for epoch {epoch} of {n_epochs} (counted from 0): "
            "expected a number from 0 up, by which the learning rate is multiplied"
        )
    return number


def _call(name: str) -> str:
    return f"gpuml.schedules.{name}({_EXAMPLES.get(name, '')})"


def _whole(name: str, value: float, least: int) -> int:
    if isinstance(value, bool) or not float(value).is_integer() or value < least:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value}")
    return int(value)


def _fraction(name: str, value: float, *, zero: bool) -> float:
    if not (0 <= value <= 1) or (value == 0 and not zero):  # a comparison with NaN is never good
        raise ValueError(f"{name} must be {'from 0' if zero else 'above 0, up'} to 1, got {value}")
    return float(value)
