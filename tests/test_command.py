"""The command line reads what papermill users write, and `vflan upload` writes a server's file."""

import json
from types import SimpleNamespace

import pytest

from vflan.__main__ import app, main, spelled_out
from vflan.evaluation import results
from vflan.evaluation.benchmarks import BENCHMARKS


@pytest.mark.parametrize(
    "written, read",
    [
        (["-p", "changes", '{"a": "x=y"}'], ["-p", 'changes={"a": "x=y"}']),
        (["-p", "seeds=[1]", "--again"], ["-p", "seeds=[1]", "--again"]),
        (
            ["--notebooks", "02", "05", "--again"],
            ["--notebooks", "02", "--notebooks", "05", "--again"],
        ),
        (["tiny", "--notebooks"], ["tiny", "--notebooks"]),
    ],
)
def test_the_syntax_of_papermill_is_read(written, read):
    assert spelled_out(written) == read


def test_an_option_without_its_value_runs_nothing(capsys):
    assert main(["notebooks", "tiny", "--notebooks"]) == 2
    assert "--notebooks" in capsys.readouterr().err


def test_a_runs_answers_become_the_servers_file(tmp_path, monkeypatch):
    samples, texts = [{"question_id": "7"}, {"question_id": "8"}], ["Red.", None]
    answers = SimpleNamespace(samples=samples, benchmark=BENCHMARKS["gqa"]), texts
    monkeypatch.setattr(results, "_read_answers", lambda *_: answers)
    path = results.write_upload("gqa", SimpleNamespace(folder=tmp_path), out=tmp_path / "up.json")
    assert json.loads(path.read_text()) == [
        {"questionId": "7", "prediction": "red"},
        {"questionId": "8", "prediction": ""},
    ]


def test_a_benchmark_without_a_server_is_refused(capsys):
    assert main(["upload", "pope", "--run", "runs/none"]) == 1
    assert "There is no upload file for 'pope'" in capsys.readouterr().err


def test_each_command_says_what_it_does(capsys):
    for command in app.registered_commands:
        assert main([command.name, "--help"]) == 0
        assert f"vflan {command.name}" in capsys.readouterr().out
