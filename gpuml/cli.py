"""The command line: `gpuml train`, `predict`, `doctor`, `bench`, `notebooks`, `lab`."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from gpuml import __version__

if TYPE_CHECKING:
    from gpuml.datasets import Dataset, HostArray, Preprocessing, Task
    from gpuml.devices import Device
    from gpuml.distributed import Communicator
    from gpuml.history import History
    from gpuml.models import Model
    from gpuml.optimizers import Optimizer
    from gpuml.peers import PeerTable
    from gpuml.recordings import Recording
    from gpuml.workloads import Workload

Prepared = TypeVar("Prepared")

DONE, FAILED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130  # 130: what shells report after Ctrl-C

BENCH_RESULTS = ("products.csv", "products.png", "crossover.png", "roofline.png")
RESULTS = MODEL_FILE, HISTORY_FILE, PICTURE_FILE = (
    "model.safetensors",
    "history.csv",
    "history.png",
)

TRAIN_HELP = """\
Train a classifier or a regression, hold out a part of the rows to test it on,
and keep the model, its history and a picture of the curves. Ctrl-C ends the
training and keeps the model of the last finished epoch.

DATA is one of
  digits                 handwritten digits, 1,797 images of 8 x 8 pixels
                         (the default)
  iris, wine, breast_cancer, diabetes
                         other small data sets; all are embedded, nothing is
                         downloaded
  table.csv              a table of numbers, with or without a header; the last
                         column is to be predicted (--target names another)
                         and may hold text
  data.npz               arrays X (rows x features) and y
  X.npy y.npy            the same in two files
"""

TRAIN_EXAMPLES = """\
examples:
  gpuml train
  gpuml train houses.csv --target price --hidden 64,64 --epochs 200
  gpuml train X.npy y.npy --optimizer gradient_descent --momentum 0.9
"""

PREDICT_EXAMPLES = """\
examples:
  gpuml predict runs/001/model.safetensors new.csv
  gpuml predict runs/001/model.safetensors X.npy --output predictions.csv
"""

BENCH_HELP = """\
Measure the ceilings of this machine: bandwidth of memory and of transfers,
rates of matrix products, the cost of a launch; and matrix products on the CPU
and on the GPU, size by size. It takes about half a minute, prints tables, and
draws pictures. Give it the machine for itself.

With --peers it trains perceptrons by gpuml, PyTorch, JAX and scikit-learn,
those that are installed, and compares their times a step; a time counts only
if the losses agree. It takes a minute for each workload, more where something
is compiled. With --save the tables go into a recording, a new one or one of
this machine.

With --ranks, started by mpiexec, it times sums over the ranks and steps of
training by 1, 2, 4, … and all of them, and holds a model of the cost against
the times.
"""

BENCH_EXAMPLES = """\
examples:
  gpuml bench
  gpuml bench --peers --workload digits,mnist
  gpuml bench --peers --sizes 100,512,512,20 --batch 256
  gpuml bench --peers --workload wide --precision tf32 --save mine.json
  gpuml bench --peers --workload population --models 16,64
  mpiexec -n 4 gpuml bench --ranks --workload wide --precision tf32
"""

NOTEBOOKS_HELP = """\
Put the course into a folder: the notebooks, and in the folder exercises what
is to be written and checked. A file there that you have changed is kept.
"""

LAB_HELP = """\
Put the course into a folder, as gpuml notebooks does, and open JupyterLab
there. What follows -- is handed to JupyterLab.
"""

LAB_EXAMPLES = """\
examples:
  gpuml lab
  gpuml lab course --teacher
  gpuml lab course -- --no-browser --port 8888
"""

EXIT_CODES = """\
exit codes: 0 done, 1 the run failed, 2 the call is wrong,
            130 stopped by Ctrl-C
"""
DOCTOR_EXIT_CODES = """\
exit codes: 0 all well, on the GPU or on the CPU,
            1 there is something to repair
