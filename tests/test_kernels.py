"""CUDA C sources compile for each GPU generation, and kernels multiply right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gpuml
from gpuml import kernels

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ["sm_75", "sm_80", "sm_90"]


# --- CUDA C, compiled without a GPU ------------------------------------------------------------


def compile_cuda_c(text: str, architecture: str) -> tuple[int, str]:
    """Compile with NVRTC; return the size of the machine code in bytes and the log."""
    if sys.platform == "darwin":
        pytest.skip("NVIDIA makes no NVRTC for macOS")
    pytest.importorskip("nvidia.cu13", reason="uv run --group nvrtc brings NVRTC")
    from cuda.bindings import nvrtc

    def call(function, *arguments):
        error, *values = function(*arguments)
        return error, (values[0] if values else None)

    _, program = call(nvrtc.nvrtcCreateProgram, text.encode(), b"kernel.cu", 0, [], [])
    options = [f"--gpu-architecture={architecture}".encode(), b"-std=c++17", b"-default-device"]
    error, _ = call(nvrtc.nvrtcCompileProgram, program, len(options), options)
    _, length = call(nvrtc.nvrtcGetProgramLogSize, program)
    log = b" " * (length + 1)  # written to: never Python's one and only object for one space
    call(nvrtc.nvrtcGetProgramLog, program, log)
    size = call(nvrtc.nvrtcGetCUBINSize, program)[1] if int(error) == 0 else 0
    call(nvrtc.nvrtcDestroyProgram, program)
    return size, log.decode().strip("\0 \n")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", kernels.names())
def test_every_source_compiles_without_a_warning(name, architecture):
    needed = re.search(r"// Needs compute capability (\d)\.(\d)", kernels.source(name))
    if needed and int(architecture[3:]) < int(needed[1] + needed[2]):
        pytest.skip(f"needs sm_{needed[1]}{needed[2]}")
    size, log = compile_cuda_c(kernels.source(name), architecture)
    assert size > 0, log
    assert log == ""


def test_a_broken_source_is_refused():
    whole = kernels.source("vector_add")
    broken = whole.replace("c[i] = a[i] + b[i];", "c[i] = a[i] + b[i]")
    assert broken != whole
    size, log = compile_cuda_c(broken, "sm_90")
    assert size == 0
    assert 'expected a ";"' in log


# --- the sources and their loader --------------------------------------------------------------


def test_every_source_says_what_it_does_and_how_it_is_launched():
    assert set(kernels.names()) >= {"vector_add", "matmul_naive", "matmul_tiled"}
    for name in kernels.names():
        head = kernels.source(name).partition('extern "C"')[0]
        assert head.startswith("// "), name
        assert "// Launch:" in head, name
        assert f"void {name}(" in kernels.source(name)


def test_an_unknown_source_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'matmul_tiled'"):
        kernels.source("matmul_tile")
    with pytest.raises(ValueError, match="did you mean 'vector_add'"):
        kernels.load_kernel("vectoradd")


def test_without_a_gpu_the_loader_says_so(monkeypatch):
    monkeypatch.setattr("gpuml.devices._gpu_problem", lambda index: "there is none")
    with pytest.raises(gpuml.DeviceError, match=r"for a GPU only.*there is none.*gpuml doctor"):
        kernels.load_kernel("vector_add")


# --- CUDA C on a GPU ---------------------------------------------------------------------------


def on_gpu(device):
    if device.kind == "cpu":
        pytest.skip("CUDA C runs on a GPU only")
    return device


def launch(device, name, covers, A, B):
    """Multiply into an array with a border, which must stay as it was."""
    (m, k), n = A.shape, B.shape[1]
    whole = device.asarray(np.full(m * n + 64, 7, dtype=np.float32))
    C = whole[32:-32].reshape(m, n)
    C[:] = np.nan
    sizes = [np.int32(size) for size in (m, n, k)]
    blocks = -(-n // covers), -(-m // covers)
    arrays = device.asarray(A), device.asarray(B), C
    kernels.load_kernel(name)(blocks, (16, 16), (*arrays, *sizes))
    host = gpuml.to_host(whole)
    assert (host[:32] == 7).all()
    assert (host[-32:] == 7).all()
    return host[32:-32].reshape(m, n)


SIZE = st.integers(1, 300)


@pytest.mark.parametrize(("name", "covers"), [("matmul_naive", 16), ("matmul_tiled", 128)])
@given(m=SIZE, n=SIZE, k=SIZE, seed=st.integers(0, 2**16))
@example(m=1, n=1, k=1, seed=0)
@example(m=128, n=128, k=16, seed=0)
@example(m=129, n=127, k=17, seed=0)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_products_agree_with_float64(device, name, covers, m, n, k, seed):
    on_gpu(device)
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(m, k)).astype(np.float32)
    B = rng.normal(size=(k, n)).astype(np.float32)
    exact = A.astype(np.float64) @ B.astype(np.float64)
    # A sum of k products in float32 is off by at most about k roundings of their magnitudes.
    bound = 2 * k * np.finfo(np.float32).eps * (np.abs(A) @ np.abs(B)) + 1e-30
    assert (np.abs(launch(device, name, covers, A, B) - exact) <= bound).all()


@given(n=st.integers(1, 5000), block=st.sampled_from([32, 100, 256, 1024]))
@example(n=1, block=1024)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_vectors_are_added_and_nothing_else_is_touched(device, n, block):
    on_gpu(device)
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(2, n)).astype(np.float32)
    whole = device.asarray(np.full(n + 64, 7, dtype=np.float32))
    arrays = device.asarray(a), device.asarray(b), whole[:n]
    kernels.load_kernel("vector_add")((-(-n // block),), (block,), (*arrays, np.int32(n)))
    host = gpuml.to_host(whole)
    assert (host[:n] == a + b).all()
    assert (host[n:] == 7).all()


# --- kernels in Python -------------------------------------------------------------------------
# Numba decides when it is imported whether it compiles or simulates, so each case has a process
# of its own.


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, timeout=300
    )


def test_the_notebooks_products_agree_with_float64(device):
    pytest.importorskip("numba")
    script = str(ROOT / "tests" / "benchmarks" / "kernels.py")
    done = python(script, "--check", GPUML_DEVICE=device.kind)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("Numba naive", "Numba tiled", "Numba several"):
        assert done.stdout.count(name) >= 5


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("range(0, A.shape[1], TILE)", "range(0, A.shape[1] - TILE, TILE)"),  # the last tile
        ("get(B, start + y, column)", "get(B, start + x, column)"),
        ("tile_A[y + i, k] * tile_B[k, x]", "tile_A[y, k] * tile_B[k, x]"),
    ],
)
def test_the_check_of_the_notebooks_products_finds_mistakes(tmp_path, right, wrong):
    pytest.importorskip("numba")
    notebook = (ROOT / "notebooks" / "02_your_first_kernels.ipynb").read_text(encoding="utf-8")
    assert right in notebook
    (tmp_path / "notebooks").mkdir()
    place = tmp_path / "notebooks" / "02_your_first_kernels.ipynb"
    place.write_text(notebook.replace(right, wrong), encoding="utf-8")
    script = tmp_path / "tests" / "benchmarks" / "kernels.py"
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / "tests" / "benchmarks" / "kernels.py").read_text(encoding="utf-8"))
    done = python(str(script), "--check", GPUML_DEVICE="cpu", PYTHONPATH=str(ROOT))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


GET = "import gpuml; from gpuml import kernels; cuda = kernels.numba_cuda(gpuml.get_device('cpu'))"


def test_without_a_gpu_numba_simulates():
    pytest.importorskip("numba")
    done = python(
        "-c", f"{GET}; print(cuda.__name__); import numba; print(numba.config.ENABLE_CUDASIM)"
    )
    assert done.stdout.split() == ["numba.cuda", "1"], done.stderr
    again = python("-c", f"{GET}; {GET}; print(cuda.__name__)")  # it may be asked for twice
    assert again.stdout.split() == ["numba.cuda"], again.stderr


def test_numba_imported_too_early_is_told_with_the_cure():
    pytest.importorskip("numba")
    done = python("-c", f"import numba; {GET}")
    assert done.returncode == 1
    assert "DeviceError" in done.stderr
    assert "restart the Python kernel" in done.stderr


def test_numba_missing_is_told_with_the_cure():
    code = f"import sys; sys.modules['numba.cuda'] = None; {GET}"
    done = python("-c", code)
    assert done.returncode == 1
    assert "pip install numba-cuda" in done.stderr
