"""The contract of a strategy: how one dense FFN becomes experts and a router.

A strategy is one frozen, keyword-only pydantic dataclass. Its fields are its options, its methods are what it does.
A run finds it in the registry and calls it layer by layer; nothing else knows it by name.

    @dataclass(frozen=True, kw_only=True)               # pydantic.dataclasses
    class MyIdea(Strategy):
        info: ClassVar = StrategyInfo(name="my-idea", summary="...", paper="...", status="published")
        scale: float = Field(default=1.0, gt=0)

        def init_layer(self, ffn, layer, calibration, rng):
            return LayerInit([ffn.expert(w1_HD=...) for _ in range(layer.num_experts)], random_router(ffn, layer, rng))

The only required method is `init_layer` (`init_dense` of a control without experts).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

from pydantic import ValidationError
from torch import Tensor

from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.model.router_init import RouterInit, random_router
from upcycle_bench.protocol import MoE
from upcycle_bench.util.distributed import mean_weight
from upcycle_bench.util.errors import PluginError, UserError, first_problem, unknown
from upcycle_bench.util.rng import Stream
from upcycle_bench.workshop import Groups, Preparation, Workshop

# What a plugin imports from here. With `hookspecs.hookimpl` that is all it needs.
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
    "mean_weight",
    "random_router",
]

Status = Literal["published", "reconstructed", "control", "unpublished"]


@dataclass(frozen=True, kw_only=True)
class StrategyInfo:
    """What a strategy is, for tables and records.

    reconstructed: the parts of a published method that its paper leaves open and we had to choose. footing: what this
    strategy gets that others do not, in at most 40 characters. Raises PluginError for an unknown
    `status` or a longer `footing`.
    """

    name: str
    summary: str
    paper: str
    status: Status
    url: str = ""
    reconstructed: tuple[str, ...] = ()
    footing: str = ""

    def __post_init__(self) -> None:
        if len(self.footing) > 40:
            raise PluginError(
                f"{self.name}: footing has {len(self.footing)} characters; 40 are what a table has room for"
            )
        if self.status not in get_args(Status):
            raise PluginError(f"{self.name}: status {self.status!r} is none of {', '.join(get_args(Status))}")


class Calibrator(Protocol):
    """Collects statistics of one layer's FFN inputs in one pass over the data; its memory must not grow with them."""

    def update(self, x_TD: Tensor) -> None:
        """See one batch of FFN inputs, float32 [T, D], after ln_2 and without text padding, in a fixed order."""


class ExtraLoss(ABC):
    """A training term that a strategy adds. It sees the layers by forward hooks of its own."""

    name: ClassVar[str]

    @abstractmethod
    def compute(self) -> Tensor:
        """The weighted loss of the last forward pass, a scalar with gradient; called once after each.

        Its mean over ranks must be the loss of the global batch, as it is for `mean_weight` times a sum over tokens.
        """

    def notes(self) -> dict[str, float]:
        """Numbers that the options came to in this training, for the record's `diagnostics`."""
        return {}

    def after_step(self) -> None:  # noqa: B027  (optional)
        """Called after each optimiser step, where an EMA teacher moves."""

    def state_dict(self) -> dict[str, Any]:
        """State for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  (optional)
        """Restore `state_dict`."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Remove the hooks."""


