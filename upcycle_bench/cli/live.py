"""A matrix on a terminal while it runs: one table in one place, a row for each strategy.

    live = live_table(reporter)                     # None where there is no terminal: lines are said there
    with live(tally) as above: above.say("...")     # in the table what the tally knows, above it what is said

The table fits the terminal, also after its size was changed: strategies of which nothing runs are folded first, and
columns are left out where it is narrow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from upcycle_bench.util.progress import Reporter, TerminalReporter

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderResult
    from rich.table import Table

    from upcycle_bench.planning.tally import Entry, Tally
    from upcycle_bench.run_many import Live

SIGNS = {"done": "✓", "running": "▶", "elsewhere": "○", "failed": "✗", "waiting": "·"}
ASCII = {"done": "+", "running": ">", "elsewhere": "o", "failed": "x", "waiting": "."}
COLOURS = {"done": "green", "running": "cyan", "elsewhere": "magenta", "failed": "red", "waiting": "dim"}
MOST_SIGNS = 12  # of a strategy's row; more cells are counted
AROUND = 5  # lines of the table that are no row
WIDTHS = {"runs": 0, "seed": 4, "at": 18, "loss": 7, "images/s": 8, "left": 8}
# A terminal without room leaves these columns out, in this order, unless a name has so many characters or is whole. A
# seed shows in the row of signs, too.
NAMES = {"seed": 24, "images/s": 16, "loss": 16, "left": 12}
NAME = 8  # at least
REFRESH = 4  # times a second


def live_table(reporter: Reporter) -> Live | None:
    """How to show a matrix where that reporter has a terminal that can move its cursor; else None."""
    if not isinstance(reporter, TerminalReporter):
        return None
    console = reporter.console
    if not console.is_terminal or console.is_dumb_terminal:
        return None

    @contextlib.contextmanager
    def live(tally: Tally) -> Iterator[Reporter]:
        from rich.live import Live as Display

        # What others print on stderr comes above the table.
        with Display(Matrix(tally), console=console, refresh_per_second=REFRESH, vertical_overflow="crop") as display:
            yield Above(reporter)
            display.transient = True  # after an interruption the table stays; else another one follows

    return live


class Above(Reporter):
    """Says lines above the table, where all else stands."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def say(self, line: str) -> None:
        self.reporter.say(line)


class Matrix:
    """What rich draws, each time anew."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        signs = ASCII if options.ascii_only else SIGNS
        yield _table(self.tally, signs, options.max_width, (options.height or console.height) - AROUND)
        yield _summary(self.tally, signs)


def _table(tally: Tally, signs: dict[str, str], width: int, most: int) -> Table | Group:
    """A row for each strategy, and for each of its running cells after the first."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    by_strategy: dict[str, list[Entry]] = {}
    for entry in tally.entries.values():
        by_strategy.setdefault(entry.cell.strategy, []).append(entry)
    longest = max(map(len, by_strategy))
    widths = {**WIDTHS, "runs": max(4, *(min(len(entries), MOST_SIGNS) for entries in by_strategy.values()))}
    for column, least in NAMES.items():
        if min(least, longest) + sum(size + 2 for size in widths.values()) > width:
            del widths[column]
    name_width = max(NAME, min(longest, width - sum(size + 2 for size in widths.values())))
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))  # and one between
    cut: Any = "crop" if signs is ASCII else "ellipsis"
    for name, size in {"strategy": name_width, **widths}.items():
        made.add_column(name, width=size, no_wrap=True, overflow=cut)
    shown, folded = _folded(by_strategy, most)
    for strategy in shown:
        for row in _rows(tally, strategy, by_strategy[strategy], signs, widths):
            made.add_row(*row)
    return Group(made, Text(f"and {folded} more", "dim")) if folded else made


def _folded(by_strategy: dict[str, list[Entry]], most: int) -> tuple[list[str], int]:
    """The strategies that have room in `most` lines, in their order, and how many have not."""

    def lines(names: Sequence[str]) -> int:
        running = (sum(entry.state == "running" for entry in by_strategy[name]) for name in names)
        return sum(max(1, number) for number in running) + (len(names) < len(by_strategy))

    def need(name: str) -> int:
        states = {entry.state for entry in by_strategy[name]}
        return next(
            (rank for rank, state in enumerate(("running", "failed", "elsewhere", "waiting")) if state in states), 4
        )

    shown = sorted(by_strategy, key=need)  # stable: the first that wait are shown before the last
    while len(shown) > 1 and lines(shown) > most:
        shown.pop()
    return [name for name in by_strategy if name in shown], len(by_strategy) - len(shown)


def _rows(
    tally: Tally, strategy: str, entries: Sequence[Entry], signs: dict[str, str], columns: dict[str, int]
) -> Iterator[list[Any]]:
    from rich.text import Text

    running = [entry for entry in entries if entry.state == "running"]
    strip = Text()
    if len(entries) <= MOST_SIGNS:
        for entry in entries:
            strip.append(signs[entry.state], COLOURS[entry.state])
    else:
        strip.append(f"{sum(entry.state == 'done' for entry in entries)}/{len(entries)}")
    # Text: rich would read `cluster-aware[tau=0.8]` as markup.
    first = {"runs": strip, **(_facts(tally, running[0]) if running else _others(entries))}
    yield [Text(strategy), *(first.get(column, "") for column in columns)]
    for entry in running[1:]:
        facts = _facts(tally, entry)
        yield ["", *(facts.get(column, "") for column in columns)]


def _facts(tally: Tally, entry: Entry) -> dict[str, Any]:
    """What a running cell is at."""
    from rich.text import Text

    from upcycle_bench.util.log_lines import time_in_words

    what = "training" if entry.training else entry.what.partition(": ")[2] or entry.what  # whose row it is, is said
    steps = f" {entry.done}/{entry.total}" if entry.total else ""
    left = tally.seconds_of(entry)
    return {
        "seed": entry.cell.seed,
        "at": Text(what[: WIDTHS["at"] - len(steps)] + steps),
        "loss": entry.facts.get("loss", ""),
        "images/s": entry.facts.get("images/s", ""),
        "left": "" if left is None else time_in_words(left),
    }


def _others(entries: Sequence[Entry]) -> dict[str, Any]:
    """Which other process is at a cell of a strategy of which none runs here."""
    from rich.text import Text

    first = next((entry for entry in entries if entry.state == "elsewhere"), None)
    return (
        {"seed": first.cell.seed, "at": Text(first.holder.removeprefix("process "), COLOURS["elsewhere"])}
        if first
        else {}
    )


def _summary(tally: Tally, signs: dict[str, str]) -> Any:
    """The last lines: how many cells are in which state, which also explains the signs; and the time left."""
    from rich.text import Text

    from upcycle_bench.util.log_lines import time_in_words

    counts = [(state, sign, tally.count(state)) for state, sign in signs.items()]
    line = Text("  ").join(Text(f"{sign} {n} {state}", COLOURS[state]) for state, sign, n in counts if n)
    left = tally.seconds_left()
    line.append(f"\n{time_in_words(tally.clock() - tally.began)} so far")
    line.append("" if left is None else f", {time_in_words(left)} left", "bold")
    return line
