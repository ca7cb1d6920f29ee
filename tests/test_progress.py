"""A bar for people, a plain line a minute for log files, nothing under a cell that nbval compares."""

import sys
from types import SimpleNamespace

import pytest

from vflan import progress as room
from vflan.progress import Lines, counted, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it: clock.now."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(room.time, "perf_counter", lambda: clock.now)
    return clock


def kernel(monkeypatch, asks, code=""):
    """Let this process be a notebook kernel; `asks`: whether its cells may ask for input."""
    own = SimpleNamespace(_allow_stdin=asks, get_parent=lambda: {"content": {"code": code}})
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(room, "_kernel", lambda: own)


def minutes(bar, clock, n):
    for _ in range(n):
        clock.now += 60
        bar.update(10)


def test_a_line_a_minute_where_nobody_watches_and_none_in_the_first(clock, capsys):
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


def test_what_was_done_before_does_not_make_it_look_quick(clock, capsys):
    bar = progress("base", 100, "steps", initial=80)
    bar.set_postfix_str("loss 1.5", refresh=False)
    minutes(bar, clock, 1)
    assert capsys.readouterr().err == "base: 90 of 100 steps, loss 1.5, 1 min left\n"


def test_bytes_are_read_as_such(clock, capsys):
    bar = progress("reading flan.json", 4_000_000_000, "B")
    clock.now = 60
    bar.update(1_000_000_000)
    assert capsys.readouterr().err == "reading flan.json: 1.00GB of 4.00GB, 3 min left\n"


def test_a_terminal_gets_a_bar_after_some_seconds_only(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("quick", 10, "rows") as bar:
        bar.update(10)
    assert not isinstance(bar, Lines) and capsys.readouterr().err == ""
    monkeypatch.setattr(room, "DELAY", 0)
    with progress("slow", 10, "rows", mininterval=0) as bar:
        bar.update(5)
    assert "slow:  50%" in capsys.readouterr().err


@pytest.mark.parametrize("asks", [True, False])
def test_in_a_notebook_it_is_a_bar_only_where_a_person_runs_the_cells(asks, monkeypatch):
    monkeypatch.setattr(
        sys.stderr, "isatty", lambda: not asks
    )  # a kernel's word counts, not its stderr's
    kernel(monkeypatch, asks)
    assert isinstance(progress("x", 3), Lines) is not asks


def test_a_checked_cell_stays_as_it_is(clock, capsys, monkeypatch):
    kernel(monkeypatch, False, "# NBVAL_CHECK_OUTPUT\nvflan.check(data)")
    minutes(progress("x", 30), clock, 3)
    assert capsys.readouterr() == ("", "")
    kernel(monkeypatch, False, "vflan.check(data)")
    minutes(progress("x", 30), clock, 3)
    assert capsys.readouterr().err.count("\n") == 3


def test_counted_gives_the_items_and_counts_them(clock, capsys):
    def slow():
        for i in range(3):
            clock.now += 60
            yield i

    assert list(counted(slow(), "tokenising", 12, "rows", each=4)) == [0, 1, 2]
    said = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"tokenising: {n} of 12 rows" for n in (4, 8, 12)]


def test_a_real_kernel_tells_whether_a_person_runs_its_cells():
    """papermill and nbval run cells through a client that forbids questions; JupyterLab allows them."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        for asks in (True, False):
            said = []
            client.execute_interactive(
                "from vflan.progress import _watched\nprint(_watched())",
                allow_stdin=asks,
                stdin_hook=lambda message: None,
                output_hook=lambda message, said=said: said.append(message["content"].get("text")),
                timeout=60,
            )
            assert f"{asks}\n" in said
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
