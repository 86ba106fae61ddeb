"""Exercises of notebook 10: an attack by hand, and gradients that tell little about one row."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuml.exercises.judging import Case, Exercise


def _fgsm_step(x: Any, gradient: Any, strength: float, low: float, high: float) -> Any:
    return np.clip(x + strength * np.sign(gradient), low, high)


def _attacks(rng: np.random.Generator) -> list[Case]:
    cases = []
    for strength, low, high in ((0.1, -10.0, 10.0), (0.25, 0.0, 1.0)):
        x = rng.random((4, 6))
        gradient = 0.01 * rng.normal(size=x.shape)
        gradient[:, 0] = 0  # a pixel that does not matter
        bounds = {"strength": strength, "low": low, "high": high}
        cases.append({"x": x, "gradient": gradient} | bounds)
    return cases


def _lengths(rows: Any) -> Any:
    return np.sqrt((rows**2).sum(axis=1, keepdims=True))


def _project_l2(delta: Any, radius: float) -> Any:
    lengths = _lengths(delta)
    return delta * np.where(lengths > radius, radius / np.where(lengths > 0, lengths, 1), 1)


def _all_to_the_sphere(delta: Any, radius: float) -> Any:
    lengths = _lengths(delta)
    return delta * radius / np.where(lengths > 0, lengths, 1)


def _perturbations(rng: np.random.Generator) -> list[Case]:
    delta = rng.normal(size=(6, 5)) * np.array([[0.01], [1], [5], [0.1], [2], [3]])
    with_zeros = delta.copy()
    with_zeros[2] = 0
    return [{"delta": d, "radius": r} for d, r in ((delta, 0.8), (with_zeros, 1.5))]


def _clipped_sum(gradients: Any, max_norm: float) -> Any:
    return _project_l2(gradients, max_norm).sum(axis=0)


def _clipped_late(gradients: Any, max_norm: float) -> Any:
    return _project_l2(gradients.sum(axis=0)[None], max_norm)[0]


def _rows(rng: np.random.Generator) -> list[Case]:
    gradients = rng.normal(size=(8, 4)) * np.geomspace(0.1, 5, 8)[:, None]
    with_zeros = gradients.copy()
    with_zeros[3] = 0
    return [{"gradients": g, "max_norm": m} for g, m in ((gradients, 1.0), (with_zeros, 2.0))]


def _norms(a: Any, d: Any) -> Any:
    return np.sqrt((a**2).sum(axis=1) * (d**2).sum(axis=1))


def _signals(rng: np.random.Generator) -> list[Case]:
    shapes = [((5, 3), (5, 2)), ((4, 4), (4, 4)), ((300, 1500), (300, 1500))]
    return [
        {"a": rng.normal(size=s).astype(np.float32), "d": rng.normal(size=t).astype(np.float32)}
        for s, t in shapes
    ]


EXERCISES = {
    "fgsm_step": Exercise(
        solve=_fgsm_step,
        cases=_attacks,
        mistakes={
            "The gradient itself was taken. Within a cube every pixel may move by `strength`, "
            "however small its slope: take the *sign*.": lambda x, g, s, low, high: np.clip(
                x + s * g, low, high
            ),
            "It went downhill, which helps the model: an attack *raises* the loss.": (
                lambda x, g, s, low, high: _fgsm_step(x, -g, s, low, high)
            ),
            "Pixels have left the range of the data: clip the result to `low` and `high`.": (
                lambda x, g, s, low, high: x + s * np.sign(g)
            ),
            "The perturbation was clipped, not the perturbed pixels.": (
                lambda x, g, s, low, high: x + np.clip(s * np.sign(g), low, high)
            ),
            "A step of length 1: `strength` is missing.": lambda x, g, s, low, high: _fgsm_step(
                x, g, 1.0, low, high
            ),
            "That is the perturbation; asked for are the perturbed rows.": (
                lambda x, g, s, low, high: s * np.sign(g)
            ),
        },
    ),
    "project_l2": Exercise(
        solve=_project_l2,
        cases=_perturbations,
        mistakes={
            "Rows inside the ball were stretched to its surface. They are allowed as they are: "
            "shorten only what is longer than `radius`.": _all_to_the_sphere,
            "One length was taken for all rows together; each row is a perturbation of its own: "
            "`axis=1`.": lambda delta, radius: delta * min(1.0, radius / np.sqrt((delta**2).sum())),
            "Each number was cut off by itself: that is a cube, not a ball, and it changes the "
            "direction.": lambda delta, radius: np.clip(delta, -radius, radius),
            "A row of zeros has the length 0, and 0 / 0 is not a number. Divide by the larger of "
            "length and radius.": lambda delta, radius: (
                delta
                * np.where(_lengths(delta) == 0, np.nan, np.minimum(1, radius / _lengths(delta)))
            ),
            "Divided by the square of the length: the root is missing.": lambda delta, radius: (
                delta * np.minimum(1, radius / np.maximum((delta**2).sum(1, keepdims=True), 1e-300))
            ),
            "Lengths of columns were taken; a row is a perturbation: `axis=1`.": (
                lambda delta, radius: _project_l2(delta.T, radius).T.copy()
            ),
        },
    ),
    "clipped_sum": Exercise(
        solve=_clipped_sum,
        cases=_rows,
        mistakes={
            "The *sum* was clipped. One row could still make up nearly all of it: clip each "
            "row first.": _clipped_late,
            "Nothing was clipped.": lambda gradients, max_norm: gradients.sum(axis=0),
            "Short gradients were stretched: only those longer than `max_norm` are scaled.": (
                lambda gradients, max_norm: _all_to_the_sphere(gradients, max_norm).sum(axis=0)
            ),
            "Each number was cut off by itself; the *length* of a row is to be at most "
            "`max_norm`.": lambda gradients, max_norm: np.clip(gradients, -max_norm, max_norm).sum(
                axis=0
            ),
            "Long rows were thrown away; they are to be shortened.": lambda gradients, max_norm: (
                gradients * (_lengths(gradients) <= max_norm)
            ).sum(axis=0),
            "That is the mean; asked for is the sum, to which the noise is added.": (
                lambda gradients, max_norm: _clipped_sum(gradients, max_norm) / len(gradients)
            ),
            "These are the clipped rows; add them up.": _project_l2,
        },
    ),
    "norms_without_gradients": Exercise(
        solve=_norms,
        cases=_signals,
        mistakes={
            "These are the *squares* of the norms: the root is missing.": (
                lambda a, d: _norms(a, d) ** 2
            ),
            "The two norms were added; the norm of an outer product is their product.": (
                lambda a, d: np.sqrt((a**2).sum(axis=1)) + np.sqrt((d**2).sum(axis=1)),
                lambda a, d: np.sqrt((a**2).sum(axis=1) + (d**2).sum(axis=1)),
            ),
            "One root is missing: the product of a norm with a square.": lambda a, d: (
                np.sqrt((a**2).sum(axis=1)) * (d**2).sum(axis=1)
            ),
            "The `+ 1` is the share of a bias; asked for are the weights alone.": lambda a, d: (
                np.sqrt(((a**2).sum(axis=1) + 1) * (d**2).sum(axis=1))
            ),
            "That is the norm of the whole batch; each row has its own.": lambda a, d: np.sqrt(
                ((a.T @ d) ** 2).sum()
            ),
            "Rows and columns are mixed up: the sum of a row goes along `axis=1`.": lambda a, d: (
                np.sqrt((a**2).sum(axis=0) * (d**2).sum(axis=0))
            ),
        },
    ),
}
