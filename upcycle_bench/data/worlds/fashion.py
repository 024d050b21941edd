"""Fashion-MNIST as an evaluation set, where Debian's package dataset-fashion-mnist is installed.

    world = load(seed=0)            # eval/fashion-mnist with the splits train and test; UserError without the package

Images of 28 x 28 grey pixels show ten kinds of clothes. All 10,000 test images are in it, and the first 6,000 of 60,000
training images: some 600 of each class, enough for few-shot tasks.

Source: H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv:1708.07747 (MIT licence).

Shape suffixes: N images, H and W their height and width.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from upcycle_bench.data.evalset_write import write_classification
from upcycle_bench.data.world import World, open_world, write_manifest
from upcycle_bench.util.cache import build_once, cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 1  # raise it when the same files would give another set
PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the package puts it
CLASSES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TEMPLATES = ("a photo of a {c}", "{c}")
TRAIN = 6000


def load(seed: int, reporter: Reporter) -> World:
    """The world from the cache, built first if it is not there. `seed` has no effect: its authors made the splits."""
    if not FOLDER.is_dir():
        raise UserError(f"Fashion-MNIST is not there: install Debian's package {PACKAGE}.")
    path = cache_root() / "worlds" / f"fashion-mnist-{VERSION}"
    return open_world("fashion-mnist", build_once(path, partial(build, source=FOLDER)))


def build(folder: Path, source: Path) -> None:
    """Write the world into `folder`, which must not exist."""
    target, counts = folder / "eval" / "fashion-mnist", {}
    for split, prefix, limit in (("train", "train", TRAIN), ("test", "t10k", None)):
        images_NHW = _read(source / f"{prefix}-images-idx3-ubyte.gz")
        label_N = _read(source / f"{prefix}-labels-idx1-ubyte.gz")
        samples = _samples(images_NHW[:limit], label_N[:limit])
        counts[split] = write_classification(target, samples, CLASSES, TEMPLATES, split=split)
    write_manifest(folder, {"name": "fashion-mnist", "version": VERSION, "counts": counts})


def _samples(images_NHW: np.ndarray, label_N: np.ndarray) -> Iterator[tuple[Image, int]]:
    from PIL.Image import fromarray

    return ((fromarray(image), int(label)) for image, label in zip(images_NHW, label_N, strict=True))


def _read(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of bytes: 0, 0, 8, the number of axes, their lengths (big-endian int32), data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"Fashion-MNIST: {path} cannot be read ({error}); install {PACKAGE} again.") from None
    shape = np.frombuffer(data, dtype=">i4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape)
