"""Least squares: the exact answer, how curved the loss is, and full batches without the data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gpuml import gpu_layers
from gpuml.devices import Array, Device, array_module, device_of, get_device
from gpuml.errors import DataError
from gpuml.gpu_layers import fused
from gpuml.matmul import matmul
from gpuml.memory_maps import in_memory
from gpuml.models import Linear, Parameters

# So much of the data is in use at a time, as float64; a GPU needs more to be busy.
BLOCK_BYTES = {"cpu": 32 * 2**20, "gpu": 256 * 2**20}

# Up to this many features XᵀX is formed, in one reading of X; above, X is read for each product.
GRAM_FEATURES = 1024

# At least so many products are formed: the start may lie almost wholly beside the largest
# eigenvalue's vector, and be one of a smaller eigenvalue to within the tolerance.
FEWEST_PRODUCTS = 6

EPSILON = float(np.finfo(np.float64).eps)


def least_squares(X: Array, Y: Array, *, bias: bool = True) -> Linear:
    """Return the linear model with the least mean squared error, exactly: min ‖X W + b - Y‖².

    With a bias the means are taken from X and Y first, so that constants do not drown what
    varies; then b = ȳ - x̄ W. W comes from an orthogonal factorisation in float64 and never
    from XᵀX, whose condition number is squared. Where several W fit equally well, as with
    dependent features, or fewer samples than features, it is the one of the least norm.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
        On any device, or a memory map: it is read in blocks, twice if there is a bias.
    Y : array of shape (n_samples, n_outputs) or (n_samples,)
        On the device of `X`.
    bias : bool
        Whether the model has b.

    Returns
    -------
    Linear
        On the device of `X`, of its type: float32 for float16, float64 for integers.

    Raises
    ------
    TypeError
        If `X` and `Y` live on different devices or are not real numbers.
    ValueError
        If shapes do not fit.
    DataError
        If a number is not finite; the message says which.

    Notes
    -----
    The triangle R of [X Y] = QR has the same least-squares problems as X and Y. It is updated
    block by block, R ← the triangle of R above the next block, in float64 on every device: a
    consumer's GPU has few units for that, and the CPU may be as fast there. The library's
    ``lstsq``, by singular values, then solves the small problem, with columns of equal length
    so that features in different units do not count as dependent. Features are dependent if a
    singular value is below 16 ε max(n_samples, n_features) of the largest, ε = 2e-16.

    References
    ----------
    Demmel, Grigori, Hoemmen, Langou: Communication-optimal parallel and sequential QR and LU
    factorizations. SIAM Journal on Scientific Computing 34, 2012.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.array([[0.0], [1.0], [2.0]])
    >>> model = least_squares(X, 3 * X + 1)
    >>> print(model.parameters["weight"].round(6), model.parameters["bias"].round(6))
    [[3.]] [[1.]]
    """
    X, Y = _checked(X, Y)
    device, n_features = device_of(X, Y), X.shape[1]
    xp = device.xp
    with device.use(), _quiet():
        mean = _mean(X, Y, device) if bias else xp.zeros((1, n_features + Y.shape[1]))
        triangle = _triangle(
            _block([X, Y], rows, device) - mean for rows in _parts([X, Y], at_least_square=True)
        )
        _refuse_unless_finite(triangle, X=X, Y=Y)
        tolerance = 16 * EPSILON * max(X.shape)
        weight = _solve(triangle[:, :n_features], triangle[:, n_features:], tolerance)
        dtype = np.result_type(X.dtype, np.float32) if X.dtype.kind == "f" else np.float64
        model = Linear(n_features, Y.shape[1], bias=bias, dtype=dtype, device=device)
        model.parameters["weight"] = weight
        if bias:
            model.parameters["bias"] = mean[:, n_features:] - matmul(mean[:, :n_features], weight)
    return model


def largest_stable_learning_rate(
    X: Array,
    *,
    n_outputs: int = 1,
    bias: bool = True,
    momentum: float = 0.0,
    n_iterations: int = 100,
    tolerance: float = 1e-3,
) -> float:
    """Return the rate above which gradient descent diverges, for `Linear` and full batches.

    rate = 2 (1 + momentum) / λ, where λ is the largest eigenvalue of the mean squared error's
    second derivative, 2 XᵀX / (n_samples · n_outputs), with a column of ones in X if there is a
    bias.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
        On any device, or a memory map, which is read in blocks.
    n_outputs : int
        Of the model: the loss is a mean over outputs too, so more of them allow larger rates.
    bias : bool
        Whether the model has a bias.
    momentum : float
        As in :class:`gpuml.GradientDescent`.
    n_iterations : int
        At most so many products with XᵀX are formed. Above 1,024 features each of them reads X.
    tolerance : float
        The relative error in λ at which to stop.

    Returns
    -------
    float
        Not above the limit and at most about twice the tolerance below; infinite if `X` is zero.

    Raises
    ------
    ValueError
        If `X` is no matrix, or a setting is out of range.
    DataError
        If a number is not finite; the message says which.

    Notes
    -----
    Power iteration, v ← XᵀX v from a random start, always the same, whose iterates are kept:
    within their span the largest eigenvalue is found in some 10 to 30 products where the last
    of them alone would take hundreds (Lanczos's method). The Rayleigh quotient ρ of any vector
    is too small and would give too large a rate. But an eigenvalue, the largest unless the start
    was most unlucky, lies within the residual ‖XᵀX v - ρ v‖ of it: ρ plus the residual is taken.

    Up to 1,024 features XᵀX is formed in float64, in one reading of X. Above, X is multiplied in
    its own type, or in float32 if it is float16, and blocks are added up in float64.

    References
    ----------
    Polyak: Some methods of speeding up the convergence of iteration methods. USSR Computational
    Mathematics and Mathematical Physics 4, 1964. Goh: Why Momentum Really Works. Distill, 2017.
    Golub, Van Loan: Matrix Computations. 4th edition, 2013. Sections 8.1 and 10.1.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.diag([1.0, 2.0, 3.0])
    >>> rate = largest_stable_learning_rate(X, bias=False)
    >>> round(rate, 3), round(2 / (2 / 3 * 3.0**2), 3)
    (0.333, 0.333)
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be from 0 to less than 1, got {momentum}")
    for name, value in (("n_outputs", n_outputs), ("n_iterations", n_iterations)):
        if value < 1 or value != int(value):
            raise ValueError(f"{name} must be a positive integer, got {value}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    X = _checked_matrix("X", X)
    device, n_inputs = device_of(X), X.shape[1] + bias

    with device.use(), _quiet():
        if n_inputs <= GRAM_FEATURES:
            gram = _sums([(X, None)], bias, device)[0]
            _refuse_unless_finite(gram, X=X)

        def product(v: Array) -> Array:
            return matmul(gram, v) if n_inputs <= GRAM_FEATURES else _gram_times(X, v, bias)

        eigenvalue, residual = _largest_eigenvalue(
            product, n_inputs, device, int(n_iterations), tolerance, lambda: _explain(X=X)
        )
    curvature = 2 * (eigenvalue + residual) / (len(X) * n_outputs)
    return 2 * (1 + momentum) / curvature if curvature > 0 else math.inf


def spectrum(X: Array, *, n_outputs: int = 1, bias: bool = True) -> Array:
    """Return how curved the mean squared error of `Linear` is along each of its axes.

    The eigenvalues of 2 XᵀX / (n_samples · n_outputs), with a column of ones in X if there is a
    bias; each of them counts for every output.

    Parameters
    ----------
    X : array of shape (n_samples, n_features)
        On any device. It is read in blocks; work grows as n_features³ and memory as n_features².
    n_outputs : int
        Of the model.
    bias : bool
        Whether the model has a bias.

    Returns
    -------
    array of shape (n_features,) or (n_features + 1,)
        Where `X` lives, in float64, the largest first. Gradient descent with a learning rate
        above 2 / the first diverges; and with one below, the number of steps that it needs grows
        as the first / the least that is not zero.

    Raises
    ------
    ValueError
        If `X` is no matrix.
    DataError
        If a number is not finite.

    Notes
    -----
    They are squares of singular values, from an orthogonal factorisation: small ones are right
    where those of XᵀX itself would be rounding.

    Examples
    --------
    >>> import numpy as np
    >>> spectrum(np.diag([1.0, 2.0]), bias=False).round(6).tolist()
    [4.0, 1.0]
    """
    X = _checked_matrix("X", X)
    device, n_inputs = device_of(X), X.shape[1] + bias
    xp = device.xp
    with device.use(), _quiet():
        triangle = _triangle(
            _block([X], rows, device, ones=bias) for rows in _parts([X], at_least_square=True)
        )
        _refuse_unless_finite(triangle, X=X)
        values = xp.linalg.svd(triangle, compute_uv=False)
        curvatures = xp.zeros(n_inputs)
        curvatures[: len(values)] = values * values * (2 / (len(X) * n_outputs))
    return curvatures


@dataclass(frozen=True, eq=False)
class Gram:
    """All that full-batch least squares needs to know of the data: XᵀX, XᵀY, YᵀY and n.

    Loss and gradient of any W follow from these without X, as fast for a billion samples as for
    a thousand. Made by :meth:`of`.

    Attributes
    ----------
    xx : array of shape (n_inputs, n_inputs)
        XᵀX in float64. With a bias X has a last column of ones, and is n_features + 1 wide.
    xy : array of shape (n_inputs, n_outputs)
        XᵀY.
    yy : array of shape (n_outputs,)
        The diagonal of YᵀY, of which the loss needs no more.
    n_samples : int
    bias : bool

    Notes
    -----
    When to trust it. The loss is a small difference of large numbers, YᵀY - 2 WᵀXᵀY + WᵀXᵀXW:
    it is off by about :meth:`loss_rounding`, and one below that, which may even be negative,
    says nothing. The weights at which the gradient vanishes are off by ε · :meth:`condition`,
    relatively, ε = 2e-16, where those from X itself (:func:`least_squares`) are off by ε times
    the square root of that. For gradient descent the weights rarely matter: where ε · condition
    is not small, it would take billions of steps.

    Examples
    --------
    >>> import numpy as np
    >>> X, Y = np.arange(6.0).reshape(3, 2), np.ones((3, 1))
    >>> gram, model = Gram.of(X, Y), Linear(2, 1, dtype=np.float64, device="cpu")
    >>> loss, gradients = gram.loss_and_gradient(model.parameters)
    >>> print(loss, gradients["weight"].ravel(), gradients["bias"])
    1.0 [-4. -6.] [[-2.]]
    """

    xx: Array
    xy: Array
    yy: Array
    n_samples: int
    bias: bool

    @classmethod
    def of(
        cls, X: Array, Y: Array, *, bias: bool = True, device: Device | str | None = None
    ) -> Gram:
        """Add up the products of a data set, block by block, in float64.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            On any device, or a memory map: each block is read once.
        Y : array of shape (n_samples, n_outputs) or (n_samples,)
            On the device of `X`.
        bias : bool
            Whether the model has a bias.
        device : Device or str, optional
            Where to add them up, and where the sums live; the device of `X` unless given.

        Returns
        -------
        Gram

        Raises
        ------
        TypeError
            If `X` and `Y` live on different devices or are not real numbers.
        ValueError
            If shapes do not fit.
        DataError
            If a number is not finite, or its square is not; the message says which.
        """
        X, Y = _checked(X, Y)
        home = device_of(X, Y)
        target = home if device is None else get_device(device)
        with target.use(), _quiet():
            gram = cls(*_sums([(X, Y)], bias, target), bias)
            if not gram._is_finite():
                raise _explain(X=X, Y=Y)
        return gram

    @classmethod
    def of_batches(cls, batches: Iterable[tuple[Array, Array]], *, bias: bool = True) -> Gram:
        """Add up the products of data that come in batches.

        Parameters
        ----------
        batches : iterable of (x, y)
            As for :meth:`of`, all on one device, and at least one. Each is used before the next
            is asked for.
        bias : bool
            Whether the model has a bias.

        Returns
        -------
        Gram
            On the device of the batches.

        Raises
        ------
        TypeError, ValueError
            As for :meth:`of`, or if there is no batch.
        DataError
            If a number is not finite, or its square is not.
        """
        pairs = iter(batches)
        first = next(pairs, None)
        if first is None:
            raise ValueError("there is no batch")
        device = device_of(*first)
        checked = (_checked(x, y) for x, y in itertools.chain([first], pairs))
        with device.use(), _quiet():
            gram = cls(*_sums(checked, bias, device), bias)
            if not gram._is_finite():
                raise DataError("the data have numbers that, or whose squares, are not finite")
        return gram

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the parameters of the `Linear` that fits."""
        n_inputs, n_outputs = self.xy.shape
        if not self.bias:
            return {"weight": (n_inputs, n_outputs)}
        return {"weight": (n_inputs - 1, n_outputs), "bias": (1, n_outputs)}

    def loss_and_gradient(
        self, parameters: Parameters, gradients: Parameters | None = None
    ) -> tuple[Array, Parameters]:
        """Return the mean squared error over all the data, and its gradient.

        loss = (YᵀY - 2 Wᵀ XᵀY + Wᵀ XᵀX W) / (n · outputs), of which the trace is taken;
        gradient = 2 (XᵀX W - XᵀY) / (n · outputs), where b is the last row of W.

        Parameters
        ----------
        parameters : Parameters
            Of a `Linear`, on the device of the sums; of any type, with leading axes if wanted.
        gradients : Parameters, optional
            Where to write; new ones are made unless given.

        Returns
        -------
        value : array of shape (…)
            In float64; it stays on the device. Near zero it may be negative.
        gradients : Parameters

        Raises
        ------
        TypeError
            If the parameters live on another device.
        ValueError
            If they are not of a `Linear` with as many features and outputs.
        """
        weights = self._weights(parameters)
        if gradients is None:
            gradients = parameters.zeros_like()
        scale = 1 / (self.n_samples * self.xy.shape[1])
        with device_of(self.xx).use():
            xp = array_module(weights, self.xx)
            half = matmul(self.xx, weights)
            if fused(xp):
                value = gpu_layers.quadratic_loss(
                    half, self.xy, weights, self._yy_each, scale, gradients.flat
                )
                return value, gradients
            half -= self.xy
            inner = half - self.xy
            inner *= weights
            value = (inner.sum(axis=(-2, -1)) + self.yy.sum()) * scale
            flat = gradients.flat
            xp.multiply(half.reshape(flat.shape), 2 * scale, out=flat)
        return value, gradients

    @cached_property
    def _yy_each(self) -> Array:
        """The sum of yy in equal parts, one for each weight, to be summed with them."""
        return self.yy.sum() / math.prod(self.xy.shape)

    def loss_rounding(self, parameters: Parameters) -> Array:
        """Return by how much rounding may have moved the loss: ε √n times what was added up.

        Errors of n additions, which are independent rather than all of one sign, come to about
        ε √n of the sum of absolute values.

        Parameters
        ----------
        parameters : Parameters
            As for :meth:`loss_and_gradient`.

        Returns
        -------
        array of shape (…)
            In units of the loss, on the device.

        References
        ----------
        Higham, Mary: A New Approach to Probabilistic Rounding Error Analysis. SIAM Journal on
        Scientific Computing 41, 2019.
        """
        with device_of(self.xx).use():
            weights = abs(self._weights(parameters))
            sums = matmul(abs(self.xx), weights) + 2 * abs(self.xy)
            added = (weights * sums).sum(axis=(-2, -1)) + self.yy.sum()
        return added * (EPSILON * math.sqrt(self.n_samples) / (self.n_samples * self.xy.shape[1]))

    def condition(self) -> float:
        """Return the condition number of XᵀX, the square of that of X; infinite if singular.

        Above some 1e14 it only says that it is at least so.
        """
        with device_of(self.xx).use():
            values = array_module(self.xx).linalg.eigvalsh(self.xx)
        least, most = float(values[0]), float(values[-1])
        return most / least if least > 0 else math.inf

    def _is_finite(self) -> bool:
        # XᵀY is, if these are.
        isfinite = array_module(self.xx).isfinite
        return bool(isfinite(self.xx).all()) and bool(isfinite(self.yy).all())

    def _weights(self, parameters: Parameters) -> Array:
        """Return W above b in float64: they lie one after the other in the vector."""
        if list(parameters.shapes.items()) != list(self.shapes.items()):
            raise ValueError(
                f"the parameters have shapes {parameters.shapes}, the data need {self.shapes}"
            )
        flat = parameters.flat
        array_module(flat, self.xx)  # refuses a mixture
        return flat.reshape(*flat.shape[:-1], *self.xy.shape).astype(np.float64, copy=False)

    def __repr__(self) -> str:
        n_features, n_outputs = self.shapes["weight"]
        return f"Gram({self.n_samples:,} samples, {n_features} features, {n_outputs} outputs)"


def _quiet() -> Any:
    """Silence NumPy's warnings: we say ourselves which number is not finite."""
    return np.errstate(over="ignore", invalid="ignore")


def _checked_matrix(name: str, a: Array) -> Array:
    device_of(a)  # refuses what is no array
    if a.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold real numbers, got {a.dtype}")
    if a.ndim != 2 or 0 in a.shape:
        raise ValueError(f"{name} has shape {a.shape}, expected a matrix that is not empty")
    return a


def _checked(X: Array, Y: Array) -> tuple[Array, Array]:
    """Return X, and Y as a matrix, or say what is wrong with them."""
    device_of(X, Y)
    Y = _checked_matrix("Y", Y[:, None] if Y.ndim == 1 else Y)
    X = _checked_matrix("X", X)
    if len(X) != len(Y):
        raise ValueError(f"X has {len(X)} rows, Y has {len(Y)}: they must agree")
    return X, Y


def _parts(arrays: list[Array], *, at_least_square: bool = False) -> Iterator[slice]:
    """Yield the rows of each block; if wanted there are at least as many of them as columns."""
    n_columns = sum(a.shape[1] for a in arrays) + 1
    rows = max(1, BLOCK_BYTES[device_of(arrays[0]).kind] // (8 * n_columns))
    if at_least_square:
        rows = max(rows, n_columns)
    return (slice(i, i + rows) for i in range(0, len(arrays[0]), rows))


def _loaded(a: Array, rows: slice, device: Device, dtype: Any) -> Array:
    """Return rows of a matrix on a device: a view where it is there already."""
    part = a[rows]
    if device_of(a).kind == "cpu":
        part = in_memory(part, dtype if device.kind == "cpu" else a.dtype)
    return device.asarray(part).astype(dtype, copy=False)


def _block(arrays: list[Array], rows: slice, device: Device, *, ones: bool = False) -> Array:
    """Return rows of matrices side by side in float64, with a column of ones at the end."""
    xp = device.xp
    parts = [_loaded(a, rows, device, np.float64) for a in arrays]
    if ones:
        parts.append(xp.ones((len(parts[0]), 1)))
    return xp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _mean(X: Array, Y: Array, device: Device) -> Array:
    """Return the means of all columns, of shape (1, columns).

    They are counted from the first row, so that a constant has exactly itself as its mean.
    """
    first = _block([X, Y], slice(0, 1), device)
    total = device.xp.zeros_like(first)
    for rows in _parts([X, Y]):
        total += (_block([X, Y], rows, device) - first).sum(axis=0)
    return first + total / len(X)


def _sums(
    pairs: Iterable[tuple[Array, Array | None]], bias: bool, device: Device
) -> tuple[Array, Array | None, Array | None, int]:
    """Return XᵀX, XᵀY, the diagonal of YᵀY and n, with a column of ones in X if there is a bias."""
    xx = xy = yy = None
    n_samples = 0
    for X, Y in pairs:
        n_samples += len(X)
        for rows in _parts([X] if Y is None else [X, Y]):
            x = _block([X], rows, device, ones=bias)
            xx = _plus(xx, matmul(x.T, x))
            if Y is not None:
                y = _loaded(Y, rows, device, np.float64)
                xy = _plus(xy, matmul(x.T, y))
                yy = _plus(yy, (y * y).sum(axis=0))
    return xx, xy, yy, n_samples


def _plus(total: Array | None, term: Array) -> Array:
    if total is None:
        return term
    total += term
    return total


def _triangle(blocks: Iterable[Array]) -> Array:
    """Return R of A = QR, where the rows of A come in blocks."""
    triangle: Array = None
    for block in blocks:
        xp = array_module(block)
        above = block if triangle is None else xp.concatenate([triangle, block])
        triangle = xp.linalg.qr(above, mode="r")
    return triangle


def _solve(x: Array, y: Array, tolerance: float) -> Array:
    """Return the W of least norm among those with the least ‖x W - y‖."""
    xp = array_module(x, y)
    lengths = xp.sqrt((x * x).sum(axis=0))
    n_varying = int((lengths > 0).sum())  # a constant feature without its mean is zero
    lengths = xp.where(lengths > 0, lengths, 1)
    weight, _, rank, _ = xp.linalg.lstsq(x / lengths, y, rcond=tolerance)
    if int(rank) == n_varying:
        return weight / lengths[:, None]
    return xp.linalg.lstsq(x, y, rcond=tolerance)[0]


def _gram_times(X: Array, v: Array, bias: bool) -> Array:
    """Return XᵀX v, reading X once, with a column of ones in X if there is a bias."""
    device, n_features = device_of(X), X.shape[1]
    dtype = np.float32 if X.dtype.kind == "f" and X.dtype.itemsize <= 4 else np.float64
    weights = v[:n_features].astype(dtype)
    total = device.xp.zeros_like(v)
    for rows in _parts([X]):
        x = _loaded(X, rows, device, dtype)
        outputs = matmul(x, weights)
        if bias:
            outputs += v[n_features].astype(dtype)
            total[n_features] += outputs.sum(dtype=np.float64)
        total[:n_features] += matmul(x.T, outputs)
    return total


def _largest_eigenvalue(
    product: Callable[[Array], Array],
    size: int,
    device: Device,
    n_iterations: int,
    tolerance: float,
    explain: Callable[[], DataError],
) -> tuple[float, float]:
    """Return the largest eigenvalue of a matrix, from below, and the residual of its vector.

    Lanczos's method. Each product is made orthogonal to all vectors before it, twice, since
    rounding leaves something the first time.
    """
    xp = device.xp
    n_iterations = min(n_iterations, size)
    basis = xp.empty((n_iterations, size))
    vector = device.asarray(np.random.default_rng(0).standard_normal((size, 1)))
    length = _length(vector)
    diagonal: list[float] = []
    beside: list[float] = []
    eigenvalue = residual = 0.0
    for i in range(n_iterations):
        basis[i] = vector[:, 0] / length
        vector = product(basis[i][:, None])
        diagonal.append(float((basis[i] * vector[:, 0]).sum()))
        for _ in range(2):
            vector -= matmul(basis[: i + 1].T, matmul(basis[: i + 1], vector))
        length = _length(vector)
        if not math.isfinite(length + diagonal[-1]):
            raise explain()
        projected = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        values, vectors = np.linalg.eigh(projected)
        eigenvalue, residual = float(values[-1]), length * abs(float(vectors[-1, -1]))
        if residual <= tolerance * eigenvalue and i + 1 >= FEWEST_PRODUCTS:
            break
        if length <= 1e-10 * eigenvalue:  # the span is as if multiplied into itself: all is found
            break
        beside.append(length)
    return eigenvalue, residual


def _length(vector: Array) -> float:
    return math.sqrt(float((vector * vector).sum()))


def _refuse_unless_finite(result: Array, **arrays: Array) -> None:
    if not bool(array_module(result).isfinite(result).all()):
        raise _explain(**arrays)


def _explain(**arrays: Array) -> DataError:
    """Say which number is not finite, or that squares are not."""
    for name, array in arrays.items():
        device = device_of(array)
        for rows in _parts([array]):
            part = _loaded(array, rows, device, array.dtype)
            finite = device.xp.isfinite(part)
            if not bool(finite.all()):
                row, column = divmod(int((~finite).argmax()), array.shape[1])
                value = float(part[row, column])
                return DataError(f"{name} has {value} in row {rows.start + row}, column {column}")
    return DataError(f"{' and '.join(arrays)}: numbers so large that their squares are infinite")
