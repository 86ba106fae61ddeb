"""Plans of tiles: what they cover, hold and bring, against brute force; sizes in words."""

from __future__ import annotations

import itertools
import math
import re
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpuml import blocking
from gpuml.blocking import (
    EMPTY,
    FILL,
    IN,
    MULTIPLY,
    OUT,
    BlockPlan,
    Rates,
    parse_size,
    plan_blocks,
    size_text,
    smallest_memory,
)

quick = settings(max_examples=150, deadline=None)
BUS_ONLY = Rates(fill=1, empty=1, bus_in=1, bus_out=1, arithmetic=1e30)  # a byte takes a second
H200 = Rates(fill=45e9, empty=45e9, bus_in=55e9, bus_out=55e9, arithmetic=5e13)
CPU = Rates(math.inf, math.inf, math.inf, math.inf, arithmetic=1e11)

SIZE = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 63, 64, 65, 100, 150, 257]))
TILED = st.builds(
    BlockPlan,
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    k=st.integers(1, 20),
    tile_m=st.integers(1, 20),
    tile_n=st.integers(1, 20),
    tile_k=st.integers(1, 20),
    keeps=st.sampled_from("CAB"),
    buffers=st.integers(1, 4),
    itemsize=st.sampled_from([1, 2, 8]),
    sum_itemsize=st.sampled_from([1, 4, 8]),
    budget=st.just(10**9),
).filter(lambda p: p.tile_m <= p.m and p.tile_n <= p.n and p.tile_k <= p.k)


def panels(step):
    return (step.rows, step.depth), (step.depth, step.columns)


def numbers_of(part: slice) -> range:
    return range(part.start, part.stop)


def brought(plan) -> tuple[int, int]:
    """Bytes of A and of B, element by element: a new panel takes the place of the oldest."""
    totals, there = [0, 0], ([], [])
    for step in plan.steps():
        for i, (rows, columns) in enumerate(panels(step)):
            if (rows, columns) in there[i]:
                continue
            there[i].append((rows, columns))
            del there[i][: -plan.slots[i]]
            totals[i] += len(numbers_of(rows)) * len(numbers_of(columns)) * plan.itemsize
    return totals[0], totals[1]


# --- steps -------------------------------------------------------------------------------------


@quick
@given(plan=TILED)
def test_steps_cover_each_product_of_elements_once(plan):
    count = np.zeros((plan.m, plan.k, plan.n), int)
    for step in plan.steps():
        count[step.rows, step.depth, step.columns] += 1
        m, n, k = step.sizes
        assert count[step.rows, step.depth, step.columns].shape == (m, k, n)
        assert (m, n, k) <= (plan.tile_m, plan.tile_n, plan.tile_k)
        assert min(m, n, k) > 0
        assert m <= plan.tile_m
        assert n <= plan.tile_n
        assert k <= plan.tile_k
    assert (count == 1).all()


@quick
@given(plan=TILED)
def test_a_tile_is_begun_and_finished_before_the_next(plan):
    steps = list(plan.steps())
    assert len(steps) == plan.n_steps == math.prod(plan.counts)
    tiles = []
    for _, group in itertools.groupby(steps, key=lambda step: step.tile):
        group = list(group)
        tiles.append(group[0].tile)
        assert [step.first for step in group] == [True] + [False] * (len(group) - 1)
        assert [step.last for step in group] == [False] * (len(group) - 1) + [True]
        assert len(group) == plan.counts[2]
        top, bottom, left, right = group[0].tile
        assert (slice(top, bottom), slice(left, right)) == (group[0].rows, group[0].columns)
    assert len(set(tiles)) == len(tiles) == plan.n_tiles == plan.counts[0] * plan.counts[1]


@quick
@given(plan=TILED)
def test_edges_lie_on_a_grid(plan):
    for step in plan.steps():
        for part, tile, size in (
            (step.rows, plan.tile_m, plan.m),
            (step.columns, plan.tile_n, plan.n),
            (step.depth, plan.tile_k, plan.k),
        ):
            assert part.start % tile == 0
            assert part.stop == min(part.start + tile, size)


