"""Products that ranks share: right, in one file or on rank 0, agreed upon, taken up again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_distributed import MPIEXEC, PROMPT, Pretending, needs_mpi, run

import gpuml
from gpuml import blocked, sharing
from gpuml.devices import CPU
from gpuml.distributed import Alone, DistributedError
from gpuml.sharing import Places, check_shared, share

# --- in one process ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (5, 3), (3, 5), (2, 2), (100, 7), (9000, 40), (30, 70_001), (50_000,) * 2]
)
def test_shares_are_the_whole_result_once(m, n, size):
    seen = np.zeros((min(m, 9000), min(n, 9000)), np.int8)
    areas = []
    for rank in range(size):
        rows, columns = share(m, n, SimpleNamespace(rank=rank, world_size=size))
        seen[rows, columns] += 1
        areas.append((rows.stop - rows.start) * (columns.stop - columns.start))
    assert sum(areas) == m * n
    assert (seen == 1).all()
    assert max(areas) - min(areas) <= max(min(m, n), 0.02 * m * n / size)


def test_large_shares_suit_a_gpu():
    for rank in range(1, 3):
        rows, _ = share(32_768, 32_768, SimpleNamespace(rank=rank, world_size=3))
        assert rows.start % 64 == 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (7, 5), (1, 100), (100, 1)])
@pytest.mark.parametrize("most", [1, 8, 24, 64, 10_000])
def test_messages_are_the_whole_part_once(shape, most, monkeypatch):
    monkeypatch.setattr(sharing, "MESSAGE_BYTES", most)
    seen = np.zeros(shape)
    for piece in sharing._pieces(seen):
        assert seen[piece].nbytes <= max(most, 8)
        seen[piece] += 1
    assert (seen == 1).all()


def test_alone_a_communicator_changes_nothing(rng):
    a, b = rng.normal(size=(60, 50)), rng.normal(size=(50, 40))
    expected = gpuml.blocked_matmul(a, b, device="cpu")
    found = gpuml.blocked_matmul(a, b, device="cpu", communicator=Alone())
    np.testing.assert_array_equal(found, expected)


def test_those_who_compute_in_one_memory_divide_it(monkeypatch, rng):
    monkeypatch.setattr(blocked, "_safe_limit", lambda _: 4 * 2**20)
    a = rng.normal(size=(2000, 2000))
    options = blocked._Options(None, None, None, False, False, False)
    one, four = (blocked._plan(a, a, options, CPU, n).budget for n in (1, 4))
    assert four == one // 4
    told = blocked._Options("4 MiB", None, None, False, False, False)
    assert blocked._plan(a, a, told, CPU, 4).budget == one


def test_who_shares_memory_is_found_out(monkeypatch):
    monkeypatch.setattr(sharing, "_memory_of", lambda _: "00:1B.0")
    here = [*sharing.places(Alone(), CPU).hosts, ""]

    class Others(Pretending):
        def gather(self, value):
            if not isinstance(value, list):
                return [value] * 4
            name, boot, _ = value
            return [value, [name, boot, "00:1C.0"], [name, boot, "00:1B.0"], self.others]

    found = sharing.places(Others(0, 4, ["far away", "", "00:1B.0"]), CPU)
    assert found == Places([here[0]] * 3 + ["far away"], False, 2)


@pytest.fixture
def out(tmp_path):
    return np.lib.format.open_memmap(tmp_path / "c.npy", "w+", float, (4, 4))


TWO_HOSTS = Places(["one", "two"], False, 1)


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "ext4", "unknown"])
def test_several_hosts_write_to_a_file_only_where_that_is_safe(kind, out, monkeypatch, tmp_path):
    ranks = Pretending(0, 1)
    monkeypatch.setattr(sharing, "_type_of", lambda _: kind)
    with pytest.raises(DistributedError, match=f"c.npy lies on {kind} for rank 0 on one, .* only"):
        check_shared(ranks, out, TWO_HOSTS)
    monkeypatch.setattr(sharing, "_type_of", lambda _: "lustre")
    check_shared(ranks, out, TWO_HOSTS)
    assert os.listdir(tmp_path) == ["c.npy"]


@pytest.mark.skipif(not os.path.exists("/proc/self/mounts"), reason="asks Linux")
def test_the_type_of_a_file_system_is_known(tmp_path):
    assert sharing._type_of(Path("/proc/self/maps")) == "proc"
    assert sharing._type_of(tmp_path) not in ("unknown", "proc")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="asks Linux")
@pytest.mark.parametrize("how", ["deleted", "made anew"])
def test_a_file_that_is_not_what_was_mapped_is_noticed(how, out, tmp_path):
    check_shared(Alone(), out, Places(["one"], True, 1))
    (tmp_path / "c.npy").unlink()
    if how == "made anew":
        other = np.lib.format.open_memmap(tmp_path / "c.npy", "w+", float, (4, 4))
        check_shared(Alone(), other, Places(["one"], True, 1))
    with pytest.raises(DistributedError, match="not the file that rank 0 has mapped"):
        check_shared(Alone(), out, Places(["one"], True, 1))


def test_what_others_finish_is_copied_while_they_compute(rng):
    shared, out = rng.normal(size=(8, 6)), np.zeros((8, 6))
    notes = np.zeros((3, 1 + sharing.MOST_NOTED, 4), np.int64)
    follower = sharing._Follower(out, shared, notes, 2)
    for rank, tile in ((1, (2, 4, 0, 6)), (2, (5, 8, 0, 2)), (2, (5, 8, 2, 6))):
        n = notes[rank, 0, 0] + 1
        notes[rank, n], notes[rank, 0, 0] = tile, n
        end = time.monotonic() + 10
        while not (out[tile[0] : tile[1], tile[2] : tile[3]] != 0).all():
            assert time.monotonic() < end, "it waits for the end"
            time.sleep(0.001)
    assert (out[[0, 1, 4]] == 0).all(), "nobody has said that these are finished"
    copied, shared[2:4] = out[2:4].copy(), 0
    notes[1, 2], notes[1, 0, 0] = (4, 5, 0, 6), 2  # just before the end
    assert follower.finish() == [0]  # rank 0 has noted nothing
    np.testing.assert_array_equal(out[4:], shared[4:])
    np.testing.assert_array_equal(out[2:4], copied, err_msg="copied twice")


# --- by mpiexec --------------------------------------------------------------------------------

PRODUCTS = """
import os
import sys
import threading
import numpy as np
import gpuml
from gpuml import sharing
from gpuml.distributed import ranks

