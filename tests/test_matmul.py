"""Products of stacks against exact references: shapes, strides, types, bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

import gpuml
from gpuml import matmul
from gpuml.matmul import batched_matmul, multiply_into, product_shape, split_matmul
from gpuml.memory_maps import overlap

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

REAL = ["float16", "float32", "float64"]
COMPLEX = ["complex64", "complex128"]
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = [*REAL, "bfloat16", *COMPLEX, *INTEGERS, "bool"]

SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33]  # about the edges of a kernel's tiles
MANY = matmul.FEWEST_SMALL  # products, from which a GPU may use our own kernel


def type_named(name):
    """Return an element type; bfloat16 comes from another package, which not everybody has."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def is_nvidia(device):
    return device.kind == "gpu" and not device.xp.cuda.runtime.is_hip


# --- random arrays, laid out in memory in many ways --------------------------------------------


def numbers(rng, shape, dtype):
    """Random numbers in host memory; integers over their whole range, so that sums overflow."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    if dtype.kind == "b":
        return rng.random(shape) < 0.3
    values = rng.normal(size=shape)
    return (values + 1j * rng.normal(size=shape) if dtype.kind == "c" else values).astype(dtype)


def split_shape(shape):
    return shape[:-2], shape[-2], shape[-1]


def columns(make, shape):
    stack, m, n = split_shape(shape)
    return make((*stack, m, n + 3))[..., 2 : 2 + n]


def rows(make, shape):
    stack, m, n = split_shape(shape)
    return make((*stack, m + 2, n))[..., 1 : 1 + m, :]


def stepped(make, shape):
    stack, m, n = split_shape(shape)
    return make((*stack, 2 * m, 3 * n))[..., ::2, ::3]


def transposed(make, shape):
    stack, m, n = split_shape(shape)
    return make((*stack, n, m)).swapaxes(-1, -2)


def transposed_columns(make, shape):
    stack, m, n = split_shape(shape)
    return make((*stack, n, m + 1))[..., 1:].swapaxes(-1, -2)


def interleaved(make, shape):
    """Row 0 of all matrices, then row 1 of all."""
    stack, m, n = split_shape(shape)
    x = make((m, *stack, n))
    return gpuml.array_module(x).moveaxis(x, 0, -2)


def shifted(make, shape):
    """Begin in the middle of what a GPU loads at once."""
    return make((int(np.prod(shape)) + 1,))[1:].reshape(shape)


def repeated(*axes):
    def view(make, shape):
        x = make(tuple(1 if i - len(shape) in axes else n for i, n in enumerate(shape)))
        return gpuml.array_module(x).broadcast_to(x, shape)

    return view


def one_matrix(make, shape):
    x = make(shape[-2:])
    return gpuml.array_module(x).broadcast_to(x, shape)


VIEWS = {
    "contiguous": lambda make, shape: make(shape),
    "columns": columns,
    "rows": rows,
    "stepped": stepped,
    "reversed": lambda make, shape: make(shape)[..., ::-1, ::-1],
    "transposed": transposed,
    "transposed columns": transposed_columns,
    "Fortran": lambda make, shape: make(shape[::-1]).T,
    "interleaved": interleaved,
    "reversed stack": lambda make, shape: make(shape)[::-1],
    "stepped stack": lambda make, shape: make((2 * shape[0], *shape[1:]))[::2],
    "shifted": shifted,
    "one row": repeated(-2),
    "one column": repeated(-1),
    "one matrix": one_matrix,
}
WRITABLE = [name for name in VIEWS if not name.startswith("one")]


def laid_out(device, rng, view, shape, dtype):
    """Random numbers on a device, of a shape, in one of the ways above."""
    x = VIEWS[view](lambda shape: device.asarray(numbers(rng, shape, dtype)), tuple(shape))
    assert x.shape == tuple(shape), view
    assert x.dtype == dtype
    return x


# --- references --------------------------------------------------------------------------------


def exact(a, b):
    """Return the product, exact for integers, and for others with more digits than asked for."""
    dtype = np.result_type(a.dtype, b.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    if dtype.kind == "b":
        return (a.astype(int) @ b.astype(int)) > 0
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        whole = (a.astype(object) @ b.astype(object)).astype(object)
        return ((whole - info.min) % 2**info.bits + info.min).astype(dtype)
    wide = {"d": np.longdouble, "F": np.complex128, "D": np.clongdouble}.get(dtype.char, float)
    return a.astype(wide) @ b.astype(wide)


def rounding(dtype):
    """Return the relative and the smallest absolute step of a type of floating-point numbers."""
    if dtype.name == "bfloat16":
        return 2.0**-7, 2.0**-133
    return float(np.finfo(dtype).eps), float(np.finfo(dtype).smallest_subnormal)


def allowed(a, b, dtype):
    """Return how far each element of a product may be off.

    A sum of K products is off by at most about K roundings of the sum of their magnitudes, with
    half of eps for each; a complex product has four real ones. Types of two bytes are summed in
    float32 and rounded once more.
    """
    small = dtype.itemsize == 2
    eps, _ = rounding(np.dtype("float32") if small else dtype)
    wide = complex if dtype.kind == "c" else float
    magnitude = np.abs(a.astype(wide)) @ np.abs(b.astype(wide))
    bound = (4 if dtype.kind == "c" else 1) * (a.shape[-1] + 2) * eps * magnitude
    if small:
        eps, step = rounding(dtype)
        bound = bound + eps * magnitude + step
    return bound


def assert_right(c, a, b):
    """Compare a product, on any device, with the reference."""
    c, a, b = (gpuml.to_host(x) for x in (c, a, b))
    reference = exact(a, b)
    dtype = np.result_type(a.dtype, b.dtype).newbyteorder("=")
    assert c.dtype == dtype
    assert c.shape == reference.shape
    if dtype.kind in "biu":
        np.testing.assert_array_equal(c, reference)
        return
    wide = reference.dtype
    error = np.abs(c.astype(wide) - reference)
    assert (error <= allowed(a, b, dtype)).all(), f"off by {error.max():.1e}"  # False for NaN


# --- right results -----------------------------------------------------------------------------

STACKS = mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3)
SIZE, VIEW, SEED = st.sampled_from(SIZES), st.sampled_from(list(VIEWS)), st.integers(0, 2**16)


@pytest.mark.parametrize("name", DTYPES)
@given(stacks=STACKS, m=SIZE, k=SIZE, n=SIZE, a_view=VIEW, b_view=VIEW, seed=SEED)
@quick
def test_products_agree_with_the_reference(device, name, stacks, m, k, n, a_view, b_view, seed):
    dtype, rng = type_named(name), np.random.default_rng(seed)
    a_stack, b_stack = stacks.input_shapes
    a = laid_out(device, rng, a_view, (*a_stack, m, k), dtype)
    b = laid_out(device, rng, b_view, (*b_stack, k, n), dtype)
    c = batched_matmul(a, b)
    assert gpuml.device_of(c) == device
    assert c.shape == product_shape(a.shape, b.shape)
    assert_right(c, a, b)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "complex128", "int16"])
@pytest.mark.parametrize(
    ("a_stack", "b_stack"),
    [
        ((5, 1), (1, 7)),
        ((1, 7), (5, 1)),
        ((5, 1), (7,)),
        ((3, 1, 4), (2, 1)),
        ((2, 3), (1, 1)),
        ((1, 1), (2, 3)),
        ((6,), ()),
        ((), (6,)),
        ((1, 1, 1), (1,)),
    ],
)
def test_leading_axes_broadcast_as_in_numpy(device, rng, name, a_stack, b_stack):
    dtype = type_named(name)
    for k in (3, 8, 40):  # odd sizes put matrices of two-byte numbers at odd places
        a = device.asarray(numbers(rng, (*a_stack, 5, k), dtype))
        b = device.asarray(numbers(rng, (*b_stack, k, 7), dtype))
        assert_right(batched_matmul(a, b), a, b)


@pytest.mark.parametrize("a_view", VIEWS)
@pytest.mark.parametrize("b_view", VIEWS)
def test_each_layout_meets_each(device, rng, a_view, b_view):
    a = laid_out(device, rng, a_view, (3, 6, 5), np.dtype("float32"))
    b = laid_out(device, rng, b_view, (3, 5, 4), np.dtype("float32"))
    assert_right(batched_matmul(a, b), a, b)
    assert_right(batched_matmul(a, b, precision="float32"), a, b)


MIXED = [
    ("float16", "float32"),
    ("bfloat16", "float32"),
    ("int8", "bfloat16"),
    ("float32", "float64"),
    ("float32", "int32"),
    ("int64", "float32"),
    ("int8", "float16"),
    ("bool", "float32"),
    ("complex64", "float64"),
    ("complex64", "float32"),
    ("int8", "uint8"),
    ("int64", "uint64"),
    ("bool", "int8"),
    ("uint32", "int16"),
]


@pytest.mark.parametrize(("a_name", "b_name"), MIXED)
def test_mixed_types_are_promoted_as_in_numpy(device, rng, a_name, b_name):
    a_type, b_type = type_named(a_name), type_named(b_name)
    for n in (3, MANY):
        a = device.asarray(numbers(rng, (n, 4, 6), a_type))
        b = device.asarray(numbers(rng, (n, 6, 5), b_type))
        assert_right(batched_matmul(a, b), a, b)
        assert_right(batched_matmul(b.swapaxes(-1, -2), a.swapaxes(-1, -2)), *turned(a, b))


def turned(a, b):
    return b.swapaxes(-1, -2), a.swapaxes(-1, -2)


def test_types_without_a_common_one_are_refused(device):
    a, b = (device.asarray(np.ones((2, 2), type_named(name))) for name in ("float16", "bfloat16"))
    with pytest.raises(TypeError, match="could not be promoted"):
        batched_matmul(a, b)


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "complex128", "int32", "uint16"])
def test_byte_swapped_arrays_give_the_right_result(rng, name):
    dtype = np.dtype(name)
    a, b = numbers(rng, (3, 4, 6), dtype), numbers(rng, (6, 5), dtype)
    swapped = dtype.newbyteorder("S")
    for x, y in [
        (a.astype(swapped), b),
        (a, b.astype(swapped)),
        (*(v.astype(swapped) for v in (a, b)),),
    ]:
        assert_right(batched_matmul(x, y), a, b)


def test_arrays_off_their_alignment_and_read_only_ones_give_the_right_result(rng):
    a = np.frombuffer(b"-" + rng.normal(size=(4, 3)).tobytes(), offset=1).reshape(4, 3)
    assert not a.flags.aligned
    assert not a.flags.writeable
    assert_right(batched_matmul(a, a.T), a, a.T)


def test_columns_of_a_table_of_other_types_give_the_right_result(rng):
    """Their elements are no whole number of elements apart."""
    for stack in ((), (5,)):
        table = np.zeros((*stack, 6, 4), [("x", "f4"), ("label", "i2")])
        table["x"] = rng.normal(size=table.shape)
        a, b = table["x"], table["x"].swapaxes(-1, -2)
        assert a.strides[-1] == 6
        assert matmul._layout(a) is None
        assert matmul._layout(b) is None
        assert_right(batched_matmul(a, b), np.ascontiguousarray(a), np.ascontiguousarray(b))
    assert matmul._step(np.zeros((5, 1, 1), [("x", "c8"), ("label", "f4")])["x"]) is None


def test_memory_maps_are_multiplied(rng, tmp_path):
    a = np.memmap(tmp_path / "a", dtype=np.float32, mode="w+", shape=(2, 4, 3))
    a[...] = rng.normal(size=a.shape)
    out = np.memmap(tmp_path / "out", dtype=np.float32, mode="w+", shape=(2, 4, 4))
    assert batched_matmul(a, a.swapaxes(1, 2), out=out) is out
    assert_right(out, a, a.swapaxes(1, 2))


# --- many small products: on a GPU by a kernel of our own --------------------------------------

WIDTH = st.integers(1, matmul.SMALL + 1)


@given(m=WIDTH, k=WIDTH, n=WIDTH, a_view=VIEW, b_view=VIEW, seed=SEED,
       name=st.sampled_from(["float32", "float64"]), more=st.integers(0, 200))  # fmt: skip
@example(m=32, k=32, n=32, a_view="transposed", b_view="shifted", seed=0, name="float64", more=1)
@example(m=1, k=32, n=4, a_view="contiguous", b_view="contiguous", seed=0, name="float64", more=1)
@example(m=1, k=1, n=1, a_view="contiguous", b_view="contiguous", seed=0, name="float32", more=0)
@example(m=1, k=32, n=1, a_view="transposed", b_view="transposed", seed=0, name="float32", more=0)
@example(m=1, k=22, n=3, a_view="contiguous", b_view="contiguous", seed=0, name="float32", more=9)
@settings(parent=quick, max_examples=50)
def test_many_small_products_of_any_layout(device, m, k, n, a_view, b_view, seed, name, more):
    dtype, rng = np.dtype(name), np.random.default_rng(seed)
    a = laid_out(device, rng, a_view, (MANY + more, m, k), dtype)
    b = laid_out(device, rng, b_view, (MANY + more, k, n), dtype)
    assert_right(into_borders(device, a, b), a, b)


def into_borders(device, a, b, border=32, **options):
    """Multiply into the middle of a longer array, of which the rest must stay as it was."""
    shape, dtype = product_shape(a.shape, b.shape), np.result_type(a.dtype, b.dtype)
    size = int(np.prod(shape))
    whole = device.asarray(np.full(size + 2 * border, 7, dtype))
    out = whole[border : border + size].reshape(shape)
    out[...] = np.nan if dtype.kind in "fc" else 3  # what was there before must not count
    assert batched_matmul(a, b, out=out, **options) is out
    host = gpuml.to_host(whole)
    assert (host[:border] == 7).all()
    assert (host[border + size :] == 7).all()
    return out


@pytest.mark.parametrize("k", [4, 8, 12, 16, 17, 24, 31, 32, 33])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_many_small_products_of_each_size(device, rng, k, name):
    a, b = (device.asarray(numbers(rng, (1001, k, k), np.dtype(name))) for _ in range(2))
    assert_right(into_borders(device, a, b), a, b)
    assert_right(into_borders(device, a, b, border=33), a, b)  # out is not aligned
    assert_right(into_borders(device, a, b.swapaxes(-1, -2)), a, b.swapaxes(-1, -2))


@pytest.mark.parametrize("k", [1, 3, 8, 16, 31])
@pytest.mark.parametrize("shared", ["a", "b", "both", "broadcast a", "broadcast b"])
def test_many_small_products_with_a_shared_operand(device, rng, k, shared):
    xp, dtype = device.xp, np.dtype("float32")
    many = device.asarray(numbers(rng, (MANY, k + 1, k + 1), dtype))
    one = device.asarray(numbers(rng, (k + 1, k + 1), dtype))
    alike = xp.broadcast_to(one, many.shape)
    pairs = {
        "a": (one, many),
        "b": (many, one),
        "both": (alike, alike),
        "broadcast a": (alike, many),
        "broadcast b": (many, alike),
    }
    a, b = pairs[shared]
    assert_right(into_borders(device, a, b), a, b)


@pytest.mark.parametrize(
    ("shape", "name", "a_view", "b_view", "ours"),
    [
        ((MANY, 8, 8), "float32", "contiguous", "contiguous", True),
        ((MANY, 8, 8), "float64", "transposed", "contiguous", True),
        ((MANY // 2, 2, 8, 8), "float32", "shifted", "contiguous", True),
        ((MANY, 32, 32), "float32", "one matrix", "contiguous", True),
        ((MANY, 3, 8), "float32", "contiguous", "contiguous", True),
        ((MANY - 1, 8, 8), "float32", "contiguous", "contiguous", False),
        ((MANY, 33, 33), "float32", "contiguous", "contiguous", False),
        ((MANY, 8, 8), "float32", "columns", "contiguous", False),
        ((MANY, 8, 8), "float16", "contiguous", "contiguous", False),
        ((MANY, 8, 8), "complex64", "contiguous", "contiguous", False),
        ((MANY, 4, 4), "float32", "contiguous", "shared", True),
        ((MANY, 32, 32), "float32", "contiguous", "shared", True),
        ((MANY, 17, 5), "float64", "transposed", "shared", True),
        ((MANY // 2, 2, 8, 8), "float32", "contiguous", "shared", True),
        ((MANY, 3, 8), "float32", "contiguous", "shared", False),
        ((MANY - 1, 8, 8), "float32", "contiguous", "shared", False),
        ((MANY, 8, 33), "float32", "contiguous", "shared", False),
        ((MANY, 8, 8), "float16", "contiguous", "shared", False),
        ((MANY, 8, 8), "float32", "columns", "shared", False),
    ],
)
def test_which_products_go_to_our_own_kernel(
    device, rng, monkeypatch, shape, name, a_view, b_view, ours
):
    if not is_nvidia(device):
        pytest.skip("the kernel runs on an NVIDIA GPU only")
    taken = []
    inner = matmul._multiply_small
    monkeypatch.setattr(matmul, "_multiply_small", lambda *x: taken.append(inner(*x)) or taken[-1])
    k, dtype = shape[-1], np.dtype(name)
    a = laid_out(device, rng, a_view, shape, dtype)
    b = device.asarray(numbers(rng, (k, k) if b_view == "shared" else (*shape[:-2], k, k), dtype))
    assert_right(batched_matmul(a, b), a, b)
    assert (taken == [True]) == ours


@pytest.mark.parametrize("name", ["float32", "complex64", "int16", "int64", "bool"])
@pytest.mark.parametrize("backwards", ["a", "b", "out"])
def test_stacks_of_one_that_run_backwards(device, rng, name, backwards):
    """Which says nothing, and yet CuPy stumbles over it."""
    dtype = np.dtype(name)
    shapes = {"a": (1, 3, 1, 4, 5), "b": (1, 1, 2, 5, 3), "out": (1, 3, 2, 4, 3)}
    arrays = {key: device.asarray(numbers(rng, shape, dtype)) for key, shape in shapes.items()}
    arrays[backwards] = arrays[backwards][::-1]
    assert arrays[backwards].strides[0] < 0
    for product in (batched_matmul, matmul.matmul):
        arrays["out"][...] = 0
        assert product(**arrays) is arrays["out"]
        assert_right(arrays["out"], arrays["a"], arrays["b"])


# --- nothing is copied that need not be --------------------------------------------------------


def allocated(device, function):
    """Return the bytes of arrays that a function takes, at most at once (on a GPU: in all)."""
    function()  # what is taken only once does not count
    if device.kind == "cpu":
        tracemalloc.start()
        function()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    class Sum(device.xp.cuda.MemoryHook):
        name = "Sum"
        n_bytes = 0

        def malloc_preprocess(self, **about):
            self.n_bytes += about["size"]

    with Sum() as total:
        function()
    return total.n_bytes


@pytest.mark.parametrize("k", [24, 60])
@pytest.mark.parametrize(
    "view",
    ["contiguous", "transposed", "columns", "rows", "one matrix", "stepped stack", "shifted"],
)
def test_views_are_multiplied_without_copies(device, rng, view, k):
    shape, dtype = (300, k, k), np.dtype("float32")
    b = laid_out(device, rng, view, shape, dtype)
    a, out = (device.asarray(numbers(rng, shape, dtype)) for _ in range(2))
    for x, y in ((a, b), (b, a)):
        taken = allocated(device, lambda x=x, y=y: batched_matmul(x, y, out=out))
        assert taken < out.nbytes / 20, (view, taken)
        assert_right(out, x, y)


def test_broadcasting_along_two_axes_does_not_repeat_the_operands(device, rng):
    a = device.asarray(numbers(rng, (40, 1, 40, 40), np.dtype("float32")))
    b = device.asarray(numbers(rng, (1, 30, 40, 4), np.dtype("float32")))
    out = device.asarray(np.zeros((40, 30, 40, 4), np.float32))
    taken = allocated(device, lambda: batched_matmul(a, b, out=out))
    assert taken < a.nbytes, "a would be repeated 30 times"
    assert_right(out, a, b)


def test_a_shared_operand_that_must_be_copied_is_copied_once(device, rng):
    a = laid_out(device, rng, "stepped", (40, 40), np.dtype("float32"))
    b = device.asarray(numbers(rng, (300, 40, 4), np.dtype("float32")))
    out = device.asarray(np.zeros((300, 40, 4), np.float32))
    taken = allocated(device, lambda: batched_matmul(a, b, out=out))
    assert taken < 10 * a.nbytes
    assert_right(out, a, b)


def test_products_with_one_shared_right_operand_are_one_tall_product(device, monkeypatch):
    xp = device.xp
    for stack in ((), (6,), (2, 3), (1, 6)):
        a = xp.ones((*stack, 4, 3))
        for b in (xp.ones((3, 2)), xp.ones((1, 3, 2)), xp.ones((2, 3)).T):
            out = xp.ones(product_shape(a.shape, b.shape))
            x, y, c = matmul._as_one(a, b, out)
            assert (x.ndim, y.ndim, c.ndim) == (2, 2, 2)
            assert bool(xp.shares_memory(c, out))
    monkeypatch.setattr(matmul, "MOST_ROWS", 24)
    for n, n_axes in ((6, 2), (7, 3)):  # of 4 rows each
        a, out = xp.ones((n, 4, 3)), xp.ones((n, 4, 2))
        assert matmul._as_one(a, xp.ones((3, 2)), out)[0].ndim == n_axes
    rows = xp.ones((6, 6, 3))[:, 1:5]  # with gaps between the matrices
    assert matmul._as_one(rows, xp.ones((3, 2)), xp.ones((6, 4, 2)))[0] is rows
    a, b = xp.ones((6, 4, 3)), xp.ones((6, 3, 2))
    assert matmul._as_one(a, b, xp.ones((6, 4, 2)))[1] is b


# --- NaN, infinity, overflow -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("n", [1, 3, MANY + 1])
def test_nan_and_infinity_pass_through_as_in_numpy(device, rng, name, n):
    dtype = type_named(name)
    a, b = (numbers(rng, (n, 7, 7), dtype) for _ in range(2))
    a[0, 0, 1], a[0, 2, 3], a[-1, 4, 6], b[-1, 0, 5], b[0, 0, 0] = (
        np.nan,
        np.inf,
        -np.inf,
        np.inf,
        0,
    )
    b[0, 3, 2] = 0  # infinity times zero is NaN
    with np.errstate(invalid="ignore"):
        wanted = a.astype(float) @ b.astype(float)
        c = gpuml.to_host(batched_matmul(device.asarray(a), device.asarray(b))).astype(float)
    assert np.isnan(wanted).any()
    assert np.isinf(wanted).any()
    np.testing.assert_array_equal(np.isnan(c), np.isnan(wanted))
    np.testing.assert_array_equal(
        np.where(np.isinf(c), c, 0), np.where(np.isinf(wanted), wanted, 0)
    )
    finite = np.isfinite(wanted)
    sizes = (
        np.where(np.isfinite(a.astype(float)), a, 0),
        np.where(np.isfinite(b.astype(float)), b, 0),
    )
    error = np.abs(c[finite] - wanted[finite])
    assert (error <= allowed(*sizes, dtype)[finite]).all()


def test_a_float16_sum_may_pass_through_numbers_that_float16_cannot_hold(device):
    a = device.asarray(np.array([[60000, 60000, -60000]], np.float16))
    c = batched_matmul(a, device.asarray(np.ones((3, 1), np.float16)))
    assert gpuml.to_host(c).item() == 60000
    with np.errstate(over="ignore"):
        c = batched_matmul(a[:, :2], device.asarray(np.ones((2, 1), np.float16)))
    assert gpuml.to_host(c).item() == np.inf


@pytest.mark.parametrize(
    ("name", "x", "wanted"),
    [
        ("int8", 100, 32),
        ("uint8", 200, 128),
        ("int16", 300, -16608),
        ("int64", 2**62, 0),
        ("bool", 1, 1),
    ],
)
def test_integers_wrap_around_as_in_numpy(device, name, x, wanted):
    a = np.array([[x, x]], name)
    c = batched_matmul(device.asarray(a), device.asarray(a.T))
    assert int(gpuml.to_host(c).item()) == wanted == int((a @ a.T).item())
    assert c.dtype == np.dtype(name)


# --- zero sizes and no operands ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "float32", "complex64", "int32", "bool"])
def test_sums_of_nothing_are_zero(device, name):
    for stack in ((), (3,), (MANY,), (2, 1, 3)):
        a, b = (device.asarray(np.zeros(s, name)) for s in ((*stack, 2, 0), (*stack, 0, 5)))
        out = device.asarray(np.ones((*stack, 2, 5), name))
        assert batched_matmul(a, b, out=out) is out
        assert not gpuml.to_host(out).any()
        assert not gpuml.to_host(batched_matmul(a, b)).any()


@pytest.mark.parametrize("shapes", [((0, 3), (3, 2)), ((2, 3), (3, 0)), ((0, 2, 3), (3, 2))])
def test_products_without_elements_have_their_shape(device, shapes):
    a, b = (device.asarray(np.ones(shape, np.float32)) for shape in shapes)
    c = batched_matmul(a, b, precision="tf32")
    assert c.shape == np.matmul(*(np.ones(shape) for shape in shapes)).shape
    assert c.dtype == np.float32


# --- out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", WRITABLE)
@pytest.mark.parametrize("name", ["float16", "float32", "complex128", "int8"])
@pytest.mark.parametrize(
    "stacks", [((), ()), ((6,), ()), ((2, 3), (3,)), ((5, 1), (1, 7)), ((MANY,), (MANY,))]
)
def test_out_may_be_a_view_and_nothing_around_it_is_touched(device, rng, view, name, stacks):
    dtype = np.dtype(name)
    a = device.asarray(numbers(rng, (*stacks[0], 4, 6), dtype))
    b = device.asarray(numbers(rng, (*stacks[1], 6, 8), dtype))
    wholes = []

    def make(shape):
        wholes.append(device.asarray(np.full(shape, 7, dtype)))
        return wholes[-1]

    out = VIEWS[view](make, product_shape(a.shape, b.shape))
    for precision in (None, "float32") if name == "float32" else (None,):
        out[...] = 9
        assert batched_matmul(a, b, out=out, precision=precision) is out
        assert_right(out, a, b)
    out[...] = 7
    assert (gpuml.to_host(wholes[-1]) == 7).all(), "something beside out was written"


def test_an_out_that_cannot_take_the_result_is_refused(device):
    xp = device.xp
    a, b = xp.ones((3, 2, 4), xp.float32), xp.ones((4, 5), xp.float32)
    for shape in [(3, 2, 4), (2, 5), (1, 2, 5), (3, 5, 2), (3, 2, 5, 1), ()]:
        out = xp.zeros(shape, xp.float32)
        with pytest.raises(
            ValueError, match=re.escape("float32 of shape (3, 2, 5), got")
        ) as caught:
            batched_matmul(a, b, out=out)
        assert str(shape) in str(caught.value)
        assert not out.any()
    for dtype in ("float64", "float16", "int32"):
        out = xp.zeros((3, 2, 5), dtype)
        with pytest.raises(ValueError, match=f"must be float32.* got {dtype}"):
            batched_matmul(a, b, out=out)
        assert not out.any()
    with pytest.raises(TypeError, match="expected an array of NumPy or CuPy, got list"):
        batched_matmul(a, b, out=[[0.0]])


def test_an_out_that_repeats_its_elements_is_refused(device):
    xp = device.xp
    a, b = xp.ones((3, 2, 4)), xp.ones((4, 5))
    out = xp.broadcast_to(xp.zeros((2, 5)), (3, 2, 5))
    with pytest.raises(ValueError, match=r"read-only|repeats"):
        batched_matmul(a, b, out=out)
    strided = np.lib.stride_tricks.as_strided
    if device.kind == "cpu":
        out = strided(np.zeros((2, 5)), (3, 2, 5), (0, 40, 8), writeable=True)
        with pytest.raises(ValueError, match="repeats"):
            batched_matmul(a, b, out=out)


def test_an_out_that_is_read_only_or_byte_swapped_is_refused():
    a, out = np.ones((2, 3)), np.zeros((2, 2))
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out is read-only: .* mmap_mode='r\+'"):
        batched_matmul(a, a.T, out=out)
    assert not out.any()
    with pytest.raises(ValueError, match="out must be float64"):
        batched_matmul(a, a.T, out=np.zeros((2, 2), np.dtype(float).newbyteorder("S")))


def test_an_out_that_overlaps_an_operand_is_refused(device):
    xp = device.xp
    whole = device.asarray(np.arange(60.0).reshape(3, 20))
    a, other = whole[:, :3], xp.ones((3, 3))
    before = gpuml.to_host(whole)
    for out in (a, a.T, a[::-1], whole[:, 2:5]):
        for operands, name in (((a, other), "a"), ((other, a), "b")):
            with pytest.raises(ValueError, match=f"out overlaps {name}: .* such as np.empty_like"):
                batched_matmul(*operands, out=out)
    np.testing.assert_array_equal(gpuml.to_host(whole), before)
    stack = xp.ones((4, 3, 3))
    with pytest.raises(ValueError, match="overlaps"):
        batched_matmul(stack[1:], other, out=stack[:3])
    assert_right(batched_matmul(stack[2:], other, out=stack[:2]), stack[2:], other)  # side by side


@pytest.mark.parametrize("part", [np.s_[:, 3:6], np.s_[:, 17:], np.s_[:, 4:10:2], np.s_[:, :2:-1]])
def test_out_may_be_other_columns_of_the_same_memory(device, part):
    whole = device.asarray(np.arange(60.0).reshape(3, 20))
    a, out = device.asarray(np.arange(9.0).reshape(3, 3)), whole[part][:, :3]
    expected = whole[:, :3] @ a
    np.testing.assert_array_equal(
        gpuml.to_host(batched_matmul(whole[:, :3], a, out=out)), gpuml.to_host(expected)
    )


def test_arrays_of_a_gpu_are_compared_by_their_addresses():
    def there(first, shape, strides):
        return SimpleNamespace(
            data=SimpleNamespace(ptr=2**46 + first), shape=shape, strides=strides, itemsize=8
        )

    a = there(0, (3, 3), (160, 8))
    for first, strides, expected in (
        (0, (160, 8), True),
        (16, (160, 8), True),
        (24, (160, 8), False),  # the columns beside
        (320, (8, 160), True),
        (480, (160, 8), False),
    ):
        b = there(first, (3, 3), strides)
        assert overlap(matmul._place(a), matmul._place(b)) is expected, first


def test_one_file_mapped_twice_overlaps(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(9.0).reshape(3, 3))
    a, out = (np.load(tmp_path / "x.npy", mmap_mode="r+") for _ in range(2))
    with pytest.raises(ValueError, match="out overlaps b"):
        batched_matmul(np.eye(3), a, out=out)
    np.testing.assert_array_equal(out, np.arange(9.0).reshape(3, 3))
    assert_right(batched_matmul(a, np.eye(3)), np.asarray(a), np.eye(3))


def test_a_mapped_file_that_was_cut_off_is_refused(tmp_path):
    for cut in ("a", "b", "out"):
        arrays = {}
        for name in ("a", "b", "out"):
            np.save(tmp_path / f"{name}.npy", np.ones((100, 100)))
            arrays[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r+")
        os.truncate(tmp_path / f"{cut}.npy", 80_000)
        with pytest.raises(gpuml.DataError, match=f"the file of {cut}, .* was cut off"):
            batched_matmul(**arrays)


# --- errors ------------------------------------------------------------------------------------


class FakeArray:
    """Passes for an array of CuPy's where only its place counts."""

    def __init__(self, index):
        self.device = type("Place", (), {"id": index})()
        self.data = type("Memory", (), {"device_id": index})()


