from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16

from gpuml.devices import to_host
from gpuml.rounding import MANTISSA_BITS, rounded

NUMBERS = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
EDGES = np.array([0, -0.0, 1, 1 + 2**-8, 1 + 3 * 2**-8, -1.00390625, 2**-126], np.float32)


def test_bfloat16_is_as_ml_dtypes_rounds(device):
    for x in (NUMBERS, EDGES, NUMBERS.reshape(50, 20).T):
        expected = x.astype(bfloat16).astype(np.float32)
        found = to_host(rounded(device.asarray(x), "bfloat16"))
        assert np.array_equal(found, expected)
        assert found.shape == x.shape


@pytest.mark.parametrize("precision", MANTISSA_BITS)
def test_the_error_is_at_most_half_of_the_last_bit(precision):
    error = np.abs(rounded(NUMBERS, precision) / NUMBERS - 1)
    half = 2.0 ** -(MANTISSA_BITS[precision] + 1)
    assert error.max() <= half
    assert precision == "float32" or error.max() > half / 2


def test_ties_go_to_the_even_number():
    x = np.array([1 + 2**-11, 1 + 3 * 2**-11], np.float32)
    assert rounded(x, "tf32").tolist() == [1, 1 + 2**-9]


def test_the_argument_stays_as_it_is_and_other_types_are_refused():
    x = NUMBERS.copy()
    assert rounded(x, "float32") is not x
    rounded(x, "bfloat16")
    assert np.array_equal(x, NUMBERS)
    with pytest.raises(TypeError, match="astype"):
        rounded(x.astype(float), "tf32")
