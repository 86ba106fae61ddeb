"""Losses and gradients of many small models at once on the CPU, by calls that are prepared once.

As in :mod:`gpuml.cpu_layers`, with one axis more: one call does the work of all the models. Samples
come last, so that what is done to each number runs through long rows. A row of ones below a
layer's inputs makes the bias one more row of its weights, which it follows in memory; so a product
adds the biases, and another sums their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpuml.cpu_layers import MOST_NUMBERS, MOST_SIZES, Call, CpuGradient
from gpuml.devices import Array
from gpuml.losses import Loss, softmax_cross_entropy
from gpuml.models import Model, Parameters


class CpuPopulationGradient:
    """Writes the gradients of many models' losses; the arrays that it needs are its own.

    Parameters
    ----------
    model : Model
        Its parameters have one axis in front, (n_models, …).
    loss : callable
        One that :meth:`limit` allows.
    gradients : Parameters
        Written by each call.
    """

    def __init__(self, model: Model, loss: Loss, gradients: Parameters) -> None:
        self._model, self._loss, self._gradients = model, loss, gradients
        self._widest = max(model.sizes[1:])
        self._prepared: dict[tuple[int, int], _Calls] = {}  # by axes and rows of a batch

    @staticmethod
    def limit(model: Model, loss: Loss) -> str | None:
        """Return why a model or a loss is not for this class, or None if it is."""
        if model.parameters.flat.ndim != 2:
            return "it is for models with one axis in front"
        return CpuGradient.limit(model, loss, n_axes=2)

    def fits(self, x: Array) -> bool:
        """Return whether a batch is small enough for a model."""
        return bool(x.shape[-2] * self._widest <= MOST_NUMBERS)

    def __call__(self, x: Array, y: Array) -> Array:
        """Write the gradients of the losses on a batch; return the losses.

        Parameters
        ----------
        x : numpy.ndarray of shape (batch, features) or (n_models, batch, features)
        y : numpy.ndarray of shape (…, batch) or (…, batch, outputs)
            With an axis for the models where `x` has one.

        Returns
        -------
        numpy.ndarray of shape (n_models,)
            It holds good until the next call.
        """
        kind = x.ndim, x.shape[-2]
        calls = self._prepared.get(kind)
        if calls is None:
            if len(self._prepared) == MOST_SIZES:
                self._prepared.clear()
            calls = self._prepared[kind] = _Calls(self._model, self._loss, self._gradients, x)
        return calls(x, y)


class _Calls:
    """The calls for batches of one size, from the first layer's product to its gradient."""

    def __init__(self, model: Model, loss: Loss, gradients: Parameters, x: Array) -> None:
        dtype, sizes = model.dtype, model.sizes
        n_models, n_rows = len(model.parameters.flat), x.shape[-2]
        weights = _with_biases(model, model.parameters)
        d_weights = _with_biases(model, gradients)
        self._calls: list[Call] = []

        rows = [w.shape[-2] for w in weights]  # features, and one for the bias
        own = np.ones((*x.shape[:-1], rows[0]), dtype)  # a batch, and its ones
        self._x = own[..., : sizes[0]]
        inputs = [own.swapaxes(-1, -2)]
        inputs += [np.ones((n_models, n, n_rows), dtype) for n in rows[1:]]
        slopes = [np.empty((n_models, n, n_rows), dtype) for n in sizes[1:-1]]
        zero = np.zeros((), dtype)
        for i, slope in enumerate(slopes):
            z = inputs[i + 1][:, : sizes[i + 1]]
            self._add(np.matmul, weights[i].swapaxes(1, 2), inputs[i], z)
            self._add(np.greater, z, zero, slope)  # ReLU, and its slope for the way back
            self._add(np.multiply, z, slope, z)

        # The classes of all models' samples come first: sums over them run along rows.
        table = np.empty((sizes[-1], n_models * n_rows), dtype)
        d = table.reshape(sizes[-1], n_models, n_rows).swapaxes(0, 1)
        self._add(np.matmul, weights[-1].swapaxes(1, 2), inputs[-1], d)
        if loss is softmax_cross_entropy:
            self._load, self._value = self._cross_entropy(table, n_models)
        else:
            self._load, self._value = self._squared_error(d, y_axes=x.ndim)

        for i in reversed(range(len(weights))):
            self._add(np.matmul, inputs[i], d.swapaxes(1, 2), d_weights[i])
            if i > 0:
                d_inputs = np.empty_like(slopes[i - 1])
                self._add(np.matmul, weights[i][:, : sizes[i]], d, d_inputs)
                self._add(np.multiply, d_inputs, slopes[i - 1], d_inputs)
                d = d_inputs

    def __call__(self, x: Array, y: Array) -> Array:
        np.copyto(self._x, x)
        self._load(y)
        for function, arguments in self._calls:
            function(*arguments)
        return self._value

    def _add(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._calls.append((function, arguments))

    def _squared_error(self, d: Array, y_axes: int) -> tuple[Callable[..., Any], Array]:
        """Add the calls of a loss; return what takes in the targets, and its value."""
        n_models, n_outputs, n_rows = d.shape
        targets = np.empty(d.shape[-y_axes:], d.dtype)
        squares, value = np.empty((n_models, n_outputs * n_rows), d.dtype), np.empty(n_models)
        value = value.astype(d.dtype)
        mean = np.full(n_outputs * n_rows, 1 / (n_outputs * n_rows), d.dtype)
        self._add(np.subtract, d, targets, d)
        self._add(np.multiply, d, d, squares.reshape(d.shape))
        self._add(np.dot, squares, mean, value)
        self._add(np.multiply, d, np.array(2 / (n_outputs * n_rows), d.dtype), d)
        return lambda y: np.copyto(targets, y.swapaxes(-1, -2)), value

    def _cross_entropy(self, rows: Array, n_models: int) -> tuple[Callable[..., Any], Array]:
        """Add the calls of a loss, as in :mod:`gpuml.cpu_layers`; `rows` become its gradient."""
        n_classes, n = rows.shape
        batch = n // n_models
        total, largest, chosen, losses = (np.empty(n, rows.dtype) for _ in range(4))
        mean, value = np.full(batch, 1 / batch, rows.dtype), np.empty(n_models, rows.dtype)
        one = np.array(1 / batch, rows.dtype)
        places = np.empty((n_models, batch), np.int64)  # of the labels, among the flattened rows
        flat, flat_places = rows.reshape(-1), places.reshape(-1)

        self._add(np.maximum.reduce, rows, 0, None, largest)
        self._add(np.subtract, rows, largest, rows)
        self._add(flat.take, flat_places, None, chosen, "clip")
        self._add(np.exp, rows, rows)
        self._add(np.ones(n_classes, rows.dtype).dot, rows, total)
        self._add(np.log, total, losses)
        self._add(np.subtract, losses, chosen, losses)
        self._add(np.dot, losses.reshape(n_models, batch), mean, value)

        # The gradient: (exp(z - m) / total - 1) / batch.
        self._add(np.divide, one, total, total)
        self._add(np.multiply, rows, total, rows)
        self._add(flat.take, flat_places, None, chosen, "clip")
        self._add(np.subtract, chosen, one, chosen)
        self._add(flat.put, flat_places, chosen)
        samples = np.arange(n).reshape(n_models, batch)

        def load(labels: Array) -> None:
            np.multiply(labels, n, out=places)
            np.add(places, samples, out=places)

        return load, value


def _with_biases(model: Model, parameters: Parameters) -> list[Array]:
    """Return views of the layers' weights, the biases as a last row: (n_models, in + 1, out)."""
    flat, start = parameters.flat, 0
    views = []
    for weight, bias in model.layers:
        n_in, n_out = parameters.shapes[weight]
        n_rows = n_in + (bias in parameters)
        stop = start + n_rows * n_out
        views.append(flat[:, start:stop].reshape(len(flat), n_rows, n_out))
        start = stop
    return views
