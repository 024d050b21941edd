"""Icon families made up for tests, and the npm tarball that would carry them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 24  # pixels of the page our icons are drawn on


def document(prefix: str, icons: Mapping[str, str | Mapping[str, Any]], licence: str = "MIT", **more: Any) -> dict:
    """A family's document as Iconify writes it; `icons` maps names to bodies or to entries with sizes of their own."""
    return {
        "prefix": prefix,
        "info": {
            "name": f"Family {prefix}",
            "author": {"name": f"Author | of {prefix}", "url": f"https://example.org/{prefix}"},
            "license": {"title": licence, "spdx": licence},
        },
        "icons": {name: {"body": icon} if isinstance(icon, str) else dict(icon) for name, icon in icons.items()},
        "width": PAGE,
        "height": PAGE,
        **more,
    }


def write_tarball(path: Path, documents: Sequence[Mapping[str, Any]]) -> Path:
    """package/json/PREFIX.json of each, among files that are none of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {"package/package.json": b"{}", "package/readme.md": b"# not JSON"}
    files |= {f"package/json/{family['prefix']}.json": json.dumps(family).encode() for family in documents}
    files["package/dist/index.js"] = b"not JSON"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def drawing(*key: int, fill: str = "currentColor", moved: float = 0.0) -> str:
    """A drawing of its own for each key: squares on a grid of six by six; `moved` shifts it to the right."""
    rng = np.random.default_rng(key)
    cells = rng.permutation(36)[: rng.integers(8, 20)]
    path = "".join(f"M{4 * (cell % 6) + moved:g} {4 * (cell // 6)}h4v4h-4z" for cell in cells.tolist())
    return f'<path fill="{fill}" d="{path}"/>'
