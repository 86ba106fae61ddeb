"""Gradients that several ranks add up: in buckets, while the backward pass goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from gpuml import gpu_layers
from gpuml.devices import Array, device_of
from gpuml.distributed import Communicator
from gpuml.models import Parameters
from gpuml.peer_copies import MOST_BUCKETS

# Layers are put together until they fill a bucket: below some megabytes a sum over GPUs takes as
# long as its latency (the last table of tests/benchmarks/gpu_ranks.py).
BUCKET_BYTES = 4 * 2**20


class Buckets(Parameters):
    """The gradients of one rank, and room for its loss; then their sums over all ranks.

    Parameters lie in the order of the layers, and the backward pass begins with the last: so does
    the first bucket, and the loss, known before any gradient, goes with it. On a GPU a bucket is
    added up, on a stream of its own, as soon as all that it holds has been written.

    Parameters
    ----------
    parameters : Parameters
        Those whose gradients these are.
    communicator : Communicator
    bucket_bytes : int
        Least size of a bucket.
    apart : bool
        Whether gradients of the ranks may stay apart, to be added by who uses them: they are
        fetched by copies then, where GPUs can do so.
    follow : callable, optional
        Called on a GPU with the number of a bucket whose sums are there in the current stream, to
        queue what does not wait for the rest of the backward pass. It is for models that need no
        parameter any more, of which gradients are written, once they have written others.

    Attributes
    ----------
    sums : array of shape (n_parameters + 1,)
        All gradients, and the loss.
    addends : list of array
        What makes the sums: that array alone, or those of all ranks.
    divisor : int
        By which the sum of the addends is to be divided.
    under_way : bool
        Whether other ranks may be reading these gradients.
    slices : list of slice
        The parameters of each bucket, the last layers' first.
    """

    def __init__(
        self,
        parameters: Parameters,
        communicator: Communicator,
        bucket_bytes: int = BUCKET_BYTES,
        *,
        apart: bool = False,
        follow: Callable[[int], None] | None = None,
    ) -> None:
        device = device_of(parameters.flat)
        n, dtype = parameters.flat.size + 1, parameters.flat.dtype
        self.divisor = 1
        self._peers = None
        if apart and device.kind == "gpu":
            self._peers = communicator.peer_copies(n * dtype.itemsize)
        if self._peers is None:
            self.sums = device.xp.zeros(n, dtype)
            self.addends = [self.sums]
        else:
            self.addends = self._peers.arrays(n, dtype)
            self.sums = self.addends[communicator.rank]
        super().__init__(self.sums[:-1], parameters.shapes)
        self._communicator = communicator
        self._stream: Any = None
        self._follow, self._followed = follow, 0  # buckets, from the first on
        self._mean = self.under_way = False
        on_gpu = device.kind == "gpu"
        # A CPU has nobody to carry messages while it computes.
        least = max(bucket_bytes // self.sums.itemsize, -(-n // (MOST_BUCKETS - 1)))
        least = least if on_gpu else n
        self.slices, names = _cut(parameters, least)
        self._bucket_of = {name: i for i, group in enumerate(names) for name in group}
        self._sizes = [len(group) for group in names]
        self._missing: list[int] = []  # of each bucket; empty unless sums are wanted
        if on_gpu:
            cuda = device.xp.cuda
            self._stream, self._beside = _urgent_stream(cuda), cuda.Stream(non_blocking=True)
            self._written, self._added, self._free = (
                [cuda.Event(disable_timing=True) for _ in names] for _ in range(3)
            )

    def make_free(self) -> None:
        """Wait, on the device, until nobody reads these gradients any more."""
        if self._peers is not None and self.under_way:
            self._peers.wait_until_taken(self._current())
        self.under_way = False

    def begin(self, loss: Array, *, mean: bool = False) -> None:
        """Note the loss; from now on gradients that are written are added up, or averaged."""
        self.make_free()
        if self._peers is not None:
            self.divisor = self._communicator.world_size if mean else 1
        self.sums[-1:] = loss
        self._mean, self._followed = mean, 0
        self._missing = list(self._sizes)

    def written(self, *names: str) -> None:
        """Say that gradients are complete."""
        if not self._missing or self._stream is None:
            return
        if self._follow is not None:
            self._let_follow(self._follow)
        for name in names:
            bucket = self._bucket_of.get(name)
            if bucket is not None:
                self._missing[bucket] -= 1
                if not self._missing[bucket]:
                    self._send(bucket)

    def added(self) -> Iterator[int]:
        """Yield the number of each bucket once work queued from then on sees its sums.

        Those that were followed are left out.
        """
        if self._stream is None:
            self._communicator.all_reduce(self.sums, mean=self._mean)
            self._missing = []
            yield from range(len(self.slices))
            return
        for bucket, missing in enumerate(self._missing):
            if missing:  # a model of one's own need not say what it has written
                self._send(bucket)
        self._missing = []
        if self._peers is not None:
            self._peers.finish(self._stream)
            self._stream.record(self._added[-1])  # a capture has to end with it
        compute = self._current()
        self.under_way = True
        for bucket in range(self._followed, len(self.slices)):
            compute.wait_event(self._added[bucket])
            yield bucket
        if self._followed:
            self._beside.record(self._free[-1])
            compute.wait_event(self._free[-1])

    def _let_follow(self, follow: Callable[[int], None]) -> None:
        """Queue what follows the buckets that are on their way, beside the backward pass."""
        while self._followed < len(self.slices) - 1 and not self._missing[self._followed]:
            bucket = self._followed
            self._current().record(self._free[bucket])
            self._beside.wait_event(self._free[bucket])
            self._beside.wait_event(self._added[bucket])
            with self._beside:
                follow(bucket)
            self._followed += 1

    def _send(self, bucket: int) -> None:
        self._missing[bucket] = 0
        part = self.slices[bucket]
        stop = part.stop + (bucket == 0)  # the loss
        self._current().record(self._written[bucket])
        self._stream.wait_event(self._written[bucket])
        if self._peers is not None:
            size = self.sums.itemsize
            self._peers.exchange(bucket, part.start * size, stop * size, self._stream)
        else:
            with self._stream:
                self._communicator.all_reduce(self.sums[part.start : stop], mean=self._mean)
        self._stream.record(self._added[bucket])

    def loss(self) -> Array:
        """Return the loss on all ranks, once the first bucket is there."""
        if len(self.addends) == 1:
            return self.sums[-1]
        return gpu_layers.summed([addend[-1] for addend in self.addends], self.divisor)

    @staticmethod
    def _current() -> Any:
        import cupy

        return cupy.cuda.get_current_stream()


def _urgent_stream(cuda: Any) -> Any:
    """Return a stream whose kernels go before those that wait elsewhere for a place."""
    return cuda.Stream(non_blocking=True, priority=-5)  # CUDA takes the highest there is


def part_of(parameters: Parameters, part: slice) -> Parameters:
    """Return those parameters that lie in a part of the vector, which must hold them whole."""
    shapes, start = {}, 0
    for name, shape in parameters.shapes.items():
        if part.start <= start < part.stop:
            shapes[name] = shape
        start += math.prod(shape)
    found = Parameters(parameters.flat[part], shapes)
    if parameters.rounded is not None:
        found.rounded = Parameters(parameters.rounded.flat[part], shapes)
    return found


def _cut(parameters: Parameters, least: int) -> tuple[list[slice], list[list[str]]]:
    """Return buckets of so many numbers at least, from the end on, and the names in each."""
    stop = start = parameters.flat.size
    slices, names, group = [], [], []
    for name in reversed(parameters.shapes):
        start -= math.prod(parameters.shapes[name])
        group.append(name)
        if start == 0 or stop - start >= least:
            slices.append(slice(start, stop))
            names.append(group)
            stop, group = start, []
    return slices, names
