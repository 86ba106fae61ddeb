"""What cuBLAS is told, tested without a GPU: a stand-in multiplies what the addresses show."""

from __future__ import annotations

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuml import matmul as products
from gpuml.devices import array_module

F32, F64, F16 = 0, 1, 2
NUMBERS = {F32: np.float32, F64: np.float64, F16: np.float16}


class Array:
    """An array of the simulated library; its memory is NumPy's."""

    def __init__(self, host):
        self.host = host
        address = host.__array_interface__["data"][0]
        self.data = SimpleNamespace(ptr=address, device_id=0)
        self.device = SimpleNamespace(id=0)
        for name in ("shape", "strides", "dtype", "itemsize", "ndim", "size", "flags"):
            setattr(self, name, getattr(host, name))

    def __len__(self):
        return len(self.host)

    def swapaxes(self, i, j):
        return Array(self.host.swapaxes(i, j))

    def reshape(self, *shape):
        return Array(self.host.reshape(*shape))

    def __getitem__(self, part):
        return Array(self.host[part])

    def __setitem__(self, part, values):
        self.host[part] = values.host if isinstance(values, Array) else values


def memory(address, dtype, n):
    """Return n numbers at an address."""
    raw = (ctypes.c_char * (n * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, dtype)


def column_matrix(address, code, rows, columns, ld, turned):
    """Return a matrix that lies column by column, or its transposition."""
    if turned:
        rows, columns = columns, rows
    assert ld >= max(1, rows), "cuBLAS refuses lines that overlap"
    flat = memory(address, NUMBERS[code], ld * (columns - 1) + rows)
    found = np.lib.stride_tricks.as_strided(
        flat, (rows, columns), (flat.itemsize, ld * flat.itemsize), writeable=True
    )
    return found.T if turned else found


def gemm(
    handle, turn_a, turn_b, m, n, k, alpha, a, a_code, lda, a_step, b, b_code, ldb, b_step,
    beta, c, c_code, ldc, c_step, count, compute, algorithm,
):  # fmt: skip
    """cublasGemmStridedBatchedEx, slowly."""
    kind = np.float64 if compute == 70 else np.float32
    alpha, beta = (float(memory(p, kind, 1)[0]) for p in (alpha, beta))
    for i in range(count):
        x, y = (
            column_matrix(p + i * step * np.dtype(NUMBERS[code]).itemsize, code, *shape, ld, turn)
            for p, step, code, shape, ld, turn in (
                (a, a_step, a_code, (m, k), lda, turn_a),
                (b, b_step, b_code, (k, n), ldb, turn_b),
            )
        )
        place = c + i * c_step * np.dtype(NUMBERS[c_code]).itemsize
        z = column_matrix(place, c_code, m, n, ldc, 0)
        before = beta * z if beta else 0
        z[...] = alpha * (x.astype(float) @ y.astype(float)) + before


def gemm_of_one(
    handle, turn_a, turn_b, m, n, k, alpha, a, a_code, lda, b, b_code, ldb, beta, c, c_code, ldc,
    compute, algorithm,
):  # fmt: skip
    """cublasGemmEx."""
    gemm(
        handle, turn_a, turn_b, m, n, k, alpha, a, a_code, lda, 0, b, b_code, ldb, 0, beta, c,
        c_code, ldc, 0, 1, compute, algorithm,
    )  # fmt: skip


def matmul_of_cupy(a, b, out=None):
    """cupy.matmul, and what it cannot do."""
    for x in (a, b) if out is None else (a, b, out):
        if any(n == 1 and step < 0 for n, step in zip(x.shape, x.strides, strict=True)):
            raise OverflowError("Python integer out of bounds for uint64")
    product = np.matmul(a.host, b.host, out=None if out is None else out.host)
    return Array(product) if out is None else out


@pytest.fixture
def simulated(monkeypatch):
    """CuPy and cuBLAS, as far as a product needs them."""
    codes = {"CUBLAS_COMPUTE_32F": 68, "CUBLAS_COMPUTE_32F_FAST_TF32": 77}
    codes |= {"CUBLAS_COMPUTE_32F_FAST_16BF": 75, "CUBLAS_COMPUTE_64F": 70}
    codes |= {"CUBLAS_GEMM_DEFAULT": -1}
    cublas = SimpleNamespace(gemmStridedBatchedEx=gemm, gemmEx=gemm_of_one, **codes)
    kinds = {"CUDA_R_16F": F16, "CUDA_R_16BF": 14, "CUDA_R_32F": F32, "CUDA_R_64F": F64}
    runtime = SimpleNamespace(is_hip=False, CUDA_C_32F=4, CUDA_C_64F=5, **kinds)
    device = SimpleNamespace(get_cublas_handle=lambda: 0)
    stream = SimpleNamespace(ptr=0)
    cuda = ModuleType("cupy.cuda")
    cuda.runtime, cuda.device = runtime, device
    cuda.get_current_stream = lambda: stream
    cupy, libs = ModuleType("cupy"), ModuleType("cupy_backends.cuda.libs")
    cupy.cuda, cupy.ndarray, libs.cublas = cuda, Array, cublas
    cupy.empty = lambda shape, dtype: Array(np.full(shape, np.nan, dtype))
    cupy.ascontiguousarray = lambda a: Array(np.ascontiguousarray(a.host))
    cupy.broadcast_to = lambda a, shape: Array(np.broadcast_to(a.host, shape))
    cupy.matmul = matmul_of_cupy
    names = ("cupy_backends", "cupy_backends.cuda")
    for name, module in {"cupy": cupy, "cupy.cuda": cuda, libs.__name__: libs}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(products, "_multiply_small", lambda *_: False)
    kept = products._cublas_types, products._arguments
    for cache in kept:
        cache.cache_clear()
    yield cupy
    for cache in kept:
        cache.cache_clear()


def some(rng, shape, layout, dtype):
    """Return an array of a shape, lying in memory in one of several ways."""
    *stack, rows, columns = shape
    if layout == "rows":
        return rng.normal(size=shape).astype(dtype)
    if layout == "columns":
        return rng.normal(size=(*stack, columns, rows)).astype(dtype).swapaxes(-1, -2)
    if layout == "part":
        return rng.normal(size=(*stack, rows + 2, columns + 3)).astype(dtype)[..., 1:-1, 2:-1]
    return rng.normal(size=(*stack, 2 * rows, 2 * columns)).astype(dtype)[..., ::2, ::2]


LAYOUTS = st.sampled_from(["rows", "columns", "part", "apart"])


@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    k=st.integers(1, 7),
    stack=st.sampled_from([(), (3,), (2, 3)]),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    shared=st.booleans(),
    given_out=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 999),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_products_are_right(simulated, m, n, k, stack, layouts, shared, given_out, dtype, seed):
    rng = np.random.default_rng(seed)
    a = Array(some(rng, (*stack, m, k), layouts[0], dtype))
    b = Array(some(rng, ((() if shared else stack) + (k, n)), layouts[1], dtype))
    out = Array(some(rng, (*stack, m, n), layouts[2], dtype)) if given_out else None
    assert array_module(a, b) is simulated
    result = products.matmul(a, b, out)
    assert out is None or result is out
    np.testing.assert_allclose(result.host, a.host @ b.host, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("a", "b", "c"), [(F64, F64, F32), (F64, F32, F64), (F32, F32, F64)])
