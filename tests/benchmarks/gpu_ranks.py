"""How training by several GPUs scales: the wide perceptron, beside PyTorch's DDP in the same run.

A perceptron 1024-4096-4096-1000 is trained with momentum in tf32. Weak: a batch of 4,096 rows for
each GPU; strong: 4,096 rows for all together. One GPU alone is a process that knows nothing of
ranks, while the others wait. Losses of both sides must agree. Medians of alternating rounds.

    mpiexec -n 2 python tests/benchmarks/gpu_ranks.py
    mpiexec -n 4 python tests/benchmarks/gpu_ranks.py --precision bfloat16 --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
from mpi4py import MPI

import gpuml
from gpuml import distributed

SIZES, BATCH, N_STEPS, MOMENTUM, RATE = (1024, 4096, 4096, 1000), 4096, 32, 0.9, 0.02
SHORT, LONG, ROUNDS = 4, 20, 3

WORLD = MPI.COMM_WORLD


class Silent:
    """Ranks that add nothing up, to see what sums cost."""

    def __init__(self, communicator):
        self._others = communicator
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self.n_threads, self.gather = communicator.n_threads, communicator.gather
        self.end_all = communicator.end_all

    def peer_copies(self, n_bytes):
        return None

    def all_reduce(self, array, *, mean=False):
        if isinstance(array, np.ndarray):
            self._others.all_reduce(array, mean=mean)


def problem(n_rows):
    generator = np.random.default_rng(1)
    X = generator.standard_normal((n_rows, SIZES[0]), np.float32)
    y = (X[:, :1000] + X[:, -1000:]).argmax(1)
    return X, y


def ours(communicator, X, y, batch_size, precision, engine=None):
    """Return what trains so many epochs and returns the last loss."""
    device = gpuml.get_device("gpu")
    model = gpuml.MLP(SIZES, seed=0, device=device)
    start = model.parameters.flat.copy()
    X, y = device.asarray(X), device.asarray(y)

    def run(n_epochs):
        model.parameters.flat[...] = start
        optimizer = gpuml.GradientDescent(RATE, momentum=MOMENTUM)
        options = {"precision": precision, "engine": engine, "communicator": communicator}
        history = gpuml.train(
            model, X, y, optimizer=optimizer, batch_size=batch_size, n_epochs=n_epochs, **options
        )
        device.synchronize()
        return history["loss"][-1]

    return run


def ddp(group, p, X, y, batch_size, precision):
    """Return the same by PyTorch: DistributedDataParallel, or the bare module for one GPU."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    start = gpuml.MLP(SIZES, seed=0, device="cpu").parameters
    layers = []
    for n_in, n_out in pairwise(SIZES):
        layers += [torch.nn.Linear(n_in, n_out), torch.nn.ReLU()]
    bare = torch.nn.Sequential(*layers[:-1]).to(device)
    starts = [
        torch.from_numpy(np.ascontiguousarray(a.T if len(a) > 1 else a[0])).to(device)
        for a in start.values()
    ]
    X, y = torch.from_numpy(X).to(device), torch.from_numpy(y).to(device)
    model = bare
    if p > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            bare, device_ids=[device.index], process_group=group, gradient_as_bucket_view=True
        )
    share = batch_size // p
    own = slice(WORLD.rank * share, (WORLD.rank + 1) * share)

    def run(n_epochs):
        optimizer = torch.optim.SGD(bare.parameters(), lr=RATE, momentum=MOMENTUM, fused=True)
        with torch.no_grad():
            for parameter, first in zip(bare.parameters(), starts, strict=True):
                parameter.copy_(first)
        generator = np.random.default_rng(0)
        for _ in range(n_epochs):
            order = generator.permutation(len(X)).reshape(-1, batch_size)[:, own]
            rows = torch.from_numpy(np.ascontiguousarray(order)).to(device)
            losses = []
            for each in rows:
                optimizer.zero_grad(set_to_none=True)
                half = precision == "bfloat16"
                with torch.autocast("cuda", torch.bfloat16, half) if half else nullcontext():
                    loss = torch.nn.functional.cross_entropy(model(X[each]), y[each])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        if p > 1:
            torch.distributed.all_reduce(mean, group=group)
        return float(mean) / p

    return run


def seconds_a_step(run, communicator):
    """Return seconds and the last loss."""
    times = []
    for n_epochs in (SHORT, LONG):
        communicator.gather(0)
        begin = time.perf_counter()
        loss = run(n_epochs)
        communicator.gather(0)
        times.append(time.perf_counter() - begin)
    return (times[1] - times[0]) / ((LONG - SHORT) * N_STEPS), loss


