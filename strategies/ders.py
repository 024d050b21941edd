"""DeRS upcycling (Huang et al., CVPR 2025, arXiv:2503.01359, https://arxiv.org/abs/2503.01359).

Each expert's matrix is W_i = W_shared + Delta_i (Eq. 3). W_shared starts as the dense weight and is trained by all
experts of the layer. Delta_i starts at zero and has few parameters: two factors of rank P (`ders-lm`), or values at
fixed random places (`ders-sm`). Trained experts are merged into plain FFNs; a record counts what was trained.

Where we differ: experts of LLMs have no biases, those of CLIP do. The base's biases are shared, and `bias_deltas` gives
each expert differences of its own, zero at first. The paper's gates are not renormalised; ours are the protocol's. So
is weight decay: it acts on W_shared, on the factors, and on sparse values as on the entries that they are. There is no
official code; `info.reconstructed` lists what the paper does not state. Rank 4 and rate 0.999 are the paper's for
a "universal FFN" (Table S19). It has rank 1 and rate 0.9999 for multimodal models that start from a fine-tuned FFN, and
rank 4 and rate 0.9 for code.

Shape suffixes: I inputs and O outputs of a matrix, P rank, S sparse places.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import (
    FFN,
    Layer,
    LayerInit,
    RouterInit,
    Strategy,
    StrategyInfo,
    Stream,
    UserError,
    random_router,
)
from upcycle_bench.upcycling import draws
from upcycle_bench.upcycling.deltas import DeltaExpert, LowRank

SHARED_BIASES = "biases (LLMs have none): one trainable pair, shared; differences per expert with option `bias_deltas`"


@dataclass(frozen=True, kw_only=True)
class Ders(Strategy):
    """A shared trainable base, and for each expert a delta whose form the two strategies below choose."""

    preserves_function: ClassVar[bool] = True
    shares_parameters: ClassVar[bool] = True

    bias_deltas: bool = Field(default=False, description="each expert has differences of its own to the shared biases")
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        base, experts = ffn.expert(), []
        for number in range(layer.num_experts):
            own = rng.child("expert", number)
            deltas = self.delta(ffn.w1_HD, own.child("w1")), self.delta(ffn.w2_DH, own.child("w2"))
            experts.append(DeltaExpert(base, *deltas, self.bias_deltas))
        return LayerInit(experts, random_router(ffn, layer, rng, self.router_init))

    def delta(self, weight_OI: Tensor, rng: Stream) -> nn.Module:
        """Delta_i of one expert and matrix (Eq. 3), zero at first."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DersLM(Ders):
    """A shared trainable base with low-rank deltas."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="ders-lm",
        summary="one shared trainable FFN plus a low-rank delta for each expert, random router",
        paper="Huang et al., DeRS, CVPR 2025, arXiv:2503.01359",
        url="https://arxiv.org/abs/2503.01359",
        status="published",
        reconstructed=(
            "distribution of the random factor: kaiming_uniform(a=sqrt 5) (not stated)",
            "rank 4 (arXiv:2604.13508 does not state its rank for CLIP)",
            SHARED_BIASES,
        ),
    )

    rank: int = Field(default=4, ge=1, description="rank of each matrix's delta; the paper has 1 and 4")

    def delta(self, weight_OI: Tensor, rng: Stream) -> LowRank:
        outputs, inputs = weight_OI.shape
        if self.rank > min(outputs, inputs):
            raise UserError(
                f"{self.info.name}: rank {self.rank} exceeds the full rank of a {outputs} x {inputs} matrix; lower it."
            )
        bound = 1 / math.sqrt(inputs)  # kaiming_uniform with a = sqrt 5
        down_PI = draws.uniform((self.rank, inputs), rng.child("down")) * bound
        return LowRank(weight_OI, b_PI=down_PI, a_OP=torch.zeros(outputs, self.rank))


@dataclass(frozen=True, kw_only=True)
class DersSM(Ders):
    """A shared trainable base with sparse deltas."""

    info: ClassVar[StrategyInfo] = replace(
        DersLM.info,
        name="ders-sm",
        summary="one shared trainable FFN plus a sparse delta for each expert, random router",
        reconstructed=("sparsity rate 0.999 for CLIP (the paper has no CLIP)", SHARED_BIASES),
    )

    rate: float = Field(default=0.999, ge=0, lt=1, description="share of each matrix's entries without a delta")

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        made = super().init_layer(ffn, layer, calibration, rng)
        return replace(made, notes={"delta_values": self._count(ffn.w1_HD)})  # of each matrix

    def _count(self, weight_OI: Tensor) -> int:
        return round(weight_OI.numel() * (1 - self.rate))

    def delta(self, weight_OI: Tensor, rng: Stream) -> Sparse:
        count = self._count(weight_OI)
        if count == 0:
            outputs, inputs = weight_OI.shape
            raise UserError(
                f"{self.info.name}: rate {self.rate} leaves no entry of a {outputs} x {inputs} matrix; lower it."
            )
        return Sparse(weight_OI, count, rng.child("places"))


class Sparse(nn.Module):
    """Delta_i with S trained values, zero at first, at fixed places of the flattened matrix; elsewhere always zero."""

    matrix_entries: ClassVar = ("value_S",)  # `training.loop`: they decay
    place_S: Tensor

    def __init__(self, weight_OI: Tensor, count: int, rng: Stream) -> None:
        super().__init__()
        place_S = draws.permutation(weight_OI.numel(), rng)[:count].sort().values
        self.register_buffer("place_S", place_S.to(weight_OI.device))
        self.value_S = nn.Parameter(torch.zeros(count).to(weight_OI))

    def forward(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        """x (W + Delta)^T + b [T, O]; the sum of the matrices is made at each call."""
        return F.linear(x_TI, self.added(weight_OI), bias_O)

    def added(self, weight_OI: Tensor) -> Tensor:
        """W + Delta [O, I] (Eq. 3). Places are unique, so that the sum does not depend on an order."""
        return weight_OI.flatten().index_add(0, self.place_S, self.value_S).view_as(weight_OI)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DersLM, DersSM]
