"""Checkpoints of a training and its file of metrics: how an interrupted training goes on.

progress = resume(engine, extra, job)               # from the last checkpoint, if there is one
with MetricsFile(job.metrics, progress.step) as log: log.write({"step": 1, "loss": 2.3})
save(engine, extra, job, progress)                  # a checkpoint; older ones go
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.job import Job, Progress
from upcycle_bench.util import distributed
from upcycle_bench.util.files import atomic


class MetricsFile:
    """Appends JSON lines; on resuming, drops the lines that stand past the checkpoint."""

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_text().splitlines() if path.is_file() and step else []
            with atomic(path) as part:
                part.write_text("".join(line + "\n" for line in before if json.loads(line)["step"] <= step))

    def __enter__(self) -> MetricsFile:
        if self.path is not None:
            self.file = self.path.open("a")
        return self

    def write(self, metrics: Mapping[str, Any]) -> None:
        """One line."""
        if self.path is not None:
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self.file.close()


def save(engine: Any, extra: ExtraLoss | None, job: Job, progress: Progress) -> None:
    """A checkpoint of this step; DeepSpeed's `latest` is written last, then older ones go."""
    assert job.checkpoints is not None, "checkpoint_every needs a folder"
    tag = f"step{progress.step}"
    state = {"progress": vars(progress)}
    if extra is not None:  # with expert parallelism every rank has teachers of its own
        folder = job.checkpoints / tag
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(extra.state_dict(), folder / f"loss_rank{distributed.rank()}.pt")
    with contextlib.redirect_stdout(sys.stderr):
        engine.save_checkpoint(str(job.checkpoints), tag=tag, client_state=state)
    distributed.barrier()
    if distributed.is_main():
        for old in job.checkpoints.glob("step*"):
            if old.name != tag:
                shutil.rmtree(old)


def last_checkpoint(job: Job) -> int:
    """The step of the checkpoint that training goes on from; 0 without one."""
    latest = job.checkpoints / "latest" if job.checkpoints else None
    return int(latest.read_text().strip().removeprefix("step")) if latest and latest.is_file() else 0


def resume(engine: Any, extra: ExtraLoss | None, job: Job) -> Progress:
    """How far the last checkpoint is, loaded into the engine and the extra loss; the beginning without one."""
    if job.checkpoints is None or not last_checkpoint(job):
        return Progress()
    with contextlib.redirect_stdout(sys.stderr):
        _, state = engine.load_checkpoint(str(job.checkpoints))
    if extra is not None:
        path = job.checkpoints / (job.checkpoints / "latest").read_text().strip()
        extra.load_state_dict(torch.load(path / f"loss_rank{distributed.rank()}.pt", weights_only=True))
    progress = Progress(**state["progress"])
    if distributed.is_main():
        print(f"an interrupted training goes on from step {progress.step}", file=sys.stderr)
    return progress
