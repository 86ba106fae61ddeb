"""Training that is killed and started again ends with the bits of one that was not."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import gpuml
from gpuml import MLP, Adam, CheckpointError, GradientDescent, Linear, batches, schedules, training
from gpuml.fused import FusedStep
from gpuml.losses import softmax_cross_entropy
from gpuml.steps import EagerStep, GraphStep

N_EPOCHS = 60
N_KILLS = {"cpu": 5, "gpu": 3}  # of each case by each engine: so 50 on a CPU


def data(folder):
    """Return X and y, labels with noise, and validation data; also as a file."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(110, 4)).astype(np.float32)
    y = (X[:, 0] + rng.normal(size=110) > 0).astype(np.int64)
    if folder is not None and not (folder / "X.npy").exists():
        np.save(folder / "X.npy", X)
    return X[:90], y[:90], (X[90:], y[90:])


def mlp(device):
    return MLP([4, 5, 2], device=device)


CASES = {
    "momentum": {"optimizer": GradientDescent(0.05, momentum=0.9)},
    "Adam": {"optimizer": Adam(0.01)},
    "weight decay": {"optimizer": Adam(0.01, weight_decay=0.1), "seed": 3},
    "schedule": {
        "optimizer": GradientDescent(0.1, momentum=0.5),
        "schedule": schedules.cosine(warmup=3),
    },
    "patience": {"optimizer": Adam(0.05), "patience": 25, "validated": True},
    "in order": {"optimizer": Adam(0.01), "shuffle": False, "validated": True},
    "memory map": {"optimizer": Adam(0.01), "mapped": True},
    "one_pass": {"optimizer": Adam(0.05), "regression": True, "engine": "one_pass"},
    "gram": {
        "optimizer": GradientDescent(0.01, momentum=0.9),
        "regression": True,
        "engine": "gram",
        "batch_size": None,
    },
    "mapped full batch": {"optimizer": Adam(0.05), "mapped": True, "batch_size": None},
}

ENGINES = {"cpu": ["eager"], "gpu": ["eager", "graph", "fused"]}  # that train perceptrons
PLACES = [(kind, engine) for kind, engines in ENGINES.items() for engine in engines]


def runs(cases=CASES):
    """Return each case on each device, by each engine that can hold it."""
    return [
        (kind, engine, case)
        for case in cases
        for kind, engines in ENGINES.items()
        for engine in ([CASES[case]["engine"]] if "engine" in CASES[case] else engines)
    ]


def each(names, values):
    """Run a test with each of some values; the names begin with device and engine."""
    found = [pytest.param(*value, id="-".join(map(str, value))) for value in values]
    return pytest.mark.parametrize(names, found, indirect=["device", "engine"])


@pytest.fixture
def engine(request, device):
    """The name of an engine, if it can run here."""
    if not is_there(request.param):
        pytest.skip("nvmath-python is not installed")
    return request.param


def is_there(engine):
    return engine != "graph" or find_spec("nvmath") is not None


def train(case, folder, device="cpu", **change):
    """Train from the beginning, or go on; return the model and its history."""
    options = {"n_epochs": N_EPOCHS, "batch_size": 16} | CASES[case]
    X, y, validation_data = data(folder)
    if options.pop("mapped", False):
        X = np.load(folder / "X.npy", mmap_mode="r")[:90]
    if options.pop("validated", False):
        options["validation_data"] = validation_data
    model = mlp(device)
    if options.pop("regression", False):
        y = X[:, :2] + y[:, None]
        model = Linear(4, 2, device=device)
    options |= change
    X, y, model = options.pop("X", X), options.pop("y", y), options.pop("model", model)
    history = gpuml.train(model, X, y, **options)
    assert history.engine == (options.get("engine") or history.engine), "no other one in silence"
    return model, history


def outcome(model, history):
    """Return the bits of the weights, and all that the history tells but the time."""
    columns = {name: column for name, column in history.columns.items() if name != "seconds"}
    seconds = history["seconds"]
    return {
        "weights": gpuml.to_host(model.parameters.flat).tobytes().hex(),
        "columns": json.loads(json.dumps(columns)),
        "notes": history.notes,
        "grows": seconds == sorted(seconds),
    }


