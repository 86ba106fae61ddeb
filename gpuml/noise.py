"""Random numbers that a captured step can draw anew: a key and a counter beside the parameters.

They are those of NumPy's generator Philox, computed on the device that needs them. cuRAND cannot
be captured into a CUDA graph, and numbers that the host draws would have to be copied there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from gpuml.devices import Array, Device
from gpuml.gpu_layers import fused
from gpuml.kernels import load_kernel

THREADS, MOST_BLOCKS = 256, 132 * 16


class Noise:
    """Draws uniform and normal numbers on a device; each draw is another one.

    Parameters
    ----------
    seed : int, sequence of int, or None
        The same gives the same numbers: uniform ones the same bits on every device, normal ones
        on each device. None takes a key from the operating system.
    device : Device

    Attributes
    ----------
    state : array of 3 uint64
        The two words of the key, and how many draws there were: all that comes depends on it.
    """

    def __init__(self, seed: int | Sequence[int] | None, device: Device) -> None:
        key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self.device = device
        self.state = device.asarray(np.array([*key, 0], np.uint64))
        self._n_draws = self.state[2:]

    def uniform(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return numbers from -1 to less than 1."""
        xp = self.device.xp
        if not fused(xp):
            words = self._words(math.prod(shape))
            return self.device.asarray(2 * _unit(words, dtype) - 1).reshape(shape)
        out = xp.empty(shape, dtype)
        self._launch("philox", out)
        return out

    def normal(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return numbers of mean 0 and standard deviation 1."""
        out = self.device.xp.empty(shape, dtype)
        self.add_normal(out, 0.0, 1.0)
        return out

    def add_normal(self, out: Array, keep: float, scale: float) -> None:
        """Multiply an array by `keep` and add normal numbers times `scale`, in place.

        Parameters
        ----------
        out : array
            Contiguous; float32 or float64. It is not read if `keep` is 0.
        keep, scale : float
        """
        if fused(self.device.xp):
            number = out.dtype.type
            self._launch("philox_normal", out, number(keep), number(scale))
            return
        words, number = self._words(-(-out.size // 4) * 4).reshape(-1, 2), out.dtype.type
        radius = _shifted(words[:, 0], 11, number) + number(1)
        radius *= number(2.0**-53)
        np.log(radius, out=radius)
        radius *= number(-2)
        np.sqrt(radius, out=radius)
        radius *= number(scale)
        angle = _unit(words[:, 1], number)
        angle *= number(2 * np.pi)
        normal = np.empty(words.shape, number)
        np.multiply(radius, np.cos(angle), out=normal[:, 0])
        np.multiply(radius, np.sin(angle), out=normal[:, 1])
        drawn = self.device.asarray(normal.reshape(-1)[: out.size].reshape(out.shape))
        if keep:
            out *= number(keep)
            out += drawn
        else:
            out[...] = drawn

    def _words(self, n: int) -> np.ndarray[Any, Any]:
        """Return the next draw of random words, on the host."""
        *key, draw = (int(word) for word in self.state)
        self._n_draws += np.uint64(1)
        generator = np.random.Philox(key=np.array(key, np.uint64), counter=[0, draw, 0, 0])
        return np.asarray(generator.random_raw(n))

    def _launch(self, function: str, out: Array, *numbers: Any) -> None:
        kernel = _kernel(function, out.dtype.name)
        blocks = max(1, min(MOST_BLOCKS, -(-out.size // (4 * THREADS))))
        kernel((blocks,), (THREADS,), (self.state, out, np.int64(out.size), *numbers))
        self._n_draws += np.uint64(1)


def _unit(words: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """Return numbers from 0 to less than 1, exact in their type."""
    bits = 24 if np.dtype(dtype) == np.float32 else 53
    units = _shifted(words, 64 - bits, dtype)
    units *= np.dtype(dtype).type(2.0**-bits)
    return units


def _shifted(words: np.ndarray[Any, Any], n_bits: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Return words without their last bits as numbers; signed ones are converted sooner."""
    shifted: np.ndarray[Any, Any] = (words >> np.uint64(n_bits)).view(np.int64)
    return shifted.astype(dtype)


@cache
def _kernel(function: str, number: str) -> Any:
    options = (f"-DNUMBER={ {'float32': 'float', 'float64': 'double'}[number] }",)
    return load_kernel("philox", function, options=options)
