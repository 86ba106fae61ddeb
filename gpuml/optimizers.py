"""Optimizers: how parameters follow their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

from gpuml import gpu_layers
from gpuml.devices import Array, array_module, device_of
from gpuml.errors import unknown_name
from gpuml.gpu_layers import fused
from gpuml.models import Parameters

State: TypeAlias = dict[str, Array]


class Optimizer(Protocol):
    """What `train` asks of an optimizer.

    The state is a dict of arrays beside the parameters. Rates live there too, as arrays, so
    that they can change between steps, and differ along leading axes of the parameters.
    """

    def init(self, parameters: Parameters) -> State:
        """Return the state before the first step."""
        ...

    def update(self, parameters: Parameters, gradients: Parameters, state: State) -> None:
        """Take one step: change `parameters` and `state` in place, leave `gradients` alone."""
        ...


class GradientDescent:
    """Gradient descent, with momentum and weight decay if wanted.

    g ← gradient + weight_decay · parameters;  v ← momentum · v + g;
    parameters ← parameters - learning_rate · v

    Parameters
    ----------
    learning_rate : float
        Positive.
    momentum : float
        From 0 (none) to less than 1.
    weight_decay : float
        Zero or positive: adds weight_decay / 2 times the sum of the squared weights to the loss.
        Biases (parameters whose name ends in ``bias`` and whose first axis has length 1) do not
        decay.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Polyak: Some methods of speeding up the convergence of iteration methods. 1964.
    Krogh, Hertz: A Simple Weight Decay Can Improve Generalization. NIPS 1991.

    Examples
    --------
    >>> GradientDescent(learning_rate=0.1, momentum=0.9)
    GradientDescent(learning_rate=0.1, momentum=0.9)
    """

    def __init__(
        self, learning_rate: float = 0.01, *, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        _check("learning_rate", learning_rate, learning_rate > 0, "positive")
        _check("momentum", momentum, 0 <= momentum < 1, "from 0 to less than 1")
        _check("weight_decay", weight_decay, weight_decay >= 0, "zero or positive")
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay

    def settings(self) -> dict[str, str | float]:
        """Return the optimizer's name and numbers: equal for those that take equal steps."""
        return _settings("gradient_descent", self, "learning_rate", "momentum", "weight_decay")

    def init(self, parameters: Parameters) -> State:
        """Return the rates as arrays, and the velocity v = 0 if there is momentum."""
        state = _scalars(parameters, learning_rate=self.learning_rate, momentum=self.momentum)
        state |= _decay(parameters, self.weight_decay)
        state["step"] = parameters.zeros_like().flat
        if self.momentum:
            state["velocity"] = parameters.zeros_like().flat
        return state

    def update(self, parameters: Parameters, gradients: Parameters, state: State) -> None:
        """Take one step in place."""
        self.advance(state)
        self.move(parameters, [gradients.flat], state)

    def advance(self, state: State) -> None:
        """Count a step: there is nothing to count."""

    def move(
        self, parameters: Parameters, gradients: Sequence[Array], state: State, divisor: int = 1
    ) -> None:
        """Change parameters, or some of them with their part of the state, by a step counted.

        The gradient is the sum of several vectors, divided; on a CPU it is one vector.
        """
        xp = array_module(parameters.flat, *gradients)
        if fused(xp):
            rounded = parameters.rounded and parameters.rounded.flat
            velocity = state.get("velocity")
            vectors = parameters.flat, gradients, velocity
            gpu_layers.gradient_descent(*vectors, state, rounded, divisor=divisor)
            return
        (direction,), step = gradients, state["step"]
        if "weight_decay" in state:
            xp.multiply(state["decaying"], state["weight_decay"], out=step)
            step *= parameters.flat
            step += direction
            direction = step
        if "velocity" in state:
            velocity = state["velocity"]
            velocity *= state["momentum"]
            velocity += direction
            direction = velocity
        xp.multiply(direction, state["learning_rate"], out=step)
        parameters.flat -= step

    def __repr__(self) -> str:
        return _call(self)


