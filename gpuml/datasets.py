"""Data sets: scikit-learn's small ones, the user's own files, and what happens before training.

All of it works on host arrays; :meth:`gpuml.Device.asarray` brings them to a device.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

import numpy as np

from gpuml.devices import device_of
from gpuml.errors import DataError, printable, unknown_name
from gpuml.plain_files import read_npy, read_npz, within_memory

HostArray: TypeAlias = np.ndarray[Any, Any]
Task: TypeAlias = Literal["classification", "regression"]

BUILT_IN = ("breast_cancer", "diabetes", "digits", "iris", "wine")

# A column of whole numbers with at most this many different ones is taken for classes.
MOST_NUMERIC_CLASSES = 30

# What a table from others may take: a wider one is a mistake, or made to do harm.
MOST_BLANK_LINES = 10_000  # one after the other
MOST_COLUMNS = 100_000
LONGEST_LINE = 16 * 2**20  # characters

# Names of equal length are kept for all rows: a long one among many rows would take so many bytes.
MOST_TEXT = 256 * 2**20

_TRUTH = {"true": 1.0, "false": 0.0}  # in any case of letters


@dataclass(frozen=True)
class Dataset:
    """A table of features and what is to be predicted from them, in host memory.

    Attributes
    ----------
    name : str
    X : numpy.ndarray of shape (n_samples, n_features), float64
    y : numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs), or None
        Numbers, or the names of classes; None if there is none, as in data to predict for.
    feature_names : tuple of str
        Empty where the source has none.
    target_name : str
        Empty where the source has none.
    same_unit : bool
        Whether all features are in the same unit, as pixels are.
    """

    name: str
    X: HostArray
    y: HostArray | None
    feature_names: tuple[str, ...] = ()
    target_name: str = ""
    same_unit: bool = False

    @property
    def task(self) -> Task:
        """What `y` looks like: names or few whole numbers are classes, other numbers are not."""
        if self.y is None or self.y.ndim > 1:
            return "regression"
        if self.y.dtype.kind != "f":
            return "classification"
        values = np.unique(self.y)
        few = len(values) <= min(MOST_NUMERIC_CLASSES, len(self.y) // 2)
        return "classification" if few and _are_whole(values) else "regression"


@dataclass(frozen=True, repr=False)
class Preprocessing:
    """From a raw table to a model's numbers, and from its outputs back to answers.

    Features become (x - mean) / scale. Classes become labels 0, 1, …; numbers to be predicted
    become (y - target_mean) / target_scale. Made by :meth:`fit` from training data alone.

    Attributes
    ----------
    mean, scale : numpy.ndarray of shape (n_features,), float64
    classes : tuple
        The classes in the order of their labels; empty for regression.
    target_mean, target_scale : numpy.ndarray of shape (n_outputs,), float64
        Empty for classification.
    feature_names : tuple of str
    target_name : str
    constant_features : tuple of int
        The columns, counted from 0, that did not vary in the training data. They are kept, as
        zeros, and printed.
    """

    mean: HostArray
    scale: HostArray
    classes: tuple[Any, ...] = ()
    target_mean: HostArray = field(default_factory=lambda: np.empty(0))
    target_scale: HostArray = field(default_factory=lambda: np.empty(0))
    feature_names: tuple[str, ...] = ()
    target_name: str = ""
    constant_features: tuple[int, ...] = ()

    @classmethod
    def fit(
        cls,
        X: HostArray,
        y: HostArray,
        task: Task,
        *,
        same_unit: bool = False,
        feature_names: tuple[str, ...] = (),
        target_name: str = "",
    ) -> Preprocessing:
        """Measure means and spreads, or list the classes, of training data.

        Parameters
        ----------
        X : numpy.ndarray of shape (n_samples, n_features)
        y : numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs)
        task : {"classification", "regression"}
        same_unit : bool
            Give all features one common scale, the root mean square of their own. Features in
            the same unit keep their proportions: a pixel that hardly varies stays faint.
        feature_names, target_name
            Kept, for tables with named columns.

        Returns
        -------
        Preprocessing
            It prints which features are constant.

        Raises
        ------
        DataError
            If features, or numbers to be predicted, are no numbers or not finite, or a class is
            missing; the message says where.
        TypeError
            If `X` is no array in host memory.
        ValueError
            If shapes do not fit, or there is no such task.
        """
        if task not in ("classification", "regression"):
            raise ValueError(unknown_name("task", task, ("classification", "regression")))
        _check_numbers("the features", X)
        y = np.asarray(y)
        if len(X) != len(y):
            raise ValueError(f"X has {len(X)} rows, y has {len(y)}: they must agree")
        mean, scale = _mean_and_scale("the features", X, same_unit=same_unit)
        fitted = cls(
            mean,
            scale,
            feature_names=feature_names,
            target_name=target_name,
            constant_features=tuple(np.flatnonzero(~_varies(X)).tolist()),
        )
        if task == "classification":
            return replace(fitted, classes=_classes(y))
        table = y.reshape(len(y), -1)
        _check_numbers("the target", table)
        target_mean, target_scale = _mean_and_scale("the target", table)
        return replace(fitted, target_mean=target_mean, target_scale=target_scale)

    @property
    def task(self) -> Task:
        """Classification if there are classes, else regression."""
        return "classification" if self.classes else "regression"

    @property
    def n_outputs(self) -> int:
        """How many outputs a model needs: one a class, or one a number to be predicted."""
        return len(self.classes) or len(self.target_mean)

    def features(self, X: HostArray) -> HostArray:
        """Return standardised features, float32 of shape (n_samples, n_features).

        Raises
        ------
        DataError
            If a number is not finite, or so far from the training data that float32 cannot hold
            it.
        TypeError
            If `X` is no array in host memory.
        ValueError
            If it has other columns than the training data.
        """
        _check_numbers("the features", X)
        if X.shape[1] != len(self.mean):
            raise ValueError(
                f"X has shape {X.shape}, the training data had {len(self.mean)} features"
            )
        return _standardised("the features", X, self.mean, self.scale)

    def targets(self, y: HostArray) -> HostArray:
        """Return labels, int64 of shape (n_samples,), or float32 (n_samples, n_outputs).

        Raises
        ------
        DataError
            If a class is not among those of the training data, or a number too far from them.
        """
        y = np.asarray(y)
        if not self.classes:
            table = y.reshape(len(y), -1)
            _check_numbers("the target", table)
            if table.shape[1] != len(self.target_mean):
                raise ValueError(
                    f"y has shape {y.shape}, the training data had {len(self.target_mean)} outputs"
                )
            return _standardised("the target", table, self.target_mean, self.target_scale)
        _check_classes(y)
        classes = np.array(self.classes)
        labels: HostArray = np.searchsorted(classes, y).clip(max=len(classes) - 1)
        unknown = classes[labels] != y
        if unknown.any():
            raise DataError(
                f"class {printable(y[unknown][0])} is not among those of the training data"
            )
        return labels

    def answers(self, outputs: HostArray) -> HostArray:
        """Return the classes, or the numbers in their own unit, that outputs of a model mean.

        Parameters
        ----------
        outputs : numpy.ndarray of shape (n_samples, n_outputs)

        Returns
        -------
        numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs)

        Raises
        ------
        ValueError
            If there are more or fewer outputs than answers.
        """
        if outputs.ndim != 2 or outputs.shape[1] != self.n_outputs:
            what = "classes" if self.classes else "numbers to be predicted"
            raise ValueError(
                f"outputs have shape {outputs.shape}, the training data had {self.n_outputs} {what}"
            )
        if self.classes:
            classes: HostArray = np.array(self.classes)[outputs.argmax(axis=-1)]
            return classes
        numbers: HostArray = outputs * self.target_scale + self.target_mean
        return numbers

    def to_arrays(self) -> tuple[dict[str, HostArray], dict[str, Any]]:
        """Return the arrays, and the rest as what JSON can hold, for a model's file."""
        arrays = {"mean": self.mean, "scale": self.scale}
        if not self.classes:
            arrays |= {"target_mean": self.target_mean, "target_scale": self.target_scale}
        options = {
            "classes": list(self.classes),
            "feature_names": list(self.feature_names),
            "target_name": self.target_name,
            "constant_features": list(self.constant_features),
        }
        return arrays, options

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, HostArray], options: Mapping[str, Any]
    ) -> Preprocessing:
        """Make again what :meth:`to_arrays` took apart; KeyError or ValueError if parts miss."""
        check_entries(options, ("classes", "feature_names", "target_name", "constant_features"))
        classes, feature_names = tuple(options["classes"]), tuple(options["feature_names"])
        names = {"mean", "scale"} | (set() if classes else {"target_mean", "target_scale"})
        if set(arrays) != names:
            raise ValueError(f"expected arrays {sorted(names)}, got {sorted(arrays)}")
        _check_scales(arrays["mean"], arrays["scale"])
        if not classes:
            _check_scales(arrays["target_mean"], arrays["target_scale"])
        elif not any(all(type(c) is kind for c in classes) for kind in (str, int, float, bool)):
            raise ValueError("the classes must be all text or all numbers")
        elif list(classes) != sorted(set(classes)):
            raise ValueError("the classes must be sorted and different")
        else:
            _check_loaded_classes(classes)
        if not all(isinstance(name, str) for name in [*feature_names, options["target_name"]]):
            raise ValueError("the names of the columns must be text")
        if len(feature_names) not in (0, len(arrays["mean"])):
            raise ValueError(f"{len(arrays['mean'])} features have {len(feature_names)} names")
        constant = tuple(options.get("constant_features", ()))
        if not all(type(c) is int and 0 <= c < len(arrays["mean"]) for c in constant):
            raise ValueError("the constant features must be numbers of columns")
        return cls(
            **arrays,
            classes=classes,
            feature_names=feature_names,
            target_name=options["target_name"],
            constant_features=constant,
        )

    @property
    def constant_names(self) -> tuple[str, ...]:
        """The constant features' names, or their numbers, counted from 0."""
        return tuple(
            self.feature_names[i] if self.feature_names else str(i) for i in self.constant_features
        )

    def __repr__(self) -> str:
        n = len(self.classes)
        what = f"classes: {_listed(list(map(str, self.classes)))}" if n else f"{self.task}"
        constant = ""
        if self.constant_features:
            count, names = len(self.constant_features), _listed(self.constant_names)
            constant = f", {count} of them constant and kept as zeros: {names}"
        features = f"{len(self.mean)} feature{'s' * (len(self.mean) != 1)}"
        return f"Preprocessing({features}{constant}; {what})"


