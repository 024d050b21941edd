"""Records for a pull request: one tar.gz with their files and a manifest. The same records give the same bytes.

manifest = write_bundle(validation, Path("submission.tar.gz"))

It holds `manifest.json` and `results/PROTOCOL/NAME.{json,npz,jsonl}`, as the repository does. The manifest has the
sha256 of each file and what `validate` said.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

from upcycle_bench import __version__
from upcycle_bench.record import SCHEMA_VERSION, slug
from upcycle_bench.reporting.validate import CHECKS, Validation
from upcycle_bench.util import strict_json
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import write_atomically

SUFFIXES = (".json", ".npz", ".jsonl")


def write_bundle(found: Validation, output: Path) -> dict[str, Any]:
    """Write the bundle of records that are sound, and return its manifest.

    UserError where records are wrong, and where two of one protocol have one file name.
    """
    if not found.sound:
        raise UserError("records that are wrong are not bundled; upcycle-bench validate names them.")
    files: dict[str, bytes] = {}
    checked = {}
    for path, sent in found.sent.items():
        name = f"results/{slug(sent.record.protocol.name)}/{path.name}"
        if name in files:
            raise UserError(f"two records would be {name}; give one of the files another name: {path}.")
        for suffix in SUFFIXES:
            if (beside := path.with_suffix(suffix)).is_file():
                files[str(Path(name).with_suffix(suffix))] = beside.read_bytes()
        checked[name] = {each.check: each.what for each in found.of(path)}
    manifest = {
        "upcycle-bench": __version__,
        "schema_version": SCHEMA_VERSION,
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in sorted(files.items())
        },
        "validation": {"sound": True, "checks": list(CHECKS), "unchecked": dict(sorted(checked.items()))},
    }
    files["manifest.json"] = (strict_json.dumps(manifest, indent=1) + "\n").encode()
    write_atomically(output, _packed(files))
    return manifest


def _packed(files: dict[str, bytes]) -> bytes:
    """The files as tar.gz: sorted, without times and owners."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(files.items()):
            member = tarfile.TarInfo(name)  # of the year 1970, and of nobody
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(archive.getvalue(), mtime=0)
