"""The scores of a record with the outcomes whose means they are, as its suites say it.

for score, known in sampled_scores(sent, here): ...      # known: suite.Sampled, or None where outcomes do not give it
numbers_of(sent, here)["zero-shot/digits-test/acc1"]     # of each sample one number; their mean is the score

Shape suffixes: N samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from upcycle_bench.planning.suites import make_suites
from upcycle_bench.record import Record, ScoreRecord
from upcycle_bench.reporting.sent import Here, Sent
from upcycle_bench.suite import AVERAGE, Sampled, Suite, is_average
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Pair = tuple[ScoreRecord, list[ScoreRecord]]  # a score, and those of which it is made


def suite_of(sent: Sent, here: Here, name: str) -> Suite | str:
    """The suite as the run's protocol sets it, or why it cannot be had here."""
    if sent.protocol is None:
        return "the record holds no protocol"
    try:
        return make_suites(here.registry, sent.protocol, [name])[name]
    except UserError as error:
        return str(error)


def sampled_scores(sent: Sent, here: Here) -> Iterator[tuple[ScoreRecord, Sampled | None]]:
    """Each score, and the outcomes whose mean it is."""
    names = dict.fromkeys(score.suite for score in sent.record.scores)
    suites = {name: suite_of(sent, here, name) for name in names}
    outcomes = {name: sent.outcomes_of(name) for name in names}
    for score in sent.record.scores:
        suite = suites[score.suite]
        known = None if isinstance(suite, str) else suite.sampled(score.dataset, score.metric, outcomes[score.suite])
        yield score, known


def numbers_of(sent: Sent, here: Here) -> dict[str, np.ndarray]:
    """The outcomes [N] of each score that has some, by suite/dataset/metric; of several draws their mean.

    UserError, the reason, where a suite of a headline score cannot be had here.
    """
    for name in dict.fromkeys(score.suite for score in sent.record.scores if score.headline):
        if isinstance(why := suite_of(sent, here, name), str):
            raise UserError(f"outcomes of suite {name} cannot be read here: {why.rstrip('.')}.")
    return {
        name_of(score): known.values if known.values.ndim == 1 else known.values.mean(axis=0)
        for score, known in sampled_scores(sent, here)
        if known is not None and known.values.ndim in (1, 2)
    }


def averages(record: Record) -> Iterator[Pair]:
    """Each mean over sets, and the scores of the sets: of `average/NAME` those of that headline, of `average` all."""
    of_headline: dict[tuple[str, str], set[str]] = defaultdict(set)
    for score in record.scores:
        of_headline[score.suite, score.headline].add(score.dataset)
    for score in record.scores:
        if is_average(score.dataset):
            title = score.dataset.removeprefix(AVERAGE).removeprefix("/")
            parts = [
                part
                for part in record.scores
                if (part.suite, part.metric) == (score.suite, score.metric)
                and not is_average(part.dataset)
                and (not title or part.dataset in of_headline[score.suite, title])
            ]
            if parts:
                yield score, parts


def name_of(score: ScoreRecord) -> str:
    """SUITE/DATASET/METRIC, as tables write it."""
    return f"{score.suite}/{score.dataset}/{score.metric}"
