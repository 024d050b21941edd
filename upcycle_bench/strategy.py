"""The strategy contract: how one dense FFN becomes experts and a router.

A strategy is one frozen, keyword-only pydantic dataclass: its fields are its configuration, its methods are what it
does. The engine finds it in the registry, calls it layer by layer and never learns what it is.

    @dataclass(frozen=True, kw_only=True)               # pydantic.dataclasses
    class MyIdea(Strategy):
        info: ClassVar = StrategyInfo(name="my-idea", summary="...", paper="...", status="published")
        scale: float = Field(default=1.0, gt=0)

        def init_layer(self, ffn, layer, calibration, rng):
            return LayerInit([ffn.expert(w1_HD=...) for _ in range(layer.num_experts)], random_router(ffn, layer, rng))

Shape suffixes: T tokens, D model width, H hidden width, N experts.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.errors import PluginError, UserError, first_problem, unknown
from upcycle_bench.rng import Stream

if TYPE_CHECKING:
    from upcycle_bench import protocol
    from upcycle_bench.moe import MoEFFN
    from upcycle_bench.workshop import Workshop

# What a plugin imports from here; with `hookspecs.hookimpl` that is all it needs.
__all__ = [
    "FFN",
    "Calibrator",
    "ExtraLoss",
    "Layer",
    "LayerInit",
    "Preparation",
    "RouterInit",
    "Strategy",
    "StrategyInfo",
    "Stream",
    "UserError",
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
class FFN:
    """One dense feed-forward block, FFN(x) = W2 act(W1 x + b1) + b2; tensors are the dense model's own, read-only."""

    w1_HD: Tensor
    b1_H: Tensor
    w2_DH: Tensor
    b2_D: Tensor
    act: nn.Module

    @classmethod
    def of(cls, mlp: Any) -> FFN:
        """Read open_clip's `mlp` (c_fc, gelu, c_proj)."""
        return cls(
            mlp.c_fc.weight.detach(),
            mlp.c_fc.bias.detach(),
            mlp.c_proj.weight.detach(),
            mlp.c_proj.bias.detach(),
            mlp.gelu,
        )

    @property
    def width(self) -> int:
        """D."""
        return self.w1_HD.shape[1]

    @property
    def hidden(self) -> int:
        """H."""
        return self.w1_HD.shape[0]

    def resized(self, hidden: int) -> FFN:
        """Its first `hidden` neurons, or, where it has fewer, neurons of zeros behind its own: the same function."""
        if hidden == self.hidden:
            return self
        more = max(0, hidden - self.hidden)
        return FFN(
            F.pad(self.w1_HD, (0, 0, 0, more))[:hidden],
            F.pad(self.b1_H, (0, more))[:hidden],
            F.pad(self.w2_DH, (0, more))[:, :hidden],
            self.b2_D,
            self.act,
        )

    def put_into(self, mlp: Any) -> None:
        """Give open_clip's `mlp` copies of these tensors, whatever its hidden width was."""
        made: Any = self.expert()
        mlp.c_fc, mlp.c_proj = made.c_fc, made.c_proj

    def expert(
        self,
        *,
        w1_HD: Tensor | None = None,
        b1_H: Tensor | None = None,
        w2_DH: Tensor | None = None,
        b2_D: Tensor | None = None,
    ) -> nn.Sequential:
        """A trainable copy of this FFN with storage of its own; given tensors replace the dense ones."""
        parts = [
            own if given is None else given
            for own, given in ((self.w1_HD, w1_HD), (self.b1_H, b1_H), (self.w2_DH, w2_DH), (self.b2_D, b2_D))
        ]
        w1, b1, w2, b2 = (nn.Parameter(part.detach().to(self.w1_HD, copy=True)) for part in parts)
        c_fc, c_proj = (nn.Linear(w.shape[1], w.shape[0], device="meta") for w in (w1, w2))
        c_fc.weight, c_fc.bias, c_proj.weight, c_proj.bias = w1, b1, w2, b2
        return nn.Sequential(OrderedDict(c_fc=c_fc, gelu=copy.deepcopy(self.act), c_proj=c_proj))


@dataclass(frozen=True)
class Layer:
    """Where an MoE layer stands and what the protocol wants of it; `depth` is the number of blocks of its tower."""

    tower: Literal["vision", "text"]
    block: int
    depth: int
    num_experts: int
    top_k: int

    @property
    def name(self) -> str:
        """Short unique name, as in diagnostics: `vision.1`."""
        return f"{self.tower}.{self.block}"

    @property
    def mlp_path(self) -> str:
        """The module's path in an open_clip CLIP."""
        prefix = "visual." if self.tower == "vision" else ""
        return f"{prefix}transformer.resblocks.{self.block}.mlp"


@dataclass(frozen=True)
class LayerInit:
    """What a strategy makes of one FFN.

    experts: N modules [T, D] -> [T, D], global order; router_ND: rows are router directions, no bias;
    notes: numbers for the step-0 receipt (ranks kept, agreement rate, ...).

    An expert that is not what `FFN.expert` makes may have `merged() -> nn.Module`: the plain FFN that computes the same
    function, with storage of its own. Trained experts are merged before they are saved and scored.
    """

    experts: Sequence[nn.Module]
    router_ND: Tensor
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Preparation:
    """What a strategy trained before the surgery.

    model: the open_clip CLIP whose FFNs are replaced and whose other parameters are kept; branches: dense CLIPs, whose
    FFNs `init_layer` gets; notes: numbers for the receipt (steps per branch, share of the data lost, ...).
    """

    model: Any
    branches: Sequence[Any]
    notes: Mapping[str, float] = field(default_factory=dict)


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

    def moe_settings(self, moe: protocol.MoE) -> protocol.MoE:
        """The MoE that this strategy makes in place of the protocol's; only `experts` and `top_k` may differ."""
        return moe

    def ffn_hidden(self, hidden: int, moe: protocol.MoE) -> int:
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


def resolve_moe(strategy: Strategy, moe: protocol.MoE) -> protocol.MoE:
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
    """A random router [N, D] in the FFN's dtype.

    deepspeed: U(-1/sqrt(D), 1/sqrt(D)), what `nn.Linear(bias=False)` and so DeepSpeed's gate draws;
    normal: N(0, 0.02) (flaxformer); lecun: N(0, 1/D) (vmoe).
    """
    generator = rng.child("router").generator()
    shape = (layer.num_experts, ffn.width)
    if init == "deepspeed":
        router_ND = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(ffn.width)
    else:
        std = 0.02 if init == "normal" else 1 / math.sqrt(ffn.width)
        router_ND = torch.randn(shape, generator=generator, dtype=torch.float64) * std
    return router_ND.to(ffn.w1_HD.dtype)
