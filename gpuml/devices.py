"""Which array library and which device; arrays there and back; free memory; BLAS threads.

The CPU computes with NumPy, a GPU with CuPy. CuPy is imported only when a GPU is asked for or
an array of CuPy's comes in.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np

from gpuml.errors import DeviceError, answered, note_lack_of_memory

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray: the two share no common type

# Below this many floating-point operations in one matrix product, a second BLAS thread costs
# more than it brings (measured by tests/benchmarks/threads.py).
SERIAL_PRODUCT = 1e7

# In which launchers tell each process which one it is on its host: MPICH and its relatives, Open
# MPI, MVAPICH, Slurm.
LOCAL_RANKS = (
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
)


@dataclass(frozen=True)
class Device:
    """A CPU or one GPU: where arrays live and where work on them runs.

    Made by :func:`get_device`; equal when kind and index are equal.

    Attributes
    ----------
    kind : {"cpu", "gpu"}
        The CPU computes with NumPy, a GPU with CuPy.
    index : int
        Which GPU, from 0; 0 for the CPU.
    """

    kind: Literal["cpu", "gpu"]
    index: int = 0

    @property
    def xp(self) -> ModuleType:
        """The array library of this device: the module ``numpy`` or ``cupy``."""
        return np if self.kind == "cpu" else _cupy()

    @property
    def name(self) -> str:
        """The name that the maker gave the device."""
        if self.kind == "cpu":
            return _cpu_name()
        return str(_cupy().cuda.runtime.getDeviceProperties(self.index)["name"].decode())

    def use(self) -> AbstractContextManager[Any]:
        """Make this the current device inside a ``with`` block (nothing to do on the CPU)."""
        if self.kind == "cpu":
            return nullcontext()
        current: AbstractContextManager[Any] = _cupy().cuda.Device(self.index)
        return current

    def asarray(self, a: Any, dtype: Any = None) -> Array:
        """Return `a` as an array on this device, copied only if it must be.

        Parameters
        ----------
        a : array_like
            An array on any device, or anything that NumPy understands.
        dtype : dtype, optional
            Element type of the result; that of `a` unless given.

        Returns
        -------
        numpy.ndarray or cupy.ndarray
            `a` itself where it is already here with the right type.
        """
        try:
            if self.kind == "cpu":
                return np.asarray(to_host(a), dtype=dtype)
            with self.use():
                return _cupy().asarray(a, dtype=dtype)
        except MemoryError as error:
            note_lack_of_memory(error)
            raise

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done (the CPU never queues any)."""
        if self.kind == "gpu":
            with self.use():
                _cupy().cuda.runtime.deviceSynchronize()

    def memory(self) -> tuple[int | None, int | None]:
        """Return free and total memory in bytes (None where the system does not say).

        On a GPU, memory that CuPy's pool holds but no array uses counts as free, and no more
        than the limit of the pool leaves, where ``CUPY_GPU_MEMORY_LIMIT`` has set one.
        """
        if self.kind == "cpu":
            return _host_memory()
        cupy = _cupy()
        with self.use():
            free, total = cupy.cuda.runtime.memGetInfo()
            pool = cupy.get_default_memory_pool()
            free, limit = free + pool.free_bytes(), pool.get_limit()
            return min(free, max(0, limit - pool.used_bytes())) if limit else free, total

    def __str__(self) -> str:
        """Return name, memory and library: ``NVIDIA H200, 140 GiB, CuPy 14.2.0, CUDA 13.2``."""
        _, total = self.memory()
        parts = [self.name]
        if self.kind == "cpu":
            parts.append(f"{cpu_count()} cores")
        if total is not None:
            parts.append(f"{total / 2**30:.0f} GiB")
        if self.kind == "cpu":
            return ", ".join([*parts, f"NumPy {np.__version__}"])
        cupy = _cupy()
        runtime = cupy.cuda.runtime
        if runtime.is_hip:
            platform_version = "ROCm"
        else:
            version = runtime.runtimeGetVersion()
            platform_version = f"CUDA {version // 1000}.{version % 1000 // 10}"
        return ", ".join([*parts, f"CuPy {cupy.__version__}", platform_version])


CPU = Device("cpu")


def get_device(name: str | Device | None = None) -> Device:
    """Return the GPU if one answers, else the CPU; or the device that is named.

    Parameters
    ----------
    name : str or Device, optional
        ``"cpu"``, ``"gpu"`` (the first), ``"gpu:1"`` (the second), or ``"auto"``. Without a
        name the environment variable ``GPUML_DEVICE`` decides, and without that ``"auto"``. Of
        several processes that ``mpiexec`` or Slurm started on a host each gets the GPU of its
        own number, instead of the first.

    Returns
    -------
    Device

    Raises
    ------
    ValueError
        If the name is none of these.
    DeviceError
        If a GPU is named and it does not answer.

    Examples
    --------
    >>> get_device("cpu").kind
    'cpu'
    """
    if isinstance(name, Device):
        return name
    text = (name or os.environ.get("GPUML_DEVICE") or "auto").strip().lower()
    if text == "cpu":
        return CPU
    if text == "auto":
        return Device("gpu", _own_gpu()) if _gpu_problem(0) is None else CPU
    kind, _, index = text.partition(":")
    if kind != "gpu" or not (index.isdecimal() or text == "gpu"):
        raise ValueError(f"unknown device '{text}': expected auto, cpu, gpu, or gpu:1, gpu:2, …")
    problem = _gpu_problem(int(index or 0))
    if problem:
        error = DeviceError(f"{text} does not answer: {problem}. What to do: gpuml doctor")
        if problem.startswith("CuPy"):
            error.add_note(answered("wheel"))
        raise error
    return Device("gpu", int(index) if index else _own_gpu())


