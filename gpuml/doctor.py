"""Say whether GPU computing works on this machine and, if not, the exact line to type.

`System` asks the machine and concludes nothing; `doctor` concludes from the answers alone.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import textwrap
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuml.errors import answered

LITTLE_MEMORY = 512 * 2**20  # bytes; a CUDA context and cuBLAS's workspace take much of it

NVIDIA, AMD = "NVIDIA", "AMD"
_VENDORS = {"0x10de": NVIDIA, "0x1002": AMD}
_WHEELS = {"cupy-cuda13x": 13, "cupy-cuda12x": 12}  # of CuPy 14 for NVIDIA, newest CUDA first
_ROCM_WHEEL = "cupy-rocm-7-0"
_NVIDIA_DRIVERS = "https://www.nvidia.com/drivers"
_ROCM = "https://rocm.docs.amd.com"
_DRIVERS = {  # by ID or ID_LIKE of /etc/os-release: the line, and what to know about it
    "ubuntu": ("sudo ubuntu-drivers install", ""),
    "debian": (  # nvidia-driver alone brings neither the CUDA library for certain nor nvidia-smi
        "sudo apt install nvidia-driver libcuda1 nvidia-smi",
        "Debian keeps the driver in its components contrib and non-free.",
    ),
    "manjaro": ("sudo mhwd -a pci nonfree 0300", ""),
    "arch": ("sudo pacman -Syu nvidia-open", "GPUs before Turing need an older driver."),
}
_FEDORA_DRIVER = (  # by ID only: what is merely like Fedora may have no dnf, or other packages
    "sudo dnf install akmod-nvidia xorg-x11-drv-nvidia-cuda",
    "Fedora's driver comes from RPM Fusion (nonfree), to be enabled first.",
)
_RESTART = (
    "If a driver is installed already, nvidia-smi says what is wrong with it. After an "
    "update of the driver or the kernel, restart the machine."
)
_ANSWERED = {  # by the case: questions of the course
    "ok-gpu": ("slower", "first_call"),
    "little-memory": ("memory", "freed"),
    "cupy-missing": ("wheel",),
    "driver-too-old": ("wheel",),
    "two-cupys": ("wheel",),
    "libraries-missing": ("wheel",),
    "cupy-broken": ("wheel",),
}
_BUILT_IN = "ROCm knows few of the GPUs built into processors; without it the CPU computes."
_RIGHTS = "ROCm needs the right to open /dev/kfd: sudo usermod -aG render,video $USER"

_MISSING_LIBRARY = re.compile(
    r"DynamicLibNotFound|Failure finding|failed to load \S*lib|DLL load failed|CUDA headers"
    r"|open source file|(cublas|nvrtc|cudart|cufft|curand|cusolver|cusparse|nvJitLink|hip|roc)"
    r"\S*: cannot open shared object",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(r"out.?of.?memory|ErrorMemoryAllocation|ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class Computation:
    """What CuPy answered when asked to compute; None from the point on where it failed."""

    error: str | None = None  # kind and text of the exception; None if the result was right
    version: str | None = None
    is_hip: bool | None = None  # made for AMD
    cuda: int | None = None  # CUDA version it was made for: 1000 major + 10 minor
    count: int | None = None  # of devices; what follows is about the first
    gpu: str | None = None
    free: int | None = None  # bytes
    total: int | None = None


class System:
    """Ask this machine, one raw question a method.

    Parameters
    ----------
    root : path, optional
        Where the file system begins; another place in tests only.
    """

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)

    def platform(self) -> str:
        """Return ``"linux"``, ``"win32"`` or ``"darwin"``."""
        return sys.platform

    def is_wsl(self) -> bool:
        """Whether the Linux kernel is that of Windows."""
        return "microsoft" in self._read("proc/sys/kernel/osrelease").lower()

    def container(self) -> str | None:
        """Return ``"docker"`` or ``"podman"`` inside such a container."""
        if (self.root / "run/.containerenv").exists():
            return "podman"
        return "docker" if (self.root / ".dockerenv").exists() else None

    def os_release(self) -> dict[str, str]:
        """Return the fields of /etc/os-release; none where there is no such file."""
        pairs = (line.partition("=") for line in self._read("etc/os-release").splitlines())
        return {key: value.strip("\"' ") for key, equals, value in pairs if equals}

    def environment(self, name: str) -> str | None:
        """Return an environment variable."""
        return os.environ.get(name)

    def is_conda(self) -> bool:
        """Whether this Python belongs to a conda environment."""
        return (Path(sys.prefix) / "conda-meta").is_dir()

    def has_pip(self) -> bool:
        """Whether pip is there; environments made by uv have none."""
        return importlib.util.find_spec("pip") is not None

    def distributions(self) -> dict[str, str]:
        """Return name and version of NumPy and of all CuPys that are installed."""
        found: dict[str, str] = {}
        for distribution in importlib.metadata.distributions():
            # A damaged installation has no name; the first of a name is what is imported.
            name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
            if re.fullmatch(r"numpy|cupy(-cuda\d+x?|-rocm-[\d-]+)?|amd-cupy", name):
                found.setdefault(name, distribution.version)
        return dict(sorted(found.items()))

    def bus_vendors(self) -> frozenset[str]:
        """Return the PCI vendors, such as ``"0x10de"``, of display devices and accelerators."""
        vendors = set()
        for device in (self.root / "sys/bus/pci/devices").glob("*"):
            # 0x03 are displays, headless ones too; 0x12 accelerators, as AMD's Instinct is
            if self._read(device / "class").startswith(("0x03", "0x12")):
                vendors.add(self._read(device / "vendor").strip())
        if self.platform() == "win32" or self.is_wsl():  # the bus is hidden: the driver's files
            files = ("usr/lib/wsl/lib/libcuda.so.1", "Windows/System32/nvcuda.dll")
            if any((self.root / file).exists() for file in files) or shutil.which("nvidia-smi"):
                vendors.add("0x10de")
        return frozenset(vendors)

    def nvidia_driver(self) -> tuple[int, int] | None:
        """Return the newest CUDA that NVIDIA's driver offers; None if no driver answers."""
        driver, version = self._driver(), ctypes.c_int()
        if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
            return None
        return version.value // 1000, version.value % 1000 // 10

    def nvidia_capability(self) -> tuple[int, int] | None:
        """Return the compute capability of NVIDIA's first GPU."""
        driver, values = self._driver(), (ctypes.c_int(), ctypes.c_int())
        if driver is None:
            return None
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        for value, attribute in zip(values, (75, 76), strict=True):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0):
                return None
        return values[0].value, values[1].value

    def amd_driver(self) -> bool:
        """Whether AMD's driver for computing is loaded."""
        return (self.root / "dev/kfd").exists()

    def has_rocm(self) -> bool:
        """Whether ROCm is in its usual place."""
        return (self.root / "opt/rocm").exists()

    def compute(self) -> Computation:
        """Import CuPy and compute on the first device.

        An elementwise operation needs the compiler NVRTC and CUDA's headers, a matrix product
        needs cuBLAS: only computing shows that they are there.
        """
        answer: dict[str, Any] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cupy = importlib.import_module("cupy")
                runtime = cupy.cuda.runtime
                answer.update(version=cupy.__version__, is_hip=bool(runtime.is_hip))
                answer["cuda"] = runtime.runtimeGetVersion()
                answer["count"] = runtime.getDeviceCount()
                answer["gpu"] = runtime.getDeviceProperties(0)["name"].decode()
                answer["free"], answer["total"] = runtime.memGetInfo()
                a = cupy.ones((8, 8), dtype="float32")
                result = float(((2 * a + 1) @ a).sum())
                if result != 8 * 8 * 8 * 3:
                    raise ArithmeticError(f"the GPU computed {result} instead of 1536.0")
        except Exception as error:  # of any kind: it is what the user would meet
            answer["error"] = f"{type(error).__name__}: {str(error).strip()}"
        return Computation(**answer)

    def _read(self, path: str | Path) -> str:
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _driver(self) -> ctypes.CDLL | None:
        for name in ("libcuda.so.1", "nvcuda.dll", "/usr/lib/wsl/lib/libcuda.so.1"):
            try:
                driver = ctypes.CDLL(name)
            except OSError:
                continue
            return driver if driver.cuInit(0) == 0 else None
        return None


