"""Sets as other tools and accidents leave them: `data check`, the evaluation and the probes agree on each.

Each row of the tables changes a valid set. All three read it to the same samples, or all refuse it in one line.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from upcycle_bench.data import evalset, evalset_check, evalset_write, labelled
from upcycle_bench.evaluation import small_sets
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

LABELS = [0, 2, 1, 2]
CLASSES = ("cat", "dog", "émeu")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
PNGS = [evalset_write.png(Image.fromarray(pixels)) for pixels in PIXELS]

Files = Iterable[tuple[str, bytes | str]]
Change = Callable[[Path], object]


def files(key: str = "{}", image: str = "png", label: str = "cls", value: str = "{}") -> list[tuple[str, bytes]]:
    """The members of a shard: of sample n the image `key`.`image` and the label `value`, where {} is n or the label."""
    return [
        member
        for place, (png, number) in enumerate(zip(PNGS, LABELS, strict=True))
        for member in (
            (f"{key.format(place)}.{image}", png),
            (f"{key.format(place)}.{label}", value.format(number).encode()),
        )
    ]


def renumbered(members: Files, less: int) -> Files:
    """Members of samples whose keys are numbers, with lower ones."""
    return [(f"{int(name[0]) - less}{name[1:]}", data) for name, data in members]


def tar(members: Files, format: int = tarfile.GNU_FORMAT, extra: Iterable[tarfile.TarInfo] = ()) -> bytes:
    """An archive of these members; a name in place of a content makes a hard link to it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info in extra:
            archive.addfile(info)
        for name, content in members:
            if isinstance(content, str):
                archive.addfile(link(name, content, tarfile.LNKTYPE))
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def shard(members: Files, **how: object) -> Change:
    """The only shard is one of these members."""
    return content(tar(members, **how))  # type: ignore[arg-type]


def content(data: bytes, name: str = "test/0.tar") -> Change:
    """A file of the set holds these bytes."""
    return lambda folder: (folder / name).write_bytes(data)


def text(name: str, data: str | bytes) -> Change:
    return content(data if isinstance(data, bytes) else data.encode(), name)


