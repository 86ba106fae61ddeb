"""Arrays that are somewhere else: a stand-in for CuPy where there is no GPU, made of NumPy's.

It computes nothing by itself. But like CuPy it refuses NumPy's arrays among its own, does not
become one of them in silence, and gives an array also where NumPy gives a number. So it finds
code that works on a CPU only.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

UNARY = "neg abs invert"
BINARY = "add sub mul truediv floordiv mod pow matmul lt le gt ge eq ne and or xor"
REFLECTED = "radd rsub rmul rtruediv rpow rmatmul"
IN_PLACE = "iadd isub imul itruediv ipow"
METHODS = "sum mean std var max min all any astype reshape swapaxes copy ravel argsort dot view"


class Array:
    """An array that only its own library can read."""

    __array_priority__ = 1000
    __hash__ = None
    device = SimpleNamespace(id=0)
    data = SimpleNamespace(device_id=0)

    def __init__(self, there) -> None:
        self.there = np.asarray(there)

    def get(self):
        return self.there.copy()

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, function, method, *arguments, **options):
        if method != "__call__":
            return NotImplemented
        return brought(function(*opened(arguments), **opened(options)))

    def __array_function__(self, function, _, arguments, options):
        return brought(function(*opened(arguments), **opened(options)))

    def __len__(self) -> int:
        return len(self.there)

    def __float__(self) -> float:
        return float(self.there)

    def __int__(self) -> int:
        return int(self.there)

    def __bool__(self) -> bool:
        return bool(self.there)

    def __iter__(self):
        return map(Array, self.there)

    def __getitem__(self, place):
        return Array(self.there[opened(place)])

    def __setitem__(self, place, value):
        self.there[opened(place)] = opened(value)

    def __deepcopy__(self, _):
        return Array(self.there.copy())


def opened(value):
    """What NumPy may compute with, out of arguments of this library."""
    if isinstance(value, Array):
        return value.there
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(value, list | tuple):
        return type(value)(map(opened, value))
    return {key: opened(v) for key, v in value.items()} if isinstance(value, dict) else value


def brought(value):
    """A result of NumPy's as one of this library."""
    if isinstance(value, np.ndarray | np.generic):
        return Array(value)
    return type(value)(map(brought, value)) if type(value) in (list, tuple) else value


def _method(name):
    return lambda self, *arguments, **options: brought(
        getattr(self.there, name)(*opened(arguments), **opened(options))
    )


def _in_place(name):
    def method(self, other):
        getattr(self.there, name)(opened(other))
        return self

    return method


for _name in [*f"{UNARY} {BINARY} {REFLECTED}".split()]:
    setattr(Array, f"__{_name}__", _method(f"__{_name}__"))
for _name in METHODS.split():
    setattr(Array, _name, _method(_name))
for _name in IN_PLACE.split():
    setattr(Array, f"__{_name}__", _in_place(f"__{_name}__"))
for _name in ("shape", "dtype", "size", "ndim", "nbytes"):
    setattr(Array, _name, property(lambda self, name=_name: getattr(self.there, name)))
Array.T = property(lambda self: Array(self.there.T))


class Library(ModuleType):
    """NumPy's functions, for arrays of this library."""

    def __init__(self, name: str, functions: ModuleType) -> None:
        super().__init__(name)
        self.functions = functions

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.functions, name)
        if isinstance(value, ModuleType):
            return Library(f"{self.__name__}.{name}", value)
        if isinstance(value, type) or not callable(value):
            return value
        return lambda *arguments, **options: brought(value(*opened(arguments), **opened(options)))


def library() -> ModuleType:
    """A module that answers to the name of CuPy."""
    made = Library("cupy", np)
    made.__spec__, made.__version__ = ModuleSpec("cupy", None), "0"
    made.ndarray = Array
    pool = SimpleNamespace(limit=0, free_bytes=lambda: 0, used_bytes=lambda: 0)
    pool.get_limit = lambda: pool.limit
    pool.free_all_blocks = lambda: None
    pool.set_limit = lambda size: setattr(pool, "limit", size)
    made.get_default_memory_pool = lambda: pool
    runtime = SimpleNamespace(deviceSynchronize=lambda: None, getDeviceCount=lambda: 1)
    made.cuda = SimpleNamespace(runtime=runtime, Device=lambda index: nullcontext())

    def asarray(a, dtype=None):
        if isinstance(a, Array) and dtype in (None, a.dtype):
            return a
        return Array(np.array(a.there if isinstance(a, Array) else a, dtype))

    made.asarray = asarray
    return made
