"""Figures from plain tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

LINES = {
    "loss": {"label": "training", "color": "C0"},
    "validation_loss": {"label": "held out", "color": "C1"},
    "validation_accuracy": {"label": "held out", "color": "C1"},
}


def history(
    columns: Mapping[str, Sequence[float]], device: str, axes: Sequence[Any] | None = None
) -> Any:
    """Draw loss against epoch, and beside it accuracy where there is one.

    Parameters
    ----------
    columns : mapping of str to sequence of float
        ``epoch``, ``loss``, and where measured ``validation_loss``, ``validation_accuracy``.
    device : str
        On what it was measured; written under the figure.
    axes : sequence of matplotlib.axes.Axes, optional
        Where to draw: one, or two if there is an accuracy. A new figure unless given.

    Returns
    -------
    matplotlib.figure.Figure
    """
    panels = [["loss", "validation_loss"], ["validation_accuracy"]]
    panels = [[name for name in panel if name in columns] for panel in panels]
    panels = [panel for panel in panels if panel]
    if axes is None:
        from matplotlib import pyplot

        _, grid = pyplot.subplots(
            1, len(panels), figsize=(4.5 * len(panels), 3.2), layout="constrained", squeeze=False
        )
        axes = list(grid[0])
    for axis, panel in zip(axes, panels, strict=True):
        for name in panel:
            marker = "o" if len(columns["epoch"]) < 2 else ""
            axis.plot(columns["epoch"], columns[name], marker=marker, **LINES[name])
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylabel("accuracy" if "accuracy" in panel[0] else "loss")
        if "accuracy" not in panel[0] and min(min(columns[name]) for name in panel) > 0:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
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

    n_panels = 2 if "validation_accuracy" in columns else 1
    figure = Figure(figsize=(4.5 * n_panels, 3.2), layout="constrained")
    history(columns, device, list(figure.subplots(1, n_panels, squeeze=False)[0]))
    figure.savefig(path, dpi=144)


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