def device_of(*arrays: Array) -> Device:
    """Return the device on which all the arrays live.

    Raises
    ------
    TypeError
        If they live on different devices, or one is not an array; the message names the cure.
    """
    devices = [_device_of_one(a) for a in arrays]
    if any(device != devices[0] for device in devices):
        places = ", ".join("the CPU" if d.kind == "cpu" else f"GPU {d.index}" for d in devices)
        raise TypeError(
            f"the arrays live on different devices ({places}): bring them to one, "
            "for example with gpuml.get_device().asarray(a)"
        )
    return devices[0]


def array_module(*arrays: Array) -> ModuleType:
    """Return ``numpy`` or ``cupy``, whichever made all the arrays.

    Raises
    ------
    TypeError
        If arrays of both are mixed, or one is not an array.
    """
    kind = type(arrays[0])
    for a in arrays:  # a loop: this is asked for before every small piece of work
        if type(a) is not kind:
            return device_of(*arrays).xp
    if kind is np.ndarray:
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and kind is getattr(cupy, "ndarray", None):
        first = arrays[0].data.device_id  # much less work than to ask for the device
        for a in arrays:
            if a.data.device_id != first:
                break
        else:
            return cupy
    return device_of(*arrays).xp


def to_host(a: Any) -> Any:
    """Return an array of CuPy's as a NumPy array; anything else unchanged."""
    return a.get() if _is_cupy(a) else a


@contextmanager
def blas_threads(largest_product: float, most: int | None = None) -> Iterator[None]:
    """Limit NumPy's BLAS to one thread while products are small; restore it afterwards.

    Starting a second thread costs some microseconds, as long as a small matrix product.

    Parameters
    ----------
    largest_product : float
        Floating-point operations of the largest matrix product to come: 2 M N K.
    most : int, optional
        Threads for large products, where other processes need cores as well; fewer if NumPy
        was told so before.
    """
    if largest_product < SERIAL_PRODUCT or most == 1:
        with _ONE_THREAD:
            yield
    elif most is None:
        yield
    else:
        pools = _thread_pools().select(user_api="blas")
        n = min([most, *(pool.num_threads for pool in pools.lib_controllers)])
        with pools.limit(limits=n):
            yield


class _OneThread:
    """One BLAS thread as long as anybody wants so: the first limits, the last restores.

    The number is the whole process's. Of two trainings in threads of their own, the one that
    ends last would else restore the limit of the other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._limit = _thread_pools().limit(limits=1, user_api="blas")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._limit.restore_original_limits()


_ONE_THREAD = _OneThread()


@cache
def _thread_pools() -> Any:
    """Find the thread pools of this process, once: it takes milliseconds.

    NumPy's BLAS, the one that counts here, is there from the start.
    """
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _cupy() -> ModuleType:
    return importlib.import_module("cupy")


def _is_cupy(a: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(a, getattr(cupy, "ndarray", ()))


def _device_of_one(a: Any) -> Device:
    if isinstance(a, np.ndarray | np.generic):
        return CPU
    if _is_cupy(a):
        return Device("gpu", a.device.id)
    raise TypeError(
        f"expected an array of NumPy or CuPy, got {type(a).__name__}: "
        "gpuml.get_device().asarray(a) makes one"
    )


def _own_gpu() -> int:
    """Return which GPU is this process's; of more processes than GPUs some get the same."""
    numbers = (os.environ.get(name, "") for name in LOCAL_RANKS)
    number = next((int(text) for text in numbers if text.isdecimal()), 0)
    return number % int(_cupy().cuda.runtime.getDeviceCount())


def _gpu_problem(index: int) -> str | None:
    """Why GPU number `index` cannot be used, or None if it answers."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        runtime = _cupy().cuda.runtime
        count = runtime.getDeviceCount()
    except Exception as error:  # CuPy raises its own kinds for a missing driver or library
        return (
            f"CuPy is installed, but says: {str(error).splitlines()[0] if str(error) else error!r}"
        )
    if index >= count:
        return f"there is no GPU {index}: there are {count}, counted from 0"
    return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "CPU"


def processors() -> set[int]:
    """Return the numbers of the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)  # not what is there
    return set(range(os.cpu_count() or 1))


def cpu_count() -> int:
    """Return how many processors this process may use."""
    return len(processors())


def _host_memory() -> tuple[int | None, int | None]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    except (OSError, KeyError):
        pass  # not Linux
    try:
        return None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None, None
