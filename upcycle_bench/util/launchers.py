"""The launchers that start several processes of one command, in torchrun's words. Imports nothing heavy.

    sys.argv[1:] = settle(sys.argv[1:], os.environ)     # before anything asks for RANK

torchrun, and deepspeed's launcher, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun and mpirun have
variables of their own. Without a translation, eight processes of srun would be eight runs that write the same files.
What is set already stays.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle_bench.util.errors import UserError

FIRST_PORT, PORTS = 20_000, 40_000


@dataclass(frozen=True)
class Launcher:
    """What a launcher calls the rank, the number of processes, and both among those of one machine."""

    name: str
    rank: str
    world: str
    local_rank: str
    local_world: str
    naming: str = ""  # how it passes a variable to all processes


# The inner one first: mpirun starts its daemons by srun, whose variables the processes then have, too.
LAUNCHERS = (
    # https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html
    Launcher(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "-x MASTER_ADDR=HOST -x MASTER_PORT=29500",
    ),
    # Hydra, which MPICH and Intel MPI share; PMI_RANK alone may be srun's (--mpi=pmi2).
    Launcher(
        "MPICH's mpirun",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        "-genv MASTER_ADDR HOST -genv MASTER_PORT 29500",
    ),
    # Of the step: SLURM_NTASKS is set for a batch script, too, which is one process.
    # https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def settle(arguments: Sequence[str], environment: MutableMapping[str, str]) -> list[str]:
    """Put torchrun's variables into `environment`; returns the arguments without deepspeed's --local_rank.

    Raises UserError where several processes could not find each other, or would be several runs.
    """
    launcher = next((each for each in LAUNCHERS if _started(each, environment)), None)
    if launcher:
        _require_one_run(launcher, environment)
    if environment.get("RANK") and environment.get("WORLD_SIZE"):  # by torchrun, or by hand
        if local_size := environment.get("LOCAL_SIZE"):  # as deepspeed's launcher calls it
            environment.setdefault("LOCAL_WORLD_SIZE", local_size)
    elif launcher:
        for name, value in _translated(launcher, environment).items():
            environment[name] = environment.get(name) or value
    elif environment.get("PMI_SIZE", "1") != "1" and not environment.get("WORLD_SIZE"):
        raise UserError(
            f"{environment['PMI_SIZE']} processes were started by a launcher that upcycle-bench does not know; start "
            "them by torchrun, srun or mpirun, or unset PMI_SIZE for one."
        )
    return _without_local_rank(arguments)


def _started(launcher: Launcher, environment: Mapping[str, str]) -> bool:
    """Whether that launcher started this process together with others."""
    names = (launcher.rank, launcher.world, launcher.local_rank, launcher.local_world)
    return all(environment.get(name) for name in names) and environment[launcher.world] != "1"


def _require_one_run(launcher: Launcher, environment: Mapping[str, str]) -> None:
    """UserError where each process of the launcher takes itself for a run of its own, or for one among another number.

    Under srun a torchrun on each machine is right if they know of each other: then each is one of as many groups.
    """
    count = environment[launcher.world]
    # The number of torchruns, or of deepspeed's launchers.
    groups = environment.get("GROUP_WORLD_SIZE") or environment.get("CROSS_SIZE")
    if groups:
        if groups != count:
            raise UserError(
                f"{launcher.name} started {count} launchers, but each knows of {groups}, so each is a run of its own: "
                f"let {launcher.name} start upcycle-bench itself, or give torchrun --nnodes {count} and "
                "--rdzv-endpoint HOST:PORT."
            )
        return
    world = environment.get("WORLD_SIZE", count)
    if world == "1" or (world != count and not environment.get("RANK")):
        raise UserError(
            f"{launcher.name} started {count} processes, but WORLD_SIZE={world} is set: unset WORLD_SIZE and RANK for "
            f"one run of {count} processes, or {launcher.world} for {count} runs."
        )


def _translated(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for this process."""
    world, local_world = environment[launcher.world], environment[launcher.local_world]
    srun = launcher.name == "srun"
    if srun:
        local_world = str(tasks_of_nodes(local_world)[int(environment.get("SLURM_NODEID", "0"))])
    if world == local_world:
        address = "127.0.0.1"
    elif srun:
        address = first_host(environment["SLURM_STEP_NODELIST"])
    elif not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise UserError(
            f"{launcher.name} started {world} processes on several machines: name the one of rank 0 and a free port "
            f"there, by mpirun {launcher.naming} ..."
        )
    else:
        address = environment["MASTER_ADDR"]
    # Ten steps of a job, and thousands of jobs that follow each other, have ports of their own.
    number = (
        10 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        if srun
        else _launcher_process(launcher.rank)
    )
    return {
        "RANK": environment[launcher.rank],
        "WORLD_SIZE": world,
        "LOCAL_RANK": environment[launcher.local_rank],
        "LOCAL_WORLD_SIZE": local_world,
        "MASTER_ADDR": address,
        "MASTER_PORT": str(FIRST_PORT + number % PORTS),
    }


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: `node003` of `node[003-007,010],other`."""
    first = re.match(r"(\[[^]]*\]|[^,[])*", nodes)
    assert first
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0])


def tasks_of_nodes(text: str) -> list[int]:
    """The number of tasks of each node, of Slurm's short form: [8, 8, 4] of `8(x2),4`."""
    return [
        int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", text) for _ in range(int(times or 1))
    ]


def _launcher_process(variable: str) -> int:
    """The id of mpirun's process on this machine: the nearest ancestor without `variable`, past any script between."""
    process = os.getppid()
    with contextlib.suppress(OSError):  # no /proc, or another user's process
        while f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{process}/environ").read_bytes():
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return process


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without --local_rank=N, --local-rank N and the like, which LOCAL_RANK says already."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("--local_rank", "--local-rank"):
            next(rest, None)
        elif not re.match("--local[_-]rank=", argument):
            kept.append(argument)
    return kept
