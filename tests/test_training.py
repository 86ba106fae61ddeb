from __future__ import annotations

import csv
import math
import re
import sys

import numpy as np
import pytest
import threadpoolctl
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier

import gpuml
from gpuml import MLP, Adam, GradientDescent, Linear, devices, training
from gpuml.losses import softmax_cross_entropy


@pytest.fixture
def digits():
    """Prepared digits on the host: X_train, X_test, y_train, y_test."""
    data = gpuml.load_dataset("digits")
    X_train, X_test, y_train, y_test = gpuml.split(data.X, data.y, stratify=True)
    prepare = gpuml.Preprocessing.fit(X_train, y_train, "classification", same_unit=True)
    return (
        prepare.features(X_train),
        prepare.features(X_test),
        prepare.targets(y_train),
        prepare.targets(y_test),
    )


def small_problem(rng, n=60):
    X = rng.normal(size=(n, 4)).astype(np.float32)
    return X, (X[:, 0] + X[:, 1] > 0).astype(np.int64)


def reference_training(model, X, y, rate, momentum, n_epochs, batch_size, seed):
    """The same training of a 64-…-10 MLP, written out in float64 without the package."""
    W1, b1, W2, b2 = (np.array(p, dtype=np.float64) for p in model.parameters.values())
    velocities = [np.zeros_like(p) for p in (W1, b1, W2, b2)]
    generator = np.random.default_rng(seed)
    losses = []
    for _ in range(n_epochs):
        order, total = generator.permutation(len(X)), 0.0
        for start in range(0, len(X), batch_size):
            rows = order[start : start + batch_size]
            x, t = X[rows].astype(np.float64), np.eye(10)[y[rows]]
            h = np.maximum(x @ W1 + b1, 0)
            z = h @ W2 + b2
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            total -= np.log(p[t == 1]).sum()
            d = (p - t) / len(rows)
            d_h = d @ W2.T * (h > 0)
            gradients = x.T @ d_h, d_h.sum(0, keepdims=True), h.T @ d, d.sum(0, keepdims=True)
            for w, v, g in zip((W1, b1, W2, b2), velocities, gradients, strict=True):
                v *= momentum
                v += g
                w -= rate * v
        losses.append(total / len(X))
    return np.concatenate([w.ravel() for w in (W1, b1, W2, b2)]), losses


def test_training_is_what_a_page_of_numpy_does(device, digits):
    X, _, y, _ = digits
    model = MLP([64, 32, 10], seed=1, device="cpu")
    weights, losses = reference_training(model, X, y, 0.05, 0.9, 2, 100, seed=5)
    history = gpuml.train(
        model.to(device),
        device.asarray(X),
        device.asarray(y),
        optimizer=GradientDescent(0.05, momentum=0.9),
        n_epochs=2,
        batch_size=100,
        seed=5,
    )
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(gpuml.to_host(model.parameters.flat), weights, rtol=1e-3, atol=1e-4)


def test_digits_are_learned(device, digits):
    X, X_test, y, y_test = digits
    model = MLP([64, 128, 10], device=device)
    history = gpuml.train(model, X, y, n_epochs=30, validation_data=(X_test, y_test))
    assert history["validation_accuracy"][-1] >= 0.97
    measured = gpuml.evaluate(model, X_test, y_test)
    assert measured["accuracy"] == pytest.approx(history["validation_accuracy"][-1])
    assert measured["loss"] == pytest.approx(history["validation_loss"][-1], rel=1e-5)
    guesses = gpuml.predict(model, X_test).argmax(axis=1)
    assert np.mean(guesses == y_test) == pytest.approx(measured["accuracy"])


def test_least_squares_is_found(device, rng):
    X = rng.normal(size=(200, 3))
    Y = X @ rng.normal(size=(3, 2)) + 5 + 0.1 * rng.normal(size=(200, 2))
    model = Linear(3, 2, dtype=np.float64, device=device)
    gpuml.train(model, X, Y, optimizer=GradientDescent(0.3), n_epochs=400, batch_size=None)
    exact = LinearRegression().fit(X, Y)
    np.testing.assert_allclose(gpuml.to_host(model.parameters["weight"]), exact.coef_.T, rtol=1e-9)
    np.testing.assert_allclose(
        gpuml.to_host(model.parameters["bias"])[0], exact.intercept_, rtol=1e-9
    )


