"""Data sets: scikit-learn's small ones, the user's own files, and what happens before training.

All of it works on host arrays; :meth:`gpuml.Device.asarray` brings them to a device.
"""

from __future__ import annotations

import csv
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from gpuml.errors import DataError, unknown_name

HostArray: TypeAlias = np.ndarray[Any, Any]
Task: TypeAlias = Literal["classification", "regression"]

BUILT_IN = ("breast_cancer", "diabetes", "digits", "iris", "wine")

# A column of whole numbers with at most this many different ones is taken for classes.
MOST_NUMERIC_CLASSES = 30


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
        whole = bool((values == np.round(values)).all())
        few = len(values) <= min(MOST_NUMERIC_CLASSES, len(self.y) // 2)
        return "classification" if whole and few else "regression"


@dataclass(frozen=True)
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
    """

    mean: HostArray
    scale: HostArray
    classes: tuple[Any, ...] = ()
    target_mean: HostArray = field(default_factory=lambda: np.empty(0))
    target_scale: HostArray = field(default_factory=lambda: np.empty(0))
    feature_names: tuple[str, ...] = ()
    target_name: str = ""

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
        """
        mean, scale = _mean_and_scale(X, same_unit=same_unit)
        if task == "classification":
            values = np.unique(y)
            if values.dtype.kind == "f" and (values == np.round(values)).all():
                values = values.astype(np.int64)  # the class is 7, not 7.0
            return cls(
                mean,
                scale,
                classes=tuple(values.tolist()),
                feature_names=feature_names,
                target_name=target_name,
            )
        target_mean, target_scale = _mean_and_scale(y.reshape(len(y), -1))
        return cls(
            mean,
            scale,
            target_mean=target_mean,
            target_scale=target_scale,
            feature_names=feature_names,
            target_name=target_name,
        )

    @property
    def task(self) -> Task:
        """Classification if there are classes, else regression."""
        return "classification" if self.classes else "regression"

    @property
    def n_outputs(self) -> int:
        """How many outputs a model needs: one a class, or one a number to be predicted."""
        return len(self.classes) or len(self.target_mean)

    def features(self, X: HostArray) -> HostArray:
        """Return standardised features, float32 of shape (n_samples, n_features)."""
        standardised: HostArray = ((X - self.mean) / self.scale).astype(np.float32)
        return standardised

    def targets(self, y: HostArray) -> HostArray:
        """Return labels, int64 of shape (n_samples,), or float32 (n_samples, n_outputs).

        Raises
        ------
        DataError
            If a class is not among those of the training data.
        """
        if not self.classes:
            numbers: HostArray = (y.reshape(len(y), -1) - self.target_mean) / self.target_scale
            return numbers.astype(np.float32)
        classes = np.array(self.classes)
        labels: HostArray = np.searchsorted(classes, y).clip(max=len(classes) - 1)
        unknown = classes[labels] != y
        if unknown.any():
            raise DataError(f"class {y[unknown][0]} is not among those of the training data")
        return labels

    def answers(self, outputs: HostArray) -> HostArray:
        """Return the classes, or the numbers in their own unit, that outputs of a model mean.

        Parameters
        ----------
        outputs : numpy.ndarray of shape (n_samples, n_outputs)

        Returns
        -------
        numpy.ndarray of shape (n_samples,) or (n_samples, n_outputs)
        """
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
        }
        return arrays, options

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, HostArray], options: Mapping[str, Any]
    ) -> Preprocessing:
        """Make again what :meth:`to_arrays` took apart; KeyError or ValueError if parts miss."""
        names = {"mean", "scale"} | (
            set() if options["classes"] else {"target_mean", "target_scale"}
        )
        if set(arrays) != names:
            raise ValueError(f"expected arrays {sorted(names)}, got {sorted(arrays)}")
        return cls(
            **arrays,
            classes=tuple(options["classes"]),
            feature_names=tuple(options["feature_names"]),
            target_name=str(options["target_name"]),
        )


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
        For ``.csv``: read features only, those with these names; all columns if the file has no
        such names.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        If it is missing, empty, damaged, not numeric, not finite, ragged; the message says where.

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
    if kind == ".csv":
        return _read_csv(path, target_column, feature_names)
    if kind == ".npz":
        return _read_npz(path)
    return _read_npy(path, None if target is None else Path(target))


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
    if stratify:
        classes, counts = np.unique(y, return_counts=True)
        n_test = int(np.ceil(test_fraction * len(y)))
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


def _mean_and_scale(table: HostArray, *, same_unit: bool = False) -> tuple[HostArray, HostArray]:
    """Return each column's mean and standard deviation; 1 instead of 0 for a constant column."""
    mean, scale = table.mean(axis=0), table.std(axis=0)
    if same_unit:
        scale = np.full_like(scale, np.sqrt(np.square(scale).mean()))
    return mean, np.where(scale > 0, scale, 1.0)


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


def _read_npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = {name.lower(): name for name in arrays.files}
            if "x" not in names:
                found = ", ".join(arrays.files) or "none"
                raise DataError(f"{path} needs arrays named X and y, it has: {found}")
            X = arrays[names["x"]]
            y = arrays[names["y"]] if "y" in names else None
    except DataError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(_unreadable(path, error)) from None
    return _checked(path.name, X, y)


