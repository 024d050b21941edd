"""Two things timed in turns (A B A B ...), so that a machine that slows down slows both; wall and CPU time.

samples = interleave([a, b], rounds=5)                 # samples[0][3]: what a took in round 3
row = compare("a / b", "<= 1.1", a, b, settings)       # ratios of the rounds: median, least, greatest
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from tests.bench.rows import Row, Settings

SHORTEST = 0.2  # seconds a sample should last at least: shorter calls are repeated
Step = Callable[[], Any]


class Sample(NamedTuple):
    """Seconds of one call; `cpu` is that of all threads of this process (of children, where they did the work)."""

    wall: float
    cpu: float


def clock(step: Step, calls: int, device: torch.device) -> Sample:
    """Mean of that many calls. On CUDA by events, from an idle device to an idle one. Results are freed afterwards."""
    cpu = time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = [step() for _ in range(calls)]
        end.record()
        torch.cuda.synchronize(device)
        wall = start.elapsed_time(end) / 1e3
    else:
        began = time.perf_counter()
        kept = [step() for _ in range(calls)]
        wall = time.perf_counter() - began
    cpu = time.process_time() - cpu
    del kept
    return Sample(wall / calls, cpu / calls)


Clock = Callable[[Step, int, torch.device], Sample]


def interleave(
    steps: Sequence[Step],
    rounds: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    *,
    shortest: float = SHORTEST,
    warm: bool = True,
    clock: Clock = clock,
    before_each: Step = lambda: None,
) -> list[list[Sample]]:
    """Samples by step and round; one round more warms up and says how often all are called for one sample.

    `before_each` is called before each sample, beside the clock.
    """
    calls = 1
    if warm:
        fastest = min(clock(step, 1, device).wall for step in steps)
        if fastest < shortest:  # the first call of all is slower, so it does not say how long one lasts
            fastest = min(clock(step, 1, device).wall for step in steps)
        calls = max(1, math.ceil(shortest / max(fastest, 1e-9)))
    samples: list[list[Sample]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, taken in zip(steps, samples, strict=True):
            before_each()
            taken.append(clock(step, calls, device))
    return samples


def compare(
    name: str,
    goal: str,
    above: Step,
    below: Step,
    settings: Settings,
    *,
    rounds: int | None = None,
    warm: bool = True,
    settle: int = 0,
    before_each: Step = lambda: None,
    floor: float | None = None,
) -> Row:
    """The row of `above` / `below`, each called `settle` times before."""
    for _ in range(settle):
        above()
        below()
    first, second = interleave(
        [above, below], rounds or settings.rounds, settings.device, warm=warm, before_each=before_each
    )
    return ratio_row(name, goal, first, second, floor=floor)


def ratio_row(
    name: str, goal: str, above: Sequence[Sample], below: Sequence[Sample], *, floor: float | None = None
) -> Row:
    """The ratio of each round's pair: its median and bounds in wall time, its median in CPU time."""
    ratios = [a.wall / b.wall for a, b in zip(above, below, strict=True)]
    busy = [a.cpu / b.cpu for a, b in zip(above, below, strict=True) if b.cpu > 0]
    return Row(
        name=name,
        goal=goal,
        value=statistics.median(ratios),
        min=min(ratios),
        max=max(ratios),
        cpu=statistics.median(busy) if busy else None,
        sides=(statistics.median(a.wall for a in above), statistics.median(b.wall for b in below)),
        floor=floor,
    )


def seconds_row(name: str, goal: str, samples: Sequence[Sample], less: Sequence[Sample] = ()) -> Row:
    """Seconds, median and bounds; `less` is taken off, round by round."""
    off = less or [Sample(0.0, 0.0)] * len(samples)
    walls = [a.wall - b.wall for a, b in zip(samples, off, strict=True)]
    busy = statistics.median(a.cpu - b.cpu for a, b in zip(samples, off, strict=True))
    sides = (statistics.median(a.wall for a in samples), statistics.median(b.wall for b in less)) if less else None
    return Row(
        name=name,
        goal=goal,
        value=statistics.median(walls),
        min=min(walls),
        max=max(walls),
        unit="s",
        cpu=busy,
        sides=sides,
    )
