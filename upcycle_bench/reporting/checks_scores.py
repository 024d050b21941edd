"""Checks of scores: computed again from the outcomes, from each other, and held against what is possible.

    for what in scores(sent, here): ...          # a line for each fault; Unchecked for what cannot be computed here

How a score comes from outcomes is said by its suite (`Suite.sampled`), ours or an outsider's.
Shape suffixes: N samples, D draws.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import numpy as np

from upcycle_bench.evaluation.probe_scores import over_draws
from upcycle_bench.evaluation.ranking import chance_at_k, chance_log_rank
from upcycle_bench.evaluation.score import headlines_of
from upcycle_bench.record import ScoreRecord
from upcycle_bench.reporting.sampled_scores import Pair, averages, name_of, sampled_scores, suite_of
from upcycle_bench.reporting.sent import Here, Sent, Unchecked
from upcycle_bench.suite import is_average
from upcycle_bench.util import uncertainty
from upcycle_bench.util.uncertainty import Uncertainty

RATE = re.compile(
    r"(.*_)?(acc\d+|recall@\d+|mean_per_class_recall|mean_average_precision|(text|image|group)_score|pairwise_accuracy)"
)
ROUNDED = 1e-6  # outcomes are float32, scores the means of float64
AT_K = re.compile(r"(.*?)(?:acc|recall@)(\d+)")


def outcomes(sent: Sent, here: Here) -> Iterator[str]:
    """No NaN; and of one query rank, log rank, log-likelihood and correct@k may not contradict each other."""
    for name, values in sent.outcomes.items():
        if values.dtype.kind not in "biuf":
            yield f"{name} holds {values.dtype}, no numbers"
        elif values.dtype.kind == "f" and not np.isfinite(values).all():
            yield f"{name} holds {int((~np.isfinite(values)).sum()):,} values that are NaN or infinite"
        elif re.search(r"rank$", name) and (values < 0).any():
            yield f"{name} holds a rank below 0"
        elif name.endswith("log_likelihood") and (values > ROUNDED).any():
            yield f"{name} holds a likelihood above 1"
        if (found := re.fullmatch(r"(.*?)correct@(\d+)", name)) and f"{found[1]}rank" in sent.outcomes:
            rank_N = sent.outcomes[f"{found[1]}rank"]
            if rank_N.shape != values.shape or not np.array_equal(rank_N < int(found[2]), values):
                yield f"{name} contradicts {found[1]}rank"
        if not name.endswith("log_rank") or (before := name.removesuffix("log_rank") + "rank") not in sent.outcomes:
            continue
        rank_N = sent.outcomes[before]
        # Of the answers before the right one each is nearer, and counts 1, or as near, and counts 1/2.
        if rank_N.shape != values.shape or (values < np.log1p(rank_N / 2) - ROUNDED).any():
            yield f"{name} contradicts the ranks"


def samples(sent: Sent, here: Here) -> Iterator[str]:
    """As many outcomes as the score says samples; of its strata as many together."""
    for score, known in sampled_scores(sent, here):
        if known is not None and known.each != "class" and known.values.size != score.samples:
            yield f"{name_of(score)} says {score.samples:,} samples, there are outcomes of {known.values.size:,}"
    for whole, parts in _strata(sent):
        if sum(part.samples for part in parts) != whole.samples:
            yield f"{name_of(whole)} says {whole.samples:,} samples, its strata have others"


def scores(sent: Sent, here: Here) -> Iterator[str]:
    """The value again: the mean of its outcomes, of its strata, or of the sets that it averages."""
    unknown: dict[str, set[str]] = defaultdict(set)
    for score, known in sampled_scores(sent, here):
        if known is not None and known.values.size and np.isfinite(known.values).all():
            mean = float(known.values.astype(np.float64).mean())
            if not close(score.value, mean):
                yield f"{name_of(score)} is {score.value:.6g}, its outcomes give {mean:.6g}"
        elif known is None and "[" not in score.metric and not is_average(score.dataset):
            if _is_lacking(score, sent, here):
                yield f"{name_of(score)}: the outcomes lack what it is the mean of"
            unknown[score.suite].add(score.metric)
    for whole, parts in _strata(sent):
        mean = math.fsum(part.value * part.samples for part in parts) / max(1, sum(part.samples for part in parts))
        if not close(whole.value, mean):
            yield f"{name_of(whole)} is {whole.value:.6g}, its strata give {mean:.6g}"
    for score, parts in averages(sent.record):
        mean = statistics.fmean(part.value for part in parts)
        if not close(score.value, mean):
            yield f"{name_of(score)} is {score.value:.6g}, its sets give {mean:.6g}"
    for suite, metrics in unknown.items():
        few = ", ".join(sorted(metrics)[:3]) + (f" and {len(metrics) - 3} more" if len(metrics) > 3 else "")
        yield Unchecked(f"{suite}: {few}: outcomes do not give them")


def _is_lacking(score: ScoreRecord, sent: Sent, here: Here) -> bool:
    """Whether a complete file of outcomes would give the score."""
    suite = suite_of(sent, here, score.suite)
    return not isinstance(suite, str) and suite.sampled(score.dataset, score.metric, _Complete()) is not None


class _Complete(Mapping[str, np.ndarray]):
    """Outcomes of any name."""

    def __getitem__(self, name: str) -> np.ndarray:
        return np.zeros(2)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def errors(sent: Sent, here: Here) -> Iterator[str]:
    """Standard error and interval again, where the outcomes are those of independent samples or of draws."""
    for score, known in sampled_scores(sent, here):
        if known is None or known.each != "sample" or not known.values.size or not np.isfinite(known.values).all():
            continue
        if known.values.ndim == 2:
            found = over_draws([float(each.mean()) for each in known.values])
        else:
            found = uncertainty.of_outcomes(known.values)
        for what, said in asdict(Uncertainty(score.standard_error, score.interval)).items():
            ours = getattr(found, what)
            if (said is None) != (ours is None) or (said is not None and not _all_close(said, ours)):
                yield f"{name_of(score)}: its {what.replace('_', ' ')} is {_short(said)}, outcomes give {_short(ours)}"


def headlines(sent: Sent, here: Here) -> Iterator[str]:
    """Value, direction, chance and standard error of each headline score, from its parts; its parts by the protocol."""
    found = headlines_of([score.model_dump(mode="json") for score in sent.record.scores])
    for name, headline in sent.record.headlines.items():
        for what, ours in found[name].items():
            said = getattr(headline, what)
            same = said is ours if ours is None or isinstance(ours, bool) else said is not None and close(said, ours)
            if not same:
                yield f"{name}: its {what.replace('_', ' ')} is {said}, its parts give {ours}"
    suites = {score.suite for score in sent.record.scores if score.headline}
    if len(suites) > 1:
        yield f"headline scores mix suites: {', '.join(sorted(suites))}"
    settings = sent.protocol and {**sent.protocol.suites, **sent.protocol.optional_suites}
    for suite in suites if settings else ():
        wanted = (settings or {}).get(suite, {}).get("headlines")
        if not isinstance(wanted, dict):
            continue
        left_out = {name.partition("/")[2] for name in sent.record.skipped if name.startswith(f"{suite}/")}
        for title, sets in wanted.items():
            parts = {score.dataset for score in sent.record.scores if score.headline == title}
            if parts != {*sets} - left_out:
                yield f"{title}: its parts are of {', '.join(sorted(parts)) or 'no set'}, not of the protocol's sets"


def ranges(sent: Sent, here: Here) -> Iterator[str]:
    """No rate, log rank, log-likelihood or interval that cannot be."""
    for score in sent.record.scores:
        name, value = name_of(score), score.value
        bare = score.metric.partition("[")[0]
        rate, log_rank, likelihood = RATE.fullmatch(bare), bare.endswith("log_rank"), bare.endswith("log_likelihood")
        if rate and not 0 <= value <= 1:
            yield f"{name} is {value:.6g}, a rate lies between 0 and 1"
        if (log_rank and value < 0) or (likelihood and value > ROUNDED):
            yield f"{name} is {value:.6g}, which no answers give"
        if (log_rank and score.higher_is_better) or ((rate or likelihood) and score.higher_is_better is False):
            yield f"{name}: its direction is turned round"
        if score.interval is not None and not score.interval[0] - ROUNDED <= value <= score.interval[1] + ROUNDED:
            yield f"{name} is {value:.6g}, outside of its own interval"


def chance(sent: Sent, here: Here) -> Iterator[str]:
    """The chance levels of one set agree on the size of its gallery; those of averages are the sets' mean."""
    known = {(score.suite, score.dataset, score.metric): one for score, one in sampled_scores(sent, here)}
    for score in sent.record.scores:
        if score.chance is not None and RATE.fullmatch(score.metric) and not 0 <= score.chance <= 1:
            yield f"{name_of(score)}: chance {score.chance:.6g} is no rate"
        if not (found := AT_K.fullmatch(score.metric)) or found[2] != "1" or score.chance is None:
            continue
        if known[score.suite, score.dataset, score.metric] is None:
            continue
        retrieval = bool(found[1])
        others = sent.outcomes.get(f"{score.suite}/{score.dataset}/text_retrieval_rank")
        if retrieval and (others is None or len(others) != _captions(sent, score)):
            continue  # several captions of an image: chance depends on how many
        gallery = score.samples if retrieval else round(1 / max(score.chance, 1e-9))
        yield from _chances(sent, score, found[1], gallery)
    for score, parts in averages(sent.record):
        chances = [part.chance for part in parts if part.chance is not None]
        if score.chance is not None and chances and not close(score.chance, statistics.fmean(chances)):
            yield f"{name_of(score)}: chance is {score.chance:.6g}, its sets give {statistics.fmean(chances):.6g}"


