"""Many models at once: gpuml's populations beside its own train, JAX and PyTorch, in one run.

Perceptrons 64-32-10 with ReLU and softmax cross entropy are trained on the same batches of 64 by
gradient descent with momentum 0.9, in float32 with biases, each from start weights and at a rate of
its own. JAX has the models in vmap and the steps of an epoch in a compiled scan; PyTorch multiplies
stacks of matrices eagerly. A time counts only if all models reach the same losses. The rounds go
through the rivals in turn, so that a busy machine is busy for all; medians are shown.

    python tests/benchmarks/populations.py               1 to 256 models; on a GPU to 4,096
    python tests/benchmarks/populations.py 64            so many models
    python tests/benchmarks/populations.py --groups      the CPU's groups: size, and threads
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import gpuml
from gpuml import population_runs
from gpuml.devices import cpu_count

SIZES, BATCH, N_STEPS, N_EPOCHS = (64, 32, 10), 64, 64, 3
MOMENTUM, ROUNDS = 0.9, 7
ALONE = 8  # models that are trained one after another; the others would take as long

Run = Callable[[], np.ndarray]  # trains from the start weights: mean losses of the last epoch


def samples() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    X = generator.standard_normal((N_STEPS * BATCH, SIZES[0]), np.float32)
    y = (X @ generator.standard_normal((SIZES[0], SIZES[-1]), np.float32)).argmax(axis=1)
    return X, y


def rates(n_models: int) -> np.ndarray:
    return np.geomspace(0.005, 0.02, n_models)


def by_gpuml(n_models: int) -> Run:
    X, y = samples()
    model = gpuml.MLP(SIZES)
    device = model.device
    X, y = device.asarray(X), device.asarray(y)

    def run() -> np.ndarray:
        population = gpuml.train_population(
            model,
            X,
            y,
            n_models=n_models,
            learning_rates=rates(n_models),
            optimizer=gpuml.GradientDescent(momentum=MOMENTUM),
            n_epochs=N_EPOCHS,
            batch_size=BATCH,
            shuffle=False,
        )
        return population.columns["loss"][-1]

    return run


def by_train(n_models: int) -> Run:
    """Train some of the models one after another."""
    X, y = samples()
    device = gpuml.get_device()
    X, y = device.asarray(X), device.asarray(y)
    every = rates(n_models)[:ALONE]
    models = [gpuml.MLP(SIZES, seed=i) for i in range(len(every))]
    starts = [model.parameters.flat.copy() for model in models]

    settings: dict[str, Any] = {"n_epochs": N_EPOCHS, "batch_size": BATCH, "shuffle": False}

    def run() -> np.ndarray:
        losses = []
        for model, start, rate in zip(models, starts, every, strict=True):
            model.parameters.flat[...] = start
            optimizer = gpuml.GradientDescent(rate, momentum=MOMENTUM)
            history = gpuml.train(model, X, y, optimizer=optimizer, **settings)
            losses.append(history["loss"][-1])
        return np.array(losses)

    return run


def starts(n_models: int) -> dict[str, np.ndarray]:
    models = [gpuml.MLP(SIZES, seed=i, device="cpu") for i in range(n_models)]
    return {name: np.stack([m.parameters[name] for m in models]) for name in models[0].parameters}


def by_jax(n_models: int) -> Run:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_default_matmul_precision", "highest")
    X, y = samples()
    x, labels = jnp.asarray(X.reshape(N_STEPS, BATCH, -1)), jnp.asarray(y.reshape(N_STEPS, BATCH))
    start = {name: jnp.asarray(values) for name, values in starts(n_models).items()}
    rate = jnp.asarray(rates(n_models), jnp.float32)
    W0, b0, W1, b1 = start

    def loss(p: Any, x: Any, y: Any) -> Any:
        logits = jnp.maximum(x @ p[W0] + p[b0], 0) @ p[W1] + p[b1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()

    def step(p: Any, v: Any, rate: Any, x: Any, y: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(p, x, y)
        v = jax.tree.map(lambda v, g: MOMENTUM * v + g, v, gradient)
        return jax.tree.map(lambda p, v: p - rate * v, p, v), v, value

    steps = jax.vmap(step, in_axes=(0, 0, 0, None, None))

    @jax.jit
    def train(p: Any) -> Any:
        def scanned(carry: Any, batch: Any) -> Any:
            p, v, values = steps(*carry, rate, *batch)
            return (p, v), values

        def epoch(carry: Any, _: Any) -> Any:
            carry, values = jax.lax.scan(scanned, carry, (x, labels))
            return carry, values.mean(axis=0)

        return jax.lax.scan(epoch, (p, jax.tree.map(jnp.zeros_like, p)), None, length=N_EPOCHS)

    return lambda: np.asarray(train(start)[1])[-1]


def by_torch(n_models: int, n_threads: int | None = None) -> Run:
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    n_threads = n_threads or cpu_count()
    X, y = (torch.from_numpy(a).to(where) for a in samples())
    start = [torch.from_numpy(values).to(where) for values in starts(n_models).values()]
    rate = torch.from_numpy(rates(n_models).astype(np.float32)).to(where)[:, None, None]

    def run() -> np.ndarray:
        torch.set_num_threads(n_threads)
        parameters = [p.clone().requires_grad_() for p in start]
        velocities = [torch.zeros_like(p) for p in start]
        W0, b0, W1, b1 = parameters
        for i in range(N_EPOCHS * N_STEPS):
            i %= N_STEPS
            if i == 0:
                total = torch.zeros(n_models, device=where)
            rows = slice(i * BATCH, (i + 1) * BATCH)
            logits = torch.relu(X[rows] @ W0 + b0) @ W1 + b1
            labels = y[rows].expand(n_models, BATCH)
            each = torch.nn.functional.cross_entropy(
                logits.reshape(-1, SIZES[-1]), labels.reshape(-1), reduction="none"
            ).reshape(n_models, BATCH)
            values = each.mean(dim=1)
            gradients = torch.autograd.grad(values.sum(), parameters)
            with torch.no_grad():
                torch._foreach_mul_(velocities, MOMENTUM)
                torch._foreach_add_(velocities, gradients)
                for p, v in zip(parameters, velocities, strict=True):
                    p -= rate * v
                total += values
        return (total / N_STEPS).cpu().numpy()

    return run


RIVALS: dict[str, Callable[[int], Run]] = {
    "gpuml.train_population": by_gpuml,
    "gpuml.train, one by one": by_train,
    "JAX vmap + scan": by_jax,
    "PyTorch, 1 thread": partial(by_torch, n_threads=1),  # before more: they would stay awake
    "PyTorch": by_torch,
}


def measure(n_models: int) -> None:
    """Print what a step of a model costs by each rival."""
    runs: dict[str, Run] = {}
    wanted: np.ndarray | None = None
    for name, make in RIVALS.items():
        try:
            run = make(n_models)
            losses = run()  # compiles
        except ImportError:
            continue
        if wanted is None:
            wanted = losses
        if not np.allclose(losses, wanted[: len(losses)], rtol=1e-3):
            worst = np.abs(losses / wanted[: len(losses)] - 1).max()
            raise SystemExit(f"{name} reaches other losses: off by up to {worst:.1e}")
        runs[name] = run
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            losses = run()
            each = time.perf_counter() - begin
            taken[name].append(each / (N_EPOCHS * N_STEPS * len(losses)))
    ours = statistics.median(taken["gpuml.train_population"])
    for name, times in taken.items():
        each = statistics.median(times)
        print(
            f"{n_models:>6} models  {name:<24}{each * 1e6:9.2f} µs a step and model"
            f"{each * n_models * 1e6:12.0f} µs a step{each / ours:8.2f} of ours",
            flush=True,
        )


def groups(n_models: int = 128) -> None:
    """Print how the price depends on the groups, and on the threads."""
    X, y = samples()
    model = gpuml.MLP(SIZES, device="cpu")
    for optimizer in (gpuml.GradientDescent(0.01, momentum=MOMENTUM), gpuml.Adam()):
        print(optimizer)
        for size in (2, 4, 8, 16, 32, 64):
            cells = []
            for n_threads in (1, 2):
                population_runs._n_threads = lambda n=n_threads: n
                population_runs.LEAST_NUMBERS = 1
                population_runs.MOST_NUMBERS = size * BATCH * SIZES[1]
                times = []
                for _ in range(ROUNDS):
                    population = gpuml.train_population(
                        model, X, y, n_models=n_models, optimizer=optimizer, n_epochs=N_EPOCHS
                    )
                    times.append(population.seconds / (N_EPOCHS * N_STEPS * n_models))
                cells.append(f"{n_threads} threads {statistics.median(times) * 1e6:6.1f} µs")
            print(f"{size:>6} models a group: {', '.join(cells)}", flush=True)


def main() -> None:
    print(gpuml.get_device())
    if "--groups" in sys.argv:
        groups()
        return
    numbers = [int(argument) for argument in sys.argv[1:]]
    most = 256 if gpuml.get_device().kind == "cpu" else 4096
    for n_models in numbers or [n for n in (1, 4, 16, 64, 256, 1024, 4096) if n <= most]:
        measure(n_models)


if __name__ == "__main__":
    main()
