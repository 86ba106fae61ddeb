"""Mini-batches of data that is in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpuml.devices import Array, device_of

# Rows are gathered for several batches at once: one launch on a GPU instead of many, and a
# bounded amount of memory however large the data are.
GATHERED_BYTES = 8 * 2**20


def batches(
    X: Array,
    y: Array,
    batch_size: int | None,
    *,
    generator: np.random.Generator | None = None,
) -> Iterator[tuple[Array, Array]]:
    """Yield (x, y) batch by batch, every sample once; the last batch may be shorter.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
    y : array of shape (n_samples,) or (n_samples, n_outputs)
        On the same device as `X`.
    batch_size : int or None
        None, or more than there are samples: all of them as one batch, in their order.
    generator : numpy.random.Generator, optional
        Shuffles the samples; without it they come in their order. It draws on the host, so that
        the order is the same on every device.

    Yields
    ------
    x : array of shape (batch, n_features)
    y : array of shape (batch,) or (batch, n_outputs)
        Views; they hold good until the next batch is asked for.
    """
    n_samples = len(X)
    if batch_size is None or batch_size >= n_samples:
        yield X, y
        return
    device = device_of(X, y)
    order = None if generator is None else device.asarray(generator.permutation(n_samples))
    row_bytes = X[:1].nbytes + y[:1].nbytes
    gathered = max(1, GATHERED_BYTES // (row_bytes * batch_size)) * batch_size
    for first in range(0, n_samples, gathered):
        rows = slice(first, first + gathered)
        chunk_X, chunk_y = (
            (X[rows], y[rows])
            if order is None
            else (X.take(order[rows], axis=0), y.take(order[rows], axis=0))
        )
        for start in range(0, len(chunk_X), batch_size):
            yield chunk_X[start : start + batch_size], chunk_y[start : start + batch_size]
