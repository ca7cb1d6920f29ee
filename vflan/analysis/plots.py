"""The figures, one function for each of the paper's, and the pictures and texts one looks at on the way. No torch here.

Every comparison shows intervals and, where the paper prints a number, that number as a grey mark. The mini world is
not the paper's world: the marks say in which direction to look, not where to arrive.
"""

import inspect
import io
import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from vflan.analysis.claims import READ
from vflan.config import output_folder, resolve
from vflan.config import shown as shown_path
from vflan.data.images import read_picture
from vflan.evaluation.benchmarks import BENCHMARKS

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY, PALE, INK = "#8A8A8A", "#EDEDED", "#222222"
TOKEN_COLORS = {"learned": "#F6C9A8", "only read": PALE, "picture": "#BFDDF0"}
TITLES = {"heldin": "held-in tasks", "heldout": "held-out tasks", "mmbench": "MMBench", "mme": "MME", "pope": "POPE",
          "llava_bench": "LLaVA-Bench", "forgetting": "forgetting", "mm_vet": "MM-Vet", "mmmu": "MMMU", "gqa": "GQA",
          "mmbench_cn": "MMBench-CN", "seed": "SEED-Bench", "vqav2": "VQAv2", "vizwiz": "VizWiz", "textvqa": "TextVQA",
          "scienceqa": "ScienceQA", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mnist": "MNIST",
          "miniimagenet": "miniImageNet", "textocr": "TextOCR", "wit": "WIT"}  # fmt: skip
UNITS = {"f1": "F1", "score": "score", "accuracy": "accuracy, %", "yes_ratio": "share of yes, %"}
SVG_LIMIT = 200_000  # bytes


def style():
    """Use the house style, figures/vflan.mplstyle, for every figure from here on."""
    plt.style.use(resolve("figures/vflan.mplstyle"))


def save(fig, name, album="tiny"):
    """Write runs/<album>/figures/name.png, and name.svg where that stays under 200 KB; returns the path of the png.

    album: the name of a preset, or its folder of runs. The files hold no date, so that the same figure is the same file.
    """
    folder = output_folder(album, "figures")
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    fig.savefig(png, metadata={"Software": None})
    fig.savefig(svg, metadata={"Date": None})
    if svg.stat().st_size > SVG_LIMIT:
        svg.unlink()
    return png


def source(obj):
    """The real source of a function or class, coloured: a notebook quotes the package, it never copies it."""
    from IPython.display import Code

    return Code(inspect.getsource(obj), language="python")


def paper():
    """data/paper.csv: the printed numbers of both papers (paper, item, row, column, value, unit, confirmed, note)."""
    return pd.read_csv(resolve("data/paper.csv"), keep_default_na=False)


def released_tasks():
    """data/tasks.csv: the 205 task names of the project's site and where each stands in the paper's list."""
    return pd.read_csv(resolve("data/tasks.csv"), keep_default_na=False)


def paper_tasks():
    """The 188 tasks of the paper's lists; four of them have two candidates among the released names, counted once."""
    tasks = released_tasks()
    return tasks[tasks.in_paper != "no"].drop_duplicates("note")


# -------------------------------------------------------------------------------------------------- pictures and texts


def turns(sample):
    """(task, question, answer) of a LLaVA sample (its first exchange) or of a benchmark question."""
    if "conversations" in sample:
        said = [t["value"].replace("<image>", "").strip() for t in sample["conversations"]]
        return sample.get("task_name") or "", said[0], said[1] if len(said) > 1 else ""
    return sample.get("category", ""), sample["text"], sample.get("label", "")


def question(sample):
    """A LLaVA sample as something to ask: its picture, question and answer in the shape of a benchmark's question."""
    task, text, label = turns(sample)
    return {"image": sample.get("image"), "text": text, "label": label, "category": task}


def wrap(text, width, lines=None):
    """`text` in lines of at most `width` characters, no blank ones; with `lines`, cut there and marked by an
    ellipsis."""
    out = [piece for line in str(text).splitlines() for piece in textwrap.wrap(line, width)]
    if lines and len(out) > lines:
        out = out[:lines]
        out[-1] = out[-1][: width - 1].rstrip() + "\u2026"
    return "\n".join(out)


