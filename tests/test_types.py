"""Editors and type checkers see the public API: the Python of the pages passes a type checker."""

import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import vflan

HOME = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/real_data.md", "data/README.md"]


def complaints(folder, code):
    """What pyright says about a file with this code."""
    (folder / "shown.py").write_text(code)
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(HOME)], "useLibraryCodeForTypes": False})
    )
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return [found["message"] for found in json.loads(said.stdout)["generalDiagnostics"]]


def test_a_type_checker_finds_the_mistakes_and_nothing_in_the_pages(tmp_path):
    text = "\n".join((HOME / page).read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    code = "\n".join(map(dedent, blocks)) + "\nvflan.train(vflan.preset('tiny'))\n"
    (found,) = complaints(tmp_path, code)
    assert '"Preset" is not assignable to' in found


def test_the_stub_lists_what_it_imports():
    stub = (HOME / "vflan" / "__init__.pyi").read_text(encoding="utf-8")
    listed = re.findall(r'"(\w+)"', stub.split("__all__")[1])
    assert sorted(listed) == sorted(vflan.__all__) and all(hasattr(vflan, name) for name in listed)
