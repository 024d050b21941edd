"""Drop-Upcycling (Nakamura et al., ICLR 2025, arXiv:2502.19261).

Every expert is a copy of the dense FFN in which a random share of the hidden neurons starts anew: the rows of W1 and
the columns of W2 that belong to them are drawn from a normal distribution with the mean and the standard deviation of
the block they replace (one scalar each per matrix and expert). Experts differ from the start and keep most knowledge.

The paper draws one index set S per expert for all matrices (`shared_indices=True`). The authors' code, with which the
published runs were made, first permutes the neurons of each expert, which changes no function, and then draws an index
set of its own for each matrix (`shared_indices=False`): of the neurons, (1 - r)^2 instead of 1 - r stay untouched.

Where we differ: LLaMA has no biases, CLIP has; statistics are taken in float64 (the code: bfloat16) and with n - 1,
as the code does (the paper does not say); the router is drawn as for every other strategy, not U with std 0.02.

Shape suffixes: D width, H hidden neurons, S those of them that are re-initialised.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, random_router

Bias = Literal["keep", "reinit", "zero"]


@dataclass(frozen=True, kw_only=True)
class DropUpcycling(Strategy):
    """Copies of the FFN, a share of each copy's hidden neurons re-initialised, a random router."""

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
    preserves_function: ClassVar[bool] = False

    ratio: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the neurons to re-initialise; for CLIP 0.25 did better (arXiv:2604.13508, Table A.1)",
    )
    shared_indices: bool = Field(
        default=True, description="one index set for W1 and W2, as in the paper; false: one each, as in its code"
    )
    bias: Bias = Field(default="keep", description="what becomes of b1 where rows of W1 are re-initialised")
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        count = int(self.ratio * ffn.hidden)
        return LayerInit(
            [self._expert(ffn, count, rng.child("expert", number)) for number in range(layer.num_experts)],
            random_router(ffn, layer, rng, self.router_init),
            {"reinitialised_neurons": count},  # of each matrix
        )

    def _expert(self, ffn: FFN, count: int, rng: Stream) -> nn.Sequential:
        first_S = _order(ffn.hidden, rng.child("w1", "indices"))[:count]
        if self.shared_indices:
            order_H, second_S = torch.arange(ffn.hidden), first_S
        else:
            order_H = _order(ffn.hidden, rng.child("permutation"))
            second_S = _order(ffn.hidden, rng.child("w2", "indices"))[:count]
        w1_HD, b1_H, w2_DH = ffn.w1_HD[order_H], ffn.b1_H[order_H], ffn.w2_DH[:, order_H]  # copies
        w1_HD[first_S] = _redrawn(w1_HD[first_S], rng.child("w1", "values"))
        w2_DH[:, second_S] = _redrawn(w2_DH[:, second_S], rng.child("w2", "values"))
        if self.bias == "reinit":
            b1_H[first_S] = _redrawn(b1_H[first_S], rng.child("b1", "values"))
        elif self.bias == "zero":
            b1_H[first_S] = 0
        return ffn.expert(w1_HD=w1_HD, b1_H=b1_H, w2_DH=w2_DH)


def _order(hidden: int, rng: Stream) -> Tensor:
    """The neurons in a random order [H]."""
    return torch.randperm(hidden, generator=rng.generator())


def _redrawn(block: Tensor, rng: Stream) -> Tensor:
    """Normal draws with the block's mean and standard deviation (n - 1); fewer than two numbers stay as they are."""
    if block.numel() < 2:
        return block
    numbers = block.double().cpu().numpy()  # numpy, because torch's sums depend on the number of threads
    mean, std = float(numbers.mean()), float(numbers.std(ddof=1))
    noise = torch.randn(block.shape, generator=rng.generator(), dtype=torch.float64)
    return (mean + std * noise).to(block)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DropUpcycling]
