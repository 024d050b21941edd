"""Evaluation sets on disk, in CLIP_benchmark's webdataset layout.

    ROOT/NAME/test/{nshards.txt,0.tar,...}                  samples: png with cls (a class index), npy (a 0 or 1 for
                                                            each class) or txt (captions)
    ROOT/NAME/dataset_type.txt                              classification (also when absent), multilabel or retrieval
    ROOT/NAME/{classnames,zeroshot_classification_templates}.txt      one a line; templates hold {c}
    ROOT/NAME/strata.txt                                    ours, optional: the stratum of each test sample, one a line

    evalset = read(root / "digits-test", transform, batch_size=256)
    for images_B3HW, labels in evalset.batches: ...

CLIP_benchmark reads our sets, and we read those that it publishes, to the same values (tested). What other tools write
is read or refused in one line, here and, for what is in the shards, in evalset_samples.py.
Source: build_wds_dataset in clip_benchmark.datasets.builder (1.6.2).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from upcycle_bench.data.evalset_samples import REMEDY, Kind, Sample, look
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import files_sha256

CLASSNAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
STRATA = "strata.txt"  # CLIP_benchmark ignores it
STRATUM = re.compile(r"[\w.-]+")  # it becomes part of the names of metrics
NUMBERED = re.compile(r"(.*?)([0-9]+)\.tar")


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
        raise not_found(root, missing, split)


def not_found(root: Path, missing: Iterable[str], split: str = "test") -> UserError:
    """The error that these sets are not below `root`, or lack the split."""
    there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    return UserError(
        f"evaluation set not found: {', '.join(missing)}; looked for NAME/{split}/nshards.txt in {root}, "
        f"which holds {', '.join(there) or 'no folders'}; give the folder that holds the sets."
    )


def read(folder: Path, transform: Callable[[Any], Any], batch_size: int, split: str = "test") -> EvalSet:
    """Open a set; its samples are read, and their images decoded, only when its batches are iterated.

    `transform` makes a tensor of a PIL image. Raises UserError for a set that is missing, incomplete or of an unknown
    kind; iteration raises it for a sample that is not valid.
    """
    files = _files(folder, split)
    kind = kind_of(folder)
    named = (classnames(folder), templates(folder)) if kind != "retrieval" else ((), ())
    strata = strata_of(folder) if folder / STRATA in files else ()
    return EvalSet(folder.name, kind, *named, _Batches(folder, split, transform, batch_size), strata)


@dataclass(frozen=True)
class _Batches:
    """Batches in the order of the shards, from the start each time.

    FLOP counters are stopped meanwhile: to look at each operation on each image took a fifth of an evaluation.
    """

    folder: Path
    split: str
    transform: Callable[[Any], Any]
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        from upcycle_bench.util.flops import uncounted  # imports torch, and many commands never get here

        found = samples(self.folder, self.split)
        return iter(uncounted()(lambda: self._batch(list(islice(found, self.batch_size)))), None)

    def _batch(self, part: list[Sample]) -> tuple[Any, Any] | None:
        import torch

        if not part:
            return None
        images = [self.transform(sample.image()) for sample in part]
        labels = [sample.label for sample in part]
        return (
            torch.stack(images) if isinstance(images[0], torch.Tensor) else images,
            labels if isinstance(labels[0], list) else np.array(labels),
        )


def samples(folder: Path, split: str = "test") -> Iterator[Sample]:
    """The samples of a split in the order of its shards; of their images only the place is read.

    Raises UserError for a shard that is not whole, for a sample that is not valid, and for a split without samples.
    """
    kind = kind_of(folder)
    classes = len(classnames(folder)) if kind != "retrieval" else 0
    sample = None
    for shard in shards_of(folder, split):
        for sample in look(shard, kind, classes):
            if sample.faults:
                raise _error(folder, f"{sample.place}: {sample.faults[0]}; {REMEDY}.")
            yield sample
    if sample is None:
        raise _error(folder, f"{split} holds no samples.")


def classnames(folder: Path) -> tuple[str, ...]:
    """The class names of a classification or multilabel set; UserError without."""
    return tuple(_lines(folder, CLASSNAMES))


def templates(folder: Path) -> tuple[str, ...]:
    """The prompts of such a set, which hold {c} for the class; UserError without, or for another brace."""
    found = _lines(folder, TEMPLATES)
    if bad := [line for line in found if not _is_template(line)]:
        which = ", ".join(map(repr, bad[:3])) + (", ..." if len(bad) > 3 else "")
        raise _error(folder, f"{TEMPLATES}: {which} {'do' if bad[1:] else 'does'} not hold {{c}} and no other brace.")
    return tuple(found)


def digest(folder: Path, split: str = "test") -> str:
    """sha256 over the names and contents of the files that `read` uses, for fingerprints."""
    whole = hashlib.sha256()
    paths = _files(folder, split)
    for path, sha256 in zip(paths, files_sha256(paths), strict=True):
        whole.update(f"{path.relative_to(folder).as_posix()}\0{sha256}\n".encode())
    return whole.hexdigest()


def shards_of(folder: Path, split: str = "test") -> list[Path]:
    """The shards of a split, in the order of their numbers; UserError unless they are those that nshards.txt counts.

    They are 0.tar, 1.tar, ...; other tools write 00000.tar or shard-000001.tar.
    """
    inside = folder / split
    there = {path.name: path for path in inside.glob("*.tar") if not path.name.startswith(".") and path.is_file()}
    if there and not (inside / "nshards.txt").is_file():
        raise _error(folder, f"{split}/nshards.txt is missing; it holds the number of shards, {len(there)} it seems.")
    require(folder.parent, [folder.name], split)
    text = _read(folder, inside / "nshards.txt").strip()
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise _error(folder, f"{split}/nshards.txt must hold the number of shards, not {text!r}.")
    count, fitting = int(text), [match for name in there if (match := NUMBERED.fullmatch(name))]
    numbers, words = sorted(int(match[2]) for match in fitting), {match[1] for match in fitting}
    if len(there) == count and len(words) == 1 and numbers in ([*range(count)], [*range(1, count + 1)]):
        return [there[match[0]] for match in sorted(fitting, key=lambda match: int(match[2]))]
    usual = [f"{number}.tar" for number in range(min(count, len(there) + 3))]
    absent, strange = ([name for name in one if name not in other] for one, other in ((usual, there), (there, usual)))
    holds = f"it holds {', '.join(sorted(strange)[:3])}" if strange else ""
    if absent:
        what = f"{', '.join(absent)} missing in {inside}, where nshards.txt counts {count} shards"
        raise _error(folder, "; ".join(filter(None, [what, holds, "copy the set again."])))
    raise _error(folder, f"{split} holds {', '.join(sorted(strange)[:3])}, but its nshards.txt counts {count}.")


def kind_of(folder: Path) -> Kind:
    """The kind in a set's dataset_type.txt; UserError for an unknown kind."""
    path = folder / TYPE
    kind = _read(folder, path).strip().lower() if path.exists() else "classification"
    if kind not in (known := get_args(Kind)):
        raise _error(folder, f"{path} says {kind!r}; it must say one of {', '.join(known)}.")
    return cast(Kind, kind)