def _read_npy(path: Path, target: Path | None) -> Dataset:
    loaded = []
    for file in [path] if target is None else [path, target]:
        try:
            loaded.append(np.load(file, allow_pickle=False))
        except (ValueError, OSError, EOFError) as error:
            raise DataError(_unreadable(file, error)) from None
        if not isinstance(loaded[-1], np.ndarray):
            raise DataError(f"{file} is not an .npy file, but an archive: name it .npz")
    return _checked(path.name, loaded[0], loaded[1] if target is not None else None)


def _unreadable(path: Path, error: Exception) -> str:
    if "Object arrays cannot be loaded" in str(error):
        return (
            f"{path} holds an object array, which only pickle can read, and a pickle can run "
            "any program: save it as numbers, e.g. np.save(path, array.astype(float))"
        )
    return f"{path} is damaged, or not the kind of file that its name says"


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
    X = X.astype(np.float64)
    _refuse_non_finite(f"X in {name}", X)
    if y is None:
        return Dataset(name, X, None)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2):
        raise DataError(f"y in {name} has shape {y.shape}, expected (n_samples,)")
    if len(y) != len(X):
        raise DataError(f"X in {name} has {len(X)} rows, y has {len(y)}: they must agree")
    if y.dtype.kind not in "fiubU":
        raise DataError(f"y in {name} is neither numbers nor text, but of type {y.dtype}")
    if y.dtype.kind == "f":
        _refuse_non_finite(f"y in {name}", y.reshape(len(y), -1))
    if y.dtype.kind in "iu" or y.dtype == np.float32:
        y = y.astype(np.float64)
    return Dataset(name, X, y)


def _refuse_non_finite(what: str, table: HostArray) -> None:
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"{what}: row {row}, column {column} (counted from 0) is {table[row, column]}"
            + (f", and {len(bad) - 1} more are not finite" if len(bad) > 1 else "")
            + ": remove the rows, or fill in numbers"
        )


def _read_csv(
    path: Path, target_column: str | None, feature_names: Sequence[str] | None
) -> Dataset:
    """Read a table of numbers, with or without a header; the target column may hold text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            first = next((row for row in csv.reader(file, delimiter=delimiter) if row), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a text file of comma-separated values: {error}") from None
    cells = [cell.strip() for cell in first]
    target = None
    if feature_names is None:
        target = _target_index(path, cells, target_column)
        used = [i for i in range(len(cells)) if i != target]
        if not used:
            raise DataError(f"{path} has one column only: features and a target are needed")
    elif feature_names and set(feature_names) <= set(cells):
        used = [cells.index(name) for name in feature_names]
    else:
        used = list(range(len(cells)))
    # A header is a first row without a single number among the features.
    has_header = not any(_is_number(cells[i]) or not cells[i] for i in used)

    codes: dict[str, int] = {}
    unused = set(range(len(cells))) - set(used)
    converters: dict[int | str, Callable[[str], float]] = {i: lambda _: 0.0 for i in unused}
    if target is not None:
        converters[target] = lambda cell: codes.setdefault(cell.strip(), len(codes))
    try:
        with warnings.catch_warnings(action="ignore"):  # about a header without rows
            table = np.loadtxt(
                path,
                dtype=np.float64,
                delimiter=delimiter,
                skiprows=1 if has_header else 0,
                converters=converters or None,
                comments=None,
                quotechar='"',
                ndmin=2,
                encoding="utf-8-sig",
            )
        fault = None if np.isfinite(table).all() and "" not in codes else "it is not finite"
    except ValueError as error:
        fault = str(error)
    if fault is not None:
        place = _first_bad_cell(path, delimiter, cells if has_header else [], used, target)
        raise DataError(place or f"{path}: {fault}")
    if table.size == 0:
        raise DataError(f"{path} has a header but no rows")
    X = table[:, used]
    names = tuple(cells[i] for i in used) if has_header else ()
    if target is None:
        return Dataset(path.name, X, None, names)
    y = _numbers_or_names(path, list(codes))[table[:, target].astype(np.int64)]
    return Dataset(path.name, X, y, names, cells[target] if has_header else "")


def _target_index(path: Path, cells: Sequence[str], target_column: str | None) -> int:
    if target_column is None:
        return len(cells) - 1
    if target_column in cells:
        return cells.index(target_column)
    if target_column.isdecimal() and 1 <= int(target_column) <= len(cells):
        return int(target_column) - 1
    raise DataError(f"{path}: " + unknown_name("column", target_column, cells))


def _numbers_or_names(path: Path, cells: Sequence[str]) -> HostArray:
    if not all(_is_number(cell) for cell in cells):
        return np.array(cells)
    numbers = np.array(cells, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise DataError(
            f"{path}: the target column has {cells[int(np.isfinite(numbers).argmin())]}"
        )
    return numbers


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _first_bad_cell(
    path: Path,
    delimiter: str,
    names: Sequence[str],
    used: Sequence[int],
    target: int | None,
) -> str | None:
    """Read the table again, slowly, for the place of its first mistake."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        rows = (row for row in reader if row)
        width = len(next(rows)) if names else None
        for number, row in enumerate(rows, start=1):
            where = f"{path}: row {number} (line {reader.line_num})"
            width = width or len(row)
            if len(row) != width:
                return f"{where} has {len(row)} columns, expected {width}"
            for column in sorted(used) if target is None else sorted([*used, target]):
                cell = row[column].strip()
                here = f"{where}, column {column + 1}" + (f" ({names[column]})" if names else "")
                if not cell:
                    return f"{here} is empty"
                if column != target and not _is_number(cell):
                    return f"{here}: '{cell}' is not a number"
                if column != target and not np.isfinite(float(cell)):
                    return f"{here} is {cell}, not finite"
    return None
