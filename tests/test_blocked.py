"""Products cut into tiles: right results, memory, files, interruption, bad input, reports."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gpuml
from gpuml import blocked, blocked_matmul, blocking, plan_for
from gpuml.blocked import BlockReport, Rates, _Covered, _union
from gpuml.blocking import EMPTY, FILL, IN, MULTIPLY, OUT
from gpuml.devices import CPU, Device

ROOT = Path(__file__).parent.parent
LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
SIGNALS = pytest.mark.skipif(os.name == "nt", reason="no such signals here")
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RATES = Rates(fill=1e10, empty=1e10, bus_in=1e10, bus_out=1e10, arithmetic=1e11)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Reports need no measurement here: it takes a second for each type."""
    monkeypatch.setattr(blocked, "measure_rates", lambda *_: RATES)


@pytest.fixture
def gpu() -> Device:
    """A GPU, for what happens on no CPU."""
    try:
        return gpuml.get_device("gpu")
    except gpuml.DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture
def many_strips(monkeypatch):
    """Send even small tiles back in many parts, as large ones are."""
    monkeypatch.setattr(blocking, "STRIP_BYTES", 512)


# --- arrays, and what their product must be ----------------------------------------------------

DTYPES = [
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "uint64", "bool", "bfloat16"),
    *(">f4", ">f8", ">i4", ">c8"),
]
MIXED = [("float32", "float64"), ("float16", "float32"), ("int8", "float32"), ("bool", "int32")]
MIXED += [("int64", "uint64"), ("complex64", "float64"), (">i2", "uint8"), ("float16", "int8")]
PAIRS = [*((dtype, dtype) for dtype in DTYPES), *MIXED]

VIEWS = {
    "C": lambda make, m, n: make(m, n),
    "Fortran": lambda make, m, n: make(n, m).T,
    "columns": lambda make, m, n: make(m, n + 3)[:, 2 : n + 2],
    "rows": lambda make, m, n: make(m + 2, n)[1 : m + 1],
    "stepped": lambda make, m, n: make(2 * m, 3 * n)[::2, 1::3],
    "reversed": lambda make, m, n: make(m, n)[::-1, ::-1],
    "reversed rows": lambda make, m, n: make(m, n)[::-1],
    "reversed Fortran": lambda make, m, n: make(n, m).T[:, ::-1],
    "Fortran columns": lambda make, m, n: make(n + 2, m).T[:, 1:-1],
    "Fortran rows": lambda make, m, n: make(n, m + 3).T[2:-1],
    "one row": lambda make, m, n: np.broadcast_to(make(1, n), (m, n)),
    "one column": lambda make, m, n: np.broadcast_to(make(m, 1), (m, n)),
    "windows": lambda make, m, n: np.lib.stride_tricks.sliding_window_view(
        make(1, m + n - 1)[0], n
    ),
}
WRITABLE = [name for name in VIEWS if not name.startswith(("one", "windows"))]


def type_named(name: str) -> np.dtype:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def numbers(rng, shape, dtype):
    """Random numbers; integers over their whole range, so that products overflow."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        whole = rng.integers(info.min, info.max, shape, dtype.newbyteorder("="), endpoint=True)
        return whole.astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.1
    values = rng.normal(size=shape)
    return (values + 1j * rng.normal(size=shape) if dtype.kind == "c" else values).astype(dtype)


def laid_out(rng, view, shape, dtype):
    x = VIEWS[view](lambda m, n: numbers(rng, (m, n), dtype), *shape)
    assert (x.shape, x.dtype) == (shape, dtype)
    return x


def assert_right(c, a, b):
    """Compare with a product that is exact for integers, and has more digits for others.

    A sum of K products is off by at most K roundings of the sum of their magnitudes; a complex
    product has four real ones. Types of two bytes are summed in float32 and rounded once: by half
    of the last place of the result itself.
    """
    dtype = np.result_type(a.dtype, b.dtype).newbyteorder("=")
    assert c.dtype == dtype
    assert c.shape == (a.shape[0], b.shape[1])
    if dtype.kind == "b":
        np.testing.assert_array_equal(c, a.astype(int) @ b.astype(int) > 0)
        return
    if dtype.kind in "iu":  # modulo 2^64, of which the shorter ones are the last bits
        wide = np.uint64 if dtype.kind == "u" else np.int64
        exact = a.astype(dtype).astype(wide) @ b.astype(dtype).astype(wide)
        np.testing.assert_array_equal(c, exact.astype(dtype))
        return
    wide = np.clongdouble if dtype.kind == "c" else np.longdouble
    if dtype.itemsize < 8:
        wide = np.float64
    x, y = (np.asarray(v).astype(dtype).astype(wide) for v in (a, b))
    exact, magnitude = x @ y, np.abs(x) @ np.abs(y)
    small = dtype.itemsize == 2
    sum_dtype = np.dtype(np.float32) if small else dtype
    factor = 4 if dtype.kind == "c" else 1
    bound = factor * (a.shape[1] + 2) * np.finfo(sum_dtype).eps / 2 * magnitude
    if small:
        eps, step = (2.0**-10, 2.0**-24) if dtype == np.float16 else (2.0**-7, 2.0**-133)
        bound = bound + eps / 2 * (np.abs(exact) + bound) + step
    error = np.abs(np.asarray(c).astype(wide) - exact)
    assert (error <= bound).all(), f"off by {error.max():.1e}"  # False for NaN


def smallest_limit(a, b, device) -> int:
    """The least memory limit, to the byte."""
    low, high = 1, 2**34
    while low < high:
        middle = (low + high) // 2
        try:
            plan_for(a, b, memory_limit=middle, device=device)
            high = middle
        except gpuml.DataError:
            low = middle + 1
    return low


def mapped(path, x, mode="r", offset=0):
    """An array as a file that is mapped."""
    order = "C" if x.flags.c_contiguous else "F"
    path.write_bytes(b"\xee" * offset + x.tobytes(order))
    return np.memmap(path, x.dtype, mode, offset, x.shape, order)


def in_a_file(path, shape, dtype=np.float64, order="C"):
    """A result in a file of NumPy's, full of what is no result."""
    out = np.lib.format.open_memmap(path, "w+", dtype, shape, order == "F")
    out[...] = 77
    return out


# --- right results -----------------------------------------------------------------------------

SIZE = st.one_of(st.integers(1, 40), st.sampled_from([31, 32, 33, 63, 64, 65, 96, 97, 130]))


@quick
@given(
    sizes=st.tuples(SIZE, SIZE, SIZE),
    views=st.tuples(st.sampled_from(list(VIEWS)), st.sampled_from(list(VIEWS))),
    out_view=st.sampled_from([None, *WRITABLE]),
    dtypes=st.sampled_from([pair for pair in PAIRS if "bfloat16" not in pair]),
    times=st.sampled_from([1, 1.2, 2, 4, 1000]),
    seed=st.integers(0, 99),
)
def test_random_shapes_strides_types_and_splits(
    device, sizes, views, out_view, dtypes, times, seed
):
    rng, (m, n, k) = np.random.default_rng(seed), sizes
    a = laid_out(rng, views[0], (m, k), type_named(dtypes[0]))
    b = laid_out(rng, views[1], (k, n), type_named(dtypes[1]))
    before = a.copy(), b.copy()
    dtype = np.result_type(a.dtype, b.dtype).newbyteorder("=")
    out = None if out_view is None else laid_out(rng, out_view, (m, n), dtype)
    limit = int(smallest_limit(a, b, device) * times)
    with np.errstate(all="ignore"):
        c, report = blocked_matmul(
            a, b, out=out, memory_limit=limit, device=device, return_report=True
        )
        assert_right(c, a, b)
    assert out is None or c is out
    assert isinstance(c, np.ndarray)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])
    plan = report.plan
    assert plan == plan_for(a, b, memory_limit=limit, device=device)
    assert report.n_steps == plan.n_steps == math.prod(plan.counts)
    assert plan.memory <= plan.budget <= limit


def many_tiles(a, b, device, **options):
    """A product in several tiles each way and several panels, and its report."""
    limit = smallest_limit(a, b, device)
    c, report = blocked_matmul(
        a, b, memory_limit=limit, device=device, return_report=True, **options
    )
    assert min(report.plan.counts) >= 2, "the test is not about what it should be"
    assert max(report.plan.counts) >= 3
    return c, report


SMALL = st.integers(1, 30)


@quick
@given(
    sizes=st.tuples(SMALL, SMALL, SMALL),
    tile=st.tuples(SMALL, SMALL, SMALL),
    keeps=st.sampled_from("CAB"),
    buffers=st.integers(1, 4),
    strip_bytes=st.sampled_from([8, 100, 2**25]),
    views=st.tuples(st.sampled_from(list(VIEWS)), st.sampled_from(list(VIEWS))),
    dtype=st.sampled_from(["float32", "float16", "complex64", "int32", "bool"]),
)
@example((30, 29, 28), (7, 11, 3), "C", 3, 8, ("C", "C"), "float32")
@example((30, 29, 28), (7, 11, 3), "A", 3, 8, ("Fortran", "C"), "float32")
@example((30, 29, 28), (7, 11, 3), "B", 2, 100, ("C", "Fortran"), "float16")
def test_any_plan_gives_the_right_product_and_brings_what_it_says(
    device, sizes, tile, keeps, buffers, strip_bytes, views, dtype
):
    """Tiles that no budget would ask for; counted where the panels pass by."""
    (m, n, k), dtype, rng = sizes, np.dtype(dtype), np.random.default_rng(0)
    tile = [min(pair) for pair in zip(sizes, tile, strict=True)]
    a, b = laid_out(rng, views[0], (m, k), dtype), laid_out(rng, views[1], (k, n), dtype)
    sums = max(4, dtype.itemsize) if dtype.kind == "f" else dtype.itemsize
    plan = blocking.BlockPlan(*sizes, *tile, keeps, buffers, dtype.itemsize, sums, 10**9)
    brought = []

    def on_host(array, to, place=None):
        brought.append(array.size * dtype.itemsize)
        return np.asarray(array, to)

    class Stager(blocked.Stager):
        def load(self, source, target, stream):
            brought.append(target.nbytes)
            return super().load(source, target, stream)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(blocked, "plan_blocks", lambda *_, **__: plan)
        patch.setattr(blocking, "STRIP_BYTES", strip_bytes)
        patch.setattr(blocked, "in_memory", on_host)
        patch.setattr(blocked, "Stager", Stager)
        c, report = blocked_matmul(a, b, device=device, return_report=True)
        assert_right(c, a, b)
    assert report.plan is plan
    assert report.n_steps == plan.n_steps
    assert sum(brought) == plan.bytes_in


