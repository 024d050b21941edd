"""The zero-shot suite: equal to CLIP_benchmark where both have a metric, independent of the batch size, never NaN."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from pydantic import ValidationError

import upcycle_bench
from upcycle_bench import evalsets
from upcycle_bench.errors import UserError
from upcycle_bench.suite import EvalContext
from upcycle_bench.suites import zero_shot
from upcycle_bench.suites.zero_shot import Task, ZeroShot, chance_at_k, fit_scale, judge
from upcycle_bench.worlds import digits, open_world

SMOKE = json.loads((Path(upcycle_bench.__file__).parent / "models" / "smoke-vit.json").read_text())
TRANSFORM = open_clip.image_transform(8, is_train=False)
TOKENIZER = open_clip.SimpleTokenizer(context_length=SMOKE["text_cfg"]["context_length"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "digits"
    digits.build(folder, seed=0)
    root = open_world("digits", folder).eval_root
    # several captions for some images, and fewer than five classes
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(p) for p in rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)]
    captions = [[f"{digits.WORDS[i % 10]} {j} {i}" for j in range(1 + i % 3)] for i in range(40)]
    evalsets.write_retrieval(root / "captions", zip(pictures, captions, strict=True))
    labels = rng.integers(0, 3, 40).tolist()
    evalsets.write_classification(root / "three", zip(pictures, labels, strict=True), ("a", "b", "c"), ("a {c}",))
    return root


@pytest.fixture(scope="module")
def model(root):
    """A random CLIP whose image projection is fitted to the digits: half-right, so its scores say something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**SMOKE).eval()
    images, labels = zip(*evalsets.read(root / "digits-validation", TRANSFORM, 64).batches, strict=True)
    with torch.no_grad():
        text_CD = clip.encode_text(TOKENIZER(list(digits.WORDS)), normalize=True)
        projection, clip.visual.proj = clip.visual.proj, None
        pooled_NW = clip.encode_image(torch.cat(images))
        target_ND = (text_CD - text_CD.mean(dim=0))[np.concatenate(labels)]
        projection.copy_(torch.linalg.lstsq(pooled_NW, target_ND).solution)
        clip.visual.proj = projection
    return clip


def context(model, root, batch_size=64) -> EvalContext:
    return EvalContext(
        model=model,
        tokenizer=TOKENIZER,
        transform=TRANSFORM,
        root=root,
        device=torch.device("cpu"),
        batch_size=batch_size,
    )


def scores(result) -> dict[str, float]:
    return {f"{s.dataset}/{s.metric}": s.value for s in result.scores}


@pytest.fixture(scope="module")
def result(model, root):
    suite = ZeroShot(
        sets=("digits-test", "digits-retrieval", "captions", "three"),
        temperature_set="digits-validation",
        primary=("digits-test", "captions"),
    )
    return suite.evaluate(context(model, root))


class Loader:
    """What clip_benchmark asks of a DataLoader."""

    def __init__(self, evalset):
        self.batches, self.dataset = evalset.batches, SimpleNamespace(classes=evalset.classnames)

    def __iter__(self):
        for images, beside in self.batches:
            yield images, torch.as_tensor(beside) if isinstance(beside, np.ndarray) else beside


@pytest.mark.parametrize("name", ["digits-test", "three"])
def test_classification_equals_clip_benchmark(model, root, result, name):
    evalset = evalsets.read(root / name, TRANSFORM, 64)
    theirs = zeroshot_classification.evaluate(
        model, Loader(evalset), TOKENIZER, list(evalset.classnames), list(evalset.templates), "cpu", amp=False
    )
    if name == "three":
        assert math.isnan(theirs.pop("acc5"))
        assert "three/acc5" not in scores(result)
        assert "three/correct@5" not in result.outcomes
    for metric, value in theirs.items():
        assert scores(result)[f"{name}/{metric}"] == pytest.approx(value, abs=1e-12), metric


@pytest.mark.parametrize("name", ["digits-retrieval", "captions"])
def test_retrieval_equals_clip_benchmark(model, root, result, name):
    loader = Loader(evalsets.read(root / name, TRANSFORM, 64))
    theirs = zeroshot_retrieval.evaluate(model, loader, TOKENIZER, "cpu", amp=False, recall_k_list=[1, 5])
    assert len(theirs) == 4
    for metric, value in theirs.items():
        assert scores(result)[f"{name}/{metric}"] == pytest.approx(value, abs=1e-6), metric  # theirs is a float32 mean


