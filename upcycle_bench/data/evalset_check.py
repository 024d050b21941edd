"""Checks evaluation sets in the layout of `evalset.py`, by reading every sample.

    for folder in find(Path("sets")):          # the sets in a folder, or the folder itself
        report = check(folder)                 # counts, and `problems`: a line for each thing that is wrong

webdataset itself reads the shards, as when they are scored. A fault that many samples share is one problem, which names
the first of them and their number.

Shape suffixes: Y classes.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_bench.data import evalset
from upcycle_bench.util.errors import UserError


@dataclass
class Report:
    """What a set holds: `samples` by split, and `rarest`, by split the number of samples of the rarest class."""

    name: str
    kind: str = "unknown"
    samples: dict[str, int] = field(default_factory=dict)
    classes: int = 0
    templates: int = 0
    rarest: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    problems: list[str] = field(default_factory=list)

    def attempt(self, call: Any, *arguments: Any) -> Any:
        """What the call returns. If it raises UserError, that becomes a problem, and the answer is None."""
        try:
            return call(*arguments)
        except UserError as error:
            self.problems.append(str(error).removeprefix(f"evaluation set {self.name}: "))


def find(folder: Path) -> list[Path]:
    """The folder itself if it looks like a set, else the folders in it that are not hidden; UserError for none."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give an evaluation set, or a folder that holds some.")
    if splits(folder) or any((folder / name).exists() for name in (evalset.TYPE, evalset.CLASSNAMES)):
        return [folder]
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise UserError(f"{folder} is no evaluation set and holds none: a set is a folder with test/nshards.txt.")
    return found


def splits(folder: Path) -> list[str]:
    """Names of the folders of a set that hold shards or nshards.txt."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    return [path.name for path in inside if (path / "nshards.txt").exists() or any(path.glob("*.tar"))]


def require_valid(folder: Path, only: Collection[str]) -> None:
    """Raise UserError with the first problem of these splits, if there is one. Images are not decoded."""
    if problems := check(folder, only=only, decode=False).problems:
        raise UserError(f"no valid set, `upcycle-bench data check` says all of it: {problems[0]}")


def check(folder: Path, *, only: Collection[str] | None = None, decode: bool = True) -> Report:
    """Read a set, or only the splits in `only`. `decode=False` skips the images, which take most of the time."""
    report = Report(folder.name)
    there = [split for split in splits(folder) if only is None or split in only]
    if "test" not in there:
        report.problems.append("it has no test split (test/nshards.txt, test/0.tar, ...), which is what is scored.")
    if not there:
        return report
    report.kind = report.attempt(evalset.kind_of, folder) or "unknown"
    if report.kind in ("classification", "multilabel"):
        report.classes = len(_lines(folder, evalset.CLASSNAMES, report))
        report.templates = len(templates := _lines(folder, evalset.TEMPLATES, report))
        report.problems += [
            f"{evalset.TEMPLATES}: {line!r} does not hold {{c}}, the class, and no other brace."
            for line in templates
            if not _is_template(line)
        ]
    faults: dict[str, list[str]] = {}  # fault -> the samples that have it
    for split in there:
        report.samples[split] = 0
        labels: Counter[int] = Counter()
        for shard in report.attempt(_shards, folder, split) or ():
            for sample in _samples(shard, report):
                report.samples[split] += 1
                for fault in _faults(sample, report, labels, decode):
                    faults.setdefault(fault, []).append(f"{split}/{shard.name}: {sample['__key__']}")
        if report.classes:
            report.rarest[split] = min(labels[label] for label in range(report.classes))
    report.problems += [
        f"{places[0]}: {fault}" + (f" ({len(places):,} samples alike)" if len(places) > 1 else "") + "."
        for fault, places in faults.items()
    ]
    report.problems += [f"{split} holds no samples." for split, count in report.samples.items() if not count]
    if (folder / evalset.STRATA).exists() and not report.problems:
        strata = report.attempt(evalset.strata_of, folder) or ()
        report.attempt(evalset.require_strata, report.name, strata, report.samples["test"])
    return report


def _lines(folder: Path, name: str, report: Report) -> list[str]:
    path = folder / name
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except UnicodeDecodeError:
        report.problems.append(f"{name} is not UTF-8.")
        return []
    if not lines:
        report.problems.append(f"{name} is {'empty' if path.is_file() else 'missing'}.")
    elif not all(line.strip() for line in lines):
        report.problems.append(f"{name} has empty lines.")
    return [line.strip() for line in lines]


def _is_template(line: str) -> bool:
    try:
        return "{c}" in line and bool(line.format(c="cat"))
    except (ValueError, LookupError):
        return False


def _shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split; UserError unless they are those that nshards.txt counts."""
    if not (folder / split / "nshards.txt").is_file():
        raise UserError(f"{split}/nshards.txt is missing; it holds the number of shards.")
    shards = evalset.shards_of(folder, split)
    if more := sorted({path.name for path in (folder / split).glob("*.tar")} - {path.name for path in shards}):
        raise UserError(f"{split} holds {', '.join(more)}, but its nshards.txt counts {len(shards)}: 0.tar and so on.")
    return shards