def test_types_that_cublas_does_not_mix_are_converted(simulated, rng, a, b, c):
    x, y = (Array(rng.normal(size=(4, 4)).astype(NUMBERS[code])) for code in (a, b))
    out = Array(np.full((4, 4), np.nan, NUMBERS[c]))
    if a != b:
        out = None
    result = products.matmul(x, y, out)
    np.testing.assert_allclose(result.host, x.host @ y.host, rtol=1e-5)
    assert out is None or result is out


def test_short_numbers_are_summed_in_float32(simulated, rng):
    x, y = (Array(rng.normal(size=(4, 4)).astype(np.float16)) for _ in range(2))
    out = Array(np.empty((4, 4), np.float32))
    products.matmul(x, y, out)
    exact = x.host.astype(float) @ y.host.astype(float)
    np.testing.assert_allclose(out.host, exact, rtol=1e-6, atol=1e-6)


def test_the_precision_is_passed_on_for_one_call(simulated, rng, monkeypatch):
    told = []
    cublas = sys.modules["cupy_backends.cuda.libs"].cublas
    for name, function in (("gemmEx", gemm_of_one), ("gemmStridedBatchedEx", gemm)):
        monkeypatch.setattr(cublas, name, lambda *a, f=function: told.append(a[-2]) or f(*a))
    for shape in ((4, 4), (2, 4, 4)):
        x = Array(rng.normal(size=shape).astype(np.float32))
        for precision in ("tf32", "bfloat16", "float32", None):
            products.matmul(x, x, precision=precision)
    assert told == [77, 75, 68, 68] * 2
    half = Array(rng.normal(size=(4, 4)).astype(np.float16))
    for precision in ("bfloat16", None):
        products.matmul(half, half, precision=precision)
    assert told[8:] == [68, 68], "cuBLAS has tf32 and bfloat16 ways for float32 alone"


