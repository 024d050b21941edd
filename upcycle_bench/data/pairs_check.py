"""Checks training shards, by reading every sample as a training would, and decoding every image.

if is_training(text):                                   # a .tar, a range of them, or a folder with some
    report = check_pairs(expand_shards(text), reporter) # counts, and `problems`: a line for each bad shard
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upcycle_bench.data import evalset, evalset_check
from upcycle_bench.data.pair_index import KINDS, PairIndex, add_shard, require_pairs
from upcycle_bench.data.shards import open_image
from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import results
from upcycle_bench.util.progress import Reporter

WORTH_A_WORKER = 64 << 20  # bytes of shards


@dataclass
class PairReport:
    """What training shards hold. `left_out`: kind -> samples (`pair_index.KINDS`); `suffixes`: of all samples' files.

    `problems` would stop a training, samples that are left out would not.
    """

    shards: int
    pairs: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)
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


def is_training(text: str) -> bool:
    """Whether `text` names training shards: no folder, or one with .tar files that is no part of an evaluation set."""
    folder = Path(text)
    if not folder.is_dir():
        return folder.exists() or "{" in text or folder.suffix == ".tar"
    marks = ("nshards.txt", evalset.TYPE, evalset.CLASSNAMES)
    set_or_split = any((folder / name).exists() for name in marks) or evalset_check.splits(folder)
    return not set_or_split and any(folder.glob("*.tar"))


def check_pairs(shards: Sequence[Path], reporter: Reporter) -> PairReport:
    """Read all samples of the shards, large ones by all cores."""
    processes = min(cores(), len(shards), sum(shard.stat().st_size for shard in shards) // WORTH_A_WORKER)
    if processes > 1:
        found = results(check_shard, [(shard,) for shard in shards], processes, reporter.track, "checking shards")
    else:
        found = [check_shard(shard) for shard in reporter.track(shards, "checking shards")]
    whole = PairIndex()
    report = PairReport(len(shards))
    for index, problems in found:
        whole.images += index.images
        whole.left_out += index.left_out
        whole.suffixes += index.suffixes
        report.problems += problems
    report.pairs, report.left_out = whole.counts.pairs, whole.counts.left_out
    report.suffixes = dict(Counter(whole.suffixes).most_common(12))
    if not report.problems:
        try:
            require_pairs(whole, shards)
        except UserError as error:
            report.problems.append(str(error))
    return report


def check_shard(shard: Path) -> tuple[PairIndex, list[str]]:
    """The pairs of one shard, without captions, and what is wrong: one line for the shard, or for all its images."""
    index = PairIndex()
    try:
        add_shard(index, 0, shard, "text")
    except UserError as error:
        return PairIndex(), [str(error)]
    index.captions.clear()
    broken = []
    for _, offset, size in index.images:
        try:
            open_image(shard, offset, size, "remove it")
        except UserError as error:
            broken.append(str(error))
    alike = f" ({len(broken):,} images of this shard cannot be read)." if len(broken) > 1 else "."
    return index, [broken[0].removesuffix(".") + alike] if broken else []
