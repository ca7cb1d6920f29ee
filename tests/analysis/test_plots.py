"""Figures: readable, with intervals, honest about unconfirmed numbers, safe with any text."""

import subprocess
import sys
import zipfile
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vflan import config, plots
from vflan.analysis import tables
from vflan.analysis.claims import VERDICTS
from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.stats import bootstrap


@pytest.fixture(autouse=True)
def closed_figures():
    plots.style()
    yield
    plt.close("all")


@pytest.fixture
def scores():
    rows = []
    for k, run in enumerate(["projector", "base", "chat", "base-100"]):
        for b in BENCHMARKS.values():
            for metric in {b.headline, "yes_ratio"} if b.name == "pope" else {b.headline}:
                rows.append([run, b.name, metric, 50.0 + k, 45.0, 60.0, 100, 0, 33.0])
    return pd.DataFrame(
        rows,
        columns=["run", "benchmark", "metric", "value", "low", "high", "n", "seed", "baseline"],
    )


def texts(fig):
    fig.canvas.draw()
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text)]


def marks(ax, marker):
    return [line.get_xdata()[0] for line in ax.lines if line.get_marker() == marker]


def majority(ax):
    """The x of each short dotted line: the one mark of the majority answer."""
    return [segment[0][0] for group in ax.collections if group.get_linestyles()[0][1]
            for segment in group.get_segments()]  # fmt: skip


def test_importing_all_plots_imports_neither_torch_nor_transformers():
    code = "import sys; from vflan.analysis.plots import *; assert table2 and gallery and save; "
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=config.ROOT).returncode == 0


def test_saving_a_figure_twice_gives_the_same_bytes_and_a_large_svg_is_deleted(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    fig, ax = plt.subplots()
    ax.plot([1, 2])
    first = plots.save(fig, "line", "some-preset")
    content = first.read_bytes(), first.with_suffix(".svg").read_bytes()
    plots.save(fig, "line", "some-preset")
    assert first == tmp_path / "runs" / "some-preset" / "figures" / "line.png"
    assert (first.read_bytes(), first.with_suffix(".svg").read_bytes()) == content
    ax.scatter(*np.random.default_rng(0).random((2, 9000)))
    plots.save(fig, "line", "some-preset")
    assert first.exists() and not first.with_suffix(".svg").exists()


def test_text_with_markup_is_drawn_literally(tmp_path):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "x.png")
    odd = "costs $5 <b>& \\frac{1}{0}$ {x} %s \u2603"
    sample = {"image": str(tmp_path / "x.png"), "task_name": "a_$_task", "conversations": [
        {"from": "human", "value": "<image>\n" + odd}, {"from": "gpt", "value": odd}]}  # fmt: skip
    shown = "\n".join(texts(plots.gallery([sample, sample | {"image": None}])))
    assert "costs $5 <b>&" in shown and "<image>" not in shown and "text only" in shown
    question = {"image": None, "text": odd, "label": odd, "category": "x"}
    shown = "\n".join(texts(plots.before_after([question], {"base": [odd], "chat": [""]})))
    assert "$5" in shown and "(nothing)" in shown


