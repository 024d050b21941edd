"""One bad evaluation set of several never fails a run: it is found before training, skipped and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import QUICK
from upcycle_bench import record
from upcycle_bench.cli import app
from upcycle_bench.data import evalset_check
from upcycle_bench.data.shards import samples_of
from upcycle_bench.data.worlds import load_world
from upcycle_bench.planning import sound_sets
from upcycle_bench.planning.plan import Paths, Plan, make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.reporting.leaderboard import build
from upcycle_bench.suite import Suite
from upcycle_bench.util.errors import UserError

REGISTRY = load_registry()
SETS = ("digits-test", "digits-retrieval", "digits-validation")
LOCAL = [*QUICK, "data.world=local"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The digits' evaluation sets as a user's own."""
    folder = tmp_path / "own"
    for name in SETS:
        shutil.copytree(load_world("digits", 0).eval_root / name, folder / name)
    return folder


def paths(root: Path) -> Paths:
    return Paths(data=str(load_world("digits", 0).train_shards[0].parent), eval_data=root)


def plan(root: Path, *suites: str) -> Plan:
    protocol = load_protocol(REGISTRY.protocols["smoke"].target, LOCAL)
    return make_plan(REGISTRY, "dense-frozen", protocol, paths=paths(root), suites=suites)


def damage(shard: Path, suffix: str, change: Callable[[bytes], bytes]) -> None:
    """Change the last sample's file with that suffix; its length stays the same."""
    member = [*samples_of(shard).values()][-1][suffix]
    data = bytearray(shard.read_bytes())
    place = slice(member.offset_data, member.offset_data + member.size)
    data[place] = change(bytes(data[place]))[: member.size].ljust(member.size, b"\0")
    shard.write_bytes(data)


def cut_image(folder: Path) -> None:
    damage(folder / "test" / "0.tar", "png", lambda data: data[:60])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a cut image": (cut_image, r"its \.png is no image that can be read"),
    "a label that is none": (
        lambda folder: damage(folder / "test" / "0.tar", "cls", lambda data: b"-"),
        r"\.cls is no class index",
    ),
    "labels out of range": (
        lambda folder: (folder / "classnames.txt").write_text("a\nb\n"),
        r"its class index is not one of 0 \.\.\. 1",
    ),
    "a missing label": (
        lambda folder: (folder / "dataset_type.txt").write_text("multilabel"),
        r"no \.npy, which holds a 0 or 1 for each class",
    ),
    "a cut shard": (
        lambda folder: (folder / "test" / "0.tar").write_bytes((folder / "test" / "0.tar").read_bytes()[:5120]),
        "it is cut at byte 5,120",
    ),
    "no shards": (lambda folder: shutil.rmtree(folder / "test"), "it has no test split"),
    "no set": (shutil.rmtree, "evaluation set not found: digits-test; looked for"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_set_is_skipped_and_the_others_are_planned(
    root: Path, change: Callable[[Path], object], message: str
) -> None:
    whole = plan(root)
    change(root / "digits-test")
    planned = plan(root)
    assert [*planned.skipped] == ["zero-shot/digits-test"]
    (why,) = planned.skipped.values()
    assert re.search(message, why) and "\n" not in why
    suite = planned.suites["zero-shot"]
    assert suite.datasets() == ["digits-retrieval"] and suite.config()["headlines"] == {
        "in-distribution": ("digits-retrieval",)
    }
    assert planned.suite_fingerprints["zero-shot"] != whole.suite_fingerprints["zero-shot"]  # no table with the whole
    assert planned.training_fingerprint == whole.training_fingerprint


def test_each_suite_leaves_out_what_it_can(root: Path) -> None:
    whole = plan(root, "all")
    cut_image(root / "digits-retrieval")
    planned = plan(root, "all")
    assert whole.skipped == {}
    assert planned.skipped.keys() == {"zero-shot/digits-retrieval", "diagnostics/digits-retrieval", "compositional"}
    assert planned.suites["diagnostics"].datasets() == ["digits-test"]
    for name in ("few-shot", "linear-probe", "fine-tune"):  # they do not read it
        assert planned.suite_fingerprints[name] == whole.suite_fingerprints[name]
    cut_image(root / "digits-validation")
    planned = plan(root, "all")
    assert {"few-shot", "linear-probe", "fine-tune"} <= planned.skipped.keys()  # their only task reads it
    assert len({planned.skipped[name] for name in ("few-shot", "linear-probe", "fine-tune")}) == 1


def test_without_a_set_for_the_headlines_nothing_runs(root: Path) -> None:
    for name in ("digits-test", "digits-retrieval"):
        cut_image(root / name)
    with pytest.raises(UserError, match=r"evaluation set digits-test: .*evaluation set digits-retrieval: ") as caught:
        plan(root)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=r"not found: digits-test, digits-retrieval; looked for .* no folders"
    ) as caught:
        plan(root / "nowhere")
    assert str(caught.value).count("not found") == 1


