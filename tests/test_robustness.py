"""Attacks and the training that resists them, against references of their own."""

from __future__ import annotations

import math
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits

import gpuml
from gpuml import MLP, Linear, Model, robustness, to_host
from gpuml.noise import Noise
from gpuml.robustness import PGD, adversarial_accuracy, fgsm, pgd
from gpuml.steps import Recorder

NORMS = ["inf", 2]


def problem(rng, n=40, n_features=6, n_classes=3):
    """Rows in [0, 1] whose label is the largest of their first features."""
    X = rng.random((n, n_features))
    return X, X[:, :n_classes].argmax(axis=1)


def mlp(device="cpu", dtype=np.float64, sizes=(6, 8, 7, 3), seed=1):
    return MLP(sizes, seed=seed, dtype=dtype, device=device)


def trained(rng, device="cpu", dtype=np.float32, **options):
    X, y = problem(rng, 400)
    model = mlp(device, dtype)
    gpuml.train(model, X, y, n_epochs=30, batch_size=32, optimizer=gpuml.Adam(0.01), **options)
    return model, X, y


# --- the same perturbations as references ------------------------------------------------------


def layers_of(model):
    p = {name: to_host(array).astype(np.float64) for name, array in model.parameters.items()}
    return [(p[weight], p[bias]) for weight, bias in model.layers]


def input_gradient(layers, x, y):
    """Of one row's cross entropy, by the chain rule in float64."""
    jacobian, a = np.eye(len(x)), x
    for i, (weight, bias) in enumerate(layers):
        z = a @ weight + bias[0]
        jacobian = jacobian @ weight
        a = z
        if i < len(layers) - 1:
            a = np.where(z > 0, z, 0)
            jacobian = jacobian * (z > 0)
    p = np.exp(a - a.max())
    p /= p.sum()
    p[y] -= 1
    return jacobian @ p


def reference_pgd(model, X, y, strength, norm, n_steps, step, bounds):
    layers, rows = layers_of(model), []
    for x0, label in zip(X, y, strict=True):
        x = x0.copy()
        for _ in range(n_steps):
            g = input_gradient(layers, x, label)
            if norm == "inf":
                x = x + step * np.sign(g)
                x = np.array(
                    [min(max(v, c - strength), c + strength) for v, c in zip(x, x0, strict=True)]
                )
            else:
                x = x + step * g / math.sqrt((g**2).sum())
                length = math.sqrt(((x - x0) ** 2).sum())
                x = x0 + (x - x0) * (strength / length if length > strength else 1)
            x = np.clip(x, *bounds)
        rows.append(x)
    return np.array(rows)


def torch_pgd(model, X, y, strength, norm, n_steps, step, bounds):
    torch = pytest.importorskip("torch")
    tensors = [[torch.tensor(a) for a in layer] for layer in layers_of(model)]
    x0, label = torch.tensor(X, dtype=torch.float64), torch.tensor(y)
    x = x0.clone()
    for _ in range(n_steps):
        x = x.detach().requires_grad_()
        a = x
        for i, (weight, bias) in enumerate(tensors):
            a = a @ weight + bias
            a = torch.relu(a) if i < len(tensors) - 1 else a
        torch.nn.functional.cross_entropy(a, label, reduction="sum").backward()
        with torch.no_grad():
            if norm == "inf":
                d = (x + step * x.grad.sign() - x0).clamp(-strength, strength)
            else:
                d = x + step * torch.nn.functional.normalize(x.grad, dim=1) - x0
                d = d.renorm(2, 0, strength)
            x = (x0 + d).clamp(*bounds)
    return x.detach().numpy()


