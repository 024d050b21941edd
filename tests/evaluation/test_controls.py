"""The controls of a certificate: labels and class names dealt out anew are scored at chance, or something leaks."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic.dataclasses import dataclass
from torch import Tensor

from tests.evaluation.contexts import context_of
from tests.evaluation.sets import NAMES, write_sets
from tests.helpers import tiny_clip
from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data import evalset_write
from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation import features
from upcycle_bench.evaluation.features import encode_images
from upcycle_bench.evaluation.shuffled_labels import DRAWS, LIMIT, permuted, score_shuffled, together, z_of
from upcycle_bench.record import ControlPart
from upcycle_bench.suite import EvalContext, Score, SuiteInfo, SuiteResult
from upcycle_bench.suites.zero_shot import ZeroShot
from upcycle_bench.util.errors import Unsound
from upcycle_bench.util.rng import Stream


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder


def controls(root: Path, suite: ZeroShot, weights: str = "w", **context: Any) -> tuple[list[ControlPart], str | None]:
    return score_shuffled({suite.info.name: suite}, context_of(tiny_clip(), root, **context), weights)


# ---- what a control deals out --------------------------------------------------------------------------------------

READ: list[tuple[EvalSet, Any, Any]] = []


@dataclass(frozen=True, kw_only=True)
class Reading(ZeroShot):
    """Zero-shot that notes what it reads."""

    def evaluate(self, context: EvalContext) -> SuiteResult:
        for name in self.sets:
            evalset = evalsets.read(context.root / name, np.asarray, 256)
            ((images, beside),) = evalset.batches
            READ.append((evalset, np.stack(list(images)), beside))
        return super().evaluate(context)


@pytest.fixture
def read() -> Iterator[list[tuple[EvalSet, Any, Any]]]:
    READ.clear()
    yield READ
    READ.clear()


def tints(images: Any) -> np.ndarray:
    """The class of each picture, if it is red, green or blue."""
    return np.asarray(images.reshape(len(images), -1, 3).mean(axis=1).argmax(axis=1))


def test_labels_are_dealt_out_anew_in_each_draw(root: Path, read: list[Any]) -> None:
    """60 red and 60 green pictures: half of the labels are right by chance, 63 of 120 give or take 8 (1.5 sigma)."""
    (labels, classes), _ = controls(root, Reading(sets=("colours",), headlines={"in": ("colours",)}))
    draws = read[:DRAWS]
    assert {evalset.classnames for evalset, _, _ in draws} == {("red", "green")}
    assert len({tuple(dealt) for _, _, dealt in draws}) == DRAWS  # no two draws are alike
    assert all(np.bincount(dealt).tolist() == [60, 60] for _, _, dealt in draws)
    assert all(np.array_equal(images, draws[0][1]) for _, images, _ in draws)  # and the pictures are always the same
    right = [np.mean(tints(images) == np.asarray(dealt)) for _, images, dealt in draws]
    assert min(right) > 0.35 and max(right) < 0.65
    assert (labels.permuted, labels.draws, len(labels.z_of_draws)) == ("labels", DRAWS, DRAWS)
    assert labels.z == pytest.approx(sum(labels.z_of_draws) / 2)  # over the root of 4 draws
    assert (classes.permuted, classes.draws, classes.bound, classes.chance) == ("classes", 2, 0.5, 0.5)


def test_class_names_are_permuted_and_labels_stay(root: Path, read: list[Any]) -> None:
    controls(root, Reading(sets=("colours",), headlines={"in": ("colours",)}))
    lists = read[DRAWS:]
    assert [evalset.classnames for evalset, _, _ in lists] == [("green", "red"), ("red", "green")]
    assert all(np.array_equal(tints(images), labels) for _, images, labels in lists)


def test_captions_are_dealt_out_anew(root: Path, read: list[Any]) -> None:
    (part,), _ = controls(root, Reading(sets=("pairs",), headlines={"in": ("pairs",)}))
    assert (part.dataset, part.samples, part.draws, len(read)) == ("pairs", 128, DRAWS, DRAWS)
    ((originals, true_captions),) = evalsets.read(root / "pairs", np.asarray, 200).batches
    of_image = {image.tobytes(): texts for image, texts in zip(originals, true_captions, strict=True)}
    for _, images, captions in read:
        own = [of_image[image.tobytes()] for image in images]
        assert sorted(captions) == sorted(own)
        agree = [one == texts for one, texts in zip(own, captions, strict=True)]
        assert np.mean(agree) < 0.04


def test_other_weights_draw_other_labels_and_the_same_weights_the_same(root: Path, read: list[Any]) -> None:
    suite = Reading(sets=("colours", "pairs"), headlines={"in": ("colours",)})
    first, again, other = (controls(root, suite, weights)[0] for weights in ("one", "one", "other"))
    assert first == again and first != other
    labels = [tuple(beside) for evalset, _, beside in read if evalset.kind == "classification"]
    drawn = [set(labels[start : start + DRAWS]) for start in range(0, len(labels), DRAWS + 2)]
    assert drawn[0] == drawn[1] and not drawn[0] & drawn[2]


def test_all_draws_encode_each_input_once(root: Path) -> None:
    seen: list[Tensor] = []
    clip = tiny_clip()
    clip.model.visual.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    suite = ZeroShot(sets=("colours", "pairs"), headlines={"in": ("colours",)})
    score_shuffled({"zero-shot": suite}, context_of(clip, root), "w")
    images = torch.cat(seen)
    assert 128 < len(images) == len(images.unique(dim=0)) < 120 + 128  # the two sets have pictures in common


@pytest.mark.parametrize("number", range(2, 10))
def test_no_place_has_one_class_in_two_lists(number: int) -> None:
    classes = [f"class {place}" for place in range(number)]
    lists = permuted(classes, Stream(("a test", number)))
    assert len(lists) == min(number, DRAWS)
    assert all(sorted(each) == classes for each in lists)
    assert all(len(set(place)) == len(lists) for place in zip(*lists, strict=True))
    assert (classes in lists) == (number <= DRAWS)


# ---- false alarms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 8])
def test_all_draws_together_are_no_farther_from_chance_than_a_normal_number(classes: int) -> None:
    """500 models with answers of their own, and balanced labels: LIMIT would be 5 standard deviations."""
    rng, found = np.random.default_rng(classes), []
    labels = np.repeat(np.arange(classes), 256 // classes)
    for _ in range(500):
        answers = rng.choice(classes, 256, p=rng.dirichlet(np.ones(classes)))
        right = [float(np.mean(answers == rng.permutation(labels))) for _ in range(DRAWS)]
        z_D = [z_of(Score(dataset="d", metric="acc1", value=value, higher_is_better=True, chance=1 / classes,
                          samples=256, standard_error=0.1)) for value in right]  # fmt: skip
        found.append(together([z for z in z_D if z is not None]))
    assert np.mean(found) < 0.1 and np.std(found) < 1.1 and max(found) < LIMIT - 1


def test_a_draw_without_a_right_answer_does_not_hide_the_others() -> None:
    def recall(value: float, error: float) -> float:
        made = Score(dataset="d", metric="recall@1", value=value, higher_is_better=True, chance=0.004, samples=250,
                     standard_error=error)  # fmt: skip
        z = z_of(made)
        assert z is not None
        return z

    assert recall(0.0, 0.0) == -8
    assert together([recall(0.0, 0.0), recall(0.5, 0.03), recall(0.5, 0.03), recall(0.5, 0.03)]) > LIMIT


# ---- leaks ---------------------------------------------------------------------------------------------------------


def test_leaking_labels_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image features are made of the labels, so every answer is right, shuffled or not."""
    honest = features.encode_images

    def leaking(evalset: EvalSet, context: EvalContext) -> tuple[Tensor, list[Any]]:
        embeddings_NC, labels = honest(evalset, context)
        if evalset.kind == "classification":
            texts = context.tokenizer([evalset.templates[0].format(c=name) for name in evalset.classnames])
            with torch.no_grad():
                embeddings_NC = context.model.encode_text(texts, normalize=True)[torch.as_tensor(labels)]  # type: ignore[operator]
        return embeddings_NC, labels

    monkeypatch.setattr("upcycle_bench.evaluation.texts.encode_images", leaking)
    with pytest.raises(Unsound) as caught:
        controls(root, ZeroShot(sets=("colours", "pairs"), headlines={"in": ("colours",)}))
    assert re.search(
        r"with shuffled labels zero-shot gives log_likelihood -?0\.00\d\d on 120 samples of colours, where chance is "
        r"-0.6931 \([\d,]+ standard errors better\); labels leak into the answers.$",
        str(caught.value),
    )


