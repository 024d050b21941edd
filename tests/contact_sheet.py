"""Draws docs/lab.png, what the lab's splits look like: `python tests/contact_sheet.py`, once the lab is built."""

import io
import tarfile
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from upcycle_bench.data.worlds import lab, lab_splits
from upcycle_bench.util.cache import cache_root

COLUMNS, CELL, LABEL = 22, 38, 250
TRAINING_ROWS = 4


def pictures(shard: Path, count: int, every: int) -> list[Image.Image]:
    """Every `every`-th of the first images of a shard."""
    with tarfile.open(shard) as tar:
        files = (member for member in tar if member.name.endswith(".png"))
        return [
            Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
            for member in islice(files, 0, count * every, every)
        ]


def main() -> None:
    """One row for each held-out group, some for training and validation."""
    folder = cache_root() / "worlds" / f"lab-{lab.VERSION}"
    rows = []
    for number in range(TRAINING_ROWS):
        shard = folder / "train" / f"{number * lab.SHARDS // TRAINING_ROWS:02d}.tar"
        rows.append(("training" if number == 0 else "", pictures(shard, COLUMNS, every=700)))
    held = [("validation", "validation: the training families")]
    for split in ("dev", "test"):
        groups = [group for group, (where, _) in lab_splits.HELD_OUT.items() if where == split]
        held += [(f"{split}-{group}", f"shift-{split}: {group} ({lab_splits.HELD_OUT[group][1]})") for group in groups]
    for name, label in held:
        rows.append((label, pictures(folder / "eval" / f"{name}-retrieval" / "test" / "0.tar", COLUMNS, every=20)))
    sheet = Image.new("RGB", (LABEL + COLUMNS * CELL, len(rows) * CELL), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, (label, images) in enumerate(rows):
        draw.text((6, row * CELL + 10), label, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image, (LABEL + column * CELL, row * CELL + 3))
    sheet.save(Path(__file__).parent.parent / "docs" / "lab.png", optimize=True)


if __name__ == "__main__":
    main()
