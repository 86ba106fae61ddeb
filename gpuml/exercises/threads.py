"""Exercises of notebook 02: kernels, and how their threads read memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuml.devices import array_module
from gpuml.exercises.judging import Case, Exercise

THREADS = 8  # in a block, so that a simulator has few to run
OUTSIDE = (
    "A thread asked for an element outside the array: more threads are launched than there is "
    "work. Guard the access with an `if`."
)
UNKNOWN = (
    "which element does each thread touch, and none twice? A GPU does not complain about an access "
    "outside the array; it writes there. Guard it with an `if`."
)
NOTHING_WRITTEN = (
    "Nothing was written. A kernel returns nothing: it writes into the array that it is given."
)


def _blocks(n: int, threads: int = THREADS) -> int:
    return -(-n // threads)


# --- y <- alpha x + y --------------------------------------------------------------------------


def _saxpy(alpha: Any, x: Any, memory: Any) -> None:
    memory[: x.size] += alpha * x


def _launch_saxpy(kernel: Any, alpha: Any, x: Any, memory: Any) -> None:
    n, xp = x.size, array_module(x)
    longer = xp.concatenate([x, xp.ones_like(x)])  # who reads behind x on a GPU finds no zeros
    kernel[_blocks(n), THREADS](alpha, longer[:n], memory[:n])
    x[...] = longer[:n]


def _vectors(rng: np.random.Generator) -> list[Case]:
    cases = []
    for n in (2 * THREADS, 2 * THREADS + 4, THREADS + 4):
        x = rng.integers(-9, 10, n).astype(np.float32)
        # behind y lies what belongs to somebody else
        memory = rng.integers(-9, 10, _blocks(n) * THREADS + THREADS).astype(np.float32)
        cases.append({"alpha": np.float32(2.5), "x": x, "memory": memory})
    return cases


def _saxpy_unguarded(alpha: Any, x: Any, memory: Any) -> None:
    n = _blocks(x.size) * THREADS
    if n > x.size:
        raise IndexError
    memory[:n] += alpha * x


def _saxpy_first_block(alpha: Any, x: Any, memory: Any) -> None:
    memory[:THREADS] += alpha * x[:THREADS]


def _saxpy_all_in_one(alpha: Any, x: Any, memory: Any) -> None:
    for _ in range(_blocks(x.size)):  # one block after the other, as in a simulator
        memory[:THREADS] += alpha * x[:THREADS]


def _saxpy_off_by_one(alpha: Any, x: Any, memory: Any) -> None:
    memory[: x.size - 1] += alpha * x[:-1]


def _saxpy_overwrites(alpha: Any, x: Any, memory: Any) -> None:
    memory[: x.size] = alpha * x


def _saxpy_to_y(alpha: Any, x: Any, memory: Any) -> None:
    memory[: x.size] = alpha * memory[: x.size] + x


def _nothing(*_: Any) -> None:
    pass


# --- B = A transposed --------------------------------------------------------------------------


def _transpose(A: Any, B: Any) -> None:
    B[...] = A.T


def _launch_transpose(kernel: Any, A: Any, B: Any) -> None:
    rows, columns = A.shape
    kernel[(_blocks(columns, 4), _blocks(rows, 4)), (4, 4)](A, B)


def _matrices(rng: np.random.Generator) -> list[Case]:
    shapes = [(4, 4), (5, 9), (9, 6)]
    matrices = [rng.integers(-99, 100, shape).astype(np.float32) for shape in shapes]
    return [{"A": A, "B": np.full(A.shape[::-1], -1000, np.float32)} for A in matrices]


def _copied(A: Any, B: Any) -> None:
    if A.shape[0] != A.shape[1]:
        raise IndexError
    B[...] = A


def _square_only(A: Any, B: Any) -> None:
    n = min(A.shape)
    B[:n, :n] = A[:n, :n].T


def _swapped_grid(A: Any, B: Any) -> None:
    rows, columns = (_blocks(size, 4) * 4 for size in A.shape[::-1])
    B[:columns, :rows] = A[:rows, :columns].T


def _without_last(A: Any, B: Any) -> None:
    B[:-1, :-1] = A[:-1, :-1].T


# --- how many are positive ---------------------------------------------------------------------


def _count_positive(x: Any, total: Any) -> None:
    total += (x > 0).sum()


def _launch_count(kernel: Any, x: Any, total: Any) -> None:
    kernel[_blocks(x.size), THREADS](x, total)


def _signs(rng: np.random.Generator) -> list[Case]:
    vectors = [np.ones(THREADS), rng.integers(-2, 3, 3 * THREADS - 3)]
    totals = [np.array([count], np.int32) for count in (0, 5)]  # somebody may have counted before
    pairs = zip(vectors, totals, strict=True)
    return [{"x": x.astype(np.float32), "total": total} for x, total in pairs]


def _raced(x: Any, total: Any) -> None:
    total += 1


def _from_zero(x: Any, total: Any) -> None:
    total[...] = (x > 0).sum()


def _with_zeros(x: Any, total: Any) -> None:
    total += (x >= 0).sum()


def _all_counted(x: Any, total: Any) -> None:
    total += x.size


def _summed(x: Any, total: Any) -> None:
    total += x[x > 0].sum().astype(np.int32)


# --- sectors of memory -------------------------------------------------------------------------


def _sectors(stride: int, itemsize: int) -> int:
    return len({i * stride * itemsize // 32 for i in range(32)})


def _strides(rng: np.random.Generator) -> list[Case]:
    pairs = [(1, 4), (2, 4), (1, 8), (3, 4), (32, 4), (5, 2), (4, 8), (0, 4)]
    return [{"stride": s, "itemsize": i} for s, i in pairs]


EXERCISES = {
    "saxpy": Exercise(
        solve=_saxpy,
        shown=("alpha", "x", "y"),
        cases=_vectors,
        launch=_launch_saxpy,
        otherwise=UNKNOWN,
        changes=("memory",),
        raised={"IndexError": OUTSIDE},
        mistakes={
            OUTSIDE: _saxpy_unguarded,
            "Only the elements of the first block have changed: `cuda.threadIdx.x` counts within "
            "a block, `cuda.grid(1)` over all of them.": (_saxpy_first_block, _saxpy_all_in_one),
            "The last element is missing: the index may be as large as the size less one, so "
            "compare by `<` with the size.": _saxpy_off_by_one,
            "What was in `y` is gone: alpha · x is to be *added* to it.": _saxpy_overwrites,
            "`alpha` multiplies `x`, not `y`.": _saxpy_to_y,
            NOTHING_WRITTEN: _nothing,
        },
    ),
    "transpose": Exercise(
        solve=_transpose,
        cases=_matrices,
        launch=_launch_transpose,
        otherwise=UNKNOWN,
        changes=("B",),
        raised={"IndexError": OUTSIDE},
        mistakes={
            "The matrix was copied as it is: rows of `A` are columns of `B`.": _copied,
            "`cuda.grid(2)` gives the column first. Guard the column by `A.shape[1]` and the row "
            "by `A.shape[0]`.": (_square_only, _swapped_grid),
            "The last row and column are missing: compare by `<` with the size.": _without_last,
            NOTHING_WRITTEN: _nothing,
        },
    ),
    "count_positive": Exercise(
        solve=_count_positive,
        cases=_signs,
        launch=_launch_count,
        changes=("total",),
        needed="atomic",
        because=(
            "threads that add to one address at the same time lose additions, even if it went "
            "well this time: `cuda.atomic.add(total, 0, 1)` does it in one step."
        ),
        raised={"IndexError": OUTSIDE},
        mistakes={
            "Additions were lost: two threads read before either writes. `cuda.atomic.add` does "
            "all in one step.": _raced,
            "What was in `total` is gone: the number is to be *added* to it.": _from_zero,
            "Zeros were counted, and zero is not positive.": _with_zeros,
            "Every element was counted, whatever its sign.": _all_counted,
            "The numbers were added up; asked for is how many there are.": _summed,
            NOTHING_WRITTEN: _nothing,
        },
    ),
    "sectors": Exercise(
        solve=_sectors,
        cases=_strides,
        mistakes={
            "A sector has 32 *bytes*, and a number `itemsize` of them: multiply to get addresses "
            "in bytes.": lambda stride, itemsize: _sectors(stride, 1),
            "A sector that several threads read counts once: how many *different* ones are "
            "there?": lambda stride, itemsize: 32,
            "No more sectors can be touched than there are threads: between the numbers of a "
            "large stride lie sectors that nobody reads.": (
                lambda stride, itemsize: max(1, 32 * stride * itemsize // 32)
            ),
            "Only 31 threads were counted, or 33: they are numbered from 0 to 31.": (
                lambda stride, itemsize: len({i * stride * itemsize // 32 for i in range(33)})
            ),
        },
    ),
}
