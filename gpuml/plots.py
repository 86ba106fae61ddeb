"""Figures from plain tables. Each says on which device its numbers were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from gpuml.devices import to_host

# Colours that colour-blind readers can tell apart: Okabe, Ito: Color Universal Design, 2008.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"

SECTOR = 32  # bytes: the least that a GPU fetches from its memory at once
LINE = 128  # bytes: four sectors, a cache line

WHITE_EDGE: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.3}

FAR = 100  # times the median: losses of models that are about to diverge

MOST_WRITTEN = 30  # classes of a confusion matrix whose counts can be read


def history(
    columns: Mapping[str, Sequence[float]], device: str, axes: Sequence[Any] | None = None
) -> Any:
    """Draw loss against epoch, and beside it each other metric, and a learning rate that changes.

    Parameters
    ----------
    columns : mapping of str to sequence of float
        ``epoch``, ``loss``, and where measured ``validation_loss``, ``validation_accuracy``,
        ``validation_r2`` or others, ``learning_rate``. ``seconds`` is not drawn.
    device : str
        On what it was measured; written under the figure.
    axes : sequence of matplotlib.axes.Axes, optional
        Where to draw: one for the losses, one for each other metric, one for a learning rate that
        changes. A new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there are no epochs, or too few or too many axes.
    """
    panels = _panels(columns)
    if axes is None:
        from matplotlib import pyplot

        _, grid = pyplot.subplots(
            1, len(panels), figsize=(4.5 * len(panels), 3.2), layout="constrained", squeeze=False
        )
        axes = list(grid[0])
    if len(axes) != len(panels):
        raise ValueError(f"{len(panels)} axes are needed, for {', '.join(panels)}; got {len(axes)}")
    for axis, (quantity, lines) in zip(axes, panels.items(), strict=True):
        for name in lines:
            held_out = name.startswith("validation_")
            axis.plot(
                columns["epoch"],
                columns[name],
                color=COLORS[held_out],
                label="held out" if held_out else "training",
                marker="o" if len(columns["epoch"]) < 2 else "",
            )
        _metric_axis(axis, quantity, [columns[name] for name in lines])
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if quantity != "learning_rate":
            rises = all(columns[name][-1] > columns[name][0] for name in lines)
            axis.legend(loc="lower right" if rises else "best")
    figure = axes[0].figure
    figure.supxlabel(f"measured on {device}", fontsize="small", color="gray")
    return figure


def save_history(
    columns: Mapping[str, Sequence[float]], device: str, path: str | PathLike[str]
) -> None:
    """Write the figure of :func:`history` to a PNG file, without a display.

    Parameters
    ----------
    columns, device
        As for :func:`history`.
    path : path
        The file to write.
    """
    from matplotlib.figure import Figure

    n_panels = len(_panels(columns))
    figure = Figure(figsize=(4.5 * n_panels, 3.2), layout="constrained")
    history(columns, device, list(figure.subplots(1, n_panels, squeeze=False)[0]))
    figure.savefig(path, dpi=144)


def histories(
    runs: Mapping[str, Mapping[str, Sequence[float]]],
    device: str,
    column: str = "loss",
    *,
    against: str = "epoch",
    axis: Any = None,
) -> Any:
    """Draw one column of several runs, a line each; losses on a logarithmic scale.

    Parameters
    ----------
    runs : mapping of str to mapping of str to sequence of float
        The columns of each run, by its name.
    device : str
        On what they were measured; written under the figure.
    column : str
        What to draw.
    against : {"epoch", "seconds"}
        What the horizontal axis shows: another column.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis)
    for i, (name, columns) in enumerate(runs.items()):
        axis.plot(
            columns[against],
            columns[column],
            label=name,
            markevery=max(1, len(columns[column]) // 8),
            linestyle=("-", "--", ":", "-.")[i // len(COLORS) % 4],
            **_style(i),
        )
    _metric_axis(axis, column, [columns[column] for columns in runs.values()])
    axis.set_xlabel("time [s]" if against == "seconds" else against)
    if against == "epoch":
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(axis, outside=len(runs) > 4)  # which leave it no room
    axis.figure.supxlabel(f"measured on {device}", fontsize="small", color="gray")
    return axis.figure


def confusion_matrix(
    counts: Any, class_names: Sequence[Any] | None = None, title: str = "", axis: Any = None
) -> Any:
    """Draw how often each class was predicted for each class, the counts in the cells.

    A cell is the darker, the larger its share of its row is: of the samples of that class.

    Parameters
    ----------
    counts : array of int, shape (n_classes, n_classes)
        From :func:`gpuml.confusion_matrix`, on any device; row: true class, column: predicted.
    class_names : sequence, optional
        What to call the classes; by their numbers unless given.
    title : str
        What was predicted, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If `counts` is not square, or there is not one name for each class.
    """
    counts = np.asarray(to_host(counts))
    n = len(counts)
    if counts.shape != (n, n) or n == 0:
        raise ValueError(f"counts have shape {counts.shape}, expected (n_classes, n_classes)")
    names = [str(name) for name in (range(n) if class_names is None else class_names)]
    if len(names) != n:
        raise ValueError(f"{n} classes are counted, {len(names)} have names")
    texts = [f"{count:,}" for count in counts.flat]
    cell = max(0.42, 0.08 * max(map(len, texts)) + 0.1) if n <= MOST_WRITTEN else 0.06  # inches
    margin = 0.09 * max(map(len, names))
    axis = _axis(axis, width=max(3.2, 1.8 + margin + cell * n), height=1.1 + margin + cell * n)

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= MOST_WRITTEN:
        for (row, column), share, text in zip(np.ndindex(n, n), shares.flat, texts, strict=True):
            color = "white" if share > 0.65 else "black" if counts[row, column] else "0.5"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    tilted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    step = -(-n // MOST_WRITTEN)  # of the classes that are named at the axes
    places = range(0, n, step)
    axis.set_xticks(places, names[::step], **(tilted if max(map(len, names)) > 3 else {}))
    axis.set_yticks(places, names[::step])
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    axis.figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.75)
    axis.set_title(title, fontsize="medium")
    return axis.figure


def images(pictures: Any, titles: Sequence[str], n_columns: int = 10) -> Any:
    """Draw small grey pictures in rows, each with a title.

    Parameters
    ----------
    pictures : numpy.ndarray of shape (n, height, width)
        Larger numbers are darker.
    titles : sequence of str
        One for each picture.
    n_columns : int
        Pictures in a row.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib import pyplot

    n_rows = -(-len(pictures) // n_columns)
    figure, grid = pyplot.subplots(
        n_rows, n_columns, figsize=(n_columns, 1.3 * n_rows), layout="constrained", squeeze=False
    )
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, picture, title in zip(grid.flat, pictures, titles, strict=False):
        axis.imshow(picture, cmap="gray_r")
        axis.set_title(title, fontsize="medium")
    return figure


def perturbations(
    originals: Any, perturbed: Any, titles: Sequence[str], perturbed_titles: Sequence[str]
) -> Any:
    """Draw small grey pictures, what an attack adds to each, and what comes of it, in three rows.

    Parameters
    ----------
    originals, perturbed : numpy.ndarray of shape (n, height, width)
        Larger numbers are darker; all share one scale.
    titles, perturbed_titles : sequence of str
        One for each picture, such as what a model takes it for. Where the second differs from the
        first, it has another colour.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is not one of each for each picture.
    """
    from matplotlib import pyplot

    originals, perturbed = np.asarray(originals), np.asarray(perturbed)
    counts = len(originals), len(titles), len(perturbed_titles)
    if originals.shape != perturbed.shape or len(set(counts)) > 1:
        raise ValueError(
            f"pictures of shapes {originals.shape} and {perturbed.shape}, {counts[1]} and "
            f"{counts[2]} titles: expected one for one"
        )
    n = len(originals)
    figure, grid = pyplot.subplots(
        3, n, figsize=(1.1 * n + 1.6, 4.0), layout="constrained", squeeze=False
    )
    change = perturbed - originals
    most = max(float(abs(change).max()), 1e-9)
    low, high = min(originals.min(), perturbed.min()), max(originals.max(), perturbed.max())
    grey = {"cmap": "gray_r", "vmin": low, "vmax": high}
    signed = {"cmap": "PuOr", "vmin": -most, "vmax": most}
    rows = [("original", originals, titles, grey), ("change", change, None, signed)]
    rows += [("perturbed", perturbed, perturbed_titles, grey)]
    for axes, (name, pictures, words, scale) in zip(grid, rows, strict=True):
        for i, axis in enumerate(axes):
            drawn = axis.imshow(pictures[i], **scale)
            axis.set_xticks([])
            axis.set_yticks([])
            if words is not None:
                changed = words[i] != titles[i]
                style = {"color": COLORS[1], "fontweight": "bold"} if changed else {}
                axis.set_title(words[i], fontsize="medium", **style)
        axes[0].set_ylabel(name)
        if name == "change":
            figure.colorbar(drawn, ax=list(axes), label="darker by", pad=0.01)
    return figure


def accuracies(
    lines: Mapping[str, tuple[Sequence[float], Any]],
    xlabel: str,
    title: str,
    axis: Any = None,
    *,
    marks: Mapping[str, float] | None = None,
    ticks: Mapping[float, str] | None = None,
) -> Any:
    """Draw accuracy, in percent, against something that costs accuracy.

    Parameters
    ----------
    lines : mapping of str to (numbers, accuracies)
        A line for each label. Accuracies from 0 to 1, of shape (n,), or (n, n_runs): then the line
        goes through the means, and each run is a dot.
    xlabel : str
        What the numbers are.
    title : str
        Of which model, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.
    marks : mapping of str to float, optional
        Numbers that are marked by a vertical line, and what it says.
    ticks : mapping of float to str, optional
        Numbers and what is written below them; their axis is logarithmic then.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis)
    for i, (label, (numbers, found)) in enumerate(lines.items()):
        shares = 100 * np.asarray(found, float)
        if shares.ndim == 2:
            dots = np.repeat(np.asarray(numbers, float), shares.shape[1])
            axis.scatter(dots, shares.ravel(), s=12, color=_style(i)["color"], alpha=0.35)
            shares = shares.mean(axis=1)
        axis.plot(numbers, shares, label=label, **_style(i))
    for text, number in (marks or {}).items():
        axis.axvline(number, color="gray", linestyle="--", linewidth=1, label=text)
    if ticks is not None:
        axis.set_xscale("log")
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
    axis.set_ylim(0, 103)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("accuracy [%]")
    return _finished(axis, title)


def times(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    axis: Any = None,
    *,
    labels: tuple[str, str] = ("size n", "time [s]"),
) -> Any:
    """Draw time against size, both on logarithmic scales.

    Parameters
    ----------
    lines : mapping of str to (sizes, seconds)
        A line for each label.
    title : str
        What was timed, and on which devices.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.
    labels : tuple of str
        What the axes show.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis)
    for i, (label, (sizes, seconds)) in enumerate(lines.items()):
        axis.loglog(sizes, seconds, label=label, **_style(i))
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    return _finished(axis, title)


def crossover(
    sizes: Sequence[int],
    columns: Mapping[str, Sequence[float | None]],
    title: str,
    axis: Any = None,
) -> Any:
    """Draw a map of how many times faster the GPU is: size by size, column by column.

    Parameters
    ----------
    sizes : sequence of int
        One for each row of the map.
    columns : mapping of str to sequence of float or None
        Time on the CPU over time on the GPU for each size; None where not measured.
    title : str
        What was timed, and on which devices.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis, width=max(6.4, 1.6 + 1.3 * len(columns)), height=1.2 + 0.36 * len(sizes))
    ratios = np.array([[np.nan if r is None else r for r in c] for c in columns.values()]).T
    image = axis.imshow(np.log10(ratios), cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto")
    for (row, column), ratio in np.ndenumerate(ratios):
        text = "–" if np.isnan(ratio) else f"{ratio:.2g}×" if ratio < 99.5 else f"{ratio:.0f}×"
        dark = not np.isnan(ratio) and abs(np.log10(ratio)) > 1.3
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axis.set_ylabel("size n")
    bar = axis.figure.colorbar(image, ax=axis, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["0.01×", "0.1×", "equal", "10×", "100×"])
    bar.set_label("GPU faster →")
    axis.set_title(title, fontsize="medium")
    return axis.figure


def roofline(
    ceilings: Mapping[str, float],
    points: Mapping[str, tuple[float, float]],
    title: str,
    axis: Any = None,
) -> Any:
    """Draw the roofline: the most a device can compute at each arithmetic intensity.

    Parameters
    ----------
    ceilings : mapping of str to float
        ``copy`` in bytes per second, ``gemm_…`` in operations per second.
    points : mapping of str to (float, float)
        Operations per byte and operations per second of work that was measured.
    title : str
        The device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure

    References
    ----------
    Williams, Waterman, Patterson: Roofline: an insightful visual performance model for multicore
    architectures. Communications of the ACM 52(4), 2009.
    """
    axis = _axis(axis, width=7.2, height=4.2)
    bandwidth = ceilings["copy"]
    rates = {name: rate for name, rate in ceilings.items() if name.startswith("gemm_")}
    left = min([0.05, *(x / 2 for x, _ in points.values())])
    right = max([4 * max(rates.values()) / bandwidth, *(2 * x for x, _ in points.values())])
    for i, (name, rate) in enumerate(rates.items()):
        x = np.array([left, rate / bandwidth, right])
        label = f"{name.removeprefix('gemm_')}: {rate / 1e12:.3g} TFLOP/s"
        axis.loglog(x, np.minimum(rate, bandwidth * x), color=COLORS[i], label=label, zorder=1)
    for i, (name, (intensity, rate)) in enumerate(points.items()):
        axis.loglog(
            intensity, rate, MARKERS[i % len(MARKERS)], color="black", markersize=7, label=name
        )
    slope = np.array([left, min(rates.values()) / bandwidth])  # where memory is the limit for all
    memory = f"memory: {bandwidth / 1e9:,.0f} GB/s"
    axis.loglog(slope, bandwidth * slope, color="gray", linewidth=2.5, label=memory, zorder=1)
    axis.set_xlabel("arithmetic intensity [operations per byte]")
    axis.set_ylabel("rate [operations per second]")
    return _finished(axis, title, outside=True)


def transfers(
    sizes: Sequence[float], bandwidths: Mapping[str, Sequence[float]], title: str, axis: Any = None
) -> Any:
    """Draw the bandwidth of transfers against their size.

    Parameters
    ----------
    sizes : sequence of float
        Bytes.
    bandwidths : mapping of str to sequence of float
        Bytes per second for each size, a line for each label.
    title : str
        The device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis)
    for i, (label, values) in enumerate(bandwidths.items()):
        axis.loglog(sizes, np.asarray(values) / 1e9, label=label, **_style(i))
    axis.set_xlabel("size [bytes]")
    axis.set_ylabel("bandwidth [GB/s]")
    return _finished(axis, title)


def ladder(rates: Mapping[str, float], title: str, axis: Any = None) -> Any:
    """Draw the rates of ever better versions of one computation as bars.

    Parameters
    ----------
    rates : mapping of str to float
        Operations per second, from the first version to the last.
    title : str
        What was computed, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis, width=7.2, height=0.9 + 0.42 * len(rates))
    bars = axis.barh(list(rates), [rate / 1e12 for rate in rates.values()], color=COLORS[0])
    axis.bar_label(bars, [f"{rate / 1e12:.3g}" for rate in rates.values()], padding=4)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.margins(x=0.12)
    axis.set_xlabel("rate [TFLOP/s]")
    axis.set_title(title, fontsize="medium")
    return axis.figure


