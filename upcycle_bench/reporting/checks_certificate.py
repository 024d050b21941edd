"""Checks of the certificate: there is one, and it says nothing that the evaluation would have refused.

for what in certificate(sent, here): ...         # a line for each fault; Unchecked where a suite gives none
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from upcycle_bench.evaluation.certificate import ALLOWED, MARGIN, MOVED, REPEATS
from upcycle_bench.evaluation.shuffled_labels import LIMIT, ROUNDED, together
from upcycle_bench.record import CertificatePart, RepeatPart
from upcycle_bench.reporting.sent import Here, Sent, Unchecked


def certificate(sent: Sent, here: Here) -> Iterator[str]:
    """Repeats, controls and counts within what a certificate may say, and in agreement with the rest of the record."""
    record, found = sent.record, sent.record.certificate
    if record.status != "ok":
        return
    suites = dict.fromkeys(score.suite for score in record.scores)
    if found is None:
        others = [name for name in suites if not _ours(here, name)]
        why = "there is none, so nothing says that the scores are sound"
        yield Unchecked(f"there is none; {', '.join(others)} may encode by itself") if others else why
        return
    if [(part.batch_size, part.shuffled) for part in found.repeats] != list(REPEATS):
        yield "its repetitions are not those of a certificate"
    for part in (*found.repeats, *([found.reloaded] if found.reloaded else [])):
        yield from _repeat(part, found.predictions)
    if found.reloaded is None:
        yield "the saved file was not loaded and compared, though every run saves one"
    yield from _controls(found, set(suites))
    layers = record.receipt and record.receipt.get("layers")
    if isinstance(layers, dict) and bool(layers) != bool(found.choices_routed):
        yield f"{found.choices_routed:,} choices were routed, the model has {len(layers)} layers of experts"
    tuned = [name for name in suites if _ours(here, name) and here.registry.suites[name].target.info.tunes]
    if missing := [name for name in tuned if name not in (found.uncovered or "").split(", ")]:
        yield f"it covers {', '.join(missing)}, which trains copies"


def _repeat(part: RepeatPart, predictions: int) -> Iterator[str]:
    how = f"batches of {part.batch_size}"
    if part.differing != len(part.margins):
        yield f"{how}: {part.differing} predictions differ, {len(part.margins)} are explained"
    if part.differing > max(1, predictions // ALLOWED):
        yield f"{how}: {part.differing} of {predictions} predictions differ"
    if any(not margin < MARGIN for margin in part.margins):
        yield f"{how}: a margin above {MARGIN:g} explains nothing"
    if part.largest_distance > MOVED and not part.differing:
        yield f"{how}: an embedding moved by {part.largest_distance:g}, and no prediction differs"


def _controls(found: CertificatePart, suites: set[str]) -> Iterator[str]:
    if not found.controls and not found.uncontrolled:
        yield "it has no control with shuffled labels, and does not say why"
    for control in found.controls:
        name = f"{control.suite} on {control.dataset} with shuffled {control.permuted}"
        if control.suite not in suites:
            yield f"{name}: the record has no score of that suite"
        if control.permuted == "classes":
            if control.bound is None or control.value > control.bound + ROUNDED:
                yield f"{name}: {control.value:.4f}, names alone reach at most {control.bound}"
            continue
        if control.z is None or len(control.z_of_draws) != control.draws:
            yield f"{name}: {control.draws} draws, the distances of {len(control.z_of_draws)}"
        elif control.z >= LIMIT:
            yield f"{name}: {control.z:.1f} standard errors better than chance"
        elif not math.isclose(control.z, together(control.z_of_draws), rel_tol=1e-6, abs_tol=1e-6):
            yield f"{name}: z is {control.z:.4f}, its draws give {together(control.z_of_draws):.4f}"


def _ours(here: Here, suite: str) -> bool:
    entry = here.registry.suites.get(suite)
    return entry is not None and entry.distribution == "upcycle-bench"
