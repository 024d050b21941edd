"""Control: random experts and a random router in a model that is otherwise the dense one: what copying the FFN gives.

Experts are drawn as open_clip draws the blocks of that tower when it builds a model. Text tower
(`TextTransformer.init_parameters`): W1 ~ N(0, 1/(2 D)), W2 ~ N(0, 1/(2 L D)) with L the number of its blocks. Vision
tower: open_clip leaves torch's default for `nn.Linear`, W ~ U(-1/sqrt(I), 1/sqrt(I)) with I inputs. Biases of both
towers: torch's default, U(-1/sqrt(I), 1/sqrt(I)).

Shape suffixes: D width, H hidden.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, random_router


@dataclass(frozen=True, kw_only=True)
class Scratch(Strategy):
    """Experts and router as if they had never been trained."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="scratch",
        summary="random experts and router, everything else dense",
        paper="control",
        status="control",
    )
    preserves_function: ClassVar[bool] = False

    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        return LayerInit(
            [self._expert(ffn, layer, rng.child("expert", number)) for number in range(layer.num_experts)],
            random_router(ffn, layer, rng, self.router_init),
        )

    def _expert(self, ffn: FFN, layer: Layer, rng: Stream) -> nn.Sequential:
        first, second = 1 / math.sqrt(ffn.width), 1 / math.sqrt(ffn.hidden)
        if layer.tower == "text":
            w1_HD = _normal(ffn.w1_HD, (2 * ffn.width) ** -0.5, rng.child("w1"))
            w2_DH = _normal(ffn.w2_DH, ffn.width**-0.5 * (2 * layer.depth) ** -0.5, rng.child("w2"))
        else:
            w1_HD = _uniform(ffn.w1_HD, first, rng.child("w1"))
            w2_DH = _uniform(ffn.w2_DH, second, rng.child("w2"))
        b1_H, b2_D = _uniform(ffn.b1_H, first, rng.child("b1")), _uniform(ffn.b2_D, second, rng.child("b2"))
        return ffn.expert(w1_HD=w1_HD, b1_H=b1_H, w2_DH=w2_DH, b2_D=b2_D)


def _normal(like: Tensor, std: float, rng: Stream) -> Tensor:
    return (torch.randn(like.shape, generator=rng.generator(), dtype=torch.float64) * std).to(like)


def _uniform(like: Tensor, bound: float, rng: Stream) -> Tensor:
    return ((torch.rand(like.shape, generator=rng.generator(), dtype=torch.float64) * 2 - 1) * bound).to(like)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [Scratch]
