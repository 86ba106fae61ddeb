"""Metrics: how good predictions are, computed where they live."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from gpuml.devices import Array, array_module, to_host

# Without n_classes, a label above this is taken for a mistake: the matrix would need gigabytes.
MOST_CLASSES = 10_000


def accuracy(labels: Array, predicted: Array) -> Array:
    """Return the share of samples whose predicted class is their label.

    Parameters
    ----------
    labels : array of int or str, shape (…, n_samples)
    predicted : array of the same kind, shape (…, n_samples)
        Classes, not scores: ``scores.argmax(axis=-1)``. On the device of `labels`; leading axes
        broadcast.

    Returns
    -------
    array of float64, shape (…)
        From 0 to 1; it stays on the device, and nothing waits for it.

    Raises
    ------
    TypeError
        If the arrays live on different devices, or one holds integers and the other strings.
    ValueError
        If the shapes do not fit, there are no samples, or the numbers are not integers.

    Examples
    --------
    >>> import numpy as np
    >>> float(accuracy(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1])))
    0.75
    """
    array_module(labels, predicted)  # refuses a mixture
    _check_classes(labels, predicted, n_axes=None)
    return (labels == predicted).mean(axis=-1)


def confusion_matrix(labels: Array, predicted: Array, n_classes: int | None = None) -> Array:
    """Count how often each class was predicted for each class.

    Parameters
    ----------
    labels : array of int, shape (n_samples,)
        The true classes, from 0.
    predicted : array of int, shape (n_samples,)
        The predicted classes, on the same device.
    n_classes : int, optional
        How many classes there are; one more than the largest number in either array unless
        given.

    Returns
    -------
    array of int64, shape (n_classes, n_classes)
        Row i, column j: samples of class i predicted as class j. It stays on the device; only
        the smallest and the largest class are read from there, for the check.

    Raises
    ------
    TypeError
        If the arrays live on different devices, or hold strings.
    ValueError
        If the shapes do not fit, there are no samples, or a class is not from 0 to
        `n_classes` - 1.

    Examples
    --------
    >>> import numpy as np
    >>> confusion_matrix(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0])).tolist()
    [[1, 0], [1, 2]]
    """
    xp = array_module(labels, predicted)
    _check_classes(labels, predicted, n_axes=1)
    if labels.dtype.kind not in "biu":
        raise TypeError(
            f"labels of type {labels.dtype}: their numbers among the classes are needed, "
            "np.searchsorted(classes, labels) with sorted classes"
        )
    labels, predicted = (a.astype(xp.int64, copy=False) for a in (labels, predicted))
    ends = [f(a) for a in (labels, predicted) for f in (xp.min, xp.max)]
    lowest, *_, highest = sorted(to_host(xp.stack(ends)).tolist())
    n = _number_of_classes(lowest, highest, n_classes)
    return xp.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)


def r2_score(targets: Array, predictions: Array) -> Array:
    """Return R², the share of the targets' variance that the predictions explain.

    For each output 1 - Σ (t - p)² / Σ (t - mean of t)², the sums over samples; then the mean over
    the outputs. 1 is perfect, 0 as good as always predicting the mean, and it can be negative.
    Where all targets of an output are equal, that output counts 1 if each prediction is exact
    and 0 otherwise, as in scikit-learn.

    Parameters
    ----------
    targets : array of shape (…, n_samples, n_outputs), or (n_samples,)
    predictions : array of shape (…, n_samples, n_outputs), or (n_samples,)
        The same last two axes as `targets`, on the same device; leading axes broadcast.

    Returns
    -------
    array of float64, shape (…)
        It stays on the device, and nothing waits for it. NaN where there are fewer than two
        samples: one has no variance.

    Raises
    ------
    TypeError
        If the arrays live on different devices.
    ValueError
        If the shapes do not fit, or the arrays are empty or hold no real numbers.

    Examples
    --------
    >>> import numpy as np
    >>> float(r2_score(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 4.0])))
    0.5
    """
    xp = array_module(targets, predictions)
    for name, a in (("targets", targets), ("predictions", predictions)):
        if a.dtype.kind not in "biuf":
            raise ValueError(f"{name} are of type {a.dtype}, expected real numbers")
    shapes = f"targets have shape {targets.shape}, predictions {predictions.shape}"
    if targets.ndim == predictions.ndim == 1:
        targets, predictions = targets[:, None], predictions[:, None]
    if targets.ndim < 2 or targets.shape[-2:] != predictions.shape[-2:]:
        raise ValueError(
            f"{shapes}: the last two axes, (n_samples, n_outputs), must agree; y[:, None] makes "
            "a column of a vector"
        )
    if 0 in targets.shape or 0 in predictions.shape:
        raise ValueError(f"{shapes}: expected some samples and outputs")
    _check_leading_axes(shapes, targets.shape[:-2], predictions.shape[:-2])

    targets = targets.astype(xp.float64)
    residual = xp.square(targets - predictions).sum(axis=-2)
    targets -= targets[..., :1, :].copy()  # so that equal ones have a spread of exactly 0
    targets -= targets.mean(axis=-2, keepdims=True)
    spread = xp.square(targets).sum(axis=-2)
    constant = spread == 0
    without_spread = xp.where(residual == 0, 1.0, 0 * residual)  # 0, or NaN for NaN
    scores = xp.where(constant, without_spread, 1 - residual / xp.where(constant, 1.0, spread))
    score = scores.mean(axis=-1)
    return score if targets.shape[-2] > 1 else xp.full_like(score, np.nan)


def _check_classes(labels: Array, predicted: Array, n_axes: int | None) -> None:
    """Refuse what are not classes, an integer or a string for each sample."""
    shapes = f"labels have shape {labels.shape}, predicted {predicted.shape}"
    for name, a in (("labels", labels), ("predicted", predicted)):
        if a.dtype.kind in "fc":
            raise ValueError(
                f"{name} have shape {a.shape} and type {a.dtype}, expected a class for each "
                "sample: scores.argmax(axis=-1) makes one of scores, gpuml.r2_score takes numbers"
            )
    if (labels.dtype.kind in "biu") != (predicted.dtype.kind in "biu"):
        raise TypeError(
            f"labels are of type {labels.dtype}, predicted of {predicted.dtype}: they never agree"
        )
    n_samples = labels.shape[-1:]
    if n_samples != predicted.shape[-1:] or n_samples in ((), (0,)):
        raise ValueError(f"{shapes}: expected as many of both, (…, n_samples), and at least one")
    if n_axes is not None and not labels.ndim == predicted.ndim == n_axes:
        raise ValueError(f"{shapes}: expected vectors, (n_samples,)")
    _check_leading_axes(shapes, labels.shape[:-1], predicted.shape[:-1])


def _check_leading_axes(shapes: str, *leading: tuple[int, ...]) -> None:
    try:
        np.broadcast_shapes(*leading)
    except ValueError:
        raise ValueError(f"{shapes}: the leading axes do not fit") from None


def _number_of_classes(lowest: int, highest: int, n_classes: Any) -> int:
    """Return how many classes there are, if all labels are among them."""
    if n_classes is None:
        if highest >= MOST_CLASSES:
            raise ValueError(
                f"the largest class is {highest:,}: number the classes from 0 without gaps, or "
                "give n_classes if there are that many"
            )
        n_classes = highest + 1
    n = operator.index(n_classes)
    if n < 1:
        raise ValueError(f"n_classes must be a positive integer, got {n}")
    if lowest < 0 or highest >= n:
        found = lowest if lowest < 0 else highest
        raise ValueError(f"classes must be from 0 to {n - 1}, found {found}")
    return n
