"""The house rules: imports point down, notebooks are clean, the ways to install agree."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import gpuml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gpuml"
NOTEBOOKS = sorted(
    path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)

FLOORS = [
    {"errors", "devices", "kernels", "memory_maps", "blocking", "gpu_layers", "distributed"}
    | {"nccl", "peer_copies", "plain_files", "progress", "watcher"},
    {"matmul", "losses", "datasets", "model_files", "plots", "timing", "staging", "journal"}
    | {"sharing"}
    | {"metrics", "schedules", "operations", "rounding", "noise"},
    {"models", "optimizers", "batches", "history", "blocked"}
    | {"gradients", "regression", "checkpoints", "buckets", "faults"},
    {"cpu_populations", "population_runs", "populations", "searches"}
    | {"cpu_layers", "one_pass", "fused", "fused_populations", "steps", "training"}
    | {"robustness", "privacy"},
    {"doctor", "recordings", "rivals", "workloads", "peers", "scaling", "cli", "__main__"}
    | {"exercises", "copies"},
]
# On one floor, a module may use those to its left.
NEIGHBOURS = [("errors", "devices"), ("devices", "kernels"), ("errors", "kernels")]
NEIGHBOURS += [
    ("errors", "memory_maps"),
    ("devices", "memory_maps"),
    ("devices", "gpu_layers"),
    ("kernels", "gpu_layers"),
]
NEIGHBOURS += [("errors", "plain_files"), ("devices", "plain_files")]
NEIGHBOURS += [("errors", "nccl"), ("devices", "nccl"), ("models", "buckets")]
NEIGHBOURS += [(name, "distributed") for name in ("errors", "devices", "nccl")]
NEIGHBOURS += [("devices", "peer_copies"), ("peer_copies", "distributed")]
NEIGHBOURS += [("model_files", "timing"), ("plots", "timing"), ("models", "optimizers")]
NEIGHBOURS += [("one_pass", "steps"), ("fused", "steps"), ("fused", "training")]
NEIGHBOURS += [("steps", "training"), ("fused", "fused_populations")]
NEIGHBOURS += [("fused_populations", "population_runs")]
NEIGHBOURS += [("cpu_layers", "cpu_populations"), ("cpu_layers", "steps")]
NEIGHBOURS += [("cpu_populations", "steps")]
NEIGHBOURS += [("steps", "population_runs"), ("training", "population_runs")]
NEIGHBOURS += [("training", "populations"), ("population_runs", "populations")]
NEIGHBOURS += [(name, "searches") for name in ("training", "population_runs", "populations")]
NEIGHBOURS += [(used, name) for used in ("steps", "training") for name in ("robustness", "privacy")]
NEIGHBOURS += [("models", "gradients"), ("models", "regression")]
NEIGHBOURS += [("models", "faults"), ("batches", "faults")]
NEIGHBOURS += [("doctor", "cli"), ("recordings", "cli"), ("cli", "__main__")]
NEIGHBOURS += [("rivals", "workloads"), ("rivals", "peers"), ("workloads", "peers")]
NEIGHBOURS += [("workloads", "cli"), ("peers", "cli")]
NEIGHBOURS += [("workloads", "scaling"), ("scaling", "cli")]
NEIGHBOURS += [("copies", "cli")]
NEIGHBOURS += [("exercises", "exercises")]  # a package of its own
HEAVY = {"cupy", "cupyx", "dp_accounting", "matplotlib", "mpi4py", "numba"} | {
    "jax",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "tqdm",
}


def imports(tree: ast.AST) -> set[str]:
    """All modules that a piece of code names in import statements."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names |= {f"{module}.{a.name}" for a in node.names} if module == "gpuml" else {module}
    return names


MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return path.parent.name if path.parent != PACKAGE else path.stem


