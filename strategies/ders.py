"""DeRS upcycling (Huang et al., CVPR 2025, arXiv:2503.01359): one shared base, a small delta for each expert.

Each expert's matrix is W_i = W_shared + Delta_i. W_shared starts as the dense weight and is trained by all experts of
the layer; Delta_i starts at zero and has few parameters: two factors of rank r (`ders-lm`), or values at fixed random
places (`ders-sm`). So a layer of N experts has hardly more parameters than one FFN. After training every expert is
merged into a plain FFN; a record counts the parameters that were trained.

Where we differ: LLM experts have no biases, CLIP's have: the base's pair is shared, and `bias_deltas` gives each expert
zero-initialised differences of its own. The paper's router is not renormalised; ours is the protocol's. There is no
official code; what the paper does not state is in `info.reconstructed`. Weight decay is the protocol's: on W_shared
and the low-rank factors, not on the sparse values and biases, which have one dimension. Choosing rank and rate: the
paper's Table S19 has rank 4 and rate 0.999 in its setting without a domain ("universal FFN"), which are our defaults;
rank 1 and rate 0.9999 for multimodal models that start from a fine-tuned FFN, rank 4 and rate 0.9 for code.

Shape suffixes: T tokens, D width, H hidden, I and O inputs and outputs of a matrix, R rank, S sparse places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench.errors import UserError
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, random_router

PAPER = "Huang et al., DeRS, CVPR 2025, arXiv:2503.01359"
URL = "https://arxiv.org/abs/2503.01359"
SHARED_BIASES = "biases (LLMs have none): one trainable pair, shared; differences per expert with option `bias_deltas`"


class LowRank(nn.Module):
    """Delta = up down, [O, I] of rank <= R; zero at first."""

    def __init__(self, weight_OI: Tensor, rank: int, rng: Stream) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform with a = sqrt 5
        uniform_RI = torch.rand(rank, inputs, generator=rng.generator(), dtype=torch.float64) * 2 - 1
        self.down_RI = nn.Parameter((uniform_RI * bound).to(weight_OI))
        self.up_OR = nn.Parameter(torch.zeros(outputs, rank).to(weight_OI))

    def forward(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        """x (W + up down)^T + b without making the matrix."""
        return F.linear(x_TI, weight_OI, bias_O) + F.linear(F.linear(x_TI, self.down_RI), self.up_OR)

    def added(self, weight_OI: Tensor) -> Tensor:
        """W + Delta."""
        return (weight_OI.double() + self.up_OR.double() @ self.down_RI.double()).to(weight_OI)


class Sparse(nn.Module):
    """Delta with S values at fixed places of the flattened matrix; zero at first, and for ever elsewhere."""

    place_S: Tensor

    def __init__(self, weight_OI: Tensor, count: int, rng: Stream) -> None:
        super().__init__()
        order = torch.randperm(weight_OI.numel(), generator=rng.generator())
        self.register_buffer("place_S", order[:count].sort().values.to(weight_OI.device))
        self.value_S = nn.Parameter(torch.zeros(count).to(weight_OI))

    def forward(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        """x (W + Delta)^T + b; the matrix is made anew each time."""
        return F.linear(x_TI, self.added(weight_OI), bias_O)

    def added(self, weight_OI: Tensor) -> Tensor:
        """W + Delta; places are unique, so that the sum has one order."""
        return weight_OI.flatten().index_add(0, self.place_S, self.value_S).view_as(weight_OI)


class Expert(nn.Module):
    """FFN(x) of the shared base plus this expert's deltas, [T, D] -> [T, D]; all experts of a layer hold one `base`."""

    def __init__(self, base: Any, deltas: Sequence[LowRank | Sparse], bias_deltas: bool) -> None:
        super().__init__()
        self.base: Any = base  # what `FFN.expert` makes
        self.delta1, self.delta2 = deltas
        self.bias1_H, self.bias2_D = (
            nn.Parameter(torch.zeros_like(linear.bias)) if bias_deltas else None for linear in (base.c_fc, base.c_proj)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        b1_H, b2_D = self._biases()
        hidden_TH = self.base.gelu(self.delta1(x_TD, self.base.c_fc.weight, b1_H))
        return self.delta2(hidden_TH, self.base.c_proj.weight, b2_D)

    def _biases(self) -> tuple[Tensor, Tensor]:
        b1_H, b2_D = self.base.c_fc.bias, self.base.c_proj.bias
        if self.bias1_H is None or self.bias2_D is None:
            return b1_H, b2_D
        return b1_H + self.bias1_H, b2_D + self.bias2_D

    @torch.no_grad()
    def merged(self) -> nn.Sequential:
        """W_i = W_shared + Delta_i as a plain FFN (Eq. 3)."""
        ffn, (b1_H, b2_D) = FFN.of(self.base), self._biases()
        return ffn.expert(w1_HD=self.delta1.added(ffn.w1_HD), b1_H=b1_H, w2_DH=self.delta2.added(ffn.w2_DH), b2_D=b2_D)


Delta = Callable[[Tensor, Stream], "LowRank | Sparse"]


def experts(ffn: FFN, layer: Layer, delta: Delta, bias_deltas: bool, rng: Stream) -> list[nn.Module]:
    """N experts around one base."""
    base = ffn.expert()
    return [
        Expert(base, [delta(ffn.w1_HD, own.child("w1")), delta(ffn.w2_DH, own.child("w2"))], bias_deltas)
        for own in (rng.child("expert", number) for number in range(layer.num_experts))
    ]


@dataclass(frozen=True, kw_only=True)
class DersLM(Strategy):
    """A shared trainable base, low-rank deltas."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="ders-lm",
        summary="one shared trainable FFN plus a low-rank delta for each expert, random router",
        paper=PAPER,
        url=URL,
        status="published",
        reconstructed=(
            "distribution of the random factor: kaiming_uniform(a=sqrt 5) (not stated)",
            "rank 4 (arXiv:2604.13508 does not state its rank for CLIP)",
            SHARED_BIASES,
        ),
    )
    preserves_function: ClassVar[bool] = True
    shares_parameters: ClassVar[bool] = True

    rank: int = Field(default=4, ge=1, description="rank of each matrix's delta; the paper has 1 and 4")
    bias_deltas: bool = Field(default=False, description="each expert has differences of its own to the shared biases")
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        if self.rank > (most := min(ffn.w1_HD.shape)):
            raise UserError(f"{self.info.name}: rank {self.rank} exceeds full rank {most} at {layer.name}; lower it.")
        made = experts(ffn, layer, lambda w, rng: LowRank(w, self.rank, rng.child("down")), self.bias_deltas, rng)
        return LayerInit(made, random_router(ffn, layer, rng, self.router_init))


@dataclass(frozen=True, kw_only=True)
class DersSM(Strategy):
    """A shared trainable base, sparse deltas."""

    info: ClassVar[StrategyInfo] = replace(
        DersLM.info,
        name="ders-sm",
        summary="one shared trainable FFN plus a sparse delta for each expert, random router",
        reconstructed=("sparsity rate 0.999 for CLIP (the paper has no CLIP)", SHARED_BIASES),
    )
    preserves_function: ClassVar[bool] = True
    shares_parameters: ClassVar[bool] = True

    rate: float = Field(default=0.999, ge=0, lt=1, description="share of each matrix's entries without a delta")
    bias_deltas: bool = Field(default=False, description="each expert has differences of its own to the shared biases")
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        count = round(ffn.w1_HD.numel() * (1 - self.rate))
        if count == 0:
            shape = " x ".join(map(str, ffn.w1_HD.shape))
            raise UserError(f"{self.info.name}: rate {self.rate} leaves no entry of a {shape} matrix; lower it.")
        made = experts(ffn, layer, lambda w, rng: Sparse(w, count, rng.child("places")), self.bias_deltas, rng)
        return LayerInit(made, random_router(ffn, layer, rng, self.router_init), {"delta_values": count})  # per matrix


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DersLM, DersSM]
