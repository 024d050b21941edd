"""The schema of a record: what is written of one run, as strict pydantic models. `upcycle_bench.record` exports it.

A failed run has a record too, with a reason; an interrupted run has none. No number is NaN or infinite. Where a record
is made, a ValidationError is a bug of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, model_validator

from upcycle_bench.protocol import Frozen
from upcycle_bench.record_evaluation import CertificatePart, Headline, ScoreRecord
from upcycle_bench.record_tuned import TunedPart

SCHEMA_VERSION = 2

Name = Annotated[str, Field(min_length=1)]
PhaseName = Literal["prepare", "calibrate", "upcycle", "train", "validate", "evaluate"]


def _real_time(text: str) -> str:
    datetime.fromisoformat(text.replace("Z", "+00:00"))
    return text


Timestamp = Annotated[
    str,
    Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?(Z|\+00:00)$", description="ISO 8601, UTC"),
    AfterValidator(_real_time),
]


class Part(Frozen):
    """Base of the record and its parts: strict, frozen, and no number that JSON cannot write."""

    model_config = ConfigDict(allow_inf_nan=False)


def kind_of(status: str, reconstructed: Sequence[str]) -> str:
    """What has to stand wherever a strategy's name stands: its status, or "parts reconstructed"; "": published."""
    if status == "published":
        return "parts reconstructed" if reconstructed else ""
    return status


class StrategyPart(Part):
    """The strategy as configured, and the package that brought it."""

    name: Name
    label: Name = Field(description="the row's name: `btx`, `btx[k=2]` off its defaults, or `btx[tuned]`")
    config: dict[str, JsonValue] = Field(description="resolved configuration")
    tuned: TunedPart | None = Field(default=None, description="of a tuned row: how its configuration was chosen")
    moe: dict[str, JsonValue] | None = Field(default=None, description="MoE settings where not the protocol's")
    status: Literal["published", "reconstructed", "control", "unpublished"]
    reconstructed: tuple[str, ...] = Field(description="parts that the paper leaves open and we had to choose")
    footing: str = Field(default="", description="what is not as for all others, and is charged or told instead")
    paper: str
    code: str | None = Field(default=None, description="fingerprint of its code")
    distribution: str
    version: str

    @property
    def kind(self) -> str:
        """What has to stand wherever the label stands (`kind_of`)."""
        return kind_of(self.status, self.reconstructed)

    @property
    def mark(self) -> str:
        """`kind`, what is not the same for this strategy as for others, and what tuning chose."""
        return "; ".join(filter(None, [self.kind, self.footing, self.tuned.mark if self.tuned else ""]))

    @property
    def off_defaults(self) -> bool:
        """Whether somebody set options, other than by the protocol's tuning rule: that opens the division."""
        return self.label != self.name and self.tuned is None


class ProtocolPart(Part):
    """What all runs of a table have in common: only equal fingerprints share a table."""

    name: Name
    division: Literal["closed", "open"]
    overrides: tuple[str, ...] = Field(description="`--set` values; any of them opens the division")
    unequal: str | None = Field(
        default=None, description="why the built model opens the division: its cost is not that of the protocol's MoE"
    )
    training_fingerprint: Name
    shared_fingerprint: str | None = Field(
        default=None, description="where `unequal`: the training fingerprint that runs of equal cost have"
    )
    suite_fingerprints: dict[str, str] = Field(description="suite -> fingerprint")
    resolved: dict[str, JsonValue]

    @model_validator(mode="after")
    def _overrides_open(self) -> ProtocolPart:
        if (self.overrides or self.unequal) and self.division == "closed":
            raise ValueError("a run with overrides, or of another cost, belongs in the open division")
        return self


class Seeds(Part):
    """Seeds of the initialisation (the strategy's randomness) and of training (data order, augmentation, dropout)."""

    init: int = Field(ge=0)
    train: int = Field(ge=0)


class PhaseCost(Part):
    """The cost of one phase; `flops` is None where they were not counted."""

    seconds: float = Field(ge=0)
    flops: int | None = Field(ge=0)
    peak_memory_bytes: int = Field(ge=0)
    samples: int = Field(default=0, ge=0, description="training pairs that models of this phase saw, trained on or not")
    steps: int = Field(default=0, ge=0, description="optimiser steps, each of a batch")
    joules: float | None = Field(
        default=None,
        ge=0,
        description="of the phases `train` and `validate` together: the ranks' GPUs by NVML, or each machine's CPU "
        "packages by RAPL, whatever else runs on them; None: not reported",
    )


class Cost(Part):
    """The cost of the run. A phase that did not run is absent; all but `evaluate` are charged to the strategy."""

    phases: dict[PhaseName, PhaseCost]
    counting_rule: Name = Field(description="how FLOPs were counted")
    parameters_total: int = Field(ge=1)
    parameters_active: int = Field(ge=1, description="used per token")
    tokens_dropped: float | None = Field(ge=0, le=1, description="fraction of training tokens over capacity")
    samples: int = Field(ge=0, description="pairs trained on, preparation included; `phases` has the parts")
    samples_per_second: float | None = Field(ge=0)
    world_size: int = Field(ge=1)

    @property
    def charged(self) -> dict[PhaseName, PhaseCost]:
        """The phases that a strategy pays for."""
        return {name: phase for name, phase in self.phases.items() if name != "evaluate"}

    @property
    def charged_flops(self) -> int | None:
        """Their FLOPs; None if those of one phase are unknown, since the sum of the others would look too cheap."""
        known = [phase.flops for phase in self.charged.values()]
        return None if None in known else sum(flops or 0 for flops in known)


