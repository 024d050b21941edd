"""Zero-shot classification and retrieval: CLIP_benchmark's metrics, log rank and log-likelihood of every sample.

Settings, scores and outcomes are described in docs/suites.md.

No logit scale moves a rank, so the headline scores are mean log ranks. A log-likelihood needs a scale, and one that was
fitted to other data could decide the comparison. So every set is cut in two halves, and each is scored at the scale
that fits the other best.
Sources: A. Radford et al., arXiv:2103.00020; clip_benchmark.metrics (1.6.2).
Shape suffixes: Q queries, G gallery, Y classes, N images.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation import average_precision, ranking
from upcycle_bench.evaluation.features import encode_images
from upcycle_bench.evaluation.ranking import LOG_RANK, Judged, Task
from upcycle_bench.evaluation.sampled import of_ranks
from upcycle_bench.evaluation.texts import class_embeddings, classification_task, cut_texts, retrieval_tasks
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import AVERAGE, EvalContext, Sampled, Score, Suite, SuiteInfo, SuiteResult, is_average
from upcycle_bench.util import uncertainty
from upcycle_bench.util.errors import UserError, unknown
from upcycle_bench.util.rng import Stream

TOP_K = {
    "classification": {1: "acc1", 5: "acc5"},
    "retrieval": {1: "recall@1", 5: "recall@5", 10: "recall@10"},
}
MAP = "mean_average_precision"
WAYS = ("text_retrieval_", "image_retrieval_")
METRICS = {
    "classification": (LOG_RANK, "log_likelihood", *TOP_K["classification"].values(), "mean_per_class_recall"),
    "multilabel": (MAP,),
    "retrieval": (LOG_RANK, "log_likelihood", *TOP_K["retrieval"].values()),  # behind the name of each way
}
LEAST_HALF = 50  # samples; a scale that fits fewer says little of others, so that the model's own is used


@plain_dataclass(frozen=True)
class Question:
    """A task of a set. Its metrics are called `prefix` + NAME; `strata_Q` is empty where the set has no strata."""

    prefix: str
    task: Task
    strata_Q: np.ndarray

    def scale_Q(self, halves: Sequence[tuple[np.ndarray, float]]) -> Tensor:
        """The logit scale of each query, float64 [Q]; `halves`: samples, and the scale at which they are scored."""
        scale_Q = torch.empty(len(self.task.query_id_Q), dtype=torch.float64)
        for sample_N, scale in halves:
            scale_Q[self.of_samples(sample_N)] = scale
        return scale_Q

    def of_samples(self, sample_N: np.ndarray) -> Tensor:
        """Which queries belong to these samples, bool [Q]. All captions of an image are one sample."""
        if not self.prefix:  # classification: one query for each sample
            return torch.from_numpy(np.isin(np.arange(len(self.task.query_id_Q)), sample_N))
        return torch.from_numpy(np.isin(self.task.query_id_Q.numpy(), sample_N))


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Suite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="zero-shot",
        summary="Zero-shot classification and retrieval: accuracy, recall, log-likelihood, average precision",
        paper="Radford et al. 2021, arXiv:2103.00020; metrics of CLIP_benchmark",
        version=3,
    )

    sets: tuple[str, ...] = Field(min_length=1)
    headlines: dict[str, tuple[str, ...]] = Field(min_length=1)
    headline_metric: str = LOG_RANK

    @model_validator(mode="after")
    def _consistent(self) -> ZeroShot:
        named = [name for sets in self.headlines.values() for name in sets]
        for field, names in {"sets": self.sets, "headlines": named}.items():
            if len(set(names)) < len(names):
                raise ValueError(f"{field} names a set twice")
        if any(map(is_average, self.sets)):
            raise ValueError(f"a set must not be called {AVERAGE}: the means over sets are")
        if empty := [headline for headline, sets in self.headlines.items() if not (headline and sets)]:
            raise ValueError(f"headlines: {empty[0] or 'one without a name'} names no set")
        if extra := [name for name in named if name not in self.sets]:
            raise ValueError(f"headlines name what is not in sets: {', '.join(extra)}")
        return self

    def datasets(self) -> list[str]:
        """The scored sets."""
        return list(self.sets)

    def without(self, sets: Collection[str]) -> ZeroShot:
        """Without them in the headlines, too; UserError if no headline is left."""
        left = {title: tuple(name for name in names if name not in sets) for title, names in self.headlines.items()}
        if not any(left.values()):
            raise UserError("zero-shot: no set of a headline score is left.")
        kept = tuple(name for name in self.sets if name not in sets)
        return replace(self, sets=kept, headlines={title: names for title, names in left.items() if names})

    @classmethod
    def of_set(cls, folder: Path) -> ZeroShot:
        """That set alone."""
        metric = MAP if evalsets.kind_of(folder) == "multilabel" else LOG_RANK
        return cls(sets=(folder.name,), headlines={folder.name: (folder.name,)}, headline_metric=metric)

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Score the model on every set. All errors but those of single samples are raised before any encoding."""
        evalsets.require(context.root, self.datasets())
        named = [name for sets in self.headlines.values() for name in sets]  # so that headlines come in their order
        opened = {
            name: evalsets.read(context.root / name, context.transform, context.batch_size)
            for name in dict.fromkeys([*named, *self.sets])
        }
        headline_of = {name: headline for headline, sets in self.headlines.items() for name in sets}
        for name in headline_of:
            self._require_metric(opened[name])

        context.model.eval()
        own = math.exp(float(context.model.logit_scale.detach()))  # type: ignore[operator]
        known: dict[str, Tensor] = {}  # text -> its embedding: many sets share their prompts
        result = SuiteResult([], {})
        for name, evalset in opened.items():
            first = len(result.scores)
            if evalset.kind == "multilabel":
                add_average_precision(evalset, context, known, result)
            else:
                asked = questions(evalset, context, known)
                if cut := cut_captions(context.root / name, context):
                    result.notes.setdefault("cut_captions", {})[name] = cut
                halves = scored_halves(asked, name, own)
                result.notes.setdefault("logit_scales", {})[name] = [scale for _, scale in halves]
                for question in asked:
                    judged = ranking.judge(question.task, question.scale_Q(halves), name)
                    add_scores(evalset, question, judged, result)
            if name in headline_of:
                for place, score in enumerate(result.scores[first:], start=first):
                    if self._is_headline(score):
                        result.scores[place] = replace(score, headline=headline_of[name])
        for kind in METRICS:
            for headline, sets in self.headlines.items():
                of_kind = [name for name in sets if opened[name].kind == kind]
                if len(of_kind) > 1:
                    result.scores.extend(averages(result.scores, of_kind, f"{AVERAGE}/{headline}"))
        return result

    def sampled(self, dataset: str, metric: str, outcomes: Mapping[str, np.ndarray]) -> Sampled | None:
        """Of ranks; of a multilabel set the average precision of each class. Captions may share an image."""
        if metric == MAP and (precision_Y := outcomes.get(f"{dataset}/average_precision")) is not None:
            return Sampled(precision_Y, "class")
        found = of_ranks(dataset, metric, outcomes)
        if found is None or not metric.startswith(WAYS[1]):
            return found
        images = outcomes.get(f"{dataset}/{WAYS[0]}rank")
        alone = images is not None and len(images) == len(found.values)  # as many captions as images: one each
        return found if alone else Sampled(found.values, "query")

    def _require_metric(self, evalset: EvalSet) -> None:
        """UserError where a set of that kind has no `headline_metric`."""
        known = METRICS[evalset.kind]
        if evalset.kind == "classification" and len(evalset.classnames) < 5:
            known = tuple(metric for metric in known if metric != "acc5")
        if self.headline_metric not in known:
            raise unknown(f"headline_metric of the {evalset.kind} set {evalset.name}", self.headline_metric, known)

    def _is_headline(self, score: Score) -> bool:
        return score.metric in (self.headline_metric, *(way + self.headline_metric for way in WAYS))