class Strategy(ABC):
    """Base class of all strategies: facts about the class, then the methods that a strategy may override."""

    info: ClassVar[StrategyInfo]
    replaces_ffn: ClassVar[bool] = True  # False: the model stays dense (controls)
    trains: ClassVar[bool] = True  # False: no training after initialisation (controls)
    preserves_function: ClassVar[bool] = False  # MoE(x) = FFN(x) at step 0: by default, without drops, top_k > 1
    shares_parameters: ClassVar[bool] = False  # a layer's experts hold parameters in common: no expert parallelism

    def check(self) -> None:  # noqa: B027  (optional)
        """Called before anything runs: raise UserError for what this machine lacks."""

    @property
    def calibration_pairs(self) -> int:
        """How many training pairs `calibrator` is to see; 0 for a strategy without calibration."""
        return 0

    def moe_settings(self, moe: MoE) -> MoE:
        """The MoE settings of this strategy in place of the protocol's; only `experts` and `top_k` may differ."""
        return moe

    def ffn_hidden(self, hidden: int, moe: MoE) -> int:
        """Hidden width of each expert, or of the FFN of a control; UserError for one that cannot be.

        `hidden` is the dense FFN's, `moe` are the settings that `moe_settings` gave.
        """
        return hidden

    def training_steps(self, steps: int, dense_flops: int, moe_flops: int) -> int:
        """The optimiser steps of its training, where the protocol has `steps`; the schedule is stretched to them.

        `dense_flops` and `moe_flops` are what training on a pair costs, of the dense model and the protocol's MoE.
        """
        return steps

    def init_dense(self, model: Any, layers: Sequence[Layer], rng: Stream) -> None:  # noqa: B027  (optional)
        """Change this copy of the dense model in place (of a control, `replaces_ffn` False): weights, FFNs' widths.

        Every rank calls it, so it must depend on its arguments alone. `FFN.of` and `FFN.put_into` read and write `mlp`.
        """

    def calibrator(self, ffn: FFN, layer: Layer, rng: Stream) -> Calibrator:
        """A collector for this layer. It sees the data, then `init_layer` gets it as `calibration`."""
        raise NotImplementedError(f"{self.info.name} asks for calibration pairs but has no calibrator")

    def prepare(self, workshop: Workshop) -> Preparation | None:
        """Train before the experts are made; called once, on every rank, in place of a calibration.

        `init_layer` gets the branches' FFNs of that layer, a list of `FFN`, as `calibration`.
        """
        return None

    def preparation_budget(self) -> float:
        """The most that `prepare` may spend, as a share of the training's FLOPs: for the estimate of a dry run."""
        return 0.0

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        """Experts and router of one layer. It must depend on its arguments alone, and not change `ffn`.

        `calibration` is what `calibrator` returned, or the branches' FFNs of `prepare`, or None.
        """
        raise NotImplementedError(f"{self.info.name} replaces FFNs but has no init_layer")

    def loss(self, layers: Mapping[str, MoEFFN], rng: Stream, steps: int) -> ExtraLoss | None:
        """The strategy's own training term over the MoE layers, by layer name, or None; made anew for each stage.

        `steps` are the optimiser steps of the whole training: what depends on its length is a share of them.
        """
        return None

    def stages(self, steps: int) -> Sequence[int]:
        """The optimiser steps, of `steps` in all, before which a new stage of training begins: ascending, without 0."""
        return ()

    def next_stage(self, layers: Mapping[str, MoEFFN]) -> None:
        """Change the layers for the next stage: merge experts (`MoEFFN.merge`), set requires_grad.

        It must not depend on the weights: a resumed training calls it before it loads its checkpoint. The optimiser
        starts anew; schedule, data and step numbers go on.
        """
        raise NotImplementedError(f"{self.info.name} has stages but no next_stage")

    def config(self) -> dict[str, Any]:
        """The options' values, for records."""
        return asdict(self)  # type: ignore[call-overload]


def configure(strategy: type[Strategy], options: Mapping[str, Any]) -> Strategy:
    """Make a strategy from command-line options (`--option tau=0.8`).

    Raises UserError, one line, for an unknown option or a value that its field refuses.
    """
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
    """`Strategy.moe_settings`, checked. PluginError if they are no MoE or change more than `experts` and `top_k`."""
    own = strategy.moe_settings(moe)
    if own == moe:
        return moe
    values = own.model_dump()
    other = [key for key, value in moe.model_dump().items() if value != values[key] and key not in ("experts", "top_k")]
    if other:
        raise PluginError(f"{strategy.info.name}: moe_settings changes {', '.join(other)}, which are the protocol's")
    try:
        return type(moe).model_validate(values)  # checks the values, which model_copy(update=...) does not
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise PluginError(f"{strategy.info.name}: moe_settings is not a mixture of experts: {reason}") from None
