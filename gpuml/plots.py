"""Figures from plain tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

LABELS = {"loss": "training", "validation_loss": "held out", "validation_accuracy": "held out"}


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
            axis.plot(columns["epoch"], columns[name], marker=marker, label=LABELS[name])
        axis.set_xlabel("epoch")
        axis.set_ylabel("accuracy" if "accuracy" in panel[0] else "loss")
        if "accuracy" not in panel[0]:
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
