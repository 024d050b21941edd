"""Checks training shards: what their index tells, and every image, decoded.

if is_training(text):                                       # a .tar, a range of them, a folder with some, an address
    report = check_pairs(expand_sources(text), reporter)    # counts, and `problems`: a line for each bad shard
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from upcycle_bench.data import evalset, evalset_check, places
from upcycle_bench.data.bad_list import list_bad, read_bad, unlist
from upcycle_bench.data.bad_samples import KINDS as BAD_KINDS
from upcycle_bench.data.bad_samples import BadSample, captions_of, image_of
from upcycle_bench.data.blocks import Reader
from upcycle_bench.data.index import BLOCK, NOWHERE, Index
from upcycle_bench.data.open_index import WORTH_A_WORKER, packed
from upcycle_bench.data.packed_index import Packed
from upcycle_bench.data.pair_index import KINDS, in_order, require_pairs
from upcycle_bench.data.sources import BETWEEN, Sources, is_list
from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import results
from upcycle_bench.util.progress import Reporter

Bad = tuple[str, str, str]  # kind, name of the sample, a line


@dataclass
class PairReport:
    """What training shards hold. `left_out`: kind -> samples (`pair_index.KINDS`); `suffixes`: of all samples' files.

    bad: kind -> pairs whose image a training would replace (`bad_samples.KINDS`), those that are `listed` not among
    them. good: listed pairs that can be used here. `problems`: a line for each shard that is not whole, or has bad
    pairs.
    """

    shards: int
    pairs: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    listed: int = 0
    good: int = 0
    identity: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def warning(self) -> str:
        """The samples that are left out, and what the kinds mean; "" for none."""
        if not self.left_out:
            return ""
        total = sum(self.left_out.values())
        kinds = "; ".join(f"{count:,} {kind} ({KINDS[kind]})" for kind, count in self.left_out.items())
        seen = ", ".join(f".{suffix} ({count:,})" for suffix, count in self.suffixes.items())
        return f"{total:,} of {total + self.pairs:,} samples are left out: {kinds}; suffixes: {seen}"

    @property
    def remedy(self) -> str:
        """What is bad, and what to do; "" for nothing."""
        if not self.bad:
            return ""
        kinds = "; ".join(f"{count:,} {kind} ({BAD_KINDS[kind]})" for kind, count in self.bad.items())
        return (
            f"{sum(self.bad.values()):,} of {self.pairs:,} pairs are bad: {kinds}. Put them on the list with --list, "
            "and then mend or remove them: the data's identity stays."
        )

    @property
    def mended(self) -> str:
        """What to do with listed pairs that are good here; "" without such."""
        if not self.good:
            return ""
        return (
            f"{self.good:,} listed pairs can be used here, and a training leaves them out: they were mended, or are "
            "bad in a copy only. --unlist takes them off the list; runs that go on then read them again."
        )


def is_training(text: str) -> bool:
    """Whether `text` names training shards: no folder, or one with .tar files that is no part of an evaluation set."""
    folder = Path(text)
    if not places.is_local(text) or is_list(text):
        return True
    if "{" in text or BETWEEN in text:  # perhaps too long for a name
        return True
    if not folder.is_dir():
        return folder.exists() or folder.suffix == ".tar"
    marks = ("nshards.txt", evalset.TYPE, evalset.CLASSNAMES)
    set_or_split = any((folder / name).exists() for name in marks) or evalset_check.splits(folder)
    return not set_or_split and any(folder.glob("*.tar"))


def check_pairs(sources: Sources, reporter: Reporter, *, lists: bool = False, unlists: bool = False) -> PairReport:
    """Index the shards and decode all images, large shards by all cores.

    `lists`: put bad pairs on the bad list; `unlists`: take pairs off that are good.

    UserError where a shard is missing or cannot be read.
    """
    found = packed(sources, "", reporter)
    report = PairReport(len(sources.shards), len(found.rows), in_order(found.left_out), found.suffixes)
    report.identity = found.identity()
    report.problems += [f"{sources.shards[number]}: {why}" for number, _, why in found.faults]
    known = read_bad(report.identity)
    new = {number: bad for number, bad in _bad_pairs(found, reporter).items() if number not in known}
    good = _good_pairs(found.index({}), known)
    if unlists:
        unlist(report.identity, good)
        known, good = read_bad(report.identity), set()
    report.good = len(good)
    if lists:
        list_bad(found.index({}), [(number, kind, key) for number, (kind, key, _) in new.items()])
        known, new = read_bad(report.identity), {}
    report.listed = len(known)
    report.bad = dict(Counter(kind for kind, _, _ in new.values()).most_common())
    report.problems += _lines(found, new)
    if not report.problems:
        try:
            require_pairs(len(found.rows), found.left_out, found.suffixes, sources.shards)
        except UserError as error:
            report.problems.append(str(error))
    return report


def _bad_pairs(found: Packed, reporter: Reporter) -> dict[int, Bad]:
    """Each pair whose image cannot be used, by its number."""
    starts = found.starts
    work = [(place, found.rows[starts[n] : starts[n + 1]]) for n, place in enumerate(found.sources.shards)]
    processes = min(cores(), len(work), sum(found.sizes) // WORTH_A_WORKER)
    if processes > 1:
        checked = results(bad_images, work, processes, reporter.track, "checking images")
    else:
        checked = [bad_images(*each) for each in reporter.track(work, "checking images")]
    return {starts[n] + row: bad for n, each in enumerate(checked) for row, bad in each.items()}


def _good_pairs(index: Index, listed: Iterable[int]) -> set[int]:
    """The listed pairs that can be read whole, with image and caption."""
    good, reader = set(), Reader(index)
    for number in listed:
        with contextlib.suppress(BadSample):
            raw = reader.read(number)
            image_of(raw.image)
            captions_of(raw.text, "text")
            good.add(number)
    return good


def bad_images(place: str, rows: np.ndarray) -> dict[int, Bad]:
    """Each pair of a shard whose image cannot be used, by its row. rows: `ROW` [pairs] of the shard."""
    found: dict[int, Bad] = {}
    if not len(rows):
        return found
    with places.open_place(place) as file:
        for row, (image, image_bytes) in enumerate(rows[["image", "image_bytes"]].tolist()):
            if image == NOWHERE:  # its shard is a problem of its own
                continue
            file.seek((image - 1) * BLOCK)
            header, content = file.read(BLOCK), file.read(image_bytes)
            try:
                image_of(content)
            except BadSample as error:
                name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")  # of a longer one its beginning
                line = f"the image at byte {image * BLOCK} ({name}) cannot be read ({error})"
                folder, slash, file_name = name.rpartition("/")
                found[row] = error.kind, f"{folder}{slash}{file_name.partition('.')[0]}", line
    return found


def _lines(found: Packed, bad: dict[int, Bad]) -> list[str]:
    """A line for each shard with bad pairs, which names the first."""
    numbers = np.array(sorted(bad), dtype=np.int64)
    shards, first, counts = np.unique(
        np.searchsorted(found.starts, numbers, side="right") - 1, return_index=True, return_counts=True
    )
    lines = []
    for shard, place, count in zip(shards.tolist(), first.tolist(), counts.tolist(), strict=True):
        alike = f"; {count:,} images of this shard cannot be read" if count > 1 else ""
        lines.append(f"{found.sources.shards[shard]}: {bad[int(numbers[place])][2]}{alike}.")
    return lines