def test_mixed_host_and_device_arrays_are_a_type_error(monkeypatch):
    module = type(sys)("cupy")
    module.ndarray, module.__spec__ = FakeArray, object()
    monkeypatch.setitem(sys.modules, "cupy", module)
    host, there = np.ones((2, 2)), FakeArray(0)
    for call in (
        lambda: batched_matmul(host, there),
        lambda: batched_matmul(there, host),
        lambda: batched_matmul(host, host, out=there),
        lambda: split_matmul(host, there, 1),
        lambda: multiply_into(host, host, there),
        lambda: multiply_into(there, host, host),
    ):
        with pytest.raises(TypeError, match=r"different devices.*asarray"):
            call()
    with pytest.raises(TypeError, match="GPU 0, GPU 1"):
        batched_matmul(FakeArray(0), FakeArray(1))


def test_host_arrays_do_not_join_those_of_the_device(device):
    if device.kind == "cpu":
        pytest.skip("there is one kind of array on the CPU")
    host, there = np.ones((2, 2)), device.asarray(np.ones((2, 2)))
    for arrays in ((host, there), (there, host)):
        with pytest.raises(TypeError, match=r"the CPU.*GPU|GPU.*the CPU"):
            batched_matmul(*arrays)
    with pytest.raises(TypeError, match="different devices"):
        batched_matmul(there, there, out=host)


