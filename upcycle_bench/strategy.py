"""The strategy contract: how one dense FFN becomes experts and a router.

A strategy is one frozen, keyword-only pydantic dataclass: its fields are its configuration, its methods are what it
does. The engine finds it in the registry, calls it layer by layer and never learns what it is.

    @dataclass(frozen=True, kw_only=True)               # pydantic.dataclasses
    class MyIdea(Strategy):
        info: ClassVar = StrategyInfo(name="my-idea", summary="...", paper="...", status="published")
        scale: float = Field(default=1.0, gt=0)

        def init_layer(self, ffn, layer, calibration, rng):
            return LayerInit([ffn.expert(w1_HD=...) for _ in range(layer.num_experts)], random_router(ffn, layer, rng))

Shape suffixes: S samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.protocol import MoE
from upcycle_bench.util.errors import PluginError, UserError, first_problem, unknown
from upcycle_bench.util.rng import Stream

# What a plugin imports from here; with `hookspecs.hookimpl` that is all it needs.
__all__ = [
    "FFN",
    "Calibrator",
    "ExtraLoss",
    "Groups",
    "Layer",
    "LayerInit",
    "MoE",
    "MoEFFN",
    "Preparation",
    "RouterInit",
    "Strategy",
    "StrategyInfo",
    "Stream",
    "UserError",
    "Workshop",
    "random_router",
]

Status = Literal["published", "reconstructed", "control", "unpublished"]
RouterInit = Literal["deepspeed", "normal", "lecun"]
SHAPE = ("experts", "top_k")  # the MoE settings that a strategy may change


@dataclass(frozen=True, kw_only=True)
class StrategyInfo:
    """What a strategy is, for tables and records.

    `reconstructed` names the parts of a published method that its paper leaves open and we had to choose.
    """

    name: str
    summary: str
    paper: str
    status: Status
    url: str = ""
    reconstructed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise PluginError(f"{self.name}: status {self.status!r} is none of {', '.join(get_args(Status))}")


@dataclass(frozen=True)
class Preparation:
    """What a strategy trained before the surgery.

    model: the open_clip CLIP whose FFNs are replaced and whose other parameters are kept; branches: dense CLIPs, whose
    FFNs `init_layer` gets; notes: numbers for the receipt (steps per branch, share of the data lost, ...).
    """

    model: Any
    branches: Sequence[Any]
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Groups:
    """Which group every training sample belongs to, int64 [S], numbered from 0; shards, where nothing else is known."""

    kind: Literal["group", "shard"]
    number_S: Tensor


class Workshop(Protocol):
    """What `Strategy.prepare` may use. All of it gives the same on every rank; every FLOP is charged to the strategy.

    rng: the preparation's own randomness; experts: of the protocol's MoE; batch_size: of its training.
    """

    rng: Stream
    experts: int
    batch_size: int

    def __len__(self) -> int:
        """The number of training samples."""

    def dense(self) -> Any:
        """A fresh copy of the dense CLIP."""

    def from_main(self, value_S: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank."""

    def groups(self) -> Groups:
        """The groups of the training samples: the lab's lineages, the digits' classes, the shards of local data."""

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

        `budget` is a share of the FLOPs of the protocol's training of the upcycled model; each step may need the
        encoding of `encoded_per_step` samples. UserError when the budget does not pay a single step each.
        """

    def encode(self, model: Any, index_S: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised features of those samples, in order, in batches: (images [B, C], texts [B, C]), float32, CPU."""

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
        """Train `model` in place by the protocol's loop, optimiser and schedule, one step for every row of samples.

        `trainable` chooses parameters by name, `lr_factor` multiplies the protocol's peak learning rate.
        """


class Calibrator(Protocol):
    """Collects statistics of one layer's FFN inputs as data streams by once; memory must not grow with the data."""

    def update(self, x_TD: Tensor) -> None:
        """See one batch of FFN inputs (after ln_2, text padding left out), float32 [T, D], in a fixed order."""


class ExtraLoss(ABC):
    """A training term that a strategy adds. It sees the layers through forward hooks of its own."""

    name: ClassVar[str]

    @abstractmethod
    def compute(self) -> Tensor:
        """The weighted loss of the forward pass just made (a scalar with gradient); called once per forward."""

    def after_step(self) -> None:  # noqa: B027  (optional)
        """Called after each optimiser step (an EMA teacher moves here)."""

    def state_dict(self) -> dict[str, Any]:
        """State for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (optional)
        """Restore `state_dict`."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Remove the hooks."""


