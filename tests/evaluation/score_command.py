"""Fixtures for tests of `vflan score`: files in a folder, and what the command prints."""

import json

import pytest

from vflan.__main__ import main


@pytest.fixture
def put(tmp_path):
    """put("a.jsonl", rows): a file of this test, as json lines, json or text."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            content = "\n".join(json.dumps(row) for row in content)
        elif not isinstance(content, str):
            content = json.dumps(content)
        path.write_text(content, encoding="utf-8")
        return path

    return write


def score_arguments(name, **options):
    """The words of `vflan score`; a list gives an option several values."""
    given = [
        part
        for key, value in options.items()
        for part in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]
    return ["score", name, *given]


@pytest.fixture
def command(capsys):
    """command("pope", questions=..., answers=...): the json that the command prints; its stderr is
    `command.err`.
    """

    def run(name, **options):
        code = main(score_arguments(name, **options))
        out, run.err = capsys.readouterr()
        assert code == 0, run.err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


@pytest.fixture
def refused(capsys):
    """refused("pope", questions=...): the sentence with which the command ends, with status 1."""

    def run(name, **options):
        assert main(score_arguments(name, **options)) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    return run
