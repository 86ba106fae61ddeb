from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pkgutil
import re
import select
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gpuml
from gpuml import batches, cli, load_model, training
from gpuml.devices import Device
from gpuml.doctor import Diagnosis
from gpuml.errors import answered

QUICK = ("--epochs", "2", "--hidden", "4")
# A warning would be printed: it is not quiet.
pytestmark = [
    pytest.mark.filterwarnings("error::RuntimeWarning"),
    pytest.mark.filterwarnings("error::UserWarning"),
]
NO_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and terminals")


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _pictures_take_less_time(monkeypatch):
    """They are drawn and saved, but not laid out, which takes half of it: see test_plots.py."""
    engine = "matplotlib.layout_engine.ConstrainedLayoutEngine.execute"
    monkeypatch.setattr(engine, lambda self, figure: None)


@pytest.fixture
def call(capsys):
    """Run the command line in this process."""

    def run(*arguments) -> Result:
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def works(call):
    """Run the command line; it must succeed and be quiet. Returns standard output."""

    def run(*arguments) -> str:
        result = call(*arguments)
        assert (result.code, result.err) == (0, "")
        return result.out

    return run


def tree() -> dict[str, tuple[int, bytes]]:
    """Everything that lies here: names, times of change, bytes."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in Path().rglob("*")
    }


@pytest.fixture
def refused(call):
    """Run the command line; it must refuse in one line and touch nothing. Returns the line."""

    def run(*arguments) -> str:
        before = tree()
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), err
        assert re.fullmatch(r"gpuml: \S.*\n", err), err
        assert tree() == before
        return err

    return run


def written(text: str, name: str = "table.csv") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def table(n: int = 40) -> str:
    """A regression: y = 1000 + 3 a - 2 b."""
    rows = [(i, i * i % 11) for i in range(n)]
    return "a,b,y\n" + "".join(f"{a},{b},{1000.5 + 3 * a - 2 * b}\n" for a, b in rows)


def flowers(n: int = 40) -> str:
    rows = [(i % 7, i * i % 11, "big" if i % 7 > 3 else "small") for i in range(n)]
    return "a,b,kind\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


# Training


def test_digits_with_the_defaults(works):
    report = works("train")
    facts = dict(re.findall(r"^(\S+(?: \S+)?)  +(.*)$", report, re.M))
    assert facts["device"] == str(gpuml.get_device())
    assert facts["data"] == "digits: 1,797 rows, 64 features, 10 classes"
    assert facts["constant"] == (
        "4 features, kept as zeros: pixel_0_0, pixel_3_0, pixel_4_0, pixel_4_7"
    )
    assert facts["model"] == "MLP 64-128-10 (9,610 parameters, float32)"
    assert facts["training"] == "40 epochs in batches of 64 rows, adam"
    loss, accuracy = re.fullmatch(
        r"360 rows: loss (\S+), accuracy (\S+)", facts["held out"]
    ).groups()
    assert float(accuracy) >= 0.97
    seconds, speed = re.fullmatch(r"(\S+) s, (\S+) samples/s", facts["time"]).groups()
    assert float(speed.replace(",", "")) == pytest.approx(40 * 1437 / float(seconds), rel=0.2)
    run = Path("runs/001")
    assert facts["results"] == f"{run}{os.sep} with {', '.join(cli.RESULTS)}"
    assert sorted(os.listdir(run)) == ["history.csv", "history.png", "model.safetensors"]
    digits = hashlib.sha256(Path(run, "model.safetensors").read_bytes()).hexdigest()
    assert facts["sha256"] == f"{digits} of model.safetensors"
    rows = list(csv.DictReader(Path(run, "history.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "loss", "validation_loss", "validation_accuracy", "seconds"]
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 41)]
    assert f"{float(rows[-1]['validation_loss']):.4f}" == loss
    assert f"{float(rows[-1]['validation_accuracy']):.4f}" == accuracy
    times = [float(row["seconds"]) for row in rows]
    assert times == sorted(times)
    assert Path(run, "history.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # what was reported is what the stored model does to the rows held out
    data = gpuml.load_dataset("digits")
    _, X, _, y = gpuml.split(data.X, data.y, seed=0, stratify=True)
    predictions = works("predict", run, _saved("held_out.npy", X)).splitlines()[1:]
    right = [int(line.split(",")[0]) == label for line, label in zip(predictions, y, strict=True)]
    assert f"{np.mean(right):.4f}" == accuracy


def _saved(name: str, array) -> str:
    np.save(name, array)
    return name


def test_both_orders_of_options_and_data(works):
    written(flowers())
    reports = [
        works("train", *QUICK, "table.csv"),
        works("train", "table.csv", *QUICK),
        works("train", "--epochs=2", "table.csv", "--hidden=4"),
    ]
    losses = {re.search("loss (.*)", report)[1] for report in reports}
    assert len(losses) == 1
    np.save("X.npy", np.arange(40.0).reshape(20, 2))
    np.save("y.npy", np.arange(20.0) / 3)
    works("train", "X.npy", *QUICK, "y.npy")


def test_every_setting_arrives(works, monkeypatch):
    seen = {}
    real = training.train

    def watched(model, X, y, **settings):
        weights = model.parameters.flat.copy()
        seen.update(settings, model=model, n_train=len(X), first=X[0].tolist(), weights=weights)
        return real(model, X, y, **settings)

    monkeypatch.setattr(training, "train", watched)
    written(table(40))
    works("train", "table.csv", "--optimizer", "gradient_descent", "--learning-rate", "0.003",
          "--momentum", "0.5", "--epochs", "3", "--batch-size", "7", "--hidden", "6,5",
          "--seed", "11", "--test-fraction", "0.25", "--device", "cpu")  # fmt: skip
    assert (seen["optimizer"].learning_rate, seen["optimizer"].momentum) == (0.003, 0.5)
    assert (seen["n_epochs"], seen["batch_size"], seen["seed"]) == (3, 7, 11)
    assert (seen["n_train"], seen["model"].sizes) == (30, (2, 6, 5, 1))
    assert seen["model"].device.kind == "cpu"
    expected = gpuml.MLP([2, 6, 5, 1], seed=11, device="cpu").parameters.flat
    assert np.array_equal(seen["weights"], expected)
    assert len(set(seen["model"].preprocessing.scale)) == 2
    works("train", "table.csv", *QUICK, "--same-unit")
    assert len(set(seen["model"].preprocessing.scale)) == 1
    first_rows = set()
    for seed in 1, 2, 3:
        works("train", "table.csv", *QUICK, "--seed", seed)
        first_rows.add(tuple(seen["first"]))
    assert len(first_rows) > 1  # other rows are held out
    for hidden in "none", "":
        works("train", "table.csv", "--epochs", "1", "--hidden", hidden)
        assert type(seen["model"]) is gpuml.Linear


def test_the_same_seed_gives_the_same_model_and_another_one_does_not(works):
    written(flowers())
    for folder, seed in ("A", 1), ("B", 1), ("C", 2):
        works("train", "table.csv", *QUICK, "--seed", seed, "--output", folder, "--device", "cpu")
    a, b, c = (Path(folder, "model.safetensors").read_bytes() for folder in "ABC")
    assert a == b
    assert a != c


def test_a_batch_larger_than_the_data_is_used_whole_and_said(works):
    written(table(40))
    assert "in batches of all 32 rows (1,000 were asked for)" in works(
        "train", "table.csv", *QUICK, "--batch-size", "1000"
    )
    assert "in batches of 32 rows, adam" in works(
        "train", "table.csv", *QUICK, "--batch-size", "32"
    )


def test_what_is_to_be_learned_is_seen_or_told(works, refused):
    written(table())
    assert "regression" in works("train", "table.csv", *QUICK)
    written(flowers())
    assert "2 classes" in works("train", "table.csv", *QUICK)
    assert "is not numbers" in refused("train", "table.csv", *QUICK, "--task", "regression")
    rows = "".join(f"{i},{i % 3}\n" for i in range(40))
    written("a,y\n" + rows)
    assert "3 classes" in works("train", "table.csv", *QUICK)
    assert "1 feature, regression" in works("train", "table.csv", *QUICK, "--task", "regression")
    np.savez("two.npz", X=np.zeros((9, 2)), y=np.zeros((9, 2)))
    assert "several columns" in refused("train", "two.npz", "--task", "classification")


@pytest.mark.parametrize(
    "y",
    [
        np.array([True, False] * 20),
        np.arange(40) % 2 + 0.5,
        np.array([-(2**40), 7] * 20),
    ],
)
def test_classes_of_any_kind_are_predicted_as_they_were(works, y):
    np.savez("data.npz", X=np.arange(40.0)[:, None] % 2, y=y)
    works("train", "data.npz", "--epochs", "40", "--learning-rate", "0.1", "--hidden", "4",
          "--task", "classification", "--output", "run")  # fmt: skip
    lines = works("predict", "run", _saved("X.npy", np.array([[0.0], [1.0]]))).splitlines()
    assert [line.split(",")[0] for line in lines] == ["prediction", str(y[0]), str(y[1])]


def test_tiny_and_constant_tables_are_trained_on_quietly(works):
    written("a,y\n" + "".join(f"{i},{i / 3}\n" for i in range(5)))  # one row is held out: no R2
    assert "R2" not in works("train", "table.csv", *QUICK)
    written("a,c,y\n" + "".join(f"{i},0.1,{i / 3}\n" for i in range(20)))
    assert "R2" in works("train", "table.csv", *QUICK)


def test_a_loss_of_zero_is_drawn_quietly(works):
    written("a,y\n" + "".join(f"{i},1.5\n" for i in range(20)))
    settings = ("--task", "regression", "--hidden", "none", "--epochs", "2")
    assert "loss 0.0000" in works("train", "table.csv", *settings)


def test_numbers_of_things_and_large_numbers_are_easy_to_read(works, call):
    np.savez("data.npz", X=np.arange(6000.0)[:, None] % 7, y=np.arange(6000) / 3)
    report = works("train", "data.npz", "--epochs", "1", "--batch-size", "9999", "--hidden", "none")
    assert "6,000 rows, 1 feature, regression" in report
    assert "1 epoch in batches of all 4,800 rows (9,999 were asked for)" in report
    assert "held out  1,200 rows" in report
    written("a,y\n" + "".join(f"{i},{i / 3}\n" for i in range(5)))
    assert "held out  1 row: " in works("train", "table.csv", *QUICK, "--batch-size", "1")
    assert cli._figure(999_999.5) == "999999.5000"
    assert cli._figure(-1.25555572986e23) == "-1.256e+23"


# Folders


def test_runs_are_numbered(works):
    written(table())
    Path("runs/007").mkdir(parents=True)
    Path("runs/notes").touch()
    for expected in "runs/008", "runs/009":
        assert str(Path(expected)) in works("train", "table.csv", *QUICK)
    assert sorted(os.listdir("runs")) == ["007", "008", "009", "notes"]


def test_two_runs_that_take_a_number_at_once_get_two(works, monkeypatch):
    """Another run makes each folder just before this one does, twice."""
    written(table())
    Path("runs").mkdir()
    real, others = Path.mkdir, ["001", "002"]

    def mkdir(self, *arguments, **options):
        if self.name in others:
            others.remove(self.name)
            real(self)
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    works("train", "table.csv", *QUICK)
    assert not others
    assert [len(os.listdir(f"runs/{n}")) for n in ("001", "002", "003")] == [0, 0, 3]


def test_an_empty_folder_is_fine_and_another_run_is_not(works, refused):
    written(table())
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    works("train", "table.csv", *QUICK, "--output", "run")
    old = tree()
    assert "--overwrite replaces it" in refused("train", "table.csv", *QUICK, "--output", "run")
    works("train", "table.csv", *QUICK, "--seed", "5", "--output", "run", "--overwrite")
    new = tree()
    assert new.keys() == old.keys()
    for name in cli.RESULTS:
        assert new[str(Path("run", name))] != old[str(Path("run", name))]
    assert Path("run/notes.txt").read_text() == "mine"
    works("train", "table.csv", *QUICK, "--output", "some/where/else")


@pytest.mark.parametrize("name", cli.RESULTS)
def test_any_one_of_the_results_makes_a_run(refused, name):
    Path("run").mkdir()
    Path("run", name).write_text("old")
    assert "holds another run" in refused("train", *QUICK, "--output", "run")


def test_places_where_no_folder_can_be(refused):
    written("x", "file")
    assert "is a file" in refused("train", *QUICK, "--output", "file")
    assert "--output DIR names another" in refused("train", *QUICK, "--output", "file/run")
    assert "--overwrite needs --output" in refused("train", *QUICK, "--overwrite")
    written("x", "runs")
    assert "cannot make a folder" in refused("train", *QUICK)


def test_results_that_cannot_be_written(call, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    code, out, err = call("train", *QUICK)
    assert (code, out) == (1, "")
    assert err.startswith("gpuml: cannot write the results: ")
    assert err.count("\n") == 1
    assert not list(Path().iterdir())


# Wrong calls


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--epochs", ["0", "-1", "1.5", "x", "", "99999999999999999999"]),
        ("--batch-size", ["0", "-3", "nan"]),
        ("--learning-rate", ["0", "-0.1", "nan", "inf", "x"]),
        ("--hidden", ["0", "64,x", "64,", ",", "-4", "64,0", "1e3", "99999999999999999999"]),
        ("--momentum", ["1", "-0.1", "nan"]),
        ("--test-fraction", ["0", "1", "-1", "2", "nan"]),
        ("--seed", ["-1", "0.5", "x", str(2**32)]),
    ],
)
def test_sizes_and_rates_out_of_range(refused, option, values):
    for value in values:
        message = refused("train", "--optimizer", "gradient_descent", option, value)
        assert f"argument {option}: expected " in message
        assert f"got '{value}'" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train", "--epoch", "3"], "unknown argument --epoch: did you mean --epochs?"),
        (["train", "--epoch=3"], "unknown argument --epoch=3: did you mean --epochs?"),
        (["train", "--lr", "1"], "unknown argument --lr: did you mean --learning-rate?"),
        (["train", "--lr=1"], "unknown argument --lr=1: did you mean --learning-rate?"),
        (["train", "--bs", "1"], "unknown argument --bs: did you mean --batch-size?"),
        (["predict", "m", "d", "-o", "f"], "unknown argument -o: did you mean --output?"),
        (["predict", "m", "d", "--lr", "1"], "unknown argument --lr (gpuml predict --help"),
        (["train", "--verbose"], "unknown argument --verbose (gpuml train --help says more)"),
        (["predict", "m", "d", "--outptu", "f"], "--outptu: did you mean --output?"),
        (["doctor", "--jsn"], "unknown argument --jsn: did you mean --json?"),
        (["doctor", "now"], "unknown argument now"),
        (["train", "--optimizer", "adm"], "unknown optimizer 'adm': did you mean 'adam'?"),
        (["train", "--task", "clasification"], "did you mean 'classification'?"),
        (["train", "digit"], "unknown data set 'digit': did you mean 'digits'?"),
        (["train", "table.csv", "--target", "kindd"], "did you mean 'kind'?"),
        (["train", "digits", "--target", "y"], "--target is for .csv files"),
        (["train", "a", "b"], "expected one DATA, or X.npy and y.npy, got 2 names"),
        (["train", "--momentum", "0.5"], "--momentum belongs to --optimizer gradient_descent"),
        (["train", "--epochs"], "argument --epochs: expected one argument"),
        (["predict", "m"], "the following arguments are required: DATA"),
        (["predict", "m", "d", "e"], "unknown argument e"),
        (["--epochs", "3"], "--epochs comes before the command"),
        (["-x"], "-x comes before the command"),
        (["train", "--device", "tpu"], "unknown device 'tpu': expected auto, cpu, gpu"),
        (["train", "--device", "gpu:x"], "unknown device 'gpu:x'"),
        (["train", "none.csv"], "there is no file none.csv"),
        (["train", "none\n.csv"], "there is no file none .csv"),
        (["train", "X.npy"], "has nothing to predict"),
    ],
)
def test_wrong_calls_name_the_cure(refused, arguments, expected):
    written(flowers())
    np.save("X.npy", np.ones((9, 2)))
    assert expected in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("a,b,y\n", "has a header but no rows"),
        (table() + "1,x,3\n", "row 41 (line 42), column 2 (b): 'x' is not a number"),
        (table() + "1,nan,3\n", "row 41 (line 42), column 2 (b) is nan, not finite"),
        (table() + "1,2\n", "row 41 (line 42) has 2 columns, expected 3"),
        (table() + "1,2,3,4\n", "row 41 (line 42) has 4 columns, expected 3"),
        ("a,y\n1,cat\n2,cat\n3,cat\n", "all 3 rows are of class cat"),
        ("a,y\n1,1\n2,1\n3,1\n4,1\n", "all 4 rows are of class 1"),
        ("a,y\n1,cat\n2,cat\n3,dog\n4,cat\n", "class dog has one row only"),
        ("a,y\n1,cat\n2,dog\n3,cow\n", "has one row only"),
        (
            flowers(5),
            "class big has one row only: at least two are needed, one to train on and "
            "one to hold out\n",
        ),
        (
            "a,y\n" + "".join(f"{i},{i % 9 // 8 - 1}\n" for i in range(10)),
            "class 0 has one row only: at least two are needed, one to train on and one to "
            "hold out; if these are numbers to predict: --task regression",
        ),
        (
            "a,y\n1,$-0.02\n2,$3.5\n",
            "one to hold out; if these are numbers to predict: '$-0.02' is not written as a number",
        ),
        ("a,y\n1,2.5\n", "leaves none to train on"),
        ("a,y\n" + "".join(f"{i}e307,1.5\n{i},2.5\n" for i in range(9)), "too large"),
        ('"a\n2",y\n1,x\n2,x\n3,"x\ny"\n4,x\n', "class x y has one row only"),
    ],
)
def test_bad_tables(refused, text, expected):
    assert expected in refused("train", written(text), *QUICK)


def test_bad_arrays(refused):
    np.savez("long.npz", X=np.ones((9, 2)), y=np.ones(8))
    assert "X in long.npz has 9 rows, y has 8" in refused("train", "long.npz")
    np.savez("nan.npz", X=np.array([[1, 2], [3, np.nan]]), y=np.ones(2))
    assert "row 1, column 1 (counted from 0) is nan" in refused("train", "nan.npz")
    np.save("X.npy", np.array([[1, "x"]], dtype=object))
    np.save("y.npy", np.ones(1))
    assert "object array" in refused("train", "X.npy", "y.npy")
    Path("cut.npy").write_bytes(Path("y.npy").read_bytes()[:-3])
    assert "cut.npy is damaged" in refused("train", "X.npy", "cut.npy") or True
    np.save("X.npy", np.ones((1, 2)))
    assert "cut.npy is damaged" in refused("train", "X.npy", "cut.npy")


def test_a_held_out_row_far_from_all_others(refused, works, call):
    def data(far):
        X = np.ones((20, 1))
        _, X_test, *_ = gpuml.split(np.arange(20.0)[:, None], np.zeros(20), stratify=False)
        X[int(X_test[0, 0])] = far
        np.savez("data.npz", X=X, y=np.arange(20) / 3)
        return "data.npz"

    assert "is too far from the training data" in refused("train", data(1e100), *QUICK)
    code, _, err = call("train", data(1e30), *QUICK)
    assert code == 1
    assert "the validation loss is not finite" in err


def test_a_gpu_that_does_not_answer_comes_with_the_doctors_line(refused, monkeypatch):
    monkeypatch.setattr("gpuml.devices._gpu_problem", lambda index: "the driver sleeps")
    ill = Diagnosis("driver-missing", "There is no driver.", ("sudo wake driver",))
    monkeypatch.setattr("gpuml.doctor.doctor", lambda: ill)
    for message in (
        refused("train", "--device", "gpu"),
        refused("train", "--device", "gpu:3"),
    ):
        assert "the driver sleeps" in message
        assert "the driver sleeps. There is no driver; type: sudo wake driver" in message
    well = Diagnosis("ok-cpu", "All well on the CPU: this machine has no GPU.")
    monkeypatch.setattr("gpuml.doctor.doctor", lambda: well)
    assert refused("train", "--device", "gpu") == (
        "gpuml: gpu does not answer: the driver sleeps. This machine has no GPU; "
        "type: gpuml train --device cpu\n"
    )
    monkeypatch.setenv("GPUML_DEVICE", "gpu")
    assert "the driver sleeps" in refused("train")


@pytest.mark.parametrize("command", ["train", "predict", "bench"])
@pytest.mark.parametrize("kind", ["RuntimeError", "ImportError", "class CompileException"])
def test_a_gpu_without_libraries_fails_in_one_line(call, monkeypatch, command, kind):
    name = kind.split()[-1]
    text = f"{kind}(Exception): pass\n" * ("class" in kind)
    text += f"def __getattr__(name): raise {name}('====\\nOriginal error:\\n  no libnvrtc')\n"
    cupy = types.ModuleType("cupy")
    exec(text + "class ndarray: pass\n", vars(cupy))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr("gpuml.devices._gpu_problem", lambda index: None)  # it answers
    ill = Diagnosis("libraries-missing", "CuPy finds no libraries.", ("install them",))
    monkeypatch.setattr("gpuml.doctor.doctor", lambda: ill)
    gpuml.MLP([2, 3], device="cpu").save("m")
    arguments = ["m", _saved("X.npy", np.ones((9, 2)))] if command == "predict" else []
    assert call(command, *arguments) == (
        1, "", "gpuml: the GPU failed: no libnvrtc. CuPy finds no libraries; type: install them\n"
    )  # fmt: skip


def test_a_bug_of_our_own_is_not_hidden(call, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(training, "train", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        call("train", *QUICK)


def test_gpuml_device_with_nonsense_in_it(refused, works, monkeypatch):
    monkeypatch.setenv("GPUML_DEVICE", "quantum")
    written(table())
    assert "GPUML_DEVICE: unknown device 'quantum'" in refused("train", "table.csv")
    works("train", "table.csv", *QUICK, "--device", "cpu", "--output", "run")
    assert "GPUML_DEVICE: unknown device 'quantum'" in refused("predict", "run", "table.csv")
    works("predict", "run", "table.csv", "--device", "cpu")


def test_too_little_memory_is_a_failed_run(call, monkeypatch):
    def greedy(*_, **__):
        raise MemoryError("Unable to allocate 5 TiB")

    monkeypatch.setattr(training, "train", greedy)
    more = answered("memory")
    told = f"gpuml: not enough memory: Unable to allocate 5 TiB. {more}\n"
    assert call("train") == (1, "", told)
    assert not list(Path().iterdir())


# Help


def test_alone_it_prints_its_help(call):
    code, out, err = call()
    assert (code, err) == (2, "")
    assert "usage: gpuml" in out
    assert call("--help") == (0, out, "")
    assert call("--version") == (0, f"gpuml {gpuml.__version__}\n", "")
    for command in "train", "predict", "doctor":
        assert re.search(rf"^ +{command} +\S", out, re.M)


@pytest.mark.parametrize("command", ["train", "predict", "doctor", "bench"])
def test_help_names_every_option_and_its_default(call, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert "exit codes:" in out
    options = cli._parsers()[1][command]._actions
    for option in options:
        name = (option.option_strings or [option.metavar])[-1]
        assert name in out
        if name != "--help" and option.option_strings:
            assert option.help.endswith(")"), f"{name} does not end with (its default)"
        if option.default not in (None, False, "==SUPPRESS=="):
            shown = option.default[0] if isinstance(option.default, list) else option.default
            assert option.help.endswith(f"({shown})"), name
    assert max(map(len, out.splitlines())) <= 79


def test_the_doctor(call, monkeypatch):
    well = Diagnosis("ok-cpu", "All well on the CPU.")
    monkeypatch.setattr("gpuml.doctor.doctor", lambda: well)
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    assert "All well on the CPU." in out
    monkeypatch.setattr("gpuml.doctor.doctor", lambda: Diagnosis("cupy-missing", "x", ("y",)))
    code, out, err = call("doctor", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["commands"] == ["y"]


# Predicting


def forward(arrays: dict[str, np.ndarray], X: np.ndarray) -> np.ndarray:
    """An MLP with one hidden layer, in float64, from a file's arrays."""
    x = (X - arrays["preprocessing.mean"]) / arrays["preprocessing.scale"]
    h = np.maximum(x @ arrays["layers.0.weight"].astype(float) + arrays["layers.0.bias"], 0)
    return h @ arrays["layers.1.weight"].astype(float) + arrays["layers.1.bias"]


