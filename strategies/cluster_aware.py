"""Cluster-aware upcycling (Chu et al., CVPR 2026, https://arxiv.org/abs/2604.13508), and the paper's two ablations.

A layer's FFN inputs are clustered by direction. Expert i keeps the part of W1 that matters to the tokens of cluster i,
all else is copied, and the router's rows are the centroids. With X_i [D, n_i] the tokens of cluster i:

    Eq. 6       max over clusters and mu of sum_i sum_{x in X_i} mu_i^T x / |x|, with |mu_i| = 1
    Eq. 8       W1_i = SVD_r(W1 S_i) S_i^-1, where S_i S_i^T = C_i = X_i X_i^T, sigma_j singular values of W1 S_i, and
                r > R/2 is the smallest rank that keeps tau of the energy sum_j sigma_j^2
    Eq. 9       |W1 X_i - W1_i X_i|^2 = sum_{j>r} sigma_j^2
    Eq. 10      router = [mu_1; ...; mu_E]
    Eqs. 11-13  while training, an ensemble of all experts teaches the top-k mixture (`upcycling.eesd`)

Where we differ, and why: the text we hold lost the formulas, so they are rebuilt from its sentences. `reconstructed`
lists what it does not state. Clusters are fitted to the first `cluster_tokens` tokens, to bound memory. Eq. 8 is
computed as a projection, without an inverse. Shape suffixes: R = min(H, D) singular values, L left-out ones.
"""

import math
import warnings
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, Stream, random_router
from upcycle_bench.upcycling import clustering, eesd, symmetric
from upcycle_bench.upcycling.moments import ClusterStatistics

PAPER = "Chu et al., Cluster-aware Upcycling, CVPR 2026, arXiv:2604.13508"
FORMULAS = "all formulas (lost in the text we hold; rebuilt from its sentences)"
CHOSEN = (
    FORMULAS,
    "tau = 0.90 (value lost)",
    "centroids mapped back from an uncentred PCA (not stated)",
    "calibration on 131,072 pairs (the text prints 128), clusters fitted on the first 32,768 tokens of them",
)
published = partial(StrategyInfo, paper=PAPER, url="https://arxiv.org/abs/2604.13508", status="published")
distilled = partial(published, footing=eesd.FOOTING)


class Truncated(NamedTuple):
    """W1_i, its rank r, the sigma_j^2 of W1 S_i (descending), and whether the rank floor decided r."""

    w1_HD: Tensor
    rank: int
    energy_R: Tensor
    floor_binds: bool


