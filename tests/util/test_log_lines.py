"""Progress as lines of a log: what they hold, how often they come, and that a terminal gets bars instead."""

import re
import sys

import pytest

from upcycle_bench.cli.common import terminal_reporter
from upcycle_bench.util import log_lines
from upcycle_bench.util.log_lines import LineReporter, metric_facts, progress_in
from upcycle_bench.util.progress import Reporter, TerminalReporter

METRICS = {
    "step": 20,
    "loss": 1.6266,
    "contrastive": 1.6226,
    "load_balance": 0.004,
    "learning_rate": 0.00025,
    "logit_scale": 14.3,
    "samples_per_second": 1234.4,
    "tokens_dropped": 0.0498,
    "bad_samples": 3,
}
FACTS = "loss=1.6266 contrastive=1.6226 load_balance=0.0040 rate=0.00025 images/s=1234 dropped=4.98% bad_samples=3"


class Clock:
    """time.monotonic, by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(log_lines.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed on stderr, without the times; each line must have one."""
    captured = capsys.readouterr()
    assert captured.out == ""
    found = [re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ (.*)", line) for line in captured.err.splitlines()]
    assert all(found)
    return [match[1] for match in found if match]


def train(reporter: Reporter, clock: Clock, logged: int, first: int = 1, total: int = 100) -> None:
    """Steps of two seconds, of which every `logged`th has metrics, as the loop gives them."""
    last: dict[str, float] = {}
    with reporter.bar("training x", total) as step:
        for done in range(first, total + 1):
            clock.now += 2
            if (done - 1) % logged == 0 or done in (first, total):
                last = {**METRICS, "step": done}
            step(done, last)


def test_a_training_says_its_facts_at_each_logged_step(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    train(LineReporter(), clock, logged=25)
    assert lines(capsys) == [
        "start training x steps=100",
        f"training x: step=1/100 percent=1.0 {FACTS}",
        f"training x: step=26/100 percent=26.0 {FACTS} left=0:02:28",  # 74 steps of two seconds
        f"training x: step=51/100 percent=51.0 {FACTS} left=0:01:38",
        f"training x: step=76/100 percent=76.0 {FACTS} left=0:00:48",
        f"training x: step=100/100 percent=100.0 {FACTS} left=0:00:00",
        f"done training x: seconds=200.0 steps=100 {FACTS}",
    ]


def test_log_every_thins_the_lines_out(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Only lines with metrics of their own step; the last step has one in any case."""
    train(LineReporter(45), clock, logged=10)
    steps = [match[1] for line in lines(capsys) if (match := re.search(r" step=(\d+)/", line))]
    assert steps == ["51", "100"]


def test_a_resumed_training_knows_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """It has done 90 of 100 steps before: the pace is that of the steps done now."""
    train(LineReporter(), clock, logged=95, first=91)
    assert "step=96/100" in (line := lines(capsys)[2]) and line.endswith("left=0:00:08")


def test_a_long_time_left_is_one_word(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with LineReporter().bar("x", 100_000) as step:
        step(1, {})
        clock.now += 10
        step(2, {**METRICS, "step": 2})
    assert lines(capsys)[1].endswith("left=11d13:46:20")


def test_other_work_says_how_far_it_is_at_most_twice_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in LineReporter().track(list(range(100)), "encoding"):
        clock.now += 1
    for _ in LineReporter().track(iter(range(31)), "reading"):
        clock.now += 1
    said = lines(capsys)
    assert said == ["encoding: done=30/100", "encoding: done=60/100", "encoding: done=90/100", "reading: done=30"]
    with LineReporter().bar("preparing", 100) as step:  # a preparation without metrics
        for done in range(1, 101):
            clock.now += 1
            step(done, {})
    assert [line.split(" percent")[0] for line in lines(capsys)[1:-1]] == [
        f"preparing: step={done}/100" for done in (30, 60, 90)
    ]


def test_phases_have_a_start_and_an_end_unless_they_fail(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = LineReporter()
    with reporter.phase("evaluating"), reporter.task("certificate"):
        clock.now += 1.25
    with pytest.raises(KeyError), reporter.task("bad"):
        raise KeyError
    assert lines(capsys) == [
        "start evaluating",
        "start certificate",
        "done certificate: seconds=1.2",
        "done evaluating: seconds=1.2",
        "start bad",
    ]


def test_a_line_has_one_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of a matrix's processes come with one."""
    LineReporter().say("2026-01-01T00:00:00Z done certificate")
    assert lines(capsys) == ["done certificate"]


def test_what_a_line_says_is_read_back(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A matrix reads how far its processes are; other lines are none of progress."""
    label = "training cluster-aware[tau=0.8,pca=2]"
    with LineReporter().bar(label, 100) as step:
        clock.now += 1
        step(20, METRICS)
    with LineReporter().task("certificate"):
        pass
    for _ in LineReporter().track([1, 2], "encoding"):
        clock.now += 31
    read = [progress_in(line) for line in capsys.readouterr().err.splitlines()]
    facts = dict(fact.split("=") for fact in FACTS.split())
    assert read == [
        (label, 0, 100, {}),
        (label, 20, 100, {"percent": "20.0", **facts}),
        ("", 0, 0, {}),
        ("certificate", 0, 0, {}),
        ("", 0, 0, {}),
        ("encoding", 1, 2, {}),
        ("encoding", 2, 2, {}),
    ]
    stamp = "2026-01-01T00:00:00Z "
    others = ["error: x: step=3/9", "start training dense", f"{stamp}the run failed: no disk", f"{stamp}done, at last"]
    assert [progress_in(line) for line in others] == [None] * 4


def test_metrics_of_a_dense_model_have_no_drops() -> None:
    dense = {name: METRICS[name] for name in ("step", "loss", "contrastive", "learning_rate", "samples_per_second")}
    assert metric_facts(dense) == {"loss": "1.6266", "contrastive": "1.6226", "rate": "0.00025", "images/s": "1234"}
    assert metric_facts({}) == {}


def test_each_situation_has_its_reporter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(terminal_reporter(), LineReporter)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(terminal_reporter(), TerminalReporter)
    monkeypatch.setenv("RANK", "1")
    assert type(terminal_reporter()) is Reporter
