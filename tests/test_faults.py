"""Numbers that stop being finite: each kind of fault, by each engine, with where it arose."""

from __future__ import annotations

import math
import re
import warnings
from importlib.util import find_spec

import numpy as np
import pytest

import gpuml
from gpuml import MLP, Adam, GradientDescent, Linear, faults, to_host
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.models import Model, Parameters
from gpuml.privacy import Privacy
from gpuml.robustness import PGD, adversarial_accuracy, fgsm, pgd

N, BATCH = 200, 32
MLP_WAYS = ["eager", "graph", "fused", "tf32", "bfloat16", "clipped", "streamed", "in parts"]
MLP_WAYS += ["source", "adversarial", "private", "ranks"]
LINEAR_WAYS = ["one_pass", "one_pass, full", "gram", "ranks, one_pass"]
ROW, COLUMN = 77, 3
PLACE = f"row {ROW}, column {COLUMN} of X"


class Case:
    """A training that goes well by one of the ways there are, until a test breaks something."""

    def __init__(self, way, device, tmp_path) -> None:
        self.way, self.device, self.tmp_path = way, device, tmp_path
        rng = np.random.default_rng(8)
        self.X = rng.random((N, 6), np.float32)
        self.linear = way in LINEAR_WAYS
        self.y = self.X[:, :2].copy() if self.linear else self.X[:, :3].argmax(axis=1)
        self.model = (
            Linear(6, 2, device=device) if self.linear else MLP([6, 8, 7, 3], seed=1, device=device)
        )
        self.options = {"n_epochs": 2, "batch_size": BATCH, "optimizer": Adam(0.01)}
        gpu = {"graph", "fused", "tf32", "bfloat16"}
        if way in gpu and device.kind == "cpu":
            pytest.skip("this engine is for GPUs")
        if way == "graph" and find_spec("nvmath") is None:
            pytest.skip("nvmath-python is not installed")
        if way == "private":
            pytest.importorskip("dp_accounting")
        if way in ("ranks", "ranks, one_pass") and device.kind == "gpu":
            pytest.skip("each rank needs a GPU of its own")
        if way in ("tf32", "bfloat16"):
            self.options["precision"] = way
        if way in ("eager", "graph", "fused"):
            self.options["engine"] = way
        if "one_pass" in way:
            self.options["engine"] = "one_pass"
        if way == "gram":
            self.options["engine"] = "gram"
        if way in ("one_pass, full", "gram", "in parts"):
            self.options["batch_size"] = None
        self.options |= {
            "clipped": {"clip_norm": 1.0},
            "adversarial": {"adversarial": PGD(0.1, n_steps=2, bounds=None)},
            "private": {"privacy": Privacy(noise_multiplier=1.0, delta=1e-3, seed=1)},
        }.get(way, {})

    def train(self, **options):
        X, y, options = self.X, self.y, self.options | options
        if self.way in ("streamed", "in parts"):
            np.save(self.tmp_path / "X.npy", X)
            X = np.load(self.tmp_path / "X.npy", mmap_mode="r")
        if self.way == "source":
            X, y = [(X[i : i + BATCH], y[i : i + BATCH]) for i in range(0, N, BATCH)], None
            del options["batch_size"]
        if not self.way.startswith("ranks"):
            return gpuml.train(self.model, X, y, **options)

        def work(communicator):
            model = Linear(6, 2, device="cpu") if self.linear else MLP([6, 8, 7, 3], device="cpu")
            model.parameters.flat[...] = self.model.parameters.flat
            return gpuml.train(model, X, y, communicator=communicator, **options)

        return gpuml.distributed.simulate(2, work)[0]

    def fails(self, error=gpuml.DivergenceError, **options):
        """Train, and return what the error says; no other warning is heard."""
        before = to_host(self.model.parameters.flat).copy()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with pytest.raises(error) as caught:
                self.train(**options)
        if not isinstance(caught.value, gpuml.DivergenceError):
            np.testing.assert_array_equal(to_host(self.model.parameters.flat), before)
        return str(caught.value)


@pytest.fixture(params=MLP_WAYS + LINEAR_WAYS)
def case(request, device, tmp_path):
    return Case(request.param, device, tmp_path)


@pytest.fixture(params=MLP_WAYS)
def mlp_case(request, device, tmp_path):
    return Case(request.param, device, tmp_path)


def place(case):
    """How a row of X is named."""
    if case.way != "source":
        return PLACE
    return rf"row {ROW % BATCH}, column {COLUMN} of x in batch {ROW // BATCH} (counted from 0)"


def row(case):
    return place(case).replace(f", column {COLUMN}", "")


