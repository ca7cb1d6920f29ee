"""The widgets as people use them: JupyterLab, a kernel, and a real Chromium that clicks.

Skipped without Chromium or the package playwright (`pip install playwright`; the browser that it
offers is not needed). Screenshots go to the folder VFLAN_SCREENSHOTS, if that is set. The tests use
finished runs of the tiny preset if there are any; otherwise they draw a small world and train three
models for two steps.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from vflan import world
from vflan.config import ROOT, preset, resolve
from vflan.evaluation.evaluator import present
from vflan.training.run import Run
from vflan.training.trainer import pretrained_stage

SECONDS = 240  # a busy machine may need for one step
CELLS = {  # of each notebook, the cells that contain these words are run
    "01": ["preset = ", "import vflan", "data = exploration", "look = lab", "placed = ",
           "widgets.task_browser"],
    "03": ["preset = ", "import vflan", "recipes = ", "projectors = ", "widgets.live_loss",
           "plots.loss_curve"],
    "04": ["preset = ", "import vflan", "talk, tasks = ", "bases, chats = ", "questions = [q |",
           "widgets.chat"],
    "05": ["preset = ", "import vflan", "arms = {", "scores = done", "widgets.answer_browser"],
}  # fmt: skip


def finished():
    """Whether the tiny preset's first seed is trained and evaluated, and its world drawn."""
    p = preset("tiny")
    asked, stages = resolve(p.base.benchmarks), [pretrained_stage(p.projector), p.base, p.chat]
    if (
        not resolve(p.base.samples).is_file()
        or not asked.is_dir()
        or not all(Run(r.folder).finished for r in stages)
    ):
        return False
    return all(
        (recipe.folder / "answers" / f"{name}.jsonl").is_file()
        for recipe in stages
        for name in present(asked)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the three notebooks, cut to the cells that lead to their widget."""
    folder = tmp_path_factory.mktemp("lab")
    changes = {}
    if not finished():
        small = world.build(
            folder / "world", captions=40, per_kind=4, conversations=20, questions=0.1
        )
        for path in (small / "benchmarks").iterdir():
            if path.is_dir() and path.name not in ("pope", "llava_bench", "images"):
                shutil.rmtree(path)
        changes = dict(num_samples=40, max_steps=2, runs=str(folder / "runs"))
        changes |= dict(
            samples=str(small / "samples/flan.json"),
            images=str(small / "samples/images"),
            benchmarks=str(small / "benchmarks"),
        )
    for start, contents in CELLS.items():
        (path,) = (ROOT / "notebooks").glob(f"{start}_*.ipynb")
        whole, cells = nbformat.read(path, 4), []
        code = [cell for cell in whole.cells if cell.cell_type == "code"]
        for words in contents:
            (cell,) = (cell for cell in code if words in cell.source)
            cells.append(nbformat.v4.new_code_cell(cell.source))
        # notebook 03 trains, to be watched: sixty steps of a run of its own
        own = dict(max_steps=60, runs=str(folder / "watched")) if start == "03" else {}
        cells[0].source += f"\nchanges = {changes | own!r}\nseeds = [0]"
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=whole.metadata)
        nbformat.write(notebook, folder / f"{start}.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """The address of a JupyterLab of this folder, with a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )  # otherwise a question covers the notebook
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--IdentityProvider.token=secret"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    folders = {f"JUPYTER{what}_DIR": str(folder / what.rpartition("_")[2].lower())
           for what in ("_CONFIG", "_RUNTIME", "LAB_SETTINGS", "LAB_WORKSPACES")}  # fmt: skip
    env = os.environ | folders | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/api?token=secret", timeout=5
                ).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (
                    folder / "lab.log"
                ).read_text()[-2000:]
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/doc/tree/{{}}.ipynb?token=secret"
    finally:
        server.terminate()  # it shuts its kernels down
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def notebook(browser, lab):
    """notebook("01") opens it, runs all its cells, and returns the page and its widget."""
    page = browser.new_page(viewport={"width": 1180, "height": 1600})
    page.set_default_timeout(1000 * SECONDS)

    def run(start, appears=".widget-vbox, .jp-RenderedText[data-mime-type*=error]"):
        page.goto(lab.format(start))
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        # the status bar: before its kernel has begun, "run" asks which one to take
        page.get_by_text("| Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.locator(appears).first.wait_for()
        assert errors(page) == []
        return page, page.locator(".jp-OutputArea-output .widget-vbox").first

    yield run
    page.close()


def errors(page):
    return page.locator(".jp-RenderedText[data-mime-type*=error]").all_inner_texts()


def keep(widget, name):
    """Save a screenshot, if VFLAN_SCREENSHOTS names a folder for it."""
    if place := os.environ.get("VFLAN_SCREENSHOTS"):
        path = Path(place) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        widget.screenshot(path=path)
        with Image.open(path) as picture:
            picture.convert("RGB").save(path, optimize=True)  # all colours stay
        assert path.stat().st_size < 400_000


def choose(widget, name, option):
    field = widget.locator(".widget-dropdown").filter(has=widget.page.get_by_text(name, exact=True))
    field.locator("select").select_option(option)
    # The browser loses a choice that follows another one within milliseconds; nobody is so fast.
    widget.page.wait_for_timeout(1500)


def says(widget, *texts):
    for text in texts:
        widget.get_by_text(text).locator(
            "visible=true"
        ).first.wait_for()  # an option of a menu is invisible


def test_the_task_browser(notebook):
    page, widget = notebook("01")
    says(widget, "as the model reads it", "where packed training on these samples reads it")
    choose(widget, "group", "classification")
    choose(widget, "category", "image-text matching")
    says(widget, "1 of")
    widget.get_by_role("button", name="next").click()
    says(widget, "2 of")
    assert widget.locator("img").evaluate("image => image.naturalWidth") > 0
    assert errors(page) == []
    keep(widget, "widgets-tasks")
    page.locator(".jp-Cell").nth(-2).scroll_into_view_if_needed()
    keep(page, "notebook-lab")  # a whole notebook in JupyterLab


def test_the_loss_is_drawn_while_a_notebook_trains(notebook):
    page, _ = notebook("03", ".widget-html svg, .jp-RenderedText[data-mime-type*=error]")
    plot = page.locator(".widget-html").filter(has=page.locator("svg")).first
    says(plot, "base: step 60, loss", "nats")
    assert plot.locator("polyline").count() == 1 and errors(page) == []
    page.locator(".jp-OutputArea-output img").first.wait_for()  # the figure at the end
    keep(plot, "widgets-loss")


def test_the_answer_browser(notebook):
    page, widget = notebook("05")
    says(widget, "questions; right: base")
    widget.get_by_role("button", name="next").click()
    widget.get_by_role("button", name="back").click()
    choose(widget, "show", "answers differ")
    # A question that neither answers rightly: the demo's models miss none of POPE's together.
    choose(widget, "benchmark", "heldout")
    choose(widget, "show", "both wrong")
    says(widget, "right: base 0%, chat 0%")
    choose(widget, "benchmark", "pope")
    choose(widget, "beside", "projector")
    choose(widget, "show", "all")
    says(widget, "projector ", "Is there")
    choose(widget, "beside", "chat")
    choose(widget, "benchmark", "llava_bench")
    says(widget, "of 10:")  # the judge's reason
    assert errors(page) == []
    keep(widget, "widgets-answers")


def test_the_chat(notebook, tmp_path):
    page, widget = notebook("04")
    answers = widget.locator("div[style*=pre-wrap]").first
    asking = widget.get_by_placeholder("ask about the picture")
    ready = widget.get_by_role("button", name="ask").element_handle()
    widget.get_by_role("button", name="another picture").click()
    widget.get_by_label("where it looks").check()
    choose(widget, "run", "base")
    choose(widget, "beside", "chat")
    for question in ("Please give a detailed description of the image.", "What is this?"):
        asking.fill(question)
        asking.press("Enter")
        says(widget, question)
        page.wait_for_function("button => !button.disabled", arg=ready)
    said = answers.inner_text()
    assert said.count("you ") == said.count("base ") == said.count("chat ") == 2
    if finished():  # Chat describes, and both have been asked
        assert "chat (nothing)" not in " ".join(said.split()) and len(said.split()) > 20
    says(widget, "of its attention is on the picture")
    choose(widget, "layer", "2")
    choose(widget, "as", "overlay")
    choose(widget, "as", "frames")
    assert errors(page) == []
    keep(widget, "widgets-chat")
    Image.new("RGB", (48, 48), "red").save(tmp_path / "own.png")
    with page.expect_file_chooser() as chooser:
        widget.get_by_role("button", name="own picture").click()
    chooser.value.set_files(tmp_path / "own.png")
    says(widget, "own.png")
    assert answers.inner_text().strip() == ""
