from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import gpuml
from gpuml import MLP, GradientDescent, Linear
from gpuml import batches as batches_module
from gpuml.batches import GivenBatches, StreamedBatches, batches


def collected(data):
    pairs = [(gpuml.to_host(x), gpuml.to_host(y)) for x, y in data]
    return [len(x) for x, _ in pairs], *map(np.concatenate, zip(*pairs, strict=True))


@pytest.mark.parametrize("gathered", [1, 200, 2**20])  # bytes: less than a batch, some, all
@pytest.mark.parametrize("batch_size", [1, 7, 10, 32, 99])
def test_every_sample_comes_once_with_its_target(device, monkeypatch, gathered, batch_size):
    monkeypatch.setattr(batches_module, "GATHERED_BYTES", gathered)
    X = device.asarray(np.arange(100.0).reshape(100, 1) * [1, 10])
    y = device.asarray(np.arange(100))
    generator = np.random.default_rng(0)
    lengths, x_seen, y_seen = collected(batches(X, y, batch_size, generator=generator))
    full, rest = divmod(100, batch_size)
    assert lengths == [batch_size] * full + [rest] * (rest > 0), "only the last may be shorter"
    np.testing.assert_array_equal(x_seen, np.stack([y_seen, 10 * y_seen], axis=1))
    np.testing.assert_array_equal(np.sort(y_seen), np.arange(100))
    assert (y_seen != np.arange(100)).any()
    np.testing.assert_array_equal(y_seen, np.random.default_rng(0).permutation(100))


def test_each_epoch_has_its_own_order(device):
    X, y = device.asarray(np.zeros((50, 1))), device.asarray(np.arange(50))
    generator = np.random.default_rng(0)
    first = collected(batches(X, y, 8, generator=generator))[2]
    second = collected(batches(X, y, 8, generator=generator))[2]
    assert (first != second).any()


def test_without_a_generator_the_order_stays(device):
    X, y = device.asarray(np.zeros((50, 1))), device.asarray(np.arange(50))
    np.testing.assert_array_equal(collected(batches(X, y, 8))[2], np.arange(50))


@pytest.mark.parametrize("batch_size", [None, 50, 51])
def test_a_batch_of_everything_is_the_data_themselves(device, batch_size):
    X, y = device.asarray(np.zeros((50, 1))), device.asarray(np.arange(50))
    [(x, t)] = batches(X, y, batch_size, generator=np.random.default_rng(0))
    assert x is X
    assert t is y


# --- streamed --------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path):
    """Return a function that writes an array to a file and maps it."""

    def save(name, array):
        np.save(tmp_path / f"{name}.npy", array)
        return np.load(tmp_path / f"{name}.npy", mmap_mode="r")

    return save


def streamed(X, y, batch_size, device, dtype=np.float32, limit=None):
    return StreamedBatches(X, y, batch_size, device, dtype, y.dtype, limit)


def small(monkeypatch, *, chunk=100 * 16, block=10 * 16):
    """Rows of 16 bytes: some 100 in a chunk, 10 in a block."""
    monkeypatch.setattr(batches_module, "MAPPED_CHUNK_BYTES", chunk)
    monkeypatch.setattr(batches_module, "BLOCK_BYTES", block)


def rows_of_16_bytes(n):
    y = np.arange(n)
    return np.stack([y, 10 * y], axis=1).astype(np.float32), y


@pytest.mark.parametrize("kind", ["mapped", "plain"])
@pytest.mark.parametrize("n", [1, 99, 503, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 32, 100, 250])
@pytest.mark.parametrize("shuffled", [True, False])
def test_a_stream_brings_every_row_once(device, monkeypatch, mapped, kind, n, batch_size, shuffled):
    small(monkeypatch)
    X, y = rows_of_16_bytes(n)
    data = (mapped("X", X), mapped("y", y)) if kind == "mapped" else (X, y)
    batch_size = min(batch_size, n)
    source = streamed(*data, batch_size, device)
    generator = np.random.default_rng(0) if shuffled else None
    lengths, x_seen, y_seen = collected(source.epoch(generator))
    np.testing.assert_array_equal(x_seen, np.stack([y_seen, 10 * y_seen], axis=1))
    np.testing.assert_array_equal(np.sort(y_seen), y)
    if batch_size < n:
        full, rest = divmod(n, batch_size)
        assert lengths == [batch_size] * full + [rest] * (rest > 0)
        assert source.n_steps == len(lengths)
    if not shuffled or batch_size >= n:
        np.testing.assert_array_equal(y_seen, y)
        return
    again = collected(source.epoch(generator))[2]
    assert (y_seen != y).any()
    assert (again != y_seen).any(), "another order in the next epoch"
    same = collected(source.epoch(np.random.default_rng(0)))[2]
    np.testing.assert_array_equal(same, y_seen)
    if kind == "plain":
        whole = collected(batches(X, y, batch_size, generator=np.random.default_rng(0)))[2]
        np.testing.assert_array_equal(y_seen, whole)


