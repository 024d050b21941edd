"""A small lab, built twice from families that are made up here. `test_lab_real.py` tests the lab of this machine."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_benchmark.datasets.builder import build_wds_dataset
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests.icon_families import document, drawing, write_tarball
from upcycle_bench.data import evalset
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.world import World, open_world
from upcycle_bench.data.worlds import lab, lab_splits
from upcycle_bench.data.worlds.icons import render
from upcycle_bench.data.worlds.lineage import base_name, caption
from upcycle_bench.model.clip import create_clip
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

WORDS = [f"{a}-{b}" for a in ("red", "big", "old") for b in ("house", "tree", "boat", "lamp")]
NEARLY = 0.05  # a shift of a drawing that no eye sees: about 6 grey levels root mean square
TRAINING = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "lucide", "feather"]
HELD_OUT = {
    "iota": ("dev", "outline"),
    "uil": ("dev", "solid"),
    "kappa": ("test", "outline"),
    "twins": ("test", "colour"),
}
LICENSED = [*TRAINING, "iota", "uil", "uim", "kappa", "twins"]
COPIES = {  # kind of twin -> what is behind the drawing, its colour, and its place, where the original has (4, 6)
    "recoloured": ("", "#b02020", "translate(4 6)"),
    "inverted": ('<path fill="#000" d="M0 0h24v24H0z"/>', "#fff", "translate(4 6)"),
    "mirrored": ("", "currentColor", "translate(24 0) scale(-1 1) translate(4 6)"),
    "shifted": ("", "currentColor", "translate(7 3)"),  # four pixels
}
STYLES = {"suffixes": {"": "Regular", "bold": "Bold"}}


def families() -> list[dict[str, Any]]:
    """15 families that may be used and one that may not, each with `WORDS` in three variants and words of its own."""
    icons: dict[str, dict[str, Any]] = {}
    for number, prefix in enumerate(LICENSED):
        own = [f"{prefix}-thing-{chr(97 + n)}" for n in range(6)]
        icons[prefix] = {
            f"{word}{variant}": drawing(number, place, len(variant))
            for place, word in enumerate([*WORDS, *own])
            for variant in ("", "-filled", "-24-bold")
        }
    # One group by pictures: more than 5 % of beta's are alpha's.
    icons["beta"] |= {name: icons["alpha"][name] for name in list(icons["alpha"])[:4]}
    # Near, but not equal, to pictures held out: they leave training, their families do not join.
    for place in range(5):
        icons["gamma"][f"copy-{chr(97 + place)}"] = drawing(LICENSED.index("iota"), place, 0, moved=NEARLY)
    icons["delta"]["stolen"] = icons["kappa"]["red-tree"]  # equal, but too few to be a lineage
    # The same drawing under two names inside one family: its halves may fall into different splits.
    for place in range(len(WORDS)):
        icons["eta"][f"alias-{chr(97 + place)}"] = drawing(LICENSED.index("eta"), place, 0, moved=NEARLY)
    # In the galleries: drawings with several captions, captions with several drawings, in colour.
    for place in range(6):
        for copy, moved in enumerate((0, 0, NEARLY)):
            name = f"twin-{'abc'[copy]}{'uvwxyz'[place]}"
            icons["twins"][name] = drawing(99, place, fill="#c33" if place % 2 else "currentColor", moved=moved)
    # Held-out icons and copies of them in a family that is trained on.
    for number, (kind, (behind, fill, placed)) in enumerate(COPIES.items()):
        for place in range(6):
            own = drawing(95, place, number)
            icons["kappa"][f"{kind}-{chr(97 + place)}"] = f'<g transform="translate(4 6) scale(.5)">{own}</g>'
            own = drawing(95, place, number, fill=fill)
            icons["alpha"][f"{kind}-copy-{chr(97 + place)}"] = f'{behind}<g transform="{placed} scale(.5)">{own}</g>'
    icons["twins"] |= {"home_work": drawing(98, 0), "home-work": drawing(98, 1)}
    tones = ("", "-light", "-medium-dark", "-dark-skin-tone")
    icons["theta"] |= {f"wave{tone}": drawing(97, len(tone)) for tone in tones}
    icons["theta"] |= {"blank": "", "white": '<path fill="#fff" d="M0 0h24v24H0z"/>'}
    icons["theta"] |= {"broken": "<path>", "bad": "<a:b/>"}
    categories = {"Houses": ["red-house", "big-house"]}
    found = [document(prefix, icons[prefix], categories=categories, **STYLES) for prefix in LICENSED]
    return [*found, document("paid", {"a": drawing(96, 1), "b": drawing(96, 2)}, "CC-BY-NC-4.0")]


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tarball(tmp_path_factory.mktemp("package") / "icons.tgz", families())


@pytest.fixture(scope="module")
def small(tarball: Path) -> Iterator[None]:
    """Other icons and smaller constants. The worker processes do not see them, but they only render and write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab, "download", lambda: tarball)
        patch.setattr(lab, "SHARDS", 3)
        patch.setattr(lab_splits, "HELD_OUT", HELD_OUT)
        patch.setattr(lab_splits, "HELD_SHARE", 0.12)
        patch.setattr(lab_splits, "CLASS_GROUPS", 8)
        yield


