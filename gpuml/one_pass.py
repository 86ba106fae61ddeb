"""Loss and gradient of a linear model in one pass over the data.

Y = X W + b under the mean squared error needs each row of X twice: for its residual, and then for
the gradient. Two matrix products read X from memory twice. Here a row, or on the CPU a block of
rows that fits into the cache, is used twice while it is there.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from gpuml.devices import Array, array_module, blas_threads, cpu_count
from gpuml.kernels import load_kernel
from gpuml.matmul import matmul
from gpuml.models import Model, Parameters

# Rows of X worked on at once on the CPU, in bytes: they stay in the cache of a core or two.
CACHED_BYTES = 2**20
# Below this many bytes of X two products are as fast: nothing has to come from memory.
FEWEST_BYTES = 2**21

# The kernel keeps weights, gradients and two sets of rows in registers: so many 4-byte words.
REGISTER_WORDS = 200
SHARED_BYTES = 48 * 1024
THREADS = 128
BLOCKS_EACH = 4  # for a multiprocessor


def limit(model: Model, X: Array) -> str | None:
    """Return why the gradient cannot be computed in one pass, or None if it can.

    Parameters
    ----------
    model : Model
    X : array of shape (n_samples, n_features)
        On the device of the model, of its type.

    Returns
    -------
    str or None
        A reason for people.
    """
    from gpuml.models import Linear

    if type(model) is not Linear or model.dtype.name not in ("float32", "float64"):
        return "it is for Linear models of float32 or float64"
    if not X.flags.c_contiguous:
        return "the rows of X are not contiguous"
    if isinstance(X, np.ndarray):
        return None
    if array_module(X).cuda.runtime.is_hip:
        return "its kernel is for NVIDIA GPUs"
    n_features, n_outputs = model.sizes
    if _shape(n_features, n_outputs, X.itemsize) is None:
        return f"{n_features} features and {n_outputs} outputs do not fit into registers"
    return None


def pays(model: Model, X: Array) -> bool:
    """Return whether one pass over so much data is faster than two products."""
    if isinstance(X, np.ndarray):
        return bool(X.nbytes >= FEWEST_BYTES and model.sizes[1] <= 8)
    return True


def gradient(
    X: Array,
    Y: Array,
    parameters: Parameters,
    gradients: Parameters,
    *,
    scale: float | None = None,
    n_threads: int | None = None,
) -> Array:
    """Write the gradient of the mean squared error of X W + b, and return the error.

    Parameters
    ----------
    X : array of shape (n, n_features)
        Rows contiguous.
    Y : array of shape (n, n_outputs)
        Of the type of X, as the parameters are.
    parameters, gradients : Parameters
        ``weight`` and, if the model has one, ``bias``. `gradients` is overwritten.
    scale : float, optional
        What the sum of squares is multiplied by; 1 / (n · n_outputs) unless given.
    n_threads : int, optional
        On the CPU; as many as there are cores unless given.

    Returns
    -------
    array of shape ()
        The mean squared error before any step, of the type of X. It stays on the device. Sums
        over some rows are in the type of X, and the sums of those in float64. On the CPU some
        rows are a block that fits into the cache. On a GPU they are those of a group of threads;
        there are 16 groups or more for each multiprocessor, so that of a million rows on an H200
        a group has some 500. The order is fixed: the same data give the same bits on the same
        device.

    Raises
    ------
    TypeError
        If the arrays are on different devices.
    """
    xp = array_module(X, Y, parameters.flat, gradients.flat)
    if scale is None:
        scale = 1 / (len(X) * Y.shape[1])
    if xp is np:
        return _on_host(X, Y, parameters, gradients, scale, n_threads or cpu_count())
    return _on_gpu(X, Y, parameters, gradients, scale)


def _on_host(
    X: Array, Y: Array, parameters: Parameters, gradients: Parameters, scale: float, n_threads: int
) -> Array:
    edges = np.linspace(0, len(X), n_threads + 1).astype(int)
    parts = [slice(*edge) for edge in pairwise(edges)]
    with blas_threads(0):  # each thread of ours has one of the BLAS library's
        sums = list(_pool().map(lambda part: _part_on_host(X[part], Y[part], parameters), parts))
    loss = sum(part_loss for part_loss, _ in sums)
    gradients.flat[...] = 2 * scale * sum(part.flat for _, part in sums)
    return np.asarray(loss * scale, X.dtype)


@np.errstate(all="ignore")  # in this thread; whoever called looks at the result
def _part_on_host(X: Array, Y: Array, parameters: Parameters) -> tuple[float, Parameters]:
    """Return the sum of squares over some rows, and half its gradient, in float64."""
    weight, bias = parameters["weight"], parameters.get("bias")
    sums = Parameters(np.zeros(parameters.flat.shape), parameters.shapes)
    rows = max(1, CACHED_BYTES // max(1, X.shape[1] * X.itemsize))
    product = np.empty_like(weight)
    residual = np.empty((min(rows, len(X)), Y.shape[1]), X.dtype)
    loss = 0.0
    for first in range(0, len(X), rows):
        x, y = X[first : first + rows], Y[first : first + rows]
        r = matmul(x, weight, out=residual[: len(x)])
        if bias is not None:
            r += bias
        r -= y
        loss += float(np.vdot(r, r))
        sums["weight"] += matmul(x.T, r, out=product)
        if bias is not None:
            sums["bias"] += r.sum(axis=0)
    return loss, sums


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cpu_count(), thread_name_prefix="gpuml")


if hasattr(os, "register_at_fork"):  # the threads do not come along
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _on_gpu(
    X: Array, Y: Array, parameters: Parameters, gradients: Parameters, scale: float
) -> Array:
    import cupy

    n, n_features = X.shape
    n_outputs = Y.shape[1]
    Y = cupy.ascontiguousarray(Y)  # the kernel counts on that; a column of a table is not
    vector = 16 // X.itemsize
    if X.data.ptr % 16 or n_features % vector:
        vector = 1
    shape = _shape(n_features, n_outputs, X.itemsize, vector)
    if shape is None:  # whole vectors for each thread are too many registers
        vector = 1
        shape = _shape(n_features, n_outputs, X.itemsize, vector)
    assert shape is not None, "limit() says what fits"
    lanes, values, rows = shape
    sizes = {
        "ELEMENT": {4: "float", 8: "double"}[X.itemsize],
        "FEATURES": n_features,
        "OUTPUTS": n_outputs,
        "THREADS": THREADS,
        "LANES": lanes,
        "VALUES": values,
        "ROWS": rows,
        "VECTOR": vector,
    }
    options = tuple(f"-D{name}={value}" for name, value in sizes.items())
    size = n_features * n_outputs + n_outputs + 1
    most = -(-n // (THREADS // lanes * rows))
    blocks = min(BLOCKS_EACH * _n_processors(X.device.id), most)
    partial = cupy.empty((blocks, size), X.dtype)
    loss = cupy.empty((), X.dtype)
    bias = parameters.get("bias")
    kernel, add = _kernels(options)
    kernel(
        (blocks,), (THREADS,), (X, Y, parameters["weight"], _pointer(bias), partial, np.int64(n))
    )
    into = gradients["weight"], _pointer(gradients.get("bias")), loss
    add((-(-size // 32),), (32, 8), (partial, np.int32(blocks), np.float64(scale), *into))
    return loss


@cache
def _kernels(options: tuple[str, ...]) -> tuple[Any, Any]:
    # To read the source and ask for the GPU at each launch would take longer than the launch.
    names = "linear_gradient", "linear_gradient_sum"
    first, second = (load_kernel("linear_gradient", name, options=options) for name in names)
    return first, second


def _pointer(array: Array | None) -> Any:
    return np.intp(0) if array is None else array


@cache
def _n_processors(device: int) -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"])


@cache
def _shape(
    n_features: int, n_outputs: int, itemsize: int, vector: int = 1
) -> tuple[int, int, int] | None:
    """Return lanes, values and rows for the kernel (see its source), or None if nothing fits."""
    if (n_features * n_outputs + n_outputs + 1) * itemsize > SHARED_BYTES:
        return None
    words = itemsize // 4
    power = 2 ** math.ceil(math.log2(max(1, -(-n_features // vector))))
    for lanes in (min(32, power), THREADS):  # whole warps, or a whole block for a row
        values = -(-n_features // (lanes * vector)) * vector
        left = REGISTER_WORDS // words - 2 * values * n_outputs
        rows = min(8, max(1, 32 // (words * values)), left // (2 * values))
        # Across a block each output of each row is summed by way of shared memory: that pays
        # for one output, and hardly for two.
        if rows >= 1 and (lanes <= 32 or n_outputs <= 2):
            return lanes, values, rows
    return None
