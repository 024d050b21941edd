"""Cluster-aware upcycling (Chu et al., CVPR 2026, arXiv:2604.13508), and the paper's two ablations by name.

The dense model's FFN inputs are clustered by direction; expert i keeps the part of W1 that matters to cluster i
(data-aware truncated SVD), and the router's rows are the cluster centroids. While training, an EMA ensemble of all
experts teaches the top-k mixture (expert-ensemble self-distillation, EESD: `upcycle_bench.eesd`). `cluster-only` is the
first without the second, `eesd-only` the second on sparse upcycling's copies.

Where we differ, and why: the paper's formulas were lost in the text we hold, so Eqs. 6 to 13 are our reconstruction
from its sentences; values it does not state are listed in `info.reconstructed`. Clusters are fitted on the first
`cluster_tokens` tokens of a random stream and every token is then assigned in that same, single forward pass. The
truncation is computed as a projection in output space, W1_i = U_r U_r^T W1, which equals Eq. 8 without an inverse.

Shape suffixes: T tokens, D width, H hidden, N experts, R singular values (min(H, D)).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench import eesd
from upcycle_bench.clustering import CentroidMap, import_faiss, spherical_kmeans
from upcycle_bench.eesd import Distilled
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, random_router

Method = Literal["projection", "cholesky"]

PAPER = "Chu et al., Cluster-aware Upcycling, CVPR 2026, arXiv:2604.13508"
URL = "https://arxiv.org/abs/2604.13508"
FORMULAS = "all formulas (lost in the text we hold; rebuilt from its sentences)"
CHOSEN = (
    "tau = 0.90 (value lost)",
    "centroids mapped back from an uncentred PCA (not stated)",
    "calibration on 131,072 pairs (the text prints 128), clusters fitted on the first 32,768 tokens of them",
)


@dataclass(frozen=True, kw_only=True)
class Clustered(Strategy):
    """Experts from cluster subspaces, router from cluster centroids."""

    tau: float = Field(default=0.90, gt=0, le=1, description="spectral energy an expert keeps")
    rank_floor: float = Field(default=0.5, ge=0, lt=1, description="rank exceeds this fraction of full rank")
    rank_fraction: float = Field(default=0.0, ge=0, le=1, description="share of full rank to keep; 0: tau and floor")
    method: Method = Field(default="projection", description="cholesky: SVD_r(W S) S^-1 as printed, a cross-check")
    pca: bool = Field(default=True, description="off: clusters are fitted in all D dimensions")
    pca_divisor: int = Field(default=8, ge=1, description="clusters are fitted in D / this many dimensions")
    pca_center: bool = Field(default=False, description="subtract the mean, which no bias-free router can express")
    centroid_map: CentroidMap = Field(
        default="backproject", description="recompute: means in full D over the first cluster_tokens"
    )
    router_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="length of the router's rows")
    pairs: int = Field(default=131072, ge=1, description="calibration pairs, at most the training set")
    cluster_tokens: int = Field(default=32768, ge=1, description="tokens per layer on which clusters are fitted")
    kmeans_iterations: int = Field(default=25, ge=1)
    kmeans_restarts: int = Field(default=1, ge=1)

    @property
    def calibration_pairs(self) -> int:
        return self.pairs

    def check(self) -> None:
        import_faiss()

    def calibrator(self, ffn: FFN, layer: Layer, rng: Stream) -> ClusterStatistics:
        return ClusterStatistics(self, ffn.width, layer.num_experts, rng)

    def init_layer(self, ffn: FFN, layer: Layer, calibration: ClusterStatistics, rng: Stream) -> LayerInit:
        calibration.finish()
        experts, ranks, floors = [], [], 0
        for count, moment_DD in zip(calibration.count_N.tolist(), calibration.moment_NDD, strict=True):
            if count == 0:  # nothing to truncate by
                warnings.warn(f"{layer.name}: a cluster is empty, its expert is a copy of the FFN", stacklevel=2)
                experts.append(ffn.expert())
                ranks.append(min(ffn.w1_HD.shape))
                continue
            truncated = truncate(
                ffn.w1_HD,
                moment_DD,
                tau=self.tau,
                rank_floor=self.rank_floor,
                rank_fraction=self.rank_fraction,
                method=self.method,
            )
            experts.append(ffn.expert(w1_HD=truncated.w1_HD))
            ranks.append(truncated.rank)
            floors += truncated.floor_binds
        shares_N = calibration.count_N / calibration.count_N.sum()
        return LayerInit(
            experts,
            calibration.router_ND.to(ffn.w1_HD) * self.router_scale,  # Eq. 10
            {
                "router_agreement": calibration.agreement,
                "calibration_tokens": int(calibration.count_N.sum()),
                "empty_clusters": int((calibration.count_N == 0).sum()),
                "largest_cluster_share": float(shares_N.max()),
                "smallest_cluster_share": float(shares_N.min()),
                "mean_rank": sum(ranks) / len(ranks),
                "rank_floor_binds_share": floors / len(ranks),
            },
        )


@dataclass(frozen=True, kw_only=True)
class ClusterAware(Distilled, Clustered):
    """Experts from cluster subspaces, router from cluster centroids, EESD while training."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="cluster-aware",
        summary="experts from cluster subspaces, router from centroids, EMA-ensemble distillation",
        paper=PAPER,
        url=URL,
        status="published",
        reconstructed=(FORMULAS, *CHOSEN, *eesd.RECONSTRUCTED),
    )