@pytest.mark.parametrize(("left", "right"), PAIRS)
def test_each_type_in_many_tiles_and_panels(device, rng, many_strips, left, right):
    a = numbers(rng, (150, 180), type_named(left))
    b = numbers(rng, (180, 130), type_named(right))
    with np.errstate(all="ignore"):
        c, report = many_tiles(a, b, device)
    assert_right(c, a, b)
    short = c.dtype.itemsize == 2 and c.dtype.kind not in "iu"
    assert report.plan.sum_itemsize == (4 if short else c.itemsize)
    assert report.plan.itemsize == c.itemsize


@pytest.mark.parametrize("view", VIEWS)
def test_each_way_to_lie_in_memory_in_many_tiles_and_panels(device, rng, many_strips, view):
    dtype = np.dtype("float32")
    a, b = laid_out(rng, view, (100, 110), dtype), numbers(rng, (110, 70), dtype)
    assert_right(many_tiles(a, b, device)[0], a, b)
    a, b = numbers(rng, (100, 110), dtype), laid_out(rng, view, (110, 70), dtype)
    assert_right(many_tiles(a, b, device)[0], a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
@pytest.mark.parametrize("view", WRITABLE)
def test_only_out_is_written_wherever_it_lies(device, rng, many_strips, view, dtype):
    dtype = np.dtype(dtype)
    a, b = numbers(rng, (100, 110), dtype), numbers(rng, (110, 70), dtype)
    wholes = []

    def make(m, n):
        wholes.append(np.full((m, n), 3).astype(dtype))
        return wholes[-1]

    out = VIEWS[view](make, 100, 70)
    outside = np.ones(wholes[0].shape, bool)
    place = np.lib.stride_tricks.as_strided(
        outside.reshape(-1)[(out.ctypes.data - wholes[0].ctypes.data) // out.itemsize :],
        out.shape,
        [step // out.itemsize for step in out.strides],
    )
    place[...] = False
    c, _ = many_tiles(a, b, device, out=out)
    assert c is out
    assert_right(c, a, b)
    assert (wholes[0][outside] == np.array(3).astype(dtype)).all()


def test_one_element_and_one_row_and_one_column(device, rng):
    for m, n, k in ((1, 1, 1), (1, 1, 5000), (5000, 1, 1), (1, 5000, 1), (1, 700, 600)):
        a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
        limit = smallest_limit(a, b, device)
        assert_right(blocked_matmul(a, b, memory_limit=limit, device=device), a, b)


@pytest.mark.alone
def test_without_a_limit_a_small_product_is_one_tile(device, rng):
    a, b = rng.normal(size=(60, 70)), rng.normal(size=(70, 50))
    c, report = blocked_matmul(a, b, device=device, return_report=True)
    assert_right(c, a, b)
    assert report.plan.counts == (1, 1, 1)
    free, _ = device.memory()
    if free is not None:
        share = blocked.SAFE_SHARE[device.kind]
        assert 0 < report.plan.budget < share * free * 1.5


def test_the_device_is_the_one_asked_for(device, rng, monkeypatch):
    a = rng.normal(size=(5, 5))
    monkeypatch.setenv("GPUML_DEVICE", device.kind)
    for name in (None, device.kind, device):
        _, report = blocked_matmul(a, a, device=name, return_report=True)
        assert report.device == str(device)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_precision_is_for_float32_and_a_cpu_is_exact(device, rng, precision):
    a, b = (rng.normal(size=(120, 120)).astype("float32") for _ in "ab")
    c, _ = many_tiles(a, b, device, precision=precision)
    bits = {"float32": 24, "tf32": 11, "bfloat16": 8}[
        precision if device.kind == "gpu" else "float32"
    ]
    magnitude = np.abs(a).astype(float) @ np.abs(b)
    error = np.abs(c - a.astype(float) @ b) / magnitude
    assert error.max() <= 2 * 2.0**-bits + 130 * 2.0**-24
    for dtype in ("float64", "float16", "int32"):
        with pytest.raises(ValueError, match="is for float32"):
            blocked_matmul(a.astype(dtype), b.astype(dtype), precision=precision, device=device)


# --- not numbers as others ---------------------------------------------------------------------


def with_specials(rng, shape, dtype):
    x = rng.normal(size=shape).astype(dtype)
    for value in (np.nan, np.inf, -np.inf, 0.0, -0.0, np.finfo(dtype).max):
        x[rng.random(shape) < 0.01] = value
    return x


def assert_same_kind(c, expected):
    """NaN where it is NaN, infinite with the same sign where it is infinite."""
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(c), test(expected))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nan_and_infinity_pass_as_in_numpy(device, rng, dtype):
    a, b = with_specials(rng, (130, 100), dtype), with_specials(rng, (100, 140), dtype)
    for x in (a, b):  # the largest ones would overflow, or not, by the order of the sum
        x[np.abs(x) == np.finfo(dtype).max] = 1
    whole, report = blocked_matmul(a, b, device=device, return_report=True)
    assert report.plan.counts[2] == 1
    split, _ = many_tiles(a, b, device)
    expected = a @ b
    assert np.isnan(expected).any()
    assert np.isinf(expected).any()
    for c in (whole, split):
        assert_same_kind(c, expected)
        fine = np.isfinite(expected)
        tolerance = 1e-4 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(c[fine], expected[fine], tolerance, tolerance)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_reaches_its_row_or_column_only(device, rng, many_strips):
    a, b = rng.normal(size=(100, 120)), rng.normal(size=(120, 90))
    a[57, 119], b[0, 33] = np.nan, np.inf
    c, _ = many_tiles(a, b, device)
    expected = np.zeros(c.shape, bool)
    expected[57] = True
    np.testing.assert_array_equal(np.isnan(c), expected)
    assert np.isinf(np.delete(c[:, 33], 57)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_out_held_before_does_not_count(device, rng):
    a, b = rng.normal(size=(100, 120)), rng.normal(size=(120, 90))
    out = np.full((100, 90), np.nan)
    many_tiles(a, b, device, out=out)
    assert_right(out, a, b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_too_large_a_result_is_infinite(device):
    a = np.full((40, 200), 300, np.float16)
    c, _ = blocked_matmul(
        a, a.T, memory_limit=smallest_limit(a, a.T, device), device=device, return_report=True
    )
    assert np.isposinf(c).all()


@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 4), (0, 3, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("dtype", ["float32", "int8", "bool"])
def test_without_rows_columns_or_depth_it_is_as_in_numpy(device, m, n, k, dtype):
    a, b = np.ones((m, k), dtype), np.ones((k, n), dtype)
    c = blocked_matmul(a, b, device=device)
    assert (c.shape, c.dtype) == ((m, n), np.dtype(dtype))
    assert not c.any()
    out = np.ones((m, n), dtype)
    result = blocked_matmul(a, b, out=out, device=device, return_report=True, memory_limit=1)
    assert result[0] is out
    assert result[1] is None
    assert not out.any()


def test_without_depth_a_file_is_filled_with_zeros(device, tmp_path):
    out = in_a_file(tmp_path / "c.npy", (30, 20))
    blocked_matmul(np.ones((30, 0)), np.ones((0, 20)), out=out, device=device)
    assert not np.load(tmp_path / "c.npy").any()
    assert os.listdir(tmp_path) == ["c.npy"]


# --- memory limits -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int16", "complex128"])
@pytest.mark.parametrize("shape", [(200, 150, 170), (5, 2000, 3), (40, 40, 33)])
def test_the_smallest_limit_is_exact_and_is_named(device, rng, dtype, shape):
    m, n, k = shape
    a, b = numbers(rng, (m, k), np.dtype(dtype)), numbers(rng, (k, n), np.dtype(dtype))
    limit = smallest_limit(a, b, device)
    plan = plan_for(a, b, memory_limit=limit, device=device)
    itemsizes = plan.itemsize, plan.sum_itemsize
    least = blocking.smallest_memory(
        m, n, k, itemsizes[0], sum_itemsize=itemsizes[1], buffers=plan.buffers
    )
    assert plan.budget == plan.memory == least
    assert blocked_matmul(a, b, memory_limit=limit, device=device).shape == (m, n)
    with pytest.raises(gpuml.DataError, match="is too small") as caught:
        blocked_matmul(a, b, memory_limit=limit - 1, device=device)
    given_size, needed, kept, cure = re.search(
        r"limit of (.+) is too small: the smallest tile needs (.+), and (.+) are kept "
        r"for the libraries; memory_limit=(\d+) would do",
        str(caught.value),
    ).groups()
    assert limit <= int(cure) <= limit + 2
    assert plan_for(a, b, memory_limit=int(cure), device=device).memory == least
    sizes = [float(text.split()[0]) for text in (needed, kept, given_size)]
    units = {text.split()[1] for text in (needed, kept, given_size)}
    assert given_size == blocking.size_text(limit - 1)
    if len(units) == 1:
        assert sizes[0] + sizes[1] == pytest.approx(sizes[2], rel=0.02)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("n_bytes", [1, 1000, 2**20, 2**30, 2**40 + 1])
def test_the_limit_that_would_do_is_the_least(kind, n_bytes):
    where = Device(kind)
    limit = blocked._least_limit(where, n_bytes)
    assert limit - blocked._reserve(where, limit) >= n_bytes
    assert limit - 2 - blocked._reserve(where, limit - 2) < n_bytes


@pytest.mark.parametrize(
    ("operands", "error", "words"),
    [
        ((np.ones((2, 3, 3)), np.ones((3, 4))), ValueError, "a has shape .* takes matrices"),
        ((np.ones((3, 3)), np.ones((2, 3, 4))), ValueError, "b has shape .* takes matrices"),
        (([[1.0]], np.ones((1, 4))), TypeError, "got list"),
        ((np.ones((2, 3)), np.ones((2, 4))), ValueError, "a.T @ b would"),
        ((np.ones((0, 3)), np.ones((3, 4))), ValueError, "must be at least 1, got 0, 4, 3"),
    ],
)
def test_no_plan_for_what_cannot_be_multiplied(operands, error, words):
    with pytest.raises(error, match=words):
        plan_for(*operands, device="cpu")


@pytest.mark.parametrize("limit", ["8 KiB", 8192, "8192", "8.0 KiB"])
def test_limits_in_text_and_in_bytes_are_the_same(limit):
    a = np.ones((8, 8), np.float32)
    plan = plan_for(a, a, memory_limit=limit, device="cpu")
    assert plan == plan_for(a, a, memory_limit=8192, device="cpu")
    assert 2048 <= plan.budget <= 4096, "the half is kept for libraries, or for copies as well"


@pytest.mark.parametrize(
    "limit", [0, -1, "-2 GiB", "0 GiB", "", "much", "2 XiB", 1e30, True, "1e9"]
)
def test_a_limit_that_is_no_size_is_refused(device, limit):
    a = np.ones((8, 8))
    with pytest.raises(ValueError, match=r"size of memory"):
        blocked_matmul(a, a, memory_limit=limit, device=device)


PEAK = """
import sys, numpy as np, gpuml
from gpuml import blocked
m, k, n, dtype, order, limit = sys.argv[1:7]
m, k, n = int(m), int(k), int(n)
blocked.measure_rates = lambda *_: None
a = np.load("a.npy", mmap_mode="r")
b = np.memmap("b", dtype, "r", 20, (k, n), order)
out = np.memmap("c", np.result_type(a, b), "r+", 0, (m, n), order)
_, report = gpuml.blocked_matmul(
    a, b, out=out, memory_limit=limit, device="cpu", return_report=True
)
def kib(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
print(kib("VmHWM"), kib("RssFile") + kib("RssShmem"), report.plan.n_steps)
"""


@pytest.mark.alone
@LINUX
@pytest.mark.parametrize(
    ("sizes", "dtype", "order"),
    [
        ((10_240, 10_240, 256), "<f4", "C"),
        ((256, 400_000, 32), "<f4", "C"),  # to take a few columns of long rows touches every page
        ((400_000, 256, 32), "<f4", "F"),
        ((5120, 10_240, 64), ">f8", "C"),
    ],
)
def test_a_limit_below_the_operands_is_kept(tmp_path, sizes, dtype, order):
    """400 MiB of A within 300 MiB, all that Python and its libraries take counted in."""
    m, k, n = sizes
    a = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", dtype, (m, k), order == "F")
    places = [(0, 0), (m - 1, k - 1), (m // 2, 3), (7, k // 3)]
    for i, place in enumerate(places):
        a[place] = i + 1  # the rest is zero, and takes no place on the disk
    b = np.memmap(tmp_path / "b", dtype, "w+", 20, (k, n), order)
    for _, j in places:
        b[j, :] = j + 1 + np.arange(n)
    np.memmap(tmp_path / "c", np.result_type(a, b), "w+", 0, (m, n), order)
    for name in ("a.npy", "b"):
        (tmp_path / name).read_bytes()  # all of it is in the system's cache
    command = [sys.executable, "-c", PEAK, *map(str, sizes), dtype, order, "300 MiB"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert done.stderr == ""
    peak, still_mapped, n_steps = map(int, done.stdout.split())
    assert n_steps > 1
    assert peak < 300 * 1024, f"{peak / 1024:.0f} MiB"
    assert still_mapped < 60 * 1024, f"{still_mapped / 1024:.0f} MiB"
    c = np.memmap(tmp_path / "c", np.result_type(a, b).newbyteorder("="), "r", 0, (m, n), order)
    expected = {}
    for value, (i, j) in enumerate(places, start=1):
        expected[i] = expected.get(i, 0) + value * (j + 1.0 + np.arange(n))
    assert set(np.flatnonzero(np.asarray(c).any(axis=1))) == set(expected)
    for i, row in expected.items():
        np.testing.assert_allclose(c[i], row, 1e-6)


# --- operands and results in files -------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float16", ">f8", "int32"])
def test_operands_and_results_may_be_files(device, rng, tmp_path, many_strips, order, dtype):
    dtype = np.dtype(dtype)
    x = np.asarray(numbers(rng, (300, 200), dtype), order=order)
    y = np.asarray(numbers(rng, (200, 170), dtype), order=order)
    a = mapped(tmp_path / "a", x, "r", offset=dtype.itemsize)  # no page begins there
    np.save(tmp_path / "b.npy", y)
    b = np.load(tmp_path / "b.npy", mmap_mode="r")
    assert np.asarray(b).flags.f_contiguous is (order == "F")
    out = in_a_file(tmp_path / "c.npy", (300, 170), dtype.newbyteorder("="), order)
    c, _ = many_tiles(a, b, device, out=out)
    assert c is out
    assert_right(c, x, y)
    del c, out
    assert_right(np.load(tmp_path / "c.npy"), x, y)
    assert sorted(os.listdir(tmp_path)) == ["a", "b.npy", "c.npy"]
    assert (tmp_path / "a").read_bytes() == b"\xee" * dtype.itemsize + x.tobytes(order)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), y)


def test_parts_of_files_beside_other_bytes(device, rng, tmp_path):
    """Rows and columns out of a mapped file, a result amid a file: the rest stays as it was."""
    x, y = rng.normal(size=(150, 140)), rng.normal(size=(130, 160))
    a = mapped(tmp_path / "a", x, "r+", 24)[20:, 5:-5]
    b = mapped(tmp_path / "b", y, "r", 4096 + 8)[:, 30:130]
    path = tmp_path / "c"
    before = rng.bytes(60_000 + 200 * 150 * 8)
    path.write_bytes(before)
    whole = np.memmap(path, float, "r+", 40_008, (180, 150))
    out = whole[10:140, 20:120]
    many_tiles(a, b, device, out=out)
    assert_right(np.array(out), np.array(a), np.array(b))
    kept = np.frombuffer(before, float, 180 * 150, 40_008).reshape(180, 150).copy()
    kept[10:140, 20:120] = out
    after = path.read_bytes()
    assert after[:40_008] == before[:40_008]
    assert after[40_008 + 180 * 150 * 8 :] == before[40_008 + 180 * 150 * 8 :]
    np.testing.assert_array_equal(
        np.frombuffer(after, np.int64, 180 * 150, 40_008), kept.view(np.int64).ravel()
    )


def test_changes_that_stay_in_memory_count_and_survive(device, rng, tmp_path):
    x, y = rng.normal(size=(120, 130)), rng.normal(size=(130, 110))
    a, b = mapped(tmp_path / "a", x, "c"), mapped(tmp_path / "b", y.copy("F"), "c")
    a[50:60] = 5
    b[:, 7] = -1
    here = np.array(a), np.array(b)
    out = mapped(tmp_path / "c", np.full((120, 110), 7.0), "c")

    def no_record(*_):
        assert not list(tmp_path.glob("*.progress*"))

    for _ in range(2):
        many_tiles(a, b, device, out=out, progress=no_record)
        assert_right(np.array(out), *here)
        np.testing.assert_array_equal(a, here[0])
        np.testing.assert_array_equal(b, here[1])
    assert (tmp_path / "a").read_bytes() == x.tobytes()
    assert set(np.fromfile(tmp_path / "c")) == {7.0}, "what stays in memory is not in the file"


def test_results_in_plain_memory_leave_no_record(device, rng, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = rng.normal(size=(100, 100))
    many_tiles(a, a, device)
    assert os.listdir(tmp_path) == []


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((3, 4), (5, 6), ["(3, 4) @ (5, 6)", "4 columns meet 5 rows", "no transposition would"]),
        ((3, 4), (6, 4), ["(3, 4) @ (6, 4)", "a @ b.T would"]),
        ((4, 3), (4, 6), ["(4, 3) @ (4, 6)", "a.T @ b would"]),
        ((4, 3), (6, 4), ["(4, 3) @ (6, 4)", "b @ a or a.T @ b.T would"]),
        ((4,), (4, 6), ["(4,)", "a is no matrix", "a[None, :]"]),
        ((3, 4), (4,), ["(4,)", "b is no matrix", "b[:, None]"]),
        ((), (4, 4), ["a is no matrix"]),
        ((2, 3, 4), (4, 5), ["a has shape (2, 3, 4)", "batched_matmul"]),
        ((3, 4), (2, 4, 5), ["b has shape (2, 4, 5)", "batched_matmul"]),
        ((1, 3, 4), (1, 4, 5), ["a has shape (1, 3, 4)"]),
    ],
)
def test_shapes_that_do_not_multiply_are_named(device, a, b, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        blocked_matmul(np.ones(a), np.ones(b), device=device)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("operand", [[[1.0, 2.0], [3.0, 4.0]], "ab", 5, None, object()])
def test_what_is_no_array_is_refused(device, operand):
    for pair in ((operand, np.eye(2)), (np.eye(2), operand)):
        with pytest.raises(TypeError, match=f"got {type(operand).__name__}"):
            blocked_matmul(*pair, device=device)
    with pytest.raises(TypeError, match="got list"):
        blocked_matmul(np.eye(2), np.eye(2), out=[[0, 0], [0, 0]], device=device)


@pytest.mark.parametrize("dtype", ["U3", "S2", "O", "M8[s]", "m8[s]", "V8", "f4,f4"])
def test_arrays_of_no_numbers_are_refused(device, dtype):
    x = np.zeros((2, 2), dtype)
    for pair in ((x, np.eye(2)), (np.eye(2), x)):
        with pytest.raises(TypeError, match="cannot multiply arrays of"):
            blocked_matmul(*pair, device=device)


class FakeArray:
    """Passes for an array of CuPy's where only its place counts."""

    device = SimpleNamespace(id=0)
    data = SimpleNamespace(device_id=0)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """An array on a GPU: a real one if one answers."""
    try:
        return gpuml.get_device("gpu").asarray(np.eye(2))
    except gpuml.DeviceError:
        module = type(sys)("cupy")
        module.ndarray = FakeArray
        monkeypatch.setitem(sys.modules, "cupy", module)
        return FakeArray()


def test_arrays_on_a_gpu_are_sent_elsewhere(on_a_gpu):
    here = np.eye(2)
    with pytest.raises(TypeError, match=r"on a GPU already.*batched_matmul"):
        blocked_matmul(on_a_gpu, on_a_gpu, device="cpu")
    for arrays in ({"a": here, "b": on_a_gpu}, {"a": on_a_gpu, "b": here}):
        with pytest.raises(TypeError, match=r"different devices \(.*the CPU.*asarray"):
            blocked_matmul(**arrays, device="cpu")
    with pytest.raises(TypeError, match="different devices"):
        blocked_matmul(here, here, out=on_a_gpu, device="cpu")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (np.ones((3, 5)), "float64 of shape (3, 4), got float64 of shape (3, 5)"),
        (np.ones((4, 3)).T[:, :3], "got float64 of shape (3, 3)"),
        (np.ones((1, 3, 4)), "got float64 of shape (1, 3, 4)"),
        (np.ones(12), "got float64 of shape (12,)"),
        (np.ones((3, 4), np.float32), "got float32"),
        (np.ones((3, 4), np.complex128), "got complex128"),
        (np.ones((3, 4), ">f8"), "got >f8"),
        (np.broadcast_to(1.0, (3, 4)), "read-only"),
        (np.frombuffer(bytes(96)).reshape(3, 4), "read-only"),
        (np.lib.stride_tricks.as_strided(np.ones(4), (3, 4), (0, 8)), "repeats its elements"),
    ],
)
def test_an_out_that_cannot_take_the_result_is_refused(device, out, words):
    before = out.copy()
    with pytest.raises(ValueError, match=re.escape(words)):
        blocked_matmul(np.ones((3, 2)), np.ones((2, 4)), out=out, device=device)
    np.testing.assert_array_equal(out, before)


def test_a_file_that_was_opened_for_reading_is_no_out(device, tmp_path):
    in_a_file(tmp_path / "c.npy", (3, 4))
    out = np.load(tmp_path / "c.npy", mmap_mode="r")
    for resume in (False, True):
        with pytest.raises(ValueError, match="read-only"):
            blocked_matmul(np.ones((3, 2)), np.ones((2, 4)), out=out, device=device, resume=resume)


def test_an_out_that_overlaps_an_operand_is_refused(device):
    memory = np.arange(200.0)
    a = memory[:100].reshape(10, 10)
    for out in (a, a.T, a[::-1], memory[99:199].reshape(10, 10), memory[50:150].reshape(10, 10)):
        for pair, name in (((a, np.eye(10)), "a"), ((np.eye(10), a), "b")):
            with pytest.raises(ValueError, match=f"out overlaps {name}"):
                blocked_matmul(*pair, out=out, device=device)
    np.testing.assert_array_equal(memory, np.arange(200.0))
    blocked_matmul(a, np.eye(10), out=memory[100:].reshape(10, 10), device=device)
    np.testing.assert_array_equal(memory, [*range(100)] * 2)


def test_one_file_mapped_twice_overlaps_where_the_bytes_do(device, tmp_path):
    path = tmp_path / "x"
    np.arange(300.0).tofile(path)
    a = np.memmap(path, float, "r", 0, (10, 10))
    for offset in (0, 8, 792):
        out = np.memmap(path, float, "r+", offset, (10, 10))
        for pair, name in (((a, np.eye(10)), "a"), ((np.eye(10), a), "b")):
            with pytest.raises(ValueError, match=f"out overlaps {name}"):
                blocked_matmul(*pair, out=out, device=device)
    np.testing.assert_array_equal(np.fromfile(path), np.arange(300.0))
    out = np.memmap(path, float, "r+", 800, (10, 10))
    blocked_matmul(a, np.eye(10), out=out, device=device)
    np.testing.assert_array_equal(np.fromfile(path), [*range(100), *range(100), *range(200, 300)])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precision": "tf23"}, ValueError, "did you mean 'tf32'"),
        ({"precision": "tf32"}, ValueError, "is for float32"),
        ({"device": "abacus"}, ValueError, "expected auto, cpu, gpu"),
        ({"device": "gpu:99"}, gpuml.DeviceError, "gpu:99 does not answer"),
        ({"resume": True}, ValueError, "to resume, give the memory-mapped out"),
        ({"resume": True, "out": np.ones((2, 2))}, ValueError, "out must be a memory map"),
        ({"memory_limit": 1}, gpuml.DataError, "1 bytes is too small"),
    ],
)
def test_options_that_cannot_be(device, options, error, words):
    with pytest.raises(error, match=words):
        blocked_matmul(np.eye(2), np.eye(2), **{"device": device, **options})


def test_bad_input_leaves_no_record_and_does_not_read_the_operands(device, tmp_path, monkeypatch):
    out = in_a_file(tmp_path / "c.npy", (100, 100))

    def read(*_):
        raise AssertionError("reads operands of terabytes before it says no")

    monkeypatch.setattr(blocked, "fingerprint", read)
    for options in ({"memory_limit": "10 B"}, {"memory_limit": "10"}, {"precision": "tf32"}):
        with pytest.raises(ValueError, match=r"too small|is for float32"):
            blocked_matmul(np.eye(100), np.eye(100), out=out, device=device, **options)
    assert os.listdir(tmp_path) == ["c.npy"]
    assert (np.load(tmp_path / "c.npy") == 77).all()


# --- interrupted, and taken up again -----------------------------------------------------------


class Multiply:
    """Stands in for the product of panels: counts operations, and may stop on the way."""

    def __init__(self, monkeypatch, stop_after=math.inf, error=KeyboardInterrupt) -> None:
        self.n_operations, self._left, self._error = 0, stop_after, error
        self._real = blocked.multiply_into
        self._lock = threading.Lock()
        monkeypatch.setattr(blocked, "multiply_into", self)

    def __call__(self, a, b, out, **options) -> None:
        with self._lock:
            self._left -= 1
            if self._left < 0:
                raise self._error
            self.n_operations += 2 * out.shape[0] * out.shape[1] * a.shape[1]
        self._real(a, b, out, **options)


def noted(path) -> list[tuple[int, int, int, int]]:
    """The tiles that a record calls finished."""
    lines = Path(f"{path}.progress").read_text().splitlines()
    return [tuple(json.loads(line)[:4]) for line in lines[1:]]


def area(tiles) -> int:
    return sum((bottom - top) * (right - left) for top, bottom, left, right in tiles)


class Job:
    """A product into a file, which can be interrupted."""

    def __init__(self, tmp_path, device, rng, dtype="float64", shape=(200, 150, 170)) -> None:
        m, n, self.k = shape
        self.device, self.path = device, tmp_path / "c.npy"
        self.a, self.b = (numbers(rng, s, np.dtype(dtype)) for s in ((m, self.k), (self.k, n)))
        self.out = in_a_file(self.path, (m, n), self.a.dtype)
        self.limit = smallest_limit(self.a, self.b, device)

    def run(self, **options):
        """Multiply, and return the report."""
        options = {"a": self.a, "b": self.b, "out": self.out, "memory_limit": self.limit} | options
        return blocked_matmul(**options, device=self.device, return_report=True)[1]

    def interrupt(self, monkeypatch, stop_after, **options) -> list:
        """Stop it after so many products of panels; return what was noted as finished."""
        with monkeypatch.context() as patch:
            Multiply(patch, stop_after)
            with pytest.raises(KeyboardInterrupt):
                self.run(**options)
        return noted(self.path)

    def assert_finished(self):
        assert_right(np.load(self.path), self.a, self.b)
        assert os.listdir(self.path.parent) == [self.path.name], "the record is removed"


@pytest.fixture
def job(tmp_path, device, rng):
    return Job(tmp_path, device, rng)


@pytest.mark.parametrize("stop_after", [0, 1, 7, 50, 100, 209])
def test_interrupted_only_the_rest_is_computed(job, monkeypatch, stop_after):
    threads = set(threading.enumerate())
    tiles = job.interrupt(monkeypatch, stop_after)
    assert set(threading.enumerate()) == threads
    plan = plan_for(job.a, job.b, memory_limit=job.limit, device=job.device)
    assert min(plan.counts) > 2
    assert len(set(tiles)) == len(tiles) <= stop_after / plan.counts[2]
    if job.device.kind == "cpu":
        assert len(tiles) == stop_after // plan.counts[2], "all that was finished is noted"
    file = np.load(job.path)
    for top, bottom, left, right in tiles:
        assert_right(file[top:bottom, left:right], job.a[top:bottom], job.b[:, left:right])
    with monkeypatch.context() as patch:
        multiply = Multiply(patch)
        report = job.run(resume=True)
    assert report.n_steps == plan.n_steps - len(tiles) * plan.counts[2]
    note = f"taken up again: {len(tiles)} tiles were finished before, {report.n_tiles} now"
    assert (note in str(report)) is bool(tiles)
    assert multiply.n_operations == 2 * job.k * (job.out.size - area(tiles))
    job.assert_finished()


def test_finished_before_the_record_was_removed_nothing_is_computed(job, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(blocked.Journal, "remove", lambda self: None)
        job.run()
    with monkeypatch.context() as patch:
        Multiply(patch, stop_after=0)
        report = job.run(resume=True)
    assert report.n_steps == 0
    assert report.n_tiles == 0
    assert report.bound == "nothing"
    assert str(report).startswith(str(report.plan))
    job.assert_finished()


def test_interrupted_while_rates_are_measured_nothing_is_computed_again(job, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blocked, "measure_rates", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.run()
    assert job.run(resume=True).n_steps == 0
    job.assert_finished()


def test_interrupted_again_and_again_it_comes_to_an_end(job, monkeypatch):
    before = 0
    for _ in range(4):
        tiles = job.interrupt(monkeypatch, 31, resume=True)
        assert len(tiles) >= before
        if job.device.kind == "cpu":
            assert len(tiles) > before
        before = len(tiles)
    report = job.run(resume=True)
    assert 0 < report.n_steps < report.plan.n_steps
    job.assert_finished()


def test_without_resume_all_is_computed_again(job, monkeypatch):
    job.interrupt(monkeypatch, 100)
    report = job.run()
    assert report.n_steps == report.plan.n_steps
    job.assert_finished()


def test_resume_without_a_record_computes_all(job):
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps
    job.assert_finished()


def test_files_without_a_name_are_files(device, rng):
    """Their pages are given back like others; only a record has no place to be."""
    x, y = rng.normal(size=(150, 140)), rng.normal(size=(140, 130))
    arrays = []
    for values in (x, y, np.full((150, 130), 7.0)):
        with tempfile.TemporaryFile() as file:
            arrays.append(np.memmap(file, float, "w+", 0, values.shape))
        arrays[-1][...] = values
    a, b, out = arrays
    assert out.filename is None
    many_tiles(a, b, device, out=out)
    assert_right(out, x, y)
    with pytest.raises(ValueError, match="of a file with a name"):
        blocked_matmul(a, b, out=out, resume=True, device=device)


def test_a_result_that_stays_in_memory_cannot_be_resumed(job):
    out = np.load(job.path, mmap_mode="c")
    with pytest.raises(ValueError, match="to resume, out must be a memory map of a file"):
        job.run(out=out, resume=True)
    with pytest.raises(ValueError, match="to resume, give the memory-mapped out"):
        job.run(out=None, resume=True)


@pytest.mark.parametrize("times", [1.3, 2, 3, 7, 100])
@pytest.mark.parametrize("first", [1, 2.5])
def test_resumed_with_other_tiles_what_is_covered_stays(job, monkeypatch, first, times):
    limit = int(job.limit * first)
    plan = plan_for(job.a, job.b, memory_limit=limit, device=job.device)
    tiles = job.interrupt(monkeypatch, plan.n_steps * 2 // 3, memory_limit=limit)
    if job.device.kind == "cpu":
        assert tiles
    done = np.zeros(job.out.shape, bool)
    for top, bottom, left, right in tiles:
        done[top:bottom, left:right] = True
    limit = int(job.limit * times)
    plan = plan_for(job.a, job.b, memory_limit=limit, device=job.device)
    rest = [s for s in plan.steps() if not done[s.rows, s.columns].all()]
    with monkeypatch.context() as patch:
        multiply = Multiply(patch)
        report = job.run(resume=True, memory_limit=limit)
    assert report.plan == plan
    assert report.n_steps == len(rest)
    assert multiply.n_operations == sum(2 * math.prod(step.sizes) for step in rest)
    job.assert_finished()


def test_tiles_that_were_changed_since_are_computed_again(job, monkeypatch):
    tiles = job.interrupt(monkeypatch, 150)
    if job.device.kind == "gpu" and len(tiles) < 3:
        pytest.skip("stopped before enough tiles came back")
    top, _, left, _ = tiles[1]
    job.out[top, left] += 1
    _, bottom, _, right = tiles[2]
    job.out[bottom - 1, right - 1] = np.nan
    job.out.flush()
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps - (len(tiles) - 2) * report.plan.counts[2]
    job.assert_finished()


def test_a_result_that_was_made_anew_is_computed_anew(job, monkeypatch):
    job.interrupt(monkeypatch, 150)
    job.out = np.lib.format.open_memmap(job.path, "w+", job.out.dtype, job.out.shape)
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps
    job.assert_finished()


@pytest.mark.parametrize("damage", ["half a line", "garbage", "no end of line", "zeros"])
def test_a_record_that_was_cut_off_is_believed_up_to_there(job, monkeypatch, damage):
    tiles = job.interrupt(monkeypatch, 180)
    if len(tiles) < 3:
        pytest.skip("stopped before enough tiles came back")
    record = Path(f"{job.path}.progress")
    text = record.read_bytes()
    record.write_bytes(
        {
            "half a line": text[:-30],
            "garbage": text[:-30] + b"\xff\xfe\x00 garbage\n",
            "no end of line": text[:-1],
            "zeros": text[:-30] + bytes(4096),
        }[damage]
    )
    n_left = len(tiles) - (damage != "no end of line")
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps - n_left * report.plan.counts[2]
    job.assert_finished()


def changed_element(x):
    x = x.copy()
    x[-1, -1] = np.nextafter(x[-1, -1], 9)
    return x


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"a": changed_element}, r"a was 200x170 <f8 \w+ and is 200x170 <f8 \w+"),
        ({"b": changed_element}, r"b was 170x150 <f8 \w+ and is 170x150 <f8 \w+"),
        ({"a": lambda a: a[:, ::-1]}, r"a was 200x170 <f8 \w+ and is 200x170 <f8 \w+"),
        ({"a": lambda a: a.astype(">f8")}, r"a was 200x170 <f8 \w+ and is 200x170 >f8 \w+"),
        ({"a": lambda a: a.astype("f4")}, r"a was 200x170 <f8 \w+ and is 200x170 <f4 \w+"),
        (
            {"a": lambda a: a[:, :160], "b": lambda b: b[:160]},
            r"a was 200x170 <f8 \w+ and is 200x160 <f8 \w+",
        ),
        ({"out": lambda out: out[:100], "a": lambda a: a[:100]}, "a was 200x170.* is 100x170"),
    ],
)
def test_other_operands_are_refused_with_the_difference(job, monkeypatch, changes, difference):
    tiles = job.interrupt(monkeypatch, 100)
    changed = {name: change(getattr(job, name)) for name, change in changes.items()}
    before = job.path.read_bytes()
    with pytest.raises(gpuml.DataError, match=f"cannot resume: {difference}") as caught:
        job.run(resume=True, memory_limit=4 * job.limit, **changed)
    assert f"call without resume=True or delete {job.path}.progress" in str(caught.value)
    assert job.path.read_bytes() == before
    assert noted(job.path) == tiles, "with the right operands it goes on"
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps - len(tiles) * report.plan.counts[2]
    job.assert_finished()


