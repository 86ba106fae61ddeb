from __future__ import annotations

import math
import re
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import gpuml
from gpuml import (
    DataError,
    GradientDescent,
    Gram,
    Linear,
    Parameters,
    largest_stable_learning_rate,
    least_squares,
    regression,
)
from gpuml.losses import mean_squared_error
from gpuml.memory_maps import drop_pages, mapped_file
from gpuml.regression import spectrum


def problem(rng, n=120, d=5, m=2, noise=0.3):
    X = rng.normal(size=(n, d)) + rng.normal(size=d)
    return X, X @ rng.normal(size=(d, m)) + rng.normal(size=m) + noise * rng.normal(size=(n, m))


def mapped(path, array, order="C"):
    out = np.lib.format.open_memmap(
        path, "w+", dtype=array.dtype, shape=array.shape, fortran_order=order == "F"
    )
    out[...] = array
    out.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def resident_kib(array):
    """KiB of an array's map that are in this process's memory, as Linux counts them."""
    address = np.frombuffer(mapped_file(array).map, np.uint8).ctypes.data
    text = Path("/proc/self/smaps").read_text()
    return int(re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", text, re.M | re.S)[1])


def host(model):
    return {name: gpuml.to_host(array) for name, array in model.parameters.items()}


def small_blocks(monkeypatch, n_bytes=1000):
    monkeypatch.setattr(regression, "BLOCK_BYTES", {"cpu": n_bytes, "gpu": n_bytes})


# The exact answer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(120, 5, 2), (7, 6, 1), (1, 1, 1), (2, 1, 3), (500, 40, 3)])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_the_answer_is_that_of_scikit_learn(device, rng, monkeypatch, bias, shape, blocks):
    if blocks == "many":
        small_blocks(monkeypatch)
    X, Y = problem(rng, *shape)
    model = least_squares(device.asarray(X), device.asarray(Y), bias=bias)
    exact = LinearRegression(fit_intercept=bias).fit(X, Y)
    assert (type(model), model.device, model.dtype) == (Linear, device, np.float64)
    assert list(model.parameters) == (["weight", "bias"] if bias else ["weight"])
    found = host(model)
    np.testing.assert_allclose(found["weight"], exact.coef_.T, rtol=1e-9, atol=1e-10)
    if bias:
        np.testing.assert_allclose(found["bias"][0], exact.intercept_, rtol=1e-9, atol=1e-10)


def test_training_comes_to_the_same(device, rng):
    X, Y = (device.asarray(a) for a in problem(rng))
    exact = least_squares(X, Y)
    model = Linear(5, 2, dtype=np.float64, device=device)
    rate = largest_stable_learning_rate(X, n_outputs=2)
    gpuml.train(model, X, Y, optimizer=GradientDescent(0.9 * rate), n_epochs=3000, batch_size=None)
    np.testing.assert_allclose(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(exact.parameters.flat), rtol=1e-6
    )
    trained, least = (gpuml.evaluate(m, X, Y)["loss"] for m in (model, exact))
    assert least <= trained * (1 + 1e-12)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.uint8, np.float64),
    ],
)
def test_the_type_is_that_of_the_features_and_the_work_is_done_in_float64(
    device, rng, given, dtype
):
    X = (rng.random((300, 4)) * 99 + 100).astype(given)
    Y = X.astype(float) @ np.array([[1.0], [-2.0], [3.0], [0.5]]) + 7
    model = least_squares(device.asarray(X), device.asarray(Y))
    assert model.dtype == dtype
    found = host(model)
    np.testing.assert_allclose(found["weight"][:, 0], [1, -2, 3, 0.5], rtol=2e-7)
    np.testing.assert_allclose(found["bias"], [[7]], rtol=2e-7)


