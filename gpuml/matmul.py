"""Matrix products: the one place where the package multiplies matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from operator import index
from typing import Any, Literal, TypeAlias

import numpy as np

from gpuml.devices import Array, array_module, device_of
from gpuml.errors import note_lack_of_memory, unknown_name
from gpuml.kernels import load_kernel
from gpuml.memory_maps import check_length, overlap

Precision: TypeAlias = Literal["float32", "tf32", "bfloat16"]
PRECISIONS = ("float32", "tf32", "bfloat16")

# Up to this size matrices go to our own kernel, many at a time: the memory's bandwidth is the
# limit there, and cuBLAS reaches 10 to 70 % of it (tests/benchmarks/batched.py). Where all share
# the right matrix, as one tall product, it reaches 22 to 67 %, our kernel 55 to 100 %.
SMALL = 32
FEWEST_ROWS = 4  # of each product with a shared right matrix; fewer were not measured
WORKSPACE_BYTES = 32 * 2**20  # for cuBLAS inside a graph: what its manual advises for Hopper
FEWEST_SMALL = 256  # products; for fewer, compiling a kernel for their shape does not pay
SMALL_THREADS = 128
SHARED_BYTES = 48 * 1024  # what a block may have without asking
# In tf32 cuBLAS multiplies xᵀ y of matrices that lie row by row at 0.65 of its best rate on an
# H100, and comes near that rate when one of them is transposed. From these sizes on a copy of the
# smaller one costs less time than it saves. Only training does it, whose memory has no budget.
TRANSPOSED_SIDE, TRANSPOSED_SIZE = 1500, 2**32  # max(m, n), and m n k
MOST_ROWS = 2**31 - 1  # cuBLAS and most BLAS count in 32 bits


def matmul(
    a: Array, b: Array, out: Array | None = None, *, precision: Precision | None = None
) -> Array:
    """Return the matrix product a @ b, over the last two axes, without a look at the arguments.

    What models and training call: cuBLAS or NumPy and little else. :func:`batched_matmul` checks
    its arguments and says what is wrong.

    Parameters
    ----------
    a : array of shape (…, M, K)
    b : array of shape (…, K, N)
        On the same device; transposed and strided views are fine.
    out : array of shape (…, M, N), optional
        Where to write the result; float32 where `a` and `b` are bfloat16, or their type.
    precision : {"float32", "tf32", "bfloat16"}, optional
        As in :func:`batched_matmul`.

    Returns
    -------
    array of shape (…, M, N)
        `out` if given.

    Raises
    ------
    TypeError
        If the arrays live on different devices.
    """
    xp = array_module(a, b)
    if xp is np:
        plain = a.ndim == b.ndim == 2 and a.dtype == b.dtype and a.dtype.char in "fd"
        if plain and (out is None or (out.dtype == a.dtype and out.flags.c_contiguous)):
            return a.dot(b, out)  # BLAS as well, a microsecond sooner
        return np.matmul(a, b, out=out)
    if xp.cuda.runtime.is_hip or a.dtype.kind not in "fcV" or a.dtype != b.dtype:
        return _by_cupy(a, b, out)
    if out is not None and out.dtype != a.dtype and (a.itemsize > 2 or out.dtype != np.float32):
        out[...] = matmul(a, b, precision=precision)
        return out
    if out is None:
        stack = a.shape[:-2]
        if stack != b.shape[:-2]:
            stack = np.broadcast_shapes(stack, b.shape[:-2])
        out = xp.empty((*stack, a.shape[-2], b.shape[-1]), a.dtype)
    if out.size == 0 or a.shape[-1] == 0:
        out[...] = 0
    elif out.ndim == 2:
        if precision == "tf32":
            a, b = _for_tf32(a, b)
        _cublas(a, b, out, precision)
    else:
        _multiply_on_gpu(a, b, out, precision)
    return out


class CapturedProducts:
    """Products that can be captured into a CUDA graph: a context manager.

    CuPy calls cuBLAS only outside a capture. nvmath-python's bindings call the same library
    without that limit. Call each product once before it is captured, so that all is loaded.

    Parameters
    ----------
    stream : cupy.cuda.Stream
        The current stream inside the ``with`` blocks. Keep this object as long as the graph,
        which uses its memory.

    Raises
    ------
    ImportError
        If nvmath-python is not installed.
    """

    def __init__(self, stream: Any) -> None:
        from cupy.cuda import alloc
        from nvmath.bindings import cublas

        self._cublas, self._stream = cublas, stream
        self.multiply = cublas.gemm_strided_batched_ex
        self.number = cublas.create()
        cublas.set_stream(self.number, stream.ptr)
        self._space = alloc(WORKSPACE_BYTES)  # else a graph takes and frees some each time
        cublas.set_workspace(self.number, self._space.ptr, WORKSPACE_BYTES)

    def __enter__(self) -> None:
        _CAPTURED[self._stream.ptr] = self

    def __exit__(self, *_: object) -> None:
        del _CAPTURED[self._stream.ptr]

    def __del__(self) -> None:
        if hasattr(self, "number"):
            self._cublas.destroy(self.number)


_CAPTURED: dict[int, CapturedProducts] = {}  # by stream, inside the blocks


def batched_matmul(
    a: Array, b: Array, *, out: Array | None = None, precision: Precision | None = None
) -> Array:
    """Multiply stacks of matrices in one launch: c[…] = a[…] b[…].

    The leading axes broadcast as in NumPy. Transposed and strided views are multiplied as they
    are where cuBLAS can, and copied where it cannot.

    Parameters
    ----------
    a : array of shape (…, M, K)
        Of NumPy or CuPy. Any type of number.
    b : array of shape (…, K, N)
        On the same device.
    out : array of shape (…, M, N), optional
        Where to write the result: of the result's type, and no part of `a` or `b`.
    precision : {"float32", "tf32", "bfloat16"}, optional
        How a GPU multiplies float32: exactly unless given, or on tensor cores with operands
        rounded to 11 or 8 significant bits and sums in float32. A CPU multiplies exactly.

    Returns
    -------
    array of shape (…, M, N)
        Where `a` and `b` are; of the type that NumPy's promotion gives. float16 and bfloat16
        are summed in float32 and rounded once. Integers wrap around on overflow, as in NumPy.

    Raises
    ------
    TypeError
        If the arrays live on different devices, or hold no numbers.
    ValueError
        If shapes do not fit (the message says which transposition would), if `out` cannot take
        the result or overlaps an operand, or if `precision` is not for this type.
    DataError
        If an array is a memory map whose file was cut off.

    Notes
    -----
    On an NVIDIA GPU float32 and float64 matrices of up to 32 rows and columns go to a kernel of
    our own from 256 products on (if they share one `b`, those of at least 4 rows). Its first
    launch for a shape compiles it (some 0.3 s, kept by CuPy on disk).

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.ones((5, 1, 2, 3)), np.ones((7, 3, 4))
    >>> batched_matmul(a, b).shape
    (5, 7, 2, 4)
    """
    xp = array_module(a, b) if out is None else array_module(a, b, out)
    try:
        if xp is not np:
            with device_of(a).use():
                return _batched_matmul(xp, a, b, out, precision)
        return _batched_matmul(xp, a, b, out, precision)
    except MemoryError as error:
        note_lack_of_memory(error)
        raise


def _batched_matmul(
    xp: Any, a: Array, b: Array, out: Array | None, precision: Precision | None
) -> Array:
    shape = product_shape(a.shape, b.shape)
    dtype = product_dtype(a, b)
    compute = checked_precision(precision, dtype)
    if out is None:
        out = xp.empty(shape, dtype)
    else:
        check_out(out, shape, dtype)
        for name, operand in (("a", a), ("b", b)):
            if overlap(*(_place(x) for x in (out, operand))):
                raise ValueError(overlap_text(name))
    if xp is np:
        for name, array in (("a", a), ("b", b), ("out", out)):
            check_length(array, name)
    if out.size == 0 or a.shape[-1] == 0:
        out[...] = 0
    elif xp is np:
        _multiply_on_host(a, b, out)
    elif xp.cuda.runtime.is_hip or dtype.kind in "biu":
        _by_cupy(a.astype(dtype, copy=False), b.astype(dtype, copy=False), out)
    else:
        _multiply_on_gpu(a.astype(dtype, copy=False), b.astype(dtype, copy=False), out, compute)
    return out


def split_matmul(
    a: Array, b: Array, n_parts: int, *, precision: Precision | None = None
) -> Iterator[Array]:
    """Multiply a by the columns of b, part by part: C1 = A B1, C2 = A B2 and so on.

    Side by side the parts are the product. Each needs only its share of the memory.

    Parameters
    ----------
    a : array of shape (M, K)
    b : array of shape (K, N)
        On the same device.
    n_parts : int
        From 1 to N, or 1 if N is 0. The first parts are a column wider where N does not divide.
    precision : {"float32", "tf32", "bfloat16"}, optional
        As in :func:`batched_matmul`.

    Yields
    ------
    array of shape (M, about N / n_parts)

    Raises
    ------
    TypeError
        If the number of parts is no whole number.
    ValueError
        If the number of parts is not from 1 to N, or the shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.eye(2), np.arange(6.0).reshape(2, 3)
    >>> [part.tolist() for part in split_matmul(a, b, 2)]
    [[[0.0, 1.0], [3.0, 4.0]], [[2.0], [5.0]]]
    """
    array_module(a, b)
    product_shape(a.shape, b.shape)
    n, n_parts = b.shape[-1], index(n_parts)
    if not 1 <= n_parts <= max(1, n):
        raise ValueError(f"n_parts must be from 1 to the {n} columns of b, got {n_parts}")
    width, wider = divmod(n, n_parts)

    def parts() -> Iterator[Array]:
        stop = 0
        for i in range(n_parts):
            start, stop = stop, stop + width + (i < wider)
            yield batched_matmul(a, b[..., start:stop], precision=precision)

    return parts()


def multiply_into(
    a: Array, b: Array, out: Array, *, add: bool = False, precision: Precision | None = None
) -> None:
    """Write the product of two matrices to `out`, or add it: out += a b.

    Parameters
    ----------
    a : array of shape (M, K)
    b : array of shape (K, N)
        Of the type of `a`.
    out : array of shape (M, N)
        Of the same type; or of float32, where `a` and `b` have 16 bits. No part of `a` or `b`.
    add : bool
        Whether to add to what `out` holds.
    precision : {"float32", "tf32", "bfloat16"}, optional
        As in :func:`batched_matmul`.
    """
    xp = array_module(a, b, out)
    if out.size == 0 or a.shape[-1] == 0:
        if not add:
            out[...] = 0
        return
    if a.dtype.kind in "fcV" and xp is not np and not xp.cuda.runtime.is_hip:
        _cublas(a, b, out, checked_precision(precision, out.dtype), scale=float(add))
        return
    if a.dtype != out.dtype:
        a, b = a.astype(out.dtype), b.astype(out.dtype)
    if xp is np:
        a, b = _readable(a), _readable(b)
    if not add:
        xp.matmul(a, b, out=out)
    elif out.dtype == bool:
        xp.logical_or(out, xp.matmul(a, b), out=out)
    else:
        xp.add(out, xp.matmul(a, b), out=out)


def product_shape(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a product, or say what would fit.

    Raises
    ------
    ValueError
        If there are fewer than two axes, or they do not fit.

    Examples
    --------
    >>> product_shape((2, 3), (5, 3, 4))
    (5, 2, 4)
    """
    a, b = tuple(a), tuple(b)
    given = f"{a} @ {b}"
    for name, shape in (("a", a), ("b", b)):
        if len(shape) < 2:
            raise ValueError(
                f"{given}: {name} is no matrix; make it one, a column with {name}[:, None] or a "
                f"row with {name}[None, :]"
            )
    try:
        stack = np.broadcast_shapes(a[:-2], b[:-2])
    except ValueError:
        raise ValueError(
            f"{given}: the stacks {a[:-2]} and {b[:-2]} do not broadcast; axes must be equal, or 1"
        ) from None
    if a[-1] != b[-2]:
        raise ValueError(f"{given} do not fit: {a[-1]} columns meet {b[-2]} rows{_advice(a, b)}")
    return (*stack, a[-2], b[-1])


