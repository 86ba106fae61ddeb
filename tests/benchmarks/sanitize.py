"""Launch every kernel once on shapes that fit no block or tile: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck --report-api-errors no python tests/benchmarks/sanitize.py
    compute-sanitizer --tool synccheck python tests/benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python tests/benchmarks/sanitize.py layers populations

Racecheck is slow: names of functions below have only these run. With ``--kernel-name`` for another
kernel than mlp_cluster it fails at that one, which it then has not prepared.

Without ``--report-api-errors no`` memcheck also lists how CuPy and Numba ask the driver for
functions that it does not have (cuGetProcAddress), which is no mistake.

The deliberate mistakes of notebook 02 (count_badly, add_unguarded) are left out.
Arrays are not taken from CuPy's memory pool, so that memcheck sees where each of them ends.

The tools know an mbarrier by a note of the compiler in the binary: an instruction, and the register
that holds the address (``cuobjdump -elf``: EIATTR_MBARRIER_INSTR_OFFSETS). Where ptxas (of CUDA 13)
makes predicates of the branch around ``mbarrier.init``, the note is for a NOP that all threads
execute, and the tools take what that register happens to hold in the others for addresses of
barriers. In mlp_cluster.cu racecheck so saw writes to weights and rows that nobody makes, and
synccheck's table of barriers overflowed and the launch failed: it seems to have ended warps that
waited for a barrier which had no room there (``--missing-barrier-init-is-fatal``). The
``__syncwarp`` behind the initialisation keeps the branch. Each MBARRIER_INIT should be at a
SYNCS.EXCH, none at a NOP.

On an H100 memcheck, initcheck and synccheck find nothing. Racecheck finds no error in mlp_cluster,
and warns of eight pairs where one block trains alone: rows copied before the first step
(``cp.async``), and read for the weights' gradient. In between each thread waits for its copies
(``wait_for_all_but<0>``), and then all threads meet.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import numpy as np
from kernels import check, notebook_kernels

import gpuml
from gpuml import kernels, one_pass
from gpuml.devices import Device
from gpuml.fused_populations import FusedPopulation, plan_population
from gpuml.gpu_layers import epochs_end
from gpuml.losses import mean_squared_error, softmax_cross_entropy
from gpuml.models import Parameters


def small_products(device: Device) -> None:
    """Many small products by our own kernel, of sizes that fill no tile."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for m, k, n in ((8, 8, 8), (7, 5, 3), (1, 32, 1), (32, 32, 32), (17, 9, 31)):
            a = device.asarray(rng.normal(size=(301, m, k)).astype(dtype))
            b = device.asarray(rng.normal(size=(301, n, k)).astype(dtype))
            c = gpuml.batched_matmul(a, b.swapaxes(1, 2))
            wanted = gpuml.to_host(a) @ gpuml.to_host(b).swapaxes(1, 2)
            np.testing.assert_allclose(gpuml.to_host(c), wanted, atol=1e-3)


def linear_gradients(device: Device) -> None:
    """The gradient in one pass, for rows shared by parts of a warp, a warp, and a block."""
    rng = np.random.default_rng(0)
    for n, features, outputs in (
        (100, 3, 1),
        (77, 32, 2),
        (300, 100, 1),
        (50, 1024, 1),
        (9, 5000, 1),
    ):
        model = gpuml.Linear(features, outputs, device=device)
        X = device.asarray(rng.normal(size=(n, features)).astype(np.float32))
        Y = device.asarray(rng.normal(size=(n, outputs)).astype(np.float32))
        gradients = model.parameters.zeros_like()
        value = one_pass.gradient(X, Y, model.parameters, gradients)
        np.testing.assert_allclose(float(value), float((Y * Y).mean()), rtol=1e-5)


def blocked_products(device: Device) -> None:
    """Products in many tiles and panels: copies and products at the same time."""
    rng = np.random.default_rng(0)
    for dtype in (np.float64, np.float32, np.float16, np.int32):
        shapes = (300, 200), (200, 250)
        a, b = (rng.integers(-3, 4, shape).astype(dtype) for shape in shapes)  # exact sums
        for x, y in ((a, b), (np.asfortranarray(a), b[:, ::-1])):
            c = gpuml.blocked_matmul(x, y, memory_limit="200 KiB", device=device)
            np.testing.assert_array_equal(c, x.astype(float) @ y.astype(float))


