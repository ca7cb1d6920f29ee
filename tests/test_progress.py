"""People see a bar, log files a plain line a minute, and cells that nbval compares nothing."""

import sys
from types import SimpleNamespace

import pytest

from vflan import progress as module
from vflan.progress import Lines, counted, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves: clock.now."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def kernel(monkeypatch, allows_input, code=""):
    """Let this process look like a notebook kernel."""
    fake = SimpleNamespace(
        _allow_stdin=allows_input, get_parent=lambda: {"content": {"code": code}}
    )
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(module, "_kernel", lambda: fake)


def minutes(bar, clock, n):
    for _ in range(n):
        clock.now += 60
        bar.update(10)


def test_a_log_file_gets_a_line_a_minute_from_the_second_minute_on(clock, capsys):
    with progress("answering pope", 2_000, "questions") as bar:
        assert isinstance(bar, Lines)
        clock.now = 59
        bar.update(10)
        assert capsys.readouterr() == ("", "")
        clock.now = 60
        bar.update(90)
        clock.now = 90
        bar.update(100)
    assert capsys.readouterr() == ("", "answering pope: 100 of 2,000 questions, 19 min left\n")


def test_the_time_left_ignores_what_was_done_before(clock, capsys):
    bar = progress("base", 100, "steps", initial=80)
    bar.set_postfix_str("loss 1.5", refresh=False)
    minutes(bar, clock, 1)
    assert capsys.readouterr().err == "base: 90 of 100 steps, loss 1.5, 1 min left\n"


def test_the_last_batch_counts_no_more_than_there_is(clock, capsys):
    for _ in counted(range(2), "tokenising", 5, "rows", each=4):
        clock.now += 60
    assert capsys.readouterr().err.splitlines()[-1] == "tokenising: 5 of 5 rows, 0 min left"


def test_bytes_are_shown_in_gigabytes(clock, capsys):
    bar = progress("reading flan.json", 4_000_000_000, "B")
    clock.now = 60
    bar.update(1_000_000_000)
    assert capsys.readouterr().err == "reading flan.json: 1.00GB of 4.00GB, 3 min left\n"


def test_a_terminal_gets_a_bar_after_some_seconds_only(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("quick", 10, "rows") as bar:
        bar.update(10)
    assert not isinstance(bar, Lines) and capsys.readouterr().err == ""
    monkeypatch.setattr(module, "DELAY", 0)
    with progress("slow", 10, "rows", mininterval=0) as bar:
        bar.update(5)
    assert "slow:  50%" in capsys.readouterr().err


@pytest.mark.parametrize("allows_input", [True, False])
def test_a_notebook_shows_a_bar_only_if_a_person_runs_its_cells(allows_input, monkeypatch):
    # In a kernel, stderr says nothing about a person.
    monkeypatch.setattr(sys.stderr, "isatty", lambda: not allows_input)
    kernel(monkeypatch, allows_input)
    assert isinstance(progress("x", 3), Lines) is not allows_input


def test_a_cell_that_nbval_compares_gets_no_line(clock, capsys, monkeypatch):
    kernel(monkeypatch, False, "# NBVAL_CHECK_OUTPUT\nvflan.check(data)")
    minutes(progress("x", 30), clock, 3)
    assert capsys.readouterr() == ("", "")
    kernel(monkeypatch, False, "vflan.check(data)")
    minutes(progress("x", 30), clock, 3)
    assert capsys.readouterr().err.count("\n") == 3


def test_counted_yields_the_items_and_counts_them(clock, capsys):
    def slow():
        for i in range(3):
            clock.now += 60
            yield i

    assert list(counted(slow(), "tokenising", 12, "rows", each=4)) == [0, 1, 2]
    counts = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == [f"tokenising: {n} of 12 rows" for n in (4, 8, 12)]


def test_a_real_kernel_knows_whether_a_person_runs_its_cells():
    """papermill and nbval run cells through a client without input; JupyterLab allows input."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        for allows_input in (True, False):
            printed = []
            client.execute_interactive(
                "from vflan.progress import is_watched\nprint(is_watched())",
                allow_stdin=allows_input,
                stdin_hook=lambda message: None,
                output_hook=lambda message, printed=printed: printed.append(
                    message["content"].get("text")
                ),
                timeout=60,
            )
            assert f"{allows_input}\n" in printed
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