@pytest.fixture(scope="module")
def world(small: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("lab") / "lab"
    lab.build(folder, Reporter())
    return open_world("lab", folder)


@pytest.fixture(scope="module")
def manifest(world: World) -> dict[str, Any]:
    return json.loads((world.eval_root.parent / "manifest.json").read_text())


@pytest.fixture(scope="module")
def index(world: World) -> list[dict[str, str]]:
    head, *lines = (world.eval_root.parent / "index.tsv").read_text().splitlines()
    return [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]


@pytest.fixture(scope="module")
def pictures(tarball: Path) -> dict[tuple[str, str], np.ndarray]:
    """(family, name) -> image, straight from the renderer."""
    icons = render(tarball, processes=1)
    return {
        (family.prefix, name): icons.images[family.start + number]
        for family in icons.families
        for number, name in enumerate(family.names)
    }


@pytest.fixture(scope="module")
def training(world: World) -> list[tuple[np.ndarray, str]]:
    """What the training shards hold, read without our code."""
    samples = []
    for shard in world.train_shards:
        with tarfile.open(shard) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in content:
            if name.endswith(".png"):
                image = np.asarray(Image.open(io.BytesIO(content[name])).convert("RGB"))
                samples.append((image, content[name.replace(".png", ".txt")].decode()))
    return samples


def samples(world: World, name: str) -> list[tuple[np.ndarray, Any]]:
    """What an evaluation set holds: images [32, 32, 3] with labels or lists of captions."""
    batches = evalset.read(world.eval_root / name, lambda image: pil_to_tensor(image.convert("RGB")), 16).batches
    return [(x.numpy().transpose(1, 2, 0), y) for images, ys in batches for x, y in zip(images, ys, strict=True)]


def near(some: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    """Which of `others` looks like which of `some`, bool [some, others]; by the definition."""
    whole = np.stack(others).astype(np.float32)
    return np.stack([np.sqrt(np.square(whole - image).mean((1, 2, 3))) <= lab_splits.NEAR for image in some])


SPLITS = ["dev-iota", "dev-uil", "temperature", "test-kappa", "test-twins", "validation"]


def test_the_splits_are_all_there_and_none_is_empty(world: World, manifest: dict[str, Any]):
    sets = sorted(path.name for path in world.eval_root.iterdir())
    assert sets == sorted([*SPLITS, *(f"{split}-retrieval" for split in SPLITS)])
    assert [path.name for path in world.train_shards] == ["00.tar", "01.tar", "02.tar"]
    assert set(manifest["counts"]) == {*SPLITS, "train", "near", "twin", "set train", *(f"set {name}" for name in sets)}
    assert min(manifest["counts"].values()) >= 5


def test_two_builds_are_equal(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: dict[str, Any]):
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path))
    again = lab.load(0, Reporter())
    folder = tmp_path / "worlds" / f"lab-{lab.VERSION}"
    assert (folder / "manifest.json").read_bytes() == (world.eval_root.parent / "manifest.json").read_bytes()
    assert again.sha256 == world.sha256
    assert again.eval_root == folder / "eval"
    monkeypatch.setattr(lab, "download", lambda: pytest.fail("built a third time"))
    assert lab.load(0, Reporter()) == again
    for name, sha256 in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256


def test_the_lab_has_one_split():
    with pytest.raises(UserError, match=r"data\.seed 3: the lab has one split"):
        lab.load(3, Reporter())


def test_every_icon_of_the_package_is_counted_once(manifest: dict[str, Any], index: list[dict[str, str]]):
    removed = manifest["removed"]
    assert removed["licence"] == {"CC-BY-NC-4.0": 2}
    assert (removed["skin tone"], removed["unreadable"], removed["blank"]) == (3, 2, 2)
    counts = {split: count for split, count in manifest["counts"].items() if not split.startswith("set ")}
    assert removed["near-identical to an evaluation image"] == counts["near"] >= 6
    there = sum(len(family["icons"]) for family in families())
    assert there == sum(counts.values()) + 2 + 3 + 2 + 2
    for split, count in counts.items():
        assert count == sum(row["split"] == split for row in index)
    for group, facts in manifest["groups"].items():
        rows = [row for row in index if row["group"] == group]
        assert facts["icons"] == len(rows)
        assert facts["left training as near-identical"] == sum(row["split"] == "near" for row in rows)
        assert facts["families"] == sorted({row["family"] for row in rows})
        assert (facts["split"], facts["kind"]) == HELD_OUT.get(group, ("train", ""))


