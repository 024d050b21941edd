"""Webdataset shards: their names, their identity, and an image where it stands."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from upcycle_bench.util.errors import UserError


def expand_shards(text: str, option: str = "--data") -> tuple[Path, ...]:
    """Shards named by a folder (all its .tar files) or a path with one range, `train/{000..127}.tar`."""
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
    """Identity of shards too large to hash: names, sizes, and the first and last MiB of each."""
    digest = hashlib.sha256()
    for shard in shards:
        size = shard.stat().st_size
        digest.update(f"{shard.name}\0{size}\0".encode())
        with shard.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def open_image(shard: Path, offset: int, size: int, remedy: str) -> Image.Image:
    """The RGB image of `size` bytes at `offset`; UserError, which ends with `remedy`, where they are none."""
    with shard.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise UserError(f"{shard}: the image at byte {offset} cannot be read ({error}); {remedy}.") from None