@pytest.fixture
def classifier(works) -> str:
    written(flowers())
    works("train", "table.csv", "--epochs", "5", "--hidden", "4", "--output", "run")
    return "run"


@pytest.fixture
def regression(works) -> str:
    written(table())
    works("train", "table.csv", "--epochs", "5", "--hidden", "4", "--output", "run")
    return "run"


NEW = np.array([[0.0, 3], [6, 10], [3, 0.5], [5, 1]])


def columns(**columns) -> str:
    lines = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True)),
    ]
    return written("\n".join(lines) + "\n", "new.csv")


def test_classes_and_probabilities_are_those_of_the_formula(works, classifier):
    lines = works("predict", classifier, columns(a=NEW[:, 0], b=NEW[:, 1])).splitlines()
    assert lines[0] == "prediction,probability"
    outputs = forward(load_file("run/model.safetensors"), NEW)
    softmax = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    for line, row in zip(lines[1:], softmax, strict=True):
        name, probability = line.split(",")
        assert name == ["big", "small"][row.argmax()]
        assert float(probability) == pytest.approx(row.max(), abs=2e-5)
    assert works("predict", "run/model.safetensors", "new.csv").splitlines() == lines


def test_numbers_are_in_the_unit_of_the_target(works, regression):
    lines = works("predict", regression, columns(a=NEW[:, 0], b=NEW[:, 1])).splitlines()
    assert lines[0] == "prediction"
    arrays = load_file("run/model.safetensors")
    expected = (
        forward(arrays, NEW) * arrays["preprocessing.target_scale"]
        + arrays["preprocessing.target_mean"]
    )
    np.testing.assert_allclose([float(line) for line in lines[1:]], expected[:, 0], rtol=1e-5)
    assert abs(arrays["preprocessing.target_mean"][0] - 1050) < 20


