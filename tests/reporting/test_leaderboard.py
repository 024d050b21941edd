"""Leaderboards: rows and intervals worked by hand."""

import csv
import io
import json
from typing import Any

import pytest

from tests.records import headlines_of, make_record, score
from upcycle_bench.record import Record
from upcycle_bench.reporting.board import Board, BoardHeadline, Row, RowHeadline, SeedMean
from upcycle_bench.reporting.formats import render
from upcycle_bench.reporting.leaderboard import build

# Student's t, 97.5 % quantile: 1 degree of freedom 12.706205, 2: 4.302653 (any printed table)
T1, T2 = 12.706205, 4.302653


def runs(label: str, values: dict[int, float], **changes: Any) -> list[Record]:
    """A run for each training seed, with the same number as seed of the initialisation."""
    return [make_record(label, init=seed, train=seed, value=value, **changes) for seed, value in values.items()]


def failure(label: str, train: int = 0, reason: str = "RuntimeError: out of memory", **changes: Any) -> Record:
    parts: dict[str, Any] = {"status": "failed", "reason": reason, "receipt": None, "scores": [], "cost": None}
    return make_record(label, train=train, value=None, **(parts | changes))


def only(boards: list[Board]) -> dict[str, Row]:
    (board,) = boards
    return {row.label: row for row in board.rows}


def main(row: Row) -> RowHeadline:
    """The only headline score of these tests' usual records."""
    (headline,) = row.headlines.values()
    return headline


def two_headlines(label: str, near: dict[int, float], far: dict[int, float], **changes: Any) -> list[Record]:
    """A run for each training seed, whose headlines are two mean log ranks: lower is better."""
    made = []
    for seed, value in near.items():
        scores = [score("a", "log_rank", value, headline="in-distribution", lower=True)]
        scores.append(score("b", "log_rank", far[seed], headline="shift", lower=True))
        made.append(make_record(label, init=seed, train=seed, scores=scores, **changes))
    return made


def close(found: SeedMean | None, mean: float, half_width: float, n: int) -> None:
    assert found is not None and found.half_width is not None
    assert (found.mean, found.half_width) == pytest.approx((mean, half_width), rel=1e-6)
    assert found.n == n


# ---- numbers ---------------------------------------------------------------------------------------------------


def test_intervals_and_paired_differences_by_hand() -> None:
    rows = only(
        build(
            runs("sparse-upcycling", {0: 2.0, 1: 4.0, 2: 3.0})
            + runs("cluster-aware", {0: 3.0, 1: 5.0, 2: 5.0})
            + runs("dense", {0: 1.0, 1: 2.0, 2: 3.0})
        )
    )
    # dense: mean 2, sd 1 -> T2 * 1 / sqrt(3)
    close(main(rows["dense"]).mean, 2.0, T2 / 3**0.5, 3)
    # cluster-aware: mean 13/3, deviations -4/3, 2/3, 2/3, variance (16 + 4 + 4) / 9 / 2 = 4/3 -> T2 sqrt(4/3) / sqrt(3)
    close(main(rows["cluster-aware"]).mean, 13 / 3, T2 * 2 / 3, 3)
    # pairs: 3-2, 5-4, 5-3 = 1, 1, 2: mean 4/3, variance (1 + 1 + 4) / 9 / 2 = 1/3 -> T2 sqrt(1/3) / sqrt(3)
    close(main(rows["cluster-aware"]).difference, 4 / 3, T2 / 3, 3)
    # pairs: 1-2, 2-4, 3-3 = -1, -2, 0: mean -1, sd 1
    close(main(rows["dense"]).difference, -1.0, T2 / 3**0.5, 3)
    assert main(rows["sparse-upcycling"]).difference is None
    assert [(row.rank, label) for label, row in rows.items()] == [
        (1, "cluster-aware"),
        (2, "sparse-upcycling"),
        (3, "dense"),
    ]


def test_only_shared_seeds_make_pairs() -> None:
    records = runs("dense", {0: 1.0, 1: 2.0, 2: 9.0}) + runs("new", {0: 2.0, 1: 5.0, 7: 100.0})
    # pairs at seeds 0 and 1: 1, 3: mean 2, sd sqrt(2) -> T1 sqrt(2) / sqrt(2)
    close(main(only(build(records))["new"]).difference, 2.0, T1, 2)
    # another initialisation seed is another run: nothing to pair
    apart = [make_record("dense", init=0, train=0), make_record("new", init=1, train=0)]
    assert main(only(build(apart))["new"]).difference is None