def test_a_vector_of_targets_is_one_output(device, rng):
    X, Y = problem(rng, m=1)
    a = least_squares(device.asarray(X), device.asarray(Y[:, 0]))
    b = least_squares(device.asarray(X), device.asarray(Y))
    assert a.sizes == (5, 1)
    np.testing.assert_array_equal(*(gpuml.to_host(m.parameters.flat) for m in (a, b)))


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", ["twice", "constant", "sum", "zero", "few samples", "all at once"])
def test_of_many_answers_it_is_the_shortest(device, rng, monkeypatch, blocks, bias, case):
    if blocks == "many":
        small_blocks(monkeypatch)
    X, Y = problem(rng, n=200, d=6)
    if case in ("twice", "all at once"):
        X[:, 4] = X[:, 1]
    if case in ("constant", "all at once"):
        X[:, 2] = 0.1
    if case == "sum":
        X[:, 3] = X[:, 0] - 2 * X[:, 5]
    if case in ("zero", "all at once"):
        X[:, 0] = 0
    if case == "few samples":
        X, Y = X[:4], Y[:4]
    found = host(least_squares(device.asarray(X), device.asarray(Y), bias=bias))
    x, y = (X - X.mean(0), Y - Y.mean(0)) if bias else (X, Y)
    expected = np.linalg.pinv(x, rcond=1e-10) @ y
    np.testing.assert_allclose(found["weight"], expected, rtol=1e-8, atol=1e-10)
    if bias:
        np.testing.assert_allclose(
            found["bias"][0], Y.mean(0) - X.mean(0) @ expected, rtol=1e-8, atol=1e-9
        )


