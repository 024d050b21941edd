"""What the image and the label of a sample of an evaluation set are. Whoever reads or checks a set asks here.

    for sample in look(shard, "classification", classes=10):     # in the order of the shard
        sample.faults or (sample.label, sample.image())

A sample is an image beside a file of the same name: its class index (.cls), a 0 or 1 for each class (.npy), or its
captions, one a line (.txt). Other files beside them are left alone.
Shape suffixes: Y classes.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from upcycle_bench.data.images import BadImage, rgb
from upcycle_bench.data.shards import open_shard, read_member
from upcycle_bench.util.errors import UserError

Kind = Literal["classification", "multilabel", "retrieval"]
IMAGES = ("webp", "png", "jpg", "jpeg")  # the first that a sample has is its image, as in CLIP_benchmark
REMEDY = "`upcycle-bench data check` says what else is wrong"
_INDEX = re.compile("-?[0-9]{1,18}")


@dataclass(frozen=True)
class Sample:
    """A sample in a shard, and what is wrong with it, but for its image's pixels, which are not decoded.

    `suffix` and `member`: of its image. `label`: a class index, an array [Y], or a list of captions. They are None, or
    empty, where a fault says that there is none.
    """

    shard: Path
    key: str
    suffix: str
    member: tarfile.TarInfo | None
    label: Any
    faults: tuple[str, ...]

    @property
    def place(self) -> str:
        """Where it stands: test/0.tar: KEY."""
        return f"{self.shard.parent.name}/{self.shard.name}: {self.key}"

    def content(self) -> bytes:
        """The bytes of its image file."""
        assert self.member is not None
        with self.shard.open("rb") as file:
            return read_member(file, self.member)

    def image(self) -> Image:
        """Its image, as RGB; UserError, with the fault, if it is refused."""
        try:
            return rgb(self.content())
        except BadImage as error:
            whose = f"evaluation set {self.shard.parent.parent.name}: {self.place}"
            raise UserError(f"{whose}: {self.refused(error)}; {REMEDY}.") from None

    def refused(self, error: BadImage) -> str:
        """The fault of an image that is refused."""
        return f"its .{self.suffix} {error.fault}"


def look(shard: Path, kind: Kind, classes: int) -> Iterator[Sample]:
    """Each sample of a shard; `classes`: how many the set has, 0 if that is not known. UserError for a bad shard."""
    suffix, what, parse = LABELS[kind]
    index = open_shard(shard)
    if index.repeated:
        raise UserError(f"{shard}: {index.repeated:,} samples have the name of an earlier one; give each its own name.")
    with shard.open("rb") as file:
        for key, members in index.samples.items():
            if not members.keys() & {*IMAGES, suffix}:  # a readme
                continue
            faults = []
            image = next((each for each in IMAGES if each in members), "")
            if not image:
                faults.append(f"no image ({', '.join(IMAGES)})")
            label = None
            if suffix not in members:
                faults.append(f"no .{suffix}, which holds {what}")
            else:
                try:
                    label = parse(read_member(file, members[suffix]), classes)
                except ValueError as error:
                    faults.append(str(error))
            yield Sample(shard, key.removeprefix("./"), image, members.get(image), label, tuple(faults))


def _class_index(content: bytes, classes: int) -> int:
    text = _text(content, ".cls").strip()
    if not _INDEX.fullmatch(text):
        raise ValueError(".cls is no class index")
    if classes and not 0 <= int(text) < classes:
        raise ValueError(f"its class index is not one of 0 ... {classes - 1}, which classnames.txt names")
    return int(text)


def _class_vector(content: bytes, classes: int) -> np.ndarray:
    try:
        shown_Y = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise ValueError(".npy is no NumPy array") from None
    if classes and (shown_Y.shape != (classes,) or not np.isin(shown_Y, (0, 1)).all()):
        raise ValueError(f"its .npy does not hold a 0 or 1 for each of the {classes} classes of classnames.txt")
    return shown_Y


def _captions(content: bytes, _classes: int) -> list[str]:
    captions = _text(content, ".txt").splitlines()  # as CLIP_benchmark does
    while captions and not captions[-1].strip():
        captions.pop()
    if not captions or not all(caption.strip() for caption in captions):
        raise ValueError("an empty caption, or none")
    return captions


def _text(content: bytes, suffix: str) -> str:
    try:
        return content.decode("utf-8-sig")  # a byte order mark is no part of a text
    except UnicodeDecodeError:
        raise ValueError(f"{suffix} is not UTF-8") from None


# Kind -> the suffix of the label, what it holds, and how it is read; ValueError says what is wrong with it.
LABELS: dict[Kind, tuple[str, str, Callable[[bytes, int], Any]]] = {
    "classification": ("cls", "the class index", _class_index),
    "multilabel": ("npy", "a 0 or 1 for each class", _class_vector),
    "retrieval": ("txt", "captions, one a line", _captions),
}