def shown_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=shown_name)
def test_imports_point_down(path):
    name = module_name(path)
    if name == "__init__":
        return  # lists the public names of all floors, loaded at first use
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert name in floor, f"say in FLOORS where {name} belongs"
    for module in imports(ast.parse(path.read_text())):
        if not module.startswith("gpuml."):
            continue
        used = module.split(".")[1]
        if used == "__version__":
            continue
        down = floor[used] < floor[name] or (used, name) in NEIGHBOURS
        assert down, f"{name} (floor {floor[name]}) imports {used} (floor {floor[used]})"


@pytest.mark.parametrize("path", MODULES, ids=shown_name)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text())
    top = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert not {name.split(".")[0] for name in imports(top)} & HEAVY


# Modules that read code from files, or run what a text says; and calls that do.
RUNS_CODE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS_CODE |= {"yaml", "runpy", "imp", "code", "codeop", "jsonpickle", "numexpr"}
RUNNING_CALLS = {"eval", "exec", "compile", "__import__"}
TAKES_PICKLE = {"load", "save", "read_array", "write_array"}
# NumPy's other readers: `fromfile` and `memmap` take a type from the caller and cannot run code.
LIBRARIES = {"np", "numpy", "xp", "cp", "cupy", "torch", "jnp", "format"}


def ways_to_run_code(text: str) -> list[str]:
    """What in a piece of Python could have a file, or a text, run as a program."""
    found = []
    tree = ast.parse(text)
    found += [name for name in imports(tree) if name.split(".")[0] in RUNS_CODE]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in RUNS_CODE:
            found.append(f"the text '{node.value}'")  # as for import_module
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        unknown = None in keywords and "allow_pickle" in call  # ** could overrule it
        if keywords.get("allow_pickle", "False") != "False" or unknown:
            found.append(call)
        if isinstance(node.func, ast.Name):
            names = {node.func.id}
            if names & RUNNING_CALLS:
                found.append(call)
        if isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).split(".")[-1]
            of_arrays = node.func.attr in TAKES_PICKLE and owner in LIBRARIES
            if of_arrays and keywords.get("allow_pickle") != "False":
                found.append(call)
            if node.func.attr in ("literal_eval", "exec_module", "load_module"):
                found.append(call)
    # np.load under another name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpy":
            found += [a.name for a in node.names if a.name in TAKES_PICKLE]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_from_a_file_can_run(path):
    assert ways_to_run_code(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "n_ways"),
    [
        ("np.load(path, allow_pickle=False)", 0),
        ("np.savez(path, **arrays)", 0),
        ("json.load(file)", 0),
        ("np.load(path)", 1),
        ("numpy.load(Path(a, b(c)), mmap_mode='r')", 1),
        ("np.load(path, allow_pickle=trusted)", 2),
        ("np.lib.format.read_array(file)", 1),
        ("np.save(path, array)", 1),
        ("torch.load(path)", 1),
        ("from numpy import load", 1),
        ("import pickle", 1),
        ("from joblib import load", 1),
        ("def f():\n    import marshal", 1),
        ("import_module('pickle')", 1),
        ("eval(text)", 1),
        ("exec(compile(text, name, 'exec'))", 2),
        ("ast.literal_eval(text)", 1),
        ("np.load(path, **options, allow_pickle=False)", 1),
    ],
)
def test_the_search_for_ways_to_run_code_finds_them(text, n_ways):
    assert len(ways_to_run_code(text)) == n_ways


