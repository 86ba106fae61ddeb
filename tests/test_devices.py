from __future__ import annotations

import subprocess
import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
import threadpoolctl

import gpuml
from gpuml import devices
from gpuml.devices import Device


class FakeArray:
    """Passes for an array of CuPy's where only its place counts."""

    def __init__(self, index: int) -> None:
        self.device = type("Place", (), {"id": index})()
        self.data = type("Memory", (), {"device_id": index})()


@pytest.fixture
def fake_cupy(monkeypatch):
    """A module that looks like CuPy on a machine with two GPUs."""

    class Runtime:
        is_hip = False

        @staticmethod
        def getDeviceCount():  # noqa: N802
            return 2

    cuda = type("cuda", (), {"runtime": Runtime})
    module = type(sys)("cupy")
    module.cuda, module.ndarray, module.__spec__ = cuda, FakeArray, object()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_the_environment_decides_where_no_name_is_given(monkeypatch, fake_cupy):
    monkeypatch.setenv("GPUML_DEVICE", "gpu:1")
    assert gpuml.get_device() == Device("gpu", 1)
    assert gpuml.get_device("cpu") == Device("cpu"), "a name that is given wins"
    monkeypatch.setenv("GPUML_DEVICE", "cpu")
    assert gpuml.get_device() == Device("cpu")
    monkeypatch.delenv("GPUML_DEVICE")
    assert gpuml.get_device() == Device("gpu", 0), "the GPU if one answers"


def test_a_device_is_returned_as_it_is(device):
    assert gpuml.get_device(device) is device


@pytest.mark.parametrize("name", ["tpu", "gpu:", "gpu:-1", "gpu:x", "cpu:0", "cuda"])
def test_an_unknown_name_is_refused(name, fake_cupy):
    with pytest.raises(ValueError, match="expected auto, cpu, gpu"):
        gpuml.get_device(name)


def test_a_gpu_that_does_not_exist_is_refused(fake_cupy):
    with pytest.raises(
        gpuml.DeviceError, match=r"gpu:2 does not answer: there is no GPU 2: there are 2.*doctor"
    ):
        gpuml.get_device("gpu:2")


def test_cupy_without_a_driver_means_the_cpu(fake_cupy, monkeypatch):
    def no_driver():
        raise RuntimeError("cudaErrorInsufficientDriver: the driver is too old\nmore")

    monkeypatch.setattr(fake_cupy.cuda.runtime, "getDeviceCount", no_driver)
    assert gpuml.get_device("auto").kind == "cpu"
    with pytest.raises(gpuml.DeviceError, match="cudaErrorInsufficientDriver") as caught:
        gpuml.get_device("gpu")
    assert "\n" not in str(caught.value)


def test_mixed_devices_are_a_type_error_that_names_them_and_the_cure(fake_cupy):
    on_cpu, on_gpu = np.zeros(3), FakeArray(1)
    for arrays in [(on_cpu, on_gpu), (on_gpu, on_cpu)]:
        with pytest.raises(TypeError, match=r"the CPU.*asarray|GPU 1.*asarray") as caught:
            gpuml.array_module(*arrays)
        assert "the CPU" in str(caught.value)
        assert "GPU 1" in str(caught.value)
    with pytest.raises(TypeError, match="GPU 0, GPU 1"):
        gpuml.device_of(FakeArray(0), FakeArray(1))
    with pytest.raises(TypeError, match="got list"):
        gpuml.array_module(on_cpu, [1, 2])
    assert gpuml.array_module(on_gpu) is fake_cupy


def test_memory_maps_are_on_the_cpu(tmp_path):
    mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=(3,))
    assert gpuml.device_of(mapped, np.zeros(1)).kind == "cpu"
    assert gpuml.array_module(mapped) is np


def test_arrays_go_there_and_back(device, rng):
    a = rng.normal(size=(5, 3)).astype(np.float32)
    there = device.asarray(a)
    assert gpuml.device_of(there) == device
    assert gpuml.array_module(there) is device.xp
    back = gpuml.to_host(there)
    assert isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, a)
    assert device.asarray(there) is there, "what is here already is not copied"
    assert device.asarray([1, 2], np.float64).dtype == np.float64
    np.testing.assert_array_equal(gpuml.get_device("cpu").asarray(there), a)


def test_a_device_describes_itself(device):
    free, total = device.memory()
    assert total is not None
    assert free is None or 0 < free <= total
    library = "NumPy" if device.kind == "cpu" else "CuPy"
    assert str(device).startswith(device.name)
    assert f"{total / 2**30:.0f} GiB" in str(device)
    assert library in str(device)
    device.synchronize()


@pytest.mark.parametrize(
    ("limit", "free"), [(0, 90 + 5), (200, 90 + 5), (50, 50 - 20), (20, 0), (10, 0)]
)
def test_a_limit_of_the_pool_limits_what_is_free(fake_cupy, limit, free):
    """20 bytes in use, 5 kept by the pool, 90 of 120 free."""
    pool = types.SimpleNamespace(
        free_bytes=lambda: 5, used_bytes=lambda: 20, get_limit=lambda: limit
    )
    fake_cupy.get_default_memory_pool = lambda: pool
    fake_cupy.cuda.Device = lambda index: nullcontext()
    fake_cupy.cuda.runtime.memGetInfo = lambda: (90, 120)
    assert Device("gpu").memory() == (free, 120)


def test_the_limit_of_cupys_own_pool_counts(device):
    if device.kind == "cpu":
        pytest.skip("NumPy has no pool")
    pool = device.xp.get_default_memory_pool()
    before = pool.get_limit()
    try:
        pool.set_limit(pool.used_bytes() + 2**20)
        assert device.memory()[0] == 2**20
    finally:
        pool.set_limit(before)


def n_threads() -> list[int]:
    return [
        library["num_threads"]
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas"
    ]


def test_blas_threads_are_limited_for_small_products_and_restored():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = n_threads()
        with devices.blas_threads(1000.0):
            assert set(n_threads()) == {1}
        assert n_threads() == before
        with devices.blas_threads(devices.SERIAL_PRODUCT):
            assert n_threads() == before
        with pytest.raises(KeyError), devices.blas_threads(1000.0):
            raise KeyError
        assert n_threads() == before


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (3, 2), (100, 2)])
def test_blas_threads_are_never_more_than_before(most, expected):
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = n_threads()
        with devices.blas_threads(devices.SERIAL_PRODUCT, most):
            assert set(n_threads()) == {expected}
        assert n_threads() == before


def test_blas_threads_are_restored_by_the_last_of_two_that_overlap():
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = n_threads()
        first, second = devices.blas_threads(1000.0), devices.blas_threads(1000.0)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert set(n_threads()) == {1}, "the second is still at work"
        second.__exit__(None, None, None)
        assert n_threads() == before


def test_importing_gpuml_loads_nothing_heavy():
    program = (
        "import sys, gpuml; gpuml.train, gpuml.MLP, gpuml.load_dataset, gpuml.get_device('cpu');"
        "heavy = {'cupy', 'matplotlib', 'sklearn', 'mpi4py', 'scipy', 'tqdm', 'safetensors'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_is_documented():
    for name in gpuml.__all__:
        assert getattr(gpuml, name).__doc__, name
    assert set(gpuml.__all__) <= set(dir(gpuml))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        gpuml.trian  # noqa: B018