@quick
@given(plan=TILED)
def test_bytes_brought_are_what_walking_the_steps_brings(plan):
    assert plan.bytes_in == sum(brought(plan))
    assert plan.bytes_out == plan.m * plan.n * plan.sum_itemsize
    assert plan.n_operations == sum(2 * math.prod(step.sizes) for step in plan.steps())


@pytest.mark.parametrize(
    ("keeps", "buffers", "a", "b"),
    [
        # A 4 × 6 in 2 × 3 panels, B 6 × 5 in 3 × 3 panels, of 2 × 2 but for the last column of B
        ("C", 1, 64, 58),  # A three times less the 2 turns, B twice less the middle one
        ("A", 1, 24, 60),  # A once, B for each line
        ("B", 1, 72, 30),
    ],
)
def test_bytes_brought_on_paper(keeps, buffers, a, b):
    plan = BlockPlan(4, 5, 6, 2, 2, 2, keeps, buffers, 1, 1, 10**9)
    assert plan.counts == (2, 3, 3)
    expected = {
        # to and fro in depth: at each of the 5 turns from tile to tile one panel is still there,
        # of A along a line (4 elements, 4 times), of B at its end (2: the last column alone)
        "C": (3 * 24 - 4 * 4, 2 * 30 - 2),
        "A": (24, 60),
        "B": (72, 30),
    }[keeps]
    assert brought(plan) == expected
    assert plan.bytes_in == sum(expected)


# --- memory ------------------------------------------------------------------------------------


@quick
@given(plan=TILED)
def test_memory_is_what_is_held_at_once(plan):
    """Room for each panel and tile, as many as the way of going on needs, and no more."""
    n_a, n_b, n_c = plan.slots
    a, b, c = plan.slot_bytes
    assert plan.memory == n_a * a + n_b * b + n_c * c
    for size, elements, itemsize in (
        (a, plan.tile_m * plan.tile_k, plan.itemsize),
        (b, plan.tile_k * plan.tile_n, plan.itemsize),
        (c, plan.tile_m * plan.tile_n, plan.sum_itemsize),
    ):
        assert elements * itemsize <= size < elements * itemsize + blocking.ALIGNMENT
        assert size % blocking.ALIGNMENT == 0
    m, n, k = plan.counts
    assert 1 <= n_a <= m * k
    assert 1 <= n_b <= k * n
    assert 1 <= n_c <= min(m * n, 2)
    if plan.buffers == 1:
        assert n_c == 1, "nothing flows back while the next is computed"
    if plan.keeps != "A":
        assert n_a <= plan.buffers
    if plan.keeps != "B":
        assert n_b <= plan.buffers
    line = k if plan.buffers == 1 else k + 1  # and the first panel of the next line
    if plan.keeps == "A":
        assert n_a == min(line, m * k)
    if plan.keeps == "B":
        assert n_b == min(line, k * n)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(SIZE, SIZE, SIZE),
    itemsizes=st.sampled_from([(1, 1), (2, 4), (4, 4), (8, 8), (16, 16)]),
    buffers=st.sampled_from([1, 2, 3]),
    times=st.floats(1, 50),
    rates=st.sampled_from([BUS_ONLY, H200, CPU, blocking.NOMINAL]),
)
@example((33, 33, 32), (4, 4), 3, 1.0, H200)
@example((1, 1, 1), (1, 1), 3, 1.0, BUS_ONLY)
def test_a_plan_keeps_its_budget(sizes, itemsizes, buffers, times, rates):
    m, n, k = sizes
    options = {"sum_itemsize": itemsizes[1], "buffers": buffers}
    least = smallest_memory(m, n, k, itemsizes[0], **options)
    budget = int(least * times)
    plan = plan_blocks(m, n, k, itemsizes[0], budget, rates=rates, **options)
    assert (plan.m, plan.n, plan.k, plan.budget) == (m, n, k, budget)
    assert min(2, buffers) <= plan.buffers <= buffers
    assert (plan.itemsize, plan.sum_itemsize) == itemsizes
    assert plan.memory <= budget
    assert plan.bytes_in == sum(brought(plan))
    for size, tile in ((m, plan.tile_m), (n, plan.tile_n), (k, plan.tile_k)):
        assert min(size, blocking.SMALLEST) <= tile <= size
        assert type(tile) is int
    with pytest.raises(ValueError, match="not even the smallest tile fits into"):
        plan_blocks(m, n, k, itemsizes[0], least - 1, rates=rates, **options)


