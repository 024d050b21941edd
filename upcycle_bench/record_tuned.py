"""What a record says of a tuned row: every configuration that was tried, how it scored, and what all of that cost.

    tuned = TunedPart(protocol="lab-dev", headline="shift", candidates=(usual, other), ...)
    tuned.winner.config, tuned.flops        # by the protocol's rule; of all candidates and seeds

`upcycle_bench.record` exports it. The winner and the sums are computed, never written, so they cannot disagree.
"""

from __future__ import annotations

import statistics

from pydantic import Field, JsonValue, model_validator

from upcycle_bench.protocol import Frozen, TuningRule

TUNED = "[tuned]"  # behind a strategy's name: its one tuned row


class TuningRun(Frozen):
    """One run of a candidate on the tuning protocol: its score there, and its charged FLOPs and seconds."""

    run_id: str = Field(pattern=r"^[A-Za-z0-9_-]{8,}$")
    seed: int = Field(ge=0, description="of initialisation and of training")
    value: float = Field(description="the headline score that decides")
    flops: int | None = Field(ge=0, description="of all phases that are charged; None: not counted")
    seconds: float = Field(ge=0)


class Candidate(Frozen):
    """One configuration that was tried."""

    label: str = Field(min_length=1)
    config: dict[str, JsonValue] = Field(description="resolved configuration")
    runs: tuple[TuningRun, ...] = Field(min_length=1)

    @property
    def mean(self) -> float:
        """Its score, as a mean over the tuning seeds."""
        return statistics.fmean(run.value for run in self.runs)


class TunedPart(Frozen):
    """How the configuration of a tuned row was chosen. The first candidate has the protocol's defaults."""

    protocol: str = Field(min_length=1, description="on which the candidates were scored")
    headline: str = Field(min_length=1, description="the headline score that decided")
    higher_is_better: bool
    rule: TuningRule
    seeds: tuple[int, ...] = Field(min_length=1, description="of the candidates' runs; no reported run has one")
    candidates: tuple[Candidate, ...] = Field(min_length=1)

    @property
    def winner(self) -> Candidate:
        """The candidate with the best mean; of equal ones the first, so that the defaults win a tie."""
        sign = 1 if self.higher_is_better else -1
        return max(self.candidates, key=lambda candidate: sign * candidate.mean)

    @property
    def flops(self) -> int | None:
        """The charged FLOPs of all runs of all candidates; None where one of them was not counted."""
        known = [run.flops for candidate in self.candidates for run in candidate.runs]
        return None if None in known else sum(flops or 0 for flops in known)

    @property
    def seconds(self) -> float:
        """The seconds of all runs of all candidates."""
        return sum(run.seconds for candidate in self.candidates for run in candidate.runs)

    @property
    def mark(self) -> str:
        """What stands behind the label of the row: `ratio=0.75, the best of 3 tried`."""
        options = self.winner.label.partition("[")[2].removesuffix("]") or "its defaults"
        return f"{options}, the best of {len(self.candidates)} tried"

    @model_validator(mode="after")
    def _alike(self) -> TunedPart:
        if len({candidate.label for candidate in self.candidates}) < len(self.candidates):
            raise ValueError("two candidates have the same label")
        for candidate in self.candidates:
            if tuple(run.seed for run in candidate.runs) != self.seeds:
                raise ValueError(f"{candidate.label} was not run with the tuning seeds {list(self.seeds)}, each once")
        return self