@dataclass(frozen=True, kw_only=True)
class Memorised(ZeroShot):
    """It knows pictures: their tint. What it answers is the number of the class that it learned by heart."""

    info: ClassVar[SuiteInfo] = SuiteInfo(name="memorised", summary="s", paper="p", version=1)
    by_name: ClassVar[bool] = False

    def evaluate(self, context: EvalContext) -> SuiteResult:
        evalset = evalsets.read(context.root / self.sets[0], context.transform, 256)
        _, labels = encode_images(evalset, context)
        pictures = torch.cat([images for images, _ in evalset.batches])
        tint_N = pictures.mean(dim=(2, 3)).argmax(dim=1).tolist()
        names = list(evalset.classnames)
        answers = [names.index(NAMES[tint]) if self.by_name else tint for tint in tint_N]
        share = float(np.mean(np.array(answers) == np.array(labels)))
        made = Score(dataset=evalset.name, metric="acc1", value=share, higher_is_better=True, chance=1 / len(names),
                     samples=len(labels), headline="in", standard_error=0.05)  # fmt: skip
        return SuiteResult([made], {})


class Naming(Memorised):
    """Its honest twin answers with the class of that name."""

    by_name: ClassVar[bool] = True


def test_a_suite_that_ignores_class_names_is_refused(root: Path) -> None:
    """Shuffled labels do not show it: it answers from the picture, and is right as often as chance."""
    with pytest.raises(Unsound) as caught:
        controls(root, Memorised(sets=("colours",), headlines={"in": ("colours",)}))
    assert str(caught.value) == (
        "the evaluation is not sound: with the list of classes permuted in 2 ways memorised gives acc1 1.0000 on 120 "
        "samples of colours, where answers from class names reach 0.5000 at most; it knows the labels by another way."
    )
    (labels, classes), without = controls(root, Naming(sets=("colours",), headlines={"in": ("colours",)}))
    assert without is None and abs(labels.z or 0) < LIMIT
    assert classes.value == 0.5  # each picture is right in one of the two lists


