"""Populations: each model is the one that is trained alone, whatever happens to the others."""

from __future__ import annotations

import csv
import json
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import gpuml
from gpuml import population_runs, populations, searches, training
from gpuml.cpu_populations import CpuPopulationGradient
from gpuml.devices import CPU, array_module, to_host
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.models import Parameters
from gpuml.population_runs import stack

SIZES = [6, 9, 5, 3]


def table(rng, device, n=77, kind="classes", dtype=np.float32):
    X = rng.standard_normal((n, SIZES[0])).astype(dtype)
    scores = np.tanh(X @ rng.standard_normal((SIZES[0], SIZES[-1])))
    y = scores.argmax(axis=1) if kind == "classes" else scores.astype(dtype)
    return device.asarray(X), device.asarray(y)


def alone(population, i, device, X, y, *, sizes=SIZES, momentum=None, **settings):
    """Train a model of its own with the settings of model i."""
    own = {name: float(values[i]) for name, values in population.settings.items()}
    seed = int(own.pop("seed"))
    rate = own.pop("learning_rate")
    kind = settings.pop("optimizer")
    model = gpuml.MLP(sizes, seed=seed, device=device)
    history = gpuml.train(model, X, y, optimizer=kind(rate, **own), **settings)
    return model, history


def flat(model):
    return to_host(model.parameters.flat)


# --- model i is the one trained alone ----------------------------------------------------------

SETTINGS = {
    "plain": (gpuml.GradientDescent, {}),
    "momentum": (gpuml.GradientDescent, {"momenta": 0.9}),
    "momenta": (gpuml.GradientDescent, {"momenta": [0, 0.5, 0.9, 0.95, 0]}),
    "decay": (gpuml.GradientDescent, {"weight_decays": [0, 0.01, 0, 0.1, 0.3]}),
    "both": (gpuml.GradientDescent, {"momenta": 0.8, "weight_decays": 0.05}),
    "adam": (gpuml.Adam, {}),
    "adamw": (gpuml.Adam, {"weight_decays": [0, 0.1, 0, 0.5, 1]}),
}


