"""Random numbers from a key and a counter: NumPy's stream, on each device."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpuml.devices import to_host
from gpuml.noise import Noise


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 24), (np.float64, 53)])
def test_uniform_numbers_are_those_of_numpy_to_the_bit(device, dtype, bits):
    noise = Noise(3, device)
    key = np.random.SeedSequence(3).generate_state(2, np.uint64)
    for draw, shape in enumerate([(5, 7), (4000,), (1, 1), (2, 3)]):
        words = np.random.Philox(key=key, counter=[0, draw, 0, 0]).random_raw(math.prod(shape))
        expected = 2 * ((words >> np.uint64(64 - bits)) / 2.0**bits) - 1
        found = to_host(noise.uniform(shape, dtype))
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected.reshape(shape).astype(dtype))
    assert to_host(noise.state).tolist() == [*key.tolist(), 4]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_normal_numbers_are_normal(device, dtype):
    n = 400_001
    z = to_host(Noise(0, device).normal((n,), dtype)).astype(np.float64)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    for limit in (-2.5, -1, 0, 0.5, 3):  # the share below it
        share = 0.5 * (1 + math.erf(limit / math.sqrt(2)))
        assert abs((z < limit).mean() - share) < 5 * math.sqrt(share * (1 - share) / n)
    for apart in (1, 2, 3, 4):  # neighbours come from one counter
        assert abs((z[:-apart] * z[apart:]).mean()) < 5 / math.sqrt(n)
    assert abs((z[:-1] ** 2 * z[1:] ** 2).mean() - 1) < 15 * math.sqrt(8 / n)


def test_both_devices_draw_the_same_normal_numbers(device):
    import gpuml

    found = to_host(Noise(5, device).normal((1001,), np.float32))
    expected = Noise(5, gpuml.get_device("cpu")).normal((1001,), np.float64)
    assert abs(found).max() > 3
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_each_draw_is_another_and_a_state_put_back_repeats_it(device):
    noise = Noise(1, device)
    state = noise.state.copy()
    first, second = (to_host(noise.normal((9,), np.float32)) for _ in range(2))
    assert (first != second).all()
    noise.state[...] = state
    np.testing.assert_array_equal(to_host(noise.normal((9,), np.float32)), first)
    other = to_host(Noise(2, device).normal((9,), np.float32))
    assert (other != first).all()


def test_without_a_seed_the_key_comes_from_the_system(device):
    keys = {tuple(to_host(Noise(None, device).state)[:2].tolist()) for _ in range(5)}
    assert len(keys) == 5


def test_noise_is_added_to_what_is_kept(device):
    z = to_host(Noise(1, device).normal((50,), np.float64))
    out = device.asarray(np.arange(50.0))
    Noise(1, device).add_normal(out, 0.5, 3.0)
    np.testing.assert_allclose(to_host(out), 0.5 * np.arange(50) + 3 * z, rtol=1e-12, atol=1e-12)
    out[...] = math.nan
    Noise(1, device).add_normal(out, 0.0, 1.0)
    np.testing.assert_allclose(to_host(out), z, rtol=1e-12, atol=1e-12)