@dataclass(frozen=True, kw_only=True)
class Learning(ZeroShot):
    """It says that it learns from labels of the set."""

    info: ClassVar[SuiteInfo] = SuiteInfo(name="learning", summary="s", paper="p", version=1, learns=True)


# ---- sets without a control ----------------------------------------------------------------------------------------


def test_small_sets_have_no_control(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(p) for p in rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)]
    evalset_write.write_classification(tmp_path / "few", zip(pictures, [0, 1] * 20, strict=True), ("a", "b"), ("{c}",))
    found, without = controls(tmp_path, ZeroShot(sets=("few",), headlines={"in": ("few",)}))
    assert found == []
    assert without == "zero-shot: evaluation set few: 40 samples are too few for a control."


def test_a_kind_of_set_without_a_control_is_named_beside_one_that_has_some(root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = (Image.fromarray(p) for p in rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8))
    captioned = ((picture, [f"picture {number}"]) for number, picture in enumerate(pictures))
    evalset_write.write_retrieval(tmp_path / "few", captioned)
    (tmp_path / "colours").symlink_to(root / "colours")
    found, without = controls(tmp_path, ZeroShot(sets=("colours", "few"), headlines={"in": ("colours",)}))
    assert [(part.dataset, part.permuted) for part in found] == [("colours", "labels"), ("colours", "classes")]
    assert without == "zero-shot: evaluation set few: 40 samples are too few for a control."


def test_a_suite_that_learns_from_the_labels_it_scores_has_the_first_control_alone(root: Path) -> None:
    found, without = controls(root, Learning(sets=("colours",), headlines={"in": ("colours",)}))
    assert [part.permuted for part in found] == ["labels"] and without is None
