"""What the tests share: each device in turn, and random numbers."""

from __future__ import annotations

import numpy as np
import pytest
from parallel import pytest_cmdline_main, pytest_configure  # noqa: F401  (pytest calls them)

import gpuml
from gpuml.devices import Device


def gpu_problem() -> str | None:
    """Say why no GPU can be tested here, or None if one answers."""
    try:
        gpuml.get_device("gpu")
    except gpuml.DeviceError as error:
        return str(error)
    return None


GPU_PROBLEM = gpu_problem()


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest) -> Device:
    """The CPU, and the GPU where one answers."""
    if request.param == "gpu" and GPU_PROBLEM:
        pytest.skip(GPU_PROBLEM)
    return gpuml.get_device(request.param)


@pytest.fixture
def xp(device: Device):
    """The array library of the device."""
    return device.xp


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in each run."""
    return np.random.default_rng(20261123)
