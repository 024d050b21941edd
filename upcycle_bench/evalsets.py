"""Evaluation sets on disk, in the webdataset layout of CLIP_benchmark, which also reads them.

    ROOT/NAME/test/{nshards.txt,0.tar,...}                  samples: png with cls (a class index), npy (a 0 or 1 for
                                                            each class) or txt (captions)
    ROOT/NAME/dataset_type.txt                              classification (also when absent), multilabel or retrieval
    ROOT/NAME/{classnames,zeroshot_classification_templates}.txt      one a line; templates hold {c}
    ROOT/NAME/strata.txt                                    ours, optional: the stratum of each test sample, one a line

    evalset = read(root / "digits-test", transform, batch_size=256)
    for images_B3HW, labels in evalset.batches: ...

Source: clip_benchmark.datasets.builder.build_wds_dataset (1.6.2), whose published sets work here as they are.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from upcycle_bench.errors import UserError
from upcycle_bench.files import files_sha256
from upcycle_bench.flops import uncounted

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["classification", "multilabel", "retrieval"]
CLASSNAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
STRATA = "strata.txt"  # CLIP_benchmark ignores it
AHEAD = 2  # batches: as many as are encoded at once where a core is free (`upcycle_bench.features`)
STRATUM = re.compile(r"[\w.-]+")  # it becomes part of the names of metrics


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set. `batches` can be iterated again and again, always in the order of the shards.

    It yields (images float32 [B, 3, H, W], labels int [B]); for multilabel (images, [B, classes], not 0 where an image
    shows the class); for retrieval (images, list of B lists of captions).
    `strata` holds one label for each sample in that order, or nothing if the set is not divided; that there are as many
    as samples is for `require_strata` to say, when these have been read.
    """

    name: str
    kind: Kind
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    batches: Iterable[tuple[Any, Any]]
    strata: tuple[str, ...] = ()


