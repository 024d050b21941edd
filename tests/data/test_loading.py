"""Items that workers make ahead: in order, with errors as they are; no wait for a lost worker is without end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from upcycle_bench.data import loading
from upcycle_bench.data.bad_samples import Bad
from upcycle_bench.data.batches import Batch, join
from upcycle_bench.data.loading import load, lost_workers
from upcycle_bench.training.stopping import Stopped, at_steps, stoppable
from upcycle_bench.util.errors import UserError

HERE = os.getpid()


def made(item: int) -> tuple[Tensor, int]:
    return torch.full((1 << 20,), item), os.getpid()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_come_in_order_from_as_many_workers(workers: int) -> None:
    found = list(load(made, range(5, 12), workers, "numbers"))
    assert [int(tensor[-1]) for tensor, _ in found] == list(range(5, 12))
    assert len({process for _, process in found} - {HERE}) == workers
    assert list(load(made, range(0), workers, "numbers")) == []


def test_each_worker_keeps_to_its_part_of_every_batch() -> None:
    """Item n is made by worker n modulo the workers, so part j of a batch is always made by worker j."""
    found = [process for _, process in load(made, range(9, 21), 3, "numbers")]
    assert found == found[:3] * 4 and len(set(found)) == 3


@pytest.mark.parametrize("prefetch", [1, 3])
def test_workers_are_no_further_ahead_than_asked(tmp_path: Path, prefetch: int) -> None:
    def note(item: int) -> int:
        (tmp_path / str(item)).touch()
        return item

    items = load(note, range(100), 2, "numbers", prefetch)
    assert next(items) == 0
    time.sleep(0.5)
    assert prefetch * 2 <= len(list(tmp_path.iterdir())) <= 2 * prefetch + 1  # the first is out, another is made


def test_parts_become_one_batch() -> None:
    def part(start: int, size: int, *bad: Bad) -> Batch:
        index = torch.arange(start, start + size)
        return Batch(
            index.view(-1, 1, 1, 1).to(torch.uint8).expand(-1, 3, 2, 2), index[:, None].expand(-1, 4), index, bad
        )

    bad = Bad(4, "truncated image", "0.tar", "a")
    whole, joined = part(0, 7, bad), join([part(0, 3), part(3, 3, bad), part(6, 1)], pinned=False)
    for name in ("images", "texts", "index", "bad"):
        ours, expected = getattr(joined, name), getattr(whole, name)
        assert ours == expected if name == "bad" else ours.dtype == expected.dtype and torch.equal(ours, expected)
    assert join([whole], pinned=False) is whole  # without a copy


def test_an_error_of_a_worker_comes_as_it_is() -> None:
    def broken(item: int) -> int:
        if item == 2:
            raise UserError("0.tar: the image at byte 512 cannot be read; remove it.")
        return item

    items = load(broken, range(4), 2, "numbers")
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(UserError, match=r"^0\.tar: the image at byte 512 cannot be read; remove it\.$"):
        next(items)


def test_a_signal_to_all_processes_leaves_the_workers_alive() -> None:
    """A cluster signals every process of a job, and torch would have its loaders die of it."""
    processes: list[int] = []

    def signalled() -> None:
        with stoppable(), at_steps():
            for item, process in load(lambda item: (item, os.getpid()), range(40), 2, "items"):
                processes.append(process)
                if item == 3:
                    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):  # as a scheduler, then torchrun
                        os.kill(process, number)
                        time.sleep(0.2)
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        signalled()
    assert len(processes) == 40 and len(set(processes)) == 2 and os.getpid() not in processes


FORGOTTEN = """
from upcycle_bench.data.loading import load
made = load(lambda item: item, range(10**9), 2, "numbers")
next(made)
{end}
"""


@pytest.mark.parametrize(
    "end", ["", "del made", "made.close()", "raise SystemExit", "import os; os.kill(os.getpid(), 9)"]
)
def test_workers_end_with_their_loader_or_process(end: str) -> None:
    """Though they are deaf to signals while it is open."""
    command = [sys.executable, "-c", FORGOTTEN.format(end=end)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)  # until nobody holds the pipe
    assert done.returncode == (-9 if "kill" in end else 0) and done.stderr == ""
    assert time.monotonic() - began < 45


def test_a_killed_worker_is_one_line() -> None:
    def killed(item: int) -> int:
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(
        UserError, match=r"^numbers: a process that loads them was lost, .*DataLoader worker.*; try again\.$"
    ):
        list(load(killed, range(8), 2, "numbers"))


def test_a_worker_killed_between_two_items_is_one_line_at_once() -> None:
    """torch raises the error wherever the main process is, as in a step of training."""
    items = load(made, range(100), 2, "training batches")

    def work() -> None:
        _, worker = next(items)
        os.kill(worker, signal.SIGKILL)
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(UserError, match=r"^training batches: a process that loads them was lost"), lost_workers():
        work()
    assert time.monotonic() - began < 30


def test_a_worker_that_stands_still_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(item: int) -> int:
        time.sleep(60 if item == 1 else 0)
        return item

    monkeypatch.setattr(loading, "WAIT", 2)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"numbers: .* \(DataLoader timed out after 2 seconds\)"):
        list(load(stopped, range(4), 1, "numbers"))
    assert time.monotonic() - began < 30


def test_other_errors_of_the_training_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), lost_workers():
        raise RuntimeError("shapes do not fit")


def test_what_shared_memory_does_not_hold_comes_through_the_pipe(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(item: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    assert [int(tensor[-1]) for tensor, _ in load(made, range(6), 2, "numbers")] == list(range(6))
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(loading, "ForkingPickler", SimpleNamespace(dumps=full))
    for _ in range(2):
        assert [int(tensor[-1]) for tensor, _ in load(made, range(6), 2, "numbers")] == list(range(6))
    assert capfd.readouterr().err == (
        "warning: /dev/shm has no room for numbers, which now come through pipes and slower; a container gets more by "
        "--shm-size=8g.\n"
    )


SMALL = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "
PROGRAM = """
from tests.data.test_loading import made
from upcycle_bench.data.loading import load
assert [int(tensor[-1]) for tensor, _ in load(made, range(6), 2, "numbers")] == list(range(6))
"""


def test_a_small_dev_shm_is_no_hang() -> None:
    """In a mount namespace of its own /dev/shm holds 1 MiB, and each item takes 8."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", SMALL + "true"], capture_output=True).returncode:
        pytest.skip("this process may not mount")
    command = [unshare, "-m", "sh", "-c", f'{SMALL} "$0" -c "$1"', sys.executable, PROGRAM]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: /dev/shm has no room for numbers") == 1
