"""Variables of a launcher that a shell was left with: one line at once, or after a wait that ends.

As in cluster images and job steps, where torch waits for ever (pytorch/pytorch 8091, pytorch/ignite 2048).
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist

from upcycle_bench.cli.main import main
from upcycle_bench.training.session import open_session
from upcycle_bench.util import distributed, rendezvous
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rendezvous import NEEDED, NUMBERS, VARIABLE, meet, require_sound

Set = Mapping[str, str]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variable is set, nor left behind."""
    for name in {*NUMBERS, *NEEDED, VARIABLE}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def setting(monkeypatch: pytest.MonkeyPatch, variables: Set) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def two(rank: int, port: int, seconds: str = "1") -> dict[str, str]:
    """The variables of one of two processes."""
    here = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), VARIABLE: seconds}
    return here | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture
def port() -> int:
    """One on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1, but WORLD_SIZE=1"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE=1"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3, but WORLD_SIZE=1"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8, but WORLD_SIZE=1"),
        ({"WORLD_SIZE": "0"}, "RANK=0, but WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no MASTER_ADDR, MASTER_PORT"),
        (two(2, 1), "RANK=2, but WORLD_SIZE=2"),
        (two(0, 1) | {"RANK": "zero"}, "RANK='zero', which is no number"),
        (two(0, 1) | {"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT='tcp://10.0.0.1:80', which is no number"),
    ],
)
def test_a_contradiction_is_one_line_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: Set, says: str
) -> None:
    """On stderr, whichever rank the process takes itself for; the Python API raises it, too."""
    setting(monkeypatch, variables)
    monkeypatch.setattr(sys, "argv", ["upcycle-bench", "list", "protocols"])
    with pytest.raises(SystemExit) as left:
        main()
    captured = capsys.readouterr()
    assert left.value.code == 2 and captured.out == ""
    who = f" (rank {variables['RANK']})" if variables.get("RANK", "0") != "0" else ""
    assert captured.err.startswith(f"error{who}: the environment has {says}; start all processes by torchrun, or unset")
    assert captured.err.count("\n") == 1
    with pytest.raises(UserError), open_session(threads=1):
        pass


@pytest.mark.parametrize(
    "variables",
    [{}, {"RANK": "0"}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {"MASTER_PORT": "tcp://10.0.0.1:80"}],
)
def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch, variables: Set) -> None:
    setting(monkeypatch, variables)
    with open_session(threads=1):
        assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize(("rank", "why"), [(0, "1/2 clients joined"), (1, "Connection refused")])
def test_a_process_that_nobody_joins_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], port: int, rank: int, why: str
) -> None:
    setting(monkeypatch, two(rank, port))
    threads, start = torch.get_num_threads(), time.monotonic()
    with pytest.raises(UserError) as caught, open_session(threads=threads + 1):
        pass
    said = str(caught.value)
    assert said.startswith(f"waited 1 s for 2 processes to meet at 127.0.0.1:{port} (") and why in said
    assert f"RANK={rank} and WORLD_SIZE=2 are set: start all processes by torchrun" in said and "\n" not in said
    assert f"{VARIABLE}=10 waits longer" in said
    assert time.monotonic() - start < 20 and capfd.readouterr().err == ""
    assert not dist.is_initialized() and torch.get_num_threads() == threads


def test_a_wait_for_processes_is_said_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: int
) -> None:
    monkeypatch.setattr(rendezvous, "SOON", 0.2)
    for rank, said in ((0, f"waiting for all of 2 processes to come to 127.0.0.1:{port}, for 1 s at most\n"), (1, "")):
        setting(monkeypatch, two(rank, port))
        with pytest.raises(UserError):
            meet()
        assert capsys.readouterr().err == said


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        setting(monkeypatch, two(0, other.getsockname()[1]))
        with pytest.raises(UserError, match="address already in use"):
            meet()


def test_a_wait_that_is_no_number_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    setting(monkeypatch, two(0, 1, seconds="long"))
    require_sound()
    with pytest.raises(UserError, match=f"{VARIABLE} must be a number of seconds, not 'long'"):
        meet()


def test_two_processes_without_torchrun_meet(port: int) -> None:
    """As a job step starts them. Once they have met, they wait for each other for a day."""
    code = (
        "import torch.distributed as dist\nfrom upcycle_bench.training.session import open_session\n"
        "from upcycle_bench.util import distributed\n"
        "with open_session(threads=1):\n"
        "    days = dist.distributed_c10d._get_default_store().timeout.days\n"
        "    print(distributed.sum_over_ranks(distributed.rank() + 1), days)\n"
    )
    given = [{**os.environ, "OMP_NUM_THREADS": "1", **two(rank, port, seconds="60")} for rank in (1, 0)]
    started = [subprocess.Popen([sys.executable, "-c", code], env=each, stdout=subprocess.PIPE) for each in given]
    assert [process.communicate(timeout=120)[0] for process in started] == [b"3 1\n", b"3 1\n"]
