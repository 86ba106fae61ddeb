"""Where numbers stopped being finite. It is looked for once training has met some, never before."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuml.batches import GATHERED_BYTES, Batches
from gpuml.devices import Array, array_module, to_host
from gpuml.gpu_layers import all_finite, fused
from gpuml.losses import LOSSES, Loss
from gpuml.models import Model, Parameters

SECONDS = 10.0  # for the search among the batches
MOST_NAMED = 3  # parameters in a message


def cause_in_data(data: Mapping[str, Any], dtype: np.dtype[Any], *, squares: bool = False) -> str:
    """Return what is wrong with the data, such as ``"row 3, column 1 of X is not"``, or "".

    Parameters
    ----------
    data : dict
        ``X``, ``y``, and others by their names; of a source of batches ``y`` is None.
    dtype : dtype
        In which numbers have to be finite.
    squares : bool
        Whether their squares have to be finite, too.
    """
    pairs = data["X"] if data["y"] is None else ()
    in_batches = (
        (f"{name} in batch {i} (counted from 0)", array)
        for i, pair in enumerate(pairs)
        for name, array in zip("xy", pair, strict=True)
    )
    for name, array in itertools.chain(data.items(), in_batches):
        found = first_non_finite(array, dtype, squares=squares)
        if found is not None:
            row, column, value = found
            if squares:
                return f"the square of row {row}, column {column} of {name}, {value:g}, is not"
            large = f": {value:g} is too large for {dtype}" if math.isfinite(value) else ""
            if math.isinf(value) and array.dtype == np.float16:
                large = f": {value:g}, since float16 holds numbers up to 65504"
            return f"row {row}, column {column} of {name} is not{large}"
    return ""


def first_non_finite(
    array: Any, dtype: np.dtype[Any], *, squares: bool = False
) -> tuple[int, int, float] | None:
    """Return row, column and value of the first number that is not finite as `dtype`, or None."""
    if getattr(getattr(array, "dtype", None), "kind", "") != "f":
        return None
    if array.dtype == dtype and not squares and _seen_finite(array):
        return None
    rows = max(1, GATHERED_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), rows):
        part = array[first : first + rows]
        with np.errstate(over="ignore"):
            numbers = part.astype(dtype, copy=False)
            finite = _finite(numbers * numbers if squares else numbers)
        if not bool(finite.all()):
            row, column = divmod(int((~finite).argmax()), math.prod(array.shape[1:]))
            return first + row, column, float(part[row].reshape(-1)[column])
    return None


def cause_in_weights(parameters: Parameters) -> str:
    """Return which parameters have a number that is not finite, and the first such, or "".

    Examples
    --------
    >>> p = Parameters(np.array([1.0, 2.0, math.inf, math.nan, 3.0]), {"a": (2, 2), "b": (1, 1)})
    >>> cause_in_weights(p)
    'a is inf in row 1, column 0'
    """
    if _seen_finite(parameters.flat):
        return ""
    places = {name: first_non_finite(array, array.dtype) for name, array in parameters.items()}
    found = [
        f"{name} is {place[2]:g} in row {place[0]}, column {place[1]}"
        for name, place in places.items()
        if place is not None
    ]
    more = f", and {len(found) - MOST_NAMED} more parameters" if len(found) > MOST_NAMED else ""
    return ", ".join(found[:MOST_NAMED]) + more


@dataclass(frozen=True)
class Fault:
    """What is not finite first in a step, in words, and whether code of the user's own did it."""

    text: str
    own: bool = False


def fault_in_steps(
    model: Model,
    parameters: Parameters,
    loss: Loss,
    data: Batches,
    options: Mapping[str, Any],
    *,
    table: str = "X",
) -> Fault | None:
    """Return what is not finite first on the way from batches to gradients, or None.

    Parameters
    ----------
    model : Model
    parameters : Parameters
        Finite ones, which stay as they are.
    loss : callable
    data : Batches
        They are gone through in order until something is found, or ``SECONDS`` are over.
    options : dict
        For ``model.forward``, such as the precision.
    table : str
        What the batches are rows of; "" if they are the user's own.
    """
    gradients, begin, first = parameters.zeros_like(), time.monotonic(), 0
    with np.errstate(all="ignore"):
        for i, (x, y) in enumerate(data.epoch(None)):
            rows = _Rows(first, len(x), table or f"x in batch {i} (counted from 0)")
            found = _fault_in_step(model, parameters, loss, x, y, gradients, options, rows)
            if found is not None or time.monotonic() - begin > SECONDS:
                return found
            first += len(x) if table else 0
    return None


