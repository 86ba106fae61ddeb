"""Scaling over ranks: what is measured, and the model of its cost on times that are known."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gpuml
from gpuml import cli, distributed, scaling
from gpuml.scaling import CostModel, RankTime, Scaling, measure_scaling, plot_scaling
from gpuml.workloads import WORKLOADS, Workload

MPIEXEC = Path(sys.executable).parent / "mpiexec"
TRUE = CostModel(
    fixed=3e-4,
    per_row=5e-7,
    n_bytes=1e8,
    latency=4e-6,
    bandwidth=3e11,
    overlap=0.6,
    n_buckets=4,
)
SMALL = Workload("small", (5, 6, 3), 16)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def times(seconds, n_ranks, size):
    return RankTime(n_ranks, size, seconds, seconds, seconds)


def made(model, counts=(1, 2, 4), rows=4096, noise=None):
    """What ranks would measure if the model were true."""

    def off():
        return 1.0 if noise is None else float(np.exp(0.02 * noise.standard_normal()))

    sums = [
        times(model.all_reduce(p, n) * off(), p, n)
        for p in counts
        if p > 1
        for n in scaling.SUM_SIZES
    ]
    batches = {p: sorted({rows, p * rows}) for p in counts} | {1: [rows // 8, rows // 2, rows]}
    steps = [times(model.step(n, p) * off(), p, n) for p in counts for n in batches[p]]
    facts = {"title": "t", "device": "NVIDIA X, 80 GiB", "date": "2026-01-01", "command": "c"}
    facts |= {"n_ranks": max(counts), "n_hosts": 1, "batch_size": rows, "engine": "eager"}
    return Scaling(**facts, n_bytes=round(model.n_bytes), sums=sums, steps=steps)


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["tree", "ring"])
@pytest.mark.parametrize("overlap", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 4), (1, 2, 4, 8)])
def test_the_fit_finds_what_made_the_times(algorithm, overlap, counts):
    true = replace(TRUE, algorithm=algorithm, overlap=overlap, n_buckets=4 if overlap else 1)
    found = CostModel.fit(made(true, counts), algorithm=algorithm, n_buckets=4)
    for name in ("fixed", "per_row", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6), name
    assert found.overlap == pytest.approx(overlap, abs=1e-6)
    assert max(map(abs, found.errors(made(true, counts)))) < 1e-6
    assert found.n_bytes == 1e8


def test_the_fit_bears_noise(rng):
    scaling = made(TRUE, noise=rng)
    found = CostModel.fit(scaling, n_buckets=4)
    for name in ("per_row", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name
    assert max(map(abs, found.errors(scaling))) < 0.1


@pytest.mark.parametrize("zero", ["latency", "fixed", "per_row"])
def test_nothing_that_is_fitted_is_negative(zero):
    true = replace(TRUE, overlap=0.0, **{zero: 0.0})
    table = made(true)
    # As if small things took less time than none.
    few = [replace(t, seconds=t.seconds * 0.5) if t.size < 2**17 else t for t in table.sums]
    steps = [replace(t, seconds=t.seconds * (0.2 if t.size < 1000 else 1)) for t in table.steps]
    found = CostModel.fit(replace(table, sums=few, steps=steps))
    assert min(found.fixed, found.per_row, found.latency, found.overlap) >= 0
    assert found.bandwidth > 0


def test_least_squares_is_that_of_relative_errors_without_negative_factors(rng):
    for _ in range(50):
        terms = rng.random((6, 2)) * [1, 1e6]
        seconds = terms @ (rng.normal(size=2) * [1, 1e-6]) + 3
        if seconds.min() <= 0:
            continue

        def loss(factors, terms=terms, seconds=seconds):
            return np.square((terms @ factors) / seconds - 1).sum()

        found = np.array(scaling._least_squares(terms, seconds))
        assert found.min() >= 0
        for step in ([1e-3, 0], [-1e-3, 0], [0, 1e-9], [0, -1e-9]):
            other = np.maximum(0, found + step)
            assert loss(found) <= loss(other) + 1e-12


def test_one_rank_sums_nothing():
    assert TRUE.all_reduce(1) == 0
    parts = TRUE.parts(4096, 1)
    assert parts["latency"] == parts["inside a host"] == parts["between hosts"] == 0
    assert TRUE.step(4096, 1) == pytest.approx(3e-4 + 4096 * 5e-7) == TRUE.compute(4096)
    assert TRUE.weak(4096, 1) == TRUE.strong(4096, 1) == 1


def test_a_sum_takes_what_the_formula_says():
    n = 1e8
    two = 2 * 4e-6 + 2 * 1 / 2 * n / 3e11
    assert TRUE.all_reduce(2) == pytest.approx(two)
    eight = 6 * 4e-6 + 2 * 7 / 8 * n / 3e11
    assert TRUE.all_reduce(8) == pytest.approx(eight)
    # 16 hosts: each GPU sums an eighth with its peers
    far = 8 * 10e-6 + 2 * 15 / 16 * (n / 8) / 50e9
    assert TRUE.all_reduce(128) == pytest.approx(eight + far)
    ring = replace(TRUE, algorithm="ring")
    assert ring.all_reduce(4, 0) == pytest.approx(6 * 4e-6)
    assert ring.all_reduce(1024, 0) == pytest.approx(14 * 4e-6 + 2 * 127 * 10e-6)
    assert TRUE.all_reduce(1024, 0) == pytest.approx(6 * 4e-6 + 14 * 10e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("algorithm", ["tree", "ring"])
def test_more_ranks_never_make_a_step_cheaper_for_each(overlap, algorithm):
    model = replace(TRUE, overlap=overlap, algorithm=algorithm)
    counts = [2**i for i in range(11)]
    weak = [model.weak(4096, p) for p in counts]
    assert all(a >= b for a, b in pairwise(weak))
    assert 0 < weak[-1] < weak[0] == 1
    strong = [model.strong(4096, p) for p in counts]
    assert all(value <= p for value, p in zip(strong, counts, strict=True))
    assert model.strong(4096, 8192) <= model.step(4096, 1) / model.compute(1), "a row for each"


def test_what_is_hidden_has_its_bounds():
    for rows in (64, 4096, 100_000):
        alone, own = TRUE.all_reduce(8), TRUE.compute(rows)
        never = replace(TRUE, overlap=0.0).step(8 * rows, 8)
        best = replace(TRUE, overlap=1.0, latency=0.0).step(8 * rows, 8)
        assert never == pytest.approx(own + alone)
        bare = replace(TRUE, latency=0.0).all_reduce(8)
        assert best >= own + bare / 4 - 1e-12, "the last bucket is never hidden"
        assert best >= own / 3 + bare - 1e-12, "nothing starts before the backward pass"


@pytest.mark.parametrize("rows", [64, 1000, 4096, 100_000])
@pytest.mark.parametrize("n_buckets", [1, 2, 4, 16])
@pytest.mark.parametrize("n_ranks", [1, 2, 64])
def test_the_time_line_ends_when_the_step_does(rows, n_buckets, n_ranks):
    model = replace(TRUE, n_buckets=n_buckets)
    for overlap in (False, True):
        spans = model.time_line(rows * n_ranks, n_ranks, overlap=overlap)
        step = replace(model, overlap=float(overlap)).step(rows * n_ranks, n_ranks)
        assert spans["all-reduce"][-1, 1] == pytest.approx(step)
        assert len(spans["all-reduce"]) == (n_buckets if overlap else 1)
        begins, ends = spans["all-reduce"].T
        assert (begins >= spans["backward"][:, 1] - 1e-12).all()
        assert (begins[1:] >= ends[:-1] - 1e-12).all()


def test_a_step_is_the_sum_of_its_parts():
    for p in (1, 2, 8, 12, 1024):
        assert TRUE.step(4096 * p, p) == pytest.approx(sum(TRUE.parts(4096 * p, p).values()))
    assert TRUE.parts(5, 4)["rows"] == 2 * TRUE.per_row, "the rank with most rows decides"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"algorithm": "treee"}, "unknown algorithm 'treee': did you mean 'tree'"),
        ({"latency": -1.0}, "must not be negative"),
        ({"fixed": math.nan}, "must not be negative"),
        ({"per_row": math.inf}, "must not be negative or infinite"),
        ({"bandwidth": 0.0}, "bandwidths must be positive"),
        ({"network_bandwidth": math.nan}, "bandwidths must be positive"),
        ({"overlap": 1.1}, "overlap must be from 0 to 1"),
        ({"n_buckets": 0}, "n_buckets and host_size at least 1"),
        ({"host_size": 0}, "n_buckets and host_size at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        replace(TRUE, **change)


def test_too_little_to_fit_is_said():
    table = made(TRUE)
    with pytest.raises(ValueError, match="sums of two sizes over several ranks, got 3 and 0"):
        CostModel.fit(replace(table, sums=[]))
    with pytest.raises(ValueError, match=r"got 1 and 9: mpiexec -n N gpuml bench --ranks"):
        CostModel.fit(replace(table, steps=table.steps[:1]))
    with pytest.raises(ValueError, match="ranks of one host, got 2"):
        CostModel.fit(replace(table, n_hosts=2))
    for batch, n in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match="a rank and a row at least"):
            TRUE.step(batch, n)
    with pytest.raises(ValueError, match="99 rows on 2 ranks was not measured"):
        table.step(2, 99)


def test_assumptions_are_kept():
    found = CostModel.fit(made(TRUE), network_bandwidth=1e9, overlap=1.0, host_size=4)
    assert (found.network_bandwidth, found.overlap, found.host_size) == (1e9, 1.0, 4)
    assert found.all_reduce(8) > 40 * TRUE.all_reduce(8)
    assert CostModel.fit(made(TRUE, (1, 2, 16))).host_size == 16, "they are on one host"


# --- the table -------------------------------------------------------------------------------


def test_a_table_is_written_and_read_again():
    table = made(TRUE)
    assert Scaling.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert table.counts() == [1, 2, 4]
    assert table.weak() == pytest.approx({p: TRUE.weak(4096, p) for p in (1, 2, 4)})
    assert table.strong() == pytest.approx({p: TRUE.strong(4096, p) for p in (1, 2, 4)})
    assert table.label == "4 ranks, each on NVIDIA X, 2026-01-01"
    text = str(table)
    assert f"efficiency {TRUE.weak(4096, 4):.1%}" in text
    assert f"speed-up {TRUE.strong(4096, 2):.2f}" in text
    assert "gradient 100 MB" in text
    assert "262,144 KiB" in text


def test_prediction_and_measurement_stand_side_by_side():
    table = made(TRUE)
    slow = replace(table, steps=[replace(t, seconds=2 * t.seconds) for t in table.steps])
    lines = TRUE.check(slow).splitlines()
    assert len(lines) == 1 + len(table.steps)
    assert all(line.endswith("-50.0%") for line in lines[1:])


def test_pictures_show_measurements_and_lines_to_the_largest():
    table, model = made(TRUE), CostModel.fit(made(TRUE))
    figure = plot_scaling(table, {"fitted": model, "ring": replace(model, algorithm="ring")})
    weak, strong = figure.axes
    assert weak.get_ylabel() == "weak: efficiency"
    assert weak.get_ylim()[0] == 0
    assert strong.get_yscale() == "log"
    for axis in (weak, strong):
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert max(lines["fitted"].get_xdata()) == 1024
        assert list(lines["measured"].get_xdata()) == [1, 2, 4]
        assert axis.get_xlabel() == "ranks"
    assert table.label in figure.get_suptitle()
    _, axis = plt.subplots()
    axis.plot([1, 1e6], [1e-4, 1e-3], color="gray", label="was there before")
    table.plot_sums(model, axis)
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines.pop("was there before").get_color() == "gray"
    assert set(lines) == {"2 ranks", "4 ranks", "2 ranks, model", "4 ranks, model"}
    for n in (2, 4):
        measured, said = lines[f"{n} ranks"], lines[f"{n} ranks, model"]
        assert said.get_color() == measured.get_color()
        assert said.get_linestyle() != measured.get_linestyle()
        assert list(said.get_ydata()) == [model.all_reduce(n, size) for size in said.get_xdata()]
    parts = {"rows": [1e-3, 2e-3], "latency": [1e-3, 0]}
    [axis] = gpuml.plots.stacked(["1", "2"], parts, "title").axes
    tops = [bar.get_y() + bar.get_height() for bar in axis.patches]
    assert tops == pytest.approx([1, 2, 2, 2])
    assert axis.get_ylabel() == "time of a step [ms]"


# --- measuring -------------------------------------------------------------------------------


def quick(communicator, device="cpu", workload=SMALL):
    options = {"sizes": (4, 4096, 65536), "time_budget": 0.002}
    return measure_scaling(workload, communicator, device=device, **options)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_ranks_get_the_same_table(n):
    first, *others = distributed.simulate(n, quick)
    assert all(other == first for other in others)
    counts = [p for p in (1, 2, 3) if p <= n]
    assert first.counts() == counts
    assert [(t.n_ranks, t.size) for t in first.sums] == [
        (p, size) for p in counts[1:] for size in (4, 4096, 65536)
    ]
    steps = [(1, 16), (1, 8), (1, 4), (1, 2)]
    steps += [(p, size) for p in counts[1:] for size in (16 * p, 16)]
    assert [(t.n_ranks, t.size) for t in first.steps] == steps
    assert all(0 < t.low <= t.seconds <= t.high for t in first.sums + first.steps)
    assert first.n_bytes == 4 * (5 * 6 + 6 + 6 * 3 + 3)
    assert (first.n_ranks, first.n_hosts, first.engine) == (n, 1, "eager")
    assert first.title == str(SMALL)
    if n > 1:
        assert CostModel.fit(first).step(16, 1) > 0


def test_the_slowest_rank_counts(monkeypatch):
    from time import sleep

    class Slow(distributed.SimulatedRank):
        def all_reduce(self, array, *, mean=False):
            super().all_reduce(array, mean=mean)
            if self.rank == 1:
                sleep(0.004)

    monkeypatch.setattr(distributed, "SimulatedRank", Slow)
    table, _ = distributed.simulate(2, quick)
    assert min(t.seconds for t in table.sums) > 0.004


def test_a_population_is_no_work_for_ranks():
    with pytest.raises(ValueError, match="ranks train one model, and population has 1,024"):
        measure_scaling(WORKLOADS["population"], distributed.Alone(), device="cpu")


# --- gpuml bench --ranks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--ranks needs more than one: mpiexec -n 2 gpuml bench --ranks"),
        (["--peers"], "--peers compares libraries, --ranks numbers of ranks"),
        (["--models", "4"], "--models needs --peers"),
        (["--steps", "4"], "--steps needs --peers"),
        (["--output", "here"], "--output is for pictures"),
    ],
)
def test_bench_refuses_what_makes_no_sense(arguments, complaint, capsys):
    assert cli.main(["bench", "--device", "cpu", "--ranks", *arguments]) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


def test_tables_are_added_to_a_recording(tmp_path, monkeypatch, capsys):
    """As on rank 0 of two."""
    monkeypatch.chdir(tmp_path)
    old = replace(gpuml.recorded("nvidia_h200"), device=f"{gpuml.devices.CPU.name}, 2 cores")
    old.save("mine.json")

    class First(distributed.Alone):
        world_size = 2

    monkeypatch.setattr(distributed, "ranks", First)
    monkeypatch.setattr(scaling, "measure_scaling", lambda workload, *_, **__: made(TRUE))
    call = ["bench", "--device", "cpu", "--ranks", "--save", "mine.json"]
    assert cli.main(call) == 0
    shown = capsys.readouterr().out
    assert "ranks  rows each     measured    predicted    error" in shown
    found = gpuml.recorded("mine.json")
    assert set(found.scaling) == {"mnist", *old.scaling}
    assert Scaling.from_json(found.scaling["mnist"]) == made(TRUE)
    assert replace(found, scaling={}) == replace(old, scaling={})
    assert cli.main(call) == 2
    assert "holds mnist: --overwrite replaces it" in capsys.readouterr().err
    assert cli.main([*call, "--overwrite"]) == 0
    assert cli.main([*call, "--sizes", "5,6,2"]) == 0
    wanted = {"mnist", "5-6-2, batch 64", *old.scaling}
    assert set(gpuml.recorded("mine.json").scaling) == wanted


@pytest.mark.skipif(not MPIEXEC.exists(), reason="no MPI: pip install 'gpuml[distributed]'")
def test_the_command_measures_by_ranks():
    code = (
        "import sys; from functools import partial; from gpuml import cli, scaling\n"
        "scaling.measure_scaling = partial(scaling.measure_scaling, sizes=(4, 4096),"
        " time_budget=0.002)\n"
        "sys.exit(cli.main())"
    )
    call = [MPIEXEC, "-n", "2", sys.executable, "-c", code, "bench", "--ranks", "--device", "cpu"]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=60, env=os.environ)
    done = run([*call, "--sizes", "5,6,2", "--batch", "8"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MLP 5-6-2, batch 8, float32") == 1
    assert "2 ranks" in done.stdout
    assert done.stderr == ""
    done = run([*call, "--workload", "population"])
    assert done.returncode == 2
    assert done.stderr == "gpuml: --workload population: ranks train one model\n"
