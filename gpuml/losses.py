"""Losses: how far predictions are from targets, and the gradient of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from gpuml import gpu_layers
from gpuml.devices import Array, array_module
from gpuml.errors import unknown_name
from gpuml.gpu_layers import fused

Loss: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]


def mean_squared_error(predictions: Array, targets: Array) -> tuple[Array, Array]:
    """Return the mean of (p - t)² over samples and outputs, and its gradient.

    The gradient is 2 (p - t) / (batch · outputs).

    Parameters
    ----------
    predictions : array of shape (…, batch, outputs)
    targets : array of shape (…, batch, outputs)
        The same last two axes as `predictions`, on the same device.

    Returns
    -------
    value : array of shape (…)
        The loss; it stays on the device.
    d_predictions : array like `predictions`
        The gradient of the loss with respect to the predictions.

    Raises
    ------
    ValueError
        If the shapes differ. A vector of targets needs an axis for the outputs: ``y[:, None]``.

    Examples
    --------
    >>> import numpy as np
    >>> value, gradient = mean_squared_error(np.array([[1.0], [3.0]]), np.array([[1.0], [1.0]]))
    >>> float(value), gradient.tolist()
    (2.0, [[0.0], [2.0]])
    """
    xp = array_module(predictions, targets)
    if predictions.shape[-2:] != targets.shape[-2:]:
        raise ValueError(
            f"predictions have shape {predictions.shape}, targets {targets.shape}: the last two "
            "axes, (batch, outputs), must agree; y[:, None] makes a column of a vector"
        )
    if fused(xp) and predictions.dtype == targets.dtype and targets.dtype.char in "fd":
        return gpu_layers.mean_squared_error(predictions, targets)
    difference = predictions - targets
    scale = 1.0 / (predictions.shape[-2] * predictions.shape[-1])
    value = xp.square(difference).sum(axis=(-2, -1)) * scale
    difference *= 2.0 * scale
    return value, difference


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the mean of -log softmax(logits)[label] over samples, and its gradient.

    The gradient is (softmax(logits) - one_hot(label)) / batch. The largest logit of each row is
    subtracted first, so that no exponential overflows.

    Parameters
    ----------
    logits : array of shape (…, batch, classes)
    labels : integer array of shape (…, batch) or (batch,)
        From 0 to classes - 1, on the same device.

    Returns
    -------
    value : array of shape (…)
        The loss in nats; it stays on the device.
    d_logits : array like `logits`
        The gradient of the loss with respect to the logits.

    Raises
    ------
    ValueError
        If the shapes do not fit, or the labels are not integers.
    IndexError
        On the CPU, if a label is too large; a GPU does not notice, and -1 counts from the end.
        :func:`gpuml.train` and :func:`gpuml.evaluate` check labels on every device.

    Examples
    --------
    >>> import numpy as np
    >>> value, gradient = softmax_cross_entropy(np.zeros((1, 2)), np.array([1]))
    >>> round(float(value), 4), gradient.tolist()
    (0.6931, [[0.5, -0.5]])
    """
    xp = array_module(logits, labels)
    if labels.dtype.kind not in "iu" or labels.shape[-1:] != logits.shape[-2:-1]:
        raise ValueError(
            f"logits have shape {logits.shape}, labels {labels.shape} of {labels.dtype}: expected "
            "(…, batch, classes) and integers of shape (…, batch)"
        )
    batch, classes = logits.shape[-2:]
    if fused(xp) and logits.dtype.char in "fd":
        return gpu_layers.softmax_cross_entropy(logits, labels)
    if labels.shape != logits.shape[:-1]:  # the same labels for each of the leading axes
        labels = xp.broadcast_to(labels, logits.shape[:-1])

    # Classes come first: sums along whole rows of samples take the CPU half the time of many
    # short sums along the few classes.
    rows = xp.array(logits.reshape(-1, classes).T, order="C")  # a copy, of one row as well
    n_samples = rows.shape[1]
    chosen = labels.reshape(-1).astype(xp.int64, copy=False) * n_samples + xp.arange(
        n_samples
    )  # of the flattened rows
    rows -= rows.max(axis=0)
    log_likelihood = rows.reshape(-1).take(chosen)
    gradient = xp.exp(rows, out=rows)
    if xp is np:  # products are faster than sums
        total = np.ones((1, classes), rows.dtype).dot(gradient)
        mean = np.full(batch, 1 / batch, rows.dtype)
        value = (np.log(total[0]) - log_likelihood).reshape(*logits.shape[:-2], batch).dot(mean)
    else:
        total = xp.add.reduce(gradient, axis=0)
        log_likelihood -= xp.log(total)
        value = xp.add.reduce(log_likelihood.reshape(*logits.shape[:-2], batch), axis=-1) / -batch
    gradient /= total * batch
    gradient.reshape(-1)[chosen] -= 1 / batch
    return value, gradient.T.reshape(logits.shape)


LOSSES: dict[str, Loss] = {
    "cross_entropy": softmax_cross_entropy,
    "mean_squared_error": mean_squared_error,
}


def get_loss(loss: str | Loss) -> Loss:
    """Return the loss of that name (``"cross_entropy"``, ``"mean_squared_error"``).

    Parameters
    ----------
    loss : str or callable
        A callable ``(predictions, targets) -> (value, d_predictions)`` is returned as it is.

    Raises
    ------
    ValueError
        If there is no loss of that name; the message gives the nearest one.
    TypeError
        If it is neither a name nor callable.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(
            "expected the name of a loss or a function (predictions, targets) -> "
            f"(value, d_predictions), got {loss!r}"
        )
    if loss not in LOSSES:
        raise ValueError(unknown_name("loss", loss, LOSSES))
    return LOSSES[loss]