@pytest.mark.parametrize("n", [2, 3, 5, 30, 3000])
def test_equal_features_share_their_weight_however_many_samples(device, n):
    """Where rounding hides that they are equal, weights would be huge."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, 1)) * 10 ** rng.uniform(-6, 6)
        X, Y = np.hstack([x, x, 3 * x]), rng.normal(size=(n, 1))
        for bias in (True, False):
            weight = host(least_squares(device.asarray(X), device.asarray(Y), bias=bias))["weight"]
            assert weight[0, 0] == pytest.approx(weight[1, 0], rel=1e-6)
            assert weight[2, 0] == pytest.approx(3 * weight[0, 0], rel=1e-6)


def test_features_in_very_different_units_are_not_taken_for_dependent(device, rng):
    units = 10.0 ** np.array([-12, 9, 0, -3, 6])
    X, true = rng.normal(size=(80, 5)), np.arange(1.0, 6)[:, None]
    Y = X @ true + 2
    for bias in (True, False):
        model = least_squares(
            device.asarray(X * units), device.asarray(Y - 2 * (not bias)), bias=bias
        )
        np.testing.assert_allclose(host(model)["weight"] * units[:, None], true, rtol=1e-9)


def test_means_do_not_drown_what_varies(device, rng):
    """Whole numbers, so that Y is exactly 3 u - v + 5."""
    u, v = rng.integers(-9, 9, size=(2, 400)).astype(float)
    X = np.stack([u + 1e9, v - 1e8], axis=1)
    Y = (3 * u - v + 5)[:, None]
    model = least_squares(device.asarray(X), device.asarray(Y))
    np.testing.assert_allclose(host(model)["weight"], [[3], [-1]], rtol=1e-12)


def laeuchli(small):
    """A matrix whose XᵀX is singular in floating point, though X is far from it."""
    return np.array([[1.0, 1.0], [small, 0.0], [0.0, small]])


def test_the_condition_number_is_not_squared(device):
    X = laeuchli(1e-9)
    Y = X @ np.array([[1.0], [2.0]])
    model = least_squares(device.asarray(X), device.asarray(Y), bias=False)
    np.testing.assert_allclose(host(model)["weight"], [[1], [2]], rtol=1e-6)
    gram = Gram.of(device.asarray(X), device.asarray(Y), bias=False)
    assert gram.condition() > 1e15


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_maps_are_read_by_the_block(device, rng, tmp_path, monkeypatch, order):
    X, Y = problem(rng, n=40_000, d=50, m=1)
    expected = LinearRegression().fit(X, Y)
    X, Y = mapped(tmp_path / "X.npy", X, order), mapped(tmp_path / "Y.npy", Y, order)
    small_blocks(monkeypatch, 2**18)
    least_squares(X[:5], Y[:5])
    drop_pages(X)
    tracemalloc.start()
    model = least_squares(X, Y)
    rate = largest_stable_learning_rate(X)
    gram = Gram.of(X, Y, device=device)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < X.nbytes / 4
    if Path("/proc/self/smaps").exists():
        assert resident_kib(X) < X.nbytes / 1024 / 4
    np.testing.assert_allclose(host(model)["weight"], expected.coef_.T, rtol=1e-9)
    assert rate == pytest.approx(largest_stable_learning_rate(np.array(X)), rel=1e-9)
    assert gpuml.device_of(gram.xx) == device
    np.testing.assert_allclose(gpuml.to_host(gram.xx)[:50, :50], X.T @ X, rtol=1e-11)


def test_the_inputs_stay_as_they_are(device, rng):
    X, Y = problem(rng)
    x, y = device.asarray(X.copy()), device.asarray(Y.copy())
    least_squares(x, y)
    Gram.of(x, y, bias=False)
    largest_stable_learning_rate(x)
    spectrum(x, bias=False)
    np.testing.assert_array_equal(gpuml.to_host(x), X)
    np.testing.assert_array_equal(gpuml.to_host(y), Y)


FUNCTIONS = {
    "least_squares": lambda X, Y: least_squares(X, Y),
    "Gram": lambda X, Y: Gram.of(X, Y),
    "rate": lambda X, Y: largest_stable_learning_rate(X),
    "spectrum": lambda X, Y: spectrum(X),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found(device, rng, monkeypatch, function, value):
    small_blocks(monkeypatch)
    X, Y = problem(rng)
    X[77, 3] = value
    with pytest.raises(DataError, match=f"X has {value} in row 77, column 3"):
        function(device.asarray(X), device.asarray(Y))
    X[77, 3], X[50] = 1e200, 1
    if function not in (FUNCTIONS["least_squares"], FUNCTIONS["spectrum"]):
        with pytest.raises(DataError, match="squares are infinite"):
            function(device.asarray(X), device.asarray(Y))


def test_a_target_that_is_not_finite_is_found(device, rng):
    X, Y = (device.asarray(a) for a in problem(rng))
    Y[5, 1] = np.nan
    for function in (least_squares, Gram.of):
        with pytest.raises(DataError, match="Y has nan in row 5, column 1"):
            function(X, Y)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_wrong_shapes_and_types_are_named(device, rng, function):
    X, Y = (device.asarray(a) for a in problem(rng))
    xp = device.xp
    for wrong in (X[0], X[:0], X[:, :0], X[None]):
        with pytest.raises(ValueError, match=r"X has shape \("):
            function(wrong, Y)
    with pytest.raises(TypeError, match="X must hold real numbers, got complex128"):
        function(X.astype(complex), Y)
    with pytest.raises(TypeError, match="expected an array of NumPy or CuPy, got list"):
        function([[1.0]], Y)
    if function in (FUNCTIONS["least_squares"], FUNCTIONS["Gram"]):
        with pytest.raises(ValueError, match="X has 120 rows, Y has 119"):
            function(X, Y[1:])
        with pytest.raises(ValueError, match=r"Y has shape \(120, 1, 1\)"):
            function(X, xp.zeros((120, 1, 1)))
        if device.kind == "gpu":
            with pytest.raises(TypeError, match="different devices"):
                function(X, gpuml.to_host(Y))


# The largest stable rate


def by_hand(X, n_outputs=1, bias=True):
    """The eigenvalues of the loss's second derivative, the largest first."""
    X = np.asarray(X, float)
    Z = np.hstack([X, np.ones((len(X), 1))]) if bias else X
    return np.linalg.eigvalsh(2 * Z.T @ Z / (len(X) * n_outputs))[::-1]


RATE_CASES = [
    (120, 5, np.float64),
    (50, 300, np.float64),
    (300, 200, np.float32),
    (40, 3, np.float16),
    (40, 7, np.uint8),
    (1, 1, np.float64),
]