class Adam:
    """Adam: steps scaled by running averages of the gradient and of its square.

    m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²;
    parameters ← parameters - learning_rate · m̂ / (√v̂ + ε), where m̂ = m / (1 - β₁ᵗ) and
    v̂ = v / (1 - β₂ᵗ) after t steps. With weight decay it is AdamW: learning_rate · weight_decay
    times the parameters before the step is taken off as well.

    Parameters
    ----------
    learning_rate : float
        Positive.
    beta1, beta2 : float
        From 0 to less than 1: how slowly the two averages forget.
    epsilon : float
        Positive; keeps the quotient finite.
    weight_decay : float
        Zero or positive; the averages do not see it. Biases (parameters whose name ends in
        ``bias`` and whose first axis has length 1) do not decay.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Kingma, Ba: Adam: A Method for Stochastic Optimization. ICLR 2015. Algorithm 1.
    Loshchilov, Hutter: Decoupled Weight Decay Regularization. ICLR 2019. Algorithm 2, with the
    decay multiplied by the learning rate, as in PyTorch.

    Examples
    --------
    >>> Adam()
    Adam(learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-08)
    """

    def __init__(
        self,
        learning_rate: float = 0.001,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check("learning_rate", learning_rate, learning_rate > 0, "positive")
        _check("beta1", beta1, 0 <= beta1 < 1, "from 0 to less than 1")
        _check("beta2", beta2, 0 <= beta2 < 1, "from 0 to less than 1")
        _check("epsilon", epsilon, epsilon > 0, "positive")
        _check("weight_decay", weight_decay, weight_decay >= 0, "zero or positive")
        self.learning_rate = learning_rate
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon
        self.weight_decay = weight_decay

    def settings(self) -> dict[str, str | float]:
        """Return the optimizer's name and numbers: equal for those that take equal steps."""
        names = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay")
        return _settings("adam", self, *names)

    def init(self, parameters: Parameters) -> State:
        """Return the rates as arrays, and m = v = 0."""
        state = _scalars(
            parameters,
            learning_rate=self.learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            epsilon=self.epsilon,
            beta1_power=1.0,  # β₁ᵗ
            beta2_power=1.0,
        )
        state |= _decay(parameters, self.weight_decay)
        for name in ("m", "v", "step"):
            state[name] = parameters.zeros_like().flat
        return state

    def update(self, parameters: Parameters, gradients: Parameters, state: State) -> None:
        """Take one step in place."""
        self.advance(state)
        self.move(parameters, [gradients.flat], state)

    def advance(self, state: State) -> None:
        """Count a step: the powers of β₁ and β₂."""
        if fused(array_module(state["beta1"])):
            gpu_layers.adam_powers(state)
            return
        state["beta1_power"] *= state["beta1"]
        state["beta2_power"] *= state["beta2"]

    def move(
        self, parameters: Parameters, gradients: Sequence[Array], state: State, divisor: int = 1
    ) -> None:
        """Change parameters, or some of them with their part of the state, by a step counted.

        The gradient is the sum of several vectors, divided; on a CPU it is one vector.
        """
        xp = array_module(parameters.flat, *gradients)
        if fused(xp):
            rounded = parameters.rounded and parameters.rounded.flat
            gpu_layers.adam(parameters.flat, gradients, state, rounded, divisor=divisor)
            return
        (gradient,), m, v, step = gradients, state["m"], state["v"], state["step"]
        if "weight_decay" in state:
            rate = state["learning_rate"] * state["weight_decay"]
            xp.multiply(state["decaying"], rate, out=step)
            step *= parameters.flat
            parameters.flat -= step
        m *= state["beta1"]
        m += xp.multiply(gradient, 1 - state["beta1"], out=step)
        v *= state["beta2"]
        xp.multiply(gradient, gradient, out=step)
        step *= 1 - state["beta2"]
        v += step
        xp.sqrt(v, out=step)
        step /= xp.sqrt(1 - state["beta2_power"])  # √v̂
        step += state["epsilon"]
        xp.divide(m, step, out=step)
        step *= state["learning_rate"] / (1 - state["beta1_power"])
        parameters.flat -= step

    def __repr__(self) -> str:
        return _call(self)


OPTIMIZERS: dict[str, type[GradientDescent] | type[Adam]] = {
    "adam": Adam,
    "gradient_descent": GradientDescent,
}


def clip_norm(gradients: Parameters, longest: float) -> None:
    """Scale gradients down, in place, if all of them together are longer than a limit.

    g ← g · min(1, longest / ‖g‖₂); what is not finite stays so, or becomes NaN.

    Parameters
    ----------
    gradients : Parameters
    longest : float

    References
    ----------
    Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks. ICML 2013.

    Examples
    --------
    >>> gradients = Parameters(np.array([3.0, 4.0]), {"weight": (2,)})
    >>> clip_norm(gradients, 1.0)
    >>> gradients["weight"].round(6).tolist()
    [0.6, 0.8]
    """
    flat = gradients.flat
    xp = array_module(flat)
    if fused(xp) and flat.dtype.char in "fd":
        gpu_layers.clip_norm(flat, longest)
        return
    squares = xp.square(flat, dtype=np.float64).sum()  # those of float32 could be infinite
    factor = longest / xp.sqrt(squares)
    flat *= xp.where(factor >= 1, 1, factor).astype(flat.dtype)


def get_optimizer(optimizer: str | Optimizer) -> Optimizer:
    """Return the optimizer of that name with its usual settings, or the one that is given.

    Raises
    ------
    ValueError
        If there is no optimizer of that name; the message gives the nearest one.
    TypeError
        If it is a class instead of an optimizer, or something else.
    """
    if isinstance(optimizer, type):
        raise TypeError(f"give an optimizer, not its class: {optimizer.__name__}()")
    if not isinstance(optimizer, str):
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise TypeError(
                "expected the name of an optimizer, or an object with init and update such as "
                f"gpuml.Adam(), got {optimizer!r}"
            )
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown_name("optimizer", optimizer, OPTIMIZERS))
    return OPTIMIZERS[optimizer]()


