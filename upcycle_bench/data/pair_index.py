"""Which samples of training shards are pairs, and how many are left out, by kind.

    found = find_pairs("train/000.tar", "--data")       # places and captions of the pairs of a shard
    counts = Counts(len(found.pairs), in_order(found.left_out))
    counts.left_out                                     # {"no caption": 12}

A pair is an image and a .txt that is not empty. Shards made elsewhere often hold other samples; what a training does
not read must be known, or half a data set can be missing in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from upcycle_bench.data.places import open_place
from upcycle_bench.data.shards import CUT, NO_ARCHIVE_KIND, UNORDERED, Shard, ShardFault, open_shard, read_member
from upcycle_bench.protocol import Captions
from upcycle_bench.util.errors import UserError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
CAPTION_SUFFIX = "txt"
BESIDE = ("json", "cls", "npy")  # what other samples hold beside an image and a caption

LONGEST = (1 << 16) - 1  # bytes of a caption, as the index counts them; CLIP reads 77 tokens
LARGEST = (1 << 32) - 1  # bytes of an image

# Why a sample is left out, and what that means.
RULES = 3  # raise it when the same shards would give other pairs
KINDS = {
    "dots in a name": "a name ends at its first dot, so a.b.jpg is no image; rename the files",
    "unknown suffix": f"an image is {', '.join(f'.{suffix}' for suffix in IMAGE_SUFFIXES)}, a caption .txt",
    "no image": "no file with the suffix of an image",
    "no caption": "no .txt",
    "empty caption": "a .txt without any text",
    "not UTF-8": "its .txt is in another encoding; write it in UTF-8",
    "caption too long": f"a .txt of more than {LONGEST:,} bytes is no caption",
    "image too large": "an image of more than 4 GB",
    "key twice": "its shard has a sample of the same name; the first counts",
    CUT: "an estimate of what is lost with the rest of a cut or damaged shard; copy or download it again",
    NO_ARCHIVE_KIND: "an estimate of what a shard would hold that is no tar archive (docs/data.md has a table)",
    UNORDERED: "an estimate of what a shard would hold whose samples' files are apart, links or sparse; pack it again",
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


class Pair(NamedTuple):
    """A pair in its shard. image, text: bytes from the shard's beginning; suffix: of the image, in small letters."""

    key: str
    suffix: str
    image: int
    image_bytes: int
    text: int
    caption: bytes


@dataclass
class ShardPairs:
    """The pairs of one shard, in their order.

    left_out: kind -> samples; suffixes: suffix -> files, of all samples. Of a shard that is not whole, `fault` is the
    kind, `why` a line, and the pairs are those of its whole samples.
    """

    pairs: list[Pair] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    fault: str = ""
    why: str = ""


def find_pairs(place: Path | str, option: str = "") -> ShardPairs:
    """The pairs of one shard. UserError, which names `option`, where it cannot be read."""
    found = ShardPairs()
    try:
        shard = open_shard(place, option)
    except ShardFault as error:
        shard, found.fault, found.why = error.whole, error.kind, error.why
    try:
        _add(found, shard, str(place))
    except OSError as error:
        where = f"{option} {place}".lstrip()
        raise UserError(f"{where}: it can no longer be read ({error.strerror or error}).") from None
    return found


def _add(found: ShardPairs, shard: Shard, place: str) -> None:
    found.left_out["key twice"] += shard.repeated
    if not shard.samples:
        return
    with open_place(place) as file:
        for key, members in shard.samples.items():
            found.suffixes.update(members.keys())  # a mapping would be added
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), "")
            text = members.get(CAPTION_SUFFIX)
            if not suffix or text is None:
                found.left_out.update(_left_out(members, is_pair=False))
                continue
            image = members[suffix]
            caption = read_member(file, text) if text.size <= LONGEST else b""
            if why := _refused(caption, text.size, image.size):
                found.left_out[why] += 1
                continue
            if is_pair := bool(caption.decode("utf-8").strip()):
                found.pairs.append(Pair(key, suffix, image.offset_data, image.size, text.offset_data, caption))
            found.left_out.update(_left_out(members, is_pair))


def _refused(caption: bytes, text_bytes: int, image_bytes: int) -> str:
    """The kind of a sample with both files, one of which is never read; "" for others."""
    if text_bytes > LONGEST:
        return "caption too long"
    if image_bytes > LARGEST:
        return "image too large"
    try:
        caption.decode("utf-8")
    except UnicodeDecodeError:  # an evaluation set of such captions is refused, too
        return "not UTF-8"
    return ""


def in_order(left_out: Mapping[str, int]) -> dict[str, int]:
    """The kinds that there are, in the order of `KINDS`."""
    return {kind: left_out[kind] for kind in KINDS if left_out.get(kind)}


def require_pairs(
    pairs: int,
    left_out: Mapping[str, int],
    suffixes: Mapping[str, int],
    shards: Sequence[Path | str],
    option: str = "",
) -> None:
    """Raise UserError, which says what there is instead, where not one pair was found."""
    if not pairs:
        seen = ", ".join(f".{suffix} ({count:,})" for suffix, count in Counter(suffixes).most_common(12))
        kinds = "; ".join(f"{count:,} {kind} ({KINDS[kind]})" for kind, count in in_order(left_out).items())
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
