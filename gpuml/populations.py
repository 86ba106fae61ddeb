"""Many models of one shape, trained at once: restarts, searches, ensembles.

The parameters have one axis more in front, (n_models, …), and so have the optimizer's rates; all
else is the step of :mod:`gpuml.steps`, whose layers, losses and updates are written for leading
axes. How the steps are run is in :mod:`gpuml.population_runs`.
"""

from __future__ import annotations

import copy
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal

import numpy as np

from gpuml.batches import ArrayBatches
from gpuml.blocking import parse_size, size_text
from gpuml.devices import CPU, Array, array_module, blas_threads, device_of, to_host
from gpuml.errors import DeviceMemoryError, noting_memory_errors, unknown_name
from gpuml.faults import cause_in_data
from gpuml.history import SCORES, SHOWN_ROWS, History, aligned, html_table, number_text
from gpuml.losses import Loss, get_loss, softmax_cross_entropy
from gpuml.model_files import replacing
from gpuml.models import MLP, Linear, Model, Parameters
from gpuml.optimizers import Optimizer, get_optimizer
from gpuml.population_runs import (
    Crew,
    PopulationEngine,
    Results,
    Task,
    choose_engine,
    evaluated_rows,
    stack,
    train_in_parts,
)
from gpuml.schedules import Schedule, get_schedule
from gpuml.training import (
    DivergenceError,
    TrainingInterrupted,
    check_model,
    check_numbers,
    is_pair,
    largest_product,
    measured_on,
    positive_integer,
    source_of,
    usual_loss,
)

# Paths that take more bytes than this are refused: they are for pictures.
MOST_PATH_BYTES = 2**30

SURFACE_POINTS = 61  # along each axis of a loss surface


class PopulationInterrupted(TrainingInterrupted):
    """Ctrl-C came while a population was trained.

    `population` holds the models as they were after their last finished epochs, `history` those of
    the best of them.
    """

    def __init__(self, population: Population) -> None:
        n = int(population.epochs.max(initial=0))
        KeyboardInterrupt.__init__(self, f"training stopped after {n} finished epochs")
        self.population, self.history = population, population.history(population.best_index)


class PopulationDivergedError(DivergenceError):
    """The loss of every model stopped being finite.

    `population` holds the models as they were after their last good epochs, `history` those of the
    one that came farthest.
    """

    def __init__(self, message: str, population: Population) -> None:
        super().__init__(message, population.history(population.best_index))
        self.population = population


