"""Training whole epochs in one launch: perceptrons whose weights stay on the chip.

Two kernels share the work. For one hidden layer, a cluster of blocks keeps the weights and the
optimizer's state in shared memory (``mlp_cluster.cu``). For more, or wider ones, the whole GPU
works on each layer in turn, and the weights stay in the L2 cache (``mlp_grid.cu``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from gpuml.batches import ArrayBatches, Batches
from gpuml.devices import Array
from gpuml.kernels import load_kernel
from gpuml.losses import Loss, mean_squared_error, softmax_cross_entropy
from gpuml.models import MLP, Model
from gpuml.optimizers import Adam, GradientDescent, Optimizer

THREADS = {"mlp_cluster": 384, "mlp_grid": 256}
MOST_OUTPUTS = 32  # a warp, or a few lanes, hold a row's predictions in registers
MOST_BATCH = {"mlp_cluster": 256, "mlp_grid": 1024}
# Above this many operations a step is no longer a matter of latency, and cuBLAS is faster.
MOST_OPERATIONS = 2e9
# Numbers of a product's factors that mlp_grid keeps in shared memory: at most, and at least.
MOST_SPACE, LEAST_SPACE = 48 * 1024, 8 * 1024

# What a block keeps to itself beside our shared memory.
RESERVED_BYTES = 1024
NON_PORTABLE_CLUSTER = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


@dataclass(frozen=True)
class Plan:
    """Which kernel trains a model, compiled for which sizes, and how it is launched."""

    kernel: str
    sizes: tuple[int, ...]
    batch_size: int
    blocks: int
    threads: int
    shared_bytes: int
    classes: bool
    optimizer: int  # how many vectors it keeps: 0, 1 (velocity), 2 (Adam)
    space: int = 0  # of mlp_grid, for factors

    @property
    def options(self) -> tuple[str, ...]:
        """What the compiler is told."""
        sizes: dict[str, Any] = {
            "BATCH": self.batch_size,
            "CLASSES": int(self.classes),
            "OPTIMIZER": self.optimizer,
            "SHARED_BYTES": self.shared_bytes,
        }
        if self.kernel == "mlp_cluster":
            features, hidden, outputs = self.sizes
            sizes |= {"FEATURES": features, "HIDDEN": hidden, "OUTPUTS": outputs}
            sizes |= {"CLUSTER": self.blocks, "THREADS": self.threads}
        else:
            sizes["SIZES"] = ",".join(map(str, self.sizes))
            sizes["SPACE"] = self.space
        return tuple(f"-D{name}={value}" for name, value in sizes.items())


def limit(model: Model, loss: Loss, optimizer: Optimizer, data: Batches) -> str | None:
    """Return why a model cannot be trained by a fused kernel, or None if it can.

    Parameters
    ----------
    model : Model
    loss : callable
    optimizer : Optimizer
    data : Batches

    Returns
    -------
    str or None
        A reason for people.
    """
    reason = general_limit(model, loss, optimizer, data)
    if reason is not None:
        return reason
    plan = plan_for(model.sizes, data.batch_size, loss, optimizer, model.device.index)
    return plan if isinstance(plan, str) else None


def general_limit(model: Model, loss: Loss, optimizer: Optimizer, data: Batches) -> str | None:
    """Return what forbids every fused kernel, whatever its sizes, or None."""
    if model.device.kind == "cpu":
        return "its kernels are for GPUs"
    if model.device.xp.cuda.runtime.is_hip:
        return "its kernels are for NVIDIA GPUs"
    if _capability(model.device.index) < (8, 0):
        return "its kernels need compute capability 8.0"
    if type(model) is not MLP or model.dtype != np.float32 or len(model.sizes) < 3:
        return "it is for MLPs of float32 with a hidden layer"
    if loss not in (softmax_cross_entropy, mean_squared_error):
        return "it is for cross entropy and the mean squared error"
    if type(optimizer) not in (GradientDescent, Adam):
        return "it is for GradientDescent and Adam"
    if not isinstance(data, ArrayBatches):
        return "the data are not on the device as a whole"
    return None


def plan_for(
    sizes: tuple[int, ...], batch_size: int, loss: Loss, optimizer: Optimizer, device: int
) -> Plan | str:
    """Return which kernel holds a model, or why none does."""
    operations = 6.0 * batch_size * sum(map(math.prod, pairwise(sizes)))
    if operations > MOST_OPERATIONS:
        most = f"{MOST_OPERATIONS:.0e}"
        return f"a step has {operations:.1e} operations, and fused kernels are for up to {most}"
    if sizes[-1] > MOST_OUTPUTS:
        return f"it has {sizes[-1]} outputs, and fused kernels are for up to {MOST_OUTPUTS}"
    momentum = isinstance(optimizer, GradientDescent) and optimizer.momentum > 0
    n_states = 2 if isinstance(optimizer, Adam) else int(momentum)
    classes = loss is softmax_cross_entropy
    room = _shared_memory(device) - RESERVED_BYTES
    if len(sizes) == 3 and batch_size <= MOST_BATCH["mlp_cluster"]:
        for blocks in _cluster_sizes(sizes, batch_size, device):
            needed = cluster_bytes(sizes, batch_size, blocks, n_states, classes)
            if needed <= room:
                threads = THREADS["mlp_cluster"]
                return Plan(
                    "mlp_cluster", sizes, batch_size, blocks, threads, needed, classes, n_states
                )
    if batch_size > MOST_BATCH["mlp_grid"]:
        return f"batches of {batch_size} rows are too large: at most {MOST_BATCH['mlp_grid']}"
    space = min(MOST_SPACE, (room - grid_bytes(sizes, batch_size, 0)) // 4 // 256 * 256)
    if space < max(LEAST_SPACE, (sizes[-2] + 1) * sizes[-1]):
        return f"its last layer does not fit into the {room:,} bytes that a block can share"
    needed, blocks = grid_bytes(sizes, batch_size, space), _n_processors(device)
    threads = THREADS["mlp_grid"]
    return Plan("mlp_grid", sizes, batch_size, blocks, threads, needed, classes, n_states, space)


def _cluster_sizes(sizes: tuple[int, ...], batch_size: int, device: int) -> list[int]:
    """Return how many blocks may share a model, the fastest first."""
    if _capability(device) < (9, 0):
        return [1]
    rows, units = -(-batch_size // 16) * 16, sizes[1]
    return [n for n in (16, 8, 4, 2, 1) if n <= rows and (n == 1 or 4 * n <= units)]


def cluster_bytes(
    sizes: tuple[int, ...], batch_size: int, blocks: int, n_states: int, classes: bool
) -> int:
    """Return the bytes of ``struct Shared`` in ``mlp_cluster.cu``; its compiler checks them."""
    features, hidden, outputs = sizes
    units, sums, rows = _up(-(-hidden // blocks), 8), _up(outputs, 8), _up(batch_size, 16)
    by_feature, by_unit, by_output = _up(features, 8) + 4, units + 4, sums + 4
    weights = units * by_feature + units + sums * by_unit + sums
    words = (1 + n_states) * weights + 2 * rows * (by_feature + by_unit)
    words += 2 * rows * by_output + 16 + 4  # parts, gradients, mail
    words += 4 * (rows if classes else 1) + 2 * (2 if classes else rows * outputs)
    return 4 * _up(words + 2 * rows, 2)


def grid_bytes(sizes: tuple[int, ...], batch_size: int, space: int) -> int:
    """Return the bytes of ``struct Shared`` in ``mlp_grid.cu``; its compiler checks them."""
    return 4 * (space + 8 * 256 + 2 * _up(batch_size, 16) + 7 * (len(sizes) - 1))


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def aligned(a: Array, xp: Any) -> Array:
    """Return the array, or a copy that kernels can read 16 bytes at a time."""
    return a if a.flags.c_contiguous and a.data.ptr % 16 == 0 else xp.array(a, order="C")


class FusedStep:
    """Trains whole epochs in one launch.

    Parameters
    ----------
    model : MLP
    loss : callable
    optimizer : GradientDescent or Adam
    data : ArrayBatches

    Attributes
    ----------
    engine : str
    state : dict of str to cupy.ndarray
        The optimizer's; its numbers are parts of one vector, which the kernel reads.
    """

    engine = "fused"
    NUMBERS = (
        "momentum",
        "beta1",
        "beta2",
        "epsilon",
        "weight_decay",
        "beta1_power",
        "beta2_power",
    )

    def __init__(self, model: Model, loss: Loss, optimizer: Optimizer, data: ArrayBatches) -> None:
        plan = plan_for(model.sizes, data.batch_size, loss, optimizer, model.device.index)
        assert isinstance(plan, Plan)
        self._plan, xp = plan, model.device.xp
        self._arrays = [aligned(a, xp) for a in data.arrays]
        self._parameters = model.parameters.flat
        self.state = optimizer.init(model.parameters)
        self._numbers = xp.zeros(len(self.NUMBERS), np.float32)
        for i, name in enumerate(self.NUMBERS):
            if name in self.state:
                self._numbers[i] = self.state[name]
                self.state[name] = self._numbers[i : i + 1].reshape(())
        none = self._parameters[:0]
        self._vectors = (
            self.state.get("velocity", self.state.get("m", none)),
            self.state.get("v", none),
        )
        self._kernel = _compiled(plan, model.device.index)
        self.reason = ""
        rows, arrays = _up(data.batch_size, 16), 0
        if plan.kernel == "mlp_grid":
            arrays = rows + 2 * rows * sum(_up(n, 4) for n in plan.sizes[1:])
        self._space, self._arrived = xp.zeros(arrays, np.float32), xp.zeros(1, np.uint32)

    @property
    def changing(self) -> list[Array]:
        """The arrays that training changes."""
        return [self._parameters, self._numbers, *(v for v in self._vectors if v.size)]

    def launch(self, order: Array, rates: Array, losses: Array) -> None:
        """Train for some epochs; the host does not wait.

        Parameters
        ----------
        order : cupy.ndarray of int32, shape (n_epochs, n_samples)
            The rows of each epoch, batch after batch.
        rates : cupy.ndarray of float32, shape (n_epochs,)
            The learning rate of each epoch.
        losses : cupy.ndarray of float32, shape (n_epochs, n_steps)
            Written: the loss before each step.
        """
        plan, (X, y) = self._plan, self._arrays
        arguments: tuple[Any, ...] = (
            X,
            y,
            order,
            self._parameters,
            *self._vectors,
            rates,
            self._numbers,
            losses,
        )
        ends = np.int32(len(X)), np.int32(len(order))
        if plan.kernel == "mlp_grid":
            self._arrived.fill(0)
            arguments = (*arguments, self._space, self._arrived)
        self._kernel(
            (plan.blocks,), (plan.threads,), (*arguments, *ends), shared_mem=plan.shared_bytes
        )


@cache
def _compiled(plan: Plan, device: int) -> Any:
    """Return a kernel that is ready for launches on a device, the current one."""
    kernel = load_kernel(plan.kernel, options=plan.options, cooperative=plan.kernel == "mlp_grid")
    kernel.max_dynamic_shared_size_bytes = plan.shared_bytes
    if plan.kernel == "mlp_cluster" and plan.blocks > 8:  # more than every GPU must have
        from cupy_backends.cuda.api import driver

        driver.funcSetAttribute(kernel.kernel.ptr, NON_PORTABLE_CLUSTER, 1)
    return kernel


@cache
def _properties(device: int) -> dict[str, Any]:
    import cupy

    found = dict(cupy.cuda.runtime.getDeviceProperties(device))
    most = cupy.cuda.Device(device).attributes.get("MaxSharedMemoryPerBlockOptin")
    return found | {"shared": int(most or found["sharedMemPerBlock"])}


def _capability(device: int) -> tuple[int, int]:
    found = _properties(device)
    return int(found["major"]), int(found["minor"])


def _shared_memory(device: int) -> int:
    return int(_properties(device)["shared"])


def _n_processors(device: int) -> int:
    return int(_properties(device)["multiProcessorCount"])
