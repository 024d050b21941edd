"""Checkpoints of a training, and its file of metrics: what an interrupted training needs to continue.

progress = resume(engine, extra, job)               # loads the last checkpoint, if there is one
with MetricsFile(job.metrics, progress.step) as log: log.write({"step": 1, "loss": 2.3})
save(engine, extra, job, progress)                  # writes a checkpoint and deletes older ones
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.job import Job, Progress
from upcycle_bench.util import distributed, strict_json
from upcycle_bench.util.files import atomic, full_disk_said


class MetricsFile:
    """A file of JSON lines that grows; without a path, nothing is written.

    Of a file that exists, the lines up to `step`, the last checkpoint's, stay: a resumed training writes the later
    ones again.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path, self.step = path, step

    def __enter__(self) -> MetricsFile:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.read_text().splitlines() if self.path.is_file() and self.step else []
            with atomic(self.path) as part:
                part.write_text("".join(line + "\n" for line in before if strict_json.loads(line)["step"] <= self.step))
            self.file = self.path.open("a")
        return self

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line."""
        if self.path is not None:
            with full_disk_said(self.path):
                self.file.write(strict_json.dumps(metrics) + "\n")
                self.file.flush()

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self.file.close()


def save(engine: Any, extra: ExtraLoss | None, job: Job, progress: Progress) -> None:
    """Write a checkpoint of this step, then delete older ones. Every rank must call it. UserError for a full disk.

    DeepSpeed writes the file `latest` last, so an interruption leaves the older checkpoint in force.
    """
    assert job.checkpoints is not None, "checkpoint_every needs a folder"
    tag = f"step{progress.step}"
    try:
        with full_disk_said(job.checkpoints / tag):
            if extra is not None:  # one file a rank: with expert parallelism each rank has teachers of its own experts
                (job.checkpoints / tag).mkdir(parents=True, exist_ok=True)
                torch.save(extra.state_dict(), _loss_file(job.checkpoints / tag))
            with contextlib.redirect_stdout(sys.stderr):
                engine.save_checkpoint(str(job.checkpoints), tag=tag, client_state={"progress": vars(progress)})
    except BaseException:
        if last_checkpoint(job) != progress.step:
            shutil.rmtree(job.checkpoints / tag, ignore_errors=True)
        raise
    distributed.barrier()
    if distributed.is_main():
        for old in job.checkpoints.glob("step*"):
            if old.name != tag:
                shutil.rmtree(old)


def last_checkpoint(job: Job) -> int:
    """The step after which the last checkpoint was written; 0 without one."""
    latest = job.checkpoints / "latest" if job.checkpoints else None
    return int(latest.read_text().strip().removeprefix("step")) if latest and latest.is_file() else 0


def resume(engine: Any, extra: ExtraLoss | None, job: Job) -> Progress:
    """Load the last checkpoint into the engine and the extra loss; returns its progress, or a new one without any."""
    step = last_checkpoint(job)
    if job.checkpoints is None or not step:
        return Progress()
    with contextlib.redirect_stdout(sys.stderr):
        _, state = engine.load_checkpoint(str(job.checkpoints))
    if extra is not None:
        extra.load_state_dict(torch.load(_loss_file(job.checkpoints / f"step{step}"), weights_only=True))
    progress = Progress(**state["progress"])
    if distributed.is_main():
        print(f"an interrupted training goes on from step {progress.step}", file=sys.stderr)
    return progress


def _loss_file(folder: Path) -> Path:
    """Where this rank keeps the state of the strategy's own loss, in a checkpoint's folder."""
    return folder / f"loss_rank{distributed.rank()}.pt"