def step_times(
    seconds: Mapping[str, float], floor: float, title: str, *, ours: str = "", axis: Any = None
) -> Any:
    """Draw how long a training step takes by several programs, as bars, and the least it can take.

    The axis is logarithmic where the largest is more than 20 times the smallest.

    Parameters
    ----------
    seconds : mapping of str to float
        Of a step; from top to bottom.
    floor : float
        The least time that the device allows, drawn as a line; 0 for none.
    title : str
        What was trained, and on which device.
    ours : str
        Bars whose names begin so have a colour of their own.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis, width=7.2, height=1.1 + 0.32 * len(seconds))
    times = {name: t * 1e6 for name, t in seconds.items()}
    colors = [COLORS[0] if ours and name.startswith(ours) else "0.6" for name in times]
    bars = axis.barh(list(times), list(times.values()), color=colors)
    axis.bar_label(bars, [f"{t:,.{0 if t >= 100 else 1}f}" for t in times.values()], padding=4)
    label = "time of a step [µs]"
    if floor:
        axis.axvline(floor * 1e6, color=COLORS[1])
        label += f"; the line is the floor, {float(f'{floor * 1e6:.3g}'):,g} µs"
    axis.invert_yaxis()
    least, most = min([floor * 1e6 or math.inf, *times.values()]), max(times.values())
    if most > 20 * least:
        axis.set_xscale("log")
        axis.set_xlim(least / 3, 4 * most)
    else:
        axis.set_xlim(0, 1.2 * most)
    axis.set_xlabel(label)
    axis.set_title(title, fontsize="medium")
    return axis.figure


def time_line(spans: Mapping[str, Any], title: str, axis: Any = None) -> Any:
    """Draw when each kind of work was under way: a row each, from left to right in time.

    Pieces that are too short to be seen are drawn as thin lines.

    Parameters
    ----------
    spans : mapping of str to array of shape (n, 2)
        Begin and end of each piece of work in seconds, by kind, from top to bottom.
    title : str
        What was done, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis, width=8.0, height=1.3 + 0.42 * len(spans))
    end = max(float(np.max(s)) for s in spans.values())
    scale, unit = (1e6, "µs") if end < 1e-3 else (1e3, "ms") if end < 1 else (1, "s")
    for row, pieces in enumerate(spans.values()):
        begins, ends = np.asarray(pieces, float).T * scale
        bars = list(zip(begins, ends - begins, strict=True))
        color = COLORS[row % len(COLORS)]
        thin = np.median(ends - begins) < scale * end / 400
        edge = {"edgecolor": color, "linewidth": 1} if thin else WHITE_EDGE
        axis.broken_barh(bars, (row - 0.35, 0.7), facecolor=color, **edge)
    axis.set_yticks(range(len(spans)), list(spans))
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel(f"time [{unit}]")
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(title, fontsize="medium")
    return axis.figure


