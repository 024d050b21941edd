"""Evaluation sets: the layout is CLIP_benchmark's, equal sets have equal bytes, and an error is one line."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data import evalset_write
from upcycle_bench.evaluation.features import encode_images
from upcycle_bench.suite import EvalContext
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import counted_flops

CLASSES = ("cat", "dog", "émeu")
TEMPLATES = ("a photo of a {c}", "{c}")


def images(n: int = 5) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture
def classification(tmp_path):
    folder = tmp_path / "sets" / "animals"
    assert (
        evalset_write.write_classification(folder, zip(images(), [0, 2, 1, 1, 0], strict=True), CLASSES, TEMPLATES) == 5
    )
    return folder


def test_classification_comes_back_as_written(classification):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evalset = evalsets.read(classification, pil_to_tensor, batch_size=2)
    assert (evalset.name, evalset.kind) == ("animals", "classification")
    assert (evalset.classnames, evalset.templates) == (CLASSES, TEMPLATES)
    for _ in range(2):  # it can be iterated again
        batches = list(evalset.batches)
        assert [len(x) for x, _ in batches] == [2, 2, 1]
        assert [int(label) for _, labels in batches for label in labels] == [0, 2, 1, 1, 0]
        read = np.concatenate([x.numpy() for x, _ in batches])
        np.testing.assert_array_equal(read, [pil_to_tensor(image).numpy() for image in images()])


def test_retrieval_comes_back_as_written(tmp_path):
    captions = [["one"], ["two", "zwei"], ["three"]]
    evalset_write.write_retrieval(tmp_path / "words", zip(images(3), captions, strict=True))
    evalset = evalsets.read(tmp_path / "words", pil_to_tensor, batch_size=2)
    assert evalset.kind == "retrieval"
    assert evalset.classnames == evalset.templates == ()
    assert [list(texts) for _, batch in evalset.batches for texts in batch] == captions


STRATA = ["seen-caption", "unseen.caption", "unseen.caption", "a_1", "seen-caption"]


@pytest.fixture
def divided(tmp_path):
    folder = tmp_path / "sets" / "divided"
    evalset_write.write_classification(folder, zip(images(), [0, 2, 1, 1, 0], strict=True), CLASSES, TEMPLATES, STRATA)
    return folder


def test_strata_come_back_as_written(classification, divided, tmp_path):
    assert evalsets.read(divided, pil_to_tensor, batch_size=2).strata == tuple(STRATA)
    assert evalsets.read(classification, pil_to_tensor, batch_size=2).strata == ()
    # Captions share the stratum of their image, so that there is one for each image.
    pairs = zip(images(3), [["one"], ["two", "zwei"], ["three"]], strict=True)
    evalset_write.write_retrieval(tmp_path / "words", pairs, strata=("a", "b", "a"))
    assert evalsets.read(tmp_path / "words", pil_to_tensor, batch_size=2).strata == ("a", "b", "a")


def test_strata_are_for_the_samples_of_all_shards(divided):
    """Samples of any keys, folders and extensions that webdataset allows, as in sets that others wrote."""
    import webdataset

    png = evalset_write.png(images(1)[0])
    (divided / "test" / "nshards.txt").write_text("2\n")
    with webdataset.TarWriter(str(divided / "test" / "1.tar"), encoder=False) as tar:
        for key in ("s0000", "sub.folder/s0000"):
            tar.write({"__key__": key, "png": png, "cls": b"1", "json.txt": b"x"})
    (divided / "strata.txt").write_text("".join(f"{label}\n" for label in [*STRATA, "new", "new"]))
    evalset = evalsets.read(divided, pil_to_tensor, batch_size=7)
    assert evalset.strata == (*STRATA, "new", "new")

    class Pixels(torch.nn.Module):
        encode_image = staticmethod(lambda images: images.flatten(1).float())

    model = Pixels()
    context = EvalContext(
        model=model,
        tokenizer=lambda texts: torch.zeros(len(texts), 1),
        transform=pil_to_tensor,
        root=divided.parent,
        device=torch.device("cpu"),
        batch_size=7,
    )
    assert len(encode_images(evalset, context)[0]) == 7
    (divided / "strata.txt").write_text("".join(f"{label}\n" for label in STRATA))
    with pytest.raises(UserError, match="each of 7 samples"):
        encode_images(evalsets.read(divided, pil_to_tensor, batch_size=7), context)


def test_strata_are_those_of_the_test_split(divided):
    (divided / "test").rename(divided / "train")
    assert evalsets.read(divided, pil_to_tensor, batch_size=2, split="train").strata == ()


@pytest.mark.parametrize("content", ["", "seen\nseen\n\nseen\nseen\n", "a\nb\nc\nd\nwith space\n"])
def test_strata_that_are_none_are_one_line(divided, content):
    (divided / "strata.txt").write_text(content)
    with pytest.raises(UserError, match=r"divided: .*strata\.txt must hold a stratum .* for each sample") as error:
        evalsets.read(divided, pil_to_tensor, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [1, 4, 6])
def test_strata_too_few_or_too_many_are_one_line(labels):
    with pytest.raises(UserError, match=rf"set x: strata\.txt must hold .* of 5 samples, .* {labels} lines") as error:
        evalsets.require_strata("x", ["seen"] * labels, 5)
    assert "\n" not in str(error.value)
    evalsets.require_strata("x", ["seen"] * 5, 5)
    evalsets.require_strata("x", [], 5)


def test_batches_are_the_same_again(classification):
    batches = evalsets.read(classification, pil_to_tensor, batch_size=2).batches
    for _ in range(2):
        found = list(batches)
        assert [list(labels) for _, labels in found] == [[0, 2], [1, 1], [0]]
        assert torch.equal(torch.cat([part for part, _ in found]), torch.stack([*map(pil_to_tensor, images())]))


def test_reading_is_not_counted(classification):
    def transform(image):
        return pil_to_tensor(image).float() @ torch.eye(pil_to_tensor(image).shape[-1])

    with counted_flops() as counter:
        batches = iter(evalsets.read(classification, transform, batch_size=1).batches)
        torch.eye(2) @ torch.eye(2)
        next(batches)
        torch.eye(2) @ torch.eye(2)
    assert counter.get_total_flops() == 2 * 2 * 2**3


def test_an_error_while_reading_arrives(classification):
    def transform(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(evalsets.read(classification, transform, batch_size=2).batches)


def test_no_more_is_decoded_than_is_asked_for(classification):
    made = []
    next(iter(evalsets.read(classification, lambda image: made.append(1) or pil_to_tensor(image), 2).batches))
    assert len(made) == 2


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle")  # CLIP_benchmark leaves it open
def test_clip_benchmark_reads_it_through_its_own_front_door(classification):
    from clip_benchmark.datasets.builder import build_dataset

    dataset = build_dataset("wds/animals", root=str(classification), transform=pil_to_tensor, split="test")
    assert dataset.classes == list(CLASSES)
    assert dataset.templates == list(TEMPLATES)
    assert [label for _, label in dataset] == [0, 2, 1, 1, 0]
    (classification / "strata.txt").write_text("any\n" * 5)
    again = build_dataset("wds/animals", root=str(classification), transform=pil_to_tensor, split="test")
    assert [label for _, label in again] == [0, 2, 1, 1, 0]


def test_two_writes_give_the_same_bytes(classification, tmp_path):
    again = tmp_path / "elsewhere" / "animals"
    evalset_write.write_classification(again, zip(images(), [0, 2, 1, 1, 0], strict=True), CLASSES, TEMPLATES)
    assert (again / "test" / "0.tar").read_bytes() == (classification / "test" / "0.tar").read_bytes()
    assert evalsets.digest(again) == evalsets.digest(classification)


def test_digest_sees_content_and_names_but_not_strangers(classification):
    before = evalsets.digest(classification)
    (classification / ".DS_Store").touch()
    assert evalsets.digest(classification) == before
    (classification / "strata.txt").write_text("any\n" * 5)
    divided = evalsets.digest(classification)
    (classification / "strata.txt").write_text("any\n" * 4 + "other\n")
    assert len({before, divided, evalsets.digest(classification)}) == 3
    (classification / "strata.txt").unlink()
    (classification / "classnames.txt").write_text("dog\ncat\n")
    assert evalsets.digest(classification) != before


def test_missing_sets_are_named_together(classification):
    root = classification.parent
    with pytest.raises(UserError) as error:
        evalsets.require(root, ["plants", "animals", "cars"])
    message = str(error.value)
    assert "plants, cars" in message
    assert str(root) in message
    assert "which holds animals" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="not found: plants"):
        evalsets.read(root / "plants", pil_to_tensor, 2)
    with pytest.raises(UserError, match="no folders"):
        evalsets.read(root / "nowhere" / "plants", pil_to_tensor, 2)
    with pytest.raises(UserError, match=r"NAME/train/nshards\.txt"):
        evalsets.read(classification, pil_to_tensor, 2, split="train")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test/nshards.txt", "3", r"1\.tar, 2\.tar missing .* counts 3 shards"),
        ("test/nshards.txt", "many", "must hold the number of shards, not 'many'"),
        ("dataset_type.txt", "video", "'video'; it must say one of classification, multilabel, retrieval"),
        ("classnames.txt", None, "classnames.txt is missing"),
    ],
)
def test_a_damaged_set_is_one_line(classification, file, content, message):
    if content is None:
        (classification / file).unlink()
    else:
        (classification / file).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        evalsets.read(classification, pil_to_tensor, 2)
    assert "\n" not in str(error.value)


def test_bad_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label 3"):
        evalset_write.write_classification(tmp_path / "a", [(images()[0], 3)], CLASSES, TEMPLATES)
    with pytest.raises(ValueError, match="must hold"):
        evalset_write.write_classification(tmp_path / "b", [], CLASSES, ["a photo"])
    for captions in ([], ["two\nlines"], [""]):
        with pytest.raises(ValueError, match="one line each"):
            evalset_write.write_retrieval(tmp_path / "c", [(images()[0], captions)])
    for strata in ([], ["a", "b"], [""], ["two words"], ["a[b]"], ["a/b"]):
        with pytest.raises(ValueError, match="1 samples need a stratum each"):
            evalset_write.write_retrieval(tmp_path / "d", [(images()[0], ["one"])], strata)


def test_the_digest_sees_names_and_contents(tmp_path):
    folder = tmp_path / "words"
    evalset_write.write_retrieval(folder, zip(images(3), [["one"], ["two"], ["three"]], strict=True))
    digests = {evalsets.digest(folder)}
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / name).write_text("{c}\n")
        digests.add(evalsets.digest(folder))
        (folder / name).unlink()
    assert len(digests) == 3
    assert evalsets.digest(folder) in digests
    evalset_write.write_retrieval(folder, zip(images(3), [["one"], ["two"], ["four"]], strict=True))
    assert evalsets.digest(folder) not in digests
