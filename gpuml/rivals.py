"""How each rival trains the same perceptron: gpuml, PyTorch, JAX, scikit-learn.

Each runs in a process of its own, started by :mod:`gpuml.peers`: libraries of two frameworks do
not get into each other's way, and one that fails takes nobody along. Such a process,

    python -m gpuml.rivals RIVAL TASK

answers in lines of JSON: first the version of its library, then, for each number of epochs that
it reads from standard input, how long these took from the start weights on, and the mean losses
of the first and of the last of them. The first answer includes compilation and capture.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

DATA_FILES = X_FILE, Y_FILE, START_FILE = ("X.npy", "y.npy", "start.npz")
SEED = 0  # of the order of the samples
WARM_UP = 3  # steps before a capture, so that libraries have allocated what they need


@dataclass(frozen=True)
class Task:
    """What every rival trains, the same for all.

    Attributes
    ----------
    folder : str
        Where samples, labels and start weights lie: ``X.npy``, ``y.npy``, ``start.npz``.
    sizes : tuple of int
        Features, units of each hidden layer, classes.
    batch_size : int
        A divisor of the number of samples.
    learning_rate, momentum : float
    precision : {"float32", "tf32", "bfloat16"}
        Of products; weights are float32.
    device : {"cpu", "gpu"}
        The first GPU that this process sees.
    n_models : int, optional
        So many of them at once, from start weights of their own; one alone unless given.
    """

    folder: str
    sizes: tuple[int, ...]
    batch_size: int
    learning_rate: float
    momentum: float
    precision: str
    device: str
    n_models: int | None = None

    def data(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the samples and their labels."""
        X_file, y_file, _ = (Path(self.folder, name) for name in DATA_FILES)
        return np.load(X_file, allow_pickle=False), np.load(y_file, allow_pickle=False)

    def start(self) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Return the start weights: for each layer W of shape (inputs, outputs), and b.

        Those of many models have one axis more in front.
        """
        file = Path(self.folder, START_FILE)
        with np.load(file, allow_pickle=False) as arrays:
            both = [arrays[name] for name in arrays.files]
        pairs = zip(both[::2], both[1::2], strict=True)
        return [(W, b.reshape(*b.shape[:-2], -1)) for W, b in pairs]

    def rates(self) -> np.ndarray[Any, Any]:
        """Return a learning rate for each of many models: from half of it to twice as much."""
        return np.geomspace(self.learning_rate / 2, 2 * self.learning_rate, self.n_models or 1)


# Trains so many epochs from the start weights; returns the mean losses of the first and the last
# of them, read from the device at the end, and a word on how.
Run: TypeAlias = Callable[[int], tuple[float, float, str]]
Rival: TypeAlias = Callable[[Task], Run]


def orders(n_samples: int, n_epochs: int) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the order of the samples in each epoch, drawn as :func:`gpuml.batches` draws it."""
    generator = np.random.default_rng(SEED)
    for _ in range(n_epochs):
        yield generator.permutation(n_samples)


# --- gpuml -------------------------------------------------------------------------------------


def gpuml_rival(task: Task, engine: str | None) -> Run:
    """Train by :func:`gpuml.train`, or many models by :func:`gpuml.train_population`."""
    import gpuml

    device = gpuml.get_device(task.device)
    X, y = (device.asarray(a) for a in task.data())
    model = gpuml.MLP(task.sizes, seed=0, device=device)
    start = model.parameters.flat.copy()
    optimizer = gpuml.GradientDescent(task.learning_rate, momentum=task.momentum)
    settings: dict[str, Any] = {
        "loss": "cross_entropy",
        "optimizer": optimizer,
        "batch_size": task.batch_size,
        "shuffle": True,
        "seed": SEED,
        "engine": engine,
        "progress": False,
    }
    if task.precision != "float32":
        settings["precision"] = task.precision

    def run(n_epochs: int) -> tuple[float, float, str]:
        model.parameters.flat[...] = start
        history = gpuml.train(model, X, y, n_epochs=n_epochs, **settings)
        device.synchronize()
        return history["loss"][0], history["loss"][-1], history.engine

    def run_many(n_epochs: int) -> tuple[float, float, str]:
        many = {"n_models": task.n_models, "starts": starts, "learning_rates": task.rates()}
        population = gpuml.train_population(model, X, y, n_epochs=n_epochs, **many, **settings)
        device.synchronize()
        losses = population.columns["loss"].mean(axis=1)
        return float(losses[0]), float(losses[-1]), population.engine

    if task.n_models is None:
        return run
    if engine == "eager":
        settings["engine"] = "batched"
    every = [a.reshape(task.n_models, -1) for pair in task.start() for a in pair]
    starts = device.asarray(np.concatenate(every, axis=1))
    return run_many


