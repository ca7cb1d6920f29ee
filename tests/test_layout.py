"""The house rules: who may import whom, and that nothing of one machine is left in the repository."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parent.parent
# A room imports only rooms before it. Some know nothing of the house and so stand before those that use them:
# conversation (check asks it what a row would lose), stats, kept, endpoint and judge (what scores stands after them).
ROOMS = """
recipe io presets parameters progress conversation pictures samples mixtures llava_mixture stats kept endpoint judge
benchmarks contamination checks fetch model batches learner footprint checkpoints processes room plan doctor share runs log
heldout train answers streaming served workers
evaluate sweeps claims
plots widgets world report tables stable book publish
""".split()
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
    parts = [name.split(".") for name in imported(path)]
    return {p[1] for p in parts if p[0] == "vflan" and len(p) > 1 and p[1] in ROOMS} - {room(path)}


def test_every_room_has_its_place_in_the_order():
    assert {room(path) for path in FILES} - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOME)))
def test_imports_run_one_way(path):
    before = [] if room(path) == "__init__" else ROOMS[: ROOMS.index(room(path))]
    assert rooms_imported(path) <= set(before)


def test_the_road_never_imports_the_mini_world():
    assert [str(p) for p in FILES if room(p) not in ("world", "book", "publish") and "world" in rooms_imported(p)] == []


@pytest.mark.parametrize("name", ["plots", "widgets", "stats", "claims", "recipe"])
def test_looking_at_results_needs_no_torch(name):
    for path in (p for p in FILES if room(p) == name):
        assert not {n.split(".")[0] for n in imported(path)} & {"torch", "transformers", "peft", "accelerate"}


@pytest.mark.parametrize("package, rooms", [("peft", {"model"}), ("bitsandbytes", {"model", "train"})])
def test_quantising_and_adapters_stay_in_one_room(package, rooms):
    """model owns both; train takes only the 8-bit optimizer."""
    assert {room(p) for p in FILES for n in imported(p) if n.split(".")[0] == package} <= rooms


def test_no_tracked_file_holds_a_machine_path():
    git = subprocess.run(["git", "ls-files", "-z"], cwd=HOME, capture_output=True, text=True)
    if git.returncode or not git.stdout:
        pytest.skip("not a git checkout")
    path = re.compile(rb"(?<![\w.~/-])/(?:hom[e]|User[s]|roo[t]|wor[k]|op[t]|tm[p])/\w")
    found = [
        name for name in git.stdout.split("\0") if (HOME / name).is_file() and path.search((HOME / name).read_bytes())
    ]
    assert found == []