def test_the_top_level_is_as_its_owner_wants_it():
    wanted = {"README.md", "pyproject.toml", "notebooks", "gpuml", "tests", "environment.yml"}
    assert wanted <= {path.name for path in ROOT.iterdir()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = {line.partition("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} <= wanted | {"LICENSE"}


# --- notebooks ---------------------------------------------------------------------------------


def cells(path: Path, kind: str) -> list[dict]:
    every = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in every if cell["cell_type"] == kind and "".join(cell["source"]).strip()]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def faults(notebook: dict) -> list[str]:
    """What is wrong with a notebook, a line each."""
    found = []
    first = notebook["cells"][0] if notebook["cells"] else {"cell_type": "", "source": []}
    if first["cell_type"] != "markdown" or not "".join(first["source"]).startswith("# "):
        found.append("the first cell is no title")
    code = [
        c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()
    ]
    for cell in code:
        source = "".join(cell["source"])
        name = source.splitlines()[0]
        if cell["execution_count"] is None:
            found.append(f"never executed: {name}")
        if len(source.splitlines()) > 20:
            found.append(f"over 20 lines: {name}")
        for output in cell["outputs"]:
            if output["output_type"] == "error" and "raises-exception" not in tags(cell):
                found.append(f"a stored error: {name}")
        shown = json.dumps(cell["outputs"]) + source
        if re.search(r"(?<![\w.:/])/(home|Users|root|tmp|work|usr|opt|mnt)/", shown):
            found.append(f"an absolute path: {name}")
        if re.search(r"[A-Za-z]:\\\\?Users", shown):
            found.append(f"an absolute path: {name}")
    free = [c for c in code if {"nbval-ignore-output", "nbval-skip"} & set(tags(c))]
    if len(free) > len(code) / 3:
        found.append(f"{len(free)} of {len(code)} code cells are excused from comparison")
    counts = [cell["execution_count"] for cell in code]
    if None not in counts and counts != list(range(1, len(counts) + 1)):
        found.append(f"not executed from top to bottom: {counts}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean(path):
    assert faults(json.loads(path.read_text(encoding="utf-8"))) == []


def test_there_are_notebooks():
    assert ROOT / "notebooks" / "00_start_here.ipynb" in NOTEBOOKS


def code_cell(source: str, **changes) -> dict:
    return {
        "cell_type": "code",
        "source": source.splitlines(keepends=True),
        "metadata": {},
        "execution_count": 1,
        "outputs": [],
    } | changes


TITLE = {"cell_type": "markdown", "source": ["# A title\n"], "metadata": {}}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}


@pytest.mark.parametrize(
    ("notebook", "fault"),
    [
        ([TITLE, code_cell("1")], None),
        ([TITLE, code_cell("1"), code_cell("")], None),
        ([code_cell("1")], "no title"),
        ([TITLE, code_cell("1", execution_count=None)], "never executed"),
        ([TITLE, code_cell("x\n" * 21)], "over 20 lines"),
        ([TITLE, code_cell("1", outputs=[ERROR])], "a stored error"),
        (
            [TITLE, code_cell("1", outputs=[ERROR], metadata={"tags": ["raises-exception"]})],
            None,
        ),
        ([TITLE, code_cell("open('/home/me/x')")], "an absolute path"),
        (
            [TITLE, code_cell("x", outputs=[{"output_type": "stream", "text": ["in /tmp/a.py"]}])],
            "an absolute path",
        ),
        ([TITLE, code_cell("1", metadata={"tags": ["nbval-ignore-output"]})], "excused"),
        ([TITLE, code_cell("1", execution_count=2)], "top to bottom"),
    ],
)
def test_the_check_of_notebooks_finds_faults(notebook, fault):
    found = faults({"cells": notebook})
    assert (found == []) if fault is None else (fault in " ".join(found))


# --- the ways to install -----------------------------------------------------------------------


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def development() -> list[str]:
    """All that the group `dev` asks for, the groups in it included."""
    groups = project()["dependency-groups"]
    own = [entry for entry in groups["dev"] if isinstance(entry, str)]
    included = [entry["include-group"] for entry in groups["dev"] if isinstance(entry, dict)]
    return own + [text for name in included for text in groups[name]]


def bounds(requirements: list[str]) -> dict[str, str]:
    parsed = [Requirement(text) for text in requirements]
    return {r.name: str(r.specifier) for r in parsed}


def test_the_conda_environment_asks_for_what_the_project_does():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "gpuml"
    assert environment["channels"] == ["conda-forge"]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [by_pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert by_pip == ["-e ."]
    given = bounds(plain)
    assert {"jupyterlab", "cupy", "numpy", "nbval", "matplotlib", "pip"} <= set(given)

    table = project()
    extras = table["project"]["optional-dependencies"]
    cupy = bounds(extras["cuda13"])["cupy-cuda13x"]
    needed = bounds(table["project"]["dependencies"]) | bounds(extras["lab"]) | {"cupy": cupy}
    in_development = bounds(development())
    tools = "nbval", "pytest", "pytest-xdist", "pyyaml", "hypothesis"
    needed |= {name: in_development[name] for name in tools}
    needed["python"] = table["project"]["requires-python"]
    for name, specifier in needed.items():
        assert given.get(name) == specifier, name
    assert set(given) == set(needed) | {"pip"}


def test_bounds_are_lower_bounds():
    table = project()
    extras = table["project"]["optional-dependencies"].values()
    texts = [text for extra in extras for text in extra]
    for text in [*texts, *table["project"]["dependencies"], *development()]:
        requirement = Requirement(text)
        if requirement.name != "gpuml":
            assert re.fullmatch(r">=[\d.]+", str(requirement.specifier)), text


def test_the_newest_good_versions_are_kept_and_fit_the_bounds():
    lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            [specifier] = requirement.specifier
            assert specifier.operator == "==", line
            pinned.setdefault(requirement.name, specifier.version)
    assert "://" not in "".join(lines)
    table = project()
    wanted = table["project"]["dependencies"] + development()
    for requirement in map(Requirement, wanted):
        if requirement.name != "gpuml":
            assert requirement.specifier.contains(pinned[requirement.name]), requirement.name


def readme_lines() -> list[str]:
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readme_begins_with_the_two_commands():
    assert readme_lines()[:2] == [
        "pip install uv && uv run gpuml train",
        "pip install uv && uv run pytest",
    ]


def test_the_readme_names_every_extra_and_only_commands_that_exist(monkeypatch, capsys):
    from gpuml import cli

    lines = readme_lines()
    extras = set(project()["project"]["optional-dependencies"])
    named = {
        extra
        for line in lines
        for group in re.findall(r"\.\[([\w,]+)\]|--extra (\w+)", line)
        for extra in "".join(group).split(",")
    }
    assert named == extras
    for line in lines:
        words = shlex.split(line.partition("#")[0])
        if "gpuml" not in words:
            continue
        arguments = [w for w in words[words.index("gpuml") + 1 :] if w != "--help"]
        for command in ("train", "predict", "doctor", "bench", "notebooks", "lab"):
            if arguments[:1] == [command]:
                options = cli._parse(arguments)  # refuses an unknown option
                assert options.command.__name__ == f"_{command}"


def test_the_examples_of_the_help_are_right():
    from gpuml import cli

    for text in (cli.TRAIN_EXAMPLES, cli.PREDICT_EXAMPLES):
        for line in text.splitlines()[1:]:
            cli._parse(shlex.split(line)[1:])


def test_the_version_is_said_once():
    assert project()["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", gpuml.__version__)


LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(path: Path) -> list[str]:
    """Where the text of a notebook points to; brackets of formulas and of code are no links."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", "", text, flags=re.DOTALL)
    return LINK.findall(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(path):
    for target in links(path):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target.partition("#")[0]).is_file(), target


@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.parent.name == "notebooks"], ids=lambda p: p.stem
)
def test_a_notebook_and_its_exercises_point_to_each_other(path):
    exercises = path.parent / "exercises" / path.name
    assert f"exercises/{path.name}" in links(path)
    assert f"../{path.name}" in links(exercises)
    last = json.loads(path.read_text(encoding="utf-8"))["cells"][-1]
    section = "".join(last["source"]).partition("## Exercises\n")[2].partition("\n## ")[0]
    assert f"(exercises/{path.name})" in section