@dataclass(frozen=True)
class Diagnosis:
    """What is the matter, and what to type.

    Attributes
    ----------
    case : str
        ``ok-gpu``, ``ok-cpu``, ``cupy-missing``, ``no-driver``, ``driver-too-old``,
        ``two-cupys``, ``libraries-missing``, ``little-memory``, ``cupy-broken`` or
        ``device-forced``.
    summary : str
        One sentence.
    commands : tuple of str
        Lines to type, in this order (an address: into the browser); none when all is well.
    notes : tuple of str
        What else to know.
    facts : tuple of (str, str)
        What was found: label and value.
    """

    case: str
    summary: str
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return self.case.startswith("ok-")

    @property
    def reason(self) -> str:
        """The summary for one who cannot have the GPU, without "All well ...:" before it."""
        return self.summary.partition(": ")[2] if self.ok else self.summary

    def __str__(self) -> str:
        blocks = [[self.summary], [_wrap(f"  {label:8}", value) for label, value in self.facts]]
        if self.commands:
            blocks.append(["What to type:", *(f"  {command}" for command in self.commands)])
        blocks.append([_wrap("Note: ", note) for note in self.notes])
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def to_json(self) -> str:
        """Return the same for programs: case, ok, summary, commands, notes, facts."""
        fields = {"case": self.case, "ok": self.ok, **vars(self), "facts": dict(self.facts)}
        return json.dumps(fields, indent=2, ensure_ascii=False)