def test_softmax_regression_agrees_with_scikit_learn(device, rng):
    X, y = small_problem(rng, 300)
    X = X.astype(np.float64)
    y = (y + (X[:, 2] > 0.5)).astype(np.int64)
    y[:30] = rng.integers(3, size=30)  # noise, so that the optimum is finite
    model = Linear(4, 3, dtype=np.float64, device=device)
    gpuml.train(model, X, y, optimizer=GradientDescent(1.0), n_epochs=3000, batch_size=None)
    exact = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(X, y)
    outputs = gpuml.predict(model, X)
    outputs = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        outputs / outputs.sum(axis=1, keepdims=True), exact.predict_proba(X), atol=1e-4
    )


def test_the_same_seed_gives_the_same_bits(device, rng):
    X, y = small_problem(rng)

    def weights(seed):
        model = MLP([4, 8, 2], device=device)
        gpuml.train(model, X, y, n_epochs=3, batch_size=16, seed=seed)
        return gpuml.to_host(model.parameters.flat)

    np.testing.assert_array_equal(weights(1), weights(1))
    assert (weights(1) != weights(2)).any()


def test_the_loss_of_an_epoch_counts_each_sample_once(device, rng):
    X, y = small_problem(rng, 10)
    model = MLP([4, 8, 2], device=device)
    expected = gpuml.evaluate(model, X, y)["loss"]
    # so small a rate that the model stays; batches of 7 and 3
    history = gpuml.train(model, X, y, optimizer=GradientDescent(1e-12), n_epochs=1, batch_size=7)
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_evaluation_does_not_depend_on_its_chunks(device, rng, monkeypatch):
    X, y = small_problem(rng, 100)
    model = MLP([4, 8, 2], device=device)
    whole, outputs = gpuml.evaluate(model, X, y), gpuml.predict(model, X)
    monkeypatch.setattr(training, "EVALUATED_ROWS", 33)
    chunked = gpuml.evaluate(model, X, y)
    assert chunked["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert chunked["accuracy"] == whole["accuracy"]
    np.testing.assert_allclose(gpuml.predict(model, X), outputs, rtol=1e-5, atol=1e-6)


def test_a_loss_of_ones_own(device, rng):
    X = rng.normal(size=(40, 3))
    model = Linear(3, 1, dtype=np.float64, device=device)

    def absolute_error(predictions, targets):
        difference = predictions - targets
        xp = gpuml.array_module(difference)
        return abs(difference).mean(), xp.sign(difference) / difference.size

    history = gpuml.train(
        model, X, X[:, :1] * 2, loss=absolute_error, optimizer=Adam(0.05), n_epochs=200
    )
    assert history["loss"][-1] < 0.05 < history["loss"][0]
    assert "validation_accuracy" not in history.columns


def test_host_data_are_brought_to_the_model_and_predictions_come_home(device, rng):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    gpuml.train(model, X, y, n_epochs=1)
    assert isinstance(gpuml.predict(model, X), np.ndarray)
    there = gpuml.predict(model, device.asarray(X))
    assert gpuml.device_of(there) == device


def test_both_devices_train_the_same_model(device, digits):
    X, _, y, _ = digits
    here, there = MLP([64, 32, 10], device="cpu"), MLP([64, 32, 10], device=device)
    for model in (here, there):
        gpuml.train(model, X, y, n_epochs=1, optimizer=GradientDescent(0.05, momentum=0.9))
    np.testing.assert_allclose(
        gpuml.to_host(there.parameters.flat), here.parameters.flat, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("optimizer", [GradientDescent(0.05, momentum=0.9), Adam(0.001)])
@pytest.mark.parametrize("kind", ["MLP", "Linear", "numbers"])
def test_five_epochs_on_both_devices_lead_to_the_same_weights(device, digits, kind, optimizer):
    X, _, y, _ = digits
    if kind == "numbers":
        y = X[:, 20:24] + np.float32(0.1) * y[:, None]
    weights = []
    for place in ("cpu", device):
        model = MLP([64, 32, 10], device=place)
        if kind != "MLP":
            model = Linear(64, 10 if kind == "Linear" else 4, device=place)
        gpuml.train(model, X, y, n_epochs=5, optimizer=optimizer)
        weights.append(gpuml.to_host(model.parameters.flat))
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_data_on_a_gpu_and_a_model_on_the_cpu_are_refused(device, rng):
    if device.kind == "cpu":
        pytest.skip("needs two devices")
    X, y = (device.asarray(a) for a in small_problem(rng))
    with pytest.raises(TypeError, match=r"model\.to\(.gpu:0.\)"):
        gpuml.train(MLP([4, 8, 2], device="cpu"), X, y)


@pytest.mark.parametrize(
    ("heartbeat", "n_epochs"),
    [(0, 5), (training.HEARTBEAT, 10**6), (1e9, 5)],  # in each step, now and then, at the end
)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_divergence_ends_at_once_with_the_place_and_the_cure(
    device, rng, monkeypatch, bad, heartbeat, n_epochs
):
    monkeypatch.setattr(training, "HEARTBEAT", heartbeat)
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    steps = []

    def failing(predictions, labels):
        steps.append(len(steps))
        value, gradient = softmax_cross_entropy(predictions, labels)
        return (value * float(bad) if len(steps) == 9 else value), gradient

    # A graph would call the function twice, however many steps there are.
    options = {"batch_size": 16, "optimizer": Adam(0.02), "engine": "eager"}
    with pytest.raises(gpuml.DivergenceError) as caught:
        gpuml.train(model, X, y, loss=failing, n_epochs=n_epochs, **options)
    text = str(caught.value)  # 60 samples in 4 batches: the 9th step is the first of epoch 3
    assert f"epoch 3, step 1: the loss is {bad}, which is not finite" in text
    assert "learning_rate=0.002 instead of 0.02" in text
    if heartbeat == 0:
        # The place is looked for in the four batches, by weights that stay as they are.
        assert len(steps) == 9 + 4, "no further step"
    assert len(caught.value.history) == 2

    twin = MLP([4, 8, 2], device=device)
    gpuml.train(twin, X, y, n_epochs=2, **options)
    np.testing.assert_array_equal(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat)
    )


def test_weights_that_overflow_in_the_last_step_are_noticed(device, rng):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    before = gpuml.to_host(model.parameters.flat).copy()
    with pytest.raises(gpuml.DivergenceError, match="epoch 1, step 1: a weight is not finite"):
        gpuml.train(
            model, X * np.float32(1e18), y, optimizer=GradientDescent(1e38), batch_size=None
        )
    np.testing.assert_array_equal(gpuml.to_host(model.parameters.flat), before)


def test_data_that_are_not_finite_are_named_as_the_cause(device, rng):
    X, y = small_problem(rng)
    X[17, 2] = np.nan
    with pytest.raises(gpuml.DivergenceError, match=r"since row 17, column 2 of X is not"):
        gpuml.train(MLP([4, 8, 2], device=device), X, y, batch_size=None)
    targets = rng.normal(size=60)
    targets[5] = np.inf
    X[17, 2] = 0
    with pytest.raises(gpuml.DivergenceError, match=r"since row 5, column 0 of y is not"):
        gpuml.train(MLP([4, 8, 1], device=device), X, targets)
    held_out = X.copy()
    held_out[3, 1] = np.nan
    message = r"epoch 1, step 1: the validation loss is not finite, since row 3, column 1 of X of"
    with pytest.raises(gpuml.DivergenceError, match=message):
        gpuml.train(
            MLP([4, 8, 2], device=device), X, y, validation_data=(held_out, y), batch_size=None
        )


def test_numbers_too_large_for_the_model_are_named_as_the_cause(device, rng, recwarn):
    X, y = small_problem(rng)
    X = X.astype(np.float64)
    X[0, 3] = -1e300
    message = r"row 0, column 3 of X is not: -1e\+300 is too large for float32"
    with pytest.raises(gpuml.DivergenceError, match=message):
        gpuml.train(MLP([4, 8, 2], device=device), X, y, batch_size=None)
    assert not recwarn.list


def test_a_batch_that_is_not_finite_is_named(device, rng):
    X, y = small_problem(rng)
    bad = X[40:].copy()
    bad[7, 1] = np.nan
    source = [(X[:20], y[:20]), (X[20:40], y[20:40]), (bad, y[40:])]
    message = r"epoch 1, step 3.* since row 7, column 1 of x in batch 2 \(counted from 0\) is not"
    with pytest.raises(gpuml.DivergenceError, match=message):
        gpuml.train(MLP([4, 8, 2], device=device), source)


def test_a_validation_loss_that_overflows_is_no_success(device, rng):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    before = gpuml.to_host(model.parameters.flat).copy()
    with pytest.raises(gpuml.DivergenceError, match="the validation loss is not finite"):
        gpuml.train(
            model, X, y, optimizer=Adam(1e25), n_epochs=1, batch_size=None, validation_data=(X, y)
        )
    np.testing.assert_array_equal(gpuml.to_host(model.parameters.flat), before)


def test_ctrl_c_leaves_the_last_finished_epoch(device, rng):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    steps = []

    def interrupted(predictions, labels):
        steps.append(0)
        if len(steps) == 11:  # in the third epoch of four steps
            raise KeyboardInterrupt
        return softmax_cross_entropy(predictions, labels)

    options = {"batch_size": 16, "engine": "eager"}
    with pytest.raises(KeyboardInterrupt) as caught:
        gpuml.train(model, X, y, loss=interrupted, n_epochs=5, **options)
    assert isinstance(caught.value, gpuml.TrainingInterrupted)
    assert len(caught.value.history) == 2
    twin = MLP([4, 8, 2], device=device)
    gpuml.train(twin, X, y, n_epochs=2, **options)
    np.testing.assert_array_equal(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat)
    )