def _advice(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """Say which transposition would make two shapes fit."""
    turn = "{0}.T" if len(a) == len(b) == 2 else "{0}.swapaxes(-1, -2)"
    turned = {"a": turn.format("a"), "b": turn.format("b")}
    if a[-1] == b[-1]:
        return f"; a @ {turned['b']} would"
    if a[-2] == b[-2]:
        return f"; {turned['a']} @ b would"
    if a[-2] == b[-1]:
        return f"; b @ a or {turned['a']} @ {turned['b']} would"
    return "; no transposition would"


def product_dtype(*arrays: Array) -> np.dtype[Any]:
    """Return the type of a product of arrays, in the byte order of this machine.

    Raises
    ------
    TypeError
        If an array holds no numbers.
    """
    for array in arrays:
        # Of the types that others made, both libraries know how to sum only bfloat16.
        own = array.dtype.kind in "biufc" and issubclass(array.dtype.type, np.number | np.bool_)
        if not own and array.dtype.name != "bfloat16":
            raise TypeError(
                f"cannot multiply arrays of {array.dtype}: give them a type of number, "
                "for example with a.astype(np.float32)"
            )
    return np.result_type(*(array.dtype for array in arrays)).newbyteorder("=")


def checked_precision(precision: Precision | None, dtype: np.dtype[Any]) -> Precision | None:
    """Return a precision, or say what is wrong with it.

    Raises
    ------
    ValueError
        If it is unknown, or the type is not float32 or complex64.
    """
    if precision is None:
        return None
    if precision not in PRECISIONS:
        raise ValueError(unknown_name("precision", str(precision), PRECISIONS))
    if dtype.char not in "fF":
        raise ValueError(f"precision={precision!r} is for float32, and this product is {dtype}")
    return precision


def check_out(out: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Say why an array cannot take a result.

    Raises
    ------
    ValueError
        If its shape or type is wrong, or it is read-only or a broadcast view.
    """
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(
            f"out must be {dtype} of shape {shape}, got {out.dtype} of shape {out.shape}"
        )
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(
            "out is read-only: give an array that can be written, of a file one opened with "
            "mmap_mode='r+'"
        )
    repeated = any(n > 1 and step == 0 for n, step in zip(out.shape, out.strides, strict=True))
    if out.size and repeated:
        raise ValueError("out repeats its elements in memory, so it cannot hold a result")


class _Place:
    """Says to NumPy where an array of a GPU lies."""

    def __init__(self, x: Array) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{x.itemsize}",
            "shape": x.shape,
            "strides": x.strides,
            "data": (x.data.ptr, False),
        }


def _place(x: Array) -> Any:
    """Return an array with the addresses of another, to compare them; never to be read."""
    return x if isinstance(x, np.ndarray) else np.asarray(_Place(x))


def overlap_text(name: str) -> str:
    """Say that the result lies where an operand does."""
    return (
        f"out overlaps {name}: it would be overwritten while it is read; give out memory of its "
        "own, such as np.empty_like(out), or leave it away"
    )


def _as_one(a: Array, b: Array, out: Array) -> tuple[Array, Array, Array]:
    """Make one tall product of many that share b, where nothing need be copied for it."""
    if out.ndim > 2 and _is_shared(b):
        flat, flat_out = _as_matrix(a), _as_matrix(out)
        if flat is not None and flat_out is not None and len(flat) <= MOST_ROWS:
            return flat, b.reshape(b.shape[-2:]), flat_out
    return a, b, out


def _multiply_on_host(a: Array, b: Array, out: Array) -> None:
    a, b, out = _as_one(a, b, out)
    a, b = _readable(a), _readable(b)
    if out.dtype.itemsize == 2 and out.dtype.kind in "fV":  # NumPy has no fast product for these
        out[...] = np.matmul(a.astype(np.float32), b.astype(np.float32))
    else:
        np.matmul(a, b, out=out)


def _readable(x: Array) -> Array:
    """Return a host array as BLAS can read it.

    NumPy before 2.3 multiplies others by a loop of its own, 100 times slower.
    """
    return x if _layout(x) else np.ascontiguousarray(x)


def _multiply_on_gpu(a: Array, b: Array, out: Array, precision: Precision | None) -> None:
    """Choose between our kernel for many small products, one tall product, and cuBLAS for stacks.

    Many that share `b` could be one tall product, but small ones our kernel does faster as well.
    """
    if out.ndim == 2:
        _cublas(a, b, out, precision)
        return
    # What cuBLAS cannot read is copied first, so that a shared matrix is copied once.
    a, b = (x if _layout(x) else _contiguous(x) for x in (a, b))
    xp, stack = array_module(a), out.shape[:-2]

    def spread(x: Array) -> Array:
        return xp.broadcast_to(x, (*stack, *x.shape[-2:]))

    if _are_small(a, b, out) and _multiply_small(spread(a), spread(b), out):
        return
    flat, matrix, flat_out = _as_one(a, b, out)
    if flat_out.ndim == 2:
        _cublas(flat, matrix, flat_out, precision)
        return
    stacks = spread(a), spread(b)
    if None not in map(_step, stacks):
        _cublas(*stacks, out, precision)
    elif precision is None and out.dtype.name != "bfloat16" and out.flags.c_contiguous:
        # By an array of pointers; of two-byte numbers only copies, since cuBLAS wants those
        # matrices to begin at multiples of 16 bytes.
        _by_cupy(*((a, b) if a.itemsize > 2 else stacks), out)
    else:  # CuPy 14.2 has neither arrays of pointers nor copies of uneven stacks for bfloat16
        for each in zip(*stacks, out, strict=True):
            _multiply_on_gpu(*each, precision)


def _are_small(a: Array, b: Array, out: Array) -> bool:
    """Return whether products are many and small, so that our kernel is faster than cuBLAS."""
    if _is_shared(b) and a.shape[-2] < FEWEST_ROWS:
        return False
    largest = max(*a.shape[-2:], b.shape[-1])
    return bool(largest <= SMALL and out.size >= FEWEST_SMALL * _area(out))


def _is_shared(b: Array) -> bool:
    return all(n == 1 for n in b.shape[:-2])


def _contiguous(x: Array) -> Array:
    xp = array_module(x)
    if x.dtype.name != "bfloat16":
        return xp.ascontiguousarray(x)
    bits = xp.ascontiguousarray(x.view(np.uint16))  # CuPy 14.2 copies only these
    return xp.ndarray(bits.shape, x.dtype, memptr=bits.data)


def _by_cupy(a: Array, b: Array, out: Array | None) -> Array:
    """Multiply by CuPy, which copies stacks that run backwards, but falls over stacks of one."""
    place = None if out is None else _forwards(out)
    product = array_module(a).matmul(_forwards(a), _forwards(b), out=place)
    return product if out is None else out


def _forwards(x: Array) -> Array:
    """Return a view of an array in which no axis of length 1 runs backwards: it says nothing."""
    if min(x.strides) >= 0:
        return x
    axes = zip(x.shape, x.strides, strict=True)
    return x[tuple(slice(None, None, -1 if n == 1 and step < 0 else 1) for n, step in axes)]


def _area(x: Array) -> int:
    return int(x.shape[-2] * x.shape[-1])


def _as_matrix(x: Array) -> Array | None:
    """Return a stack of matrices as one tall matrix without copying, or None."""
    rows = x.shape[:-1]
    steps = [step for n, step in zip(rows, x.strides[:-1], strict=True) if n > 1]
    lengths = [n for n in rows if n > 1]
    even = all(steps[i] == steps[i + 1] * lengths[i + 1] for i in range(len(steps) - 1))
    return x.reshape(-1, x.shape[-1]) if even else None


def _step(x: Array) -> int | None:
    """Return the elements from one matrix of a stack to the next, or None if that varies."""
    return _step_of(x.shape, x.strides, x.itemsize)


def _step_of(shape: Sequence[int], strides: Sequence[int], size: int) -> int | None:
    axes = [(n, s) for n, s in zip(shape[:-2], strides[:-2], strict=True) if n > 1]
    if any(s % size for _, s in axes):
        return None
    for (_, outer), (n, inner) in pairwise(axes):
        if outer != inner * n:
            return None
    step = axes[-1][1] if axes else 0
    return int(step) // size if step >= 0 else None


def _layout(x: Array) -> tuple[int, int] | None:
    """Return whether matrices lie column by column, and the elements between columns (or rows).

    None if neither rows nor columns are contiguous, or they are no whole number of elements apart.
    """
    return _layout_of(x.shape, x.strides, x.itemsize)


def _layout_of(shape: Sequence[int], strides: Sequence[int], size: int) -> tuple[int, int] | None:
    (rows, columns), (down, across) = shape[-2:], strides[-2:]
    if (rows > 1 and down % size) or (columns > 1 and across % size):
        return None
    down, across = down // size, across // size
    if (columns == 1 or across == 1) and (rows == 1 or down >= columns):
        return 0, down if rows > 1 else columns
    if (rows == 1 or down == 1) and (columns == 1 or across >= rows):
        return 1, across if columns > 1 else rows
    return None


def _cublas(a: Array, b: Array, out: Array, precision: Precision | None, scale: float = 0) -> None:
    """Compute out = a b + scale out by cuBLAS, for one product or an evenly spaced stack."""
    import cupy
    from cupy_backends.cuda.libs import cublas

    places = a.shape, a.strides, b.shape, b.strides, out.shape, out.strides
    told = _arguments(*places, a.dtype, out.dtype, precision, scale)
    if told is None:
        a, b = (x if _layout(x) else _contiguous(x) for x in (a, b))
        by_rows = _step(out) is not None and (_layout(out) or (1, 0))[0] == 0
        place = out if by_rows else _contiguous(out)
        _cublas(a, b, place, precision, scale)
        if place is not out:
            out[...] = place
        return
    head, (b_code, b_row, b_step), (a_code, a_row, a_step), zero, (c_code, c_row, c_step), tail = (
        told
    )
    captured = _CAPTURED.get(cupy.cuda.get_current_stream().ptr) if _CAPTURED else None
    if tail[0] == 1 and not captured:  # it is queued in a tenth less time
        cublas.gemmEx(
            cupy.cuda.device.get_cublas_handle(), *head, b.data.ptr, b_code, b_row,
            a.data.ptr, a_code, a_row, zero, out.data.ptr, c_code, c_row, *tail[1:],
        )  # fmt: skip
        return
    handle, multiply = cupy.cuda.device.get_cublas_handle(), cublas.gemmStridedBatchedEx
    if captured:
        handle, multiply = captured.number, captured.multiply
    multiply(
        handle, *head, b.data.ptr, b_code, b_row, b_step, a.data.ptr, a_code, a_row, a_step,
        zero, out.data.ptr, c_code, c_row, c_step, *tail,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _arguments(
    a: tuple[int, ...],
    a_strides: tuple[int, ...],
    b: tuple[int, ...],
    b_strides: tuple[int, ...],
    c: tuple[int, ...],
    c_strides: tuple[int, ...],
    dtype: np.dtype[Any],
    sum_dtype: np.dtype[Any],
    precision: Precision | None,
    scale: float,
) -> tuple[Any, ...] | None:
    """Return what cuBLAS is told of a product beside addresses; None if it cannot read an array.

    A product of small matrices takes less time than finding this out, so it is kept.
    """
    from cupy_backends.cuda.libs import cublas

    code, compute, sums = _cublas_types(dtype, precision)
    sum_code = code if sum_dtype == dtype else _cublas_types(sum_dtype, None)[0]
    arrays = (a, a_strides, code), (b, b_strides, code), (c, c_strides, sum_code)
    turned, described = [], []
    for (shape, strides, number), kind in zip(arrays, (dtype, dtype, sum_dtype), strict=True):
        layout = _layout_of(shape, strides, kind.itemsize)
        step = _step_of(shape, strides, kind.itemsize)
        if layout is None or step is None:
            return None
        turned.append(layout[0])
        described.append((number, layout[1], step))
    if turned[2]:
        return None
    (m, k), n = a[-2:], b[-1]
    # cuBLAS counts by columns. What lies by rows is for it the transposed matrix, and the
    # transposed product is b' a'.
    head = turned[1], turned[0], n, m, k, _constant(1.0, sums)[1]
    tail = math.prod(c[:-2]), compute, cublas.CUBLAS_GEMM_DEFAULT
    return head, described[1], described[0], _constant(float(scale), sums)[1], described[2], tail


def _for_tf32(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the factors of a large product, xᵀ y, with the smaller one transposed."""
    (m, k), n = a.shape, b.shape[1]
    if max(m, n) < TRANSPOSED_SIDE or m * n * k < TRANSPOSED_SIZE:
        return a, b
    if not (a.T.flags.c_contiguous and b.flags.c_contiguous):
        return a, b
    if m <= n and _transposable(a.T):
        return _transposed(a.T), b
    if n < m and _transposable(b):
        return a, _transposed(b).T
    return a, b


def _transposable(x: Array) -> bool:
    divisible = x.shape[0] % 4 == x.shape[1] % 4 == x.data.ptr % 16 == 0
    return bool(divisible and x.dtype.char == "f" and x.flags.c_contiguous)


def _transposed(x: Array) -> Array:
    """Return the transpose as an array of its own."""
    import cupy

    rows, columns = x.shape
    out = cupy.empty((columns, rows), x.dtype)
    _transpose()(
        (-(-columns // 64), -(-rows // 64)), (256,), (x, out, np.int32(rows), np.int32(columns))
    )
    return out


@cache
def _transpose() -> Any:
    return load_kernel("transpose")


@cache
def _cublas_types(dtype: np.dtype[Any], precision: Precision | None) -> tuple[int, int, str]:
    """Return cuBLAS's codes of a type and of the way to sum, and the type of its factors."""
    from cupy.cuda import runtime
    from cupy_backends.cuda.libs import cublas

    ways = {
        None: cublas.CUBLAS_COMPUTE_32F,
        "float32": cublas.CUBLAS_COMPUTE_32F,
        "tf32": cublas.CUBLAS_COMPUTE_32F_FAST_TF32,
        "bfloat16": cublas.CUBLAS_COMPUTE_32F_FAST_16BF,
    }
    single, double = ways[precision], cublas.CUBLAS_COMPUTE_64F
    # The ways with rounded factors are for float32: of other types cuBLAS refuses them at times.
    half = cublas.CUBLAS_COMPUTE_32F
    code, way, sums = {
        "float16": (runtime.CUDA_R_16F, half, "f"),
        "bfloat16": (runtime.CUDA_R_16BF, half, "f"),
        "float32": (runtime.CUDA_R_32F, single, "f"),
        "float64": (runtime.CUDA_R_64F, double, "d"),
        "complex64": (runtime.CUDA_C_32F, single, "F"),
        "complex128": (runtime.CUDA_C_64F, double, "D"),
    }[dtype.name]
    return code, way, sums


@cache
def _constant(value: float, dtype: str) -> tuple[Array, int]:
    """Return a number as cuBLAS reads it, kept in memory, and its address."""
    number = np.asarray(value, dtype)
    return number, int(number.__array_interface__["data"][0])


def _multiply_small(a: Array, b: Array, out: Array) -> bool:
    """Multiply many small matrices by our own kernel; return whether it can."""
    names = {"float32": "float", "float64": "double"}
    whole = _block(a), _block(b)
    if out.dtype.name not in names or None in whole or not out.flags.c_contiguous:
        return False
    item = out.itemsize
    if out.data.ptr % (4 * item):
        return False
    (rows, inner), columns = a.shape[-2:], b.shape[-1]
    pad = 16 // item
    product_bytes = item * (rows * inner + inner * columns + 2 * pad)
    parts = -(-rows // 4) * -(-columns // 4)
    products = min(SMALL_THREADS // parts, SHARED_BYTES // product_bytes)
    sizes = {
        "ELEMENT": names[out.dtype.name],
        "ROWS": rows,
        "COLUMNS": columns,
        "INNER": inner,
        "THREADS": SMALL_THREADS,
        "PRODUCTS": products,
        "A_TRANSPOSED": whole[0],
        "B_TRANSPOSED": whole[1],
        "A_VECTOR": _vector(a),
        "B_VECTOR": _vector(b),
    }
    kernel = _small_kernel(tuple(f"-D{k}={v}" for k, v in sizes.items()))
    n = out.size // (rows * columns)
    steps = [np.int64(_step(x) or 0) for x in (a, b)]
    kernel((-(-n // products),), (SMALL_THREADS,), (a, b, out, np.int64(n), *steps))
    return True


@cache
def _small_kernel(options: tuple[str, ...]) -> Any:
    # To read the source and ask for the GPU at each launch would take longer than the launch.
    return load_kernel("matmul_small", options=options)


def _block(x: Array) -> int | None:
    """Return whether the matrices of a stack lie column by column, if each is without gaps."""
    layout = _layout(x)
    if layout is None or _step(x) is None:
        return None
    turned, row = layout
    return turned if row == x.shape[-2 if turned else -1] else None


def _vector(x: Array) -> int:
    """Return how many elements one load of 16 bytes may fetch, if alignment allows it, or 1."""
    width = 16 // int(x.itemsize)
    fits = x.data.ptr % 16 == 0 and _area(x) % width == 0 and (_step(x) or 0) % width == 0
    return width if fits else 1
