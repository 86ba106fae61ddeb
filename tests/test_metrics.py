from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics

import gpuml
from gpuml import accuracy, confusion_matrix, metrics, r2_score, to_host


def classes(rng, n, n_classes, wrong=0.3):
    """Labels, and predictions of which some are wrong."""
    labels = rng.integers(n_classes, size=n)
    return labels, np.where(rng.random(n) < wrong, rng.integers(n_classes, size=n), labels)


@pytest.mark.parametrize(("n", "n_classes"), [(1, 1), (1, 7), (2, 2), (57, 3), (1000, 40)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64])
def test_classes_are_counted_as_scikit_learn_does(device, rng, n, n_classes, dtype):
    labels, predicted = classes(rng, n, n_classes)
    there = [device.asarray(a, dtype) for a in (labels, predicted)]
    share, counts = accuracy(*there), confusion_matrix(*there, n_classes=n_classes)
    assert gpuml.device_of(share, counts) == device
    assert share.dtype == np.float64
    assert counts.dtype == np.int64
    assert float(share) == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a single class
        expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=np.arange(n_classes))
    np.testing.assert_array_equal(to_host(counts), expected)


def test_small_integer_types_do_not_wrap(device, rng):
    labels, predicted = classes(rng, 2000, 256)
    counts = confusion_matrix(device.asarray(labels, np.uint8), device.asarray(predicted, np.uint8))
    np.testing.assert_array_equal(
        to_host(counts), sklearn.metrics.confusion_matrix(labels, predicted)
    )


def test_rows_are_true_classes_and_columns_predicted_ones(device):
    labels, predicted = device.asarray([0, 0, 0, 2]), device.asarray([1, 1, 0, 2])
    assert confusion_matrix(labels, predicted).tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 1]]
    wide = to_host(confusion_matrix(labels, predicted, n_classes=5))
    assert wide.shape == (5, 5)
    assert wide.sum() == 4


def test_the_largest_class_counts_wherever_it_is(device):
    zeros, three = device.asarray([0, 0]), device.asarray([0, 3])
    assert confusion_matrix(zeros, three).shape == (4, 4)
    assert confusion_matrix(three, zeros).shape == (4, 4)


def test_only_the_ends_of_the_labels_are_read(device, rng, monkeypatch):
    read = []
    monkeypatch.setattr(metrics, "to_host", lambda a: (read.append(a.size), to_host(a))[1])
    labels, predicted = (device.asarray(a) for a in classes(rng, 1000, 10))
    confusion_matrix(labels, predicted)
    assert read == [4]
    accuracy(labels, predicted)
    r2_score(labels, predicted)
    assert read == [4]


def test_names_of_classes_can_be_compared():
    labels, predicted = np.array(["cat", "dog", "dog"]), np.array(["cat", "horse", "dog"])
    assert accuracy(labels, predicted) == pytest.approx(2 / 3)
    assert accuracy(labels.astype(object), predicted) == pytest.approx(2 / 3)
    with pytest.raises(TypeError, match="searchsorted"):
        confusion_matrix(labels, predicted)
    with pytest.raises(TypeError, match="they never agree"):
        accuracy(np.array([0, 1, 1]), predicted)


def test_leading_axes_are_kept(device, rng):
    labels, predicted = rng.integers(3, size=20), rng.integers(3, size=(4, 2, 20))
    found = accuracy(device.asarray(labels), device.asarray(predicted))
    np.testing.assert_allclose(to_host(found), (labels == predicted).mean(axis=-1))
    targets, predictions = rng.normal(size=(20, 3)), rng.normal(size=(4, 2, 20, 3))
    found = to_host(r2_score(device.asarray(targets), device.asarray(predictions)))
    assert found.shape == (4, 2)
    for index in np.ndindex(4, 2):
        expected = sklearn.metrics.r2_score(targets, predictions[index])
        assert found[index] == pytest.approx(expected)
    found = to_host(r2_score(device.asarray(predictions), device.asarray(targets)))
    assert found[1, 1] == pytest.approx(sklearn.metrics.r2_score(predictions[1, 1], targets))


