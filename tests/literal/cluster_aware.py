"""Cluster-aware upcycling of one layer, with explicit loops, float64, a Cholesky factor and a full SVD.

A reference for tests, written from arXiv:2604.13508, Eqs. 6, 8 and 10, with an uncentred PCA.

Shape suffixes: E experts and clusters, P dimensions of the PCA, R = min(H, D) singular values.
"""

import math

import faiss
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Floats = NDArray[np.floating]
Labels = NDArray[np.int64]


def unit_rows(x_TD: Floats) -> Array:
    """Every row divided by its length, [T, D] -> [T, D]; a zero row has no direction and is an error."""
    rows = []
    for x_D in np.asarray(x_TD, dtype=np.float64):
        length = math.sqrt(float(x_D @ x_D))
        assert length > 0, "a zero token has no direction"
        rows.append(x_D / length)
    return np.stack(rows)


def spherical_clusters(
    sample_TD: NDArray[np.float32],
    num_clusters: int,
    pca_dim: int | None,
    *,
    niter: int,
    nredo: int,
    seed: int,
) -> Array:
    """Unit centroids [E, D] in the full width, A^T mu, where A [P, D] is the uncentred PCA of the unit tokens."""
    unit_TD = unit_rows(sample_TD)
    projection_PD = np.eye(unit_TD.shape[1])
    if pca_dim is not None:
        _, _, vt_RD = np.linalg.svd(unit_TD, full_matrices=False)  # no mean is subtracted
        assert pca_dim <= len(vt_RD), "fewer directions than pca_dim"
        projection_PD = vt_RD[:pca_dim]
    points_TP = np.ascontiguousarray(unit_rows(unit_TD @ projection_PD.T), dtype=np.float32)
    kmeans = faiss.Kmeans(
        points_TP.shape[1],
        num_clusters,
        niter=niter,
        nredo=nredo,
        spherical=True,
        seed=seed,
        max_points_per_centroid=len(points_TP),
        min_points_per_centroid=1,
    )
    kmeans.train(points_TP)  # Eq. 6
    mu_EP = unit_rows(np.asarray(kmeans.centroids))
    return mu_EP @ projection_PD  # rows A^T mu


def assign(tokens_TD: Floats, centroids_ED: Floats) -> Labels:
    """The cluster of each token, [T]: largest x^T mu (so the length of x does not matter), lower index at a tie."""
    labels = []
    for x_D in np.asarray(tokens_TD, dtype=np.float64):
        scores = [float(x_D @ mu_D) for mu_D in np.asarray(centroids_ED, dtype=np.float64)]
        labels.append(scores.index(max(scores)))  # Eq. 6
    return np.array(labels, dtype=np.int64)


def second_moments(tokens_TD: Floats, labels_T: Labels, num_clusters: int) -> tuple[Array, Labels]:
    """C_i = X_i X_i^T of the tokens as they are (not normalised, not centred, not divided), [E, D, D], and n_i [E]."""
    width = tokens_TD.shape[1]
    c_EDD = np.zeros((num_clusters, width, width))
    counts_E = np.zeros(num_clusters, dtype=np.int64)
    for x_D, label in zip(np.asarray(tokens_TD, dtype=np.float64), labels_T, strict=True):
        c_EDD[label] += np.outer(x_D, x_D)
        counts_E[label] += 1
    return c_EDD, counts_E


def square_root(c_DD: Floats) -> Array:
    """Lower Cholesky factor S [D, D] of C, or of C + 1e-6 tr(C)/D I where C is not positive definite to rounding."""
    width = len(c_DD)
    positive_DD = np.array(c_DD, dtype=np.float64)
    # A singular C can pass a Cholesky by luck, with pivots that are rounding noise, so the rank decides.
    if np.linalg.matrix_rank(positive_DD, hermitian=True) < width:
        positive_DD += 1e-6 * np.trace(positive_DD) / width * np.eye(width)
    return np.asarray(np.linalg.cholesky(positive_DD), dtype=np.float64)  # Eq. 8, S S^T = X X^T


def kept_rank(sigma_squared_R: Floats, *, tau: float, rank_floor_fraction: float) -> int:
    """max(r_tau, floor(R * fraction) + 1), at most R; tau = 1 keeps everything, whatever rounding says."""
    full = len(sigma_squared_R)
    total = sum(float(s) for s in sigma_squared_R)
    r_tau, energy = full, 0.0
    if tau < 1:
        for r in range(1, full + 1):
            energy += float(sigma_squared_R[r - 1])
            if energy >= tau * total:
                r_tau = r  # Eq. 8, the smallest r that reaches tau
                break
    return min(max(r_tau, math.floor(full * rank_floor_fraction) + 1), full)


def truncate(
    w1_HD: Floats,
    c_DD: Floats,
    *,
    tau: float,
    rank_floor_fraction: float = 0.5,
) -> tuple[Array, int, Array]:
    """First linear of one expert [H, D], its rank r, and all squared singular values of W1 S, falling, [R]."""
    s_DD = square_root(c_DD)
    u_HR, sigma_R, vt_RD = np.linalg.svd(np.asarray(w1_HD, dtype=np.float64) @ s_DD, full_matrices=False)
    sigma_squared_R = sigma_R**2
    rank = kept_rank(sigma_squared_R, tau=tau, rank_floor_fraction=rank_floor_fraction)
    kept_HD = u_HR[:, :rank] @ np.diag(sigma_R[:rank]) @ vt_RD[:rank]
    w1_new_HD = np.linalg.solve(s_DD.T, kept_HD.T).T  # Eq. 8, SVD_r(W S) S^-1
    return w1_new_HD, rank, sigma_squared_R


def cluster_aware(
    w1_HD: Floats,
    tokens_TD: Floats,
    sample_TD: NDArray[np.float32],
    num_experts: int,
    *,
    pca_dim: int | None,
    tau: float,
    rank_floor_fraction: float,
    niter: int,
    nredo: int,
    seed: int,
) -> tuple[list[Array], Array]:
    """First linears of the experts (E of [H, D]) and the router [E, D]; an empty cluster keeps W1."""
    router_ED = spherical_clusters(sample_TD, num_experts, pca_dim, niter=niter, nredo=nredo, seed=seed)  # Eq. 10
    labels_T = assign(tokens_TD, router_ED)
    c_EDD, counts_E = second_moments(tokens_TD, labels_T, num_experts)
    w1_experts = []
    for i in range(num_experts):
        if counts_E[i] == 0:
            w1_experts.append(np.array(w1_HD, dtype=np.float64))
        else:
            w1_experts.append(truncate(w1_HD, c_EDD[i], tau=tau, rank_floor_fraction=rank_floor_fraction)[0])
    return w1_experts, router_ED
