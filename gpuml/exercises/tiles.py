"""Exercises of notebook 04: tiles, what crosses the bus, and copies beside arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from gpuml.devices import Array
from gpuml.exercises.judging import PRODUCTS, Case, Exercise, Tool


class SmallMultiplier(Tool):
    """Multiplies matrices, as long as they are no larger than what it has room for.

    Parameters
    ----------
    tile : int
        Rows of the left and columns of the right factor, at most.
    depth : int
        Columns of the left and rows of the right factor, at most.
    """

    def __init__(self, tile: int, depth: int) -> None:
        self.tile, self.depth, self.n_products = tile, depth, 0

    def multiply(self, a: Array, b: Array) -> Array:
        """Return a @ b."""
        self.n_products += 1
        (rows, inner), columns = a.shape, b.shape[-1]
        if rows > self.tile or columns > self.tile or inner > self.depth:
            raise ValueError(
                f"multiply has room for {self.tile} × {self.depth} and {self.depth} × "
                f"{self.tile}, and got {a.shape[0]} × {a.shape[1]} and {b.shape[0]} × {columns}"
            )
        if a.shape[1] != b.shape[0]:
            raise ValueError(f"the panels do not fit: {a.shape} and {b.shape}")
        return a @ b


def _starts(size: int, step: int) -> range:
    return range(0, size, step)


def _tiled(
    a: Any,
    b: Any,
    tile: int,
    depth: int,
    multiply: Any,
    *,
    add: bool = True,
    whole_only: str = "",
    last: int = 0,
) -> Any:
    c = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    sizes = [(a.shape[0], tile), (b.shape[1], tile), (a.shape[1], depth)]
    axes = zip("mnk", sizes, strict=True)
    ends = [size // step * step if axis in whole_only else size for axis, (size, step) in axes]
    for i in _starts(ends[0], tile):
        for j in _starts(ends[1], tile):
            for k in _starts(ends[2] - last, depth):
                rows, columns = slice(i, i + tile), slice(j, j + tile)
                part = multiply(a[rows, k : k + depth], b[k : k + depth, columns])
                c[rows, columns] = c[rows, columns] + part if add else part
    return c


def _tiled_product(a: Any, b: Any, tile: int, depth: int, multiply: Any) -> Any:
    return _tiled(a, b, tile, depth, multiply)


def _to_tile(rng: np.random.Generator) -> list[Case]:
    sizes = [(8, 6, 8, 4, 3), (9, 7, 10, 4, 3), (3, 5, 2, 4, 2)]
    cases = []
    for m, k, n, tile, depth in sizes:
        a, b = (rng.integers(-9, 10, s).astype(np.float32) for s in ((m, k), (k, n)))
        tool = SmallMultiplier(tile, depth)
        cases.append({"a": a, "b": b, "tile": tile, "depth": depth, "multiply": tool.multiply})
    return cases


def _bytes_in(m: int, n: int, k: int, tile_m: int, tile_n: int, itemsize: int) -> int:
    return itemsize * (m * k * -(-n // tile_n) + k * n * -(-m // tile_m))


def _tilings(rng: np.random.Generator) -> list[Case]:
    names = ("m", "n", "k", "tile_m", "tile_n", "itemsize")
    values = [(4096, 16384, 2048, 1024, 2048, 4), (1000, 700, 300, 300, 200, 8)]
    return [dict(zip(names, v, strict=True)) for v in values]


def _double_buffered(copies: Any, products: Any, *, buffers: int = 2) -> float:
    copied: list[float] = []
    done: list[float] = []
    for i, (copy, product) in enumerate(zip(copies, products, strict=True)):
        free = done[i - buffers] if i >= buffers else 0.0
        copied.append(max(copied[-1] if copied else 0.0, free) + copy)
        done.append(max(done[-1] if done else 0.0, copied[-1]) + product)
    return done[-1]


def _at_once(copies: Any, products: Any) -> float:
    copied, done = 0.0, [0.0, 0.0]
    for copy, product in zip(copies, products, strict=True):
        copied = max(copied, done[-2]) + copy
        done.append(copied + product)
    return done[-1]


def _schedules(rng: np.random.Generator) -> list[Case]:
    times = [
        ([2.0, 6.0, 2.0, 6.0], [4.0, 4.0, 4.0, 4.0]),
        ([1.0, 1.0, 1.0, 9.0, 1.0], [5.0, 1.0, 4.0, 1.0, 3.0]),
        ([1.0, 1.0, 2.0], [5.0, 6.0, 4.0]),
        ([3.0], [4.0]),
    ]
    return [{"copies": c, "products": p} for c, p in times]


def _too_few(a: Any, b: Any, tile: int, depth: int, multiply: Any) -> str | None:
    n_products, n_tiles = multiply.__self__.n_products, a.shape[0] // tile * (b.shape[1] // tile)
    if n_products >= max(1, n_tiles):
        return None
    return (
        f"`multiply` was called {n_products} times. Here the products of tiles are to be made by "
        "`multiply` alone, and each tile of the result needs at least one."
    )


EXERCISES = {
    "tiled_product": Exercise(
        solve=_tiled_product,
        cases=_to_tile,
        watch=_too_few,
        forbidden=PRODUCTS,
        instead="here the products of tiles are to be made by `multiply` alone.",
        mistakes={
            "Only the last panel is left: each panel along K contributes to the whole tile, so "
            "*add* its product.": lambda *a: _tiled(*a, add=False),
            "The edge is missing: sizes are no multiples of the tile. A slice that ends behind "
            "the matrix is cut off there by itself, so begin a tile wherever there is a row "
            "left.": tuple(partial(_tiled, whole_only=axes) for axes in ("mnk", "mn", *"mnk")),
            "The last panel along K is missing: `range(0, K, depth)` already has its start.": (
                lambda a, b, tile, depth, multiply: _tiled(a, b, tile, depth, multiply, last=depth)
            ),
            "The result is the transposed one: rows of tiles come from `a`, columns from `b`.": (
                lambda *a: np.ascontiguousarray(_tiled(*a).T)
            ),
            "The product of all of `a` with all of `b` does not fit into `multiply`: give it a "
            "tile of rows, a tile of columns, and a panel of the inner dimension.": (
                lambda a, b, tile, depth, multiply: multiply(a, b)
            ),
        },
    ),
    "bytes_in": Exercise(
        solve=_bytes_in,
        cases=_tilings,
        mistakes={
            "The tiles are swapped: all of A comes once for each *column* of tiles, so n and "
            "`tile_n` say how often.": lambda m, n, k, tile_m, tile_n, itemsize: (
                itemsize * (m * k * -(-m // tile_m) + k * n * -(-n // tile_n))
            ),
            "That is the number of numbers; each has `itemsize` bytes.": (
                lambda m, n, k, tile_m, tile_n, itemsize: _bytes_in(m, n, k, tile_m, tile_n, 1)
            ),
            "There are only whole tiles: where the size is no multiple, one tile more is needed. "
            "Round up.": lambda m, n, k, tile_m, tile_n, itemsize: (
                itemsize * (m * k * (n // tile_n) + k * n * (m // tile_m))
            ),
            "Tiles at the edge are smaller than `tile_m` × `tile_n`.": (
                lambda m, n, k, tile_m, tile_n, itemsize: (
                    itemsize * k * (tile_m + tile_n) * -(-m // tile_m) * -(-n // tile_n)
                )
            ),
            "That is A and B once. They come again for each column, or row, of tiles.": (
                lambda m, n, k, tile_m, tile_n, itemsize: itemsize * (m * k + k * n)
            ),
            "C crosses the bus the other way; asked for is what comes in.": (
                lambda m, n, k, tile_m, tile_n, itemsize: (
                    _bytes_in(m, n, k, tile_m, tile_n, itemsize) + itemsize * m * n
                )
            ),
        },
    ),
    "double_buffered": Exercise(
        solve=lambda copies, products: _double_buffered(copies, products),
        cases=_schedules,
        mistakes={
            "That is one after the other. The copy of the next panel goes on while this one is "
            "multiplied.": lambda copies, products: sum(copies) + sum(products),
            "With *two* buffers, copy i must wait until product i - 2 has ended and its buffer "
            "is free.": lambda copies, products: _double_buffered(copies, products, buffers=99),
            "The longer of both sums is a bound from below: the first product must wait for its "
            "copy.": lambda copies, products: max(sum(copies), sum(products)),
            "Copy i does not run beside product i, which needs it: copy i + 1 does.": (
                lambda copies, products: sum(map(max, copies, products))
            ),
            "A product waits for the one before as well: they are made one after the other.": (
                _at_once
            ),
            "The last product is missing.": lambda copies, products: (
                _double_buffered(copies, products) - products[-1]
            ),
        },
    ),
}
