"""The course in a real browser: JupyterLab on loopback, and what a student sees in it.

GPUML_SCREENSHOTS=FOLDER keeps a picture of each notebook, to be looked at.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from gpuml.copies import copy_course

api = pytest.importorskip("playwright.sync_api", reason="no playwright, which drives a browser")
psutil = pytest.importorskip("psutil")
pytest.importorskip("jupyterlab")

NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
NAMES += ["msedge", "microsoft-edge"]
PLACES = ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
PLACES += ["C:/Program Files/Google/Chrome/Application/chrome.exe"]
BROWSER = next(filter(None, map(shutil.which, [*NAMES, *PLACES])), None)
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]  # it calls nobody

FOLDER = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
EXERCISES = sorted(path.name for path in (FOLDER / "exercises").glob("*.ipynb"))
WHOLE = LESSONS[0], LESSONS[6]  # the first, and one with plots and progress bars
# More copies of an exercise: as it is handed out, and with all right but for the last function.
FOURTH, UNTOUCHED, ANSWERED = EXERCISES[3], "untouched.ipynb", "answered.ipynb"
RIGHT, WRONG = "(m * k + k * n + m * n)", "(m * n)"
HINT = "the two factors need memory"
SECRET = "of-this-test"
# What `gpuml[teach]` brings into JupyterLab and `gpuml[lab]` does not: students have none of it.
TEACHERS_IN_LAB = ["@jupyter/nbgrader", "@jupyter-notebook/lab-extension"]
TEACHERS_IN_LAB += ["@jupyter-widgets/jupyterlab-manager"]
GRADERS = ["formgrader", "validate_assignment", "assignment_list", "course_list"]
TEACHERS_IN_SERVER = ["notebook", *(f"nbgrader.server_extensions.{name}" for name in GRADERS)]
LIMIT = 10.0  # s, from when JupyterLab has started to the first cell's end
# The limit holds where Python sums a million squares in 0.09 s; slower machines get more time.
QUICK = 0.09
PATIENCE = 120_000  # ms, on a machine that is busy with other things

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser found: {', '.join(NAMES)}")

NOTEBOOK = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook"
ERROR = f"{NOTEBOOK} :is([data-mime-type$='.error'], [data-mime-type$='.stderr'])"
PROMPTS = f"""[...document.querySelectorAll("{NOTEBOOK} .jp-CodeCell .jp-InputPrompt")]
    .map(prompt => prompt.textContent.replace(/[^0-9*]/g, ""))"""


def source_of(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """The students' copy, without outputs, so that what is seen was drawn in this browser."""
    folder = a_copy(tmp_path_factory.mktemp("browser"))
    for name in WHOLE:
        without_outputs(source_of(name), folder / name)
    answers = json.loads(json.dumps(source_of(f"exercises/{FOURTH}")).replace(RIGHT, WRONG))
    without_outputs(answers, folder / "exercises" / ANSWERED)
    return folder


def a_copy(place: Path) -> Path:
    folder = place / "course"
    copy_course(folder)
    shutil.copy(folder / "exercises" / FOURTH, folder / "exercises" / UNTOUCHED)
    return folder


def without_outputs(notebook: dict, path: Path) -> None:
    for cell in code_cells(notebook):
        cell |= {"outputs": [], "execution_count": None}
    path.write_text(json.dumps(notebook), encoding="utf-8")


@contextmanager
def jupyter_lab(course: Path, notebooks: dict[str, str] | None = None) -> Iterator[str]:
    """Start `gpuml lab` in the copy, without opening a browser, with what students have."""
    home = course.parent / f"home-{time.monotonic_ns()}"
    settings = "lab/user-settings/@jupyterlab/{}.jupyterlab-settings".format
    for name, content in {
        settings("notebook-extension/tracker"): notebooks or {},
        settings("apputils-extension/notification"): {  # it calls nobody
            "fetchNews": "false",
            "checkForUpdates": False,
        },
        "labconfig/page_config.json": {"disabledExtensions": dict.fromkeys(TEACHERS_IN_LAB, True)},
        "jupyter_server_config.json": {
            "ServerApp": {"jpserver_extensions": dict.fromkeys(TEACHERS_IN_SERVER, False)}
        },
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"JUPYTER_CONFIG_DIR": home, "JUPYTER_DATA_DIR": home, "IPYTHONDIR": home}
    variables |= {"JUPYTER_RUNTIME_DIR": home / "runtime", "GPUML_DEVICE": "cpu"}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # who has it waits at each start
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={SECRET}", "--allow-root"]
    log = home / "log.txt"
    begin = time.monotonic()
    with log.open("wb") as file:
        lab = subprocess.Popen(
            [sys.executable, "-m", "gpuml", "lab", str(course), "--", *options],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while not answers(f"{address}/api?token={SECRET}"):
            assert lab.poll() is None, log.read_text()
            assert time.monotonic() - begin < PATIENCE / 1000, log.read_text()
            time.sleep(0.05)
        yield address
    finally:
        processes = with_children(lab.pid)
        lab.terminate()
        try:
            lab.wait(30)
        except subprocess.TimeoutExpired:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def with_children(number: int) -> list[Any]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        return [process, *process.children(recursive=True)]
    return []


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser():
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    arguments = [*QUIET, *["--no-sandbox"] * as_root]
    with (
        api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=BROWSER, args=arguments) as browser,
    ):
        yield browser


