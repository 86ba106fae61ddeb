"""Matrix products: the one place where the package multiplies matrices."""

from __future__ import annotations

from gpuml.devices import Array, array_module


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """Return the matrix product a @ b, over the last two axes.

    Parameters
    ----------
    a : array of shape (…, M, K)
    b : array of shape (…, K, N)
        On the same device as `a`; transposed and strided views are fine.
    out : array of shape (…, M, N), optional
        Where to write the result.

    Returns
    -------
    array of shape (…, M, N)
        `out` if given.

    Raises
    ------
    TypeError
        If the arrays live on different devices.
    """
    return array_module(a, b).matmul(a, b, out=out)
