"""From the rows of a samples file to the columns of the table that is trained on.

Whatever a row says in another form than LLaVA's is read or becomes the row's reason to be bad, and
nothing of it is lost in silence. Such rows would pass for sound ones otherwise: a text under
another key leaves a shorter conversation, a video leaves a question about nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pyarrow as pa

from vflan.data.conversation import NOTE, TROUBLE, as_text, kind_of, without_text
from vflan.data.images import shortened

_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_TEXTS = [(name, pa.string()) for name in ("id", "image", "task_name")]
SCHEMA = pa.schema([*_TEXTS, ("conversations", pa.list_(_TURN))])
# Rows in the form of chat APIs: {"role": ..., "content": ...} in `messages`, or as turns.
_ROLES = {"user": "human", "assistant": "gpt"}
# What else a row may show; training takes none of it.
MEDIA = ("video", "videos", "audio", "audios")
# In an object of json: the keys that it gives more than once. No key of a file begins so.
TWICE = "\0twice"
# How base64 of PNG, JPEG, GIF, WebP, TIFF and BMP files begins.
_BASE64 = ("data:", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")


class Resolved(str):
    """An image name that `read_picture` can take as it is."""


def record_batch(rows: list, first: int, resolve: Callable[[str], str]) -> pa.RecordBatch:
    """Json values as the four columns; a row that cannot be trained on is one `check` reports.

    first: the number of the first row. resolve: an image's name to what `read_picture` takes.
    """
    ids, images, tasks, ends, roles, values = [], [], [], [0], [], []
    for number, row in enumerate(rows, first):
        troubles = []
        if not isinstance(row, dict):
            troubles.append(f"not a row: an object is needed, this is {kind_of(row)}")
            row = {}
        name = row.get("id")
        ids.append(str(number if name is None else name))
        images.append(_image(row, resolve, troubles))
        tasks.append(str(row.get("task_name") or ""))
        for role, value in _turns(row, troubles):
            roles.append(role)
            values.append(value)
        ends.append(len(roles))
    # Flat arrays and offsets: much faster than lists of dicts.
    roles, values = (pa.array(texts, pa.string()) for texts in (roles, values))
    turns = pa.StructArray.from_arrays([roles, values], ["from", "value"])
    columns = [pa.array(column, pa.string()) for column in (ids, images, tasks)]
    columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), turns))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def replace_surrogates(rows: list) -> list:
    """Half a surrogate pair, which json may hold and UTF-8 may not, becomes U+FFFD."""
    text = json.dumps(rows, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


# ------------------------------------------------------------------------------------ turns


def _turns(row: dict, troubles: list[str]) -> Iterator[tuple[str | None, str]]:
    """(role, text) of each turn, then the row's system text, then notes and the first trouble.

    Notes and the trouble are roles without text.
    """
    key = "messages" if row.get("conversations") is None else "conversations"
    given = row.get(key)
    if not isinstance(given, list | None):
        troubles.append(f"no list of turns: {key} is {kind_of(given)}")
        given = None
    notes = [_note(row, "the row")] if TWICE in row else []
    image, more = row.get("image"), row.get("images")
    if not (_is_empty(image) or _is_empty(more) or more in (image, [image])):
        notes.append((f"{NOTE}what images names, because the row names an image too", ""))
    turns = [_turn(turn, number, troubles, notes) for number, turn in enumerate(given or (), 1)]
    # The system text goes last, so that the first turn is the question for all readers.
    if turns and turns[0][0] == "system":
        turns.append(turns.pop(0))
    yield from turns
    if not _is_empty(system := row.get("system")):
        yield "system", as_text(system) or json.dumps(system, default=str)
    for name in MEDIA:
        if not _is_empty(row.get(name)):
            troubles.append(f"{name} in the row: only pictures and text are trained on")
    yield from notes
    if troubles:
        yield TROUBLE + troubles[0], ""


def _note(record: dict, where: str) -> tuple[str, str]:
    return f"{NOTE}an earlier value of {shortened(record[TWICE])}, named twice in {where}", ""


def _turn(turn, number: int, troubles: list[str], notes: list) -> tuple[str | None, str]:
    if not isinstance(turn, dict):
        troubles.append(f"a turn without text: turn {number} is {kind_of(turn)}")
        return None, ""
    role, key = turn.get("from"), "value"
    if role is None and isinstance(turn.get("role"), str):
        role, key = _ROLES.get(turn["role"], turn["role"]), "content"
    if TWICE in turn:
        notes.append(_note(turn, f"turn {number}"))
    text = as_text(turn.get(key))
    if text is None:
        troubles.append(without_text(turn, number, key))
    return role if isinstance(role, str) else None, text or ""


# ------------------------------------------------------------------------------------ images


def _image(row: dict, resolve: Callable[[str], str], troubles: list[str]) -> str | None:
    """What `read_picture` takes for the row's image, None if it has none or only a trouble."""
    value = row.get("image")
    try:
        name = _image_name(row.get("images") if _is_empty(value) else value)
    except ValueError as trouble:
        troubles.append(str(trouble))
        return None
    return name if name is None or isinstance(name, Resolved) else resolve(name)


def _image_name(value) -> str | None:
    """The one name in the field `image`, None if there is none; ValueError says what else it is."""
    if isinstance(value, list):
        value = [each for each in value if not _is_empty(each)]
        if len(value) > 1:
            raise ValueError(f"a row has one picture: this one has {len(value)}")
        value = value[0] if value else None
    if isinstance(value, dict):
        if not _is_empty(value.get("bytes")):
            raise ValueError("a picture inside the json: write it to a file, and name that file")
        if all(map(_is_empty, value.values())):
            return None
        if "path" not in value:
            keys = shortened(", ".join(map(str, value)))
            raise ValueError(f"no name of a picture: image is an object with the keys {keys}")
        value = value["path"]
    if _is_empty(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"no name of a picture: image is {kind_of(value)}")
    return value if isinstance(value, Resolved) else _file_name(str(value))


def _file_name(name: str) -> str:
    if name.startswith(_BASE64) and (
        name.startswith("data:") or len(name) > 80 and "." not in name
    ):
        how = "write the picture to a file, and name that file"
        raise ValueError(f"base64 in place of a name: {how}, not {shortened(name)}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        how = "download the picture, and name that file"
        raise ValueError(f"a URL in place of a name: {how}, not {shortened(name)}")
    return name


def _is_empty(value) -> bool:
    """Whether a field holds nothing: null, "", [], {}, false, or NaN, as pandas writes null."""
    return value is None or value is False or value in ("", [], {}) or value != value
