"""Exercises of notebook 08: restarts, a thousand models in one product, and which to drop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuml.exercises.judging import Case, Exercise


def _restarts_for(p: float, miss: float) -> int:
    return math.ceil(math.log(miss) / math.log(1 - p))


# in the third, exactly three runs
CHANCES = ((0.5, 0.01), (0.126, 0.01), (0.5, 0.125), (0.02, 0.1))


def _chances(rng: np.random.Generator) -> list[Case]:
    return [{"p": p, "miss": m} for p, m in CHANCES]


def _layer_of_many(x: Any, W: Any, b: Any) -> Any:
    return np.maximum(np.matmul(x, W) + b[:, None, :], 0)


def _populations(rng: np.random.Generator) -> list[Case]:
    cases = []
    for models, batch, inputs, outputs in ((3, 5, 4, 2), (4, 4, 4, 4)):
        shapes = {"x": (batch, inputs), "W": (models, inputs, outputs), "b": (models, outputs)}
        cases.append({n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    return cases


def _update_many(W: Any, gradients: Any, rates: Any) -> Any:
    return W - rates[:, None, None] * gradients


def _updates(rng: np.random.Generator) -> list[Case]:
    cases = []
    for shape in ((3, 4, 2), (4, 4, 4)):
        W, gradients = rng.normal(size=(2, *shape))
        cases.append({"W": W, "gradients": gradients, "rates": np.geomspace(0.01, 1, shape[0])})
    return cases


def _survivors(losses: Any, factor: int) -> list[int]:
    order = sorted(range(len(losses)), key=lambda i: (math.isnan(losses[i]), losses[i]))
    return order[: max(1, len(losses) // factor)]


def _worst(losses: Any, factor: int) -> list[int]:
    order = sorted(range(len(losses)), key=lambda i: (math.isnan(losses[i]), -losses[i]))
    return order[: max(1, len(losses) // factor)]


def _nan_first(losses: Any, factor: int) -> list[int]:
    order = sorted(range(len(losses)), key=lambda i: (not math.isnan(losses[i]), losses[i]))
    return order[: max(1, len(losses) // factor)]


def _how_many(number: Callable[[float], int]) -> Callable[[Any, int], list[int]]:
    """Return an answer that keeps this number of n / factor."""
    return lambda losses, factor: _survivors(losses, 1)[: max(1, number(len(losses) / factor))]


def _diverged_left_out(losses: Any, factor: int) -> list[int]:
    kept = [i for i in _survivors(losses, 1) if not math.isnan(losses[i])]
    return kept[: max(1, len(losses) // factor)]


def _diverged_not_counted(losses: Any, factor: int) -> list[int]:
    kept = [i for i in _survivors(losses, 1) if not math.isnan(losses[i])]
    return kept[: max(1, len(kept) // factor)]


def _looked_up(losses: Any, factor: int) -> list[int]:
    return [losses.index(losses[i]) for i in _survivors(losses, factor)]


TIED = [10, 11]  # models with the same loss, in the one case that has so many


def _either_first(kept: list[int]) -> dict[str, Any]:
    """Return what counts: the order, except of the two with the same loss."""
    models = list(kept)
    for i in range(len(models) - 1):
        if sorted(models[i : i + 2]) == TIED:
            models[i : i + 2] = TIED
    return {"the models": models}


def _stages(rng: np.random.Generator) -> list[Case]:
    nan = math.nan
    losses = [
        ([0.9, 0.3, 0.5, 0.2, 0.8, 0.7], 2),
        ([nan, 0.4, 3.0, nan, 0.1, 2.0, 0.3, 5.0, 1.0], 3),
        ([nan], 2),
        ([0.8, 0.3, 0.5, 0.2, 0.9, 0.7, 0.1], 2),
        ([0.8, 0.3, 0.5, 0.2, 0.9, 0.7, 0.1], 4),
        ([0.9, 0.8, 0.7, 0.6, 0.3, 0.5, 0.1, 0.6, 1.5, 2.5, 0.2, 0.2], 3),
        ([0.6, 0.2, 0.4], 4),
    ]
    return [{"losses": values, "factor": f} for values, f in losses]


EXERCISES = {
    "restarts_for": Exercise(
        solve=_restarts_for,
        cases=_chances,
        mistakes={
            "All n runs miss with probability (1 - p)^n: the logarithm of 1 - p, not of p.": (
                lambda p, miss: math.ceil(math.log(miss) / math.log(p))
            ),
            "It is rounded down, and one run too few misses more often than allowed.": (
                lambda p, miss: math.floor(math.log(miss) / math.log(1 - p))
            ),
            "One run too many if the quotient is a whole number: `math.ceil` leaves it alone.": (
                lambda p, miss: 1 + math.floor(math.log(miss) / math.log(1 - p))
            ),
            "The fraction is upside down.": lambda p, miss: math.ceil(
                math.log(1 - p) / math.log(miss)
            ),
            "That is after how many runs *one* hit is expected. It may still be missed often.": (
                lambda p, miss: math.ceil(1 / p)
            ),
            "`miss` is the probability to find none, not to find one.": (
                lambda p, miss: math.ceil(math.log(1 - miss) / math.log(1 - p))
            ),
        },
    ),
    "layer_of_many": Exercise(
        solve=_layer_of_many,
        cases=_populations,
        forbidden=frozenset({"for", "map"}),
        instead="all models are to be computed in one multiplication.",
        mistakes={
            "The bias lacks an axis: its shape (models, out) is compared from the right, so the "
            "models met the batch. `b[:, None, :]` puts the axis of the batch in between.": (
                lambda x, W, b: np.maximum(np.matmul(x, W) + b, 0)
            ),
            "ReLU is missing: the larger of the number and 0.": lambda x, W, b: (
                np.matmul(x, W) + b[:, None, :]
            ),
            "The bias is missing.": lambda x, W, b: np.maximum(np.matmul(x, W), 0),
            "The bias was added after ReLU; it belongs to what ReLU gets.": lambda x, W, b: (
                np.maximum(np.matmul(x, W), 0) + b[:, None, :]
            ),
            "The models were added up; none of them ever sees another.": lambda x, W, b: np.maximum(
                np.matmul(x, W) + b[:, None, :], 0
            ).sum(axis=0),
            "The first axis should count the models, the second the rows of the batch.": (
                lambda x, W, b: np.ascontiguousarray(_layer_of_many(x, W, b).swapaxes(0, 1))
            ),
        },
    ),
    "update_many": Exercise(
        solve=_update_many,
        cases=_updates,
        forbidden=frozenset({"for", "map"}),
        instead="all models are to be updated in one operation.",
        mistakes={
            "The rates lack two axes: a shape (models,) is compared from the right and meets the "
            "outputs. `rates[:, None, None]` has one number for each matrix.": (
                lambda W, gradients, rates: W - rates * gradients
            ),
            "The rates lack an axis: `rates[:, None]` meets the inputs. A matrix has two axes.": (
                lambda W, gradients, rates: W - rates[:, None] * gradients
            ),
            "The step goes uphill: subtract.": lambda W, gradients, rates: (
                W + rates[:, None, None] * gradients
            ),
            "All models got the same rate, the first one.": lambda W, gradients, rates: (
                W - rates[0] * gradients
            ),
            "The gradients were averaged over the models; each has its own.": (
                lambda W, gradients, rates: W - rates[:, None, None] * gradients.mean(axis=0)
            ),
        },
    ),
    "survivors": Exercise(
        solve=_survivors,
        cases=_stages,
        what_counts=_either_first,
        mistakes={
            "These are the worst: keep those with the *lowest* losses.": _worst,
            "A loss that is nan belongs to a model that diverged, and was kept. nan is not "
            "smaller and not larger than any number: sort it last by hand, with `math.isnan`.": (
                _nan_first
            ),
            "That is how many are *dropped*; a `factor`-th of them stays.": lambda losses, factor: (
                _survivors(losses, 1)[: max(1, len(losses) - len(losses) // factor)]
            ),
            "The number of those that stay is rounded *down*: `len(losses) // factor`.": (
                _how_many(round),
                _how_many(math.ceil),
            ),
            "Who has diverged goes on if there is nobody else; here nobody was left.": (
                _diverged_left_out
            ),
            "One in `factor` of *all* models goes on; those that have diverged count as well.": (
                _diverged_not_counted
            ),
            "Two models have the same loss, and `index` finds the first of them twice: sort the "
            "indices, and do not look for losses.": _looked_up,
            "These are losses; asked for are the numbers of the models.": lambda losses, factor: [
                losses[i] for i in _survivors(losses, factor)
            ],
            "The right models, in another order: the best first.": lambda losses, factor: sorted(
                _survivors(losses, factor)
            ),
            "None was kept: one stays always.": lambda losses, factor: _survivors(losses, 1)[
                : len(losses) // factor
            ],
        },
    ),
}
