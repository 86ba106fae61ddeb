"""Accelerate machine learning with GPUs: a small package beside a course.

>>> import gpuml
>>> device = gpuml.get_device("cpu")
>>> device.asarray([1.0, 2.0]).sum().item()
3.0
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuml import exercises as exercises
    from gpuml import metrics as metrics
    from gpuml import plots as plots
    from gpuml import privacy as privacy
    from gpuml import robustness as robustness
    from gpuml import schedules as schedules
    from gpuml.blocked import BlockReport, blocked_matmul, measure_rates, plan_for
    from gpuml.blocking import BlockPlan, Rates
    from gpuml.datasets import Dataset, Preprocessing, load_dataset, split
    from gpuml.devices import Device, array_module, device_of, get_device, to_host
    from gpuml.errors import (
        CheckpointError,
        DataError,
        DeviceError,
        DeviceMemoryError,
        GpumlError,
        ModelFileError,
    )
    from gpuml.gradients import gradient_check
    from gpuml.history import History, compare_histories
    from gpuml.losses import mean_squared_error, softmax_cross_entropy
    from gpuml.matmul import batched_matmul, split_matmul
    from gpuml.metrics import accuracy, confusion_matrix, r2_score
    from gpuml.models import MLP, Linear, Model, Parameters, load_model
    from gpuml.optimizers import Adam, GradientDescent
    from gpuml.populations import (
        Ensemble,
        Population,
        PopulationDivergedError,
        PopulationInterrupted,
        Ranking,
        train_population,
    )
    from gpuml.recordings import Recording, recorded
    from gpuml.regression import Gram, largest_stable_learning_rate, least_squares
    from gpuml.searches import successive_halving
    from gpuml.timing import (
        Ceilings,
        Comparison,
        Measurement,
        benchmark,
        compare_devices,
        device_ceilings,
        watch_memory,
    )
    from gpuml.training import (
        DivergenceError,
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
    "errors": (
        "CheckpointError",
        "DataError",
        "DeviceError",
        "DeviceMemoryError",
        "GpumlError",
        "ModelFileError",
    ),
    "exercises": (),
    "gradients": ("gradient_check",),
    "history": ("History", "compare_histories"),
    "losses": ("mean_squared_error", "softmax_cross_entropy"),
    "matmul": ("batched_matmul", "split_matmul"),
    "metrics": ("accuracy", "confusion_matrix", "r2_score"),
    "models": ("MLP", "Linear", "Model", "Parameters", "load_model"),
    "optimizers": ("Adam", "GradientDescent"),
    "plots": (),
    "populations": (
        "Ensemble",
        "Population",
        "PopulationDivergedError",
        "PopulationInterrupted",
        "Ranking",
        "train_population",
    ),
    "privacy": (),
    "recordings": ("Recording", "recorded"),
    "regression": ("Gram", "largest_stable_learning_rate", "least_squares"),
    "robustness": (),
    "schedules": (),
    "searches": ("successive_halving",),
    "timing": (
        "Ceilings",
        "Comparison",
        "Measurement",
        "benchmark",
        "compare_devices",
        "device_ceilings",
        "watch_memory",
    ),
    "training": (
        "DivergenceError",
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
    "CheckpointError",
    "Comparison",
    "DataError",
    "Dataset",
    "Device",
    "DeviceError",
    "DeviceMemoryError",
    "DivergenceError",
    "Ensemble",
    "GpumlError",
    "GradientDescent",
    "Gram",
    "History",
    "Linear",
    "Measurement",
    "Model",
    "ModelFileError",
    "Parameters",
    "Population",
    "PopulationDivergedError",
    "PopulationInterrupted",
    "Preprocessing",
    "Ranking",
    "Rates",
    "Recording",
    "TrainingInterrupted",
    "accuracy",
    "array_module",
    "batched_matmul",
    "benchmark",
    "blocked_matmul",
    "compare_devices",
    "compare_histories",
    "confusion_matrix",
    "device_ceilings",
    "device_of",
    "evaluate",
    "get_device",
    "gradient_check",
    "largest_stable_learning_rate",
    "least_squares",
    "load_dataset",
    "load_model",
    "mean_squared_error",
    "measure_rates",
    "plan_for",
    "predict",
    "r2_score",
    "recorded",
    "softmax_cross_entropy",
    "split",
    "split_matmul",
    "successive_halving",
    "to_host",
    "train",
    "train_population",
    "watch_memory",
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


if "MPI_LOCALRANKID" in os.environ:  # a rank, whose end the others have to hear of
    import_module("gpuml.distributed")
