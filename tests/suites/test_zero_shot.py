"""The zero-shot suite: equal to CLIP_benchmark where both have a metric, independent of the batch size, never NaN."""

import copy
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
from upcycle_bench.evaluation.ranking import Task, fit_scale, judge
from upcycle_bench.evaluation.score import headlines_of, scores_of
from upcycle_bench.evaluation.texts import classification_task, encode_texts
from upcycle_bench.suite import EvalContext, is_average
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
    # 110 digits with one, two or three captions, so that each half has 55 images
    ((images, digit_N),) = evalsets.read(root / "digits-validation", np.asarray, 1000).batches
    texts = [
        [f"the digit {digits.WORDS[digit]} {j}" for j in range(1 + i % 3)] for i, digit in enumerate(digit_N[:110])
    ]
    drawn = [Image.fromarray(image) for image in images[:110]]
    evalset_write.write_retrieval(root / "written", zip(drawn, texts, strict=True))
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
        sets=("digits-test", "digits-retrieval", "captions", "three", "written"),
        headlines={"digits": ("digits-test", "written"), "captions": ("captions",)},
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
    assert all(1 < scale < 500 for scale in result.notes["logit_scales"]["digits-test"])
    assert len(np.unique(result.outcomes["captions/image_retrieval_rank"])) > 10


def test_scores_do_not_depend_on_the_batch_size(model, root, result):
    suite = ZeroShot(sets=("digits-test", "captions", "written"), headlines={"in": ("digits-test",)})
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
    # the sets one by one: no headline has two sets of a kind
    assert len(by_name) == len(result.scores) == 5 + 10 + 10 + 4 + 10
    for s in result.scores:
        assert s.higher_is_better is not s.metric.endswith("log_rank")
        assert math.isfinite(s.value)
        assert s.chance is not None
    for metric, outcome in {
        "digits-test/log_rank": "digits-test/log_rank",
        "digits-test/log_likelihood": "digits-test/log_likelihood",
        "digits-test/acc1": "digits-test/correct@1",
        "digits-test/acc5": "digits-test/correct@5",
        "captions/image_retrieval_log_rank": "captions/image_retrieval_log_rank",
        "captions/text_retrieval_log_likelihood": "captions/text_retrieval_log_likelihood",
        "captions/image_retrieval_recall@10": "captions/image_retrieval_correct@10",
    }.items():
        assert by_name[metric].value == pytest.approx(result.outcomes[outcome].mean(dtype=np.float64), abs=1e-6)
        assert by_name[metric].samples == len(result.outcomes[outcome])
    chances = {"log_likelihood": -math.log(10), "acc1": 0.1, "acc5": 0.5, "mean_per_class_recall": 0.1}
    chances["log_rank"] = math.log(math.factorial(10)) / 10
    assert {m: by_name[f"digits-test/{m}"].chance for m in chances} == pytest.approx(chances, abs=1e-15)
    assert by_name["digits-retrieval/image_retrieval_recall@5"].chance == 5 / 30
    assert by_name["captions/text_retrieval_log_likelihood"].samples == 40
    assert by_name["captions/image_retrieval_log_likelihood"].samples == 79  # 14 * 1 + 13 * 2 + 13 * 3
    retrieved = {f"{name}/{way}_retrieval_log_rank" for name in ("captions", "written") for way in ("text", "image")}
    assert {name for name, s in by_name.items() if s.headline} == {"digits-test/log_rank"} | retrieved


def test_a_gallery_below_k_has_no_recall_at_k(model, root, tmp_path):
    captions = [[f"{word} {j}" for j in range(2)] for word in digits.WORDS[:6]]
    pictures = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(6)]
    evalset_write.write_retrieval(tmp_path / "six", zip(pictures, captions, strict=True))
    found = ZeroShot(sets=("six",), headlines={"in": ("six",)}).evaluate(context(model, tmp_path))
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


def asked_of(model, root, name: str, batch_size=64) -> list[zero_shot.Question]:
    """The questions of a set."""
    return zero_shot.questions(evalsets.read(root / name, TRANSFORM, 64), context(model, root, batch_size), {})


def own_scale(model) -> float:
    return float(model.logit_scale.detach().exp())


