"""The live table: what it shows, that it fits any terminal, and which terminals have it."""

import io
from typing import Any

import pytest
from rich.console import Console

from tests.planning.test_tally import Cell, Clock
from upcycle_bench.cli.live import Above, Matrix, live_table
from upcycle_bench.planning.tally import Tally
from upcycle_bench.util.log_lines import LineReporter
from upcycle_bench.util.progress import TerminalReporter


def matrix(names: list[str], seeds: int, at_once: int = 2) -> tuple[Tally, dict[tuple[str, int], Any], Clock]:
    cells: dict[tuple[str, int], Any] = {(name, seed): Cell(name, seed) for seed in range(seeds) for name in names}
    clock = Clock()
    return Tally([*cells.values()], [None] * len(cells), dict.fromkeys(names, (0, 100)), at_once, clock), cells, clock


def run(tally: Tally, cell: Any, clock: Clock) -> None:
    """A cell that has trained 41 of 1200 steps, a second each."""
    tally.begin(cell)
    tally.step(cell, f"training {cell.strategy}", 1, 1200)
    clock.now += 40
    tally.step(cell, f"training {cell.strategy}", 41, 1200, {"loss": "2.1234", "images/s": "844"})


def drawn(tally: Tally, width: int = 80, height: int = 24, encoding: str = "utf-8", **settings: Any) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    console = Console(width=width, height=height, file=file, force_terminal=True, **{"color_system": None, **settings})
    console.print(Matrix(tally))
    file.seek(0)
    return file.read().splitlines()


@pytest.fixture
def shown() -> Tally:
    tally, cells, clock = matrix(["dense", "cluster-aware[tau=0.8]", "btx"], 3)
    tally.end(cells["dense", 0], "done")
    run(tally, cells["cluster-aware[tau=0.8]", 0], clock)
    run(tally, cells["cluster-aware[tau=0.8]", 1], clock)
    tally.leave(cells["dense", 1], "process 12 on node3")
    tally.end(cells["btx", 0], "failed")
    tally.begin(cells["btx", 1])
    tally.step(cells["btx", 1], "preparing btx: branch 1 of 4", 7, 50, {"loss": "1.5"})
    return tally


def test_every_state_is_shown_and_explained(shown: Tally) -> None:
    lines = [line.split() for line in drawn(shown, width=90)]
    assert [*lines[0], *lines[2:]] == [
        "strategy", "runs", "seed", "at", "loss", "images/s", "left",
        ["dense", "✓○·", "1", "12", "on", "node3"],
        ["cluster-aware[tau=0.8]", "▶▶·", "0", "training", "41/1200", "2.1234", "844", "0:18:39"],  # 1159 s less 40 s
        ["1", "training", "41/1200", "2.1234", "844", "0:19:19"],
        ["btx", "✗▶·", "1", "branch", "1", "of", "4", "7/50", "1.5", "0:20:00"],
        ["✓", "1", "done", "▶", "3", "running", "○", "1", "elsewhere", "✗", "1", "failed", "·", "3", "waiting"],
        ["0:01:20", "so", "far,", "0:40:00", "left"],
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("height", [8, 24, 50])
@pytest.mark.parametrize("seeds", [1, 10, 30])
def test_a_large_matrix_fits_any_terminal(width: int, height: int, seeds: int) -> None:
    """17 strategies, one with a name of 200 characters. What runs and what failed is never folded away first."""
    names = ["x" * 200, *(f"strategy-{number}" for number in range(1, 17))]
    tally, cells, clock = matrix(names, seeds)
    run(tally, cells["strategy-15", 0], clock)
    tally.end(cells["strategy-16", 0], "failed")
    lines = drawn(tally, width, height)
    assert len(lines) < height and max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "41/1200" in text and "▶ 1 running  ✗ 1 failed" in text and lines[-1].startswith("0:00:40 so far, ")
    shown = lines[2:-2]
    if height == 8:
        assert shown.pop().rstrip() == "and 15 more" and len(shown) == 2
        assert "41/1200" in shown[0] and (seeds == 30 or "✗" in shown[1])
    else:
        assert len(shown) == 17
    if width >= 60:
        assert "strategy-15" in text and "strategy-16" in text
        assert "0:19:19" in text
    if width >= 80 and seeds <= 10:
        assert "2.1234" in text and "844" in text


def test_many_seeds_are_counted(shown: Tally) -> None:
    tally, cells, _ = matrix(["dense"], 30)
    for seed in range(3):
        tally.end(cells["dense", seed], "done")
    assert drawn(tally)[2].split() == ["dense", "3/30"]


def test_no_color_and_no_unicode(shown: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[32m" in "".join(drawn(shown, color_system="standard"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in "".join(drawn(shown, color_system="standard"))
    plain = "\n".join(drawn(shown, encoding="ascii"))
    assert "+ 1 done  > 3 running  o 1 elsewhere  x 1 failed  . 3 waiting" in plain and plain.isascii()


def test_what_is_said_stands_above_and_is_no_markup(shown: Tally) -> None:
    file = io.StringIO()
    reporter = TerminalReporter()
    reporter.console = Console(file=file, force_terminal=True, width=80, height=24, color_system=None)
    live = live_table(reporter)
    assert live is not None
    with live(shown) as above:
        assert isinstance(above, Above)
        above.say("cluster-aware[tau=0.8] seed 0 failed: " + "a long reason " * 10)
        with above.bar("training", 10) as step:
            step(1, {"loss": 1.0, "samples_per_second": 1.0})  # it has no bar of its own
    out = file.getvalue()
    assert "cluster-aware[tau=0.8] seed 0 failed: " + "a long reason " * 10 in out
    assert "done training" not in out


@pytest.fixture
def terminal() -> TerminalReporter:
    reporter = TerminalReporter()
    reporter.console = Console(file=io.StringIO(), force_terminal=True)
    return reporter


def test_which_terminals_have_it(terminal: TerminalReporter, monkeypatch: pytest.MonkeyPatch) -> None:
    assert live_table(terminal) is not None
    assert live_table(LineReporter()) is None
    monkeypatch.setenv("TERM", "dumb")
    assert live_table(terminal) is None
    monkeypatch.delenv("TERM")
    terminal.console = Console(file=io.StringIO())
    assert live_table(terminal) is None


def test_an_interruption_leaves_the_table(shown: Tally, terminal: TerminalReporter) -> None:
    """A whole matrix is followed by the table of its outcomes instead."""
    live = live_table(terminal)
    assert live is not None
    with live(shown):
        pass
    assert isinstance(terminal.console.file, io.StringIO)
    erased = terminal.console.file.getvalue()
    terminal.console.file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), live(shown):
        raise KeyboardInterrupt
    kept = terminal.console.file.getvalue()
    up = "\x1b[1A\x1b[2K"  # a line up, and cleared
    assert erased.rstrip("\r").endswith(up) and not kept.rstrip("\r").endswith(up)
