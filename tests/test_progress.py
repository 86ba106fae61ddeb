"""Progress bars: where they are written, and that they fit."""

from __future__ import annotations

import io
import sys

import pytest

from gpuml import progress


class Cell(io.StringIO):
    """Standard output as a notebook's kernel has it."""

    encoding = "UTF-8"


Cell.__module__ = "ipykernel.iostream"


def finished_bar():
    bar = progress.progress_bar(total=510, unit="step")
    bar.set_description("epoch 30/30")
    bar.set_postfix({"val_accuracy": "0.9417", "val_loss": "0.4248", "loss": "0.4026"})
    bar.update(510)
    bar.close()


def test_outside_of_notebooks_it_is_on_standard_error(capsys):
    finished_bar()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "510/510" in shown.err


def test_in_a_notebook_it_is_output_that_fits(capsys, monkeypatch):
    cell = Cell()
    monkeypatch.setattr(sys, "stdout", cell)
    finished_bar()
    assert capsys.readouterr().err == ""
    lines = cell.getvalue().replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= progress.NOTEBOOK_COLUMNS
    [last] = [line for line in lines if "510/510" in line][-1:]
    assert last.startswith("epoch 30/30: 100%|█")
    assert last.rstrip().endswith("loss=0.4026]")


@pytest.mark.parametrize("unit_scale", [False, True])
def test_options_are_tqdms(unit_scale, monkeypatch):
    cell = Cell()
    monkeypatch.setattr(sys, "stdout", cell)
    with progress.progress_bar(total=2_000_000, unit="FLOP", unit_scale=unit_scale) as bar:
        bar.update(2_000_000)
    assert ("2.00M/2.00M" in cell.getvalue()) is unit_scale