# --- PyTorch -----------------------------------------------------------------------------------


class TorchTraining:
    """What the ways to train with PyTorch have in common: model, data, and a plain step."""

    def __init__(self, task: Task) -> None:
        import torch

        self.torch, self.task = torch, task
        if task.device == "gpu" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU")
        self.device = torch.device("cuda" if task.device == "gpu" else "cpu")
        torch.set_float32_matmul_precision("high" if task.precision == "tf32" else "highest")
        self.X, self.y = (torch.from_numpy(a).to(self.device) for a in task.data())
        self.n_steps = len(self.X) // task.batch_size
        self.loss_of: Callable[[Any, Any], Any] = self.loss
        self.make()

    def make(self) -> None:
        """Make the model, its start weights and its optimizer."""
        torch, task = self.torch, self.task
        self.start = [
            torch.from_numpy(np.ascontiguousarray(a)).to(self.device)
            for W, b in task.start()
            for a in (W.T, b)
        ]
        layers: list[Any] = []
        for n_in, n_out in zip(task.sizes[:-1], task.sizes[1:], strict=True):
            layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers[:-1]).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=task.learning_rate, momentum=task.momentum, fused=True
        )

    def loss(self, x: Any, y: Any) -> Any:
        """Return the mean loss of a batch."""
        torch = self.torch
        coarse = self.task.precision == "bfloat16"
        # Each weight is used once in a step: there is nothing to cache, and a graph must not.
        with torch.autocast(self.device.type, torch.bfloat16, coarse, cache_enabled=False):
            return torch.nn.functional.cross_entropy(self.model(x), y)

    def step(self, x: Any, y: Any) -> Any:
        """Take one step; return the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def reset(self) -> None:
        """Go back to the start weights, at rest."""
        with self.torch.no_grad():
            for parameter, start in zip(self.model.parameters(), self.start, strict=True):
                parameter.copy_(start)
                momentum = self.optimizer.state[parameter].get("momentum_buffer")
                if momentum is not None:
                    momentum.zero_()

    def batches(self, order: np.ndarray[Any, Any], at_once: int = 1) -> Iterator[Any]:
        """Yield (x, y) of an epoch, gathered in one go; several batches at once if wanted."""
        # From ordinary memory it is copied before the call returns, but nothing waits.
        rows = self.torch.from_numpy(order).to(self.device, non_blocking=True)
        shape = (-1, at_once, self.task.batch_size)
        x = self.X[rows].view(*shape, self.task.sizes[0])
        if at_once == 1:
            return zip(x[:, 0], self.y[rows].view(*shape)[:, 0], strict=True)
        return zip(x, self.y[rows].view(*shape), strict=True)

    def epoch(self, order: np.ndarray[Any, Any]) -> Any:
        """Train one epoch; return its mean loss, not waited for."""
        return self.torch.stack([self.step(x, y) for x, y in self.batches(order)]).mean()

    def run(self, n_epochs: int) -> tuple[float, float, str]:
        """Train from the start weights."""
        self.reset()
        losses = [self.epoch(order) for order in orders(len(self.X), n_epochs)]
        return float(losses[0]), float(losses[-1]), ""


class CompiledTorchTraining(TorchTraining):
    """Forward and backward by torch.compile; on a GPU both are replayed as graphs."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        mode = "reduce-overhead" if task.device == "gpu" else "default"
        self.loss_of = self.torch.compile(self.loss, mode=mode, fullgraph=True)

    def step(self, x: Any, y: Any) -> Any:
        """Take one step; return the loss before it."""
        self.torch.compiler.cudagraph_mark_step_begin()
        return super().step(x, y).clone()  # else the next replay writes over it