def test_the_index_tells_of_every_icon(index: list[dict[str, str]], pictures: dict[tuple[str, str], np.ndarray]):
    rows = [(row["family"], row["name"]) for row in index]
    shown = {key for key in pictures if key[1] not in ("blank", "white", "broken", "bad")}
    assert len(rows) == len(set(rows)) and set(rows) == shown
    assert all(row["caption"] == caption(row["name"]) for row in index)
    assert {row["name"] for row in index if row["category"] == "Houses"} == {"red-house", "big-house"}
    # A word that all groups draw is a class, a family's own is none.
    assert {row["class"] for row in index} == {"", *WORDS}
    assert all(row["class"] in ("", base_name(row["name"], ("bold",))) for row in index)


def test_groups_follow_descent_and_pictures(index: list[dict[str, str]]):
    group_of = {row["family"]: row["group"] for row in index}
    assert group_of == {family: family for family in LICENSED} | {"beta": "alpha", "feather": "lucide", "uim": "uil"}


def test_nothing_crosses_by_group_family_or_drawing(index: list[dict[str, str]]):
    splits_of: dict[str, set[str]] = defaultdict(set)
    bases: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in index:
        for key in (row["group"], row["family"]):
            splits_of[key].add(row["split"])
        for key in ("drawing", "class"):
            bases[row["group"], row[key] or row["drawing"]].add(row["split"].replace("near", "train"))
    for group, (split, _) in HELD_OUT.items():
        assert splits_of[group] - {"twin"} == {f"{split}-{group}"}
    assert splits_of["uim"] == {"dev-uil"}
    assert all(splits_of[family] <= {"train", "near", "validation", "temperature"} for family in TRAINING)
    assert all(len(splits) == 1 for splits in bases.values())


def test_no_training_image_is_near_an_evaluation_image(
    world: World,
    training: list[tuple[np.ndarray, str]],
    index: list[dict[str, str]],
    pictures: dict[tuple[str, str], np.ndarray],
):
    evaluated = [image for path in world.eval_root.iterdir() for image, _ in samples(world, path.name)]
    assert not near(evaluated, [image for image, _ in training]).any()
    # And every image that left training had a reason to, among the icons of the evaluation splits.
    held = [pictures[row["family"], row["name"]] for row in index if row["split"] in SPLITS]
    gone = [row for row in index if row["split"] == "near"]
    assert near([pictures[row["family"], row["name"]] for row in gone], held).any(1).all()
    names = {(row["family"], row["name"]) for row in gone}
    assert {("gamma", f"copy-{n}") for n in "abcde"} | {("delta", "stolen")} <= names | {
        (row["family"], row["name"]) for row in index if row["split"] in ("validation", "temperature")
    }


def test_what_training_has_in_another_guise_has_left_evaluation(
    manifest: dict[str, Any], index: list[dict[str, str]], world: World, training: list[tuple[np.ndarray, str]]
):
    split_of = {(row["family"], row["name"]): row["split"] for row in index}
    counts = {}
    for kind in COPIES:
        pairs = [(split_of["kappa", f"{kind}-{n}"], split_of["alpha", f"{kind}-copy-{n}"]) for n in "abcdef"]
        assert all((original == "twin") == (copy == "train") for original, copy in pairs)
        counts[kind] = sum(original == "twin" for original, _ in pairs)
    assert min(counts.values()) > 0
    assert manifest["removed"]["twin of a training image"] == counts
    assert manifest["counts"]["twin"] == sum(counts.values())
    evaluated = [image for path in world.eval_root.iterdir() for image, _ in samples(world, path.name)]
    trained = [image for image, _ in training]
    for change in (lambda image: 255 - image, lambda image: image[:, ::-1], lambda image: 255 - image[:, ::-1]):
        assert not near([change(image) for image in evaluated], trained).any()


def test_the_training_shards_hold_the_training_icons_in_order(
    training: list[tuple[np.ndarray, str]],
    index: list[dict[str, str]],
    pictures: dict[tuple[str, str], np.ndarray],
    world: World,
):
    rows = [row for row in index if row["split"] == "train"]
    assert [text for _, text in training] == [row["caption"] for row in rows]
    for (image, _), row in zip(training, rows, strict=True):
        assert np.array_equal(image, pictures[row["family"], row["name"]])
    clip = create_clip("smoke-vit")
    pairs = PairDataset(world.train_shards, clip)
    batch = pairs.batch(0, 0, len(pairs))
    assert len(pairs) == len(rows)
    for image, text, number in zip(batch.images[:50], batch.texts[:50], batch.index.tolist()[:50], strict=True):
        assert np.array_equal(image, clip.resize(Image.fromarray(training[number][0])))
        assert text.equal(clip.tokenize([training[number][1]])[0])


