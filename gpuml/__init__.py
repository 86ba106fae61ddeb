"""Accelerate machine learning with GPUs: a small package beside a course.

>>> import gpuml
>>> device = gpuml.get_device("cpu")
>>> device.asarray([1.0, 2.0]).sum().item()
3.0
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuml import plots as plots
    from gpuml.blocked import BlockReport, blocked_matmul, measure_rates, plan_for
    from gpuml.blocking import BlockPlan, Rates
    from gpuml.datasets import Dataset, Preprocessing, load_dataset, split
    from gpuml.devices import Device, array_module, device_of, get_device, to_host
    from gpuml.errors import (
        DataError,
        DeviceError,
        DeviceMemoryError,
        GpumlError,
        ModelFileError,
    )
    from gpuml.losses import mean_squared_error, softmax_cross_entropy
    from gpuml.matmul import batched_matmul, split_matmul
    from gpuml.models import MLP, Linear, Model, Parameters, load_model
    from gpuml.optimizers import Adam, GradientDescent
    from gpuml.recordings import Recording, recorded
    from gpuml.timing import (
        Ceilings,
        Comparison,
        Measurement,
        benchmark,
        compare_devices,
        device_ceilings,
    )
    from gpuml.training import (
        DivergenceError,
        History,
        TrainingInterrupted,
        evaluate,
        predict,
        train,
    )

__version__ = "0.1.0"

# Each name is loaded from its module at first use, so that `import gpuml` costs next to nothing.
_MODULES = {
    "blocked": ("BlockReport", "blocked_matmul", "measure_rates", "plan_for"),
    "blocking": ("BlockPlan", "Rates"),
    "datasets": ("Dataset", "Preprocessing", "load_dataset", "split"),
    "devices": ("Device", "array_module", "device_of", "get_device", "to_host"),
    "errors": ("DataError", "DeviceError", "DeviceMemoryError", "GpumlError", "ModelFileError"),
    "losses": ("mean_squared_error", "softmax_cross_entropy"),
    "matmul": ("batched_matmul", "split_matmul"),
    "models": ("MLP", "Linear", "Model", "Parameters", "load_model"),
    "optimizers": ("Adam", "GradientDescent"),
    "plots": (),
    "recordings": ("Recording", "recorded"),
    "timing": (
        "Ceilings",
        "Comparison",
        "Measurement",
        "benchmark",
        "compare_devices",
        "device_ceilings",
    ),
    "training": (
        "DivergenceError",
        "History",
        "TrainingInterrupted",
        "evaluate",
        "predict",
        "train",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MLP",
    "Adam",
    "BlockPlan",
    "BlockReport",
    "Ceilings",
    "Comparison",
    "DataError",
    "Dataset",
    "Device",
    "DeviceError",
    "DeviceMemoryError",
    "DivergenceError",
    "GpumlError",
    "GradientDescent",
    "History",
    "Linear",
    "Measurement",
    "Model",
    "ModelFileError",
    "Parameters",
    "Preprocessing",
    "Rates",
    "Recording",
    "TrainingInterrupted",
    "array_module",
    "batched_matmul",
    "benchmark",
    "blocked_matmul",
    "compare_devices",
    "device_ceilings",
    "device_of",
    "evaluate",
    "get_device",
    "load_dataset",
    "load_model",
    "mean_squared_error",
    "measure_rates",
    "plan_for",
    "predict",
    "recorded",
    "softmax_cross_entropy",
    "split",
    "split_matmul",
    "to_host",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gpuml.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'gpuml' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"gpuml.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
