"""A preset file of a user's own runs in a process of its own, which hands back three recipes.

It is Python code, and may exit, wait for input, or never end. There it ends nothing but itself,
however it fails, and `faulthandler` tells in which line it was when its time was up. That process
runs this file as a script; it imports nothing of vflan.
"""

import faulthandler
import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from itertools import islice
from pathlib import Path
from typing import Any

SECONDS = 30  # a preset takes less than one; some import torch first
_SHAPE = "see vflan/presets/tiny.py for the shape"


def run_preset_file(path: Path) -> list[dict[str, Any]]:
    """The fields of the three recipes of a preset file; what it prints goes to stderr.

    ValueError says in one sentence, with the file's line, why there are none.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; {_SHAPE}.")
    # It imports what this process could. -P: the files beside this one are no packages.
    command = [sys.executable, "-P", __file__, str(path), str(SECONDS), *sys.path]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        child = subprocess.run(command, timeout=SECONDS + 10, **pipes)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path} does not end: it was stopped after {SECONDS} s.") from None
    text = child.stdout.decode()
    if not text.startswith("{"):
        late = f" does not end: it was stopped after {SECONDS} s"
        ended = f" ended its own process (status {child.returncode})"
        raise ValueError(f"{path}{_late_line(text, path)}{late if text else ended}.")
    answer = json.loads(text)
    if "problem" in answer:
        raise ValueError(f"{path}{answer['problem']}.")
    return answer["recipes"]


def _late_line(text, path) -> str:
    """The line of the file in what faulthandler wrote."""
    found = re.search(rf'File "{re.escape(ascii(str(path))[1:-1])}", line (\d+)', text)
    return f", line {found[1]}," if found else ""


def _answer(path: str) -> dict[str, Any]:
    """The recipes of a preset file, or its problem: a sentence without its subject, the file."""
    what = "cannot be run"
    try:
        make_preset = runpy.run_path(path).get("preset")
        if not callable(make_preset):
            return {"problem": f" defines no preset(); {_SHAPE}"}
        what = "fails"
        recipes = make_preset()
        # Four, because there may be no end of them.
        recipes = list(islice(recipes, 4)) if hasattr(recipes, "__iter__") else []
        if len(recipes) != 3 or any(type(recipe).__name__ != "Recipe" for recipe in recipes):
            problem = f": preset() must return three recipes: projector, base, chat; {_SHAPE}"
            return {"problem": problem}
        return {"recipes": [recipe.to_dict() for recipe in recipes]}
    # SystemExit and KeyboardInterrupt too.
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        line = f", line {lines[-1]}," if lines and lines[-1] else ""
        text = " ".join(f"{type(error).__name__}: {_text(error)}".split())
        return {"problem": f"{line} {what}: {text[:300].rstrip(' :.')}"}


def _text(error) -> str:
    try:
        return str(error)
    except Exception:
        return ""


def _main(path: str, seconds: str, *packages: str) -> None:
    # What the preset prints goes to stderr, so that nothing but the answer is in the pipe.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.argv, sys.path[:] = [path], packages
    faulthandler.dump_traceback_later(float(seconds), exit=True, file=answer)
    answer.write(json.dumps(_answer(path)))
    answer.flush()
    sys.stdout.flush()
    # Threads of the preset may still run.
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
