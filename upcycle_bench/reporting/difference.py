"""Two records side by side: what differs in what was run, and each score with its paired difference.

    found = compare(one, other, Here(load_registry()))      # two `Sent` records
    found.settings["protocol"]                              # {"train.lr_factor": (1.0, 2.0)}
    found.scores[0].difference, found.scores[0].interval    # of the same samples: their mean, and its 95 % interval

Two runs share their samples, so the difference of a score has the error of the samples' differences, which is far less
than that of the scores. Where every outcome is right or wrong, McNemar's exact test says how odd the difference is: of
the samples that only one run has right, each run would have half.

Sources: Q. McNemar, Psychometrika 12, 1947.
Shape suffixes: N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from upcycle_bench.protocol import flatten
from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.reporting.sampled_scores import averages, sampled_scores
from upcycle_bench.reporting.sent import Here, Sent
from upcycle_bench.suite import Sampled
from upcycle_bench.util import uncertainty
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.uncertainty import Uncertainty, Z

Values = Mapping[str, tuple[Any, Any]]  # name -> of the one, of the other; None where one lacks it
# Of a protocol: what only says something, and what never runs unless it is named.
SAID = (
    *("protocol.name", "protocol.summary", "protocol.sources", "protocol.overrides"),
    *("protocol.optional_suites", "protocol.tuning"),
)


@dataclass(frozen=True)
class PairedScore:
    """A score of both records. `difference` is the other's minus the one's; `p` is of McNemar's exact test.

    `standard_error` and `interval` (95 %) are those of the mean difference over samples. They are None, as `p` may be,
    where outcomes are not of the same independent samples, and where no sample differs.
    """

    suite: str
    dataset: str
    metric: str
    headline: str
    higher_is_better: bool | None
    one: float
    other: float
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None
    p: float | None


@dataclass(frozen=True)
class PairedHeadline:
    """A headline score of both records; its parts may share images, so the standard error is an upper bound."""

    one: float
    other: float
    difference: float
    standard_error: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Difference:
    """What differs between two records, by kind, and their common scores; `notes` say what could not be paired."""

    settings: dict[str, Values]
    headlines: dict[str, PairedHeadline]
    scores: list[PairedScore]
    notes: list[str]
    same_table: bool

    def facts(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "same_table": self.same_table,
            "differences": {
                kind: {name: list(pair) for name, pair in values.items()} for kind, values in self.settings.items()
            },
            "headlines": {name: asdict(headline) for name, headline in self.headlines.items()},
            "scores": [asdict(score) for score in self.scores],
            "notes": self.notes,
        }


def compare(one: Sent, other: Sent, here: Here) -> Difference:
    """The difference of two records. UserError where they have no score in common."""
    mine, theirs = dict(_scores(one, here)), dict(_scores(other, here))
    common = [key for key in mine if key in theirs]
    if not common:
        raise UserError(
            f"{one.path.name} and {other.path.name} have no score in common (protocols "
            f"{one.record.protocol.name} and {other.record.protocol.name}); name two records of one protocol."
        )
    notes = []
    same_suites = set()
    for suite in dict.fromkeys(key[0] for key in common):
        prints = [each.record.protocol.suite_fingerprints.get(suite) for each in (one, other)]
        if prints[0] == prints[1]:
            same_suites.add(suite)
        else:
            notes.append(f"{suite}: settings or evaluation sets differ, so its samples are not paired")
    keys = [_table(each.record) for each in (one, other)]
    if keys[0] != keys[1]:
        notes.append("the records share no table: protocol, training data, dense model or suites differ")
    scores = _with_averages(one.record, [_paired(mine[key], theirs[key], key[0] in same_suites) for key in common])
    return Difference(
        settings=settings_that_differ(one.record, other.record),
        headlines=_headlines(one.record, other.record, scores),
        scores=scores,
        notes=notes,
        same_table=keys[0] == keys[1],
    )


def settings_that_differ(one: Record, other: Record) -> dict[str, Values]:
    """What differs of strategy, options, protocol, seeds, code, data and environment, name by name; kinds that do."""
    found: dict[str, Values] = {}
    for (kind, mine), theirs in zip(_facts(one).items(), _facts(other).values(), strict=True):
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        if names:
            found[kind] = {name: (mine.get(name), theirs.get(name)) for name in names}
    return found


def _facts(record: Record) -> dict[str, dict[str, Any]]:
    """What was run, by kind, with dotted names."""
    strategy, protocol = record.strategy, record.protocol
    resolved = flatten({"protocol": protocol.resolved})
    environment = {key: value for key, value in record.environment.items() if key not in ("git", "training")}
    return {
        "strategy": {"name": strategy.name, "package": f"{strategy.distribution} {strategy.version}"},
        "options": {**strategy.config, **flatten({"moe": strategy.moe or {}})},
        "seeds": record.seeds.model_dump(),
        "protocol": {
            "name": protocol.name,
            "division": record.division,
            "overrides": list(protocol.overrides),
            **{name.removeprefix("protocol."): value for name, value in resolved.items() if not name.startswith(SAID)},
        },
        "data": {"training pairs": record.hashes.data, "dense model": record.hashes.dense},
        "code": {"strategy": strategy.code, **flatten({"git": record.environment.get("git") or {}})},
        "environment": {
            **flatten(environment),
            "ranks": record.cost.world_size if record.cost else None,
            "training": _elsewhere(record),
        },
        "results": {"weights": record.hashes.weights, "status": record.status},
    }


def _elsewhere(record: Record) -> Any:
    """When the weights were trained, where an earlier run did it."""
    training = record.environment.get("training")
    return training.get("time") if isinstance(training, dict) else None


def _table(record: Record) -> tuple[Any, ...]:
    """What two records of one table have in common."""
    protocol = record.protocol
    return (
        protocol.name,
        record.division,
        protocol.training_fingerprint,
        protocol.suite_fingerprints,
        record.hashes.dense,
    )


Known = tuple[ScoreRecord, Sampled | None]


def _scores(sent: Sent, here: Here) -> list[tuple[tuple[str, str, str], Known]]:
    return [((score.suite, score.dataset, score.metric), (score, known)) for score, known in sampled_scores(sent, here)]


def _paired(one: Known, other: Known, same_samples: bool) -> PairedScore:
    (mine, before), (theirs, after) = one, other
    sure, p = Uncertainty(None, None), None
    if same_samples and before is not None and after is not None and _alike(before, after):
        sure = _sure(before.values, after.values)
        p = mcnemar(before.values, after.values) if before.values.dtype == after.values.dtype == np.bool_ else None
    return PairedScore(
        suite=mine.suite,
        dataset=mine.dataset,
        metric=mine.metric,
        headline=mine.headline or theirs.headline,
        higher_is_better=mine.higher_is_better,
        one=mine.value,
        other=theirs.value,
        difference=theirs.value - mine.value,
        standard_error=sure.standard_error,
        interval=sure.interval,
        p=p,
    )


def _with_averages(record: Record, scores: list[PairedScore]) -> list[PairedScore]:
    """The scores, where means over sets have the error of these, whose samples are independent."""
    of = {(score.suite, score.dataset, score.metric): score for score in scores}
    for mean, parts in averages(record):
        paired = [of.get((part.suite, part.dataset, part.metric)) for part in parts]
        errors = [each.standard_error for each in paired if each is not None and each.standard_error is not None]
        if (key := (mean.suite, mean.dataset, mean.metric)) in of and len(errors) == len(parts):
            error, middle = math.hypot(*errors) / len(errors), of[key].difference
            interval = (middle - Z * error, middle + Z * error)
            of[key] = replace(of[key], standard_error=error, interval=interval)
    return list(of.values())


def _alike(one: Sampled, other: Sampled) -> bool:
    """Whether both are outcomes of independent samples, as many, of one draw."""
    return one.each == other.each == "sample" and one.values.shape == other.values.shape and one.values.ndim == 1


def _sure(before_N: np.ndarray, after_N: np.ndarray) -> Uncertainty:
    """How sure the mean difference over samples is; unknown where none differs."""
    difference_N = after_N.astype(np.float64) - before_N.astype(np.float64)
    return uncertainty.of_outcomes(difference_N) if difference_N.any() else Uncertainty(None, None)


def _headlines(one: Record, other: Record, scores: list[PairedScore]) -> dict[str, PairedHeadline]:
    """The headline scores that both records have, of the same parts."""
    found = {}
    for name, mine in one.headlines.items():
        parts = [_parts(record, name) for record in (one, other)]
        if name in other.headlines and parts[0] == parts[1]:
            theirs = other.headlines[name]
            paired = [score for score in scores if (score.suite, score.dataset, score.metric) in parts[0]]
            found[name] = PairedHeadline(
                one=mine.value,
                other=theirs.value,
                difference=theirs.value - mine.value,
                standard_error=uncertainty.of_scores((p.dataset, p.metric, p.standard_error) for p in paired),
                higher_is_better=mine.higher_is_better,
            )
    return found


def _parts(record: Record, headline: str) -> set[tuple[str, str, str]]:
    return {(score.suite, score.dataset, score.metric) for score in record.scores if score.headline == headline}


def mcnemar(before_N: np.ndarray, after_N: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test of two runs' right answers (bool) to the same samples; 1 if none differs."""
    from scipy.stats import binomtest

    only_before, only_after = int((before_N & ~after_N).sum()), int((after_N & ~before_N).sum())
    differing = only_before + only_after
    return float(binomtest(only_before, differing, 0.5).pvalue) if differing else 1.0