def train_population(
    model: Model,
    X: Any,
    y: Array | None = None,
    *,
    n_models: int,
    seeds: Sequence[int] | None = None,
    starts: Array | None = None,
    learning_rates: float | Sequence[float] | None = None,
    momenta: float | Sequence[float] | None = None,
    weight_decays: float | Sequence[float] | None = None,
    loss: str | Loss | None = None,
    optimizer: str | Optimizer = "adam",
    n_epochs: int = 10,
    batch_size: int | None = 64,
    validation_data: tuple[Array, Array] | None = None,
    schedule: str | Schedule | None = None,
    shuffle: bool | Literal["each"] = True,
    seed: int = 0,
    memory_limit: int | str | None = None,
    engine: PopulationEngine | None = None,
    keep_paths: bool = False,
    progress: bool | None = None,
) -> Population:
    """Train many models of one shape at once, each as :func:`gpuml.train` would train it alone.

    Model i is that of ``train(MLP(sizes, seed=seeds[i]), X, y, …)`` with its own rates, up to
    rounding. A model whose loss or weights stop being finite keeps the weights of its last good
    epoch and is left behind; the others go on.

    Of several processes that ``mpiexec`` started, each trains all of the models by itself.

    Parameters
    ----------
    model : Model
        A template, which stays as it is: the shape, the type and the device of all models.
    X, y
        As for :func:`gpuml.train`.
    n_models : int
        How many models to train.
    seeds : sequence of int, optional
        Start weights of model i are those of ``MLP(sizes, seed=seeds[i])``; 0, 1, 2, … unless
        given.
    starts : array of shape (n_models, n_parameters), optional
        Start weights instead, as in ``model.parameters.flat``: for :class:`gpuml.Linear`, which
        else starts at zero, or a class of one's own.
    learning_rates, momenta, weight_decays : float or sequence of n_models floats, optional
        One number for all or one for each; the optimizer's unless given. Momenta are for
        :class:`gpuml.GradientDescent`.
    loss, n_epochs, batch_size, validation_data, schedule
        As for :func:`gpuml.train`. A loss of one's own must keep leading axes: predictions of
        shape (n_models, batch, outputs) give values of shape (n_models,).
    optimizer : str or Optimizer
        Its kind, and the rates that are not given.
    shuffle : bool or "each"
        Whether an epoch has its own order of the samples: one for all models, or with
        ``"each"`` for model i the one that ``train(…, seed=seeds[i])`` draws: on the host, which
        takes about 30 µs for each model, epoch and 1,500 samples.
    seed : int
        For the common order.
    memory_limit : int or str, optional
        Memory of the device, half of it for data and half for the models that are trained at
        the same time. Unless given, data take at most half of a GPU's free memory, and models
        0.8 of the rest, or half of the host's. A larger population is trained in parts, one
        after the other, and says so.
    engine : {"batched", "graph", "fused"}, optional
        ``"batched"``: each operation is done for all models at once. ``"graph"``: so, and the
        step is captured as a CUDA graph. ``"fused"``: MLPs with one hidden layer, some epochs
        in one launch of a kernel that keeps their weights on the chip. The best unless given,
        which the population names.
    keep_paths : bool
        Whether to keep the parameters before the first and after each epoch, for pictures of
        few models with few parameters; with ``batch_size=None`` an epoch is a step.
    progress : bool, optional
        As for :func:`gpuml.train`.

    Returns
    -------
    Population

    Raises
    ------
    TypeError
        If `X` lives on a GPU and the model elsewhere.
    ValueError
        If lengths differ from `n_models`, a number is out of range, or data do not fit.
    DeviceMemoryError
        If not even one model fits.
    PopulationDivergedError
        If no model is left.
    PopulationInterrupted
        If Ctrl-C comes; its `population` holds the finished epochs.

    Examples
    --------
    >>> import numpy as np
    >>> from gpuml.models import MLP
    >>> X = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    >>> population = train_population(MLP([1, 8, 1], device="cpu"), X, X**2, n_models=3)
    >>> len(population), population.best
    (3, MLP 1-8-1 (25 parameters, float32))
    """
    plan = Plan(
        model,
        X,
        y,
        loss=loss,
        optimizer=optimizer,
        n_epochs=n_epochs,
        batch_size=batch_size,
        validation_data=validation_data,
        schedule=schedule,
        shuffle=shuffle,
        seed=seed,
        memory_limit=memory_limit,
        engine=engine,
    )
    plan.set_models(
        positive_integer("n_models", n_models),
        seeds=seeds,
        starts=starts,
        learning_rates=learning_rates,
        momenta=momenta,
        weight_decays=weight_decays,
    )
    with plan.training() as (task, results):
        if keep_paths:
            plan.keep_paths()
        train_in_parts(task, results, plan.begin, progress)
    return plan.finished()


