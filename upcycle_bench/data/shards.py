"""Webdataset shards: tar files in which the members of one sample share a name up to its first dot.

    for members in open_shard(path, "--data").samples.values():             # {"png": TarInfo, "txt": TarInfo}
        open_image(path, members["png"].offset_data, members["png"].size, "remove it")

A shard is indexed once by offsets. Then each sample can be read alone, in any order. What is no whole shard is told by
its content, in one line. Python's tarfile would take a damaged or cut header for the end of the archive, and would
unpack a compressed one, whose members then stand at other offsets than in the file.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from upcycle_bench.data import places
from upcycle_bench.data.images import UNREADABLE, BadImage, rgb
from upcycle_bench.util.errors import UserError

AGAIN = "copy or download it again"
NO_ARCHIVE_KIND, CUT, UNORDERED = "no archive", "cut shard", "unordered shard"  # kinds of ShardFault

# What a file that is no tar archive begins with, what it is, and what to do.
NO_ARCHIVE = (
    (rb"\Z", "it is empty (0 bytes)", AGAIN),
    (
        rb"version https://git-lfs",
        "it is a Git LFS pointer, not the file itself",
        "run `git lfs pull` where it is from",
    ),
    (rb"\x1f\x8b", "it is compressed with gzip, and samples are read at their place", "unpack it with `gunzip`"),
    (rb"BZh", "it is compressed with bzip2, and samples are read at their place", "unpack it with `bunzip2`"),
    (rb"\xfd7zXZ", "it is compressed with xz, and samples are read at their place", "unpack it with `unxz`"),
    (
        rb"\x28\xb5\x2f\xfd",
        "it is compressed with zstd, and samples are read at their place",
        "unpack it with `unzstd`",
    ),
    (rb"PK\x03\x04", "it is a zip archive", "write its files with tar"),
    (rb"PAR1", "it is a Parquet table", "write its images and captions with tar"),
    (rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|error)", "it is a web page, such as a login or an error", AGAIN),
    (rb"\s*[\[{]\s*[\"\]}]", "it is JSON text, such as a server's error", AGAIN),
    (rb"\0+\Z", "it holds only zeros", AGAIN),
    (rb"", "it is not a readable tar file", "write it again with tar"),
)
_MOST_ZEROS = 1 << 20  # after the last member: two blocks, filled up to a record, which tar's -b makes longer


@dataclass
class Shard:
    """The index of one shard.

    samples: name -> suffix in lower case -> member, in the order of the shard. A sample is named by its folder and its
    file name up to the first dot. As in webdataset, files without a suffix and hidden files are no samples.
    repeated: how many more samples had the name of an earlier one; of those, the first counts.
    """

    samples: dict[str, dict[str, tarfile.TarInfo]] = field(default_factory=dict)
    repeated: int = 0


class _Header(tarfile.TarInfo):
    """Reads the header of a plain file four times as fast as its parent, and leaves all others to it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        plain = len(buf) == tarfile.BLOCKSIZE and buf[156] in b"0\0" and not buf[345] and buf[124] < 0x80
        name = bytes(buf[:100]).partition(b"\0")[0] if plain else b""
        if not name or name.endswith(b"/"):
            return super().frombuf(buf, encoding, errors)
        try:
            size, check = (int(buf[a:b].partition(b"\0")[0].strip() or b"0", 8) for a, b in ((124, 136), (148, 156)))
        except ValueError:  # the parent says what is wrong
            return super().frombuf(buf, encoding, errors)
        if check != 256 + sum(buf) - sum(buf[148:156]):  # the field itself counts as eight spaces
            return super().frombuf(buf, encoding, errors)
        made = cls(name.decode(encoding, errors))
        made.size, made.chksum = size, check
        return made


class ShardFault(UserError):
    """A shard that is not whole. `kind` is a few words, `why` a line without the shard's name, `whole` what is left."""

    def __init__(self, where: str, kind: str, why: str, whole: Shard | None = None) -> None:
        super().__init__(f"{where}: {why}")
        self.kind, self.why, self.whole = kind, why, whole or Shard()


def open_shard(path: Path | str, option: str = "") -> Shard:
    """Index a shard; only the members' headers are read.

    Raises ShardFault, which names `option` and the shard: what a file that is no tar archive is; where an archive is
    cut or damaged, and how many samples are whole; samples whose files do not stand side by side. UserError where it
    cannot be read.
    """
    where = f"{option} {path}".lstrip()
    try:
        with places.open_place(str(path)) as file:
            return _indexed(file, where)
    except OSError as error:
        raise UserError(
            f"{where}: it cannot be read ({error.strerror or error}); check its rights and its disk."
        ) from None


def samples_of(path: Path, option: str = "") -> dict[str, dict[str, tarfile.TarInfo]]:
    """The samples of `open_shard`."""
    return open_shard(path, option).samples


def _indexed(file: BinaryIO, where: str) -> Shard:
    members: list[tarfile.TarInfo] = []
    files: dict[str, tarfile.TarInfo] = {}
    end, broken = 0, False
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
            for member in tar:
                if broken := member.size < 0:  # tarfile would go back, and read for ever
                    break
                members.append(_file(member, files, where))
                end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError):  # damaged fields of a header raise the latter two
        broken = True
    if broken and not members:
        file.seek(0)
        head = file.read(tarfile.BLOCKSIZE)
        what, remedy = next(row for pattern, *row in NO_ARCHIVE if re.match(pattern, head, re.IGNORECASE))
        raise ShardFault(where, NO_ARCHIVE_KIND, f"{what}; {remedy}.")
    shard = Shard()
    _group(shard, members, where)
    if wrong := _wrong_end(file, end, broken, bool(members)):
        whole = _whole(shard, file.seek(0, io.SEEK_END))
        count = len(whole.samples)
        raise ShardFault(where, CUT, f"{wrong}, after {count:,} whole sample{'s' * (count != 1)}; {AGAIN}.", whole)
    return shard


