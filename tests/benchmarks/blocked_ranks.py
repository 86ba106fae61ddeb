"""How a blocked product scales over ranks of one machine, each with a device of its own.

A float32 product of square matrices from host memory, bound by arithmetic: by rank 0 alone, while
the others wait, and by all ranks. Rounds alternate, medians are shown. Once the result is a new
array on rank 0, once an array that is used again, once a memory map that all ranks write to. Each
result is checked against float64 in some rows before its time counts.

    mpiexec -n 2 python tests/benchmarks/blocked_ranks.py                 32,768³; 4,096³ on CPUs
    mpiexec -n 2 python tests/benchmarks/blocked_ranks.py --size 16384 --folder FOLDER

The operands lie in a file each, made once, in the folder of the result; a folder in memory shows
the product rather than the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpuml
from gpuml.distributed import Alone, ranks

N_ROWS = 40  # that are checked


def numbers(path: Path, size: int, seed: int) -> None:
    """Write a matrix of random numbers, of which blocks of rows differ by a rotation."""
    out = np.lib.format.open_memmap(path, "w+", np.float32, (size, size))
    block = np.random.default_rng(seed).standard_normal((min(1024, size), size), np.float32)
    for i in range(0, size, len(block)):
        out[i : i + len(block)] = np.roll(block, i // len(block) * 7, axis=1)[: size - i]
    out.flush()


class Expected:
    """Some rows of the product in float64."""

    def __init__(self, a: Any, b: Any) -> None:
        self.rows = np.unique(np.linspace(0, len(a) - 1, N_ROWS).astype(int))
        self.values = np.zeros((len(self.rows), b.shape[1]))
        picked = a[self.rows].astype(np.float64)
        for i in range(0, len(b), 1024):
            self.values += picked[:, i : i + 1024] @ b[i : i + 1024].astype(np.float64)

    def check(self, c: Any) -> None:
        """Stop all ranks if a result is wrong."""
        error = np.linalg.norm(c[self.rows] - self.values) / np.linalg.norm(self.values)
        if not error < 1e-5:
            raise ValueError(f"wrong: relative error {error:.1e}")


def seconds(function: Callable[[], Any], check: Callable[[Any], None] | None) -> float:
    """Return what a call takes all ranks, from the first that begins to the last that ends."""
    ranks().gather(None)
    begin = time.perf_counter()
    c = function()
    ranks().gather(None)
    taken = time.perf_counter() - begin
    if check is not None:
        check(c)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="blocked products by ranks")
    on_gpu = gpuml.get_device().kind == "gpu"
    parser.add_argument("--size", type=int, default=32768 if on_gpu else 4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-limit")
    parser.add_argument("--folder", help="which all ranks see; a temporary one unless given")
    parser.add_argument("--report", action="store_true", help="print what each rank did")
    options = parser.parse_args()
    together, first = ranks(), ranks().rank == 0
    folder = None
    if first:
        folder = tempfile.TemporaryDirectory(prefix="gpuml-", dir=options.folder)
    place = Path(together.gather(folder.name if folder else "")[0])
    if first:
        for seed, name in enumerate(("a.npy", "b.npy")):
            numbers(place / name, options.size, seed)
        np.lib.format.open_memmap(place / "c.npy", "w+", np.float32, (options.size,) * 2)
    together.gather(None)
    # In memory of its own: what each rank's user has.
    a, b = (np.load(place / name) for name in ("a.npy", "b.npy"))
    mapped = np.load(place / "c.npy", mmap_mode="r+")
    kept = np.zeros(mapped.shape, np.float32) if first else None
    check = Expected(a, b).check if first else None
    device = gpuml.get_device()
    devices = together.gather(str(device))
    if first:
        print(f"{together.world_size} ranks: {', '.join(devices)}; {options.size:,}³ float32")

    for name, out in (("a new array", None), ("an array", kept), ("a memory map", mapped)):
        call: dict[str, Any] = {"memory_limit": options.memory_limit, "device": device}
        call |= {"out": out, "progress": False}

        def alone(call: dict[str, Any] = call) -> Any:
            return gpuml.blocked_matmul(a, b, communicator=Alone(), **call) if first else None

        def shared(call: dict[str, Any] = call) -> Any:
            return gpuml.blocked_matmul(a, b, communicator=together, **call)

        times: dict[str, list[float]] = {"one": [], "all": []}
        for number in range(options.rounds + 1):
            for who, function in (("one", alone), ("all", shared)):
                if first and out is not None:
                    out[::97] = 0
                taken = seconds(function, check)
                if number:  # the first loads libraries
                    times[who].append(taken)
        if first:
            one, every = (statistics.median(values) for values in times.values())
            print(
                f"into {name}: one rank {one:.3f} s, {together.world_size} ranks {every:.3f} s: "
                f"{one / every:.2f} times",
                flush=True,
            )
        if options.report:
            _, report = gpuml.blocked_matmul(
                a, b, communicator=together, return_report=True, **call
            )
            lines = together.gather(str(report))
            if first:
                print("\n".join(lines), flush=True)
    together.gather(None)
    if folder:
        folder.cleanup()


if __name__ == "__main__":
    main()
