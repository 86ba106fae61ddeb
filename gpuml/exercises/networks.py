"""Exercises of notebook 06: preparing data, the loss of a classifier, backpropagation."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from gpuml.exercises.judging import Case, Exercise


def _standardise(train: Any, held_out: Any) -> Any:
    mean, spread = train.mean(axis=0), train.std(axis=0)
    spread = np.where(train.max(axis=0) == train.min(axis=0), 1, spread)
    return (train - mean) / spread, (held_out - mean) / spread


def _own_means(train: Any, held_out: Any) -> Any:
    return _standardise(train, train)[0], _standardise(held_out, held_out)[0]


def _leak(train: Any, held_out: Any) -> Any:
    both = _standardise(np.concatenate([train, held_out]), train)[0]
    return both[: len(train)], both[len(train) :]


def _no_guard(train: Any, held_out: Any) -> Any:
    mean, spread = train.mean(axis=0), train.std(axis=0)
    return (train - mean) / spread, (held_out - mean) / spread


def _exact_guard(train: Any, held_out: Any, off: int = 0) -> Any:
    mean, spread = train.mean(axis=0), train.std(axis=0)
    if off:  # a mean as another order of adding may round it, so many numbers beside
        rounded = (train.max(axis=0) == train.min(axis=0)) & (spread > 0)
        mean = np.where(rounded, train[0] + off * np.spacing(train[0]), mean)
        spread = np.where(rounded, abs(train[0] - mean), spread)
    spread = np.where(spread == 0, 1, spread)
    return (train - mean) / spread, (held_out - mean) / spread


def _nan_to_zero(train: Any, held_out: Any) -> Any:
    return tuple(np.nan_to_num(part) for part in _no_guard(train, held_out))


def _held_out_zero(train: Any, held_out: Any) -> Any:
    first, second = _standardise(train, held_out)
    return first, np.where(train.max(axis=0) == train.min(axis=0), 0, second)


def _one_mean(train: Any, held_out: Any) -> Any:
    return (train - train.mean()) / train.std(), (held_out - train.mean()) / train.std()


def _by_variance(train: Any, held_out: Any) -> Any:
    mean, spread = train.mean(axis=0), train.var(axis=0)
    spread = np.where(train.max(axis=0) == train.min(axis=0), 1, spread)
    return (train - mean) / spread, (held_out - mean) / spread


def _tables(rng: np.random.Generator) -> list[Case]:
    scale, shift = np.array([1, 20, 0.1]), np.array([0, 100, -3])
    plain = rng.normal(size=(30, 3)) * scale + shift, rng.normal(size=(8, 3)) * scale + shift
    cases = [plain]
    for value in (7.0, 1.39):  # thirty of the latter have another mean, in any order of adding
        constant, other = np.full(len(plain[0]), value), value + np.arange(len(plain[1])) % 2
        new = zip(plain, (constant, other), strict=True)
        train, held_out = (np.column_stack([part, column]) for part, column in new)
        cases.append((train, held_out))
    return [{"train": a, "held_out": b} for a, b in cases]


def _softmax(z: Any) -> Any:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _of_rows(z: Any) -> Any:
    return z.max(axis=1, keepdims=True)


# what may be far below the largest logit of a row
_TOO_LITTLE = (
    *(partial(f, axis=1, keepdims=True) for f in (np.mean, np.median, np.min)),
    lambda z: z[:, :1],
)


def _divided_by(z: Any, *, most: Any, total: Any) -> Any:
    e = np.exp(z - most(z))
    return e / total(e)


def _logits(rng: np.random.Generator) -> list[Case]:
    z = rng.normal(size=(5, 4))
    wide = np.array([[1000.0, 0, -1000, 3], [3, -1000, 0, 1000], [-1000, 3, 2, 1]])
    tables = [z, 10 * rng.normal(size=(4, 4)), np.concatenate([z, z + 1000]), wide]
    return [{"z": table} for table in tables]


def _cross_entropy(z: Any, labels: Any) -> Any:
    p, rows = _softmax(z), np.arange(len(z))
    loss = -np.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    return float(loss), p / len(z)


def _labelled(rng: np.random.Generator) -> list[Case]:
    sizes = [(6, 4, 4), (9, 3, 3), (7, 5, 3)]  # the last has classes without a row
    return [
        {"z": rng.normal(size=(n, k)), "labels": rng.integers(most, size=n)} for n, k, most in sizes
    ]


def _classes_of_the_batch(z: Any, labels: Any) -> Any:
    right = np.eye(labels.max() + 1)[labels]
    p = _softmax(z)
    return float(-(right * np.log(p)).sum() / len(z)), (p - right) / len(z)


def _plus_one(z: Any, labels: Any) -> Any:
    loss, gradient = _cross_entropy(z, labels)
    gradient[np.arange(len(z)), labels] += 2 / len(z)
    return loss, gradient


def _backward(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, d2: Any, *, mask: str = "z") -> Any:
    z1 = x @ w1 + b1
    d1 = d2 @ w2.T
    if mask == "z":
        d1 = d1 * (z1 > 0)
    elif mask == "a":
        d1 = np.maximum(d1, 0)
    return x.T @ d1, d1.sum(axis=0), np.maximum(z1, 0).T @ d2, d2.sum(axis=0)


def _linear_hidden(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, d2: Any) -> Any:
    first, second, _, last = _backward(x, w1, b1, w2, b2, d2)
    return first, second, (x @ w1 + b1).T @ d2, last


def _mean_bias(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, d2: Any) -> Any:
    a, b, c, d = _backward(x, w1, b1, w2, b2, d2)
    return a, b / len(x), c, d / len(x)


def _divided_again(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, d2: Any) -> Any:
    return tuple(g / len(x) for g in _backward(x, w1, b1, w2, b2, d2))


def _untransposed(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, d2: Any) -> Any:
    return _backward(x, w1, b1, w2.T, b2, d2)


def _two_layers(rng: np.random.Generator) -> list[Case]:
    cases = []
    for n, i, h, o in ((7, 4, 5, 3), (6, 3, 4, 4)):
        shapes = {"x": (n, i), "w1": (i, h), "b1": (h,), "w2": (h, o), "b2": (o,), "d2": (n, o)}
        cases.append({name: rng.normal(size=shape) for name, shape in shapes.items()})
    return cases


EXERCISES = {
    "standardise": Exercise(
        solve=_standardise,
        cases=_tables,
        mistakes={
            "The held-out rows got a mean and a spread of their own. A model that learned with "
            "one scale must be asked with the same one: both come from the training rows.": (
                _own_means
            ),
            "Held-out rows had a say in the mean and the spread: something of them has leaked "
            "into the training.": _leak,
            "The mean of thirty times 1.39 is rounded, and so the spread is 2e-16, not 0: dividing "
            "by it makes ones of what rounding left. Ask whether the largest and the smallest "
            "number of the column are equal.": (
                *(partial(_exact_guard, off=n) for n in range(-4, 5)),
            ),
            "A feature that is the same in all rows has the spread 0, and 0 / 0 is not a number. "
            "Divide by 1 where the spread is 0.": _no_guard,
            "Zeros were put where there was 0 / 0. In `held_out` the feature may be another one, "
            "and x / 0 is infinite: divide by 1 where the feature is the same in all rows of "
            "`train`.": _nan_to_zero,
            "The feature is the same in all rows of `train` only: in `held_out` it may be another "
            "one, so subtract the mean and divide by 1.": _held_out_zero,
            "One mean and one spread were taken for all numbers; each feature, a column, has its "
            "own: `axis=0`.": _one_mean,
            "It was divided by the variance; the standard deviation is its root.": _by_variance,
            "The means were subtracted, but the spreads are still different: divide by them.": (
                lambda train, held_out: (train - train.mean(axis=0), held_out - train.mean(axis=0))
            ),
        },
    ),
    "softmax": Exercise(
        solve=_softmax,
        cases=_logits,
        mistakes={
            "The exponential of a large logit is infinite. Subtract the largest logit of each "
            "row first: the probabilities stay the same.": tuple(
                partial(_divided_by, most=less, total=lambda e: e.sum(axis=1, keepdims=True))
                for less in (lambda z: 0, *_TOO_LITTLE)
            ),
            "The probabilities of a *row* must add up to 1: the sum goes along `axis=1`, and "
            "`keepdims=True` keeps it a column.": tuple(
                partial(_divided_by, most=most, total=lambda e: e.sum(axis=0))
                for most in (_of_rows, np.max)
            ),
            "All rows share one sum; each row has its own.": tuple(
                partial(_divided_by, most=most, total=np.sum) for most in (_of_rows, np.max)
            ),
            "Here the sum of a row divides a column: without `keepdims=True` it is broadcast "
            "along the wrong axis.": lambda z: (
                np.exp(z - z.max(axis=1, keepdims=True))
                / np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1)
            ),
            "These are exponentials; divide them by their sum.": lambda z: np.exp(
                z - z.max(axis=1, keepdims=True)
            ),
            "The largest logit counts with its sign: where others are far below 0, the largest in "
            "size is one of those.": partial(
                _divided_by,
                most=lambda z: np.abs(z).max(axis=1, keepdims=True),
                total=lambda e: e.sum(axis=1, keepdims=True),
            ),
            "The largest logit of *all* rows was subtracted. A row far below it becomes 0 / 0: "
            "take the largest of each row.": lambda z: (
                np.exp(z - z.max()) / np.exp(z - z.max()).sum(axis=1, keepdims=True)
            ),
        },
    ),
    "cross_entropy": Exercise(
        solve=_cross_entropy,
        cases=_labelled,
        mistakes={
            "The loss is a mean over the rows, so its gradient has a 1 / n as well.": (
                lambda z, y: (
                    _cross_entropy(z, y)[0],
                    _cross_entropy(z, y)[1] * len(z),
                )
            ),
            "Both are sums over the rows; asked for is the mean.": lambda z, y: (
                _cross_entropy(z, y)[0] * len(z),
                _cross_entropy(z, y)[1] * len(z),
            ),
            "The loss is the *negative* logarithm: a probability below 1 has a negative one.": (
                lambda z, y: (-_cross_entropy(z, y)[0], _cross_entropy(z, y)[1])
            ),
            "The gradient has the wrong sign: what the model said minus what was right.": (
                lambda z, y: (_cross_entropy(z, y)[0], -_cross_entropy(z, y)[1])
            ),
            "These are the probabilities: 1 is still to be subtracted at the right label.": (
                lambda z, y: (_cross_entropy(z, y)[0], _softmax(z) / len(z))
            ),
            "1 was added at the right label, not subtracted.": _plus_one,
            "A batch need not have a row of the last class: `z.shape[1]` counts the classes.": (
                _classes_of_the_batch
            ),
            "The mean went over all entries. Only the right label of each row has a term, so "
            "there are n of them.": lambda z, y: (
                _cross_entropy(z, y)[0] / z.shape[1],
                _cross_entropy(z, y)[1] / z.shape[1],
            ),
        },
    ),
    "backward": Exercise(
        solve=lambda x, w1, b1, w2, b2, d2: _backward(x, w1, b1, w2, b2, d2),
        cases=_two_layers,
        mistakes={
            "ReLU is missing on the way back: where it gave 0, no gradient passes. Multiply by "
            "`(z1 > 0)`.": lambda *a: _backward(*a, mask=""),
            "ReLU was applied to the gradient itself. It stops the gradient where its *input* "
            "was not positive.": lambda *a: _backward(*a, mask="a"),
            "The second layer saw the hidden units *after* ReLU: its inputs are "
            "`maximum(z1, 0)`.": _linear_hidden,
            "A bias is added to every row: its gradient is the *sum* over the rows. (The 1 / n is "
            "in `d2` already.)": _mean_bias,
            "It is divided by n once more: the 1 / n is in `d2` already.": _divided_again,
            "On the way back W2 is transposed: a hidden unit gets from each output what its weight "
            "to it lets pass.": _untransposed,
            "The order is wrong: W1, b1, W2, b2.": lambda *a: (
                *_backward(*a)[2:],
                *_backward(*a)[:2],
            ),
        },
    ),
}
