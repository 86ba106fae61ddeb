"""Exercises of notebook 03: products split into parts, stacks of products, sizes of batches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from gpuml.devices import array_module
from gpuml.exercises.judging import Case, Exercise


def _split_rows(a: Any, b: Any, n_parts: int) -> list[Any]:
    edges = [len(a) * i // n_parts for i in range(n_parts + 1)]
    return [a[i:j] @ b for i, j in pairwise(edges)]


def _equal_parts(a: Any, b: Any, n_parts: int) -> list[Any]:
    size = len(a) // n_parts
    return [a[i * size : (i + 1) * size] @ b for i in range(n_parts)]


def _columns(a: Any, b: Any, n_parts: int) -> list[Any]:
    edges = [b.shape[1] * i // n_parts for i in range(n_parts + 1)]
    return [a @ b[:, i:j] for i, j in pairwise(edges)]


def _overlapping(a: Any, b: Any, n_parts: int) -> list[Any]:
    edges = [len(a) * i // n_parts for i in range(n_parts + 1)]
    return [a[i : j + 1] @ b for i, j in pairwise(edges)]


def _to_split(rng: np.random.Generator) -> list[Case]:
    sizes = [(6, 4, 5, 3), (7, 4, 4, 3), (10, 3, 8, 4), (3, 2, 2, 1)]
    cases = []
    for m, k, n, n_parts in sizes:
        a, b = (rng.integers(-9, 10, s).astype(np.float32) for s in ((m, k), (k, n)))
        cases.append({"a": a, "b": b, "n_parts": n_parts})
    return cases


def _joined(parts: Any) -> dict[str, Any]:
    """Return what counts: that no part is more than a row larger, and the rows together."""
    sizes = [len(part) for part in parts]
    even = "equal, up to a row" if max(sizes) - min(sizes) <= 1 else f"of {sizes} rows"
    whole = array_module(*parts).concatenate(parts)
    return {"the parts": even, "the parts together": whole}


def _times_transposed(a: Any, b: Any) -> Any:
    return np.matmul(a, b.swapaxes(-1, -2))


def _stacks(rng: np.random.Generator) -> list[Case]:
    shapes = [((5, 2, 3), (5, 4, 3)), ((4, 4, 4), (4, 4, 4)), ((2, 3, 5, 6), (2, 3, 7, 6))]
    return [
        dict(zip("ab", (rng.integers(-9, 10, s).astype(np.float32) for s in pair), strict=True))
        for pair in shapes
    ]


def _batch_size(free: int, m: int, k: int, n: int, itemsize: int, share: float) -> int:
    each = itemsize * (m * k + k * n + m * n)
    return max(1, int(share * free // each))


def _memories(rng: np.random.Generator) -> list[Case]:
    names = ("free", "m", "k", "n", "itemsize", "share")
    values = [
        (2**30, 64, 64, 64, 4, 0.5),
        (10**9, 100, 200, 300, 8, 0.25),
        (4 * 78_000, 100, 100, 50, 4, 0.56),
        (2**20, 1000, 1000, 1000, 4, 0.5),
    ]
    return [dict(zip(names, v, strict=True)) for v in values]


EXERCISES = {
    "split_rows": Exercise(
        solve=_split_rows,
        cases=_to_split,
        what_counts=_joined,
        mistakes={
            "Rows are missing at the end: their number is no multiple of `n_parts`, and `//` "
            "rounds down. Let the sizes of the parts differ by one.": _equal_parts,
            "The columns of `b` were split, not the rows of `a`.": _columns,
            "The parts overlap: a slice `i:j` ends before `j`, so the next one begins at `j`.": (
                _overlapping
            ),
            "These are blocks of rows of `a`; each has still to be multiplied by `b`.": (
                lambda a, b, n_parts: np.array_split(a, n_parts)
            ),
            "The order of the parts is reversed.": lambda a, b, n_parts: _split_rows(a, b, n_parts)[
                ::-1
            ],
        },
    ),
    "times_transposed": Exercise(
        solve=_times_transposed,
        cases=_stacks,
        forbidden=frozenset({"for", "map"}),
        instead="the whole stack is to be multiplied in one call: `gpuml.batched_matmul`.",
        mistakes={
            "`.T` reverses *all* axes of a stack. To transpose each matrix, swap the last two "
            "axes: `swapaxes(-1, -2)`.": lambda a, b: np.matmul(a, b.T),
            "`b` was not transposed.": lambda a, b: np.matmul(a, b),
            "`a` was transposed, not `b`.": lambda a, b: np.matmul(a.swapaxes(-1, -2), b),
            "The product of `b` with `a` transposed is the transposed of what is asked for.": (
                lambda a, b: np.matmul(b, a.swapaxes(-1, -2))
            ),
            "The numbers were multiplied one by one; asked for are matrix products.": (
                lambda a, b: a * b
            ),
        },
    ),
    "batch_size": Exercise(
        solve=_batch_size,
        cases=_memories,
        mistakes={
            "Only the result was counted: the two factors need memory as well.": (
                lambda free, m, k, n, itemsize, share: max(
                    1, int(share * free // (itemsize * m * n))
                )
            ),
            "Only the factors were counted: the result needs memory as well.": (
                lambda free, m, k, n, itemsize, share: max(
                    1, int(share * free // (itemsize * (m * k + k * n)))
                )
            ),
            "Bytes were divided by numbers: a number has `itemsize` bytes.": (
                lambda free, m, k, n, itemsize, share: _batch_size(free, m, k, n, 1, share)
            ),
            "The whole free memory was taken, and not the share of it.": (
                lambda free, m, k, n, itemsize, share: _batch_size(free, m, k, n, itemsize, 1)
            ),
            "It was rounded down twice. First the share of the bytes, then how many products it "
            "holds.": lambda free, m, k, n, itemsize, share: max(
                1, int(share * (free // (itemsize * (m * k + k * n + m * n))))
            ),
            "It is rounded up: one product more than fits.": (
                lambda free, m, k, n, itemsize, share: (
                    1 + int(share * free // (itemsize * (m * k + k * n + m * n)))
                )
            ),
            "A batch of none makes no progress: take one product at least, even if it is too "
            "large.": lambda free, m, k, n, itemsize, share: int(
                share * free // (itemsize * (m * k + k * n + m * n))
            ),
        },
    ),
}
