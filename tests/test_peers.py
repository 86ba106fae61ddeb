from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import gpuml
from gpuml import cli, peers, recordings, rivals, workloads
from gpuml.devices import CPU
from gpuml.peers import PeerTable, Timing, compare_processes, compare_rivals, disagreeing
from gpuml.workloads import Workload

CEILINGS = {"copy": 1e10, "gemm_float32": 1e11}
TINY = Workload("tiny", (6, 8, 3), 4, n_steps=5, n_epochs=3, learning_rate=0.05)
QUICK = {"device": "cpu", "ceilings": CEILINGS, "time_budget": 0.005, "n_rounds": 2}

OTHERS = """
import json
import sys
import time

from gpuml import rivals


def changed(task, factor):
    run = rivals.gpuml_rival(task, engine=None)

    def other(n_epochs):
        first, last, how = run(n_epochs)
        return first, last * factor, how

    return other


def near(task):
    return changed(task, 1.00005)


def liar(task):
    return changed(task, 1.002)


def diverging(task):
    return changed(task, float("nan"))


def broken(task):
    raise RuntimeError("the device is on fire\\nsince yesterday")


def dying(task):
    print("this is no answer")
    print("I die", file=sys.stderr, flush=True)
    sys.exit(3)


def sleeping(task):
    time.sleep(60)
"""


