"""Training: a model, data, a loss and an optimizer in; a trained model and its history out."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpuml import __version__
from gpuml.batches import (
    ArrayBatches,
    Batches,
    GivenBatches,
    PoissonBatches,
    Share,
    StreamedBatches,
    shares,
)
from gpuml.blocking import parse_size
from gpuml.checkpoints import (
    check_contents,
    fingerprint_data,
    load_checkpoint,
    reading_state,
    save_checkpoint,
    saved_facts,
)
from gpuml.devices import CPU, Array, Device, array_module, blas_threads, device_of, to_host
from gpuml.distributed import (
    Alone,
    Communicator,
    HeldBack,
    check_agreement,
    ranks,
    share_of,
)
from gpuml.errors import DataError, GpumlError, noting_memory_errors
from gpuml.faults import (
    Fault,
    cause_in_data,
    cause_in_weights,
    fault_in_steps,
    vectors_not_finite,
)
from gpuml.fused import FusedStep
from gpuml.gpu_layers import EpochEnd, all_finite, fused
from gpuml.history import History
from gpuml.losses import Loss, get_loss, mean_squared_error, softmax_cross_entropy
from gpuml.matmul import Precision
from gpuml.memory_maps import mapped_file
from gpuml.model_files import check_place
from gpuml.models import Linear, Model, Parameters
from gpuml.optimizers import GradientDescent, Optimizer, get_optimizer
from gpuml.progress import progress_bar
from gpuml.regression import largest_stable_learning_rate
from gpuml.schedules import Schedule, factor_of, get_schedule
from gpuml.staging import Trace
from gpuml.steps import Engine, GramStep, Method, Step, make_step, set_learning_rate

# How often, in seconds, a running epoch looks at its losses and moves the progress bar. Each look
# waits for the device.
HEARTBEAT = 0.5

# The share of a GPU's free memory that data are copied to as a whole; larger data are streamed.
DATA_SHARE = 0.5

# Steps that a fused kernel takes in one launch, at most: after so many the progress bar moves.
CHUNK_STEPS = 2**14

# Rows in one forward pass where no gradient is needed; it bounds the memory.
EVALUATED_ROWS = 8192


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

    stops_all_ranks = True

    def __init__(self, history: History) -> None:
        n = len(history)
        super().__init__(f"training stopped after {n} finished epoch{'s' * (n != 1)}")
        self.history = history


def train(
    model: Model,
    X: Any,
    y: Array | None = None,
    *,
    loss: str | Loss | None = None,
    optimizer: str | Optimizer = "adam",
    n_epochs: int = 10,
    batch_size: int | None = 64,
    validation_data: tuple[Array, Array] | None = None,
    schedule: str | Schedule | None = None,
    patience: int | None = None,
    shuffle: bool = True,
    seed: int | None = 0,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int | str = 1,
    memory_limit: int | str | None = None,
    engine: Engine | None = None,
    precision: Precision | None = None,
    communicator: Communicator | None = None,
    clip_norm: float | None = None,
    adversarial: Method | None = None,
    privacy: PrivacySettings | None = None,
    progress: bool | None = None,
) -> History:
    """Train a model in place, on the device where it lives, and return what happened.

    Parameters
    ----------
    model : Model
        Its parameters change.
    X : array of shape (n_samples, n_features), or iterable of (x, y)
        On the model's device, or in host memory, or a memory map: then it is copied to the device
        once if it fits there, and streamed if it does not. Or, without `y`, anything that
        yields batches each time it is iterated over, such as a list of pairs.
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
        Samples never trained on; the loss, and accuracy or R², are measured after each epoch.
    schedule : str or callable, optional
        By what factor the learning rate is multiplied in each epoch: see
        :mod:`gpuml.schedules`.
    patience : int, optional
        Stop when the validation loss has not improved for so many epochs, and take the weights
        of the best one.
    shuffle : bool
        Whether each epoch has its own order of the samples. A memory map is shuffled by blocks of
        neighbouring rows, and the rows of some blocks among each other.
    seed : int or None
        For that order. The same seed on the same device gives the same bits; None another order
        each time.
    checkpoint : path, optional
        A file in which the state of training is kept. The same call goes on from there and
        ends with the same bits as if nothing had happened.
    checkpoint_every : int or str
        Epochs between two writes, or a time: ``"10 min"``.
    memory_limit : int or str, optional
        Device memory for data, such as ``"2 GiB"``, shared with the validation data; half of
        what is free unless given. What is larger is streamed.
    engine : {"eager", "graph", "fused", "one_pass", "gram"}, optional
        How the steps run; the best that can hold the model unless given, which the history
        names. ``"eager"``: operation by operation. ``"graph"``: each step captured once as a
        CUDA graph. ``"fused"``: small MLPs, many steps in one launch of a kernel of our own.
        ``"one_pass"``: a batch is read once, by a linear model. ``"gram"``, never chosen by
        itself, takes full-batch least squares from XᵀX and XᵀY: see :class:`gpuml.Gram` for
        its rounding.
    precision : {"float32", "tf32", "bfloat16"}, optional
        How a GPU multiplies float32: exactly unless given. With ``"bfloat16"`` activations are
        stored in 16 bits too; weights, gradients and their updates stay float32. A CPU
        multiplies exactly.
    communicator : Communicator, optional
        The processes that train this model together. Unless given those that ``mpiexec`` started,
        if it did: each gets the same data and takes its share of the rows of each batch, and all
        end with the same bits. ``gpuml.distributed.Alone()`` for a training of its own.
    clip_norm : float, optional
        How long the gradient of a step may be, all parameters together: a longer one is scaled
        down, so that one odd batch does not undo what others taught.
    adversarial : PGD, optional
        Learn from rows perturbed so that the loss is large: ``gpuml.robustness.PGD(strength=0.1)``.
        The loss in the history is that of perturbed rows; validation data are left as they are.
    privacy : Privacy, optional
        Clip each row's gradient and add noise, so that the model tells little about any one row:
        ``gpuml.privacy.Privacy(noise_multiplier=1.1)``, or ``Privacy(epsilon=3)``. Each batch is
        drawn by chance, and has `batch_size` rows on average; the history says what is spent.
        `shuffle` and `seed` have no part in it.
    progress : bool, optional
        Whether to show a progress bar, on standard error or as a notebook's output; if standard
        error is a terminal unless given. Of several ranks, only the first shows it.

    Returns
    -------
    History

    Raises
    ------
    TypeError
        If `X` lives on a GPU and the model elsewhere.
    DataError
        If engines or methods that read the data first find numbers that are not finite there.
    DistributedError
        If ranks were told different things, or share a GPU.
    ValueError
        If shapes do not fit, labels are not classes of the model, or a setting is out of range.
    CheckpointError
        If the checkpoint is of another model, data or setting; the message names the difference.
    DivergenceError
        If the loss or the weights stop being finite; the message says where that arose: in which
        number of the data, which parameter, which layer for which row, or in whose function.
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
    check_model(model)
    n_epochs = positive_integer("n_epochs", n_epochs)
    if batch_size is not None:
        batch_size = positive_integer("batch_size", batch_size)
    if validation_data is not None and not is_pair(validation_data):
        raise ValueError("validation_data must be a pair: (X, y)")
    if patience is not None:
        patience = positive_integer("patience", patience)
        if validation_data is None:
            raise ValueError("patience needs validation_data to watch")
    if clip_norm is not None:
        clip_norm = positive_number("clip_norm", clip_norm)
    optimizer = get_optimizer(optimizer)
    communicator = communicator or ranks()
    limit = None if memory_limit is None else parse_size(memory_limit)
    if limit is not None and validation_data is not None:
        limit = max(1, limit // 2)  # for each of the two
    with model.device.use(), noting_memory_errors():
        loss = get_loss(loss or usual_loss(X, y))
        data = source_of(model, X, y, loss, batch_size, limit)
        held_out = None
        if validation_data is not None:
            held_out = source_of(model, *validation_data, loss, EVALUATED_ROWS, limit, smaller=True)
        # Taken up again, for more epochs perhaps, a run keeps the engine with which it began.
        before = None if checkpoint is None else saved_facts(checkpoint).get("engine")
        options: dict[str, Any] = {"n_epochs": n_epochs, "before": before}
        options["communicator"] = communicator
        if privacy is not None:
            _check_privacy(privacy, data, shuffle, adversarial, clip_norm)
            assert isinstance(data, ArrayBatches)
            data = PoissonBatches(*data.arrays, data.batch_size)
            adversarial = privacy.method(data, n_epochs)
        with np.errstate(all="ignore"):  # training will name weights that are not finite
            method = _method(adversarial, model, data, loss)
        options |= {"method": method, "clip_norm": clip_norm}
        try:
            step = make_step(model, loss, optimizer, data, engine, precision, **options)
        except DataError as error:  # of the engine gram, which reads the data before all steps
            named = {"X": X, "y": y}
            cause = cause_in_data(named, model.dtype) or cause_in_data(
                named, model.dtype, squares=True
            )
            raise DataError(f"{error}: {cause}" if cause else str(error)) from None
        history = History(
            device=str(model.device),
            engine=step.engine,
            n_samples=data.n_samples,
            batch_size=data.batch_size,
        )
        kind = _FusedRun if isinstance(step, FusedStep) else _Run
        run = kind(model, data, held_out, loss, step, history)
        run.communicator = communicator
        run.generator = np.random.default_rng(seed) if shuffle else None
        if privacy is not None:
            run.generator, run.method = privacy.generator(), method
        run.schedule = None if schedule is None else get_schedule(schedule)
        run.patience = patience
        several = communicator.world_size > 1
        if several:
            run.share = partial(share_of, communicator=communicator)
        facts: dict[str, Any] = {}
        if checkpoint is not None or several:
            facts = {
                "model": repr(model),
                "loss": _named(loss),
                "optimizer": _settings(optimizer),
                "engine": before if several and before else step.engine,
                "device": model.device.kind,
                "batch size": data.batch_size,
                "rows in a chunk": getattr(data, "chunk_rows", None),
                "shuffle": shuffle,
                "seed": seed,
                "schedule": _named(run.schedule),
                "epochs of the schedule": n_epochs if run.schedule else None,
                "patience": patience,
                "data": _fingerprint(X, y) or {"rows of the source": data.n_samples},
                "validation data": None if held_out is None else _fingerprint(*validation_data),  # type: ignore[misc]
            }
        if precision is not None:  # a file from before there was a precision stays good
            facts["precision"] = precision
        if clip_norm is not None:
            facts["clip_norm"] = clip_norm
        if method is not None:
            facts[method.name] = repr(method)
        if several:
            more = {"n_epochs": n_epochs, "steps in an epoch": data.n_steps}
            more["having a checkpoint"] = checkpoint is not None
            if y is None:
                more |= _about_source(X, data)
            _check_ranks(communicator, facts | more, model)
            if seed is None and shuffle:  # one for all
                entropy = np.random.SeedSequence().entropy
                run.generator = np.random.default_rng(communicator.gather(entropy)[0])
        if checkpoint is not None:
            run.checkpoint = _Checkpoint(checkpoint, facts, checkpoint_every)
            run.checkpoint.writes = communicator.rank == 0
            run.take_up()
            if several:
                found = {f"the number of epochs in {checkpoint}": len(history)}
                _check_ranks(communicator, found, model)
        if communicator.rank > 0:
            progress = False
        bar = ProgressBar(progress, n_epochs, data.n_steps, len(history))
        try:
            # NumPy's warnings about overflow say less than DivergenceError, which follows them.
            product = largest_product(model, data.batch_size) / communicator.world_size
            threads = blas_threads(product, communicator.n_threads if several else None)
            with threads, np.errstate(all="ignore"), bar, HeldBack(communicator) as run.ctrl_c:
                run.train(n_epochs, bar)
                run.ctrl_c.look()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt | _NotFiniteError):
                communicator.end_all(error)  # the other ranks do not know of it
            if isinstance(error, _NotFiniteError) and error.weights is None:
                error.weights = to_host(run.flat).copy()
            run.give_up()
            if isinstance(error, KeyboardInterrupt):
                if several and not run.ctrl_c.agreed:
                    raise  # it came to this rank after the others had been asked
                raise TrainingInterrupted(history) from None
            if isinstance(error, _NotFiniteError):
                named = {"X": X, "y": y}
                if validation_data is not None:
                    named |= {"X of the validation data": validation_data[0]}
                    named |= {"y of the validation data": validation_data[1]}
                fault = None
                with suppress(Exception):  # whatever comes in between, say at least what is known
                    fault = run.fault(error, precision, "" if y is None else "X")
                message = _explain(error, named, optimizer, history, model, loss, fault)
                raise DivergenceError(message, history) from None
            raise
        overflowed = vectors_not_finite(step.state, run.flat)
        if overflowed:
            history.notes.append(
                f"{' and '.join(overflowed)} of the optimizer overflowed, so that some weights may "
                "stand still: squares of gradients are too large; standardise the features"
            )
        history.engine = step.engine
        if several:
            history.notes.append(f"trained by {communicator.world_size} ranks")
        if privacy is not None:
            history.notes.append(run.method.note(len(history)))
        if step.reason:
            history.notes.insert(0, f"engine {step.engine}: {step.reason}")
    return history


