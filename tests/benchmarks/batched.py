"""Many small products: batched_matmul beside CuPy, PyTorch and a copy, in one run on a GPU.

Each result is checked against float64 before its time counts. A time is the median over rounds;
in each round all take their turn, timed by events on the device. Every byte is counted once:
operands read, result written. A copy of the same arrays is timed in the same rounds.

    python tests/benchmarks/batched.py
    python tests/benchmarks/batched.py --check      only the checks, small; also without a GPU
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import gpuml
from gpuml.devices import Device

BYTES = 1.5e9  # of both operands and the result: far more than any cache holds
CALLS, ROUNDS = 10, 15  # several calls between two events, so that launching does not count
LIMITS = {"float64": 1e-14, "float32": 1e-6, "tf32": 2e-3}  # of the relative error
HEAD = ["", "k", "n", "gpuml", "CuPy", "torch", "of torch", "of copy"]
WIDTHS = [15, 5, 11, 17, 17, 17, 10, 9]


@dataclass(frozen=True)
class Case:
    """The product of n matrices of k × k."""

    k: int
    dtype: str = "float32"
    transposed: bool = False  # b is a transposed view
    shared: bool = False  # one b for all
    precision: str | None = None

    @property
    def name(self) -> str:
        kind = "b transposed" if self.transposed else "b shared" if self.shared else ""
        return self.precision or kind or self.dtype

    def operands(self, device: Device, n: int) -> tuple[Any, Any, Any]:
        """Return a, b and a result full of NaN."""
        random, shape = device.xp.random.default_rng(self.k), (n, self.k, self.k)
        a, b = (random.standard_normal(shape, dtype=np.dtype(self.dtype)) for _ in range(2))
        b = b[0] if self.shared else b.swapaxes(-1, -2) if self.transposed else b
        return a, b, device.xp.full_like(a, np.nan)


SIZES = [4, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 256]
CASES = [Case(k) for k in SIZES]
CASES += [Case(k, transposed=True) for k in (8, 16, 64)]
CASES += [Case(k, shared=True) for k in (4, 8, 12, 16, 17, 24, 32, 64)]
CASES += [Case(8, "float64"), Case(16, "float64"), Case(128, precision="tf32")]

Product = Callable[[Any, Any, Any], Any]  # a, b -> out


def products(device: Device, case: Case) -> dict[str, Product]:
    """Return the rivals, each a function of a, b and out; PyTorch only where it is installed."""
    found: dict[str, Product] = {
        "gpuml": lambda a, b, out: gpuml.batched_matmul(a, b, out=out, precision=case.precision)
    }
    if case.precision is None:  # CuPy multiplies stacks of float32 in float32 only
        found["CuPy"] = lambda a, b, out: device.xp.matmul(a, b, out=out)
    if device.kind == "gpu" and importlib.util.find_spec("torch"):
        found["torch"] = torch_product(case)
    return found


def torch_product(case: Case) -> Product:
    """Multiply by PyTorch in CuPy's memory; both queue their work in the default stream."""
    import torch

    tensors: dict[int, Any] = {}  # made once: it takes longer than a launch
    function = torch.matmul if case.shared else torch.bmm

    def multiply(a: Any, b: Any, out: Any) -> None:
        torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
        for x in (a, b, out):
            if id(x) not in tensors:
                tensors[id(x)] = torch.from_dlpack(x)
        function(tensors[id(a)], tensors[id(b)], out=tensors[id(out)])

    return multiply


def relative_error(case: Case, a: Any, b: Any, out: Any) -> float:
    """Compare some of the matrices with float64; NaN if any at all was not written."""
    if bool(gpuml.array_module(out).isnan(out).any()):
        return float("nan")
    some = np.unique(np.linspace(0, len(a) - 1, 100).astype(int)).tolist()
    x, c = (gpuml.to_host(whole[some]).astype(float) for whole in (a, out))
    y = gpuml.to_host(b if case.shared else b[some]).astype(float)
    return float(np.linalg.norm(c - x @ y) / np.linalg.norm(np.abs(x) @ np.abs(y)))