@pytest.mark.parametrize("seldom", [True, False], ids=["looked at seldom", "looked at often"])
@pytest.mark.parametrize("validated", [True, False], ids=["validated", "not validated"])
def test_history_and_weights_agree_wherever_ctrl_c_comes(
    device, rng, monkeypatch, validated, seldom
):
    """Ctrl-C before each line of what runs between two steps, one after the other."""
    monkeypatch.setattr(training, "HEARTBEAT", 1e9 if seldom else 0.0)
    X, y = small_problem(rng, 20)
    options = {"validation_data": (X, y)} if validated else {}
    options |= {"batch_size": 10, "engine": "eager"}
    methods = ["_Run.train", "_Run._one_epoch", "_Run._note", "_Run.look", "History.append"]
    methods += ["_Run._measure"] * validated
    watched = dict.fromkeys(methods, 0)

    def run(n_epochs, at=None):
        """Return weights and history; stopped before that line, counted through the run."""
        model, count = MLP([4, 3, 2], device=device), 0

        def trace(frame, event, _):
            nonlocal count
            name = frame.f_code.co_qualname
            if name not in methods:
                return None
            if event == "line":
                count += 1
                watched[name] += 1
                if count == at:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        try:
            sys.settrace(trace)
            history = gpuml.train(model, X, y, n_epochs=n_epochs, **options)
        except gpuml.TrainingInterrupted as error:
            history = error.history
        except KeyboardInterrupt:
            history = None  # before training began
        finally:
            sys.settrace(before)
        return gpuml.to_host(model.parameters.flat), history, count

    expected = {n: run(n) for n in (1, 2, 3)}
    expected[0] = gpuml.to_host(MLP([4, 3, 2], device=device).parameters.flat), None, 0
    lines = expected[3][2]
    assert all(watched.values())
    reached = set()
    for at in range(1, lines + 1):
        weights, history, _ = run(3, at)
        n = 0 if history is None else len(history)
        reached.add(n)
        np.testing.assert_array_equal(weights, expected[n][0], err_msg=f"{at}: {n} epochs")
        if n:
            columns = expected[3][1].columns.keys()
            assert {k: len(v) for k, v in history.columns.items()} == dict.fromkeys(columns, n)
            assert history["loss"] == expected[3][1]["loss"][:n], at
    assert reached == {0, 1, 2, 3}


