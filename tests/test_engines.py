"""The engines that train perceptrons on a GPU: eager, graph, fused. All train the same model."""

from __future__ import annotations

import importlib.util
import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuml
from gpuml import MLP, Adam, GradientDescent, fused, gpu_layers, kernels, training
from gpuml.batches import ArrayBatches
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.models import Parameters
from gpuml.steps import ENGINES, GraphStep

OPTIMIZERS = [
    GradientDescent(0.05),
    GradientDescent(0.02, momentum=0.9),
    GradientDescent(0.02, momentum=0.9, weight_decay=0.1),
    GradientDescent(0.05, weight_decay=0.1),
    Adam(0.01),
    Adam(0.01, weight_decay=0.1),
]
SHAPES = [
    ([64, 128, 10], 64),
    ([13, 50, 3], 40),
    ([7, 33, 17, 5], 23),
    ([784, 256, 128, 10], 128),
    ([5, 1, 2], 1),
    ([30, 24, 24, 24, 8], 64),
]


def engines():
    """Return those that can run here, beside the eager one."""
    return ["fused", *(["graph"] if importlib.util.find_spec("nvmath") else [])]


@pytest.fixture
def gpu(device):
    if device.kind == "cpu":
        pytest.skip("graphs and fused kernels are for GPUs")
    return device


def problem(sizes, n, classes, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, sizes[0])).astype(np.float32)
    scores = X @ rng.normal(size=(sizes[0], sizes[-1])).astype(np.float32) / math.sqrt(sizes[0])
    return X, scores.argmax(axis=1) if classes else scores


def trained(device, engine, sizes, batch_size, *, n=None, classes=True, seed=0, **options):
    X, y = problem(sizes, n or 5 * batch_size + 3, classes, seed)
    model = MLP(sizes, seed=seed, device=device)
    options = {"n_epochs": 2, "seed": 3} | options
    history = gpuml.train(model, X, y, batch_size=batch_size, engine=engine, **options)
    assert history.engine == engine
    return gpuml.to_host(model.parameters.flat), history


def agree(first, second, tolerance=1e-4):
    (a, one), (b, two) = first, second
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a)
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=tolerance)


# --- without a GPU -----------------------------------------------------------------------------


def test_the_cpu_trains_eagerly_and_says_nothing_of_it():
    model = MLP([4, 8, 3], device="cpu")
    X, y = problem([4, 3], 30, True)
    history = gpuml.train(model, X, y, n_epochs=1000, batch_size=1)
    assert history.engine == "eager"
    assert history.notes == []


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_cpu_multiplies_exactly_whatever_the_precision(precision):
    X, y = problem([4, 3], 30, True)
    models = [MLP([4, 8, 3], device="cpu") for _ in range(2)]
    gpuml.train(models[0], X, y, n_epochs=2)
    gpuml.train(models[1], X, y, n_epochs=2, precision=precision)
    assert (models[0].parameters.flat == models[1].parameters.flat).all()


def test_a_precision_that_does_not_fit_is_refused():
    X, y = problem([4, 3], 30, True)
    with pytest.raises(ValueError, match="did you mean 'tf32'"):
        gpuml.train(MLP([4, 8, 3], device="cpu"), X, y, precision="tf23")
    with pytest.raises(ValueError, match="is for float32, and this product is float64"):
        gpuml.train(MLP([4, 8, 3], dtype=np.float64, device="cpu"), X, y, precision="tf32")


def test_every_engine_has_a_name_that_train_takes():
    for engine in ENGINES:
        assert f'"{engine}"' in training.train.__doc__


def some_gpu(patch, capability=(9, 0), shared=227 * 1024):
    """Put a GPU of which only the numbers are known into the place of that of this machine."""
    found = {"major": capability[0], "minor": capability[1], "shared": shared}
    patch.setattr(fused, "_properties", lambda index: found | {"multiProcessorCount": 132})


def plan(sizes, batch_size=64, optimizer=None, loss=softmax_cross_entropy):
    return fused.plan_for(tuple(sizes), batch_size, loss, optimizer or GradientDescent(0.1), 0)