def load_dataset(
    source: str | PathLike[str],
    target: str | PathLike[str] | None = None,
    *,
    target_column: str | None = None,
    feature_names: Sequence[str] | None = None,
) -> Dataset:
    """Read a data set: one of scikit-learn's by name, or the user's own files.

    Parameters
    ----------
    source : str or path
        ``"digits"``, ``"iris"``, ``"wine"``, ``"breast_cancer"``, ``"diabetes"`` (embedded, no
        download); a ``.csv`` file; an ``.npz`` file with arrays X and y; or an ``.npy`` file.
    target : path, optional
        The ``.npy`` file with y that belongs to an ``.npy`` file with X.
    target_column : str, optional
        For ``.csv``: the name or the number (from 1) of the column to predict; the last one
        unless given.
    feature_names : sequence of str, optional
        For ``.csv``: read features only, those with these names; all columns, in their order, if
        the file has no header or there are no names.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        If it is missing, empty, damaged, not numeric, not finite, ragged; the message says where.
        If it is made to do harm: no code in it is run, and sizes are checked before memory is
        taken.
    DeviceMemoryError
        If it takes more memory than is free.

    References
    ----------
    Digits: Alpaydin, Kaynak: Optical Recognition of Handwritten Digits. UCI, 1998.
    """
    if str(source) in BUILT_IN:
        return _built_in(str(source))
    path = Path(source)
    kind = path.suffix.lower()
    if not kind and not path.exists():
        raise DataError(unknown_name("data set", str(source), BUILT_IN))
    if kind not in (".csv", ".npz", ".npy"):
        raise DataError(f"cannot read {path}: expected a file ending in .csv, .npz or .npy")
    for file in [path] if target is None else [path, Path(target)]:
        if not file.is_file():
            raise DataError(f"there is no file {file}")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty")
    with within_memory(path):
        if kind == ".csv":
            return _read_csv(path, target_column, feature_names)
        if kind == ".npz":
            arrays = read_npz(path, ("X", "y"))
            return _checked(path.name, arrays["X"], arrays.get("y"))
        y = None if target is None else read_npy(Path(target))
        return _checked(path.name, read_npy(path), y)


