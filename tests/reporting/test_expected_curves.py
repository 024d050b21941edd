"""Reference curves: intervals by hand and by simulation, and a run of a broken cluster."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.records import make_record
from tests.reporting.test_targets import curve
from upcycle_bench.record import Record
from upcycle_bench.reporting import expected_curves
from upcycle_bench.reporting.collect import collect
from upcycle_bench.reporting.expected_curves import Outside, StoredCurves, interval, read_curves, stored_of

STEPS = (0, 10, 20)
SCORES = {0: (4.0, 3.0, 2.0), 1: (4.0, 3.1, 2.1), 2: (4.0, 3.2, 2.2)}


def made(scores: tuple[float, ...], seed: int = 0, label: str = "dense", **more: object) -> Record:
    protocol = {"resolved": {"dense": {"source": "shipped"}}, **more.pop("protocol", {})}
    return make_record(label, train=seed, validation=curve(*zip(STEPS, scores, strict=True)), protocol=protocol, **more)


def outside(stored: StoredCurves, record: Record) -> list[Outside] | None:
    assert record.validation is not None
    curve = (record.validation.identity, record.validation.points)
    return expected_curves.outside(stored, record.strategy.label, record.protocol.training_fingerprint, *curve)


def stored(label: str = "dense") -> StoredCurves:
    return stored_of([made(scores, seed, label) for seed, scores in SCORES.items()])


def test_an_interval_worked_by_hand() -> None:
    """Two groups, each of variance 0.01; of 2 degrees of freedom t(0.995) is 9.925."""
    mine, other = [3.0, 3.1, 3.2], [5.0, 5.2, 5.4]
    reach = 9.9248 * 0.1 * math.sqrt(4 / 3)
    assert interval(mine, [mine]) == pytest.approx((3.1 - reach, 3.1 + reach), rel=1e-4)
    assert interval(mine, [mine, other])[1] == pytest.approx(3.1 + reach * math.sqrt(2.5), rel=1e-4)  # 0.01 and 0.04


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_a_sound_run_is_inside_as_often_as_it_says(alike: float) -> None:
    """Whether the strategies' runs of one seed vary alike, as they do with the same batches, or not."""
    rng, seeds, rounds = np.random.default_rng(5), 4, 4000
    inside = 0
    for _ in range(rounds):
        common = rng.normal(size=seeds + 1)
        mine, other = (math.sqrt(alike) * common + math.sqrt(1 - alike) * rng.normal(size=seeds + 1) for _ in range(2))
        low, high = interval(list(mine[:seeds]), [list(mine[:seeds]), list(other[:seeds])])
        inside += low <= mine[-1] <= high
    assert 0.985 < inside / rounds <= (0.998 if alike else 1.0)


def test_a_broken_run_is_told_with_its_step() -> None:
    found = outside(stored(), made((4.0, 3.1, 3.9), seed=7))
    assert found is not None
    (point,) = found
    assert (point.step, point.score, point.seeds) == (20, 3.9, 3)
    assert point.low < 2.0 < 2.2 < point.high < 3.9
    assert outside(stored(), made((4.0, 3.15, 2.05), seed=7)) == []


def test_a_score_that_all_seeds_share_has_room_for_rounding_only() -> None:
    """Before the first step the dense model is the same for all seeds."""
    found = outside(stored(), made((4.02, 3.1, 2.1), seed=7))
    assert found == [Outside(0, 4.02, pytest.approx(3.99), pytest.approx(4.01), 3)]
    assert outside(stored(), made((4.009, 3.1, 2.1), seed=7)) == []


def test_the_run_itself_is_no_reference() -> None:
    assert outside(stored(), made(SCORES[1], seed=1)) is None  # two others are too few
    four = StoredCurves(curves=stored_of([made(s, n) for n, s in {**SCORES, 3: (4.0, 3.05, 2.15)}.items()]).curves)
    assert outside(four, made(SCORES[1], seed=1)) == []


def test_only_runs_that_compare_are_compared() -> None:
    bad = (4.0, 3.1, 3.9)
    assert outside(stored(), made(bad, protocol={"training_fingerprint": "another"})) is None
    assert outside(stored(), made(bad, label="drop-upcycling")) is None
    assert outside(stored("sparse-upcycling"), made(bad)) is None
    other = made(bad).model_copy(update={"validation": made(bad).validation.model_copy(update={"identity": "other"})})
    assert outside(stored(), other) is None


def test_of_equal_seeds_the_newest_is_stored_and_open_runs_are_not() -> None:
    old, new = made((4.0, 3.0, 2.0)), made((4.0, 3.5, 2.5), created="2026-01-03T03:04:05Z")
    opened = made((4.0, 1.0, 1.0), seed=4, protocol={"division": "open", "overrides": ("a=1",)})
    (only,) = stored_of([new, old, opened]).curves
    assert only.scores == {"0/0": (4.0, 3.5, 2.5)}


def test_a_protocol_that_trains_its_own_dense_model_has_none() -> None:
    """It is another model on each machine."""
    assert stored_of([made((4.0, 3.0, 2.0), protocol={"resolved": {"dense": {"source": "pretrain"}}})]).curves == ()


def test_the_package_has_the_curves_of_the_records_here() -> None:
    """`make docs` writes them anew."""
    assert read_curves() == stored_of(collect([Path(__file__).parents[2] / "results" / "lab"]).records)
