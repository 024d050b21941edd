"""Checks of the curve of held-out pairs: it can be one of this training, and lies where those of sound runs do.

for what in curve(sent, here): ...              # a line for each fault; Warned for a point outside of its interval
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from upcycle_bench.reporting.expected_curves import ENOUGH, STRATEGIES, outside, read_curves
from upcycle_bench.reporting.sent import Here, Sent, Unchecked, Warned


def curve(sent: Sent, here: Here) -> Iterator[str]:
    """Its steps and pairs are the protocol's, its scores can be; and it is inside the reference curves' intervals."""
    record, made = sent.record, sent.record.validation
    phases = record.cost.phases if record.cost else {}
    if record.cost is not None and ("validate" in phases) != (made is not None):
        yield "a curve goes with the phase `validate`, and one of them is missing"
    if made is None:
        return
    wanted = sent.protocol.validation if sent.protocol else None
    if wanted is None or not wanted.every:
        yield "there is a curve, and its protocol wants none"
        return
    if made.set != wanted.set or made.pairs > wanted.pairs:
        yield f"{made.pairs:,} pairs of {made.set}, the protocol has {wanted.pairs:,} of {wanted.set}"
    steps = [step for step, _ in made.points]
    if odd := [step for step in steps if step % wanted.every and step != sent.steps]:
        yield f"a score at step {odd[0]:,}, the protocol wants one every {wanted.every:,} steps"
    if steps[-1] != sent.steps:
        yield f"the curve ends at step {steps[-1]:,}, the training at {sent.steps:,}"
    most = math.log(made.pairs)
    if not 0 < made.chance <= most:
        yield f"guessing has a log rank of {made.chance:.6g}; among {made.pairs:,} pairs it is between 0 and {most:.6g}"
    for step, score in made.points:
        if not 0 <= score <= most:
            yield f"step {step:,}: {score:.6g}; among {made.pairs:,} pairs a log rank is between 0 and {most:.6g}"
    yield from _by_reference(sent)


def _by_reference(sent: Sent) -> Iterator[str]:
    """Warnings for the steps at which another run of this strategy would not be there."""
    label = sent.record.strategy.label
    if label not in STRATEGIES or sent.record.protocol.division != "closed":
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
