"""A world: a folder of training shards and evaluation sets, with a manifest of the hash of every file.

write_manifest(folder, {"name": "digits", "version": 1, "seed": 0, "counts": counts})
world = open_world("digits", folder)         # UserError if a file was changed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle_bench.data.index import Index
from upcycle_bench.protocol import Captions
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import files_sha256

MANIFEST = "manifest.json"
SYNTHETIC = "synthetic"  # for --data: random pairs, made in memory; also their identity


@dataclass(frozen=True)
class World:
    """Training shards and evaluation sets. `sha256` is that of the manifest, and so stands for all content.

    captions: what a .txt of the training shards is. The world `local` is the user's own data: its shards may be
    addresses, `index` has their pairs, and `sha256` is the index's identity. The world `synthetic` is random pairs.
    """

    name: str
    train_shards: tuple[Path | str, ...]
    eval_root: Path
    sha256: str
    captions: Captions = "lines"
    index: Index | None = None

    @property
    def option(self) -> str:
        """The option that gave the training shards, for errors; "" for a world that is built."""
        return "--data" if self.name == "local" else ""


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a folder that is complete: `facts` (name, version, seed, counts), and each file's hash."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = (path.relative_to(folder).as_posix() for path in paths)
    files = dict(zip(names, files_sha256(paths), strict=True))
    text = strict_json.dumps({**facts, "files": files}, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")


def open_world(name: str, folder: Path) -> World:
    """Open a folder with a manifest; UserError if a file is missing or has another hash."""
    manifest = folder / MANIFEST
    again = f"delete {folder} and it will be built again."
    if not manifest.is_file():
        raise UserError(f"world {name}: {manifest} is missing; {again}")
    files: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    paths = [folder / relative for relative in files]
    present = [path for path in paths if path.is_file()]
    found = dict(zip(present, files_sha256(present), strict=True))
    for path, sha256 in zip(paths, files.values(), strict=True):
        if found.get(path) != sha256:
            raise UserError(f"world {name}: {path} is missing or was changed; {again}")
    shards = sorted(folder / relative for relative in files if relative.startswith("train/"))
    return World(name, tuple(shards), folder / "eval", hashlib.sha256(manifest.read_bytes()).hexdigest())
