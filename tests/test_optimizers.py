from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from sklearn.linear_model import Ridge

import gpuml
from gpuml import Adam, GradientDescent, Linear, Parameters
from gpuml.optimizers import get_optimizer

SHAPES = {"weight": (2, 3), "bias": (1, 3)}
WEIGHTS = np.arange(9) < 6


def textbook_descent(w, gradients, rate, momentum, decay=0.0):
    v = np.zeros_like(w)
    for g in gradients:
        v = momentum * v + g + decay * WEIGHTS * w
        w = w - rate * v
    return w


def textbook_adam(w, gradients, rate, beta1, beta2, epsilon, decay=0.0):
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
        w = w - rate * (step + decay * WEIGHTS * w)
    return w


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("optimizer", "textbook"),
    [
        (GradientDescent(0.1), lambda w, g: textbook_descent(w, g, 0.1, 0.0)),
        (GradientDescent(0.1, momentum=0.9), lambda w, g: textbook_descent(w, g, 0.1, 0.9)),
        (Adam(), lambda w, g: textbook_adam(w, g, 0.001, 0.9, 0.999, 1e-8)),
        (
            Adam(0.05, beta1=0.5, beta2=0.8, epsilon=0.1),
            lambda w, g: textbook_adam(w, g, 0.05, 0.5, 0.8, 0.1),
        ),
        (
            GradientDescent(0.1, weight_decay=0.3),
            lambda w, g: textbook_descent(w, g, 0.1, 0.0, 0.3),
        ),
        (
            GradientDescent(0.1, momentum=0.9, weight_decay=0.3),
            lambda w, g: textbook_descent(w, g, 0.1, 0.9, 0.3),
        ),
        (
            Adam(0.05, beta1=0.5, beta2=0.8, epsilon=0.1, weight_decay=2.0),
            lambda w, g: textbook_adam(w, g, 0.05, 0.5, 0.8, 0.1, 2.0),
        ),
    ],
)
def test_updates_follow_the_textbook(device, rng, dtype, optimizer, textbook):
    start, steps = (
        rng.normal(size=9),
        rng.normal(size=(20, 9)) * 10.0 ** rng.integers(-3, 3, (20, 1)),
    )
    parameters = Parameters(device.asarray(start.copy(), dtype), SHAPES)
    state = optimizer.init(parameters)
    for step in steps:
        gradients = Parameters(device.asarray(step, dtype), SHAPES)
        optimizer.update(parameters, gradients, state)
        np.testing.assert_array_equal(gpuml.to_host(gradients.flat), step.astype(dtype))
    tolerance = 1e-12 if dtype is np.float64 else 1e-4
    np.testing.assert_allclose(
        gpuml.to_host(parameters.flat), textbook(start, steps), rtol=tolerance, atol=tolerance
    )
    assert all(array.dtype == dtype for array in state.values())
    assert all(gpuml.device_of(array) == device for array in state.values())


def test_the_first_step_of_adam_has_the_size_of_the_rate(device):
    parameters = Parameters(device.xp.zeros(9), SHAPES)
    gradients = Parameters(device.asarray(10.0 ** np.arange(-4, 5)), SHAPES)
    Adam(0.01).update(parameters, gradients, Adam(0.01).init(parameters))
    np.testing.assert_allclose(gpuml.to_host(parameters.flat), -0.01, rtol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda decay: GradientDescent(0.1, weight_decay=decay),
        lambda decay: GradientDescent(0.1, momentum=0.9, weight_decay=decay),
        lambda decay: Adam(0.1, weight_decay=decay),
    ],
)
def test_each_of_a_population_can_have_its_own_weight_decay(device, rng, make):
    decays = [0.1, 0.5, 0.0]
    start, steps = rng.normal(size=(3, 9)), rng.normal(size=(4, 3, 9))
    together = Parameters(device.asarray(start.copy()), SHAPES)
    state = make(0.1).init(together)
    assert state["weight_decay"].shape == (3, 1)
    state["weight_decay"][...] = device.asarray(decays)[:, None]
    for step in steps:
        make(0.1).update(together, Parameters(device.asarray(step), SHAPES), state)
    for i, decay in enumerate(decays):
        alone = Parameters(device.asarray(start[i].copy()), SHAPES)
        own = make(decay).init(alone)
        assert ("weight_decay" in own) == (decay != 0)
        for step in steps:
            make(decay).update(alone, Parameters(device.asarray(step[i]), SHAPES), own)
        np.testing.assert_allclose(
            gpuml.to_host(together.flat)[i], gpuml.to_host(alone.flat), rtol=1e-12, atol=1e-15
        )


