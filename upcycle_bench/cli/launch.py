"""`upcycle-bench launch`: the runs of a matrix as jobs of a cluster, or one after the other here.

Each job is one run, `upcycle-bench run --once`, on all its processes. Imports nothing heavy.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from upcycle_bench.cli.common import Json, require_one_process, terminal_reporter, uncollected
from upcycle_bench.cli.jobs import chosen_jobs, jobs_of
from upcycle_bench.cli.plans import make_plans
from upcycle_bench.cli.run import run, show_matrix
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json
from upcycle_bench.util.capacity import visible_gpus
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.local_jobs import UNFINISHED, LocalJobs

if TYPE_CHECKING:
    from upcycle_bench.planning.jobs import Batch
    from upcycle_bench.planning.matrix import Cell

# Options of `run` that a job has values of its own for, or that do not go with a job.
OF_A_CELL = {"strategy", "seed", "seeds", "init_seed", "train_seed", "once", "jobs"}
REFUSED = {
    "fresh": "a job that is started again would start from step 0; choose another --results, or use `run --fresh`",
    "dry_run": "it submits nothing without --submit; `run --dry-run` says what the runs cost",
}
OF_SLURM = ("partition", "account", "time", "setup", "sbatch", "max_jobs", "submit")


def launch(
    context: typer.Context,
    scheduler: Annotated[Literal["slurm", "local"], typer.Option(help="A job array of Slurm, or this machine.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines of a run.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of a machine.")] = 0,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes on a machine; else one a GPU, or one.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Limit of a job as Slurm writes it, 4:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="--NAME=VALUE", help="Any other option of sbatch: --qos=high.")
    ] = None,
    signal_before: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="How long before its limit a job writes a checkpoint.")
    ] = 180,
    requeue_limit: Annotated[int, typer.Option(min=0, help="How often a job that is not finished goes on.")] = 20,
    max_jobs: Annotated[int | None, typer.Option(min=1, help="How many jobs of the array run at once.")] = None,
    setup: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines of shell for each job: module load, conda activate.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where job script and logs go.")] = Path("launch"),
    submit: Annotated[bool, typer.Option("--submit", help="Give the job array to sbatch.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the jobs of another plan in --output.")] = False,
    as_json: Json = False,
) -> None:
    """Run strategies by seeds as jobs, those that the records do not show as done. Takes all options of `run`."""
    require_one_process("launch")
    wanted = _parse(context.args)
    with uncollected():
        from upcycle_bench.planning import jobs

    tasks = tasks_per_node or gpus or 1
    cells, done = _plan(wanted, nodes * tasks)
    lines = [_line(cell, wanted.written_out) for cell in cells]
    batch = jobs.Batch(
        folder=output.absolute(),
        lines=lines,
        to_do=[number for number, path in enumerate(done, start=1) if path is None],
        nodes=nodes,
        tasks_per_node=tasks,
        gpus=gpus,
        cpus=1 + (wanted.given["workers"] if wanted.given["workers"] is not None else 4 if gpus else 0),
        time=_checked_time(time),
        partition=partition,
        account=account,
        signal_before=signal_before,
        requeue_limit=requeue_limit,
        max_jobs=max_jobs,
        more=sbatch or [],
        setup=_text(setup),
        programs=_programs(),
        variables={name: value for name, value in os.environ.items() if name.startswith("UPCYCLE_BENCH_")},
    )
    if scheduler == "local":
        at_once = jobs_of(wanted.given["jobs"]) or chosen_jobs(cells, wanted.given["results"], tasks, gpus)
        _require_here(context.params, at_once)
        jobs.write(batch, {}, force)
        _run_here(batch, at_once, cells, as_json)
        return
    if jobs_of(wanted.given["jobs"]) != 1:
        raise UserError("--jobs goes with --scheduler local; --max-jobs N says how many jobs of the array run at once.")
    if batch.to_do:
        jobs.write(batch, {"job.sh": jobs.slurm_script(batch)}, force)
    _give_to_slurm(batch, output, submit, None if as_json else lambda: show_matrix(cells, done))


def _give_to_slurm(batch: Batch, output: Path, submit: bool, show: Callable[[], None] | None) -> None:
    """Submit the job array, or say how; without `show`, which shows the matrix, in JSON."""
    from upcycle_bench.planning.jobs import LOGS

    command, logs = ["sbatch", str(output / "job.sh")], output / LOGS
    number = _submit(batch.folder, command) if submit and batch.to_do else None
    total, to_do = len(batch.lines), len(batch.to_do)
    if show is None:
        facts = {"folder": str(batch.folder), "runs": total, "to_do": batch.to_do}
        print(strict_json.dumps({**facts, "submit": shlex.join(command), "job": number}, indent=2))
        return
    show()
    print(f"{to_do} of {total} runs are to do; {total - to_do} were done before")
    if number:
        print(f"submitted as job {number}; logs: {logs}")
    elif to_do:
        print(f"submit them: {shlex.join(command)}")


@dataclass(frozen=True)
class _Wanted:
    """The options of `run` that were given: their values, and those for every job as arguments again."""

    given: Mapping[str, Any]
    written_out: Sequence[str]


def _parse(arguments: Sequence[str]) -> _Wanted:
    """What `run` makes of the arguments. Its errors are those of a wrong option."""

    @functools.wraps(run)  # the same options
    def take(context: typer.Context, **given: Any) -> dict[str, Any]:
        return given

    app = typer.Typer(add_completion=False)
    app.command()(take)
    command = typer.main.get_command(app)
    given = command.main(list(arguments), prog_name="upcycle-bench launch", standalone_mode=False)
    options = {parameter.name: parameter for parameter in command.params}
    defaults = command.main(["--strategy", "all"], standalone_mode=False)
    changed = {name: value for name, value in given.items() if value != defaults[name] or name == "protocol"}
    for name in REFUSED.keys() & changed:
        raise UserError(f"launch does not take {options[name].opts[0]}: {REFUSED[name]}.")
    written: list[str] = []
    for name in [name for name in changed if name not in OF_A_CELL]:
        value, option = changed[name], options[name]
        flag = max(option.secondary_opts if value is False else option.opts, key=len)
        values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        written += [part for each in values for part in (flag, str(each))] or [flag]
    return _Wanted(given, written)


def _plan(wanted: _Wanted, processes: int) -> tuple[list[Cell], list[Path | None]]:
    """The cells and, for each, its record or None, as runs of that many processes. UserError for bad input."""
    from upcycle_bench.planning import matrix
    from upcycle_bench.planning.jobs import planned_for
    from upcycle_bench.planning.plan import check_input, check_strategy

    given = wanted.given
    pairs = matrix.seed_pairs(given["seed"], given["seeds"], given["init_seed"], given["train_seed"])
    known = {name: given[name] for name in inspect.signature(make_plans).parameters if name in given}
    with planned_for(processes):
        plans = make_plans(**known, reporter=terminal_reporter())
        check_input(plans[0], given["results"])
        for plan in plans:
            try:
                check_strategy(plan)
            except UserError as error:  # the job of this strategy will fail, those of the others will not
                print(f"warning: {error}", file=sys.stderr)
        cells = list(matrix.enumerate_cells(plans, pairs))
        return cells, matrix.preview(cells, given["results"], fresh=False)


def _line(cell: Cell, written_out: Sequence[str]) -> str:
    """The command line of a cell."""
    seeds = ["--init-seed", str(cell.plan.init_seed), "--train-seed", str(cell.plan.train_seed)]
    line = shlex.join(["upcycle-bench", "run", "--once", "--strategy", cell.plan.entry.name, *seeds, *written_out])
    if "\n" in line:
        raise UserError("an option has a line break, which a list of commands cannot hold; leave it out.")
    return line


def _checked_time(text: str | None) -> str | None:
    """Slurm's forms: minutes, minutes:seconds, h:m:s, days-hours, days-h:m, days-h:m:s."""
    if text is not None and not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise UserError(f"--time {text}: write it as Slurm does, 4:00:00 or 1-12:00:00.")
    return text


