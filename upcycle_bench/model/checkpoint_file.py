"""What is this file? Told by its content, never by its name, and read without running anything that stands in it.

    held = read(Path("epoch_15.pt"))    # held.kind.name, held.value: whatever was saved; `state_dict` finds the weights

`KINDS` has a row for each kind; the first that fits is what the file is. docs/checkpoints.md shows the table.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle_bench.model.safe_torch import load_data, load_script
from upcycle_bench.util.errors import UserError, one_line
from upcycle_bench.util.files import file_sha256

MAX_HEADER = 100 * 2**20  # of safetensors' JSON header, as in its own reader
MAX_JSON = 64 * 2**20  # of an index; others have a few hundred KiB


@dataclass(frozen=True)
class Head:
    """What tells kinds apart: first bytes, size, the members of a zip archive, the text if it is JSON, a neighbour."""

    start: bytes
    size: int
    members: tuple[str, ...] = ()
    json: Any = None
    distributed: bool = False  # a .distcp, with torch.distributed.checkpoint's `.metadata` beside it


@dataclass(frozen=True)
class Kind:
    """A row of the table. Either `read` gives what the file holds, or `remedy` says what to do instead."""

    name: str
    told_by: str
    fits: Callable[[Head], bool]
    read: Callable[[Path], Held] | None = None
    remedy: str = ""


@dataclass(frozen=True)
class Held:
    """What a file holds, with its place; `quick_gelu`: the activation, where the file says it."""

    path: Path
    value: Any
    quick_gelu: bool | None = None


def read(path: Path) -> Held:
    """What the file holds, on the CPU. UserError for what is no checkpoint, is damaged, or would run code."""
    reader = require_readable(path)
    try:
        return reader(path)
    except UserError:
        raise
    except Exception as error:  # each reader has its own errors for a damaged file
        raise UserError(
            f"{path} cannot be read as {identify(path).name} ({one_line(error, 200)}); it may be cut off or "
            "damaged: copy it again, or save the weights anew with torch.save(model.state_dict(), FILE)."
        ) from None


def identify(path: Path) -> Kind:
    """The file's kind. UserError where there is no file."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the file of weights in it.")
        if path.exists() and not path.is_file():  # to read from a pipe would wait for ever
            raise UserError(f"{path} is no ordinary file: give a file of weights.")
        head = _head(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a file of weights.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    return next(kind for kind in KINDS if kind.fits(head))


def require_readable(path: Path) -> Callable[[Path], Held]:
    """The reader of the file's kind. UserError, with the remedy, for a kind that is no checkpoint."""
    kind = identify(path)
    if kind.read is None:
        raise UserError(f"{path} is {kind.name}: {kind.remedy}.")
    return kind.read


def is_index(path: Path) -> bool:
    """Whether the file is an index, which names the parts of a checkpoint."""
    return path.is_file() and identify(path) is INDEX


def content_sha256(path: Path) -> str:
    """The sha256 of the file; of an index, which names its parts only, that of its bytes and those of the parts."""
    digests = [_sha256(each, each.stat().st_mtime_ns) for each in [path, *(_parts(path) if is_index(path) else [])]]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


@functools.cache
def _sha256(path: Path, changed: int) -> str:  # a plan asks several times for the hash of a large file
    return file_sha256(path)


def _head(path: Path) -> Head:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(1024)
        members: tuple[str, ...] = ()
        if start.startswith(b"PK\x03\x04"):
            with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:  # damaged ones fail in many ways
                members = tuple(archive.namelist())
        text = None
        if start.lstrip()[:1] == b"{" and size <= MAX_JSON:
            file.seek(0)
            try:
                text = json.loads(file.read())
            except (ValueError, RecursionError):
                text = None
    return Head(start, size, members, text, path.suffix == ".distcp" and (path.parent / ".metadata").is_file())


def _is_safetensors(head: Head) -> bool:
    return head.start[8:9] == b"{" and 2 <= int.from_bytes(head.start[:8], "little") <= MAX_HEADER


def _is_index(head: Head) -> bool:
    return isinstance(head.json, dict) and isinstance(head.json.get("weight_map"), dict)


def _is_packed(head: Head) -> bool:
    return head.start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")) or (
        head.start[257:262] == b"ustar"
    )


def _read_safetensors(path: Path) -> Held:
    from safetensors.torch import load_file

    return Held(path, load_file(path))


def _read_torch(path: Path) -> Held:
    return Held(path, load_data(path))