@pytest.mark.parametrize("split", SPLITS)
def test_classification_sets(
    split: str,
    world: World,
    index: list[dict[str, str]],
    pictures: dict[tuple[str, str], np.ndarray],
    training: list[tuple[np.ndarray, str]],
):
    rows = [row for row in index if row["split"] == split and row["class"]]
    opened = evalset.read(world.eval_root / split, pil_to_tensor, 16)
    assert opened.kind == "classification" and opened.classnames == tuple(caption(word) for word in sorted(WORDS))
    assert opened.templates == lab.TEMPLATES
    known = {text for _, text in training}
    strata = ["seen-caption" if row["caption"] in known else "unseen-caption" for row in rows]
    assert list(opened.strata) == strata
    for (image, label), row in zip(samples(world, split), rows, strict=True):
        assert np.array_equal(image, pictures[row["family"], row["name"]])
        assert opened.classnames[label] == caption(row["class"])


@pytest.mark.parametrize("split", SPLITS)
def test_galleries_hold_one_image_for_each_caption_and_each_drawing(
    split: str,
    world: World,
    index: list[dict[str, str]],
    pictures: dict[tuple[str, str], np.ndarray],
    training: list[tuple[np.ndarray, str]],
):
    rows = [row for row in index if row["split"] == split]
    gallery = samples(world, f"{split}-retrieval")
    captions = [text for _, (text,) in gallery]
    assert len(set(captions)) == len(captions)
    # The drawings of the split: what is near, directly or by way of others. Numbered by their first row.
    drawing_of = list(range(len(rows)))
    shown = [pictures[row["family"], row["name"]] for row in rows]
    for a, b in np.argwhere(near(shown, shown)).tolist():
        old, new = drawing_of[a], drawing_of[b]
        drawing_of = [new if number == old else number for number in drawing_of]
    taken = [
        next(n for n, row in enumerate(rows) if row["caption"] == text and np.array_equal(shown[n], image))
        for image, (text,) in gallery
    ]
    drawings = [drawing_of[n] for n in taken]
    assert len(set(drawings)) == len(drawings)
    for row, number in zip(rows, drawing_of, strict=True):  # and nothing is missing without need
        assert row["caption"] in captions or number in drawings
    known = {text for _, text in training}
    opened = evalset.read(world.eval_root / f"{split}-retrieval", pil_to_tensor, 16)
    assert opened.kind == "retrieval"
    assert list(opened.strata) == ["seen-caption" if text in known else "unseen-caption" for text in captions]


def test_both_strata_occur_and_planted_duplicates_leave_the_galleries(world: World, manifest: dict[str, Any]):
    for split in SPLITS:
        assert {"seen-caption", "unseen-caption"} == set(
            (world.eval_root / f"{split}-retrieval" / "strata.txt").read_text().split()
        )
    captions = [text for _, (text,) in samples(world, "test-twins-retrieval")]
    twins = [text for text in captions if text.startswith("twin ")]
    assert sorted(text[-1] for text in twins) == list("uvwxyz")  # one of three each
    assert len({text[-2] for text in twins}) > 1  # not always the first
    assert captions.count("home work") == 1
    assert manifest["counts"]["set test-twins-retrieval"] == manifest["counts"]["test-twins"] - 12 - 1


@pytest.mark.filterwarnings("ignore:WebDataset")
def test_clip_benchmark_reads_every_set(world: World, manifest: dict[str, Any]):
    for path in sorted(world.eval_root.iterdir()):
        dataset = build_wds_dataset(path.name, pil_to_tensor, split="test", data_dir=str(path))
        assert sum(len(images) for images, _ in dataset.batched(16)) == manifest["counts"][f"set {path.name}"]


def test_authors_and_licences_stand_beside_the_data(world: World, manifest: dict[str, Any]):
    text = (world.eval_root.parent / "ATTRIBUTION.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(LICENSED)
    for prefix in LICENSED:
        (row,) = [row for row in rows if row.startswith(f"| {prefix} |")]
        assert f"| Family {prefix} | Author \\| of {prefix} | MIT | https://example.org/{prefix} |" in row
    assert "paid" not in text
    assert "ATTRIBUTION.md" in manifest["files"]


def test_the_manifest_names_every_file(world: World, manifest: dict[str, Any]):
    folder = world.eval_root.parent
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert world.sha256 == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert json.dumps(manifest, indent=1, sort_keys=True) + "\n" == (folder / "manifest.json").read_text()