@pytest.mark.parametrize("shape", [(2,), (50,), (50, 1), (50, 4), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_r2_is_what_scikit_learn_computes(device, rng, shape, dtype):
    # outputs of different scales: a mean over outputs is no mean over all numbers
    scale = 10.0 ** np.arange(shape[1]) if len(shape) > 1 else 10.0
    targets = (rng.normal(size=shape) * 30 * scale).astype(dtype)
    predictions = (targets + rng.normal(size=shape) * 20 * scale).astype(dtype)
    found = r2_score(device.asarray(targets), device.asarray(predictions))
    assert found.shape == ()
    assert found.dtype == np.float64
    assert gpuml.device_of(found) == device
    expected = sklearn.metrics.r2_score(targets.astype(float), predictions.astype(float))
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_perfect_mean_and_worse_predictions_score_one_zero_and_less(device, rng):
    targets = device.asarray(rng.normal(size=(30, 2)))
    assert float(r2_score(targets, targets)) == 1
    mean = targets * 0 + targets.mean(axis=0)
    assert float(r2_score(targets, mean)) == pytest.approx(0, abs=1e-12)
    assert float(r2_score(targets, -targets)) < -2


def test_constant_targets_score_one_if_met_and_zero_otherwise(device, rng):
    n = 37
    targets = rng.normal(size=(n, 3))
    targets[:, 1] = 7.0
    for predictions in (targets.copy(), targets + 0.5, targets * [1, 1, 1.1]):
        expected = sklearn.metrics.r2_score(targets, predictions)
        found = r2_score(device.asarray(targets), device.asarray(predictions))
        assert float(found) == pytest.approx(expected)
    # the mean of 37 times 0.1 is not 0.1 in floating point, and yet nothing varies
    constant = device.asarray(np.full(n, 0.1))
    assert float(constant.mean()) != 0.1 or device.kind == "gpu"
    assert float(r2_score(constant, constant)) == 1
    assert float(r2_score(constant, constant + 1e-12)) == 0


def test_targets_far_from_zero_lose_nothing(device, rng):
    targets = 1e9 + rng.integers(-8, 8, size=100) / 4  # exact in float64
    predictions = targets + rng.integers(-2, 2, size=100) / 4
    found = float(r2_score(device.asarray(targets), device.asarray(predictions)))
    assert found == pytest.approx(sklearn.metrics.r2_score(targets - 1e9, predictions - 1e9))


def test_the_inputs_stay_as_they_are(device, rng):
    targets, predictions = (device.asarray(rng.normal(size=(9, 2))) for _ in range(2))
    copies = targets.copy(), predictions.copy()
    r2_score(targets, predictions)
    assert (targets == copies[0]).all()
    assert (predictions == copies[1]).all()


def test_one_sample_has_no_r2(device):
    one = device.asarray([[1.0, 2.0]])
    assert np.isnan(float(r2_score(one, one)))
    assert to_host(np.isnan(r2_score(one, device.xp.zeros((3, 1, 2))))).tolist() == [True] * 3


def test_numbers_that_are_not_finite_are_not_hidden(device):
    for constant in (False, True):
        targets = device.asarray([[1.0], [1.0 if constant else 2.0], [1.0]])
        for bad in (np.nan, np.inf):
            predictions = targets.copy()
            predictions[1] = bad
            with np.errstate(all="ignore"):
                assert not np.isfinite(float(r2_score(targets, predictions)))
                assert not np.isfinite(float(r2_score(predictions, targets)))


INTEGERS = np.array([0, 1, 2])


@pytest.mark.parametrize(
    ("function", "labels", "predicted", "message"),
    [
        (accuracy, INTEGERS, np.eye(3), r"argmax\(axis=-1\)"),
        (accuracy, INTEGERS, INTEGERS * 1.0, "expected a class for each"),
        (accuracy, INTEGERS * 1.0, INTEGERS, "labels have shape"),
        (accuracy, INTEGERS, INTEGERS[:2], r"\(3,\), predicted \(2,\)"),
        (accuracy, INTEGERS, INTEGERS[:, None], r"\(3,\), predicted \(3, 1\)"),
        (accuracy, INTEGERS[:0], INTEGERS[:0], "at least one"),
        (accuracy, np.array(1), np.array(1), "at least one"),
        (accuracy, np.zeros((2, 3), int), np.zeros((4, 3), int), "leading axes do not fit"),
        (confusion_matrix, INTEGERS, np.eye(3), r"argmax\(axis=-1\)"),
        (confusion_matrix, INTEGERS, INTEGERS[:2], r"\(3,\), predicted \(2,\)"),
        (confusion_matrix, INTEGERS[None], INTEGERS[None], "expected vectors"),
        (confusion_matrix, INTEGERS[:0], INTEGERS[:0], "at least one"),
        (confusion_matrix, INTEGERS, INTEGERS - 1, "from 0 to 2, found -1"),
        (confusion_matrix, INTEGERS - 2, INTEGERS, "from 0 to 2, found -2"),
        (confusion_matrix, INTEGERS, INTEGERS + 10**7, "number the classes from 0"),
        (r2_score, np.zeros((3, 1)), np.zeros(3), r"y\[:, None\]"),
        (r2_score, np.zeros(3), np.zeros((3, 1)), r"y\[:, None\]"),
        (r2_score, np.zeros(3), np.zeros(2), "must agree"),
        (r2_score, np.zeros((3, 2)), np.zeros((3, 3)), "must agree"),
        (r2_score, np.zeros((3, 2)), np.zeros((2, 3)), "must agree"),
        (r2_score, np.zeros((0, 2)), np.zeros((0, 2)), "some samples"),
        (r2_score, np.zeros((2, 0)), np.zeros((2, 0)), "some samples"),
        (r2_score, np.array(1.0), np.array(1.0), "must agree"),
        (r2_score, np.zeros((2, 3, 1)), np.zeros((4, 3, 1)), "leading axes do not fit"),
        (r2_score, np.zeros(3, complex), np.zeros(3), "targets are of type complex128"),
        (r2_score, np.zeros(3), np.zeros(3, complex), "predictions are of type complex128"),
    ],
)
def test_what_does_not_fit_is_explained(device, function, labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        function(device.asarray(labels), device.asarray(predicted))


@pytest.mark.parametrize(
    ("n_classes", "message"), [(2, "from 0 to 1, found 2"), (0, "positive"), (-3, "positive")]
)
def test_classes_beyond_their_number_are_refused(device, n_classes, message):
    labels = device.asarray(INTEGERS)
    for pair in ((labels, labels * 0), (labels * 0, labels)):
        with pytest.raises(ValueError, match=message):
            confusion_matrix(*pair, n_classes=n_classes)


def test_many_classes_are_possible_when_meant(monkeypatch):
    monkeypatch.setattr(metrics, "MOST_CLASSES", 3)
    labels = np.array([0, 3])
    with pytest.raises(ValueError, match="give n_classes"):
        confusion_matrix(labels, labels)
    assert confusion_matrix(labels, labels, n_classes=4).shape == (4, 4)


def test_lists_are_no_arrays_and_devices_are_not_mixed(device):
    for function in (accuracy, confusion_matrix, r2_score):
        with pytest.raises(TypeError, match="got list"):
            function([0, 1], np.array([0, 1]))
        if device.kind == "gpu":
            with pytest.raises(TypeError, match="different devices"):
                function(np.array([0, 1]), device.asarray([0, 1]))


def test_metrics_are_reachable_from_the_package():
    assert gpuml.metrics.accuracy is gpuml.accuracy is accuracy
    assert gpuml.schedules.cosine() == gpuml.schedules.get_schedule("cosine")
