"""From which size on a second BLAS thread pays in training: the ground for SERIAL_PRODUCT.

Trains MLPs of several widths with one BLAS thread and with all, and prints µs a step against the
floating-point operations of the largest matrix product.

    python tests/benchmarks/threads.py
"""

from __future__ import annotations

import statistics
import time

import numpy as np

import gpuml
from gpuml import devices


def microseconds(width: int, batch: int, threshold: float) -> float:
    """Time a step of an MLP width-width-10; below the threshold it has one thread."""
    devices.SERIAL_PRODUCT = threshold
    rng = np.random.default_rng(0)
    n_steps = max(4, int(4e9 / (12 * batch * width * width)))
    X = rng.normal(size=(batch, width)).astype(np.float32)
    y = rng.integers(10, size=batch)
    taken = []
    for _ in range(5):
        model = gpuml.MLP([width, width, 10], device="cpu")
        start = time.perf_counter()
        gpuml.train(model, X, y, batch_size=None, n_epochs=n_steps)
        taken.append((time.perf_counter() - start) / n_steps)
    return statistics.median(taken) * 1e6


def main() -> None:
    print(gpuml.get_device("cpu"))
    print(f"{'width':>6}{'batch':>6}{'product':>10}{'one, µs':>10}{'all, µs':>10}{'all/one':>9}")
    for width, batch in [(64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 128),
                         (512, 256), (512, 512), (1024, 256), (1024, 512)]:  # fmt: skip
        one = microseconds(width, batch, float("inf"))
        every = microseconds(width, batch, 0.0)
        product = 2.0 * batch * width * width
        print(f"{width:6}{batch:6}{product:10.1e}{one:10.0f}{every:10.0f}{every / one:9.2f}")


if __name__ == "__main__":
    main()
