"""Several processes that do one work together: which am I, how many are we, and sums over all.

``mpiexec -n 4 python script.py`` starts four processes of one program, the **ranks**. MPI, the
message passing interface, lets them talk; which machines they run on is the business of mpiexec,
or of a scheduler. A process that is started without it is alone, and no MPI is loaded for it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from gpuml.devices import Array, cpu_count, device_of, processors
from gpuml.errors import DistributedError as DistributedError  # as others know it
from gpuml.nccl import Nccl
from gpuml.peer_copies import MOST_RANKS, PeerCopies

# In which launchers tell each process how many there are: MPICH, its relatives and Slurm (srun
# --mpi=pmi2), Open MPI, MVAPICH. By PMIx (srun --mpi=pmix) each is only told its number, and Slurm
# how many; that alone says nothing, since srun starts processes that are no ranks as well.
WORLD_SIZES = "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"
PMI_LINE = "PMI_FD"  # the number of an open socket
PMIX_RANK, SLURM_SIZE = "PMIX_RANK", "SLURM_STEP_NUM_TASKS"
MPICH_RANK = "MPI_LOCALRANKID"  # on its host; told by MPICH's mpiexec only
MARK = "GPUML_RANK"  # its process, for the processes that a rank starts

# Seconds that other ranks wait with an error which the first one may have as well.
HEAD_START = 1.0
PASSING_ON = 0.2  # that mpiexec needs to pass on what was said; at the end it drops the rest
ECHO = 0.5  # in which Ctrl-C reaches all ranks, once it has reached one
LOOKS = 0.02  # between two looks whether the others have ended

STOPPED = 130  # the exit code after Ctrl-C

Found = TypeVar("Found")

INSTALL = "pip install 'gpuml[distributed]'"


class Communicator(Protocol):
    """What ranks ask of each other. All of them ask the same, in the same order.

    Attributes
    ----------
    rank : int
        Which one this process is, counted from 0.
    world_size : int
        How many there are.
    n_threads : int
        Processor cores for each rank on this machine.
    """

    rank: int
    world_size: int
    n_threads: int

    def all_reduce(self, array: Array, *, mean: bool = False) -> None:
        """Replace an array by the sum, or the mean, of those of all ranks: the same bits on each.

        One of a GPU will be: that is queued on the current stream.
        """
        ...

    def gather(self, value: Any) -> list[Any]:
        """Return what all ranks gave, something that JSON can hold, by rank."""
        ...

    def peer_copies(self, n_bytes: int) -> PeerCopies | None:
        """Return memory of all ranks' GPUs that each can read; None where that cannot be."""
        ...

    def send(self, array: Array, rank: int) -> None:
        """Give an array to another rank, which must receive it."""
        ...

    def receive(self, array: Array, rank: int) -> None:
        """Fill an array with what another rank sends."""
        ...

    def first(self, n: int) -> Communicator | None:
        """Return the first n ranks as a communicator of their own; on the others, None."""
        ...

    def end_all(self, error: BaseException) -> None:
        """End all ranks at once, since this one cannot go on and the others would wait for it."""
        ...


