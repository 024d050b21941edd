"""An image where it stands: some bytes of a shard."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from upcycle_bench.errors import UserError


def open_image(shard: Path, offset: int, size: int, remedy: str) -> Image.Image:
    """The RGB image of `size` bytes at `offset`; UserError, which ends with `remedy`, where they are none."""
    with shard.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise UserError(f"{shard}: the image at byte {offset} cannot be read ({error}); {remedy}.") from None
