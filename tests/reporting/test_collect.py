"""Records from several places: copies count once, and whatever is passed over is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.records import make_record
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.record import write
from upcycle_bench.reporting.collect import collect
from upcycle_bench.util.errors import UserError


def test_folders_merge_and_copies_count_once(tmp_path: Path) -> None:
    protocol = {"resolved": load_protocol(load_registry().protocols["smoke"].target).model_dump(mode="json")}
    arrays = {"zero-shot/digits-test/log_likelihood": np.arange(3.0)}
    a = write(make_record("dense", protocol=protocol), arrays, tmp_path / "a")
    b = write(make_record("new", init=1, train=1), None, tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "again")
    found = collect([tmp_path / "a", tmp_path / "b", a, tmp_path / "a"])
    assert found.paths == [a, b] and [made.strategy.label for made in found.records] == ["dense", "new"]
    assert list(found.passed_over.values()) == [f"it is a copy of {a}"]
    assert found.outcomes(found.records[0])["zero-shot/digits-test/log_likelihood"].tolist() == [0.0, 1.0, 2.0]
    assert found.outcomes(found.records[1]) == {} == found.without
    a.with_suffix(".npz").unlink()
    assert found.outcomes(found.records[0]) == {} and "copy it from where the run was made" in found.without[a]


def test_foreign_and_hidden_files_are_named(tmp_path: Path) -> None:
    good = write(make_record(), None, tmp_path)
    (tmp_path / ".hidden").mkdir()
    hidden = shutil.copy(good, tmp_path / ".hidden" / "r.json")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "cut.json").write_text(good.read_text()[:100])
    (tmp_path / "nan.json").write_text(good.read_text().replace("0.5", "NaN"))
    older = json.loads(good.read_text()) | {"schema_version": 1}
    (tmp_path / "older.json").write_text(json.dumps(older))
    found = collect([tmp_path])
    assert found.paths == [good]
    why = {path.name: reason for path, reason in found.passed_over.items()}
    assert why.keys() == {"r.json", "package.json", "cut.json", "nan.json", "older.json"} and Path(hidden).is_file()
    assert why["r.json"] == "it is hidden" and "schema version 1" in why["older.json"]
    assert "no schema_version" in why["package.json"] and "strict JSON" in why["cut.json"] + why["nan.json"]


def test_what_was_named_must_be_a_record(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(UserError, match=r"package\.json is not an upcycle-bench record"):
        collect([tmp_path / "package.json"])
    with pytest.raises(UserError, match=r"no records below .*: package\.json is passed over \(.* no schema_version"):
        collect([tmp_path])
    with pytest.raises(UserError, match="no such file or folder"):
        collect([tmp_path / "nowhere"])


def test_only_one_protocol(tmp_path: Path) -> None:
    write(make_record(), None, tmp_path)
    lab = write(make_record(protocol={"name": "lab"}), None, tmp_path)
    assert collect([tmp_path]).only("lab").paths == [lab] and len(collect([tmp_path]).only(None).paths) == 2
    with pytest.raises(UserError, match="unknown protocol of these records 'labb': did you mean 'lab'"):
        collect([tmp_path]).only("labb")