def test_a_missing_picture_shows_the_reason_and_one_in_a_zip_is_drawn(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    fig, axes = plt.subplots(1, 3)
    for ax, name in zip(axes, (f"{tmp_path}/a.zip::a.png", f"{tmp_path}/gone.png", None)):
        plots.show(ax, name)
    assert [len(ax.images) for ax in axes] == [1, 0, 0]
    assert [ax.texts[0].get_text() for ax in axes[1:]] == ["missing picture", "text only"]


def test_long_texts_are_cut_with_an_ellipsis():
    assert plots.wrap("one two three four", 9) == "one two\nthree\nfour"
    assert plots.wrap("one two three four", 9, lines=1) == "one two\u2026"
    assert plots.wrap("", 9) == "" and plots.wrap("a\n\nb", 9) == "a\nb"


def test_an_answer_that_equals_the_label_is_bold():
    question = {"image": None, "text": "What color?", "label": "red", "category": "x"}
    fig = plots.before_after([question], {"base": ["Red."], "chat": ["It is red."]})
    weight = {t.get_text(): t.get_weight() for t in fig.findobj(matplotlib.text.Text)}
    assert weight["Red."] == "bold" and weight["It is red."] != "bold"


def test_a_question_without_a_label_can_be_shown():
    fig = plots.before_after([{"image": None, "text": "Describe it."}], {"base": [""]})
    weight = {t.get_text(): t.get_weight() for t in fig.findobj(matplotlib.text.Text)}
    assert "Describe it." in weight and weight["(nothing)"] != "bold"


def test_a_question_of_a_test_set_has_no_answer_to_show():
    question = {"image": None, "text": "What color?", "label": None, "category": None}
    shown = texts(plots.gallery([question]))
    assert "What color?" in shown and "None" not in shown


def test_learned_tokens_are_orange_and_the_picture_is_one_blue_box():
    words = SimpleNamespace(decode=lambda ids: ["\n", " red", "</s>"][ids[0]])
    fig = plots.tokens([0, -200, 1, 2], [-100, -100, 1, 2], words)
    colors = [patch.get_facecolor() for patch in fig.axes[0].patches]
    assert colors[2] == colors[3] != colors[0] and colors[1] not in (colors[0], colors[2])
    assert [t.get_text() for t in fig.axes[0].texts][:4] == ["\u21b5", "picture", "red", "</s>"]
    with pytest.raises(ValueError, match="equally long"):
        plots.tokens([1], [], words)


def test_source_shows_the_real_code():
    assert "def bootstrap(" in plots.source(bootstrap).data


def test_table_2_shows_the_papers_value_in_grey_hollow_where_it_is_not_confirmed(scores):
    fig = plots.table2(scores[scores.run.isin(["projector", "base", "chat"])])
    axes = {ax.get_title(loc="left"): ax for ax in fig.axes}
    assert marks(axes["MMBench"], "D") == [69.8, 67.6]
    assert marks(axes["MME"], "D") == [1537.8 / 20, 1490.6 / 20]
    assert marks(axes["MMBench"], "o") == [50, 51, 52] and majority(axes["MMBench"]) == [33, 33, 33]
    dots = [line.get_color() for line in axes["MMBench"].lines if line.get_marker() == "o"]
    assert dots == [plots.MODEL_COLORS[stage] for stage in ("projector", "base", "chat")]
    fills = [
        line.get_markerfacecolor() for line in axes["forgetting"].lines if line.get_marker() == "D"
    ]
    assert fills == ["white", "white"]
    assert marks(axes["held-in tasks"], "D") == []
    assert {"projector", "base", "chat"} <= set(texts(fig))


def test_parts_are_compared_with_the_rows_of_their_table(scores):
    fig = plots.parts_table(
        scores, {"projector": "LLM frozen, MLP frozen", "base": "LLM tuned, MLP tuned"}, "Table 5"
    )
    axes = {ax.get_title(loc="left"): ax for ax in fig.axes}
    assert marks(axes["POPE"], "D") == [51.9, 85.9] and marks(axes["forgetting"], "D") == []
    assert "paper, 13B" in texts(fig)


def test_a_legend_names_only_what_is_drawn(scores):
    """Table 7 has no numbers of the paper: a diamond in the legend would be looked for in vain."""
    drawn = texts(plots.dots(scores, {"base": ("all", None)}, "Table 7", ["mme"]))
    assert "majority answer" in drawn and "paper, 13B" not in drawn
    fig = plots.dots(scores, {"base": ("Base", "Vision-Flan Base")}, "Table 2", ["forgetting"])
    assert "paper, 13B, not confirmed" in texts(fig) and "paper, 13B" not in texts(fig)


def test_no_legend_names_a_majority_answer_where_none_is_known(scores):
    """A model as judge has none: its answers would cost calls."""
    kinds = scores.assign(metric="accuracy/" + scores.run, baseline=np.nan)
    unknown = scores.assign(baseline=np.nan)
    for fig in (
        plots.table2(unknown),
        plots.diversity(unknown, {"base": 2}),
        plots.categories(kinds, ["heldin"]),
    ):
        assert "majority answer" not in texts(fig)
    some = scores.assign(baseline=scores.baseline.where(scores.benchmark == "pope"))
    assert "majority answer" in texts(plots.diversity(some, {"base": 2}))


def test_a_figure_without_panels_says_so(scores):
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.table2(scores.iloc[:0])


def test_the_share_of_yes_of_each_stage_stands_under_its_own_colour():
    rows = [
        (run, "pope", f"yes_ratio/{setting}", value, value - 4, value + 4, seed)
        for run, value in (("projector", 67), ("base", 50), ("chat", 49))
        for seed in (0, 1)
        for setting in ("random", "popular")
    ]
    names = ["run", "benchmark", "metric", "value", "low", "high", "seed"]
    fig = plots.yes_ratio(pd.DataFrame(rows, columns=names))
    ax = fig.axes[0]
    dots = {line.get_color(): line.get_ydata()[0] for line in ax.lines if line.get_marker() == "o"}
    named = {handle.get_label(): handle.get_color() for handle in ax.get_legend().legend_handles}
    for run, value in (("projector", 67), ("base", 50), ("chat", 49)):
        assert dots[named[f"{run}, 95 % interval"]] == value
    assert named["the truth"] == plots.INK and ax.get_ylabel() == "share of yes, %"


def test_a_model_has_one_colour_everywhere():
    colors = plots.model_colors(["Base", "base-seed3", "projector stage", "only-tasks", "Chat"])
    assert colors["Base"] == colors["base-seed3"] == plots.MODEL_COLORS["base"]
    assert colors["projector stage"] == plots.MODEL_COLORS["projector"]
    assert colors["only-tasks"] not in plots.MODEL_COLORS.values()


def test_maps_of_attention_have_one_scale_and_say_its_unit(tmp_path):
    Image.new("RGB", (48, 48), "red").save(tmp_path / "x.png")
    layers = [np.full((4, 4), share / 16) for share in (0.1, 0.5)]
    fig = plots.attention_figure(str(tmp_path / "x.png"), {"the star?": layers})
    limits = {image.get_clim() for ax in fig.axes[1:3] for image in ax.images}
    assert limits == {(0, 100 * 0.5 / 16)}
    assert {"layer 1: 10%", "layer 2: 50%", "share of a layer's attention, %"} <= set(texts(fig))


def test_a_saved_figure_carries_its_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    path = plots.save(plt.figure(), "attention", "some-preset")
    with Image.open(path) as image:
        assert image.text["Description"] == tables.caption(path).strip()
    assert tables.caption(path).startswith("How much each layer")


def test_curves_have_a_point_for_every_amount_and_name_their_lines(scores):
    fig = plots.gpt4_curves(
        scores, {"base": ("Base", 0), "base-100": ("Base", 100), "projector": ("projector", 0)}, 7
    )
    assert [ax.get_title(loc="left") for ax in fig.axes] == [
        "Figure 7: POPE, F1",
        "Figure 7: share of yes",
    ]
    assert list(fig.axes[0].lines[1].get_xdata()) == [0, 100]
    assert {"Base", "projector", "majority answer"} <= set(texts(fig))
    assert (
        len(plots.gpt4_curves(scores, {"base": ("Base", 0), "base-100": ("Base", 100)}).axes) == 6
    )
    with pytest.raises(ValueError, match="choose 5, 6, 7 or 8"):
        plots.gpt4_curves(scores, {}, 9)
    assert len(plots.diversity(scores, {"base": 2, "chat": 8}, ["mme", "pope"]).axes) == 2


def test_bubbles_do_not_overlap_and_their_area_is_the_number_of_tasks():
    radii = np.sqrt(np.array([25, 21, 9, 5, 3, 3, 1]) / np.pi)
    at = plots.pack_circles(radii)
    gaps = np.linalg.norm(at[:, None] - at, axis=-1) - radii - radii[:, None]
    assert gaps[~np.eye(len(radii), dtype=bool)].min() > -1e-6
    fig = plots.task_bubbles(plots.paper_tasks())
    circles = [p for p in fig.axes[0].patches if isinstance(p, plt.Circle)]
    assert len(circles) == 25 and sum(
        np.pi * c.get_radius() ** 2 for c in circles
    ) == pytest.approx(188)
    assert any("188 tasks in 25 categories" in t for t in texts(fig))


def test_a_bubble_too_small_for_its_name_is_named_below():
    tasks = pd.DataFrame({"category": ["a"] * 900 + ["paraphrase of a whole sentence"]})
    fig = plots.task_bubbles({"mine": tasks.assign(group="generation")})
    assert "small: paraphrase of a whole sentence" in " ".join(texts(fig)).replace("\n", " ")


def test_a_loss_curve_is_drawn_for_every_run():
    table = pd.DataFrame({"step": range(50), "loss": np.linspace(3, 1, 50)})
    runs = [SimpleNamespace(name=name, metrics=lambda: table) for name in ("base", "chat")]
    fig = plots.loss_curve(*runs)
    assert len(fig.axes[0].lines) == 4 and "chat: mean of the last 5 steps 1.08" in texts(fig)


def test_steps_of_text_alone_are_crosses_outside_the_mean():
    loss = np.where(np.arange(50) == 20, 10.0, 1.0)
    table = pd.DataFrame({"step": range(50), "loss": loss, "pictures": 16 * (loss < 10)})
    fig = plots.loss_curve(SimpleNamespace(name="chat", metrics=lambda: table), smooth=0.2)
    assert marks(fig.axes[1], "x") == [20] and "Steps of text alone" in texts(fig)
    (mean,) = [line for line in fig.axes[0].lines if line.get_label().startswith("chat")]
    assert set(mean.get_ydata()) == {1.0}


def test_colours_stay_apart_for_colour_blind_readers():
    """Simulated deuteranopia (Vienot 1999, linear RGB) keeps the first four colours distinct."""
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in plots.COLORS[:4]]) ** 2.2
    simulated = rgb @ np.array(
        [[0.29275, 0.29275, -0.02234], [0.70725, 0.70725, 0.02234], [0, 0, 1]]
    )
    apart = np.linalg.norm(simulated[:, None] - simulated, axis=-1)[np.triu_indices(4, 1)]
    assert apart.min() > 0.1