def small_chunks(patch):
    """Make several chunks and blocks of few rows."""
    patch.setattr(batches, "MAPPED_CHUNK_BYTES", 40 * 24)
    patch.setattr(batches, "BLOCK_BYTES", 5 * 24)


# --- kill -9 ---------------------------------------------------------------------------------


def in_a_child(work, *arguments, **options):
    """Run a function in a fork of this process; return the process's number."""
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments, **options)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def run_to_the_end(case, folder, name, **options):
    result = outcome(*train(case, folder, **options))
    (folder / f"{name}.json").write_text(json.dumps(result))


def kill_later(child, path, n_writes, pause):
    """Kill a process some seconds after it has written a file so many times; return its status."""

    def file():
        return path.stat().st_ino if path.exists() else None

    for _ in range(n_writes):
        before = file()
        while file() == before:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(2e-4)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def kill_and_resume(kind, engine, case, folder):
    """Run without interruption, then killed at random moments; write how often, and the outcomes.

    The moments are counted in writes of the checkpoint and in the time that an epoch takes, and a
    run that ends before enough kills have landed is followed by another one from the beginning:
    so their number does not depend on how fast the machine is.
    """
    data(folder)
    there = {"device": kind, "engine": engine}
    alone = {"checkpoint": folder / "alone.safetensors"} | there  # so that it takes as long
    path = folder / "run.safetensors"
    rng = random.Random(f"{engine} {case}")
    begin = time.perf_counter()
    assert os.waitpid(in_a_child(run_to_the_end, case, folder, "written", **alone), 0)[1] == 0
    epoch = (time.perf_counter() - begin) / N_EPOCHS
    assert os.waitpid(in_a_child(run_to_the_end, case, folder, "alone", **there), 0)[1] == 0
    first = int(kind == "gpu")  # before the first write there is hardly more than CUDA that begins
    kills, outcomes = 0, []
    while kills < N_KILLS[kind] or path.exists():
        child = in_a_child(run_to_the_end, case, folder, "kept", checkpoint=path, **there)
        if kills < N_KILLS[kind]:
            status = kill_later(child, path, rng.randrange(first, 8), rng.uniform(0, 2 * epoch))
        else:
            status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        if status == 0:
            outcomes.append(json.loads((folder / "kept.json").read_text()))
            path.unlink()
        else:
            kills += path.exists()  # else there is nothing to go on from: it does not count
    left = [p.name for p in folder.iterdir() if p.name.startswith(".run-")]
    (folder / "kills.json").write_text(json.dumps([kills, left, outcomes]))


def runs_on(kind):
    return [run for run in runs() if run[0] == kind and is_there(run[1])]


def kill_and_resume_all(kind, folder):
    """All cases side by side: most of their time they wait for the disk."""
    small_chunks(pytest.MonkeyPatch())
    children = []
    for i, run in enumerate(runs_on(kind)):
        (folder / str(i)).mkdir()
        children.append(in_a_child(kill_and_resume, *run, folder / str(i)))
    for child in children:
        os.waitpid(child, 0)