@pytest.mark.parametrize(
    "dtype", [object, "U3", "S2", "V8", "datetime64[s]", "timedelta64[s]", [("x", "f4")]]
)
def test_arrays_that_hold_no_numbers_are_refused(dtype):
    a, b = np.zeros((2, 2), dtype), np.ones((2, 2))
    for operands in ((a, b), (b, a), (a, a)):
        with pytest.raises(TypeError, match="cannot multiply arrays of"):
            batched_matmul(*operands)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_types_that_sum_too_coarsely_are_refused_with_the_cure(name):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))
    a = np.ones((2, 300), dtype)
    with pytest.raises(TypeError, match=rf"arrays of {name}: .* a.astype\(np.float32\)"):
        batched_matmul(a, a.T)


def test_lists_are_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"got list: gpuml.get_device\(\).asarray\(a\)"):
        batched_matmul([[1.0]], np.ones((1, 1)))


@pytest.mark.parametrize("shapes", [((3,), (3, 2)), ((2, 3), (3,)), ((), (3, 2)), ((5,), (5,))])
def test_what_is_no_matrix_is_refused_with_the_cure(device, shapes):
    a, b = (device.xp.ones(shape) for shape in shapes)
    with pytest.raises(ValueError, match="is no matrix") as caught:
        batched_matmul(a, b)
    assert f"{shapes[0]} @ {shapes[1]}" in str(caught.value)
    if shapes == ((3,), (3, 2)):
        assert "a[None, :]" in str(caught.value)
        assert batched_matmul(a[None, :], b).shape == (1, 2)
    if shapes == ((2, 3), (3,)):
        assert "b[:, None]" in str(caught.value)
        assert batched_matmul(a, b[:, None]).shape == (2, 1)


