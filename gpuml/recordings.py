"""Measurements from named hardware, kept with the package, to be shown beside the reader's own."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata, resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from gpuml.blocked import BlockReport, blocked_matmul
from gpuml.devices import CPU, Device, get_device, to_host
from gpuml.errors import DataError, printable, unknown_name
from gpuml.kernels import load_kernel
from gpuml.model_files import replacing
from gpuml.plain_files import parse_json
from gpuml.timing import (
    Ceilings,
    Comparison,
    Measurement,
    benchmark,
    compare_devices,
    device_ceilings,
    gemm_type,
    returned_and_finished,
    transfer_bandwidths,
)

COMMAND = "gpuml bench --save gpuml/recorded/NAME.json"

LARGEST_FILE = 16 * 2**20  # bytes, of a recording

PRODUCT_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TRANSFER_SIZES = tuple(4**i for i in range(5, 15))  # 1 KiB to 256 MiB
LADDER_SIZE = 2048
QUEUED_SIZE = 4096
BLOCKED_SHAPES = {"square": (16384, 16384, 16384), "tall": (131072, 8192, 64)}  # m, k, n
BLOCKED_LIMIT = "1 GiB"


@dataclass(frozen=True)
class Recording:
    """What one machine measured on one day.

    Attributes
    ----------
    device : str
    date : str
        Year, month, day.
    command : str
        What made it.
    versions : dict of str to str
    ceilings, host : Ceilings
        Of the device, and of the CPU of the same machine.
    products : Comparison
        Products of two n × n matrices, on the CPU and the GPU of the machine.
    transfers : dict
        ``sizes`` in bytes, and bandwidths in bytes per second; empty without a GPU.
    points : dict of str to Measurement
        Work with bytes and operations, for the roofline.
    ladder : dict of str to Measurement
        The product of two 2048 × 2048 matrices by ever better kernels; empty without a GPU.
    queued : dict of str to float
        Seconds until the call of a 4096 × 4096 product returned, and until the product was
        finished.
    cases : dict of str to dict of str to Measurement
        The three cases of :func:`measure_cases`, on each device.
    blocked : dict of str to BlockReport
        Products of host matrices by :func:`gpuml.blocked_matmul`: ``square`` and ``tall``; empty
        without a GPU.
    peers : dict
        What ``gpuml bench --peers`` found: ``workloads``, a table for each name, and
        ``processes``; :meth:`gpuml.peers.PeerTable.from_json` reads a table. Empty if it was not
        asked for.
    scaling : dict
        What ``gpuml bench --ranks`` found, a table for each workload;
        :meth:`gpuml.scaling.Scaling.from_json` reads it. Empty if it was not asked for.
    methods : dict of str to dict
        What ``tests/benchmarks/robust_private.py --save`` found, a table for ``gpu`` and one for
        ``cpu``: what was ``trained``, on which ``device``, the ``date``, and ``seconds``, those of
        a step for each way of training. Empty if it was not asked for.
    """

    device: str
    date: str
    command: str
    versions: dict[str, str]
    ceilings: Ceilings
    host: Ceilings
    products: Comparison
    transfers: dict[str, list[float]]
    points: dict[str, Measurement]
    ladder: dict[str, Measurement]
    queued: dict[str, float]
    cases: dict[str, dict[str, Measurement]]
    blocked: dict[str, BlockReport] = field(default_factory=dict)
    peers: dict[str, Any] = field(default_factory=dict)
    scaling: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For titles: where and when."""
        return f"recorded on {self.device.partition(',')[0]}, {self.date}"

    def figures(self) -> dict[str, Any]:
        """Draw everything that was measured.

        Returns
        -------
        dict of str to matplotlib.figure.Figure
            ``products`` and ``roofline``; on a GPU also ``crossover``, ``transfers``, ``ladder``,
            ``blocked``.
        """
        names = ["products", "roofline"]
        if self.ladder:
            names += ["crossover", "transfers", "ladder", "blocked"]
        return {name: getattr(self, f"plot_{name}")() for name in names}

    def plot_products(self) -> Any:
        """Draw the time of matrix products against their size."""
        return self.products.plot(f"{self.products.title}\n{self.label}")

    def plot_crossover(self) -> Any:
        """Draw the sizes and types at which the GPU wins."""
        return self.products.plot_crossover(f"{self.products.title}\n{self.label}")

    def plot_roofline(self) -> Any:
        """Draw the roofline with three kinds of work on it."""
        return self.ceilings.plot(self.points, self.label)

    def plot_transfers(self) -> Any:
        """Draw the bandwidth to the device and back."""
        from gpuml import plots

        bandwidths = {name: v for name, v in self.transfers.items() if name != "sizes"}
        return plots.transfers(self.transfers["sizes"], bandwidths, self.label)

    def plot_ladder(self) -> Any:
        """Draw the rates of ever better kernels for one product."""
        from gpuml import plots

        rates = {name: m.rate for name, m in self.ladder.items() if m.rate is not None}
        n = LADDER_SIZE
        return plots.ladder(rates, f"product of two {n} × {n} matrices\n{self.label}")

    def plot_blocked(self, name: str = "square") -> Any:
        """Draw the time line of a product within a small part of the memory."""
        report = self.blocked[name]
        plan = report.plan
        sizes = f"({plan.m:,} × {plan.k:,}) @ ({plan.k:,} × {plan.n:,})"
        return report.plot(f"{sizes} within {BLOCKED_LIMIT}\n{self.label}")

    def __str__(self) -> str:
        lines = [f"{name}: {m}" for name, m in (self.points | self.ladder).items()]
        return "\n\n".join([str(self.ceilings), str(self.products), "\n".join(lines)])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the recording as JSON."""
        with replacing(path) as temporary:
            blocked = {name: report.to_json() for name, report in self.blocked.items()}
            table = asdict(self) | {"blocked": blocked}
            temporary.write_text(_text(table) + "\n", encoding="utf-8")


def record(device: Device | str | None = None, *, command: str = COMMAND) -> Recording:
    """Measure a machine: ceilings, products on CPU and GPU, transfers, the ladder of kernels.

    Parameters
    ----------
    device : Device or str, optional
        What :func:`gpuml.get_device` returns unless given.
    command : str
        Kept in the recording.

    Returns
    -------
    Recording
        Made in less than a minute.
    """
    where = get_device(device)
    products = compare_devices(
        operator.matmul,
        lambda n, dtype: list(np.random.default_rng(0).random((2, n, n)).astype(dtype)),
        sizes=PRODUCT_SIZES if where.kind == "gpu" else PRODUCT_SIZES[:-2],
        dtypes=("float32", "float64"),
        devices=[CPU] if where == CPU else [CPU, where],
        name="product of two n × n matrices",
        n_bytes=lambda n, dtype: 3 * n * n * np.dtype(dtype).itemsize,
        n_operations=lambda n: 2 * n**3,
    )
    transfers: dict[str, list[float]] = {}
    ladder: dict[str, Measurement] = {}
    if where.kind == "gpu":
        transfers = {"sizes": list(TRANSFER_SIZES)}
        transfers |= transfer_bandwidths(where, TRANSFER_SIZES, time_budget=0.05)
        ladder = measure_ladder(where)
    return Recording(
        device=str(where),
        date=datetime.now(UTC).date().isoformat(),
        command=command,
        versions={name: metadata.version(name) for name in _recorded_packages()},
        ceilings=device_ceilings(where),
        host=device_ceilings(CPU, time_budget=4),
        products=products,
        transfers=transfers,
        points=roofline_points(where),
        ladder=ladder,
        queued=measure_queued(where),
        cases=measure_cases([CPU] if where == CPU else [CPU, where]),
        blocked=measure_blocked(where) if where.kind == "gpu" else {},
    )


def recorded(name: str | PathLike[str] = "nvidia_h200") -> Recording:
    """Return measurements from hardware that the reader may not have.

    Parameters
    ----------
    name : str or path
        One of those that come with the package, such as ``"nvidia_h200"``, or a file that
        ``gpuml bench --save FILE`` wrote.

    Returns
    -------
    Recording

    Raises
    ------
    ValueError
        If there is no recording of that name.
    DataError
        If the file is missing or malformed; the message gives the command that makes one.
    """
    file = Path(name)
    if file.suffix != ".json":
        folder = Path(str(resources.files("gpuml"))) / "recorded"
        known = sorted(path.stem for path in folder.glob("*.json"))
        if name not in known:
            raise ValueError(unknown_name("recording", str(name), known))
        file = folder / f"{name}.json"
    cure = f"this command makes one: gpuml bench --save {file.name}"
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it is longer than {LARGEST_FILE:,} bytes")
        return _from_json(parse_json(file.read_bytes()))
    except FileNotFoundError:
        raise DataError(f"there is no recording {file}; {cure}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        told = printable(repr(error), 200)
        raise DataError(f"{file.name} is not a recording ({told}); {cure}") from None


def _text(table: dict[str, Any]) -> str:
    """Return a table as JSON, pairs of numbers on one line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\[\s+([-\d.e]+),\s+([-\d.e]+)\s+\]", r"[\1, \2]", text)


