from __future__ import annotations

import numpy as np
import pytest

from gpuml.operations import ArrayOperation, array_operations, time_line


def names(function, *arguments):
    return [operation.name for operation in array_operations(function, *arguments)]


def test_every_operation_is_noted_once_in_its_order():
    a, b = np.ones((2, 3, 4), np.float32)

    def work(a, b):
        return -(np.exp(a @ b.T) * 2).sum(axis=1, keepdims=True).max()

    expected = ["matmul", "exp", "multiply", "add.reduce", "maximum.reduce", "negative"]
    assert names(work, a, b) == expected


def test_arithmetic_and_bytes_are_counted():
    a, b = np.ones((4, 3), np.float32), np.ones((3, 5), np.float32)
    [product] = array_operations(np.matmul, a, b)
    assert product == ArrayOperation("matmul", 2 * 4 * 3 * 5, 4 * (12 + 15 + 20))
    [add] = array_operations(np.add, a, 1.0)
    assert (add.n_operations, add.n_bytes) == (12, 4 * 24), "a Python number is no array"
    [total] = array_operations(np.sum, a)
    assert (total.n_operations, total.n_bytes) == (12, 4 * 13)


def test_arrays_in_lists_and_those_changed_in_place_count():
    parameters = [np.zeros(2, np.float32), np.zeros(3, np.float32)]

    def update(parameters):
        for p in parameters:
            p += 1

    assert names(update, parameters) == ["add", "add"]
    assert all((p == 1).all() and type(p) is np.ndarray for p in parameters)


def test_an_operation_is_limited_by_memory_or_by_arithmetic():
    ceilings = {"copy": 10.0, "gemm_float32": 100.0}
    assert ArrayOperation("add", 10, 40).seconds(ceilings) == 4
    assert ArrayOperation("matmul", 1000, 40).seconds(ceilings) == 10


@pytest.mark.parametrize(
    ("seconds", "settings", "host", "device"),
    [
        ([1, 1], {}, [(0, 2), (2, 4)], [(2, 3), (4, 5)]),  # the device waits
        ([5, 1], {}, [(0, 2), (2, 4)], [(2, 7), (7, 8)]),  # the queue fills
        ([1, 1, 1], {"n_launches": 1, "gap": 3}, [(0, 2)], [(2, 3), (6, 7), (10, 11)]),
    ],
)
def test_a_kernel_waits_for_its_launch_and_for_the_one_before(seconds, settings, host, device):
    line = time_line(seconds, 2, **settings)
    assert line["host"].tolist() == [list(span) for span in host]
    assert line["device"].tolist() == [list(span) for span in device]
