"""Which samples of training shards are pairs, and how many are left out, by kind.

    index = index_pairs(shards, "text", "--data")       # places of the images, and captions
    counts = count_pairs(shards, "text", "--data")      # from the cache, if these shards were counted before
    counts.left_out                                     # {"no caption": 12}

A pair is an image and a .txt that is not empty. Shards made elsewhere often hold other samples; what a training does
not read must be known, or half a data set can be missing in silence.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from upcycle_bench.data.shards import open_shard, read_member, shards_digest
from upcycle_bench.protocol import Captions
from upcycle_bench.util import strict_json
from upcycle_bench.util.cache import build_once, cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import write_atomically

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
CAPTION_SUFFIX = "txt"
BESIDE = ("json", "cls", "npy")  # what other samples hold beside an image and a caption

# Why a sample is left out, and what that means.
RULES = 2  # raise it when the same shards would give other counts
KINDS = {
    "dots in a name": "a name ends at its first dot, so a.b.jpg is no image; rename the files",
    "unknown suffix": f"an image is {', '.join(f'.{suffix}' for suffix in IMAGE_SUFFIXES)}, a caption .txt",
    "no image": "no file with the suffix of an image",
    "no caption": "no .txt",
    "empty caption": "a .txt without any text",
    "not UTF-8": "its .txt is in another encoding; write it in UTF-8",
    "key twice": "its shard has a sample of the same name; the first counts",
}


@dataclass(frozen=True)
class Counts:
    """How many pairs some shards hold, and how many samples are left out, by kind (`KINDS`)."""

    pairs: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        """The samples that are left out, in a few words."""
        total = sum(self.left_out.values())
        parts = ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.items())
        return f"{total:,} of {total + self.pairs:,} training samples are left out: {parts}"


@dataclass
class PairIndex:
    """The pairs of some shards, in their order.

    images: (number of the shard, offset of the image, its bytes) of each pair; captions: its captions, at least one.
    left_out: kind -> samples; suffixes: suffix -> files, of all samples.
    """

    images: list[tuple[int, int, int]] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)

    @property
    def counts(self) -> Counts:
        """The numbers of pairs and of samples that are left out, in the order of `KINDS`."""
        return Counts(len(self.images), {kind: self.left_out[kind] for kind in KINDS if self.left_out[kind]})


def index_pairs(shards: Sequence[Path], captions: Captions, option: str = "") -> PairIndex:
    """The pairs of all shards. UserError, which names `option`, for a bad shard, and where no pair is left."""
    index = PairIndex()
    for number, shard in enumerate(shards):
        add_shard(index, number, shard, captions, option)
    require_pairs(index, shards, option)
    return index


def count_pairs(shards: Sequence[Path], captions: Captions, option: str = "", index: PairIndex | None = None) -> Counts:
    """The numbers of `index`, or else of `index_pairs`; the cache keeps them by the shards' content."""
    what = strict_json.dumps([RULES, shards_digest(shards), captions])
    path = cache_root() / "pairs" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"

    def count(staging: Path) -> None:
        found = (index or index_pairs(shards, captions, option)).counts
        write_atomically(staging, strict_json.dumps(asdict(found)).encode())

    return Counts(**strict_json.loads(build_once(path, count).read_bytes()))


def add_shard(index: PairIndex, number: int, shard: Path, captions: Captions, option: str = "") -> None:
    """Add the pairs of one shard, number `number`. Raises UserError for a bad one."""
    found = open_shard(shard, option)
    index.left_out["key twice"] += found.repeated
    with shard.open("rb") as file:
        for members in found.samples.values():
            index.suffixes.update(members.keys())  # a mapping would be added
            image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
            text = read_member(file, members[CAPTION_SUFFIX]) if image and CAPTION_SUFFIX in members else b""
            try:
                own = split_captions(text.decode("utf-8"), captions)
            except UnicodeDecodeError:  # an evaluation set of such captions is refused, too
                index.left_out["not UTF-8"] += 1
                continue
            if image and own:
                index.images.append((number, image.offset_data, image.size))
                index.captions.append(own)
            index.left_out.update(_left_out(members, bool(image and own)))


def require_pairs(index: PairIndex, shards: Sequence[Path], option: str = "") -> None:
    """Raise UserError, which says what there is instead, where not one pair was found."""
    if not index.images:
        seen = ", ".join(f".{suffix} ({count:,})" for suffix, count in index.suffixes.most_common(12))
        kinds = "; ".join(f"{count:,} {kind} ({KINDS[kind]})" for kind, count in index.counts.left_out.items())
        raise UserError(
            f"{option} {shards[0]}".lstrip() + (f" and {len(shards) - 1:,} more" if len(shards) > 1 else "") + ": no "
            f"sample with an image and a .txt caption; left out: {kinds or 'nothing'}; suffixes: {seen or 'none'}."
        )


def split_captions(text: str, captions: Captions) -> list[str]:
    """The captions of a .txt: one text, or one a line. Only a line feed ends a line, with a return before it or not."""
    parts = [text] if captions == "text" else text.split("\n")
    return [part.strip() for part in parts if part.strip()]


def _left_out(suffixes: Collection[str], is_pair: bool) -> Mapping[str, int]:
    """What of one sample is left out, given the suffixes of its files: itself, or what dots in names have put there."""
    wanted = {*IMAGE_SUFFIXES, CAPTION_SUFFIX}
    dotted: dict[str, set[str]] = {}  # a.b.jpg and a.b.txt: b -> jpg, txt
    for suffix in suffixes:
        stem, dot, last = suffix.rpartition(".")
        if dot and last in wanted:
            dotted.setdefault(stem, set()).add(last)
    whole = sum(CAPTION_SUFFIX in found and len(found) > 1 for found in dotted.values())
    if whole or is_pair:  # a.seg.png beside the pair a.jpg, a.txt loses nothing
        return {"dots in a name": whole}
    return {_why(suffixes, bool(dotted)): 1}


def _why(suffixes: Iterable[str], dotted: bool) -> str:
    """The kind of a sample that is no pair."""
    found = set(suffixes)
    image, caption = bool(found & set(IMAGE_SUFFIXES)), CAPTION_SUFFIX in found
    if image and caption:
        return "empty caption"
    if dotted:
        return "dots in a name"
    if any("." not in suffix for suffix in found - {*IMAGE_SUFFIXES, CAPTION_SUFFIX, *BESIDE}):
        return "unknown suffix"
    return "no caption" if image else "no image"
