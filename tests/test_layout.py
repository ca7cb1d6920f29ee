"""The house rules: who may import whom, and that nothing of one machine is left in the repository."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import vflan

HOME = Path(__file__).resolve().parent.parent
# A room imports only itself and rooms before it.
ROOMS = "config io progress presets data models training evaluation analysis tools world".split()
# Two look back: training data is compared with the benchmarks' questions, and a run offers its own export.
BACK = {("data/decontamination.py", "evaluation"), ("training/run.py", "tools")}
FILES = sorted((HOME / "vflan").rglob("*.py"))


def room(path):
    return path.relative_to(HOME / "vflan").parts[0].removesuffix(".py")


def imported(path):
    """The absolute names of all modules that a file imports, inside functions too."""
    package = path.relative_to(HOME).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from [base, *(f"{base}.{alias.name}" for alias in node.names)]


def rooms_imported(path):
    """The rooms that a file imports, without those of BACK."""
    parts = [name.split(".") for name in imported(path)]
    rooms = {p[1] for p in parts if p[0] == "vflan" and len(p) > 1 and p[1] in ROOMS} - {room(path)}
    return {
        name for name in rooms if (path.relative_to(HOME / "vflan").as_posix(), name) not in BACK
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOME)))
def test_imports_run_one_way(path):
    where = room(path)
    before = ROOMS[: ROOMS.index(where)] if where in ROOMS else ROOMS if where == "__main__" else []
    assert rooms_imported(path) <= set(before)


def test_a_room_says_what_it_is_for():
    for path in FILES:
        if path.name == "__init__.py":
            assert (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").strip(), (
                path
            )


def test_only_notebooks_and_their_tools_meet_the_mini_world():
    assert [
        str(p) for p in FILES if room(p) not in ("world", "tools") and "world" in rooms_imported(p)
    ] == []


def test_no_module_has_the_name_of_a_public_function():
    top = {path.stem for path in (HOME / "vflan").iterdir()}
    assert not {name for name in vflan.__all__ if inspect.isroutine(getattr(vflan, name))} & top


@pytest.mark.parametrize(
    "name", ["analysis/plots", "tools/widgets", "evaluation/stats", "analysis/claims", "config"]
)
def test_looking_at_results_needs_no_torch(name):
    path = HOME / "vflan" / f"{name}.py"
    assert not {n.split(".")[0] for n in imported(path)} & {
        "torch",
        "transformers",
        "peft",
        "accelerate",
    }


@pytest.mark.parametrize(
    "package, rooms", [("peft", {"models"}), ("bitsandbytes", {"models", "training"})]
)
def test_quantising_and_adapters_stay_in_one_room(package, rooms):
    """models owns both; training takes only the 8-bit optimizer."""
    assert {room(p) for p in FILES for n in imported(p) if n.split(".")[0] == package} <= rooms


def test_no_tracked_file_holds_a_machine_path():
    git = subprocess.run(["git", "ls-files", "-z"], cwd=HOME, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout")
    path = re.compile(rb"(?<![\w.~/-])/(?:hom[e]|User[s]|roo[t]|wor[k]|op[t]|tm[p])/\w")
    found = [
        name
        for name in git.stdout.split("\0")
        if (HOME / name).is_file() and path.search((HOME / name).read_bytes())
    ]
    assert found == []
