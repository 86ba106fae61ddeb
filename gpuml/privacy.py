"""Private training: what a model learned tells almost nothing about any one row.

DP-SGD: each row's gradient is clipped, and their sum gets normal noise. How much privacy that
leaves is reckoned by Google's library dp-accounting (``pip install dp-accounting``).
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from gpuml.batches import Batches, PoissonBatches
from gpuml.devices import Array, array_module
from gpuml.errors import GpumlError
from gpuml.gpu_layers import fused
from gpuml.kernels import load_kernel
from gpuml.losses import LOSSES, Loss
from gpuml.models import MODELS, Model
from gpuml.noise import Noise
from gpuml.steps import Gradient, Work
from gpuml.training import positive_integer, positive_number

# Noise multipliers that are tried to keep a budget; beyond them nothing is learned, or nothing hid.
LEAST_NOISE, MOST_NOISE = 0.1, 100.0


@dataclass(frozen=True)
class Privacy:
    """Settings of private training, for ``gpuml.train(…, privacy=Privacy(…))``.

    Each step draws its rows by chance, each with probability q = batch_size / n_samples, and
    takes the gradient (Σ gᵢ min(1, clip_norm / ‖gᵢ‖) + noise) / batch_size, where the noise is
    normal with standard deviation noise_multiplier · clip_norm.

    Parameters
    ----------
    clip_norm : float
        How long the gradient of one row may be, all parameters together.
    noise_multiplier : float, optional
        Unless given the least that keeps to `epsilon`.
    epsilon : float, optional
        The budget, which the whole training may not exceed.
    delta : float or None
        Below one over the number of rows. With None, for studies and where dp-accounting cannot
        be had, nobody reckons what is spent: the column ``epsilon`` holds NaN, and there can be
        no budget. :func:`spent_epsilon` says it for numbers alone.
    seed : int or None
        For the choice of rows and the noise. None takes secrets from the operating system. A
        seed that others know, or that served for another training on these rows, takes the
        privacy away, and so does a checkpoint in the hands of others.

    Raises
    ------
    ValueError
        If a number is out of range, neither noise_multiplier nor epsilon is given, or a budget is
        given without delta.

    Notes
    -----
    The history's column ``epsilon`` holds what is spent after each epoch: with another row added
    or removed, no event becomes more than e^epsilon times as likely, plus delta. It covers the
    rows of `X` and `y`, not how they were prepared, nor validation data, nor the choice among
    several trainings; the number of rows counts as known. It is said of the model: the losses in
    the history have no noise. It is for exact numbers: in floating
    point, noise has gaps (Mironov: On Significance of the Least Significant Bits for
    Differential Privacy. 2012). Philox, which draws it, is no cryptographic generator.

    References
    ----------
    Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang: Deep Learning with Differential
    Privacy. CCS 2016. Mironov, Talwar, Zhang: Rényi Differential Privacy of the Sampled Gaussian
    Mechanism. 2019.

    Examples
    --------
    >>> Privacy(clip_norm=1.0, noise_multiplier=1.1)
    Privacy(clip_norm=1.0, noise_multiplier=1.1, epsilon=None, delta=1e-05, seed=None)
    """

    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = 1e-5
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("clip_norm", "noise_multiplier", "epsilon", "delta"):
            value = getattr(self, name)
            if value is not None or name == "clip_norm":
                object.__setattr__(self, name, positive_number(name, value))
        if self.delta is not None and self.delta >= 1:
            raise ValueError(f"delta must be less than 1, got {self.delta:g}")
        if self.delta is None and self.epsilon is not None:
            raise ValueError(f"a budget of epsilon={self.epsilon:g} needs a delta, such as 1e-5")
        if self.noise_multiplier is None and self.epsilon is None:
            raise ValueError("give noise_multiplier, or a budget: Privacy(epsilon=3)")

    def generator(self) -> np.random.Generator:
        """Return what chooses the rows of each step."""
        return np.random.default_rng(self.seed)

    def method(self, data: PoissonBatches, n_epochs: int) -> PrivateGradients:
        """Return how gradients are found, with noise enough for the budget.

        Parameters
        ----------
        data : PoissonBatches
        n_epochs : int

        Raises
        ------
        GpumlError
            If dp-accounting is not installed.
        ValueError
            If delta is too large for so many rows, or the budget cannot be kept; the message
            says which can.
        """
        if self.delta is None:
            return PrivateGradients(self, None, data.expected_rows)
        _check_delta(self.delta, data.n_samples)
        plan = _Plan(data.probability, data.n_steps, self.delta)
        noise, n_steps = self.noise_multiplier, n_epochs * data.n_steps
        if noise is None:
            assert self.epsilon is not None
            noise = plan.least_noise(self.epsilon, n_steps)
        elif self.epsilon is not None and plan.epsilon(noise, n_steps) > self.epsilon:
            raise ValueError(self._over_budget(plan, noise, n_epochs))
        return PrivateGradients(replace(self, noise_multiplier=noise), plan, data.expected_rows)

    def _over_budget(self, plan: _Plan, noise: float, n_epochs: int) -> str:
        assert self.epsilon is not None
        spent = plan.epsilon(noise, n_epochs * plan.n_steps)
        budget = self.epsilon
        most = bisect_right(
            range(1, n_epochs), budget, key=lambda n: plan.epsilon(noise, n * plan.n_steps)
        )
        cures = [f"n_epochs={most}"] if most else []
        try:
            least = plan.least_noise(self.epsilon, n_epochs * plan.n_steps)
            cures.insert(0, f"noise_multiplier={least:g}")
        except ValueError as error:
            cures.append(f"epsilon={spent:.4g} ({error})")
        return (
            f"noise_multiplier={noise:g} spends epsilon={spent:.4g} in {n_epochs} epochs, more "
            f"than the budget of {self.epsilon:g}. What keeps to it: {', or '.join(cures)}"
        )


def spent_epsilon(
    noise_multiplier: float,
    *,
    n_samples: int,
    batch_size: int,
    n_epochs: int,
    delta: float = 1e-5,
) -> float:
    """Return the epsilon that private training would spend, without training, by dp-accounting.

    Parameters
    ----------
    noise_multiplier, delta
        As for :class:`Privacy`.
    n_samples, batch_size, n_epochs : int
        As for :func:`gpuml.train`.

    Raises
    ------
    GpumlError
        If dp-accounting is not installed.
    ValueError
        If a number is out of range, or delta too large for so many rows.
    """
    noise = positive_number("noise_multiplier", noise_multiplier)
    n_samples = positive_integer("n_samples", n_samples)
    batch_size = min(positive_integer("batch_size", batch_size), n_samples)
    n_epochs, delta = positive_integer("n_epochs", n_epochs), positive_number("delta", delta)
    _check_delta(delta, n_samples)
    n_steps = -(-n_samples // batch_size)  # in an epoch
    return _Plan(batch_size / n_samples, n_steps, delta).epsilon(noise, n_epochs * n_steps)


def _check_delta(delta: float, n_samples: int) -> None:
    if delta * n_samples >= 1:
        raise ValueError(
            f"delta={delta:g} would allow one of {n_samples:,} rows to be told as it "
            f"is: it must be less than {1 / n_samples:.2g}"
        )


class _Plan:
    """What is spent by steps that draw each row with one probability."""

    def __init__(self, probability: float, n_steps: int, delta: float) -> None:
        try:
            import dp_accounting
            from dp_accounting import rdp
        except ImportError as error:
            raise GpumlError(
                "private training has dp-accounting reckon what is spent, and it is not there: "
                f"pip install dp-accounting ({error})"
            ) from None
        self._library, self._rdp = dp_accounting, rdp
        self.probability, self.n_steps, self.delta = probability, n_steps, delta
        self._divergences: dict[float, tuple[Any, Any]] = {}

    def epsilon(self, noise: float, n_steps: int) -> float:
        """Return what some steps spend, by the library."""
        if n_steps == 0:
            return 0.0
        if noise not in self._divergences:
            accountant = self._rdp.RdpAccountant()
            with _quiet():
                accountant.compose(self._event(noise, 1))
            self._divergences[noise] = accountant.orders, accountant.rdp
        orders, divergences = self._divergences[noise]  # which add up from step to step
        epsilon, _ = self._rdp.compute_epsilon(orders, divergences * n_steps, self.delta)
        return float(epsilon)

    def least_noise(self, epsilon: float, n_steps: int) -> float:
        """Return the least noise multiplier for a budget, rounded up."""
        least = self.epsilon(MOST_NOISE, n_steps)
        if least > epsilon:
            raise ValueError(
                f"epsilon={epsilon:g} cannot be met in {n_steps:,} steps at delta={self.delta:g}: "
                f"with a noise_multiplier of {MOST_NOISE:g}, which drowns all, it is {least:.4g}"
            )
        if self.epsilon(LEAST_NOISE, n_steps) <= epsilon:
            return LEAST_NOISE
        with _quiet():
            found = self._library.calibrate_dp_mechanism(
                self._rdp.RdpAccountant,
                lambda noise: self._event(noise, n_steps),
                epsilon,
                self.delta,
                self._library.ExplicitBracketInterval(LEAST_NOISE, MOST_NOISE),
                tol=1e-4,
            )
        return math.ceil(float(found) * 1e4) / 1e4

    def _event(self, noise: float, n_steps: int) -> Any:
        step = self._library.GaussianDpEvent(noise)
        if self.probability < 1:
            step = self._library.PoissonSampledDpEvent(self.probability, step)
        return self._library.SelfComposedDpEvent(step, n_steps)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library from telling which orders it leaves out: the others are as good a bound."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class PrivateGradients:
    """Finds clipped gradients with noise; a :class:`gpuml.steps.Method`.

    Parameters
    ----------
    settings : Privacy
        With a noise multiplier.
    plan
        None if nobody reckons what is spent.
    expected_rows : float
        By which the sum is divided: the number drawn is a secret.
    """

    name = "private training"
    n_gradients = 1

    def __init__(self, settings: Privacy, plan: _Plan | None, expected_rows: float) -> None:
        self.settings, self._plan, self._expected_rows = settings, plan, expected_rows

    def __repr__(self) -> str:
        return repr(self.settings)

    def spent(self, n_epochs: int) -> float:
        """Return the epsilon after so many epochs; NaN if nobody reckons it."""
        assert self.settings.noise_multiplier is not None
        if self._plan is None:
            return math.nan
        return self._plan.epsilon(self.settings.noise_multiplier, n_epochs * self._plan.n_steps)

    def note(self, n_epochs: int) -> str:
        """Return what can be said of the model after so many epochs."""
        if self._plan is None:
            return (
                "trained with clipped gradients and a noise multiplier of "
                f"{self.settings.noise_multiplier:g}; what it spent was not reckoned (delta=None)"
            )
        return (
            f"differentially private with epsilon {self.spent(n_epochs):.4g} at delta "
            f"{self.settings.delta:g}, by dp-accounting (Rényi divergences): rows drawn with "
            f"probability {self._plan.probability:.4g}, noise multiplier "
            f"{self.settings.noise_multiplier:g}"
        )

    def check(self, model: Model, data: Batches, loss: Loss) -> None:
        """Refuse models and losses whose gradients cannot be told row by row.

        Raises
        ------
        ValueError
        """
        if type(model) not in MODELS.values() or model.dtype.name not in ("float32", "float64"):
            raise ValueError(
                "private training is for Linear models and MLPs of float32 or float64, whose "
                "layers tell the length of each row's gradient"
            )
        if loss not in LOSSES.values():
            raise ValueError(f"private training is for the losses {', '.join(LOSSES)}")

    def prepare(self, work: Work) -> Callable[[Gradient, Array, Array], Array]:
        """Return what takes gradients in private; see :class:`gpuml.steps.Method`."""
        if work.options:
            raise ValueError(
                "private training multiplies exactly: rounded gradients could be longer than "
                "clip_norm; leave precision away"
            )
        settings = self.settings
        assert settings.noise_multiplier is not None
        seed = None if settings.seed is None else [settings.seed, 1]  # not that of the rows
        noise = Noise(seed, work.model.device)
        work.state["privacy"] = noise.state
        keep = 1 / self._expected_rows
        scale = settings.noise_multiplier * settings.clip_norm * keep

        def private_gradient(_: Gradient, x: Array, y: Array) -> Array:
            value = clipped_sum(work, x, y, settings.clip_norm)
            noise.add_normal(work.gradients.flat, keep, scale)
            return value

        return private_gradient


def clipped_sum(work: Work, x: Array, y: Array, longest: float) -> Array:
    """Write the sum of the rows' gradients, each clipped, and return the mean loss of the rows.

    No row's gradient is ever made. Of a layer with inputs a and the gradient d at its outputs it
    is aᵀ d, and d for the bias, so that ‖g‖² = Σ over the layers of (‖a‖² + 1) ‖d‖². Then each
    row's d is scaled, and one product a layer gives the sum.

    Parameters
    ----------
    work : Work
    x : array of shape (batch, features)
    y : array of shape (batch,) or (batch, outputs)
        As :class:`gpuml.batches.PoissonBatches` yields it: rows whose label is -1, or whose
        targets are NaN, count for nothing.
    longest : float

    Returns
    -------
    array of shape ()

    References
    ----------
    Goodfellow: Efficient Per-Example Gradient Computations. 2015.
    """
    xp = array_module(x)
    is_label = y.dtype.kind in "iu"
    missing = y < 0 if is_label else xp.isnan(y[:, 0])
    present = (~missing).astype(x.dtype)
    targets = xp.maximum(y, 0) if is_label else xp.where(missing[:, None], y.dtype.type(0), y)
    predictions, backward = work.model.forward(work.parameters, x)
    # Each row is a batch of its own, so that its gradient is not divided by their number.
    values, d = work.loss(predictions[:, None], targets[:, None])
    has_bias = [bias in work.gradients for _, bias in reversed(work.model.layers)]
    factors = _Factors(present, longest, has_bias)
    options: Any = {"row_factors": factors}
    backward(d.reshape(predictions.shape), work.gradients, **options)
    if fused(xp):
        mean = xp.empty((), values.dtype)
        kernel = _kernel("private_rows_mean", values.dtype.name)
        kernel((1,), (256,), (values, present, np.int32(len(x)), mean))
        return mean
    return (values * present).sum() / xp.maximum(present.sum(), 1)


class _Factors:
    """By what the gradient of each row is multiplied: min(1, longest / its length), or 0."""

    def __init__(self, present: Array, longest: float, has_bias: list[bool]) -> None:
        self._present, self._longest, self._has_bias = present, longest, has_bias

    def __call__(self, layers: Sequence[tuple[Array, Array]]) -> Array:
        """Return them, of shape (batch, 1), from each layer's inputs and gradients."""
        xp = array_module(self._present)
        if fused(xp):
            return self._by_kernel(xp, layers)
        squares = np.zeros(()) if xp is np else xp.zeros(())
        for (a, d), bias in zip(layers, self._has_bias, strict=True):
            squares = squares + (_squares(a) + bias) * _squares(d)
        factors = self._longest / xp.sqrt(squares)
        factors = xp.where(factors >= 1, 1, factors)
        return xp.where(self._present > 0, factors, 0).astype(self._present.dtype)[:, None]

    def _by_kernel(self, xp: Any, layers: Sequence[tuple[Array, Array]]) -> Array:
        rows = len(self._present)
        squares, factors = xp.empty(rows), xp.empty((rows, 1), self._present.dtype)
        kernel = _kernel("private_rows", self._present.dtype.name)
        for i, ((a, d), bias) in enumerate(zip(layers, self._has_bias, strict=True)):
            a, d = xp.ascontiguousarray(a), xp.ascontiguousarray(d)
            flags = bias, i == 0, i == len(layers) - 1
            sizes = rows, a.shape[1], d.shape[1], *flags
            numbers = self._present, np.float64(self._longest), squares, factors
            kernel((-(-rows // 8),), (256,), (a, d, *map(np.int32, sizes), *numbers))
        return factors


def _squares(rows: Array) -> Array:
    """Return the squared length of each row, in float64."""
    xp = array_module(rows)
    if rows.dtype == np.float32:
        rows = rows.astype(np.float64)
    return xp.square(rows).sum(axis=1)


@cache
def _kernel(function: str, number: str) -> Any:
    options = (f"-DNUMBER={ {'float32': 'float', 'float64': 'double'}[number] }",)
    return load_kernel("private_rows", function, options=options)
