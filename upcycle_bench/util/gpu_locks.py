"""Which GPUs of this machine runs of ours use, so that another command with the same cache takes others.

    gpus = GpuLocks(visible_gpus())
    gpus.take(0)            # "2": one that is free, for the run in place 0; None on a machine without GPUs
    gpus.release(0)

A GPU goes by its name in CUDA_VISIBLE_DEVICES: commands that name one by its number and by its UUID share it unseen.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from upcycle_bench.util.cache import attempt, cache_root


class GpuLocks:
    """The locks of GPUs, each held while a run of ours is on it. UserError where the cache cannot be written."""

    def __init__(self, names: Sequence[str]) -> None:
        folder = cache_root() / "gpus" / socket.gethostname()
        self._locks = {name: attempt(folder / name) for name in names}
        self._held, self._used = set[str](), dict[int, str]()  # by place

    def __len__(self) -> int:
        return len(self._locks)

    def take(self, place: int) -> str | None:
        """A GPU that no other run has, the one of that place if it is free; where all are taken, one is shared."""
        if not self._locks:
            return None
        names = [*self._locks]
        names = names[(first := place % len(names)) :] + names[:first]
        used = [*self._used.values()]
        self._used[place] = next(filter(self._hold, names), None) or min(names, key=used.count)
        return self._used[place]

    def take_own(self, place: int) -> bool:
        """Whether the GPU of that place is held for its run now; False where another run has it, or there is none."""
        if place >= len(self) or not self._hold(name := [*self._locks][place]):
            return False
        self._used[place] = name
        return True

    def release(self, place: int) -> None:
        """The run of that place is over."""
        name = self._used.pop(place, None)
        if name in self._held and name not in self._used.values():
            self._held.remove(name)
            self._locks[name].release()

    def close(self) -> None:
        """No run of ours goes on."""
        for place in [*self._used]:
            self.release(place)

    def _hold(self, name: str) -> bool:
        free = name not in self._held and self._locks[name].take()
        if free:
            self._held.add(name)
        return free