def scaling(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    title: str,
    axis: Any = None,
) -> Any:
    """Draw how well ranks work together against their number: what is said, and what was measured.

    Parameters
    ----------
    lines : mapping of str to (ranks, values)
        What models say.
    points : mapping of str to (ranks, values)
        What was measured.
    label : str
        What the vertical axis shows. An efficiency has a linear scale from 0, a speed-up a
        logarithmic one, with a dotted line where p ranks are p times as fast.
    title : str
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis)
    counts = sorted({int(n) for ranks, _ in (*lines.values(), *points.values()) for n in ranks})
    axis.set_xscale("log", base=2)
    if "speed-up" in label:
        axis.plot(counts, counts, ":", color="gray", label="as many times as ranks")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(_thousands)
    for i, (name, (ranks, values)) in enumerate(lines.items()):
        style = ("-", "--", "-.", (0, (1, 1)))[i % 4]
        axis.plot(ranks, values, linestyle=style, color=COLORS[i % len(COLORS)], label=name)
    for i, (name, (ranks, values)) in enumerate(points.items()):
        marker = {"marker": MARKERS[i % len(MARKERS)], "color": "black", "zorder": 3}
        axis.plot(ranks, values, linestyle="", label=name, **marker)
    heights = [value for _, values in (*lines.values(), *points.values()) for value in values]
    if "speed-up" in label:
        axis.set_ylim(min(heights) / 1.3, 4 * max(heights))
    else:
        axis.set_ylim(0, 1.08 * max(1, *heights))
    axis.set_xticks([2**i for i in range(0, max(counts).bit_length(), 2)])
    axis.xaxis.set_major_formatter(_thousands)
    axis.set_xlabel("ranks")
    axis.set_ylabel(label)
    return _finished(axis, title)


def _thousands(value: float, _: int) -> str:
    return f"{value:,g}"


def stacked(
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    title: str,
    axis: Any = None,
    *,
    labels: tuple[str, str] = ("ranks", "time of a step [ms]"),
) -> Any:
    """Draw of what a time consists, a bar for each case with its parts on top of each other.

    Parameters
    ----------
    names : sequence of str
        The cases, from left to right.
    parts : mapping of str to sequence of float
        Seconds in each case, by what they are spent on, from below.
    title : str
        What was timed or predicted, and for which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.
    labels : tuple of str
        What the axes show; heights are in milliseconds.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis)
    below = np.zeros(len(names))
    for i, (name, seconds) in enumerate(parts.items()):
        heights = 1e3 * np.asarray(seconds, float)
        style = {"color": COLORS[i % len(COLORS)]} | WHITE_EDGE
        axis.bar(list(names), heights, bottom=below, label=name, **style)
        below = below + heights
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_ylim(0, 1.05 * below.max())
    axis.set_axisbelow(True)
    return _finished(axis, title, outside=True)


