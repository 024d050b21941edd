"""Why a process ends where another one has failed: `Cause` says which rank and what, `PeerFailed` is raised."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle_bench.util.errors import UserError

KILLED, GONE = "was killed, perhaps for want of memory", "or its launcher ended without a word"


@dataclass(frozen=True)
class Cause:
    """An error, where it happened, and when (UTC)."""

    rank: int
    host: str
    what: str
    time: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}){' ' if self.what in (KILLED, GONE) else ': '}{self.what}"


class PeerFailed(UserError):
    """Another rank has failed, which ends this one."""

    status = 1

    def __init__(self, cause: Cause) -> None:
        super().__init__(str(cause))
        self.cause = cause