def test_long_epochs_are_looked_at_while_they_run(device, rng, monkeypatch):
    monkeypatch.setattr(training, "HEARTBEAT", 0.0)
    X, y = small_problem(rng)
    steps = []

    def failing(predictions, labels):
        steps.append(0)
        value, gradient = softmax_cross_entropy(predictions, labels)
        return value * math.nan, gradient

    options = {"loss": failing, "batch_size": 1, "engine": "eager"}
    with pytest.raises(gpuml.DivergenceError, match="epoch 1, step 1"):
        gpuml.train(MLP([4, 8, 2], device=device), X, y, **options)
    assert len(steps) == 1 + 1, "a step, and a look for the place"


def test_the_progress_bar_is_shown_only_when_wanted(device, rng, capsys, monkeypatch):
    X, y = small_problem(rng)
    gpuml.train(MLP([4, 8, 2], device=device), X, y, n_epochs=3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(training, "HEARTBEAT", 0.0)
    gpuml.train(
        MLP([4, 8, 2], device=device),
        X,
        y,
        n_epochs=3,
        batch_size=16,
        progress=True,
        validation_data=(X, y),
    )
    shown = capsys.readouterr().err
    assert "epoch 3/3" in shown
    assert "12/12" in shown
    assert "val_accuracy" in shown


def test_numpy_does_not_warn_about_what_train_reports(device, rng, recwarn):
    X, y = small_problem(rng)
    with pytest.raises(gpuml.DivergenceError):
        gpuml.train(MLP([4, 8, 2], device=device), X, y, optimizer=GradientDescent(1e30))
    assert not recwarn.list


def blas_threads_now():
    pools = threadpoolctl.threadpool_info()
    return {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}


def test_blas_threads_are_one_during_small_training_and_restored(rng):
    X, y = small_problem(rng)
    seen = set()

    def watching(predictions, labels):
        seen.update(blas_threads_now())
        return softmax_cross_entropy(predictions, labels)

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        gpuml.train(MLP([4, 8, 2], device="cpu"), X, y, loss=watching, n_epochs=1)
        after = blas_threads_now()
    assert seen == {1}
    assert after == {2}
    assert devices.SERIAL_PRODUCT > 2 * 64 * 4 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_epochs": 0}, "n_epochs must be a positive integer"),
        ({"n_epochs": 1.5}, "n_epochs must be a positive integer"),
        ({"n_epochs": "5"}, "n_epochs must be a positive integer, got '5'"),
        ({"n_epochs": None}, "n_epochs must be a positive integer, got None"),
        ({"n_epochs": math.nan}, "n_epochs must be a positive integer, got nan"),
        ({"n_epochs": math.inf}, "n_epochs must be a positive integer, got inf"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"batch_size": -4}, "batch_size must be a positive integer"),
        ({"loss": "cross-entropy"}, "did you mean 'cross_entropy'"),
        ({"optimizer": "adamm"}, "did you mean 'adam'"),
        ({"y": np.zeros(59, int)}, "X has 60 rows, y has 59"),
        ({"y": np.full(60, 2)}, "labels must be from 0 to 1"),
        ({"y": np.full(60, -1)}, "labels must be from 0 to 1"),
        ({"y": np.zeros((60, 3))}, r"\(60, 3\).*\(60, 2\)"),
        ({"y": np.zeros(60), "loss": "cross_entropy"}, "integer labels"),
        ({"X": np.zeros((60, 5))}, r"\(batch, 4\)"),
        ({"X": np.zeros(60)}, "expected \\(n_samples, n_features\\)"),
        ({"X": np.zeros((0, 4)), "y": np.zeros(0, int)}, "not empty"),
        ({"validation_data": (np.zeros((3, 4)), np.zeros(2, int))}, "X has 3 rows, y has 2"),
        ({"validation_data": (np.zeros((3, 4)),)}, "must be a pair"),
        ({"validation_data": 0.2}, "must be a pair"),
        ({"validation_data": np.zeros((2, 4))}, "must be a pair"),
        ({"y": np.zeros(60, bool)}, r"integers: y\.astype\(int\)"),
    ],
)
def test_wrong_calls_are_explained(device, rng, change, message):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    before = gpuml.to_host(model.parameters.flat).copy()
    with pytest.raises(ValueError, match=message):
        gpuml.train(model, **({"X": X, "y": y} | change))
    np.testing.assert_array_equal(gpuml.to_host(model.parameters.flat), before)