@pytest.mark.parametrize(("n", "d", "dtype"), RATE_CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["gram", "products"])
def test_the_rate_is_that_of_the_largest_eigenvalue(
    device, rng, monkeypatch, n, d, dtype, bias, way
):
    small_blocks(monkeypatch, 4000)
    if way == "products":
        monkeypatch.setattr(regression, "GRAM_FEATURES", 0)
        monkeypatch.setattr(regression, "_sums", None)
    X = (rng.normal(size=(n, d)) + 2 * rng.random()).astype(dtype)
    for n_outputs, momentum in ((1, 0), (3, 0.9)):
        limit = 2 * (1 + momentum) / by_hand(X, n_outputs, bias)[0]
        rate = largest_stable_learning_rate(
            device.asarray(X), n_outputs=n_outputs, bias=bias, momentum=momentum
        )
        assert type(rate) is float
        assert limit * (1 - 2.1e-3) < rate < limit * (1 + 1e-6)
        again = largest_stable_learning_rate(
            device.asarray(X), n_outputs=n_outputs, bias=bias, momentum=momentum
        )
        assert rate == again


def test_tolerance_and_iterations_are_what_they_say(device, rng, monkeypatch):
    X = rng.normal(size=(400, 400))
    limit = 2 / by_hand(X, bias=False)[0]
    counts = []
    times = regression._gram_times

    def counted(*arguments):
        counts[-1] += 1
        return times(*arguments)

    monkeypatch.setattr(regression, "GRAM_FEATURES", 0)
    monkeypatch.setattr(regression, "_gram_times", counted)
    rates = []
    for tolerance in (1e-1, 1e-3, 1e-8):
        counts.append(0)
        rates.append(
            largest_stable_learning_rate(device.asarray(X), bias=False, tolerance=tolerance)
        )
        assert limit * (1 - 2.1 * tolerance) < rates[-1] < limit * (1 + 1e-12)
    assert counts[0] < counts[1] < counts[2] < 100
    assert counts[1] < 40  # the last power iterate alone takes more than a hundred
    counts.append(0)
    rate = largest_stable_learning_rate(device.asarray(X), bias=False, n_iterations=3)
    assert counts[-1] == 3
    assert rate < limit


def test_a_start_beside_the_largest_eigenvalue_does_not_deceive(device):
    """All eigenvalues but one are equal, and nearly as large as that one."""
    values = np.full(1500, 0.999)
    values[0] = 1
    rate = largest_stable_learning_rate(device.asarray(np.diag(values)), bias=False)
    assert rate == pytest.approx(1500, rel=1e-9)


def test_no_feature_no_limit(device):
    assert largest_stable_learning_rate(device.xp.zeros((5, 3)), bias=False) == math.inf
    assert largest_stable_learning_rate(device.xp.zeros((5, 3))) == pytest.approx(1)


TRAINED = [(1, True, 0.0), (3, True, 0.0), (1, False, 0.0), (2, True, 0.5), (1, True, 0.9)]


@pytest.mark.parametrize(("n_outputs", "bias", "momentum"), TRAINED)
@pytest.mark.parametrize("way", ["gram", "products"])
def test_training_converges_below_the_rate_and_diverges_above(
    device, monkeypatch, n_outputs, bias, momentum, way
):
    if way == "products":
        monkeypatch.setattr(regression, "GRAM_FEATURES", 0)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        d = int(rng.integers(1, 12))
        X, Y = problem(rng, n=int(rng.integers(2 * d + 2, 90)), d=d, m=n_outputs)
        X = X * rng.uniform(0.7, 1.4, d) - X.mean(0) * 0.9
        x, y = device.asarray(X), device.asarray(Y)
        rate = largest_stable_learning_rate(x, n_outputs=n_outputs, bias=bias, momentum=momentum)
        least = gpuml.evaluate(least_squares(x, y, bias=bias), x, y)["loss"]

        def train(factor, d=d, rate=rate, x=x, y=y):
            model = Linear(d, n_outputs, bias=bias, dtype=np.float64, device=device)
            optimizer = GradientDescent(factor * rate, momentum=momentum)
            return gpuml.train(model, x, y, optimizer=optimizer, n_epochs=1500, batch_size=None)

        below = train(0.99)["loss"]
        assert below[-1] < least + 1e-3 * (below[0] - least)
        try:
            above = train(1.01)["loss"]
            assert above[-1] > 1e3 * above[0]
        except gpuml.DivergenceError:
            pass


