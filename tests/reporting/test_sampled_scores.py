"""Outcomes of scores are what the suites say: every suite's headline score gets an error over samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.records import headlines_of
from tests.records import score as scored
from tests.reporting.tampering import BASE, OTHER, RESULTS
from upcycle_bench import record
from upcycle_bench.record import Record
from upcycle_bench.reporting.collect import collect
from upcycle_bench.reporting.leaderboard import build

RANDOM = np.random.default_rng(0)
RIGHT_N = RANDOM.random(120) < 0.4
RIGHT_DN = RANDOM.random((3, 40)) < 0.4  # three draws of shots, as the protocol smoke has them
CASES = [  # suite, its settings or None for those of smoke, dataset, metric, outcomes, numbers of the samples
    ("zero-shot", None, "digits-test", "acc1", {"digits-test/rank": np.where(RIGHT_N, 0.0, 2.5)}, RIGHT_N),
    ("zero-shot", None, "digits-test", "log_rank", {"digits-test/log_rank": RIGHT_N / 2}, RIGHT_N / 2),
    (
        "zero-shot", None, "digits-test", "mean_average_precision",
        {"digits-test/average_precision": RIGHT_N / 3}, RIGHT_N / 3,
    ),
    (
        "zero-shot", None, "digits-retrieval", "image_retrieval_recall@5",
        {"digits-retrieval/image_retrieval_rank": np.where(RIGHT_N, 4.5, 5.0)}, RIGHT_N,
    ),
    ("few-shot", None, "digits/5-shot", "acc1", {"digits/5-shot/correct@1": RIGHT_DN.ravel()}, RIGHT_DN.mean(0)),
    ("linear-probe", None, "digits", "acc1", {"digits/correct@1": RIGHT_N}, RIGHT_N),
    ("fine-tune", None, "digits/5-shot", "acc1", {"digits/5-shot/correct@1": RIGHT_N}, RIGHT_N),
    ("compositional", None, "digits-retrieval", "group_score", {"digits-retrieval/group": RIGHT_N}, RIGHT_N),
    (
        "out-of-domain", {"world": "digits", "sets": ["a"], "templates": ["{c}"]}, "a", "acc1",
        {"a/rank": np.where(RIGHT_N, 0.5, 1.0)}, RIGHT_N,
    ),
]  # fmt: skip


def made(
    start: str, seed: int, suite: str, settings: dict[str, Any] | None, dataset: str, metric: str, value: float
) -> Record:
    """A record of smoke whose only score is the one of that suite."""
    (path,) = (RESULTS / "smoke").glob(f"{start}-*.json")
    tree = record.read(path).model_dump()
    tree["scores"] = [scored(dataset, metric, value, headline="the headline") | {"suite": suite}]
    tree["headlines"] = headlines_of(tree["scores"])
    tree["seeds"] = {"init": seed, "train": seed}
    if settings is not None:
        tree["protocol"]["resolved"]["suites"][suite] = settings
    return Record(**tree)


@pytest.mark.parametrize(("suite", "settings", "dataset", "metric", "outcomes", "numbers"), CASES)
def test_every_headline_score_has_its_samples(
    suite: str, settings: Any, dataset: str, metric: str, outcomes: dict[str, Any], numbers: Any, tmp_path: Path
) -> None:
    arrays = {f"{suite}/{name}": values for name, values in outcomes.items()} | {f"{suite}/other/rank": np.arange(5.0)}
    for start in (BASE, OTHER):
        for seed in range(3):
            run = made(start, seed, suite, settings, dataset, metric, float(numbers.mean()))
            record.write(run, arrays, tmp_path)
    found = collect([tmp_path])
    assert found.outcomes(found.records[0])[f"{suite}/{dataset}/{metric}"] == pytest.approx(numbers)
    (board,) = build(found.records, found.outcomes)
    assert board.over_samples == ("the headline",) and found.without == {}
    for row in board.rows:  # equal seeds: the samples alone make the interval
        expected = 1.96 * numbers.std() / len(numbers) ** 0.5
        assert row.headlines["the headline"].mean.half_width == pytest.approx(expected, rel=0.1)


def test_a_suite_that_is_not_here_is_said_unless_its_outcomes_have_the_usual_names(tmp_path: Path) -> None:
    for seed, name in enumerate(("acc1", "right")):
        run = made(BASE, seed, "their-suite", {}, "a", "acc1", float(RIGHT_N.mean()))
        record.write(run, {f"their-suite/a/{name}": RIGHT_N}, tmp_path)
    found = collect([tmp_path])
    usual, other = found.records
    assert (found.outcomes(usual)["their-suite/a/acc1"] == RIGHT_N).all() and found.without == {}
    assert found.outcomes(other) == {}
    (why,) = found.without.values()
    assert why.startswith("outcomes of suite their-suite cannot be read here: unknown suite") and "\n" not in why


@pytest.mark.parametrize("values", [np.array(0.5), np.array(["a", "b"]), np.zeros(0), np.full(9, np.inf)])
def test_outcomes_that_are_no_numbers_of_samples_are_not_used(values: Any, tmp_path: Path) -> None:
    for seed in range(3):
        run = made(BASE, seed, "linear-probe", None, "digits", "acc1", 0.5)
        record.write(run, {"linear-probe/digits/acc1": values, "linear-probe/digits/correct@1": values}, tmp_path)
    found = collect([tmp_path])
    (board,) = build(found.records, found.outcomes)
    assert board.over_samples == () and board.rows[0].seeds == 3
