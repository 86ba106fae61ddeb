"""The step of training: forward, loss, backward, update; and the engines that run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, Protocol, TypeAlias

from gpuml import fused, gpu_layers, one_pass
from gpuml.batches import Batches
from gpuml.buckets import Buckets, part_of
from gpuml.cpu_layers import CpuGradient
from gpuml.cpu_populations import CpuPopulationGradient
from gpuml.devices import Array, array_module
from gpuml.distributed import Communicator
from gpuml.errors import unknown_name
from gpuml.fused import FusedStep
from gpuml.losses import Loss, mean_squared_error
from gpuml.matmul import CapturedProducts, Precision, checked_precision
from gpuml.models import MLP, Backward, Linear, Model, Parameters
from gpuml.optimizers import OPTIMIZERS, Optimizer, State, clip_norm
from gpuml.regression import Gram

Engine: TypeAlias = Literal["eager", "graph", "fused", "one_pass", "gram"]
ENGINES = ("eager", "graph", "fused", "one_pass", "gram")
RANK_ENGINES = ("eager", "graph", "one_pass")  # of several ranks

# From so many steps on it pays to compile a kernel for the sizes of a model (a second or two, kept
# on disk), or to load what captures products (half a second).
FUSED_PAYS, GRAPH_PAYS = 400, 3000


class Step(Protocol):
    """One step of training, taken in place; it never waits for the device.

    Attributes
    ----------
    engine : str
        How it runs.
    reason : str
        Why not by a faster engine; empty if there is nothing to say.
    state : dict of str to array
        The optimizer's, which a schedule and a checkpoint see.
    """

    engine: str
    reason: str
    state: State

    def __call__(self, x: Array, y: Array) -> Array:
        """Take a step on a batch; return the loss before it."""
        ...

    def part(self, x: Array, y: Array, share: float) -> None:
        """Add the gradient and the loss of a part of a batch, times its share."""
        ...

    def finish(self) -> Array:
        """Take the step for which all parts have been added; return the loss before it."""
        ...


@dataclass(frozen=True)
class Work:
    """What a step works with, for a :class:`Method` to build on.

    Attributes
    ----------
    model : Model
    loss : callable
    parameters, gradients : Parameters
    state : dict of str to array
        Arrays added here are kept in checkpoints.
    options : dict
        For ``model.forward``.
    """

    model: Model
    loss: Loss
    parameters: Parameters
    gradients: Parameters
    state: State
    options: dict[str, Any]


Gradient: TypeAlias = Callable[[Array, Array], Array]  # (x, y) -> loss; writes the gradients


class Method(Protocol):
    """Another way to the gradient of a step: on inputs that an attack changed, or row by row.

    Attributes
    ----------
    name : str
        What it is, for messages: ``"adversarial training"``.
    n_gradients : int
        About how many plain steps one of its steps takes.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def n_gradients(self) -> int: ...  # noqa: D102

    def check(self, model: Model, data: Batches, loss: Loss) -> None:
        """Refuse what it cannot train, with a ValueError that says why."""
        ...

    def prepare(self, work: Work) -> Callable[[Gradient, Array, Array], Array]:
        """Return what is called as ``(gradient, x, y)`` in place of ``gradient(x, y)``.

        It can be captured as that can.
        """
        ...