def scored_halves(asked: Sequence[Question], name: str, own: float) -> list[tuple[np.ndarray, float]]:
    """Two disjoint halves of a set's samples, and the logit scale at which each is scored: the other's best.

    The scale fits all questions of the set at once. The name of the set draws the halves. `own`, the model's scale, is
    taken where a half has fewer than `LEAST_HALF` samples.
    """
    first = asked[0].task
    samples = len(first.query_id_Q) if not asked[0].prefix else int(first.query_id_Q.max()) + 1
    order_N = torch.randperm(samples, generator=Stream(("zero-shot", "halves", name)).generator()).numpy()
    halves = np.array_split(order_N, 2)
    if len(halves[1]) < LEAST_HALF:
        return [(half_N, own) for half_N in halves]
    fitted = [
        ranking.fit_scale([question.task.only(question.of_samples(half_N)) for question in asked], name)
        for half_N in halves
    ]
    return list(zip(halves, reversed(fitted), strict=True))


def add_scores(evalset: EvalSet, question: Question, judged: Judged, result: SuiteResult) -> None:
    """Add the scores and outcomes of one question, of the whole and of its strata, to `result`."""
    names, gallery, label_Q = TOP_K[evalset.kind], len(question.task.gallery_GC), question.task.query_id_Q.numpy()
    for name, values in judged.outcomes(k for k in names if k <= gallery).items():
        result.outcomes[f"{evalset.name}/{question.prefix}{name}"] = values

    sample_Q = None if evalset.kind == "classification" else label_Q  # captions of one image are one sample
    rows = list(ranking.judged_metrics(judged, gallery, names, sample_Q))
    if evalset.kind == "classification":
        correct_Q = judged.rank_Q == 0
        recall, sure = ranking.mean_per_class_recall(correct_Q, label_Q), uncertainty.of_recalls(correct_Q, label_Q)
        rows.append(("mean_per_class_recall", recall, sure, 1 / gallery, len(label_Q)))
    for stratum in np.unique(question.strata_Q):
        chosen_Q = question.strata_Q == stratum
        chosen = None if sample_Q is None else sample_Q[chosen_Q]
        rows.extend(ranking.judged_metrics(judged.only(chosen_Q), gallery, names, chosen, f"[{stratum}]"))
    for metric, value, sure, chance, samples in rows:
        result.scores.append(
            Score(
                dataset=evalset.name, metric=question.prefix + metric, value=value,
                higher_is_better=not metric.startswith(LOG_RANK), chance=chance, samples=samples, **asdict(sure),
            )
        )  # fmt: skip


