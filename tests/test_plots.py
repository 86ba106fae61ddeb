from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gpuml import plots

COLUMNS = {"epoch": [1, 2, 3], "loss": [2.0, 1.0, 0.5], "validation_loss": [2.1, 1.2, 0.8]}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_history_without_accuracy_has_one_panel():
    figure = plots.history(COLUMNS, "a device")
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss"]
    assert figure.axes[0].get_yscale() == "log"
    assert "a device" in figure.get_supxlabel()


def test_a_single_epoch_is_visible():
    figure = plots.history({"epoch": [1], "loss": [2.0]}, "a device")
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_a_history_is_drawn_where_it_is_told():
    figure, axis = plt.subplots()
    assert plots.history(COLUMNS, "a device", [axis]) is figure
    assert len(axis.lines) == 2


def test_a_saved_picture_is_a_png_and_leaves_no_open_figure(tmp_path):
    columns = COLUMNS | {"validation_accuracy": [0.1, 0.5, 0.9]}
    plots.save_history(columns, "a device", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plt.imread(tmp_path / "x.png").shape[1] > plt.imread(tmp_path / "x.png").shape[0]
    assert plt.get_fignums() == []


def test_images_are_laid_out_in_rows():
    figure = plots.images(np.zeros((7, 8, 8)), list("abcdefg"), n_columns=4)
    assert [axis.get_title() for axis in figure.axes] == [*"abcdefg", ""]
    assert len(figure.axes[6].images) == 1
    assert not figure.axes[7].images