def every_text(change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        for path in folder.rglob("*.txt"):
            path.write_bytes(change(path.read_bytes()))

    return apply


def shards_named(*names: str) -> Change:
    """The samples stand in two shards of these names."""

    def apply(folder: Path) -> None:
        (folder / "test" / "0.tar").unlink()
        for name, members in zip(names, (files()[:4], files()[4:]), strict=True):
            (folder / "test" / name).write_bytes(tar(members))
        (folder / "test" / "nshards.txt").write_text("2\n")

    return apply


def moved_and_linked(name: str) -> Change:
    """A part of the set stands elsewhere, and a symbolic link leads there."""

    def apply(folder: Path) -> None:
        elsewhere = folder.parent.parent / "elsewhere"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return apply


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


FOLDER = tarfile.TarInfo("images")
FOLDER.type = tarfile.DIRTYPE

READ = {
    "as written": lambda folder: None,
    "upper-case suffixes": shard(files(image="PNG", label="CLS")),
    "another suffix for the same image": shard(files(image="JPEG")),
    "CR LF in texts": every_text(lambda data: data.replace(b"\n", b"\r\n")),
    "CR LF in labels": shard(files(value="{}\r\n")),
    "a space and a line end in labels": shard(files(value=" {}\n")),
    "byte order marks": both(every_text(lambda data: b"\xef\xbb\xbf" + data), shard(files(value="\ufeff{}"))),
    "empty lines at the end": every_text(lambda data: data + b"\n \n\n"),
    "no line end at the end": every_text(bytes.rstrip),
    "./ before names": shard(files("./{}")),
    "hard links, as tar writes them (mxmlnkn/ratarmount 28)": shard(
        [(".a.png", PNGS[0]), ("0.png", ".a.png"), *files()[1:]]
    ),
    "names in folders": shard(files("images/a.b/{}"), extra=[FOLDER]),
    "names of 300 characters, GNU": shard(files("n" * 300 + "{}")),
    "names of 300 characters, PAX": shard(files("n" * 300 + "{}"), format=tarfile.PAX_FORMAT),
    "names with umlauts, PAX": shard(files("ü{}"), format=tarfile.PAX_FORMAT),
    "names of 200 characters, ustar": shard(files("f" * 90 + "/" + "n" * 90 + "{}"), format=tarfile.USTAR_FORMAT),
    "files beside the samples": shard(
        [*((name, b"x") for name in ("readme.md", "LICENSE", ".DS_Store", "._0.png", "__meta__/a.json")), *files()]
    ),
    "files beside an image": shard([*files()[:2], ("0.json", b"{"), ("0.txt", b"\xff"), *files()[2:]]),
    "0-padded shards": shards_named("00000.tar", "00001.tar"),
    "shards with a word": shards_named("shard-000000.tar", "shard-000001.tar"),
    "shards from 1": shards_named("1.tar", "2.tar"),
    "keys that begin anew in each shard": both(
        shards_named("0.tar", "1.tar"), content(tar(renumbered(files()[4:], 2)), "test/1.tar")
    ),
    "the next shard begins with the last key": both(
        shards_named("0.tar", "1.tar"), content(tar(renumbered(files()[4:], 1)), "test/1.tar")
    ),
    "Finder's files beside shards": text("test/._0.tar", b"x"),
    "a linked shard": moved_and_linked("test/0.tar"),
    "a linked split": moved_and_linked("test"),
    "a linked list of classes": moved_and_linked("classnames.txt"),
    "a kind in capitals": text("dataset_type.txt", "Classification \n"),
}

# What is changed, and what all three say. `data check` may say more.
REFUSED: dict[str, tuple[Change, str]] = {
    "a label 3.0": (shard(files(value="{}.0")), r"0: \.cls is no class index"),
    "a label 1_0": (shard(files(value="0_{}")), r"0: \.cls is no class index"),
    "a negative label": (shard(files(value="-{}")), r"1: its class index is not one of 0 \.\.\. 2"),
    "a label out of range": (shard(files(value="1{}")), r"0: its class index is not one of 0 \.\.\. 2"),
    "a label of thousands of digits": (shard(files(value="9" * 5000 + "{}")), r"0: \.cls is no class index"),
    "an empty label": (shard(files(value="")), r"0: \.cls is no class index"),
    "a word as label": (shard(files(value="cat")), r"0: \.cls is no class index"),
    "a label that is no text": (shard([("0.png", PNGS[0]), ("0.cls", b"\xff\xfe")]), r"0: \.cls is not UTF-8"),
    "labels as arrays": (shard(files(label="npy")), r"0: no \.cls, which holds the class index"),
    "labels as JSON": (shard(files(label="json", value='{{"label": {}}}')), r"0: no \.cls, which holds the class"),
    "a missing label": (shard(files()[:-1]), r"3: no \.cls, which holds the class index"),
    "a missing image": (shard(files()[1:]), r"0: no image \(webp, png, jpg, jpeg\)"),
    "an image of another format": (shard(files(image="bmp")), r"0: no image \(webp, png, jpg, jpeg\)"),
    "links for images": (
        shard([("0.cls", b"0")], extra=[link("0.png", "elsewhere.png")]),
        r"0: no image \(webp, png, jpg, jpeg\)",
    ),
    "a hard link to nothing": (
        shard([("0.png", "elsewhere.png"), *files()[1:]]),
        r"'0\.png' is a link to 'elsewhere\.png', which does not stand before it; pack it with tar's --hard-deref",
    ),
    "a cut image": (shard([("0.png", PNGS[0][:90]), *files()[1:]]), r"0\.tar: .*image .*read"),
    "an image with a broken header": (
        shard([("0.png", PNGS[0].replace(b"IHDR", b"IHDX")), *files()[1:]]),
        r"0\.tar: .*image .*read",
    ),
    "an empty image": (shard([("0.png", b""), *files()[1:]]), r"0\.tar: .*image .*read"),
    "a sample twice": (shard([*files(), *files()[:2]]), "1 samples have the name of an earlier one"),
    "samples that are torn apart": (shard(sorted(files(), key=lambda each: each[0][2:])), "do not stand side by side"),
    "no shard but gzip": (content(gzip.compress(tar(files()))), "compressed with gzip"),
    "no shard but a pointer": (content(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "no shard but a web page": (content(b"<!DOCTYPE html><html>"), "a web page"),
    "no shard but nothing": (content(b""), r"empty \(0 bytes\)"),
    "no shard but zeros": (content(bytes(1 << 15)), "only zeros"),
    "a shard without samples": (shard([]), "test holds no samples"),
    "a shard that is cut at a header": (content(tar(files())[: 4 * 512]), "it is cut at byte 2,048, at a header"),
    "a shard that is cut in a file": (content(tar(files())[: 5 * 512 - 9]), "it is cut at byte"),
    "only a train split": (lambda folder: (folder / "test").rename(folder / "train"), "no test split|not found: ab"),
    "no nshards.txt": (lambda folder: (folder / "test/nshards.txt").unlink(), r"test/nshards\.txt is missing; .* 1 it"),
    "a number of shards that is a word": (text("test/nshards.txt", "two"), "must hold the number of shards, not 'two'"),
    "no shards": (text("test/nshards.txt", "0"), "must hold the number of shards, not '0'"),
    "a superscript number of shards": (text("test/nshards.txt", "²"), "must hold the number of shards, not '²'"),
    "a missing shard": (text("test/nshards.txt", "2"), r"1\.tar missing in .*counts 2 shards"),
    "thousands of missing shards": (text("test/nshards.txt", "9" * 9), r"1\.tar, 2\.tar, 3\.tar missing"),
    "a gap in the shards": (shards_named("0.tar", "2.tar"), r"1\.tar missing .*it holds 2\.tar"),
    "shards of two names": (shards_named("a-0.tar", "b-1.tar"), r"1\.tar missing .*it holds a-0\.tar, b-1\.tar"),
    "a shard that is not counted": (text("test/1.tar", b""), r"test holds 1\.tar, but its nshards\.txt counts 1"),
    "a link to nowhere": (
        both(moved_and_linked("test/0.tar"), lambda folder: (folder.parent.parent / "elsewhere").unlink()),
        r"0\.tar missing",
    ),
    "a line separator in a class": (text("classnames.txt", "cat\nd\u2028og\nemu"), "line 2 holds a line separator"),
    "an empty class": (text("classnames.txt", "cat\n\nemu\n"), r"classnames\.txt has empty lines"),
    "classes of Windows": (text("classnames.txt", "cat\ndog\nemu\n".encode("utf-16")), r"classnames\.txt is not UTF-8"),
    "no classes": (lambda folder: (folder / "classnames.txt").unlink(), r"classnames\.txt is missing"),
    "an empty list of classes": (text("classnames.txt", "\n"), r"classnames\.txt is empty"),
    "fewer classes than labels": (text("classnames.txt", "cat\ndog"), r"1: its class index is not one of 0 \.\.\. 1"),
    "no templates": (
        lambda folder: (folder / "zeroshot_classification_templates.txt").unlink(),
        r"zeroshot_classification_templates\.txt is missing",
    ),
    "a template without a class": (
        text("zeroshot_classification_templates.txt", "{c}\na photo\n{d}"),
        r"'a photo', '\{d\}' do not hold \{c\}",
    ),
    "a kind that there is not": (text("dataset_type.txt", "video"), "says 'video'; it must say one of classification"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid set in a folder of its own."""
    path = tmp_path / "sets" / "ab"
    samples = zip(map(Image.fromarray, PIXELS), LABELS, strict=True)
    evalset_write.write_classification(path, samples, CLASSES, ("a photo of a {c}", "{c}"))
    (path / "test" / "0.tar").write_bytes(tar(files()))
    return path


def read(folder: Path) -> tuple[list[int], np.ndarray]:
    """Labels and pixels, as an evaluation reads them."""
    opened = evalset.read(folder, pil_to_tensor, batch_size=3)
    batches = list(opened.batches)
    assert opened.classnames == CLASSES and opened.templates == ("a photo of a {c}", "{c}")
    return [int(each) for _, labels in batches for each in labels], np.concatenate([images for images, _ in batches])


def probed(folder: Path) -> tuple[list[int], np.ndarray]:
    """Labels and pixels, as fine-tuning reads them, which asks for the classes beside."""
    assert evalset.templates(folder)
    batches = list(labelled.index(folder, "test").batches(pil_to_tensor, 3))
    return [int(each) for _, labels in batches for each in labels], np.concatenate([images for images, _ in batches])


@pytest.mark.parametrize("change", READ.values(), ids=READ)
def test_what_other_tools_write_is_read_to_the_same_samples(folder: Path, change: Change) -> None:
    change(folder)
    report = evalset_check.check(folder)
    assert report.problems == []
    assert report.samples == {"test": 4} and (report.classes, report.templates) == (3, 2)
    for labels, pixels in (read(folder), probed(folder)):
        assert labels == LABELS
        np.testing.assert_array_equal(pixels.transpose(0, 2, 3, 1), PIXELS)


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_scored_is_one_line_of_all_three(folder: Path, change: Change, message: str) -> None:
    change(folder)
    first, *_ = problems = evalset_check.check(folder).problems
    assert problems == evalset_check.faults(folder, "test")
    with pytest.raises(UserError, match=message) as scored:
        read(folder)
    with pytest.raises(UserError, match=message) as tuned:
        probed(folder)
    for said in (first, str(scored.value), str(tuned.value)):
        assert "\n" not in said and len(said) < 400
    assert re.search(message, first)


def test_a_linked_set_is_the_set(folder: Path) -> None:
    other = folder.parent / "linked"
    other.symlink_to(folder)
    assert evalset_check.find(folder.parent) == [folder, other]
    assert evalset_check.check(other).problems == []
    assert read(other)[0] == LABELS and evalset.digest(other) == evalset.digest(folder)


def test_a_control_takes_the_same_samples(folder: Path) -> None:
    samples = ([(f"./{n}.PNG", PNGS[0]), (f"./{n}.CLS", f"{n % 2}\r\n".encode())] for n in range(64))
    members = [member for sample in samples for member in sample]
    (folder / "test" / "0.tar").write_bytes(tar(members))
    small = small_sets.take(folder, Stream(("test",)))
    assert small.images == [{"png": PNGS[0]}] * 64 and small.classes == CLASSES[:2]
    assert small.values == [b"0", b"1"] * 32 and small.templates == ("a photo of a {c}",)


def test_a_path_has_no_special_characters(folder: Path) -> None:
    """webdataset expanded braces and split at :: in whole paths (webdataset/webdataset 381)."""
    odd = folder.parent / "{0..1}, a::b [c] *" / "{00..01} ::set,"
    odd.parent.mkdir()
    folder.rename(odd)
    assert evalset_check.find(odd.parent) == [odd] == evalset_check.find(odd)
    assert evalset_check.check(odd).problems == [] == evalset_check.faults(odd, "test")
    assert read(odd)[0] == LABELS == probed(odd)[0] and evalset.digest(odd)
