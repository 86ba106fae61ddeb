"""Several processes train one model: started by mpiexec, as users start them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gpuml
from gpuml import batches, buckets, cli, distributed, steps, watcher
from gpuml.batches import ArrayBatches
from gpuml.distributed import Alone, DistributedError, HeldBack, check_agreement, share_of

MPIEXEC = Path(sys.executable).parent / "mpiexec"
if not MPIEXEC.exists():
    MPIEXEC = Path(shutil.which("mpiexec") or MPIEXEC)
PROMPT = 25  # seconds in which a job that cannot go on has to end; starting it takes some

needs_mpi = pytest.mark.skipif(
    not MPIEXEC.exists(), reason="no MPI beside Python: pip install 'gpuml[distributed]'"
)


def run(n, code, *arguments, timeout=120, **variables):
    """Run a program by n ranks."""
    call = [MPIEXEC, "-n", str(n), sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        call,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"GPUML_DEVICE": "cpu"} | variables,
    )


# --- in one process ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 2, 6, 7, 64])
def test_shares_are_all_rows_once_in_order(n, size):
    parts = [share_of(n, SimpleNamespace(rank=r, world_size=size)) for r in range(size)]
    rows = [row for part in parts for row in range(part.start, part.stop)]
    assert rows == list(range(n))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_alone_nothing_happens(rng):
    alone = Alone()
    x = rng.normal(size=5)
    before = x.copy()
    alone.all_reduce(x)
    np.testing.assert_array_equal(x, before)
    assert alone.gather({"a": 1}) == [{"a": 1}]
    alone.end_all(ValueError())
    check_agreement(alone, {"a": 1})
    assert (alone.rank, alone.world_size) == (0, 1)


def test_a_process_by_itself_loads_no_mpi():
    code = "import gpuml, sys; from gpuml.distributed import ranks\n"
    code += "assert ranks().world_size == 1 and 'mpi4py' not in sys.modules"
    clean = {k: v for k, v in os.environ.items() if k not in distributed.WORLD_SIZES}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean)


@pytest.mark.parametrize("name", distributed.WORLD_SIZES)
def test_launchers_are_known(name, monkeypatch):
    for other in distributed.WORLD_SIZES:
        monkeypatch.delenv(other, raising=False)
    assert distributed.launched_size() == 1
    monkeypatch.setenv(name, "12")
    assert distributed.launched_size() == 12
    monkeypatch.setenv(name, "twelve")
    assert distributed.launched_size() == 1


def test_of_slurm_alone_nothing_follows(monkeypatch):
    for name in (*distributed.WORLD_SIZES, "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert distributed.launched_size() == 1, "srun also starts processes that are no ranks"
    monkeypatch.setenv("PMIX_RANK", "3")
    assert distributed.launched_size() == 8
    monkeypatch.delenv("PMI_FD", raising=False)
    monkeypatch.setenv("PMI_SIZE", "2")  # an mpiexec inside
    assert distributed.launched_size() == 2


def test_a_closed_line_to_mpiexec_is_a_childs_or_an_error(monkeypatch):
    for name in (*distributed.WORLD_SIZES, distributed.MARK):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setenv("PMI_FD", str(ours.fileno()))
        assert distributed.launched_size() == 1
        monkeypatch.setenv("PMI_SIZE", "2")
        assert distributed.launched_size() == 2
    said = (
        r"2 processes .* line to mpiexec is closed: .*distributed\.Alone\(\)\), or unset PMI_SIZE$"
    )
    with pytest.raises(DistributedError, match=said):
        distributed.launched_size()
    monkeypatch.setenv(distributed.MARK, "123")
    assert distributed.launched_size() == 1


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ([range(8)] * 4, [2] * 4),
        ([range(4), range(4, 8)], [4, 4]),
        ([[0], [1, 2, 3]], [1, 2]),
        ([[0]] * 3, [1] * 3),
        ([[0, 1], [0, 1], [2, 3], [2, 3]], [1] * 4),
    ],
)
def test_ranks_share_the_processors_that_they_have(allowed, expected):
    found = [distributed.fair_share(allowed, rank) for rank in range(len(allowed))]
    assert found == expected


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.delenv("PMI_FD", raising=False)
    monkeypatch.setenv("PMI_SIZE", "3")
    found = distributed.ranks.__wrapped__
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    said = r"3 processes were started as ranks, and mpi4py is not installed: pip install"
    with pytest.raises(DistributedError, match=said):
        found()
    monkeypatch.setattr(distributed, "find_spec", lambda name: True)
    # As if its MPI could not be loaded.
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace())
    with pytest.raises(DistributedError, match="mpi4py finds no MPI library"):
        found()
    library = SimpleNamespace(
        COMM_WORLD=SimpleNamespace(size=1),
        Get_library_version=lambda: "An MPI 1.0\nof somebody",
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=library))
    said = "3 processes .* sees 1: mpiexec belongs to another MPI than that of mpi4py, which is An"
    with pytest.raises(DistributedError, match=said):
        found()


@needs_mpi
def test_the_mpi_beside_python_is_taken(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert distributed.launcher(3) == [str(MPIEXEC), "-n", "3", sys.executable]
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(DistributedError, match="there is no mpi4py to start 3 ranks: pip install"):
        distributed.launcher(3)
    monkeypatch.setattr(distributed.sys, "executable", "nowhere/python")
    with pytest.raises(DistributedError, match="there is no mpiexec to start 3 ranks: pip inst"):
        distributed.launcher(3)


class Pretending(Alone):
    """A rank among several, whose others give what they are told."""

    def __init__(self, rank, world_size, others=()):
        super().__init__()
        self.rank, self.world_size, self.others = rank, world_size, others

    def gather(self, value):
        return [value, *self.others]


def test_who_disagrees_is_named():
    settings = {"batch size": 64, "loss": "mse"}
    check_agreement(Pretending(0, 3, [settings, settings]), settings)
    others = [settings, settings | {"batch size": 32}]
    said = "the ranks disagree: batch size is 64 on rank 0 and 32 on rank 2"
    with pytest.raises(DistributedError, match=said):
        check_agreement(Pretending(0, 3, others), settings)
    with pytest.raises(DistributedError, match="precision is None on rank 0 and tf32 on rank 1"):
        check_agreement(Pretending(0, 2, [settings | {"precision": "tf32"}]), settings)


def test_ctrl_c_is_held_back_where_others_wait():
    alone = HeldBack(Alone())
    with pytest.raises(KeyboardInterrupt), alone:
        signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with HeldBack(Pretending(0, 2)) as held:
        held.look()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            held.look()
    assert signal.getsignal(signal.SIGINT) is before
    assert held.agreed


def test_ctrl_c_after_the_last_look_comes_when_the_block_ends():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        with HeldBack(Pretending(0, 2)) as held:
            held.look()
            signal.raise_signal(signal.SIGINT)
            assert not came
        assert came == [signal.SIGINT]
        assert not held.agreed
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt), HeldBack(Pretending(0, 2)):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_of_one_rank_is_no_training_interrupted(rng):
    """Which all ranks get, after the same epoch; else some would go on, and wait."""
    X, y = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(2, size=20)
    model = gpuml.MLP([3, 4, 2], device="cpu")
    looks = []

    class Late(Pretending):
        def gather(self, value):
            return [value] * 2

        def all_reduce(self, array, *, mean=False):
            looks.append(array.shape)
            if looks.count((1,)) == 3:  # the last look, after the second epoch's
                looks.clear()
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        gpuml.train(model, X, y, n_epochs=2, communicator=Late(0, 2))
    assert caught.type is KeyboardInterrupt
    assert not looks


def test_engines_of_one_process_are_refused(rng):
    X, y = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(2, size=20)
    model = gpuml.MLP([3, 4, 2], device="cpu")
    with pytest.raises(ValueError, match="engine='gram' trains in one process, and there are 2"):
        gpuml.train(model, X, y, engine="gram", communicator=Pretending(0, 2))


class Keeping(Pretending):
    """A rank that keeps what it would add up, by the bucket, and adds nothing."""

    def __init__(self, rank, world_size):
        super().__init__(rank, world_size)
        self.sums = []

    def all_reduce(self, array, *, mean=False):
        self.sums.append(gpuml.to_host(array) / (self.world_size if mean else 1))


@pytest.mark.parametrize("read_once", [False, True])
@pytest.mark.parametrize("n", [1, 3, 28, 30])
def test_a_rank_adds_its_share_of_the_gradient(device, rng, n, read_once):
    """The sum over pretended ranks is the gradient of the whole batch; empty shares count 0."""
    X, y = rng.normal(size=(n, 5)), rng.integers(3, size=n)
    model = gpuml.MLP([5, 7, 3], dtype=np.float64, device=device)
    loss, optimizer = gpuml.losses.softmax_cross_entropy, gpuml.GradientDescent()
    if read_once:
        model, loss = gpuml.Linear(5, 2, dtype=np.float64, device=device), "mean_squared_error"
        loss, y = gpuml.losses.get_loss(loss), rng.normal(size=(n, 2))
    X, y = device.asarray(X), device.asarray(y)
    start = model.parameters.flat.copy()
    whole = steps.EagerStep(model, loss, optimizer)
    value = float(whole._gradient(X, y))
    total = 0
    for rank in range(4):
        model.parameters.flat[...] = start
        keeping = Keeping(rank, 4)
        options = {"communicator": keeping, "read_once": read_once}
        rows = share_of(n, keeping)
        steps.RankStep(model, loss, optimizer, **options)(X[rows], y[rows], n)
        (sums,) = keeping.sums  # these are small: one bucket
        total = total + sums
    gradient = gpuml.to_host(whole._gradients.flat)
    np.testing.assert_allclose(total[:-1], gradient, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(total[-1], value, rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", gpuml.GradientDescent(0.1, momentum=0.5)], ids=repr)
@pytest.mark.parametrize("bucket_bytes", [1, 1000, 10**6])
def test_a_step_by_buckets_is_a_step(device, rng, monkeypatch, optimizer, bucket_bytes):
    """Buckets hold all gradients once, the loss goes with the first, parts follow as wholes do."""
    monkeypatch.setattr(steps.Buckets.__init__, "__defaults__", (bucket_bytes,))
    X, y = device.asarray(rng.normal(size=(40, 5))), device.asarray(rng.integers(3, size=40))
    loss, optimizer = gpuml.losses.softmax_cross_entropy, gpuml.optimizers.get_optimizer(optimizer)
    results, said = [], []
    for kind in (steps.EagerStep, steps.RankStep):
        model = gpuml.MLP([5, 17, 6, 3], dtype=np.float64, device=device)
        keeping = Keeping(0, 1)
        options = {} if kind is steps.EagerStep else {"communicator": keeping}
        step = kind(model, loss, optimizer, **options)
        said.append([float(step(X, y)) for _ in range(3)])
        results.append(gpuml.to_host(model.parameters.flat))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(said[1], said[0], rtol=1e-12)
    sent = keeping.sums[-len(keeping.sums) // 3 :]
    assert sum(map(len, sent)) == model.n_parameters + 1
    assert any(np.isclose(part[-1], said[0][-1], rtol=1e-12) for part in sent), "the loss is there"
    if device.kind == "gpu":
        assert len(sent) == {1: 6, 1000: 2, 10**6: 1}[bucket_bytes]


def test_there_are_no_more_buckets_than_flags(device, monkeypatch):
    """One more would raise the flag of another rank."""
    monkeypatch.setattr(buckets, "MOST_BUCKETS", 4)
    parameters = gpuml.MLP([2] * 50, device=device).parameters
    assert len(buckets.Buckets(parameters, Pretending(0, 2), 1).slices) <= 4


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [(23, 5), (64, 64), (1000, 7), (5, 2)])
def test_ranks_gather_each_row_of_a_batch_once(device, rng, monkeypatch, n, batch_size, shuffle):
    monkeypatch.setattr(batches, "GATHERED_BYTES", 300)
    X = device.asarray(rng.normal(size=(n, 2)))
    y = device.asarray(np.arange(n))
    data = ArrayBatches(X, y, batch_size)

    def generator():
        return np.random.default_rng(4) if shuffle else None

    whole = [gpuml.to_host(rows) for _, rows in data.epoch(generator())]
    ranks = [
        list(batches.shares(data, generator(), partial(share_of, communicator=Pretending(r, 3))))
        for r in range(3)
    ]
    assert len(whole) == len(ranks[0])
    for rows, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert all(size == len(rows) for _, _, size in parts)
        np.testing.assert_array_equal(np.concatenate([gpuml.to_host(p[1]) for p in parts]), rows)
        found = np.concatenate([gpuml.to_host(p[0]) for p in parts])
        np.testing.assert_array_equal(found, gpuml.to_host(X)[rows])


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the watcher needs Linux")
def test_the_watcher_leaves_no_folder_even_if_nobody_listens(tmp_path):
    folder = tmp_path / "ranks"
    folder.mkdir()
    watcher = Path(distributed.__file__).with_name("watcher.py")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as rank:
        reader, writer = os.pipe()
        call = [sys.executable, watcher, folder, f"0:{rank.pid}"]
        with subprocess.Popen(call, stderr=writer) as watching:
            os.close(writer)
            os.close(reader)
            time.sleep(1)
            rank.kill()
            assert watching.wait(PROMPT) == 0
    assert not folder.exists()


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the watcher needs Linux")
def test_a_rank_that_ended_before_the_watcher_looked_is_named(tmp_path):
    folder = tmp_path / "ranks"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as rank:
        early = subprocess.Popen([sys.executable, "-c", ""])
        assert early.wait() == 0
        watcher = Path(distributed.__file__).with_name("watcher.py")
        call = [sys.executable, watcher, folder, f"0:{rank.pid}", f"1:{early.pid}"]
        with subprocess.Popen(call, stderr=subprocess.PIPE, text=True) as watching:
            time.sleep(1)
            rank.kill()
            _, err = watching.communicate(timeout=PROMPT)
    assert err.startswith(f"gpuml: rank 1 (process {early.pid} on ")
    assert len(err.splitlines()) == 1


def test_simulated_ranks_talk(device):
    def work(communicator):
        rank, n = communicator.rank, communicator.world_size
        assert communicator.gather({"rank": np.int64(rank)}) == [{"rank": i} for i in range(n)]
        for _ in range(3):
            x = device.asarray(np.float32([1, 10**rank, 1e-9]))
            communicator.all_reduce(x)
        part = communicator.first(2)
        assert (part is None) == (rank >= 2)
        if part is not None:
            assert (part.rank, part.world_size) == (rank, 2)
            assert part.gather(rank) == [0, 1]
        alone = communicator.first(1)
        assert (alone is None) == (rank > 0)
        return gpuml.to_host(x).tobytes()

    found = distributed.simulate(3, work)
    assert len(set(found)) == 1
    np.testing.assert_allclose(np.frombuffer(found[0], np.float32), [3, 111, 3e-9], rtol=1e-6)


def test_a_simulated_rank_adds_in_the_same_order_and_waits_for_the_readers():
    def work(communicator):
        x = np.random.default_rng(communicator.rank).normal(size=100_003).astype(np.float32)
        for _ in range(20):
            communicator.all_reduce(x)
            x *= 0.3
        return x.tobytes()

    assert len(set(distributed.simulate(4, work))) == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_simulated_ranks_train_the_model_of_one_process(n, rng):
    X, y = rng.normal(size=(203, 6)).astype(np.float32), rng.integers(3, size=203)

    def work(communicator):
        model = gpuml.MLP([6, 8, 3], device="cpu")
        gpuml.train(model, X, y, n_epochs=3, batch_size=50, communicator=communicator)
        return model.parameters.flat

    expected = work(Alone())
    first, *others = distributed.simulate(n, work)
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert np.linalg.norm(first - expected) < 1e-4 * np.linalg.norm(expected)


def ends_early(communicator):
    if communicator.rank == 0:
        return
    communicator.all_reduce(np.zeros(3))


def asks_another(communicator):
    if communicator.rank == 1:
        communicator.gather(1)
    communicator.all_reduce(np.zeros(3))


def raises(communicator):
    if communicator.rank == 2:
        raise OSError("the disk is full")
    communicator.all_reduce(np.zeros(3))


@pytest.mark.parametrize(
    ("work", "error", "said"),
    [
        (ends_early, DistributedError, "rank 0 is at its end, rank 1 at all_reduce"),
        (asks_another, DistributedError, "rank 0 is at all_reduce, rank 1 at gather"),
        (raises, OSError, "the disk is full"),
    ],
)
def test_simulated_ranks_do_not_wait_forever(work, error, said):
    before = threading.active_count()
    with pytest.raises(error, match=said):
        distributed.simulate(3, work)
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="n_ranks must be a positive integer, got 0"):
        distributed.simulate(0, work)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="asks Linux")
def test_a_watcher_that_comes_late_names_all_that_may_have_been_the_first(tmp_path):
    """It is here that rank 2 has left no trace, and rank 1 has ended unnoticed so far."""
    children = [subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2)]
    children[1].wait()
    os.waitid(os.P_PID, children[0].pid, os.WEXITED | os.WNOWAIT)
    ranks = [f"{rank}:{child.pid}" for rank, child in enumerate(children, 1)]
    call = [sys.executable, watcher.__file__, tmp_path / "ended", *ranks]
    (tmp_path / "ended").mkdir()
    said = subprocess.run(call, stderr=subprocess.PIPE, text=True, timeout=PROMPT).stderr
    assert re.fullmatch(r"gpuml: one of the ranks 1 \(.*\), 2 \(.*\) was killed.*\n", said), said
    assert not (tmp_path / "ended").exists()
    children[0].wait()


# --- by mpiexec --------------------------------------------------------------------------------

CASES = """
import hashlib
import sys
import numpy as np
import gpuml
from gpuml.distributed import ranks

