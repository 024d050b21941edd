"""Queries against a gallery: ranks, log-likelihoods, the logit scale that fits best, and the value of guessing.

    task = Task(images_QC, classes_GC, label_Q, torch.arange(len(classes_GC)))
    judged = judge(task, fit_scale([validation], "digits-validation"), "digits-test")

The log rank of a query is ln(1 + answers nearer than its nearest right one). Its mean is the logarithm of the geometric
mean rank, and no logit scale moves it. A wrong answer as near as the right one counts half: the middle of the tie.

Classification and both ways of retrieval are this one question. The cosines are exact in float64 (`_on_grid`). So equal
answers tie, and neither blocks, threads nor BLAS change a rank.

Shape suffixes: Q queries, G gallery, A right answers of one query.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.util import uncertainty
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import uncounted
from upcycle_bench.util.uncertainty import Uncertainty

SCALE_BOUNDS = (1e-2, 1e2)  # of the fitted logit scale; CLIP trains in 1 to 100. Without errors the best is infinite
FIT_QUERIES = 1024  # a logit scale is fitted to at most so many queries of a task
BLOCK = 256  # queries in one matrix product; with fewer it is slow
LOG_RANK = "log_rank"
CHUNK = 1 << 17  # cosines in one softmax: 1 MB, which stays in a core's cache through all its steps


@dataclass(frozen=True)
class Task:
    """Queries against a gallery; answer g is right for query q where their ids are equal. Embeddings are normalised."""

    queries_QC: Tensor
    gallery_GC: Tensor
    query_id_Q: Tensor
    gallery_id_G: Tensor

    def only(self, chosen_Q: Tensor) -> Task:
        """The chosen queries alone (numbers, or bool [Q]), against the whole gallery."""
        return replace(self, queries_QC=self.queries_QC[chosen_Q], query_id_Q=self.query_id_Q[chosen_Q])


@dataclass(frozen=True)
class Judged:
    """For each query: rank of its best right answer (0: first), its log rank, log-likelihood, number of right answers.

    `rank_Q` breaks ties by the order of the gallery, as CLIP_benchmark does; `log_rank_Q` takes their middle.
    """

    rank_Q: np.ndarray
    log_rank_Q: np.ndarray
    log_likelihood_Q: np.ndarray
    right_Q: np.ndarray

    def only(self, chosen_Q: np.ndarray) -> Judged:
        """The same for the chosen queries alone (bool [Q])."""
        return Judged(*(values_Q[chosen_Q] for values_Q in vars(self).values()))

    def outcomes(self, ks: Iterable[int]) -> dict[str, np.ndarray]:
        """What the files of outcomes keep of each query: its log rank, log-likelihood, rank, and correct@k for `ks`."""
        found = {
            "log_rank": self.log_rank_Q.astype(np.float32),
            "log_likelihood": self.log_likelihood_Q.astype(np.float32),
            "rank": self.rank_Q.astype(np.int32),
        }
        return found | {f"correct@{k}": self.rank_Q < k for k in ks}


def judge(task: Task, scale: float | Tensor, name: str, block: int = BLOCK) -> Judged:
    """Rank the gallery for every query by cosine; softmax(scale * cosine) is the likelihood.

    `scale`: of all queries, or of each (float64 [Q]). Raises UserError, which names the evaluation set `name`, for a
    query without right answer.
    """
    right_QA, count_Q = _right_answers(task, name)
    queries_QC, gallery_CG = _on_grid(task.queries_QC), _on_grid(task.gallery_GC).T
    scale_Q = torch.as_tensor(scale, dtype=torch.float64).expand(len(count_Q))
    rank_Q = np.empty(len(count_Q), dtype=np.int64)
    log_rank_Q, log_likelihood_Q = np.empty(len(count_Q)), np.empty(len(count_Q))
    # All products go to one tensor: fresh memory for each would cost half as much time again.
    cosines = torch.empty(min(block, len(count_Q)), gallery_CG.shape[1], dtype=torch.float64)
    for start in range(0, len(count_Q), block):
        rows = slice(start, start + block)
        cosine_QG = torch.mm(queries_QC[rows], gallery_CG, out=cosines[: len(count_Q[rows])])
        right_cosine_QA = _right_cosines(cosine_QG, right_QA[rows], count_Q[rows])
        ranks = _ranks(cosine_QG.numpy(), right_QA[rows].numpy(), right_cosine_QA.numpy(), count_Q[rows].numpy())
        rank_Q[rows], log_rank_Q[rows] = ranks
        log_likelihood_Q[rows] = log_likelihoods(cosine_QG, right_cosine_QA, cosine_QG.amax(1), scale_Q[rows]).numpy()
    return Judged(rank_Q, log_rank_Q, log_likelihood_Q, count_Q.numpy())


def exact_cosines(queries_QC: Tensor, gallery_GC: Tensor) -> Tensor:
    """Cosines of normalised embeddings, float64 [Q, G]; the order of summation does not change them."""
    return _on_grid(queries_QC) @ _on_grid(gallery_GC).T


def fit_scale(tasks: Sequence[Task], name: str) -> float:
    """The logit scale with the greatest log-likelihood: mean over a task's queries, then mean over tasks.

    A bounded search on log(scale), to 1e-6. Where one answer is right, the log-likelihood is concave in the scale, so
    there is one optimum. Of a task with more than 1,024 queries only that many are used, evenly spaced, with the whole
    gallery. One number fitted to n samples falls short of the best by about 1 / 2n nats, here 0.0005.

    Raises UserError, which names the evaluation set `name`, for a query without right answer.
    """
    from scipy.optimize import minimize_scalar

    blocks_of_tasks = []
    for task in map(_thinned, tasks):
        right_QA, count_Q = _right_answers(task, name)
        cosines = exact_cosines(task.queries_QC, task.gallery_GC).split(BLOCK)
        parts = zip(cosines, right_QA.split(BLOCK), count_Q.split(BLOCK), strict=True)
        blocks_of_tasks.append(
            [(cosine_QG, _right_cosines(cosine_QG, *right), cosine_QG.amax(1)) for cosine_QG, *right in parts]
        )

    def loss(log_scale: float) -> float:
        scale = torch.tensor(math.exp(log_scale), dtype=torch.float64)
        means = [
            torch.cat([log_likelihoods(*block, scale.expand(len(block[0]))) for block in blocks]).mean()
            for blocks in blocks_of_tasks
        ]
        return -float(torch.stack(means).mean())

    bounds = (math.log(SCALE_BOUNDS[0]), math.log(SCALE_BOUNDS[1]))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def judged_metrics(
    judged: Judged, gallery: int, names: Mapping[int, str], sample_Q: np.ndarray | None = None, suffix: str = ""
) -> Iterable[tuple[str, float, Uncertainty, float, int]]:
    """(metric, value, its uncertainty, chance, samples) of log rank, log-likelihood and right at each k.

    `names`: k -> name of the metric that asks whether a right answer is among the first k of the `gallery`. `suffix`
    ends every name. Queries with the same number in `sample_Q` are one sample.
    """
    # Uniform guessing gives each of p right answers the probability 1/gallery.
    rows = [
        (LOG_RANK, judged.log_rank_Q, chance_log_rank(judged.right_Q, gallery)),
        ("log_likelihood", judged.log_likelihood_Q, float(np.log(judged.right_Q / gallery).mean())),
    ]
    for k, name in names.items():
        if k <= gallery:
            rows.append((name, judged.rank_Q < k, chance_at_k(judged.right_Q, gallery, k)))
    for name, outcome_Q, chance in rows:
        sure = uncertainty.of_outcomes(outcome_Q, sample_Q)
        yield f"{name}{suffix}", float(outcome_Q.mean()), sure, chance, len(outcome_Q)


def mean_per_class_recall(correct_Q: np.ndarray, label_Q: np.ndarray) -> float:
    """The mean over classes of the share of right answers to the queries of a class."""
    return float(np.mean([correct_Q[label_Q == label].mean() for label in np.unique(label_Q)]))


def chance_at_k(right_Q: np.ndarray, gallery: int, k: int) -> float:
    """Probability that k random answers hold a right one, mean over queries; k/gallery where one answer is right."""
    draws = math.comb(gallery, k)
    numbers, queries = np.unique(right_Q, return_counts=True)
    misses = sum(
        int(n) * Fraction(math.comb(gallery - int(p), k), draws) for p, n in zip(numbers, queries, strict=True)
    )
    return float(1 - misses / len(right_Q))


def chance_log_rank(right_Q: np.ndarray, gallery: int) -> float:
    """Expected log rank of the first right answer in a random order of the gallery, mean over queries.

    E ln R = sum over r >= 1 of P(R > r) ln((r + 1) / r), where P(R > r) is the chance that r draws without return
    hold none of the p right answers. One right answer: ln(G!) / G.
    """
    numbers, queries = np.unique(right_Q, return_counts=True)
    draw_R = np.arange(1, gallery)
    step_R = np.log1p(1 / draw_R)
    total = 0.0
    for right, count in zip(numbers, queries, strict=True):
        missed_R = np.cumprod(np.maximum(0, gallery - right - draw_R + 1) / (gallery - draw_R + 1))
        total += int(count) * float(missed_R @ step_R)
    return total / len(right_Q)


def _thinned(task: Task) -> Task:
    """The task with at most FIT_QUERIES queries, evenly spaced."""
    queries = len(task.queries_QC)
    return task if queries <= FIT_QUERIES else task.only(torch.arange(FIT_QUERIES) * queries // FIT_QUERIES)


def _on_grid(embeddings: Tensor) -> Tensor:
    """Round each number to the nearest multiple of 2^-26, in float64; from 1/8 on float32 itself is no finer.

    Products of two are multiples of 2^-52, and the partial sums of a cosine are below 2. float64 holds all such
    numbers, so the order of summation does not change a cosine. Without the grid equal answers may differ in a bit.
    """
    return (embeddings.double() * 2**26).round() / 2**26


def _right_answers(task: Task, name: str) -> tuple[Tensor, Tensor]:
    """Where in the gallery each query's right answers stand, ascending [Q, A], and how many there are [Q].

    A query with fewer than A repeats its last one.
    """
    sorted_id_G, order_G = task.gallery_id_G.sort(stable=True)
    start_Q = torch.searchsorted(sorted_id_G, task.query_id_Q)
    count_Q = torch.searchsorted(sorted_id_G, task.query_id_Q, right=True) - start_Q
    if not count_Q.all():
        raise UserError(f"evaluation set {name}: a sample has no right answer (a label without class, or no caption).")
    within_QA = torch.minimum(torch.arange(int(count_Q.max())), count_Q[:, None] - 1)
    return order_G[start_Q[:, None] + within_QA], count_Q


def _right_cosines(cosine_QG: Tensor, right_QA: Tensor, count_Q: Tensor) -> Tensor:
    """The cosines of the right answers [Q, A], minus infinity where there are fewer than A."""
    absent_QA = torch.arange(right_QA.shape[1]) >= count_Q[:, None]
    return cosine_QG.gather(1, right_QA).masked_fill(absent_QA, -torch.inf)


def _ranks(
    cosine_QG: np.ndarray, right_QA: np.ndarray, right_cosine_QA: np.ndarray, count_Q: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each query the number of answers ahead of its nearest right one, ties in gallery order, and the log rank.

    Of t wrong and a right answers that are as near as the nearest right one, t / (a + 1) stand before the first right
    one, in the mean over all orders; the log rank counts these. The loop goes row by row, since numpy counts true
    values fast in one row only.
    """
    best_Q = right_cosine_QA.argmax(axis=1)  # the first of equals, as the answers ascend
    rank_Q, log_rank_Q = np.empty(len(cosine_QG), dtype=np.int64), np.empty(len(cosine_QG))
    for query, (cosine_G, best) in enumerate(zip(cosine_QG, best_Q, strict=True)):
        answer = right_QA[query, best]
        nearness = cosine_G[answer]
        nearer, as_near = np.count_nonzero(cosine_G > nearness), np.count_nonzero(cosine_G == nearness)
        rank_Q[query] = nearer + np.count_nonzero(cosine_G[:answer] == nearness)
        right = np.count_nonzero(right_cosine_QA[query, : count_Q[query]] == nearness)
        log_rank_Q[query] = math.log(1 + nearer + (as_near - right) / (right + 1))
    return rank_Q, log_rank_Q