class Alone:
    """The only process there is: sums are what they were."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.n_threads = cpu_count()

    def all_reduce(self, array: Array, *, mean: bool = False) -> None:
        """Leave an array as it is."""

    def gather(self, value: Any) -> list[Any]:
        """Return what this process gave."""
        return [value]

    def peer_copies(self, n_bytes: int) -> PeerCopies | None:
        """Return None: there is nobody else."""
        return None

    def send(self, array: Array, rank: int) -> None:
        """Do nothing: there is nobody else."""

    def receive(self, array: Array, rank: int) -> None:
        """Do nothing: there is nobody else."""

    def first(self, n: int) -> Communicator | None:
        """Return a communicator of this process."""
        return Alone()

    def end_all(self, error: BaseException) -> None:
        """Do nothing: nobody waits."""


class MpiRanks:
    """The processes of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    """

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        # Of our own, so that nothing mixes with what the user's program says. A rank that ends
        # answers what is asked by `gather`, which sums must not be mistaken for.
        self._mpi, self._comm, self._asking = MPI, comm.Dup(), comm.Dup()
        self.rank, self.world_size = int(comm.rank), int(comm.size)
        self._process, self._farewell = os.getpid(), Path(os.devnull)
        self._parted = False
        self._nccl: Nccl | None = None  # when the first array of a GPU comes
        self._peers: PeerCopies | Literal[False] | None = None
        here = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.n_threads = fair_share(here.allgather(sorted(processors())), here.rank)
        here.Free()

    def all_reduce(self, array: Array, *, mean: bool = False) -> None:
        """Replace an array by the sum of those of all ranks, with the same bits on each.

        Parameters
        ----------
        array : numpy.ndarray or cupy.ndarray
            C-contiguous, of the same shape and type on all ranks. One of a GPU is added up by
            NCCL, on the current stream; nothing waits for it.
        mean : bool
            Whether the sum is divided by the number of ranks.

        Raises
        ------
        DistributedError
            If NCCL cannot connect the GPUs.
        """
        if device_of(array).kind == "gpu":
            if self._nccl is None:
                self._nccl = Nccl(self.rank, self.world_size, self.gather)
            self._nccl.all_reduce(array, mean=mean)
            return
        self._comm.Allreduce(self._mpi.IN_PLACE, array)
        if mean:
            array /= self.world_size

    def gather(self, value: Any) -> list[Any]:
        """Return what all ranks gave, something that JSON can hold, by rank."""
        text = np.frombuffer(json.dumps(value, default=_plain).encode(), np.uint8)
        sizes, asked = self._ask(len(text))
        asked.Wait()
        if sizes.min() < 0:
            self._miss(sizes < 0)
        texts = np.empty(sizes.sum(), np.uint8)
        self._asking.Allgatherv(text, [texts, sizes])
        ends = np.cumsum(sizes)
        return [json.loads(part.tobytes()) for part in np.split(texts, ends[:-1])]

    def peer_copies(self, n_bytes: int) -> PeerCopies | None:
        """Return memory of all ranks' GPUs that each can read; None where that cannot be.

        It is kept for the next who asks for no more; what it held before is forgotten.
        """
        if self.world_size > MOST_RANKS or self._peers is False:
            return None
        if self._peers is None or self._peers.n_bytes < n_bytes:
            if self._peers is not None:
                self._peers.close()
                self.gather(None)
            self._peers = None  # the memory is given back before more is taken
            found = PeerCopies(self.rank, self.world_size, self.gather, n_bytes)
            self._peers = found if found.works else False
        else:
            self._peers.begin_anew()
        return self._peers or None

    def send(self, array: Array, rank: int) -> None:
        """Give an array of NumPy's, C-contiguous and below 2 GiB, to a rank that receives it."""
        self._comm.Send(_bytes(array), dest=rank)

    def receive(self, array: Array, rank: int) -> None:
        """Fill an array of NumPy's, C-contiguous, with what a rank sends."""
        self._comm.Recv(_bytes(array), source=rank)

    def _ask(self, size: int) -> tuple[np.ndarray[Any, Any], Any]:
        """Begin to exchange how long the texts of all ranks are; -1 is that of one that ends."""
        sizes = np.empty(self.world_size, np.int64)
        self._own_size = np.array([size])  # which must stay
        return sizes, self._asking.Iallgather(self._own_size, sizes)

    def _miss(self, ended: np.ndarray[Any, Any]) -> None:
        """End all, since ranks that have ended can take no part."""
        gone, there = np.flatnonzero(ended), np.flatnonzero(~ended)
        names = ", ".join(map(str, gone[:8])) + ", …" * (len(gone) > 8)
        which = f"rank {names} has" if len(gone) == 1 else f"ranks {names} have"
        error = DistributedError(f"{which} ended, as by sys.exit(), and the others go on")
        self._end_all(error, first=self.rank == there[0])

    def part(self) -> None:
        """Wait until all ranks are at their ends; a rank that asks for more is told who is not.

        Python is about to end this process, for whatever reason, and MPI would wait in silence.
        """
        if self._parted or os.getpid() != self._process:  # a child, made by os.fork
            return
        self._parted = True
        if not self._mpi.Is_finalized():
            with suppress(ValueError):  # in another thread than the first
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            _, asked = self._ask(-1)
            while not asked.Test():
                time.sleep(LOOKS)
        self._say_farewell()

    def first(self, n: int) -> Communicator | None:
        """Return the first n ranks as a communicator of their own; on the others, None."""
        color = 0 if self.rank < n else self._mpi.UNDEFINED
        part = self._comm.Split(color, self.rank)
        if self.rank >= n:
            return None
        return Alone() if n == 1 else type(self)(part)

    def watch(self) -> None:
        """Let a process on each host say which rank dies without a word, where Linux can tell."""
        if not hasattr(os, "pidfd_open"):
            return
        places = self.gather([socket.gethostname(), os.getpid()])
        here = [rank for rank, place in enumerate(places) if place[0] == places[self.rank][0]]
        first = here[0] == self.rank
        folders = self.gather(tempfile.mkdtemp(prefix="gpuml-ranks-") if first else "")
        folder = folders[here[0]]
        self._farewell = Path(folder, str(self.rank))
        if first:
            watched = [f"{rank}:{places[rank][1]}" for rank in here]
            call = [sys.executable, "-I", "-S", Path(__file__).with_name("watcher.py"), folder]
            nothing = subprocess.DEVNULL
            subprocess.Popen(
                [*call, *watched], stdin=nothing, stdout=nothing, start_new_session=True
            )

    def _say_farewell(self) -> None:
        with suppress(OSError):
            self._farewell.touch()

    def end_all(self, error: BaseException) -> None:
        """End all ranks at once, since this one cannot go on and the others would wait for it."""
        self._end_all(error, first=self.rank == 0)

    def _end_all(self, error: BaseException, *, first: bool) -> None:
        if not first:  # what ails all of them, the first one says
            time.sleep(HEAD_START)
        lines = "".join(traceback.format_exception(error))
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped:
            lines = "stopped by Ctrl-C\n"
        print(f"rank {self.rank} of {self.world_size} failed:\n{lines}", end="", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._say_farewell()
        time.sleep(PASSING_ON)
        code = STOPPED if stopped else 1
        try:
            self._mpi.COMM_WORLD.Abort(code)
        finally:  # it may return before mpiexec has ended this process
            time.sleep(HEAD_START)
            os._exit(code)


def _bytes(array: Array) -> Array:
    """Return the bytes of a C-contiguous array, whatever its type: MPI does not know all."""
    return array.reshape(-1).view(np.uint8)


def _plain(value: Any) -> Any:
    """Return a number of NumPy's as JSON knows it."""
    return value.item() if isinstance(value, np.generic) else str(value)


def fair_share(allowed: Sequence[Collection[int]], rank: int) -> int:
    """Return how many threads a rank may have, given on which processors each rank may run.

    Examples
    --------
    >>> fair_share([range(8), range(8)], 0), fair_share([range(4), range(4, 8)], 0)
    (4, 4)
    """
    everywhere = len(set().union(*allowed))
    return max(1, min(len(allowed[rank]), everywhere // len(allowed)))


def launched_size() -> int:
    """Return how many processes ``mpiexec`` says that it has started; 1 without it.

    A process that a rank starts inherits what mpiexec said, but not the line to mpiexec: it is
    alone.

    Raises
    ------
    DistributedError
        If the line is closed, and no rank has started this process.
    """
    sizes = [os.environ.get(name, "") for name in WORLD_SIZES]
    if not any(sizes) and PMIX_RANK in os.environ:
        sizes = [os.environ.get(SLURM_SIZE, "")]
    n = max([int(size) for size in sizes if size.isdecimal()], default=1)
    line = os.environ.get(PMI_LINE, "")
    if n == 1 or not line.isdecimal() or _is_socket(line):
        return n
    if MARK in os.environ:
        return 1
    raise DistributedError(
        f"{n} processes were started as ranks, and this one's line to mpiexec is closed: was it "
        "started by a script between the two? Let mpiexec start Python itself; or, if each is to "
        "train by itself, give train(…, communicator=gpuml.distributed.Alone()), or unset "
        + ", ".join(name for name in WORLD_SIZES if name in os.environ)
    )


def _is_socket(number: str) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(int(number)).st_mode)
    except (OSError, ValueError):
        return False


def launcher(n_ranks: int) -> list[str]:
    """Return the command that starts Python as n ranks; what they are to run comes behind it.

    Raises
    ------
    DistributedError
        If there is no MPI, neither beside Python nor on the path.
    """
    beside = Path(sys.executable).parent
    places = os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)])
    mpiexec = shutil.which("mpiexec", path=places)
    for name, found in (("mpiexec", mpiexec), ("mpi4py", find_spec("mpi4py"))):
        if found is None:
            raise DistributedError(f"there is no {name} to start {n_ranks} ranks: {INSTALL}")
    return [str(mpiexec), "-n", str(n_ranks), sys.executable]


