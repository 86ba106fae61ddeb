"""Arrays that are files: which bytes of which file, and which of their pages are in memory."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuml
from gpuml import memory_maps
from gpuml.memory_maps import (
    check_length,
    chunks,
    drop_pages,
    in_memory,
    mapped_file,
    overlap,
    read_ahead,
    write_back,
)

ROOT = Path(__file__).parent.parent
PAGE = mmap.PAGESIZE
LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
quick = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def numbered(path: Path, shape: tuple[int, ...], offset: int = 0, dtype="<i4") -> np.memmap:
    """A mapped file of which each element says its place, after some bytes of something else."""
    values = np.arange(np.prod(shape)).astype(dtype)
    path.write_bytes(b"\xff" * offset + values.tobytes())
    return np.memmap(path, dtype, "r+", offset, shape)


def resident_kib(array) -> int:
    """KiB of an array's map that are in this process's memory, as Linux counts them."""
    address = np.frombuffer(mapped_file(array).map, np.uint8).ctypes.data
    text = Path("/proc/self/smaps").read_text()
    part = re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", text, re.M | re.S)
    return int(part[1])


# --- which part of which file ------------------------------------------------------------------

VIEWS = {
    "all": lambda x: x,
    "rows": lambda x: x[3:7],
    "columns": lambda x: x[:, 5:9],
    "stepped": lambda x: x[1::2, ::3],
    "reversed": lambda x: x[::-1, ::-1],
    "reversed rows": lambda x: x[6:2:-2, 1:],
    "transposed": lambda x: x.T[2:, 1:4],
    "one element": lambda x: x[4:5, 8:9],
    "plain view": lambda x: np.asarray(x)[2:, 3:],
    "view of a view": lambda x: np.asarray(np.asarray(x)[2:8].T)[:, 1:3][::-1],
    "other type": lambda x: x.view("<i2")[:, 3:6],
    "reshaped": lambda x: x.reshape(-1, 4)[5:9],
}


@pytest.mark.parametrize("offset", [0, 128, PAGE, 3 * PAGE + 12])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_knows_its_bytes_in_the_file(tmp_path, view, offset):
    x = VIEWS[view](numbered(tmp_path / "x", (10, 12), offset))
    part = mapped_file(x)
    assert Path(part.owner.filename) == tmp_path / "x"
    places = np.arange((tmp_path / "x").stat().st_size)
    # Write through the view: the bytes that change are the first and the last, and between them.
    before = (tmp_path / "x").read_bytes()
    x[...] = -1 - x
    part.map.flush()
    after = (tmp_path / "x").read_bytes()
    changed = places[np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)]
    assert part.begin + part.first == changed[0]
    assert part.begin + part.last == changed[-1] + 1


@pytest.mark.parametrize("offset", [0, 128, PAGE, 70_000])
def test_whole_pages_hold_the_array_and_begin_at_a_page(tmp_path, offset):
    x = numbered(tmp_path / "x", (50, 1000), offset)
    for part in (x[7:9, 3:5], x[:1, :1], x[-1:, -1:], x):
        found = mapped_file(part)
        first, length = found.whole_pages()
        assert first % PAGE == 0
        assert first <= found.first < first + PAGE
        assert first + length == found.last


def test_plain_memory_is_no_file(tmp_path):
    x = numbered(tmp_path / "x", (4, 5))
    for plain in (
        np.zeros((3, 3)),
        x + 1,
        x.copy(),
        np.array(x),
        x[:0],
        x[[0, 2]],
        x.astype(float),
    ):
        assert mapped_file(plain) is None
        assert not overlap(plain, x)
        check_length(plain, "a")
        for function in (drop_pages, read_ahead, write_back):
            function(plain)  # nothing to do, and no error


@pytest.mark.parametrize(
    ("mode", "shared"), [("r", True), ("r+", True), ("w+", True), ("c", False)]
)
def test_a_file_shows_the_array_unless_changes_stay_in_memory(tmp_path, mode, shared):
    numbered(tmp_path / "x", (4, 5))
    x = np.memmap(tmp_path / "x", "<i4", mode, shape=(4, 5))
    assert mapped_file(x).shared is shared
    assert mapped_file(np.asarray(x)[1:]).shared is shared


def test_a_file_without_a_name_is_known():
    with tempfile.TemporaryFile() as file:
        x = np.memmap(file, "<i4", "w+", shape=(300, 500))
        assert x.filename is None
        assert (mapped_file(x[2:]).first, mapped_file(x).path) == (4000, None)
        assert overlap(x, x[5:])
        os.ftruncate(file.fileno(), 5000)
        with pytest.raises(gpuml.DataError, match="the file of a, without a name, has 5000 bytes"):
            check_length(x, "a")


def test_arrays_that_numpy_opens_are_known(tmp_path):
    for order in (False, True):
        x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", float, (30, 40), order)
        x[...] = 7
        part = mapped_file(np.load(tmp_path / "x.npy", mmap_mode="r"))
        size = (tmp_path / "x.npy").stat().st_size
        assert part.begin + part.last == size
        assert part.begin + part.first == size - x.nbytes
        assert np.asarray(x).flags.f_contiguous is order


# --- how long the file is ----------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 128, PAGE + 4])
def test_a_file_that_was_cut_off_is_found_to_the_byte(tmp_path, offset):
    x = numbered(tmp_path / "x", (10, 1000), offset)
    size = offset + x.nbytes
    check_length(x, "a")
    os.truncate(tmp_path / "x", size - 1)
    with pytest.raises(gpuml.DataError, match="cut off") as caught:
        check_length(x, "operand b")
    for text in ("operand b", str(tmp_path / "x"), f"has {size - 1} bytes", f"needs {size}"):
        assert text in str(caught.value)
    check_length(x[:-1], "a")  # all of it is there
    with pytest.raises(gpuml.DataError):
        check_length(x.T[500:, 1::2][::-1, -1:], "a")  # not so the end of the last row
    os.truncate(tmp_path / "x", 0)
    with pytest.raises(gpuml.DataError, match="has 0 bytes"):
        check_length(x[:1, :1], "a")
    os.truncate(tmp_path / "x", size)
    check_length(x, "a")


# --- pages -------------------------------------------------------------------------------------


@LINUX
def test_dropped_pages_leave_memory_and_the_file_keeps_what_they_held(tmp_path):
    x = numbered(tmp_path / "x", (256, 4096))  # 4 MiB
    x[...] += 1
    assert resident_kib(x) >= 4096
    drop_pages(x[64:192])
    assert resident_kib(x) <= 2048 + 128  # huge pages may go as a whole
    drop_pages(x)
    assert resident_kib(x) == 0
    np.testing.assert_array_equal(x.ravel(), np.arange(1, 256 * 4096 + 1))


@LINUX
def test_changes_that_stay_in_memory_are_never_dropped(tmp_path):
    numbered(tmp_path / "x", (64, 4096))
    x = np.memmap(tmp_path / "x", "<i4", "c", shape=(64, 4096))
    x[10:20] = -5
    drop_pages(x)
    drop_pages(np.asarray(x)[12:])
    in_memory(x, float)
    assert (x[10:20] == -5).all()
    assert x[20, 0] == 20 * 4096
    write_back(x)
    assert np.memmap(tmp_path / "x", "<i4", "r")[10 * 4096] == 10 * 4096


def test_what_was_written_is_flushed_from_the_right_place(tmp_path, monkeypatch):
    """That it reaches the disk cannot be seen from here; that the system is asked to, can."""
    asked = []

    class Watched(mmap.mmap):
        def flush(self, *arguments):
            asked.append(arguments)
            return super().flush(*arguments)

    monkeypatch.setattr(mmap, "mmap", Watched)
    x = numbered(tmp_path / "x", (100, 1000), 128)
    x[50:60] = 0
    write_back(x[50:60])
    first = (128 + 200_000) // PAGE * PAGE
    assert asked == [(first, 128 + 240_000 - first)]
    write_back(np.memmap(tmp_path / "x", "<i4", "c", shape=(3,)))
    assert len(asked) == 1


@LINUX
def test_reading_ahead_changes_nothing(tmp_path):
    x = numbered(tmp_path / "x", (64, 4096), 12)
    read_ahead(x[3:, 5:])
    assert x[63, 4095] == 64 * 4096 - 1


# --- into memory -------------------------------------------------------------------------------


@quick
@given(
    view=st.sampled_from(list(VIEWS)),
    dtype=st.sampled_from(["<i4", ">i4", "<f8", ">f2"]),
    to=st.sampled_from(["f8", "c16", "f4"]),
    chunk=st.sampled_from([1, 50, 4096, 2**22]),
    mode=st.sampled_from(["r", "c"]),
    order=st.sampled_from("CF"),
)
def test_in_memory_all_elements_are_the_same(tmp_path, view, dtype, to, chunk, mode, order):
    if view == "other type":
        view = "all"
    path = tmp_path / "x"
    path.write_bytes(np.arange(120).astype(dtype).tobytes())
    x = np.memmap(path, dtype, mode, 0, (10, 12), order)
    if view == "reshaped" and order == "F":
        view = "columns"
    x = VIEWS[view](x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_maps, "CHUNK_BYTES", chunk)
        copy = in_memory(x, np.dtype(to))
    assert copy.dtype == to
    assert copy.shape == x.shape
    np.testing.assert_array_equal(copy, np.array(x).astype(to))


def test_what_is_in_memory_already_is_not_copied():
    x = np.ones((5, 6))[:, ::2]
    assert np.shares_memory(in_memory(x, np.dtype(float)), x)


@pytest.mark.parametrize("shape", [(7, 3), (1, 10**6), (10**6, 1), (3000, 3000)])
def test_chunks_are_all_of_the_array_in_order(shape):
    x = np.lib.stride_tricks.as_strided(np.zeros(1), shape, (shape[1] * 8 + 24, 8))
    parts = list(chunks(x))
    rows = [i for part in parts for i in range(*part.indices(len(x)))]
    assert rows == list(range(len(x)))


@pytest.mark.parametrize("step", [0, 8])
def test_rows_that_repeat_or_overlap_are_counted_as_they_are_copied(step):
    x = np.lib.stride_tricks.as_strided(np.zeros(10**6), (10**6, 1000), (step, 8))
    assert (
        max(part.stop - part.start for part in chunks(x)) * x[0].nbytes <= memory_maps.CHUNK_BYTES
    )


@LINUX
@pytest.mark.parametrize(
    ("order", "columns"),
    [("C", slice(None)), ("C", slice(5000, 5032)), ("F", slice(None)), ("F", slice(50, 60))],
)
def test_few_pages_are_mapped_while_an_array_is_copied(tmp_path, monkeypatch, order, columns):
    """Linux maps 64 KiB about each byte that is read: narrow columns would bring the whole file."""
    shape = (1024, 16_384) if order == "C" else (16_384, 1024)  # 64 MiB, all of it in the cache
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "f4", shape, order == "F")
    x[...] = 1
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    part = x[:, columns] if order == "C" else x[columns]
    drop_pages(x)
    most = 0

    def watched(array):
        nonlocal most
        most = max(most, resident_kib(x))
        drop_pages(array)

    monkeypatch.setattr(memory_maps, "drop_pages", watched)
    assert in_memory(part, np.dtype("f4")).sum() == part.size
    assert 32 < most <= 8 * 1024
    assert resident_kib(x) <= 1024


# --- do two arrays share bytes? ----------------------------------------------------------------


def bytes_of(part) -> set[int]:
    found = mapped_file(part)
    return set(range(found.begin + found.first, found.begin + found.last))


@quick
@given(
    offsets=st.tuples(*[st.sampled_from([0, 4, 8, PAGE, PAGE + 4, 2 * PAGE, 2 * PAGE + 8])] * 2),
    rows=st.tuples(*[st.integers(0, 9)] * 4),
    mode=st.sampled_from(["r", "r+", "c"]),
    name=st.sampled_from(["x", "./x", "link", "hard"]),
)
def test_two_maps_of_one_file_overlap_where_their_bytes_do(tmp_path, offsets, rows, mode, name):
    numbered(tmp_path / "x", (10, 500), 3 * PAGE)
    for link, make in (("link", os.symlink), ("hard", os.link)):
        if not (tmp_path / link).exists():
            make(tmp_path / "x", tmp_path / link)
    a = np.memmap(tmp_path / "x", "<i4", "r+", offsets[0], (10, 500))
    b = np.memmap(tmp_path / name, "<i4", mode, offsets[1], (10, 500))
    a, b = a[rows[0] : rows[0] + rows[1] + 1], b[rows[2] : rows[2] + rows[3] + 1]
    expected = bool(bytes_of(a) & bytes_of(b))
    assert overlap(a, b) is expected
    assert overlap(np.asarray(b), a[::-1]) is expected


def test_maps_of_different_files_do_not_overlap(tmp_path):
    x, y = (numbered(tmp_path / name, (4, 5)) for name in "xy")
    assert not overlap(x, y)
    assert overlap(x, np.memmap(tmp_path / "x", "<i4", "r", shape=(20,)))


def test_columns_of_one_map_overlap_only_where_their_elements_do(tmp_path):
    x = numbered(tmp_path / "x", (40, 50))
    assert not overlap(x[:, :25], x[:, 25:])
    assert not overlap(x[:, ::2], x[:, 1::2])
    assert overlap(x[:, :26], x[:, 25:])
    again = np.memmap(tmp_path / "x", "<i4", "r", shape=(40, 50))
    assert overlap(x[:, :26], again[:, 25:])


def test_a_file_that_was_deleted_or_moved_is_no_error(tmp_path):
    x, y = (numbered(tmp_path / name, (4, 5)) for name in "xy")
    (tmp_path / "x").unlink()
    assert not overlap(x, y)
    assert overlap(x, np.asarray(x)[2:])
    assert overlap(x, x)


# --- a file that is cut off, met by the product ------------------------------------------------

CUT_OFF = """
import os, sys, numpy as np, gpuml
os.chdir(sys.argv[1])
for name in ("a", "b", "out"):
    for size in (0, 1000, 128 + 8 * 300 * 300 - 1):
        arrays = {}
        for each in ("a", "b", "out"):
            x = np.lib.format.open_memmap(each + ".npy", "w+", float, (300, 300))
            x[:] = 1
            arrays[each] = x
        os.truncate(name + ".npy", size)
        try:
            gpuml.blocked_matmul(**arrays, device="cpu")
        except gpuml.DataError as error:
            assert f"the file of {name}, " in str(error) and "cut off" in str(error), error
        else:
            sys.exit(f"{name} of {size} bytes went unnoticed")
        assert not os.path.exists("out.npy.progress")
print("all refused")
"""


def test_operands_and_results_whose_file_was_cut_off_are_refused(tmp_path):
    """In a process of its own: to read past the end of a file kills."""
    command = [sys.executable, "-c", CUT_OFF, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all refused\n", "")
