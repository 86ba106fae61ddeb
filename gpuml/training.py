"""Training: a model, data, a loss and an optimizer in; a trained model and its history out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, TypeAlias

import numpy as np

from gpuml.batches import batches
from gpuml.devices import CPU, Array, array_module, blas_threads, device_of, to_host
from gpuml.errors import GpumlError
from gpuml.losses import Loss, get_loss, mean_squared_error, softmax_cross_entropy
from gpuml.model_files import replacing
from gpuml.models import Model
from gpuml.optimizers import Optimizer, get_optimizer

# (x, y) -> the loss before the step; one step changes the parameters in place
Step: TypeAlias = Callable[[Array, Array], Array]

# How often, in seconds, a running epoch looks at its losses and moves the progress bar. Each look
# waits for the device.
HEARTBEAT = 0.5

# Rows in one forward pass where no gradient is needed; it bounds the memory.
EVALUATED_ROWS = 8192


class History:
    """What training did, epoch by epoch: a table that prints, plots and exports itself.

    Attributes
    ----------
    columns : dict of str to list of float
        ``epoch`` (from 1), ``loss`` (mean over the epoch's samples, each before its step),
        ``validation_loss`` and ``validation_accuracy`` where there were validation data and
        classes, and ``seconds`` since the start.
    device : str
        On what it ran.
    engine : str
        How the steps ran: ``"eager"``.
    n_samples, batch_size : int
        Samples in each epoch, and in each full batch.
    """

    def __init__(self, *, device: str, engine: str, n_samples: int, batch_size: int) -> None:
        self.columns: dict[str, list[float]] = {}
        self.device = device
        self.engine = engine
        self.n_samples = n_samples
        self.batch_size = batch_size

    def append(self, row: Mapping[str, float]) -> None:
        """Add one epoch's row."""
        for name, value in row.items():
            self.columns.setdefault(name, []).append(value)

    def truncate(self, n_epochs: int) -> None:
        """Drop what came after the first `n_epochs` epochs."""
        for column in self.columns.values():
            del column[n_epochs:]

    def __getitem__(self, column: str) -> list[float]:
        """Return one column, such as ``history["loss"]``."""
        return self.columns[column]

    def __len__(self) -> int:
        """Return the number of finished epochs."""
        return len(self.columns.get("epoch", ()))

    @property
    def n_steps(self) -> int:
        """How many steps were taken in the finished epochs."""
        return len(self) * math.ceil(self.n_samples / self.batch_size)

    @property
    def seconds(self) -> float:
        """How long the finished epochs took, validation included."""
        return self.columns["seconds"][-1] if len(self) else 0.0

    @property
    def samples_per_second(self) -> float:
        """Training samples per second over all finished epochs."""
        return len(self) * self.n_samples / self.seconds if self.seconds else 0.0

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table as comma-separated values, one row an epoch."""
        rows = [",".join(self.columns)]
        rows += [",".join(map(repr, row)) for row in zip(*self.columns.values(), strict=True)]
        with replacing(path) as temporary:
            temporary.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")

    def plot(self, axes: Any = None) -> Any:
        """Draw the losses, and the accuracy if there is one; see :func:`gpuml.plots.history`."""
        from gpuml import plots

        return plots.history(self.columns, self.device, axes)

    def _cells(self) -> Iterator[list[str]]:
        yield list(self.columns)
        for row in zip(*self.columns.values(), strict=True):
            yield [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]

    def __str__(self) -> str:
        rows = list(self._cells())
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )

    def __repr__(self) -> str:
        return f"History({len(self)} epochs, {self.engine}, {self.device})"


class DivergenceError(GpumlError, ArithmeticError):
    """The loss or the weights stopped being finite.

    The model holds the weights of the last epoch that ended well (those from before training if
    there is none), and `history` the epochs until then.
    """

    def __init__(self, message: str, history: History) -> None:
        super().__init__(message)
        self.history = history


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C came during training.

    The model holds the weights of the last finished epoch, and `history` the epochs until then.
    """

    def __init__(self, history: History) -> None:
        n = len(history)
        super().__init__(f"training stopped after {n} finished epoch{'s' * (n != 1)}")
        self.history = history


def train(
    model: Model,
    X: Array,
    y: Array,
    *,
    loss: str | Loss | None = None,
    optimizer: str | Optimizer = "adam",
    n_epochs: int = 10,
    batch_size: int | None = 64,
    validation_data: tuple[Array, Array] | None = None,
    shuffle: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> History:
    """Train a model in place, on the device where it lives, and return what happened.

    Parameters
    ----------
    model : Model
        Its parameters change.
    X : array of shape (n_samples, n_features)
        On the model's device, or in host memory: then it is copied to the device once.
    y : array of shape (n_samples,) or (n_samples, n_outputs)
        Integer labels from 0 for classification, numbers for regression; where `X` is.
    loss : str or callable, optional
        ``"cross_entropy"`` or ``"mean_squared_error"``, or a function
        ``(predictions, targets) -> (value, d_predictions)``, which gets integers as they are and
        numbers as (batch, n_outputs). Unless given, cross entropy for integer `y` and the mean
        squared error for others.
    optimizer : str or Optimizer
        ``"adam"``, ``"gradient_descent"``, or one with settings of its own.
    n_epochs : int
        How many times each sample is seen.
    batch_size : int or None
        Samples in a step; the last step of an epoch may have fewer. None for all at once.
    validation_data : (X, y), optional
        Samples never trained on; loss and accuracy on them are measured after each epoch.
    shuffle : bool
        Whether each epoch has its own order of the samples.
    seed : int
        For that order. The same seed on the same device gives the same bits.
    progress : bool, optional
        Whether to show a progress bar on standard error; if that is a terminal unless given.

    Returns
    -------
    History

    Raises
    ------
    TypeError
        If `X` lives on a GPU and the model elsewhere.
    ValueError
        If shapes do not fit, labels are not classes of the model, or a setting is out of range.
    DivergenceError
        If the loss or the weights stop being finite.
    TrainingInterrupted
        If Ctrl-C comes; the model then holds the weights of the last finished epoch.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuml.models import Linear
    >>> X = np.array([[0.0], [1.0], [2.0]], dtype=np.float32)
    >>> model = Linear(1, 1, device="cpu")
    >>> history = train(model, X, 3 * X + 1, optimizer="adam", n_epochs=5, batch_size=None)
    >>> len(history), history["loss"][-1] < history["loss"][0]
    (5, True)
    """
    n_epochs = _positive_integer("n_epochs", n_epochs)
    if batch_size is not None:
        batch_size = _positive_integer("batch_size", batch_size)
    if validation_data is not None and len(validation_data) != 2:
        raise ValueError("validation_data must be a pair: (X, y)")
    optimizer = get_optimizer(optimizer)
    device = model.device
    with device.use():
        loss = get_loss(loss or _usual_loss(y))
        X, y = _prepared(model, X, y, loss)
        if validation_data is not None:
            validation_data = _prepared(model, *validation_data, loss)
        batch_size = min(batch_size or len(X), len(X))
        n_steps = math.ceil(len(X) / batch_size)
        history = History(
            device=str(device), engine="eager", n_samples=len(X), batch_size=batch_size
        )
        generator = np.random.default_rng(seed) if shuffle else None
        step = _make_step(model, loss, optimizer)
        losses = device.xp.zeros(n_steps, model.dtype)
        good = _Good(model.parameters.flat)
        bar = _ProgressBar(progress, n_epochs, n_steps)
        start = time.perf_counter()
        try:
            # NumPy's warnings about overflow say less than DivergenceError, which follows them.
            with blas_threads(_largest_product(model, batch_size)), np.errstate(all="ignore"), bar:
                for epoch in range(1, n_epochs + 1):
                    row: dict[str, float] = {"epoch": epoch}
                    row["loss"] = _one_epoch(
                        step, batches(X, y, batch_size, generator=generator), losses, bar
                    )
                    if not bool(device.xp.isfinite(model.parameters.flat).all()):
                        raise _NotFiniteError(n_steps, "a weight")
                    if validation_data is not None:
                        for name, value in _evaluate(model, *validation_data, loss).items():
                            if not math.isfinite(value):
                                raise _NotFiniteError(n_steps, f"the validation {name}")
                            row[f"validation_{name}"] = value
                    row["seconds"] = time.perf_counter() - start
                    history.append(row)
                    good.keep(epoch)
                    bar.show_epoch(row)
        except BaseException as error:
            history.truncate(good.restore())
            if isinstance(error, KeyboardInterrupt):
                raise TrainingInterrupted(history) from None
            if isinstance(error, _NotFiniteError):
                data = {"X": X, "y": y}
                if validation_data is not None:
                    data |= {"X of the validation data": validation_data[0]}
                    data |= {"y of the validation data": validation_data[1]}
                raise DivergenceError(_explain(error, data, optimizer, history), history) from None
            raise
    return history


def evaluate(
    model: Model, X: Array, y: Array, *, loss: str | Loss | None = None
) -> dict[str, float]:
    """Return a model's mean loss on data, and with cross entropy its accuracy.

    Parameters
    ----------
    model : Model
    X : array of shape (n_samples, n_features)
        On the model's device, or in host memory.
    y : array of shape (n_samples,) or (n_samples, n_outputs)
        As for :func:`train`.
    loss : str or callable, optional
        As for :func:`train`.

    Returns
    -------
    dict
        ``loss``, and with cross entropy ``accuracy``: the share of rows whose largest output is
        that of their label.
    """
    with model.device.use():
        loss = get_loss(loss or _usual_loss(y))
        X, y = _prepared(model, X, y, loss)
        with blas_threads(_largest_product(model, min(len(X), EVALUATED_ROWS))):
            return _evaluate(model, X, y, loss)


def predict(model: Model, X: Array) -> Array:
    """Return a model's outputs for many rows, in chunks that bound the memory needed.

    Parameters
    ----------
    model : Model
    X : array of shape (n_samples, n_features)
        On any device.

    Returns
    -------
    array of shape (n_samples, n_outputs)
        Where `X` lives.
    """
    device, home = model.device, device_of(X)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {X.shape}, expected (n_samples, n_features), not empty")
    with blas_threads(_largest_product(model, min(len(X), EVALUATED_ROWS))):
        outputs = [
            home.asarray(model(device.asarray(X[start : start + EVALUATED_ROWS], model.dtype)))
            for start in range(0, len(X), EVALUATED_ROWS)
        ]
    return home.xp.concatenate(outputs)


def _make_step(model: Model, loss: Loss, optimizer: Optimizer) -> Step:
    """Put the step together: forward, loss, backward, update."""
    parameters = model.parameters
    gradients = parameters.zeros_like()
    state = optimizer.init(parameters)

    def step(x: Array, y: Array) -> Array:
        predictions, backward = model.forward(parameters, x)
        value, d_predictions = loss(predictions, y)
        backward(d_predictions, gradients)
        optimizer.update(parameters, gradients, state)
        return value

    return step


def _one_epoch(
    step: Step, data: Iterable[tuple[Array, Array]], losses: Array, bar: _ProgressBar
) -> float:
    """Take a step for each batch and return the mean loss over the samples."""
    sizes = []
    looked = time.monotonic()
    for i, (x, y) in enumerate(data):
        losses[i] = step(x, y)
        sizes.append(len(x))
        if time.monotonic() - looked > HEARTBEAT:
            _refuse_non_finite(losses[: i + 1])  # and so wait for the device
            bar.show_step(i + 1)
            looked = time.monotonic()
    return float(_refuse_non_finite(losses).astype(np.float64) @ sizes) / sum(sizes)


def _evaluate(model: Model, X: Array, y: Array, loss: Loss) -> dict[str, float]:
    """Add up loss and hits on the device, chunk by chunk, and read them once."""
    total, hits = 0.0, 0
    for x, targets in batches(X, y, EVALUATED_ROWS):
        predictions = model(x)
        total = total + loss(predictions, targets)[0] * len(x)
        if loss is softmax_cross_entropy:
            hits = hits + (predictions.argmax(axis=-1) == targets).sum()
    measured = {"loss": float(total) / len(X)}
    if loss is softmax_cross_entropy:
        measured["accuracy"] = float(hits) / len(X)
    return measured


class _NotFiniteError(Exception):
    """A number stopped being finite; `step` counts from 1 inside the epoch."""

    def __init__(self, step: int, what: str) -> None:
        self.step = step
        self.what = what


def _refuse_non_finite(losses: Array) -> np.ndarray[Any, Any]:
    """Bring losses to the host, unless one is not finite."""
    values: np.ndarray[Any, Any] = to_host(losses)
    bad = ~np.isfinite(values)
    if bad.any():
        raise _NotFiniteError(int(bad.argmax()) + 1, f"the loss is {values[bad][0]}, which")
    return values


def _explain(
    error: _NotFiniteError, data: Mapping[str, Array], optimizer: Optimizer, history: History
) -> str:
    """Say where a number stopped being finite, why, and what to do."""
    where = f"epoch {len(history) + 1}, step {error.step}: {error.what} is not finite"
    for name, array in data.items():
        finite = array_module(array).isfinite(array)
        if not bool(finite.all()):
            row, column = divmod(int((~finite).argmax()), math.prod(array.shape[1:]))
            return f"{where}, since row {row}, column {column} of {name} is not"
    if error.what.startswith("the validation"):
        where += " on data that the model has not seen; some may be far from the training data"
    rate = getattr(optimizer, "learning_rate", None)
    cure = f"try learning_rate={rate / 10:g} instead of {rate:g}" if rate else "lower its rate"
    return f"{where}. The steps may be too large: {cure}, or standardise the features"


class _Good:
    """A copy of the weights of the last epoch that ended well."""

    def __init__(self, flat: Array) -> None:
        self.flat = flat
        self.spare = flat.copy()
        self.last = (0, flat.copy())

    def keep(self, epoch: int) -> None:
        """Copy the weights; Ctrl-C at any moment leaves the old copy or the new one, whole."""
        self.spare[...] = self.flat
        _, old = self.last
        self.last = (epoch, self.spare)
        self.spare = old

    def restore(self) -> int:
        """Put the copy back and return its epoch."""
        epoch, copy = self.last
        self.flat[...] = copy
        return epoch


class _ProgressBar:
    """tqdm's bar over all steps, on a terminal; nothing elsewhere."""

    def __init__(self, show: bool | None, n_epochs: int, n_steps: int) -> None:
        self.bar: Any = None
        self.n_epochs, self.n_steps = n_epochs, n_steps
        if sys.stderr.isatty() if show is None else show:
            from tqdm import tqdm

            self.bar = tqdm(total=n_epochs * n_steps, unit="step", dynamic_ncols=True)
            self.bar.set_description(f"epoch 1/{n_epochs}")
        self.done = 0

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show_step(self, step: int) -> None:
        """Move to a step of the running epoch."""
        if self.bar is not None:
            self.bar.update(self.done + step - self.bar.n)

    def show_epoch(self, row: Mapping[str, float]) -> None:
        """Move to the end of an epoch and show its numbers."""
        self.done += self.n_steps
        if self.bar is None:
            return
        # The most telling first: a narrow terminal cuts off the rest.
        names = ["validation_accuracy", "validation_loss", "loss"]
        shown = {n.replace("validation_", "val_"): row[n] for n in names if n in row}
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self.bar.set_description(f"epoch {row['epoch']:.0f}/{self.n_epochs}", refresh=False)
        self.bar.update(self.done - self.bar.n)


def _positive_integer(name: str, value: Any) -> int:
    """Return a whole number of any type as an int, or say that it is none."""
    if isinstance(value, bool) or value < 1 or value != int(value):
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return int(value)


def _usual_loss(y: Array) -> str:
    device_of(y)  # refuses what is no array
    is_labels = y.dtype.kind in "iu" and y.ndim == 1
    return "cross_entropy" if is_labels else "mean_squared_error"


def _largest_product(model: Model, batch_size: int) -> float:
    """Floating-point operations of the largest matrix product in a step: 2 M N K."""
    return 2.0 * batch_size * max(map(math.prod, model.parameters.shapes.values()))


def _prepared(model: Model, X: Array, y: Array, loss: Loss) -> tuple[Array, Array]:
    """Return X and y on the model's device, in the types and shapes that it needs."""
    device = model.device
    data_device = device_of(X, y)
    if data_device not in (CPU, device):
        raise TypeError(
            f"the model is on {device.kind}, X and y are on gpu:{data_device.index}: "
            f'model.to("gpu:{data_device.index}") moves the model'
        )
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {X.shape}, expected (n_samples, n_features), not empty")
    if len(X) != len(y):
        raise ValueError(f"X has {len(X)} rows, y has {len(y)}: they must agree")
    X = device.asarray(X, model.dtype)
    n_outputs = model(X[:1]).shape[-1]
    if loss is softmax_cross_entropy:
        if y.dtype.kind not in "iu" or y.ndim != 1:
            raise ValueError(
                f"cross entropy needs integer labels of shape ({len(X)},), "
                f"got {y.dtype} of shape {y.shape}"
            )
        if y.min() < 0 or y.max() >= n_outputs:
            raise ValueError(
                f"labels must be from 0 to {n_outputs - 1}, one for each of the model's outputs, "
                f"got {int(y.min())} to {int(y.max())}; to predict whole numbers, "
                'loss="mean_squared_error"'
            )
    if y.dtype.kind in "iu" and loss is not mean_squared_error:
        return X, device.asarray(y, np.int64)
    y = device.asarray(y, model.dtype)
    if y.ndim == 1:
        y = y[:, None]
    if loss is mean_squared_error and y.shape != (len(X), n_outputs):
        raise ValueError(
            f"y has shape {y.shape}, the model's outputs ({len(X)}, {n_outputs}); if y are "
            "labels, make them integers: y.astype(int)"
        )
    return X, y
