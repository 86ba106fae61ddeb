"""What each notebook needs: seconds from an empty kernel to its last cell, and memory.

Executes them one after the other and writes nothing. The table of notebooks/README.md is made of
these lines:

    python tests/benchmarks/notebooks.py
    GPUML_DEVICE=gpu python tests/benchmarks/notebooks.py 04

Memory of the host is that of the kernel and all processes it starts, memory of the GPU what its
driver has given to all programs, CUDA's own included, less what it had given before; both at
most, looked at many times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient

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


def executed(path: Path, device: gpuml.Device) -> tuple[float, int, int]:
    """Return seconds, and bytes of the host and of the device."""
    notebook = nbformat.read(path, as_version=4)
    watcher = Watcher()
    watcher.start()
    with gpuml.watch_memory(device) as used:
        start = time.perf_counter()
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": HOME}}).execute()
        seconds = time.perf_counter() - start
    return seconds, watcher.stop(), used.most if device.kind == "gpu" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="such as 04; all of them unless given")
    numbers = parser.parse_args().numbers
    device = gpuml.get_device()
    print(device)
    print("| notebook | seconds | host, GB | GPU, GB |\n|---|---|---|---|")
    for path in sorted(HOME.glob("[0-9][0-9]_*.ipynb")):
        if numbers and path.name[:2] not in numbers:
            continue
        seconds, host, on_gpu = executed(path, device)
        shown = f"{on_gpu / 1e9:.1f}" if on_gpu else "–"
        print(f"| {path.stem} | {seconds:.0f} | {host / 1e9:.1f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