def test_initialisations_of_one_training_seed_are_averaged_first() -> None:
    base = [make_record("dense", init=i, train=t, value=0.0) for i, t in ((0, 0), (1, 0), (0, 1))]
    several = [make_record("new", init=i, train=t, value=v) for i, t, v in ((0, 0, 1.0), (1, 0, 3.0), (0, 1, 4.0))]
    row = only(build(base + several))["new"]
    # training seed 0: (1 + 3) / 2 = 2, training seed 1: 4; mean 3, sd sqrt(2), n = 2 -> T1 sqrt(2) / sqrt(2)
    close(main(row).mean, 3.0, T1, 2)
    close(main(row).difference, 3.0, T1, 2)
    assert row.scores == {"zero-shot/digits-test/log_likelihood": 3.0} and row.runs == 3


def test_one_seed_has_no_interval() -> None:
    boards = build(runs("dense", {0: 1.0}) + runs("new", {0: 1.5}))
    assert main(only(boards)["new"]).mean == SeedMean(1.5, None, 1)
    assert main(only(boards)["new"]).difference == SeedMean(0.5, None, 1)
    text = render(boards, "terminal", 200)
    assert "1.5000 (n=1)" in text and "+0.5000 (n=1)" in text and "1.5000 ±" not in text


def test_the_baseline_is_the_first_that_succeeded() -> None:
    dense, new = runs("dense", {0: 1.0}), runs("new", {0: 1.5})
    sparse = runs("sparse-upcycling", {0: 1.2})
    assert build(dense + new + sparse)[0].baseline == "sparse-upcycling"
    assert build([*dense, *new, failure("sparse-upcycling")])[0].baseline == "dense"
    (board,) = build(new)
    assert board.baseline is None and main(board.rows[0]).difference is None
    assert "vs " not in render([board], "terminal", 200).split("±")[0]


def test_ties_are_sorted_by_label() -> None:
    assert list(only(build(runs("b", {0: 1.0}) + runs("c", {0: 2.0}) + runs("a", {0: 1.0})))) == ["c", "a", "b"]


def test_where_lower_is_better_rows_ascend_and_where_higher_is_they_descend() -> None:
    values = {"b": 0.5, "c": 0.25, "a": 0.75}
    for lower, expected in ((True, ["c", "b", "a"]), (False, ["a", "b", "c"])):
        made = [
            make_record(label, scores=[score("s", "log_rank", value, headline="one", lower=lower)])
            for label, value in values.items()
        ]
        assert list(only(build([*made, failure("0")]))) == [*expected, "0"]


def test_a_place_is_among_the_ranked_and_others_have_none() -> None:
    """By the mean b stands above c and d, but one seed and two are not ranked; a single row of three is not either."""
    three = runs("c", {0: 0.5, 1: 0.6, 2: 0.4}) + runs("d", {0: 0.3, 1: 0.1, 2: 0.2})
    rows = only(build([*runs("b", {0: 0.9}), *three, *runs("e", {0: 0.0, 1: 0.0}), failure("f")]))
    assert [(row.rank, label) for label, row in rows.items()] == [
        (None, "b"), (1, "c"), (2, "d"), (None, "e"), (None, "f")
    ]  # fmt: skip
    assert main(rows["c"]).ranks == (1, 1) and main(rows["b"]).ranks is None
    alone = only(build([*three[:3], *runs("b", {0: 0.9})]))
    assert [row.rank for row in alone.values()] == [None, None]


def test_ties_of_a_lower_is_better_score_are_sorted_by_label() -> None:
    made = [make_record(x, scores=[score("s", "log_rank", 1.0, headline="one", lower=True)]) for x in ("b", "c", "a")]
    assert list(only(build(made))) == ["a", "b", "c"]


