"""The threat model, executable: what a hostile file tries, and the refusal it gets.

Whoever can give us a file can choose each of its bytes. Such a file must not run code, write or
read other files, take more memory than its length explains, keep us busy for long, change what a
terminal shows, or be taken for something that it is not. Whoever can change files of ours while we
read or write them, or the package itself, has no need of hostile files: that is not defended
against. Nor can a checksum inside of a file say who wrote it: a SHA-256 from elsewhere can.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import struct
import time
import tracemalloc
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hostile import (
    CLASSES,
    FEATURES,
    Bomb,
    a_model,
    archive,
    header,
    joined,
    npy,
    parts,
    saved,
    signed,
)
from safetensors.numpy import load

import gpuml
from gpuml import datasets, model_files
from gpuml.checkpoints import KEY, load_checkpoint, save_checkpoint
from gpuml.errors import GpumlError
from gpuml.journal import Journal
from gpuml.peers import PeerTable
from gpuml.plain_files import parse_json
from gpuml.recordings import recorded
from gpuml.scaling import Scaling

MOST_SECONDS, MOST_BYTES = 2, 256 * 2**20
ARRAYS = {"X": FEATURES, "y": np.array([0.0, 1, 0, 1])}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def refused(read, *arguments, **options) -> str:
    """What a file gets: one line, in time, within memory, by an error of ours."""
    warnings.simplefilter("error")
    before = sorted(Path("..").rglob("*"))
    begin = time.process_time()
    with pytest.raises(GpumlError) as caught:
        read(*arguments, **options)
    seconds = time.process_time() - begin
    tracemalloc.start()  # which takes time itself
    with pytest.raises(GpumlError):
        read(*arguments, **options)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert message.isprintable(), "on one line, and nothing that a terminal would obey"
    assert len(message) < 700
    assert seconds < MOST_SECONDS
    assert most < MOST_BYTES
    assert sorted(Path("..").rglob("*")) == before, "no file was made, none was deleted"
    return message


def written(raw: bytes, name: str = "model.safetensors") -> Path:
    Path(name).write_bytes(raw)
    return Path(name)


def model_bytes(**options) -> bytes:
    a_model(**options).save("good.safetensors")
    return Path("good.safetensors").read_bytes()


def load_model(path) -> gpuml.Model:
    return gpuml.load_model(path, device="cpu")


# --- files that are programs -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "X.npy", "data.npz"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_in_disguise(name, protocol):
    """A pickle under another name tries to run a program; it is of the wrong kind."""
    path = written(pickle.dumps(Bomb(Path("exploded").absolute()), protocol), name)
    read = load_model if name.startswith("model") else gpuml.load_dataset
    assert "is not a safetensors file" in (text := refused(read, path)) or "not the kind" in text
    pickle.loads(path.read_bytes())  # the proof that it would have
    assert Path("exploded").exists()


@pytest.mark.parametrize("where", ["X", "y"])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_pickle_in_an_array_of_objects(where, kind):
    """An array of objects, which only pickle can read, tries to run a program."""
    bombs = np.array([Bomb(Path("exploded").absolute())] * 4, object)
    raw = {name: saved(array) for name, array in (ARRAYS | {where: bombs}).items()}
    for name, data in raw.items():
        written(data, f"{name}.npy")
    if kind == "npy":
        message = refused(gpuml.load_dataset, "X.npy", "y.npy")
    else:
        members = {f"{name}.npy": data for name, data in raw.items()}
        message = refused(gpuml.load_dataset, written(archive(members), "a.npz"))
    assert "object array, which only pickle can read, and a pickle can run any program" in message
    np.load(f"{where}.npy", allow_pickle=True)
    assert Path("exploded").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4, __import__('os').getpid()), }",
        "__import__('pathlib').Path('exploded').touch()",
        "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (4,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4, 3), 'more': True, }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2 + 2, 3), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-4, -3), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': [4, 3], }",
        "{'descr': '<f8', 'fortran_order': 'False', 'shape': (4, 3), }",
        "{'descr': 'f8,f8', 'fortran_order': False, 'shape': (4, 3), }",
        "{'descr': '<f8', 'descr': '|O', 'fortran_order': False, 'shape': (4, 3), }",
        "(" * 5000,
        "-" * 9999 + "1",
    ],
)
def test_a_header_that_is_a_program(text):
    """The header of an .npy file is Python: it tries to be more than type, order and shape."""
    message = refused(gpuml.load_dataset, written(npy(text, FEATURES.tobytes()), "X.npy"))
    assert "no plain array" in message or "says twice" in message


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**7])
def test_a_header_longer_than_the_file(length):
    """The length of the header tries to have as much memory taken."""
    path = written(length.to_bytes(8, "little") + b"{}" * 50)
    assert "is truncated: its header needs" in refused(load_model, path)


def test_a_header_bomb():
    """A header of a gigabyte, which costs its sender nothing, tries to fill the memory."""
    path = written((2**30).to_bytes(8, "little") + b"{")
    os.truncate(path, 2**30 + 8)
    assert "its header has 1,073,741,824 bytes, and at most" in refused(load_model, path)


@pytest.mark.parametrize("text", [b'{"a":' + b"[" * 10**6, b'{"a":' * 10**6, b"{" + b" " * 10**6])
def test_a_header_nested_without_end(text):
    """Brackets in brackets try to overflow the stack."""
    assert "is damaged" in refused(load_model, written(joined(text, b"")))


def test_a_hundred_thousand_arrays_without_numbers():
    """Arrays that take no bytes try to keep us busy with each of them."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = written(joined({f"a{i}": entry for i in range(120_000)}, b""))
    assert "it has 120,000 arrays, and at most 10,000 are read" in refused(load_model, path)


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("text", ['{"a": [1, 2]}', '{"a": 1, "a": 2}', "[" * 10**6, "x"])
def test_python_looks_for_cycles_afterwards_as_before(text, is_on):
    """A file must not switch off what it is read without: memory would never be given back."""
    (gc.enable if is_on else gc.disable)()
    try:
        with suppress(ValueError):
            parse_json(text)
        assert gc.isenabled() == is_on
    finally:
        gc.enable()


