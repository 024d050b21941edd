"""Zero-shot classification and retrieval, with CLIP_benchmark's metrics and per-sample log-likelihoods.

    [suites.zero-shot]
    sets = ["digits-test", "digits-retrieval"]      # classification or retrieval, in CLIP_benchmark's layout
    temperature_set = "digits-validation"           # the logit scale is refitted here; "": the model's own
    primary = ["digits-test"]
    primary_metric = "log_likelihood"               # for a retrieval set: its text_retrieval_log_likelihood

Classification: acc1, acc5, mean_per_class_recall. Retrieval, each way: recall@1 and recall@5 (text retrieval asks with
an image for its captions, image retrieval with a caption for its image). Beside them log_likelihood: the mean log
softmax of the right answers at one logit scale. All sets are one question: each query has its right answers in a
gallery of classes, captions or images. A metric at 5 is left out of galleries below 5. Accuracies and recalls equal
CLIP_benchmark's (tested); what ours adds is the outcome of each sample.

Everything is computed from all embeddings in float64, so no score depends on the batch size.

Outcomes, one value per query, after SET/ (for retrieval: SET/text_retrieval_ and SET/image_retrieval_):
log_likelihood (float32), rank (int32, 0: first), correct@1 and correct@5 (bool, rank < k).
Once: temperature/logit_scale (float64 [1]), the scale used.

Sources: A. Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020;
clip_benchmark.metrics (1.6.2). Shape suffixes: Q queries, G gallery, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass as plain_dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench import evalsets
from upcycle_bench.errors import UserError, unknown
from upcycle_bench.evalsets import EvalSet
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.suite import EvalContext, Score, Suite, SuiteInfo, SuiteResult

TOP_K = (1, 5)
SCALE_BOUNDS = (1e-2, 1e3)  # of the refitted logit scale; CLIP trains in 1 to 100
CLASSIFICATION = ("log_likelihood", "acc1", "acc5", "mean_per_class_recall")
RETRIEVAL = tuple(
    f"{way}_retrieval_{metric}" for way in ("text", "image") for metric in ("log_likelihood", "recall@1", "recall@5")
)


@plain_dataclass(frozen=True)
class Task:
    """Queries against a gallery; answer g is right for query q where their ids are equal. Embeddings are normalised."""

    queries_QD: Tensor
    gallery_GD: Tensor
    query_id_Q: Tensor
    gallery_id_G: Tensor


@plain_dataclass(frozen=True)
class Judged:
    """What each query got: rank of its best right answer (0: first), log-likelihood, number of right answers."""

    rank_Q: np.ndarray
    log_likelihood_Q: np.ndarray
    right_Q: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Suite):
    """See the module docstring."""

    info: ClassVar[SuiteInfo] = SuiteInfo(
        name="zero-shot",
        summary="Zero-shot classification and retrieval: accuracy, recall, log-likelihood",
        paper="Radford et al. 2021, arXiv:2103.00020; metrics of CLIP_benchmark",
        version=1,
    )

    sets: tuple[str, ...] = Field(min_length=1)
    temperature_set: str = ""
    primary: tuple[str, ...] = Field(min_length=1)
    primary_metric: str = "log_likelihood"

    @model_validator(mode="after")
    def _consistent(self) -> ZeroShot:
        if len(set(self.sets)) < len(self.sets):
            raise ValueError("sets names a set twice")
        if extra := [name for name in self.primary if name not in self.sets]:
            raise ValueError(f"primary names what is not in sets: {', '.join(extra)}")
        if self.temperature_set in self.sets:
            raise ValueError("temperature_set must not be one of the scored sets")
        return self

    def datasets(self) -> list[str]:
        """The scored sets, then the temperature set."""
        return [*self.sets, *([self.temperature_set] if self.temperature_set else [])]

    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Score the model on every set; all that can be wrong with the sets is found before the first encoding."""
        evalsets.require(context.root, self.datasets())
        opened = {
            name: evalsets.read(context.root / name, context.transform, context.batch_size) for name in self.datasets()
        }
        primary = {name: self._primary_metric(opened[name]) for name in self.primary}
        if self.temperature_set and opened[self.temperature_set].kind != "classification":
            raise UserError(f"zero-shot: temperature_set {self.temperature_set!r} must be a classification set.")

        context.model.eval()
        scale = math.exp(float(context.model.logit_scale.detach()))  # type: ignore[operator]
        if self.temperature_set:
            scale = fit_scale(classification_task(opened[self.temperature_set], context))

        result = SuiteResult([], {"temperature/logit_scale": np.array([scale])})
        for name in self.sets:
            score = score_classification if opened[name].kind == "classification" else score_retrieval
            score(opened[name], context, scale, primary.get(name, ""), result)
        return result

    def _primary_metric(self, evalset: EvalSet) -> str:
        known = CLASSIFICATION if evalset.kind == "classification" else RETRIEVAL
        if evalset.kind == "classification" and len(evalset.classnames) < 5:
            known = tuple(metric for metric in known if metric != "acc5")
        for metric in (self.primary_metric, f"text_retrieval_{self.primary_metric}"):
            if metric in known:
                return metric
        raise unknown(f"primary_metric of the {evalset.kind} set {evalset.name}", self.primary_metric, known)


