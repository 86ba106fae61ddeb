"""How to cut a matrix product into tiles that fit into a memory budget: arithmetic, no arrays."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any, Literal

import numpy as np

# Costs that no ceiling shows, measured on an NVIDIA H200: Python for one step, in seconds, and the
# bandwidth with which a tile is read and written when a product is added to it.
STEP_SECONDS = 40e-6
START_SECONDS = 10e-3  # to start and to stop the threads that copy
DEVICE_BANDWIDTH = 2e12
ALLOCATION_SECONDS = 4e-13  # for a byte of device memory, taken and given back
# Where panels are kept, tiles of C leave while panels arrive, all the time. Both directions at once
# slow each other down more than the rates tell.
KEPT_PENALTY = 1.2
# With two panels of an operand, one being multiplied, copies cannot run ahead while a tile leaves:
# 32,768³ in tf32 within 4 GiB took 0.68 s with two and 0.48 s with three, on an H100.
FEW_BUFFERS, FEW_PENALTY = 2, 1.3
PIECE_BYTES = 400  # what it costs to go from one row of a panel to the next, in bytes copied
SMALLEST = 32  # rows, columns and depth of the smallest tile, where the matrices are not smaller
STRIP_BYTES = 32 * 2**20  # a finished tile is sent back in parts of this size,
MOST_STRIPS = 16  # at most so many
ALIGNMENT = 512  # bytes; where buffers begin

FILL, EMPTY = "fill pinned buffers", "empty pinned buffers"
IN, OUT = "host to device", "device to host"
MULTIPLY = "multiply"


@dataclass(frozen=True)
class Rates:
    """What limits a blocked product on one machine; :func:`gpuml.measure_rates` measures it.

    Attributes
    ----------
    fill, empty : float
        Bytes per second that all host threads together copy into pinned memory, and out of it.
    bus_in, bus_out : float
        Bytes per second between pinned memory and the device.
    arithmetic : float
        Operations per second of a large product in the device's memory.
    """

    fill: float
    empty: float
    bus_in: float
    bus_out: float
    arithmetic: float


# For choosing a plan the proportions count, and those are alike on many machines.
NOMINAL = Rates(fill=45e9, empty=45e9, bus_in=50e9, bus_out=50e9, arithmetic=5e13)


@dataclass(frozen=True)
class Step:
    """One piece of a blocked product: C[rows, columns] += A[rows, depth] B[depth, columns]."""

    rows: slice
    columns: slice
    depth: slice
    first: bool  # of this tile: what was in C is replaced
    last: bool  # of this tile: C[rows, columns] is finished

    @property
    def tile(self) -> tuple[int, int, int, int]:
        """First and last row, first and last column of the tile of C."""
        return self.rows.start, self.rows.stop, self.columns.start, self.columns.stop

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns and depth."""
        m, n, k = (part.stop - part.start for part in (self.rows, self.columns, self.depth))
        return m, n, k