def test_packed_rows_show_every_conversation_and_the_padding():
    turn = ([1, -200, -200, 5, 6], [-100, -100, -100, 5, 6])
    ax = plots.packed_rows([[turn, turn], [turn]], budget=12).axes[0]
    bars = [
        path for group in ax.collections for path in group.get_paths() if len(path.vertices) >= 4
    ]
    # read, picture and learned parts of three conversations, and padding after each of two rows
    assert len(bars) == 3 * 3 + 2
    assert ax.get_xlim() == (0, 12)


def verdict_rows(*rows):
    cells = [
        [claim, f"statement {claim}", "a - b", "x:y", n, effect, low, high, 3.0, verdict]
        for claim, n, effect, low, high, verdict in rows
    ]
    return pd.DataFrame(cells, columns=VERDICTS)


def test_the_forest_plot_shows_each_claim_with_its_interval_verdict_and_the_long_form():
    measured = verdict_rows(
        ("1", 5, 9.0, 4.0, 14.0, "holds"), ("1a", 1, 2.0, np.nan, np.nan, "not enough runs")
    )
    long = verdict_rows(("1a", 5, -3.0, -6.0, 1.0, "does not hold at this scale"))
    fig = plots.forest_plot(measured, long)
    text = " ".join(texts(fig))
    for part in ("1  statement 1", "1a", "committed long form", "not enough runs"):
        assert part in text
    ax = fig.axes[0]
    assert sorted(marks(ax, "o")) == [-3.0, 2.0, 9.0]
    spans = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert (4.0, 14.0) in spans and (-6.0, 1.0) in spans