def test_wrong_settings_are_named(device):
    X = device.xp.ones((5, 3))
    for momentum in (-0.1, 1, math.nan):
        with pytest.raises(ValueError, match="momentum must be from 0 to less than 1"):
            largest_stable_learning_rate(X, momentum=momentum)
    for name in ("n_outputs", "n_iterations"):
        for value in (0, -1, 1.5):
            with pytest.raises(ValueError, match=f"{name} must be a positive integer"):
                largest_stable_learning_rate(X, **{name: value})
    with pytest.raises(ValueError, match="tolerance must be positive"):
        largest_stable_learning_rate(X, tolerance=0)


# The spectrum


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_outputs", [1, 4])
def test_the_spectrum_is_that_of_the_second_derivative(device, rng, monkeypatch, bias, n_outputs):
    small_blocks(monkeypatch)
    X, _ = problem(rng)
    values = spectrum(device.asarray(X), n_outputs=n_outputs, bias=bias)
    assert gpuml.device_of(values) == device
    np.testing.assert_allclose(gpuml.to_host(values), by_hand(X, n_outputs, bias), rtol=1e-10)
    few = gpuml.to_host(spectrum(device.asarray(X[:3]), bias=bias))
    assert few.shape == (5 + bias,)
    np.testing.assert_allclose(few, by_hand(X[:3], bias=bias), atol=1e-12)
    assert not few[3:].any()


def test_small_eigenvalues_are_right_where_those_of_the_product_are_rounding(device, rng):
    left, right = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (50, 4))
    lengths = np.array([1, 1e-2, 1e-6, 1e-10])
    values = gpuml.to_host(spectrum(device.asarray(left * lengths @ right.T), bias=False))
    np.testing.assert_allclose(values, 2 * lengths**2 / 50, rtol=1e-4)


# Full batches without the data


def direct(model, parameters, X, Y):
    predictions, backward = model.forward(parameters, X)
    value, d_predictions = mean_squared_error(predictions, Y)
    return value, backward(d_predictions)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(120, 5, 2), (3, 7, 1), (1, 1, 1), (400, 20, 30)])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_loss_and_gradient_are_those_of_the_data(device, rng, monkeypatch, bias, shape, blocks):
    if blocks == "many":
        small_blocks(monkeypatch)
    X, Y = (device.asarray(a) for a in problem(rng, *shape))
    gram = Gram.of(X, Y, bias=bias)
    assert (gram.n_samples, gram.bias) == (shape[0], bias)
    assert {gram.xx.dtype, gram.xy.dtype, gram.yy.dtype} == {np.dtype(np.float64)}
    model = Linear(*shape[1:], bias=bias, dtype=np.float64, device=device)
    for _ in range(3):
        model.parameters.flat[...] = device.asarray(rng.normal(size=model.n_parameters))
        expected, expected_gradients = direct(model, model.parameters, X, Y)
        value, gradients = gram.loss_and_gradient(model.parameters)
        assert gpuml.device_of(value, gradients.flat) == device
        assert value.shape == ()
        assert float(value) == pytest.approx(float(expected), rel=1e-10)
        np.testing.assert_allclose(
            gpuml.to_host(gradients.flat),
            gpuml.to_host(expected_gradients.flat),
            rtol=1e-9,
            atol=1e-11 * float(abs(expected_gradients.flat).max()),
        )
        given = model.parameters.zeros_like()
        given.flat[...] = np.nan
        again, returned = gram.loss_and_gradient(model.parameters, given)
        assert returned is given
        assert float(again) == float(value)
        np.testing.assert_array_equal(gpuml.to_host(given.flat), gpuml.to_host(gradients.flat))


