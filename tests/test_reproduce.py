"""A record's run, made again: equal to the bit here; else each score is held against the record's interval."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cli.test_main import call
from tests.conftest import QUICK
from tests.reporting.tampering import LAB, Files, at, fresh
from tests.test_run import plan
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.clip import create_clip
from upcycle_bench.planning.plan import Paths, make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.reporting.sent import Here, open_whole
from upcycle_bench.reporting.validate import validate
from upcycle_bench.reproduce import compare_again, differs_here, plan_of
from upcycle_bench.run import run
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

REGISTRY = load_registry()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record with options, overrides and two seeds."""
    planned = plan("drop-upcycling", list(QUICK), options={"ratio": "0.25"}, init_seed=3, train_seed=4)
    path = run(planned, tmp_path_factory.mktemp("results"), Reporter())
    assert path is not None
    return path


def test_the_plan_is_that_of_the_record_and_gives_the_same_bits(made: Path, tmp_path: Path) -> None:
    sent = open_whole(made)
    planned = plan_of(sent, REGISTRY, Paths(), Reporter())
    assert planned.label == sent.record.strategy.label == "drop-upcycling[ratio=0.25]"
    assert (planned.init_seed, planned.train_seed) == (3, 4)
    assert planned.training_fingerprint == sent.record.protocol.training_fingerprint
    assert differs_here(sent.record, planned) == []
    again = run(planned, tmp_path, Reporter(), fresh=True)
    assert again is not None
    found = compare_again(sent, open_whole(again), Here(REGISTRY))
    assert found.equal and found.reproduced and found.same_weights and len(found.scores) > 5


def of(tmp_path: Path, made: Path, shift: float) -> Path:
    """The record with other weights, whose log rank moved by so many standard errors."""
    for suffix in (".json", ".npz"):
        shutil.copy(made.with_suffix(suffix), tmp_path / f"again{suffix}")
    path = tmp_path / "again.json"
    tree = json.loads(path.read_text())
    tree["hashes"]["weights"] = "0" * 64
    for score in tree["scores"]:
        if score["metric"] == "log_rank":
            moved = shift * score["standard_error"]
            score |= {"value": score["value"] + moved, "interval": [end + moved for end in score["interval"]]}
    parts = [score["value"] for score in tree["scores"] if score["headline"]]
    (headline,) = tree["headlines"].values()
    headline["value"] = sum(parts) / len(parts)
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(("shift", "reproduced"), [(0.5, True), (-1.9, True), (3.0, False)])
def test_other_weights_are_judged_by_the_records_intervals(
    made: Path, tmp_path: Path, shift: float, reproduced: bool
) -> None:
    found = compare_again(open_whole(made), open_whole(of(tmp_path, made, shift)), Here(REGISTRY))
    assert not found.equal and not found.same_weights and found.reproduced is reproduced
    assert found.inside.count(False) == (0 if reproduced else 1)


def test_what_differs_here_is_said(tmp_path: Path) -> None:
    sent = fresh(tmp_path)
    at("environment.packages.torch", "1.0.0")(sent)
    at("strategy.code", "f" * 16)(sent)
    at("cost.world_size", 8)(sent)
    whole = open_whole(Files(sent).json)
    said = differs_here(whole.record, plan_of(whole, REGISTRY, Paths(), Reporter()))
    assert any(each.startswith("packages.torch ") and "(record: 1.0.0)" in each for each in said)
    assert "ranks 1 (record: 8)" in said and "code of the strategy" in said


def test_other_data_and_failed_runs_are_refused_before_anything_runs(tmp_path: Path) -> None:
    sent = fresh(tmp_path)
    at("hashes.data", "0" * 64)(sent)
    with pytest.raises(UserError, match="training data here are not its own"):
        plan_of(open_whole(Files(sent).json), REGISTRY, Paths(), Reporter())
    at("status", "failed", LAB)(sent)
    at("reason", "out of memory", LAB)(sent)
    with pytest.raises(UserError, match="nothing to reproduce"):
        plan_of(open_whole(Files(sent, LAB).json), REGISTRY, Paths(), Reporter())