class EagerStep:
    """Forward, loss, backward and update as array operations, one after the other.

    Parameters
    ----------
    model : Model
    loss : callable
    optimizer : Optimizer
    precision : {"float32", "tf32", "bfloat16"}, optional
        How a GPU multiplies float32.
    clip_norm : float, optional
        How long the gradient may be.
    """

    engine = "eager"

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: Optimizer,
        precision: Precision | None = None,
        *,
        clip_norm: float | None = None,
    ) -> None:
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self.clip_norm = clip_norm
        self._options: dict[str, Any] = {"precision": precision} if precision else {}
        self.reason = ""
        # Of its own, since only the optimizer keeps a rounded copy up to date.
        self._parameters = Parameters(model.parameters.flat, model.parameters.shapes)
        self._rounds = (
            precision == "bfloat16"
            and gpu_layers.fused(model.device.xp)
            and type(optimizer) in OPTIMIZERS.values()
        )
        self._gradients = self._make_gradients()
        self._method: Callable[[Gradient, Array, Array], Array] | None = None
        self._total: Any = None  # of the parts so far, and their loss
        self._total_loss: Any = 0.0
        self.state = optimizer.init(model.parameters)
        self._on_cpu: CpuGradient | CpuPopulationGradient | None = None
        for kind in (CpuGradient, CpuPopulationGradient):
            if kind.limit(model, loss) is None:
                self._on_cpu = kind(model, loss, self._gradients)

    def use(self, method: Method) -> None:
        """Let a method find the gradients from now on."""
        work = Work(
            self._model,
            self._loss,
            self._parameters,
            self._gradients,
            self.state,
            self._options,
        )
        self._method = method.prepare(work)

    def _update_by(self, gradients: Parameters) -> None:
        if self.clip_norm is not None:
            clip_norm(gradients, self.clip_norm)
        self._optimizer.update(self._parameters, gradients, self.state)

    def _find_gradient(self, x: Array, y: Array) -> Array:
        if self._method is None:
            return self._gradient(x, y)
        return self._method(self._gradient, x, y)

    def _make_gradients(self) -> Parameters:
        return self._model.parameters.zeros_like()

    def _gradient(self, x: Array, y: Array) -> Array:
        if self._on_cpu is not None and self._on_cpu.fits(x):
            return self._on_cpu(x, y)
        predictions, backward = self._forward(x)
        value, d_predictions = self._loss(predictions, y)
        backward(d_predictions, self._gradients)
        return value

    def _forward(self, x: Array) -> tuple[Array, Backward]:
        if self._rounds and self._parameters.rounded is None:  # the weights to begin with are there
            self._parameters.keep_rounded()
        return self._model.forward(self._parameters, x, **self._options)

    def __call__(self, x: Array, y: Array) -> Array:
        """Take a step on a batch; return the loss before it."""
        value = self._find_gradient(x, y)
        self._update_by(self._gradients)
        return value

    def part(self, x: Array, y: Array, share: float) -> None:
        """Add the gradient and the loss of a part of a batch, times its share."""
        if self._total is None:
            self._total = self._model.parameters.zeros_like()
        if not len(x):  # of a rank without rows
            return
        self._total_loss = self._total_loss + self._find_gradient(x, y) * share
        self._gradients.flat *= share
        self._total.flat += self._gradients.flat

    def finish(self) -> Array:
        """Take the step for which all parts have been added; return the loss before it."""
        value = self._update_by_total()
        self._total.flat[...] = 0
        self._total_loss = 0.0
        return value

    def _update_by_total(self) -> Array:
        self._update_by(self._total)
        return self._total_loss