def _from_json(table: dict[str, Any]) -> Recording:
    made = {
        "ceilings": Ceilings(**table["ceilings"]),
        "products": Comparison.from_json(table["products"]),
        "points": {name: Measurement(**m) for name, m in table["points"].items()},
        "ladder": {name: Measurement(**m) for name, m in table["ladder"].items()},
        "host": Ceilings(**table["host"]),
        "cases": {
            name: {device: Measurement(**m) for device, m in case.items()}
            for name, case in table["cases"].items()
        },
        "blocked": {name: BlockReport.from_json(r) for name, r in table.get("blocked", {}).items()},
        "peers": dict(table.get("peers", {})),
        "scaling": dict(table.get("scaling", {})),
        "methods": dict(table.get("methods", {})),
    }
    recording = Recording(**(table | made))
    _check_fields(recording)
    return recording


def _check_fields(recording: Recording) -> None:
    """Refuse text where numbers should be, and the other way round: a figure would stumble."""
    r = recording
    texts = [r.device, r.date, r.command, *r.versions.values()]
    numbers: list[Any] = [*r.queued.values()]
    for ceilings in r.ceilings, r.host:
        texts.append(ceilings.device)
        numbers += ceilings.values.values()
    for line in r.transfers.values():
        numbers += line
    rows = r.products.rows
    texts += [r.products.name, *r.products.devices, *r.products.devices.values()]
    texts += [text for row in rows for text in (row.device, row.dtype, row.note)]
    numbers += [row.size for row in rows]
    measured = [*r.points.values(), *r.ladder.values()]
    measured += [m for case in r.cases.values() for m in case.values()]
    measured += [row.measurement for row in rows if row.measurement is not None]
    for m in measured:
        texts.append(m.device)
        numbers += [m.low, m.high, m.first, m.n_repeats]
        numbers += [n for n in (m.n_bytes, m.n_operations) if n is not None]
        if not _is_number(m.seconds) or m.seconds <= 0:
            raise ValueError(f"a time of {m.seconds!r} seconds")
    for report in r.blocked.values():
        texts.append(report.device)
        numbers += [report.seconds, *(v for k, v in asdict(report.plan).items() if k != "keeps")]
        for spans in report.spans.values():
            pairs = spans.size == 0 or (spans.ndim == 2 and spans.shape[1] == 2)
            if not pairs or spans.dtype.kind not in "if" or not np.isfinite(spans).all():
                raise ValueError("a time line that is none")
    for table in r.methods.values():
        texts += [table["trained"], table["device"], table["date"], *table["seconds"]]
        numbers += table["seconds"].values()
    if not all(isinstance(tables, dict) for tables in (*r.peers.values(), *r.scaling.values())):
        raise TypeError("something else where there should be tables")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("something else where there should be text")
    if not all(map(_is_number, numbers)):
        raise TypeError("something else where there should be numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def roofline_points(device: Device, *, time_budget: float = 0.3) -> dict[str, Measurement]:
    """Measure three kinds of work for the roofline: each has its own operations per byte.

    Parameters
    ----------
    device : Device
    time_budget : float
        Seconds for each.

    Returns
    -------
    dict of str to Measurement
        With bytes (each input read once, each output written once) and operations.
    """
    xp, n = device.xp, 8192
    k = n // 4 if device.kind == "cpu" else n  # so that a product on the CPU takes no minute
    with device.use():
        # as large as to fit in no cache
        square = device.asarray(np.random.default_rng(0).random((n, n), np.float32))
        other, result = xp.ones_like(square), xp.zeros_like(square)
        small, vector, cell = square[:k, :k].copy(), square[0].copy(), square.nbytes

        def measured(function: Any, *arguments: Any, n_bytes: float, n_operations: float) -> Any:
            return benchmark(
                function,
                *arguments,
                device=device,
                time_budget=time_budget,
                n_bytes=n_bytes,
                n_operations=n_operations,
            )

        return {
            "sum of two matrices": measured(
                lambda a, b, c: xp.add(a, b, out=c),
                square,
                other,
                result,
                n_bytes=3 * cell,
                n_operations=n * n,
            ),
            "matrix × vector": measured(
                xp.matmul, square, vector, n_bytes=cell, n_operations=2 * n * n
            ),
            "matrix × matrix": measured(
                xp.matmul, small, small, n_bytes=3 * small.nbytes, n_operations=2 * k**3
            ),
        }


def measure_queued(device: Device, *, size: int = QUEUED_SIZE) -> dict[str, float]:
    """Time a product twice with a stopwatch: until the call returns, and until it is finished.

    Parameters
    ----------
    device : Device
    size : int
        Rows and columns of the matrices.

    Returns
    -------
    dict of str to float
        ``returned`` and ``finished``, medians in seconds. On the CPU they are the same.
    """
    with device.use():
        a = device.asarray(np.random.default_rng(0).random((size, size), np.float32))

        def product() -> None:
            device.xp.matmul(a, a)

        samples = [returned_and_finished(product, device, n_calls=1) for _ in range(4)]
    returned, finished = np.median(samples, axis=0)
    return {"returned": float(returned), "finished": float(finished)}


def measure_cases(
    devices: Sequence[Device], *, time_budget: float = 0.3
) -> dict[str, dict[str, Measurement]]:
    """Time three kinds of work that tell apart what decides between the CPU and a GPU.

    Parameters
    ----------
    devices : sequence of Device
    time_budget : float
        Seconds for each case and device.

    Returns
    -------
    dict of str to dict of str to Measurement
        For each case ``"cpu"`` and ``"gpu"``: the sum of a million numbers in host memory, a
        hundred small products one after the other, and an exponential of a hundred million
        numbers in device memory.
    """
    generator = np.random.default_rng(0)
    numbers = generator.random(10**6, np.float32)
    matrix = generator.random((32, 32), np.float32)

    def measured(device: Device) -> dict[str, Measurement]:
        xp = device.xp
        here = device.asarray(matrix)
        many, powers = (xp.ones(10**8, np.float32) for _ in range(2))

        def products() -> None:
            for _ in range(100):
                xp.matmul(here, here)

        work: dict[str, Callable[[], Any]] = {
            "sum of 10^6 numbers on the host": lambda: device.asarray(numbers).sum(),
            "100 products of 32 x 32": products,
            "exp of 10^8 numbers on the device": lambda: xp.exp(many, out=powers),
        }
        return {
            name: benchmark(function, device=device, time_budget=time_budget)
            for name, function in work.items()
        }

    cases: dict[str, dict[str, Measurement]] = {}
    for device in devices:
        with device.use():
            for name, measurement in measured(device).items():
                cases.setdefault(name, {})[device.kind] = measurement
    return cases


def measure_blocked(device: Device) -> dict[str, BlockReport]:
    """Multiply host matrices within a small part of a GPU's memory: square ones, and a tall one.

    Parameters
    ----------
    device : Device
        A GPU.

    Returns
    -------
    dict of str to BlockReport
        ``square``, where arithmetic takes longest, and ``tall``, where moving the matrix does.
    """
    generator = np.random.default_rng(0)
    reports = {}
    for name, (m, k, n) in BLOCKED_SHAPES.items():
        a = np.tile(generator.random((1024, k), np.float32), (m // 1024, 1))
        b, out = generator.random((k, n), np.float32), np.zeros((m, n), np.float32)
        for _ in range(2):  # the first call allocates its buffers
            _, reports[name] = blocked_matmul(
                a, b, out=out, memory_limit=BLOCKED_LIMIT, device=device, return_report=True
            )
    return reports


def measure_ladder(device: Device, *, size: int = LADDER_SIZE) -> dict[str, Measurement]:
    """Time the product of two matrices by ever better kernels, from naive to tensor cores.

    Parameters
    ----------
    device : Device
        An NVIDIA GPU.
    size : int
        Rows and columns of both matrices.

    Returns
    -------
    dict of str to Measurement
        From the slowest to the fastest. Each result was checked before its time counted.

    Raises
    ------
    ArithmeticError
        If a kernel computes something else.
    """
    import cupy

    n = np.int32(size)
    with device.use():
        generator = cupy.random.default_rng(0)
        a, b = (generator.random((size, size), dtype=np.float32) for _ in range(2))
        exact = a.astype(np.float64) @ b.astype(np.float64)
        out = cupy.empty_like(a)

        def by_kernel(name: str, block: tuple[int, int], tile: int) -> Any:
            kernel, blocks = load_kernel(name), -(-size // tile)
            return lambda: kernel((blocks, blocks), block, (a, b, out, n, n, n)) or out

        def by_cublas(gemm: str) -> Any:
            with gemm_type(gemm) as dtype:
                x, y = a.astype(dtype), b.astype(dtype)
            return lambda: x @ y

        rungs = {
            "naive, float32": ("", by_kernel("matmul_naive", (16, 16), 16)),
            "tiled, float32": ("", by_kernel("matmul_tiled", (16, 16), 128)),
            "cuBLAS, float32": ("gemm_float32", by_cublas("gemm_float32")),
            "tensor cores, tf32": ("gemm_tf32", by_cublas("gemm_tf32")),
            "tensor cores, float16": ("gemm_float16", by_cublas("gemm_float16")),
        }
        ladder = {}
        for name, (gemm, product) in rungs.items():
            with gemm_type(gemm or "gemm_float32"):
                result = to_host(product()).astype(np.float64)
                error = np.linalg.norm(result - to_host(exact)) / np.linalg.norm(to_host(exact))
                if not error < 2e-3:
                    raise ArithmeticError(f"{name}: relative error {error:.1e}")
                ladder[name] = benchmark(
                    product,
                    device=device,
                    time_budget=0.3,
                    n_bytes=3 * result.size * (2 if gemm == "gemm_float16" else 4),
                    n_operations=2 * size**3,
                )
        return ladder


def _recorded_packages() -> list[str]:
    installed = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    cupys = sorted(name for name in installed if name.startswith("cupy"))
    return ["numpy", *cupys]
