"""Reads the files of pairs from shards: what stands side by side is read at once, all else alone.

    reader = Reader(index)
    reader.expect(numbers, then)        # int64 [N], the pairs that are read next, in any order, and those after them
    raw = reader.read(numbers[0])       # raw.image, raw.text: bytes, as they stand in the shard
    reader.bytes, reader.reads          # what was read from storage so far, and how often

The pairs of a lane (`upcycle_bench/data/order.py`) are blocks of consecutive ones, about 1.6 MB of images of 25 kB. So
storage sees few large reads, and hardly a byte more than the samples have. Threads read them in the order in which they
are needed, and then a part of what comes next, while this one decodes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from upcycle_bench.data import places
from upcycle_bench.data.bad_samples import BadSample
from upcycle_bench.data.index import BLOCK, NOWHERE, Index
from upcycle_bench.data.read_ahead import ReadAhead
from upcycle_bench.data.shard_cache import Unreachable
from upcycle_bench.util.errors import UserError

GAP = 8 << 10  # bytes between two files that are read rather than skipped: headers, a .json
SPAN = 2 << 20  # bytes that are read at once
AHEAD = 256 << 20  # bytes of the pairs after the expected ones that a process holds
PAUSES = (0.5, 2.0)  # seconds before the second and the third try of a file
OUTAGE = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0)  # of an object store, before its pairs are replaced

Piece = tuple[int, int, int]  # shard, and bytes [begin, end) of it


@dataclass(frozen=True)
class Raw:
    """The files of a pair, and its name in the shard, as far as the header before the image says it."""

    image: bytes
    text: bytes
    key: str


@dataclass
class _Span:
    """Bytes of a shard that several pieces are cut from. `wanted`: how many are to come; `broken`: read them alone.

    Who holds `lock` reads them.
    """

    shard: int
    begin: int
    end: int
    wanted: int = 0
    content: bytes | None = None
    broken: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


NOTHING: tuple[np.ndarray, dict[Piece, _Span]] = (np.array([]), {})  # pairs, their spans


class Reader:
    """Reads pairs of an index. A process needs its own, or one that was made before it was forked.

    `places.read(place, offset, size)` gives the bytes; fewer where the shard ends.
    """

    def __init__(self, index: Index) -> None:
        self.index, self.bytes, self.reads, self._outage = index, 0, 0, False
        self._spans: dict[Piece, _Span] = {}
        self._then = NOTHING
        self._ahead = ReadAhead(self._fetch)
        self._process, self._counting = os.getpid(), threading.Lock()

    def expect(self, numbers: np.ndarray, then: np.ndarray | None = None) -> None:
        """The pairs that are read next, and those that will be expected after them, if that is known.

        What is held of earlier ones is let go. Threads begin to read where `then` is given.
        """
        self._own()
        known, spans = self._then
        self._spans, self._then = spans if np.array_equal(known, numbers) else self._joined(numbers), NOTHING
        if then is not None:
            self._then = then, self._joined(then)
            self._ahead.begin([*self._in_order(numbers, self._spans), *self._first(AHEAD, then, self._then[1])])

    def _own(self) -> None:
        """In a fork, forget spans and locks that the parent's threads may have held."""
        if self._process != os.getpid():
            self._process, self._counting = os.getpid(), threading.Lock()
            self._spans, self._then = {}, NOTHING

    def _joined(self, numbers: np.ndarray) -> dict[Piece, _Span]:
        return joined(piece for number in self._there(numbers) for piece in self._pieces(number))

    def _there(self, numbers: np.ndarray) -> list[int]:
        there: list[int] = numbers[self.index.rows[numbers]["image"] != NOWHERE].tolist()
        return there

    def _in_order(self, numbers: np.ndarray, spans: dict[Piece, _Span]) -> list[_Span]:
        """The spans in the order in which the pairs need them."""
        pieces = (piece for number in self._there(numbers) for piece in self._pieces(number))
        return list({id(span): span for span in (spans[piece] for piece in pieces)}.values())

    def _first(self, size: int, numbers: np.ndarray, spans: dict[Piece, _Span]) -> list[_Span]:
        """The first of them, of so many bytes together."""
        found = self._in_order(numbers, spans)
        ends = itertools.accumulate(span.end - span.begin for span in found)
        return [span for span, end in zip(found, ends, strict=True) if end <= size]

    def _fetch(self, span: _Span) -> None:
        """Read a span ahead. What fails is read again, with patience, when it is needed."""
        with span.lock:
            if span.content is None and span.wanted and not span.broken:
                with contextlib.suppress(OSError, UserError):
                    place, size = self.index.shards[span.shard], span.end - span.begin
                    span.content = self._counted(places.read(place, span.begin, size, ()))

    def read(self, number: int) -> Raw:
        """The files of a pair, expected or not. Raises BadSample, and UserError where the shard is gone."""
        self._own()
        if self.index.rows[number]["image"] == NOWHERE:
            raise BadSample("cut shard")
        image, text = self._pieces(number)
        spans = self._spans if image in self._spans else joined((image, text))
        content = self._cut(image, spans)
        key = self._key(content[:BLOCK], number)
        content, caption = content[BLOCK:], self._cut(text, spans)
        if len(content) + BLOCK < image[2] - image[1] or len(caption) < text[2] - text[1]:
            raise BadSample("cut shard", key=key)
        return Raw(content, caption, key)

    def name(self, number: int) -> str:
        """A pair's name, by its header alone; "" where that cannot be read."""
        self._own()
        (shard, begin, _), _ = self._pieces(number)
        try:
            return self._key(self._read(shard, begin, begin + BLOCK, ()), number)
        except (BadSample, UserError):
            return ""

    def _pieces(self, number: int) -> tuple[Piece, Piece]:
        """Where the image of a pair stands, with the header before it, and its caption."""
        row, shard = self.index.rows[number], int(self.index.shard_of(np.int64(number)))
        image, text = int(row["image"]) * BLOCK, int(row["text"]) * BLOCK
        return (
            (shard, image - BLOCK, image + int(row["image_bytes"])),
            (shard, text, text + int(row["text_bytes"])),
        )

    def _key(self, header: bytes, number: int) -> str:
        """The pair's name. BadSample unless a file of the expected size stands where the index says."""
        if len(header) < BLOCK:
            raise BadSample("cut shard")
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except tarfile.HeaderError:
            raise BadSample("changed shard") from None
        folder, slash, name = member.name.rpartition("/")
        key = f"{folder}{slash}{name.partition('.')[0]}"
        if member.size != int(self.index.rows[number]["image_bytes"]):
            raise BadSample("changed shard", key=key)
        return key

    def _cut(self, piece: Piece, spans: dict[Piece, _Span]) -> bytes:
        """The bytes of a piece, from the span that it is a part of."""
        with spans[piece].lock:
            return self._cut_of(spans[piece], piece)

    def _cut_of(self, span: _Span, piece: Piece) -> bytes:
        shard, begin, end = piece
        if span.content is None and span.wanted > 1 and not span.broken:
            try:
                span.content = self._read(shard, span.begin, span.end, PAUSES)
            except BadSample:  # perhaps for one of its pieces only
                span.broken = True
        span.wanted -= 1
        if span.content is None:
            return self._read(shard, begin, end, () if span.broken else PAUSES)
        found = span.content[begin - span.begin : end - span.begin]
        if span.wanted == 0:
            span.content = None
        return found

    def _read(self, shard: int, begin: int, end: int, pauses: Sequence[float]) -> bytes:
        place = self.index.shards[shard]
        if places.is_local(place):
            content = patiently(lambda: places.read(place, begin, end - begin), place, pauses)
        else:
            content = self._read_far(place, begin, end - begin, OUTAGE if pauses and not self._outage else ())
        return self._counted(content)

    def _counted(self, content: bytes) -> bytes:
        with self._counting:
            self.bytes += len(content)
            self.reads += 1
        return content

    def _read_far(self, place: str, offset: int, size: int, pauses: Sequence[float]) -> bytes:
        try:
            content = patiently(lambda: places.read(place, offset, size, pauses), place, PAUSES if pauses else ())
        except Unreachable as error:
            self._outage = True  # the next reads wait no more, until one succeeds
            raise BadSample("read error", error.why) from None
        self._outage = False
        return content


def patiently(read: Callable[[], bytes], place: str, pauses: Sequence[float]) -> bytes:
    """What `read` gives, tried again after each pause; BadSample if in vain, UserError where the shard is gone."""
    for pause in (*pauses, None):
        try:
            return read()
        except FileNotFoundError:
            raise UserError(f"{place}: the shard is gone since the training began; put it back.") from None
        except OSError as error:
            if pause is None:
                raise BadSample("read error", error.strerror or str(error)) from None
            time.sleep(pause)
    raise AssertionError


def joined(pieces: Iterable[Piece]) -> dict[Piece, _Span]:
    """The span of each piece: neighbours in a shard share one, unless it would be longer than SPAN."""
    spans: dict[Piece, _Span] = {}
    last = _Span(-1, 0, 0)
    for piece in sorted(pieces):
        shard, begin, end = piece
        if shard != last.shard or begin > last.end + GAP or max(end, last.end) - last.begin > SPAN:
            last = _Span(shard, begin, end)
        last.end = max(last.end, end)
        last.wanted += 1
        spans[piece] = last
    return spans
