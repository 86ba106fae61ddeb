"""Copies of the course for people: notebooks, exercises with and without their solutions."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuml.errors import DataError
from gpuml.model_files import file_sha256, replacing
from gpuml.plain_files import parse_json

STUB = "# YOUR CODE HERE\nraise NotImplementedError()"  # what nbgrader writes for Python
TEACHERS_PAGE = "README.md"
KEPT_SUMS = ".gpuml.json"  # in the folder: the SHA-256 of each file as it was written
MOST_SUMS = 2**20  # bytes


@dataclass
class Copied:
    """What became of each file of the course, by its name in the folder.

    Attributes
    ----------
    written : list of str
        Files that were not there, or were an older copy that nobody had changed.
    unchanged : list of str
        Files that were there already.
    kept : list of str
        Files that the reader has changed, and that were left as they are.
    """

    written: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def copy_course(
    folder: str | os.PathLike[str], *, teacher: bool = False, overwrite: bool = False
) -> Copied:
    """Put the notebooks and the exercises into a folder; for teachers, their page as well.

    A file that is in the way is left alone, unless it is as this function wrote it.

    Parameters
    ----------
    folder : path
        Made if it does not exist.
    teacher : bool
        Whether the exercises keep their solutions, and the teacher's page is there.
    overwrite : bool
        Whether files that the reader has changed are replaced, too.

    Returns
    -------
    Copied

    Raises
    ------
    OSError
        If the folder is a file, cannot be written, or the disk is full.
    DataError
        If this installation has no notebooks, or the folder is the one where it has them.
    """
    if not os.fspath(folder):  # it would mean where we are
        raise NotADirectoryError("expected a folder, got an empty name")
    target = Path(folder)
    for path in (target / "exercises", target, *target.parents):
        if path.is_symlink() and not path.exists():
            raise NotADirectoryError(f"{path} is a link to nowhere, expected a folder")
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file, expected a folder")
    if target.resolve().is_relative_to(course_home().resolve()):
        raise DataError("this is where the course is kept: name another folder for the copy")
    files = course_files(teacher=teacher)
    known, copied = _read_sums(target), Copied()
    sums = known.copy()
    try:
        for name, content in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            wanted = hashlib.sha256(content).hexdigest()
            there = file_sha256(path) if path.is_file() else None
            if there == wanted:
                copied.unchanged.append(name)
            elif there is None or overwrite or sums.get(name) == there:
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
                copied.written.append(name)
            else:
                copied.kept.append(name)
                continue
            sums[name] = wanted
    finally:  # also of the part that was written before the disk was full, or before Ctrl-C
        if sums != known:
            _write_sums(target, sums)
    return copied


def course_files(*, teacher: bool = False) -> dict[str, bytes]:
    """Return the files of the course, by their names in a folder.

    Parameters
    ----------
    teacher : bool
        Whether the exercises keep their solutions, and the teacher's page is there.

    Raises
    ------
    DataError
        If this installation has no notebooks.
    """
    home = course_home()
    paths = [*sorted(home.glob("[0-9][0-9]_*.ipynb")), *sorted(home.glob("exercises/*.ipynb"))]
    paths += [home / TEACHERS_PAGE] if teacher else []
    files = {}
    for path in paths:
        content, name = path.read_bytes(), path.relative_to(home).as_posix()
        is_exercise = name.startswith("exercises/")
        files[name] = students_copy(content) if is_exercise and not teacher else content
    return files


def course_home() -> Path:
    """Return the folder of notebooks: of the installed package, or of the repository.

    Raises
    ------
    DataError
        If there is neither.
    """
    package = Path(__file__).parent
    for home in (package / "notebooks", package.parent / "notebooks"):
        if (home / "00_start_here.ipynb").is_file():
            return home
    raise DataError("this installation of gpuml has no notebooks: install it again")


def students_copy(source: str | bytes) -> bytes:
    r"""Return a notebook of exercises without the solutions, and without outputs.

    The lines from ``### BEGIN SOLUTION`` to ``### END SOLUTION`` become the stub that nbgrader
    puts there, and nothing else of the text changes.

    Parameters
    ----------
    source : str or bytes
        The notebook with solutions, as it is in its file.

    Raises
    ------
    ValueError
        If a solution has a beginning and no end, or the other way round.
    """
    notebook = copy.deepcopy(parse_json(source))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            continue
        text = "".join(cell["source"])
        left = without_solutions(text)
        if left == text and cell["metadata"].get("nbgrader", {}).get("solution"):
            left = STUB  # all of the cell is the solution
        lines = left.splitlines(keepends=True)
        cell |= {"source": lines, "outputs": [], "execution_count": None}
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def without_solutions(text: str) -> str:
    r"""Replace the solutions in the text of a cell by stubs.

    Examples
    --------
    >>> text = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    >>> print(without_solutions(text))
    def f():
        # YOUR CODE HERE
        raise NotImplementedError()
    """
    kept: list[str] = []
    inside = False
    for line in text.split("\n"):
        begins, ends = "BEGIN SOLUTION" in line, "END SOLUTION" in line
        if begins == inside and (begins or ends):
            raise ValueError(f"solutions must begin and end in turn: {line.strip()}")
        if begins:
            indent = re.match(r"\s*", line)[0]  # type: ignore[index]
            kept += [indent + stub for stub in STUB.split("\n")]
        elif not inside and not ends:
            kept.append(line)
        inside = begins or (inside and not ends)
    if inside:
        raise ValueError("a solution begins and does not end")
    return "\n".join(kept)


def _read_sums(folder: Path) -> dict[str, str]:
    """Return what was written here before; nothing, if nobody can read it any more."""
    try:
        with (folder / KEPT_SUMS).open("rb") as file:
            sums: Any = parse_json(file.read(MOST_SUMS))
    except (OSError, ValueError):
        return {}
    if not isinstance(sums, dict):
        return {}
    return {name: text for name, text in sums.items() if isinstance(text, str)}


def _write_sums(folder: Path, sums: dict[str, str]) -> None:
    with replacing(folder / KEPT_SUMS) as temporary:
        temporary.write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n", encoding="utf-8")
