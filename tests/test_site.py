"""The site: all pages built without a warning, all links lead somewhere, no solution is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import gpuml

ROOT = Path(__file__).parent.parent
BUILD = ROOT / ".site" / "build.py"
NOTEBOOKS = ROOT / "notebooks"
SOURCES = [*sorted(NOTEBOOKS.glob("*.ipynb")), *sorted(NOTEBOOKS.glob("exercises/*.ipynb"))]
MISSING = [name for name in ("sphinx", "myst_nb", "furo") if find_spec(name) is None]


class Page(HTMLParser):
    """What a page links to, what can be linked to in it, and its references without a link."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loose: list[str] = []
        self.text: list[str] = []
        self._open_links = 0
        self._is_loose = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.anchors |= {attributes[name] for name in ("id", "name") if name in attributes}
        for name in ("href", "src", "poster", "data"):
            if name in attributes:
                self.links.append(attributes[name])
        self._open_links += tag == "a"
        classes = attributes.get("class", "").split()
        self._is_loose = tag == "code" and "xref" in classes and not self._open_links

    def handle_endtag(self, tag: str) -> None:
        self._open_links -= tag == "a"

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._is_loose:
            self.loose.append(data)
            self._is_loose = False


def broken_links(site: Path) -> list[str]:
    """Each link inside the site that leads nowhere, with its page."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            known = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if MISSING:  # `uv sync --group site` brings them
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    folder = (tmp_path_factory.mktemp("site") / "html").resolve()
    built = subprocess.run(
        [sys.executable, BUILD, folder], capture_output=True, text=True, encoding="utf-8"
    )
    assert (built.returncode, built.stderr) == (0, ""), built.stderr
    return folder


def test_each_notebook_has_a_page_with_its_figures(site):
    for path in SOURCES:
        page = Page((site / path.relative_to(ROOT)).with_suffix(".html"))
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        assert title in "".join(page.text)
        if path.parent == NOTEBOOKS:
            outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", ())]
            n_figures = sum("image/png" in output.get("data", {}) for output in outputs)
            assert sum(".png" in link for link in page.links) == n_figures


def test_no_page_shows_a_solution(site):
    for path in site.glob("notebooks/exercises/*.html"):
        text = "".join(Page(path).text)
        assert "YOUR CODE HERE" in text
        assert "SOLUTION" not in text
    assert "BEGIN SOLUTION" not in (site / "searchindex.js").read_text(encoding="utf-8")


def test_each_public_name_is_described(site):
    found = {anchor for path in site.glob("reference/*.html") for anchor in Page(path).anchors}
    public = {f"gpuml.{name}" for name in gpuml.__all__}
    assert public <= found, sorted(public - found)
    index = Page(site / "reference" / "index.html")
    linked = {urlsplit(link).fragment for link in index.links}
    assert public <= linked


def test_each_module_that_a_notebook_uses_is_described(site):
    used = set()
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r"from gpuml\.(\w+)", text))
        for names in re.findall(r"from gpuml import ([\w, ]+)", text):
            used |= {n for n in names.replace(",", " ").split() if find_spec(f"gpuml.{n}")}
    assert "plots" in used
    assert used <= {path.stem for path in site.glob("reference/*.html")} | {"fused"}


def test_each_link_leads_somewhere(site):
    assert len(list(site.rglob("*.html"))) > 40
    assert broken_links(site) == []


def test_each_reference_of_a_docstring_is_a_link(site):
    loose = {name for path in site.glob("reference/*.html") for name in Page(path).loose}
    assert {name for name in loose if not name.startswith(("numpy", "zipfile"))} == set()


def test_pages_need_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", path.read_text(encoding="utf-8")):
            assert not re.search(r"(src|href)=\"(https?:)?//", tag), f"{path.name}: {tag}"


def test_formulas_are_drawn_by_the_browser(site):
    text = (site / "notebooks" / "05_gradient_descent.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert "$$" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)


def test_an_overwritten_line_is_shown_as_it_ended(site):
    text = (site / "notebooks" / "06_training_a_model.html").read_text(encoding="utf-8")
    assert text.count("epoch 30/30: 100%") == 1
    assert "epoch 1/30" not in text


def test_the_search_for_broken_links_finds_them(tmp_path):
    (tmp_path / "a.html").write_text(
        "<p id='here'><a href='b.html#there'>1</a> <a href='#here'>2</a> <img src='none.png'>"
        "<a href='b.html#nowhere'>3</a> <a href='c.html'>4</a> <a href='https://x.org/#y'>5</a>"
        "<a href='#gone'>6</a>"
    )
    (tmp_path / "b.html").write_text("<h1 id='there'>b</h1>")
    broken = [line.partition(": ")[2] for line in broken_links(tmp_path.resolve())]
    assert broken == ["none.png", "b.html#nowhere", "c.html", "#gone"]


# --- what the pages are made of ----------------------------------------------------------------


@pytest.fixture(scope="module")
def build():
    spec = spec_from_file_location("build_site", BUILD)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["a\n", "b"], "a\nb"),
        (["\r 0%", "\r 50%", "\r100%", "\n"], "100%\n"),
        (["one\r\ntwo"], "one\ntwo"),
        (["x", "\rlonger\nnext"], "longer\nnext"),
    ],
)
def test_pieces_of_a_stream_are_joined(build, pieces, shown):
    picture = {"output_type": "display_data", "data": {}}
    outputs = [{"output_type": "stream", "name": "stdout", "text": [piece]} for piece in pieces]
    joined = build.with_finished_lines([*outputs, picture, picture])
    assert [output.get("text") for output in joined] == [shown, None, None]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see notebook 05.", "see [notebook 05](05_gradient_descent.ipynb)."),
        ("Notebook 05, *Gradient*", "[Notebook 05](05_gradient_descent.ipynb), *Gradient*"),
        ("notebook 06 is this one", "notebook 06 is this one"),
        ("notebook 99", "notebook 99"),
        ("`notebook 05`", "`notebook 05`"),
        ("[notebook 05](x.ipynb)", "[notebook 05](x.ipynb)"),
        ("```\nnotebook 05\n```", "```\nnotebook 05\n```"),
    ],
)
def test_mentions_of_notebooks_become_links(build, text, shown):
    assert build.with_links(text, NOTEBOOKS / "06_training_a_model.ipynb") == shown


# --- links in the sources, which people follow in JupyterLab and where the code is hosted -------


def texts(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def anchors(path: Path) -> set[str]:
    """The anchors of the headings: as JupyterLab makes them, or in other texts as code hosts do."""
    text = re.sub(r"```.*?```", "", texts(path), flags=re.DOTALL)
    titles = [line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")]
    if path.suffix == ".ipynb":
        return {title.replace(" ", "-") for title in titles}
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *NOTEBOOKS.glob("*.md")]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_links_of_the_sources_lead_somewhere(path):
    text = re.sub(r"```.*?```|`[^`\n]*`|\$[^$]*\$", "", texts(path), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
        assert target.exists(), link
        assert not parts.fragment or unquote(parts.fragment) in anchors(target), link
