"""The command line: parses, calls, prints. Results go to stdout, progress and errors to stderr.

Heavy imports stand inside the commands, so that `--help` is instant. With `--json` a command prints one JSON document
on stdout and nothing else there. Exit status: 0 done, 1 the run failed (its record says why), 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.plan import Plan
    from upcycle_bench.record import Record

app = typer.Typer(
    name="upcycle-bench",
    help="A fair benchmark of ways to turn a dense CLIP into a mixture of experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


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
    strategy: Annotated[str, typer.Option("--strategy", "-s", help="Which strategy; see `list strategies`.")],
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="Which protocol; see `list protocols`.")] = "smoke",
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="A strategy's option, tau=0.8.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override the protocol, moe.experts=4: open division."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Both seeds.")] = 0,
    init_seed: Annotated[int | None, typer.Option(min=0, help="The strategy's own randomness.")] = None,
    train_seed: Annotated[int | None, typer.Option(min=0, help="Data order, augmentation, dropout.")] = None,
    results: Annotated[Path, typer.Option(help="Where the record goes.")] = Path("results"),
    data: Annotated[
        str | None, typer.Option(help="Training shards (clip-*): a folder, or train/{000..127}.tar.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The dense open_clip model (clip-*).")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Folder with the evaluation sets (clip-*).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it costs.")] = False,
    as_json: Json = False,
) -> None:
    """Upcycle, train, score and record one strategy under one protocol."""
    from upcycle_bench.plan import Paths, make_plan
    from upcycle_bench.protocol import load_protocol
    from upcycle_bench.registry import load_registry

    registry = load_registry()
    _warn_broken(registry.broken)
    plan = make_plan(
        registry,
        strategy,
        load_protocol(registry.get("protocol", protocol).target, overrides),
        options=dict(_key_value(text) for text in option or []),
        init_seed=seed if init_seed is None else init_seed,
        train_seed=seed if train_seed is None else train_seed,
        paths=Paths(data=data, checkpoint=checkpoint, eval_data=eval_data),
    )
    if dry_run:
        if _is_main():
            _show_plan(plan, as_json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends is a Ctrl-C
    from upcycle_bench import record
    from upcycle_bench.progress import Reporter, TerminalReporter
    from upcycle_bench.run import run as execute

    try:
        path = execute(plan, results, TerminalReporter() if _is_main() else Reporter())
    except KeyboardInterrupt:
        if _is_main():
            resumes = plan.protocol.train.checkpoint_every > 0
            then = "the same command goes on from the last checkpoint" if resumes else "nothing was written"
            print(f"interrupted: {then}", file=sys.stderr)
        raise typer.Exit(130) from None
    if path is None:  # not rank 0
        return
    if as_json:
        print(path.read_text(), end="")
    else:
        _show_record(record.read(path), path)


@app.command("list")
def list_(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if left out.")] = None,
    as_json: Json = False,
) -> None:
    """List strategies, suites and protocols, and who brings them."""
    from upcycle_bench.listing import rows
    from upcycle_bench.registry import load_registry

    registry = load_registry()
    _warn_broken(registry.broken)
    kinds = [kind.value] if kind else [each.value for each in Kind]
    listing = {each: rows(registry, each) for each in kinds}
    if as_json:
        print(json.dumps({**listing, "broken": registry.broken}, indent=2))
        return
    for each, entries in listing.items():
        hidden = ("url", "reconstructed", "options", "sources")
        _table(each, [{k: v for k, v in entry.items() if k not in hidden} for entry in entries])


@app.command()
def leaderboard(
    path: Annotated[Path, typer.Argument(help="Records: a folder or one file.")] = Path("results"),
    format: Annotated[Format, typer.Option("--format", "-f", help="How to print it.")] = Format.terminal,
    as_json: Json = False,
) -> None:
    """Turn records into tables: only runs with equal fingerprints share one."""
    from upcycle_bench import leaderboard, record

    records = [record.read(each) for each in record.find(path)]
    chosen = "json" if as_json else format.value
    print(leaderboard.render(leaderboard.build(records), chosen), end="")


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
        _print(doctor.render(found))
    if not doctor.healthy(found):
        raise typer.Exit(1)


def _is_main() -> bool:
    """The rank that writes and prints, by what torchrun says; without importing torch."""
    return os.environ.get("RANK", "0") == "0"


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--option {text!r}: write it as KEY=VALUE, for example --option tau=0.8")
    return key, value


def _warn_broken(broken: dict[str, str]) -> None:
    if _is_main():
        for plugin, reason in broken.items():
            print(f"warning: plugin {plugin} did not load: {reason}", file=sys.stderr)


def _show_plan(plan: Plan, as_json: bool) -> None:
    from upcycle_bench.costs import estimate, estimate_seconds
    from upcycle_bench.engine import choose_device

    device = choose_device()
    costs = estimate(plan.protocol, moe=plan.strategy.replaces_ffn, trains=plan.strategy.trains)
    seconds = estimate_seconds(plan.protocol, costs.train_flops, device) if costs.train_flops else 0.0
    facts: dict[str, Any] = {
        "strategy": plan.label,
        "protocol": plan.protocol.name,
        "division": plan.protocol.division,
        "overrides": list(plan.protocol.overrides),
        "seeds": {"init": plan.init_seed, "train": plan.train_seed},
        "training_fingerprint": plan.training_fingerprint,
        "suite_fingerprints": plan.suite_fingerprints,
        "blocks_replaced": list(costs.layers),
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "steps": costs.steps,
        "samples": costs.samples,
        "peak_learning_rate": plan.protocol.peak_lr,
        "calibration_pairs": plan.strategy.calibration_pairs,
        "forward_flops_per_pair": costs.forward_flops,
        "training_flops_without_strategy_loss": costs.train_flops,
        "estimated_training_seconds_on_one_such_device": round(seconds, 1),
        "missing": list(plan.missing),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    _table("dry run", [{"what": key.replace("_", " "), "is": _plain(value)} for key, value in facts.items()])


def _plain(value: Any) -> str:
    if value is None:
        return "open until everything is given"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, int) and value >= 10**12:
        return f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _show_record(made: Record, path: Path) -> None:
    assert made.cost is not None
    several = len({score.suite for score in made.scores}) > 1
    scores = [
        {
            **({"suite": score.suite} if several else {}),
            "dataset": score.dataset,
            "metric": score.metric + (" (primary)" if score.primary else ""),
            "value": f"{score.value:.4f}",
            "chance": "" if score.chance is None else f"{score.chance:.4f}",
            "n": f"{score.samples:,}",
        }
        for score in made.scores
    ]
    seeds = made.seeds
    _table(f"{made.strategy.label}, protocol {made.protocol.name}, seeds {seeds.init} and {seeds.train}", scores)
    cost = made.cost
    parts = [f"{name} {phase.seconds:.1f} s" for name, phase in cost.phases.items()]
    parts.append(f"{cost.parameters_total:,} parameters, {cost.parameters_active:,} active")
    if cost.samples_per_second:
        parts.append(f"{cost.samples_per_second:,.0f} samples/s")
    if cost.tokens_dropped is not None:
        parts.append(f"{cost.tokens_dropped:.1%} of choices dropped")
    print("; ".join(parts))
    from upcycle_bench.cache import cache_root

    print(f"weights: {cache_root() / 'weights' / f'{made.hashes.weights}.safetensors'}")
    print(f"record: {path}")


def _table(title: str, rows: list[dict[str, str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows[0] if rows else ["none"]:
        table.add_column(column, overflow="fold", no_wrap=column not in ("summary", "paper", "is", "from"))
    for row in rows:
        table.add_row(*row.values())
    _print(table)


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(renderable)


def main() -> None:
    """Entry point: one line for bad input, no traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}" if _is_main() else f"error (rank {os.environ['RANK']}): {error}", file=sys.stderr)
        sys.exit(2)
