"""The command line: parses, calls, prints. Results go to stdout, progress and errors to stderr.

Heavy imports stand inside the commands, so that `--help` is instant. With `--json` a command prints one JSON document
on stdout and nothing else there. Exit status: 0 done, 1 the run failed (its record says why), 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench import (
    compress_command,
    data_command,
    display,
    evaluate_command,
    experts_command,
    latency_command,
    plot_command,
    upcycle_command,
)
from upcycle_bench.command import (
    check_output,
    interruptible,
    is_main,
    key_value,
    names_of,
    terminal_reporter,
    uncollected,
    warn_broken,
)
from upcycle_bench.errors import UserError, plain
from upcycle_bench.options import Checkpoint, Data, EvalData, Json, Options, Overrides, ProtocolName, Strategies, Suites

if TYPE_CHECKING:
    from upcycle_bench.planning.plan import Plan
    from upcycle_bench.planning_matrix import Cell
    from upcycle_bench.progress import Reporter
    from upcycle_bench.protocol import Protocol

app = typer.Typer(
    name="upcycle-bench",
    help="A fair benchmark of ways to turn a dense CLIP into a mixture of experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(data_command.app, name="data")


class Kind(str, Enum):
    """What `list` can show."""

    strategies = "strategies"
    suites = "suites"
    protocols = "protocols"


class Format(str, Enum):
    """Leaderboard formats."""

    terminal = "terminal"
    md = "md"
    csv = "csv"
    json = "json"


def _version(wanted: bool) -> None:
    if wanted:
        from upcycle_bench import __version__

        print(f"upcycle-bench {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    strategy: Strategies,
    protocol: ProtocolName = "lab",
    option: Options = None,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Both seeds.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on.")] = 1,
    init_seed: Annotated[int | None, typer.Option(min=0, help="The strategy's own randomness.")] = None,
    train_seed: Annotated[int | None, typer.Option(min=0, help="Data order, augmentation, dropout.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Of several runs, how many at once.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again what was trained before.")] = False,
    results: Annotated[Path, typer.Option(help="Where the record goes.")] = Path("results"),
    data: Data = None,
    checkpoint: Checkpoint = None,
    eval_data: EvalData = None,
    suite: Suites = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it costs.")] = False,
    as_json: Json = False,
) -> None:
    """Upcycle, train, score and record strategies under one protocol: one run, or what is missing of many."""
    with uncollected():
        from upcycle_bench import planning_matrix, run_many

    pairs = planning_matrix.seed_pairs(seed, seeds, init_seed, train_seed)
    if jobs > 1 and "RANK" in os.environ:
        raise UserError("--jobs starts processes of its own and does not go with torchrun; leave one of them out.")
    reporter = terminal_reporter()
    plans = _plans(strategy, protocol, option, overrides, data, checkpoint, eval_data, reporter, suite)
    settings = plans[0].protocol
    cells = list(planning_matrix.enumerate_cells(plans, pairs))
    if not plans[0].missing:
        _warn_emulated(settings)
    if dry_run:
        if is_main():
            _show_dry_run(cells, results, fresh, as_json)
        return
    if len(cells) == 1:
        _run_one(cells[0].plan, results, reporter, fresh, as_json)
        return
    given = {
        "--protocol": [protocol],
        "--option": option,
        "--set": overrides,
        "--results": [results],
        "--data": data and [data],
        "--checkpoint": checkpoint and [checkpoint],
        "--eval-data": eval_data and [eval_data],
        "--suite": suite and [suite],
    }
    shared = [str(part) for name, values in given.items() for value in values or [] for part in (name, value)]
    shared += ["--fresh"] if fresh else []
    again = "the same command without --fresh" if fresh else "the same command"
    with interruptible(f"{again} goes on with what is missing"):
        outcomes = run_many.run_all(
            cells, results, reporter, jobs=jobs, fresh=fresh, shared=shared, show=display.show_matrix
        )
    if is_main():
        display.show_outcomes(outcomes, as_json)
    if any(outcome.reason for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def receipt(
    strategy: Strategies,
    protocol: ProtocolName = "lab",
    option: Options = None,
    overrides: Overrides = None,
    init_seed: Annotated[int, typer.Option(min=0, help="The strategy's own randomness.")] = 0,
    data: Data = None,
    checkpoint: Checkpoint = None,
    eval_data: EvalData = None,
    as_json: Json = False,
) -> None:
    """Show what strategies make of the dense model at step 0, without training."""
    from dataclasses import replace

    from upcycle_bench.receipt import receipts, show

    reporter = terminal_reporter()
    plans = _plans(strategy, protocol, option, overrides, data, checkpoint, eval_data, reporter)
    with interruptible("nothing was written"):
        made = receipts([replace(plan, init_seed=init_seed) for plan in plans], reporter)
    if is_main():
        show(made, as_json)


def _plans(
    strategy: str,
    protocol: str,
    option: list[str] | None,
    overrides: list[str] | None,
    data: str | None,
    checkpoint: Path | None,
    eval_data: Path | None,
    reporter: Reporter,
    suite: str | None = None,
) -> list[Plan]:
    """A plan for each strategy that is named, with the first seeds."""
    with uncollected():
        from upcycle_bench import planning_matrix
        from upcycle_bench.planning.plan import Paths, make_plan
        from upcycle_bench.protocol import load_protocol
        from upcycle_bench.registry import load_registry

        registry = load_registry()
    warn_broken(registry.broken)
    names = planning_matrix.strategy_names(registry, strategy)
    if option and len(names) > 1:
        raise UserError("--option belongs to one strategy; run strategies with options one by one.")
    paths = Paths(data=data, checkpoint=checkpoint, eval_data=eval_data)
    options = dict(key_value(text) for text in option or [])
    settings = load_protocol(registry.get("protocol", protocol).target, overrides)
    with uncollected():
        import open_clip  # noqa: F401  (the longest import of all; a plan needs its configurations)
    with interruptible("nothing was written"):  # the data are built here if the cache lacks them
        return [
            make_plan(
                registry,
                name,
                settings,
                options=options,
                paths=paths,
                suites=names_of(suite, "--suite"),
                reporter=reporter,
            )
            for name in names
        ]


def _show_dry_run(cells: list[Cell], results: Path, fresh: bool, as_json: bool) -> None:
    from upcycle_bench import planning_matrix

    if len(cells) == 1:
        display.show_plan(cells[0].plan, as_json)
        return
    done = planning_matrix.preview(cells, results, fresh)
    flops, seconds = planning_matrix.estimate([cell for cell, path in zip(cells, done, strict=True) if path is None])
    display.show_preview(cells, done, flops, seconds, as_json)


def _run_one(plan: Plan, results: Path, reporter: Reporter, fresh: bool, as_json: bool) -> None:
    from upcycle_bench import record
    from upcycle_bench.run import run as execute

    with interruptible(_resumption(plan.protocol)):
        path = execute(plan, results, reporter, fresh=fresh)
    if path is None:  # not rank 0
        return
    if as_json:
        print(path.read_text(), end="")
    else:
        display.show_record(record.read(path), path)


@app.command()
def pretrain(
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="Whose dense model; see `list protocols`.")] = "lab",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override the protocol, dense.seed=1.")
    ] = None,
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.safetensors", help="Write it there too, in half precision.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train the dense model of a protocol by its recipe, into the cache."""
    from upcycle_bench import distributed, engine
    from upcycle_bench.cache import locked
    from upcycle_bench.planning.fingerprint import dense_recipe
    from upcycle_bench.planning.plan import Paths, find_world, recipe_path
    from upcycle_bench.pretrain import export
    from upcycle_bench.pretrain import pretrain as execute
    from upcycle_bench.protocol import load_protocol
    from upcycle_bench.registry import load_registry

    registry = load_registry()
    warn_broken(registry.broken)
    settings = load_protocol(registry.get("protocol", protocol).target, overrides)
    if settings.data.world == "local" and data is None:
        raise UserError(f"protocol {settings.name} has no data of its own; give --data, webdataset shards to train on.")
    if output is not None:
        check_output(output)
    engine.check_world(settings.dense.schedule.batch_size, ep_size=1)
    reporter = terminal_reporter()
    with interruptible(_resumption(settings)):
        world = find_world(settings, Paths(data=data), reporter)
        with engine.session(settings.threads) as device:
            path = recipe_path(dense_recipe(settings, world))
            with locked(path) if distributed.is_main() else contextlib.nullcontext():
                # The metrics are written last.
                there = distributed.from_main(path.is_file() and path.with_suffix(".jsonl").is_file())
                if not there:
                    execute(settings, world, path, device, reporter)
    if is_main():
        half = export(path, output) if output else None
        display.show_dense(path, not there, output, half, as_json)