def split(
    X: HostArray, y: HostArray, *, test_fraction: float = 0.2, seed: int = 0, stratify: bool
) -> tuple[HostArray, HostArray, HostArray, HostArray]:
    """Return X_train, X_test, y_train, y_test: a random part of the rows is held out.

    Parameters
    ----------
    X : numpy.ndarray of shape (n_samples, n_features)
    y : numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs)
    test_fraction : float
        Between 0 and 1.
    seed : int
    stratify : bool
        Whether both parts are to have the classes of `y` in the same proportions.

    Raises
    ------
    DataError
        If there are too few rows for that.
    """
    from sklearn.model_selection import train_test_split

    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    n_test = int(np.ceil(test_fraction * len(y)))
    if n_test >= len(y):
        raise DataError(f"holding out {n_test} of {len(y)} rows leaves none to train on")
    if stratify:
        classes, counts = np.unique(y, return_counts=True)
        classes = _without_points(classes)
        if len(classes) < 2:
            raise DataError(f"all {len(y):,} rows are of class {classes[0]}: nothing to tell apart")
        if counts.min() < 2:
            raise DataError(
                f"class {classes[counts.argmin()]} has one row only: at least two are needed, "
                "one to train on and one to hold out"
            )
        if min(n_test, len(y) - n_test) < len(classes):
            raise DataError(
                f"{len(classes)} classes are too many to hold out {n_test} of {len(y)} rows: "
                "each class needs a row in both parts"
            )
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=test_fraction, random_state=seed, stratify=y if stratify else None
    )
    return X_train, X_test, y_train, y_test


