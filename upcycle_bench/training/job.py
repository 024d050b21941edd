"""What a training is asked to do (`Job`), and how far it is (`Progress`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from upcycle_bench.protocol import Schedule

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

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint stands after `step` steps; after the last one too, since evaluation may fail."""
        every = self.checkpoint_every
        return every > 0 and (step % every == 0 or step == self.stop_step)


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