def perceptrons(device: Device) -> None:
    """Whole epochs in one launch: by a cluster, by one block, and by the whole GPU."""
    rng = np.random.default_rng(0)
    for sizes, batch_size in (
        ([13, 50, 3], 20),
        ([64, 128, 10], 64),
        ([5, 3, 2], 7),
        ([30, 33, 17, 7], 33),
    ):
        X = rng.normal(size=(2 * batch_size + 3, sizes[0])).astype(np.float32)
        y = rng.integers(sizes[-1], size=len(X))
        targets = rng.normal(size=(len(X), sizes[-1])).astype(np.float32)
        for optimizer in (gpuml.GradientDescent(0.05, momentum=0.9), gpuml.Adam()):
            for answers in (y, targets):
                models = [gpuml.MLP(sizes, device=where) for where in (device, "cpu")]
                for model in models:
                    engine = "fused" if model.device == device else "eager"
                    options = {"batch_size": batch_size, "n_epochs": 2, "engine": engine}
                    gpuml.train(model, X, answers, optimizer=optimizer, **options)
                a, b = (gpuml.to_host(model.parameters.flat) for model in models)
                assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def populations(device: Device) -> None:
    """Many perceptrons in one launch: several in a block, the last block not full."""
    rng = np.random.default_rng(0)
    for sizes, batch_size, models in (
        ([64, 32, 10], 64, 2),
        ([13, 50, 3], 20, 2),
        ([5, 3, 2], 7, 3),
    ):
        X = rng.normal(size=(2 * batch_size + 3, sizes[0])).astype(np.float32)
        y = rng.integers(sizes[-1], size=len(X))
        targets = rng.normal(size=(len(X), sizes[-1])).astype(np.float32)
        for optimizer, loss, own in itertools.product(
            (gpuml.GradientDescent(0.05, momentum=0.9), gpuml.Adam()),
            (softmax_cross_entropy, mean_squared_error),
            (False, True),
        ):
            answers = y if loss is softmax_cross_entropy else targets
            alone = [gpuml.MLP(sizes, seed=i, device="cpu") for i in range(models + 1)]
            flat = device.asarray(np.stack([model.parameters.flat for model in alone]))
            state = optimizer.init(Parameters(flat, alone[0].parameters.shapes))
            n_states = 2 if "m" in state else 1
            plan = plan_population(
                sizes,
                batch_size,
                loss,
                n_states,
                len(alone),
                own_order=own,
                models=None if own else models,
                device=device.index,
            )
            assert not isinstance(plan, str), plan
            arrays = device.asarray(X), device.asarray(answers)
            population = FusedPopulation(
                sizes, batch_size, loss, flat, state, *arrays, own_order=own, plan=plan
            )
            order = np.tile(np.arange(len(X), dtype=np.int32), (2, 1))
            order = np.tile(order, (len(alone), 1, 1)) if own else order
            rates = device.xp.full((2, len(alone)), optimizer.learning_rate, np.float32)
            losses = device.xp.zeros((2, 3, len(alone)), np.float32)
            kept = device.xp.zeros((2, *flat.shape), np.float32)
            population.launch(device.asarray(order), rates, losses, kept)
            assert bool((kept[1] == flat).all())
            ends = epochs_end(kept, losses, device.xp.full(3, 1 / 3))
            assert bool((ends[0] == 1).all())
            for model, weights in zip(alone, gpuml.to_host(flat), strict=True):
                options = {"batch_size": batch_size, "n_epochs": 2, "shuffle": False}
                gpuml.train(model, X, answers, optimizer=optimizer, **options)
                expected = model.parameters.flat
                assert np.linalg.norm(weights - expected) < 1e-4 * np.linalg.norm(expected)


def layers(device: Device) -> None:
    """What is between products, by the eager engine, in both precisions of storage."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(37, 13)).astype(np.float32), rng.integers(3, size=37)
    for precision in ("float32", "bfloat16"):
        model = gpuml.MLP([13, 52, 7, 3], device=device)
        options = {"batch_size": 16, "n_epochs": 2, "engine": "eager", "precision": precision}
        gpuml.train(model, X, y, **options)


def teaching(device: Device) -> None:
    """The kernels of notebook 02, and all products by kernels of our own."""
    cupy = device.xp
    a = cupy.arange(1001, dtype=np.float32)
    c = cupy.zeros_like(a)
    kernels.load_kernel("vector_add")((4,), (256,), (a, a, c, np.int32(a.size)))
    assert bool((c == 2 * a).all())

    found = notebook_kernels(kernels.numba_cuda(device), TILE=32, EACH=8, THREADS=8)
    c[:] = 0
    found["add"][4, 256](a, a, c)
    assert bool((c == 2 * a).all())
    x, total = cupy.arange(1001, dtype=np.int32), cupy.zeros(1, dtype=np.int32)
    found["block_sum"][126, 8](x, total)
    assert int(total[0]) == 1001 * 1000 // 2
    total[:] = 0
    found["count"][7, 33](total)
    assert int(total[0]) == 7 * 33
    block, thread = cupy.zeros((2, 12), dtype=np.int32)
    found["who_am_i"][3, 4](block, thread)
    found["number_in_block"][(2, 2), (3, 2)](cupy.zeros((4, 6), dtype=np.int32))

    for name, shape, error in check(device):
        assert error < 1e-6, (name, shape, error)


PARTS: list[Callable[[Device], None]] = [
    teaching,
    small_products,
    perceptrons,
    populations,
    layers,
    linear_gradients,
    blocked_products,
]


def main() -> None:
    device = gpuml.get_device("gpu")
    device.xp.cuda.set_allocator(None)
    wanted = sys.argv[1:] or [part.__name__ for part in PARTS]
    for part in PARTS:
        if part.__name__ in wanted:
            with device.use():
                part(device)
            device.synchronize()
            print(f"{part.__name__}: all kernels ran, and are right", flush=True)


if __name__ == "__main__":
    main()
