"""A connection of a thread to the store of all ranks, which is made again where the network fails for a moment.

line = Connection(store, "first cause", seconds=10)     # who does not answer in so many seconds is gone
line.store.set("beat 1", "0")
line.mend()                                             # after a DistNetworkError, and while `line.lost` is set
"""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from upcycle_bench.util.distributed import own_connection


class Connection:
    """`store`: what stands under the prefix. `lost`: since when it does not answer, by `time.monotonic`, or None."""

    def __init__(self, store: dist.Store, prefix: str, seconds: float) -> None:
        self._base, self._prefix, self._seconds = store, prefix, seconds
        self.lost: float | None = None
        self._mending = threading.Lock()
        self.store = self._connect()

    def _connect(self) -> dist.Store:
        store = dist.PrefixStore(self._prefix, own_connection(self._base))
        store.set_timeout(timedelta(seconds=self._seconds))
        return store

    def mend(self) -> None:
        """Connect again. Where nothing listens the store is lost, until it is mended at a later call."""
        with self._mending:
            try:
                self._require_listening()
                self.store = self._connect()
                self.lost = None
            except RuntimeError:
                self.lost = self.lost or time.monotonic()

    def first(self, key: str, value: str) -> bytes | None:
        """Write a value, unless there is one, and return what stands there then; None where the store is lost."""
        for _ in range(2):
            if self.lost is not None:
                break
            try:
                found: bytes = self.store.compare_set(key, "", value)
                return found
            except dist.DistNetworkError:
                self.mend()
            except RuntimeError:  # the store went with its process
                break
        return None

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
