"""Contact sheets: which images each expert takes. A sheet for each MoE layer of the vision tower, a row for an expert.

    sheets = draw(clip, context, ["digits-test"], columns=16, title="cluster-aware")     # {"vision.1": PIL image, ...}

A row shows the images that the expert takes most: those with the largest share of tokens whose most probable expert it
is, and among equals those with the highest mean probability. Its number and its load stand at the left. An image of
which it takes no token is never shown.

Shape suffixes: I images.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_bench import evalsets, record, weights
from upcycle_bench.agreement import Agreement, agreements
from upcycle_bench.dense import Clip
from upcycle_bench.errors import UserError
from upcycle_bench.moe import moe_layers
from upcycle_bench.routes import LayerRoutes, route_images
from upcycle_bench.suite import EvalContext

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL, LARGE, GAP, LEFT, LINE = 32, 64, 4, 110, 16  # pixels


@dataclass(frozen=True)
class Sheet:
    """The picture of a layer, and what is said of the layer in it."""

    image: Image
    load_E: np.ndarray
    found: Mapping[str, Agreement]


def find_model(path: Path) -> tuple[Clip, record.Record | None]:
    """The model of a file of weights, or the one that a record names, from the cache, and the record.

    Raises UserError for a model without experts, and for weights that are not in the cache or are damaged.
    """
    if path.suffix == ".safetensors":
        clip, made = weights.load(path), None
    elif path.is_dir():
        raise UserError(f"{path}: is a folder; give one record (.json) or a file of weights (.safetensors).")
    else:
        made = record.read(path)
        clip = weights.load(weights.of_record(path, made.hashes.weights))
    if not any(layer.layer.tower == "vision" for layer in moe_layers(clip.model).values()):
        raise UserError(f"{path}: a dense model has no experts; give a run of a strategy that makes some.")
    return clip, made


def draw(clip: Clip, context: EvalContext, names: Sequence[str], *, columns: int, title: str) -> dict[str, Sheet]:
    """Route the images of these evaluation sets, draw a sheet for each layer; UserError for sets that are missing."""
    evalsets.require(context.root, list(names))
    opened = [evalsets.read(context.root / name, context.transform, context.batch_size) for name in names]
    routed = route_images(opened, context)
    rows = {name: most_taken(layer, columns) for name, layer in routed.layers.items()}
    wanted = {image for layer in rows.values() for row in layer for image in row}
    pictures = _pictures(clip, context, names, wanted)
    sheets = {}
    for name, layer in routed.layers.items():
        found = agreements(layer.first_IE, routed.labels)
        said = "; ".join(
            f"NMI with {what} {found[key].value:.3f} (chance {found[key].chance:.3f})"
            for what in ("class", "set")
            if (key := f"nmi_{what}") in found
        )
        about = f"{title}, {name}: {len(routed.labels['set']):,} images of {', '.join(names)}. {said}"
        thumbnails = [[pictures[image] for image in row] for row in rows[name]]
        sheets[name] = Sheet(_sheet(about, layer.load_E, thumbnails, columns), layer.load_E, found)
    return sheets


def most_taken(layer: LayerRoutes, count: int) -> list[list[int]]:
    """For each expert up to `count` images, the one it takes most first."""
    first_IE, mean_IE = layer.first_IE, layer.mean_IE
    share_IE = first_IE / first_IE.sum(1, keepdims=True)
    rows = []
    for expert in range(share_IE.shape[1]):
        order_I = np.lexsort((-mean_IE[:, expert], -share_IE[:, expert]))  # stable; the last key counts first
        rows.append([int(image) for image in order_I[:count] if first_IE[image, expert]])
    return rows


def _pictures(clip: Clip, context: EvalContext, names: Sequence[str], wanted: set[int]) -> dict[int, Image]:
    """The images with these numbers, counted through all sets, as the model is shown them, at the sheets' size."""
    found: dict[int, Image] = {}
    number = 0
    for name in names:
        for images_B3HW, _ in evalsets.read(context.root / name, clip.resize, context.batch_size).batches:
            for image_3HW in images_B3HW:
                if number in wanted:
                    found[number] = _thumbnail(np.asarray(image_3HW))
                number += 1
    return found


def _thumbnail(image_3HW: np.ndarray) -> Image:
    from PIL import Image

    image = Image.fromarray(image_3HW.transpose(1, 2, 0))
    side = SMALL if image.width <= SMALL else LARGE
    return image.resize((side, side), Image.Resampling.NEAREST if image.width <= side else Image.Resampling.BOX)


def _sheet(about: str, load_E: np.ndarray, rows: Sequence[Sequence[Any]], columns: int) -> Image:
    """Lines of text, then a row of thumbnails for each expert behind its number and load."""
    from PIL import Image, ImageDraw, ImageFont

    side = max((picture.width for row in rows for picture in row), default=SMALL)
    width = LEFT + columns * (side + GAP) + GAP
    lines = textwrap.wrap(about, width // 6)
    top = GAP + LINE * len(lines) + GAP
    sheet = Image.new("RGB", (width, top + len(rows) * (side + GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, line in enumerate(lines):
        pen.text((GAP, GAP + place * LINE), line, fill="black", font=font)
    for expert, (load, row) in enumerate(zip(load_E, rows, strict=True)):
        y = top + expert * (side + GAP)
        pen.text((GAP, y + side // 2 - 8), f"expert {expert}: {load:.1%}", fill="black", font=font)
        for column, picture in enumerate(row):
            sheet.paste(picture, (LEFT + column * (side + GAP), y))
    return sheet
