"""Exercises of notebook 07: what binds a step, updates in place, fewer bits, when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuml.exercises.judging import Case, Exercise
from gpuml.rounding import rounded


def _bound_by(n_launches: int, n_bytes: float, n_operations: float, ceilings: Any) -> str:
    seconds = {
        "launches": n_launches * ceilings["launch"],
        "memory": n_bytes / ceilings["copy"],
        "arithmetic": n_operations / ceilings["gemm_float32"],
    }
    return max(seconds, key=lambda name: seconds[name])


def _shortest(n_launches: int, n_bytes: float, n_operations: float, ceilings: Any) -> str:
    seconds = {
        "launches": n_launches * ceilings["launch"],
        "memory": n_bytes / ceilings["copy"],
        "arithmetic": n_operations / ceilings["gemm_float32"],
    }
    return min(seconds, key=lambda name: seconds[name])


def _by_count(n_launches: int, n_bytes: float, n_operations: float, ceilings: Any) -> str:
    return "arithmetic" if n_operations > n_bytes else "memory"


def _one_launch(n_launches: int, n_bytes: float, n_operations: float, ceilings: Any) -> str:
    return _bound_by(1, n_bytes, n_operations, ceilings)


def _steps(rng: np.random.Generator) -> list[Case]:
    gpu = {"launch": 1e-5, "copy": 4e12, "gemm_float32": 5e13}
    names = ("n_launches", "n_bytes", "n_operations", "ceilings")
    steps = [(40, 2e6, 4e6), (40, 8e9, 1e9), (12, 3e8, 6e11), (1, 1e9, 5e9), (500, 8e9, 1e10)]
    return [dict(zip(names, (*step, gpu), strict=True)) for step in steps]


def _fused_update(weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float) -> None:
    velocity *= momentum
    velocity += gradient
    weights -= rate * velocity


def _old_velocity(weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float) -> None:
    weights -= rate * velocity
    velocity *= momentum
    velocity += gradient


def _only_velocity(
    weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float
) -> None:
    velocity *= momentum
    velocity += gradient


def _only_weights(weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float) -> None:
    weights -= rate * (momentum * velocity + gradient)


def _forgetful(weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float) -> None:
    velocity[...] = gradient
    weights -= rate * velocity


def _added(weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float) -> None:
    _fused_update(weights, velocity, gradient, -rate, momentum)


def _lost_share(weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float) -> None:
    _fused_update(weights, velocity, gradient, rate, 1 - momentum)


def _averaged(weights: Any, velocity: Any, gradient: Any, rate: float, momentum: float) -> None:
    _fused_update(weights, velocity, (1 - momentum) * gradient, rate, momentum)


def _nothing(*_: Any) -> None:
    pass


def _vectors(rng: np.random.Generator) -> list[Case]:
    names = ("weights", "velocity", "gradient", "rate", "momentum")
    rates = [(0.05, 0.9), (0.2, 0.7)]  # none is 1 less another, or a power of another
    cases = [(*rng.normal(size=(3, 50)).astype(np.float32), *r) for r in rates]
    return [dict(zip(names, case, strict=True)) for case in cases]


def _amdahl(share: float, factor: float) -> float:
    return 1 / (1 - share + share / factor)


def _shares(rng: np.random.Generator) -> list[Case]:
    return [{"share": s, "factor": f} for s, f in ((0.5, 10.0), (0.9, 3.0), (0.25, 1e6))]


def _coarse(x: Any) -> Any:
    return rounded(x, "bfloat16")


def _rounded_product(a: Any, b: Any, coarse: Any) -> Any:
    return coarse(a) @ coarse(b)


def _every_sum_rounded(a: Any, b: Any, coarse: Any) -> Any:
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        total = coarse(total + coarse(a)[:, k : k + 1] * coarse(b)[k])
    return total


def _factors(rng: np.random.Generator) -> list[Case]:
    a, b = rng.random((6, 40), np.float32), rng.random((40, 5), np.float32)
    return [{"a": a, "b": b, "coarse": _coarse}]


EXERCISES = {
    "bound_by": Exercise(
        solve=_bound_by,
        cases=_steps,
        mistakes={
            "That is what takes the *shortest* time; the step waits for the longest.": _shortest,
            "Every launch costs: multiply by their number.": _one_launch,
            "Bytes and operations cannot be compared with each other, only the seconds that they "
            "take: divide each by its rate.": _by_count,
            "Launches were forgotten.": lambda n, b, o, c: _bound_by(0, b, o, c),
            'The names are "launches", "memory" and "arithmetic", in a text.': (
                lambda n, b, o, c: {"launches": 0, "memory": 1, "arithmetic": 2}[
                    _bound_by(n, b, o, c)
                ]
            ),
        },
    ),
    "fused_update": Exercise(
        solve=_fused_update,
        cases=_vectors,
        changes=("weights", "velocity"),
        mistakes={
            "The weights moved with the *old* velocity: renew it first.": _old_velocity,
            "The arrays of the caller are as they were. `w = w - …` gives the name to a new "
            "array; `w -= …` or `w[...] = …` writes into the old one, where a captured graph "
            "will look.": _nothing,
            "The velocity was renewed in place, but the weights are as they were: `-=` writes "
            "into them.": _only_velocity,
            "The weights moved, but the velocity is as it was: the next step needs it. `*=` and "
            "`+=` write into it.": _only_weights,
            "The momentum is missing: the velocity keeps a share of what it was.": _forgetful,
            "The step goes uphill: subtract.": _added,
            "`momentum` is the share of the velocity that stays, not the one that is lost.": (
                _lost_share
            ),
            "The gradient counts in full: there is no factor 1 - β here.": _averaged,
        },
    ),
    "amdahl": Exercise(
        solve=_amdahl,
        cases=_shares,
        mistakes={
            "That is the time that is left, as a share; how many times as fast is its inverse.": (
                lambda share, factor: 1 / _amdahl(share, factor)
            ),
            "The part that does not get faster takes 1 - share, and is missing.": (
                lambda share, factor: factor / share
            ),
            "The faster part still takes share / factor: this is the bound for an infinite "
            "factor.": lambda share, factor: 1 / (1 - share),
            "Times add up, speeds do not: a mean of speed-ups is too kind.": (
                lambda share, factor: 1 - share + share * factor
            ),
            "The two parts are swapped: `share` is what becomes faster.": (
                lambda share, factor: _amdahl(1 - share, factor)
            ),
        },
    ),
    "rounded_product": Exercise(
        solve=_rounded_product,
        cases=_factors,
        tolerance=1e-5,
        mistakes={
            "Only the result was rounded. Tensor cores round the factors, and add up in "
            "`float32`.": lambda a, b, coarse: coarse(a @ b),
            "The result was rounded, too: it stays in `float32`.": lambda a, b, coarse: coarse(
                coarse(a) @ coarse(b)
            ),
            "Only the left factor was rounded.": lambda a, b, coarse: coarse(a) @ b,
            "Only the right factor was rounded.": lambda a, b, coarse: a @ coarse(b),
            "Nothing was rounded.": lambda a, b, coarse: a @ b,
            "Every partial sum was rounded. Then small terms are lost in a large sum: only the "
            "factors have few bits.": _every_sum_rounded,
        },
    ),
}
