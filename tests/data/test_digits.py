"""The digits world: splits share no image, captions describe the image, and two builds have equal bytes."""

import json
import time

import numpy as np
import pytest
import webdataset
from torchvision.transforms.functional import pil_to_tensor

from upcycle_bench.data import evalset
from upcycle_bench.data.world import open_world
from upcycle_bench.data.worlds import digits, load_world
from upcycle_bench.util.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "digits"
    digits.build(folder, seed=0)
    return open_world("digits", folder)


def training_samples(world) -> list[tuple[np.ndarray, list[str]]]:
    data = webdataset.WebDataset([str(path) for path in world.train_shards], shardshuffle=False).decode("pil")
    return [(np.asarray(image), text.splitlines()) for image, text in data.to_tuple("png", "txt")]


def evaluation_samples(world, name: str) -> list[tuple[np.ndarray, object]]:
    batches = evalset.read(world.eval_root / name, pil_to_tensor, batch_size=64).batches
    return [(x.numpy().transpose(1, 2, 0), y) for images, ys in batches for x, y in zip(images, ys, strict=True)]


def test_splits_are_disjoint_complete_and_stratified(world):
    splits = {
        "train": [image for image, _ in training_samples(world)],
        **{s: [image for image, _ in evaluation_samples(world, f"digits-{s}")] for s in ("validation", "test")},
    }
    assert {name: len(images) for name, images in splits.items()} == {"train": 1079, "validation": 359, "test": 359}
    pixels = [image.tobytes() for images in splits.values() for image in images]
    assert len(set(pixels)) == len(pixels) == 1797
    for name in ("validation", "test"):
        per_class = np.bincount([int(label) for _, label in evaluation_samples(world, f"digits-{name}")])
        assert set(per_class) <= {35, 36, 37}
    gallery = {image.tobytes() for image, _ in evaluation_samples(world, "digits-retrieval")}
    assert gallery <= {image.tobytes() for image in splits["test"]}


def test_captions_say_what_the_image_shows(world):
    samples = training_samples(world)
    ink, weight, word = [], [], []
    for image, captions in samples:
        assert image.shape == (8, 8, 3)
        assert len(set(captions)) == 8
        words = {w for caption in captions for w in caption.split()}
        (w,) = words & set(digits.WEIGHTS)
        (c,) = words & set(digits.WORDS)
        assert all(c in caption for caption in captions)
        assert sum(w in caption for caption in captions) == 4
        ink.append(int(image[..., 0].sum()))
        weight.append(digits.WEIGHTS.index(w))
        word.append(c)
    ink, weight, word = np.array(ink), np.array(weight), np.array(word)
    heaviest = {}
    for c in digits.WORDS:
        parts = [ink[(word == c) & (weight == w)] for w in range(3)]
        # terciles: thinner than the next weight, and a third of the class each (ties at a bound stay together)
        assert parts[0].max() < parts[1].min() <= parts[1].max() < parts[2].min()
        assert all(abs(len(part) - (word == c).sum() / 3) <= 3 for part in parts)
        heaviest[c] = [part.max() for part in parts[:2]]
    # The test gallery uses the training bounds.
    for image, (caption,) in evaluation_samples(world, "digits-retrieval"):
        _, w, _, c = caption.split()
        ink_here, (thin, regular) = int(image[..., 0].sum()), heaviest[c]
        assert (w == "thin") >= (ink_here <= thin)
        assert (w == "bold") <= (ink_here > regular)


def test_labels_and_gallery(world):
    from sklearn.datasets import load_digits

    data = load_digits()
    truth = {np.rint(x * 255 / 16).astype(np.uint8).tobytes(): y for x, y in zip(data.images, data.target, strict=True)}
    assert all(truth[image[..., 0].tobytes()] == label for image, label in evaluation_samples(world, "digits-test"))
    for image, captions in training_samples(world):
        assert digits.WORDS[truth[image[..., 0].tobytes()]] in captions[0]
    gallery = evaluation_samples(world, "digits-retrieval")
    assert len({captions[0] for _, captions in gallery}) == len(gallery) == 30
    assert all(digits.WORDS[truth[image[..., 0].tobytes()]] in captions[0] for image, captions in gallery)


def test_a_caption_without_image_is_left_out():
    labels, weights = np.array([0, 0, 0, 1]), np.array([2, 0, 2, 1])
    gallery = digits.one_row_per_caption(labels, weights, np.array([0, 2, 3]))
    assert gallery == [("a bold handwritten zero", 0), ("a regular handwritten one", 3)]


def test_two_builds_are_equal_and_seeds_differ(world, tmp_path, monkeypatch):
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path))
    start = time.perf_counter()
    again = load_world("digits", 0)
    assert time.perf_counter() - start < 10  # 0.3 s where nothing else runs
    assert again.sha256 == world.sha256
    assert again.eval_root == tmp_path / "worlds" / f"digits-{digits.VERSION}-seed0" / "eval"
    other = load_world("digits", 1)
    assert other.sha256 != world.sha256
    assert other.train_shards[0].read_bytes() != world.train_shards[0].read_bytes()


def test_manifest_counts(world):
    manifest = json.loads((world.eval_root.parent / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 1079, "digits-validation": 359, "digits-test": 359, "digits-retrieval": 30}


def test_a_changed_file_and_an_unknown_world_are_user_errors(tmp_path):
    digits.build(tmp_path / "digits", seed=0)
    (tmp_path / "digits" / "train" / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.tar is missing or was changed; delete .*digits"):
        open_world("digits", tmp_path / "digits")
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_world("digit", 0)
