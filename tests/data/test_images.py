"""Images that Pillow reads in part, wrongly, at any price or with odd errors: one line wherever they are read.

Each row is from a public report: `convert("RGB")` makes 16 bits white (python-pillow/Pillow 2574, 5991); one thin image
takes all memory when it is resized (nagadomi/nunif 256, openai/CLIP 215); errors that are no OSError; transparency that
hides a drawing (mlfoundations/open_clip 801, openai/CLIP 422).
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.transforms.functional import pil_to_tensor

from tests.data.test_odd_sets import tar
from upcycle_bench.cli import app
from upcycle_bench.data import evalset, evalset_check, evalset_write, images, labelled
from upcycle_bench.data.bad_samples import Bad
from upcycle_bench.data.images import BadImage, rgb, without_alpha
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

NOISE = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
GREY16 = np.array([[0, 255, 4000], [256, 65535, 9]], dtype=np.uint16)
ALPHA = np.dstack([NOISE, np.eye(6, dtype=np.uint8) * 255])


def file(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)  # type: ignore[arg-type]
    return buffer.getvalue()


def long_text() -> PngImagePlugin.PngInfo:
    """A zipped text of 2 MiB, which Pillow does not unpack."""
    info = PngImagePlugin.PngInfo()
    info.add_text("made", "x" * (2 << 20), zip=True)
    return info


def without_chunk() -> bytes:
    """A PNG whose second chunk of pixels has no name; Pillow raises SyntaxError."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress(bytes(181 * 60), 0)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60, 60, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels[:5000]) + b"\0\0\x10\0\1\2\3\4" + pixels[5000:]


