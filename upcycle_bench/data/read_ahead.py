"""Threads that read pieces before they are asked for; whoever comes first reads a piece, the others wait for it.

    ahead = ReadAhead(fetch)            # fetch(span) fills the span, under its lock
    ahead.begin(spans)                  # in this order; what is left of earlier ones is dropped

So a loader decodes while storage answers, and an object store is asked for several spans at once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
THREADS = 4


class ReadAhead(Generic[T]):
    """Calls `fetch` with each piece in threads, which end with the last piece."""

    def __init__(self, fetch: Callable[[T], None], threads: int = THREADS) -> None:
        self._fetch, self._threads = fetch, threads
        self._left: deque[T] = deque()
        self._lock, self._running = threading.Lock(), 0
        self._process = os.getpid()  # whose threads they are

    def begin(self, pieces: Iterable[T]) -> None:
        """Fetch these, in this order."""
        if self._process != os.getpid():  # a fork has no threads, and perhaps a lock that one of them held
            self._process, self._lock, self._running = os.getpid(), threading.Lock(), 0
        with self._lock:
            self._left = deque(pieces)
            missing = min(self._threads, len(self._left)) - self._running
            self._running += max(0, missing)
        for _ in range(missing):
            threading.Thread(target=self._run, name="read ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._left:  # so that nothing holds on to a reader that is needed no more
                    self._running -= 1
                    return
                piece = self._left.popleft()
            self._fetch(piece)
