"""Every case is made by what the system answers; the logic is never touched."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest

from gpuml.doctor import Computation, Diagnosis, System, doctor
from gpuml.errors import answered

GIB = 2**30
NVIDIA, AMD, INTEL = "0x10de", "0x1002", "0x8086"
CUDA_13, CUDA_12, BOTH = (
    {"cupy-cuda13x": "14.2.0"},
    {"cupy-cuda12x": "14.2.0"},
    {"cupy-cuda12x": "13.6.0", "cupy-cuda13x": "14.2.0"},
)
CONDA_CUPY = {"cupy": "14.2.0"}
# What CuPy 14.2 says; the first three seen on a machine with neither driver nor CUDA.
NO_DRIVER = (
    "CUDARuntimeError: cudaErrorInsufficientDriver: "
    "CUDA driver version is insufficient for CUDA runtime version"
)
NO_CUBLAS = (
    "ImportError: libcublas.so.13: cannot open shared object file: No such file or directory"
)
NO_NVRTC = (
    'DynamicLibNotFoundError: Failure finding "libnvrtc.so.13 or libnvrtc.so.12": '
    "No such file: libnvrtc.so.13 or libnvrtc.so.12"
)
NO_HEADERS = (
    "CompileException: /cuda_fp16.h(4): catastrophic error: "
    'cannot open source file "vector_types.h"'
)
NO_CUDART = (
    "ImportError: ================\nFailed to import CuPy.\n\nIf you installed CuPy via wheels, "
    "make sure that\n\nOriginal error:\n  ImportError: libcudart.so.12: cannot open shared object "
    "file: No such file or directory\n================"
)
GLIBCXX = "ImportError: libstdc++.so.6: version `GLIBCXX_3.4.30' not found\nmore"

INSTALL_13 = 'python -m pip install "cupy-cuda13x[ctk]"'
INSTALL_12 = 'python -m pip install "cupy-cuda12x[ctk]"'
CONDA = "conda install -c conda-forge cupy"
NVIDIA_PAGE = "https://www.nvidia.com/drivers"
ROCM_PAGE = "https://rocm.docs.amd.com"
WHO_NVIDIA = "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"


def computed(free: float = 70 * GIB, **changes) -> Computation:
    """A GPU that computes."""
    fields = {"version": "14.2.0", "is_hip": False, "cuda": 13020, "count": 1}
    fields |= {"gpu": "NVIDIA H100 80GB HBM3", "free": int(free), "total": 80 * GIB}
    return Computation(**(fields | changes))


def failed(error: str, is_hip: bool | None = False, cuda: int | None = 13020) -> Computation:
    return Computation(error, version="14.2.0", is_hip=is_hip, cuda=cuda)


class Answers(System):
    """A Linux machine of our choice: by default with neither GPU nor CuPy, in a pip environment."""

    def __init__(self, **answers) -> None:
        super().__init__()
        self.answers = {
            "platform": "linux",
            "is_wsl": False,
            "container": None,
            "os_release": {"ID": "ubuntu", "ID_LIKE": "debian", "PRETTY_NAME": "Ubuntu 24.04 LTS"},
            "is_conda": False,
            "has_pip": True,
            "distributions": {"numpy": "2.4.6"},
            "bus_vendors": {INTEL},
            "nvidia_driver": None,
            "nvidia_capability": None,
            "amd_driver": False,
            "has_rocm": False,
            "compute": None,
            "env": {},
        }
        assert answers.keys() <= self.answers.keys()
        self.answers |= answers

    def environment(self, name: str) -> str | None:
        return self.answers["env"].get(name)

    def compute(self) -> Computation:
        assert self.answers["compute"] is not None, "asked to compute without need"
        return self.answers["compute"]


def _answer(name: str):
    def method(self):
        answer = self.answers[name]
        return dict(answer) if isinstance(answer, dict) else answer

    return method


for _name in vars(System):
    if not _name.startswith("_") and _name not in vars(Answers):
        setattr(Answers, _name, _answer(_name))


def check(case: str, *commands: str, says: tuple[str, ...] = (), **answers) -> Diagnosis:
    """Diagnose, and hold what every diagnosis promises."""
    found = doctor(Answers(**answers))
    text = str(found)
    assert found.case == case
    assert found.commands == commands
    assert found.ok is case.startswith("ok-")
    assert text.startswith(found.summary)
    assert all(f"\n  {command}" in text for command in commands)
    assert ("What to type:" in text) is bool(commands)
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert text.isascii()
    flat = " ".join(text.split())
    assert all(phrase in flat for phrase in (*says, *found.notes))
    assert json.loads(found.to_json()) == {
        "case": found.case,
        "ok": found.ok,
        "summary": found.summary,
        "commands": list(found.commands),
        "facts": dict(found.facts),
        "notes": list(found.notes),
    }
    return found


def nvidia(driver=(13, 0), **answers) -> dict:
    """A machine with an NVIDIA GPU and a driver that offers this CUDA."""
    answers.setdefault("bus_vendors", {INTEL, NVIDIA})
    return {"nvidia_driver": driver, **answers}


def amd(**answers) -> dict:
    """A machine with an AMD GPU, its driver and ROCm."""
    return {"bus_vendors": {AMD}, "amd_driver": True, "has_rocm": True, **answers}


# --- all well


def test_a_gpu_that_computes():
    found = check("ok-gpu", **nvidia((12, 10), distributions=CUDA_12, compute=computed()))
    assert dict(found.facts) == {
        "GPU": "NVIDIA H100 80GB HBM3",
        "memory": "70.0 of 80.0 GiB free",
        "driver": "offers CUDA 12.10",
        "CuPy": "14.2.0 (cupy-cuda12x)",
        "system": "Ubuntu 24.04 LTS",
    }
    assert "NVIDIA H100 80GB HBM3" in found.summary
    assert found.notes == (answered("slower", "first_call"),)


def test_the_first_of_several_gpus():
    answers = nvidia(distributions=CUDA_13, compute=computed(count=8))
    check("ok-gpu", says=("NVIDIA H100 80GB HBM3, the first of 8",), **answers)


def test_what_computes_is_well_whatever_the_versions_say():
    """A forward compatibility package lets an old driver run a newer CUDA."""
    check("ok-gpu", **nvidia((12, 4), distributions=CUDA_13, compute=computed()))
    # a bus that shows nothing, as in some virtual machines
    check("ok-gpu", **nvidia(bus_vendors=set(), distributions=CUDA_13, compute=computed()))


def test_amd_gpu_computes():
    compute = computed(is_hip=True, gpu="AMD Instinct MI300X", cuda=70051)
    check("ok-gpu", **amd(distributions={"cupy-rocm-7-0": "14.2.0"}, compute=compute))


def test_no_gpu_is_well():
    found = check("ok-cpu", says=("on the CPU",))
    assert dict(found.facts)["NumPy"] == "2.4.6"
    assert not found.notes
    check("ok-cpu", bus_vendors=set())


@pytest.mark.parametrize("error", [NO_DRIVER, NO_CUDART, NO_CUBLAS, GLIBCXX])
@pytest.mark.parametrize("cupys", [CUDA_13, CONDA_CUPY])
def test_cupy_without_a_gpu_is_well(error, cupys):
    found = check("ok-cpu", distributions=cupys, compute=failed(error), is_conda=True)
    assert "error" not in dict(found.facts)


def test_mac():
    check("ok-cpu", platform="darwin", bus_vendors=set(), says=("Mac",))


@pytest.mark.parametrize("where", [{"platform": "win32"}, {"is_wsl": True}])
def test_windows_shows_no_gpu_without_driver(where):
    check("ok-cpu", bus_vendors=set(), says=(NVIDIA_PAGE,), **where)


# --- CuPy missing


@pytest.mark.parametrize(
    ("driver", "line"),
    [
        ((13, 0), INSTALL_13),
        ((13, 2), INSTALL_13),
        ((14, 1), INSTALL_13),  # drivers run what was made for older CUDAs
        ((12, 0), INSTALL_12),
        ((12, 9), INSTALL_12),
    ],
)
def test_cupy_missing(driver, line):
    check("cupy-missing", line, **nvidia(driver), says=("NVIDIA GPU", "not installed"))


def test_a_driver_shows_a_gpu_that_is_on_no_pci_bus():
    check("cupy-missing", INSTALL_13, **nvidia(bus_vendors=set()))


def test_cupy_missing_with_uv_or_conda():
    uv, conda = {"has_pip": False}, {"is_conda": True}
    check("cupy-missing", 'uv pip install "cupy-cuda13x[ctk]"', **nvidia(**uv))
    check("cupy-missing", 'uv pip install "cupy-cuda12x[ctk]"', **nvidia((12, 4), **uv))
    check("cupy-missing", CONDA, **nvidia(**conda))
    check("cupy-missing", CONDA + " cuda-version=12", **nvidia((12, 4), **conda))


def test_cupy_missing_and_driver_too_old_for_any():
    check("cupy-missing", NVIDIA_PAGE, INSTALL_12, **nvidia((11, 8)), says=("update comes first",))


def test_gpu_before_turing_needs_cuda_12_even_with_the_newest_driver():
    check("cupy-missing", INSTALL_12, **nvidia((13, 0), nvidia_capability=(6, 1)))
    check("cupy-missing", INSTALL_13, **nvidia((13, 0), nvidia_capability=(7, 5)))
    check("cupy-missing", INSTALL_13, **nvidia((13, 0), nvidia_capability=(12, 0)))


def test_cupy_missing_and_no_driver():
    """Which CuPy fits depends on the driver: it comes first, then the doctor is asked again."""
    lines = ("sudo ubuntu-drivers install", "gpuml doctor")
    check("cupy-missing", *lines, **nvidia(None), says=("driver comes first",))


def test_cupy_missing_for_amd():
    line = "python -m pip install cupy-rocm-7-0"
    check("cupy-missing", line, **amd(), says=("AMD GPU",))
    check("cupy-missing", line, **amd(is_conda=True))  # conda has no CuPy for AMD
    check("cupy-missing", "uv pip install cupy-rocm-7-0", **amd(has_pip=False))
    check("cupy-missing", ROCM_PAGE, line, **amd(has_rocm=False), says=("ROCm 7 comes first",))
    lines = (ROCM_PAGE, "gpuml doctor")
    check("cupy-missing", *lines, **amd(amd_driver=False), says=("driver comes first",))


def test_nvidia_comes_before_an_amd_gpu_built_in():
    check("cupy-missing", INSTALL_13, **nvidia(bus_vendors={AMD, NVIDIA}, amd_driver=True))
    answers = nvidia(bus_vendors={AMD, NVIDIA}, distributions=CUDA_13, compute=failed(NO_CUBLAS))
    check("libraries-missing", INSTALL_13, **answers)


def test_the_installed_cupy_says_which_of_two_makers_is_meant():
    error = failed("ImportError: libhipblas.so.3: cannot open shared object file", None, None)
    rocm = {"cupy-rocm-7-0": "14.2.0"}
    answers = nvidia(bus_vendors={AMD, NVIDIA}, amd_driver=True, distributions=rocm, compute=error)
    check("libraries-missing", ROCM_PAGE, **answers)


def test_cupy_of_the_other_maker():
    remove = "python -m pip uninstall -y "
    found = check(
        "cupy-missing",
        remove + "cupy-cuda13x",
        "python -m pip install cupy-rocm-7-0",
        **amd(distributions=CUDA_13, compute=failed(NO_DRIVER)),
    )
    assert "cupy-cuda13x" in found.summary
    answers = nvidia(distributions={"cupy-rocm-7-0": "14.2.0"})
    answers["compute"] = failed("ImportError: libamdhip64.so.7: cannot open shared object file")
    check("cupy-missing", remove + "cupy-rocm-7-0", INSTALL_13, **answers)
    # conda's is of NVIDIA, though its name does not say so
    answers = amd(distributions=CONDA_CUPY, compute=failed(NO_DRIVER), is_conda=True)
    lines = ("conda remove -y cupy", "python -m pip install cupy-rocm-7-0")
    check("cupy-missing", *lines, **answers)


# --- no driver

DRIVERS = [
    ("ubuntu", "debian", "sudo ubuntu-drivers install"),
    ("linuxmint", "ubuntu debian", "sudo ubuntu-drivers install"),
    ("debian", "", "sudo apt install nvidia-driver libcuda1 nvidia-smi"),
    ("kali", "debian", "sudo apt install nvidia-driver libcuda1 nvidia-smi"),
    ("fedora", "", "sudo dnf install akmod-nvidia xorg-x11-drv-nvidia-cuda"),
    ("amzn", "fedora", NVIDIA_PAGE),
    ("rocky", "rhel centos fedora", NVIDIA_PAGE),
    ("arch", "", "sudo pacman -Syu nvidia-open"),
    ("endeavouros", "arch", "sudo pacman -Syu nvidia-open"),
    ("manjaro", "arch", "sudo mhwd -a pci nonfree 0300"),
    ("opensuse-tumbleweed", "opensuse suse", NVIDIA_PAGE),
    ("", "", NVIDIA_PAGE),
]


@pytest.mark.parametrize(("name", "like", "line"), DRIVERS)
def test_no_driver_by_distribution(name, like, line):
    answers = nvidia(None, distributions=CUDA_13, compute=failed(NO_DRIVER))
    answers["os_release"] = {"ID": name, "ID_LIKE": like}
    check("no-driver", line, **answers, says=("NVIDIA GPU", "restart", NO_DRIVER))


def test_no_driver_without_os_release():
    answers = nvidia(None, distributions=CUDA_13, compute=failed(NO_DRIVER), os_release={})
    check("no-driver", NVIDIA_PAGE, **answers)


def test_no_driver_in_a_container_or_wsl():
    answers = nvidia(None, distributions=CUDA_13, compute=failed(NO_DRIVER))
    says = ("Start the container with its GPU",)
    docker, podman = {"container": "docker"}, {"container": "podman"}
    check("no-driver", "docker run --gpus all IMAGE", **answers, **docker, says=says)
    line = "podman run --device nvidia.com/gpu=all IMAGE"
    check("no-driver", line, **answers, **podman, says=says)
    # Docker on Windows: the container is nearer than WSL
    check("no-driver", "docker run --gpus all IMAGE", **answers, **docker, is_wsl=True)
    check("no-driver", NVIDIA_PAGE, **answers, is_wsl=True, says=("installed on Windows",))


def test_no_driver_for_amd():
    answers = amd(amd_driver=False, distributions={"cupy-rocm-7-0": "14.2.0"})
    answers["compute"] = failed("HIPRuntimeError: hipErrorNoDevice: no ROCm-capable device", True)
    check("no-driver", ROCM_PAGE, **answers, says=("AMD GPU",))
    line = "docker run --device /dev/kfd --device /dev/dri IMAGE"
    check("no-driver", line, **answers, container="docker")


# --- driver too old

REMOVE_13 = "python -m pip uninstall -y cupy-cuda13x"


@pytest.mark.parametrize("driver", [(12, 0), (12, 4), (12, 10)])
def test_driver_too_old(driver):
    answers = nvidia(driver, distributions=CUDA_13, compute=failed(NO_DRIVER))
    found = check("driver-too-old", REMOVE_13, INSTALL_12, **answers, says=("update the driver",))
    assert "cupy-cuda13x" in found.summary
    assert dict(found.facts)["driver"] == f"offers CUDA 12.{driver[1]}"


def test_driver_too_old_by_any_error():
    """An import that fails says nothing of versions: driver and wheel do."""
    unknown = failed(NO_CUDART, None, None)
    check(
        "driver-too-old",
        REMOVE_13,
        INSTALL_12,
        **nvidia((12, 4), distributions=CUDA_13, compute=unknown),
    )


def test_driver_too_old_with_uv_or_conda():
    answers = nvidia((12, 4), compute=failed(NO_DRIVER))
    uv = ("uv pip uninstall cupy-cuda13x", 'uv pip install "cupy-cuda12x[ctk]"')
    check("driver-too-old", *uv, **answers, distributions=CUDA_13, has_pip=False)
    conda = ("conda remove -y cupy", CONDA + " cuda-version=12")
    check("driver-too-old", *conda, **answers, distributions=CONDA_CUPY, is_conda=True)
    mixed = (REMOVE_13, CONDA + " cuda-version=12")
    check("driver-too-old", *mixed, **answers, distributions=CUDA_13, is_conda=True)


def test_driver_too_old_for_every_cupy():
    answers = nvidia((11, 4), distributions=CUDA_12, compute=failed(NO_DRIVER, cuda=12090))
    check("driver-too-old", NVIDIA_PAGE, **answers, says=("Update the driver.",))
    says = ("Update the driver on the host.",)
    check("driver-too-old", NVIDIA_PAGE, **answers, container="docker", says=says)
    says = ("Update the driver on Windows.",)
    check("driver-too-old", NVIDIA_PAGE, **answers, is_wsl=True, says=says)


def test_driver_too_old_within_one_major_version():
    answers = nvidia((13, 0), distributions=CUDA_13, compute=failed(NO_DRIVER))
    check("driver-too-old", NVIDIA_PAGE, **answers, says=("Update the driver.",))


# --- two CuPys


def test_two_cupys():
    remove = "python -m pip uninstall -y cupy-cuda12x cupy-cuda13x"
    check("two-cupys", remove, INSTALL_13, **nvidia((13, 0), distributions=BOTH))
    check("two-cupys", remove, INSTALL_12, **nvidia((12, 8), distributions=BOTH))
    says = ("13.6.0 (cupy-cuda12x), 14.2.0 (cupy-cuda13x)",)
    check("two-cupys", remove, **nvidia(None, bus_vendors={INTEL}, distributions=BOTH), says=says)


def test_two_cupys_with_uv_or_conda():
    uv = ("uv pip uninstall cupy-cuda12x cupy-cuda13x", 'uv pip install "cupy-cuda13x[ctk]"')
    check("two-cupys", *uv, **nvidia(distributions=BOTH, has_pip=False))
    conda = ("python -m pip uninstall -y cupy-cuda13x", "conda remove -y cupy", CONDA)
    check("two-cupys", *conda, **nvidia(distributions=CONDA_CUPY | CUDA_13, is_conda=True))
    pip = ("python -m pip uninstall -y cupy cupy-cuda13x", INSTALL_13)
    check("two-cupys", *pip, **nvidia(distributions=CONDA_CUPY | CUDA_13))


def test_two_cupys_of_both_makers():
    both = {"cupy-cuda13x": "14.2.0", "cupy-rocm-7-0": "14.2.0"}
    remove = "python -m pip uninstall -y cupy-cuda13x cupy-rocm-7-0"
    check("two-cupys", remove, INSTALL_13, **nvidia(distributions=both))
    rocm = "python -m pip install cupy-rocm-7-0"
    check("two-cupys", remove, rocm, **amd(distributions=both))


# --- libraries missing


@pytest.mark.parametrize("error", [NO_CUBLAS, NO_NVRTC, NO_HEADERS, NO_CUDART])
def test_libraries_missing(error):
    answers = nvidia(distributions=CUDA_13, compute=failed(error))
    check("libraries-missing", INSTALL_13, **answers)
    # a wheel that works with the driver is kept, though there is a newer one
    answers["distributions"] = CUDA_12
    check("libraries-missing", INSTALL_12, **answers)


def test_libraries_missing_shows_the_telling_line():
    found = check(
        "libraries-missing",
        'uv pip install "cupy-cuda12x[ctk]"',
        **nvidia(distributions=CUDA_12, compute=failed(NO_CUDART), has_pip=False),
    )
    assert dict(found.facts)["error"] == (
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory"
    )


def test_libraries_missing_in_conda():
    answers = nvidia(compute=failed(NO_NVRTC), is_conda=True)
    check("libraries-missing", CONDA, **answers, distributions=CONDA_CUPY)
    # a wheel from pip inside a conda environment gets its libraries from pip
    check("libraries-missing", INSTALL_13, **answers, distributions=CUDA_13)


def test_libraries_missing_for_a_cupy_that_has_no_ctk():
    old = {"cupy-cuda12x": "13.6.0"}
    remove = "python -m pip uninstall -y "
    answers = nvidia(compute=failed(NO_NVRTC))
    lines = (remove + "cupy-cuda12x", INSTALL_13)
    check("libraries-missing", *lines, **answers, distributions=old)
    lines = (remove + "cupy", INSTALL_13)  # built from source
    check("libraries-missing", *lines, **answers, distributions=CONDA_CUPY)


def test_libraries_missing_for_amd():
    error = failed("ImportError: libhipblas.so.3: cannot open shared object file", None, None)
    answers = amd(distributions={"cupy-rocm-7-0": "14.2.0"}, compute=error)
    check("libraries-missing", ROCM_PAGE, **answers, says=("ROCm",))


# --- little memory


@pytest.mark.parametrize("free", [0, 100 * 2**20, 512 * 2**20 - 1])
def test_little_memory(free):
    answers = nvidia(distributions=CUDA_13, compute=computed(free))
    check("little-memory", WHO_NVIDIA, **answers, says=("of 80.0 GiB free",))


def test_enough_memory():
    check("ok-gpu", **nvidia(distributions=CUDA_13, compute=computed(512 * 2**20)))


@pytest.mark.parametrize(
    "error",
    [
        "OutOfMemoryError: Out of memory allocating 512 bytes",
        "CUDARuntimeError: cudaErrorMemoryAllocation: out of memory",
        "CUBLASError: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_little_memory_by_the_error(error):
    answers = nvidia(distributions=CUDA_13, compute=failed(error))
    check("little-memory", WHO_NVIDIA, **answers, says=(error,))


def test_little_memory_on_amd():
    compute = computed(10 * 2**20, is_hip=True, gpu="AMD Instinct MI300X")
    answers = amd(distributions={"cupy-rocm-7-0": "14.2.0"}, compute=compute)
    check("little-memory", "rocm-smi --showpids", **answers)


# --- broken


def test_cupy_broken():
    answers = nvidia(distributions=CUDA_13, compute=failed(GLIBCXX, None, None))
    found = check("cupy-broken", REMOVE_13, INSTALL_13, **answers)
    assert dict(found.facts)["error"] == GLIBCXX.splitlines()[0]
    answers["distributions"] = CUDA_12
    check("cupy-broken", "python -m pip uninstall -y cupy-cuda12x", INSTALL_12, **answers)
    answers["distributions"] = CONDA_CUPY
    check("cupy-broken", "conda remove -y cupy", CONDA, **answers, is_conda=True)


def test_gpu_too_old_for_the_wheel():
    error = failed("CompileException: nvrtc: error: invalid value for --gpu-architecture (-arch)")
    answers = nvidia(distributions=CUDA_13, compute=error, nvidia_capability=(6, 1))
    found = check("cupy-broken", REMOVE_13, INSTALL_12, **answers)
    assert "too old" in found.summary


def test_amd_without_the_right_to_the_device():
    error = failed("HIPRuntimeError: hipErrorNoDevice: no ROCm-capable device is detected", True)
    answers = amd(distributions={"cupy-rocm-7-0": "14.2.0"}, compute=error)
    lines = ("python -m pip uninstall -y cupy-rocm-7-0", "python -m pip install cupy-rocm-7-0")
    check("cupy-broken", *lines, **answers, says=("usermod -aG render,video",))


# --- where the course says more


@pytest.mark.parametrize(
    ("answers", "questions"),
    [
        (nvidia(), ["wheel"]),
        (nvidia(distributions=BOTH), ["wheel"]),
        (nvidia((12, 4), distributions=CUDA_13, compute=failed(NO_DRIVER)), ["wheel"]),
        (nvidia(distributions=CUDA_13, compute=failed(NO_CUBLAS)), ["wheel"]),
        (nvidia(distributions=CUDA_13, compute=failed(GLIBCXX)), ["wheel"]),
        (nvidia(distributions=CUDA_13, compute=computed(2**20)), ["memory", "freed"]),
        (nvidia(None, distributions=CUDA_13, compute=failed(NO_DRIVER)), []),
        ({"env": {"GPUML_DEVICE": "gpu"}}, []),
        ({}, []),
    ],
)
def test_the_notebook_that_answers_is_named_where_it_helps(answers, questions):
    found = doctor(Answers(**answers))
    named = [note for note in found.notes if "notebook" in note]
    assert named == ([answered(*questions)] if questions else []), found.case


# --- environment variables


@pytest.mark.parametrize("value", ["", "-1", " -1 ", "-1,0"])
def test_hidden_gpu_is_the_users_wish(value):
    env = {"CUDA_VISIBLE_DEVICES": value}
    says = ("unset CUDA_VISIBLE_DEVICES",)
    # the driver, too, sees no device then
    answers = nvidia(None, distributions=CUDA_13, compute=failed("CUDARuntimeError: NoDevice"))
    found = check("ok-cpu", **answers, env=env, says=says)
    assert "driver" not in dict(found.facts)
    check("ok-cpu", **nvidia(None), env=env, says=says)
    says = ("Remove-Item Env:CUDA_VISIBLE_DEVICES",)
    check("ok-cpu", **nvidia(None, platform="win32"), env=env, says=says)


@pytest.mark.parametrize("value", ["0", "1,0", "GPU-8932f937"])
def test_a_choice_of_gpus_hides_none(value):
    check("cupy-missing", INSTALL_13, **nvidia(), env={"CUDA_VISIBLE_DEVICES": value})


def test_forced_device_is_a_note():
    env = {"GPUML_DEVICE": "cpu"}
    answers = nvidia(distributions=CUDA_13, compute=computed())
    found = check("ok-gpu", **answers, env=env, says=("GPUML_DEVICE=cpu is set",))
    assert len(found.notes) == 2
    check("cupy-missing", INSTALL_13, **nvidia(), env=env, says=("GPUML_DEVICE=cpu is set",))


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", "GPUML_DEVICE=gpu cannot be had: this machine has no GPU of NVIDIA or AMD."),
        ("GPU:1", "GPUML_DEVICE=GPU:1 cannot be had: this machine"),
        ("nonsense", "GPUML_DEVICE=nonsense is no device: expected auto, cpu, gpu, or gpu:1"),
        ("gpu:", "GPUML_DEVICE=gpu: is no device"),
    ],
)
def test_a_forced_device_that_cannot_be_had(device, says):
    env = {"GPUML_DEVICE": device}
    check("device-forced", "unset GPUML_DEVICE", env=env, says=(says,))
    line = "Remove-Item Env:GPUML_DEVICE"
    check("device-forced", line, env=env, says=(says, NVIDIA_PAGE), platform="win32")


def test_a_forced_gpu_that_is_there_and_one_that_is_not():
    answers = nvidia(distributions=CUDA_13, compute=computed(count=2))
    for device in "gpu", "gpu:1", "GPU":
        check("ok-gpu", **answers, env={"GPUML_DEVICE": device})
    env = {"GPUML_DEVICE": "gpu:2"}
    check(
        "device-forced",
        "unset GPUML_DEVICE",
        **answers,
        env=env,
        says=("this machine has 2 in all, from gpu:0 on",),
    )
    # what ails the GPU is more to the point
    check("cupy-missing", INSTALL_13, **nvidia(), env={"GPUML_DEVICE": "gpu"})


# --- the text


def test_text_is_at_most_80_wide():
    answers = nvidia(None, distributions=CUDA_13, compute=failed(NO_DRIVER))
    text = str(check("no-driver", "sudo ubuntu-drivers install", **answers))
    assert max(map(len, text.splitlines())) <= 80


def test_diagnosis_without_facts_is_its_summary():
    assert str(Diagnosis("ok-cpu", "All well.")) == "All well."


# --- what the system is asked, on a file system of our own


def write(root, files: dict[str, str]) -> System:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return System(root)


def pci(**devices: tuple[str, str]) -> dict[str, str]:
    bus = "sys/bus/pci/devices"
    return {
        f"{bus}/{slot}/{kind}": value + "\n"
        for slot, values in devices.items()
        for kind, value in zip(("class", "vendor"), values, strict=True)
    }


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("shutil.which", lambda name: None)


@pytest.mark.usefixtures("linux")
def test_bus(tmp_path):
    system = write(
        tmp_path,
        pci(
            a=("0x030000", INTEL),
            b=("0x030200", NVIDIA),  # a data centre's GPU has no display
            c=("0x120000", AMD),  # AMD Instinct
            d=("0x020000", "0x15b3"),  # a network card
            e=("0x000300", "0x1af4"),
        ),
    )
    assert system.bus_vendors() == {INTEL, NVIDIA, AMD}


@pytest.mark.usefixtures("linux")
def test_sound_of_a_gpu_is_no_gpu(tmp_path):
    assert write(tmp_path, pci(a=("0x040300", NVIDIA))).bus_vendors() == set()
    assert System(tmp_path / "nowhere").bus_vendors() == set()


def test_driver_files_stand_for_the_bus_of_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    assert System(tmp_path).bus_vendors() == set()  # on Linux the bus knows
    kernel = {"proc/sys/kernel/osrelease": "6.6.87.2-microsoft-standard-WSL2\n"}
    assert write(tmp_path, kernel).bus_vendors() == {NVIDIA}
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert System(tmp_path).bus_vendors() == set()
    assert write(tmp_path, {"usr/lib/wsl/lib/libcuda.so.1": ""}).bus_vendors() == {NVIDIA}
    monkeypatch.setattr(sys, "platform", "win32")
    assert write(tmp_path / "c", {"Windows/System32/nvcuda.dll": ""}).bus_vendors() == {NVIDIA}


def test_marks_of_containers_wsl_and_amd(tmp_path):
    system = System(tmp_path)
    assert system.container() is None
    assert not any([system.is_wsl(), system.amd_driver(), system.has_rocm()])
    files = {".dockerenv": "", "dev/kfd": "", "opt/rocm/x": ""}
    write(tmp_path, files | {"proc/sys/kernel/osrelease": "5.15-Microsoft"})
    assert system.container() == "docker"
    assert system.is_wsl()
    assert system.amd_driver()
    assert system.has_rocm()
    assert write(tmp_path, {"run/.containerenv": ""}).container() == "podman"


def test_os_release(tmp_path):
    text = '# comment\nNAME="Rocky Linux"\nID=\'rocky\'\nID_LIKE="rhel centos fedora"\n\n'
    assert write(tmp_path, {"etc/os-release": text}).os_release() == {
        "NAME": "Rocky Linux",
        "ID": "rocky",
        "ID_LIKE": "rhel centos fedora",
    }
    assert System(tmp_path / "nowhere").os_release() == {}


def test_environments(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert not System().is_conda()
    (tmp_path / "conda-meta").mkdir()
    assert System().is_conda()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not System().has_pip()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "pip")
    assert System().has_pip()
    monkeypatch.setenv("GPUML_DEVICE", "gpu:1")
    assert System().environment("GPUML_DEVICE") == "gpu:1"
    assert System().environment("GPUML_NOT_SET") is None


def test_distributions(monkeypatch):
    def distribution(name, version):
        return types.SimpleNamespace(metadata={"Name": name}, version=version)

    installed = [
        distribution("cupy_cuda13x", "14.2.0"),
        distribution("CuPy-CUDA13x", "13.0"),  # the same again, further back on the path
        distribution("cupy", "14.1.0"),
        distribution("cupy-rocm-7-14", "14.2.0"),
        distribution("cupyimg", "0.1"),  # another project
        distribution(None, "1.0"),  # damaged
        distribution("numpy", "2.4.6"),
        distribution("numpydoc", "1.0"),
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(installed))
    assert System().distributions() == {
        "cupy": "14.1.0",
        "cupy-cuda13x": "14.2.0",
        "cupy-rocm-7-14": "14.2.0",
        "numpy": "2.4.6",
    }


class FakeDriver:
    """Of libcuda, what the doctor calls; each call returns an error code."""

    def __init__(self, version, code=0, capability=(9, 0)):
        self.version, self.code, self.capability = version, code, capability

    def cuInit(self, flags):  # noqa: N802
        return self.code

    def cuDriverGetVersion(self, pointer):  # noqa: N802
        pointer._obj.value = self.version
        return 0

    def cuDeviceGetAttribute(self, pointer, attribute, device):  # noqa: N802
        if attribute not in (75, 76):
            return 1
        pointer._obj.value = self.capability[attribute - 75]
        return 0


@pytest.mark.parametrize("library", ["libcuda.so.1", "nvcuda.dll", "/usr/lib/wsl/lib/libcuda.so.1"])
def test_nvidia_driver(library, monkeypatch):
    def load(name):
        if name != library:
            raise OSError(f"{name}: cannot open shared object file")
        return FakeDriver(12040, capability=(8, 6))

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert System().nvidia_driver() == (12, 4)
    assert System().nvidia_capability() == (8, 6)


def test_nvidia_driver_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(13000, code=100))  # no device
    assert System().nvidia_driver() is None
    assert System().nvidia_capability() is None


# --- computing, with a CuPy of our own


class FakeArray:
    def __init__(self, values, matmul_error=None):
        self.values, self.matmul_error = values, matmul_error

    def __rmul__(self, x):
        return FakeArray(x * self.values, self.matmul_error)

    def __add__(self, x):
        return FakeArray(self.values + x, self.matmul_error)

    def __matmul__(self, other):
        if self.matmul_error:
            raise self.matmul_error
        return FakeArray(self.values @ other.values)

    def sum(self):
        return self.values.sum()


def fake_cupy(count=1, device_error=None, matmul_error=None, scale=1):
    def get_device_count():
        if device_error:
            raise device_error
        return count

    runtime = types.SimpleNamespace(
        is_hip=False,
        runtimeGetVersion=lambda: 13020,
        getDeviceCount=get_device_count,
        getDeviceProperties=lambda index: {"name": b"NVIDIA T4"},
        memGetInfo=lambda: (14 * GIB, 15 * GIB),
    )
    cupy = types.ModuleType("cupy")
    cupy.__version__ = "14.2.0"
    cupy.cuda = types.SimpleNamespace(runtime=runtime)
    cupy.ones = lambda shape, dtype: FakeArray(scale * np.ones(shape, dtype), matmul_error)
    return cupy


def test_compute(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(count=2))
    assert System().compute() == Computation(
        error=None,
        version="14.2.0",
        is_hip=False,
        cuda=13020,
        count=2,
        gpu="NVIDIA T4",
        free=14 * GIB,
        total=15 * GIB,
    )


def test_compute_without_cublas(monkeypatch):
    error = ImportError(
        "libcublas.so.13: cannot open shared object file: No such file or directory"
    )
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(matmul_error=error))
    answer = System().compute()
    assert answer.error == NO_CUBLAS
    assert answer.gpu == "NVIDIA T4"


def test_compute_without_driver(monkeypatch):
    class CUDARuntimeError(RuntimeError):
        pass

    error = CUDARuntimeError(NO_DRIVER.partition(": ")[2])
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(device_error=error))
    assert System().compute() == Computation(NO_DRIVER, "14.2.0", False, 13020)


def test_compute_with_a_wrong_result(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(scale=2))
    assert "instead of 1536" in System().compute().error


def test_import_that_fails_and_warns(tmp_path, monkeypatch, capfd):
    text = "import warnings\nwarnings.warn('CuPy may not function')\nraise ImportError('no core')\n"
    (tmp_path / "cupy.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert System().compute() == Computation("ImportError: no core")
    assert capfd.readouterr() == ("", "")


# --- this very machine


def test_this_machine():
    found = doctor()
    assert json.loads(found.to_json())["case"] == found.case == doctor(System()).case
    assert found.ok == (not found.commands)
    assert found.summary in str(found)
    assert bool(System().distributions()["numpy"])


def test_cupy_is_not_imported_where_none_is_installed():
    code = (
        "import sys, gpuml.doctor as d\n"
        "assert 'cupy' not in sys.modules\n"
        "d.System.distributions = lambda self: {'numpy': '2.4.6'}\n"
        "d.doctor()\n"
        "assert 'cupy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