@dataclass(frozen=True, kw_only=True)
class ClusterOnly(Strategy):
    """Eqs. 6 to 10: the paper's ablation without distillation."""

    info: ClassVar[StrategyInfo] = published(
        name="cluster-only", summary="cluster-aware without distillation (the paper's ablation)", reconstructed=CHOSEN
    )
    tau: float = Field(default=0.90, gt=0, le=1, description="spectral energy an expert keeps")
    rank_floor: float = Field(default=0.5, ge=0, lt=1, description="rank exceeds this fraction of full rank")
    rank_fraction: float = Field(default=0.0, ge=0, le=1, description="share of full rank to keep; 0: tau and floor")
    pca: bool = Field(default=True, description="off: clusters are fitted in all D dimensions")
    pca_divisor: int = Field(default=8, ge=1, description="clusters are fitted in D / this many dimensions")
    router_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="length of the router's rows")
    pairs: int = Field(default=131072, ge=1, description="calibration pairs, at most the training set")
    cluster_tokens: int = Field(default=32768, ge=1, description="tokens per layer on which clusters are fitted")
    kmeans_iterations: int = Field(default=25, ge=1)
    kmeans_restarts: int = Field(default=1, ge=1)

    @property
    def calibration_pairs(self) -> int:
        return self.pairs

    def check(self) -> None:
        clustering.import_faiss()

    def calibrator(self, ffn: FFN, layer: Layer, rng: Stream) -> ClusterStatistics:
        pca_dim = max(1, ffn.width // self.pca_divisor) if self.pca else ffn.width
        kmeans = {"niter": self.kmeans_iterations, "nredo": self.kmeans_restarts}
        rng = _stream_of("cluster-aware", self, rng)
        return ClusterStatistics(ffn.width, layer.num_experts, pca_dim, self.cluster_tokens, rng, **kmeans)

    def init_layer(self, ffn: FFN, layer: Layer, calibration: ClusterStatistics, rng: Stream) -> LayerInit:
        calibration.finish()  # Eq. 6, and C_i of Eq. 8
        for _ in range(int((calibration.count_E == 0).sum())):
            warnings.warn(f"{layer.name}: a cluster is empty, its expert is a copy of the FFN", stacklevel=2)
        factors = symmetric.decompose(ffn.w1_HD)
        made = [self.truncate(ffn.w1_HD, factors, calibration.moment(i)) for i in range(layer.num_experts)]  # Eq. 8
        router_ED = calibration.centroid_ED.to(ffn.w1_HD) * self.router_scale  # Eq. 10
        ranks, binds = [one.rank for one in made], [one.floor_binds for one in made]
        notes = {"mean_rank": sum(ranks) / len(made), "rank_floor_binds_share": sum(binds) / len(made)}
        return LayerInit([ffn.expert(w1_HD=one.w1_HD) for one in made], router_ED, calibration.notes() | notes)

    @torch.no_grad()
    def truncate(self, w1_HD: Tensor, factors: symmetric.Factors, c_DD: Tensor) -> Truncated:
        """W1_i of Eq. 8 for one C_i (float64) and W1 = Q R (`factors`). An empty cluster has C_i = 0 and keeps W1.

        Eq. 8 is W1_i = U_r U_r^T W1 with U = Q V and R C_i R^T = V diag(sigma^2) V^T, so C_i may be singular. Where r
        exceeds the number of sigma_j^2 above rounding, a ridge decides the directions beyond them.
        """
        if not c_DD.any():
            return Truncated(w1_HD.clone(), len(factors.r_RD), c_DD.new_zeros(len(factors.r_RD)), False)
        energy_R, v_RR, above_rounding = symmetric.spectrum(factors, c_DD)
        rank, floor_binds = self.kept_rank(energy_R)
        if rank > above_rounding:
            energy_R, v_RR, _ = symmetric.spectrum(factors, symmetric.with_ridge(c_DD))
            rank, floor_binds = self.kept_rank(energy_R)
        v_RL = v_RR[:, : len(energy_R) - rank]  # of the least sigma_j; none at full rank, where W1 stays as it is
        lost_HD = symmetric.project(factors, v_RL)  # U_L U_L^T W1: on X_i it has the energy of Eq. 9
        return Truncated((w1_HD - lost_HD).to(w1_HD.dtype), rank, energy_R, floor_binds)

    def kept_rank(self, energy_R: Tensor) -> tuple[int, bool]:
        """r of Eq. 8, and whether the floor decides it; a positive `rank_fraction` decides alone."""
        if self.rank_fraction > 0:
            return max(1, round(len(energy_R) * self.rank_fraction)), False
        full_rank, kept_R = len(energy_R), energy_R.cumsum(0)
        share_R = kept_R / kept_R[-1]  # ends in exactly 1, so that no tau < 1 asks for rank R + 1
        by_energy = full_rank if self.tau == 1 else int((share_R < self.tau).sum()) + 1
        floor = min(full_rank, math.floor(full_rank * self.rank_floor) + 1)
        return max(by_energy, floor), floor > by_energy


@dataclass(frozen=True, kw_only=True)
class ClusterAware(eesd.Distilled, ClusterOnly):
    """Eqs. 6 to 13: the whole method."""

    info: ClassVar[StrategyInfo] = distilled(
        name="cluster-aware",
        summary="experts from cluster subspaces, router from centroids, EMA-ensemble distillation",
        reconstructed=(*CHOSEN, *eesd.RECONSTRUCTED),
    )


@dataclass(frozen=True, kw_only=True)
class EESDOnly(eesd.Distilled):
    """Eqs. 11 to 13 on copies and a random router, as sparse upcycling makes them: the ablation without clusters."""

    info: ClassVar[StrategyInfo] = distilled(
        name="eesd-only",
        summary="copies and a random router, with cluster-aware's distillation (the paper's ablation)",
        reconstructed=(FORMULAS, *eesd.RECONSTRUCTED),
    )
    preserves_function: ClassVar[bool] = True
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        router_ED = random_router(ffn, layer, _stream_of("sparse-upcycling", self, rng), self.router_init)
        return LayerInit([ffn.expert() for _ in range(layer.num_experts)], router_ED)


def _stream_of(name: str, ablation: Strategy, rng: Stream) -> Stream:
    """The stream of another strategy: at one seed both start from the same model and differ in distillation alone."""
    return Stream(tuple(name if part == ablation.info.name else part for part in rng.key))


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [ClusterAware, ClusterOnly, EESDOnly]