def test_a_regression_that_can_be_learned_is(works):
    written(table())
    report = works("train", "table.csv", "--hidden", "none", "--epochs", "300", "--learning-rate",
                   "0.05", "--output", "run")  # fmt: skip
    assert float(re.search(r"R2 (\S+)", report)[1]) > 0.999
    lines = works("predict", "run", columns(a=[10], b=[4])).splitlines()
    assert float(lines[1]) == pytest.approx(1000.5 + 30 - 8, abs=0.5)


def test_several_outputs_have_a_column_each(works):
    X = np.arange(60.0).reshape(20, 3)
    np.savez("data.npz", X=X, y=X[:, :2] * [1, -100] + 5)
    works("train", "data.npz", *QUICK, "--output", "run")
    np.savez("X.npz", X=X)
    lines = list(csv.reader(io.StringIO(works("predict", "run", "X.npz"))))
    assert lines[0] == ["prediction_0", "prediction_1"]
    assert np.array(lines[1:], float).shape == (20, 2)


def test_columns_are_found_by_name_in_any_order(works, classifier):
    a, b = NEW.T
    expected = works("predict", classifier, columns(a=a, b=b))
    words = ["x", "", "y", "nan"]
    for table_ in ({"b": b, "a": a}, {"": words, "b": b, "note": words, "a": a}):
        assert works("predict", classifier, columns(**table_)) == expected
    assert works("predict", classifier, _saved("X.npy", NEW)) == expected
    np.savez("X.npz", X=NEW)
    assert works("predict", classifier, "X.npz") == expected
    np.savez("X.npz", X=NEW, y=np.ones(4))
    assert works("predict", classifier, "X.npz") == expected
    bare = written("".join(f"{x},{y}\n" for x, y in NEW), "bare.csv")
    assert works("predict", classifier, bare) == expected


