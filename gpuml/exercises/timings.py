"""Exercises of notebook 01: timing what runs in the background, and predicting it."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuml.exercises.judging import Case, Exercise, Tool


class PracticeDevice(Tool):
    """A device with a queue and a clock, both made up, so that a timing can be right or wrong.

    Parameters
    ----------
    launch : float
        Seconds that a call takes to put work into the queue.
    work : float
        Seconds that the device then needs for it.
    first : float
        Seconds that the first call takes in addition.
    queued : float
        Seconds of other work that is in the queue from the beginning.
    """

    def __init__(self, launch: float, work: float, first: float, queued: float) -> None:
        self.launch, self.duration, self.first = launch, work, first
        self.now, self.busy_until, self.n_calls = 100.0, 100.0 + queued, 0

    def clock(self) -> float:
        """Return the seconds on the clock."""
        return self.now

    def work(self) -> None:
        """Put work into the queue."""
        self.now += self.launch + (self.first if self.n_calls == 0 else 0.0)
        self.busy_until = max(self.now, self.busy_until) + self.duration
        self.n_calls += 1

    def synchronize(self) -> None:
        """Wait until the queue is empty."""
        self.now = max(self.now, self.busy_until)


def _seconds_of(work: Any, device: Any, clock: Any) -> float:
    work()
    device.synchronize()
    start = clock()
    work()
    device.synchronize()
    return float(clock() - start)


def _no_synchronize(work: Any, device: Any, clock: Any) -> float:
    work()
    device.synchronize()
    start = clock()
    work()
    return float(clock() - start)


def _first_call(work: Any, device: Any, clock: Any) -> float:
    device.synchronize()
    start = clock()
    work()
    device.synchronize()
    return float(clock() - start)


def _not_empty(work: Any, device: Any, clock: Any) -> float:
    work()
    start = clock()
    work()
    device.synchronize()
    return float(clock() - start)


def _neither(work: Any, device: Any, clock: Any) -> float:
    start = clock()
    work()
    return float(clock() - start)


def _all_of_it(work: Any, device: Any, clock: Any) -> float:
    start = clock()
    work()
    device.synchronize()
    return float(clock() - start)


def _practice(rng: np.random.Generator) -> list[Case]:
    settings = [(1e-6, 2e-2, 0.5, 0.0), (2e-6, 3e-3, 1.0, 3.0)]
    devices = [PracticeDevice(*numbers) for numbers in settings]
    return [{"work": d.work, "device": d, "clock": d.clock} for d in devices]


def _called(work: Any, device: PracticeDevice, clock: Any) -> str | None:
    return None if device.n_calls else "`work` was never called."


def _intensity(m: int, k: int, n: int, itemsize: int) -> float:
    return 2 * m * k * n / (itemsize * (m * k + k * n + m * n))


def _products(rng: np.random.Generator) -> list[Case]:
    sizes = [(8192, 8192, 16, 4), (100, 200, 300, 8)]
    return [dict(zip(("m", "k", "n", "itemsize"), s, strict=True)) for s in sizes]


def _break_even(launch_cpu: float, rate_cpu: float, launch_gpu: float, rate_gpu: float) -> float:
    return (launch_gpu - launch_cpu) / (1 / rate_cpu - 1 / rate_gpu)


def _machines(rng: np.random.Generator) -> list[Case]:
    names = ("launch_cpu", "rate_cpu", "launch_gpu", "rate_gpu")
    # the second GPU is worse in both
    machines = [(5e-7, 1.5e12, 1e-5, 5e13), (1e-6, 2e12, 1e-5, 5e11), (1e-6, 1e11, 2e-5, 1e13)]
    return [dict(zip(names, machine, strict=True)) for machine in machines]


def _predicted(
    launches: int, n_bytes: float, n_operations: float, over_the_bus: float, ceilings: Any
) -> float:
    c = ceilings
    work = max(n_bytes / c["copy"], n_operations / c["gemm_float32"])
    return float(launches * c["launch"] + work + over_the_bus / c["to_device_pageable"])


def _work(rng: np.random.Generator) -> list[Case]:
    names = ("launches", "n_bytes", "n_operations", "over_the_bus", "ceilings")
    gpu = {"copy": 4e12, "gemm_float32": 5e13, "launch": 1e-5, "to_device_pageable": 1e10}
    work = [(1, 4e6, 1e6, 4e6), (100, 1.2e6, 6.6e6, 0.0), (3, 8e8, 1e12, 1e6), (2, 8e9, 1e9, 0.0)]
    return [dict(zip(names, (*w, gpu), strict=True)) for w in work]


EXERCISES = {
    "seconds_of": Exercise(
        solve=_seconds_of,
        cases=_practice,
        watch=_called,
        tolerance=1e-3,  # the mean of many calls has the launch of one of them in it
        mistakes={
            "That is the time to *queue* the work. Call `device.synchronize()` before you read "
            "the clock for the second time.": _no_synchronize,
            "That is the time to queue the work, of the first call at that: synchronize before "
            "the clock is read, and call `work` once beforehand.": _neither,
            "The first call is in it, which takes longer: call `work` once before you start the "
            "clock.": _first_call,
            "Work that was already in the queue is in it: synchronize *before* you start the "
            "clock, too.": _not_empty,
            "The first call and work that was already in the queue are in it: call `work` once "
            "and synchronize, then start the clock.": _all_of_it,
            "The result has a wrong sign: the later reading minus the earlier one.": (
                lambda *a: -_seconds_of(*a)
            ),
            "The result is in milliseconds; seconds are asked for.": (
                lambda *a: 1e3 * _seconds_of(*a)
            ),
        },
    ),
    "intensity": Exercise(
        solve=_intensity,
        cases=_products,
        mistakes={
            "Each of the m · k · n terms is a multiplication *and* an addition: two operations.": (
                lambda m, k, n, itemsize: _intensity(m, k, n, itemsize) / 2
            ),
            "A sum of k terms begins at 0 here: k additions, not k - 1.": (
                lambda m, k, n, itemsize: m * n * (2 * k - 1) / (itemsize * (m * k + k * n + m * n))
            ),
            "That is operations per *number*. A number has `itemsize` bytes.": (
                lambda m, k, n, itemsize: _intensity(m, k, n, itemsize) * itemsize
            ),
            "The result must be written, too: its m · n numbers are missing.": (
                lambda m, k, n, itemsize: 2 * m * k * n / (itemsize * (m * k + k * n))
            ),
            "That is bytes per operation, the other way round.": (
                lambda m, k, n, itemsize: 1 / _intensity(m, k, n, itemsize)
            ),
            "That is the number of operations; divide by the bytes moved.": (
                lambda m, k, n, itemsize: 2 * m * k * n
            ),
        },
    ),
    "break_even": Exercise(
        solve=_break_even,
        cases=_machines,
        mistakes={
            "The sign is wrong: collect n on one side of the equation, the launches on the "
            "other.": lambda *a: -_break_even(*a),
            "Where one device is better in both, the number is negative: leave the sign.": (
                lambda *a: abs(_break_even(*a)),
                lambda *a: max(0.0, _break_even(*a)),
            ),
            "Add times, not rates: an operation takes 1 / rate seconds.": (
                lambda lc, rc, lg, rg: (lg - lc) * (rg - rc)
            ),
            "The CPU's own launch is not free: subtract it.": (
                lambda lc, rc, lg, rg: lg / (1 / rc - 1 / rg)
            ),
            "The GPU needs time for the operations as well: 1 / rate_gpu is missing.": (
                lambda lc, rc, lg, rg: (lg - lc) * rc
            ),
            "That is the time at which both are equally fast; asked for are the operations.": (
                lambda lc, rc, lg, rg: lc + _break_even(lc, rc, lg, rg) / rc
            ),
        },
    ),
    "predicted_seconds": Exercise(
        solve=_predicted,
        cases=_work,
        mistakes={
            "Arithmetic and memory work at the same time: the longer of the two counts, not "
            "their sum.": lambda n, b, o, bus, c: (
                n * c["launch"]
                + b / c["copy"]
                + o / c["gemm_float32"]
                + bus / c["to_device_pageable"]
            ),
            "The shorter of both was taken; the device waits for the longer one.": (
                lambda n, b, o, bus, c: (
                    n * c["launch"]
                    + min(b / c["copy"], o / c["gemm_float32"])
                    + bus / c["to_device_pageable"]
                )
            ),
            "Each launch costs: multiply by their number.": lambda n, b, o, bus, c: _predicted(
                1, b, o, bus, c
            ),
            "What goes over the bus is missing.": lambda n, b, o, bus, c: _predicted(n, b, o, 0, c),
            "The bus was taken for as fast as the memory: its rate is `to_device_pageable`.": (
                lambda n, b, o, bus, c: _predicted(n, b, o, 0, c) + bus / c["copy"]
            ),
            "These do not all happen at the same time: launches and the bus come on top of the "
            "work.": lambda n, b, o, bus, c: max(
                n * c["launch"],
                b / c["copy"],
                o / c["gemm_float32"],
                bus / c["to_device_pageable"],
            ),
        },
    ),
}