def png(image: Image) -> bytes:
    """PNG without compression: for small images the bytes do not depend on the zlib of the machine."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterable[Mapping[str, bytes]]) -> int:
    """Write samples ({"png": ..., "txt": ...}) as a tar of equal bytes every time; returns how many.

    Keys are SHARD-NUMBER, so that they are unique in a folder of shards.
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
    """Write (image, class index) samples as one split of a zero-shot classification set; returns how many.

    `strata` holds one label for each sample: letters, digits, `_`, `.` and `-`.
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
    """Write (image, indices of the classes that it shows) samples as a split of a multilabel set; returns how many."""
    import numpy as np

    def encoded() -> Iterable[dict[str, bytes]]:
        for image, labels in samples:
            _require_labels(folder, labels, classnames)
            shown_C, buffer = np.zeros(len(classnames), dtype=np.uint8), io.BytesIO()
            shown_C[list(labels)] = 1
            np.save(buffer, shown_C)
            yield {"png": png(image), "npy": buffer.getvalue()}

    _write_classes(folder, classnames, templates)
    return _write(folder, "multilabel", encoded(), None, split)


def write_retrieval(
    folder: Path, samples: Iterable[tuple[Image, Sequence[str]]], strata: Sequence[str] | None = None
) -> int:
    """Write (image, its captions) samples as a retrieval set; returns how many. `strata` as for classification."""

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


def require(root: Path, names: Iterable[str], split: str = "test") -> None:
    """Raise one UserError that names every set without that split below `root`."""
    missing = [name for name in names if not (root / name / split / "nshards.txt").is_file()]
    if missing:
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise UserError(
            f"evaluation set not found: {', '.join(missing)}; looked for NAME/{split}/nshards.txt in {root}, "
            f"which holds {', '.join(there) or 'no folders'}; give the folder that holds the sets."
        )


def read(folder: Path, transform: Callable[[Any], Any], batch_size: int, split: str = "test") -> EvalSet:
    """Open a set; nothing is decoded until its batches are iterated.

    Raises UserError, one line, for a set that is missing, incomplete or of a kind we do not score.
    """
    files = _files(folder, split)
    kind = kind_of(folder)
    if kind != "retrieval" and (absent := [name for name in (CLASSNAMES, TEMPLATES) if folder / name not in files]):
        raise UserError(
            f"evaluation set {folder.name}: {' and '.join(absent)} missing in {folder}; copy the set again."
        )

    from clip_benchmark.datasets.builder import build_wds_dataset

    with warnings.catch_warnings():
        # CLIP_benchmark leaves `shardshuffle` open, which webdataset reads as "off": what we want, but not its warning.
        warnings.filterwarnings("ignore", message="WebDataset.shardshuffle")
        dataset = build_wds_dataset(folder.name, transform, split=split, data_dir=str(folder.absolute()))
    classnames, templates = tuple(dataset.classes or ()), tuple(dataset.templates or ())
    strata = strata_of(folder) if folder / STRATA in files else ()
    return EvalSet(folder.name, kind, classnames, templates, _Batches(dataset.batched(batch_size)), strata)


@dataclass(frozen=True)
class _Batches:
    """Batches, made while the model encodes those before where that leaves a core idle.

    No FLOP counter watches: looking at each operation on each image took a fifth of an evaluation.
    """

    batches: Iterable[tuple[Any, Any]]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        iterator = iter(self.batches)

        @uncounted()
        def following() -> tuple[Any, Any] | None:
            return next(iterator, None)

        if not _reads_ahead():
            yield from iter(following, None)
            return
        thread = ThreadPoolExecutor(1, "reader")
        try:
            ahead = deque(thread.submit(following) for _ in range(AHEAD))
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(following))
                yield batch
        finally:  # a reader that leaves early waits for one batch at most
            thread.shutdown(cancel_futures=True)


def _reads_ahead() -> bool:
    """Whether reading can go on beside encoding: on a GPU, or where the threads that encode leave a core free."""
    import torch

    from upcycle_bench.threads import core_is_free

    return torch.cuda.is_available() or core_is_free()


def classnames(folder: Path) -> tuple[str, ...]:
    """The classes of a set that is not for retrieval, as CLIP_benchmark reads them."""
    path = folder / CLASSNAMES
    if not path.is_file():
        raise UserError(f"evaluation set {folder.name}: {CLASSNAMES} missing in {folder}; copy the set again.")
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())


def digest(folder: Path, split: str = "test") -> str:
    """sha256 over the names and contents of the files that `read` uses, for fingerprints."""
    whole = hashlib.sha256()
    paths = _files(folder, split)
    for path, sha256 in zip(paths, files_sha256(paths), strict=True):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{sha256}\n".encode())
    return whole.hexdigest()


def shards_of(folder: Path, split: str = "test") -> list[Path]:
    """The shards of a split, in their order; UserError if one is missing."""
    return [path for path in _files(folder, split) if path.suffix == ".tar"]


def kind_of(folder: Path) -> Kind:
    """What its dataset_type.txt says; UserError for a kind that is not scored."""
    path = folder / TYPE
    kind = path.read_text(encoding="utf-8").strip().lower() if path.exists() else "classification"
    if kind not in (known := get_args(Kind)):
        raise UserError(f"evaluation set {folder.name}: {path} says {kind!r}; it must say one of {', '.join(known)}.")
    return cast(Kind, kind)


def strata_of(folder: Path) -> tuple[str, ...]:
    """The labels in a set's strata.txt; UserError for what is none. `require_strata` says whether they are enough."""
    path = folder / STRATA
    strata = path.read_text(encoding="utf-8").splitlines()
    if not strata or not all(map(STRATUM.fullmatch, strata)):
        raise UserError(
            f"evaluation set {folder.name}: {path} must hold a stratum (letters, digits, _ . and -) for each sample, "
            "one a line; copy the set again."
        )
    return tuple(strata)


def require_strata(name: str, strata: Sequence[str], samples: int) -> None:
    """UserError unless there are as many strata as the test split has samples, or none at all.

    For who has read all samples: to look for them in the shards alone took 4 % of an evaluation.
    """
    if strata and len(strata) != samples:
        raise UserError(
            f"evaluation set {name}: {STRATA} must hold a stratum for each of {samples} samples, one a line, but holds "
            f"{len(strata)} lines; copy the set again."
        )


def _files(folder: Path, split: str) -> list[Path]:
    """The files that make up a set, in a fixed order; raises UserError if one is missing."""
    require(folder.parent, [folder.name], split)
    counter = folder / split / "nshards.txt"
    text = counter.read_text().strip()
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"evaluation set {folder.name}: {counter} must hold the number of shards, not {text!r}.")
    shards = [folder / split / f"{i}.tar" for i in range(int(text))]
    if absent := [path.name for path in shards if not path.is_file()]:
        raise UserError(
            f"evaluation set {folder.name}: {', '.join(absent)} missing in {folder / split}, where nshards.txt counts "
            f"{len(shards)} shards; copy the set again."
        )
    names = (CLASSNAMES, TEMPLATES, TYPE, *([STRATA] if split == "test" else []))  # strata are those of the test split
    described = [path for name in names if (path := folder / name).exists()]
    return [*described, counter, *shards]