def test_small_models_go_to_a_cluster_and_deep_ones_to_the_whole_gpu(monkeypatch):
    some_gpu(monkeypatch)
    assert (plan([64, 128, 10]).kernel, plan([64, 128, 10]).blocks) == ("mlp_cluster", 16)
    assert plan([64, 16, 10]).blocks == 4, "a block has four units at least"
    assert (plan([784, 256, 128, 10], 128).kernel, plan([784, 256, 128, 10], 128).blocks) == (
        "mlp_grid",
        132,
    )
    assert plan([3000, 128, 10]).kernel == "mlp_grid", "too many features for shared memory"


def test_an_older_gpu_has_no_clusters(monkeypatch):
    some_gpu(monkeypatch, capability=(8, 0), shared=163 * 1024)
    assert plan([64, 32, 10]).blocks == 1
    large = plan([784, 256, 128, 10], 128)
    assert large.kernel == "mlp_grid"
    assert large.shared_bytes < 163 * 1024


def test_what_the_host_reckons_of_shared_memory_is_what_the_compiler_does(monkeypatch):
    nvrtc = pytest.importorskip("test_kernels", reason="its compiler")
    some_gpu(monkeypatch)
    for sizes, batch_size in [*SHAPES, ([64, 512, 32], 17), ([3, 9, 1], 5)]:
        for optimizer, loss in itertools.product(
            (OPTIMIZERS[0], OPTIMIZERS[1], OPTIMIZERS[4]),
            (softmax_cross_entropy, mean_squared_error),
        ):
            found = plan(sizes, batch_size, optimizer, loss)
            text = kernels.source(found.kernel)
            defined = [o[2:].replace("=", " ") for o in found.options]
            text = "".join(f"#define {line}\n" for line in defined) + text
            size, log = nvrtc.compile_cuda_c(text, "sm_90")
            assert size > 0, log


@pytest.mark.parametrize(
    ("sizes", "batch_size", "reason"),
    [
        ([64, 128, 33], 64, "33 outputs, and fused kernels are for up to 32"),
        ([1024, 4096, 4096, 10], 4096, "operations, and fused kernels are for up to"),
        ([64, 32, 32, 10], 2000, "batches of 2000 rows are too large: at most 1024"),
    ],
)
def test_what_does_not_fit_is_said(monkeypatch, sizes, batch_size, reason):
    some_gpu(monkeypatch)
    assert reason in plan(sizes, batch_size)


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize(("sizes", "batch_size"), SHAPES, ids=str)
def test_all_engines_agree_with_each_other_and_the_cpu(gpu, sizes, batch_size, classes, optimizer):
    found = [
        trained(where, engine, sizes, batch_size, classes=classes, optimizer=optimizer)
        for where, engine in [("cpu", "eager"), (gpu, "eager"), *((gpu, e) for e in engines())]
    ]
    for first, second in itertools.combinations(found, 2):
        agree(first, second)


@given(
    hidden=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    features=st.integers(1, 200),
    outputs=st.integers(1, 32),
    batch_size=st.integers(1, 200),
    rest=st.integers(0, 199),
    classes=st.booleans(),
    optimizer=st.sampled_from(OPTIMIZERS),
    seed=st.integers(0, 2**16),
)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_models_are_trained_alike_by_all_engines(
    gpu, hidden, features, outputs, batch_size, rest, classes, optimizer, seed
):
    sizes = [features, *hidden, outputs]
    options = {"n": 2 * batch_size + rest % batch_size, "classes": classes, "seed": seed}
    options |= {"optimizer": optimizer, "n_epochs": 1}
    eager = trained(gpu, "eager", sizes, batch_size, **options)
    for engine in engines():
        agree(eager, trained(gpu, engine, sizes, batch_size, **options))


