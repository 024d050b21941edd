"""Worlds: small image-text data sets that are built on the spot, each with evaluation sets of its own.

    world = load_world("digits", seed=0)         # built once into the cache, checked at every load
    world.train_shards                           # webdataset tars: KEY.png + KEY.txt with captions, one a line
    world.eval_root                              # evaluation sets, see upcycle_bench.evalsets

A world is a folder: `train/*.tar`, `eval/NAME/...` and `manifest.json` (what it is, counts, sha256 of every file).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle_bench.errors import UserError, unknown
from upcycle_bench.files import files_sha256
from upcycle_bench.progress import Reporter

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class World:
    """Training shards and evaluation sets; `sha256` is the hash of the manifest and so of all content."""

    name: str
    train_shards: tuple[Path, ...]
    eval_root: Path
    sha256: str


def load_world(name: str, seed: int, reporter: Reporter | None = None) -> World:
    """The world of that name, built first if it is not in the cache; `seed` draws its splits."""
    from upcycle_bench.worlds import digits, fashion, lab

    built = {"digits": digits.load, "lab": lab.load, "fashion-mnist": fashion.load}
    if name not in built:
        raise unknown("world", name, built)
    return built[name](seed, reporter or Reporter())


def training_groups(world: World) -> list[str] | None:
    """What every training pair belongs to, in the order of the shards: the lab's groups, the digits' classes.

    None for local data, of which nobody told us.
    """
    from upcycle_bench.worlds import digits, lab

    built = {"digits": digits.groups, "lab": lab.groups}
    return built[world.name](world.eval_root.parent) if world.name in built else None


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Seal a folder just built: `facts` (name, version, seed, counts) and the hash of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = (path.relative_to(folder).as_posix() for path in paths)
    files = dict(zip(names, files_sha256(paths), strict=True))
    text = json.dumps({**facts, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")


def open_world(name: str, folder: Path) -> World:
    """Read a sealed folder; raises UserError if a file is not what the manifest says."""
    manifest = folder / MANIFEST
    again = f"delete {folder} and it will be built again."
    if not manifest.is_file():
        raise UserError(f"world {name}: {manifest} is missing; {again}")
    files: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    paths = [folder / relative for relative in files]
    there = [path for path in paths if path.is_file()]
    found = dict(zip(there, files_sha256(there), strict=True))
    for path, sha256 in zip(paths, files.values(), strict=True):
        if found.get(path) != sha256:
            raise UserError(f"world {name}: {path} is missing or was changed; {again}")
    shards = sorted(folder / relative for relative in files if relative.startswith("train/"))
    return World(name, tuple(shards), folder / "eval", hashlib.sha256(manifest.read_bytes()).hexdigest())