def _text(setup: Path | None) -> str:
    try:
        return setup.read_text(encoding="utf-8") if setup else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--setup {setup}: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}.") from None


def _programs() -> Path:
    """The folder of the command `upcycle-bench` that runs now, for the jobs' PATH."""
    called, beside = Path(sys.argv[0]).absolute(), Path(sys.executable).parent / "upcycle-bench"
    program = called if called.name == beside.name else beside
    if not program.is_file():
        raise UserError(f"{program} is missing, which the jobs would call; install upcycle-bench with pip.")
    return program.parent


def _require_here(given: Mapping[str, Any], at_once: int) -> None:
    """UserError for options that only Slurm has a use for, and unless so many jobs at once find GPUs of their own."""
    for name in OF_SLURM:
        if given[name]:
            raise UserError(f"--{name.replace('_', '-')} goes with --scheduler slurm; leave it out.")
    if given["nodes"] > 1:
        raise UserError(f"--nodes {given['nodes']}: --scheduler local has this machine alone.")
    needed = at_once * given["gpus"]
    if needed > (found := len(visible_gpus()) if needed else 0):
        raise UserError(f"--jobs {at_once} with --gpus {given['gpus']} needs {needed} GPUs; {found} are visible here.")


def _submit(folder: Path, command: Sequence[str]) -> str:
    """Give the job array to sbatch; returns its number. UserError where Slurm refuses, and where jobs still wait."""
    from upcycle_bench.planning.jobs import SUBMITTED

    if not shutil.which("sbatch"):
        raise UserError(f"there is no sbatch on this machine; submit where there is: {shlex.join(command)}")
    known = folder / SUBMITTED
    before = dict.fromkeys(known.read_text().split() if known.is_file() else [])
    for number in before:
        listed = subprocess.run(["squeue", "--noheader", "--jobs", number], capture_output=True, text=True)
        if listed.returncode and "Invalid job id" not in listed.stderr:  # of a job that Slurm has forgotten
            raise UserError(f"squeue does not say whether job {number} is over: {' '.join(listed.stderr.split())}")
        if listed.returncode == 0 and listed.stdout.strip():
            raise UserError(f"job {number} of {folder} is not over: wait for it, or end it with: scancel {number}")
    done = subprocess.run([command[0], "--parsable", *command[1:]], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch: {' '.join(done.stderr.split())}")
    number = done.stdout.strip().partition(";")[0]  # behind it the cluster, where there are several
    known.write_text("\n".join([*before, *({number} - before.keys()), ""]))  # the first job may have written it
    return number


def _run_here(batch: Batch, at_once: int, cells: Sequence[Cell], as_json: bool) -> None:
    """Run the jobs on this machine and show how each ended."""
    from upcycle_bench.planning.jobs import LOGS

    logs = batch.folder / LOGS
    queue = LocalJobs(
        {number: batch.lines[number - 1] for number in batch.to_do},
        logs,
        processes=batch.tasks_per_node,
        at_once=at_once,
        gpus=batch.gpus,
        requeue_limit=batch.requeue_limit,
        environment={**os.environ, "PATH": f"{batch.programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"},
        say=lambda line: print(line, file=sys.stderr),
    )
    statuses = queue.run()
    rows = [
        {
            "job": str(number),
            "strategy": cell.strategy,
            "seed": cell.seed,
            "ended": _ended(statuses.get(number)) if number in batch.to_do else "done before",
            "log": str(logs / f"{number}.log") if number in statuses else "",
        }
        for number, cell in enumerate(cells, start=1)
    ]
    if as_json:
        print(strict_json.dumps({"folder": str(batch.folder), "jobs": rows}, indent=2))
    else:
        table(str(batch.folder), [{key: row[key] for key in row if key != "log"} for row in rows])
        for row in filter(lambda row: row["log"], rows):  # outside the table paths stay whole, to be copied
            print(f"job {row['job']}: {row['log']}")
    if queue.stopped:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        raise typer.Exit(130 if queue.stopped == signal.SIGINT else UNFINISHED)
    if left := {statuses[number] for number in batch.to_do} - {0}:
        raise typer.Exit(UNFINISHED if left == {UNFINISHED} else 1)


def _ended(status: int | None) -> str:
    """How a job ended, by its exit status; None: it did not start."""
    if status is None:
        return "not started"
    return {0: "done", UNFINISHED: "not finished"}.get(status, f"failed: status {status}")
