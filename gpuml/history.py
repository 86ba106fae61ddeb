"""What training did, epoch by epoch: a table, and several of them side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import Any

from gpuml.errors import DataError, unknown_name
from gpuml.model_files import replacing

# Rows of a table in a notebook, the one for those left out included
SHOWN_ROWS = 12

# Of these more is better, of all other columns less.
SCORES = ("accuracy", "r2")


class History:
    """What training did, epoch by epoch: a table that prints, plots and exports itself.

    Attributes
    ----------
    columns : dict of str to list of float
        ``epoch`` (from 1), ``loss`` (mean over the epoch's samples, each before its step),
        ``learning_rate`` where a schedule changes it, ``epsilon`` (spent so far) where training is
        private, ``validation_…`` for each metric on the validation data (``validation_loss``,
        ``validation_accuracy`` for classes, ``validation_r2`` for numbers), and ``seconds`` since
        the start.
    device : str
        On what it ran.
    engine : str
        How the steps ran: ``"eager"``, ``"graph"``, ``"fused"``, ``"one_pass"`` or ``"gram"``;
        see :func:`gpuml.train`. A note says why, where a model is too much for a faster one.
    n_samples, batch_size : int
        Samples in each epoch, and in each full batch.
    notes : list of str
        What did not go as planned, a sentence each; printed below the table.
    """

    def __init__(self, *, device: str, engine: str, n_samples: int, batch_size: int) -> None:
        self.columns: dict[str, list[float]] = {}
        self.device = device
        self.engine = engine
        self.n_samples = n_samples
        self.batch_size = batch_size
        self.notes: list[str] = []

    def append(self, row: Mapping[str, float]) -> None:
        """Add one epoch's row.

        Raises
        ------
        ValueError
            If its columns are not those of the rows before.
        """
        if self.columns and row.keys() != self.columns.keys():
            raise ValueError(
                f"the row has columns {', '.join(row)}; the table has {', '.join(self.columns)}"
            )
        numbers = {name: _plain(value) for name, value in row.items()}
        for name, value in numbers.items():
            self.columns.setdefault(name, []).append(value)

    def truncate(self, n_epochs: int) -> None:
        """Drop what came after the first `n_epochs` epochs."""
        for column in self.columns.values():
            del column[n_epochs:]

    def __getitem__(self, column: str) -> list[float]:
        """Return one column, such as ``history["loss"]``."""
        if column not in self.columns:
            raise KeyError(unknown_name("column", column, self.columns))
        return self.columns[column]

    def __len__(self) -> int:
        """Return the number of finished epochs."""
        return len(self.columns.get("epoch", ()))

    @property
    def n_steps(self) -> int:
        """How many steps were taken in the finished epochs."""
        return len(self) * math.ceil(self.n_samples / self.batch_size)

    @property
    def seconds(self) -> float:
        """How long the finished epochs took, validation included."""
        return self.columns["seconds"][-1] if len(self) else 0.0

    @property
    def samples_per_second(self) -> float:
        """Training samples per second over all finished epochs."""
        return len(self) * self.n_samples / self.seconds if self.seconds else 0.0

    def best_epoch(self, column: str = "validation_loss") -> int:
        """Return the epoch with the least loss, or the greatest accuracy or R².

        Parameters
        ----------
        column : str
            Of accuracy and R² the greatest number is the best, of other columns the least. The
            first epoch of several that are equal counts; NaN never does.

        Returns
        -------
        int
            From 1, as in ``history["epoch"]``.

        Raises
        ------
        KeyError
            If there is no such column, as without validation data.
        ValueError
            If it holds no number.
        """
        sign = -1 if column.removeprefix("validation_") in SCORES else 1
        pairs = zip(self[column], self["epoch"], strict=True)
        numbers = [(sign * value, epoch) for value, epoch in pairs if not math.isnan(value)]
        if not numbers:
            raise ValueError(f"no epoch has a number in column {column}")
        return int(min(numbers)[1])

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the table as comma-separated values, one row an epoch."""
        import csv

        with (
            replacing(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(self._rows())

    def to_json(self) -> dict[str, Any]:
        """Return everything as what JSON can hold, without loss; :meth:`from_json` reads it.

        Infinity and NaN, which JSON lacks, become strings.
        """
        return {
            "columns": {
                name: [value if math.isfinite(value) else str(value) for value in column]
                for name, column in self.columns.items()
            },
            "device": self.device,
            "engine": self.engine,
            "n_samples": self.n_samples,
            "batch_size": self.batch_size,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> History:
        """Make a history again from what :meth:`to_json` returned.

        Raises
        ------
        DataError
            If it is something else.
        """
        try:
            rest = dict(table)
            columns, notes = rest.pop("columns"), rest.pop("notes")
            history = cls(**rest)
            history.notes = list(notes)
            history.columns = {
                name: [float(v) if isinstance(v, str) else _plain(v) for v in column]
                for name, column in columns.items()
            }
            if len({len(column) for column in history.columns.values()}) > 1:
                raise ValueError("its columns differ in length")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(f"this is no history: {error!r}") from None
        return history

    def plot(self, axes: Any = None) -> Any:
        """Draw losses, metrics and a changing learning rate; see :func:`gpuml.plots.history`."""
        from gpuml import plots

        return plots.history(self.columns, self.device, axes)

    def _rows(self) -> Iterator[tuple[float, ...]]:
        return zip(*self.columns.values(), strict=True)

    def _cells(self) -> Iterator[list[str]]:
        yield list(self.columns)
        for row in self._rows():
            yield list(map(number_text, row))

    def __str__(self) -> str:
        return "\n".join([aligned(self._cells()), *(f"Note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        if len(rows) > SHOWN_ROWS:
            first, last = (SHOWN_ROWS - 1) // 2, SHOWN_ROWS // 2
            rows = [*rows[:first], ["⋮"] * len(header), *rows[-last:]]
        below = [f"{_epochs(len(self))}, {self.engine}, {self.device}"]
        return html_table([header, *rows], below + [f"Note: {note}" for note in self.notes])

    def __repr__(self) -> str:
        return f"History({_epochs(len(self))}, {self.engine}, {self.device})"


class HistoryComparison:
    """Several runs side by side: their final numbers as a table, one column as a figure.

    Made by :func:`compare_histories`.

    Attributes
    ----------
    histories : dict of str to History
    column : str
        What is compared.
    """

    def __init__(self, histories: Mapping[str, History], column: str) -> None:
        self.histories = dict(histories)
        self.column = column

    def plot(self, *, against: str = "epoch", axis: Any = None) -> Any:
        """Draw a line for each run; see :func:`gpuml.plots.histories`.

        Parameters
        ----------
        against : {"epoch", "seconds"}
            What the horizontal axis shows.
        axis : matplotlib.axes.Axes, optional
            Where to draw; a new figure unless given.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from gpuml import plots

        runs = {name: history.columns for name, history in self.histories.items()}
        return plots.histories(
            runs, "\n".join(self._devices()), self.column, against=against, axis=axis
        )

    def _devices(self) -> list[str]:
        """Say once on which device all ran, or of each run on which."""
        devices = {name: history.device for name, history in self.histories.items()}
        if len(set(devices.values())) == 1:
            return [next(iter(devices.values()))]
        return [f"{name}: {device}" for name, device in devices.items()]

    def _cells(self) -> Iterator[list[str]]:
        every = [name for history in self.histories.values() for name in history.columns]
        last = [n for n in dict.fromkeys(every) if n not in ("epoch", "seconds")]
        yield ["run", "epochs", *last, f"best {self.column}", "in epoch", "seconds"]
        for name, history in self.histories.items():
            finals = [number_text(history[n][-1]) if n in history.columns else "–" for n in last]
            epoch = history.best_epoch(self.column)
            best = history[self.column][history["epoch"].index(epoch)]
            yield [
                *(name, str(len(history)), *finals),
                *(number_text(best), str(epoch), number_text(history.seconds)),
            ]

    def __str__(self) -> str:
        return aligned(self._cells())

    def _repr_html_(self) -> str:
        return html_table(self._cells(), self._devices())

    def __repr__(self) -> str:
        return f"HistoryComparison({', '.join(self.histories)}; {self.column})"


def compare_histories(histories: Mapping[str, History], column: str = "loss") -> HistoryComparison:
    """Set several runs side by side: print the result, or call its `plot`.

    Parameters
    ----------
    histories : mapping of str to History
        The runs by name.
    column : str
        What is compared: the best epoch is that of this column, and `plot` draws it.

    Returns
    -------
    HistoryComparison

    Raises
    ------
    TypeError
        If they have no names.
    ValueError
        If there are no runs, or one of them has no number in that column.

    Examples
    --------
    >>> slow, fast = (
    ...     History(device="a CPU", engine="eager", n_samples=8, batch_size=8) for _ in range(2)
    ... )
    >>> for epoch in (1, 2):
    ...     slow.append({"epoch": epoch, "loss": 1 / epoch, "seconds": 0.5 * epoch})
    ...     fast.append({"epoch": epoch, "loss": 1 / epoch**4, "seconds": 0.5 * epoch})
    >>> print(compare_histories({"slow": slow, "fast": fast}))
     run  epochs    loss  best loss  in epoch  seconds
    slow       2     0.5        0.5         2        1
    fast       2  0.0625     0.0625         2        1
    """
    if not isinstance(histories, Mapping):
        raise TypeError(
            f'give the histories by name, {{"a name": history, …}}, got {type(histories).__name__}'
        )
    if not histories:
        raise ValueError('no histories to compare: give {"a name": history, …}')
    for name, history in histories.items():
        try:
            history.best_epoch(column)
        except (KeyError, ValueError) as error:
            raise ValueError(f"run '{name}': {error.args[0]}") from None
    return HistoryComparison(histories, column)


def _plain(value: Any) -> float:
    """Return a number of any library as an int or a float of Python's."""
    if type(value) is float or type(value) is int:
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def number_text(value: float) -> str:
    """Return a number as tables show it, with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _epochs(n: int) -> str:
    return f"{n} epoch{'s' * (n != 1)}"


def aligned(cells: Iterable[Sequence[str]]) -> str:
    """Lay out rows of cells as text, each column flush right."""
    rows = list(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def html_table(cells: Iterable[Sequence[str]], below: Iterable[str]) -> str:
    """Lay out a header and rows of cells as HTML, with lines of text below."""
    header, *rows = ([html.escape(cell) for cell in row] for row in cells)

    def row_of(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>"

    return "\n".join(
        [
            "<table>",
            f"<thead>{row_of('th', header)}</thead>",
            "<tbody>",
            *(row_of("td", row) for row in rows),
            "</tbody>",
            "</table>",
            f"<p>{'<br>'.join(map(html.escape, below))}</p>",
        ]
    )
