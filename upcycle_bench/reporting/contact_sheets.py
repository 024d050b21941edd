"""Contact sheets: which images each expert takes. Each MoE layer of the vision tower has a sheet, each expert a row.

    clip, made = find_model(Path("results/lab/sparse-upcycling-....json"))
    context = eval_context(clip, protocol, eval_data=None, reporter=reporter)
    sheets = draw(clip, context, ["digits-test"], columns=16, title="sparse-upcycling")     # {"vision.1": Sheet, ...}
    paths = save(sheets, Path("sheets"))                                                  # {"vision.1": Path, ...}

An expert takes the tokens whose most probable expert it is. Its row shows the images with the largest share of such
tokens, among equals those with the highest mean probability of the expert. A row shows no image without such a token.
The number of the expert and its load stand at the left.

Shape suffixes: I images, S side of a thumbnail in pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upcycle_bench import record
from upcycle_bench.data import evalset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.evaluation.agreement import Agreement, agreements
from upcycle_bench.evaluation.routes import LayerRoutes, route_images
from upcycle_bench.model import weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.protocol import Protocol
from upcycle_bench.suite import EvalContext
from upcycle_bench.util.distributed import choose_device
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import atomic
from upcycle_bench.util.progress import Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL, LARGE, GAP, LEFT, LINE = 32, 64, 4, 110, 16  # pixels


@dataclass(frozen=True)
class Sheet:
    """The picture of one layer, the load of its experts [E], and how far they agree with the labels of the images."""

    image: Image
    load_E: np.ndarray
    found: Mapping[str, Agreement]

    def facts(self) -> dict[str, Any]:
        """The numbers of the layer, ready for JSON."""
        return {
            "load": self.load_E.tolist(),
            "agreement": {metric: asdict(each) for metric, each in self.found.items()},
        }


def find_model(path: Path) -> tuple[Clip, record.Record | None]:
    """The model of a file of weights, or the one of a record, from the cache; and the record.

    Raises UserError for a model without experts, and for weights that are not in the cache or are damaged.
    """
    if path.suffix == ".safetensors":
        clip, made = weights.load(path), None
    elif path.is_dir():
        raise UserError(f"{path}: is a folder; give one record (.json) or a file of weights (.safetensors).")
    else:
        made = record.read(path)
        clip = weights.load(weights.of_record(path, made.hashes.weights))
    if not any(layer.place.tower == "vision" for layer in moe_layers(clip.model).values()):
        raise UserError(f"{path}: a dense model has no experts; give a run of a strategy that makes some.")
    return clip, made


def eval_context(clip: Clip, protocol: Protocol, eval_data: Path | None, reporter: Reporter) -> EvalContext:
    """The model on this rank's device, and the evaluation sets: the protocol's own, or below `eval_data`.

    Sets the number of PyTorch's threads to the protocol's. Raises UserError for a protocol without data of its own
    (world "local") and no `eval_data`, and for a protocol with its own data and `eval_data` as well.
    """
    local = protocol.data.world == "local"
    if local and eval_data is None:
        raise UserError(f"protocol {protocol.name} needs --eval-data, the folder with the evaluation sets.")
    if eval_data and not local:
        raise UserError(f"protocol {protocol.name} brings its own data; --eval-data goes with clip-b32, clip-b16.")
    torch.set_num_threads(protocol.threads)
    device = choose_device()
    return EvalContext(
        model=clip.model.to(device),
        tokenizer=clip.tokenize,
        transform=clip.transform,
        root=eval_data or load_world(protocol.data.world, protocol.data.seed, reporter).eval_root,
        device=device,
        track=reporter.track,
    )


def draw(clip: Clip, context: EvalContext, names: Sequence[str], *, columns: int, title: str) -> dict[str, Sheet]:
    """Route the images of these evaluation sets and draw a sheet for each layer; UserError for missing sets."""
    evalset.require(context.root, list(names))
    opened = [evalset.read(context.root / name, context.transform, context.batch_size) for name in names]
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


def save(sheets: Mapping[str, Sheet], folder: Path) -> dict[str, Path]:
    """Write each sheet to LAYER.png in the folder, which is created; returns the files by layer."""
    folder.mkdir(exist_ok=True)
    paths = {layer: folder / f"{layer}.png" for layer in sheets}
    for layer, path in paths.items():
        with atomic(path) as part:
            sheets[layer].image.save(part, format="PNG", optimize=True)
    return paths


def most_taken(layer: LayerRoutes, count: int) -> list[list[int]]:
    """For each expert the numbers of up to `count` images, the one that it takes most first."""
    first_IE, mean_IE = layer.first_IE, layer.mean_IE
    share_IE = first_IE / first_IE.sum(1, keepdims=True)
    rows = []
    for expert in range(share_IE.shape[1]):
        order_I = np.lexsort((-mean_IE[:, expert], -share_IE[:, expert]))  # stable; its last key is the first to count
        rows.append([int(image) for image in order_I[:count] if first_IE[image, expert]])
    return rows


def _pictures(clip: Clip, context: EvalContext, names: Sequence[str], wanted: set[int]) -> dict[int, Tensor]:
    """Thumbnails uint8 [3, S, S] of the images with these numbers, which count through all sets.

    A thumbnail is cropped as the model's input is.
    """
    found: dict[int, Tensor] = {}
    number = 0
    for name in names:
        for images_B3HW, _ in evalset.read(context.root / name, clip.resize, context.batch_size).batches:
            for image_3HW in images_B3HW:
                if number in wanted:
                    found[number] = _thumbnail(image_3HW)
                number += 1
    return found


def _thumbnail(image_3HW: np.ndarray | Tensor) -> Tensor:
    from PIL.Image import Resampling
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    image = to_pil_image(torch.as_tensor(image_3HW))
    side = SMALL if image.width <= SMALL else LARGE
    return pil_to_tensor(image.resize((side, side), Resampling.NEAREST if image.width <= side else Resampling.BOX))


def _sheet(about: str, load_E: np.ndarray, rows: Sequence[Sequence[Tensor]], columns: int) -> Image:
    """The sheet: lines of text, then for each expert its number and load and a row of thumbnails."""
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    side = max((picture.shape[-1] for row in rows for picture in row), default=SMALL)
    cells = torch.full((len(rows), columns, 3, side, side), 255, dtype=torch.uint8)
    for expert, row in enumerate(rows):
        for column, picture in enumerate(row):
            cells[expert, column] = picture
    grid = to_pil_image(make_grid(cells.flatten(0, 1), nrow=columns, padding=GAP, pad_value=255))

    lines = textwrap.wrap(about, (LEFT + grid.width) // 6)
    top = GAP + LINE * len(lines)
    sheet = Image.new("RGB", (LEFT + grid.width, top + grid.height), "white")
    sheet.paste(grid, (LEFT - GAP, top))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, line in enumerate(lines):
        pen.text((GAP, GAP + place * LINE), line, fill="black", font=font)
    for expert, load in enumerate(load_E):
        y = top + GAP + expert * (side + GAP) + side // 2 - 8
        pen.text((GAP, y), f"expert {expert}: {load:.1%}", fill="black", font=font)
    return sheet
