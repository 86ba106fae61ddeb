"""What a step of training does between its products, on a GPU: one launch for each piece of work.

To launch a kernel takes longer than a small array's arithmetic. So what array operations would do
one after the other is fused here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gpuml.devices import Array, array_module
from gpuml.kernels import load_kernel, text

THREADS, MOST_THREADS = 256, 1024
ONE_BLOCK = 2**13  # logits of a batch, up to which one block finds losses and their mean
BACK_BLOCKS, LEAST_ROWS = 132 * 8, 64  # of relu_layer_back: blocks at most, rows of each at least
MOST_BLOCKS = 132 * 16  # each thread of a large array takes several elements in turn
MOST_EPOCHS = 2**16 - 1  # in one launch of epochs_end: blocks along the second axis of a grid
PART_NUMBERS = 4096  # of a sum, which a block adds up, at least where there are several


def fused(xp: Any) -> bool:
    """Return whether these kernels are for the arrays of a library: CuPy's, on NVIDIA GPUs."""
    return xp is not np and not xp.cuda.runtime.is_hip


def fits(stored: Array, sums: Array | None) -> bool:
    """Return whether these kernels take an array, and another that holds sums of its elements."""
    summed = {"float32": "float32", "float64": "float64", "bfloat16": "float32"}
    wanted = summed.get(_name(stored))
    alike = wanted is not None and (sums is None or _name(sums) == wanted)
    return alike and bool(stored.flags.c_contiguous)


def add_bias(z: Array, bias: Array, *, relu: bool) -> None:
    """Add the biases to a layer's sums, and apply ReLU if wanted, in place.

    Parameters
    ----------
    z : cupy.ndarray of shape (…, batch, units)
        Contiguous; float32, float64 or bfloat16.
    bias : cupy.ndarray of shape (…, 1, units)
        float64 for z of float64, else float32.
    relu : bool
    """
    if not bias.flags.c_contiguous:  # those of a population lie apart
        bias = array_module(bias).ascontiguousarray(bias)
    vector = _vector(z, bias)
    columns = z.shape[-1] // vector
    n = z.size // vector
    each = n // max(1, math.prod(bias.shape[:-2]))
    _launch(
        _relu_layer("relu_layer", _name(bias), _name(z), vector),
        n,
        (z, bias, np.int64(n), np.int32(columns), np.int64(each), np.int32(relu)),
    )


def relu_slope(d: Array, outputs: Array) -> None:
    """Carry a gradient back through ReLU in place: zero where the layer's output was.

    Parameters
    ----------
    d, outputs : cupy.ndarray of the same shape
        Contiguous, of the same type: float32, float64 or bfloat16.
    """
    vector = _vector(d, outputs)
    kernel = _relu_layer("relu_layer_slope", _number(d), _name(d), vector)
    n = d.size // vector
    _launch(kernel, n, (d, outputs, np.int64(n)))


