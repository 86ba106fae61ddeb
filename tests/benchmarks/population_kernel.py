"""The kernel that trains many models at once: is it right, and how long does a step of all take?

    python tests/benchmarks/population_kernel.py
    python tests/benchmarks/population_kernel.py --models 4 --warps 4 2 8 --width 4 2 --unroll 2 1 4
    python tests/benchmarks/population_kernel.py --sizes 20 64 3 --batch 32 --count 1000 --adam

Each combination of the options that cut the kernel is a variant. Before it is timed, a few models
are trained for two epochs and compared with NumPy in float64: a time counts only if all agree.
Times are those of events around a launch of many epochs, the median of several, a step of all
models, in microseconds. ``-`` stands for what the plan chooses.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import numpy as np

import gpuml
from gpuml.devices import Device
from gpuml.fused_populations import FusedPopulation, plan_population
from gpuml.losses import softmax_cross_entropy
from gpuml.models import Parameters
from gpuml.steps import EagerStep

COUNTS = (132, 264, 528, 1024, 2048, 4096, 16384)
N_SAMPLES, ROUNDS, MICROSECONDS = 1437, 5, 100_000
RATE, MOMENTUM = 0.05, 0.9


def optimizer(adam: bool) -> Any:
    return gpuml.Adam(0.002) if adam else gpuml.GradientDescent(RATE, momentum=MOMENTUM)


def data(sizes: list[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    X = rng.normal(size=(N_SAMPLES, sizes[0])).astype(np.float32)
    return X, (X @ rng.normal(size=(sizes[0], sizes[-1]))).argmax(axis=1)


class Population:
    """Models that start from different weights, and the kernel that trains them."""

    def __init__(self, device: Device, args: argparse.Namespace, n: int, cut: dict) -> None:
        self.device, self.batch = device, args.batch
        few = [gpuml.MLP(args.sizes, seed=i, device="cpu") for i in range(min(n, 16))]
        start = np.stack([few[i % len(few)].parameters.flat for i in range(n)])
        self.flat = device.asarray(start)
        parameters = Parameters(self.flat, few[0].parameters.shapes)
        rng = np.random.default_rng(0)
        self.X, self.y = data(args.sizes, rng)
        self.rng, self.n, self.own = rng, n, args.own_order
        plan = plan_population(
            args.sizes,
            args.batch,
            softmax_cross_entropy,
            1 + args.adam,
            n,
            own_order=args.own_order,
            device=device.index,
            **cut,
        )
        if isinstance(plan, str):
            raise ValueError(plan)
        self.plan = plan
        self.engine = FusedPopulation(
            args.sizes,
            args.batch,
            softmax_cross_entropy,
            self.flat,
            optimizer(args.adam).init(parameters),
            device.asarray(self.X),
            device.asarray(self.y),
            own_order=args.own_order,
            plan=plan,
        )
        self.rate = 0.002 if args.adam else RATE
        self.n_steps = -(-N_SAMPLES // args.batch)

    def arrays(self, n_epochs: int) -> tuple[Any, Any, Any]:
        shape = (self.n, n_epochs, N_SAMPLES) if self.own else (n_epochs, N_SAMPLES)
        order = np.argsort(self.rng.random(shape, np.float32), axis=-1).astype(np.int32)
        xp = self.device.xp
        rates = xp.full((n_epochs, self.n), self.rate, np.float32)
        losses = xp.full((n_epochs, self.n_steps, self.n), np.nan, np.float32)
        return self.device.asarray(order), rates, losses


def error(device: Device, args: argparse.Namespace, cut: dict) -> float:
    """Train nine models for two epochs; return the largest relative error of weights."""
    population = Population(device, args, 9, cut)
    start = gpuml.to_host(population.flat).astype(np.float64)
    order, rates, losses = population.arrays(2)
    population.engine.launch(order, rates, losses)
    found, order = gpuml.to_host(population.flat), gpuml.to_host(order)
    losses = gpuml.to_host(losses).reshape(-1, 9)
    errors = []
    for i in range(9):
        model = gpuml.MLP(args.sizes, dtype=np.float64, device="cpu")
        model.parameters.flat[:] = start[i]
        step = EagerStep(model, softmax_cross_entropy, optimizer(args.adam))
        expected = []
        for rows in order[i] if args.own_order else order:
            for begin in range(0, N_SAMPLES, args.batch):
                batch = rows[begin : begin + args.batch]
                x = population.X[batch].astype(np.float64)
                expected.append(float(step(x, population.y[batch])))
        exact = model.parameters.flat
        errors.append(np.linalg.norm(found[i] - exact) / np.linalg.norm(exact))
        np.testing.assert_allclose(losses[:, i], expected, rtol=1e-3, atol=1e-5)
    return float(max(errors))


def microseconds(device: Device, args: argparse.Namespace, n: int, cut: dict) -> float:
    """Return how long a step of all models takes."""
    population, cuda = Population(device, args, n, cut), device.xp.cuda

    def timed(n_epochs: int) -> float:
        arrays = population.arrays(n_epochs)
        begin, end = cuda.Event(), cuda.Event()
        begin.record()
        population.engine.launch(*arrays)
        end.record()
        end.synchronize()
        return 1000 * cuda.get_elapsed_time(begin, end) / (n_epochs * population.n_steps)

    timed(1)
    most = max(1, 2**28 // (N_SAMPLES * 4 * (n if args.own_order else 1)))
    each = timed(1) * population.n_steps  # of an epoch
    n_epochs = max(1, min(most, 200, int(MICROSECONDS / each)))
    return statistics.median(timed(n_epochs) for _ in range(ROUNDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs=3, default=[64, 32, 10])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--count", type=int, nargs="+", default=COUNTS, help="models in all")
    parser.add_argument("--adam", action="store_true")
    parser.add_argument("--own-order", action="store_true")
    parser.add_argument("--models", type=int, nargs="+", default=[0], help="of a block; 0: plan")
    parser.add_argument("--warps", type=int, nargs="+", default=[0], help="of a model; 0: plan")
    parser.add_argument("--width", type=int, nargs="+", default=[4])
    parser.add_argument("--unroll", type=int, nargs="+", default=[2])
    args = parser.parse_args()
    device = gpuml.get_device("gpu")
    print(device)
    print(f"MLP {'-'.join(map(str, args.sizes))}, batch {args.batch}, us a step of all models")
    heads = "models", "warps", "width", "unroll", "error", *args.count
    print(*(f"{head:>8}" for head in heads))
    with device.use():
        for models, warps, width, unroll in itertools.product(
            args.models, args.warps, args.width, args.unroll
        ):
            cut = {"width": width, "unroll": unroll}
            cut |= {"models": models or None, "warps": warps or None}
            line = [models or "-", warps or "-", width, unroll]
            try:
                found = error(device, args, cut)
                line.append(f"{found:.1e}")
                if not found < 1e-4:
                    line.append("WRONG")
                else:
                    line += [f"{microseconds(device, args, n, cut):.1f}" for n in args.count]
            except (ValueError, AssertionError, RuntimeError) as mistake:
                line.append(" ".join(str(mistake).split())[:100])
            print(*(f"{part:>8}" for part in line), flush=True)


if __name__ == "__main__":
    main()
