from __future__ import annotations

import numpy as np
import pytest

import gpuml
from gpuml import Adam, GradientDescent, Parameters
from gpuml.optimizers import get_optimizer

SHAPES = {"weight": (2, 3), "bias": (1, 3)}


def textbook_descent(w, gradients, rate, momentum):
    v = np.zeros_like(w)
    for g in gradients:
        v = momentum * v + g
        w = w - rate * v
    return w


def textbook_adam(w, gradients, rate, beta1, beta2, epsilon):
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = w - rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
    return w


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("optimizer", "textbook"),
    [
        (GradientDescent(0.1), lambda w, g: textbook_descent(w, g, 0.1, 0.0)),
        (GradientDescent(0.1, momentum=0.9), lambda w, g: textbook_descent(w, g, 0.1, 0.9)),
        (Adam(), lambda w, g: textbook_adam(w, g, 0.001, 0.9, 0.999, 1e-8)),
        (
            Adam(0.05, beta1=0.5, beta2=0.8, epsilon=0.1),
            lambda w, g: textbook_adam(w, g, 0.05, 0.5, 0.8, 0.1),
        ),
    ],
)
def test_updates_follow_the_textbook(device, rng, dtype, optimizer, textbook):
    start, steps = (
        rng.normal(size=9),
        rng.normal(size=(20, 9)) * 10.0 ** rng.integers(-3, 3, (20, 1)),
    )
    parameters = Parameters(device.asarray(start.copy(), dtype), SHAPES)
    state = optimizer.init(parameters)
    for step in steps:
        gradients = Parameters(device.asarray(step, dtype), SHAPES)
        optimizer.update(parameters, gradients, state)
        np.testing.assert_array_equal(gpuml.to_host(gradients.flat), step.astype(dtype))
    tolerance = 1e-12 if dtype is np.float64 else 1e-4
    np.testing.assert_allclose(
        gpuml.to_host(parameters.flat), textbook(start, steps), rtol=tolerance, atol=tolerance
    )
    assert all(array.dtype == dtype for array in state.values())
    assert all(gpuml.device_of(array) == device for array in state.values())


def test_the_first_step_of_adam_has_the_size_of_the_rate(device):
    parameters = Parameters(device.xp.zeros(9), SHAPES)
    gradients = Parameters(device.asarray(10.0 ** np.arange(-4, 5)), SHAPES)
    Adam(0.01).update(parameters, gradients, Adam(0.01).init(parameters))
    np.testing.assert_allclose(gpuml.to_host(parameters.flat), -0.01, rtol=1e-3)


@pytest.mark.parametrize("optimizer", [GradientDescent(0.1, momentum=0.9), Adam(0.1)])
def test_rates_can_differ_along_leading_axes_and_change_between_steps(device, rng, optimizer):
    start, step = rng.normal(size=(3, 9)), rng.normal(size=(3, 9))
    parameters = Parameters(device.asarray(start.copy()), SHAPES)
    state = optimizer.init(parameters)
    state["learning_rate"][...] = device.asarray([[0.1], [0.2], [0.0]])
    for _ in range(2):
        optimizer.update(parameters, Parameters(device.asarray(step), SHAPES), state)
    moved = gpuml.to_host(parameters.flat) - start
    alone = Parameters(device.asarray(start[1].copy()), SHAPES)
    other = optimizer.init(alone)
    other["learning_rate"][...] = 0.2
    for _ in range(2):
        optimizer.update(alone, Parameters(device.asarray(step[1]), SHAPES), other)
    np.testing.assert_allclose(start[1] + moved[1], gpuml.to_host(alone.flat), rtol=1e-12)
    assert not moved[2].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientDescent(0),
        lambda: GradientDescent(-1),
        lambda: GradientDescent(float("nan")),
        lambda: GradientDescent(float("inf")),
        lambda: GradientDescent(0.1, momentum=1),
        lambda: GradientDescent(0.1, momentum=-0.1),
        lambda: Adam(0),
        lambda: Adam(beta1=1),
        lambda: Adam(beta2=-0.5),
        lambda: Adam(epsilon=0),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must be .*, got"):
        make()


def test_optimizers_have_names():
    assert isinstance(get_optimizer("adam"), Adam)
    with pytest.raises(ValueError, match="did you mean 'gradient_descent'"):
        get_optimizer("gradient-descent")
