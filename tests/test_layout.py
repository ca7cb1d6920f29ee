"""Imports run one way through the rooms, and no file holds a path of one machine."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import vflan

HOME = Path(__file__).resolve().parent.parent
PACKAGE = HOME / "vflan"
# A room imports only itself and the rooms before it.
ROOMS = "config io progress presets data models training evaluation analysis tools world".split()
# Two files look back: training data is compared with the benchmarks' questions, and a run has
# methods that export and plot it.
LOOKING_BACK = {
    ("data/decontamination.py", "evaluation"),
    ("training/run.py", "tools"),
    ("training/run.py", "analysis"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def other_rooms(path):
    """The other rooms that a file imports, without the exceptions of LOOKING_BACK."""
    parts = [name.split(".") for name in imported(path)]
    rooms = {p[1] for p in parts if p[0] == "vflan" and len(p) > 1 and p[1] in ROOMS}
    name = path.relative_to(PACKAGE).as_posix()
    return {room for room in rooms - {room_of(path)} if (name, room) not in LOOKING_BACK}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOME)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room in ROOMS:
        allowed = ROOMS[: ROOMS.index(room)]
    else:
        # escape, for one, stands before all rooms and imports none.
        allowed = ROOMS if room == "__main__" else []
    assert other_rooms(path) <= set(allowed)


def test_the_package_checks_nothing_with_assert():
    """`python -O` leaves assert out, and with it the check."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    checks = [
        f"{path.relative_to(HOME)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert len(trees) > 60 and checks == []


def test_each_room_says_what_it_is_for():
    for path in FILES:
        if path.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            assert docstring and docstring.strip(), path


def test_only_the_notebooks_and_their_tools_import_the_mini_world():
    rest = [path for path in FILES if room_of(path) not in ("world", "tools")]
    assert [str(path) for path in rest if "world" in other_rooms(path)] == []


def test_no_module_has_the_name_of_a_public_function():
    modules = {path.stem for path in PACKAGE.iterdir()}
    functions = {name for name in vflan.__all__ if inspect.isroutine(getattr(vflan, name))}
    assert not functions & modules


@pytest.mark.parametrize(
    "name", ["analysis/plots", "tools/widgets", "evaluation/stats", "analysis/claims", "config"]
)
def test_looking_at_results_needs_no_torch(name):
    file = PACKAGE / f"{name}.py"
    files = [file] if file.exists() else sorted((PACKAGE / name).rglob("*.py"))
    heavy = {"torch", "transformers", "peft", "accelerate"}
    imports = {name.split(".")[0] for path in files for name in imported(path)}
    assert files and not imports & heavy


@pytest.mark.parametrize(
    "package, rooms", [("peft", {"models"}), ("bitsandbytes", {"models", "training"})]
)
def test_quantising_and_adapters_stay_in_one_room(package, rooms):
    """models owns both; training takes only the 8-bit optimizer."""
    users = {room_of(p) for p in FILES for name in imported(p) if name.split(".")[0] == package}
    assert users <= rooms


def test_no_tracked_file_holds_a_path_of_one_machine():
    git = subprocess.run(["git", "ls-files", "-z"], cwd=HOME, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout")
    machine_path = re.compile(rb"(?<![\w.~/-])/(?:hom[e]|User[s]|roo[t]|wor[k]|op[t]|tm[p])/\w")
    names = [name for name in git.stdout.split("\0") if (HOME / name).is_file()]
    assert [name for name in names if machine_path.search((HOME / name).read_bytes())] == []
