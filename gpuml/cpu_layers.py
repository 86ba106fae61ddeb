"""Loss and gradient of a small model on the CPU, by few calls of NumPy that are prepared once.

On small arrays a call costs more than its arithmetic, and half of that is finding its arguments
and making an array for its result. So for each size of a batch the calls are put in a list, each
with the arrays that it reads and writes, and a step only goes through the list. Sums are products
with ones where they can be: BLAS takes a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from gpuml.devices import CPU, Array
from gpuml.losses import Loss, mean_squared_error, softmax_cross_entropy
from gpuml.models import MODELS, Model, Parameters

# Outputs of a layer, over a batch, up to which preparing calls pays; the rest is arithmetic.
MOST_NUMBERS = 2**18
MOST_SIZES = 16  # of batches, for which calls are kept

Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]


class CpuGradient:
    """Writes the gradient of a model's loss on a batch; the arrays that it needs are its own.

    Parameters
    ----------
    model : Model
    loss : callable
        One that :meth:`limit` allows.
    gradients : Parameters
        Written by each call.
    """

    def __init__(self, model: Model, loss: Loss, gradients: Parameters) -> None:
        self._model, self._loss, self._gradients = model, loss, gradients
        self._widest = max(model.sizes[1:])
        self._prepared: dict[int, _Calls] = {}  # by the rows of a batch

    @staticmethod
    def limit(model: Model, loss: Loss, *, n_axes: int = 1) -> str | None:
        """Return why a model or a loss is not for this class, or None if it is.

        Functions of the user's could keep what they are given; so they get new arrays.
        """
        if model.parameters.flat.ndim != n_axes:
            return "it is for one model, or for many"
        if type(model) not in MODELS.values() or model.device != CPU:
            return "it is for this package's models on the CPU"
        if model.dtype.name not in ("float32", "float64"):
            return "it is for float32 and float64"
        if loss not in (mean_squared_error, softmax_cross_entropy):
            return "it is for this package's losses"
        return None

    def fits(self, x: Array) -> bool:
        """Return whether a batch is small enough."""
        return len(x) * self._widest <= MOST_NUMBERS

    def __call__(self, x: Array, y: Array) -> Array:
        """Write the gradient of the loss on a batch; return the loss."""
        calls = self._prepared.get(len(x))
        if calls is None:
            if len(self._prepared) == MOST_SIZES:
                self._prepared.clear()
            calls = _Calls(self._model, self._loss, self._gradients, len(x))
            self._prepared[len(x)] = calls
        return calls(x, y)


class _Calls:
    """The calls for batches of one size, from the first layer's product to its gradient."""

    def __init__(self, model: Model, loss: Loss, gradients: Parameters, n_rows: int) -> None:
        parameters, layers = model.parameters, model.layers
        outputs = [np.empty((n_rows, size), model.dtype) for size in model.sizes[1:]]
        slopes = [np.empty_like(z) for z in outputs[:-1]]
        zero, ones = np.zeros((), model.dtype), np.ones((1, n_rows), model.dtype)
        self._first = parameters[layers[0][0]], outputs[0]
        self._calls: list[Call] = []

        for i, slope in enumerate(slopes):
            if i > 0:
                self._add(outputs[i - 1].dot, parameters[layers[i][0]], outputs[i])
            self._add(np.add, outputs[i], parameters[layers[i][1]], outputs[i])
            self._add(np.greater, outputs[i], zero, slope)  # ReLU, and its slope for the way back
            self._add(np.multiply, outputs[i], slope, outputs[i])
        if slopes:
            self._add(outputs[-2].dot, parameters[layers[-1][0]], outputs[-1])

        add_loss = self._cross_entropy if loss is softmax_cross_entropy else self._squared_error
        d, self._load, self._value = add_loss(outputs[-1], parameters.get(layers[-1][1]))

        for i in reversed(range(len(layers))):
            weight, bias = layers[i]
            if bias in gradients:
                self._add(ones.dot, d, gradients[bias])
            if i > 0:
                self._add(outputs[i - 1].T.dot, d, gradients[weight])
                d_inputs = np.empty_like(outputs[i - 1])
                self._add(d.dot, parameters[weight].T, d_inputs)
                self._add(np.multiply, d_inputs, slopes[i - 1], d_inputs)
                d = d_inputs
        self._last = d, gradients[layers[0][0]]

    def __call__(self, x: Array, y: Array) -> Array:
        self._load(y)
        x.dot(*self._first)
        for function, arguments in self._calls:
            function(*arguments)
        x.T.dot(*self._last)
        return self._value[()]

    def _add(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._calls.append((function, arguments))

    def _squared_error(
        self, predictions: Array, bias: Array | None
    ) -> tuple[Array, Callable[..., Any], Array]:
        """Add the calls of a loss; return its gradient, what takes in the targets, its value."""
        targets, d = np.empty_like(predictions), np.empty_like(predictions)
        flat, value = d.reshape(-1), np.empty((), d.dtype)
        if bias is not None:
            self._add(np.add, predictions, bias, predictions)
        self._add(np.subtract, predictions, targets, d)
        self._add(flat.dot, flat, value)
        self._add(np.multiply, value, 1 / d.size, value)
        self._add(np.multiply, d, np.array(2 / d.size, d.dtype), d)
        return d, lambda y: np.copyto(targets, y), value

    def _cross_entropy(
        self, logits: Array, bias: Array | None
    ) -> tuple[Array, Callable[..., Any], Array]:
        """Add the calls of a loss, as above; classes come first, which is faster.

        The loss is the mean of log Σ exp(z - m) - (z[label] - m), where m is the largest of the
        logits z.
        """
        n, n_classes = logits.shape
        rows, total = np.empty((n_classes, n), logits.dtype), np.empty((1, n), logits.dtype)
        largest, chosen, losses = (np.empty(n, logits.dtype) for _ in range(3))
        mean, value = np.full(n, 1 / n, logits.dtype), np.empty((), logits.dtype)
        places = np.empty(n, np.int64)  # of the labels, among the flattened rows
        flat = rows.reshape(-1)

        self._add(np.add, logits.T, 0 if bias is None else bias.T, rows)
        self._add(np.maximum.reduce, rows, 0, None, largest)
        self._add(np.subtract, rows, largest, rows)
        self._add(flat.take, places, None, chosen, "clip")
        self._add(np.exp, rows, rows)
        self._add(np.ones((1, n_classes), rows.dtype).dot, rows, total)
        self._add(np.log, total[0], losses)
        self._add(np.subtract, losses, chosen, losses)
        self._add(losses.dot, mean, value)

        # The gradient: (exp(z - m) / total - 1) / n. NumPy takes longer to convert a plain number.
        self._add(np.multiply, total, np.array(n, rows.dtype), total)
        self._add(np.divide, rows, total, rows)
        self._add(flat.take, places, None, chosen, "clip")
        self._add(np.subtract, chosen, mean, chosen)
        self._add(flat.put, places, chosen)
        samples = np.arange(n)

        def load(labels: Array) -> None:
            np.multiply(labels, n, out=places)
            np.add(places, samples, out=places)

        return rows.T, load, value