def test_a_memory_map_is_read_in_few_runs_and_well_mixed(monkeypatch, mapped):
    small(monkeypatch)
    X, y = rows_of_16_bytes(10_000)
    source = streamed(mapped("X", X), y, 20, gpuml.get_device("cpu"))
    chunks = list(source._chunks(np.random.default_rng(0)))
    assert source.chunk_rows == 100
    assert len(chunks) == 100
    for runs, order in chunks:
        assert len(runs) <= 10 + 1, "blocks of ten rows"
        assert sum(run.stop - run.start for run in runs) == len(order)
        np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
    y_seen = collected(source.epoch(np.random.default_rng(0)))[2].reshape(-1, 20)
    # A batch of neighbours spans 20 rows, one of rows from everywhere some 9,000.
    spans = np.ptp(y_seen, axis=1)
    assert np.median(spans) > 6000
    assert (np.diff(y_seen.ravel()) == 1).mean() < 0.15, "rows of a block are mixed too"


def test_full_batches_come_in_parts(device, monkeypatch, mapped):
    small(monkeypatch)
    X, y = rows_of_16_bytes(503)
    source = streamed(mapped("X", X), y, 503, device)
    lengths, _, y_seen = collected(source.epoch(np.random.default_rng(0)))
    assert max(lengths) <= 100
    assert source.n_steps == 1
    np.testing.assert_array_equal(y_seen, y)


def test_a_limit_bounds_what_is_under_way(device):
    X, y = rows_of_16_bytes(100_000)
    for limit in (2**14, 2**20, 2**40):
        source = streamed(X, y, 8, device, limit=limit)
        assert source.memory <= limit
        assert source.chunk_rows % 8 == 0 or source.chunk_rows == 100_000
    assert streamed(X, y, 8, device, limit=3 * 8 * 16).chunk_rows == 8
    for limit in (1, 3 * 8 * 16 - 1):
        with pytest.raises(gpuml.DataError, match=r"is too small: 3 batches under way take 384\."):
            streamed(X, y, 8, device, limit=limit)


def test_types_are_converted_on_the_way(device, mapped):
    X = mapped("X", np.arange(30, dtype=np.int16).reshape(10, 3))
    y = mapped("y", np.arange(10, dtype=np.float64)[:, None])
    source = StreamedBatches(X, y, 4, device, np.float64, np.float32)
    for generator in (None, np.random.default_rng(0)):
        for x, t in source.epoch(generator):
            assert (x.dtype, t.dtype) == (np.float64, np.float32)
            np.testing.assert_array_equal(gpuml.to_host(x)[:, 0], 3 * gpuml.to_host(t)[:, 0])


MEMORY_SCRIPT = """
import sys, numpy as np, gpuml
from gpuml import memory_maps

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024

X = np.memmap(sys.argv[1], np.float32, "r", shape=(204_800, 512))
y = np.zeros(len(X), np.float32)
model = gpuml.Linear(512, 1, device="cpu")
batch_size = eval(sys.argv[2])
gpuml.train(model, X[:2000].copy(), y[:2000], n_epochs=1, batch_size=batch_size)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident("VmRSS")
gpuml.train(model, X, y, n_epochs=1, batch_size=batch_size)
print(resident("VmHWM") - before)
"""


