"""Launch every kernel once on shapes that fit no block or tile: what compute-sanitizer runs.

    compute-sanitizer --tool memcheck --report-api-errors no python tests/benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python tests/benchmarks/sanitize.py

Without that option memcheck also lists how CuPy and Numba ask the driver for functions that it
does not have (cuGetProcAddress), which is no mistake.

The deliberate mistakes of notebook 02 (count_badly, add_unguarded) are left out.
Arrays are not taken from CuPy's memory pool, so that memcheck sees where each of them ends.
"""

from __future__ import annotations

import numpy as np
from kernels import check, notebook_kernels

import gpuml
from gpuml import kernels


def main() -> None:
    device = gpuml.get_device("gpu")
    cupy = device.xp
    cupy.cuda.set_allocator(None)
    with device.use():
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
        device.synchronize()
    print("all kernels ran, and are right")


if __name__ == "__main__":
    main()
