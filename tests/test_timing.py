from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gpuml
from gpuml import timing
from gpuml.devices import CPU
from gpuml.timing import Ceilings, Comparison, Measurement, Row, benchmark, compare_devices


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def measurement(seconds=2.0, **changes) -> Measurement:
    known = {"low": 1.0, "high": 3.0, "first": 5.0, "n_repeats": 9, "device": "a device"}
    return Measurement(**({"seconds": seconds} | known | changes))


@pytest.mark.alone
def test_a_function_of_known_length_is_measured_right():
    measured = benchmark(time.sleep, 0.02, device="cpu", time_budget=0.3)
    assert 0.02 <= measured.low <= measured.seconds <= measured.high < 0.03
    assert 10 <= measured.n_repeats <= 16


@pytest.mark.alone
def test_short_functions_are_not_drowned_by_the_clock():
    def nothing():
        pass

    measured = benchmark(nothing, device="cpu", time_budget=0.1)
    alone = min(timing_of(nothing, 1000) for _ in range(20))
    assert measured.seconds < 3 * alone + 1e-7


def timing_of(function, n):
    start = time.perf_counter()
    for _ in range(n):
        function()
    return (time.perf_counter() - start) / n


@pytest.mark.alone
def test_the_first_call_is_timed_apart():
    calls = []

    def slow_at_first():
        calls.append(0)
        time.sleep(0.1 if len(calls) == 1 else 0.002)

    measured = benchmark(slow_at_first, device="cpu", time_budget=0.2)
    assert measured.first >= 0.1
    assert measured.seconds < 0.01


def test_a_function_longer_than_the_budget_is_measured_once_and_says_so():
    calls = []

    def slow():
        calls.append(0)
        time.sleep(0.05)

    measured = benchmark(slow, device="cpu", time_budget=0.002)  # as long as 25 budgets
    assert len(calls) == 1
    assert (measured.n_repeats, measured.seconds) == (1, measured.first)
    assert "measured once: longer than the time budget" in str(measured)

    measured = benchmark(slow, device="cpu", time_budget=0.02)
    assert len(calls) == 3
    assert measured.n_repeats == 1
    assert "measured once: longer than the time budget" in str(measured)


@pytest.mark.alone
def test_a_first_call_that_compiles_is_not_taken_for_the_time():
    calls = []

    def compiled():
        calls.append(0)
        if len(calls) == 1:
            time.sleep(0.1)

    measured = benchmark(compiled, device="cpu", time_budget=0.05)
    assert measured.first > 0.1
    assert measured.seconds < 0.001


@pytest.mark.alone
def test_the_budget_is_kept(device):
    a = device.asarray(np.ones(1000))
    start = time.perf_counter()
    benchmark(lambda a: a + 1, a)
    assert time.perf_counter() - start < 2.0, "a default call"


def test_queued_work_is_waited_for(device):
    """A product takes at least its operations over a rate that no device reaches."""
    n = 4096 if device.kind == "gpu" else 512
    a = device.asarray(np.ones((n, n), np.float32))
    measured = benchmark(device.xp.matmul, a, a, time_budget=0.2, n_operations=2 * n**3)
    assert measured.rate < 1e15
    assert measured.device == str(device)
    assert measured.seconds > 2 * n**3 / 1e15


def test_the_device_is_that_of_the_arrays(device, monkeypatch):
    monkeypatch.delenv("GPUML_DEVICE", raising=False)
    a = device.asarray(np.ones(3))
    assert benchmark(lambda x, a: a, 1, a, time_budget=0.01).device == str(device)
    monkeypatch.setenv("GPUML_DEVICE", "cpu")
    assert benchmark(lambda: 1, time_budget=0.01).device == str(gpuml.get_device("cpu"))


def test_an_exception_is_the_functions_own(device):
    with pytest.raises(ZeroDivisionError):
        benchmark(lambda: 1 / 0, device=device)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_a_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="time_budget"):
        benchmark(lambda: 1, time_budget=budget)