"""

SHORT_NAMES = {"lr": "--learning-rate", "bs": "--batch-size", "out": "--output", "o": "--output"}


class CallError(Exception):
    """The call is wrong; the message is all that the user is told."""


class RunError(Exception):
    """The call is right, but the run failed."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; the message says when, and what is left."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line long."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise CallError(f"{message} ({self.prog} --help says more)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows ``gpuml``; the arguments of this process unless given.

    Returns
    -------
    int
        0 done, 1 the run failed, 2 the call is wrong, 130 stopped by Ctrl-C.
    """
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed by the shell, as in `gpuml train >&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding = None if sys.stdout.isatty() else "utf-8"  # a table is read by programs
        # the name of a file may be any bytes
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    try:
        try:
            options = _parse(sys.argv[1:] if arguments is None else arguments)
            command: Callable[[argparse.Namespace], int] = options.command
            with _explaining_a_sick_gpu(options):
                return command(options)
        finally:
            sys.stdout.flush()  # here, where a fault can still be told
    except SystemExit as stop:  # after --help and --version
        return int(stop.code or DONE)
    except CallError as error:
        return _complain(error, WRONG_CALL)
    except RunError as error:
        return _complain(error, FAILED)
    except MemoryError as error:
        from gpuml.errors import answered

        return _complain(f"not enough memory: {error}. {answered('memory')}", FAILED)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "stopped by Ctrl-C: nothing saved", INTERRUPTED)
    except OSError as error:
        # Standard output is closed or full; Python would complain again while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader (`| head`) has enough
            return DONE
        return _complain(f"cannot write to standard output: {error}", FAILED)


def _complain(message: object, code: int) -> int:
    if str(message):  # else another rank says it
        print("gpuml:", *str(message).split(), file=sys.stderr)  # on one line, whatever is in it
    return code


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    if not arguments:
        parser.print_help()
        raise SystemExit(WRONG_CALL)
    name = arguments[0]
    if name in ("-h", "--help", "--version"):
        return parser.parse_args(arguments)
    if name.startswith("-"):
        raise CallError(f"{name} comes before the command: expected gpuml COMMAND {name}")
    if name not in commands:
        from gpuml.errors import unknown_name

        raise CallError(unknown_name("command", name, commands))
    # Intermixed: `gpuml train --epochs 3 table.csv` is as good as the other order.
    own, rest = list(arguments[1:]), []
    if name == "lab" and "--" in own:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    options, unknown = commands[name].parse_known_intermixed_args(own)
    options.jupyter = rest
    if unknown:
        known = [o for action in commands[name]._actions for o in action.option_strings]
        wrong = unknown[0].partition("=")[0]
        short = SHORT_NAMES.get(wrong.lstrip("-"))
        near = [short] if short in known else difflib.get_close_matches(wrong, known, 1, 0.7)
        hint = f": did you mean {near[0]}?" if near else ""
        raise CallError(f"unknown argument {unknown[0]}{hint} (gpuml {name} --help says more)")
    return options


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    formatter = partial(argparse.RawDescriptionHelpFormatter, width=79)
    parser = Parser(
        prog="gpuml",
        formatter_class=formatter,
        description="Train models on the GPU, or on the CPU where there is none.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gpuml {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], **texts: Any) -> Parser:
        added: Parser = subparsers.add_parser(
            name, formatter_class=formatter, allow_abbrev=False, **texts
        )
        added.set_defaults(command=command, prog=added.prog)
        return added

    train = add(
        "train",
        _train,
        help="train a model on digits, or on your own table",
        description=TRAIN_HELP,
        epilog=f"{TRAIN_EXAMPLES}\n{EXIT_CODES}",
    )
    train.add_argument("data", metavar="DATA", nargs="*", help="see above (digits)")
    train.add_argument(
        "--target", metavar="COLUMN", help="csv: name or number, from 1, to predict (last)"
    )
    train.add_argument("--task", type=_one_of("task", TASKS), default="auto", help=_choice(TASKS))
    train.add_argument(
        "--hidden",
        type=_sizes,
        default=[128],
        metavar="SIZES",
        help="units of the hidden layers, as in 128 or 256,128; none for a linear model (128)",
    )
    train.add_argument("--epochs", type=_positive_int, default=40, help="passes over the data (40)")
    train.add_argument(
        "--batch-size", type=_positive_int, default=64, help="rows in a training step (64)"
    )
    train.add_argument(
        "--optimizer",
        type=_one_of("optimizer", OPTIMIZERS),
        default="adam",
        help=_choice(OPTIMIZERS),
    )
    train.add_argument(
        "--learning-rate",
        type=_positive_float,
        help="size of a step (0.001 for adam, 0.01 for gradient_descent)",
    )
    train.add_argument("--momentum", type=_momentum, help="gradient_descent: 0 to less than 1 (0)")
    train.add_argument(
        "--same-unit", action="store_true", help="one scale for all features, as pixels want (off)"
    )
    train.add_argument(
        "--test-fraction", type=_fraction, default=0.2, help="share of rows held out (0.2)"
    )
    train.add_argument("--seed", type=_seed, default=0, help="of all random choices (0)")
    train.add_argument("--device", help=DEVICE_HELP)
    train.add_argument("--output", metavar="DIR", help="folder for the results (runs/001, 002, …)")
    train.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="keep the state here after each epoch; the same call goes on from it (off)",
    )
    train.add_argument("--overwrite", action="store_true", help="replace a run in DIR (off)")

    predict = add(
        "predict",
        _predict,
        help="apply a trained model to new rows",
        description="Apply a trained model to new rows and write the predictions as CSV.",
        epilog=f"{PREDICT_EXAMPLES}\n{EXIT_CODES}",
    )
    predict.add_argument("model", metavar="MODEL", help="model.safetensors of a run, or its folder")
    predict.add_argument("data", metavar="DATA", help="what to predict for; as for gpuml train")
    predict.add_argument("--output", metavar="FILE", help="where to write (standard output)")
    predict.add_argument(
        "--sha256", metavar="DIGITS", help="refuse a MODEL with another SHA-256 (any will do)"
    )
    predict.add_argument("--overwrite", action="store_true", help="replace FILE (off)")
    predict.add_argument("--device", help=DEVICE_HELP)

    doctor = add(
        "doctor",
        _doctor,
        help="say whether a GPU can be used here, and what to do if not",
        description="Say whether a GPU can be used here, and what to do if not.",
        epilog=DOCTOR_EXIT_CODES,
    )
    doctor.add_argument("--json", action="store_true", help="for machines (off)")

    bench = add(
        "bench",
        _bench,
        help="measure what this machine can do at most",
        description=BENCH_HELP,
        epilog=f"{BENCH_EXAMPLES}\n{EXIT_CODES}",
    )
    bench.add_argument("--device", help=DEVICE_HELP)
    bench.add_argument("--output", metavar="DIR", help="folder for pictures (runs/001, 002, …)")
    bench.add_argument("--save", metavar="FILE", help="record all measurements, as .json (nowhere)")
    bench.add_argument(
        "--overwrite", action="store_true", help="replace FILE, results in DIR (off)"
    )
    bench.add_argument("--peers", action="store_true", help="compare with other libraries (off)")
    bench.add_argument("--ranks", action="store_true", help="compare numbers of ranks (off)")
    bench.add_argument(
        "--workload",
        type=_names,
        metavar="NAMES",
        help="with --peers or --ranks: digits, mnist, wide, population, some with commas between "
        "them (all on a GPU, digits on the CPU; with --ranks wide on a GPU, mnist on the CPU)",
    )
    bench.add_argument(
        "--sizes",
        type=_sizes,
        metavar="SIZES",
        help="with --peers or --ranks: a workload of your own: features, hidden units, classes, "
        "as in 64,128,10 (none)",
    )
    bench.add_argument(
        "--batch", type=_positive_int, help="with --sizes: samples in a training step (64)"
    )
    bench.add_argument(
        "--steps",
        type=_positive_int,
        help="with --peers: steps in an epoch (those of the workload)",
    )
    bench.add_argument(
        "--models",
        type=_sizes,
        metavar="NUMBERS",
        help="with --workload population or --sizes: train so many models at once, as in 16,256 "
        "(1024; one)",
    )
    bench.add_argument(
        "--precision",
        type=_names,
        metavar="NAMES",
        help="with --peers or --ranks: float32, tf32, bfloat16 (float32; for wide on a GPU all, "
        "with --ranks tf32)",
    )
    notebooks = add(
        "notebooks",
        _notebooks,
        help="put the course into a folder",
        description=NOTEBOOKS_HELP,
        epilog=EXIT_CODES,
    )
    notebooks.add_argument("folder", metavar="DIR", help="made if it does not exist")
    lab = add(
        "lab",
        _lab,
        help="put the course into a folder and open JupyterLab there",
        description=LAB_HELP,
        epilog=f"{LAB_EXAMPLES}\n{EXIT_CODES}",
    )
    lab.add_argument("folder", metavar="DIR", nargs="?", default=COURSE, help=f"({COURSE})")
    for command in (notebooks, lab):
        command.add_argument(
            "--teacher", action="store_true", help="with solutions and the teacher's page (off)"
        )
        command.add_argument(
            "--overwrite", action="store_true", help="replace what you have changed (off)"
        )
    commands = {"train": train, "predict": predict, "doctor": doctor, "bench": bench}
    return parser, commands | {"notebooks": notebooks, "lab": lab}


COURSE = "gpuml-course"
# JupyterLab, but for a module that compiles a grammar for two seconds at each start, for checks of
# jsonschema that nothing in Jupyter asks for (jupyter_server, issue 1559).
JUPYTERLAB = """\
import runpy, sys
sys.modules["rfc3987_syntax"] = None
runpy.run_module("jupyterlab", run_name="__main__", alter_sys=True)
"""


TASKS = ("auto", "classification", "regression")
OPTIMIZERS = ("adam", "gradient_descent")
DEVICE_HELP = "auto, cpu, gpu, gpu:1, … (GPUML_DEVICE if set, else auto: the GPU if one answers)"


def _choice(names: Sequence[str]) -> str:
    return f"{', '.join(names)} ({names[0]})"


def _one_of(kind: str, known: Sequence[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        from gpuml.errors import unknown_name

        if text not in known:
            raise argparse.ArgumentTypeError(unknown_name(kind, text, known))
        return text

    return convert


def _number(
    kind: type[float], expected: str, good: Callable[[float], bool]
) -> Callable[[str], Any]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind("nan") if kind is float else None  # type: ignore[assignment]
        if value is None or not good(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
        return value

    return convert


_positive_int = _number(int, "a positive whole number below 2**31", lambda v: 0 < v < 2**31)
_seed = _number(int, "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
_positive_float = _number(float, "a positive number", lambda value: 0 < value < float("inf"))
_momentum = _number(float, "a number from 0 to less than 1", lambda value: 0 <= value < 1)
_fraction = _number(float, "a number between 0 and 1", lambda value: 0 < value < 1)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _sizes(text: str) -> list[int]:
    if text in ("", "none"):
        return []
    try:
        return [_positive_int(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            "expected positive whole numbers below 2**31 with commas between them, or none, "
            f"got '{text}'"
        ) from None


@contextmanager
def _finding_faults() -> Iterator[None]:
    """Turn what is wrong with the user's data and settings into one line and exit code 2."""
    from gpuml.errors import GpumlError

    try:
        yield
    except (GpumlError, ValueError, OSError) as error:
        notes = getattr(error, "__notes__", ())
        raise CallError(". ".join([str(error), *notes])) from None


