"""Row 15: the linear probe of `few-shot` and `linear-probe` against CLIP_benchmark's own."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clip_benchmark_probe import WORKERS, linear_probe
from bench.rows import Row, Settings, SkippedError, measures
from bench.timing import Sample, Step, clock, interleave, ratio_row
from upcycle_bench.probe import Examples, Recipe, fit

CLASSES, WIDTH, SHOTS, NOISE = 10, 128, 16, 4.0  # the lab's digits at 16 shots, and features as wide as its own
TOLERANCE = 0.005  # of the accuracies: rounding may move a sample of 400 across a border


class Problem(NamedTuple):
    """What both sides train on, choose the weight decay with, and are tested on."""

    train: Examples
    validation: Examples
    test: Examples

    def accuracy(self, logits_NC: Tensor) -> float:
        """Share of the test samples that are right."""
        return (logits_NC.argmax(dim=1) == self.test.label_N).double().mean().item()


def problem() -> Problem:
    """Unit vectors around a direction for each class: 16 shots, 10 for validation, 40 for the test."""
    generator = torch.Generator().manual_seed(0)
    centre_CD = torch.randn(CLASSES, WIDTH, generator=generator)

    def examples(each: int) -> Examples:
        label_N = torch.arange(CLASSES).repeat(each)
        features_ND = centre_CD[label_N] + NOISE * torch.randn(len(label_N), WIDTH, generator=generator)
        return Examples(F.normalize(features_ND, dim=1), label_N)

    return Problem(examples(SHOTS), examples(10), examples(40))


def sides(given: Problem, workers: int, found: dict[str, tuple[float, float]]) -> tuple[Step, Step]:
    """Their probe and ours, search and last training; each puts (weight decay, accuracy) into `found`."""

    def theirs() -> None:
        decay, logits_NC = linear_probe(*given, CLASSES, workers=workers)
        found["theirs"] = decay, given.accuracy(logits_NC)

    def ours() -> None:
        fitted = fit(given.train, given.validation, CLASSES, Recipe(), refit=True)
        found["ours"] = fitted.weight_decay, given.accuracy(fitted.logits(given.test.features_ND))

    return theirs, ours


def clock_with_workers(step: Callable[[], None], calls: int, device: torch.device) -> Sample:
    """As `clock`, with the CPU time of the loaders' processes, which have ended with each pass over the data."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    sample = clock(step, calls, device)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return sample._replace(cpu=sample.cpu + children / calls)


@measures(15)
def linear_probes(settings: Settings) -> Iterator[Row]:
    """CLIP_benchmark's linear probe / ours, with its default of four workers (one round) and without (three at most).

    Same features, epochs, batches, precision, threads and weight-decay search, and equal accuracy, which is checked.
    """
    if settings.device.type != "cpu":
        raise SkippedError("the port of CLIP_benchmark's probe is for the CPU")
    for workers, goal, rounds in ((WORKERS, ">= 15", 1), (0, ">= 4", settings.few_rounds)):
        found: dict[str, tuple[float, float]] = {}
        theirs, ours = sides(problem(), workers, found)
        ours()  # what is slow only once is not their side's gain
        above, below = interleave([theirs, ours], rounds, settings.device, warm=False, clock=clock_with_workers)
        if abs(found["theirs"][1] - found["ours"][1]) > TOLERANCE:
            raise RuntimeError(f"accuracies differ, (weight decay, accuracy): {found}")
        name = f"CLIP_benchmark's linear probe / ours, {CLASSES} classes, {SHOTS} shots, {workers or 'no'} workers"
        yield ratio_row(name, goal, above, below)