SHAPE = st.lists(st.integers(1, 3), min_size=2, max_size=4).map(tuple)


@given(a_shape=SHAPE, b_shape=SHAPE)
@example((2, 3), (2, 3))
@example((2, 3), (4, 3))
@example((3, 2), (3, 4))
@example((2, 3), (4, 2))
@example((2, 3, 4), (3, 1, 4))
@settings(parent=quick, max_examples=300)
def test_shapes_that_do_not_fit_are_told_with_a_transposition_that_works(device, a_shape, b_shape):
    a, b = (device.asarray(np.ones(shape)) for shape in (a_shape, b_shape))
    try:
        wanted = np.matmul(np.zeros(a_shape), np.zeros(b_shape)).shape
    except ValueError:
        pass
    else:
        assert product_shape(a_shape, b_shape) == batched_matmul(a, b).shape == wanted
        return
    with pytest.raises(ValueError, match=r" @ ") as caught:
        batched_matmul(a, b)
    message = str(caught.value)
    assert f"{a_shape} @ {b_shape}" in message
    at, bt = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    if "; no transposition would" in message:
        for x, y in ((at, b), (a, bt), (at, bt), (b, a)):
            assert x.shape[-1] != y.shape[-2]
        return
    advice = re.search(r"; (.*) would$", message)
    if advice is None:
        assert "do not broadcast" in message
        return
    for product in advice.group(1).split(" or "):
        names = re.findall(r"[ab](?:\.T|\.swapaxes\(-1, -2\))?", product)
        assert " @ ".join(names) == product
        assert batched_matmul(*(eval(name, {"a": a, "b": b}) for name in names)).size > 0


