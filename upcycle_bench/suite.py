"""The contract of a suite: an evaluation that scores one trained model.

A suite is one frozen, keyword-only pydantic dataclass. Its fields are the settings that a protocol gives in
`[suites.NAME]`. It reads evaluation sets in CLIP_benchmark's webdataset layout. It returns scores with their direction,
chance level and number of samples, and the outcome of each sample, so that two runs can be compared in pairs. It
encodes with `evaluation.features.embed`, which reports each batch to `EvalContext.on_encoded` for the certificate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from upcycle_bench.data import evalset
from upcycle_bench.util.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

# All that a plugin needs, with `hookspecs.hookimpl`.
__all__ = ["EvalContext", "Sampled", "Score", "Suite", "SuiteInfo", "SuiteResult", "UserError"]

AVERAGE = "average"  # a suite's means over sets are of the dataset `average`, or `average/...`


def is_average(dataset: str) -> bool:
    """Whether a score is a mean over sets."""
    return dataset.partition("/")[0] == AVERAGE


def is_averaged(dataset: str, metric: str, headline: str, names: Container[tuple[str, str]]) -> bool:
    """Whether a mean stands for this score of a single set, so that printed tables omit it.

    `headline`: of the set; `names`: (dataset, metric) of all scores of the suite.
    """
    return not is_average(dataset) and ((AVERAGE, metric) in names or (f"{AVERAGE}/{headline}", metric) in names)


@dataclass(frozen=True, kw_only=True)
class SuiteInfo:
    """What a suite is. `version` is part of its fingerprint: raise it when the same weights would get other scores.

    `headline`: whether it has headline scores. A suite without any describes the model, and a run needs another suite.
    `tunes`: whether it trains copies of the model and scores those; a certificate does not cover them. `learns`:
    whether it learns from labels of the set that it scores, as nearest neighbours do: names of classes do not matter.
    """

    name: str
    summary: str
    paper: str
    version: int
    headline: bool = True
    tunes: bool = False
    learns: bool = False


class OnlyNamed(UserError):
    """Raised by a suite that scores only the sets a protocol names, for any other set."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a table. `chance` is the value of uniform guessing, or None.

    `headline` names the headline score of which this one is a part, or is empty. A headline score is the mean of its
    parts, which have one direction; tables rank by it. `higher_is_better` is None for a number that describes a model
    without judging it; such a number is part of none.
    `standard_error` and `interval` (95 %) are over samples (`util.uncertainty`) or over draws; None if not known.
    """

    dataset: str
    metric: str
    value: float
    higher_is_better: bool | None
    chance: float | None
    samples: int
    headline: str = ""
    standard_error: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class SuiteResult:
    """Scores, and outcomes of each sample by name (`digits-test/log_likelihood` -> float32 [samples]).

    `notes` (JSON) goes into the record as it is; `skipped` gives, for each part that could not run, the reason.
    """

    scores: list[Score]
    outcomes: dict[str, np.ndarray]
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled:
    """The outcomes whose mean is a score: [N], or [D, N] of D draws.

    `each` is what one of them belongs to: a sample; a query, of which several may share a sample; or a class.
    """

    values: np.ndarray
    each: Literal["sample", "query", "class"] = "sample"


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """What a suite may use.

    model       an open_clip CLIP, dense or upcycled, in eval mode, float32, on `device`
    tokenizer   list of strings -> int64 [B, L]
    transform   PIL image -> float32 [3, height, width]
    root        the folder that holds the evaluation sets
    weights     sha256 of the model's file, under which embeddings are cached; "" for a model without a file
    track       track(items, what) yields the items and shows progress
    on_encoded  on_encoded(model, encode, inputs, embeddings), called after each batch that was encoded
    encoded     where each input's embedding is kept, so that equal inputs are encoded once; None: encode all
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], torch.Tensor]
    transform: Callable[[Any], torch.Tensor]
    root: Path
    device: torch.device
    batch_size: int = 256
    weights: str = ""
    track: Callable[[Iterable[Any], str], Iterable[Any]] = field(default=lambda items, what: items)
    on_encoded: Callable[[nn.Module, Any, torch.Tensor, torch.Tensor], None] | None = None
    encoded: dict[Any, torch.Tensor] | None = None


class Suite(ABC):
    """Base of all suites."""

    info: ClassVar[SuiteInfo]

    @abstractmethod
    def datasets(self) -> list[str]:
        """Names of the evaluation sets that this suite reads; their content is part of its fingerprint."""

    def sources(self, root: Path) -> dict[str, str]:
        """The hash of each evaluation set below `root` by name, for its fingerprint; UserError for missing sets."""
        evalset.require(root, self.datasets())
        return {name: evalset.digest(root / name) for name in self.datasets()}

    @abstractmethod
    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Score the model. Scores must not depend on the batch size or on any global random state."""

    def without(self, sets: Collection[str]) -> Suite:
        """This suite without those of its `datasets()`, which are not valid here; UserError if it needs them."""
        raise UserError(f"suite {self.info.name} needs all of its sets.")

    @classmethod
    def of_set(cls, folder: Path) -> Suite:
        """This suite with its usual settings for a user's evaluation set; UserError, with the reason, if it cannot."""
        raise OnlyNamed(f"suite {cls.info.name} scores only what a protocol names.")

    def sampled(self, dataset: str, metric: str, outcomes: Mapping[str, np.ndarray]) -> Sampled | None:
        """Of which of this suite's outcomes that score is the mean; None where outcomes do not give it.

        `validate` computes scores again by it, `diff` pairs two runs, and the leaderboard has errors over samples. By
        default the outcome has the metric's name.
        """
        found = outcomes.get(f"{dataset}/{metric}")
        return None if found is None else Sampled(found)

    def config(self) -> dict[str, Any]:
        """All settings, for fingerprints and records."""
        return asdict(self)  # type: ignore[call-overload]
