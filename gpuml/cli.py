"""The command line: `gpuml train`, `gpuml predict`, `gpuml doctor`."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gpuml import __version__

if TYPE_CHECKING:
    from gpuml.datasets import Dataset, HostArray, Preprocessing, Task
    from gpuml.devices import Device
    from gpuml.models import Model
    from gpuml.optimizers import Optimizer
    from gpuml.training import History

DONE, FAILED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130  # 130: what shells report after Ctrl-C

RESULTS = MODEL_FILE, HISTORY_FILE, PICTURE_FILE = (
    "model.safetensors",
    "history.csv",
    "history.png",
)

TRAIN_HELP = """\
Train a classifier or a regression, hold out a part of the rows to test it on, and keep the
model, its history and a picture of the curves.

DATA is one of
  digits                 handwritten digits, 1,797 images of 8 x 8 pixels (the default)
  iris, wine, breast_cancer, diabetes
                         other small data sets; all are embedded, nothing is downloaded
  table.csv              a table of numbers, with or without a header; the last column is to be
                         predicted (--target names another) and may hold text
  data.npz               arrays X (rows x features) and y
  X.npy y.npy            the same in two files
"""

TRAIN_EXAMPLES = """\
examples:
  gpuml train
  gpuml train houses.csv --target price --hidden 64,64 --epochs 200
  gpuml train X.npy y.npy --optimizer gradient_descent --learning-rate 0.1 --momentum 0.9
"""

PREDICT_EXAMPLES = """\
examples:
  gpuml predict runs/001/model.safetensors new.csv
  gpuml predict runs/001/model.safetensors X.npy --output predictions.csv
