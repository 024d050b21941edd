"""Two k-means: the spherical one of tokens, by faiss (arXiv:2604.13508), and MiniBatchKMeans of features (CLIP-MoE).

Shape suffixes: E clusters, P dimensions of the PCA; T are samples instead of tokens in the mini-batch k-means.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle_bench.upcycling.symmetric import second_moment
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream


def import_faiss() -> ModuleType:
    """The module faiss. UserError names the extras that install it."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "faiss is not installed: pip install 'upcycle-bench[cpu]' (or [gpu] on a CUDA machine; never both)."
        ) from None
    return faiss


class Clusters(NamedTuple):
    """Clusters of the directions of tokens, float32 on the CPU.

    centroid_ED: unit rows; k-means found them among P coordinates, the PCA's basis maps them back to D;
    agreement: share of the sample's tokens x whose cluster, found among P coordinates, is also argmax_i x . centroid_i.
    """

    centroid_ED: Tensor
    agreement: float


def spherical_kmeans(
    sample_TD: Tensor, num_clusters: int, pca_dim: int, rng: Stream, *, niter: int, nredo: int
) -> Clusters:
    """Clusters of the directions of tokens [T, D], float32 and of any length (arXiv:2604.13508, Eq. 6), by faiss.

    The PCA is uncentred: its basis are the top right-singular vectors of the normalised tokens. So argmax_i of
    x . centroid_i is the cluster of x for every token, inside or outside the subspace, and `agreement` is 1 but for
    rounding. A centred PCA would leave a constant per centroid, which a router without bias cannot express.
    `pca_dim` = D means no PCA. `niter` are k-means' iterations, `nredo` its restarts, of which the best counts.

    Raises UserError when faiss is missing or there are fewer tokens than clusters.
    """
    faiss = import_faiss()
    if len(sample_TD) < num_clusters:
        raise UserError(
            f"calibration gave {len(sample_TD)} tokens for {num_clusters} clusters: raise pairs or cluster_tokens."
        )
    unit_TD = F.normalize(sample_TD.float(), dim=1)  # x / |x| of Eq. 6
    basis_PD = principal_directions(unit_TD, pca_dim)
    points_TP = F.normalize(unit_TD @ basis_PD.T, dim=1)
    kmeans = faiss.Kmeans(
        points_TP.shape[1],
        num_clusters,
        niter=niter,
        nredo=nredo,
        spherical=True,  # normalises the centroids after each iteration, but not the data
        seed=rng.child("kmeans").seed(bits=31),
        max_points_per_centroid=len(points_TP),  # by default faiss trains on 256 points a centroid and does not say so
        min_points_per_centroid=1,
        gpu=hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0,
    )
    kmeans.train(points_TP.cpu().contiguous().numpy())  # Eq. 6
    centroid_EP = torch.from_numpy(kmeans.centroids.copy())
    centroid_ED = F.normalize(centroid_EP @ basis_PD.cpu(), dim=1)
    label_T = (points_TP.cpu() @ centroid_EP.T).argmax(1)
    agrees_T = (sample_TD.float().cpu() @ centroid_ED.T).argmax(1) == label_T
    return Clusters(centroid_ED, float(agrees_T.float().mean()))


def minibatch_kmeans(points_TD: Tensor, num_clusters: int, rng: Stream) -> Tensor:
    """Euclidean centroids [E, D] of float32 points [T, D], by scikit-learn's MiniBatchKMeans with CLIP-MoE's settings.

    It runs on one thread, so that the result does not depend on the machine's cores. Raises UserError for fewer points
    than clusters.
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


def nearest(points_TD: Tensor, centroid_ED: Tensor) -> Tensor:
    """The number of the closest centroid (Euclidean) of every point, int64 [T]."""
    return ((centroid_ED**2).sum(1) - 2 * points_TD @ centroid_ED.T).argmin(1)  # |x|^2 is the same for all centroids


def principal_directions(unit_TD: Tensor, pca_dim: int) -> Tensor:
    """Orthonormal rows [P, D]: the top eigenvectors of the second moment about zero, by `eigh` in float64."""
    width = unit_TD.shape[1]
    if pca_dim >= width:
        return torch.eye(width, dtype=unit_TD.dtype, device=unit_TD.device)
    _, vectors_DD = torch.linalg.eigh(second_moment(unit_TD.double()))  # ascending
    return vectors_DD[:, -pca_dim:].flip(1).T.to(unit_TD.dtype)
