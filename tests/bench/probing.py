"""Row 15: the linear probe of `few-shot` and `linear-probe` against CLIP_benchmark's own.

`python -m tests.bench.probing WORKERS ROUNDS THREADS` prints both sides' samples and (weight decay, accuracy) as JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.clip_benchmark_probe import WORKERS, linear_probe
from tests.bench.rows import Row, Settings, SkippedError, measures
from tests.bench.timing import Sample, Step, clock, interleave, ratio_row
from upcycle_bench.evaluation.probe import Examples, Recipe, fit

CLASSES, WIDTH, SHOTS, NOISE = 50, 512, 16, 5.0  # features as wide as ViT-B/32's
TOLERANCE = 0.005  # of the accuracies: rounding may move a sample of 1,000 across a border


class Problem(NamedTuple):
    """What both sides train on, choose the weight decay with, and are tested on."""

    train: Examples
    validation: Examples
    test: Examples

    def accuracy(self, logits_NY: Tensor) -> float:
        """Share of the test samples that are right."""
        return (logits_NY.argmax(dim=1) == self.test.label_N).double().mean().item()


def problem() -> Problem:
    """Unit vectors around a direction for each class: 16 shots, 8 for validation, 20 for the test."""
    generator = torch.Generator().manual_seed(0)
    centre_YC = torch.randn(CLASSES, WIDTH, generator=generator)

    def examples(each: int) -> Examples:
        label_N = torch.arange(CLASSES).repeat(each)
        features_NC = centre_YC[label_N] + NOISE * torch.randn(len(label_N), WIDTH, generator=generator)
        return Examples(F.normalize(features_NC, dim=1), label_N)

    return Problem(examples(SHOTS), examples(8), examples(20))


def sides(given: Problem, workers: int, found: dict[str, tuple[float, float]]) -> tuple[Step, Step]:
    """Their probe and ours, search and last training; each puts (weight decay, accuracy) into `found`."""

    def theirs() -> None:
        decay, logits_NY = linear_probe(*given, CLASSES, workers=workers)
        found["theirs"] = decay, given.accuracy(logits_NY)

    def ours() -> None:
        fitted = fit(given.train, given.validation, CLASSES, Recipe(), refit=True)
        found["ours"] = fitted.weight_decay, given.accuracy(fitted.logits(given.test.features_NC))

    return theirs, ours


def clock_with_workers(step: Callable[[], None], calls: int, device: torch.device) -> Sample:
    """As `clock`, with the CPU time of the loaders' processes, which have ended with each pass over the data."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    sample = clock(step, calls, device)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return sample._replace(cpu=sample.cpu + children / calls)


def measured(workers: int, rounds: int) -> tuple[list[list[Sample]], dict[str, tuple[float, float]]]:
    """Samples of theirs and ours, in turns, and what both found."""
    found: dict[str, tuple[float, float]] = {}
    theirs, ours = sides(problem(), workers, found)
    ours()  # what is slow only once is not their side's gain
    return interleave([theirs, ours], rounds, warm=False, clock=clock_with_workers), found


@measures(15)
def linear_probes(settings: Settings) -> Iterator[Row]:
    """CLIP_benchmark's linear probe / ours, with its default of four workers (one round) and without (three at most).

    Same features, epochs, batches, precision, threads and weight-decay search, and equal accuracy, which is checked.
    In a process of their own: workers are forks, which cost the more, the more their parent holds.
    """
    if settings.device.type != "cpu":
        raise SkippedError("the port of CLIP_benchmark's probe is for the CPU")
    for workers, goal, rounds in ((WORKERS, ">= 15", 1), (0, ">= 4", settings.few_rounds)):
        command = [sys.executable, "-m", "tests.bench.probing", *map(str, (workers, rounds, settings.threads))]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        samples, found = json.loads(child.stdout)
        if abs(found["theirs"][1] - found["ours"][1]) > TOLERANCE:
            raise RuntimeError(f"accuracies differ, (weight decay, accuracy): {found}")
        name = f"CLIP_benchmark's linear probe / ours, {CLASSES} classes, {SHOTS} shots, {workers or 'no'} workers"
        yield ratio_row(name, goal, *([Sample(*sample) for sample in side] for side in samples))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(measured(int(sys.argv[1]), int(sys.argv[2]))))
