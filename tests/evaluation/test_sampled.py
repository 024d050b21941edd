"""Each suite says of which outcomes a score is the mean: by hand, and for every score that the suites give."""

from pathlib import Path

import numpy as np
import pytest

from upcycle_bench.evaluation.sampled import of_draws, of_ranks
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.planning.suites import make_suites
from upcycle_bench.protocol import load_protocol
from upcycle_bench.suite import EvalContext, Sampled, Suite, SuiteInfo, SuiteResult

RANKS = {
    "set/rank": np.array([0, 1, 4, 9]),
    "set/log_rank": np.log1p([0, 1, 4, 9]),
    "set/text_retrieval_rank": np.array([5]),
}


def values(found: Sampled | None) -> list[float]:
    assert found is not None
    return found.values.tolist()


def test_answers_among_the_first_k_come_from_ranks() -> None:
    assert values(of_ranks("set", "acc1", RANKS)) == [True, False, False, False]
    assert values(of_ranks("set", "acc5", RANKS)) == [True, True, True, False]
    assert values(of_ranks("set", "text_retrieval_recall@5", RANKS)) == [False]
    assert values(of_ranks("set", "text_retrieval_recall@10", RANKS)) == [True]
    assert values(of_ranks("set", "log_rank", RANKS)) == RANKS["set/log_rank"].tolist()


@pytest.mark.parametrize(
    "metric", ["mean_per_class_recall", "acc1[rare]", "log_likelihood", "rank", "image_retrieval_recall@1"]
)
def test_what_outcomes_do_not_give_is_none(metric: str) -> None:
    assert of_ranks("set", metric, RANKS) is None


def test_draws_are_rows() -> None:
    outcomes = {"digits/5-shot/correct@1": np.array([True, False, True, True, True, False])}
    assert values(of_draws("digits/5-shot", "acc1", outcomes, draws=2)) == [[True, False, True], [True, True, False]]
    assert values(of_draws("digits/5-shot", "acc1", outcomes, draws=1)) == outcomes["digits/5-shot/correct@1"].tolist()
    assert of_draws("digits/5-shot", "acc5", outcomes, draws=2) is None
    assert of_draws("digits/5-shot", "acc1", outcomes, draws=4) is None  # 6 outcomes are no 4 draws


def suite(name: str) -> Suite:
    registry = load_registry()
    return make_suites(registry, load_protocol(registry.get("protocol", "smoke").target), [name])[name]


def test_captions_of_one_image_are_not_independent() -> None:
    zero_shot, way = suite("zero-shot"), "set/image_retrieval_rank"
    alone = zero_shot.sampled(
        "set", "image_retrieval_recall@1", {way: np.array([3]), "set/text_retrieval_rank": np.array([0])}
    )
    several = zero_shot.sampled(
        "set", "image_retrieval_recall@1", {way: np.zeros(5), "set/text_retrieval_rank": np.array([0])}
    )
    assert alone is not None and alone.each == "sample"
    assert several is not None and several.each == "query"


def test_of_a_multilabel_set_the_classes_are_averaged() -> None:
    found = suite("zero-shot").sampled("set", "mean_average_precision", {"set/average_precision": np.array([0.5, 1.0])})
    assert values(found) == [0.5, 1.0] and found is not None and found.each == "class"


def test_pairs_of_images_may_share_a_word_pair() -> None:
    outcomes = {"set/text": np.array([True, False]), "set/comparisons": np.array([4, 1], dtype=np.int8)}
    compositional = suite("compositional")
    assert values(compositional.sampled("set", "text_score", outcomes)) == [True, False]
    found = compositional.sampled("set", "pairwise_accuracy", outcomes)
    assert values(found) == [1.0, 0.25] and found is not None and found.each == "query"
    assert compositional.sampled("set", "group_score", outcomes) is None
    assert compositional.sampled("set", "text_score[added]", outcomes) is None


def test_the_number_of_draws_is_the_suites() -> None:
    outcomes = {"digits/5-shot/correct@1": np.zeros(6, dtype=bool), "digits/correct@1": np.zeros(6, dtype=bool)}
    drawn = suite("few-shot").sampled("digits/5-shot", "acc1", outcomes)
    assert drawn is not None and drawn.values.shape == (3, 2)  # `smoke` draws three times
    once = suite("linear-probe").sampled("digits", "acc1", outcomes)
    assert once is not None and once.values.shape == (6,)


class Plain(Suite):
    """An outsider's suite, whose outcomes have the names of its metrics."""

    info = SuiteInfo(name="plain", summary="s", paper="p", version=1)

    def datasets(self) -> list[str]:
        return []

    def evaluate(self, context: EvalContext) -> SuiteResult:
        raise NotImplementedError

    def config(self) -> dict[str, object]:
        return {"root": str(Path())}


def test_by_default_the_outcomes_have_the_metrics_name() -> None:
    outcomes = {"set/contrast": np.array([0.25, 0.75])}
    assert values(Plain().sampled("set", "contrast", outcomes)) == [0.25, 0.75]
    assert Plain().sampled("set", "other", outcomes) is None
