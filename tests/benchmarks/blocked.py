"""Products larger than the device: speed, memory and prediction, beside what people would write.

Each result is checked against float64 in some rows and columns before its time counts.

    python tests/benchmarks/blocked.py            on a GPU host with 64 GiB of memory
    python tests/benchmarks/blocked.py --small    the same, each matrix a quarter as long
    python tests/benchmarks/blocked.py --cpu      memory-mapped files of 4 GiB on the CPU
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpuml
from gpuml.devices import Device, get_device

GIB = 2**30
ROUNDS = 5


def random(shape: tuple[int, int], seed: int, out: Any = None) -> Any:
    """Return random float32, the same each time, made block by block."""
    out = np.empty(shape, np.float32) if out is None else out
    generator = np.random.default_rng(seed)
    block = generator.standard_normal((min(1024, shape[0]), shape[1]), np.float32)
    for i in range(0, shape[0], len(block)):
        # other rows each time, for little money: rotated and scaled
        rolled = np.roll(block, i // len(block) * 7, axis=1)[: shape[0] - i]
        out[i : i + len(block)] = rolled * (1 + i / shape[0])
    return out


def check(c: Any, a: Any, b: Any, limit: float = 1e-5) -> None:
    """Stop if some rows and columns differ from a product in float64."""
    generator = np.random.default_rng(1)
    rows = np.sort(generator.choice(len(a), min(len(a), 40), replace=False))
    columns = np.sort(generator.choice(b.shape[1], min(b.shape[1], 40), replace=False))
    x, y = a[rows].astype(np.float64), b[:, columns].astype(np.float64)
    error = np.linalg.norm(c[np.ix_(rows, columns)] - x @ y) / np.linalg.norm(x @ y)
    if not error < limit:
        raise SystemExit(f"wrong: relative error {error:.1e}")


def seconds(function: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Return the median time of a call by the clock; the first call is not counted."""
    function()
    samples = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def bus_bound(device: Device, rows: int) -> None:
    """Tall times narrow: nothing but moving A."""
    import cupyx

    cp = device.xp
    a, b = random((rows, 8192), 0), random((8192, 64), 1)
    rates = gpuml.measure_rates(device)
    out = np.zeros((rows, 64), np.float32)

    def ours(a: Any = a) -> Any:
        return gpuml.blocked_matmul(a, b, memory_limit="4 GiB", out=out, progress=False)

    def naive() -> Any:
        cp.get_default_memory_pool().free_all_blocks()
        return (cp.asarray(a) @ cp.asarray(b)).get()

    check(ours(), a, b)
    taken = seconds(ours)
    check(naive(), a, b)
    peer = seconds(naive, 3)
    ceiling = min(rates.fill, rates.bus_in)
    rate = a.nbytes / taken
    print(f"bus-bound, pageable: {taken:.3f} s, {rate / 1e9:.1f} GB/s")
    print(
        f"  bus {rates.bus_in / 1e9:.1f}, host threads into pinned memory {rates.fill / 1e9:.1f} "
        f"GB/s: share of the lower {rate / ceiling:.1%}; cp.asarray {peer:.3f} s: "
        f"{peer / taken:.1f} times"
    )
    _, report = gpuml.blocked_matmul(a, b, memory_limit="4 GiB", out=out, return_report=True)
    print(report)
    pinned = cupyx.empty_pinned(a.shape, np.float32)
    pinned[...] = a
    check(ours(pinned), a, b)
    rate = a.nbytes / seconds(lambda: ours(pinned))
    print(f"bus-bound, pinned: {rate / 1e9:.1f} GB/s, {rate / rates.bus_in:.1%} of the pinned rate")


def arithmetic_bound(device: Device, n: int) -> None:
    """Square: float32 is bound by arithmetic; tf32 by the bus or host memory."""
    cp = device.xp
    a, b, out = random((n, n), 0), random((n, n), 1), np.zeros((n, n), np.float32)
    for precision, limit in ((None, 1e-5), ("tf32", 2e-3)):
        with device.use():
            x, y, z = cp.asarray(a), cp.asarray(b), cp.empty((n, n), cp.float32)
            core = gpuml.benchmark(
                lambda x=x, y=y, z=z, p=precision: gpuml.batched_matmul(x, y, out=z, precision=p),
                device=device,
                time_budget=4,
            ).seconds
            del x, y, z
            cp.get_default_memory_pool().free_all_blocks()
        rates = gpuml.measure_rates(device, "float32", precision)

        def ours(p: Any = precision, report: bool = True) -> Any:
            return gpuml.blocked_matmul(
                a, b, memory_limit="4 GiB", out=out, precision=p, return_report=report
            )

        c, report = ours()
        check(c, a, b, limit)
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with gpuml.watch_memory(device) as used:
            samples = []
            for _ in range(3):
                begin = time.perf_counter()
                ours(report=False)
                samples.append(time.perf_counter() - begin)
        taken = statistics.median(samples)
        host = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - host) * 1024
        bus = report.plan.bytes_in / min(rates.fill, rates.bus_in)
        print(f"{n}³ {precision or 'float32'}: {taken:.3f} s, in core {core:.3f} s")
        print(f"  of the in-core rate {core / taken:.1%}; copies alone {bus:.3f} s")
        print(f"  of what binds {max(core, bus) / taken:.1%}")
        print(f"  device memory {used.most / GIB:.2f} GiB, more host memory {host / GIB:.2f} GiB")
        print(report)


