"""Scores of probes and tuned models: accuracies as CLIP_benchmark defines them, and their means over draws.

    add_scores("digits/5-shot", [classified(logits_NY, label_N) for each draw], 10, "few-shot", result)

Shape suffixes: N test samples, Y classes, A best answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from upcycle_bench.evaluation.ranking import mean_per_class_recall
from upcycle_bench.suite import Score, SuiteResult
from upcycle_bench.util import uncertainty
from upcycle_bench.util.uncertainty import Uncertainty


@dataclass(frozen=True)
class Classified:
    """Labels of the test samples, and whether each was the first answer and among the first five."""

    label_N: np.ndarray
    first_N: np.ndarray
    five_N: np.ndarray


def classified(logits_NY: Tensor, label_N: Tensor) -> Classified:
    """The answers of these logits to a test set with these labels."""
    top_NA = logits_NY.topk(min(5, logits_NY.shape[1]), dim=1).indices
    right_NA = (top_NA == label_N[:, None]).cpu().numpy()
    return Classified(label_N.cpu().numpy(), right_NA[:, 0], np.any(right_NA, axis=1))


def add_scores(title: str, draws: Sequence[Classified], classes: int, headline: str, result: SuiteResult) -> None:
    """Add the scores and outcomes of a dataset to `result`; `acc1` is a part of the headline score.

    Standard errors are over draws; of one, over samples.
    """
    rows = [("acc1", [draw.first_N.mean() for draw in draws], 1 / classes)]
    if classes >= 5:
        rows.append(("acc5", [draw.five_N.mean() for draw in draws], 5 / classes))
    recalls = [mean_per_class_recall(draw.first_N, draw.label_N) for draw in draws]
    rows.append(("mean_per_class_recall", recalls, 1 / classes))
    for metric, values, chance in rows:
        known = over_draws(values) if len(draws) > 1 else _over_samples(draws[0], metric)
        result.scores.append(
            Score(
                dataset=title,
                metric=metric,
                value=float(np.mean(values)),
                higher_is_better=True,
                chance=chance,
                samples=sum(len(draw.label_N) for draw in draws),
                headline=headline if metric == "acc1" else "",
                **asdict(known),
            )
        )
    result.outcomes[f"{title}/correct@1"] = np.concatenate([draw.first_N for draw in draws])


def over_draws(values: Sequence[float]) -> Uncertainty:
    """Standard error of the mean over draws and its 95 % t-interval within [0, 1]; no interval if all are alike."""
    from scipy.stats import t

    if len(set(values)) == 1:  # an interval of width zero would claim to know the next draw
        return Uncertainty(0.0, None)
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return Uncertainty(error, (max(0.0, mean - half), min(1.0, mean + half)))


def _over_samples(draw: Classified, metric: str) -> Uncertainty:
    if metric == "mean_per_class_recall":
        return uncertainty.of_recalls(draw.first_N, draw.label_N)
    return uncertainty.of_outcomes(draw.first_N if metric == "acc1" else draw.five_N)
