from __future__ import annotations

import math

import numpy as np
import pytest

import gpuml
from gpuml import MLP, Linear, Parameters, gradient_check
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.models import linear, linear_gradient, relu


def problem(rng, labels=False, n=30):
    X = rng.normal(size=(n, 4))
    return (X, rng.integers(3, size=n)) if labels else (X, rng.normal(size=(n, 3)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("make", ["linear", "no bias", "mlp", "deep"])
def test_the_models_and_losses_of_the_package_pass(device, rng, dtype, labels, make):
    model = {
        "linear": lambda: Linear(4, 3, dtype=dtype, device=device),
        "no bias": lambda: Linear(4, 3, bias=False, dtype=dtype, device=device),
        "mlp": lambda: MLP([4, 9, 3], dtype=dtype, device=device),
        "deep": lambda: MLP([4, 9, 7, 5, 3], dtype=dtype, device=device),
    }[make]()
    X, y = problem(rng, labels)
    before = gpuml.to_host(model.parameters.flat).copy()
    check = gradient_check(model, device.asarray(X, dtype), device.asarray(y))
    assert check
    assert check.passed
    assert 0 <= check.largest_error < 1e-6 < check.tolerance < 1e-5
    n_arrays = len(model.parameters)
    n_directions = n_arrays + 1 if n_arrays > 1 else 1
    assert check.n_compared + check.n_set_aside == min(20, model.n_parameters) + n_directions
    assert check.n_set_aside <= 2
    assert model.dtype == dtype
    np.testing.assert_array_equal(gpuml.to_host(model.parameters.flat), before)


def test_data_may_be_as_for_train(device, rng):
    """On the host, of other types, a vector of targets, whole numbers as targets."""
    X, y = problem(rng, labels=True)
    assert gradient_check(MLP([4, 5, 3], device=device), X.astype(np.float32), y.astype(np.int8))
    assert gradient_check(Linear(4, 1, device=device), X.astype(np.float16), X[:, 0])
    whole = rng.integers(9, size=(30, 1))
    model = MLP([4, 5, 1], device=device)
    assert gradient_check(model, (X * 9).astype(int), whole)
    assert gradient_check(model, X, whole[:, 0], loss="mean_squared_error")


def test_two_runs_say_the_same(device, rng):
    model, (X, y) = MLP([4, 5, 3], device=device), problem(rng)
    checks = [gradient_check(model, X, y, n_checks=2, seed=seed) for seed in (3, 3, 4)]
    assert checks[0] == checks[1] != checks[2]


class Checked(gpuml.Model):
    """An MLP with one hidden layer, written out, with one fault in its backward pass."""

    def __init__(self, device, fault, seed=0, dtype=np.float32):
        source = MLP([4, 4, 3], seed=seed, device="cpu", dtype=dtype)
        names = ["W1", "b1", "W2", "b2"]
        shapes = dict(zip(names, source.parameters.shapes.values(), strict=True))
        super().__init__(Parameters(device.asarray(source.parameters.flat), shapes), [])
        self.parameters["b1"] = 0.1
        self.fault = fault

    def forward(self, parameters, x):
        p, fault = parameters, self.fault
        hidden = linear(x, p["W1"], p["b1"])
        relu(hidden)

        def backward(d, gradients=None, *, input_gradient=False):
            g = p.zeros_like() if gradients is None or fault == "elsewhere" else gradients
            if fault == "missing 1/n":
                d = d * len(x)
            linear_gradient(hidden, d, g["W2"], g["b2"])
            d_hidden = d @ p["W2"].swapaxes(-1, -2)
            if fault != "no mask":
                d_hidden = d_hidden * (hidden > 0)
            before = gradients["W1"].copy() if fault == "adds" else 0
            linear_gradient(x, d_hidden, g["W1"], g["b1"])
            match fault:
                case "transposed":
                    g["W1"] = g["W1"].T.copy()
                case "sign of the bias":
                    g["b2"] = -g["b2"]
                case "sign of the hidden bias":
                    g["b1"] = -g["b1"]
                case "bias by the mean":
                    g["b1"] = g["b1"] / len(x)
                case "adds":
                    g["W1"] = g["W1"] + before
                case "not written":
                    g["b2"] = np.nan
                case "one entry":
                    g["W2"][3, 1] *= 1.001
                case "one per mille":
                    g["W1"] = g["W1"] * 1.001
            return g, None

        return linear(hidden, p["W2"], p["b2"]), backward


FAULTS = {
    "missing 1/n": None,
    "transposed": "W1",
    "no mask": None,
    "sign of the bias": "b2",
    "sign of the hidden bias": "b1",
    "bias by the mean": "b1",
    "adds": "W1",
    "not written": "b2",
    "elsewhere": None,
    "one entry": "W2",
    "one per mille": "W1",
}


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_backward_pass_are_found(device, rng, fault, seed, labels):
    X, y = problem(rng, labels)
    assert gradient_check(Checked(device, None, seed), X, y)
    check = gradient_check(Checked(device, fault, seed), X, y, seed=seed)
    assert not check
    assert check.largest_error > 10 * check.tolerance
    if FAULTS[fault]:
        assert check.parameter in (FAULTS[fault], "all parameters")
    assert "FAILED" in str(check)
    assert len(str(check).splitlines()) == 2


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
def test_features_of_any_size_are_checked(device, rng, scale):
    X, y = problem(rng)
    X, y = (X + 3) * scale, y * scale
    for fault in (None, "no mask", "transposed", "sign of the bias", "one per mille"):
        model = Checked(device, fault)
        model.parameters["b1"] = 0.1 * scale
        check = gradient_check(model, X, y)
        assert check.passed == (fault is None), check


def test_small_faults_are_found_where_the_loss_hardly_changes(device, rng):
    X, y = problem(rng)
    for fault in (None, "one per mille"):
        check = gradient_check(Checked(device, fault), X * 1e-7, y)
        assert check.passed == (fault is None), check


def test_large_parameters_take_large_steps(device, rng, monkeypatch):
    from gpuml import gradients

    found = []
    along = gradients._Check.along
    monkeypatch.setattr(gradients._Check, "along", lambda *a: found.append(along(*a)) or found[-1])
    X, y = problem(rng)
    model = Checked(device, None, dtype=np.float64)
    model.parameters["W1"] = model.parameters["W1"] * 1e10
    assert gradient_check(model, X * 1e-10, y)
    for line in found:
        assert line is not None
        assert line.differences == pytest.approx(line.backward, rel=1e-5, abs=1e-18)


@pytest.mark.parametrize("factor", [0.5, -1, 30])
def test_a_wrong_gradient_of_a_loss_is_found(device, rng, factor):
    X, y = problem(rng)

    def loss(predictions, targets):
        value, d_predictions = mean_squared_error(predictions, targets)
        return value, d_predictions * factor

    check = gradient_check(MLP([4, 6, 3], device=device), X, y, loss=loss)
    assert not check
    assert check.backward == pytest.approx(factor * check.differences, rel=1e-4)


def test_a_loss_of_ones_own_is_checked(device, rng):
    """One with a kink, whose value is a plain number."""
    X, y = problem(rng)

    def absolute(predictions, targets):
        difference = predictions - targets
        return float(abs(difference).mean()), device.xp.sign(difference) / difference.size

    assert gradient_check(MLP([4, 6, 3], device=device), X, y, loss=absolute)


def test_all_models_of_a_population_are_checked(device, rng):
    model, (X, y) = MLP([4, 6, 3], device=device), problem(rng, labels=True)
    flat = device.asarray(rng.normal(size=(5, model.n_parameters)))
    model.parameters = Parameters(flat, model.parameters.shapes)
    check = gradient_check(model, X, y)
    assert check
    assert check.n_compared + check.n_set_aside == 25

    def wrong_in_one(predictions, targets):
        value, d_predictions = softmax_cross_entropy(predictions, targets)
        d_predictions[3] *= 2
        return value, d_predictions

    assert not gradient_check(model, X, y, loss=wrong_in_one)


class Absolute(gpuml.Model):
    """A model of two numbers, |a x| + b, whose kink at a = 0 takes the slope `side`."""

    def __init__(self, device, a, side):
        flat = device.asarray([float(a), 1.0])
        super().__init__(Parameters(flat, {"a": (1, 1), "b": (1, 1)}), [])
        self.side = side

    def forward(self, parameters, x):
        a, xp = parameters["a"], gpuml.array_module(x)

        def backward(d, gradients=None, *, input_gradient=False):
            slope = xp.where(a == 0, float(self.side), xp.sign(a))
            gradients["a"] = (d * abs(x)).sum() * slope
            gradients["b"] = d.sum()
            return gradients, None

        return abs(x * a) + parameters["b"], backward


@pytest.mark.parametrize("a", [0.0, 1e-12, 2e-6, 4.5e-6, 6e-6, -1e-7, 1e-3])
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_kink_gives_no_false_alarm_but_is_reported(device, rng, a, side):
    X, _ = problem(rng)
    check = gradient_check(Absolute(device, a, side), X[:, :1], X[:, 1:2])
    assert check
    assert check.n_set_aside == (3 if abs(a) < 1e-9 else 0)  # a, along a, along both
    assert ("set aside: a kink is too near" in str(check)) == (check.n_set_aside > 0)
    alone = gradient_check(Absolute(device, a, side), X[:, :1], X[:, 1:2], step=1e-5)
    assert alone
    assert (alone.n_set_aside > 0) == (abs(a) < 1e-5)
    if a != 0:  # where the second differences do not see it
        third = gradient_check(Absolute(device, a, side), X[:, :1], X[:, 1:2], step=3 * abs(a))
        assert third
        assert third.n_set_aside > 0


class OneNumber(gpuml.Model):
    """A model of one number: a function of it and its derivative, times x."""

    def __init__(self, device, a, function, derivative):
        super().__init__(Parameters(device.asarray([float(a)]), {"a": (1, 1)}), [])
        self.function, self.derivative = function, derivative

    def forward(self, parameters, x):
        a = parameters["a"]

        def backward(d, gradients=None, *, input_gradient=False):
            gradients["a"] = (d * x).sum() * self.derivative(a)
            return gradients, None

        return x * self.function(a), backward


def test_a_slight_kink_is_no_alarm_either(device, rng):
    """Its effect is a few times the tolerance."""
    X, xp = problem(rng)[0], device.xp
    for slope in (2e-6, 1e-5, 4e-5, 2e-4, 1e-3):
        kinked = OneNumber(
            device, 0, lambda a, s=slope: 1 + a + s * xp.maximum(a, 0), lambda a: 1.0
        )
        check = gradient_check(kinked, X[:, :1], X[:, 1:2])
        assert not check.largest_error > 6e-6, slope  # NaN if all is set aside
        # a wrong gradient of the same size, without a kink, is one
        model = OneNumber(device, 0, lambda a, s=slope: 1 + a + s * a, lambda a: 1.0)
        assert bool(gradient_check(model, X[:, :1], X[:, 1:2])) == (slope < 6e-6)


def test_where_the_loss_is_not_finite_nearby_smaller_steps_are_taken(device, rng):
    X, xp = problem(rng)[0], device.xp
    for a in (1.0, 1e-5):
        assert gradient_check(OneNumber(device, a, xp.log, lambda a: 1 / a), X[:, :1], X[:, 1:2])
        assert not gradient_check(
            OneNumber(device, a, xp.log, lambda a: 1.01 / a), X[:, :1], X[:, 1:2]
        )
    check = gradient_check(OneNumber(device, 1e-11, xp.log, lambda a: 1 / a), X[:, :1], X[:, 1:2])
    assert (check.n_compared, check.n_set_aside) == (0, 2)

    def wall(a):
        return xp.where(a > 0.75e-3, np.inf, 1 + a)

    check = gradient_check(
        OneNumber(device, 0, wall, lambda a: 1.0), X[:, :1], X[:, 1:2], step=1e-3
    )
    assert check.n_set_aside >= 1


def test_kinks_that_cancel_in_one_direction_are_no_alarm(device, rng, monkeypatch):
    """Along (1, -1) max(a, 0) - max(b, 0) is a straight line, though it has no gradient."""
    from gpuml import gradients

    class TwoKinks(gpuml.Model):
        def __init__(self):
            super().__init__(Parameters(device.xp.zeros(2), {"p": (1, 2)}), [])

        def forward(self, parameters, x):
            p = parameters["p"]

            def backward(d, gradients=None, *, input_gradient=False):
                on = (p > 0) * device.asarray([[1.0, -1.0]])
                gradients["p"] = (d * x).sum() * on
                return gradients, None

            positive = device.xp.maximum(p, 0)
            return x * (1 + positive[:, :1] - positive[:, 1:]), backward

    drawn = iter([[[1.0, -1.0]], [[1.0, -0.3]]])

    def direction(parameters, name, generator):
        return Parameters(device.asarray(next(drawn)[0]), parameters.shapes)

    monkeypatch.setattr(gradients, "_random_direction", direction)
    X, _ = problem(rng)
    check = gradient_check(TwoKinks(), X[:, :1], X[:, 1:2])
    assert (check.n_compared, check.n_set_aside) == (0, 3)
    assert next(drawn, None) is None


@pytest.mark.parametrize("kind", ["zeros", "whole", "sparse"])
def test_inputs_at_which_units_are_exactly_at_their_kink_pass(device, kind):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        X, y = problem(rng, labels=True, n=20)
        if kind == "zeros":
            X[::2] = 0  # with a bias of zero the hidden units are exactly 0
        elif kind == "whole":
            X = rng.integers(0, 3, size=X.shape)
        else:
            X *= rng.random(X.shape) < 0.3
        check = gradient_check(MLP([4, 6, 5, 3], seed=seed, device=device), X, y, seed=seed)
        assert check, check
        assert check.n_compared > 5


def test_where_nothing_can_be_compared_nothing_passes(device):
    X = np.ones((5, 1))
    model = Absolute(device, 0, 1)
    model.parameters = Parameters(model.parameters.flat[:1].copy(), {"a": (1, 1)})
    original = model.forward
    model.forward = lambda p, x: original(
        Parameters(p.flat.repeat(2), {"a": (1, 1), "b": (1, 1)}), x
    )
    forward = model.forward

    def only_a(parameters, x):
        predictions, backward = forward(parameters, x)

        def back(d, gradients=None, **options):
            both = Parameters(device.xp.zeros(2), {"a": (1, 1), "b": (1, 1)})
            backward(d, both)
            gradients["a"] = both["a"]
            return gradients, None

        return predictions, back

    model.forward = only_a
    check = gradient_check(model, X, X)
    assert not check
    assert (check.n_compared, check.n_set_aside) == (0, 2)
    assert math.isnan(check.largest_error)
    assert "nothing could be compared" in str(check)


class Short(gpuml.Model):
    """A linear model that computes in float32 whatever it is given."""

    def __init__(self, device, factor=1.0):
        flat = device.asarray(np.linspace(-1, 1, 12))
        super().__init__(Parameters(flat, {"W": (4, 3)}), [])
        self.factor = factor

    def forward(self, parameters, x):
        x = x.astype(np.float32)

        def backward(d, gradients=None, *, input_gradient=False):
            gradients["W"] = x.T @ d.astype(np.float32) * self.factor
            return gradients, None

        return x @ parameters["W"].astype(np.float32), backward


def test_the_tolerance_suits_the_type_in_which_a_model_computes(device, rng):
    X, y = problem(rng)
    y = y.astype(np.float32)

    def loss(predictions, targets):
        return mean_squared_error(predictions, targets.astype(np.float32))

    check = gradient_check(Short(device), X, y, loss=loss)
    assert check
    assert check.tolerance == pytest.approx(np.finfo(np.float32).eps ** (1 / 3))
    assert not gradient_check(Short(device, 1.05), X, y, loss=loss)


def test_a_perfect_fit_is_no_alarm(device):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        X, _ = problem(rng)
        model = Linear(4, 3, device=device, dtype=np.float64)
        model.parameters.flat[...] = device.asarray(rng.normal(size=15))
        check = gradient_check(model, X, gpuml.to_host(model(device.asarray(X))))
        assert check, check
        assert check.n_set_aside == 0


def test_entries_are_spread_over_all_parameters(device, rng, monkeypatch):
    from gpuml import gradients

    seen = []
    along = gradients._Check.along

    def watched(self, name, index, direction):
        seen.append((name, index, gpuml.to_host(direction.flat).copy()))
        return along(self, name, index, direction)

    monkeypatch.setattr(gradients._Check, "along", watched)
    model, (X, y) = MLP([4, 50, 3], device=device), problem(rng)
    gradient_check(model, X, y, n_checks=16)
    entries = [(name, index) for name, index, _ in seen if index is not None]
    names = [name for name, _ in entries]
    # the last bias has but three entries, and the others share the rest
    assert len(set(entries)) == 16
    assert sorted(map(names.count, model.parameters)) == [3, 4, 4, 5]
    directions = {name: d for name, index, d in seen if index is None}
    assert list(directions) == [*model.parameters, "all parameters"]
    for name, direction in directions.items():
        parts = Parameters(direction, model.parameters.shapes)
        moved = [part for part in parts if parts[part].all()]
        still = [part for part in parts if not parts[part].any()]
        assert moved == ([name] if name in parts else list(parts))
        assert len(moved) + len(still) == len(parts)

    seen.clear()
    gradient_check(model, X, y, n_checks=1)
    assert len([1 for _, index, _ in seen if index is not None]) == 1


def test_the_place_of_a_wrong_entry_is_given(device, rng):
    X, y = problem(rng)
    check = gradient_check(Checked(device, "sign of the bias"), X, y)
    assert check.parameter == "b2"
    assert check.index is None or check.index in [(0, 0), (0, 1), (0, 2)]
    assert check.backward == pytest.approx(-check.differences, rel=1e-4)
    assert f"{check.largest_error:.1e}" in str(check)
    model = Checked(device, "one entry")
    model.parameters["W2"][3, 1] = 7  # its direction is longer than 1
    check = gradient_check(model, X, y, n_checks=model.n_parameters)
    predictions, backward = model.forward(model.parameters, device.asarray(X, np.float32))
    gradients, _ = backward(mean_squared_error(predictions, device.asarray(y, np.float32))[1])
    assert check.backward == pytest.approx(float(gradients["W2"][3, 1]), rel=1e-4)
    assert (check.parameter, check.index) == ("W2", (3, 1))
    assert check.largest_error == pytest.approx(0.001, rel=0.01)
    assert "W2 [3, 1]" in str(check)
    assert check.backward == pytest.approx(1.001 * check.differences)


def test_a_backward_that_does_not_write_is_told_so(device, rng):
    X, y = problem(rng)
    for fault in ("elsewhere", "adds", "not written"):
        check = gradient_check(Checked(device, fault), X, y)
        assert check.largest_error == math.inf
        assert "must write all gradients where it is told" in str(check)


def test_wrong_settings_are_named(device, rng):
    model, (X, y) = Linear(4, 3, device=device), problem(rng)
    for n_checks in (0, -1, 2.5):
        with pytest.raises(ValueError, match="n_checks must be a positive integer"):
            gradient_check(model, X, y, n_checks=n_checks)
    for step in (0, -1e-6, math.inf, math.nan):
        with pytest.raises(ValueError, match="step must be positive"):
            gradient_check(model, X, y, step=step)
    with pytest.raises(ValueError, match="did you mean 'mean_squared_error'"):
        gradient_check(model, X, y, loss="mean_square")
    X[2, 1] = np.nan
    with pytest.raises(ValueError, match="the loss is nan"):
        gradient_check(model, X, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": np.full(30, 3)}, ValueError, "labels must be from 0 to 2, .* got 3 to 3"),
        ({"y": np.full(30, -1)}, ValueError, "labels must be from 0 to 2, .* got -1 to -1"),
        ({"y": np.zeros(29, int)}, ValueError, r"X has shape \(30, 4\), y \(29,\)"),
        ({"X": np.zeros((0, 4)), "y": np.zeros(0, int)}, ValueError, "not empty"),
        ({"X": np.zeros((30, 4)).astype(str)}, TypeError, "X must hold real numbers, got <U"),
        ({"y": np.full(30, "a")}, TypeError, "y must hold real numbers, got <U1"),
    ],
)
def test_data_that_do_not_fit_are_named(device, rng, change, error, message):
    X, y = problem(rng, labels=True)
    model = MLP([4, 9, 3], device=device)
    with pytest.raises(error, match=message):
        gradient_check(model, **({"X": X, "y": y} | change))


def test_data_on_a_gpu_and_a_model_elsewhere_are_refused(device, rng):
    if device.kind == "cpu":
        pytest.skip("there is but one place")
    X, y = (device.asarray(a) for a in problem(rng))
    with pytest.raises(TypeError, match=r"model.to\("):
        gradient_check(Linear(4, 3, device="cpu"), X, y)
    assert gradient_check(Linear(4, 3, device=device), gpuml.to_host(X), gpuml.to_host(y))