@dataclass(frozen=True)
class _Rows:
    """How the rows of a batch are named."""

    first: int
    n: int
    table: str

    def one(self, row: int) -> str:
        return f"row {self.first + row} of {self.table}"

    def all(self) -> str:
        last = self.first + self.n - 1
        return self.one(0) if self.n == 1 else f"rows {self.first} to {last} of {self.table}"


def _fault_in_step(
    model: Model,
    parameters: Parameters,
    loss: Loss,
    x: Array,
    y: Array,
    gradients: Parameters,
    options: Mapping[str, Any],
    rows: _Rows,
) -> Fault | None:
    predictions, backward = model.forward(parameters, x, **options)
    bad = _bad_row(predictions)
    if bad is not None:
        row = x[bad : bad + 1]
        return _fault_in_layers(model, parameters, row, options, rows.one(bad))
    value, d_predictions = loss(predictions, y)
    name, own = getattr(loss, "__name__", type(loss).__name__), loss not in LOSSES.values()
    if not math.isfinite(float(value)):
        return Fault(
            f"{name} is {float(value):g} for {rows.all()}, though their predictions are finite, "
            f"up to {_size(predictions):.3g}",
            own,
        )
    bad = _bad_row(d_predictions)
    if bad is not None:
        return Fault(f"{name} returns a gradient that is not finite for {rows.one(bad)}", own)
    backward(d_predictions, gradients)
    for name, gradient in gradients.items():
        if _bad_row(gradient) is not None:
            own = type(model).forward is not Model.forward
            text = f"the gradient of {name} is not finite for {rows.all()}, though the loss is"
            return Fault(text, own)
    return None


def _fault_in_layers(
    model: Model, parameters: Parameters, x: Array, options: Mapping[str, Any], row: str
) -> Fault:
    """Say whose outputs are not finite for one row of inputs."""
    shown = f"{row}, with numbers up to {_size(x):.3g}, makes"
    if options and _bad_row(model.forward(parameters, x)[0]) is None:
        said = f"predictions that are finite in {x.dtype} and not in {options['precision']}"
        return Fault(f"{shown} {said}")
    if type(model).forward is not Model.forward:
        return Fault(f"{shown} predictions that are not finite", own=True)
    n = len(model.layers)
    for i in range(1, n):
        part = Model(parameters, model.layers[:i])
        if _bad_row(part.forward(parameters, x, **options)[0]) is not None:
            return Fault(f"{shown} outputs of layer {i} of {n} that are not finite")
    return Fault(f"{shown} predictions that are not finite")


def _bad_row(array: Array) -> int | None:
    finite = _finite(array).reshape(len(array), -1).all(axis=1)
    return None if bool(finite.all()) else int((~finite).argmax())


def _size(array: Array) -> float:
    return float(abs(array).max())


def vectors_not_finite(state: Mapping[str, Array], flat: Array) -> list[str]:
    """Return the names of an optimizer's vectors, one number a parameter, that are not finite."""
    vectors = {n: a for n, a in state.items() if a.shape == flat.shape and a.dtype == flat.dtype}
    return [name for name, a in vectors.items() if not (_seen_finite(a) or bool(_finite(a).all()))]


def _finite(array: Array) -> Array:
    """Return on the host which numbers are finite.

    What is asked of these flags, once and after a failure, would need kernels that CuPy compiles
    for seconds, on a GPU that has not been asked before.
    """
    return to_host(array_module(array).isfinite(array))


def _seen_finite(array: Array) -> bool:
    """Return whether a kernel says at once that all is finite; where there is none, False."""
    kernel = fused(array_module(array)) and array.dtype.name in ("float32", "float64")
    return kernel and bool(array.flags.c_contiguous) and bool(all_finite(array))
