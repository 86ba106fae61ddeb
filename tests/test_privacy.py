"""Private training: gradients row by row, the noise, the choice of rows, and what is spent."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import gpuml
from gpuml import MLP, GradientDescent, Linear, Model, to_host
from gpuml.batches import PoissonBatches
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.privacy import Privacy, clipped_sum, spent_epsilon
from gpuml.steps import Work

needs_accountant = pytest.mark.skipif(
    find_spec("dp_accounting") is None, reason="uv sync --extra privacy brings dp-accounting"
)


def problem(rng, n=60):
    X = rng.normal(size=(n, 5)) * rng.exponential(size=(n, 1))
    return X, rng.integers(3, size=n)


def mlp(device="cpu", dtype=np.float64, seed=1):
    return MLP([5, 8, 6, 3], seed=seed, dtype=dtype, device=device)


# --- gradients row by row ----------------------------------------------------------------------


def gradients_one_by_one(model, x, y, loss):
    """The gradient of each row by itself, made: the loss of a batch of one."""
    found = []
    for i in range(len(x)):
        predictions, backward = model.forward(model.parameters, x[i : i + 1])
        value, d = loss(predictions, y[i : i + 1])
        gradients, _ = backward(d)
        found.append((float(value), to_host(gradients.flat).astype(np.float64)))
    return found


@pytest.mark.parametrize("longest", [0.01, 0.5, 2.0, 1e9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["labels", "numbers", "linear", "no bias"])
def test_the_sum_of_clipped_gradients_is_that_of_gradients_made_one_by_one(
    device, rng, longest, dtype, kind
):
    X, y = problem(rng)
    model, loss = mlp(device, dtype), softmax_cross_entropy
    if kind != "labels":
        y, loss = rng.normal(size=(60, 3)).astype(dtype), mean_squared_error
    if kind in ("linear", "no bias"):
        model = Linear(5, 3, bias=kind == "linear", dtype=dtype, device=device)
        model.parameters["weight"] = device.asarray(rng.normal(size=(5, 3)), dtype)
    x, targets = device.asarray(X, dtype), device.asarray(y)
    each = gradients_one_by_one(model, x, targets, loss)
    lengths = [math.sqrt((g**2).sum()) for _, g in each]
    present = rng.random(60) < 0.8
    rows = [(value, g * min(1, longest / n)) for (value, g), n in zip(each, lengths, strict=True)]
    expected = sum(g for (_, g), here in zip(rows, present, strict=True) if here)
    targets = targets.copy()
    targets[device.asarray(~present)] = -1 if kind == "labels" else math.nan

    gradients = model.parameters.zeros_like()
    gradients.flat[...] = math.nan  # what the step before left
    work = Work(model, loss, model.parameters, gradients, {}, {})
    value = float(clipped_sum(work, x, targets, longest))
    tolerance = 1e-4 if dtype == np.float32 else 1e-11
    scale = abs(expected).max()
    np.testing.assert_allclose(to_host(gradients.flat), expected, rtol=0, atol=tolerance * scale)
    mean = np.mean([value for (value, _), here in zip(rows, present, strict=True) if here])
    assert value == pytest.approx(mean, rel=tolerance)


def test_a_batch_without_rows_has_no_gradient(device):
    model = mlp(device)
    gradients = model.parameters.zeros_like()
    work = Work(model, softmax_cross_entropy, model.parameters, gradients, {}, {})
    x, y = device.asarray(np.ones((4, 5))), device.asarray(np.full(4, -1))
    assert float(clipped_sum(work, x, y, 1.0)) == 0
    assert (to_host(gradients.flat) == 0).all()


# --- the choice of rows ------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch_size"), [(40, 8), (400, 8)])
def test_each_row_is_drawn_by_itself(device, n, batch_size):
    X = np.arange(n, dtype=np.float64)[:, None]
    data = PoissonBatches(device.asarray(X), device.asarray(np.arange(n)), batch_size)
    generator, q = np.random.default_rng(0), batch_size / n
    n_epochs = 4000 * batch_size // n  # so 4000 batches
    drawn = np.zeros((data.n_steps * n_epochs, n), bool)
    i = 0
    for _ in range(n_epochs):
        for x, y in data.epoch(generator):
            labels = to_host(y)
            rows = labels[: data.n_rows]
            assert (labels[data.n_rows :] == -1).all()
            assert len(labels) % 2 == 0
            assert len(labels) - data.n_rows <= 2
            np.testing.assert_array_equal(to_host(x)[: data.n_rows, 0], rows)
            assert len(set(rows.tolist())) == data.n_rows
            drawn[i, rows] = True
            i += 1
    assert i == len(drawn)
    sizes = drawn.sum(axis=1)
    assert abs(sizes.mean() - batch_size) < 5 * math.sqrt(batch_size / i)
    variance = n * q * (1 - q)
    assert abs(sizes.var() - variance) < 6 * variance * math.sqrt(2 / i)
    assert abs(drawn.mean(axis=0) - q).max() < 5 * math.sqrt(q * (1 - q) / i)
    together = (drawn[:, ::2] & drawn[:, 1::2]).mean()  # two rows do not know of each other
    assert abs(together - q * q) < 5 * q / math.sqrt(i * n / 2)


def test_numbers_are_filled_up_with_nan_and_a_full_batch_has_all_rows(device):
    X, Y = device.asarray(np.ones((30, 2))), device.asarray(np.ones((30, 1)))
    for x, y in PoissonBatches(X, Y, 7).epoch(np.random.default_rng(1)):
        assert len(x) == len(y)
        assert np.isnan(to_host(y)).sum() == len(x) - int(np.nansum(to_host(y)))
    data = PoissonBatches(X, Y, 30)
    [(x, _)] = data.epoch(np.random.default_rng(1))
    assert data.n_rows == 30
    assert data.probability == 1
    in_order = [len(x) for x, _ in PoissonBatches(X, Y, 7).epoch(None)]
    assert in_order == [7, 7, 7, 7, 2]


# --- training ----------------------------------------------------------------------------------


@needs_accountant
def test_a_step_is_the_clipped_mean_with_noise_of_the_stated_deviation(device, rng):
    X, y = problem(rng)
    model, steps = mlp(device), []
    each = gradients_one_by_one(model, device.asarray(X), device.asarray(y), softmax_cross_entropy)
    clipped = sum(g * min(1, 0.5 / math.sqrt((g**2).sum())) for _, g in each) / 60
    for seed in range(40):
        model = mlp(device)
        before = to_host(model.parameters.flat).copy()
        privacy = Privacy(clip_norm=0.5, noise_multiplier=3.0, seed=seed, delta=0.01)
        options = {"optimizer": GradientDescent(1.0), "batch_size": None, "n_epochs": 1}
        gpuml.train(model, X, y, privacy=privacy, **options)
        steps.append(before - to_host(model.parameters.flat) - clipped)
    noise = np.array(steps) / (3.0 * 0.5 / 60)
    n = noise.size
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.std(axis=0) - 1).max() < 0.7  # every parameter has its noise


@needs_accountant
def test_private_training_learns_and_tells_what_it_spent(device, caplog):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2000, 5))
    y = (X[:, 0] > 0).astype(int)
    model = MLP([5, 16, 2], device=device)
    privacy = Privacy(clip_norm=1.0, noise_multiplier=1.0, delta=1e-5, seed=0)
    options = {"optimizer": GradientDescent(0.5), "n_epochs": 8, "batch_size": 100}
    validation_data = X[:300], y[:300]
    history = gpuml.train(model, X, y, privacy=privacy, validation_data=validation_data, **options)
    assert history["validation_accuracy"][-1] > 0.9
    assert history["loss"][-1] < history["loss"][0]
    spent = history["epsilon"]
    assert all(a < b for a, b in pairwise(spent))
    import dp_accounting
    from dp_accounting import pld, rdp

    step = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0))
    accountant = rdp.RdpAccountant()
    for epsilon in spent:
        accountant.compose(step, 20)
        assert epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    exact = pld.PLDAccountant().compose(step, 160).get_epsilon(1e-5)
    assert 0.7 * spent[-1] < exact < spent[-1]
    assert f"epsilon {spent[-1]:.4g} at delta 1e-05" in history.notes[-1]
    assert not caplog.records
    history.plot()


@needs_accountant
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_seeds_repeat_and_none_does_not(device, rng, engine):
    if engine == "graph" and (device.kind == "cpu" or find_spec("nvmath") is None):
        pytest.skip("graphs are for GPUs with nvmath-python")
    X, y = problem(rng)

    def weights(secret, **options):
        model = mlp(device)
        privacy = Privacy(noise_multiplier=1.0, seed=secret, delta=0.01)
        options |= {"n_epochs": 4, "batch_size": 10, "engine": engine}
        gpuml.train(model, X, y, privacy=privacy, **options)
        return to_host(model.parameters.flat)

    np.testing.assert_array_equal(weights(1), weights(1, seed=9))
    assert (weights(1) != weights(2)).all()
    assert (weights(None) != weights(None)).all()


@needs_accountant
def test_the_engines_agree(device, rng):
    if device.kind == "cpu" or find_spec("nvmath") is None:
        pytest.skip("graphs are for GPUs with nvmath-python")
    X, y = problem(rng)
    found = []
    for engine in ("eager", "graph"):
        model = mlp(device)
        privacy = Privacy(noise_multiplier=1.0, seed=1, delta=0.01)
        options = {"n_epochs": 6, "batch_size": 10, "engine": engine}
        assert gpuml.train(model, X, y, privacy=privacy, **options).engine == engine
        found.append(to_host(model.parameters.flat))
    np.testing.assert_allclose(*found, rtol=1e-7, atol=1e-9)


@needs_accountant
@pytest.mark.parametrize("seed", [4, None])
def test_a_run_that_is_taken_up_again_ends_with_the_same_bits(device, rng, tmp_path, seed):
    X, y = problem(rng)
    privacy = Privacy(noise_multiplier=2.0, seed=seed, delta=0.01)
    path = tmp_path / "run.safetensors"
    options = {"batch_size": 10, "privacy": privacy, "checkpoint": path}
    gpuml.train(mlp(device), X, y, n_epochs=2, **options)
    kept = path.read_bytes()
    found = []
    for _ in range(2):  # secrets are in the file
        path.write_bytes(kept)
        model = mlp(device)
        history = gpuml.train(model, X, y, n_epochs=6, **options)
        found.append((to_host(model.parameters.flat), history["epsilon"]))
    if seed is not None:
        del options["checkpoint"]
        model = mlp(device)
        history = gpuml.train(model, X, y, n_epochs=6, **options)
        found.append((to_host(model.parameters.flat), history["epsilon"]))
    for weights, epsilon in found[1:]:
        np.testing.assert_array_equal(weights, found[0][0])
        assert epsilon == found[0][1]
    options["checkpoint"] = path
    options["privacy"] = Privacy(noise_multiplier=1.0, seed=seed, delta=0.01)
    with pytest.raises(gpuml.CheckpointError, match=r"private training was .*noise_multiplier=2"):
        gpuml.train(mlp(device), X, y, n_epochs=6, **options)


# --- budgets -----------------------------------------------------------------------------------


def spend(rng, n=1000, **settings):
    X = rng.normal(size=(n, 5))
    options = {"batch_size": 50, "n_epochs": 3}
    privacy = Privacy(**({"delta": 1e-5, "seed": 0} | settings))
    model = Linear(5, 3, device="cpu")
    return gpuml.train(model, X, rng.integers(3, size=n), privacy=privacy, **options)


@needs_accountant
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_a_budget_is_kept_and_used(rng, epsilon):
    spent = spend(rng, epsilon=epsilon)["epsilon"][-1]
    assert 0.99 * epsilon < spent <= epsilon


@needs_accountant
def test_a_budget_that_cannot_be_kept_is_refused_with_what_can(rng):
    with pytest.raises(ValueError, match=r"epsilon=1e-06 cannot be met in 60 steps .* it is 0\."):
        spend(rng, epsilon=1e-6)
    with pytest.raises(
        ValueError, match=r"noise_multiplier=0.5 spends epsilon=\d.*budget"
    ) as found:
        spend(rng, epsilon=2.0, noise_multiplier=0.5)
    least = float(str(found.value).split("noise_multiplier=")[-1].split(",")[0])
    assert 1.9 < spend(rng, epsilon=2.0, noise_multiplier=least)["epsilon"][-1] <= 2.0
    with pytest.raises(ValueError, match=r"or n_epochs=2$"):
        spend(rng, epsilon=spend(rng, noise_multiplier=1.0)["epsilon"][1], noise_multiplier=1.0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "give noise_multiplier, or a budget"),
        ({"noise_multiplier": 0}, "noise_multiplier must be a positive number, got 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be a positive number"),
        ({"epsilon": -1}, "epsilon must be a positive number, got -1"),
        ({"epsilon": math.inf}, "epsilon must be a positive number"),
        ({"epsilon": 1, "clip_norm": 0}, "clip_norm must be a positive number, got 0"),
        ({"epsilon": 1, "clip_norm": None}, "clip_norm must be a positive number"),
        ({"epsilon": 1, "delta": 0}, "delta must be a positive number"),
        ({"epsilon": 1, "delta": 1.0}, "delta must be less than 1"),
        ({"epsilon": 1, "delta": None}, "a budget of epsilon=1 needs a delta"),
        ({"epsilon": 1, "noise_multiplier": 1, "delta": None}, "needs a delta"),
        ({"delta": None}, "give noise_multiplier"),
    ],
)
def test_settings_out_of_range_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Privacy(**settings)


class Own(Model):
    pass


@needs_accountant
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shuffle": False}, "draws its rows by chance: leave shuffle=False away"),
        ({"clip_norm": 1.0}, r"private training clips by itself: Privacy\(clip_norm=…\)"),
        ({"adversarial": gpuml.robustness.PGD(bounds=None)}, "adversarial training is not privat"),
        ({"engine": "fused"}, "private training is for the engines eager and graph"),
        ({"precision": "tf32"}, "private training multiplies exactly"),
        ({"loss": lambda p, t: softmax_cross_entropy(p, t)}, "for the losses cross_entropy, mean"),
        ({"model": Own(mlp().parameters, mlp().layers)}, "for Linear models and MLPs"),
        ({"privacy": Privacy(epsilon=1, delta=0.02)}, r"one of 60 rows .* less than 0.017"),
    ],
)
def test_what_would_not_be_private_is_refused(rng, change, reason):
    X, y = problem(rng)
    call = {"model": mlp(dtype=np.float32), "privacy": Privacy(noise_multiplier=1.0)} | change
    with pytest.raises(ValueError, match=reason):
        gpuml.train(call.pop("model"), X, y, **call)


def test_data_that_do_not_come_as_a_whole_are_refused(rng, tmp_path):
    X, y = problem(rng)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    for data in [(mapped, y), ([(X, y)], None)]:
        with pytest.raises(ValueError, match="X and y must be arrays that fit on the device"):
            gpuml.train(mlp(), *data, privacy=Privacy(epsilon=1), loss="cross_entropy")
    with pytest.raises(TypeError, match=r"gpuml.privacy.Privacy\(noise_multiplier=1.1\), got 3"):
        gpuml.train(mlp(), X, y, privacy=3)


@needs_accountant
def test_several_ranks_are_refused_by_all_of_them(rng):
    X, y = problem(rng)

    def work(communicator):
        options = {"privacy": Privacy(noise_multiplier=1.0), "communicator": communicator}
        model = mlp()
        with pytest.raises(ValueError, match="private training runs in one process so far"):
            gpuml.train(model, X, y, **options)

    gpuml.distributed.simulate(2, work)


def test_without_the_accountant_it_says_what_to_install(rng, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    X, y = problem(rng)
    with pytest.raises(gpuml.GpumlError, match="pip install dp-accounting"):
        gpuml.train(mlp(), X, y, privacy=Privacy(epsilon=1))


@pytest.mark.parametrize("accountant", [True, False])
def test_without_delta_the_steps_are_the_same_and_nothing_is_reckoned(rng, monkeypatch, accountant):
    X, y = problem(rng)
    found = []
    for delta in (0.01, None) if accountant and find_spec("dp_accounting") else (None, None):
        if delta is None:
            monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
        model = mlp()
        privacy = Privacy(noise_multiplier=1.0, delta=delta, seed=3)
        history = gpuml.train(model, X, y, privacy=privacy, n_epochs=2, batch_size=20)
        found.append(model.parameters.flat.copy())
    np.testing.assert_array_equal(*found)
    assert all(map(math.isnan, history["epsilon"]))
    assert "was not reckoned (delta=None)" in str(history)
    assert "differentially private" not in str(history)


@needs_accountant
@pytest.mark.parametrize(("n", "batch_size"), [(60, 7), (60, 60), (60, 600)])
def test_what_would_be_spent_is_what_is_spent(rng, n, batch_size):
    options = {"batch_size": batch_size, "n_epochs": 3}
    model, privacy = Linear(5, 3, device="cpu"), Privacy(noise_multiplier=1.3)
    X, y = rng.normal(size=(n, 5)), rng.integers(3, size=n)
    history = gpuml.train(model, X, y, privacy=privacy, **options)
    assert spent_epsilon(1.3, n_samples=n, **options) == history["epsilon"][-1]


def test_nothing_is_reckoned_from_nonsense(monkeypatch):
    call = {"n_samples": 60, "batch_size": 7, "n_epochs": 3}
    for change in ({"n_samples": 0}, {"batch_size": 1.5}, {"n_epochs": -1}, {"delta": 0.02}):
        with pytest.raises(ValueError, match=r"must be|rows to be told"):
            spent_epsilon(1.0, **(call | change))
    with pytest.raises(ValueError, match="noise_multiplier must be a positive number"):
        spent_epsilon(0, **call)
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(gpuml.GpumlError, match="pip install dp-accounting"):
        spent_epsilon(1.0, **call)


@needs_accountant
def test_the_table_of_the_notebook_is_right():
    notebook = Path(__file__).parent.parent / "notebooks" / "10_security.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    [cell] = [text for c in cells if "\nepsilons = {" in (text := "".join(c["source"]))]
    pairs = re.findall(r"([\d.]+): ([\d.]+)", cell.split("\nepsilons = {")[1].split("}")[0])
    assert len(pairs) == 5
    call = {"n_samples": 1367, "batch_size": 128, "n_epochs": 30, "delta": 1e-4}
    for noise, epsilon in pairs:
        assert float(epsilon) == float(f"{spent_epsilon(float(noise), **call):.3g}")
