"""What each notebook needs: seconds from an empty kernel to its last cell, and memory.

Executes them one after the other and writes nothing. The table of notebooks/README.md is made of
these lines:

    python tests/benchmarks/notebooks.py
    GPUML_DEVICE=gpu python tests/benchmarks/notebooks.py 04

A class on one GPU: thirty students, who all begin at the same moment, each with the next notebook
of the list:

    export CUPY_GPU_MEMORY_LIMIT=2147483648
    GPUML_DEVICE=gpu python tests/benchmarks/notebooks.py --students 30

Memory of the host is that of the kernel and all processes it starts, memory of the GPU what its
driver has given to all programs, CUDA's own included, less what it had given before; both at
most, looked at many times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

import gpuml

HOME = Path(__file__).parent.parent.parent / "notebooks"


class Watcher(threading.Thread):
    """Watch the memory of all processes below this one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            now = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    now += process.memory_info().rss
            self.most = max(self.most, now)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most


def executed(path: Path, attempts: int = 3) -> tuple[str, float]:
    """Return what failed, if anything, and the seconds until then."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": HOME}})
    start = time.perf_counter()
    try:
        client.execute()
        failed = ""
    except (CellExecutionError, CellTimeoutError) as error:
        failed = str(error).strip()
    except RuntimeError as error:  # the kernel died
        # Before its first cell: another program took the port that was free when it was chosen.
        if "before replying" in str(error) and attempts > 1:
            return executed(path, attempts - 1)
        failed = str(error)
    return failed, time.perf_counter() - start


def measured(paths: list[Path], device: gpuml.Device) -> tuple[list[tuple[str, float]], str]:
    """Execute notebooks at the same time; return what became of them, and GB used at most."""
    watcher = Watcher()
    watcher.start()
    with gpuml.watch_memory(device) as used, ThreadPoolExecutor(len(paths)) as pool:
        results = list(pool.map(executed, paths))
    on_gpu = f"{used.most / 1e9:.1f}" if device.kind == "gpu" else "–"
    return results, f"{watcher.stop() / 1e9:.1f} | {on_gpu}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="such as 04; all of them unless given")
    parser.add_argument("--students", type=int, metavar="N", help="N kernels at the same time")
    arguments = parser.parse_args()
    paths = sorted(HOME.glob("[0-9][0-9]_*.ipynb"))
    paths = [p for p in paths if not arguments.numbers or p.name[:2] in arguments.numbers]
    device = gpuml.get_device()
    print(device)
    failures = {}
    if arguments.students:
        sitting = list(itertools.islice(itertools.cycle(paths), arguments.students))
        results, memory = measured(sitting, device)
        print("| notebook | seconds |\n|---|---|")
        for path, (failed, seconds) in zip(sitting, results, strict=True):
            print(f"| {path.stem} | {seconds:.0f} |")
            failures |= {path.stem: failed} if failed else {}
        print(f"\nAll of them, host and GPU, GB: {memory}")
    else:
        print("| notebook | seconds | host, GB | GPU, GB |\n|---|---|---|---|")
        for path in paths:
            [(failed, seconds)], memory = measured([path], device)
            print(f"| {path.stem} | {seconds:.0f} | {memory} |", flush=True)
            failures |= {path.stem: failed} if failed else {}
    for name, failed in failures.items():
        print(f"\n{name} failed:\n{failed}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
