from .bubbles import pack_circles, task_bubbles
from .figures import (
    affinity,
    categories,
    curves,
    diversity,
    dots,
    forest_plot,
    gpt4_curves,
    learning_curves,
    loss_curve,
    parts_table,
    table2,
)
from .pictures import before_after, gallery, packed_rows, question, show, tokens, turns
from .reference import TITLES, UNITS, headline, paper, paper_tasks, printed, task_list
from .theme import (
    COLORS,
    GREY,
    INK,
    PALE,
    TOKEN_COLORS,
    committed_figure,
    save,
    source,
    style,
    wrap,
    write,
)

__all__ = [
    "affinity", "before_after", "categories", "COLORS", "committed_figure", "curves", "diversity",
    "dots", "forest_plot", "gallery", "gpt4_curves", "GREY", "headline", "INK", "learning_curves",
    "loss_curve", "pack_circles", "packed_rows", "PALE", "paper", "paper_tasks", "parts_table",
    "printed", "question", "save", "show", "source", "style", "table2", "task_bubbles",
    "task_list", "TITLES", "TOKEN_COLORS", "tokens", "turns", "UNITS", "wrap", "write",
]  # fmt: skip