class RankStep(EagerStep):
    """The same work, each rank on its rows of a batch; gradients are added up over all ranks.

    On GPUs they are added up in buckets, while the backward pass goes on, and parameters follow
    as their sums arrive, a perceptron's beside it.

    Parameters
    ----------
    model : Model
    loss : callable
    optimizer : Optimizer
    precision : {"float32", "tf32", "bfloat16"}, optional
        How a GPU multiplies float32.
    communicator : Communicator
    read_once : bool
        Whether a rank reads its rows once, as a linear model can: see :mod:`gpuml.one_pass`.
    clip_norm : float, optional
        How long the gradient of all ranks may be; then parameters follow once all sums are there.
    """

    _gradients: Buckets

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: Optimizer,
        precision: Precision | None = None,
        *,
        communicator: Communicator,
        read_once: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        self._communicator, self._read_once = communicator, read_once
        super().__init__(model, loss, optimizer, precision, clip_norm=clip_norm)
        if read_once:
            self.engine = "one_pass"
        self._pieces: list[tuple[Parameters, list[Array], State]] = []  # of each bucket

    @property
    def _at_once(self) -> bool:
        """Whether an update needs all sums: their length, or an optimizer of somebody's own."""
        return self.clip_norm is not None or type(self._optimizer) not in OPTIMIZERS.values()

    def _make_gradients(self) -> Buckets:
        apart = not self._at_once
        # A perceptron is done with a layer's weights before it writes the next gradient.
        follow = self._move if apart and type(self._model) is MLP else None
        return Buckets(self._model.parameters, self._communicator, apart=apart, follow=follow)

    def _begin(self, loss: Array, *, mean: bool = False) -> None:
        """Note the loss; from now on the parameters may follow the gradients."""
        self._gradients.begin(loss, mean=mean)
        if self._at_once:
            return
        if not self._pieces:  # now, since rounded parameters are made with the first step
            self._pieces = [self._piece(part) for part in self._gradients.slices]
        self._optimizer.advance(self.state)  # type: ignore[attr-defined]

    def _move(self, bucket: int) -> None:
        """Move the parameters of a bucket whose sums are there."""
        divisor = self._gradients.divisor
        self._optimizer.move(*self._pieces[bucket], divisor)  # type: ignore[attr-defined]

    def __call__(self, x: Array, y: Array, n_rows: int | None = None) -> Array:
        """Take a step on this rank's rows of a batch, which has so many on all ranks."""
        n_rows = n_rows or len(x)
        alike = n_rows % self._communicator.world_size == 0  # all have as many
        weight = 1 if alike else len(x) / n_rows
        sums = self._gradients.sums
        if not len(x):
            self._begin(sums[-1], mean=alike)
            sums[...] = 0
        elif self._read_once or self._on_cpu is not None:
            self._gradients.make_free()
            value = self._gradient(x, y)
            self._begin(value, mean=alike)
            if not alike:
                sums *= weight
        else:
            predictions, backward = self._forward(x)
            value, d_predictions = self._loss(predictions, y)
            self._begin(value if alike else value * weight, mean=alike)
            backward(d_predictions if alike else d_predictions * weight, self._gradients)
        return self._update()

    def _gradient(self, x: Array, y: Array) -> Array:
        if not self._read_once or one_pass.limit(self._model, x) is not None:
            return super()._gradient(x, y)
        n_threads = self._communicator.n_threads
        return one_pass.gradient(x, y, self._parameters, self._gradients, n_threads=n_threads)

    def part(self, x: Array, y: Array, share: float) -> None:
        """Add the gradient and the loss of a part of a batch, times its share."""
        self._gradients.make_free()
        super().part(x, y, share)

    def _update(self) -> Array:
        """Follow the gradients as their sums over all ranks arrive; return the loss."""
        gradients = self._gradients
        if self._at_once:
            list(gradients.added())
            self._update_by(gradients)
        else:
            for bucket in gradients.added():
                self._move(bucket)
        return gradients.loss()

    def _piece(self, part: slice) -> tuple[Parameters, list[Array], State]:
        """Return the parameters in a bucket, what makes their gradient, and their state."""
        size = self._parameters.flat.size
        state = {name: a[part] if a.shape == (size,) else a for name, a in self.state.items()}
        addends = [addend[part] for addend in self._gradients.addends]
        return part_of(self._parameters, part), addends, state

    def _update_by_total(self) -> Array:
        self._begin(self._total_loss)
        self._gradients.flat[...] = self._total.flat
        return self._update()


