"""Running, cleaning and publishing notebooks: order, failures, outputs and the pages written.

The notebooks have two or three cells.
"""

import base64
import gc
import io
import json
import subprocess
import sys
import tempfile

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, PngImagePlugin

from vflan import config
from vflan.__main__ import main
from vflan.analysis import tables
from vflan.tools import clean, notebooks, publish
from vflan.tools.watch import Watch, tree_gb
from vflan.world import scene


def code(source, tags=(), **more):
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {}, **more)


def write(folder, name, *cells, more=""):
    folder.mkdir(exist_ok=True)
    notebook = new_notebook(
        cells=[code(f'preset = "tiny"\nchanges = {{}}{more}', ["parameters"]), *cells]
    )
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def home(tmp_path, monkeypatch):
    for module in (config, tables):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("VFLAN_HOME", str(tmp_path))  # for the kernels
    monkeypatch.chdir(tmp_path)
    return tmp_path


def png(noise=False, description=None):
    pixels = (
        np.random.default_rng(0).integers(0, 255, (300, 300, 3)) if noise else np.zeros((8, 8, 3))
    )
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if description:
        info.add_text("Description", description)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def test_notebooks_run_in_order_and_are_cleaned(home, capfd):
    folder = home / "notebooks"
    show = "import sys, os\nprint(os.getcwd())\nprint('10%|x| 1/9', file=sys.stderr)\n"
    show += "open('first.txt', 'w').write('x')"
    write(folder, "01_first", new_markdown_cell("# One"), code(show), code(""), code("1 + 1"))
    read = "print(open('first.txt').read(), changes)"
    found = "import os\nfrom multiprocessing.forkserver import _forkserver as f\n"
    found += "print(f._preload_modules, os.kill(f._forkserver_pid, 9))  # as vflan.sweep() finds it"
    write(folder, "02_second", code(read), code(found))
    source = (folder / "01_first.ipynb").read_text()
    gc.collect()  # a kernel that nbval ran in this process says its last words now, not in between
    capfd.readouterr()

    record = notebooks.run_notebooks("tiny", notebooks=folder)

    first, second = (
        nbformat.read(home / "runs/tiny/notebooks" / f"{n}.ipynb", 4)
        for n in ("01_first", "02_second")
    )
    nbformat.validate(first)
    cells = [cell for cell in first.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [1, 2, None, 3]
    assert [output.name for output in cells[1].outputs if output.output_type == "stream"] == [
        "stdout"
    ]
    assert (
        cells[1].outputs[0].text == "notebooks\n"
    )  # run in the notebook's folder; the machine's path is gone
    assert (
        cells[3].outputs[0].data["text/plain"] == "2" and cells[3].outputs[0].execution_count == 3
    )
    assert (
        set(first.metadata) == {"kernelspec", "language_info"}
        and first.metadata.kernelspec.name == "python3"
    )
    assert cells[0].metadata == {"tags": ["parameters"]}
    assert cells[1].metadata == {"tags": ["nbval-check-output"]}
    assert second.cells[1].outputs[0].text == "x {}\n"
    assert (
        second.cells[2].outputs[0].text
        == "['vflan.training.trainer', 'vflan.evaluation.evaluator'] None\n"
    )  # what sweeps fork from runs already
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in first.cells)
    assert (folder / "01_first.ipynb").read_text() == source  # a run changes no committed notebook

    kept = json.loads((home / "runs/tiny/book.json").read_text())
    assert kept == record and [row["name"] for row in kept["notebooks"]] == [
        "01_first",
        "02_second",
    ]
    assert kept["peak_gb"] > 0 and kept["minutes"] > 0
    said = capfd.readouterr()
    assert (
        "01_first" in said.out
        and "runs/tiny/notebooks" in said.out
        and "runs/tiny/figures/README.md" in said.out
    )
    assert said.out.splitlines()[-1].split() == ["report", "runs/tiny/report.html"]
    # Nothing else is printed. A kernel that ends may leave a line of libzmq (zeromq/libzmq#3715)
    # or of asyncio.
    noise = ("(src/signaler.cpp:", "Task was destroyed but it is pending", "task: <Task pending")
    assert [line for line in said.err.splitlines() if not any(word in line for word in noise)] == []

    again = (home / "runs/tiny/notebooks/01_first.ipynb").read_bytes()
    notebooks.run_notebooks("tiny", only=["01"], notebooks=folder, again=True)
    assert (
        home / "runs/tiny/notebooks/01_first.ipynb"
    ).read_bytes() == again  # the same run writes the same file