@contextmanager
def _explaining_a_sick_gpu(options: argparse.Namespace) -> Iterator[None]:
    """Turn what CuPy raises where libraries are missing into one line and exit code 1."""
    try:
        yield
    except Exception as error:
        if not _is_of_a_sick_gpu(error):
            raise
        from gpuml.doctor import telling_line

        text = telling_line(str(error)) or repr(error)
        raise RunError(_with_cure(f"the GPU failed: {text}", options)) from None


def _is_of_a_sick_gpu(error: Exception) -> bool:
    """Whether CuPy raised it, and a library, a header or the driver may be the cause."""
    # CuPy's CompileException, as of missing headers, is neither of the two.
    if not isinstance(error, RuntimeError | ImportError) and "Compile" not in type(error).__name__:
        return False
    frames = traceback.walk_tb(error.__traceback__)
    modules = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames}
    return bool(modules & {"cupy", "cupyx", "cupy_backends"})


def _with_cure(problem: str, options: argparse.Namespace) -> str:
    """Add to what ails the GPU why the doctor thinks so, and what to type."""
    from gpuml.doctor import doctor

    diagnosis = doctor()
    reason = diagnosis.reason.rstrip(".")
    command = diagnosis.commands[0] if diagnosis.commands else f"{options.prog} --device cpu"
    return f"{problem}. {reason[:1].upper()}{reason[1:]}; type: {command}"


