"""Exercises of notebook 05: the gradient of a linear model, and steps against it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from gpuml.exercises.judging import Case, Exercise, Tool


def _gradient(X: Any, Y: Any, W: Any) -> Any:
    return X.T @ (X @ W - Y) * (2 / Y.size)


def _samples(rng: np.random.Generator) -> list[Case]:
    sizes = [(20, 3, 2), (12, 4, 1), (9, 3, 3)]
    names = ("X", "Y", "W")
    shapes = [((n, f), (n, m), (f, m)) for n, f, m in sizes]
    return [dict(zip(names, (rng.normal(size=s) for s in three), strict=True)) for three in shapes]


class Slope(Tool):
    """The gradient of a valley with its lowest point at 1, 2, 3, …; it counts how often."""

    def __init__(self) -> None:
        self.n_calls = 0

    def gradient(self, W: Any) -> Any:
        """Return the slopes at W."""
        self.n_calls += 1
        lowest = self.device.asarray(np.arange(1.0, 1 + W.size).reshape(W.shape))
        return 0.5 * (W - lowest)


def _descend(gradient: Any, W: Any, learning_rate: float, n_steps: int) -> Any:
    for _ in range(n_steps):
        W = W - learning_rate * gradient(W)
    return W


def _uphill(gradient: Any, W: Any, learning_rate: float, n_steps: int) -> Any:
    return _descend(gradient, W, -learning_rate, n_steps)


def _same_gradient(gradient: Any, W: Any, learning_rate: float, n_steps: int) -> Any:
    return W - n_steps * learning_rate * gradient(W)


def _descents(rng: np.random.Generator) -> list[Case]:
    settings = [(0.3, 7), (0.5, 1), (0.1, 0)]
    return [
        {
            "gradient": Slope().gradient,
            "W": rng.normal(size=(3, 2)),
            "learning_rate": r,
            "n_steps": n,
        }
        for r, n in settings
    ]


def _eigenvalues(X: Any) -> Any:
    return np.linalg.eigvalsh(X.T @ X)


def _largest_stable_rate(X: Any) -> float:
    return float(len(X) / _eigenvalues(X)[-1])


def _unsorted(X: Any, *, place: int) -> float:
    return float(len(X) / np.linalg.eigvals(X.T @ X).real[place])


def _features(rng: np.random.Generator) -> list[Case]:
    one_each = np.repeat(np.diag([0.5, 2.0, 1.0]), (5, 5, 6), axis=0)  # the steepest in the middle
    tables = [rng.normal(size=(40, 3)) * [1, 2, 0.5], one_each, rng.normal(size=(15, 4)) + 1]
    return [{"X": X} for X in tables]


def _momentum_step(W: Any, V: Any, gradient: Any, learning_rate: float, momentum: float) -> Any:
    V = momentum * V + gradient
    return W - learning_rate * V, V


def _rolling(rng: np.random.Generator) -> list[Case]:
    names = ("W", "V", "gradient", "learning_rate", "momentum")
    rates = [(0.05, 0.9), (0.2, 0.7)]  # none is 1 less another, or a power of another
    return [dict(zip(names, (*rng.normal(size=(3, 4, 2)), *r), strict=True)) for r in rates]


EXERCISES = {
    "gradient": Exercise(
        solve=_gradient,
        cases=_samples,
        mistakes={
            "The loss is a mean: divide by the number of *all* its terms, samples times outputs.": (
                lambda X, Y, W: 2 * X.T @ (X @ W - Y)
            ),
            "It is divided by the number of samples only; the mean is over the outputs as well.": (
                lambda X, Y, W: 2 / len(X) * X.T @ (X @ W - Y)
            ),
            "The 2 from the derivative of the square is missing.": (
                lambda X, Y, W: _gradient(X, Y, W) / 2
            ),
            "The sign is wrong: the gradient of (XW - Y)² points to where the loss grows.": (
                lambda X, Y, W: -_gradient(X, Y, W)
            ),
            "That is the residual, not yet the gradient: each weight has the share of its "
            "feature in it, so multiply by X transposed.": (
                lambda X, Y, W: 2 / Y.size * (X @ W - Y)
            ),
            "It is the transposed of the gradient; a gradient has the shape of its weights.": (
                lambda X, Y, W: _gradient(X, Y, W).T.copy()
            ),
            "X was not transposed: the sum of the product must go over the samples.": (
                lambda X, Y, W: 2 / Y.size * X @ (X @ W - Y)
            ),
        },
    ),
    "descend": Exercise(
        solve=_descend,
        cases=_descents,
        mistakes={
            "It went uphill: the gradient points to where the loss grows, so subtract.": _uphill,
            "One step too few.": lambda g, W, rate, n: _descend(g, W, rate, max(0, n - 1)),
            "One step too many.": lambda g, W, rate, n: _descend(g, W, rate, n + 1),
            "The same gradient was used in all steps; it is another one at each new W.": (
                _same_gradient
            ),
            "The learning rate is missing.": lambda g, W, rate, n: _descend(g, W, 1.0, n),
            "W is still where it was: does the loop assign to it, and is `return` behind the "
            "loop?": lambda g, W, rate, n: W,
            "That is W after the first step: `return` is inside the loop.": (
                lambda g, W, rate, n: _descend(g, W, rate, min(n, 1))
            ),
        },
    ),
    "largest_stable_rate": Exercise(
        solve=_largest_stable_rate,
        cases=_features,
        mistakes={
            "The limit is 2 over the eigenvalue: the factor 1 - ηλ may go down to -1.": (
                lambda X: _largest_stable_rate(X) / 2
            ),
            "These are eigenvalues of XᵀX. The Hessian is 2 / n times that.": (
                lambda X: 2 / _eigenvalues(X)[-1]
            ),
            "The Hessian has a factor 2, from the derivative of the square.": (
                lambda X: 2 * _largest_stable_rate(X)
            ),
            "That is for the flattest direction. The steepest one decides: the largest "
            "eigenvalue.": lambda X: len(X) / _eigenvalues(X)[0],
            "`eigvals` gives the eigenvalues in any order: take the largest of them, or "
            "`eigvalsh`, which sorts.": tuple(partial(_unsorted, place=place) for place in (0, -1)),
            "That is the eigenvalue itself; the largest rate is 2 over it.": (
                lambda X: 2 / len(X) * _eigenvalues(X)[-1]
            ),
            "Means were subtracted; there is no bias here, so X counts as it is.": (
                lambda X: _largest_stable_rate(X - X.mean(axis=0))
            ),
        },
    ),
    "momentum_step": Exercise(
        solve=_momentum_step,
        cases=_rolling,
        mistakes={
            "W moved with the *old* velocity: first the new V, then W with it.": (
                lambda W, V, g, rate, beta: (W - rate * V, beta * V + g)
            ),
            "The gradient has no factor 1 - β here. (Some libraries have one; then the rate means "
            "something else.)": lambda W, V, g, rate, beta: (
                W - rate * (beta * V + (1 - beta) * g),
                beta * V + (1 - beta) * g,
            ),
            "It is the velocity that keeps the share β, and W that moves by η V.": (
                lambda W, V, g, rate, beta: (W - (1 - beta) * (beta * V + g), beta * V + g),
                lambda W, V, g, rate, beta: (W - rate * ((1 - rate) * V + g), (1 - rate) * V + g),
                lambda W, V, g, rate, beta: (W - rate * ((1 - beta) * V + g), (1 - beta) * V + g),
                lambda W, V, g, rate, beta: (W - beta * (rate * V + g), rate * V + g),
            ),
            "Against the gradient: W minus the rate times V.": lambda W, V, g, rate, beta: (
                W + rate * (beta * V + g),
                beta * V + g,
            ),
            "The velocity forgot what it was: V becomes β V plus the gradient.": (
                lambda W, V, g, rate, beta: (W - rate * g, g)
            ),
            "The results are in the wrong order: W first, then V.": (
                lambda *a: _momentum_step(*a)[::-1]
            ),
            "The velocity already contains the learning rate; here W takes it, not V.": (
                lambda W, V, g, rate, beta: (W - (beta * V + rate * g), beta * V + rate * g)
            ),
        },
    ),
}
