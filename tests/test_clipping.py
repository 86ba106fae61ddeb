"""Gradients clipped by their norm, in training by each engine."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

import gpuml
from gpuml import MLP, Adam, GradientDescent, Linear, Parameters, to_host
from gpuml.buckets import Buckets
from gpuml.optimizers import clip_norm
from gpuml.steps import EagerStep, RankStep

ENGINES = ["eager", "one_pass", "gram"]


def problem(rng, n=90):
    X = rng.normal(size=(n, 5))
    return X, X @ rng.normal(size=(5, 2)) + 1


def gradient_of(weights, X, Y):
    """Of the mean squared error, for weights with the bias below them."""
    ones = np.column_stack([X, np.ones(len(X))])
    return 2 / Y.size * ones.T @ (ones @ weights - Y)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("longest", [0.05, 1, 1e6])
def test_training_clips_the_gradient_of_all_parameters(device, rng, engine, dtype, longest):
    X, Y = problem(rng)
    weights, velocity, n_clipped = np.zeros((6, 2)), np.zeros((6, 2)), 0
    for _ in range(20):
        g = gradient_of(weights, X, Y)
        length = math.sqrt((g**2).sum())
        n_clipped += length > longest
        velocity = 0.5 * velocity + g * min(1, longest / length)
        weights = weights - 0.2 * velocity
    assert n_clipped == {0.05: 20, 1e6: 0}.get(longest, n_clipped)
    assert longest != 1 or 0 < n_clipped < 20
    model = Linear(5, 2, dtype=dtype, device=device)
    options = {"optimizer": GradientDescent(0.2, momentum=0.5), "n_epochs": 20}
    options |= {"batch_size": None, "engine": engine, "clip_norm": longest}
    assert gpuml.train(model, X, Y, **options).engine == engine
    found = np.vstack([to_host(model.parameters[name]) for name in ("weight", "bias")])
    np.testing.assert_allclose(found, weights, rtol=0, atol=1e-4 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("n", [1, 4095, 4097, 3_000_001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_of_each_length(device, rng, n, dtype):
    g = rng.normal(size=n).astype(dtype)
    length = math.sqrt((g.astype(np.float64) ** 2).sum())
    for longest in (0.3 * length, 1.5 * length):
        gradients = Parameters(device.asarray(g.copy()), {"weight": (n,)})
        clip_norm(gradients, longest)
        expected = g * min(1, longest / length)
        np.testing.assert_allclose(to_host(gradients.flat), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("g", "expected"),
    [
        ([0.0, 0.0], [0, 0]),
        ([3e30, -4e30], [0.6, -0.8]),  # whose squares are infinite in float32
        ([3e-30, 4e-30], [3e-30, 4e-30]),
        ([math.inf, 1.0], [math.nan, 0]),
        ([math.nan, 1.0], [math.nan, math.nan]),
    ],
)
def test_vectors_at_the_limits_of_numbers(device, g, expected):
    gradients = Parameters(device.asarray(np.array(g, np.float32)), {"weight": (2,)})
    with np.errstate(all="ignore"):
        clip_norm(gradients, 1.0)
    np.testing.assert_allclose(to_host(gradients.flat), expected, rtol=1e-6)


def test_parts_of_a_streamed_batch_are_clipped_together(device, rng, tmp_path):
    X, Y = problem(rng)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    models = [Linear(5, 2, dtype=np.float64, device=device) for _ in range(2)]
    options = {"batch_size": None, "n_epochs": 5, "clip_norm": 0.1}
    gpuml.train(models[0], X, Y, engine="eager", **options)
    gpuml.train(models[1], mapped, Y, engine="eager", memory_limit=2000, **options)
    a, b = (to_host(model.parameters.flat) for model in models)
    np.testing.assert_allclose(a, b, rtol=1e-10)


class Odd:
    """An optimizer of one's own."""

    def __repr__(self):
        return "Odd()"

    def init(self, parameters):
        zeros = parameters.zeros_like().flat
        return {"learning_rate": zeros[:1] + 0.1, "last": zeros}

    def update(self, parameters, gradients, state):
        state["last"][...] = gradients.flat
        parameters.flat[...] -= state["learning_rate"] * gradients.flat


