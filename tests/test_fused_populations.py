"""The kernel that trains many models at once: each as it would be trained alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_engines import problem, some_gpu

import gpuml
from gpuml import MLP, Adam, GradientDescent, fused, kernels
from gpuml.batches import ArrayBatches
from gpuml.fused_populations import (
    FusedPopulation,
    plan_population,
    population_plan,
)
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.models import Parameters
from gpuml.steps import EagerStep

LOSSES = [softmax_cross_entropy, mean_squared_error]
GOAL = (64, 32, 10)
# Sizes, batch, how many models of a block if the plan does not say.
SHAPES = [
    (GOAL, 64, None),
    ((13, 50, 3), 20, 2),
    ((5, 3, 2), 7, 3),
    ((1, 1, 1), 1, None),
    ((30, 33, 32), 33, None),
    ((9, 8, 16), 256, 2),
    ((100, 60, 8), 17, None),
    ((2, 100, 31), 60, 1),
]


# --- without a GPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("sizes", "batch_size", "models"), SHAPES, ids=str)
def test_it_compiles_for_many_sizes_and_the_host_reckons_its_memory_right(
    monkeypatch, sizes, batch_size, models, architecture
):
    nvrtc = pytest.importorskip("test_kernels", reason="its compiler")
    some_gpu(monkeypatch)
    cases = list(itertools.product(LOSSES, (0, 1, 2), (False, True)))
    first = sum(sizes) % 4  # some for each shape: each takes a second
    for i, (loss, n_states, own_order) in enumerate(cases[first::4]):
        options = {"models": None if own_order else models, "width": i % 4 + 1}
        found = plan_population(
            sizes, batch_size, loss, n_states, 1000, own_order=own_order, **options
        )
        defined = [o[2:].replace("=", " ") for o in found.options]
        text = "".join(f"#define {line}\n" for line in defined) + kernels.source("mlp_population")
        size, log = nvrtc.compile_cuda_c(text, architecture)
        assert size > 0, log
        assert log == ""


def test_a_wrong_reckoning_is_refused(monkeypatch):
    nvrtc = pytest.importorskip("test_kernels", reason="its compiler")
    some_gpu(monkeypatch)
    found = plan_population(GOAL, 64, softmax_cross_entropy, 1, 1000)
    text = f"#define SHARED_BYTES {found.shared_bytes + 8}\n"
    text += "".join(
        f"#define {o[2:].replace('=', ' ')}\n" for o in found.options if "SHARED" not in o
    )
    size, log = nvrtc.compile_cuda_c(text + kernels.source("mlp_population"), "sm_90")
    assert size == 0
    assert "the host reckons differently" in log


def plan(sizes=GOAL, batch_size=64, n_models=1024, n_states=1, **options):
    return plan_population(sizes, batch_size, softmax_cross_entropy, n_states, n_models, **options)


def test_blocks_hold_what_fits_and_spread_over_the_gpu(monkeypatch):
    some_gpu(monkeypatch)
    assert (plan().models, plan().warps, plan().threads) == (4, 5, 640)
    assert plan(n_models=132).models == 1, "a multiprocessor for each"
    assert plan(n_models=264).models == 2
    assert plan(own_order=True).models == 1
    assert plan(n_states=2).models == 3, "Adam keeps two vectors"
    assert plan(batch_size=16, sizes=(4, 8, 3), n_models=10**6).models == 10
    assert plan(batch_size=16).warps == 3, "few, so that more models fit"
    assert plan(batch_size=1, sizes=(4, 8, 3)).warps == 2, "no more than tiles"
    some_gpu(monkeypatch, capability=(8, 0), shared=163 * 1024)
    assert plan().models == 2
    for n_models in (1, 100, 1000):
        assert plan(n_models=n_models).shared_bytes <= 162 * 1024


@pytest.mark.parametrize(
    ("sizes", "batch_size", "reason"),
    [
        ((64, 32, 16, 10), 64, "for one hidden layer, and these models have 2"),
        ((64, 10), 64, "for one hidden layer, and these models have 0"),
        ((64, 32, 33), 64, "33 outputs, and its kernel is for up to 32"),
        (GOAL, 257, "batches of 257 rows are too large: at most 256"),
        ((784, 128, 10), 64, "bytes of shared memory with its batches, and a block has 231,424"),
    ],
)
def test_what_does_not_fit_is_said(monkeypatch, sizes, batch_size, reason):
    some_gpu(monkeypatch)
    assert reason in plan(sizes, batch_size)


def test_a_plan_that_does_not_fit_is_refused(monkeypatch):
    some_gpu(monkeypatch)
    assert "5 models do not fit" in plan(models=5)


def test_the_cpu_has_no_such_kernel():
    X, y = problem([4, 3], 30, True)
    model = MLP([4, 8, 3], device="cpu")
    reason = population_plan(
        model, softmax_cross_entropy, GradientDescent(), ArrayBatches(X, y, 16), 5
    )
    assert reason == "its kernels are for GPUs"


# --- on a GPU ----------------------------------------------------------------------------------


@pytest.fixture
def gpu(device):
    if device.kind == "cpu":
        pytest.skip("fused kernels are for GPUs")
    return device


class Case:
    """Models of one shape with settings of their own, and how each is trained alone."""

    def __init__(
        self, sizes, batch_size, n_models, *, classes=True, kind="momentum", rest=3, n_epochs=2,
        own_order=False, seed=0,
    ):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.sizes, self.batch_size, self.n_models = list(sizes), batch_size, n_models
        self.X, self.y = problem(sizes, 2 * batch_size + rest % batch_size, classes, seed)
        self.loss = softmax_cross_entropy if classes else mean_squared_error
        self.kind, self.own_order = kind, own_order
        shape = (n_models if own_order else 1, n_epochs, len(self.X))
        self.orders = np.broadcast_to(
            np.argsort(rng.random(shape), axis=-1).astype(np.int32), (n_models, *shape[1:])
        )
        scale = 0.01 if kind == "adam" else 0.05
        self.rates = (scale * rng.uniform(0.5, 1, (n_epochs, n_models))).astype(np.float32)
        self.momenta = rng.uniform(0.5, 0.95, n_models).astype(np.float32)
        self.decays = rng.uniform(0.01, 0.1, n_models).astype(np.float32)
        self.n_steps = -(-len(self.X) // batch_size)

    def optimizer(self, i):
        decay = float(self.decays[i])
        if self.kind == "adam":
            return Adam(0.1, beta1=float(self.momenta[i]), weight_decay=decay)
        momentum = float(self.momenta[i]) if self.kind == "momentum" else 0
        return GradientDescent(0.1, momentum=momentum, weight_decay=decay)

    def plan(self, device, **options):
        n_states = {"plain": 0, "momentum": 1, "adam": 2}[self.kind]
        return plan_population(
            self.sizes, self.batch_size, self.loss, n_states, self.n_models,
            own_order=self.own_order, device=device.index, **options,
        )  # fmt: skip

    def fits(self, device, **options):
        return not isinstance(self.plan(device, **options), str)

    def on(self, device, **options):
        """Return the population, and its parameters before any step."""
        xp = device.xp
        models = [MLP(self.sizes, seed=i, device="cpu") for i in range(self.n_models)]
        flat = device.asarray(np.stack([model.parameters.flat for model in models]))
        shapes = models[0].parameters.shapes
        state = self.optimizer(0).init(Parameters(flat, shapes))
        name = "beta1" if self.kind == "adam" else "momentum"
        state[name] = xp.asarray(self.momenta[:, None])
        state["weight_decay"] = xp.asarray(self.decays[:, None])
        plan = self.plan(device, **options)
        if isinstance(plan, str):
            pytest.skip(plan)
        X, y = device.asarray(self.X), device.asarray(self.y)
        return flat, FusedPopulation(
            self.sizes, self.batch_size, self.loss, flat, state, X, y,
            own_order=self.own_order, plan=plan,
        )  # fmt: skip

    def together(self, device, *, launches=1, **options):
        """Train all by one kernel; return the weights and losses of each."""
        with device.use():
            flat, population = self.on(device, **options)
            order = self.orders if self.own_order else self.orders[0]
            losses = device.xp.full((len(self.rates), self.n_steps, self.n_models), np.nan, "f4")
            for part in np.array_split(np.arange(len(self.rates)), launches):
                population.launch(
                    device.asarray(np.ascontiguousarray(order[..., part, :])),
                    device.asarray(self.rates[part]),
                    losses[part[0] : part[-1] + 1],
                )
            return gpuml.to_host(flat), gpuml.to_host(losses).reshape(-1, self.n_models)

    def alone_in_float64(self, i):
        model = MLP(self.sizes, seed=i, device="cpu")
        exact = MLP(self.sizes, dtype=np.float64, device="cpu")
        exact.parameters.flat[:] = model.parameters.flat
        step = EagerStep(exact, self.loss, self.optimizer(i))
        X, losses = self.X.astype(np.float64), []
        y = self.y if self.y.dtype.kind == "i" else self.y.astype(np.float64)
        for order, rate in zip(self.orders[i], self.rates[:, i], strict=True):
            step.state["learning_rate"][...] = rate
            for begin in range(0, len(X), self.batch_size):
                rows = order[begin : begin + self.batch_size]
                losses.append(float(step(X[rows], y[rows])))
        return exact.parameters.flat, np.array(losses)

    def alone_fused(self, i, device):
        with device.use():
            model = MLP(self.sizes, seed=i, device=device)
            arrays = device.asarray(self.X), device.asarray(self.y)
            data = ArrayBatches(*arrays, self.batch_size)
            step = fused.FusedStep(model, self.loss, self.optimizer(i), data)
            losses = device.xp.zeros((len(self.rates), self.n_steps), np.float32)
            order = device.asarray(np.ascontiguousarray(self.orders[i]))
            step.launch(order, device.asarray(self.rates[:, i].copy()), losses)
            return gpuml.to_host(model.parameters.flat), gpuml.to_host(losses).ravel()


def agree(found, expected, tolerance):
    (a, one), (b, two) = found, expected
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
    np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("own_order", [False, True])
@pytest.mark.parametrize("kind", ["plain", "momentum", "adam"])
@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize(("sizes", "batch_size", "models"), SHAPES, ids=str)
def test_each_model_is_trained_as_alone(gpu, sizes, batch_size, models, classes, kind, own_order):
    case = Case(sizes, batch_size, 7, classes=classes, kind=kind, own_order=own_order)
    options = {"models": models} if models and not own_order else {}
    flat, losses = case.together(gpu, **options)
    for i in range(case.n_models):
        found = flat[i], losses[:, i]
        agree(found, case.alone_in_float64(i), 1e-4 if kind == "adam" else 1e-5)
        if i % 3 == 0:
            agree(found, case.alone_fused(i, gpu), 1e-4)


@given(
    sizes=st.tuples(st.integers(1, 100), st.integers(1, 80), st.integers(1, 32)),
    batch_size=st.integers(1, 130),
    rest=st.integers(0, 129),
    n_models=st.integers(1, 9),
    warps=st.sampled_from([1, 2, 3, 4, 8]),
    width=st.integers(1, 4),
    classes=st.booleans(),
    kind=st.sampled_from(["plain", "momentum", "adam"]),
    own_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_populations_are_trained_as_their_models_alone(
    gpu, sizes, batch_size, rest, n_models, warps, width, classes, kind, own_order, seed
):
    options = {"rest": rest, "classes": classes, "kind": kind, "own_order": own_order}
    case = Case(sizes, batch_size, n_models, seed=seed, n_epochs=1, **options)
    assume(case.fits(gpu, warps=warps, width=width))
    flat, losses = case.together(gpu, warps=warps, width=width)
    for i in {0, n_models - 1}:
        agree((flat[i], losses[:, i]), case.alone_in_float64(i), 1e-4)


def test_after_an_epoch_weights_are_those_of_float64_to_float32_accuracy(gpu):
    case = Case(GOAL, 64, 12, rest=0, n_epochs=11)  # 22 steps, as of the digits
    flat, _ = case.together(gpu)
    for i in range(12):
        exact, _ = case.alone_in_float64(i)
        assert np.linalg.norm(flat[i] - exact) <= 2e-6 * np.linalg.norm(exact)


def test_a_model_that_diverges_disturbs_no_other(gpu):
    case = Case(GOAL, 64, 9)
    flat, losses = case.together(gpu)
    case.rates[:, 4] = np.nan
    case.momenta[6] = np.inf
    other, found = case.together(gpu)
    assert np.isnan(other[[4, 6]]).any(axis=1).all()
    assert np.isnan(found[-1, [4, 6]]).all()
    good = [0, 1, 2, 3, 5, 7, 8]
    assert flat[good].tobytes() == other[good].tobytes()
    assert losses[:, good].tobytes() == found[:, good].tobytes()


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_the_same_bits_come_again_and_in_several_launches(gpu, kind):
    case = Case((13, 50, 3), 20, 9, kind=kind, n_epochs=6)
    flat, losses = case.together(gpu)
    for launches in (1, 3):
        again, others = case.together(gpu, launches=launches)
        assert flat.tobytes() == again.tobytes()
        assert losses.tobytes() == others.tobytes()


def test_bits_do_not_depend_on_how_models_are_spread_over_blocks_and_warps(gpu):
    case = Case(GOAL, 64, 9)
    flat, losses = case.together(gpu, models=4, warps=4)
    for models, warps, width in ((1, 8, 3), (2, 2, 2), (3, 1, 1)):
        again, others = case.together(gpu, models=models, warps=warps, width=width)
        assert flat.tobytes() == again.tobytes()
        assert losses.tobytes() == others.tobytes()


@pytest.mark.parametrize("kind", ["plain", "momentum", "adam"])
def test_parameters_are_kept_after_each_epoch(gpu, kind):
    case = Case((13, 50, 3), 20, 5, kind=kind, n_epochs=4)
    with gpu.use():
        order, rates = gpu.asarray(case.orders[0]), gpu.asarray(case.rates)
        losses = gpu.xp.zeros((4, case.n_steps, 5), np.float32)
        flat, population = case.on(gpu, models=2)
        kept = gpu.xp.full((4, *flat.shape), np.nan, np.float32)
        population.launch(order, rates, losses, kept)
        flat, population = case.on(gpu, models=2)
        for i in range(4):
            population.launch(order[i : i + 1].copy(), rates[i : i + 1].copy(), losses[:1])
            assert bool((kept[i] == flat).all())
