"""Editors and type checkers see the public API: the Python of the pages passes a type checker."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import vflan

HOME = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/real_data.md", "data/README.md"]


def type_errors(folder, code):
    """The messages of pyright about a file with this code."""
    (folder / "example.py").write_text(code)
    settings = {"extraPaths": [str(HOME)], "useLibraryCodeForTypes": False}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    pyright = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return [error["message"] for error in json.loads(pyright.stdout)["generalDiagnostics"]]


def test_a_type_checker_finds_the_mistakes_and_nothing_in_the_pages(tmp_path):
    text = "\n".join((HOME / page).read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    code = "\n".join(map(dedent, blocks)) + "\nvflan.train(vflan.preset('tiny'))\n"
    (error,) = type_errors(tmp_path, code)
    assert '"Preset" is not assignable to' in error


def test_the_stub_lists_what_it_imports():
    stub = (HOME / "vflan" / "__init__.pyi").read_text(encoding="utf-8")
    listed = re.findall(r'"(\w+)"', stub.split("__all__")[1])
    assert sorted(listed) == sorted(vflan.__all__) and all(hasattr(vflan, name) for name in listed)


def without_annotations(function, name):
    """The parameters of a function that have no annotation, and `return` if its result has none."""
    signature = inspect.signature(function)
    missing = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
    ]
    if signature.return_annotation is signature.empty:
        missing.append("return")
    return [f"{name}: {parameter}" for parameter in missing]


def methods_of(cls):
    """The public methods that a class defines itself, by name."""
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def test_every_public_function_is_annotated():
    missing = []
    for name in vflan.__all__:
        public = getattr(vflan, name)
        if inspect.isroutine(public):
            missing += without_annotations(public, name)
        elif inspect.isclass(public):
            for method, function in methods_of(public):
                missing += without_annotations(function, f"{name}.{method}")
    assert missing == []
