"""SPRI, SVD-partitioned residual initialisation (Shan et al., https://arxiv.org/abs/2606.16456), from its abstract.

Each matrix of the FFN is split by its singular values. All experts get the leading part B, and the residual's
components are dealt out among them, so that experts differ in what the dense model uses least:

    W_e = B + R_e       R_e = sum over the components j of expert e of s_j u_j v_j^T

Training has two stages: first the residuals, with the router and the rest of the model, then everything.

Where we differ: neither full text nor code was found. The abstract and a digest tell of an SVD, a partitioned residual
and two stages; the rest is our choice. In stage 1 a residual is trained as two factors, A_e = U diag(s)^1/2 and
B_e = diag(s)^1/2 V^T, while B and the biases stay: trained as a full matrix, it would be the ordinary training of W_e.
Before stage 2, A_e B_e is added to B (exact to rounding), and the experts are plain.

Shape suffixes: O outputs and I inputs of a matrix, M = min(O, I) singular values, P those of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import (
    FFN,
    Layer,
    LayerInit,
    MoEFFN,
    RouterInit,
    Strategy,
    StrategyInfo,
    Stream,
    random_router,
)
from upcycle_bench.upcycling import draws
from upcycle_bench.upcycling.deltas import DeltaExpert, LowRank


@dataclass(frozen=True, kw_only=True)
class Spri(Strategy):
    """Experts are a common leading part and residual components of their own, trained in two stages."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="spri",
        summary="SPRI (reconstructed): a common low-rank part, the SVD residual dealt out, trained in two stages",
        paper="Shan et al., SPRI, arXiv:2606.16456",
        url="https://arxiv.org/abs/2606.16456",
        status="reconstructed",
        footing="optimiser restarts at its second stage",
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
        default="base_plus_residual", description="W_e = B + scale R_e, or W + scale (R_e - (W - B) / E)"
    )
    scale: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="of R_e; E keeps the experts' mean in mode base_plus_residual",
    )
    which: Literal["both", "w1", "w2"] = Field(default="both", description="the matrices to partition")
    stage1_fraction: float = Field(
        default=0.5, ge=0, le=1, description="share of the steps that train the residuals only; 0: none do"
    )
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        w1_HD, residuals1 = self._split("w1", ffn.w1_HD, layer.num_experts, rng)
        w2_DH, residuals2 = self._split("w2", ffn.w2_DH, layer.num_experts, rng)
        experts: list[Any] = []
        for residual1, residual2 in zip(residuals1, residuals2, strict=True):
            base = ffn.expert(w1_HD=w1_HD, w2_DH=w2_DH).requires_grad_(False)
            experts.append(DeltaExpert(base, residual1, residual2))
        notes = {
            "w1_components": sum(len(residual.b_PI) for residual in residuals1),
            "w2_components": sum(len(residual.b_PI) for residual in residuals2),
        }
        if self.stage1_fraction == 0 or not any(notes.values()):
            experts = [expert.merged() for expert in experts]
        return LayerInit(experts, random_router(ffn, layer, rng, self.router_init), notes)

    def stages(self, steps: int) -> Sequence[int]:
        """Stage 2 begins after `stage1_fraction` of the steps, at least one."""
        begin = max(1, round(self.stage1_fraction * steps))
        if self.rank_fraction == 1:  # there is no residual: this is sparse upcycling
            return ()
        return (begin,) if self.stage1_fraction > 0 and begin < steps else ()

    def next_stage(self, layers: Mapping[str, MoEFFN]) -> None:
        for layer in layers.values():
            layer.merge()

    def _split(self, name: str, weight_OI: Tensor, experts: int, rng: Stream) -> tuple[Tensor, list[LowRank]]:
        """The base [O, I] that all experts have, and the residual of each as two factors."""
        w_OI = weight_OI.double().cpu()
        u_OM, s_M, vt_MI = draws.svd(w_OI)
        split = self.which in ("both", name)
        rank = kept(s_M, self.rank_fraction, self.rank_by) if split else len(s_M)
        base_OI = weight_OI
        if rank < len(s_M):
            tail_OI = (u_OM[:, rank:] * s_M[rank:]) @ vt_MI[rank:]
            share = 1.0 if self.mode == "base_plus_residual" else self.scale / experts
            base_OI = (w_OI - share * tail_OI).to(weight_OI)  # B = W - tail
        residuals = []
        for dealt_P in deal(len(s_M) - rank, experts, self.partition, rng.child(name)):
            index_P = rank + dealt_P
            root_P = (self.scale * s_M[index_P]).sqrt()
            factors = {"a_OP": u_OM[:, index_P] * root_P, "b_PI": root_P[:, None] * vt_MI[index_P]}
            residuals.append(LowRank(weight_OI, **factors))
        return base_OI, residuals


def kept(s_M: Tensor, fraction: float, by: str) -> int:
    """How many leading components all experts keep."""
    if by == "count":
        return round(fraction * len(s_M))
    energy_M = s_M.square().cumsum(0)
    # `min`, because rounding can leave the sum below a fraction of 1. Fraction 0 keeps none.
    return min(len(s_M), int((energy_M < fraction * energy_M[-1]).sum()) + (fraction > 0))


def deal(count: int, hands: int, partition: str, rng: Stream) -> list[Tensor]:
    """The numbers of `count` components in `hands` disjoint groups, int64 [P]; sizes differ by one at most."""
    if partition == "interleaved":
        return [torch.arange(count)[first::hands] for first in range(hands)]
    order = torch.arange(count) if partition == "contiguous" else draws.permutation(count, rng)
    return [group.sort().values for group in order.tensor_split(hands)]


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [Spri]