class _Run:
    """One training: what it works on, and where it stands.

    Between two epochs nothing waits for the device. Whether an epoch went well is noted there, as
    are its loss and its weights; `look` brings that to the host now and then.
    """

    def __init__(
        self,
        model: Model,
        data: Batches,
        held_out: Batches | None,
        loss: Loss,
        step: Step | FusedStep,
        history: History,
    ) -> None:
        self.model, self.data, self.held_out = model, data, held_out
        self.loss, self.history = loss, history
        self.step: Any = step
        self.generator: np.random.Generator | None = None
        self.schedule: Schedule | None = None
        self.patience: int | None = None
        self.checkpoint: _Checkpoint | None = None
        self.communicator: Communicator = Alone()
        self.share: Share | None = None  # of several ranks
        self.method: Any = None  # of private training
        self.ctrl_c = HeldBack(self.communicator)
        self.best: tuple[float, int, Array] | None = None  # validation loss, epoch, weights
        self.flat = model.parameters.flat
        # The weights of the last two epochs that ended well, in turn: an interruption at any
        # moment finds those that the history tells of.
        self.good = [self.flat.copy(), self.flat.copy()]
        xp = self.xp = model.device.xp
        self.losses = xp.zeros(data.n_steps, model.dtype)
        self.sizes = np.zeros(data.n_steps)  # samples of each step
        # Row, losses, mean loss and end of each epoch not looked at yet; and how many epochs,
        # counted from the very first, ended well, and how many of those the history tells of.
        self.pending: list[tuple[dict[str, float], Array, Array, Any]] = []
        plain = self.flat.dtype.name in ("float32", "float64")
        self.end = EpochEnd(self.flat) if fused(xp) and plain else None
        self.shares: tuple[Array, Array] | None = None  # for `end`: sizes, and their shares there
        self.fine, self.n_good = xp.ones((), bool), xp.zeros((), np.int64)
        if self.end is not None:
            self.n_good = self.end.n_good
        self.n_told = 0
        rate = step.state.get("learning_rate")
        self.base_rate = None if rate is None else rate.copy()
        self.clock = _Clock(model.device)

    def train(self, n_epochs: int, bar: ProgressBar) -> None:
        """Train to the end, or until patience runs out."""
        self.clock.start()
        self._epochs(n_epochs, bar)
        if self.checkpoint is not None:
            self.checkpoint.save(self)
        if self.best is not None:
            if self._out_of_patience():
                self.history.notes.append(f"stopped early: not better since epoch {self.best[1]}")
            self.flat[...] = self.best[2]

    def _epochs(self, n_epochs: int, bar: ProgressBar) -> None:
        """Train epoch by epoch."""
        looked = time.monotonic()
        each = self.held_out is not None or self.checkpoint is not None
        pause = _Pause(self.communicator)
        for epoch in range(len(self.history) + 1, n_epochs + 1):
            if self._out_of_patience():
                break
            row: dict[str, float] = {"epoch": epoch, "loss": math.nan}
            if self.schedule is not None and self.base_rate is not None:
                factor = factor_of(self.schedule, epoch - 1, n_epochs)
                set_learning_rate(self.step, self.base_rate, factor)
                row["learning_rate"] = float(self.base_rate) * factor
            if self.method is not None:
                row["epsilon"] = self.method.spent(epoch)
            self._one_epoch(bar)
            self._note(row)
            if self.share is None:
                due = time.monotonic() - looked > HEARTBEAT / 5
            else:
                due = pause.is_over()
            if each or due:
                self.look(bar)
                looked = time.monotonic()
            if self.checkpoint is not None:  # what is due is written before anyone goes on
                self.communicator.gather(None)
            if due:
                self.ctrl_c.look()
        self.look(bar)

    def _one_epoch(self, bar: ProgressBar) -> None:
        """Take a step for each batch."""
        self.losses = self.xp.empty_like(self.losses)  # those of the last epoch are still pending
        if isinstance(self.step, GramStep):
            self.losses[0], self.sizes[0] = self.step(None, None), self.data.n_samples
        elif self.data.streamed and self.data.batch_size >= self.data.n_samples:
            for x, y, *_ in self._batches(None):
                self.step.part(x, y, len(x) / self.data.n_samples)
            self.losses[0], self.sizes[0] = self.step.finish(), self.data.n_samples
        else:
            looked = time.monotonic()
            i = -1  # enumerate would keep a batch, and its chunk, while the next is brought
            for batch in self._batches(self.generator):
                i += 1
                self.losses[i] = self.step(*batch)
                if self.share is None:
                    self.sizes[i] = getattr(self.data, "n_rows", len(batch[0]))
                else:
                    self.sizes[i] = batch[2]
                del batch
                if time.monotonic() - looked > HEARTBEAT:
                    bad = ~np.isfinite(to_host(self.losses[: i + 1]))  # and so wait for the device
                    if bad.any() and self.communicator.world_size == 1:
                        self.losses[i + 1 :] = 0  # no need to go on to the end of the epoch
                        return
                    bar.show_step(i + 1)
                    looked = time.monotonic()

    def _batches(self, generator: np.random.Generator | None) -> Iterator[tuple[Any, ...]]:
        """Yield x, y; of several ranks this one's rows of them, and how many there are in all."""
        if self.share is None:
            return self.data.epoch(generator)
        return shares(self.data, generator, self.share)

    def _note(self, row: dict[str, float]) -> None:
        """Note on the device whether the epoch ended well, and if so its weights."""
        kept = self.good[int(row["epoch"]) % 2]
        if self.end is not None:
            if self.shares is None or not np.array_equal(self.shares[0], self.sizes):
                share = self.model.device.asarray(self.sizes / self.sizes.sum())
                self.shares = self.sizes.copy(), share
            mean = self.end(self.losses, self.shares[1], kept)
        else:
            xp = self.xp
            self.fine &= xp.isfinite(self.losses).all() & xp.isfinite(self.flat).all()
            mean = self.losses.astype(np.float64) @ self.model.device.asarray(
                self.sizes / self.sizes.sum()
            )
            xp.copyto(kept, self.flat, where=self.fine)
            self.n_good += self.fine
        self.pending.append((row, self.losses, mean, self.clock.now()))

    def look(self, bar: ProgressBar | None) -> None:
        """Bring to the host how the last epochs went; measure them, and write the checkpoint.

        Interrupted at any moment, it can be called again.
        """
        if not self.pending:
            return
        n_good = int(self.n_good)
        for row, losses, mean, moment in self.pending:
            if row["epoch"] <= self.n_told:
                continue
            if row["epoch"] > n_good:
                raise _not_finite(to_host(losses))
            row["loss"] = float(mean)
            if self.held_out is not None and bar is not None:
                self._measure(row)
                moment = self.clock.now()
            row["seconds"] = self.clock.seconds(moment)
            self.history.append(row)
            self.n_told += 1
            if bar is not None:
                bar.show_epoch(row)
        self.pending = []
        if self.checkpoint is not None and bar is not None and self.checkpoint.due(self.history):
            self.checkpoint.save(self)

    def _measure(self, row: dict[str, float]) -> None:
        """Measure on the validation data, and remember the best epoch."""
        assert self.held_out is not None
        measured = _evaluate(self.model, self.held_out, self.loss)
        if self.communicator.world_size > 1:  # on unlike machines the last bits could differ
            measured = self.communicator.gather(measured)[0]
        for name, value in measured.items():
            if not math.isfinite(value) and name != "r2":
                what = f"the validation {name} is not finite"
                raise _NotFiniteError(self.data.n_steps, what, validation=True)
            row[f"validation_{name}"] = value
        loss = row["validation_loss"]
        if self.patience is not None and (self.best is None or loss < self.best[0]):
            self.best = loss, int(row["epoch"]), self.flat.copy()

    def _out_of_patience(self) -> bool:
        if self.patience is None or self.best is None:
            return False
        return len(self.history) - self.best[1] >= self.patience

    def give_up(self) -> None:
        """Put back the weights of the last epoch that ended well, the last of the history."""
        self.history.truncate(self.n_told)  # a row may have been written in part
        if not self.n_told:
            self.history.columns.clear()
        if self.held_out is None:  # else epochs count only when they have been measured
            with suppress(_NotFiniteError):
                self.look(None)
        self.flat[...] = self.good[self.n_told % 2]

    def fault(
        self, error: _NotFiniteError, precision: Precision | None, table: str
    ) -> Fault | None:
        """Return what is not finite first by the weights that are kept, or were validated."""
        flat, data = self.flat, self.data
        options: dict[str, Any] = {"precision": precision} if precision else {}
        if error.validation:
            assert self.held_out is not None
            flat, data = self.model.device.asarray(error.weights), self.held_out
            options, table = {}, "X of the validation data"
        parameters = Parameters(flat, self.model.parameters.shapes)
        return fault_in_steps(self.model, parameters, self.loss, data, options, table=table)

    def take_up(self) -> None:
        """Go on from where the checkpoint says, if there is one."""
        assert self.checkpoint is not None
        found = self.checkpoint.load()
        if found is None:
            return
        arrays, state = found
        with reading_state(self.checkpoint.path):
            best, columns = state["best"], state["columns"]
            expected = {"weights": self.flat} | ({} if best is None else {"best": self.flat})
            expected |= {f"optimizer.{name}": a for name, a in self.step.state.items()}
            check_contents(self.checkpoint.path, arrays, columns, expected)
            if self.generator is not None:
                self.generator.bit_generator.state = state["generator"]
            loss, epoch = (math.inf, 0) if best is None else (float(best[0]), int(best[1]))
        self.flat[...] = self.model.device.asarray(arrays["weights"])
        for name, array in self.step.state.items():
            array[...] = self.model.device.asarray(arrays[f"optimizer.{name}"])
        for good in self.good:
            good[...] = self.flat
        if best is not None:
            self.best = loss, epoch, self.model.device.asarray(arrays["best"].copy())
        self.history.columns = {name: list(values) for name, values in columns.items()}
        self.clock.before = self.clock.told = self.history.seconds
        self.n_told = len(self.history)
        self.n_good[...] = self.n_told

    def state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the arrays and the numbers from which training can go on."""
        arrays = {"weights": self.flat}
        arrays |= {f"optimizer.{name}": array for name, array in self.step.state.items()}
        if self.best is not None:
            arrays["best"] = self.best[2]
        state = {
            "columns": self.history.columns,
            "generator": self.generator and self.generator.bit_generator.state,
            "best": self.best and self.best[:2],
        }
        return {name: to_host(array) for name, array in arrays.items()}, state


class _Pause:
    """When ranks look how they stand: now and then, and all of them after the same epoch.

    To look is to wait for the device, which then waits for the host.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._begin, self._n, self._after = time.monotonic(), 0, 1

    def is_over(self) -> bool:
        """Count an epoch; return whether it is time to look."""
        self._n += 1
        if self._n < self._after:
            return False
        now = time.monotonic()
        slowest = max(self._communicator.gather(now - self._begin))
        self._after = max(1, min(2 * self._after, int(self._n * HEARTBEAT / max(slowest, 1e-9))))
        self._begin, self._n = now, 0
        return True


