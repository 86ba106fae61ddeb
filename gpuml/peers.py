"""Perceptrons trained by gpuml and by its peers, each in its own process, in one run.

All start from the same weights and see the same batches; a time counts only if the losses agree.
How each of them trains is in :mod:`gpuml.rivals`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gpuml.datasets import load_dataset
from gpuml.devices import CPU, Device, cpu_count, get_device
from gpuml.errors import DataError, printable
from gpuml.rivals import RIVALS, SCIKIT_LEARN, Task
from gpuml.timing import device_ceilings, duration
from gpuml.workloads import WORKLOADS, Workload, write_task

# How far losses may lie from their median, as a share of the loss and of its fall, whichever is
# less. Rounding differs from library to library, and training carries it on; what is wrong in
# earnest is off by far more.
LIMITS = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 3e-2}
# scikit-learn draws its own start weights and batches: it must learn about as well.
OWN_START = {SCIKIT_LEARN: 0.5}

GPU_RIVALS = tuple(name for name in RIVALS if name not in ("gpuml", SCIKIT_LEARN))
CPU_RIVALS = ("gpuml", SCIKIT_LEARN, "PyTorch eager", "JAX scan")
POPULATION_RIVALS = ("gpuml fused", "gpuml graph", "gpuml eager", "PyTorch eager", "JAX scan")
PROCESS_RIVALS = ("gpuml", "PyTorch eager", "PyTorch step graph", "JAX scan", SCIKIT_LEARN)

N_ROUNDS = 5
PATIENCE = 300.0  # seconds to wait for an answer; compilers may take a minute
FEWEST_EPOCHS, MOST_EPOCHS = 3, 100_000  # in a sample
HEAD = ("", "µs a step", "quartiles", "× gpuml", "floor is", "first call")
WIDTHS = (25, 11, 17, 9, 9, 11)


def with_threads(rival: str, n_threads: int | None) -> str:
    """Return a rival's name with the number of its threads, if it was told one."""
    if n_threads is None:
        return rival
    return f"{rival}, {n_threads} thread" + "s" * (n_threads > 1)


@dataclass(frozen=True)
class Timing:
    """How fast one rival is.

    Attributes
    ----------
    seconds, low, high : float
        Of a step, or of a whole process: the median of the rounds, and the quartiles.
    first_call : float
        Seconds until the first epoch was done, compilation and capture included.
    loss : float
        Mean over the last of the epochs after which losses are compared.
    version : str
        Of its library.
    how : str
        gpuml's engine.
    n_threads : int or None
        On the CPU, where it was told: the best of several counts.
    """

    seconds: float
    low: float
    high: float
    first_call: float
    loss: float
    version: str = ""
    how: str = ""
    n_threads: int | None = None

    def name(self, rival: str) -> str:
        """Return the rival's name with the number of its threads."""
        return with_threads(rival, self.n_threads)


