"""The files of checkpoints: a folder `stepN` each, which appears whole, with a manifest of the hash of every file.

    with publishing(folder, 200) as part: ...           # write into `part`; then it is renamed to folder/step200
    found = newest(folder)                              # (path, manifest) of the newest whole one; every rank calls it
    read(path, ["model.clip.logit_scale"])              # tensors by global name

Tensors are in the format of torch.distributed.checkpoint. The last two checkpoints are kept.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor

from upcycle_bench.record_schema import Part
from upcycle_bench.training.job import Progress
from upcycle_bench.training.named_state import Entry
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError, one_line
from upcycle_bench.util.files import file_sha256, write_atomically

MANIFEST = "manifest.json"
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # of a folder: CIFS, some FUSE file systems
KEPT = 2


class LossEntry(Part):
    """An `Entry` of the extra loss's state."""

    path: list[str]
    value: JsonValue = None
    is_tensor: bool = False


class Manifest(Part):
    """What a checkpoint is: written last, so that a folder with it is complete. `files`: name -> sha256."""

    format: int = 1
    step: int
    files: dict[str, str]
    steps: dict[str, float]
    loss: dict[str, LossEntry]
    progress: Progress

    def entries(self) -> dict[str, Entry]:
        """The entries of the extra loss's state."""
        return {name: Entry(each.path, each.value, each.is_tensor) for name, each in self.loss.items()}


def temporary(folder: Path, step: int) -> Path:
    """Where the checkpoint of that step is written before it is published."""
    return folder / f".step{step}.tmp"


def publish(folder: Path, manifest: Manifest) -> None:
    """Give the written checkpoint its final name, and delete all but it and the one before."""
    part, final = temporary(folder, manifest.step), folder / f"step{manifest.step}"
    write_atomically(part / MANIFEST, manifest.model_dump_json(indent=1).encode())
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    os.replace(part, final)
    _sync(folder)
    older = [step for step in steps(folder) if step < manifest.step][: KEPT - 1]
    for step in steps(folder):
        if step not in (manifest.step, *older):
            shutil.rmtree(folder / f"step{step}", ignore_errors=True)


def steps(folder: Path) -> list[int]:
    """The steps of the published checkpoints, the newest first; whole or not."""
    names = (path.name.removeprefix("step") for path in folder.glob("step*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose files have their hashes; None where there is none at all. Every rank must call it.

    The ranks share the reading. A damaged checkpoint is named in one line, and deleted if one before it is whole.
    Raises UserError where none is whole, and for a checkpoint of DeepSpeed's, which earlier versions wrote.
    """
    mine = (steps(folder), (folder / "latest").is_file()) if distributed.is_main() else None
    present, old = distributed.from_main(mine)
    if old:
        raise UserError(
            f"{folder}: its checkpoint is of an earlier version, which this one cannot read; --fresh starts anew and "
            "deletes it."
        )
    damaged = []
    for step in present:
        path = folder / f"step{step}"
        if why := _damage(path):
            damaged.append(path)
            _say(f"the checkpoint {path} is damaged ({why})")
            continue
        for each in damaged if distributed.is_main() else ():
            shutil.rmtree(each, ignore_errors=True)
        if damaged:
            _say(f"the training goes on from the checkpoint before, of step {step}")
        return path, _manifest(path)
    if damaged:
        raise UserError(f"{folder}: no checkpoint is whole; --fresh starts anew and deletes them.")
    return None


def metadata(path: Path) -> Any:
    """What torch.distributed.checkpoint knows of a checkpoint's tensors; only of one whose hashes hold."""
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(path).read_metadata()


def read(path: Path, names: Collection[str], known: Any) -> Mapping[str, Tensor]:
    """Tensors of a checkpoint by name, on the CPU; `known` is its `metadata`. No other rank need take part."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    found = known.state_dict_metadata
    wanted = {name: torch.empty(found[name].size, dtype=found[name].properties.dtype) for name in names}
    try:
        if wanted:
            load(wanted, storage_reader=FileSystemReader(path), no_dist=True)
    except CheckpointException as error:  # no Exception, and it hides what happened, an interruption too
        raise next(iter(error.failures.values()))[0] from None
    return wanted


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None; the same on every rank."""
    rank, world, why = distributed.rank(), distributed.world_size(), None
    try:
        files = sorted(_manifest(path).files.items())
        for name, sha256 in files[rank::world]:
            if file_sha256(path / name) != sha256:
                raise OSError(f"{name} is not what was written")
    except (OSError, ValidationError) as error:
        why = one_line(error)
    return next(filter(None, distributed.from_all(why)), None)


def _manifest(path: Path) -> Manifest:
    return Manifest.model_validate_json((path / MANIFEST).read_bytes())


def _sync(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(number)


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, file=sys.stderr)
