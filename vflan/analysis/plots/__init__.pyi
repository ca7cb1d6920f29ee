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
    yes_ratio,
)
from .pictures import (
    attention_figure,
    attention_mask,
    before_after,
    gallery,
    packed_rows,
    question,
    show,
    tokens,
    turns,
)
from .reference import (
    NO_GROUP,
    TITLES,
    UNITS,
    headline,
    paper,
    paper_tasks,
    printed,
    task_list,
    unit,
)
from .theme import (
    COLORS,
    GREY,
    INK,
    MAJORITY,
    MODEL_COLORS,
    PALE,
    TOKEN_COLORS,
    committed_figure,
    model_colors,
    opening,
    save,
    source,
    style,
    wrap,
    write,
)

__all__ = [
    "affinity", "attention_figure", "attention_mask", "before_after", "categories", "COLORS",
    "committed_figure", "curves", "diversity", "dots", "forest_plot", "gallery", "gpt4_curves",
    "GREY", "headline", "INK", "learning_curves", "loss_curve", "MAJORITY", "model_colors",
    "MODEL_COLORS", "NO_GROUP", "opening", "pack_circles", "packed_rows", "PALE", "paper",
    "paper_tasks", "parts_table", "printed", "question", "save", "show", "source", "style",
    "table2", "task_bubbles", "task_list", "TITLES", "TOKEN_COLORS", "tokens", "turns", "unit",
    "UNITS", "wrap", "write", "yes_ratio",
]  # fmt: skip