def test_predictions_of_this_model_are_not_trivial(result):
    # Otherwise parity and batch independence would prove little.
    assert 0.3 < scores(result)["digits-test/acc1"] < 0.95
    assert 1 < result.outcomes["temperature/logit_scale"] < 500
    assert len(np.unique(result.outcomes["captions/image_retrieval_rank"])) > 10


def test_scores_do_not_depend_on_the_batch_size(model, root, result):
    suite = ZeroShot(sets=("digits-test", "captions"), temperature_set="digits-validation", primary=("digits-test",))
    other = suite.evaluate(context(model, root, batch_size=7))
    for key, value in scores(other).items():
        assert value == pytest.approx(scores(result)[key], abs=1e-5), key
    for key, values in other.outcomes.items():
        if key.endswith(("rank", "correct@1", "correct@5")):
            np.testing.assert_array_equal(values, result.outcomes[key])
        else:
            np.testing.assert_allclose(values, result.outcomes[key], rtol=1e-4, atol=1e-5)


def test_scores_are_means_of_outcomes_with_direction_chance_and_samples(result):
    by_name = {f"{s.dataset}/{s.metric}": s for s in result.scores}
    assert len(by_name) == len(result.scores) == 4 + 6 + 6 + 3
    for s in result.scores:
        assert s.higher_is_better
        assert math.isfinite(s.value)
        assert s.chance is not None
    for metric, outcome in {
        "digits-test/log_likelihood": "digits-test/log_likelihood",
        "digits-test/acc1": "digits-test/correct@1",
        "digits-test/acc5": "digits-test/correct@5",
        "captions/text_retrieval_log_likelihood": "captions/text_retrieval_log_likelihood",
        "captions/image_retrieval_recall@5": "captions/image_retrieval_correct@5",
    }.items():
        assert by_name[metric].value == pytest.approx(result.outcomes[outcome].mean(dtype=np.float64), abs=1e-6)
        assert by_name[metric].samples == len(result.outcomes[outcome])
    chances = {"log_likelihood": -math.log(10), "acc1": 0.1, "acc5": 0.5, "mean_per_class_recall": 0.1}
    assert {m: by_name[f"digits-test/{m}"].chance for m in chances} == pytest.approx(chances, abs=1e-15)
    assert by_name["digits-retrieval/image_retrieval_recall@5"].chance == 5 / 30
    assert by_name["captions/text_retrieval_log_likelihood"].samples == 40
    assert by_name["captions/image_retrieval_log_likelihood"].samples == 79  # 14 * 1 + 13 * 2 + 13 * 3
    primary = {name for name, s in by_name.items() if s.primary}
    assert primary == {"digits-test/log_likelihood", "captions/text_retrieval_log_likelihood"}


def test_judge_by_hand():
    # Gallery: x axis, y axis, x axis again. Query 0 = x axis, right answer 2: answer 0 ties with it and stands first,
    # so rank 1. Query 1 = (0.6, 0.8), right answers 0 and 2 (cosine 0.6) behind answer 1 (0.8): rank 1 again.
    task = Task(
        torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        torch.tensor([5, 7]),
        torch.tensor([7, 6, 7]),
    )
    tie = Task(task.queries_QD[:1], task.gallery_GD, torch.tensor([5]), torch.tensor([7, 6, 5]))
    judged = judge(tie, 2.0, "x")
    assert judged.rank_Q.tolist() == [1]
    # softmax of 2 * (1, 0, 1): e^2 / (2 e^2 + 1)
    assert judged.log_likelihood_Q[0] == pytest.approx(2 - math.log(2 * math.exp(2) + 1))
    both = judge(Task(task.queries_QD[1:], task.gallery_GD, torch.tensor([7]), task.gallery_id_G), 2.0, "x")
    assert both.rank_Q.tolist() == [1]
    assert both.right_Q.tolist() == [2]
    # both right answers count: 2 e^1.2 / (2 e^1.2 + e^1.6)
    right, wrong = 2 * math.exp(1.2), math.exp(1.6)
    assert both.log_likelihood_Q[0] == pytest.approx(math.log(right / (right + wrong)), abs=1e-6)
    with pytest.raises(UserError, match="x: a sample has no right answer"):
        judge(task, 2.0, "x")


