"""How the models of a population are trained: in parts that fit, in groups, epoch by epoch.

A part holds the models that are trained at the same time. On the CPU it is split into groups,
small enough for the processor's cache, which threads train side by side: NumPy lets go of the
interpreter in what takes long. On a GPU a part is one group.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from gpuml import gpu_layers
from gpuml.batches import GATHERED_BYTES, ArrayBatches, Batch, Batches
from gpuml.blocking import size_text
from gpuml.devices import Array, blas_threads, cpu_count, device_of, to_host
from gpuml.errors import DeviceMemoryError, unknown_name
from gpuml.fused_populations import FusedPopulation, PopulationPlan, population_plan
from gpuml.losses import Loss
from gpuml.models import Model, Parameters
from gpuml.optimizers import Optimizer, State
from gpuml.schedules import Schedule, factor_of
from gpuml.steps import EagerStep, GraphStep, graph_limit, set_learning_rate
from gpuml.training import EVALUATED_ROWS, ProgressBar, largest_product, measured_on

PopulationEngine: TypeAlias = Literal["batched", "graph", "fused"]
POPULATION_ENGINES = ("batched", "graph", "fused")

# From so many steps on it pays to compile a kernel for the sizes of the models, or to capture a
# step: one of batched operations takes a millisecond for up to a thousand small models.
PAYS = {"fused": 400, "graph": 1000}

# Outputs of the widest layer, over a batch and the models of a group: with fewer a second thread
# costs more than it brings, with more the arrays leave the processor's cache (measured by
# tests/benchmarks/populations.py).
LEAST_NUMBERS, MOST_NUMBERS = 2**15, 2**16

# Rows in one forward pass of many models where no gradient is needed, at least.
LEAST_ROWS = 256

# A launch of several epochs keeps the weights after each: so many bytes, and this share of the
# memory that is free. It takes about so many seconds, since Ctrl-C waits for its end.
KEPT_BYTES, KEPT_SHARE = 2**30, 1 / 8
LONG = 0.1

# The share of the free memory that models may take unless there is a limit.
MODEL_SHARE = {"gpu": 0.8, "cpu": 0.5}


@dataclass(frozen=True)
class Task:
    """What all models of a population have in common.

    Attributes
    ----------
    model : Model
        The template.
    loss : callable
    optimizer : Optimizer
        Its state has the rates that vary.
    data, held_out : Batches
    schedule : callable or None
    n_epochs : int
        Which the schedule is told.
    shuffle : bool or "each"
    seed : int
    engine : {"batched", "graph", "fused"}
    plan : PopulationPlan or None
        Of the fused kernel.
    limit : int or None
        Bytes that models may take; those that are free unless given.
    """

    model: Model
    loss: Loss
    optimizer: Optimizer
    data: Batches
    held_out: Batches | None
    schedule: Schedule | None
    n_epochs: int
    shuffle: bool | Literal["each"]
    seed: int
    engine: str
    plan: PopulationPlan | None = None
    limit: int | None = None

    @property
    def own_orders(self) -> bool:
        """Whether each model has an order of the samples of its own."""
        return self.shuffle == "each" and self.data.batch_size < self.data.n_samples

    @property
    def numbers(self) -> int:
        """Outputs of the widest layer over a batch."""
        model = self.model
        widest = max(model.sizes[1:]) if model.layers else model.n_parameters
        return self.data.batch_size * widest


@dataclass
class Results:
    """What training writes: one column a model."""

    flat: Array  # (n_models, n_parameters), on the device
    n_epochs: int
    columns: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    paths: np.ndarray[Any, Any] | None = None
    engine: str = ""

    def __post_init__(self) -> None:
        self.columns["loss"] = np.full((self.n_epochs, len(self.flat)), np.nan)
        self.seconds = np.full_like(
            self.columns["loss"], np.nan
        )  # from the start to each epoch's end
        self.factors = np.full(self.n_epochs, np.nan)  # of the learning rates, by a schedule
        self.begin = time.perf_counter()
        self._told = 0.0  # seconds, at the end of the last epoch
        self.epochs = np.zeros(len(self.flat), int)
        self.diverged = np.zeros(len(self.flat), bool)

    def write(
        self, first: int, members: Any, ended: Any, rows: dict[str, np.ndarray[Any, Any]]
    ) -> None:
        """Write the numbers of some models for some epochs.

        Parameters
        ----------
        first : int
            The first of the epochs, counted from 0.
        members : numpy.ndarray of int
        ended : numpy.ndarray of bool, shape (n_epochs, n_models)
            Which of the epochs ended well; of others nothing is written.
        rows : dict of str to numpy.ndarray of shape (n_epochs, n_models)
        """
        epochs = np.arange(first, first + len(ended))
        now = time.perf_counter() - self.begin
        seconds = np.linspace(self._told, now, len(ended) + 1)[1:, None]
        self._told = now
        for name, values in rows.items():
            table = self.columns.setdefault(name, np.full_like(self.columns["loss"], np.nan))
            table[epochs[:, None], members] = np.where(ended, values, np.nan)
        self.seconds[epochs[:, None], members] = np.where(ended, seconds, np.nan)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def forget(self, members: Any) -> None:
        """Take back all that was written for some models."""
        for table in self.columns.values():
            table[:, members] = np.nan
        self.epochs[members], self.diverged[members] = 0, False


def choose_engine(
    engine: str | None,
    model: Model,
    loss: Loss,
    optimizer: Optimizer,
    data: Batches,
    *,
    n_models: int,
    n_epochs: int,
    own_order: bool,
) -> tuple[str, PopulationPlan | None, str]:
    """Return the engine that is asked for, or the best; its plan; and why not a better one.

    Raises
    ------
    ValueError
        If it is unknown, or cannot train this.
    """
    if engine is not None and engine not in POPULATION_ENGINES:
        raise ValueError(unknown_name("engine", str(engine), POPULATION_ENGINES))
    reasons: list[str] = []
    n_steps = data.n_steps * n_epochs
    for name in [engine] if engine else ["fused", "graph", "batched"]:
        plan: PopulationPlan | str | None = None
        if name == "fused":
            plan = population_plan(model, loss, optimizer, data, n_models, own_order)
        reason = plan if isinstance(plan, str) else None
        if name == "graph":
            reason = graph_limit(model, data)
        few = engine is None and n_steps < PAYS.get(name, 0)
        if reason is None and not few:
            return name, plan, "; ".join(reasons)  # type: ignore[return-value]
        if engine:
            raise ValueError(f"engine='{engine}' cannot train this population: {reason}")
        if reason and not few and model.device.kind == "gpu":
            reasons.append(f"not {name}, since {reason}")
    raise AssertionError("batched operations train everything")


def stack(model: Model, flat: Array) -> Model:
    """Return a model like the template with parameters of shape (n_models, …)."""
    many = copy.copy(model)
    many.parameters = Parameters(flat, model.parameters.shapes)
    return many


def evaluated_rows(n_models: int) -> int:
    """Return how many rows to pass forward at once, so that memory is bounded."""
    return max(LEAST_ROWS, EVALUATED_ROWS // n_models)


@dataclass
class Crew:
    """Models that are under way, with all they need to go on.

    Attributes
    ----------
    members : numpy.ndarray of int
        Their columns in the results.
    flat : array of shape (n_models, n_parameters)
    state : dict of str to array of shape (n_models, …)
        The optimizer's, as far as it differs from model to model.
    rates : array of shape (n_models, 1) or None
        Learning rates before the schedule.
    generators : list of numpy.random.Generator
        For the orders of samples, if each model has its own.
    """

    members: Any
    flat: Array
    state: State
    rates: Array | None
    generators: list[np.random.Generator]

    def take(self, rows: Any) -> Crew:
        """Return some of the models: an index array, or a slice for views."""
        places = np.arange(len(self.members))[rows]
        return Crew(
            self.members[rows],
            self.flat[rows],
            {name: array[rows] for name, array in self.state.items()},
            None if self.rates is None else self.rates[rows],
            [self.generators[i] for i in places] if self.generators else [],
        )

    @staticmethod
    def joined(crews: Sequence[Crew], xp: Any) -> Crew:
        """Return several crews as one, with copies of their arrays."""
        rates = [crew.rates for crew in crews]
        return Crew(
            np.concatenate([crew.members for crew in crews]),
            xp.concatenate([crew.flat for crew in crews]),
            {name: xp.concatenate([crew.state[name] for crew in crews]) for name in crews[0].state},
            None if rates[0] is None else xp.concatenate(rates),
            [generator for crew in crews for generator in crew.generators],
        )


class Group:
    """Models whose steps are taken together, by one thread.

    Parameters
    ----------
    task : Task
    crew : Crew
        Its parameters are trained in place; an empty state is begun.
    """

    def __init__(self, task: Task, crew: Crew) -> None:
        self._task, self.crew = task, crew
        self.model = stack(task.model, crew.flat)
        kind = GraphStep if task.engine == "graph" else EagerStep
        self.step = kind(self.model, task.loss, task.optimizer)
        n_models = len(crew.flat)
        for name, values in crew.state.items():
            if name in self.step.state:
                self.step.state[name][...] = values
        crew.state = {
            name: array
            for name, array in self.step.state.items()
            if array.ndim > 1 and len(array) == n_models
        }
        if crew.rates is None and "learning_rate" in self.step.state:
            crew.rates = self.step.state["learning_rate"].copy()
        self.losses = task.model.device.xp.zeros((task.data.n_steps, n_models), task.model.dtype)

    @property
    def engine(self) -> str:
        """How the steps are taken."""
        return "batched" if self.step.engine == "eager" else self.step.engine

    def set_factor(self, factor: float) -> None:
        """Multiply the learning rates by a schedule's factor."""
        if self.crew.rates is not None:
            set_learning_rate(self.step, self.crew.rates, factor)

    def train(self, batches: Sequence[Batch], first: int, stopped: Callable[[], bool]) -> None:
        """Take a step on each of some batches, the first of which is number `first`."""
        with np.errstate(all="ignore"):  # a thread has its own
            for i, (x, y) in enumerate(batches, first):
                if stopped():
                    return
                self.losses[i] = self._checked(self.step(x, y))

    def train_own(self, stopped: Callable[[], bool]) -> None:
        """Take the steps of an epoch, each model in its own order of the samples."""
        data = self._task.data
        assert isinstance(data, ArrayBatches)
        X, y = data.arrays
        orders = np.array([g.permutation(data.n_samples) for g in self.crew.generators])
        orders = self.model.device.asarray(orders)
        with np.errstate(all="ignore"):
            for i in range(data.n_steps):
                if stopped():
                    return
                rows = orders[:, i * data.batch_size : (i + 1) * data.batch_size]
                x, targets = X.take(rows, axis=0), y.take(rows, axis=0)
                self.losses[i] = self._checked(self.step(x, targets))

    def _checked(self, value: Array) -> Array:
        """Return the losses, if there is one for each model."""
        expected = self.losses.shape[1:]
        if getattr(value, "shape", None) != expected:
            raise ValueError(
                f"the loss of {expected[0]} models has shape {getattr(value, 'shape', ())}, "
                f"expected {expected}: it must be summed over the last axes only, axis=(-2, -1)"
            )
        return value

    def end(self, shares: Array) -> Array:
        """Return whether each model is finite, and its mean loss: of shape (2, 1, n_models)."""
        return ends_of(self.crew.flat[None], self.losses[None], shares)


