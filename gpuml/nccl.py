"""Sums over the GPUs of several ranks by NCCL, the NVIDIA collective communications library."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from gpuml.devices import Array
from gpuml.errors import DistributedError

# NCCL's numbers for element types, by NumPy's names.
TYPES = {"int32": 2, "int64": 4, "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
SUM, MEAN = 0, 4


class Nccl:
    """The current GPUs of all ranks, one each, connected for sums.

    Parameters
    ----------
    rank, world_size : int
    gather : callable
        As :meth:`gpuml.distributed.Communicator.gather`; it passes on which GPUs these are.

    Raises
    ------
    DistributedError
        On all ranks, if two share a GPU, or one has no NCCL; the message names them.
    """

    def __init__(self, rank: int, world_size: int, gather: Callable[[Any], list[Any]]) -> None:
        from cupy.cuda import Device, nccl, runtime

        device = Device().id
        there = bool(getattr(nccl, "available", True)) and hasattr(nccl, "NcclCommunicator")
        place = [socket.gethostname(), runtime.deviceGetPCIBusId(device)]
        token = list(nccl.get_unique_id()) if there and rank == 0 else None
        told = gather([there, place, device, runtime.getDeviceCount(), token])
        lacking = [i for i, (found, *_) in enumerate(told) if not found]
        if lacking:
            raise DistributedError(
                f"{_ranks(lacking)} cannot load NCCL, which adds up over GPUs: pip install "
                "nvidia-nccl-cu13, or -cu12, as CuPy's version; or set GPUML_DEVICE=cpu"
            )
        for _, its_place, number, count, _ in told:
            sharing = [i for i, (_, other, *_) in enumerate(told) if other == its_place]
            if len(sharing) > 1:
                raise DistributedError(
                    f"{_ranks(sharing)} share gpu:{number} of {its_place[0]}, where {count} can "
                    "be seen: NCCL needs one for each rank. Start fewer ranks, or train on CPUs: "
                    "GPUML_DEVICE=cpu"
                )
        self._comm = nccl.NcclCommunicator(world_size, bytes(told[0][-1]), rank)

    def all_reduce(self, array: Array, *, mean: bool = False) -> None:
        """Queue on the current stream that an array becomes the sum of those of all ranks.

        Parameters
        ----------
        array : cupy.ndarray
            C-contiguous, of the same shape and type on all ranks.
        mean : bool
            Whether the sum is divided by the number of ranks.

        Raises
        ------
        TypeError
            If it is of a type that cannot be added up, or not contiguous.
        """
        from cupy.cuda import get_current_stream

        number = TYPES.get(array.dtype.name)
        if number is None or not array.flags.c_contiguous:
            raise TypeError(f"cannot add up {array.dtype} over GPUs, or the array has gaps")
        place = array.data.ptr
        kind, stream = MEAN if mean else SUM, get_current_stream().ptr
        self._comm.allReduce(place, place, array.size, number, kind, stream)


def _ranks(numbers: list[int]) -> str:
    names = [str(number) for number in numbers]
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"