@uncounted()
def log_likelihoods(cosine_QG: Tensor, right_cosine_QA: Tensor, best_Q: Tensor, scale_Q: Tensor) -> Tensor:
    """Logarithm of the softmax's mass on the right answers [Q]; `best_Q` is the greatest cosine of each row."""
    return (scale_Q[:, None] * right_cosine_QA).logsumexp(dim=1) - _log_sum_exp(cosine_QG, best_Q, scale_Q)


def _log_sum_exp(cosine_QG: Tensor, best_Q: Tensor, scale_Q: Tensor) -> Tensor:
    """`(scale_Q[:, None] * cosine_QG).logsumexp(dim=1)` to the bit, in its own steps, but a few rows at once, in place.

    Rounding keeps order, so at every scale > 0 the greatest product is that of the greatest cosine.
    """
    shift_Q = scale_Q * best_Q
    sum_Q = torch.empty_like(best_Q)
    chunks = max(1, cosine_QG.numel() // CHUNK)
    # Each chunk has two rows at least, where there are two: PyTorch sums a row that stands alone in another order.
    chunks = min(chunks, max(1, len(cosine_QG) // 2))
    parts = (tensor.tensor_split(chunks) for tensor in (cosine_QG, scale_Q, shift_Q, sum_Q))
    for part_QG, part_scale_Q, part_shift_Q, part_sum_Q in zip(*parts, strict=True):
        part_QG = part_scale_Q[:, None] * part_QG
        torch.sum(part_QG.sub_(part_shift_Q[:, None]).exp_(), dim=1, out=part_sum_Q)
    return sum_Q.log_().add_(shift_Q)