def doctor(system: System | None = None) -> Diagnosis:
    """Say whether GPU computing works on this machine and, if not, what to type.

    Parameters
    ----------
    system : System, optional
        Whom to ask, and nobody else; this machine unless given. Nothing is changed.

    Returns
    -------
    Diagnosis
    """
    answers = _Answers(system or System())
    found = _case(answers)
    facts = _facts(answers, found.ok)
    found = _with_forced_device(answers, found)
    more = (answered(*_ANSWERED[found.case]),) if found.case in _ANSWERED else ()
    return replace(found, notes=(*found.notes, *more), facts=facts)


class _Answers:
    """The system's answers, and what follows from them at once."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.cupys = system.distributions()
        self.numpy = self.cupys.pop("numpy", "")
        self.cupy = " and ".join(self.cupys)
        # Of two CuPys it is chance which files are imported: an answer would say nothing.
        self.computed = system.compute() if len(self.cupys) == 1 else Computation()
        self.error = self.computed.error or ""
        self.works = len(self.cupys) == 1 and not self.error

        for_amd = self.computed.is_hip or re.fullmatch(r"cupy-rocm\S*|amd-cupy", self.cupy)
        for_nvidia = self.computed.is_hip is False or re.fullmatch(r"cupy-cuda\S*", self.cupy)
        self.made_for = AMD if for_amd else NVIDIA if for_nvidia else None
        self.driver = system.nvidia_driver()
        makers = {_VENDORS[vendor] for vendor in system.bus_vendors() if vendor in _VENDORS}
        makers |= {NVIDIA} if self.driver else set()
        order = (self.made_for, NVIDIA, AMD)
        self.maker = next((maker for maker in order if maker in makers), None)
        self.driver_answers = system.amd_driver() if self.maker == AMD else self.driver is not None

        visible = system.environment("CUDA_VISIBLE_DEVICES")
        self.hidden = visible is not None and visible.split(",")[0].strip() in ("", "-1")
        wheel = re.fullmatch(r"cupy-cuda(\d\d).*", self.cupy)
        made_for_cuda = int(wheel[1]) if wheel else (self.computed.cuda or 0) // 1000
        insufficient = "InsufficientDriver" in self.error
        self.driver_too_old = self.maker == NVIDIA and (
            insufficient or bool(self.driver and self.driver[0] < made_for_cuda)
        )
        capability = system.nvidia_capability()
        self.before_turing = capability is not None and capability < (7, 5)
        # CUDA 13 compiles for no GPU before Turing, whatever the driver offers.
        newest = 12 if self.before_turing else 13
        newest = min(newest, self.driver[0]) if self.driver else newest
        self.fitting = [wheel for wheel, cuda in _WHEELS.items() if cuda <= newest]
        if self.maker == AMD:
            self.fitting = [_ROCM_WHEEL]

    def install(self, wheel: str = "") -> str:
        """Return the line that installs this wheel, or the best that fits."""
        best = wheel or (self.fitting or ["cupy-cuda12x"])[0]
        if not wheel and self.system.is_conda() and self.maker == NVIDIA:  # conda has none for AMD
            pin = " cuda-version=12" if best == "cupy-cuda12x" else ""
            return f"conda install -c conda-forge cupy{pin}"
        pip = "python -m pip" if self.system.has_pip() else "uv pip"
        return f"{pip} install " + (best if self.maker == AMD else f'"{best}[ctk]"')

    def reinstall(self, wheel: str = "") -> tuple[str, ...]:
        """Return lines that uninstall every CuPy and install this wheel, or what fits best."""
        by_conda = self.system.is_conda() and "cupy" in self.cupys
        wheels = " ".join(name for name in self.cupys if not (by_conda and name == "cupy"))
        pip = "python -m pip uninstall -y" if self.system.has_pip() else "uv pip uninstall"
        by_pip = (f"{pip} {wheels}",) if wheels else ()
        lines = (*by_pip, "conda remove -y cupy") if by_conda else by_pip
        return (*lines, self.install(wheel)) if self.maker else lines

    def driver_lines(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return commands and notes for a driver that does not answer."""
        tool = self.system.container()
        if tool:
            gpu = "--gpus all" if tool == "docker" else "--device nvidia.com/gpu=all"
            gpu = "--device /dev/kfd --device /dev/dri" if self.maker == AMD else gpu
            note = "Start the container with its GPU; the driver itself belongs on the host."
            return (f"{tool} run {gpu} IMAGE",), (note,)
        if self.maker == AMD:
            return (_ROCM,), ("AMD's driver for computing comes with ROCm.", _BUILT_IN)
        if self.system.is_wsl():
            return (_NVIDIA_DRIVERS,), ("In WSL the driver is installed on Windows, not in Linux.",)
        release = self.system.os_release()
        names = (release.get("ID", ""), *release.get("ID_LIKE", "").split())
        known = next((_DRIVERS[name] for name in names if name in _DRIVERS), (_NVIDIA_DRIVERS, ""))
        line, note = _FEDORA_DRIVER if names[0] == "fedora" else known
        return (line,), (note, _RESTART) if note else (_RESTART,)