def _read_torchscript(path: Path) -> Held:
    return Held(path, *load_script(path))


def _read_parts(path: Path) -> Held:
    """All parts of a sharded checkpoint together, each of whatever kind it is."""
    wanted = json.loads(path.read_bytes())["weight_map"]
    found: dict[str, Any] = {}
    for part in _parts(path):
        value = read(part).value
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: its part {part.name} holds no weights by name; copy the parts again.")
        found |= value
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{path}: {missing[0]} stands in none of its parts; copy index and parts again.")
    return Held(path, found)


def _parts(path: Path) -> list[Path]:
    """The files that an index names, which stand beside it. UserError for one that is not there."""
    names = sorted(_names(path))
    for name in names:
        if not (path.parent / name).is_file():
            raise UserError(f"{path}: its part {name} is not beside it; copy all {len(names)} parts there.")
        if is_index(path.parent / name):
            raise UserError(f"{path}: its part {name} is an index itself; give an index of weights.")
    return [path.parent / name for name in names]


def index_of(part: Path) -> Path | None:
    """The index beside the file that names it as one of several parts."""
    for index in sorted(part.parent.glob("*.index.json")):
        if is_index(index) and len(_names(index) - {part.name}) and part.name in _names(index):
            return index
    return None


def parts_of(index: Path) -> list[str]:
    """The names of the files that an index names."""
    return sorted(_names(index))


def _names(index: Path) -> set[str]:
    """The parts that an index names."""
    return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}


INDEX = Kind(
    "the index of a sharded checkpoint",
    "JSON with a `weight_map`, as `model.safetensors.index.json`; its parts stand beside it",
    _is_index,
    _read_parts,
)
KINDS = (
    Kind(
        "an empty file",
        "no bytes",
        lambda head: head.size == 0,
        remedy="copy or download it again",
    ),
    Kind(
        "a Git LFS pointer",
        "`version https://git-lfs...`",
        lambda head: head.start.startswith(b"version https://git-lfs"),
        remedy="the weights were not fetched; run `git lfs pull` in its folder, or download the file itself",
    ),
    Kind(
        "a part of a distributed checkpoint",
        "`.distcp`, with `.metadata` beside it: torch.distributed.checkpoint's",
        lambda head: head.distributed,
        remedy="make a file of it: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`",
    ),
    Kind(
        "a safetensors file",
        "a JSON header behind its length",
        _is_safetensors,
        _read_safetensors,
    ),
    Kind(
        "a TorchScript archive",
        "a zip archive with `code/`, as OpenAI's `ViT-B-32.pt`",
        lambda head: any("/code/" in name for name in head.members),
        _read_torchscript,
    ),
    Kind(
        "a PyTorch file",
        "a zip archive with `data.pkl`",
        lambda head: any(name.endswith("/data.pkl") for name in head.members),
        _read_torch,
    ),
    Kind(
        "a NumPy archive",
        "a zip archive with `.npy`, as big_vision's",
        lambda head: any(name.endswith(".npy") for name in head.members),
        remedy="save its weights as an open_clip state dict: torch.save(model.state_dict(), FILE)",
    ),
    Kind(
        "a zip archive without weights",
        "any other zip archive",
        lambda head: bool(head.members),
        remedy="unpack it and give the file of weights",
    ),
    Kind(
        "a zip archive that is cut off",
        "the beginning of a zip archive without an end that can be read",
        lambda head: head.start.startswith(b"PK\x03\x04"),
        remedy="it was not written or copied to its end; copy it again, or take the checkpoint before it",
    ),
    Kind(
        "a pickle",
        "a pickle's first byte, as before PyTorch 1.6",
        lambda head: head.start[:1] == b"\x80" and head.start[1:2] in (b"\2", b"\3", b"\4", b"\5"),
        _read_torch,
    ),
    INDEX,
    Kind(
        "a JSON file",
        "any other JSON",
        lambda head: head.json is not None,
        remedy="give the file of weights that belongs to it",
    ),
    Kind(
        "a packed file",
        "gzip, bzip2, xz, zstd or tar",
        _is_packed,
        remedy="unpack it and give the file of weights",
    ),
    Kind(
        "a web page",
        "HTML or XML",
        lambda head: head.start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")),
        remedy="the download gave a page in place of the file; download it again",
    ),
    Kind(
        "no checkpoint that is known here",
        "anything else",
        lambda head: True,
        remedy="give an open_clip state dict, a PyTorch or a safetensors file",
    ),
)
