"""A connection of a thread to the store of all ranks, which is made again once where the network fails for a moment.

line = Connection(store, "first cause", seconds=10)     # who does not answer in so many seconds is gone
line.store.set("beat 1", "0")
line.mend()                                             # after a DistNetworkError; then `line.lost` may be set
"""

from __future__ import annotations

import socket
import time
from datetime import timedelta

import torch.distributed as dist

from upcycle_bench.util.distributed import own_connection


class Connection:
    """`store`: what stands under the prefix. `lost`: since when it does not answer, by `time.monotonic`, or None."""

    def __init__(self, store: dist.Store, prefix: str, seconds: float) -> None:
        self._base, self._prefix, self._seconds = store, prefix, seconds
        self._again = False
        self.lost: float | None = None
        self.store = self._connect()

    def _connect(self) -> dist.Store:
        store = dist.PrefixStore(self._prefix, own_connection(self._base))
        store.set_timeout(timedelta(seconds=self._seconds))
        return store

    def mend(self) -> None:
        """Connect again, if that was not done before; else, and where nothing listens, the store is lost."""
        try:
            if self._again:
                raise dist.DistNetworkError("it was cut before")
            self._again = True
            self._require_listening()
            self.store = self._connect()
        except RuntimeError:
            self.lost = time.monotonic()

    def _require_listening(self) -> None:
        """DistNetworkError where the store's process is gone: a new connection would wait as long as a collective."""
        store = self._base
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if isinstance(store, dist.TCPStore):
            try:
                socket.create_connection((store.host, store.port), self._seconds).close()
            except OSError as error:
                raise dist.DistNetworkError(str(error)) from None
