"""Records that others sent, as they are read for `validate`: whole, or with what is wrong about their files.

    paths, passed_over = gather([Path("results")])
    for path in paths:
        sent, findings = open_sent(path)            # Sent, or None where the file is no record of today's schema

What a stranger wrote is believed in nothing: a file that does not parse is a finding, and no error.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from upcycle_bench.data.world import World
from upcycle_bench.data.worlds import built_world
from upcycle_bench.protocol import Protocol
from upcycle_bench.record import SCHEMA_VERSION, Record, read, read_outcomes
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError, first_problem, one_line

if TYPE_CHECKING:
    import numpy as np

    from upcycle_bench.planning.registry import Registry

LARGEST = 1 << 32  # bytes of all outcomes of a record, unpacked


class Unchecked(str):
    """What a check could not look at here, and why: it is said, and no fault."""


class Warned(str):
    """What looks strange and may be right: it is said, and no fault."""


@dataclass(frozen=True)
class Finding:
    """What a check says of a record: a fault, what looks strange, or what could not be checked here."""

    path: Path
    check: str
    what: str
    kind: Literal["wrong", "warning", "unchecked"] = "wrong"

    @property
    def wrong(self) -> bool:
        """Whether it is a fault."""
        return self.kind == "wrong"


@dataclass(frozen=True)
class Here:
    """What this installation knows: its plugins, the folder with the evaluation sets of local data, the time."""

    registry: Registry
    eval_data: Path | None = None
    now: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    _worlds: dict[tuple[str, int], World | None] = field(default_factory=dict)

    def world(self, name: str, seed: int) -> World | None:
        """The world of that name, if the cache has it; its files are hashed once."""
        if (name, seed) not in self._worlds:
            self._worlds[name, seed] = built_world(name, seed)
        return self._worlds[name, seed]


@dataclass(frozen=True)
class Sent:
    """A record with its files. `outcomes` is empty, and `lines` None, where there are none, or none that can be read.

    `text` and `metrics` are the bytes of the record and of its lines of metrics.
    """

    path: Path
    record: Record
    text: bytes
    outcomes: dict[str, np.ndarray]
    lines: list[dict[str, Any]] | None
    metrics: bytes | None

    @cached_property
    def protocol(self) -> Protocol | None:
        """The protocol as the run resolved it, or None where the record holds no protocol."""
        try:
            return Protocol.model_validate_json(strict_json.dumps(self.record.protocol.resolved))
        except ValidationError:
            return None

    @property
    def foreign_model(self) -> str | None:
        """Why nothing can be computed of its model here: a name from a stranger fetches and opens nothing."""
        if self.protocol is None:
            return "the record holds no protocol"
        model = self.protocol.model
        return None if re.fullmatch(r"[\w.-]+", model) else f"model {model} is described by files that are not here"

    @property
    def steps(self) -> int:
        """Optimiser steps of the upcycling training."""
        cost = self.record.cost
        return cost.phases["train"].steps if cost and "train" in cost.phases else 0

    def outcomes_of(self, suite: str) -> dict[str, np.ndarray]:
        """The outcomes of a suite, by their names in it."""
        return {
            name.removeprefix(f"{suite}/"): values
            for name, values in self.outcomes.items()
            if name.startswith(f"{suite}/")
        }


def gather(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The files below `paths` that are, or claim to be, records; those passed over, each with the reason.

    UserError for a path that does not exist.
    """
    records: dict[Path, Path] = {}  # by what the path stands for: a file that is named twice is one
    passed_over = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"no records at {path}: there is no such file or folder.")
        for file in [path] if path.is_file() else files_below(path):
            if why := _no_record(file, () if path.is_file() else file.relative_to(path).parts):
                if why != "beside":
                    passed_over[file] = why
            else:
                records.setdefault(file.resolve(), file)
    return list(records.values()), passed_over


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, sorted; links to folders are not followed."""
    for here, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(here) / name for name in sorted(files))


def _no_record(file: Path, parts: Sequence[str]) -> str:
    """Why a file is passed over; "beside" for one that stands beside its record; "" for a record."""
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if file.suffix in (".npz", ".jsonl"):
        return "beside" if file.with_suffix(".json").is_file() else "it stands beside no record"
    if file.suffix != ".json":
        return "no record"
    try:
        tree = strict_json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""  # a record that is broken, for all that is known
    return "" if isinstance(tree, dict) and "schema_version" in tree else "JSON, but no record"


def open_sent(path: Path) -> tuple[Sent | None, list[Finding]]:
    """The record at `path` with its files, and what is wrong with these."""
    try:
        text = path.read_bytes()
        tree = strict_json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        return None, [Finding(path, "strict-json", f"the record is not strict JSON: {one_line(error)}")]
    if tree["schema_version"] != SCHEMA_VERSION:
        what = f"schema version {tree['schema_version']!r}; this upcycle-bench reads {SCHEMA_VERSION}"
        return None, [Finding(path, "schema", what)]
    try:
        record = Record.model_validate_json(text)
    except ValidationError as error:
        where, what = first_problem(error)
        return None, [Finding(path, "schema", f"{where or 'record'}: {what}")]
    findings: list[Finding] = []
    outcomes = _outcomes(path, record, findings)
    metrics, lines = _metrics(path, findings)
    return Sent(path, record, text, outcomes, lines, metrics), findings


def open_whole(path: Path) -> Sent:
    """The record at `path` with its outcomes, if it has some; UserError, one line, for the first thing wrong with it.

    Its metrics may be missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"record {path}: {'a folder' if path.is_dir() else 'there is no such file'}; name one record.")
    record = read(path)
    return Sent(path, record, path.read_bytes(), read_outcomes(path), None, None)


def _outcomes(path: Path, record: Record, findings: list[Finding]) -> dict[str, np.ndarray]:
    """The arrays beside a record; without any where they are not those that the record names."""
    import numpy as np

    beside, digest = path.with_suffix(".npz"), record.hashes.outcomes
    if digest is None:
        if record.status == "ok":
            findings.append(Finding(path, "outcomes-hash", "the record names no outcomes, so nothing proves a score"))
        return {}
    try:
        data = beside.read_bytes()
    except OSError as error:
        what = f"{beside.name}: {error.strerror or error}; copy it from where the run was made"
        findings.append(Finding(path, "outcomes-hash", what))
        return {}
    if hashlib.sha256(data).hexdigest() != digest:
        findings.append(Finding(path, "outcomes-hash", f"{beside.name} has another sha256 than the record says"))
        return {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > LARGEST:
            raise ValueError(f"{size:,} bytes when it is unpacked, at most {LARGEST:,} are read")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # a stranger's file may be wrong in any way: zlib.error, RuntimeError, MemoryError, ...
        findings.append(Finding(path, "outcomes", f"{beside.name} cannot be read: {one_line(error)}"))
        return {}


def _metrics(path: Path, findings: list[Finding]) -> tuple[bytes | None, list[dict[str, Any]] | None]:
    """The bytes and the lines of the metrics beside a record."""
    beside = path.with_suffix(".jsonl")
    if not beside.is_file():
        return None, None
    try:
        data = beside.read_bytes()
    except OSError as error:
        findings.append(Finding(path, "metrics", f"{beside.name}: {error.strerror or error}"))
        return None, None
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):  # each line ends in a line feed
        try:
            tree = strict_json.loads(line)
        except (ValueError, RecursionError) as error:
            tree = one_line(error)
        if not isinstance(tree, dict):
            what = f"{beside.name}, line {number}: {str(tree)[:200]}: no JSON object"
            findings.append(Finding(path, "metrics", what))
            return data, None
        lines.append(tree)
    return data, lines