@pytest.fixture
def others(tmp_path, monkeypatch):
    """Rivals of our own, in a module that the processes find."""
    (tmp_path / "other_rivals.py").write_text(OTHERS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_who_disagrees_or_fails_is_left_out_with_a_reason(others):
    names = ["near", "liar", "diverging", "broken", "dying", "missing"]
    table = compare_rivals(
        TINY, rivals=["gpuml", "gpuml eager", *(f"other_rivals:{name}" for name in names)], **QUICK
    )
    assert set(table.rivals) == {"gpuml", "gpuml eager", "other_rivals:near"}
    reasons = {name.partition(":")[2]: why for name, why in table.left_out.items()}
    assert set(reasons) == set(names) - {"near"}
    assert "before a time counts" in reasons["liar"]
    assert reasons["diverging"].startswith("its loss is nan")
    assert reasons["broken"] == "RuntimeError: the device is on fire"
    assert reasons["dying"] == "ended with exit code 3: I die"
    assert reasons["missing"].startswith("AttributeError: module 'other_rivals' has no")
    assert all(timing.first_call > 0 for timing in table.rivals.values())
    assert list(table.rivals.values()) == sorted(table.rivals.values(), key=lambda t: t.seconds)
    text = str(table)
    assert "left out: other_rivals:broken: RuntimeError: the device is on fire" in text
    assert PeerTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_nobody_is_waited_for_in_vain(others):
    table = compare_rivals(TINY, rivals=["other_rivals:sleeping"], patience=0.7, **QUICK)
    assert set(table.left_out.values()) == {"gave no answer within 700 ms"}
    assert table.rivals == {}
    assert table.ours is None
    assert "left out: other_rivals:sleeping" in str(table)


def test_a_library_that_is_missing_is_left_out(monkeypatch, tmp_path):
    for name in ("torch", "jax"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    table = compare_rivals(TINY, rivals=["gpuml", "PyTorch eager", "JAX scan"], **QUICK)
    assert set(table.rivals) == {"gpuml"}
    assert table.left_out["PyTorch eager"] == "ImportError: torch is not here"
    assert table.left_out["JAX scan"] == "ImportError: jax is not here"
    assert table.ratio("gpuml") == 1


@pytest.mark.parametrize("n_models", [None, 3])
@pytest.mark.parametrize("rival", ["PyTorch eager", "JAX scan"])
def test_a_peer_trains_as_gpuml_does(rival, n_models, tmp_path):
    library, _ = rivals.RIVALS[rival]
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    workload = replace(TINY, n_models=n_models)
    workload.write(tmp_path)
    code = "from gpuml.rivals import main; main()"
    losses = []
    for name in ("gpuml", rival):
        task = json.dumps(asdict(workload.task(tmp_path, CPU)))
        done = subprocess.run(
            [sys.executable, "-c", code, name, task],
            input="3\n3\n",
            capture_output=True,
            text=True,
            check=True,
            env=peers.environment(CPU, 1),
        )
        _, *answers = map(json.loads, done.stdout.splitlines())
        assert answers[0]["last_loss"] == answers[1]["last_loss"], "it begins anew"
        losses.append([answers[1]["first_loss"], answers[1]["last_loss"]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_many_models_are_trained_as_each_alone(tmp_path):
    workload = replace(TINY, n_models=4)
    workload.write(tmp_path)
    task = workload.task(tmp_path, CPU)
    found = np.array(rivals.gpuml_rival(task, None)(3)[:2])
    X, y = task.data()
    alone = []
    for seed, rate in enumerate(task.rates().tolist()):
        optimizer = gpuml.GradientDescent(rate, momentum=workloads.MOMENTUM)
        options = {"batch_size": 4, "n_epochs": 3, "seed": rivals.SEED}
        model = gpuml.MLP(TINY.sizes, seed=seed, device="cpu")
        history = gpuml.train(model, X, y, optimizer=optimizer, **options)
        alone.append([history["loss"][0], history["loss"][-1]])
    assert np.ptp(task.rates()) > 0
    np.testing.assert_allclose(found, np.mean(alone, axis=0), rtol=1e-5)
    assert replace(workload, sizes=(6, 8, 8, 3)).n_operations == (
        4 * replace(TINY, sizes=(6, 8, 8, 3)).n_operations
    )
    floor = workload.n_bytes - TINY.n_bytes
    assert floor == 3 * (4 * 4 * (7 * 8 + 9 * 3) + 4 * 2 * 4 * 8), "samples are read once for all"
    with pytest.raises(RuntimeError, match="trains one model"):
        rivals.sklearn_rival(task)
    with pytest.raises(RuntimeError, match="trains one model"):
        rivals.torch_rival(task, rivals.CompiledTorchTraining)


def test_scikit_learn_trains_as_long_as_the_others(tmp_path):
    TINY.write(tmp_path)
    run = rivals.sklearn_rival(TINY.task(tmp_path, CPU))
    first, last, _ = run(12)
    assert last < first
    assert run(1)[0] == first


def test_gpuml_is_asked_for_the_precision_and_the_engine_of_the_task(tmp_path, monkeypatch):
    asked = []

    class History(dict):
        engine = "an engine"

    def train(model, X, y, **settings):
        asked.append(settings)
        return History(loss=[2.0, 1.0])

    TINY.write(tmp_path)
    monkeypatch.setattr(gpuml, "train", train)
    for precision in workloads.PRECISIONS:
        task = replace(TINY, precision=precision).task(tmp_path, CPU)
        assert rivals.gpuml_rival(task, "fused")(2) == (2.0, 1.0, "an engine")
    assert [settings.get("precision") for settings in asked] == [None, "tf32", "bfloat16"]
    assert {settings["engine"] for settings in asked} == {"fused"}


def test_losses_are_held_against_their_median():
    def refused(limit: float, **last: float) -> set[str]:
        return set(disagreeing({name: (2.0, loss) for name, loss in last.items()}, limit))

    assert refused(1e-3, a=1.0, b=1.0001, c=1.01) == {"c"}
    assert refused(1e-3, a=1.9, b=1.9, c=1.901) == {"c"}, "it has fallen by 0.1 only"
    assert refused(1e-3, a=0.1, b=0.1, c=0.1011) == {"c"}, "it is 0.1 only"
    assert refused(1e-3, a=1.0, b=1.1) == {"a", "b"}, "no telling who is right"
    assert refused(1e-3, a=1.0, b=math.inf) == {"b"}
    assert refused(1e-3, a=math.nan) == {"a"}
    assert refused(1e-3, a=1.0) == set()
    for loss, wrong in ((1.4, False), (1.6, True)):
        losses = {"a": (2.0, 1.0), "scikit-learn, 1 thread": (2.5, loss)}
        assert ("scikit-learn, 1 thread" in disagreeing(losses, 1e-3)) == wrong


def test_the_floor_is_the_higher_of_arithmetic_and_memory():
    work = Workload("x", (3, 4, 2), 5)
    # forward 2·5·(12 + 8), weights the same, the inputs of the second layer 2·5·8
    assert work.n_operations == 200 + 200 + 80
    # 26 parameters, with their momentum, read and written; samples, labels, hidden units twice
    assert work.n_bytes == 26 * 4 * 4 + 5 * (3 * 4 + 8 + 2 * 4 * 4)
    assert replace(work, precision="bfloat16").n_bytes == work.n_bytes - 5 * 4 * 4
    assert work.floor({"copy": 676.0, "gemm_float32": 240.0}) == (2.0, "arithmetic")
    assert work.floor({"copy": 169.0, "gemm_float32": 240.0}) == (4.0, "memory")
    h200 = recordings.recorded("nvidia_h200").ceilings.values
    wide = [replace(workloads.WORKLOADS["wide"], precision=p) for p in workloads.PRECISIONS]
    seconds = [w.floor(h200)[0] for w in wide]
    assert 10e-3 < seconds[0] < 12.5e-3
    assert seconds == sorted(seconds, reverse=True)


def test_workloads_are_data(tmp_path):
    assert [w.name for w in workloads.workloads(["digits", "wide"], CPU)] == ["digits", "wide"]
    gpu = gpuml.Device("gpu")
    found = workloads.workloads(["wide", "mnist"], gpu, n_steps=2)
    assert [w.name for w in found] == ["wide", "wide, tf32", "wide, bfloat16", "mnist"]
    assert {w.n_steps for w in found} == {2}
    few, many = workloads.workloads(["population"], CPU, n_models=[64, 2048])
    assert (many.name, many.n_models) == ("2,048 × population", 2048)
    assert str(few).startswith("64 × population: 64 × MLP 64-32-10, batch 64")
    [same] = workloads.workloads(["digits"], CPU, n_models=[64])
    assert same.n_models is None
    with pytest.raises(ValueError, match="unknown workload 'digit': did you mean 'digits'"):
        workloads.workloads(["digit"], CPU)
    with pytest.raises(ValueError, match=r"population trains many models .* out precision tf32"):
        workloads.workloads(["wide", "population"], gpu, precisions=["float32", "tf32"])
    with pytest.raises(ValueError, match="precision tf32 needs a GPU"):
        workloads.workloads(["digits"], CPU, precisions=["tf32"])
    with pytest.raises(ValueError, match="unknown precision 'float8'"):
        Workload("x", (3, 2), 4, precision="float8")
    for wrong in ({"sizes": (3,)}, {"sizes": (3, 0)}, {"n_epochs": 1}):
        with pytest.raises(ValueError, match="two or more sizes"):
            replace(TINY, **wrong)

    TINY.write(tmp_path)
    task = TINY.task(tmp_path, CPU)
    X, y = task.data()
    assert X.shape == (20, 6)
    assert y.min() >= 0
    assert y.max() < 3
    model = gpuml.MLP(TINY.sizes, seed=0, device="cpu")
    for (W, b), (weight, bias) in zip(task.start(), model.layers, strict=True):
        np.testing.assert_array_equal(W, model.parameters[weight])
        np.testing.assert_array_equal(b, model.parameters[bias][0])


def test_the_order_is_that_of_training():
    X = np.arange(12, dtype=np.float32)[:, None]
    generator = np.random.default_rng(rivals.SEED)
    for order in rivals.orders(12, 3):
        seen = [x for x, _ in gpuml.batches.batches(X, X, 4, generator=generator)]
        np.testing.assert_array_equal(np.concatenate(seen), X[order])


def test_a_rival_has_its_threads_and_its_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert peers.environment(gpuml.Device("gpu", 1))["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert peers.environment(gpuml.Device("gpu", 1))["CUDA_VISIBLE_DEVICES"] == "7"
    assert peers.environment(CPU, 3)["OMP_NUM_THREADS"] == "3"
    assert peers.environment(CPU)["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.setattr(peers, "cpu_count", lambda: 16)
    assert peers.thread_counts("JAX scan", CPU) == [1, 2, 16]
    assert peers.thread_counts("gpuml", CPU) == [None]
    assert peers.thread_counts("JAX scan", gpuml.Device("gpu")) == [None]


def test_an_unknown_rival_is_named():
    with pytest.raises(ValueError, match="unknown rival 'JAX scam': did you mean 'JAX scan'"):
        rivals.find_rival("JAX scam")


def test_whole_processes_are_timed(others):
    names = ["gpuml", "gpuml eager", "other_rivals:liar", "other_rivals:dying"]
    table = compare_processes(device="cpu", rivals=names, n_epochs=2, n_rounds=1)
    assert set(table.rivals) == {"gpuml", "gpuml eager"}
    assert set(table.left_out) == {"other_rivals:liar", "other_rivals:dying"}
    assert all(timing.seconds > timing.first_call for timing in table.rivals.values())
    assert "from process start to a trained model, 2 epochs" in str(table)
    assert PeerTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_the_table_shows_ratios_and_the_share_of_the_floor():
    def timing(seconds: float, loss: float, how: str = "") -> Timing:
        return Timing(seconds, seconds, seconds, 1.0, loss, "1.2", how)

    table = PeerTable(
        "digits", "a device", "2026-01-01", 2e-6, "arithmetic", 140, 2.0,
        {"gpuml fused": timing(5e-6, 0.5, "fused"),
         "gpuml graph": timing(1e-3, 0.5, "eager"), "JAX scan": timing(3.46e-5, 0.5001)},
        {"PyTorch compile": "no compiler"},
    )  # fmt: skip
    assert table.ratio("JAX scan") == pytest.approx(6.92)
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 100
    [row] = [line for line in lines if line.startswith("JAX scan")]
    assert row.split()[2:] == ["34.6", "34.6–34.6", "6.92", "5.8%", "1", "s"]
    assert "JAX 1.2, gpuml 1.2" in lines
    [axis] = table.plot().axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([5, 1000, 34.6])
    assert axis.get_title() == "digits\nmeasured on a device, 2026-01-01"
    assert lines[-2:] == [
        "gpuml graph ran by its engine eager",
        "left out: PyTorch compile: no compiler",
    ]


def test_tables_are_joined_by_the_number_of_models():
    def table(n: int, **seconds: float) -> PeerTable:
        rivals = {name: Timing(t, t, t, 1.0, 0.5) for name, t in seconds.items()}
        return PeerTable("p", "d", "2026-01-01", 1e-6, "memory", 3, 2.0, rivals, n_models=n)

    tables = [table(256, a=3e-6, b=9e-6), table(1, a=1e-6), table(16, b=8e-6, a=2e-6)]
    lines = peers.by_number(tables)
    assert lines == {"a": ([1, 16, 256], [1e-6, 2e-6, 3e-6]), "b": ([16, 256], [8e-6, 9e-6])}
    older = tables[0].to_json()
    del older["n_models"]
    assert PeerTable.from_json(older).n_models == 1
    labels = ("models", "time of a step [s]")
    [axis] = gpuml.plots.times(lines, "title", labels=labels).axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == labels


# --- gpuml bench --peers -----------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    """The command line, with tables that take no time."""
    made = PeerTable("title", "device", "2026-01-01", 1e-6, "memory", 3, 2.0)
    made.rivals["gpuml"] = Timing(1e-5, 1e-5, 1e-5, 0.1, 1.0)
    monkeypatch.setattr(
        peers, "compare_rivals", lambda workload, **_: replace(made, title=workload.name)
    )
    monkeypatch.setattr(peers, "compare_processes", lambda **_: replace(made, bound=""))
    monkeypatch.setattr(peers, "measure_ceilings", lambda device: CEILINGS)
    return made


def test_bench_adds_tables_to_a_recording(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old = replace(recordings.recorded("nvidia_h200"), device=f"{CPU.name}, 2 cores", peers={})
    monkeypatch.setattr(recordings, "record", lambda device, command: replace(old, command=command))
    call = ["bench", "--device", "cpu", "--save", "mine.json", "--peers"]
    assert cli.main(call) == 0
    saved = recordings.recorded("mine.json")
    assert saved.command == "gpuml bench --save mine.json"
    assert set(saved.peers["workloads"]) == {"digits"}
    assert PeerTable.from_json(saved.peers["workloads"]["digits"]) == replace(table, title="digits")
    assert saved.peers["processes"]["bound"] == ""

    assert cli.main([*call, "--sizes", "5,6,2"]) == 0, "others are added"
    assert set(recordings.recorded("mine.json").peers["workloads"]) == {"digits", "5-6-2, batch 64"}
    capsys.readouterr()
    assert cli.main(call) == 2
    assert "--save mine.json holds digits: --overwrite replaces it" in capsys.readouterr().err
    assert cli.main([*call, "--overwrite"]) == 0
    replace(old, device="another").save("other.json")
    assert cli.main([*call[:-2], "other.json", "--peers"]) == 2
    assert "is of another machine, another" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workload", "digits"], "--workload needs --peers"),
        (["--batch", "4"], "--batch needs --peers"),
        (["--peers", "--batch", "4"], "--batch needs --sizes"),
        (["--models", "4"], "--models needs --peers"),
        (["--peers", "--models", "4"], "--models needs --workload population, or --sizes"),
        (["--peers", "--workload", "digit"], "did you mean 'digits'"),
        (["--peers", "--sizes", "64"], "two or more sizes"),
        (["--peers", "--precision", "tf32"], "precision tf32 needs a GPU"),
        (["--peers", "--save", "no/mine.json"], "a folder that exists"),
        (["--peers", "--output", "here"], "--output is for pictures"),
    ],
)
def test_bench_refuses_what_makes_no_sense(arguments, complaint, table, capsys):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


def test_bench_with_peers_runs(monkeypatch, capsys, tmp_path):
    for name in ("torch", "jax"):  # these take their time to load
        (tmp_path / f"{name}.py").write_text("raise ImportError('left out here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "measure_ceilings", lambda device: CEILINGS)
    names = ["gpuml", "JAX scan"]
    quick = partial(compare_rivals, rivals=names, time_budget=0.005, n_rounds=1)
    monkeypatch.setattr(peers, "compare_rivals", quick)
    call = ["bench", "--device", "cpu", "--peers", "--sizes", "5,6,2", "--batch", "8"]
    assert cli.main([*call, "--steps", "4", "--models", "3"]) == 0
    many = "3 × 5-6-2, batch 8: 3 × MLP 5-6-2, batch 8, float32, 4 steps an epoch"
    assert many in capsys.readouterr().out
    assert cli.main([*call, "--steps", "4"]) == 0
    shown = capsys.readouterr()
    assert "5-6-2, batch 8: MLP 5-6-2, batch 8, float32, 4 steps an epoch" in shown.out
    assert "left out: JAX scan: ImportError: left out here" in shown.out
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines())) <= 100
