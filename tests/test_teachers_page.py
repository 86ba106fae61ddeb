"""The teacher's page: it lists the whole course, and names only what is there."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from gpuml import cli
from gpuml.copies import course_files

HOME = Path(__file__).parent.parent / "notebooks"
PAGE = (HOME / "README.md").read_text(encoding="utf-8")
LESSONS = sorted(HOME.glob("[0-9][0-9]_*.ipynb"))
EXERCISES = sorted((HOME / "exercises").glob("[0-9][0-9]_*.ipynb"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def section(title: str) -> str:
    """The text below a heading, up to the next one of any level."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
    assert found, f"there is no heading '{title}'"
    return found[1]


def table(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def headings(path: Path) -> set[str]:
    texts = ["".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown"]
    return set(re.findall(r"^## (.+)$", "\n".join(texts), re.M))


def numbered(paths: list[Path], number: str) -> Path:
    [path] = [path for path in paths if path.name.startswith(f"{number}_")]
    return path


def minutes(path: Path) -> int:
    return int(
        re.search(r"\*\*Time:\*\* about (\d+) minutes", "".join(cells(path)[0]["source"]))[1]
    )


def points(path: Path) -> int:
    return sum(cell["metadata"].get("nbgrader", {}).get("points", 0) for cell in cells(path))


@pytest.mark.parametrize(
    "title",
    [
        *("The notebooks", "Measured: time and memory", "Two hours", "One day", "A term"),
        *("Thirty students, one GPU", "On JupyterHub", "On hosted notebooks"),
        *("Without a GPU", "Assignments and grades"),
    ],
)
def test_it_has_what_a_teacher_looks_for(title):
    assert section(title).strip()


def test_it_lists_every_notebook_with_its_name_and_its_minutes():
    rows = table("The notebooks")
    assert [re.search(r"\((.*)\)", row[0])[1] for row in rows] == [path.name for path in LESSONS]
    for row, path in zip(rows, LESSONS, strict=True):
        title = "".join(cells(path)[0]["source"]).splitlines()[0].removeprefix("# ")
        assert f"[{title.replace(' · ', ' ')}]" in row[0]
        assert row[2] == str(minutes(path)), path.name


def test_it_knows_the_exercises():
    by_number = {re.search(r"\[(\d\d)", row[0])[1]: row[3:] for row in table("The notebooks")}
    for path in EXERCISES:
        assert by_number[path.name[:2]] == [str(minutes(path)), str(points(path))], path.name
    unknown = {number for number, row in by_number.items() if "?" in row}
    assert unknown == set(by_number) - {path.name[:2] for path in EXERCISES}


def test_every_notebook_has_its_measurements():
    rows = table("Measured: time and memory")
    assert [row[0] for row in rows] == [path.name[:2] for path in LESSONS]
    for row in rows:
        assert len(row) == 6
        assert all(re.fullmatch(r"\?|\d+(\.\d)?", cell) for cell in row[1:]), row


@pytest.mark.parametrize(("title", "total"), [("Two hours", 120), ("One day", 360), ("A term", 14)])
def test_the_plans_name_sections_and_exercises_that_exist(title, total):
    rows = table(title)
    for _, number, sections, exercises in rows:
        if not number:
            continue
        named = [name for name in sections.split("; ") if name and name != "All"]
        assert set(named) <= headings(numbered(LESSONS, number)), number
        if title == "A term":
            assert exercises in ("", number)
        else:
            for name in exercises.split("; ") if exercises else ():
                assert name in headings(numbered(EXERCISES, number)), number
    if title == "A term":
        assert [int(row[0]) for row in rows] == list(range(1, total + 1))
        assert {row[1] for row in rows} == {path.name[:2] for path in LESSONS}
    else:
        assert sum(int(row[0]) for row in rows) == total
        assert f"{total} minutes" in section(title)


def test_its_links_resolve_in_the_repository_and_in_a_copy():
    there = course_files(teacher=True)
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(links) > len(LESSONS)
    for link in links:
        if not link.startswith("https://"):
            assert (HOME / link).exists(), link
            assert link in there, f"{link} is in no copy for teachers"


def test_its_commands_exist_and_its_code_is_python():
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.S)
    lines = [line for kind, text in blocks for line in text.splitlines() if kind == "bash"]
    lines += [
        line.lstrip("!") for _, text in blocks for line in text.splitlines() if line[:1] == "!"
    ]
    lines += re.findall(r"`(gpuml [a-z][^`]*)`", PAGE)
    commands = [line.partition("#")[0] for line in lines if line.startswith("gpuml ")]
    assert len(commands) > 4
    for command in commands:
        cli._parse(shlex.split(command)[1:])  # refuses an unknown option
    for kind, text in blocks:
        if kind == "python" and not text.startswith("%"):
            ast.parse(text)
    for script in re.findall(r"python (tests/\S+\.py)", PAGE):
        assert (HOME.parent / script).exists(), script