def test_another_precision_or_another_place_is_refused(tmp_path, device, rng, monkeypatch):
    job = Job(tmp_path, device, rng, "float32")
    job.interrupt(monkeypatch, 100)
    with pytest.raises(gpuml.DataError, match="precision was None and is tf32"):
        job.run(resume=True, precision="tf32")
    bytes_before = job.path.stat().st_size
    with job.path.open("ab") as file:
        file.write(bytes(8))
    out = np.memmap(job.path, "float32", "r+", bytes_before + 8 - job.out.nbytes, job.out.shape)
    with pytest.raises(
        gpuml.DataError, match=r"out was 200x150 <f4 at 128 and is 200x150 <f4 at 136"
    ):
        job.run(resume=True, out=out)


def test_with_the_same_precision_it_goes_on(tmp_path, device, rng, monkeypatch):
    job = Job(tmp_path, device, rng, "float32")
    tiles = job.interrupt(monkeypatch, 100, precision="float32")
    report = job.run(resume=True, precision="float32")
    assert report.n_steps == report.plan.n_steps - len(tiles) * report.plan.counts[2]
    job.assert_finished()


def test_an_error_on_the_way_loses_nothing_and_is_told(job, monkeypatch):
    threads = set(threading.enumerate())
    with monkeypatch.context() as patch:
        Multiply(patch, 100, error=ZeroDivisionError("the device fell off"))
        with pytest.raises(ZeroDivisionError, match="fell off"):
            job.run()
    assert set(threading.enumerate()) == threads
    tiles = noted(job.path)
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps - len(tiles) * report.plan.counts[2]
    job.assert_finished()