def test_the_sets_that_ship_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound_sets, "evalset_check", None)
    assert make_plan(REGISTRY, "dense", load_protocol(REGISTRY.protocols["smoke"].target, QUICK)).skipped == {}


def test_a_set_is_read_once_for_all_suites_and_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, check = [], evalset_check.check
    monkeypatch.setattr(
        evalset_check,
        "check",
        lambda folder, **more: read.append((folder.name, *more["only"])) or check(folder, **more),
    )
    with (root / "digits-test" / "classnames.txt").open("a") as file:
        file.write("\n")  # another digest than in any other test
    for _ in range(2):
        plan(root, "zero-shot", "few-shot")
    assert read.count(("digits-test", "test")) == 1


def test_a_run_and_an_evaluation_score_the_others_and_say_it(root: Path, tmp_path: Path) -> None:
    cut_image(root / "digits-test")
    given = paths(root)
    flags = [part for override in LOCAL for part in ("--set", override)]
    local = ["run", "-s", "dense-frozen", "-p", "smoke", *flags, "--data", given.data, "--eval-data", str(root)]

    def command(*arguments: str) -> tuple[str, str]:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout, result.stderr

    planned = json.loads(command(*local, "--dry-run", "--json")[0])
    matrix = json.loads(command(*local, "--dry-run", "--json", "--seeds", "2")[0])
    key = "zero-shot/digits-test"
    assert planned["skipped"] == matrix["skipped"] and "no image that can be read" in planned["skipped"][key]
    assert "no image that can be read" in " ".join(command(*local, "--dry-run")[0].split())

    out, err = command(*local, "--results", str(tmp_path / "results"))
    assert f"skipped: {key}: evaluation set digits-test: test/0.tar: " in err and f"skipped: {key}: " in out
    (path,) = (tmp_path / "results").rglob("*.json")
    made = record.read(path)
    assert made.status == "ok" and made.skipped == planned["skipped"]
    assert {score.dataset for score in made.scores} == {"digits-retrieval"}
    scored = json.loads(command("evaluate", str(path), "-p", "smoke", "--data", str(root), "--json")[0])
    assert scored["skipped"] == made.skipped
    assert scored["suite_fingerprints"] == made.protocol.suite_fingerprints
    assert [score["value"] for score in scored["scores"]] == [score.value for score in made.scores]

    shutil.copyfile(load_world("digits", 0).eval_root / "digits-test/test/0.tar", root / "digits-test/test/0.tar")
    command(*local, "--results", str(tmp_path / "whole"))
    (whole,) = map(record.read, (tmp_path / "whole").rglob("*.json"))
    assert whole.skipped == {} and len(build([made, whole])) == 2  # two tables: means over other sets do not compare


def test_a_suite_that_needs_all_of_its_sets_is_skipped_with_the_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(REGISTRY.suites["zero-shot"].target, "without", Suite.without)
    cut_image(root / "digits-retrieval")
    planned = plan(root, "zero-shot", "few-shot")
    assert [*planned.skipped] == ["zero-shot"] and [*planned.suites] == ["few-shot"]
    assert "evaluation set digits-retrieval: test/0.tar" in planned.skipped["zero-shot"]
