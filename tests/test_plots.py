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


def test_memory_access_counts_what_is_fetched():
    threads = np.arange(32)
    figure = plots.memory_access({"near": threads, "far": 32 * threads, "same": 0 * threads})
    titles = [axis.get_title() for axis in figure.axes[:3]]
    assert "128 bytes read,\n128 fetched: 100 % used" in titles[0]
    assert "128 bytes read,\n1,024 fetched: 12.5 % used" in titles[1]
    assert "4 bytes read,\n32 fetched: 12.5 % used" in titles[2]


def test_a_block_visits_the_tiles_of_its_row_and_column():
    figure = plots.tile_walk((12, 16, 11), tile=4, block=(1, 2))
    _, B, A, C = figure.axes
    assert [patch.get_xy() for patch in A.patches] == [(0, 4), (4, 4), (8, 4)]
    assert [patch.get_xy() for patch in B.patches] == [(8, 0), (8, 4), (8, 8)]
    assert [patch.get_xy() for patch in C.patches] == [(8, 4)]


def test_bars_and_lines_carry_their_units():
    ladder = plots.ladder({"slow": 1e12, "fast": 3e12}, "a device")
    assert ladder.axes[0].get_xlabel() == "rate [TFLOP/s]"
    assert [patch.get_width() for patch in ladder.axes[0].patches] == [1, 3]
    transfers = plots.transfers([1, 10], {"to": [1e9, 2e9]}, "a device")
    assert transfers.axes[0].get_ylabel() == "bandwidth [GB/s]"
    assert list(transfers.axes[0].lines[0].get_ydata()) == [1, 2]
    times = plots.times({"cpu": ([1, 2], [0.5, 0.7])}, "a device")
    assert times.axes[0].get_ylabel() == "time [s]"
    assert {f.axes[0].get_title() for f in (ladder, transfers, times)} == {"a device"}