def add_average_precision(
    evalset: EvalSet, context: EvalContext, known: dict[str, Tensor], result: SuiteResult
) -> None:
    """Add the score of a multilabel set, and the average precision of each class, to `result`."""
    classes_YC = class_embeddings(evalset, context, known)
    images_NC, labels = encode_images(evalset, context)
    cosine_NY, label_NY = ranking.exact_cosines(images_NC, classes_YC).numpy(), np.stack(labels)
    precision_Y = average_precision.average_precisions(cosine_NY, label_NY)
    result.outcomes[f"{evalset.name}/average_precision"] = precision_Y
    result.scores.append(
        Score(
            dataset=evalset.name, metric=MAP, value=float(precision_Y.mean()), higher_is_better=True,
            chance=float(average_precision.chance_average_precisions(label_NY).mean()), samples=len(label_NY),
            **asdict(average_precision.precision_uncertainty(cosine_NY, label_NY)),
        )
    )  # fmt: skip


def averages(scores: Iterable[Score], sets: Sequence[str], title: str) -> list[Score]:
    """The mean over the sets of each metric that all of them have, as scores of the dataset `title`."""
    of_metric: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.dataset in sets:
            of_metric[score.metric].append(score)
    return [
        Score(
            dataset=title, metric=metric, value=statistics.fmean(part.value for part in parts),
            higher_is_better=parts[0].higher_is_better,
            chance=statistics.fmean(part.chance for part in parts if part.chance is not None),
            samples=sum(part.samples for part in parts),
            **asdict(uncertainty.of_mean([(part.value, part.standard_error, part.interval) for part in parts])),
        )
        for metric, parts in of_metric.items()
        if len(parts) == len(sets)
    ]  # fmt: skip


def questions(evalset: EvalSet, context: EvalContext, known: dict[str, Tensor]) -> list[Question]:
    """Encode a set: one question for classification, one each way for retrieval. `known`: text -> its embedding."""
    strata = np.array(evalset.strata)
    if evalset.kind == "classification":
        return [Question("", classification_task(evalset, context, known), strata)]
    of_images, of_texts = retrieval_tasks(evalset, context, known)
    text_strata = strata[of_texts.query_id_Q.numpy()] if evalset.strata else strata
    return [Question(WAYS[0], of_images, strata), Question(WAYS[1], of_texts, text_strata)]


def cut_captions(folder: Path, context: EvalContext) -> dict[str, int]:
    """How many captions of a retrieval set are longer than the context; nothing where none is."""
    if evalsets.kind_of(folder) != "retrieval":
        return {}
    return cut_texts([text for sample in evalsets.samples(folder) for text in sample.label], context.tokenizer)


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [ZeroShot]