app.command("compress")(compress_command.compress)
app.command("upcycle")(upcycle_command.upcycle)
app.command("evaluate")(evaluate_command.evaluate)
app.command("plot")(plot_command.plot)
app.command("latency")(latency_command.latency)
app.command("experts")(experts_command.experts)


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if left out.")] = None,
    as_json: Json = False,
) -> None:
    """List strategies, suites and protocols, and who brings them."""
    with uncollected():
        from upcycle_bench.listing import rows
        from upcycle_bench.registry import load_registry

        registry = load_registry()
    warn_broken(registry.broken)
    kinds = [kind.value] if kind else [each.value for each in Kind]
    listing = {each: rows(registry, each) for each in kinds}
    if as_json:
        print(json.dumps({**listing, "broken": registry.broken}, indent=2))
        return
    for each, entries in listing.items():
        display.show_listing(each, entries)


@app.command()
def leaderboard(
    path: Annotated[Path, typer.Argument(help="Records: a folder or one file.")] = Path("results"),
    format: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.terminal,
    as_json: Json = False,
) -> None:
    """Turn records into tables: only runs with equal fingerprints share one."""
    from upcycle_bench import formats, leaderboard, record

    records = [record.read(each) for each in record.record_paths(path)]
    if not records:
        raise UserError(f"no records below {path}; make one with: upcycle-bench run --strategy cluster-aware")
    chosen = "json" if as_json else format.value
    print(formats.render(leaderboard.build(records), chosen), end="")


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of records."""
    from upcycle_bench.record import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check what this machine can do: a tick, or the remedy."""
    from upcycle_bench import doctor

    found = doctor.checks()
    if as_json:
        print(doctor.as_json(found))
    else:
        display.show(doctor.render(found))
    if not doctor.healthy(found):
        raise typer.Exit(1)