def test_without_weight_decay_there_is_nothing_to_pay_for(device):
    parameters = Parameters(device.xp.zeros(9), SHAPES)
    assert set(GradientDescent(0.1).init(parameters)) == {"learning_rate", "momentum", "step"}
    extra = set(Adam(weight_decay=0.1).init(parameters)) - set(Adam().init(parameters))
    assert extra == {"weight_decay", "decaying"}


@pytest.mark.parametrize(
    ("shapes", "decaying"),
    [
        ({"weight": (2, 2), "bias": (1, 2)}, [1, 1, 1, 1, 0, 0]),
        ({"weight": (2, 1)}, [1, 1]),
        ({"weight": (1, 2), "bias": (1, 2)}, [1, 1, 0, 0]),  # one feature: also a single row
        ({"layers.0.weight": (1, 2), "layers.0.bias": (1, 2), "out.weight": (2, 1)}, "110011"),
        ({"bias": (1, 1), "weight": (2, 1), "out.bias": (1, 1)}, [0, 1, 1, 0]),
        ({"bias": (2, 1), "scale": (1,)}, [1, 1, 1]),  # not a bias of a layer
        ({"bias.weight": (1, 2)}, [1, 1]),
    ],
)
@pytest.mark.parametrize("make", [GradientDescent, Adam])
def test_weights_decay_and_biases_do_not(device, shapes, decaying, make):
    decaying = np.array(list(decaying), float)
    for leading in ((), (3,)):
        flat = device.xp.ones((*leading, len(decaying)), np.float32)
        parameters = Parameters(flat, shapes)
        optimizer = make(0.5, weight_decay=0.5)
        optimizer.update(parameters, parameters.zeros_like(), optimizer.init(parameters))
        expected = np.broadcast_to(1 - 0.25 * decaying, flat.shape)
        np.testing.assert_array_equal(gpuml.to_host(flat), expected)