@dataclass
class _Chunk:
    """Some epochs that a fused kernel trains in one launch."""

    rows: list[dict[str, float]]
    before: list[Array]  # copies of all that training changes
    order: Array
    rates: Array
    losses: Array
    pinned: Any  # what is copied from it must stay
    fine: Any = None  # whether the weights are finite after it; None until it is launched
    end: Any = None
    done: Any = None


class _FusedRun(_Run):
    """Training by an engine that takes several epochs in one launch.

    While the device trains on one chunk of epochs, the host draws the order of the next. A chunk
    that does not end well is taken back, and its good epochs are trained once more.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.chunks: list[_Chunk] = []  # launched, and not looked at
        self.copies = self.xp.cuda.Stream(non_blocking=True)
        self.rate = float(to_host(self.base_rate))  # once: to read it is to wait for the device

    def _epochs(self, n_epochs: int, bar: ProgressBar) -> None:
        """Train chunk by chunk, each twice as long as the one before."""
        alone = self.held_out is not None or self.checkpoint is not None
        size = 1
        while not self._out_of_patience():
            first = self.n_told + sum(len(chunk.rows) for chunk in self.chunks)
            n = min(n_epochs - first, self._most(first, size))
            if n < 1:
                break
            self._launch(range(first, first + n), n_epochs)
            if alone or len(self.chunks) > 1:
                self.look(bar)
            size = min(2 * size, max(1, CHUNK_STEPS // self.data.n_steps))
        while self.chunks:
            self.look(bar)

    def _most(self, first: int, size: int) -> int:
        """Return how many epochs may follow each other without a look."""
        if self.held_out is not None:
            return 1
        if self.checkpoint is not None and self.checkpoint.seconds is None:
            return min(size, self.checkpoint.epochs - first % self.checkpoint.epochs)
        return size

    def _launch(self, epochs: range, n_epochs: int) -> None:
        """Queue some epochs."""
        import cupyx

        xp, n, n_steps = self.xp, self.data.n_samples, self.data.n_steps
        order = cupyx.empty_pinned((len(epochs), n), np.int32)
        rates = cupyx.empty_pinned(len(epochs), np.float32)
        rows, base = [], self.rate
        for i, epoch in enumerate(epochs):
            order[i] = np.arange(n) if self.generator is None else self.generator.permutation(n)
            row: dict[str, float] = {"epoch": epoch + 1, "loss": math.nan}
            rates[i] = base
            if self.schedule is not None:
                factor = factor_of(self.schedule, epoch, n_epochs)
                rates[i] = np.float32(base) * np.float32(factor)
                row["learning_rate"] = base * factor
            rows.append(row)
        chunk = _Chunk(
            rows=rows,
            before=[array.copy() for array in self.step.changing],
            order=xp.empty(order.shape, np.int32),
            rates=xp.empty(len(epochs), np.float32),
            losses=xp.empty((len(epochs), n_steps), np.float32),
            pinned=(order, rates),
        )
        chunk.order.set(order)
        chunk.rates.set(rates)
        self.chunks.append(chunk)
        self.step.launch(chunk.order, chunk.rates, chunk.losses)
        chunk.end = self.clock.now()
        fine = all_finite(self.flat)
        if self.schedule is not None:
            self.step.state["learning_rate"][...] = chunk.rates[-1]
        chunk.done = Trace.event()
        chunk.fine = fine

    def look(self, bar: ProgressBar | None) -> None:
        """Bring the oldest chunk's losses to the host; measure, and write the checkpoint."""
        if not self.chunks:
            return
        chunk = self.chunks[0]
        with self.copies as stream:  # so that the host does not wait for the chunk behind it
            stream.wait_event(chunk.done)
            losses, fine = to_host(chunk.losses), bool(to_host(chunk.fine))
        good = np.isfinite(losses).all(axis=1)
        if not fine and good.all():
            good[-1] = False
        n_good = int(good.argmin()) if not good.all() else len(good)
        if n_good < len(good):
            weights = to_host(self.flat).copy()
            n_good = self._take_back(chunk, n_good)
        self._tell(chunk, losses[:n_good], bar)
        if n_good < len(good):
            raise _not_finite(losses[n_good], weights)
        del self.chunks[0]
        if self.checkpoint is not None and bar is not None and self.checkpoint.due(self.history):
            self.checkpoint.save(self)

    def _tell(self, chunk: _Chunk, losses: np.ndarray[Any, Any], bar: ProgressBar | None) -> None:
        """Add the epochs of a chunk to the history; interrupted, it can be called again."""
        sizes = np.full(self.data.n_steps, self.data.batch_size, float)
        sizes[-1] = self.data.n_samples - sizes[:-1].sum()
        begin, end = self.clock.told, self.clock.seconds(chunk.end)
        shares = sizes / self.data.n_samples
        # Each epoch by itself, for the same bits however many there are.
        means = [float(epoch @ shares) for epoch in losses.astype(float)]
        seconds = np.linspace(begin, end, len(chunk.rows) + 1)[1:]
        told = zip(chunk.rows, means, seconds.tolist(), strict=False)
        for row, mean, moment in told:
            if row["epoch"] <= self.n_told:
                continue
            row["loss"] = mean
            if self.held_out is not None and bar is not None:
                self._measure(row)
                moment = max(moment, self.clock.seconds(self.clock.now()))
            row["seconds"] = moment
            self.history.append(row)
            self.n_told += 1
            if bar is not None:
                bar.show_epoch(row)
        self.clock.told = self.history.seconds

    def _take_back(self, chunk: _Chunk, n_good: int) -> int:
        """Go back to the beginning of a chunk, and train only its good epochs; return how many.

        Losses may stay finite for a while after a weight has ceased to be, so weights decide.
        """
        self.chunks = []
        while True:
            for array, before in zip(self.step.changing, chunk.before, strict=True):
                array[...] = before
            if n_good == 0:
                return 0
            self.step.launch(
                chunk.order[:n_good], chunk.rates[:n_good], self.xp.empty_like(chunk.losses)
            )
            if bool(to_host(self.xp.isfinite(self.flat).all())):
                return n_good
            n_good -= 1

    def give_up(self) -> None:
        """Go back to the last epoch that ended well, the last of the history."""
        self.history.truncate(self.n_told)
        if not self.n_told:
            self.history.columns.clear()
        self.model.device.synchronize()
        with suppress(_NotFiniteError):
            while self.chunks and self.chunks[0].fine is not None and self.held_out is None:
                self.look(None)
        if self.chunks:
            chunk = self.chunks[0]
            self._take_back(chunk, self.n_told - int(chunk.rows[0]["epoch"]) + 1)


