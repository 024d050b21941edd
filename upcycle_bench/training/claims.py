"""Which trainings this process is at, and no other matrix may begin: several share the work and none waits idly.

    claims = Claims([folder_of(facts)])
    if claims.take(folder_of(facts)): ...       # a run here, or in a process of ours
    claims.release(folder_of(facts))

A claim is held from before a run's process starts until its record is read. Within that time the run itself locks its
work folder (`training.work_folder`). A claim is therefore free only where both are: a single run makes none, and a run
may outlive the matrix that started it for a moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from upcycle_bench.util.cache import attempt
from upcycle_bench.util.locks import Attempt


class Claims:
    """The claims of one process, by the work folder of the training. Only rank 0 has some.

    Raises UserError where the cache cannot be written: for `folders` at once, for others at their first use.
    """

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        self._tried: dict[Path, tuple[Attempt, Attempt]] = {}
        for folder in folders:
            self._locks(folder)

    def take(self, folder: Path) -> bool:
        """Whether the training is this process's now; False, at once, where another process is at it."""
        claim, work = self._locks(folder)
        mine, idle = claim.take(), work.take()
        work.release()  # the run takes it
        if not (mine and idle):
            claim.release()
        return mine and idle

    def release(self, folder: Path) -> None:
        """Let others have the training."""
        self._locks(folder)[0].release()

    def close(self) -> None:
        """Let others have all trainings."""
        for claim, _ in self._tried.values():
            claim.release()

    def seen(self, folder: Path) -> str | None:
        """Who seems to be at a training, without a try; None for nobody."""
        return next((name for lock in self._locks(folder) if (name := lock.holder())), None)

    def _locks(self, folder: Path) -> tuple[Attempt, Attempt]:
        if folder not in self._tried:
            self._tried[folder] = (attempt(folder / "claim"), attempt(folder))
        return self._tried[folder]
