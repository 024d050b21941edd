"""Agreement with published results, worked by hand: which pairs count, which agree, and which are named."""

from pathlib import Path

import pytest

from tests.records import make_record, score
from tests.reporting.test_leaderboard import runs
from upcycle_bench.record import Record
from upcycle_bench.reporting.agree import Agreement, agreements
from upcycle_bench.reporting.published import SHIFTS, PublishedRow, read_published
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.uncertainty import wilson

ROOT = Path(__file__).parents[2]
HEAD = "strategy,arch,table,in_val,citation\n"


def rows(**values: float) -> list[PublishedRow]:
    return [PublishedRow(name, "B, table 1", "a paper", {"in_val": value}) for name, value in values.items()]


def ours(lower: bool = False, **values: tuple[float, ...]) -> list[Record]:
    return [
        make_record(
            name,
            init=seed,
            train=seed,
            scores=[score("a", "log_rank", value, headline="in-distribution", lower=lower)],
        )
        for name, each in values.items()
        for seed, value in enumerate(each)
    ]


def only(records: list[Record], published: list[PublishedRow]) -> Agreement:
    (found,) = agreements(records, lambda run: {}, published)
    return found


def test_pairs_that_both_sides_have_resolved() -> None:
    """Here a > b > c surely, d as a; there a > b by 2, a > d by 0.4, c > b by 1. a-b agrees, b-c does not."""
    noise = (0.0, 0.01, -0.01, 0.02)
    made = ours(
        a=tuple(3 + e for e in noise),
        b=tuple(2 + e for e in (0.01, 0.0, 0.0, -0.01)),
        c=tuple(1 - e for e in noise),
        d=(3.01, 3.0, 2.99, 3.02),
    )
    found = only(made, rows(a=57.0, b=55.0, c=56.0, d=56.6, other=1.0))
    assert found.strategies == ("a", "b", "c", "d") and len(found.pairs) == 6
    sure = {frozenset((pair.first, pair.second)) for pair in found.resolved}
    assert sure == {frozenset(pair) for pair in ("ab", "bc", "ac", "bd", "cd")}
    assert found.agreeing == 4 and found.interval == wilson(0.8, 5)
    (named,) = found.disagreeing
    assert (named.first, named.second, named.published) == ("b", "c", -1.0) and named.ours == pytest.approx(
        1.0, abs=0.02
    )
    # here d, a, b, c by 3.005, 3.005 ...: a 3.005, d 3.005; there a, d, c, b
    assert found.tau is not None and 0.3 < found.tau < 0.9


def test_where_lower_is_better_the_sign_turns() -> None:
    made = ours(lower=True, a=(1.0, 1.01, 0.99), b=(2.0, 2.02, 1.98))
    found = only(made, rows(a=57.0, b=55.0))
    assert found.agreeing == len(found.resolved) == 1 and found.tau == pytest.approx(1.0)


def test_half_a_point_counts_and_less_does_not() -> None:
    made = ours(a=(1.0, 1.01, 0.99), b=(2.0, 2.02, 1.98))
    assert len(only(made, rows(a=57.0, b=56.5)).resolved) == 1
    less = only(made, rows(a=57.0, b=56.6))
    assert less.resolved == [] and less.interval is None and less.pairs[0].resolved_by_us


def test_few_seeds_and_open_divisions_resolve_nothing() -> None:
    assert only(ours(a=(1.0,), b=(2.0,)), rows(a=57.0, b=55.0)).resolved == []
    opened = [
        make_record(name, value=1.0, protocol={"division": "open", "overrides": ("moe.experts=4",)}) for name in "ab"
    ]
    assert agreements(opened, lambda run: {}, rows(a=57.0, b=55.0)) == []
    assert agreements(runs("a", {0: 1.0}), lambda run: {}, rows(a=57.0, b=55.0)) == []


def test_what_ships_is_what_the_paper_prints() -> None:
    found = read_published(ROOT / "results" / "published")
    by_name = {(row.strategy, row.setting): row.scores for row in found}
    ours_32 = by_name["cluster-aware", "ViT-B/32, table main"]
    assert (ours_32["in_val"], ours_32["coco_avg"], ours_32["vtab_natural"]) == (57.3, 39.6, 59.1)
    assert ours_32["shift"] == pytest.approx(sum(ours_32[name] for name in SHIFTS) / 5) == pytest.approx(41.44)
    assert by_name["dense", "ViT-B/16, table main"]["in_val"] == 62.5 and len(found) == 25
    assert {row.citation for row in found} == {"Chu et al. 2026 (CVPR) arXiv:2604.13508"}


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it holds no \.csv file"):
        read_published(tmp_path)
    (tmp_path / "a.csv").write_text(HEAD + "dense,B,1,57.0,x\ndense,B,1,many,x\n")
    with pytest.raises(UserError, match=r"a\.csv, line 3: could not convert"):
        read_published(tmp_path)