def _case(a: _Answers) -> Diagnosis:
    """Return the first case that fits."""
    if a.system.platform() == "darwin":
        return Diagnosis("ok-cpu", "All well on the CPU: CuPy does not support the GPUs of Macs.")
    if len(a.cupys) > 1:
        summary = f"{len(a.cupys)} CuPys are installed, and overwrite each other's files."
        return Diagnosis("two-cupys", summary, a.reinstall())
    if a.works and (a.computed.free or 0) >= LITTLE_MEMORY:
        return Diagnosis("ok-gpu", f"All well: {a.computed.gpu} computes.")
    if a.works or _OUT_OF_MEMORY.search(a.error):
        return _little_memory(a)
    if a.maker is None:
        return _no_gpu(a)
    if a.hidden:
        return _hidden_gpu(a)
    if not a.cupys or a.made_for not in (None, a.maker):
        return _cupy_missing(a)
    if not a.driver_answers:
        summary = f"This machine has an {a.maker} GPU, but no driver answers."
        return Diagnosis("no-driver", summary, *a.driver_lines())
    if a.driver_too_old:
        return _old_driver(a)
    if _MISSING_LIBRARY.search(a.error):
        return _libraries_missing(a)
    return _cupy_broken(a)


def _with_forced_device(a: _Answers, found: Diagnosis) -> Diagnosis:
    """Add what GPUML_DEVICE does, which is the case itself where that device cannot be had."""
    forced = a.system.environment("GPUML_DEVICE")
    if not forced:
        return found
    known = re.fullmatch(r"auto|cpu|gpu(?::(\d+))?", forced.strip().lower())
    n_gpus = a.computed.count or 0 if found.case == "ok-gpu" else 0
    if not known:
        reason = "is no device: expected auto, cpu, gpu, or gpu:1."
    elif found.ok and known[0].startswith("gpu") and int(known[1] or 0) >= n_gpus:
        there_are = f"this machine has {n_gpus} in all, from gpu:0 on." if n_gpus else found.reason
        reason = f"cannot be had: {there_are}"
    else:
        note = f"GPUML_DEVICE={forced} is set: gpuml uses that device and does not choose one."
        return replace(found, notes=(*found.notes, note))
    unset = "Remove-Item Env:" if a.system.platform() == "win32" else "unset "
    return Diagnosis(
        "device-forced", f"GPUML_DEVICE={forced} {reason}", (f"{unset}GPUML_DEVICE",), found.notes
    )


def _little_memory(a: _Answers) -> Diagnosis:
    nvidia = "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"
    command = "rocm-smi --showpids" if a.computed.is_hip else nvidia
    summary = "The GPU answers, but hardly any of its memory is free."
    note = "The line shows who holds the memory; end those processes that are yours."
    return Diagnosis("little-memory", summary, (command,), (note,))


def _no_gpu(a: _Answers) -> Diagnosis:
    on_windows = a.system.platform() == "win32" or a.system.is_wsl()
    note = f"Windows shows an NVIDIA GPU once its driver is installed: {_NVIDIA_DRIVERS}"
    summary = "All well on the CPU: this machine has no GPU of NVIDIA or AMD."
    return Diagnosis("ok-cpu", summary, notes=(note,) if on_windows else ())


def _hidden_gpu(a: _Answers) -> Diagnosis:
    on_windows = a.system.platform() == "win32"
    show = ("Remove-Item Env:" if on_windows else "unset ") + "CUDA_VISIBLE_DEVICES"
    summary = "All well on the CPU: CUDA_VISIBLE_DEVICES hides the GPU."
    return Diagnosis("ok-cpu", summary, notes=(f"To see the GPU again: {show}",))


