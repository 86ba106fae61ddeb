"""Training many models of one shape in one launch: their weights stay on the chip.

A block of the kernel (``mlp_population.cu``) keeps some models, and the optimizer's state of each,
in shared memory for all steps. They read the same rows, which are therefore fetched once for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gpuml import fused
from gpuml.batches import Batches
from gpuml.devices import Array, device_of
from gpuml.kernels import load_kernel
from gpuml.losses import Loss, softmax_cross_entropy
from gpuml.models import Model
from gpuml.optimizers import Optimizer, State

MOST_BATCH = 256
# Of a model; more wait for each other more often. With short batches fewer leave room for models.
MOST_WARPS, SHORT_BATCH, MOST_WARPS_OF_SHORT = 5, 32, 3
MOST_THREADS = 640  # of a block: each may have 102 registers
MOST_MODELS = 15  # of a block: each has a barrier of its own, and there are 16
WIDTH = 4
REGISTERS, MOST_RESIDENT = 65536, 2048  # of a multiprocessor: registers, and threads

VECTORS = "velocity", "m", "v"  # of the optimizers' states

# Time of a step, reckoned: so much for the first model of a multiprocessor, in that of each more.
LATENCY = 2


@dataclass(frozen=True)
class PopulationPlan:
    """How the kernel is compiled, and what a block of it holds."""

    sizes: tuple[int, ...]
    batch_size: int
    models: int  # of a block
    warps: int  # of a model
    shared_bytes: int
    classes: bool
    optimizer: int  # how many vectors it keeps: 0, 1 (velocity), 2 (Adam)
    own_order: bool
    width: int = WIDTH  # of a tile of the weights' gradient, in eights
    unroll: int = 2

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * self.models

    @property
    def options(self) -> tuple[str, ...]:
        """What the compiler is told."""
        features, hidden, outputs = self.sizes
        sizes = {
            "FEATURES": features,
            "HIDDEN": hidden,
            "OUTPUTS": outputs,
            "BATCH": self.batch_size,
            "MODELS": self.models,
            "WARPS": self.warps,
            "WIDTH": self.width,
            "UNROLL": self.unroll,
            "OWN_ORDER": int(self.own_order),
            "CLASSES": int(self.classes),
            "OPTIMIZER": self.optimizer,
            "SHARED_BYTES": self.shared_bytes,
        }
        return tuple(f"-D{name}={value}" for name, value in sizes.items())


def population_plan(
    model: Model,
    loss: Loss,
    optimizer: Optimizer,
    data: Batches,
    n_models: int,
    own_order: bool = False,
) -> PopulationPlan | str:
    """Return how models like this one are held by the fused kernel, or why they cannot be.

    Parameters
    ----------
    model : Model
        A template of all.
    loss : callable
    optimizer : Optimizer
        With a momentum if any of them has one.
    data : Batches
    n_models : int
    own_order : bool
        Whether each model has its own order of the samples.

    Returns
    -------
    PopulationPlan or str
        A reason for people.
    """
    reason = fused.general_limit(model, loss, optimizer, data)
    if reason is not None:
        return reason
    state = optimizer.init(model.parameters)
    return plan_population(
        model.sizes,
        data.batch_size,
        loss,
        sum(name in state for name in VECTORS),
        n_models,
        own_order=own_order,
        device=model.device.index,
    )


def plan_population(
    sizes: Sequence[int],
    batch_size: int,
    loss: Loss,
    n_states: int,
    n_models: int,
    *,
    own_order: bool = False,
    device: int = 0,
    models: int | None = None,
    warps: int | None = None,
    width: int = WIDTH,
    unroll: int = 2,
) -> PopulationPlan | str:
    """Return how a population is held, or why it cannot be.

    Parameters
    ----------
    sizes : sequence of int
        Features, hidden units, outputs.
    batch_size : int
    loss : callable
    n_states : int
        How many vectors the optimizer keeps: 0, 1 (velocity), 2 (Adam).
    n_models : int
    own_order : bool
        Whether each model has its own order of the samples; a block then holds one model.
    device : int
        Index of the GPU.
    models, warps, width, unroll : int, optional
        Models of a block, warps of a model, and how the kernel's loops are cut: for benchmarks.

    Returns
    -------
    PopulationPlan or str
    """
    sizes = tuple(sizes)
    if len(sizes) != 3:
        return f"it is for one hidden layer, and these models have {len(sizes) - 2}"
    if sizes[-1] > fused.MOST_OUTPUTS:
        most = fused.MOST_OUTPUTS
        return f"they have {sizes[-1]} outputs, and its kernel is for up to {most}"
    if batch_size > MOST_BATCH:
        return f"batches of {batch_size} rows are too large: at most {MOST_BATCH}"
    classes = loss is softmax_cross_entropy
    room = fused._shared_memory(device) - fused.RESERVED_BYTES
    needed = population_bytes(sizes, batch_size, 1, n_states, classes)
    if needed > room:
        return (
            f"a model needs {needed:,} bytes of shared memory with its batches, and a block has "
            f"{room:,}"
        )
    warps = warps or _warps(sizes, batch_size, width)
    most = 1 if own_order else min(MOST_MODELS, max(1, MOST_THREADS // (32 * warps)))
    fitting = [
        m
        for m in ([models] if models else range(1, most + 1))
        if population_bytes(sizes, batch_size, m, n_states, classes) <= room
    ]
    if not fitting:
        return f"{models} models do not fit into the {room:,} bytes that a block can share"
    plans = [
        PopulationPlan(
            sizes,
            batch_size,
            m,
            warps,
            population_bytes(sizes, batch_size, m, n_states, classes),
            classes,
            n_states,
            own_order,
            width,
            unroll,
        )
        for m in fitting
    ]
    # Of plans that take as long, that whose blocks hold the most models fetches the fewest rows.
    return min(plans, key=lambda plan: (_duration(plan, n_models, device), -plan.models))


def _warps(sizes: tuple[int, ...], batch_size: int, width: int) -> int:
    """Return how many warps a model gets: with no fewer its tiles are done in as few rounds."""
    features, hidden, outputs = sizes
    across = -(-features // (8 * width)), -(-hidden // (8 * width))
    tiles = -(-hidden // 16) * across[0] + (outputs // 16 + 1) * across[1]
    rows = -(-batch_size // 16)
    most = MOST_WARPS if batch_size > SHORT_BATCH else MOST_WARPS_OF_SHORT
    return min(range(1, most + 1), key=lambda n: -(-rows // n) + -(-tiles // n))


def _duration(plan: PopulationPlan, n_models: int, device: int) -> int:
    """Return about how long a step of all models takes, in that of one more model."""
    processors = fused._n_processors(device)
    resident = min(
        (fused._shared_memory(device) + fused.RESERVED_BYTES)
        // (plan.shared_bytes + fused.RESERVED_BYTES),
        MOST_RESIDENT // plan.threads,
        REGISTERS // (128 * plan.threads),
    )
    resident = max(1, resident)  # blocks of a multiprocessor at a time
    blocks = -(-n_models // plan.models)
    waves, rest = divmod(blocks, resident * processors)
    time = waves * (LATENCY + resident * plan.models)
    return time + (LATENCY + -(-rest // processors) * plan.models if rest else 0)


def population_bytes(
    sizes: Sequence[int], batch_size: int, models: int, n_states: int, classes: bool
) -> int:
    """Return the bytes of ``struct Shared`` in ``mlp_population.cu``; its compiler checks them."""
    features, hidden, outputs = sizes
    up, behind = fused._up, 32
    eights = -(-hidden // 8)
    chunks = -(-eights // 4)
    units, rows, sums = 8 * chunks * -(-eights // chunks), up(batch_size, 16), up(outputs, 8)
    by_feature, by_unit, by_output = _line(features), _line(units), up(outputs + 1, 4)
    first = units * by_feature + units + sums
    model = first + sums * by_unit
    model += n_states * (first + outputs * by_unit) if n_states else 2
    model += 2 * (rows * by_unit + behind) + rows * by_output + behind
    words = 2 * (rows * by_feature + behind) + models * model
    words += 4 * (rows if classes else 1) + 2 * (2 if classes else rows * outputs)
    return 4 * up(words + 2 * rows, 2)


def _line(n: int) -> int:
    """Return the length of a line of n numbers: an odd number of eights."""
    eights = -(-n // 8)
    return 8 * (eights + (eights + 1) % 2)


class FusedPopulation:
    """Trains whole epochs of many models in one launch.

    Parameters
    ----------
    sizes : sequence of int
        Features, hidden units, outputs of each model.
    batch_size : int
    loss : callable
    flat : cupy.ndarray of float32, shape (n_models, n_parameters)
        The parameters of all models, C-contiguous, which training changes.
    state : dict of str to cupy.ndarray
        The optimizer's, as its ``init`` gives it for parameters with a leading axis: vectors like
        `flat`, and numbers of shape (n_models, 1).
    X : cupy.ndarray of float32, shape (n_samples, features)
    y : cupy.ndarray
        Labels of shape (n_samples,), or float32 of shape (n_samples, outputs).
    own_order : bool
        Whether each model has its own order of the samples.
    plan : PopulationPlan, optional
        One that fits instead of that of :func:`plan_population`.

    Attributes
    ----------
    state : dict of str to cupy.ndarray
        A copy of the dict; its numbers are columns of one matrix, which the kernel reads.

    Raises
    ------
    ValueError
        If the models do not fit, or the parameters are not contiguous.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        loss: Loss,
        flat: Array,
        state: State,
        X: Array,
        y: Array,
        *,
        own_order: bool = False,
        plan: PopulationPlan | None = None,
    ) -> None:
        device = device_of(flat)
        xp, n_models = device.xp, len(flat)
        vectors = [state[name] for name in VECTORS if name in state]
        for array in (flat, *vectors):
            if array.dtype != np.float32 or not array.flags.c_contiguous:
                raise ValueError("the parameters of a population must be contiguous float32")
        found = plan or plan_population(
            sizes,
            batch_size,
            loss,
            len(vectors),
            n_models,
            own_order=own_order,
            device=device.index,
        )
        if isinstance(found, str):
            raise ValueError(f"the fused kernel cannot train these models: {found}")
        self.plan, self._flat = found, flat
        y = y.astype(np.int64 if found.classes else np.float32, copy=False)
        self._data = fused.aligned(X, xp), fused.aligned(y, xp)
        self.state = dict(state)
        self._numbers = xp.zeros((n_models, len(fused.FusedStep.NUMBERS)), np.float32)
        for i, name in enumerate(fused.FusedStep.NUMBERS):
            if name in state:
                self._numbers[:, i : i + 1] = state[name]
                self.state[name] = self._numbers[:, i : i + 1]
        self._vectors = vectors
        self._none = flat[:0]
        self._kernel = _compiled(found, device.index)

    @property
    def changing(self) -> list[Array]:
        """The arrays that training changes."""
        return [self._flat, self._numbers, *self._vectors]

    def launch(self, order: Array, rates: Array, losses: Array, kept: Array | None = None) -> None:
        """Train for some epochs; the host does not wait.

        Parameters
        ----------
        order : cupy.ndarray of int32, shape (n_epochs, n_samples)
            The rows of each epoch, batch after batch; with `own_order` of shape
            (n_models, n_epochs, n_samples).
        rates : cupy.ndarray of float32, shape (n_epochs, n_models)
            The learning rate of each epoch and model.
        losses : cupy.ndarray of float32, shape (n_epochs, n_steps, n_models)
            Written: the loss of each model before each step.
        kept : cupy.ndarray of float32, shape (n_epochs, n_models, n_parameters), optional
            Written: the parameters after each epoch.
        """
        plan, n_models = self.plan, len(self._flat)
        first, second = (*self._vectors, self._none, self._none)[:2]
        X, y = self._data
        vectors = self._flat, first, second
        where = np.uint64(0) if kept is None else kept
        arguments = (X, y, order, *vectors, rates, self._numbers, losses, where)
        ends = np.int32(len(X)), np.int32(len(rates)), np.int32(n_models)
        blocks = -(-n_models // plan.models)
        self._kernel((blocks,), (plan.threads,), (*arguments, *ends), shared_mem=plan.shared_bytes)


@cache
def _compiled(plan: PopulationPlan, device: int) -> Any:
    """Return the kernel, ready for launches on a device, the current one."""
    kernel = load_kernel("mlp_population", options=plan.options)
    kernel.max_dynamic_shared_size_bytes = plan.shared_bytes
    return kernel
