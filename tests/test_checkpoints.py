from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gpuml
from gpuml import CheckpointError, DataError, checkpoints, model_files
from gpuml.checkpoints import KEY, fingerprint_data, load_checkpoint, save_checkpoint
from gpuml.memory_maps import mapped_file

FILE = "run.safetensors"
FACTS = {"model": "MLP 4-8-3", "optimizer": {"name": "adam", "learning_rate": 0.1}, "seed": 7}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(n=5, facts=FACTS, **state) -> Path:
    """A checkpoint whose numbers all follow from n."""
    save_checkpoint(
        FILE,
        arrays={"weight": np.full((3, n), n, np.float32), "step": np.float64(n) * np.ones(())},
        state={"epoch": n, **state},
        facts=facts,
    )
    return Path(FILE)


def is_whole(arrays, state) -> bool:
    n = state["epoch"]
    return arrays["weight"].shape == (3, n) and bool((arrays["weight"] == n).all())


def fault(facts=FACTS) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(FILE, facts)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("cannot resume")
    assert FILE in message
    return message


# There and back


def test_arrays_come_back_as_they_were(device, rng):
    arrays = {
        "matrix": rng.normal(size=(4, 3)),
        "single": rng.normal(size=7).astype(np.float32),
        "half": rng.normal(size=(2, 2, 2)).astype(np.float16),
        "scalar": np.full((), 0.1),
        "one": np.full(1, 0.1),
        "labels": np.arange(-3, 3),
        "bytes": np.arange(250, 256, dtype=np.uint8),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3)),
        "special": np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324]),
        "name with spaces, ü": np.ones(2),
    }
    save_checkpoint(
        FILE, arrays={k: device.asarray(a) for k, a in arrays.items()}, state={}, facts={}
    )
    again, state = load_checkpoint(FILE, {})
    assert state == {}
    assert set(again) == set(arrays)
    for name, array in arrays.items():
        assert type(again[name]) is np.ndarray
        assert (again[name].dtype, again[name].shape) == (array.dtype, array.shape), name
        assert again[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::2, ::-1],
        np.asfortranarray,
        lambda a: a.astype(">f8"),
        lambda a: np.broadcast_to(a[:1], (5, 6)),
    ],
)
def test_arrays_of_any_layout_are_kept(view):
    array = view(np.arange(24.0).reshape(4, 6))
    save_checkpoint(FILE, arrays={"a": array, "b": array[:1]}, state={}, facts={})
    arrays, _ = load_checkpoint(FILE, {})
    np.testing.assert_array_equal(arrays["a"], array)
    np.testing.assert_array_equal(arrays["b"], array[:1])


def test_no_arrays_at_all_are_kept_too():
    save_checkpoint(FILE, arrays={}, state={"a": 1}, facts={})
    assert load_checkpoint(FILE, {}) == ({}, {"a": 1})


@pytest.mark.parametrize(
    "value",
    [
        0.1 + 0.2,
        5e-324,
        -0.0,
        math.inf,
        2**127 + 1,
        -(2**200),
        "ü\n\"'\\\0",
        "",
        None,
        True,
        [],
        {},
        [1, [2.5, {"a": [None]}]],
        {"ü": {"": 1}},
    ],
)
def test_state_comes_back_exactly(value):
    saved(value=value)
    _, state = load_checkpoint(FILE, FACTS)
    assert repr(state["value"]) == repr(value)


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "SFC64", "Philox"])
def test_a_generator_goes_on_where_it_was(name):
    generator = np.random.Generator(getattr(np.random, name)(3))
    generator.random(5)
    generator.integers(2**32, dtype=np.uint32)  # half a word is left over
    state = generator.bit_generator.state
    if name in ("SFC64", "Philox"):
        with pytest.raises(TypeError, match=r"state\['generator'\].*ndarray"):
            saved(generator=state)
        return
    saved(generator=state)
    expected = generator.permutation(50), generator.integers(2**32, dtype=np.uint32)
    again = np.random.Generator(getattr(np.random, name)(99))
    again.bit_generator.state = load_checkpoint(FILE, FACTS)[1]["generator"]
    np.testing.assert_array_equal(again.permutation(50), expected[0])
    assert again.integers(2**32, dtype=np.uint32) == expected[1]