def test_ranks_are_by_the_first_headline_alone() -> None:
    """The other one says the opposite, and their sum and mean would, too."""
    records = two_headlines("a", {0: 1.0}, {0: 9.0}) + two_headlines("b", {0: 1.5}, {0: 3.0})
    for order in (records, records[::-1]):
        assert list(only(build(order))) == ["a", "b"]
    first = [score("x", "log_rank", 2.0, headline="shift", lower=True)]
    turned = [
        make_record("a", scores=[*first, score("y", "acc1", 0.9, headline="in-distribution")]),
        make_record("b", scores=[first[0] | {"value": 1.0}, score("y", "acc1", 0.1, headline="in-distribution")]),
    ]
    assert list(only(build(turned))) == ["b", "a"]


def test_each_headline_has_a_mean_and_paired_differences_of_its_own() -> None:
    rows = only(
        build(
            two_headlines("dense", {0: 1.0, 1: 2.0, 2: 3.0}, {0: 10.0, 1: 20.0, 2: 30.0})
            + two_headlines("new", {0: 0.5, 1: 1.0, 2: 0.5}, {0: 11.0, 1: 21.0, 2: 34.0})
            + two_headlines("some", {1: 1.0, 7: 0.0}, {1: 26.0, 7: 1.0})
        )
    )
    assert all(list(row.headlines) == ["in-distribution", "shift"] for row in rows.values())
    near, far = rows["new"].headlines.values()
    # 0.5, 1, 0.5: mean 2/3, variance (1 + 4 + 1) / 36 / 2 = 1/12; minus 1, 2, 3: -0.5, -1, -2.5, mean -4/3,
    # deviations 5/6, 2/6, -7/6, variance (25 + 4 + 49) / 36 / 2 = 13/12
    close(near.mean, 2 / 3, T2 * (1 / 12 / 3) ** 0.5, 3)
    close(near.difference, -4 / 3, T2 * (13 / 12 / 3) ** 0.5, 3)
    # 11, 21, 34: mean 22, variance (121 + 1 + 144) / 2 = 133; minus 10, 20, 30: 1, 1, 4, mean 2, variance 3
    close(far.mean, 22.0, T2 * (133 / 3) ** 0.5, 3)
    close(far.difference, 2.0, T2, 3)
    assert [each.difference for each in rows["some"].headlines.values()] == [
        SeedMean(-1.0, None, 1), SeedMean(6.0, None, 1)
    ]  # fmt: skip
    assert all(each.difference is None for each in rows["dense"].headlines.values())
    assert rows["new"].seeds == 3 and rows["some"].seeds == 2


def test_a_board_says_what_its_headlines_are_made_of() -> None:
    scores = [
        score("b", "text_retrieval_log_rank", 1.0, headline="shift", lower=True),
        score("a", "log_rank", 3.0, headline="shift", lower=True),
        score("c", "acc1", 0.5, headline="photos"),
        score("d", "acc1", 0.5),
    ]
    headlines = headlines_of(scores)
    headlines["shift"]["chance"] = 4.5
    (board,) = build([make_record(scores=scores, headlines=headlines), failure("zzz")])
    assert list(board.headlines.items()) == [
        ("shift", BoardHeadline(("zero-shot/a/log_rank", "zero-shot/b/text_retrieval_log_rank"), False, 4.5)),
        ("photos", BoardHeadline(("zero-shot/c/acc1",), True, None)),
    ]
    assert main(only(build([make_record()]))["dense"]).mean.mean == 0.5
    (nothing,) = build([failure("zzz")])
    assert nothing.headlines == {} and nothing.rows[0].rank is None


def test_a_run_without_the_first_headline_has_no_rank_and_stops_no_leaderboard() -> None:
    """Its first suite gave it no scores, so that the headlines are those of another suite."""
    other = score("x", "acc1", 0.5, headline="few-shot") | {"suite": "few-shot"}
    three = {0: 1.0, 1: 1.1, 2: 1.2}
    others = [make_record("other", train=seed, scores=[other]) for seed in three]
    rows = only(build([*two_headlines("new", three, three), *two_headlines("old", three, three), *others]))
    assert [(row.rank, label) for label, row in rows.items()] == [(1, "new"), (2, "old"), (None, "other")]
    rows = only(build([make_record("dense", scores=[other]), *two_headlines("new", {0: 1.0}, {0: 2.0})]))
    assert all(each.difference is None for each in rows["new"].headlines.values())


