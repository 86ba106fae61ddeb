"""How training by several ranks scales: measured, and predicted by a model of its cost.

A step of data-parallel training is each rank's own work on its share of the rows, and one sum of
all gradients, an **all-reduce**. :func:`measure_scaling` times both, :class:`CostModel` is fitted
to the times and says what a step takes with more ranks than there are at hand.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any, Literal, TypeAlias

import numpy as np

from gpuml.batches import ArrayBatches
from gpuml.devices import Device, blas_threads, get_device
from gpuml.distributed import Communicator, ranks, share_of
from gpuml.errors import DataError, printable, unknown_name
from gpuml.losses import softmax_cross_entropy
from gpuml.models import MLP
from gpuml.optimizers import GradientDescent
from gpuml.steps import graph_limit, make_step
from gpuml.timing import duration
from gpuml.training import largest_product
from gpuml.workloads import MOMENTUM, Workload

COMMAND = "mpiexec -n N gpuml bench --ranks"

SUM_SIZES = tuple(4**i for i in range(6, 15))  # bytes: 4 KiB to 256 MiB
SHARES = (1, 2, 4, 8)  # one rank is timed with the batch divided by each of them
N_SAMPLES = 7
MOST_CALLS = 1000  # in a sample

# Of a step's products two thirds belong to the backward pass: the gradients of a layer's weights
# and of its inputs, beside the outputs.
BACKWARD = 2 / 3
BUCKET_BYTES = 25 * 2**20  # as in PyTorch: Li and others, PVLDB 13(12), 2020

HOST_SIZE = 8  # GPUs that NVLink connects: NVIDIA DGX H100
# 400 Gbit/s a GPU, one adapter for each: NVIDIA DGX H100 System User Guide. The latency is an
# assumption: some microseconds for the network, and for the GPU to hand over.
NETWORK_BANDWIDTH, NETWORK_LATENCY = 400e9 / 8, 10e-6

StepEngine: TypeAlias = Literal["eager", "graph"]
Algorithm: TypeAlias = Literal["tree", "ring"]
# Messages that follow each other in an all-reduce, by the number of ranks.
HOPS: dict[str, Callable[[int], int]] = {
    "tree": lambda n: 2 * math.ceil(math.log2(n)),
    "ring": lambda n: 2 * (n - 1),
}


@dataclass(frozen=True)
class RankTime:
    """How long some ranks take for one thing, by the slowest of them.

    Attributes
    ----------
    n_ranks : int
    size : int
        Bytes that each rank gives to a sum, or rows in the batch of all ranks together.
    seconds, low, high : float
        Median and quartiles.
    """

    n_ranks: int
    size: int
    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Scaling:
    """What ranks measured.

    Attributes
    ----------
    title : str
        What was trained.
    device : str
        Of rank 0.
    date, command : str
    n_ranks, n_hosts : int
        How many there were, on how many machines.
    batch_size : int
        Rows that a rank has where the work grows with the ranks, and that all of them have where
        it does not.
    n_bytes : int
        Of the gradient.
    engine : str
        How steps ran.
    sums : list of RankTime
        Of an all-reduce; empty for one rank.
    steps : list of RankTime
        Of a step of training.
    """

    title: str
    device: str
    date: str
    command: str
    n_ranks: int
    n_hosts: int
    batch_size: int
    n_bytes: int
    engine: str
    sums: list[RankTime]
    steps: list[RankTime]

    @property
    def label(self) -> str:
        """For titles: where and when."""
        return f"{self.n_ranks} ranks, each on {self.device.partition(',')[0]}, {self.date}"

    def step(self, n_ranks: int, batch_size: int) -> RankTime:
        """Return the time of a step with so many rows on all ranks together.

        Raises
        ------
        ValueError
            If it was not measured.
        """
        for found in self.steps:
            if (found.n_ranks, found.size) == (n_ranks, batch_size):
                return found
        raise ValueError(f"a batch of {batch_size:,} rows on {n_ranks} ranks was not measured")

    def counts(self) -> list[int]:
        """Return the numbers of ranks that were measured."""
        return sorted({found.n_ranks for found in self.steps})

    def weak(self) -> dict[int, float]:
        """Return the weak-scaling efficiency by the number of ranks: T(1) / T(p).

        Each rank has `batch_size` rows, however many ranks there are.
        """
        one = self.step(1, self.batch_size).seconds
        return {p: one / self.step(p, p * self.batch_size).seconds for p in self.counts()}

    def strong(self) -> dict[int, float]:
        """Return the speed-up by the number of ranks, which share a batch of `batch_size` rows."""
        one = self.step(1, self.batch_size).seconds
        return {p: one / self.step(p, self.batch_size).seconds for p in self.counts()}

    def __str__(self) -> str:
        lines = [
            self.title,
            f"{self.n_ranks} ranks, rank 0 on {self.device}",
            f"gradient {self.n_bytes / 1e6:.3g} MB, engine {self.engine}",
        ]
        counts = sorted({found.n_ranks for found in self.sums})
        if counts:
            lines.append("".join(["all-reduce".ljust(14), *(f"{p:>7} ranks" for p in counts)]))
        by_size = {(found.size, found.n_ranks): found.seconds for found in self.sums}
        for size in sorted({found.size for found in self.sums}):
            times = [duration(by_size[size, p]).rjust(13) for p in counts if (size, p) in by_size]
            lines.append("".join([f"{size / 1024:,.0f} KiB".rjust(14), *times]))
        lines.append("ranks  rows each  a step")
        weak, strong = self.weak(), self.strong()
        for found in self.steps:
            p, rows = found.n_ranks, found.size / found.n_ranks
            line = f"{p:5}{rows:11,.0f}  {duration(found.seconds):9}"
            if p > 1:
                kept = found.size == p * self.batch_size
                line += f"efficiency {weak[p]:.1%}" if kept else f"speed-up {strong[p]:.2f}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the table as what JSON can hold; :meth:`from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Scaling:
        """Make a table again from what :meth:`to_json` returned.

        Raises
        ------
        DataError
            If it is something else.
        """
        try:
            times = {name: [RankTime(**time) for time in table[name]] for name in ("sums", "steps")}
            made = cls(**(dict(table) | times))
            str(made)  # which meets text where numbers should be
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise DataError(f"this is no table of scaling: {printable(repr(error))}") from None
        return made

    def plot_sums(self, model: CostModel | None = None, axis: Any = None) -> Any:
        """Draw the time of an all-reduce against its size, and what a model says."""
        from gpuml import plots

        lines: dict[str, tuple[list[int], list[float]]] = {}
        for p in sorted({found.n_ranks for found in self.sums}):
            found = [time for time in self.sums if time.n_ranks == p]
            lines[f"{p} ranks"] = [t.size for t in found], [t.seconds for t in found]
        labels = "bytes of each rank", "time [s]"
        figure = plots.times(lines, f"all-reduce, {self.label}", axis, labels=labels)
        axis = figure.axes[0] if axis is None else axis
        if model is not None:
            drawn = {line.get_label(): line for line in axis.lines}
            for name, (sizes, _) in lines.items():
                said = [model.all_reduce(int(name.split()[0]), size) for size in sizes]
                style = {"color": drawn[name].get_color(), "label": f"{name}, model"}
                axis.plot(sizes, said, linestyle="--", **style)
            axis.legend(fontsize="small")
        return figure


def measure_scaling(
    workload: Workload,
    communicator: Communicator | None = None,
    *,
    device: Device | str | None = None,
    sizes: Sequence[int] = SUM_SIZES,
    time_budget: float = 0.5,
    engine: StepEngine | None = None,
    command: str = COMMAND,
) -> Scaling:
    """Time all-reduces and steps of training by 1, 2, 4, … and all ranks. All ranks must call it.

    Weak scaling: each rank has the workload's batch. Strong scaling: the ranks share it. One rank
    is timed with smaller batches as well. A sample begins on all ranks together, and ends when the
    slowest is done and its device too.

    Parameters
    ----------
    workload : Workload
        One model at a time.
    communicator : Communicator, optional
        The ranks that ``mpiexec`` started unless given.
    device : Device or str, optional
        Of this rank; what :func:`gpuml.get_device` returns unless given.
    sizes : sequence of int
        Bytes that each rank gives to a sum.
    time_budget : float
        Seconds for each entry of the table.
    engine : {"eager", "graph"}, optional
        How steps run, whatever the number of ranks; as graphs, where they can be captured, unless
        given.
    command : str
        Kept in the table.

    Returns
    -------
    Scaling
        The same on all ranks.
    """
    if workload.n_models is not None:
        raise ValueError(f"ranks train one model, and {workload.name} has {workload.n_models:,}")
    world, where = communicator or ranks(), get_device(device)
    with where.use():
        timed = _Timed(world, where, time_budget)
        sums = [] if world.world_size == 1 else timed.sums(sizes)
        steps = timed.steps(workload, engine)
    hosts = world.gather(socket.gethostname())
    model = MLP(workload.sizes, device="cpu")
    made = Scaling(
        title=str(workload),
        device=str(where),
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        n_ranks=world.world_size,
        n_hosts=len(set(hosts)),
        batch_size=workload.batch_size,
        n_bytes=model.parameters.flat.nbytes,
        engine=timed.engine,
        sums=sums,
        steps=steps,
    )
    return Scaling.from_json(world.gather(made.to_json())[0])


class _Timed:
    """Times of the first ranks of a communicator, while the others wait."""

    def __init__(self, world: Communicator, device: Device, time_budget: float) -> None:
        self._world, self._device, self._time_budget = world, device, time_budget
        size = world.world_size
        self._counts = [2**i for i in range(size.bit_length()) if 2**i < size] + [size]
        self.engine = ""

    def sums(self, sizes: Sequence[int]) -> list[RankTime]:
        found = []
        for p in self._counts[1:]:
            part = self._first(p)
            if part is None:
                continue
            for size in sizes:
                array = self._device.xp.zeros(max(1, size // 4), np.float32)
                found.append(self._time(part, size, partial(part.all_reduce, array)))
        return found

    def steps(self, workload: Workload, engine: StepEngine | None) -> list[RankTime]:
        found, rows = [], workload.batch_size
        batches = {p: sorted({rows, p * rows}, reverse=True) for p in self._counts}
        batches[1] = sorted({rows // share for share in SHARES if rows >= share}, reverse=True)
        for p, sizes in batches.items():
            part = self._first(p)
            if part is None:
                continue
            for size in sizes:
                step, model = self._step(workload, engine, part, size)
                # As many threads for one rank as for each of many: only the ranks differ.
                with blas_threads(largest_product(model, size) / p, self._world.n_threads):
                    found.append(self._time(part, size, step))
        return found

    def _step(
        self, workload: Workload, engine: StepEngine | None, part: Communicator, batch_size: int
    ) -> Any:
        """Return what takes a step on a random batch, the same on all ranks, and the model."""
        generator = np.random.default_rng(1)
        X = generator.standard_normal((batch_size, workload.sizes[0]), np.float32)
        y = generator.integers(workload.sizes[-1], size=batch_size)
        x, y = self._device.asarray(X), self._device.asarray(y)
        model = MLP(workload.sizes, device=self._device)
        optimizer = GradientDescent(workload.learning_rate, momentum=MOMENTUM)
        precision: Any = None if workload.precision == "float32" else workload.precision
        data = ArrayBatches(x, y, batch_size)
        if engine is None:
            engine = "eager" if graph_limit(model, data) else "graph"
        task = model, softmax_cross_entropy, optimizer, data, engine, precision
        step: Any = make_step(*task, n_epochs=MOST_CALLS, communicator=part)
        self.engine = step.engine
        if part.world_size == 1:
            return partial(step, x, y), model
        rows = share_of(batch_size, part)
        return partial(step, x[rows], y[rows], batch_size), model

    def _first(self, n: int) -> Communicator | None:
        """Return the first n ranks, or None if this is not one of them."""
        part = self._world.first(n)
        if part is not None:
            part.n_threads = self._world.n_threads
        return part

    def _time(self, part: Communicator, size: int, work: Callable[[], Any]) -> RankTime:
        def sample(n_calls: int) -> float:
            self._device.synchronize()
            part.gather(None)
            begin = perf_counter()
            for _ in range(n_calls):
                work()
            self._device.synchronize()
            return float(max(part.gather(perf_counter() - begin))) / n_calls

        sample(2)  # libraries are loaded, memory is taken
        each = self._time_budget / N_SAMPLES
        n_calls = min(MOST_CALLS, max(1, round(each / sample(2))))
        samples = [sample(n_calls) for _ in range(N_SAMPLES)]
        low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
        return RankTime(part.world_size, size, middle, low, high)


@dataclass(frozen=True)
class CostModel:
    """What a step of data-parallel training costs, by the number of ranks.

    A rank computes on b rows for C(b) = fixed + b · per_row. A sum of n bytes over p ranks takes

        A(n, p) = hops(p) · latency + 2 (p - 1) / p · n / bandwidth

    the alpha-beta model (Hockney, 1994) of an all-reduce that sends no more than it must
    (Patarasuk, Yuan, 2009). Its messages follow each other: 2 ⌈log₂ p⌉ in a tree, 2 (p - 1) in a
    ring (Thakur and others, 2005). Beyond one host, the ranks of a host first share the sum out
    among them, each adds its n / host_size bytes to those of its peers on the other hosts, and
    what comes of it is collected in the host again.

    The gradient is summed in buckets of equal size, each as soon as the backward pass has made it,
    while that goes on to the next. With k buckets at most

        (1 - 1/k) · min(A, 2/3 · C)

    is hidden behind it: never the last bucket, and nothing longer than the backward pass. Of that
    the share `overlap` is. A step takes C + A less what is hidden.

    It is assumed that all ranks are equally fast, that sums and products do not slow each other
    down but for `overlap`, that no other work is on the network, and that data are at hand.

    Attributes
    ----------
    fixed, per_row : float
        Seconds of a step whatever its rows (launches, update), and for each row.
    n_bytes : float
        Of the gradient.
    latency : float
        Seconds for a message between ranks of a host.
    bandwidth : float
        Bytes per second that a rank sends to others of its host.
    overlap : float
        Of what can be hidden, the share that is: from 0 to 1.
    n_buckets : int
        Parts of the gradient; one if nothing overlaps.
    host_size : int
        Ranks on a host.
    network_latency, network_bandwidth : float
        Between hosts: seconds for a message, bytes per second for each rank.
    algorithm : {"tree", "ring"}
        What messages wait for each other.

    Raises
    ------
    ValueError
        If a number makes no sense.

    References
    ----------
    R. W. Hockney: The communication challenge for MPP: Intel Paragon and Meiko CS-2. Parallel
    Computing 20(3), 1994. R. Thakur, R. Rabenseifner, W. Gropp: Optimization of collective
    communication operations in MPICH. International Journal of High Performance Computing
    Applications 19(1), 2005. P. Patarasuk, X. Yuan: Bandwidth optimal all-reduce algorithms for
    clusters of workstations. Journal of Parallel and Distributed Computing 69(2), 2009. S. Li and
    others: PyTorch distributed: experiences on accelerating data parallel training. PVLDB 13(12),
    2020.

    Examples
    --------
    >>> model = CostModel(fixed=0, per_row=1e-6, n_bytes=1e8, latency=0, bandwidth=1e11)
    >>> model.step(1000, 1), model.step(2000, 2)
    (0.001, 0.002)
    """

    fixed: float
    per_row: float
    n_bytes: float
    latency: float
    bandwidth: float
    overlap: float = 0.0
    n_buckets: int = 1
    host_size: int = HOST_SIZE
    network_latency: float = NETWORK_LATENCY
    network_bandwidth: float = NETWORK_BANDWIDTH
    algorithm: Algorithm = "tree"

    def __post_init__(self) -> None:
        if self.algorithm not in HOPS:
            raise ValueError(unknown_name("algorithm", self.algorithm, HOPS))
        times = self.fixed, self.per_row, self.n_bytes, self.latency, self.network_latency
        if not all(0 <= time < math.inf for time in times):
            raise ValueError(f"times and bytes must not be negative or infinite, got {self}")
        if not (self.bandwidth > 0 and self.network_bandwidth > 0):
            raise ValueError(f"bandwidths must be positive, got {self}")
        if not 0 <= self.overlap <= 1 or self.n_buckets < 1 or self.host_size < 1:
            raise ValueError(
                f"overlap must be from 0 to 1, n_buckets and host_size at least 1, got {self}"
            )

    @classmethod
    def fit(cls, scaling: Scaling, **assumptions: Any) -> CostModel:
        """Return the model that is nearest to what ranks of one host measured.

        Latency and bandwidth by least squares over all sums, the time of a rank's own work over
        the steps of one rank, both of relative errors; then the overlap over the steps of
        several.

        Parameters
        ----------
        scaling : Scaling
        **assumptions
            What cannot be measured on one host: `host_size`, `network_latency`,
            `network_bandwidth`; and `algorithm`, `n_buckets`: of 25 MiB unless given.

        Returns
        -------
        CostModel

        Raises
        ------
        ValueError
            If too little was measured, or several hosts took part.
        """
        if scaling.n_hosts > 1:
            raise ValueError(f"the model is fitted to ranks of one host, got {scaling.n_hosts}")
        alone = [found for found in scaling.steps if found.n_ranks == 1]
        sizes = [{found.size for found in times} for times in (alone, scaling.sums)]
        if min(map(len, sizes)) < 2:
            raise ValueError(
                "the model needs steps of one rank with two batches, and sums of two sizes over "
                f"several ranks, got {len(sizes[0])} and {len(sizes[1])}: {COMMAND}"
            )
        fixed, per_row = _least_squares([[1, t.size] for t in alone], [t.seconds for t in alone])
        hops = HOPS[assumptions.get("algorithm", "tree")]
        terms = [[hops(t.n_ranks), _sent(t.n_ranks) * t.size] for t in scaling.sums]
        latency, per_byte = _least_squares(terms, [t.seconds for t in scaling.sums])
        usual = {
            "n_buckets": math.ceil(scaling.n_bytes / BUCKET_BYTES),
            "host_size": max(HOST_SIZE, scaling.n_ranks),
        }
        model = cls(
            fixed=fixed,
            per_row=per_row,
            n_bytes=scaling.n_bytes,
            latency=latency,
            bandwidth=1 / per_byte if per_byte else math.inf,
            **(usual | assumptions),
        )
        if "overlap" in assumptions:
            return model
        return model._with_overlap(scaling)

    def _with_overlap(self, scaling: Scaling) -> CostModel:
        """Return the model with the overlap that is nearest to the steps of several ranks."""
        best = replace(self, overlap=1.0)
        several = [found for found in scaling.steps if found.n_ranks > 1]
        hidden, seen = [], []
        for found in several:
            own = self.compute(math.ceil(found.size / found.n_ranks))
            whole = own + sum(self._sum(found.n_ranks, self.n_bytes, self.n_buckets).values())
            hidden.append(whole - best.step(found.size, found.n_ranks))
            seen.append(whole - found.seconds)
        share = np.dot(hidden, seen) / (np.dot(hidden, hidden) or 1.0)
        # No overlap at all is a case of its own: one bucket, and so fewer messages.
        models = [replace(self, overlap=x) for x in (0.0, min(1.0, max(0.0, float(share))))]

        def loss(model: CostModel) -> float:
            return sum((model.step(t.size, t.n_ranks) - t.seconds) ** 2 for t in several)

        return min(models, key=loss)

    def compute(self, n_rows: float) -> float:
        """Return the seconds of a rank's own work on so many rows."""
        return self.fixed + n_rows * self.per_row

    def all_reduce(self, n_ranks: int, n_bytes: float | None = None) -> float:
        """Return the seconds of one sum: of the gradient, unless bytes are given."""
        n_bytes = self.n_bytes if n_bytes is None else n_bytes
        return sum(self._sum(n_ranks, n_bytes, 1).values())

    def step(self, batch_size: int, n_ranks: int) -> float:
        """Return the seconds of a step, with so many rows on all ranks together."""
        return sum(self.parts(batch_size, n_ranks).values())

    def parts(self, batch_size: int, n_ranks: int) -> dict[str, float]:
        """Return what a step's time is spent on; of the sum only what is not hidden.

        Parameters
        ----------
        batch_size : int
            Rows of all ranks together; the rank with most of them decides.
        n_ranks : int

        Returns
        -------
        dict of str to float
            Seconds: ``"rows"``, ``"fixed"``, ``"latency"``, ``"inside a host"``,
            ``"between hosts"``.
        """
        if n_ranks < 1 or batch_size < 1:
            raise ValueError(f"expected a rank and a row at least, got {n_ranks} and {batch_size}")
        rows = math.ceil(batch_size / n_ranks)
        buckets = self.n_buckets if self.overlap else 1
        parts = self._sum(n_ranks, self.n_bytes, buckets)
        whole = sum(parts.values())
        reach = min(whole, BACKWARD * self.compute(rows))
        hidden = self.overlap * (1 - 1 / buckets) * reach
        seen = 1 - hidden / whole if whole else 0.0
        own = {"rows": rows * self.per_row, "fixed": self.fixed}
        return own | {name: seen * part for name, part in parts.items()}

    def _sum(self, n_ranks: int, n_bytes: float, n_buckets: int) -> dict[str, float]:
        """Return the seconds of a sum by what they are spent on."""
        inside, hosts = min(n_ranks, self.host_size), math.ceil(n_ranks / self.host_size)
        hops = HOPS[self.algorithm]
        messages = hops(inside) * self.latency + hops(hosts) * self.network_latency
        return {
            "latency": n_buckets * messages,
            "inside a host": _sent(inside) * n_bytes / self.bandwidth,
            "between hosts": _sent(hosts) * n_bytes / inside / self.network_bandwidth,
        }

    def weak(self, n_rows: int, n_ranks: int) -> float:
        """Return the weak-scaling efficiency with so many rows on each rank."""
        return self.step(n_rows, 1) / self.step(n_rows * n_ranks, n_ranks)

    def strong(self, batch_size: int, n_ranks: int) -> float:
        """Return the speed-up of ranks that share a batch."""
        return self.step(batch_size, 1) / self.step(batch_size, n_ranks)

    def check(self, scaling: Scaling) -> str:
        """Return a table that holds the model's steps against those that were measured."""
        lines = ["ranks  rows each     measured    predicted    error"]
        for found, error in zip(scaling.steps, self.errors(scaling), strict=True):
            rows, said = found.size / found.n_ranks, self.step(found.size, found.n_ranks)
            times = f"{duration(found.seconds):>13}{duration(said):>13}"
            lines.append(f"{found.n_ranks:5}{rows:11,.0f}{times}{error:+9.1%}")
        return "\n".join(lines)

    def errors(self, scaling: Scaling) -> list[float]:
        """Return by what share each step is predicted too long, or too short."""
        return [self.step(t.size, t.n_ranks) / t.seconds - 1 for t in scaling.steps]

    def time_line(self, batch_size: int, n_ranks: int, *, overlap: bool) -> dict[str, Any]:
        """Return when a rank computes and when it sums, for :func:`gpuml.plots.time_line`.

        Parameters
        ----------
        batch_size, n_ranks : int
            As for :meth:`step`.
        overlap : bool
            Whether each bucket is summed as soon as it is there, as far as can be, or all of the
            gradient at the end.

        Returns
        -------
        dict of str to numpy.ndarray of shape (n, 2)
            Begin and end in seconds of ``"forward"``, ``"backward"`` and ``"all-reduce"``.
        """
        k = self.n_buckets if overlap else 1
        own = self.compute(math.ceil(batch_size / n_ranks))
        each = sum(self._sum(n_ranks, self.n_bytes, k).values()) / k
        moments = np.linspace((1 - BACKWARD) * own, own, k + 1)
        end, sums = 0.0, []
        for ready in moments[1:]:
            begin = max(float(ready), end)
            end = begin + each
            sums.append((begin, end))
        return {
            "forward": np.array([(0.0, moments[0])]),
            "backward": np.stack([moments[:-1], moments[1:]], axis=1),
            "all-reduce": np.array(sums),
        }