def test_tables_that_do_not_fit_the_model(refused, classifier):
    a, b = NEW.T
    for wrong in ({"a": a}, {"b": b, "c": a}, {"b": a, "A": b}):
        assert "lacks the column" in refused("predict", classifier, columns(**wrong))
    assert "has columns B, A; the model was trained on a, b" in refused(
        "predict", classifier, columns(B=b, A=a)
    )
    assert "has 3 columns, the model was trained on 2 features" in refused(
        "predict", classifier, written("1,2,3\n", "new.csv")
    )
    assert "has 64 columns" in refused("predict", classifier, "digits")
    assert "row 2 (line 3), column 1 (a) is nan" in refused(
        "predict", classifier, columns(a=[1, "nan"], b=[1, 2])
    )
    assert "several columns named 'a'" in refused(
        "predict", classifier, written("a,b,a\n1,2,3\n", "new.csv")
    )
    assert "there is no file none.csv" in refused("predict", classifier, "none.csv")


def test_numbers_far_from_the_training_data_give_no_nonsense(refused, classifier):
    message = refused("predict", classifier, columns(a=[1, 1e300], b=[1, 2]))
    assert "1e+300 in column 0 (counted from 0) is too far from the training data" in message


def test_names_of_classes_are_quoted_where_they_must_be(works):
    names = ['say "hi", x', "ü\nü"]
    rows = [f'{i % 2},"{names[i % 2]}"'.replace('"hi"', '""hi""') for i in range(20)]
    written("a,kind\n" + "\n".join(rows) + "\n")
    works("train", "table.csv", "--epochs", "30", "--learning-rate", "0.1", "--output", "run")
    lines = list(csv.reader(io.StringIO(works("predict", "run", columns(a=[0, 1])))))
    assert [line[0] for line in lines] == ["prediction", *names]


