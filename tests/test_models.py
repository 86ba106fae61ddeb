from __future__ import annotations

import numpy as np
import pytest

import gpuml
from gpuml import MLP, Linear, Parameters
from gpuml.losses import mean_squared_error, softmax_cross_entropy


def cases():
    return [
        (Linear(5, 3, dtype=np.float64, device="cpu"), mean_squared_error),
        (Linear(5, 3, bias=False, dtype=np.float64, device="cpu"), mean_squared_error),
        (MLP([5, 3], dtype=np.float64, device="cpu"), softmax_cross_entropy),
        (MLP([5, 8, 3], dtype=np.float64, device="cpu"), softmax_cross_entropy),
        (MLP([5, 8, 6, 3], dtype=np.float64, device="cpu"), mean_squared_error),
    ]


@pytest.mark.parametrize(("model", "loss"), cases())
def test_gradients_agree_with_finite_differences(device, rng, model, loss):
    model.parameters.flat[:] = rng.normal(size=model.n_parameters)
    model.to(device)
    x = rng.normal(size=(7, 5))
    y = rng.integers(3, size=7) if loss is softmax_cross_entropy else rng.normal(size=(7, 3))
    y = device.asarray(y)

    def value(flat, x):
        parameters = Parameters(device.asarray(flat), model.parameters.shapes)
        predictions, _ = model.forward(parameters, device.asarray(x))
        return float(loss(predictions, y)[0])

    predictions, backward = model.forward(model.parameters, device.asarray(x))
    _, d_predictions = loss(predictions, y)
    gradients, d_x = backward(d_predictions, input_gradient=True)

    flat, h = gpuml.to_host(model.parameters.flat).copy(), 1e-6
    for i in range(len(flat)):
        up, down = flat.copy(), flat.copy()
        up[i] += h
        down[i] -= h
        slope = (value(up, x) - value(down, x)) / (2 * h)
        assert abs(float(gradients.flat[i]) - slope) < 1e-7, i
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        slope = (value(flat, up) - value(flat, down)) / (2 * h)
        assert abs(float(d_x[i]) - slope) < 1e-7, i


def test_backward_writes_where_it_is_told_and_skips_the_input(device, rng):
    model = MLP([4, 6, 2], device=device)
    x = device.asarray(rng.normal(size=(3, 4)), np.float32)
    predictions, backward = model.forward(model.parameters, x)
    expected, _ = backward(predictions.copy())
    given = model.parameters.zeros_like()
    given.flat[...] = np.nan
    returned, d_x = backward(predictions.copy(), given)
    assert returned is given
    assert d_x is None
    np.testing.assert_array_equal(gpuml.to_host(given.flat), gpuml.to_host(expected.flat))


class Spoiling(Parameters):
    """Gradients that spoil the weights of layers written before, whenever more are written."""

    def __init__(self, weights):
        super().__init__(weights.zeros_like().flat, weights.shapes)
        self.weights, self.before = weights, ()

    def written(self, *names):
        for name in self.before:
            for weights in filter(None, [self.weights, self.weights.rounded]):
                weights[name][...] = np.nan
        self.before = names


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_perceptron_is_done_with_a_layer_when_it_writes_the_next(device, rng, precision):
    if precision and device.kind == "cpu":
        pytest.skip("bfloat16 is for GPUs")
    model = MLP([8, 16, 24, 8], device=device, seed=0)
    x = device.asarray(rng.normal(size=(6, 8)).astype(np.float32))
    y = device.asarray(rng.integers(8, size=6))
    if precision:
        model.parameters.keep_rounded()
    found = []
    for gradients in (model.parameters.zeros_like(), Spoiling(model.parameters)):
        predictions, backward = model.forward(model.parameters, x, precision=precision)
        backward(softmax_cross_entropy(predictions, y)[1], gradients)
        found.append(gpuml.to_host(gradients.flat))
    np.testing.assert_array_equal(*found)
    assert np.isnan(gpuml.to_host(model.parameters[list(model.parameters)[-2]])).all()


def test_a_population_is_the_same_model_with_one_more_axis(device, rng):
    model = MLP([4, 6, 2], device=device, dtype=np.float64)
    flat = device.asarray(rng.normal(size=(3, model.n_parameters)))
    population = Parameters(flat, model.parameters.shapes)
    assert population["layers.0.weight"].shape == (3, 4, 6)
    x = device.asarray(rng.normal(size=(5, 4)))
    y = device.asarray(rng.integers(2, size=5))
    predictions, backward = model.forward(population, x)
    gradients, _ = backward(softmax_cross_entropy(predictions, y)[1])
    for i in range(3):
        alone, back = model.forward(Parameters(flat[i].copy(), model.parameters.shapes), x)
        expected, _ = back(softmax_cross_entropy(alone, y)[1])
        np.testing.assert_allclose(gpuml.to_host(predictions[i]), gpuml.to_host(alone), rtol=1e-12)
        np.testing.assert_allclose(
            gpuml.to_host(gradients.flat[i]), gpuml.to_host(expected.flat), rtol=1e-10, atol=1e-14
        )


