"""Exercises of notebook 00: arrays on the device and back, a first split, comparing with care."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuml.devices import Array, to_host
from gpuml.exercises.judging import Case, Exercise, Tool


class WatchedDevice(Tool):
    """A device that keeps an eye on what is brought to it.

    Parameters
    ----------
    numbers : list of float
        What should be brought.
    """

    def __init__(self, numbers: list[float]) -> None:
        self.numbers, self.n_trips, self.all_there = np.array(numbers), 0, False

    @property
    def xp(self) -> Any:
        """The array library of the device."""
        return self.device.xp

    def asarray(self, a: Any, dtype: Any = None) -> Array:
        """Bring an array to the device."""
        self.n_trips += 1
        brought = np.asarray(to_host(a))
        same_size = brought.size == self.numbers.size
        self.all_there = same_size and np.allclose(brought.ravel(), self.numbers, rtol=1e-6)
        return self.device.asarray(a, dtype)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.device.synchronize()


def _there_and_back(values: Any, device: Any) -> Any:
    there = device.asarray(values)
    return to_host(there * there + 1)


def _trips(values: Any, device: WatchedDevice) -> str | None:
    if device.n_trips == 0:
        return (
            "nothing was brought to the device: the computation ran on the host. "
            "`device.asarray(values)` gives an array that lives there."
        )
    if device.n_trips > 1:
        return (
            f"`device.asarray` was called {device.n_trips} times. Each is a trip over the bus: "
            "bring the data once, and compute with what is there."
        )
    if not device.all_there:
        return (
            "what was brought to the device is something else than `values`: bring the numbers as "
            "they are, and compute there."
        )
    return None


def _row_halves(a: Any, b: Any) -> Any:
    half = len(a) // 2
    return a[:half] @ b, a[half:] @ b


def _relative_error(result: Any, exact: Any) -> float:
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))


def _numbers(rng: np.random.Generator) -> list[Case]:
    lists = [[1.0, 2.0, 3.0], rng.normal(size=12).tolist()]
    return [{"values": numbers, "device": WatchedDevice(numbers)} for numbers in lists]


def _pairs(rng: np.random.Generator) -> list[Case]:
    shapes = [((4, 3), (3, 2)), ((7, 5), (5, 6)), ((6, 6), (6, 6))]
    whole = [[rng.integers(-9, 10, s).astype(np.float32) for s in pair] for pair in shapes]
    return [{"a": a, "b": b} for a, b in whole]


def _results(rng: np.random.Generator) -> list[Case]:
    exact = 50 * rng.normal(size=(20, 30))
    return [
        {"result": exact * 1.25, "exact": exact},
        {"result": exact + rng.normal(size=exact.shape), "exact": exact},
    ]


EXERCISES = {
    "there_and_back": Exercise(
        solve=_there_and_back,
        cases=_numbers,
        watch=_trips,
        mistakes={
            "Is it the square *plus one*?": lambda v, d: to_host(d.asarray(v)) ** 2,
            "The square of a number is the number times itself, not twice the number.": (
                lambda v, d: 2 * to_host(d.asarray(v)) + 1
            ),
            "One was added before squaring.": lambda v, d: (to_host(d.asarray(v)) + 1) ** 2,
        },
        host_result=True,
    ),
    "row_halves": Exercise(
        solve=_row_halves,
        cases=_pairs,
        mistakes={
            "These are the left and the right half of the product: the *columns* were split.": (
                lambda a, b: (a @ b[:, : b.shape[1] // 2], a @ b[:, b.shape[1] // 2 :])
            ),
            "The two halves came in the wrong order: the upper rows first.": (
                lambda a, b: _row_halves(a, b)[::-1]
            ),
            "A row is missing: with an odd number of rows, `[half:]` must begin where `[:half]` "
            "ended.": lambda a, b: (a[: len(a) // 2] @ b, a[-(len(a) // 2) :] @ b),
            "The upper half has M // 2 rows; the rest belongs to the lower one.": (
                lambda a, b: (a[: (len(a) + 1) // 2] @ b, a[(len(a) + 1) // 2 :] @ b)
            ),
            "Both halves of `a` need all of `b`; only half of the inner sum is there.": (
                lambda a, b: (
                    a[: len(a) // 2, : len(b) // 2] @ b[: len(b) // 2],
                    a[len(a) // 2 :, len(b) // 2 :] @ b[len(b) // 2 :],
                )
            ),
            "This is the product of `b` with `a`; the order of factors counts.": (
                lambda a, b: _row_halves(b, a)
            ),
        },
    ),
    "relative_error": Exercise(
        solve=_relative_error,
        cases=_results,
        mistakes={
            "That is the *absolute* error. Divide by the size of the exact result.": (
                lambda result, exact: np.linalg.norm(result - exact)
            ),
            "It is divided by the size of the result. The exact one is the reference.": (
                lambda result, exact: np.linalg.norm(result - exact) / np.linalg.norm(result)
            ),
            "The squares are not rooted: the norm is the root of the sum of squares.": (
                lambda result, exact: ((result - exact) ** 2).sum() / (exact**2).sum()
            ),
            "Differences of both signs cancel in a plain sum: square them first.": (
                lambda result, exact: (result - exact).sum() / exact.sum()
            ),
        },
    ),
}