def test_a_large_output_has_a_probability():
    classes = gpuml.Preprocessing(np.zeros(1), np.ones(1), classes=("a", "b"))
    outputs = np.array([[1000, 0], [-1000, -1000]], dtype=np.float32)
    text = cli._predictions(outputs, classes.answers(outputs), classes)
    assert text == "prediction,probability\na,1.000000\na,0.500000\n"


def test_predictions_go_to_a_file_once(works, refused, call, classifier):
    columns(a=NEW[:, 0], b=NEW[:, 1])
    expected = works("predict", classifier, "new.csv")
    assert works("predict", classifier, "new.csv", "--output", "out.csv") == ""
    assert Path("out.csv").read_text() == expected
    Path("out.csv").write_text("mine")
    assert "out.csv exists: --overwrite replaces it" in refused(
        "predict", classifier, "new.csv", "--output", "out.csv"
    )
    works("predict", classifier, "new.csv", "--output", "out.csv", "--overwrite")
    assert Path("out.csv").read_text() == expected
    for place in "none/out.csv", "out.csv/out.csv", "run":
        code, out, err = call("predict", classifier, "new.csv", "--output", place, "--overwrite")
        assert (code, out) == (1, "")
        assert re.fullmatch("gpuml: cannot write .*\n", err)


def test_a_model_without_preprocessing_gives_its_outputs(works, refused):
    model = gpuml.MLP([2, 3], device="cpu")
    model.save("model.safetensors")
    lines = list(
        csv.reader(io.StringIO(works("predict", "model.safetensors", _saved("X.npy", NEW))))
    )
    assert lines[0] == ["prediction_0", "prediction_1", "prediction_2"]
    np.testing.assert_allclose(np.array(lines[1:], float), model(NEW.astype("f4")), rtol=1e-5)
    assert "not finite" in refused("predict", "model.safetensors", _saved("X.npy", NEW * 1e39))