def test_a_tile_that_does_not_reach_the_disk_is_not_finished(job, monkeypatch):
    n_written = 0

    def full_disk(view):
        nonlocal n_written
        n_written += 1
        if n_written > 5:
            raise OSError("no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr("gpuml.journal.write_back", full_disk)
        with pytest.raises(OSError, match="no space"):
            job.run()
    assert len(noted(job.path)) == 5
    job.run(resume=True)
    job.assert_finished()


KILLED = """
import os, signal, sys, time, numpy as np, gpuml
from gpuml import blocked, journal, memory_maps
where, when, limit, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
calls = 0
def counted(module, name, half=None):
    real = getattr(module, name)
    def function(*arguments, **options):
        global calls
        calls += 1
        if calls == when:
            if half:
                half(*arguments)
            die()
        return real(*arguments, **options)
    setattr(module, name, function)
def half_a_tile(x, y, out, **_):
    if device == "cpu":
        out[: len(out) // 2] = 12345
def half_a_line(self, tile, mark):
    with self.path.open("a") as file:
        file.write(f"[{tile[0]}, {tile[1]}, {tile[2]}, ")
if where == "multiply":
    counted(blocked, "multiply_into", half_a_tile)
elif where == "disk":
    counted(journal, "write_back")
elif where == "note":
    counted(journal.Journal, "_append", half_a_line)
elif where == "read":
    counted(journal, "fingerprint")
elif where == "slow":
    real = blocked.multiply_into
    def slow(*arguments, **options):
        time.sleep(0.003)
        real(*arguments, **options)
    blocked.multiply_into = slow
    print("begins", flush=True)
a, b = np.load("a.npy", mmap_mode="r"), np.load("b.npy", mmap_mode="r")
out = np.load("c.npy", mmap_mode="r+")
gpuml.blocked_matmul(a, b, out=out, memory_limit=limit, device=device, resume=True)
"""


@SIGNALS
def test_killed_at_ten_moments_it_goes_on_each_time(tmp_path, device, rng):
    """Each process takes up what the one before left, and is killed too; the last one finishes."""
    job = Job(tmp_path, device, rng)
    np.save(tmp_path / "a.npy", job.a)
    np.save(tmp_path / "b.npy", job.b)
    n_panels = plan_for(job.a, job.b, memory_limit=job.limit, device=device).counts[2]
    moments = [("multiply", 20), ("disk", 3), ("note", 1), ("multiply", 2), ("note", 4)]
    moments += [("read", 9), ("disk", 1), ("multiply", 19), ("slow", 0), ("slow", 0)]
    if device.kind == "gpu":
        moments = moments[:3]  # to start takes seconds there
    n_before = 0
    for where, when in moments:
        command = [sys.executable, "-c", KILLED, where, str(when), str(job.limit), device.kind]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        if where == "slow":
            process.stdout.readline()
            time.sleep(rng.uniform(0.05, 0.3))
            process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        file = np.load(job.path)
        lines = Path(f"{job.path}.progress").read_text().splitlines()[1:]
        tiles = [json.loads(line)[:4] for line in lines if line.endswith("]")]
        assert len(tiles) >= n_before, "what was noted is kept"
        n_before = len(tiles)
        for top, bottom, left, right in tiles:
            assert_right(file[top:bottom, left:right], job.a[top:bottom], job.b[:, left:right])
    assert n_before > 3
    for name in ("a", "b"):
        setattr(job, name, np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps - n_before * n_panels
    assert_right(np.load(job.path), job.a, job.b)
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "b.npy", "c.npy"]


@SIGNALS
def test_a_real_ctrl_c(tmp_path, rng):
    job = Job(tmp_path, CPU, rng)
    np.save(tmp_path / "a.npy", job.a)
    np.save(tmp_path / "b.npy", job.b)
    command = [sys.executable, "-c", KILLED, "slow", "0", str(job.limit), "cpu"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    record = Path(f"{job.path}.progress")
    end = time.monotonic() + 30
    while not (record.exists() and len(noted(job.path)) > 2):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert error.splitlines()[-1] == "KeyboardInterrupt"
    tiles = noted(job.path)
    assert len(tiles) > 2
    for name in ("a", "b"):
        setattr(job, name, np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    report = job.run(resume=True)
    assert report.n_steps == report.plan.n_steps - len(tiles) * report.plan.counts[2]
    assert_right(np.load(job.path), job.a, job.b)


def edges(size: int):
    return (
        st.tuples(st.integers(0, size), st.integers(0, size))
        .map(sorted)
        .filter(lambda pair: pair[0] < pair[1])
    )


TILE = st.tuples(edges(9), edges(7)).map(lambda t: (*t[0], *t[1]))


@settings(quick, max_examples=300)
@given(tiles=st.lists(TILE, max_size=12), asked=TILE)
@example(tiles=[], asked=(0, 1, 0, 1))
@example(tiles=[(0, 9, 0, 3), (0, 9, 4, 7)], asked=(0, 9, 0, 7))
@example(tiles=[(2, 4, 2, 4)], asked=(1, 4, 2, 4))
@example(tiles=[(2, 4, 2, 4)], asked=(2, 4, 2, 5))
def test_what_a_union_of_tiles_covers(tiles, asked):
    painted = np.zeros((9, 7), bool)
    for top, bottom, left, right in tiles:
        painted[top:bottom, left:right] = True
    top, bottom, left, right = asked
    assert (asked in _Covered(tiles)) is bool(painted[top:bottom, left:right].all())


# --- memory that others took -------------------------------------------------------------------


class FakeGPU(Device):
    """Has the memory that it is told, and no arrays."""

    free = 10**9
    n_emptied = 0  # how often the pool gave back what it kept

    @property
    def xp(self):
        def empty():
            FakeGPU.n_emptied += 1

        return SimpleNamespace(
            get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=empty)
        )

    def memory(self):
        return FakeGPU.free, 10**10

    def use(self):
        return nullcontext()

    def synchronize(self):
        pass

    def __str__(self):
        return "a fake GPU"


def test_times_are_taken_on_the_device_that_multiplies(monkeypatch):
    """Another GPU may be the current one: between events of two of them there is no time."""
    current = []

    class SecondGPU(FakeGPU):
        @contextmanager
        def use(self):
            current.append(self.index)
            yield
            current.pop()

    recorded, waited = [], []

    def event():
        recorded.append(list(current))
        return SimpleNamespace(synchronize=lambda: waited.append(list(current)))

    monkeypatch.setattr(blocked.Trace, "event", staticmethod(event))
    blocked.Trace(SecondGPU("gpu", 1))
    assert recorded == waited == [[1]]


@pytest.mark.parametrize(("processors", "threads"), [(1, 1), (2, 1), (16, 12), (22, 16), (128, 16)])
def test_pinned_buffers_take_half_a_gib_on_the_largest_host(monkeypatch, processors, threads):
    from gpuml import staging

    monkeypatch.setattr(staging, "cpu_count", lambda: processors)
    assert staging.copy_threads() == threads
    assert 2 * threads * staging.BUFFERS_EACH * staging.BUFFER_BYTES <= 2**29


class OutOfMemoryError(MemoryError):
    """As CuPy calls it."""


@pytest.fixture
def full_gpu(monkeypatch):
    """A GPU that multiplies on the CPU, and has no room for buffers above a bound.

    At first it has: so many tiles are finished before others take the memory.
    """
    real = blocked.Trace

    def multiply(work, plan, steps, trace, n_threads):
        multiply.tried.append(plan.memory)
        tile = []
        for step in steps:
            if plan.memory > multiply.bound and multiply.n_tiles == 0:
                raise multiply.error
            tile.append(step)
            if step.last:
                blocked._multiply_on_host(work, plan, tile, trace)
                tile = []
                multiply.n_tiles -= 1

    multiply.bound, multiply.n_tiles, multiply.tried = 0, 0, []
    multiply.error = OutOfMemoryError("Out of memory allocating 512 bytes")
    monkeypatch.setattr(FakeGPU, "free", 10**9)
    monkeypatch.setattr(FakeGPU, "n_emptied", 0)
    monkeypatch.setattr(blocked, "_multiply_on_gpu", multiply)
    monkeypatch.setattr(blocked, "Trace", lambda _: real(CPU))
    return multiply


def test_where_memory_is_taken_smaller_tiles_go_on_and_say_so(full_gpu, rng):
    a, b = rng.normal(size=(300, 300)), rng.normal(size=(300, 200))
    full_gpu.bound = 400_000
    with pytest.warns(ResourceWarning, match="taken by others") as caught:
        c, report = blocked_matmul(
            a, b, memory_limit="2 MiB", device=FakeGPU("gpu"), return_report=True
        )
    assert_right(c, a, b)
    assert {warning.filename for warning in caught} == {__file__}, "it shows where it was called"
    tried = full_gpu.tried
    assert len(caught) == len(report.notes) == len(tried) - 1 >= 1
    for before, after, note, warning in zip(tried, tried[1:], report.notes, caught, strict=False):
        assert after <= before / 2
        assert f"tiles of {blocking.size_text(before)} did not fit" in note
        assert f"going on with {blocking.size_text(after)}" in note
        assert str(warning.message) == note
        assert note in str(report)
    assert report.plan.memory == tried[-1] <= 400_000
    assert tried[-2] > 400_000
    assert FakeGPU.n_emptied >= len(report.notes), "what our own pool keeps is not free"


def test_tiles_finished_before_memory_was_taken_stay(full_gpu, rng, monkeypatch):
    a, b = rng.normal(size=(300, 300)), rng.normal(size=(300, 200))
    full_gpu.bound, full_gpu.n_tiles = 200_000, 3
    multiply = Multiply(monkeypatch)
    plan = plan_for(a, b, memory_limit="400 KiB", device=FakeGPU("gpu"))
    assert plan.n_tiles > 4
    assert plan.memory > 200_000
    with pytest.warns(ResourceWarning):
        c, report = blocked_matmul(
            a, b, memory_limit="400 KiB", device=FakeGPU("gpu"), return_report=True
        )
    assert_right(c, a, b)
    done = np.zeros(c.shape, bool)
    for step in [step for step in plan.steps() if step.last][:3]:
        done[step.rows, step.columns] = True
    rest = [s for s in report.plan.steps() if not done[s.rows, s.columns].all()]
    assert len(rest) < report.plan.n_steps, "the test is not about what it should be"
    expected = 2 * 300 * done.sum() + sum(2 * math.prod(step.sizes) for step in rest)
    assert multiply.n_operations == expected
    assert report.n_steps == 3 * plan.counts[2] + len(rest), "those that failed are no steps done"


def test_no_more_is_asked_for_than_is_free(full_gpu, rng, monkeypatch):
    a, b = rng.normal(size=(300, 300)), rng.normal(size=(300, 200))
    monkeypatch.setattr(FakeGPU, "free", 100_000)
    full_gpu.bound = 100_000
    with pytest.warns(ResourceWarning):
        c = blocked_matmul(a, b, memory_limit="2 MiB", device=FakeGPU("gpu"))
    assert_right(c, a, b)
    assert len(full_gpu.tried) == 2
    assert full_gpu.tried[1] <= 80_000


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("free", [10**9, 5000, 0])
def test_where_not_even_the_smallest_tile_fits_the_numbers_are_told(
    full_gpu, rng, monkeypatch, free
):
    a, b = rng.normal(size=(300, 300)), rng.normal(size=(300, 200))
    monkeypatch.setattr(FakeGPU, "free", free)
    with pytest.raises(gpuml.DeviceMemoryError, match="did not fit") as caught:
        blocked_matmul(a, b, memory_limit="2 MiB", device=FakeGPU("gpu"))
    assert isinstance(caught.value, MemoryError)
    last = blocking.size_text(full_gpu.tried[-1])
    for text in (f"has {blocking.size_text(free)} free", f"tiles of {last} did not fit", "needs"):
        assert text in str(caught.value)
    assert "(OutOfMemoryError Out of memory allocating 512 bytes)" in str(caught.value)
    assert "memory_limit=" not in str(caught.value), "no limit would help"


@pytest.mark.parametrize("free", [0, 1000])
def test_without_a_limit_too_little_memory_is_the_device_s_fault(rng, monkeypatch, free):
    monkeypatch.setattr(FakeGPU, "free", free)
    a = rng.normal(size=(300, 300))
    with pytest.raises(gpuml.DeviceMemoryError, match=r"has .* to spare: the smallest tile needs"):
        blocked_matmul(a, a, device=FakeGPU("gpu"))


def test_what_an_error_of_a_thread_keeps_is_given_back_first(full_gpu, rng, monkeypatch):
    """Such an error and its transfer know each other: only the collector can free them."""
    held, found = [], []

    class Transfer:
        pass

    def allocate(work, plan, steps, trace, n_threads):
        found.append(sum(reference() is not None for reference in held))
        transfer = Transfer()
        held.append(weakref.ref(transfer))
        try:
            raise OutOfMemoryError("Out of memory")
        except OutOfMemoryError as error:
            transfer.error = error
            raise

    monkeypatch.setattr(blocked, "_multiply_on_gpu", allocate)
    gc.disable()
    try:
        with pytest.raises(gpuml.DeviceMemoryError), pytest.warns(ResourceWarning):
            blocked_matmul(rng.normal(size=(200, 200)), np.eye(200), device=FakeGPU("gpu"))
    finally:
        gc.enable()
    assert len(found) > 2
    assert set(found) == {0}


@pytest.mark.parametrize(
    ("name", "text", "goes_on"),
    [
        ("OutOfMemoryError", "Out of memory allocating 99 bytes", True),
        ("CUDARuntimeError", "cudaErrorMemoryAllocation: out of memory", True),
        ("CUBLASError", "CUBLAS_STATUS_ALLOC_FAILED", True),
        ("CUBLASError", "CUBLAS_STATUS_NOT_INITIALIZED", True),
        ("CUDADriverError", "CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("CUDARuntimeError", "cudaErrorIllegalAddress", False),
        ("ValueError", "wrong", False),
    ],
)
def test_only_for_want_of_memory_it_goes_on(full_gpu, rng, name, text, goes_on):
    a = rng.normal(size=(200, 200))
    full_gpu.bound, full_gpu.error = 400_000, type(name, (Exception,), {})(text)
    if goes_on:
        with pytest.warns(ResourceWarning):
            assert_right(blocked_matmul(a, a, memory_limit="2 MiB", device=FakeGPU("gpu")), a, a)
    else:
        with pytest.raises(Exception, match=text) as caught:
            blocked_matmul(a, a, memory_limit="2 MiB", device=FakeGPU("gpu"))
        assert caught.value is full_gpu.error


def test_a_cpu_that_runs_out_of_memory_says_so(rng, monkeypatch):
    Multiply(monkeypatch, 3, error=OutOfMemoryError("Unable to allocate"))
    a = rng.normal(size=(200, 200))
    with pytest.raises(OutOfMemoryError):
        blocked_matmul(a, a, memory_limit="100 KiB", device="cpu")


# --- reports -----------------------------------------------------------------------------------


def spans(*pairs):
    return np.array(pairs, float)


def test_the_length_of_a_union():
    assert _union(spans((0, 1))) == 1
    assert _union(spans((0, 1), (2, 4))) == 3
    assert _union(spans((0, 2), (1, 4))) == 4
    assert _union(spans((0, 10), (1, 2), (3, 4))) == 10, "one within another"
    assert _union(spans((0, 10), (1, 2), (11, 12))) == 11
    assert _union(spans((5, 6), (6, 7))) == 2


@quick
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1))
def test_the_length_of_any_union(pieces):
    covered = {second for begin, n in pieces for second in range(begin, begin + n)}
    pairs = sorted((begin, begin + n) for begin, n in pieces)
    assert _union(spans(*pairs)) == len(covered)


@pytest.fixture
def report():
    """10 s: the bus is busy for 8, two threads of the host for 6 and 4, the device for 5."""
    plan = blocking.plan_blocks(64, 48, 200, 4, 30_000, buffers=2)
    return BlockReport(
        plan,
        "a device",
        seconds=10.0,
        spans={
            FILL: spans((0, 4), (1, 3), (5, 7), (6, 8)),
            IN: spans((0, 4), (2, 5), (6, 9)),
            MULTIPLY: spans((4, 6), (7, 10)),
        },
        n_threads={FILL: 2, EMPTY: 1},
        n_steps=plan.n_steps,
    )


def test_how_long_each_kind_of_work_was_under_way(report):
    assert report.busy == {FILL: 5.0, IN: 8.0, MULTIPLY: 5.0}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (FILL, "host memory"),
        (EMPTY, "host memory"),
        (IN, "bus"),
        (OUT, "bus"),
        (MULTIPLY, "arithmetic"),
    ],
)
def test_what_took_longest_is_the_bound(report, kind, name):
    report.n_threads = {}
    report.spans = report.spans | {kind: spans((0, 9.5))}
    assert report.bound == name


