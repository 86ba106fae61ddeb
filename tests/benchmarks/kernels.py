"""The matrix products of notebook 02, rung by rung, beside cuBLAS, in one run on a GPU.

Each product is checked against float64 before its time counts. A time is the median of events
on the device, after warm-up. The Numba kernels are those of the notebook itself.

    python tests/benchmarks/kernels.py [size ...]
    python tests/benchmarks/kernels.py --check      only the checks, small; also without a GPU
"""

from __future__ import annotations

import ast
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import gpuml
from gpuml import kernels
from gpuml.devices import Device

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_your_first_kernels.ipynb"
SHAPES = [(1, 1, 1), (5, 3, 2), (10, 9, 7), (1, 13, 4), (8, 8, 8)]  # M, N, K, also on the CPU
ODD_SHAPES = [*SHAPES, (129, 127, 33), (257, 64, 1), (100, 300, 250)]
SECONDS = 0.5  # for each kernel

Product = Callable[[Any, Any, Any], None]  # A, B -> C


def notebook_kernels(cuda: ModuleType, **constants: int) -> dict[str, Any]:
    """Return the kernels that notebook 02 defines, compiled with these constants."""
    from numba import float32, int32

    names = {"cuda": cuda, "float32": float32, "int32": int32, **constants}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "@cuda.jit" in "".join(cell["source"]):
            tree = ast.parse("".join(cell["source"]))
            tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
            exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return names


def numba_products(device: Device, tile: int, each: int, side: int = 16) -> dict[str, Product]:
    """Return the products by the notebook's kernels, each a function of A, B and C."""
    found = notebook_kernels(kernels.numba_cuda(device), TILE=tile, EACH=each, THREADS=8)

    def product(kernel: Any, covers: int, threads: tuple[int, int]) -> Product:
        def launch(A: Any, B: Any, C: Any) -> None:
            kernel[(-(-C.shape[1] // covers), -(-C.shape[0] // covers)), threads](A, B, C)

        return launch

    return {
        "Numba naive": product(found["matmul_naive"], side, (side, side)),
        "Numba tiled": product(found["matmul_tiled"], tile, (tile, tile)),
        "Numba several": product(found["matmul_several"], tile, (tile, tile // each)),
    }


def cuda_c_products() -> dict[str, Product]:
    """Return the products by the CUDA C sources, each a function of A, B and C."""

    def product(name: str, covers: int) -> Product:
        def launch(A: Any, B: Any, C: Any) -> None:
            blocks = -(-C.shape[1] // covers), -(-C.shape[0] // covers)
            sizes = [np.int32(n) for n in (*C.shape, A.shape[1])]
            kernels.load_kernel(name)(blocks, (16, 16), (A, B, C, *sizes))

        return launch

    return {
        "CUDA C naive": product("matmul_naive", 16),
        "CUDA C tiled": product("matmul_tiled", 128),
    }


def relative_error(
    device: Device, product: Product, shape: tuple[int, int, int], dtype: Any = np.float32
) -> float:
    """Multiply random matrices of shape M × K and K × N; compare with float64 on the host."""
    m, n, k = shape
    rng = np.random.default_rng(m + n + k)
    A, B = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)
    C = device.asarray(np.full((m, n), np.nan, dtype=dtype))
    product(device.asarray(A), device.asarray(B), C)
    exact = A.astype(np.float64) @ B.astype(np.float64)
    error = gpuml.to_host(C).astype(np.float64) - exact
    scale = np.linalg.norm(np.abs(A).astype(np.float64) @ np.abs(B).astype(np.float64))
    return float(np.linalg.norm(error) / scale)


def check(device: Device) -> Iterator[tuple[str, tuple[int, int, int], float]]:
    """Yield name, shape and relative error of each kernel, at shapes that fit no tile."""
    gpu = device.kind == "gpu"
    tile, each, side = (32, 8, 16) if gpu else (4, 2, 4)
    products = numba_products(device, tile, each, side) | (cuda_c_products() if gpu else {})
    for name, product in products.items():
        for shape in ODD_SHAPES if gpu else SHAPES:
            yield name, shape, relative_error(device, product, shape)


def seconds(cupy: ModuleType, work: Callable[[], None]) -> float:
    """Return the median time of one call, by events on the device."""

    def once(n_calls: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        for _ in range(n_calls):
            work()
        end.record()
        end.synchronize()
        return cupy.cuda.get_elapsed_time(begin, end) / 1000 / n_calls

    once(2)  # compiles, and wakes the device
    # Several calls between two events, so that launching from Python does not count.
    one = once(3)
    n_calls = max(1, min(100, int(0.02 / one)))
    once(n_calls)
    rounds = max(5, min(100, int(SECONDS / (one * n_calls))))
    return statistics.median(once(n_calls) for _ in range(rounds))


def cublas(cupy: ModuleType) -> Product:
    def launch(A: Any, B: Any, C: Any) -> None:
        cupy.matmul(A, B, out=C)

    return launch


def measure(device: Device, products: dict[str, Product], size: int, dtype: Any) -> None:
    """Check each product, then print its time and rate."""
    cupy = device.xp
    limit = {np.dtype(np.float32): 1e-6, np.dtype(np.float16): 1e-3}[np.dtype(dtype)]
    if os.environ.get("CUPY_TF32") == "1":
        limit = 1e-3
    rng = np.random.default_rng(0)
    # Random data: a product of zeros takes less power, and so less time.
    A, B = (device.asarray(rng.normal(size=(size, size)).astype(dtype)) for _ in range(2))
    C = cupy.empty_like(A)
    for name, product in products.items():
        error = relative_error(device, product, (500, 300, 400), dtype)
        if not error < limit:
            raise SystemExit(f"{name} is wrong: relative error {error:.1e}, allowed {limit:.0e}")
        taken = seconds(cupy, lambda product=product: product(A, B, C))
        rate = 2 * size**3 / taken / 1e12
        print(f"{name:>16}{size:7}{taken * 1e6:12.1f}{rate:10.2f}{error:10.1e}", flush=True)


def main() -> None:
    if "--check" in sys.argv:
        device = gpuml.get_device()
        worst = 0.0
        for name, shape, error in check(device):
            print(f"{name:>16} {shape!s:>15} {error:.1e}")
            worst = max(worst, error) if error == error else float("inf")
        raise SystemExit(worst > 1e-6)
    device = gpuml.get_device("gpu")
    sizes = [int(text) for text in sys.argv[1:] if text.isdigit()] or [2048, 4096]
    with device.use():
        for size in sizes:
            if os.environ.get("CUPY_TF32") == "1":
                measure(device, {"cuBLAS TF32": cublas(device.xp)}, size, np.float32)
                continue
            print(f"{device}\n{'':>16}{'size':>7}{'µs':>12}{'TFLOP/s':>10}{'error':>10}")
            rungs = numba_products(device, 32, 8) | cuda_c_products()
            rungs["cuBLAS float32"] = cublas(device.xp)
            measure(device, rungs, size, np.float32)
            # CuPy reads CUPY_TF32 once, so TF32 gets a process of its own.
            again = [sys.executable, __file__, str(size)]
            subprocess.run(again, env=os.environ | {"CUPY_TF32": "1"}, check=True)
            measure(device, {"cuBLAS float16": cublas(device.xp)}, size, np.float16)


if __name__ == "__main__":
    main()