def test_paths_come_from_the_command_unless_they_are_given(tmp_path: Path) -> None:
    sent = fresh(tmp_path)
    at("command", ["upcycle-bench", "run", "--data", "theirs", "--eval-data=sets"])(sent)
    for given, named in ((Paths(), "brings its own data"), (Paths(data="mine"), "brings its own data")):
        with pytest.raises(UserError, match=named):  # smoke takes no paths, so they arrived
            plan_of(open_whole(Files(sent).json), REGISTRY, given, Reporter())


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of a run on local shards with a local checkpoint, and its command."""
    folder, world = tmp_path_factory.mktemp("local"), load_world("digits", 0)
    torch.save(create_clip("smoke-vit", seed=3).model.state_dict(), folder / "dense.pt")
    overrides = ["model=smoke-vit", "train.schedule.steps=2", "train.schedule.batch_size=32"]
    overrides += ['suites.zero-shot.sets=["digits-test", "digits-validation"]']
    overrides += ['suites.zero-shot.headlines.imagenet=["digits-test"]']
    overrides += ['suites.zero-shot.headlines.shift=["digits-validation"]']
    shards, sets = str(world.train_shards[0].parent), world.eval_root
    protocol = load_protocol(REGISTRY.get("protocol", "clip-b32").target, overrides)
    paths = Paths(data=shards, checkpoint=str(folder / "dense.pt"), eval_data=sets)
    path = run(make_plan(REGISTRY, "sparse-upcycling", protocol, paths=paths), folder / "results", Reporter())
    assert path is not None
    tree = json.loads(path.read_text())
    given = ["--data", shards, "--checkpoint", str(folder / "dense.pt"), f"--eval-data={sets}"]
    path.write_text(json.dumps(tree | {"command": ["upcycle-bench", "run", *given]}))
    return path


def test_a_run_on_local_data_is_planned_from_its_command(local: Path, tmp_path: Path) -> None:
    sent = open_whole(local)
    planned = plan_of(sent, REGISTRY, Paths(), Reporter())
    assert planned.training_fingerprint == sent.record.protocol.training_fingerprint
    assert planned.suite_fingerprints == sent.record.protocol.suite_fingerprints
    torch.save(create_clip("smoke-vit", seed=4).model.state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError, match="dense weights are not its own"):
        plan_of(sent, REGISTRY, Paths(checkpoint=str(tmp_path / "other.pt")), Reporter())


def test_a_run_on_local_data_is_validated_by_its_sets(local: Path) -> None:
    found = validate([local], Here(REGISTRY, load_world("digits", 0).eval_root))
    assert found.sound and {finding.check for finding in found.findings} == {"scores", "curve"}
    (said,) = [each for each in validate([local], Here(REGISTRY)).findings if each.check == "suite-fingerprint"]
    assert not said.wrong and "--eval-data" in said.what


def test_the_command_runs_compares_and_keeps_what_it_is_asked_to(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "reproduce", str(made), "--dry-run") == 0
    shown = capsys.readouterr()
    assert "different here: nothing" in shown.err and "drop-upcycling[ratio=0.25]" in shown.out
    assert call(monkeypatch, "reproduce", str(made), "--results", str(tmp_path)) == 0
    shown = capsys.readouterr()
    assert "equal to the bit" in shown.out and len([*tmp_path.rglob("*.json")]) == 1
    other = of(tmp_path, made, 3.0)
    assert call(monkeypatch, "reproduce", str(other), "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["reproduced"] and facts["record"] is None


def test_a_dry_run_builds_no_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "empty"))
    sent = open_whole(Files(fresh(tmp_path), LAB).json)
    with pytest.raises(UserError, match="world lab is not in this cache: upcycle-bench data build lab builds it"):
        plan_of(sent, REGISTRY, Paths(), Reporter(), build=False)
    assert not (tmp_path / "empty" / "worlds").exists()