@pytest.mark.parametrize("engine", ["fused", "graph"])
@pytest.mark.parametrize("schedule", [None, "cosine"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_schedules_and_orders_are_those_of_the_eager_engine(gpu, engine, schedule, shuffle):
    if engine not in engines():
        pytest.skip("nvmath-python is not installed")
    options = {"schedule": schedule, "shuffle": shuffle, "n_epochs": 9}
    options |= {"optimizer": GradientDescent(0.05, momentum=0.9)}
    first, second = (trained(gpu, e, [20, 30, 4], 16, **options) for e in ("eager", engine))
    agree(first, second)
    if schedule:
        assert first[1]["learning_rate"] == second[1]["learning_rate"]
    assert second[1]["epoch"] == list(range(1, 10))
    assert second[1]["seconds"] == sorted(second[1]["seconds"])


@pytest.mark.parametrize("engine", ["eager", "fused", "graph"])
@pytest.mark.parametrize("optimizer", [OPTIMIZERS[2], OPTIMIZERS[5]], ids=repr)
@pytest.mark.parametrize("sizes", [[20, 30, 4], [20, 30, 12, 4]], ids=str)
def test_a_run_taken_up_again_ends_with_the_same_bits(gpu, tmp_path, engine, optimizer, sizes):
    if engine not in ["eager", *engines()]:
        pytest.skip("nvmath-python is not installed")
    options = {"optimizer": optimizer, "schedule": None}
    whole = trained(gpu, engine, sizes, 16, n_epochs=7, **options)
    path = tmp_path / "run.safetensors"
    for n_epochs in (2, 3, 7):
        parts = trained(gpu, engine, sizes, 16, n_epochs=n_epochs, checkpoint=path, **options)
    assert whole[0].tobytes() == parts[0].tobytes()
    assert whole[1]["loss"] == parts[1]["loss"]


@pytest.mark.parametrize("engine", ["fused", "graph"])
def test_validation_and_patience_see_each_epoch(gpu, engine):
    if engine not in engines():
        pytest.skip("nvmath-python is not installed")
    held_out = problem([20, 4], 40, True, seed=9)
    options = {"validation_data": held_out, "patience": 2, "n_epochs": 30}
    options |= {"optimizer": Adam(0.03)}
    first, second = (trained(gpu, e, [20, 30, 4], 16, **options) for e in ("eager", engine))
    assert len(first[1]) == len(second[1])
    agree(first, second)


@pytest.mark.parametrize("engine", ["eager", "fused", "graph"])
@pytest.mark.parametrize("sizes", [[20, 30, 4], [20, 30, 12, 4]], ids=str)
def test_a_loss_that_is_not_finite_is_found_and_good_weights_are_kept(gpu, engine, sizes):
    if engine not in ["eager", *engines()]:
        pytest.skip("nvmath-python is not installed")
    X, y = problem(sizes, 83, False)
    # The rate grows from epoch to epoch until the loss overflows.
    options = {"optimizer": GradientDescent(0.01), "schedule": lambda i, n: 10.0 ** (i - 2)}
    options |= {"batch_size": 16, "engine": engine, "shuffle": False}
    model = MLP(sizes, seed=0, device=gpu)
    with pytest.raises(gpuml.DivergenceError, match=r"epoch \d+, step") as caught:
        gpuml.train(model, X, y, n_epochs=60, **options)
    n_good = len(caught.value.history)
    assert 0 < n_good < 59
    again = MLP(sizes, seed=0, device=gpu)
    history = gpuml.train(again, X, y, n_epochs=n_good, **options)
    assert np.isfinite(gpuml.to_host(model.parameters.flat)).all()
    assert (again.parameters.flat == model.parameters.flat).all()
    assert history["loss"] == caught.value.history["loss"]


@pytest.mark.parametrize("after", range(1, 9))
def test_interrupted_the_model_is_that_of_the_last_epoch_told(gpu, monkeypatch, after):
    options = {"optimizer": GradientDescent(0.05, momentum=0.9), "n_epochs": 40}
    X, y = problem([20, 4], 83, True)
    options |= {"batch_size": 16, "engine": "fused"}
    calls = itertools.count(1)
    launch, event = fused.FusedStep.launch, training.Trace.event

    def interrupted(*arguments):
        if next(calls) == after:
            raise KeyboardInterrupt
        return launch(*arguments)

    def interrupted_event():
        if next(calls) == after:
            raise KeyboardInterrupt
        return event()

    monkeypatch.setattr(fused.FusedStep, "launch", interrupted)
    monkeypatch.setattr(training.Trace, "event", staticmethod(interrupted_event))
    model = MLP([20, 30, 4], device=gpu)
    with pytest.raises(gpuml.TrainingInterrupted) as caught:
        gpuml.train(model, X, y, **options)
    monkeypatch.undo()
    again = MLP([20, 30, 4], device=gpu)
    n = len(caught.value.history)
    if n:
        gpuml.train(again, X, y, **options | {"n_epochs": n})
    assert (again.parameters.flat == model.parameters.flat).all()


def test_the_best_engine_is_chosen_and_named(gpu):
    X, y = problem([64, 10], 1437, True)
    history = gpuml.train(MLP([64, 32, 10], device=gpu), X, y, n_epochs=20)
    assert history.engine == "fused"
    assert history.notes == []
    history = gpuml.train(MLP([64, 32, 10], device=gpu), X, y, n_epochs=1)
    assert history.engine == "eager"
    assert history.notes == [], "for few steps nothing is compiled"
    X, y = problem([64, 40], 1437, True)
    history = gpuml.train(MLP([64, 32, 40], device=gpu), X, y, n_epochs=140)
    assert history.engine == ("graph" if "graph" in engines() else "eager")
    assert "40 outputs, and fused kernels are for up to 32" in history.notes[0]


def test_a_model_that_a_forced_engine_cannot_hold_is_refused(gpu):
    X, y = problem([64, 40], 100, True)
    with pytest.raises(ValueError, match=r"engine='fused' cannot train this: it has 40 outputs"):
        gpuml.train(MLP([64, 32, 40], device=gpu), X, y, engine="fused")


def test_where_a_step_cannot_be_captured_it_is_trained_eagerly_and_said(gpu, monkeypatch):
    if "graph" not in engines():
        pytest.skip("nvmath-python is not installed")

    def forward(self, parameters, x):
        predictions, backward = MLP.forward(self, parameters, x)
        float(predictions[0, 0])  # waits for the device, which no graph can
        return predictions, backward

    model = type("Waits", (MLP,), {"forward": forward})([20, 30, 4], device=gpu)
    X, y = problem([20, 4], 83, True)
    history = gpuml.train(model, X, y, batch_size=16, n_epochs=2, engine="graph")
    assert history.engine == "eager"
    assert "the step cannot be captured" in history.notes[0]
    plain = MLP([20, 30, 4], device=gpu)
    gpuml.train(plain, X, y, batch_size=16, n_epochs=2, engine="eager")
    assert (plain.parameters.flat == model.parameters.flat).all()


def test_without_nvmath_the_next_engine_is_chosen_and_said(gpu, monkeypatch):
    monkeypatch.setattr("gpuml.steps.find_spec", lambda name: None)
    X, y = problem([64, 40], 640, True)
    history = gpuml.train(MLP([64, 32, 40], device=gpu), X, y, n_epochs=300)
    assert history.engine == "eager"
    assert "not graph, since nvmath-python is not installed" in history.notes[0]
    with pytest.raises(ValueError, match="pip install nvmath-python"):
        gpuml.train(MLP([64, 32, 40], device=gpu), X, y, engine="graph")


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 2e-3), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize(
    ("sizes", "batch_size"), [*SHAPES[:4], ([64, 256, 256, 100], 256)], ids=str
)
def test_lower_precision_trains_nearly_the_same(
    gpu, engine, sizes, batch_size, precision, tolerance
):
    if engine not in ["eager", *engines()]:
        pytest.skip("nvmath-python is not installed")
    exact, low = (
        trained(gpu, engine, sizes, batch_size, optimizer=GradientDescent(0.01), precision=p)
        for p in ("float32", precision)
    )
    agree(exact, low, tolerance)
    assert (exact[0] != low[0]).any(), "it was multiplied in another precision"
    assert low[0].dtype == np.float32


class OwnDescent(GradientDescent):
    """An optimizer that may do anything, for all that training knows."""


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, OwnDescent(0.05, momentum=0.9)], ids=repr)
@pytest.mark.parametrize(("sizes", "kept"), [([64, 128, 8], True), ([20, 33, 7], False)])
def test_weights_rounded_by_the_optimizer_are_those_rounded_before_each_step(
    gpu, engine, optimizer, sizes, kept, monkeypatch
):
    if engine not in ["eager", *engines()]:
        pytest.skip("nvmath-python is not installed")
    options = {"optimizer": optimizer, "precision": "bfloat16", "schedule": "cosine"}
    asked, keep = [], Parameters.keep_rounded
    monkeypatch.setattr(Parameters, "keep_rounded", lambda p: keep(p) or asked.append(p))
    found = trained(gpu, engine, sizes, 32, **options)
    whole = [p.rounded is not None for p in asked]
    assert whole[:1] == ([] if isinstance(optimizer, OwnDescent) else [kept])
    monkeypatch.setattr(Parameters, "keep_rounded", lambda p: None)
    expected = trained(gpu, engine, sizes, 32, **options)
    assert found[0].tobytes() == expected[0].tobytes()