def test_an_array_hidden_behind_another_of_the_same_name():
    """Two arrays of one name: some readers would see the first, others the last."""
    head, _, data = parts(model_bytes())
    text = json.dumps(head)
    twice = "{" + text[1:-1] + ", " + text[1:-1] + "}"
    assert "is there twice" in refused(load_model, written(joined(twice.encode(), data)))


def changed(**changes) -> bytes:
    """A file in whose header the entry of the first layer's weights is changed."""
    raw = model_bytes()
    n = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + n])
    for name, value in changes.items():
        old = table["layers.0.weight"][name]
        table["layers.0.weight"][name] = value(old) if callable(value) else value
    return joined(table, raw[8 + n :])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data_offsets": lambda o: [o[0] - 4, o[1] - 4]}, "overlaps another"),
        ({"data_offsets": lambda o: [o[0] + 4, o[1] + 4]}, "leaves bytes unused"),
        ({"data_offsets": lambda o: [o[0] + 10**6, o[1] + 10**6]}, "leaves bytes unused"),
        ({"data_offsets": lambda o: [o[1], o[0]]}, "its offsets give it -48"),
        ({"data_offsets": [-48, 0]}, "no whole numbers"),
        ({"data_offsets": [0, 2**64]}, "no whole numbers"),
        ({"data_offsets": [0.0, 48.0]}, "no whole numbers"),
        ({"data_offsets": [0]}, "1 offsets"),
        ({"shape": [2**62, 4]}, "takes 73,786,976,294,838,206,464 bytes, its offsets give it 48"),
        ({"shape": [2**32, 2**32]}, "takes 73,786,976,294,838,206,464 bytes"),
        ({"shape": [-3, -4]}, "no whole numbers"),
        ({"shape": [True, 12]}, "no whole numbers"),
        ({"shape": [1] * 60 + [12]}, "61 axes"),
        ({"shape": "34"}, "no whole numbers"),
        ({"shape": None}, "no whole numbers"),
        ({"shape": [4, 3]}, "its checksum does not fit"),
        ({"dtype": "F64"}, "takes 96 bytes"),
        ({"dtype": "I32"}, "its checksum does not fit"),
        ({"dtype": "BF16"}, "is of type BF16; known"),
        ({"dtype": "O"}, "is of type O; known"),
        ({"dtype": ["F32"]}, "is of type"),
    ],
)
def test_offsets_shapes_and_types_that_lie(changes, expected):
    """An entry of the header tries to reach other bytes, or to have memory taken for none."""
    message = refused(load_model, written(changed(**changes)))
    assert expected in message


