"""Control: random experts and a random router, all else from the dense model. It shows what copying the FFN gives.

Experts are drawn as open_clip draws the FFNs of that tower when it builds a model. In the text tower
(`TextTransformer.init_parameters`) W1 ~ N(0, 1 / (2 D)) and W2 ~ N(0, 1 / (2 depth D)), with variances in brackets and
depth the number of blocks. The weights of the vision tower and the biases of both towers have torch's default for
`nn.Linear`, U(-1 / sqrt(I), 1 / sqrt(I)) with I inputs.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, Stream, random_router
from upcycle_bench.upcycling import draws


@dataclass(frozen=True, kw_only=True)
class Scratch(Strategy):
    """Experts and router as they are before any training."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="scratch",
        summary="random experts and router, everything else dense",
        paper="control",
        status="control",
    )

    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        return LayerInit(
            [self._expert(ffn, layer, rng.child("expert", number)) for number in range(layer.num_experts)],
            random_router(ffn, layer, rng, self.router_init),
        )

    def _expert(self, ffn: FFN, layer: Layer, rng: Stream) -> nn.Sequential:
        first, second = 1 / math.sqrt(ffn.width), 1 / math.sqrt(ffn.hidden)  # 1 / sqrt(I) of W1 and of W2
        if layer.tower == "text":
            w1_HD = draws.normal(ffn.w1_HD.shape, rng.child("w1")) * (2 * ffn.width) ** -0.5
            w2_DH = draws.normal(ffn.w2_DH.shape, rng.child("w2")) * (ffn.width**-0.5 * (2 * layer.depth) ** -0.5)
        else:
            w1_HD = draws.uniform(ffn.w1_HD.shape, rng.child("w1")) * first
            w2_DH = draws.uniform(ffn.w2_DH.shape, rng.child("w2")) * second
        b1_H = draws.uniform(ffn.b1_H.shape, rng.child("b1")) * first
        b2_D = draws.uniform(ffn.b2_D.shape, rng.child("b2")) * second
        return ffn.expert(w1_HD=w1_HD, b1_H=b1_H, w2_DH=w2_DH, b2_D=b2_D)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [Scratch]