def score_classification(
    evalset: EvalSet, context: EvalContext, scale: float, primary: str, result: SuiteResult
) -> None:
    """Add the scores and outcomes of one classification set to `result`."""
    task = classification_task(evalset, context)
    judged = judge(task, scale, evalset.name)
    add = _adder(evalset.name, "", {1: "acc1", 5: "acc5"}, judged, len(evalset.classnames), primary, result)
    labels_Q = task.query_id_Q.numpy()
    recalls = [np.mean(judged.rank_Q[labels_Q == label] == 0) for label in np.unique(labels_Q)]
    add("mean_per_class_recall", float(np.mean(recalls)), 1 / len(evalset.classnames))


def score_retrieval(evalset: EvalSet, context: EvalContext, scale: float, primary: str, result: SuiteResult) -> None:
    """Add the scores and outcomes of one retrieval set, both ways, to `result`."""
    images_QD, captions = encode_images(evalset, context)
    texts_GD = encode_texts([text for texts in captions for text in texts], evalset.name, context)
    image_id = torch.arange(len(captions))
    text_image_id = image_id.repeat_interleave(torch.tensor([len(texts) for texts in captions]))
    ways = {
        "text_retrieval_": Task(images_QD, texts_GD, image_id, text_image_id),
        "image_retrieval_": Task(texts_GD, images_QD, text_image_id, image_id),
    }
    for prefix, task in ways.items():
        judged = judge(task, scale, evalset.name)
        names = {k: f"recall@{k}" for k in TOP_K}
        _adder(evalset.name, prefix, names, judged, len(task.gallery_GD), primary, result)


def _adder(
    dataset: str,
    prefix: str,
    top_k_names: dict[int, str],
    judged: Judged,
    gallery: int,
    primary: str,
    result: SuiteResult,
) -> Callable[[str, float, float], None]:
    """Add what classification and retrieval share; returns the function that adds one more score."""
    samples = len(judged.rank_Q)

    def add(metric: str, value: float, chance: float) -> None:
        metric = prefix + metric
        result.scores.append(
            Score(
                dataset=dataset, metric=metric, value=value, higher_is_better=True,
                chance=chance, samples=samples, primary=metric == primary,
            )
        )  # fmt: skip

    # Uniform guessing gives each of p right answers the probability 1/gallery.
    add("log_likelihood", float(judged.log_likelihood_Q.mean()), float(np.log(judged.right_Q / gallery).mean()))
    outcomes: dict[str, np.ndarray] = {
        "log_likelihood": judged.log_likelihood_Q.astype(np.float32),
        "rank": judged.rank_Q.astype(np.int32),
    }
    for k, metric in top_k_names.items():
        if k <= gallery:
            correct_Q = judged.rank_Q < k
            outcomes[f"correct@{k}"] = correct_Q
            add(metric, float(correct_Q.mean()), chance_at_k(judged.right_Q, gallery, k))
    result.outcomes.update({f"{dataset}/{prefix}{name}": values for name, values in outcomes.items()})
    return add


def chance_at_k(right_Q: np.ndarray, gallery: int, k: int) -> float:
    """Probability that k random answers hold a right one, mean over queries; k/gallery where one answer is right."""
    draws = math.comb(gallery, k)
    numbers, queries = np.unique(right_Q, return_counts=True)
    misses = sum(
        int(n) * Fraction(math.comb(gallery - int(p), k), draws) for p, n in zip(numbers, queries, strict=True)
    )
    return float(1 - misses / len(right_Q))