rng = np.random.default_rng(0)
X = rng.normal(size=(203, 6)).astype(np.float32)
scores = np.tanh(X @ rng.normal(size=(6, 3))).astype(np.float32)
y = scores.argmax(axis=1)
settings = {"n_epochs": 5, "batch_size": 50}  # the last batch has three rows
momentum = gpuml.GradientDescent(0.05, momentum=0.9)
watched, small = {"validation_data": (X[:40], y[:40])}, {"memory_limit": "8 KiB"}
pairs = [(X[i : i + 67], y[i : i + 67]) for i in (0, 67, 134)]
MLP, Linear = gpuml.MLP, gpuml.Linear
cases = {
    "adam": (MLP([6, 8, 3]), (X, y), watched),
    "momentum": (MLP([6, 5, 4, 3]), (X, y), {"optimizer": momentum, "schedule": "cosine"}),
    "numbers": (Linear(6, 3), (X, scores), {"optimizer": momentum}),
    "full batch": (Linear(6, 3), (X, scores), {"optimizer": momentum, "batch_size": None}),
    "in order": (MLP([6, 8, 3]), (X, y), {"shuffle": False, "batch_size": 101}),  # and one row
    "a source": (MLP([6, 8, 3]), (pairs,), {}),
    "streamed": (MLP([6, 8, 3]), (X, y), small),
    "streamed as a whole": (Linear(6, 3), (X, scores), small | {"batch_size": None}),
    "early": (MLP([6, 8, 3]), (X, y), {"patience": 1, "n_epochs": 200} | watched),
}
found = {}
for name in sys.argv[2:] or cases:
    model, data, options = cases[name]
    history = gpuml.train(model, *data, **(settings | options))
    flat = gpuml.to_host(model.parameters.flat)
    digests = ranks().gather([hashlib.sha256(flat.tobytes()).hexdigest(), len(history)])
    assert digests.count(digests[0]) == len(digests), f"{name}: {digests}"
    measured = history["loss"], history.columns.get("validation_loss", [])
    found[name] = np.concatenate([flat, *measured])