class SessionPart(Part):
    """One process group's share of the training; an interrupted training has several."""

    started: Timestamp
    hosts: list[str]
    world_size: int = Field(ge=1)
    ep_size: int = Field(ge=1)
    device: str
    versions: dict[str, str] = Field(description="of packages; a forced backend of experts; fast paths, where off")
    first_step: int = Field(ge=0, description="steps that were done when it began")
    last_step: int = Field(
        ge=0, description="of which the training kept its work: a later session did the others again"
    )


class ValidationPart(Part):
    """Scores of held-out pairs during the training: the mean log rank over both ways of retrieval; lower is better.

    They are measured in the precision of the training. The phase `validate` has their cost.
    """

    set: Name
    pairs: int = Field(ge=2)
    every: int = Field(
        ge=1, description="steps from one score to the next; there is one at the start and one at the end"
    )
    identity: Name = Field(description="of the pairs, their spacing and the precision: equal ones compare")
    chance: float
    points: tuple[tuple[int, float], ...] = Field(min_length=1, description="steps done, score")

    @model_validator(mode="after")
    def _ascending(self) -> ValidationPart:
        steps = [step for step, _ in self.points]
        if steps != sorted(set(steps)) or steps[0] < 0:
            raise ValueError("the steps of its points must ascend")
        return self


class DensePart(Part):
    """The dense model that was upcycled, as it was loaded."""

    model: Name
    pixels: dict[str, JsonValue] = Field(description="mean, std, interpolation, resize mode, size: of all images")
    interpolated: dict[str, str] = Field(description="position embeddings that were resized: 50x768 to 197x768")
    logit_bias: bool = Field(description="trained with the sigmoid loss; in the softmax loss here it has no part")


class Hashes(Part):
    """Content hashes: `weights` of the final model, `outcomes` of the .npz beside the record (set by `write`)."""

    dense: Name
    data: Name
    weights: str | None = None
    outcomes: str | None = None


class Record(Part):
    """One run. A run that failed may lack receipt, scores and cost."""

    schema_version: Literal[2]
    run_id: str = Field(pattern=r"^[A-Za-z0-9_-]{8,}$")
    created: Timestamp
    status: Literal["ok", "failed"]
    reason: str | None = None
    strategy: StrategyPart
    protocol: ProtocolPart
    dense: DensePart | None = Field(default=None, description="None: not loaded, or made before it was written")
    seeds: Seeds
    receipt: dict[str, JsonValue] | None = Field(
        default=None,
        description="the model at step 0: drift from the dense one, expert similarity, router entropy, load, and what "
        "the strategy notes",
    )
    scores: list[ScoreRecord] = Field(default_factory=list)
    headlines: dict[Name, Headline] = Field(
        default_factory=dict, description="headline scores of one suite, never mixed; tables rank by the first"
    )
    skipped: dict[str, str] = Field(default_factory=dict, description="suite, or suite/part -> why it did not run")
    suite_notes: dict[str, JsonValue] = Field(
        default_factory=dict, description="suite -> what it says of its data: classes, hashes of few-shot manifests"
    )
    diagnostics: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="the receipt's numbers after training, and each term's share of the loss at its start; of local "
        "data, the training pairs and the samples that are left out, by kind",
    )
    certificate: CertificatePart | None = Field(default=None, description="None: made before there were any")
    cost: Cost | None = None
    validation: ValidationPart | None = Field(default=None, description="None: there was none, or made before")
    sessions: list[SessionPart] | None = Field(default=None, description="of the training; None: none, or made before")
    environment: dict[str, JsonValue]
    hashes: Hashes
    command: list[str]

    @property
    def created_at(self) -> datetime:
        """`created` as a time."""
        return datetime.fromisoformat(self.created.replace("Z", "+00:00"))

    @property
    def division(self) -> Literal["closed", "open"]:
        """The division of its table: records from before options opened a run say "closed" where they are open."""
        return "open" if self.strategy.off_defaults else self.protocol.division

    @property
    def charged_flops(self) -> int | None:
        """All that the run costs before its evaluation, and all that its tuning cost; None where one is unknown."""
        known = [self.cost.charged_flops if self.cost else None]
        known += [self.strategy.tuned.flops] if self.strategy.tuned else []
        return None if None in known else sum(flops or 0 for flops in known)

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        if self.status != "ok" and not (self.reason or "").strip():
            raise ValueError(f"a run that is {self.status} needs a reason")
        keys = [(score.suite, score.dataset, score.metric) for score in self.scores]
        if len(set(keys)) < len(keys):
            raise ValueError("two scores have the same suite, dataset and metric")
        named = {score.headline for score in self.scores} - {""}
        if named != self.headlines.keys():
            raise ValueError(f"scores name the headlines {sorted(named)}, the record has {sorted(self.headlines)}")
        for name, headline in self.headlines.items():
            parts = [score for score in self.scores if score.headline == name]
            if any(score.higher_is_better is not headline.higher_is_better for score in parts):
                raise ValueError(f"headline {name}: a part has another direction")
            mean = sum(score.value for score in parts) / len(parts)
            if not math.isclose(mean, headline.value, abs_tol=1e-9):
                raise ValueError(f"headline {name} is {headline.value}, but the mean of its parts is {mean}")
        if self.status == "ok" and not (self.headlines and self.cost):
            raise ValueError("a run that is ok needs a headline score and its cost")
        return self


def json_schema() -> dict[str, Any]:
    """The record as JSON Schema."""
    schema = Record.model_json_schema()
    return schema | {
        "title": "upcycle-bench record",
        "description": f"One run of upcycle-bench, schema version {SCHEMA_VERSION}. Numbers are finite.",
    }