# --- precision ---------------------------------------------------------------------------------


def relative_error(c, a, b):
    c, a, b = (gpuml.to_host(x).astype(float) for x in (c, a, b))
    return np.linalg.norm(c - a @ b) / np.linalg.norm(np.abs(a) @ np.abs(b))


@pytest.mark.parametrize("stacks", [((), ()), ((6,), (6,)), ((6,), ()), ((2, 1), (1, 3))])
def test_precision_holds_for_one_call(device, rng, stacks):
    a = device.asarray(rng.normal(size=(*stacks[0], 128, 256)).astype(np.float32))
    b = device.asarray(rng.normal(size=(*stacks[1], 256, 192)).astype(np.float32))
    before = gpuml.to_host(batched_matmul(a, b))
    plain = device.xp.matmul(a, b)
    coarse = {p: batched_matmul(a, b, precision=p) for p in ("float32", "tf32", "bfloat16")}
    np.testing.assert_array_equal(gpuml.to_host(batched_matmul(a, b)), before)
    np.testing.assert_array_equal(gpuml.to_host(device.xp.matmul(a, b)), gpuml.to_host(plain))
    assert_right(coarse["float32"], a, b)
    if device.kind == "cpu":
        for c in coarse.values():
            np.testing.assert_array_equal(c, before)
        return
    errors = {p: relative_error(c, a, b) for p, c in coarse.items()}
    assert errors["tf32"] < 2e-3
    assert errors["bfloat16"] < 1e-2
    if is_nvidia(device) and int(device.xp.cuda.Device().compute_capability) >= 80:
        assert errors["tf32"] > 10 * errors["float32"]