def predictions(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, axis: Any = None
) -> Any:
    """Draw measured against predicted times; on the diagonal the prediction was right.

    Parameters
    ----------
    points : mapping of str to (predicted, measured)
        In seconds; a marker for each label.
    title : str
        What was timed, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    axis = _axis(axis, width=5.2, height=4.2)
    every = [t for predicted, measured in points.values() for t in (*predicted, *measured)]
    ends = [min(every) / 1.5, max(every) * 1.5]
    axis.loglog(ends, ends, color="gray", linewidth=1, label="measured = predicted")
    for i, (label, (predicted, measured)) in enumerate(points.items()):
        axis.loglog(predicted, measured, linestyle="", label=label, **_style(i))
    axis.set_xlabel("predicted time [s]")
    axis.set_ylabel("measured time [s]")
    return _finished(axis, title)


def distribution(values: Any, quantity: str, title: str, axis: Any = None) -> Any:
    """Draw how the last losses, or scores, of many models are distributed; the best is marked.

    Parameters
    ----------
    values : array of float, shape (n_models,)
        NaN for models that diverged; the label of the axis counts them, and losses far above
        the others'.
    quantity : str
        What the numbers are, such as ``"validation_loss"``. Losses have a logarithmic axis if
        they differ by more than a factor of ten.
    title : str
        How many models, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If no number is finite.
    """
    values, is_loss = np.asarray(values, float), quantity.endswith("loss")
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise ValueError("no model has a finite number to draw")
    axis = _axis(axis)
    best, median = float(finite.min() if is_loss else finite.max()), float(np.median(finite))
    shown = finite[~_far(finite, is_loss)]
    low, high = float(shown.min()), float(shown.max())
    n_bins = int(np.clip(2 * np.sqrt(len(finite)), 8, 40))
    bins = np.linspace(low, high if high > low else low + 1e-9, n_bins + 1)
    if is_loss and low > 0 and high > 10 * low:
        axis.set_xscale("log")
        bins = np.geomspace(low, high, n_bins + 1)
    axis.hist(shown, bins, color=COLORS[0], **WHITE_EDGE)
    axis.axvline(best, color=COLORS[1], label=f"best: {best:.4g}")
    axis.axvline(median, color="black", linestyle="--", label=f"median: {median:.4g}")
    left_out = {"diverged": len(values) - len(finite), "far above": len(finite) - len(shown)}
    said = ", ".join(f"{n} {what}" for what, n in left_out.items() if n)
    axis.set_xlabel(_words(quantity) + (f"; not shown: {said}" if said else ""))
    axis.set_ylabel("models")
    axis.yaxis.get_major_locator().set_params(integer=True)
    return _finished(axis, title)


def loss_by_learning_rate(
    rates: Any, values: Any, quantity: str, title: str, axis: Any = None
) -> Any:
    """Draw the last loss of each model against its learning rate; the best is marked.

    Parameters
    ----------
    rates : array of float, shape (n_models,)
        Positive; on a logarithmic axis.
    values : array of float, shape (n_models,)
        Not finite for models that diverged: crosses at the edge. Losses far above the others'
        are triangles there.
    quantity : str
        What the numbers are, such as ``"validation_loss"``.
    title : str
        How many models, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is not a rate for each number, or none is finite.
    """
    rates, values = np.asarray(rates, float), np.asarray(values, float)
    if rates.shape != values.shape or rates.ndim != 1:
        raise ValueError(f"{rates.shape} rates and {values.shape} numbers: expected one for one")
    fine, is_loss = np.isfinite(values), quantity.endswith("loss")
    if not fine.any():
        raise ValueError("no model has a finite number to draw")
    axis = _axis(axis)
    axis.set_xscale("log")
    i = int(np.nanargmin(np.where(fine, values if is_loss else -values, np.nan)))
    far = fine & _far(values, is_loss)
    near = fine & ~far
    axis.scatter(rates[near], values[near], s=18, color=COLORS[0], alpha=0.7, linewidths=0)
    label = f"best: {values[i]:.4g} at {rates[i]:.3g}"
    axis.scatter(rates[i], values[i], s=110, marker="*", color=COLORS[1], label=label, zorder=3)
    if is_loss and values[near].min() > 0:
        axis.set_yscale("log")
    edge = axis.get_xaxis_transform()  # rates, and a height from 0 to 1
    height = 0.97 if is_loss else 0.03
    for chosen, marker, color, what in (
        (far, "^", COLORS[0], "far above"),
        (~fine, "x", "black", "diverged"),
    ):
        n = int(chosen.sum())
        if n:
            style = {"s": 22, "marker": marker, "color": color, "linewidths": 1}
            heights = np.full(n, height)
            axis.scatter(rates[chosen], heights, transform=edge, label=f"{n} {what}", **style)
    margin = max((rates.max() / rates.min()) ** 0.03, 1.05)
    axis.set_xlim(rates.min() / margin, rates.max() * margin)  # what is at the edge as well
    axis.set_xlabel("learning rate")
    axis.set_ylabel(_words(quantity))
    return _finished(axis, title)


def loss_surface(
    first: Any,
    second: Any,
    losses: Any,
    paths: Any,
    names: Sequence[str],
    title: str,
    axis: Any = None,
) -> Any:
    """Draw a loss over two parameters as a map, and the paths that models took on it.

    Parameters
    ----------
    first, second : array of float, shapes (n,) and (m,)
        Values of the two parameters.
    losses : array of float, shape (m, n)
        The loss at each pair; on a logarithmic scale if all are positive and far apart.
    paths : array of float, shape (n_points, n_models, 2)
        The parameters of each model, from its start (a circle) to its end (a star). What follows
        a NaN is not drawn.
    names : sequence of str
        What the two parameters are called.
    title : str
        How many models, and on which device.
    axis : matplotlib.axes.Axes, optional
        Where to draw; a new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.colors import ListedColormap, LogNorm

    first, second, losses, paths = (np.asarray(a, float) for a in (first, second, losses, paths))
    if losses.shape != (len(second), len(first)) or paths.ndim != 3 or paths.shape[-1] != 2:
        raise ValueError(
            f"losses have shape {losses.shape} and paths {paths.shape}, expected "
            f"{(len(second), len(first))} and (n_points, n_models, 2)"
        )
    axis = _axis(axis, width=6.4, height=4.6)
    low, high = np.nanmin(losses), np.nanmax(losses)
    scale: dict[str, Any] = {"levels": np.linspace(low, high, 25)}
    if low > 0 and high > 30 * low:
        scale = {"levels": np.geomspace(low, high, 25), "norm": LogNorm(low, high)}
    light = ListedColormap(colormaps["Greys"](np.linspace(0, 0.6, 256)))  # paths stand out
    image = axis.contourf(first, second, losses, cmap=light, **scale)
    axis.contour(first, second, losses, colors="0.45", linewidths=0.5, levels=scale["levels"])
    bar = axis.figure.colorbar(image, ax=axis, label="loss")
    bar.ax.yaxis.set_major_formatter(_two_digits)
    few = paths.shape[1] <= len(COLORS)
    paths = [_until_nan(path) for path in paths.swapaxes(0, 1)]
    colors = [COLORS[i] if few else COLORS[0] for i in range(len(paths))]
    width, opacity = (1.4, 1.0) if few else (0.7, 0.5)
    axis.add_collection(LineCollection(paths, colors=colors, linewidths=width, alpha=opacity))
    for place, marker, size, face, edge in (
        (0, "o", 25.0, "white", colors),
        (-1, "*", 120.0, colors, "white"),
    ):
        points = np.array([path[place] for path in paths]).reshape(-1, 2)
        style = {"s": size if few else size / 3, "linewidths": 1 if few else 0.5, "zorder": 3}
        axis.scatter(*points.T, marker=marker, facecolors=face, edgecolors=edge, **style)
    axis.set_xlim(first[0], first[-1])
    axis.set_ylim(second[0], second[-1])
    axis.set_xlabel(names[0])
    axis.set_ylabel(names[1])
    axis.set_title(title + "; from circles to stars", fontsize="medium")
    return axis.figure


