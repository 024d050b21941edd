"""Controls: the dense model with the extra training that all strategies get, and with as much as their FLOPs pay.

No FFN is replaced. Data, schedule and optimiser are those of every strategy. `dense` takes as many steps as they do and
shows what training longer gives; its steps are cheaper than those of a mixture of experts. `dense-longer` takes as many
steps more as cost the same FLOPs: warm-up and decay are stretched, and it sees the next batches of the same order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import Strategy, StrategyInfo


@dataclass(frozen=True, kw_only=True)
class Dense(Strategy):
    """The dense model with the same extra training."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="dense",
        summary="the dense model with the same extra training",
        paper="control",
        status="control",
    )
    replaces_ffn: ClassVar[bool] = False
    preserves_function: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class DenseLonger(Dense):
    """The dense model, trained for the FLOPs that the protocol's mixture of experts takes."""

    info: ClassVar[StrategyInfo] = replace(
        Dense.info,
        name="dense-longer",
        summary="the dense model trained for the FLOPs of the MoE: more steps of a stretched schedule",
        footing="more steps and pairs, equal FLOPs",
    )

    def training_steps(self, steps: int, dense_flops: int, moe_flops: int) -> int:
        return round(steps * moe_flops / dense_flops)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [Dense, DenseLonger]
