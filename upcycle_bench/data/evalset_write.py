"""Writes evaluation sets in the layout of `evalset.py`; the same samples always give the same bytes.

    write_classification(root / "animals", [(image, 0), (other, 1)], ["cat", "dog"], ["a photo of a {c}"])
    write_retrieval(root / "captions", [(image, ["a cat", "a sleeping cat"])])

Shape suffixes: Y classes.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from upcycle_bench.data.evalset import CLASSNAMES, STRATA, STRATUM, TEMPLATES, TYPE, Kind


def png(image: Image) -> bytes:
    """The image as a PNG without compression: a small image's bytes then do not depend on the version of zlib."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterable[Mapping[str, bytes]]) -> int:
    """Write samples ({"png": ..., "txt": ...}) as a tar, always with the same bytes; returns their number.

    Keys are SHARD-NUMBER, which is unique in a folder of shards.
    """
    import webdataset

    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for count, sample in enumerate(samples, start=1):
            tar.write({"__key__": f"{path.stem}-{count - 1:08d}", **sample})
    return count


def write_classification(
    folder: Path,
    samples: Iterable[tuple[Image, int]],
    classnames: Sequence[str],
    templates: Sequence[str],
    strata: Sequence[str] | None = None,
    split: str = "test",
) -> int:
    """Write (image, class index) samples as one split of a classification set; returns their number.

    A template holds {c}, the class. `strata` holds a label for each sample, of letters, digits, `_`, `.` and `-`.
    Raises ValueError for a class index, a template or a stratum that is not valid.
    """

    def encoded() -> Iterable[dict[str, bytes]]:
        for image, label in samples:
            _require_labels(folder, [label], classnames)
            yield {"png": png(image), "cls": str(label).encode()}

    _write_classes(folder, classnames, templates)
    return _write(folder, "classification", encoded(), strata, split)


def write_multilabel(
    folder: Path,
    samples: Iterable[tuple[Image, Collection[int]]],
    classnames: Sequence[str],
    templates: Sequence[str],
    split: str = "test",
) -> int:
    """Write (image, indices of the classes that it shows) samples as one split of a multilabel set, likewise."""

    def encoded() -> Iterable[dict[str, bytes]]:
        for image, labels in samples:
            _require_labels(folder, labels, classnames)
            shown_Y, buffer = np.zeros(len(classnames), dtype=np.uint8), io.BytesIO()
            shown_Y[list(labels)] = 1
            np.save(buffer, shown_Y)
            yield {"png": png(image), "npy": buffer.getvalue()}

    _write_classes(folder, classnames, templates)
    return _write(folder, "multilabel", encoded(), None, split)


def write_retrieval(
    folder: Path, samples: Iterable[tuple[Image, Sequence[str]]], strata: Sequence[str] | None = None
) -> int:
    """Write (image, its captions) samples as a retrieval set, likewise; a caption is one line."""

    def encoded() -> Iterable[dict[str, bytes]]:
        for image, captions in samples:
            if not captions or any(len(caption.splitlines()) != 1 for caption in captions):
                raise ValueError(f"{folder.name}: an image needs captions of one line each, got {list(captions)}")
            yield {"png": png(image), "txt": "\n".join(captions).encode()}

    return _write(folder, "retrieval", encoded(), strata)


def _require_labels(folder: Path, labels: Iterable[int], classnames: Sequence[str]) -> None:
    for label in labels:
        if not 0 <= label < len(classnames):
            raise ValueError(f"{folder.name}: label {label} is not one of {len(classnames)} classes")


def _write_classes(folder: Path, classnames: Sequence[str], templates: Sequence[str]) -> None:
    if not all("{c}" in template for template in templates):
        raise ValueError(f"{folder.name}: every template must hold {{c}}")
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / CLASSNAMES, classnames)
    _write_lines(folder / TEMPLATES, templates)


def _write(
    folder: Path,
    kind: Kind,
    samples: Iterable[Mapping[str, bytes]],
    strata: Sequence[str] | None,
    split: str = "test",
) -> int:
    count = write_shard(folder / split / "0.tar", samples)
    if strata is not None:
        if len(strata) != count or not all(map(STRATUM.fullmatch, strata)):
            raise ValueError(f"{folder.name}: {count} samples need a stratum each, of letters, digits, _ . and -")
        _write_lines(folder / STRATA, strata)
    _write_lines(folder / split / "nshards.txt", ["1"])
    _write_lines(folder / TYPE, [kind])
    return count


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