def test_numbers_of_numpy_and_tuples_become_plain():
    saved(a=np.float32(0.1), b=(np.int64(3), np.bool_(True)))
    _, state = load_checkpoint(FILE, FACTS)
    assert state["a"] == float(np.float32(0.1))
    assert state["b"] == [3, True]
    assert list(map(type, state["b"])) == [int, bool]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(2), r"state\['x'\]: it is of ndarray"),
        ([1, {"y": {1, 2}}], r"state\['x'\]\[1\]\['y'\]: it is of set"),
        ({3: 4}, r"state\['x'\]\[3\]: keys are strings"),
        (b"", "bytes"),
        (1j, "complex"),
    ],
)
def test_what_is_not_plain_is_named_and_nothing_is_written(value, message):
    saved(4)
    with pytest.raises(TypeError, match=message):
        saved(5, x=value)
    with pytest.raises(TypeError, match=message.replace("state", "facts")):
        saved(5, {"x": value})
    assert load_checkpoint(FILE, FACTS)[1] == {"epoch": 4}


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a"]),
        np.array([None]),
        np.zeros(2, complex),
        np.zeros(2, "M8[s]"),
        pytest.param(
            np.zeros(2, np.longdouble),
            marks=pytest.mark.skipif(np.longdouble(0).itemsize <= 8, reason="it is no longer"),
        ),
    ],
)
def test_arrays_that_no_file_keeps_are_named(array):
    with pytest.raises(
        TypeError, match=f"cannot keep bad: it is of {array.dtype}".replace("[", r"\[")
    ):
        save_checkpoint(FILE, arrays={"bad": array}, state={}, facts={})
    with pytest.raises(TypeError, match="expected an array"):
        save_checkpoint(FILE, arrays={"bad": [1, 2]}, state={}, facts={})
    assert not os.listdir()


def test_the_file_is_what_other_programs_read():
    saved()
    arrays = load_file(FILE)
    np.testing.assert_array_equal(arrays["weight"], np.full((3, 5), 5))
    with pytest.raises(gpuml.ModelFileError):
        gpuml.load_model(FILE)


# Whole or not at all


SAVER = """
import sys, numpy as np
from pathlib import Path
from gpuml.checkpoints import load_checkpoint, save_checkpoint
path = Path("run.safetensors")
n = load_checkpoint(path, {})[1]["epoch"] if path.exists() else 0
while True:
    n += 1
    save_checkpoint(path, arrays={"weight": np.full((1000, n), n, np.float32)},
                    state={"epoch": n, "text": str(n) * n}, facts={})
    print(n, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_killed_run_leaves_a_whole_checkpoint_and_no_rubbish_for_long():
    chance = random.Random(1)
    last = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", SAVER], stdout=subprocess.PIPE, text=True)
        for _ in range(chance.randrange(1, 4)):
            assert int(process.stdout.readline()) > last  # it takes up where the last one was
        time.sleep(chance.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in process.stdout.read().split()]
        process.wait()
        arrays, state = load_checkpoint(FILE, {})
        n = state["epoch"]
        assert state["text"] == str(n) * n
        assert arrays["weight"].shape == (1000, n)
        assert (arrays["weight"] == n).all()
        assert n >= max([last, *said])  # what it reported as saved, is
        last = n
        assert len(os.listdir()) <= 2  # the file, and at most one that was not finished
    saved()
    assert os.listdir() == [FILE]


def test_only_what_a_killed_run_left_is_deleted():
    mine = [
        ".run-abcdefgh.safetensors",
        ".run-0_9zzzzz.safetensors",
    ]
    others = [
        ".run-2-abcdefgh.safetensors",
        ".run-abcdefgh.txt",
        ".run-abcdefghi.safetensors",
        ".runabcdefgh.safetensors",
        "run-abcdefgh.safetensors",
        ".rum-abcdefgh.safetensors",
    ]
    for name in mine + others:
        Path(name).touch()
    saved()
    assert sorted(os.listdir()) == sorted([*others, FILE])


MOMENTS = {
    "mkstemp": "tempfile.mkstemp",
    "write": "pathlib.Path.write_bytes",
    "chmod": "pathlib.Path.chmod",
    "fsync": "os.fsync",
    "replace": "pathlib.Path.replace",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_leaves_the_older_checkpoint(monkeypatch, moment):
    def full(*arguments, **_):
        if moment == "write":
            path, content = arguments
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    saved(4)
    with monkeypatch.context() as patch:
        patch.setattr(MOMENTS[moment], full)
        with pytest.raises(OSError, match="No space left on device"):
            saved(5)
    assert os.listdir() == [FILE]
    assert load_checkpoint(FILE, FACTS)[1] == {"epoch": 4}
    saved(6)
    assert load_checkpoint(FILE, FACTS)[1] == {"epoch": 6}


LIMITED = """
import resource, signal, sys, numpy as np
from gpuml.checkpoints import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    save_checkpoint("run.safetensors", arrays={"weight": np.zeros((3, 10**6))}, state={}, facts={})
except OSError as error:
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("n_bytes", [0, 100, 10**6, 23_999_999])
def test_a_file_that_cannot_grow_leaves_the_older_checkpoint(n_bytes):
    """The system itself refuses to write on, somewhere in the middle."""
    saved(4)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(n_bytes)], capture_output=True)
    assert done.returncode == 7, done.stderr
    assert os.listdir() == [FILE]
    assert load_checkpoint(FILE, FACTS)[1] == {"epoch": 4}


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        save_checkpoint("nowhere/run.safetensors", arrays={}, state={}, facts={})
    with pytest.raises(FileNotFoundError, match=f"there is no file {FILE}"):
        load_checkpoint(FILE, {})


