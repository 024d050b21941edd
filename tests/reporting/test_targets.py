"""Steps and FLOPs to another's final score: cases worked by hand."""

from typing import Any

import pytest

from tests.records import make_record
from upcycle_bench.record import Record
from upcycle_bench.reporting.targets import Target, first_at, monotone, target_of


def curve(*points: tuple[int, float], identity: str = "pairs") -> dict[str, Any]:
    return {"set": "val", "pairs": 64, "every": 1, "identity": identity, "chance": 3.0, "points": points}


def run(
    *points: tuple[int, float], seed: int = 0, flops: tuple[int | None, ...] = (100, 1000, 50), **more: Any
) -> Record:
    """A run of 100 steps with charged FLOPs before, in and beside its training."""
    named = zip(("upcycle", "train", "validate", "evaluate"), (*flops, 10**9), strict=True)
    phases = {name: {"seconds": 1.0, "flops": each, "peak_memory_bytes": 1} for name, each in named}
    phases["train"]["steps"] = 100
    return make_record(train=seed, validation=curve(*points, **more) if points else None, cost={"phases": phases})


@pytest.mark.parametrize(
    ("goal", "step"),
    [(5.0, 0.0), (4.0, 0.0), (3.0, 25.0), (2.0, 50.0), (1.5, 62.5), (1.0, 75.0), (0.9, None)],
)
def test_a_goal_is_reached_where_the_line_from_point_to_point_meets_it(goal: float, step: float | None) -> None:
    """The first time counts."""
    points = [(0, 4.0), (50, 2.0), (75, 1.0), (100, 2.5)]
    assert first_at(points, goal) == step


def test_a_lucky_score_does_not_count() -> None:
    """Of 2 and 3 the nearest curve that never rises has the mean, twice."""
    assert monotone([(0, 4.0), (10, 2.0), (20, 3.0), (30, 1.0)]) == [(0, 4.0), (10, 2.5), (20, 2.5), (30, 1.0)]
    lucky, goal = run((0, 4.0), (10, 2.0), (20, 3.0), (100, 1.0)), run((0, 4.0), (100, 2.2))
    target = target_of({(0, 0): lucky}, {(0, 0): goal})
    assert target is not None
    assert target.steps == pytest.approx(20 + 80 * 0.3 / 1.5)


def test_the_reference_itself_needs_what_it_needs() -> None:
    """Its curve is flat from step 50 on: there it is where it ends, so that is its way, and the ratio is 1."""
    runs = {(0, n): run((0, 4.0), (50, 2.0 + n), (75, 1.9 + n), (100, 2.1 + n), seed=n) for n in (0, 1)}
    target = target_of(runs, runs)
    assert target is not None
    assert (target.steps, target.ratio, target.runs) == (50, 1.0, 2)
    assert target.flops == 100 + 0.5 * 1050


def test_steps_and_flops_by_the_means_of_the_common_seeds() -> None:
    runs = {(0, 0): run((0, 4.0), (50, 2.0), (100, 1.0)), (0, 1): run((0, 4.0), (50, 3.0), (100, 1.0), seed=1)}
    others = {(0, seed): run((0, 4.0), (100, 2.0), flops=(0, 800, 0), seed=seed) for seed in (0, 1)}
    runs[0, 2] = run((0, 4.0), (50, 0.0), (100, 0.0), seed=2)  # which the reference lacks
    # The mean is 2.5 at step 50 and 1 at 100, so 2 at 66.7; before it 100 FLOPs, then 1,050 a training of 100 steps.
    step = 50 + 50 / 3
    flops = 100 + step / 100 * 1050
    assert target_of(runs, others) == Target(pytest.approx(step), pytest.approx(flops), pytest.approx(flops / 800), 2)


def test_a_strategy_that_does_not_get_there_has_no_way() -> None:
    runs, others = {(0, 0): run((0, 4.0), (100, 3.0))}, {(0, 0): run((0, 4.0), (100, 2.0))}
    assert target_of(runs, others) == Target(None, None, None, 1)


def test_only_curves_of_the_same_pairs_and_seeds_compare() -> None:
    goal = run((0, 4.0), (100, 2.0))
    assert target_of({(0, 0): run((0, 4.0), (100, 1.0), identity="others")}, {(0, 0): goal}) is None
    assert target_of({(0, 1): run((0, 4.0), (100, 1.0), seed=1)}, {(0, 0): goal}) is None
    assert target_of({(0, 0): run()}, {(0, 0): goal}) is None
    assert target_of({(0, 0): run((0, 4.0), (60, 1.0))}, {(0, 0): goal}) is None  # of a training that went on


def test_flops_that_nobody_counted_are_none_and_steps_stay() -> None:
    runs = {(0, 0): run((0, 4.0), (100, 0.0), flops=(None, 1000, 50))}
    others = {(0, 0): run((0, 4.0), (100, 2.0))}
    assert target_of(runs, others) == Target(50.0, None, None, 1)
    assert runs[0, 0].charged_flops is None
