"""Small copies of evaluation sets in memory, whose labels or class names a control deals out anew.

    small = take(folder, Stream(("certificate", ...)))          # at most 128 samples
    small.write(target, small.values, small.classes)            # a folder that every suite reads

A small classification set has equally many samples of each of its classes, so that 1 / classes of the answers are right
whatever a model prefers.
"""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from upcycle_bench.data import evalset
from upcycle_bench.data.evalset_write import write_shard
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

SAMPLES, LEAST = 128, 64  # of a small set, at most and at least; a suite reads it several times
SCANNED = 8 * SAMPLES  # samples looked at, from the start of a set


@dataclass(frozen=True)
class SmallSet:
    """Some samples of a set. `images`: suffix -> file; `values`: the label or captions of each, as in its shard.

    `classes` and `templates` are empty for captions.
    """

    kind: evalset.Kind
    images: list[dict[str, bytes]]
    values: list[bytes]
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def write(self, target: Path, values: Sequence[bytes], classes: Sequence[str]) -> None:
        """Write the set to the folder `target`, with other labels or another list of classes."""
        suffix = "cls" if self.kind == "classification" else "txt"
        samples = (image | {suffix: value} for image, value in zip(self.images, values, strict=True))
        write_shard(target / "test" / "0.tar", samples)
        lines: dict[str, Sequence[str]] = {"test/nshards.txt": ["1"], evalset.TYPE: [self.kind]}
        if self.classes:
            lines |= {evalset.CLASSNAMES: list(classes), evalset.TEMPLATES: list(self.templates)}
        for name, each in lines.items():
            (target / name).write_text("".join(f"{line}\n" for line in each), encoding="utf-8")


def take(folder: Path, rng: Stream) -> SmallSet:
    """A small copy of the set, with its true labels; `rng` chooses among captions.

    Raises UserError for a set with several labels a sample, and for one with too few samples.
    """
    members, kind = list(_scan(folder)), evalset.kind_of(folder)
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    if kind == "classification":
        suffix, labels = "cls", _texts(members, "cls", folder)
        if not all(label.strip().isdigit() for label in labels):
            raise UserError(f"evaluation set {folder.name}: not one class for each sample, so labels are not shuffled.")
        chosen, kept = _balanced([int(label) for label in labels])
        names = evalset.classnames(folder)
        values = [str(kept.index(int(labels[place]))).encode() for place in chosen]
        classes = tuple(names[label] for label in kept)
        templates = tuple((folder / evalset.TEMPLATES).read_text(encoding="utf-8").splitlines()[:1])
    else:
        suffix, captions = "txt", _texts(members, "txt", folder)
        chosen = sorted(torch.randperm(len(members), generator=rng.generator()).tolist()[:SAMPLES])
        values = [captions[place] for place in chosen]
    if len(chosen) < LEAST:
        raise UserError(f"evaluation set {folder.name}: {len(chosen)} samples are too few for a control.")
    images = list(_read([members[place] for place in chosen], lambda name: name != suffix))
    return SmallSet(kind, images, values, classes, templates)


@dataclass(frozen=True)
class _Member:
    """A sample in a shard; `files`: suffix -> its file in the tar archive."""

    shard: Path
    files: dict[str, tarfile.TarInfo]


def _scan(folder: Path) -> Iterator[_Member]:
    """The first samples of the test split; members of one share their name up to its first dot, as in webdataset."""
    seen = 0
    for shard in evalset.shards_of(folder):
        with tarfile.open(shard) as tar:
            files = (member for member in tar if member.isfile())
            for key, group in groupby(files, key=lambda member: re.sub(r"\.[^/]*$", "", member.name)):
                yield _Member(shard, {member.name[len(key) + 1 :]: member for member in group})
                seen += 1
                if seen == SCANNED:
                    return


def _texts(members: list[_Member], suffix: str, folder: Path) -> list[bytes]:
    if not all(suffix in member.files for member in members):
        raise UserError(f"evaluation set {folder.name}: not every sample has a .{suffix}, so labels are not shuffled.")
    return [files[suffix] for files in _read(members, lambda name: name == suffix)]


def _read(members: list[_Member], wanted: Callable[[str], bool]) -> Iterator[dict[str, bytes]]:
    for shard, group in groupby(members, key=lambda member: member.shard):
        with tarfile.open(shard) as tar:
            for member in group:
                files = ((name, tar.extractfile(info)) for name, info in member.files.items() if wanted(name))
                yield {name: file.read() for name, file in files if file is not None}


def _balanced(labels: list[int]) -> tuple[list[int], list[int]]:
    """The places of at most SAMPLES samples, equally many of each of two classes or more; and these classes.

    It takes as many samples as it can. Of equally many it takes those with the fewest classes, where a leak needs the
    fewest right answers to show.
    """
    places: dict[int, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    chosen: list[int] = []
    for each in range(1, SAMPLES // 2 + 1):
        classes = sorted(label for label in places if len(places[label]) >= each)[: SAMPLES // each]
        if len(classes) >= 2 and each * len(classes) >= len(chosen):
            chosen = sorted(place for label in classes for place in places[label][:each])
    return chosen, sorted({labels[place] for place in chosen})
