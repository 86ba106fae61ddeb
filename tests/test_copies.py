"""The course, put into folders of people: what is written, what is kept, what is stripped."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gpuml
from gpuml import cli, copies
from gpuml.copies import copy_course, course_files, course_home, students_copy, without_solutions
from gpuml.errors import DataError

HOME = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted((HOME / "exercises").glob("*.ipynb"))
LESSON, EXERCISE = "05_gradient_descent.ipynb", "exercises/05_gradient_descent.ipynb"


def call(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() for name, path in files.items() if path.is_file()}


def notebook(*sources: str, **metadata) -> str:
    cells = [
        {
            "cell_type": "code",
            "metadata": metadata,
            "source": source.splitlines(keepends=True),
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["right\n"]}],
            "execution_count": 3,
        }
        for source in sources
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("x = 1", "x = 1"),
        ("", ""),
        ("### BEGIN SOLUTION\nx\n### END SOLUTION", copies.STUB),
        ("a\n### BEGIN SOLUTION\nx\n### END SOLUTION\nb\n", f"a\n{copies.STUB}\nb\n"),
        (
            "for i in x:\n\t### BEGIN SOLUTION\n\tx\n\t### END SOLUTION",
            "for i in x:\n\t# YOUR CODE HERE\n\traise NotImplementedError()",
        ),
        (
            "### BEGIN SOLUTION\nx\n### END SOLUTION\n\n### BEGIN SOLUTION\ny\n### END SOLUTION",
            f"{copies.STUB}\n\n{copies.STUB}",
        ),
    ],
)
def test_solutions_are_replaced_and_nothing_else(text, left):
    assert without_solutions(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "### BEGIN SOLUTION\nx",
        "x\n### END SOLUTION",
        "### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION",
        "### BEGIN SOLUTION\n### END SOLUTION\n### END SOLUTION",
    ],
)
def test_solutions_without_beginning_or_end_are_refused(text):
    with pytest.raises(ValueError, match="solution"):
        without_solutions(text)


def test_a_cell_that_is_all_solution_becomes_the_stub():
    source = notebook("return 1", nbgrader={"solution": True})
    [cell] = json.loads(students_copy(source))["cells"]
    assert "".join(cell["source"]) == copies.STUB
    [cell] = json.loads(students_copy(notebook("1 + 1")))["cells"]
    assert cell["source"] == ["1 + 1"]
    assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_students_get_everything_but_the_solutions(path):
    source, copied = json.loads(path.read_bytes()), json.loads(students_copy(path.read_bytes()))
    assert copied["metadata"] == source["metadata"]
    assert [cell["id"] for cell in copied["cells"]] == [cell["id"] for cell in source["cells"]]
    n_stubs = 0
    for before, after in zip(source["cells"], copied["cells"], strict=True):
        assert after["metadata"] == before["metadata"]
        text = "".join(after["source"])
        assert "SOLUTION" not in text
        if before["metadata"].get("nbgrader", {}).get("solution"):
            n_stubs += 1
            whole = "".join(before["source"])
            assert text.startswith(whole.partition("    ### BEGIN SOLUTION\n")[0])
            assert text.count("    # YOUR CODE HERE\n    raise NotImplementedError()") == 1
        else:
            assert after["source"] == before["source"]
    assert n_stubs >= 2
    assert "HIDDEN TESTS" not in path.read_text(encoding="utf-8")


def test_all_of_the_course_is_copied(tmp_path, capsys):
    folder = tmp_path / "deep" / "course"
    code, out, err = call(capsys, "notebooks", folder)
    assert (code, err) == (0, "")
    assert f"next: gpuml lab {folder}" in out
    there = contents(folder)
    lessons = {path.name: path.read_bytes() for path in HOME.glob("*.ipynb")}
    wanted = lessons | {f"exercises/{p.name}": students_copy(p.read_bytes()) for p in SOURCES}
    assert there.pop(copies.KEPT_SUMS)
    assert there == wanted
    assert f"{len(wanted)} files written, 0 there already; exercises without solutions" in out


def test_teachers_get_the_solutions(tmp_path):
    copy_course(tmp_path, teacher=True)
    assert (tmp_path / EXERCISE).read_bytes() == (HOME / EXERCISE).read_bytes()
    assert (tmp_path / "README.md").read_bytes() == (HOME / "README.md").read_bytes()
    # and back, since nobody has changed anything
    copied = copy_course(tmp_path)
    assert sorted(copied.written) == [f"exercises/{path.name}" for path in SOURCES]
    assert b"BEGIN SOLUTION" not in (tmp_path / EXERCISE).read_bytes()


def test_students_get_no_teachers_page_and_no_file_of_that_name_is_lost(tmp_path):
    copy_course(tmp_path)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("mine")
    assert copy_course(tmp_path, teacher=True).kept == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_the_reader_has_changed_is_kept(tmp_path, capsys):
    copy_course(tmp_path)
    (tmp_path / LESSON).write_text("mine")
    (tmp_path / EXERCISE).unlink()
    (tmp_path / "notes.txt").write_text("mine, too")
    code, out, err = call(capsys, "notebooks", tmp_path, "--teacher")
    assert (code, err) == (0, "")
    assert "kept, since you have changed them (--overwrite replaces them):" in out
    assert out.splitlines()[2] == f"  {LESSON}"
    assert (tmp_path / LESSON).read_text() == "mine"
    assert b"BEGIN SOLUTION" in (tmp_path / EXERCISE).read_bytes()
    code, out, _ = call(capsys, "notebooks", tmp_path, "--overwrite")
    assert "kept" not in out
    assert (tmp_path / LESSON).read_bytes() == (HOME / LESSON).read_bytes()
    assert (tmp_path / "notes.txt").read_text() == "mine, too"


def test_a_file_that_was_there_before_is_kept(tmp_path):
    (tmp_path / LESSON).write_text("somebody's own")
    for _ in range(2):
        assert copy_course(tmp_path).kept == [LESSON]
    assert (tmp_path / LESSON).read_text() == "somebody's own"


def test_an_older_copy_that_nobody_changed_is_renewed(tmp_path, monkeypatch):
    older = {**course_files(), LESSON: b"of an older version"}
    with monkeypatch.context() as patched:
        patched.setattr(copies, "course_files", lambda teacher: older)
        copy_course(tmp_path)
    assert copy_course(tmp_path).written == [LESSON]
    assert (tmp_path / LESSON).read_bytes() == (HOME / LESSON).read_bytes()


@pytest.mark.parametrize("sums", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe", b"[" * 5000])
def test_without_sums_that_can_be_read_everything_changed_is_kept(tmp_path, sums):
    copy_course(tmp_path)
    (tmp_path / LESSON).write_text("mine")
    (tmp_path / copies.KEPT_SUMS).write_bytes(sums)
    copied = copy_course(tmp_path)
    assert (copied.kept, copied.written) == ([LESSON], [])
    assert len(json.loads((tmp_path / copies.KEPT_SUMS).read_text())) == len(copied.unchanged)


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "course"
    folder.mkdir()
    try:
        (folder / LESSON).symlink_to(precious)
    except OSError:
        pytest.skip("no symbolic links here")
    assert copy_course(folder).kept == [LESSON]
    copy_course(folder, overwrite=True)
    assert precious.read_text() == "precious"
    assert not (folder / LESSON).is_symlink()


@pytest.mark.parametrize("command", ["notebooks", "lab"])
def test_a_folder_that_is_a_file(tmp_path, capsys, command):
    file = tmp_path / "file"
    file.write_text("x")
    code, out, err = call(capsys, command, file)
    assert (code, out) == (2, "")
    assert err == f"gpuml: {file} is a file, expected a folder\n"
    assert call(capsys, command, file / "deep" / "below") == (2, "", err)
    assert file.read_text() == "x"
    (tmp_path / "exercises").write_text("mine")
    _, _, err = call(capsys, command, tmp_path)
    assert err == f"gpuml: {tmp_path / 'exercises'} is a file, expected a folder\n"
    assert len(list(tmp_path.iterdir())) == 2
    assert call(capsys, command, "") == (2, "", "gpuml: expected a folder, got an empty name\n")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        copy_course(file)


def test_a_folder_where_a_notebook_belongs(tmp_path, capsys):
    (tmp_path / LESSON).mkdir()
    code, _, err = call(capsys, "notebooks", tmp_path)
    assert code == 1
    assert "it is not a file" in err


def test_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    code, _, err = call(capsys, "notebooks", folder)
    assert code == 1
    assert err.count("\n") == 1
    assert f"the folder {folder} is read-only for you" in err
    assert list(folder.iterdir()) == []


def test_a_full_disk_leaves_whole_files_only(tmp_path, capsys, monkeypatch):
    usual = Path.write_bytes
    n_written = []

    def write(path, content):
        if len(n_written) == 5:
            usual(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        n_written.append(path)
        return usual(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    code, _, err = call(capsys, "notebooks", tmp_path)
    assert code == 1
    assert "No space left on device" in err
    monkeypatch.undo()
    there, wanted = contents(tmp_path), course_files()
    assert len(json.loads(there.pop(copies.KEPT_SUMS))) == 5
    assert len(there) == 5
    assert all(content == wanted[name] for name, content in there.items())
    assert len(copy_course(tmp_path).written) == len(wanted) - 5  # it is finished later


def test_ctrl_c_leaves_whole_files_only(tmp_path, capsys, monkeypatch):
    usual = Path.write_bytes

    def write(path, content):
        if len(list(tmp_path.glob("[0-9]*"))) == 3:
            usual(path, content[:100])
            raise KeyboardInterrupt
        return usual(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write)
        code, out, err = call(capsys, "notebooks", tmp_path)
    assert (code, out) == (130, "")
    assert err.startswith("gpuml: stopped by Ctrl-C: what is written is whole")
    there, wanted = contents(tmp_path), course_files()
    assert len(json.loads(there.pop(copies.KEPT_SUMS))) == 3
    assert len(there) == 3
    assert all(content == wanted[name] for name, content in there.items())
    assert len(copy_course(tmp_path).written) == len(wanted) - 3


def test_an_installation_without_notebooks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(copies, "__file__", str(tmp_path / "gpuml" / "copies.py"))
    with pytest.raises(DataError, match="has no notebooks"):
        course_home()
    code, _, err = call(capsys, "notebooks", tmp_path / "course")
    assert code == 1
    assert "has no notebooks" in err
    assert not (tmp_path / "course").exists()


def test_the_notebooks_of_the_installed_package_come_first(tmp_path, monkeypatch):
    for home in (tmp_path / "notebooks", tmp_path / "gpuml" / "notebooks"):
        home.mkdir(parents=True)
        (home / "00_start_here.ipynb").write_text("{}")
    monkeypatch.setattr(copies, "__file__", str(tmp_path / "gpuml" / "copies.py"))
    assert course_home() == tmp_path / "gpuml" / "notebooks"
    assert course_files() == {"00_start_here.ipynb": b"{}"}


@pytest.mark.parametrize("place", ["", "exercises", "new", "link"])
def test_the_course_itself_is_no_folder_for_a_copy(tmp_path, capsys, monkeypatch, place):
    home = tmp_path / "home"
    copy_course(home, teacher=True)
    monkeypatch.setattr(copies, "course_home", lambda: home)
    (tmp_path / "link").symlink_to(home)
    before = contents(home)
    target = tmp_path / "link" if place == "link" else home / place
    for options in ([], ["--teacher"], ["--overwrite"]):
        code, out, err = call(capsys, "notebooks", target, *options)
        assert (code, out) == (1, "")
        assert "this is where the course is kept: name another folder" in err
    assert contents(home) == before
    copy_course(tmp_path)  # around it is fine


def test_a_link_to_nowhere(tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    code, _, err = call(capsys, "notebooks", tmp_path / "link")
    assert (code, err) == (
        2,
        f"gpuml: {tmp_path / 'link'} is a link to nowhere, expected a folder\n",
    )


def test_a_whole_copy_that_cannot_be_written_can_be_used(tmp_path, capsys, monkeypatch):
    copy_course(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    code, out, err = call(capsys, "notebooks", tmp_path)
    assert (code, err) == (0, "")
    assert "0 files written" in out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
def test_who_stops_the_lab_stops_jupyterlab(tmp_path, number, code):
    (tmp_path / "jupyterlab.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(1))\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    paths = [str(tmp_path), str(Path(gpuml.__file__).parent.parent)]
    with subprocess.Popen(
        [sys.executable, "-m", "gpuml", "lab", str(tmp_path / "course")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as lab:
        assert any(line == "up\n" for line in lab.stdout)
        if number == signal.SIGINT:
            os.killpg(lab.pid, number)  # as a terminal does
        else:
            lab.send_signal(number)
        assert lab.wait(20) == code
        assert lab.stdout.read() == ""  # which ends once JupyterLab has ended, too


def test_the_lab_opens_in_the_folder(tmp_path):
    (tmp_path / "jupyterlab.py").write_text(
        "import os, sys\nprint('lab in', os.getcwd(), *sys.argv[1:])\nsys.exit(len(sys.argv) - 3)"
    )
    paths = [str(tmp_path), str(Path(gpuml.__file__).parent.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    folder = tmp_path / "my course"

    def lab(*options):
        command = [sys.executable, "-m", "gpuml", "lab", str(folder), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = lab("--", "--no-browser", "--port=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"lab in {folder} --no-browser --port=1"
    assert (folder / LESSON).exists()
    assert lab("--", "--no-browser", "--port=1", "--", "x").returncode == 1
    assert "lab in" not in lab("--no-browser").stdout


def test_a_lab_without_jupyterlab(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    code, _, err = call(capsys, "lab", "--", "--no-browser")
    assert (code, err) == (1, "gpuml: JupyterLab is not installed: pip install 'gpuml[lab]'\n")
    assert list(tmp_path.iterdir()) == []
