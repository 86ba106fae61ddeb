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
    poll, ranks = select.poll(), {}
    for text in sys.argv[2:]:
        rank, pid = map(int, text.split(":"))
        try:
            number = os.pidfd_open(pid)
        except OSError:  # it has ended already, or Linux is too old
            continue
        ranks[number] = rank, pid
        poll.register(number, select.POLLIN)
    said = False
    while ranks:
        for number, _ in poll.poll():
            poll.unregister(number)
            rank, pid = ranks.pop(number)
            # Once a rank has ended in order, mpiexec may have ended the others.
            said |= any(folder.iterdir())
            if not said:
                said = True
                where = f"process {pid} on {socket.gethostname()}"
                text = f"gpuml: rank {rank} ({where}) was killed, or crashed: all ranks end\n"
                with suppress(OSError):  # nobody may listen any more
                    os.write(2, text.encode())
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
