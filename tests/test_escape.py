"""Foreign text stays text: in Markdown, in a spreadsheet, in a terminal."""

import csv
import re
from html import unescape
from urllib.parse import unquote

import mistune
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vflan.__main__ import main
from vflan.analysis.tables import (
    claims_markdown,
    floors_markdown,
    verdicts_markdown,
    write_gallery,
)
from vflan.escape import for_markdown, for_terminal
from vflan.evaluation.answer_cache import keep_scores, read_scores
from vflan.evaluation.evaluator import COLUMNS

PLUGINS = ["table", "url", "strikethrough", "footnotes", "task_lists", "math"]
READERS = [
    MarkdownIt("commonmark").enable(["table", "strikethrough"]).render,
    mistune.create_markdown(escape=False, plugins=PLUGINS),
]
PLACES = ["%s", "# %s", "- %s", "| a |\n|---|\n| %s |", "![%s](a.png)"]
MARKS = "![]()<>&|#-+*_`~\\$@:/.=^{}\"'12 aw"
EVIL = [
    "![x](https://evil.org/x.png)",
    "[x](https://evil.org)",
    "[x]: https://evil.org",
    "https://evil.org www.evil.org",
    "# heading",
    "<img src=x onerror=alert(1)>",
    "1. item",
    "2) item",
    "- item",
    "---",
    "===",
    "a | b",
    "**bold** __bold__ ~~gone~~ `code`",
    "$x^2$ and $$y$$",
    "[^1] [ ] [x]",
    "two\n\n# lines",
    "ends with \\",
    "&lt;b&gt;",
]


def tags(page):
    """The tags of a page of HTML, without those of paragraphs."""
    return set(re.findall(r"<(\w+)", page)) - {"p"}


def words(page):
    """What a browser would show of it, and the descriptions of its pictures."""
    page = re.sub(r'<img [^>]*alt="([^"]*)"[^>]*>', r"\1", page)
    return unescape(re.sub(r"<[^>]*>", "", page))


def is_text(text):
    """Markdown readers show the text as it is, wherever it stands."""
    for read in READERS:
        for place in PLACES:
            page = read(place % for_markdown(text))
            assert tags(page) == tags(read(place % "word")), (text, page)
            assert page.count("<img") == place.count("!["), (text, page)
            assert for_terminal(" ".join(text.split())) in words(page), (text, page)


@pytest.mark.parametrize("text", EVIL)
def test_foreign_text_is_no_markdown(text):
    is_text(text)


@settings(max_examples=300, deadline=None)
@given(st.text(MARKS, min_size=1, max_size=16))
def test_no_text_of_marks_is_markdown(text):
    is_text(text)


def test_plain_names_are_not_changed():
    for name in ("CLEVR_CoGenT+Question_Answering", "llava-v1.5-7b", "81.5", "Größe 3", "任务"):
        assert for_markdown(name) == name
    assert for_markdown(None) == ""


def test_hidden_characters_are_spelled_out_for_a_terminal():
    assert for_terminal("a\x1b[31mb\x9b\u202ec\r") == r"a\x1b[31mb\x9b\u202ec\r"
    assert for_terminal("two\nlines\tGröße 任务 \u200d") == "two\nlines\tGröße 任务 \u200d"


def test_an_error_on_the_command_line_sends_no_escape_sequence(capsys):
    assert main(["export", "no\x1b]0;title\x07\u202esuch", "out"]) == 1
    assert r"no\x1b]0;title\x07\u202esuch" in capsys.readouterr().err


NAMES = ["=1+1", "+1", "-1", "@a", "\tx", "\rx", " =1", "'=1", "''=1", "'a", "＝1", "a,b;=c",
         'a"b', "a\nb", "007", "NA", "nan", "None", "1e5", "true", " a ", "base"]  # fmt: skip


def test_scores_hold_no_formula_and_read_back_as_they_were(tmp_path):
    rows = [
        [name, "pope", f"accuracy/{name}", -1.5, -2.0, 1.25, 9, 3, 0.5, name, 0] for name in NAMES
    ]
    scores = pd.DataFrame(rows, columns=COLUMNS)
    path = tmp_path / "scores.csv"
    keep_scores(path, scores)
    keep_scores(path, scores[:1])  # reads the file, too
    pd.testing.assert_frame_equal(read_scores(path), scores, check_dtype=False)
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    texts = [line[header.index(column)] for line in lines for column in ("run", "judge")]
    assert len(texts) == 2 * len(NAMES)
    assert not [text for text in texts if re.match(r"\s*[=+\-@＝]|[\t\r\n]", text)]
    assert {line[header.index("value")] for line in lines} == {"-1.5000"}  # numbers stay numbers


def test_a_missing_number_reads_back_as_missing_and_a_missing_judge_as_none(tmp_path):
    row = ["base", "mme", "score", 1.0, float("nan"), 2.0, 9, 0, float("nan"), "", 0]
    keep_scores(tmp_path / "scores.csv", pd.DataFrame([row], columns=COLUMNS))
    (found,) = read_scores(tmp_path / "scores.csv").itertuples()
    assert pd.isna(found.low) and pd.isna(found.baseline) and found.judge == ""


def test_the_list_of_figures_shows_figures_only(tmp_path):
    """A picture's description, its file name and the preset's name are text."""
    folder, evil = tmp_path / "tiny", "![x](https://evil.org/x.png)\n# head [a](b) <b>"
    folder.mkdir()
    words = PngInfo()
    words.add_text("Description", evil)
    Image.new("RGB", (4, 4)).save(folder / "fig1_a) ![y](y.png.png", pnginfo=words)
    write_gallery("[p](q) # r", folder, tmp_path / "README.md")
    for read in READERS:
        page = read((tmp_path / "README.md").read_text(encoding="utf-8"))
        (address,) = re.findall(r'src="([^"]*)"', page)
        assert (tmp_path / unquote(address)).is_file()
        assert tags(page) == {"h1", "img"} and page.count("<h1") == 1
        assert unescape(page).count("![x](https://evil.org/x.png) # head [a](b) <b>") == 2


def test_the_tables_of_the_pages_show_names_as_text():
    evil = "![x](https://evil.org/x.png) | <b>"
    claim = dict(claim="1", statement=evil, n_seeds=1, effect=1.0, low=0.5, high=2.0, smallest=1)
    verdicts = pd.DataFrame([claim | dict(verdict="holds")])
    floors = pd.DataFrame([dict(run=evil, value=1.5, holds=False)])
    for page in (claims_markdown(verdicts), verdicts_markdown(verdicts), floors_markdown(floors)):
        for read in READERS:
            shown = read(page)
            assert not tags(shown) & {"a", "img", "b"} and evil in words(shown)
