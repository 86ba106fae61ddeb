"""Loss and gradient of a linear model in one pass: right, repeatable, and chosen when it pays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_kernels import compile_cuda_c

import gpuml
from gpuml import MLP, GradientDescent, Linear, kernels, one_pass
from gpuml.losses import mean_squared_error


def problem(device, n, n_features, n_outputs, *, bias=True, dtype=np.float32, seed=0):
    """Return a model with weights, X and Y on the device."""
    rng = np.random.default_rng(seed)
    model = Linear(n_features, n_outputs, bias=bias, dtype=dtype, device=device)
    model.parameters.flat[...] = device.asarray(rng.normal(size=model.n_parameters), dtype)
    X = device.asarray(rng.normal(size=(n, n_features)), dtype)
    return model, X, device.asarray(rng.normal(size=(n, n_outputs)), dtype)


def exact(model, X, Y):
    """Return loss and gradient in float64, and how large what was added up was."""
    X, Y = (gpuml.to_host(a).astype(np.float64) for a in (X, Y))
    parts = {k: gpuml.to_host(p).astype(np.float64) for k, p in model.parameters.items()}
    residual = X @ parts["weight"] + parts.get("bias", 0.0) - Y
    bound = abs(X) @ abs(parts["weight"]) + abs(parts.get("bias", 0.0)) + abs(Y)
    gradient, size = [X.T @ residual], [abs(X).T @ bound]
    if "bias" in parts:
        gradient.append(residual.sum(axis=0))
        size.append(bound.sum(axis=0))
    flat, sizes = (np.concatenate([g.ravel() for g in a]) for a in (gradient, size))
    return np.mean(residual**2), flat * 2 / Y.size, np.mean(bound**2), sizes * 2 / Y.size


def holds(model, X):
    if one_pass.limit(model, X) is not None:
        assert X.shape[1] * model.sizes[1] > 256, "what is small fits"
        return False
    return True


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 700),
    n_features=st.integers(1, 300) | st.integers(1, 2000),
    n_outputs=st.integers(1, 8),
    bias=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@example(n=1, n_features=1, n_outputs=1, bias=True, dtype=np.float32)
@example(n=1, n_features=2000, n_outputs=8, bias=False, dtype=np.float64)
@example(n=515, n_features=1024, n_outputs=1, bias=True, dtype=np.float32)  # several blocks of rows
@example(n=3000, n_features=33, n_outputs=8, bias=True, dtype=np.float32)
def test_it_is_the_gradient(device, n, n_features, n_outputs, bias, dtype):
    model, X, Y = problem(device, n, n_features, n_outputs, bias=bias, dtype=dtype)
    if not holds(model, X):
        return
    gradients = model.parameters.zeros_like()
    gradients.flat[...] = np.nan  # what was there does not matter
    value = one_pass.gradient(X, Y, model.parameters, gradients)
    assert value.shape == ()
    assert value.dtype == gradients.flat.dtype == dtype
    loss, flat, loss_size, sizes = exact(model, X, Y)
    # rounding adds up like a random walk over features and rows
    rounding = 4 * np.finfo(dtype).eps * np.sqrt(n + n_features)
    assert abs(float(value) - loss) <= rounding * loss_size
    assert (abs(gpuml.to_host(gradients.flat) - flat) <= rounding * sizes).all()

    predictions, backward = model.forward(model.parameters, X)
    eager_value, d_predictions = mean_squared_error(predictions, Y)
    eager, _ = backward(d_predictions)
    assert float(value) == pytest.approx(float(eager_value), abs=2 * rounding * loss_size)
    apart = abs(gpuml.to_host(gradients.flat) - gpuml.to_host(eager.flat))
    assert (apart <= 2 * rounding * sizes).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_data_give_the_same_bits(device, dtype):
    model, X, Y = problem(device, 5000, 129, 3, dtype=dtype)
    found = []
    for _ in range(5):
        gradients = model.parameters.zeros_like()
        value = one_pass.gradient(X, Y, model.parameters, gradients)
        found.append(np.append(gpuml.to_host(gradients.flat), float(value)).tobytes())
    assert len(set(found)) == 1


def test_blocks_are_added_up_in_float64(monkeypatch):
    """In float32 a sum of many terms of one sign is off by far more than one rounding."""
    monkeypatch.setattr(one_pass, "CACHED_BYTES", 64)  # 8 rows
    model, X, Y = problem(gpuml.get_device("cpu"), 200_000, 2, 1)
    X[...], Y[...], model.parameters.flat[...] = np.abs(X), 0, 1 / 3
    gradients = model.parameters.zeros_like()
    value = one_pass.gradient(X, Y, model.parameters, gradients)
    loss, flat, _, _ = exact(model, X, Y)
    assert float(value) == pytest.approx(loss, rel=3e-7)
    np.testing.assert_allclose(gradients.flat, flat, rtol=3e-7)


def test_targets_that_are_a_column_of_a_table(device):
    """Their numbers are apart in memory, and no kernel may take them for neighbours."""
    model, X, Y = problem(device, 300, 5, 2)
    table = device.xp.zeros((300, 7), np.float32)
    table[:, 2:6:2] = Y
    for apart in (table[:, 2:6:2], device.xp.asfortranarray(Y)):
        found = []
        for targets in (Y, apart):
            gradients = model.parameters.zeros_like()
            value = one_pass.gradient(X, targets, model.parameters, gradients)
            found.append(np.append(gpuml.to_host(gradients.flat), float(value)))
        np.testing.assert_allclose(*found, rtol=1e-6)


def test_what_is_added_up_is_scaled_as_wanted(device):
    model, X, Y = problem(device, 100, 10, 2, dtype=np.float64)
    whole, scaled = model.parameters.zeros_like(), model.parameters.zeros_like()
    value = one_pass.gradient(X, Y, model.parameters, whole)
    other = one_pass.gradient(X, Y, model.parameters, scaled, scale=3 / 200)
    assert float(other) == pytest.approx(3 * float(value), rel=1e-12)
    np.testing.assert_allclose(
        gpuml.to_host(scaled.flat), 3 * gpuml.to_host(whole.flat), rtol=1e-12
    )


def test_parameters_are_left_alone(device):
    model, X, Y = problem(device, 100, 10, 2)
    before = [gpuml.to_host(a).copy() for a in (model.parameters.flat, X, Y)]
    one_pass.gradient(X, Y, model.parameters, model.parameters.zeros_like())
    for a, b in zip((model.parameters.flat, X, Y), before, strict=True):
        np.testing.assert_array_equal(gpuml.to_host(a), b)


def test_rows_that_do_not_begin_at_a_vector_are_read_right(device):
    """On a GPU four features are loaded at once only where the address allows it."""
    for offset in range(1, 4):
        model, X, Y = problem(device, 50, 8, 1)
        gradients, shifted = model.parameters.zeros_like(), model.parameters.zeros_like()
        memory = device.xp.empty(50 * 8 + offset, np.float32)
        Z = memory[offset:].reshape(50, 8)
        Z[...] = X
        value = one_pass.gradient(X, Y, model.parameters, gradients)
        other = one_pass.gradient(Z, Y, model.parameters, shifted)
        assert float(other) == pytest.approx(float(value), rel=1e-6)
        np.testing.assert_allclose(
            gpuml.to_host(shifted.flat), gpuml.to_host(gradients.flat), rtol=1e-5, atol=1e-6
        )


def test_arrays_of_two_devices_are_refused(device):
    if device.kind == "cpu":
        pytest.skip("needs two devices")
    model, X, Y = problem(device, 10, 3, 1)
    with pytest.raises(TypeError):
        one_pass.gradient(gpuml.to_host(X), Y, model.parameters, model.parameters.zeros_like())


def test_what_it_cannot_do_it_says(device):
    model, X, _ = problem(device, 10, 4, 1)
    assert one_pass.limit(model, X) is None
    assert "not contiguous" in one_pass.limit(model, X[:, ::-1])
    assert "not contiguous" in one_pass.limit(model, device.xp.ones((4, 10), np.float32).T)
    assert "Linear models" in one_pass.limit(MLP([4, 3, 1], device=device), X)
    half = Linear(4, 1, dtype=np.float16, device=device)
    assert "float32 or float64" in one_pass.limit(half, X.astype(np.float16))

    class Mine(Linear):
        def forward(self, parameters, x):
            return super().forward(parameters, abs(x))

    assert "Linear models" in one_pass.limit(Mine(4, 1, device=device), X)
    wide, X, _ = problem(device, 2, 4096, 8)
    reason = one_pass.limit(wide, X)
    if device.kind == "cpu":
        assert reason is None
    else:
        assert reason == "4096 features and 8 outputs do not fit into registers"


@pytest.mark.parametrize(
    ("n", "n_features", "n_outputs", "dtype", "engine"),
    [
        (2**21 // 400, 100, 8, np.float32, "eager"),  # just below 2 MiB
        (2**21 // 400 + 1, 100, 8, np.float32, "one_pass"),
        (2**21 // 400 + 1, 100, 9, np.float32, "eager"),
        (2**21 // 800 + 1, 100, 1, np.float64, "one_pass"),
    ],
)
def test_training_chooses_it_where_it_pays(n, n_features, n_outputs, dtype, engine):
    model, X, Y = problem(gpuml.get_device("cpu"), n, n_features, n_outputs, dtype=dtype)
    history = gpuml.train(model, X, Y, batch_size=None, n_epochs=1)
    assert history.engine == engine
    halves = gpuml.train(model, X, Y, batch_size=n // 2, n_epochs=1)
    assert halves.engine == "eager", "a batch counts, not the data"


def test_on_a_gpu_training_chooses_it_for_every_size(device):
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    for n in (1, 100_000):
        model, X, Y = problem(device, n, 20, 2)
        assert gpuml.train(model, X, Y, batch_size=None, n_epochs=1).engine == "one_pass"


def test_rows_that_are_not_contiguous_take_the_other_way(device):
    model, X, Y = problem(device, 60, 12, 2, dtype=np.float64)
    model.parameters.flat[...] = 0
    twin = Linear(12, 2, dtype=np.float64, device=device)
    transposed = device.xp.asfortranarray(X)
    with pytest.raises(ValueError, match="rows of X are not contiguous"):
        gpuml.train(model, transposed, Y, batch_size=None, engine="one_pass")
    options = {"optimizer": GradientDescent(0.05), "n_epochs": 5, "batch_size": None}
    assert gpuml.train(model, transposed, Y, **options).engine == "eager"
    gpuml.train(twin, X, Y, engine="one_pass", **options)
    np.testing.assert_allclose(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat), rtol=1e-12
    )

    # a source of batches may yield one such batch among others
    model.parameters.flat[...] = 0
    twin.parameters.flat[...] = 0
    options["batch_size"] = 30
    gpuml.train(model, [(X[:30], Y[:30]), (transposed[30:], Y[30:])], engine="one_pass", **options)
    gpuml.train(twin, X, Y, shuffle=False, engine="eager", **options)
    np.testing.assert_allclose(
        gpuml.to_host(model.parameters.flat), gpuml.to_host(twin.parameters.flat), rtol=1e-12
    )


# --- the kernel's table, and its source ------------------------------------------------------

SIZES = [1, 2, 3, 4, 7, 31, 32, 33, 64, 100, 129, 255, 256, 500, 1000, 1024, 1500, 2000, 2048, 4096]


@pytest.mark.parametrize("itemsize", [4, 8])
def test_the_table_covers_all_features_and_fits_registers(itemsize):
    found = 0
    for n_features in SIZES:
        for n_outputs in range(1, 9):
            for vector in {1, 16 // itemsize if n_features % (16 // itemsize) == 0 else 1}:
                shape = one_pass._shape(n_features, n_outputs, itemsize, vector)
                if shape is None:
                    continue
                found += 1
                lanes, values, rows = shape
                assert lanes in (1, 2, 4, 8, 16, 32, one_pass.THREADS)
                assert values % vector == 0
                assert lanes * values >= n_features > (lanes // 2) * values - vector * lanes
                words = itemsize // 4 * (2 * values * n_outputs + 2 * rows * values)
                assert words <= one_pass.REGISTER_WORDS
                assert rows >= 1
                shared = (n_features * n_outputs + n_outputs + 1) * itemsize
                assert shared <= one_pass.SHARED_BYTES
    assert found > 100
    assert one_pass._shape(1024, 1, 4, 4), "the size of the course's measurement"
    assert one_pass._shape(256, 8, 4, 4) or one_pass._shape(128, 8, 4, 4)


@pytest.mark.parametrize(
    ("n_features", "n_outputs", "itemsize", "vector"),
    [(1, 1, 4, 1), (3, 8, 8, 1), (64, 2, 8, 2), (1024, 1, 4, 4), (2000, 1, 4, 4), (1500, 1, 8, 1)],
)
def test_the_source_compiles_for_every_shape(n_features, n_outputs, itemsize, vector):
    shape = one_pass._shape(n_features, n_outputs, itemsize, vector)
    assert shape is not None
    lanes, values, rows = shape
    sizes = {
        "ELEMENT": {4: "float", 8: "double"}[itemsize],
        "FEATURES": n_features,
        "OUTPUTS": n_outputs,
        "THREADS": one_pass.THREADS,
        "LANES": lanes,
        "VALUES": values,
        "ROWS": rows,
        "VECTOR": vector,
    }
    head = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
    size, log = compile_cuda_c(head + kernels.source("linear_gradient"), "sm_90")
    assert size > 0, log
    assert log == ""


def test_the_kernel_spills_no_registers(device):
    """What does not fit into registers would go through memory, and take several times as long."""
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    for n_features, n_outputs, dtype in [
        (1024, 1, np.float32),
        (1000, 1, np.float32),
        (256, 4, np.float32),
        (100, 8, np.float32),
        (512, 1, np.float64),
    ]:
        model, X, Y = problem(device, 64, n_features, n_outputs, dtype=dtype)
        if one_pass.limit(model, X) is not None:
            continue
        launched = []
        real = one_pass.load_kernel

        def noted(*arguments, _launched=launched, _real=real, **options):
            kernel = _real(*arguments, **options)
            _launched.append(kernel)
            return kernel

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(one_pass, "load_kernel", noted)
            one_pass._kernels.cache_clear()  # another test may have had this shape
            one_pass.gradient(X, Y, model.parameters, model.parameters.zeros_like())
        assert launched[0].local_size_bytes == 0, (n_features, n_outputs, dtype)