@cache
def ranks() -> Communicator:
    """Return the ranks of which this process is one; it is alone unless ``mpiexec`` started it.

    An error that nobody catches, on whichever rank, then ends all of them: the others would wait
    for it forever. So does a rank that ends, by ``sys.exit`` or at the end of its program, while
    others begin to train; where they only have more to do by themselves, it waits for them.

    Returns
    -------
    Communicator

    Raises
    ------
    DistributedError
        If there are several processes, and mpi4py or its MPI library is missing or another one,
        or their lines to mpiexec are closed.

    Examples
    --------
    >>> ranks().world_size  # without mpiexec
    1
    """
    n = launched_size()
    if n == 1:
        return Alone()
    said = f"{n} processes were started as ranks"
    if find_spec("mpi4py") is None:
        raise DistributedError(f"{said}, and mpi4py is not installed: {INSTALL}")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # which of them depends on what is missing
        reason = str(error).strip().partition("\n")[0]
        raise DistributedError(
            f"{said}, and mpi4py finds no MPI library ({reason}): {INSTALL} brings one"
        ) from None
    world = MPI.COMM_WORLD
    if world.size != n:
        library = MPI.Get_library_version().partition("\n")[0].strip("\0 ")
        raise DistributedError(
            f"{said}, and mpi4py sees {world.size}: mpiexec belongs to another MPI than "
            f"that of mpi4py, which is {library}. Start them with the mpiexec beside Python, "
            f"{Path(sys.executable).with_name('mpiexec')}; or, if each is to train by itself, "
            "give train(…, communicator=gpuml.distributed.Alone())"
        )
    found = MpiRanks(world)
    os.environ[MARK] = str(os.getpid())
    _end_all_with_one(found)
    found.watch()
    atexit.register(found.part)
    return found


