"""The command line reads what papermill users write, and `vflan upload` writes a server's file."""

import json
from types import SimpleNamespace

import pytest

import vflan
from vflan.__main__ import app, main, spelled_out
from vflan.evaluation import results


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


def write_answers(folder, name, samples, texts):
    """Questions and cached answers in `folder`, which is then the run and has the benchmarks."""
    (folder / name).mkdir()
    (folder / "answers").mkdir()
    rows = [dict(i=i, answer=text, finish="stop") for i, text in enumerate(texts)]
    for path, some in (
        (folder / name / "questions.jsonl", samples),
        (folder / "answers" / f"{name}.jsonl", [{"model": "the header"}, *rows]),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return SimpleNamespace(folder=folder, recipe=SimpleNamespace(benchmarks=str(folder)))


def test_a_runs_answers_become_the_servers_file(tmp_path):
    samples = [dict(question_id=i, text="what?", label="red") for i in "78"]
    run = write_answers(tmp_path, "gqa", samples, ["Red.", ""])
    path = results.write_upload("gqa", run, out=tmp_path / "up.json")
    assert json.loads(path.read_text()) == [
        {"questionId": "7", "prediction": "red"},
        {"questionId": "8", "prediction": ""},
    ]


def test_an_upload_needs_no_judge(tmp_path):
    """The server of MM-Vet judges the answers itself."""
    samples = [dict(question_id="v1_0", text="what?", label="red", category="rec")]
    run = write_answers(tmp_path, "mm_vet", samples, ["Red."])
    path = results.write_upload("mm_vet", run)
    assert path == tmp_path / "answers" / "mm_vet_upload.json"
    assert json.loads(path.read_text()) == {"v1_0": "Red."}


def test_a_benchmark_without_a_server_is_refused(capsys):
    assert main(["upload", "pope", "--run", "runs/none"]) == 1
    assert "There is no upload file for 'pope'" in capsys.readouterr().err


def test_each_command_says_what_it_does(capsys):
    for command in app.registered_commands:
        assert main([command.name, "--help"]) == 0
        assert f"vflan {command.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "tiny", "--processes", "0"],
        ["evaluate", "runs/none", "--processes", "-1"],
        ["plan", "tiny", "--gpus", "0"],
        ["check", "a.json", "b", "--max-length", "1"],
        ["train", "tiny", "--processes", "many"],
    ],
    ids=" ".join,
)
def test_a_number_out_of_range_runs_nothing(arguments, capsys):
    assert main(arguments) == 2
    assert arguments[-2] in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ('{"lr": NaN}', "lr=nan: a number of at least 0"),
        ('{"max_steps": 1e400}', "max_steps=inf: a number"),
        (f'{{"seed": {"9" * 5000}}}', "is no json"),
        ('{"name": "a"}', "the three stages cannot share one"),
        ("[" * 10_000, "is no json"),
        ('{"exclude": {[]}}', "is no json"),
        ('{"lr": 1, "lr": "\\ud800"}', "lr='\\ud800': a number"),
        ('{"runs": "~nosuchuser/x"}', "~nosuchuser is the home of nobody here"),
    ],
    ids=lambda text: text[:30],
)
def test_wrong_changes_are_one_sentence(changes, sentence, capsys):
    assert main(["train", "tiny", "--changes", changes]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vflan train: ") and sentence in line and len(line) < 400


@pytest.mark.parametrize("command", ["doctor", "upload", "publish", "train"])
def test_with_too_little_memory_no_command_begins_to_import_torch(command, capsys, monkeypatch):
    """It may hang there for ever, without a word."""

    def fail():
        raise MemoryError("raise the limit")

    monkeypatch.setattr("vflan.__main__.require_memory", fail)
    assert main([command, "tiny"]) == 1
    assert capsys.readouterr().err.startswith(f"vflan {command}: raise the limit")


@pytest.mark.parametrize("error", [ImportError, FloatingPointError, RuntimeError, OSError])
def test_an_expected_error_is_its_sentence(error, capsys, monkeypatch):
    def fail(*_, **__):
        raise error("what to do")

    monkeypatch.setattr(vflan, "train", fail)
    assert main(["train", "tiny"]) == 1
    assert capsys.readouterr().err == "vflan train: what to do\n"
