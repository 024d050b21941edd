"""Progress of a run on stderr: the phase, the loss, the throughput, the time left.

    reporter = TerminalReporter()
    with reporter.bar("training", total=100) as step: step(1, {"loss": 2.0, "samples_per_second": 500.0})

All that can take long gets a `Reporter`. The base class shows nothing, for tests and for the ranks that do not print.
Without a terminal it is `log_lines.LineReporter`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar

OnStep = Callable[[int, Mapping[str, float]], None]
Item = TypeVar("Item")


class Reporter:
    """Shows nothing; the base of reporters that do."""

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[OnStep]:
        """A bar over `total` steps. The block gets a function of the number of steps done and the latest metrics.

        The metrics are empty, or the latest line of the training's metrics.
        """
        yield lambda done, metrics: None

    @contextlib.contextmanager
    def task(self, what: str) -> Iterator[None]:
        """A block of unknown length."""
        yield

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """A block whose parts are shown by themselves; it is only said to be done."""
        yield

    def track(self, items: Iterable[Item], what: str) -> Iterable[Item]:
        """The same items, and a bar that advances by one when the next item is asked for."""
        return items

    def say(self, line: str) -> None:
        """Print a line above the bar. Any thread may call it."""


class TerminalReporter(Reporter):
    """Shows rich's bars, and one line at the end of each bar and task."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[OnStep]:
        with self._progress() as progress:
            task = progress.add_task(what, total=total, note="")

            def step(done: int, metrics: Mapping[str, float]) -> None:
                progress.update(task, completed=done, note=_note(metrics))

            yield step
            note = progress.tasks[0].fields["note"]
        steps = f"{total} steps, {note}" if note else f"{total} steps"
        self.console.print(f"[green]done[/green] {what}: {steps}", highlight=False)

    @contextlib.contextmanager
    def task(self, what: str) -> Iterator[None]:
        with self._progress() as progress:
            progress.add_task(what, total=None, note="")
            yield
        self.console.print(f"[green]done[/green] {what}", highlight=False)

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        yield
        self.console.print(f"[green]done[/green] {what}", highlight=False)

    def track(self, items: Iterable[Item], what: str) -> Iterable[Item]:
        with self._progress() as progress:
            length = len(items) if isinstance(items, Sized) else None
            task = progress.add_task(what, total=length, note="")
            for item in items:
                yield item
                progress.advance(task)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _progress(self) -> Any:
        from rich import progress

        return progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )


def _note(metrics: Mapping[str, float]) -> str:
    """A line of metrics in short."""
    if not metrics:
        return ""
    parts = [f"loss {metrics['loss']:.3f}", f"rate {metrics.get('learning_rate', 0):.2g}"]
    parts.append(f"{metrics['samples_per_second']:,.0f} images/s")
    if dropped := metrics.get("tokens_dropped"):
        parts.append(f"{dropped:.1%} dropped")
    if bad := metrics.get("bad_samples"):
        parts.append(f"{bad:,.0f} bad samples")
    return ", ".join(parts)
