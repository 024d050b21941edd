"""What a training is asked to do (`Job`), how far it is (`Progress`), and who made which of its steps (`Session`)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch

from upcycle_bench.model import backends
from upcycle_bench.model.clip import Clip
from upcycle_bench.protocol import Schedule
from upcycle_bench.training.trackers import Trackers
from upcycle_bench.util import distributed, environment
from upcycle_bench.util.plain import plain


@dataclass
class Curve:
    """Scores of held-out pairs during a training, as (steps done, score), and what it cost to score them.

    `identity` names the pairs and how often they are scored: curves with the same one compare. `chance`: the score of
    guessing. FLOPs are those of all ranks.
    """

    identity: str
    set: str
    pairs: int
    every: int
    chance: float
    points: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    flops: int = 0


class HeldOut(Protocol):
    """What scores held-out pairs during a training (`evaluation.held_out`)."""

    every: int

    def curve(self) -> Curve:
        """One without points."""

    def score(self, clip: Clip) -> float:
        """The model's score now; every rank must call it. DivergedError for embeddings that are not finite."""


SHARE_STEPS = 50  # a record gives each term's share of the loss over this many first steps


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings of one training. Where `stop_step` < `schedule.steps`, it stops before its schedule ends.

    `purpose` and `seed` name the random streams: with equal seeds, upcycling does not repeat the dense model's batches.
    `held_out` is scored at the start, every few steps and at the end; then `on_score` gets the curve so far.
    `metrics`: the file for lines of metrics; `trackers` get them, too. `checkpoints`: the folder of checkpoints,
    written every `checkpoint_every` steps (0: only where the training is stopped).
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
    held_out: HeldOut | None = None
    on_score: Callable[[Curve], None] = lambda curve: None
    metrics: Path | None = None
    checkpoints: Path | None = None
    checkpoint_every: int = 0
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def stream(self) -> str:
        """The name under which all random streams of this training are drawn."""
        return f"{self.purpose} {self.seed}"

    def checkpoint_due(self, step: int) -> bool:
        """Whether to write a checkpoint after `step` steps; after the last step too, since the evaluation may fail."""
        every = self.checkpoint_every
        return every > 0 and (step % every == 0 or step == self.stop_step)


@dataclass
class Session:
    """One process group's share of a training: when, where, on which ranks, and the steps `first_step` to `last_step`.

    `versions` are those of the packages, and what else rounds otherwise: a forced backend, fast paths that are off.
    """

    started: str
    hosts: list[str]
    world_size: int
    ep_size: int
    device: str
    versions: dict[str, str]
    first_step: int = 0
    last_step: int = 0

    @classmethod
    def here(cls, ep_size: int, device: torch.device, step: int) -> Session:
        """A session that begins now, after `step` steps. Every rank must call it."""
        found = {name: environment.installed_version(name) for name in environment.PACKAGES}
        versions = {name: version for name, version in found.items() if version is not None}
        versions |= {"experts": forced} if (forced := backends.forced()) else {}
        versions |= {"fast paths": "off"} if plain() else {}
        return cls(
            started=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            hosts=sorted(set(distributed.from_all(socket.gethostname()))),
            world_size=distributed.world_size(),
            ep_size=ep_size,
            device=environment.device_name(device.type),
            versions=versions,
            first_step=step,
            last_step=step,
        )

    def differences(self, before: Session) -> list[str]:
        """What may change bits and was another in the session `before`: "ranks 1 (before: 2)"."""
        new, old = self._facts(), before._facts()
        names = [name for name in {**new, **old} if new.get(name) != old.get(name)]
        return [f"{name} {new.get(name, 'none')} (before: {old.get(name, 'none')})" for name in names]

    def _facts(self) -> dict[str, str]:
        shape = {"ranks": str(self.world_size), "ep_size": str(self.ep_size)}
        return {**shape, "device": self.device, **self.versions}


@dataclass
class Progress:
    """What a training has done so far, in all its sessions; every checkpoint holds it.

    FLOPs are counted in `counted_steps` of the steps, on this rank alone. `routed` and `dropped` are (token, choice)
    pairs over all ranks; `last` is the last line of metrics.
    """

    step: int = 0
    seconds: float = 0.0
    counted_flops: int = 0
    counted_steps: int = 0
    counted_seconds: float = 0.0
    routed: int = 0
    dropped: int = 0
    last: dict[str, float] = field(default_factory=dict)
    share_steps: int = 0
    loss_shares: dict[str, float] = field(default_factory=dict)  # each term's shares, summed over `share_steps`
    loss_notes: dict[str, float] = field(default_factory=dict)  # of the strategy's own loss
    sessions: list[Session] = field(default_factory=list)
    bad_samples: dict[str, int] = field(default_factory=dict)  # by kind, over all ranks
    first_bad: dict[str, str] = field(default_factory=dict)  # where the first of each kind stands
    curve: Curve | None = None
    joules: float | None = None  # of all ranks' devices (`util.energy`); None where one of them does not report it

    @property
    def mean_loss_shares(self) -> dict[str, float]:
        """Each term's mean share of the loss over the first SHARE_STEPS steps."""
        return {name: total / self.share_steps for name, total in self.loss_shares.items()}

    def samples_per_second(self, batch_size: int) -> float:
        """Pairs per second over the steps without counted FLOPs, since counting is slow; over all if there are none."""
        steps, seconds = self.step - self.counted_steps, self.seconds - self.counted_seconds
        return steps * batch_size / seconds if steps else self.step * batch_size / self.seconds

    @property
    def dropped_fraction(self) -> float | None:
        """Fraction of the (token, choice) pairs that were over capacity and dropped; None without MoE layers."""
        return self.dropped / self.routed if self.routed else None

    def total_flops(self) -> int:
        """FLOPs of all steps on all ranks, scaled up from the counted steps. Every rank must call it."""
        counted = distributed.sum_over_ranks(self.counted_flops)  # not scaled up before the sum: int64 would overflow
        return counted * self.step // max(1, self.counted_steps)
