"""Spherical k-means of token activations: normalise, PCA, faiss, and centroids mapped back to full width.

Beside it the ordinary k-means of sample features, without faiss.

Shape suffixes: T tokens, D width, P PCA dimensions, N clusters.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench.errors import UserError
from upcycle_bench.rng import Stream

CentroidMap = Literal["backproject", "recompute"]


def import_faiss() -> ModuleType:
    """faiss, or the one line that says which extra brings it."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "faiss is not installed: pip install 'upcycle-bench[cpu]' (or [gpu] on a CUDA machine; never both)."
        ) from None
    return faiss


class Clusters(NamedTuple):
    """Clusters of the directions of tokens x, and the router that stands for them; float32 on the CPU.

    centroid_ND: unit centroids of the PCA's coordinates, mapped back to full width;
    agreement: share of the sample's tokens whose most similar row of `router_ND` is their cluster;
    router_ND: `centroid_ND`, or with `recompute` the directions of the members' mean direction;
    offset_N: the cluster of x is argmax_i of x / |x| . centroid_i - offset_i; None without centring, where it is 0.
    """

    centroid_ND: Tensor
    agreement: float
    router_ND: Tensor
    offset_N: Tensor | None


def spherical_kmeans(
    sample_TD: Tensor,
    num_clusters: int,
    pca_dim: int,
    rng: Stream,
    *,
    niter: int,
    nredo: int,
    center: bool = False,
    centroid_map: CentroidMap = "backproject",
) -> Clusters:
    """Clusters of the directions of float32 tokens of any length.

    By default the PCA is uncentred (top right-singular vectors of the normalised tokens), so that argmax_i of
    x . centroid_i is the cluster of x for every token, inside or outside the subspace (`agreement` 1 but for rounding);
    a centred one (`center`) leaves a constant per centroid that a router without bias cannot express.
    `recompute` makes each router row the normalised sum of the sample's unit tokens in its cluster. `pca_dim` = D means
    no PCA.

    Raises UserError when faiss is missing or there are fewer tokens than clusters.
    """
    faiss = import_faiss()
    if len(sample_TD) < num_clusters:
        raise UserError(
            f"calibration gave {len(sample_TD)} tokens for {num_clusters} clusters: raise pairs or cluster_tokens."
        )
    unit_TD = F.normalize(sample_TD.float(), dim=1)
    mean_D = unit_TD.double().mean(0).to(unit_TD.dtype) if center else None
    fitted_TD = unit_TD if mean_D is None else unit_TD - mean_D
    basis_PD = principal_directions(fitted_TD, pca_dim)
    points_TP = F.normalize(fitted_TD @ basis_PD.T, dim=1)
    kmeans = faiss.Kmeans(
        points_TP.shape[1],
        num_clusters,
        niter=niter,
        nredo=nredo,
        spherical=True,  # normalises centroids after each iteration; the data we normalised ourselves
        seed=rng.child("kmeans").seed(bits=31),
        max_points_per_centroid=len(points_TP),  # faiss would otherwise train on 256 points a centroid, silently
        min_points_per_centroid=1,
        gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
    )
    kmeans.train(points_TP.cpu().contiguous().numpy())
    centroids_NP = torch.from_numpy(kmeans.centroids.copy())
    centroid_ND = F.normalize(centroids_NP @ basis_PD.cpu(), dim=1)
    assigned_T = (points_TP.cpu() @ centroids_NP.T).argmax(1)
    router_ND = centroid_ND
    if centroid_map == "recompute":
        sums_ND = torch.zeros(centroid_ND.shape, dtype=torch.float64)
        sums_ND.index_add_(0, assigned_T, unit_TD.cpu().double())
        empty_N1 = sums_ND.norm(dim=1, keepdim=True) == 0
        router_ND = torch.where(empty_N1, centroid_ND, F.normalize(sums_ND, dim=1).float())
    routed_T = (sample_TD.float().cpu() @ router_ND.T).argmax(1)
    offset_N = None if mean_D is None else centroid_ND @ mean_D.cpu()
    return Clusters(centroid_ND, float((assigned_T == routed_T).float().mean()), router_ND, offset_N)


def minibatch_kmeans(points_TD: Tensor, num_clusters: int, rng: Stream) -> Tensor:
    """Centroids [N, D] of float32 points, Euclidean, by scikit-learn's MiniBatchKMeans as CLIP-MoE's code calls it.

    On one thread, so that the result does not depend on the machine's cores. UserError for fewer points than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    if len(points_TD) < num_clusters:
        raise UserError(f"{len(points_TD)} samples cannot make {num_clusters} clusters; use more.")
    kmeans = MiniBatchKMeans(
        num_clusters,
        batch_size=min(1_000_000, len(points_TD)),
        max_iter=500,
        tol=1e-5,
        n_init="auto",
        random_state=rng.child("kmeans").seed(bits=31),
    )
    with threadpool_limits(1):
        kmeans.fit(points_TD.numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(points_TD.dtype)


def nearest(points_TD: Tensor, centroid_ND: Tensor) -> Tensor:
    """The closest centroid of every point, int64 [T]."""
    return ((centroid_ND**2).sum(1) - 2 * points_TD @ centroid_ND.T).argmin(1)


def principal_directions(unit_TD: Tensor, pca_dim: int) -> Tensor:
    """Orthonormal rows [P, D]: the top eigenvectors of the second moment about zero, by float64 `eigh`."""
    width = unit_TD.shape[1]
    if pca_dim >= width:
        return torch.eye(width, dtype=unit_TD.dtype, device=unit_TD.device)
    _, vectors_DD = torch.linalg.eigh(second_moment(unit_TD.double()))  # ascending
    return vectors_DD[:, -pca_dim:].flip(1).T.to(unit_TD.dtype)


def second_moment(x_TD: Tensor) -> Tensor:
    """x^T x, symmetric to the bit."""
    lower_DD = x_TD.new_zeros(x_TD.shape[1], x_TD.shape[1])
    add_second_moment(lower_DD, x_TD)
    return symmetric(lower_DD)


def add_second_moment(lower_DD: Tensor, x_TD: Tensor) -> None:
    """Add x^T x to the lower triangle of `lower_DD`; what is above it is of no meaning (`symmetric`).

    By strips of rows: eight of them take 9/16 of the products of the square. A core that is free does some.
    """

    @torch.no_grad()
    def add(strip: slice) -> None:
        part = lower_DD[strip, : strip.stop]
        torch.addmm(part, x_TD[:, strip].T, x_TD[:, : strip.stop], out=part)  # FLOPs of `addmm_` are not counted

    for strip in strips(len(lower_DD)):
        add(strip)


def congruent(r_RD: Tensor, c_DD: Tensor) -> Tensor:
    """R C R^T for an upper triangular R and a symmetric C: its lower triangle; what is above it is of no meaning.

    By strips, as above, and without R's zeros: about half of the products.
    """
    product_RD = torch.empty_like(r_RD)
    lower_RR = r_RD.new_zeros(len(r_RD), len(r_RD))
    for strip in strips(len(r_RD)):
        product_RD[strip] = r_RD[strip, strip.start :] @ c_DD[strip.start :]
    for strip in strips(len(r_RD)):
        lower_RR[strip.start :, strip] = product_RD[strip.start :, strip.start :] @ r_RD[strip, strip.start :].T
    return lower_RR


def symmetric(lower_DD: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle."""
    return lower_DD.tril() + lower_DD.tril(-1).T


def strips(width: int) -> list[slice]:
    """At most eight strips of a matrix, of 64 rows or columns or more; the last has what is left."""
    step = max(64, math.ceil(width / 8))
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]
