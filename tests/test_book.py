"""The press: order, failure, cleanliness and the pages it writes, on notebooks of two or three cells."""

import base64
import gc
import io
import json
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, PngImagePlugin

from vflan import book


def code(source, tags=(), **more):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {}, **more)


def write(folder, name, *cells):
    folder.mkdir(exist_ok=True)
    notebook = new_notebook(cells=[code('preset = "tiny"\nchanges = {}', ["parameters"]), *cells])
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png(noise=False, description=None):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 300, 3)) if noise else np.zeros((8, 8, 3))
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if description:
        info.add_text("Description", description)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_notebooks_run_in_order_and_come_out_clean(home, capfd):
    folder = home / "notebooks"
    show = "import sys, os\nprint(os.getcwd())\nprint('10%|x| 1/9', file=sys.stderr)\nopen('first.txt', 'w').write('x')"
    write(folder, "01_first", new_markdown_cell("# One"), code(show), code(""), code("1 + 1"))
    read = "print(open('first.txt').read(), changes)"
    found = "import os\nfrom multiprocessing.forkserver import _forkserver as f\n"
    found += "print(f._preload_modules, os.kill(f._forkserver_pid, 9))  # as vflan.sweep() finds it"
    write(folder, "02_second", code(read), code(found))
    source = (folder / "01_first.ipynb").read_text()
    gc.collect()  # a kernel that nbval ran in this process says its last words now, not in between
    capfd.readouterr()

    record = book.press("tiny", notebooks=folder)

    first, second = (nbformat.read(home / "runs/tiny/notebooks" / f"{n}.ipynb", 4) for n in ("01_first", "02_second"))
    nbformat.validate(first)
    cells = [cell for cell in first.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [1, 2, None, 3]
    assert [output.name for output in cells[1].outputs if output.output_type == "stream"] == ["stdout"]
    assert cells[1].outputs[0].text == "notebooks\n"  # run in the notebook's folder; the machine's path is gone
    assert cells[3].outputs[0].data["text/plain"] == "2" and cells[3].outputs[0].execution_count == 3
    assert set(first.metadata) == {"kernelspec", "language_info"} and first.metadata.kernelspec.name == "python3"
    assert cells[0].metadata == {"tags": ["parameters"]}
    assert cells[1].metadata == {"tags": ["nbval-check-output"]}
    assert second.cells[1].outputs[0].text == "x {}\n"
    assert (
        second.cells[2].outputs[0].text == "['vflan.train', 'vflan.evaluate'] None\n"
    )  # what sweeps fork from runs already
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in first.cells)
    assert (folder / "01_first.ipynb").read_text() == source  # committed notebooks change with --write only

    kept = json.loads((home / "runs/tiny/book.json").read_text())
    assert kept == record and [row["name"] for row in kept["notebooks"]] == ["01_first", "02_second"]
    assert kept["peak_gb"] > 0 and kept["minutes"] > 0
    said = capfd.readouterr()
    assert "01_first" in said.out and "runs/tiny/notebooks" in said.out and "figures/README.md" in said.out
    assert said.out.splitlines()[-1].split() == ["report", "runs/tiny/report.html"]
    # Quiet when nobody watches; a kernel that ends may leave a word of libzmq (zeromq/libzmq#3715), once in many runs.
    assert [line for line in said.err.splitlines() if "(src/signaler.cpp:" not in line] == []

    again = (home / "runs/tiny/notebooks/01_first.ipynb").read_bytes()
    book.press("tiny", only=["01"], notebooks=folder, write=True)
    assert (folder / "01_first.ipynb").read_bytes() == again  # the same run writes the same file


def test_the_first_failure_stops_the_press_with_one_sentence(home):
    folder = write(home / "notebooks", "01_bad", code("raise ValueError('the picture is missing\\nmore')")).parent
    write(folder, "02_never", code("1"))
    with pytest.raises(SystemExit) as stop:
        book.main(["tiny"])
    sentence = str(stop.value).splitlines()
    assert sentence[0] == "vflan.book: 01_bad.ipynb stopped in cell [2] - ValueError: the picture is missing"
    assert (home / "runs/tiny/notebooks/01_bad.ipynb").exists()
    assert not (home / "runs/tiny/notebooks/02_never.ipynb").exists()


def test_parameters_and_the_preset_reach_the_notebook(home):
    folder = write(home / "notebooks", "03_third", code("print(preset, changes['seed'] + 1, word)")).parent
    write(folder, "04_not_this", code("1/0"))
    book.main(["full_7b", "--notebooks", "03", "-p", "changes", "{'seed': 1}", "-p", "word", "plain", "--out", "mine"])
    done = nbformat.read(home / "mine/notebooks/03_third.ipynb", 4)
    assert done.cells[-1].outputs[0].text == "full_7b 2 plain\n"
    assert json.loads((home / "mine/book.json").read_text())["parameters"]["changes"] == {"seed": 1}


def test_a_preset_file_is_found_from_the_notebooks_folder(home):
    folder = write(home / "notebooks", "01_a", code("print(open(preset).read())")).parent
    (home / "mine.py").write_text("my preset")
    assert book.press("mine.py", notebooks=folder)["preset"] == "mine"
    assert nbformat.read(home / "runs/mine/notebooks/01_a.ipynb", 4).cells[-1].outputs[0].text == "my preset\n"


