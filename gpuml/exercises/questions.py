"""Exercises of the frequent questions: does a GPU pay, what fits, equal up to rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from gpuml.devices import array_module
from gpuml.exercises.judging import Case, Exercise

Rates: TypeAlias = Mapping[str, float]


def _call(n_bytes: float, n_operations: float, rates: Rates) -> float:
    return rates["launch"] + max(n_bytes / rates["memory"], n_operations / rates["arithmetic"])


def _gpu_speedup(
    n_bytes: float, n_operations: float, n_calls: int, cpu: Rates, gpu: Rates
) -> float:
    on_gpu = n_bytes / gpu["bus"] + n_calls * _call(n_bytes, n_operations, gpu)
    return n_calls * _call(n_bytes, n_operations, cpu) / on_gpu


def _no_bus(n_bytes: float, n_operations: float, n_calls: int, cpu: Rates, gpu: Rates) -> float:
    return _call(n_bytes, n_operations, cpu) / _call(n_bytes, n_operations, gpu)


def _bus_in_each_call(
    n_bytes: float, n_operations: float, n_calls: int, cpu: Rates, gpu: Rates
) -> float:
    return _gpu_speedup(n_bytes, n_operations, 1, cpu, gpu)


def _bus_once_calls_once(
    n_bytes: float, n_operations: float, n_calls: int, cpu: Rates, gpu: Rates
) -> float:
    on_gpu = n_bytes / gpu["bus"] + _call(n_bytes, n_operations, gpu)
    return n_calls * _call(n_bytes, n_operations, cpu) / on_gpu


def _summed(n_bytes: float, n_operations: float, n_calls: int, cpu: Rates, gpu: Rates) -> float:
    def call(rates: Rates) -> float:
        return (
            rates["launch"] + n_bytes / rates["memory"] + n_operations / rates["arithmetic"]
        ) * n_calls

    return call(cpu) / (n_bytes / gpu["bus"] + call(gpu))


def _no_launches(
    n_bytes: float, n_operations: float, n_calls: int, cpu: Rates, gpu: Rates
) -> float:
    return _gpu_speedup(
        n_bytes, n_operations, n_calls, {**cpu, "launch": 0.0}, {**gpu, "launch": 0.0}
    )


def _inverse(n_bytes: float, n_operations: float, n_calls: int, cpu: Rates, gpu: Rates) -> float:
    return 1 / _gpu_speedup(n_bytes, n_operations, n_calls, cpu, gpu)


def _works(rng: np.random.Generator) -> list[Case]:
    cpu = {"launch": 1e-6, "memory": 2e10, "arithmetic": 1e12}
    gpu = {"launch": 1e-5, "memory": 2e12, "arithmetic": 5e13, "bus": 2.5e10}
    names = ("n_bytes", "n_operations", "n_calls", "cpu", "gpu")
    works = [(1e6, 1e6, 4), (4e8, 1e9, 10), (4e8, 5e12, 3), (1e4, 1e5, 1000)]
    return [dict(zip(names, (*work, cpu, gpu), strict=True)) for work in works]


def _n_parameters(sizes: list[int]) -> int:
    return sum((n_in + 1) * n_out for n_in, n_out in pairwise(sizes))


def _rows_that_fit(free: int, sizes: list[int], itemsize: int) -> int:
    fixed = 3 * _n_parameters(sizes)
    each = sizes[0] + 2 * sum(sizes[1:])
    return max(0, (free // itemsize - fixed) // each)


def _networks(rng: np.random.Generator) -> list[Case]:
    values = [
        (2**20, [64, 128, 10], 4),
        (10**7, [784, 100, 100, 10], 8),
        (10**5, [64, 128, 10], 4),
        (2**30, [3072, 1024, 10], 2),
    ]
    return [dict(zip(("free", "sizes", "itemsize"), v, strict=True)) for v in values]


def _fit(free: int, sizes: list[int], itemsize: int, *, fixed: int, each: int) -> int:
    return max(0, (free // itemsize - fixed) // each)


def _weights_once(free: int, sizes: list[int], itemsize: int) -> int:
    each = sizes[0] + 2 * sum(sizes[1:])
    return _fit(free, sizes, itemsize, fixed=_n_parameters(sizes), each=each)


def _only_rows(free: int, sizes: list[int], itemsize: int) -> int:
    return _fit(free, sizes, itemsize, fixed=0, each=sizes[0] + 2 * sum(sizes[1:]))


def _no_biases(free: int, sizes: list[int], itemsize: int) -> int:
    weights = sum(n_in * n_out for n_in, n_out in pairwise(sizes))
    return _fit(free, sizes, itemsize, fixed=3 * weights, each=sizes[0] + 2 * sum(sizes[1:]))


def _forward_only(free: int, sizes: list[int], itemsize: int) -> int:
    return _fit(free, sizes, itemsize, fixed=3 * _n_parameters(sizes), each=sum(sizes))


def _all_twice(free: int, sizes: list[int], itemsize: int) -> int:
    return _fit(free, sizes, itemsize, fixed=3 * _n_parameters(sizes), each=2 * sum(sizes))


def _as_bytes(free: int, sizes: list[int], itemsize: int) -> int:
    return _rows_that_fit(free, sizes, 1)


def _one_too_many(free: int, sizes: list[int], itemsize: int) -> int:
    return _rows_that_fit(free, sizes, itemsize) + 1


def _negative(free: int, sizes: list[int], itemsize: int) -> int:
    each = sizes[0] + 2 * sum(sizes[1:])
    return (free // itemsize - 3 * _n_parameters(sizes)) // each


def _tolerance(reference: Any, n_terms: float) -> float:
    return 4 * float(np.finfo(reference.dtype).eps) * math.sqrt(n_terms)


def _agree(result: Any, reference: Any, n_terms: int) -> bool:
    xp = array_module(result, reference)
    bound = _tolerance(reference, n_terms) * xp.abs(reference).max()
    return bool(xp.abs(result - reference).max() <= bound)


def _absolute(result: Any, reference: Any, n_terms: int) -> bool:
    return bool(np.abs(result - reference).max() <= _tolerance(reference, n_terms))


def _number_by_number(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(reference, n_terms) * np.abs(reference)
    return bool((np.abs(result - reference) <= bound).all())


def _signed(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(reference, n_terms) * np.abs(reference).max()
    return bool((result - reference).max() <= bound)


def _on_average(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(reference, n_terms) * np.abs(reference).max()
    return bool(np.abs(result - reference).mean() <= bound)


def _none_greater(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(reference, n_terms) * np.nanmax(np.abs(reference))
    return not bool((np.abs(result - reference) > bound).any())


def _always_single(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(np.float32(), n_terms) * np.abs(reference).max()
    return bool(np.abs(result - reference).max() <= bound)


def _eps_of_result(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(result, n_terms) * np.abs(reference).max()
    return bool(np.abs(result - reference).max() <= bound)


def _scale_of_result(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(reference, n_terms) * np.abs(result).max()
    return bool(np.abs(result - reference).max() <= bound)


def _largest_with_sign(result: Any, reference: Any, n_terms: int) -> bool:
    bound = _tolerance(reference, n_terms) * reference.max()
    return bool(np.abs(result - reference).max() <= bound)


def _close(result: Any, reference: Any, n_terms: int) -> bool:
    return bool(np.allclose(result, reference))


def _products(rng: np.random.Generator) -> list[Case]:
    """Arrays, and others that differ by rounding, or by a mistake."""
    wide = rng.normal(size=(20, 30))
    wide[0, 0] = 1e-12  # where digits cancel
    far_from_zero = np.sign(wide) * (1 + np.abs(wide))
    noise = rng.uniform(-1, 1, wide.shape)
    noise[0, 0] = 0.9

    def rounded(reference: Any, share: float, n_terms: int, of: float | None = None) -> Case:
        exact = reference.astype(np.float32)
        bound = _tolerance(exact, of or n_terms) * np.abs(exact).max()
        result = (exact + share * bound * noise).astype(np.float32)
        return {"result": result, "reference": exact, "n_terms": n_terms}

    def largest_is(share: float) -> Case:
        """Return numbers so coarse that it matters whose largest one sets the scale."""
        exact = (0.1 * np.sign(wide)).astype(np.float16)
        exact[3, 4] = 1
        result = exact.copy()
        result[3, 4] = share
        return {"result": result, "reference": exact, "n_terms": 10_000}  # of 0.39

    def mistaken(reference: Any, by: float, n_terms: int, dtype: Any = np.float32) -> Case:
        exact = reference.astype(dtype)
        result = exact.copy()
        result[3, 4] += by * np.abs(exact).max()
        return {"result": result, "reference": exact, "n_terms": n_terms}

    lowest = wide.copy()
    lowest[5, 5] = -50
    other_type = mistaken(wide, 0, 400, np.float64)
    other_type["result"] = other_type["result"].astype(np.float32)
    return [
        rounded(wide, 0.6, 400),
        rounded(lowest, 0.6, 400),
        largest_is(0.7),
        largest_is(1.5),
        rounded(wide, 1.5, 400),
        other_type,
        rounded(far_from_zero, 0.2, 400),
        rounded(wide, 0.5, 400, of=1),
        mistaken(wide, -1e-3, 400),
        mistaken(1e-6 * wide, 1e-2, 400),
        mistaken(wide, 1e-3, 10_000),
        mistaken(wide, 1e-7, 400, np.float64),
        mistaken(wide, np.nan, 400),
    ]


EXERCISES = {
    "gpu_speedup": Exercise(
        solve=_gpu_speedup,
        cases=_works,
        mistakes={
            "The data have to get to the GPU first: n_bytes over the bus, once.": _no_bus,
            "The data go over the bus once, not in each call: they stay where they are.": (
                _bus_in_each_call
            ),
            "The GPU makes all the calls, too: multiply by their number, on both sides.": (
                _bus_once_calls_once
            ),
            "Reading and computing happen at the same time: a call takes the longer of both, not "
            "the sum.": _summed,
            "Each call must be launched, which takes its time on both devices.": _no_launches,
            "That is how many times as long the GPU takes: the CPU's time belongs above the "
            "fraction bar.": _inverse,
        },
    ),
    "rows_that_fit": Exercise(
        solve=_rows_that_fit,
        cases=_networks,
        mistakes={
            "Each parameter is there three times: itself, its gradient, and its velocity.": (
                _weights_once
            ),
            "The parameters need memory as well, before the first row.": _only_rows,
            "The biases are missing: a layer has n_in * n_out weights and n_out biases.": (
                _no_biases
            ),
            "The gradients on the way back are missing: each layer's output is there twice.": (
                _forward_only
            ),
            "The input has no gradient here: it is there only once.": _all_twice,
            "Bytes were divided by numbers: a number has `itemsize` bytes.": _as_bytes,
            "It is rounded up: one row more than fits.": _one_too_many,
            "A row is whole: round down, with `//`.": (
                lambda free, sizes, itemsize: (
                    (free / itemsize - 3 * _n_parameters(sizes)) / (sizes[0] + 2 * sum(sizes[1:]))
                )
            ),
            "Where not even the parameters fit, no row does: the answer is 0, not less.": (
                _negative
            ),
        },
    ),
    "agree": Exercise(
        solve=_agree,
        cases=_products,
        otherwise="which is larger, the largest difference (`xp.abs(result - reference).max()`) or "
        "the bound? Print both for a pair of small arrays.",
        mistakes={
            "Bits were compared. Another order of the additions changes the last digits, and is "
            "no mistake.": lambda result, reference, n_terms: bool((result == reference).all()),
            "Each number was held against itself. Where digits cancel, a number is nearly 0 and "
            "its rounding error is not: the scale is the largest number of the reference.": (
                _number_by_number
            ),
            "The tolerance does not grow with `n_terms`: long sums are rounded more often.": (
                lambda result, reference, n_terms: _agree(result, reference, 1)
            ),
            "The tolerance grows with the root of `n_terms`, since errors of both signs cancel in "
            "part; with `n_terms` itself, mistakes pass.": (
                lambda result, reference, n_terms: _agree(result, reference, n_terms**2)
            ),
            "That is an *absolute* tolerance: it refuses large numbers and accepts wrong small "
            "ones. Multiply it by the largest number of the reference.": _absolute,
            "Differences have two signs: a result that is too small counts as well.": _signed,
            "One wrong number among many disappears in a mean: take the largest difference.": (
                _on_average
            ),
            "A comparison with NaN is false, so no difference is *greater* than the bound. Ask "
            "whether the largest one is *at most* the bound.": _none_greater,
            "`float64` is rounded much more finely than `float32`: take eps from the type of the "
            "reference.": _always_single,
            "The result may have another type: take eps from the type of the *reference*.": (
                _eps_of_result
            ),
            "The scale is the largest number of the *reference*: a result that is wrong may be of "
            "any size.": _scale_of_result,
            "The largest number in size may be a negative one: `xp.abs(reference).max()`.": (
                _largest_with_sign
            ),
            "The factor is 4.": tuple(
                lambda result, reference, n_terms, factor=factor: _agree(
                    result, reference, n_terms * factor**2
                )
                for factor in (1 / 4, 1 / 2, 2)
            ),
            "`allclose` with its usual tolerances knows neither the number of terms nor the type "
            "of numbers.": _close,
        },
    ),
}
