"""Numbers with fewer bits: what tensor cores and 16-bit types make of float32."""

from __future__ import annotations

import numpy as np

from gpuml.devices import Array, array_module

# Explicit bits of the mantissa; all three have the 8 bits of float32's exponent.
MANTISSA_BITS = {"float32": 23, "tf32": 10, "bfloat16": 7}


def rounded(x: Array, precision: str) -> Array:
    """Return float32 numbers rounded as a precision rounds them, to the nearest, ties to even.

    Parameters
    ----------
    x : array of float32
        Finite; on any device.
    precision : {"float32", "tf32", "bfloat16"}

    Returns
    -------
    array of float32
        A copy.

    Raises
    ------
    TypeError
        If `x` is of another type.

    References
    ----------
    Kalamkar et al.: A Study of BFLOAT16 for Deep Learning Training. arXiv:1905.12322, 2019.

    Examples
    --------
    >>> import numpy as np
    >>> rounded(np.array([1.0, 1.003, 1.005], np.float32), "bfloat16").tolist()
    [1.0, 1.0, 1.0078125]
    """
    if x.dtype != np.float32:
        raise TypeError(f"expected float32, got {x.dtype}: x.astype(np.float32) makes it")
    dropped = MANTISSA_BITS["float32"] - MANTISSA_BITS[precision]
    xp = array_module(x)
    bits = xp.array(x, order="C").view(np.uint32)
    if dropped:
        # Half of the last bit that stays, or a little less if that bit is even.
        bits += ((bits >> np.uint32(dropped)) & np.uint32(1)) + np.uint32(2 ** (dropped - 1) - 1)
        bits &= np.uint32(2**32 - 2**dropped)
    return bits.view(np.float32)
