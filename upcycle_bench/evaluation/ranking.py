"""Queries against a gallery: ranks, log-likelihoods, the logit scale that fits best, and the value of guessing.

    task = Task(images_QC, classes_GC, label_Q, torch.arange(len(classes_GC)))
    judged = judge(task, fit_scale([validation], "digits-validation"), "digits-test")

Classification and both ways of retrieval are this one question. The cosines are exact in float64 (`_on_grid`). So equal
answers tie, and neither blocks, threads nor BLAS change a rank.

Shape suffixes: Q queries, G gallery, A right answers of one query.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.util import uncertainty
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import uncounted
from upcycle_bench.util.uncertainty import Uncertainty

SCALE_BOUNDS = (1e-2, 1e3)  # of the fitted logit scale; CLIP trains in 1 to 100
FIT_QUERIES = 2048  # a logit scale is fitted to at most so many queries of a task
BLOCK = 256  # queries in one matrix product; with fewer it is slow
CHUNK = 1 << 17  # cosines in one softmax: 1 MB, which stays in a core's cache through all its steps


@dataclass(frozen=True)
class Task:
    """Queries against a gallery; answer g is right for query q where their ids are equal. Embeddings are normalised."""

    queries_QC: Tensor
    gallery_GC: Tensor
    query_id_Q: Tensor
    gallery_id_G: Tensor


@dataclass(frozen=True)
class Judged:
    """For each query the rank of its best right answer (0: first), the log-likelihood, the number of right answers."""

    rank_Q: np.ndarray
    log_likelihood_Q: np.ndarray
    right_Q: np.ndarray

    def only(self, chosen_Q: np.ndarray) -> Judged:
        """The same for the chosen queries alone (bool [Q])."""
        return Judged(self.rank_Q[chosen_Q], self.log_likelihood_Q[chosen_Q], self.right_Q[chosen_Q])

    def outcomes(self, ks: Iterable[int]) -> dict[str, np.ndarray]:
        """What the files of outcomes keep of each query: log-likelihood, rank, and correct@k for each of `ks`."""
        found = {"log_likelihood": self.log_likelihood_Q.astype(np.float32), "rank": self.rank_Q.astype(np.int32)}
        return found | {f"correct@{k}": self.rank_Q < k for k in ks}


def judge(task: Task, scale: float, name: str, block: int = BLOCK) -> Judged:
    """Rank the gallery for every query by cosine, ties in gallery order; softmax(scale * cosine) is the likelihood.

    Raises UserError, which names the evaluation set `name`, for a query without right answer.
    """
    right_QA, count_Q = _right_answers(task, name)
    queries_QC, gallery_CG = _on_grid(task.queries_QC), _on_grid(task.gallery_GC).T
    rank_Q = np.empty(len(count_Q), dtype=np.int64)
    log_likelihood_Q = np.empty(len(count_Q))
    # All products go to one tensor: fresh memory for each would cost half as much time again.
    cosines = torch.empty(min(block, len(count_Q)), gallery_CG.shape[1], dtype=torch.float64)
    for start in range(0, len(count_Q), block):
        rows = slice(start, start + block)
        cosine_QG = torch.mm(queries_QC[rows], gallery_CG, out=cosines[: len(count_Q[rows])])
        right_cosine_QA = _right_cosines(cosine_QG, right_QA[rows], count_Q[rows])
        rank_Q[rows] = _ranks(cosine_QG.numpy(), right_QA[rows].numpy(), right_cosine_QA.numpy())
        log_likelihood_Q[rows] = log_likelihoods(cosine_QG, right_cosine_QA, cosine_QG.amax(1), scale).numpy()
    return Judged(rank_Q, log_likelihood_Q, count_Q.numpy())


def exact_cosines(queries_QC: Tensor, gallery_GC: Tensor) -> Tensor:
    """Cosines of normalised embeddings, float64 [Q, G]; the order of summation does not change them."""
    return _on_grid(queries_QC) @ _on_grid(gallery_GC).T


def fit_scale(tasks: Sequence[Task], name: str) -> float:
    """The logit scale with the greatest log-likelihood: mean over a task's queries, then mean over tasks.

    A bounded search on log(scale), to 1e-6. Where one answer is right, the log-likelihood is concave in the scale, so
    there is one optimum. Of a task with more than 2,048 queries only that many are used, evenly spaced, with the whole
    gallery. One number fitted to n samples falls short of the best by about 1 / 2n nats, here 0.0002. All of
    8,000 x 8,000 cosines, both ways, would take four times as long and 1 GB.

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
        scale = math.exp(log_scale)
        means = [torch.cat([log_likelihoods(*block, scale) for block in blocks]).mean() for blocks in blocks_of_tasks]
        return -float(torch.stack(means).mean())

    bounds = (math.log(SCALE_BOUNDS[0]), math.log(SCALE_BOUNDS[1]))
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def judged_metrics(
    judged: Judged, gallery: int, names: Mapping[int, str], sample_Q: np.ndarray | None = None, suffix: str = ""
) -> Iterable[tuple[str, float, Uncertainty, float, int]]:
    """(metric, value, its uncertainty, chance, samples) of the mean log-likelihood and of the share right at each k.

    `names`: k -> name of the metric that asks whether a right answer is among the first k of the `gallery`. `suffix`
    ends every name. Queries with the same number in `sample_Q` are one sample.
    """
    # Uniform guessing gives each of p right answers the probability 1/gallery.
    rows = [("log_likelihood", judged.log_likelihood_Q, float(np.log(judged.right_Q / gallery).mean()))]
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


