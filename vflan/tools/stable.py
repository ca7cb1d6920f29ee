"""Which cells of a notebook say the same on every machine: those get the tag by which nbval compares what they print.

    vflan tag                        # tag the committed notebooks anew
    vflan tag notebooks/01_*.ipynb   # or these

What a cell shows varies if it comes from training, from a trained model, from a clock or from the
machine (`VARYING`), by whatever way through other cells. A tag that a person sets has the last word:
`nbval-ignore-output` keeps a cell out, `same-everywhere` takes it in (the number of weights of a
trained model, for example, which the rule cannot tell from the weights).
"""

import ast
from pathlib import Path

import nbformat

from vflan.config import ROOT

CHECK, NEVER, ALWAYS = "nbval-check-output", "nbval-ignore-output", "same-everywhere"
# functions, and modules of functions, whose results differ between processors, or between two runs
VARYING = {
    *(
        "train",
        "sweep",
        "evaluate",
        "answer",
        "answered",
        "attention_maps",
        "fingerprint",
        "generate",
    ),
    *(
        "plan",
        "doctor",
        "time",
        "perf_counter",
        "monotonic",
        "now",
        "today",
        "cpu_count",
        "platform",
    ),
    *("psutil", "is_available", "device_count"),
}
SHOW = {"print", "display"}


def _called(node):
    """Names of the functions that a piece of code calls: last and first part of each dotted name."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            if isinstance(part.func, ast.Attribute):
                yield part.func.attr
            yield from _root(part.func)
        elif isinstance(part, ast.Attribute) and list(_root(part)) == ["vflan"]:
            yield part.attr  # handed on without a call, to map() for example


def _root(node):
    """The name that a chain of attributes, subscripts and calls begins with, if it does."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, ast.Name):
        yield node.id


def _read(node):
    """Names whose values a piece of code reads, without those that live only inside it."""
    own = set()
    for part in ast.walk(node):
        if isinstance(part, ast.comprehension):
            own.update(_stored(part.target))
        elif isinstance(part, ast.arg):
            own.add(part.arg)
    loaded = (
        part
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    )
    return {part.id for part in loaded} - own


def _stored(node):
    return {
        part.id
        for part in ast.walk(node)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }


def _written(node):
    """Names that a simple statement gives a value, or whose value it may change by a key, attribute or method."""
    if isinstance(node, ast.Expr):
        method = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute)
        return set(_root(node.value.func)) if method else set()
    written = set()
    for target in [*getattr(node, "targets", []), getattr(node, "target", None)]:
        for part in ast.walk(target) if target is not None else ():
            if isinstance(part, (ast.Name, ast.Attribute, ast.Subscript)):
                written |= set(_root(part))
    return written


class _Reader:
    """Reads cells in order and remembers which names hold what varies, and which are modules."""

    def __init__(self):
        self.varying, self.modules = set(), set()

    def cell(self, source):
        """Whether what the cell shows varies. Code that is not plain Python (a magic) counts as varying."""
        try:
            body = ast.parse(source).body
        except SyntaxError:
            return True
        # nbval runs cells outside the kernel's history, and there a last semicolon hides nothing
        return self.block(body, False, body[-1:]) or source.rstrip().endswith(";")

    def block(self, body, varies, last=None):
        return any([self.statement(node, varies, bool(last) and node is last[0]) for node in body])

    def statement(self, node, varies, last=False):
        """Follow one statement; True if it shows what varies. `varies`: what led here does."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self.modules.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
            return False
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.keep({node.name}, varies or self.reads(node))
            return False
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
            return self.compound(node, varies)
        varies = varies or self.reads(node)
        # a method or += adds to what is there; = puts something else in its place
        self.keep(_written(node), varies, added=isinstance(node, (ast.Expr, ast.AugAssign)))
        shows = last and isinstance(node, ast.Expr) or not SHOW.isdisjoint(_called(node))
        return shows and varies

    def compound(self, node, varies):
        items = getattr(node, "items", [])
        heads = [
            getattr(node, "test", None),
            getattr(node, "iter", None),
            *(item.context_expr for item in items),
        ]
        varies = varies or any(self.reads(head) for head in heads if head is not None)
        targets = [getattr(node, "target", None), *(item.optional_vars for item in items)]
        self.keep(
            set().union(*(_stored(target) for target in targets if target is not None)), varies
        )
        handlers = [handler.body for handler in getattr(node, "handlers", [])]
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")] + handlers
        # twice: what the end of a loop makes varying, its beginning may show
        return any([self.block(block, varies) for _ in range(2) for block in blocks])

    def reads(self, node):
        return not (self.varying.isdisjoint(_read(node)) and VARYING.isdisjoint(_called(node)))

    def keep(self, names, varies, added=False):
        if varies:
            self.varying |= names - self.modules
        elif not added:
            self.varying -= names


def says(cell):
    """Whether a cell has text to compare: printed lines, or a value that is not a picture."""
    return any(
        output.get("text", "").strip()
        or output.get("data") and not any(kind.startswith("image/") for kind in output.data)
        for output in cell.get("outputs", [])
    )  # fmt: skip


def tag(notebook):
    """The notebook with `nbval-check-output` on the cells that say the same everywhere, and on no other; in place."""
    reader = _Reader()
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tags = [one for one in cell.metadata.get("tags", []) if one != CHECK]
        varies = reader.cell(
            cell.source
        )  # also where a person decides: later cells build on this one
        if says(cell) and NEVER not in tags and (ALWAYS in tags or not varies):
            tags.append(CHECK)
        cell.metadata.pop("tags", None)
        if tags:
            cell.metadata["tags"] = tags
    return notebook


def count_compared(notebook):
    """(cells that nbval compares, cells that have text to compare) of a tagged notebook."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and says(cell)]
    return sum(CHECK in cell.metadata.get("tags", []) for cell in cells), len(cells)


def tag_files(paths=None):
    """Tag the cells of these notebooks (the committed ones, if none is named) and print how many are compared."""
    paths = paths or sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    for path in map(Path, paths):
        notebook = tag(nbformat.read(path, as_version=4))
        path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
        compared, all_of_them = count_compared(notebook)
        print(
            f"{path.stem}: {compared} of {all_of_them} cells with text output say the same everywhere"
        )
