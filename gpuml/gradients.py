"""Gradients checked: what a model's backward pass says, against differences of its loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuml.devices import CPU, Array, array_module, device_of
from gpuml.losses import Loss, get_loss, mean_squared_error, softmax_cross_entropy
from gpuml.models import Model, Parameters

# Multiples of the step that are tried in turn. Smaller ones get away from a kink, and where the
# loss bends sharply; larger ones rise above the rounding where the loss hardly changes.
STEPS = (1, 1 / 16, 1 / 256, 16, 256)

# A slope is trusted if what is known of its error is below this share of the tolerance.
# A kink that both step sizes straddle makes an error of at most 4 times what it shows.
SHARE = 1 / 8

ROUNDING = 10  # errors in the loss, in units in the last place

EVERYWHERE = "all parameters"


@dataclass(frozen=True, repr=False)
class GradientCheck:
    """What :func:`gradient_check` found; true if the gradient is right.

    Attributes
    ----------
    largest_error : float
        The largest difference between backward pass and finite differences, relative to the
        larger of the two; infinite if the gradient is not finite.
    parameter : str
        Where it is: a name among the parameters, or ``"all parameters"``.
    index : tuple of int or None
        The entry of the parameter; None for a derivative along a random direction in it.
    backward, differences : float
        What the two say there.
    n_compared : int
        How many derivatives were compared.
    n_set_aside : int
        How many were not, since finite differences say nothing there: a kink lies too near.
    tolerance : float
        What `largest_error` may be: the cube root of the machine epsilon, 6e-6 in float64.
    """

    largest_error: float
    parameter: str
    index: tuple[int, ...] | None
    backward: float
    differences: float
    n_compared: int
    n_set_aside: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether derivatives were compared and agree."""
        return self.n_compared > 0 and self.largest_error <= self.tolerance

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        """Say it in two lines."""
        place = self.parameter
        place += f" {list(self.index)}" if self.index is not None else ", in a random direction"
        counts = f"{self.n_compared} derivatives compared, tolerance {self.tolerance:.1g}"
        if self.n_set_aside:
            counts += f"; {self.n_set_aside} set aside: a kink is too near"
        if self.passed:
            return f"gradient check passed: error at most {self.largest_error:.1e}\n{counts}"
        if not self.n_compared:
            return f"gradient check FAILED: nothing could be compared\n{counts}"
        said = f"backward says {self.backward:.6g}, differences say {self.differences:.6g}"
        if math.isnan(self.backward):
            said = "not finite: backward must write all gradients where it is told, adding to none"
        return f"gradient check FAILED: error {self.largest_error:.1e} at {place}\n{said}; {counts}"


def gradient_check(
    model: Model,
    X: Array,
    y: Array,
    *,
    loss: str | Loss | None = None,
    n_checks: int = 20,
    step: float | None = None,
    seed: int = 0,
) -> GradientCheck:
    """Compare a model's gradient with central finite differences of its loss.

    ∂loss/∂p ≈ (loss(p + h) - loss(p - h)) / 2h for entries of each parameter, chosen at random,
    and the derivative along a random direction in each parameter and in all of them together,
    which would notice any wrong entry.

    Parameters
    ----------
    model : Model
        One of this package or of one's own; it is not changed. Everything is computed from
        copies of its parameters in float64, whatever their type.
    X : array of shape (n_samples, n_features)
        On the model's device, or in host memory. Some dozen samples suffice.
    y : array of shape (n_samples,) or (n_samples, n_outputs)
        As for :func:`gpuml.train`.
    loss : str or callable, optional
        As for :func:`gpuml.train`.
    n_checks : int
        How many entries to check, spread evenly over the parameters.
    step : float, optional
        h, in units of the parameter, or of 1 where that is less. Unless given, the cube root of
        the machine epsilon, at which truncation and rounding are alike, and other steps where
        that one does not suit.
    seed : int
        For the choice of entries and directions.

    Returns
    -------
    GradientCheck

    Raises
    ------
    TypeError
        If `X` lives on a GPU and the model elsewhere, or something is not numbers.
    ValueError
        If shapes do not fit, labels are not classes of the model, the loss is not finite, or a
        setting is out of range.

    Notes
    -----
    At a kink, such as that of ReLU, the two sides have different slopes, and neither the
    difference across it nor the gradient is the derivative. Each slope is therefore measured
    with h and with h / 2. Away from kinks the central differences agree up to O(h²), and the
    second differences, divided by h, shrink by half. Where either is not so, smaller and larger
    steps are tried, and if no step will do, the derivative is set aside.

    The backward pass is given an array of NaN to write to, since :func:`gpuml.train` gives it
    the one of the step before: a gradient that is added to it, or not written, is noticed.

    References
    ----------
    Gill, Murray, Wright: Practical Optimization. 1981. Section 8.6.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuml.models import MLP
    >>> X, y = np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 3
    >>> check = gradient_check(MLP([4, 8, 3], device="cpu"), X, y)
    >>> bool(check), check.n_compared
    (True, 25)
    """
    if n_checks < 1 or n_checks != int(n_checks):
        raise ValueError(f"n_checks must be a positive integer, got {n_checks}")
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step must be positive, got {step}")
    with model.device.use(), np.errstate(all="ignore"):
        x, targets, loss = _prepared(model, X, y, loss)
        parameters = _in_float64(model.parameters)
        check = _Check(model, parameters, x, targets, loss, step)
        generator = np.random.default_rng(seed)
        found = [check.along(*line) for line in _entries(parameters, int(n_checks), generator)]
        places = [*parameters, EVERYWHERE] if len(parameters) > 1 else [*parameters]
        for name in places:
            line = check.along(name, None, _random_direction(parameters, name, generator))
            if line is not None and line.error > check.tolerance:
                # Kinks at the very point can cancel in one direction, as slopes of t and -t do.
                again = check.along(name, None, _random_direction(parameters, name, generator))
                line = None if again is None else min(line, again, key=lambda found: found.error)
            found.append(line)
    compared = [line for line in found if line is not None]
    nothing = _Compared(math.nan, EVERYWHERE, None, math.nan, math.nan)
    worst = max(compared, key=lambda line: line.error, default=nothing)
    return GradientCheck(
        worst.error,
        worst.name,
        worst.index,
        worst.backward,
        worst.differences,
        n_compared=len(compared),
        n_set_aside=len(found) - len(compared),
        tolerance=check.tolerance,
    )


