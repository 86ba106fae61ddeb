"""Tests share the cores, and those marked `alone` have them for themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import parallel
import pytest

pytest.importorskip("xdist")
pytest_plugins = ["pytester"]
pytestmark = pytest.mark.skipif(parallel.fcntl is None, reason="needs POSIX locks")

LOGGED = """
import json, os, time
import pytest

def logged(name, seconds):
    start = time.monotonic()
    time.sleep(seconds)
    with open("log", "a") as file:
        file.write(json.dumps([name, os.getpid(), start, time.monotonic()]) + "\\n")
"""
TOGETHER = """
from logged import logged
import pytest

@pytest.fixture
def slow():
    logged("together", 0.05)
    yield
    logged("together", 0.05)

@pytest.mark.parametrize("i", range(6))
def test_together(i, slow):
    logged("together", 0.1)

def test_failing():
    logged("together", 0.1)
    raise ValueError

def function():
    '''
    >>> logged("together", 0.2)
    '''
"""
ALONE = """
import os
from logged import logged
import pytest

pytestmark = pytest.mark.alone

@pytest.fixture
def slow():
    logged("alone", 0.05)
    yield
    logged("alone", 0.05)

@pytest.fixture
def broken():
    raise ValueError

@pytest.fixture
def broken_later():
    yield
    raise ValueError

@pytest.mark.parametrize("i", range(3))
def test_alone(i, slow):
    logged("alone", 0.1)

def test_failing():
    raise ValueError

def test_broken_before(broken):
    pass

def test_broken_after(broken_later):
    pass

def test_a_child_lives_on():
    if not os.fork():
        os.close(1), os.close(2)
        logged("child", 4)
        os._exit(0)

def test_later(slow):
    logged("alone", 0.1)
"""
INI = "[pytest]\naddopts = --doctest-modules\nmarkers = alone: alone\n"


@pytest.fixture(autouse=True)
def _number_of_threads_is_put_back(monkeypatch):
    for name in parallel.THREADS:
        monkeypatch.setenv(name, "said")


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Run pytest in a folder of its own, on the files of a small suite."""
    for name in list(os.environ):
        if name.startswith("PYTEST_"):
            monkeypatch.delenv(name)
    shutil.copy(parallel.__file__, tmp_path)
    hooks = "from parallel import pytest_cmdline_main, pytest_configure\n"
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "pytest.ini").write_text(INI)
    (tmp_path / "logged.py").write_text(LOGGED)

    class Suite:
        folder = tmp_path
        environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}

        def add(self, **files):
            for name, text in files.items():
                (tmp_path / f"{name}.py").write_text(text)

        def call(self, *arguments):
            plain = "-p", "no:nbval", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"
            return [sys.executable, "-m", "pytest", "-q", *plain, *arguments]

        def run(self, *arguments):
            return subprocess.run(
                self.call(*arguments),
                cwd=tmp_path,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=60,
            )

        def log(self):
            return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

        def left(self):
            return [path.name for path in tmp_path.glob("gpuml-tests-*")]

    return Suite()


def overlapping(log, kinds):
    """Pairs of what happened at the same time."""
    return [
        (a, b)
        for i, a in enumerate(log)
        for b in log[:i]
        if {a[0], b[0]} == kinds and a[2] < b[3] and b[2] < a[3]
    ]


def test_those_alone_are_alone_and_the_others_are_not(suite):
    suite.add(test_a=TOGETHER, test_b=ALONE, test_c=TOGETHER, test_d=ALONE)
    done = suite.run("-n", "3", "--dist", "loadfile")
    assert "4 failed, 26 passed, 4 errors" in done.stdout, done.stdout
    log = suite.log()
    assert len({line[1] for line in log if line[0] != "child"}) == 3
    assert overlapping(log, {"together"})
    assert overlapping(log, {"child", "together"}), "it has not taken the lock with it"
    assert not overlapping(log, {"alone"})
    assert not overlapping(log, {"alone", "together"})
    assert not suite.left()


DYING = """
import os, sys
from pathlib import Path
import parallel

with parallel.Turns(Path(sys.argv[1])).taken(alone=True):
    os._exit(3)
"""


def test_a_process_that_dies_leaves_no_lock(tmp_path):
    call = [sys.executable, "-c", DYING, str(tmp_path)]
    folder = Path(parallel.__file__).parent
    assert subprocess.run(call, cwd=folder, timeout=60).returncode == 3
    with parallel.Turns(tmp_path).taken(alone=True):
        pass


def test_whoever_waits_to_be_alone_is_let_in_before_those_who_come_later(tmp_path):
    """Else two processes with many short tests would never leave it a gap."""
    order = []
    first, late, alone = (parallel.Turns(tmp_path) for _ in range(3))
    with first.taken(alone=False):

        def enter(turns, name, is_alone):
            with turns.taken(is_alone):
                order.append(name)

        threads = []
        for turns, name, is_alone in ((alone, "alone", True), (late, "late", False)):
            thread = threading.Thread(target=enter, args=(turns, name, is_alone), daemon=True)
            threads.append(thread)
            thread.start()
            time.sleep(0.2)
        assert order == []
    for thread in threads:
        thread.join(timeout=10)
    assert order == ["alone", "late"]


