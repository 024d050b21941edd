"""Multilabel sets, from shards to scores: CLIP_benchmark's mean average precision, chance, uncertainty."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
from PIL import Image

from tests.evaluation.contexts import context_of
from tests.helpers import tiny_clip
from upcycle_bench.data import evalset_write
from upcycle_bench.evaluation.average_precision import (
    average_precisions,
    chance_average_precisions,
    precision_uncertainty,
)
from upcycle_bench.suite import EvalContext
from upcycle_bench.suites.few_shot import FewShot
from upcycle_bench.suites.zero_shot import ZeroShot
from upcycle_bench.util.errors import UserError

NAMES, TEMPLATES = ("red", "green", "blue", "nothing"), ("a {c} square", "{c}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares with up to three colours; no image shows the class `nothing`, and some show no class."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    samples = []
    for number in range(50):
        shown = [place for place in range(3) if (number >> place) % 2]
        pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
        pixels[..., shown] += 100
        samples.append((Image.fromarray(pixels), shown))
    evalset_write.write_multilabel(root / "colours", samples, NAMES, TEMPLATES)
    evalset_write.write_classification(root / "one", [(image, 0) for image, _ in samples], NAMES, TEMPLATES)
    return root


def context(root: Path, batch_size: int = 16) -> EvalContext:
    return context_of(tiny_clip(), root, batch_size=batch_size)


def test_average_precision_by_hand() -> None:
    # Class 0, by score: image 1 (right), 0 (wrong), 2 (right): (1/1 + 2/3) / 2. Class 1: images 0 and 1 tie and keep
    # the set's order, then image 2; the only right one is second, 1/2. No image shows class 2.
    score_NY = np.array([[0.5, 1.0, 0.3], [0.9, 1.0, 0.2], [0.1, 0.0, 0.1]])
    label_NY = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 0]])
    assert average_precisions(score_NY, label_NY).tolist() == pytest.approx([5 / 6, 1 / 2, 0])


def test_its_uncertainty_against_resamples_sorted_anew() -> None:
    rng = np.random.default_rng(0)
    label_NY = rng.random((80, 4)) < 0.3
    score_NY = label_NY + rng.normal(size=(80, 4))
    known = precision_uncertainty(score_NY, label_NY, draws=400)
    drawn = [rng.integers(0, 80, 80) for _ in range(400)]
    slow = np.std([average_precisions(score_NY[rows], label_NY[rows]).mean() for rows in drawn], ddof=1)
    assert known.standard_error == pytest.approx(slow, rel=0.2) and slow > 0.02
    mean = average_precisions(score_NY, label_NY).mean()
    half = 1.96 * known.standard_error
    assert known.interval == pytest.approx((mean - half, mean + half), rel=1e-4)
    assert precision_uncertainty(label_NY.astype(float), label_NY).interval == (1, 1)


def test_rare_classes_that_are_not_drawn_are_no_errors() -> None:
    """A draw of 100 images misses a class of one image with (1 - 1/100)^100 = 37 %."""
    label_NY = np.eye(100, 20, dtype=bool)
    perfect = precision_uncertainty(label_NY.astype(float), label_NY)
    assert (perfect.standard_error, perfect.interval) == (0, (1, 1))
    with_empty = precision_uncertainty(np.eye(100, 21), np.eye(100, 21) * (np.arange(21) < 20))
    low, high = with_empty.interval
    assert with_empty.standard_error == 0 and low <= 20 / 21 <= high  # class 20 has no image and counts as 0
    nothing = precision_uncertainty(np.zeros((9, 2)), np.zeros((9, 2)))
    assert (nothing.standard_error, nothing.interval) == (0, (0, 0))

    # The reference sorts every draw anew, averages over the classes that it shows, and counts the empty class as 0.
    rng = np.random.default_rng(0)
    label_NY = rng.permuted(np.arange(60)[:, None] < np.array([0, 1, 1, 2, 3, 18, 24, 30]), axis=0)
    score_NY = label_NY + 0.7 * rng.normal(size=(60, 8))
    slow = []
    for _ in range(400):
        rows = rng.integers(0, 60, 60)
        drawn_Y = label_NY[rows].any(axis=0)
        slow.append(average_precisions(score_NY[rows], label_NY[rows])[drawn_Y].mean() * 7 / 8)
    known = precision_uncertainty(score_NY, label_NY, draws=400)
    assert known.standard_error == pytest.approx(np.std(slow, ddof=1), rel=0.1)
    value, (low, high) = average_precisions(score_NY, label_NY).mean(), known.interval
    assert low < value < high


def test_chance_is_the_mean_over_all_orders() -> None:
    label_NY = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]])
    orders = [np.array(order)[:, None].repeat(4, 1) for order in itertools.permutations(range(5))]
    means = np.mean([average_precisions(order, label_NY) for order in orders], axis=0)
    np.testing.assert_allclose(chance_average_precisions(label_NY), means, rtol=1e-12)
    assert chance_average_precisions(np.ones((1, 1))).tolist() == [1.0]


def test_equals_clip_benchmarks_of_any_scores() -> None:
    rng = np.random.default_rng(0)
    score_NY, label_NY = rng.normal(size=(500, 20)).astype(np.float32), rng.random((500, 20)) < rng.random(20) / 3
    theirs_Y = average_precision_per_class(torch.from_numpy(score_NY), torch.from_numpy(label_NY))
    np.testing.assert_allclose(average_precisions(score_NY, label_NY), theirs_Y.numpy(), rtol=2e-6)


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")
def test_the_suite_equals_clip_benchmark(root: Path) -> None:
    """With CLIP_benchmark's reader, its classifier and its logits."""
    from clip_benchmark.datasets.builder import build_dataset

    given = context(root)
    dataset = build_dataset("wds/colours", root=str(root / "colours"), transform=given.transform, split="test")
    batches = [(images, torch.as_tensor(labels)) for images, labels in dataset.batched(16)]

    class Loader:
        def __init__(self) -> None:
            self.dataset = SimpleNamespace(classes=dataset.classes)

        def __iter__(self):
            return iter(batches)

    theirs = zeroshot_classification.evaluate(
        given.model, Loader(), given.tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    suite = ZeroShot.of_set(root / "colours")
    assert (suite.headlines, suite.headline_metric) == ({"colours": ("colours",)}, "mean_average_precision")
    result = suite.evaluate(given)
    (score,) = result.scores
    ((metric, value),) = theirs.items()
    print(
        f"colours/{metric}: ours {score.value:.6f}, CLIP_benchmark's {value:.6f}, difference {score.value - value:.1e}"
    )
    assert {score.metric: score.value} == pytest.approx(theirs, abs=1e-6)
    assert (score.samples, score.headline, score.higher_is_better) == (50, "colours", True)
    precision_Y = result.outcomes["colours/average_precision"]
    assert score.value == precision_Y.mean() and precision_Y[3] == 0
    assert 0.3 < score.chance < 0.5 < precision_Y[:3].max()  # half of the images show a colour; one class is empty
    assert list(result.outcomes) == ["colours/average_precision"] and result.notes == {}  # no logit scale
    (again,) = suite.evaluate(context(root, batch_size=7)).scores
    assert again.value == pytest.approx(score.value, abs=1e-9)


def test_beside_other_kinds(root: Path) -> None:
    found = ZeroShot(sets=("colours", "one"), headlines={"in": ("one",)}).evaluate(context(root))
    named = [(s.dataset, s.metric, s.headline) for s in found.scores]
    assert (named[0], named[-1]) == (("one", "log_rank", "in"), ("colours", "mean_average_precision", ""))
    assert list(found.notes["logit_scales"]) == ["one"]
    for settings, message in (
        ({"sets": ("colours",), "headlines": {"in": ("colours",)}}, "multilabel set colours 'log_rank'"),
        ({"sets": ("one", "colours"), "headlines": {"in": ("one", "colours")}}, "multilabel set colours 'log_rank'"),
    ):
        with pytest.raises(UserError, match=message):
            ZeroShot(**settings).evaluate(context(root))
    with pytest.raises(UserError, match="several labels an image; a probe needs one"):
        FewShot.of_set(root / "colours")
    task = {"pool": ("colours",), "test": ("one",), "shots": (1,), "validation": 1}
    with pytest.raises(UserError, match="a multilabel set; a probe needs a classification set"):
        FewShot(tasks={"colours": task}).evaluate(context(root))


def test_labels_that_do_not_fit_are_errors(root: Path, tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="label 4 is not one of 4 classes"):
        evalset_write.write_multilabel(tmp_path / "x", [(picture, (0, 4))], NAMES, TEMPLATES)
    evalset_write.write_multilabel(tmp_path / "short", [(picture, (0,))], NAMES, TEMPLATES)
    (tmp_path / "short" / "classnames.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"short: .* does not hold a 0 or 1 for each of the 3 classes") as caught:
        ZeroShot.of_set(tmp_path / "short").evaluate(context(tmp_path))
    assert "\n" not in str(caught.value)