@dataclass(frozen=True)
class _Compared:
    """A derivative as the backward pass has it, and as finite differences have it."""

    error: float
    name: str
    index: tuple[int, ...] | None
    backward: float
    differences: float


class _Check:
    """The loss of a model near its parameters, and its gradient by the backward pass."""

    def __init__(
        self,
        model: Model,
        parameters: Parameters,
        x: Array,
        targets: Array,
        loss: Loss,
        step: float | None,
    ) -> None:
        self._model, self._parameters = model, parameters
        self._x, self._targets, self._loss = x, targets, loss
        self._moved = Parameters(parameters.flat.copy(), parameters.shapes)

        predictions, backward = model.forward(parameters, x)
        types = [predictions.dtype]
        value, d_predictions = loss(predictions, targets)
        types.append(getattr(value, "dtype", np.dtype(np.float64)))
        if not math.isfinite(_total(value)):
            raise ValueError(f"the loss is {_total(value)}: there is no gradient to check")
        self._gradients = parameters.zeros_like()
        self._gradients.flat[...] = math.nan
        backward(d_predictions, self._gradients)

        # A model, or a loss, may compute in a shorter type than it is given.
        self._epsilon = max(float(np.finfo(dtype).eps) for dtype in types)
        self.tolerance = self._epsilon ** (1 / 3)
        self._steps = [self.tolerance * s for s in STEPS] if step is None else [step]

    def along(
        self, name: str, index: tuple[int, ...] | None, direction: Parameters
    ) -> _Compared | None:
        """Compare the derivatives along a line; None if finite differences say nothing there."""
        d = direction.flat
        changes = array_module(d).where(d != 0, self._gradients.flat * d, 0)  # where NaN stays out
        backward, size = float(changes.sum()), _norm(changes)
        if not math.isfinite(size):
            return _Compared(math.inf, name, index, math.nan, math.nan)
        slope = self._slope(direction, size)
        if not slope.error <= SHARE * self.tolerance * max(abs(slope.value), size) + slope.rounding:
            return None
        # The last term is what rounding alone may make of a slope that is next to nothing.
        scale = max(abs(slope.value), size) + slope.rounding / self.tolerance
        error = abs(backward - slope.value) / scale if scale else 0.0
        unit = 1.0 if index is None else float(direction[name][index])
        return _Compared(error, name, index, backward / unit, slope.value / unit)

    def _slope(self, direction: Parameters, size: float) -> _Slope:
        """Return the slope at 0 with the first step that gives it well, else with the best."""
        middle, _ = self._value(direction, 0.0)
        slopes = []
        for h in self._steps:
            up, rounded = self._value(direction, h)
            down, near_up, near_down = (self._value(direction, t)[0] for t in (-h, h / 2, -h / 2))
            wide, narrow = (up - down) / (2 * h), (near_up - near_down) / h
            wide_bend = (up - 2 * middle + down) / h
            narrow_bend = (near_up - 2 * middle + near_down) / (h / 2)
            error = max(abs(wide - narrow), abs(narrow_bend - wide_bend / 2))
            rounding = ROUNDING * self._epsilon * rounded / h
            if not math.isfinite(error + rounding):
                error, rounding = math.inf, 0.0
            slopes.append(_Slope(narrow, error, rounding))
            if error + rounding <= SHARE * self.tolerance * max(abs(narrow), size):
                break
        return min(slopes, key=lambda slope: slope.error + slope.rounding)

    def _value(self, direction: Parameters, t: float) -> tuple[float, float]:
        """Return the loss at p + t d, and the size of the numbers that are rounded in it."""
        self._moved.flat[...] = self._parameters.flat + t * direction.flat
        predictions, _ = self._model.forward(self._moved, self._x)
        size = _norm(predictions)
        value, d_predictions = self._loss(predictions, self._targets)
        return _total(value), abs(_total(value)) + size * _norm(d_predictions)