def _mean_and_scale(
    what: str, table: HostArray, *, same_unit: bool = False
) -> tuple[HostArray, HostArray]:
    """Return each column's mean and standard deviation; 1 instead of 0 for a constant column."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, scale = table.mean(axis=0), table.std(axis=0)
    bad = ~np.isfinite(scale)
    if bad.any():
        column = int(bad.argmax())
        largest = np.abs(table[:, column]).max()
        raise DataError(
            f"{what}: column {column} (counted from 0) has numbers up to {largest:g}, too large "
            "to standardise: give it in a larger unit"
        )
    varies = _varies(table)  # rounding may leave a constant column a spread, and another mean
    mean, scale = np.where(varies, mean, table[0]), np.where(varies, scale, 0.0)
    if same_unit:
        scale = np.full_like(scale, np.sqrt(np.square(scale).mean()))
    return mean, np.where(scale > 0, scale, 1.0)


def _standardised(what: str, table: HostArray, mean: HostArray, scale: HostArray) -> HostArray:
    """Return (table - mean) / scale in float32."""
    with np.errstate(over="ignore"):
        numbers: HostArray = ((table - mean) / scale).astype(np.float32)
    n_bad, (row, column) = _first_bad(numbers)
    if n_bad:
        raise DataError(
            f"{what}: {table[row, column]:g} in column {column} (counted from 0) is too far from "
            f"the training data, which have a mean of {mean[column]:g} and a standard deviation "
            f"of {scale[column]:g}"
        )
    return numbers


def _varies(table: HostArray) -> HostArray:
    """Return of each column whether it is not constant."""
    varies: HostArray = table.max(axis=0) > table.min(axis=0)
    return varies


def _check_numbers(what: str, table: HostArray) -> None:
    """Refuse a table that cannot be standardised, and say where."""
    if device_of(table).kind == "gpu":
        raise TypeError(f"{what} are on a GPU: preprocess on the host, gpuml.to_host(a)")
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"{what}: shape {table.shape}, expected (n_samples, n_features), not empty"
        )
    if table.dtype.kind not in "biuf":
        raise DataError(
            f"{what} are of type {table.dtype}, not numbers: a.astype(float) if they are"
        )
    n_bad, (row, column) = _first_bad(table)
    if n_bad:
        raise DataError(
            f"{what}: row {row}, column {column} (counted from 0) is {table[row, column]:g}, not "
            "finite: remove the row, or fill in a number"
        )


def _check_classes(y: HostArray) -> None:
    """Refuse what cannot be classes, and say where one is missing."""
    if y.ndim != 1 or not len(y):
        raise ValueError(f"y has shape {y.shape}, expected a class for each sample, (n_samples,)")
    missing = y != y  # as NaN alone is
    if y.dtype == object:  # as of pandas
        missing = np.array([c is None or c != c for c in y])
    if missing.any():
        row = int(missing.argmax())
        raise DataError(
            f"the class in row {row} (counted from 0) is missing ({y[row]}): remove the row, or "
            "give a name to such rows"
        )


def _classes(y: HostArray) -> tuple[Any, ...]:
    """Return the different classes, sorted."""
    _check_classes(y)
    try:
        different = np.unique(y)
    except TypeError:  # they cannot be compared
        raise DataError("the classes must be all text or all numbers") from None
    return tuple(_without_points(different).tolist())


def _check_loaded_classes(classes: tuple[Any, ...]) -> None:
    """Refuse classes that NumPy cannot hold, or only with far more memory than a file has."""
    if type(classes[0]) is str:
        n_bytes = 4 * len(classes) * max(map(len, classes))
        if n_bytes > MOST_TEXT:
            raise ValueError(f"the names of the classes would take {n_bytes:,} bytes")
        if any(name.endswith("\0") for name in classes):
            raise ValueError("the name of a class ends with a zero byte")
    elif type(classes[0]) is float and not np.isfinite(classes).all():
        raise ValueError("the classes must be finite")
    elif type(classes[0]) is int and not -(2**63) <= classes[0] <= classes[-1] < 2**63:
        raise ValueError("the classes must have at most 64 bits")


def check_entries(table: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse what a newer version may have written, and this one would ignore; ValueError."""
    for name in table:
        if name not in known:
            raise ValueError(
                f"it has an entry '{printable(name)}', which this version of gpuml does not know"
            )