if ranks().rank == 0:
    np.savez(sys.argv[1], **found)
    print("done by", ranks().world_size)
"""


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    """What one process on the CPU finds."""
    file = tmp_path_factory.mktemp("alone") / "weights.npz"
    clean = {k: v for k, v in os.environ.items() if k not in distributed.WORLD_SIZES}
    call = [sys.executable, "-c", CASES, file]
    subprocess.run(call, check=True, env=clean | {"GPUML_DEVICE": "cpu"})
    return np.load(file)


def check_cases(done, n, file, by_one, names=()):
    assert done.stdout == f"done by {n}\n", done.stderr
    found = np.load(file)
    assert set(found) == set(names or by_one)
    for name, values in found.items():
        expected = by_one[name]
        assert len(values) == len(expected), name
        assert np.linalg.norm(values - expected) < 1e-4 * np.linalg.norm(expected), name


def n_gpus():
    try:
        return gpuml.get_device("gpu").xp.cuda.runtime.getDeviceCount()
    except gpuml.DeviceError:
        return 0


@needs_mpi
@pytest.mark.parametrize("how", ["eager", "graph", "NCCL", "NCCL graph"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_training_is_the_same_on_gpus(n, how, by_one, tmp_path):
    if n_gpus() < n:
        pytest.skip(f"{n_gpus()} GPUs")
    code = CASES
    if "NCCL" in how:  # as for more ranks than fetch from each other
        code = f"from gpuml import distributed\ndistributed.MOST_RANKS = 1\n{code}"
    if "graph" in how:
        code = code.replace('"batch_size": 50}', '"batch_size": 50, "engine": "graph"}')
        code = code.replace('small | {"batch_size": None}', '{"batch_size": None}')
    done = run(n, code, tmp_path / "weights.npz", GPUML_DEVICE="gpu")
    check_cases(done, n, tmp_path / "weights.npz", by_one)


@needs_mpi
def test_ranks_that_share_a_gpu_are_named(tmp_path):
    if not n_gpus():
        pytest.skip("no GPU")
    n = n_gpus() + 1
    done = run(n, CASES, tmp_path / "weights.npz", GPUML_DEVICE="gpu")
    assert done.returncode != 0
    said = f"ranks 0 and {n - 1} share gpu:0 of .*, where {n - 1} can be seen: NCCL needs one"
    assert re.search(said, done.stderr), done.stderr


@needs_mpi
@pytest.mark.parametrize(
    ("n", "names"), [(1, []), (2, []), (3, []), (4, ["momentum", "in order", "streamed"])]
)
def test_the_training_is_the_same_whatever_the_number_of_ranks(n, names, by_one, tmp_path):
    done = run(n, CASES, tmp_path / "weights.npz", *names)
    check_cases(done, n, tmp_path / "weights.npz", by_one, names)


GATHER = """
from gpuml.distributed import ranks
r = ranks()
values = r.gather({"rank": r.rank, "text": "é" * r.rank})
assert [v["rank"] for v in values] == list(range(r.world_size))
assert [len(v["text"]) for v in values] == list(range(r.world_size))
assert r.n_threads >= 1
import numpy as np
for n in (1, 1000, 100_003):
    x = np.random.default_rng(r.rank).normal(size=n).astype(np.float32)
    every = sum(np.random.default_rng(i).normal(size=n) for i in range(r.world_size))
    r.all_reduce(x)
    np.testing.assert_allclose(x, every, rtol=1e-4, atol=1e-5)
    assert len({v for v in r.gather(x.tobytes().hex()[:2000] + str(hash(x.tobytes())))}) == 1
