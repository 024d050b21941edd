"""The faults, and what has to come of a run that meets one.

    outcome = disturb(Case("SIGTERM", "train", ranks=2), baseline, folder)      # raises Broken

A disturbed run is typed again until it ends. Its weights must then be those of the run that nothing disturbed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.chaos.disturbed import Attempt, command

AGAIN = 75  # the exit status of a run that can go on
MOST = 3  # attempts after the disturbed one
FULL_DISK = 200  # MiB of the file system that a full disk is tried on


class Broken(Exception):
    """A disturbed run did not come to what it should."""


@dataclass(frozen=True)
class Case:
    """One fault in one phase; for a kill at random `second` says when, for other ranks `then` how it goes on."""

    fault: str
    phase: str
    ranks: int
    second: float | None = None
    then: tuple[int, int] | None = None  # ranks, ep_size
    torchrun: bool = False

    @property
    def name(self) -> str:
        """Fault, phase and ranks in a few words."""
        where = f"after {self.second:.1f} s" if self.second is not None else f"in {self.phase}"
        return f"{self.fault} {where}, {self.ranks} rank{'s' * (self.ranks > 1)}{' of torchrun' * self.torchrun}"


@dataclass(frozen=True)
class Baseline:
    """The run that nothing disturbs, on that many ranks: its seconds, and its cache with the weights."""

    ranks: int
    seconds: float
    cache: Path
    weights: str

    @property
    def ep_size(self) -> int:
        """Two ranks share the experts."""
        return self.ranks


def undisturbed(ranks: int, folder: Path) -> Baseline:
    """Make the baseline."""
    began = time.monotonic()
    with Attempt(command(ep_size=ranks), folder / "cache", folder / "results", ranks) as attempt:
        if any(statuses := attempt.statuses()):
            raise Broken(f"the undisturbed run ended with {statuses}: {attempt.lines[-3:]}")
    return Baseline(
        ranks, time.monotonic() - began, folder / "cache", the_record(folder / "results")["hashes"]["weights"]
    )


def the_record(results: Path) -> dict:
    """The one record of a run that succeeded; others must be of failures."""
    made = [json.loads(path.read_text()) for path in results.rglob("*.json")]
    good = [record for record in made if record["status"] == "ok"]
    if len(good) != 1:
        raise Broken(f"{len(good)} records instead of one")
    return good[0]


def disturb(case: Case, baseline: Baseline, folder: Path) -> str:
    """Run, disturb, type the command again until it ends; returns the outcome in words. Raises Broken."""
    cache, results = folder / "cache", folder / "results"
    with _disk(folder, small=case.fault == "full disk"):
        _copy_cache(baseline, cache, with_dense=case.phase != "dense" and case.second is None)
        words = command(baseline.ep_size, torchrun=case.ranks if case.torchrun else 0)
        if case.fault == "--stop-after":
            statuses, said = _stop_in_training(baseline, words, cache, results)
        else:
            with Attempt(words, cache, results, 1 if case.torchrun else case.ranks) as attempt:
                if case.second is not None:
                    time.sleep(case.second)
                    attempt.signal(signal.SIGKILL)
                else:
                    attempt.reached(case.phase)
                    if case.fault == "damaged checkpoint":
                        _until_two_checkpoints(cache)
                    FAULTS[case.fault](attempt, cache)
                statuses, said = attempt.statuses(), attempt.lines
        found = [_said(case, statuses, said)]
        AFTERWARDS.get(case.fault, lambda cache: None)(cache)
        ranks, ep_size = case.then or (case.ranks, baseline.ep_size)
        for _ in range(MOST):
            with Attempt(command(ep_size), cache, results, ranks) as attempt:
                statuses, said = attempt.statuses(), attempt.lines
            lines = [line.partition(": step")[0] for line in said if " goes on " in line or "damaged" in line]
            found += [_short(line) for line in lines[:2]]
            if not any(statuses):
                break
        else:
            raise Broken(f"typed again, it ended with {statuses}: {said[-3:]}")
        found.append(_compare(case, baseline, cache, results))
    return "; ".join(filter(None, found))


def _short(line: str) -> str:
    """Without folders and what stands in brackets."""
    return re.sub(r" \([^)]*\)|/\S*/(?=step)", "", line)


def _stop_in_training(baseline: Baseline, words: list[str], cache: Path, results: Path) -> tuple[list[int], list[str]]:
    """Let it stop after a quarter of the baseline's time, a second more, ..., until it leaves a checkpoint."""
    for seconds in itertools.count(max(1, round(baseline.seconds / 4))):
        with Attempt([*words, "--stop-after", f"{seconds}s"], cache, results, baseline.ranks) as attempt:
            statuses, said = attempt.statuses(), attempt.lines
        if _checkpoints(cache) or set(statuses) != {AGAIN}:
            return statuses, said
    raise AssertionError


