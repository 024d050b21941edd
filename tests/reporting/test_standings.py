"""How strategies stand to each other: verdicts worked by hand, outcomes of samples, sources of variation."""

import gc
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.records import make_record, score
from upcycle_bench.record import Record
from upcycle_bench.reporting.comparable import Counting
from upcycle_bench.reporting.standings import Standing, stand


def counting(**strategies: Mapping[tuple[int, int], float]) -> Counting:
    return {
        label: {
            seeds: make_record(label, init=seeds[0], train=seeds[1], value=value) for seeds, value in values.items()
        }
        for label, values in strategies.items()
    }


def diagonal(*values: float) -> dict[tuple[int, int], float]:
    return {(seed, seed): value for seed, value in enumerate(values)}


def standing(runs: Counting, outcomes: Any = lambda run: {}, higher_is_better: bool = True) -> dict[str, Standing]:
    reference = "base" if "base" in runs else None
    return stand(runs, "in-distribution", higher_is_better=higher_is_better, reference=reference, outcomes=outcomes)


def test_verdicts_by_hand() -> None:
    """One run's standard deviation is about 1; differences to `base` are 5, -5, 0, 1 to within 0.1, 0.1, 0.1, 2."""
    base = (0.0, 1.0, 2.0, 1.0)
    near, wide = (0.1, -0.1, 0.1, -0.1), (2.0, -2.0, 2.0, -2.0)
    made = standing(
        counting(
            base=diagonal(*base),
            up=diagonal(*(b + 5 + e for b, e in zip(base, near, strict=True))),
            down=diagonal(*(b - 5 - 2 * e for b, e in zip(base, near, strict=True))),
            same=diagonal(*(b + e for b, e in zip(base, near, strict=True))),
            unsure=diagonal(*(b + 1 + e for b, e in zip(base, wide, strict=True))),
            few=diagonal(0.0, 9.0),
        )
    )
    assert {name: each.verdict for name, each in made.items()} == {
        "base": "reference",
        "up": "better",
        "down": "worse",
        "same": "tied",
        "unsure": "undecided",
        "few": "not yet ranked",
    }
    above = diagonal(*(b + 5 + e for b, e in zip(base, near, strict=True)))
    lower = standing(counting(base=diagonal(*base), up=above), higher_is_better=False)
    assert lower["up"].verdict == "worse" and lower["base"].ranks == (1, 1) and lower["up"].ranks == (2, 2)
    assert made["up"].ranks == (1, 1) and made["down"].ranks == (5, 5) and made["few"].ranks is None
    assert made["up"].letters == "a" and made["down"].letters == "c" and made["few"].letters == ""
    assert set(made["same"].letters) & set(made["base"].letters)


def test_what_keeps_a_verdict_away_is_said() -> None:
    """No reference, no common seeds, equal differences, and other sets of a headline score."""
    three = (0.0, 1.0, 2.0)
    alone = standing(counting(one=diagonal(*three), two=diagonal(5.0, 6.0, 7.1)))
    assert {each.verdict for each in alone.values()} == {"no reference"} and alone["two"].ranks == (1, 1)
    apart = standing(counting(base=diagonal(*three), new={(seed, seed): 9.0 + seed for seed in (5, 6, 7)}))
    assert apart["new"].verdict == "too few common seeds" and {each.letters for each in apart.values()} == {""}
    equal = standing(counting(base=diagonal(*three), new=diagonal(*(value + 5 for value in three))))
    assert equal["new"].p is None and equal["new"].verdict == "undecided"
    runs = counting(base=diagonal(*three), new=diagonal(*three))
    for run in list(runs["base"].values()):
        more = [*(s.model_dump() for s in run.scores), score("other", "acc1", 0.5, headline="in-distribution")]
        runs["base"][run.seeds.init, run.seeds.train] = run.model_copy(  # type: ignore[index]
            update={"scores": make_record(scores=more).scores}
        )
    assert standing(runs).keys() == {"base"}


