"""Which notebook cells show the same on every machine; nbval compares the output of these.

    vflan tag                        # tag the committed notebooks anew
    vflan tag notebooks/01_*.ipynb   # or only these

The output of a cell varies if it depends, directly or through other cells, on training, on a
trained model, on a clock or on the machine (`VARYING`). Two tags that people set come first:
`nbval-ignore-output` excludes a cell, `same-everywhere` includes it. The latter is for what the
rule cannot see, for example the number of weights of a trained model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import nbformat

from vflan.config import ROOT

CHECK, NEVER, ALWAYS = "nbval-check-output", "nbval-ignore-output", "same-everywhere"
# Functions, and modules of functions, whose results differ between processors or between two runs.
VARYING = set(
    "train sweep evaluate answer answered attention_maps fingerprint generate plan doctor time "
    "perf_counter monotonic now today cpu_count platform psutil is_available device_count".split()
)
SHOW = {"print", "display"}

# ---------------------------------------------------------------------- names in a piece of code


def _called(node):
    """Names of the functions that the code calls: the last and the first part of a dotted name."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            if isinstance(part.func, ast.Attribute):
                yield part.func.attr
            yield from _root(part.func)
        elif isinstance(part, ast.Attribute) and list(_root(part)) == ["vflan"]:
            yield part.attr  # passed on without a call, to map() for example


def _root(node):
    """The name with which a chain of attributes, subscripts and calls begins, if it has one."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Name):
        yield node.id


def _names(node, context):
    """The names that the code loads (ast.Load) or stores (ast.Store)."""
    names = (part for part in ast.walk(node) if isinstance(part, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, context)}


def _read(node):
    """The names whose values the code reads, without those that exist only inside it."""
    inside = set()
    for part in ast.walk(node):
        if isinstance(part, ast.comprehension):
            inside |= _names(part.target, ast.Store)
        elif isinstance(part, ast.arg):
            inside.add(part.arg)
    return _names(node, ast.Load) - inside


def _named(node):
    """The names that the code assigns on its way, by :=."""
    return {part.target.id for part in ast.walk(node) if isinstance(part, ast.NamedExpr)}


def _written(node):
    """The names that a simple statement assigns, or changes by a key, an attribute or a method."""
    written = _named(node)
    if isinstance(node, ast.Expr):
        is_method = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
        return written | set(_root(node.value.func)) if is_method else written
    for target in [*getattr(node, "targets", []), getattr(node, "target", None)]:
        for part in ast.walk(target) if target is not None else ():
            if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript)):
                written |= set(_root(part))
    return written


# ---------------------------------------------------------------------- cells in order


class _Reader:
    """Reads cells in order and remembers which names hold varying values, and which are modules."""

    def __init__(self):
        self.varying, self.modules = set(), set()

    def cell_varies(self, source):
        """Whether the output of the cell varies; True for code that is not plain Python."""
        try:
            body = ast.parse(source).body
        except SyntaxError:  # a magic
            return True
        # nbval runs cells outside the kernel's history, where a last semicolon hides nothing
        return self.block(body, False, body[-1:]) or source.rstrip().endswith(";")

    def block(self, body, varies, last=()):
        # a list, because every statement must be read
        return any([self.statement(node, varies, node in last) for node in body])

    def statement(self, node, varies, is_last=False):
        """Follow one statement; True if it shows something that varies.

        varies: whether the code around it depends on something that varies.
        """
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self.modules.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
            return False
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.assign({node.name}, varies or self.reads_varying(node))
            return False
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
            return self.compound(node, varies)
        varies = varies or self.reads_varying(node)
        # a method or += adds to a value, while = replaces it
        self.assign(_written(node), varies, adds=isinstance(node, (ast.Expr, ast.AugAssign)))
        shows = is_last and isinstance(node, ast.Expr) or not SHOW.isdisjoint(_called(node))
        return shows and varies

    def compound(self, node, varies):
        """Follow a statement with blocks inside: a condition, a loop, with, try."""
        items = getattr(node, "items", [])
        heads = [getattr(node, "test", None), getattr(node, "iter", None)]
        heads += [item.context_expr for item in items]
        heads = list(filter(None, heads))
        varies = varies or any(map(self.reads_varying, heads))
        self.assign(set().union(*map(_named, heads)), varies)
        targets = [getattr(node, "target", None), *(item.optional_vars for item in items)]
        for target in filter(None, targets):
            self.assign(_names(target, ast.Store), varies)
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        # twice, because the start of a loop may show what its end has made varying
        return any([self.block(block, varies) for _ in range(2) for block in blocks])

    def reads_varying(self, node):
        return not (self.varying.isdisjoint(_read(node)) and VARYING.isdisjoint(_called(node)))

    def assign(self, names, varies, adds=False):
        if varies:
            self.varying |= names - self.modules
        elif not adds:
            self.varying -= names


# ---------------------------------------------------------------------- tags


def has_text(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell's output can be compared: printed lines, or a value that is no picture."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        is_picture = any(kind.startswith("image/") for kind in data)
        if output.get("text", "").strip() or data and not is_picture:
            return True
    return False


def tag(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Set `nbval-check-output` on the cells that show the same everywhere, in place."""
    reader = _Reader()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tags = [name for name in cell.metadata.pop("tags", []) if name != CHECK]
        # read every cell, also one with a person's tag: later cells build on it
        varies = reader.cell_varies(cell.source)
        if has_text(cell) and NEVER not in tags and (ALWAYS in tags or not varies):
            tags.append(CHECK)
        if tags:
            cell.metadata["tags"] = tags
    return notebook


def count_compared(notebook: nbformat.NotebookNode) -> tuple[int, int]:
    """(cells that nbval compares, cells that have text to compare) of a tagged notebook."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and has_text(cell)]
    return sum(CHECK in cell.metadata.get("tags", []) for cell in cells), len(cells)


def tag_files(paths: Iterable[str | Path] | None = None) -> None:
    """Tag the cells of these notebooks (default: the committed ones) and print the numbers."""
    for path in map(Path, paths or sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))):
        notebook = tag(nbformat.read(path, as_version=4))
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        compared, total = count_compared(notebook)
        print(f"{path.stem}: {compared} of {total} cells with text show the same everywhere")
