"""How training by several ranks scales on one machine: strong, full-batch linear regression.

A linear model of 200,000 × 256 numbers in float32 is trained by full-batch gradient descent, by
one rank and by more, each bound to a core of its own, so that each has one thread. The weights must
agree with those of a process that knows nothing of ranks. Rounds alternate; medians are shown.

    python tests/benchmarks/ranks.py          1 and 2 ranks
    python tests/benchmarks/ranks.py 1 2 4    more
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

import gpuml
from gpuml.distributed import ranks

N_SAMPLES, N_FEATURES, SHORT, LONG, ROUNDS = 200_000, 256, 2, 42, 5


def trained(n_epochs: int) -> tuple[gpuml.Linear, float]:
    generator = np.random.default_rng(0)
    X = generator.standard_normal((N_SAMPLES, N_FEATURES), np.float32)
    y = X @ generator.standard_normal((N_FEATURES, 1), np.float32)
    model = gpuml.Linear(N_FEATURES, 1, device="cpu")
    optimizer = gpuml.GradientDescent(0.1)
    history = gpuml.train(model, X, y, optimizer=optimizer, n_epochs=n_epochs, batch_size=None)
    return model, history.seconds


def one_rank() -> None:
    """Print seconds a step and the first weights, as one of several processes."""
    _, short = trained(SHORT)
    model, long = trained(LONG)
    if ranks().rank == 0:
        weights = model.parameters.flat[:8].tolist()
        print(json.dumps({"seconds": (long - short) / (LONG - SHORT), "weights": weights}))


def main() -> None:
    if "--rank" in sys.argv:
        one_rank()
        return
    counts = [int(argument) for argument in sys.argv[1:]] or [1, 2]
    mpiexec = Path(sys.executable).parent / "mpiexec"
    expected = trained(LONG)[0].parameters.flat[:8]
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(ROUNDS):
        for n in counts:
            call = [mpiexec, "-n", str(n), "-bind-to", "core", sys.executable, __file__, "--rank"]
            done = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ)
            answer = json.loads(done.stdout)
            np.testing.assert_allclose(answer["weights"], expected, rtol=1e-4, atol=1e-6)
            seconds[n].append(answer["seconds"])
    times = {n: statistics.median(values) for n, values in seconds.items()}
    print(f"{gpuml.get_device('cpu')}, {N_SAMPLES:,} × {N_FEATURES}, a core for each rank")
    for n, time in times.items():
        ratio = times[counts[0]] / time
        print(f"{n} ranks: {time * 1e3:6.2f} ms a step, {ratio:.2f} times {counts[0]}")


if __name__ == "__main__":
    main()
