"""Checks evaluation sets in the layout of `evalset.py`, by reading every sample.

    for folder in find(Path("sets")):          # the sets in a folder, or the folder itself
        report = check(folder)                 # counts; `problems` and `notes`: a line for each fault and each oddity
    faults(folder, "test")                     # the problems alone; a set is read once, then the cache knows them

What a sample is, `evalset_samples` decides, as when sets are scored. A fault that many samples share is one problem,
which names the first of them and their number.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import __version__ as pillow

from upcycle_bench.data import evalset
from upcycle_bench.data.evalset_samples import Kind, Sample, look
from upcycle_bench.data.images import BadImage, rgb, without_alpha
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import cache_root, locked
from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import write_atomically

RULES = f"2-{pillow}"  # raise the number when other sets than before are valid


@dataclass
class Report:
    """What a set holds: `samples` by split, and `rarest`, by split the number of samples of the rarest class.

    A set with `problems` is not scored. `notes` say of a set that is scored what its scores may suffer from.
    """

    name: str
    kind: str = "unknown"
    samples: dict[str, int] = field(default_factory=dict)
    classes: int = 0
    templates: int = 0
    rarest: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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


def faults(folder: Path, split: str) -> list[str]:
    """What is wrong with a split of a set; an empty list for nothing.

    It takes as long as to read the set, so the cache keeps the answer under the hash of all that was read.
    """
    try:
        digest = evalset.digest(folder, split)
    except UserError:
        return check(folder, only={split}).problems  # it lacks files, so that this is quick
    kept = cache_root() / "checked" / f"{digest}-{split}-{RULES}.json"
    with locked(kept, f"the check of {folder}"):  # of several processes one reads the set
        with contextlib.suppress(OSError, ValueError):  # none, or a damaged one, which is made anew
            return list(strict_json.loads(kept.read_bytes()))
        problems = check(folder, only={split}).problems
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, strict_json.dumps(problems).encode())
    return problems


def check(folder: Path, *, only: Collection[str] | None = None) -> Report:
    """Read a set, or only the splits in `only`, which must be there; without `only` a test split must be."""
    report = Report(folder.name)
    there = [split for split in (splits(folder) if folder.is_dir() else []) if only is None or split in only]
    for absent in sorted({"test"} if only is None else set(only) - set(there)):
        if absent not in there:
            what = "which is what is scored" if absent == "test" else "which is what a probe learns from"
            report.problems.append(f"it has no {absent} split ({absent}/nshards.txt, {absent}/0.tar, ...), {what}.")
    if not there:
        return report
    report.kind = report.attempt(evalset.kind_of, folder) or "unknown"
    if report.kind in ("classification", "multilabel"):
        names = report.attempt(evalset.classnames, folder) or ()
        report.classes = len(names)
        if report.kind == "classification" and (same := _same(names)):
            report.notes.append(same)
        report.templates = len(report.attempt(evalset.templates, folder) or ())
    for split in there:
        _check_split(folder, split, report)
    if (folder / evalset.STRATA).exists() and "test" in there and not report.problems:
        strata = report.attempt(evalset.strata_of, folder) or ()
        report.attempt(evalset.require_strata, report.name, strata, report.samples["test"])
    report.problems = [line.replace(f"{folder}/", "") for line in report.problems]
    return report


def _check_split(folder: Path, split: str, report: Report) -> None:
    """Count the samples of a split, and say what is wrong with them."""
    report.samples[split] = 0
    labels: Counter[int] = Counter()
    found: dict[str, list[str]] = {}  # fault -> the samples that have it
    see_through: dict[str, str] = {}  # where an image with transparent pixels stands -> what is left of it
    for shard in report.attempt(evalset.shards_of, folder, split) or ():
        for sample, left in report.attempt(_all, shard, report.kind, report.classes) or ():
            report.samples[split] += 1
            see_through |= {sample.place: left} if left else {}
            for fault in sample.faults:
                found.setdefault(fault, []).append(sample.place)
            _count(sample.label, report, labels)
    if report.classes:
        report.rarest[split] = min(labels[label] for label in range(report.classes))
    report.problems += [
        f"{places[0]}: {fault}" + (f" ({len(places):,} samples alike)" if len(places) > 1 else "") + "."
        for fault, places in found.items()
    ]
    if see_through:
        blank = [place for place, left in see_through.items() if left == "one colour"]
        report.notes.append(
            f"{split}: transparent pixels in {len(see_through):,} of its images, which are read without transparency, "
            f"as by CLIP_benchmark; then {len(blank):,} are one colour{f', such as {blank[0]}' if blank else ''}."
        )
    if not report.samples[split]:
        report.problems.append(f"{split} holds no samples.")


def _same(names: Sequence[str]) -> str:
    """A note of the names that several classes have; "" for none."""
    classes: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        classes.setdefault(name, []).append(str(number))
    same = [f"{name!r} is the name of classes {' and '.join(which)}" for name, which in classes.items() if which[1:]]
    if not same:
        return ""
    more = f" (and {len(same) - 3:,} more names)" if len(same) > 3 else ""
    return f"{', '.join(same[:3])}{more}: the first of them wins, so that acc1 of the later ones is 0 by construction."


def _all(shard: Path, kind: str, classes: int) -> list[tuple[Sample, str | None]]:
    """The samples of a shard and what `without_alpha` says; a refused image is a fault. UserError for a bad shard."""
    if kind == "unknown":
        return []
    samples = list(look(shard, cast(Kind, kind), classes))
    with ThreadPoolExecutor(cores()) as pool:  # decoding releases the interpreter's lock
        return list(pool.map(_decoded, samples))


def _decoded(sample: Sample) -> tuple[Sample, str | None]:
    if sample.member is None:
        return sample, None
    content = sample.content()
    try:
        return sample, without_alpha(content, rgb(content))
    except BadImage as error:
        return replace(sample, faults=(*sample.faults, sample.refused(error))), None


def _count(label: Any, report: Report, labels: Counter[int]) -> None:
    """Count a label in `labels`, or captions in the report."""
    if isinstance(label, int):
        labels[label] += 1
    elif isinstance(label, np.ndarray):
        labels.update(np.flatnonzero(label).tolist())
    elif label is not None:
        report.captions += len(label)
