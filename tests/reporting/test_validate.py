"""Records that were tampered with are caught by the check that looks there; ours, and whatever is honest, pass."""

import shutil
from pathlib import Path

import pytest

from tests.records import make_record
from tests.reporting.tampering import BASE, LAB, OTHER, RESULTS, TAMPERED, Files, Tampering, at, fresh, later
from upcycle_bench.data.worlds import load_world
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.record import write
from upcycle_bench.reporting.sent import Here
from upcycle_bench.reporting.validate import CHECKS, Validation, validate
from upcycle_bench.util.errors import UserError

REGISTRY = load_registry()


def checked(*paths: Path) -> Validation:
    return validate(paths, Here(REGISTRY))


def caught(found: Validation) -> dict[str, list[str]]:
    """Check -> what it says is wrong."""
    said: dict[str, list[str]] = {}
    for finding in found.findings:
        if finding.wrong:
            said.setdefault(finding.check, []).append(finding.what)
    return said


@pytest.fixture(autouse=True, scope="module")
def _evaluation_sets() -> None:
    load_world("digits", 0)  # so that the suite's fingerprint can be computed again


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    return fresh(tmp_path)


def test_sound_records_pass(sent: Path) -> None:
    found = checked(sent)
    assert caught(found) == {} and len(found.records) == 3
    digits = [finding for finding in found.findings if not finding.path.name.startswith("lab-")]
    assert {finding.check for finding in digits} == {"scores"}, "only the labels of mean_per_class_recall are missing"


@pytest.mark.parametrize("tampering", TAMPERED, ids=lambda tampering: tampering.what)
def test_a_tampered_record_is_caught(tampering: Tampering, sent: Path) -> None:
    tampering.make(sent)
    found = checked(sent)
    assert tampering.check in caught(found)
    said = [what for each in caught(found).values() for what in each]
    assert not any("\n" in what or "breaks this check" in what for what in said)
    names = {finding.path.name for finding in found.findings if finding.wrong}
    assert all(not name.startswith("lab-") for name in names) or all(name.startswith("lab-") for name in names)


def test_a_model_that_costs_more_is_not_closed(sent: Path) -> None:
    """All else is as `virtual-group` would say it, so that the cost alone is wrong."""
    files, entry = Files(sent, OTHER), REGISTRY.get("strategy", "virtual-group")
    made, info = entry.target(granularity=32), entry.target.info
    protocol = load_protocol(REGISTRY.get("protocol", "smoke").target)
    files.tree["strategy"] |= {
        "name": info.name,
        "label": "virtual-group[granularity=32]",
        "config": made.config(),
        "moe": made.moe_settings(protocol.moe).model_dump(mode="json"),
        "status": info.status,
        "reconstructed": list(info.reconstructed),
        "footing": info.footing,
        "paper": info.paper,
    }
    files.write()
    (said,) = caught(checked(sent))["strategy"]
    assert said.startswith("it belongs in the open division: ") and "active parameters" in said


def test_every_check_catches_something() -> None:
    assert {tampering.check for tampering in TAMPERED} == CHECKS.keys()


def test_the_records_of_the_project_pass() -> None:
    found = checked(Path(__file__).parents[2] / "results" / "smoke")
    assert caught(found) == {} and len(found.records) >= 6


def test_a_rerun_and_a_control_of_another_initialisation_are_no_copies(sent: Path) -> None:
    for file in sent.glob(f"{BASE}-*"):
        shutil.copy(file, sent / f"rerun-{file.name}")
    at("created", later, "rerun")(sent)
    for seed in (0, 1):  # `dense-frozen` has no randomness at all
        for file in (RESULTS / "lab").glob("dense-frozen-*"):
            shutil.copy(file, sent / f"frozen{seed}-{file.name}")
    at("seeds", {"init": 1, "train": 1}, "frozen1")(sent)
    at("created", later, "frozen1")(sent)
    assert caught(checked(sent)).keys() == {"run-id"}  # which is the other seed's


def test_foreign_and_hidden_files_are_passed_over_and_named(sent: Path) -> None:
    (sent / ".hidden").mkdir()
    shutil.copy(Files(sent).json, sent / ".hidden" / "a.json")
    (sent / "package.json").write_text("{}")
    (sent / "notes.md").write_text("mine")
    (sent / "lost.npz").write_bytes(b"")
    found = checked(sent)
    assert {path.name: why for path, why in found.passed_over.items()} == {
        "a.json": "hidden",
        "package.json": "JSON, but no record",
        "notes.md": "no record",
        "lost.npz": "it stands beside no record",
    }
    assert len(found.records) == 3 and found.sound


def test_a_file_that_is_named_twice_is_no_copy(sent: Path) -> None:
    assert len(checked(sent, Files(sent).json, sent).records) == 3


@pytest.mark.parametrize("make", [lambda folder: folder, lambda folder: folder / "none"])
def test_without_records_there_is_one_line(make, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(UserError, match="no records") as raised:
        checked(make(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_strangers_plugins_and_models_are_said_and_not_fetched(sent: Path) -> None:
    at("strategy.distribution", "their-package")(sent)
    at("protocol.resolved.model", "hf-hub:stranger/model", LAB)(sent)
    found = checked(sent)
    said = [finding.what for finding in found.findings if not finding.wrong]
    assert any("cluster-aware is of their-package" in what for what in said)
    assert any("hf-hub:stranger/model is described by files that are not here" in what for what in said)


def test_a_record_that_breaks_a_check_is_wrong(sent: Path) -> None:
    files = Files(sent, OTHER)
    files.lines.write_text(files.lines.read_text().replace('"contrastive": ', '"contrastive": "low", "was": ', 1))
    files.tree["protocol"]["resolved"]["suites"]["zero-shot"]["headlines"] = {"in-distribution": 7}
    files.write()
    said = caught(checked(sent))
    assert "metrics" in said and any("breaks this check" in what for what in said["headlines"])


def test_a_failed_run_needs_no_scores(tmp_path: Path) -> None:
    write(make_record(value=None, status="failed", reason="out of memory", cost=None), None, tmp_path)
    found = checked(tmp_path)
    assert {finding.check for finding in found.findings if finding.wrong} <= {"protocol"}  # of the test's own protocol
