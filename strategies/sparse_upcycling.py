"""Sparse upcycling (Komatsuzaki et al., ICLR 2023, arXiv:2212.05055).

Every expert is a copy of the dense FFN and the router is random, so that with renormalised gates the upcycled model
computes what the dense one did, and training breaks the symmetry. Where we differ: the paper's vision models use
Expert Choice routing and resume the optimiser; here routing, capacity and optimiser are the protocol's, as in the
comparison of arXiv:2604.13508 (token choice, fresh optimiser state).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, random_router


@dataclass(frozen=True, kw_only=True)
class SparseUpcycling(Strategy):
    """N copies of the FFN, a random router."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="sparse-upcycling",
        summary="every expert a copy of the dense FFN, random router",
        paper="Komatsuzaki et al., Sparse Upcycling, ICLR 2023, arXiv:2212.05055",
        url="https://arxiv.org/abs/2212.05055",
        status="published",
    )
    preserves_function: ClassVar[bool] = True

    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        return LayerInit(
            [ffn.expert() for _ in range(layer.num_experts)], random_router(ffn, layer, rng, self.router_init)
        )


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [SparseUpcycling]