def test_two_notebooks_run_at_a_time_once_those_that_they_read_have_ended(home):
    def figure(name):
        folder = "'../runs/tiny/figures'"
        write_file = f"open({folder} + '/{name}.csv', 'w').write('x')\n"
        return f"import os; os.makedirs({folder}, exist_ok=True); {write_file}"

    until = (
        "import time\nfor _ in range(300): time.sleep(0 if os.path.exists('sixth.txt') else 0.1)\n"
    )
    write(home / "notebooks", "02_first", code("open('second.txt', 'w').write('x')"))
    write(
        home / "notebooks",
        "03_second",
        code(figure("losses") + until + "print(open('sixth.txt').read())"),
    )
    write(
        home / "notebooks",
        "06_third",
        code(figure("curves") + "open('sixth.txt', 'w').write(open('second.txt').read())"),
    )
    write(home / "notebooks", "08_fourth", code("print(open('sixth.txt').read())"))

    record = notebooks.run_notebooks("tiny", notebooks=home / "notebooks")

    files = {row["name"]: sorted(row["files"]) for row in record["notebooks"]}
    assert files == {
        "02_first": [],
        "03_second": ["figures/losses.csv"],
        "06_third": ["figures/curves.csv"],
        "08_fourth": [],
    }


def test_after_a_failure_no_notebook_starts_and_running_ones_end(home):
    write(home / "notebooks", "02_first", code("1"))
    write(home / "notebooks", "03_second", code("raise ValueError('no')"))
    write(home / "notebooks", "04_third", code("open('fourth.txt', 'w').write('x')"))
    write(
        home / "notebooks",
        "06_fourth",
        code("import time; time.sleep(3); open('sixth.txt', 'w').write('x')"),
    )
    with pytest.raises(
        notebooks.Stopped, match=r"03_second.ipynb stopped in cell \[2\] - ValueError: no"
    ):
        notebooks.run_notebooks("tiny", notebooks=home / "notebooks")
    assert (home / "notebooks/sixth.txt").exists() and not (home / "notebooks/fourth.txt").exists()
    done = json.loads((home / "runs/tiny/book.json").read_text())["notebooks"]
    assert [row["name"] for row in done] == ["02_first", "06_fourth"]


def test_the_first_failure_stops_all_with_one_sentence(home, capsys):
    folder = write(
        home / "notebooks", "01_bad", code("raise ValueError('the picture is missing\\nmore')")
    ).parent
    write(folder, "02_never", code("1"))
    assert main(["notebooks", "tiny"]) == 1
    sentence = capsys.readouterr().err.splitlines()
    assert (
        sentence[-2]
        == "vflan notebooks: 01_bad.ipynb stopped in cell [2] - ValueError: the picture is missing"
    )
    assert (home / "runs/tiny/notebooks/01_bad.ipynb").exists()
    assert not (home / "runs/tiny/notebooks/02_never.ipynb").exists()


def test_parameters_and_the_preset_reach_the_notebook(home):
    folder = write(
        home / "notebooks",
        "03_third",
        code("print(preset, changes['seed'] + 1, word)"),
        more="\nword = 1",
    ).parent
    write(folder, "04_not_this", code("1/0"))
    main(
        [
            "notebooks",
            "full_7b",
            "--notebooks",
            "03",
            "-p",
            "changes",
            "{'seed': 1}",
            "-p",
            "word",
            "plain",
            "--out",
            "mine",
        ]
    )
    done = nbformat.read(home / "mine/notebooks/03_third.ipynb", 4)
    assert done.cells[-1].outputs[0].text == "full_7b 2 plain\n"
    assert json.loads((home / "mine/book.json").read_text())["parameters"]["changes"] == {"seed": 1}