class _Checkpoint:
    """A file in which the state of training is kept, and when to write it."""

    def __init__(self, path: str | PathLike[str], facts: dict[str, Any], every: int | str) -> None:
        self.path, self.facts = Path(path), facts
        self.epochs, self.seconds = _interval(every)
        check_place(self.path)  # now rather than after hours
        self.written = time.monotonic()
        self.writes = True

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return what was saved, or None if there is no file."""
        return load_checkpoint(self.path, self.facts) if self.path.exists() else None

    def due(self, history: History) -> bool:
        """Return whether it is time to write."""
        if self.seconds is not None:
            return time.monotonic() - self.written > self.seconds
        return len(history) % self.epochs == 0

    def save(self, run: _Run) -> None:
        """Write the state, of several ranks only one; until that is done, the older file stays."""
        if not self.writes:
            return
        arrays, state = run.state()
        save_checkpoint(self.path, arrays=arrays, state=state, facts=self.facts)
        self.written = time.monotonic()


def _interval(every: int | str) -> tuple[int, float | None]:
    """Return a number of epochs, or 1 and seconds, from ``5`` or ``"10 min"``."""
    if not isinstance(every, str):
        return positive_integer("checkpoint_every", every), None
    units = {"s": 1, "min": 60, "h": 3600}
    number, _, unit = every.strip().partition(" ")
    try:
        seconds = float(number) * units[unit.strip()]
    except (ValueError, KeyError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(
            "checkpoint_every must be a number of epochs, or a time such as '10 min', "
            f"got {every!r}"
        )
    return 1, seconds


class _Clock:
    """Seconds since training began, by the device's own clock where it has one."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.before = 0.0  # what was trained before it was taken up again
        self.told = 0.0  # the end of the last epoch in the history
        self.begin: Any = None

    def start(self) -> None:
        """Begin to count."""
        self.begin = self.now()

    def now(self) -> Any:
        """Return the moment at which the device is done with all that was queued."""
        return time.perf_counter() if self.device.kind == "cpu" else Trace.event()

    def seconds(self, moment: Any) -> float:
        """Return the seconds from the beginning to a moment."""
        if self.device.kind == "cpu":
            return self.before + float(moment - self.begin)
        from cupy.cuda import get_elapsed_time

        moment.synchronize()
        return self.before + float(get_elapsed_time(self.begin, moment)) / 1e3


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
    with model.device.use(), noting_memory_errors():
        loss = get_loss(loss or usual_loss(X, y))
        data = source_of(model, X, y, loss, EVALUATED_ROWS, None, smaller=True)
        with blas_threads(largest_product(model, data.batch_size)):
            return _evaluate(model, data, loss)


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
        Where `X` lives. Logits for classes: ``model.preprocessing.answers(outputs)`` gives
        names of classes back, and numbers in their own unit.
    """
    device, home = model.device, device_of(X)
    check_numbers("X", X)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {X.shape}, expected (n_samples, n_features), not empty")
    with blas_threads(largest_product(model, min(len(X), EVALUATED_ROWS))), noting_memory_errors():
        outputs = [
            home.asarray(model(device.asarray(X[start : start + EVALUATED_ROWS], model.dtype)))
            for start in range(0, len(X), EVALUATED_ROWS)
        ]
        return home.xp.concatenate(outputs)


def _evaluate(model: Model, data: Batches, loss: Loss) -> dict[str, float]:
    """Add up loss and score on the device, batch by batch, and read them once."""
    return {name: float(value) for name, value in measured_on(model, data, loss).items()}


def measured_on(model: Model, data: Batches, loss: Loss) -> dict[str, Any]:
    """Return the loss and the score on the host: for many models at once an array of each."""
    total: Any = 0.0
    hits: Any = 0
    squares = _Squares()
    for x, targets in data.epoch(None):
        predictions = model(x)
        total = total + loss(predictions, targets)[0] * len(x)
        if loss is softmax_cross_entropy:
            hits = hits + (predictions.argmax(axis=-1) == targets).sum(axis=-1)
        elif loss is mean_squared_error:
            squares.add(predictions, targets)
    measured = {"loss": np.asarray(to_host(total), np.float64) / data.n_samples}
    if loss is softmax_cross_entropy:
        measured["accuracy"] = to_host(hits) / data.n_samples
    elif loss is mean_squared_error:
        measured["r2"] = squares.r2()
    return measured


class _Squares:
    """Sums from which R² follows, batch by batch: Chan, Golub, LeVeque, 1983, for the variance."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Any = 0.0
        self.total: Any = 0.0  # sum of the squared distances of targets from their mean
        self.residual: Any = 0.0

    def add(self, predictions: Array, targets: Array) -> None:
        """Count a batch."""
        xp, n = array_module(targets), len(targets)
        targets = targets.astype(np.float64)
        mean = targets.mean(axis=0)
        apart = mean - self.mean
        self.total = (
            self.total
            + xp.square(targets - mean).sum(axis=0)
            + xp.square(apart) * (self.n * n / (self.n + n))
        )
        self.mean = self.mean + apart * (n / (self.n + n))
        self.n += n
        self.residual = self.residual + xp.square(predictions - targets).sum(axis=-2)

    def r2(self) -> Any:
        """Return 1 - residual / total, averaged over the outputs; as metrics.r2_score."""
        total, residual = (np.atleast_1d(to_host(a)) for a in (self.total, self.residual))
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = 1 - residual / total
        scores = np.where(total > 0, scores, np.where(residual > 0, 0.0, 1.0))
        return scores.mean(axis=-1)


