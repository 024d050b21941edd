"""`upcycle-bench cache`: what the cache holds, and how to free its space. Imports nothing heavy."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench.cli.common import Json, names_of, require_one_process
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError, unknown

if TYPE_CHECKING:
    from upcycle_bench.util.cache_contents import Entry

app = typer.Typer(help="Show what the cache holds, interrupted trainings too; free its space.", no_args_is_help=True)

MANY = 4  # entries that are named one by one
UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List each kind with its size and last use, and the interrupted trainings."""
    from upcycle_bench.util.cache import cache_root
    from upcycle_bench.util.cache_contents import training_of

    entries, now = _entries(), time.time()
    kinds = [_kind_facts(kind, entries) for kind in dict.fromkeys(entry.kind for entry in entries)]
    runs = [
        {
            **training_of(entry),
            "bytes": entry.bytes,
            "last_used": entry.used,
            "going_on": entry.locked(),
            "folder": str(entry.paths[0]),
        }
        for entry in entries
        if entry.kind == "runs"
    ]
    if as_json:
        print(strict_json.dumps({"cache": str(cache_root()), "kinds": kinds, "runs": runs}, indent=2))
        return
    total = _size(sum(entry.bytes for entry in entries))
    shown: list[dict[str, str]] = [
        {
            "kind": row["kind"],
            "size": _size(row["bytes"]),
            "entries": f"{row['entries']:,}",
            "last use": _ago(now - row["last_used"]),
            "holds": row["what"],
        }
        for row in kinds
    ]
    table(f"{cache_root()}: {total}", shown)
    if runs:
        table("interrupted trainings", [_run_row(run, now) for run in runs])


def _entries() -> list[Entry]:
    """What the cache holds, and this machine's own folder for blocks of shards."""
    from upcycle_bench.data.shard_cache import local_root
    from upcycle_bench.util.cache import cache_root
    from upcycle_bench.util.cache_contents import survey

    return survey(cache_root(), local_root() / "shards")


