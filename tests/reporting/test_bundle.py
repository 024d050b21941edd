"""A bundle: equal bytes for equal records, files as the repository has them, and nothing that is wrong."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.reporting.tampering import BASE, Files, at, fresh, later
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.reporting.bundle import write_bundle
from upcycle_bench.reporting.sent import Here
from upcycle_bench.reporting.validate import Validation, validate
from upcycle_bench.util.errors import UserError

REGISTRY = load_registry()


def checked(folder: Path) -> Validation:
    return validate([folder], Here(REGISTRY))


def test_equal_records_give_equal_bytes_wherever_they_lie(tmp_path: Path) -> None:
    bundles = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.md").write_text("mine alone")
        output = tmp_path / f"{name}.tar.gz"
        write_bundle(checked(fresh(tmp_path / name)), output)
        bundles.append(output.read_bytes())
    assert bundles[0] == bundles[1] and str(tmp_path).encode() not in bundles[0]


def test_the_bundle_unpacks_into_the_repository(tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    sent = fresh(tmp_path / "sent")
    manifest = write_bundle(checked(sent), tmp_path / "bundle.tar.gz")
    with tarfile.open(tmp_path / "bundle.tar.gz") as tar:
        assert tar.getnames() == sorted(tar.getnames()) and {each.mtime for each in tar.getmembers()} == {0}
        tar.extractall(tmp_path / "clone", filter="data")
    assert json.loads((tmp_path / "clone" / "manifest.json").read_text()) == manifest
    assert len(manifest["files"]) == 9
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "clone" / name).read_bytes()).hexdigest() == facts["sha256"]
    assert (tmp_path / "clone" / "results" / "smoke" / Files(sent).json.name).is_file()
    assert checked(tmp_path / "clone" / "results").sound


def test_records_that_are_wrong_are_not_bundled(tmp_path: Path) -> None:
    sent = fresh(tmp_path)
    at("seeds", {"init": 7, "train": 7})(sent)
    with pytest.raises(UserError, match="upcycle-bench validate"):
        write_bundle(checked(sent), tmp_path / "bundle.tar.gz")
    assert not (tmp_path / "bundle.tar.gz").exists()


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    sent = fresh(tmp_path)
    (sent / "again").mkdir()
    for file in sent.glob(f"{BASE}-*"):
        shutil.copy(file, sent / "again" / file.name)
    at("created", later)(sent / "again")
    with pytest.raises(UserError, match="another name"):
        write_bundle(checked(sent), tmp_path / "bundle.tar.gz")
