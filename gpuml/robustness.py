"""Robust models: small changes of inputs that fool a model, and training that resists them.

An attack moves inputs along the gradient of the loss with respect to them, and stays within a
ball around where they were, and within the range of the data.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from gpuml.batches import Batches
from gpuml.devices import Array, array_module, blas_threads, device_of, to_host
from gpuml.errors import DataError
from gpuml.faults import cause_in_data, cause_in_weights, first_non_finite
from gpuml.gpu_layers import fused
from gpuml.losses import LOSSES, Loss, get_loss, softmax_cross_entropy
from gpuml.models import MODELS, Model, Parameters
from gpuml.noise import Noise
from gpuml.steps import Gradient, Recorder, Repeated, Work, graph_limit
from gpuml.training import (
    EVALUATED_ROWS,
    check_model,
    largest_product,
    positive_integer,
    source_of,
    usual_loss,
)

Norm: TypeAlias = Literal["inf", 2]
Bounds: TypeAlias = tuple[float, float] | None

# From so many steps of attacks on they are captured. On an H100 100 steps take 0.012 s then instead
# of 0.036 s; the first time in a process what captures products is loaded in 0.4 s, which one call
# of 1,600 steps earns, or several shorter ones.
CAPTURE_PAYS = 100

FOOLED = 1e6  # what a wrong label counts beside the loss, when perturbations are compared


@dataclass(frozen=True)
class PGD:
    """Settings of projected gradient descent, for ``gpuml.train(…, adversarial=PGD(…))``.

    Each step of training finds perturbations of its batch, and learns from the perturbed rows:
    min over the weights of the mean of max over ‖δ‖ ≤ strength of loss(x + δ).

    Parameters
    ----------
    strength : float
        The radius of the ball.
    norm : {"inf", 2}
        How it is measured.
    n_steps : int
        Gradients for each perturbation: so many times more work than plain training.
    step_size : float, optional
        2.5 · strength / n_steps unless given.
    random_start : bool
        Whether to begin anywhere in the ball, and not at the inputs.
    bounds : (float, float) or None
        The range of the data, which perturbed rows do not leave.
    seed : int
        For the starts.

    Raises
    ------
    ValueError
        If a setting is out of range.

    References
    ----------
    Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to
    Adversarial Attacks. ICLR 2018.

    Examples
    --------
    >>> PGD(strength=0.1).step_size
    0.03571428571428571
    """

    name: ClassVar[str] = "adversarial training"

    strength: float = 0.1
    norm: Norm = "inf"
    n_steps: int = 7
    step_size: float | None = None
    random_start: bool = True
    bounds: Bounds = (0.0, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = _checked_bounds(self.bounds)
        norm = _checked_norm(self.norm)
        strength = _checked_strength(self.strength, norm, bounds)
        n_steps = positive_integer("n_steps", self.n_steps)
        step_size = 2.5 * strength / n_steps if self.step_size is None else self.step_size
        if not _is_number(step_size) or step_size < 0 or (step_size == 0) != (strength == 0):
            raise ValueError(f"step_size must be a positive number, got {step_size!r}")
        checked = {"strength": strength, "norm": norm, "n_steps": n_steps, "bounds": bounds}
        for name, value in {**checked, "step_size": float(step_size)}.items():
            object.__setattr__(self, name, value)

    @property
    def n_gradients(self) -> int:
        """How many plain steps one step of training takes."""
        return self.n_steps + 1

    def check(self, model: Model, data: Batches, loss: Loss) -> None:
        """Read the data once, and refuse what cannot be attacked.

        Raises
        ------
        ValueError
            If data are outside the bounds, the strength is beyond them, or the model carries no
            gradient to its inputs.
        """
        lowest, highest, n_rows = math.inf, -math.inf, 0
        for x, y in data.epoch(None):
            if lowest == math.inf:
                _check_input_gradient(model, x[:1], y[:1], loss)
                largest_distance = math.sqrt(x.shape[1])
            if self.bounds is None:
                return
            low, high = float(x.min()), float(x.max())
            if math.isnan(low):
                return  # training, or its loss, will name the place
            found = None if math.isfinite(high - low) else first_non_finite(x, x.dtype)
            if found is not None:  # and an attack would bring it back into the bounds
                row, column, value = found
                raise DataError(
                    f"row {n_rows + row}, column {column} of X is {value:g} in {x.dtype}, outside "
                    f"bounds={self.bounds}"
                )
            lowest, highest, n_rows = min(lowest, low), max(highest, high), n_rows + len(x)
        assert self.bounds is not None
        low, high = map(x.dtype.type, self.bounds)
        if lowest < low or highest > high:
            raise ValueError(
                f"X has numbers from {lowest:g} to {highest:g}, outside bounds={self.bounds}: "
                "give the range of your data"
            )
        if self.norm == 2:
            most = largest_distance * (self.bounds[1] - self.bounds[0])
            if self.strength > most:
                raise ValueError(_too_strong(self.strength, self.bounds, most))

    def prepare(self, work: Work) -> Callable[[Gradient, Array, Array], Array]:
        """Return what takes the gradient on perturbed batches; see :class:`gpuml.steps.Method`."""
        noise = Noise(self.seed, work.model.device)
        work.state["adversarial"] = noise.state
        attack = _Attack(self, work.model, work.loss, noise, work.parameters, work.options)
        return lambda gradient, x, y: gradient(attack(x, y), y)


class _Attack:
    """Projected gradient descent on a batch; it never waits for the device."""

    def __init__(
        self,
        settings: PGD,
        model: Model,
        loss: Loss,
        noise: Noise,
        parameters: Parameters | None = None,
        options: dict[str, Any] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._settings, self._model, self._loss, self._noise = settings, model, loss, noise
        self._parameters, self._options = parameters or model.parameters, options or {}
        self._low, self._high = settings.bounds or (-math.inf, math.inf)
        self._repeated, self._pads = Repeated(recorder), recorder is not None

    def __call__(self, x: Array, y: Array) -> Array:
        """Return perturbed rows."""
        settings, xp, n = self._settings, array_module(x), len(x)
        if self._pads and _padded(n) > n:
            rows = xp.minimum(xp.arange(_padded(n)), n - 1)
            x, y = x[rows], y[rows]
        x = xp.ascontiguousarray(x)
        moved = self._start(x) if settings.random_start else x.copy()
        self._repeated(self._step, settings.n_steps, moved, x, y)
        return moved[:n]

    def _step(self, moved: Array, x: Array, y: Array) -> None:
        take_step = self._step_inf if self._settings.norm == "inf" else self._step_2
        take_step(moved, x, self._gradient(moved, y))

    def _gradient(self, x: Array, y: Array) -> Array:
        predictions, backward = self._model.forward(self._parameters, x, **self._options)
        _, d_predictions = self._loss(predictions, y)
        only: Any = {}
        if type(self._model).forward is Model.forward:  # else it may not know the option
            only = {"parameter_gradients": False}
        d_x: Any = backward(d_predictions, input_gradient=True, **only)[1]
        return d_x

    def _start(self, x: Array) -> Array:
        """Return points that are uniform in the ball around each row, cut off at the bounds."""
        xp, strength = array_module(x), self._settings.strength
        if self._settings.norm == "inf":
            moved = self._noise.uniform(x.shape, x.dtype)
            moved *= strength
        else:
            moved = self._noise.normal(x.shape, x.dtype)
            share = abs(self._noise.uniform((len(x), 1), x.dtype)) ** (1 / x.shape[1])
            moved *= strength * share / _lengths(moved)
        moved += x
        xp.clip(moved, self._low, self._high, out=moved)
        return moved

    def _step_inf(self, moved: Array, x: Array, gradient: Array) -> None:
        xp, settings = array_module(x), self._settings
        if fused(xp):
            numbers = settings.step_size, settings.strength, self._low, self._high
            _step_kernel()(x, gradient, *map(x.dtype.type, numbers), moved)
            return
        # NumPy's sign takes four times as long.
        step = xp.subtract(gradient > 0, gradient < 0, dtype=gradient.dtype)
        step *= settings.step_size
        moved += step
        xp.maximum(moved, x - settings.strength, out=moved)
        xp.minimum(moved, x + settings.strength, out=moved)
        xp.clip(moved, self._low, self._high, out=moved)

    def _step_2(self, moved: Array, x: Array, gradient: Array) -> None:
        xp, settings = array_module(x), self._settings
        # Sure of its label, a model has gradients so small that their squares would vanish.
        largest = abs(gradient).max(axis=1, keepdims=True)
        gradient /= xp.where(largest > 0, largest, 1)
        gradient *= settings.step_size / _lengths(gradient)
        moved += gradient
        moved -= x
        moved *= xp.minimum(settings.strength / _lengths(moved), 1)
        moved += x
        # Towards x, which is within the bounds: so the length does not grow.
        xp.clip(moved, self._low, self._high, out=moved)


def _padded(n_rows: int) -> int:
    """Return up to how many rows a batch is filled, so that few shapes have to be captured."""
    unit = 1 << max(0, n_rows.bit_length() - 3)  # a quarter more, at most
    return -(-n_rows // unit) * unit


def _lengths(rows: Array) -> Array:
    """Return the Euclidean length of each row, at least a tiny one, of shape (batch, 1)."""
    xp = array_module(rows)
    squares = xp.square(rows).sum(axis=1, keepdims=True)
    return xp.sqrt(xp.maximum(squares, np.finfo(rows.dtype).tiny))


@cache
def _step_kernel() -> Any:
    import cupy

    return cupy.ElementwiseKernel(
        "T x, T g, T step, T strength, T low, T high",
        "T moved",
        """T next = moved + (g > 0 ? step : g < 0 ? -step : T(0));
        next = min(max(next, x - strength), x + strength);
        moved = min(max(next, low), high);""",
        "gpuml_pgd_step",
    )


def fgsm(
    model: Model,
    X: Array,
    y: Array,
    strength: float = 0.1,
    *,
    norm: Norm = "inf",
    bounds: Bounds = (0.0, 1.0),
    loss: str | Loss | None = None,
) -> Array:
    """Return inputs perturbed by the fast gradient sign method: one step of full strength.

    x + strength · sign(∂loss/∂x), or x + strength · g / ‖g‖₂ for norm 2, cut off at the bounds.

    Parameters
    ----------
    model : Model
    X : array of shape (n_samples, n_features)
        Within the bounds; on the model's device, or in host memory.
    y : array of shape (n_samples,) or (n_samples, n_outputs)
        The right answers, from which the attack leads away; as for :func:`gpuml.train`.
    strength : float
        How far each number may move ("inf"), or each row (2).
    norm : {"inf", 2}
    bounds : (float, float) or None
        The range of the data; None if there is none.
    loss : str or callable, optional
        As for :func:`gpuml.train`.

    Returns
    -------
    array of shape (n_samples, n_features)
        Of the model's type, where `X` lives.

    Raises
    ------
    TypeError
        If `X` lives on a GPU and the model elsewhere.
    ValueError
        If the strength is negative or beyond the range, data are outside it, shapes do not fit,
        or the model carries no gradient to its inputs.

    References
    ----------
    Goodfellow, Shlens, Szegedy: Explaining and Harnessing Adversarial Examples. ICLR 2015.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuml.models import Linear
    >>> model = Linear(2, 2, device="cpu")
    >>> model.parameters["weight"] = np.array([[1.0, -1.0], [-2.0, 2.0]])
    >>> fgsm(model, np.array([[0.5, 0.5]]), np.array([0]), strength=0.25).tolist()
    [[0.25, 0.75]]
    """
    settings = PGD(strength, norm, 1, strength, random_start=False, bounds=bounds)
    return _perturbed(settings, model, X, y, loss, 1)


def pgd(
    model: Model,
    X: Array,
    y: Array,
    strength: float = 0.1,
    *,
    norm: Norm = "inf",
    n_steps: int = 40,
    step_size: float | None = None,
    n_restarts: int = 1,
    random_start: bool = True,
    bounds: Bounds = (0.0, 1.0),
    loss: str | Loss | None = None,
    seed: int = 0,
) -> Array:
    """Return inputs perturbed by projected gradient descent: many small steps in the ball.

    Parameters
    ----------
    model, X, y, strength, norm, bounds, loss
        As for :func:`fgsm`.
    n_steps : int
    step_size : float, optional
        2.5 · strength / n_steps unless given.
    n_restarts : int
        How often to begin. Of each row the perturbation that fools the model is kept, and of
        several, or none, the one with the largest loss.
    random_start : bool
        Whether to begin anywhere in the ball, and not at `X`.
    seed : int
        For the starts.

    Returns
    -------
    array of shape (n_samples, n_features)
        Of the model's type, where `X` lives.

    Raises
    ------
    TypeError, ValueError
        As :func:`fgsm`.

    References
    ----------
    Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to
    Adversarial Attacks. ICLR 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuml.models import MLP
    >>> X, y = np.full((3, 4), 0.5, np.float32), np.array([0, 1, 0])
    >>> moved = pgd(MLP([4, 8, 2], device="cpu"), X, y, strength=0.25, n_steps=5)
    >>> float(abs(moved - X).max())
    0.25
    """
    n_restarts = _checked_restarts(n_restarts, random_start)
    settings = PGD(strength, norm, n_steps, step_size, random_start, bounds, seed)
    return _perturbed(settings, model, X, y, loss, n_restarts)


def adversarial_accuracy(
    model: Model,
    X: Array,
    y: Array,
    strengths: float | Sequence[float],
    *,
    norm: Norm = "inf",
    n_steps: int = 40,
    n_restarts: int = 1,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> np.ndarray[Any, Any]:
    """Return the share of rows that a model gets right although PGD attacks them.

    A row counts for a strength if the model is right about it, and none of the restarts with
    this or a lesser strength fools it. So the curve never rises.

    Parameters
    ----------
    model : Model
    X, norm, bounds
        As for :func:`fgsm`.
    y : integer array of shape (n_samples,)
    strengths : float or sequence of float
        0 is no attack: the usual accuracy.
    n_steps, n_restarts, seed
        As for :func:`pgd`; the starts are random.

    Returns
    -------
    numpy.ndarray of the shape of `strengths`

    Raises
    ------
    TypeError, ValueError
        As :func:`fgsm`; and if `y` are no labels.

    Notes
    -----
    It is an upper bound: a better attack may fool the model more often.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuml.models import Linear
    >>> model = Linear(1, 2, device="cpu")
    >>> model.parameters["weight"] = np.array([[-1.0, 1.0]])
    >>> model.parameters["bias"] = np.array([[1.0, 0.0]])
    >>> X, y = np.array([[0.0], [0.4], [0.8], [1.0]]), np.array([0, 0, 1, 1])
    >>> adversarial_accuracy(model, X, y, [0, 0.2, 0.4], n_steps=5).tolist()
    [1.0, 0.75, 0.5]
    """
    given = np.asarray(strengths, np.float64)
    n_restarts = _checked_restarts(n_restarts, True)
    flat = given.reshape(-1).tolist()
    attacks = [PGD(strength, norm, n_steps, bounds=bounds) for strength in flat]
    if y is not None and usual_loss(X, y) != "cross_entropy":
        raise ValueError("accuracy is for labels: y must be integers of shape (n_samples,)")
    weakest_first = sorted(range(len(flat)), key=flat.__getitem__)
    n_right = np.zeros(len(flat))
    noise = Noise(seed, model.device)
    prepared = _prepared(attacks, model, X, y, softmax_cross_entropy, noise, n_restarts)
    with prepared as (made, data):
        for x, labels in data.epoch(None):
            right = model(x).argmax(axis=-1) == labels
            for i in weakest_first:
                for _ in range(n_restarts if flat[i] else 0):
                    rows = model.device.xp.flatnonzero(right)
                    if not rows.size:
                        break
                    moved = made[i](x[rows], labels[rows])
                    right[rows] = model(moved).argmax(axis=-1) == labels[rows]
                n_right[i] += int(right.sum())
    return (n_right / len(X)).reshape(given.shape)


def _perturbed(
    settings: PGD, model: Model, X: Array, y: Array, loss: str | Loss | None, n_restarts: int
) -> Array:
    """Return the best of some attacks on each row."""
    check_model(model)
    loss = get_loss(loss or usual_loss(X, y))
    noise = Noise(settings.seed, model.device)
    xp, home, found = model.device.xp, device_of(X), []
    with _prepared([settings], model, X, y, loss, noise, n_restarts) as ([attack], data):
        for x, targets in data.epoch(None):
            best, best_score = attack(x, targets), None
            for _ in range(n_restarts - 1):
                if best_score is None:
                    best_score = _score(model, best, targets, loss)
                moved = attack(x, targets)
                score = _score(model, moved, targets, loss)
                best = xp.where((score > best_score)[:, None], moved, best)
                best_score = xp.maximum(score, best_score)
            found.append(to_host(best) if home.kind == "cpu" else best)
    return home.xp.concatenate(found)


def _score(model: Model, x: Array, y: Array, loss: Loss) -> Array:
    """Return how well each row fools a model: its loss, and much more where the label is wrong."""
    xp, predictions = array_module(x), model(x)
    if loss not in LOSSES.values():
        rows = [loss(predictions[i : i + 1], y[i : i + 1])[0] for i in range(len(x))]
        return xp.stack([xp.asarray(row, np.float64) for row in rows])
    values = loss(predictions[:, None], y[:, None])[0].astype(np.float64)  # each row by itself
    if loss is softmax_cross_entropy:
        values += FOOLED * (predictions.argmax(axis=-1) != y)
    return values


@contextmanager
def _prepared(
    attacks: list[PGD],
    model: Model,
    X: Array,
    y: Array,
    loss: Loss,
    noise: Noise,
    n_restarts: int,
) -> Iterator[tuple[list[_Attack], Batches]]:
    """Yield the attacks, and the data as batches, all checked."""
    if y is None:
        raise ValueError("y is missing: an attack leads away from the right answers")
    with model.device.use(), np.errstate(all="ignore"):
        data = source_of(model, X, y, loss, EVALUATED_ROWS, None, smaller=True)
        cause = cause_in_data({"X": X, "y": y}, model.dtype)
        if cause:
            raise DataError(f"what is attacked must be finite, and {cause}")
        cause = cause_in_weights(model.parameters)
        if cause:
            raise ValueError(f"a model that is attacked must be finite, and {cause}")
        for attack in attacks:
            attack.check(model, data, loss)
        with blas_threads(largest_product(model, data.batch_size)):
            n_steps = sum(a.n_steps for a in attacks if a.strength) * n_restarts * data.n_steps
            recorder = _recorder(model, loss, data) if n_steps >= CAPTURE_PAYS else None
            yield [_Attack(a, model, loss, noise, recorder=recorder) for a in attacks], data


def _recorder(model: Model, loss: Loss, data: Batches) -> Recorder | None:
    """Return what captures the steps of attacks, or None where they are called one by one."""
    # What is not of this package may do more than launch kernels.
    known = type(model) in MODELS.values() and loss in LOSSES.values()
    if not known or graph_limit(model, data) is not None:
        return None
    with suppress(Exception):  # a library that is there and does not load
        return Recorder(model.device.xp)
    return None


def _check_input_gradient(model: Model, x: Array, y: Array, loss: Loss) -> None:
    """Refuse a model whose backward does not carry the gradient on to the inputs."""
    predictions, backward = model.forward(model.parameters, x)
    found: Any = None
    if "input_gradient" in inspect.signature(backward).parameters:
        found = backward(loss(predictions, y)[1], input_gradient=True)[1]
    if getattr(found, "shape", None) != x.shape:
        raise ValueError(
            f"{type(model).__name__} has no gradient with respect to its inputs, which attacks "
            "follow: its backward(d_predictions, gradients, input_gradient=True) must return "
            "d_x, of the shape of x, as its second result"
        )


def _checked_restarts(n_restarts: int, random_start: bool) -> int:
    n_restarts = positive_integer("n_restarts", n_restarts)
    if n_restarts > 1 and not random_start:
        raise ValueError("without random_start all restarts are the same: n_restarts=1")
    return n_restarts


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _checked_bounds(bounds: Any) -> Bounds:
    if bounds is None:
        return None
    pair = isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(_is_number, bounds))
    if not pair or not bounds[0] < bounds[1]:
        raise ValueError(
            f"bounds must be the least and the greatest number that data can hold, such as "
            f"(0, 1), or None, got {bounds!r}"
        )
    return float(bounds[0]), float(bounds[1])


def _checked_norm(norm: Any) -> Norm:
    if norm in ("inf", math.inf):
        return "inf"
    if norm in (2, "2") and not isinstance(norm, bool):
        return 2
    raise ValueError(f"norm must be 'inf' or 2, got {norm!r}")


def _checked_strength(strength: Any, norm: Norm, bounds: Bounds) -> float:
    if not _is_number(strength) or strength < 0:
        raise ValueError(f"strength must be a number, 0 or more, got {strength!r}")
    if norm == "inf" and bounds is not None and strength > bounds[1] - bounds[0]:
        raise ValueError(_too_strong(strength, bounds, bounds[1] - bounds[0]))
    return float(strength)


def _too_strong(strength: float, bounds: tuple[float, float], most: float) -> str:
    return (
        f"strength={strength:g} is beyond the range of the data: with bounds={bounds} any row "
        f"becomes any other by {most:.4g}"
    )