def test_rates_follow_from_bytes_and_operations():
    m = measurement(n_bytes=8e9, n_operations=6e12)
    assert (m.bandwidth, m.rate) == (4e9, 3e12)
    assert m.share(6e12) == 0.5
    assert measurement(n_bytes=8e9).share(16e9) == 0.25
    assert "4 GB/s, 3e+03 GFLOP/s" in str(m)
    with pytest.raises(ValueError, match="n_bytes or n_operations"):
        measurement().share(1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2, "2 s"), (0.0123456, "12.3 ms"), (5e-6, "5 µs"), (1.5e-9, "1.5 ns"), (61.0, "61 s")],
)
def test_durations_have_fitting_units(seconds, text):
    assert timing.duration(seconds) == text


def table(**changes) -> Comparison:
    settings = {"sizes": [4, 8], "dtypes": ["float32", "float64"], "devices": ["cpu"]}
    settings |= {"name": "a sum", "time_budget": 0.002}
    return compare_devices(np.sum, lambda n, dtype: [np.ones(n, dtype)], **(settings | changes))


def test_a_comparison_has_a_row_for_each_size_and_type():
    rows = table().rows
    assert [(r.device, r.size, r.dtype, r.transfers) for r in rows] == [
        ("cpu", 4, "float32", False),
        ("cpu", 8, "float32", False),
        ("cpu", 4, "float64", False),
        ("cpu", 8, "float64", False),
    ]


def test_a_comparison_with_a_gpu_counts_transfers_apart(device):
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    compared = compare_devices(
        lambda a: a + 1,
        lambda n, dtype: [np.ones(n, dtype)],
        sizes=[2**22],
        devices=["cpu", device],
        time_budget=0.05,
    )
    inside = compared.seconds("gpu", 2**22, "float32", transfers=False)
    around = compared.seconds("gpu", 2**22, "float32", transfers=True)
    assert around > 3 * inside, "the way there and back is longer than the work"
    assert compared.speedup("gpu", 2**22, "float32", transfers=True) < compared.speedup(
        "gpu", 2**22, "float32", transfers=False
    )


def test_what_does_not_fit_is_skipped_and_the_rest_measured():
    compared = table(sizes=[4, 2**62], dtypes=["float32"], n_bytes=lambda n, dtype: 4.0 * n)
    assert compared.rows[0].measurement is not None
    assert compared.rows[1].measurement is None
    assert "skipped: needs 1.72e+10 GiB" in compared.rows[1].note
    assert compared.rows[1].note in str(compared)

    def too_much(n, dtype):
        if n > 4:
            raise MemoryError
        return [np.ones(n, dtype)]

    compared = compare_devices(
        np.sum, too_much, sizes=[4, 8, 2], devices=["cpu"], time_budget=0.002
    )
    assert [row.note for row in compared.rows] == ["", "skipped: not enough memory", ""]


def test_an_error_of_the_work_is_not_taken_for_a_result():
    with pytest.raises(TypeError):
        compare_devices(lambda a: a + "x", lambda n, d: [np.ones(n, d)], sizes=[4], devices=["cpu"])


def sample_table() -> Comparison:
    rows = [
        Row("cpu", 8, "float32", False, measurement(4.0)),
        Row("cpu", 16, "float32", False, None, "skipped"),
        Row("gpu", 8, "float32", False, measurement(1.0)),
        Row("gpu", 8, "float32", True, measurement(8.0)),
        Row("gpu", 16, "float32", False, measurement(1.0)),
    ]
    return Comparison("work", {"cpu": "a CPU", "gpu": "a GPU"}, rows)


def test_speedups_are_cpu_over_gpu_and_none_where_unmeasured():
    t = sample_table()
    assert t.speedup("gpu", 8, "float32", transfers=False) == 4.0
    assert t.speedup("gpu", 8, "float32", transfers=True) == 0.5
    assert t.speedup("gpu", 16, "float32", transfers=False) is None
    assert t.speedup("gpu", 99, "float32", transfers=False) is None


def test_a_comparison_survives_json_and_csv(tmp_path):
    t = sample_table()
    assert Comparison.from_json(json.loads(json.dumps(t.to_json()))) == t
    t.to_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seconds"] for row in rows] == ["4.0", "", "1.0", "8.0", "1.0"]
    assert [row["note"] for row in rows] == ["", "skipped", "", "", ""]