# Damaged, foreign, newer


def test_the_bits_of_header_and_data_are_guarded():
    """A changed bit is noticed, or changes nothing."""
    whole = saved(40, generator=np.random.default_rng(0).bit_generator.state).read_bytes()
    before = load_checkpoint(FILE, FACTS)
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    bits = chance.sample(range(8 * header), 2500)
    bits += chance.sample(range(8 * header, 8 * len(whole)), 200)
    n_harmless = 0
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        Path(FILE).write_bytes(damaged)
        try:
            arrays, state = load_checkpoint(FILE, FACTS)
        except CheckpointError:
            continue
        n_harmless += 1
        assert state == before[1]
        assert all(np.array_equal(arrays[k], a) for k, a in before[0].items())
        assert bit < 8 * header
    assert n_harmless < 50  # such as the blanks at the header's end


def test_a_file_cut_off_anywhere_is_refused():
    whole = saved(40).read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        Path(FILE).write_bytes(whole[:length])
        assert "delete the file to begin anew" in fault()
    Path(FILE).write_bytes(whole + b"\0")
    fault()


def test_other_files_are_refused_by_what_they_are():
    Path(FILE).write_bytes(b"some text, and not little of it")
    assert "is not a safetensors file" in fault()
    save_file({"a": np.zeros(3)}, FILE)
    assert "is no checkpoint, but something else" in fault()
    gpuml.Linear(3, 2, device="cpu").save(FILE)
    message = fault()
    assert "is no checkpoint, but a model, which gpuml.load_model reads" in message
    assert "delete" not in message
    Path(FILE).unlink()
    Path(FILE).mkdir()
    assert "is not a file" in fault()


def rewritten(arrays=None, **changes) -> None:
    """Write a file with the right checksum, as another version or somebody else would."""
    description = {"format": 1, "state": {}, "facts": FACTS} | changes
    description = {name: value for name, value in description.items() if value is not None}
    text = json.dumps(description, sort_keys=True)
    kept = arrays or {}
    description["sha256"] = model_files.checksum(kept, text)
    save_file(kept, FILE, {KEY: json.dumps(description)})


def test_a_newer_format_is_refused_by_its_number(monkeypatch):
    rewritten()
    assert load_checkpoint(FILE, FACTS) == ({}, {})
    rewritten(format=2)
    assert "from a newer gpuml, in format 2, and this version reads up to format 1" in fault()
    rewritten(format=2, state=None, facts=None)  # whatever else such a file has
    assert "update gpuml" in fault()
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    saved()
    assert load_checkpoint(FILE, FACTS)[1] == {"epoch": 5}


