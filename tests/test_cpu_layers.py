"""The prepared calls of the CPU against the general way, and what they may not change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuml
from gpuml import MLP, GradientDescent, Linear, cpu_layers
from gpuml.cpu_layers import CpuGradient
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.steps import EagerStep

LOSSES = [mean_squared_error, softmax_cross_entropy]


def targets(rng, loss, n, n_outputs, dtype):
    if loss is softmax_cross_entropy:
        return rng.integers(n_outputs, size=n)
    return rng.normal(size=(n, n_outputs)).astype(dtype)


def both_ways(model, loss, x, y):
    """Return loss and gradient by prepared calls, and by forward, loss and backward."""
    gradients = model.parameters.zeros_like()
    gradients.flat[...] = np.nan  # all of it has to be written
    value = CpuGradient(model, loss, gradients)(x, y)
    predictions, backward = model.forward(model.parameters, x)
    expected, d = loss(predictions, y)
    return (value, gradients.flat), (expected, backward(d)[0].flat)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    n=st.integers(1, 40),
    loss=st.sampled_from(LOSSES),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_prepared_calls_give_the_gradient(sizes, n, loss, dtype, seed):
    rng = np.random.default_rng(seed)
    model = MLP(sizes, seed=seed, dtype=dtype, device="cpu")
    for _, bias in model.layers:
        model.parameters[bias] = rng.normal(size=model.parameters[bias].shape)
    x = rng.normal(size=(n, sizes[0])).astype(dtype)
    (value, gradient), (expected, d) = both_ways(
        model, loss, x, targets(rng, loss, n, sizes[-1], dtype)
    )
    assert value.dtype == dtype
    np.testing.assert_array_equal(gradient, d)
    np.testing.assert_allclose(value, expected, rtol=1e-5 if dtype == np.float32 else 1e-13)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_model_with_and_without_bias(rng, loss, bias):
    model = Linear(7, 3, bias=bias, dtype=np.float64, device="cpu")
    model.parameters.flat[...] = rng.normal(size=model.n_parameters)
    x = rng.normal(size=(11, 7))
    (value, gradient), (expected, d) = both_ways(model, loss, x, targets(rng, loss, 11, 3, float))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, d, rtol=1e-11, atol=1e-13)


def test_where_the_sum_before_relu_is_zero_the_slope_is_zero(rng):
    model = MLP([4, 5, 2], dtype=np.float64, device="cpu")
    x = np.zeros((3, 4))  # all sums are exactly zero
    (_, gradient), (_, d) = both_ways(model, softmax_cross_entropy, x, np.array([0, 1, 1]))
    np.testing.assert_allclose(gradient, d, atol=1e-15)
    assert not gradient[:25].any(), "nothing reaches the first layer"


def test_huge_logits_do_not_overflow():
    model = Linear(1, 2, bias=False, device="cpu")
    model.parameters["weight"] = np.array([[1e4, -1e4]])
    x = np.array([[1.0], [-1.0]], np.float32)
    (value, gradient), (expected, d) = both_ways(model, softmax_cross_entropy, x, np.array([1, 1]))
    assert value == expected == 1e4
    np.testing.assert_array_equal(gradient, d)


def test_rows_that_are_not_contiguous_and_integers_of_other_types(rng):
    model = MLP([6, 5, 3], dtype=np.float64, device="cpu")
    wide = rng.normal(size=(20, 13))
    labels = rng.integers(3, size=20)
    for x, y in [(wide[:, :12:2], labels.astype(np.uint8)), (wide.T[:6].T, labels[::-1])]:
        (value, gradient), (expected, d) = both_ways(model, softmax_cross_entropy, x, y)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_allclose(gradient, d, rtol=1e-11, atol=1e-13)


def test_values_of_earlier_steps_stay(rng):
    model = MLP([3, 4, 2], device="cpu")
    step = EagerStep(model, softmax_cross_entropy, GradientDescent(0.5))
    x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.integers(2, size=8)
    first = step(x, y)
    kept = float(first)
    assert float(step(x, y)) < kept
    assert float(first) == kept


def test_many_sizes_of_batches_keep_a_bounded_number_of_arrays(rng):
    model = MLP([3, 4, 2], device="cpu")
    gradient = CpuGradient(model, softmax_cross_entropy, model.parameters.zeros_like())
    for n in range(1, 3 * cpu_layers.MOST_SIZES):
        gradient(np.zeros((n, 3), np.float32), np.zeros(n, int))
        assert len(gradient._prepared) <= cpu_layers.MOST_SIZES


def test_who_prepares_calls():
    class Own(MLP):
        pass

    def own_loss(predictions, targets):
        return mean_squared_error(predictions, targets)

    model = MLP([2, 2], device="cpu")
    assert CpuGradient.limit(model, softmax_cross_entropy) is None
    assert "this package's losses" in CpuGradient.limit(model, own_loss)
    assert "this package's models" in CpuGradient.limit(
        Own([2, 2], device="cpu"), mean_squared_error
    )
    half = MLP([2, 2], dtype=np.float16, device="cpu")
    assert "float32" in CpuGradient.limit(half, mean_squared_error)


def test_large_batches_go_the_general_way(rng, monkeypatch):
    X, y = rng.normal(size=(64, 3)), rng.integers(2, size=64)
    losses = []
    for most in (2**18, 0):
        monkeypatch.setattr(cpu_layers, "MOST_NUMBERS", most)
        model = MLP([3, 4, 2], dtype=np.float64, device="cpu")
        history = gpuml.train(model, X, y, batch_size=10, n_epochs=2)
        losses.append(history["loss"])
        gradient = CpuGradient(model, softmax_cross_entropy, model.parameters)
        assert gradient.fits(X) == (most > 0)
    np.testing.assert_allclose(*losses, rtol=1e-12)
