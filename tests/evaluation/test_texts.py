"""Texts are encoded once for each file of weights; a change of any input misses the cache; damage is noticed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.evaluation.contexts import context_of
from tests.helpers import MODEL, tiny_clip
from upcycle_bench.data import evalset_write
from upcycle_bench.data.evalset import EvalSet
from upcycle_bench.evaluation.embedding_cache import remembered
from upcycle_bench.evaluation.texts import class_embeddings, cut_texts, encode_texts
from upcycle_bench.model import padding
from upcycle_bench.suite import EvalContext
from upcycle_bench.suites.zero_shot import ZeroShot

SET = EvalSet("animals", "classification", ("dog", "cat", "owl"), ("{c}", "a photo of a {c}"), ())
CAPTIONS = ("a dog", "two cats", "a dog")


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of embeddings, in a cache of this test alone."""
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


class Towers:
    """A CLIP that counts what its towers encode: the shapes of text batches, the number of images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clip = tiny_clip()
        self.clip.model.eval()
        self.text_shapes: list[tuple[int, ...]] = []
        self.images = 0
        encode_text, encode_image = padding.encode_text, self.clip.model.encode_image

        def text(model: Any, text_BL: torch.Tensor) -> torch.Tensor:
            self.text_shapes.append(tuple(text_BL.shape))
            return encode_text(model, text_BL)

        def image(images_B3HW: torch.Tensor) -> torch.Tensor:
            self.images += len(images_B3HW)
            return encode_image(images_B3HW)

        monkeypatch.setattr(padding, "encode_text", text)
        monkeypatch.setattr(self.clip.model, "encode_image", image)

    def texts(self) -> int:
        """The number of texts encoded since the last call."""
        seen, self.text_shapes = self.text_shapes, []
        return sum(rows for rows, *_ in seen)

    def context(self, **changes: Any) -> EvalContext:
        return replace(context_of(self.clip, batch_size=16, weights="w" * 64), **changes)


@pytest.fixture
def towers(features: Path, monkeypatch: pytest.MonkeyPatch) -> Towers:
    return Towers(monkeypatch)


def test_a_second_evaluation_calls_no_text_tower(towers: Towers, tmp_path: Path) -> None:
    root, rng = tmp_path / "sets", np.random.default_rng(0)
    pictures = [Image.fromarray(p) for p in rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)]
    evalset_write.write_classification(
        root / "one", zip(pictures, [0, 1, 2] * 8, strict=True), SET.classnames, SET.templates
    )
    evalset_write.write_multilabel(
        root / "many", zip(pictures, [(0, 1)] * 24, strict=True), SET.classnames, SET.templates
    )
    pairs = [(picture, [f"number {i}", "a dog"]) for i, picture in enumerate(pictures)]
    evalset_write.write_retrieval(root / "pairs", pairs)
    suite = ZeroShot(sets=("one", "many", "pairs"), headlines={"in": ("one",)})

    first = suite.evaluate(towers.context(root=root))
    # The two sets share their classes, and all images share the caption "a dog".
    assert (towers.texts(), towers.images) == (3 * 2 + 24 + 1, 3 * 24)
    second = suite.evaluate(towers.context(root=root))
    assert (towers.texts(), towers.images) == (0, 6 * 24)
    assert second.scores == first.scores
    for name, values in first.outcomes.items():
        np.testing.assert_array_equal(second.outcomes[name], values)
    suite.evaluate(towers.context(root=root, weights=""))  # unknown weights: nothing is taken from the cache
    assert towers.texts() == 31


def test_what_could_change_an_embedding_misses(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    class_embeddings(SET, towers.context(), {})
    assert towers.texts() == 6
    class_embeddings(replace(SET, name="other name", kind="multilabel"), towers.context(), {})
    assert towers.texts() == 0
    shorter = open_clip.get_tokenizer(MODEL, context_length=7)
    for evalset, changes in (
        (SET, {"weights": "v" * 64}),
        (SET, {"tokenizer": shorter}),
        (SET, {"tokenizer": lambda texts: towers.clip.tokenize([text.upper() + "!" for text in texts])}),
        (SET, {"batch_size": 5}),  # or a test that batches do not matter would compare a file with itself
        (replace(SET, templates=("{c}", "a painting of a {c}")), {}),
        (replace(SET, templates=SET.templates[::-1]), {}),
        (replace(SET, classnames=("dog", "cat", "cow")), {}),
        (replace(SET, classnames=("cat", "dog", "owl")), {}),
    ):
        class_embeddings(evalset, towers.context(**changes), {})
        assert towers.texts() == 6, (evalset, changes)
    encode_texts(CAPTIONS, "x", towers.context(), {})
    encode_texts(["two cats", "a dog"], "x", towers.context(), {})  # the same in another order
    assert towers.texts() == 2 + 2
    monkeypatch.setenv("UPCYCLE_BENCH_EXPERTS", "deepspeed")
    encode_texts(CAPTIONS, "x", towers.context(), {})
    assert towers.texts() == 2


def test_the_cache_gives_what_the_model_gives(towers: Towers) -> None:
    fresh = (
        encode_texts(CAPTIONS, "x", towers.context(weights=""), {}),
        class_embeddings(SET, towers.context(weights=""), {}),
    )
    for _ in range(2):
        known: dict[str, torch.Tensor] = {}
        texts_NC = encode_texts(CAPTIONS, "x", towers.context(), known)
        assert torch.equal(texts_NC, fresh[0]) and torch.equal(texts_NC[0], texts_NC[2])
        assert torch.equal(class_embeddings(SET, towers.context(), {}), fresh[1])
        assert set(known) == set(CAPTIONS)


def test_batches_are_as_long_as_their_longest_text(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    class_embeddings(SET, towers.context(batch_size=4), {})
    assert [rows for rows, _ in towers.text_shapes] == [4, 2]
    lengths: set[int] = set()
    attention = F.scaled_dot_product_attention

    def watched(query_BNLD: torch.Tensor, *others: torch.Tensor, is_causal: bool) -> torch.Tensor:
        lengths.add(query_BNLD.shape[2])
        return attention(query_BNLD, *others, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    encode_texts(["dog", "cat"], "x", towers.context(), {})
    assert lengths == {3} and towers.clip.model.context_length > 3  # start of text, the word, end of text


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "replaced"])
def test_a_damaged_file_is_noticed_and_made_anew(towers: Towers, features: Path, damage: str) -> None:
    fresh = encode_texts(CAPTIONS, "x", towers.context(), {})
    (path,) = features.iterdir()
    whole = path.read_bytes()
    towers.texts()
    middle = len(whole) // 2
    for broken in {
        "cut": [whole[:-9], whole[:middle]],
        "flipped": [
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(130, len(whole) - 200, 37)
        ],
        "empty": [b""],
        "replaced": [b"<html>not found</html>"],
    }[damage]:
        path.write_bytes(broken)
        with pytest.warns(UserWarning, match="is damaged .*; it is made anew"):
            again = encode_texts(CAPTIONS, "x", towers.context(), {})
        assert torch.equal(again, fresh)
        assert towers.texts() == 2
        assert path.read_bytes()[-200:] == whole[-200:]
    encode_texts(CAPTIONS, "x", towers.context(), {})
    assert towers.texts() == 0


def test_a_build_that_fails_leaves_nothing(towers: Towers, features: Path) -> None:
    def broken() -> dict[str, np.ndarray]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        remembered(["x"], towers.context(), broken, broken)
    assert list(features.iterdir()) == []


@pytest.mark.parametrize("name", ["__version__", "get_num_threads", "get_float32_matmul_precision"])
def test_another_torch_or_another_way_of_rounding_misses(
    towers: Towers, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class_embeddings(SET, towers.context(), {})
    class_embeddings(SET, towers.context(), {})
    assert towers.texts() == 6
    with monkeypatch.context() as patch:
        patch.setattr(torch, name, {"__version__": "9.9"}.get(name, lambda: 99))
        class_embeddings(SET, towers.context(), {})
    assert towers.texts() == 6


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((75, 1), {}),  # with the marks of both ends exactly 77
        ((76, 1), {"texts": 2, "cut": 1, "tokens": 77}),
        ((77, 300), {"texts": 2, "cut": 2, "tokens": 77}),
        ((), {}),
    ],
)
def test_texts_that_are_cut_are_counted(words: tuple[int, ...], expected: dict[str, int]) -> None:
    """They are cut without a word (openai/CLIP 212)."""
    texts = [" ".join(["cat"] * number) for number in words]
    assert cut_texts(texts, open_clip.get_tokenizer("ViT-B-32")) == expected
    assert cut_texts(texts, lambda texts: torch.zeros(len(texts), 77)) == {}  # what is not known is not counted


def test_zero_shot_notes_how_many_captions_are_cut(tmp_path: Path) -> None:
    """The scores are as before: the note has no effect on them."""
    clip = tiny_clip()
    length = clip.tokenize.context_length  # type: ignore[attr-defined]
    captions = [[f"{n} cats", " ".join(["cat"] * (length if n == 1 else 1))] for n in range(3)]
    images = [Image.new("RGB", (8, 8), (80 * n, 0, 0)) for n in range(3)]
    evalset_write.write_retrieval(tmp_path / "words", list(zip(images, captions, strict=True)))
    suite = ZeroShot(sets=("words",), headlines={"words": ("words",)})
    notes = suite.evaluate(replace(context_of(clip), root=tmp_path)).notes
    assert notes["cut_captions"] == {"words": {"texts": 6, "cut": 1, "tokens": length}}