class Recorder:
    """Captures work on a GPU as CUDA graphs; what they use stays where it is as long as this.

    Parameters
    ----------
    xp : module
        CuPy.

    Attributes
    ----------
    stream : cupy.cuda.Stream
        For the work; it and the usual stream wait for each other.

    Raises
    ------
    Exception
        If the library of products that can be captured is not there, or does not load.
    """

    def __init__(self, xp: Any) -> None:
        self._cuda = xp.cuda
        self._pool, self.stream = xp.cuda.MemoryPool(), xp.cuda.Stream()
        with self.stream, self._allocator():
            self._products = CapturedProducts(self.stream)

    def _allocator(self) -> Any:
        return self._cuda.using_allocator(self._pool.malloc)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Let work inside the block use what a capture will use: before it, all is loaded so."""
        with self.stream, self._allocator(), self._products:
            yield

    def capture(self, work: Callable[..., Any], *arrays: Array) -> tuple[Any, list[Array], Any]:
        """Return the graph of some work, copies of the arrays on which it works, and its result.

        Nothing happens until the graph is launched in the stream. CuPy and CUDA have many ways to
        say that it cannot be.
        """
        with self.working():
            copies = [a.copy() for a in arrays]
            self.stream.begin_capture()
            try:
                result = work(*copies)
            finally:
                graph = self.stream.end_capture()
        return graph, copies, result


class Repeated:
    """Work in place that is done several times: on a GPU captured with the second, then replayed.

    Parameters
    ----------
    recorder : Recorder or None
        Without one, each time is a call.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._graphs: dict[Any, tuple[Any, list[Array]]] = {}  # by shapes, with their arrays

    def __call__(self, work: Callable[..., Any], n_times: int, *arrays: Array) -> None:
        """Do the work, always the same, so many times.

        It is called with the arrays, changes the first of them, and never waits for the device.
        """
        shapes = tuple((a.shape, a.dtype) for a in arrays)
        if self._recorder is not None and shapes not in self._graphs and n_times > 1:
            with self._recorder.working():
                work(*arrays)
            n_times -= 1
            try:
                self._graphs[shapes] = self._recorder.capture(work, *arrays)[:2]
            except Exception:  # it cannot be captured, and so is called
                self._recorder = None
        if self._recorder is None or shapes not in self._graphs:
            for _ in range(n_times):
                work(*arrays)
            return
        graph, copies = self._graphs[shapes]
        xp = array_module(arrays[0])
        with self._recorder.stream:
            for copy, array in zip(copies, arrays, strict=True):
                xp.copyto(copy, array)
            for _ in range(n_times):
                graph.launch()
            xp.copyto(arrays[0], copies[0])


class GraphStep(EagerStep):
    """The same work, captured once for each shape of a batch and then replayed in one launch.

    The first batch of a shape is trained on eagerly, which loads and compiles all that is
    needed; the second is captured. What a graph uses stays where it is: parameters, state, and a
    memory pool of its own.
    """

    engine = "graph"

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: Optimizer,
        precision: Precision | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, loss, optimizer, precision, **options)
        self._graphs: dict[Any, _Graph | None] = {}
        try:
            self._recorder = Recorder(model.device.xp)
        except Exception as error:  # a library that is there and does not load
            self._give_up(error)

    def __call__(self, x: Array, y: Array, *n_rows: int) -> Array:
        """Take a step on a batch; return the loss before it."""
        if self.engine == "eager":
            return super().__call__(x, y, *n_rows)
        shape = x.shape, y.shape, *n_rows
        if shape not in self._graphs:
            self._graphs[shape] = None
            with self._recorder.working():
                return super().__call__(x, y, *n_rows)
        graph = self._graphs[shape] or self._capture(x, y, *n_rows)
        if graph is None:
            return super().__call__(x, y, *n_rows)
        self._graphs[shape] = graph
        xp = self._model.device.xp
        with self._recorder.stream:
            xp.copyto(graph.x, x)
            xp.copyto(graph.y, y)
            graph.graph.launch()
        return graph.loss

    def _give_up(self, error: Exception) -> None:
        self.engine = "eager"
        said = f"not graph, since the step cannot be captured: {_line(error)}"
        self.reason = "; ".join(filter(None, [self.reason, said]))

    def _capture(self, x: Array, y: Array, *n_rows: int) -> _Graph | None:
        """Return the graph of a step, or None and say why there is none."""
        try:
            take_step = super().__call__
            graph, (x, y), loss = self._recorder.capture(lambda *b: take_step(*b, *n_rows), x, y)
        except Exception as error:  # CuPy and CUDA have many ways to say no
            self._give_up(error)
            return None
        return _Graph(graph, x, y, loss)


class RankGraphStep(GraphStep, RankStep):  # type: ignore[misc]
    """A step of one of several ranks, captured with its sums over all of them."""

    def _capture(self, x: Array, y: Array, *n_rows: int) -> _Graph | None:
        under_way = self._gradients.under_way
        graph = super()._capture(x, y, *n_rows)
        if graph is None:  # nothing of it has happened
            self._gradients.under_way = under_way
        if not all(self._communicator.gather(graph is not None)):
            if graph is not None:
                self._give_up(RuntimeError("another rank cannot"))
            return None
        return graph


