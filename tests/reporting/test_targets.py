"""Steps and FLOPs to another's final score: cases worked by hand."""

from typing import Any

import pytest

from tests.records import make_record
from upcycle_bench.record import Record
from upcycle_bench.reporting.targets import Target, first_at, monotone, target_of


def curve(*points: tuple[int, float], identity: str = "pairs") -> dict[str, Any]:
    return {"set": "val", "pairs": 64, "identity": identity, "chance": 3.0, "points": points}


def run(
    *points: tuple[int, float], seed: int = 0, flops: tuple[int | None, ...] = (100, 1000, 50), **more: Any
) -> Record:
    """A run of 100 steps with charged FLOPs before, in and beside its training."""
    named = zip(("upcycle", "train", "validate", "evaluate"), (*flops, 10**9), strict=True)
    phases = {name: {"seconds": 1.0, "flops": each, "peak_memory_bytes": 1} for name, each in named}
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


def test_steps_and_flops_to_the_score_of_the_reference_with_the_same_seeds() -> None:
    runs = {(0, 0): run((0, 4.0), (50, 2.0), (100, 1.0)), (0, 1): run((0, 4.0), (50, 3.0), (100, 1.0), seed=1)}
    others = {
        (0, 0): run((0, 4.0), (100, 2.0), flops=(0, 800, 0)),
        (0, 1): run((0, 4.0), (100, 2.0), flops=(0, 800, 0), seed=1),
    }
    # Seed 0 is there at step 50, seed 1 at 75; before it 100 FLOPs, then 1,050 a training of 100 steps.
    flops = (100 + 0.5 * 1050 + 100 + 0.75 * 1050) / 2
    assert target_of(runs, others) == Target(62.5, flops, flops / 800, 2, 2)
    assert runs[0, 0].charged_flops == 1150


def test_a_run_that_does_not_get_there_leaves_no_mean() -> None:
    runs = {(0, 0): run((0, 4.0), (100, 1.0)), (0, 1): run((0, 4.0), (100, 3.0), seed=1)}
    others = {seeds: run((0, 4.0), (100, 2.0), seed=seeds[1]) for seeds in runs}
    assert target_of(runs, others) == Target(None, None, None, 1, 2)


def test_only_curves_of_the_same_pairs_and_seeds_compare() -> None:
    goal = run((0, 4.0), (100, 2.0))
    assert target_of({(0, 0): run((0, 4.0), (100, 1.0), identity="others")}, {(0, 0): goal}) is None
    assert target_of({(0, 1): run((0, 4.0), (100, 1.0), seed=1)}, {(0, 0): goal}) is None
    assert target_of({(0, 0): run()}, {(0, 0): goal}) is None


def test_flops_that_nobody_counted_are_none_and_steps_stay() -> None:
    runs = {(0, 0): run((0, 4.0), (100, 0.0), flops=(None, 1000, 50))}
    others = {(0, 0): run((0, 4.0), (100, 2.0))}
    assert target_of(runs, others) == Target(50.0, None, None, 1, 1)
    assert runs[0, 0].charged_flops is None
