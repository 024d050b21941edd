"""Checks of the curve of held-out pairs: it can be one of this training, and lies where those of sound runs do.

for what in curve(sent, here): ...              # a line for each fault; Warned for a point outside of its interval
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from upcycle_bench.record import ValidationPart
from upcycle_bench.reporting.expected_curves import ENOUGH, STRATEGIES, outside, read_curves
from upcycle_bench.reporting.sent import Here, Sent, Unchecked, Warned


def curve(sent: Sent, here: Here) -> Iterator[str]:
    """Its steps and pairs are the protocol's, its scores can be; and it is inside the reference curves' intervals."""
    record, made = sent.record, sent.record.validation
    phases = record.cost.phases if record.cost else {}
    if made is not None and "validate" not in phases:
        yield "the curve's cost, the phase `validate`, is missing"
    wanted = sent.protocol.validation if sent.protocol else None
    if made is None:
        if wanted is not None and wanted.every and "train" in phases:
            yield Unchecked(
                "there is no curve, though its protocol wants one: the set was not there, or a cached training"
            )
        return
    if wanted is None or not wanted.every:
        yield "there is a curve, and its protocol wants none"
        return
    if (made.set, made.every) != (wanted.set, wanted.every) or made.pairs > wanted.pairs:
        yield (
            f"{made.pairs:,} pairs of {made.set} every {made.every:,} steps, the protocol has {wanted.pairs:,} of "
            f"{wanted.set} every {wanted.every:,}"
        )
    yield from _steps(sent, made)
    most = math.log(made.pairs)
    if not 0 < made.chance <= most:
        yield f"guessing has a log rank of {made.chance:.6g}; among {made.pairs:,} pairs it is between 0 and {most:.6g}"
    for step, score in made.points:
        if not 0 <= score <= most:
            yield f"step {step:,}: {score:.6g}; among {made.pairs:,} pairs a log rank is between 0 and {most:.6g}"
    yield from _by_reference(sent)


def _steps(sent: Sent, made: ValidationPart) -> Iterator[str]:
    """The curve has all its points; of a training that was resumed with other pairs, those since then."""
    steps, wanted = [step for step, _ in made.points], [*range(0, sent.steps, made.every), sent.steps]
    if steps == wanted:
        return
    if len(sent.record.sessions or ()) > 1 and steps == wanted[-len(steps) :]:
        yield Unchecked(f"the curve begins at step {steps[0]:,}: the training was resumed with other held-out pairs")
        return
    odd = sorted({*steps} ^ {*wanted})
    yield f"a score every {made.every:,} steps of {sent.steps:,}, but step {odd[0]:,} is missing or too many"


def _by_reference(sent: Sent) -> Iterator[str]:
    """Warnings for the steps at which another run of this strategy would not be there."""
    label = sent.record.strategy.label
    if label not in STRATEGIES or sent.record.protocol.division != "closed":
        return
    if sent.protocol is not None and sent.protocol.dense.source == "pretrain":  # another dense model on each machine
        return
    made, fingerprint = sent.record.validation, sent.record.protocol.training_fingerprint
    assert made is not None
    found = outside(read_curves(), label, fingerprint, made.identity, made.points)
    if found is None:
        yield Unchecked(f"fewer than {ENOUGH} other curves of {label} are stored for its protocol, data and pairs")
        return
    if found:
        first, where = found[0], ", ".join(f"{each.step:,}" for each in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        yield Warned(
            f"the held-out score at step {where}{more} is not where other runs of {label} are: at step "
            f"{first.step:,} it is {first.score:.4f}, theirs give {first.low:.4f} to {first.high:.4f} "
            f"({first.seeds} seeds)"
        )
