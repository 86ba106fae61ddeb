"""Gradient descent on a linear model, beside PyTorch and JAX, and data that are streamed.

Every run must reach the same loss before its time counts.

    python tests/benchmarks/linear.py            on a GPU host with 64 GiB of memory
    python tests/benchmarks/linear.py --small    the same with a sixteenth of the rows
    python tests/benchmarks/linear.py --cpu      200,000 x 256, and a memory map of 8 GiB
"""

from __future__ import annotations

import os
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

RATE = 1e-3


def report(name: str, seconds: float, loss: float, note: str = "") -> None:
    """Print one line."""
    print(f"{name:>28}{seconds * 1e6:12.1f} µs a step   loss {loss:.6f}   {note}", flush=True)


def ours(X: Any, Y: Any, n_steps: int, engine: str | None = None) -> tuple[float, float, str]:
    """Train by gpuml; return seconds a step (Gram matrix included), the loss, the engine."""
    model = gpuml.Linear(X.shape[1], Y.shape[1], bias=False)
    settings: dict[str, Any] = {
        "optimizer": gpuml.GradientDescent(learning_rate=RATE),
        "batch_size": None,
        "engine": engine,
    }
    gpuml.train(model, X, Y, n_epochs=2, **settings)  # compiles
    model.parameters.flat[...] = 0
    model.device.synchronize()
    begin = time.perf_counter()
    history = gpuml.train(model, X, Y, n_epochs=n_steps, **settings)
    return (time.perf_counter() - begin) / n_steps, history["loss"][-1], history.engine


def by_hand(X: Any, Y: Any, n_steps: int) -> tuple[float, float]:
    """Train by plain array operations."""
    device = gpuml.devices.device_of(X)
    scale = 2 / Y.size
    for steps in (2, n_steps):
        W = device.xp.zeros((X.shape[1], Y.shape[1]), X.dtype)
        device.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            R = X @ W - Y
            W -= RATE * scale * (X.T @ R)
        device.synchronize()
        taken = (time.perf_counter() - begin) / steps
    return taken, float((R * R).mean())


def by_torch(X: Any, Y: Any, n_steps: int) -> tuple[float, float]:
    """Train by PyTorch, eagerly."""
    import torch

    x, y = (torch.from_dlpack(a) for a in (X, Y))
    for steps in (2, n_steps):
        layer = torch.nn.Linear(x.shape[1], y.shape[1], bias=False, device=x.device)
        torch.nn.init.zeros_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)
        _wait(x)
        begin = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.mse_loss(layer(x), y)
            loss.backward()
            optimizer.step()
        _wait(x)
        taken = (time.perf_counter() - begin) / steps
    return taken, float(loss)


def _wait(x: Any) -> None:
    if x.is_cuda:
        import torch

        torch.cuda.synchronize()