def _until_nan(path: Any) -> Any:
    """Return the points of a path before the first that has a NaN."""
    gone = np.isnan(path).any(axis=1)
    return path[: gone.argmax()] if gone.any() else path


def _far(values: Any, is_loss: bool) -> Any:
    """Return which losses lie so far above their median that a picture would show only them."""
    return (values > FAR * np.nanmedian(np.abs(values))) if is_loss else np.zeros(len(values), bool)


def _two_digits(value: float, _: int) -> str:
    return f"{value:.2g}"


def _words(quantity: str) -> str:
    """Return a column's name as people write it."""
    return " ".join("R²" if word == "r2" else word for word in quantity.split("_"))


def memory_access(
    accesses: Mapping[str, Any], *, itemsize: int = 4, n_lines: int | None = None
) -> Any:
    """Draw which thread of a warp reads which address, and what is fetched for it.

    Memory runs from left to right and then from top to bottom, like text: a row of the picture
    is a line of 128 bytes. Each panel's title says how much of what is fetched is also read.

    Parameters
    ----------
    accesses : mapping of str to array of int, shape (threads,)
        A panel each: its title, and for each thread the element it reads, counted from 0.
    itemsize : int
        Bytes of an element.
    n_lines : int, optional
        How many lines to show; as many as the largest address needs, unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib import colormaps, pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    # Without its lightest fifth, which would look like the grey beside it in print.
    dark = ListedColormap(colormaps["viridis"](np.linspace(0, 0.8, 256)))

    panels = {title: np.asarray(elements) for title, elements in accesses.items()}
    n_threads = max(len(elements) for elements in panels.values())
    last_byte = max(int(elements.max() + 1) * itemsize for elements in panels.values())
    lines = n_lines or -(-last_byte // LINE)
    columns = LINE // itemsize
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 4.0), layout="constrained", squeeze=False
    )
    for axis, (title, elements) in zip(grid[0], panels.items(), strict=True):
        sectors = np.unique(elements * itemsize // SECTOR)
        fetched = np.zeros(lines * LINE // SECTOR)
        fetched[sectors] = 1
        reader = np.full(lines * columns, np.nan)
        reader[elements] = np.arange(len(elements))
        bounds = (0, LINE, lines, 0)
        axis.imshow(
            fetched.reshape(lines, -1),
            cmap=ListedColormap(["white", "0.86"]),
            vmin=0,
            vmax=1,
            extent=bounds,
            aspect="auto",
        )
        drawn = axis.imshow(
            reader.reshape(lines, columns),
            cmap=dark,
            vmin=0,
            vmax=n_threads - 1,
            extent=bounds,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_xticks(range(0, LINE + 1, SECTOR))
        axis.grid(axis="x", color="0.4", linewidth=0.6)
        read = len(np.unique(elements)) * itemsize
        share = 100 * read / (len(sectors) * SECTOR)
        axis.set_title(
            f"{title}\n{read} bytes read,\n{len(sectors) * SECTOR:,} fetched: {share:.4g} % used",
            fontsize="medium",
        )
        axis.set_xlabel("byte in the line")
    grid[0][0].set_ylabel(f"line of {LINE} bytes in memory")
    figure.colorbar(drawn, ax=list(grid[0]), label="thread that reads it", pad=0.02)
    figure.legend(
        handles=[
            Patch(facecolor="0.86", edgecolor="0.4", label="fetched, not read by this warp"),
            Patch(facecolor="white", edgecolor="0.4", label="not fetched"),
        ],
        loc="outside lower center",
        ncols=2,
        fontsize="small",
    )
    return figure


def tile_walk(shape: tuple[int, int, int], tile: int, block: tuple[int, int]) -> Any:
    """Draw the tiles of A and B that a block visits to compute its tile of C = A B.

    Parameters
    ----------
    shape : (int, int, int)
        M, N and K: A is M × K, B is K × N, C is M × N.
    tile : int
        Rows and columns of a tile.
    block : (int, int)
        Which tile of C: its row and its column, counted in tiles from 0.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib import pyplot

    m, n, k = shape
    row, column = block[0] * tile, block[1] * tile
    figure, grid = pyplot.subplots(
        2,
        2,
        figsize=(6.2, 0.4 + 6.2 * (m + k) / (n + k)),
        layout="constrained",
        gridspec_kw={"width_ratios": [k, n], "height_ratios": [k, m]},
    )
    key, B, A, C = grid[0, 0], grid[0, 1], grid[1, 0], grid[1, 1]
    for axis, title, height, width, down, right in (
        (A, "A", m, k, "row", "k"),
        (B, "B", k, n, "k", "column"),
        (C, "C", m, n, "row", "column"),
    ):
        axis.set(xlim=(0, width), ylim=(height, 0), xlabel=right, ylabel=down)
        axis.set_xticks(range(0, width + 1, tile))
        axis.set_yticks(range(0, height + 1, tile))
        axis.grid(color="0.75", linewidth=0.8)
        axis.set_title(f"{title}: {height} × {width} elements", fontsize="medium")
    for step, start in enumerate(range(0, k, tile)):
        _tile(A, start, row, tile, COLORS[step % len(COLORS)], str(step + 1))
        _tile(B, column, start, tile, COLORS[step % len(COLORS)], str(step + 1))
    _tile(C, column, row, tile, "0.5", "Σ")
    figure.suptitle("The tiles that one block visits")
    key.set_axis_off()
    key.text(
        0.5,
        0.5,
        f"In step 1, 2, … the block\nbrings the tiles of A and B\nwith that number to shared\n"
        f"memory and multiplies them.\n\nTiles of {tile} × {tile} elements",
        ha="center",
        va="center",
        transform=key.transAxes,
    )
    return figure