def _check_scales(mean: HostArray, scale: HostArray) -> None:
    """Refuse what :func:`_mean_and_scale` cannot have made."""
    if mean.ndim != 1 or mean.shape != scale.shape or not len(mean):
        raise ValueError(f"means of shape {mean.shape} with scales of shape {scale.shape}")
    if mean.dtype.kind != "f" or scale.dtype.kind != "f":
        raise ValueError(f"means of type {mean.dtype} with scales of type {scale.dtype}")
    if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("means must be finite, scales finite and positive")


def _are_whole(values: HostArray) -> bool:
    """Whether numbers are whole, and so small that float64 holds each whole number."""
    return bool((values == np.round(values)).all() and (np.abs(values) <= 2**53).all())


def _without_points(classes: HostArray) -> HostArray:
    """Return whole numbers as integers: a class is 7, not 7.0."""
    whole = classes.dtype.kind == "f" and _are_whole(classes)
    return classes.astype(np.int64) if whole else classes


def _built_in(name: str) -> Dataset:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    y = bunch.target
    if name == "diabetes":
        y = y.astype(np.float64)
    elif name != "digits":
        y = np.asarray(bunch.target_names)[y]
    names = tuple(map(str, bunch.feature_names))
    return Dataset(name, bunch.data, y, names, "target", same_unit=name == "digits")


def _checked(name: str, X: HostArray, y: HostArray | None) -> Dataset:
    """Refuse arrays that no model can be trained on; the message says what and where."""
    if X.ndim != 2:
        raise DataError(
            f"X in {name} has shape {X.shape}, expected (n_samples, n_features): "
            "X.reshape(len(X), -1) makes a table"
        )
    if X.dtype.kind not in "fiub":
        raise DataError(f"X in {name} is not numeric, but of type {X.dtype}")
    if 0 in X.shape:
        raise DataError(f"X in {name} is empty: its shape is {X.shape}")
    with np.errstate(over="ignore"):  # of numbers of 80 bits
        X = X.astype(np.float64, copy=False)
    _refuse_non_finite(f"X in {name}", X)
    if y is None:
        return Dataset(name, X, None)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2) or 0 in y.shape[1:]:
        raise DataError(f"y in {name} has shape {y.shape}, expected (n_samples,)")
    if len(y) != len(X):
        raise DataError(f"X in {name} has {len(X)} rows, y has {len(y)}: they must agree")
    if y.dtype.kind not in "fiubU":
        raise DataError(f"y in {name} is neither numbers nor text, but of type {y.dtype}")
    if y.dtype.kind in "fiu":
        with np.errstate(over="ignore"):
            y = y.astype(np.float64, copy=False)
        _refuse_non_finite(f"y in {name}", y.reshape(len(y), -1))
    return Dataset(name, X, y)


