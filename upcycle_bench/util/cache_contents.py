"""What the cache holds, and how it is deleted: whole entries, and none that a living process has locked.

    entries = survey(cache_root())                          # an Entry for each run, world, file of weights, ...
    for entry in entries: why = delete(entry, alive)        # None: it is gone

An entry is renamed to a hidden name before it is deleted, so what stands at a final name is always complete.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import locked_now

HALF_WRITTEN = "half-written"
KINDS = {
    "runs": "interrupted trainings, which the same command goes on with",
    "weights": "final weights, by their sha256",
    "trained": "finished trainings: their weights, cost and metrics",
    "dense": "dense models that protocols train",
    "worlds": "data sets that were built",
    "decoded": "training images, decoded",
    "features": "embeddings of evaluation sets",
    "downloads": "fetched files",
    "index": "indices of training shards",
    "shards": "blocks of shards from elsewhere",
    "pairs": "counts of training shards",
    "checked": "which evaluation sets are sound",
    "locks": "locks between processes",
    HALF_WRITTEN: "what a killed process left",
}
# Deleting a lock would let two processes hold it; they are empty files.
NEVER = {"locks"}
# A training reads these without a lock.
READ = {"dense", "worlds", "decoded", "downloads", "index", "shards", "pairs"}
DAY = 86_400.0  # seconds that something without a lock may be written, or is needed after it was


@dataclass(frozen=True)
class Entry:
    """One entry: its files or folders, which make sense only together. `used` is a time as of `time.time`."""

    kind: str
    paths: Sequence[Path]
    bytes: int
    files: int
    used: float

    @property
    def name(self) -> str:
        """Its name within its kind: the part that its files share."""
        return self.paths[0].name if self.kind == HALF_WRITTEN else _stem(self.paths[0])

    def locked(self) -> bool:
        """Whether a living process has locked it."""
        with contextlib.ExitStack() as held:
            return not all(held.enter_context(locked_now(path)) for path in self._guarded())

    def _guarded(self) -> list[Path]:
        """The paths whose locks guard it: for a half-written .NAME.x.tmp that of NAME."""
        if self.kind != HALF_WRITTEN:
            return list(self.paths)
        return [path.with_name(path.name[1:].removesuffix(".tmp").rpartition(".")[0]) for path in self.paths]


def survey(root: Path, shards: Path | None = None) -> list[Entry]:
    """All entries of the cache, by kind and name. A folder of another name is a kind of its own.

    `shards`: where another folder has those blocks of shards that are of this machine alone.
    """
    found: dict[tuple[str, str], list[Path]] = defaultdict(list)
    elsewhere = [] if shards is None or shards == root / "shards" else [shards]
    for folder in sorted(path for path in [*root.glob("*"), *elsewhere] if path.is_dir()):
        for path in sorted(folder.iterdir()):
            hidden = path.name.startswith(".") and path.name.endswith(".tmp")
            kind = HALF_WRITTEN if hidden else folder.name
            found[kind, str(path) if hidden else _stem(path)].append(path)
    order = [*KINDS, *sorted({kind for kind, _ in found} - KINDS.keys())]
    entries = [_entry(kind, paths) for (kind, _), paths in found.items()]
    return sorted(entries, key=lambda entry: (order.index(entry.kind), entry.name))


def _stem(path: Path) -> str:
    """The name of a folder, or that of a file without what tells it from others beside it."""
    if not path.is_file():
        return path.name
    stem = path.name.partition(".")[0]
    return stem.partition("-")[0] if path.parent.name == "index" else stem  # rows and earlier data sets of an index


def _entry(kind: str, paths: Sequence[Path]) -> Entry:
    sizes, times = [0], [0.0]
    for path in paths:
        inside = ((Path(folder), name) for folder, folders, files in os.walk(path) for name in (*folders, *files))
        for each in itertools.chain([path], (folder / name for folder, name in inside)):  # os.walk skips what is gone
            with contextlib.suppress(OSError):  # another process may delete it
                found = each.lstat()
                times.append(max(found.st_atime if each.is_file() else 0.0, found.st_mtime))
                sizes += [found.st_size] if each.is_file() else []
    return Entry(kind, paths, sum(sizes), len(sizes) - 1, max(times))


def training_of(entry: Entry) -> dict[str, Any]:
    """What an interrupted training is, as its folder says: strategy, protocol, seeds, and the step it goes on from."""
    (folder,) = entry.paths
    said: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # none, of an older version
        said = peek(folder / "run.json").get("command", {})
    steps = [path.name.removeprefix("step") for path in folder.rglob("checkpoints/step*")]
    return {
        "strategy": said.get("strategy"),
        "protocol": said.get("protocol"),
        "seeds": said.get("seeds"),
        "step": max((int(step) for step in steps if step.isdecimal()), default=0),
    }


def waiting_for(entries: Iterable[Entry]) -> set[str]:
    """The recipes of the dense models that interrupted trainings began with, and go on with."""
    found = set()
    for folder in (path for entry in entries if entry.kind == "runs" for path in entry.paths):
        with contextlib.suppress(OSError, ValueError):
            found.add(str(peek(folder / "run.json").get("dense")))
    return found


def peek(path: Path) -> Any:
    """The JSON in a file, which does not count as used by this: OSError or ValueError where there is none."""
    before = path.stat()
    found = strict_json.loads(path.read_text(encoding="utf-8"))
    with contextlib.suppress(OSError):  # another user's file
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return found


def trainings_alive(entries: Iterable[Entry]) -> bool:
    """Whether a training goes on, on this machine or on another one whose locks show here."""
    return any(entry.locked() for entry in entries if entry.kind == "runs")


def why_kept(entry: Entry, alive: bool, now: float, dense: Collection[str] = (), *, alone: bool = False) -> str | None:
    """Why that entry must not be deleted at the time `now`, or None; `alive` is `trainings_alive`.

    `dense` is `waiting_for` of the trainings that stay. alone: its kind was named, and no other.
    """
    if entry.kind in NEVER:
        return "locks are never deleted"
    if entry.kind == "index" and entry.paths[0].is_file() and not alone:  # not that of each shard
        return "runs on these shards need its numbers; `cache prune --kind index` deletes it"
    if entry.kind in READ and alive:
        return "a training goes on, which may read it"
    if entry.kind == "dense" and entry.name in dense:
        return "an interrupted training goes on from it"
    if entry.kind == HALF_WRITTEN and now - entry.used < DAY:
        return "it may still be written"
    return "a process has locked it" if entry.locked() else None


def delete(entry: Entry) -> bool:
    """Delete the entry; False, and nothing is deleted, where a living process has locked it."""
    with contextlib.ExitStack() as held:
        if not all(held.enter_context(locked_now(path)) for path in entry._guarded()):
            return False
        hidden = [path.with_name(f".{_stem(path)}.{uuid.uuid4().hex[:12]}.tmp") for path in entry.paths]
        for path, aside in zip(entry.paths, hidden, strict=True):
            with contextlib.suppress(FileNotFoundError):  # its process has deleted it meanwhile
                os.rename(path, aside)
    for aside in hidden:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
    return True
