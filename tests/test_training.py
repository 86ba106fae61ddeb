from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import threadpoolctl
from sklearn.linear_model import LinearRegression, LogisticRegression

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


def test_data_on_a_gpu_and_a_model_on_the_cpu_are_refused(device, rng):
    if device.kind == "cpu":
        pytest.skip("needs two devices")
    X, y = (device.asarray(a) for a in small_problem(rng))
    with pytest.raises(TypeError, match=r"model\.to\(.gpu:0.\)"):
        gpuml.train(MLP([4, 8, 2], device="cpu"), X, y)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_divergence_ends_at_once_with_the_place_and_the_cure(device, rng, bad):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    steps = []

    def failing(predictions, labels):
        steps.append(len(steps))
        value, gradient = softmax_cross_entropy(predictions, labels)
        return (value * float(bad) if len(steps) == 9 else value), gradient

    with pytest.raises(gpuml.DivergenceError) as caught:
        gpuml.train(model, X, y, loss=failing, n_epochs=5, batch_size=16, optimizer=Adam(0.02))
    text = str(caught.value)  # 60 samples in 4 batches: the 9th step is the first of epoch 3
    assert f"epoch 3, step 1: the loss is {bad}" in text
    assert "learning_rate=0.002 instead of 0.02" in text
    assert len(steps) <= 12, "no further epoch"
    assert len(caught.value.history) == 2

    twin = MLP([4, 8, 2], device=device)
    gpuml.train(twin, X, y, n_epochs=2, batch_size=16, optimizer=Adam(0.02))
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

    with pytest.raises(KeyboardInterrupt) as caught:
        gpuml.train(model, X, y, loss=interrupted, n_epochs=5, batch_size=16)
    assert isinstance(caught.value, gpuml.TrainingInterrupted)
    assert len(caught.value.history) == 2
    twin = MLP([4, 8, 2], device=device)
    gpuml.train(twin, X, y, n_epochs=2, batch_size=16)
    np.testing.assert_array_equal(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat)
    )


def test_history_and_weights_agree_wherever_ctrl_c_comes(device, rng, monkeypatch):
    X, y = small_problem(rng)
    model = MLP([4, 8, 2], device=device)
    keep = training._Good.keep

    def interrupted(self, epoch):
        if epoch == 3:
            raise KeyboardInterrupt  # the row of epoch 3 is written, its weights are not kept
        keep(self, epoch)

    monkeypatch.setattr(training._Good, "keep", interrupted)
    with pytest.raises(gpuml.TrainingInterrupted) as caught:
        gpuml.train(model, X, y, n_epochs=5, batch_size=16)
    history = caught.value.history
    assert [len(column) for column in history.columns.values()] == [2] * len(history.columns)
    monkeypatch.undo()
    twin = MLP([4, 8, 2], device=device)
    gpuml.train(twin, X, y, n_epochs=2, batch_size=16)
    np.testing.assert_array_equal(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat)
    )


def test_long_epochs_are_looked_at_while_they_run(device, rng, monkeypatch):
    monkeypatch.setattr(training, "HEARTBEAT", 0.0)
    X, y = small_problem(rng)
    steps = []

    def failing(predictions, labels):
        steps.append(0)
        value, gradient = softmax_cross_entropy(predictions, labels)
        return value * math.nan, gradient

    with pytest.raises(gpuml.DivergenceError, match="epoch 1, step 1"):
        gpuml.train(MLP([4, 8, 2], device=device), X, y, loss=failing, batch_size=1)
    assert len(steps) == 1


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