def test_costs() -> None:
    phase = {"seconds": 1.0, "peak_memory_bytes": 1}
    phases = {"prepare": 5, "calibrate": 7, "upcycle": 11, "train": 100, "evaluate": 1000}
    one = make_record(cost={"phases": {name: phase | {"flops": flops} for name, flops in phases.items()}})
    row = only(build([one]))["dense"]
    assert row.charged_flops == 123 and row.train_flops == 100  # 5 + 7 + 11 + 100; evaluation is not charged
    phases_2 = {name: phase | {"flops": flops + 2, "seconds": 3.0} for name, flops in phases.items()}
    two = make_record(train=1, cost={"phases": phases_2, "tokens_dropped": 0.75})
    row = only(build([one, two]))["dense"]
    # (123 + 131) / 2; (100 + 102) / 2; (1 + 3) / 2; (0.25 + 0.75) / 2
    assert (row.charged_flops, row.train_flops, row.train_seconds, row.tokens_dropped) == (127, 101, 2.0, 0.5)
    assert (row.parameters_total, row.parameters_active) == (100, 60)


def test_an_unknown_cost_is_not_a_small_one() -> None:
    phase = {"seconds": 1.0, "peak_memory_bytes": 1}
    unknown = {"upcycle": phase | {"flops": None}, "train": phase | {"flops": 10}}
    row = only(build([make_record(cost={"phases": unknown, "tokens_dropped": None})]))["dense"]
    assert row.train_flops == 10 and row.charged_flops is None and row.tokens_dropped is None
    untrained = only(build([make_record(cost={"phases": {"evaluate": phase | {"flops": 5}}})]))["dense"]
    assert (untrained.train_seconds, untrained.train_flops, untrained.charged_flops) == (0, 0, 0)


CERTIFICATE = {
    "predictions": 256,
    "repeats": ({"batch_size": 32, "shuffled": False, "differing": 0, "margins": (), "largest_distance": 1e-7},),
    "choices_routed": 0,
    "controls": (),
    "uncontrolled": "too few samples",
    "weights": "w",
    "seconds": 1.0,
}


def test_standard_errors_over_samples_stand_beside_the_metrics() -> None:
    def parts(error: float | None) -> list[dict[str, Any]]:
        return [
            score("a", "log_likelihood", 0.5, headline="in-distribution") | {"standard_error": error},
            score("a", "acc1", 0.6) | {"standard_error": error, "interval": (0.4, 0.8)},
        ]

    new = [make_record("new", train=seed, scores=parts(error)) for seed, error in enumerate((0.02, 0.04))]
    old = make_record("old", scores=parts(None))
    boards = build([*new, old])
    row = only(boards)["new"]
    # (0.02 + 0.04) / 2: seeds share the samples, so a second seed does not lower the error
    assert main(row).standard_error == pytest.approx(0.03)
    assert row.standard_errors == pytest.approx(dict.fromkeys(row.scores, 0.03))
    assert only(boards)["old"].standard_errors == {} and main(only(boards)["old"]).standard_error is None
    for format in ("terminal", "md"):
        text = " ".join(render(boards, format, 250).split())
        assert "0.6000 (0.0300)" in text
        assert "the standard error is at most: in-distribution 0.0300;" in text
    lines = {line["label"]: line for line in csv.DictReader(io.StringIO(render(boards, "csv")))}
    assert float(lines["new"]["zero-shot/a/acc1 standard error"]) == pytest.approx(0.03)
    assert lines["old"]["zero-shot/a/acc1 standard error"] == ""
    rows = json.loads(render(boards, "json"))["boards"][0]["rows"]
    assert {line["label"]: line["standard_errors"].get("zero-shot/a/acc1") for line in rows} == {
        "new": pytest.approx(0.03),
        "old": None,
    }


def test_runs_without_a_certificate_are_counted() -> None:
    certified = [make_record("new", train=seed, certificate=CERTIFICATE) for seed in range(2)]
    older = make_record("dense", train=0)
    boards = build([*certified, older])
    assert {label: (row.runs, row.certified) for label, row in only(boards).items()} == {"new": (2, 2), "dense": (1, 0)}
    for format in ("terminal", "md", "json"):
        assert "1 of 3 runs without a certificate of their evaluation" in " ".join(render(boards, format, 250).split())
        assert "without a certificate" not in render(build(certified), format, 250)