def _check(name: str, value: float, good: bool, expected: str) -> None:
    if not good or value == float("inf"):  # a comparison with NaN is never good
        raise ValueError(f"{name} must be {expected}, got {value}")


def _settings(kind: str, optimizer: Optimizer, *names: str) -> dict[str, str | float]:
    return {"name": kind} | {name: float(getattr(optimizer, name)) for name in names}


def _call(optimizer: GradientDescent | Adam) -> str:
    """Return how the optimizer is made; without weight decay if there is none."""
    numbers = {name: getattr(optimizer, name) for name in list(optimizer.settings())[1:]}
    if not numbers["weight_decay"]:
        del numbers["weight_decay"]
    arguments = ", ".join(f"{name}={value}" for name, value in numbers.items())
    return f"{type(optimizer).__name__}({arguments})"


def _decay(parameters: Parameters, rate: float) -> State:
    """Return the rate as an array, and a vector of 1 for weights and 0 for biases.

    Nothing for a rate of 0, so that no step pays for it.
    """
    if not rate:
        return {}
    kinds = [
        (0.0 if name.endswith("bias") and shape[:1] == (1,) else 1.0, math.prod(shape))
        for name, shape in parameters.shapes.items()
    ]
    decaying = np.repeat([kind for kind, _ in kinds], [size for _, size in kinds])
    flat = parameters.flat
    state = _scalars(parameters, weight_decay=rate)
    return state | {"decaying": device_of(flat).asarray(decaying, flat.dtype)}


def _scalars(parameters: Parameters, **values: float) -> State:
    """Return the numbers as arrays that broadcast against the parameters, on their device."""
    flat = parameters.flat
    xp = array_module(flat)
    shape = (*flat.shape[:-1], 1) if flat.ndim > 1 else ()
    with device_of(flat).use():
        return {name: xp.full(shape, value, flat.dtype) for name, value in values.items()}