def test_a_preset_file_is_found_from_the_notebooks_folder(home):
    folder = write(home / "notebooks", "01_a", code("print(open(preset).read())")).parent
    mine = "from vflan.presets.tiny import preset  # my preset\n"
    (home / "mine.py").write_text(mine)
    assert notebooks.run_notebooks("mine.py", notebooks=folder)["preset"] == "mine"
    assert (
        "my preset"
        in nbformat.read(home / "runs/tiny/notebooks/01_a.ipynb", 4).cells[-1].outputs[0].text
    )


def test_files_of_ones_own_are_found_from_where_the_command_is_given(home, monkeypatch):
    """Samples and pictures with relative paths; a file that changed runs its notebook again."""
    show = code("print(open(samples).read(), images)")
    folder = write(home / "notebooks", "01_a", show, more='\nsamples = ""\nimages = ""').parent
    (home / "here" / "my pictures").mkdir(parents=True)
    monkeypatch.chdir(home / "here")
    given = dict(samples="my rows.json", images="my pictures")
    with pytest.raises(FileNotFoundError, match="samples=my rows.json: no such file or folder"):
        notebooks.run_notebooks("tiny", notebooks=folder, parameters=given)
    assert not (home / "runs").exists()
    target = home / "runs/tiny/notebooks/01_a.ipynb"
    for text in ("first", "second"):
        (home / "here" / "my rows.json").write_text(text)
        notebooks.run_notebooks("tiny", notebooks=folder, parameters=given)
        shown = nbformat.read(target, 4).cells[-1].outputs[0].text
        assert shown.startswith(text) and shown.endswith("my pictures\n")
    lines = []
    notebooks.run_notebooks("tiny", notebooks=folder, parameters=given, say=lines.append)
    assert "up to date" in lines[0]


def test_a_wrong_argument_is_refused_with_the_possible_ones(home):
    with pytest.raises(FileNotFoundError, match="01_name.ipynb"):
        notebooks.run_notebooks(notebooks=home)
    write(home / "notebooks", "01_a")
    with pytest.raises(ValueError, match="no notebook starts with '07'; there are 01_a"):
        notebooks.run_notebooks(only=["07"], notebooks=home / "notebooks")
    before = (home / "notebooks" / "01_a.ipynb").read_bytes()
    with pytest.raises(ValueError, match="would replace their sources"):
        notebooks.run_notebooks(out=home, notebooks=home / "notebooks")
    assert (home / "notebooks" / "01_a.ipynb").read_bytes() == before
    write(home / "notebooks", "02_b", more="\nseeds = [0]\nnum_processes = 1")
    (home / "broken.py").write_text("def preset(:")
    wrong = {
        "no preset 'tinny' .did you mean 'tiny'": dict(preset="tinny"),
        "broken.py, line 1, cannot be run: SyntaxError": dict(preset="broken.py"),
        "has a parameter 'chnges'; did you mean 'changes'": dict(parameters={"chnges": "3"}),
        "has a parameter 'seeds'; there are preset, changes": dict(
            parameters={"seeds": "0"}, only=["01"]
        ),
        "Recipe has no field 'max_stps'; the closest is 'max_steps'": dict(
            parameters={"changes": '{"max_stps": 1}'}
        ),
        "num_processes='two': a whole number": dict(parameters={"num_processes": "two"}),
        "max_steps=0: a number of at least 1": dict(parameters={"changes": {"max_steps": 0}}),
    }
    for sentence, request in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            notebooks.run_notebooks(notebooks=home / "notebooks", **request)
    assert not (home / "runs").exists()  # nothing ran and no folder was made


