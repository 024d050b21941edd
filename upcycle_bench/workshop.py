"""What a strategy that trains first is given, and what it gives back. `upcycle_bench.strategy` exports it.

    def prepare(self, workshop: Workshop) -> Preparation: ...

Shape suffixes: S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from upcycle_bench.util.rng import Stream


@dataclass(frozen=True)
class Preparation:
    """What a strategy trained before its experts are made.

    model: the open_clip CLIP whose FFNs are replaced and whose other parameters are kept; branches: dense CLIPs, whose
    FFNs `init_layer` gets; notes: numbers for the receipt (steps per branch, share of the data lost, ...).
    """

    model: Any
    branches: Sequence[Any]
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Groups:
    """The group of every training sample, int64 or int32 [S], from 0. Where none are known, its shard of the data."""

    kind: Literal["group", "shard"]
    number_S: Tensor


class Workshop(Protocol):
    """What `Strategy.prepare` may use. It gives the same on every rank, and charges every FLOP to the strategy.

    rng: the preparation's own randomness; experts: how many the protocol has; batch_size: of its training.
    """

    rng: Stream
    experts: int
    batch_size: int

    def __len__(self) -> int:
        """The number of training samples."""

    def dense(self) -> Any:
        """A fresh copy of the dense CLIP."""

    def from_main(self, value_S: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank: for what could differ by a rounding."""

    def groups(self) -> Groups:
        """The groups of the training samples: lineages of the lab, classes of the digits, shards of local data."""

    def steps_per_branch(
        self,
        branches: int,
        ceiling: int,
        *,
        budget: float,
        encoded_per_step: int = 0,
        trainable: Callable[[str], bool] = lambda name: True,
    ) -> int:
        """How many steps each of `branches` trainings may take, at most `ceiling`.

        `budget` is a share of the FLOPs of the protocol's training of the upcycled model. Each step costs a training
        step of the parameters that `trainable` chooses, and the encoding of `encoded_per_step` samples. UserError when
        the budget does not pay one step for each branch.
        """

    def encode(self, model: Any, index_S: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised features of the samples `index_S`, in batches: (images [B, C], texts [B, C]), float32, CPU."""

    def train(
        self,
        model: Any,
        rows_SB: Tensor,
        name: str,
        *,
        trainable: Callable[[str], bool] = lambda name: True,
        lr_factor: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        """Train `model` in place by the protocol's loop, optimiser and schedule, one step for each row of samples.

        `trainable` chooses parameters by name, `lr_factor` multiplies the protocol's peak learning rate.
        """