def test_pictures_show_the_numbers_and_the_devices():
    figure = sample_table().plot()
    assert "a GPU" in figure.axes[0].get_title()
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines == {
        "cpu, float32": [4.0],
        "gpu, float32": [1.0, 1.0],
        "gpu, float32, with transfers": [8.0],
    }
    texts = [text.get_text() for text in sample_table().plot_crossover().axes[0].texts]
    assert texts == ["4×", "0.5×", "–", "–"]
    with pytest.raises(ValueError, match="needs a GPU"):
        table().plot_crossover()


def test_the_roofline_is_the_lower_of_memory_and_arithmetic():
    ceilings = Ceilings("a device", {"copy": 10.0, "gemm_float32": 100.0, "launch": 1e-6})
    assert ceilings.ridge() == 10.0
    point = measurement(n_bytes=4.0, n_operations=8.0)
    figure = ceilings.plot({"work": point})
    roof, dot, memory = figure.axes[0].lines
    x, y = memory.get_data()
    np.testing.assert_allclose(y, 10.0 * x)  # and no farther than the corner
    assert x[-1] == 10.0
    assert memory.get_label() == "memory: 0 GB/s"
    for x, y in zip(roof.get_xdata(), roof.get_ydata(), strict=True):
        assert y == pytest.approx(min(100.0, 10.0 * x))
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([2.0], [4.0])
    assert figure.axes[0].get_title() == "a device"
    with pytest.raises(ValueError, match="n_bytes and n_operations"):
        ceilings.plot({"work": measurement()})


@pytest.mark.alone
def test_ceilings_are_measured_in_time_and_plausible(device):
    start = time.perf_counter()
    ceilings = timing.device_ceilings(device, time_budget=2.0 if device.kind == "cpu" else 8.0)
    assert time.perf_counter() - start < 20
    values = ceilings.values
    assert 1e9 < values["copy"] < 1e13
    assert 1e9 < values["gemm_float64"] < 2e14
    assert 1e-8 < values["launch"] < 1e-4
    assert ("to_device_pinned" in values) == (device.kind == "gpu")
    if device.kind == "gpu":
        assert values["gemm_float16"] > 2 * values["gemm_float32"]
        assert values["to_device_pinned"] > values["to_device_pageable"]
    assert "GB/s" in str(ceilings)


@pytest.mark.alone
def test_transfers_are_measured_on_a_gpu_only(device):
    if device.kind == "cpu":
        with pytest.raises(ValueError, match="transfers nothing"):
            timing.transfer_bandwidths(device, [1024])
        return
    bandwidths = timing.transfer_bandwidths(device, [2**10, 2**24], time_budget=0.02)
    assert len(bandwidths) == 4
    for small, large in bandwidths.values():
        assert small < large < 1e12


def test_tf32_is_switched_back(device):
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    rng = np.random.default_rng(0)
    a = device.asarray(rng.normal(size=(512, 512)), np.float32)
    before = gpuml.to_host(a @ a)
    with timing.gemm_type("gemm_tf32") as dtype:
        coarse = gpuml.to_host(a.astype(dtype) @ a)
    assert np.abs(coarse - before).max() > 1e-3
    np.testing.assert_array_equal(gpuml.to_host(a @ a), before)


@pytest.mark.alone
def test_times_agree_with_cupyx_and_torch(device):
    """On a GPU, within 3 % of the profilers of CuPy and, where installed, of PyTorch."""
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    script = Path(__file__).parent / "benchmarks" / "timing.py"
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env=os.environ | {"GPUML_DEVICE": "gpu", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    for work, seconds in json.loads(done.stdout)["seconds"].items():
        for profiler in seconds:
            assert seconds["gpuml"] == pytest.approx(seconds[profiler], rel=0.03), (work, profiler)


def test_calls_are_timed_until_they_return_and_until_they_are_finished(device):
    a = device.asarray(np.ones((256, 256), np.float32))
    calls = []
    returned, finished = timing.returned_and_finished(lambda: calls.append(a @ a), device, 5)
    assert len(calls) == 6, "one beforehand"
    assert 0 < returned <= finished


@pytest.mark.alone
def test_on_the_cpu_work_is_finished_when_its_call_returns():
    returned, finished = timing.returned_and_finished(lambda: time.sleep(0.01), CPU, 3)
    assert 0.01 <= returned <= finished < returned + 0.005
