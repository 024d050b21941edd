"""Zero-shot classification and retrieval, with CLIP_benchmark's metrics and the log-likelihood of every sample.

Settings, scores and outcomes are described in docs/suites.md.
Sources: A. Radford et al., arXiv:2103.00020; clip_benchmark.metrics (1.6.2).
Shape suffixes: Q queries, G gallery, Y classes, N images.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation import average_precision, ranking
from upcycle_bench.evaluation.features import encode_images
from upcycle_bench.evaluation.ranking import Judged, Task
from upcycle_bench.evaluation.texts import class_embeddings, classification_task, retrieval_tasks
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import AVERAGE, EvalContext, Score, Suite, SuiteInfo, SuiteResult
from upcycle_bench.util import uncertainty
from upcycle_bench.util.errors import UserError, unknown

TOP_K = {
    "classification": {1: "acc1", 5: "acc5"},
    "retrieval": {1: "recall@1", 5: "recall@5", 10: "recall@10"},
}
MAP = "mean_average_precision"
METRICS = {
    "classification": ("log_likelihood", *TOP_K["classification"].values(), "mean_per_class_recall"),
    "multilabel": (MAP,),
    "retrieval": tuple(
        f"{way}_retrieval_{metric}"
        for way in ("text", "image")
        for metric in ("log_likelihood", *TOP_K["retrieval"].values())
    ),
}


@plain_dataclass(frozen=True)
class Question:
    """A task of a set. Its metrics are called `prefix` + NAME; `strata_Q` is empty where the set has no strata."""

    prefix: str
    task: Task
    strata_Q: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Suite):
    """Its settings; see docs/suites.md."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="zero-shot",
        summary="Zero-shot classification and retrieval: accuracy, recall, log-likelihood, average precision",
        paper="Radford et al. 2021, arXiv:2103.00020; metrics of CLIP_benchmark",
        version=2,
    )

    sets: tuple[str, ...] = Field(min_length=1)
    temperature_sets: tuple[str, ...] = ()
    primary: tuple[str, ...] = Field(min_length=1)
    primary_metric: str = "log_likelihood"

    @model_validator(mode="after")
    def _consistent(self) -> ZeroShot:
        for field in ("sets", "temperature_sets", "primary"):
            if len(set(getattr(self, field))) < len(getattr(self, field)):
                raise ValueError(f"{field} names a set twice")
        if AVERAGE in self.sets:
            raise ValueError(f"a set must not be called {AVERAGE}: the means over sets are")
        if extra := [name for name in self.primary if name not in self.sets]:
            raise ValueError(f"primary names what is not in sets: {', '.join(extra)}")
        if scored := [name for name in self.temperature_sets if name in self.sets]:
            raise ValueError(f"temperature_sets must not be among the scored sets: {', '.join(scored)}")
        return self

    def datasets(self) -> list[str]:
        """The scored sets, then the temperature sets."""
        return [*self.sets, *self.temperature_sets]

    @classmethod
    def of_set(cls, folder: Path) -> ZeroShot:
        """That set alone, at the model's own logit scale."""
        metric = MAP if evalsets.kind_of(folder) == "multilabel" else "log_likelihood"
        return cls(sets=(folder.name,), primary=(folder.name,), primary_metric=metric)

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Score the model on every set. All errors but those of single samples are raised before any encoding."""
        evalsets.require(context.root, self.datasets())
        opened = {
            name: evalsets.read(context.root / name, context.transform, context.batch_size) for name in self.datasets()
        }
        primary = {name: self._primary_metric(opened[name]) for name in self.primary}
        temperature = self._temperature_sets(opened)

        context.model.eval()
        known: dict[str, Tensor] = {}  # text -> its embedding: many sets share their prompts
        fitted = {
            name: ranking.fit_scale([question.task for question in questions(opened[name], context, known)], name)
            for name in self.temperature_sets
            if name in temperature.values()
        }
        own = math.exp(float(context.model.logit_scale.detach()))  # type: ignore[operator]
        scale = {kind: fitted.get(name, own) for kind, name in temperature.items()}
        result = SuiteResult([], {f"temperature/{kind}/logit_scale": np.array([scale[kind]]) for kind in scale})
        for name in self.sets:
            evalset = opened[name]
            if evalset.kind == "multilabel":
                add_average_precision(evalset, context, known, primary.get(name, ""), result)
                continue
            for question in questions(evalset, context, known):
                judged = ranking.judge(question.task, scale[evalset.kind], name)
                add_scores(evalset, question, judged, primary.get(name, ""), result)
        for kind in METRICS:
            result.scores.extend(averages(result.scores, [name for name in self.primary if opened[name].kind == kind]))
        return result

    def _temperature_sets(self, opened: dict[str, EvalSet]) -> dict[str, str]:
        """Kind of the scored sets -> the set that its logit scale is fitted to; "": the model's own scale.

        Kinds without a scale are left out. A kind without a set of its own takes that of the other kind.
        """
        of_kind: dict[str, str] = {}
        for name in self.temperature_sets:
            kind = opened[name].kind
            if kind not in TOP_K:
                raise UserError(f"zero-shot: temperature_sets: no logit scale can be fitted to the {kind} set {name}.")
            if kind in of_kind:
                raise UserError(
                    f"zero-shot: temperature_sets: {of_kind[kind]} and {name} are both {kind} sets; name at most one "
                    "of a kind."
                )
            of_kind[kind] = name
        either = next(iter(of_kind.values()), "")
        scored = {opened[name].kind for name in self.sets}
        return {kind: of_kind.get(kind, either) for kind in TOP_K if kind in scored}

    def _primary_metric(self, evalset: EvalSet) -> str:
        """The full name of `primary_metric` for a set of that kind; UserError where it has no such metric."""
        known = METRICS[evalset.kind]
        if evalset.kind == "classification" and len(evalset.classnames) < 5:
            known = tuple(metric for metric in known if metric != "acc5")
        for metric in (self.primary_metric, f"text_retrieval_{self.primary_metric}"):
            if metric in known:
                return metric
        raise unknown(f"primary_metric of the {evalset.kind} set {evalset.name}", self.primary_metric, known)


def add_scores(evalset: EvalSet, question: Question, judged: Judged, primary: str, result: SuiteResult) -> None:
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
        metric = question.prefix + metric
        result.scores.append(
            Score(
                dataset=evalset.name, metric=metric, value=value, higher_is_better=True, chance=chance,
                samples=samples, primary=metric == primary, **asdict(sure),
            )
        )  # fmt: skip


def add_average_precision(
    evalset: EvalSet, context: EvalContext, known: dict[str, Tensor], primary: str, result: SuiteResult
) -> None:
    """Add the score of a multilabel set, and the average precision of each class, to `result`."""
    classes_YC = class_embeddings(evalset, context, known)
    images_NC, labels = encode_images(evalset, context)
    if any(np.shape(label_Y) != (len(classes_YC),) for label_Y in labels):
        raise UserError(
            f"evaluation set {evalset.name}: an image has not a 0 or 1 for each of {len(classes_YC)} classes; "
            "`upcycle-bench data check` says which."
        )
    cosine_NY, label_NY = ranking.exact_cosines(images_NC, classes_YC).numpy(), np.stack(labels)
    precision_Y = average_precision.average_precisions(cosine_NY, label_NY)
    result.outcomes[f"{evalset.name}/average_precision"] = precision_Y
    result.scores.append(
        Score(
            dataset=evalset.name, metric=MAP, value=float(precision_Y.mean()), higher_is_better=True,
            chance=float(average_precision.chance_average_precisions(label_NY).mean()), samples=len(label_NY),
            primary=primary == MAP, **asdict(average_precision.precision_uncertainty(cosine_NY, label_NY)),
        )
    )  # fmt: skip


def averages(scores: Iterable[Score], sets: list[str]) -> list[Score]:
    """The mean over the sets of each metric that all of them have; nothing for a single set."""
    of_metric: dict[str, list[Score]] = defaultdict(list)
    for score in scores:
        if score.dataset in sets:
            of_metric[score.metric].append(score)
    return [
        Score(
            dataset=AVERAGE, metric=metric, value=statistics.fmean(part.value for part in parts),
            higher_is_better=True, chance=statistics.fmean(part.chance for part in parts if part.chance is not None),
            samples=sum(part.samples for part in parts),
            **asdict(uncertainty.of_mean([(part.value, part.standard_error, part.interval) for part in parts])),
        )
        for metric, parts in of_metric.items()
        if len(parts) == len(sets) > 1
    ]  # fmt: skip


def questions(evalset: EvalSet, context: EvalContext, known: dict[str, Tensor]) -> list[Question]:
    """Encode a set: one question for classification, one each way for retrieval. `known`: text -> its embedding."""
    strata = np.array(evalset.strata)
    if evalset.kind == "classification":
        return [Question("", classification_task(evalset, context, known), strata)]
    of_images, of_texts = retrieval_tasks(evalset, context, known)
    text_strata = strata[of_texts.query_id_Q.numpy()] if evalset.strata else strata
    return [Question("text_retrieval_", of_images, strata), Question("image_retrieval_", of_texts, text_strata)]


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [ZeroShot]