def test_categories_show_the_mean_of_their_kinds_for_each_stage():
    kinds = {"red": 10, "blue": 30, "cat": 50}
    rows = [
        [run, "heldin", f"accuracy/{kind}", value + shift, value + shift - 6, value + shift + 8, 20]
        for run, shift in (("base", 0), ("base-seed1", 2), ("chat", 20))
        for kind, value in kinds.items()
    ]
    columns = ["run", "benchmark", "metric", "value", "low", "high", "baseline"]
    scores = pd.DataFrame(rows, columns=columns)
    ax = plots.categories(scores, ["heldin"], {"red": "color", "blue": "color"}).axes[0]
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    lines = {line.get_label(): dict(zip(names, line.get_xdata())) for line in ax.lines}
    assert lines["base"] == {"color": 21, "cat": 51} and lines["chat"] == {"color": 40, "cat": 70}
    assert majority(ax) == [20, 20]
    # two kinds of 6 below and 8 above: sqrt(2) times as much, halved
    spans = {tuple(segment[:, 0].round(4)) for group in ax.collections[1:2]
             for segment in group.get_segments()}  # fmt: skip
    assert spans == {(round(21 - 6 / 2**0.5, 4), round(21 + 8 / 2**0.5, 4)), (45, 59)}


@pytest.mark.filterwarnings("error")  # pandas 4 will refuse what pandas 3 warns of
def test_a_kind_keeps_a_slash_in_its_name():
    columns = ["run", "benchmark", "metric", "value", "low", "high", "baseline"]
    rows = [["base", "vqav2", f"accuracy/{kind}", 50, 40, 60, 20] for kind in ("yes/no", "other")]
    (ax,) = plots.categories(pd.DataFrame(rows, columns=columns), ["vqav2"]).axes
    assert {tick.get_text() for tick in ax.get_yticklabels()} == {"yes/no", "other"}