"""

EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 the call is wrong, 130 stopped by Ctrl-C"


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may be any bytes
    try:
        try:
            options = _parse(sys.argv[1:] if arguments is None else arguments)
            command: Callable[[argparse.Namespace], int] = options.command
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
        return _complain(f"not enough memory: {error}", FAILED)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "stopped by Ctrl-C: nothing saved", INTERRUPTED)
    except OSError as error:
        # Standard output is closed or full; Python would complain again while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader (`| head`) has enough
            return DONE
        return _complain(f"cannot write to standard output: {error}", FAILED)


def _complain(message: object, code: int) -> int:
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
    options, unknown = commands[name].parse_known_intermixed_args(arguments[1:])
    if unknown:
        known = [o for action in commands[name]._actions for o in action.option_strings]
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise CallError(f"unknown argument {unknown[0]}{hint} (gpuml {name} --help says more)")
    return options


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="gpuml",
        description="Train models on the GPU, or on the CPU where there is none.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gpuml {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], **texts: Any) -> Parser:
        added: Parser = subparsers.add_parser(
            name, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts
        )
        added.set_defaults(command=command)
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
    predict.add_argument("--overwrite", action="store_true", help="replace FILE (off)")
    predict.add_argument("--device", help=DEVICE_HELP)

    doctor = add(
        "doctor",
        _doctor,
        help="say whether a GPU can be used here, and what to do if not",
        description="Say whether a GPU can be used here, and what to do if not.",
        epilog="exit codes: 0 all well, on the GPU or on the CPU; 1 there is something to repair",
    )
    doctor.add_argument("--json", action="store_true", help="for machines (off)")
    return parser, {"train": train, "predict": predict, "doctor": doctor}


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
    from gpuml.errors import DeviceError, GpumlError

    try:
        yield
    except DeviceError as error:
        from gpuml.doctor import doctor

        diagnosis = doctor()
        cure = f"; type: {diagnosis.commands[0]}" if diagnosis.commands else ""
        raise CallError(f"{error}. {diagnosis.summary}{cure}") from None
    except (GpumlError, ValueError, OSError) as error:
        raise CallError(error) from None


def _device(options: argparse.Namespace) -> Device:
    from gpuml.devices import get_device

    try:
        return get_device(options.device)
    except ValueError as error:
        raise CallError(error if options.device else f"GPUML_DEVICE: {error}") from None


def _train(options: argparse.Namespace) -> int:
    from gpuml.datasets import Preprocessing, split
    from gpuml.models import MLP, Linear

    # Whatever is wrong with the call comes out here, before anything is written.
    with _finding_faults():
        optimizer = _optimizer(options)
        wanted = _check_folder(options)
        device = _device(options)
        data, y, task = _training_data(options)
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
        training_data = preprocessing.features(X_train), preprocessing.targets(y_train)
        held_out = preprocessing.features(X_test), preprocessing.targets(y_test)

    with _results_folder(wanted) as folder:
        history, code, trouble = _run(model, training_data, held_out, optimizer, options)
        if not len(history):
            return _complain(f"{trouble}; nothing saved: no epoch was finished", code)
        if trouble:
            _complain(f"{trouble}; the model of epoch {len(history)} is kept", code)
        try:
            _save(folder, model, history)
            print(_report(options, data, task, model, history, (X_test, y_test), folder))
        except KeyboardInterrupt:
            raise Interrupted(f"stopped by Ctrl-C after training: see {folder}") from None
    return code


def _run(
    model: Model,
    training_data: tuple[HostArray, HostArray],
    held_out: tuple[HostArray, HostArray],
    optimizer: Optimizer,
    options: argparse.Namespace,
) -> tuple[History, int, str]:
    """Train; return the history, the exit code, and what went wrong."""
    from gpuml.training import DivergenceError, TrainingInterrupted, train

    is_classification = model.preprocessing is not None and model.preprocessing.classes
    try:
        history = train(
            model,
            *training_data,
            loss="cross_entropy" if is_classification else "mean_squared_error",
            optimizer=optimizer,
            n_epochs=options.epochs,
            batch_size=options.batch_size,
            validation_data=held_out,
            seed=options.seed,
        )
    except DivergenceError as error:
        return error.history, FAILED, str(error)
    except TrainingInterrupted as error:
        return error.history, INTERRUPTED, f"stopped by Ctrl-C: {error}"
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


def _check_folder(options: argparse.Namespace) -> Path | None:
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
    if not options.overwrite and any((folder / name).exists() for name in RESULTS):
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


def _save(folder: Path, model: Model, history: History) -> None:
    """Write the results, the model first."""
    from gpuml import plots
    from gpuml.model_files import replacing

    try:
        model.save(folder / MODEL_FILE)
        history.to_csv(folder / HISTORY_FILE)
        with replacing(folder / PICTURE_FILE) as temporary:
            plots.save_history(history.columns, history.device, temporary)
    except OSError as error:
        raise RunError(f"cannot write the results: {error}") from None


def _report(
    options: argparse.Namespace,
    data: Dataset,
    task: Task,
    model: Model,
    history: History,
    held_out: tuple[HostArray, HostArray],
    folder: Path,
) -> str:
    what = f"{model.sizes[-1]} classes" if task == "classification" else "regression"
    batch = f"{history.batch_size} rows"
    if options.batch_size > history.n_samples:
        batch = f"all {history.n_samples} rows ({options.batch_size} were asked for)"
    lines = {
        "device": history.device,
        "data": f"{data.name}: {len(data.X):,} rows, {data.X.shape[1]} features, {what}",
        "model": repr(model),
        "training": f"{len(history)} epochs in batches of {batch}, {options.optimizer}",
        "held out": f"{len(held_out[0])} rows: {_quality(model, history, *held_out)}",
        "time": f"{history.seconds:.2f} s, {history.samples_per_second:,.0f} samples/s",
        "results": f"{folder}{os.sep} with {', '.join(RESULTS)}",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _quality(model: Model, history: History, X_test: HostArray, y_test: HostArray) -> str:
    loss = f"loss {history['validation_loss'][-1]:.4f}"
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
    return f"{loss}, R2 {r2_score(y_test, answers):.4f}"


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
    from gpuml.model_files import replacing
    from gpuml.models import load_model

    with _finding_faults():
        path = Path(options.model)
        file = path / MODEL_FILE if path.is_dir() else path
        model = load_model(file, device=_device(options))
        names = model.preprocessing.feature_names if model.preprocessing else ()
        data = load_dataset(options.data, feature_names=names)
        if data.X.shape[1] != model.sizes[0]:
            raise CallError(
                f"{data.name} has {data.X.shape[1]} columns, the model was trained on "
                f"{model.sizes[0]} features"
            )
        if options.output and Path(options.output).exists() and not options.overwrite:
            raise CallError(f"--output {options.output} exists: --overwrite replaces it")
        outputs, answers = _apply(model, data.X)
    text = _predictions(outputs, answers, model.preprocessing)
    if options.output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return DONE
    with _finding_faults(), replacing(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
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