def test_inside_a_capture_the_other_library_is_called(simulated, rng, monkeypatch):
    told = []
    captured = SimpleNamespace(number=7, multiply=lambda *a: told.append(a[0]) or gemm(*a))
    monkeypatch.setitem(products._CAPTURED, 0, captured)
    x = Array(rng.normal(size=(4, 4)).astype(np.float32))
    np.testing.assert_allclose(products.matmul(x, x).host, x.host @ x.host, rtol=1e-5)
    assert told == [7]


@pytest.mark.parametrize("backwards", ["a", "b", "out"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_stacks_of_one_that_run_backwards(simulated, rng, dtype, backwards):
    shapes = {"a": (1, 3, 1, 4, 5), "b": (1, 1, 2, 5, 3), "out": (1, 3, 2, 4, 3)}
    arrays = {name: Array(rng.integers(9, size=s).astype(dtype)) for name, s in shapes.items()}
    arrays[backwards] = x = arrays[backwards][::-1]
    assert x.strides[0] < 0
    assert np.shares_memory(products._forwards(x).host, x.host), "nothing is copied"
    assert products.matmul(**arrays) is arrays["out"]
    np.testing.assert_array_equal(arrays["out"].host, arrays["a"].host @ arrays["b"].host)


@pytest.mark.parametrize(
    ("a", "b", "asked"),
    [
        ((256, 4, 4), (4, 4), True),
        ((256, 32, 32), (1, 32, 32), True),
        ((2, 128, 5, 7), (7, 9), True),
        ((255, 8, 8), (8, 8), False),
        ((256, 3, 8), (8, 8), False),
        ((256, 8, 33), (33, 8), False),
        ((256, 8, 8), (8, 33), False),
        ((256, 33, 8), (8, 8), False),
        ((256, 3, 8), (256, 8, 8), True),
        ((255, 8, 8), (255, 8, 8), False),
    ],
)
@pytest.mark.parametrize("can", [True, False])
def test_many_small_products_go_to_our_own_kernel_first(
    simulated, rng, monkeypatch, a, b, asked, can
):
    """Those that share a matrix, too; else they are one tall product."""
    given, counts = [], []

    def small(x, y, out):
        given.append((x.shape, y.shape))
        if can:
            out.host[...] = x.host @ y.host
        return can

    cublas = sys.modules["cupy_backends.cuda.libs"].cublas
    monkeypatch.setattr(products, "_multiply_small", small)
    monkeypatch.setattr(
        cublas, "gemmStridedBatchedEx", lambda *all: counts.append(all[-3]) or gemm(*all)
    )
    monkeypatch.setattr(cublas, "gemmEx", lambda *all: counts.append(1) or gemm_of_one(*all))
    x, y = (Array(rng.normal(size=shape).astype(np.float32)) for shape in (a, b))
    result = products.matmul(x, y)
    np.testing.assert_allclose(result.host, x.host @ y.host, rtol=1e-5, atol=1e-5)
    assert given == [(a, (*a[:-2], *b[-2:]))] * asked
    assert counts == ([] if asked and can else [a[0] if len(b) == len(a) and b[0] > 1 else 1])
