"""SPRI, SVD-partitioned residual initialisation (Shan et al., arXiv:2606.16456), reconstructed from its abstract.

Each matrix of the FFN is split by its singular values: all experts get the leading part, and the residual's components
are dealt out among them, so that experts differ in what the dense model uses least. Training has two stages: first the
experts' residuals alone (with the router and the rest of the model), then everything.

Neither full text nor code was found: the abstract and a digest tell of SVD, a partitioned residual and two stages, and
everything else here is our choice. In stage 1 a residual is trained as two factors of rank |P_e|, A_e = U diag(s)^1/2
and B_e = diag(s)^1/2 V^T over its components P_e, since a full matrix would make stage 1 the ordinary training of W_e;
the base and the biases stay. Stage 2 adds them up (A_e B_e to the base, exact to rounding) and trains plain experts.

Shape suffixes: T tokens, D width, H hidden, I and O inputs and outputs of a matrix, K singular values, P an expert's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, random_router
from upcycle_bench.threads import one_thread

if TYPE_CHECKING:
    from upcycle_bench.moe import MoEFFN


@dataclass(frozen=True, kw_only=True)
class Spri(Strategy):
    """A common leading part, residual components dealt out among the experts, training in two stages."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="spri",
        summary="SPRI (reconstructed): a common low-rank part, the SVD residual dealt out, trained in two stages",
        paper="Shan et al., SPRI, arXiv:2606.16456",
        url="https://arxiv.org/abs/2606.16456",
        status="reconstructed",
        reconstructed=(
            "the whole method: only its abstract and a third-party digest could be read",
            "rank kept (75 % of the singular values), interleaved partition, scale 1, both matrices, biases copied",
            "stage 1 trains the residual as two factors; base and biases frozen, router and the rest trained",
            "stage 1 takes half of the steps",
        ),
    )

    rank_fraction: float = Field(default=0.75, ge=0, le=1, description="share of the spectrum that all experts keep")
    rank_by: Literal["count", "energy"] = Field(
        default="count", description="a share of the singular values, or of the sum of their squares"
    )
    partition: Literal["interleaved", "contiguous", "random"] = Field(
        default="interleaved", description="how the residual's components are dealt out"
    )
    mode: Literal["base_plus_residual", "additive"] = Field(
        default="base_plus_residual", description="W_e = B + scale R_e, or W + scale (R_e - (W - B) / N)"
    )
    scale: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="of the residual; N keeps the experts' mean in mode base_plus_residual",
    )
    which: Literal["both", "w1", "w2"] = Field(default="both", description="the matrices to partition")
    stage1_fraction: float = Field(
        default=0.5, ge=0, le=1, description="share of the steps that train the residuals only; 0: none do"
    )
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        parts = {}
        for name, weight_OI in (("w1", ffn.w1_HD), ("w2", ffn.w2_DH)):
            if self.which in ("both", name):
                parts[name] = self._parts(weight_OI, layer.num_experts, rng.child(name))
            else:
                parts[name] = [Factored(weight_OI, None) for _ in range(layer.num_experts)]
        experts = [Expert(ffn, first, second) for first, second in zip(parts["w1"], parts["w2"], strict=True)]
        dealt = {f"{name}_components": sum(part.rank for part in parts[name]) for name in parts}
        in_stages = self.stage1_fraction > 0 and any(dealt.values())
        return LayerInit(
            experts if in_stages else [expert.merged() for expert in experts],
            random_router(ffn, layer, rng, self.router_init),
            dealt,
        )

    def stages(self, steps: int) -> Sequence[int]:
        """Stage 2 begins after `stage1_fraction` of the steps, at least one."""
        begin = max(1, round(self.stage1_fraction * steps))
        if self.rank_fraction == 1:  # nothing is left to train apart: sparse upcycling
            return ()
        return (begin,) if self.stage1_fraction > 0 and begin < steps else ()

    def next_stage(self, layers: Mapping[str, MoEFFN]) -> None:
        for layer in layers.values():
            layer.merge()

    def _parts(self, weight_OI: Tensor, num_experts: int, rng: Stream) -> list[Factored]:
        """The matrix of each expert: a frozen base and the factors of its residual."""
        w_OI = weight_OI.double().cpu()
        u_OK, s_K, vt_KI = _svd(w_OI)
        rank = _kept(s_K, self.rank_fraction, self.rank_by)
        groups = _deal(len(s_K) - rank, num_experts, self.partition, rng)
        if len(s_K) == rank:
            return [Factored(weight_OI, None) for _ in groups]
        tail_OI = (u_OK[:, rank:] * s_K[rank:]) @ vt_KI[rank:]
        share = 1.0 if self.mode == "base_plus_residual" else self.scale / num_experts
        base_OI = w_OI - share * tail_OI  # B = W - tail, the same to rounding as the leading components
        parts = []
        for group_P in groups:
            index_P = rank + group_P
            root_P = (self.scale * s_K[index_P]).sqrt()
            factors = u_OK[:, index_P] * root_P, root_P[:, None] * vt_KI[index_P]
            parts.append(Factored(base_OI.to(weight_OI), factors))
        return parts