@pytest.fixture(scope="module")
def page(course, browser):
    with jupyter_lab(course, {"windowingMode": "none"}) as address:  # all cells are in the page
        yield opened(browser, address)


def opened(browser, address: str):
    """A page with JupyterLab in it, the exercises listed on the left."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}/lab/tree/exercises?token={SECRET}")
    entry(page, UNTOUCHED).wait_for()
    return page


def entry(page, name: str):
    return page.locator(".jp-DirListing-item").filter(has_text=name)


def open_notebook(page, name: str) -> None:
    """Open a notebook from the list and wait for its kernel."""
    tab = page.locator("#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current").filter(has_text=name)
    until_seen(tab, entry(page, name).dblclick)
    page.locator(f"{NOTEBOOK} .jp-CodeCell").first.wait_for()
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()


def show_folder(page, name: str) -> None:
    """Show the exercises, or the folder of the course, in the list."""
    until_seen(entry(page, "exercises"), page.locator(".jp-BreadCrumbs-home").click)
    if name:
        until_seen(entry(page, UNTOUCHED), entry(page, name).dblclick)


def until_seen(wanted, action: Callable[..., None]) -> None:
    """Do something until it shows: a click is lost on a list that is just drawn again."""
    for _ in range(6):
        if wanted.is_visible():
            return
        with suppress(api.TimeoutError):
            action(timeout=5000)
            wanted.wait_for(timeout=5000)
    assert wanted.is_visible()


def run_all(page) -> list[str]:
    """Run all cells by the menu; return the prompts once nothing runs or waits any more."""

    def run() -> None:
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    until_it_runs(page, run)
    page.wait_for_function(f"!{PROMPTS}.includes('*')")
    return page.evaluate(PROMPTS)


def until_it_runs(page, run: Callable[[], None], patience: float = 5) -> None:
    """Run cells; again if nothing came of it, as JupyterLab forgets what came before its kernel."""
    for _ in range(math.ceil(30 / patience)):
        run()
        with suppress(api.TimeoutError):
            page.wait_for_function(f"{PROMPTS}[0] !== ''", timeout=1000 * patience)
            return
    raise AssertionError("no cell runs")


def keep_picture(page, name: str) -> None:
    folder = os.environ.get("GPUML_SCREENSHOTS")
    if not folder:
        return
    scroller = f"document.querySelector('{NOTEBOOK} .jp-WindowedPanel-outer')"
    height = page.evaluate(f"{scroller}.scrollHeight")
    page.set_viewport_size({"width": 1280, "height": min(height + 150, 16000)})
    page.evaluate(f"{scroller}.scrollTop = 0")
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.screenshot(path=Path(folder) / f"{Path(name).stem}.png")
    page.set_viewport_size({"width": 1280, "height": 900})


# --- exercises ---------------------------------------------------------------------------------


def test_an_untouched_exercise_stops_at_the_first_check_and_says_why(page):
    show_folder(page, "exercises")
    open_notebook(page, UNTOUCHED)
    prompts = run_all(page)
    keep_picture(page, "untouched")
    first = 1 + [*map(is_check, code_cells(source_of(f"exercises/{FOURTH}")))].index(True)
    numbers = [str(i + 1) for i in range(first)]
    assert prompts == numbers + [""] * (len(prompts) - first)
    message = the_message(page)
    assert message.startswith("AnswerError: ")
    assert "there is no answer yet" in message
    assert len(message) < 200, "no traceback: the student has not made an error in Python"


def test_a_wrong_answer_gets_its_hint_and_the_rest_is_right(page):
    show_folder(page, "exercises")
    open_notebook(page, ANSWERED)
    prompts = run_all(page)
    keep_picture(page, "answered")
    assert prompts == [str(i + 1) for i in range(len(prompts))]
    assert HINT in the_message(page)
    right = page.locator(f"{NOTEBOOK} [data-mime-type='application/vnd.jupyter.stdout']")
    assert ["right" in text for text in right.all_inner_texts()].count(True) == 2


def is_check(cell: dict) -> bool:
    return cell["metadata"].get("nbgrader", {}).get("grade", False)


def the_message(page) -> str:
    """The text of the only error; it is in sight and fits into the page."""
    errors = page.locator(ERROR)
    assert errors.count() == 1
    errors.scroll_into_view_if_needed()
    assert errors.is_visible()
    pre = errors.locator("pre")
    assert pre.evaluate("pre => pre.scrollWidth <= pre.clientWidth + 1"), "it is cut off"
    assert float(pre.evaluate("pre => parseFloat(getComputedStyle(pre).fontSize)")) >= 10
    return pre.inner_text()


# --- notebooks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE, ids=["start", "progress"])
def test_a_notebook_runs_from_top_to_bottom(page, name):
    show_folder(page, "")
    open_notebook(page, name)
    assert set(page.evaluate(PROMPTS)) == {""}
    assert page.locator(f"{NOTEBOOK} .jp-OutputArea-output").count() == 0
    prompts = run_all(page)
    keep_picture(page, name)
    stored = code_cells(source_of(name))
    assert prompts == [str(i + 1) for i in range(len(stored))]
    assert page.locator(ERROR).count() == 0, page.locator(ERROR).all_inner_texts()
    assert_pictures_are_drawn(page, stored)
    if any("progress=True" in "".join(cell["source"]) for cell in stored):
        assert_progress_is_drawn(page)


def assert_pictures_are_drawn(page, stored: list[dict]) -> None:
    n_stored = sum("image/png" in o.get("data", {}) for cell in stored for o in cell["outputs"])
    pictures = page.locator(f"{NOTEBOOK} .jp-OutputArea-output img")
    assert pictures.count() == n_stored > 0
    for i in range(n_stored):
        drawn, fits, n_colours = pictures.nth(i).evaluate("""picture => {
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(picture, 0, 0);
            const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
            const area = picture.closest(".jp-OutputArea").getBoundingClientRect();
            const box = picture.getBoundingClientRect();
            return [picture.complete && box.width > 100 && box.height > 50,
                    box.right <= area.right + 1, new Set(new Uint32Array(pixels.buffer)).size];
        }""")
        assert drawn
        assert fits, "a picture is wider than the notebook"
        assert n_colours > 10, "a picture is blank"


def assert_progress_is_drawn(page) -> None:
    bars = page.locator(f"{NOTEBOOK} .jp-OutputArea-output pre").filter(has_text="█")
    assert bars.count() == 1
    [line] = bars.inner_text().splitlines()
    assert line.startswith("epoch 30/30: 100%|█")
    height = bars.evaluate("bar => bar.getBoundingClientRect().height")
    assert height < 2 * bars.evaluate("bar => parseFloat(getComputedStyle(bar).lineHeight)"), (
        "the bar is broken into several lines"
    )
    colour = bars.evaluate("bar => getComputedStyle(bar.parentElement).backgroundColor")
    assert colour in ("rgba(0, 0, 0, 0)", "rgb(255, 255, 255)"), "the bar looks like an alarm"


# --- time --------------------------------------------------------------------------------------


@pytest.mark.alone
def test_the_first_cells_of_lessons_and_of_each_exercise_soon_run(tmp_path, browser):
    # The last of this file: by now all modules are compiled, as pip does and uv does not.
    course = a_copy(tmp_path)
    for name in WHOLE:  # with their outputs, but nobody has run the first cell
        notebook = source_of(name)
        code_cells(notebook)[0]["execution_count"] = None
        (course / name).write_text(json.dumps(notebook), encoding="utf-8")
    with jupyter_lab(course) as address:
        before, begin = pace(), time.monotonic()
        page = opened(browser, address)
        opening = time.monotonic() - begin
        quick_opening = on_a_quick_machine(opening, before, before := pace())
        seconds, quick = {}, {}
        for name in *WHOLE, *(f"exercises/{name}" for name in EXERCISES):
            show_folder(page, os.path.dirname(name))
            begin = time.monotonic()
            open_notebook(page, os.path.basename(name))
            page.locator(f"{NOTEBOOK} .jp-CodeCell .jp-InputPrompt").first.click()
            until_it_runs(page, lambda: page.keyboard.press("Control+Enter"), 1)
            page.wait_for_function(f"!['', '*'].includes({PROMPTS}[0])")
            seconds[name] = time.monotonic() - begin
            quick[name] = on_a_quick_machine(seconds[name], before, before := pace())
            assert page.locator(ERROR).count() == 0
    slowest = max(quick, key=quick.get)
    total = quick_opening + quick[slowest]
    print(f"JupyterLab is in the browser {opening:.1f} s after its server answers, the first cell")
    print(f"of {slowest} has run {seconds[slowest]:.1f} s later: {total:.1f} s on a quick machine")
    assert total < LIMIT, seconds


def pace() -> float:
    """Seconds for some work of Python's, now, with whatever shares our cores."""
    begin = time.perf_counter()
    sum(i * i for i in range(10**6))
    return time.perf_counter() - begin


def on_a_quick_machine(seconds: float, *paces: float) -> float:
    return seconds / max(1, mean(paces) / QUICK)
