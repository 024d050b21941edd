"""Progress of a run on the terminal (stderr): what goes on, loss, throughput, time left. Silent elsewhere.

reporter = TerminalReporter() if distributed.is_main() else Reporter()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

OnStep = Callable[[int, Mapping[str, float]], None]


class Reporter:
    """Says nothing; the base of those that do."""

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[OnStep]:
        """A bar over `total` steps; the callable takes the steps done and the last metrics."""
        yield lambda done, metrics: None

    @contextlib.contextmanager
    def task(self, what: str) -> Iterator[None]:
        """Something whose length is not known."""
        yield

    def track(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        """The same items, shown as they pass."""
        return items

    def say(self, line: str) -> None:
        """A line, above what goes on; any thread may call it."""


class TerminalReporter(Reporter):
    """rich bars on stderr, which leave the terminal when done; plain lines where stderr is no terminal."""

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
        self.console.print(f"[green]done[/green] {what}: {total} steps, {note}", highlight=False)

    @contextlib.contextmanager
    def task(self, what: str) -> Iterator[None]:
        with self._progress() as progress:
            progress.add_task(what, total=None, note="")
            yield
        self.console.print(f"[green]done[/green] {what}", highlight=False)

    def track(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        with self._progress() as progress:
            length = len(items) if isinstance(items, Sized) else None
            task = progress.add_task(what, total=length, note="")
            for item in items:
                yield item
                progress.advance(task)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

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