@dataclass(frozen=True)
class PeerTable:
    """One workload, by all rivals.

    Attributes
    ----------
    title, device, date : str
    floor : float
        Seconds that a step takes at least on this device; 0 where it makes no sense.
    bound : str
        By what: ``"arithmetic"`` or ``"memory"``; empty for whole processes.
    n_steps : int
        After so many the losses were compared.
    first_loss : float
        Mean over the first epoch.
    rivals : dict of str to Timing
        The fastest first.
    left_out : dict of str to str
        And why.
    n_models : int
        How many were trained at once.
    """

    title: str
    device: str
    date: str
    floor: float
    bound: str
    n_steps: int
    first_loss: float
    rivals: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    n_models: int = 1

    @property
    def ours(self) -> float | None:
        """The best time of gpuml in seconds, or None if it was left out."""
        times = [t.seconds for name, t in self.rivals.items() if name.startswith("gpuml")]
        return min(times, default=None)

    def ratio(self, rival: str) -> float | None:
        """Return how many times longer than gpuml's best a rival takes."""
        return None if self.ours is None else self.rivals[rival].seconds / self.ours

    def _cells(self, rival: str) -> Iterator[str]:
        timing, ratio = self.rivals[rival], self.ratio(rival)
        unit = 1e6 if self.bound else 1.0
        digits = 1 if self.bound else 2
        yield timing.name(rival)
        yield f"{timing.seconds * unit:,.{digits}f}"
        yield f"{timing.low * unit:,.{digits}f}–{timing.high * unit:,.{digits}f}"
        yield "–" if ratio is None else f"{ratio:.2f}"
        if self.bound:
            yield f"{self.floor / timing.seconds:.1%}"
            yield duration(timing.first_call)

    def __str__(self) -> str:
        losses = sorted(timing.loss for timing in self.rivals.values())
        versions = {f"{name.split()[0]} {t.version}" for name, t in self.rivals.items()}
        lines = [self.title, f"on {self.device}", ", ".join(sorted(versions))]
        if self.bound:
            lines.append(f"floor {duration(self.floor)} a step, set by {self.bound}")
        if losses:
            fell = f"from {self.first_loss:.4g} to {losses[0]:.5g}–{losses[-1]:.5g}"
            lines.append(f"after {self.n_steps:,} steps the mean loss of an epoch fell {fell}")
        head = HEAD if self.bound else ("", "seconds", *HEAD[2:4])
        for cells in (head, *(list(self._cells(rival)) for rival in self.rivals)):
            name, *numbers = cells
            widths = WIDTHS[1 : 1 + len(numbers)]
            right = [cell.rjust(width) for cell, width in zip(numbers, widths, strict=True)]
            lines.append("".join([name.ljust(WIDTHS[0]), *right]).rstrip())
        for name, timing in self.rivals.items():
            if timing.how and not name.endswith(timing.how):
                lines.append(f"{name} ran by its engine {timing.how}")
        lines += [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)

    def plot(self, axis: Any = None) -> Any:
        """Draw the times of all rivals and the floor; see :func:`gpuml.plots.step_times`."""
        from gpuml import plots

        seconds = {timing.name(name): timing.seconds for name, timing in self.rivals.items()}
        title = f"{self.title}\nmeasured on {self.device.partition(',')[0]}, {self.date}"
        return plots.step_times(seconds, self.floor, title, ours="gpuml", axis=axis)

    def to_json(self) -> dict[str, Any]:
        """Return the table as what JSON can hold; :meth:`from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> PeerTable:
        """Make a table again from what :meth:`to_json` returned.

        Raises
        ------
        DataError
            If it is something else.
        """
        try:
            rivals = {name: Timing(**timing) for name, timing in table["rivals"].items()}
            made = cls(**(dict(table) | {"rivals": rivals}))
            str(made)  # which meets text where numbers should be
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise DataError(f"this is no table of peers: {printable(repr(error))}") from None
        return made


def by_number(tables: Iterable[PeerTable]) -> dict[str, tuple[list[int], list[float]]]:
    """Return for each rival how long a step takes as the number of models grows.

    Parameters
    ----------
    tables : iterable of PeerTable
        Of one workload with several numbers of models.

    Returns
    -------
    dict of str to (list of int, list of float)
        Numbers of models, in order, and seconds of a step of all of them.
    """
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for table in sorted(tables, key=lambda table: table.n_models):
        for name, timing in table.rivals.items():
            numbers, seconds = lines.setdefault(name, ([], []))
            numbers.append(table.n_models)
            seconds.append(timing.seconds)
    return lines


class LeftOutError(Exception):
    """A rival cannot take part; the message says why."""


class Contender:
    """A rival in a process of its own, which trains when it is asked to.

    Parameters
    ----------
    rival : str
    task : Task
    device : Device
    n_threads : int, optional
        On the CPU; what the library chooses unless given.
    patience : float
        Seconds to wait for an answer.
    """

    def __init__(
        self,
        rival: str,
        task: Task,
        device: Device,
        n_threads: int | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.rival, self.n_threads, self.patience = rival, n_threads, patience
        self.name = with_threads(rival, n_threads)
        self.samples: list[float] = []
        self.n_epochs = 1  # in a sample, beyond the first
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command(rival, task),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment(device, n_threads),
            start_new_session=True,  # with the processes that it starts, as compilers do
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(OSError):  # what was written after it had ended
                pipe.close()  # type: ignore[union-attr]

    def greet(self) -> None:
        """Wait until its library is loaded."""
        self.version = str(self._answer()["version"])

    def train(self, n_epochs: int) -> dict[str, Any]:
        """Let it train from the start weights on; return seconds and losses.

        Raises
        ------
        LeftOutError
            If it fails, ends, or takes too long.
        """
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: the answer says why
            self._process.stdin.write(f"{n_epochs}\n")
            self._process.stdin.flush()
        return self._answer()

    def check(self, n_epochs: int) -> None:
        """Let it compile, and train until the losses are to agree."""
        self.first_call = float(self.train(1)["seconds"])
        answer = self.train(n_epochs)
        self.first_loss, self.loss = float(answer["first_loss"]), float(answer["last_loss"])
        self.how = str(answer["how"])

    def calibrate(self, time_budget: float) -> None:
        """Find how many epochs fill the time for a sample."""
        begin, n = float(self.train(1)["seconds"]), 1
        while True:
            spent = float(self.train(1 + n)["seconds"]) - begin
            if spent > time_budget / 2 or n >= MOST_EPOCHS:
                break
            n *= 4
        self.n_epochs = max(FEWEST_EPOCHS, round(n * min(1.0, time_budget / spent)))

    def sample(self, n_steps: int) -> None:
        """Time some epochs beyond the first, which bears what each call costs once."""
        short, long = (float(self.train(n)["seconds"]) for n in (1, 1 + self.n_epochs))
        self.samples.append((long - short) / (self.n_epochs * n_steps))

    def timing(self) -> Timing:
        """Return what was found."""
        low, middle, high = np.quantile(self.samples, [0.25, 0.5, 0.75]).tolist()
        return Timing(
            middle, low, high, self.first_call, self.loss, self.version, self.how, self.n_threads
        )

    def _kill(self) -> None:
        """End it, and what it started."""
        if self._process.returncode is not None:
            return  # its number may be another's by now
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + self.patience
        timer = threading.Timer(self.patience, self._kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            if time.monotonic() >= end:
                raise LeftOutError(f"gave no answer within {duration(self.patience)}")
            raise LeftOutError(f"ended with exit code {self._process.wait()}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LeftOutError(str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["it said nothing"])[-1][:200]


def command(rival: str, task: Task) -> list[str]:
    """Return what starts a rival's process."""
    return [sys.executable, "-m", "gpuml.rivals", rival, json.dumps(asdict(task))]


