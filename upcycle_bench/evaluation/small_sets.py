"""Small copies of evaluation sets in memory, whose labels or class names a control deals out anew.

    small = take(folder, Stream(("certificate", ...)))          # at most 128 samples
    small.write(target, small.values, small.classes)            # a folder that every suite reads

A small classification set has equally many samples of each of its classes, so that 1 / classes of the answers are right
whatever a model prefers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
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
    kind = evalset.kind_of(folder)
    if kind == "multilabel":
        raise UserError(f"evaluation set {folder.name}: several labels for each sample, so labels are not shuffled.")
    scanned = list(islice(evalset.samples(folder), SCANNED))
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    if kind == "classification":
        chosen, kept = _balanced([sample.label for sample in scanned])
        names = evalset.classnames(folder)
        values = [str(kept.index(scanned[place].label)).encode() for place in chosen]
        classes = tuple(names[label] for label in kept)
        templates = evalset.templates(folder)[:1]
    else:
        chosen = sorted(torch.randperm(len(scanned), generator=rng.generator()).tolist()[:SAMPLES])
        values = ["\n".join(scanned[place].label).encode() for place in chosen]
    if len(chosen) < LEAST:
        raise UserError(f"evaluation set {folder.name}: {len(chosen)} samples are too few for a control.")
    images = [{scanned[place].suffix: scanned[place].content()} for place in chosen]
    return SmallSet(kind, images, values, classes, templates)


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