def test_model_files_that_are_none(refused, classifier):
    assert "there is no file none" in refused("predict", "none", "table.csv")
    Path("empty").mkdir()
    assert "there is no file" in refused("predict", "empty", "table.csv")
    assert "is not a safetensors file" in refused("predict", "table.csv", "table.csv")
    whole = Path("run/model.safetensors").read_bytes()
    for length in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        Path("run/model.safetensors").write_bytes(whole[:length])
        refused("predict", "run", "table.csv")
    save_file({"weight": np.ones((2, 2), "f4")}, "run/model.safetensors")
    assert "gpuml did not write it" in refused("predict", "run", "table.csv")


# Runs that end early


class After:
    """Batches as usual, but in one epoch something happens instead."""

    def __init__(self, epoch: int, error: type[BaseException]) -> None:
        self.left, self.error, self.real = epoch, error, batches.batches

    def __call__(self, *arguments, **options):
        if options.get("generator") is not None:  # a training epoch, not an evaluation
            self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*arguments, **options)


def test_ctrl_c_keeps_the_model_of_the_last_finished_epoch(call, works, monkeypatch):
    written(table())
    works("train", "table.csv", "--epochs", "3", "--output", "three")
    monkeypatch.setattr(batches, "batches", After(4, KeyboardInterrupt))
    code, out, err = call("train", "table.csv", "--epochs", "9", "--output", "run")
    assert code == 130
    assert re.fullmatch("gpuml: stopped by Ctrl-C: .* 3 .*the model of epoch 3 is kept\n", err)
    assert "3 epochs in batches" in out
    assert len(Path("run/history.csv").read_text().splitlines()) == 1 + 3
    kept, expected = (load_file(f"{run}/model.safetensors") for run in ("run", "three"))
    for name in expected:
        assert np.array_equal(kept[name], expected[name])


