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


def test_each_metric_has_a_panel_and_only_losses_a_logarithmic_scale():
    columns = COLUMNS | {
        "validation_r2": [-0.5, 0.5, 0.9],
        "mean_error": [0.3, 0.2, 0.1],
        "validation_mean_error": [0.4, 0.3, 0.2],
        "learning_rate": [0.1, 0.1, 0.1],
        "seconds": [1, 2, 3],
    }
    figure = plots.history(columns, "a device")
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "R²", "mean error"]
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear", "linear"]
    lines = [{line.get_label(): list(line.get_ydata()) for line in a.lines} for a in figure.axes]
    assert lines[1] == {"held out": columns["validation_r2"]}
    assert lines[2] == {"training": [0.3, 0.2, 0.1], "held out": [0.4, 0.3, 0.2]}
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    assert figure.axes[1].lines[0].get_color() == figure.axes[0].lines[1].get_color()


def legend_box(axis):
    """Where a legend is, its axes' corners being (0, 0) and (1, 1)."""
    axis.figure.canvas.draw()
    return axis.get_legend().get_window_extent().transformed(axis.transAxes.inverted())


def test_legends_leave_room_for_the_lines():
    epoch = np.arange(1, 121)
    falls = np.exp(-epoch / 50)
    columns = {"epoch": list(epoch), "loss": falls, "validation_loss": 0.9 * falls}
    columns |= {"validation_accuracy": 0.98 - 0.14 * falls, "validation_error": falls}
    for axis, rises in zip(plots.history(columns, "").axes, (False, True, False), strict=True):
        box = legend_box(axis)
        assert box.x0 > 0.5
        assert (box.y1 < 0.5) if rises else (box.y0 > 0.5)
    [axis] = plots.histories(dict.fromkeys("abcde", columns), "").axes
    assert legend_box(axis).x0 >= 1
    [axis] = plots.histories(dict.fromkeys("abcd", columns), "").axes
    assert legend_box(axis).x1 <= 1


def test_a_learning_rate_is_drawn_if_it_changes():
    figure = plots.history(COLUMNS | {"learning_rate": [0.1, 0.1, 0.05]}, "a device")
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "learning rate"]
    assert list(figure.axes[1].lines[0].get_ydata()) == [0.1, 0.1, 0.05]
    assert figure.axes[1].get_legend() is None


@pytest.mark.parametrize("least", [0.0, -1.0])
def test_losses_that_are_not_positive_have_a_linear_scale(least):
    columns = {"epoch": [1, 2], "loss": [2.0, 1.0], "validation_loss": [2.0, least]}
    assert plots.history(columns, "a device").axes[0].get_yscale() == "linear"
    runs = {"a": {"epoch": [1, 2], "loss": [2.0, 1.0]}, "b": {"epoch": [1], "loss": [least]}}
    assert plots.histories(runs, "a device").axes[0].get_yscale() == "linear"


def test_a_wrong_number_of_axes_and_an_empty_history_are_named():
    _, axes = plt.subplots(1, 2)
    with pytest.raises(ValueError, match=r"1 axes are needed.*got 2"):
        plots.history(COLUMNS, "a device", list(axes))
    for columns in ({}, {"epoch": [], "loss": []}):
        with pytest.raises(ValueError, match="no finished epoch"):
            plots.history(columns, "a device")


def test_a_saved_picture_is_as_wide_as_its_panels(tmp_path):
    widths = []
    for more in ({}, {"validation_r2": [0, 0.1, 0.2]}, {"learning_rate": [3, 2, 1]}):
        plots.save_history(COLUMNS | more, "a device", tmp_path / "x.png")
        widths.append(plt.imread(tmp_path / "x.png").shape[1])
    assert widths[1] == widths[2] == 2 * widths[0]


def test_runs_can_be_told_apart_and_scores_are_not_logarithmic():
    runs = {str(i): {"epoch": [1, 2], "loss": [2, 1], "validation_r2": [1, 2]} for i in range(20)}
    lines = plots.histories(runs, "a device").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    figure = plots.histories(runs, "a device", "validation_r2")
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_ylabel() == "validation R²"