@dataclass(frozen=True, kw_only=True)
class ClusterOnly(Clustered):
    """The paper's ablation without distillation."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="cluster-only",
        summary="cluster-aware without distillation (the paper's ablation)",
        paper=PAPER,
        url=URL,
        status="published",
        reconstructed=(FORMULAS, *CHOSEN),
    )

    def calibrator(self, ffn: FFN, layer: Layer, rng: Stream) -> ClusterStatistics:
        return super().calibrator(ffn, layer, _stream_of("cluster-aware", self, rng))


@dataclass(frozen=True, kw_only=True)
class EESDOnly(Distilled):
    """The paper's ablation without clusters: copies of the FFN and a random router, trained with EESD."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="eesd-only",
        summary="copies and a random router, with cluster-aware's distillation (the paper's ablation)",
        paper=PAPER,
        url=URL,
        status="published",
        reconstructed=(FORMULAS, *eesd.RECONSTRUCTED),
    )
    preserves_function: ClassVar[bool] = True

    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        rng = _stream_of("sparse-upcycling", self, rng)
        return LayerInit(
            [ffn.expert() for _ in range(layer.num_experts)], random_router(ffn, layer, rng, self.router_init)
        )


def _stream_of(name: str, ablation: Strategy, rng: Stream) -> Stream:
    """The other strategy's own stream: at one seed both start from the same model, and only distillation differs."""
    return Stream(tuple(name if part == ablation.info.name else part for part in rng.key))