def test_none_of_them_finds_a_fault_where_there_is_none(case):
    history = case.train()
    assert np.isfinite(history["loss"]).all()
    assert not any("overflow" in note for note in history.notes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_in_the_data(case, value):
    case.X[ROW, COLUMN] = value
    error = gpuml.DataError if case.way == "gram" else gpuml.DivergenceError
    assert f"{place(case)} is not" in case.fails(error)


def test_in_data_of_another_type(case):
    X = case.X
    case.X = X.astype(np.float64)
    case.X[ROW, COLUMN] = -1e300
    error = gpuml.DataError if case.way == "gram" else gpuml.DivergenceError
    assert f"{place(case)} is not: -1e+300 is too large for float32" in case.fails(error)
    with np.errstate(over="ignore"):
        case.X = np.where(X[ROW, COLUMN] == X, 70000, X).astype(np.float16)
    expected = f"{place(case)} is not: inf, since float16 holds numbers up to 65504"
    assert expected in case.fails(error)


@pytest.mark.parametrize("way", LINEAR_WAYS)
def test_in_targets(way, device, tmp_path):
    case = Case(way, device, tmp_path)
    case.y[ROW, 1] = math.nan
    error = gpuml.DataError if way == "gram" else gpuml.DivergenceError
    assert f"row {ROW}, column 1 of y is not" in case.fails(error)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_in_the_weights_to_begin_with(case, value):
    name = next(iter(case.model.parameters))
    case.model.parameters[name][4, 1] = value
    found = case.fails()
    assert "epoch 1, step 1: the loss is " in found
    assert f"since already before training {name} is {value} in row 4, column 1" in found


def test_in_the_weights_by_steps_that_are_too_large(case):
    found = case.fails(optimizer=GradientDescent(1e30), n_epochs=4)
    assert "epoch" in found
    assert "is not finite" in found
    assert "The steps may be too large" in found
    assert "learning_rate" in found
    if "ranks" not in case.way:
        assert np.isfinite(to_host(case.model.parameters.flat)).all()


def test_in_the_products_of_one_row(mlp_case):
    mlp_case.X[ROW, COLUMN] = 3e38
    found = mlp_case.fails()
    assert (
        f"since {row(mlp_case)}, with numbers up to 3e+38, makes outputs of layer 1 of 3" in found
    )
    assert found.endswith("even by the weights from before training: standardise the features")


def test_in_squares_that_only_later_weights_make_infinite(device, tmp_path):
    case = Case("one_pass", device, tmp_path)  # all zero, the weights make 0 of every number
    case.X[ROW, COLUMN] = 3e38
    expected = f"and the square of {PLACE}, 3e+38, is not either: standardise the features"
    assert expected in case.fails()


def own_loss(case, change):
    """A loss whose value and gradient `change` may break."""
    known = mean_squared_error if case.linear else softmax_cross_entropy

    def odd_loss(predictions, targets):
        return change(*known(predictions, targets))

    return odd_loss


def takes_own_losses(case):
    if case.way in ("fused", "private"):
        pytest.skip("it knows the losses of this package only")


def test_in_the_value_of_a_loss_of_ones_own(mlp_case):
    takes_own_losses(mlp_case)
    loss = own_loss(mlp_case, lambda value, d: (value * math.nan, d))
    found = mlp_case.fails(loss=loss)
    assert "epoch 1, step 1: the loss is nan, which is not finite, since odd_loss is nan" in found
    assert "though their predictions are finite, up to 0." in found
    assert found.endswith("look into that function")


def test_in_the_gradient_of_a_loss_of_ones_own(mlp_case):
    takes_own_losses(mlp_case)

    def change(value, d):
        d[..., 0, 1] = math.nan
        return value, d

    found = mlp_case.fails(loss=own_loss(mlp_case, change))
    table = "x in batch 0 (counted from 0)" if mlp_case.way == "source" else "X"
    assert f"since odd_loss returns a gradient that is not finite for row 0 of {table}" in found


class OddModel(Model):
    """A model of one's own whose backward divides by zero."""

    def forward(self, parameters, x, **options):
        predictions, backward = super().forward(parameters, x, **options)

        def back(d, gradients=None, *, input_gradient=False):
            gradients, d_x = backward(d, gradients, input_gradient=input_gradient)
            gradients["layers.1.bias"][0, 2] = math.inf
            return gradients, d_x

        return predictions, back


def odd_model(device, kind=OddModel):
    model = MLP([6, 8, 7, 3], seed=1, device=device)
    return kind(model.parameters, model.layers)


def test_in_the_gradient_of_a_model_of_ones_own(device, tmp_path):
    case = Case("eager", device, tmp_path)
    case.model = odd_model(device)
    found = case.fails()
    expected = "since the gradient of layers.1.bias is not finite for rows 0 to 31 of X, though"
    assert expected in found
    assert found.endswith("look into that function")


def test_in_the_predictions_of_a_model_of_ones_own(device, tmp_path):
    class Root(Model):
        def forward(self, parameters, x, **options):
            predictions, backward = super().forward(parameters, x, **options)
            predictions[x[:, 3] > 10] = math.nan
            return predictions, backward

    case = Case("eager", device, tmp_path)
    case.model = odd_model(device, Root)
    case.X[ROW, COLUMN] = 11
    found = case.fails()
    assert f"since row {ROW} of X, with numbers up to 11, makes predictions that are not" in found


def test_in_validation_data(mlp_case):
    if mlp_case.way in ("source", "adversarial"):
        mlp_case.options.pop("adversarial", None)
    held_out = mlp_case.X[:40].copy(), mlp_case.y[:40]
    held_out[0][7, 3] = 3e38
    found = mlp_case.fails(validation_data=held_out)
    assert "the validation loss is not finite, since row 7 of X of the validation data" in found


def test_weights_that_overflow_in_the_last_step_are_named(device, rng):
    X, y = rng.random((60, 4), np.float32) * np.float32(1e18), rng.integers(2, size=60)
    model, options = MLP([4, 8, 2], device=device), {"n_epochs": 1, "batch_size": None}
    with pytest.raises(gpuml.DivergenceError) as caught:
        gpuml.train(model, X, y, optimizer=GradientDescent(1e38), engine="eager", **options)
    found = r"epoch 1, step 1: a weight is not finite. Then layers.0.weight is -?inf in row 0, col"
    assert re.match(found, str(caught.value))
    assert "The steps may be too large" in str(caught.value)


def test_squares_of_gradients_that_overflow_leave_a_note(device, rng):
    X = rng.random((40, 3)).astype(np.float32)
    model, Y = Linear(3, 1, device=device), X[:, :1].copy()
    X[:, 2] = 1e25
    history = gpuml.train(model, X, Y, n_epochs=1, batch_size=None, engine="eager")
    assert any("v of the optimizer overflowed" in note for note in history.notes)
    assert np.isfinite(to_host(model.parameters.flat)).all()


def test_private_training_does_not_take_nan_for_a_row_that_is_not_there(device, rng):
    pytest.importorskip("dp_accounting")
    X, Y = rng.random((50, 3)), rng.random((50, 2))
    Y[9, 0] = math.nan
    with pytest.raises(gpuml.DataError, match="must be finite, and row 9, column 0 of y is not"):
        gpuml.train(Linear(3, 2, device=device), X, Y, privacy=Privacy(noise_multiplier=1.0))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_attack_does_not_bring_infinity_back_into_the_range(device, tmp_path, value):
    case = Case("adversarial", device, tmp_path)
    case.X[ROW, COLUMN] = value
    found = case.fails(gpuml.DataError, adversarial=PGD(0.1))
    assert f"{PLACE} is {value:g} in float32, outside bounds=(0.0, 1.0)" in found


@pytest.mark.parametrize("bounds", [(0, 1), None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_attacks_refuse_numbers_that_are_not_finite(device, tmp_path, value, bounds):
    case = Case("eager", device, tmp_path)
    X, y, model = case.X.copy(), case.y, case.model
    X[ROW, COLUMN] = value
    for attack in (fgsm, pgd, adversarial_accuracy):
        with pytest.raises(gpuml.DataError, match=f"must be finite, and {PLACE} is not"):
            attack(model, X, y, 0.1, bounds=bounds)
    model.parameters["layers.1.weight"][1, 2] = value
    for attack in (fgsm, pgd, adversarial_accuracy):
        with pytest.raises(ValueError, match=f"and layers.1.weight is {value:g} in row 1, column"):
            attack(model, case.X, y, 0.1, bounds=bounds)


def test_the_search_stops_after_a_while(device, rng, monkeypatch):
    monkeypatch.setattr(faults, "SECONDS", 0.0)
    seen = []

    def loss(predictions, targets):
        seen.append(len(targets))
        return mean_squared_error(predictions, targets)

    from gpuml.batches import ArrayBatches

    model = Linear(3, 1, device=device)
    data = ArrayBatches(*map(device.asarray, (rng.random((90, 3)), rng.random((90, 1)))), 30)
    parameters = Parameters(model.parameters.flat, model.parameters.shapes)
    assert faults.fault_in_steps(model, parameters, loss, data, {}) is None
    assert seen == [30]


def test_an_error_in_the_search_does_not_hide_what_is_known(device, tmp_path, monkeypatch):
    case = Case("eager", device, tmp_path)
    broken = RuntimeError("out of memory")

    def fails(*_, **__):
        raise broken

    monkeypatch.setattr("gpuml.training.fault_in_steps", fails)
    case.X[ROW, COLUMN] = 3e38
    assert "epoch 1, step 3: the loss is " in case.fails(shuffle=False)