class TorchGraphTraining(TorchTraining):
    """Whole steps, update included, captured once in a CUDA graph, so many in each."""

    def __init__(self, task: Task, whole_epoch: bool) -> None:
        super().__init__(task)
        torch = self.torch
        self.n_captured = self.n_steps if whole_epoch else 1
        shape = (self.n_captured, task.batch_size)
        self.x = torch.zeros(*shape, task.sizes[0], device=self.device)
        self.y_here = torch.zeros(*shape, dtype=self.y.dtype, device=self.device)
        self.total = torch.zeros((), device=self.device)
        self.graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.step(self.x[0], self.y_here[0])
        torch.cuda.current_stream().wait_stream(aside)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            losses = [self.step(self.x[i], self.y_here[i]) for i in range(self.n_captured)]
            self.total += torch.stack(losses).sum() if whole_epoch else losses[0]

    def epoch(self, order: np.ndarray[Any, Any]) -> Any:
        """Train one epoch; return its mean loss, not waited for."""
        self.total.zero_()
        for x, y in self.batches(order, self.n_captured):
            self.x.copy_(x if self.n_captured > 1 else x[None])
            self.y_here.copy_(y if self.n_captured > 1 else y[None])
            self.graph.replay()
        return self.total / self.n_steps


class TorchPopulation(TorchTraining):
    """Many models at once, eagerly: stacks of matrices, and an update of all."""

    def make(self) -> None:
        """Put the start weights on the device."""
        torch, task = self.torch, self.task
        self.start = [
            torch.from_numpy(np.ascontiguousarray(a)).to(self.device)
            for W, b in task.start()
            for a in (W, b[:, None, :])
        ]
        rates = torch.from_numpy(task.rates().astype(np.float32))
        self.rates = rates.to(self.device)[:, None, None]

    def reset(self) -> None:
        """Go back to the start weights, at rest."""
        self.parameters = [start.clone().requires_grad_() for start in self.start]
        self.velocity = [self.torch.zeros_like(start) for start in self.start]

    def step(self, x: Any, y: Any) -> Any:
        """Take one step; return the mean loss before it."""
        torch, n_models = self.torch, self.task.n_models
        layers = list(zip(self.parameters[::2], self.parameters[1::2], strict=True))
        for i, (W, b) in enumerate(layers):
            x = (torch.relu(x) if i else x) @ W + b
        labels = y.expand(n_models, -1).reshape(-1)
        total = torch.nn.functional.cross_entropy(
            x.reshape(len(labels), -1), labels, reduction="sum"
        )
        loss = total / len(y)  # summed over the models, each of which has its own gradient
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_mul_(self.velocity, self.task.momentum)
            torch._foreach_add_(self.velocity, gradients)
            changes = torch._foreach_mul(self.velocity, [self.rates] * len(gradients))
            torch._foreach_sub_(self.parameters, changes)
        return loss.detach() / n_models


def torch_rival(task: Task, training: Callable[[Task], TorchTraining]) -> Run:
    """Train by PyTorch, in one of the ways above."""
    if task.n_models is None:
        return training(task).run
    if training is not TorchTraining:
        raise RuntimeError("trains one model")
    return TorchPopulation(task).run


# --- JAX ---------------------------------------------------------------------------------------


def jax_rival(task: Task) -> Run:
    """Train by JAX: an epoch is one compiled scan over its steps, its memory given back to it.

    The steps of many models are one by vmap.
    """
    import jax
    import jax.numpy as jnp

    place = jax.devices(task.device)[0]
    if task.precision != "bfloat16":
        precision = {"float32": "highest", "tf32": "tensorfloat32"}[task.precision]
        jax.config.update("jax_default_matmul_precision", precision)
    inner = jnp.bfloat16 if task.precision == "bfloat16" else jnp.float32
    momentum, batch_size = task.momentum, task.batch_size
    X, y = task.data()
    X, y = jax.device_put(X, place), jax.device_put(y.astype(np.int32), place)
    start = jax.device_put(task.start(), place)

    def loss_of(layers: Any, x: Any, labels: Any) -> Any:
        x = x.astype(inner)
        for i, (W, b) in enumerate(layers):
            x = (jax.nn.relu(x) if i else x) @ W.astype(inner) + b.astype(inner)
        logits = x.astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    def update(state: Any, rate: Any, x: Any, labels: Any) -> Any:
        layers, velocity = state
        loss, gradient = jax.value_and_grad(loss_of)(layers, x, labels)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradient)
        layers = jax.tree.map(lambda w, v: w - rate * v, layers, velocity)
        return (layers, velocity), loss

    rate: Any = task.learning_rate
    if task.n_models is not None:
        update = jax.vmap(update, in_axes=(0, 0, None, None))
        rate = jax.device_put(task.rates().astype(np.float32), place)

    @partial(jax.jit, donate_argnums=0)
    def epoch(state: Any, X: Any, y: Any, order: Any) -> Any:
        def step(state: Any, rows: Any) -> Any:
            return update(state, rate, X[rows], y[rows])

        state, losses = jax.lax.scan(step, state, order.reshape(-1, batch_size))
        return state, losses.mean()

    def copied(layers: Any) -> Any:
        return jax.tree.map(jnp.copy, layers), jax.tree.map(jnp.zeros_like, layers)

    at_rest = jax.jit(copied)

    def run(n_epochs: int) -> tuple[float, float, str]:
        state = at_rest(start)
        losses = []
        for order in orders(len(X), n_epochs):
            state, loss = epoch(state, X, y, order.astype(np.int32))
            losses.append(loss)
        jax.block_until_ready(state)
        return float(losses[0]), float(losses[-1]), ""

    return run