def _refuse_non_finite(what: str, table: HostArray) -> None:
    n_bad, (row, column) = _first_bad(table)
    if n_bad:
        raise DataError(
            f"{what}: row {row}, column {column} (counted from 0) is {table[row, column]}"
            + (f", and {n_bad - 1} more are not finite" if n_bad > 1 else "")
            + ": remove the rows, or fill in numbers"
        )


def _first_bad(table: HostArray) -> tuple[int, tuple[int, int]]:
    """Return how many numbers are not finite, and the row and the column of the first.

    np.argwhere would take 16 bytes for each of them.
    """
    finite = np.isfinite(table)
    row, column = divmod(int(finite.argmin()) if finite.size else 0, max(1, table.shape[1]))
    return finite.size - int(np.count_nonzero(finite)), (row, column)


@dataclass(frozen=True)
class _Layout:
    """How the rows of a .csv file are to be read."""

    delimiter: str
    cells: list[str]  # of the first row
    names: list[str]  # the same if it is a header, else none
    n_header_lines: int  # a quoted name may go over several
    used: list[int]  # columns with features, in the order wanted
    truths: frozenset[int]  # those of them that hold true and false
    target: int | None

    @property
    def read(self) -> list[int]:
        """The columns that must be filled: features, and the target if there is one."""
        return self.used if self.target is None else [*self.used, self.target]


def _read_csv(
    path: Path, target_column: str | None, feature_names: Sequence[str] | None
) -> Dataset:
    """Read a table of numbers, with or without a header; the target column may hold text."""
    layout = _layout(path, target_column, feature_names)
    X, y, fault = _load_table(path, layout)
    if fault is not None:
        raise DataError(_first_bad_cell(path, layout) or f"{path}: {printable(fault, 200)}")
    if not len(X):
        raise DataError(f"{path} has a header but no rows")
    names = tuple(layout.names[i] for i in layout.used) if layout.names else ()
    target_name = layout.names[layout.target] if layout.names and layout.target is not None else ""
    return Dataset(path.name, X, y, names, target_name)


def _layout(path: Path, target_column: str | None, feature_names: Sequence[str] | None) -> _Layout:
    """Find out from the first row what the columns are."""
    try:
        delimiter, cells, second, n_lines = _first_rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a text file of comma-separated values: {error}") from None
    if cells in ([], [""]):
        raise DataError(f"{path} is empty")
    if len(cells) > MOST_COLUMNS:
        raise DataError(_too_wide(path))
    target = None
    if feature_names is None:
        target = _target_index(path, cells, target_column)
        used = [i for i in range(len(cells)) if i != target]
        if not used:
            raise DataError(f"{path} has one column only: features and a target are needed")
    else:
        used = _feature_indices(path, cells, feature_names)
    # A header is a first row without a single number among the features.
    names = [] if any(_is_value(cells[i]) for i in used) else cells
    row = second if names else cells
    truths = frozenset(i for i in used if i < len(row) and row[i].lower() in _TRUTH)
    layout = _Layout(delimiter, cells, names, n_lines if names else 0, used, truths, target)
    if names:
        _check_names(path, layout)
    else:
        _refuse_numbers_for_names(path, layout, second)
    return layout


def _too_wide(path: Path) -> str:
    return (
        f"{path} has more than {MOST_COLUMNS:,} columns: if rows and columns are exchanged, turn "
        "it, else save it by np.save(path, X)"
    )


