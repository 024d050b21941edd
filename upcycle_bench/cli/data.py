"""`upcycle-bench data`: build the sets that ship as a recipe, index and check a user's own. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from upcycle_bench.cli.common import Json, interruptible, terminal_reporter
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    from upcycle_bench.data.evalset_check import Report
    from upcycle_bench.data.world import World

app = typer.Typer(help="Build the data sets that ship as a recipe; index and check your own.", no_args_is_help=True)


@app.command()
def build(
    world: Annotated[str, typer.Argument(help="lab or digits.")],
    as_json: Json = False,
) -> None:
    """Build a data set into the cache and say what is in it."""
    from upcycle_bench.data.worlds import load_world
    from upcycle_bench.util.cache import cache_root

    before = set((cache_root() / "worlds").glob("*"))
    reporter = terminal_reporter()
    with interruptible("nothing half-built was left"):
        made = load_world(world, 0, reporter)
    show_world(made, made.eval_root.parent not in before, as_json)


@app.command()
def check(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="An evaluation set, a folder that holds some, or training shards, as --data takes them.",
        ),
    ],
    lists: Annotated[
        bool, typer.Option("--list", help="Put bad training samples on the list of samples that are left out.")
    ] = False,
    unlists: Annotated[bool, typer.Option("--unlist", help="Take samples that are good here off that list.")] = False,
    as_json: Json = False,
) -> None:
    """Tell whether CLIP_benchmark webdatasets or training shards are valid, count them, say what is wrong."""
    from upcycle_bench.data import evalset_check, pairs_check

    if pairs_check.is_training(folder):
        _check_training(folder, lists, unlists, as_json)
        return
    if lists or unlists:
        raise UserError(f"--list and --unlist go with training shards; {folder} is an evaluation set.")
    reports = [evalset_check.check(path) for path in evalset_check.find(Path(folder))]
    if as_json:
        print(strict_json.dumps({"folder": folder, "sets": [asdict(report) for report in reports]}, indent=2))
    else:
        table(folder, [_counts(report) for report in reports])
        for report in reports:
            for problem in report.problems:
                print(f"{report.name}: {problem}")
            for note in report.notes:
                print(f"{report.name}: note: {note}")
    if any(report.problems for report in reports):
        raise typer.Exit(1)


@app.command()
def index(
    shards: Annotated[str, typer.Argument(help="Training shards, as --data takes them.")],
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Number all pairs as they are now: changed shards are another data set.")
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask object stores for changes, run commands (pipe:) again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Index training shards once, so that no start reads them; say what they hold."""
    from upcycle_bench.data.open_index import index_facts
    from upcycle_bench.data.pair_index import KINDS
    from upcycle_bench.data.sources import expand_sources, passed_over

    with interruptible("the same command goes on"):
        sources = expand_sources(shards, "SHARDS")
        facts = index_facts(sources, "SHARDS", terminal_reporter(), fresh=fresh, refresh=refresh)
    if as_json:
        print(strict_json.dumps({"shards": shards, **facts}, indent=2))
        return
    counts = {key: value for key, value in facts.items() if isinstance(value, int)}
    counts |= {f"left out: {kind}": count for kind, count in facts["left_out"].items()}
    rows = {key.replace("_", " "): f"{value:,}" for key, value in counts.items()}
    rows["seconds"] = f"{facts['seconds']:,.2f}"
    table(shards, [{"what": what, "is": text} for what, text in rows.items()])
    print(f"identity: {facts['identity']}")
    for kind in facts["left_out"]:
        print(f"{kind}: {KINDS[kind]}")
    for line in facts["warnings"] + passed_over(shards):
        print(f"warning: {line}")


def _check_training(text: str, lists: bool, unlists: bool, as_json: bool) -> None:
    """What training shards hold, what of it a training leaves out, what it would replace, and what would stop it."""
    from upcycle_bench.data.pairs_check import check_pairs
    from upcycle_bench.data.sources import expand_sources, passed_over

    with interruptible("the same command goes on with what is not indexed"):
        report = check_pairs(expand_sources(text, "PATH"), terminal_reporter(), lists=lists, unlists=unlists)
    if as_json:
        print(strict_json.dumps({"folder": text, "training": asdict(report)}, indent=2))
    else:
        rows = {"shards": report.shards, "training pairs": report.pairs}
        rows |= {f"left out: {kind}": count for kind, count in report.left_out.items()}
        rows |= {f"bad: {kind}": count for kind, count in report.bad.items()}
        rows |= {"on the bad list": report.listed} if report.listed else {}
        table(text, [{"what": what, "count": f"{count:,}"} for what, count in rows.items()])
        if report.warning:
            print(f"warning: {report.warning}")
        for line in [report.remedy, report.mended, *passed_over(text)]:
            if line:
                print(f"warning: {line}")
        for problem in report.problems:
            print(problem)
    if report.problems:
        raise typer.Exit(1)


def _counts(report: Report) -> dict[str, str]:
    """The row of one evaluation set."""
    parts = [f"{count:,} samples in {split}" for split, count in report.samples.items()]
    if report.classes:
        rarest = ", ".join(f"{count:,} in {split}" for split, count in report.rarest.items())
        parts += [f"{report.classes:,} classes, the rarest with {rarest}", f"templates: {report.templates:,}"]
    if report.captions:
        parts.append(f"{report.captions:,} captions")
    valid = "no" if report.problems else "yes"
    return {"set": report.name, "kind": report.kind, "valid": valid, "holds": "; ".join(parts) or "nothing"}


def show_world(world: World, built: bool, as_json: bool) -> None:
    """The contents of a data set, from its manifest."""
    from upcycle_bench.data.world import MANIFEST
    from upcycle_bench.protocol import flatten

    folder = world.eval_root.parent
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    del manifest["files"]
    if as_json:
        print(strict_json.dumps({**manifest, "folder": str(folder), "sha256": world.sha256}, indent=2))
        return
    counts = manifest["counts"]
    # The lab counts icons in each split, and under "set NAME" the samples of each set that it wrote.
    sets = {key.removeprefix("set "): n for key, n in counts.items() if key.startswith("set ")} or counts
    rows = {"training pairs": sets["train"]}
    rows |= {f"evaluation set {name}": n for name, n in sets.items() if name != "train"}
    rows |= {f"removed: {key.replace('.', ' ', 1)}": n for key, n in flatten(manifest.get("removed", {})).items()}
    rows |= {"classes": manifest["classes"]} if "classes" in manifest else {}
    title = f"{world.name}, just built" if built else f"{world.name}, in the cache already; every file was checked"
    table(title, [{"what": key, "count": f"{value:,}"} for key, value in rows.items()])
    print(f"folder: {folder}")
