"""Pairs one word apart: scores against numbers worked by hand, chance, errors by clusters, skipped sets.

Shape suffixes: P pairs, I images and S captions of a pair.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from upcycle_bench.data import evalset_write
from upcycle_bench.suite import EvalContext, SuiteResult
from upcycle_bench.suites.compositional import CHANCE, Compositional, judge_pairs
from upcycle_bench.util.errors import UserError


class Coloured(torch.nn.Module):
    """The embedding of an image is its mean colour, that of a text the colour in `colours` for its tokens."""

    def __init__(self, colours: dict[str, tuple[float, float, float]]) -> None:
        super().__init__()
        self.known = list(colours)
        self.colour_VD = torch.tensor(list(colours.values()))

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[self.known.index(text)] for text in texts])

    def encode_image(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return images_B3HW.mean(dim=(2, 3))

    def encode_text(self, text_BL: torch.Tensor) -> torch.Tensor:
        return self.colour_VD[text_BL[:, 0]]


RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sets of squares with captions, one of them without pairs, and a set of labels."""
    pictures = {name: Image.new("RGB", (4, 4), name) for name in ("red", "lime", "blue", "yellow")}
    shown = [("red", "box left"), ("lime", "box right"), ("blue", "bell"), ("yellow", "bell off"), ("red", "a star")]
    for name in ("squares", "again"):
        evalset_write.write_retrieval(tmp_path / name, [(pictures[colour], [caption]) for colour, caption in shown])
    evalset_write.write_retrieval(tmp_path / "lonely", [(pictures["red"], ["red"]), (pictures["blue"], ["blue"])])
    evalset_write.write_classification(tmp_path / "labels", [(pictures["red"], 0)], ("a", "b"), ("{c}",))
    return tmp_path


def context(root: Path, model: Coloured, batch_size: int = 256) -> EvalContext:
    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image).astype(np.float32).transpose(2, 0, 1) / 255)

    return EvalContext(
        model=model, tokenizer=model.tokenize, transform=transform, root=root, device=torch.device("cpu"),
        batch_size=batch_size,
    )  # fmt: skip


def model() -> Coloured:
    """It knows left from right. One text of the bells is green, nearer to yellow than to blue; the other is red."""
    return Coloured({"box left": RED, "box right": GREEN, "bell": GREEN, "bell off": RED})


def values(result: SuiteResult) -> dict[tuple[str, str], float]:
    return {(score.dataset, score.metric): score.value for score in result.scores}


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")
def test_a_set_worked_by_hand(root: Path) -> None:
    """Cosines: box left with red 1, with lime 0; box right the other way round: all four right.

    Yellow is (1, 1, 0) / sqrt 2. "bell", green: with blue 0, with yellow 0.71. "bell off", red: with blue 0, with
    yellow 0.71. So blue has a tie, yellow too: no text score; "bell" prefers yellow, which is wrong, "bell off" prefers
    yellow, which is right: no image score; one comparison of four is right.
    """
    result = Compositional(sets=("squares", "lonely")).evaluate(context(root, model()))
    found = values(result)
    assert {name for name, _ in found} == {"squares"}  # one set has no mean over sets
    expected = {"text_score": (1 + 0) / 2, "image_score": 1 / 2, "group_score": 1 / 2, "pairwise_accuracy": 5 / 8}
    assert {metric: found["squares", metric] for metric in CHANCE} == expected
    assert {metric: found["squares", f"{metric}[swapped]"] for metric in CHANCE} == dict.fromkeys(CHANCE, 1.0)
    assert found["squares", "pairwise_accuracy[added]"] == 1 / 4
    assert [(s.metric, s.headline) for s in result.scores if s.headline] == [("group_score", "compositional")]
    assert {score.metric: score.chance for score in result.scores if "[" not in score.metric} == CHANCE
    assert result.skipped == {"lonely": "no two of its captions differ by exactly one word."}
    assert result.notes["squares"] | {"manifest": ""} == {"images": 5, "candidates": 2, "pairs": 2, "manifest": ""}
    names = [(row["words"], row["pairs"], row["pairwise_accuracy"]) for row in result.notes["words"]]
    assert names == [("- / off", 1, 0.25), ("left / right", 1, 1.0)]
    assert result.outcomes["squares/group"].tolist() == [True, False]
    assert result.outcomes["squares/comparisons"].tolist() == [4, 1]


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")
def test_the_mean_over_sets_and_the_batch(root: Path) -> None:
    suite = Compositional(sets=("squares", "again"))
    result, other = suite.evaluate(context(root, model())), suite.evaluate(context(root, model(), batch_size=2))
    found = values(result)
    assert found["average", "group_score"] == found["squares", "group_score"] == 1 / 2
    assert values(other) == found
    # Equal words are one cluster in both sets. So twice the pairs are no more clusters, and have the error of one set.
    errors = {score.dataset: score.standard_error for score in result.scores if score.metric == "pairwise_accuracy"}
    assert errors["average"] == pytest.approx(errors["squares"])
    samples = {(score.dataset, score.metric): score.samples for score in result.scores}
    assert (samples["squares", "group_score"], samples["average", "group_score"]) == (2, 4)
    assert {(score.dataset, score.metric, score.headline) for score in result.scores if score.headline} == {
        (name, "group_score", "compositional") for name in ("squares", "again")
    }


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")
def test_what_cannot_be_scored_says_why(root: Path) -> None:
    with pytest.raises(UserError, match="compositional: lonely: no two captions differ"):
        Compositional(sets=("lonely",)).evaluate(context(root, model()))
    with pytest.raises(UserError, match="compositional: labels: labels, not captions"):
        Compositional(sets=("squares", "labels")).evaluate(context(root, model()))
    with pytest.raises(UserError, match="evaluation set not found: nowhere"):
        Compositional(sets=("nowhere",)).sources(root)
    with pytest.raises(ValidationError, match="sets are different"):
        Compositional(sets=("squares", "squares"))