def _check_names(path: Path, layout: _Layout) -> None:
    """Refuse a header that leaves a column without a name of its own."""
    names = layout.names
    twice = {name for name, n in Counter(names).items() if n > 1}
    for column in sorted(layout.read):
        if not names[column]:
            cure = "name it, or leave it out"
            if column == 0:
                cure = "leave it out, in pandas to_csv(index=False), in R row.names = FALSE"
            elif column == len(names) - 1:
                cure = f"if each line ends with a '{printable(layout.delimiter)}', remove that"
            raise DataError(f"{path}: column {column + 1} has no name: {cure}")
        if names[column] in twice:
            raise DataError(
                f"{path} has several columns named '{printable(names[column])}': rename them"
            )


def _refuse_numbers_for_names(path: Path, layout: _Layout, second: Sequence[str]) -> None:
    """Refuse a first row of text and numbers where the second has numbers under the text."""
    for column in sorted(layout.read):
        name, below = layout.cells[column], second[column] if column < len(second) else ""
        if name and not _is_value(name) and _is_number(below):
            raise DataError(
                f"{path}: row 1 looks like a header with numbers for names ('{printable(name)}' "
                f"stands over {printable(below)}): rename the columns; if it is a row of "
                "data, write a header above it"
            )


def _load_table(path: Path, layout: _Layout) -> tuple[HostArray, HostArray | None, str | None]:
    """Return the features, the target, and what is wrong with them, if anything is."""
    codes: dict[str, int] = {}  # of the target's different cells
    unused = set(range(len(layout.cells))) - set(layout.used)
    converters: dict[int | str, Callable[[str], float]] = {i: lambda _: 0.0 for i in unused}
    converters |= {i: lambda cell: _TRUTH[cell.strip().lower()] for i in layout.truths}
    if layout.target is not None:
        converters[layout.target] = lambda cell: codes.setdefault(cell.strip(), len(codes))
    try:
        with warnings.catch_warnings(action="ignore"):  # about a header without rows
            table = np.loadtxt(
                path,
                dtype=np.float64,
                delimiter=layout.delimiter,
                skiprows=layout.n_header_lines,
                converters=converters or None,
                comments=None,
                quotechar='"',
                ndmin=2,
                encoding="utf-8-sig",
            )
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from None
    except ValueError as error:
        return np.empty(0), None, str(error)
    if table.size == 0:
        return table, None, None
    if table.shape[1] != len(layout.cells):
        return table, None, f"{len(layout.cells)} columns at first, then {table.shape[1]}"
    y = None
    if layout.target is not None:
        _refuse_long_names(path, codes, len(table))
        y = _numbers_or_names(list(codes))[table[:, layout.target].astype(np.int64)]
        if y.dtype.kind != "f" and sum(map(_is_number, codes)) > MOST_NUMERIC_CLASSES:
            row = next(i for i, cell in enumerate(y) if not _is_number(cell))
            raise DataError(
                f"{path}: the target is a number in most rows, but '{printable(y[row])}' in row "
                f"{row + 1}"
            )
    X = table[:, layout.used]
    finite = np.isfinite(X).all() and (y is None or y.dtype.kind != "f" or np.isfinite(y).all())
    return X, y, None if finite and "" not in codes else "it is not finite"


def _refuse_long_names(path: Path, names: Iterable[str], n_rows: int) -> None:
    """Refuse names of classes that would take far more memory than the file is long."""
    longest = max(names, key=len, default="")
    n_bytes = 4 * n_rows * len(longest)
    if n_bytes > max(MOST_TEXT, 8 * path.stat().st_size) and not _is_number(longest):
        raise DataError(
            f"{path}: the target has a name of {len(longest):,} characters, '{printable(longest)}',"
            f" which for {n_rows:,} rows would take {n_bytes:,} bytes: name another column, or "
            "shorten the names"
        )


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    """Yield the lines of a file; refuse one so long that no table has it."""
    number = n_blank = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        n_blank = n_blank + 1 if line.isspace() else 0
        if n_blank > MOST_BLANK_LINES:
            raise DataError(
                f"{path} is no table: more than {MOST_BLANK_LINES:,} empty lines follow each other"
            )
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path} is no table: line {number} has more than {LONGEST_LINE:,} characters"
            )
        if max(map(line.count, ",;\t")) > MOST_COLUMNS:
            raise DataError(_too_wide(path))
        yield line