def _forget_the_others() -> None:
    for name in (*WORLD_SIZES, PMIX_RANK):
        os.environ.pop(name, None)
    ranks.cache_clear()


if hasattr(os, "register_at_fork"):  # a child is no rank, even of one that has not asked yet
    os.register_at_fork(after_in_child=_forget_the_others)


def _end_all_with_one(found: MpiRanks) -> None:
    """Let an error that nobody catches end all ranks."""
    before, process = sys.excepthook, os.getpid()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() != process:  # a child, made by os.fork
            before(kind, error, trace)
        elif not getattr(kind, "stops_all_ranks", False):
            found.end_all(error)
        elif found.rank == 0:  # the others end by themselves, for the same reason
            before(kind, error, trace)

    sys.excepthook = hook


def _stand_by() -> None:
    """Let the others not wait for this process forever, should it end before it asks for them.

    MPICH's mpiexec does not end them, unless it is a signal that ends one.
    """
    before, process = sys.excepthook, os.getpid()

    def alone() -> bool:
        return os.getpid() == process and not ranks.cache_info().currsize

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not alone() or issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        rank = os.environ.get("PMI_RANK", "?")
        if rank != "0":  # what ails all of them, the first one says
            time.sleep(HEAD_START)
        before(kind, error, trace)
        sys.stdout.flush()
        print(f"gpuml: rank {rank} failed by itself: all ranks end", file=sys.stderr, flush=True)
        time.sleep(PASSING_ON)
        os.kill(process, signal.SIGTERM)

    def join() -> None:
        if alone() and "mpi4py.MPI" not in sys.modules:  # else MPI is somebody else's business
            with suppress(DistributedError):
                ranks().part()  # type: ignore[attr-defined]

    sys.excepthook = hook
    atexit.register(join)