def test_parameters_of_float32_and_of_a_population_fit_too(device, rng):
    X, Y = (device.asarray(a) for a in problem(rng))
    gram = Gram.of(X.astype(np.float32), Y.astype(np.float32))
    model = Linear(5, 2, device=device)
    model.parameters.flat[...] = device.asarray(rng.normal(size=12))
    value, gradients = gram.loss_and_gradient(model.parameters)
    expected, expected_gradients = direct(model, model.parameters, X, Y)
    assert gradients.flat.dtype == np.float32
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(
        *(gpuml.to_host(g.flat) for g in (gradients, expected_gradients)), rtol=1e-5, atol=1e-5
    )

    flat = device.asarray(rng.normal(size=(4, 3, 12)))
    population = Parameters(flat, model.parameters.shapes)
    values, gradients = gram.loss_and_gradient(population)
    rounding = gram.loss_rounding(population)
    assert values.shape == rounding.shape == (4, 3)
    for i in np.ndindex(4, 3):
        alone = Parameters(flat[i].copy(), model.parameters.shapes)
        value, gradient = gram.loss_and_gradient(alone)
        assert float(values[i]) == pytest.approx(float(value), rel=1e-12)
        assert float(rounding[i]) == pytest.approx(float(gram.loss_rounding(alone)), rel=1e-12)
        np.testing.assert_allclose(
            gpuml.to_host(gradients.flat[i]), gpuml.to_host(gradient.flat), rtol=1e-10
        )


def test_gradient_descent_goes_the_same_way_without_the_data(device, rng):
    X, Y = (device.asarray(a) for a in problem(rng))
    gram = Gram.of(X, Y)
    ways = []
    for without in (True, False):
        model = Linear(5, 2, dtype=np.float64, device=device)
        optimizer = GradientDescent(0.05, momentum=0.5)
        state = optimizer.init(model.parameters)
        losses = []
        for _ in range(200):
            if without:
                value, gradients = gram.loss_and_gradient(model.parameters)
            else:
                value, gradients = direct(model, model.parameters, X, Y)
            losses.append(float(value))
            optimizer.update(model.parameters, gradients, state)
        ways.append((losses, gpuml.to_host(model.parameters.flat)))
    np.testing.assert_allclose(ways[0][0], ways[1][0], rtol=1e-10)
    np.testing.assert_allclose(ways[0][1], ways[1][1], rtol=1e-10)


