"""The report of a preset: complete, readable offline, and no text in it becomes markup."""

import base64
import io
import json
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, PngImagePlugin

from vflan.analysis import tables
from vflan.tools.report import answer_rows, write_report

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """The tags and words of a page, as a browser would see them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def png(description=None):
    buffer, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if description:
        info.add_text("Description", description)
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def is_harmless(page):
    """No script can run on the page, and nothing is loaded from elsewhere."""
    forbidden = set("script iframe object embed link form svg base video input".split())
    assert not forbidden & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("src", "data:").startswith("data:"), attributes["src"]
        assert "javascript:" not in (attributes.get("href") or "")
        assert "url(" not in (attributes.get("style") or "")
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


@pytest.fixture
def home(tmp_path):
    """A project folder in which every text is hostile markup."""
    runs = tmp_path / "runs/tiny"
    results = runs / "results"
    results.mkdir(parents=True)
    columns = "run benchmark metric value low high n seed baseline".split()
    scores = [("projector", "pope", "f1", 60, 55, 65, 100, 0, 50)]
    scores += [("base", "pope", "f1", 81.5, 79, 84, 100, 0, 50)]
    pd.DataFrame(scores, columns=columns).to_csv(results / "scores.csv", index=False)
    columns = "claim statement comparison metric n_seeds effect low high verdict".split()
    rows = [("1", EVIL, "0.5 all - 0.5 few", "heldout:lenient", 2, 1.25, 0.5, 2.0, "holds")]
    rows += [("1a", "a part", "all - few", "pope:f1", 2, 1.25, 0.5, 2.0, "opposite")]
    claims = pd.DataFrame(rows, columns=columns)
    claims.to_csv(results / "claims.csv", index=False)
    (tmp_path / "bench/heldin").mkdir(parents=True)
    (tmp_path / "bench/images").mkdir()
    image = f"{EVIL.replace('/', '')}.png"
    (tmp_path / "bench/images" / image).write_bytes(png())
    texts = dict(text=f"ask {EVIL}", label=f"label {EVIL}", category=f"task {EVIL}")
    row = dict(question_id="1", image=image) | texts
    (tmp_path / "bench/heldin/questions.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("projector", "base"):
        (runs / name / "answers").mkdir(parents=True)
        recipe = dict(name=name, lr=0.5, benchmarks="bench", samples=f"{EVIL}.json")
        (runs / name / "recipe.json").write_text(json.dumps(recipe))
        (runs / name / "done.json").write_text(json.dumps(dict(steps=7, last_loss=0.125)))
        answer = dict(i=0, question_id="1", answer=f"{name} said {EVIL}", finish="stop", bytes=0)
        lines = [json.dumps(line) + "\n" for line in ({}, answer)]  # the first is the header
        (runs / name / "answers/heldin.jsonl").write_text("".join(lines))
    (runs / "figures").mkdir()
    (runs / "figures/fig4_a.png").write_bytes(png(f"More tasks help {EVIL}"))
    (runs / "notebooks").mkdir()
    html = f'<table style="color:red"><tr><th>kept</th></tr></table>{EVIL}'
    html += '<style>b { x: y }</style><svg onload="x()"/>'
    script = {"application/javascript": "alert(3)", "text/plain": "no script"}
    picture = {"image/png": base64.b64encode(png()).decode()}
    outputs = [new_output("stream", name="stdout", text=f"printed {EVIL}")]
    outputs += [new_output("display_data", data) for data in ({"text/html": html}, picture, script)]
    words = f"# Title\n\n> quoted\n\n[link](javascript:alert(4)) [page](https://arxiv.org) {EVIL}"
    words += "\n\n| a |\n|---|\n| b |"
    cells = [new_markdown_cell(words), new_code_cell("print('<image>')", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), runs / "notebooks/01_first.ipynb")
    return tmp_path


def report_of(home):
    record = dict(
        minutes=12.34,
        peak_gb=1.5,
        parameters={"word": EVIL},
        notebooks=[dict(name="01_first", minutes=3.25, peak_gb=0.5)],
    )
    scores = tables.score_rows(pd.read_csv(home / "runs/tiny/results/scores.csv"))
    figures = tables.pictures(home / "runs/tiny/figures")
    return write_report("tiny", home / "runs/tiny", record, home, scores, figures)


def test_all_results_are_on_one_page(home):
    path = report_of(home)
    page = Page(path)
    assert path == home / "runs/tiny/report.html" and not list(path.parent.glob("*.png"))
    for text in (
        "POPE F1 50.0 60.0 [55.0, 65.0] 81.5 [79.0, 84.0] 85.9 86.1", "Seeds: 0.",
        "1.25 0.5 2 holds",
        "3.2 minutes in all", "at most 0.5 GB", "lr 0.5 0.5", "base 7 0.125", "01_first 3.25 0.5",
        "transformers 5.", "cores",
    ):  # fmt: skip
        assert text in page.text
    assert {a["href"] for a in page.all("a")} == {"notebooks/01_first.html"}
    # one picture belongs to an answer, the other is the figure
    pictures = [base64.b64decode(img["src"].partition(",")[2]) for img in page.all("img")]
    assert [Image.open(io.BytesIO(data)).size for data in pictures] == [(40, 30), (40, 30)]


def test_no_text_of_data_or_models_becomes_markup(home):
    path = report_of(home)
    page = Page(path)
    is_harmless(page)
    for words in ("ask", "label", "task", "projector said", "base said", "More tasks help"):
        assert f"{words} {EVIL}" in page.text or f"{words} {EVIL}" in str(page.all("img")), words
    assert page.text.count(EVIL) >= 9  # those, the claim, the parameter, the two recipes


def test_notebooks_become_pages_on_which_nothing_can_run(home):
    report_of(home)
    page = Page(home / "runs/tiny/notebooks/01_first.html")
    is_harmless(page)
    used = {tag for tag, _ in page.tags}
    assert {"h1", "blockquote", "table", "th", "pre", "img"} <= used
    assert "kept" in page.text and "print('<image>')" in page.text.replace(" ", "")
    assert f"printed {EVIL}" in page.text and "no script" in page.text
    assert "{ x: y }" not in page.text
    assert "https://arxiv.org" in {a.get("href") for a in page.all("a")}


def test_a_notebooks_page_is_written_again_only_when_the_notebook_changed(home):
    page = home / "runs/tiny/notebooks/01_first.html"
    report_of(home)
    made = page.stat().st_mtime_ns
    report_of(home)
    assert page.stat().st_mtime_ns == made
    nbformat.write(new_notebook(cells=[new_markdown_cell("# New")]), page.with_suffix(".ipynb"))
    report_of(home)
    assert "New" in Page(page).text


def test_a_preset_without_results_has_a_short_report(tmp_path):
    (tmp_path / "runs/mine/notebooks").mkdir(parents=True)
    record = dict(minutes=0.1, peak_gb=0.1, parameters={}, notebooks=[])
    page = Page(write_report("mine", tmp_path / "runs/mine", record, tmp_path))
    is_harmless(page)
    assert "vflan: mine" in page.text and "Python 3." in page.text and "Scores" not in page.text


def test_the_report_begins_with_what_came_out(home):
    """Three sentences and a figure, before any table; a claim's formula is left out."""
    (home / "runs/tiny/figures/table2.png").write_bytes(png("All benchmarks."))
    page = Page(report_of(home))
    begin, _, rest = page.text.partition("Scores")
    assert begin.endswith(
        "Beside the projector stage, Base is better on 1 of 1 benchmarks (most on POPE F1: 81.5 "
        "after 60.0). Of the paper's 1 claims measured: 1 holds. All benchmarks. "
    )
    assert [image["alt"] for image in page.all("img")][0] == "All benchmarks."
    assert "0.5 all" not in page.text and "heldout:lenient" not in page.text
    assert rest.index("Claims of the paper") < rest.index("Figures") < rest.index("Recipe")


