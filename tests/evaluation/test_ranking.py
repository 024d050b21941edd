"""Ranking: `judge` against an obvious version, ties, several right answers, log rank, the best logit scale, chance."""

import itertools
import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from tests import helpers
from upcycle_bench.evaluation import ranking
from upcycle_bench.evaluation.ranking import (
    Judged,
    Task,
    chance_at_k,
    chance_log_rank,
    fit_scale,
    judge,
    judged_metrics,
)
from upcycle_bench.util.errors import UserError


def reference(task: Task, scale: float | Tensor) -> Judged:
    """What `judge` computes, from all cosines at once, plainly; `scale`: of all queries, or of each."""
    scale = torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1)
    cosine_QG = task.queries_QC.double() @ task.gallery_GC.double().T
    right_QG = task.query_id_Q[:, None] == task.gallery_id_G[None, :]
    best_Q1 = cosine_QG.masked_fill(~right_QG, -torch.inf).amax(dim=1, keepdim=True)
    equal_QG = cosine_QG == best_Q1
    first_Q1 = (equal_QG & right_QG).int().argmax(dim=1, keepdim=True)
    ahead_QG = (cosine_QG > best_Q1) | (equal_QG & (torch.arange(len(task.gallery_GC)) < first_Q1))
    log_p_QG = torch.log_softmax(scale * cosine_QG, dim=1)
    log_likelihood_Q = log_p_QG.masked_fill(~right_QG, -torch.inf).logsumexp(dim=1)
    log_rank_Q = np.array([log_rank(cosine_G, right_G) for cosine_G, right_G in zip(cosine_QG, right_QG, strict=True)])
    return Judged(ahead_QG.sum(dim=1).numpy(), log_rank_Q, log_likelihood_Q.numpy(), right_QG.sum(dim=1).numpy())


def log_rank(cosine_G: Tensor, right_G: Tensor) -> float:
    """ln of the place of the first right answer, whose mean over all orders of ties is taken first.

    At least k of t wrong ones stand before all of a right ones in C(t, k) / C(t + a, k) of the orders.
    """
    best = max(cosine_G[right_G].tolist())
    nearer = sum(cosine > best for cosine in cosine_G.tolist())
    tied = [right for cosine, right in zip(cosine_G.tolist(), right_G.tolist(), strict=True) if cosine == best]
    wrong = len(tied) - sum(tied)
    before = sum(Fraction(math.comb(wrong, k), math.comb(len(tied), k)) for k in range(1, wrong + 1))
    return math.log(1 + nearer + before)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(rows: int, width: int, seed: int, grid: float = 2**20) -> Tensor:
    """Vectors of about unit length whose numbers are multiples of 1 / grid: float64 holds their cosines exactly."""
    vectors = F.normalize(torch.randn(rows, width, generator=generator(seed)), dim=1)
    return (vectors * grid).round() / grid


def task_of(queries_QC: Tensor, gallery_GC: Tensor, ids: int, seed: int = 0) -> Task:
    """Random ids, so that every query has at least one right answer, and most have several."""
    gallery_id_G = torch.randint(ids, (len(gallery_GC),), generator=generator(seed))
    query_id_Q = gallery_id_G[torch.randint(len(gallery_GC), (len(queries_QC),), generator=generator(seed + 1))]
    return Task(queries_QC, gallery_GC, query_id_Q, gallery_id_G)


