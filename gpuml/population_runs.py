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

from gpuml.batches import GATHERED_BYTES, ArrayBatches, Batch, Batches
from gpuml.blocking import size_text
from gpuml.devices import Array, blas_threads, cpu_count, to_host
from gpuml.errors import DeviceMemoryError, unknown_name
from gpuml.fused_populations import FusedPopulation, population_limit
from gpuml.losses import Loss
from gpuml.models import Model, Parameters
from gpuml.optimizers import Optimizer, State
from gpuml.schedules import Schedule, factor_of
from gpuml.steps import FUSED_PAYS, GRAPH_PAYS, EagerStep, GraphStep, graph_limit, set_learning_rate
from gpuml.training import EVALUATED_ROWS, ProgressBar, largest_product, measured_on

PopulationEngine: TypeAlias = Literal["batched", "graph", "fused"]
POPULATION_ENGINES = ("batched", "graph", "fused")

# Outputs of the widest layer, over a batch and the models of a group: with fewer a second thread
# costs more than it brings, with more the arrays leave the processor's cache (measured by
# tests/benchmarks/populations.py).
LEAST_NUMBERS, MOST_NUMBERS = 2**15, 2**16

# Rows in one forward pass of many models where no gradient is needed, at least.
LEAST_ROWS = 256

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
        self.epochs = np.zeros(len(self.flat), int)
        self.diverged = np.zeros(len(self.flat), bool)

    def write(self, epoch: int, members: Any, rows: dict[str, np.ndarray[Any, Any]]) -> None:
        """Write the numbers of some models for an epoch, counted from 0."""
        for name, values in rows.items():
            table = self.columns.setdefault(name, np.full_like(self.columns["loss"], np.nan))
            table[epoch, members] = values
        self.seconds[epoch, members] = time.perf_counter() - self.begin

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
    n_epochs: int,
    own_order: bool,
) -> tuple[str, str]:
    """Return the engine that is asked for, or the best; and why not a better one.

    Raises
    ------
    ValueError
        If it is unknown, or cannot train this.
    """
    if engine is not None and engine not in POPULATION_ENGINES:
        raise ValueError(unknown_name("engine", str(engine), POPULATION_ENGINES))
    reasons: list[str] = []
    n_steps, pays = data.n_steps * n_epochs, {"fused": FUSED_PAYS, "graph": GRAPH_PAYS}
    for name in [engine] if engine else ["fused", "graph", "batched"]:
        reason = _limit(name, model, loss, optimizer, data, own_order)
        few = engine is None and n_steps < pays.get(name, 0)
        if reason is None and not few:
            return name, "; ".join(reasons)
        if engine:
            raise ValueError(f"engine='{engine}' cannot train this population: {reason}")
        if reason and model.device.kind == "gpu":
            reasons.append(f"not {name}, since {reason}")
    raise AssertionError("batched operations train everything")


def _limit(
    engine: str, model: Model, loss: Loss, optimizer: Optimizer, data: Batches, own_order: bool
) -> str | None:
    """Return why an engine cannot train a population, or None if it can."""
    if engine == "fused":
        return population_limit(model, loss, optimizer, data, own_order)
    return graph_limit(model, data) if engine == "graph" else None


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

    def end(self, shares: Array) -> tuple[Any, Any]:
        """Return on the host whether each model is finite, and its mean loss."""
        xp = self.model.device.xp
        fine = xp.isfinite(self.losses).all(axis=0) & xp.isfinite(self.crew.flat).all(axis=1)
        mean = shares @ self.losses.astype(np.float64)
        both = to_host(xp.stack([fine.astype(np.float64), mean]))
        return both[0] > 0, both[1]