def _samples(shard: Path, report: Report) -> Iterator[dict[str, Any]]:
    """Each sample, extension -> content, as webdataset groups the files. A shard that breaks off is a problem."""
    import webdataset

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="WebDataset.shardshuffle")
        dataset = webdataset.WebDataset(
            str(shard), nodesplitter=lambda urls: urls, shardshuffle=False, empty_check=False
        )
    try:
        yield from dataset
    except Exception as error:  # webdataset does not document which errors it raises
        why = " ".join(str(error.args[0] if error.args else error).split())  # webdataset adds the file as an argument
        report.problems.append(f"{shard.parent.name}/{shard.name} cannot be read to its end ({why}).")


def _faults(sample: dict[str, Any], report: Report, labels: Counter[int], decode: bool) -> Iterator[str]:
    """The faults of a sample; counts its label in `labels`, or its captions in the report."""
    extension = next((extension for extension in evalset.IMAGES if extension in sample), None)
    if extension is None:
        yield f"no image ({', '.join(evalset.IMAGES)})"
    elif decode and not _is_image(sample[extension]):
        yield f"its .{extension} is no image that can be read"
    if report.kind == "classification":
        yield from _label_faults(sample, report, labels)
    elif report.kind == "multilabel":
        yield from _vector_faults(sample, report, labels)
    elif report.kind == "retrieval":
        yield from _caption_faults(sample, report)


def _label_faults(sample: dict[str, Any], report: Report, labels: Counter[int]) -> Iterator[str]:
    if "cls" not in sample:
        yield "no .cls, which holds the class index"
        return
    try:
        label = int(sample["cls"])
    except ValueError:
        yield ".cls is no class index"
        return
    labels[label] += 1
    if report.classes and not 0 <= label < report.classes:
        yield f"its class index is not one of 0 ... {report.classes - 1}, which {evalset.CLASSNAMES} names"


def _vector_faults(sample: dict[str, Any], report: Report, labels: Counter[int]) -> Iterator[str]:
    if "npy" not in sample:
        yield "no .npy, which holds a 0 or 1 for each class"
        return
    try:
        shown_Y = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        yield ".npy is no NumPy array"
        return
    if report.classes and (shown_Y.shape != (report.classes,) or not np.isin(shown_Y, (0, 1)).all()):
        yield f"its .npy does not hold a 0 or 1 for each of the {report.classes} classes of {evalset.CLASSNAMES}"
        return
    labels.update(np.flatnonzero(shown_Y).tolist())


def _caption_faults(sample: dict[str, Any], report: Report) -> Iterator[str]:
    if "txt" not in sample:
        yield "no .txt, which holds captions, one a line"
        return
    try:
        captions = sample["txt"].decode("utf-8").splitlines()
    except UnicodeDecodeError:
        yield ".txt is not UTF-8"
        return
    report.captions += len(captions)
    if not captions or not all(caption.strip() for caption in captions):
        yield "an empty caption, or none"


def _is_image(data: bytes) -> bool:
    from PIL import Image

    try:
        Image.open(io.BytesIO(data)).convert("RGB")
    except Exception:  # Pillow raises many kinds of errors for a broken image
        return False
    return True