def _file(member: tarfile.TarInfo, files: dict[str, tarfile.TarInfo], where: str) -> tarfile.TarInfo:
    """The member, a file of which `files` keeps the place; of a hard link, the content of the file that it repeats."""
    if member.islnk():
        if member.linkname not in files:
            repeats = f"{member.name!r} is a link to {member.linkname!r}, which does not stand before it"
            raise ShardFault(where, UNORDERED, f"{repeats}; pack it with tar's --hard-dereference.")
        linked = copy.copy(files[member.linkname])
        linked.name, linked.offset = member.name, member.offset
        return linked
    if member.isfile():
        files[member.name] = member
    return member


def _wrong_end(file: BinaryIO, end: int, broken: bool, members: bool) -> str | None:
    """What is wrong behind the last member, which ends at byte `end`; None if the archive ends there."""
    size = file.seek(0, io.SEEK_END)
    if size < end + tarfile.BLOCKSIZE:
        return f"it is cut at byte {size:,}, {'within a file' if end > size else 'at a header'}"
    file.seek(end)
    if broken or file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        return f"its header at byte {end:,} is damaged or cut"
    while piece := file.read(1 << 20):
        if piece.strip(b"\0"):
            return f"its end is marked at byte {end:,}, but more follows up to byte {size:,}, as in joined archives"
    if size - end > (_MOST_ZEROS if members else tarfile.RECORDSIZE):
        return f"it holds only zeros from byte {end:,} to {size:,}, like an unfinished download"
    return None


def _group(shard: Shard, members: Sequence[tarfile.TarInfo], where: str) -> None:
    """Put the members into the shard's samples, as webdataset groups them."""
    for name, group in itertools.groupby(_named(members), lambda each: each[0]):
        sample: dict[str, tarfile.TarInfo] = {}
        seen: Counter[str] = Counter()
        for _, suffix, member in group:
            sample.setdefault(suffix, member)
            seen[suffix] += 1
        times = max(seen.values())
        earlier = shard.samples.setdefault(name, sample)
        if earlier is sample:
            shard.repeated += times - 1
        elif earlier.keys() & sample.keys():
            shard.repeated += times
        else:
            place = min(member.offset for member in sample.values())
            dots = "." in "".join(sample)  # a.1.jpg and a.2.jpg are files of one sample
            remedy = "rename files with dots in their names" if dots else "pack them sorted by name: `tar --sort=name`"
            apart = f"the files of sample {name!r} do not stand side by side (again at byte {place:,})"
            raise ShardFault(where, UNORDERED, f"{apart}; {remedy}.")
        if any(member.issparse() for member in sample.values()):
            sparse = f"sample {name!r} is stored as a sparse file"
            raise ShardFault(where, UNORDERED, f"{sparse}; pack it without tar's --sparse.")


def _named(members: Sequence[tarfile.TarInfo]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(name of the sample, suffix, member) of each file that belongs to a sample."""
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        if member.isfile() and stem and dot:
            yield f"{folder}{slash}{stem}", suffix.lower(), member


def _whole(shard: Shard, size: int) -> Shard:
    """The samples of a shard that is cut at byte `size` that have all their files, as far as one can tell."""
    names = list(shard.samples)
    ends = [max(member.offset_data + member.size for member in each.values()) for each in shard.samples.values()]
    if names and not all(suffix in shard.samples[names[-1]] for suffix in shard.samples[names[0]]):
        ends[-1] = size + 1
    return Shard({name: shard.samples[name] for name, end in zip(names, ends, strict=True) if end <= size})


def shards_digest(shards: Sequence[Path | str]) -> str:
    """Hash of shards that may be too large to read: of their names, sizes, and first and last MiB."""
    digest = hashlib.sha256()
    for shard in map(Path, shards):
        size = shard.stat().st_size
        digest.update(f"{shard.name}\0{size}\0".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def read_member(shard: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """The content of a member of the shard, which is open as a plain file."""
    shard.seek(member.offset_data)
    return shard.read(member.size)


def open_image(shard: Path | str, offset: int, size: int, remedy: str, option: str = "") -> Image.Image:
    """The image in the `size` bytes at `offset`, as RGB; a UserError, if it is refused, ends with `remedy`."""
    where = f"{option} {shard}".lstrip()
    try:
        with places.open_place(str(shard)) as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            header, content = file.read(tarfile.BLOCKSIZE), file.read(size)
    except OSError as error:
        raise UserError(f"{where}: it can no longer be read ({error.strerror or error}); {AGAIN}.") from None
    try:
        return rgb(content)
    except BadImage as error:
        name = header[:100].partition(b"\0")[0].decode("utf-8", "replace")  # of a longer one its beginning
        why = error.why if error.fault == UNREADABLE else f"it {error}"
        raise UserError(f"{where}: the image at byte {offset} ({name}) cannot be read ({why}); {remedy}.") from None