@dataclass(frozen=True)
class BlockPlan:
    """How C = A B is computed tile by tile, within a budget of memory.

    Made by :func:`plan_blocks`. Tiles of C stay on the device until they are finished; the panels
    of A and B that they need pass by. A panel that is still there is not brought again.

    Attributes
    ----------
    m, n, k : int
        A is m × k, B is k × n, C is m × n.
    tile_m, tile_n, tile_k : int
        Rows and columns of a tile of C, and the depth of the panels; smaller at the edges.
    keeps : {"C", "A", "B"}
        What stays: a large tile of C, while panels of both operands pass; or all panels of A
        (of B) that a line of tiles needs, while the other operand passes once for each line.
    buffers : int
        Panels of a passing operand held at once: one is multiplied while others arrive.
    itemsize, sum_itemsize : int
        Bytes of an element of A and B, and of an element of C while it is summed.
    budget : int
        Bytes that may be used.
    """

    m: int
    n: int
    k: int
    tile_m: int
    tile_n: int
    tile_k: int
    keeps: Literal["C", "A", "B"]
    buffers: int
    itemsize: int
    sum_itemsize: int
    budget: int

    # What follows holds for one plan, and, to compare many, for arrays of tile sizes as well.

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many tiles there are along m and n, and how many panels along k."""
        return -(-self.m // self.tile_m), -(-self.n // self.tile_n), -(-self.k // self.tile_k)

    @property
    def n_tiles(self) -> int:
        """Tiles of C."""
        return self.counts[0] * self.counts[1]

    @property
    def n_steps(self) -> int:
        """Products of one panel of A and one of B."""
        return math.prod(self.counts)

    @property
    def slots(self) -> tuple[Any, Any, Any]:
        """How many buffers there are for panels of A, panels of B, and tiles of C."""
        m, n, k = self.counts
        kept = k + (self.buffers > 1)  # one more, to begin with the next line
        a, b = (kept if self.keeps == name else self.buffers for name in "AB")
        tiles = 1 if self.keeps == "C" else min(self.buffers, 2)
        return _least(m * k, a), _least(n * k, b), _least(m * n, tiles)

    @property
    def strips(self) -> Any:
        """In how many parts a tile is finished and sent back."""
        tile = self.tile_m * self.tile_n * self.sum_itemsize
        return _least(_least(MOST_STRIPS, self.tile_m), 1 + tile // STRIP_BYTES)

    @property
    def slot_bytes(self) -> tuple[int, int, int]:
        """Bytes of one buffer for a panel of A, a panel of B, a tile of C."""
        a = self.tile_m * self.tile_k * self.itemsize
        b = self.tile_k * self.tile_n * self.itemsize
        c = self.tile_m * self.tile_n * self.sum_itemsize
        return (
            -(-a // ALIGNMENT) * ALIGNMENT,
            -(-b // ALIGNMENT) * ALIGNMENT,
            (-(-c // ALIGNMENT) * ALIGNMENT),
        )

    @property
    def memory(self) -> Any:
        """Bytes of all buffers together."""
        (n_a, n_b, n_c), (a, b, c) = self.slots, self.slot_bytes
        return n_a * a + n_b * b + n_c * c

    @property
    def bytes_in(self) -> int:
        """Bytes of A and B that must be brought, panels that are still there not counted."""
        elements = 0
        a, b = (deque[object](maxlen=slots) for slots in self.slots[:2])
        for step in self.steps():
            m, n, k = step.sizes
            for ring, panel, size in (
                (a, (step.rows, step.depth), m * k),
                (b, (step.depth, step.columns), k * n),
            ):
                if panel not in ring:
                    ring.append(panel)
                    elements += size
        return elements * self.itemsize

    @property
    def bytes_out(self) -> int:
        """Bytes of C, as they cross the bus."""
        return self.m * self.n * self.sum_itemsize

    @property
    def n_operations(self) -> int:
        """Multiplications and additions: 2 m n k."""
        return 2 * self.m * self.n * self.k

    def steps(self) -> Iterator[Step]:
        """Yield the steps in order.

        Where tiles of C are kept, to and fro, so that a panel is still there at each turn.
        """
        m, n, k = self.counts
        length = m if self.keeps == "B" else n  # of a line of tiles
        for tile in range(m * n):
            line, place = divmod(tile, length)
            back = self.keeps == "C"
            if back and line % 2:
                place = length - 1 - place
            i, j = (place, line) if self.keeps == "B" else (line, place)
            rows = slice(i * self.tile_m, min(self.m, (i + 1) * self.tile_m))
            columns = slice(j * self.tile_n, min(self.n, (j + 1) * self.tile_n))
            for number in range(k):
                p = k - 1 - number if back and tile % 2 else number
                depth = slice(p * self.tile_k, min(self.k, (p + 1) * self.tile_k))
                yield Step(rows, columns, depth, number == 0, number == k - 1)

    def predict(self, rates: Rates) -> dict[str, float]:
        """Return the seconds of each kind of work alone, and of all together as ``total``.

        Work of different kinds overlaps, so the total is the longest kind, and beside it what
        nothing hides: the arrival of the first panels, or of those that are kept; the way back of
        what was finished last.

        Parameters
        ----------
        rates : Rates
            Of the machine: :func:`gpuml.measure_rates`.

        Returns
        -------
        dict of str to float
        """
        return {name: float(t) for name, t in self._predict(rates, self.bytes_in).items()}

    def _predict(self, rates: Rates, bytes_in: float) -> dict[str, float]:
        (m, n, k), (a_bytes, b_bytes, c_bytes) = self.counts, self.slot_bytes
        inward, outward = min(rates.fill, rates.bus_in), min(rates.empty, rates.bus_out)
        added = 2 * self.bytes_out * (k - 1) / DEVICE_BANDWIDTH
        multiply = self.n_operations / rates.arithmetic + added
        alone = {
            FILL: bytes_in / rates.fill,
            IN: bytes_in / rates.bus_in,
            MULTIPLY: multiply,
            OUT: self.bytes_out / rates.bus_out,
            EMPTY: self.bytes_out / rates.empty,
        }
        arrive, step = bytes_in / inward, multiply / self.n_steps
        arrive = arrive * (FEW_PENALTY if self.buffers == FEW_BUFFERS else 1)
        head = np.minimum(a_bytes + b_bytes, bytes_in) / inward
        leave = c_bytes / outward
        # The last strips of a tile leave after its last step; the earlier ones during it.
        tail = np.maximum(leave / self.strips, leave - step)
        if self.keeps == "C":  # the next tile waits until this one has left
            cushion = (self.buffers - 1) * head  # panels that may arrive meanwhile
            late = (m * n - 1) * np.maximum(0, tail - cushion)
            waits = (m * n - 1) * tail
            total = np.maximum(arrive + late + step, head + multiply + waits) + tail
        else:
            lines = m if self.keeps == "A" else n
            kept = k * (a_bytes if self.keeps == "A" else b_bytes) / inward
            streamed = np.maximum(0, arrive / lines - kept)
            total = lines * (kept + np.maximum(streamed, multiply / lines)) + step + tail
        total = np.maximum(total, head + step + self.bytes_out / outward)
        total = np.maximum(total, alone[FILL] + alone[EMPTY])  # by the same threads
        start = START_SECONDS if np.isfinite(rates.bus_in) else 0.0
        return alone | {"total": total + STEP_SECONDS * self.n_steps + start}

    def __str__(self) -> str:
        m, n, k = self.counts
        lines = [
            f"({self.m:,} × {self.k:,}) @ ({self.k:,} × {self.n:,}) in {m} × {n} tiles "
            f"of {self.tile_m:,} × {self.tile_n:,}, {k} panel{'s' * (k != 1)} deep",
            f"buffers {size_text(self.memory)} of {size_text(self.budget)}; "
            f"A and B in {size_text(self.bytes_in)}, C out {size_text(self.bytes_out)}",
        ]
        return "\n".join(lines)


@cache
def plan_blocks(
    m: int,
    n: int,
    k: int,
    itemsize: int,
    budget: int,
    *,
    sum_itemsize: int = 0,
    buffers: int = 3,
    rates: Rates = NOMINAL,
) -> BlockPlan:
    """Choose the tiles with which the fewest bytes move and wait, within a budget of memory.

    Plans are compared by the bytes that cross the bus, as time, and by the time that all would
    take together.

    Parameters
    ----------
    m, n, k : int
        A is m × k, B is k × n; all at least 1.
    itemsize : int
        Bytes of an element of A and B.
    budget : int
        Bytes for all buffers; at least :func:`smallest_memory`.
    sum_itemsize : int
        Bytes of an element of C while it is summed; `itemsize` unless given.
    buffers : int
        Panels of a passing operand held at once, at most; 1 where nothing is copied.
    rates : Rates
        Of a machine; only their proportions count.

    Returns
    -------
    BlockPlan

    Raises
    ------
    ValueError
        If a size is not positive, or not even the smallest tile fits.

    Examples
    --------
    >>> plan = plan_blocks(4096, 4096, 4096, itemsize=4, budget=64 * 2**20)
    >>> plan.n_tiles > 1, plan.memory <= plan.budget
    (True, True)
    """
    _check_sizes(m, n, k)
    best: tuple[float, BlockPlan] | None = None
    fixed = itemsize, sum_itemsize or itemsize, budget
    counts = range(min(2, buffers), buffers + 1)
    for plans in chain(*(_every_plan(m, n, k, (count, *fixed)) for count in counts)):
        prices = np.where(plans.memory <= budget, _price(plans, rates), np.inf)
        i = int(prices.argmin())
        if np.isfinite(prices[i]) and (best is None or prices[i] < best[0]):
            tiles: Any = plans.tile_m, plans.tile_n, plans.tile_k
            tile_m, tile_n, tile_k = (int(sizes[i]) for sizes in tiles)
            plan = replace(plans, tile_m=tile_m, tile_n=tile_n, tile_k=tile_k)
            best = float(prices[i]), plan
    if best is None:
        raise ValueError(f"not even the smallest tile fits into {size_text(budget)}")
    return best[1]


def _price(plan: BlockPlan, rates: Rates) -> Any:
    """Return what plans are compared by, in seconds."""
    m, n, k = plan.counts
    # How often each operand is brought: once for each line of tiles, or once if all of it stays.
    a = np.where((plan.keeps == "A") | (m * k <= plan.slots[0]), 1, n)
    b = np.where((plan.keeps == "B") | (n * k <= plan.slots[1]), 1, m)
    elements = a * plan.m * plan.k + b * plan.k * plan.n
    brought = elements * plan.itemsize
    pieces = 1 + PIECE_BYTES * (k > 1) / (plan.tile_k * plan.itemsize)
    total = plan._predict(rates, brought * pieces)["total"]
    if plan.keeps != "C":
        total = total * KEPT_PENALTY
    return total + brought / rates.bus_in + plan.memory * ALLOCATION_SECONDS


def smallest_memory(
    m: int, n: int, k: int, itemsize: int, *, sum_itemsize: int = 0, buffers: int = 3
) -> int:
    """Return the bytes that the smallest tile and its panels need; see :func:`plan_blocks`."""
    _check_sizes(m, n, k)
    fixed = min(2, buffers), itemsize, sum_itemsize or itemsize, 0
    return min(int(plans.memory.min()) for plans in _every_plan(m, n, k, fixed))


def _check_sizes(m: int, n: int, k: int) -> None:
    if min(m, n, k) < 1:
        raise ValueError(f"m, n and k must be at least 1, got {m}, {n}, {k}")


def _every_plan(m: int, n: int, k: int, fixed: tuple[int, int, int, int]) -> Iterator[BlockPlan]:
    """Yield all plans worth comparing: one for each way to keep, with arrays of tile sizes."""
    depths = sorted({k, *(d * 2**i for i in range(4, 16) for d in (2, 3) if d * 2**i < k)})
    grid: Any = np.meshgrid(_parts(m), _parts(n), depths)
    tile_m, tile_n, tile_k = (sizes.ravel() for sizes in grid)
    for keeps in ("C", "A", "B"):
        yield BlockPlan(m, n, k, tile_m, tile_n, tile_k, keeps, *fixed)


def _least(a: Any, b: Any) -> Any:
    """Return the smaller of two numbers, or of each pair of two arrays."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else np.minimum(a, b)