def _chances(sent: Sent, first: ScoreRecord, prefix: str, gallery: int) -> Iterator[str]:
    """The chance levels of a set's scores of that way, whose queries have one right answer each in the gallery."""
    alone = np.ones(1, dtype=np.int64)
    for score in sent.record.scores:
        bare, stratum = score.metric.partition("[")[0], "[" in score.metric
        if (score.suite, score.dataset) != (first.suite, first.dataset) or not bare.startswith(prefix) or stratum:
            continue
        if found := AT_K.fullmatch(bare):
            ours = chance_at_k(alone, gallery, min(int(found[2]), gallery)) if found[1] == prefix else None
        else:
            ours = {
                "log_rank": chance_log_rank(alone, gallery),
                "log_likelihood": -math.log(gallery),
                "mean_per_class_recall": 1 / gallery,
            }.get(bare.removeprefix(prefix))
        if ours is not None and (score.chance is None or not close(score.chance, ours)):
            yield f"{name_of(score)}: chance is {score.chance}, of {gallery:,} answers it is {ours:.6g}"


def _captions(sent: Sent, score: ScoreRecord) -> int:
    found = sent.outcomes.get(f"{score.suite}/{score.dataset}/image_retrieval_rank")
    return -1 if found is None else len(found)


def _strata(sent: Sent) -> Iterator[Pair]:
    """Each score of a set that has strata, which cut its samples; averages have theirs from the sets."""
    parts: dict[tuple[str, str, str], list[ScoreRecord]] = defaultdict(list)
    for score in sent.record.scores:
        if "[" in score.metric and not is_average(score.dataset):
            parts[score.suite, score.dataset, score.metric.partition("[")[0]].append(score)
    for score in sent.record.scores:
        if found := parts.get((score.suite, score.dataset, score.metric)):
            yield score, found


def close(one: float, other: float) -> bool:
    """Whether two numbers are the same but for the rounding of float32."""
    return math.isclose(one, other, rel_tol=ROUNDED, abs_tol=ROUNDED)


def _all_close(said: float | tuple[float, ...], ours: float | tuple[float, ...]) -> bool:
    pairs = zip(said, ours, strict=True) if isinstance(said, tuple) and isinstance(ours, tuple) else [(said, ours)]
    return all(math.isclose(one, other, rel_tol=1e-4, abs_tol=ROUNDED) for one, other in pairs)  # type: ignore[arg-type]


def _short(value: float | tuple[float, ...] | None) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_short, value))
    return "none" if value is None else f"{value:.6g}"