def test_a_confusion_matrix_has_its_counts_in_its_cells(device):
    counts = np.array([[90, 10, 0], [1, 1200, 0], [0, 0, 0]])
    figure = plots.confusion_matrix(device.asarray(counts), ["a", "b", "c"], "a device")
    axis = figure.axes[0]
    written = {t.get_position(): t.get_text() for t in axis.texts}
    assert written == {
        (column, row): f"{counts[row, column]:,}" for row in range(3) for column in range(3)
    }
    assert written[1, 0] == "10", "to the right: predicted"
    [image] = axis.images
    np.testing.assert_allclose(image.get_array()[0], [0.9, 0.1, 0])
    np.testing.assert_array_equal(np.ma.filled(image.get_array()[2], np.nan), 0)
    assert image.get_clim() == (0, 1)
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["a", "b", "c"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert axis.get_title() == "a device"


def contrast(a, b):
    """The ratio of luminances that WCAG 2 asks for: at least 3 for text to be read."""
    light = []
    for color in (a, b):
        c = np.asarray(color[:3])
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        light.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(light) / min(light)


def test_the_counts_can_be_read_on_every_shade():
    from matplotlib.colors import to_rgba

    for k in (*range(0, 100, 10), 91):
        counts = np.zeros((10, 10), int)  # each row has a shade for k of 100, and one for the rest
        counts[:, 0] = np.arange(k, k + 10)
        counts[:, 1] = 100 - counts[:, 0]
        axis = plots.confusion_matrix(counts).axes[0]
        [image] = axis.images
        for text in axis.texts:
            column, row = text.get_position()
            shade = image.cmap(image.norm(image.get_array()[row, column]))
            enough = 3 if text.get_text() == "0" else 3.5
            assert contrast(to_rgba(text.get_color()), shade) > enough, (k, text.get_text())
        plt.close("all")


def test_texts_in_a_confusion_matrix_do_not_overlap():
    for counts in (np.full((10, 10), 8), np.full((10, 10), 123_456), np.full((30, 30), 99_999)):
        figure = plots.confusion_matrix(counts)
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
        n = len(counts)
        assert len(boxes) == n * n
        assert boxes[0].x1 < boxes[1].x0
        assert boxes[0].y0 > boxes[n].y1


def test_many_classes_are_drawn_without_counts_and_with_some_names():
    axis = plots.confusion_matrix(np.eye(100, dtype=int)).axes[0]
    assert not axis.texts
    names = [tick.get_text() for tick in axis.get_xticklabels()]
    assert names == [str(i) for i in range(0, 100, 4)]
    assert list(axis.get_xticks()) == list(range(0, 100, 4))


def test_a_confusion_matrix_is_square_and_has_a_name_for_each_class():
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(ValueError, match="expected \\(n_classes, n_classes\\)"):
            plots.confusion_matrix(np.zeros(shape, int))
    with pytest.raises(ValueError, match="3 classes are counted, 2 have names"):
        plots.confusion_matrix(np.zeros((3, 3), int), ["a", "b"])
    names = np.array(["yes", "no"])
    axis = plots.confusion_matrix(np.eye(2, dtype=int), names).axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["yes", "no"]


def test_images_are_laid_out_in_rows():
    figure = plots.images(np.zeros((7, 8, 8)), list("abcdefg"), n_columns=4)
    assert [axis.get_title() for axis in figure.axes] == [*"abcdefg", ""]
    assert len(figure.axes[6].images) == 1
    assert not figure.axes[7].images


def test_perturbations_stand_below_one_another_on_common_scales():
    rng = np.random.default_rng(0)
    originals = rng.random((4, 8, 8))
    perturbed = originals + 0.1 * rng.choice([-1, 0, 1], originals.shape)
    figure = plots.perturbations(originals, perturbed, list("1234"), list("5274"))
    grid = np.reshape([axis for axis in figure.axes if axis.images], (3, 4))
    assert [axis.get_title() for axis in grid.flat] == [*"1234", *[""] * 4, *"5274"]
    colors = [axis.title.get_color() == plots.COLORS[1] for axis in grid.flat]
    assert colors == [False] * 8 + [True, False, True, False], "what has changed"
    assert [axis.get_ylabel() for axis in grid[:, 0]] == ["original", "change", "perturbed"]
    for row, pictures in zip(grid, (originals, perturbed - originals, perturbed), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            np.testing.assert_array_equal(axis.images[0].get_array(), picture)
        assert len({axis.images[0].get_clim() for axis in row}) == 1
    assert grid[0, 0].images[0].get_clim() == grid[2, 0].images[0].get_clim()
    assert grid[1, 0].images[0].get_clim() == pytest.approx((-0.1, 0.1))
    plots.perturbations(originals, originals, list("1234"), list("5678"))  # an attack of strength 0
    for wrong in (
        (originals, perturbed[:3], list("1234"), list("5678")),
        (originals, perturbed, list("123"), list("5678")),
        (originals, perturbed, list("1234"), list("567")),
    ):
        with pytest.raises(ValueError, match="expected one for one"):
            plots.perturbations(*wrong)


def test_accuracies_are_percentages_with_means_over_runs():
    lines = {"plain": ([0, 0.1], [0.98, 0.5]), "private": ([0, 0.1], [[0.9, 0.8], [0.5, 0.7]])}
    figure = plots.accuracies(lines, "strength", "a device", marks={"here": 0.1})
    [axis] = figure.axes
    plain, private, mark = axis.lines
    np.testing.assert_allclose(plain.get_ydata(), [98, 50])
    np.testing.assert_allclose(private.get_ydata(), [85, 60])
    assert list(mark.get_xdata()) == [0.1, 0.1]
    dots = axis.collections[0].get_offsets()
    np.testing.assert_allclose(dots, [[0, 90], [0, 80], [0.1, 50], [0.1, 70]])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [*lines, "here"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("strength", "accuracy [%]")
    assert axis.get_title() == "a device"
    figure = plots.accuracies({"a": ([1, 2], [0.5, 0.4])}, "noise", "", ticks={1: "1", 2: "two"})
    assert figure.axes[0].get_xscale() == "log"
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["1", "two"]


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


def test_a_step_has_a_bar_for_each_program_and_a_line_at_the_floor():
    figure = plots.step_times({"mine": 5e-6, "theirs": 9e-4}, 1e-7, "a device", ours="mi")
    [axis] = figure.axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([5, 900])
    assert axis.patches[0].get_facecolor() != axis.patches[1].get_facecolor()
    assert list(axis.lines[0].get_xdata()) == pytest.approx([0.1, 0.1])
    assert axis.get_xlabel() == "time of a step [µs]; the line is the floor, 0.1 µs"
    assert [text.get_text() for text in axis.texts] == ["5.0", "900"]
    assert not plots.step_times({"mine": 5e-6}, 0, "a device").axes[0].lines


@pytest.mark.parametrize(("times", "floor", "scale"), [([3, 50], 0, "linear"), ([3, 50], 2, "log")])
def test_bars_of_step_times_begin_at_zero_unless_they_differ_by_magnitudes(times, floor, scale):
    seconds = {str(t): t * 1e-6 for t in times}
    [axis] = plots.step_times(seconds, floor * 1e-6, "a device").axes
    assert axis.get_xscale() == scale
    first, last = axis.get_xlim()
    assert (first == 0) == (scale == "linear")
    assert first < min(times) < max(times) < last


@pytest.mark.parametrize(("end", "unit"), [(2e-4, "µs"), (2e-2, "ms"), (2, "s")])
def test_a_time_line_has_the_unit_that_suits_it(end, unit):
    [axis] = plots.time_line({"host": [(0, end)], "device": [(end / 2, end)]}, "a device").axes
    assert axis.get_xlabel() == f"time [{unit}]"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["host", "device"]


def test_the_shortest_pieces_of_a_time_line_can_be_seen():
    [axis] = plots.time_line({"host": [(0, 1)], "device": [(0.5, 0.5001)]}, "a device").axes
    host, device = axis.collections
    assert device.get_linewidth()[0] > host.get_linewidth()[0]
    assert np.allclose(device.get_edgecolor(), device.get_facecolor())


def test_a_distribution_counts_every_model_once():
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.uniform(0.5, 2, 50), [1e20, np.nan, np.nan]])
    axis = plots.distribution(losses, "validation_loss", "models").axes[0]
    assert sum(bar.get_height() for bar in axis.patches) == 50
    assert axis.get_xlabel() == "validation loss; not shown: 2 diverged, 1 far above"
    assert axis.lines[0].get_xdata()[0] == np.nanmin(losses)
    assert axis.lines[1].get_xdata()[0] == np.nanmedian(losses)
    assert axis.get_xscale() == "linear"
    assert plots.distribution([0.01, 0.1, 0.2], "loss", "").axes[0].get_xscale() == "log"
    axis = plots.distribution([0.1, 0.9, 0.9], "accuracy", "").axes[0]
    assert axis.lines[0].get_xdata()[0] == 0.9  # of scores the greatest is the best
    equal = plots.distribution([0.3, 0.3], "loss", "").axes[0]
    assert sum(bar.get_height() for bar in equal.patches) == 2
    with pytest.raises(ValueError, match="no model has a finite number"):
        plots.distribution([np.nan], "loss", "")


def test_losses_by_learning_rate_mark_the_best_and_those_that_are_lost():
    rates, losses = [0.001, 0.01, 0.1, 1, 10, 100], [2.0, 1.0, 0.5, 1e9, np.nan, np.inf]
    axis = plots.loss_by_learning_rate(rates, losses, "loss", "").axes[0]
    points, best, far, lost = (np.asarray(c.get_offsets()) for c in axis.collections)
    np.testing.assert_allclose(points, np.transpose([rates[:3], losses[:3]]))
    np.testing.assert_allclose(best, [[0.1, 0.5]])
    assert far[:, 0].tolist() == [1]
    assert lost[:, 0].tolist() == [10, 100]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["best: 0.5 at 0.1", "1 far above", "2 diverged"]
    low, high = axis.get_xlim()
    assert 0 < low < 0.001, "those that diverged are in the picture"
    assert 100 < high < 1000, "those that diverged are in the picture"
    axis = plots.loss_by_learning_rate([1, 2], [0.2, 0.7], "accuracy", "").axes[0]
    np.testing.assert_allclose(axis.collections[1].get_offsets(), [[2, 0.7]])
    assert axis.get_yscale() == "linear"
    for wrong in (([1], [1, 2]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="expected one for one"):
            plots.loss_by_learning_rate(*wrong, "loss", "")
    with pytest.raises(ValueError, match="no model has a finite number"):
        plots.loss_by_learning_rate([1], [np.nan], "loss", "")


def test_a_surface_has_a_path_for_each_model_up_to_where_it_was_lost():
    first, second = np.linspace(-1, 1, 5), np.linspace(-2, 2, 7)
    losses = first**2 + second[:, None] ** 2
    paths = np.array([[[0.5, 1.0], [1.0, -1.0]], [[0.2, 0.5], [np.nan, np.nan]]])
    axis = plots.loss_surface(first, second, losses, paths, ["u", "v"], "models").axes[0]
    lines, starts, ends = axis.collections[-3:]
    drawn = [path.vertices.tolist() for path in lines.get_paths()]
    assert drawn == [[[0.5, 1.0], [0.2, 0.5]], [[1.0, -1.0]]]
    assert starts.get_offsets().tolist() == [[0.5, 1.0], [1.0, -1.0]]
    assert ends.get_offsets().tolist() == [[0.2, 0.5], [1.0, -1.0]]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("u", "v")
    assert axis.get_xlim() == (-1, 1)
    figure = plots.loss_surface(first, second, losses + 1e-3, paths, ["u", "v"], "")
    assert figure.axes[1].get_yscale() == "log"
    axis = plots.loss_surface(first, second, losses, paths[:, [0] * 1000], ["u", "v"], "").axes[0]
    assert len(axis.collections[-3].get_paths()) == 1000  # in one artist, else it takes seconds
    with pytest.raises(ValueError, match="expected \\(7, 5\\) and"):
        plots.loss_surface(first, second, losses.T, paths, ["u", "v"], "")
