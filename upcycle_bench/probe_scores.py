"""From the answers of probes and tuned models to scores: accuracies as CLIP_benchmark defines them, means over draws.

    add_scores("digits/5-shot", [classified(logits_NC, label_N) for each draw], classes=10, result=result)

Shape suffixes: N test samples, C classes, K best answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from upcycle_bench.suite import Score, SuiteResult


@dataclass(frozen=True)
class Classified:
    """Labels of the test samples, and whether each was the first answer and among the first five."""

    label_N: np.ndarray
    first_N: np.ndarray
    five_N: np.ndarray


def classified(logits_NC: Tensor, label_N: Tensor) -> Classified:
    """What these logits make of a test set with these labels."""
    top_NK = logits_NC.topk(min(5, logits_NC.shape[1]), dim=1).indices
    right_NK = (top_NK == label_N[:, None]).cpu().numpy()
    return Classified(label_N.cpu().numpy(), right_NK[:, 0], np.any(right_NK, axis=1))


def add_scores(title: str, draws: Sequence[Classified], classes: int, result: SuiteResult) -> None:
    """Add the scores and outcomes of a dataset to `result`; of one draw, errors are those of a mean over samples."""
    rows = [("acc1", [draw.first_N.mean() for draw in draws], 1 / classes)]
    if classes >= 5:
        rows.append(("acc5", [draw.five_N.mean() for draw in draws], 5 / classes))
    recalls = [
        np.mean([draw.first_N[draw.label_N == label].mean() for label in np.unique(draw.label_N)]) for draw in draws
    ]
    rows.append(("mean_per_class_recall", recalls, 1 / classes))
    for metric, values, chance in rows:
        error, interval = _uncertainty(values)
        if len(draws) == 1 and metric != "mean_per_class_recall":
            share, samples = float(values[0]), len(draws[0].label_N)
            error = math.sqrt(share * (1 - share) / samples)
            interval = (share - 1.96 * error, share + 1.96 * error)
        result.scores.append(
            Score(
                dataset=title,
                metric=metric,
                value=float(np.mean(values)),
                higher_is_better=True,
                chance=chance,
                samples=sum(len(draw.label_N) for draw in draws),
                primary=metric == "acc1",
                standard_error=error,
                interval=interval,
            )
        )
    result.outcomes[f"{title}/correct@1"] = np.concatenate([draw.first_N for draw in draws])


def _uncertainty(values: Sequence[float]) -> tuple[float | None, tuple[float, float] | None]:
    """Standard error of the mean and its 95 % t-interval; None for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None, None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return error, (mean - half, mean + half)
