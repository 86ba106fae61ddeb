"""The order of copies and products on a GPU, by a simulation that runs on any machine."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
import simulated_gpu as simulated

import gpuml
from gpuml import blocked, blocking, staging

KINDS = {blocking.FILL, blocking.IN, blocking.MULTIPLY, blocking.OUT, blocking.EMPTY}


@pytest.fixture
def gpu(monkeypatch):
    for name, module in simulated.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(blocked, "multiply_into", simulated.multiply_into)
    monkeypatch.setattr(blocked, "measure_rates", lambda *_: None)
    monkeypatch.setattr(staging, "cpu_count", lambda: 6)
    yield simulated.SimulatedGPU("gpu")
    for stream in simulated.Stream.all.values():
        stream.stop()


def random_product(rng, monkeypatch):
    """Small integers, whose products are exact: of any shape, in any order, cut in any way."""
    m, n, k = rng.integers(1, 200, 3).tolist()
    dtype = np.dtype(rng.choice(["f4", "f2", "f8", "i4", ">f4"]))
    turned, stepped = rng.random(2) < 0.3
    a, b = (rng.integers(-5, 6, shape).astype(dtype) for shape in ((m, k), (k, n)))
    a, b = (np.asfortranarray(x) if turned else x for x in (a, b))
    a = np.repeat(a, 2, axis=1)[:, ::2] if stepped else a
    monkeypatch.setattr(staging, "BUFFER_BYTES", int(rng.choice([256, 2048, 65536])))
    monkeypatch.setattr(blocking, "STRIP_BYTES", int(rng.choice([512, 4096, 2**25])))
    monkeypatch.setattr(simulated.Runtime, "pinned", bool(rng.random() < 0.3))
    monkeypatch.setattr(simulated.Stream, "delay", float(rng.choice([0, 2e-4, 1e-3])))
    return a, b


def least_limit(a, b, gpu) -> int:
    with pytest.raises(gpuml.DataError) as caught:
        gpuml.plan_for(a, b, memory_limit=1, device=gpu)
    return int(str(caught.value).partition("memory_limit=")[2].split()[0])


def workers() -> set[threading.Thread]:
    """All threads but those that stand for streams."""
    return {thread for thread in threading.enumerate() if thread.name != "stream"}


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_late_the_product_is_right(gpu, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    a, b = random_product(rng, monkeypatch)
    limit = int(least_limit(a, b, gpu) * rng.choice([1, 1.5, 2, 4, 10]))
    before = workers()
    c, report = gpuml.blocked_matmul(a, b, memory_limit=limit, device=gpu, return_report=True)
    exact = (a.astype(float) @ b.astype(float)).astype(c.dtype)
    np.testing.assert_array_equal(c, exact, str(report.plan))
    assert {blocking.IN, blocking.MULTIPLY, blocking.OUT} <= set(report.spans) <= KINDS
    for kind, times in report.spans.items():
        assert (times >= 0).all(), f"{kind}: before the clock began"
    assert workers() == before, "threads that copy have ended"


def test_the_clock_begins_before_all_that_is_timed(gpu, monkeypatch):
    """Though its event is in another stream, and that stream is late."""
    event = staging.Trace.event

    def late():
        simulated.Stream.current().queue(lambda: time.sleep(0.05))
        return event()

    with monkeypatch.context() as patch:
        patch.setattr(staging.Trace, "event", staticmethod(late))
        trace = staging.Trace(gpu)
    stream = simulated.Stream(non_blocking=True)
    trace.on_device(blocking.IN, stream.record(), stream.record())
    gpu.synchronize()
    [[begin, end]] = trace.spans()[blocking.IN]
    assert 0 <= begin <= end


@pytest.mark.parametrize("way", ["_fill", "_empty"])
def test_an_error_of_a_thread_that_copies_is_told_and_all_threads_end(gpu, monkeypatch, way):
    calls, real = [], getattr(staging.Stager, way)

    def fails(*arguments):
        calls.append(way)
        if len(calls) == 5:
            raise OSError("unreadable")
        real(*arguments)

    monkeypatch.setattr(staging.Stager, way, fails)
    monkeypatch.setattr(staging, "BUFFER_BYTES", 2048)
    a = np.ones((150, 150))
    before = workers()
    with pytest.raises(OSError, match="unreadable"):
        gpuml.blocked_matmul(a, a, memory_limit=least_limit(a, a, gpu), device=gpu)
    assert workers() == before