def _said(case: Case, statuses: list[int], lines: list[str]) -> str:
    """How the disturbed run ended. Raises Broken where it should have ended otherwise."""
    stopped = case.fault in ("SIGTERM", "SIGTERM of one rank", "SIGUSR1", "--stop-after") and not case.torchrun
    if stopped and set(statuses) != {AGAIN}:
        raise Broken(f"it ended with {statuses} instead of {AGAIN} each: {lines[-3:]}")
    if case.fault == "full disk" and not any("was not written: " in line for line in lines):
        raise Broken(f"a checkpoint that was not written is not told: {lines[-3:]}")
    traceback = [line for line in lines if line.startswith("Traceback")]
    ours = [line for line in lines if line.lstrip().startswith("File ") and "upcycle_bench" in line]
    if traceback and (ours or not case.torchrun):  # torchrun prints one of its own when it gets a signal
        raise Broken(f"it ended with a {traceback[0]}: {lines[-1]}")
    return f"status {', '.join(map(str, dict.fromkeys(statuses)))}"


def _compare(case: Case, baseline: Baseline, cache: Path, results: Path) -> str:
    """Compare with the baseline: the same bits, or nearly the same weights on other ranks; nothing is left behind."""
    record = the_record(results)
    left = [*cache.rglob(".*.tmp"), *(cache / "runs").glob("*")]
    if left:
        raise Broken(f"left behind: {left[0].name}")
    digest = record["hashes"]["weights"]
    if digest == baseline.weights:
        return "same bits"
    if case.then is None:
        raise Broken("other weights than those of the undisturbed run")
    mine = load_file(cache / "weights" / f"{digest}.safetensors")
    theirs = load_file(baseline.cache / "weights" / f"{baseline.weights}.safetensors")
    moved = torch.cat([(mine[key].double() - theirs[key].double()).flatten() for key in theirs]).norm()
    whole = torch.cat([theirs[key].double().flatten() for key in theirs]).norm()
    return f"weights within {moved / whole:.1e}, {len(record['sessions'])} sessions"


def _copy_cache(baseline: Baseline, cache: Path, with_dense: bool) -> None:
    """A cache that has the data, and the dense model if its training is not what is disturbed."""
    for kind in ("worlds", "decoded", *(["dense"] if with_dense else [])):
        if (baseline.cache / kind).is_dir():
            shutil.copytree(baseline.cache / kind, cache / kind)


@contextlib.contextmanager
def _disk(folder: Path, small: bool) -> Iterator[None]:
    """The folder; for a full disk, a small file system of its own, which takes the right to mount one."""
    folder.mkdir(parents=True)
    if not small:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_DISK}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(attempt: Attempt, cache: Path) -> None:
    """Leave no space on the disk for some seconds, whatever the run deletes meanwhile; then it is asked to stop."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(OSError), (cache / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        time.sleep(0.05)
    attempt.signal_ranks(signal.SIGTERM)


def _checkpoints(cache: Path) -> list[Path]:
    """The whole checkpoints, the oldest first."""
    found = (cache / "runs").glob("*/checkpoints/step*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step")))


def _until_two_checkpoints(cache: Path) -> None:
    """A thread writes them, which a busy machine may hold up."""
    end = time.monotonic() + 60
    while len(_checkpoints(cache)) < 2:
        if time.monotonic() > end:
            raise Broken("it never had two checkpoints")
        time.sleep(0.01)


def _damage(cache: Path) -> None:
    """Flip one bit in the newest checkpoint's largest file."""
    steps = _checkpoints(cache)
    file = max((path for path in steps[-1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)


def _kill(attempt: Attempt, cache: Path) -> None:
    attempt.signal(signal.SIGKILL)


# What happens to a run that has reached the phase, and what to its cache after it has ended.
FAULTS: dict[str, Callable[[Attempt, Path], None]] = {
    "kill -9": _kill,
    "kill -9 of one rank": lambda attempt, cache: attempt.processes[1].kill(),
    "SIGTERM of one rank": lambda attempt, cache: attempt.processes[1].terminate(),
    "SIGTERM": lambda attempt, cache: attempt.signal(signal.SIGTERM),
    "SIGUSR1": lambda attempt, cache: attempt.signal_ranks(signal.SIGUSR1),
    "damaged checkpoint": _kill,
    "full disk": _fill,
    "other ranks": _kill,
}
AFTERWARDS: dict[str, Callable[[Path], None]] = {
    "damaged checkpoint": _damage,
    "full disk": lambda cache: (cache / "filler").unlink(missing_ok=True),
}


def all_cases(kills: int, baselines: dict[int, Baseline]) -> Iterator[Case]:
    """The whole table, for the ranks that have a baseline."""
    for ranks, baseline in baselines.items():
        for fault in ("kill -9", "SIGTERM", "SIGUSR1"):
            for phase in ("dense", "making", "train", "evaluate"):
                yield Case(fault, phase, ranks)
        for fault in ("--stop-after", "damaged checkpoint", "full disk"):
            yield Case(fault, "train", ranks)
        if ranks > 1:
            yield Case("kill -9 of one rank", "train", ranks)
            yield Case("SIGTERM of one rank", "making", ranks)
            yield Case("SIGTERM", "train", ranks, torchrun=True)
        for then in ((1, 1), (2, 2), (2, 1)):
            if then != (ranks, baseline.ep_size):
                yield Case("other ranks", "train", ranks, then=then)
        draw = random.Random(ranks)
        for _ in range(kills):
            yield Case("kill -9", "", ranks, second=draw.uniform(0.1, 1.0) * baseline.seconds)
