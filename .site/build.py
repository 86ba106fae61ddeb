"""Build the course and the reference as static pages: python .site/build.py [FOLDER].

Their sources are put together in a temporary folder: the notebooks with their stored outputs, the
exercises without their solutions, README.md, and a page for each module. A warning is an error.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import gpuml
from gpuml.copies import students_copy

SITE = Path(__file__).resolve().parent
ROOT = SITE.parent
NOTEBOOKS = ROOT / "notebooks"

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
OTHER_NOTEBOOK = re.compile(r"(?<![`\[\w])([Nn]otebook (\d\d))\b(?![`\]])")
# Modules of which `gpuml` has no names, and that the notebooks import from.
FURTHER = ("distributed", "doctor", "kernels", "model_files", "operations", "peers", "rounding")
FURTHER += ("scaling", "workloads")


def main() -> int:
    """Build the site; return what Sphinx returns, 0 if there was nothing to complain about."""
    from sphinx.cmd.build import build_main

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", default="build/site", help="(build/site)")
    folder = Path(parser.parse_args().folder).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "gpuml"
        put_together(source)
        options = ["-W", "--keep-going", "--quiet", "--fresh-env", "--jobs", str(n_jobs())]
        built = build_main(
            [*options, f"--doctree-dir={temporary}/doctrees", str(source), str(folder)]
        )
    if built == 0:
        print(f"open {folder / 'index.html'}")
    return built


def n_jobs() -> int:
    """Return how many processes write pages."""
    return min(os.cpu_count() or 1, 4)


def put_together(source: Path) -> None:
    """Write all that the site is made of into a new folder, in the places of the repository."""
    shutil.copytree(SITE, source, ignore=shutil.ignore_patterns("build.py", "__pycache__"))
    pages = {path: notebook_page(path) for path in notebooks()}
    texts = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *NOTEBOOKS.glob("*.md")]
    pages |= {path: text_page(path) for path in texts}
    linked = {file for path in pages for file in linked_files(path)}
    for path in linked | set(pages):
        place = source / place_of(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pages[path].encode() if path in pages else path.read_bytes())
    (source / "reference").mkdir()
    for name in module_names():
        (source / "reference" / f"{name}.rst").write_text(module_page(name), encoding="utf-8")
    (source / "reference" / "index.rst").write_text(reference_page(), encoding="utf-8")


# --- notebooks ---------------------------------------------------------------------------------


def notebooks() -> list[Path]:
    """Return the notebooks of the course, and then the exercises."""
    return [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(NOTEBOOKS.glob("exercises/*.ipynb"))]


def notebook_page(path: Path) -> str:
    """Return a notebook as the site shows it."""
    content = path.read_bytes()
    is_exercise = path.parent.name == "exercises"
    notebook = json.loads(students_copy(content) if is_exercise else content)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), path)
        else:
            cell["outputs"] = with_finished_lines(cell["outputs"])
    last, exercises = notebook["cells"][-1], NOTEBOOKS / "exercises" / path.name
    if not is_exercise and exercises.is_file() and last["cell_type"] == "markdown":
        last["source"] += f"\n\n[Exercises with checks](exercises/{path.name})"
    return json.dumps(notebook)


def with_links(text: str, path: Path) -> str:
    """Make links of the words "notebook 05" in a text of the notebook at `path`."""
    pages = {other.name[:2]: other for other in NOTEBOOKS.glob("*.ipynb")}

    def link(match: re.Match[str]) -> str:
        page = pages.get(match[2])
        if page in (None, path):
            return match[0]
        return f"[{match[1]}]({os.path.relpath(page, path.parent)})"

    pieces = re.split(r"(```.*?```|`[^`]*`|\[[^\]]*\]\([^)]*\))", text, flags=re.DOTALL)
    pieces[::2] = [OTHER_NOTEBOOK.sub(link, piece) for piece in pieces[::2]]
    return "".join(pieces)


def with_finished_lines(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""Join the pieces of each stream; of a line that was overwritten (``\r``), keep the end."""
    joined = []
    for name, group in groupby(outputs, key=lambda output: output.get("name")):
        if name is None:
            joined += group
            continue
        text = "".join("".join(output["text"]) for output in group)
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        joined.append({"output_type": "stream", "name": name, "text": "\n".join(lines)})
    return joined