TASKS = {
    "one right answer": Task(unit(700, 32, 0), unit(60, 32, 1), torch.arange(700) * 7 % 60, torch.arange(60).flip(0)),
    "many queries, few answers": task_of(unit(900, 16, 2), unit(7, 16, 3), ids=3),
    "several right answers": task_of(unit(300, 32, 4), unit(150, 32, 5), ids=20),
    # Multiples of 1/4 in two dimensions: nearly every cosine occurs many times.
    "ties": task_of(unit(300, 2, 6, grid=4), unit(150, 2, 7, grid=4), ids=20),
    "ties, one right answer": Task(
        unit(300, 2, 8, grid=4), unit(150, 2, 9, grid=4), torch.arange(300) % 150, torch.randperm(150)
    ),
    "one query": task_of(unit(1, 8, 10), unit(5, 8, 11), ids=2),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("scale", [0.01, 30.0, 1000.0])
def test_judge_equals_the_reference(name, scale):
    task = TASKS[name]
    fast, slow = judge(task, scale, "x"), reference(task, scale)
    np.testing.assert_array_equal(fast.rank_Q, slow.rank_Q)
    np.testing.assert_array_equal(fast.right_Q, slow.right_Q)
    np.testing.assert_allclose(fast.log_rank_Q, slow.log_rank_Q, rtol=1e-14)
    np.testing.assert_allclose(fast.log_likelihood_Q, slow.log_likelihood_Q, rtol=1e-12, atol=1e-12)


def test_the_tasks_of_that_test_are_what_they_are_called():
    for name, ties in (("ties", True), ("ties, one right answer", True), ("one right answer", False)):
        task = TASKS[name]
        cosine_QG = (task.queries_QC @ task.gallery_GC.T).numpy()
        assert (min(len(set(row)) for row in cosine_QG.tolist()) < 60) is ties
    assert judge(TASKS["several right answers"], 1.0, "x").right_Q.max() > 5
    assert set(judge(TASKS["ties, one right answer"], 1.0, "x").right_Q) == {1}


def test_judge_by_hand():
    # Gallery: x axis, y axis, x axis again. Query 0 = x axis, right answer 2: answer 0 ties with it and stands first,
    # so rank 1. Query 1 = (0.6, 0.8), right answers 0 and 2 (cosine 0.6) behind answer 1 (0.8): rank 1 again.
    task = Task(
        torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        torch.tensor([5, 7]),
        torch.tensor([7, 6, 7]),
    )
    tie = Task(task.queries_QC[:1], task.gallery_GC, torch.tensor([5]), torch.tensor([7, 6, 5]))
    judged = judge(tie, 2.0, "x")
    assert judged.rank_Q.tolist() == [1]
    assert judged.log_rank_Q == pytest.approx([math.log(1.5)])  # before the right one: the other in half of the orders
    # softmax of 2 * (1, 0, 1): e^2 / (2 e^2 + 1)
    assert judged.log_likelihood_Q[0] == pytest.approx(2 - math.log(2 * math.exp(2) + 1))
    both = judge(Task(task.queries_QC[1:], task.gallery_GC, torch.tensor([7]), task.gallery_id_G), 2.0, "x")
    assert both.rank_Q.tolist() == [1]
    assert both.right_Q.tolist() == [2]
    assert both.log_rank_Q == pytest.approx([math.log(2)])  # one wrong answer is nearer, and the tie is of right ones
    # both right answers count: 2 e^1.2 / (2 e^1.2 + e^1.6)
    right, wrong = 2 * math.exp(1.2), math.exp(1.6)
    assert both.log_likelihood_Q[0] == pytest.approx(math.log(right / (right + wrong)), abs=1e-6)
    for ask in (lambda: judge(task, 2.0, "x"), lambda: fit_scale([task], "x")):
        with pytest.raises(UserError, match="x: a sample has no right answer"):
            ask()


@pytest.mark.parametrize("width", [32, 128])
def test_equal_answers_tie_whatever_the_block(width):
    # Each answer stands twice, in any two places; queries and answers are any float32 vectors. Plain float64 products
    # give some of the pairs cosines that differ in the last bit.
    answers = F.normalize(torch.randn(250, width, generator=generator(0)), dim=1)
    place = torch.randperm(500, generator=generator(1))
    queries = F.normalize(torch.randn(300, width, generator=generator(2)), dim=1)
    task = Task(queries, answers.repeat(2, 1)[place], torch.arange(300), place)
    twin = Task(queries, task.gallery_GC, (torch.arange(300) + 250) % 500, place)
    first, second = judge(task, 30.0, "x"), judge(twin, 30.0, "x")
    assert set(np.abs(first.rank_Q - second.rank_Q)[:250]) == {1}
    for block in (1, 7, 299):
        np.testing.assert_array_equal(judge(task, 30.0, "x", block).rank_Q, first.rank_Q)
        np.testing.assert_array_equal(judge(task, 30.0, "x", block).log_rank_Q, first.log_rank_Q)
    # The order of the gallery breaks ties for the rank, and never for the log rank.
    np.testing.assert_array_equal(second.log_rank_Q[:250], first.log_rank_Q[:250])


@pytest.mark.parametrize(
    ("queries", "gallery", "grid"), [(257, 33, 2**20), (130, 9000, 2**20), (3, 70000, 4), (1, 70000, 4)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_log_likelihoods_are_those_of_logsumexp_to_the_bit(queries, gallery, grid, threads):
    cosine_QG = unit(queries, 3, 0, grid) @ unit(gallery, 3, 1, grid).T
    cosine_QG = cosine_QG.double()
    right_QA = cosine_QG[:, :2]
    with helpers.threads(threads):
        for scale in (0.01, 7.3, 100.0, 1000.0):
            scale_Q = torch.full((queries,), scale, dtype=torch.float64)
            ours = ranking.log_likelihoods(cosine_QG, right_QA, cosine_QG.amax(1), scale_Q)
            plain = (scale * right_QA).logsumexp(1) - (scale * cosine_QG).logsumexp(1)
            assert torch.equal(ours, plain)
        scale_Q = torch.rand(queries, generator=generator(2), dtype=torch.float64) * 1000 + 0.01  # of each query
        ours = ranking.log_likelihoods(cosine_QG, right_QA, cosine_QG.amax(1), scale_Q)
        scale_Q1 = scale_Q[:, None]
        assert torch.equal(ours, (scale_Q1 * right_QA).logsumexp(1) - (scale_Q1 * cosine_QG).logsumexp(1))


@pytest.mark.parametrize("name", TASKS)
def test_chunks_change_nothing(name, monkeypatch):
    task = TASKS[name]
    before, scale = judge(task, 30.0, "x"), fit_scale([task], "x")
    for chunk in (1, 1000):
        monkeypatch.setattr(ranking, "CHUNK", chunk)
        after = judge(task, 30.0, "x")
        np.testing.assert_array_equal(after.rank_Q, before.rank_Q)
        np.testing.assert_array_equal(after.log_rank_Q, before.log_rank_Q)
        np.testing.assert_array_equal(after.log_likelihood_Q, before.log_likelihood_Q)
        assert fit_scale([task], "x") == scale


def test_only_chooses_queries():
    judged = Judged(np.array([0, 1, 2]), np.array([0.0, 0.7, 1.1]), np.array([-1.0, -2.0, -3.0]), np.array([1, 1, 2]))
    part = judged.only(np.array([True, False, True]))
    assert (part.rank_Q.tolist(), part.log_likelihood_Q.tolist(), part.right_Q.tolist()) == ([0, 2], [-1, -3], [1, 2])
    assert part.log_rank_Q.tolist() == [0.0, 1.1]


def test_only_of_a_task_keeps_the_whole_gallery():
    task = TASKS["several right answers"]
    chosen_Q = torch.arange(300) % 3 == 1
    part, whole = task.only(chosen_Q), judge(task, 30.0, "x")
    assert len(part.queries_QC) == len(part.query_id_Q) == 100 and torch.equal(part.gallery_GC, task.gallery_GC)
    for chosen in (chosen_Q, chosen_Q.nonzero().flatten()):  # as bool, and as numbers
        for name, values_Q in vars(judge(task.only(chosen), 30.0, "x")).items():
            np.testing.assert_array_equal(values_Q, getattr(whole, name)[chosen_Q.numpy()], err_msg=name)


@pytest.mark.parametrize("name", TASKS)
def test_each_query_may_have_a_scale_of_its_own(name):
    task = TASKS[name]
    scale_Q = 0.01 + 100 * torch.rand(len(task.queries_QC), generator=generator(3), dtype=torch.float64)
    fast = judge(task, scale_Q, "x", block=64)
    np.testing.assert_allclose(fast.log_likelihood_Q, reference(task, scale_Q).log_likelihood_Q, rtol=1e-12, atol=1e-12)
    for query in range(0, len(scale_Q), 97):
        alone = judge(task.only(torch.tensor([query])), float(scale_Q[query]), "x")
        assert fast.log_likelihood_Q[query] == pytest.approx(alone.log_likelihood_Q[0], rel=1e-12, abs=1e-12)


# ---- log rank --------------------------------------------------------------------------------------------------


def of_cosines(cosine_QG: Tensor, right_QG: list[list[bool]]) -> list[Task]:
    """A task for each query, whose cosines with the gallery are these numbers: the gallery is the axes."""
    gallery = torch.eye(cosine_QG.shape[1])
    return [
        Task(cosine_G[None], gallery, torch.tensor([1]), torch.tensor(right_G).long())
        for cosine_G, right_G in zip(cosine_QG, right_QG, strict=True)
    ]


def places(cosine_G: list[float], right_G: list[bool]) -> list[int]:
    """The place of the first right answer, from 1, in each order of the gallery that descends by cosine."""
    found = []
    for order in itertools.permutations(range(len(cosine_G))):
        if all(cosine_G[one] >= cosine_G[two] for one, two in itertools.pairwise(order)):
            found.append(1 + next(place for place, answer in enumerate(order) if right_G[answer]))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_log_rank_is_that_of_the_mean_place_over_all_orders_of_ties(seed):
    """Six answers with at most three different cosines, one to six of them right."""
    rng = np.random.default_rng(seed)
    cosine_QG = torch.from_numpy(rng.integers(-1, 2, (40, 6)) / 4.0)
    right_QG = rng.random((40, 6)) < rng.random((40, 1))
    right_QG[np.arange(40), rng.integers(0, 6, 40)] = True
    expected = [
        math.log(np.mean(places(cosine_G, right_G)))
        for cosine_G, right_G in zip(cosine_QG.tolist(), right_QG.tolist(), strict=True)
    ]
    found = [judge(task, 1.0, "x").log_rank_Q[0] for task in of_cosines(cosine_QG, right_QG.tolist())]
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)
    slow = [log_rank(cosine_G, torch.tensor(right_G)) for cosine_G, right_G in zip(cosine_QG, right_QG, strict=True)]
    np.testing.assert_allclose(slow, expected, rtol=1e-14, atol=1e-15)  # and so does the formula of `reference`
    assert len({round(value, 9) for value in expected}) > 8


def test_constant_embeddings_take_the_middle_of_the_tie():
    for gallery in (1, 2, 9, 100):
        task = Task(torch.ones(3, 4) / 2, torch.ones(gallery, 4) / 2, torch.tensor([0, gallery // 2, gallery - 1]),
                    torch.arange(gallery))  # fmt: skip
        assert judge(task, 30.0, "x").log_rank_Q == pytest.approx([math.log(1 + (gallery - 1) / 2)] * 3, rel=1e-14)
    # Two of nine are right: seven wrong ones, of which a third stands before both.
    twice = Task(
        torch.ones(1, 4) / 2, torch.ones(9, 4) / 2, torch.tensor([1]), torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 0])
    )
    assert judge(twice, 30.0, "x").log_rank_Q == pytest.approx([math.log(1 + 7 / 3)], rel=1e-14)


@pytest.mark.parametrize("name", TASKS)
def test_no_scale_moves_a_log_rank(name):
    task = TASKS[name]
    usual = judge(task, 1.0, "x").log_rank_Q
    for scale in (1e-3, 14.3, 1e4, torch.linspace(0.1, 900, len(usual), dtype=torch.float64)):
        np.testing.assert_array_equal(judge(task, scale, "x").log_rank_Q, usual)
    longer = Task(task.queries_QC / 4, task.gallery_GC / 2, task.query_id_Q, task.gallery_id_G)
    np.testing.assert_array_equal(judge(longer, 1.0, "x").log_rank_Q, usual)


@settings(max_examples=60, deadline=None)
@given(
    cosines=st.lists(st.integers(-8, 8), min_size=2, max_size=12),
    right=st.sets(st.integers(0, 11), min_size=1, max_size=4),
    change=st.sampled_from(
        [lambda x: x**3, lambda x: x / 2 - 1 / 4, lambda x: math.exp(x - 1), lambda x: math.atan(x)]
    ),
)
def test_no_monotone_change_of_the_cosines_moves_a_log_rank(cosines, right, change):
    right_G = [place in {each % len(cosines) for each in right} for place in range(len(cosines))]
    before_G = torch.tensor([cosine / 8 for cosine in cosines], dtype=torch.float64)
    after_G = torch.tensor([change(cosine / 8) for cosine in cosines], dtype=torch.float64)
    before, after = of_cosines(torch.stack([before_G, after_G]), [right_G, right_G])
    assert judge(before, 1.0, "x").log_rank_Q == judge(after, 1.0, "x").log_rank_Q


def test_chance_of_log_rank_with_one_right_answer_is_that_of_a_factorial():
    """All places from 1 to G are as likely: (ln 1 + ... + ln G) / G."""
    for gallery in (1, 2, 3, 10, 1000, 20000):
        expected = math.lgamma(gallery + 1) / gallery
        assert chance_log_rank(np.ones(5, np.int64), gallery) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("gallery", [1, 2, 5, 7])
def test_chance_of_log_rank_is_its_mean_over_all_orders(gallery):
    orders = list(itertools.permutations(range(gallery)))
    means = {
        right: math.fsum(math.log(1 + min(order[:right])) for order in orders) / len(orders)
        for right in range(1, gallery + 1)
    }
    for right, mean in means.items():
        assert chance_log_rank(np.array([right]), gallery) == pytest.approx(mean, rel=1e-12, abs=1e-15)
    right_Q = np.array([*means, 1, 1, gallery])  # of several queries: their mean
    expected = np.mean([means[right] for right in right_Q.tolist()])
    assert chance_log_rank(right_Q, gallery) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_random_embeddings_score_at_the_chance_of_log_rank():
    """Each query has a gallery of its own, so that they do not depend on each other."""
    judged = [
        judge(task_of(unit(1, 8, seed), unit(12, 8, seed + 5000), ids=5, seed=seed), 1.0, "x") for seed in range(900)
    ]
    found_Q, right_Q = (np.concatenate([getattr(each, name) for each in judged]) for name in ("log_rank_Q", "right_Q"))
    assert set(right_Q.tolist()) > {1, 2, 3, 4}
    assert abs(found_Q.mean() - chance_log_rank(right_Q, 12)) < 4 * found_Q.std() / 900**0.5 < 0.1


def test_the_metrics_of_judged_queries_are_means_with_their_chance():
    judged = judge(TASKS["several right answers"], 30.0, "x")
    rows = {metric: rest for metric, *rest in judged_metrics(judged, 150, {1: "acc1", 5: "acc5"}, suffix="[all]")}
    assert list(rows) == ["log_rank[all]", "log_likelihood[all]", "acc1[all]", "acc5[all]"]
    value, sure, chance, samples = rows["log_rank[all]"]
    assert value == pytest.approx(judged.log_rank_Q.mean(), rel=1e-12) and samples == 300
    assert chance == chance_log_rank(judged.right_Q, 150)
    assert sure.standard_error == pytest.approx(judged.log_rank_Q.std(ddof=1) / 300**0.5, rel=1e-9)
    np.testing.assert_array_equal(judged.outcomes([1])["log_rank"], judged.log_rank_Q.astype(np.float32))


# ---- the logit scale -------------------------------------------------------------------------------------------


def noisy(queries: int, gallery: int, noise: float, seed: int = 0) -> Task:
    gallery_GC = F.normalize(torch.randn(gallery, 16, generator=generator(seed)), dim=1)
    id_Q = torch.arange(queries) % gallery
    queries_QC = gallery_GC[id_Q] + noise * torch.randn(queries, 16, generator=generator(seed + 1))
    return Task(F.normalize(queries_QC, dim=1), gallery_GC, id_Q, torch.arange(gallery))


def best_scale(tasks: list[Task]) -> float:
    """The best scale by scipy's unbounded search over `reference`."""
    from scipy.optimize import minimize_scalar

    def loss(scale: float) -> float:
        return -float(np.mean([reference(task, scale).log_likelihood_Q.mean() for task in tasks]))

    return minimize_scalar(loss, bracket=(1.0, 5.0), tol=1e-8).x


def test_fitted_scale_is_scipys():
    task = noisy(600, 6, 0.7)
    assert fit_scale([task], "x") == pytest.approx(best_scale([task]), rel=1e-5)
    several = Task(task.queries_QC, task.gallery_GC, task.query_id_Q % 4, task.gallery_id_G % 4)
    assert fit_scale([several], "x") == pytest.approx(best_scale([several]), rel=1e-5)
    # Tasks weigh the same, however many queries each has.
    there, back = noisy(400, 40, 0.3), noisy(40, 400, 1.0, seed=5)
    one, other, both = fit_scale([there], "x"), fit_scale([back], "x"), fit_scale([there, back], "x")
    assert min(one, other) * 1.1 < both < max(one, other) / 1.1
    assert both == pytest.approx(best_scale([there, back]), rel=1e-5)


def test_perfect_and_reversed_answers_have_a_scale_within_bounds():
    perfect = Task(torch.eye(4), torch.eye(4), torch.arange(4), torch.arange(4))
    scale = fit_scale([perfect], "x")  # a larger scale is better until float64 sees no difference
    assert 30 < scale <= ranking.SCALE_BOUNDS[1]
    assert judge(perfect, scale, "x").log_likelihood_Q == pytest.approx(0, abs=1e-12)
    assert fit_scale([Task(-torch.eye(4), *list(vars(perfect).values())[1:])], "x") == pytest.approx(0.01, rel=1e-4)


def test_many_queries_are_thinned_evenly(monkeypatch):
    task = noisy(600, 6, 0.7)
    whole = fit_scale([task], "x")
    monkeypatch.setattr(ranking, "FIT_QUERIES", 150)
    chosen = torch.arange(0, 600, 4)
    part = Task(task.queries_QC[chosen], task.gallery_GC, task.query_id_Q[chosen], task.gallery_id_G)
    thinned = fit_scale([task], "x")
    assert thinned == fit_scale([part], "x")
    # The loss on the whole task is of the order of 1 / (2 * 150) nats.
    lost = judge(task, whole, "x").log_likelihood_Q.mean() - judge(task, thinned, "x").log_likelihood_Q.mean()
    assert 0 < lost < 3 / 300


def test_chance_counts_all_right_answers():
    assert chance_at_k(np.array([1, 1, 1]), 10, 5) == 0.5
    # two of four answers right, two drawn: all but the one wrong pair of six
    assert chance_at_k(np.array([2]), 4, 2) == pytest.approx(5 / 6)
    assert chance_at_k(np.array([1, 2]), 4, 2) == pytest.approx((1 / 2 + 5 / 6) / 2)
