"""Bad samples of training shards: what is wrong with one, and when there are too many.

    image = image_of(content)                       # BadSample("truncated image"), ...
    texts = captions_of(content, "text")            # BadSample("not UTF-8"), ...
    tally.add(batch.bad)                            # of what was met in the batch's place
    require_few(tally.kinds, tally.first, read=10_000, pairs=400_000, bound=0.01, where="--data")

A training reads another pair in the place of a bad one (`upcycle_bench/data/pairs.py` has the rule), and counts it. So
one truncated image among millions ends no run, and a data set that is broken does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from PIL import Image

from upcycle_bench.data import images
from upcycle_bench.data.pair_index import split_captions
from upcycle_bench.protocol import Captions
from upcycle_bench.util.errors import UserError

# What is wrong with a sample, and what that means.
KINDS = {
    "truncated image": "the image file ends too early",
    "no image (HTML)": "a web page, such as an error, under an image's name",
    "no image (zeros)": "no byte, or only zeros, under an image's name",
    "unreadable image": "Pillow cannot read it",
    "odd shape": f"it {images.WIDE}",
    "more than 8 bits": f"it {images.DEEP}",
    "too many pixels": f"it {images.HUGE}",
    "not UTF-8": "its .txt is in another encoding",
    "empty caption": "a .txt without any text",
    "cut shard": "its shard ends before it",
    "changed shard": "its shard is no longer the one that was indexed",
    "read error": "the disk or the network failed at every try",
}

PASSING = ("cut shard", "changed shard", "read error")  # they are of the storage, which may be mended meanwhile

_REFUSED = {images.WIDE: "odd shape", images.DEEP: "more than 8 bits", images.HUGE: "too many pixels"}
_HTML = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|error)", re.IGNORECASE)
ENOUGH = 10_000  # samples: of fewer, the share of bad ones says little


class BadSample(Exception):
    """A sample that cannot be used: its kind of `KINDS`, more about it, and its name where that is known."""

    def __init__(self, kind: str, why: str = "", key: str = "") -> None:
        super().__init__(f"{kind}: {why}" if why else kind)
        self.kind, self.why, self.key = kind, why, key


@dataclass(frozen=True)
class Bad:
    """A bad sample that was met: the number of the pair, its kind, the name of its shard, its name in it."""

    number: int
    kind: str
    shard: str
    key: str

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.shard}: {self.key}" if self.key else self.shard


@dataclass(frozen=True)
class Tally:
    """How many bad samples of each kind were met, and where the first of each stands; it adds to the two mappings."""

    kinds: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, bad: Iterable[Bad]) -> None:
        """Count these."""
        for each in bad:
            self.kinds[each.kind] = self.kinds.get(each.kind, 0) + 1
            self.first.setdefault(each.kind, each.place)


def image_of(content: bytes) -> Image.Image:
    """The image as RGB; BadSample where `images.rgb` refuses it."""
    try:
        return images.rgb(content)
    except images.BadImage as error:
        raise BadSample(_kind(content, error), error.why) from None


def _kind(content: bytes, error: images.BadImage) -> str:
    if error.fault in _REFUSED:
        return _REFUSED[error.fault]
    if not content.strip(b"\0"):
        return "no image (zeros)"
    if _HTML.match(content):
        return "no image (HTML)"
    return "truncated image" if "truncated" in error.why else "unreadable image"


def captions_of(content: bytes, captions: Captions) -> list[str]:
    """The captions of a .txt; BadSample where there is none, or none that can be read."""
    try:
        found = split_captions(content.decode("utf-8"), captions)
    except UnicodeDecodeError as error:
        raise BadSample("not UTF-8", str(error)) from None
    if not found:
        raise BadSample("empty caption")
    return found


def require_few(
    kinds: Mapping[str, int], first: Mapping[str, str], *, read: int, pairs: int, bound: float, where: str
) -> None:
    """UserError where more than the share `bound` of the samples that were read are bad.

    kinds: how many of each kind; first: where the first of each stands; read: samples read so far; pairs: of the data.
    At the beginning, ENOUGH samples count as read, or all pairs if there are fewer.
    """
    bad = sum(kinds.values())
    if bad <= bound * max(read, min(pairs, ENOUGH)):
        return
    kind = max(kinds, key=lambda each: kinds[each])
    raise UserError(
        f"{where}: {bad:,} of {read:,} samples are bad, more than data.bad_samples={bound:g} of them; most often "
        f"{kind} ({kinds[kind]:,}, the first is {first[kind]}): see `upcycle-bench data check SHARDS --list`, "
        f"or --set data.bad_samples={_next(bad / max(read, 1)):g}."
    )


def _next(share: float) -> float:
    """A round bound above this share."""
    return min(1.0, next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if step > share or step == 1.0))
