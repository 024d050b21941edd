"""What a row of the benchmark is, and which there are.

@measures(1)
def moe_layer(settings: Settings) -> Iterator[Row]: ...      # one or more rows for goal number 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all rows of one run share."""

    threads: int = 2
    rounds: int = 5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def few_rounds(self) -> int:
        """For rows of which one round takes many seconds."""
        return min(self.rounds, 3)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number, the median of several rounds, with what else the table shows of it.

    goal: `<= 1.1` or `>= 2.5`, "" where there is none; cpu: the same from CPU time; sides: the median seconds of what
    was divided and of what it was divided by; floor: seconds that our side would take at this machine's measured rates.
    """

    name: str
    goal: str
    value: float
    min: float
    max: float
    unit: str = "ratio"
    cpu: float | None = None
    sides: tuple[float, float] | None = None
    floor: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median meets the goal; None without one."""
        if not self.goal:
            return None
        relation, bound = self.goal.split()
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


class SkippedError(Exception):
    """A row that this machine cannot measure, and why."""


Measure = Callable[[Settings], Iterator[Row]]
MEASURES: dict[int, Measure] = {}


def measures(number: int) -> Callable[[Measure], Measure]:
    """Register what measures the goal of that number."""

    def register(measure: Measure) -> Measure:
        assert number not in MEASURES, f"goal {number} is measured twice"
        MEASURES[number] = measure
        return measure

    return register