@pytest.mark.parametrize(
    ("sizes", "buffers", "tile", "slots"),
    [
        ((500, 400, 300), 3, (32, 32, 32), (2, 2, 1)),
        ((500, 400, 300), 1, (32, 32, 32), (1, 1, 1)),
        ((7, 400, 300), 3, (7, 32, 32), (2, 2, 1)),
        ((20, 20, 20), 3, (20, 20, 20), (1, 1, 1)),
        ((33, 500, 500), 3, (32, 32, 32), (2, 2, 1)),
        ((33, 33, 32), 3, (33, 33, 32), (1, 1, 1)),  # for the whole one buffer is enough
    ],
)
def test_the_smallest_memory(sizes, buffers, tile, slots):
    for itemsize, sum_itemsize in ((4, 4), (2, 4), (16, 16)):
        m, n, k = tile
        parts = (m * k * itemsize, k * n * itemsize, m * n * sum_itemsize)
        counted = zip(slots, parts, strict=True)
        expected = sum(count * math.ceil(size / 512) * 512 for count, size in counted)
        memory = smallest_memory(*sizes, itemsize, sum_itemsize=sum_itemsize, buffers=buffers)
        assert memory == expected
        assert type(memory) is int


def test_sums_are_as_large_as_elements_unless_told():
    assert plan_blocks(99, 99, 99, 4, 10**5) == plan_blocks(99, 99, 99, 4, 10**5, sum_itemsize=4)
    assert smallest_memory(99, 99, 99, 4) == smallest_memory(99, 99, 99, 4, sum_itemsize=4)
    assert smallest_memory(99, 99, 99, 2, sum_itemsize=4) > smallest_memory(99, 99, 99, 2)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-5, 5, 5)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match=re.escape(", ".join(map(str, sizes)))):
        plan_blocks(*sizes, 4, 10**6)
    with pytest.raises(ValueError, match="at least 1"):
        smallest_memory(*sizes, 4)


# --- few bytes ---------------------------------------------------------------------------------