for n in range(1, r.world_size + 1):
    part = r.first(n)
    assert (part is None) == (r.rank >= n)
    if part is not None:
        assert (part.rank, part.world_size) == (r.rank, n)
        x = np.ones(5)
        part.all_reduce(x)
        assert x.tolist() == [n] * 5
"""


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_ranks_talk(n):
    done = run(n, GATHER, PYTHONHASHSEED="0")
    assert done.returncode == 0, done.stderr


TRAIN = """
import os
import signal
import sys
import numpy as np
import gpuml
from gpuml.distributed import ranks

what, rank = sys.argv[1], ranks().rank
rng = np.random.default_rng(0)
X, y = rng.normal(size=(500, 6)).astype(np.float32), rng.integers(3, size=500)
calls = 0
settings = {"n_epochs": 1000, "batch_size": 100, "optimizer": "gradient_descent"}
if rank == 1 and what == "batch size":
    settings["batch_size"] = 50
if rank == 1 and what == "data":
    X[3, 2] += 1
if what == "diverges":
    settings["optimizer"] = gpuml.GradientDescent(1e20)
model = gpuml.MLP([6, 8, 3], seed=rank if what == "weights" else 0)


def loss(predictions, targets):
    global calls
    calls += 1
    if calls == 20 and rank == 1:
        if what == "raises":
            raise OSError("the disk is full")
        if what == "exits":
            sys.exit(3)
        if what == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return gpuml.losses.softmax_cross_entropy(predictions, targets)


