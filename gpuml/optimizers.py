"""Optimizers: how parameters follow their gradients."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from gpuml.devices import Array, array_module, device_of
from gpuml.errors import unknown_name
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
    """Gradient descent, with momentum if wanted.

    v ← momentum · v + gradient;  parameters ← parameters - learning_rate · v

    Parameters
    ----------
    learning_rate : float
        Positive.
    momentum : float
        From 0 (none) to less than 1.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Polyak: Some methods of speeding up the convergence of iteration methods. 1964.

    Examples
    --------
    >>> GradientDescent(learning_rate=0.1, momentum=0.9)
    GradientDescent(learning_rate=0.1, momentum=0.9)
    """

    def __init__(self, learning_rate: float = 0.01, *, momentum: float = 0.0) -> None:
        _check("learning_rate", learning_rate, learning_rate > 0, "positive")
        _check("momentum", momentum, 0 <= momentum < 1, "from 0 to less than 1")
        self.learning_rate = learning_rate
        self.momentum = momentum

    def init(self, parameters: Parameters) -> State:
        """Return the rates as arrays, and the velocity v = 0 if there is momentum."""
        state = _scalars(parameters, learning_rate=self.learning_rate, momentum=self.momentum)
        state["step"] = parameters.zeros_like().flat
        if self.momentum:
            state["velocity"] = parameters.zeros_like().flat
        return state

    def update(self, parameters: Parameters, gradients: Parameters, state: State) -> None:
        """Take one step in place."""
        xp = array_module(parameters.flat, gradients.flat)
        direction = gradients.flat
        if "velocity" in state:
            velocity = state["velocity"]
            velocity *= state["momentum"]
            velocity += direction
            direction = velocity
        step = xp.multiply(direction, state["learning_rate"], out=state["step"])
        parameters.flat -= step

    def __repr__(self) -> str:
        return f"GradientDescent(learning_rate={self.learning_rate}, momentum={self.momentum})"


class Adam:
    """Adam: steps scaled by running averages of the gradient and of its square.

    m ← β₁ m + (1 - β₁) g;  v ← β₂ v + (1 - β₂) g²;
    parameters ← parameters - learning_rate · m̂ / (√v̂ + ε), where m̂ = m / (1 - β₁ᵗ) and
    v̂ = v / (1 - β₂ᵗ) after t steps.

    Parameters
    ----------
    learning_rate : float
        Positive.
    beta1, beta2 : float
        From 0 to less than 1: how slowly the two averages forget.
    epsilon : float
        Positive; keeps the quotient finite.

    Raises
    ------
    ValueError
        If a number is out of range.

    References
    ----------
    Kingma, Ba: Adam: A Method for Stochastic Optimization. ICLR 2015. Algorithm 1.

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
    ) -> None:
        _check("learning_rate", learning_rate, learning_rate > 0, "positive")
        _check("beta1", beta1, 0 <= beta1 < 1, "from 0 to less than 1")
        _check("beta2", beta2, 0 <= beta2 < 1, "from 0 to less than 1")
        _check("epsilon", epsilon, epsilon > 0, "positive")
        self.learning_rate = learning_rate
        self.beta1 = beta1
        self.beta2 = beta2
        self.epsilon = epsilon

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
        for name in ("m", "v", "step"):
            state[name] = parameters.zeros_like().flat
        return state

    def update(self, parameters: Parameters, gradients: Parameters, state: State) -> None:
        """Take one step in place."""
        xp = array_module(parameters.flat, gradients.flat)
        gradient, m, v, step = gradients.flat, state["m"], state["v"], state["step"]
        for average, beta, value in (
            (m, state["beta1"], gradient),
            (v, state["beta2"], xp.square(gradient)),
        ):
            average *= beta
            average += xp.multiply(value, 1 - beta, out=step)
        state["beta1_power"] *= state["beta1"]
        state["beta2_power"] *= state["beta2"]

        xp.sqrt(v, out=step)
        step /= xp.sqrt(1 - state["beta2_power"])  # √v̂
        step += state["epsilon"]
        xp.divide(m, step, out=step)
        step *= state["learning_rate"] / (1 - state["beta1_power"])
        parameters.flat -= step

    def __repr__(self) -> str:
        return (
            f"Adam(learning_rate={self.learning_rate}, beta1={self.beta1}, beta2={self.beta2}, "
            f"epsilon={self.epsilon})"
        )


OPTIMIZERS: dict[str, type[GradientDescent] | type[Adam]] = {
    "adam": Adam,
    "gradient_descent": GradientDescent,
}


def get_optimizer(optimizer: str | Optimizer) -> Optimizer:
    """Return the optimizer of that name with its usual settings, or the one that is given.

    Raises
    ------
    ValueError
        If there is no optimizer of that name; the message gives the nearest one.
    TypeError
        If it is a class instead of an optimizer.
    """
    if isinstance(optimizer, type):
        raise TypeError(f"give an optimizer, not its class: {optimizer.__name__}()")
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown_name("optimizer", optimizer, OPTIMIZERS))
    return OPTIMIZERS[optimizer]()


def _check(name: str, value: float, good: bool, expected: str) -> None:
    if not good or value == float("inf"):  # a comparison with NaN is never good
        raise ValueError(f"{name} must be {expected}, got {value}")


def _scalars(parameters: Parameters, **values: float) -> State:
    """Return the numbers as arrays that broadcast against the parameters, on their device."""
    flat = parameters.flat
    xp = array_module(flat)
    shape = (*flat.shape[:-1], 1) if flat.ndim > 1 else ()
    with device_of(flat).use():
        return {name: xp.full(shape, value, flat.dtype) for name, value in values.items()}
