"""Cluster-aware upcycling (Chu et al., CVPR 2026, arXiv:2604.13508), and the paper's two ablations by name.

The dense model's FFN inputs are clustered by direction; expert i keeps the part of W1 that matters to cluster i
(data-aware truncated SVD), and the router's rows are the cluster centroids. While training, an EMA ensemble of all
experts teaches the top-k mixture (expert-ensemble self-distillation, EESD: `upcycle_bench.eesd`). `cluster-only` is the
first without the second, `eesd-only` the second on sparse upcycling's copies.

Where we differ, and why: the paper's formulas were lost in the text we hold, so Eqs. 6 to 13 are our reconstruction
from its sentences; values it does not state are listed in `info.reconstructed`. Clusters are fitted on the first
`cluster_tokens` tokens of a random stream and every token is then assigned in that same, single forward pass. The
truncation is computed as a projection in output space, W1_i = U_r U_r^T W1, which equals Eq. 8 without an inverse.

Shape suffixes: T tokens, D width, H hidden, N experts, R singular values (min(H, D)), L the last of them, left out.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench import eesd
from upcycle_bench.clustering import (
    CentroidMap,
    add_second_moment,
    congruent,
    import_faiss,
    second_moment,
    spherical_kmeans,
    strips,
    symmetric,
)
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
        full_rank = min(ffn.w1_HD.shape)
        factors = decompose(ffn.w1_HD) if self.method == "projection" else None
        made: list[Truncated | None] = [None] * layer.num_experts  # None: a copy, an empty cluster

        def make(number: int) -> None:
            made[number] = truncate(
                ffn.w1_HD,
                calibration.moment(number),
                tau=self.tau,
                rank_floor=self.rank_floor,
                rank_fraction=self.rank_fraction,
                method=self.method,
                factors=factors,
            )

        for number, count in enumerate(calibration.count_N.tolist()):
            if count:
                make(number)
        for _ in range(made.count(None)):
            warnings.warn(f"{layer.name}: a cluster is empty, its expert is a copy of the FFN", stacklevel=2)
        experts = [ffn.expert(w1_HD=one.w1_HD) if one else ffn.expert() for one in made]
        ranks = [one.rank if one else full_rank for one in made]
        floors = sum(one.floor_binds for one in made if one)
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
        self._lower_NDD = torch.zeros(num_clusters, width, width, dtype=torch.float64)  # its lower triangle is right

    def moment(self, cluster: int) -> Tensor:
        """C_i [D, D], symmetric to the bit."""
        return symmetric(self._lower_NDD[cluster])

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
        self._lower_NDD = self._lower_NDD.to(sample_TD.device)
        self._accumulate(sample_TD)

    def _accumulate(self, x_TD: Tensor) -> None:
        # Uncentred, the most similar centroid is the cluster of every token, inside or outside the PCA subspace.
        if self.offset_N is None:
            label_T = (x_TD @ self.centroid_ND.T).argmax(1)
        else:
            label_T = (F.normalize(x_TD, dim=1) @ self.centroid_ND.T - self.offset_N).argmax(1)
        self.count_N += label_T.bincount(minlength=self.num_clusters).cpu()
        for cluster in range(self.num_clusters):
            self._add(cluster, x_TD, label_T == cluster)

    def _add(self, cluster: int, x_TD: Tensor, is_member_T: Tensor) -> None:
        add_second_moment(self._lower_NDD[cluster], x_TD[is_member_T].double())


class Truncated:
    """A truncated W1 [H, D], its rank, sigma^2 of W1 S [R] (descending), and whether the rank floor decided."""

    def __init__(self, w1_HD: Tensor, rank: int, energy_R: Tensor, floor_binds: bool) -> None:
        self.w1_HD, self.rank, self.energy_R, self.floor_binds = w1_HD, rank, energy_R, floor_binds


class Factors(NamedTuple):
    """W1 = Q R, once for all clusters of a layer: Q [H, R] orthonormal, R [R, D] upper triangular, float64, and
    |W1^T W1| (Frobenius).

    Computed in float64; Q then has W1's own precision, or float32 where that is higher.
    """

    q_HR: Tensor
    r_RD: Tensor
    norm: Tensor


def decompose(w1_HD: Tensor) -> Factors:
    """See `Factors`.

    R is the Cholesky factor of W1^T W1 where W1 is far from losing rank, which takes half of a QR's time: at a
    condition number of 1e4 its rounding, 1e-16 times that squared, is still below float32's. Elsewhere it is a QR's.
    The diagonal of R bounds the condition number from below only: Q R = W1 holds whatever it is.
    """
    w1_HD, dtype = w1_HD.double(), torch.promote_types(w1_HD.dtype, torch.float32)
    square_DD = second_moment(w1_HD)
    r_RD, failed = torch.linalg.cholesky_ex(square_DD, upper=True)
    least, most = r_RD.diagonal().aminmax()
    tall = len(w1_HD) >= w1_HD.shape[1]  # else rounding alone could pass for rank
    if tall and dtype == torch.float32 and not failed and least > 1e-2 * most:
        q_HR = torch.empty_like(w1_HD)
        for rows in zip(w1_HD.chunk(8), q_HR.chunk(8), strict=True):
            _solve(r_RD, *rows)
    else:
        q_HR, r_RD = torch.linalg.qr(w1_HD)
    return Factors(q_HR.to(dtype), r_RD, square_DD.norm())


@torch.no_grad()
def _solve(r_RD: Tensor, w1_HD: Tensor, q_HR: Tensor) -> None:
    torch.linalg.solve_triangular(r_RD, w1_HD, upper=True, left=False, out=q_HR)


@torch.no_grad()
def truncate(
    w1_HD: Tensor,
    moment_DD: Tensor,
    *,
    tau: float,
    rank_floor: float,
    rank_fraction: float = 0.0,
    method: Method = "projection",
    factors: Factors | None = None,
) -> Truncated:
    """Data-aware truncated SVD of W1 for one cluster with second moment C (Eq. 8), decomposed in float64.

    projection: with C = S S^T, the truncation SVD_r(W1 S) S^-1 is U_r U_r^T W1, where U are eigenvectors of
    W1 C W1^T = Q (R C R^T) Q^T, of eigenvalues sigma^2 (W1 = Q R: `factors`, from `decompose`). So an R x R
    eigenproblem R C R^T = E sigma^2 E^T gives U = Q E, orthonormal to rounding, with no root of C and no inverse:
    clusters with fewer tokens than D work. What W1 loses is Q E_L E_L^T R, a product in Q's precision. Where the kept
    rank exceeds the number of eigenvalues above rounding, 1e-6 tr(C)/D is added to the diagonal of C, which makes the
    trailing directions deterministic.
    cholesky: SVD_r(W1 S) S^-1 itself, S the Cholesky factor; wherever C is singular it gets the same ridge.

    The loss over the cluster is sum_{j>r} sigma_j^2 (Eq. 9). A C of zeros leaves W1 as it is.
    """
    moment_DD = moment_DD.double()
    full_rank = min(w1_HD.shape)
    if not moment_DD.any():
        return Truncated(w1_HD.clone(), full_rank, moment_DD.new_zeros(full_rank), False)
    if method == "cholesky":
        value_D = torch.linalg.eigvalsh(moment_DD)  # ascending
        if _rank(value_D, value_D[-1]) < len(moment_DD):
            moment_DD = _with_ridge(moment_DD)
        root_DD = torch.linalg.cholesky(moment_DD)
        u_HR, sigma_R, vt_RD = torch.linalg.svd(w1_HD.double() @ root_DD, full_matrices=False)
        energy_R = sigma_R.square()
        rank, floor_binds = kept_rank(energy_R, tau, rank_floor, rank_fraction)
        kept_HD = (u_HR[:, :rank] * sigma_R[:rank]) @ vt_RD[:rank]
        truncated_HD = torch.linalg.solve_triangular(root_DD, kept_HD, upper=False, left=False)
        return Truncated(truncated_HD.to(w1_HD.dtype), rank, energy_R, floor_binds)
    q_HR, r_RD, norm = factors or decompose(w1_HD)
    energy_R, vector_RR = _spectrum(r_RD, moment_DD)
    rank, floor_binds = kept_rank(energy_R, tau, rank_floor, rank_fraction)
    if rank > _rank(energy_R, norm * moment_DD.norm()):
        energy_R, vector_RR = _spectrum(r_RD, _with_ridge(moment_DD))
        rank, floor_binds = kept_rank(energy_R, tau, rank_floor, rank_fraction)
    left_out_RL = vector_RR[:, : full_rank - rank]  # nothing at full rank, where W1 stays what it is
    parts = [left_out_RL[: strip.stop].T @ r_RD[: strip.stop, strip] for strip in strips(r_RD.shape[1])]  # R's zeros
    rest_HD = (q_HR @ left_out_RL.to(q_HR)) @ torch.cat(parts, 1).to(q_HR)
    kept_HD = torch.sub(w1_HD, rest_HD, out=rest_HD)
    return Truncated(kept_HD.to(w1_HD.dtype), rank, energy_R, floor_binds)


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


def _spectrum(r_RD: Tensor, moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of R C R^T, descending [R], and its eigenvectors [R, R], in columns, of the least one first."""
    value_R, vector_RR = torch.linalg.eigh(congruent(r_RD, moment_DD))  # which reads the lower triangle
    return value_R.flip(0).clamp(min=0), vector_RR


def _rank(value_R: Tensor, scale: Tensor) -> int:
    """How many eigenvalues are above rounding, in a matrix computed from others whose norms multiply to `scale`.

    Its own norm would not do: W1 can all but ignore the direction in which tokens are longest, and R C R^T then has
    rounding of a size that its own eigenvalues do not show.
    """
    return int((value_R > scale * len(value_R) * torch.finfo(torch.float64).eps).sum())


def _with_ridge(moment_DD: Tensor) -> Tensor:
    """C + 1e-6 tr(C)/D I."""
    width = len(moment_DD)
    ridge = 1e-6 * moment_DD.trace() / width
    return moment_DD + ridge * torch.eye(width, dtype=torch.float64, device=moment_DD.device)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [ClusterAware, ClusterOnly, EESDOnly]