@dataclass(frozen=True)
class _Slope:
    """A derivative by finite differences, the error that shows in it, and its rounding."""

    value: float
    error: float
    rounding: float


def _entries(
    parameters: Parameters, n_checks: int, generator: np.random.Generator
) -> Iterator[tuple[str, tuple[int, ...], Parameters]]:
    """Yield name, index and direction of entries, in turn from each of the parameters.

    Directions are as long as the entry, or 1 if it is less.
    """
    names = [name for name in parameters if parameters[name].size]
    columns = []
    for i in generator.permutation(len(names)):
        array = parameters[names[i]]
        places = generator.choice(array.size, min(n_checks, array.size), replace=False)
        columns.append([(names[i], np.unravel_index(place, array.shape)) for place in places])
    rows = itertools.zip_longest(*columns)
    chosen = [entry for row in rows for entry in row if entry is not None]
    direction = parameters.zeros_like()
    for name, place in chosen[:n_checks]:
        index = tuple(map(int, place))
        direction[name][index] = max(1.0, abs(float(parameters[name][index])))
        yield name, index, direction
        direction[name][index] = 0


def _random_direction(
    parameters: Parameters, name: str, generator: np.random.Generator
) -> Parameters:
    """Return a direction in one parameter or in all, in the units that single entries have."""
    flat = parameters.flat
    device = device_of(flat)
    noise = device.asarray(generator.standard_normal(flat.shape))
    drawn = Parameters(noise * device.xp.maximum(abs(flat), 1), parameters.shapes)
    if name == EVERYWHERE:
        return drawn
    direction = parameters.zeros_like()
    direction[name] = drawn[name]
    return direction


def _prepared(
    model: Model, X: Array, y: Array, loss: str | Loss | None
) -> tuple[Array, Array, Loss]:
    """Return inputs, targets and loss as :func:`gpuml.train` has them, in float64."""
    device, data_device = model.device, device_of(X, y)
    if data_device not in (CPU, device):
        raise TypeError(
            f"the model is on {device.kind}, X and y are on gpu:{data_device.index}: "
            f'model.to("gpu:{data_device.index}") moves the model'
        )
    if X.ndim != 2 or 0 in X.shape or len(X) != len(y):
        raise ValueError(
            f"X has shape {X.shape}, y {y.shape}: expected (n_samples, n_features), not empty, and "
            "as many in y"
        )
    for name, a in (("X", X), ("y", y)):
        if a.dtype.kind not in "biuf":
            raise TypeError(f"{name} must hold real numbers, got {a.dtype}")
    whole = y.dtype.kind in "iu"
    loss = get_loss(loss or ("cross_entropy" if whole and y.ndim == 1 else mean_squared_error))
    x = device.asarray(X, np.float64)
    if loss is softmax_cross_entropy and whole:
        n_classes = model(device.asarray(X[:1], model.dtype)).shape[-1]
        if y.min() < 0 or y.max() >= n_classes:
            raise ValueError(
                f"labels must be from 0 to {n_classes - 1}, one for each of the model's outputs, "
                f"got {int(y.min())} to {int(y.max())}"
            )
    if whole and loss is not mean_squared_error:
        return x, device.asarray(y, np.int64), loss
    targets = device.asarray(y, np.float64)
    return x, targets[:, None] if targets.ndim == 1 else targets, loss


def _in_float64(parameters: Parameters) -> Parameters:
    return Parameters(parameters.flat.astype(np.float64), parameters.shapes)


def _total(value: Any) -> float:
    """Return the loss; of a population, the sum over its models."""
    return float(value.sum()) if hasattr(value, "sum") else float(value)


def _norm(a: Any) -> float:
    return math.sqrt(float((a * a).sum()))