@pytest.mark.parametrize(("m", "n"), [(2052, 3084), (3084, 2052)])
def test_of_large_products_in_tf32_the_smaller_matrix_is_transposed(device, rng, monkeypatch, m, n):
    """Also where tiles of 64 reach beyond it; and not within a budget of memory."""
    made, transposed = [], matmul._transposed
    monkeypatch.setattr(matmul, "_transposed", lambda x: made.append(x.shape) or transposed(x))
    x, d = (device.asarray(rng.normal(size=(684, i)).astype(np.float32)) for i in (m, n))
    before = [gpuml.to_host(a).copy() for a in (x, d)]
    out = device.xp.full((m, n), np.nan, np.float32)
    multiply_into(x.T, d, out, precision="tf32")
    assert made == []
    out[...] = np.nan
    c = matmul.matmul(x.T, d, out, precision="tf32")
    assert c is out
    assert relative_error(c, x.T, d) < 2e-3
    assert made == ([(684, 2052)] if is_nvidia(device) else [])
    matmul.matmul(x[:600].T, d[:600], precision="tf32")  # too small to pay
    matmul.matmul(x.T, d, out, precision="float32")
    matmul.matmul(device.xp.ascontiguousarray(x.T), d, out, precision="tf32")  # fast as it is
    assert len(made) == is_nvidia(device)
    for a, unchanged in zip((x, d), before, strict=True):
        np.testing.assert_array_equal(gpuml.to_host(a), unchanged)