def test_how_much_overlapped(report):
    # 18 s of work in 10 s; of the 10 s beside the longest, 8 went on at the same time as others.
    assert report.overlap == pytest.approx(0.8)
    report.seconds = 18.0
    assert report.overlap == 0, "one after the other"
    report.seconds = 30.0
    assert report.overlap == 0, "with pauses"
    report.seconds = 8.0
    assert report.overlap == 1, "no longer than the longest"
    report.seconds = 7.9
    assert report.overlap == 1
    report.spans = {IN: spans((0, 4))}
    assert report.overlap == 1, "there is no other work"
    report.spans = {}
    assert (report.bound, report.busy) == ("nothing", {})


def test_a_report_prints_as_a_table(report):
    lines = str(report).splitlines()
    assert lines[:2] == str(report.plan).splitlines()
    assert lines[2] == "10 s on a device"
    table = {line[:22].strip(): line[22:].split() for line in lines[3:6]}
    assert table == {
        FILL: ["5", "s", "50%"],
        IN: ["8", "s", "80%"],
        MULTIPLY: ["5", "s", "50%"],
    }
    assert lines[6:] == ["bound by bus; 80% of the rest overlapped"]
    assert report.predicted is None
    report.rates, report.notes = RATES, ["something else"]
    lines = str(report).splitlines()
    expected = report.plan.predict(RATES)
    assert report.predicted == expected["total"]
    assert lines[2] == f"10 s on a device; predicted {blocked.duration(expected['total'])}"
    assert lines[4].endswith(f"predicted {blocked.duration(expected[IN])}")
    assert lines[-1] == "something else"


