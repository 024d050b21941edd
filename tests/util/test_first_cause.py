"""Of several processes the first that fails is named by all, however it failed; nobody waits for it for long."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.util.cause_worker import main
from upcycle_bench import record
from upcycle_bench.util.distributed import own_connection
from upcycle_bench.util.processes import process_started

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


def three(way: str, folder: Path) -> tuple[list[str], list[int | None]]:
    """What each of three ranks says, and its exit status."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # they need no imports of their own
    files = [folder / f"{rank}" for rank in range(3)]
    started = [fork.Process(target=main, args=(rank, port, way, file)) for rank, file in enumerate(files)]
    for process in started:
        process.start()
    for process in started:
        if way == "stop" and process is started[2]:
            process.kill()
        process.join(timeout=90)
    return [file.read_text() for file in files], [process.exitcode for process in started]


CAUSE = f"rank 2 (host {HOST}): ValueError: my own fault"
KILLED = f"rank 2 (host {HOST}) was killed, perhaps for want of memory"


@pytest.mark.parametrize(("way", "cause"), [("raise", CAUSE), ("interrupt", CAUSE), ("kill", KILLED), ("stop", KILLED)])
def test_a_rank_that_fails_is_the_cause_on_all(tmp_path: Path, way: str, cause: str) -> None:
    """`stop`: nobody on its machine sees its end, only its beat is missing."""
    said, statuses = three(way, tmp_path)
    for each in said[:2]:
        assert each.splitlines()[-2:] == [cause, "ends with PeerFailed"]
    assert statuses[:2] == [1, 1]
    if way in ("raise", "interrupt"):
        assert said[2].splitlines() == [cause, "ends with ValueError"]


def test_a_rank_that_hangs_is_ended_with_its_last_word(tmp_path: Path) -> None:
    said, statuses = three("hang", tmp_path)
    assert said[0].splitlines() == [CAUSE, f"error: {CAUSE}"]
    assert said[1].splitlines() == [CAUSE, f"error (rank 1): {CAUSE}"]
    assert statuses == [1, 1, 3]


def test_a_rank_that_is_asked_to_stop_takes_the_others_along(tmp_path: Path) -> None:
    """One of them hangs in a call; in the training of another a collective breaks, which is no failure."""
    said, statuses = three("asked", tmp_path)
    assert statuses == [75, 75, 75], said
    assert [each.splitlines()[-1:] for each in said] == [["ends with Stopped"], [], ["ends with Stopped"]]
    assert "Error" not in "".join(said)


def test_a_rank_that_cannot_hear_its_signal_tells_it_all_the_same(tmp_path: Path) -> None:
    said, statuses = three("deaf", tmp_path)
    assert statuses == [75, 75, 75], said
    assert [each.splitlines()[-1:] for each in said] == [["ends with Stopped"], ["ends with Stopped"], []]


def test_a_connection_that_breaks_is_made_again_and_again(tmp_path: Path) -> None:
    assert three("cut", tmp_path) == (["", "", ""], [0, 0, 0])


def test_a_fault_that_all_find_is_everyones_own(tmp_path: Path) -> None:
    said, statuses = three("all", tmp_path)
    assert {each.splitlines()[-1] for each in said} == {"ends with UserError"} and statuses == [2, 2, 2]


def test_a_rank_whose_loss_is_finite_names_the_one_whose_is_not(tmp_path: Path) -> None:
    said, _ = three("nan", tmp_path)
    assert all(each.startswith(f"rank 2 (host {HOST}): DivergedError: nan\n") for each in said)


def test_who_leaves_early_has_not_failed(tmp_path: Path) -> None:
    assert three("leave", tmp_path) == (["", "", ""], [0, 0, 0])


def test_a_store_that_is_gone_ends_the_others(tmp_path: Path) -> None:
    """Rank 0 was killed, and with it the store in which its end would be told."""
    said, statuses = three("shut", tmp_path)
    assert statuses == [-signal.SIGKILL, 1, 1]
    assert all(f"rank 0 (host {HOST}) " in each for each in said[1:])


def test_a_process_is_known_by_its_start() -> None:
    own = process_started(os.getpid())
    assert own and own == process_started(os.getpid())
    child = subprocess.Popen(["sleep", "100"])
    assert process_started(child.pid) != own
    child.kill()
    deadline = time.monotonic() + 10
    while process_started(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process_started(child.pid) is None  # a zombie, of which the parent has not asked
    child.wait()
    assert process_started(child.pid) is None


def test_an_older_torch_connects_again() -> None:
    """Without `Store.clone`: what one connection writes, another one of the same store reads."""

    class Older(dist.TCPStore):
        """As before torch 2.8."""

        def __getattribute__(self, name: str) -> Any:
            if name == "clone":
                raise AttributeError(name)
            return super().__getattribute__(name)

    store = Older("127.0.0.1", 0, 1, is_master=True)
    own_connection(store).set("key", "value")
    assert store.get("key") == b"value"


# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("kill", " was killed, perhaps for want of memory"),
        ("nan", ": DivergedError: the loss is nan at step 2 (contrastive "),
    ],
)
def test_the_record_of_a_run_names_the_rank(tmp_path: Path, way: str, reason: str) -> None:
    """torchrun sends SIGTERM to rank 0 as soon as rank 1 has ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "tests.training.failing_worker", way, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    (path,) = record.record_paths(tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    made = record.read(path)
    assert made.status == "failed" and (made.reason or "").startswith(f"rank 1 (host {HOST}){reason}"), done.stderr
    assert f"the run failed; record: {path}" in done.stderr
    assert done.stderr.count("\nerror: ") == 1