if what == "before":
    if rank == 1:
        raise OSError("no such data")
if what == "ends early":
    if rank == 1:
        sys.exit(0)
if what == "exits early":
    if rank == 0:
        sys.exit("no data for me")
if what == "is interrupted":
    if rank == 1:
        signal.raise_signal(signal.SIGINT)
if what == "checkpoint" and rank != 1:
    settings["checkpoint"] = sys.argv[2]
data = X, y
if what == "source":
    cut = [0, 250, 500] if rank == 0 else [0, 250, 300, 500]
if what == "cuts":
    cut = [0, 250, 500] if rank == 0 else [0, 300, 500]
if what == "first batch":
    cut = [0, 250, 500]
    X[3, 2] += rank == 1
if what in ("source", "cuts", "first batch"):
    data = ([(X[i:j], y[i:j]) for i, j in zip(cut, cut[1:])],)
    del settings["batch_size"]
gpuml.train(model, *data, loss=loss, **settings)
print("never", flush=True)
"""


@needs_mpi
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("batch size", "the ranks disagree: batch size is 100 on rank 0 and 50 on rank 1"),
        ("data", "the ranks disagree: data is .* on rank 0 and .* on rank 1"),
        ("weights", "the ranks disagree: the weights to begin with is .* and .* on rank 1"),
        ("raises", "rank 1 of 3 failed:\n(.*\n)*OSError: the disk is full"),
        ("exits", "rank 1 of 3 failed:\n(.*\n)*SystemExit: 3"),
        ("before", "rank 1 of 3 failed:\n(.*\n)*OSError: no such data"),
        ("ends early", "rank 0 of 3 failed:\n.*rank 1 has ended, as by .* and the others go on"),
        ("exits early", "no data for me\n(.*\n)*rank 1 of 3 failed:\n.*rank 0 has ended"),
        ("is interrupted", "rank 1 of 3 failed:\nstopped by Ctrl-C\n"),
        ("source", "the ranks disagree: steps in an epoch is 2 on rank 0 and 3 on rank 1"),
        ("cuts", r"the ranks disagree: batch size is 250 on rank 0 and 300 on rank 1"),
        ("first batch", "the ranks disagree: the first batch is .* and .* on rank 1"),
        ("checkpoint", "disagree: having a checkpoint is True on rank 0 and False on rank 1"),
        ("diverges", r"rank 0 of 3 failed:\n(.*\n)*.*DivergenceError: epoch 1, step"),
        (
            "is killed",
            r"gpuml: (rank |one of the ranks .*)\b1 \(process .*\) was killed, or crashed",
        ),
    ],
)
def test_a_rank_that_cannot_go_on_ends_all_of_them_promptly(what, said, tmp_path):
    begin = time.monotonic()
    done = run(3, TRAIN, what, tmp_path / "a.checkpoint", timeout=PROMPT)
    assert time.monotonic() - begin < PROMPT
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert re.search(said, text), text
    assert text.count("Traceback") <= 1, text
    assert text.count("was killed, or crashed") == (what == "is killed"), text
    assert len(re.findall(r"rank \d of 3 failed", text)) <= 1, text
    assert "never" not in text


UNASKED = """
import os
import sys
import numpy as np
import gpuml

