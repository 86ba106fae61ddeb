"""The whole suite on more than one core, and the tests that bear no company: alone all the same.

With pytest-xdist, `pytest` shares the files among some processes. Named files, `-k`, `-s`, `--pdb`
and the like stay in one process, as does everything where pytest-xdist is missing. `-n 0` keeps
the whole suite in one, `-n 8` takes eight.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MOST = 4  # processes: each holds a good half of a GiB, and a notebook's kernel besides
# Few tests, but long ones.
LONG = ("test_browser.py", "test_site.py", "test_nbgrader.py", "test_copies.py")
IN_ONE = ("usepdb", "trace", "collectonly", "keyword", "lf", "stepwise")
IN_ONE += ("showfixtures", "show_fixtures_per_test", "setupplan")
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_worker(config: pytest.Config) -> bool:
    """Say whether this process runs what another one shares out."""
    return hasattr(config, "workerinput")


def is_shared_out(config: pytest.Config) -> bool:
    """Say whether the tests asked for are many, and nothing keeps them in one process."""
    option = config.option
    if fcntl is None or is_worker(config) or not hasattr(option, "numprocesses"):
        return False
    told = option.numprocesses is not None or option.tx or option.dist != "no"
    if told or option.capture == "no" or any(getattr(option, name, None) for name in IN_ONE):
        return False
    return any((config.invocation_params.dir / name).is_dir() for name in config.args)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before pytest-xdist reads its options: set them."""
    option = config.option
    if is_shared_out(config) and cores() > 1:
        option.numprocesses = min(cores(), MOST)
    if is_worker(config) or not getattr(option, "numprocesses", None):
        return
    if option.dist == "no" and not option.distload:
        option.dist = "loadfile"  # a notebook is a file too
        option.loadscopereorder = False  # but as below
    if isinstance(option.numprocesses, int):
        for name in THREADS:
            os.environ.setdefault(name, str(max(1, cores() // option.numprocesses)))


class Turns:
    """Two locks of the operating system: a test marked `alone` runs while no other one does.

    Many hold `room` together, or one holds it alone. Whoever waits for it holds `door`, so that
    those who come later wait behind. If a process dies, its locks are gone.
    """

    def __init__(self, folder: Path) -> None:
        self.door, self.room = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in ("door", "room")
        )

    @contextmanager
    def taken(self, alone: bool) -> Iterator[None]:
        """Hold the room."""
        try:
            fcntl.flock(self.door, fcntl.LOCK_EX)
            fcntl.flock(self.room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(self.door, fcntl.LOCK_UN)
            yield
        finally:
            fcntl.flock(self.room, fcntl.LOCK_UN)
            fcntl.flock(self.door, fcntl.LOCK_UN)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Files that take long come first, so that all processes are done at about one time."""
        files = [item.nodeid.split("::")[0] for item in items]
        sizes = Counter(files)

        def place(file: str) -> tuple[bool, bool, int]:
            return not file.endswith(LONG), not file.endswith(".ipynb"), -sizes[file]

        order = sorted(range(len(items)), key=lambda i: place(files[i]))
        items[:] = [items[i] for i in order]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        """Hold the room for one test: its fixtures, itself, and what it leaves to be closed."""
        with self.taken(item.get_closest_marker("alone") is not None):
            return (yield)


class Run:
    """The folder of one run: the locks, told to each worker, and compiled modules."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="gpuml-tests-")
        if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
            # Else each of the many processes that tests start compiles NumPy and the like anew.
            os.environ.setdefault("PYTHONPYCACHEPREFIX", f"{self.folder}/bytecode")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        """Tell a worker where the locks are."""
        node.workerinput["locks"] = self.folder

    def pytest_unconfigure(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Tests take turns, be they in modules, docstrings or notebooks."""
    if not is_worker(config):
        config.pluginmanager.register(Run())
    elif fcntl and "locks" in config.workerinput:
        config.pluginmanager.register(Turns(Path(config.workerinput["locks"])))
