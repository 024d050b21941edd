"""Evaluation sets on disk, in CLIP_benchmark's webdataset layout.

    ROOT/NAME/test/{nshards.txt,0.tar,...}                  samples: png with cls (a class index), npy (a 0 or 1 for
                                                            each class) or txt (captions)
    ROOT/NAME/dataset_type.txt                              classification (also when absent), multilabel or retrieval
    ROOT/NAME/{classnames,zeroshot_classification_templates}.txt      one a line; templates hold {c}
    ROOT/NAME/strata.txt                                    ours, optional: the stratum of each test sample, one a line

    evalset = read(root / "digits-test", transform, batch_size=256)
    for images_B3HW, labels in evalset.batches: ...

CLIP_benchmark reads our sets, and we read those that it publishes. Source: its build_wds_dataset in
clip_benchmark.datasets.builder (1.6.2).
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import files_sha256

Kind = Literal["classification", "multilabel", "retrieval"]
CLASSNAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
STRATA = "strata.txt"  # CLIP_benchmark ignores it
STRATUM = re.compile(r"[\w.-]+")  # it becomes part of the names of metrics
IMAGES = ("webp", "png", "jpg", "jpeg")  # the first that a sample has is its image, as in CLIP_benchmark


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set. `batches` can be iterated many times, always in the order of the shards.

    Each batch is (images float32 [B, 3, H, W], labels int [B]). For multilabel the second is [B, classes], not 0 where
    an image shows the class; for retrieval it is a list of B lists of captions. `strata` holds a label for each sample
    in that order, or nothing if the set is not divided. A caller that has read all samples must call `require_strata`.
    """

    name: str
    kind: Kind
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    batches: Iterable[tuple[Any, Any]]
    strata: tuple[str, ...] = ()


def require(root: Path, names: Iterable[str], split: str = "test") -> None:
    """Raise UserError, which names all sets below `root` that are missing or lack the split."""
    missing = [name for name in names if not (root / name / split / "nshards.txt").is_file()]
    if missing:
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise UserError(
            f"evaluation set not found: {', '.join(missing)}; looked for NAME/{split}/nshards.txt in {root}, "
            f"which holds {', '.join(there) or 'no folders'}; give the folder that holds the sets."
        )


def read(folder: Path, transform: Callable[[Any], Any], batch_size: int, split: str = "test") -> EvalSet:
    """Open a set; its images are decoded only when its batches are iterated.

    `transform` makes a tensor of a PIL image. Raises UserError for a set that is missing, incomplete or of an unknown
    kind.
    """
    files = _files(folder, split)
    kind = kind_of(folder)
    if kind != "retrieval" and (absent := [name for name in (CLASSNAMES, TEMPLATES) if folder / name not in files]):
        raise UserError(
            f"evaluation set {folder.name}: {' and '.join(absent)} missing in {folder}; copy the set again."
        )

    from clip_benchmark.datasets.builder import build_wds_dataset

    with warnings.catch_warnings():
        # CLIP_benchmark does not set `shardshuffle`. webdataset then does not shuffle, as we want, but warns.
        warnings.filterwarnings("ignore", message="WebDataset.shardshuffle")
        dataset = build_wds_dataset(folder.name, transform, split=split, data_dir=str(folder.absolute()))
    classnames, templates = tuple(dataset.classes or ()), tuple(dataset.templates or ())
    strata = strata_of(folder) if folder / STRATA in files else ()
    return EvalSet(folder.name, kind, classnames, templates, _Batches(dataset.batched(batch_size)), strata)


@dataclass(frozen=True)
class _Batches:
    """Batches in the order of the shards, from the start each time.

    FLOP counters are stopped meanwhile: to look at each operation on each image took a fifth of an evaluation.
    """

    batches: Iterable[tuple[Any, Any]]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        from upcycle_bench.util.flops import uncounted  # imports torch, and many commands never get here

        iterator = iter(self.batches)
        return iter(uncounted()(lambda: next(iterator, None)), None)


def classnames(folder: Path) -> tuple[str, ...]:
    """The class names of a classification or multilabel set, as CLIP_benchmark reads them; UserError without."""
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
    """The shards of a split, in the order of their numbers; UserError if one is missing."""
    return [path for path in _files(folder, split) if path.suffix == ".tar"]


def kind_of(folder: Path) -> Kind:
    """The kind in a set's dataset_type.txt; UserError for an unknown kind."""
    path = folder / TYPE
    kind = path.read_text(encoding="utf-8").strip().lower() if path.exists() else "classification"
    if kind not in (known := get_args(Kind)):
        raise UserError(f"evaluation set {folder.name}: {path} says {kind!r}; it must say one of {', '.join(known)}.")
    return cast(Kind, kind)


def strata_of(folder: Path) -> tuple[str, ...]:
    """The labels in a set's strata.txt; UserError for a bad label. `require_strata` checks their number."""
    path = folder / STRATA
    strata = path.read_text(encoding="utf-8").splitlines()
    if not strata or not all(map(STRATUM.fullmatch, strata)):
        raise UserError(
            f"evaluation set {folder.name}: {path} must hold a stratum (letters, digits, _ . and -) for each sample, "
            "one a line; copy the set again."
        )
    return tuple(strata)


def require_strata(name: str, strata: Sequence[str], samples: int) -> None:
    """Raise UserError unless there is a stratum for each of `samples` samples, or none at all.

    The caller has read all samples and knows their number. To count them in the shards took 4 % of an evaluation.
    """
    if strata and len(strata) != samples:
        raise UserError(
            f"evaluation set {name}: {STRATA} must hold a stratum for each of {samples} samples, one a line, but holds "
            f"{len(strata)} lines; copy the set again."
        )


def _files(folder: Path, split: str) -> list[Path]:
    """All files of a set that `read` uses, in a fixed order; UserError if one is missing."""
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
    names = (CLASSNAMES, TEMPLATES, TYPE, *([STRATA] if split == "test" else []))
    described = [path for name in names if (path := folder / name).exists()]
    return [*described, counter, *shards]
