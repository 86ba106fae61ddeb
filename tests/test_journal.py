"""The record of finished tiles: what is noted when, what is believed, what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gpuml
from gpuml import journal as module
from gpuml import memory_maps
from gpuml.journal import Journal, fingerprint

ROOT = Path(__file__).parent.parent
FACTS = {"a": "3x4 <f4 0123456789abcdef", "b": "4x5 <f8 fedcba9876543210", "precision": None}
TILES = [(0, 10, 0, 20), (0, 10, 20, 30), (10, 25, 0, 20), (10, 25, 20, 30)]
quick = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.npy.progress"


@pytest.fixture
def out(tmp_path, rng):
    x = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", float, (25, 30))
    x[...] = rng.normal(size=x.shape)
    return x


@pytest.fixture
def written(path, out):
    """The record of all four tiles."""
    journal = Journal(path, out, FACTS, resume=False)
    for tile in TILES:
        journal.add(tile)
    return path


def taken_up(path, out, **facts) -> list:
    return Journal(path, out, FACTS | facts, resume=True).finished


# --- what is written ---------------------------------------------------------------------------


def test_finished_tiles_are_found_again_and_again(written, out):
    before = written.read_bytes()
    for _ in range(2):
        assert taken_up(written, out) == TILES
        assert written.read_bytes() == before
    assert sorted(os.listdir(written.parent)) == ["out.npy", "out.npy.progress"]


def test_the_rest_is_noted_beside_what_was_there(path, out):
    first = Journal(path, out, FACTS, resume=False)
    first.add(TILES[0])
    second = Journal(path, out, FACTS, resume=True)
    second.add(TILES[2])
    assert taken_up(path, out) == [TILES[0], TILES[2]]


def test_without_resume_it_is_begun_anew(written, out):
    assert Journal(written, out, FACTS | {"a": "other"}, resume=False).finished == []
    assert taken_up(written, out, a="other") == []


def test_without_a_record_nothing_is_finished(path, out):
    assert taken_up(path, out) == []
    assert path.exists()


def test_it_is_removed_at_the_end(written, out):
    journal = Journal(written, out, FACTS, resume=True)
    journal.remove()
    assert not written.exists()
    journal.remove()  # somebody else did


def test_a_tile_is_on_the_disk_before_it_is_noted(path, out, monkeypatch):
    """Asked in this order: the tile into its file, the file to the disk, then the note."""
    seen = []

    def write_back(view):
        noted = len(path.read_text().splitlines()) - 1
        seen.append(("tile", noted, view.shape, view.ctypes.data - out.ctypes.data))
        memory_maps.write_back(view)

    def fsync(number):
        seen.append(("note", len(path.read_text().splitlines()) - 1))
        real(number)

    real = os.fsync
    journal = Journal(path, out, FACTS, resume=False)
    monkeypatch.setattr(module, "write_back", write_back)
    monkeypatch.setattr(os, "fsync", fsync)
    for tile in TILES[:2]:
        journal.add(tile)
    assert seen == [
        ("tile", 0, (10, 20), 0),
        ("note", 1),
        ("tile", 1, (10, 10), 20 * 8),
        ("note", 2),
    ]


def test_a_tile_that_could_not_be_written_is_not_noted(path, out, monkeypatch):
    def full(view):
        raise OSError("no space left on the device")

    journal = Journal(path, out, FACTS, resume=False)
    journal.add(TILES[0])
    monkeypatch.setattr(module, "write_back", full)
    with pytest.raises(OSError, match="no space"):
        journal.add(TILES[1])
    monkeypatch.undo()
    assert taken_up(path, out) == [TILES[0]]


# --- what is believed --------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("corner", [0, -1])
def test_a_tile_that_was_changed_since_is_not_finished(written, out, number, corner):
    top, bottom, left, right = TILES[number]
    tile = out[top:bottom, left:right]
    tile[corner, corner] = np.nextafter(tile[corner, corner], 9)  # by its last bit
    assert taken_up(written, out) == [t for t in TILES if t != TILES[number]]
    tile[corner, corner] = np.nextafter(tile[corner, corner], -9)
    assert len(taken_up(written, out)) == 3, "what was struck off stays so"


def test_an_array_that_was_made_anew_is_not_finished(written, out):
    out = np.lib.format.open_memmap(out.filename, "w+", out.dtype, out.shape)
    assert taken_up(written, out) == []


def test_exchanged_tiles_are_not_finished(written, out):
    upper, lower = out[0:10, 0:20], out[10:20, 0:20]
    upper[...], lower[...] = lower.copy(), upper.copy()
    assert taken_up(written, out) == [TILES[1], TILES[3]]


@settings(quick, max_examples=25)
@given(data=st.data())
def test_a_record_cut_off_anywhere_keeps_whole_lines_and_believes_no_more(tmp_path, data):
    path = tmp_path / "out.progress"
    out = np.memmap(tmp_path / "out", float, "w+", shape=(25, 30))
    out[...] = np.arange(750).reshape(25, 30)
    journal = Journal(path, out, FACTS, resume=False)
    for tile in TILES:
        journal.add(tile)
    whole = path.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    head = ends[0]
    cut = data.draw(st.integers(head, len(whole)))
    tail = data.draw(
        st.sampled_from([b"", b"\0" * 50, b"\xff\xfe\x80", b"[1,", b"null\n", b"{}\n"])
    )
    path.write_bytes(whole[:cut] + tail)
    n_whole = sum(end - 1 <= cut for end in ends[1:])  # the mark is whole, the line's end is not
    if cut + 1 in ends and tail:
        n_whole -= 1  # what follows has spoilt the line
    assert taken_up(path, out) == TILES[:n_whole]
    # The record is sound again: what is noted next is found.
    journal = Journal(path, out, FACTS, resume=True)
    journal.add((0, 1, 0, 1))
    assert taken_up(path, out) == [*TILES[:n_whole], (0, 1, 0, 1)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "garbage",
        "5",
        "null",
        '"text"',
        "[]",
        "{}",
        "[0, 10, 0, 20]",
        '["a", "b", "c", "d", "e"]',
        '[0.0, 10.0, 0.0, 20.0, "mark"]',
        '[0, 10, 0, 20, 30, "mark"]',
        '[0, 10, 0, 20, "mark"]',
        "[0, 10, 0, 20, null]",
        '[[0], [10], [0], [20], "mark"]',
        '[null, null, null, null, "mark"]',
        '[0, 99999999999999999999999999, 0, 20, "mark"]',
        '[-5, -1, -9, -2, "mark"]',
        '[10, 0, 20, 0, "mark"]',
        '{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}',
        "\u2028",
    ],
)
def test_garbage_is_no_tile_and_no_error(written, out, line):
    lines = written.read_text().splitlines()
    written.write_text("\n".join([*lines[:3], line, *lines[3:]]) + "\n", encoding="utf-8")
    assert taken_up(written, out)[:2] == TILES[:2]
    assert set(taken_up(written, out)) <= set(TILES)


@pytest.mark.parametrize("text", [b"", b"\n", b"garbage\n", b"[1, 2]\n", b"\xff\xfe\n", b'{"a": '])
def test_a_file_that_is_no_record_is_refused_with_the_cure(path, out, text):
    path.write_bytes(text)
    with pytest.raises(gpuml.DataError, match="is not a record of a product") as caught:
        taken_up(path, out)
    assert f"without resume=True or delete {path}" in str(caught.value)
    assert path.read_bytes() == text, "it may be somebody else's"


@pytest.mark.parametrize("name", [*FACTS, "something new"])
def test_other_facts_are_refused_with_the_difference(written, out, name):
    before = written.read_bytes()
    with pytest.raises(gpuml.DataError, match="cannot resume") as caught:
        taken_up(written, out, **{name: "another"})
    assert f"{name} was {FACTS.get(name)} and is another" in str(caught.value)
    assert f"delete {written}" in str(caught.value)
    assert written.read_bytes() == before
    assert taken_up(written, out) == TILES, "with the right operands it goes on"


def test_facts_that_are_missing_now_are_refused(written, out):
    fewer = {name: FACTS[name] for name in ("b", "precision")}
    with pytest.raises(gpuml.DataError, match="a was 3x4 <f4 0123456789abcdef and is None"):
        Journal(written, out, fewer, resume=True)


DIE_WHILE_TAKING_UP = """
import os, signal, sys, numpy as np
from gpuml import journal
out = np.load(sys.argv[1], mmap_mode="r+")
calls = 0
def dies(name):
    real = getattr(*name)
    def function(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(*name, function)
for name in ((journal, "fingerprint"), (journal.json, "dumps"), (os, "fsync"), (os, "replace")):
    dies(name)
journal.Path.replace = lambda path, to: os.replace(path, to)
facts = journal.json.loads(sys.argv[3])
journal.Journal(journal.Path(sys.argv[1] + ".progress"), out, facts, resume=True)
print(calls)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL here")
@pytest.mark.parametrize("moment", [2, 6, 10, 11])
def test_killed_while_it_is_taken_up_nothing_is_lost(written, out, moment):
    name = str(written).removesuffix(".progress")
    command = [sys.executable, "-c", DIE_WHILE_TAKING_UP, name, str(moment), json.dumps(FACTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == -9, done.stderr + done.stdout
    assert taken_up(written, out) == TILES


# --- fingerprints ------------------------------------------------------------------------------

DTYPES = ["f4", "f8", ">f8", "f2", "i1", "u8", "?", "c8", "c16", "<i4", ">i4"]


@quick
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 50)),
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("CF"),
    chunk=st.sampled_from([1, 300, 2**22]),
    data=st.data(),
)
def test_a_change_of_one_element_changes_the_fingerprint(shape, dtype, order, chunk, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = np.asarray(rng.integers(0, 2, shape).astype(dtype), order=order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_maps, "CHUNK_BYTES", chunk)
        before = fingerprint(x)
        assert fingerprint(x.copy("K")) == before, "the values count, not the place"
        assert fingerprint(x, n_threads=1) == before, "nor who computes it"
        place = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        x[place] = not x[place]
        assert fingerprint(x) != before
        x[place] = not x[place]
        assert fingerprint(x) == before
    assert re.fullmatch(rf"{shape[0]}x{shape[1]} {re.escape(x.dtype.str)} [0-9a-f]{{16}}", before)


@quick
@given(places=st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=2, unique=True))
@example(places=[3, 4])
@example(places=[5, 5 + module.WORDS])  # one below the other, where words are summed in columns
def test_exchanged_elements_change_the_fingerprint(places):
    """Sums alone would not see it."""
    x = np.arange(2**16, dtype=np.int64).reshape(64, 1024)
    before = fingerprint(x)
    i, j = places
    flat = x.reshape(-1)
    flat[[i, j]] = flat[[j, i]]
    assert fingerprint(x) != before


