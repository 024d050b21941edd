"""The suite contract: an evaluation that scores one trained model and keeps what each sample did.

A suite is one frozen, keyword-only pydantic dataclass. Its fields are the settings that a protocol gives in
`[suites.NAME]`. It reads evaluation sets in CLIP_benchmark's webdataset layout and returns scores with their direction,
chance level and number of samples. It also returns per-sample outcomes, so that two runs can be compared in pairs.
It encodes with `features.embed`, which reports every batch to `EvalContext.on_encoded`: there the certificate watches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle_bench.data import evalset
from upcycle_bench.util.errors import UserError  # what a suite raises; it can be imported from here

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

# What a plugin imports from here; with `hookspecs.hookimpl` that is all it needs.
__all__ = ["EvalContext", "Score", "Suite", "SuiteInfo", "SuiteResult", "UserError"]

AVERAGE = "average"  # the dataset of a suite's means over sets: where it is, tables for people leave the sets out


@dataclass(frozen=True, kw_only=True)
class SuiteInfo:
    """What a suite is. `version` is part of its fingerprint: raise it when the same weights would score otherwise.

    `primary`: whether it has a primary score; a suite that only describes has none, and does not make a run by itself.
    `tunes`: whether its scores are of copies of the model that it trains, which a certificate does not cover.
    """

    name: str
    summary: str
    paper: str
    version: int
    primary: bool = True
    tunes: bool = False


class OnlyNamed(UserError):
    """A suite that scores only what a protocol names was asked for another set."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of a table. `chance` is the value of uniform guessing; None where there is none.

    `higher_is_better` is None for what describes a model and does not judge it; it is never primary.
    `standard_error` and `interval` (95 %) say how sure it is, over samples (`util.uncertainty`) or draws,
    where the suite knows.
    """

    dataset: str
    metric: str
    value: float
    higher_is_better: bool | None
    chance: float | None
    samples: int
    primary: bool = False
    standard_error: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class SuiteResult:
    """Scores, and per-sample outcomes by name (`digits-test/log_likelihood` -> float32 [samples]).

    `notes` (JSON) is what else the record should say; `skipped` names the parts that could not run, and why.
    """

    scores: list[Score]
    outcomes: dict[str, np.ndarray]
    notes: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """What a suite may use.

    model: an open_clip CLIP (dense or upcycled) in eval mode, float32, on `device`; `tokenizer`: list of strings ->
    int64 [B, L]; `transform`: PIL image -> float32 [3, H, W]; `root`: the folder that holds the evaluation sets;
    `weights`: sha256 of the model's file, under which features are cached, or "" if it has none; `track(items, what)`:
    yields the items and shows progress; `on_encoded(model, encode, inputs, embeddings)`: `features.embed` calls it
    after each batch, so that a witness can encode some of it again.
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


class Suite(ABC):
    """Base of all suites."""

    info: ClassVar[SuiteInfo]

    @abstractmethod
    def datasets(self) -> list[str]:
        """Names of the evaluation sets this suite reads below `root`; their content is part of its fingerprint."""

    def sources(self, root: Path) -> dict[str, str]:
        """Content hashes of all data it reads, for its fingerprint; UserError, which names them, for missing sets."""
        evalset.require(root, self.datasets())
        return {name: evalset.digest(root / name) for name in self.datasets()}

    @abstractmethod
    def evaluate(self, context: EvalContext) -> SuiteResult:
        """Score the model. Must not depend on the batch size or on any global random state."""

    @classmethod
    def of_set(cls, folder: Path) -> Suite:
        """The suite with its usual settings on one set of a user's; UserError, why it is skipped, where it cannot."""
        raise OnlyNamed(f"suite {cls.info.name} scores only what a protocol names.")

    def config(self) -> dict[str, Any]:
        """The resolved settings, for fingerprints and records."""
        return asdict(self)  # type: ignore[call-overload]