@pytest.mark.parametrize(
    "name",
    ["../../exploded", "/etc/passwd", "C:\\exploded", "layers.0.weight\0", "a\nb", "\x1b[2J", "‮"],
)
def test_names_that_are_paths_or_commands_for_a_terminal(name):
    """A name tries to become a file, or to change what a terminal shows; it is only a name."""
    arrays = load(model_bytes())
    _, description, _ = parts(model_bytes())
    arrays[name] = np.ones(2, np.float32)
    message = refused(load_model, written(signed(arrays, description)))
    assert "should have shape none, the file has (2,)" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_poison_what_they_meet(value):
    """A weight that is not finite tries to make every prediction, and further training, so."""
    arrays, (_, description, _) = load(model_bytes()), parts(model_bytes())
    arrays["layers.1.weight"] = arrays["layers.1.weight"].copy()
    arrays["layers.1.weight"][0, 0] = value
    message = refused(load_model, written(signed(arrays, description)))
    assert "layers.1.weight has numbers that are not finite" in message


@pytest.mark.parametrize(
    "sizes",
    [
        [3, 10**9, 3],
        pytest.param([3] * 10**5, id="a hundred thousand layers"),
        [10**400, 3],
        [3, 4, 4],
        [3, -4, 3],
    ],
)
def test_sizes_that_the_arrays_do_not_have(sizes):
    """The description tries to have a model made that is larger than the file."""
    arrays, (_, description, _) = load(model_bytes()), parts(model_bytes())
    message = refused(load_model, written(signed(arrays, description | {"sizes": sizes})))
    faults = "should have shape", "sizes must be", "are too many for 4 arrays"
    assert any(fault in message for fault in faults)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"classes": ["a", "b", "c" * 30 * 2**20]}, "at most 8,388,608 are read"),
        ({"classes": ["a", "b", "b\0"]}, "ends with a zero byte"),
        ({"classes": [1, 2, 10**30]}, "at most 64 bits"),
        ({"classes": [0.5, 1.5, float("nan")]}, "must be finite"),
        ({"classes": ["a", "b", "\ud800"]}, "not text in UTF-8"),
        ({"classes": [["a"], ["b"], ["c"]]}, "all text or all numbers"),
        ({"classes": {"__class__": "os"}}, "preprocessing is damaged"),
        ({"feature_names": ["\ud800", "v", "w"]}, "not text in UTF-8"),
        ({"code": "import os"}, "an entry 'code', which this version of gpuml does not know"),
    ],
)
def test_preprocessing_that_lies(change, expected):
    """Classes and names try to take more memory than they need, or to be mixed up."""
    arrays, (_, description, _) = load(model_bytes()), parts(model_bytes())
    description["preprocessing"] |= change
    assert expected in refused(load_model, written(signed(arrays, description)))


def test_many_short_classes_beside_a_long_one():
    """NumPy keeps names of equal length: one long name tries to make a hundred thousand long."""
    classes = tuple(sorted([*map(str, range(10**5)), "x" * 10**6]))
    options = {"classes": classes, "feature_names": [], "target_name": ""}
    tables = {"mean": np.zeros(3), "scale": np.ones(3)}
    with pytest.raises(ValueError, match="would take 400,004,000,000 bytes"):
        datasets.Preprocessing.from_arrays(tables, options)


def test_another_model_in_the_place_of_the_right_one():
    """A good file with other weights tries to pass: only its SHA-256 can tell."""
    raw = model_bytes()
    digits = model_files.file_sha256("good.safetensors")
    model = a_model()
    model.parameters["layers.1.bias"] = 7
    model.save("model.safetensors")
    load_model("model.safetensors")
    message = refused(gpuml.load_model, "model.safetensors", device="cpu", sha256=digits)
    assert f"its SHA-256 is {model_files.file_sha256('model.safetensors')}" in message
    assert f"and {digits} was asked for" in message
    gpuml.load_model(written(raw), device="cpu", sha256=f" {digits.upper()}\n")
    for wrong in "", digits[1:], "g" * 64, digits + "0", "é" * 64:
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            gpuml.load_model("model.safetensors", device="cpu", sha256=wrong)


def test_a_single_bit_anywhere_changes_the_sha256():
    """A bit that the checksum inside does not cover, as of a space, tries to pass."""
    raw = model_bytes()
    digits = model_files.file_sha256("good.safetensors")
    for place in range(0, len(raw), 7):
        bad = bytearray(raw)
        bad[place] ^= 1
        path = written(bytes(bad))
        refused(gpuml.load_model, path, device="cpu", sha256=digits)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_a_pipe_that_never_says_anything():
    """A pipe under the name of a file tries to keep us waiting."""
    for name in "model.safetensors", "X.npy", "a.npz", "t.csv":
        os.mkfifo(name)
    assert "is not a file" in refused(load_model, "model.safetensors")
    for name in "X.npy", "a.npz", "t.csv":
        assert "there is no file" in refused(gpuml.load_dataset, name)