class ClusterStatistics:
    """Clusters of a layer's FFN inputs, and each cluster's second moment C_i = sum x x^T (x not normalised), float64.

    The first `cluster_tokens` tokens are held until there are enough to fit the clusters, then everything is assigned
    and accumulated as it comes: memory is N D^2 plus that buffer, however long the stream.
    """

    def __init__(self, config: Clustered, width: int, num_clusters: int, rng: Stream) -> None:
        self.config, self.width, self.num_clusters, self.rng = config, width, num_clusters, rng
        self.buffer: list[Tensor] = []
        self.buffered = 0
        self.centroid_ND = self.router_ND = torch.empty(0, width)
        self.offset_N: Tensor | None = None
        self.agreement = 0.0
        self.count_N = torch.zeros(num_clusters, dtype=torch.long)
        self.moment_NDD = torch.zeros(num_clusters, width, width, dtype=torch.float64)

    def update(self, x_TD: Tensor) -> None:
        """Hold tokens until clusters can be fitted; afterwards assign and accumulate."""
        if len(self.centroid_ND):
            self._accumulate(x_TD)
            return
        self.buffer.append(x_TD.clone())
        self.buffered += len(x_TD)
        if self.buffered >= self.config.cluster_tokens:
            self.finish()

    def finish(self) -> None:
        """Fit the clusters if the stream ended before the buffer was full."""
        if len(self.centroid_ND):
            return
        sample_TD = torch.cat(self.buffer) if self.buffer else torch.empty(0, self.width)
        self.buffer.clear()
        config = self.config
        clusters = spherical_kmeans(
            sample_TD[: config.cluster_tokens],
            self.num_clusters,
            max(1, self.width // config.pca_divisor) if config.pca else self.width,
            self.rng,
            niter=config.kmeans_iterations,
            nredo=config.kmeans_restarts,
            center=config.pca and config.pca_center,
            centroid_map=config.centroid_map,
        )
        self.agreement = clusters.agreement
        self.centroid_ND, self.router_ND = (x.to(sample_TD.device) for x in (clusters.centroid_ND, clusters.router_ND))
        self.offset_N = None if clusters.offset_N is None else clusters.offset_N.to(sample_TD.device)
        self.moment_NDD = self.moment_NDD.to(sample_TD.device)
        self._accumulate(sample_TD)

    def _accumulate(self, x_TD: Tensor) -> None:
        # Uncentred, the most similar centroid is the cluster of every token, inside or outside the PCA subspace.
        if self.offset_N is None:
            label_T = (x_TD @ self.centroid_ND.T).argmax(1)
        else:
            label_T = (F.normalize(x_TD, dim=1) @ self.centroid_ND.T - self.offset_N).argmax(1)
        for cluster in range(self.num_clusters):
            member_TD = x_TD[label_T == cluster].double()
            self.moment_NDD[cluster] += member_TD.T @ member_TD
            self.count_N[cluster] += len(member_TD)


class Truncated:
    """A truncated W1 [H, D], its rank, sigma^2 of W1 S [R] (descending), and whether the rank floor decided."""

    def __init__(self, w1_HD: Tensor, rank: int, energy_R: Tensor, floor_binds: bool) -> None:
        self.w1_HD, self.rank, self.energy_R, self.floor_binds = w1_HD, rank, energy_R, floor_binds


def truncate(
    w1_HD: Tensor,
    moment_DD: Tensor,
    *,
    tau: float,
    rank_floor: float,
    rank_fraction: float = 0.0,
    method: Method = "projection",
) -> Truncated:
    """Data-aware truncated SVD of W1 for one cluster with second moment C (Eq. 8), computed in float64.

    projection: with C = S S^T, sigma and V from the D x D eigenproblem S^T W1^T W1 S = V sigma^2 V^T and
    U = W1 S V / sigma, the truncation SVD_r(W1 S) S^-1 is the projection U_r U_r^T W1: no inverse, so clusters with
    fewer tokens than D work. Where the kept rank exceeds that of C, 1e-6 tr(C)/D is added to its diagonal, which makes
    the trailing directions deterministic.
    cholesky: SVD_r(W1 S) S^-1 itself, S the Cholesky factor; wherever C is singular it gets the same ridge.

    The loss over the cluster is sum_{j>r} sigma_j^2 (Eq. 9).
    """
    w_HD, moment_DD = w1_HD.double(), moment_DD.double()
    full_rank = min(w_HD.shape)
    factor_DD, moment_rank = _square_root(moment_DD)
    if method == "cholesky":
        root_DD = torch.linalg.cholesky(moment_DD if moment_rank == len(moment_DD) else _with_ridge(moment_DD))
        u_HR, sigma_R, vt_RD = torch.linalg.svd(w_HD @ root_DD, full_matrices=False)
        energy_R = sigma_R.square()
        rank, floor_binds = kept_rank(energy_R, tau, rank_floor, rank_fraction)
        kept_HD = (u_HR[:, :rank] * sigma_R[:rank]) @ vt_RD[:rank]
        truncated_HD = torch.linalg.solve_triangular(root_DD, kept_HD, upper=False, left=False)
        return Truncated(truncated_HD.to(w1_HD.dtype), rank, energy_R, floor_binds)
    gram_DD = w_HD.T @ w_HD
    energy_R, vector_DR = _spectrum(gram_DD, factor_DD, full_rank)
    rank, floor_binds = kept_rank(energy_R, tau, rank_floor, rank_fraction)
    if rank > moment_rank:
        factor_DD, _ = _square_root(_with_ridge(moment_DD))
        energy_R, vector_DR = _spectrum(gram_DD, factor_DD, full_rank)
        rank, floor_binds = kept_rank(energy_R, tau, rank_floor, rank_fraction)
    if rank == full_rank:
        return Truncated(w1_HD.clone(), rank, energy_R, floor_binds)
    # U_r by QR of W1 S V_r rather than division by sigma: orthonormal to rounding even where sigma is small.
    basis_HR = torch.linalg.qr(w_HD @ (factor_DD @ vector_DR[:, :rank])).Q
    return Truncated((basis_HR @ (basis_HR.T @ w_HD)).to(w1_HD.dtype), rank, energy_R, floor_binds)


def kept_rank(energy_R: Tensor, tau: float, rank_floor: float, rank_fraction: float = 0.0) -> tuple[int, bool]:
    """The smallest rank that keeps `tau` of the energy and exceeds `rank_floor` of full rank; does the floor decide?

    A positive `rank_fraction` decides alone: that share of full rank, rounded, at least 1.
    """
    full_rank = len(energy_R)
    if rank_fraction > 0:
        return max(1, round(full_rank * rank_fraction)), False
    energy_up_to_R = energy_R.cumsum(0)
    kept_R = energy_up_to_R / energy_up_to_R[-1]  # ends in 1 to the bit, so that no tau < 1 asks for rank R + 1
    by_energy = full_rank if tau == 1 else int((kept_R < tau).sum()) + 1
    floor = min(full_rank, math.floor(full_rank * rank_floor) + 1)
    return max(by_energy, floor), floor > by_energy


def _square_root(moment_DD: Tensor) -> tuple[Tensor, int]:
    """(S with S S^T = C, rank of C), from an eigendecomposition with clamping."""
    value_D, vector_DD = torch.linalg.eigh(moment_DD)
    limit = value_D[-1].clamp(min=0) * len(value_D) * torch.finfo(torch.float64).eps
    return vector_DD * value_D.clamp(min=0).sqrt(), int((value_D > limit).sum())


def _with_ridge(moment_DD: Tensor) -> Tensor:
    """C + 1e-6 tr(C)/D I."""
    width = len(moment_DD)
    ridge = 1e-6 * moment_DD.trace() / width
    return moment_DD + ridge * torch.eye(width, dtype=torch.float64, device=moment_DD.device)


def _spectrum(gram_DD: Tensor, factor_DD: Tensor, full_rank: int) -> tuple[Tensor, Tensor]:
    """(sigma^2 of W1 S descending [R], right-singular vectors [D, R])."""
    value_D, vector_DD = torch.linalg.eigh(factor_DD.T @ gram_DD @ factor_DD)
    return value_D.flip(0)[:full_rank].clamp(min=0), vector_DD.flip(1)[:, :full_rank]


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [ClusterAware, ClusterOnly, EESDOnly]