def test_numbers_are_aligned_and_never_break(home):
    page = Page(report_of(home))
    heads = [attributes.get("class") for attributes in page.all("th")]
    assert "n" in heads and None in heads
    style = " ".join(page.words)
    assert ".n { text-align: right; white-space: nowrap }" in style and "anywhere" not in style
    assert "@media print" in style and "max-width: 30em" in style


def test_answers_that_changed_are_shown_rather_than_others(home):
    stages = {name: home / "runs/tiny" / name for name in ("projector", "base")}
    questions = [dict(question_id=str(i), text=f"question {i}", label="yes") for i in range(9)]
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    (home / "bench/heldin/questions.jsonl").write_text(lines)
    for name, folder in stages.items():
        said = ["Yes." if i == 4 and name == "base" else "no" for i in range(9)]
        rows = [{}] + [dict(i=i, question_id=str(i), answer=text, finish="stop", bytes=0)
                       for i, text in enumerate(said)]  # fmt: skip
        (folder / "answers/heldin.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    title, _, rows = answer_rows(stages, home)
    assert title.startswith("Answers that changed")
    assert [row[2:] for row in rows] == [["question 4", "yes", "no", "Yes.", ""]]


def test_answers_are_shown_where_the_benchmarks_are_in_the_home_folder(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    stages = {name: home / "runs/tiny" / name for name in ("projector", "base")}
    for folder in stages.values():
        recipe = json.loads((folder / "recipe.json").read_text()) | dict(benchmarks="~/bench")
        (folder / "recipe.json").write_text(json.dumps(recipe))
    assert len(answer_rows(stages, home)[2]) == 1


def test_figures_stand_in_the_order_of_the_paper(tmp_path):
    for name in ("mine", "table6", "fig4_task_diversity", "fig9_to_12", "table2", "fig12_b"):
        (tmp_path / f"{name}.png").write_bytes(png())
    names = [path.stem for path, _ in tables.pictures(tmp_path)]
    assert names == ["table2", "fig4_task_diversity", "fig9_to_12", "table6", "fig12_b", "mine"]


def test_the_summary_calls_only_what_is_apart_better_or_worse():
    columns = "run benchmark metric value low high n seed baseline".split()
    rows = [("projector", "pope", "f1", 60, 55, 65), ("base", "pope", "f1", 64, 59, 69),
            ("chat", "pope", "f1", 40, 35, 45)]  # fmt: skip
    scores = pd.DataFrame([(*row, 100, 0, 50) for row in rows], columns=columns)
    floors = pd.DataFrame(dict(holds=["True", "False", ""]))
    assert tables.summary(scores, floors) == [
        "Beside the projector stage, Base is neither better nor worse on any of 1 benchmarks.",
        "Beside Base, Chat is worse on 1 of 1 benchmarks (most on POPE F1: 40.0 after 64.0).",
        "1 of 2 floors hold.",
    ]
