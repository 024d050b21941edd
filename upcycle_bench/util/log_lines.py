"""Progress as plain lines on stderr, for a log file: what a scheduler keeps of a run that has no terminal.

    2026-11-30T02:40:01Z start training dense: steps=100
    2026-11-30T02:40:03Z training dense: step=10/100 percent=10.0 loss=1.67 ... images/s=844 left=0:00:18 dropped=2.2%
    2026-11-30T02:40:09Z done training dense: seconds=7.8 steps=100 loss=1.65 ...

Facts are `name=value` without spaces, so `grep -o 'loss=[^ ]*'` finds them. Times are UTC.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime, timedelta, timezone

from upcycle_bench.util.progress import Item, OnStep, Reporter

PAUSE = 30  # seconds between the lines of work that has no metrics
START = re.compile(r"start (.+?)((?: [\w/]+=\S+)*)")
STEP = re.compile(r"(.+): (?:step|done)=(\d+)(?:/(\d+))?((?: [\w/]+=\S+)*)")
DONE = re.compile(r"done (.+): seconds=\d+\.\d(?: [\w/]+=\S+)*")
STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


class LineReporter(Reporter):
    """Prints a line at the start and the end of each phase, and lines in between.

    A training has one for each new line of metrics, or only after `every` more steps.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[OnStep]:
        last: Mapping[str, float] = {}
        first: tuple[int, float] | None = None  # a resumed training does not begin at step 0
        shown, due = 0, _pauses()

        def step(done: int, metrics: Mapping[str, float]) -> None:
            nonlocal last, first, shown
            last, first = metrics, first or (done, time.monotonic())
            fresh = metrics.get("step") == done and (done - shown >= self.every or done == total)
            if fresh or (not metrics and due()):
                shown = done
                facts = {"step": f"{done}/{total}", "percent": f"{100 * done / total:.1f}"}
                self.say(line_of(f"{what}:", facts | metric_facts(metrics) | _left(first, done, total)))

        with self._phase(what, {"steps": str(total)}) as end:
            yield step
            end.update({"steps": str(total)} | metric_facts(last))

    @contextlib.contextmanager
    def task(self, what: str) -> Iterator[None]:
        with self._phase(what, {}):
            yield

    phase = task

    def track(self, items: Iterable[Item], what: str) -> Iterable[Item]:
        length = f"/{len(items)}" if isinstance(items, Sized) else ""
        due = _pauses()
        for done, item in enumerate(items, start=1):
            yield item
            if due():
                self.say(line_of(f"{what}:", {"done": f"{done}{length}"}))

    def say(self, line: str) -> None:
        """Print a line with its time; one that another process has stamped gets this one's."""
        # One write, so that lines of several threads do not mix.
        sys.stderr.write(f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {unstamped(line)}\n")
        sys.stderr.flush()

    @contextlib.contextmanager
    def _phase(self, what: str, begin: Mapping[str, str]) -> Iterator[dict[str, str]]:
        """Say the start and, unless the block raises, the end, with the facts that the block puts into the dict."""
        end: dict[str, str] = {}
        began = time.monotonic()
        self.say(line_of(f"start {what}", begin))
        yield end
        self.say(line_of(f"done {what}:", {"seconds": f"{time.monotonic() - began:.1f}"} | end))


def metric_facts(metrics: Mapping[str, float]) -> dict[str, str]:
    """A line of metrics for people: the loss, its terms, learning rate, images/s, what was dropped, bad samples."""
    known = {"step", "loss", "learning_rate", "logit_scale", "samples_per_second", "tokens_dropped", "bad_samples"}
    forms: dict[str, Callable[[float], str]] = {
        "loss": "{:.4f}".format,
        **dict.fromkeys((name for name in metrics if name not in known), "{:.4f}".format),
        "learning_rate": "{:.3g}".format,
        "samples_per_second": "{:.0f}".format,
        "tokens_dropped": "{:.2%}".format,
        "bad_samples": "{:.0f}".format,
    }
    names = {"learning_rate": "rate", "samples_per_second": "images/s", "tokens_dropped": "dropped"}
    return {names.get(name, name): form(metrics[name]) for name, form in forms.items() if metrics.get(name) is not None}


def progress_in(line: str) -> tuple[str, int, int, dict[str, str]] | None:
    """(what, done, total, facts) of a line that a `LineReporter` wrote; 0 for what it does not say, None for others.

    Of the end of a phase `what` is empty.
    """
    text = unstamped(line)
    if text == line:
        return None
    if match := STEP.fullmatch(text):
        what, done, total, facts = match.groups()
        return what, int(done), int(total or 0), dict(fact.split("=", 1) for fact in facts.split())
    if match := START.fullmatch(text):
        facts = dict(fact.split("=", 1) for fact in match[2].split())
        return match[1], 0, int(facts.get("steps", "0")), {}
    return ("", 0, 0, {}) if DONE.fullmatch(text) else None


def unstamped(line: str) -> str:
    """The line without the time at its beginning."""
    return STAMP.sub("", line)


def _left(first: tuple[int, float], done: int, total: int) -> dict[str, str]:
    """The time that the other steps take at the pace since `first`, a step and its time."""
    if done == first[0]:
        return {}
    seconds = (time.monotonic() - first[1]) / (done - first[0]) * (total - done)
    return {"left": time_in_words(seconds)}


def time_in_words(seconds: float) -> str:
    """`0:00:09`, `11d13:46:20`: without spaces."""
    return str(timedelta(seconds=round(seconds))).replace(" days, ", "d").replace(" day, ", "d")


def line_of(what: str, facts: Mapping[str, str]) -> str:
    """`what name=value name=value`."""
    return " ".join([what, *(f"{name}={value}" for name, value in facts.items())])


def _pauses() -> Callable[[], bool]:
    """A function that is true once in PAUSE seconds."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last < PAUSE:
            return False
        last = time.monotonic()
        return True

    return due
