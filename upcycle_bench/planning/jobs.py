"""The jobs of a matrix: a folder with its command lines and, for Slurm, a script of one job array.

    batch = Batch(folder=Path("launch"), lines=lines, to_do=[2, 3], nodes=8, tasks_per_node=8, gpus=8)
    write(batch, {"job.sh": slurm_script(batch)}, force=False)      # cells.txt, job.sh, logs/

A job is a line of cells.txt, counted from 1. Lines of runs that are done stay in the file: a job that waits in the
queue finds its line by number, whatever was finished, or planned, meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import require_writable, write_atomically

CELLS = "cells.txt"
LOGS = "logs"
SUBMITTED = "submitted.txt"  # the job arrays of a folder, one a line, whoever has submitted them


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a scheduler is told. `lines` are all command lines, `to_do` the numbers of those to run."""

    folder: Path  # absolute
    lines: Sequence[str]
    to_do: Sequence[int]
    nodes: int
    tasks_per_node: int
    gpus: int = 0  # of a node
    cpus: int = 1  # of a process
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    signal_before: int = 180  # seconds
    requeue_limit: int = 20
    max_jobs: int | None = None
    more: Sequence[str] = ()  # other options of sbatch
    setup: str = ""  # lines of shell
    programs: Path = Path()  # the folder of the command `upcycle-bench`
    variables: Mapping[str, str] = field(default_factory=dict)  # under which the runs were planned


@contextlib.contextmanager
def planned_for(processes: int) -> Iterator[None]:
    """What is planned within the block are runs of that many processes, of which this one takes no part."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def write(batch: Batch, files: Mapping[str, str], force: bool) -> None:
    """Write cells.txt and `files` into the batch's folder, and make its folder of logs.

    A folder of the same plan is updated, also where the plan has grown at its end. UserError, unless `force`, where
    jobs in the queue could find another line at their number.
    """
    cells = batch.folder / CELLS
    before = cells.read_text(encoding="utf-8").splitlines() if cells.is_file() else []
    if before != list(batch.lines[: len(before)]) and not force:
        raise UserError(
            f"--output {batch.folder} holds the jobs of another plan ({CELLS} has {len(before)} lines); choose another "
            "folder, or --force replaces it."
        )
    require_writable(batch.folder, "--output")
    (batch.folder / LOGS).mkdir(parents=True, exist_ok=True)
    for name, text in {CELLS: "".join(f"{line}\n" for line in batch.lines), **files}.items():
        write_atomically(batch.folder / name, text.encode())


def ranges(numbers: Sequence[int]) -> str:
    """Increasing numbers as Slurm writes them: `1-3,7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def slurm_script(batch: Batch) -> str:
    """The script of the job array, for sbatch."""
    options = {
        "job-name": "upcycle-bench",
        "array": ranges(batch.to_do) + (f"%{batch.max_jobs}" if batch.max_jobs else ""),
        "nodes": batch.nodes,
        "ntasks-per-node": batch.tasks_per_node,
        "gpus-per-node": batch.gpus or None,
        "cpus-per-task": batch.cpus if batch.cpus > 1 and not _asks_for_cpus(batch.more) else None,
        "time": batch.time,
        "partition": batch.partition,
        "account": batch.account,
        "chdir": Path.cwd(),
        "output": str(batch.folder / LOGS).replace("%", "%%") + "/%a.log",
        "open-mode": "append",
        "signal": f"USR1@{batch.signal_before}",  # to the processes of the step, which then write a checkpoint
    }
    head = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    head += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in batch.more)]
    known = {"PATH": f"{shlex.quote(str(batch.programs))}:$PATH"}
    known |= {name: shlex.quote(value) for name, value in batch.variables.items()}
    own = [f"export {name}={value}" for name, value in known.items()]
    own += ["", "# --setup", *batch.setup.splitlines()] if batch.setup else []
    own += ["", f"folder={shlex.quote(str(batch.folder))}", f"requeue_limit={batch.requeue_limit}"]
    return "\n".join([*INTRODUCTION, *head, "", *own, BODY])


def _asks_for_cpus(options: Sequence[str]) -> bool:
    """Whether options of sbatch say how many processors a task gets."""
    return any(option.startswith(("--cpus-per-task", "--cpus-per-gpu", "-c")) for option in options)


INTRODUCTION = (
    "#!/bin/bash",
    "# Made by `upcycle-bench launch`. Each job of this array is one run: a line of cells.txt, by its number.",
    "# Its log is logs/NUMBER.log. A run that the records show as done ends at once.",
)
BODY = r"""
cell=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$folder/cells.txt")
start=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $start: $cell"

grep -qsx "$SLURM_ARRAY_JOB_ID" "$folder/submitted.txt" || echo "$SLURM_ARRAY_JOB_ID" >> "$folder/submitted.txt"

# srun hands the processors of a task down only if it is told to.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# The processes find each other by what srun tells them of the step. Those that stop with a checkpoint end seconds
# apart: with --kill-on-bad-exit the first would have the others killed, and their status would hide the 75.
eval "srun --kill-on-bad-exit=0 --wait=60 $cell"
status=$?
echo "$(date -u +%FT%TZ) ended with status $status"

# 75: not finished, and a checkpoint was written; the same command goes on. So it does after a preemption.
if [ "$status" -eq 75 ]; then
    if [ "$start" -le "$requeue_limit" ]; then
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" && exit 0
    fi
    echo "to go on: sbatch --array=$SLURM_ARRAY_TASK_ID '$folder/job.sh'"
fi
exit "$status"
"""