def test_precision_is_for_float32(device):
    xp = device.xp
    for dtype in ("float64", "float16", "int32", "complex128"):
        a = xp.ones((2, 2), dtype)
        with pytest.raises(ValueError, match=f"'tf32' is for float32, and this product is {dtype}"):
            batched_matmul(a, a, precision="tf32")
    a, b = xp.ones((2, 2), "float32"), xp.ones((2, 2), "float64")
    with pytest.raises(ValueError, match="is for float32, and this product is float64"):
        batched_matmul(a, b, precision="bfloat16")
    with pytest.raises(ValueError, match=r"'tf-32'.*did you mean 'tf32'"):
        batched_matmul(a, a, precision="tf-32")
    with pytest.raises(ValueError, match="precision"):
        next(split_matmul(b, b, 1, precision="tf32"))
    single = xp.ones((2, 2), "complex64")
    assert_right(batched_matmul(single, single, precision="float32"), single, single)


# --- split_matmul ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "complex64", "int16"])
@given(m=SIZE, k=SIZE, n=st.integers(1, 33), view=VIEW, part=st.floats(0, 1), seed=SEED)
@quick
def test_parts_side_by_side_are_the_product(device, name, m, k, n, view, part, seed):
    dtype, rng = type_named(name), np.random.default_rng(seed)
    a = device.asarray(numbers(rng, (m, k), dtype))
    b = laid_out(device, rng, view, (k, n), dtype)
    n_parts = 1 + int(part * (n - 1))
    parts = list(split_matmul(a, b, n_parts))
    widths = [p.shape[-1] for p in parts]
    assert len(parts) == n_parts
    assert sum(widths) == n
    assert max(widths) - min(widths) <= 1
    assert widths == sorted(widths, reverse=True)
    assert all(p.shape == (m, w) for p, w in zip(parts, widths, strict=True))
    assert_right(device.xp.concatenate(parts, axis=-1), a, b)


