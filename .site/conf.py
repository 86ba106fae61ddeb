"""How Sphinx makes the site out of the pages that build.py puts together."""

import inspect
import sys
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

import gpuml

project = "gpuml"
author = "The gpuml authors"
project_copyright = author
version = release = gpuml.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
root_doc = "index"

html_theme = "furo"
html_title = "gpuml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"

# The stored outputs are shown; nothing runs.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings say more
autosummary_generate = False
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Each reference must lead somewhere, those to other libraries excepted.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(numpy|zipfile|collections)(\..*)?")]


def to_mathml(self: Any, node: nodes.Element) -> None:
    """Write a formula as MathML: browsers draw it, without a script from elsewhere."""
    is_block = isinstance(node, nodes.math_block)
    text = node.astext().strip().replace(r"\dots", r"\ldots")  # which docutils knows
    if "\\\\" in text and "\\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    try:
        markup = latex2mathml.tex2mathml(text, as_block=is_block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", text, error, location=node)
        raise nodes.SkipNode from None
    tag = "div" if is_block else "span"
    self.body.append(f'<{tag} class="math">{markup}</{tag}>')
    raise nodes.SkipNode


def documented_name(module: str, target: str) -> tuple[str, Any]:
    """Return what a module calls `target`, and the name that it has on the site."""
    value = first_of(f"{module}.{target}", f"gpuml.{target}", target)
    name = getattr(value, "__qualname__", "")
    home = getattr(value, "__module__", "")
    top = name.partition(".")[0]  # a method's class
    if top in gpuml.__all__ and home == getattr(gpuml, top).__module__:
        return f"gpuml.{name}", value
    if inspect.ismodule(value):
        return value.__name__, value
    return f"{home}.{name}", value


def first_of(*names: str) -> Any:
    """Return the first thing that there is, of dotted names, or None."""
    for name in names:
        value: Any = sys.modules.get(name.partition(".")[0])
        for part in name.split(".")[1:]:
            value = getattr(value, part, None)
        if value is not None:
            return value
    return None


def look_up_names(app: Sphinx, doctree: nodes.document) -> None:
    """Link names as their modules mean them.

    Not linked are the words of a type that name no class, and what is in a module without a page.
    A name that does not exist is left to Sphinx, which complains.
    """
    folder, _, page = app.env.docname.rpartition("/")
    if folder != "reference":
        return
    for node in list(doctree.findall(addnodes.pending_xref)):
        if node.get("refdomain") != "py":
            continue
        if page == "index" and node["reftype"] != "obj":  # in a summary, out of its module
            node.replace_self(node.children)
            continue
        name, value = documented_name(f"gpuml.{page}", node["reftarget"])
        home = getattr(value, "__module__", None) or getattr(value, "__name__", "")
        has_page = f"reference/{home.removeprefix('gpuml.')}" in app.env.found_docs
        if node.get("refspecific") and not (inspect.isclass(value) and has_page):
            node.replace_self(node.children)
        elif has_page:
            node["refspecific"], node["reftarget"] = False, name
        elif home.startswith("gpuml"):
            node.replace_self(node.children)


def setup(app: Sphinx) -> None:
    """Tell Sphinx of the above."""
    app.add_html_math_renderer("mathml", (to_mathml, None), (to_mathml, None))
    app.connect("doctree-read", look_up_names)
