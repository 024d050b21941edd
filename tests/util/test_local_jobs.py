"""Jobs on this machine: logs, ranks, again on 75, and signals that are passed on."""

import os
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from upcycle_bench.util import local_jobs
from upcycle_bench.util.local_jobs import LocalJobs


def shell(script: str) -> str:
    return f"bash -c {shlex.quote(script)}"


def queue(tmp_path: Path, *scripts: str, **settings: Any) -> LocalJobs:
    """A queue of those scripts, numbered from 1."""
    return LocalJobs({number: shell(script) for number, script in enumerate(scripts, start=1)}, tmp_path, **settings)


def test_each_job_has_a_log_and_a_status(tmp_path: Path) -> None:
    said: list[str] = []
    assert queue(tmp_path, "echo one; echo two >&2", "exit 3", say=said.append).run() == {1: 0, 2: 3}
    log = (tmp_path / "1.log").read_text()
    assert log.splitlines()[1:] == ["one", "two"] and "starts: bash -c 'echo one" in log
    assert said[-1] == "job 2 ended with status 3"


def test_ranks_are_torchruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one process needs no launcher's variables."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # which a session of this process may have left
    script = "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
    assert queue(tmp_path, script, processes=2).run() == {1: 0}
    first, second = sorted((tmp_path / "1.log").read_text().splitlines()[1:])
    port = first.split()[-1]
    assert (first, second) == (f"0/2 0/2 127.0.0.1 {port}", f"1/2 1/2 127.0.0.1 {port}") and port.isdigit()
    assert queue(tmp_path, script).run() == {1: 0}
    assert (tmp_path / "1.log").read_text().splitlines()[-1].split() == ["/", "/"]


@pytest.mark.parametrize(("limit", "status", "starts"), [(5, 0, 3), (1, 75, 2), (0, 75, 1)])
def test_a_job_that_is_not_finished_goes_on_up_to_the_limit(
    tmp_path: Path, limit: int, status: int, starts: int
) -> None:
    """Its other ranks may end with 0; it is over at its third start."""
    count = tmp_path / "count"
    script = f'[ "$RANK" = 1 ] && exit 0; echo x >> {count}; [ $(grep -c x {count}) = 3 ] || exit 75'
    assert queue(tmp_path, script, "exit 0", processes=2, requeue_limit=limit).run() == {1: status, 2: 0}
    assert count.read_text().count("x") == starts


def test_jobs_at_once_have_gpus_of_their_own(tmp_path: Path) -> None:
    """The third one gets those of the first that ended."""
    scripts = [
        "sleep 0.5; echo $CUDA_VISIBLE_DEVICES",
        "sleep 2; echo $CUDA_VISIBLE_DEVICES",
        "echo $CUDA_VISIBLE_DEVICES",
    ]
    settings: dict[str, Any] = {
        "at_once": 2,
        "gpus": 2,
        "environment": {**os.environ, "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
    }
    assert queue(tmp_path, *scripts, **settings).run() == {1: 0, 2: 0, 3: 0}
    assert [(tmp_path / f"{n}.log").read_text().splitlines()[-1] for n in (1, 2, 3)] == ["4,5", "6,7", "4,5"]


def test_a_rank_that_waits_for_a_dead_one_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_jobs, "APART", 0.3)
    start = time.monotonic()
    assert queue(tmp_path, '[ "$RANK" = 1 ] && exit 4; exec sleep 30', processes=2).run() == {1: -signal.SIGKILL}
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_passed_on_and_starts_nothing_more(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C becomes SIGTERM, which a run answers with a checkpoint. Handlers are as before."""
    ready = tmp_path / "ready"
    script = (
        f"trap 'echo term; exit 75' TERM; trap 'echo usr1; exit 75' USR1; touch {ready}; while :; do sleep 0.1; done"
    )
    jobs = queue(tmp_path, script, "echo never")

    def send() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    assert jobs.run() == {1: 75} and jobs.stopped == number
    assert (tmp_path / "1.log").read_text().splitlines()[1:] == ["usr1" if number == signal.SIGUSR1 else "term"]
    assert not (tmp_path / "2.log").exists() and signal.getsignal(number) == before


def test_a_first_ctrl_c_while_a_job_is_started_lets_it_write_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the process is there and the queue does not know it yet."""
    popen, kept = local_jobs.subprocess.Popen, tmp_path / "kept"

    def interrupted(*words: Any, **how: Any) -> Any:
        process = popen(*words, **how)
        end = time.monotonic() + 30
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(local_jobs.subprocess, "Popen", interrupted)
    script = f"trap 'touch {kept}; exit 75' TERM; touch {tmp_path / 'ready'}; while :; do sleep 0.1; done"
    jobs = queue(tmp_path, script)
    assert jobs.run() == {1: 75} and jobs.stopped == signal.SIGINT and kept.exists()