# What is refused -> the file, what an evaluation set says, and what a training says.
REFUSED: dict[str, tuple[bytes, str, str]] = {
    "16-bit grey": (file(Image.fromarray(GREY16)), images.DEEP, f"it {images.DEEP}"),
    "integers": (file(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), images.DEEP, f"it {images.DEEP}"),
    "floats": (file(Image.fromarray(np.eye(3, dtype=np.float32)), "TIFF"), images.DEEP, f"it {images.DEEP}"),
    "a line": (file(Image.new("RGB", (1, 60_000))), images.WIDE, f"it {images.WIDE}"),
    "a row": (file(Image.new("RGB", (60_000, 1))), images.WIDE, f"it {images.WIDE}"),
    "a bomb": (file(Image.new("1", (14_000, 14_000))), images.HUGE, f"it {images.HUGE}"),
    "a long text": (
        file(Image.new("RGB", (6, 6)), pnginfo=long_text()),
        images.UNREADABLE,
        "Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK",
    ),
    "a broken chunk": (without_chunk(), images.UNREADABLE, "broken PNG file (chunk b'\\x01\\x02\\x03\\x04')"),
    "no image": (b"GIF87a", images.UNREADABLE, "cannot identify image file"),
}
# What RGB shows, as open_clip and CLIP_benchmark read it.
READ = {
    "colours": file(Image.fromarray(NOISE)),
    "16-bit grey of 8 bits": file(Image.fromarray(GREY16 % 256)),
    "transparency": file(Image.fromarray(ALPHA)),
    "a palette": file(Image.fromarray(NOISE).quantize(8), transparency=0),
    "grey with transparency": file(Image.fromarray(NOISE).convert("LA")),
    "black and white": file(Image.fromarray(NOISE).convert("1")),
    "CMYK": file(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    "the thinnest": file(Image.new("RGB", (1000, 1))),
}


@pytest.fixture(scope="module")
def clip() -> Clip:
    return create_clip("smoke-vit")


def shard(path: Path, *contents: bytes, label: str = "cls") -> Path:
    """Samples 0, 1, ... of class 0, or with the caption 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = [(f"{n}.{suffix}", data) for n, content in enumerate(contents) for suffix, data in
               (("png", content), (label, b"0"))]  # fmt: skip
    path.write_bytes(tar(members))
    return path


def evaluation_set(folder: Path, *contents: bytes) -> Path:
    evalset_write.write_classification(folder, [(Image.fromarray(NOISE), 0)], ("a", "b"), ("{c}",))
    shard(folder / "test" / "0.tar", *contents)
    return folder


@pytest.mark.parametrize(("content", "fault", "why"), REFUSED.values(), ids=REFUSED)
def test_a_refused_image_is_one_line_everywhere(
    tmp_path: Path, clip: Clip, content: bytes, fault: str, why: str
) -> None:
    """Checks, evaluation, probes and calibration name shard and sample; a training reads another one."""
    folder = evaluation_set(tmp_path / "ab", READ["colours"], content)
    line = f"test/0.tar: 1: its .png {fault}"
    assert evalset_check.check(folder).problems == [f"{line}."]
    with pytest.raises(UserError) as scored:
        list(evalset.read(folder, pil_to_tensor, 1).batches)
    assert str(scored.value) == f"evaluation set ab: {line}; `upcycle-bench data check` says what else is wrong."
    with pytest.raises(UserError) as probed:
        list(labelled.index(folder, "test").batches(pil_to_tensor, 1))
    assert f"test/0.tar: the image at byte 2560 (1.png) cannot be read ({why}); `upcycle-bench" in str(probed.value)

    path = shard(tmp_path / "train.tar", READ["colours"], content, label="txt")
    kind = {
        images.DEEP: "more than 8 bits",
        images.WIDE: "odd shape",
        images.HUGE: "too many pixels",
        images.UNREADABLE: "unreadable image",
    }[fault]
    for augmentation in ("none", "random-resized-crop"):
        pairs = PairDataset([path], clip, augmentation, keep_decoded=False)
        batch = pairs.batch(0, 0, 2)
        assert (batch.index.tolist(), batch.bad) == ([0, 0], (Bad(1, kind, "train.tar", "1"),))
        with pytest.raises(UserError, match=rf"1 of 2 samples are bad, .* {kind} \(1, the first is train\.tar: 1\)"):
            list(pairs.calibration(Stream(("test",)), 2, 2))


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_an_image_has_the_pixels_of_plain_conversion(content: bytes) -> None:
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert rgb(content).tobytes() == expected.tobytes() and rgb(content).size == expected.size


def test_sixteen_bits_would_be_white() -> None:
    """The reason of the row above: without a refusal, three of its four values above 8 bits are 255."""
    plain = np.asarray(Image.open(io.BytesIO(REFUSED["16-bit grey"][0])).convert("RGB"))[..., 0]
    assert plain.tolist() == [[0, 255, 255], [255, 255, 9]]


def test_the_thinnest_image_that_is_read_is_resized(clip: Clip) -> None:
    assert clip.resize(rgb(READ["the thinnest"])).shape[0] == 3


def test_a_large_image_is_read_without_a_word() -> None:
    """Above its first limit Pillow warns, in two lines; above its second, twice as high, it raises."""
    code = (
        "import io\nfrom PIL import Image\nfrom upcycle_bench.data.images import BadImage, rgb\n"
        "Image.MAX_IMAGE_PIXELS = 100\n"
        "def png(side):\n    image = io.BytesIO()\n    Image.new('L', (side, side)).save(image, 'PNG')\n"
        "    return image.getvalue()\n"
        "rgb(png(12))\n"
        "try:\n    rgb(png(15))\nexcept BadImage as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{images.HUGE}\n", "")


@pytest.mark.parametrize(
    ("pixels", "left"),
    [
        (np.dstack([NOISE, np.full((6, 6), 255, np.uint8)]), None),  # an alpha of which nothing is transparent
        (ALPHA, "drawing"),
        (np.dstack([np.zeros((6, 6, 3), np.uint8), np.eye(6, dtype=np.uint8) * 255]), "one colour"),  # black on nothing
        (NOISE, None),
    ],
)
def test_what_transparency_hides(pixels: np.ndarray, left: str | None) -> None:
    content = file(Image.fromarray(pixels))
    assert without_alpha(content, rgb(content)) == left
    if left == "drawing":
        assert without_alpha(READ["a palette"], rgb(READ["a palette"])) == "drawing"


def test_transparency_is_a_note_and_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = np.dstack([np.zeros((6, 6, 3), np.uint8), np.eye(6, dtype=np.uint8) * 255])
    folder = evaluation_set(tmp_path / "icons", READ["colours"], READ["transparency"], file(Image.fromarray(drawing)))
    note = (
        "test: transparent pixels in 2 of its images, which are read without transparency, as by CLIP_benchmark; "
        "then 1 are one colour, such as test/0.tar: 2."
    )
    app(["data", "check", str(folder)], standalone_mode=False)
    assert f"icons: note: {note}\n" in capsys.readouterr().out
    app(["data", "check", str(folder), "--json"], standalone_mode=False)
    (report,) = json.loads(capsys.readouterr().out)["sets"]
    assert (report["notes"], report["problems"]) == ([note], [])
    ((pixels, _),) = evalset.read(folder, pil_to_tensor, 3).batches
    assert torch.equal(pixels[1], torch.from_numpy(NOISE).permute(2, 0, 1))


def test_names_of_several_classes_are_a_note(tmp_path: Path) -> None:
    """As in the published classes of ImageNet (LAION-AI/CLIP_benchmark 124, mlfoundations/open_clip 917)."""
    names = ("plane", "missile", "missile", "sunglasses", "dog", "sunglasses")
    evalset_write.write_classification(tmp_path / "ab", [(Image.fromarray(NOISE), 0)], names, ("{c}",))
    report = evalset_check.check(tmp_path / "ab")
    assert report.problems == [] and report.notes == [
        "'missile' is the name of classes 1 and 2, 'sunglasses' is the name of classes 3 and 5: the first of them "
        "wins, so that acc1 of the later ones is 0 by construction."
    ]
    evalset_write.write_classification(tmp_path / "ab", [(Image.fromarray(NOISE), 0)], "aabbccddeef", ("{c}",))
    (note,) = evalset_check.check(tmp_path / "ab").notes
    assert note.count("is the name of") == 3 and "(and 2 more names)" in note


def test_a_refusal_has_its_kind_and_its_reason() -> None:
    with pytest.raises(BadImage) as caught:
        rgb(b"")
    assert caught.value.fault == images.UNREADABLE and caught.value.why == "cannot identify image file"
