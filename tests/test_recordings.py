from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

import gpuml
from gpuml import recordings
from gpuml.recordings import record, recorded

METHODS = {"trained": "an MLP", "device": "a GPU", "date": "2026-11-26", "seconds": {"plain": 1e-4}}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def quick(monkeypatch):
    """Small sizes, so that a whole recording takes a moment."""
    monkeypatch.setattr(recordings, "PRODUCT_SIZES", (8, 16, 32, 64))
    monkeypatch.setattr(recordings, "TRANSFER_SIZES", (1024, 4096))
    ceilings = recordings.device_ceilings
    monkeypatch.setattr(
        recordings, "device_ceilings", lambda d, time_budget=8: ceilings(d, time_budget=0.4)
    )
    monkeypatch.setattr(recordings, "measure_queued", lambda d: {"returned": 1.0, "finished": 2.0})
    cases = recordings.measure_cases
    monkeypatch.setattr(recordings, "measure_cases", lambda d: cases(d, time_budget=0.02))
    points = recordings.roofline_points
    monkeypatch.setattr(recordings, "roofline_points", lambda d: points(d, time_budget=0.02))


def test_a_recording_is_written_and_read_again(device, quick, tmp_path):
    made = record(device, command="a command")
    made.methods["gpu"] = METHODS
    made.save(tmp_path / "mine.json")
    read = recorded(tmp_path / "mine.json")
    assert read == made
    assert read.command == "a command"
    assert read.label == f"recorded on {device.name}, {made.date}"
    assert read.versions["numpy"] == np.__version__
    assert bool(read.ladder) == bool(read.transfers) == (device.kind == "gpu")
    for name, figure in read.figures().items():
        assert figure.axes[0].get_xlabel() or name == "crossover"
        assert read.label in figure.axes[0].get_title(), name
    assert "GB/s" in str(read)


def test_the_hardware_that_comes_with_the_package_is_whole():
    h200 = recorded("nvidia_h200")
    assert "H200" in h200.device
    assert h200.command.startswith("gpuml bench --save")
    assert {"numpy", "cupy-cuda13x"} <= set(h200.versions)
    assert h200.ceilings.values["gemm_float16"] > h200.ceilings.values["gemm_float32"]
    assert next(iter(h200.ladder)) == "naive, float32"
    assert h200.ladder["tiled, float32"].rate >= 3 * h200.ladder["naive, float32"].rate
    pictures = {"products", "roofline", "crossover", "transfers", "ladder", "blocked"}
    assert set(h200.figures()) == pictures
    assert h200.blocked["square"].bound == "arithmetic"
    assert h200.blocked["tall"].bound in ("bus", "host memory")
    assert all(report.overlap > 0.5 for report in h200.blocked.values())
    assert h200.products.speedup("gpu", 4096, "float32", transfers=False) > 1
    assert h200.queued["finished"] > 10 * h200.queued["returned"]
    assert [min(case, key=lambda d: case[d].seconds) for case in h200.cases.values()] == [
        "cpu",
        "cpu",
        "gpu",
    ], "notebook 01 says so"
    assert recorded() == h200


def test_a_call_returns_before_the_work_is_finished_on_a_gpu_only(device):
    queued = recordings.measure_queued(device, size=4096 if device.kind == "gpu" else 512)
    if device.kind == "gpu":
        assert queued["returned"] < queued["finished"] / 10
    else:
        assert queued["returned"] > queued["finished"] / 10


def test_a_recording_that_is_missing_or_malformed_is_named_with_the_command(tmp_path):
    with pytest.raises(ValueError, match="unknown recording 'nvidia_h2oo': did you mean"):
        recorded("nvidia_h2oo")
    with pytest.raises(
        gpuml.DataError, match=r"there is no recording .*gpuml bench --save x\.json"
    ):
        recorded(tmp_path / "x.json")
    good = json.loads(
        (recordings.Path(recordings.__file__).parent / "recorded/nvidia_h200.json").read_text()
    )
    for text in (
        "",
        "{",
        "[]",
        "{}",
        json.dumps(good | {"more": 1}),
        json.dumps(good | {"points": 3}),
        json.dumps(good | {"methods": {"gpu": {"seconds": {"plain": 1.0}}}}),
        json.dumps(good | {"methods": {"gpu": METHODS | {"seconds": {"plain": "1"}}}}),
        json.dumps(good | {"methods": {"gpu": METHODS | {"trained": 3}}}),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(
            gpuml.DataError, match=r"is not a recording .*gpuml bench --save x\.json"
        ):
            recorded(tmp_path / "x.json")


def test_the_ladder_counts_only_right_results(device, monkeypatch):
    if device.kind == "cpu":
        pytest.skip("needs a GPU")
    monkeypatch.setattr(
        recordings,
        "load_kernel",
        lambda name: lambda *launch: None,  # computes nothing
    )
    with pytest.raises(ArithmeticError, match="naive, float32: relative error"):
        recordings.measure_ladder(device, size=64)


def test_gpuml_bench_prints_draws_and_saves(quick, tmp_path, monkeypatch, capsys):
    from gpuml.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--device", "cpu", "--save", "mine.json"]) == 0
    shown = capsys.readouterr()
    assert "gemm float32" in shown.out
    assert "runs/001" in shown.out.replace("\\", "/")
    assert shown.err == ""
    names = {path.name for path in (tmp_path / "runs" / "001").iterdir()}
    assert names == {"products.csv", "products.png", "roofline.png"}
    assert recorded("mine.json").command == "gpuml bench --save mine.json"

    for arguments in (["--save", "mine.json"], ["--save", "mine.txt"], ["--save", "no/mine.json"]):
        assert main(["bench", "--device", "cpu", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1
