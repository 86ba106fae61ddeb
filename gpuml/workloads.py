"""What is trained to compare gpuml with its peers, and how fast a step could be at best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuml.devices import CPU, Device
from gpuml.errors import unknown_name
from gpuml.models import MLP
from gpuml.rivals import START_FILE, X_FILE, Y_FILE, Task

PRECISIONS = ("float32", "tf32", "bfloat16")
MOMENTUM = 0.9


@dataclass(frozen=True)
class Workload:
    """A perceptron with ReLU, softmax cross entropy and momentum, trained on random samples.

    Attributes
    ----------
    name : str
    sizes : tuple of int
        Features, units of each hidden layer, classes.
    batch_size : int
    n_steps : int
        In an epoch; all batches are full.
    n_epochs : int
        After so many, at least two, the losses must agree.
    precision : {"float32", "tf32", "bfloat16"}
        Of matrix products.
    learning_rate : float
        Small enough that training amplifies no rounding.
    n_models : int, optional
        So many such perceptrons at once, on the same batches, each with a learning rate and start
        weights of its own; one alone unless given.
    """

    name: str
    sizes: tuple[int, ...]
    batch_size: int
    n_steps: int = 64
    n_epochs: int = 3
    precision: str = "float32"
    learning_rate: float = 0.02
    n_models: int | None = None

    def __post_init__(self) -> None:
        many = 1 if self.n_models is None else self.n_models
        numbers = (*self.sizes, self.batch_size, self.n_steps, self.n_epochs, many)
        if len(self.sizes) < 2 or min(numbers) < 1 or self.n_epochs < 2:
            raise ValueError(
                "a workload needs two or more sizes (features, hidden units, classes), a batch, "
                "steps, and at least two epochs; got sizes "
                f"{', '.join(map(str, self.sizes))}, batch {self.batch_size}, "
                f"steps {self.n_steps}, epochs {self.n_epochs}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(unknown_name("precision", self.precision, PRECISIONS))

    @property
    def n_operations(self) -> float:
        """Operations of the products in a step; nobody needs the gradient of the inputs.

        6 B Σ(in · out) - 2 B in₀ out₀: forward, gradient of the weights, of a layer's inputs.
        """
        layers = [n_in * n_out for n_in, n_out in zip(self.sizes[:-1], self.sizes[1:], strict=True)]
        return 2.0 * self.batch_size * (3 * sum(layers) - layers[0]) * (self.n_models or 1)

    @property
    def n_bytes(self) -> float:
        """Bytes that a step moves at least if nothing stays on the chip from step to step.

        Weights and momentum are read and written, samples and labels read, the outputs of the
        hidden layers written on the way forward and read on the way back.
        """
        layers = zip(self.sizes[:-1], self.sizes[1:], strict=True)
        n_parameters = sum(n_in * n_out + n_out for n_in, n_out in layers)
        inner = 2 if self.precision == "bfloat16" else 4
        each = 4.0 * 4 * n_parameters + self.batch_size * 2 * inner * sum(self.sizes[1:-1])
        return each * (self.n_models or 1) + self.batch_size * (4 * self.sizes[0] + 8)

    def floor(self, ceilings: Mapping[str, float]) -> tuple[float, str]:
        """Return the least time that a step can take, in seconds, and what binds it.

        Parameters
        ----------
        ceilings : mapping of str to float
            ``copy`` in bytes per second, ``gemm_float32`` … in operations per second: the values
            of :func:`gpuml.device_ceilings`.
        """
        bounds = {
            "arithmetic": self.n_operations / ceilings[f"gemm_{self.precision}"],
            "memory": self.n_bytes / ceilings["copy"],
        }
        bound = max(bounds, key=bounds.__getitem__)
        return bounds[bound], bound

    def write(self, folder: str | Path) -> None:
        """Write samples, labels made by a linear map of them, and start weights."""
        generator = np.random.default_rng(1)
        n_samples = self.n_steps * self.batch_size
        X = generator.standard_normal((n_samples, self.sizes[0]), np.float32)
        y = (X @ generator.standard_normal((self.sizes[0], self.sizes[-1]), np.float32)).argmax(1)
        write_task(folder, self.sizes, X, y, n_models=self.n_models)

    def task(self, folder: str | Path, device: Device) -> Task:
        """Return what a rival's process is told."""
        return Task(
            folder=str(folder),
            sizes=self.sizes,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            momentum=MOMENTUM,
            precision=self.precision,
            device=device.kind,
            n_models=self.n_models,
        )

    def __str__(self) -> str:
        sizes = "-".join(map(str, self.sizes))
        many = "" if self.n_models is None else f"{self.n_models:,} × "
        return f"{self.name}: {many}MLP {sizes}, batch {self.batch_size}, {self.precision}"