def test_parameters_are_views_of_one_vector(device):
    parameters = Parameters(device.xp.zeros(8), {"weight": (2, 3), "bias": (1, 2)})
    parameters["weight"] = device.asarray(np.arange(6.0).reshape(2, 3))
    parameters.flat[6:] = 9
    np.testing.assert_array_equal(gpuml.to_host(parameters.flat), [0, 1, 2, 3, 4, 5, 9, 9])
    np.testing.assert_array_equal(gpuml.to_host(parameters["bias"]), [[9, 9]])
    assert list(parameters) == ["weight", "bias"]
    assert len(parameters) == 2
    with pytest.raises(ValueError, match="need 8 numbers, the vector has 7"):
        Parameters(device.xp.zeros(7), parameters.shapes)
    with pytest.raises(ValueError, match="broadcast"):
        parameters["bias"] = device.xp.zeros((3, 3))


def test_start_weights_have_the_stated_spread_and_do_not_depend_on_the_device(device):
    model = MLP([400, 300, 200], seed=3, device=device)
    hidden = gpuml.to_host(model.parameters["layers.0.weight"])
    last = gpuml.to_host(model.parameters["layers.1.weight"])
    assert abs(hidden.var() / (2 / 400) - 1) < 0.02
    assert abs(last.var() / (1 / 300) - 1) < 0.02
    assert not gpuml.to_host(model.parameters["layers.0.bias"]).any()
    np.testing.assert_array_equal(
        gpuml.to_host(model.parameters.flat),
        MLP([400, 300, 200], seed=3, device="cpu").parameters.flat,
    )
    assert (
        hidden != MLP([400, 300, 200], seed=4, device="cpu").parameters["layers.0.weight"]
    ).any()


def test_wrong_inputs_are_named(device):
    model = MLP([4, 6, 2], device=device)
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(batch, 4\)"):
        model(device.xp.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"\(batch, 4\)"):
        model(device.xp.zeros(4, np.float32))
    for sizes in ([4], [4, 0], [4, -1, 2], [4, 2.5]):
        with pytest.raises(ValueError, match="positive integers"):
            MLP(sizes, device=device)
    with pytest.raises(ValueError, match="positive integers"):
        Linear(0, 3, device=device)


def test_a_model_moves_between_devices(device):
    model = MLP([4, 6, 2], device="cpu")
    before = model.parameters.flat.copy()
    assert model.to(device) is model
    assert model.device == device
    np.testing.assert_array_equal(gpuml.to_host(model.parameters.flat), before)
    assert repr(model) == "MLP 4-6-2 (44 parameters, float32)"


def test_both_devices_predict_the_same(device, rng):
    x = rng.normal(size=(50, 64)).astype(np.float32)
    model = MLP([64, 128, 10], device="cpu")
    expected = model(x)
    there = model.to(device)(device.asarray(x))
    np.testing.assert_allclose(gpuml.to_host(there), expected, rtol=1e-4, atol=1e-5)


class Shifted(gpuml.Model):
    """A model of one's own: x + shift."""

    def __init__(self, device):
        flat = device.xp.zeros(3)
        super().__init__(Parameters(flat, {"shift": (1, 3)}), [])

    def forward(self, parameters, x):
        def backward(d_predictions, gradients=None, *, input_gradient=False):
            gradients = gradients or parameters.zeros_like()
            gradients["shift"] = d_predictions.sum(axis=0, keepdims=True)
            return gradients, d_predictions

        return x + parameters["shift"], backward


def test_a_model_of_ones_own_trains_but_is_not_saved(device, rng, tmp_path):
    X = rng.normal(size=(50, 3))
    model = Shifted(device)
    gpuml.train(model, X, X + np.arange(1, 4), optimizer=gpuml.GradientDescent(1.0), n_epochs=30)
    np.testing.assert_allclose(gpuml.to_host(model.parameters["shift"]), [[1, 2, 3]], rtol=1e-3)
    assert repr(model) == "Shifted (3 parameters, float64)"
    with pytest.raises(TypeError, match="Shifted is not one of Linear, MLP"):
        model.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_sizes_may_be_whole_numbers_of_any_type(device, tmp_path):
    model = MLP([3, np.int64(4), 2.0], device=device)
    model.save(tmp_path / "x.safetensors")
    assert gpuml.load_model(tmp_path / "x.safetensors").sizes == (3, 4, 2)
    with pytest.raises(TypeError, match="floating-point type, got int32"):
        MLP([3, 2], dtype=np.int32)


def test_a_new_last_layer_keeps_the_hidden_ones(device, rng):
    model = gpuml.MLP([6, 5, 4, 3], seed=1, device=device)
    other = model.with_outputs(2, seed=7)
    assert other.sizes == (6, 5, 4, 2)
    assert other.device == device
    for name in ("layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"):
        assert bool((other.parameters[name] == model.parameters[name]).all())
    before = gpuml.to_host(model.parameters.flat).copy()
    other.parameters.flat[...] = 0  # a copy: the first model stays as it is
    np.testing.assert_array_equal(gpuml.to_host(model.parameters.flat), before)
    fresh = gpuml.MLP([6, 5, 4, 2], seed=7, device=device)
    again = model.with_outputs(2, seed=7)
    last = again.parameters["layers.2.weight"] == fresh.parameters["layers.2.weight"]
    assert bool(last.all())
