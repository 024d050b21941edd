"""The zero-shot suite: equal to CLIP_benchmark where both have a metric, independent of the batch size, never NaN."""

import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from pydantic import ValidationError

from upcycle_bench.assets import MODELS
from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data import evalset_write
from upcycle_bench.data.world import open_world
from upcycle_bench.data.worlds import digits
from upcycle_bench.evaluation.ranking import judge
from upcycle_bench.evaluation.texts import classification_task, encode_texts
from upcycle_bench.suite import EvalContext
from upcycle_bench.suites import zero_shot
from upcycle_bench.suites.zero_shot import ZeroShot
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.uncertainty import of_outcomes

SMOKE = json.loads((MODELS / "smoke-vit.json").read_text())
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
    evalset_write.write_retrieval(root / "captions", zip(pictures, captions, strict=True))
    labels = rng.integers(0, 3, 40).tolist()
    evalset_write.write_classification(root / "three", zip(pictures, labels, strict=True), ("a", "b", "c"), ("a {c}",))
    return root


@pytest.fixture(scope="module")
def model(root):
    """A random CLIP whose image projection is fitted to the digits, so that about half of its answers are right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(**SMOKE).eval()
    images, labels = zip(*evalsets.read(root / "digits-validation", TRANSFORM, 64).batches, strict=True)
    with torch.no_grad():
        text_YC = clip.encode_text(TOKENIZER(list(digits.WORDS)), normalize=True)
        projection, clip.visual.proj = clip.visual.proj, None
        pooled_ND = clip.encode_image(torch.cat(images))
        target_NC = (text_YC - text_YC.mean(dim=0))[np.concatenate(labels)]
        projection.copy_(torch.linalg.lstsq(pooled_ND, target_NC).solution)
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
        temperature_sets=("digits-validation",),
        primary=("digits-test", "captions"),
    )
    return suite.evaluate(context(model, root))


def test_every_score_says_how_sure_it_is(result):
    found = {(score.dataset, score.metric): score for score in result.scores}
    for score in found.values():
        assert score.interval[0] <= score.value <= score.interval[1] and score.standard_error >= 0
    outcomes = result.outcomes["digits-test/log_likelihood"].astype(float)
    error = outcomes.std(ddof=1) / len(outcomes) ** 0.5
    assert found["digits-test", "log_likelihood"].standard_error == pytest.approx(error, rel=1e-5)
    # Images have 1, 2 or 3 captions here, and the captions of one image depend on each other.
    text, image = (found["captions", f"{way}_retrieval_recall@5"] for way in ("text", "image"))
    assert (text.samples, image.samples) == (40, 79)
    assert text.standard_error == pytest.approx((text.value * (1 - text.value) / 40) ** 0.5)
    assert image.standard_error != pytest.approx((image.value * (1 - image.value) / 79) ** 0.5)


class Loader:
    """The part of a DataLoader that clip_benchmark uses."""

    def __init__(self, evalset):
        self.batches, self.dataset = evalset.batches, SimpleNamespace(classes=evalset.classnames)

    def __iter__(self):
        for images, beside in self.batches:
            yield images, torch.as_tensor(beside) if isinstance(beside, np.ndarray) else beside


def assert_parity(name: str, theirs: dict[str, float], result, tolerance: float) -> None:
    """All metrics of CLIP_benchmark agree; they are printed for `pytest -s`, as docs/protocols.md says."""
    for metric, value in theirs.items():
        ours = scores(result)[f"{name}/{metric}"]
        print(f"{name}/{metric}: ours {ours:.6f}, CLIP_benchmark's {value:.6f}, difference {abs(ours - value):.1e}")
        assert ours == pytest.approx(value, abs=tolerance), metric


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
    assert_parity(name, theirs, result, 1e-12)


@pytest.mark.parametrize("name", ["digits-retrieval", "captions"])
def test_retrieval_equals_clip_benchmark(model, root, result, name):
    loader = Loader(evalsets.read(root / name, TRANSFORM, 64))
    theirs = zeroshot_retrieval.evaluate(model, loader, TOKENIZER, "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert len(theirs) == 6
    assert_parity(name, theirs, result, 1e-6)  # CLIP_benchmark's is a mean in float32


def test_predictions_of_this_model_are_not_trivial(result):
    # Otherwise parity and batch independence would prove little.
    assert 0.3 < scores(result)["digits-test/acc1"] < 0.95
    assert 1 < result.outcomes["temperature/classification/logit_scale"] < 500
    assert len(np.unique(result.outcomes["captions/image_retrieval_rank"])) > 10


def test_scores_do_not_depend_on_the_batch_size(model, root, result):
    suite = ZeroShot(
        sets=("digits-test", "captions"), temperature_sets=("digits-validation",), primary=("digits-test",)
    )
    other = suite.evaluate(context(model, root, batch_size=7))
    for key, value in scores(other).items():
        assert value == pytest.approx(scores(result)[key], abs=1e-5), key
    for key, values in other.outcomes.items():
        if key.endswith(("rank", "correct@1", "correct@5", "correct@10")):
            np.testing.assert_array_equal(values, result.outcomes[key])
        else:
            np.testing.assert_allclose(values, result.outcomes[key], rtol=1e-4, atol=1e-5)


def test_scores_are_means_of_outcomes_with_direction_chance_and_samples(result):
    by_name = {f"{s.dataset}/{s.metric}": s for s in result.scores}
    assert len(by_name) == len(result.scores) == 4 + 8 + 8 + 3
    for s in result.scores:
        assert s.higher_is_better
        assert math.isfinite(s.value)
        assert s.chance is not None
    for metric, outcome in {
        "digits-test/log_likelihood": "digits-test/log_likelihood",
        "digits-test/acc1": "digits-test/correct@1",
        "digits-test/acc5": "digits-test/correct@5",
        "captions/text_retrieval_log_likelihood": "captions/text_retrieval_log_likelihood",
        "captions/image_retrieval_recall@10": "captions/image_retrieval_correct@10",
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


def test_a_gallery_below_k_has_no_recall_at_k(model, root, tmp_path):
    captions = [[f"{word} {j}" for j in range(2)] for word in digits.WORDS[:6]]
    pictures = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(6)]
    evalset_write.write_retrieval(tmp_path / "six", zip(pictures, captions, strict=True))
    found = ZeroShot(sets=("six",), primary=("six",)).evaluate(context(model, tmp_path))
    metrics = {s.metric for s in found.scores}
    assert "text_retrieval_recall@10" in metrics  # of twelve captions
    assert "image_retrieval_recall@5" in metrics and "image_retrieval_recall@10" not in metrics  # of six images
    assert "six/image_retrieval_correct@10" not in found.outcomes


def test_class_embeddings_equal_clip_benchmarks(model, root):
    evalset = evalsets.read(root / "digits-test", TRANSFORM, 64)
    theirs_CY = zeroshot_classification.zero_shot_classifier(
        model, TOKENIZER, list(evalset.classnames), list(evalset.templates), "cpu", amp=False
    )
    ours = classification_task(evalset, context(model, root, batch_size=7), {})
    torch.testing.assert_close(ours.gallery_GC, theirs_CY.T, rtol=0, atol=1e-6)
    assert ours.gallery_id_G.tolist() == list(range(10))


def test_equal_texts_have_equal_embeddings(model, root):
    texts = [f"the digit {word}" for word in (*digits.WORDS, *digits.WORDS[::-1])]
    embeddings = encode_texts(texts, "x", context(model, root, batch_size=3), {})
    assert torch.equal(embeddings, embeddings.flip(0))
    torch.testing.assert_close(embeddings[:10], encode_texts(texts[:10], "x", context(model, root), {}))


# ---- logit scales ----------------------------------------------------------------------------------------------


def mean_log_likelihood(model, root, name: str, scale: float) -> float:
    """Mean log-likelihood over the questions of a set."""
    evalset = evalsets.read(root / name, TRANSFORM, 64)
    asked = zero_shot.questions(evalset, context(model, root), {})
    return float(np.mean([judge(q.task, scale, name).log_likelihood_Q.mean() for q in asked]))


def scales(model, root, *temperature_sets: str, sets=("three", "digits-retrieval")) -> dict[str, float]:
    """The logit scale of each kind of `sets`."""
    suite = ZeroShot(sets=sets, temperature_sets=temperature_sets, primary=sets[:1])
    outcomes = suite.evaluate(context(model, root)).outcomes
    found = {name.split("/")[1]: values for name, values in outcomes.items() if name.startswith("temperature/")}
    assert all(values.dtype == np.float64 and values.shape == (1,) for values in found.values())
    return {kind: float(values[0]) for kind, values in found.items()}


def test_each_kind_has_the_scale_of_its_temperature_set(model, root):
    both = scales(model, root, "captions", "digits-validation")
    assert set(both) == {"classification", "retrieval"}
    assert both["classification"] != both["retrieval"]
    for kind, name in (("classification", "digits-validation"), ("retrieval", "captions")):
        best = mean_log_likelihood(model, root, name, both[kind])
        assert best > max(mean_log_likelihood(model, root, name, both[kind] * by) for by in (0.99, 1.01))
    assert scales(model, root, "digits-validation", "captions") == both


def test_the_only_temperature_set_is_that_of_the_other_kind_too(model, root):
    both = scales(model, root, "captions", "digits-validation")
    assert set(scales(model, root, "captions").values()) == {both["retrieval"]}
    assert set(scales(model, root, "digits-validation").values()) == {both["classification"]}
    # A kind that is not scored has no scale.
    assert scales(model, root, "captions", sets=("three",)) == {"classification": both["retrieval"]}
    assert scales(model, root, "captions", "digits-validation", sets=("three",)) == {
        "classification": both["classification"]
    }


def test_without_temperature_sets_the_scale_is_the_models_own(model, root):
    own = float(model.logit_scale.detach().exp())
    assert scales(model, root) == pytest.approx({"classification": own, "retrieval": own})


def test_scores_use_the_scale_of_their_kind(model, root):
    suite = ZeroShot(
        sets=("three", "digits-retrieval"), temperature_sets=("captions", "digits-validation"), primary=("three",)
    )
    result = suite.evaluate(context(model, root))
    for kind, name, metrics in (
        ("classification", "three", ["log_likelihood"]),
        ("retrieval", "digits-retrieval", ["text_retrieval_log_likelihood", "image_retrieval_log_likelihood"]),
    ):
        (scale,) = result.outcomes[f"temperature/{kind}/logit_scale"]
        mean = np.mean([scores(result)[f"{name}/{metric}"] for metric in metrics])
        assert mean == pytest.approx(mean_log_likelihood(model, root, name, scale), abs=1e-9)


# ---- strata and averages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def divided(root, tmp_path_factory):
    """Sets of 40 images in strata: `one` and `two` are classification, `two` without `unseen`; `pairs` is retrieval."""
    folder = tmp_path_factory.mktemp("divided")
    rng = np.random.default_rng(1)
    pictures = [Image.fromarray(p) for p in rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)]
    strata = ["seen", "unseen", "unseen", "seen-twice"] * 10
    for name, classes, labels in (("one", 10, strata), ("two", 8, ["seen"] * 30 + ["other"] * 10), ("few", 3, strata)):
        samples = zip(pictures, rng.integers(0, classes, 40).tolist(), strict=True)
        evalset_write.write_classification(folder / name, samples, digits.WORDS[:classes], ("the {c}",), labels)
    captions = [[f"{digits.WORDS[i % 10]} {j} {i}" for j in range(1 + i % 3)] for i in range(40)]
    for name, labels in (("pairs", strata), ("more", strata), ("plain", None)):
        evalset_write.write_retrieval(folder / name, zip(pictures, captions, strict=True), labels)
    return folder


def by_name(result) -> dict[str, object]:
    return {f"{s.dataset}/{s.metric}": s for s in result.scores}


def test_strata_are_means_over_their_queries_in_the_whole_gallery(model, divided):
    result = ZeroShot(sets=("one", "pairs"), primary=("one", "pairs")).evaluate(context(model, divided))
    found, strata = by_name(result), np.array(["seen", "unseen", "unseen", "seen-twice"] * 10)
    of_caption = np.repeat(strata, [1 + i % 3 for i in range(40)])
    asked = {"one/": strata, "pairs/text_retrieval_": strata, "pairs/image_retrieval_": of_caption}
    for prefix, strata_Q in asked.items():
        names = {"log_likelihood": "log_likelihood"}
        names |= {f"{'acc' if prefix == 'one/' else 'recall@'}{k}": f"correct@{k}" for k in (1, 5)}
        for metric, outcome in names.items():
            values = result.outcomes[prefix + outcome].astype(np.float64)
            for stratum in ("seen", "unseen", "seen-twice"):
                score = found[f"{prefix}{metric}[{stratum}]"]
                assert score.value == pytest.approx(values[strata_Q == stratum].mean(), abs=1e-6)
                assert score.samples == (strata_Q == stratum).sum()
                assert not score.primary and score.higher_is_better
    assert {name for name, s in found.items() if s.primary} == {
        "one/log_likelihood",
        "pairs/text_retrieval_log_likelihood",
    }
    assert not any(name.startswith("one/mean_per_class_recall[") for name in found)
    assert "pairs/text_retrieval_rank[seen]" not in result.outcomes
    # 3 metrics of 3 strata beside 4 of the whole; each way 4 of 3 beside 4
    assert len(result.scores) == 4 + 9 + 2 * (4 + 12)


def test_the_chance_of_a_stratum_is_that_of_its_queries(model, divided):
    found = by_name(ZeroShot(sets=("one", "pairs"), primary=("one",)).evaluate(context(model, divided)))
    assert found["one/acc5[seen]"].chance == 0.5
    # 79 captions. Of the ten images 0, 4, ..., 36 (seen) four have one caption, three have two and three have three.
    assert found["pairs/text_retrieval_recall@1[seen]"].chance == pytest.approx((4 * 1 + 3 * 2 + 3 * 3) / 10 / 79)
    assert found["pairs/image_retrieval_recall@1[seen]"].samples == 4 * 1 + 3 * 2 + 3 * 3
    assert found["pairs/image_retrieval_recall@1[seen]"].chance == 1 / 40


def test_captions_of_one_image_are_one_sample_in_a_stratum_too(model, divided):
    result = ZeroShot(sets=("pairs",), primary=("pairs",)).evaluate(context(model, divided))
    image_Q = np.repeat(np.arange(40), [1 + i % 3 for i in range(40)])
    seen_Q = image_Q % 4 == 0
    score = by_name(result)["pairs/image_retrieval_recall@10[seen]"]
    sure = of_outcomes(result.outcomes["pairs/image_retrieval_correct@10"][seen_Q], image_Q[seen_Q])
    assert (score.standard_error, score.interval) == (sure.standard_error, sure.interval)
    assert score.standard_error != pytest.approx((score.value * (1 - score.value) / score.samples) ** 0.5)


def test_strata_change_nothing_else(model, divided):
    suite = ZeroShot(sets=("pairs", "plain"), primary=("pairs",))
    result = suite.evaluate(context(model, divided))
    found = by_name(result)
    plain = {name.partition("/")[2]: s.value for name, s in found.items() if name.startswith("plain/")}
    assert len(plain) == 8 and not any("[" in metric for metric in plain)
    assert plain == {metric: found[f"pairs/{metric}"].value for metric in plain}


def test_averages_of_several_primary_sets_of_a_kind(model, divided):
    suite = ZeroShot(
        sets=("one", "two", "few", "pairs", "more", "plain"), primary=("one", "two", "pairs", "more", "plain")
    )
    found = by_name(suite.evaluate(context(model, divided)))
    average = {name.partition("/")[2]: s for name, s in found.items() if name.startswith("average/")}
    # `two` has no stratum "unseen" and `plain` has none at all, so that the means over retrieval sets are of the whole
    recalls = [f"recall@{k}" for k in (1, 5, 10)]
    ways = [f"{way}_retrieval_{m}" for way in ("text", "image") for m in ("log_likelihood", *recalls)]
    whole = ["log_likelihood", "acc1", "acc5"]
    assert set(average) == {*whole, "mean_per_class_recall", *(f"{m}[seen]" for m in whole), *ways}
    for metric, score in average.items():
        sets = ("pairs", "more", "plain") if metric in ways else ("one", "two")
        parts = [found[f"{name}/{metric}"] for name in sets]
        assert score.value == pytest.approx(np.mean([part.value for part in parts]))
        assert score.chance == pytest.approx(np.mean([part.chance for part in parts]))
        assert score.samples == sum(part.samples for part in parts)
        assert not score.primary and score.higher_is_better
    assert average["acc1"].chance == pytest.approx((1 / 10 + 1 / 8) / 2)
    assert (average["acc1"].samples, average["acc1[seen]"].samples) == (80, 10 + 30)


def test_a_metric_that_a_set_lacks_has_no_average(model, divided):
    found = by_name(
        ZeroShot(sets=("one", "few", "pairs"), primary=("one", "few", "pairs")).evaluate(context(model, divided))
    )
    average = {name.partition("/")[2] for name in found if name.startswith("average/")}
    # `few` has three classes; the only retrieval set is no average
    assert "acc5" not in average and "acc1[unseen]" in average
    assert not any("retrieval" in metric for metric in average)
    alone = ZeroShot(sets=("one", "two"), primary=("one",)).evaluate(context(model, divided))
    assert not any(s.dataset == "average" for s in alone.scores)


# ---- what is wrong ---------------------------------------------------------------------------------------------


def test_settings_are_checked():
    good = {"sets": ["a", "b"], "temperature_sets": ["c"], "primary": ["a"]}
    suite = ZeroShot(**good)
    assert suite.datasets() == ["a", "b", "c"]
    assert suite.config() == {
        "sets": ("a", "b"), "temperature_sets": ("c",), "primary": ("a",), "primary_metric": "log_likelihood"
    }  # fmt: skip
    assert ZeroShot(sets=["a"], primary=["a"]).temperature_sets == ()
    for bad, message in [
        ({"primary": ["x", "y"]}, "not in sets: x, y"),
        ({"temperature_sets": ["c", "b"]}, "must not be among the scored sets: b"),
        ({"sets": ["a", "a"]}, "sets names a set twice"),
        ({"temperature_sets": ["c", "c"]}, "temperature_sets names a set twice"),
        ({"primary": ["a", "a"]}, "primary names a set twice"),
        ({"sets": ["a", "average"]}, "must not be called average"),
        ({"primary": []}, "at least 1"),
    ]:
        with pytest.raises(ValidationError, match=message):
            ZeroShot(**(good | bad))


def test_what_is_wrong_with_sets_is_said_before_any_encoding(root, tmp_path):
    class Never(torch.nn.Module):
        def eval(self):
            raise AssertionError("reached the model")

    def evaluate(root=root, **settings):
        ZeroShot(**settings).evaluate(context(Never(), root))

    with pytest.raises(UserError, match="not found: x, z;"):
        evaluate(sets=["x", "digits-test"], temperature_sets=["z"], primary=["x"])
    with pytest.raises(UserError, match="three and digits-validation are both classification sets"):
        evaluate(sets=["captions"], temperature_sets=["three", "digits-validation"], primary=["captions"])
    with pytest.raises(UserError, match="captions and digits-retrieval are both retrieval sets"):
        evaluate(sets=["three"], temperature_sets=["captions", "digits-retrieval"], primary=["three"])
    with pytest.raises(UserError, match="retrieval set captions 'acc1'"):
        evaluate(sets=["captions"], primary=["captions"], primary_metric="acc1")
    with pytest.raises(UserError, match="classification set three 'acc5'"):
        evaluate(sets=["three"], primary=["three"], primary_metric="acc5")
    with pytest.raises(UserError, match=r"classification set three 'acc1\[seen\]'"):
        evaluate(sets=["three"], primary=["three"], primary_metric="acc1[seen]")
    picture = Image.new("RGB", (8, 8))
    evalset_write.write_classification(tmp_path / "cut", [(picture, 0)] * 3, ("a",), ("a {c}",), ["seen"] * 3)
    (tmp_path / "cut" / "strata.txt").write_text("seen\nnot seen\nseen\n")
    with pytest.raises(UserError, match=r"strata\.txt must hold a stratum"):
        evaluate(root=tmp_path, sets=["cut"], primary=["cut"])


def test_strata_too_few_are_an_error(model, tmp_path):
    picture = Image.new("RGB", (32, 32))
    for name in ("pairs", "classes"):
        if name == "pairs":
            evalset_write.write_retrieval(tmp_path / name, [(picture, ["a"])] * 3, ["seen"] * 3)
        else:
            evalset_write.write_classification(tmp_path / name, [(picture, 0)] * 3, ("a",), ("a {c}",), ["seen"] * 3)
        (tmp_path / name / "strata.txt").write_text("seen\nseen\n")
        with pytest.raises(UserError, match=rf"{name}: strata\.txt must hold .* each of 3 samples"):
            ZeroShot(sets=[name], primary=[name]).evaluate(context(model, tmp_path))


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


def test_the_chance_of_a_log_likelihood_is_the_mean_of_logs(result, model, divided):
    """Uniform guessing gives p right answers of G the probability p / G; the score is the mean of its logarithm."""
    # 14 images have one of the 79 captions, 13 have two and 13 have three; each caption has one of 40 images
    whole = (14 * math.log(1) + 13 * math.log(2) + 13 * math.log(3)) / 40 - math.log(79)
    assert by_name(result)["captions/text_retrieval_log_likelihood"].chance == pytest.approx(whole)
    assert by_name(result)["captions/image_retrieval_log_likelihood"].chance == pytest.approx(-math.log(40))
    # of the ten images 0, 4, ..., 36 (seen) four have one caption, three have two and three have three
    seen = (4 * math.log(1) + 3 * math.log(2) + 3 * math.log(3)) / 10 - math.log(79)
    found = by_name(ZeroShot(sets=("pairs",), primary=("pairs",)).evaluate(context(model, divided)))
    assert found["pairs/text_retrieval_log_likelihood[seen]"].chance == pytest.approx(seen)