what, rank = sys.argv[1], os.environ["PMI_RANK"]  # ranks() has not been called
if rank == "1" or what == "all":
    if what == "exits":
        sys.exit("no data here")
    if what == "ends":
        sys.exit(0)
    raise OSError("no such data")
gpuml.train(gpuml.Linear(2, 1), np.ones((8, 2), np.float32), np.ones((8, 1), np.float32))
print("never", flush=True)
"""


@needs_mpi
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raises", "OSError: no such data\ngpuml: rank 1 failed by itself: all ranks end\n"),
        ("all", "OSError: no such data\ngpuml: rank 0 failed by itself: all ranks end\n"),
        ("exits", "no data here\n(.*\n)*rank 0 of 2 failed:\n.*rank 1 has ended"),
        ("ends", "rank 0 of 2 failed:\n.*rank 1 has ended, as by .* and the others go on"),
    ],
)
def test_a_rank_that_fails_before_it_asks_for_the_others_ends_them(what, said):
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True).stdout
    if "HYDRA" not in version:
        pytest.skip("ranks stand by for one another under MPICH's mpiexec only")
    done = run(2, UNASKED, what, timeout=PROMPT)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(said, text), text
    assert text.count("Traceback") <= 1, text
    assert "never" not in text


STOPPED = """
import sys
from pathlib import Path
import numpy as np
import gpuml
from gpuml.distributed import ranks

