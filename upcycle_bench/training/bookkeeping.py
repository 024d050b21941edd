"""What is known of a training as it goes on: time, FLOPs, dropped choices, shares of the loss, lines of metrics.

    with MetricsFile(path, done) as log:
        books = Bookkeeping(job, layers, log, data)
        books.begin(progress)                           # a new training's progress, or a checkpoint's
        with books.counting(step): ...                  # counts the FLOPs of a few steps
        books.count_step(losses, batch.bad)             # after each step
        books.write_metrics(losses, rate, scale, seen)  # after some steps
        books.validate(clip, hooks)                           # before the first step, and after each
        books.collect()                                 # before `books.progress` is saved

Shape suffixes: S steps, M terms of the loss.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from upcycle_bench.data.bad_samples import Bad, Tally
from upcycle_bench.data.batches import BatchSource
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.training.checkpoint import MetricsFile
from upcycle_bench.training.job import SHARE_STEPS, Job, Progress
from upcycle_bench.training.own_hooks import OwnHooks
from upcycle_bench.training.router_log import Watched
from upcycle_bench.util import distributed
from upcycle_bench.util.energy import EnergyCounter
from upcycle_bench.util.errors import DivergedError
from upcycle_bench.util.flops import FlopCounter

CPU = torch.device("cpu")


class Bookkeeping:
    """Keeps `progress` up to date, and writes lines of metrics to `log`."""

    def __init__(self, job: Job, layers: Mapping[str, MoEFFN], log: MetricsFile, data: BatchSource) -> None:
        self.job, self.layers, self.log, self.data, self.progress = job, layers, log, data, Progress()
        self._bad: list[Bad] = []  # met on this rank since the last `collect`
        self._known_bad: set[int] = set()
        self._first_terms: list[Mapping[str, Tensor]] = []  # of the first SHARE_STEPS steps, until `collect`
        self._score_flops: int | None = None  # of one score of the held-out pairs, on all ranks
        self._flops: int | None = None  # of the current step; None where they are not counted
        self._began = time.perf_counter()
        self._energy: EnergyCounter | None = None
        self._joules_before: float | None = None

    def begin(self, progress: Progress, device: torch.device = CPU) -> None:
        """Continue `progress`, whose seconds are those of earlier sessions; this rank computes on `device`."""
        self.progress = progress
        self._energy, self._joules_before = EnergyCounter(device), progress.joules if progress.step else 0.0
        self._began = time.perf_counter() - progress.seconds
        self.job.trackers.begin(progress.step)

    @contextlib.contextmanager
    def counting(self, step: int) -> Iterator[None]:
        """Count the FLOPs of this step if it is one of a few evenly spaced ones: counting slows a step down."""
        self._flops = None
        if step % max(1, self.job.stop_step // 4):
            yield
            return
        with FlopCounter() as counter:
            yield
        self._flops = counter.get_total_flops()

    def count_step(self, losses: Mapping[str, Tensor], bad: Sequence[Bad] = ()) -> None:
        """Add one finished step, whose loss had these terms and whose batch met these bad samples, to `progress`."""
        progress = self.progress
        self._bad += bad
        if progress.step < SHARE_STEPS:  # the tensors stay on the device: to read them now, the step must wait for it
            self._first_terms.append(losses)
        before, progress.seconds = progress.seconds, time.perf_counter() - self._began
        progress.step += 1
        if self._flops is not None:
            progress.counted_seconds += progress.seconds - before
            progress.counted_flops += self._flops
            progress.counted_steps += 1

    def validate(self, clip: Clip, hooks: OwnHooks) -> None:
        """Score the held-out pairs, where it is time, without the own loss's `hooks`; every rank must call it.

        What it costs is kept apart from the training. DivergedError for a model whose embeddings are not finite.
        """
        held_out, progress = self.job.held_out, self.progress
        if held_out is None or (progress.step % held_out.every and progress.step != self.job.stop_step):
            return
        began, curve = time.perf_counter(), held_out.curve()
        if progress.curve is None:
            progress.curve = curve
        elif progress.curve.identity != curve.identity:  # other pairs than before, whose cost stays charged
            progress.curve = replace(curve, seconds=progress.curve.seconds, flops=progress.curve.flops)
        curve = progress.curve
        if curve.points and curve.points[-1][0] == progress.step:  # the checkpoint has it
            return
        # Counting doubles the time of a score, whose pairs are always the same.
        with hooks.off(), FlopCounter() if self._score_flops is None else contextlib.nullcontext() as counter:
            value = held_out.score(clip)
        if counter is not None:
            self._score_flops = distributed.sum_over_ranks(counter.get_total_flops())
        curve.points.append((progress.step, value))
        curve.flops += self._score_flops or 0
        self.job.trackers.log({"step": progress.step, "validation_log_rank": value})
        self.job.on_score(curve)
        seconds = time.perf_counter() - began
        curve.seconds += seconds
        self._began += seconds

    def write_metrics(self, losses: Mapping[str, Tensor], rate: float, scale: Tensor, seen: Watched) -> None:
        """Write a line of metrics, with what the routers did; DivergedError if the loss is not finite.

        Every rank must call it: losses are means over all ranks. `rate` is the learning rate, `scale` the logit scale.
        """
        self.collect()
        last = self.progress.last = self._metrics(losses, rate, scale)
        if not math.isfinite(last["loss"]):
            raise self._diverged(losses)
        line = {**last, **({"layers": seen.summary()} if self.layers else {})}
        self.log.write(line)
        self.job.trackers.log(line)

    def _diverged(self, losses: Mapping[str, Tensor]) -> DivergedError:
        last = self.progress.last
        terms = ", ".join(f"{name} {last[name]:g}" for name in losses)
        own = torch.stack(list(losses.values())).isfinite().all()
        broken = [rank for rank, finite in enumerate(distributed.gather(own[None]).tolist()) if not finite]
        where = "" if len(broken) in (0, distributed.world_size()) else f" on rank {', '.join(map(str, broken))}"
        return DivergedError(
            f"the loss is {last['loss']} at step {self.progress.step - 1} ({terms}){where}: the training has diverged; "
            "lower the learning rate or look at the strategy's own loss.",
            rank=broken[0] if broken else 0,
        )

    def _metrics(self, losses: Mapping[str, Tensor], rate: float, scale: Tensor) -> dict[str, float]:
        terms_M = torch.stack(list(losses.values()))
        values = torch.cat([terms_M.sum()[None], terms_M])  # [1 + M]: the loss, then its terms
        world, progress = distributed.world_size(), self.progress
        if world > 1:
            torch.distributed.all_reduce(values)
        total, *parts = (values / world).tolist()
        dropped = progress.dropped_fraction
        return {
            "step": progress.step,
            "loss": total,
            **dict(zip(losses, parts, strict=True)),
            "learning_rate": rate,
            "logit_scale": scale.item(),
            "samples_per_second": progress.samples_per_second(self.job.schedule.batch_size),
            **({} if dropped is None else {"tokens_dropped": dropped}),
            **({"bad_samples": sum(progress.bad_samples.values())} if progress.bad_samples else {}),
        }

    def collect(self) -> None:
        """Add to `progress` what ranks, layers and device still hold: bad samples, dropped choices, shares of the loss.

        Every rank must call it. Raises UserError, on all of them, if too many samples are bad.
        """
        self._collect_bad()
        self._collect_energy()
        for layer in self.layers.values():
            dropped, routed = layer.take_dropped()
            self.progress.dropped += distributed.sum_over_ranks(dropped)
            self.progress.routed += distributed.sum_over_ranks(routed)
        if not self._first_terms:
            return
        terms_SM = torch.stack([torch.stack([term.float() for term in terms.values()]) for terms in self._first_terms])
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(terms_SM)
        shares_M = (terms_SM / terms_SM.sum(1, keepdim=True)).sum(0)
        shares = self.progress.loss_shares
        for name, share in zip(self._first_terms[0], shares_M.tolist(), strict=True):
            shares[name] = shares.get(name, 0.0) + share
        self.progress.share_steps += len(self._first_terms)
        self._first_terms.clear()

    def _collect_energy(self) -> None:
        """Add up what the ranks' devices have drawn, where all of them tell, and did so in earlier sessions."""
        mine = self._energy.joules() if self._energy else None
        unknown, millijoules = map(distributed.sum_over_ranks, (int(mine is None), int((mine or 0.0) * 1000)))
        before = self._joules_before
        self.progress.joules = None if unknown or before is None else before + millijoules / 1000

    def _collect_bad(self) -> None:
        """Sum up the bad samples that the ranks have met, judge whether they are too many, and hand on the new ones."""
        progress, new = self.progress, dict[int, Bad]()
        if distributed.sum_over_ranks(len(self._bad)):
            met = [bad for part in distributed.from_all(self._bad) for bad in part]
            Tally(progress.bad_samples, progress.first_bad).add(met)
            new = {bad.number: bad for bad in met if bad.number not in self._known_bad}
        self.data.judge(progress.bad_samples, progress.first_bad, progress.step * self.job.schedule.batch_size)
        if new and distributed.is_main():  # not where the run ends: its line names what was met
            self.data.found(list(new.values()))
        self._known_bad |= new.keys()
        self._bad = []