def test_affinity_is_the_gain_over_the_start_by_category():
    rows = []
    for run, values in {
        "projector": (40, 50, 20),
        "category-one": (60, 70, 25),
        "category-two": (40, 40, 80),
    }.items():
        for task, value in zip(("a", "b", "c"), values):
            rows.append([run, "heldin", f"accuracy/{task}", value])
    scores = pd.DataFrame(rows, columns=["run", "benchmark", "metric", "value"])
    fig = plots.affinity(
        scores, ["category-one", "category-two"], {"a": "one", "b": "one", "c": "two"}
    )
    gain = fig.axes[0].images[0].get_array()
    assert np.allclose(gain, [[20, 5], [-5, 60]])


def test_learning_curves_have_a_panel_a_category_and_a_line_a_task():
    rows = [[s, t, 1.0 / (s + 1), 5] for s in (0, 10) for t in ("a", "b", "c", "all")]
    heldout = pd.DataFrame(rows, columns=["step", "task", "loss", "tokens"])
    fig = plots.learning_curves(heldout, {"a": "one", "b": "one", "c": "two"})
    panels = [ax for ax in fig.axes if ax.lines]
    assert [(ax.get_title(loc="left") or ax.get_title(), len(ax.lines)) for ax in panels] == [
        ("one (2)", 2),
        ("two (1)", 1),
    ]


def test_a_committed_figure_that_does_not_exist_is_reported(capsys):
    plots.committed_figure("affinity", "no such preset")
    assert "make paper" in capsys.readouterr().out


def test_the_mask_of_a_packed_row_is_blocks_of_ones_past():
    (ax,) = plots.attention_mask([2, 3]).axes
    mask = np.asarray(ax.images[0].get_array()).astype(int)
    assert mask.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert [text.get_text() for text in ax.get_xticklabels()] == [
        "conversation 1",
        "conversation 2",
    ]


