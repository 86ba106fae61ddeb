from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss

import gpuml
from gpuml.losses import get_loss, mean_squared_error, softmax_cross_entropy


def numerical_gradient(f, x, h=1e-6):
    """Central differences of a scalar function of a float64 array, entry by entry."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        gradient[i] = (f(up) - f(down)) / (2 * h)
    return gradient


def test_mean_squared_error_is_the_mean_over_samples_and_outputs(device, rng):
    p, t = rng.normal(size=(7, 3)), rng.normal(size=(7, 3))
    value, gradient = mean_squared_error(device.asarray(p), device.asarray(t))
    assert gpuml.device_of(value, gradient) == device, "the value stays on the device"
    np.testing.assert_allclose(gpuml.to_host(value), np.mean((p - t) ** 2))
    expected = numerical_gradient(lambda p: np.mean((p - t) ** 2), p)
    np.testing.assert_allclose(gpuml.to_host(gradient), expected, atol=1e-8)


def test_cross_entropy_agrees_with_scikit_learn_and_differences(device, rng):
    logits, labels = rng.normal(size=(6, 4)) * 3, np.array([0, 3, 1, 1, 2, 0])

    def reference(z):
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return log_loss(labels, e / e.sum(axis=1, keepdims=True), labels=range(4))

    value, gradient = softmax_cross_entropy(device.asarray(logits), device.asarray(labels))
    np.testing.assert_allclose(gpuml.to_host(value), reference(logits), rtol=1e-12)
    expected = numerical_gradient(reference, logits)
    np.testing.assert_allclose(gpuml.to_host(gradient), expected, atol=1e-8)


def test_cross_entropy_keeps_its_arguments(device, rng):
    logits, labels = device.asarray(rng.normal(size=(5, 3))), device.asarray(np.arange(5) % 3)
    before = gpuml.to_host(logits).copy()
    softmax_cross_entropy(logits, labels)
    np.testing.assert_array_equal(gpuml.to_host(logits), before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_survives_huge_logits(device, dtype):
    logits = device.asarray([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype)
    value, gradient = softmax_cross_entropy(logits, device.asarray([0, 0]))
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(gpuml.to_host(value), 1e4, rtol=1e-6)
    np.testing.assert_allclose(gpuml.to_host(gradient), [[0, 0, 0], [-0.5, 0.5, 0]], atol=1e-12)


@pytest.mark.parametrize("one_label_each", [True, False])
def test_leading_axes_are_models_of_their_own(device, rng, one_label_each):
    logits, targets = rng.normal(size=(3, 5, 4)), rng.normal(size=(5, 4))
    labels = rng.integers(4, size=(3, 5) if one_label_each else 5)
    values, gradients = softmax_cross_entropy(device.asarray(logits), device.asarray(labels))
    squares, square_gradients = mean_squared_error(
        device.asarray(logits), device.asarray(np.broadcast_to(targets, (3, 5, 4)))
    )
    assert values.shape == squares.shape == (3,)
    for i in range(3):
        one = softmax_cross_entropy(logits[i], labels[i] if one_label_each else labels)
        two = mean_squared_error(logits[i], targets)
        np.testing.assert_allclose(gpuml.to_host(values[i]), one[0], rtol=1e-12)
        np.testing.assert_allclose(gpuml.to_host(gradients[i]), one[1], rtol=1e-12)
        np.testing.assert_allclose(gpuml.to_host(squares[i]), two[0], rtol=1e-12)
        np.testing.assert_allclose(gpuml.to_host(square_gradients[i]), two[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [
        ((9000, 3), (9000, 3)),  # so many that a GPU adds them up in parts
        ((2, 4099, 3), (4099, 3)),
        ((2, 3, 5, 4), (3, 5, 4)),
        ((3, 5, 4), (2, 1, 5, 4)),
        ((5, 4), (3, 5, 4)),
        ((1, 5, 4), (5, 4)),
        ((0, 5, 4), (5, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_targets_broadcast_against_predictions(device, rng, shape, target_shape, dtype):
    p, t = rng.normal(size=shape).astype(dtype), rng.normal(size=target_shape).astype(dtype)
    value, gradient = mean_squared_error(
        device.asarray(p.swapaxes(-1, -2)).swapaxes(-1, -2), device.asarray(t)
    )
    difference = p.astype(float) - t
    tolerance = 1e-6 if dtype == np.float32 else 1e-13
    expected = np.mean(difference**2, axis=(-2, -1))
    assert value.shape == expected.shape
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(gpuml.to_host(value), expected, rtol=tolerance)
    scale = 2 / (shape[-2] * shape[-1])
    np.testing.assert_allclose(
        gpuml.to_host(gradient), scale * difference, rtol=tolerance, atol=tolerance * scale
    )


def test_shapes_that_numpy_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 1\).*\(1, 5\).*y\[:, None\]"):
        mean_squared_error(np.zeros((5, 1)), np.zeros((1, 5)))
    with pytest.raises(ValueError, match="integers of shape"):
        softmax_cross_entropy(np.zeros((5, 3)), np.zeros(5))
    with pytest.raises(ValueError, match="integers of shape"):
        softmax_cross_entropy(np.zeros((5, 3)), np.zeros((5, 1), int))


def test_a_label_beyond_the_classes_is_not_counted_for_another_sample():
    with pytest.raises(IndexError):
        softmax_cross_entropy(np.zeros((5, 3)), np.array([0, 1, 2, 3, 0]))


def test_losses_have_names():
    assert get_loss("cross_entropy") is softmax_cross_entropy
    assert get_loss(mean_squared_error) is mean_squared_error
    with pytest.raises(ValueError, match="did you mean 'cross_entropy'"):
        get_loss("crossentropy")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint64])
def test_labels_may_be_integers_of_any_type(device, rng, dtype):
    logits, labels = rng.normal(size=(40_000, 10)), rng.integers(10, size=40_000)
    expected, d_expected = softmax_cross_entropy(logits, labels)
    value, gradient = softmax_cross_entropy(
        device.asarray(logits), device.asarray(labels.astype(dtype))
    )
    np.testing.assert_allclose(gpuml.to_host(value), expected, rtol=1e-12)
    np.testing.assert_allclose(gpuml.to_host(gradient), d_expected, atol=1e-16)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 1), (2, 3)])
def test_the_logits_stay_as_they_are(device, shape):
    logits = device.asarray(np.arange(np.prod(shape), dtype=float).reshape(shape) + 5)
    before = gpuml.to_host(logits).copy()
    softmax_cross_entropy(logits, device.asarray(np.zeros(shape[0], int)))
    np.testing.assert_array_equal(gpuml.to_host(logits), before)


def test_one_correct_row_has_accuracy_one(device):
    model = gpuml.Linear(2, 3, device=device)
    model.parameters["bias"] = device.asarray(np.array([[0.0, 9.0, 0.0]], np.float32))
    X, y = device.asarray(np.ones((1, 2), np.float32)), device.asarray(np.array([1]))
    assert gpuml.evaluate(model, X, y)["accuracy"] == 1.0