class Population:
    """Models of one shape that were trained at once; made by :func:`train_population`.

    ``population[i]`` is an ordinary model with a copy of the weights: it predicts, is saved, and
    is trained on. Iteration goes through all of them.

    Attributes
    ----------
    parameters : Parameters
        Arrays of shape (n_models, …) on the device.
    settings : dict of str to numpy.ndarray of shape (n_models,)
        ``seed``, ``learning_rate``, and where there is one ``momentum`` and ``weight_decay``.
    columns : dict of str to numpy.ndarray of shape (n_epochs, n_models)
        ``loss``, ``validation_loss`` and ``validation_accuracy`` or ``validation_r2``, as in
        :class:`gpuml.History`; NaN where a model was not trained any more.
    epochs : numpy.ndarray of int, shape (n_models,)
        How many epochs of each model ended well.
    diverged : numpy.ndarray of bool, shape (n_models,)
        Whether the loss or the weights stopped being finite.
    paths : numpy.ndarray of shape (n_epochs + 1, n_models, n_parameters) or None
        The parameters before the first and after each epoch, if they were kept.
    engine, device : str
        How and on what it was trained. A note says why not by a faster engine.
    seconds : float
        Of training, validation included.
    n_samples, batch_size : int
        Samples in each epoch, and in each full batch.
    loss : callable
        What was minimised.
    notes : list of str
        What did not go as planned, a sentence each.
    """

    def __init__(
        self,
        model: Model,
        results: Results,
        settings: Mapping[str, Any],
        *,
        loss: Loss,
        n_samples: int,
        batch_size: int,
    ) -> None:
        self._model = copy.copy(model)  # the template
        self._results = results
        self.parameters = Parameters(results.flat, model.parameters.shapes)
        self.settings = dict(settings)
        self.columns, self.paths = results.columns, results.paths
        self.epochs, self.diverged = results.epochs, results.diverged
        self.engine, self.device = results.engine, str(model.device)
        self.seconds = time.perf_counter() - results.begin
        self.n_samples, self.batch_size, self.loss = n_samples, batch_size, loss
        self.notes = list(results.notes)

    def __len__(self) -> int:
        """Return the number of models, those that diverged included."""
        return len(self.epochs)

    def __getitem__(self, i: int) -> Model:
        """Return model i, with a copy of its weights."""
        index = operator.index(i)
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} models, counted from 0; there is no {i}")
        model = copy.copy(self._model)
        flat = self.parameters.flat[index].copy()
        model.parameters = Parameters(flat, self.parameters.shapes)
        return model

    def __iter__(self) -> Iterator[Model]:
        return (self[i] for i in range(len(self)))

    def final(self, column: str) -> np.ndarray[Any, Any]:
        """Return a column's number in the last epoch of each model; NaN where it diverged.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        if column not in self.columns:
            raise KeyError(unknown_name("column", column, self.columns))
        table = self.columns[column]
        if not len(table):
            return np.full(len(self), np.nan)
        last = table[np.maximum(self.epochs - 1, 0), np.arange(len(self))]
        return np.where(self.diverged | (self.epochs == 0), np.nan, last)

    def order(self, by: str | None = None) -> np.ndarray[Any, Any]:
        """Return the indices of the models, the best first.

        Parameters
        ----------
        by : str, optional
            A column: of accuracy and R² more is better, of other columns less. The validation
            loss unless given, or without validation data the loss. Models that were trained for
            more epochs come before those that a search dropped, and those that diverged last.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        column = by or ("validation_loss" if "validation_loss" in self.columns else "loss")
        sign = -1 if column.removeprefix("validation_") in SCORES else 1
        numbers = sign * self.final(column)
        return np.lexsort((numbers, -self.epochs, self.diverged))  # NaN is the largest

    @property
    def best_index(self) -> int:
        """The index of the best model: by validation loss, or without validation data by loss."""
        return int(self.order()[0])

    @property
    def best(self) -> Model:
        """The best model: by validation loss, or without validation data by loss."""
        return self[self.best_index]

    def ranking(self, by: str | None = None) -> Ranking:
        """Return a table of all models, the best first: settings and last numbers.

        Parameters
        ----------
        by : str, optional
            A column, as for :meth:`order`.
        """
        order = self.order(by)
        columns = {"model": np.arange(len(self)), **self.settings, "epochs": self.epochs}
        columns |= {name: self.final(name) for name in self.columns}
        rows = {name: values[order].tolist() for name, values in columns.items()}
        place = f"{len(self)} models, {self.engine}, {self.device}"
        return Ranking(rows, [place, *(f"Note: {note}" for note in self.notes)])

    def history(self, i: int) -> History:
        """Return what training did to model i, epoch by epoch.

        Its seconds are those since the training of the population began.
        """
        history = History(
            device=self.device,
            engine=self.engine,
            n_samples=self.n_samples,
            batch_size=self.batch_size,
        )
        for epoch in range(int(self.epochs[i])):
            row = {name: float(table[epoch, i]) for name, table in self.columns.items()}
            factor = float(self._results.factors[epoch])
            if not math.isnan(factor) and "learning_rate" in self.settings:
                row["learning_rate"] = float(self.settings["learning_rate"][i]) * factor
            row["seconds"] = float(self._results.seconds[epoch, i])
            history.append({"epoch": epoch + 1} | row)
        if self.diverged[i]:
            history.notes.append(f"diverged in epoch {self.epochs[i] + 1}")
        return history

    def predict(self, X: Array) -> Array:
        """Return the outputs of all models, in chunks of rows that bound the memory needed.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            On any device.

        Returns
        -------
        array of shape (n_models, n_samples, n_outputs)
            Where `X` lives.
        """
        home = device_of(X)
        outputs = [home.asarray(z) for z in self._outputs(X, self.parameters)]
        return home.xp.concatenate(outputs, axis=1)

    def _outputs(self, X: Array, parameters: Parameters) -> Iterator[Array]:
        """Yield outputs of shape (n_models, rows, n_outputs) on the device, chunk by chunk."""
        check_numbers("X", X)
        if X.ndim != 2 or 0 in X.shape:
            raise ValueError(f"X has shape {X.shape}, expected (n_samples, n_features), not empty")
        model = stack(self._model, parameters.flat)
        rows = evaluated_rows(len(parameters.flat))
        with model.device.use(), blas_threads(largest_product(model, rows)):
            for first in range(0, len(X), rows):
                yield model(model.device.asarray(X[first : first + rows], model.dtype))

    def ensemble(self, k: int | None = None, *, by: str | None = None) -> Ensemble:
        """Return the k best models as one, which averages what they say.

        Parameters
        ----------
        k : int, optional
            All that did not diverge unless given.
        by : str, optional
            A column, as for :meth:`order`.

        Raises
        ------
        ValueError
            If there are not so many models that did not diverge.
        """
        good = [i for i in self.order(by) if not self.diverged[i] and self.epochs[i]]
        n = len(good) if k is None else positive_integer("k", k)
        if not 1 <= n <= len(good):
            raise ValueError(f"{n} models are wanted, and {len(good)} did not diverge")
        return Ensemble(self, good[:n])

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write settings and last numbers as comma-separated values, one row a model."""
        self.ranking().to_csv(path)

    def to_json(self) -> dict[str, Any]:
        """Return all but the parameters as what JSON can hold; NaN, which it lacks, as None."""
        return {
            "settings": {name: values.tolist() for name, values in self.settings.items()},
            "columns": {
                name: [[v if math.isfinite(v) else None for v in row] for row in table.tolist()]
                for name, table in self.columns.items()
            },
            "epochs": self.epochs.tolist(),
            "diverged": self.diverged.tolist(),
            "engine": self.engine,
            "device": self.device,
            "seconds": self.seconds,
            "n_samples": self.n_samples,
            "batch_size": self.batch_size,
            "notes": list(self.notes),
        }

    def plot_losses(self, column: str | None = None, axis: Any = None) -> Any:
        """Draw how the last losses are distributed; see :func:`gpuml.plots.distribution`."""
        from gpuml import plots

        name = column or ("validation_loss" if "validation_loss" in self.columns else "loss")
        return plots.distribution(self.final(name), name, self._title(), axis)

    def plot_learning_rates(self, column: str | None = None, axis: Any = None) -> Any:
        """Draw losses against rates; see :func:`gpuml.plots.loss_by_learning_rate`."""
        from gpuml import plots

        name = column or ("validation_loss" if "validation_loss" in self.columns else "loss")
        rates = self.settings["learning_rate"]
        return plots.loss_by_learning_rate(rates, self.final(name), name, self._title(), axis)

    def plot_paths(
        self, X: Array, y: Array, *, models: Sequence[int] = (), axis: Any = None
    ) -> Any:
        """Draw the paths of models with two parameters on the surface of their loss.

        Parameters
        ----------
        X, y : array
            What the loss is measured on.
        models : sequence of int
            Whose paths to draw; all unless given.
        axis : matplotlib.axes.Axes, optional
            Where to draw; a new figure unless given.

        Raises
        ------
        ValueError
            If paths were not kept, or the models have another number of parameters.
        """
        from gpuml import plots

        if self.paths is None:
            raise ValueError("no paths were kept: train_population(…, keep_paths=True)")
        if self.paths.shape[-1] != 2:
            raise ValueError(
                f"the models have {self.paths.shape[-1]} parameters: a surface is drawn over two"
            )
        paths = self.paths[:, list(models)] if len(models) else self.paths
        first, second, losses = _surface(self._model, X, y, self.loss, paths)
        names = list(self.parameters) if len(self.parameters) == 2 else ["first", "second"]
        return plots.loss_surface(first, second, losses, paths, names, self._title(), axis)

    def _title(self) -> str:
        return f"{len(self)} models, {self.device}"

    def __str__(self) -> str:
        return str(self.ranking())

    def _repr_html_(self) -> str:
        return self.ranking()._repr_html_()

    def __repr__(self) -> str:
        return f"Population({len(self)} × {self._model!r}, {self.engine}, {self.device})"


class Ranking:
    """A table of models, the best first; it prints and exports itself.

    Attributes
    ----------
    columns : dict of str to list
        ``model`` (the index in the population), its settings, and its last numbers.
    """

    def __init__(self, columns: Mapping[str, list[Any]], below: Iterable[str]) -> None:
        self.columns = dict(columns)
        self._below = list(below)

    def __len__(self) -> int:
        """Return the number of models."""
        return len(self.columns["model"])

    def __getitem__(self, column: str) -> list[Any]:
        """Return one column, such as ``ranking["model"]``."""
        if column not in self.columns:
            raise KeyError(unknown_name("column", column, self.columns))
        return self.columns[column]

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table as comma-separated values, one row a model."""
        import csv

        with (
            replacing(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(zip(*self.columns.values(), strict=True))

    def _cells(self) -> list[list[str]]:
        """Return header and rows as text; of many rows the first and the last."""
        rows = [list(map(number_text, row)) for row in zip(*self.columns.values(), strict=True)]
        if len(rows) > SHOWN_ROWS:
            gap = ["⋮"] * len(self.columns)
            rows = [*rows[: SHOWN_ROWS - 3], gap, *rows[-2:]]
        return [list(self.columns), *rows]

    def __str__(self) -> str:
        return "\n".join([aligned(self._cells()), *self._below])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._cells(), self._below)


class Ensemble:
    """Several models of a population as one; made by :meth:`Population.ensemble`.

    Attributes
    ----------
    models : list of int
        Their indices in the population, the best first.
    preprocessing : Preprocessing or None
        That of the models.
    """

    def __init__(self, population: Population, models: Sequence[int]) -> None:
        self.models = [int(i) for i in models]
        self._population = population
        flat = population.parameters.flat
        self._parameters = Parameters(flat[self.models], population.parameters.shapes)
        self._classes = population.loss is softmax_cross_entropy
        self.preprocessing = population._model.preprocessing

    def __len__(self) -> int:
        """Return the number of models."""
        return len(self.models)

    def predict_probabilities(self, X: Array) -> Array:
        """Return the mean over the models of their probabilities, softmax(logits).

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            On any device.

        Returns
        -------
        array of shape (n_samples, n_classes)
            Where `X` lives.

        Raises
        ------
        ValueError
            If the models predict numbers.
        """
        if not self._classes:
            raise ValueError("these models predict numbers, not classes: use predict(X)")
        return self._mean(X, _softmax)

    def predict(self, X: Array) -> Array:
        """Return the most probable class of each row, or the mean of the models' outputs.

        Returns
        -------
        array of int, shape (n_samples,), or of shape (n_samples, n_outputs)
            Where `X` lives.
        """
        if self._classes:
            return self.predict_probabilities(X).argmax(axis=-1)
        return self._mean(X, lambda outputs: outputs)

    def _mean(self, X: Array, of: Callable[[Array], Array]) -> Array:
        home = device_of(X)
        outputs = self._population._outputs(X, self._parameters)
        return home.xp.concatenate([home.asarray(of(z).mean(axis=0)) for z in outputs])

    def __repr__(self) -> str:
        return f"Ensemble({len(self)} × {self._population._model!r})"


def _softmax(logits: Array) -> Array:
    exponentials = array_module(logits).exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


class Plan:
    """What :func:`train_population` or a search was asked for, checked; and what comes of it.

    The parameters are those of :func:`train_population`; what differs from model to model is set
    by :meth:`set_models`.
    """

    def __init__(
        self,
        model: Model,
        X: Any,
        y: Any,
        *,
        loss: str | Loss | None,
        optimizer: str | Optimizer,
        n_epochs: int,
        batch_size: int | None,
        validation_data: Any,
        schedule: str | Schedule | None,
        shuffle: bool | Literal["each"],
        seed: int,
        memory_limit: int | str | None,
        engine: str | None,
    ) -> None:
        check_model(model)
        self.n_epochs = positive_integer("n_epochs", n_epochs)
        if batch_size is not None:
            batch_size = positive_integer("batch_size", batch_size)
        if validation_data is not None and not is_pair(validation_data):
            raise ValueError("validation_data must be a pair: (X, y)")
        if not (shuffle in (True, False) or shuffle == "each"):
            raise ValueError(f"shuffle must be True, False or 'each', got {shuffle!r}")
        self.model, self.optimizer = model, get_optimizer(optimizer)
        self.named = {"X": X, "y": y}
        if validation_data is not None:
            self.named |= {"X of the validation data": validation_data[0]}
            self.named |= {"y of the validation data": validation_data[1]}
        for_data: int | None = None
        self._for_models: int | None = None
        if memory_limit is not None:
            self._for_models = for_data = max(1, parse_size(memory_limit) // 2)
            if validation_data is not None:
                for_data = max(1, for_data // 2)
        self._batch_size, self._for_data = batch_size, for_data
        self._validation_data, self._engine = validation_data, engine
        self._shuffle, self._seed = shuffle, seed
        self._schedule = None if schedule is None else get_schedule(schedule)
        self.loss = get_loss(loss or usual_loss(X, y))
        self.n_models = 0
        self.settings: dict[str, np.ndarray[Any, Any]] = {}
        self.starts: Array | None = None
        self._begun = np.zeros(0, bool)

    def set_models(
        self,
        n_models: int,
        *,
        seeds: Any = None,
        starts: Array | None = None,
        learning_rates: Any = None,
        momenta: Any = None,
        weight_decays: Any = None,
    ) -> None:
        """Set what differs from model to model."""
        self.n_models, self._begun = n_models, np.zeros(n_models, bool)
        self.settings["seed"] = _seeds(seeds, n_models)
        for name, plural, values, good, expected in (
            ("learning_rate", "learning_rates", learning_rates, _positive, "positive"),
            ("momentum", "momenta", momenta, _below_one, "from 0 to less than 1"),
            ("weight_decay", "weight_decays", weight_decays, _not_negative, "zero or positive"),
        ):
            own = getattr(self.optimizer, name, None)
            if own is None and values is not None:
                raise ValueError(
                    f"{type(self.optimizer).__name__} has no {name}: leave {plural} away"
                )
            if own is not None:
                numbers = _for_each(plural, own if values is None else values, n_models)
                bad = np.flatnonzero(~(good(numbers) & np.isfinite(numbers)))
                if len(bad):
                    i = bad[0]
                    raise ValueError(
                        f"{plural} must be {expected}, got {numbers[i]:g} for model {i}"
                    )
                self.settings[name] = numbers
        if starts is not None:
            starts = self._checked_starts(starts)
        elif type(self.model) not in (MLP, Linear):
            raise ValueError(
                f"start weights by seed are for MLP and Linear: give {type(self.model).__name__}s "
                f"as starts, an array of shape ({n_models}, {self.model.n_parameters})"
            )
        self.starts = starts

    def _checked_starts(self, starts: Any) -> Array:
        device_of(starts)  # refuses what is no array
        expected = self.n_models, self.model.n_parameters
        if starts.shape != expected or starts.dtype.kind != "f":
            raise ValueError(
                f"starts must be numbers of shape {expected}, (n_models, n_parameters), got "
                f"{starts.dtype} of shape {starts.shape}"
            )
        return starts

    @contextmanager
    def training(self) -> Iterator[tuple[Task, Results]]:
        """Bring data and results to the device; turn Ctrl-C into an error that has the results."""
        model = self.model
        with model.device.use(), np.errstate(all="ignore"), noting_memory_errors():
            self._task = self._make_task()
            self._results = self._make_results()
            try:
                yield self._task, self._results
            except KeyboardInterrupt:
                raise PopulationInterrupted(self.finished(whole=False)) from None

    def _make_task(self) -> Task:
        model, loss, limit = self.model, self.loss, self._for_data
        X, y = self.named["X"], self.named["y"]
        data = source_of(model, X, y, loss, self._batch_size, limit)
        held_out = None
        if self._validation_data is not None:
            rows = evaluated_rows(self.n_models)
            x, t = self._validation_data
            held_out = source_of(model, x, t, loss, rows, limit, smaller=True)
        if self._shuffle == "each" and not isinstance(data, ArrayBatches):
            raise ValueError(
                "shuffle='each' needs X and y as arrays that the device holds as a whole; "
                "shuffle=True gives all models the same batches"
            )
        # What the optimizer keeps depends on whether there is momentum, and weight decay, at all.
        optimizer = copy.copy(self.optimizer)
        for name in ("momentum", "weight_decay"):
            if name in self.settings:
                setattr(optimizer, name, float(self.settings[name].max()))
        own_order = self._shuffle == "each" and data.batch_size < data.n_samples
        engine, plan, self._reason = choose_engine(
            self._engine,
            model,
            loss,
            optimizer,
            data,
            n_models=self.n_models,
            n_epochs=self.n_epochs,
            own_order=own_order,
        )
        return Task(
            model=model,
            loss=loss,
            optimizer=optimizer,
            data=data,
            held_out=held_out,
            schedule=self._schedule,
            n_epochs=self.n_epochs,
            shuffle=self._shuffle,
            seed=self._seed,
            engine=engine,
            plan=plan,
            limit=self._for_models,
        )

    def _make_results(self) -> Results:
        model, shape = self.model, (self.n_models, self.model.n_parameters)
        try:
            flat = model.device.xp.zeros(shape, model.dtype)
        except MemoryError:
            taken = size_text(math.prod(shape) * model.dtype.itemsize)
            raise DeviceMemoryError(
                f"the parameters of {self.n_models} models take {taken}, more than is free on "
                f"{model.device}: lower n_models"
            ) from None
        results = Results(flat, self.n_epochs, engine=self._task.engine)
        if self._reason:
            results.note(f"engine {self._task.engine}: {self._reason}")
        return results

    def begin(self, members: Any) -> Crew:
        """Return some models at the start, by their columns in the results."""
        device, dtype = self.model.device, self.model.dtype
        flat = device.asarray(self._start(members), dtype)
        self._results.flat[members], self._begun[members] = flat, True
        if self._results.paths is not None:
            self._results.paths[0, members] = to_host(flat)
        state = {
            name: device.asarray(values[members][:, None], dtype)
            for name, values in self.settings.items()
            if name != "seed"
        }
        generators = []
        if self._task.own_orders:
            generators = [np.random.default_rng(int(s)) for s in self.settings["seed"][members]]
        return Crew(members, flat.copy(), state, None, generators)

    def _start(self, members: Any) -> Array:
        """Return start weights of shape (n_models, n_parameters)."""
        if self.starts is not None:
            return self.starts[members]
        model = self.model
        if type(model) is Linear:
            return np.zeros((len(members), model.n_parameters), model.dtype)
        seeds = self.settings["seed"][members].tolist()
        made = (MLP(model.sizes, seed=s, dtype=model.dtype, device=CPU) for s in seeds)
        return np.stack([one.parameters.flat for one in made])

    def keep_paths(self) -> None:
        """Make room for the parameters before the first and after each epoch."""
        shape = self.n_epochs + 1, self.n_models, self.model.n_parameters
        needed = math.prod(shape) * self.model.dtype.itemsize
        if needed > MOST_PATH_BYTES:
            raise ValueError(
                f"paths of {self.n_models} models with {self.model.n_parameters:,} parameters "
                f"over {self.n_epochs} epochs take {size_text(needed)}: they are for pictures of "
                f"few models with few parameters, up to {size_text(MOST_PATH_BYTES)}"
            )
        self._results.paths = np.full(shape, np.nan, self.model.dtype)

    def population(self) -> Population:
        """Return the models as they stand."""
        task = self._task
        return Population(
            self.model,
            self._results,
            self._shown_settings(),
            loss=self.loss,
            n_samples=task.data.n_samples,
            batch_size=task.data.batch_size,
        )

    def finished(self, *, whole: bool = True) -> Population:
        """Return the population; after a whole training, raise an error if no model is left."""
        results, waiting = self._results, np.flatnonzero(~self._begun)
        if len(waiting):
            self.begin(waiting)  # so that they hold their start weights
        lost = np.flatnonzero(results.diverged).tolist()
        if lost:
            named = ", ".join(map(str, lost[:8])) + ", …" * (len(lost) > 8)
            results.note(f"{len(lost)} of {len(results.flat)} models diverged: {named}")
        population = self.population()
        if whole and not (~results.diverged & (results.epochs > 0)).any():
            self._say_why(population)
        return population

    def _shown_settings(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the settings without those that are 0 for all."""
        return {
            name: values
            for name, values in self.settings.items()
            if name in ("seed", "learning_rate") or values.any()
        }

    def _say_why(self, population: Population) -> None:
        """Raise an error that says why no model is left."""
        cause = cause_in_data(self.named, self.model.dtype)
        if cause:
            cause = f", since {cause}"
        else:
            rates = self.settings.get("learning_rate", np.ones(1))
            cause = (
                f". The steps may be too large: try learning_rates below {rates.min():g}, or "
                "standardise the features"
            )
        message = f"all {len(population)} models diverged{cause}\n{population.ranking()}"
        raise PopulationDivergedError(message, population)


def _positive(numbers: Any) -> Any:
    return numbers > 0


def _below_one(numbers: Any) -> Any:
    return (numbers >= 0) & (numbers < 1)


def _not_negative(numbers: Any) -> Any:
    return numbers >= 0


def _for_each(name: str, values: Any, n_models: int) -> np.ndarray[Any, Any]:
    """Return one number for each model.

    Raises
    ------
    ValueError
        If there is neither one number nor one for each.
    """
    try:
        numbers = np.array(to_host(values), float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {values!r}") from None
    if numbers.ndim == 0:
        return np.full(n_models, float(numbers))
    if numbers.shape != (n_models,):
        raise ValueError(
            f"{name} has shape {numbers.shape} and n_models is {n_models}: give one number for "
            "all models, or one for each"
        )
    return numbers


def _seeds(seeds: Any, n_models: int) -> np.ndarray[Any, Any]:
    """Return a seed for each model."""
    if seeds is None:
        return np.arange(n_models)
    found = np.asarray(seeds)
    if found.shape != (n_models,):
        raise ValueError(
            f"seeds has shape {found.shape} and n_models is {n_models}: give one for each model"
        )
    if found.dtype.kind not in "iu" or found.min() < 0:
        raise ValueError(f"seeds must be integers from 0 up, got {seeds!r}")
    return found.astype(np.int64)


def _surface(
    model: Model, X: Array, y: Array, loss: Loss, paths: np.ndarray[Any, Any]
) -> tuple[Any, Any, Any]:
    """Return two axes around some paths, and the loss at each of their points: row by row."""
    low, high = np.nanmin(paths, axis=(0, 1)), np.nanmax(paths, axis=(0, 1))
    margin = 0.15 * np.maximum(high - low, 1e-3)
    first, second = np.linspace(low - margin, high + margin, SURFACE_POINTS).T
    grid = np.stack(np.meshgrid(first, second), axis=-1).reshape(-1, 2)
    flat = model.device.asarray(grid, model.dtype)
    with model.device.use(), np.errstate(all="ignore"):
        data = source_of(model, X, y, loss, evaluated_rows(len(grid)), None, smaller=True)
        losses = measured_on(stack(model, flat), data, loss)["loss"]
    return first, second, losses.reshape(len(second), len(first))