class FusedGroup(Group):
    """Models whose steps of some epochs are taken in one launch of a kernel."""

    def __init__(self, task: Task, crew: Crew) -> None:
        super().__init__(task, crew)
        assert isinstance(task.data, ArrayBatches)
        self._fused = FusedPopulation(
            task.model.sizes,
            task.data.batch_size,
            task.loss,
            crew.flat,
            self.step.state,
            *task.data.arrays,
            own_order=task.own_orders,
            plan=task.plan,  # the same for fewer models: another would have to be compiled
        )
        self._kept: Array | None = None
        self._rates = to_host(crew.rates).reshape(1, -1)
        self.step.state |= self._fused.state  # its numbers lie where the kernel reads them
        crew.state = {name: self.step.state[name] for name in crew.state}

    @property
    def engine(self) -> str:
        """How the steps are taken."""
        return "fused"

    @property
    def most_epochs(self) -> int:
        """How many epochs to take in one launch at most: what they keep lies on the device."""
        task, n_models = self._task, len(self.crew.flat)
        each = 4 * n_models * (self.crew.flat.shape[1] + len(self.losses))
        if task.own_orders:
            each += 4 * n_models * task.data.n_samples
        if task.limit is None:
            room = min(KEPT_BYTES, int(KEPT_SHARE * (task.model.device.memory()[0] or 0)))
        else:
            room = task.limit - n_models * bytes_of_a_model(task)  # which has room for one
        return min(gpu_layers.MOST_EPOCHS, 1 + max(0, int(room // each)))

    def train_epochs(self, orders: Array, factors: Array, shares: Array) -> tuple[Array, Array]:
        """Take the steps of some epochs.

        Parameters
        ----------
        orders : numpy.ndarray of shape (n_epochs, n_samples), or (n_models, n_epochs, n_samples)
            The rows of the data, batch after batch: for all models, or for each of them.
        factors : numpy.ndarray of shape (n_epochs,)
            Of the learning rates, by a schedule.
        shares : array of float64, shape (n_steps,)
            Of the epoch's samples in each step.

        Returns
        -------
        weights : array of shape (n_epochs, n_models, n_parameters)
            Those after each epoch.
        ends : array of shape (2, n_epochs, n_models)
            See :func:`ends_of`.
        """
        device, n_epochs = self.model.device, len(factors)
        if self._kept is None or len(self._kept) < n_epochs:
            self._kept = None  # first, so that there is room
            self._kept = device.xp.empty((n_epochs, *self.crew.flat.shape), np.float32)
        kept = self._kept[:n_epochs]
        losses = device.xp.empty((n_epochs, *self.losses.shape), np.float32)
        rates = self._rates * factors.astype(np.float32)[:, None]
        order = device.asarray(orders, np.int32)
        self._fused.launch(order, device.asarray(rates), losses, kept)
        return kept, ends_of(kept, losses, shares)


def ends_of(weights: Array, losses: Array, shares: Array) -> Array:
    """Return how some epochs of many models ended.

    Parameters
    ----------
    weights : array of shape (n_epochs, n_models, n_parameters)
        Those after each epoch.
    losses : array of shape (n_epochs, n_steps, n_models)
    shares : array of float64, shape (n_steps,)
        Of the epoch's samples in each step.

    Returns
    -------
    array of float64, shape (2, n_epochs, n_models)
        First 1 where weights and losses are all finite, else 0; then the mean losses.
    """
    device = device_of(weights)
    if device.kind == "gpu" and weights.dtype.itemsize >= 4:
        return gpu_layers.epochs_end(weights, losses, shares)
    xp = device.xp
    fine = xp.isfinite(losses).all(axis=1) & xp.isfinite(weights).all(axis=2)
    return xp.stack([fine.astype(np.float64), shares @ losses.astype(np.float64)])


@dataclass(frozen=True)
class _Standing:
    """Where a run stands after its last good epoch; replaced as a whole, whatever interrupts."""

    members: Any
    weights: Array
    epoch: int  # how many have ended


class Run:
    """Training of the models of one part; it can go on, and models can leave it.

    Parameters
    ----------
    task : Task
    results : Results
        Written after each epoch.
    crew : Crew
        The models; their parameters are trained in place.
    epoch : int
        How many epochs they were trained for already.
    generator : numpy.random.Generator, optional
        For the common order of samples; made from the task's seed unless given.
    """

    def __init__(
        self,
        task: Task,
        results: Results,
        crew: Crew,
        *,
        epoch: int = 0,
        generator: np.random.Generator | None = None,
    ) -> None:
        self._task, self._results = task, results
        self._xp = task.model.device.xp
        self.generator = generator
        if generator is None and task.shuffle:
            self.generator = np.random.default_rng(task.seed)
        self._sizes = np.zeros(task.data.n_steps)  # samples of each step
        self._stopped = False
        self._pool: ThreadPoolExecutor | None = None
        self._groups: list[Group] = []
        self._standing = _Standing(crew.members, crew.flat.copy(), epoch)
        self._divide(crew)

    @property
    def members(self) -> Any:
        """The models that are still trained, by their columns in the results."""
        return self._standing.members

    @property
    def epoch(self) -> int:
        """How many epochs have ended."""
        return self._standing.epoch

    def crew(self) -> Crew:
        """Return the models with all they need to go on."""
        return Crew.joined([group.crew for group in self._groups], self._xp)

    def train(self, n_epochs: int, bar: ProgressBar) -> None:
        """Train until so many epochs have ended, counted from the very first, or no model is left.

        Whatever interrupts it, the results hold the last epoch that ended.
        """
        task = self._task
        n_threads = min(len(self._groups), _n_threads())
        product = largest_product(task.model, task.data.batch_size)
        with ExitStack() as context:
            context.enter_context(blas_threads(0 if n_threads > 1 else product))
            if n_threads > 1:
                self._pool = context.enter_context(ThreadPoolExecutor(n_threads))
            try:
                while len(self.members) and self.epoch < n_epochs:
                    self._go_on(n_epochs, bar)
            finally:
                self._stopped = True  # threads that are under way take no further step
                self._finish()
        self._stopped, self._pool = False, None

    def keep(self, chosen: Any) -> None:
        """Train only some of the models from now on, given by their columns in the results."""
        standing = self._standing
        rows = np.flatnonzero(np.isin(standing.members, chosen))
        if len(rows) == len(standing.members):
            return
        self._standing = _Standing(standing.members[rows], standing.weights[rows], standing.epoch)
        self._divide(self.crew().take(rows))

    def _divide(self, crew: Crew) -> None:
        """Make groups of the models, of about equal size."""
        n = len(crew.members)
        self._groups = []
        if n:
            bounds = np.linspace(0, n, _n_groups(self._task, n) + 1).astype(int)
            parts = [slice(a, b) for a, b in itertools.pairwise(bounds.tolist())]
            kind = FusedGroup if self._task.engine == "fused" else Group
            self._groups = [kind(self._task, crew.take(part)) for part in parts]

    def _go_on(self, n_epochs: int, bar: ProgressBar) -> None:
        """Train for an epoch, or some, but not beyond so many in all."""
        task, standing = self._task, self._standing
        factor = self._factors(1)[0]
        if task.schedule is not None:
            for group in self._groups:
                group.set_factor(factor)
        self._steps(bar)
        shares = task.model.device.asarray(self._sizes / self._sizes.sum())
        ends = np.concatenate([to_host(group.end(shares)) for group in self._groups], axis=2)
        weights = self._xp.concatenate([group.crew.flat for group in self._groups])
        rows = {"loss": ends[1]}
        if task.held_out is not None:
            rows |= {name: values[None] for name, values in self._measure(task.held_out).items()}
        self._note(ends[0] > 0, rows, weights[None], weights)
        self._show(bar, standing.epoch, rows)

    def _factors(self, n: int) -> np.ndarray[Any, Any]:
        """Return what learning rates are multiplied by in each of the next epochs."""
        task, epochs = self._task, range(self.epoch, self.epoch + n)
        if task.schedule is None:
            return np.ones(n)
        factors = np.array([factor_of(task.schedule, e, task.n_epochs) for e in epochs])
        self._results.factors[self.epoch : self.epoch + n] = factors
        return factors

    def _show(self, bar: ProgressBar, first: int, rows: dict[str, np.ndarray[Any, Any]]) -> None:
        """Move the bar to the end of some epochs, and show the best losses."""
        if bar.bar is None:
            return
        best = {n: np.fmin.reduce(v, axis=1) for n, v in rows.items() if n.endswith("loss")}
        for i in range(len(rows["loss"])):
            bar.show_epoch({"epoch": first + i + 1} | {n: float(v[i]) for n, v in best.items()})

    def _steps(self, bar: ProgressBar) -> None:
        """Take the steps of an epoch with all groups."""
        data = self._task.data
        if self._task.own_orders:
            self._sizes[:] = whole_sizes(data)
            self._each(lambda group: group.train_own(self._is_stopped))
        elif data.streamed and data.batch_size >= data.n_samples:
            self._sizes[0] = data.n_samples
            self._add_parts(data)
        else:
            first = 0
            for window in _windows(data, self.generator):
                self._sizes[first : first + len(window)] = [len(x) for x, _ in window]
                self._each(
                    lambda group, w=window, i=first: group.train(w, i, self._is_stopped)  # type: ignore[misc]
                )
                first += len(window)
                window.clear()  # before the next is brought
                bar.show_step(first)

    def _add_parts(self, data: Batches) -> None:
        """Take one step on data that come in parts."""
        for x, y in data.epoch(None):
            share = len(x) / data.n_samples
            for group in self._groups:
                group.step.part(x, y, share)
        for group in self._groups:
            group.losses[0] = group.step.finish()

    def _measure(self, held_out: Batches) -> dict[str, np.ndarray[Any, Any]]:
        """Return loss and score of each model on the validation data."""

        def measured(group: Group) -> dict[str, Any]:
            with np.errstate(all="ignore"):
                return measured_on(group.model, held_out, self._task.loss)

        apart = isinstance(held_out, ArrayBatches)  # others cannot be read by two threads
        found = self._each(measured) if apart else list(map(measured, self._groups))
        return {
            f"validation_{name}": np.concatenate([rows[name] for rows in found])
            for name in found[0]
        }

    def _each(self, function: Callable[[Group], Any]) -> list[Any]:
        """Return what a function says of each group, asked by the threads."""
        if self._pool is None:
            return [function(group) for group in self._groups]
        futures = [self._pool.submit(function, group) for group in self._groups]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # raises at once what a thread raised, while others are under way
        return [future.result() for future in futures]

    def _is_stopped(self) -> bool:
        return self._stopped

    def _note(
        self, fine: Any, rows: dict[str, np.ndarray[Any, Any]], weights: Array, last: Array
    ) -> None:
        """Write the numbers of some epochs; leave the models behind that did not end them well.

        Parameters
        ----------
        fine : numpy.ndarray of bool, shape (n_epochs, n_models)
        rows : dict of str to numpy.ndarray of shape (n_epochs, n_models)
        weights : array of shape (n_epochs, n_models, n_parameters)
            Those after each epoch.
        last : array of shape (n_models, n_parameters)
            Those after the last, in memory that stays as it is.
        """
        results, standing = self._results, self._standing
        if "validation_loss" in rows:
            fine = fine & np.isfinite(rows["validation_loss"])
        ended = np.logical_and.accumulate(fine)
        n_ended = ended.sum(axis=0)
        results.write(standing.epoch, standing.members, ended, rows)
        if results.paths is not None:
            epochs = np.arange(len(fine))[:, None] + standing.epoch + 1
            results.paths[epochs, standing.members] = np.where(
                ended[..., None], to_host(weights), np.nan
            )
        bad = n_ended < len(fine)
        for n in np.unique(n_ended[bad]).tolist():
            places = np.flatnonzero(n_ended == n)
            good = weights[n - 1] if n else standing.weights
            results.flat[standing.members[places]] = good[places]
        results.epochs[standing.members[bad]] = standing.epoch + n_ended[bad]
        results.diverged[standing.members[bad]] = True
        stay = np.flatnonzero(~bad)
        if bad.any():
            last = last[stay]
        self._standing = _Standing(standing.members[stay], last, standing.epoch + len(fine))
        if bad.any():
            self._divide(self.crew().take(stay))

    def _finish(self) -> None:
        """Write the weights of the last epoch that ended, and what was found out on the way."""
        results, standing = self._results, self._standing
        for table in results.columns.values():  # an epoch may have been written in part
            table[standing.epoch :, standing.members] = np.nan
        results.flat[standing.members] = standing.weights
        results.epochs[standing.members] = standing.epoch
        results.diverged[standing.members] = False
        for group in self._groups:
            results.engine = group.engine
            if group.step.reason:
                results.note(f"engine {results.engine}: {group.step.reason}")


class FusedRun(Run):
    """Training by a kernel that takes the steps of some epochs in one launch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._n = 1  # epochs of the next launch
        self._drawn: deque[Any] = deque()  # orders of the next epochs
        self._sizes[:] = whole_sizes(self._task.data)

    def _go_on(self, n_epochs: int, bar: ProgressBar) -> None:
        task, first, (group,) = self._task, self.epoch, self._groups
        assert isinstance(group, FusedGroup)
        begin = time.perf_counter()
        n = min(self._n, n_epochs - first, group.most_epochs)
        shares = task.model.device.asarray(self._sizes / self._sizes.sum())
        weights, ends = group.train_epochs(self._orders(group, n), self._factors(n), shares)
        if self.generator is not None and not task.own_orders:  # while the device trains
            self._draw(min(2 * n, n_epochs - first - n))
        fine, losses = to_host(ends)
        rows = {"loss": losses}
        if task.held_out is not None:
            measured = [self._measured(after, task.held_out) for after in weights]
            rows |= {name: np.stack([row[name] for row in measured]) for name in measured[0]}
        self._note(fine > 0, rows, weights, group.crew.flat.copy())
        self._show(bar, first, rows)
        if time.perf_counter() - begin < LONG:
            self._n = 2 * n

    def _measured(self, flat: Array, held_out: Batches) -> dict[str, Any]:
        found = measured_on(stack(self._task.model, flat), held_out, self._task.loss)
        return {f"validation_{name}": values for name, values in found.items()}

    def _orders(self, group: Group, n_epochs: int) -> np.ndarray[Any, Any]:
        """Return the orders of the samples in the next epochs: of all models, or of each."""
        n = self._task.data.n_samples
        if self._task.own_orders:
            drawn = [
                [generator.permutation(n) for _ in range(n_epochs)]
                for generator in group.crew.generators
            ]
            return np.array(drawn, np.int32)
        if self.generator is None:
            return np.tile(np.arange(n, dtype=np.int32), (n_epochs, 1))
        self._draw(n_epochs)
        return np.array([self._drawn.popleft() for _ in range(n_epochs)], np.int32)

    def _draw(self, n_epochs: int) -> None:
        """Have the common orders of so many epochs at hand."""
        assert self.generator is not None
        while len(self._drawn) < n_epochs:
            self._drawn.append(self.generator.permutation(self._task.data.n_samples))


def make_run(task: Task, *arguments: Any, **options: Any) -> Run:
    """Return a :class:`Run` that trains by the engine of the task."""
    return (FusedRun if task.engine == "fused" else Run)(task, *arguments, **options)


def whole_sizes(data: Batches) -> np.ndarray[Any, Any]:
    """Return how many samples each step of an epoch sees, if only the last may see fewer."""
    sizes = np.full(data.n_steps, data.batch_size, float)
    sizes[-1] = data.n_samples - sizes[:-1].sum()
    return sizes


def _windows(data: Batches, generator: np.random.Generator | None) -> Iterator[list[Batch]]:
    """Yield batches, several at a time if they stay where they are: threads meet less often."""
    together = 1
    epoch = data.epoch(generator)
    if isinstance(data, ArrayBatches):
        row_bytes = sum(a[:1].nbytes for a in data.arrays)
        together = max(1, GATHERED_BYTES // (row_bytes * data.batch_size))
    while window := list(itertools.islice(epoch, together)):
        yield window


def _n_threads() -> int:
    return cpu_count()


def _n_groups(task: Task, n_models: int) -> int:
    """Return into how many groups to divide models: one on a GPU, on the CPU for its threads."""
    if task.model.device.kind == "gpu":
        return 1
    numbers = n_models * task.numbers
    n_threads = max(1, min(_n_threads(), n_models, numbers // LEAST_NUMBERS))
    n = max(n_threads, -(-numbers // MOST_NUMBERS))
    return min(n_models, -(-n // n_threads) * n_threads)


def bytes_of_a_model(task: Task) -> int:
    """Return about how much memory a model takes while it is trained."""
    model, data = task.model, task.data
    state = task.optimizer.init(model.parameters)
    size = model.n_parameters
    vectors = sum(array.size >= size for array in state.values())
    vectors += 4  # parameters, gradient, those of the last epoch, those of the one before
    vectors += task.engine == "fused"  # those that a launch keeps
    outputs = sum(model.sizes) if model.layers else size
    numbers = vectors * size + 4 * data.batch_size * outputs + data.n_steps
    if task.held_out is not None:
        numbers += 2 * task.held_out.batch_size * outputs
    order = 8 * data.n_samples if task.own_orders else 0
    return int(numbers * model.dtype.itemsize + order)


def part_size(task: Task, n_models: int) -> tuple[int, str]:
    """Return how many models to train at once, and in words why not all.

    Parameters
    ----------
    task : Task
    n_models : int

    Raises
    ------
    DeviceMemoryError
        If not even one model fits.
    """
    device, each = task.model.device, bytes_of_a_model(task)
    what, limit = "may be used", task.limit
    if limit is None:
        free = device.memory()[0]
        limit = int(MODEL_SHARE[device.kind] * (2**62 if free is None else free))
        what = "are free for them"
    size = min(n_models, limit // each)
    if size < 1:
        raise DeviceMemoryError(
            f"a model takes about {size_text(each)} while it is trained, and {size_text(limit)} "
            f"{what}: raise memory_limit, or lower batch_size"
        )
    if size == n_models:
        return size, ""
    return size, (
        f"{n_models} models take about {size_text(n_models * each)} at once, and "
        f"{size_text(limit)} {what}"
    )


def train_in_parts(
    task: Task,
    results: Results,
    begin: Callable[[Any], Crew],
    progress: bool | None,
) -> None:
    """Train all models, as many at once as the memory holds; where it does not, fewer.

    Parameters
    ----------
    task : Task
    results : Results
    begin : callable
        Models by their columns -> Crew, at the start.
    progress : bool or None
    """
    n = len(results.flat)
    size, why = part_size(task, n)
    parts = deque(np.array_split(np.arange(n), -(-n // size)))
    if why:
        results.note(f"trained in {len(parts)} parts of up to {len(parts[0])} models: {why}")
    while parts:
        part = parts.popleft()
        try:
            with ProgressBar(progress, task.n_epochs, task.data.n_steps, 0) as bar:
                make_run(task, results, begin(part)).train(task.n_epochs, bar)
            continue
        except MemoryError as error:
            if len(part) == 1:
                raise DeviceMemoryError(
                    f"the memory of {task.model.device} does not hold one model of "
                    f"{task.model.n_parameters:,} parameters and its batch: lower batch_size"
                ) from error
        # Out here the arrays of the run are free again.
        parts.extendleft(reversed(np.array_split(part, 2)))
        results.forget(part)
        results.note(
            f"out of memory with {len(part)} models at once, so trained "
            f"{-(-len(part) // 2)} at a time"
        )
        if task.model.device.kind == "gpu":
            task.model.device.xp.get_default_memory_pool().free_all_blocks()