def test_descent_with_weight_decay_finds_what_ridge_regression_finds(device, rng):
    X = rng.normal(size=(80, 3))
    Y = X @ rng.normal(size=(3, 2)) + 10 + rng.normal(size=(80, 2))
    model = Linear(3, 2, dtype=np.float64, device=device)
    optimizer = GradientDescent(0.3, momentum=0.5, weight_decay=0.7)
    gpuml.train(model, X, Y, optimizer=optimizer, n_epochs=400, batch_size=None)
    # the mean over 80 · 2 numbers, and half the decay
    exact = Ridge(alpha=0.7 / 2 * Y.size).fit(X, Y)
    weight, bias = (gpuml.to_host(p) for p in model.parameters.values())
    np.testing.assert_allclose(weight, exact.coef_.T, rtol=1e-9)
    np.testing.assert_allclose(bias[0], exact.intercept_, rtol=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (GradientDescent(0.1, weight_decay=0.3), ("SGD", {"lr": 0.1})),
        (
            GradientDescent(0.1, momentum=0.9, weight_decay=0.3),
            ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ),
        (Adam(0.02, weight_decay=0.3), ("AdamW", {"lr": 0.02})),
        (
            Adam(0.02, beta1=0.5, beta2=0.8, epsilon=0.1, weight_decay=0.3),
            ("AdamW", {"lr": 0.02, "betas": (0.5, 0.8), "eps": 0.1}),
        ),
    ],
)
def test_weight_decay_is_that_of_pytorch(device, rng, optimizer, theirs):
    torch = pytest.importorskip("torch")
    start, steps = rng.normal(size=9), rng.normal(size=(30, 9))
    parameters = Parameters(device.asarray(start.copy()), SHAPES)
    state = optimizer.init(parameters)
    for step in steps:
        optimizer.update(parameters, Parameters(device.asarray(step), SHAPES), state)

    weight, bias = (torch.tensor(start[part], requires_grad=True) for part in (WEIGHTS, ~WEIGHTS))
    name, options = theirs
    groups = [{"params": [weight], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    other = getattr(torch.optim, name)(groups, **options)
    for step in steps:
        weight.grad, bias.grad = (torch.tensor(step[part]) for part in (WEIGHTS, ~WEIGHTS))
        other.step()
    expected = np.concatenate([weight.detach().numpy(), bias.detach().numpy()])
    np.testing.assert_allclose(gpuml.to_host(parameters.flat), expected, rtol=1e-11, atol=1e-13)


EACH = [
    GradientDescent(0.1),
    GradientDescent(0.1, momentum=0.9),
    GradientDescent(0.1, momentum=0.9, weight_decay=0.01),
    Adam(),
    Adam(weight_decay=0.01),
]


@pytest.mark.parametrize("optimizer", EACH, ids=repr)
def test_a_step_allocates_nothing_of_the_size_of_the_parameters(rng, optimizer):
    parameters = Parameters(rng.normal(size=100_000), {"weight": (100, 990), "bias": (1, 1000)})
    gradients = Parameters(rng.normal(size=100_000), parameters.shapes)
    state = optimizer.init(parameters)
    places = {name: array.ctypes.data for name, array in state.items()}
    tracemalloc.start()
    for _ in range(3):
        optimizer.update(parameters, gradients, state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80_000  # a tenth of the parameters
    vectors = [name for name, array in state.items() if array.size > 1]
    assert {name: state[name].ctypes.data for name in vectors} == {n: places[n] for n in vectors}


def test_settings_are_plain_numbers_that_tell_optimizers_apart():
    assert GradientDescent(0.1, momentum=0.9).settings() == {
        "name": "gradient_descent",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.0,
    }
    assert Adam(weight_decay=np.float32(0.5)).settings() == {
        "name": "adam",
        "learning_rate": 0.001,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weight_decay": 0.5,
    }
    assert type(Adam(weight_decay=np.float32(0.5)).settings()["weight_decay"]) is float
    changed = [
        GradientDescent(1),
        GradientDescent(2),
        GradientDescent(1, momentum=0.5),
        GradientDescent(1, weight_decay=0.5),
        Adam(1),
        Adam(2),
        Adam(1, beta1=0.5),
        Adam(1, beta2=0.5),
        Adam(1, epsilon=0.5),
        Adam(1, weight_decay=0.5),
    ]
    texts = [json.dumps(optimizer.settings()) for optimizer in changed]
    assert len(set(texts)) == len(changed)
    assert json.loads(texts[0]) == GradientDescent(np.float64(1.0)).settings()


@pytest.mark.parametrize("optimizer", EACH, ids=repr)
def test_an_optimizer_prints_as_the_call_that_makes_it(optimizer):
    twin = eval(repr(optimizer), vars(gpuml.optimizers))
    assert type(twin) is type(optimizer)
    assert twin.settings() == optimizer.settings()
    assert ("weight_decay" in repr(optimizer)) == (optimizer.weight_decay != 0)


@pytest.mark.parametrize(
    "optimizer",
    [
        GradientDescent(0.1, momentum=0.9),
        Adam(0.1),
        GradientDescent(0.1, weight_decay=0.3),
        Adam(0.1, weight_decay=0.3),
    ],
)
def test_rates_can_differ_along_leading_axes_and_change_between_steps(device, rng, optimizer):
    start, step = rng.normal(size=(3, 9)), rng.normal(size=(3, 9))
    parameters = Parameters(device.asarray(start.copy()), SHAPES)
    state = optimizer.init(parameters)
    state["learning_rate"][...] = device.asarray([[0.1], [0.2], [0.0]])
    for _ in range(2):
        optimizer.update(parameters, Parameters(device.asarray(step), SHAPES), state)
    moved = gpuml.to_host(parameters.flat) - start
    alone = Parameters(device.asarray(start[1].copy()), SHAPES)
    other = optimizer.init(alone)
    other["learning_rate"][...] = 0.2
    for _ in range(2):
        optimizer.update(alone, Parameters(device.asarray(step[1]), SHAPES), other)
    np.testing.assert_allclose(start[1] + moved[1], gpuml.to_host(alone.flat), rtol=1e-12)
    assert not moved[2].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientDescent(0),
        lambda: GradientDescent(-1),
        lambda: GradientDescent(float("nan")),
        lambda: GradientDescent(float("inf")),
        lambda: GradientDescent(0.1, momentum=1),
        lambda: GradientDescent(0.1, momentum=-0.1),
        lambda: Adam(0),
        lambda: Adam(beta1=1),
        lambda: Adam(beta2=-0.5),
        lambda: Adam(epsilon=0),
        lambda: GradientDescent(0.1, weight_decay=-0.1),
        lambda: GradientDescent(0.1, weight_decay=float("nan")),
        lambda: GradientDescent(0.1, weight_decay=float("inf")),
        lambda: Adam(weight_decay=-1e-9),
        lambda: Adam(weight_decay=float("nan")),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must be .*, got"):
        make()


def test_optimizers_have_names():
    assert isinstance(get_optimizer("adam"), Adam)
    with pytest.raises(ValueError, match="did you mean 'gradient_descent'"):
        get_optimizer("gradient-descent")