def by_jax(X: Any, Y: Any, n_steps: int) -> tuple[float, float]:
    """Train by JAX: all steps in one compiled scan."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_default_matmul_precision", "highest")
    x, y = (jax.dlpack.from_dlpack(a) for a in (X, Y))

    def loss(w: Any, x: Any, y: Any) -> Any:
        return jnp.mean((x @ w - y) ** 2)

    def step(w: Any, _: Any, x: Any, y: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(w, x, y)
        return w - RATE * gradient, value

    @jax.jit
    def run(w: Any, x: Any, y: Any) -> Any:
        return jax.lax.scan(lambda w, i: step(w, i, x, y), w, None, length=n_steps)

    w = jnp.zeros((X.shape[1], Y.shape[1]), jnp.float32)
    run(w, x, y)[1].block_until_ready()
    begin = time.perf_counter()
    losses = run(w, x, y)[1].block_until_ready()
    return (time.perf_counter() - begin) / n_steps, float(losses[-1])


def compare(device: Device, n: int, n_outputs: int, n_steps: int) -> None:
    """One workload by all; the losses must agree."""
    xp, generator = device.xp, np.random.default_rng(0)
    with device.use():
        if device.kind == "gpu":
            draw = xp.random.default_rng(0).standard_normal
            X = draw((n, 1024), dtype=np.float32)
        else:
            X = generator.standard_normal((n, 256), np.float32)
        W = device.asarray(generator.standard_normal((X.shape[1], n_outputs)).astype(np.float32))
        Y = X @ W + 1
        print(f"\n{n} x {X.shape[1]}, {n_outputs} outputs, {n_steps} steps, on {device}")
        found: dict[str, float] = {}
        wanted: float | None = None

        def run(name: str, function: Callable[[], Any]) -> None:
            nonlocal wanted
            try:
                taken, loss, *more = function()
            except ImportError:
                print(f"{name:>28}  not installed")
                return
            if wanted is None:
                wanted = loss
            if not abs(loss - wanted) < 1e-4 * wanted:
                raise SystemExit(f"{name} reaches another loss: {loss}, not {wanted}")
            found[name] = taken
            share = f"{X.nbytes / taken / 1e9:.0f} GB/s of X; {' '.join(more)}"
            report(name, taken, loss, share)

        run("arrays by hand", lambda: by_hand(X, Y, n_steps))
        run("PyTorch", lambda: by_torch(X, Y, n_steps))
        run("JAX", lambda: by_jax(X, Y, n_steps))
        run("gpuml", lambda: ours(X, Y, n_steps))
        run("gpuml, engine gram", lambda: ours(X, Y, n_steps, "gram"))
        peers = [found[name] for name in ("arrays by hand", "PyTorch", "JAX") if name in found]
        for name in ("gpuml", "gpuml, engine gram"):
            print(f"{name}: {found[name] / min(peers):.3f} of the fastest peer's time")


def stream(device: Device, n_bytes: int) -> None:
    """Host data that pass through the device once an epoch."""
    generator = np.random.default_rng(0)
    block = generator.standard_normal((4096, 1024), np.float32)
    n = n_bytes // (4 * 1024)
    X = np.empty((n, 1024), np.float32)
    for i in range(0, n, 4096):
        X[i : i + 4096] = block[: n - i]
    Y = X @ generator.standard_normal((1024, 1)).astype(np.float32)
    rates = gpuml.measure_rates(device)
    model = gpuml.Linear(1024, 1)
    for batch_size, shuffle in ((None, False), (8192, False), (8192, True)):
        settings: dict[str, Any] = {
            "optimizer": gpuml.GradientDescent(learning_rate=RATE),
            "batch_size": batch_size,
            "shuffle": shuffle,
            "memory_limit": "1 GiB",
        }
        device.xp.get_default_memory_pool().free_all_blocks()
        with gpuml.watch_memory(device) as used:  # not while it is timed: each look costs
            gpuml.train(model, X, Y, n_epochs=1, **settings)
        history = gpuml.train(model, X, Y, n_epochs=3, **settings)
        rate = 3 * X.nbytes / history.seconds
        ceiling = min(rates.fill, rates.bus_in)
        print(
            f"batch {batch_size}, shuffle {shuffle}: {rate / 1e9:.1f} GB/s, {rate / ceiling:.1%} "
            f"of the lower of bus {rates.bus_in / 1e9:.1f} and host {rates.fill / 1e9:.1f}; "
            f"device memory {used.most / 2**30:.2f} GiB; {history.engine}"
        )
    xp, taken = device.xp, []
    for _ in range(2):
        begin = time.perf_counter()
        W = xp.zeros((1024, 1), np.float32)
        for i in range(0, n, 8192):
            x, y = xp.asarray(X[i : i + 8192]), xp.asarray(Y[i : i + 8192])
            W -= RATE * 2 / len(x) * (x.T @ (x @ W - y))
        device.synchronize()
        taken.append(time.perf_counter() - begin)
    print(f"a loop over cp.asarray(batch): {X.nbytes / min(taken) / 1e9:.1f} GB/s")


MAPPED = """
import sys, time
import numpy as np
import gpuml
X, Y = (np.load(path, mmap_mode="r") for path in sys.argv[1:3])
model = gpuml.Linear(X.shape[1], 1, device="cpu")
def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])

before = peak()
begin = time.perf_counter()
gpuml.train(model, X, Y, n_epochs=1, batch_size=8192, optimizer="gradient_descent",
            shuffle=sys.argv[3] == "shuffle")
taken = time.perf_counter() - begin
print(taken, (peak() - before) / 1024)
"""


def mapped(n_bytes: int) -> None:
    """An epoch over a memory map, beside reading the file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("X.npy", "Y.npy")]
        n = n_bytes // 4096
        X = np.lib.format.open_memmap(paths[0], "w+", np.float32, (n, 1024))
        block = np.random.default_rng(0).standard_normal((4096, 1024), np.float32)
        for i in range(0, n, 4096):
            X[i : i + 4096] = block[: n - i]
        X.flush()
        np.save(paths[1], np.zeros((n, 1), np.float32))
        buffer = bytearray(2**24)
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            with open(paths[0], "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
            times.append(time.perf_counter() - begin)
        read = os.path.getsize(paths[0]) / min(times)
        for order in ("in order", "shuffle"):
            command = [sys.executable, "-c", MAPPED, *paths, order]
            done = [
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                for _ in range(3)
            ]
            taken = statistics.median(float(seconds) for seconds, _ in done)
            more = max(float(mib) for _, mib in done)
            rate = X.nbytes / taken
            print(
                f"memory map, {order}: {rate / 1e9:.2f} GB/s, {rate / read:.0%} of the rate at "
                f"which the file is read ({read / 1e9:.2f} GB/s); {more:.0f} MiB more memory"
            )


def main() -> None:
    if "--cpu" in sys.argv:
        for n_outputs in (1, 4):
            compare(get_device("cpu"), 200_000, n_outputs, 30)
        mapped(8 * 2**30)
        return
    device = get_device("gpu")
    part = 16 if "--small" in sys.argv else 1
    compare(device, 2**20 // part, 1, 300)
    compare(device, 2**20 // part, 64, 1000 // part)
    device.xp.get_default_memory_pool().free_all_blocks()
    stream(device, 16 * 2**30 // part)


if __name__ == "__main__":
    main()
