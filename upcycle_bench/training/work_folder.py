"""The work folder of a training: what an interrupted one goes on from, under a name that says what the training is.

    refuse_others(facts, command, fresh)                # UserError where the same command left another training
    with work_folder(facts, command, fresh) as work:    # cache/runs/NAME, deleted afterwards
        ...                                             # work / "checkpoints", "metrics.jsonl", "run.json"

`facts` are what the training is, `command` what was typed to get it (`planning.identity`).
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from upcycle_bench.planning.fingerprint import fingerprint
from upcycle_bench.planning.identity import Facts, different
from upcycle_bench.training.checkpoint_files import steps
from upcycle_bench.util import distributed, strict_json
from upcycle_bench.util.cache import cache_root, locked
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import write_atomically

ABOUT = "run.json"
# What a training goes on from; without trained weights it only saves a calibration.
TRAINED = ("checkpoints/step*", "preparation/*/checkpoints/step*", "preparation/*/done.json")
KEEPS = (*TRAINED, "experts/receipt.json")


def folder_of(facts: Facts) -> Path:
    """The work folder of the training that these facts describe."""
    return cache_root() / "runs" / fingerprint(facts)


def about(folder: Path) -> dict[str, Any]:
    """What stands in a work folder's `run.json`; {} where there is none that can be read."""
    try:
        found = strict_json.loads((folder / ABOUT).read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def refuse_others(facts: Facts, command: Facts, fresh: bool) -> None:
    """UserError where the same command left checkpoints of a training that is another one now, and what differs.

    With `fresh` those are deleted. Every rank must call it.
    """
    line = None
    if distributed.is_main():
        for folder in _of_command(command, facts):
            if fresh:
                with locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            else:
                line = line or _refusal(folder, facts)
    if line := distributed.from_main(line):
        raise UserError(line)


def say_others(facts: Facts, command: Facts) -> None:
    """Say on rank 0 which trainings of the same command are left behind, since they are other ones now, and why."""
    for folder in _of_command(command, facts) if distributed.is_main() else ():
        print(f"{_what(folder, facts)}; it is left in {folder}, and a new one begins", file=sys.stderr)


def _of_command(command: Facts, facts: Facts) -> list[Path]:
    """Work folders with checkpoints of the same command, but of another training."""
    found = []
    for path in sorted((cache_root() / "runs").glob(f"*/{ABOUT}")):
        said = about(path.parent)
        if said.get("command") == command and said.get("facts") != facts and _has(path.parent, TRAINED):
            found.append(path.parent)
    return found


def _has(folder: Path, patterns: Sequence[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _step(folder: Path) -> int:
    """The step of the newest checkpoint, of a preparation's where the training has none; 0 where there is none."""
    places = [folder / "checkpoints", *sorted(folder.glob("preparation/*/checkpoints"))]
    return next((found[0] for place in places if (found := steps(place))), 0)


def _what(folder: Path, facts: Facts) -> str:
    names = ", ".join(different(facts, about(folder)["facts"]))
    what, step = facts.get("strategy", "the dense model"), _step(folder)
    return f"an interrupted training of {what}, at step {step}, cannot go on, since these have changed: {names}"


def _refusal(folder: Path, facts: Facts) -> str:
    return (
        f"{_what(folder, facts)}; --fresh starts anew and deletes it; with these as before, the same command goes on."
    )


@contextlib.contextmanager
def work_folder(facts: Facts, command: Facts, fresh: bool = False, more: Facts | None = None) -> Iterator[Path]:
    """The folder for checkpoints and metrics during a training; deleted afterwards.

    After an interruption it stays if a training can go on from it. A process locks it: a second process with the same
    training (`lab` and `lab-dev` have the same) waits, then finds the training finished. `fresh` deletes what an
    interrupted training left. `more` is written beside the facts, where nothing stands there yet.
    """
    path = folder_of(facts)
    with locked(path, "the same training") if distributed.is_main() else contextlib.nullcontext():
        if distributed.is_main():
            if fresh:
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
            if not about(path):
                tree = {"facts": facts, "command": command, **(more or {})}
                write_atomically(path / ABOUT, (strict_json.dumps(tree, indent=1) + "\n").encode())
        distributed.barrier()
        try:
            yield path
        except BaseException as error:
            # A run that failed has made its record, and its strategy may be changed before it is tried again.
            kept = TRAINED if isinstance(error, Exception) else KEEPS
            if distributed.is_main() and not _has(path, kept):
                shutil.rmtree(path, ignore_errors=True)
            raise
        if distributed.is_main():
            shutil.rmtree(path, ignore_errors=True)