def _kind_facts(kind: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """What all entries of a kind come to."""
    from upcycle_bench.util.cache_contents import KINDS

    some = [entry for entry in entries if entry.kind == kind]
    return {
        "kind": kind,
        "what": KINDS.get(kind, "not known to this version"),
        "entries": len(some),
        "files": sum(entry.files for entry in some),
        "bytes": sum(entry.bytes for entry in some),
        "last_used": max(entry.used for entry in some),
    }


@app.command()
def prune(
    older_than: Annotated[str | None, typer.Option(metavar="AGE", help="What was last used before: 30d, 12h.")] = None,
    kind: Annotated[str | None, typer.Option(metavar="A,B", help="Only these kinds; see `cache list`.")] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help="Only trained weights of which --results has no record.")
    ] = False,
    results: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Where the records are; may be given several times.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete entries of the cache, by age or kind, after a question; never what a living process has locked."""
    require_one_process("cache prune")
    from upcycle_bench.util.cache_contents import NEVER, delete, trainings_alive, waiting_for, why_kept

    if not (older_than or kind or unused):
        raise UserError("cache prune needs --older-than, --kind or --unused, which say what to delete.")
    entries, now = _entries(), time.time()
    kinds = _kinds(kind, entries)
    age = _seconds(older_than) if older_than else 0.0
    found = [entry for entry in entries if entry.kind in kinds and now - entry.used >= age]
    if unused:
        needed = _named_by_records(results or [Path("results")])
        found = [entry for entry in found if _is_unused(entry, needed)]
    alive, chosen = trainings_alive(entries), set(map(id, found))
    dense = waiting_for(entry for entry in entries if id(entry) not in chosen)
    alone = len(set(kinds)) == 1
    reasons = [
        (entry, why_kept(entry, alive, now, dense, alone=alone) or _is_new(entry, now, unused)) for entry in found
    ]
    kept = [(entry, why) for entry, why in reasons if why and entry.kind not in NEVER]
    going = [entry for entry, why in reasons if not why]
    if not as_json:
        if going:
            table("to delete", [{"kind": each.kind, "size": _size(each.bytes), "name": each.name} for each in going])
        for line in _kept_lines(kept):
            print(line, file=sys.stderr)
    if going and not dry_run and not yes:
        if as_json or not sys.stdin.isatty():
            raise UserError("cache prune asks before it deletes, and nobody can answer here; give --yes or --dry-run.")
        typer.confirm(f"Delete {len(going)} entries, {_size(sum(each.bytes for each in going))}?", abort=True)
    gone = going if dry_run else [entry for entry in going if delete(entry)]
    freed = sum(entry.bytes for entry in gone)
    if as_json:
        rows = [{"kind": each.kind, "name": each.name, "bytes": each.bytes} for each in gone]
        print(strict_json.dumps({"deleted": [] if dry_run else rows, "found": rows, "bytes": freed}, indent=2))
    else:
        print(f"{'would free' if dry_run else 'freed'} {_size(freed)} in {len(gone)} entries")


def _is_new(entry: Entry, now: float, unused: bool) -> str | None:
    """Why what no record names is kept all the same, or None: its run may not have written one yet."""
    from upcycle_bench.util.cache_contents import DAY

    return (
        "it was used within a day, and its record may be still to come" if unused and now - entry.used < DAY else None
    )


def _kept_lines(kept: Sequence[tuple[Entry, str]]) -> list[str]:
    """A line for each entry that is kept, or one for many of a kind."""
    lines = []
    for (kind, why), some in itertools.groupby(kept, key=lambda each: (each[0].kind, each[1])):
        names = [entry.name for entry, _ in some]
        several = [f"{names[0]} and {len(names) - 1} more"] if len(names) > MANY else names
        lines += [f"kept: {kind}/{name}: {why}" for name in several]
    return lines


def _kinds(text: str | None, entries: Sequence[Entry]) -> Collection[str]:
    """The kinds that are named; without a name all. UserError for one that there is not, or that is never deleted."""
    from upcycle_bench.util.cache_contents import KINDS, NEVER

    known = {*KINDS, *(entry.kind for entry in entries)} - NEVER
    names = names_of(text, "--kind")
    for name in names:
        if name not in known:
            raise unknown("kind", name, known)
    return names or known


def _named_by_records(folders: Sequence[Path]) -> set[str]:
    """The hashes of weights in all records below `folders`, of failed runs too. UserError where a folder has none."""
    from upcycle_bench.planning.matrix import read_records

    named: set[str] = set()
    for folder in folders:
        if not (records := read_records(folder)):
            raise UserError(f"no records below {folder}, so no weights are known as used; give --results FOLDER.")
        named |= {made.hashes.weights for made in records.values() if made.hashes.weights}
    return named


def _is_unused(entry: Entry, needed: Collection[str]) -> bool:
    """Whether it is weights, or a finished training with weights, that are not among the needed ones."""
    from upcycle_bench.util.cache_contents import peek

    if entry.kind == "weights":
        return entry.name not in needed
    if entry.kind == "trained":
        facts = next((path for path in entry.paths if path.suffix == ".json"), None)
        try:
            return facts is None or peek(facts)["weights"] not in needed
        except (OSError, ValueError, KeyError):  # not readable, so no run can use it
            return True
    return False


def _run_row(run: dict[str, Any], now: float) -> dict[str, str]:
    seeds = run["seeds"]
    return {
        "strategy": run["strategy"] or "unknown",
        "protocol": run["protocol"] or "",
        "seeds": "" if seeds is None else "/".join(map(str, seeds)),
        "step": str(run["step"]),
        "size": _size(run["bytes"]),
        "last use": "now" if run["going_on"] else _ago(now - run["last_used"]),
        "folder": Path(run["folder"]).name,
    }


def _seconds(text: str) -> float:
    """Seconds in 30d, 12h. UserError for another text."""
    if not (match := re.fullmatch(r"(\d+)([mhdw])", text)):
        raise UserError(f"--older-than {text!r}: write an age as 45m, 12h, 30d or 4w.")
    return float(int(match[1]) * UNITS[match[2]])


def _ago(seconds: float) -> str:
    """An age in its largest unit that fits twice."""
    unit = next((name for name, size in reversed(UNITS.items()) if seconds >= 2 * size), "m")
    return f"{max(0, int(seconds // UNITS[unit]))} {unit}"


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
