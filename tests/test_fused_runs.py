"""Runs that train several epochs in one launch, tested without a GPU.

In the place of the kernel a stand-in takes the same steps one by one; arrays are NumPy's.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import gpuml
from gpuml import MLP, Adam, GradientDescent, training
from gpuml.fused import FusedStep
from gpuml.steps import EagerStep

N_EPOCHS = 21


class Settable(np.ndarray):
    """An array with the method by which CuPy copies from the host."""

    def set(self, host):
        self[...] = host


class StandIn(FusedStep):
    """Takes the steps of the eager engine."""

    n_launches = 0

    def __init__(self, model, loss, optimizer, data):
        self._eager, self._data = EagerStep(model, loss, optimizer), data
        self.state, self.reason = self._eager.state, ""
        self._parameters = model.parameters.flat

    @property
    def changing(self):
        return [self._parameters, *self.state.values()]

    def launch(self, order, rates, losses):
        type(self).n_launches += 1
        (X, y), size = self._data.arrays, self._data.batch_size
        for rows, rate, found in zip(order, rates, losses, strict=False):
            self.state["learning_rate"][...] = rate
            for i in range(self._data.n_steps):
                batch = rows[i * size : (i + 1) * size]
                found[i] = self._eager(X[batch], y[batch])


@pytest.fixture
def simulated(monkeypatch):
    """A device library for which NumPy stands in."""

    class Stream:
        def __init__(self, non_blocking=False):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_event(self, event):
            assert event is not None

    def empty(shape, dtype):
        return np.full(shape, 7, dtype).view(Settable)

    xp = SimpleNamespace(cuda=SimpleNamespace(Stream=Stream), empty=empty)
    xp.empty_like = np.empty_like
    cupyx = ModuleType("cupyx")
    cupyx.empty_pinned = empty
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    begin = training._FusedRun.__init__

    def made(self, *arguments):
        monkeypatch.setattr(type(arguments[0].device), "xp", property(lambda device: Library(xp)))
        begin(self, *arguments)

    class Library:
        """The stand-in where it has a function, and NumPy for all others."""

        def __init__(self, first):
            self.first = first

        def __getattr__(self, name):
            return getattr(self.first, name, None) or getattr(np, name)

        def __eq__(self, other):
            return other is np

        __hash__ = None

    monkeypatch.setattr(training._FusedRun, "__init__", made)
    monkeypatch.setattr(training, "fused", lambda xp: False)
    monkeypatch.setattr(training, "all_finite", lambda x: np.isfinite(x).all())
    monkeypatch.setattr(training.Trace, "event", staticmethod(lambda: object()))
    monkeypatch.setattr(
        training,
        "make_step",
        lambda model, loss, optimizer, data, *_, **__: StandIn(model, loss, optimizer, data),
    )


def problem():
    rng = np.random.default_rng(5)
    X = rng.normal(size=(83, 6)).astype(np.float32)
    return X, rng.integers(3, size=83)


def train(engine=None, n_epochs=N_EPOCHS, **options):
    X, y = problem()
    model = MLP([6, 9, 3], device="cpu")
    options = {"optimizer": GradientDescent(0.05, momentum=0.9), "batch_size": 16} | options
    try:
        history = gpuml.train(model, X, y, n_epochs=n_epochs, engine=engine, **options)
    except (gpuml.DivergenceError, gpuml.TrainingInterrupted) as error:
        return model.parameters.flat, error.history
    return model.parameters.flat, history


def told(history):
    return {name: column for name, column in history.columns.items() if name != "seconds"}


HELD_OUT = {"validation_data": problem()}
CASES = {
    "plain": {},
    "Adam": {"optimizer": Adam(0.02)},
    "in order": {"shuffle": False},
    "schedule": {"schedule": "cosine"},
    "validated": HELD_OUT,
    "patience": HELD_OUT | {"patience": 1, "optimizer": Adam(0.3)},
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_they_train_what_epochs_one_by_one_train(case, request):
    weights, history = train(**case)
    request.getfixturevalue("simulated")
    again, other = train(**case)
    assert again.tobytes() == weights.tobytes()
    assert told(other).keys() == told(history).keys()
    for name, column in told(history).items():
        np.testing.assert_allclose(other[name], column, rtol=1e-6, err_msg=name)
    assert other["seconds"] == sorted(other["seconds"])
    assert other.notes == history.notes


def test_launches_grow(simulated):
    StandIn.n_launches = 0
    train(n_epochs=31)
    assert StandIn.n_launches == 5, "of 1, 2, 4, 8 and 16 epochs"


def test_no_launch_has_more_steps_than_allowed(simulated, monkeypatch):
    monkeypatch.setattr(training, "CHUNK_STEPS", 12)  # two epochs
    StandIn.n_launches = 0
    assert len(train(n_epochs=7)[1]) == 7
    assert StandIn.n_launches == 4, "of 1, 2, 2 and 2 epochs"


@pytest.mark.parametrize("bad", range(1, 12))
def test_of_a_launch_that_diverges_the_good_epochs_are_kept(simulated, bad):
    # From epoch number `bad` on, counted from 1, the rate is such that the loss overflows.
    options = {"schedule": lambda i, n: 1e30 if i + 1 >= bad else 1.0}
    weights, history = train(**options)
    assert len(history) < N_EPOCHS
    assert np.isfinite(weights).all()
    good, expected = train(n_epochs=len(history), **options) if len(history) else (None, None)
    if expected:
        assert good.tobytes() == weights.tobytes()
        assert told(expected) == told(history)
    else:
        assert (weights == MLP([6, 9, 3], device="cpu").parameters.flat).all()


@pytest.mark.parametrize("bad", range(1, 12))
def test_a_weight_that_is_not_finite_counts_though_no_loss_shows_it(simulated, monkeypatch, bad):
    factors = {"schedule": lambda i, n: 1 + (i + 1) / 1000}  # by which the stand-in knows epochs
    launch = StandIn.launch

    def breaking(self, order, rates, losses):
        for i, rate in enumerate(rates):
            launch(self, order[i : i + 1], rates[i : i + 1], losses[i : i + 1])
            if round((float(rate) / 0.05 - 1) * 1000) == bad:
                self._eager._parameters["layers.0.bias"][0, 4] = -np.inf  # the unit is off now

    monkeypatch.setattr(StandIn, "launch", breaking)
    weights, history = train(**factors)
    assert len(history) == bad - 1
    monkeypatch.setattr(StandIn, "launch", launch)
    expected = MLP([6, 9, 3], device="cpu").parameters.flat
    if bad > 1:
        expected, _ = train(n_epochs=bad - 1, **factors)
    assert expected.tobytes() == weights.tobytes()


@pytest.mark.parametrize("name", ["plain", "validated"])
@pytest.mark.parametrize("place", ["launch", "event", "append", "copy"])
@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
def test_interrupted_anywhere_weights_and_history_agree(simulated, monkeypatch, name, place, after):
    before = 2 + (name == "validated") if place == "copy" else 0  # labels and rate, to begin with
    calls = itertools.count(1 - before)

    def interrupting(function):
        def call(*arguments):
            if next(calls) == after:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    if place == "launch":
        monkeypatch.setattr(StandIn, "launch", interrupting(StandIn.launch))
    elif place == "event":
        monkeypatch.setattr(training.Trace, "event", staticmethod(interrupting(lambda: object())))
    elif place == "append":
        monkeypatch.setattr(training.History, "append", interrupting(training.History.append))
    else:
        monkeypatch.setattr(training, "to_host", interrupting(training.to_host))
    with monkeypatch.context():
        weights, history = train(**CASES[name])
    calls = itertools.count(10**9)
    n = len(history)
    if n:
        again, expected = train(n_epochs=n, **CASES[name])
        assert told(expected) == told(history)
    else:
        again = MLP([6, 9, 3], device="cpu").parameters.flat
    assert again.tobytes() == weights.tobytes()


@pytest.mark.parametrize("every", [1, 3, "1 s"])
def test_taken_up_again_they_end_with_the_same_bits(simulated, tmp_path, case, every):
    weights, history = train(**case)
    path = tmp_path / "run.safetensors"
    for n_epochs in (2, 3, 10, N_EPOCHS):
        if case.get("schedule") and n_epochs < N_EPOCHS:
            continue  # a schedule is for a number of epochs
        again, other = train(n_epochs=n_epochs, checkpoint=path, checkpoint_every=every, **case)
    assert again.tobytes() == weights.tobytes()
    assert told(other) == told(history)