class Factored(nn.Module):
    """base + A B with a frozen base, [O, I]; without components just the base."""

    def __init__(self, base_OI: Tensor, factors: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.base_OI = nn.Parameter(base_OI.detach().clone(), requires_grad=False)
        self.rank = factors[0].shape[1] if factors else 0
        a_OP, b_PI = factors if factors and self.rank else (None, None)
        self.a_OP = None if a_OP is None else nn.Parameter(a_OP.to(base_OI))
        self.b_PI = None if b_PI is None else nn.Parameter(b_PI.to(base_OI))

    def forward(self, x_TI: Tensor, bias_O: Tensor) -> Tensor:
        y_TO = F.linear(x_TI, self.base_OI, bias_O)
        if self.a_OP is None or self.b_PI is None:
            return y_TO
        return y_TO + F.linear(F.linear(x_TI, self.b_PI), self.a_OP)

    def weight(self) -> Tensor:
        """base + A B."""
        if self.a_OP is None or self.b_PI is None:
            return self.base_OI
        return (self.base_OI.double() + self.a_OP.double() @ self.b_PI.double()).to(self.base_OI)


class Expert(nn.Module):
    """An expert of stage 1, [T, D] -> [T, D]: only the residuals' factors are trained."""

    def __init__(self, ffn: FFN, first: Factored, second: Factored) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.b1_H = nn.Parameter(ffn.b1_H.clone(), requires_grad=False)
        self.b2_D = nn.Parameter(ffn.b2_D.clone(), requires_grad=False)
        self.act = copy.deepcopy(ffn.act)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.second(self.act(self.first(x_TD, self.b1_H)), self.b2_D)

    @torch.no_grad()
    def merged(self) -> nn.Sequential:
        """The plain FFN of stage 2."""
        return FFN(self.first.weight(), self.b1_H, self.second.weight(), self.b2_D, self.act).expert()


def _svd(w_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, K], s [K] (descending), V^T [K, I]; signs such that the largest entry of each column of U is positive."""
    with one_thread():
        u_OK, s_K, vt_KI = torch.linalg.svd(w_OI, full_matrices=False)
    sign_K = u_OK.gather(0, u_OK.abs().argmax(0)[None])[0].sign()
    return u_OK * sign_K, s_K, vt_KI * sign_K[:, None]


def _kept(s_K: Tensor, fraction: float, by: str) -> int:
    """How many leading components all experts keep."""
    if by == "count":
        return round(fraction * len(s_K))
    energy_K = s_K.square().cumsum(0)
    # Rounding must not ask for more than all; fraction 0 keeps none.
    return min(len(s_K), int((energy_K < fraction * energy_K[-1]).sum()) + (fraction > 0))


def _deal(count: int, hands: int, partition: str, rng: Stream) -> list[Tensor]:
    """`count` components, in descending order, into `hands` disjoint groups whose sizes differ by one at most."""
    if partition == "interleaved":
        return [torch.arange(count)[first::hands] for first in range(hands)]
    order = torch.arange(count) if partition == "contiguous" else torch.randperm(count, generator=rng.generator())
    return [group.sort().values for group in order.tensor_split(hands)]


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [Spri]