def _first_rows(path: Path) -> tuple[str, list[str], list[str], int]:
    """Return the delimiter, the cells of two rows, and the number of lines of the first."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        line = next((line for line in _lines(path, file) if line.strip()), "")
        outside_quotes = re.sub('"[^"]*("|$)', "", line)
        delimiter = max(",;\t", key=outside_quotes.count)
        file.seek(0)
        reader = csv.reader(_lines(path, file), delimiter=delimiter)
        rows = ([cell.strip() for cell in row] for row in reader if row)
        first, n_lines = next(rows, []), reader.line_num
        return delimiter, first, next(rows, []), n_lines


def _target_index(path: Path, cells: Sequence[str], target_column: str | None) -> int:
    if target_column is None:
        return len(cells) - 1
    if target_column in cells:
        return cells.index(target_column)
    if target_column.isdecimal() and 1 <= int(target_column) <= len(cells):
        return int(target_column) - 1
    raise DataError(f"{path}: " + unknown_name("column", target_column, cells))


def _feature_indices(path: Path, cells: Sequence[str], feature_names: Sequence[str]) -> list[int]:
    """Return where the named columns are; all columns where there are no names."""
    places = {name: i for i, name in reversed([*enumerate(cells)])}  # the first of each
    missing = [name for name in feature_names if name not in places]
    if len(missing) == len(feature_names):
        if not feature_names or any(map(_is_value, cells)):
            return list(range(len(cells)))
        raise DataError(
            f"{path} has columns {_listed(cells)}; the model was trained on "
            f"{_listed(feature_names)}: name them so, or give the table without a header"
        )
    if missing:
        raise DataError(
            f"{path} lacks the column '{printable(missing[0])}' that the model was trained on"
        )
    return [places[name] for name in feature_names]


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(printable, names[:most])) + (
        f", … ({len(names)} in all)" if len(names) > most else ""
    )


def _numbers_or_names(cells: Sequence[str]) -> HostArray:
    if all(map(_is_number, cells)):
        return np.array(cells, dtype=np.float64)
    return np.array(cells)


def _is_number(cell: str) -> bool:
    """Whether a cell is a number to NumPy, which unlike Python reads neither 1_000 nor １."""
    try:
        float(cell)
    except ValueError:
        return False
    return cell.isascii() and "_" not in cell


def _is_value(cell: str) -> bool:
    return _is_number(cell) or cell.lower() in _TRUTH


def _first_bad_cell(path: Path, layout: _Layout) -> str | None:
    """Read the table again, slowly, for the place of its first mistake."""
    width = len(layout.cells)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_lines(path, file), delimiter=layout.delimiter)
        rows = (row for row in reader if row)
        read, number = sorted(layout.read), 0
        try:
            if layout.names:
                next(rows)
            for number, row in enumerate(rows, start=1):
                where = f"{path}: row {number} (line {reader.line_num})"
                if len(row) != width:
                    return f"{where} has {len(row)} columns, expected {width}"
                for column in read:
                    fault = _fault(row[column].strip(), column, layout)
                    if fault:
                        name = f" ({printable(layout.names[column])})" if layout.names else ""
                        return f"{where}, column {column + 1}{name}{fault}"
        except (UnicodeDecodeError, csv.Error) as error:
            return f"{path}: row {number + 1} (line {reader.line_num + 1}): {error}"
    return None


def _fault(cell: str, column: int, layout: _Layout) -> str | None:
    """Say what is wrong with a cell, if anything is, and what to do."""
    fill, shown = "remove the row, or fill in a number", printable(cell)
    if not cell:
        if not layout.names and column == len(layout.cells) - 1:
            fill += f"; if each line ends with a '{printable(layout.delimiter)}', remove that"
        return f" is empty: {fill}"
    if column in layout.truths:
        return None if cell.lower() in _TRUTH else f": '{shown}' is neither true nor false: {fill}"
    if _is_number(cell):
        return None if np.isfinite(float(cell)) else f" is {shown}, not finite: {fill}"
    if column == layout.target:
        return None
    cure = "remove the column, or code it as numbers"
    if re.fullmatch(r"[+-]?\d*,\d+", cell):
        cure = "write a decimal point"
    elif cell.upper() in ("NA", "N/A", "NULL", "?"):
        cure = fill
    return f": '{shown}' is not a number: {cure}"