def test_no_columns_are_one_part_without_columns(device):
    [part] = split_matmul(device.xp.ones((2, 3)), device.xp.ones((3, 0)), 1)
    assert part.shape == (2, 0)


def test_parts_need_only_their_share_of_the_memory(device, rng):
    a = device.asarray(numbers(rng, (400, 10), np.dtype("float32")))
    b = device.asarray(numbers(rng, (10, 1000), np.dtype("float32")))

    def largest():
        return max(float(part.max()) for part in split_matmul(a, b, 20))

    if device.kind == "cpu":
        assert allocated(device, largest) < 400 * 1000 * 4 / 5
    whole = gpuml.to_host(batched_matmul(a, b)).max()
    np.testing.assert_allclose(largest(), whole, rtol=1e-5)


def test_parts_are_computed_as_they_are_asked_for(device, monkeypatch):
    calls = []
    inner = matmul.batched_matmul
    monkeypatch.setattr(matmul, "batched_matmul", lambda *a, **k: calls.append(k) or inner(*a, **k))
    a = device.xp.ones((2, 2), "float32")
    parts = split_matmul(a, a, 2, precision="tf32")
    assert calls == []
    next(parts)
    assert calls == [{"precision": "tf32"}]
    assert len(list(parts)) == 1


def test_split_matmul_says_at_once_what_is_wrong(device):
    a, b = device.xp.ones((2, 3)), device.xp.ones((3, 4))
    for n_parts in (0, -1, 5):
        with pytest.raises(ValueError, match=f"from 1 to the 4 columns of b, got {n_parts}"):
            split_matmul(a, b, n_parts)
    for n_parts in (2.5, "2", None):
        with pytest.raises(TypeError, match="as an integer"):
            split_matmul(a, b, n_parts)
    with pytest.raises(ValueError, match=re.escape("(2, 3) @ (2, 3) do not fit")):
        split_matmul(a, a, 1)
    with pytest.raises(TypeError, match="got list"):
        split_matmul(a, [[1.0]], 1)


# --- multiply_into -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@given(m=SIZE, k=SIZE, n=SIZE, a_view=VIEW, b_view=VIEW, seed=SEED,
       out_view=st.sampled_from(WRITABLE), add=st.booleans())  # fmt: skip
@quick
def test_a_product_is_written_or_added(device, name, m, k, n, a_view, b_view, out_view, add, seed):
    dtype, rng = type_named(name), np.random.default_rng(seed)
    a = laid_out(device, rng, a_view, (m, k), dtype)
    b = laid_out(device, rng, b_view, (k, n), dtype)
    out = laid_out(device, rng, out_view, (m, n), dtype)
    before = gpuml.to_host(out).copy()
    if not add and dtype.kind in "fc":
        out[...] = np.nan  # what was there must not count
    multiply_into(a, b, out, add=add)
    a, b, after = (gpuml.to_host(x) for x in (a, b, out))
    product, before = exact(a, b), before if add else np.zeros_like(before)
    if dtype.kind in "biu":
        wanted = before | product if dtype.kind == "b" else before + product
        np.testing.assert_array_equal(after, wanted)
        return
    wide = product.dtype
    error = np.abs(after.astype(wide) - (before.astype(wide) + product))
    # besides the product's own error, the sum is rounded (the CPU rounds the product, too)
    eps, step = rounding(dtype)
    bound = allowed(a, b, dtype) + eps * (np.abs(before).astype(float) + np.abs(product)) + step
    assert (error <= bound).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_sums_of_two_byte_products_may_stay_in_float32(device, rng, name):
    dtype = type_named(name)
    parts = [(numbers(rng, (7, 30), dtype), numbers(rng, (30, 5), dtype)) for _ in range(3)]
    out = device.asarray(np.full((7, 5), np.nan, np.float32))
    for i, (a, b) in enumerate(parts):
        multiply_into(device.asarray(a), device.asarray(b), out, add=i > 0)
    a, b = np.hstack([a for a, _ in parts]), np.vstack([b for _, b in parts])
    assert_right(out, a.astype(np.float32), b.astype(np.float32))


def test_a_product_is_added_with_the_precision_asked_for(device, rng):
    a, b = (device.asarray(rng.normal(size=(256, 256)).astype(np.float32)) for _ in range(2))
    out = device.asarray(np.zeros((256, 256), np.float32))
    multiply_into(a, b, out, add=True)
    assert_right(out, a, b)
    out[...] = 0
    multiply_into(a, b, out, add=True, precision="tf32")
    assert relative_error(out, a, b) < 2e-3
    if is_nvidia(device) and int(device.xp.cuda.Device().compute_capability) >= 80:
        assert relative_error(out, a, b) > 1e-6


# --- the benchmark -----------------------------------------------------------------------------

SCRIPT = Path(__file__).parent / "benchmarks" / "batched.py"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("", "tf32  128: right"),
        ("out[-1] *= 1.0001", "gpuml is wrong at k = 4, float32: error"),
        ("out[7, 0, 0] = float('nan')", "gpuml is wrong at k = 4, float32: error nan"),
    ],
)
def test_the_benchmark_finds_wrong_products(device, wrong, says):
    program = f"""import runpy, sys, gpuml
right = gpuml.batched_matmul
def product(a, b, *, out, precision):
    right(a, b, out=out, precision=precision)
    {wrong or "pass"}
gpuml.batched_matmul = product
sys.argv = ["batched.py", "--check"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")"""
    command = [sys.executable, "-c", program]
    environment = os.environ | {"GPUML_DEVICE": device.kind}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert says in done.stdout + done.stderr
    assert done.returncode == bool(wrong)
