"""What a record says of the evaluation: scores, headline scores, and the certificate that they are sound.

    score = ScoreRecord(suite="zero-shot", dataset="digits-test", metric="top1", value=0.91, ...)
    Headline(value=0.91, ...)               # the mean of the scores that name it
    certificate.repeats, certificate.controls   # inputs that were encoded again; labels that were dealt out anew

`upcycle_bench.record` exports it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upcycle_bench.protocol import Frozen


class ScoreRecord(Frozen):
    """One score; `chance` is the value that uniform guessing reaches, None where it has none."""

    suite: str = Field(min_length=1)
    dataset: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    value: float
    higher_is_better: bool | None = Field(description="None: it describes the model and does not judge it")
    chance: float | None
    samples: int = Field(ge=1)
    headline: str = Field(default="", description="the headline score of which it is a part")
    standard_error: float | None = Field(default=None, ge=0)
    interval: tuple[float, float] | None = Field(default=None, description="95 %")


class Headline(Frozen):
    """A headline score: the mean of the scores that name it. They may share images, so the error is an upper bound."""

    value: float
    higher_is_better: bool
    chance: float | None
    standard_error: float | None = Field(ge=0, description="over evaluation samples")


class RepeatPart(Frozen):
    """Some of the inputs, encoded a second time: in batches of another size, and perhaps in another order."""

    batch_size: int = Field(ge=1)
    shuffled: bool
    differing: int = Field(ge=0, description="predictions that changed, each with a margin in `margins`")
    margins: tuple[float, ...] = Field(description="the routing margins, below 1e-5, that explain the changes")
    largest_distance: float = Field(ge=0, description="between two embeddings, of unit length, of one input")


class ControlPart(Frozen):
    """A suite's scores with labels or class names dealt out anew (`evaluation.shuffled_labels`).

    Of labels it is the metric farthest better than chance.
    """

    suite: str = Field(min_length=1)
    dataset: str = Field(min_length=1)
    samples: int = Field(ge=1)
    metric: str = Field(min_length=1)
    permuted: Literal["labels", "classes"] = "labels"
    draws: int = Field(default=1, ge=1)
    value: float = Field(description="mean over draws")
    chance: float
    z: float | None = Field(default=None, description="of labels: standard errors better than chance, over all draws")
    z_of_draws: tuple[float, ...] = Field(default=(), description="of labels, each draw alone")
    bound: float | None = Field(default=None, description="of classes: the most that answers from names can reach")


class CertificatePart(Frozen):
    """The checks that the evaluation passed (`evaluation.certificate`); one that fails them leaves no record."""

    predictions: int = Field(ge=1, description="that each of `repeats` compares with those of the evaluation")
    repeats: tuple[RepeatPart, ...] = Field(min_length=1)
    reloaded: RepeatPart | None = Field(
        default=None, description="the same by the model of the saved file; None: no file of ours"
    )
    choices_routed: int = Field(ge=0, description="(token, choice) pairs in the whole evaluation; none was dropped")
    controls: tuple[ControlPart, ...]
    uncontrolled: str | None = Field(default=None, description="why a kind of set has no control")
    uncovered: str | None = Field(
        default=None, description="suites that score copies they trained, which this leaves out"
    )
    weights: str = Field(min_length=1, description="sha256 of the model's tensors, the same before and after")
    seconds: float = Field(ge=0, description="that these checks took, without the evaluation")