def test_blocks_do_not_change_the_judgement():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(50, 8, generator=generator), torch.randn(20, 8, generator=generator)
    task = Task(queries, gallery, torch.arange(50) % 20, torch.arange(20))
    small, large = judge(task, 3.0, "x", block=7), judge(task, 3.0, "x")
    np.testing.assert_array_equal(small.rank_Q, large.rank_Q)
    np.testing.assert_allclose(small.log_likelihood_Q, large.log_likelihood_Q, rtol=1e-12)


def test_fitted_scale_is_the_best_of_a_grid():
    generator = torch.Generator().manual_seed(0)
    gallery = torch.nn.functional.normalize(torch.randn(6, 16, generator=generator), dim=1)
    labels = torch.arange(600) % 6
    queries = torch.nn.functional.normalize(gallery[labels] + 0.7 * torch.randn(600, 16, generator=generator), dim=1)
    task = Task(queries, gallery, labels, torch.arange(6))

    def mean(scale: float) -> float:
        return float(judge(task, scale, "x").log_likelihood_Q.mean())

    scale = fit_scale(task)
    grid = np.geomspace(1e-2, 1e3, 300)
    best = max(grid, key=mean)
    assert grid[0] < best < grid[-1]
    assert mean(scale) >= mean(best)
    assert scale == pytest.approx(best, rel=0.05)


def test_temperature_is_fitted_on_its_set_or_the_models_own(model, root, result):
    def mean(scale: float) -> float:
        task = zero_shot.classification_task(
            evalsets.read(root / "digits-validation", TRANSFORM, 64), context(model, root)
        )
        return float(judge(task, scale, "x").log_likelihood_Q.mean())

    (scale,) = result.outcomes["temperature/logit_scale"]
    assert mean(scale) > max(mean(scale * 1.2), mean(scale / 1.2))
    own = ZeroShot(sets=("digits-retrieval",), primary=("digits-retrieval",)).evaluate(context(model, root))
    assert own.outcomes["temperature/logit_scale"] == pytest.approx([float(model.logit_scale.detach().exp())])


def test_chance_counts_all_right_answers():
    assert chance_at_k(np.array([1, 1, 1]), 10, 5) == 0.5
    # two of four answers right, two drawn: all but the one wrong pair of six
    assert chance_at_k(np.array([2]), 4, 2) == pytest.approx(5 / 6)
    assert chance_at_k(np.array([1, 2]), 4, 2) == pytest.approx((1 / 2 + 5 / 6) / 2)


def test_settings_are_checked():
    good = {"sets": ["a", "b"], "temperature_set": "c", "primary": ["a"]}
    suite = ZeroShot(**good)
    assert suite.datasets() == ["a", "b", "c"]
    assert suite.config() == {
        "sets": ("a", "b"), "temperature_set": "c", "primary": ("a",), "primary_metric": "log_likelihood"
    }  # fmt: skip
    for bad, message in [
        ({"primary": ["x", "y"]}, "not in sets: x, y"),
        ({"temperature_set": "b"}, "must not be one of the scored sets"),
        ({"sets": ["a", "a"]}, "twice"),
        ({"primary": []}, "at least 1"),
    ]:
        with pytest.raises(ValidationError, match=message):
            ZeroShot(**(good | bad))


def test_what_is_wrong_with_sets_is_said_before_any_encoding(root):
    class Never(torch.nn.Module):
        def eval(self):
            raise AssertionError("reached the model")

    def evaluate(**settings):
        ZeroShot(**settings).evaluate(context(Never(), root))

    with pytest.raises(UserError, match="not found: x, z;"):
        evaluate(sets=["x", "digits-test"], temperature_set="z", primary=["x"])
    with pytest.raises(UserError, match="temperature_set 'captions' must be a classification set"):
        evaluate(sets=["three"], temperature_set="captions", primary=["three"])
    with pytest.raises(UserError, match="retrieval set captions 'acc1'"):
        evaluate(sets=["captions"], primary=["captions"], primary_metric="acc1")
    with pytest.raises(UserError, match="classification set three 'acc5'"):
        evaluate(sets=["three"], primary=["three"], primary_metric="acc5")


def test_a_diverged_model_is_an_error_not_a_perfect_score(model, root):
    broken = open_clip.CLIP(**SMOKE).eval()
    with torch.no_grad():
        broken.visual.proj.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        ZeroShot(sets=["three"], primary=["three"]).evaluate(context(broken, root))


def test_global_random_state_is_left_alone(model, root):
    before = torch.get_rng_state()
    ZeroShot(sets=["three"], primary=["three"]).evaluate(context(model, root))
    assert torch.equal(torch.get_rng_state(), before)
