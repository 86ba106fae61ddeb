"""CUDA C sources, one job each, and what makes them, or kernels written in Python, run here."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module, resources
from types import ModuleType
from typing import Any

from gpuml.devices import Device, get_device
from gpuml.errors import DeviceError, unknown_name


def names() -> list[str]:
    """Return the names of all CUDA C sources.

    Examples
    --------
    >>> names()[:3]
    ['clip_norm', 'epoch_end', 'epochs_end']
    """
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".cu") for name in files if name.endswith(".cu"))


def source(name: str) -> str:
    """Return a CUDA C source as text, with the headers of this package in it.

    Parameters
    ----------
    name : str
        One of :func:`names`.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If there is no such source.

    Examples
    --------
    >>> print(source("vector_add").splitlines()[0])
    // c = a + b: one thread adds one pair of numbers.
    """
    if name not in names():
        raise ValueError(unknown_name("CUDA C source", name, names()))
    # Headers are put in their place, so that a text tells all: CuPy knows compiled ones by it.
    return re.sub(r'#include "(\w+\.cuh)"\n', lambda line: text(line[1]), text(f"{name}.cu"))


def text(file: str) -> str:
    """Return a file of this package as it is.

    Parameters
    ----------
    file : str
        Such as the header ``"bfloat16.cuh"``.

    Returns
    -------
    str
    """
    return resources.files(__name__).joinpath(file).read_text(encoding="utf-8")


def load_kernel(
    name: str,
    function: str | None = None,
    *,
    options: tuple[str, ...] = (),
    cooperative: bool = False,
) -> Any:
    """Return a kernel of a CUDA C source, which CuPy compiles at its first launch on a GPU.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    function : str, optional
        Which ``__global__`` function of the source; that of the same name unless given.
    options : tuple of str
        More options for the compiler, such as ``("-lineinfo",)``.
    cooperative : bool
        Whether all blocks must run at the same time, because they wait for each other.

    Returns
    -------
    cupy.RawKernel
        To be called as ``kernel(blocks, threads, arguments)``. The head of the source says how
        many blocks and threads it wants. Integers must be passed with their C type, an ``int``
        as ``numpy.int32``. CuPy launches whatever it is given: a wrong type or a too short
        array is not noticed.

    Raises
    ------
    ValueError
        If there is no such source.
    DeviceError
        If no GPU answers, or CuPy is not installed.

    References
    ----------
    CuPy, User-Defined Kernels: raw kernels.
    """
    whole = source(name)
    try:
        get_device("gpu")
    except DeviceError as error:
        raise DeviceError(f"CUDA C can be compiled for a GPU only. {error}") from None
    return _raw_kernel(whole, function or name, ("-std=c++17", *options), cooperative)


@cache
def _raw_kernel(text: str, function: str, options: tuple[str, ...], cooperative: bool) -> Any:
    # A RawKernel keeps what it compiled, for each GPU apart.
    return import_module("cupy").RawKernel(
        text, function, options=options, enable_cooperative_groups=cooperative
    )


def numba_cuda(device: Device) -> ModuleType:
    """Return the module ``numba.cuda``, ready for kernels in Python on this device.

    On a GPU, Numba compiles them. On the CPU its simulator runs the same kernels, with a
    Python thread for each thread of a block: slow, but it finds accesses outside an array.
    Numba decides between the two when it is first imported, so call this before.

    Parameters
    ----------
    device : Device
        Where the arrays for the kernels will live.

    Returns
    -------
    module
        ``numba.cuda``. Its warnings about small grids are switched off.

    Raises
    ------
    DeviceError
        If Numba is not installed, if it was imported before for the other kind of device, if
        it cannot use the GPU, or if the GPU is not NVIDIA's.

    References
    ----------
    Numba CUDA documentation, "Debugging CUDA Python with the CUDA Simulator".
    """
    simulated = device.kind == "cpu"
    if not simulated and device.xp.cuda.runtime.is_hip:
        raise DeviceError(
            "Numba's CUDA kernels need an NVIDIA GPU. To simulate them on the CPU: "
            "gpuml.get_device('cpu')"
        )
    if "numba" not in sys.modules:
        os.environ["NUMBA_ENABLE_CUDASIM"] = str(int(simulated))
    try:
        config = import_module("numba").config
        cuda = import_module("numba.cuda")
    except ImportError as error:
        raise DeviceError(
            f"Numba's CUDA kernels cannot be used ({error}). To install them: "
            "pip install numba-cuda"
        ) from None
    if bool(config.ENABLE_CUDASIM) != simulated:
        now, wanted = ("a GPU", "the simulator") if simulated else ("the simulator", "the GPU")
        raise DeviceError(
            f"Numba was already imported for {now} and cannot change to {wanted}: restart the "
            "Python kernel, and call numba_cuda(device) before anything imports numba"
        )
    for settings in _settings(config):
        settings.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    if not simulated:
        if not cuda.is_available():
            raise DeviceError(
                "Numba cannot use the GPU, though CuPy can: it needs more of CUDA's libraries. "
                "To install them: pip install 'numba-cuda[cu13]', or [cu12] for CUDA 12"
            )
        cuda.select_device(device.index)
        with suppress(ImportError):  # the first kernel would load it, with a thread for each core,
            import_module("scipy.linalg")  # which the check of an exercise may not allow any more
    return cuda


def _settings(config: Any) -> list[Any]:
    """Return Numba's configuration, and that of numba-cuda where it has its own."""
    own = sys.modules.get("numba.cuda.core.config")
    return [config] if own is None or own is config else [config, own]