def test_a_report_comes_back_from_json(report):
    for rates, notes in ((None, []), (RATES, ["a note"])):
        report.rates, report.notes = rates, notes
        again = BlockReport.from_json(json.loads(json.dumps(report.to_json())))
        assert str(again) == str(report)
        assert (again.plan, again.rates, again.notes) == (report.plan, rates, notes)
        assert again.spans.keys() == report.spans.keys()
        for kind, pieces in report.spans.items():
            np.testing.assert_array_equal(again.spans[kind], pieces)


def test_a_report_is_drawn(report):
    matplotlib.use("Agg")
    figure = report.plot()
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [FILL, IN, MULTIPLY]
    assert [len(bars.get_paths()) for bars in axis.collections] == [4, 3, 2]
    assert "(64 × 200) @ (200 × 48)" in axis.get_title()
    assert "a device" in axis.get_title()
    _, here = plt.subplots()
    assert report.plot("My title", here) is here.figure
    assert here.get_title() == "My title"
    plt.close("all")


def test_a_real_report_fits_together(device, rng):
    a, b = rng.normal(size=(900, 1000)), rng.normal(size=(1000, 800))
    begin = time.perf_counter()
    _, report = blocked_matmul(a, b, memory_limit="4 MiB", device=device, return_report=True)
    elapsed = time.perf_counter() - begin
    assert 0 < report.seconds <= elapsed
    kinds = {MULTIPLY} if device.kind == "cpu" else {FILL, IN, MULTIPLY, OUT, EMPTY}
    assert set(report.spans) == kinds
    for times in report.spans.values():
        assert (times[:, 0] <= times[:, 1]).all()
        assert (np.diff(times[:, 0]) >= 0).all()
        assert times.min() >= 0
        assert times.max() <= report.seconds * 1.01 + 1e-3
    assert len(report.spans[MULTIPLY]) >= report.n_steps == report.plan.n_steps > 1
    assert all(0 < seconds <= report.seconds * 1.01 + 1e-3 for seconds in report.busy.values())
    assert 0 <= report.overlap <= 1
    assert report.rates is RATES
    assert report.plan.predict(RATES)["total"] > 0
    assert device.name in str(report)
    matplotlib.use("Agg")
    assert len(report.plot().axes[0].collections) == len(kinds)
    plt.close("all")


