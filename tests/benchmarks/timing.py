"""gpuml.benchmark beside the profilers of CuPy and of PyTorch, on the same work.

Prints the seconds that each measures for a product of two 4096 x 4096 matrices (1024 on the CPU)
and for the sum of two vectors of 2^28 numbers (2^24), in float32, as JSON.

    python tests/benchmarks/timing.py
"""

from __future__ import annotations

import json

try:
    # First of all: PyTorch and CuPy each bring CUDA libraries, and PyTorch wants its own.
    import torch.utils.benchmark as torch_timing
except ImportError:
    torch_timing = None

import numpy as np

import gpuml


def main() -> None:
    device = gpuml.get_device()
    xp, on_gpu = device.xp, device.kind == "gpu"
    n, m = (4096, 2**28) if on_gpu else (1024, 2**24)
    matrix, vector = xp.ones((n, n), np.float32), xp.ones(m, np.float32)
    work = {"product": (xp.matmul, (matrix, matrix)), "sum": (xp.add, (vector, vector))}
    measured: dict[str, dict[str, float]] = {}
    for name, (function, arguments) in work.items():
        row = measured[name] = {"gpuml": gpuml.benchmark(function, *arguments).seconds}
        if on_gpu:
            from cupyx import profiler

            times = profiler.benchmark(function, arguments, n_repeat=100, n_warmup=20).gpu_times
            row["cupyx"] = float(np.median(times))
        if torch_timing is not None:
            timer = torch_timing.Timer(
                "function(*arguments); synchronize()",
                globals={
                    "function": function,
                    "arguments": arguments,
                    "synchronize": device.synchronize,
                },
            )
            row["torch"] = timer.blocked_autorange(min_run_time=1.0).median
    print(json.dumps({"device": str(device), "seconds": measured}, indent=1))


if __name__ == "__main__":
    main()
