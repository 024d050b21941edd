"""The world of a user's own data, or of random pairs, which stand in for them.

world = local_world("train/{000..127}.tar", Path("sets"), protocol.data, reporter)      # --data, --eval-data
"""

from __future__ import annotations

from pathlib import Path

from upcycle_bench.data.open_index import open_index
from upcycle_bench.data.sources import expand_sources
from upcycle_bench.data.world import SYNTHETIC, World
from upcycle_bench.protocol import Data
from upcycle_bench.util.progress import Reporter


def local_world(text: str, eval_root: Path, settings: Data, reporter: Reporter | None = None) -> World:
    """The shards that `text` names, indexed first if they are not; UserError for bad ones."""
    captions = settings.captions_of_shards
    if text == SYNTHETIC:
        return World(SYNTHETIC, (), eval_root, SYNTHETIC, captions)
    sources = expand_sources(text)
    index = open_index(sources, "--data", reporter, bad_samples=settings.bad_samples)
    return World("local", sources.shards, eval_root, index.identity, captions, index)