@pytest.mark.parametrize("optimizer", [GradientDescent(1.0), Adam(0.01), Odd()], ids=repr)
@pytest.mark.parametrize("bucket_bytes", [1, 10**6])
def test_a_step_by_buckets_clips_all_of_them(device, rng, monkeypatch, optimizer, bucket_bytes):
    monkeypatch.setattr(Buckets.__init__, "__defaults__", (bucket_bytes,))
    X, y = device.asarray(rng.normal(size=(40, 5))), device.asarray(rng.integers(3, size=40))
    alone = SimpleNamespace(rank=0, world_size=1, n_threads=1, all_reduce=lambda *_, **__: None)
    found = []
    for kind in (RankStep, EagerStep):
        model = MLP([5, 17, 6, 3], dtype=np.float64, device=device)
        start = to_host(model.parameters.flat).copy()
        options = {"communicator": alone} if kind is RankStep else {}
        loss = gpuml.losses.softmax_cross_entropy
        step = kind(model, loss, optimizer, clip_norm=0.01, **options)
        for _ in range(3):
            step(X, y)
        found.append(to_host(model.parameters.flat))
        if isinstance(optimizer, GradientDescent):
            assert np.linalg.norm(found[-1] - start) == pytest.approx(0.03, rel=0.01)
    np.testing.assert_allclose(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", [GradientDescent(0.01), Adam(0.01), Odd()])
@pytest.mark.parametrize("kind", ["one_pass", "eager", "streamed"])
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_clip_what_all_of_them_have_added(rng, tmp_path, kind, optimizer, n_ranks):
    """Rows of ranks differ much: were each to clip its own, the sum would point elsewhere."""
    X, Y = problem(rng, 100)
    X[:40] *= 20
    options = {"batch_size": 31, "n_epochs": 3, "clip_norm": 0.3, "shuffle": False}
    if kind == "streamed":
        np.save(tmp_path / "X.npy", X)
        X = np.load(tmp_path / "X.npy", mmap_mode="r")
        options |= {"batch_size": None, "n_epochs": 12, "memory_limit": 2000}

    options |= {"optimizer": optimizer, "engine": "one_pass" if kind == "one_pass" else "eager"}

    def work(communicator, **more):
        model = Linear(5, 2, dtype=np.float64, device="cpu")
        told = options | more
        history = gpuml.train(model, X, Y, communicator=communicator, **told)
        assert history.engine == told["engine"]
        return model.parameters.flat.copy(), np.array(history["loss"])

    weights, losses = work(gpuml.distributed.Alone())
    plain, _ = work(gpuml.distributed.Alone(), clip_norm=None)
    assert not np.allclose(plain, weights, rtol=1e-3), "clipping matters here"
    several = gpuml.distributed.simulate(n_ranks, work)
    for found, said in several:
        np.testing.assert_array_equal(found, several[0][0])
        np.testing.assert_allclose(found, weights, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(said, losses, rtol=1e-9)


def test_ranks_that_clip_at_different_lengths_are_refused(rng):
    X, Y = problem(rng)

    def work(communicator):
        length = 1.0 + communicator.rank
        model = Linear(5, 2, device="cpu")
        with pytest.raises(gpuml.distributed.DistributedError, match="clip_norm"):
            gpuml.train(model, X, Y, clip_norm=length, communicator=communicator)

    gpuml.distributed.simulate(2, work)


def test_perceptrons_by_each_engine_that_a_gpu_has(device, rng):
    X, y = rng.normal(size=(100, 5)), rng.integers(3, size=100)
    found = []
    for engine in ("eager", None):  # with so many steps the graph, where there is one
        model = MLP([5, 8, 3], dtype=np.float64, device=device)
        options = {"n_epochs": 250, "batch_size": 8, "clip_norm": 0.1, "engine": engine}
        history = gpuml.train(model, X, y, optimizer=Adam(0.001), **options)
        assert history.engine != "fused"
        found.append(to_host(model.parameters.flat))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-7)


def test_clipping_keeps_an_odd_batch_from_undoing_the_rest(device, rng):
    X, Y = problem(rng)
    X[7] *= 1e4
    losses = []
    for longest in (1.0, None):
        model = Linear(5, 2, dtype=np.float64, device=device)
        options = {"optimizer": GradientDescent(0.01), "n_epochs": 3, "batch_size": 1}
        try:
            losses.append(gpuml.train(model, X, Y, clip_norm=longest, **options)["loss"][-1])
        except gpuml.DivergenceError:
            losses.append(math.inf)
    assert math.isfinite(losses[0])
    assert losses[1] > 1e20 * losses[0]


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True])
def test_what_is_no_length_is_refused(rng, value):
    X, Y = problem(rng)
    with pytest.raises(ValueError, match="clip_norm must be a positive number"):
        gpuml.train(Linear(5, 2, device="cpu"), X, Y, clip_norm=value)


def test_the_kernels_that_do_not_clip_are_refused(device, rng):
    X, y = rng.normal(size=(100, 5)), rng.integers(3, size=100)
    with pytest.raises(ValueError, match="engine='fused' cannot train this: its kernels do not"):
        gpuml.train(MLP([5, 8, 3], device=device), X, y, clip_norm=1, engine="fused")


def test_a_checkpoint_knows_the_length(device, rng, tmp_path):
    X, Y = problem(rng)
    options = {"n_epochs": 1, "checkpoint": tmp_path / "run.safetensors"}
    gpuml.train(Linear(5, 2, device=device), X, Y, clip_norm=1, **options)
    for other in (None, 2.0):
        with pytest.raises(gpuml.CheckpointError, match="clip_norm"):
            gpuml.train(Linear(5, 2, device=device), X, Y, clip_norm=other, **options)
    gpuml.train(Linear(5, 2, device=device), X, Y, clip_norm=1.0, **options)
