"""Says which rank died: a small process on each host, apart from the ranks, that watches them.

    python watcher.py FOLDER RANK:PID …

A rank that is killed, or crashes, can say nothing; ``mpiexec`` ends the others at once and names a
process number. A rank that ends in order leaves a file of its name in the folder. Linux only.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path


def main() -> None:
    """Wait until all ranks have ended; say which was the first that did so without a word."""
    folder = Path(sys.argv[1])
    poll, ranks, gone = select.poll(), {}, []
    for text in sys.argv[2:]:
        rank, pid = map(int, text.split(":"))
        try:
            number = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended already
            gone.append((rank, pid))
        except OSError:  # Linux is too old
            continue
        else:
            ranks[number] = rank, pid
            poll.register(number, select.POLLIN)
    said = False
    while ranks or gone:
        # Who was not there any more at the start need not have been the first that ended.
        for number, _ in poll.poll(0 if gone else None) if ranks else ():
            poll.unregister(number)
            gone.append(ranks.pop(number))
        # Once a rank has ended in order, mpiexec may have ended the others.
        said |= any(folder.iterdir())
        if gone and not said:
            said = True
            with suppress(OSError):  # nobody may listen any more
                os.write(
                    2, f"gpuml: {named(gone)} was killed, or crashed: all ranks end\n".encode()
                )
        gone = []
    shutil.rmtree(folder, ignore_errors=True)


def named(gone: list[tuple[int, int]]) -> str:
    """Name the first rank that ended; or some, if mpiexec ended others before we could look."""
    names = [f"{rank} (process {pid} on {socket.gethostname()})" for rank, pid in sorted(gone)]
    return f"rank {names[0]}" if len(names) == 1 else f"one of the ranks {', '.join(names)}"


if __name__ == "__main__":
    main()