def test_a_history_prints_exports_and_plots_itself(device, rng, tmp_path):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    history = gpuml.train(model, X, y, n_epochs=3, batch_size=100, validation_data=(X, y))
    assert (len(history), history.n_steps, history.batch_size) == (3, 3, 60)
    assert history.engine == "eager"
    assert history.device == str(device)
    assert history.samples_per_second == pytest.approx(3 * 60 / history.seconds)
    assert history["epoch"] == [1, 2, 3]
    assert sorted(history["seconds"]) == history["seconds"]

    lines = str(history).splitlines()
    assert lines[0].split() == list(history.columns)
    assert len({len(line) for line in lines}) == 1, "columns are aligned"

    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == history["loss"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]

    figure = history.plot()
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "accuracy"]
    loss_lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert loss_lines == {"training": history["loss"], "held out": history["validation_loss"]}
    assert str(device) in figure.get_supxlabel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": MLP}, r"not its class: MLP\(…\)"),
        ({"model": np.zeros((60, 4))}, r"expected a model, got ndarray: gpuml\.train\(model, X"),
        ({"X": np.zeros((60, 4)).astype(str)}, "X must hold real numbers, got <U"),
        ({"X": np.zeros((60, 4), object)}, "X must hold real numbers, got object"),
        ({"X": np.zeros((60, 4), complex)}, "X must hold real numbers, got complex128"),
        ({"X": np.zeros((60, 4), "M8[s]")}, "X must hold real numbers, got datetime64"),
        ({"X": np.ma.masked_array(np.eye(60, 4), np.eye(60, 4))}, "X has masked numbers"),
        ({"y": np.zeros((60, 2), complex)}, "y must hold real numbers, got complex128"),
        ({"loss": 3}, "expected the name of a loss or a function .*, got 3"),
        ({"optimizer": 3}, "expected the name of an optimizer, or an object .*, got 3"),
    ],
)
def test_calls_of_the_wrong_type_are_explained(rng, change, message):
    X, y = small_problem(rng)
    with pytest.raises(TypeError, match=message):
        gpuml.train(**({"model": MLP([4, 8, 2], device="cpu"), "X": X, "y": y} | change))


