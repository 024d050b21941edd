"""Work on all cores ends with the command: on Ctrl-C, on SIGTERM to the process group, and when a process is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import heed_interrupts
from upcycle_bench.util import processes
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import results

# A command to interrupt: workers write slowly into a folder, which the command deletes when it ends.
PROGRAM = """
import sys, pathlib, typer
from upcycle_bench.util.cache import build_once
from upcycle_bench.cli.common import interruptible
from upcycle_bench.util.processes import results
from tests.util.test_processes import write

def build(folder):
    folder.mkdir()
    results(write, [(folder / str(number), sys.argv[2], float(sys.argv[3])) for number in range(20)], 2)

if __name__ == "__main__":
    try:
        with interruptible("nothing was written"):
            build_once(pathlib.Path(sys.argv[1]) / "built", build)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
"""


def write(path: Path, says: str, seconds: float) -> int:
    """Slow work, which no signal interrupts. At its begin it writes its process id into `says`."""
    Path(says).write_text(str(os.getpid()))
    path.write_text("x" * 1000)
    time.sleep(seconds)
    return os.getpid()


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    raise ValueError(f"bad {number}")


def cut_off(number: int) -> bytes:
    """A long result. The worker is killed while it is sent: as soon as the parent has read a megabyte."""

    def read() -> int:
        lines = Path(f"/proc/{os.getppid()}/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])

    def kill(before: int) -> None:
        while read() < before + (1 << 20):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, args=(read(),), daemon=True).start()
    return bytes(1 << 29)


class Odd(Exception):
    """An error that can be pickled but not unpickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__("odd")


def odd(number: int) -> object:
    if number == 1:
        raise Odd(1, 2)
    if number == 2:
        sys.exit("left")
    return lambda: number  # which pickle refuses


def started(tmp_path: Path, seconds: float) -> tuple[subprocess.Popen[str], int]:
    """The program in a process group of its own, once a worker works; and that worker."""
    program, says = tmp_path / "program.py", tmp_path / "says"
    program.write_text(PROGRAM)
    (tmp_path / "cache").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "cache"), str(says), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
        preexec_fn=heed_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (says.exists() and says.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    return process, int(says.read_text())


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_process_group_ends_it_with_130_and_leaves_nothing(tmp_path: Path, sent: signal.Signals):
    process, worker = started(tmp_path, 30)
    try:
        os.killpg(process.pid, sent)
        out, err = process.communicate(timeout=10)  # a piece of work takes longer
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, err) == (130, "", "interrupted: nothing was written\n")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def blocked() -> set[signal.Signals]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ())) & {signal.SIGINT, signal.SIGTERM}


def test_workers_block_the_signals_that_the_parent_handles():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert results(blocked, [()] * 4, 2) == [{signal.SIGINT, signal.SIGTERM}] * 4
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert multiprocessing.active_children() == []


def test_workers_end_when_their_parent_was_killed(tmp_path: Path):
    process, worker = started(tmp_path, 0.5)
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("a worker lives on without its parent")


def test_results_come_in_order_and_errors_as_they_are():
    assert results(pow, [(2, n) for n in range(20)], 2) == [2**n for n in range(20)]
    assert results(pow, [(2, 3)], 4) == [8] and results(pow, [], 4) == []
    assert [len(made) for made in results(bytes, [(1 << 22,)] * 3, 2)] == [1 << 22] * 3  # more than a pipe holds
    with pytest.raises(ValueError, match=r"bad [12]"):
        results(fail, [(1,), (2,)], 2)


def test_a_killed_worker_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="counting: a worker was killed, perhaps for want of memory; try again"):
        results(die, [(n,) for n in range(8)], 2, what="counting")


def test_workers_that_stand_still_are_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "WAIT", 1)
    with pytest.raises(UserError, match="sleeping: no worker finished anything in 1 seconds; try again"):
        results(time.sleep, [(60,), (60,)], 2, what="sleeping")
    assert multiprocessing.active_children() == []


def test_a_worker_killed_while_it_sends_its_result_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="cutting: a worker was killed"):
        results(cut_off, [(1,)], 2, what="cutting")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("number", "kind", "says"), [(0, Exception, "pickle"), (1, RuntimeError, "Odd: odd"), (2, SystemExit, "left")]
)
def test_what_cannot_be_pickled_is_an_error(number: int, kind: type[BaseException], says: str) -> None:
    with pytest.raises(kind, match=says) as raised:
        results(odd, [(number,)], 1)
    assert not isinstance(raised.value, UserError)  # nobody killed a worker


def test_a_script_without_a_guard_is_not_run_again_by_its_workers(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(
        "from operator import neg\n"
        "from upcycle_bench.util.processes import results\n"
        "print(results(neg, [(1,), (2,)], processes=2), __file__ is not None, flush=True)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[-1, -2] True\n", 0)
