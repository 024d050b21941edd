"""The training pairs of a world, whatever it is made of.

pairs = training_pairs(world, clip, "random-resized-crop", protocol.data, Loading(workers=8))
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from upcycle_bench.data.bad_list import list_bad
from upcycle_bench.data.bad_samples import PASSING, Bad
from upcycle_bench.data.batches import Loading
from upcycle_bench.data.index import Index
from upcycle_bench.data.pairs import USUAL, PairDataset
from upcycle_bench.data.synthetic import SyntheticPairs
from upcycle_bench.data.world import SYNTHETIC, World
from upcycle_bench.model.clip import Clip
from upcycle_bench.protocol import Data
from upcycle_bench.util.errors import UserError


def training_pairs(
    world: World, clip: Clip, augmentation: str, settings: Data = USUAL, loading: Loading | None = None
) -> PairDataset:
    """The pairs, in the order of a protocol's `settings`. Of a user's own data it is said what is left out."""
    if world.name == SYNTHETIC:
        return SyntheticPairs(clip, settings)
    listing = _Listing()
    pairs = PairDataset(
        world.train_shards,
        clip,
        augmentation,
        captions=world.captions,
        option=world.option,
        settings=settings,
        loading=loading,
        index=world.index,
        on_bad=lambda bad: listing(pairs.index, bad) if world.option else None,
    )
    if world.option:
        pairs.say_left_out()
    return pairs


class _Listing:
    """Adds to an index's list what will be as bad the next time, unlike a disk's errors: so no batch changes.

    The list saves reading, so a training goes on without it, after one warning.
    """

    def __init__(self) -> None:
        self.works = True

    def __call__(self, index: Index, bad: Sequence[Bad]) -> None:
        entries = [(each.number, each.kind, each.key) for each in bad if each.kind not in PASSING]
        try:
            if self.works:
                list_bad(index, entries)
        except UserError as error:
            self.works = False
            print(f"warning: {error} The training goes on without it.", file=sys.stderr, flush=True)