def _device(options: argparse.Namespace) -> Device:
    from gpuml.devices import get_device
    from gpuml.errors import DeviceError

    try:
        return get_device(options.device)
    except DeviceError as error:  # it sends to the doctor, who is asked here
        raise CallError(_with_cure(str(error).partition(". What to do")[0], options)) from None
    except ValueError as error:
        raise CallError(error if options.device else f"GPUML_DEVICE: {error}") from None


def _train(options: argparse.Namespace) -> int:
    from gpuml.distributed import ranks

    with _finding_faults():
        together = ranks()
    first = together.rank == 0  # which says and writes everything
    with ExitStack() as stack:

        def prepare() -> tuple[_Job, Path]:
            job = _prepare(options, writes=first)
            folder = stack.enter_context(_results_folder(job.wanted)) if first else Path()
            return job, folder

        # Whatever is wrong with the call comes out here, before anything is written.
        job, folder = _on_all_ranks(together, prepare)
        history, code, trouble = _run(job, options)
        if not first:
            return code
        if not len(history):
            return _complain(f"{trouble}; nothing saved: no epoch was finished", code)
        if trouble:
            _complain(f"{trouble}; the model of epoch {len(history)} is kept", code)
        written: list[str] = []
        try:
            _save(folder, job.model, history, written)
            print(_report(options, job, history, folder))
        except KeyboardInterrupt:
            if not written:
                raise
            missing = "" if PICTURE_FILE in written else "; the picture is missing"
            raise Interrupted(
                f"stopped by Ctrl-C after training: the model is saved in {folder}{missing}"
            ) from None
    return code


@dataclass(frozen=True)
class _Job:
    """What ``gpuml train`` was asked for, checked."""

    optimizer: Optimizer
    wanted: Path | None  # folder for the results
    data: Dataset
    task: Task
    model: Model
    training_data: tuple[HostArray, HostArray]
    held_out: tuple[HostArray, HostArray]
    raw_held_out: tuple[HostArray, HostArray]


def _check_checkpoint(options: argparse.Namespace) -> None:
    from gpuml.model_files import check_place

    if options.checkpoint is not None:
        try:
            check_place(Path(options.checkpoint))
        except OSError as error:
            raise CallError(f"--checkpoint: {error}") from None


def _prepare(options: argparse.Namespace, *, writes: bool) -> _Job:
    from gpuml.datasets import Preprocessing, split
    from gpuml.models import MLP, Linear

    with _finding_faults():
        optimizer = _optimizer(options)
        wanted = _check_folder(options, RESULTS) if writes else None
        _check_checkpoint(options)
        device = _device(options)
        data, y, task = _training_data(options)
        with _doubting_the_task(options, y, task):
            X_train, X_test, y_train, y_test = split(
                data.X,
                y,
                test_fraction=options.test_fraction,
                seed=options.seed,
                stratify=task == "classification",
            )
        preprocessing = Preprocessing.fit(
            X_train,
            y_train,
            task,
            same_unit=data.same_unit or options.same_unit,
            feature_names=data.feature_names,
            target_name=data.target_name,
        )
        sizes = [data.X.shape[1], *options.hidden, preprocessing.n_outputs]
        model = (
            MLP(sizes, seed=options.seed, device=device)
            if options.hidden
            else Linear(*sizes, device=device)
        )
        model.preprocessing = preprocessing
        return _Job(
            optimizer=optimizer,
            wanted=wanted,
            data=data,
            task=task,
            model=model,
            training_data=(preprocessing.features(X_train), preprocessing.targets(y_train)),
            held_out=(preprocessing.features(X_test), preprocessing.targets(y_test)),
            raw_held_out=(X_test, y_test),
        )


def _on_all_ranks(together: Communicator, prepare: Callable[[], Prepared]) -> Prepared:
    """Return what this rank prepared, if all could; else the first that could not says why."""
    prepared, fault = None, ""
    try:
        prepared = prepare()
    except CallError as error:
        fault = str(error)
    except BaseException as error:
        together.end_all(error)  # the others do not know of it
        raise
    faults = together.gather(fault)
    if prepared is not None and not any(faults):
        return prepared
    first = [bool(text) for text in faults].index(True)
    where = f"rank {first} of {len(faults)}: " if first > 0 else ""
    raise CallError(f"{where}{fault}" if first == together.rank else "")