def environment(device: Device, n_threads: int | None = None) -> dict[str, str]:
    """Return the environment of a rival's process: quiet, its GPU the first, its threads."""
    given = os.environ
    home = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [given.get("PYTHONPATH"), home]))
    changed = {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    changed |= {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if device.kind == "cpu":
        changed["JAX_PLATFORMS"] = "cpu"
    else:
        visible = given.get("CUDA_VISIBLE_DEVICES", "").split(",")
        seen = visible[device.index] if device.index < len(visible) else ""
        changed["CUDA_VISIBLE_DEVICES"] = seen.strip() or str(device.index)
    if n_threads is not None:
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
        changed |= dict.fromkeys(names, str(n_threads))  # NPROC: XLA's
    return {**given, **changed}


def disagreeing(losses: Mapping[str, tuple[float, float]], limit: float) -> dict[str, str]:
    """Return whose loss is far from the median of all, and why it does not count.

    Parameters
    ----------
    losses : mapping of str to (float, float)
        Of each rival in the first and in the last epoch, after the same number of steps.
    limit : float
        Allowed distance as a share of the last loss and of its fall, whichever is less;
        scikit-learn has a limit of its own.

    Returns
    -------
    dict of str to str
        Of two that differ both are named: there is no telling who is right.
    """
    limits = {name: OWN_START.get(name.partition(",")[0], limit) for name in losses}
    alike = [both for name, both in losses.items() if limits[name] == limit]
    alike = [both for both in alike if all(map(math.isfinite, both))] or [(math.nan, math.nan)]
    first, middle = (statistics.median(column) for column in zip(*alike, strict=True))
    scale = min(abs(middle), abs(first - middle))
    return {
        name: f"its loss is {last:.6g}, the median {middle:.6g}: they must agree within "
        f"{limits[name] * scale:.2g} before a time counts"
        for name, (_, last) in losses.items()
        if not abs(last - middle) <= limits[name] * scale
    }


class Team:
    """Contenders that take turns; who fails leaves, and the others go on.

    Parameters
    ----------
    contenders : sequence of Contender

    Attributes
    ----------
    contenders : list of Contender
        Those that are left.
    """

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self.contenders = list(contenders)
        self._reasons: dict[str, str] = {}

    def each(self, action: Callable[[Contender], None]) -> None:
        """Let each do something, one after the other, beginning with another each time."""
        for contender in list(self.contenders):
            try:
                action(contender)
            except LeftOutError as error:
                self._dismiss(contender, str(error))
        self.contenders = self.contenders[1:] + self.contenders[:1]

    def compare_losses(self, limit: float) -> None:
        """Dismiss those whose losses do not agree."""
        refused = disagreeing({c.name: (c.first_loss, c.loss) for c in self.contenders}, limit)
        for contender in list(self.contenders):
            if contender.name in refused:
                self._dismiss(contender, refused[contender.name])

    def _dismiss(self, contender: Contender, reason: str) -> None:
        contender.__exit__()
        self.contenders.remove(contender)
        self._reasons[contender.rival] = reason

    def first_loss(self) -> float:
        """Return the mean loss of the first epoch; 0 if nobody is left."""
        return statistics.median([c.first_loss for c in self.contenders] or [0.0])

    def best(self) -> dict[str, Timing]:
        """Return for each rival the best of its thread counts, the fastest first."""
        found: dict[str, Timing] = {}
        timed = [(contender.timing(), contender.rival) for contender in self.contenders]
        for timing, rival in sorted(timed, key=lambda pair: pair[0].seconds):
            found.setdefault(rival, timing)
        return found

    def left_out(self) -> dict[str, str]:
        """Return why rivals are missing."""
        present = {contender.rival for contender in self.contenders}
        return {name: why for name, why in self._reasons.items() if name not in present}


def compare_rivals(
    workload: Workload,
    *,
    device: Device | str | None = None,
    rivals: Sequence[str] | None = None,
    ceilings: Mapping[str, float] | None = None,
    time_budget: float = 0.5,
    n_rounds: int = N_ROUNDS,
    patience: float = PATIENCE,
) -> PeerTable:
    """Time one workload by all rivals that are installed.

    Their processes start together and then take turns: first each trains as long as it takes to
    compare the losses; then they are timed in rounds, so that a slow moment of the machine meets
    all alike. A sample is the difference between a long and a short training, both waited for:
    what a call costs once, such as compilation and capture, is not in it.

    Parameters
    ----------
    workload : Workload
    device : Device or str, optional
        What :func:`gpuml.get_device` returns unless given.
    rivals : sequence of str, optional
        Of ``gpuml.rivals.RIVALS``, or ``"module:function"``; on the CPU each is tried with
        several numbers of threads, gpuml excepted, which chooses its own.
    ceilings : mapping of str to float, optional
        The values of :func:`gpuml.device_ceilings`; measured unless given.
    time_budget : float
        Seconds for a sample.
    n_rounds : int
    patience : float
        Seconds to wait for an answer of a rival.

    Returns
    -------
    PeerTable
        Rivals that are missing, fail or disagree are left out, each with the reason.
    """
    where = get_device(device)
    floor, bound = workload.floor(ceilings or measure_ceilings(where))
    many = workload.n_models is not None
    usual = CPU_RIVALS if where == CPU else POPULATION_RIVALS if many else GPU_RIVALS
    names = rivals or [name for name in usual if not (many and name == SCIKIT_LEARN)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workload.write(folder)
        task = workload.task(folder, where)
        team = Team(
            [
                stack.enter_context(Contender(name, task, where, n_threads, patience))
                for name in names
                for n_threads in thread_counts(name, where)
            ]
        )
        team.each(Contender.greet)
        team.each(lambda contender: contender.check(workload.n_epochs))
        team.compare_losses(LIMITS[workload.precision])
        team.each(lambda contender: contender.calibrate(time_budget))
        for _ in range(n_rounds):
            team.each(lambda contender: contender.sample(workload.n_steps))
        return PeerTable(
            title=f"{workload}, {workload.n_steps} steps an epoch",
            device=str(where),
            date=_today(),
            floor=floor,
            bound=bound,
            n_steps=workload.n_epochs * workload.n_steps,
            first_loss=team.first_loss(),
            rivals=team.best(),
            left_out=team.left_out(),
            n_models=workload.n_models or 1,
        )


def thread_counts(rival: str, device: Device) -> list[int | None]:
    """Return the numbers of threads to try: on the CPU one, two, and all; gpuml chooses."""
    if device.kind == "gpu" or rival.startswith("gpuml"):
        return [None]
    return [*sorted({1, min(2, cpu_count()), cpu_count()})]


def measure_ceilings(device: Device) -> dict[str, float]:
    """Return what a device can do at most, and give back the memory that it took."""
    values = device_ceilings(device).values
    if device.kind == "gpu":
        with device.use():
            device.xp.get_default_memory_pool().free_all_blocks()
            device.xp.get_default_pinned_memory_pool().free_all_blocks()
    return values


def compare_processes(
    *,
    device: Device | str | None = None,
    rivals: Sequence[str] = PROCESS_RIVALS,
    n_epochs: int = 20,
    n_rounds: int = N_ROUNDS,
    patience: float = PATIENCE,
) -> PeerTable:
    """Time whole processes, from their start to a trained model of the digits data.

    Everything counts: Python, the library, its compilers, training, the end. The data come from
    .npy files. The first round does not count; what it compiled may be kept on disk, gpuml's
    kernels by CuPy and JAX's programs in its compilation cache. scikit-learn runs on the CPU.

    Parameters
    ----------
    device : Device or str, optional
        What :func:`gpuml.get_device` returns unless given.
    rivals : sequence of str
        As for :func:`compare_rivals`; on the CPU each has one thread, the best for this model.
    n_epochs, n_rounds : int
    patience : float
        Seconds to wait for a process.

    Returns
    -------
    PeerTable
        Seconds are those of a whole process.
    """
    where = get_device(device)
    workload = replace(WORKLOADS["digits"], n_epochs=n_epochs)
    samples: dict[str, list[float]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_digits(folder, workload)
        wanted = [r for r in rivals if where.kind == "gpu" or r != "PyTorch step graph"]
        for i in range(n_rounds + 1):
            for rival in wanted:
                if rival in left_out:
                    continue
                home = CPU if rival == SCIKIT_LEARN else where
                try:
                    seconds, answers[rival] = _process(
                        rival, workload.task(folder, home), home, n_epochs, patience
                    )
                except LeftOutError as error:
                    left_out[rival] = str(error)
                    continue
                if i > 0:
                    samples.setdefault(rival, []).append(seconds)
    answers = {rival: answers[rival] for rival in samples if rival not in left_out}
    losses = {r: (a[1]["first_loss"], a[1]["last_loss"]) for r, a in answers.items()}
    left_out |= disagreeing(losses, LIMITS["float32"])
    counted = {r: _process_timing(samples[r], a) for r, a in answers.items() if r not in left_out}
    first = [a[1]["first_loss"] for r, a in answers.items() if r in counted]
    return PeerTable(
        title=f"from process start to a trained model, {n_epochs} epochs of {workload}",
        device=str(where),
        date=_today(),
        floor=0.0,
        bound="",
        n_steps=n_epochs * workload.n_steps,
        first_loss=statistics.median(first or [0.0]),
        rivals=dict(sorted(counted.items(), key=lambda item: item[1].seconds)),
        left_out=left_out,
    )


def _write_digits(folder: str, workload: Workload) -> None:
    """Write as many images of the digits data as fill all batches."""
    data = load_dataset("digits")
    rows = slice(workload.n_steps * workload.batch_size)
    assert data.y is not None
    X = np.asarray(data.X[rows], np.float32) / np.float32(16)  # pixels are from 0 to 16
    write_task(folder, workload.sizes, X, data.y[rows])


def _process(
    rival: str, task: Task, device: Device, n_epochs: int, patience: float
) -> tuple[float, list[dict[str, Any]]]:
    """Run a whole process; return its seconds and its answers."""
    changed = environment(device, 1 if device == CPU and not rival.startswith("gpuml") else None)
    changed |= {
        "JAX_COMPILATION_CACHE_DIR": str(Path(task.folder) / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command(rival, task),
            input=f"{n_epochs}\n",
            capture_output=True,
            text=True,
            timeout=patience,
            env=changed,
        )
    except subprocess.TimeoutExpired:
        raise LeftOutError(f"gave no answer within {duration(patience)}") from None
    seconds = time.perf_counter() - begin
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        if "error" in answer:
            raise LeftOutError(answer["error"])
    if done.returncode or len(answers) != 2:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
        raise LeftOutError(f"ended with exit code {done.returncode}: {last}")
    return seconds, answers


def _process_timing(samples: Sequence[float], answers: Sequence[Mapping[str, Any]]) -> Timing:
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    greeting, trained = answers
    return Timing(
        middle,
        low,
        high,
        first_call=float(trained["seconds"]),
        loss=float(trained["last_loss"]),
        version=str(greeting["version"]),
        how=str(trained["how"]),
    )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()