def test_batches_add_up_to_the_whole(device, rng):
    X, Y = (device.asarray(a) for a in problem(rng, m=1))
    whole = Gram.of(X, Y)
    for size, y in ((7, Y), (120, Y), (50, Y[:, 0])):
        pairs = [(X[i : i + size], y[i : i + size]) for i in range(0, 120, size)]
        gram = Gram.of_batches(iter(pairs))
        assert gram.n_samples == 120
        for name in ("xx", "xy", "yy"):
            np.testing.assert_allclose(
                *(gpuml.to_host(getattr(g, name)) for g in (gram, whole)), rtol=1e-12
            )
    assert Gram.of_batches(pairs, bias=False).shapes == {"weight": (5, 1)}
    with pytest.raises(ValueError, match="no batch"):
        Gram.of_batches([])
    X[119, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        Gram.of_batches([(X[:60], Y[:60]), (X[60:], Y[60:])])


def test_batches_may_be_overwritten_once_the_next_is_asked_for(device, rng):
    X, Y = (device.asarray(a) for a in problem(rng))

    def reused():
        x, y = X[:30].copy(), Y[:30].copy()
        for i in range(0, 120, 30):
            x[...], y[...] = X[i : i + 30], Y[i : i + 30]
            yield x, y

    np.testing.assert_allclose(
        *(gpuml.to_host(g.xy) for g in (Gram.of_batches(reused()), Gram.of(X, Y))), rtol=1e-12
    )


def exact_loss(X, Y, weight):
    """The mean squared error in rational numbers."""
    total = Fraction(0)
    for x, y in zip(X.tolist(), Y.tolist(), strict=True):
        for j, target in enumerate(y):
            prediction = sum(Fraction(a) * Fraction(w[j]) for a, w in zip(x, weight, strict=True))
            total += (prediction - Fraction(target)) ** 2
    return float(total / Y.size)


def test_the_loss_from_the_sums_is_wrong_where_its_rounding_is_said_to_be(device, rng):
    """Nearly dependent features and a nearly perfect fit."""
    x = rng.normal(size=(200, 1))
    X = np.hstack([x, x + 1e-7 * rng.normal(size=(200, 1))]) + 100
    weight = np.array([[3000.0], [-2999.0]])
    Y = X @ weight + 1e-7 * rng.normal(size=(200, 1))
    true = exact_loss(X, Y, weight.tolist())
    assert 1e-15 < true < 1e-13

    model = Linear(2, 1, bias=False, dtype=np.float64, device=device)
    model.parameters["weight"] = device.asarray(weight)
    x, y = device.asarray(X), device.asarray(Y)
    gram = Gram.of(x, y, bias=False)
    value, _ = gram.loss_and_gradient(model.parameters)
    rounding = float(gram.loss_rounding(model.parameters))
    assert float(direct(model, model.parameters, x, y)[0]) == pytest.approx(true, rel=1e-2)
    assert abs(float(value) - true) > 1e3 * true  # not a digit is right
    assert rounding > 1e3 * true  # and that is said
    assert gram.condition() > 1e14

    # The weights, too, are right from the data and wrong from the sums.
    from_data = host(least_squares(x, y, bias=False))["weight"]
    from_sums = np.linalg.lstsq(gpuml.to_host(gram.xx), gpuml.to_host(gram.xy), rcond=None)[0]
    assert abs(from_data - weight).max() < 100
    assert abs(from_sums - weight).max() > 1000


def test_rounding_is_neither_denied_nor_exaggerated(device):
    seen = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        offset, noise = 10 ** rng.uniform(-2, 3), 10 ** rng.uniform(-8, 0)
        X = rng.normal(size=(100, 3)) + offset
        weight = rng.normal(size=(3, 1))
        Y = X @ weight + noise * rng.normal(size=(100, 1))
        model = Linear(3, 1, bias=False, dtype=np.float64, device=device)
        model.parameters["weight"] = device.asarray(weight)
        gram = Gram.of(device.asarray(X), device.asarray(Y), bias=False)
        value, _ = gram.loss_and_gradient(model.parameters)
        error = abs(float(value) - exact_loss(X, Y, weight.tolist()))
        rounding = float(gram.loss_rounding(model.parameters))
        assert error <= rounding
        seen.append(error / rounding)
    assert max(seen) > 1e-3


def test_the_condition_is_that_of_the_product(device, rng):
    X, Y = problem(rng)
    for bias in (True, False):
        values = by_hand(X, bias=bias)
        gram = Gram.of(device.asarray(X), device.asarray(Y), bias=bias)
        assert gram.condition() == pytest.approx(values[0] / values[-1], rel=1e-8)
    X[:, 0] = 0
    assert Gram.of(device.asarray(X), device.asarray(Y), bias=False).condition() > 1e15


def test_parameters_that_do_not_fit_are_refused(device, rng):
    gram = Gram.of(*(device.asarray(a) for a in problem(rng)))
    assert repr(gram) == "Gram(120 samples, 5 features, 2 outputs)"
    for model in (
        Linear(4, 2, device=device),
        Linear(5, 2, bias=False, device=device),
        gpuml.MLP([5, 2], device=device),
    ):
        with pytest.raises(ValueError, match=r"the data need \{'weight': \(5, 2\), 'bias'"):
            gram.loss_and_gradient(model.parameters)
    turned = Parameters(device.xp.zeros(12), {"bias": (1, 2), "weight": (5, 2)})
    with pytest.raises(ValueError, match="the parameters have shapes"):
        gram.loss_and_gradient(turned)
    if device.kind == "gpu":
        with pytest.raises(TypeError, match="different devices"):
            gram.loss_and_gradient(Linear(5, 2, device="cpu").parameters)


def test_every_matrix_product_goes_through_one_function(device, rng, monkeypatch):
    products = []
    matmul = regression.matmul

    def watched(a, b, out=None):
        products.append((a.shape, b.shape))
        return matmul(a, b, out)

    monkeypatch.setattr(regression, "matmul", watched)
    X, Y = (device.asarray(a) for a in problem(rng))
    Gram.of(X, Y)
    assert products == [((6, 120), (120, 6)), ((6, 120), (120, 2))]