def _sent(n_ranks: int) -> float:
    """Return how much of its array a rank sends in an all-reduce, at least: 2 (p - 1) / p."""
    return 2 * (n_ranks - 1) / n_ranks


def _least_squares(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Return two factors, neither negative, whose sums of terms are nearest to the seconds.

    Relative errors count, since times from microseconds to seconds are fitted at once.
    """
    shares = np.array(terms, float) / np.array(seconds)[:, None]
    ones = np.ones(len(shares))
    scale = np.linalg.norm(shares, axis=0)
    factors = np.linalg.lstsq(shares / scale, ones, rcond=None)[0] / scale
    if factors.min() < 0:  # then the other term alone is the best that is not negative
        alone = (shares.T @ ones) / scale**2
        factors = np.where(factors < 0, 0.0, alone)
    return [float(factor) for factor in factors]


def plot_scaling(
    scaling: Scaling, models: Mapping[str, CostModel], *, largest: int = 1024, title: str = ""
) -> Any:
    """Draw weak and strong scaling side by side: measured, and what models say of more ranks.

    Parameters
    ----------
    scaling : Scaling
    models : mapping of str to CostModel
        A line for each, by its name.
    largest : int
        The lines go up to so many ranks.
    title : str
        What was trained on what; the scaling's own unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib import pyplot

    from gpuml import plots

    counts, rows = [2**i for i in range(largest.bit_length())], scaling.batch_size
    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    weak = {name: (counts, [m.weak(rows, p) for p in counts]) for name, m in models.items()}
    strong = {name: (counts, [m.strong(rows, p) for p in counts]) for name, m in models.items()}
    panels = (
        (weak, scaling.weak(), "weak: efficiency", f"{rows:,} rows a rank"),
        (strong, scaling.strong(), "strong: speed-up", f"{rows:,} rows shared by all"),
    )
    for axis, (lines, found, label, what) in zip(axes, panels, strict=True):
        points = list(found), list(found.values())
        plots.scaling(lines, {"measured": points}, label, what, axis)
    figure.suptitle(title or f"{scaling.title}\n{scaling.label}", fontsize="medium")
    return figure
