"""Many models at once: gpuml's populations beside JAX and PyTorch, for ever more models.

What is trained, and how each does it, is the workload "population" of ``gpuml bench --peers``: here
it is asked for one number of models after another. On a GPU the last table shows from which number
on the time grows with it: there the device is full.

    python tests/benchmarks/populations.py               1 to 256 models; on a GPU to 16,384
    python tests/benchmarks/populations.py 64 128        so many models
    python tests/benchmarks/populations.py --alone       64 at once, and one after another
    python tests/benchmarks/populations.py --groups      the CPU's groups: size, and threads
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import numpy as np

import gpuml
from gpuml import population_runs
from gpuml.peers import POPULATION_RIVALS, compare_rivals, measure_ceilings
from gpuml.workloads import WORKLOADS

WORKLOAD = WORKLOADS["population"]
SIZES, BATCH, N_STEPS, N_EPOCHS = WORKLOAD.sizes, WORKLOAD.batch_size, 64, 3
ROUNDS = 7
ALONE = 8  # models that are trained one after another; the others would take as long


def samples() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    X = generator.standard_normal((N_STEPS * BATCH, SIZES[0]), np.float32)
    y = (X @ generator.standard_normal((SIZES[0], SIZES[-1]), np.float32)).argmax(axis=1)
    return X, y


def compare(counts: list[int]) -> None:
    """Print a table for each number of models, and one of all."""
    device = gpuml.get_device()
    ceilings = measure_ceilings(device)
    gpu = device.kind == "gpu"
    rivals = [r for r in POPULATION_RIVALS if r != "gpuml eager"] if gpu else None
    found = {}
    for n in counts:
        workload = replace(WORKLOAD, name=f"{n:,} models", n_models=n)
        table = compare_rivals(workload, device=device, ceilings=ceilings, rivals=rivals)
        found[n] = {name: timing.seconds for name, timing in table.rivals.items()}
        print(table, flush=True)
    names = {name: None for times in found.values() for name in times}
    print(f"\n{'microseconds a step':<20}{''.join(f'{name:>16}' for name in names)}")
    for n, times in found.items():
        cells = [f"{times[name] * 1e6:,.1f}" if name in times else "–" for name in names]
        print(f"{f'{n:,} models':<20}{''.join(f'{cell:>16}' for cell in cells)}")


def alone(n_models: int = 64) -> None:
    """Print what a step of a model costs at once and one after another, in turns."""
    X, y = samples()
    settings = {"n_epochs": N_EPOCHS, "batch_size": BATCH, "shuffle": False}
    rates = np.geomspace(0.005, 0.02, n_models)

    def at_once() -> int:
        optimizer = gpuml.GradientDescent(momentum=0.9)
        model, more = gpuml.MLP(SIZES), {"n_models": n_models, "learning_rates": rates}
        gpuml.train_population(model, X, y, optimizer=optimizer, **more, **settings)
        return n_models

    def in_turn() -> int:
        for i, rate in enumerate(rates[:ALONE].tolist()):
            optimizer = gpuml.GradientDescent(rate, momentum=0.9)
            gpuml.train(gpuml.MLP(SIZES, seed=i), X, y, optimizer=optimizer, **settings)
        return min(ALONE, n_models)

    taken: dict[str, list[float]] = {"at once": [], "one after another": []}
    for i in range(ROUNDS + 1):
        for name, train in zip(taken, (at_once, in_turn), strict=True):
            begin = time.perf_counter()
            n = train()
            if i > 0:  # the first compiles on a GPU
                taken[name].append((time.perf_counter() - begin) / (N_EPOCHS * N_STEPS * n))
    times = {name: statistics.median(values) for name, values in taken.items()}
    for name, seconds in times.items():
        print(f"{n_models} models, {name:<20}{seconds * 1e6:8.2f} µs a step and model")
    print(f"{times['one after another'] / times['at once']:.2f} times faster")


def groups(n_models: int = 128) -> None:
    """Print how the price depends on the groups, and on the threads."""
    X, y = samples()
    model = gpuml.MLP(SIZES, device="cpu")
    for optimizer in (gpuml.GradientDescent(0.01, momentum=0.9), gpuml.Adam()):
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
    device = gpuml.get_device()
    print(device)
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    if "--groups" in sys.argv:
        groups()
    elif "--alone" in sys.argv:
        alone(*numbers)
    else:
        most = 256 if device.kind == "cpu" else 16384
        compare(numbers or [4**i for i in range(8) if 4**i <= most])


if __name__ == "__main__":
    main()