@pytest.mark.parametrize("name", ["model.safetensors", "X.npy"])
def test_a_file_larger_than_the_memory(monkeypatch, name):
    """A file with a hole of a gigabyte, free for its sender, tries to fill the memory."""
    monkeypatch.setattr(type(gpuml.get_device("cpu")), "memory", lambda self: (2**29, 2**30))
    n = 2**27
    if name == "X.npy":
        path = written(npy(header("<f8", (n, 1))), name)
        read = gpuml.load_dataset
    else:
        entry = {"dtype": "F64", "shape": [n, 1], "data_offsets": [0, 8 * n]}
        path = written(joined({"weight": entry}, b""), name)
        read = load_model
    os.truncate(path, path.stat().st_size + 8 * n)
    assert "bytes of memory, and 536,870,912 are free" in refused(read, path)


# --- checkpoints, journals, recordings ---------------------------------------------------------


def checkpoint_parts() -> tuple[dict[str, np.ndarray], dict]:
    save_checkpoint("good", arrays={"weights": np.ones(3)}, state={"n": 1}, facts={"seed": 0})
    raw = Path("good").read_bytes()
    return load(raw), parts(raw, KEY)[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 10**30}, "from a newer gpuml"),
        ({"format": "1"}, "format 1"),
        ({"facts": {"seed": 0, "\x1b[2J": 1}}, "\\x1b[2J was 1 and is not given"),
        ({"facts": {"seed": "\x1b[2J\n" * 10**5}}, "seed was \\x1b[2J\\n"),
        ({"facts": None}, "is no checkpoint"),
        ({"state": "\ud800"}, "not text in UTF-8"),
        ({"state": [[[]]] * 3}, "is no checkpoint"),
    ],
)
def test_checkpoints_that_lie(change, expected):
    """A checkpoint tries to be taken for another, or to say more than it knows."""
    arrays, description = checkpoint_parts()
    written(signed(arrays, description | change, KEY), "run")
    message = refused(load_checkpoint, "run", {"seed": 0})
    assert expected in message
    assert message.startswith("cannot resume")


def run_of(checkpoint, n_epochs=2):
    model = gpuml.MLP([3, 4, 2], device="cpu")
    X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
    return gpuml.train(
        model,
        X,
        np.arange(8) % 2,
        n_epochs=n_epochs,
        batch_size=4,
        checkpoint=checkpoint,
        progress=False,
        validation_data=(X, np.arange(8) % 2),
        patience=5,
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a, s: a.update(weights=a["weights"][:1]), r"weights should be .*\(26,\)"),
        (lambda a, s: a.update(weights=np.full_like(a["weights"], np.nan)), "not finite"),
        (lambda a, s: a.update(weights=a["weights"].astype(int)), "should be of floats"),
        (lambda a, s: a.pop("weights"), "the file has none"),
        (lambda a, s: a.update(more=np.ones(1)), "more should be none"),
        (lambda a, s: s.pop("columns"), "KeyError"),
        (lambda a, s: s.pop("generator"), "KeyError"),
        (lambda a, s: s.update(generator={"bit_generator": "PCG64"}), "does not fit the run"),
        (lambda a, s: s.update(generator=[1]), "does not fit the run"),
        (lambda a, s: s.update(columns=[]), "no table of numbers"),
        (lambda a, s: s.update(columns={"epoch": [1, 2], "loss": [0]}), "count the epochs"),
        (lambda a, s: s.update(columns={"epoch": [5]}), "count the epochs"),
        (lambda a, s: s.update(columns={"epoch": [1], "loss": ["0"]}), "no table of numbers"),
        (lambda a, s: s.update(best=[1]), "does not fit the run"),
        (lambda a, s: s.update(best=None), "best should be none"),
        (lambda a, s: s.update(best=["x", "y"]), "does not fit the run"),
    ],
)
def test_a_checkpoint_of_the_right_run_with_other_contents(change, expected):
    """The facts are those of the run, which are no secret: the contents try to break it."""
    run_of("good")
    raw = Path("good").read_bytes()
    arrays, description = load(raw), parts(raw, KEY)[1]
    written(raw, "run")
    run_of("run", 3)  # it would be taken up
    change(arrays, description["state"])
    written(signed(arrays, description, KEY), "run")
    with pytest.raises(gpuml.CheckpointError, match=expected):
        run_of("run", 3)