def write(ax, x, y, text, **more):
    """Text as it is: a dollar sign in an answer is no formula."""
    return ax.text(
        x, y, text, **{"va": "top", "parse_math": False, "transform": ax.transAxes} | more
    )


def show(ax, path):
    """A picture without axes, small ones with hard pixels; a grey field that says why where there is none."""
    ax.set_axis_off()
    try:
        image, reason = read_picture(path) if path else None, "text only"
    except OSError as trouble:
        image, reason = None, str(trouble).split(":")[0]  # its kind: "missing picture"
    if image is None:
        ax.add_patch(plt.Rectangle((0, 0), 1, 1, color=PALE, transform=ax.transAxes))
        write(ax, 0.5, 0.5, reason, ha="center", va="center", color=GREY)
        return
    ax.imshow(image, interpolation="nearest" if max(image.size) < 200 else "antialiased")
    ax.set_anchor("N")


def gallery(samples, n=8, columns=4):
    """A grid of `n` samples: the picture, the task, the instruction and the answer. Samples are rows with an image
    path."""
    rows = [samples[i] for i in range(min(n, len(samples)))]
    columns = min(columns, len(rows))
    height, width = -(-len(rows) // columns), 33 if columns >= 4 else 44
    fig = plt.figure(figsize=((2.3 if columns >= 4 else 3) * columns, 3.3 * height), layout="none")
    cells = fig.add_gridspec(2 * height, columns, height_ratios=[1.7, 1.4] * height, hspace=0.05, wspace=0.12,
                             left=0.01, right=0.99, top=0.99, bottom=0.01)  # fmt: skip
    for i, sample in enumerate(rows):
        row, column = divmod(i, columns)
        task, question, reply = turns(sample)
        show(fig.add_subplot(cells[2 * row, column]), sample.get("image"))
        ax = fig.add_subplot(cells[2 * row + 1, column])
        ax.set_axis_off()
        question, reply = (
            wrap(question, width, 6),
            wrap(reply, width - 3, 4),
        )  # bold letters are wider
        write(
            ax,
            0,
            0.98,
            wrap(task.replace("_", " "), width - 4, 1),
            fontsize=7.5,
            color=GREY,
            weight="bold",
        )
        write(ax, 0, 0.86, question, fontsize=7.5)
        write(
            ax,
            0,
            0.83 - 0.094 * (question.count("\n") + 1),
            reply,
            fontsize=7.5,
            color=COLORS[0],
            weight="bold",
        )
    return fig


def before_after(questions, answers, n=6):
    """The same questions put to several runs. answers: {run: list of answers}; a right short answer is bold.

    questions: benchmark samples (image, text, label).
    """
    questions = [questions[i] for i in range(min(n, len(questions)))]
    width = max(18, 84 // (len(answers) + 1))
    asked = [turns(q)[1] + f"\n[{q['label']}]" * bool(q.get("label")) for q in questions]
    said = [[a[i] or "(nothing)" for a in answers.values()] for i in range(len(questions))]
    cells = [
        [wrap(text, width, 8) for text in row] for row in ([q, *a] for q, a in zip(asked, said))
    ]
    heights = [max(5, max(c.count("\n") + 1 for c in row)) for row in cells]
    fig = plt.figure(figsize=(9, 0.35 + 0.155 * (sum(heights) + len(heights))), layout="none")
    top = 1 - 0.3 / fig.get_figheight()
    grid = fig.add_gridspec(
        len(cells),
        1,
        height_ratios=heights,
        left=0.01,
        right=0.99,
        top=top,
        bottom=0.01,
        hspace=0.16,
    )
    columns = [0.115 + 0.885 * k / (len(answers) + 1) for k in range(len(answers) + 1)]
    for x, name in zip(columns, ["question", *answers]):
        fig.text(
            0.01 + 0.98 * x, 0.995, name, weight="bold", va="top", fontsize=9, parse_math=False
        )
    for i, row in enumerate(cells):
        ax = fig.add_subplot(grid[i])
        ax.set_axis_off()
        ax.plot([0, 1], [1.06, 1.06], color=PALE, transform=ax.transAxes, clip_on=False)
        show(ax.inset_axes([0, 0.02, 0.1, 0.96]), questions[i].get("image"))
        for k, (x, text) in enumerate(zip(columns, row)):
            right = (
                k > 0
                and said[i][k - 1].strip(" .").lower()
                == str(questions[i].get("label", "")).strip(" .").lower()
            )
            write(
                ax,
                x,
                0.97,
                text,
                fontsize=8,
                color=INK if k == 0 else COLORS[(k - 1) % 7],
                weight="bold" if right else None,
            )
    return fig


def tokens(ids, labels, tokenizer, width=114, image_token=-200):
    """A conversation token by token: orange is learned (its label counts), grey is only read, blue is the picture.

    ids, labels: two equally long lists, as vflan.encode returns them; one id may be the picture's placeholder.
    """
    if len(ids) != len(labels):
        raise ValueError(f"ids and labels must be equally long, not {len(ids)} and {len(labels)}.")
    boxes, x, line = [], 0, 0
    for token, label in zip(ids, labels):
        if token == image_token:
            text, color = "picture", TOKEN_COLORS["picture"]
        else:
            text = tokenizer.decode([token]) if token >= 0 else str(token)
            color = TOKEN_COLORS["learned" if label >= 0 else "only read"]
        text = text.replace("\n", "\u21b5").replace("\t", "\u21e5").strip(" ") or "\u00b7"
        if len(text) > 40:  # a whole opening sentence may be one token
            text = f"{text[:24]} \u2026 {text[-12:]}"
        if x and x + len(text) + 1 > width:
            x, line = 0, line + 1
        boxes.append((x, line, text, color))
        x += len(text) + 1.2
    fig, ax = plt.subplots(figsize=(9, 0.3 * (line + 2.6)), layout="none")
    fig.subplots_adjust(0.01, 0.01, 0.99, 0.99)
    ax.set(xlim=(-0.5, width + 1), ylim=(line + 2.1, -0.6))
    ax.set_axis_off()
    for x, (text, color) in zip((0, 9, 20), TOKEN_COLORS.items()):
        boxes.append((x, line + 1.5, text, color))  # the legend
    for x, y, text, color in boxes:
        ax.add_patch(plt.Rectangle((x - 0.4, y - 0.4), len(text) + 0.8, 0.8, color=color, lw=0))
        ax.text(x, y, text, family="DejaVu Sans Mono", fontsize=9, va="center", parse_math=False)
    return fig


def packed_rows(rows, budget, image_token=-200):
    """Rows of positions as a model reads them: conversations side by side, and what is left of the budget as padding.

    rows: for each row a list of (ids, labels), whose picture is as wide as its features. Orange is learned, blue is a
    picture, grey is only read, a white seam ends a conversation.
    """
    fig, ax = plt.subplots(figsize=(9, 0.32 * len(rows) + 1.1))
    kinds = ((PALE, "only read"), (TOKEN_COLORS["picture"], "picture"), ("#D55E00", "learned"))
    for y, conversations in enumerate(rows):
        x = 0
        for ids, labels in conversations:
            kind = np.where(
                np.asarray(labels) >= 0, 2, np.where(np.asarray(ids) == image_token, 1, 0)
            )
            cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1), len(kind)]
            for a, b in zip(cuts, cuts[1:]):
                ax.broken_barh([(x + a, b - a)], (y - 0.4, 0.8), color=kinds[kind[a]][0], lw=0)
            x += len(kind)
            ax.vlines(x, y - 0.45, y + 0.45, color="white", lw=1.5)
        if x < budget:
            ax.broken_barh(
                [(x, budget - x)],
                (y - 0.4, 0.8),
                facecolor="none",
                edgecolor=GREY,
                lw=0.5,
                hatch="////",
            )
    ax.set(
        xlim=(0, budget),
        ylim=(len(rows) - 0.5, -0.5),
        yticks=[],
        xlabel="position in the row (hatched: padding)",
    )
    ax.grid(False)
    marks = [plt.Rectangle((0, 0), 1, 1, color=color, label=label) for color, label in kinds]
    ax.legend(handles=marks, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return fig


# ------------------------------------------------------------------------------------------------------------ training


def loss_curve(*runs, smooth=0.03):
    """Loss over steps of each run (anything with .name and .metrics()): every step pale, their running mean on top."""
    fig, ax = plt.subplots(figsize=(9, 3.2))
    for run, color in zip(runs, COLORS * len(runs)):
        table = run.metrics()
        mean = table.loss.rolling(
            max(1, int(smooth * len(table))), min_periods=1, center=True
        ).mean()
        ax.plot(table.step, table.loss, color=color, alpha=0.18, lw=0.8)
        ax.plot(table.step, mean, color=color, label=f"{run.name}, ends at {mean.iloc[-1]:.2f}")
    ax.set(xlabel="step", ylabel="loss of a learned token", title="Training loss", ylim=(0, None))
    ax.legend()
    return fig


# ------------------------------------------------------------------------------------------------- Figure 2: the tasks


def packed(radii):
    """(n, 2) centres of circles that do not overlap: each as near to the origin as the ones before it allow."""
    centres = np.zeros((len(radii), 2))
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for i, r in enumerate(radii[1:], 1):
        touching = (centres[:i, None] + (radii[:i, None, None] + r) * ring).reshape(-1, 2)
        gaps = np.linalg.norm(touching[:, None] - centres[:i], axis=-1) - radii[:i] - r
        free = touching[(gaps > -1e-9).all(axis=1)]
        centres[i] = free[np.linalg.norm(free, axis=1).argmin()]
    return centres


def task_bubbles(collections):
    """Figure 2: one bubble a category, its area the number of tasks, its colour the group; one row a collection.

    collections: {title: DataFrame with the columns group and category, one row a task}, or one such DataFrame.
    """
    if not isinstance(collections, Mapping):
        collections = {"": collections}
    groups = dict(zip(("question answering", "classification", "generation"), COLORS))
    rows = []  # of each collection: its title, and for each group the categories, their circles and the group's extent
    for title, tasks in collections.items():
        tasks, clusters = tasks[tasks.group.isin(groups)], {}
        for group, part in tasks.groupby("group"):
            counts = part.category.value_counts()
            radii = np.sqrt(counts.to_numpy() / np.pi) + 0.06
            centres = packed(radii)
            low, high = (
                (centres - radii[:, None]).min(axis=0),
                (centres + radii[:, None]).max(axis=0),
            )
            clusters[group] = counts, radii - 0.06, centres - low, high - low
        title = f"{title}{', ' * bool(title)}{len(tasks)} tasks in {sum(len(c[0]) for c in clusters.values())} categories"
        rows.append((title, clusters))
    gap = 0.7
    width = max(sum(c[3][0] + gap for c in clusters.values()) - gap for _, clusters in rows)
    heights = [max(c[3][1] for c in clusters.values()) + 1.1 for _, clusters in rows]
    inches = 8.9 / width  # of one unit
    fig, axes = plt.subplots(len(rows), 1, figsize=(9, sum(heights) * inches + 0.35 * len(rows)), squeeze=False,
                             height_ratios=heights)  # fmt: skip
    for ax, (title, clusters), height in zip(axes.flat, rows, heights):
        x = (width - sum(c[3][0] + gap for c in clusters.values()) + gap) / 2
        for group in (g for g in groups if g in clusters):
            counts, radii, centres, extent = clusters[group]
            corner = np.array([x, (height - 1.1 - extent[1]) / 2])
            for name, count, r, centre in zip(counts.index, counts, radii, centres + corner):
                text = (
                    "\n".join(textwrap.wrap(name, max(9, len(name) // 2), break_long_words=False))
                    + f"\n{count}"
                )
                longest = max(map(len, text.splitlines()))
                size = min(9.5, 1.8 * r * inches * 72 / (0.62 * longest))
                ax.add_patch(plt.Circle(centre, r, color=groups[group], alpha=0.85, lw=0))
                if size < 4.2:  # nobody could read the name
                    text, size = str(count), 6
                ax.text(*centre, text, ha="center", va="center", color="white", fontsize=size, linespacing=0.95,
                        parse_math=False)  # fmt: skip
            ax.text(
                x + extent[0] / 2,
                height - 0.75,
                group,
                ha="center",
                color=groups[group],
                weight="bold",
            )
            x += extent[0] + gap
        ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        ax.set_title(title)
        ax.set_axis_off()
    return fig


# ------------------------------------------------------------------------------------------------- tables as dot plots


def headline(scores, benchmark, metric=None):
    """The rows of the headline metric of one benchmark, in the order of the runs."""
    return scores[
        (scores.benchmark == benchmark)
        & (scores.metric == (metric or BENCHMARKS[benchmark].headline))
    ]


def printed(item, row, column, table=None):
    """A number printed in the Vision-Flan paper, on a scale of 0 to 100 (MME: percent of its 2000 points); None if
    unknown.

    Returns (value, confirmed): whether the number was read in the paper or is only known second-hand.
    """
    table = paper() if table is None else table
    found = table[
        (table.paper == "vision-flan")
        & (table.item == item)
        & (table.row == row)
        & (table.column == column)
    ]
    if not len(found):
        return None
    value = float(found.value.iloc[0])
    return value / 20 if column == "MME" else value, found.confirmed.iloc[0] == "yes"


def dots(scores, rows, item, table=None, benchmarks=None):
    """One panel a benchmark, one line a run: value with its interval, chance as a tick, the paper's value as a grey
    diamond.

    rows: {run: (its label, the row of the paper's table or None)}, from top to bottom.
    """
    here = [
        b
        for b in (benchmarks or BENCHMARKS)
        if len(headline(scores[scores.run.isin(list(rows))], b))
    ]
    columns = min(4, len(here)) or 1
    lines = -(-len(here) // columns)
    fig, axes = plt.subplots(
        lines, columns, figsize=(9, lines * (0.95 + 0.3 * len(rows))), sharey=True, squeeze=False
    )
    for ax in axes.flat[len(here) :]:
        ax.set_axis_off()
    for k, (ax, name) in enumerate(zip(axes.flat, here)):
        own = headline(scores, name).set_index("run")
        for y, (run, (_, row)) in enumerate(rows.items()):
            known = row and printed(item, row, BENCHMARKS[name].paper, table)
            if known:
                ax.plot(
                    known[0],
                    y,
                    "D",
                    color=GREY if known[1] else "white",
                    markeredgecolor=GREY,
                    markersize=6.5,
                    zorder=2,
                )
            if run not in own.index:
                continue
            for _, score in own.loc[
                [run]
            ].iterrows():  # a row for each seed, should there be several
                ax.plot(
                    [score.low, score.high], [y, y], color=COLORS[0], lw=2.4, alpha=0.45, zorder=3
                )
                ax.plot(score.value, y, "o", color=COLORS[0], zorder=4)
                ax.plot(
                    score.baseline,
                    y,
                    "|",
                    color=COLORS[1],
                    markersize=11,
                    markeredgewidth=1.6,
                    zorder=3,
                )
        extra = ", % of maximum" if name == "mme" else ""
        ax.set_title(TITLES[name])
        ax.set_xlabel(
            UNITS.get(BENCHMARKS[name].headline, BENCHMARKS[name].headline) + extra, fontsize=8.5
        )
        ax.set(xlim=(-3, 103), ylim=(len(rows) - 0.5, -0.5), xticks=[0, 25, 50, 75, 100])
        ax.set_yticks(range(len(rows)), [label for label, _ in rows.values()])
        ax.tick_params(axis="y", length=0, labelleft=k % columns == 0)
        ax.grid(axis="y", visible=False)
    handles = [plt.Line2D([], [], marker="o", color=COLORS[0], alpha=0.9, label="here, 95 % interval"),
               plt.Line2D([], [], marker="|", ls="", color=COLORS[1], markersize=11, label="majority answer"),
               plt.Line2D([], [], marker="D", ls="", color=GREY, label="paper, 13B")]  # fmt: skip
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    return fig


def paper_row(run):
    """The row of Table 2 that a run stands for, by its name: base or chat."""
    return next(
        (
            f"Vision-Flan {word.capitalize()}"
            for word in ("base", "chat")
            if word == run.rsplit("-", 1)[-1]
        ),
        None,
    )


def table2(scores, table=None, rows=None, benchmarks=None):
    """Table 2 as dots: every benchmark of the given runs beside the paper's Base and Chat.

    rows: {run: (label, row of the paper's Table 2 or None)}; by default every run, matched by its name.
    """
    return dots(
        scores,
        rows or {run: (run, paper_row(run)) for run in scores.run.unique()},
        "Table 2",
        table,
        benchmarks,
    )


def parts_table(scores, rows, item="Table 5", table=None, benchmarks=None):
    """Tables 3 to 7 as dots. rows: {run: row of that table in data/paper.csv, or None}, for instance

    {"mlp-only": "LLM frozen, MLP tuned", "base": "LLM tuned, MLP tuned"}.
    """
    return dots(
        scores, {run: (row or run, row) for run, row in rows.items()}, item, table, benchmarks
    )


def categories(scores, benchmarks, of=None, metric="accuracy"):
    """A panel a benchmark, a line a category, a dot a stage (mean over its kinds and seeds); chance as a tick.

    scores: rows with `metric`/kind; of: {kind: category}, by default every kind has a line of its own.
    """
    part = scores[scores.metric.str.startswith(f"{metric}/")]
    kind = part.metric.str.split("/").str[1]
    part = part.assign(
        stage=part.run.str.replace(r"-seed\d+$", "", regex=True),
        line=kind.map(of or {}).fillna(kind),
    )
    tables = [
        part[part.benchmark == b].groupby(["line", "stage"], sort=False).value.mean().unstack()
        for b in benchmarks
    ]
    height = 0.6 + 0.24 * max(map(len, tables))
    fig, axes = plt.subplots(
        1, len(tables), figsize=(9, height), squeeze=False, layout="constrained"
    )
    for ax, name, table in zip(axes.flat, benchmarks, tables):
        table = table.sort_values(table.columns[-1])
        chance = part[part.benchmark == name].groupby("line").baseline.mean()
        ax.plot(
            chance[table.index],
            table.index,
            "|",
            color=GREY,
            markersize=10,
            label="majority answer",
        )
        for color, column in zip(COLORS, table):
            ax.plot(table[column], table.index, "o", color=color, label=column)
        ax.set(title=TITLES[name], xlim=(-3, 103), xlabel=f"{metric}, %")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return fig


# -------------------------------------------------------------------------------------------------------------- curves


def curves(scores, points, panels, xlabel, log=False, reference=None):
    """Small multiples of score against an amount. points: {run: (line, x)}; panels: [(benchmark, metric, title)].

    Several seeds of a run are averaged for the line and all shown as dots; the band is the mean of their intervals.
    """
    columns = len(panels) if len(panels) <= 4 else 3
    lines = -(-len(panels) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(9, 0.3 + 2.7 * lines), squeeze=False)
    names = list(dict.fromkeys(line for line, _ in points.values()))
    xs = sorted({x for _, x in points.values()})
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (benchmark, metric, title) in zip(axes.flat, panels):
        own = headline(scores, benchmark, metric)
        for name, color in zip(names, COLORS):
            part = own[own.run.isin([run for run, (line, _) in points.items() if line == name])]
            part = part.assign(x=[points[run][1] for run in part.run])
            mean = part.groupby("x")[["value", "low", "high"]].mean()
            ax.plot(part.x, part.value, "o", color=color, markersize=3.5, alpha=0.6)
            ax.plot(mean.index, mean.value, color=color, label=name)
            ax.fill_between(mean.index, mean.low, mean.high, color=color, alpha=0.14, lw=0)
        if len(own):
            ax.axhline(own.baseline.mean(), color=GREY, ls=":", lw=1.2, label="majority answer")
        if reference is not None and len(found := headline(reference, benchmark, metric)):
            ax.axhline(found.value.mean(), color=INK, ls="--", lw=1.2, label=found.run.iloc[0])
        ax.set_title(title)
        ax.set_xlabel(xlabel)
        if log:
            ax.set_xscale("symlog", linthresh=min(x for x in xs if x > 0), linscale=0.5)
        ax.set_xticks(
            xs, [f"{x // 1000}k" if x >= 1000 and x % 1000 == 0 else f"{x:g}" for x in xs]
        )
        ax.minorticks_off()
        ax.margins(x=0.06)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return fig


def diversity(
    scores, tasks, benchmarks=("mmbench", "mme", "pope", "heldout"), line="", reference=None
):
    """Figure 4: scores against the number of training tasks. tasks: {run: number of tasks}, or {run: (line,
    number)}."""
    points = {run: t if isinstance(t, tuple) else (line or "here", t) for run, t in tasks.items()}
    panels = [(b, None, TITLES[b]) for b in benchmarks]
    return curves(scores, points, panels, "training tasks", reference=reference)


def gpt4_curves(scores, amounts, figure=None, reference=None):
    """Figures 5 to 8: scores against the number of GPT-4 instances in the second stage.

    amounts: {run: (start, number)}, for instance {"base-100": ("Base", 100)}. figure: 5 (MME), 6 (LLaVA-Bench), 7 (POPE
    and its share of yes), 8 (MMBench); None shows them all. reference: scores of one run, drawn as a dashed line.
    """
    panels = {
        5: [("mme", None, "Figure 5: MME")],
        6: [("llava_bench", None, "Figure 6: LLaVA-Bench")],
        7: [("pope", "f1", "Figure 7: POPE, F1"), ("pope", "yes_ratio", "Figure 7: share of yes")],
        8: [("mmbench", None, "Figure 8: MMBench")],
    }
    if figure is not None and figure not in panels:
        raise ValueError(
            f"There is no curve of GPT-4 data in Figure {figure}; choose 5, 6, 7 or 8."
        )
    chosen = panels[figure] if figure else [p for part in panels.values() for p in part]
    if figure is None:
        chosen = [(b, m, t.replace("Figure ", "Fig. ")) for b, m, t in chosen]
    return curves(scores, amounts, chosen, "GPT-4 instances", log=True, reference=reference)


VERDICT_COLORS = {
    "holds": COLORS[2],
    "holds weakly": COLORS[5],
    "does not hold at this scale": COLORS[1],
}


def ledger(found, long=None):
    """The ledger as a forest plot: a line a claim, its effect in points and the corrected interval, coloured by the verdict.

    found: the table of claims.verdicts; without a verdict (too few seeds) a mark is hollow. long: the committed verdicts of
    the long form, drawn small in grey above. A tick on each line is the smallest effect that counts.
    """
    fig, ax = plt.subplots(figsize=(9, 0.8 + 0.36 * len(found)))
    long = pd.DataFrame() if long is None or not len(long) else long.set_index("claim")
    own = found.set_index("claim").effect
    if len(long) and np.allclose(long.effect.reindex(own.index), own, atol=0.01, equal_nan=True):
        long = pd.DataFrame()  # these are the runs of the long form
    for y, row in enumerate(found.itertuples()):
        if row.claim in long.index:
            other = long.loc[row.claim]
            ax.plot([other.low, other.high], [y - 0.24] * 2, color=GREY, lw=1.4)
            ax.plot(other.effect, y - 0.24, "o", color=GREY, markersize=4)
        color = VERDICT_COLORS.get(row.verdict, GREY)
        if row.low == row.low:
            ax.plot([row.low, row.high], [y, y], color=color, lw=2.6, alpha=0.6)
        ax.plot(
            row.effect,
            y,
            "o",
            color=color if row.verdict in VERDICT_COLORS else "white",
            markeredgecolor=color,
        )
        ax.plot([row.smallest] * 2, [y - 0.32, y + 0.32], color=INK, lw=0.9)
    ax.axvline(0, color=INK, lw=0.7, alpha=0.5)
    labels = [
        "\n".join(textwrap.wrap(f"{row.claim}  {row.statement}", 62)[:2])
        for row in found.itertuples()
    ]
    ax.set_yticks(range(len(found)), labels, fontsize=8)
    ax.set(ylim=(len(found) - 0.4, -0.6), xlabel="effect, points (tick: the smallest that counts)")
    ax.grid(axis="x", color=PALE)
    seen = [verdict for verdict in VERDICT_COLORS if verdict in set(found.verdict)]
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=VERDICT_COLORS[verdict], label=verdict)
        for verdict in seen
    ]
    if len(seen) < found.verdict.nunique():
        handles.append(
            plt.Line2D(
                [],
                [],
                marker="o",
                ls="",
                color="white",
                markeredgecolor=GREY,
                label="not enough runs",
            )
        )
    if len(long):
        handles.append(
            plt.Line2D(
                [], [], marker="o", ls="-", color=GREY, markersize=4, label="committed long form"
            )
        )
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.4, -0.08 - 0.5 / len(found)),
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    return fig


def affinity(scores, runs, category, start="projector", benchmark="heldin"):
    """A heat map: tuned on one category of tasks (rows), asked all of them (columns), the gain over `start` in points.

    scores: of vflan.evaluate with a row a task (`accuracy/TASK`). runs: their names, `category-NAME`. category: {task: category}.
    """
    own = scores[(scores.benchmark == benchmark) & scores.metric.str.startswith("accuracy/")]
    own = own.assign(category=own.metric.str.removeprefix("accuracy/").map(category)).dropna(
        subset="category"
    )
    table = own.groupby(["run", "category"]).value.mean().unstack()
    gain = (table.loc[list(runs)] - table.loc[start])[sorted(table.columns)]
    fig, ax = plt.subplots(figsize=(9, 1.6 + 0.26 * len(gain)))
    limit = max(1.0, float(np.nanmax(np.abs(gain))))
    image = ax.imshow(gain, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    for (y, x), value in np.ndenumerate(gain.to_numpy()):
        color = "white" if abs(value) > 0.6 * limit else INK
        ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=color)
    ax.set_xticks(range(len(gain.columns)), gain.columns, rotation=40, ha="right", fontsize=8)
    ax.set_yticks(
        range(len(gain)),
        [run.removeprefix("category-").replace("-", " ") for run in gain.index],
        fontsize=8,
    )
    ax.set(xlabel="asked", ylabel="tuned on")
    ax.grid(False)
    fig.colorbar(image, ax=ax, label="gain, points", shrink=0.7)
    return fig


def learning_curves(heldout, category):
    """The loss on held-out rows of every task along a training, a panel a category. heldout: `Run.heldout()`."""
    own = heldout[heldout.task != "all"]
    groups = {}
    for task in own.task.unique():
        groups.setdefault(category.get(task, "other"), []).append(task)
    lines = -(-len(groups) // 6)
    fig, axes = plt.subplots(lines, 6, figsize=(9, 1.25 * lines + 0.4), sharex=True, squeeze=False)
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat, sorted(groups)):
        for i, task in enumerate(groups[name]):
            part = own[own.task == task]
            ax.plot(part.step, part.loss, color=COLORS[i % len(COLORS)], lw=1.1)
        ax.set_title(f"{name} ({len(groups[name])})", fontsize=7)
        ax.tick_params(labelsize=7)
        ax.set_ylim(bottom=0)
    fig.supxlabel("step", fontsize=9)
    fig.supylabel("loss a token on held-out rows", fontsize=9)
    return fig


def committed(name, preset="tiny_frozen"):
    """Show a figure of the long form that is committed in figures/, or say in a line that there is none."""
    from IPython.display import Image as Shown
    from IPython.display import display
    from PIL import Image

    path = resolve(f"figures/{preset}/{name}.png")
    if path.exists():
        print(f"The committed long form, figures/{preset}/{name}.png:")
        READ.append(shown_path(path))
        # as wide as a notebook's column: larger would only make the file larger
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((640, 640 * picture.height // picture.width))
        small.save(buffer := io.BytesIO(), "JPEG", quality=85, subsampling=0)
        display(Shown(buffer.getvalue(), format="jpeg"))
    else:
        print(f"figures/{preset}/{name}.png is not there: `make paper` draws it.")