def test_a_resolved_pair_shares_no_letter() -> None:
    """Holm asks more of all ten pairs than of the four with the reference."""
    random = np.random.default_rng(0)
    base = random.normal(0, 0.3, 4)
    made = {"base": diagonal(*base)} | {
        f"s{k}": diagonal(*(base + k * 0.12 + random.normal(0, 0.08, 4))) for k in range(1, 5)
    }
    found = standing(counting(**made))
    for name, each in found.items():
        if each.verdict in ("better", "worse"):
            assert not set(each.letters) & set(found["base"].letters), name
    assert any(each.verdict == "better" for each in found.values())


@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_strategies_rarely_get_a_verdict_and_ranks_hold_the_truth(
    seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 150 tables of five equal strategies, 7.5 may have a false verdict, and as many letters that differ."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # statsmodels collects garbage at each call, which takes most time
    random = np.random.default_rng(5)
    false, apart, ranks = 0, 0, []
    for _ in range(150):
        common_S = random.normal(size=seeds)  # what a seed does to all strategies
        noise_LS = common_S + random.normal(size=(5, seeds))
        names = ["base", "a", "b", "c", "d"]
        equal = standing(counting(**{name: diagonal(*row_S) for name, row_S in zip(names, noise_LS, strict=True)}))
        false += any(each.verdict in ("better", "worse") for each in equal.values())
        apart += any(each.letters != "a" for each in equal.values())
        rising = {name: diagonal(*(noise_LS[place] - place)) for place, name in enumerate(names)}
        found = standing(counting(**rising))
        ranks += [
            low <= 1 + place <= high for place, name in enumerate(names) for low, high in [found[name].ranks or (9, 0)]
        ]
    assert false / 150 <= 0.09 and apart / 150 <= 0.09
    assert sum(ranks) / len(ranks) >= 0.93


def test_ranks_know_which_seeds_are_common() -> None:
    """Paired by training seed, whatever the initialisation, new is always better; with other seeds nobody knows."""
    base = {(0, 0): 0.0, (1, 1): 4.0, (2, 2): 8.0, (3, 3): 12.0}
    turned = {(3 - seed, seed): value + 1.0 for (_, seed), value in base.items()}
    found = standing(counting(base=base, new=turned))
    assert (found["new"].ranks, found["base"].ranks) == ((1, 1), (2, 2))
    apart = standing(counting(base=base, new={(9 + seed, 9 + seed): value for (_, seed), value in turned.items()}))
    assert apart["new"].ranks == apart["base"].ranks == (1, 2)


def test_an_unstable_strategy_makes_no_other_tied() -> None:
    base = (0.0, 0.01, 0.02, 0.01)
    new = tuple(b + e for b, e in zip(base, (0.1, -0.02, 0.12, 0.0), strict=True))
    before = standing(counting(base=diagonal(*base), new=diagonal(*new)))["new"].verdict
    wild = standing(counting(base=diagonal(*base), new=diagonal(*new), wild=diagonal(0.0, 4.0, -4.0, 1.0)))
    assert before == wild["new"].verdict == "undecided"


def test_p_values_are_holms_over_the_table() -> None:
    """Differences 1, 1.2, 0.8: sd 0.2, t = 1 / (0.2 / sqrt(3)) = 8.66, p = 1 - t / sqrt(t^2 + 2) = 0.0131; twice it."""
    base, new = (0.0, 0.0, 0.0), (1.0, 1.2, 0.8)
    t = 1 / (0.2 / math.sqrt(3))
    p = 1 - t / math.sqrt(t * t + 2)
    alone = standing(counting(base=diagonal(*base), one=diagonal(*new)))
    both = standing(counting(base=diagonal(*base), one=diagonal(*new), two=diagonal(*new)))
    assert alone["one"].p == pytest.approx(p) and both["one"].p == pytest.approx(2 * p)
    assert alone["one"].verdict == both["one"].verdict == "better"
    six = standing(counting(base=diagonal(*base), **{f"s{number}": diagonal(*new) for number in range(6)}))
    assert [six[f"s{number}"].p for number in range(6)] == pytest.approx([6 * p] * 6)
    assert six["s0"].verdict == "undecided"


def test_both_sources_of_seeds_stand_apart() -> None:
    """Training seed 0 with initialisations 0, 1, 2: 1, 2, 3; initialisation 0 with training seeds 0, 1: 1, 5."""
    (made,) = standing(counting(new={(0, 0): 1.0, (1, 0): 2.0, (2, 0): 3.0, (0, 1): 5.0})).values()
    assert made.of_init == 1.0 and made.of_train == pytest.approx(math.sqrt(8))
    assert made.score.seeds == 2 and made.score.mean == 3.5  # (1 + 2 + 3) / 3 and 5
    (varied,) = standing(counting(new=diagonal(1.0, 2.0, 3.0))).values()
    assert varied.of_init is varied.of_train is None


def with_outcomes(
    rows: Mapping[tuple[str, int], np.ndarray], errors: float | None = None, direction: bool = True
) -> tuple[Counting, Any]:
    """Runs whose score is the mean of their outcomes, in two questions about the same samples."""
    made: dict[str, dict[tuple[int, int], Record]] = {}
    arrays = {}
    for (label, seed), row_N in rows.items():
        parts = [
            score("a", f"{way}_log_rank", float(row_N.mean()), headline="in-distribution", lower=not direction)
            | {"standard_error": errors}
            for way in ("text", "image")
        ]
        run = make_record(label, init=seed, train=seed, scores=parts)
        made.setdefault(label, {})[seed, seed] = run
        arrays[run.run_id + label] = {
            f"zero-shot/a/{way}_log_rank": row_N.astype(np.float32) for way in ("text", "image")
        }
    return made, lambda run: arrays[run.run_id + run.strategy.label]


def test_samples_widen_the_interval_of_a_score_and_hardly_that_of_a_paired_difference() -> None:
    random = np.random.default_rng(0)
    hard_N = random.normal(size=400)  # how hard each sample is, for all
    rows = {
        (label, seed): hard_N + better + random.normal(0, 0.05, 400)
        for label, better in (("base", 0.0), ("new", 0.1))
        for seed in range(3)
    }
    made = standing(*with_outcomes(rows))["new"]
    assert made.score.of_samples == pytest.approx(1 / 20, rel=0.1) and made.score.of_seeds < 0.01
    assert made.difference is not None and made.difference.of_samples is not None
    assert made.difference.of_samples < 0.005 and made.verdict == "better"


def test_dependent_samples_widen_by_what_the_record_says() -> None:
    """As five captions of one image: the standard error in the record is three times that of independent samples."""
    row_N = np.random.default_rng(0).normal(size=400)
    rows = {(label, seed): row_N for label in ("base", "new") for seed in range(3)}
    alone = float(row_N.std(ddof=1)) / 20
    plain, wide = (standing(*with_outcomes(rows, error))["new"].score.of_samples for error in (None, 3 * alone))
    assert plain == pytest.approx(alone, rel=0.05) and wide == pytest.approx(3 * alone, rel=0.05)


@pytest.mark.parametrize("fault", ["missing", "another mean", "another number", "no number"])
def test_outcomes_that_do_not_fit_are_not_used(fault: str) -> None:
    rows = {("base", seed): np.random.default_rng(seed).normal(size=50) for seed in range(3)}
    made, read = with_outcomes(rows)

    def outcomes(run: Record) -> Mapping[str, Any]:
        found = dict(read(run))
        if run.seeds.train == 1:
            key = "zero-shot/a/text_log_rank"
            faults = {
                "another mean": found[key] + 1,
                "another number": found[key][:40],
                "no number": found[key] * np.nan,
            }
            found |= {key: faults.get(fault)}
            if fault == "missing":
                del found[key]
        return found

    assert standing(made, outcomes)["base"].score.of_samples is None
    assert standing(made, read)["base"].score.of_samples is not None