@pytest.mark.parametrize("reference", [reference_pgd, torch_pgd])
@pytest.mark.parametrize(("norm", "strength"), [("inf", 0.15), (2, 0.5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_perturbations_are_those_of_a_reference(device, rng, reference, norm, strength, dtype):
    X, y = problem(rng)
    model = mlp(device, dtype)
    options = {"norm": norm, "bounds": (0.05, 0.97)}
    X = np.clip(X, 0.05, 0.97).astype(dtype)
    expected = reference(model, X, y, strength, norm, 9, 0.04, options["bounds"])
    found = pgd(model, X, y, strength, n_steps=9, step_size=0.04, random_start=False, **options)
    assert found.dtype == dtype
    assert abs(expected - X).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    expected = reference(model, X, y, strength, norm, 1, strength, options["bounds"])
    np.testing.assert_allclose(fgsm(model, X, y, strength, **options), expected, rtol=0, atol=1e-5)


def of_toolbox(model, torch, bounds):
    """A copy of a model for the Adversarial Robustness Toolbox."""
    estimators = pytest.importorskip("art.estimators.classification")
    layers = []
    for weight, bias in layers_of(model):
        layer = torch.nn.Linear(*weight.shape)
        layer.weight.data, layer.bias.data = torch.tensor(weight.T), torch.tensor(bias[0])
        layers += [layer.float(), torch.nn.ReLU()]
    found = torch.nn.Sequential(*layers[:-1])
    options = {"input_shape": (model.sizes[0],), "nb_classes": model.sizes[-1]}
    options |= {"loss": torch.nn.CrossEntropyLoss(), "clip_values": bounds}
    return estimators.PyTorchClassifier(found, **options)


@pytest.mark.parametrize(("norm", "strength"), [("inf", 0.15), (2, 0.5)])
@pytest.mark.parametrize("random_start", [False, True])
def test_perturbations_are_those_of_the_toolbox(
    device, rng, norm, strength, random_start, monkeypatch
):
    torch = pytest.importorskip("torch")
    evasion = pytest.importorskip("art.attacks.evasion")
    from art.attacks.evasion.projected_gradient_descent import projected_gradient_descent_pytorch

    X, y = problem(rng, 60)
    X, model = X.astype(np.float32), mlp(device, np.float32)
    # With norm 2 it cuts off at the bounds first, and then projects on the ball: no bounds.
    bounds = (0.0, 1.0) if norm == "inf" else None
    estimator = of_toolbox(model, torch, bounds)
    settings = PGD(strength, norm, 12, 0.04, random_start, bounds, seed=6)
    attack = robustness._Attack(
        settings, model, gpuml.softmax_cross_entropy, Noise(settings.seed, device)
    )
    start = to_host(attack._start(device.asarray(X)))
    monkeypatch.setattr(projected_gradient_descent_pytorch, "random_sphere", lambda *_: start - X)
    options = {"norm": np.inf if norm == "inf" else 2, "eps": strength, "verbose": False}
    options |= {"eps_step": 0.04, "max_iter": 12, "num_random_init": int(random_start)}
    options["batch_size"] = len(X)
    expected = evasion.ProjectedGradientDescent(estimator, **options).generate(X, y)
    options = {"norm": norm, "bounds": bounds}
    more = {"n_steps": 12, "step_size": 0.04, "random_start": random_start, "seed": 6}
    found = pgd(model, X, y, strength, **options, **more)
    assert abs(expected - X).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    sign = evasion.FastGradientMethod(estimator, np.inf if norm == "inf" else 2, strength)
    expected = sign.generate(X, y)
    np.testing.assert_allclose(fgsm(model, X, y, strength, **options), expected, rtol=0, atol=1e-5)


def test_an_attack_on_numbers_follows_the_squared_error(device, rng):
    W = rng.normal(size=(4, 2))
    model = Linear(4, 2, dtype=np.float64, device=device)
    model.parameters["weight"] = device.asarray(W)
    X, Y = rng.random((9, 4)), rng.normal(size=(9, 2))
    found = fgsm(model, X, Y, 0.01, bounds=None)
    np.testing.assert_allclose(found, X + 0.01 * np.sign((X @ W - Y) @ W.T), atol=1e-12)


def test_a_gradient_too_small_to_be_squared_still_shows_the_way(device):
    model = Linear(2, 2, device=device)  # sure of its label: logits 60 apart
    model.parameters["weight"] = device.asarray(np.array([[30.0, -30.0], [0.0, 0.0]], np.float32))
    X = np.array([[1.0, 0.5]], np.float32)
    found = fgsm(model, X, np.array([0]), 0.5, norm=2)
    np.testing.assert_allclose(found, [[0.5, 0.5]], atol=1e-6)


# --- what an attack may, and what it finds -----------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strength", [0, 0.01, 0.3, 1])
@pytest.mark.parametrize("random_start", [True, False])
def test_perturbations_stay_in_the_ball_and_in_the_range(device, rng, norm, strength, random_start):
    X, y = problem(rng, 300)
    X = X.astype(np.float32)
    X[:40] = X[:40].round()  # at the bounds
    model = mlp(device, np.float32)
    options = {"n_steps": 5, "random_start": random_start, "norm": norm}
    moved = pgd(model, X, y, strength, n_restarts=1 + random_start, **options)
    assert moved.min() >= 0
    assert moved.max() <= 1
    d = (moved - X).astype(np.float64)
    length = abs(d).max(axis=1) if norm == "inf" else np.sqrt((d**2).sum(axis=1))
    assert length.max() <= strength + 1e-6
    assert length.max() >= 0.9 * strength


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_uniform_in_the_ball(device, rng, norm):
    X, y = np.full((4000, 3), 0.5), np.zeros(4000, int)
    model = Linear(3, 2, dtype=np.float64, device=device)  # all zero: no gradient, so no step
    d = pgd(model, X, y, 0.2, norm=norm, n_steps=1) - X
    assert abs(d.mean(axis=0)).max() < 0.01
    length = abs(d).max(axis=1) if norm == "inf" else np.sqrt((d**2).sum(axis=1))
    for share in (0.25, 0.5, 0.9):  # of the radius: its cube is that of the volume
        assert abs((length < 0.2 * share).mean() - share**3) < 0.03


def test_pgd_fools_where_fgsm_does_and_restarts_more(device, rng):
    model, X, y = trained(rng, device)

    def accuracy(moved):
        return float((to_host(model(device.asarray(moved, np.float32))).argmax(axis=1) == y).mean())

    clean = accuracy(X)
    by_fgsm = accuracy(fgsm(model, X, y, 0.1))
    by_pgd = accuracy(pgd(model, X, y, 0.1, n_steps=20))
    again = accuracy(pgd(model, X, y, 0.1, n_steps=20, n_restarts=4))
    assert clean > 0.9
    assert clean - 0.1 > by_fgsm >= by_pgd >= again
    assert again <= accuracy(pgd(model, X, y, 0.1, n_steps=20, norm=2))


def test_restarts_keep_what_fools_and_then_the_largest_loss(device, rng):
    model, X, y = trained(rng, device)
    y = y.astype(np.int64)

    def outcome(moved):
        logits = to_host(model(device.asarray(moved, np.float32)))
        losses = [
            gpuml.softmax_cross_entropy(z[None], t[None])[0] for z, t in zip(logits, y, strict=True)
        ]
        return logits.argmax(axis=1) != y, np.array(losses)

    options = {"n_steps": 2, "step_size": 0.02, "seed": 3}
    one, several = (pgd(model, X, y, 0.15, n_restarts=n, **options) for n in (1, 6))
    (fooled, loss), (fooled_more, loss_more) = outcome(one), outcome(several)
    assert fooled_more[fooled].all()
    assert fooled_more.sum() > fooled.sum()
    same = fooled == fooled_more
    assert (loss_more[same] >= loss[same] - 1e-6).all()


def test_the_curve_of_accuracies(device, rng):
    model, X, y = trained(rng, device)
    strengths = [0.2, 0, 0.05, 0.1]
    found = adversarial_accuracy(model, X, y, strengths, n_steps=10, n_restarts=2)
    assert found.shape == (4,)
    assert found[1] == pytest.approx(gpuml.evaluate(model, X, y)["accuracy"])
    assert found[1] > found[2] > found[3] > found[0]
    for strength, accuracy in zip(strengths, found, strict=True):
        moved = pgd(model, X, y, strength, n_steps=10, n_restarts=2, seed=7)
        assert accuracy == pytest.approx(gpuml.evaluate(model, moved, y)["accuracy"], abs=0.03)
    one = adversarial_accuracy(model, X, y, 0.1, n_steps=10, n_restarts=2)
    assert one.shape == ()
    assert float(one) == pytest.approx(found[3], abs=0.03)


def test_a_seed_gives_the_same_bits_another_one_others(device, rng):
    X, y = problem(rng)
    model = mlp(device)
    first, again, other = (pgd(model, X, y, 0.1, n_steps=3, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_results_live_where_the_data_do_and_the_model_is_left_alone(device, rng):
    X, y = problem(rng)
    model = mlp(device)
    before = model.parameters.flat.copy()
    found = fgsm(model, device.asarray(X), device.asarray(y))
    assert gpuml.device_of(found) == device
    np.testing.assert_array_equal(to_host(found), fgsm(model, X, y))
    assert (model.parameters.flat == before).all()


def test_more_rows_than_one_pass_takes(device, rng, monkeypatch):
    monkeypatch.setattr("gpuml.robustness.EVALUATED_ROWS", 7)
    X, y = problem(rng)
    model = mlp(device)
    whole = fgsm(model, X, y)
    monkeypatch.setattr("gpuml.robustness.EVALUATED_ROWS", 100)
    np.testing.assert_array_equal(whole, fgsm(model, X, y))
    assert whole.shape == X.shape


# --- captured ----------------------------------------------------------------------------------


class SimulatedRecorder:
    """Captures work as a call to be made later: like a graph, it knows its own arrays only."""

    def __init__(self, fails=False) -> None:
        self.stream, self.fails, self.captured, self.n_launches = nullcontext(), fails, [], 0

    def working(self):
        return nullcontext()

    def capture(self, work, *arrays):
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        copies = [a.copy() for a in arrays]
        self.captured.append([a.shape for a in arrays])

        def launch():
            self.n_launches += 1
            work(*copies)

        return SimpleNamespace(launch=launch), copies, None


@pytest.fixture
def recorder(monkeypatch):
    found = SimulatedRecorder()
    monkeypatch.setattr(robustness, "_recorder", lambda *_: found)
    return found


def attacked(rng_seed=4, n=45, norm="inf", **options):
    X, y = problem(np.random.default_rng(rng_seed), n)
    return pgd(mlp(), X, y, 0.15 if norm == "inf" else 0.4, norm=norm, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"random_start": False}, {"n_restarts": 5}], ids=str)
def test_steps_that_are_replayed_lead_to_the_same_rows(recorder, monkeypatch, norm, options):
    options |= {"norm": norm, "n_steps": 40 if "n_restarts" in options else 120}
    replayed = attacked(**options)
    n_steps = options["n_steps"] * options.get("n_restarts", 1)
    assert recorder.n_launches == n_steps - 1, "all but the first, which loads what is needed"
    assert recorder.captured == [[(48, 6), (48, 6), (48,)]], "45 rows are filled up to 48"
    monkeypatch.setattr(robustness, "_recorder", lambda *_: None)
    np.testing.assert_allclose(replayed, attacked(**options), rtol=0, atol=1e-12)


def test_for_few_steps_nothing_is_captured(recorder):
    attacked(n_steps=robustness.CAPTURE_PAYS - 1)
    assert not recorder.captured
    attacked(n_steps=robustness.CAPTURE_PAYS)
    assert recorder.captured


def test_where_a_step_cannot_be_captured_it_is_called(recorder, monkeypatch):
    recorder.fails = True
    found = attacked(n_steps=40, n_restarts=3)
    assert not recorder.n_launches
    monkeypatch.setattr(robustness, "_recorder", lambda *_: None)
    np.testing.assert_allclose(found, attacked(n_steps=40, n_restarts=3), rtol=0, atol=1e-12)


def test_accuracies_need_few_shapes(recorder, monkeypatch, rng):
    model, X, y = trained(rng, dtype=np.float64)
    call = {"strengths": [0, 0.05, 0.2], "n_steps": 10, "n_restarts": 5}
    found = adversarial_accuracy(model, X, y, **call)
    shapes = [shapes[0] for shapes in recorder.captured]
    assert recorder.n_launches > 50
    assert len(shapes) <= 8
    monkeypatch.setattr(robustness, "_recorder", lambda *_: None)
    np.testing.assert_array_equal(found, adversarial_accuracy(model, X, y, **call))


def test_rows_are_filled_up_by_a_quarter_at_most():
    padded = [robustness._padded(n) for n in range(1, 8193)]
    assert all(n <= m <= max(n + 1, 1.25 * n) for n, m in enumerate(padded, 1))
    assert len(set(padded)) < 50
    assert padded[-1] == robustness.EVALUATED_ROWS


@pytest.mark.parametrize("norm", NORMS)
def test_captured_attacks_find_what_others_find(device, rng, norm, monkeypatch):
    if device.kind == "cpu" or find_spec("nvmath") is None:
        pytest.skip("graphs are for GPUs with nvmath-python")
    X, y = problem(rng, 45)
    model, graphs, capture = mlp(device), [], Recorder.capture
    call = {"norm": norm, "n_steps": 40, "n_restarts": 5, "seed": 3}

    def seen(self, *arguments):
        graphs.append(capture(self, *arguments))
        return graphs[-1]

    monkeypatch.setattr(Recorder, "capture", seen)
    found = pgd(model, X, y, 0.2, **call)
    curve = adversarial_accuracy(model, X, y, [0.05, 0.2], n_steps=40, n_restarts=5)
    assert len(graphs) >= 2, "it was captured"
    n_graphs = len(graphs)
    monkeypatch.setattr(robustness, "CAPTURE_PAYS", 10**9)
    eager = pgd(model, X, y, 0.2, **call)
    np.testing.assert_allclose(found, eager, rtol=0, atol=1e-7)
    other = adversarial_accuracy(model, X, y, [0.05, 0.2], n_steps=40, n_restarts=5)
    np.testing.assert_allclose(curve, other, atol=0.03)
    assert len(graphs) == n_graphs


def test_what_is_not_of_this_package_is_not_captured(device, rng, monkeypatch):
    monkeypatch.setattr(robustness, "CAPTURE_PAYS", 1)
    monkeypatch.setattr(robustness, "Recorder", lambda xp: pytest.fail("it must not be"))
    X, y = problem(rng)
    pgd(own(Own, device), X, y, n_steps=3)

    def loss(predictions, labels):
        return gpuml.softmax_cross_entropy(predictions, labels)

    pgd(mlp(device), X, y, n_steps=3, loss=loss)


# --- training ----------------------------------------------------------------------------------


def test_training_takes_its_gradients_at_perturbed_rows(device, rng):
    X, y = problem(rng, 50)
    options = {"n_steps": 4, "random_start": False}
    models = [mlp(device), mlp(device)]
    optimizer = gpuml.GradientDescent(0.5)
    for _ in range(3):  # by hand: perturb all rows, then a plain step on them
        moved = pgd(models[0], X, y, 0.1, **options)
        gpuml.train(models[0], moved, y, optimizer=optimizer, n_epochs=1, batch_size=None)
    call = {"optimizer": optimizer, "n_epochs": 3, "batch_size": None}
    history = gpuml.train(models[1], X, y, adversarial=PGD(0.1, **options), **call)
    a, b = (to_host(model.parameters.flat) for model in models)
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    assert history["loss"][0] > gpuml.evaluate(mlp(device), X, y)["loss"]


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("norm", NORMS)
def test_training_resists_and_repeats(device, rng, engine, norm):
    if engine == "graph" and (device.kind == "cpu" or find_spec("nvmath") is None):
        pytest.skip("graphs are for GPUs with nvmath-python")
    X, y = load_digits(return_X_y=True)
    X, y = X[:600] / 16, y[:600]
    attack = PGD(0.1 if norm == "inf" else 0.6, norm, n_steps=4)

    def weights_and_accuracy(**options):
        model = mlp(device, np.float32, (64, 32, 10))
        options |= {"optimizer": gpuml.Adam(0.005), "n_epochs": 15}
        gpuml.train(model, X, y, **options)
        call = {"norm": norm, "n_steps": 10}
        accuracy = adversarial_accuracy(model, X, y, attack.strength, **call)
        return to_host(model.parameters.flat), float(accuracy)

    robust, accuracy = weights_and_accuracy(adversarial=attack, engine=engine)
    again, _ = weights_and_accuracy(adversarial=attack, engine=engine)
    np.testing.assert_array_equal(robust, again)
    _, plain = weights_and_accuracy()
    assert accuracy > plain + 0.1


def test_the_engines_agree(device, rng):
    if device.kind == "cpu" or find_spec("nvmath") is None:
        pytest.skip("graphs are for GPUs with nvmath-python")
    X, y = problem(rng, 100)
    found = []
    for engine in ("eager", "graph"):
        model = mlp(device)
        options = {"n_epochs": 3, "batch_size": 32, "engine": engine}
        history = gpuml.train(model, X, y, adversarial=PGD(0.1, n_steps=3), **options)
        assert history.engine == engine
        found.append(to_host(model.parameters.flat))
    np.testing.assert_allclose(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_run_that_is_taken_up_again_ends_with_the_same_bits(device, rng, tmp_path, mapped):
    X, y = problem(rng, 100)
    if mapped:
        np.save(tmp_path / "X.npy", X)
        X = np.load(tmp_path / "X.npy", mmap_mode="r")
    attack = PGD(0.1, n_steps=3, seed=5)
    options = {"batch_size": None if mapped else 16, "adversarial": attack}
    whole, parts = mlp(device), mlp(device)
    gpuml.train(whole, X, y, n_epochs=6, **options)
    options["checkpoint"] = tmp_path / "run.safetensors"
    gpuml.train(parts, X, y, n_epochs=2, **options)
    parts = mlp(device)
    gpuml.train(parts, X, y, n_epochs=6, **options)
    np.testing.assert_array_equal(to_host(whole.parameters.flat), to_host(parts.parameters.flat))
    options["adversarial"] = PGD(0.2, n_steps=3, seed=5)
    with pytest.raises(gpuml.CheckpointError, match=r"adversarial training was .*strength=0.1"):
        gpuml.train(mlp(device), X, y, n_epochs=6, **options)
    del options["adversarial"]
    with pytest.raises(gpuml.CheckpointError, match="adversarial training"):
        gpuml.train(mlp(device), X, y, n_epochs=6, **options)


# --- bad input ---------------------------------------------------------------------------------


class NoInputGradient(Model):
    """A model of one's own whose backward stops at its parameters."""

    def forward(self, parameters, x, **options):
        predictions, backward = super().forward(parameters, x, **options)
        return predictions, lambda d, gradients=None: backward(d, gradients)


class Returns(Model):
    def forward(self, parameters, x, **options):
        predictions, backward = super().forward(parameters, x, **options)

        def back(d, gradients=None, *, input_gradient=False):
            return backward(d, gradients)[0], None

        return predictions, back


class Own(Model):
    """Carries the gradient on, and knows none of the options of this package."""

    def forward(self, parameters, x):
        predictions, backward = super().forward(parameters, x)

        def back(d, gradients=None, *, input_gradient=False):
            return backward(d, gradients, input_gradient=input_gradient)

        return predictions, back


def own(kind, device):
    model = mlp(device)
    return kind(model.parameters, model.layers)


@pytest.mark.parametrize("kind", [NoInputGradient, Returns])
def test_a_model_without_an_input_gradient_is_refused(device, rng, kind):
    X, y = problem(rng)
    with pytest.raises(ValueError, match=f"{kind.__name__} has no gradient with respect to its"):
        fgsm(own(kind, device), X, y)
    with pytest.raises(ValueError, match="d_x, of the shape of x"):
        gpuml.train(own(kind, device), X, y, adversarial=PGD(0.1))


def test_a_model_of_ones_own_is_attacked_like_others(device, rng):
    X, y = problem(rng)
    np.testing.assert_array_equal(fgsm(own(Own, device), X, y), fgsm(mlp(device), X, y))
    gpuml.train(own(Own, device), X, y, adversarial=PGD(0.1), n_epochs=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strength": -0.1}, "strength must be a number, 0 or more, got -0.1"),
        ({"strength": math.nan}, "strength must be a number"),
        ({"strength": "0.1"}, "strength must be a number"),
        ({"strength": True}, "strength must be a number"),
        ({"strength": 1.5}, r"strength=1.5 is beyond the range of the data.*other by 1"),
        ({"strength": 2.6, "norm": 2}, r"strength=2.6 is beyond .*other by 2.449"),
        ({"norm": 1}, "norm must be 'inf' or 2, got 1"),
        ({"norm": "l2"}, "norm must be 'inf' or 2, got 'l2'"),
        ({"bounds": (1, 0)}, "bounds must be the least and the greatest"),
        ({"bounds": 1}, "bounds must be the least and the greatest"),
        ({"bounds": (0, math.nan)}, "bounds must be the least and the greatest"),
        ({"bounds": (0, 0.5)}, r"X has numbers from 0.\d+ to 0.9\d+, outside bounds=\(0.0, 0.5\)"),
        ({"n_steps": 0}, "n_steps must be a positive integer"),
        ({"step_size": -1}, "step_size must be a positive number"),
        ({"n_restarts": 0}, "n_restarts must be a positive integer"),
        ({"n_restarts": 2, "random_start": False}, "all restarts are the same"),
        ({"y": None}, "y is missing"),
        ({"y": np.full(40, 3)}, "labels must be from 0 to 2"),
        ({"y": np.zeros(39, int)}, "X has 40 rows, y has 39"),
    ],
)
def test_what_makes_no_sense_is_refused(rng, change, reason):
    X, y = problem(rng)
    call = {"X": X, "y": y, "strength": 0.1} | change
    with pytest.raises(ValueError, match=reason):
        pgd(mlp(), **call)
    if {"y", "n_restarts"}.isdisjoint(change):
        settings = {name: call[name] for name in call if name not in "Xy"}
        with pytest.raises(ValueError, match=reason):
            gpuml.train(mlp(), X, y, adversarial=PGD(**settings))


def test_what_is_no_attack_or_no_model_is_refused(rng):
    X, y = problem(rng)
    with pytest.raises(TypeError, match=r"gpuml.robustness.PGD\(strength=0.1\), got 0.1"):
        gpuml.train(mlp(), X, y, adversarial=0.1)
    with pytest.raises(TypeError, match="expected a model"):
        fgsm(None, X, y)
    with pytest.raises(ValueError, match="accuracy is for labels"):
        adversarial_accuracy(mlp(), X, X[:, :3], 0.1)
    with pytest.raises(ValueError, match="strength must be a number"):
        adversarial_accuracy(mlp(), X, y, [0.1, -0.1])


@pytest.mark.parametrize("engine", ["fused", "one_pass", "gram"])
def test_engines_that_know_no_inputs_are_refused(rng, engine):
    X, y = problem(rng)
    with pytest.raises(ValueError, match="adversarial training is for the engines eager and gra"):
        gpuml.train(mlp(), X, y, adversarial=PGD(0.1), engine=engine)


def test_several_ranks_are_refused(rng):
    from gpuml.batches import ArrayBatches
    from gpuml.losses import softmax_cross_entropy
    from gpuml.steps import make_step

    X, y = problem(rng)
    ranks = {"communicator": SimpleNamespace(world_size=2, rank=0), "method": PGD(0.1)}
    data = ArrayBatches(X, y, 10)
    with pytest.raises(ValueError, match="in one process so far, and there are 2 ranks"):
        make_step(mlp(), softmax_cross_entropy, gpuml.Adam(), data, None, **ranks)


@pytest.mark.parametrize("engine", [None, "eager", "gram"])
def test_training_by_several_ranks_is_refused_by_all_of_them(rng, engine):
    X, y = problem(rng)

    def work(communicator):
        options = {"adversarial": PGD(0.1), "engine": engine, "communicator": communicator}
        model = mlp()
        with pytest.raises(ValueError, match="adversarial training runs in one process so far"):
            gpuml.train(model, X, y, **options)

    gpuml.distributed.simulate(2, work)


def test_numbers_that_are_not_finite_are_named_by_training(rng):
    X, y = problem(rng)
    X[3, 1] = math.nan
    with pytest.raises(gpuml.DivergenceError, match="row 3, column 1 of X is not"):
        gpuml.train(mlp(), X, y, adversarial=PGD(0.1))


def test_a_checkpoint_begun_plainly_by_another_engine_is_refused(rng, tmp_path):
    """The engine by which a run began cannot go on with it: that is no reason to find none."""
    X, Y = rng.normal(size=(40, 5)), rng.normal(size=(40, 2))
    options = {"n_epochs": 1, "batch_size": None, "checkpoint": tmp_path / "run.safetensors"}
    gpuml.train(gpuml.Linear(5, 2, device="cpu"), X, Y, engine="one_pass", **options)
    with pytest.raises(gpuml.CheckpointError, match="adversarial"):
        gpuml.train(
            gpuml.Linear(5, 2, device="cpu"), X, Y, adversarial=PGD(0.1, bounds=None), **options
        )