def measured(p, batch_size, options, groups):
    """Return, on the ranks that take part, median seconds of each side."""
    taking_part = WORLD.rank < p
    comm = WORLD.Split(int(taking_part))
    if not taking_part:
        return {}
    communicator = distributed.Alone() if p == 1 else distributed.MpiRanks(comm)
    X, y = problem(N_STEPS * batch_size)
    data = X, y, batch_size, options.precision
    sides = {"gpuml": ours(communicator, *data, "graph")}  # as long trainings run by themselves
    if options.more:
        sides["gpuml eager"] = ours(communicator, *data)
        if p > 1:
            rows = len(X) // p
            sides["gpuml by NCCL"] = None
            sides["gpuml without sums"] = ours(Silent(communicator), *data, "graph")
            sides["gpuml each alone"] = ours(
                distributed.Alone(), X[:rows], y[:rows], batch_size // p, options.precision, "graph"
            )
    if groups:
        sides["PyTorch DDP" if p > 1 else "PyTorch"] = ddp(groups[p], p, *data)
    times, losses = {name: [] for name in sides}, {}
    usual = distributed.MOST_RANKS
    for i in range(ROUNDS + 1):
        for name, run in sides.items():
            distributed.MOST_RANKS = 1 if run is None else usual
            seconds, losses[name] = seconds_a_step(run or sides["gpuml"], communicator)
            distributed.MOST_RANKS = usual
            if i:  # after a round to warm up
                times[name].append(seconds)
    for name in ("gpuml without sums", "gpuml each alone"):
        losses.pop(name, None)
    spread = max(losses.values()) - min(losses.values())
    assert spread < (0.05 if options.precision == "bfloat16" else 0.005), losses
    return {name: statistics.median(each) for name, each in times.items()}


def all_reduce_seconds(sizes):
    """Return seconds of sums over all GPUs, by bytes."""
    if WORLD.size == 1:
        return {}
    device = gpuml.get_device("gpu")
    communicator, found = distributed.MpiRanks(WORLD), {}
    with device.use():
        for size in sizes:
            array = device.xp.zeros(size // 4, np.float32)
            times = []
            for _ in range(5):
                device.synchronize()
                communicator.gather(0)
                begin = time.perf_counter()
                for _ in range(20):
                    communicator.all_reduce(array)
                device.synchronize()
                times.append((time.perf_counter() - begin) / 20)
            found[size] = min(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="tf32")
    parser.add_argument("--json")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--more", action="store_true", help="also graphs, NCCL, and none")
    options = parser.parse_args()
    device = gpuml.get_device("gpu")
    device.xp.cuda.Device(device.index).use()
    groups = {}
    counts = [p for p in (1, 2, 4, 8) if p <= WORLD.size]
    if not options.no_torch:
        import torch

        torch.cuda.set_device(device.index)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        torch.distributed.init_process_group("nccl", rank=WORLD.rank, world_size=WORLD.size)
        groups = {p: torch.distributed.new_group(list(range(p))) for p in counts}
    records = []
    for p in counts:
        for kind in ("weak", "strong") if p > 1 else ("weak",):
            batch_size = BATCH * p if kind == "weak" else BATCH
            found = measured(p, batch_size, options, groups)
            WORLD.barrier()
            records += [
                {"ranks": p, "kind": kind, "batch_size": batch_size, "side": side, "seconds": t}
                for side, t in found.items()
            ]
    sums = all_reduce_seconds([2**i for i in range(12, 29, 2)])
    if groups:
        torch.distributed.destroy_process_group()
    if WORLD.rank:
        return
    print(f"{device}, {WORLD.size} of them, {options.precision}")
    one = {r["side"]: r["seconds"] for r in records if r["ranks"] == 1}
    for r in records:
        side = r["side"] if r["side"] in one else r["side"].split()[0]
        base = one[side]
        ratio = base / r["seconds"]
        said = f"efficiency {ratio:.1%}" if r["kind"] == "weak" else f"{ratio:.2f} times one"
        milliseconds = f"{r['seconds'] * 1e3:7.3f} ms"
        print(f"{r['ranks']} ranks {r['kind']:6} {r['side']:20} {milliseconds}  {said}")
    for size, seconds in sums.items():
        print(
            f"all-reduce {size:>11,} bytes {seconds * 1e6:8.1f} µs {size / seconds / 1e9:7.1f} GB/s"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": str(device), "steps": records, "sums": sums}, file, indent=1)


if __name__ == "__main__":
    main()