def checked(device: Device, case: Case, n: int) -> tuple[dict[str, Product], tuple[Any, Any, Any]]:
    """Return the rivals and their arrays, after a check of each."""
    a, b, out = case.operands(device, n)
    rivals, limit = products(device, case), LIMITS[case.precision or case.dtype]
    for name, product in rivals.items():
        out[...] = np.nan
        product(a, b, out)
        error = relative_error(case, a, b, out)
        if not error < limit:
            where = f"at k = {case.k}, {case.name}"
            raise SystemExit(f"{name} is wrong {where}: error {error:.1e}, allowed {limit:.0e}")
    return rivals, (a, b, out)


def medians(cupy: Any, rivals: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return seconds a call: the medians over rounds in which the rivals take turns.

    What a call costs the host does not count, as long as the device is busy meanwhile.
    """
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    for i in range(ROUNDS + 2):
        names = list(rivals)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            rivals["copy"]()  # the device is busy until the first call is queued
            begin.record()
            for _ in range(CALLS):
                rivals[name]()
            end.record()
            end.synchronize()
            samples[name].append(cupy.cuda.get_elapsed_time(begin, end) / 1000 / CALLS)
    return {name: statistics.median(times[2:]) for name, times in samples.items()}


def measure(device: Device, case: Case) -> dict[str, float]:
    """Check and time one case, and print its line."""
    cupy, k = device.xp, case.k
    n = int(BYTES / (3 * k * k * np.dtype(case.dtype).itemsize))
    rivals, (a, b, out) = checked(device, case, n)
    calls = {name: (lambda f=f: f(a, b, out)) for name, f in rivals.items()}
    seconds = medians(cupy, calls | {"copy": lambda: cupy.copyto(out, a)})
    n_bytes, operations = a.nbytes + b.nbytes + out.nbytes, 2.0 * n * k**3
    seconds["of copy"] = n_bytes / seconds["gpuml"] / (2 * a.nbytes / seconds["copy"])
    cells = [case.name, f"{k}", f"{n:,}"]
    for name in ("gpuml", "CuPy", "torch"):
        t = seconds.get(name)
        cells.append("–" if t is None else f"{n_bytes / t / 1e12:.2f}, {operations / t / 1e12:.1f}")
    ratio = seconds["torch"] / seconds["gpuml"] if "torch" in seconds else None
    cells += ["–" if ratio is None else f"{ratio:.2f}", f"{seconds['of copy']:.0%}"]
    print("".join(c.rjust(w) for c, w in zip(cells, WIDTHS, strict=True)), flush=True)
    return seconds


def main() -> None:
    if "--check" in sys.argv:
        device = gpuml.get_device()
        for case in CASES:
            checked(device, case, n=300 if case.k <= 32 else 20)
            print(f"{case.name:>15} {case.k:4}: right")
        return
    device = gpuml.get_device("gpu")
    print(f"{device}\nTB/s, TFLOP/s; times faster than torch; share of the bandwidth of a copy")
    print("".join(c.rjust(w) for c, w in zip(HEAD, WIDTHS, strict=True)))
    with device.use():
        found = {}
        for case in CASES:
            found[case] = measure(device, case)
            device.xp.get_default_memory_pool().free_all_blocks()
    shares = {k: found[Case(k)]["of copy"] for k in (8, 16)}
    print(f"60 % of a copy at k = 8 and 16: {min(shares.values()) >= 0.6}")
    if all("torch" in seconds for seconds in found.values()):
        ratios = {case: seconds["torch"] / seconds["gpuml"] for case, seconds in found.items()}
        least = min(CASES[: len(SIZES)], key=ratios.__getitem__)
        print(f"twice torch.bmm at k = 8 and 16: {min(ratios[Case(k)] for k in (8, 16)) >= 2}")
        print(f"never below 0.97 of torch.bmm: {ratios[least] >= 0.97}, ", end="")
        print(f"lowest {ratios[least]:.2f} at k = {least.k}")


if __name__ == "__main__":
    main()