@pytest.mark.parametrize(
    "line", ["[" * 10**5, '{"a":' * 10**5, "[true, 2, 0, 3, 0]", '[0, 1e999, 0, 3, "m"]', "\x1b[2J"]
)
def test_records_of_a_product_with_lines_that_lie(line):
    """A line tries to overflow the stack, or to be taken for a tile: what it says is not done."""
    out = np.lib.format.open_memmap("out.npy", "w+", float, (4, 3))
    path = Path("out.npy.progress")
    path.write_text(json.dumps({"a": "1"}) + "\n" + line + "\n")
    assert Journal(path, out, {"a": "1"}, resume=True).finished == []
    path.write_text(line + "\n")
    message = refused(Journal, path, out, {"a": "1"}, resume=True)
    assert "is not a record of a product" in message


def test_a_record_that_has_the_result_read_for_each_line(monkeypatch):
    """A hundred thousand lines, each of the whole result, try to keep us busy for hours."""
    out = np.lib.format.open_memmap("out.npy", "w+", float, (4, 3))
    path, calls = Path("out.npy.progress"), []
    path.write_text(json.dumps({}) + "\n" + '[0, 4, 0, 3, "m"]\n' * 10**5)
    monkeypatch.setattr(Journal, "_mark", lambda self, tile: calls.append(tile))
    assert Journal(path, out, {}, resume=True).finished == []
    assert len(calls) == 4


def test_records_of_many_ranks_that_have_the_result_read_for_each(monkeypatch):
    """A hundred records, of as many ranks, each within bounds, try the same together."""
    out = np.lib.format.open_memmap("out.npy", "w+", float, (4, 3))
    path, calls = Path("out.npy.progress"), []
    for name in [path.name, *(f"{path.name}.{i}" for i in range(1, 100))]:
        Path(name).write_text(json.dumps({}) + "\n" + '[0, 4, 0, 3, "m"]\n' * 3)
    monkeypatch.setattr(Journal, "_mark", lambda self, tile: calls.append(tile))
    assert Journal(path, out, {}, resume=True).finished == []
    assert len(calls) == 4


def test_records_of_many_ranks_that_are_too_long_together():
    """Holes, each of which would be read, try to fill the memory together."""
    out = np.lib.format.open_memmap("out.npy", "w+", float, (4, 3))
    for name in "out.npy.progress", "out.npy.progress.1", "out.npy.progress.2":
        Path(name).write_bytes(b"")
        os.truncate(name, 30 * 2**20)
    message = refused(Journal, Path("out.npy.progress"), out, {}, resume=True)
    assert "it is too long" in message


@pytest.mark.skipif(os.name == "nt", reason="links need a permission there")
def test_a_link_where_a_record_is_written():
    """A link tries to have a record written over another file; the link is replaced."""
    Path("precious").write_text("precious")
    for name in "out.npy.progress.new", "out.npy.progress":
        os.symlink("precious", name)
    out = np.lib.format.open_memmap("out.npy", "w+", float, (4, 3))
    Journal(Path("out.npy.progress"), out, {}, resume=False)
    assert Path("precious").read_text() == "precious"
    assert not Path("out.npy.progress").is_symlink()


GOOD = json.loads(
    (Path(gpuml.__file__).parent / "recorded" / "nvidia_h200.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a":' * 10**5,
        json.dumps(GOOD | {"device": 5}),
        json.dumps(GOOD | {"queued": {"returned": "soon", "finished": 1}}),
        json.dumps(GOOD | {"queued": {"returned": float("nan"), "finished": 1}}),
        json.dumps(GOOD | {"transfers": {"sizes": ["1"]}}),
        json.dumps(GOOD | {"ceilings": {"device": "x", "values": {"copy": None}}}),
        json.dumps(GOOD | {"__class__": "os.system"}),
        json.dumps(GOOD | {"peers": {"workloads": 3}}),
        json.dumps(GOOD | {"scaling": {"wide": 3}}),
        json.dumps(GOOD)[:-1] + ', "device": "another"}',
        json.dumps({name: {} for name in GOOD}),
    ],
)
def test_recordings_that_lie(text):
    """A recording tries to break the figures that are drawn from it."""
    message = refused(recorded, written(text.encode(), "mine.json"))
    assert "mine.json is not a recording" in message
    assert "gpuml bench --save mine.json" in message


