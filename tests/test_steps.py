"""The engines: the same step, run in different ways."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import gpuml
from gpuml import MLP, Adam, GradientDescent, Linear, steps
from gpuml.batches import ArrayBatches
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.steps import make_step, set_learning_rate

ENGINES = ["eager", "one_pass", "gram"]  # of linear models; those of others: test_engines.py
OPTIMIZERS = [
    GradientDescent(0.05),
    GradientDescent(0.02, momentum=0.9),
    Adam(0.02),
    Adam(0.02, weight_decay=0.1),
    GradientDescent(0.05, weight_decay=0.1),
]


def problem(rng, n=300, n_features=6, n_outputs=2):
    X = rng.normal(size=(n, n_features))
    Y = X @ rng.normal(size=(n_features, n_outputs)) + 1 + 0.1 * rng.normal(size=(n, n_outputs))
    return X, Y


def trained(device, X, Y, engine, *, bias=True, dtype=np.float64, **options):
    model = Linear(X.shape[1], Y.shape[1], bias=bias, dtype=dtype, device=device)
    history = gpuml.train(model, X, Y, engine=engine, **options)
    assert history.engine == engine
    return gpuml.to_host(model.parameters.flat), history


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_engines_train_the_same_weights_on_full_batches(device, rng, optimizer, bias, dtype):
    X, Y = problem(rng)
    options = {"optimizer": optimizer, "n_epochs": 50, "batch_size": None}
    found = [trained(device, X, Y, e, bias=bias, dtype=dtype, **options) for e in ENGINES]
    tolerance = 1e-4 if dtype == np.float32 else 1e-10
    for (a, first), (b, second) in itertools.combinations(found, 2):
        assert abs(a).max() > 0.1, "it has moved"
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(first["loss"], second["loss"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_two_engines_train_the_same_weights_on_batches(device, rng, optimizer):
    X, Y = problem(rng)
    options = {"optimizer": optimizer, "n_epochs": 1, "batch_size": 23, "seed": 4}
    (a, first), (b, second) = (
        trained(device, X, Y, engine, dtype=np.float32, **options)
        for engine in ("eager", "one_pass")
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("engine", "change", "reason"),
    [
        ("one_pass", {"model": MLP([6, 3, 2], device="cpu")}, "for Linear models"),
        ("one_pass", {"loss": softmax_cross_entropy}, "for the mean squared error"),
        ("gram", {"model": MLP([6, 3, 2], device="cpu")}, "for Linear models and the mean squared"),
        ("gram", {"loss": softmax_cross_entropy}, "for Linear models and the mean squared error"),
        ("gram", {"batch_size": 299}, "full batches: batch_size=None"),
        ("one-pass", {}, "did you mean 'one_pass'"),
        ("graph", {}, "graphs are for GPUs"),
        ("fused", {}, "its kernels are for GPUs"),
        ("gram", {"precision": "tf32"}, "multiplies in float32, and precision is tf32"),
    ],
)
def test_an_engine_that_cannot_hold_the_model_says_why(rng, engine, change, reason):
    X, Y = problem(rng)
    call = {"model": Linear(6, 2, device="cpu"), "loss": mean_squared_error, "batch_size": None}
    call |= change
    y = rng.integers(2, size=300) if call["loss"] is softmax_cross_entropy else Y
    before = call["model"].parameters.flat.copy()
    with pytest.raises(ValueError, match=reason):
        gpuml.train(call.pop("model"), X, y, engine=engine, **call)
    assert "model" in change or (before == 0).all()


def test_gram_is_chosen_only_by_name(device, rng):
    X, Y = problem(rng)
    model = Linear(6, 2, device=device)
    assert gpuml.train(model, X, Y, batch_size=None, n_epochs=1).engine != "gram"
    assert gpuml.train(model, X, Y, batch_size=300, n_epochs=1, engine="gram").engine == "gram"


@pytest.mark.parametrize("engine", ["eager", "one_pass"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_parts_of_a_batch_make_the_whole(device, rng, engine, optimizer):
    X, Y = (device.asarray(a) for a in problem(rng))
    data = ArrayBatches(X, Y, 300)
    models = [Linear(6, 2, dtype=np.float64, device=device) for _ in range(2)]
    whole, parts = (
        make_step(model, mean_squared_error, optimizer, data, engine) for model in models
    )
    for _ in range(5):  # several: what was added up must be forgotten
        expected = float(whole(X, Y))
        for rows in (slice(0, 1), slice(1, 1), slice(1, 200), slice(200, 300)):
            parts.part(X[rows], Y[rows], len(X[rows]) / 300)
        assert float(parts.finish()) == pytest.approx(expected, rel=1e-12)
    a, b = (gpuml.to_host(model.parameters.flat) for model in models)
    assert abs(a).max() > 0.01
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_a_schedule_changes_the_rate_that_the_step_reads(device, rng):
    X, Y = (device.asarray(a) for a in problem(rng))
    model = Linear(6, 2, dtype=np.float64, device=device)
    data = ArrayBatches(X, Y, 300)
    step = make_step(model, mean_squared_error, GradientDescent(0.05), data, None)
    base = step.state["learning_rate"].copy()
    set_learning_rate(step, base, 0.0)
    step(X, Y)
    assert not gpuml.to_host(model.parameters.flat).any()
    set_learning_rate(step, base, 0.5)
    assert float(step.state["learning_rate"]) == 0.025
    set_learning_rate(step, base, 1.0)
    assert float(step.state["learning_rate"]) == 0.05
    assert float(base) == 0.05


@pytest.mark.parametrize("engine", [None, "one_pass"])
def test_one_batch_is_looked_at_to_choose_an_engine(rng, engine):
    X, Y = problem(rng)
    looks = []

    class Counted(ArrayBatches):
        def epoch(self, generator):
            looks.append(generator)
            return super().epoch(generator)

    model = Linear(6, 2, dtype=np.float64, device="cpu")
    make_step(model, mean_squared_error, GradientDescent(0.05), Counted(X, Y, 300), engine)
    assert len(looks) == 1, "of streamed data each look begins to copy"


@pytest.mark.parametrize("before", [None, "eager", "one_pass", "fused", "gram", "unknown"])
def test_what_was_begun_by_an_engine_goes_on_with_it(rng, before):
    X, Y = problem(rng)
    model = Linear(6, 2, dtype=np.float64, device="cpu")
    data = ArrayBatches(X, Y, 300)
    trained = model, mean_squared_error, GradientDescent(0.05), data
    usual = make_step(*trained, None)
    step = make_step(*trained, None, before=before)
    assert step.engine == (before if before in ("eager", "one_pass") else usual.engine)
    slower = usual.engine == "one_pass" and before == "eager"
    assert step.reason == slower * "not one_pass, since the checkpoint was begun by eager"
    assert make_step(*trained, "gram", before=before).engine == "gram", "what is asked for counts"


def test_what_a_step_says_of_itself_is_kept(rng, monkeypatch):
    X, Y = problem(rng)
    found = SimpleNamespace(reason="not graph, since a library does not load")
    monkeypatch.setattr(steps, "_made", lambda *_: found)
    model = Linear(6, 2, dtype=np.float64, device="cpu")
    data = ArrayBatches(X, Y, 300)
    make_step(model, mean_squared_error, GradientDescent(0.05), data, None)
    assert found.reason == "not graph, since a library does not load"