@pytest.mark.parametrize("kind", ["classes", "numbers"])
@pytest.mark.parametrize("shuffle", [True, False, "each"])
@pytest.mark.parametrize("name", SETTINGS)
def test_each_model_is_the_one_trained_alone(device, rng, name, shuffle, kind):
    X, y = table(rng, device, kind=kind)
    optimizer, varied = SETTINGS[name]
    rates = np.geomspace(0.003, 0.1, 5) * (0.1 if optimizer is gpuml.Adam else 1)
    seeds = rng.integers(0, 1000, 5).tolist()
    common = {
        "n_epochs": 3,
        "batch_size": 16,  # 77 samples: the last of 5 batches has 13
        "validation_data": (X[:30], y[:30]),
        "schedule": gpuml.schedules.cosine(),
    }
    population = gpuml.train_population(
        gpuml.MLP(SIZES, device=device),
        X,
        y,
        n_models=5,
        seeds=seeds,
        learning_rates=rates,
        optimizer=optimizer(),
        shuffle=shuffle,
        seed=4,
        **varied,
        **common,
    )
    assert population.engine == "batched"
    for i in rng.choice(5, 2, replace=False).tolist():
        order = {"shuffle": True, "seed": seeds[i]} if shuffle == "each" else {"seed": 4}
        model, history = alone(
            population,
            i,
            device,
            X,
            y,
            optimizer=optimizer,
            **{"shuffle": shuffle} | order,
            **common,
        )
        np.testing.assert_allclose(flat(population[i]), flat(model), rtol=1e-4, atol=1e-5)
        columns = population.history(i).columns
        assert columns.keys() == history.columns.keys()
        assert (np.diff(columns.pop("seconds")) > 0).all()
        for column, values in columns.items():
            np.testing.assert_allclose(values, history[column], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shuffle", [True, "each"])
def test_a_full_batch_is_not_shuffled(device, rng, shuffle):
    X, y = table(rng, device)
    common = {"n_epochs": 4, "batch_size": None}
    population = gpuml.train_population(
        gpuml.MLP(SIZES, device=device), X, y, n_models=3, shuffle=shuffle, **common
    )
    model, _ = alone(population, 2, device, X, y, optimizer=gpuml.Adam, **common)
    np.testing.assert_allclose(flat(population[2]), flat(model), rtol=1e-4, atol=1e-6)


def test_float64_and_a_single_model(device, rng):
    X, y = table(rng, device, kind="numbers", dtype=np.float64)
    model = gpuml.MLP(SIZES, seed=3, dtype=np.float64, device=device)
    before = flat(model).copy()
    population = gpuml.train_population(model, X, y, n_models=1, seeds=[3], n_epochs=2)
    np.testing.assert_array_equal(flat(model), before)  # the template stays as it is
    gpuml.train(model, X, y, n_epochs=2)
    assert population[0].dtype == np.float64
    np.testing.assert_allclose(flat(population[0]), flat(model), rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_models_start_at_zero_or_where_they_are_told(device, rng, bias):
    X, y = table(rng, device, kind="numbers")
    model = gpuml.Linear(SIZES[0], SIZES[-1], bias=bias, device=device)
    starts = rng.standard_normal((4, model.n_parameters))
    common = {"n_epochs": 3, "batch_size": 20, "optimizer": gpuml.GradientDescent(0.05)}
    zero = gpuml.train_population(model, X, y, n_models=2, **common)
    told = gpuml.train_population(model, X, y, n_models=4, starts=starts, **common)
    for population, i, start in ((zero, 1, 0.0), (told, 3, starts[3])):
        own = gpuml.Linear(SIZES[0], SIZES[-1], bias=bias, device=device)
        own.parameters.flat[...] = device.asarray(start)
        gpuml.train(own, X, y, **common)
        np.testing.assert_allclose(flat(population[i]), flat(own), rtol=1e-4, atol=1e-6)
        assert type(population[i]) is gpuml.Linear


def test_the_same_seeds_give_the_same_bits(device, rng):
    X, y = table(rng, device)
    model = gpuml.MLP(SIZES, device=device)
    first, second = (
        gpuml.train_population(model, X, y, n_models=6, shuffle="each", n_epochs=2)
        for _ in range(2)
    )
    np.testing.assert_array_equal(to_host(first.parameters.flat), to_host(second.parameters.flat))


# --- groups and threads ------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, "each"])
@pytest.mark.parametrize(("n_threads", "most"), [(1, 1), (2, 1), (3, 20 * 16)])
def test_threads_change_nothing(monkeypatch, rng, n_threads, most, shuffle):
    X, y = table(rng, CPU)
    model = gpuml.MLP(SIZES, device="cpu")
    common = {"n_models": 7, "n_epochs": 2, "batch_size": 16, "shuffle": shuffle}
    common["validation_data"] = (X, y)
    whole = gpuml.train_population(model, X, y, **common)
    monkeypatch.setattr(population_runs, "cpu_count", lambda: n_threads)
    monkeypatch.setattr(population_runs, "LEAST_NUMBERS", 1)
    monkeypatch.setattr(population_runs, "MOST_NUMBERS", most)
    names = set()
    train = population_runs.Group.train_own if shuffle == "each" else population_runs.Group.train

    def watched(self, *arguments):
        names.add(threading.current_thread().name)
        train(self, *arguments)

    monkeypatch.setattr(population_runs.Group, train.__name__, watched)
    split = gpuml.train_population(model, X, y, **common)
    assert (threading.main_thread().name in names) == (n_threads == 1)
    np.testing.assert_allclose(split.parameters.flat, whole.parameters.flat, rtol=1e-5, atol=1e-6)
    for name, values in whole.columns.items():
        np.testing.assert_allclose(split.columns[name], values, rtol=1e-5)


def test_groups_fill_the_threads_evenly(monkeypatch, rng):
    monkeypatch.setattr(population_runs, "cpu_count", lambda: 2)
    X, y = table(rng, CPU, n=64)
    sizes = []

    class Watched(population_runs.Group):
        def __init__(self, task, crew):
            sizes.append(len(crew.members))
            super().__init__(task, crew)

    monkeypatch.setattr(population_runs, "Group", Watched)
    for n_models, expected in ((4, [4]), (64, [32, 32]), (65, [16, 16, 16, 17])):
        sizes.clear()
        gpuml.train_population(
            gpuml.MLP([SIZES[0], 32, 3], device="cpu"), X, y, n_models=n_models, n_epochs=1
        )
        assert sorted(sizes) == expected


@pytest.mark.parametrize("loss", [softmax_cross_entropy, mean_squared_error])
@pytest.mark.parametrize("own_batches", [False, True])
@pytest.mark.parametrize("sizes", [[4, 3], [5, 4, 3], [3, 6, 5, 1], [1, 1]])
def test_the_prepared_calls_give_the_gradient(rng, sizes, own_batches, loss):
    for bias in (True, False) if len(sizes) == 2 else (True,):
        template = (
            gpuml.Linear(*sizes, bias=bias, dtype="f8", device="cpu")
            if len(sizes) == 2
            else gpuml.MLP(sizes, dtype="f8", device="cpu")
        )
        model = stack(template, rng.standard_normal((3, template.n_parameters)))
        assert CpuPopulationGradient.limit(model, loss) is None
        gradients = model.parameters.zeros_like()
        calls = CpuPopulationGradient(model, loss, gradients)
        for n_rows in (7, 2, 7, 1):  # each size is prepared once, and used again
            shape = (3, n_rows) if own_batches else (n_rows,)
            x = rng.standard_normal((*shape, sizes[0]))
            labels = rng.integers(0, sizes[-1], shape)
            y = (
                labels
                if loss is softmax_cross_entropy
                else rng.standard_normal((*shape, sizes[-1]))
            )
            value = calls(x, y)
            predictions, backward = model.forward(model.parameters, x)
            expected, d = loss(predictions, y)
            np.testing.assert_allclose(value, expected, rtol=1e-12)
            np.testing.assert_allclose(gradients.flat, backward(d)[0].flat, rtol=1e-10, atol=1e-14)


def test_single_models_and_populations_have_calls_of_their_own(rng):
    model = gpuml.MLP(SIZES, device="cpu")
    many = stack(model, rng.standard_normal((2, model.n_parameters)).astype("f"))
    assert CpuPopulationGradient.limit(many, softmax_cross_entropy) is None
    assert "one axis" in CpuPopulationGradient.limit(model, softmax_cross_entropy)
    assert "package's losses" in CpuPopulationGradient.limit(many, lambda p, t: (p, t))


@pytest.mark.alone
def test_many_models_take_half_the_time_of_one_after_another(rng):
    X = rng.standard_normal((2048, 64), np.float32)
    y = rng.integers(0, 10, 2048)
    model = gpuml.MLP([64, 32, 10], device="cpu")
    common = {"n_epochs": 3, "optimizer": "gradient_descent"}

    def together():
        gpuml.train_population(model, X, y, n_models=64, **common)

    def alone():
        for seed in range(8):
            gpuml.train(gpuml.MLP([64, 32, 10], seed=seed, device="cpu"), X, y, **common)

    ratios = []
    for _ in range(5):  # on a busy machine one of the rounds is quiet
        moments = [time.perf_counter()]
        for work in (alone, together):
            work()
            moments.append(time.perf_counter())
        ratios.append(8 * (moments[1] - moments[0]) / (moments[2] - moments[1]))
    assert max(ratios) > 2


# --- models that diverge -----------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, "each"])
def test_a_model_that_diverges_leaves_the_others_alone(device, rng, shuffle):
    X, y = table(rng, device, kind="numbers")
    rates = [0.01, 200.0, 0.02, 1e30, 0.03]
    common = {"n_epochs": 6, "batch_size": 16, "validation_data": (X, y), "shuffle": shuffle}
    model = gpuml.Linear(SIZES[0], SIZES[-1], device=device)
    population = gpuml.train_population(
        model, X, y, n_models=5, learning_rates=rates, optimizer="gradient_descent", **common
    )
    assert population.diverged.tolist() == [False, True, False, True, False]
    assert population.epochs[[0, 2, 4]].tolist() == [6, 6, 6]
    good = gpuml.train_population(
        model,
        X,
        y,
        n_models=3,
        seeds=[0, 2, 4],
        learning_rates=[0.01, 0.02, 0.03],
        optimizer="gradient_descent",
        **common,
    )
    kept = to_host(population.parameters.flat)[[0, 2, 4]]
    np.testing.assert_allclose(kept, to_host(good.parameters.flat), rtol=1e-5, atol=1e-6)
    for name, values in good.columns.items():
        np.testing.assert_allclose(population.columns[name][:, [0, 2, 4]], values, rtol=1e-4)
    for i in (1, 3):
        n = population.epochs[i]
        assert (0 < n < 5) if i == 1 else (n < 2)
        for values in population.columns.values():
            assert np.isfinite(values[:n, i]).all()
            assert np.isnan(values[n:, i]).all()
        own = gpuml.Linear(SIZES[0], SIZES[-1], device=device)
        with pytest.raises(gpuml.DivergenceError) as caught:
            gpuml.train(
                own,
                X,
                y,
                optimizer=gpuml.GradientDescent(rates[i]),
                seed=i if shuffle == "each" else 0,
                **common | {"shuffle": True},
            )
        assert len(caught.value.history) == n  # as alone: the weights of the last good epoch
        np.testing.assert_allclose(flat(population[i]), flat(own), rtol=1e-3, atol=1e-5)
    assert set(population.order()[-2:].tolist()) == {1, 3}
    assert population.best_index in (0, 2, 4)
    assert any("2 of 5 models diverged: 1, 3" in note for note in population.notes)
    assert "diverged in epoch" in population.history(3).notes[0]


def test_a_model_left_behind_takes_no_more_steps(monkeypatch, device, rng):
    X, y = table(rng, device, kind="numbers")
    seen = []
    step = population_runs.EagerStep.__call__

    def watched(self, x, y):
        seen.append(len(self._parameters.flat))
        return step(self, x, y)

    monkeypatch.setattr(population_runs.EagerStep, "__call__", watched)
    gpuml.train_population(
        gpuml.MLP(SIZES, device=device),
        X,
        y,
        n_models=3,
        learning_rates=[0.01, 1e30, 0.01],
        optimizer="gradient_descent",
        n_epochs=3,
        batch_size=None,
    )
    assert seen == [3, 3, 2]  # the first step's loss is finite, and so are the weights after it


def test_momentum_and_averages_go_on_after_another_model_diverged(device, rng):
    X, y = table(rng, device, kind="numbers")
    for kind in (gpuml.Adam, lambda rate: gpuml.GradientDescent(rate, momentum=0.9)):
        common = {"n_epochs": 5, "batch_size": 16, "schedule": gpuml.schedules.cosine()}
        population = gpuml.train_population(
            gpuml.MLP(SIZES, device=device),
            X,
            y,
            n_models=3,
            learning_rates=[1e38, 1e38, 0.01],
            optimizer=kind(0.1),
            **common,
        )
        assert population.diverged.tolist() == [True, True, False]
        own = gpuml.MLP(SIZES, seed=2, device=device)
        gpuml.train(own, X, y, optimizer=kind(0.01), **common)
        np.testing.assert_allclose(flat(population[2]), flat(own), rtol=1e-4, atol=1e-5)


def test_an_infinite_validation_loss_counts_as_diverged(device, rng):
    X, y = table(rng, device, kind="numbers")
    far = X.copy()
    far[0, 0] = 3e38
    settings = {"n_models": 2, "n_epochs": 2, "learning_rates": [1e-4, 0.05]}
    with pytest.raises(gpuml.PopulationDivergedError):
        gpuml.train_population(
            gpuml.MLP(SIZES, device=device), X, y, validation_data=(far, y), **settings
        )


def test_all_diverged_is_an_error_with_the_table(device, rng):
    X, y = table(rng, device, kind="numbers")
    settings = {"n_models": 3, "n_epochs": 2, "optimizer": "gradient_descent"}
    with pytest.raises(gpuml.DivergenceError, match="all 3 models diverged") as caught:
        gpuml.train_population(
            gpuml.MLP(SIZES, device=device), X, y, learning_rates=[1e30, 1e25, 1e31], **settings
        )
    text = str(caught.value)
    assert "try learning_rates below 1e+25" in text
    assert "learning_rate" in text.splitlines()[1]
    assert caught.value.population.diverged.all()
    assert len(caught.value.history) == caught.value.population.epochs.max()
    np.testing.assert_array_equal(
        flat(caught.value.population[1]), flat(gpuml.MLP(SIZES, seed=1, device=device))
    )
    X[5, 2] = np.nan
    with pytest.raises(gpuml.PopulationDivergedError, match="since row 5, column 2 of X is not"):
        gpuml.train_population(gpuml.MLP(SIZES, device=device), X, y, **settings)


# --- parts, and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, "each"])
def test_parts_give_what_one_part_gives(device, rng, shuffle):
    X, y = table(rng, device)
    model = gpuml.MLP(SIZES, device=device)
    common = {"n_models": 7, "n_epochs": 2, "batch_size": 16, "shuffle": shuffle}
    common |= {"learning_rates": np.geomspace(0.001, 0.01, 7), "keep_paths": True}
    whole = gpuml.train_population(model, X, y, **common)
    assert not whole.notes
    parts = gpuml.train_population(model, X, y, memory_limit="60 KiB", **common)
    assert "trained in 3 parts of up to 3 models: 7 models take about" in parts.notes[0]
    assert "30 KiB may be used" in parts.notes[0]
    np.testing.assert_allclose(
        to_host(parts.parameters.flat), to_host(whole.parameters.flat), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(parts.columns["loss"], whole.columns["loss"], rtol=1e-6)
    np.testing.assert_allclose(parts.paths, whole.paths, rtol=1e-5, atol=1e-7)


def test_where_memory_runs_out_smaller_parts_are_tried(monkeypatch, device, rng):
    X, y = table(rng, device)
    model = gpuml.MLP(SIZES, device=device)
    whole = gpuml.train_population(model, X, y, n_models=7, n_epochs=3, validation_data=(X, y))
    measured = population_runs.measured_on

    def scarce(many, data, loss):
        if len(many.parameters.flat) > 2:
            raise MemoryError
        return measured(many, data, loss)

    monkeypatch.setattr(population_runs, "measured_on", scarce)
    parts = gpuml.train_population(model, X, y, n_models=7, n_epochs=3, validation_data=(X, y))
    assert parts.notes == [
        "out of memory with 7 models at once, so trained 4 at a time",
        "out of memory with 4 models at once, so trained 2 at a time",
        "out of memory with 3 models at once, so trained 2 at a time",
    ]
    np.testing.assert_allclose(
        to_host(parts.parameters.flat), to_host(whole.parameters.flat), rtol=1e-5, atol=1e-7
    )
    assert parts.epochs.tolist() == [3] * 7

    def none(*_):
        raise MemoryError

    monkeypatch.setattr(population_runs, "measured_on", none)
    with pytest.raises(gpuml.DeviceMemoryError, match=r"does not hold one model of 131 param"):
        gpuml.train_population(model, X, y, n_models=3, n_epochs=1, validation_data=(X, y))


def test_nothing_is_left_of_a_part_that_is_begun_again():
    results = population_runs.Results(np.zeros((3, 2)), 2)
    for name in ("loss", "validation_loss"):
        results.write(0, np.arange(3), np.ones((1, 3), bool), {name: np.ones((1, 3))})
    results.epochs[:], results.diverged[:] = 1, True
    results.forget(np.array([0, 2]))
    for values in results.columns.values():
        np.testing.assert_array_equal(values, [[np.nan, 1, np.nan], [np.nan] * 3])
    assert results.epochs.tolist() == [0, 1, 0]
    assert results.diverged.tolist() == [False, True, False]


def test_a_limit_below_one_model_is_refused(device, rng):
    X, y = table(rng, device)
    with pytest.raises(gpuml.DeviceMemoryError, match=r"a model takes about .* raise memory_limit"):
        gpuml.train_population(
            gpuml.MLP(SIZES, device=device), X, y, n_models=3, memory_limit="4 KiB"
        )


def test_parameters_that_do_not_fit_are_refused(monkeypatch, device, rng):
    X, y = table(rng, device)
    zeros = device.xp.zeros

    def scarce(shape, *arguments, **options):
        if shape == (5, 131):
            raise MemoryError
        return zeros(shape, *arguments, **options)

    monkeypatch.setattr(device.xp, "zeros", scarce)
    with pytest.raises(gpuml.DeviceMemoryError, match=r"5 models take 2\.56 KiB.*lower n_models"):
        gpuml.train_population(gpuml.MLP(SIZES, device=device), X, y, n_models=5)


# --- other data --------------------------------------------------------------------------------


def test_a_source_of_batches_and_a_memory_map(tmp_path, rng):
    X, y = table(rng, CPU, kind="numbers")
    model = gpuml.MLP(SIZES, device="cpu")
    common = {"n_models": 3, "n_epochs": 2, "validation_data": (X, y)}
    whole = gpuml.train_population(model, X, y, batch_size=20, shuffle=False, **common)
    pairs = [(X[i : i + 20], y[i : i + 20]) for i in range(0, 77, 20)]
    given = gpuml.train_population(model, pairs, **common)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    streamed = gpuml.train_population(model, mapped, y, batch_size=20, shuffle=False, **common)
    for other in (given, streamed):
        np.testing.assert_allclose(other.parameters.flat, whole.parameters.flat, rtol=1e-5)
    full = gpuml.train_population(model, X, y, batch_size=None, **common)
    parts = gpuml.train_population(model, mapped, y, batch_size=None, **common)
    np.testing.assert_allclose(parts.parameters.flat, full.parameters.flat, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"shuffle='each' needs X and y as arrays"):
        gpuml.train_population(model, mapped, y, batch_size=20, shuffle="each", **common)


class Point(gpuml.Model):
    """Two numbers, whatever the inputs: the loss is a landscape over them."""

    def __init__(self, device):
        super().__init__(Parameters(device.asarray(np.zeros(2, "f")), {"point": (1, 2)}), [])

    def forward(self, parameters, x, *, precision=None):
        point = parameters["point"]
        xp = array_module(point)
        predictions = xp.repeat(point, x.shape[-2], axis=-2)

        def backward(d_predictions, gradients=None, *, input_gradient=False):
            if gradients is None:
                gradients = parameters.zeros_like()
            gradients["point"] = d_predictions.sum(axis=-2, keepdims=True)
            return gradients, None

        return predictions, backward


def two_valleys(predictions, targets):
    """(u² - 1)² + u / 5 + v²: the left of its two minima is the lower."""
    u, v = predictions[..., 0], predictions[..., 1]
    d = predictions * 0
    d[..., 0], d[..., 1] = 4 * u * (u**2 - 1) + 0.2, 2 * v
    return ((u**2 - 1) ** 2 + u / 5 + v**2).mean(axis=-1), d / u.shape[-1]


def test_restarts_on_a_landscape_find_the_lower_minimum(device, rng, tmp_path):
    X, y = device.asarray(np.zeros((1, 1), "f")), device.asarray(np.zeros((1, 1), "f"))
    starts = rng.uniform(-1.5, 1.5, (20, 2))
    population = gpuml.train_population(
        Point(device),
        X,
        y,
        n_models=20,
        starts=starts,
        loss=two_valleys,
        optimizer=gpuml.GradientDescent(0.05),
        n_epochs=100,
        batch_size=None,
        keep_paths=True,
    )
    assert population.paths.shape == (101, 20, 2)
    np.testing.assert_allclose(population.paths[0], starts, rtol=1e-6)
    np.testing.assert_array_equal(population.paths[-1], to_host(population.parameters.flat))
    left = population.paths[-1, :, 0] < 0
    assert 0 < left.sum() < 20
    assert left[population.best_index]
    assert population.columns["loss"][-1, left].max() < population.columns["loss"][-1, ~left].min()

    from matplotlib import pyplot

    figure = population.plot_paths(X, y)
    assert figure.axes[0].get_xlabel() == "first"
    figure.savefig(tmp_path / "paths.png")
    population.plot_paths(X, y, models=[0, 3])
    pyplot.close("all")
    with pytest.raises(ValueError, match="give Points as starts"):
        gpuml.train_population(Point(device), X, y, n_models=2, loss=two_valleys)
    with pytest.raises(TypeError, match="Point is not one of"):
        population[0].save(tmp_path / "point.safetensors")


def test_a_loss_that_forgets_the_models_is_explained(device, rng):
    X, y = table(rng, device)

    def one_number(predictions, targets):
        return predictions.mean(), predictions * 0

    with pytest.raises(ValueError, match=r"loss of 3 models has shape \(\), expected \(3,\)"):
        gpuml.train_population(gpuml.MLP(SIZES, device=device), X, y, n_models=3, loss=one_number)


# --- what comes out ----------------------------------------------------------------------------


@pytest.fixture
def trained(device, rng):
    X, y = table(rng, device)
    population = gpuml.train_population(
        gpuml.MLP(SIZES, device=device),
        X,
        y,
        n_models=14,
        learning_rates=np.geomspace(1e-3, 1e-1, 14),
        n_epochs=4,
        validation_data=(X[:40], y[:40]),
    )
    return population, X, y


def test_a_member_is_an_ordinary_model(trained, tmp_path):
    population, X, y = trained
    model = population[3]
    model.save(tmp_path / "three.safetensors")
    again = gpuml.load_model(tmp_path / "three.safetensors", device=model.device)
    np.testing.assert_array_equal(flat(again), flat(model))
    before = to_host(population.parameters.flat).copy()
    history = gpuml.train(model, X, y, n_epochs=1)
    assert math.isfinite(history["loss"][0])
    np.testing.assert_array_equal(to_host(population.parameters.flat), before)  # it is a copy
    np.testing.assert_array_equal(flat(population[np.int64(-1)]), before[-1])
    assert len(list(population)) == len(population) == 14
    for i in (14, -15):
        with pytest.raises(IndexError, match="there are 14 models, counted from 0"):
            population[i]
    with pytest.raises(TypeError):
        population["3"]


def test_numbers_of_the_validation_data_are_those_of_evaluate(trained):
    population, X, y = trained
    for i in (0, 13):
        measured = gpuml.evaluate(population[i], X[:40], y[:40])
        assert population.final("validation_loss")[i] == pytest.approx(measured["loss"], rel=1e-5)
        assert population.final("validation_accuracy")[i] == measured["accuracy"]


def test_predictions_are_those_of_each_model(trained, monkeypatch):
    population, X, _ = trained
    monkeypatch.setattr(population_runs, "EVALUATED_ROWS", 10)
    monkeypatch.setattr(population_runs, "LEAST_ROWS", 10)
    outputs = population.predict(X)
    assert outputs.shape == (14, 77, 3)
    for i in (0, 7):
        np.testing.assert_allclose(
            to_host(outputs[i]), to_host(gpuml.predict(population[i], X)), rtol=1e-4, atol=1e-6
        )
    assert isinstance(population.predict(to_host(X)), np.ndarray)
    with pytest.raises(ValueError, match="expected \\(n_samples, n_features\\)"):
        population.predict(X[0])


def test_the_ranking_puts_the_best_first(trained, tmp_path):
    population, _, _ = trained
    losses = population.final("validation_loss")
    assert population.order().tolist() == np.argsort(losses, kind="stable").tolist()
    assert population.best_index == losses.argmin()
    np.testing.assert_array_equal(flat(population.best), flat(population[int(losses.argmin())]))
    by_accuracy = population.final("validation_accuracy")[population.order("validation_accuracy")]
    assert (np.diff(by_accuracy) <= 0).all()
    ranking = population.ranking("loss")
    assert ranking["loss"] == sorted(population.final("loss").tolist())
    assert ranking["seed"] == ranking["model"]
    assert len(ranking) == 14
    text = str(ranking)
    assert "learning_rate" in text.splitlines()[0]
    assert "⋮" in text  # of many models the first and the last
    assert text.splitlines()[-1].startswith("14 models, batched, ")
    assert "<table>" in ranking._repr_html_() == population.ranking("loss")._repr_html_()
    ranking.to_csv(tmp_path / "ranking.csv")
    rows = list(csv.DictReader((tmp_path / "ranking.csv").open()))
    assert [int(row["model"]) for row in rows] == ranking["model"]
    assert float(rows[0]["learning_rate"]) == ranking["learning_rate"][0]
    for ask in (population.ranking, population.order, population.final):
        with pytest.raises(KeyError, match="did you mean 'loss'"):
            ask("los")
    with pytest.raises(KeyError, match="learning_rate"):
        ranking["learning"]


def test_it_says_what_it_is(trained, tmp_path):
    population, _, _ = trained
    assert repr(population).startswith("Population(14 × MLP 6-9-5-3 (131 parameters, float32), b")
    assert str(population) == str(population.ranking())
    assert population._repr_html_() == population.ranking()._repr_html_()
    table = json.loads(json.dumps(population.to_json()))
    assert table["epochs"] == [4] * 14
    assert np.shape(table["columns"]["loss"]) == (4, 14)
    population.to_csv(tmp_path / "population.csv")
    assert len((tmp_path / "population.csv").read_text().splitlines()) == 15
    assert population.seconds > 0
    assert "momentum" not in population.settings


def test_an_ensemble_averages_probabilities(trained):
    population, X, y = trained
    ensemble = population.ensemble(3)
    assert ensemble.models == population.order()[:3].tolist()
    logits = to_host(population.predict(X))[ensemble.models].astype(float)
    each = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    probabilities = to_host(ensemble.predict_probabilities(X))
    np.testing.assert_allclose(probabilities, each.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(to_host(ensemble.predict(X)), probabilities.argmax(axis=1))
    assert float(gpuml.accuracy(y, ensemble.predict(X))) > 0.6
    assert len(population.ensemble()) == 14
    assert repr(ensemble).startswith("Ensemble(3 × MLP")
    for k in (0, 1.5, -1):
        with pytest.raises(ValueError, match="k must be a positive integer"):
            population.ensemble(k)
    with pytest.raises(ValueError, match="15 models are wanted, and 14 did not diverge"):
        population.ensemble(15)


def test_an_ensemble_of_numbers_averages_them_and_leaves_out_the_diverged(device, rng):
    X, y = table(rng, device, kind="numbers")
    population = gpuml.train_population(
        gpuml.MLP(SIZES, device=device),
        X,
        y,
        n_models=3,
        learning_rates=[0.01, 1e30, 0.02],
        optimizer="gradient_descent",
        n_epochs=2,
    )
    ensemble = population.ensemble()
    assert sorted(ensemble.models) == [0, 2]
    mean = to_host(population.predict(X))[[0, 2]].mean(axis=0)
    np.testing.assert_allclose(to_host(ensemble.predict(X)), mean, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="predict numbers, not classes"):
        ensemble.predict_probabilities(X)
    with pytest.raises(ValueError, match="3 models are wanted, and 2 did not diverge"):
        population.ensemble(3)
    assert population.to_json()["columns"]["loss"][-1][1] is None


def test_preprocessing_stays_with_members_and_ensembles(rng):
    data = gpuml.load_dataset("iris")
    preprocessing = gpuml.Preprocessing.fit(data.X, data.y, "classification")
    model = gpuml.MLP([4, 8, 3], device="cpu")
    model.preprocessing = preprocessing
    population = gpuml.train_population(
        model, preprocessing.features(data.X), preprocessing.targets(data.y), n_models=3
    )
    assert population[1].preprocessing is preprocessing
    assert population.ensemble(2).preprocessing is preprocessing


def test_pictures_are_drawn(trained):
    from matplotlib import pyplot

    population, X, y = trained
    losses = population.plot_losses()
    assert "validation loss" in losses.axes[0].get_xlabel()
    rates = population.plot_learning_rates("validation_accuracy")
    assert rates.axes[0].get_ylabel() == "validation accuracy"
    assert rates.axes[0].get_xscale() == "log"
    pyplot.close("all")
    with pytest.raises(ValueError, match="keep_paths=True"):
        population.plot_paths(X, y)
    with pytest.raises(KeyError):
        population.plot_losses("accuracy")


def test_paths_of_many_parameters_are_refused(monkeypatch, device, rng):
    X, y = table(rng, device)
    model = gpuml.MLP(SIZES, device=device)
    population = gpuml.train_population(model, X, y, n_models=2, n_epochs=2, keep_paths=True)
    assert population.paths.shape == (3, 2, 131)
    with pytest.raises(ValueError, match="the models have 131 parameters"):
        population.plot_paths(X, y)
    monkeypatch.setattr(populations, "MOST_PATH_BYTES", 1000)
    with pytest.raises(ValueError, match=r"paths of 2 models .* take 3\.07 KiB: they are for pic"):
        gpuml.train_population(model, X, y, n_models=2, n_epochs=2, keep_paths=True)


# --- interruptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 2])
def test_an_interruption_keeps_the_finished_epochs(device, rng, epoch):
    X, y = table(rng, device)
    common = {"n_models": 3, "batch_size": 16, "keep_paths": True}
    model = gpuml.MLP(SIZES, device=device)

    def stop(now, n_epochs):
        if now == epoch:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(gpuml.PopulationInterrupted) as caught:
        gpuml.train_population(model, X, y, n_epochs=9, schedule=stop, **common)
    assert isinstance(caught.value, gpuml.TrainingInterrupted)
    assert str(caught.value) == f"training stopped after {epoch} finished epochs"
    population = caught.value.population
    assert len(caught.value.history) == epoch
    assert population.epochs.tolist() == [epoch] * 3
    assert not population.diverged.any()
    if epoch:
        whole = gpuml.train_population(model, X, y, n_epochs=epoch, **common)
        np.testing.assert_array_equal(
            to_host(population.parameters.flat), to_host(whole.parameters.flat)
        )
        np.testing.assert_array_equal(population.columns["loss"][:epoch], whole.columns["loss"])
        assert np.isnan(population.columns["loss"][epoch:]).all()
        assert len(population.history(0)) == epoch
    else:
        np.testing.assert_array_equal(flat(population[2]), flat(gpuml.MLP(SIZES, seed=2)))
        assert population.ranking()["epochs"] == [0, 0, 0]


@pytest.mark.parametrize("least", [1, 2**40])
@pytest.mark.parametrize("place", ["write", "step"])
def test_an_interruption_anywhere_leaves_whole_epochs(monkeypatch, rng, place, least):
    X, y = table(rng, CPU)
    model = gpuml.MLP(SIZES, device="cpu")
    monkeypatch.setattr(population_runs, "cpu_count", lambda: 2)
    monkeypatch.setattr(population_runs, "LEAST_NUMBERS", least)  # two threads, or none
    whole = gpuml.train_population(model, X, y, n_models=4, n_epochs=1, batch_size=16)
    calls = []
    where = population_runs.Results if place == "write" else population_runs.Group
    name = "write" if place == "write" else "_checked"
    original = getattr(where, name)

    def interrupted(self, *arguments):
        calls.append(threading.current_thread())
        result = original(self, *arguments)
        # In the second epoch, of five steps by each group.
        if len(calls) == (2 if place == "write" else 15 if least == 1 else 8):
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(gpuml.PopulationInterrupted) as caught:
        gpuml.train_population(model, X, y, n_models=4, n_epochs=5, batch_size=16)
    population = caught.value.population
    assert population.epochs.tolist() == [1] * 4
    np.testing.assert_allclose(
        population.parameters.flat, whole.parameters.flat, rtol=1e-5, atol=1e-6
    )
    assert np.isnan(population.columns["loss"][1:]).all()


def test_models_of_parts_to_come_hold_their_start_weights(device, rng):
    X, y = table(rng, device)
    asked = []

    def stop(epoch, n_epochs):
        asked.append(epoch)
        if len(asked) == 5:  # the second epoch of the second part
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(gpuml.PopulationInterrupted) as caught:
        gpuml.train_population(
            gpuml.MLP(SIZES, device=device),
            X,
            y,
            n_models=7,
            n_epochs=3,
            schedule=stop,
            memory_limit="60 KiB",
            batch_size=16,
        )
    population = caught.value.population
    assert population.epochs.tolist() == [3, 3, 3, 1, 1, 0, 0]
    start = gpuml.MLP(SIZES, seed=6, device=device)
    np.testing.assert_array_equal(flat(population[6]), flat(start))


def test_histories_of_models_stand_side_by_side(trained):
    population, _, _ = trained
    runs = {f"model {i}": population.history(i) for i in (0, 5)}
    assert "model 5" in str(gpuml.compare_histories(runs))
    assert 0 < runs["model 0"].seconds <= population.seconds


def test_after_an_interruption_threads_take_no_further_step(monkeypatch, rng):
    X, y = table(rng, CPU)
    monkeypatch.setattr(population_runs, "cpu_count", lambda: 2)
    monkeypatch.setattr(population_runs, "LEAST_NUMBERS", 1)
    calls = []
    original = population_runs.Group._checked

    def slow(self, value):
        calls.append(time.sleep(0.002))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(self, value)

    monkeypatch.setattr(population_runs.Group, "_checked", slow)
    with pytest.raises(gpuml.PopulationInterrupted):
        gpuml.train_population(
            gpuml.MLP(SIZES, device="cpu"), X, y, n_models=2, n_epochs=1, batch_size=1
        )
    assert len(calls) < 40  # of 77 in each thread


# --- wrong inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_models": 0}, "n_models must be a positive integer, got 0"),
        ({"n_models": 2.5}, "n_models must be a positive integer, got 2.5"),
        ({"seeds": [1, 2]}, r"seeds has shape \(2,\) and n_models is 3"),
        ({"seeds": [1, 2, -3]}, "seeds must be integers from 0 up"),
        ({"seeds": [1, 2, 0.5]}, "seeds must be integers from 0 up"),
        ({"seeds": 5}, r"seeds has shape \(\)"),
        ({"learning_rates": [0.1, 0.2]}, r"learning_rates has shape \(2,\) and n_models is 3"),
        ({"learning_rates": [0.1, 0.0, 0.2]}, "learning_rates must be positive, got 0 for model 1"),
        ({"learning_rates": -1}, "learning_rates must be positive, got -1 for model 0"),
        ({"learning_rates": [1, 1, math.nan]}, "learning_rates must be positive, got nan for mod"),
        ({"learning_rates": [1, math.inf, 1]}, "learning_rates must be positive, got inf for mod"),
        ({"learning_rates": "fast"}, "learning_rates must be numbers, got 'fast'"),
        ({"momenta": [0, 0.5, 1]}, "momenta must be from 0 to less than 1, got 1 for model 2"),
        ({"momenta": [[0.5]]}, r"momenta has shape \(1, 1\)"),
        ({"weight_decays": [0, 0, -1]}, "weight_decays must be zero or positive, got -1 for mod"),
        ({"momenta": 0.5, "optimizer": "adam"}, "Adam has no momentum: leave momenta away"),
        ({"starts": np.zeros((3, 4))}, r"starts must be numbers of shape \(3, 131\)"),
        ({"starts": np.zeros((3, 131), int)}, "starts must be numbers of shape"),
        ({"shuffle": "all"}, "shuffle must be True, False or 'each', got 'all'"),
        ({"engine": "fusd"}, "unknown engine 'fusd': did you mean 'fused'"),
        ({"engine": "fused"}, "engine='fused' cannot train this population: "),
        ({"n_epochs": 0}, "n_epochs must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"validation_data": 3}, "validation_data must be a pair"),
        ({"loss": "cross"}, "did you mean 'cross_entropy'"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_wrong_settings_are_explained(device, rng, settings, message):
    X, y = table(rng, device)
    usual = {"n_models": 3, "optimizer": "gradient_descent", "n_epochs": 1}
    with pytest.raises(ValueError, match=message):
        gpuml.train_population(gpuml.MLP(SIZES, device=device), X, y, **usual | settings)


def test_wrong_data_and_models_are_explained(device, rng):
    X, y = table(rng, device)
    model = gpuml.MLP(SIZES, device=device)
    with pytest.raises(ValueError, match="X has 76 rows, y has 77"):
        gpuml.train_population(model, X[1:], y, n_models=2)
    with pytest.raises(ValueError, match="labels must be from 0 to 2"):
        gpuml.train_population(model, X, y + 1, n_models=2)
    with pytest.raises(TypeError, match="give a model, not its class"):
        gpuml.train_population(gpuml.MLP, X, y, n_models=2)
    with pytest.raises(TypeError, match="expected an array of NumPy or CuPy"):
        gpuml.train_population(model, X, y, n_models=2, starts=[[0.0]])


def test_graphs_are_for_gpus(rng):
    X, y = table(rng, CPU)
    with pytest.raises(ValueError, match="engine='graph' cannot train this population: graphs are"):
        gpuml.train_population(gpuml.MLP(SIZES, device="cpu"), X, y, n_models=2, engine="graph")


def test_on_a_gpu_it_says_why_there_is_no_kernel(device, rng):
    X, y = table(rng, device)
    settings = {"n_models": 2, "n_epochs": 300}  # so many that a kernel would pay
    population = gpuml.train_population(gpuml.MLP(SIZES, device=device), X, y, **settings)
    if device.kind == "gpu":
        said = "not fused, since it is for one hidden layer, and these models have 2"
        assert population.notes[0] == f"engine batched: {said}"
    else:
        assert population.notes == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 7, 2), (2, 300, 4, 1000)])
def test_it_is_known_how_epochs_ended(device, rng, shape, dtype):
    n_epochs, n_steps, n_models, n_parameters = shape
    weights = rng.normal(size=(n_epochs, n_models, n_parameters)).astype(dtype)
    losses = rng.normal(size=(n_epochs, n_steps, n_models)).astype(dtype)
    shares = rng.random(n_steps)
    weights[-1, n_models // 2, -1], losses[0, -1, 0] = np.inf, np.nan
    fine = np.ones((n_epochs, n_models))
    fine[-1, n_models // 2] = fine[0, 0] = 0
    mean = np.einsum("s,esm->em", shares, losses.astype(float))
    arrays = (device.asarray(array) for array in (weights, losses, shares))
    found = to_host(population_runs.ends_of(*arrays))
    np.testing.assert_array_equal(found[0], fine)
    np.testing.assert_allclose(found[1], mean, rtol=1e-12, atol=1e-12)


def test_no_launch_takes_more_epochs_than_a_grid_has_blocks(monkeypatch):
    """Along its second axis; so small a population would have room for 200,000 of them."""
    task = SimpleNamespace(own_orders=False, limit=10_000_000)
    group = SimpleNamespace(
        _task=task, crew=SimpleNamespace(flat=np.zeros((2, 5))), losses=np.zeros((1, 2))
    )
    monkeypatch.setattr(population_runs, "bytes_of_a_model", lambda task: 10)
    most = population_runs.FusedGroup.most_epochs.fget
    assert most(group) == 65_535
    task.limit = 48 * 1000 + 20
    assert most(group) == 1001


class StandIn:
    """Takes the steps of a launch one by one, where there is no kernel."""

    def __init__(self, sizes, batch_size, loss, flat, state, X, y, *, own_order, plan):
        model = stack(gpuml.MLP(sizes, dtype=flat.dtype, device="cpu"), flat)
        optimizer = gpuml.Adam() if "m" in state else gpuml.GradientDescent()
        self._step = population_runs.EagerStep(model, loss, optimizer)
        self._step.state = self.state = {name: array.copy() for name, array in state.items()}
        self._data, self._batch_size, self._own_order = (X, y), batch_size, own_order
        self._flat = flat

    def launch(self, order, rates, losses, kept):
        assert order.dtype == np.int32
        assert order.ndim == 2 + self._own_order
        assert len(rates) == len(losses) == len(kept) == order.shape[-2]
        size = self._batch_size
        for epoch, rate in enumerate(rates):
            self._step.state["learning_rate"][...] = rate[:, None]
            rows = order[..., epoch, :]
            for i in range(losses.shape[1]):
                chosen = rows[..., i * size : (i + 1) * size]
                losses[epoch, i] = self._step(*(a[chosen] for a in self._data))
            kept[epoch] = self._flat


@pytest.fixture
def kernel(device, monkeypatch):
    """The kernel of populations on a GPU, and a stand-in elsewhere."""
    if device.kind == "cpu":
        monkeypatch.setattr(population_runs, "FusedPopulation", StandIn)
        monkeypatch.setattr(population_runs, "population_plan", lambda *_: None)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
@pytest.mark.parametrize("shuffle", [True, False, "each"])
@pytest.mark.parametrize("name", SETTINGS)
def test_epochs_in_one_launch_are_those_of_steps(kernel, device, rng, name, shuffle, kind):
    X, y = table(rng, device, kind=kind)
    optimizer, varied = SETTINGS[name]
    rates = np.geomspace(0.003, 0.1, 5) * (0.1 if optimizer is gpuml.Adam else 1)
    rates[3] = 1e30  # one diverges, and leaves the others
    settings = {
        "n_models": 5,
        "learning_rates": rates,
        "optimizer": optimizer(),
        "n_epochs": 4,
        "batch_size": 16,
        "shuffle": shuffle,
        "validation_data": (X[:30], y[:30]),
        "schedule": "cosine",
    } | varied
    found, expected = (
        gpuml.train_population(gpuml.MLP([6, 9, 3], device=device), X, y, engine=engine, **settings)
        for engine in ("fused", "batched")
    )
    assert (found.engine, expected.engine) == ("fused", "batched")
    assert found.diverged.tolist() == expected.diverged.tolist()
    assert found.epochs.tolist() == expected.epochs.tolist()
    assert found.diverged[3]
    assert found.diverged.sum() == 1
    a, b = (to_host(p.parameters.flat) for p in (found, expected))
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)
    for column, values in expected.columns.items():
        np.testing.assert_allclose(found.columns[column], values, rtol=1e-3, err_msg=column)


def test_a_model_that_diverges_within_a_launch_keeps_its_last_good_epoch(kernel, device, rng):
    X, y = table(rng, device, kind="numbers")
    settings = {
        "n_models": 4,
        # Launches are of epochs 0, 1 and 2, 3 to 6, 7 and 8.
        "schedule": lambda epoch, n_epochs: 1.0 if epoch < 4 else 1e12,
        "learning_rates": [1e-14, 0.01, 3e-15, 0.02],
        "n_epochs": 9,
        "batch_size": 16,
        "keep_paths": True,
        "optimizer": gpuml.GradientDescent(),
    }
    found, expected = (
        gpuml.train_population(gpuml.MLP([6, 9, 3], device=device), X, y, engine=engine, **settings)
        for engine in ("fused", "batched")
    )
    assert found.epochs.tolist() == expected.epochs.tolist() == [9, 4, 9, 4]
    assert found.diverged.tolist() == [False, True, False, True]
    np.testing.assert_allclose(found.paths, expected.paths, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(to_host(found.parameters.flat)[1], found.paths[4, 1])
    np.testing.assert_array_equal(to_host(found.parameters.flat)[0], found.paths[9, 0])
    assert np.isnan(found.columns["loss"][4:, [1, 3]]).all()
    assert np.isfinite(found.columns["loss"][:4]).all()
    assert (np.diff(found.history(0)["seconds"]) >= 0).all()


def test_the_kernel_is_chosen_where_it_pays(kernel, device, rng):
    X, y = table(rng, device)
    model = gpuml.MLP([6, 9, 3], device=device)
    few, many = (
        gpuml.train_population(model, X, y, n_models=3, batch_size=16, n_epochs=n) for n in (1, 80)
    )
    assert (few.engine, many.engine) == ("batched", "fused")
    assert many.notes == []


def test_a_graph_trains_what_batches_train(device, rng):
    if device.kind == "cpu":
        pytest.skip("graphs are for GPUs")
    pytest.importorskip("nvmath")
    X, y = table(rng, device)
    common = {
        "n_models": 4,
        "n_epochs": 3,
        "batch_size": 16,
        "learning_rates": [0.01, 0.1, 1, 1e30],
    }
    common["optimizer"] = gpuml.GradientDescent(momentum=0.9)
    batched, graph = (
        gpuml.train_population(gpuml.MLP(SIZES, device=device), X, y, engine=engine, **common)
        for engine in ("batched", "graph")
    )
    assert graph.engine == "graph"
    np.testing.assert_allclose(
        to_host(graph.parameters.flat), to_host(batched.parameters.flat), rtol=1e-3, atol=1e-5
    )
    assert graph.diverged.tolist() == [False, False, False, True]


def test_a_progress_bar_goes_to_the_end(capsys, rng):
    X, y = table(rng, CPU)
    gpuml.train_population(
        gpuml.MLP(SIZES, device="cpu"), X, y, n_models=2, n_epochs=2, progress=True
    )
    assert "epoch 2/2" in capsys.readouterr().err


# --- successive halving ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_models", "n_epochs", "factor", "expected"),
    [
        (16, 16, 2, ([16, 8, 4, 2], [2, 4, 8, 16])),
        (9, 27, 3, ([9, 3], [9, 27])),
        (5, 8, 2, ([5, 3, 2], [2, 4, 8])),
        (100, 4, 2, ([100, 50, 25], [1, 2, 4])),
        (1, 5, 2, ([1], [5])),
        (64, 1, 4, ([64], [1])),
    ],
)
def test_stages(n_models, n_epochs, factor, expected):
    assert searches._stages(n_models, n_epochs, factor) == expected


def test_halving_drops_exactly_the_worst(device, rng):
    X, y = table(rng, device)
    held = X[:30], y[:30]
    model = gpuml.MLP(SIZES, device=device)
    rates = np.geomspace(1e-4, 3, 12).tolist()
    common = {"batch_size": 16, "validation_data": held, "seed": 7}
    common["optimizer"] = gpuml.GradientDescent(momentum=0.9)
    found = gpuml.successive_halving(model, X, y, {"learning_rate": rates}, n_epochs=8, **common)
    whole = gpuml.train_population(
        model, X, y, n_models=12, learning_rates=rates, n_epochs=8, **common
    )
    left, expected = np.arange(12), np.zeros(12, int)
    for end, size in zip([1, 2, 4, 8], [6, 3, 2, 0], strict=True):
        losses = whole.columns["validation_loss"][end - 1, left]
        left_before = left
        expected[left] = np.minimum(end, whole.epochs[left])
        left = left[np.argsort(losses, kind="stable")[:size]]  # NaN comes last
        assert size == 0 or len(left_before) == 12 or set(left) <= set(left_before)
    assert found.epochs.tolist() == expected.tolist()
    assert found.settings["learning_rate"].tolist() == rates
    for i in np.flatnonzero(found.epochs == 8):  # momentum and the order of samples went on
        np.testing.assert_allclose(flat(found[i]), flat(whole[i]), rtol=1e-4, atol=1e-6)
    for name, values in found.columns.items():
        for i in range(12):
            n = found.epochs[i]
            np.testing.assert_allclose(values[:n, i], whole.columns[name][:n, i], rtol=1e-4)
            assert np.isnan(values[n:, i]).all()
    assert (np.diff(found.epochs[found.order()]) <= 0)[: (~found.diverged).sum() - 1].all()
    assert found.epochs[found.best_index] == 8
    assert found.notes[0] == "after epoch 1 the best 6 went on"


def test_places_are_refilled_by_models_that_catch_up(device, rng):
    from scipy.stats import loguniform

    X, y = table(rng, device)
    common = {"batch_size": 16, "shuffle": "each", "optimizer": "adam"}
    parameters = {"learning_rate": loguniform(1e-4, 1e-1), "weight_decay": [0.0, 0.1]}
    model = gpuml.MLP(SIZES, device=device)
    found = gpuml.successive_halving(
        model, X, y, parameters, n_models=4, n_epochs=4, refill=True, seed=3, **common
    )
    assert len(found) == 6  # 4, and 2 after the only cut
    assert found.epochs.tolist().count(4) == 4
    assert found.epochs[4:].tolist() == [4, 4]
    assert "the best 2 went on, and 2 new ones came" in found.notes[0]
    whole = gpuml.train_population(
        model,
        X,
        y,
        n_models=6,
        learning_rates=found.settings["learning_rate"],
        weight_decays=found.settings["weight_decay"],
        n_epochs=4,
        **common,
    )
    for i in np.flatnonzero(found.epochs == 4):
        np.testing.assert_allclose(flat(found[i]), flat(whole[i]), rtol=1e-4, atol=1e-6)
    again = gpuml.successive_halving(
        model, X, y, parameters, n_models=4, n_epochs=4, refill=True, seed=3, **common
    )
    assert again.settings["learning_rate"].tolist() == found.settings["learning_rate"].tolist()


def test_grids_and_samplers_of_scikit_learn_are_taken(rng):
    from scipy.stats import uniform
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    X, y = table(rng, CPU)
    grid = {"learning_rate": [0.01, 0.1], "momentum": [0.0, 0.5, 0.9]}

    def search(parameters, **settings):
        return gpuml.successive_halving(
            gpuml.MLP(SIZES, device="cpu"), X, y, parameters, **{"n_epochs": 2} | settings
        )

    pairs = [(s["learning_rate"], s["momentum"]) for s in ParameterGrid(grid)]

    def tried(population):
        settings = population.settings
        return list(
            zip(*(settings[n].tolist() for n in ("learning_rate", "momentum")), strict=True)
        )

    assert tried(search(grid)) == pairs
    assert tried(search(ParameterGrid(grid))) == pairs
    twice = search(grid, n_models=12)
    assert tried(twice) == pairs * 2
    assert twice.settings["seed"].tolist() == list(range(12))
    some = tried(search(grid, n_models=4))
    assert len(set(some)) == 4
    assert set(some) <= set(pairs)
    sampler = ParameterSampler({"learning_rate": uniform(0.01, 0.1)}, 5, random_state=0)
    rates = [s["learning_rate"] for s in sampler]
    assert search(sampler).settings["learning_rate"].tolist() == rates
    seeded = search({"seed": [5, 6, 7]})
    assert seeded.settings["seed"].tolist() == [5, 6, 7]


def test_a_search_in_which_all_diverge_is_an_error(rng):
    X, y = table(rng, CPU, kind="numbers")
    for refill in (False, True):
        with pytest.raises(gpuml.PopulationDivergedError, match="models diverged"):
            gpuml.successive_halving(
                gpuml.MLP(SIZES, device="cpu"),
                X,
                y,
                {"learning_rate": np.geomspace(1e28, 1e30, 40).tolist()},
                n_models=4,
                n_epochs=4,
                refill=refill,
            )


@pytest.mark.parametrize(
    ("parameters", "settings", "error", "message"),
    [
        ({"learning_rat": [1]}, {}, ValueError, "did you mean 'learning_rate'"),
        ({"learning_rate": [0.1, -1]}, {}, ValueError, "learning_rates must be positive, got -1"),
        ({"seed": [1, 2]}, {"n_models": 3}, ValueError, "the grid has 2 settings with their seeds"),
        (
            [{"momentum": 0}],
            {"n_models": 2},
            ValueError,
            "2 models are to be tried, parameters giv",
        ),
        ([{"seed": 0}, {"momentum": 0}], {}, ValueError, "must name the same parameters"),
        ({"learning_rate": [0.1]}, {"factor": 1}, ValueError, "factor must be at least 2"),
        ({"learning_rate": [0.1]}, {"n_models": 0}, ValueError, "n_models must be a positive"),
        ({"learning_rate": [0.1] * 4}, {"by": "accuracy"}, KeyError, "unknown column 'accuracy'"),
        ({"learning_rate": 0.1}, {}, TypeError, "Parameter grid for parameter 'learning_rate'"),
    ],
)
def test_wrong_searches_are_explained(rng, parameters, settings, error, message):
    X, y = table(rng, CPU)
    with pytest.raises(error, match=message):
        gpuml.successive_halving(
            gpuml.MLP(SIZES, device="cpu"), X, y, parameters, **{"n_epochs": 4} | settings
        )


def test_a_search_needs_a_number_and_memory_for_all(rng):
    from scipy.stats import uniform

    X, y = table(rng, CPU)
    model = gpuml.MLP(SIZES, device="cpu")
    rates = {"learning_rate": uniform(0.01, 1)}
    with pytest.raises(ValueError, match="distributions have no end: give n_models"):
        gpuml.successive_halving(model, X, y, rates)
    with pytest.raises(gpuml.DeviceMemoryError, match="so lower n_models to"):
        gpuml.successive_halving(model, X, y, rates, n_models=100, memory_limit="200 KiB")


def test_the_shared_measures_take_many_models(device, rng):
    for kind, loss in (("classes", softmax_cross_entropy), ("numbers", mean_squared_error)):
        X, y = table(rng, device, kind=kind)
        template = gpuml.MLP(SIZES, device=device)
        starts = rng.standard_normal((3, template.n_parameters)).astype("f")
        many = stack(template, device.asarray(starts))
        data = training.source_of(template, X, y, loss, 20, None)
        found = training.measured_on(many, data, loss)
        for i in range(3):
            template.parameters.flat[...] = device.asarray(starts[i])
            for name, value in gpuml.evaluate(template, X, y).items():
                assert found[name][i] == pytest.approx(value, rel=1e-4)
