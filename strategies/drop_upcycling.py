"""Drop-Upcycling (Nakamura et al., ICLR 2025, arXiv:2502.19261, https://arxiv.org/abs/2502.19261).

Every expert is a copy of the dense FFN in which a random share r of the hidden neurons starts anew. Their rows of W1
and columns of W2 are drawn from a normal distribution with the mean and standard deviation of the block that they
replace, one of each per matrix and expert. So experts differ from the start, and keep most of what the FFN knows.

The paper draws one index set S per expert for all matrices (`shared_indices=True`). The authors' code made the
published runs. It first permutes the neurons of each expert, which keeps the function, and then draws an index set for
each matrix (`shared_indices=False`). So (1 - r)^2 of the neurons stay untouched, instead of 1 - r.

Where we differ: LLaMA has no biases, CLIP has (option `bias`). Statistics are taken in float64 (the code: bfloat16) and
over n - 1, as in the code; the paper does not say. The router is drawn as for every other strategy, not from a uniform
distribution with standard deviation 0.02, so that only the experts are compared.

Shape suffixes: S re-initialised neurons.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, Stream, random_router
from upcycle_bench.upcycling import draws


@dataclass(frozen=True, kw_only=True)
class DropUpcycling(Strategy):
    """Experts are copies of the FFN with a share of the hidden neurons re-initialised, the router is random."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="drop-upcycling",
        summary="copies of the FFN with a random share of the neurons re-initialised, random router",
        paper="Nakamura et al., Drop-Upcycling, ICLR 2025, arXiv:2502.19261",
        url="https://arxiv.org/abs/2502.19261",
        status="published",
        reconstructed=(
            "biases (LLaMA has none): b2 copied; b1 kept, or re-initialised with the rows of W1 (option `bias`)",
        ),
    )

    ratio: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the neurons to re-initialise; for CLIP 0.25 did better (arXiv:2604.13508, Table A.1)",
    )
    shared_indices: bool = Field(
        default=True, description="one index set for W1 and W2, as in the paper; false: one each, as in its code"
    )
    bias: Literal["keep", "reinit", "zero"] = Field(
        default="keep", description="what becomes of b1 where rows of W1 are re-initialised"
    )
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        count = int(self.ratio * ffn.hidden)
        return LayerInit(
            [self._expert(ffn, count, rng.child("expert", number)) for number in range(layer.num_experts)],
            random_router(ffn, layer, rng, self.router_init),
            {"reinitialised_neurons": count},  # of each matrix
        )

    def _expert(self, ffn: FFN, count: int, rng: Stream) -> nn.Sequential:
        first_S = draws.permutation(ffn.hidden, rng.child("w1", "indices"))[:count]
        if self.shared_indices:
            order_H, second_S = torch.arange(ffn.hidden), first_S
        else:
            order_H = draws.permutation(ffn.hidden, rng.child("permutation"))
            second_S = draws.permutation(ffn.hidden, rng.child("w2", "indices"))[:count]
        w1_HD, b1_H, w2_DH = ffn.w1_HD[order_H], ffn.b1_H[order_H], ffn.w2_DH[:, order_H]  # copies
        w1_HD[first_S] = draws.redrawn(w1_HD[first_S], rng.child("w1", "values"))
        w2_DH[:, second_S] = draws.redrawn(w2_DH[:, second_S], rng.child("w2", "values"))
        if self.bias == "reinit":
            b1_H[first_S] = draws.redrawn(b1_H[first_S], rng.child("b1", "values"))
        elif self.bias == "zero":
            b1_H[first_S] = 0
        return ffn.expert(w1_HD=w1_HD, b1_H=b1_H, w2_DH=w2_DH)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DropUpcycling]
