"""From outcomes back to scores: the outcomes of each sample whose mean a score of our suites is.

    of_ranks("digits-test", "acc1", outcomes)            # rank < 1, bool [samples]
    of_draws("digits/5-shot", "acc1", outcomes, draws=3) # correct@1, bool [draws, samples]

Both give None where outcomes do not say it, as for the mean recall of classes: labels are no outcomes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from upcycle_bench.suite import Sampled

_AT_K = re.compile(r"(.*?)(?:acc|recall@)(\d+)")
_MEANS = re.compile(r".*?(log_rank|log_likelihood)")


def of_ranks(dataset: str, metric: str, outcomes: Mapping[str, np.ndarray]) -> Sampled | None:
    """The outcomes of a metric of `ranking.judged_metrics`; those of strata are not told apart."""
    if (found := _AT_K.fullmatch(metric)) and (rank_Q := outcomes.get(f"{dataset}/{found[1]}rank")) is not None:
        return Sampled(rank_Q < int(found[2]))
    if _MEANS.fullmatch(metric) and (value_Q := outcomes.get(f"{dataset}/{metric}")) is not None:
        return Sampled(value_Q)
    return None


def of_draws(title: str, metric: str, outcomes: Mapping[str, np.ndarray], draws: int) -> Sampled | None:
    """The outcomes of `acc1` of `probe_scores.add_scores`, draw by draw."""
    right = outcomes.get(f"{title}/correct@1")
    if metric != "acc1" or right is None or right.size % draws:
        return None
    return Sampled(right.reshape(draws, -1) if draws > 1 else right)