@contextmanager
def _doubting_the_task(options: argparse.Namespace, y: HostArray, task: Task) -> Iterator[None]:
    """Where it was guessed that the target are classes, and they are poor ones, say so."""
    from gpuml.errors import DataError

    try:
        yield
    except DataError as error:
        if options.task != "auto" or task != "classification":
            raise
        hint = ""
        if y.dtype.kind == "f":
            hint = "; if these are numbers to predict: --task regression"
        # text that starts like a number but is none, as $9.50, 3,25 and 12 % do
        cells = [cell for cell in y.tolist() if re.match(r"\W{0,2}\d", str(cell))]
        wrong = [cell for cell in cells if not re.fullmatch(r"[-+.\de]+", str(cell))]
        if wrong:
            hint = f"; if these are numbers to predict: '{wrong[0]}' is not written as a number"
        raise DataError(f"{error}{hint}") from None


def _run(job: _Job, options: argparse.Namespace) -> tuple[History, int, str]:
    """Train; return the history, the exit code, and what went wrong."""
    from gpuml.distributed import DistributedError, ranks
    from gpuml.errors import CheckpointError
    from gpuml.training import DivergenceError, TrainingInterrupted, train

    preprocessing = job.model.preprocessing
    is_classification = preprocessing is not None and preprocessing.classes
    try:
        history = train(
            job.model,
            *job.training_data,
            loss="cross_entropy" if is_classification else "mean_squared_error",
            optimizer=job.optimizer,
            n_epochs=options.epochs,
            batch_size=options.batch_size,
            validation_data=job.held_out,
            seed=options.seed,
            checkpoint=options.checkpoint,
        )
    except (DistributedError, CheckpointError) as error:  # on all of them
        raise CallError("" if ranks().rank else error) from None
    except DivergenceError as error:
        return error.history, FAILED, str(error)
    except TrainingInterrupted as error:
        return error.history, INTERRUPTED, f"stopped by Ctrl-C: {error}"
    except BaseException as error:
        ranks().end_all(error)  # the others may not know of it
        raise
    return history, DONE, ""


def _optimizer(options: argparse.Namespace) -> Optimizer:
    from gpuml.optimizers import Adam, GradientDescent

    rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    if options.optimizer == "adam":
        if options.momentum is not None:
            raise CallError("--momentum belongs to --optimizer gradient_descent")
        return Adam(**rate)
    return GradientDescent(**rate, momentum=options.momentum or 0.0)


def _training_data(options: argparse.Namespace) -> tuple[Dataset, HostArray, Task]:
    """Return the data, their targets, and what is to be learned."""
    from gpuml.datasets import load_dataset

    files = options.data or ["digits"]
    is_pair = len(files) == 2 and all(name.lower().endswith(".npy") for name in files)
    if len(files) > 1 and not is_pair:
        raise CallError(f"expected one DATA, or X.npy and y.npy, got {len(files)} names")
    if options.target is not None and not files[0].lower().endswith(".csv"):
        raise CallError("--target is for .csv files: elsewhere y says what to predict")
    data = load_dataset(*files, target_column=options.target)
    if data.y is None:
        raise CallError(f"{data.name} has nothing to predict: give y as well, as in X.npy y.npy")
    task: Task = data.task if options.task == "auto" else options.task
    if task == "regression" and data.y.dtype.kind != "f":
        raise CallError(f"the target of {data.name} is not numbers: --task classification fits")
    if task == "classification" and data.y.ndim > 1:
        raise CallError(f"y in {data.name} has several columns: --task regression fits")
    return data, data.y, task


def _check_folder(options: argparse.Namespace, results: Sequence[str]) -> Path | None:
    """Return the folder that was asked for, after a look whether it may be written."""
    if options.output is None:
        if options.overwrite:
            raise CallError("--overwrite needs --output DIR")
        return None
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise CallError(f"--output {folder} is a file, expected a folder")
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise CallError(f"--output {folder} cannot be written: permission denied")
    if not options.overwrite and any((folder / name).exists() for name in results):
        raise CallError(f"--output {folder} holds another run: --overwrite replaces it")
    return folder


@contextmanager
def _results_folder(wanted: Path | None) -> Iterator[Path]:
    """Make the folder; take away again what was made if nothing came into it."""
    first = wanted or Path("runs")
    made = [path for path in (first, *first.parents) if not path.exists()]
    try:
        try:
            folder = _make_folder(wanted)
        except OSError as error:
            raise CallError(
                f"cannot make a folder for the results: {error}: --output DIR names another"
            ) from None
        if wanted is None:
            made.insert(0, folder)
        yield folder
    finally:
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()