def test_predict_takes_numbers_alone(rng):
    X, _ = small_problem(rng)
    with pytest.raises(TypeError, match="X must hold real numbers, got <U"):
        gpuml.predict(MLP([4, 8, 2], device="cpu"), X.astype(str))


def test_slips_of_the_hand_are_named(device, rng):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    with pytest.raises(TypeError, match=r"not its class: Adam\(\)"):
        gpuml.train(model, X, y, optimizer=Adam)
    with pytest.raises(TypeError, match="got list"):
        gpuml.train(model, X, list(y))
    with pytest.raises(ValueError, match="not empty"):
        gpuml.predict(model, X[:0])
    assert len(gpuml.train(model, X, y, n_epochs=2.0, batch_size=30.0)) == 2
    whole_numbers = Linear(4, 1, device=device)
    with pytest.raises(ValueError, match='loss="mean_squared_error"'):
        gpuml.train(whole_numbers, X, y)
    gpuml.train(whole_numbers, X, y, loss="mean_squared_error")
    gpuml.train(Linear(4, 2, device=device), X, rng.integers(9, size=(60, 2)))  # not labels


def test_evaluation_limits_blas_threads_too(rng):
    X, y = small_problem(rng)
    seen = set()

    def watching(predictions, labels):
        seen.update(blas_threads_now())
        return softmax_cross_entropy(predictions, labels)

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        gpuml.evaluate(MLP([4, 8, 2], device="cpu"), X, y, loss=watching)
    assert seen == {1}


# --- against scikit-learn --------------------------------------------------------------------


def test_weight_decay_is_ridge_regression(device, rng):
    """Mean of squares + decay / 2 · |W|² is Ridge's sum of squares + alpha |W|², over n."""
    X = rng.normal(size=(120, 5))
    y = X @ rng.normal(size=5) + 3 + 0.5 * rng.normal(size=120)
    alpha = 20.0
    model = Linear(5, 1, dtype=np.float64, device=device)
    optimizer = GradientDescent(0.1, momentum=0.5, weight_decay=2 * alpha / 120)
    gpuml.train(model, X, y, optimizer=optimizer, n_epochs=500, batch_size=None)
    exact = Ridge(alpha=alpha).fit(X, y)
    weight, bias = (gpuml.to_host(model.parameters[name]) for name in ("weight", "bias"))
    np.testing.assert_allclose(weight[:, 0], exact.coef_, rtol=1e-8)
    np.testing.assert_allclose(bias[0, 0], exact.intercept_, rtol=1e-8)
    free = LinearRegression().fit(X, y)
    assert abs(free.coef_ - exact.coef_).max() > 0.05, "the decay matters"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_epoch_of_a_network_is_that_of_scikit_learn(device, rng, momentum):
    X = rng.normal(size=(205, 6))
    y = rng.integers(3, size=205)
    reference = MLPClassifier(
        (8,),
        solver="sgd",
        alpha=0.0,
        batch_size=20,
        learning_rate_init=0.05,
        momentum=momentum,
        nesterovs_momentum=False,
        shuffle=False,
        max_iter=1,
        random_state=0,
        warm_start=True,
    )
    model = MLP([6, 8, 3], dtype=np.float64, device=device)
    start = [gpuml.to_host(p).copy() for p in model.parameters.values()]

    # It begins with these weights instead of its own random ones.
    initialize = MLPClassifier._initialize

    def begin(self, *arguments):
        initialize(self, *arguments)
        self.coefs_ = [start[0].copy(), start[2].copy()]
        self.intercepts_ = [start[1][0].copy(), start[3][0].copy()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLPClassifier, "_initialize", begin)
        reference.fit(X, y)
    optimizer = GradientDescent(0.05, momentum=momentum)
    history = gpuml.train(
        model, X, y, optimizer=optimizer, n_epochs=1, batch_size=20, shuffle=False
    )
    parts = zip(reference.coefs_, reference.intercepts_, strict=True)
    expected = np.concatenate([part.ravel() for pair in parts for part in pair])
    np.testing.assert_allclose(gpuml.to_host(model.parameters.flat), expected, atol=1e-5, rtol=0)
    assert abs(expected - np.concatenate([p.ravel() for p in start])).max() > 0.01
    assert history["loss"][0] == pytest.approx(reference.loss_, rel=1e-6)


# --- against PyTorch -------------------------------------------------------------------------