@pytest.mark.alone
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
@pytest.mark.parametrize("batch_size", [1024, None])
def test_pages_of_a_file_are_given_back(tmp_path, batch_size):
    """Of 400 MiB at no time more than 250 are in memory; they are three chunks and a half."""
    path = tmp_path / "X.dat"
    with path.open("wb") as file:
        file.truncate(400 * 2**20)
        for place in range(0, 400 * 2**20, 2**20):  # no holes, which would be one page of zeros
            file.seek(place)
            file.write(bytes(2**20))
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(path), str(batch_size)]
    environment = os.environ | {"GPUML_DEVICE": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if "clear_refs" in done.stderr:
        pytest.skip("the peak cannot be measured here")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 250


# --- training on what is streamed ------------------------------------------------------------


def regression_problem(rng, n=500):
    X = rng.normal(size=(n, 3)).astype(np.float32)
    return X, (X @ rng.normal(size=(3, 2)) + 0.1 * rng.normal(size=(n, 2))).astype(np.float32)


@pytest.mark.parametrize("batch_size", [32, 1, 499, None])
@pytest.mark.parametrize("which", ["X", "y", "both"])
def test_a_memory_map_trains_what_an_array_trains(
    device, rng, monkeypatch, mapped, batch_size, which
):
    small(monkeypatch)
    X, Y = regression_problem(rng)
    options = {"n_epochs": 3, "batch_size": batch_size, "shuffle": False}
    options["optimizer"] = GradientDescent(0.02, momentum=0.9)
    models = [Linear(3, 2, device=device) for _ in range(2)]
    a = gpuml.train(models[0], X, Y, validation_data=(X[:77], Y[:77]), **options)
    X, Y = (mapped(n, d) if which in (n, "both") else d for n, d in (("X", X), ("y", Y)))
    b = gpuml.train(
        models[1], X, Y, validation_data=(X[:77], Y[:77]), memory_limit=2**20, **options
    )
    np.testing.assert_allclose(
        *(gpuml.to_host(model.parameters.flat) for model in models), rtol=1e-6, atol=1e-6
    )
    for column in ("loss", "validation_loss", "validation_r2"):
        assert a[column] == pytest.approx(b[column], rel=1e-5)


@pytest.mark.parametrize("batch_size", [32, None])
def test_data_that_do_not_fit_train_what_data_on_the_device_train(device, rng, batch_size):
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    X, Y = regression_problem(rng, 20_000)
    options = {"n_epochs": 3, "batch_size": batch_size, "optimizer": GradientDescent(0.05)}
    models = [Linear(3, 2, device=device) for _ in range(3)]
    gpuml.train(models[0], device.asarray(X), device.asarray(Y), **options)
    gpuml.train(models[1], X, Y, memory_limit="60 KiB", **options)
    gpuml.train(models[2], X, Y, memory_limit="1 GiB", **options)
    first, second, third = (gpuml.to_host(model.parameters.flat) for model in models)
    np.testing.assert_array_equal(first, third)
    if batch_size:
        np.testing.assert_array_equal(first, second)
    else:
        np.testing.assert_allclose(first, second, rtol=1e-6)


def test_classes_are_streamed_too(device, rng, monkeypatch, mapped):
    small(monkeypatch)
    X = rng.normal(size=(300, 3)).astype(np.float32)
    y = (X[:, 0] > 0).astype(np.int32)
    models = [MLP([3, 4, 2], device=device) for _ in range(2)]
    options = {"n_epochs": 2, "shuffle": False, "batch_size": 20}
    gpuml.train(models[0], X, y, **options)
    gpuml.train(models[1], mapped("X", X), mapped("y", y), memory_limit=2**20, **options)
    np.testing.assert_allclose(
        *(gpuml.to_host(model.parameters.flat) for model in models), rtol=1e-6, atol=1e-6
    )
    measured = [
        gpuml.evaluate(models[0], a, b) for a, b in ((X, y), (mapped("X", X), mapped("y", y)))
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


def test_validation_data_share_the_memory_limit(rng, mapped, monkeypatch):
    X, y = mapped("X", rng.normal(size=(20_000, 8)).astype(np.float32)), np.zeros(20_000)
    made, real = [], StreamedBatches.__init__

    def noted(self, *arguments, **options):
        real(self, *arguments, **options)
        made.append(self.memory)

    monkeypatch.setattr(StreamedBatches, "__init__", noted)
    model = Linear(8, 1, device="cpu")
    options = {"validation_data": (X, y), "n_epochs": 1, "memory_limit": "256 KiB"}
    history = gpuml.train(model, X, y, **options)
    assert len(made) == 2
    assert sum(made) <= 256 * 2**10
    measured = gpuml.evaluate(model, np.array(X), y)["loss"]
    assert history["validation_loss"][0] == pytest.approx(measured, rel=1e-5)


def test_a_batch_larger_than_the_memory_limit_is_refused(rng, mapped):
    X, y = mapped("X", rng.normal(size=(20_000, 8)).astype(np.float32)), np.zeros(20_000)
    options = {"n_epochs": 1, "memory_limit": "256 KiB"}
    model = Linear(8, 1, device="cpu")
    with pytest.raises(gpuml.DataError, match=r"too small: 6 batches .* lower batch_size to 1213"):
        gpuml.train(model, X, y, batch_size=1214, **options)
    gpuml.train(model, X, y, batch_size=1213, **options)
    gpuml.train(model, X, y, batch_size=None, **options)  # a full batch comes in parts


def test_chunks_that_nobody_asked_for_have_arrived_when_their_memory_is_given_back(
    device, monkeypatch
):
    """Pinned arrays are copied straight; such a copy would write into what comes next there."""
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    import cupyx

    X = cupyx.empty_pinned((2**20, 64), np.float32)
    X[...] = 1
    y = cupyx.empty_pinned((2**20, 1), np.float32)
    y[...] = 2
    places = []

    class Noted(batches_module._Place):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            places.append(self)

    monkeypatch.setattr(batches_module, "_Place", Noted)
    source = StreamedBatches(X, y, 2**16, device, np.float32, np.float32, 200 * 2**20)
    with device.use():
        epoch = source.epoch(None)
        next(epoch)
        epoch.close()
        assert len(places) == batches_module.CHUNKS
        assert all(place.stream.done for place in places)


@pytest.mark.parametrize("kind", [StreamedBatches, GivenBatches])
def test_an_epoch_that_is_given_up_ends_at_once(monkeypatch, kind):
    """Python 3.12 closes a generator without what it iterates over, if nothing asks for that."""
    closed = []
    real = kind._on_host

    def noted(self, *chunks):
        try:
            yield from real(self, *chunks)
        finally:
            closed.append(self)

    monkeypatch.setattr(kind, "_on_host", noted)
    X, y = rows_of_16_bytes(30)
    cpu = gpuml.get_device("cpu")
    if kind is StreamedBatches:
        source = streamed(X, y, 10, cpu)
    else:
        pairs = [(X[:20], y[:20]), (X[20:], y[20:])]
        source = GivenBatches(pairs, lambda x, y: (x, y, y.dtype), cpu, X.dtype)
    epoch = source.epoch(None)
    next(epoch)
    assert closed == []
    epoch.close()
    assert closed == [source]


# --- sources of batches ----------------------------------------------------------------------


class Source:
    """Begins anew each time, as a data loader does."""

    def __init__(self, X, y, batch_size):
        self.X, self.y, self.batch_size = X, y, batch_size
        self.n_epochs = 0

    def __iter__(self):
        self.n_epochs += 1
        for start in range(0, len(self.X), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.X[rows], self.y[rows]


@pytest.mark.parametrize("kind", ["list", "class", "lists of numbers"])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_a_source_of_batches_trains_what_arrays_train(device, rng, kind, task):
    X, Y = regression_problem(rng, 50)
    y = (Y[:, 0] > 0).astype(np.int64) if task == "classification" else Y
    source = Source(X, y, 16)
    given = {
        "list": list(source),
        "class": source,
        "lists of numbers": [[x.tolist(), t.tolist()] for x, t in source],
    }
    models = [Linear(3, 2, device=device) for _ in range(2)]
    options = {"optimizer": GradientDescent(0.05, momentum=0.9), "n_epochs": 3}
    a = gpuml.train(models[0], X, y, batch_size=16, shuffle=False, **options)
    b = gpuml.train(models[1], given[kind], **options)
    assert (b.n_samples, b.batch_size, b.n_steps) == (50, 16, 12)
    np.testing.assert_allclose(
        *(gpuml.to_host(model.parameters.flat) for model in models), rtol=1e-6
    )
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert gpuml.to_host(models[0].parameters.flat).any()


def test_sources_that_are_none_are_explained(device, rng):
    X, Y = regression_problem(rng, 50)
    model = Linear(3, 2, device=device)
    with pytest.raises(TypeError, match="a generator is used up after one epoch"):
        gpuml.train(model, ((X, Y) for _ in range(3)))
    with pytest.raises(TypeError, match="a generator is used up after one epoch"):
        gpuml.train(model, zip([X], [Y], strict=True), loss="mean_squared_error")
    with pytest.raises(ValueError, match="the source of batches is empty"):
        gpuml.train(model, [])
    with pytest.raises(ValueError, match=r"must yield pairs \(x, y\)"):
        gpuml.train(model, [(X, Y, X)])
    with pytest.raises(ValueError, match=r"must yield pairs \(x, y\)"):
        gpuml.train(model, [X, X])
    with pytest.raises(ValueError, match="X has 50 rows, y has 49"):
        gpuml.train(model, [(X, Y[:49])])
    with pytest.raises(ValueError, match="y is missing"):
        gpuml.train(model, X)
    assert not gpuml.to_host(model.parameters.flat).any()


@pytest.mark.parametrize(("later", "found"), [(2, "2"), (4, "more")])
def test_a_source_that_changes_its_length_is_refused(device, rng, later, found):
    """A loss that no step has written would be counted, or one would have no place."""
    X, Y = regression_problem(rng, 50)
    n_updates = 0

    class Counting(GradientDescent):
        def update(self, *arguments):
            nonlocal n_updates
            n_updates += 1
            super().update(*arguments)

    class Changing(Source):
        def __iter__(self):
            return iter(list(super().__iter__())[: 3 if n_updates < 6 else later])

    model, good = Linear(3, 2, device=device), Linear(3, 2, device=device)
    with pytest.raises(ValueError, match=f"yielded 3 the first time, and now {found}: it must"):
        gpuml.train(model, Changing(X, Y, 10), n_epochs=10, optimizer=Counting(0.05))
    pairs = list(Source(X, Y, 10))[:3]
    gpuml.train(good, pairs, n_epochs=2, optimizer=GradientDescent(0.05))
    np.testing.assert_array_equal(
        *(gpuml.to_host(m.parameters.flat) for m in (model, good)),
        err_msg="the last finished epoch",
    )
