from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest

from gpuml import DataError, History, compare_histories


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def empty(device="a device"):
    return History(device=device, engine="eager", n_samples=100, batch_size=30)


def history_of(device="a device", **columns):
    history = empty(device)
    for i, values in enumerate(zip(*columns.values(), strict=True), start=1):
        history.append({"epoch": i, **dict(zip(columns, values, strict=True)), "seconds": i / 4})
    return history


class Page(HTMLParser):
    """The rows of the tables in a piece of HTML, and its text; refuses unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.text = [], [], ""
        self.tags = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "br":
            self.text += "\n"
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "p":
            self.text += data


@pytest.mark.parametrize("n", [1, 2, 12])
def test_a_short_table_is_shown_whole(n):
    history = history_of(loss=[1 / i for i in range(1, n + 1)])
    page = Page(history._repr_html_())
    assert page.rows[0] == ["epoch", "loss", "seconds"]
    assert [row[0] for row in page.rows[1:]] == [str(i) for i in range(1, n + 1)]
    assert page.rows[-1] == [str(n), f"{1 / n:.4g}", f"{n / 4:.4g}"]
    assert f"{n} epoch{'s' * (n > 1)}, eager, a device" in page.text


@pytest.mark.parametrize("n", [13, 14, 1000])
def test_of_a_long_table_the_first_and_the_last_epochs_are_shown(n):
    page = Page(history_of(loss=[1.0] * n)._repr_html_())
    shown = [row[0] for row in page.rows[1:]]
    assert len(shown) == 12
    gap = shown.index("⋮")
    assert shown[:gap] == [str(i) for i in range(1, gap + 1)]
    assert shown[gap + 1 :] == [str(i) for i in range(n - 10 + gap, n + 1)]
    assert 4 <= gap <= 7
    assert page.rows[1 + gap] == ["⋮"] * 3


def test_a_page_shows_what_is_written_not_what_it_would_mean():
    history = history_of(device="<script>alert(1)</script>", **{"validation_<b>&": [1.0]})
    history.engine = "<i>eager"
    history.notes.append('x < y & "z"</p><h1>')
    page = Page(history._repr_html_())
    assert page.rows[0][1] == "validation_<b>&"
    assert "<script>alert(1)</script>" in page.text
    assert page.text.endswith('Note: x < y & "z"</p><h1>')
    assert not page.tags & {"script", "b", "i", "h1"}
    page = Page(compare_histories({"<b>": history}, "validation_<b>&")._repr_html_())
    assert page.rows[1][0] == "<b>"
    assert not page.tags & {"script", "b"}


def test_an_empty_history_shows_itself_too(tmp_path):
    history = empty()
    assert str(history) == ""
    assert repr(history) == "History(0 epochs, eager, a device)"
    assert "0 epochs, eager, a device" in Page(history._repr_html_()).text
    history.to_csv(tmp_path / "empty.csv")
    assert History.from_json(history.to_json()).columns == {}
    assert (history.seconds, history.n_steps, history.samples_per_second) == (0, 0, 0)
    with pytest.raises(ValueError, match="no finished epoch"):
        history.plot()


def test_notes_are_printed_below_the_table():
    history = history_of(loss=[1.0, 0.5])
    table = str(history)
    history.notes += ["the kernel was not used", "one class is missing"]
    assert str(history).splitlines() == [
        *table.splitlines(),
        "Note: the kernel was not used",
        "Note: one class is missing",
    ]
    history.truncate(0)
    assert str(history).splitlines()[1:] == [
        "Note: the kernel was not used",
        "Note: one class is missing",
    ]


def test_columns_hold_plain_numbers_whatever_came(device, tmp_path):
    history = empty()
    loss = device.asarray(0.1, np.float32)  # an array without axes, on the device
    history.append({"epoch": np.int64(1), "loss": loss, "validation_r2": np.float64(0.5)})
    assert [type(v) for column in history.columns.values() for v in column] == [int, float, float]
    assert history["loss"] == [float(np.float32(0.1))]
    assert str(history).split() == ["epoch", "loss", "validation_r2", "1", "0.1", "0.5"]
    history.to_csv(tmp_path / "history.csv")
    assert "np." not in (tmp_path / "history.csv").read_text()


def test_a_row_of_other_columns_is_refused_and_leaves_the_table_whole():
    history = history_of(loss=[1.0])
    for row in (
        {"epoch": 2, "loss": 1.0},
        {"epoch": 2, "loss": 1.0, "seconds": 1.0, "validation_loss": 2.0},
        {},
    ):
        with pytest.raises(ValueError, match="the table has epoch, loss, seconds"):
            history.append(row)
    with pytest.raises((TypeError, ValueError)):
        history.append({"epoch": 2, "loss": "much", "seconds": 1.0})
    assert {len(column) for column in history.columns.values()} == {1}
    history.append({"seconds": 1.0, "loss": 0.5, "epoch": 2})  # in any order
    assert history["loss"] == [1.0, 0.5]


def test_an_unknown_column_is_named_with_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'loss'"):
        history_of(loss=[1.0])["los"]


@pytest.mark.parametrize(
    ("column", "values", "best"),
    [
        ("loss", [3.0, 1.0, 2.0], 2),
        ("validation_loss", [3.0, 1.0, 1.0], 2),
        ("validation_loss", [math.nan, 2.0, 1.0], 3),
        ("validation_loss", [math.inf, 2.0, math.nan], 2),
        ("validation_loss", [1.0, -2.0, 3.0], 2),
        ("validation_mean_error", [3.0, 1.0, 2.0], 2),
        ("validation_accuracy", [0.5, 0.9, 0.7], 2),
        ("validation_accuracy", [0.5, 0.9, 0.9], 2),
        ("validation_accuracy", [math.nan, 0.9, 0.95], 3),
        ("validation_r2", [-3.0, -1.0, -2.0], 2),
        ("validation_r2", [0.1, 0.2, 0.3], 3),
        ("accuracy", [0.1, 0.2, 0.15], 2),
    ],
)
def test_the_best_epoch_has_the_least_loss_or_the_greatest_score(column, values, best):
    assert history_of(**{column: values}).best_epoch(column) == best


def test_the_best_epoch_is_that_of_the_validation_loss():
    history = history_of(loss=[3.0, 2.0, 1.0], validation_loss=[2.0, 1.0, 3.0])
    assert history.best_epoch() == 2
    history.columns["epoch"] = [11, 12, 13]  # a run that was resumed
    assert history.best_epoch() == 12
    with pytest.raises(KeyError, match="unknown column 'validation_loss'"):
        history_of(loss=[1.0]).best_epoch()
    with pytest.raises(ValueError, match="no epoch has a number in column loss"):
        history_of(loss=[math.nan]).best_epoch("loss")
    with pytest.raises(KeyError, match="'loss'"):
        empty().best_epoch("loss")


def test_json_keeps_every_bit(rng):
    values = [*rng.normal(size=4), 0.1 + 0.2, 5e-324, math.inf, -math.inf, math.nan, 1.0]
    history = history_of(loss=values, validation_accuracy=rng.random(10), learning_rate=[0.1] * 10)
    history.notes = ["läuft ⋮", 'a "quote"']
    text = json.dumps(history.to_json(), allow_nan=False)
    twin = History.from_json(json.loads(text))
    assert list(twin.columns) == list(history.columns)
    for name, column in history.columns.items():
        np.testing.assert_array_equal(twin[name], column)  # takes NaN for equal to NaN
        assert list(map(type, twin[name])) == list(map(type, column))
    assert (twin.device, twin.engine, twin.notes) == ("a device", "eager", history.notes)
    assert (twin.n_samples, twin.batch_size, twin.seconds) == (100, 30, 2.5)
    assert str(twin) == str(history)
    assert json.dumps(twin.to_json()) == text


def test_what_json_holds_is_a_copy():
    history = history_of(loss=[1.0])
    table = history.to_json()
    twin = History.from_json(table)
    for other in (history, twin):
        other.append({"epoch": 2, "loss": 0.5, "seconds": 1.0})
        other.notes.append("later")
    assert table["columns"]["loss"] == [1.0]
    assert table["notes"] == []
    assert len(history) == len(twin) == 2


GOOD = history_of(loss=[1.0, 0.5]).to_json()


@pytest.mark.parametrize(
    "table",
    [
        {},
        [],
        None,
        {name: value for name, value in GOOD.items() if name != "columns"},
        {name: value for name, value in GOOD.items() if name != "notes"},
        {name: value for name, value in GOOD.items() if name != "device"},
        GOOD | {"surprise": 1},
        GOOD | {"columns": [1, 2]},
        GOOD | {"columns": {"epoch": [1, 2], "loss": [1.0]}},
        GOOD | {"columns": {"epoch": [1], "loss": ["a lot"]}},
        GOOD | {"columns": {"epoch": [1], "loss": [None]}},
        GOOD | {"columns": {"epoch": 1}},
        GOOD | {"notes": None},
    ],
)
def test_what_is_no_history_is_refused(table):
    with pytest.raises(DataError, match="this is no history"):
        History.from_json(table)


def test_csv_survives_a_comma_in_a_name(tmp_path):
    history = history_of(**{"validation_a,b": [1.0, 0.1 + 0.2]})
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["epoch", "validation_a,b", "seconds"]
    assert [float(row[1]) for row in rows] == [1.0, 0.1 + 0.2]
    assert b"\r" not in (tmp_path / "history.csv").read_bytes()


# --- several runs ------------------------------------------------------------------------------


def runs():
    return {
        "plain": history_of(loss=[4.0, 2.0, 3.0]),
        "with validation": history_of(loss=[3.0, 1.0], validation_accuracy=[0.5, 0.75]),
    }


def test_a_comparison_lists_the_final_and_the_best_numbers():
    lines = str(compare_histories(runs())).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[-1] == "seconds"
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert cells == [
        ["run", "epochs", "loss", "validation_accuracy", "best loss", "in epoch", "seconds"],
        ["plain", "3", "3", "–", "2", "2", "0.75"],
        ["with validation", "2", "1", "0.75", "1", "2", "0.5"],
    ]
    assert Page(compare_histories(runs())._repr_html_()).rows == cells


def test_the_best_number_of_a_score_is_the_greatest():
    history = history_of(loss=[1.0, 0.5, 0.2], validation_r2=[0.1, 0.9, 0.8])
    *_, best, epoch, _ = str(compare_histories({"a": history}, "validation_r2")).split()
    assert (best, epoch) == ("0.9", "2")


def test_a_comparison_draws_a_line_for_each_run():
    histories = runs()
    figure = compare_histories(histories).plot()
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(drawn) == list(histories)
    for name, history in histories.items():
        assert list(drawn[name].get_xdata()) == history["epoch"]
        assert list(drawn[name].get_ydata()) == history["loss"]
    assert figure.axes[0].get_ylabel() == "loss"
    assert figure.get_supxlabel() == "measured on a device"

    _, axis = plt.subplots()
    figure = compare_histories(histories).plot(against="seconds", axis=axis)
    assert figure is axis.figure
    assert list(axis.lines[1].get_xdata()) == histories["with validation"]["seconds"]
    assert axis.get_xlabel() == "time [s]"


def test_devices_are_named_run_by_run_where_they_differ():
    histories = {"one": history_of("a CPU", loss=[1.0]), "two": history_of("a GPU", loss=[1.0])}
    comparison = compare_histories(histories)
    assert comparison.plot().get_supxlabel() == "measured on one: a CPU\ntwo: a GPU"
    assert Page(comparison._repr_html_()).text == "one: a CPU\ntwo: a GPU"


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match="no histories to compare"):
        compare_histories({})
    with pytest.raises(TypeError, match=r"by name, \{\"a name\": history, …\}, got list"):
        compare_histories([*runs().values()])
    with pytest.raises(ValueError, match="run 'plain': unknown column 'validation_accuracy'"):
        compare_histories(runs(), "validation_accuracy")
    with pytest.raises(ValueError, match="run 'new': "):
        compare_histories(runs() | {"new": empty()})
    with pytest.raises(ValueError, match="run 'broken': no epoch has a number in column loss"):
        compare_histories({"broken": history_of(loss=[math.nan])})


def test_a_comparison_does_not_change_when_the_mapping_does():
    histories = runs()
    comparison = compare_histories(histories)
    histories.clear()
    assert len(comparison.histories) == 2
