"""What failed first, and on which rank, when one of several processes fails: the others only see a collective break.

    with watching(store):                 # session.open_session, on every rank
        with last_word(write_record):     # called once, with the error or with PeerFailed, which names another's
            ...

A rank that fails writes its error into the store before it ends; the first one counts. A thread of every rank looks
there, beats, and looks after other ranks. So a rank that was killed is noticed too: on the same machine at once, on
another one by its missing beat. A process whose main thread does not end then, as in a collective of NCCL, is ended.
It rests on no text of an error of gloo or NCCL, and on no signal.

A rank that is asked to stop outside a training's steps tells it, too. The others then end with the same status, and
what breaks meanwhile is no failure.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from upcycle_bench.util import strict_json
from upcycle_bench.util.cause import GONE, KILLED, Cause, PeerFailed
from upcycle_bench.util.connection import Connection
from upcycle_bench.util.error_kinds import in_collective, orderly
from upcycle_bench.util.errors import one_line
from upcycle_bench.util.processes import process_space, process_started
from upcycle_bench.util.stop_request import STATUS, Stopped, pass_on, request

POLL = 0.5  # seconds between two looks of the thread
SILENCE = 300.0  # seconds without a beat after which a rank counts as dead
SUSPICION = 10.0  # the same, once a collective has broken
STILL = 5.0  # seconds between two looks after which this process was the silent one
NEWS = 2.0  # seconds until a death on this machine is known
GRACE = 8.0  # seconds in which the main thread must have noticed another's failure
FAREWELL = 60.0  # seconds that it has then, for its record and its end
STOP = 5.0  # seconds in which the main thread must have heard that another rank was asked to stop
LAST_STEP = 45.0  # the same in a training, which ends by itself; a scheduler waits 60 s for the last rank

Say = Callable[[Exception], None]


_watch: _Watch | None = None  # of this process, as torch.distributed has its process group


@contextlib.contextmanager
def watching(store: dist.Store, rank: int, world: int) -> Iterator[None]:
    """Watch the ranks of `store` during the block, which runs on all of them."""
    global _watch
    _watch = watch = _Watch(store, rank, world)
    watch.thread.start()
    try:
        yield
    finally:
        watch.leave()
        _watch = None


@contextlib.contextmanager
def last_word(say: Say = lambda error: None) -> Iterator[None]:
    """Call `say` once with the exception that ends the block and is raised: PeerFailed, where another rank was first.

    Where the main thread hangs, the watching thread calls it and ends the process. An interruption is not said.
    """
    watch = _watch
    if watch is not None:
        watch.say = say
    try:
        yield
    except BaseException as error:
        first = error if watch is None else watch.first(error)
        if isinstance(first, Exception) and not orderly(first):
            if watch is None:
                say(first)
            else:
                watch.say_once(first)
        if first is error:
            raise
        raise first from None
    finally:
        if watch is not None:
            watch.say = None


def reason(error: BaseException) -> str:
    """An error for a record: its type and text; of several processes also the rank that failed first."""
    if isinstance(error, PeerFailed):
        return str(error)
    text = f"{type(error).__name__}: {error}"
    return text if _watch is None or _watch.found is None else f"{_watch.who(_watch.found.rank)}: {text}"


class _Watch:
    """What a rank knows of the others; shared by its main thread and the watching one."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.line = Connection(store, "first cause", SUSPICION)
        self.line.store.set_timeout(timedelta(minutes=10))  # until all have come here
        self.rank, self.world = rank, world
        self.found: Cause | None = None
        self.stopped: str | None = None  # the signal by which a rank has ended, which is no failure
        self._asked = False  # it came to this one, which did not hear it
        self.say: Say | None = None
        self.thread = threading.Thread(target=self._run, name="first cause", daemon=True)
        self._over = threading.Event()
        self._saying = threading.Lock()
        self._deadline: float | None = None  # when this process is ended, once a rank has failed
        self._broken = False  # a collective has broken here
        self._beats: dict[int, tuple[bytes, float]] = {}  # the last of each rank, and when it was new
        self._looked = time.monotonic()
        pid = os.getpid()
        self.line.store.set(
            f"process {rank}", strict_json.dumps([socket.gethostname(), process_space(), pid, process_started(pid)])
        )
        self.line.store.set(f"beat {rank}", "0")
        self.processes = [strict_json.loads(self.line.store.get(f"process {each}")) for each in range(world)]
        self.line.store.set_timeout(timedelta(seconds=SUSPICION))

    def who(self, rank: int) -> str:
        return f"rank {rank} (host {self.processes[rank][0]})"

    # ---- the main thread ----------------------------------------------------------------------------------------

    def first(self, error: BaseException) -> BaseException:
        """`error`, or PeerFailed with an earlier one of another rank. Writes it down where it is the first.

        Stopped, where a collective broke since another rank was asked to stop.
        """
        if isinstance(error, PeerFailed):
            return error
        self._deadline = time.monotonic() + SILENCE + FAREWELL
        try:
            if orderly(error):  # a launcher sends SIGTERM to all when one has died
                self._wait(NEWS)
            elif in_collective(error):
                self._broken = True
                # Rank 0 listens to all beats, so the others give it the time to find who is silent.
                self._wait((SUSPICION if self.rank == 0 else 2 * SUSPICION) + NEWS)
        except (KeyboardInterrupt, SystemExit) as interruption:  # raised by a handler of signals
            error = interruption
            self._wait(NEWS)
        if self.found is None and self.stopped and in_collective(error):
            error = Stopped(self.stopped)
        if self.found is None and isinstance(error, Stopped) and not error.step:
            self._tell_stop(error.by)
        mine = f"{type(error).__name__}: {error}"
        if self.found is None and not orderly(error):
            self._tell(getattr(error, "rank", self.rank), mine)
        self._deadline = time.monotonic() + FAREWELL
        if self.found is None:
            return error
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):  # it is about to end: not to be cut short
                signal.signal(number, signal.SIG_IGN)
        same = self.found.what == _limited(mine)  # as where all ranks find the same fault
        return error if same or self.found.rank == self.rank else PeerFailed(self.found)

    def say_once(self, error: Exception) -> None:
        with self._saying:
            say, self.say = self.say, None
            if say is not None:
                say(error)

    def leave(self) -> None:
        """The end of the block: what happens to this process now is nobody's failure."""
        self._over.set()
        self.thread.join(NEWS)
        if self.line.lost is not None:
            return
        with contextlib.suppress(RuntimeError):  # the store went with its process
            self.line.store.set(f"left {self.rank}", "")
            if self.rank == 0 and (self.found or self.stopped):  # the store may end with rank 0; others must read it
                failed = self.found.rank if self.found else None
                others = [f"left {each}" for each in range(1, self.world) if each != failed]
                end = time.monotonic() + 2 * NEWS
                while not self.line.store.check(others) and time.monotonic() < end:
                    time.sleep(POLL / 10)

    def _wait(self, seconds: float) -> None:
        """Until the first cause is known, or a stop, but not longer."""
        end = time.monotonic() + seconds
        while not (self.found or self.stopped) and time.monotonic() < end:
            time.sleep(POLL / 10)

    # ---- the watching thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        number = 0
        while not self._over.wait(max(POLL, self.world / 500)):
            number += 1
            self._look(number)
            if self.found is not None:
                self._deadline = self._deadline or time.monotonic() + GRACE
            elif self.stopped is not None:
                self._deadline = self._deadline or time.monotonic() + (LAST_STEP if request.deferred else STOP)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end()

    def _look(self, number: int) -> None:
        """Beat, and look for a cause; `found` is the first one."""
        patience = SUSPICION if self._broken else SILENCE
        if self.line.lost is not None:
            self.line.mend()
        if self.line.lost is not None:
            if time.monotonic() - self.line.lost > patience and self.stopped is None:
                self.found = self.found or self._cause(0, GONE)
            return
        try:
            self.line.store.set(f"beat {self.rank}", str(number))
            if self.found is None and self.line.store.check(["cause"]):
                self.found = Cause(**strict_json.loads(self.line.store.get("cause")))
            if self.stopped is None and self.line.store.check(["stopped"]):
                self.stopped = self.line.store.get("stopped").decode()
                pass_on(self.stopped)
            if self.stopped is None and (name := request.unheard()):
                self._tell_stop(name)
                self._asked = self.stopped == name
            if self.found is None and self.stopped is None and (dead := self._dead(patience)) is not None:
                self._tell(dead, KILLED)
        except dist.DistStoreError:
            pass  # it is busy; the next look may find it
        except dist.DistNetworkError:
            self.line.mend()

    def _dead(self, patience: float) -> int | None:
        """A rank whose process has gone from this machine, or that has not beaten for `patience` seconds."""
        _, here, _, _ = self.processes[self.rank]
        for rank, (_, space, pid, started) in enumerate(self.processes):
            if space == here and process_started(pid) != started and not self._left(rank):
                return rank
        now, before = time.monotonic(), self._looked
        self._looked = now
        if now - before > STILL:  # this process stood still itself and has heard nobody
            self._beats.clear()
        # Rank 0 listens to all and all to rank 0: everyone to everyone would be too much for the store.
        for rank in range(1, self.world) if self.rank == 0 else [0]:
            beat = self.line.store.get(f"beat {rank}")
            last, since = self._beats.get(rank, (b"", now))
            if beat != last:
                self._beats[rank] = (beat, now)
            elif now - since > patience and not self._left(rank):
                return rank
        return None

    def _left(self, rank: int) -> bool:
        return bool(self.line.store.check([f"left {rank}"]))

    def _tell(self, rank: int, what: str) -> None:
        """Write a cause into the store, unless there is one, and take the one that stands there."""
        mine = self._cause(rank, what)
        told = self.line.first("cause", strict_json.dumps(asdict(mine)))
        self.found = self.found or (mine if told is None else Cause(**strict_json.loads(told)))

    def _tell_stop(self, by: str) -> None:
        """Write into the store that this rank ends, and that it is no failure."""
        self.stopped = self.stopped or by
        self.line.first("stopped", by)

    def _cause(self, rank: int, what: str) -> Cause:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Cause(rank, self.processes[rank][0], _limited(what), now)

    def _end(self) -> None:
        """End this process, whose main thread hangs; rank 0 writes its record first, if it is a failure."""
        if self._over.is_set():
            return
        if self.found is None:
            with contextlib.suppress(RuntimeError):
                self.line.store.set(f"left {self.rank}", "")
            if self.rank == 0:
                whose = "" if self._asked else ", which another rank got"
                print(f"stopped by {self.stopped}{whose}: the same command goes on", file=sys.stderr, flush=True)
            os._exit(STATUS)
        error = PeerFailed(self.found)
        self.say_once(error)
        print(
            f"error: {error}" if self.rank == 0 else f"error (rank {self.rank}): {error}", file=sys.stderr, flush=True
        )
        os._exit(PeerFailed.status)


def _limited(what: str) -> str:
    return one_line(Exception(what), 1500)