rng = np.random.default_rng(0)
X, y = rng.normal(size=(500, 6)).astype(np.float32), rng.integers(3, size=500)
model = gpuml.MLP([6, 8, 3])
calls = 0


def loss(predictions, targets):
    global calls
    calls += 1
    if calls == 20:
        Path(f"rank{ranks().rank}").touch()
    return gpuml.losses.softmax_cross_entropy(predictions, targets)


try:
    gpuml.train(model, X, y, loss=loss, n_epochs=10**6, batch_size=100)
except gpuml.TrainingInterrupted as error:
    found = ranks().gather([len(error.history), model.parameters.flat.tolist()])
    assert len(error.history) > 2 and all(one == found[0] for one in found)
    if ranks().rank == 0:
        print("stopped together")
"""


CHILDREN = """
import multiprocessing
import subprocess
import sys
import numpy as np
import gpuml
from gpuml.distributed import ranks

code = "import gpuml; from gpuml.distributed import ranks; print(ranks().world_size)"
rank = ranks()
if rank.rank == 0:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(ranks).world_size == 1
assert rank.gather(np.int64(3)) == [3, 3]
"""

FORKED = """
import multiprocessing
import numpy as np
import gpuml
from gpuml.distributed import ranks


def train():
    X = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    gpuml.train(gpuml.Linear(3, 3), X, X, n_epochs=2)
    return ranks().world_size


with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.apply(train) == 1
assert ranks().world_size == 2
"""

NOT_BY_MPIEXEC = """
import subprocess
import sys

code = "import gpuml.distributed; gpuml.distributed.ranks()"
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
assert "2 processes were started as ranks, and this one's line" in done.stderr, done.stderr
"""

ENDINGS = """
import os
import sys
import time
import numpy as np
import gpuml
from gpuml.distributed import ranks

rank = ranks().rank
rows = np.arange(50.0, dtype=np.float32)[:, None]
seen = []


def loss(predictions, targets):
    seen.extend(targets[:, 0].tolist())
    return gpuml.losses.mean_squared_error(predictions, targets)


options = {"n_epochs": 1, "batch_size": 10, "seed": None}
gpuml.train(gpuml.Linear(1, 1), rows, rows, loss=loss, **options)
every = [row for part in ranks().gather(seen) for row in part]
assert sorted(every) == list(range(50)), "each has an order of its own"
if rank == 0:
    time.sleep(3)  # to write the results
    print("written")
sys.exit(7 if rank == 1 else 0)
"""


@needs_mpi
def test_what_a_rank_starts_is_no_rank():
    done = run(2, CHILDREN, timeout=PROMPT)
    assert done.returncode == 0, done.stderr


@needs_mpi
def test_a_child_made_before_its_parent_knew_to_be_a_rank_is_none():
    done = run(2, FORKED, timeout=PROMPT)
    assert done.returncode == 0, done.stderr


@needs_mpi
def test_scripts_between_mpiexec_and_python_are_named():
    done = run(2, NOT_BY_MPIEXEC, timeout=PROMPT)
    assert done.returncode == 0, done.stderr


@needs_mpi
def test_ranks_that_are_done_wait_for_those_that_still_write():
    done = run(3, ENDINGS, timeout=PROMPT)
    assert done.returncode == 7, done.stderr
    assert (done.stdout, done.stderr) == ("written\n", "")


FAULT = """
import sys
import gpuml.cli
from gpuml.distributed import ranks

before = gpuml.cli._training_data
if ranks().rank == 1:
    def faulty(options):
        raise MemoryError("unable to allocate 30 GiB")
    gpuml.cli._training_data = faulty
sys.exit(gpuml.cli.main())
"""

LATER_FAULT = """
import sys
import gpuml.cli
import gpuml.training
from gpuml.distributed import ranks

if ranks().rank == 1:
    def faulty(*arguments, **options):
        raise MemoryError("unable to allocate 40 GiB")
    gpuml.training.source_of = faulty
sys.exit(gpuml.cli.main())
"""


@needs_mpi
@pytest.mark.parametrize(("code", "size"), [(FAULT, 30), (LATER_FAULT, 40)])
def test_a_fault_of_one_rank_ends_the_command(code, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(2, code, "train", timeout=PROMPT)
    assert done.returncode != 0
    assert "rank 1 of 2 failed" in done.stderr
    assert f"MemoryError: unable to allocate {size} GiB" in done.stderr


@needs_mpi
def test_ctrl_c_stops_all_ranks_after_the_same_epoch(tmp_path):
    call = [MPIEXEC, "-n", "2", sys.executable, "-c", STOPPED]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"GPUML_DEVICE": "cpu"}
    with subprocess.Popen(call, cwd=tmp_path, env=environment, **pipes) as job:
        begin = time.monotonic()
        while len(list(tmp_path.glob("rank*"))) < 2:
            assert time.monotonic() - begin < PROMPT, "they do not even begin"
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=PROMPT)
    assert "stopped together" in out, out + err
    assert "Traceback" not in err


LOADING = """
import sys
import time
from pathlib import Path
import numpy as np
import gpuml
from gpuml.distributed import ranks