def only_samples(question: zero_shot.Question, samples: list[int]) -> tuple[Task, list[int]]:
    """The queries of these samples alone, and their places; a caption belongs to the image whose number is its id."""
    ids = question.task.query_id_Q.tolist()
    of_query = ids if question.prefix else range(len(ids))
    places = [place for place, sample in enumerate(of_query) if sample in set(samples)]
    task = question.task
    return Task(task.queries_QC[places], task.gallery_GC, task.query_id_Q[places], task.gallery_id_G), places


@pytest.mark.parametrize("name", ["digits-test", "written"])
def test_each_half_is_scored_at_the_scale_that_fits_the_other(model, root, result, name):
    asked = asked_of(model, root, name)
    (one, _), (two, _) = halves = zero_shot.scored_halves(asked, name, own_scale(model))
    assert [scale for _, scale in halves] == result.notes["logit_scales"][name]
    for scored, fitted, (_, scale) in ((one, two, halves[0]), (two, one, halves[1])):
        others = [only_samples(question, fitted.tolist())[0] for question in asked]

        def mean(scale, tasks=others):
            return np.mean([judge(task, scale, name).log_likelihood_Q.mean() for task in tasks])

        assert scale == pytest.approx(fit_scale(others, name), rel=1e-9) and 1 < scale < 500
        assert mean(scale) > max(mean(scale * 0.99), mean(scale * 1.01))
        for question in asked:
            task, places = only_samples(question, scored.tolist())
            expected = judge(task, scale, name)
            found = result.outcomes[f"{name}/{question.prefix}log_likelihood"][places]
            np.testing.assert_allclose(found, expected.log_likelihood_Q, rtol=1e-6)
    assert halves[0][1] != halves[1][1] and own_scale(model) not in result.notes["logit_scales"][name]


def test_a_score_is_the_mean_over_both_halves_each_at_its_scale(model, root, result):
    name, total = "digits-test", 0.0
    (question,) = asked_of(model, root, name)
    for half, scale in zero_shot.scored_halves([question], name, 1.0):
        total += judge(only_samples(question, half.tolist())[0], scale, name).log_likelihood_Q.sum()
    assert scores(result)["digits-test/log_likelihood"] == pytest.approx(total / 359, abs=1e-12)


