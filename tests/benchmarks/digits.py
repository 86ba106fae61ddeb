"""The digits workload: gpuml beside scikit-learn, PyTorch and JAX on the CPU, in one run.

An MLP 64-128-10 with ReLU and softmax cross entropy is trained on batches of 64 by gradient
descent with momentum 0.9, in float32 with biases. Each rival gets the thread count that suits it
best; gpuml and JAX choose their own. A time counts only if the result is right: gpuml, PyTorch and
JAX start from the same weights and see the same batches, so their losses must agree; scikit-learn,
which draws its own, must learn the training data as well. JAX compiles before its time is taken.

    python tests/benchmarks/digits.py
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import gpuml

N_EPOCHS, BATCH, RATE, MOMENTUM, SEED, ROUNDS = 40, 64, 0.05, 0.9, 0, 7


def digits() -> tuple[np.ndarray, np.ndarray]:
    data = gpuml.load_dataset("digits")
    X, _, y, _ = gpuml.split(data.X, data.y, stratify=True)
    prepare = gpuml.Preprocessing.fit(X, y, "classification", same_unit=True)
    return prepare.features(X), prepare.targets(y)


def with_gpuml(X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return seconds and the loss of the last epoch."""
    model = gpuml.MLP([64, 128, 10], seed=SEED, device="cpu")
    optimizer = gpuml.GradientDescent(RATE, momentum=MOMENTUM)
    start = time.perf_counter()
    history = gpuml.train(
        model, X, y, optimizer=optimizer, n_epochs=N_EPOCHS, batch_size=BATCH, seed=SEED
    )
    return time.perf_counter() - start, history["loss"][-1]


def with_torch(X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    import torch

    ours = gpuml.MLP([64, 128, 10], seed=SEED, device="cpu").parameters
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    with torch.no_grad():
        for i, layer in enumerate((model[0], model[2])):
            layer.weight.copy_(torch.from_numpy(ours[f"layers.{i}.weight"].T.copy()))
            layer.bias.copy_(torch.from_numpy(ours[f"layers.{i}.bias"][0].copy()))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    inputs, labels = torch.from_numpy(X), torch.from_numpy(y)
    generator = np.random.default_rng(SEED)
    start = time.perf_counter()
    for _ in range(N_EPOCHS):
        order = torch.from_numpy(generator.permutation(len(X)))
        total = torch.zeros(())
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
    mean = float(total) / len(X)
    return time.perf_counter() - start, mean


@cache
def jax_epoch() -> Callable:
    """Compile an epoch for JAX: a scan over the full batches, and a step on the shorter last."""
    import jax
    import jax.numpy as jnp

    def loss(weights: list, x: Any, y: Any) -> Any:
        (w1, b1), (w2, b2) = weights
        logits = jax.nn.relu(x @ w1 + b1) @ w2 + b2
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()

    def step(state: tuple, batch: tuple) -> tuple:
        weights, velocity = state
        value, gradient = jax.value_and_grad(loss)(weights, *batch)
        velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, gradient)
        weights = jax.tree.map(lambda w, v: w - RATE * v, weights, velocity)
        return (weights, velocity), value

    @jax.jit
    def epoch(state: tuple, X: Any, y: Any, order: Any) -> tuple:
        X, y = X[order], y[order]
        full = len(X) // BATCH * BATCH
        batches = X[:full].reshape(-1, BATCH, X.shape[1]), y[:full].reshape(-1, BATCH)
        state, losses = jax.lax.scan(step, state, batches)
        total = losses.sum() * BATCH
        if full < len(X):
            state, value = step(state, (X[full:], y[full:]))
            total += value * (len(X) - full)
        return state, total / len(X)

    return epoch


def with_jax(X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    import jax

    ours = gpuml.MLP([64, 128, 10], seed=SEED, device="cpu")
    parameters = ours.parameters
    weights = [(parameters[weight], parameters[bias]) for weight, bias in ours.layers]
    cpu = jax.devices("cpu")[0]
    start_state = jax.device_put((weights, jax.tree.map(np.zeros_like, weights)), cpu)
    inputs, labels = (jax.device_put(a, cpu) for a in (X, y.astype(np.int32)))
    jax_epoch()(start_state, inputs, labels, np.arange(len(X)))[1].block_until_ready()
    generator = np.random.default_rng(SEED)
    start = time.perf_counter()
    state, losses = start_state, []
    for _ in range(N_EPOCHS):
        state, mean = jax_epoch()(state, inputs, labels, generator.permutation(len(X)))
        losses.append(mean)
    last = float(losses[-1])
    return time.perf_counter() - start, last


def with_sklearn(X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    import warnings

    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(
        (128,), solver="sgd", alpha=0, batch_size=BATCH, learning_rate_init=RATE, tol=0,
        momentum=MOMENTUM, nesterovs_momentum=False, max_iter=N_EPOCHS, random_state=SEED,
        n_iter_no_change=N_EPOCHS,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # that it has not converged
        start = time.perf_counter()
        model.fit(X, y)
    seconds = time.perf_counter() - start
    assert model.n_iter_ == N_EPOCHS
    return seconds, model.loss_curve_[-1]


def threaded(run: Callable, n_threads: int) -> Callable:
    """Give a rival a number of threads."""

    def limited(X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        if run is with_torch:
            import torch

            torch.set_num_threads(n_threads)
        with threadpool_limits(n_threads):
            return run(X, y)

    return limited


def main() -> None:
    X, y = digits()
    n_steps = N_EPOCHS * -(-len(X) // BATCH)
    counts = sorted({1, 2, os.cpu_count() or 1})
    runs = {"gpuml": with_gpuml}
    runs |= {f"scikit-learn, {n} threads": threaded(with_sklearn, n) for n in counts}
    try:
        import torch

        runs |= {
            f"PyTorch {torch.__version__}, {n} threads": threaded(with_torch, n) for n in counts
        }
    except ImportError:
        print("PyTorch is not installed: left out")
    try:
        import jax

        runs[f"JAX {jax.__version__}, jit + scan"] = with_jax
    except ImportError:
        print("JAX is not installed: left out")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, float] = {}
    for _ in range(ROUNDS):  # in turn, so that a slow moment of the machine meets all alike
        for name, run in runs.items():
            taken, losses[name] = run(X, y)
            seconds[name].append(taken)

    print(f"{gpuml.get_device('cpu')}, {platform.system()}; {n_steps} steps, {ROUNDS} rounds")
    ours = statistics.median(seconds["gpuml"])
    print(f"{'':32}{'µs a step':>10}{'fastest':>9}{'ratio':>7}{'last loss':>12}")
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(
            f"{name:32}{middle / n_steps * 1e6:10.1f}{min(taken) / n_steps * 1e6:9.1f}"
            f"{middle / ours:7.2f}{losses[name]:12.6f}"
        )
    for name, loss in losses.items():
        if "PyTorch" in name or "JAX" in name:
            np.testing.assert_allclose(loss, losses["gpuml"], rtol=1e-3, err_msg=name)
        assert loss < 0.02, f"{name} has not learned"


if __name__ == "__main__":
    main()
