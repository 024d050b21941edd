"""The lab: about 300,000 named icons, trained on by lineage, evaluated on lineages never seen.

    world = load(seed=0)                    # built once into the cache
    upcycle-bench data build lab            # the same from the command line

A pair is an icon (32 x 32 RGB, dark on white unless it has colours) and its name in words. Families that descend from
each other are one group (`worlds/lineage.py`). Twelve groups are held out whole: the `dev` shifts for decisions, the
`test` shifts for reports. Of all other groups, one in 21 pairs (group, drawing) is held for validation and another for
fitting the temperature; a drawing is a name without style and size, so variants stay together. Whatever then looks like
an evaluation image (`NEAR` grey levels root mean square, `worlds/near.py`) leaves training, and what is named like a
training icon but for one style word leaves evaluation.

    eval/{validation,temperature,dev-GROUP,test-GROUP}             classification into concepts
    eval/{validation,temperature,dev-GROUP,test-GROUP}-retrieval   one image for each caption and each drawing

A class is a base name drawn by at least `CLASS_GROUPS` groups. Strata tell whether the caption stands in training.
`index.tsv` says of every icon what became of it; `ATTRIBUTION.md` names the authors and licences.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_bench.data.evalset_write import png, write_classification, write_retrieval, write_shard
from upcycle_bench.data.world import World, open_world, write_manifest
from upcycle_bench.data.worlds import lineage
from upcycle_bench.data.worlds.icons import PACKAGE, SIZE, Icons, download, render
from upcycle_bench.data.worlds.icons import VERSION as ICONS_VERSION
from upcycle_bench.util.cache import build_once, cache_root, locked
from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import results
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 3  # raise it when the same icons would give other files
SHARDS = 16
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
HELD_SHARE = 0.048  # of (group, drawing) for validation, and again for the temperature
NEAR = 12.0  # root-mean-square difference in grey levels up to which two images are the same drawing to the eye
BLANK = 8  # an image whose grey levels span no more shows nothing
CLASS_GROUPS = 20
TEMPLATES = ("{c}", "{c} outline", "{c} filled", "{c} line")
SEEN, UNSEEN = "seen-caption", "unseen-caption"


@dataclass(frozen=True)
class Table:
    """What is known of every icon that is not left out, one entry a row; `split` is where it went."""

    rows: np.ndarray  # into Icons.images
    family: list[str]
    group: list[str]
    name: list[str]
    base: list[str]  # without style, as the family itself would take it off: what may be a class
    drawing: list[str]  # coarser: what must not cross the split
    category: list[str]
    caption: list[str]
    split: np.ndarray  # object: train, near, variant, validation, temperature, dev-GROUP, test-GROUP


def load(seed: int, reporter: Reporter) -> World:
    """The world from the cache, built first if it is not there. UserError for a seed: the lab has one split."""
    if seed:
        raise UserError(f"data.seed {seed}: the lab has one split, data.seed = 0.")
    folder = cache_root() / "worlds" / f"lab-{VERSION}"
    if not folder.is_dir():
        with locked(folder):  # the ranks of one machine all come here
            build_once(folder, partial(build, reporter=reporter))
    return open_world("lab", folder)


def build(folder: Path, reporter: Reporter) -> None:
    """Write the world into `folder`, which must not exist."""
    with reporter.task(f"fetching {PACKAGE} {ICONS_VERSION} (104 MB, once)"):
        tarball = download()
    icons = render(tarball, track=reporter.track)
    with reporter.task("splitting by lineage"):
        table, blank = tabulate(icons)
    with reporter.task("looking for near-identical images"):
        pairs = separate(table, icons.images)
        drop_variants(table)
    classes = concepts(table)
    counts = write_training(folder, table, icons.images, reporter)
    with reporter.task("writing evaluation sets"):
        counts |= write_evaluation(folder / "eval", table, icons.images, pairs, classes)
    write_index(folder / "index.tsv", table, set(classes))
    write_attribution(folder / "ATTRIBUTION.md", icons)
    with reporter.task("sealing"):
        write_manifest(folder, facts(icons, table, blank, counts, classes))


def tabulate(icons: Icons) -> tuple[Table, int]:
    """All icons that show something, with their group and split; and how many show nothing."""
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
            table.split[len(table.name)] = _split(group, drawing)
            table.family.append(family.prefix)
            table.group.append(group)
            table.name.append(name)
            table.base.append(lineage.base_name(name, family.styles))
            table.drawing.append(drawing)
            table.category.append(category)
            table.caption.append(lineage.caption(name))
    return table, int((icons.readable & ~shows_N).sum())


def _drawings(icons: Icons, group_of: dict[str, str], shows_N: np.ndarray) -> dict[str, dict[str, str]]:
    """Group -> name -> drawing."""
    names: dict[str, set[str]] = defaultdict(set)
    styles: dict[str, set[str]] = defaultdict(set)
    for family in icons.families:
        shown = shows_N[family.start : family.start + len(family.names)]
        names[group_of[family.prefix]].update(name for name, ok in zip(family.names, shown, strict=True) if ok)
        styles[group_of[family.prefix]].update(family.styles)
    return {group: lineage.drawings(names[group], styles[group]) for group in names}


def _split(group: str, drawing: str) -> str:
    if group in HELD_OUT:
        return f"{HELD_OUT[group][0]}-{group}"
    place = Stream(("world", "lab", "split", group, drawing)).seed() / 2**63
    return "validation" if place < HELD_SHARE else "temperature" if place < 2 * HELD_SHARE else "train"


def separate(table: Table, images: np.ndarray) -> np.ndarray:
    """Move training images near any evaluation image to the split `near`; returns the near pairs of table rows."""
    from upcycle_bench.data.worlds.near import near_pairs

    flat_NP = images.reshape(len(images), -1)
    if len(table.rows) < len(flat_NP):
        flat_NP = flat_NP[table.rows]
    pairs = near_pairs(flat_NP, np.flatnonzero(table.split != "train"), NEAR)
    others = np.unique(pairs[:, 1])
    table.split[others[table.split[others] == "train"]] = "near"
    return pairs


def drop_variants(table: Table) -> None:
    """Move evaluation icons to the split `variant` whose name is a training icon's with or without a style word.

    Drawings do not cross, but what families leave undeclared can hide one: "add-duotone-line" beside "add-duotone".
    """
    row_of = {(group, name): row for row, (group, name) in enumerate(zip(table.group, table.name, strict=True))}
    trained = np.isin(table.split, ["train", "near"])
    dropped = []
    for (group, name), row in row_of.items():
        bare, _, last = name.rpartition("-")
        other = row_of.get((group, bare), row)
        if last in lineage.STYLES | lineage.SIBLINGS and trained[row] != trained[other]:
            dropped.append(row if trained[other] else other)
    table.split[dropped] = "variant"


def concepts(table: Table) -> list[str]:
    """The classes, sorted: base names drawn by at least `CLASS_GROUPS` groups, at least two letters long."""
    groups: dict[str, set[str]] = defaultdict(set)
    for base, group in zip(table.base, table.group, strict=True):
        groups[base].add(group)
    return sorted(base for base, seen in groups.items() if len(seen) >= CLASS_GROUPS and len(base) > 1)


def write_training(folder: Path, table: Table, images: np.ndarray, reporter: Reporter) -> dict[str, int]:
    """The training shards, on all cores."""
    rows = np.flatnonzero(table.split == "train")
    work = [
        (folder / "train" / f"{number:02d}.tar", images[table.rows[part]], [table.caption[row] for row in part])
        for number, part in enumerate(np.array_split(rows, SHARDS))
    ]
    return {"train": sum(results(_write_pairs, work, cores(), reporter.track, "writing training shards"))}


def _write_pairs(path: Path, images: np.ndarray, captions: list[str]) -> int:
    pairs = zip(images, captions, strict=True)
    return write_shard(path, ({"png": png(_picture(image)), "txt": text.encode()} for image, text in pairs))


def _picture(image: np.ndarray) -> Image:
    """A grey image takes a third of the room."""
    from PIL.Image import fromarray

    grey = image[..., 0]
    return fromarray(grey) if (image == grey[..., None]).all() else fromarray(image)


def write_evaluation(
    folder: Path, table: Table, images: np.ndarray, pairs: np.ndarray, classes: Sequence[str]
) -> dict[str, int]:
    """Both sets of every evaluation split; returns their sizes."""
    from upcycle_bench.data.worlds.near import components

    label_of = {name: label for label, name in enumerate(classes)}
    classnames = [lineage.caption(name) for name in classes]
    trained = {caption for caption, split in zip(table.caption, table.split, strict=True) if split == "train"}
    counts = {}
    for split in sorted(set(table.split) - {"train", "near", "variant"}):
        rows = np.flatnonzero(table.split == split)
        known = [row for row in rows if table.base[row] in label_of]
        labelled = ((_picture(images[table.rows[row]]), label_of[table.base[row]]) for row in known)
        strata = [SEEN if table.caption[row] in trained else UNSEEN for row in known]
        counts[split] = write_classification(folder / split, labelled, classnames, TEMPLATES, strata)
        inside = pairs[(table.split[pairs[:, 0]] == split) & (table.split[pairs[:, 1]] == split)]
        drawing = components(len(table.rows), inside)
        gallery = list(one_of_each(table, rows, drawing))
        strata = [SEEN if table.caption[row] in trained else UNSEEN for row in gallery]
        captioned = ((_picture(images[table.rows[row]]), [table.caption[row]]) for row in gallery)
        counts[f"{split}-retrieval"] = write_retrieval(folder / f"{split}-retrieval", captioned, strata)
    return counts


def one_of_each(table: Table, rows: np.ndarray, drawing: np.ndarray) -> Iterator[int]:
    """One row for each caption and each drawing, in an order that favours no family."""
    captions: set[str] = set()
    drawings: set[int] = set()
    key = {row: Stream(("world", "lab", "gallery", table.family[row], table.name[row])).seed() for row in rows}
    for row in sorted(rows, key=key.__getitem__):
        if table.caption[row] not in captions and drawing[row] not in drawings:
            captions.add(table.caption[row])
            drawings.add(drawing[row])
            yield row


def write_index(path: Path, table: Table, classes: set[str]) -> None:
    """One line an icon: split, group, family, name, drawing, caption, category, class (empty: none)."""
    columns = (table.split, table.group, table.family, table.name, table.drawing, table.caption, table.category)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("split\tgroup\tfamily\tname\tdrawing\tcaption\tcategory\tclass\n")
        for *fields, base in zip(*columns, table.base, strict=True):
            file.write("\t".join([*fields, base if base in classes else ""]) + "\n")


def groups(folder: Path) -> list[str]:
    """The group of every training pair, in the order of the shards."""
    with (folder / "index.tsv").open(encoding="utf-8") as file:
        rows = (line.split("\t", 2) for line in file)
        return [group for split, group, _ in rows if split == "train"]


def write_attribution(path: Path, icons: Icons) -> None:
    """Who drew the icons, and under which licence."""
    lines = [
        "# The icons of the lab",
        "",
        f"From `{PACKAGE}` {ICONS_VERSION}, rendered to {SIZE} x {SIZE} pixels; nothing else was changed.",
        "",
        "| family | title | author | licence | source | icons |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for family in icons.families:
        cells = (family.prefix, family.title, family.author, family.licence, family.url, str(len(family.names)))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def facts(icons: Icons, table: Table, blank: int, counts: dict[str, int], classes: Sequence[str]) -> dict[str, Any]:
    """What the manifest says beside the files' hashes: every removal, every group."""
    icons_of, families_of, left_of = Counter(table.group), defaultdict(set), Counter[str]()
    for family, group, split in zip(table.family, table.group, table.split, strict=True):
        families_of[group].add(family)
        left_of[group] += split == "near"
    groups = {
        group: {
            "split": HELD_OUT.get(group, ("train", ""))[0],
            "kind": HELD_OUT.get(group, ("", ""))[1],
            "families": sorted(families_of[group]),
            "icons": icons_of[group],
            "left training as near-identical": left_of[group],
        }
        for group in sorted(icons_of)
    }
    return {
        "name": "lab",
        "version": VERSION,
        "icons": f"{PACKAGE} {ICONS_VERSION}",
        "counts": dict(Counter(table.split.tolist())) | {f"set {name}": count for name, count in counts.items()},
        "removed": {
            "licence": icons.left_out,
            "skin tone": sum(family.skin_tones for family in icons.families),
            "unreadable": int((~icons.readable).sum()),
            "blank": blank,
            "near-identical to an evaluation image": int((table.split == "near").sum()),
            "named like a training icon but for one style word": int((table.split == "variant").sum()),
        },
        "classes": len(classes),
        "groups": groups,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a built lab."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def categories(folder: Path, split: str) -> list[str]:
    """The family's own category of each sample of a split's classification set, in its order; "" where it has none."""
    with (folder / "index.tsv").open(encoding="utf-8") as file:
        rows = (line.rstrip("\n").split("\t") for line in file)
        return [category for name, *_, category, concept in rows if name == split and concept]
