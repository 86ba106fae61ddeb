"""The array operations of a function, counted while NumPy runs it; the time line that they make.

Libraries of array operations launch about one kernel for each of them. So a list of them predicts
where the time goes on a device that one need not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ArrayOperation:
    """One operation on whole arrays.

    Attributes
    ----------
    name : str
        NumPy's: ``"matmul"``, ``"add"``, ``"add.reduce"`` for a sum.
    n_operations : int
        Of arithmetic: 2 M N K for a product of matrices, else one for each number.
    n_bytes : int
        Read and written, each operand once.
    """

    name: str
    n_operations: int
    n_bytes: int

    def seconds(self, ceilings: Mapping[str, float]) -> float:
        """Return the least time that a device needs once the operation is under way.

        Parameters
        ----------
        ceilings : mapping of str to float
            ``copy`` in bytes per second, ``gemm_float32`` in operations per second: the values
            of :func:`gpuml.device_ceilings`.
        """
        return max(self.n_bytes / ceilings["copy"], self.n_operations / ceilings["gemm_float32"])


def array_operations(function: Callable[..., Any], *arguments: Any) -> list[ArrayOperation]:
    """Run a function of NumPy arrays, and return the array operations that it did.

    Parameters
    ----------
    function : callable
        Of arithmetic, reductions and products. Indexing, copies and what is no ufunc of NumPy's
        do not count.
    *arguments
        NumPy arrays, lists of them, or anything else. What the function writes into arrays is
        written.

    Returns
    -------
    list of ArrayOperation
        In the order in which they were done.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((4, 3), np.float32)
    >>> for operation in array_operations(lambda x: (x @ x.T).sum(), x):
    ...     print(operation)
    ArrayOperation(name='matmul', n_operations=96, n_bytes=160)
    ArrayOperation(name='add.reduce', n_operations=16, n_bytes=68)
    """
    done: list[ArrayOperation] = []
    function(*(_watched(argument, done) for argument in arguments))
    return done


def time_line(
    seconds: Sequence[float], launch: float, *, n_launches: int | None = None, gap: float = 0.0
) -> dict[str, np.ndarray[Any, Any]]:
    """Return when a host launches kernels, and when the device runs them, one after the other.

    A kernel begins when its launch is done and the one before it has ended.

    Parameters
    ----------
    seconds : sequence of float
        How long the device works on each kernel.
    launch : float
        Seconds that the host needs for a launch.
    n_launches : int, optional
        One for each kernel unless given; with 1, all kernels are launched together, as a graph.
    gap : float
        Seconds between two kernels that the device starts by itself.

    Returns
    -------
    dict of str to numpy.ndarray of shape (n, 2)
        Begin and end of each piece, of the ``host`` and of the ``device``, in seconds; for
        :func:`gpuml.plots.time_line`.

    Examples
    --------
    >>> time_line([1, 1], launch=4)["device"].tolist()
    [[4, 5], [8, 9]]
    """
    launches = len(seconds) if n_launches is None else n_launches
    host = [(i * launch, (i + 1) * launch) for i in range(launches)]
    device: list[tuple[float, float]] = []
    free = 0.0  # from when on the device is
    for i, work in enumerate(seconds):
        begin = max(host[min(i, launches - 1)][1], free)
        device.append((begin, begin + work))
        free = begin + work + gap
    return {"host": np.array(host), "device": np.array(device)}


class _Watched(np.ndarray[Any, Any]):
    """An array whose operations are noted; so are those of its results."""

    done: list[ArrayOperation]

    def __array_finalize__(self, other: Any) -> None:
        self.done = getattr(other, "done", [])

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [_plain(x) for x in inputs]
        if options.get("out") is not None:
            options["out"] = tuple(_plain(x) for x in options["out"])
        result = getattr(ufunc, method)(*plain, **options)
        self.done.append(_operation(ufunc, method, plain, np.asarray(result)))
        return _watched(np.asarray(result), self.done)


def _operation(
    ufunc: Any, method: str, inputs: Sequence[Any], result: np.ndarray[Any, Any]
) -> ArrayOperation:
    arrays = [x for x in inputs if isinstance(x, np.ndarray)]
    n_operations = max(x.size for x in [*arrays, result])
    if ufunc is np.matmul:
        n_operations = 2 * result.size * arrays[0].shape[-1]
    name = ufunc.__name__ + (f".{method}" if method != "__call__" else "")
    return ArrayOperation(name, n_operations, sum(x.nbytes for x in [*arrays, result]))


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, _Watched) else x


def _watched(argument: Any, done: list[ArrayOperation]) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(_each(argument, done))
    if not isinstance(argument, np.ndarray):
        return argument
    watched = argument.view(_Watched)
    watched.done = done
    return watched


def _each(arguments: Sequence[Any], done: list[ArrayOperation]) -> Iterator[Any]:
    return (_watched(argument, done) for argument in arguments)
