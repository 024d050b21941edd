"""The lab that was built on this machine: nothing is in training and evaluation at once, and all counts add up."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REAL_CACHE
from tests.data.test_lineage import REQUIRED
from upcycle_bench.data.worlds import icons, lab, lab_splits
from upcycle_bench.data.worlds.lineage import caption, skin_tones
from upcycle_bench.data.worlds.twins import KINDS, find_twins
from upcycle_bench.util.files import file_sha256

FOLDER = REAL_CACHE / "worlds" / f"lab-{lab.VERSION}"
QUERIES = 300  # evaluation images that are compared with all of training
TRAINED_ON = "26043a6c8d81bcf6074127eaa12a76482fd94c19d08ff2ceaa6054f982e2a030"  # by the dense model that we ship
WORDS = "line outline fill filled solid bold light thin 20-filled negative dark icon wordmark".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder() -> Path:
    if not (FOLDER / "manifest.json").is_file():
        pytest.skip("the lab is not built on this machine: upcycle-bench data build lab")
    return FOLDER


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def index(folder: Path) -> list[dict[str, str]]:
    head, *lines = (folder / "index.tsv").read_text().splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    """The families as downloaded, but for the drawings: prefix -> document."""
    tarball = REAL_CACHE / "downloads" / f"iconify-json-{icons.VERSION}.tgz"
    if not tarball.is_file():
        pytest.skip(f"the package is not on this machine: {tarball}")
    families = {}
    for document in icons.read_families(tarball):
        document["icons"] = list(document["icons"])
        families[document["prefix"]] = document
    return families


def samples(shard: Path) -> Iterator[tuple[bytes, str]]:
    """(png, caption or label) of each sample; steps from header to header, ten times as fast as tarfile."""
    content = shard.read_bytes()
    place, sample = 0, {}
    while content[place]:
        size = int(content[place + 124 : place + 135], 8)
        suffix = content[place : place + 100].rstrip(b"\0")[-3:]
        sample["png" if suffix == b"png" else "text"] = content[place + 512 : place + 512 + size]
        place += 512 + -(-size // 512) * 512
        if len(sample) == 2:
            yield sample.pop("png"), sample.pop("text").decode()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1)


def blocks(images_NP: np.ndarray) -> np.ndarray:
    """Sums over 4 x 4 pixels [N, 64], scaled so that two images are no farther apart in them than in all pixels."""
    rows = images_NP.reshape(-1, 8, 4, 96).sum(2, dtype=np.uint16)
    sums_NB = rows.reshape(-1, 64, 12).sum(2, dtype=np.uint32)
    return sums_NB.astype(np.float32) / np.float32(48**0.5)  # Cauchy and Schwarz, for the 48 values of a block


def test_twelve_groups_are_held_out_half_for_decisions_half_for_reports():
    assert Counter(split for split, _ in lab_splits.HELD_OUT.values()) == {"dev": 6, "test": 6}
    for split in ("dev", "test"):  # different in kind: each half has outline, filled, colour and two-tone drawings
        kinds = " ".join(kind for half, kind in lab_splits.HELD_OUT.values() if half == split)
        assert all(word in kinds for word in ("outline", "filled", "colour", "two-tone")), kinds


def test_a_sample_of_files_is_what_the_manifest_says(folder: Path, manifest: dict[str, Any]):
    files = manifest["files"]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == there - {"manifest.json"}
    chosen = random.Random(0).sample(sorted(name for name in files if name.startswith("eval/")), 30)
    for name in [*chosen, "train/00.tar", "train/15.tar", "index.tsv", "ATTRIBUTION.md"]:
        assert file_sha256(folder / name) == files[name], name


def test_the_training_shards_are_those_of_the_shipped_dense_model(manifest: dict[str, Any]):
    """Splits may change for evaluation only: the sha256 of the hashes of all shards, in their order."""
    shards = sorted(name for name in manifest["files"] if name.startswith("train/"))
    assert hashlib.sha256("".join(manifest["files"][name] for name in shards).encode()).hexdigest() == TRAINED_ON


def test_no_training_image_is_near_an_evaluation_image_or_its_twin(folder: Path, manifest: dict[str, Any]):
    """`QUERIES` evaluation images, as many from each set, against every training image, on all pixels.

    Nor is one of them inverted, mirrored or moved, or in other colours, in every fourth shard.
    """
    sets = sorted((folder / "eval").iterdir())
    rng = random.Random(0)
    evaluated: list[bytes] = []
    exact: set[bytes] = set()  # of all evaluation images
    for path in sets:
        images = [image for image, _ in samples(path / "test" / "0.tar")]
        exact |= {hashlib.blake2b(image, digest_size=16).digest() for image in images}
        evaluated += rng.sample(images, -(-QUERIES // len(sets)))
    queries_QP = np.stack([pixels(image) for image in evaluated])
    assert len(queries_QP) >= QUERIES
    bound = lab_splits.NEAR**2 * queries_QP.shape[1]
    queries_QB = blocks(queries_QP)
    squares_Q = np.square(queries_QB).sum(1)
    seen, shape = 0, (icons.SIZE, icons.SIZE, 3)
    for shard in sorted((folder / "train").iterdir()):
        images = [image for image, _ in samples(shard)]
        assert not exact.intersection(hashlib.blake2b(image, digest_size=16).digest() for image in images)
        seen += len(images)
        parts = []
        for start in range(0, len(images), 4096):
            some_NP = np.stack([pixels(image) for image in images[start : start + 4096]])
            some_NB = blocks(some_NP)
            # |n|^2 + |q|^2 - 2 n q of the blocks in single precision, then what is close again in all pixels
            rest_NQ = np.square(some_NB).sum(1)[:, None] + squares_Q - 2 * some_NB @ queries_QB.T
            for n, q in np.argwhere(rest_NQ <= 1.01 * bound):
                difference = some_NP[n].astype(int) - queries_QP[q]
                assert (difference**2).sum() > bound, (shard.name, start + n)
            parts.append(some_NP)
        if int(shard.stem) % 4:
            continue
        twins = find_twins(queries_QP.reshape(-1, *shape), np.concatenate(parts).reshape(-1, *shape))
        assert {kind: len(pairs) for kind, pairs in twins.items()} == dict.fromkeys(KINDS, 0), shard.name
    assert seen == manifest["counts"]["train"] >= 200_000


def test_shards_and_sets_hold_the_captions_of_the_index(folder: Path, index: list[dict[str, str]]):
    trained = [row["caption"] for row in index if row["split"] == "train"]
    assert [text for shard in sorted((folder / "train").iterdir()) for _, text in samples(shard)] == trained
    known = set(trained)
    for path in (folder / "eval").iterdir():
        split = path.name.removesuffix("-retrieval")
        rows = [row for row in index if row["split"] == split]
        texts = [text for _, text in samples(path / "test" / "0.tar")]
        strata = (path / "strata.txt").read_text().split()
        if path.name == split:
            names = (path / "classnames.txt").read_text().splitlines()
            rows = [row for row in rows if row["class"]]
            assert [names[int(text)] for text in texts] == [caption(row["class"]) for row in rows]
            texts = [row["caption"] for row in rows]
        else:
            assert len(set(texts)) == len(texts) and set(texts) <= {row["caption"] for row in rows}
            assert set(strata) == {"seen-caption", "unseen-caption"}, path.name
        assert strata == ["seen-caption" if text in known else "unseen-caption" for text in texts]


def test_no_family_or_group_crosses(index: list[dict[str, str]]):
    splits_of: dict[str, set[str]] = defaultdict(set)
    groups_of: dict[str, set[str]] = defaultdict(set)
    for row in index:
        splits_of[row["group"]].add(row["split"])
        groups_of[row["family"]].add(row["group"])
    assert all(len(groups) == 1 for groups in groups_of.values())
    for group, splits in splits_of.items():
        if group in lab_splits.HELD_OUT:
            assert splits - {"twin"} == {f"{lab_splits.HELD_OUT[group][0]}-{group}"}
        else:
            assert splits <= {"train", *lab_splits.LEFT_OUT, "validation", "temperature"}
    assert lab_splits.HELD_OUT.keys() <= splits_of.keys()


def test_no_drawing_of_a_group_crosses(index: list[dict[str, str]]):
    splits_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in index:
        if row["split"] not in ("twin", "variant"):
            splits_of[row["group"], row["drawing"]].add(row["split"].replace("near", "train"))
    assert [key for key, splits in splits_of.items() if len(splits) > 1] == []


@pytest.mark.parametrize("word", WORDS)
def test_a_name_and_its_variant_are_on_one_side(index: list[dict[str, str]], word: str):
    """Told from the names alone, without the functions that made the split."""
    kept = [row for row in index if row["split"] not in ("twin", "variant")]
    split_of = {(row["group"], row["name"]): row["split"] in ("train", "near") for row in kept}
    pairs = [
        (name, trained, split_of[group, f"{name}-{word}"])
        for (group, name), trained in split_of.items()
        if (group, f"{name}-{word}") in split_of
    ]
    assert len(pairs) > 50
    assert [pair for pair in pairs if pair[1] != pair[2]] == []


def test_every_icon_of_the_package_is_counted(
    manifest: dict[str, Any], index: list[dict[str, str]], documents: dict[str, dict[str, Any]]
):
    removed = manifest["removed"]
    gone = sum(removed["licence"].values()) + removed["skin tone"] + removed["unreadable"] + removed["blank"]
    assert len(index) + gone == sum(len(document["icons"]) for document in documents.values())
    names = defaultdict(set)
    for row in index:
        assert row["name"] not in names[row["family"]]
        names[row["family"]].add(row["name"])
    for family, kept in names.items():
        document = documents[family]
        assert document["info"]["license"]["spdx"] in icons.LICENCES
        assert kept <= set(document["icons"]) - skin_tones(document["icons"])


def test_the_manifest_counts_what_the_index_lists(manifest: dict[str, Any], index: list[dict[str, str]]):
    counts = Counter(row["split"] for row in index)
    listed = {split: count for split, count in manifest["counts"].items() if not split.startswith("set ")}
    assert listed == counts
    assert manifest["removed"]["near-identical to an evaluation image"] == counts["near"]
    assert manifest["removed"]["named like a training icon but for style words"] == counts["variant"] < 1000
    twins = manifest["removed"]["twin of a training image"]
    assert list(twins) == sorted(KINDS) and min(twins.values()) > 0
    assert sum(twins.values()) == counts["twin"] < 0.04 * 65_635  # of all images held out
    assert manifest["counts"]["set train"] == counts["train"] >= 200_000
    assert min(counts["validation"], counts["temperature"]) >= 15_000
    assert manifest["classes"] == len({row["class"] for row in index} - {""})
    for split in counts.keys() - {"train", *lab_splits.LEFT_OUT}:
        labelled = sum(row["split"] == split and row["class"] != "" for row in index)
        assert manifest["counts"][f"set {split}"] == labelled
        assert 0 < manifest["counts"][f"set {split}-retrieval"] <= counts[split]
    groups = Counter(row["group"] for row in index)
    assert {group: facts["icons"] for group, facts in manifest["groups"].items()} == groups


def test_every_class_is_drawn_by_enough_groups(index: list[dict[str, str]]):
    groups: dict[str, set[str]] = defaultdict(set)
    for row in index:
        if row["class"]:
            groups[row["class"]].add(row["group"])
    assert min(map(len, groups.values())) >= lab_splits.CLASS_GROUPS


def test_required_descents_are_one_group_each(index: list[dict[str, str]], documents: dict[str, dict[str, Any]]):
    group_of = {row["family"]: row["group"] for row in index}
    patterns = ["fluent*", "noto*", "emojione*", "twemoji", "mdi*", "pepicons*", "lucide*", "icon-park*", "streamline*"]
    patterns += ["fa-*", "fa[67]-*", "material-symbols*"]  # not famicons, which descends from ion
    required = [line.split() for line in REQUIRED]
    required += [[family for family in group_of if fnmatchcase(family, pattern)] for pattern in patterns]
    for families in required:
        there = [family for family in families if family in group_of]
        # A listed family may be missing only because the package has none, or one we may not use.
        for family in set(families) - set(there):
            licence = documents.get(family, {}).get("info", {}).get("license", {}).get("spdx")
            assert licence not in icons.LICENCES or not documents[family]["icons"], family
        assert len({group_of[family] for family in there}) == 1, families


def test_authors_of_every_family_stand_beside_the_data(folder: Path, index: list[dict[str, str]]):
    lines = (folder / "ATTRIBUTION.md").read_text().splitlines()
    named = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")}
    assert {row["family"] for row in index} <= named


def test_the_manifest_is_sorted_json(folder: Path, manifest: dict[str, Any]):
    assert (folder / "manifest.json").read_text() == json.dumps(manifest, indent=1, sort_keys=True) + "\n"
