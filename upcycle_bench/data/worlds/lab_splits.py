"""The lab's splits: which icons are trained on, which evaluate, and which are left out.

    table, blank = tabulate(icons)              # a row for each icon that shows something
    pairs = separate(table, icons.images)       # images that look like an evaluation image leave training
    counts = drop_twins(table, icons.images)    # what training has in other colours or mirrored leaves evaluation
    drop_variants(table)                        # and what is named like a training icon

Families that descend from each other are one group (`lineage.py`). Twelve groups are held out whole: the `dev` shifts
for decisions, the `test` shifts for reports. Of all other groups, one in 21 pairs (group, drawing) is held out for
validation, and as many for the set `temperature`. A drawing is a name without style and size, so variants stay
together.

Shape suffixes: N icons, P pixels (times channels).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from upcycle_bench.data.worlds import lineage
from upcycle_bench.data.worlds.icons import Icons
from upcycle_bench.util.rng import Stream

HELD_OUT = {  # group -> split, and how it is drawn
    "iconoir": ("dev", "outline"),
    "mingcute": ("dev", "outline and filled"),
    "vaadin": ("dev", "filled"),
    "uil": ("dev", "two-tone, line, solid"),
    "pixelarticons": ("dev", "pixel"),
    "twemoji": ("dev", "colour emoji"),
    "carbon": ("test", "outline"),
    "ri": ("test", "outline and filled"),
    "game-icons": ("test", "filled"),
    "glyphs": ("test", "two-tone, colour"),
    "pepicons": ("test", "hand-drawn, print"),
    "openmoji": ("test", "colour emoji"),
}
HELD_SHARE = 0.048  # of (group, drawing) for validation, and again for `temperature`
NEAR = 12.0  # two images that differ by no more grey levels (root mean square) look like one drawing
BLANK = 8  # an image whose grey levels span no more shows nothing
LEFT_OUT = ("near", "twin", "variant")  # splits of icons that are in neither training nor evaluation
CLASS_GROUPS = 20  # a base name that at least as many groups draw is a class


@dataclass(frozen=True)
class Table:
    """All icons that show something, one entry a row. `split` changes until all icons have their place."""

    rows: np.ndarray  # the icon's row in Icons.images, int [N]
    family: list[str]
    group: list[str]
    name: list[str]
    base: list[str]  # the name without style, as its family declares styles; it may become a class
    drawing: list[str]  # coarser than `base`; all icons of a drawing go to one split
    category: list[str]
    caption: list[str]
    split: np.ndarray  # object [N]: train, validation, temperature, dev-GROUP, test-GROUP, or one of `LEFT_OUT`


def tabulate(icons: Icons) -> tuple[Table, int]:
    """(all icons that show something, with group and split; the number of those that show nothing)."""
    flat_NP = icons.images.reshape(len(icons.images), -1)
    shows_N = icons.readable & (flat_NP.max(1).astype(int) - flat_NP.min(1) > BLANK)
    pictures = {
        family.prefix: {
            hashlib.blake2b(icons.images[row].tobytes(), digest_size=16).digest()
            for row in range(family.start, family.start + len(family.names))
            if shows_N[row]
        }
        for family in icons.families
    }
    group_of = lineage.group_families(pictures)
    if missing := HELD_OUT.keys() - set(group_of.values()):
        raise AssertionError(f"held-out groups that the lineages do not make: {sorted(missing)}")
    table = Table(np.flatnonzero(shows_N), [], [], [], [], [], [], [], np.empty(int(shows_N.sum()), dtype=object))
    drawing_of = _drawings(icons, group_of, shows_N)
    for family in icons.families:
        group = group_of[family.prefix]
        for number, (name, category) in enumerate(zip(family.names, family.categories, strict=True)):
            if not shows_N[family.start + number]:
                continue
            drawing = drawing_of[group][name]
            table.split[len(table.name)] = split_of(group, drawing)
            table.family.append(family.prefix)
            table.group.append(group)
            table.name.append(name)
            table.base.append(lineage.base_name(name, family.styles))
            table.drawing.append(drawing)
            table.category.append(category)
            table.caption.append(lineage.caption(name))
    return table, int((icons.readable & ~shows_N).sum())


def _drawings(icons: Icons, group_of: dict[str, str], shows_N: np.ndarray) -> dict[str, dict[str, str]]:
    """Group -> name -> drawing, of the icons that show something."""
    names: dict[str, set[str]] = defaultdict(set)
    styles: dict[str, set[str]] = defaultdict(set)
    for family in icons.families:
        shown = shows_N[family.start : family.start + len(family.names)]
        names[group_of[family.prefix]].update(name for name, ok in zip(family.names, shown, strict=True) if ok)
        styles[group_of[family.prefix]].update(family.styles)
    return {group: lineage.drawings(names[group], styles[group]) for group in names}


def split_of(group: str, drawing: str) -> str:
    """The split of a drawing before any icon is moved: that of a held-out group, else drawn by its name."""
    if group in HELD_OUT:
        return f"{HELD_OUT[group][0]}-{group}"
    place = Stream(("world", "lab", "split", group, drawing)).seed() / 2**63
    return "validation" if place < HELD_SHARE else "temperature" if place < 2 * HELD_SHARE else "train"


def separate(table: Table, images: np.ndarray) -> np.ndarray:
    """Move training images that are near an evaluation image to the split `near`.

    Returns all near pairs (evaluation image, any image) as table rows, int64 [pairs, 2].
    """
    from upcycle_bench.data.worlds.near import near_pairs

    flat_NP = images.reshape(len(images), -1)
    if len(table.rows) < len(flat_NP):  # else the same images would be copied
        flat_NP = flat_NP[table.rows]
    pairs = near_pairs(flat_NP, np.flatnonzero(table.split != "train"), NEAR)
    others = np.unique(pairs[:, 1])
    table.split[others[table.split[others] == "train"]] = "near"
    return pairs


def drop_twins(table: Table, images: np.ndarray) -> dict[str, int]:
    """Move evaluation icons whose image has a twin in training (`twins.py`) to the split `twin`; counts them by kind.

    Training stays as it is, since the shipped dense model was trained on it.
    """
    from upcycle_bench.data.worlds.twins import KINDS, find_twins

    trained = np.flatnonzero(table.split == "train")
    evaluated = np.flatnonzero(~np.isin(table.split, ["train", *LEFT_OUT]))
    pairs = find_twins(images[table.rows[evaluated]], images[table.rows[trained]])
    counts = {}
    for kind in KINDS:
        rows = evaluated[np.unique(pairs[kind][:, 0])]
        rows = rows[table.split[rows] != "twin"]
        table.split[rows] = "twin"
        counts[kind] = len(rows)
    return counts


def drop_variants(table: Table) -> None:
    """Move evaluation icons that are named like a training icon of their group to the split `variant`.

    All icons of a drawing have one split, but a style that a family does not declare can hide that two names are one
    drawing: "add-duotone-line" beside "add-duotone", "foot-negative" beside "foot".
    """
    trained: set[tuple[str, str]] = set()
    keys = []
    for group, name, drawing, split in zip(table.group, table.name, table.drawing, table.split, strict=True):
        keys.append({(group, lineage.plain_name(name)), (group, lineage.plain_name(drawing))})
        if split in ("train", "near"):
            trained |= keys[-1]
    held = ~np.isin(table.split, ["train", *LEFT_OUT])
    table.split[[row for row in np.flatnonzero(held) if keys[row] & trained]] = "variant"


def concepts(table: Table) -> list[str]:
    """The classes, sorted: base names of two letters or more that at least `CLASS_GROUPS` groups draw."""
    groups: dict[str, set[str]] = defaultdict(set)
    for base, group in zip(table.base, table.group, strict=True):
        groups[base].add(group)
    return sorted(base for base, seen in groups.items() if len(seen) >= CLASS_GROUPS and len(base) > 1)


def one_of_each(table: Table, rows: np.ndarray, drawing: np.ndarray) -> Iterator[int]:
    """Rows of a gallery in which no two have the same caption or the same number in `drawing`, int [N].

    They come in an order that favours no family.
    """
    captions: set[str] = set()
    drawings: set[int] = set()
    key = {row: Stream(("world", "lab", "gallery", table.family[row], table.name[row])).seed() for row in rows}
    for row in sorted(rows, key=key.__getitem__):
        if table.caption[row] not in captions and drawing[row] not in drawings:
            captions.add(table.caption[row])
            drawings.add(drawing[row])
            yield row
