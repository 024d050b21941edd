"""Progress of a run on stderr: the task, the loss, the throughput, the time left.

    reporter = TerminalReporter() if distributed.is_main() else Reporter()
    with reporter.bar("training", total=100) as step: step(1, {"loss": 2.0, "samples_per_second": 500.0})

All that can take long gets a `Reporter`. The base class shows nothing, for tests and for the ranks that do not print.
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

        The metrics are empty, or hold `loss` and `samples_per_second`.
        """
        yield lambda done, metrics: None

    @contextlib.contextmanager
    def task(self, what: str) -> Iterator[None]:
        """A block of unknown length."""
        yield

    def track(self, items: Iterable[Item], what: str) -> Iterable[Item]:
        """The same items, and a bar that advances by one when the next item is asked for."""
        return items

    def say(self, line: str) -> None:
        """Print a line above the bar. Any thread may call it."""


class TerminalReporter(Reporter):
    """Shows rich's bars while stderr is a terminal, and one line at the end of each bar and task in any case."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[OnStep]:
        with self._progress() as progress:
            task = progress.add_task(what, total=total, note="")

            def step(done: int, metrics: Mapping[str, float]) -> None:
                note = ""
                if metrics:
                    note = f"loss {metrics['loss']:.3f}, {metrics['samples_per_second']:,.0f} samples/s"
                progress.update(task, completed=done, note=note)

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
