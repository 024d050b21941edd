"""What a training is asked to do, how far it is, and how it goes on after an interruption.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from upcycle_bench import distributed
from upcycle_bench.files import atomic
from upcycle_bench.protocol import Schedule
from upcycle_bench.strategy import ExtraLoss

SHARE_STEPS = 50  # over the first so many steps the record says what share of the loss each term had


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, beside the model and the data. `stop_step` < schedule.steps stops inside the schedule.

    `purpose` keys the random streams with the seed, so that upcycling never replays the dense model's batches.
    """

    purpose: str = "upcycling"
    schedule: Schedule
    peak_lr: float
    stop_step: int
    seed: int
    load_balance: float = 0.0
    label_smoothing: float = 0.0
    zero_stage: int = 0
    log_every: int = 10
    metrics: Path | None = None
    checkpoints: Path | None = None
    checkpoint_every: int = 0

    @property
    def stream(self) -> str:
        """Key of all random streams of this training."""
        return f"{self.purpose} {self.seed}"


@dataclass
class Progress:
    """What a finished (or resumed) training has done so far; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    counted_flops: int = 0
    counted_steps: int = 0
    counted_seconds: float = 0.0
    routed: int = 0
    dropped: int = 0
    last: dict[str, float] = field(default_factory=dict)
    share_steps: int = 0
    loss_shares: dict[str, float] = field(default_factory=dict)  # summed over those steps

    @property
    def mean_loss_shares(self) -> dict[str, float]:
        """Each term's mean share of the loss over the first SHARE_STEPS steps."""
        return {name: total / self.share_steps for name, total in self.loss_shares.items()}

    def samples_per_second(self, batch_size: int) -> float:
        """Throughput over the steps whose FLOPs were not counted, since counting is slow; over all where all were."""
        steps, seconds = self.step - self.counted_steps, self.seconds - self.counted_seconds
        return steps * batch_size / seconds if steps else self.step * batch_size / self.seconds

    @property
    def dropped_fraction(self) -> float | None:
        """Share of (token, choice) pairs that capacity dropped; None without MoE layers."""
        return self.dropped / self.routed if self.routed else None


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