def test_the_format_is_written_today():
    raw = saved().read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"][KEY])["format"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"format": None},
        {"format": "1"},
        {"format": 0},
        {"format": True},
        {"state": None},
        {"state": 3},
        {"facts": None},
        {"facts": [1]},
    ],
)
def test_a_hostile_description_is_refused(changes):
    rewritten({"a": np.zeros(3)}, **changes)
    assert "is no checkpoint" in fault()


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "{", "null", '{"format": ' + "9" * 5000 + "}", "[" * 10**5]
)
def test_a_description_that_is_no_json_is_refused(text):
    save_file({"a": np.zeros(3)}, FILE, {KEY: text})
    assert "is no checkpoint" in fault()


# Facts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 8}, "seed was 7 and is 8."),
        ({"seed": "7"}, "seed was 7 and is 7."),
        ({"seed": None}, "seed was 7 and is null."),
        ({"model": "MLP 4-9-3"}, "model was MLP 4-8-3 and is MLP 4-9-3."),
        (
            {"optimizer": {"name": "adam", "learning_rate": 0.2}},
            "optimizer, learning_rate was 0.1 and is 0.2.",
        ),
        ({"optimizer": {"name": "adam"}}, "optimizer, learning_rate was 0.1 and is not given."),
        (
            {"optimizer": "adam"},
            'optimizer was {"name": "adam", "learning_rate": 0.1} and is adam.',
        ),
        ({"patience": 3}, "patience was not given and is 3."),
        ({"seed": 7.0}, None),
        ({"seed": np.int64(7)}, None),
    ],
)
def test_facts_that_differ_are_named(changes, message):
    saved()
    facts = FACTS | changes
    if message is None:
        assert load_checkpoint(FILE, facts)[1] == {"epoch": 5}
    else:
        assert f"cannot resume from {FILE}: {message} Run it as it was" in fault(facts)
        with pytest.raises(DataError):
            load_checkpoint(FILE, facts)


def test_a_missing_fact_is_named():
    saved()
    assert "seed was 7 and is not given" in fault({k: FACTS[k] for k in FACTS if k != "seed"})


def test_the_same_facts_are_the_same():
    facts = {"a": (1, (2.5, None)), "b": math.nan, "c": [math.nan], "d": 2**100, "e": {}}
    saved(facts=facts)
    assert load_checkpoint(FILE, json.loads(json.dumps(facts)))[1] == {"epoch": 5}
    assert load_checkpoint(FILE, dict(reversed(facts.items())))[1] == {"epoch": 5}
    assert "d was" in fault(facts | {"d": 2**100 + 1})


def test_many_and_long_differences_are_cut_short():
    saved(facts={str(i): i for i in range(9)} | {"long": "x" * 10_000})
    message = fault({})
    assert len(message) < 500
    assert "0 was 0 and is not given; 1 was 1 and is not given; 2 was" in message
    assert "and 7 more" in message
    saved(facts={"long": "x" * 10_000})
    message = fault({"long": "y"})
    assert "xxx… and is y" in message
    assert len(message) < 300


# The fingerprint of data


def test_a_fingerprint_changes_with_anything(device, rng):
    X, y = rng.normal(size=(500, 30)), rng.integers(9, size=500)

    def of(X, y=y):
        return fingerprint_data(device.asarray(X), device.asarray(y))

    before = of(X)
    assert before == of(X.copy(), y.copy())
    assert set(before) == {"X", "y"}
    assert before["X"].startswith("500x30 float64 ")
    assert json.loads(json.dumps(before)) == before
    seen = {before["X"]}
    for row, column in ((0, 0), (499, 29), (250, 7)):
        changed = X.copy()
        changed[row, column] = np.nextafter(changed[row, column], 9)
        seen.add(of(changed)["X"])
    seen |= {of(a)["X"] for a in (X[::-1], X[:, ::-1], X[1:], X[:, 1:], X.T, X.reshape(-1, 10))}
    seen |= {of(a)["X"] for a in (X.astype(np.float32), X.view(np.int64), -X)}
    swapped = X.copy()
    swapped[[3, 4]] = X[[4, 3]]
    seen.add(of(swapped)["X"])
    assert len(seen) == 14
    labels = y.copy()
    labels[77] += 1
    assert of(X, labels)["y"] != before["y"]
    assert of(X, labels)["X"] == before["X"]
    assert list(fingerprint_data(device.asarray(X))) == ["X"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int8, bool, np.uint16])
