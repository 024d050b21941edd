"""The record of one run: a strict JSON file (`record_schema`). The outcomes of each sample stand in a .npz beside it.

    path = write(record, outcomes, Path("results/records"))     # .../smoke/dense-i0-t0-20260101T000000-1f2e3d4c.json
    records = [read(path) for path in record_paths(Path("results/records"))]
    outcomes = read_outcomes(path)                              # "digits-test/log_likelihood" -> float32 [samples]

A record is written whole or not at all. A bad file raises UserError.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

# `X as X`: this module is the contract, so what the schema defines is imported from here.
from upcycle_bench.record_evaluation import (
    CertificatePart as CertificatePart,
)
from upcycle_bench.record_evaluation import (
    ControlPart as ControlPart,
)
from upcycle_bench.record_evaluation import (
    Headline as Headline,
)
from upcycle_bench.record_evaluation import (
    RepeatPart as RepeatPart,
)
from upcycle_bench.record_evaluation import (
    ScoreRecord as ScoreRecord,
)
from upcycle_bench.record_schema import (
    SCHEMA_VERSION as SCHEMA_VERSION,
)
from upcycle_bench.record_schema import (
    Cost as Cost,
)
from upcycle_bench.record_schema import (
    Hashes as Hashes,
)
from upcycle_bench.record_schema import (
    Name as Name,
)
from upcycle_bench.record_schema import (
    Part as Part,
)
from upcycle_bench.record_schema import (
    PhaseCost as PhaseCost,
)
from upcycle_bench.record_schema import (
    PhaseName as PhaseName,
)
from upcycle_bench.record_schema import (
    ProtocolPart as ProtocolPart,
)
from upcycle_bench.record_schema import (
    Record as Record,
)
from upcycle_bench.record_schema import (
    Seeds as Seeds,
)
from upcycle_bench.record_schema import (
    SessionPart as SessionPart,
)
from upcycle_bench.record_schema import (
    StrategyPart as StrategyPart,
)
from upcycle_bench.record_schema import (
    Timestamp as Timestamp,
)
from upcycle_bench.record_schema import (
    ValidationPart as ValidationPart,
)
from upcycle_bench.record_schema import (
    json_schema as json_schema,
)
from upcycle_bench.record_tuned import (
    TUNED as TUNED,
)
from upcycle_bench.record_tuned import (
    Candidate as Candidate,
)
from upcycle_bench.record_tuned import (
    TunedPart as TunedPart,
)
from upcycle_bench.record_tuned import (
    TuningRun as TuningRun,
)
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError, first_problem
from upcycle_bench.util.files import write_atomically

if TYPE_CHECKING:
    import numpy as np


def write(record: Record, outcomes: dict[str, np.ndarray] | None, folder: Path) -> Path:
    """Write `record` below `folder`, and `outcomes` to a .npz of the same name, whose hash the record then holds.

    Both files appear whole or not at all, the record last. Raises UserError for a record that exists, which is never
    overwritten, and for a folder that cannot be written.
    """
    seeds, time = record.seeds, record.created_at.strftime("%Y%m%dT%H%M%S")
    name = f"{slug(record.strategy.label)}-i{seeds.init}-t{seeds.train}-{time}-{record.run_id[:8]}.json"
    path = folder / slug(record.protocol.name) / name
    arrays = None if outcomes is None else _npz(outcomes)
    digest = None if arrays is None else hashlib.sha256(arrays).hexdigest()
    record = record.model_copy(update={"hashes": record.hashes.model_copy(update={"outcomes": digest})})
    text = record.model_dump_json(indent=2) + "\n"
    try:
        if path.exists():
            raise UserError(f"record {path} exists and is never overwritten; give the run another id.")
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_pair(path, text.encode(), arrays)
    except OSError as error:
        raise UserError(f"cannot write record {path}: {error.strerror or error}; choose another folder.") from None
    return path


def read(path: Path) -> Record:
    """Parse one record. Raises UserError, which names the file and the field, in one line."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = strict_json.loads(text)  # NaN, Infinity and 1e999 are not JSON, though Python reads them
    except OSError as error:
        raise UserError(f"record {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"record {path} is not strict JSON ({error}); restore it, move it away or name another."
        ) from None
    if not isinstance(tree, dict) or "schema_version" not in tree:
        raise UserError(f"{path} is not an upcycle-bench record (it has no schema_version); move it away.")
    if tree["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"record {path} has schema version {tree['schema_version']!r}, this upcycle-bench reads {SCHEMA_VERSION}; "
            "use the version that wrote it (pip install --upgrade upcycle-bench, if that is newer)."
        )
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        where, what = first_problem(error)
        raise UserError(f"record {path}: {where or 'record'}: {what}; restore the file or move it away.") from None


def read_outcomes(path: Path, digest: str | None = "") -> dict[str, np.ndarray]:
    """Outcomes of each sample for the record at `path`; empty if it has none. UserError where the hash differs.

    digest: their sha256 as the record has it, where that has been read.
    """
    import numpy as np

    digest = read(path).hashes.outcomes if digest == "" else digest
    if digest is None:
        return {}
    beside = path.with_suffix(".npz")
    try:
        data = beside.read_bytes()
    except OSError as error:
        raise UserError(f"outcomes {beside}: {error.strerror or error}; copy it from where the run was made.") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"outcomes {beside} are not those of its record (sha256 differs); restore the file.")
    with np.load(io.BytesIO(data)) as arrays:
        return dict(arrays)


def record_paths(path: Path) -> list[Path]:
    """The paths of all records below `path`, sorted, or `path` itself where it is a file.

    Raises UserError for a path that does not exist, and for a *.json that is not a record.
    """
    if not path.exists():
        raise UserError(f"no records at {path}: there is no such file or folder.")
    paths = [path] if path.is_file() else sorted(path.rglob("*.json"))
    for each in paths:
        read(each)
    return paths


def slug(text: str) -> str:
    """A part of a file name: letters that need no quoting, no leading dot, short enough for any file system."""
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", text).strip("-.")[:100] or "unnamed"


def _npz(outcomes: dict[str, np.ndarray]) -> bytes:
    """The arrays as .npz, sorted by name: equal arrays give equal bytes (np.savez keeps the order, reserves names)."""
    import numpy as np

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(outcomes):
            info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, as the zip format begins
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(outcomes[name]), allow_pickle=False)
    return buffer.getvalue()


def _write_pair(path: Path, text: bytes, arrays: bytes | None) -> None:
    """The outcomes are written first, so that no record lacks them; without a record they are removed again."""
    beside = path.with_suffix(".npz")
    try:
        if arrays is not None:
            write_atomically(beside, arrays)
        write_atomically(path, text)
    except BaseException:
        if not path.exists():
            beside.unlink(missing_ok=True)
        raise
