"""Sums over the GPUs of one host by their copy engines, which leave the processors to products.

NCCL adds up by kernels. Those wait for a place beside large products, and take it from them. Here
each GPU fetches what the others have by direct copies over the bus between them, and adds it where
it is used. Flags in device memory say what is ready and what has been taken, so that neither the
host nor a kernel waits, and all of it can be captured in a graph.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

from gpuml.devices import Array

# Each rank fetches all gradients of each other: of more ranks NCCL's rings move less.
MOST_RANKS = 4
MOST_BUCKETS = 1024
ALIGNED = 512
LAZY_PEER_ACCESS, ANY_COPY, WAIT_EQUAL = 1, 4, 1


class PeerCopies:
    """Memory of each rank's GPU that the other ranks can read.

    Parameters
    ----------
    rank, world_size : int
    gather : callable
        As :meth:`gpuml.distributed.Communicator.gather`.
    n_bytes : int
        Of the memory; the same on all ranks.

    Attributes
    ----------
    works : bool
        Whether all ranks can read each other's memory; the same on all.
    """

    def __init__(
        self, rank: int, world_size: int, gather: Callable[[Any], list[Any]], n_bytes: int
    ) -> None:
        self.n_bytes, self._rank, self._gather = n_bytes, rank, gather
        self._others: list[int] = []
        self._flags = -(-n_bytes // ALIGNED) * ALIGNED  # behind the memory
        self._opened: dict[int, int] = {}
        handle: list[int] = []
        with suppress(Exception):  # CUDA has many ways to say no
            handle = self._take(world_size)
        told = gather([socket.gethostname(), handle])
        can = all(host == told[0][0] and its for host, its in told)
        if can:
            try:
                self._open([bytes(its) for _, its in told])
            except Exception:
                can = False
        self.works = all(gather(can))

    def _take(self, world_size: int) -> list[int]:
        """Take the memory; return what lets other processes open it."""
        import cupy
        from cupy.cuda import memory, runtime

        _stream_operations()
        n_flags = world_size * MOST_BUCKETS + world_size + 1
        block = memory.Memory(self._flags + 4 * n_flags)  # not of a pool
        self._place = memory.MemoryPointer(block, 0)
        self._all_flags = cupy.ndarray(n_flags, np.uint32, self._place + self._flags)
        self._world_size = world_size
        self._lower()
        return list(runtime.ipcGetMemHandle(block.ptr))

    def _open(self, handles: list[bytes]) -> None:
        """Open the memory of the others, and take room for what is fetched."""
        import cupy
        from cupy.cuda import runtime

        n = self._world_size
        self._others = [(self._rank + i) % n for i in range(1, n)]  # not all from the same
        for other in self._others:
            self._opened[other] = runtime.ipcOpenMemHandle(handles[other], LAZY_PEER_ACCESS)
        self._fetched = {other: cupy.empty(self.n_bytes, np.uint8) for other in self._others}

    def _lower(self) -> None:
        """Lower all flags; the last one stays up, which is copied to the flags of others."""
        from cupy.cuda import runtime

        self._all_flags.fill(0)
        self._all_flags[-1:].fill(1)
        runtime.deviceSynchronize()

    def begin_anew(self) -> None:
        """Forget what was exchanged; all ranks must."""
        from cupy.cuda import runtime

        runtime.deviceSynchronize()
        self._gather(None)  # nobody writes any more
        self._lower()
        self._gather(None)  # nobody writes yet

    def close(self) -> None:
        """Let go of the memory of others; all ranks must, before any gives back its own."""
        from cupy.cuda import runtime

        for place in self._opened.values():
            runtime.ipcCloseMemHandle(place)
        self._opened = {}

    def arrays(self, n: int, dtype: Any) -> list[Array]:
        """Return the first n numbers of the memory of each rank: this one's, and copies."""
        import cupy

        own = cupy.ndarray(n, dtype, self._place)
        fetched = {
            rank: cupy.ndarray(n, dtype, memory.data) for rank, memory in self._fetched.items()
        }
        return [(fetched | {self._rank: own})[rank] for rank in range(self._world_size)]

    def exchange(self, bucket: int, start: int, stop: int, stream: Any) -> None:
        """Queue that these bytes are fetched from all others, once they are ready there."""
        from cupy.cuda import runtime

        wait, write = _stream_operations()
        for other in self._others:
            self._raise_flag(other, self._ready(self._rank, bucket), stream)
        for other in self._others:
            flag = self._place.ptr + self._ready(other, bucket)
            wait(stream.ptr, flag, 1, WAIT_EQUAL)
            write(stream.ptr, flag, 0, 0)
            there, here = self._opened[other] + start, self._fetched[other].data.ptr + start
            runtime.memcpyAsync(here, there, stop - start, ANY_COPY, stream.ptr)

    def finish(self, stream: Any) -> None:
        """Queue that the others are told that all has been fetched, after the last bucket."""
        for other in self._others:
            self._raise_flag(other, self._taken(self._rank), stream)

    def wait_until_taken(self, stream: Any) -> None:
        """Queue that what follows waits until all others have fetched all buckets."""
        wait, write = _stream_operations()
        for other in self._others:
            flag = self._place.ptr + self._taken(other)
            wait(stream.ptr, flag, 1, WAIT_EQUAL)
            write(stream.ptr, flag, 0, 0)

    def _ready(self, rank: int, bucket: int) -> int:
        return self._flags + 4 * (rank * MOST_BUCKETS + bucket)

    def _taken(self, rank: int) -> int:
        return self._ready(self._world_size, rank)

    def _raise_flag(self, other: int, flag: int, stream: Any) -> None:
        from cupy.cuda import runtime

        one = self._place.ptr + self._ready(self._world_size, self._world_size)
        runtime.memcpyAsync(self._opened[other] + flag, one, 4, ANY_COPY, stream.ptr)


@cache
def _stream_operations() -> tuple[Any, Any]:
    """Return CUDA's functions that wait for, and write, a number of 32 bits in a stream."""
    library = ctypes.CDLL("libcuda.so.1")
    arguments = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]

    def checked(name: str) -> Callable[..., None]:
        function = getattr(library, name)
        function.argtypes = arguments

        def call(*given: int) -> None:
            code = function(*given)
            if code:
                raise RuntimeError(f"{name} failed: CUDA error {code}")

        return call

    return checked("cuStreamWaitValue32_v2"), checked("cuStreamWriteValue32_v2")