def _not_finite(
    losses: np.ndarray[Any, Any], weights: np.ndarray[Any, Any] | None = None
) -> _NotFiniteError:
    """Say what went wrong in an epoch that did not end well."""
    finite = np.isfinite(losses)
    if finite.all():
        return _NotFiniteError(len(losses), "a weight is not finite", weights)
    step = int(finite.argmin())
    return _NotFiniteError(step + 1, f"the loss is {losses[step]}, which is not finite", weights)


class _NotFiniteError(Exception):
    """A number stopped being finite; `step` counts from 1 inside the epoch."""

    def __init__(
        self,
        step: int,
        what: str,
        weights: np.ndarray[Any, Any] | None = None,
        *,
        validation: bool = False,
    ) -> None:
        self.step = step
        self.what = what
        self.weights = weights  # when that was noticed, on the host
        self.validation = validation


def _explain(
    error: _NotFiniteError,
    data: Mapping[str, Any],
    optimizer: Optimizer,
    history: History,
    model: Model,
    loss: Loss,
    fault: Fault | None,
) -> str:
    """Say where a number stopped being finite, why, and what to do."""
    where = f"epoch {len(history) + 1}, step {error.step}: {error.what}"
    cause = cause_in_data(data, model.dtype)
    if cause:
        return f"{where}, since {cause}"
    cause = cause_in_weights(model.parameters)
    if cause:  # since these are those from before training
        return f"{where}, since already before training {cause}"
    rate = getattr(optimizer, "learning_rate", None)
    cure = f"try learning_rate={rate / 10:g} instead of {rate:g}" if rate else "lower its rate"
    largest = _largest_stable_rate(optimizer, data, model, loss)
    too_fast = rate is not None and rate > largest
    if too_fast:
        stable = f"the largest stable learning_rate is {_rounded_down(largest):g}"
        cure = f"with all samples at once {stable}, yours is {rate:g}"
    if fault is not None and not (too_fast and len(history)):
        where += f", since {fault.text}"
        if fault.own:
            return f"{where}: look into that function"
        if not len(history) and not error.validation:
            return f"{where}, even by the weights from before training: standardise the features"
    elif error.validation:
        where += " on data that the model has not seen; some may be far from the training data"
    elif not too_fast:
        cause = cause_in_data(data, model.dtype, squares=True)
        if cause:
            return f"{where}, and {cause} either: standardise the features"
        if error.weights is not None and not np.isnan(error.weights).all():
            cause = cause_in_weights(Parameters(error.weights, model.parameters.shapes))
            where += f". Then {cause}" if cause else ""
    return f"{where}. The steps may be too large: {cure}, or standardise the features"