def reasonable_tiles(size: int, most: int) -> list[int]:
    """For each number of parts the smallest tile: a larger one needs more and brings as much."""
    least = min(size, blocking.SMALLEST)
    return sorted({max(-(-size // n), least) for n in range(1, most + 1)})


CASES = [
    (m, n, k, share, buffers)
    for m, n, k in itertools.product([500, 1000, 2400], repeat=3)
    for share, buffers in ((0.25, 3), (0.12, 1), (0.5, 3))
    if m >= n
]


@pytest.mark.parametrize(("m", "n", "k", "share", "buffers"), CASES[::3])
def test_hardly_more_bytes_than_the_best_of_all_tiles_brings(m, n, k, share, buffers):
    """Where bytes alone count, within 1.25 of brute force; mostly it is the best itself."""
    itemsize = 400  # as if the matrices were larger: costs of each step must not count
    budget = int((m * n + m * k + n * k) * itemsize * share)
    plan = plan_blocks(m, n, k, itemsize, budget, buffers=buffers, rates=BUS_ONLY)
    best = math.inf
    for tile in itertools.product(*(reasonable_tiles(size, 6) for size in (m, n, k))):
        for keeps in "CAB":
            other = BlockPlan(m, n, k, *tile, keeps, buffers, itemsize, itemsize, budget)
            if other.memory <= budget:
                best = min(best, sum(brought(other)))
    assert (m * k + k * n) * itemsize <= best < math.inf
    assert plan.bytes_in <= 1.25 * best


@pytest.mark.parametrize("n", [1, 8, 64, 256])
@pytest.mark.parametrize("budget", ["64 MiB", "512 MiB", "4 GiB"])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_tall_or_wide_and_thin_operands_are_brought_once(n, budget, itemsize):
    budget = parse_size(budget)
    for m, k in ((262_144, 8192), (8192, 262_144), (10**6, 1000)):
        for plan in (
            plan_blocks(m, n, k, itemsize, budget),
            plan_blocks(n, m, k, itemsize, budget),
        ):
            once = (plan.m * plan.k + plan.k * plan.n) * itemsize
            if plan.k * 256 * itemsize * 4 < budget or budget > 2**29:
                assert plan.bytes_in == once
            assert plan.bytes_in <= 1.6 * once


@pytest.mark.parametrize("size", [4096, 16_384, 32_768, 65_536])
def test_large_products_wait_for_arithmetic_not_for_the_bus(size):
    plan = plan_blocks(size, size, size, 4, 15 * 2**28, rates=H200)
    times = plan.predict(H200)
    assert times[IN] < 0.6 * times[MULTIPLY] or size < 10_000
    if size >= 32_768:
        assert times["total"] < 1.06 * plan.n_operations / H200.arithmetic


@pytest.mark.alone
def test_a_plan_is_found_at_once_whatever_the_size():
    begin = time.perf_counter()
    plan = plan_blocks(2**21 + 1, 2**21 + 3, 2**21 + 5, 8, 2**37)
    assert time.perf_counter() - begin < 2
    assert plan.memory <= 2**37
    assert plan.n_steps < 10**5


# --- predictions -------------------------------------------------------------------------------


def test_one_step_takes_what_its_parts_take_one_after_the_other():
    plan = BlockPlan(100, 200, 300, 100, 200, 300, "C", 3, 4, 4, 10**9)
    assert plan.strips == 1
    rates = Rates(fill=1e6, empty=4e6, bus_in=2e6, bus_out=1e6, arithmetic=1e7)
    times = plan.predict(rates)
    fixed = blocking.STEP_SECONDS + blocking.START_SECONDS
    assert times == pytest.approx(
        {
            FILL: 0.36,  # 4 bytes of 100 × 300 and 300 × 200
            IN: 0.18,
            MULTIPLY: 1.2,  # 2 · 100 · 200 · 300 / 1e7
            OUT: 0.08,  # 4 bytes of 100 × 200
            EMPTY: 0.02,
            # filling and the bus go on together, so the slower counts, then the product, then the
            # way back
            "total": 0.36 + 1.2 + 0.08 + fixed,
        },
        rel=0.01,
    )


@pytest.mark.parametrize(
    ("arithmetic", "seconds"),
    [
        (1e7, 0.08 + 0.8 + 0.04),  # the first panels arrive, all is multiplied, the tile leaves
        (1e8, 0.32 + 0.02 + 0.04),  # all panels arrive, the last are multiplied, the tile leaves
    ],
)
def test_what_nothing_hides_comes_before_and_after_the_longest(arithmetic, seconds):
    plan = BlockPlan(100, 100, 400, 100, 100, 100, "C", 3, 4, 4, 10**9)
    assert (plan.counts, plan.strips) == ((1, 1, 4), 1)
    times = plan.predict(Rates(1e6, 1e9, 1e9, 1e6, arithmetic))
    fixed = 4 * blocking.STEP_SECONDS + blocking.START_SECONDS
    assert times["total"] - fixed == pytest.approx(seconds, rel=0.01)


def test_on_a_cpu_nothing_is_copied():
    times = plan_blocks(3000, 2000, 4000, 8, 2**24, buffers=1, rates=CPU).predict(CPU)
    assert [times[kind] for kind in (FILL, IN, OUT, EMPTY)] == [0] * 4
    assert times["total"] == pytest.approx(times[MULTIPLY], rel=0.05)
    assert times[MULTIPLY] == pytest.approx(2 * 3000 * 2000 * 4000 / 1e11, rel=0.01)


RATE = st.sampled_from([1e6, 1e8, 1e10])


@quick
@given(
    sizes=st.tuples(*[st.sampled_from([40, 300, 1000])] * 3),
    budget=st.sampled_from([2**19, 2**21, 2**24]),
    rates=st.builds(Rates, RATE, RATE, RATE, RATE, RATE),
)
def test_all_together_takes_no_less_than_the_longest_and_no_more_than_one_by_one(
    sizes, budget, rates
):
    plan = plan_blocks(*sizes, 4, budget)
    times = plan.predict(rates)
    assert all(type(t) is float for t in times.values())
    total = times.pop("total")
    fixed = blocking.STEP_SECONDS * plan.n_steps + blocking.START_SECONDS
    assert set(times) == {FILL, IN, MULTIPLY, OUT, EMPTY}
    assert times[IN] == plan.bytes_in / rates.bus_in
    assert times[EMPTY] == plan.bytes_out / rates.empty
    assert total >= max(times.values())
    assert total <= (sum(times.values()) + fixed) * 1.3
    slower = Rates(rates.fill, rates.empty, rates.bus_in / 2, rates.bus_out, rates.arithmetic)
    assert plan.predict(slower)["total"] >= total
    slower = Rates(rates.fill, rates.empty, rates.bus_in, rates.bus_out, rates.arithmetic / 2)
    assert plan.predict(slower)["total"] >= total


# --- in words ----------------------------------------------------------------------------------


def test_a_plan_prints_what_it_does():
    text = str(plan_blocks(10_000, 64, 5000, 4, 2**24))
    assert text.startswith("(10,000 × 5,000) @ (5,000 × 64) in ")
    assert re.search(r"in \d+ × \d+ tiles of [\d,]+ × 64, \d+ panels? deep\n", text)
    assert re.search(r"buffers [\d.]+ MiB of 16 MiB; A and B in [\d.]+ MiB, C out 2.44 MiB", text)
    assert "1 panel deep" in str(plan_blocks(5, 5, 5, 4, 2**24))


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (1, 1),
        (2**40, 2**40),
        (np.int64(5000), 5000),
        (1.5e6, 1_500_000),
        ("7", 7),
        (" 7 B ", 7),
        ("1k", 1000),
        ("1 KB", 1000),
        ("1 KiB", 1024),
        ("1Ki", 1024),
        ("1.5 KiB", 1536),
        ("0.5 GiB", 2**29),
        ("500MB", 500 * 10**6),
        ("2 gib", 2**31),
        ("3 TB", 3 * 10**12),
        ("1. MiB", 2**20),
        ("16 TiB", 2**44),
    ],
)
def test_sizes_of_memory(text, n_bytes):
    assert parse_size(text) == n_bytes
    assert type(parse_size(text)) is int


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "GiB", "-1", "-2 GiB", "2 XiB", "2 PiB", "2 iB", "2 i", "1e9", "1,5 GiB"),
        *("two", "1 2 GiB", "nan", "inf", "0x10", ".5 GiB", "2 GiBB", "2 bG", "1 GiB\x00"),
        *(True, False, None, [1], b"1", -5, 1e30, math.inf, math.nan, 2 + 0j),
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(
        ValueError, match="is no size of memory: give bytes, or text such as '2 GiB'"
    ):
        parse_size(text)


@pytest.mark.parametrize("text", [0, "0", "0 GiB", "0.0 GiB", "0.4", 0.0])
def test_a_size_must_be_positive(text):
    with pytest.raises(ValueError, match="a size of memory must be positive, got"):
        parse_size(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1 MiB"),
        (1000 * 2**10, "1000 KiB"),
        (2**30 - 1, "1024 MiB"),
        (123.4 * 2**20, "123 MiB"),
        (4 * 2**30, "4 GiB"),
        (1.25 * 2**40, "1.25 TiB"),
    ],
)
def test_sizes_in_words(n_bytes, text):
    assert size_text(n_bytes) == text


@quick
@given(st.integers(2**10, 2**50))
def test_words_are_read_again(n_bytes):
    assert parse_size(size_text(n_bytes)) == pytest.approx(n_bytes, rel=0.006)
