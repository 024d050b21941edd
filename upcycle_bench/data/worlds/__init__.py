"""Worlds: small image-text data sets that are built on this machine, each with its own evaluation sets.

    world = load_world("digits", seed=0)         # built once into the cache, checked at every load
    world.train_shards                           # webdataset tars: KEY.png + KEY.txt with captions, one a line
    world.eval_root                              # evaluation sets, see upcycle_bench/data/evalset.py

A world is a folder: `train/*.tar`, `eval/NAME/...` and `manifest.json` (name, version, counts, sha256 of every file).
"""

from __future__ import annotations

from upcycle_bench.data.world import World
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import unknown
from upcycle_bench.util.progress import Reporter


def load_world(name: str, seed: int, reporter: Reporter | None = None) -> World:
    """The world of that name, built first if it is not in the cache; `seed` draws its splits.

    Raises UserError for an unknown name, for a world that cannot be built here, or for a changed file in the cache.
    """
    from upcycle_bench.data.worlds import digits, fashion, lab  # here, so that a command without a world starts faster

    built = {"digits": digits.load, "lab": lab.load, "fashion-mnist": fashion.load}
    if name not in built:
        raise unknown("world", name, built)
    return built[name](seed, reporter or Reporter())


def built_world(name: str, seed: int) -> World | None:
    """The world of that name if the cache has it; nothing is built. UserError for a changed file in the cache."""
    from upcycle_bench.data.worlds import digits, fashion, lab

    folders = {
        "digits": f"digits-{digits.VERSION}-seed{seed}",
        "lab": f"lab-{lab.VERSION}",
        "fashion-mnist": f"fashion-mnist-{fashion.VERSION}",
    }
    here = name in folders and (cache_root() / "worlds" / folders[name]).is_dir()
    return load_world(name, seed) if here else None


def training_groups(world: World) -> list[str] | None:
    """The group of every training pair, in the order of the shards: in the lab its group, in digits its class.

    None for local data, whose groups are not known.
    """
    from upcycle_bench.data.worlds import digits, lab

    built = {"digits": digits.groups, "lab": lab.groups}
    return built[world.name](world.eval_root.parent) if world.name in built else None