def test_cleaning_leaves_no_widget_address_or_path(home):
    view = {"text/plain": "VBox(children=())", clean.WIDGET: {"model_id": "1"}}
    text = f"{home}/data/x.json\n {sys.prefix}/lib/y.py <A at 0x7f00aabbccdd>\n"
    text += f" 5%|# | 1/20\nstep 1\rstep 2\nend {home}\n"
    text += f"runs{tempfile.gettempdir()}/a \x1b[32m{home}/b.py {str([f'c{chr(10)}{home}/d'])}\n"
    outputs = [
        new_output("display_data", view),
        new_output("stream", name="stdout", text=text),
        new_output("stream", name="stderr", text="warning"),
        new_output("stream", name="stdout", text="more"),
        new_output(
            "display_data",
            {"text/html": f"<i>{home}/a.png</i>", "image/png": "AAAA"},
            metadata={"needs": 1},
        ),
    ]
    dirty = new_notebook(
        cells=[code("x", outputs=outputs)], metadata={"widgets": {}, "papermill": {"duration": 3}}
    )
    first, last = clean.clean_notebook(dirty).cells[0].outputs
    assert first.text == "data/x.json\n .venv/lib/y.py <A at 0x...>\nstep 2\nend .\n" + (
        f"runs{tempfile.gettempdir()}/a \x1b[32mb.py ['c\\nd']\nmore"
    )
    assert last.data["text/html"] == "<i>a.png</i>" and last.metadata == {}
    assert dirty.metadata.papermill and len(dirty.cells[0].outputs) == 5  # a copy was cleaned


def test_pictures_of_a_large_notebook_become_jpegs_of_the_same_colours(tmp_path):
    """A field of each of the world's colours, and noise that makes the file too large."""
    colors = np.array(list(scene.RGB.values()), dtype=np.uint8)
    pixels = np.random.default_rng(0).integers(0, 255, (450, 450, 3), dtype=np.uint8)
    for i, color in enumerate(colors):
        pixels[:20, 20 * i : 20 * i + 20] = color
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    output = new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode()})
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[code("x", outputs=[output])]), path)
    assert path.stat().st_size > clean.LIMIT
    size = clean.clean_file(path)
    assert size == path.stat().st_size < clean.LIMIT
    (kept,) = nbformat.read(path, 4).cells[0].outputs[0].data.values()
    kept = np.asarray(Image.open(io.BytesIO(base64.b64decode(kept))), dtype=int)
    assert kept.shape == pixels.shape
    for i, color in enumerate(colors):
        seen = kept[4:16, 20 * i + 4 : 20 * i + 16].reshape(-1, 3).mean(0)
        assert abs(seen - color).max() < 8  # the closest two colours of the world are further apart


def test_the_gallery_lists_figures_with_their_captions(home):
    tiny = home / "figures/tiny"
    tiny.mkdir(parents=True)
    (tiny / "fig10_last.png").write_bytes(png())
    (tiny / "fig4_task_diversity.png").write_bytes(png(description="More tasks help."))
    page = home / "figures/README.md"
    count = tables.write_gallery("tiny", tiny, page)
    lines = [line for line in page.read_text().splitlines() if line.startswith("![")]
    assert count == 2
    assert lines == [
        "![More tasks help.](tiny/fig4_task_diversity.png)",
        "![Figure 10: last](tiny/fig10_last.png)",
    ]


def test_all_tables_print_the_same_headline_under_the_same_name():
    rows = [
        ("base", "pope", "accuracy", 72, 0),
        ("base", "pope", "f1", 80, 0),
        ("base-seed1", "pope", "f1", 90, 1),
    ]
    rows += [
        ("chat", "pope", "f1", 70.04, 0),
        ("base", "mme", "accuracy", 61, 0),
        ("base", "mme", "score", 47.2, 0),
    ]
    scores = pd.DataFrame(rows, columns=["run", "benchmark", "metric", "value", "seed"])
    scores = scores.assign(low=scores.value - 1, high=scores.value + 1, baseline=50)
    table = tables.mean_scores(scores)
    assert set(table.columns) == {"POPE F1", "MME score"} and list(table.index) == ["base", "chat"]
    assert table.loc["base", "POPE F1"] == 85 and table.loc["base", "MME score"] == 47.2
    assert table.loc["chat", "POPE F1"] == 70 and np.isnan(table.loc["chat", "MME score"])
    _, _, shown = tables.score_rows(scores)  # what README and report print
    assert {title: base.split()[0] for title, _, _, base, *_ in shown} == {
        "POPE F1": "85.0",
        "MME score": "47.2",
    }