class Strategy(ABC):
    """Base of all strategies; see the module docstring. Class facts, then the functions a strategy may override."""

    info: ClassVar[StrategyInfo]
    replaces_ffn: ClassVar[bool] = True  # False: the model stays dense (controls)
    trains: ClassVar[bool] = True  # False: no training after initialisation (controls)
    # MoE(x) = FFN(x) at step 0 with unlimited capacity, in the default configuration (options may give it up).
    preserves_function: ClassVar[bool] = False
    shares_parameters: ClassVar[bool] = False  # a layer's experts hold parameters in common: no expert parallelism

    def check(self) -> None:  # noqa: B027  (optional)
        """Raise UserError for what this machine lacks, before anything runs."""

    @property
    def calibration_pairs(self) -> int:
        """How many training pairs `calibrator` wants to see; 0 for a strategy without calibration."""
        return 0

    def moe_settings(self, moe: MoE) -> MoE:
        """The MoE that this strategy makes in place of the protocol's; only `experts` and `top_k` may differ."""
        return moe

    def ffn_hidden(self, hidden: int, moe: MoE) -> int:
        """Hidden width in the blocks of `moe_settings`, of each expert or of the dense FFN; `hidden` is the dense one.

        UserError for a width that cannot be.
        """
        return hidden

    def init_dense(self, model: Any, layers: Sequence[Layer], rng: Stream) -> None:  # noqa: B027  (optional)
        """Change this copy of the dense model in place (`replaces_ffn` False): its weights, and `ffn_hidden` widths.

        A pure function of its arguments: every rank calls it. `FFN.of` and `FFN.put_into` read and write an `mlp`.
        """

    def calibrator(self, ffn: FFN, layer: Layer, rng: Stream) -> Calibrator:
        """A collector for this layer, handed back to `init_layer` when the stream has ended."""
        raise NotImplementedError(f"{self.info.name} asks for calibration pairs but has no calibrator")

    def prepare(self, workshop: Workshop) -> Preparation | None:
        """Train before the experts are made; called once, on every rank, instead of a calibration.

        `init_layer` gets the FFNs of the branches in that layer, a list of `FFN`, as `calibration`.
        """
        return None

    def preparation_budget(self) -> float:
        """What `prepare` spends at most, as a share of the training's FLOPs: for the estimate of a dry run."""
        return 0.0

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        """Experts and router of one layer: a pure function of its arguments, which must not change `ffn`."""
        raise NotImplementedError(f"{self.info.name} replaces FFNs but has no init_layer")

    def loss(self, layers: Mapping[str, MoEFFN], rng: Stream) -> ExtraLoss | None:
        """The strategy's own training term over the upcycled layers (by layer name), or None; made anew each stage."""
        return None

    def stages(self, steps: int) -> Sequence[int]:
        """The optimiser steps, of `steps` in all, before which a new stage of training begins; ascending, none at 0."""
        return ()

    def next_stage(self, layers: Mapping[str, MoEFFN]) -> None:
        """Change the layers for the next stage: merge experts (`MoEFFN.merge`), set requires_grad.

        Must not depend on values: a resumed training goes through it before it loads its checkpoint. The optimiser
        starts afresh; schedule, data and step numbers go on.
        """
        raise NotImplementedError(f"{self.info.name} has stages but no next_stage")

    def config(self) -> dict[str, Any]:
        """The resolved configuration, for records."""
        return asdict(self)  # type: ignore[call-overload]


def configure(strategy: type[Strategy], options: Mapping[str, Any]) -> Strategy:
    """Make a strategy from command-line options, `--option tau=0.8`.

    Raises UserError, one line, for an unknown option or a value that its field refuses.
    """
    from pydantic import ValidationError

    known = [f.name for f in fields(strategy)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise unknown(f"option of {strategy.info.name}", name, known)
    try:
        return strategy(**options)
    except ValidationError as error:
        where, what = first_problem(error)
        raise UserError(f"{strategy.info.name}: {where or 'configuration'}: {what}.") from None


def resolve_moe(strategy: Strategy, moe: MoE) -> MoE:
    """`Strategy.moe_settings`, checked. Raises PluginError for settings that cannot be, or are the protocol's alone."""
    own = strategy.moe_settings(moe)
    if own == moe:
        return moe
    values = own.model_dump()
    other = [key for key, value in moe.model_dump().items() if value != values[key] and key not in SHAPE]
    if other:
        raise PluginError(f"{strategy.info.name}: moe_settings changes {', '.join(other)}, which are the protocol's")
    try:
        return type(moe).model_validate(values)  # model_copy(update=...) checks nothing
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"{strategy.info.name}: moe_settings is not a mixture of experts: {reason}") from None


def random_router(ffn: FFN, layer: Layer, rng: Stream, init: RouterInit = "deepspeed") -> Tensor:
    """A random router [E, D] in the FFN's dtype.

    deepspeed: U(-1/sqrt(D), 1/sqrt(D)), what `nn.Linear(bias=False)` and so DeepSpeed's gate draws;
    normal: N(0, 0.02) (flaxformer); lecun: N(0, 1/D) (vmoe).
    """
    generator = rng.child("router").generator()
    shape = (layer.num_experts, ffn.width)
    if init == "deepspeed":
        router_ED = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(ffn.width)
    else:
        std = 0.02 if init == "normal" else 1 / math.sqrt(ffn.width)
        router_ED = torch.randn(shape, generator=generator, dtype=torch.float64) * std
    return router_ED.to(ffn.w1_HD.dtype)