def test_rates_are_measured(device, monkeypatch):
    monkeypatch.undo()
    for dtype in ("float32", "int32"):
        rates = blocked.measure_rates(device, dtype)
        assert 1e6 < rates.arithmetic < 1e16
        copies = [rates.fill, rates.empty, rates.bus_in, rates.bus_out]
        if device.kind == "cpu":
            assert copies == [math.inf] * 4
        else:
            assert all(1e8 < rate < 1e13 for rate in copies)
        assert blocked.measure_rates(device, dtype) is rates, "once is enough"


def test_the_rates_are_those_of_the_product(device, rng, monkeypatch):
    asked = []
    monkeypatch.setattr(blocked, "measure_rates", lambda *what: asked.append(what) or RATES)
    a = rng.normal(size=(9, 9)).astype(np.float32)
    blocked_matmul(a, a, device=device, precision="tf32", return_report=True)
    blocked_matmul(a.astype(int), a, device=device, return_report=True)
    blocked_matmul(a, a, device=device)
    asked = [(where, np.dtype(dtype).name, *rest) for where, dtype, *rest in asked]
    assert asked == [(device, "float32", "tf32", None), (device, "float64", None, None)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex128", "int8"])
@pytest.mark.parametrize("limit", [None, "64 GiB", "1 GiB", "512 MiB", "96 MiB", "20 MiB"])
def test_on_a_gpu_rates_are_measured_within_the_limit(monkeypatch, dtype, limit):
    monkeypatch.undo()
    n_bytes, taken = math.inf if limit is None else blocking.parse_size(limit), []

    def arithmetic(device, dtype, precision, size):
        size //= 1 if dtype.kind == "f" else 4
        taken.append(size**2 * (dtype.itemsize + (4 if dtype == "f2" else dtype.itemsize)))
        return 1e12

    monkeypatch.setattr(blocked, "_arithmetic_rate", arithmetic)
    monkeypatch.setattr(blocked, "_copy_rates", lambda _, n: taken.append(n) or [1e9] * 4)
    monkeypatch.setattr(FakeGPU, "n_emptied", 0)
    blocked._measured.cache_clear()
    rates = blocked.measure_rates(FakeGPU("gpu"), dtype, None, limit)
    blocked._measured.cache_clear()
    assert rates == Rates(1e9, 1e9, 1e9, 1e9, 1e12)
    assert n_bytes / 32 < max(taken) <= n_bytes * 7 / 8 or max(taken) >= 2**28
    assert max(taken) <= n_bytes
    assert FakeGPU.n_emptied == 1, "others may have the memory then"


@pytest.mark.parametrize("error", ["OutOfMemoryError", "ValueError"])
def test_without_memory_to_measure_the_product_is_returned_all_the_same(
    full_gpu, rng, monkeypatch, error
):
    asked = []

    def full(*what):
        asked.append(what)
        raise type(error, (Exception,), {})("no rates")

    monkeypatch.setattr(blocked, "measure_rates", full)
    full_gpu.bound = 10**9
    a = rng.normal(size=(200, 200))
    options = {"memory_limit": "1 MiB", "device": FakeGPU("gpu"), "return_report": True}
    if error == "ValueError":
        with pytest.raises(Exception, match="no rates") as caught:
            blocked_matmul(a, a, **options)
        assert type(caught.value).__name__ == error
        return
    c, report = blocked_matmul(a, a, **options)
    assert_right(c, a, a)
    assert report.predicted is report.rates is None
    assert "no memory left to measure" in str(report)
    assert [rest for _, _, *rest in asked] == [[None, 2**20]]


def test_a_progress_bar_is_shown_where_it_is_wanted(device, rng, capsys, monkeypatch):
    a = rng.normal(size=(100, 100))
    for wanted in (None, False):
        blocked_matmul(a, a, device=device, progress=wanted)
        assert capsys.readouterr().err == "", "standard error is no terminal here"
    many_tiles(a, a, device, progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "2.00M/2.00M" in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    many_tiles(a, a, device)
    assert "100%" in capsys.readouterr().err, "on a terminal it is shown unasked"
    many_tiles(a, a, device, progress=False)
    assert capsys.readouterr().err == ""


def test_a_function_is_told_of_each_finished_tile(device, rng, tmp_path):
    a, b = rng.normal(size=(150, 140)), rng.normal(size=(140, 130))
    told = []
    _, report = many_tiles(a, b, device, progress=lambda *counts: told.append(counts))
    n_tiles = report.plan.n_tiles
    assert told == [(i + 1, n_tiles) for i in range(n_tiles)]
    assert report.n_tiles == n_tiles


def test_a_function_that_is_told_may_stop_it(job):
    """What it was told of is noted already."""

    def stop(n_done, n_tiles):
        if n_done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(progress=stop)
    assert len(noted(job.path)) == 7
    told = []
    report = job.run(resume=True, progress=lambda *counts: told.append(counts))
    left = report.n_tiles
    assert left == report.plan.n_tiles - 7
    assert told == [(i + 1, left) for i in range(left)], "at the end all are done"
    job.assert_finished()


def test_a_bar_begins_with_what_was_finished_before(job, monkeypatch, capsys):
    tiles = job.interrupt(monkeypatch, 150)
    job.run(resume=True, progress=True)
    shown = capsys.readouterr().err
    assert "100%" in shown
    assert "10.2M/10.2M" in shown
    percentages = [int(number) for number in re.findall(r"(\d+)%\|", shown)]
    assert percentages[0] == 0, "before it is known what was finished"
    assert percentages[1] == pytest.approx(100 * area(tiles) / job.out.size, abs=1)


def test_with_smaller_tiles_the_bar_comes_to_its_end(full_gpu, rng, capsys):
    a, b, told = rng.normal(size=(300, 300)), rng.normal(size=(300, 200)), []
    full_gpu.bound, full_gpu.n_tiles = 200_000, 3
    for progress in (True, lambda *counts: told.append(counts)):
        full_gpu.n_tiles = 3
        with pytest.warns(ResourceWarning):
            blocked_matmul(a, b, memory_limit="400 KiB", device=FakeGPU("gpu"), progress=progress)
    assert "36.0M/36.0M" in capsys.readouterr().err
    done, n_tiles = zip(*told, strict=True)
    assert list(done) == [*range(1, len(done) + 1)]
    assert n_tiles[-1] == done[-1]


# --- on a GPU only -----------------------------------------------------------------------------


@contextmanager
def limited_arena(monkeypatch, gpu, bound):
    """Let buffers above a bound find no memory; yield the sizes that were asked for."""
    error = gpu.xp.cuda.memory.OutOfMemoryError
    real, asked = blocked._arena, []

    @contextmanager
    def arena(device, n_bytes):
        asked.append(n_bytes)
        if n_bytes > bound:
            raise error(n_bytes, 0)
        with real(device, n_bytes) as memory:
            yield memory

    with monkeypatch.context() as patch:
        patch.setattr(blocked, "_arena", arena)
        yield asked


def test_a_full_gpu_is_met_with_smaller_tiles(gpu, rng, monkeypatch):
    a, b = rng.normal(size=(700, 600)), rng.normal(size=(600, 500))
    with limited_arena(monkeypatch, gpu, 10**6) as asked, pytest.warns(ResourceWarning) as caught:
        c, report = blocked_matmul(a, b, memory_limit="16 MiB", device=gpu, return_report=True)
    assert_right(c, a, b)
    assert len(asked) == len(report.notes) + 1 == len(caught) + 1 > 1
    assert report.plan.memory == asked[-1] <= 10**6 < asked[-2]
    assert all(note in str(report) for note in report.notes)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_gpu_without_room_for_the_smallest_tile(gpu, rng, monkeypatch):
    a = rng.normal(size=(200, 200))
    with (
        limited_arena(monkeypatch, gpu, 0),
        pytest.raises(gpuml.DeviceMemoryError, match=r"has .* free, and tiles of .* did not fit"),
    ):
        blocked_matmul(a, a, memory_limit="1 MiB", device=gpu)


def test_memory_that_runs_out_on_the_way(gpu, rng, monkeypatch):
    """cuBLAS may find none when the buffers have found theirs; finished tiles stay."""
    a, b = rng.normal(size=(700, 600)), rng.normal(size=(600, 500))
    real, calls = blocked.multiply_into, 0

    def fails_once(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 40:
            raise gpu.xp.cuda.memory.OutOfMemoryError(10, 0)
        real(*arguments, **options)

    monkeypatch.setattr(blocked, "multiply_into", fails_once)
    with pytest.warns(ResourceWarning):
        c = blocked_matmul(a, b, memory_limit="400 KiB", device=gpu)
    assert_right(c, a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32"])
def test_pinned_operands_and_results(gpu, rng, many_strips, dtype):
    import cupyx

    def pinned(x):
        there = cupyx.empty_pinned(x.shape, x.dtype)
        there[...] = x
        return there

    x, y = numbers(rng, (200, 150), np.dtype(dtype)), numbers(rng, (150, 170), np.dtype(dtype))
    a, b, out = pinned(x), pinned(y), pinned(np.full((200, 170), 3, dtype))
    with np.errstate(all="ignore"):
        c, report = many_tiles(a, b, gpu, out=out)
    assert c is out
    assert_right(c, x, y)
    assert FILL not in report.spans, "what is pinned is copied straight"
    assert (EMPTY in report.spans) is (dtype == "float16"), "sums of float16 are converted"
    assert {IN, OUT, MULTIPLY} <= set(report.spans)


@pytest.mark.parametrize(
    "view", ["columns", "stepped", "reversed", "reversed rows", "Fortran", "one row", "windows"]
)
def test_parts_of_pinned_arrays(gpu, rng, view):
    import cupyx

    def make(m, n):
        x = cupyx.empty_pinned((m, n), np.float32)
        x[...] = rng.normal(size=(m, n))
        return x

    a, b = VIEWS[view](make, 150, 140), VIEWS[view](make, 140, 130)
    out = VIEWS[view](make, 150, 130) if view in WRITABLE else None
    c, _ = many_tiles(a, b, gpu, out=out)
    assert_right(c, a, b)


def test_strips_of_small_tiles_at_the_edges_do_not_overwrite_others(gpu, rng, monkeypatch):
    """Slow the way back: a tile must not begin where strips of the one before still lie."""
    from gpuml import staging

    monkeypatch.setattr(blocking, "STRIP_BYTES", 4096)
    real = staging.Transfer.copy

    def slowly(self, i, pinned):
        if self.after is not None:
            time.sleep(0.001)
        return real(self, i, pinned)

    monkeypatch.setattr(staging.Transfer, "copy", slowly)
    for m, n, k in ((240, 235, 150), (97, 184, 108), (600, 330, 500), (130, 1000, 70)):
        a, b = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((m, k), (k, n)))
        limit = smallest_limit(a, b, gpu)
        for times in (1, 2, 5):
            c, report = blocked_matmul(
                a, b, memory_limit=limit * times, device=gpu, return_report=True
            )
            np.testing.assert_array_equal(c, a @ b, str(report.plan))


@pytest.mark.alone
@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "bool"])
def test_the_device_memory_stays_within_the_limit(gpu, rng, monkeypatch, dtype):
    """Measured at the buffers, and by what the driver says is free."""
    a = rng.integers(0, 2, (3000, 4000)).astype(dtype)
    b = rng.integers(0, 2, (4000, 2500)).astype(dtype)
    limit = 20 * 2**20
    options = {"memory_limit": limit, "device": gpu, "return_report": True}
    blocked_matmul(a[:200], b, **options)  # cuBLAS takes its memory
    gpu.xp.get_default_memory_pool().free_all_blocks()
    sizes, free, stop = [], [], threading.Event()
    real = blocked._arena
    monkeypatch.setattr(blocked, "_arena", lambda d, n: sizes.append(n) or real(d, n))
    before, _ = gpu.xp.cuda.runtime.memGetInfo()

    def sample():
        with gpu.use():
            while not stop.is_set():
                free.append(gpu.xp.cuda.runtime.memGetInfo()[0])
                time.sleep(1e-4)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        c, report = blocked_matmul(a, b, **options)
    finally:
        stop.set()
        thread.join()
    assert sizes == [report.plan.memory]
    assert report.plan.n_tiles > 1
    assert len(free) > 3
    assert sizes[0] / 2 < before - min(free) <= limit
    gpu.xp.get_default_memory_pool().free_all_blocks()
    assert before - gpu.xp.cuda.runtime.memGetInfo()[0] < 4 * 2**20, "all is given back"
    assert_right(c[:9], a[:9], b)


def test_two_threads_multiply_at_once(device, rng):
    a, b = rng.normal(size=(300, 280)), rng.normal(size=(280, 260))
    limit = smallest_limit(a, b, device) * 3
    results = {}

    def work(i):
        results[i] = blocked_matmul(a + i, b, memory_limit=limit, device=device)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    before = threading.active_count()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert threading.active_count() == before
    for i in range(2):
        assert_right(results[i], a + i, b)


def test_no_thread_is_left(device, rng):
    a = rng.normal(size=(300, 300))
    before = set(threading.enumerate())
    many_tiles(a, a, device)
    assert set(threading.enumerate()) == before