# --- texts -------------------------------------------------------------------------------------


def text_page(path: Path) -> str:
    """Return README.md or another text as the site shows it: a link to a folder opens a page."""

    def link(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        if target.is_dir():
            target = next(iter(sorted(target.glob("*.ipynb"))), target)
        return os.path.relpath(place_of(target), place_of(path).parent) + (match[2] or "")

    return LINK.sub(link, path.read_text(encoding="utf-8"))


def place_of(path: Path) -> Path:
    """Return where the site has a file: as in the repository, but in no folder with a dot."""
    parts = path.relative_to(ROOT).parts
    return Path(*(part for part in parts if part == parts[-1] or not part.startswith(".")))


def linked_files(path: Path) -> Iterator[Path]:
    """Yield the files of the repository that a page links to."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for target, _ in LINK.findall(text):
        file = (path.parent / target).resolve()
        if file.is_file() and file.is_relative_to(ROOT):
            yield file


# --- reference ---------------------------------------------------------------------------------


def module_names() -> list[str]:
    """Return the names of the modules that have a page."""
    return sorted({*gpuml._MODULES, *FURTHER})


def own_names(name: str) -> list[str]:
    """Return what a module defines beyond the names that `gpuml` has of it."""
    module = import_module(f"gpuml.{name}")
    return [
        own
        for own, value in vars(module).items()
        if not own.startswith("_")
        and own not in public_names(name)
        and callable(value)  # a cached function is no function to inspect.isfunction
        and getattr(value, "__module__", None) == module.__name__
    ]


def public_names(name: str) -> tuple[str, ...]:
    """Return the names that `gpuml` itself has of a module."""
    return tuple(n for n in gpuml.__all__ if gpuml._HOMES[n] == name)


def module_page(name: str) -> str:
    """Return the page of a module: its public names as `gpuml.…`, and then the others."""
    title = f"gpuml.{name}"
    lines = [title, "=" * len(title), "", f".. automodule:: {title}", ""]
    lines += _documented("gpuml", public_names(name))
    others = own_names(name)
    if others and public_names(name):
        lines += ["Inside the module", "-----------------", ""]
    lines += _documented(title, others)
    return "\n".join(lines)


def _documented(module: str, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        value = getattr(import_module(module), name)
        kind = "function"
        if inspect.isclass(value):
            kind = "exception" if issubclass(value, BaseException) else "class"
        elif not callable(value):
            kind = "data"
        yield f".. auto{kind}:: {module}.{name}"
        if kind in ("class", "exception"):
            yield "   :members:"
            yield "   :show-inheritance:" if value.__bases__ != (object,) else ""
        yield ""


def reference_page() -> str:
    """Return the table of what there is, by modules."""
    lines = ["Reference", "=========", "", "What ``import gpuml`` offers, by the module it is in."]
    for name in module_names():
        if name not in FURTHER:
            lines += _table(
                name, public_names(name) or [f"{name}.{own}" for own in own_names(name)]
            )
    lines += ["", "More for the notebooks", "----------------------", ""]
    for name in FURTHER:
        lines += [f":doc:`gpuml.{name} <{name}>`", f"   {_about(name)}", ""]
    lines += [".. toctree::", "   :hidden:", "", *(f"   {name}" for name in module_names())]
    return "\n".join(lines) + "\n"


def _table(name: str, names: Sequence[str]) -> Iterator[str]:
    title = f":doc:`gpuml.{name} <{name}>`"
    yield from ("", title, "-" * len(title), "", _about(name), "")
    yield from (".. currentmodule:: gpuml", "", ".. autosummary::", "")
    yield from (f"   {name}" for name in names)


def _about(name: str) -> str:
    return (import_module(f"gpuml.{name}").__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
