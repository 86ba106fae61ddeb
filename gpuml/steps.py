"""The step of training: forward, loss, backward, update; and the engines that run it."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias

from gpuml import one_pass
from gpuml.batches import Batches
from gpuml.cpu_layers import CpuGradient
from gpuml.devices import Array, array_module
from gpuml.errors import unknown_name
from gpuml.losses import Loss, mean_squared_error
from gpuml.models import Linear, Model
from gpuml.optimizers import Optimizer, State
from gpuml.regression import Gram

Engine: TypeAlias = Literal["eager", "one_pass", "gram"]
ENGINES = ("eager", "one_pass", "gram")


class Step(Protocol):
    """One step of training, taken in place; it never waits for the device.

    Attributes
    ----------
    engine : str
        How it runs.
    state : dict of str to array
        The optimizer's, which a schedule and a checkpoint see.
    """

    engine: str
    state: State

    def __call__(self, x: Array, y: Array) -> Array:
        """Take a step on a batch; return the loss before it."""
        ...

    def part(self, x: Array, y: Array, share: float) -> Array:
        """Add the gradient of a part of a batch, times its share; return its share of the loss."""
        ...

    def finish(self) -> None:
        """Take the step for which all parts have been added."""
        ...


class EagerStep:
    """Forward, loss, backward and update as array operations, one after the other.

    Parameters
    ----------
    model : Model
    loss : callable
    optimizer : Optimizer
    """

    engine = "eager"

    def __init__(self, model: Model, loss: Loss, optimizer: Optimizer) -> None:
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._parameters = model.parameters
        self._gradients = model.parameters.zeros_like()
        self._total: Any = None  # of the parts so far
        self.state = optimizer.init(model.parameters)
        self._on_cpu: CpuGradient | None = None
        if CpuGradient.limit(model, loss) is None:
            self._on_cpu = CpuGradient(model, loss, self._gradients)

    def _gradient(self, x: Array, y: Array) -> Array:
        if self._on_cpu is not None and self._on_cpu.fits(x):
            return self._on_cpu(x, y)
        predictions, backward = self._model.forward(self._parameters, x)
        value, d_predictions = self._loss(predictions, y)
        backward(d_predictions, self._gradients)
        return value

    def __call__(self, x: Array, y: Array) -> Array:
        """Take a step on a batch; return the loss before it."""
        value = self._gradient(x, y)
        self._optimizer.update(self._parameters, self._gradients, self.state)
        return value

    def part(self, x: Array, y: Array, share: float) -> Array:
        """Add the gradient of a part of a batch, times its share; return its share of the loss."""
        value = self._gradient(x, y)
        if self._total is None:
            self._total = self._gradients.zeros_like()
        self._gradients.flat *= share
        self._total.flat += self._gradients.flat
        return value * share

    def finish(self) -> None:
        """Take the step for which all parts have been added."""
        self._optimizer.update(self._parameters, self._total, self.state)
        self._total.flat[...] = 0


class OnePassStep(EagerStep):
    """A linear model's step that reads the batch once; see :mod:`gpuml.one_pass`."""

    engine = "one_pass"

    def _gradient(self, x: Array, y: Array) -> Array:
        if one_pass.limit(self._model, x) is not None:  # such as rows that are not contiguous
            return super()._gradient(x, y)
        return one_pass.gradient(x, y, self._parameters, self._gradients)


class GramStep(EagerStep):
    """Full-batch least squares from XᵀX and XᵀY alone: the data are read once for all steps.

    Parameters
    ----------
    model : Linear
    loss : callable
    optimizer : Optimizer
    data : Batches
        Read here, once.
    """

    engine = "gram"

    def __init__(self, model: Linear, loss: Loss, optimizer: Optimizer, data: Batches) -> None:
        super().__init__(model, loss, optimizer)
        self._gram = Gram.of_batches(data.epoch(None), bias="bias" in model.parameters)

    def _gradient(self, x: Array, y: Array) -> Array:
        value, _ = self._gram.loss_and_gradient(self._parameters, self._gradients)
        return value


def make_step(
    model: Model, loss: Loss, optimizer: Optimizer, data: Batches, engine: Engine | None
) -> Step:
    """Put the step together, by the engine that is asked for or the best that can hold it.

    Parameters
    ----------
    model : Model
    loss : callable
    optimizer : Optimizer
    data : Batches
    engine : {"eager", "one_pass", "gram"} or None

    Returns
    -------
    Step

    Raises
    ------
    ValueError
        If the engine is unknown, or cannot train this model; the message says why.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(unknown_name("engine", engine, ENGINES))
    if engine == "eager":
        return EagerStep(model, loss, optimizer)
    if engine == "gram":
        if type(model) is not Linear or loss is not mean_squared_error:
            raise ValueError("engine='gram' is for Linear models and the mean squared error")
        if data.batch_size < data.n_samples:
            raise ValueError("engine='gram' is for full batches: batch_size=None")
        return GramStep(model, loss, optimizer, data)
    x, _ = next(iter(data.epoch(None)))
    reason: str | None = "it is for the mean squared error"
    if loss is mean_squared_error:
        reason = one_pass.limit(model, x)
    if engine == "one_pass" and reason:
        raise ValueError(f"engine='one_pass' cannot train this: {reason}")
    if reason is None and (engine == "one_pass" or one_pass.pays(model, x)):
        return OnePassStep(model, loss, optimizer)
    return EagerStep(model, loss, optimizer)


def set_learning_rate(step: Step, base: Array, factor: float) -> None:
    """Multiply the base learning rate by a schedule's factor, where the step reads it."""
    array_module(base).multiply(base, factor, out=step.state["learning_rate"])
