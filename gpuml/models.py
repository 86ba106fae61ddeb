"""Models: named parameters, predictions from them, and the gradient carried backward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from typing import Any, Protocol, TypeAlias

import numpy as np

from gpuml import gpu_layers
from gpuml.datasets import Preprocessing, check_entries
from gpuml.devices import CPU, Array, Device, array_module, device_of, get_device, to_host
from gpuml.errors import ModelFileError, printable
from gpuml.gpu_layers import fused
from gpuml.matmul import Precision, matmul
from gpuml.model_files import checksum, load_arrays, save_arrays
from gpuml.plain_files import parse_json, within_memory

Shape: TypeAlias = tuple[int, ...]


class Parameters(Mapping[str, Array]):
    """Named arrays that are views of one flat vector.

    The names serve people and layers; the vector serves whatever treats all parameters alike:
    the optimizer's update, a copy, a sum over GPUs. Gradients have the same form.

    Parameters
    ----------
    flat : array of shape (…, n_parameters)
        The vector; its leading axes are in front of every parameter.
    shapes : mapping of str to tuple of int
        The shape of each parameter, in the order in which they lie in the vector.

    Attributes
    ----------
    rounded : Parameters or None
        The same in bfloat16, where :meth:`keep_rounded` was called: what changes the vector has
        to change it as well, and the optimizers of this package do.

    Raises
    ------
    ValueError
        If the shapes do not add up to the length of the vector.
    """

    def __init__(self, flat: Array, shapes: Mapping[str, Shape]) -> None:
        n_parameters = sum(map(math.prod, shapes.values()))
        if n_parameters != flat.shape[-1]:
            raise ValueError(
                f"the shapes need {n_parameters} numbers, the vector has {flat.shape[-1]}"
            )
        self.flat = flat
        self.shapes = dict(shapes)
        self.rounded: Parameters | None = None
        self._views: dict[str, Array] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + math.prod(shape)
            self._views[name] = flat[..., start:stop].reshape(*flat.shape[:-1], *shape)
            start = stop

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __setitem__(self, name: str, values: Array) -> None:
        self._views[name][...] = values

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
        return f"Parameters({self.flat.shape[-1]:,} numbers: {shapes})"

    def written(self, *names: str) -> None:
        """Take note that these gradients are complete: a backward pass says so, layer by layer.

        Nothing follows from it here; several ranks add them up meanwhile.
        """

    def zeros_like(self) -> Parameters:
        """Return parameters of the same names, shapes, type and device, all zero."""
        with device_of(self.flat).use():
            flat = array_module(self.flat).zeros_like(self.flat)
        return Parameters(flat, self.shapes)

    def keep_rounded(self) -> None:
        """Keep a copy on a GPU in bfloat16, unless cuBLAS would read its matrices slowly.

        That is where they do not begin at multiples of 16 bytes.
        """
        start = 0
        for shape in self.shapes.values():
            if start % 8 and shape[0] > 1:
                return
            start += math.prod(shape)
        self.rounded = Parameters(_rounded(self.flat), self.shapes)


class Backward(Protocol):
    """What `Model.forward` hands back: carries a gradient from the predictions to the parameters.

    Parameters
    ----------
    d_predictions : array of shape (…, batch, outputs)
        The gradient of the loss with respect to the predictions.
    gradients : Parameters, optional
        Where to write; new ones are made unless given.
    input_gradient : bool
        Whether to carry the gradient on to the inputs, at the price of one more product.

    Returns
    -------
    gradients : Parameters
    d_x : array of shape (…, batch, features) or None

    Notes
    -----
    That of :class:`Model` itself can do more, which its subclasses with a `forward` of their own
    need not: ``parameter_gradients=False`` leaves out the products for the parameters, and
    returns None and d_x. `row_factors` is called with each layer's inputs and the gradients at
    its outputs, from the last layer to the first, and returns a factor for each row, of shape
    (batch, 1), by which the row's share of all gradients is multiplied.
    """

    def __call__(
        self,
        d_predictions: Array,
        gradients: Parameters | None = None,
        *,
        input_gradient: bool = False,
    ) -> tuple[Parameters, Array | None]:
        """Carry the gradient back."""
        ...


RowFactors: TypeAlias = Callable[[Sequence[tuple[Array, Array]]], Array]


class Model:
    """Affine layers with ReLU between them; :class:`Linear` has one layer, :class:`MLP` several.

    A model of one's own derives from this class and overrides :meth:`forward`; it trains and
    predicts like the others, but only the classes of this package can be saved.

    Parameters
    ----------
    parameters : Parameters
        The weights and biases, on one device.
    layers : sequence of (str, str)
        The names of each layer's weight and bias among the parameters, from the inputs on.

    Attributes
    ----------
    parameters : Parameters
        ``model.parameters[name] = values`` writes them.
    preprocessing : Preprocessing or None
        How raw tables become this model's inputs, and its outputs answers; saved with it.
    """

    def __init__(self, parameters: Parameters, layers: Sequence[tuple[str, str]]) -> None:
        self.parameters = parameters
        self.layers = tuple(layers)
        self.preprocessing: Preprocessing | None = None

    @property
    def device(self) -> Device:
        """The device on which the parameters live."""
        return device_of(self.parameters.flat)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type of the parameters."""
        dtype: np.dtype[Any] = self.parameters.flat.dtype
        return dtype

    @property
    def n_parameters(self) -> int:
        """How many numbers training may change."""
        return int(self.parameters.flat.shape[-1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of features, of each hidden layer's units, and of outputs."""
        shapes = [self.parameters.shapes[weight] for weight, _ in self.layers]
        return shapes[0][0], *(shape[1] for shape in shapes)

    def forward(
        self, parameters: Parameters, x: Array, *, precision: Precision | None = None
    ) -> tuple[Array, Backward]:
        """Return the predictions for `x`, and the function that carries gradients back.

        Parameters
        ----------
        parameters : Parameters
            The model's own, or others of the same names and shapes.
        x : array of shape (…, batch, features)
            Inputs, on the device of the parameters.
        precision : {"float32", "tf32", "bfloat16"}, optional
            How a GPU multiplies float32, as in :func:`gpuml.batched_matmul`. With
            ``"bfloat16"`` what layers pass to each other is stored in 16 bits as well; the
            parameters, their gradients and the predictions stay float32.

        Returns
        -------
        predictions : array of shape (…, batch, outputs)
        backward : Backward

        Raises
        ------
        TypeError
            If `x` lives on another device than the parameters.
        ValueError
            If the number of features does not fit.
        """
        array_module(x, parameters.flat)  # refuses a mixture
        layers = self.layers
        n_features = parameters[layers[0][0]].shape[-2]
        if x.ndim < 2 or x.shape[-1] != n_features:
            raise ValueError(f"x has shape {x.shape}, the model expects (batch, {n_features})")
        half = precision == "bfloat16" and type(x) is not np.ndarray
        inputs = [_rounded(x) if half else x]  # of each layer, kept for the way back
        rounded = parameters.rounded
        weights = [parameters[w] for w, _ in layers]
        if half:
            weights = [rounded[w] if rounded else _rounded(parameters[w]) for w, _ in layers]
        for weight, (_, bias) in zip(weights, layers, strict=True):
            last = len(inputs) == len(layers)
            out = _sums(inputs[-1], weight, parameters.flat.dtype) if half and last else None
            inputs.append(
                linear(
                    inputs[-1],
                    weight,
                    parameters.get(bias),
                    with_relu=not last,
                    out=out,
                    precision=precision,
                )
            )
        predictions = inputs.pop()

        def backward(
            d_predictions: Array,
            gradients: Parameters | None = None,
            *,
            input_gradient: bool = False,
            parameter_gradients: bool = True,
            row_factors: RowFactors | None = None,
        ) -> tuple[Any, Array | None]:
            if not parameter_gradients:
                gradients = None
            elif gradients is None:
                gradients = parameters.zeros_like()
            at_once = gradients if row_factors is None else None  # what is written on the way
            signals: list[Array] = []  # the gradient at each layer's outputs, last layer first
            d = _rounded(d_predictions) if half else d_predictions
            summed = False  # whether the gradient of this layer's bias is written already
            for i in reversed(range(len(layers))):
                weight, bias = layers[i]
                if row_factors is not None:
                    signals.append(d)
                if at_once is not None:
                    d_bias = None if summed else at_once.get(bias)
                    linear_gradient(inputs[i], d, at_once[weight], d_bias, precision=precision)
                    at_once.written(weight, bias)
                if i == 0 and not input_gradient:
                    break
                turned = weights[i].swapaxes(-1, -2)
                out = _sums(d, turned, parameters.flat.dtype) if half and i == 0 else None
                d = matmul(d, turned, out, precision=precision)
                if i > 0:
                    d_bias = at_once.get(layers[i - 1][1]) if at_once is not None else None
                    summed = relu_slope(d, inputs[i], d_bias)
            if gradients is not None and row_factors is not None:
                factors = row_factors(list(zip(reversed(inputs), signals, strict=True)))
                for i, signal in zip(reversed(range(len(layers))), signals, strict=True):
                    weight, bias = layers[i]
                    signal *= factors
                    d_bias = gradients.get(bias)
                    options = {"precision": precision}
                    linear_gradient(inputs[i], signal, gradients[weight], d_bias, **options)
                    gradients.written(weight, bias)
            return gradients, d if input_gradient else None

        return predictions, backward

    def __call__(self, x: Array) -> Array:
        """Return the predictions for `x`: logits, or numbers, of shape (…, batch, outputs)."""
        with self.device.use():
            return self.forward(self.parameters, x)[0]

    def to(self, device: Device | str) -> Model:
        """Move the parameters to a device and return the model."""
        target = get_device(device)
        if target != self.device:
            flat = target.asarray(to_host(self.parameters.flat))
            self.parameters = Parameters(flat, self.parameters.shapes)
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model to a safetensors file, which :func:`load_model` reads.

        The file appears whole or not at all: it is written beside its place, synced, renamed.

        Parameters
        ----------
        path : path
            The file; an existing one is replaced. A symbolic link is replaced too, and what it
            points to stays as it is.

        Raises
        ------
        OSError
            If it cannot be written.
        ModelFileError
            If the names of features and classes are longer than :func:`load_model` would read.
        TypeError
            If it is a class of one's own, which no file could bring back.
        """
        if type(self) not in MODELS.values():
            raise TypeError(
                f"{type(self).__name__} is not one of {', '.join(MODELS)}, which load_model can "
                "make: save model.parameters with gpuml.model_files.save_arrays"
            )
        arrays = {name: to_host(array) for name, array in self.parameters.items()}
        description: dict[str, Any] = {"model": type(self).__name__, "sizes": self.sizes}
        if self.preprocessing is not None:
            tables, description["preprocessing"] = self.preprocessing.to_arrays()
            arrays |= {f"preprocessing.{name}": table for name, table in tables.items()}
        description["sha256"] = checksum(arrays, json.dumps(description, sort_keys=True))
        save_arrays(path, arrays, {"gpuml": json.dumps(description)})

    def __repr__(self) -> str:
        sizes = " " + "-".join(map(str, self.sizes)) if self.layers else ""
        return f"{type(self).__name__}{sizes} ({self.n_parameters:,} parameters, {self.dtype})"


class Linear(Model):
    """A matrix W and a bias b: Y = X W + b.

    Both start at zero: with the losses of this package the problem is convex, so that no start
    leads to a worse loss than another.

    Parameters
    ----------
    n_features, n_outputs : int
        W has shape (n_features, n_outputs), b (1, n_outputs).
    bias : bool
        Whether to have b at all.
    dtype : dtype
        Type of the parameters.
    device : Device or str, optional
        Where they live; what :func:`get_device` returns unless given.

    Examples
    --------
    >>> Linear(3, 2, device="cpu")
    Linear 3-2 (8 parameters, float32)
    """

    def __init__(
        self,
        n_features: int,
        n_outputs: int,
        *,
        bias: bool = True,
        dtype: Any = np.float32,
        device: Device | str | None = None,
    ) -> None:
        layers = self.layer_names(1)
        shapes = _affine_shapes(layers, [n_features, n_outputs])
        if not bias:
            del shapes["bias"]
        super().__init__(_zeros(shapes, dtype), layers)
        self.to(get_device(device))

    @staticmethod
    def layer_names(n_layers: int) -> list[tuple[str, str]]:
        """Return the names of the weight and the bias; `n_layers` must be 1."""
        if n_layers != 1:
            raise ValueError(f"a linear model has one layer, not {n_layers}")
        return [("weight", "bias")]


class MLP(Model):
    """A multilayer perceptron: affine layers with ReLU between them, none after the last.

    Weights are drawn from normal distributions of variance 2 / inputs (1 / inputs in the last
    layer, which no ReLU follows), biases start at zero.

    Parameters
    ----------
    sizes : sequence of int
        Features, units of each hidden layer, outputs: ``[64, 128, 10]``.
    seed : int
        For the start weights; the same on every device.
    dtype : dtype
        Type of the parameters.
    device : Device or str, optional
        Where they live; what :func:`get_device` returns unless given.

    References
    ----------
    He, Zhang, Ren, Sun: Delving Deep into Rectifiers. ICCV 2015. Section 2.2.

    Examples
    --------
    >>> MLP([64, 128, 10], device="cpu")
    MLP 64-128-10 (9,610 parameters, float32)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int = 0,
        dtype: Any = np.float32,
        device: Device | str | None = None,
    ) -> None:
        layers = self.layer_names(len(sizes) - 1)
        start = _zeros(_affine_shapes(layers, sizes), dtype)
        generator = np.random.default_rng(seed)
        for i, (weight, _) in enumerate(layers):
            gain = 2 if i < len(layers) - 1 else 1
            shape = start.shapes[weight]
            start[weight] = generator.standard_normal(shape) * math.sqrt(gain / shape[0])
        super().__init__(start, layers)
        self.to(get_device(device))

    def with_outputs(self, n_outputs: int, *, seed: int = 0) -> MLP:
        """Return a model with these hidden layers and a new last one, for another task.

        Parameters
        ----------
        n_outputs : int
        seed : int
            For the last layer's start weights.

        Returns
        -------
        MLP
            On the same device, of the same type; its hidden layers are copies. Its
            `preprocessing` is None, since the answers are others; the features are to be
            prepared as before, by ``model.preprocessing.features(X)``.

        Examples
        --------
        >>> MLP([64, 128, 10], device="cpu").with_outputs(2)
        MLP 64-128-2 (8,578 parameters, float32)
        """
        sizes = [*self.sizes[:-1], n_outputs]
        model = MLP(sizes, seed=seed, dtype=self.dtype, device=self.device)
        for weight, bias in self.layers[:-1]:
            model.parameters[weight] = self.parameters[weight]
            model.parameters[bias] = self.parameters[bias]
        return model

    @staticmethod
    def layer_names(n_layers: int) -> list[tuple[str, str]]:
        """Return the names of the weights and biases, layer by layer."""
        return [(f"layers.{i}.weight", f"layers.{i}.bias") for i in range(n_layers)]


MODELS: dict[str, type[Linear] | type[MLP]] = {"Linear": Linear, "MLP": MLP}


def load_model(
    path: str | PathLike[str],
    *,
    device: Device | str | None = None,
    sha256: str | None = None,
) -> Model:
    """Read a model from a file that :meth:`Model.save` wrote. No code in it is ever run.

    A file from others may be damaged, or made to do harm: whatever does not fit together is
    refused, before more memory is taken than the file is long. Whether its numbers are those
    that somebody trained, only a SHA-256 from that somebody can say.

    Parameters
    ----------
    path : path
        A safetensors file.
    device : Device or str, optional
        Where the parameters are to live; what :func:`get_device` returns unless given.
    sha256 : str, optional
        The SHA-256 that the file must have, in hexadecimal; ``gpuml train`` prints it.

    Returns
    -------
    Model

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ModelFileError
        If it is damaged, truncated, not a model of gpuml's, or has another SHA-256; the message
        says which.
    DeviceMemoryError
        If it takes more memory than is free.
    ValueError
        If `sha256` cannot be one.
    """
    arrays, metadata = load_arrays(path, sha256=sha256)
    if "gpuml_checkpoint" in metadata:
        raise ModelFileError(
            f"{path} is a checkpoint, from which gpuml.train(…, checkpoint=…) goes on, and no "
            "model: model.save(path) writes one"
        )
    if "gpuml" not in metadata:
        raise ModelFileError(f"{path} is a safetensors file, but gpuml did not write it")
    try:
        description = parse_json(metadata["gpuml"])
        stated = description.pop("sha256", None)
        found = checksum(arrays, json.dumps(description, sort_keys=True))
        model_class = MODELS[description["model"]]
        sizes = list(description["sizes"])
        options = description.get("preprocessing")
        check_entries(description, ("model", "sizes", "preprocessing"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = printable(repr(error), 200)
        raise ModelFileError(f"{path} does not describe a model of gpuml's: {told}") from None
    if stated != found:
        raise ModelFileError(f"{path} is damaged: its checksum does not fit")

    tables = {
        name.removeprefix("preprocessing."): arrays.pop(name).copy()  # not a view of all the file
        for name in list(arrays)
        if name.startswith("preprocessing.")
    }
    dtype = _check_arrays(path, arrays, model_class, sizes)
    with within_memory(path):
        model: Model
        if model_class is Linear:
            model = Linear(*sizes, bias="bias" in arrays, dtype=dtype, device=CPU)
        else:
            model = MLP(sizes, dtype=dtype, device=CPU)
        for name, array in arrays.items():
            model.parameters[name] = array
        if options is not None or tables:
            try:
                model.preprocessing = Preprocessing.from_arrays(tables, options or {})
                fits = len(model.preprocessing.mean), model.preprocessing.n_outputs
                if fits != (sizes[0], sizes[-1]):
                    raise ValueError(f"it is for {fits[0]} features and {fits[1]} outputs")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                told = printable(repr(error), 200)
                raise ModelFileError(f"{path}: its preprocessing is damaged: {told}") from None
    return model.to(get_device(device))


def _check_arrays(
    path: str | PathLike[str],
    arrays: Mapping[str, np.ndarray[Any, Any]],
    model_class: type[Linear] | type[MLP],
    sizes: Sequence[int],
) -> np.dtype[Any]:
    """Refuse arrays that are not what the file says; return their element type."""
    try:
        if not all(type(size) is int for size in sizes):
            raise ValueError(f"sizes must be integers, got {printable(sizes)}")
        if len(sizes) - 1 > len(arrays):
            raise ValueError(f"{len(sizes)} sizes are too many for {len(arrays)} arrays")
        expected = _affine_shapes(model_class.layer_names(len(sizes) - 1), sizes)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from None
    if model_class is Linear and "bias" not in arrays:
        del expected["bias"]
    found = {name: array.shape for name, array in arrays.items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ModelFileError(
                f"{path}: {printable(name)} should have shape {expected.get(name, 'none')}, "
                f"the file has {found.get(name, 'none')}"
            )
    dtypes = {array.dtype for array in arrays.values()}
    if len(dtypes) != 1 or next(iter(dtypes)).kind != "f":
        names = ", ".join(sorted(map(str, dtypes)))
        raise ModelFileError(f"{path}: expected weights of one floating-point type, found {names}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ModelFileError(f"{path}: {name} has numbers that are not finite")
    return next(iter(dtypes))


def _affine_shapes(layers: Sequence[tuple[str, str]], sizes: Sequence[int]) -> dict[str, Shape]:
    """Return the shape of each layer's weight and bias.

    Raises
    ------
    ValueError
        If there are fewer than two sizes, or one is not a positive integer.
    """
    if len(sizes) < 2 or any(size != int(size) or size < 1 for size in sizes):
        raise ValueError(
            f"sizes must be two or more positive integers, got {printable(list(sizes))}"
        )
    sizes = [int(size) for size in sizes]  # np.int64 and 64.0 as well
    shapes: dict[str, Shape] = {}
    for (weight, bias), n_in, n_out in zip(layers, sizes[:-1], sizes[1:], strict=True):
        shapes |= {weight: (n_in, n_out), bias: (1, n_out)}
    return shapes


def _zeros(shapes: Mapping[str, Shape], dtype: Any) -> Parameters:
    if np.dtype(dtype).kind != "f":
        raise TypeError(f"parameters must be of a floating-point type, got {np.dtype(dtype)}")
    return Parameters(np.zeros(sum(map(math.prod, shapes.values())), dtype), shapes)


def linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    *,
    with_relu: bool = False,
    out: Array | None = None,
    precision: Precision | None = None,
) -> Array:
    """Return x W + b, or max(x W + b, 0).

    Parameters
    ----------
    x : array of shape (…, batch, in)
    weight : array of shape (…, in, out)
    bias : array of shape (…, 1, out) or None
    with_relu : bool
        Whether to replace what is negative by 0.
    out : array of shape (…, batch, out), optional
        Where to write the result.
    precision : {"float32", "tf32", "bfloat16"}, optional
        Of the product, as in :func:`gpuml.batched_matmul`.

    Returns
    -------
    array of shape (…, batch, out)
    """
    outputs = matmul(x, weight, out, precision=precision)
    if bias is not None and fused(array_module(outputs)) and gpu_layers.fits(outputs, bias):
        gpu_layers.add_bias(outputs, bias, relu=with_relu)
        return outputs
    if bias is not None:
        outputs += bias
    if with_relu:
        relu(outputs)
    return outputs


def relu(z: Array) -> None:
    """Replace `z` by max(z, 0), in place."""
    if isinstance(z, np.ndarray):
        # NumPy compares with a row of zeros twice as fast as with one zero.
        np.maximum(z, np.zeros(z.shape[-1], z.dtype), out=z)
    else:
        array_module(z).maximum(z, 0, out=z)


def relu_slope(d: Array, outputs: Array, d_bias: Array | None = None) -> bool:
    """Carry a gradient back through ReLU in place: 0 where the output was 0.

    Parameters
    ----------
    d, outputs : array of shape (…, batch, units)
    d_bias : array of shape (…, 1, units), optional
        Gets the sum of d over the batch, where that costs no reading of its own.

    Returns
    -------
    bool
        Whether `d_bias` was written.
    """
    alike = d.dtype == outputs.dtype and outputs.flags.c_contiguous
    if not (fused(array_module(d)) and alike and gpu_layers.fits(d, d_bias)):
        d *= outputs > 0
    elif d_bias is not None and d.ndim == 2:
        gpu_layers.back_with_sums(d, outputs, d_bias)
        return True
    else:
        gpu_layers.relu_slope(d, outputs)
    return False


def linear_gradient(
    x: Array,
    d_outputs: Array,
    d_weight: Array,
    d_bias: Array | None,
    *,
    precision: Precision | None = None,
) -> None:
    """Write the gradients of :func:`linear`: dW = xᵀ d, db = the sum of d over the batch.

    Parameters
    ----------
    x : array of shape (…, batch, in)
    d_outputs : array of shape (…, batch, out)
    d_weight : array of shape (…, in, out)
        Written.
    d_bias : array of shape (…, 1, out) or None
        Written.
    precision : {"float32", "tf32", "bfloat16"}, optional
        Of the product, as in :func:`gpuml.batched_matmul`.
    """
    matmul(x.swapaxes(-1, -2), d_outputs, d_weight, precision=precision)
    if d_bias is None:
        return
    xp = array_module(d_outputs)
    if fused(xp) and d_outputs.ndim == 2 and gpu_layers.fits(d_outputs, d_bias):
        gpu_layers.back_with_sums(d_outputs, None, d_bias)
    elif fused(xp):  # the product with a row of ones is one launch, and takes any type
        matmul(_ones(d_outputs.shape[-2], d_outputs.dtype, d_bias.device.id), d_outputs, d_bias)
    elif xp is np:  # the same on the CPU, where a sum takes four times as long
        matmul(np.ones((1, d_outputs.shape[-2]), d_outputs.dtype), d_outputs, d_bias)
    else:
        xp.add.reduce(d_outputs, axis=-2, keepdims=True, out=d_bias)


@cache
def _ones(n: int, dtype: np.dtype[Any], device: int) -> Array:
    where = Device("gpu", device)
    with where.use():
        ones = where.xp.ones((1, n), np.float32)
        return _rounded(ones) if dtype.name == "bfloat16" else ones.astype(dtype)


def _rounded(x: Array) -> Array:
    """Return an array of a GPU as bfloat16."""
    return x if x.dtype.name == "bfloat16" else gpu_layers.to_bfloat16(x.astype("f", copy=False))


def _sums(a: Array, b: Array, dtype: Any) -> Array:
    """Return an array for a product's sums, of another type than its factors."""
    shape = (*a.shape[:-1], b.shape[-1])
    return array_module(a).empty(shape, dtype)