def embeddings(count: int, width: int, seed: int) -> torch.Tensor:
    """Random unit vectors [P, 2, C]."""
    return F.normalize(torch.randn(count, 2, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_shuffled_control_is_at_chance(shuffled: bool) -> None:
    """Each image is near its caption. With the images of other pairs all scores are at chance."""
    count = 8000
    texts_PSC = embeddings(count, 256, 0)
    images_PIC = F.normalize(texts_PSC + 0.5 * embeddings(count, 256, 1), dim=-1)
    if shuffled:
        images_PIC = images_PIC.roll(1, dims=0)
    judged = judge_pairs(images_PIC, texts_PSC)
    for metric, chance in CHANCE.items():
        expected = chance if shuffled else 1.0
        error = float(judged[metric].std()) / math.sqrt(count)
        assert judged[metric].mean() == pytest.approx(expected, abs=4 * error), metric


def test_captions_exchanged_by_a_coin_are_right_half_the_time() -> None:
    """A coin exchanges the captions of a pair. The two images are alike, as in a real model."""
    count = 8000
    texts_PSC = embeddings(count, 32, 0)
    images_PIC = F.normalize(texts_PSC + embeddings(1, 32, 1) + 0.5 * embeddings(count, 32, 2), dim=-1)
    exchanged = torch.rand(count, generator=torch.Generator().manual_seed(3)) < 0.5
    control_PSC = torch.where(exchanged[:, None, None], texts_PSC.flip(1), texts_PSC)
    judged = judge_pairs(images_PIC, control_PSC)
    assert judge_pairs(images_PIC, texts_PSC)["pairwise_accuracy"].mean() > 0.9
    accuracy = judged["pairwise_accuracy"]
    assert accuracy.mean() == pytest.approx(0.5, abs=4 * accuracy.std() / math.sqrt(count))
    # With equal images a model has the right text for one image of every pair, so the text score is 0.
    blind = judge_pairs(embeddings(1, 32, 1)[:, :1].expand(count, 2, 32), texts_PSC)
    assert (blind["text_score"].mean(), blind["image_score"].mean()) == (0, 0)
    # Of four comparisons one is right, for a text: equal images tie, and a tie is wrong.
    assert blind["pairwise_accuracy"].mean() == 0.25


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")
def test_intervals_are_not_empty_and_stay_between_0_and_1(root: Path) -> None:
    result = Compositional(sets=("squares", "again")).evaluate(context(root, model()))
    assert {score.value for score in result.scores} >= {0.0, 0.5, 1.0}
    for score in result.scores:
        assert score.interval is not None
        low, high = score.interval
        assert 0 <= low <= score.value <= high <= 1 and high - low > 0.3, score