def predictions(device: Device, large: int) -> None:
    """Measured against predicted time, four sizes in each regime."""
    for name, shapes in (
        ("bus", [(large // i, 8192, 64) for i in (8, 4, 2, 1)]),
        ("arithmetic", [(n, n, n) for n in (4096, 8192, 12288, 16384)]),
    ):
        for m, k, n in shapes:
            a, b, out = random((m, k), 0), random((k, n), 1), np.zeros((m, n), np.float32)
            for _ in range(2):
                _, report = gpuml.blocked_matmul(
                    a, b, out=out, memory_limit="1 GiB", return_report=True, progress=False
                )
            expected = report.predicted
            print(
                f"{name}: {m} x {k} x {n}: {report.seconds:.4f} s, predicted {expected:.4f}, "
                f"ratio {report.seconds / expected:.2f}, bound by {report.bound}"
            )


TAKER = """
import cupy, sys, time
free, total = cupy.cuda.runtime.memGetInfo()
kept = cupy.cuda.Memory(free - int(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


def scarce(device: Device) -> None:
    """Another process has taken nearly all of the device's memory."""
    n = 16384
    a, b = random((n, n), 0), random((n, n), 1)
    gpuml.blocked_matmul(a[:64], b)  # libraries are loaded before memory is scarce
    device.xp.get_default_memory_pool().free_all_blocks()
    other = subprocess.Popen(
        [sys.executable, "-c", TAKER, str(600 * 2**20)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    c, report = gpuml.blocked_matmul(a, b, memory_limit="4 GiB", return_report=True)
    check(c, a, b)
    print(f"memory taken by another process: right, {report.seconds:.3f} s; {report.notes}")
    other.kill()


MAPPED = """
import sys, time
import numpy as np
import gpuml
a, b = (np.load(path, mmap_mode="r") for path in sys.argv[1:3])
begin = time.perf_counter()
c, report = gpuml.blocked_matmul(a, b, memory_limit="512 MiB", device="cpu", return_report=True)
[peak] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(report.seconds, int(peak.split()[1]) * 1024)
np.save(sys.argv[3], c)
"""


def on_the_cpu() -> None:
    """Memory-mapped operands of 4 GiB within 512 MiB, beside NumPy in memory."""
    m, k, n = 65536, 16384, 1024
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("a.npy", "b.npy", "c.npy")]
        for path, shape, seed in zip(paths, ((m, k), (k, n)), (0, 1), strict=False):
            mapped = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            random(shape, seed, mapped)
            mapped.flush()
        a, b = (np.load(path) for path in paths[:2])
        c = np.zeros((m, n), np.float32)
        ours, theirs, peak = [], [], 0.0
        for _ in range(3):  # in turn, so that a slow moment meets both
            done = subprocess.run(
                [sys.executable, "-c", MAPPED, *paths], capture_output=True, text=True, check=True
            )
            seconds_taken, most = map(float, done.stdout.split())
            ours.append(seconds_taken)
            peak = max(peak, most)
            begin = time.perf_counter()
            np.matmul(a, b, out=c)
            theirs.append(time.perf_counter() - begin)
        check(np.load(paths[2], mmap_mode="r"), a, b)
    peer = statistics.median(theirs)
    taken = statistics.median(ours)
    print(f"mapped {taken:.2f} s, peak of the process {peak / 2**20:.0f} MiB with result")
    print(f"  within 512 MiB: {peak <= 512 * 2**20}")
    print(f"NumPy in memory {peer:.2f} s: {peer / taken:.1%} of its rate")
    print(f"  at least 85 %: {peer / taken >= 0.85}")


def main() -> None:
    if "--cpu" in sys.argv:
        on_the_cpu()
        return
    device = get_device("gpu")
    print(device)
    quarter = 4 if "--small" in sys.argv else 1
    bus_bound(device, 262_144 // quarter)
    arithmetic_bound(device, 32_768 // quarter)
    predictions(device, 262_144 // quarter)
    scarce(device)


if __name__ == "__main__":
    main()