RATES = {
    "descent": (GradientDescent(0.05), "SGD", {"lr": 0.05}),
    "momentum": (GradientDescent(0.05, momentum=0.9), "SGD", {"lr": 0.05, "momentum": 0.9}),
    "Adam": (Adam(0.01), "Adam", {"lr": 0.01}),
    "decay": (
        GradientDescent(0.05, momentum=0.9, weight_decay=0.1),
        "SGD",
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    ),
    "AdamW": (Adam(0.01, weight_decay=0.1), "AdamW", {"lr": 0.01, "weight_decay": 0.1}),
}


def torch_layers(torch, model):
    """The same layers in PyTorch, and groups of weights, which decay, and biases."""
    layers = []
    for weight, bias in model.layers:
        W, b = (torch.tensor(gpuml.to_host(model.parameters[name])) for name in (weight, bias))
        layer = torch.nn.Linear(*W.shape, dtype=W.dtype)
        layer.weight, layer.bias = torch.nn.Parameter(W.T.clone()), torch.nn.Parameter(b[0].clone())
        layers += [layer, torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    named = list(network.named_parameters())
    groups = [{"params": [p for name, p in named if name.endswith("weight")]}]
    return network, [*groups, {"params": [p for n, p in named if n.endswith("bias")]}]


@pytest.mark.parametrize("case", RATES)
@pytest.mark.parametrize("task", ["classes", "numbers"])
def test_epochs_are_those_of_pytorch(device, rng, case, task):
    torch = pytest.importorskip("torch")
    X = rng.normal(size=(205, 6))
    y = rng.integers(3, size=205) if task == "classes" else rng.normal(size=(205, 3))
    model = MLP([6, 8, 5, 3], dtype=np.float64, device=device)
    optimizer, name, options = RATES[case]
    network, groups = torch_layers(torch, model)
    groups[1]["weight_decay"] = 0.0
    theirs = getattr(torch.optim, name)(groups, **options)
    measure = torch.nn.CrossEntropyLoss() if task == "classes" else torch.nn.MSELoss()
    generator, losses = np.random.default_rng(4), []
    for _ in range(3):
        order, total = generator.permutation(205), 0.0
        for start in range(0, 205, 20):
            rows = order[start : start + 20]
            value = measure(network(torch.tensor(X[rows])), torch.tensor(y[rows]))
            theirs.zero_grad()
            value.backward()
            theirs.step()
            total += float(value.detach()) * len(rows)
        losses.append(total / 205)
    history = gpuml.train(model, X, y, optimizer=optimizer, n_epochs=3, batch_size=20, seed=4)
    assert history["loss"] == pytest.approx(losses, rel=1e-9)
    parts = [p.detach().numpy().T.ravel() for p in network.parameters()]
    np.testing.assert_allclose(
        gpuml.to_host(model.parameters.flat), np.concatenate(parts), rtol=1e-7, atol=1e-9
    )


# --- validation, patience, divergence --------------------------------------------------------


def numbers_to_predict(rng, n=80):
    X = rng.normal(size=(n, 3))
    return X, X @ rng.normal(size=(3, 2)) * [1, 5] + [0, 3] + 0.1 * rng.normal(size=(n, 2))


def test_validation_of_numbers_has_r2(device, rng, monkeypatch):
    X, Y = numbers_to_predict(rng)
    model = Linear(3, 2, dtype=np.float64, device=device)
    for rows in (7, 8192):  # in several batches, and in one
        monkeypatch.setattr(training, "EVALUATED_ROWS", rows)
        history = gpuml.train(model, X[:50], Y[:50], validation_data=(X[50:], Y[50:]), n_epochs=3)
        assert "validation_accuracy" not in history.columns
        residual = ((gpuml.predict(model, X[50:]) - Y[50:]) ** 2).sum(axis=0)
        total = ((Y[50:] - Y[50:].mean(axis=0)) ** 2).sum(axis=0)
        expected = (1 - residual / total).mean()
        assert history["validation_r2"][-1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("task", ["classes", "numbers"])
def test_a_validation_set_of_one_row(device, rng, task):
    X, Y = numbers_to_predict(rng)
    y, model = (Y, Linear(3, 2, device=device))
    if task == "classes":
        y, model = rng.integers(2, size=80), MLP([3, 4, 2], device=device)
    history = gpuml.train(model, X, y, validation_data=(X[:1], y[:1]), n_epochs=2)
    assert np.isfinite(history["validation_loss"]).all()
    if task == "classes":
        assert set(history["validation_accuracy"]) <= {0.0, 1.0}
    else:
        assert history["validation_r2"] == [0.0, 0.0], "as scikit-learn's constant targets"


def test_an_empty_validation_set_is_refused(device, rng):
    X, Y = numbers_to_predict(rng)
    model = Linear(3, 2, device=device)
    with pytest.raises(ValueError, match=r"shape \(0, 3\), .*not empty"):
        gpuml.train(model, X, Y, validation_data=(X[:0], Y[:0]))
    assert not gpuml.to_host(model.parameters.flat).any()


@pytest.mark.parametrize("engine", ["eager", "one_pass"])
def test_a_last_batch_of_one_row(device, rng, engine):
    X, Y = numbers_to_predict(rng, 81)
    model, twin = (Linear(3, 2, dtype=np.float64, device=device) for _ in range(2))
    options = {"optimizer": GradientDescent(0.05), "n_epochs": 1, "shuffle": False}
    history = gpuml.train(model, X, Y, batch_size=20, engine=engine, **options)
    assert history.n_steps == 5
    for start in range(0, 81, 20):
        rows = slice(start, start + 20)
        gpuml.train(twin, X[rows], Y[rows], batch_size=None, **options)
    np.testing.assert_allclose(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat), rtol=1e-10
    )


def test_patience_stops_and_takes_the_best_weights(device, rng):
    X, y = small_problem(rng, 40)
    y_wrong = rng.integers(2, size=40)  # labels that say nothing: soon learned by heart
    options = {"optimizer": Adam(0.05), "batch_size": 10, "validation_data": (X[20:], y_wrong[20:])}
    options["engine"] = "eager"  # for bits to be equal, however many epochs there are
    model = MLP([4, 16, 2], device=device)
    history = gpuml.train(model, X[:20], y_wrong[:20], n_epochs=200, patience=4, **options)
    best = history.best_epoch()
    assert len(history) == best + 4 < 200
    assert history.notes == [f"stopped early: not better since epoch {best}"]
    twin = MLP([4, 16, 2], device=device)
    gpuml.train(twin, X[:20], y_wrong[:20], n_epochs=best, **options)
    np.testing.assert_array_equal(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat)
    )
    # Without running out of patience the best weights are taken as well.
    third = MLP([4, 16, 2], device=device)
    shorter = gpuml.train(third, X[:20], y_wrong[:20], n_epochs=best + 2, patience=4, **options)
    assert (len(shorter), shorter.notes) == (best + 2, [])
    np.testing.assert_array_equal(
        gpuml.to_host(third.parameters.flat), gpuml.to_host(twin.parameters.flat)
    )
    with pytest.raises(ValueError, match="patience needs validation_data"):
        gpuml.train(model, X, y, patience=3)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("engine", ["eager", "one_pass", "gram"])
