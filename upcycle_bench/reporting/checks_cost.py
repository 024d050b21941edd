"""Checks of cost, time and lines of metrics: what a training of that many steps on that many pairs has to look like.

for what in cost(sent, here): ...                # a line for each fault; Unchecked for what cannot be computed here
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from upcycle_bench.planning.estimate import estimate
from upcycle_bench.protocol import learning_rate
from upcycle_bench.reporting.checks_identity import strategy_of
from upcycle_bench.reporting.sent import Here, Sent, Unchecked

FASTEST = 2e16  # FLOPs of one device in a second: no device does as many
LATE = timedelta(hours=1)  # that a clock may be ahead
# Of an estimate, whose texts are as long as can be, and which leaves the strategy's own loss out.
FLOPS = (1 / 3, 4.0)
COUNTED = 8  # at most so many steps are counted and left out of `samples_per_second`


def cost(sent: Sent, here: Here) -> Iterator[str]:
    """Steps times batch are the pairs; a training has FLOPs, seconds and a speed that fit; so do ranks, parameters."""
    made, protocol = sent.record.cost, sent.protocol
    if made is None:
        return
    if made.parameters_active > made.parameters_total:
        yield f"{made.parameters_active:,} active parameters of {made.parameters_total:,}"
    if "evaluate" not in made.phases and sent.record.scores:
        yield "there are scores, and no evaluation that made them"
    for name, phase in made.phases.items():
        flops = phase.flops or 0
        if phase.steps and not (phase.seconds and phase.samples):
            yield f"{name}: {phase.steps:,} steps on {phase.samples:,} pairs in {phase.seconds:g} s"
        if phase.steps and phase.flops == 0:
            yield f"{name}: {phase.steps:,} steps without FLOPs"
        if flops > FASTEST * phase.seconds * made.world_size:
            yield f"{name}: {flops:.3g} FLOPs in {phase.seconds:g} s on {made.world_size} ranks, faster than any device"
    if protocol is None:
        return
    batch, train = protocol.train.schedule.batch_size, made.phases.get("train")
    if made.samples != (pairs := sum(phase.steps for phase in made.phases.values()) * batch):
        yield f"{made.samples:,} pairs, steps times batch are {pairs:,}"
    if batch % made.world_size:
        yield f"{made.world_size} ranks cannot share a batch of {batch}"
    if train is None:
        return
    if train.samples != train.steps * batch:
        yield f"train: {train.samples:,} pairs, {train.steps:,} steps of {batch} are {train.steps * batch:,}"
    speed = made.samples_per_second
    if not speed:
        yield "a training without a speed"
    elif (train.steps - COUNTED) * batch / speed > 1.01 * train.seconds + 1:
        yield f"train: {train.samples:,} pairs in {train.seconds:g} s, but {speed:g} pairs/s"


def training(sent: Sent, here: Here) -> Iterator[str]:
    """The protocol's steps, or those of a strategy with a number of its own; and FLOPs near those of an estimate."""
    if sent.record.cost is None or sent.protocol is None:
        return
    strategy = strategy_of(sent, here)
    if isinstance(strategy, str) or sent.foreign_model:
        yield Unchecked(strategy if isinstance(strategy, str) else str(sent.foreign_model))
        return
    label, wanted = sent.record.strategy.label, estimate(sent.protocol, strategy)
    if sent.steps != wanted.steps:
        yield f"{sent.steps:,} training steps, {label} has {wanted.steps:,} under this protocol"
    train = sent.record.cost.phases.get("train")
    if train is not None and train.flops is not None and wanted.train_flops:
        least, most = (wanted.train_flops * bound for bound in FLOPS)
        if not least <= train.flops <= most:
            yield f"{train.flops:.3g} training FLOPs, {label} has about {wanted.train_flops:.3g} under this protocol"


def times(sent: Sent, here: Here) -> Iterator[str]:
    """Not made in the future; sessions follow each other, on a number of ranks, and take the time of the training."""
    record = sent.record
    if record.created_at > here.now + LATE:
        yield f"created {record.created}, which is still to come"
    sessions = record.sessions or []
    for session in sessions:
        if _time(session.started) > record.created_at + LATE:
            yield f"a session began {session.started}, after the record was written, {record.created}"
        if session.first_step > session.last_step:
            yield f"a session went from step {session.first_step} back to {session.last_step}"
    for before, after in itertools.pairwise(sessions):
        if after.first_step > before.last_step:
            yield f"no session made the steps from {before.last_step} to {after.first_step}"
    train = record.cost.phases.get("train") if record.cost else None
    if not sessions or train is None or record.cost is None:
        return
    if sessions[0].first_step or sessions[-1].last_step != train.steps:
        yield f"the sessions go from step {sessions[0].first_step} to {sessions[-1].last_step}, not to {train.steps}"
    if (record.created_at - _time(sessions[0].started) + LATE).total_seconds() < train.seconds:
        yield f"a training of {train.seconds:,.0f} s between {sessions[0].started} and {record.created}"


def metrics(sent: Sent, here: Here) -> Iterator[str]:
    """Lines in the order of the steps, whose last agrees with the record; losses and learning rates that fit."""
    made, protocol, lines = sent.record.cost, sent.protocol, sent.lines
    if made is None or "train" not in made.phases or protocol is None:
        return
    if lines is None:
        if sent.metrics is None:
            yield f"{sent.path.with_suffix('.jsonl').name} is missing; copy it from where the run was made"
        return
    counted: list[Any] = [line.get("step") for line in lines]
    if not counted or any(type(step) is not int for step in counted):
        yield "no lines, or lines without a step"
        return
    if counted != sorted(set(counted)):
        yield "the steps of its lines do not ascend"
    if counted[-1] != sent.steps:
        yield f"the last line is of step {counted[-1]}, the training had {sent.steps:,}"
    schedule = protocol.train.schedule
    for line in lines:
        where = f"step {line['step']}"
        numbers: list[Any] = [line.get(name) for name in ("loss", "learning_rate", "logit_scale")]
        loss, rate, scale = numbers
        if not all(isinstance(value, float | int) for value in numbers):
            yield f"{where}: no loss, learning rate or logit scale"
            return
        # The strategy's own terms stand between the loss and the learning rate.
        names = list(line)
        terms = [line[name] for name in names[names.index("loss") + 1 : names.index("learning_rate")]]
        if not math.isclose(loss, math.fsum(terms), rel_tol=1e-4, abs_tol=1e-4):
            yield f"{where}: the loss is {loss:.6g}, its terms add up to {math.fsum(terms):.6g}"
        usual = learning_rate(line["step"] - 1, sent.steps, protocol.peak_lr, schedule.warmup_fraction)
        if not math.isclose(rate, usual, rel_tol=1e-6):
            yield f"{where}: learning rate {rate:.6g}, the protocol's is {usual:.6g}"
        if scale > math.exp(schedule.logit_scale_max) * 1.001:
            yield f"{where}: logit scale {scale:.6g}, above the protocol's clamp"
    last = lines[-1]
    for name, said in (("tokens_dropped", made.tokens_dropped), ("samples_per_second", made.samples_per_second)):
        if last.get(name) != said:
            yield f"the last line has {name} {last.get(name)}, the record {said}"


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
