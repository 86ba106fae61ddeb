"""Where errors send their readers: to a heading of notebook 11, in one way everywhere."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

import gpuml
from gpuml import training
from gpuml.errors import QUESTIONS, DeviceMemoryError, answered, noting_memory_errors

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "11_frequent_questions.ipynb"


def headings() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return re.findall(r"^## (.+)$", "\n".join(texts), re.M)


def questions_named(text: str) -> list[str]:
    """The keys that a module hands to `answered`, directly or by the doctor's table."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "answered":
            found += [ast.literal_eval(a) for a in node.args if not isinstance(a, ast.Starred)]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_ANSWERED":
            found += [key for keys in ast.literal_eval(node.value).values() for key in keys]
    return found


def test_every_question_is_a_heading_of_the_notebook():
    assert [h for h in headings() if h.endswith("?")] == list(QUESTIONS.values())


def test_the_eight_questions_are_there():
    assert list(QUESTIONS.values()) == [
        "Why is my GPU slower?",
        "Why is memory not freed?",
        "Out of memory: what now?",
        "Why do numbers differ a little?",
        "Which wheel?",
        "Do I need to synchronize?",
        "float32 or float64?",
        "Why does the first call take a second?",
    ]


def test_what_errors_and_the_doctor_name_are_questions():
    named = {
        path.name: questions_named(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "gpuml").rglob("*.py"))
    }
    assert {name for name, keys in named.items() if keys} >= {"doctor.py", "devices.py", "cli.py"}
    assert {key for keys in named.values() for key in keys} <= set(QUESTIONS)


def test_no_message_names_a_question_in_words_of_its_own():
    for path in (ROOT / "gpuml").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "errors.py":
            assert "notebook 11" not in text, path.name


def test_the_line_is_short_and_plain():
    for key, question in QUESTIONS.items():
        line = answered(key)
        assert len(line) <= 90
        assert line.isascii()
        assert f'"{question}"' in line
        assert "gpuml notebooks DIR" in line
    assert answered("memory", "freed").count("notebook 11") == 1


def test_a_lack_of_memory_is_noted_once():
    error = DeviceMemoryError("too little")
    assert str(error) == "too little"
    assert error.__notes__ == [answered("memory")]
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (str(copied), copied.__notes__) == ("too little", error.__notes__)
    with pytest.raises(DeviceMemoryError) as caught, noting_memory_errors(), noting_memory_errors():
        raise error
    assert caught.value is error
    assert error.__notes__ == [answered("memory")]


def test_errors_of_another_kind_get_no_note():
    with pytest.raises(ValueError, match="other") as caught, noting_memory_errors():
        raise ValueError("other")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("work", ["train", "evaluate", "train_population"])
def test_where_memory_runs_out_the_error_says_where_to_read(work, monkeypatch):
    from gpuml import populations

    def lacking(*_, **__):
        raise MemoryError("Unable to allocate 5 TiB")

    monkeypatch.setattr(training, "source_of", lacking)
    monkeypatch.setattr(populations, "source_of", lacking)
    model, X = gpuml.Linear(2, 1, device="cpu"), np.ones((3, 2), np.float32)
    more = {"n_models": 2} if work == "train_population" else {}
    with pytest.raises(MemoryError, match="5 TiB") as caught:
        getattr(gpuml, work)(model, X, X[:, :1], **more)
    assert caught.value.__notes__ == [answered("memory")]


def test_arrays_and_products_that_do_not_fit_say_where_to_read(device):
    """4 PiB, of one number that NumPy and CuPy repeat without a copy."""
    xp = device.xp
    wide = xp.broadcast_to(xp.ones((1, 1), np.float32), (2**25, 1))
    with pytest.raises(MemoryError) as caught:
        gpuml.batched_matmul(wide, wide.T)
    assert caught.value.__notes__ == [answered("memory")]
    huge = np.broadcast_to(np.ones(1, np.float32), (2**50,))
    with pytest.raises(MemoryError) as caught:
        device.asarray(huge, np.float64)
    assert caught.value.__notes__ == [answered("memory")]


def test_what_a_model_answers_may_not_fit(monkeypatch):
    def lacking(*_):
        raise MemoryError("Unable to allocate 5 TiB")

    monkeypatch.setattr(gpuml.Linear, "__call__", lacking)
    with pytest.raises(MemoryError) as caught:
        gpuml.predict(gpuml.Linear(2, 1, device="cpu"), np.ones((3, 2), np.float32))
    assert caught.value.__notes__ == [answered("memory")]


def test_a_gpu_without_cupy_is_noted_and_one_too_many_is_not(monkeypatch):
    from gpuml import devices

    for problem, noted in [("CuPy is not installed", True), ("there is no GPU 9: …", False)]:
        monkeypatch.setattr(devices, "_gpu_problem", lambda index, problem=problem: problem)
        with pytest.raises(gpuml.DeviceError, match="gpuml doctor") as caught:
            gpuml.get_device("gpu:9")
        notes = getattr(caught.value, "__notes__", [])
        assert notes == ([answered("wheel")] if noted else [])