def test_a_graph_is_captured_once_for_each_shape(gpu):
    if "graph" not in engines():
        pytest.skip("nvmath-python is not installed")
    X, y = problem([20, 4], 83, True)
    model = MLP([20, 30, 4], device=gpu)
    data = ArrayBatches(gpu.asarray(X), gpu.asarray(y), 16)
    step = GraphStep(model, softmax_cross_entropy, GradientDescent(0.05))
    for _ in range(3):
        for x, t in data.epoch(None):
            step(x, t)
    assert sorted(shape[0][0] for shape in step._graphs) == [3, 16]
    assert all(graph is not None for graph in step._graphs.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_losses_are_those_of_numpy(device, rng, dtype):
    for shape in ((1, 2), (7, 10), (300, 1000), (3, 5, 4), (2, 5000, 3)):
        logits = (10 * rng.normal(size=shape)).astype(dtype)
        labels = rng.integers(0, shape[-1], size=shape[:-1])
        targets = rng.normal(size=shape).astype(dtype)
        tolerance = 1e-5 if dtype == np.float32 else 1e-12
        for loss, t in ((softmax_cross_entropy, labels), (mean_squared_error, targets)):
            value, gradient = loss(logits, t)
            there = loss(device.asarray(logits), device.asarray(t))
            np.testing.assert_allclose(gpuml.to_host(there[0]), value, rtol=tolerance)
            np.testing.assert_allclose(
                gpuml.to_host(there[1]), gradient, rtol=tolerance, atol=tolerance / shape[-2]
            )


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 128), (300, 36), (5000, 1000)])
def test_a_gradient_goes_back_through_relu_and_is_summed_in_one_reading(gpu, rng, shape, dtype):
    number = np.float64 if dtype == "float64" else np.float32
    host = rng.normal(size=(2, *shape)).astype(number)
    wanted = host[0] * (host[1] > 0)
    for start in (0, 1):  # aligned or not
        d, outputs = (gpu.asarray(a) for a in host)
        if dtype == "bfloat16":
            d, outputs = (gpu_layers.to_bfloat16(a) for a in (d, outputs))
        whole = gpu.xp.full(shape[1] + 5, np.nan, number)
        sums, alone = whole[start : start + shape[1]][None], gpu.xp.empty((1, shape[1]), number)
        gpu_layers.back_with_sums(d, outputs, sums)
        gpu_layers.back_with_sums(d, None, alone)
        tolerance = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}[dtype]
        allowed = tolerance * abs(wanted).sum(axis=0) + 1e-30
        for found in (sums, alone):
            assert (abs(gpuml.to_host(found)[0] - wanted.sum(axis=0)) <= allowed).all()
        zeros = gpuml.to_host(d.view(np.uint16) if dtype == "bfloat16" else d) == 0
        assert (zeros == (wanted == 0)).all()
        assert bool(gpu.xp.isnan(whole[shape[1] + start :]).all()), "nothing is written beside"