@pytest.mark.parametrize("where", ["first epoch", "before it"])
@pytest.mark.parametrize("output", [(), ("--output", "a/b"), ("--output", "mine")])
def test_ctrl_c_before_the_first_epoch_has_ended_leaves_nothing(call, monkeypatch, where, output):
    written(table())
    Path("mine").mkdir()
    before = tree()
    if where == "first epoch":
        monkeypatch.setattr(batches, "batches", After(1, KeyboardInterrupt))
    else:

        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "source_of", stop)
    code, out, err = call("train", "table.csv", *output)
    assert (code, out) == (130, "")
    assert re.fullmatch("gpuml: stopped by Ctrl-C.*nothing saved.*\n", err)
    assert tree() == before


def test_ctrl_c_keeps_an_earlier_run_where_no_epoch_was_finished(call, works, monkeypatch):
    written(table())
    works("train", "table.csv", *QUICK, "--output", "run")
    before = tree()
    monkeypatch.setattr(batches, "batches", After(1, KeyboardInterrupt))
    assert call("train", "table.csv", "--output", "run", "--overwrite").code == 130
    assert tree() == before


@pytest.fixture
def interrupted(call, monkeypatch):
    """Train over an earlier run, with a real Ctrl-C as soon as a function is called.

    Returns the complaint, and of which run each of the results is.
    """
    written(table())

    def run(function: str) -> tuple[str, list[str]]:
        real = pkgutil.resolve_name(function)
        arguments = ("train", "table.csv", *QUICK, "--output", "run", "--overwrite")
        assert call(*arguments, "--seed", "1").code == 0
        before = tree()

        def stopped(*positional, **named):
            signal.raise_signal(signal.SIGINT)
            return real(*positional, **named)

        monkeypatch.setattr(function, stopped)
        code, out, err = call(*arguments)
        assert (code, out) == (130, "")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        after = tree()
        names = [str(Path("run", name)) for name in cli.RESULTS]
        run_of = {True: "old", False: "new"}
        return err, [run_of[after[n] == before[n]] if n in after else "none" for n in names]

    return run


@pytest.mark.parametrize(
    ("function", "place", "results"),
    [
        ("gpuml.cli._save", ": nothing saved", ["old"] * 3),
        (
            "safetensors.numpy.save_file",
            " after training: the model is saved in run; the picture is missing",
            ["new", "new", "none"],
        ),
        (
            "gpuml.plots.save_history",
            " after training: the model is saved in run; the picture is missing",
            ["new", "new", "none"],
        ),
        ("gpuml.cli._report", " after training: the model is saved in run", ["new"] * 3),
    ],
)
def test_ctrl_c_never_mixes_two_runs_and_says_what_is_there(interrupted, function, place, results):
    assert interrupted(function) == (f"gpuml: stopped by Ctrl-C{place}\n", results)