rank = ranks().rank
Path(f"rank{rank}").touch()
if rank == int(sys.argv[1]):
    time.sleep(60)
X = np.ones((50, 3), np.float32)
gpuml.train(gpuml.Linear(3, 3), X, X)
"""


@needs_mpi
@pytest.mark.parametrize("slow", [0, 1])
def test_ctrl_c_ends_ranks_that_are_at_different_places(slow, tmp_path):
    call = [MPIEXEC, "-n", "3", sys.executable, "-c", LOADING, str(slow)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"GPUML_DEVICE": "cpu"}
    with subprocess.Popen(call, cwd=tmp_path, env=environment, **pipes) as job:
        begin = time.monotonic()
        while len(list(tmp_path.glob("rank*"))) < 3:
            assert time.monotonic() - begin < PROMPT, "they do not even begin"
            time.sleep(0.05)
        time.sleep(1)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=PROMPT)
    assert err.count("stopped by Ctrl-C") == 1
    assert "Traceback" not in err


RESUMED = """
import sys
import numpy as np
import gpuml
from gpuml.distributed import ranks

rng = np.random.default_rng(0)
X, y = rng.normal(size=(203, 6)).astype(np.float32), rng.integers(3, size=203)
model = gpuml.MLP([6, 8, 3])
path, n_epochs = sys.argv[1], int(sys.argv[2])
if len(sys.argv) > 3 and ranks().rank == 1:
    path = sys.argv[3]
history = gpuml.train(model, X, y, n_epochs=n_epochs, checkpoint=path)
assert len(history) == n_epochs
if ranks().rank == 0:
    np.save("weights.npy", model.parameters.flat)
"""


@needs_mpi
def test_another_number_of_ranks_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, file, n_epochs in ((1, "a", 6), (2, "b", 2), (3, "b", 4), (1, "b", 6)):
        done = run(n, RESUMED, f"{file}.checkpoint", n_epochs)
        assert done.returncode == 0, done.stderr
        if file == "a":
            expected = np.load("weights.npy")
    found = np.load("weights.npy")
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    done = run(2, RESUMED, "b.checkpoint", 8, "c.checkpoint", timeout=PROMPT)
    assert "the number of epochs in b.checkpoint is 6 on rank 0" in done.stderr.replace("\n", " ")


WRITES_LONG = """
import os
import signal
import sys
import time
import numpy as np
import gpuml
from gpuml import training
from gpuml.distributed import ranks

if ranks().rank == 0 and sys.argv[1] == "dies":
    save = training.save_checkpoint
    training.save_checkpoint = lambda *a, **k: (time.sleep(0.5), save(*a, **k))


def schedule(epoch, n_epochs):
    if epoch == 2 and ranks().rank == 1 and sys.argv[1] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if ranks().rank == 0 and sys.argv[1] == "goes on":
        print(epoch)
    return 1.0


X = np.ones((8, 2), np.float32)
settings = {"n_epochs": 4, "schedule": schedule, "checkpoint": "a.checkpoint"}
gpuml.train(gpuml.Linear(2, 2), X, X, **settings)
"""


@needs_mpi
def test_what_was_due_is_written_before_a_rank_can_die_in_the_next_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(2, WRITES_LONG, "dies", timeout=PROMPT).returncode != 0
    done = run(2, WRITES_LONG, "goes on", timeout=PROMPT)
    assert done.stdout.split() == ["2", "3"], done.stderr


@needs_mpi
def test_the_command_trains_by_ranks_and_only_the_first_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "import sys; from gpuml.cli import main; sys.exit(main())"
    monkeypatch.setenv("GPUML_DEVICE", "cpu")
    assert cli.main(["train", "--epochs", "2"]) == 0
    done = run(2, code, "train", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for n, text in ((1, capsys.readouterr().out), (2, done.stdout)):
        assert text.count("device ") == 1
        assert ("trained by 2 ranks" in text) == (n == 2)
    names = (f"runs/{n:03d}/model.safetensors" for n in (1, 2))
    models = [gpuml.load_model(name, device="cpu") for name in names]
    assert sorted(os.listdir("runs")) == ["001", "002"]
    a, b = (model.parameters.flat for model in models)
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)

    done = run(2, code, "train", "no.csv", timeout=PROMPT)
    assert done.returncode == 2
    assert done.stderr == "gpuml: there is no file no.csv\n"
    done = run(2, code, "train", "--output", "runs/001", timeout=PROMPT)  # which rank 0 alone sees
    assert done.returncode == 2
    assert done.stderr == (
        f"gpuml: --output {Path('runs/001')} holds another run: --overwrite replaces it\n"
    )
    assert sorted(os.listdir("runs")) == ["001", "002"]
