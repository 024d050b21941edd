"""Controls: the dense model and sparse upcycling, trained for a given multiple of the protocol's compute.

A strategy that spends more than sparse upcycling, on a teacher or before the training, has to beat what the same FLOPs
buy without it. `compute` is that multiple: training FLOPs by those of the protocol's mixture of experts. Warm-up and
decay are stretched to the steps. `upcycle-bench leaderboard --view compute` compares with them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import FFN, Layer, LayerInit, Strategy, StrategyInfo, Stream, random_router

FOOTING = "more steps and pairs, by its compute"


@dataclass(frozen=True, kw_only=True)
class DenseAtCompute(Strategy):
    """The dense model, trained for that multiple."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="dense-at-compute",
        summary="the dense model trained for a multiple of the MoE's FLOPs: more steps of a stretched schedule",
        paper="control",
        status="control",
        footing=FOOTING,
    )
    replaces_ffn: ClassVar[bool] = False
    preserves_function: ClassVar[bool] = True
    compute: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="training FLOPs by those of the MoE")

    def training_steps(self, steps: int, dense_flops: int, moe_flops: int) -> int:
        return max(1, round(steps * self.compute * moe_flops / dense_flops))


@dataclass(frozen=True, kw_only=True)
class SparseAtCompute(Strategy):
    """Sparse upcycling with its usual options, trained for that multiple; at one seed it starts from the same model."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="sparse-at-compute",
        summary="sparse upcycling trained for a multiple of the MoE's FLOPs: more steps of a stretched schedule",
        paper="control",
        status="control",
        footing=FOOTING,
    )
    preserves_function: ClassVar[bool] = True
    compute: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="training FLOPs by those of the MoE")

    def training_steps(self, steps: int, dense_flops: int, moe_flops: int) -> int:
        return max(1, round(steps * self.compute))

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        key = tuple("sparse-upcycling" if part == self.info.name else part for part in rng.key)
        router_ED = random_router(ffn, layer, Stream(key), "deepspeed")
        return LayerInit([ffn.expert() for _ in range(layer.num_experts)], router_ED)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DenseAtCompute, SparseAtCompute]