def _cupy_missing(a: _Answers) -> Diagnosis:
    but = f"{a.cupy} is not made for it" if a.cupys else "CuPy is not installed"
    summary = f"This machine has an {a.maker} GPU, but {but}."
    if not a.driver_answers:
        commands, notes = a.driver_lines()
        first = "The driver comes first; the doctor then names the CuPy that fits it."
        return Diagnosis("cupy-missing", summary, (*commands, "gpuml doctor"), (first, *notes))
    commands, notes = a.reinstall(), (_BUILT_IN,) if a.maker == AMD else ()
    if a.maker == AMD and not a.system.has_rocm():
        commands, notes = (_ROCM, *commands), ("ROCm 7 comes first.", *notes)
    if not a.fitting:
        commands = (_NVIDIA_DRIVERS, *commands)
        notes = ("The driver is too old for any CuPy; its update comes first.",)
    return Diagnosis("cupy-missing", summary, commands, notes)


def _old_driver(a: _Answers) -> Diagnosis:
    summary = f"NVIDIA's driver is too old for the CuPy that is installed ({a.cupy})."
    where = " on the host" if a.system.container() else " on Windows" if a.system.is_wsl() else ""
    if not a.fitting or a.cupy in a.fitting:  # no other CuPy would do better
        note = f"Update the driver{where}."
        return Diagnosis("driver-too-old", summary, (_NVIDIA_DRIVERS,), (note,))
    note = f"Or keep this CuPy and update the driver{where}: {_NVIDIA_DRIVERS}"
    return Diagnosis("driver-too-old", summary, a.reinstall(), (note,))


def _libraries_missing(a: _Answers) -> Diagnosis:
    if a.maker == AMD:
        summary = "CuPy does not find the libraries of ROCm 7."
        return Diagnosis("libraries-missing", summary, (_ROCM,))
    commands = a.reinstall()
    if a.cupy == "cupy" and a.system.is_conda():
        commands = (a.install(),)
    elif a.cupy in a.fitting and int(a.cupys[a.cupy].split(".")[0]) >= 14:  # older: no [ctk]
        commands = (a.install(a.cupy),)
    summary = "CuPy does not find the libraries or the headers of CUDA."
    return Diagnosis("libraries-missing", summary, commands)


def _cupy_broken(a: _Answers) -> Diagnosis:
    summary = "CuPy is installed, but does not work."
    if a.before_turing and a.cupy not in a.fitting:
        summary = f"This GPU is too old for CUDA 13, and so for the CuPy installed ({a.cupy})."
    commands = a.reinstall(a.cupy if a.cupy in a.fitting else "")
    return Diagnosis("cupy-broken", summary, commands, (_RIGHTS,) if a.maker == AMD else ())


def _facts(a: _Answers, ok: bool) -> tuple[tuple[str, str], ...]:
    """Say what was found, for a person to read."""
    c, system, driver = a.computed, a.system, ""
    if a.maker == NVIDIA and not a.hidden:  # a hidden GPU's driver answers "no device"
        driver = "offers CUDA {}.{}".format(*a.driver) if a.driver else "does not answer"
    elif a.maker == AMD:
        driver = "is loaded" if a.driver_answers else "does not answer"
    gpu = f"{c.gpu}, the first of {c.count}" if c.gpu and c.count != 1 else c.gpu
    gib = [f"{n / 2**30:.1f}" for n in (c.free, c.total) if n is not None]
    place = f", in {system.container()}" if system.container() else ", WSL" * system.is_wsl()
    facts = {
        "GPU": gpu or a.maker or "none",
        "memory": f"{gib[0]} of {gib[1]} GiB free" if gib else "",
        "driver": driver,
        "CuPy": ", ".join(f"{version} ({name})" for name, version in a.cupys.items()),
        "error": "" if ok else telling_line(a.error),
        "NumPy": a.numpy,
        "system": system.os_release().get("PRETTY_NAME", system.platform()) + place,
    }
    return tuple((label, value) for label, value in facts.items() if value)


def telling_line(error: str) -> str:
    """Return the line with the cause; CuPy buries that of a failed import in advice."""
    original = error.partition("Original error:")[2] or error
    return next((line.strip() for line in original.splitlines() if line.strip()), "")


def _wrap(start: str, text: str) -> str:
    """Wrap a text, but break no word: it may be a path or a piece of a command."""
    wrapper = textwrap.TextWrapper(80, initial_indent=start, subsequent_indent=" " * len(start))
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(text)