def test_wrong_requests_are_answered_with_what_there_is(home):
    with pytest.raises(FileNotFoundError, match="01_name.ipynb"):
        book.press(notebooks=home)
    write(home / "notebooks", "01_a")
    with pytest.raises(ValueError, match="no notebook starts with '07'; there are 01_a"):
        book.press(only=["07"], notebooks=home / "notebooks")
    for request in ({"preset": "full_7b"}, {"parameters": {"changes": {}}}):
        with pytest.raises(ValueError, match="--write"):
            book.press(write=True, notebooks=home / "notebooks", **request)


def test_cleaning_leaves_no_widget_address_or_path(home):
    view = {"text/plain": "VBox(children=())", book.WIDGET: {"model_id": "1"}}
    text = (
        f"{home}/data/x.json\n {sys.prefix}/lib/y.py <A at 0x7f00aabbccdd>\n 5%|# | 1/20\nstep 1\rstep 2\nend {home}\n"
    )
    outputs = [
        new_output("display_data", view),
        new_output("stream", name="stdout", text=text),
        new_output("stream", name="stderr", text="warning"),
        new_output("stream", name="stdout", text="more"),
        new_output("display_data", {"text/html": f"<i>{home}/a.png</i>", "image/png": "AAAA"}, metadata={"needs": 1}),
    ]
    dirty = new_notebook(cells=[code("x", outputs=outputs)], metadata={"widgets": {}, "papermill": {"duration": 3}})
    first, last = book.clean(dirty).cells[0].outputs
    assert first.text == "data/x.json\n .venv/lib/y.py <A at 0x...>\nstep 2\nend .\nmore"
    assert last.data["text/html"] == "<i>a.png</i>" and last.metadata == {}
    assert dirty.metadata.papermill and len(dirty.cells[0].outputs) == 5  # a copy was cleaned


def test_large_notebooks_get_smaller_pictures(tmp_path):
    picture = base64.b64encode(png(noise=True)).decode()
    output = new_output("display_data", {"image/png": picture, "text/plain": "<Figure>"})
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[code("x", outputs=[output])]), path)
    assert path.stat().st_size > book.LIMIT
    size = book.lay_out(path)
    assert size == path.stat().st_size < book.LIMIT
    kept = nbformat.read(path, 4).cells[0].outputs[0].data["image/png"]
    assert Image.open(io.BytesIO(base64.b64decode(kept))).size == (300, 300)


def test_the_gallery_lists_figures_with_their_captions(home):
    tiny = home / "figures/tiny"
    tiny.mkdir(parents=True)
    (tiny / "fig10_last.png").write_bytes(png())
    (tiny / "fig4_task_diversity.png").write_bytes(png(description="More tasks help."))
    page, count = book.write_gallery("tiny")
    lines = [line for line in page.read_text().splitlines() if line.startswith("![")]
    assert count == 2 and page == home / "figures/README.md"
    assert lines == [
        "![More tasks help.](tiny/fig4_task_diversity.png)",
        "![Figure 10: last](tiny/fig10_last.png)",
    ]
    assert book.write_gallery("mine")[0] == home / "figures/mine/README.md"


def test_the_score_table_shows_each_benchmarks_first_metric_as_mean_of_seeds(tmp_path):
    rows = [("base", "pope", "f1", 80, 0), ("base", "pope", "f1", 90, 1), ("base", "pope", "yes", 50, 0)]
    rows += [("chat", "pope", "f1", 70.04, 0), ("base", "mme", "total", 1200, 0)]
    pd.DataFrame(rows, columns=["run", "benchmark", "metric", "value", "seed"]).to_csv(tmp_path / "s.csv", index=False)
    table = book.score_table(tmp_path / "s.csv")
    assert list(table.columns) == ["pope", "mme"] and list(table.index) == ["base", "chat"]
    assert table.loc["base", "pope"] == 85 and table.loc["chat", "pope"] == 70 and np.isnan(table.loc["chat", "mme"])


def test_the_watch_sees_what_children_hold():
    import subprocess

    hold = "x = bytearray(300_000_000); import time; time.sleep(1.5)"
    with book.Watch(every=0.1) as watch:
        before = book.tree_gb()
        subprocess.run([sys.executable, "-c", hold], check=True)
    assert watch.peak_gb > before + 0.25 and 1 / 60 < watch.minutes < 1


def test_a_notebook_runs_again_only_when_something_changed(home, tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('here')")])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "01_first.ipynb")
    (home / "figures" / "tiny").mkdir(parents=True, exist_ok=True)
    lines = []
    target = home / "runs/tiny/notebooks/01_first.ipynb"
    book.press("tiny", notebooks=folder, say=lines.append)
    made = target.stat().st_mtime_ns
    book.press("tiny", notebooks=folder, say=lines.append)
    assert target.stat().st_mtime_ns == made and any("up to date" in line for line in lines)
    notebook.cells[0].source = "print('there')"
    nbformat.write(notebook, folder / "01_first.ipynb")
    book.press("tiny", notebooks=folder, say=lines.append)
    assert "there" in target.read_text()