if sys.argv[1] == "by messages":
    sharing.shared_memory = lambda *_: None
    sharing.MESSAGE_BYTES = 1000
if sys.argv[1] == "a rank that may not look":
    if ranks().rank == 1:
        real = sharing.shared_memory
        sharing.shared_memory = lambda communicator, n: real(communicator, 3 * n)
if sys.argv[1] == "many tiles":
    sharing.MOST_NOTED = 1
if sys.argv[1] in ("copies fail", "") and ranks().rank == 0:
    real_copy = sharing._copy

    def copy(to, source, n_threads):
        by_main = threading.current_thread() is threading.main_thread()
        if sys.argv[1] == "":
            assert not by_main or k == 0 or not source.size, "what is noted is copied on the way"
        elif not by_main:
            raise OSError("no copy")
        real_copy(to, source, n_threads)

    sharing._copy = copy
    threading.excepthook = lambda _: None
rng = np.random.default_rng(0)
first = ranks().rank == 0


def numbers(shape, dtype):
    if dtype.startswith("complex"):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    if "int" in dtype:
        return rng.integers(-100, 100, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def mapped(x, name):
    if first:
        np.save(name, x)
    ranks().gather(None)
    return np.load(name, mmap_mode="r")


def in_file(shape, dtype, fortran):
    if first:
        np.lib.format.open_memmap("c.npy", "w+", dtype, shape, fortran_order=fortran)[...] = 77
    ranks().gather(None)
    return np.load("c.npy", mmap_mode="r+")


n_done = 0
shapes = (301, 70, 103), (2, 50, 3), (1, 1, 1), (3, 20, 400), (64, 0, 5), (0, 3, 4), (129, 64, 129)
for dtype in ("float64", "float32", "int32", "complex64", "float16"):
    for case, (m, k, n) in enumerate(shapes):
        a, b = numbers((m, k), dtype), numbers((k, n), dtype)
        wide = a.astype("complex128" if a.dtype.kind == "c" else "float64")
        exact = (wide @ b.astype(wide.dtype)).astype(a.dtype)
        if case % 3 == 1:
            a, b = mapped(a, "a.npy"), np.asfortranarray(b)
        if case % 3 == 2 and k:
            a, b = numbers((k, m), dtype).T, mapped(b, "b.npy")
            wide = a.astype(wide.dtype)
            exact = (wide @ b.astype(wide.dtype)).astype(a.dtype)
        places = {"new": None, "own": np.full((m, n), 77, dtype) if first else None}
        places["of all"] = np.full((m, n), 77, dtype)
        places["strided"] = np.full((2 * m, 3 * n), 77, dtype)[::2, ::3] if first else None
        if m:
            ranks().gather(None)
            places["file"] = in_file((m, n), dtype, fortran=False)
        for name, out in places.items():
            if name == "file" and case % 2:
                ranks().gather(None)
                out = in_file((m, n), dtype, fortran=True)
            c = gpuml.blocked_matmul(
                a, b, out=out, communicator=ranks(), memory_limit="150 KiB", progress=False
            )
            what = f"{dtype} {(m, k, n)} {name}"
            if name == "file" or first:
                assert out is None or c is out, what
                close = {"rtol": 2e-3 if dtype == "float16" else 1e-5, "atol": 1e-4}
                if dtype == "int32":
                    close = {"rtol": 0, "atol": 0}
                np.testing.assert_allclose(c, exact, err_msg=what, **close)
            else:
                assert c is None, what
            if name == "of all" and not first:
                assert (out == 77).all(), "it is not the place of a result"
            n_done += 1
ranks().gather(None)
if first:
    files = sorted(os.listdir())
    assert files == ["a.npy", "b.npy", "c.npy"], files
    print("done", n_done)
"""


@needs_mpi
@pytest.mark.parametrize(
    ("n", "how"),
    [
        (2, ""),
        (3, ""),
        (4, ""),
        (3, "by messages"),
        (2, "a rank that may not look"),
        (3, "many tiles"),
        (2, "copies fail"),
    ],
)
def test_products_are_right_wherever_the_result_goes(n, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(n, PRODUCTS, how)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"done 1\d\d\n", done.stdout), done.stdout


UNLIKE = """
import os
import sys
import numpy as np
import gpuml
from gpuml.distributed import ranks

what, rank = sys.argv[1], ranks().rank
odd = rank == 1
rng = np.random.default_rng(3 if what == "numbers" and odd else 0)
a, b = rng.normal(size=(40, 30)), rng.normal(size=(30, 20))
options = {"communicator": ranks(), "progress": False}
if odd and what == "shape":
    a = a[:-1]
if odd and what == "dtype":
    b = b.astype("float32")
if odd and what == "no array":
    b = b.tolist()
if odd and what == "limit":
    options["memory_limit"] = "1 MiB"
if odd and what == "precision":
    options["precision"] = "tf32"
if odd and what == "device":
    options["device"] = "gpu:99"
if what == "too small":
    options["memory_limit"] = 10
if what == "resume":
    options["resume"] = True
if what in ("folder", "name", "resume it", "one has none", "cut off", "mapped before"):
    folder = f"of{rank}" if what == "folder" else "of"
    os.makedirs(folder, exist_ok=True)
    path = f"{folder}/c{rank if what == 'name' else ''}.npy"
    if rank == 0 or what in ("folder", "name"):
        np.lib.format.open_memmap(path, "w+", "f8", (40, 20))
    ranks().gather(None)
    options["out"] = np.load(path, mmap_mode="r+")
    ranks().gather(None)
    if what == "resume it":
        options["resume"] = odd
    if odd and what == "one has none":
        del options["out"]
    if odd and what == "cut off":
        a.tofile("a")
        a = np.memmap("a", "f8", "r", shape=(40, 30))
        os.truncate("a", 5000)
    if what == "mapped before":
        if odd:
            os.remove(path)
            options["out"] = np.lib.format.open_memmap(path, "w+", "f8", (40, 20))
        ranks().gather(None)
try:
    gpuml.blocked_matmul(a, b, **options)
    said = "nothing"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
for i, text in enumerate(ranks().gather(said)):
    if rank == 0:
        print(i, text)
"""
UNEQUAL = "DistributedError: the ranks disagree: "


@needs_mpi
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("shape", [UNEQUAL + r"a is float64 of shape \(40, 30\) on rank 0 and .*39.* on rank 1"]),
        ("dtype", [UNEQUAL + r"b is float64 of .* on rank 0 and float32 of .* on rank 1"]),
        ("no array", [UNEQUAL + r"b is float64 of .* on rank 0 and list on rank 1"]),
        ("numbers", [UNEQUAL + r"a sample of a is \w+ on rank 0 and \w+ on rank 1"]),
        ("limit", [UNEQUAL + "memory_limit is None on rank 0 and 1 MiB on rank 1"]),
        ("precision", [UNEQUAL + "precision is None on rank 0 and tf32 on rank 1"]),
        ("resume it", [UNEQUAL + "resume is False on rank 0 and True on rank 1"]),
        ("one has none", [UNEQUAL + "out is a file, .* on rank 0 and None on rank 1"]),
        ("too small", ["DataError: a memory limit of 10 bytes is too small"]),
        ("resume", ["ValueError: to resume, give the memory-mapped out"]),
        (
            "device",
            [
                "DistributedError: rank 1 of 3 cannot go on: DeviceError: ",
                "DeviceError: .*gpu:99",
                "DistributedError: rank 1 of 3 cannot go on: DeviceError: ",
            ],
        ),
        (
            "cut off",
            [
                "DistributedError: rank 1 of 3 cannot go on: DataError: .* was cut off",
                "DataError: .* was cut off",
                "DistributedError: rank 1 of 3 cannot go on: DataError: .* was cut off",
            ],
        ),
        (
            "folder",
            [r"DistributedError: rank 1 on \S+ does not see \S+of0/c.npy of rank 0 .*of1/c.npy"],
        ),
        ("name", [r"DistributedError: rank 1 on \S+ does not see \S+of/c0.npy .*of/c1.npy"]),
        ("mapped before", ["DistributedError: .* not the file that rank 0 has mapped"]),
    ],
)
def test_ranks_that_do_not_fit_are_told_on_all_of_them(what, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin = time.monotonic()
    done = run(3, UNLIKE, what, timeout=PROMPT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < PROMPT
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    for rank, line in enumerate(lines):
        wanted = said[rank] if len(said) > 1 else said[0]
        assert re.match(f"{rank} {wanted}", line), done.stdout
    assert not [name for name in tmp_path.rglob("*") if "probe" in name.name]


INTERRUPTED = """
import json
import os
import signal
import sys
import time
from pathlib import Path
import numpy as np
import gpuml
from gpuml.distributed import ranks

what, rank = sys.argv[1], ranks().rank
gpuml.blocked.measure_rates = lambda *_: None  # it takes a second
rng = np.random.default_rng(0)
a, b = rng.normal(size=(400, 64)), rng.normal(size=(64, 192))
if what == "other numbers":
    a[0, 0] += 1
if rank == 0 and not Path("c.npy").exists():
    np.lib.format.open_memmap("c.npy", "w+", "f8", (400, 192))[...] = np.nan
ranks().gather(None)
out = np.load("c.npy", mmap_mode="r+")


def progress(n_done, n_tiles):
    if n_done == 2 + rank and what != "resume":
        Path(f"rank{rank}").touch()
        while len(list(Path().glob("rank*"))) < ranks().world_size:
            time.sleep(0.01)
        if what == "Ctrl-C":
            time.sleep(60)
        if rank == 1 and what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and what == "raises":
            raise OSError("the disk is full")
        time.sleep(60)


_, report = gpuml.blocked_matmul(
    a,
    b,
    out=out,
    communicator=ranks(),
    memory_limit="200 KB",
    progress=progress,
    resume=what in ("resume", "other numbers"),
    return_report=True,
)
np.testing.assert_allclose(out, a @ b, rtol=1e-10, atol=1e-10)
done = ranks().gather([report.n_tiles, report.plan.n_tiles, str(report)])
if rank == 0:
    print(json.dumps(done))
"""


@needs_mpi
@pytest.mark.parametrize(
    ("what", "again"),
    [("is killed", 1), ("is killed", 2), ("is killed", 3), ("raises", 4), ("Ctrl-C", 3)],
)
def test_what_ranks_left_is_taken_up_by_any_number_of_them(what, again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if what == "Ctrl-C":
        interrupt(tmp_path)
    else:
        done = run(3, INTERRUPTED, what, timeout=PROMPT)
        assert done.returncode != 0
        if what == "raises":
            assert "OSError: the disk is full" in done.stderr
        assert done.stderr.count("Traceback") == (what == "raises"), done.stderr
    records = [f"c.npy.progress{end}" for end in ("", ".1", ".2")]
    assert sorted(name for name in os.listdir() if "progress" in name) == records
    n_before = [len(Path(name).read_text().splitlines()) - 1 for name in records]
    assert n_before == [2, 3, 4]

    done = run(3, INTERRUPTED, "other numbers", timeout=PROMPT)
    assert "cannot resume: a was 400x64" in done.stderr, "what is there must stay"
    assert [len(Path(name).read_text().splitlines()) - 1 for name in records] == n_before

    done = run(again, INTERRUPTED, "resume")
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    n_now, n_all = (sum(report[i] for report in reports) for i in (0, 1))
    if again == 3:
        assert n_now == n_all - 9
    assert n_now < n_all, "some tiles were finished"
    assert all("taken up again: 9 tiles" in report[2] for report in reports)
    assert not [name for name in os.listdir() if "progress" in name]


def interrupt(folder):
    call = [MPIEXEC, "-n", "3", sys.executable, "-c", INTERRUPTED, "Ctrl-C"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"GPUML_DEVICE": "cpu"}
    with subprocess.Popen(call, cwd=folder, env=environment, **pipes) as job:
        begin = time.monotonic()
        while len(list(folder.glob("rank*"))) < 3:
            assert time.monotonic() - begin < PROMPT, "they do not even begin"
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=PROMPT)
    assert job.returncode != 0
    assert "Traceback" not in err, err


BY_ITSELF = """
import numpy as np
import gpuml
from gpuml.distributed import ranks

a = np.full((5, 4), float(ranks().rank))
c = gpuml.blocked_matmul(a, np.ones((4, 3)))
assert (c == 4 * ranks().rank).all()
"""


@needs_mpi
def test_without_a_communicator_each_rank_multiplies_by_itself():
    done = run(2, BY_ITSELF, timeout=PROMPT)
    assert done.returncode == 0, done.stderr