class FusedGroup(Group):
    """Models whose steps of an epoch are taken in one launch of a kernel."""

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
        )
        self.step.state |= self._fused.state  # its numbers lie where the kernel reads them
        crew.state = {name: self.step.state[name] for name in crew.state}

    @property
    def engine(self) -> str:
        """How the steps are taken."""
        return "fused"

    def train_epoch(self, order: np.ndarray[Any, Any]) -> None:
        """Take the steps of an epoch.

        Parameters
        ----------
        order : numpy.ndarray of shape (n_samples,), or (n_models, n_samples)
            The rows of the data, batch after batch: for all models, or for each of them.
        """
        order = self.model.device.asarray(order[..., None, :], np.int32)
        rates = self.step.state["learning_rate"].reshape(1, -1)
        self._fused.launch(order, rates, self.losses[None])


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
                    self._one_epoch(bar)
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

    def _one_epoch(self, bar: ProgressBar) -> None:
        task, standing = self._task, self._standing
        if task.schedule is not None:
            factor = factor_of(task.schedule, standing.epoch, task.n_epochs)
            self._results.factors[standing.epoch] = factor
            for group in self._groups:
                group.set_factor(factor)
        self._steps(bar)
        shares = task.model.device.asarray(self._sizes / self._sizes.sum())
        ends = [group.end(shares) for group in self._groups]
        fine = np.concatenate([end[0] for end in ends])
        rows = {"loss": np.concatenate([end[1] for end in ends])}
        if task.held_out is not None:
            rows |= self._measure(task.held_out)
            fine &= np.isfinite(rows["validation_loss"])
        self._note(fine, rows)
        best = {n: float(np.fmin.reduce(v)) for n, v in rows.items() if n.endswith("loss")}
        bar.show_epoch({"epoch": standing.epoch + 1} | best)

    def _steps(self, bar: ProgressBar) -> None:
        """Take the steps of an epoch with all groups."""
        data = self._task.data
        if self._task.own_orders or self._task.engine == "fused":
            self._sizes[:] = data.batch_size
            self._sizes[-1] = data.n_samples - self._sizes[:-1].sum()
        if self._task.engine == "fused":
            self._fused_epoch()
        elif self._task.own_orders:
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

    def _fused_epoch(self) -> None:
        """Take the steps of an epoch in a launch for each group."""
        n = self._task.data.n_samples
        order = np.arange(n)
        if self.generator is not None and not self._task.own_orders:
            order = self.generator.permutation(n)
        for group in self._groups:
            assert isinstance(group, FusedGroup)
            own = [generator.permutation(n) for generator in group.crew.generators]
            group.train_epoch(np.array(own) if own else order)

    def _add_parts(self, data: Batches) -> None:
        """Take one step on data that come in parts."""
        totals: list[Any] = [0.0] * len(self._groups)
        for x, y in data.epoch(None):
            share = len(x) / data.n_samples
            for i, group in enumerate(self._groups):
                totals[i] = totals[i] + group.step.part(x, y, share)
        for group, total in zip(self._groups, totals, strict=True):
            group.step.finish()
            group.losses[0] = total

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

    def _note(self, fine: Any, rows: dict[str, np.ndarray[Any, Any]]) -> None:
        """Write an epoch's numbers; leave the models behind that did not end it well."""
        results, standing = self._results, self._standing
        good, bad = np.flatnonzero(fine), standing.members[~fine]
        results.write(
            standing.epoch,
            standing.members[good],
            {name: values[good] for name, values in rows.items()},
        )
        weights = self._xp.concatenate([group.crew.flat for group in self._groups])
        if len(bad):
            results.flat[bad] = standing.weights[np.flatnonzero(~fine)]
            results.epochs[bad], results.diverged[bad] = standing.epoch, True
            weights = weights[good]
        if results.paths is not None:
            results.paths[standing.epoch + 1, standing.members[good]] = to_host(weights)
        self._standing = _Standing(standing.members[good], weights, standing.epoch + 1)
        if len(bad):
            self._divide(self.crew().take(good))

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
    outputs = sum(model.sizes) if model.layers else size
    numbers = vectors * size + 4 * data.batch_size * outputs + data.n_steps
    if task.held_out is not None:
        numbers += 2 * task.held_out.batch_size * outputs
    order = 8 * data.n_samples if task.own_orders else 0
    return int(numbers * model.dtype.itemsize + order)


def part_size(task: Task, n_models: int, limit: int | None) -> tuple[int, str]:
    """Return how many models to train at once, and in words why not all.

    Parameters
    ----------
    task : Task
    n_models : int
    limit : int or None
        Bytes for models; from the memory that is free unless given.

    Raises
    ------
    DeviceMemoryError
        If not even one model fits.
    """
    device, each = task.model.device, bytes_of_a_model(task)
    what = "may be used"
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
    limit: int | None,
    progress: bool | None,
) -> None:
    """Train all models, as many at once as the memory holds; where it does not, fewer.

    Parameters
    ----------
    task : Task
    results : Results
    begin : callable
        Models by their columns -> Crew, at the start.
    limit : int or None
        Bytes for models.
    progress : bool or None
    """
    n = len(results.flat)
    size, why = part_size(task, n, limit)
    parts = deque(np.array_split(np.arange(n), -(-n // size)))
    if why:
        results.note(f"trained in {len(parts)} parts of up to {len(parts[0])} models: {why}")
    while parts:
        part = parts.popleft()
        try:
            with ProgressBar(progress, task.n_epochs, task.data.n_steps, 0) as bar:
                Run(task, results, begin(part), epoch=0).train(task.n_epochs, bar)
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