WORKLOADS = {
    "digits": Workload("digits", (64, 128, 10), 64, 28, 5, learning_rate=0.05),
    "mnist": Workload("mnist", (784, 256, 128, 10), 128, 468, 2, learning_rate=0.005),
    "wide": Workload("wide", (1024, 4096, 4096, 1000), 4096, 8, 5, learning_rate=0.02),
    "population": Workload("population", (64, 32, 10), 64, 64, 3, n_models=1024),
}


def write_task(
    folder: str | Path, sizes: Sequence[int], X: Any, y: Any, *, n_models: int | None = None
) -> None:
    """Write samples, labels, and start weights of perceptrons, where a Task reads them."""
    np.save(Path(folder) / X_FILE, X, allow_pickle=False)
    np.save(Path(folder) / Y_FILE, y.astype(np.int64), allow_pickle=False)
    models = [MLP(sizes, seed=i, device=CPU).parameters for i in range(n_models or 1)]
    start = (
        models[0] if n_models is None else {k: np.stack([m[k] for m in models]) for k in models[0]}
    )
    np.savez(Path(folder) / START_FILE, **start)


def workloads(
    names: Sequence[str],
    device: Device,
    *,
    precisions: Sequence[str] = (),
    n_steps: int | None = None,
    n_models: Sequence[int] = (),
) -> list[Workload]:
    """Return workloads by name, in the precisions that are wanted.

    Parameters
    ----------
    names : sequence of str
        Of the WORKLOADS.
    device : Device
    precisions : sequence of str
        Unless given, float32, and on a GPU for ``"wide"`` tf32 and bfloat16 as well.
    n_steps : int, optional
        In an epoch, instead of the workload's own.
    n_models : sequence of int
        In a population, one after the other, instead of the workload's own.

    Raises
    ------
    ValueError
        If a name is unknown, or a precision is not to be had on the device.
    """
    found = []
    for name in names:
        if name not in WORKLOADS:
            raise ValueError(unknown_name("workload", name, WORKLOADS))
        usual = PRECISIONS if name == "wide" and device.kind == "gpu" else PRECISIONS[:1]
        found += in_precisions(WORKLOADS[name], device, precisions or usual)
    found = [replace(workload, n_steps=n_steps or workload.n_steps) for workload in found]
    return [one for workload in found for one in in_numbers(workload, n_models)]


def in_numbers(workload: Workload, n_models: Sequence[int]) -> list[Workload]:
    """Return a population once for each number of models, named after it; others as they are."""
    if workload.n_models is None or not n_models:
        return [workload]
    return [replace(workload, name=f"{n:,} × {workload.name}", n_models=n) for n in n_models]


def in_precisions(workload: Workload, device: Device, precisions: Sequence[str]) -> list[Workload]:
    """Return a workload once for each precision, named after it if it is not float32 alone."""
    found = []
    for precision in precisions:
        if device.kind == "cpu" and precision != "float32":
            raise ValueError(f"precision {precision} needs a GPU: on the CPU choose float32")
        if workload.n_models is not None and precision != "float32":
            raise ValueError(
                f"{workload.name} trains many models at once, which are float32: "
                f"leave out precision {precision}"
            )
        named = workload.name if precision == "float32" else f"{workload.name}, {precision}"
        found.append(replace(workload, name=named, precision=precision))
    return found
