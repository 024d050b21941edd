"""Sparse upcycling (Komatsuzaki et al., ICLR 2023, arXiv:2212.05055, https://arxiv.org/abs/2212.05055).

Every expert is a copy of the dense FFN and the router is random. With renormalised gates the upcycled model computes
what the dense one did, and training breaks the symmetry. With `top_k=1` it does not: the single gate is the router's
raw probability, which scales the output.

Where we differ: the paper's vision models use Expert Choice routing and resume the optimiser. Here routing, capacity
and optimiser are the protocol's, as in the comparison of arXiv:2604.13508 (token choice, fresh optimiser state). Noise
on the copies or on the router is an option; the literature reports no gain from it. With noise on W1 and W2 the model
no longer computes what the dense one did; noise on the router keeps the function.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, Stream, random_router
from upcycle_bench.upcycling import draws


@dataclass(frozen=True, kw_only=True)
class SparseUpcycling(Strategy):
    """Experts are copies of the FFN, the router is random."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="sparse-upcycling",
        summary="every expert a copy of the dense FFN, random router",
        paper="Komatsuzaki et al., Sparse Upcycling, ICLR 2023, arXiv:2212.05055",
        url="https://arxiv.org/abs/2212.05055",
        status="published",
    )
    preserves_function: ClassVar[bool] = True

    router_init: RouterInit = "deepspeed"
    expert_noise_std: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="standard deviation of noise added to each expert's W1, W2"
    )
    expert_noise_rel: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="the same in units of the matrix's own standard deviation; with both, both are added",
    )
    router_noise_std: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="standard deviation of noise added to the router's rows"
    )

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        router_ED = random_router(ffn, layer, rng, self.router_init)
        return LayerInit(
            [self._expert(ffn, rng.child("expert", number)) for number in range(layer.num_experts)],
            draws.noisy(router_ED, self.router_noise_std, rng.child("router noise")),
        )

    def _expert(self, ffn: FFN, rng: Stream) -> nn.Sequential:
        return ffn.expert(
            w1_HD=draws.noisy(ffn.w1_HD, self._noise_std(ffn.w1_HD), rng.child("w1")),
            w2_DH=draws.noisy(ffn.w2_DH, self._noise_std(ffn.w2_DH), rng.child("w2")),
        )

    def _noise_std(self, weight: Tensor) -> float:
        """Standard deviation of the sum of both noises, the absolute and the relative one."""
        if self.expert_noise_rel == 0:
            return self.expert_noise_std
        return math.hypot(self.expert_noise_std, self.expert_noise_rel * draws.mean_and_std(weight)[1])


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [SparseUpcycling]