def _thinned(task: Task) -> Task:
    """The task with at most FIT_QUERIES queries, evenly spaced."""
    queries = len(task.queries_QC)
    if queries <= FIT_QUERIES:
        return task
    chosen = torch.arange(FIT_QUERIES) * queries // FIT_QUERIES
    return Task(task.queries_QC[chosen], task.gallery_GC, task.query_id_Q[chosen], task.gallery_id_G)


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


def _ranks(cosine_QG: np.ndarray, right_QA: np.ndarray, right_cosine_QA: np.ndarray) -> list[int]:
    """For each query the number of answers ahead of its nearest right one; of several as near, of the first.

    Ahead are the answers before it in the gallery that are at least as near, and those behind it that are nearer.
    The loop goes row by row, since numpy counts true values fast in one row only.
    """
    best_Q = right_cosine_QA.argmax(axis=1)  # the first of equals, as the answers ascend
    ranks = []
    for cosine_G, right_A, best in zip(cosine_QG, right_QA, best_Q, strict=True):
        answer = right_A[best]
        nearness = cosine_G[answer]
        before, behind = cosine_G[:answer] >= nearness, cosine_G[answer + 1 :] > nearness
        ranks.append(np.count_nonzero(before) + np.count_nonzero(behind))
    return ranks


@uncounted()
def log_likelihoods(cosine_QG: Tensor, right_cosine_QA: Tensor, best_Q: Tensor, scale: float) -> Tensor:
    """Logarithm of the softmax's mass on the right answers [Q]; `best_Q` is the greatest cosine of each row."""
    return (scale * right_cosine_QA).logsumexp(dim=1) - _log_sum_exp(cosine_QG, best_Q, scale)


def _log_sum_exp(cosine_QG: Tensor, best_Q: Tensor, scale: float) -> Tensor:
    """`(scale * cosine_QG).logsumexp(dim=1)` to the bit, in its own steps, but a few rows at once and in place.

    Rounding keeps order, so at every scale > 0 the greatest product is that of the greatest cosine.
    """
    shift_Q = scale * best_Q
    sum_Q = torch.empty_like(best_Q)
    chunks = max(1, cosine_QG.numel() // CHUNK)
    # Each chunk has two rows at least, where there are two: PyTorch sums a row that stands alone in another order.
    chunks = min(chunks, max(1, len(cosine_QG) // 2))
    parts = (tensor.tensor_split(chunks) for tensor in (cosine_QG, shift_Q, sum_Q))
    for part_QG, part_shift_Q, part_sum_Q in zip(*parts, strict=True):
        torch.sum((scale * part_QG).sub_(part_shift_Q[:, None]).exp_(), dim=1, out=part_sum_Q)
    return sum_Q.log_().add_(shift_Q)