@quick
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))), st.data())
def test_exchanged_rows_and_columns_change_the_fingerprint(x, data):
    axis = data.draw(st.sampled_from([0, 1]))
    order = data.draw(st.permutations(range(x.shape[axis])))
    moved = np.take(x, order, axis)
    assert (fingerprint(moved) == fingerprint(x)) is bool((moved == x).all())


@pytest.mark.parametrize("size", [2**20 - 8, 2**20, 2**23 + 3, 3 * 2**22])
def test_each_part_of_a_large_array_counts(size):
    """Whole rows of words, what is left over, blocks and their edges."""
    x = np.zeros((1, size), np.uint8).reshape(
        -1, 1 if size % 2 else 1024 if size % 1024 == 0 else 8
    )
    before = fingerprint(x)
    flat = x.reshape(-1)
    for place in {0, 1, 8191, 8192, 2**20 - 9, size // 2, 2**22 - 1, 2**22, size - 1}:
        if place < size:
            flat[place] = 1
            assert fingerprint(x) != before, place
            flat[place] = 0
    assert fingerprint(x) == before


def test_shape_and_type_are_part_of_it():
    zeros = np.zeros(24)
    texts = {
        fingerprint(x)
        for x in (
            zeros.reshape(4, 6),
            zeros.reshape(6, 4),
            zeros.reshape(1, 24),
            zeros.reshape(24, 1),
            zeros.view(np.int64).reshape(4, 6),
            zeros.view(">f8").reshape(4, 6),
            zeros.astype("f4").reshape(4, 6),
        )
    }
    assert len(texts) == 7


def test_nan_and_the_sign_of_zero_are_values_as_others():
    x = np.zeros((3, 3))
    before = fingerprint(x)
    x[1, 1] = -0.0
    assert fingerprint(x) != before
    x[1, 1] = np.nan
    assert fingerprint(x) == fingerprint(x.copy()) != before


def test_views_count_by_what_they_show(rng):
    x = rng.normal(size=(100, 120))
    for view in (x[3:70, 5:9], x[::-2, ::3], x.T, x[:, :1], x[7:8]):
        before = fingerprint(view)
        hidden = np.ones(x.shape, bool)
        address = (view.ctypes.data - x.ctypes.data) // 8
        flat = np.lib.stride_tricks.as_strided(
            hidden.reshape(-1)[address:], view.shape, [s // 8 for s in view.strides]
        )
        flat[...] = False
        x[hidden] += 1
        assert fingerprint(view) == before
        view[-1, -1] += 1
        assert fingerprint(view) != before


def test_windows_that_overlap_are_read_in_small_parts():
    x = np.lib.stride_tricks.sliding_window_view(np.ones(20_000, "f4"), 10_000)  # 400 MB in full
    tracemalloc.start()
    fingerprint(x, n_threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_no_thread_is_left():
    before = threading.active_count()
    fingerprint(np.ones((3000, 3000)))
    assert threading.active_count() == before


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
@pytest.mark.parametrize("order", ["C", "F"])
def test_of_a_mapped_file_few_pages_are_in_memory(tmp_path, order):
    code = """
import sys, numpy as np
from gpuml.journal import fingerprint
x = np.load(sys.argv[1], mmap_mode="r")
fingerprint(x[:100, :100])  # threads, libraries
def kib(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
before = kib("VmHWM")
fingerprint(x)
print(kib("VmHWM") - before, kib("RssFile"))
"""
    shape = (16_384, 2048) if order == "C" else (2048, 16_384)  # 128 MiB
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "f4", shape, order == "F")
    (tmp_path / "x.npy").read_bytes()  # all of it is in the system's cache
    command = [sys.executable, "-c", code, str(tmp_path / "x.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    grown, mapped = map(int, done.stdout.split())
    assert grown < 100 * 1024, f"{grown} KiB"
    assert mapped < 60 * 1024, f"{mapped} KiB"