def test_a_table_stands_beside_the_papers_number_by_number(scores):
    rows = {"Vision-Flan Base": "base", "Vision-Flan Chat": "chat"}
    table = tables.compared_with_paper("Table 2", rows, scores)
    assert table.loc["Vision-Flan Base", ("MMBench", "paper")] == 69.8
    assert table.loc["Vision-Flan Base", ("MME", "paper")] == 76.9  # 1537.8 of 2000 points
    assert table.loc["Vision-Flan Chat", ("MMBench", "here")] == 52
    assert ("held-in tasks", "paper") not in table
    sentence = tables.in_a_sentence(table, *rows)
    assert "MMBench goes from 69.8 to 67.6 in the paper, 51.0 to 52.0 here" in sentence
    missing = tables.compared_with_paper("Table 2", rows | {"LLaVA": "nowhere"}, scores)
    assert np.isnan(missing.loc["LLaVA", ("MMBench", "here")])


def test_the_committed_long_form_stands_beside_tables_3_to_7():
    for item, rows in {
        "Table 3": {"10 x 10,000": "tasks-2-of-1500", "187 x 500": "tasks-53-of-1500"},
        "Table 4": {"mixed, 158,000": "one-stage", "two-stage, 1,000": "chat"},
        "Table 5": {"LLM frozen, MLP frozen": "projector", "LLM tuned, MLP tuned": "both"},
        "Table 6": {"Base": "base", "Base + pretrained MLP": "base/old-projector"},
        "Table 7": {"Base": "base", "Base + LLaMA-2-Chat": "base/other-lm"},
    }.items():
        table = tables.compared_with_paper(item, rows)
        assert table.notna().all(axis=None) and len(table.columns) >= 4, item


def test_the_committed_long_form_is_found_where_vflan_is_installed(monkeypatch, tmp_path):
    """There the project folder is the working directory, without the files of a clone."""
    rows = {"Base": "base", "Base + LLaMA-2-Chat": "base/other-lm"}
    here = tables.compared_with_paper("Table 7", rows)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.compared_with_paper("Table 7", rows).equals(here)


def test_a_comparison_without_numbers_says_so(scores):
    rows = {"Vision-Flan Base": "base", "Vision-Flan Chat": "nowhere"}
    table = tables.compared_with_paper("Table 2", rows, scores)
    assert tables.in_a_sentence(table, *rows).endswith("no benchmark has all four numbers.")


def test_tables_leave_out_what_is_not_known(scores):
    """A model as judge answers for no majority, and one seed has no interval."""
    text = tables.scores_markdown(scores.assign(baseline=np.nan))
    assert "nan" not in text and "| POPE F1 |  | 50.0 [45.0, 60.0] |" in text
    measured = verdict_rows(
        ("1", 5, 9.0, 4.0, 14.0, "holds"),
        ("2", 1, 2.0, np.nan, np.nan, "not enough runs"),
        ("3", 0, np.nan, np.nan, np.nan, "not enough runs"),
    )
    text = tables.claims_markdown(measured)
    assert "| 5 | +9.0 [4.0, 14.0] |" in text and "| 1 | +2.0 |" in text and "| 0 |  |" in text
    assert "(2) statement 2: +2.0; (3) statement 3." in tables.verdicts_markdown(measured)


@pytest.mark.parametrize(
    "name, caption",
    [
        ("fig4_mine", "Figure 4: mine"),
        ("figure_1", "figure 1"),
        ("tables_of_mine", "tables of mine"),
    ],
)
def test_a_file_name_in_words(tmp_path, name, caption):
    Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert tables.caption(tmp_path / f"{name}.png") == caption


def test_a_notebook_opens_with_a_committed_picture_or_nothing(capsys, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    plots.opening("docs/architecture.svg")
    plots.opening("figures/tiny/table2.png")
    plots.opening("docs/nowhere.png")
    assert [type(one).__name__ for one in shown] == ["SVG", "Image"]