def test_a_linear_model_that_diverges_learns_the_largest_stable_rate(device, rng, engine, momentum):
    X, Y = numbers_to_predict(rng)
    options = {"n_epochs": 5000, "batch_size": None, "engine": engine}

    def loss(rate):
        model = Linear(3, 2, dtype=np.float64, device=device)
        optimizer = GradientDescent(rate, momentum=momentum)
        return gpuml.train(model, X, Y, optimizer=optimizer, **options)["loss"][-1]

    with pytest.raises(gpuml.DivergenceError) as caught:
        loss(20.0)
    text = str(caught.value)
    assert re.search(r"step 1: (the loss is \S+, which|a weight) is not finite\. ", text)
    found = re.search("largest stable learning_rate is ([^,]+), yours is 20", text)
    rate = float(found.group(1))
    assert loss(rate) < 1, "it is stable"
    with pytest.raises(gpuml.DivergenceError):
        loss(rate * 1.15)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("decay", [0.5, 50.0])
def test_the_largest_stable_rate_counts_weight_decay(rng, momentum, decay):
    X, Y = numbers_to_predict(rng)

    def loss(rate):
        model = Linear(3, 2, bias=False, dtype=np.float64, device="cpu")
        optimizer = GradientDescent(rate, momentum=momentum, weight_decay=decay)
        options = {"optimizer": optimizer, "n_epochs": 5000, "batch_size": None}
        return gpuml.train(model, X, Y, **options)["loss"][-1]

    with pytest.raises(gpuml.DivergenceError) as caught:
        loss(20.0)
    rate = float(re.search("learning_rate is ([^,]+), yours is 20", str(caught.value)).group(1))
    assert np.isfinite(loss(rate)), "it is stable"
    with pytest.raises(gpuml.DivergenceError):
        loss(rate * 1.15)


def test_features_whose_squares_overflow_are_no_other_error(device):
    X = np.full((10, 2), 1e200)
    with pytest.raises(gpuml.DivergenceError, match="standardise the features"):
        gpuml.train(
            Linear(2, 1, dtype=np.float64, device=device), X, X[:, :1],
            optimizer=GradientDescent(0.1), batch_size=None,
        )  # fmt: skip