def strata_of(folder: Path) -> tuple[str, ...]:
    """The labels in a set's strata.txt; UserError for a bad label. `require_strata` checks their number."""
    path = folder / STRATA
    strata = _read(folder, path).splitlines()
    if not strata or not all(map(STRATUM.fullmatch, strata)):
        raise _error(
            folder,
            f"{path} must hold a stratum (letters, digits, _ . and -) for each sample, one a line; copy the set again.",
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
    shards = shards_of(folder, split)
    names = (CLASSNAMES, TEMPLATES, TYPE, *([STRATA] if split == "test" else []))
    described = [path for name in names if (path := folder / name).exists()]
    return [*described, folder / split / "nshards.txt", *shards]


def _lines(folder: Path, name: str) -> list[str]:
    """The lines of a file, each without spaces around it; empty lines at its end do not count.

    Raises UserError for a file that is missing or empty, for an empty line before another one, and for characters that
    end a line for Python, and so for CLIP_benchmark, but for no editor: they would move the classes behind them.
    """
    path = folder / name
    if not path.is_file():
        raise _error(folder, f"{name} is missing; copy the set again.")
    text = _read(folder, path).rstrip()
    if not text:
        raise _error(folder, f"{name} is empty.")
    lines = [line.strip() for line in text.split("\n")]
    if not all(lines):
        raise _error(folder, f"{name} has empty lines.")
    if odd := next((place for place, line in enumerate(lines, start=1) if len(line.splitlines()) > 1), 0):
        raise _error(folder, f"{name}: line {odd} holds a line separator, {lines[odd - 1]!a}; put a space there.")
    return lines


def _is_template(line: str) -> bool:
    try:
        return "{c}" in line and bool(line.format(c="cat"))
    except (ValueError, LookupError):
        return False


def _read(folder: Path, path: Path) -> str:
    """A text file of a set, with or without byte order mark; its lines end in LF, CR LF or CR. UserError for others."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _error(folder, f"{path.relative_to(folder)} is not UTF-8; save it as that.") from None


def _error(folder: Path, what: str) -> UserError:
    return UserError(f"evaluation set {folder.name}: {what}")