def _largest_stable_rate(
    optimizer: Optimizer, data: Mapping[str, Any], model: Model, loss: Loss
) -> float:
    """Return the largest rate by which full-batch least squares converge; infinite if unknown."""
    largest = math.inf
    known = isinstance(optimizer, GradientDescent) and type(model) is Linear
    if not known or loss is not mean_squared_error or not hasattr(data["X"], "dtype"):
        return largest
    with suppress(DataError):  # squares that are infinite: no rate is small enough
        largest = largest_stable_learning_rate(
            data["X"],
            n_outputs=model.sizes[1],
            bias="bias" in model.parameters,
            momentum=optimizer.momentum,  # type: ignore[attr-defined]
        )
    decay = optimizer.weight_decay  # type: ignore[attr-defined]
    if decay:  # adds to all curvatures but those along biases
        reach = 2 * (1 + optimizer.momentum)  # type: ignore[attr-defined]
        largest = reach / (reach / largest + decay)
    return largest


def _rounded_down(value: float) -> float:
    """Return a positive number with three digits, not above it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.floor(value / unit) * unit


class ProgressBar:
    """A bar over all steps, on a terminal; nothing elsewhere."""

    def __init__(self, show: bool | None, n_epochs: int, n_steps: int, n_done: int) -> None:
        self.bar: Any = None
        self.n_epochs, self.n_steps = n_epochs, n_steps
        if sys.stderr.isatty() if show is None else show:
            self.bar = progress_bar(total=n_epochs * n_steps, unit="step")
            self.bar.set_description(f"epoch 1/{n_epochs}")
        self.done = n_done * n_steps
        if self.bar is not None:
            self.bar.update(self.done)

    def __enter__(self) -> ProgressBar:
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


def positive_integer(name: str, value: Any) -> int:
    """Return a whole number of any type as an int, or say that it is none."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 1 <= value < math.inf or value != int(value):
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def positive_number(name: str, value: Any) -> float:
    """Return a number of any type as a float, or say that it is none, or not positive."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def check_model(model: Any) -> None:
    """Refuse what is no model, such as its class, or the data in its place."""
    if isinstance(model, type):
        raise TypeError(f"give a model, not its class: {model.__name__}(…)")
    if not isinstance(model, Model):
        raise TypeError(
            f"expected a model, got {type(model).__name__}: gpuml.train(model, X, y), with "
            "gpuml.Linear, gpuml.MLP or a class of your own that derives from gpuml.Model"
        )


def is_pair(value: Any) -> bool:
    """Return whether a value can be X and y."""
    return isinstance(value, tuple | list) and len(value) == 2


def _settings(optimizer: Optimizer) -> Any:
    """Return what makes an optimizer equal to another."""
    return optimizer.settings() if hasattr(optimizer, "settings") else _named(optimizer)


def _check_ranks(communicator: Communicator, settings: dict[str, Any], model: Model) -> None:
    """Refuse ranks that were told different things, have other weights, or share a GPU."""
    weights = hashlib.sha256(to_host(model.parameters.flat).tobytes()).hexdigest()
    others = {"gpuml's version": __version__, "the weights to begin with": weights[:16]}
    check_agreement(communicator, settings | others)
    communicator.all_reduce(model.device.xp.zeros(1))  # connects GPUs, or says why it cannot


class PrivacySettings(Protocol):
    """What `train` asks of :class:`gpuml.privacy.Privacy`."""

    def generator(self) -> np.random.Generator:
        """Return what chooses the rows of each step."""
        ...

    def method(self, data: PoissonBatches, n_epochs: int) -> Method:
        """Return how gradients are found."""
        ...


def _check_privacy(
    privacy: Any,
    data: Batches,
    shuffle: bool,
    adversarial: Any,
    clip_norm: float | None,
) -> None:
    """Refuse what private training cannot do, or would not keep private."""
    if not hasattr(privacy, "method"):
        raise TypeError(
            "privacy must be settings such as gpuml.privacy.Privacy(noise_multiplier=1.1), got "
            f"{privacy!r}"
        )
    if not isinstance(data, ArrayBatches):
        raise ValueError(
            "private training draws each batch from all rows, so X and y must be arrays that fit "
            "on the device: no source of batches, and nothing that is streamed"
        )
    cause = cause_in_data({"y": data.arrays[1]}, data.arrays[1].dtype)
    if cause:  # NaN would say that there is no row
        raise DataError(f"the targets must be finite, and {cause}")
    if not shuffle:
        raise ValueError("private training draws its rows by chance: leave shuffle=False away")
    if adversarial is not None:
        raise ValueError("adversarial training is not private: give adversarial or privacy")
    if clip_norm is not None:
        raise ValueError("private training clips by itself: Privacy(clip_norm=…)")


def _method(adversarial: Method | None, model: Model, data: Batches, loss: Loss) -> Method | None:
    """Return how gradients are found, checked against what is trained; None if plainly."""
    if adversarial is None:
        return None
    if not hasattr(adversarial, "prepare"):
        raise TypeError(
            f"adversarial must be settings such as gpuml.robustness.PGD(strength=0.1), got "
            f"{adversarial!r}"
        )
    adversarial.check(model, data, loss)
    return adversarial


def _named(thing: Any) -> str:
    """Return what tells a loss or a schedule from others, also in another process."""
    if type(thing).__repr__ in (object.__repr__, type(_named).__repr__):  # with its address
        return str(getattr(thing, "__qualname__", type(thing).__qualname__))
    return repr(thing)


def _fingerprint(X: Any, y: Any) -> Any:
    """Return what tells data from other data; a source of batches cannot be told."""
    return None if y is None else fingerprint_data(X, y)


def _about_source(X: Any, data: Batches) -> dict[str, Any]:
    """Return what tells a source of batches from others, as far as one batch shows it."""
    sizes = np.array(getattr(data, "sizes", []), np.int64)
    short = sizes.tolist() if len(sizes) <= 10 else hashlib.sha256(sizes.tobytes()).hexdigest()[:16]
    first = (a if hasattr(a, "dtype") else np.asarray(a) for a in next(iter(X)))
    return {"sizes of the batches": short, "the first batch": fingerprint_data(*first)}


def usual_loss(X: Any, y: Any) -> str:
    """Return the name of the loss that is taken unless one is given: it depends on the targets."""
    if y is None:
        for pair in () if hasattr(X, "dtype") else X:
            y = pair[1] if is_pair(pair) else None
            break
        if y is None:
            return "mean_squared_error"  # source_of says what is wrong
        y = y if hasattr(y, "dtype") else np.asarray(y)
    device_of(y)  # refuses what is no array
    is_labels = y.dtype.kind in "iu" and y.ndim == 1
    return "cross_entropy" if is_labels else "mean_squared_error"


def largest_product(model: Model, batch_size: int) -> float:
    """Floating-point operations of the largest matrix product in a step: 2 M N K."""
    return 2.0 * batch_size * max(map(math.prod, model.parameters.shapes.values()))


def source_of(
    model: Model,
    X: Any,
    y: Any,
    loss: Loss,
    batch_size: int | None,
    limit: int | None,
    *,
    smaller: bool = False,
) -> Batches:
    """Return data as batches on the model's device: copied there once, or streamed.

    Parameters
    ----------
    model : Model
        For its device, its type, and the shapes that fit.
    X, y
        As for :func:`train`.
    loss : callable
    batch_size : int or None
    limit : int or None
        Bytes on the device.
    smaller : bool
        Whether batches may be smaller if so many rows do not fit.

    Raises
    ------
    TypeError, ValueError
        If they do not fit the model, the loss, or the device; the message says what to do.
    """
    device = model.device
    if y is None:
        if hasattr(X, "dtype"):
            raise ValueError("y is missing: give targets, or a source of batches (x, y) instead")

        def check(x: Any, t: Any) -> tuple[Array, Array, Any]:
            x, t = (a if hasattr(a, "dtype") else np.asarray(a) for a in (x, t))
            return x, *_checked(model, x, t, loss)

        return GivenBatches(X, check, device, model.dtype)
    y, dtype = _checked(model, X, y, loss)
    batch_size = min(batch_size or len(X), len(X))
    if device_of(X) == CPU:
        needed = math.prod(X.shape) * model.dtype.itemsize + y.nbytes
        if device == CPU:
            stream = mapped_file(X) is not None
        else:
            limit = limit or int(DATA_SHARE * (device.memory()[0] or 2**62))
            stream = needed > limit
        if stream:
            types = model.dtype, dtype
            return StreamedBatches(X, y, batch_size, device, *types, limit, smaller=smaller)
    with np.errstate(over="ignore"):  # DivergenceError will name the number
        return ArrayBatches(device.asarray(X, model.dtype), device.asarray(y, dtype), batch_size)


def check_numbers(name: str, a: Array) -> None:
    """Refuse text, dates, complex numbers, and numbers that a mask hides."""
    if a.dtype.kind not in "biuf" and a.dtype.name != "bfloat16":
        raise TypeError(
            f"{name} must hold real numbers, got {a.dtype}: {name}.astype(float) makes such of "
            "text that holds numbers"
        )
    if isinstance(a, np.ma.MaskedArray) and np.ma.is_masked(a):
        raise TypeError(f"{name} has masked numbers: leave these rows out, or fill them in")


def _checked(model: Model, X: Array, y: Array, loss: Loss) -> tuple[Array, np.dtype[Any]]:
    """Return targets in the shape, and the type, that the model and the loss need."""
    device = model.device
    data_device = device_of(X, y)
    if data_device not in (CPU, device):
        raise TypeError(
            f"the model is on {device.kind}, X and y are on gpu:{data_device.index}: "
            f'model.to("gpu:{data_device.index}") moves the model'
        )
    check_numbers("X", X)
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {X.shape}, expected (n_samples, n_features), not empty")
    if len(X) != len(y):
        raise ValueError(f"X has {len(X)} rows, y has {len(y)}: they must agree")
    if y.dtype.kind in "OSU":
        raise ValueError(
            "y has names: gpuml.Preprocessing.fit(X, y, ...) numbers classes, and its answers() "
            "turns a model's outputs into names again"
        )
    check_numbers("y", y)
    with np.errstate(all="ignore"):  # training will name numbers that are too large
        n_outputs = model(device.asarray(X[:1], model.dtype)).shape[-1]
    if loss is softmax_cross_entropy:
        if y.dtype.kind not in "iu" or y.ndim != 1:
            raise ValueError(
                f"cross entropy needs integer labels of shape ({len(X)},), "
                f"got {y.dtype} of shape {y.shape}"
            )
        labels = to_host(y)  # a GPU's reductions take seconds to compile the first time
        if labels.min() < 0 or labels.max() >= n_outputs:
            raise ValueError(
                f"labels must be from 0 to {n_outputs - 1}, one for each of the model's outputs, "
                f"got {int(labels.min())} to {int(labels.max())}; to predict whole numbers, "
                'loss="mean_squared_error"'
            )
    if y.dtype.kind in "iu" and loss is not mean_squared_error:
        return y, np.dtype(np.int64)
    if y.ndim == 1:
        y = y[:, None]
    if loss is mean_squared_error and y.shape != (len(X), n_outputs):
        raise ValueError(
            f"y has shape {y.shape}, the model's outputs ({len(X)}, {n_outputs}); if y are "
            "labels, make them integers: y.astype(int)"
        )
    return y, model.dtype
