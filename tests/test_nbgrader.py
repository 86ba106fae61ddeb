"""The exercises as assignments of nbgrader: handed out, graded, and given back with remarks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: the extra `teach` brings it")

import nbformat
import nbgrader
from alembic.script import ScriptDirectory
from nbgrader import api
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.preprocessors import CheckCellMetadata, ClearOutput, ClearSolutions
from traitlets.config import Config

import gpuml
from gpuml.copies import students_copy

SOURCES = sorted((Path(__file__).parent.parent / "notebooks" / "exercises").glob("*.ipynb"))
GRADED = "05_gradient_descent"


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def points(path: Path) -> dict[str, int]:
    every = [cell["metadata"].get("nbgrader", {}) for cell in cells(path)]
    return {about["grade_id"]: about["points"] for about in every if about.get("grade")}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course with one assignment, handed out; its commands raise."""
    root = tmp_path_factory.mktemp("course")
    (root / "source" / "one").mkdir(parents=True)
    (root / "source" / "one" / f"{GRADED}.ipynb").write_bytes(SOURCES[5].read_bytes())
    config = Config()
    config.CourseDirectory.root = str(root)
    config.CourseDirectory.course_id = "gpuml"
    config.ExecutePreprocessor.timeout = 120

    def run(name, *arguments, **options):
        result = getattr(NbGraderAPI(config=config), name)(*arguments, **options)
        assert result["success"], result.get("error") or result.get("log")

    with pytest.MonkeyPatch.context() as patched:
        # it starts kernels that import this package
        package = str(Path(gpuml.__file__).parent.parent)
        patched.setenv("PYTHONPATH", os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]))
        patched.chdir(root)
        # it would ask a second program for the version of its database, seconds each time
        scripts = ScriptDirectory(str(Path(nbgrader.__file__).parent / "alembic"))
        patched.setattr(api, "get_alembic_version", scripts.get_current_head)
        run("generate_assignment", "one")
        yield SimpleNamespace(root=root, run=run)


def same(theirs: list[dict], ours: list[dict]) -> None:
    assert len(theirs) == len(ours)
    for their, our in zip(theirs, ours, strict=True):
        for key in ("cell_type", "id"):
            assert their[key] == our[key]
        assert "".join(their["source"]) == "".join(our["source"])
        assert their.get("outputs", []) == our.get("outputs", [])
        assert their.get("execution_count") == our.get("execution_count")
        marks = their["metadata"].get("nbgrader", {})
        marks.pop("checksum", None)  # what nbgrader adds to know and to lock its cells
        their["metadata"].pop("deletable", None)
        their["metadata"].pop("editable", None)
        assert their["metadata"] == our["metadata"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_our_students_copy_is_that_of_nbgrader(path):
    notebook = nbformat.read(path, as_version=4)
    for step in (CheckCellMetadata, ClearSolutions, ClearOutput):
        notebook, _ = step().preprocess(notebook, {})
    same(notebook.cells, json.loads(students_copy(path.read_bytes()))["cells"])


def test_our_students_copy_is_what_nbgrader_hands_out(course):
    released = cells(course.root / "release" / "one" / f"{GRADED}.ipynb")
    same(released, json.loads(students_copy(SOURCES[5].read_bytes()))["cells"])


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_right_partly_right_and_empty_submissions_get_their_points(course):
    name = f"{GRADED}.ipynb"
    source, release = (json.loads((course.root / kind / "one" / name).read_text(encoding="utf-8"))
                       for kind in ("source", "release"))  # fmt: skip
    solved = {cell["id"]: cell["source"] for cell in source["cells"]}
    wrong = {"answer-gradient": ["def gradient(X, Y, W):\n", "    return 2 * X.T @ (X @ W - Y)"]}
    greedy = "def descend(gradient, W, learning_rate, n_steps):\n    while True:\n"
    greedy += "        W = W, [0] * 10**6"
    wrong["answer-descend"] = greedy.splitlines(keepends=True)
    answers = {"right": solved, "empty": {}, "partly": solved | wrong}
    for student, given in answers.items():
        folder = course.root / "submitted" / student / "one"
        folder.mkdir(parents=True)
        handed_in = json.loads(json.dumps(release))
        for cell in handed_in["cells"]:
            if cell["id"].startswith("answer-"):
                cell["source"] = given.get(cell["id"], cell["source"])
            if cell["id"] == "check-gradient":  # whoever changes the check gains nothing
                cell["source"] = ["pass"]
        (folder / name).write_text(json.dumps(handed_in), encoding="utf-8")
    course.run("autograde", "one", "*", create=True)
    course.run("generate_feedback", "one")

    worth = points(SOURCES[5])
    most = sum(worth.values())
    partly = most - worth["check_gradient"] - worth["check_descend"]
    with Gradebook(f"sqlite:///{course.root}/gradebook.db") as book:
        scores = {student: book.find_submission("one", student).score for student in answers}
        assert book.find_submission("one", "right").max_score == most
    assert scores == {"right": most, "empty": 0, "partly": partly}
    remarks = {
        student: (course.root / "feedback" / student / "one" / f"{GRADED}.html").read_text()
        for student in answers
    }
    assert "there is no answer yet" in remarks["empty"]
    assert "divide by the number of *all* its terms" in remarks["partly"]
    assert "was stopped" in remarks["partly"]
    assert "AnswerError" not in remarks["right"]
