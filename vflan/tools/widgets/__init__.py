"""Widgets for a notebook: browse tasks, compare answers, chat with a run. One file each.

Each browser has a static table beside it, which shows on GitHub and in print; a widget lives only
while a kernel runs. Rows are a DataFrame, a `datasets.Dataset` or a list of dicts. All text is
escaped, since it comes from data and models. Nothing here imports torch before it is needed.
"""

from vflan.tools.widgets.answer_view import answer_browser, answer_table
from vflan.tools.widgets.chat_view import chat, heat_map
from vflan.tools.widgets.elements import picture
from vflan.tools.widgets.live_view import live_loss
from vflan.tools.widgets.task_view import task_browser, task_table
from vflan.tools.widgets.token_view import packed_bars, token_line

__all__ = [
    "answer_browser", "answer_table", "chat", "heat_map", "live_loss", "packed_bars", "picture",
    "task_browser", "task_table", "token_line",
]  # fmt: skip