@dataclass(frozen=True)
class _Graph:
    """A captured step, and the memory that it reads and writes."""

    graph: Any
    x: Array
    y: Array
    loss: Array


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class OnePassStep(EagerStep):
    """A linear model's step that reads the batch once; see :mod:`gpuml.one_pass`."""

    engine = "one_pass"

    def _gradient(self, x: Array, y: Array) -> Array:
        if one_pass.limit(self._model, x) is not None:  # such as rows that are not contiguous
            return super()._gradient(x, y)
        return one_pass.gradient(x, y, self._parameters, self._gradients)


class GramStep(EagerStep):
    """Full-batch least squares from XᵀX and XᵀY alone: the data are read once for all steps.

    Parameters
    ----------
    model : Linear
    loss : callable
    optimizer : Optimizer
    data : Batches
        Read here, once.
    clip_norm : float, optional
        How long the gradient may be.
    """

    engine = "gram"

    def __init__(
        self,
        model: Linear,
        loss: Loss,
        optimizer: Optimizer,
        data: Batches,
        *,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(model, loss, optimizer, clip_norm=clip_norm)
        self._gram = Gram.of_batches(data.epoch(None), bias="bias" in model.parameters)

    def _gradient(self, x: Array, y: Array) -> Array:
        value, _ = self._gram.loss_and_gradient(self._parameters, self._gradients)
        return value


def make_step(
    model: Model,
    loss: Loss,
    optimizer: Optimizer,
    data: Batches,
    engine: Engine | None,
    precision: Precision | None = None,
    *,
    n_epochs: int = 1,
    before: str | None = None,
    communicator: Communicator | None = None,
    method: Method | None = None,
    clip_norm: float | None = None,
) -> Step | FusedStep:
    """Put the step together, by the engine that is asked for or the best that can hold it.

    Parameters
    ----------
    model : Model
    loss : callable
    optimizer : Optimizer
    data : Batches
    engine : {"eager", "graph", "fused", "one_pass", "gram"} or None
    precision : {"float32", "tf32", "bfloat16"}, optional
        How a GPU multiplies float32.
    n_epochs : int
        How often the data will pass: for few steps nothing is compiled.
    before : str, optional
        The engine by which this training began, which is to go on with it if it can.
    communicator : Communicator, optional
        The ranks that share the work, if there are several.
    method : Method, optional
        How the gradients are found, where that is not plain.
    clip_norm : float, optional
        How long the gradient may be.

    Returns
    -------
    Step or FusedStep

    Raises
    ------
    ValueError
        If the engine is unknown, or cannot train this model; the message says why.
    """
    if engine is not None and engine not in ENGINES:
        raise ValueError(unknown_name("engine", engine, ENGINES))
    checked_precision(precision, model.dtype)
    several = communicator is not None and communicator.world_size > 1
    if several and method is not None:
        raise ValueError(
            f"{method.name} runs in one process so far, and there are "
            f"{communicator.world_size} ranks"  # type: ignore[union-attr]
        )
    known = RANK_ENGINES if several else ENGINES
    if engine is not None and engine not in known:
        raise ValueError(
            f"engine='{engine}' trains in one process, and there are "
            f"{communicator.world_size} ranks: leave it away"  # type: ignore[union-attr]
        )
    trained = model, loss, optimizer, data

    def limit(name: str, asked: str | None) -> str | None:
        return _unfit(name, method, clip_norm) or _limit(name, *trained, precision, asked)

    usual = [name for name in ("fused", "one_pass", "graph", "eager") if name in known]
    chosen: list[str] = [engine] if engine else usual
    reasons: list[str] = []
    if before not in chosen or limit(before, before) is not None:
        before = None
    for name in chosen:
        asked = before if name == before else engine
        n_gradients = n_epochs * (method.n_gradients if method else 1)
        pays = asked is not None or _pays(name, model, data, n_gradients)
        reason = limit(name, asked) if pays else _unfit(name, method, clip_norm) or ""
        if reason is None and before not in (None, name):
            reasons.append(f"not {name}, since the checkpoint was begun by {before}")
            continue
        if reason is None:
            step: Step | FusedStep = (
                _made_for_rank(name, model, loss, optimizer, precision, communicator, clip_norm)
                if several
                else _made(name, *trained, precision, clip_norm)
            )
            if method is not None and isinstance(step, EagerStep):
                step.use(method)
            step.reason = "; ".join([*reasons, *filter(None, [step.reason])])
            return step
        if engine:
            raise ValueError(f"engine='{engine}' cannot train this: {reason}")
        if name in ("fused", "graph") and reason and type(model) is MLP:
            reasons.append(f"not {name}, since {reason}")
    raise AssertionError("the eager engine trains everything")


def _made(
    name: str,
    model: Model,
    loss: Loss,
    optimizer: Optimizer,
    data: Batches,
    precision: Precision | None,
    clip_norm: float | None,
) -> Any:
    if name == "fused":
        return FusedStep(model, loss, optimizer, data)  # type: ignore[arg-type]
    if name == "gram":
        return GramStep(model, loss, optimizer, data, clip_norm=clip_norm)  # type: ignore[arg-type]
    kind = {"one_pass": OnePassStep, "graph": GraphStep, "eager": EagerStep}[name]
    return kind(model, loss, optimizer, precision, clip_norm=clip_norm)


def _made_for_rank(
    name: str,
    model: Model,
    loss: Loss,
    optimizer: Optimizer,
    precision: Precision | None,
    communicator: Any,
    clip_norm: float | None,
) -> RankStep:
    options = {"communicator": communicator, "read_once": name == "one_pass"}
    kind = RankGraphStep if name == "graph" else RankStep
    return kind(model, loss, optimizer, precision, clip_norm=clip_norm, **options)


def _unfit(name: str, method: Method | None, clip_norm: float | None) -> str | None:
    """Return why an engine cannot take gradients in such a way, or None."""
    if clip_norm is not None and name == "fused":
        return "its kernels do not clip gradients"
    if method is not None and name not in ("eager", "graph"):
        return f"{method.name} is for the engines eager and graph"
    return None


def _limit(
    name: str,
    model: Model,
    loss: Loss,
    optimizer: Optimizer,
    data: Batches,
    precision: Precision | None,
    asked: str | None,
) -> str | None:
    """Return why an engine cannot train a model, None if it can, or "" if it had better not."""
    low = precision in ("tf32", "bfloat16")
    if name in ("fused", "one_pass", "gram") and low:
        return f"it multiplies in float32, and precision is {precision}"
    if name == "fused":
        return fused.limit(model, loss, optimizer, data)
    if name == "gram":
        if type(model) is not Linear or loss is not mean_squared_error:
            return "it is for Linear models and the mean squared error"
        return (
            None if data.batch_size >= data.n_samples else "it is for full batches: batch_size=None"
        )
    if name == "one_pass":
        if loss is not mean_squared_error:
            return "it is for the mean squared error"
        x, _ = next(iter(data.epoch(None)))
        reason = one_pass.limit(model, x)
        return "" if reason is None and not asked and not one_pass.pays(model, x) else reason
    if name == "graph":
        return graph_limit(model, data)
    return None


def graph_limit(model: Model, data: Batches) -> str | None:
    """Return why a step cannot be captured as a CUDA graph, or None if it can be tried."""
    if model.device.kind == "cpu":
        return "graphs are for GPUs"
    if model.device.xp.cuda.runtime.is_hip:
        return "graphs are for NVIDIA GPUs"
    if find_spec("nvmath") is None:
        return "nvmath-python is not installed: pip install nvmath-python"
    if data.streamed and data.batch_size >= data.n_samples:
        return "a full batch comes in parts"
    return None


def _pays(name: str, model: Model, data: Batches, n_epochs: int) -> bool:
    """Return whether an engine is worth its start, if it can train the model."""
    if name in ("fused", "graph"):
        least = FUSED_PAYS if name == "fused" else GRAPH_PAYS
        enough = data.n_steps * n_epochs >= least
        # A model of one's own may do more than launch kernels: engine="graph" tries.
        return enough and model.device.kind == "gpu" and type(model) in (Linear, MLP)
    if name == "one_pass":
        return type(model) is Linear
    return name == "eager"


def set_learning_rate(step: Step | FusedStep, base: Array, factor: float) -> None:
    """Multiply the base learning rate by a schedule's factor, where the step reads it."""
    array_module(base).multiply(base, factor, out=step.state["learning_rate"])