def back_with_sums(d: Array, outputs: Array | None, sums: Array) -> None:
    """Carry a gradient back through ReLU in place, and sum it over the batch, in one reading.

    Parameters
    ----------
    d : cupy.ndarray of shape (batch, units)
        Contiguous: float32, float64 or bfloat16.
    outputs : cupy.ndarray of shape (batch, units) or None
        Of the type of `d`; None for the sums alone.
    sums : cupy.ndarray of shape (1, units)
        Written, contiguous: float64 for d of float64, else float32.
    """
    import cupy

    rows, units = d.shape
    arrays = (d,) if outputs is None else (d, outputs)
    vector = _vector(*arrays)
    across = -(-units // (32 * vector))
    n_parts = max(1, min(-(-rows // LEAST_ROWS), BACK_BLOCKS // across))
    if n_parts == 1 and vector > 1 and _vector(sums) == 1:
        n_parts = 2  # the sums cannot be written as they are
    each = -(-rows // n_parts)
    parts = sums if n_parts == 1 else cupy.empty((n_parts, units), sums.dtype)
    options = _number(d), _name(d), vector
    pointer = np.intp(0) if outputs is None else outputs
    sizes = np.int32(rows), np.int32(units // vector), np.int32(each)
    _relu_layer("relu_layer_back", *options)(
        (across, n_parts), (32, 8), (d, pointer, parts, *sizes)
    )
    if n_parts > 1:
        kernel = _relu_layer("relu_layer_sum", *options)
        _launch(kernel, units, (parts, sums, np.int32(n_parts), np.int64(units)))


def to_bfloat16(x: Array) -> Array:
    """Return a float32 array rounded to bfloat16, to the nearest, ties to even."""
    import cupy
    from ml_dtypes import bfloat16

    x = cupy.ascontiguousarray(x)
    rounded = cupy.ndarray(x.shape, bfloat16)
    vector = _vector(x)
    n = x.size // vector
    kernel = _relu_layer("relu_layer_round", "float32", "bfloat16", vector)
    _launch(kernel, n, (x, rounded, np.int64(n)))
    return rounded


def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return mean losses and their gradient; see :func:`gpuml.softmax_cross_entropy`.

    Parameters
    ----------
    logits : cupy.ndarray of shape (…, batch, classes)
        float32 or float64.
    labels : integer cupy.ndarray of shape (…, batch) or (batch,)
    """
    import cupy

    batch, classes = logits.shape[-2:]
    logits = cupy.ascontiguousarray(logits)
    labels = cupy.ascontiguousarray(labels, np.int64)
    gradient = cupy.empty_like(logits)
    value = cupy.empty(logits.shape[:-2], logits.dtype)
    sizes = np.int32(classes), np.int32(batch), np.int32(labels.size)
    if not gradient.size:
        value.fill(np.nan)  # the mean of nothing
    elif batch * classes <= ONE_BLOCK:
        arrays = logits, labels, gradient, value
        _softmax(_name(logits))[2]((value.size,), (MOST_THREADS,), (*arrays, *sizes))
    else:
        each, mean, _ = _softmax(_name(logits))
        rows = logits.size // classes
        row_loss = cupy.empty(rows, logits.dtype)
        arrays = logits, labels, gradient, row_loss
        each((-(-rows * 32 // THREADS),), (THREADS,), (*arrays, np.int32(rows), *sizes))
        mean((value.size,), (THREADS,), (row_loss, value, sizes[1]))
    return value, gradient


def mean_squared_error(predictions: Array, targets: Array) -> tuple[Array, Array]:
    """Return mean losses and their gradient; see :func:`gpuml.mean_squared_error`.

    Parameters
    ----------
    predictions : cupy.ndarray of shape (…, batch, outputs)
        float32 or float64.
    targets : cupy.ndarray of the same type, shape (…, batch, outputs)
        Its leading axes broadcast.
    """
    import cupy

    one = predictions.shape[-2:]
    if targets.size > math.prod(one) and targets.shape != predictions.shape:
        shape = np.broadcast_shapes(predictions.shape, targets.shape)
        predictions, targets = (cupy.broadcast_to(a, shape) for a in (predictions, targets))
    predictions, targets = (cupy.ascontiguousarray(a) for a in (predictions, targets))
    gradient, n = cupy.empty_like(predictions), math.prod(one)
    stack = predictions.shape[:-2]
    value, n_batches = cupy.empty(stack, predictions.dtype), math.prod(stack)
    n_parts = max(1, min(MOST_BLOCKS, n // PART_NUMBERS))
    parts = cupy.empty(n_batches * n_parts if n_parts > 1 else 0)
    number = predictions.dtype.type
    if n_batches:
        each, mean = _squares(_name(predictions))
        sizes = np.int64(n), np.int32(n_parts)
        arrays = predictions, targets, gradient, parts, value
        shared = np.int32(targets.size == n)
        each((n_batches * n_parts,), (THREADS,), (*arrays, *sizes, shared, number(2 / n)))
        if n_parts > 1:
            mean((n_batches,), (THREADS,), (parts, value, *sizes))
    return value, gradient


def quadratic_loss(
    product: Array, target: Array, weights: Array, constant: Array, scale: float, gradient: Array
) -> Array:
    """Return scale · Σ ((product - 2 target) weights + constant), and write its gradient.

    With product = A weights, for a symmetric A, the gradient is 2 scale (product - target).

    Parameters
    ----------
    product, target, weights : cupy.ndarray of float64, shape (…, inputs, outputs)
    constant : cupy.ndarray of float64, shape ()
    scale : float
    gradient : cupy.ndarray of shape (…, inputs · outputs)
        Of any type.

    Returns
    -------
    cupy.ndarray of float64, shape (…)
    """
    flat = gradient.reshape(product.shape)
    _elementwise("T p, T t, T scale", "S g", "g = 2 * scale * (p - t)")(
        product, target, scale, flat
    )
    return _quadratic()(product, target, weights, constant, scale, axis=(-2, -1))


def gradient_descent(
    parameters: Array,
    gradients: Sequence[Array],
    velocity: Array | None,
    state: dict[str, Array],
    rounded: Array | None = None,
    *,
    divisor: int = 1,
) -> None:
    """Take a step of :class:`gpuml.GradientDescent` in place.

    Parameters
    ----------
    parameters, velocity : cupy.ndarray of the same shape
    gradients : sequence of cupy.ndarray
        Whose sum over `divisor` is the gradient.
    state : dict of str to cupy.ndarray
    rounded : cupy.ndarray of bfloat16, optional
        Gets the parameters, rounded.
    """
    decays = "weight_decay" in state
    names = ["T rate", "T momentum"] if velocity is not None else ["T rate"]
    arrays = [state["learning_rate"], *([state["momentum"]] if velocity is not None else [])]
    summed, step = _summed(len(gradients), divisor)
    step += "T s = g;"
    if decays:
        names += ["T decay", "T decaying"]
        arrays += [state["weight_decay"], state["decaying"]]
        step += "s += decay * decaying * p;"
    if velocity is not None:
        step += "s = v = momentum * v + s;"
    outputs = "T p, T v" if velocity is not None else "T p"
    kernel = _update(", ".join([summed, *names]), outputs, f"{step} p -= rate * s;", rounded)
    kernel(*gradients, *arrays, parameters, *(() if velocity is None else (velocity,)))


def adam_powers(state: dict[str, Array]) -> None:
    """Count a step of :class:`gpuml.Adam`: the powers of β₁ and β₂, in place."""
    _elementwise("T b1, T b2", "T p1, T p2", "p1 *= b1; p2 *= b2;")(
        state["beta1"], state["beta2"], state["beta1_power"], state["beta2_power"]
    )


def adam(
    parameters: Array,
    gradients: Sequence[Array],
    state: dict[str, Array],
    rounded: Array | None = None,
    *,
    divisor: int = 1,
) -> None:
    """Change parameters by a step of :class:`gpuml.Adam` in place, once it is counted.

    Parameters
    ----------
    parameters : cupy.ndarray
    gradients : sequence of cupy.ndarray
        Whose sum over `divisor` is the gradient.
    state : dict of str to cupy.ndarray
    rounded : cupy.ndarray of bfloat16, optional
        Gets the parameters, rounded.
    """
    summed, step = _summed(len(gradients), divisor)
    names = f"{summed}, T rate, T b1, T b2, T epsilon, T p1, T p2"
    rates = ["learning_rate", "beta1", "beta2", "epsilon", "beta1_power", "beta2_power"]
    if "weight_decay" in state:
        names += ", T decay, T decaying"
        rates += ["weight_decay", "decaying"]
        step += "p -= rate * decay * decaying * p;"
    step += (
        "m = m * b1 + g * (1 - b1); v = v * b2 + g * g * (1 - b2);"
        "p -= m / (sqrt(v) / sqrt(1 - p2) + epsilon) * (rate / (1 - p1));"
    )
    kernel = _update(names, "T p, T m, T v", step, rounded)
    kernel(*gradients, *(state[name] for name in rates), parameters, state["m"], state["v"])


def summed(values: Sequence[Array], divisor: int) -> Array:
    """Return the sum of arrays over a number, in one launch."""
    import cupy

    inputs, total = _summed(len(values), divisor)
    kernel = _elementwise(inputs, "T sum", f"{total} sum = g;")
    return kernel(*values, cupy.empty_like(values[0]))


@cache
def _summed(n: int, divisor: int) -> tuple[str, str]:
    """Return the inputs and the beginning of a kernel that adds up n gradients as g."""
    if n == 1 and divisor == 1:
        return "T g", ""
    names = [f"T g{i}" for i in range(n)]
    total = " + ".join(f"g{i}" for i in range(n))
    return ", ".join(names), f"T g = ({total}) / T({divisor});"


def clip_norm(g: Array, longest: float) -> None:
    """Make a vector at most so long, in place, in two launches.

    Parameters
    ----------
    g : cupy.ndarray
        Contiguous; float32 or float64.
    longest : float
    """
    import cupy

    n_parts = max(1, min(THREADS, -(-g.size // PART_NUMBERS)))
    sums, n = cupy.empty(n_parts, np.float64), np.int64(g.size)
    squares, scale = _clip_norm(_name(g))
    squares((n_parts,), (THREADS,), (g, n, sums))
    _launch(scale, g.size, (g, n, sums, np.int32(n_parts), np.float64(longest)))


def all_finite(x: Array) -> Array:
    """Return whether all numbers are finite, as an int32 on the device: 1 or 0.

    CuPy's own reductions take seconds to compile on a machine that has not seen them.

    Parameters
    ----------
    x : cupy.ndarray
        Contiguous; float32 or float64.
    """
    import cupy

    end, _ = _epoch_end(_name(x))
    fine, mean = cupy.ones((), np.int32), cupy.empty((), np.float64)
    sizes = np.int64(x.size), np.int32(0)  # and no losses
    _launch(end, x.size, (x, sizes[0], x, mean, sizes[1], fine, mean))
    return fine


class EpochEnd:
    """Notes on the device how each epoch ended, in two launches.

    Parameters
    ----------
    weights : cupy.ndarray
        The flat vector that is trained.

    Attributes
    ----------
    n_good : cupy.ndarray of shape ()
        How many epochs ended well, one after the other from the first.
    """

    def __init__(self, weights: Array) -> None:
        import cupy

        self._weights = weights
        self._fine = cupy.ones((), np.int32)
        self.n_good = cupy.zeros((), np.int64)
        self._end, self._keep = _epoch_end(_name(weights))

    def __call__(self, losses: Array, shares: Array, kept: Array) -> Array:
        """Look at an epoch; if it and all before were good, copy the weights.

        Parameters
        ----------
        losses : cupy.ndarray of shape (n_steps,)
        shares : cupy.ndarray of float64, shape (n_steps,)
            Of the epoch's samples in each step.
        kept : cupy.ndarray
            Gets the weights.

        Returns
        -------
        cupy.ndarray of shape ()
            The mean loss, in float64.
        """
        import cupy

        n = self._weights.size
        blocks = (min(MOST_BLOCKS, -(-n // THREADS)),)
        mean = cupy.empty((), np.float64)
        losses = cupy.ascontiguousarray(losses, self._weights.dtype)
        sizes = np.int64(n), np.int32(losses.size)
        self._end(
            blocks,
            (THREADS,),
            (self._weights, sizes[0], losses, shares, sizes[1], self._fine, mean),
        )
        self._keep(blocks, (THREADS,), (self._weights, kept, sizes[0], self._fine, self.n_good))
        return mean


def epochs_end(weights: Array, losses: Array, shares: Array) -> Array:
    """Return how some epochs of many models ended, on the device.

    Parameters
    ----------
    weights : cupy.ndarray of shape (n_epochs, n_models, n_parameters)
        Those after each epoch; float32 or float64.
    losses : cupy.ndarray of shape (n_epochs, n_steps, n_models)
    shares : cupy.ndarray of float64, shape (n_steps,)
        Of the epoch's samples in each step.

    Returns
    -------
    cupy.ndarray of float64, shape (2, n_epochs, n_models)
        First 1 where weights and losses are all finite, else 0; then the mean losses.
    """
    import cupy

    n_epochs, n_models, size = weights.shape
    ends = cupy.empty((2, n_epochs, n_models), np.float64)
    sizes = np.int64(size), np.int32(losses.shape[1])
    kernel = _epochs_end(_name(weights))
    arguments = (weights, sizes[0], losses, shares, sizes[1], *ends)
    kernel((n_models, n_epochs), (THREADS,), arguments)
    return ends


def _launch(kernel: Any, n: int, arguments: tuple[Any, ...]) -> None:
    if n:
        kernel((min(MOST_BLOCKS, -(-n // THREADS)),), (THREADS,), arguments)


def _vector(*arrays: Array) -> int:
    """Return how many elements one access may fetch: four, if rows and alignment allow it."""
    fits = all(a.shape[-1] % 4 == 0 and a.data.ptr % (4 * a.itemsize) == 0 for a in arrays)
    return 4 if fits else 1


def _number(x: Array) -> str:
    """Return the type in which elements of an array are summed."""
    return "float64" if _name(x) == "float64" else "float32"


def _name(x: Array) -> str:
    return _name_of(x.dtype)


@cache
def _name_of(dtype: np.dtype[Any]) -> str:
    return dtype.name  # NumPy makes it anew each time, in some microseconds


def _c_type(dtype: str) -> str:
    return {"float32": "float", "float64": "double"}[dtype]


@cache
def _relu_layer(function: str, number: str, stored: str, vector: int) -> Any:
    options = (
        f"-DNUMBER={_c_type(number)}",
        f"-DBFLOAT16={int(stored == 'bfloat16')}",
        f"-DVECTOR={vector}",
    )
    return load_kernel("relu_layer", function, options=options)


@cache
def _softmax(number: str) -> tuple[Any, Any, Any]:
    name, options = "softmax_cross_entropy", (f"-DNUMBER={_c_type(number)}",)
    some, most = ((*options, f"-DTHREADS={n}") for n in (THREADS, MOST_THREADS))
    return *_pair(name, f"{name}_mean", some), load_kernel(name, f"{name}_batch", options=most)


@cache
def _epoch_end(number: str) -> tuple[Any, Any]:
    options = (f"-DNUMBER={_c_type(number)}", f"-DTHREADS={THREADS}")
    return _pair("epoch_end", "epoch_end_keep", options)


@cache
def _epochs_end(number: str) -> Any:
    options = (f"-DNUMBER={_c_type(number)}", f"-DTHREADS={THREADS}")
    return load_kernel("epochs_end", options=options)


@cache
def _clip_norm(number: str) -> tuple[Any, Any]:
    options = (f"-DNUMBER={_c_type(number)}", f"-DTHREADS={THREADS}")
    return _pair("clip_norm", "clip_norm_scale", options)


@cache
def _squares(number: str) -> tuple[Any, Any]:
    options = (f"-DNUMBER={_c_type(number)}", f"-DTHREADS={THREADS}")
    return _pair("mean_squared_error", "mean_squared_error_mean", options)


def _pair(source: str, second: str, options: tuple[str, ...]) -> tuple[Any, Any]:
    return load_kernel(source, options=options), load_kernel(source, second, options=options)


def _update(inputs: str, outputs: str, step: str, rounded: Array | None) -> Any:
    """Return what calls the kernel of an optimizer's step on new parameters p."""
    if rounded is None:
        return _elementwise(inputs, outputs, step)
    kernel = _elementwise(inputs, f"{outputs}, uint16 rounded", f"{step} rounded = to_bfloat16(p);")
    return lambda *arrays: kernel(*arrays, rounded.view(np.uint16))


@cache
def _elementwise(inputs: str, outputs: str, operation: str) -> Any:
    import cupy

    preamble = text("bfloat16.cuh")
    return cupy.ElementwiseKernel(
        inputs, outputs, operation, "gpuml_elementwise", preamble=preamble
    )


@cache
def _quadratic() -> Any:
    import cupy

    return cupy.ReductionKernel(
        "T p, T t, T w, T c, T scale",
        "T value",
        "scale * ((p - 2 * t) * w + c)",
        "a + b",
        "value = a",
        "0",
        "gpuml_quadratic",
    )
