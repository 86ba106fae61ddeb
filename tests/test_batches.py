from __future__ import annotations

import numpy as np
import pytest

import gpuml
from gpuml import batches as batches_module
from gpuml.batches import batches


def collected(data):
    pairs = [(gpuml.to_host(x), gpuml.to_host(y)) for x, y in data]
    return [len(x) for x, _ in pairs], *map(np.concatenate, zip(*pairs, strict=True))


@pytest.mark.parametrize("gathered", [1, 200, 2**20])  # bytes: less than a batch, some, all
@pytest.mark.parametrize("batch_size", [1, 7, 10, 32, 99])
def test_every_sample_comes_once_with_its_target(device, monkeypatch, gathered, batch_size):
    monkeypatch.setattr(batches_module, "GATHERED_BYTES", gathered)
    X = device.asarray(np.arange(100.0).reshape(100, 1) * [1, 10])
    y = device.asarray(np.arange(100))
    generator = np.random.default_rng(0)
    lengths, x_seen, y_seen = collected(batches(X, y, batch_size, generator=generator))
    full, rest = divmod(100, batch_size)
    assert lengths == [batch_size] * full + [rest] * (rest > 0), "only the last may be shorter"
    np.testing.assert_array_equal(x_seen, np.stack([y_seen, 10 * y_seen], axis=1))
    np.testing.assert_array_equal(np.sort(y_seen), np.arange(100))
    assert (y_seen != np.arange(100)).any()
    np.testing.assert_array_equal(y_seen, np.random.default_rng(0).permutation(100))


def test_each_epoch_has_its_own_order(device):
    X, y = device.asarray(np.zeros((50, 1))), device.asarray(np.arange(50))
    generator = np.random.default_rng(0)
    first = collected(batches(X, y, 8, generator=generator))[2]
    second = collected(batches(X, y, 8, generator=generator))[2]
    assert (first != second).any()


def test_without_a_generator_the_order_stays(device):
    X, y = device.asarray(np.zeros((50, 1))), device.asarray(np.arange(50))
    np.testing.assert_array_equal(collected(batches(X, y, 8))[2], np.arange(50))


@pytest.mark.parametrize("batch_size", [None, 50, 51])
def test_a_batch_of_everything_is_the_data_themselves(device, batch_size):
    X, y = device.asarray(np.zeros((50, 1))), device.asarray(np.arange(50))
    [(x, t)] = batches(X, y, batch_size, generator=np.random.default_rng(0))
    assert x is X
    assert t is y