# --- scikit-learn ------------------------------------------------------------------------------


def sklearn_rival(task: Task) -> Run:
    """Train by scikit-learn on the CPU, which draws start weights and batches of its own."""
    import warnings

    from sklearn.neural_network import MLPClassifier

    if task.n_models is not None:
        raise RuntimeError("trains one model")
    X, y = task.data()

    def run(n_epochs: int) -> tuple[float, float, str]:
        model = MLPClassifier(
            task.sizes[1:-1],
            solver="sgd",
            alpha=0,
            batch_size=task.batch_size,
            learning_rate_init=task.learning_rate,
            momentum=task.momentum,
            nesterovs_momentum=False,
            max_iter=n_epochs,
            n_iter_no_change=n_epochs + 1,
            tol=0,
            random_state=SEED,
        )
        with warnings.catch_warnings(action="ignore"):  # that it has not converged
            model.fit(X, y)
        return float(model.loss_curve_[0]), float(model.loss_curve_[-1]), ""

    return run


# --- all of them -------------------------------------------------------------------------------

SCIKIT_LEARN = "scikit-learn"
RIVALS: dict[str, tuple[str, Rival]] = {  # the library to import first, and how it trains
    "gpuml": ("gpuml", partial(gpuml_rival, engine=None)),
    "gpuml fused": ("gpuml", partial(gpuml_rival, engine="fused")),
    "gpuml graph": ("gpuml", partial(gpuml_rival, engine="graph")),
    "gpuml eager": ("gpuml", partial(gpuml_rival, engine="eager")),
    "PyTorch eager": ("torch", partial(torch_rival, training=TorchTraining)),
    "PyTorch compile": ("torch", partial(torch_rival, training=CompiledTorchTraining)),
    "PyTorch step graph": (
        "torch",
        partial(torch_rival, training=partial(TorchGraphTraining, whole_epoch=False)),
    ),
    "PyTorch epoch graph": (
        "torch",
        partial(torch_rival, training=partial(TorchGraphTraining, whole_epoch=True)),
    ),
    "JAX scan": ("jax", jax_rival),
    SCIKIT_LEARN: ("sklearn.neural_network", sklearn_rival),
}


def find_rival(name: str) -> tuple[str, Rival]:
    """Return the library that a rival needs, and how it trains.

    Parameters
    ----------
    name : str
        One of the RIVALS, or ``"module:function"`` for one of your own: a function that takes a
        :class:`Task` and returns what takes a number of epochs, and returns two losses and a word.

    Raises
    ------
    ValueError
        If it is neither.
    """
    if name in RIVALS:
        return RIVALS[name]
    module, _, function = name.partition(":")
    if not function:
        from gpuml.errors import unknown_name

        raise ValueError(unknown_name("rival", name, RIVALS))
    return module, getattr(import_module(module), function)


def main() -> None:
    """Answer, in lines of JSON, how long so many epochs take; see the head of this module."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=channel, flush=True)

    try:
        name, text = sys.argv[1:3]
        settings = json.loads(text)
        task = Task(**(settings | {"sizes": tuple(settings["sizes"])}))
        library, rival = find_rival(name)
        import_module(library)
        if library == "gpuml" and task.device == "gpu":
            import_module("cupy")
        module = sys.modules[library.partition(".")[0]]
        answer(version=getattr(module, "__version__", ""))
        run: Run | None = None
        for line in sys.stdin:
            begin = time.perf_counter()
            run = run or rival(task)
            first, last, how = run(int(line))
            seconds = time.perf_counter() - begin
            answer(seconds=seconds, first_loss=first, last_loss=last, how=how)
    except Exception as error:  # of any library: the table goes on without it
        message = str(error).strip().partition("\n")[0]
        answer(error=f"{type(error).__name__}: {message}"[:300])
        sys.exit(1)


if __name__ == "__main__":
    main()