def _tile(axis: Any, left: int, top: int, size: int, color: str, text: str) -> None:
    """Fill one tile and write on it; what sticks out of the matrix is cut off."""
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((left, top), size, size, facecolor=color, edgecolor="black"))
    width, height = axis.get_xlim()[1], axis.get_ylim()[0]
    axis.text(
        (left + min(left + size, width)) / 2,
        (top + min(top + size, height)) / 2,
        text,
        ha="center",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "boxstyle": "circle,pad=0.25"},
    )


def _panels(columns: Mapping[str, Sequence[float]]) -> dict[str, list[str]]:
    """Group the columns of a history by what they measure: on training and on held-out data."""
    if not columns.get("epoch"):
        raise ValueError("there is no finished epoch to draw")
    panels: dict[str, list[str]] = {}
    for name in columns:
        if name not in ("epoch", "seconds", "learning_rate"):
            panels.setdefault(name.removeprefix("validation_"), []).append(name)
    if len(set(columns.get("learning_rate", ()))) > 1:
        panels["learning_rate"] = ["learning_rate"]
    return panels


def _metric_axis(axis: Any, quantity: str, lines: Sequence[Sequence[float]]) -> None:
    """Name the vertical axis; losses get a logarithmic scale unless one is not positive."""
    axis.set_ylabel(_words(quantity))
    values = [value for line in lines for value in line if not math.isnan(value)]
    if quantity.endswith("loss") and min(values, default=0) > 0:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)


def _axis(axis: Any, width: float = 6.4, height: float = 3.8) -> Any:
    if axis is not None:
        return axis
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def _style(i: int) -> dict[str, str]:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _legend(axis: Any, *, outside: bool) -> None:
    beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    axis.legend(fontsize="small", **beside if outside else {})


def _finished(axis: Any, title: str, *, outside: bool = False) -> Any:
    axis.grid(alpha=0.3)
    _legend(axis, outside=outside)
    axis.set_title(title, fontsize="medium")
    return axis.figure
