"""Worlds: small image-text data sets that are built on the spot, each with evaluation sets of its own.

    world = load_world("digits", seed=0)         # built once into the cache, checked at every load
    world.train_shards                           # webdataset tars: KEY.png + KEY.txt with captions, one a line
    world.eval_root                              # evaluation sets, see upcycle_bench.data.evalset

A world is a folder: `train/*.tar`, `eval/NAME/...` and `manifest.json` (what it is, counts, sha256 of every file).
"""

from __future__ import annotations

from upcycle_bench.data.world import World
from upcycle_bench.util.errors import unknown
from upcycle_bench.util.progress import Reporter


def load_world(name: str, seed: int, reporter: Reporter | None = None) -> World:
    """The world of that name, built first if it is not in the cache; `seed` draws its splits."""
    from upcycle_bench.data.worlds import digits, fashion, lab

    built = {"digits": digits.load, "lab": lab.load, "fashion-mnist": fashion.load}
    if name not in built:
        raise unknown("world", name, built)
    return built[name](seed, reporter or Reporter())


def training_groups(world: World) -> list[str] | None:
    """What every training pair belongs to, in the order of the shards: the lab's groups, the digits' classes.

    None for local data, of which nobody told us.
    """
    from upcycle_bench.data.worlds import digits, lab

    built = {"digits": digits.groups, "lab": lab.groups}
    return built[world.name](world.eval_root.parent) if world.name in built else None
