"""`data check` counts what valid sets hold, and gives one line for each fault of the others."""

import json
import re
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from typer.testing import CliRunner

from upcycle_bench.cli import app
from upcycle_bench.data import evalset, evalset_check, evalset_write
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError


def pictures(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


PNG = evalset_write.png(pictures(1)[0])


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """A classification set with both splits, and a retrieval set."""
    root = tmp_path / "sets"
    for split, labels in (("train", [0, 1] * 4), ("test", [0, 1, 1, 1])):
        samples = zip(pictures(len(labels)), labels, strict=True)
        evalset_write.write_classification(root / "ab", samples, ("a", "b"), ("{c}", "a {c}"), split=split)
    evalset_write.write_retrieval(root / "words", [(picture, ["one", "two"]) for picture in pictures(3)])
    return root


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def test_valid_sets_are_counted(sets: Path) -> None:
    (sets / ".hidden").mkdir()
    result = CliRunner().invoke(app, ["data", "check", str(sets)], catch_exceptions=False)
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert "ab classification yes 4 samples in test; 8 samples in train; 2 classes, the rarest with" in text
    assert "words retrieval yes 3 samples in test; 6 captions" in text
    result = CliRunner().invoke(app, ["data", "check", str(sets / "ab"), "--json"], catch_exceptions=False)
    (facts,) = json.loads(result.stdout)["sets"]
    assert facts == {
        "name": "ab",
        "kind": "classification",
        "samples": {"test": 4, "train": 8},
        "classes": 2,
        "templates": 2,
        "rarest": {"test": 1, "train": 4},
        "captions": 0,
        "problems": [],
        "notes": [],
    }


def test_a_class_without_samples_is_the_rarest(tmp_path: Path) -> None:
    evalset_write.write_classification(tmp_path / "ab", zip(pictures(2), [0, 0], strict=True), ("a", "b"), ("{c}",))
    assert evalset_check.check(tmp_path / "ab").rarest == {"test": 0}


def test_one_bad_set_is_status_1_and_named(sets: Path) -> None:
    (sets / "ab" / "classnames.txt").unlink()
    (sets / "empty").mkdir()
    result = CliRunner().invoke(app, ["data", "check", str(sets)], catch_exceptions=False)
    assert result.exit_code == 1
    assert [line for line in result.stdout.splitlines() if re.match(r"\w+: ", line)] == [
        "ab: classnames.txt is missing; copy the set again.",
        "empty: it has no test split (test/nshards.txt, test/0.tar, ...), which is what is scored.",
    ]


def test_a_folder_without_sets_is_no_input(sets: Path, tmp_path: Path) -> None:
    for folder, message in ((sets / "ab" / "test", "holds none"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(UserError, match=message):
            evalset_check.find(folder)


@pytest.mark.parametrize(
    ("members", "problems"),
    [
        ({"x.png": PNG}, ["test/0.tar: x: no .cls, which holds the class index."]),
        ({"x.cls": b"0"}, ["test/0.tar: x: no image (webp, png, jpg, jpeg)."]),
        (
            {"x.png": PNG, "x.cls": b"2"},
            ["test/0.tar: x: its class index is not one of 0 ... 1, which classnames.txt names."],
        ),
        (
            {"x.png": PNG, "x.cls": b"-1"},
            ["test/0.tar: x: its class index is not one of 0 ... 1, which classnames.txt names."],
        ),
        ({"x.png": PNG, "x.cls": b"cat"}, ["test/0.tar: x: .cls is no class index."]),
        ({"x.jpg": PNG[:90], "x.cls": b"0"}, ["test/0.tar: x: its .jpg is no image that can be read."]),
        (
            {"x.png": PNG, "y.cls": b"0", "d/z.png": PNG},  # neighbours, but no pair
            [
                "test/0.tar: x: no .cls, which holds the class index (2 samples alike).",
                "test/0.tar: y: no image (webp, png, jpg, jpeg).",
            ],
        ),
        ({}, ["test holds no samples."]),
        ({"x.JPG": PNG, "x.cls": b" 1\n", "x.json": b"{}", ".DS_Store": b""}, []),
    ],
)
def test_bad_samples(sets: Path, members: dict[str, bytes], problems: list[str]) -> None:
    shard(sets / "ab" / "test" / "0.tar", members)
    assert evalset_check.check(sets / "ab").problems == problems
    if not problems:  # and so it is read
        ((images, labels),) = evalset.read(sets / "ab", pil_to_tensor, batch_size=4).batches
        assert (images.shape, list(labels)) == ((1, 3, 6, 6), [1])


def npy(values: object) -> bytes:
    buffer = BytesIO()
    np.save(buffer, np.asarray(values))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("vector", "problem"),
    [
        (npy([0, 1, 1]), ""),
        (npy([0.0, 0.0, 0.0]), ""),  # none of the classes: as in CLIP_benchmark, which writes floats
        (None, "no .npy, which holds a 0 or 1 for each class"),
        (b"1", ".npy is no NumPy array"),
        (npy([0, 1]), "its .npy does not hold a 0 or 1 for each of the 3 classes of classnames.txt"),
        (npy([[0, 1, 1]]), "its .npy does not hold a 0 or 1 for each of the 3 classes of classnames.txt"),
        (npy([0, 2, 1]), "its .npy does not hold a 0 or 1 for each of the 3 classes of classnames.txt"),
        (npy(["a", "b", "c"]), "its .npy does not hold a 0 or 1 for each of the 3 classes of classnames.txt"),
    ],
)
def test_multilabel_vectors(tmp_path: Path, vector: bytes | None, problem: str) -> None:
    samples = zip(pictures(3), [(0, 1), (1, 2), ()], strict=True)
    evalset_write.write_multilabel(tmp_path / "many", samples, ("a", "b", "c"), ("{c}",))
    report = evalset_check.check(tmp_path / "many")
    assert (report.kind, report.samples, report.classes, report.rarest) == ("multilabel", {"test": 3}, 3, {"test": 1})
    assert report.problems == []
    members = {"x.png": PNG} | ({} if vector is None else {"x.npy": vector})
    shard(tmp_path / "many" / "test" / "0.tar", members)
    assert evalset_check.check(tmp_path / "many").problems == ([f"test/0.tar: x: {problem}."] if problem else [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no .txt, which holds captions, one a line"),
        (b"", "an empty caption, or none"),
        (b"one\n\ntwo", "an empty caption, or none"),
        (b"\xff", ".txt is not UTF-8"),
    ],
)
def test_bad_captions(sets: Path, text: bytes | None, problem: str) -> None:
    shard(sets / "words" / "test" / "0.tar", {"x.png": PNG} | ({} if text is None else {"x.txt": text}))
    assert evalset_check.check(sets / "words").problems == [f"test/0.tar: x: {problem}."]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("classnames.txt", None, r"classnames\.txt is missing"),
        ("classnames.txt", "a\n\nb\n", r"classnames\.txt has empty lines"),
        ("classnames.txt", b"\xff", r"classnames\.txt is not UTF-8"),
        ("zeroshot_classification_templates.txt", "", r"templates\.txt is empty"),
        ("zeroshot_classification_templates.txt", "{c}\na photo", r"'a photo' does not hold \{c\}"),
        ("zeroshot_classification_templates.txt", "{c} {d}", r"'\{c\} \{d\}' does not hold \{c\}"),
        ("dataset_type.txt", "video", "'video'; it must say one of classification, multilabel, retrieval"),
        ("strata.txt", "x\n", r"must hold a stratum .* 4 samples"),
        ("train/nshards.txt", None, r"train/nshards\.txt is missing"),
        ("test/nshards.txt", "two", "must hold the number of shards"),
        ("test/nshards.txt", "2", r"1\.tar missing"),
        ("test/1.tar", "", r"test holds 1\.tar, but its nshards\.txt counts 1"),
        ("test/0.tar", "no tar", r"test/0\.tar: it is not a readable tar file"),
        ("test/0.tar", "version https://git-lfs.github.com/spec/v1\n", r"test/0\.tar: it is a Git LFS pointer"),
    ],
)
def test_bad_files(sets: Path, name: str, text: str | bytes | None, problem: str) -> None:
    path = sets / "ab" / name
    path.unlink() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    first, *others = evalset_check.check(sets / "ab").problems
    assert re.search(problem, first)
    assert all(re.fullmatch(r"(test|train) holds no samples\.", other) for other in others)
    assert "\n" not in first