def judge(task: Task, scale: float, name: str, block: int = 1024) -> Judged:
    """Rank the gallery for every query by cosine, ties in gallery order; softmax(scale * cosine) is the likelihood."""
    gallery_DG = task.gallery_GD.double().T
    order_G = torch.arange(len(task.gallery_GD))
    rank, log_likelihood, right = [], [], []
    # Blocks of fixed size bound the memory; the batch size of encoding plays no part here.
    for queries_QD, id_Q in zip(task.queries_QD.split(block), task.query_id_Q.split(block), strict=True):
        cosine_QG = queries_QD.double() @ gallery_DG
        right_QG = id_Q[:, None] == task.gallery_id_G[None, :]
        if not right_QG.any(dim=1).all():
            raise UserError(
                f"evaluation set {name}: a sample has no right answer (a label without class, or no caption)."
            )
        best_Q1 = cosine_QG.masked_fill(~right_QG, -torch.inf).amax(dim=1, keepdim=True)
        equal_QG = cosine_QG == best_Q1
        first_Q1 = (equal_QG & right_QG).int().argmax(dim=1, keepdim=True)
        ahead_QG = (cosine_QG > best_Q1) | (equal_QG & (order_G < first_Q1))
        rank.append(ahead_QG.sum(dim=1))
        log_p_QG = torch.log_softmax(scale * cosine_QG, dim=1)
        log_likelihood.append(log_p_QG.masked_fill(~right_QG, -torch.inf).logsumexp(dim=1))
        right.append(right_QG.sum(dim=1))
    return Judged(torch.cat(rank).numpy(), torch.cat(log_likelihood).numpy(), torch.cat(right).numpy())


def fit_scale(task: Task) -> float:
    """The logit scale with the greatest mean log-likelihood of the right class; concave, so there is one optimum."""
    from scipy.optimize import minimize_scalar

    cosine_QG = task.queries_QD.double() @ task.gallery_GD.double().T

    def loss(log_scale: float) -> float:
        return F.cross_entropy(math.exp(log_scale) * cosine_QG, task.query_id_Q).item()

    bounds = (math.log(SCALE_BOUNDS[0]), math.log(SCALE_BOUNDS[1]))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return math.exp(found.x)


def classification_task(evalset: EvalSet, context: EvalContext) -> Task:
    """Images against class embeddings: the mean over templates, as in CLIP_benchmark's zero_shot_classifier."""
    classes = []
    for name in context.track(evalset.classnames, f"{evalset.name}: classes"):
        prompts = [template.format(c=name) for template in evalset.templates]
        text_TD = _embed(context.model.encode_text, context.tokenizer(prompts), context)
        mean_D = text_TD.mean(dim=0)
        classes.append(mean_D / mean_D.norm())
    images_QD, labels = encode_images(evalset, context)
    label_Q = torch.as_tensor(labels)
    return Task(images_QD, _finite(torch.stack(classes), evalset.name), label_Q, torch.arange(len(classes)))


def encode_images(evalset: EvalSet, context: EvalContext) -> tuple[Tensor, list[Any]]:
    """Normalised image embeddings [Q, D] and what stands beside each image: its label or its captions."""
    embeddings, beside = [], []
    for images_B3HW, labels_or_captions in context.track(evalset.batches, f"{evalset.name}: images"):
        embeddings.append(_embed(context.model.encode_image, images_B3HW, context))
        beside.extend(labels_or_captions)
    return _finite(torch.cat(embeddings), evalset.name), beside


def encode_texts(texts: list[str], name: str, context: EvalContext) -> Tensor:
    """Normalised text embeddings [len(texts), D]."""
    starts: Iterable[int] = range(0, len(texts), context.batch_size)
    batches = (texts[i : i + context.batch_size] for i in context.track(starts, f"{name}: texts"))
    return _finite(torch.cat([_embed(context.model.encode_text, context.tokenizer(b), context) for b in batches]), name)


@torch.no_grad()
def _embed(encode: Any, inputs: Tensor, context: EvalContext) -> Tensor:
    with torch.autocast(context.device.type, enabled=False):
        return F.normalize(encode(inputs.to(context.device)).float(), dim=-1).cpu()


def _finite(embeddings: Tensor, name: str) -> Tensor:
    # NaN compares as "not ahead of me": a diverged model would rank every right answer first.
    if not embeddings.isfinite().all():
        raise UserError(f"zero-shot: the model's embeddings of {name} are not finite; the run has diverged.")
    return embeddings


@hookimpl
def register_suites() -> Iterable[type[Suite]]:
    """This file's suite."""
    return [ZeroShot]