def made_up(samples: int, seed: int, prefix: str = "", captions: int = 1) -> zero_shot.Question:
    """A question that is answered better than by chance; with a prefix each sample has answers of its own."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(samples) if prefix else torch.randint(5, (samples,), generator=generator)
    answers = torch.arange(samples).repeat(captions) if prefix else torch.arange(5)
    gallery = torch.nn.functional.normalize(torch.randn(len(answers), 8, generator=generator), dim=1)
    queries = gallery[label_N] + 0.7 * torch.randn(samples, 8, generator=generator)
    task = Task(torch.nn.functional.normalize(queries, dim=1), gallery, label_N, answers)
    return zero_shot.Question(prefix, task, np.array([]))


@pytest.mark.parametrize("samples", [1, 2, 99, 100, 101, 359])
def test_halves_are_disjoint_and_cover_all_samples(samples):
    for prefix in ("", "text_retrieval_"):
        (one, _), (two, _) = zero_shot.scored_halves([made_up(samples, 0, prefix)], "x", 14.0)
        assert sorted([*one.tolist(), *two.tolist()]) == list(range(samples))
        assert len(one) - len(two) in (0, 1)


def test_the_name_of_the_set_alone_draws_its_halves(model, root):
    """Neither labels nor embeddings nor the batch size; and a set of captions is halved by its images, whatever way."""

    def halves(asked, name="x"):
        return [half.tolist() for half, _ in zero_shot.scored_halves(asked, name, 14.0)]

    usual = halves([made_up(200, 0)])
    assert halves([made_up(200, 1)]) == halves([made_up(200, 2, "text_retrieval_", captions=3)]) == usual
    assert halves([made_up(200, 0)], "y") != usual and usual[0] != list(range(100))
    for name in ("digits-test", "written"):
        assert halves(asked_of(model, root, name, batch_size=7), name) == halves(asked_of(model, root, name), name)


def test_captions_of_one_image_stay_in_one_half(model, root):
    asked = asked_of(model, root, "written")
    of_images, of_texts = asked
    (one, first), (two, second) = zero_shot.scored_halves(asked, "written", 14.0)
    scale_Q = of_texts.scale_Q([(one, first), (two, second)])
    of_image = {image: set(scale_Q[of_texts.task.query_id_Q == image].tolist()) for image in range(110)}
    assert of_image == {image: {first if image in one else second} for image in range(110)}
    assert of_images.scale_Q([(one, first), (two, second)]).tolist() == [
        first if image in one else second for image in range(110)
    ]
    assert len(scale_Q) > 200 and of_texts.of_samples(one).tolist() == [
        image in one for image in of_texts.task.query_id_Q.tolist()
    ]


def test_halves_of_fewer_than_50_samples_have_the_models_own_scale(model, root, result):
    own = own_scale(model)
    for samples in (1, 98, 99):
        found = zero_shot.scored_halves([made_up(samples, 0)], "x", 14.0)
        assert [scale for _, scale in found] == [14.0, 14.0]
    fitted = [scale for _, scale in zero_shot.scored_halves([made_up(100, 0)], "x", 14.0)]
    assert 14.0 not in fitted and fitted[0] != fitted[1]
    for name in ("captions", "three", "digits-retrieval"):  # of 40, 40 and 30 images
        assert result.notes["logit_scales"][name] == pytest.approx([own, own])
        for question in asked_of(model, root, name):
            expected = judge(question.task, own, name).log_likelihood_Q
            found = result.outcomes[f"{name}/{question.prefix}log_likelihood"]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_the_result_notes_the_scales_of_every_set(model, root, result):
    assert list(result.notes) == ["logit_scales"]
    noted = sorted(result.notes["logit_scales"])
    assert noted == sorted(["digits-test", "digits-retrieval", "captions", "three", "written"])
    assert all(len(pair) == 2 for pair in result.notes["logit_scales"].values())
    assert json.loads(json.dumps(result.notes)) == result.notes
    assert not any(name.startswith("temperature") for name in result.outcomes)


def test_neither_scale_nor_halves_move_a_log_rank(model, root, result):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.logit_scale.add_(2.0)
    moved = ZeroShot(sets=("captions", "digits-test"), headlines={"in": ("captions",)}).evaluate(context(other, root))
    changed = {name for name, value in scores(moved).items() if value != scores(result)[name]}
    assert changed == {f"captions/{way}_retrieval_log_likelihood" for way in ("text", "image")}
    for question in asked_of(model, root, "written"):
        expected = judge(question.task, 1.0, "written").log_rank_Q.mean()
        assert scores(result)[f"written/{question.prefix}log_rank"] == pytest.approx(expected, abs=1e-12)


# ---- headline scores -------------------------------------------------------------------------------------------


def test_a_headline_is_the_mean_of_its_parts(result):
    scored = scores_of({"zero-shot": result})
    found = headlines_of(scored)
    assert list(found) == ["digits", "captions"]
    parts = {
        "digits": ["digits-test/log_rank", *(f"written/{way}_retrieval_log_rank" for way in ("text", "image"))],
        "captions": [f"captions/{way}_retrieval_log_rank" for way in ("text", "image")],
    }
    for name, metrics in parts.items():
        of_name = [by_name(result)[metric] for metric in metrics]
        assert {f"{s.dataset}/{s.metric}" for s in result.scores if s.headline == name} == set(metrics)
        assert found[name]["value"] == pytest.approx(np.mean([score.value for score in of_name]))
        assert found[name]["chance"] == pytest.approx(np.mean([score.chance for score in of_name]))
        assert found[name]["higher_is_better"] is False
    # A model that knows the digits is better than chance, one that knows nothing of the captions is not.
    assert found["digits"]["value"] < found["digits"]["chance"] - 0.5
    assert found["captions"]["value"] == pytest.approx(found["captions"]["chance"], abs=0.5)


def test_another_headline_metric_has_its_own_direction(model, divided):
    sets = {"sets": ("pairs", "one"), "headlines": {"in": ("pairs",)}}
    for metric, higher in (("recall@1", True), ("log_likelihood", True), ("log_rank", False)):
        result = ZeroShot(**sets, headline_metric=metric).evaluate(context(model, divided))
        assert {name for name, score in by_name(result).items() if score.headline} == {
            f"pairs/{way}_retrieval_{metric}" for way in ("text", "image")
        }
        assert headlines_of(scores_of({"zero-shot": result}))["in"]["higher_is_better"] is higher


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
    result = ZeroShot(sets=("one", "pairs"), headlines={"in": ("one", "pairs")}).evaluate(context(model, divided))
    found, strata = by_name(result), np.array(["seen", "unseen", "unseen", "seen-twice"] * 10)
    of_caption = np.repeat(strata, [1 + i % 3 for i in range(40)])
    asked = {"one/": strata, "pairs/text_retrieval_": strata, "pairs/image_retrieval_": of_caption}
    for prefix, strata_Q in asked.items():
        names = {metric: metric for metric in ("log_rank", "log_likelihood")}
        names |= {f"{'acc' if prefix == 'one/' else 'recall@'}{k}": f"correct@{k}" for k in (1, 5)}
        for metric, outcome in names.items():
            values = result.outcomes[prefix + outcome].astype(np.float64)
            for stratum in ("seen", "unseen", "seen-twice"):
                score = found[f"{prefix}{metric}[{stratum}]"]
                assert score.value == pytest.approx(values[strata_Q == stratum].mean(), abs=1e-6)
                assert score.samples == (strata_Q == stratum).sum()
                assert not score.headline and score.higher_is_better is (metric != "log_rank")
    assert {name: s.headline for name, s in found.items() if s.headline} == {
        "one/log_rank": "in",
        "pairs/text_retrieval_log_rank": "in",
        "pairs/image_retrieval_log_rank": "in",
    }
    assert not any(name.startswith("one/mean_per_class_recall[") for name in found)
    assert "pairs/text_retrieval_rank[seen]" not in result.outcomes
    # 4 metrics of 3 strata beside 5 of the whole; each way 5 of 3 beside 5
    assert len(result.scores) == 5 + 12 + 2 * (5 + 15)


def test_the_chance_of_a_stratum_is_that_of_its_queries(model, divided):
    found = by_name(ZeroShot(sets=("one", "pairs"), headlines={"in": ("one",)}).evaluate(context(model, divided)))
    assert found["one/acc5[seen]"].chance == 0.5
    # 79 captions. Of the ten images 0, 4, ..., 36 (seen) four have one caption, three have two and three have three.
    assert found["pairs/text_retrieval_recall@1[seen]"].chance == pytest.approx((4 * 1 + 3 * 2 + 3 * 3) / 10 / 79)
    assert found["pairs/image_retrieval_recall@1[seen]"].samples == 4 * 1 + 3 * 2 + 3 * 3
    assert found["pairs/image_retrieval_recall@1[seen]"].chance == 1 / 40


def test_captions_of_one_image_are_one_sample_in_a_stratum_too(model, divided):
    result = ZeroShot(sets=("pairs",), headlines={"in": ("pairs",)}).evaluate(context(model, divided))
    image_Q = np.repeat(np.arange(40), [1 + i % 3 for i in range(40)])
    seen_Q = image_Q % 4 == 0
    score = by_name(result)["pairs/image_retrieval_recall@10[seen]"]
    sure = of_outcomes(result.outcomes["pairs/image_retrieval_correct@10"][seen_Q], image_Q[seen_Q])
    assert (score.standard_error, score.interval) == (sure.standard_error, sure.interval)
    assert score.standard_error != pytest.approx((score.value * (1 - score.value) / score.samples) ** 0.5)


def test_strata_change_nothing_else(model, divided):
    suite = ZeroShot(sets=("pairs", "plain"), headlines={"in": ("pairs",)})
    result = suite.evaluate(context(model, divided))
    found = by_name(result)
    plain = {name.partition("/")[2]: s.value for name, s in found.items() if name.startswith("plain/")}
    assert len(plain) == 10 and not any("[" in metric for metric in plain)
    assert plain == {metric: found[f"pairs/{metric}"].value for metric in plain}


def test_each_headline_has_averages_over_its_sets_of_a_kind(model, divided):
    headlines = {"in": ("one", "two", "pairs"), "shift": ("more", "plain")}
    suite = ZeroShot(sets=("one", "two", "few", "pairs", "more", "plain"), headlines=headlines)
    found = by_name(suite.evaluate(context(model, divided)))
    recalls = [f"recall@{k}" for k in (1, 5, 10)]
    ways = [f"{way}_retrieval_{m}" for way in ("text", "image") for m in ("log_rank", "log_likelihood", *recalls)]
    whole = ["log_rank", "log_likelihood", "acc1", "acc5"]
    average = {
        headline: {name.removeprefix(start): s for name, s in found.items() if name.startswith(start)}
        for headline in headlines
        for start in [f"average/{headline}/"]
    }
    assert sum(map(len, average.values())) == sum(name.startswith("average") for name in found)
    # `two` has no stratum "unseen". `pairs` is the only one of its kind in this headline, so that it has no average.
    # `plain` has no strata, so that the means over these sets are of the whole.
    metrics = [*whole, "mean_per_class_recall", *(f"{m}[seen]" for m in whole)]
    assert set(average["in"]) == set(metrics)
    assert set(average["shift"]) == set(ways)
    for headline, scored in average.items():
        for metric, score in scored.items():
            sets = [name for name in headlines[headline] if (name in ("one", "two")) is ("retrieval" not in metric)]
            parts = [found[f"{name}/{metric}"] for name in sets]
            assert score.value == pytest.approx(np.mean([part.value for part in parts]))
            assert score.chance == pytest.approx(np.mean([part.chance for part in parts]))
            assert score.samples == sum(part.samples for part in parts)
            assert not score.headline and score.higher_is_better is ("log_rank" not in metric)
    assert average["in"]["acc1"].chance == pytest.approx((1 / 10 + 1 / 8) / 2)
    assert (average["in"]["acc1"].samples, average["in"]["acc1[seen]"].samples) == (80, 10 + 30)


def test_a_metric_that_a_set_lacks_has_no_average(model, divided):
    suite = ZeroShot(sets=("one", "few", "pairs"), headlines={"in": ("one", "few", "pairs")})
    found = by_name(suite.evaluate(context(model, divided)))
    average = {name.removeprefix("average/in/") for name in found if name.startswith("average/")}
    # `few` has three classes; the only retrieval set of the suite is no average
    assert "acc5" not in average and "acc1[unseen]" in average
    assert not any("retrieval" in metric for metric in average)
    alone = ZeroShot(sets=("one", "pairs"), headlines={"in": ("one", "pairs")}).evaluate(context(model, divided))
    assert not any(is_average(s.dataset) for s in alone.scores)


# ---- what is wrong ---------------------------------------------------------------------------------------------


def test_settings_are_checked():
    good = {"sets": ["a", "b"], "headlines": {"in": ["a"]}}
    suite = ZeroShot(**good)
    assert suite.datasets() == ["a", "b"]
    assert suite.config() == {"sets": ("a", "b"), "headlines": {"in": ("a",)}, "headline_metric": "log_rank"}
    assert ZeroShot(**good | {"headlines": {"in": ["a"], "shift": ["b"]}}).headlines == {"in": ("a",), "shift": ("b",)}
    for bad, message in [
        ({"headlines": {"in": ["x", "y"]}}, "headlines name what is not in sets: x, y"),
        ({"headlines": {"in": ["a"], "shift": ["b", "z"]}}, "headlines name what is not in sets: z"),
        ({"sets": ["a", "a"]}, "sets names a set twice"),
        ({"headlines": {"in": ["a", "a"]}}, "headlines names a set twice"),
        ({"headlines": {"in": ["a"], "shift": ["b", "a"]}}, "headlines names a set twice"),
        ({"sets": ["a", "average"]}, "must not be called average"),
        ({"sets": ["a", "average/in"]}, "must not be called average"),
        ({"headlines": {"in": ["a"], "shift": []}}, "headlines: shift names no set"),
        ({"headlines": {"": ["a"]}}, "headlines: one without a name"),
        ({"headlines": {}}, "at least 1"),
        ({"sets": []}, "at least 1"),
    ]:
        with pytest.raises(ValidationError) as caught:
            ZeroShot(**(good | bad))
        (problem,) = caught.value.errors()
        assert message in problem["msg"] and "\n" not in problem["msg"]


def test_what_is_wrong_with_sets_is_said_before_any_encoding(root, tmp_path):
    class Never(torch.nn.Module):
        def eval(self):
            raise AssertionError("reached the model")

    def evaluate(root=root, **settings):
        ZeroShot(**settings).evaluate(context(Never(), root))

    with pytest.raises(UserError, match="not found: x, z;"):
        evaluate(sets=["x", "digits-test", "z"], headlines={"in": ["x"]})
    three, captions = ({"sets": ["three", "captions"], "headlines": {"in": [name]}} for name in ("three", "captions"))
    for settings, metric, message in (
        (captions, "acc1", "headline_metric of the retrieval set captions 'acc1'"),
        (captions, "text_retrieval_recall@1", "retrieval set captions 'text_retrieval_recall@1'"),  # it is of one way
        (three, "recall@1", "headline_metric of the classification set three 'recall@1'"),
        (three, "acc5", "classification set three 'acc5'"),  # of three classes
        (three, "acc1[seen]", "classification set three 'acc1[seen]'"),
        (three, "log_rnk", "did you mean 'log_rank'"),
        (three | {"headlines": {"in": ["three"], "other": ["captions"]}}, "acc1", "retrieval set captions 'acc1'"),
    ):
        with pytest.raises(UserError) as caught:
            evaluate(**settings, headline_metric=metric)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    picture = Image.new("RGB", (8, 8))
    evalset_write.write_classification(tmp_path / "cut", [(picture, 0)] * 3, ("a",), ("a {c}",), ["seen"] * 3)
    (tmp_path / "cut" / "strata.txt").write_text("seen\nnot seen\nseen\n")
    with pytest.raises(UserError, match=r"strata\.txt must hold a stratum"):
        evaluate(root=tmp_path, sets=["cut"], headlines={"in": ["cut"]})


def test_strata_too_few_are_an_error(model, tmp_path):
    picture = Image.new("RGB", (32, 32))
    for name in ("pairs", "classes"):
        if name == "pairs":
            evalset_write.write_retrieval(tmp_path / name, [(picture, ["a"])] * 3, ["seen"] * 3)
        else:
            evalset_write.write_classification(tmp_path / name, [(picture, 0)] * 3, ("a",), ("a {c}",), ["seen"] * 3)
        (tmp_path / name / "strata.txt").write_text("seen\nseen\n")
        with pytest.raises(UserError, match=rf"{name}: strata\.txt must hold .* each of 3 samples"):
            ZeroShot(sets=[name], headlines={"in": [name]}).evaluate(context(model, tmp_path))


def test_a_diverged_model_is_an_error_not_a_perfect_score(model, root):
    broken = open_clip.CLIP(**SMOKE).eval()
    with torch.no_grad():
        broken.visual.proj.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        ZeroShot(sets=["three"], headlines={"in": ["three"]}).evaluate(context(broken, root))


def test_global_random_state_is_left_alone(model, root):
    before = torch.get_rng_state()
    ZeroShot(sets=["three"], headlines={"in": ["three"]}).evaluate(context(model, root))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_chance_of_a_log_likelihood_is_the_mean_of_logs(result, model, divided):
    """Uniform guessing gives p right answers of G the probability p / G; the score is the mean of its logarithm."""
    # 14 images have one of the 79 captions, 13 have two and 13 have three; each caption has one of 40 images
    whole = (14 * math.log(1) + 13 * math.log(2) + 13 * math.log(3)) / 40 - math.log(79)
    assert by_name(result)["captions/text_retrieval_log_likelihood"].chance == pytest.approx(whole)
    assert by_name(result)["captions/image_retrieval_log_likelihood"].chance == pytest.approx(-math.log(40))
    # of the ten images 0, 4, ..., 36 (seen) four have one caption, three have two and three have three
    seen = (4 * math.log(1) + 3 * math.log(2) + 3 * math.log(3)) / 10 - math.log(79)
    found = by_name(ZeroShot(sets=("pairs",), headlines={"in": ("pairs",)}).evaluate(context(model, divided)))
    assert found["pairs/text_retrieval_log_likelihood[seen]"].chance == pytest.approx(seen)
