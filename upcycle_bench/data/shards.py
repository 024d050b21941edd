"""Webdataset shards: tar files in which the members of one sample share a name up to its first dot.

    for members in samples_of(shard).values():              # {"png": TarInfo, "txt": TarInfo}
        open_image(shard, members["png"].offset_data, members["png"].size, "remove it")

A shard is indexed once by offsets. Then each sample can be read alone, in any order.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from upcycle_bench.util.errors import UserError


def expand_shards(text: str, option: str = "--data") -> tuple[Path, ...]:
    """The shards that `text` names: a folder with .tar files, a file, or a path with one range, `train/{000..127}.tar`.

    Raises UserError, which names `option`, if a file is missing or the folder has none.
    """
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", text)
    if braces:
        head, first, last, tail = braces.groups()
        paths = [Path(f"{head}{n:0{len(first)}d}{tail}") for n in range(int(first), int(last) + 1)]
    else:
        paths = sorted(Path(text).glob("*.tar")) if Path(text).is_dir() else [Path(text)]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"no such file: {missing[0]}" if missing else "the folder holds no .tar file"
        raise UserError(f"{option} {text}: {what}; give webdataset shards, for example 'train/{{000..127}}.tar'.")
    return tuple(paths)


def shards_digest(shards: Sequence[Path]) -> str:
    """Hash of shards that may be too large to read: of their names, sizes, and first and last MiB."""
    digest = hashlib.sha256()
    for shard in shards:
        size = shard.stat().st_size
        digest.update(f"{shard.name}\0{size}\0".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def samples_of(shard: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Sample -> suffix in lower case -> member, in the order of the shard. Raises tarfile.TarError.

    A sample is named by its folder and its file name up to the first dot. Only the members' headers are read.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.isfile():
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[suffix.lower()] = member
    return samples


def read_member(shard: BinaryIO, member: tarfile.TarInfo) -> bytes:
    """The content of a member of the shard, which is open as a plain file."""
    shard.seek(member.offset_data)
    return shard.read(member.size)


def open_image(shard: Path, offset: int, size: int, remedy: str) -> Image.Image:
    """The image in the `size` bytes at `offset`, as RGB; a UserError, if it is broken, ends with `remedy`."""
    with shard.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise UserError(f"{shard}: the image at byte {offset} cannot be read ({error}); {remedy}.") from None
