"""Launchers: their variables become torchrun's, and processes that would be runs of their own are one line.

The environments were printed by the launchers themselves: Slurm 22.05, Open MPI 4.1, MPICH 4.0, DeepSpeed 0.19.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.launchers import FIRST_PORT, PORTS, first_host, settle, tasks_of_nodes

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Task 17 of `srun` in a batch job of three nodes, eight tasks each and four on the last: the third of its node.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "20",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[003-004,010]",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
SRUN_HERE = SRUN | {
    "SLURM_STEP_NODELIST": "vm",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "8"}
DEEPSPEED = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "LOCAL_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
}
# A batch script, and an interactive shell in an allocation of two tasks: srun gives such a shell a step of one task.
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "20", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SHELL = BATCH | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "vm"}
AGENT = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
TWO_NODES = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}


def ranks(environment: dict[str, str]) -> dict[str, str]:
    """torchrun's variables, after `settle`; those that are not set are left out."""
    now = dict(environment)
    settle([], now)
    assert {name: now[name] for name in environment} == environment  # what is set stays
    return {name: now[name] for name in TORCHRUN if name in now}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN, ["17", "20", "1", "4", "node003", str(FIRST_PORT + (47112 % PORTS))]),
        (SRUN_HERE, ["1", "2", "1", "2", "127.0.0.1", str(FIRST_PORT + (47112 % PORTS))]),
        (SRUN_HERE | {"PMI_RANK": "1", "PMI_SIZE": "2"}, ["1", "2", "1", "2", "127.0.0.1", "27112"]),  # --mpi=pmi2
        (SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}, ["17", "20", "1", "4", "head", "1234"]),
        (SRUN | {"WORLD_SIZE": "20"}, ["17", "20", "1", "4", "node003", "27112"]),  # as many batch scripts set it
        (DEEPSPEED, ["1", "2", "1", "2", "127.0.0.1", "29500"]),
        (TWO_NODES | AGENT | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, ["9", "16", "1", "8", "a", "1"]),
    ],
)
def test_variables_become_torchruns(environment: dict[str, str], expected: list[str]) -> None:
    assert list(ranks(environment).values()) == expected


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH, OPEN_MPI | SHELL, MPICH | SHELL])
def test_mpirun_on_one_machine_needs_no_address(environment: dict[str, str]) -> None:
    """Also where srun started its daemons. The port is that of mpirun's own process, one for all ranks."""
    assert list(ranks(environment).values())[:5] == ["1", "2", "1", "2", "127.0.0.1"]
    assert FIRST_PORT <= int(ranks(environment)["MASTER_PORT"]) < FIRST_PORT + PORTS


@pytest.mark.parametrize("wrapped", [False, True])
def test_ranks_of_one_mpirun_have_one_port(wrapped: bool) -> None:
    """Here this process stands for mpirun; a script may stand between it and a rank."""
    code = (
        "import os, upcycle_bench.util.launchers as own; own.settle([], os.environ); print(os.environ['MASTER_PORT'])"
    )
    command = [sys.executable, "-c", code]
    if wrapped:
        command = ["bash", "-c", f'"{sys.executable}" -c "{code}"; true']
    found = {
        subprocess.run(command, env=MPICH | {"PMI_RANK": rank}, capture_output=True, text=True, check=True).stdout
        for rank in "01"
    }
    assert len(found) == 1


@pytest.mark.parametrize("environment", [{}, BATCH, SHELL, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, {"PMI_SIZE": "1"}])
def test_one_process_is_a_run_of_its_own(environment: dict[str, str]) -> None:
    assert ranks(environment) == {}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            SRUN | {"WORLD_SIZE": "1", "RANK": "0"},
            "srun started 20 processes, but WORLD_SIZE=1 is set: unset WORLD_SIZE",
        ),
        (SRUN | {"WORLD_SIZE": "8"}, "srun started 20 processes, but WORLD_SIZE=8 is set"),
        (TWO_NODES | AGENT | {"GROUP_WORLD_SIZE": "1"}, "srun started 2 launchers, but each knows of 1"),
        (TWO_NODES | DEEPSPEED, "srun started 2 launchers, but each knows of 1"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, "by mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ..."),
        (MPICH | {"PMI_SIZE": "4"}, "by mpirun -genv MASTER_ADDR HOST -genv MASTER_PORT 29500 ..."),
        ({"PMI_RANK": "0", "PMI_SIZE": "8"}, "8 processes were started by a launcher that upcycle-bench does not know"),
    ],
)
def test_runs_that_would_not_know_of_each_other_are_one_line(environment: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        settle([], dict(environment))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_mpirun_on_several_machines_takes_the_address_that_is_given() -> None:
    given = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert list(ranks(given).values()) == ["1", "4", "1", "2", "head", "29500"]


def test_jobs_and_steps_that_follow_each_other_have_ports_of_their_own() -> None:
    every = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(700, 800) for step in range(10)]
    assert len({ranks(SRUN | each)["MASTER_PORT"] for each in every}) == len(every)


@pytest.mark.parametrize("given", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_deepspeeds_argument_is_ignored_anywhere(given: list[str]) -> None:
    """Its launcher puts it behind the program, before the command."""
    assert settle([*given, "run", "-s", "dense"], {}) == ["run", "-s", "dense"]
    assert settle(["run", "-s", "dense", *given], {}) == ["run", "-s", "dense"]


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "upcycle_bench", "--local_rank=0", "--version"]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).stdout.startswith(b"upcycle-bench ")


def expanded(nodes: str) -> list[str]:
    """All hosts of Slurm's list, by hand: the slow twin."""
    items, depth = [""], 0
    for character in nodes:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and not depth:
            items.append("")
        else:
            items[-1] += character
    found = []
    for item in items:
        before, bracket, rest = item.partition("[")
        if not bracket:
            found.append(item)
            continue
        inside, _, after = rest.partition("]")
        for part in inside.split(","):
            low, _, high = part.partition("-")
            for number in range(int(low), int(high or low) + 1):
                found += expanded(f"{before}{number:0{len(low)}d}{after}")
    return found


NAME = st.text("abcn-", min_size=1, max_size=4).filter(lambda text: text[0] != "-")
NUMBER = st.integers(0, 30).map(lambda n: f"{n:03d}")
RANGE = st.tuples(st.integers(0, 20), st.integers(0, 5)).map(lambda pair: f"{pair[0]:02d}-{sum(pair):02d}")
GROUP = st.lists(NUMBER | RANGE, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
HOSTS = st.builds(
    lambda *parts: "".join(parts), NAME, GROUP | st.just(""), st.just("") | st.just("-ib"), GROUP | NUMBER
)


@given(st.lists(HOSTS | NAME, min_size=1, max_size=3).map(",".join))
def test_the_first_host_is_that_of_the_whole_list(nodes: str) -> None:
    assert first_host(nodes) == expanded(nodes)[0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_tasks_of_nodes_undoes_slurms_short_form(counts: list[int]) -> None:
    groups: list[list[int]] = []
    for count in counts:
        if groups and groups[-1][0] == count:
            groups[-1].append(count)
        else:
            groups.append([count])
    short = ",".join(f"{group[0]}" + (f"(x{len(group)})" if len(group) > 1 else "") for group in groups)
    assert tasks_of_nodes(short) == counts


def test_slurms_own_example() -> None:
    assert first_host("node[003-007,010],other") == "node003"
    assert expanded("node[003-007,010],other")[-2:] == ["node010", "other"]