def _resumption(protocol: Protocol) -> str:
    resumes = protocol.train.checkpoint_every > 0
    return "the same command goes on from the last checkpoint" if resumes else "no record was written"


def _warn_emulated(protocol: Protocol) -> None:
    """bf16 stays bf16 on a CPU that has none, but not in silence."""
    from upcycle_bench.doctor import cpu_bf16
    from upcycle_bench.engine import choose_device

    wanted = protocol.train.schedule.precision == "bf16"
    if wanted and is_main() and choose_device().type == "cpu" and not cpu_bf16():
        print(
            "warning: this CPU has no bf16 instructions, so torch emulates them, slowly; the protocol lab-fp32 does "
            "without.",
            file=sys.stderr,
        )


def main() -> None:
    """Entry point: one line for bad input, no traceback."""
    try:
        sys.exit(app(prog_name="upcycle-bench", standalone_mode=False) or 0)
    except UserError as error:
        print(f"error: {error}" if is_main() else f"error (rank {os.environ['RANK']}): {error}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except typer.TyperException as error:  # a missing or bad option, an unknown command
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "upcycle-bench"
        message = " ".join(plain(error.format_message()).split())
        if message:  # none: it has just printed the help
            end = "" if message.endswith((".", "?")) else "."
            print(f"error: {path}: {message}{end} See: {path} --help", file=sys.stderr)
        sys.exit(2)