@pytest.mark.parametrize(
    ("arguments", "shared"),
    [
        ([], True),
        (["tests"], True),
        (["tests/test_a.py", "tests", "-q", "-x", "-m", "not alone"], True),
        (["tests/test_a.py"], False),
        (["tests/test_a.py", "tests/test_b.py::test_b"], False),
        (["-k", "test"], False),
        (["-s"], False),
        (["--pdb"], False),
        (["--lf"], False),
        (["--collect-only"], False),
        (["--fixtures"], False),
        (["-n", "0"], False),
        (["-n", "7"], False),
        (["-p", "no:xdist"], False),
    ],
)
def test_what_is_shared_out(pytester, monkeypatch, arguments, shared):
    pytester.mkdir("tests")
    pytester.makefile(".py", **{"tests/test_a": "", "tests/test_b": "def test_b(): pass"})
    assert parallel.is_shared_out(pytester.parseconfig(*arguments)) == shared


WORKER = """
import os

def test_{}():
    print(os.environ["PYTEST_XDIST_WORKER"], "of", os.environ["PYTEST_XDIST_WORKER_COUNT"])
    assert 0
"""


def test_a_plain_call_is_shared_out(suite):
    suite.add(test_a=WORKER.format("a"), test_b=WORKER.format("b"))
    with (suite.folder / "conftest.py").open("a") as file:
        file.write("import os\nos.sched_getaffinity = lambda _: {1, 5}\n")
    done = suite.run()
    assert "gw0 of 2" in done.stdout, done.stdout
    assert "gw1 of 2" in done.stdout


def test_modules_are_compiled_once_and_not_left_behind(monkeypatch):
    """Whoever wants no compiled modules gets none: but processes share them during the run."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "to be put back")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX")
    run = parallel.Run()
    code = "import colorsys; print(colorsys.__cached__)"
    file = Path(subprocess.check_output([sys.executable, "-c", code], text=True).strip())
    assert file.exists()
    assert file.is_relative_to(run.folder)
    run.pytest_unconfigure()
    assert not Path(run.folder).exists()


@pytest.mark.parametrize("n", [1, 2, 3, 64])
def test_processes_and_threads_share_the_cores(n, monkeypatch, pytester):
    monkeypatch.setattr(parallel, "cores", lambda: n)
    monkeypatch.delenv("OMP_NUM_THREADS")
    pytester.mkdir("tests")
    config = pytester.parseconfig("tests")
    parallel.pytest_cmdline_main(config)
    assert config.option.numprocesses == {1: None, 2: 2, 3: 3, 64: 4}[n]
    assert config.option.dist == ("no" if n == 1 else "loadfile")
    assert os.environ.get("OMP_NUM_THREADS") == {1: None, 2: "1", 3: "1", 64: "16"}[n]
    assert os.environ["OPENBLAS_NUM_THREADS"] == "said", "who has said it, has said it"


@pytest.mark.parametrize(
    ("arguments", "dist"),
    [
        (["-n", "12"], "loadfile"),
        (["-n", "0"], "no"),
        (["-n", "2", "--dist", "loadscope"], "loadscope"),
        (["-n", "2", "-d"], "no"),  # pytest-xdist makes it "load"
    ],
)
def test_no_notebook_is_torn_apart(pytester, arguments, dist):
    config = pytester.parseconfig(*arguments)
    parallel.pytest_cmdline_main(config)
    assert config.option.dist == dist


def test_what_takes_long_begins_first(tmp_path):
    names = ["a.py::c", "b.ipynb::Cell 1", "b.ipynb::Cell 0", "c.py::b", "c.py::a[::]"]
    names.append("tests/test_nbgrader.py::x")
    items = [SimpleNamespace(nodeid=name) for name in names]
    parallel.Turns(tmp_path).pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [names[i] for i in (5, 1, 2, 3, 4, 0)]


def test_no_name_of_a_test_has_an_address_in_it(request):
    """Else processes that share the tests would not find the same ones."""
    assert not [item.nodeid for item in request.session.items if " at 0x" in item.nodeid]


LONG = """
import subprocess, sys, time

def test_{}():
    open("started-{}", "w").close()
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
"""


def test_ctrl_c_ends_all_at_once(suite):
    suite.add(test_a=LONG.format("a", "a"), test_b=LONG.format("b", "b"))
    job = subprocess.Popen(
        suite.call("-n", "2", "--dist", "loadfile"),
        cwd=suite.folder,
        env=suite.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 30
    while len(list(suite.folder.glob("started-*"))) < 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does
    said, _ = job.communicate(timeout=20)
    assert job.returncode == pytest.ExitCode.INTERRUPTED, said
    limit = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while True:  # until none of them is left
            os.killpg(job.pid, 0)
            assert time.monotonic() < limit
            time.sleep(0.05)
    assert not suite.left()