def test_the_watch_counts_the_memory_of_children():
    import subprocess

    hold = "x = bytearray(300_000_000); import time; time.sleep(1.5)"
    with Watch(every=0.1) as watch:
        before = tree_gb()
        subprocess.run([sys.executable, "-c", hold], check=True)
    assert watch.peak_gb > before + 0.25 and 1 / 60 < watch.minutes < 1


def test_a_notebook_runs_again_only_when_something_changed(home, tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('here')")])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "01_first.ipynb")
    lines = []
    target = home / "runs/tiny/notebooks/01_first.ipynb"
    notebooks.run_notebooks("tiny", notebooks=folder, say=lines.append)
    made = target.stat().st_mtime_ns
    notebooks.run_notebooks("tiny", notebooks=folder, say=lines.append)
    assert target.stat().st_mtime_ns == made and any("up to date" in line for line in lines)
    notebook.cells[0].source = "print('there')"
    nbformat.write(notebook, folder / "01_first.ipynb")
    notebooks.run_notebooks("tiny", notebooks=folder, say=lines.append)
    assert "there" in target.read_text()


def test_models_stay_until_the_last_notebook_that_needs_them_has_ended(tmp_path):
    """Notebook 08 asks a run of 06 new questions."""
    sources = [write(tmp_path / "books", name) for name in ("06_a", "07_b", "08_c")]
    work = notebooks._Work(sources, dict.fromkeys(sources, {}), tmp_path, tmp_path)
    free = []
    for source in sources:
        (tmp_path / source.stem).mkdir()
        (tmp_path / source.stem / "done.json").write_text("{}")
        free.append([run.name for run in work.no_longer_needed(source, jobs=1)])
    assert free == [[], ["07_b"], ["06_a", "07_b", "08_c"]]


SCORES = (
    "run,benchmark,metric,value,low,high,n,seed,baseline\\nbase,pope,f1,{value},60,70,9,0,50\\n"
)
WORK = """import matplotlib.pyplot as plt
import vflan
from vflan import plots
from vflan.config import output_folder, resolve
album = resolve(vflan.preset(preset, changes).base.runs)
plots.save(plt.figure(), "empty", album)
results = output_folder(album, "results")
(results / "floors.csv").write_text("claim,holds\\n")
(results / "scores.csv").write_text("SCORES")""".replace("SCORES", SCORES)


def git(folder, *words):
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def project(home):
    """A git project: a published table, and a notebook that saves a figure and a score of 65.4."""
    write(home / "notebooks", "01_work", code(WORK.replace("{value}", "65.4")))
    (home / "data/results").mkdir(parents=True)
    (home / "data/results/tiny.csv").write_text(SCORES.replace("\\n", "\n").format(value="85.4"))
    markers = [
        f"<!-- {table}:{end} -->" for table in ("scores", "floors") for end in ("begin", "end")
    ]
    (home / "README.md").write_text("\n".join(markers) + "\n")
    (home / ".gitignore").write_text("runs/\n")
    git(home, "init", "--quiet")
    git(home, "add", "--all")
    git(home, "commit", "--quiet", "--message", "all")
    return home


def test_a_run_changes_no_tracked_file_and_a_trial_reports_its_own_scores(project, capsys):
    main(["notebooks", "tiny"])
    main(["notebooks", "tiny", "-p", "changes", '{"max_steps": 6, "runs": "runs/x y"}'])
    assert git(project, "status", "--porcelain") == ""
    trial = project / "runs/x y"
    made = [
        "notebooks/01_work.ipynb",
        "figures/empty.png",
        "figures/README.md",
        "results/scores.csv",
        "report.html",
    ]
    assert [name for name in made if not (trial / name).is_file()] == []
    said = capsys.readouterr().out.split("report     runs/tiny/report.html")[1]
    assert "65.4" in said and "85.4" not in said and said.rstrip().endswith("runs/x y/report.html")
    page = (trial / "report.html").read_text()
    assert "65.4" in page and "85.4" not in page and "max_steps" in page


def test_a_trial_without_scores_says_so(project, capsys):
    write(project / "notebooks", "02_none", code("1"))
    main(["notebooks", "tiny", "--notebooks", "02", "-p", "changes", '{"runs": "runs/trial"}'])
    assert "none yet: runs/trial/results/scores.csv" in capsys.readouterr().out


def test_a_deleted_figure_is_made_again(project, capsys):
    main(["notebooks", "tiny"])
    (project / "runs/tiny/figures/empty.png").unlink()
    main(["notebooks", "tiny"])
    assert (project / "runs/tiny/figures/empty.png").is_file()


def test_publishing_copies_a_whole_run_to_the_tracked_places(project):
    with pytest.raises(ValueError, match="01_work has not run to its end"):
        publish.publish_run("tiny")
    notebooks.run_notebooks("tiny", parameters={"changes": {"max_steps": 6}})
    with pytest.raises(ValueError, match="01_work ran with changes={'max_steps': 6}"):
        publish.publish_run("tiny")
    notebooks.run_notebooks("tiny")
    (scores := project / "runs/tiny/results/scores.csv").write_text("another")
    with pytest.raises(ValueError, match="results/scores.csv is not as a notebook left it"):
        publish.publish_run("tiny")
    assert git(project, "status", "--porcelain") == ""  # nothing was copied
    notebooks.run_notebooks("tiny", again=True)
    publish.publish_run("tiny")
    changed = {
        line[3:]
        for line in git(project, "status", "--porcelain", "--untracked-files=all").splitlines()
    }
    figures = {"figures/README.md", "figures/tiny/empty.png", "figures/tiny/empty.svg"}
    data = {"data/results/tiny.csv", "data/results/tiny_floors.csv"}
    assert changed == {"README.md", "notebooks/01_work.ipynb"} | figures | data
    assert (
        "65.4" in (project / "README.md").read_text()
        and "65.4" in (project / "data/results/tiny.csv").read_text()
    )
    assert scores.read_bytes() == (project / "data/results/tiny.csv").read_bytes()
    write(project / "notebooks", "01_work", code("2"))
    with pytest.raises(ValueError, match="01_work or the package has changed"):
        publish.publish_run("tiny")
    with pytest.raises(ValueError, match="'full_7b' is not published"):
        publish.publish_run("full_7b")


def test_claims_with_too_few_seeds_are_not_published():
    sources = notebooks.find_notebooks(config.ROOT / "notebooks", ["06"])
    found = publish.ledger()[["claim"]].assign(n_seeds=5)
    publish.check_seeds(found, publish.PLACES["tiny_frozen"], sources)
    found.loc[found.claim == "1a", "n_seeds"] = 4
    with pytest.raises(ValueError, match="claim 1a has 4 seeds, 5 are needed"):
        publish.check_seeds(found, publish.PLACES["tiny_frozen"], sources)


def test_what_a_notebook_shows_is_part_of_its_key(home, tmp_path, monkeypatch):
    """The tables in data/ and the captions of figures are no code, but a notebook shows them."""
    write(home / "books", "01_first", code("print()"))
    source = home / "books" / "01_first.ipynb"
    package = tmp_path / "package" / "vflan"
    (package / "analysis").mkdir(parents=True)
    monkeypatch.setattr(notebooks, "__file__", str(package / "tools" / "notebooks.py"))
    keys = [notebooks.source_key(source, {})]
    given = {"projector": "mine.bin"}  # of the project folder
    before = notebooks.source_key(source, given)
    (home / "mine.bin").write_bytes(b"another")
    assert notebooks.source_key(source, given) != before
    for file in (package / "analysis/captions.json", home / "data/floors.csv"):
        for content in ("a", "b"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
            keys.append(notebooks.source_key(source, {}))
    assert len(set(keys)) == 5 and keys[-1] == notebooks.source_key(source, {})