def test_a_shard_that_breaks_off(sets: Path) -> None:
    path = sets / "ab" / "test" / "0.tar"
    path.write_bytes(path.read_bytes()[:2000])
    problems = evalset_check.check(sets / "ab").problems
    assert problems[0].startswith("test/0.tar: it is cut at byte 2,000")


def test_what_is_scored_is_all_that_must_be_valid(sets: Path) -> None:
    (sets / "ab" / "train" / "nshards.txt").write_text("3")
    assert evalset_check.faults(sets / "ab", "test") == []
    problem, _ = evalset_check.faults(sets / "ab", "train")
    assert problem.startswith("1.tar, 2.tar missing in train, where nshards.txt counts 3 shards")
    assert evalset_check.faults(sets / "words", "train") == [
        "it has no train split (train/nshards.txt, train/0.tar, ...), which is what a probe learns from."
    ]


def test_a_set_is_read_once_and_again_when_it_changes(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = sets / "ab", []
    check = evalset_check.check
    monkeypatch.setattr(evalset_check, "check", lambda *given, **more: read.append(given) or check(*given, **more))
    shard(folder / "test" / "0.tar", {"x.png": PNG[:90], "x.cls": b"0"})
    for _ in range(2):
        assert evalset_check.faults(folder, "test") == ["test/0.tar: x: its .png is no image that can be read."]
    folder = folder.rename(sets / "elsewhere")
    assert len(evalset_check.faults(folder, "test")) == 1 == len(read)
    shard(folder / "test" / "0.tar", {"x.png": PNG, "x.cls": b"0"})
    assert evalset_check.faults(folder, "test") == [] and len(read) == 2
    (verdict,) = (cache_root() / "checked").glob(f"{evalset.digest(folder)}*.json")
    verdict.write_bytes(b"[")
    assert evalset_check.faults(folder, "test") == [] and len(read) == 3


def test_everything_that_is_wrong_is_said_at_once(sets: Path) -> None:
    folder = sets / "ab"
    (folder / "classnames.txt").unlink()
    (folder / "zeroshot_classification_templates.txt").write_text("a\nb\n")
    shard(folder / "test" / "0.tar", {"x.png": b"no", "x.cls": b"one"})
    (folder / "train" / "nshards.txt").write_text("3")
    assert len(evalset_check.check(folder).problems) == 6
