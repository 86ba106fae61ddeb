"""Exercises of notebook 09: shards, weighted gradients, sums over ranks and what they cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from gpuml.exercises.judging import Case, Exercise


def _shards(n_rows: int, world_size: int) -> list[slice]:
    edges = [n_rows * rank // world_size for rank in range(world_size + 1)]
    return [slice(i, j) for i, j in pairwise(edges)]


def _covered(parts: Any) -> dict[str, Any]:
    """Return what counts: each row once, and nobody has more than a row more."""
    starts = [0 if part.start is None else part.start for part in parts]
    ends = [part.stop for part in parts]
    if not all(isinstance(edge, int | np.integer) for edge in (*starts, *ends)):
        return {"the slices": "with edges that are no whole numbers"}
    if any(part.step not in (None, 1) for part in parts):
        return {"the slices": "with steps, which leave rows out"}
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    steps = [start - end for start, end in zip(starts[1:], ends, strict=False)]
    once = "once" if not any(steps) else "twice, some" if min(steps) < 0 else "not at all, some"
    even = "equal, up to a row" if max(sizes) - min(sizes) <= 1 else f"unequal: {sizes}"
    rows = {"the rows are there": once, "the first row": starts[0], "the end": ends[-1]}
    rows["the sizes"] = even
    return {"the slices": "in whole numbers"} | rows


def _without_rest(n_rows: int, world_size: int) -> list[slice]:
    size = n_rows // world_size
    return [slice(rank * size, (rank + 1) * size) for rank in range(world_size)]


def _rest_to_last(n_rows: int, world_size: int) -> list[slice]:
    parts = _without_rest(n_rows, world_size)
    return [*parts[:-1], slice(parts[-1].start, n_rows)]


def _rounded_up(n_rows: int, world_size: int) -> list[slice]:
    size = -(-n_rows // world_size)
    return [slice(rank * size, min(n_rows, (rank + 1) * size)) for rank in range(world_size)]


def _fractions(n_rows: int, world_size: int) -> list[slice]:
    size: Any = n_rows / world_size
    return [slice(rank * size, (rank + 1) * size) for rank in range(world_size)]


def _one_too_many(n_rows: int, world_size: int) -> list[slice]:
    return [slice(part.start, part.stop + 1) for part in _shards(n_rows, world_size)]


def _sizes(rng: np.random.Generator) -> list[Case]:
    return [{"n_rows": n, "world_size": p} for n, p in ((12, 4), (50, 4), (9, 4), (3, 3))]


def _weighted_gradient(gradients: Any, rows: Any) -> Any:
    total = sum(rows)
    return sum(n / total * g for g, n in zip(gradients, rows, strict=True))


def _batches(rng: np.random.Generator) -> list[Case]:
    counts = [[12, 13, 12, 13], [1, 2], [5]]
    return [{"gradients": list(rng.normal(size=(len(c), 3, 2))), "rows": c} for c in counts]


def _tree_all_reduce(arrays: Any) -> None:
    distance = 1
    while distance < len(arrays):
        messages = [a.copy() for a in arrays]
        for rank, a in enumerate(arrays):
            a += messages[rank ^ distance]
        distance *= 2


def _not_at_once(arrays: Any) -> None:
    distance = 1
    while distance < len(arrays):
        for rank, a in enumerate(arrays):
            a += arrays[rank ^ distance]
        distance *= 2


def _one_round(arrays: Any) -> None:
    messages = [a.copy() for a in arrays]
    for rank, a in enumerate(arrays):
        a += messages[rank ^ 1]


def _only_root(arrays: Any) -> None:
    copies = [a.copy() for a in arrays]
    _tree_all_reduce(copies)
    arrays[0][...] = copies[0]


def _mean(arrays: Any) -> None:
    _tree_all_reduce(arrays)
    for a in arrays:
        a /= len(arrays)


def _nothing(arrays: Any) -> None:
    pass


def _round_short(arrays: Any) -> None:
    distance = 1
    while 2 * distance < len(arrays):
        messages = [a.copy() for a in arrays]
        for rank, a in enumerate(arrays):
            a += messages[rank ^ distance]
        distance *= 2


def _of_ranks(rng: np.random.Generator) -> list[Case]:
    return [{"arrays": list(rng.integers(100, size=(p, 6)).astype(float))} for p in (2, 4, 8)]


def _ring_seconds(n_bytes: float, world_size: int, latency: float, bandwidth: float) -> float:
    p = world_size
    return 2 * (p - 1) * latency + 2 * (p - 1) / p * n_bytes / bandwidth


def _networks(rng: np.random.Generator) -> list[Case]:
    names = ("n_bytes", "world_size", "latency", "bandwidth")
    values = [(1e8, 4, 1e-5, 2e11), (4e3, 64, 1e-5, 5e10), (1e6, 1, 1e-5, 5e10)]
    return [dict(zip(names, v, strict=True)) for v in values]


EXERCISES = {
    "shards": Exercise(
        solve=_shards,
        cases=_sizes,
        what_counts=_covered,
        mistakes={
            "The last rows belong to nobody: `//` rounds down. Spread the rest, so that sizes "
            "differ by one.": _without_rest,
            "The last rank has all that was left over, and the others wait for it. Spread the "
            "rest: sizes may differ by one.": _rest_to_last,
            "Rounded up, the last ranks have little or nothing to do. Sizes may differ by one.": (
                _rounded_up
            ),
            "`/` gives fractions, and a slice has whole numbers: `//` rounds down.": _fractions,
            "Rows belong to two ranks: a slice ends *before* its `stop`.": _one_too_many,
        },
    ),
    "weighted_gradient": Exercise(
        solve=_weighted_gradient,
        cases=_batches,
        mistakes={
            "That is the plain mean. A gradient counts as much as it has rows: some ranks have "
            "more than others.": lambda gradients, rows: sum(gradients) / len(gradients),
            "That is the sum; each is to be weighted by its rows over all rows.": (
                lambda gradients, rows: sum(gradients)
            ),
            "The weights do not add up to 1: divide by the number of all rows.": (
                lambda gradients, rows: sum(n * g for g, n in zip(gradients, rows, strict=True))
            ),
            "Divided by the number of ranks, and not of rows.": lambda gradients, rows: sum(
                n / len(rows) * g for g, n in zip(gradients, rows, strict=True)
            ),
        },
    ),
    "tree_all_reduce": Exercise(
        solve=_tree_all_reduce,
        cases=_of_ranks,
        changes=("arrays",),
        forbidden=frozenset({"sum"}),
        instead="the sum is to come from rounds, in which partners exchange what they have.",
        mistakes={
            "A partner read what had just been changed. Both send at the same time: copy the "
            "messages of a round before anybody adds.": _not_at_once,
            "That is after one round. There are as many as the number of ranks has bits.": (
                _one_round
            ),
            "A round is missing: with p ranks, the distances are 1, 2, 4, … up to p / 2.": (
                _round_short
            ),
            "Only rank 0 has the sum; all are to have it.": _only_root,
            "That is the mean; asked for is the sum.": _mean,
            "Nothing has changed. Write into the arrays: `a += …` or `a[...] = …`; `a = a + …` "
            "makes a new one.": _nothing,
        },
    ),
    "ring_seconds": Exercise(
        solve=_ring_seconds,
        cases=_networks,
        mistakes={
            "The latency is paid for every message: 2 (p - 1) follow each other.": (
                lambda n, p, latency, bandwidth: latency + 2 * (p - 1) / p * n / bandwidth
            ),
            "That is the way to the sums. They still have to go round to everybody: twice.": (
                lambda n, p, latency, bandwidth: _ring_seconds(n, p, latency, bandwidth) / 2
            ),
            "A message is a p-th of the array, not all of it.": (
                lambda n, p, latency, bandwidth: 2 * (p - 1) * (latency + n / bandwidth)
            ),
            "The latency is missing; for small arrays it is all that counts.": (
                lambda n, p, latency, bandwidth: _ring_seconds(n, p, 0, bandwidth)
            ),
            "There are p - 1 steps, not p: a chunk that has been at all ranks is complete.": (
                lambda n, p, latency, bandwidth: 2 * p * (latency + n / p / bandwidth)
            ),
        },
    ),
}
