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
    """Calls `fetch` with each piece in threads, which end with the process and start again in a fork."""

    def __init__(self, fetch: Callable[[T], None], threads: int = THREADS) -> None:
        self._fetch, self._threads = fetch, threads
        self._left: deque[T] = deque()
        self._news = threading.Condition()
        self._process = 0  # whose threads they are

    def begin(self, pieces: Iterable[T]) -> None:
        """Fetch these, in this order."""
        if self._process != os.getpid():  # a fork has no threads, and perhaps a lock that one of them held
            self._process, self._left, self._news = os.getpid(), deque(), threading.Condition()
            for _ in range(self._threads):
                threading.Thread(target=self._run, name="read ahead", daemon=True).start()
        with self._news:
            self._left.clear()
            self._left.extend(pieces)
            self._news.notify_all()

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._left:
                    self._news.wait()
                piece = self._left.popleft()
            self._fetch(piece)
            del piece  # it may hold megabytes