@pytest.mark.parametrize(
    "change",
    [
        {"rivals": {"a": 3}},
        {"rivals": {"a": {"seconds": "1", "low": 1, "high": 1, "first_call": 1, "loss": 1}}},
        {"rivals": {"a": {"seconds": 0, "low": 1, "high": 1, "first_call": 1, "loss": 1}}},
        {"title": 3},
        {"more": 1},
    ],
)
def test_tables_of_peers_that_lie(change):
    """A table within a recording tries to break what is printed and drawn from it."""
    table = {"title": "t", "device": "d", "date": "2026-01-01", "floor": 1e-6, "bound": "memory"}
    table |= {"n_steps": 1, "first_loss": 1.0, "rivals": {}}
    PeerTable.from_json(table)
    assert "this is no table of peers" in refused(PeerTable.from_json, table | change)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3},
        {"steps": []},
        {"steps": [{"n_ranks": 1}]},
        {"steps": [{"n_ranks": 1, "size": 8, "seconds": "fast", "low": 1e-6, "high": 1e-6}]},
        {"sums": None},
        {"n_bytes": "many"},
        {"batch_size": 0},
        {"more": 1},
    ],
)
def test_tables_of_ranks_that_lie(change):
    """A table within a recording tries to break what is printed and drawn from it."""
    table = {"title": "t", "device": "d", "date": "2026-01-01", "command": "c", "engine": "eager"}
    table |= {"n_ranks": 1, "n_hosts": 1, "batch_size": 8, "n_bytes": 100, "sums": []}
    table["steps"] = [{"n_ranks": 1, "size": 8, "seconds": 1e-6, "low": 1e-6, "high": 1e-6}]
    Scaling.from_json(table)
    assert "this is no table of scaling" in refused(Scaling.from_json, table | change)


def test_a_recording_without_end():
    """A file with a hole of a gigabyte tries to fill the memory."""
    os.truncate(written(b"{", "mine.json"), 2**30)
    assert "it is longer than" in refused(recorded, "mine.json")


# --- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("text", "data", "expected"),
    [
        (header("<f8", (2**40, 2**20)), b"", "9,223,372,036,854,775,808 bytes, and there are 0"),
        (header("<f8", (2**63 - 1, 2**63 - 1)), b"", "its end is missing"),
        (header("<f8", (4, 3)), b"\0" * 95, "96 bytes, and there are 95: its end is missing"),
        (header("<f8", (4, 3)), b"\0" * 97, "and there are 97: np.savez keeps several"),
        (header("<U0", (2**40,)), b"", "cannot be"),
        (header("<f8", (1,) * 40), b"\0" * 8, "cannot be"),
        (header("|b1", (2, 3)), b"\2" * 6, "neither true nor false"),
        (header("<U1", (2, 1)), b"\xff" * 8, "numbers that are no characters"),
        (header("<U1", (2, 1)), b"\0\xd8\0\0" * 2, "numbers that are no characters"),
        (header("<f3", (4, 3)), b"\0" * 36, "not the kind of file that its name says"),
    ],
)
def test_shapes_that_lie(method, text, data, expected):
    """The header of an array tries to have memory taken, or to have other bytes read."""
    assert expected in refused(gpuml.load_dataset, written(npy(text, data), "X.npy"))
    raw = archive({"X.npy": npy(text, data)}, method)
    assert expected in refused(gpuml.load_dataset, written(raw, "a.npz"))


@pytest.mark.parametrize("version", [b"\1\0", b"\2\0"])
def test_a_header_of_gigabytes_in_an_array(version):
    """The length of a header tries to have as much memory taken."""
    length = 2**16 - 1 if version == b"\1\0" else 2**32 - 1
    path = written(npy(b"", b"x" * 10**5, version, length), "X.npy")
    assert f"its header has {length:,} bytes, at most 10,000" in refused(gpuml.load_dataset, path)


