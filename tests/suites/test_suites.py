"""Which suites a run takes, and what happens to a suite that cannot run."""

from pathlib import Path

import pytest

from upcycle_bench import record
from upcycle_bench.cli.run import show_record
from upcycle_bench.planning import matrix
from upcycle_bench.planning.plan import Plan, make_plan, run_id
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.run import run
from upcycle_bench.suites.few_shot import FewShot
from upcycle_bench.suites.zero_shot import ZeroShot
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

REGISTRY = load_registry()


def plan(quick: list[str], *suites: str, strategy: str = "dense-frozen") -> Plan:
    return make_plan(REGISTRY, strategy, load_protocol(REGISTRY.protocols["smoke"].target, quick), suites=suites)


def test_optional_suites_run_only_when_asked_and_move_no_other_fingerprint(quick: list[str]) -> None:
    usual, every, one = plan(quick), plan(quick, "all"), plan(quick, "few-shot")
    assert list(usual.suites) == ["zero-shot"] and list(every.suites)[:2] == ["zero-shot", "few-shot"]
    assert list(one.suites) == ["few-shot"]
    assert every.suite_fingerprints["zero-shot"] == usual.suite_fingerprints["zero-shot"]
    assert every.training_fingerprint == usual.training_fingerprint
    with pytest.raises(UserError, match="unknown suite of protocol smoke 'few-shots': did you mean 'few-shot'"):
        plan(quick, "few-shots")
    with pytest.raises(UserError, match="'all' stands alone"):
        plan(quick, "all", "few-shot")


def test_the_first_suite_has_the_headline_scores(quick: list[str], tmp_path: Path) -> None:
    both = record.read(run(plan(quick, "zero-shot", "few-shot", "compositional"), tmp_path, Reporter()))
    assert {score.suite for score in both.scores} == {"zero-shot", "few-shot", "compositional"}
    assert {score.suite for score in both.scores if score.headline} == {"zero-shot"}
    assert list(both.headlines) == ["in-distribution"]
    assert len(both.suite_notes["few-shot"]["digits/5-shot"]["manifests"]) == 3
    notes = both.suite_notes["compositional"]["digits-retrieval"]
    assert (notes["images"], notes["pairs"], len(notes["manifest"])) == (30, 14, 64)
    alone = record.read(run(plan(quick, "few-shot"), tmp_path, Reporter()))
    mine = [score for score in both.scores if score.suite == "few-shot"]
    assert [score.value for score in alone.scores] == [score.value for score in mine]
    parts = [score for score in alone.scores if score.headline]
    assert {(score.headline, score.dataset, score.metric) for score in parts} == {
        ("few-shot", f"digits/{shots}-shot", "acc1") for shots in (1, 5)
    }
    headline = alone.headlines["few-shot"]
    assert headline.value == pytest.approx(sum(score.value for score in parts) / 2)
    assert (headline.higher_is_better, headline.chance) == (True, pytest.approx(0.1))
    assert all(score.interval[0] <= score.value <= score.interval[1] for score in alone.scores)


def test_a_suite_that_fails_is_skipped_and_its_run_is_not_done(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: FewShot, context: object) -> None:
        raise ZeroDivisionError("on a\nbad day")

    monkeypatch.setattr(FewShot, "evaluate", broken)
    lost = 'optional_suites.compositional.sets=["elsewhere"]'
    planned = plan([*quick, lost], "few-shot", "zero-shot", "compositional")
    path = run(planned, tmp_path, Reporter())
    made = record.read(path)
    assert made.status == "ok" and planned.skipped.keys() == {"compositional"}  # the record has both reasons
    assert made.skipped == planned.skipped | {"few-shot": "ZeroDivisionError: on a bad day"}
    assert made.headlines and {score.suite for score in made.scores} == {"zero-shot"}
    assert made.protocol.suite_fingerprints == plan(quick).suite_fingerprints
    show_record(made, path)
    assert "skipped: few-shot: ZeroDivisionError: on a bad day" in capsys.readouterr().out
    # The matrix takes the record for this cell's, but not for a finished one.
    cell, records = matrix.Cell(plan=planned), matrix.read_records(tmp_path)
    assert matrix.describes(made, cell)
    assert matrix.newest_record(cell, run_id(planned, made.hashes.dense), records) is None
    usual = matrix.Cell(plan=plan(quick))
    assert matrix.newest_record(usual, run_id(planned, made.hashes.dense), records) == path
    with pytest.raises(ZeroDivisionError):
        run(plan(quick, "few-shot"), tmp_path / "alone", Reporter())


def test_a_suite_without_its_sets_is_skipped_before_anything_runs(quick: list[str]) -> None:
    lost = 'optional_suites.few-shot.tasks.digits.pool=["elsewhere"]'
    planned = plan([*quick, lost], "all")
    assert "evaluation set not found: elsewhere" in planned.skipped["few-shot"]
    assert "zero-shot" in planned.suites and "few-shot" not in planned.suites
    with pytest.raises(UserError, match="not found: elsewhere"):
        plan([*quick, lost], "few-shot")


def test_suites_say_what_they_read(quick: list[str]) -> None:
    suite = plan(quick).suites["zero-shot"]
    assert isinstance(suite, ZeroShot)
    assert list(suite.sources(plan(quick).world.eval_root)) == suite.datasets()