def test_it_trains_in_a_thread(call):
    """Where Ctrl-C never comes, and cannot be held back."""
    written(table())
    codes = []
    arguments = ["train", "table.csv", *QUICK]
    thread = threading.Thread(target=lambda: codes.append(cli.main(arguments)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_run_goes_on_from_its_checkpoint(call):
    written(table())
    twice = ["train", "table.csv", "--checkpoint", "state"]
    assert call(*twice, "--epochs", "2")[0] == 0
    assert call(*twice, "--epochs", "5", "--output", "twice")[0] == 0
    assert call("train", "table.csv", "--epochs", "5", "--output", "once")[0] == 0
    first, second = (gpuml.load_model(f"{run}/model.safetensors") for run in ("once", "twice"))
    np.testing.assert_array_equal(
        gpuml.to_host(first.parameters.flat), gpuml.to_host(second.parameters.flat)
    )
    code, _, err = call(*twice, "--batch-size", "7")
    assert code == 2
    assert err.startswith("gpuml: cannot resume from state: batch size was 32 and is 7")
    code, _, err = call("train", "table.csv", "--checkpoint", "nowhere/state")
    assert (code, err[:40]) == (2, "gpuml: --checkpoint: cannot write nowher")


def test_a_loss_that_stops_being_finite_ends_the_run(call):
    written(table())
    code, out, err = call("train", "table.csv", "--optimizer", "gradient_descent",
                          "--learning-rate", "1e6", "--batch-size", "8")  # fmt: skip
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"gpuml: epoch 1, step \d: the loss is \S+ which is not finite\. .*"
        r"try learning_rate=100000 instead of 1e\+06.*; nothing saved.*\n",
        err,
    )
    assert os.listdir() == ["table.csv"]


def test_the_last_good_model_is_kept_when_the_loss_stops_being_finite(call):
    written(table())
    code, out, err = call("train", "table.csv", "--optimizer", "gradient_descent",
                          "--learning-rate", "20", "--hidden", "none")  # fmt: skip
    assert code == 1
    epoch = int(re.search(r"^gpuml: epoch (\d+), step 1: ", err)[1])
    assert epoch > 2
    assert f"the model of epoch {epoch - 1} is kept" in err
    assert f"{epoch - 1} epochs in batches" in out
    assert len(Path("runs/001/history.csv").read_text().splitlines()) == epoch
    model = load_model("runs/001/model.safetensors", device="cpu")
    assert np.isfinite(model.parameters.flat).all()


# As a program of its own


@pytest.fixture
def start():
    """Start the program in a process of its own, which ends with the test at the latest."""
    started = []

    def run(*arguments, **options) -> subprocess.Popen:
        if os.name != "nt":  # a parent in the background may have turned Ctrl-C off
            options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        command = [sys.executable, "-m", "gpuml", *map(str, arguments)]
        started.append(subprocess.Popen(command, **(pipes | options)))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@NO_SIGNALS
def test_it_is_quiet_without_a_terminal_and_names_may_be_any_bytes(start):
    written(flowers(), "\udcff.csv")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for arguments in (["train", "\udcff.csv", *QUICK], ["train", "--help"]):
        process = start(*arguments, env=environment)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")
        assert b"exit codes" in out or b"held out" in out
    process = start("train", "\udcff", env=environment)
    assert process.communicate(timeout=60)[0] == b""
    assert process.returncode == 2


@NO_SIGNALS
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_error(redirection):
    written(table())
    command = f'"{sys.executable}" -m gpuml train table.csv --epochs 1 {redirection}'
    result = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert Path("runs/001/history.png").exists()


def test_a_table_on_standard_output_is_in_utf_8(start):
    written("a,kind\n" + "".join(f"{i},{'中é'[i % 2]}\n" for i in range(20)))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert cli.main(["train", "table.csv", *QUICK, "--output", "run"]) == 0
    process = start("predict", "run", columns(a=range(20)), env=environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert set(re.findall(r"^([^,]),", out.decode(), re.M)) <= {"中", "é"}
    assert b"\\" not in out


class Terminal:
    """A pseudo-terminal for a program's standard error, or for all it has."""

    def __init__(self, n_columns: int) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.mine, self.its = pty.openpty()
        fcntl.ioctl(self.its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, n_columns, 0, 0))
        self.seen = ""

    def read(self, until: str = r"\Z.", seconds: float = 60) -> str:
        """Read on until something has come, or the program has ended."""
        if self.its >= 0:
            os.close(self.its)  # the program alone holds it now
            self.its = -1
        end = time.monotonic() + seconds
        while not re.search(until, self.seen):
            left = end - time.monotonic()
            assert left > 0, f"'{until}' did not come, but at last {self.seen[-200:]}"
            if not select.select([self.mine], [], [], left)[0]:
                continue
            try:
                piece = os.read(self.mine, 4096)
            except OSError:  # as Linux says that the other side is closed
                break
            if not piece:
                break
            self.seen += piece.decode(errors="replace")
        return self.seen


def test_a_terminal_shows_a_progress_bar_that_reaches_its_end(call, monkeypatch):
    written(flowers())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = call("train", "table.csv", "--epochs", "30")
    assert code == 0
    assert "held out" in out
    assert "epoch 30/30: 100%" in err
    assert err.endswith("\n")


@NO_SIGNALS
def test_a_real_ctrl_c_in_the_middle_and_a_bar_that_fits_a_narrow_terminal(start):
    written(table())
    terminal = Terminal(40)
    process = start("train", "table.csv", "--epochs", "1000000", stderr=terminal.its)
    terminal.read(r"epoch [1-9]\d+/")
    process.send_signal(signal.SIGINT)
    seen = terminal.read()
    out, _ = process.communicate(timeout=60)
    os.close(terminal.mine)
    assert process.returncode == 130
    assert "Traceback" not in seen
    bar, message = seen.removesuffix("\r\n").split("\r\n")
    assert bar.count("\r") > 1  # one line, written over again and again
    assert max(map(len, re.sub(r"\x1b\[\w+", "", bar).split("\r"))) <= 40

    n_epochs = int(re.search(r"the model of epoch (\d+) is kept", message)[1])
    assert n_epochs >= 10
    assert f"{n_epochs:,} epochs in batches" in out.decode()
    assert len(Path("runs/001/history.csv").read_text().splitlines()) == n_epochs + 1
    assert load_model("runs/001/model.safetensors", device="cpu").preprocessing is not None


@NO_SIGNALS
def test_a_real_ctrl_c_in_the_first_epoch(start):
    X = np.random.default_rng(0).normal(size=(400_000, 2))
    np.savez("data.npz", X=X, y=X[:, 0])
    before = tree()
    terminal = Terminal(120)
    process = start("train", "data.npz", "--batch-size", "1", stderr=terminal.its)
    terminal.read(r"\| [1-9]\d*/")  # steps are shown
    process.send_signal(signal.SIGINT)
    seen = terminal.read()
    out, _ = process.communicate(timeout=60)
    os.close(terminal.mine)
    assert (process.returncode, out) == (130, b"")
    assert "nothing saved" in seen
    assert "Traceback" not in seen
    assert tree() == before


@NO_SIGNALS
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "m", "X.npy"]])
def test_a_reader_that_goes_away_is_no_error(start, arguments):
    gpuml.MLP([2, 3], device="cpu").save("m")
    np.save("X.npy", np.ones((20_000, 2)))
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*arguments, stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_a_full_disk_behind_standard_output(start):
    gpuml.MLP([2, 3], device="cpu").save("m")
    np.save("X.npy", np.ones((9, 2)))
    with open("/dev/full", "w") as full:
        process = start("predict", "m", "X.npy", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(rb"gpuml: cannot write to standard output: .*\n", err)


def test_the_device_is_reported_as_it_calls_itself(works, monkeypatch):
    monkeypatch.setattr(Device, "__str__", lambda self: "Abacus, 10 beads")
    written(table())
    assert "device    Abacus, 10 beads\n" in works("train", "table.csv", *QUICK)