@pytest.mark.parametrize("shape", [(37,), (1, 1), (40, 30), (13, 5, 7), (100, 1), (0, 4), (3, 0)])
def test_equal_data_have_equal_fingerprints_wherever_they_lie(device, rng, tmp_path, dtype, shape):
    array = (rng.normal(size=shape) * 9).astype(dtype)
    expected = fingerprint_data(array)
    assert expected == fingerprint_data(device.asarray(array))
    assert expected == fingerprint_data(np.asfortranarray(array))
    assert expected == fingerprint_data(np.repeat(array, 2, axis=0)[::2])
    assert expected == fingerprint_data(array.astype(array.dtype.newbyteorder(">")))
    for order in "CF" if array.size else "":
        path = tmp_path / f"{order}.npy"
        out = np.lib.format.open_memmap(
            path, "w+", dtype=dtype, shape=shape, fortran_order=order == "F"
        )
        out[...] = array
        assert expected == fingerprint_data(np.load(path, mmap_mode="r", allow_pickle=False))


@pytest.fixture
def small(monkeypatch):
    """Limits so low that small arrays count as large ones."""
    monkeypatch.setattr(checkpoints, "WHOLE_BYTES", 10_000)
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(checkpoints, "SAMPLED_BYTES", 80)
    monkeypatch.setattr(checkpoints, "SAMPLED_BLOCKS", 16)


def noticed(device, array) -> list[int]:
    """The rows in which a change changes the fingerprint."""
    before = fingerprint_data(device.asarray(array))
    rows = []
    for row in range(len(array)):
        changed = array.copy()
        changed[row] += 1
        if fingerprint_data(device.asarray(changed)) != before:
            rows.append(row)
    return rows


@pytest.mark.usefixtures("small")
def test_large_data_are_sampled_from_the_first_row_to_the_last(device, rng):
    array = rng.normal(size=(251, 5))  # 10,040 bytes
    rows = noticed(device, array)
    assert len(rows) == 32  # 16 blocks of 2 rows
    assert rows[:2] == [0, 1]
    assert rows[-2:] == [249, 250]
    assert max(np.diff(rows)) <= 17
    # as long as they are not large, all are read
    assert noticed(device, array[:250]) == list(range(250))
    # and rows of more than a block each
    wide = rng.normal(size=(40, 50))
    assert len(noticed(device, wide)) == 16
    assert noticed(device, wide)[-1] == 39
    assert noticed(device, wide[:25]) == list(range(25))
    few = rng.normal(size=(3, 2000))
    assert noticed(device, few) == [0, 1, 2]


@pytest.mark.usefixtures("small")
def test_large_data_of_other_shapes_differ_even_where_the_samples_agree(device):
    zeros = device.xp.zeros
    marks = {
        fingerprint_data(a)["X"]
        for a in (zeros((2000, 2)), zeros((2001, 2)), zeros((2000, 3)), zeros((2000, 2), int))
    }
    assert len(marks) == 4


def resident_kib(array):
    """KiB of an array's map that are in this process's memory, as Linux counts them."""
    address = np.frombuffer(mapped_file(array).map, np.uint8).ctypes.data
    text = Path("/proc/self/smaps").read_text()
    return int(re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", text, re.M | re.S)[1])


def test_a_large_memory_map_is_not_read_into_memory(tmp_path):
    """2 GiB, of which the disk has but a hole."""
    X = np.memmap(tmp_path / "X.bin", np.float32, "w+", shape=(2**23, 64))
    X[-1] = 1
    tracemalloc.start()
    marks = [fingerprint_data(X[:-1]), fingerprint_data(X)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert marks[0] != marks[1]
    assert peak < 100 * 2**20
    if Path("/proc/self/smaps").exists():
        assert resident_kib(X) < 2**16


def test_what_is_no_array_has_no_fingerprint():
    with pytest.raises(TypeError, match="expected an array"):
        fingerprint_data([[1.0]])