if (
    MPICH_RANK in os.environ
    and os.environ.get("PMI_SIZE", "1") != "1"
    and _is_socket(os.environ.get(PMI_LINE, ""))
):
    _stand_by()


class HeldBack:
    """Ctrl-C, held back until all ranks are at the same place: a context manager.

    A rank that stopped at once would leave the others in a sum, waiting for it. Where a signal can
    not be caught, as in another thread than the first, or where there is but one rank, nothing is
    held back. What comes after the last look is of this rank alone, and comes when the block ends.

    Parameters
    ----------
    communicator : Communicator

    Attributes
    ----------
    agreed : bool
        Whether all ranks have been stopped, at the same look.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        in_first = threading.current_thread() is threading.main_thread()
        self._holds = communicator.world_size > 1 and in_first
        self._came = np.zeros(1)
        self.agreed = False

    def __enter__(self) -> HeldBack:
        if self._holds:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, self._before)
            if kind is None and self._came[0]:
                signal.raise_signal(signal.SIGINT)

    def _note(self, *_: object) -> None:
        self._came[0] = 1

    def look(self) -> None:
        """Raise KeyboardInterrupt on all ranks, if Ctrl-C came to any; all must look."""
        if self._communicator.world_size > 1:
            came = self._came.copy()
            self._communicator.all_reduce(came)
            if came[0]:
                self.agreed = True
                until = time.monotonic() + ECHO
                while self._holds and not self._came[0] and time.monotonic() < until:
                    time.sleep(LOOKS)
                self._came[0] = 0
                raise KeyboardInterrupt


def share_of(n: int, communicator: Communicator) -> slice:
    """Return which of n rows are this rank's: neighbours, as many for each, up to one.

    Examples
    --------
    >>> share_of(10, Alone())
    slice(0, 10, None)
    """
    rank, size = communicator.rank, communicator.world_size
    return slice(n * rank // size, n * (rank + 1) // size)


def check_agreement(communicator: Communicator, settings: Mapping[str, Any]) -> None:
    """Refuse ranks that were told different things.

    Parameters
    ----------
    communicator : Communicator
    settings : mapping of str to what JSON can hold

    Raises
    ------
    DistributedError
        On all ranks, if one differs from rank 0: it names the rank and the setting.
    """
    first, *others = communicator.gather(dict(settings))
    for rank, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise DistributedError(
                    f"the ranks disagree: {name} is {first.get(name)} on rank 0 and "
                    f"{other.get(name)} on rank {rank}"
                )


def together(communicator: Communicator, function: Callable[[], Found]) -> Found:
    """Call a function on all ranks; where it fails on one, all of them raise.

    None waits for another then, as for one that raised by itself. All must call it.

    Parameters
    ----------
    communicator : Communicator
    function : callable
        Without arguments, and without a word to the other ranks.

    Returns
    -------
    object
        What the function returns on this rank.

    Raises
    ------
    Exception
        What the function raises on this rank.
    DistributedError
        If it fails on others only: it names the first of them, and the error.

    Examples
    --------
    >>> together(Alone(), lambda: 3)
    3
    """
    error: Exception | None = None
    try:
        found = function()
    except Exception as caught:
        error = caught
    said = "" if error is None else f"{type(error).__name__}: {error}"
    every = communicator.gather(said)
    if error is not None:
        raise error
    for rank, text in enumerate(every):
        if text:
            raise DistributedError(f"rank {rank} of {len(every)} cannot go on: {text}")
    return found


class _Meeting:
    """Where simulated ranks meet: each brings a value, and leaves with those of all."""

    def __init__(self, n: int) -> None:
        self.barrier = threading.Barrier(n)
        self.brought: list[tuple[str, Any]] = [("", None)] * n
        self._posts: dict[tuple[int, int], SimpleQueue[Array]] = {}

    def post(self, sender: int, receiver: int) -> SimpleQueue[Array]:
        """Return what is on its way from one rank to another."""
        return self._posts.setdefault((sender, receiver), SimpleQueue())

    def exchange(self, rank: int, what: str, value: Any) -> list[Any]:
        """Return what all ranks brought, by rank, once all have come for the same."""
        self.brought[rank] = what, value
        self.barrier.wait()
        kinds, values = zip(*self.brought, strict=True)
        self.barrier.wait()  # all have read: the places may be taken again
        if len(set(kinds)) > 1:
            other = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
            raise DistributedError(
                f"the ranks wait for each other: rank 0 is at {kinds[0]}, rank {other} at "
                f"{kinds[other]}; all must ask the same, in the same order"
            )
        return list(values)


class SimulatedRank:
    """One of several threads that behave like ranks: see :func:`simulate`."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting, self.rank = meeting, rank
        self.world_size = meeting.barrier.parties
        self.n_threads = max(1, cpu_count() // self.world_size)

    def all_reduce(self, array: Array, *, mean: bool = False) -> None:
        """Replace an array by the sum of those of all ranks, with the same bits on each."""
        device_of(array).synchronize()
        first, *others = self._meeting.exchange(self.rank, "all_reduce", array)
        total = first.copy()
        for other in others:  # by rank, so that all add in the same order
            total += other
        device_of(array).synchronize()
        self._meeting.exchange(self.rank, "all_reduce", None)  # all have read what they add
        array[...] = total / self.world_size if mean else total

    def gather(self, value: Any) -> list[Any]:
        """Return what all ranks gave, something that JSON can hold, by rank."""
        texts = self._meeting.exchange(self.rank, "gather", json.dumps(value, default=_plain))
        return [json.loads(text) for text in texts]

    def peer_copies(self, n_bytes: int) -> PeerCopies | None:
        """Return None: threads see the same memory."""
        return None

    def send(self, array: Array, rank: int) -> None:
        """Give a copy of an array to another rank, which must receive it."""
        self._meeting.post(self.rank, rank).put(array.copy())

    def receive(self, array: Array, rank: int) -> None:
        """Fill an array with what another rank sends."""
        post = self._meeting.post(rank, self.rank)
        while post.empty() and not self._meeting.barrier.broken:
            time.sleep(LOOKS / 10)
        if self._meeting.barrier.broken:
            raise threading.BrokenBarrierError
        array[...] = post.get()

    def first(self, n: int) -> Communicator | None:
        """Return the first n ranks as a communicator of their own; on the others, None."""
        mine = _Meeting(n) if self.rank == 0 else None
        meeting = self._meeting.exchange(self.rank, "first", mine)[0]
        if self.rank >= n:
            return None
        return Alone() if n == 1 else SimulatedRank(meeting, self.rank)

    def end_all(self, error: BaseException) -> None:
        """End all ranks at once, since this one cannot go on and the others would wait for it."""
        self._meeting.barrier.abort()


def simulate(n_ranks: int, function: Callable[[Communicator], Any]) -> list[Any]:
    """Call a function once for each of n ranks, which are threads of this process.

    It needs no MPI, and it is no faster than one process: it is there to see what ranks do.

    Parameters
    ----------
    n_ranks : int
    function : callable
        ``communicator -> result``. Each rank needs a model of its own.

    Returns
    -------
    list
        The results, by rank.

    Raises
    ------
    ValueError
        If `n_ranks` is less than 1.
    DistributedError
        If ranks wait for each other in different places.
    Exception
        What a rank raises; the others are ended.

    Examples
    --------
    >>> def work(communicator):
    ...     x = np.array([1.0, communicator.rank])
    ...     communicator.all_reduce(x)
    ...     return x.tolist()
    >>> simulate(3, work)
    [[3.0, 3.0], [3.0, 3.0], [3.0, 3.0]]
    """
    if n_ranks < 1:
        raise ValueError(f"n_ranks must be a positive integer, got {n_ranks}")
    meeting = _Meeting(n_ranks)
    results: list[Any] = [None] * n_ranks
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(SimulatedRank(meeting, rank))
            meeting.exchange(rank, "its end", None)
        except BaseException as error:
            errors.append(error)  # before the others are told
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(n_ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        meeting.barrier.abort()  # Ctrl-C, say
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results