def bomb(n_bytes: int) -> bytes:
    return npy(header("|i1", (n_bytes // 1000, 1000)), bytes(n_bytes))


def test_a_zip_bomb():
    """An archive of 200 KB tries to become 200 MB, and 1.6 GB as float64."""
    raw = archive({"X.npy": bomb(200 * 10**6)}, zipfile.ZIP_DEFLATED)
    assert len(raw) < 300_000
    message = refused(gpuml.load_dataset, written(raw, "a.npz"))
    assert "X in a.npz would grow to 1,600,000,000 bytes, more than 100 times the file" in message


def test_a_zip_bomb_beside_what_is_read():
    """A bomb under another name tries to be unpacked: what is not asked for is not looked at."""
    members = {f"{name}.npy": saved(array) for name, array in ARRAYS.items()}
    raw = archive(members | {"../../Z.npy": bomb(10**7), "/abs": b"x"}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    data = gpuml.load_dataset(written(raw, "a.npz"))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(data.X, FEATURES)
    assert most < 2**20
    assert [str(path) for path in Path("..").rglob("*")] == ["../here", "../here/a.npz"]


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_archive_packed_as_no_array_is(method):
    """LZMA lets a file say how much memory unpacking takes, up to 4 GiB."""
    raw = archive({"X.npy": saved(FEATURES)}, method)
    message = refused(gpuml.load_dataset, written(raw, "a.npz"))
    assert "compressed in a way that np.load does not use" in message


def test_two_arrays_of_one_name():
    """Two arrays named X: some readers would see the first, others the last."""
    for second in "X.npy", "x.npy", "x":
        with warnings.catch_warnings(action="ignore"):
            raw = archive([("X.npy", saved(FEATURES)), (second, saved(FEATURES + 1))])
        assert "several arrays named x" in refused(gpuml.load_dataset, written(raw, "a.npz"))


def test_an_archive_of_ten_thousand_names():
    """Names, with commands for a terminal in them, try to fill the screen."""
    raw = archive({f"\x1b[2J{i}": b"" for i in range(10_000)})
    message = refused(gpuml.load_dataset, written(raw, "a.npz"))
    assert "it has: \\x1b[2J0, " in message
    assert "(10000 in all)" in message


def test_an_archive_of_four_hundred_thousand_names():
    """A list of members without members, 20 MB of it, tries to keep us busy for seconds."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, *[0] * 8, 8, *[0] * 6)
    listed = b"".join(entry + b"%08d" % i for i in range(400_000))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(listed), 0, 0)
    message = refused(gpuml.load_dataset, written(listed + end, "a.npz"))
    assert "the list of what is in it has 21,600,000 bytes, at most 2,097,152 are read" in message


def test_numbers_that_are_all_missing():
    """33 KB of NaN, packed, become 128 MiB, and the places of all would take 256 more."""
    raw = archive({"X.npy": saved(np.full((2**20, 16), np.nan, np.float16))}, zipfile.ZIP_DEFLATED)
    assert len(raw) < 40_000
    message = refused(gpuml.load_dataset, written(raw, "a.npz"))
    assert "row 0, column 0 (counted from 0) is nan, and 16777215 more are not finite" in message


def test_a_damaged_member_is_noticed_by_its_checksum():
    """A changed bit within an array tries to pass for data."""
    raw = bytearray(archive({"X.npy": saved(FEATURES)}))
    raw[raw.index(FEATURES.tobytes()) + 20] ^= 1
    assert "Bad CRC-32" in refused(gpuml.load_dataset, written(bytes(raw), "a.npz"))


def test_a_table_of_a_million_columns():
    """A line of a million cells tries to keep us busy with each of them, or with all pairs."""
    names, ones = ",".join(f"c{i}" for i in range(10**6)), ",".join(["1"] * 10**6)
    for text in names, ones, "," * (2**24 - 10):
        path = written(f"{text}\n".encode(), "t.csv")
        assert "t.csv has more than 100,000 columns" in refused(gpuml.load_dataset, path)


@pytest.mark.parametrize(
    ("begin", "line"),
    [("", "\n"), ("", " \t\n"), ("", "\r\n"), ("a,b\n", "\n"), ("a,b\n", "\r\n")],
    ids=repr,
)
def test_empty_lines_without_end(begin, line):
    """Millions of empty lines try to be looked at one by one, before a table begins."""
    path = written((begin + line * 4_000_000 + "1,x\n").encode(), "t.csv")
    message = refused(gpuml.load_dataset, path)
    assert "is no table: more than 10,000 empty lines follow each other" in message


def test_a_table_of_fifty_thousand_columns():
    """Many columns, fewer than may be, try to be compared pair by pair."""
    names = ",".join(f"c{i}" for i in range(50_000))
    path = written(f"{names}\n{','.join(['true'] * 49_999)},x\n".encode(), "t.csv")
    message = refused(gpuml.load_dataset, path, target_column="c5x")
    assert "unknown column 'c5x'" in message
    assert "(50,000 in all)" in message
    twice = names.replace("c49998", "c0")
    path = written(f"{twice}\n{','.join(['true'] * 49_999)},x\n".encode(), "t.csv")
    assert "several columns named 'c0'" in refused(gpuml.load_dataset, path)


def test_a_line_without_end():
    """A file with a hole of a gigabyte is one line, which tries to fill the memory."""
    os.truncate(written(b"a,b\n1,", "t.csv"), 2**30)
    message = refused(gpuml.load_dataset, "t.csv")
    assert "line 2 has more than 16,777,216 characters" in message


def test_a_quote_that_never_ends():
    """An open quote tries to make one cell of all that follows."""
    path = written(b'a,b\n"' + b"1,2\n" * 200_000, "t.csv")
    assert "field larger than field limit" in refused(gpuml.load_dataset, path)


def test_a_long_name_among_many_short_ones():
    """NumPy keeps text of equal length: one long class tries to make two hundred thousand long."""
    rows = "".join(f"{i},{'ab'[i % 2]}\n" for i in range(50_000)) + f"1,{'x' * 100_000}\n"
    message = refused(gpuml.load_dataset, written(rows.encode(), "t.csv"))
    assert "a name of 100,000 characters, 'xxxx" in message
    assert "would take 20,000,400,000 bytes" in message


@pytest.mark.parametrize("where", ["header", "cell", "class"])
def test_commands_for_a_terminal_in_a_table(where):
    """Cells try to change what a terminal shows of the message about them."""
    evil = "\x1b]0;evil\x07\x1b[2J\u202e"
    text = {
        "header": f"{evil},{evil},y\n1,2,3\n",
        "cell": f"a,b,y\n1,2,3\n1,{evil},3\n",
        "class": "a,y\n" + "".join(f"{i},{i / 3}\n" for i in range(50)) + f"1,{evil}\n",
    }[where]
    assert "\\x1b" in refused(gpuml.load_dataset, written(text.encode(), "t.csv"))


def test_a_tab_in_a_message():
    """A tab between cells tries to come into a message as it is."""
    for text in "a\t\n1\t2\n", "1\t\n3\t4\n":
        assert "ends with a '\\t'" in refused(gpuml.load_dataset, written(text.encode(), "t.csv"))


@pytest.mark.parametrize("digits", ["1" * 100_000, "1e" + "9" * 1000, "0." + "0" * 100_000 + "1"])
def test_numbers_without_end(digits):
    """A number of a hundred thousand digits tries to keep us busy; it is read, or not finite."""
    path = written(f"a,y\n{digits},1\n2,x\n".encode(), "t.csv")
    begin = time.process_time()
    message = "is inf, not finite"
    try:
        gpuml.load_dataset(path)
    except gpuml.DataError as error:
        message = str(error)
    assert "not finite" in message
    assert len(message) < 300
    assert time.process_time() - begin < MOST_SECONDS


def test_a_mapped_file_that_is_cut_off():
    """A file that shrinks after it was mapped tries to end the process by a bus error."""
    out = np.lib.format.open_memmap("a.npy", "w+", float, (1000, 100))
    out[...] = 1
    out.flush()
    a = np.load("a.npy", mmap_mode="r")
    os.truncate("a.npy", 5000)
    message = refused(gpuml.blocked_matmul, a, np.ones((100, 2)))
    assert "it was cut off" in message


# --- where we write ----------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="links need a permission there")
@pytest.mark.parametrize("target", ["../precious", "../missing"])
def test_a_link_where_a_model_is_written(target):
    """A link at the output's place tries to have another file overwritten: it is replaced."""
    Path("../precious").write_text("precious")
    os.symlink(target, "model.safetensors")
    a_model().save("model.safetensors")
    assert Path("../precious").read_text() == "precious"
    assert not Path("../missing").exists()
    assert not Path("model.safetensors").is_symlink()
    load_model("model.safetensors")
    os.symlink(target, "run")
    save_checkpoint("run", arrays={}, state={}, facts={})
    assert Path("../precious").read_text() == "precious"
    assert not Path("run").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="links need a permission there")
def test_links_where_temporary_files_are_written(monkeypatch):
    """A link at a guessed temporary name tries the same: names are new, and links not followed."""
    Path("../precious").write_text("precious")
    names = iter(["guessed1", "guessed1", "guessed2"])
    monkeypatch.setattr(
        model_files.tempfile, "_get_candidate_names", lambda: iter(lambda: next(names), None)
    )
    os.symlink("../precious", ".model-guessed1.safetensors")
    a_model().save("model.safetensors")
    assert Path("../precious").read_text() == "precious"
    load_model("model.safetensors")


def test_a_folder_or_a_device_where_a_model_is_written():
    """A folder at the output's place is not replaced."""
    Path("model.safetensors").mkdir()
    with pytest.raises(OSError, match="it is not a file"):
        a_model().save("model.safetensors")


def test_names_of_classes_that_a_terminal_would_obey(monkeypatch, capsys):
    """A class tries to change what a terminal shows of the predictions."""
    from gpuml import cli

    a_model(y=np.array(["\x1b[2J", "b", "c", "\x1b[2J"])).save("model.safetensors")
    np.save("X.npy", FEATURES)
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda shown=is_terminal: shown, raising=False)
        assert cli.main(["predict", "model.safetensors", "X.npy", "--device", "cpu"]) == 0
        shown = capsys.readouterr().out
        assert ("\x1b" in shown) is not is_terminal
        assert CLASSES.size == len(shown.splitlines()) - 1