def killed_on(kind, folder):
    """Return what each run on a kind of device came to, in a folder of its own, by its number."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork and kill -9")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; import test_resume\n"
        f"test_resume.kill_and_resume_all({kind!r}, Path({str(folder)!r}))"
    )
    # one thread, so that the process may be forked, and no word with a GPU before that
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "GPUML_DEVICE": kind}
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=500, check=True)
    return {run: folder / str(i) for i, run in enumerate(runs_on(kind))}


def assert_killed_ends_with_the_same_bits(run, folder):
    written, alone = (json.loads((folder / f"{n}.json").read_text()) for n in ("written", "alone"))
    kills, left, outcomes = json.loads((folder / "kills.json").read_text())
    assert written == alone, run
    assert alone["grows"], run
    assert outcomes, run
    for kept in outcomes:
        assert kept == alone, run
    assert kills == N_KILLS[run[0]], run
    assert not left, f"{run}: what a killed run left beside the file is cleared away"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return killed_on("cpu", tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize("run", runs_on("cpu"), ids="-".join)
def test_killed_at_random_moments_it_ends_with_the_same_bits(killed, run):
    assert_killed_ends_with_the_same_bits(run, killed[run])


def test_killed_on_a_gpu_all_engines_end_with_the_same_bits(device, tmp_path):
    """One test, so that several processes that share the tests do not all start these."""
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    for run, folder in killed_on("gpu", tmp_path).items():
        assert_killed_ends_with_the_same_bits(run, folder)


# --- interrupted inside ----------------------------------------------------------------------


class Stopped(BaseException):
    """As a kill, but one that a test survives."""


# Where an engine can be stopped between two writes: in the middle of a step, after a step, after a
# launch of some epochs.
SEAMS = {
    "eager": (EagerStep, "_gradient"),
    "graph": (GraphStep, "__call__"),
    "fused": (FusedStep, "launch"),
}


def stop_after(patch, engine, n, error):
    """Raise an error when that place is reached for the n-th time."""
    kind, name = SEAMS[engine]
    work, calls = getattr(kind, name), itertools.count(1)

    def stopping(*arguments):
        result = work(*arguments)
        if next(calls) == n:
            raise error
        return result

    patch.setattr(kind, name, stopping)


@each(("device", "engine", "case"), runs())
def test_stopped_after_any_write_it_ends_with_the_same_bits(
    device, engine, case, tmp_path, monkeypatch
):
    small_chunks(monkeypatch)
    options = {"n_epochs": 12, "engine": engine}
    expected = outcome(*train(case, tmp_path, device, **options))
    save, left = training.save_checkpoint, 0

    def stopping(*arguments, **named):
        nonlocal left
        left -= 1
        save(*arguments, **named)
        if left == 0:
            raise Stopped

    monkeypatch.setattr(training, "save_checkpoint", stopping)
    path = tmp_path / "run.safetensors"
    n_stopped = 0
    while True:
        left = 1 + n_stopped % 3
        try:
            run = train(case, tmp_path, device, checkpoint=path, **options)
            break
        except Stopped:
            n_stopped += 1
    assert n_stopped >= 4
    assert outcome(*run) == expected


@each(("device", "engine"), PLACES)
@pytest.mark.parametrize("every", [1, 3])
def test_stopped_in_the_middle_of_an_epoch(device, engine, tmp_path, monkeypatch, every):
    options = {"n_epochs": 8, "engine": engine}
    expected = outcome(*train("momentum", tmp_path, device, **options))
    options |= {"checkpoint": tmp_path / "run.safetensors", "checkpoint_every": every}
    # of 6 steps in each epoch, or of launches of 1, 2 and 2 epochs at most
    for n in (3, 2, 3) if engine == "fused" else (3, 27, 20):
        with monkeypatch.context() as patch:
            stop_after(patch, engine, n, Stopped)
            with pytest.raises(Stopped):
                train("momentum", tmp_path, device, **options)
    assert outcome(*train("momentum", tmp_path, device, **options)) == expected


@each(("device", "engine"), PLACES)
def test_ctrl_c_and_the_same_call_again(device, engine, tmp_path, monkeypatch):
    """In a notebook the model then holds weights of the middle already."""
    options = {"n_epochs": 6, "engine": engine}
    expected = outcome(*train("Adam", tmp_path, device, **options))
    options |= {"checkpoint": tmp_path / "run.safetensors", "model": mlp(device)}
    with monkeypatch.context() as patch:
        stop_after(patch, engine, 4 if engine == "fused" else 20, KeyboardInterrupt)
        with pytest.raises(gpuml.TrainingInterrupted) as caught:
            train("Adam", tmp_path, device, **options)
    assert len(caught.value.history) == 3
    assert outcome(*train("Adam", tmp_path, device, **options)) == expected


# --- what is refused -------------------------------------------------------------------------


def own_schedule(epoch, n_epochs):
    return 0.5**epoch


def other_schedule(epoch, n_epochs):
    return 0.9**epoch


def changed(array):
    array = array.copy()
    array.flat[-1] += 1 - 2 * array.flat[-1] if array.dtype.kind == "i" else 1
    return array


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"X": changed(data(None)[0])}, r"data, X was 90x4 float32 \w+ and is 90x4 float32"),
        ({"y": changed(data(None)[1])}, "data, y was 90 int64"),
        ({"X": data(None)[0][:89], "y": data(None)[1][:89]}, "90x4 .* and is 89x4"),
        ({"model": MLP([4, 6, 2], device="cpu")}, "model was MLP 4-5-2 .* and is MLP 4-6-2"),
        ({"model": MLP([4, 5, 2], device="cpu", dtype=np.float64)}, "float32.* and is .*float64"),
        ({"optimizer": Adam(0.02)}, "optimizer, learning_rate was 0.01 and is 0.02"),
        ({"optimizer": Adam(0.01, weight_decay=0.1)}, "weight_decay was 0.0 and is 0.1"),
        ({"optimizer": "gradient_descent"}, "optimizer, name was adam and is gradient_descent"),
        ({"batch_size": 17}, "batch size was 16 and is 17"),
        ({"shuffle": False}, "shuffle was true and is false"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"schedule": schedules.cosine()}, r"schedule was not? .*and is cosine|schedule was null"),
        ({"patience": 3}, "patience was null and is 3"),
        ({"loss": lambda p, t: softmax_cross_entropy(p, t)}, "loss was softmax_cross_entropy"),
        ({"validation_data": (data(None)[0][:5], data(None)[1][:5])}, "validation data"),
    ],
)
def test_another_model_data_or_setting_is_refused(tmp_path, change, difference):
    path = tmp_path / "run.safetensors"
    validated = {"validation_data": data(None)[2]} if "patience" in change else {}
    train("Adam", tmp_path, n_epochs=2, checkpoint=path, **validated)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=difference) as caught:
        train("Adam", tmp_path, n_epochs=4, checkpoint=path, **(validated | change))
    assert "delete the file to begin anew" in str(caught.value)
    assert path.read_bytes() == before


def test_another_order_of_a_memory_map_is_refused(tmp_path):
    """Its order depends on how many rows make a chunk, and so on memory_limit."""
    path = tmp_path / "run.safetensors"
    train("memory map", tmp_path, n_epochs=2, checkpoint=path)
    with pytest.raises(CheckpointError, match="rows in a chunk was 90 and is 16"):
        train("memory map", tmp_path, n_epochs=3, checkpoint=path, memory_limit=16 * 24 * 6)


def test_a_schedule_of_another_length_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    train("schedule", tmp_path, n_epochs=5, checkpoint=path)
    with pytest.raises(CheckpointError, match="epochs of the schedule was 5 and is 6"):
        train("schedule", tmp_path, n_epochs=6, checkpoint=path)


def test_a_schedule_and_a_loss_of_ones_own_are_known_by_name(tmp_path):
    """Where a function lies in memory changes from process to process."""
    options = {"n_epochs": 4, "checkpoint": tmp_path / "run.safetensors"}
    train("Adam", tmp_path, schedule=own_schedule, **options)
    assert " at 0x" not in json.dumps(facts_of(tmp_path / "run.safetensors"))
    with pytest.raises(CheckpointError, match="schedule was own_schedule and is other_schedule"):
        train("Adam", tmp_path, schedule=other_schedule, **options)

    class Objects:
        def __call__(self, predictions, labels):
            return softmax_cross_entropy(predictions, labels)

    path = tmp_path / "object.safetensors"
    for n_epochs in (1, 2):
        _, history = train("Adam", tmp_path, loss=Objects(), n_epochs=n_epochs, checkpoint=path)
        assert len(history) == n_epochs


def test_a_precision_is_held_and_a_file_from_before_there_was_one_stays_good(tmp_path):
    path = tmp_path / "run.safetensors"
    train("Adam", tmp_path, n_epochs=1, checkpoint=path)
    assert "precision" not in facts_of(path)
    with pytest.raises(CheckpointError, match="precision"):
        train("Adam", tmp_path, n_epochs=2, checkpoint=path, precision="float32")
    _, history = train("Adam", tmp_path, n_epochs=2, checkpoint=path)
    assert len(history) == 2


def facts_of(path):
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["gpuml_checkpoint"])["facts"]


def test_a_model_file_is_no_checkpoint(tmp_path):
    mlp("cpu").save(tmp_path / "run.safetensors")
    with pytest.raises(CheckpointError, match="is no checkpoint, but a model"):
        train("Adam", tmp_path, n_epochs=2, checkpoint=tmp_path / "run.safetensors")


# --- finished, longer, and by the clock ------------------------------------------------------


@each(("device", "engine", "case"), runs(["Adam", "patience", "schedule", "gram"]))
def test_a_finished_run_returns_at_once(device, engine, case, tmp_path, monkeypatch):
    options = {"n_epochs": 40, "engine": engine, "checkpoint": tmp_path / "run.safetensors"}
    first = train(case, tmp_path, device, **options)

    def never(*_):
        raise AssertionError("no step is taken")

    monkeypatch.setattr(training._Run, "_one_epoch", never)
    monkeypatch.setattr(training._FusedRun, "_launch", never)
    again = train(case, tmp_path, device, **options)
    assert outcome(*again) == outcome(*first)
    assert again[1]["seconds"] == first[1]["seconds"]
    if case == "patience":
        assert len(first[1]) < 40, "it stopped early"


@each(("device", "engine"), [*PLACES, ("gpu", None)])
def test_more_epochs_go_on(device, engine, tmp_path):
    options = {"engine": engine, "checkpoint": tmp_path / "run.safetensors"}
    for n_epochs in (3, 4, 9):
        run = train("momentum", tmp_path, device, n_epochs=n_epochs, **options)
        assert len(run[1]) == n_epochs
        alone = train("momentum", tmp_path, device, n_epochs=n_epochs, engine=engine)
        assert run[1].engine == alone[1].engine
        assert outcome(*run) == outcome(*alone)


@pytest.mark.parametrize(("first", "engine"), [(4, "eager"), (80, "fused")])
def test_the_engine_is_that_of_the_beginning_though_another_pays_now(
    device, tmp_path, first, engine
):
    """On a GPU 4 epochs are too few to compile for, and 90 are enough."""
    if device.kind == "cpu":
        pytest.skip("a CPU has no choice here")
    path = tmp_path / "run.safetensors"
    runs = [train("momentum", tmp_path, device, n_epochs=first, checkpoint=path)]
    runs += [train("momentum", tmp_path, device, n_epochs=first)]
    assert outcome(*runs[0]) == outcome(*runs[1]), "a checkpoint changes nothing"
    runs += [train("momentum", tmp_path, device, n_epochs=90, checkpoint=path)]
    assert [history.engine for _, history in runs] == [engine] * 3
    alone = train("momentum", tmp_path, device, n_epochs=90, engine=engine)
    assert outcome(*runs[2])["weights"] == outcome(*alone)["weights"]
    told = any("begun by eager" in note for note in runs[2][1].notes)
    assert told == (engine == "eager")


def writes(monkeypatch):
    """Note after which epoch the file is written."""
    found, save = [], training.save_checkpoint

    def noted(*arguments, **named):
        found.append(len(named["state"]["columns"]["epoch"]))
        save(*arguments, **named)

    monkeypatch.setattr(training, "save_checkpoint", noted)
    return found


@pytest.mark.parametrize("every", [1, 3, 100])
def test_it_is_written_every_so_many_epochs_and_at_the_end(tmp_path, monkeypatch, every):
    found = writes(monkeypatch)
    path = tmp_path / "run.safetensors"
    train("Adam", tmp_path, n_epochs=7, checkpoint=path, checkpoint_every=every)
    assert set(found) == {*range(every, 8, every), 7}


def test_it_is_written_by_the_clock(tmp_path, monkeypatch):
    now = 100.0

    def clock():
        return now

    monkeypatch.setattr(training.time, "monotonic", clock)

    class Slow(Adam):
        def update(self, *arguments):
            nonlocal now
            now += 0.05 / 6  # six steps in an epoch
            super().update(*arguments)

    found = writes(monkeypatch)
    train(
        "Adam",
        tmp_path,
        optimizer=Slow(0.01),
        n_epochs=20,
        checkpoint=tmp_path / "run.safetensors",
        checkpoint_every="0.2 s",
    )
    gaps = np.diff([0, *sorted(set(found))])
    assert 3 <= len(gaps) <= 6
    assert set(gaps[:-1]) <= {4, 5}


@pytest.mark.parametrize("every", [0, -1, 1.5, "0 s", "ten min", "5", "-3 s", "inf s", "5 days"])
def test_a_senseless_interval_is_explained(tmp_path, every):
    with pytest.raises(ValueError, match="checkpoint_every must be a"):
        train("Adam", tmp_path, checkpoint=tmp_path / "run", checkpoint_every=every)
    assert not (tmp_path / "run").exists()


# --- trouble with the disk -------------------------------------------------------------------


@each(("device", "engine"), PLACES)
def test_a_full_disk_leaves_the_older_file(device, engine, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    options = {"engine": engine, "checkpoint": path}
    train("Adam", tmp_path, device, n_epochs=3, **options)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        model = mlp(device)
        with pytest.raises(OSError, match="No space left on device") as caught:
            train("Adam", tmp_path, device, n_epochs=6, model=model, **options)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".run")] == []
    fourth, _ = train("Adam", tmp_path, device, n_epochs=4, engine=engine)
    np.testing.assert_array_equal(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(fourth.parameters.flat)
    )
    # with space again it goes on from the older file
    run = train("Adam", tmp_path, device, n_epochs=6, **options)
    alone = train("Adam", tmp_path, device, n_epochs=6, engine=engine)
    assert outcome(*run) == outcome(*alone)


def test_a_folder_that_is_missing_is_named(tmp_path):
    model = mlp("cpu")
    start = model.parameters.flat.copy()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        train("Adam", tmp_path, checkpoint=tmp_path / "nowhere" / "run.safetensors", model=model)
    np.testing.assert_array_equal(model.parameters.flat, start, "it is said before training")
    with pytest.raises(FileExistsError, match="it is not a file"):
        train("Adam", tmp_path, checkpoint=tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_leaves_the_older_file(tmp_path):
    """Here the system refuses, in the middle of the file."""
    import resource

    path = tmp_path / "run.safetensors"
    train("Adam", tmp_path, n_epochs=3, checkpoint=path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match=r"cannot write the checkpoint: .*the older one is kept"):
            train("Adam", tmp_path, n_epochs=6, checkpoint=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".run")] == []


def test_a_source_of_another_length_is_refused(tmp_path):
    X, y, _ = data(None)
    pairs = [(X[i : i + 30], y[i : i + 30]) for i in range(0, 90, 30)]
    path = tmp_path / "run.safetensors"
    gpuml.train(mlp("cpu"), pairs, n_epochs=2, checkpoint=path)
    resumed = gpuml.train(mlp("cpu"), pairs, n_epochs=4, checkpoint=path)
    assert len(resumed) == 4
    with pytest.raises(CheckpointError, match="data, rows of the source was 90 and is 60"):
        gpuml.train(mlp("cpu"), pairs[:2], n_epochs=6, checkpoint=path)


def test_a_checkpoint_is_no_model(tmp_path):
    path = tmp_path / "run.safetensors"
    train("Adam", tmp_path, n_epochs=1, checkpoint=path)
    with pytest.raises(gpuml.ModelFileError, match=r"is a checkpoint, .* and no model: model.save"):
        gpuml.load_model(path)


def test_one_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("gpuml.checkpoints.FORMAT", 2)
        train("Adam", tmp_path, n_epochs=1, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"from a newer gpuml, in format 2, .*: update gpuml"):
        train("Adam", tmp_path, n_epochs=2, checkpoint=path)
    assert path.read_bytes() == before
