"""Foreign text, written for the place where it goes: a terminal, Markdown, a spreadsheet.

Names of tasks, runs, files and judges and the descriptions in pictures come from data, models and
servers. In HTML they are escaped by html.escape or by Jinja, in YAML by a YAML writer.
"""

from __future__ import annotations

import csv
import html
import re
from typing import TYPE_CHECKING, Any, TextIO
from unicodedata import category

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

# Control characters, direction and other invisible ones, lone surrogates, line separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Two invisible characters belong to the spelling of Persian, of Indian scripts and of emoji.
_SHOWN = "\n\t\u200c\u200d"
# Marks, but no underscore inside a word; `$` of formulas; what makes a bare address a link; what
# ends a heading.
_MARKUP = re.compile(
    r"[\\`*~\[\]|$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|(?<= )#", re.IGNORECASE
)
# Headings, lists and rules.
_LINE_BEGINNING = re.compile(r"[#=]|[-+](?=[- ]|$)|\d+(?=[.)]( |$))")
# What spreadsheets take for a formula by its beginning; the wide characters too.
_FORMULA = re.compile(r"'*(\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n])")


def for_terminal(text: Any) -> str:
    """The text with hidden characters spelled out (`\\x1b`, `\\u202e`); lines and tabs stay."""
    return "".join(
        char.encode("unicode_escape").decode()
        if category(char) in _HIDDEN and char not in _SHOWN
        else char
        for char in str(text)
    )


def for_markdown(value: Any) -> str:
    """A value as one line of text in Markdown, also in a table; None as nothing.

    No markup, picture, link, formula, HTML or heading; only an e-mail address may become a link.
    """
    line = for_terminal(" ".join(str("" if value is None else value).split()))
    line = _MARKUP.sub(r"\\\g<0>", html.escape(line, quote=False))
    first = _LINE_BEGINNING.match(line)
    at = first.end() - (not first[0].isdigit()) if first else 0
    return f"{line[:at]}\\{line[at:]}" if first else line


def write_sheet(table: pd.DataFrame, target: Path | TextIO, float_format: str) -> None:
    """Write a csv file, with an apostrophe before each text that would be a formula."""
    cells = table.map(lambda c: f"'{c}" if isinstance(c, str) and _FORMULA.match(c) else c)
    # A reader ends the row at a carriage return, and Python's csv does not quote it by itself.
    has_return = cells.map(lambda c: isinstance(c, str) and "\r" in c).to_numpy().any()
    quoting = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL
    cells.to_csv(target, index=False, float_format=float_format, quoting=quoting)


def from_sheet(table: pd.DataFrame) -> pd.DataFrame:
    """The texts that `write_sheet` was given, in a table that was read from its file."""
    return table.map(
        lambda c: c[1:] if isinstance(c, str) and c[:1] == "'" and _FORMULA.match(c) else c
    )
