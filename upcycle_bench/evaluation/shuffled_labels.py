"""The control with shuffled labels: a suite must score them at chance, or labels leak into its answers.

    controls, without = score_shuffled(suites, context)

A small set is made of a real one, in the same format, with labels (or captions) dealt out anew. The suite scores the
model on it as on any set of a user's: it reads, encodes, ranks and computes its metrics. A small classification set has
equally many samples of each of its classes, so that 1 / classes of the answers are right whatever a model prefers.

No score may stand 4 standard errors above chance. For a share of right answers this is a binomial test with the same
odds, 1 in 30,000. For other metrics the standard error is the score's own.

One set of each kind is enough: the first one that the suite reads and that has 64 samples to shuffle. A suite without a
control is named, with the reason.
"""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from upcycle_bench.data import evalset
from upcycle_bench.data.evalset_write import write_shard
from upcycle_bench.record import ControlPart
from upcycle_bench.suite import EvalContext, OnlyNamed, Score, Suite
from upcycle_bench.util.errors import Unsound, UserError
from upcycle_bench.util.rng import Stream

SAMPLES, LEAST = 256, 64  # of a small set, at most and at least
SCANNED = 8 * SAMPLES  # samples looked at, from the start of a set
LIMIT = 4.0  # standard errors above chance


@dataclass(frozen=True)
class _Member:
    """A sample in a shard; `files`: suffix -> its file in the tar archive."""

    shard: Path
    files: dict[str, tarfile.TarInfo]


def score_shuffled(suites: Mapping[str, Suite], context: EvalContext) -> tuple[list[ControlPart], str | None]:
    """A control for each suite and each kind of set it reads; the suites without one, and why. Raises Unsound."""
    controls, without = [], []
    for name, suite in suites.items():
        found: set[str] = set()
        reasons: dict[str, None] = {}
        for dataset in suite.datasets():
            folder = context.root / dataset
            if ":" in dataset or not folder.is_dir():  # a training split, or a set of another world
                continue
            try:
                kind = evalset.kind_of(folder)
                if kind not in found:
                    controls.append(_control(name, suite, folder, context))
                    found.add(kind)
            except Unsound:
                raise
            except OnlyNamed:
                reasons["it scores only what a protocol names, and no protocol names shuffled labels."] = None
            except Exception as error:  # a suite may fail on a small set, and its own scores stand nevertheless
                what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                reasons[re.sub("^it ", "the shuffled set ", what)] = None
        if not found:
            without.append(f"{name}: {' '.join(reasons) or 'it reads no test set of this world.'}")
    return controls, " ".join(without) or None


def _control(name: str, suite: Suite, folder: Path, context: EvalContext) -> ControlPart:
    """The score farthest above chance on a shuffled copy of the set; Unsound where it is too far."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / folder.name
        samples = shuffled(folder, target)
        result = type(suite).of_set(target).evaluate(replace(context, root=target.parent))
    judged = [(z, score) for score in result.scores if score.higher_is_better and (z := z_of(score)) is not None]
    if not judged:
        raise UserError(f"suite {name} gives no score with a chance level and a standard error on {folder.name}.")
    z, score = max(judged, key=lambda pair: pair[0])
    if z >= LIMIT:
        raise Unsound(
            f"with shuffled labels {name} gives {score.metric} {score.value:.4f} on {samples} samples of "
            f"{folder.name}, where chance is {score.chance:.4f} ({z:,.0f} standard errors above); "
            "labels leak into the answers."
        )
    assert score.chance is not None
    return ControlPart(
        suite=name.partition("/")[0], dataset=folder.name, samples=samples, metric=score.metric, value=score.value,
        chance=score.chance, z=z,
    )  # fmt: skip


def z_of(score: Score) -> float | None:
    """How many standard errors a score stands above chance; None for a score without a standard error or a chance.

    For a share of right answers: the normal deviate, at least -8, whose odds are those of so many right answers or more
    by chance (binomial). For other metrics the score's own standard error counts. It is 0 where all samples are alike;
    1e-6 then allows for rounding.
    """
    if score.chance is None or score.standard_error is None:
        return None
    if re.fullmatch(r"acc\d+", score.metric):
        from scipy.stats import binom, norm

        odds = binom.sf(round(score.value * score.samples) - 1, score.samples, score.chance)
        return float(norm.isf(min(odds, 1 - 1e-15)))
    return (score.value - score.chance) / max(score.standard_error, 1e-6)


def shuffled(folder: Path, target: Path) -> int:
    """Write the small set with shuffled labels to `target`; returns its number of samples.

    Raises UserError for a set with several labels a sample, and for one with too few samples.
    """
    members = list(_scan(folder))
    rng = Stream(("certificate", "labels", folder.name)).generator()
    if evalset.kind_of(folder) == "classification":
        suffix, labels = "cls", _texts(members, "cls", folder)
        if not all(label.strip().isdigit() for label in labels):
            raise UserError(f"evaluation set {folder.name}: not one class for each sample, so labels are not shuffled.")
        chosen, classes = _balanced([int(label) for label in labels])
        names = evalset.classnames(folder)
        values = [str(classes.index(int(labels[place]))).encode() for place in chosen]
        lines = {evalset.CLASSNAMES: [names[label] for label in classes]}
        lines[evalset.TEMPLATES] = (folder / evalset.TEMPLATES).read_text(encoding="utf-8").splitlines()[:1]
    else:
        suffix, captions = "txt", _texts(members, "txt", folder)
        chosen = sorted(torch.randperm(len(members), generator=rng).tolist()[:SAMPLES])
        values, lines = [captions[place] for place in chosen], {}
    if len(chosen) < LEAST:
        raise UserError(f"evaluation set {folder.name}: {len(chosen)} samples are too few for a control.")
    order = torch.randperm(len(values), generator=rng).tolist()
    images = _images([members[place] for place in chosen], suffix)
    samples = (image | {suffix: values[place]} for image, place in zip(images, order, strict=True))
    write_shard(target / "test" / "0.tar", samples)
    lines |= {"test/nshards.txt": ["1"], evalset.TYPE: [evalset.kind_of(folder)]}
    for name, each in lines.items():
        (target / name).write_text("".join(f"{line}\n" for line in each), encoding="utf-8")
    return len(values)


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


def _images(members: list[_Member], suffix: str) -> Iterator[dict[str, bytes]]:
    return _read(members, lambda name: name != suffix)


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
