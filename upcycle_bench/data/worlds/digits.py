"""The digits world: scikit-learn's 1,797 handwritten digits (8x8 pixels, 17 grey levels) with captions.

Each class is split 60/20/20 into training, validation and test. A caption names the digit and, in half of the
templates, its stroke weight: thin, regular or bold by the terciles of ink of that digit's training images. So a caption
says more than the class, and retrieval differs from classification.

    digits-validation, digits-test    classification into zero ... nine
    digits-retrieval                  one test image for each of 30 captions "a {thin|regular|bold} handwritten DIGIT"

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(CC BY 4.0), as shipped with scikit-learn. It does not name the writers, so one writer's digits are in several splits.

Shape suffixes: N images of 8 x 8 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upcycle_bench.data.evalset_write import png, write_classification, write_retrieval, write_shard
from upcycle_bench.data.world import World, open_world, write_manifest
from upcycle_bench.util.cache import build_once, cache_root
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1  # raise it when the same seed would give other files
SHARDS = 4
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("thin", "regular", "bold")
PLAIN = ("a photo of the digit {c}", "a handwritten {c}", "a scan of the number {c}", "the digit {c}")
WEIGHTED = (
    "a {w} handwritten {c}",
    "a scan of a {w} {c}",
    "the digit {c} in {w} strokes",
    "a photo of a {w} number {c}",
)
RETRIEVAL = WEIGHTED[0]


def load(seed: int, reporter: Reporter) -> World:
    """The world with the splits of this seed, from the cache; built first, in a second, if it is not there."""
    folder = cache_root() / "worlds" / f"digits-{VERSION}-seed{seed}"
    return open_world("digits", build_once(folder, partial(build, seed=seed)))


def build(folder: Path, seed: int) -> None:
    """Write the world into `folder`, which must not exist."""
    images_N88, labels_N = _images_and_labels()
    splits = split_rows(labels_N, seed)
    weights_N = stroke_weights(images_N88, labels_N, splits["train"])
    captions_N = [captions(label, weight) for label, weight in zip(labels_N, weights_N, strict=True)]

    counts: dict[str, int] = {"train": 0}
    for shard in range(SHARDS):
        rows = splits["train"][shard::SHARDS]
        samples = ({"png": png(_picture(images_N88[i])), "txt": "\n".join(captions_N[i]).encode()} for i in rows)
        counts["train"] += write_shard(folder / "train" / f"{shard}.tar", samples)

    def labelled(rows: np.ndarray) -> Iterator[tuple[Image, int]]:
        return ((_picture(images_N88[i]), int(labels_N[i])) for i in rows)

    for split in ("validation", "test"):
        counts[f"digits-{split}"] = write_classification(
            folder / "eval" / f"digits-{split}", labelled(splits[split]), WORDS, PLAIN
        )
    gallery = (
        (_picture(images_N88[i]), [caption]) for caption, i in one_row_per_caption(labels_N, weights_N, splits["test"])
    )
    counts["digits-retrieval"] = write_retrieval(folder / "eval" / "digits-retrieval", gallery)
    write_manifest(folder, {"name": "digits", "version": VERSION, "seed": seed, "counts": counts})


def groups(folder: Path) -> list[str]:
    """The class of every training pair, in the order of the shards."""
    _, labels_N = _images_and_labels()
    rows = split_rows(labels_N, json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["seed"])["train"]
    return [WORDS[labels_N[row]] for shard in range(SHARDS) for row in rows[shard::SHARDS]]


def split_rows(labels_N: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Rows of train, validation and test, int64, ascending; 60/20/20 of every class."""
    import torch

    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": [], "test": []}
    for label in range(len(WORDS)):
        rows = np.flatnonzero(labels_N == label)
        stream = Stream(("world", "digits", seed)).child("split", label)
        rows = rows[torch.randperm(len(rows), generator=stream.generator()).numpy()]
        fifth = round(len(rows) / 5)
        for name, part in zip(parts, np.split(rows, [len(rows) - 2 * fifth, len(rows) - fifth]), strict=True):
            parts[name].append(part)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


def stroke_weights(images_N88: np.ndarray, labels_N: np.ndarray, train_rows: np.ndarray) -> np.ndarray:
    """Index into WEIGHTS of every image, int64 [N]: terciles of ink in its class, whose bounds are of training rows."""
    ink_N = images_N88.sum(axis=(1, 2))
    weights_N = np.zeros(len(labels_N), dtype=np.int64)
    for label in range(len(WORDS)):
        bounds = np.quantile(ink_N[train_rows][labels_N[train_rows] == label], [1 / 3, 2 / 3])
        weights_N[labels_N == label] = np.searchsorted(bounds, ink_N[labels_N == label])
    return weights_N


def captions(label: int, weight: int) -> list[str]:
    """All captions of an image, one a template."""
    return [template.format(c=WORDS[label], w=WEIGHTS[weight]) for template in PLAIN + WEIGHTED]


def one_row_per_caption(labels_N: np.ndarray, weights_N: np.ndarray, rows: np.ndarray) -> list[tuple[str, int]]:
    """The retrieval gallery, (caption, row): for each digit and weight the first of `rows` that shows it, if any."""
    gallery: dict[tuple[int, int], int] = {}
    for i in rows:
        gallery.setdefault((int(labels_N[i]), int(weights_N[i])), int(i))
    return [(RETRIEVAL.format(c=WORDS[label], w=WEIGHTS[weight]), i) for (label, weight), i in sorted(gallery.items())]


def _images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images_N88 = np.rint(data.images * 255 / 16).astype(np.uint8)
    # Two equal images could fall into different splits; these data have none.
    assert len(np.unique(images_N88.reshape(len(images_N88), -1), axis=0)) == len(images_N88)
    return images_N88, data.target


def _picture(image_88: np.ndarray) -> Image:
    from PIL.Image import fromarray

    return fromarray(image_88).convert("RGB")
