"""Requests to stop: which times are understood, what signals do, and what forked workers make of them."""

import os
import signal
import time

import pytest

from upcycle_bench.training import stopping
from upcycle_bench.training.stopping import SIGNALS, Stopped, asked_to_stop, at_steps, seconds, stoppable
from upcycle_bench.util.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90s", 90),
        ("45m", 2700),
        ("3h50m", 13800),
        ("3:50:00", 13800),
        ("1-02:00:00", 93600),
        ("1d2h", 93600),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-5", "3.5h", "soon", "1:2", "m", "50 m"])
def test_what_is_no_time_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--stop-after .*: write a time as"):
        seconds(text)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # a handler runs between two lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_outside_a_training_a_signal_ends_at_once(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Stopped) as stopped, stoppable():
        send(number)
    assert (stopped.value.code, stopped.value.by) == (75, number.name)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_in_a_training_the_first_signal_waits_and_the_second_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one that comes with the first, from a launcher that was signalled too, is the same request."""
    seen: list[str | None] = []

    def train() -> None:
        with at_steps():
            seen.append(asked_to_stop())
            send(signal.SIGUSR1)
            seen.append(asked_to_stop())
            send(signal.SIGTERM)
            seen.append(asked_to_stop())
            monkeypatch.setattr(stopping, "TOGETHER", 0.005)
            send(signal.SIGTERM)
            raise AssertionError

    with pytest.raises(Stopped), stoppable():
        train()
    assert seen == [None, "SIGUSR1", "SIGUSR1"]
    with stoppable():
        assert asked_to_stop() is None  # a request ends with its command


def test_a_signal_that_no_step_saw_ends_after_the_training() -> None:
    def train() -> None:
        with at_steps():
            send(signal.SIGTERM)
        raise AssertionError

    with pytest.raises(Stopped), stoppable():
        train()


def test_the_time_ends() -> None:
    with pytest.raises(Stopped) as stopped, stoppable(time.monotonic() + 0.05):
        time.sleep(5)
    assert stopped.value.by == "--stop-after"
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_forked_worker_takes_no_notice_of_the_first_signal() -> None:
    """It is the whole job's; the second one ends it, as that of a loader that closes does."""
    with stoppable():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        child = os.fork()
        if child == 0:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
