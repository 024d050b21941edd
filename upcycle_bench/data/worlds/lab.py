"""The lab: about 300,000 named icons. It trains on some families of icons and evaluates on families never seen.

    world = load(0, reporter)               # built once into the cache
    upcycle-bench data build lab            # the same from the command line

A pair is an icon (32 x 32 RGB, dark on white unless it has colours) and its name in words. `lab_splits.py` says which
icons are trained on. The evaluation sets are:

    eval/{validation,temperature,dev-GROUP,test-GROUP}             classification into concepts
    eval/{validation,temperature,dev-GROUP,test-GROUP}-retrieval   one image for each caption and each drawing

Strata tell whether a training icon has the caption too. `index.tsv` lists every icon with its split; `ATTRIBUTION.md`
names the authors and licences.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle_bench.data.evalset_write import png, write_classification, write_retrieval, write_shard
from upcycle_bench.data.world import World, open_world, write_manifest
from upcycle_bench.data.worlds import lab_splits
from upcycle_bench.data.worlds.icons import PACKAGE, SIZE, Icons, download, render
from upcycle_bench.data.worlds.icons import VERSION as ICONS_VERSION
from upcycle_bench.data.worlds.lab_splits import Table
from upcycle_bench.data.worlds.lineage import caption
from upcycle_bench.util.cache import build_once, cache_root, locked
from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import results
from upcycle_bench.util.progress import Reporter

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 4  # raise it when the same icons would give other files
SHARDS = 16
TEMPLATES = ("{c}", "{c} outline", "{c} filled", "{c} line")
SEEN, UNSEEN = "seen-caption", "unseen-caption"


def load(seed: int, reporter: Reporter) -> World:
    """The world from the cache, built first if it is not there. UserError for a seed other than 0."""
    if seed:
        raise UserError(f"data.seed {seed}: the lab has one split, data.seed = 0.")
    folder = cache_root() / "worlds" / f"lab-{VERSION}"
    if not folder.is_dir():
        with locked(folder, "the data of the lab"):  # so that one rank of a machine builds, and the others wait
            build_once(folder, partial(build, reporter=reporter))
    return open_world("lab", folder)


def build(folder: Path, reporter: Reporter) -> None:
    """Write the world into `folder`, which must not exist."""
    with reporter.task(f"fetching {PACKAGE} {ICONS_VERSION} (104 MB, once)"):
        tarball = download()
    icons = render(tarball, track=reporter.track)
    with reporter.task("splitting by lineage"):
        table, blank = lab_splits.tabulate(icons)
    with reporter.task("looking for near-identical images"):
        near_pairs = lab_splits.separate(table, icons.images)
    with reporter.task("looking for twins"):
        twins = lab_splits.drop_twins(table, icons.images)
        lab_splits.drop_variants(table)
    classes = lab_splits.concepts(table)
    counts = write_training(folder, table, icons.images, reporter)
    with reporter.task("writing evaluation sets"):
        counts |= write_evaluation(folder / "eval", table, icons.images, near_pairs, classes)
    write_index(folder / "index.tsv", table, set(classes))
    write_attribution(folder / "ATTRIBUTION.md", icons)
    with reporter.task("sealing"):
        write_manifest(folder, facts(icons, table, blank, twins, counts, classes))


def write_training(folder: Path, table: Table, images: np.ndarray, reporter: Reporter) -> dict[str, int]:
    """Write the training shards, on all cores; returns the number of pairs."""
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
    """The image uint8 [32, 32, 3] for a PNG; a grey one has one channel, a third of the bytes."""
    from PIL.Image import fromarray

    grey = image[..., 0]
    return fromarray(grey) if (image == grey[..., None]).all() else fromarray(image)


def write_evaluation(
    folder: Path, table: Table, images: np.ndarray, near_pairs: np.ndarray, classes: Sequence[str]
) -> dict[str, int]:
    """Write both sets of every evaluation split; returns their sizes. `near_pairs` as `separate` returns them."""
    from upcycle_bench.data.worlds.near import components

    label_of = {name: label for label, name in enumerate(classes)}
    classnames = [caption(name) for name in classes]
    trained = {text for text, split in zip(table.caption, table.split, strict=True) if split == "train"}
    counts = {}
    for split in sorted(set(table.split) - {"train", *lab_splits.LEFT_OUT}):
        rows = np.flatnonzero(table.split == split)
        known = [row for row in rows if table.base[row] in label_of]
        labelled = ((_picture(images[table.rows[row]]), label_of[table.base[row]]) for row in known)
        strata = [SEEN if table.caption[row] in trained else UNSEEN for row in known]
        counts[split] = write_classification(folder / split, labelled, classnames, TEMPLATES, strata)
        inside = near_pairs[(table.split[near_pairs[:, 0]] == split) & (table.split[near_pairs[:, 1]] == split)]
        drawing = components(len(table.rows), inside)
        gallery = list(lab_splits.one_of_each(table, rows, drawing))
        strata = [SEEN if table.caption[row] in trained else UNSEEN for row in gallery]
        captioned = ((_picture(images[table.rows[row]]), [table.caption[row]]) for row in gallery)
        counts[f"{split}-retrieval"] = write_retrieval(folder / f"{split}-retrieval", captioned, strata)
    return counts


def write_index(path: Path, table: Table, classes: set[str]) -> None:
    """Write one line an icon: split, group, family, name, drawing, caption, category, class ("" where it has none)."""
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
    """Write who drew the icons, and under which licence."""
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


def facts(
    icons: Icons,
    table: Table,
    blank: int,
    twins: dict[str, int],
    counts: dict[str, int],
    classes: Sequence[str],
) -> dict[str, Any]:
    """What the manifest says besides the files' hashes: the counts of all splits, removals and groups."""
    icons_of, families_of, left_of = Counter(table.group), defaultdict(set), Counter[str]()
    for family, group, split in zip(table.family, table.group, table.split, strict=True):
        families_of[group].add(family)
        left_of[group] += split == "near"
    groups = {
        group: {
            "split": lab_splits.HELD_OUT.get(group, ("train", ""))[0],
            "kind": lab_splits.HELD_OUT.get(group, ("", ""))[1],
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
            "twin of a training image": twins,
            "named like a training icon but for style words": int((table.split == "variant").sum()),
        },
        "classes": len(classes),
        "groups": groups,
    }


def categories(folder: Path, split: str) -> list[str]:
    """The category of each sample of a split's classification set, as its family has it; "" where it has none."""
    with (folder / "index.tsv").open(encoding="utf-8") as file:
        rows = (line.rstrip("\n").split("\t") for line in file)
        return [category for name, *_, category, concept in rows if name == split and concept]