def _make_folder(folder: Path | None) -> Path:
    """Make the folder; without one, the next free number under runs/."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    number = max([int(path.name) for path in runs.iterdir() if path.name.isdecimal()], default=0)
    while True:
        number += 1
        try:
            (runs / f"{number:03d}").mkdir(parents=True)
        except FileExistsError:  # another run took it at this moment
            continue
        return runs / f"{number:03d}"


@contextmanager
def _holding_back_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread gets signals
        return
    came: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if came:
        signal.raise_signal(signal.SIGINT)


def _save(folder: Path, model: Model, history: History, written: list[str]) -> None:
    """Write the results and list them, the model first."""
    from gpuml import plots
    from gpuml.model_files import replacing

    try:
        with _holding_back_ctrl_c():
            for name in HISTORY_FILE, PICTURE_FILE:  # they would belong to an earlier run
                (folder / name).unlink(missing_ok=True)
            model.save(folder / MODEL_FILE)
            history.to_csv(folder / HISTORY_FILE)
            written += [MODEL_FILE, HISTORY_FILE]
        with replacing(folder / PICTURE_FILE) as temporary:
            plots.save_history(history.columns, history.device, temporary)
        written.append(PICTURE_FILE)
    except OSError as error:
        raise RunError(f"cannot write the results: {error}") from None


def _count(number: int, what: str) -> str:
    """Return ``"1 row"`` or ``"1,797 rows"``."""
    return f"{number:,} {what}" + "s" * (number != 1)


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _report(options: argparse.Namespace, job: _Job, history: History, folder: Path) -> str:
    from gpuml.model_files import file_sha256

    data, model, held_out = job.data, job.model, job.raw_held_out
    what = f"{model.sizes[-1]} classes" if job.task == "classification" else "regression"
    batch = _count(history.batch_size, "row")
    if options.batch_size > history.n_samples:
        batch = f"all {batch} ({options.batch_size:,} were asked for)"
    rows, features = _count(len(data.X), "row"), _count(data.X.shape[1], "feature")
    epochs, n_test = _count(len(history), "epoch"), _count(len(held_out[0]), "row")
    lines = {
        "device": history.device,
        "data": f"{data.name}: {rows}, {features}, {what}",
        **_constant(model.preprocessing),
        "model": repr(model),
        "training": ", ".join(
            [f"{epochs} in batches of {batch}", options.optimizer, *history.notes]
        ),
        "held out": f"{n_test}: {_quality(model, history, *held_out)}",
        "time": f"{history.seconds:.2f} s, {history.samples_per_second:,.0f} samples/s",
        "results": f"{folder}{os.sep} with {', '.join(RESULTS)}",
        "sha256": f"{file_sha256(folder / MODEL_FILE)} of {MODEL_FILE}",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _constant(preprocessing: Preprocessing | None) -> dict[str, str]:
    """Say which features do not vary, if there are any."""
    from gpuml.errors import printable

    names = preprocessing.constant_names if preprocessing else ()
    if not names:
        return {}
    shown = ", ".join(map(printable, names[:4])) + (", …" if len(names) > 4 else "")
    return {"constant": f"{_count(len(names), 'feature')}, kept as zeros: {shown}"}


def _quality(model: Model, history: History, X_test: HostArray, y_test: HostArray) -> str:
    loss = f"loss {_figure(history['validation_loss'][-1])}"
    if "validation_accuracy" in history.columns:
        return f"{loss}, accuracy {history['validation_accuracy'][-1]:.4f}"
    from sklearn.metrics import r2_score

    from gpuml.errors import DataError

    loss += " (standardised)"
    if len(y_test) < 2:
        return loss  # R2 needs two rows
    try:
        _, answers = _apply(model, X_test)
    except DataError:  # of rows far from all others, as the loss shows
        return loss
    return f"{loss}, R2 {_figure(r2_score(y_test, answers))}"


def _apply(model: Model, X: HostArray) -> tuple[HostArray, HostArray]:
    """Return a model's outputs for a raw table, and the answers that they mean.

    Raises
    ------
    DataError
        If an output is not finite.
    """
    import numpy as np

    from gpuml.errors import DataError
    from gpuml.training import predict

    preprocessing = model.preprocessing
    with np.errstate(all="ignore"):
        outputs = predict(model, X if preprocessing is None else preprocessing.features(X))
    bad = ~np.isfinite(outputs).all(axis=-1)
    if bad.any():
        raise DataError(
            f"row {bad.argmax()} (counted from 0) has numbers so large that the model's output is "
            "not finite: are they in the unit of the training data?"
        )
    return outputs, outputs if preprocessing is None else preprocessing.answers(outputs)


def _predict(options: argparse.Namespace) -> int:
    from gpuml.datasets import load_dataset
    from gpuml.errors import printable
    from gpuml.model_files import replacing
    from gpuml.models import load_model

    with _finding_faults():
        path = Path(options.model)
        file = path / MODEL_FILE if path.is_dir() else path
        model = load_model(file, device=_device(options), sha256=options.sha256)
        names = model.preprocessing.feature_names if model.preprocessing else ()
        data = load_dataset(options.data, feature_names=names)
        if data.X.shape[1] != model.sizes[0]:
            raise CallError(
                f"{data.name} has {_count(data.X.shape[1], 'column')}, the model was trained on "
                + _count(model.sizes[0], "feature")
            )
        if options.output and Path(options.output).exists() and not options.overwrite:
            raise CallError(f"--output {options.output} exists: --overwrite replaces it")
        outputs, answers = _apply(model, data.X)
    text = _predictions(outputs, answers, model.preprocessing)
    if options.output is None:
        if sys.stdout.isatty():  # which would obey some characters in the names of classes
            text = "\n".join(printable(line, len(line)) for line in text.split("\n"))
        sys.stdout.write(text)
        sys.stdout.flush()
        return DONE
    try:
        with replacing(options.output) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(error) from None
    return DONE


def _predictions(
    outputs: HostArray, answers: HostArray, preprocessing: Preprocessing | None
) -> str:
    """Return predictions as CSV: a class and its probability, or a number for each output."""
    import csv
    import io

    import numpy as np

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if preprocessing is not None and preprocessing.classes:
        writer.writerow(["prediction", "probability"])
        # the largest entry of softmax(outputs)
        largest = outputs.max(axis=-1, keepdims=True)
        probabilities = 1 / np.exp(outputs - largest).sum(axis=-1)
        writer.writerows(
            [answer, f"{p:.6f}"] for answer, p in zip(answers, probabilities, strict=True)
        )
    else:
        several = answers.shape[1] > 1
        writer.writerow(
            [f"prediction_{i}" if several else "prediction" for i in range(answers.shape[1])]
        )
        writer.writerows(answers.tolist())
    return buffer.getvalue()


def _doctor(options: argparse.Namespace) -> int:
    from gpuml.doctor import doctor

    diagnosis = doctor()
    print(diagnosis.to_json() if options.json else diagnosis)
    return DONE if diagnosis.ok else FAILED


def _notebooks(options: argparse.Namespace) -> int:
    _copy_course(options)
    print(f"next: gpuml lab {shlex.quote(options.folder)}")
    return DONE


def _copy_course(options: argparse.Namespace) -> None:
    from gpuml.copies import copy_course
    from gpuml.errors import DataError

    folder = Path(options.folder)
    try:
        copied = copy_course(options.folder, teacher=options.teacher, overwrite=options.overwrite)
    except NotADirectoryError as error:
        raise CallError(str(error)) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped by Ctrl-C: what is written is whole, the same call writes the rest"
        ) from None
    except (OSError, DataError) as error:
        raise RunError(f"cannot put the course into {folder}: {error}") from None
    solutions = "with" if options.teacher else "without"
    print(f"{folder}{os.sep}: {_count(len(copied.written), 'file')} written", end=", ")
    print(f"{len(copied.unchanged)} there already; exercises {solutions} solutions")
    if copied.kept:
        print("kept, since you have changed them (--overwrite replaces them):")
        print(*(f"  {name}" for name in copied.kept), sep="\n")


def _lab(options: argparse.Namespace) -> int:
    if find_spec("jupyterlab") is None:
        raise RunError("JupyterLab is not installed: pip install 'gpuml[lab]'")
    _copy_course(options)
    sys.stdout.flush()
    command = [sys.executable, "-c", JUPYTERLAB, *options.jupyter]
    interrupts = []
    with subprocess.Popen(command, cwd=options.folder) as server:
        heed = {
            signal.SIGINT: lambda *_: interrupts.append(True),  # the terminal tells JupyterLab
            signal.SIGTERM: lambda *_: server.terminate(),
        }
        usual = {number: signal.signal(number, handler) for number, handler in heed.items()}
        try:
            code = server.wait()
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)
    return DONE if code == 0 else INTERRUPTED if interrupts else FAILED


def _bench(options: argparse.Namespace) -> int:
    if options.ranks and options.peers:
        raise CallError("--peers compares libraries, --ranks numbers of ranks: expected one")
    for name in ("workload", "sizes", "batch", "steps", "models", "precision"):
        for_ranks = name not in ("steps", "models")
        fits = options.peers or (options.ranks and for_ranks)
        if getattr(options, name) is not None and not fits:
            raise CallError(f"--{name} needs --peers" + ", or --ranks" * for_ranks)
    if options.ranks:
        return _bench_ranks(options)
    return _bench_peers(options) if options.peers else _bench_machine(options)


def _bench_machine(options: argparse.Namespace) -> int:
    import matplotlib

    from gpuml.model_files import replacing
    from gpuml.recordings import COMMAND, record

    with _finding_faults():
        wanted = None
        if options.output is not None:
            wanted = _check_folder(options, BENCH_RESULTS)
        command = COMMAND
        if options.save is not None:
            command = f"gpuml bench --save {options.save}"
            _check_record(Path(options.save), options.overwrite)
        device = _device(options)
    recording = record(device, command=command)
    print(recording)
    matplotlib.use("agg")
    with _results_folder(wanted) as folder:
        try:
            recording.products.to_csv(folder / "products.csv")
            for name, figure in recording.figures().items():
                with replacing(folder / f"{name}.png") as temporary:
                    figure.savefig(temporary, dpi=144)
            if options.save is not None:
                recording.save(options.save)
        except OSError as error:
            raise RunError(f"cannot write the results: {error}") from None
        print(f"\npictures and products.csv are in {folder}{os.sep}")
    return DONE


def _check_record(file: Path, overwrite: bool) -> None:
    if file.suffix != ".json" or not file.parent.is_dir():
        raise CallError(f"--save {file}: expected a name ending in .json, in a folder that exists")
    if file.exists() and not overwrite:
        raise CallError(f"--save {file} exists: --overwrite replaces it")


def _bench_peers(options: argparse.Namespace) -> int:
    from gpuml.peers import compare_processes, compare_rivals, measure_ceilings
    from gpuml.recordings import record

    if options.output is not None:
        raise CallError("--output is for pictures, and --peers draws none: --save keeps its tables")
    with _finding_faults():
        device = _device(options)
        chosen = _workloads(options, device)
        file = None if options.save is None else Path(options.save)
        recording = None if file is None else _older_recording(file, options, device, chosen)
    if file is not None and recording is None:
        recording = record(device, command=f"gpuml bench --save {file}")
        print(recording, end="\n\n", flush=True)
    ceilings = measure_ceilings(device)
    peers: dict[str, Any] = {} if recording is None else recording.peers
    done = True

    def keep(table: PeerTable, place: dict[str, Any], name: str) -> bool:
        print(table, end="\n\n", flush=True)
        place[name] = table.to_json()
        if file is not None and recording is not None:
            try:
                recording.save(file)
            except OSError as error:
                raise RunError(f"cannot write the results: {error}") from None
        return table.ours is not None

    for workload in chosen:
        table = compare_rivals(workload, device=device, ceilings=ceilings)
        done &= keep(table, peers.setdefault("workloads", {}), workload.name)
    if any(workload.name == "digits" for workload in chosen):
        done &= keep(compare_processes(device=device), peers, "processes")
    return DONE if done else FAILED


def _bench_ranks(options: argparse.Namespace) -> int:
    from gpuml.distributed import ranks
    from gpuml.recordings import record
    from gpuml.scaling import CostModel, measure_scaling

    if options.output is not None:
        raise CallError("--output is for pictures, and --ranks draws none: --save keeps its tables")
    file = None if options.save is None else Path(options.save)
    with _finding_faults():
        together = ranks()
    if together.world_size == 1:
        raise CallError("--ranks needs more than one: mpiexec -n 2 gpuml bench --ranks")

    def prepare() -> tuple[Device, list[Workload], Recording | None]:
        with _finding_faults():
            device = _device(options)
            chosen = _workloads(options, device)
            for workload in chosen:
                if workload.n_models is not None:
                    raise CallError(f"--workload {workload.name}: ranks train one model")
            if file is None or together.rank > 0:
                return device, chosen, None
            return device, chosen, _older_recording(file, options, device, chosen)

    device, chosen, recording = _on_all_ranks(together, prepare)
    if together.rank == 0 and file is not None and recording is None:
        recording = record(device, command=f"gpuml bench --save {file}")
    command = f"mpiexec -n {together.world_size} gpuml bench --ranks"
    for workload in chosen:
        scaling = measure_scaling(workload, together, device=device, command=command)
        if together.rank > 0:
            continue
        print(scaling, CostModel.fit(scaling).check(scaling), sep="\n", end="\n\n", flush=True)
        if file is not None and recording is not None:
            recording.scaling[workload.name] = scaling.to_json()
            try:
                recording.save(file)
            except OSError as error:
                raise RunError(f"cannot write the results: {error}") from None
    return DONE


def _workloads(options: argparse.Namespace, device: Device) -> list[Workload]:
    """Return what the options ask for."""
    from gpuml.workloads import (
        PRECISIONS,
        WORKLOADS,
        Workload,
        in_numbers,
        in_precisions,
        workloads,
    )

    if options.batch is not None and options.sizes is None:
        raise CallError("--batch needs --sizes: the workloads that have a name have their batches")
    names = options.workload
    precisions = options.precision or ()
    if options.ranks and device.kind == "gpu" and names in (None, ["wide"]) and not options.sizes:
        precisions = precisions or ("tf32",)
    if names is None and options.sizes is None:
        on_gpu, on_cpu = (["wide"], ["mnist"]) if options.ranks else (list(WORKLOADS), ["digits"])
        names = on_gpu if device.kind == "gpu" else on_cpu
    n_models = options.models or ()
    if n_models and options.sizes is None and "population" not in (names or ()):
        raise CallError("--models needs --workload population, or --sizes")
    found = workloads(
        names or (), device, precisions=precisions, n_steps=options.steps, n_models=n_models
    )
    if options.sizes is not None:
        batch = options.batch or 64
        name, sizes = f"{'-'.join(map(str, options.sizes))}, batch {batch}", tuple(options.sizes)
        many = n_models[0] if n_models else None
        own = Workload(name, sizes, batch, options.steps or 64, n_models=many)
        for one in in_numbers(own, n_models):
            found += in_precisions(one, device, precisions or PRECISIONS[:1])
    return found


def _older_recording(
    file: Path, options: argparse.Namespace, device: Device, chosen: Sequence[Workload]
) -> Recording | None:
    """Return the recording that tables are to be added to, or None if there is no such file."""
    from gpuml.recordings import recorded

    if not file.exists():
        _check_record(file, options.overwrite)
        return None
    recording = recorded(file)
    if not recording.device.startswith(f"{device.name},"):
        raise CallError(
            f"--save {file} is of another machine, {recording.device.partition(',')[0]}: "
            "expected a new name, or a recording of this one"
        )
    tables = recording.scaling if options.ranks else recording.peers.get("workloads", {})
    there = set(tables) & {workload.name for workload in chosen}
    if there and not options.overwrite:
        raise CallError(f"--save {file} holds {', '.join(sorted(there))}: --overwrite replaces it")
    return recording
