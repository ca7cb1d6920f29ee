"""Strips executed notebooks of all that differs between machines, so that they can be committed."""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from vflan import config
from vflan.data.images import as_rgb, open_picture
from vflan.tools.stable import tag

# The largest committed notebook in bytes: GitHub shows a larger one slowly, and its diffs hurt.
LIMIT = 400_000
WIDGET = "application/vnd.jupyter.widget-view+json"
# The kernel is always python3, so that a notebook opens wherever vflan is installed.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def clean_file(path: Path) -> int:
    """Clean the executed notebook at `path` in place and return its size in bytes.

    The pictures of a notebook above LIMIT become JPEGs, smaller ones until it fits.
    """
    notebook = clean_notebook(nbformat.read(path, as_version=4))
    text = nbformat.writes(notebook)
    for quality, scale in (
        (92, 1),
        (80, 1),
        (80, 0.85),
        (80, 0.75),
        (78, 0.67),
        (75, 0.6),
        (75, 0.52),
    ):
        if len(text.encode()) > LIMIT:
            copy = nbformat.from_dict(notebook)
            text = nbformat.writes(shrink_pictures(copy, quality, scale))
    Path(path).write_text(text + "\n", encoding="utf-8")
    return len(text.encode()) + 1


def clean_notebook(notebook: NotebookNode) -> NotebookNode:
    """A copy with cells numbered in order, without widget state, stderr, times and machine paths.

    Cells whose output is the same on every machine get the tag with which nbval compares them.
    """
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    count = 0
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        # papermill ends the cell that it adds with an empty line
        cell.source = cell.source.rstrip("\n")
        if cell.cell_type == "code":
            is_empty = not cell.source.strip()
            count += not is_empty
            cell.execution_count = None if is_empty else count
            cell.outputs = _clean_outputs(cell.outputs, count)
    return tag(notebook)


def shrink_pictures(notebook: NotebookNode, quality: int, scale: float) -> NotebookNode:
    """The notebook with its pictures as JPEGs where those are smaller, in place.

    scale: factor on width and height. All colours stay: fewer of them would make smaller files,
    but the pictures here are about colours.
    """
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    for data in (output.get("data", {}) for output in outputs):
        for kind in {"image/png", "image/jpeg"} & data.keys():
            picture = as_rgb(open_picture(io.BytesIO(base64.b64decode(data[kind]))))
            size = round(scale * picture.width), round(scale * picture.height)
            buffer = io.BytesIO()
            # subsampling would mix the colours of neighbouring pixels
            picture.resize(size).save(buffer, "JPEG", quality=quality, subsampling=0)
            jpeg = base64.b64encode(buffer.getvalue()).decode()
            if len(jpeg) < len(data[kind]):
                del data[kind]
                data["image/jpeg"] = jpeg
    return notebook


def _clean_outputs(outputs, count):
    cleaned = []
    for output in filter(None, (_clean_output(output, count) for output in outputs)):
        # a slow cell prints in pieces, and how many there are depends on the machine
        if cleaned and output.output_type == cleaned[-1].output_type == "stream":
            cleaned[-1].text += output.text
        else:
            cleaned.append(output)
    return cleaned


def _clean_output(output, count):
    """One output without stderr, widgets and machine paths; None if nothing is left of it."""
    if output.output_type == "stream":
        output.text = "" if output.name == "stderr" else _plain(output.text)
        return output if output.text else None
    if output.output_type == "error":
        output.traceback = [_plain(line) for line in output.traceback]
        return output
    if WIDGET in output.data:  # its text is only "VBox(children=...)"; a picture is above it
        return None
    output.metadata = {}
    for kind, value in output.data.items():
        output.data[kind] = _plain(value) if kind.startswith("text/") else value
    if output.output_type == "execute_result":
        output.execution_count = count
    return output


def _plain(text):
    """Text without folders of this machine, object addresses and overwritten progress lines."""
    folders = [
        (config.ROOT, ""),
        (sys.prefix, ".venv"),
        (sys.base_prefix, "python"),
        (tempfile.gettempdir(), "temp"),
        (Path.home(), "~"),
    ]
    for folder, name in folders:
        folder = str(folder).rstrip("/")
        if folder:
            # not the end of another path; but a colour or a line's end, as repr writes it, is none
            path = rf"(?:(?<![\w.-])|(?<=[\d\[]m|\\n)){re.escape(folder)}"
            text = re.sub(f"{path}/", name + "/" if name else "", text)
            text = re.sub(rf"{path}(?![\w.-])", name or ".", text)
    text = re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)
    text = re.sub(r"^[^\n]*\r(?!\n)", "", text, flags=re.MULTILINE)
    # a tqdm bar that was printed to stdout
    return re.sub(r"^.*\d+%\|.*\|.*\n?", "", text, flags=re.MULTILINE)
