from __future__ import annotations

import json
import os
import random
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpuml import MLP, Linear, ModelFileError, load_model, model_files, to_host
from gpuml.datasets import Preprocessing
from gpuml.model_files import load_arrays, replacing, save_arrays

FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def models():
    return [
        Linear(3, 2, device="cpu"),
        Linear(3, 2, bias=False, device="cpu"),
        Linear(3, 1, dtype=np.float64, device="cpu"),
        MLP([3, 2], device="cpu"),
        MLP([3, 5, 4, 2], device="cpu"),
        MLP([3, 5, 2], dtype=np.float64, device="cpu"),
    ]


def saved(model=None, y=("b", "a", "c", "a")) -> Path:
    """A model of three features with preprocessing, written to its file."""
    if model is None:
        X = np.arange(12.0).reshape(4, 3) ** 2
        task = "classification" if np.ndim(y) == 1 else "regression"
        preprocessing = Preprocessing.fit(
            X, np.array(y), task, feature_names=("u", "v", "w"), target_name="t"
        )
        model = MLP([3, 4, preprocessing.n_outputs], device="cpu")
        model.preprocessing = preprocessing
    model.save(FILE)
    return Path(FILE)


def parts(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """What is in a file but its checksum, read without gpuml."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    description = json.loads(header["__metadata__"]["gpuml"])
    del description["sha256"]
    return load_file(path), description


def written(arrays, description) -> str:
    """Write a file with the right checksum, as somebody would who means harm."""
    if isinstance(description, dict):
        plain = json.dumps(description, sort_keys=True)
        description = {**description, "sha256": model_files.checksum(arrays, plain)}
    text = description if isinstance(description, str) else json.dumps(description)
    save_file(arrays, FILE, {"gpuml": text})
    return FILE


def fault(path: str | Path = FILE) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# There and back


@pytest.mark.parametrize("model", models(), ids=str)
def test_a_model_comes_back_as_it_was(device, rng, model):
    model.parameters.flat[:] = rng.normal(size=model.n_parameters)
    x = rng.normal(size=(7, 3)).astype(model.dtype)
    expected = model(x)
    model.to(device).save(FILE)
    back = load_model(FILE, device=device)
    assert (type(back), back.sizes, back.dtype) == (type(model), model.sizes, model.dtype)
    assert back.device == device
    assert back.preprocessing is None
    assert back.parameters.shapes == model.parameters.shapes
    assert np.array_equal(to_host(back.parameters.flat), to_host(model.parameters.flat))
    np.testing.assert_array_equal(load_model(FILE, device="cpu")(x), expected)


@pytest.mark.parametrize(
    "y",
    [
        ["b", "a", "c", "a"],
        ["ü\n", '"', "", "ü\n"],
        [3, -1, 7, 3],
        [0.1, 0.25, 1e-9, 0.1],
        [True, False, True, False],
        [[1.5, 20], [2.5, -3], [1, 7], [0.1, 0.3]],
    ],
)
def test_preprocessing_comes_back_as_it_was(y):
    X = np.arange(12.0).reshape(4, 3) ** 2
    path = saved(y=y)
    back = load_model(path, device="cpu").preprocessing
    task = "classification" if np.ndim(y) == 1 else "regression"
    fitted = Preprocessing.fit(X, np.array(y), task)
    assert (back.task, back.classes) == (task, fitted.classes)
    assert list(map(type, back.classes)) == list(map(type, fitted.classes))
    assert (back.feature_names, back.target_name) == (("u", "v", "w"), "t")
    outputs = np.eye(4)[:, : back.n_outputs]
    assert np.array_equal(back.answers(outputs), fitted.answers(outputs))
    assert np.array_equal(back.features(X), fitted.features(X))
    assert np.array_equal(back.targets(np.array(y)), fitted.targets(np.array(y)))


def test_the_file_is_what_other_programs_read():
    model = MLP([3, 5, 2], device="cpu")
    arrays, description = parts(saved(model))
    assert description == {"model": "MLP", "sizes": [3, 5, 2]}
    assert sorted(arrays) == sorted(model.parameters)
    for name, array in arrays.items():
        assert np.array_equal(array, model.parameters[name])


@pytest.mark.parametrize(
    "view", [lambda a: a.T, lambda a: a[::2], lambda a: a[:, ::-1], np.asfortranarray]
)
def test_arrays_of_any_layout_are_stored_by_their_entries(view):
    array = view(np.arange(24.0).reshape(4, 6))
    save_arrays(FILE, {"a": array}, {"k": "v"})
    arrays, metadata = load_arrays(FILE)
    assert np.array_equal(arrays["a"], array)
    assert metadata == {"k": "v"}
    assert np.array_equal(load_file(FILE)["a"], array)


# Whole or not at all


class Crash(BaseException):
    """Stands for whatever ends a program, Ctrl-C included."""


@pytest.mark.parametrize("moment", ["save_file", "fsync", "replace"])
def test_a_failure_at_any_moment_leaves_the_old_file_and_no_other(monkeypatch, moment):
    saved(MLP([3, 2], device="cpu"))
    old = Path(FILE).read_bytes()

    def crash(*arguments, **_):
        if moment == "save_file":
            Path(arguments[1]).write_bytes(b"half")
        raise Crash

    where = {"save_file": "safetensors.numpy.save_file", "fsync": "os.fsync"}
    with monkeypatch.context() as patch:
        patch.setattr(where.get(moment, "pathlib.Path.replace"), crash)
        with pytest.raises(Crash):
            MLP([3, 9, 2], device="cpu").save(FILE)
    assert os.listdir() == [FILE]
    assert Path(FILE).read_bytes() == old


def test_the_old_file_is_whole_until_the_new_one_is_synced(monkeypatch):
    saved(MLP([3, 2], device="cpu"))
    old, synced = Path(FILE).read_bytes(), []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_replace(self, target):
        assert self.parent.samefile(Path(target).parent)  # a rename, not a copy to another disk
        assert Path(target).read_bytes() == old
        assert self.stat().st_ino in synced
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    saved(MLP([3, 4, 2], device="cpu"))
    assert load_model(FILE, device="cpu").sizes == (3, 4, 2)
    assert [path.name for path in Path().iterdir()] == [FILE]
    if os.name != "nt":
        assert Path().stat().st_ino in synced  # the rename as well


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_file_has_the_permissions_of_any_new_file():
    Path("other").touch()
    assert saved().stat().st_mode == Path("other").stat().st_mode


def test_a_fault_of_safetensors_is_an_oserror(monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved(MLP([3, 2], device="cpu"))
    assert not list(Path().iterdir())


def test_places_where_no_file_can_be():
    Path("folder").mkdir()
    model = MLP([3, 2], device="cpu")
    with pytest.raises(FileNotFoundError, match=r"cannot write none.*there is no folder none"):
        model.save(Path("none") / FILE)
    with pytest.raises(OSError, match="cannot write folder: it is not a file"):
        model.save("folder")
    assert sorted(os.listdir()) == ["folder"]
    assert not os.listdir("folder")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no such device here")
def test_a_device_is_never_replaced(monkeypatch):
    monkeypatch.setattr(model_files.tempfile, "mkstemp", lambda **_: pytest.fail("too late"))
    with pytest.raises(OSError, match="it is not a file"), replacing("/dev/null"):
        pass


# What is refused


def test_a_missing_file_and_a_folder():
    with pytest.raises(FileNotFoundError, match="there is no file none"):
        load_model("none.safetensors")
    Path("folder").mkdir()
    assert "is not a file" in fault("folder")


def test_a_file_truncated_at_any_length_is_refused():
    whole = saved().read_bytes()
    assert "is empty" in fault(_write(b""))
    for length in range(1, len(whole)):
        message = fault(_write(whole[:length]))
        assert "truncated" in message or "damaged" in message or "not a safetensors" in message
    fault(_write(whole + b"\0"))


@pytest.mark.parametrize("where", ["weight", "mean", "name"])
def test_a_single_changed_bit_is_noticed(where):
    raw = bytearray(saved().read_bytes())
    arrays, _ = parts(Path(FILE))
    place = {
        "weight": lambda: raw.index(arrays["layers.1.weight"].tobytes()),
        "mean": lambda: raw.index(arrays["preprocessing.mean"].tobytes()),
        "name": lambda: raw.index(b'\\"u\\"') + 2,
    }[where]()
    raw[place] ^= 1
    assert "its checksum does not fit" in fault(_write(bytes(raw)))


def test_bytes_changed_at_random_are_refused_or_harmless():
    whole, rng = saved().read_bytes(), random.Random(5)
    good, x = load_model(FILE, device="cpu"), np.ones((1, 3))
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        _write(bytes(damaged))
        with suppress(ModelFileError):
            model = load_model(FILE, device="cpu")
            # a changed space of the header may pass, a changed number may not
            np.testing.assert_array_equal(model.parameters.flat, good.parameters.flat)
            features = model.preprocessing.features(x)
            np.testing.assert_array_equal(features, good.preprocessing.features(x))


def _write(raw: bytes) -> Path:
    Path(FILE).write_bytes(raw)
    return Path(FILE)


@pytest.mark.parametrize(
    "raw", [b"PK\x03\x04" * 9, b"\x93NUMPY" * 9, b"a,b\n1,2\n" * 9, b"\0" * 99]
)
def test_a_file_of_another_kind(raw):
    assert "is not a safetensors file" in fault(_write(raw))


def test_a_foreign_safetensors_file():
    save_file({"weight": np.ones((3, 2), np.float32)}, FILE)
    assert "gpuml did not write it" in fault()
    save_file({"weight": np.ones((3, 2), np.float32)}, FILE, {"format": "pt"})
    assert "gpuml did not write it" in fault()


@pytest.mark.parametrize(
    "description",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"MLP"',
        "{}",
        "[" * 100_000,
        '{"model": "MLP"}',
        '{"sizes": [3, 2]}',
        '{"model": "Transformer", "sizes": [3, 2]}',
        '{"model": ["MLP"], "sizes": [3, 2]}',
        '{"model": "MLP", "sizes": 3}',
        '{"model": "MLP", "sizes": null}',
    ],
)
def test_a_description_that_is_none(description):
    arrays, _ = parts(saved(MLP([3, 2], device="cpu")))
    assert "does not describe a model" in fault(written(arrays, description))


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [3],
        [3, 0],
        [3, -2],
        [3, 2.0],
        [3, "2"],
        "32",
        [3, True],
        [3, None],
        [[3], 2],
        [3, 3],
        [2, 3],
        [3, 2, 2],
        [3, 10**9],
        [10**12, 10**12],
        [3, 10**400],
        {"3": 1, "2": 1},
    ],
)
@pytest.mark.parametrize("kind", [MLP, Linear])
def test_sizes_that_lie_are_refused_before_memory_is_taken(kind, sizes):
    model = Linear(3, 2, device="cpu") if kind is Linear else MLP([3, 2], device="cpu")
    arrays, description = parts(saved(model))
    written(arrays, description | {"sizes": sizes})
    tracemalloc.start()
    fault()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2e6


@pytest.mark.parametrize("shape", [[10**9, 10**9], [2**63, 2], [2**32, 2**32], [3, 10**15]])
def test_a_header_that_lies_about_a_shape(shape):
    whole = saved(Linear(3, 2, bias=False, device="cpu")).read_bytes()
    n = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + n])
    for end in 24, 4 * shape[0] * shape[1]:
        header["weight"] |= {"shape": shape, "data_offsets": [0, end]}
        text = json.dumps(header).encode()
        fault(_write(len(text).to_bytes(8, "little") + text + whole[8 + n :]))


def test_a_header_that_claims_to_be_longer_than_the_file():
    for length in 2**63, 2**64 - 1, 10**6:
        assert "is truncated" in fault(_write(length.to_bytes(8, "little") + b"{}" * 50))


@pytest.mark.parametrize("model", [Linear(3, 2, device="cpu"), MLP([3, 4, 2], device="cpu")])
def test_arrays_that_are_missing_or_too_many(model):
    arrays, description = parts(saved(model))
    for name in arrays:
        if name == "bias":
            continue  # a linear model may have none
        rest = {key: value for key, value in arrays.items() if key != name}
        message = fault(written(rest, description))
        assert f"{name} should have shape" in message
        assert "the file has none" in message
    more = arrays | {"junk": np.ones(2, np.float32)}
    assert "junk should have shape none" in fault(written(more, description))
    turned = {name: np.ascontiguousarray(array.T) for name, array in arrays.items()}
    assert "should have shape" in fault(written(turned, description))


def test_weights_of_the_wrong_type():
    arrays, description = parts(saved(MLP([3, 4, 2], device="cpu")))
    for dtype in np.int32, np.uint8, np.bool_:
        wrong = {name: array.astype(dtype) for name, array in arrays.items()}
        assert "floating-point type" in fault(written(wrong, description))
    mixed = arrays | {"layers.1.bias": arrays["layers.1.bias"].astype(np.float64)}
    assert "float32, float64" in fault(written(mixed, description))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value):
    model = MLP([3, 4, 2], device="cpu")
    model.parameters["layers.1.weight"][2, 1] = value
    assert "layers.1.weight has numbers that are not finite" in fault(saved(model))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mean", None),
        ("scale", None),
        ("mean", np.zeros(2)),
        ("mean", np.zeros((1, 3))),
        ("mean", np.zeros(())),
        ("mean", np.zeros(3, np.int64)),
        ("mean", np.array([0, 0, np.nan])),
        ("scale", np.ones(4)),
        ("scale", np.array([1.0, 0, 1])),
        ("scale", np.array([1.0, -1, 1])),
        ("scale", np.array([1.0, np.inf, 1])),
        ("target_mean", np.zeros(1)),
        ("junk", np.zeros(1)),
    ],
)
def test_preprocessing_arrays_that_cannot_be(name, array):
    arrays, description = parts(saved())
    key = f"preprocessing.{name}"
    arrays = {k: v for k, v in arrays.items() if k != key} | ({} if array is None else {key: array})
    assert "preprocessing is damaged" in fault(written(arrays, description))


def test_preprocessing_of_other_sizes_than_the_model():
    arrays, description = parts(saved())
    longer = {f"preprocessing.{name}": np.ones(4) for name in ("mean", "scale")}
    description["preprocessing"]["feature_names"] = []
    assert "for 4 features and 3 outputs" in fault(written(arrays | longer, description))
    description["preprocessing"]["classes"] = ["a", "b"]
    assert "for 3 features and 2 outputs" in fault(written(arrays, description))

    arrays, description = parts(saved(y=[[1.5, 20], [2.5, -3], [1, 7], [0.1, 0.3]]))
    shorter = {f"preprocessing.target_{name}": np.ones(1) for name in ("mean", "scale")}
    assert "for 3 features and 1 outputs" in fault(written(arrays | shorter, description))


@pytest.mark.parametrize(
    "options",
    [
        None,
        0,
        [],
        {},
        "text",
        [1, 2],
        {"classes": None, "feature_names": [], "target_name": ""},
        {"classes": 3, "feature_names": [], "target_name": ""},
        {"classes": "abc", "feature_names": "uvw"},
        {"classes": {"a": 1}, "feature_names": [], "target_name": ""},
        {"classes": ["a", "b", "c"], "feature_names": None, "target_name": ""},
        {"classes": ["a", "b", "c"], "feature_names": [1, 2, 3], "target_name": ""},
        {"classes": ["a", "b", "c"], "feature_names": [], "target_name": 5},
        {"classes": ["a", "b", 3], "feature_names": [], "target_name": ""},
    ],
)
def test_preprocessing_options_that_cannot_be(options):
    arrays, description = parts(saved())
    assert "preprocessing is damaged" in fault(
        written(arrays, description | {"preprocessing": options})
    )


def test_names_too_long_to_be_read_again_are_refused_when_written():
    saved(MLP([3, 2], device="cpu"))
    old = Path(FILE).read_bytes()
    with pytest.raises(ModelFileError, match=r"would take 8,\d+,\d+ bytes, and at most 8,388,608"):
        save_arrays(FILE, {"a": np.ones(2)}, {"k": "x" * 2**23})
    assert Path(FILE).read_bytes() == old
    assert os.listdir() == [FILE]


def test_every_type_of_the_format_that_numpy_has_comes_back(rng):
    arrays = {
        name: np.frombuffer(rng.bytes(16), dtype) for name, dtype in model_files.DTYPES.items()
    }
    arrays["BOOL"] = np.array([True, False])
    save_arrays(FILE, arrays, {})
    again, _ = load_arrays(FILE)
    for name, array in load_file(FILE).items():
        assert (again[name].dtype, again[name].tobytes()) == (array.dtype, array.tobytes())
    assert set(again) == set(arrays)