def _parts(size: int) -> Sequence[int]:
    """Return sizes of tiles worth trying, from the whole to the smallest."""
    sizes, n = {size, min(size, SMALLEST)}, 2
    while size > SMALLEST * (n - 1):
        each = -(-size // n)
        sizes.add(-(-each // SMALLEST) * SMALLEST)
        n += max(1, n // 3)
    return sorted(sizes, reverse=True)


def size_text(n_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it.

    Examples
    --------
    >>> size_text(1536), size_text(4 * 2**30)
    ('1.5 KiB', '4 GiB')
    """
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            number = n_bytes / size
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
    return f"{n_bytes:.0f} bytes"


def parse_size(size: int | str) -> int:
    """Return a number of bytes given as such, or as text with a unit.

    Parameters
    ----------
    size : int or str
        ``"2 GiB"`` (2³⁰ bytes), ``"500MB"`` (10⁶ bytes); also K, M, G, T with B or iB.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If it is no size, or not positive.

    Examples
    --------
    >>> parse_size("1.5 KiB"), parse_size("2 MB"), parse_size(7)
    (1536, 2000000, 7)
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*(?:([kmgt])(i?))?b?\s*", str(size), re.IGNORECASE)
    if match is None or isinstance(size, bool):
        raise ValueError(f"{size!r} is no size of memory: give bytes, or text such as '2 GiB'")
    number, prefix, binary = match.groups()
    scale = (1024 if binary else 1000) ** " kmgt".index((prefix or " ").lower())
    n_bytes = int(float(number) * scale)
    if n_bytes < 1:
        raise ValueError(f"a size of memory must be positive, got {size!r}")
    return n_bytes
