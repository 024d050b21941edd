"""The transcription of cluster-aware upcycling itself: numbers worked by hand, and the invariants K1 to K7.

Shape suffixes: R = min(H, D) singular values, P dimensions of the PCA.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.literal import cluster_aware
from tests.literal.cluster_aware import Array

SEEDS = pytest.mark.parametrize("seed", [0, 3, 9, 14])  # of `problem`: W1 is tall in 0 and 3, square in 9, wide in 14
CASES = pytest.mark.parametrize(("seed", "tau"), [(0, 0.5), (14, 0.9), (3, 0.99), (9, 0.999)])


# ---- Truncation -----------------------------------------------------------------------------------------------------


def problem(seed: int) -> tuple[Array, Array, Array]:
    """W1 [H, D], anisotropic tokens [T, D] with a mean, and C = X^T X [D, D]."""
    rng = np.random.default_rng(seed)
    h, d = int(rng.integers(4, 20)), int(rng.integers(4, 12))
    mixing_DD = rng.normal(size=(d, d)) * 0.6 ** np.arange(d)
    x_TD = rng.normal(size=(4 * d, d)) @ mixing_DD.T + rng.normal(size=d)
    return rng.normal(size=(h, d)), x_TD, x_TD.T @ x_TD


@CASES
def test_k1_truncation_loss_is_the_energy_left_out(seed: int, tau: float) -> None:
    w1_HD, x_TD, c_DD = problem(seed)
    w1_new_HD, rank, sigma2_R = cluster_aware.truncate(w1_HD, c_DD, tau=tau)
    loss = float((((w1_HD - w1_new_HD) @ x_TD.T) ** 2).sum())
    total = float(((w1_HD @ x_TD.T) ** 2).sum())
    assert sigma2_R.sum() == pytest.approx(total, rel=1e-10)
    assert loss == pytest.approx(sigma2_R[rank:].sum(), rel=1e-8, abs=1e-12 * total)
    assert loss / total <= 1 - tau + 1e-12


@CASES
def test_k2_rank_is_the_smallest_that_reaches_tau_or_the_floor(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    for floor in (0.0, 0.5, 0.75):
        w1_new_HD, rank, sigma2_R = cluster_aware.truncate(w1_HD, c_DD, tau=tau, rank_floor_fraction=floor)
        energy_R = np.cumsum(sigma2_R) / sigma2_R.sum()
        assert np.linalg.matrix_rank(w1_new_HD, tol=1e-9 * np.linalg.norm(w1_HD)) == rank
        assert rank > floor * len(sigma2_R)
        assert energy_R[rank - 1] >= tau - 1e-12
        binds = rank == int(floor * len(sigma2_R)) + 1
        assert binds or energy_R[rank - 2] < tau


def test_rank_rule_by_hand() -> None:
    sigma2_R = np.array([6.0, 3.0, 0.9, 0.1])  # cumulative shares 0.6, 0.9, 0.99, 1
    rule = cluster_aware.kept_rank
    assert [rule(sigma2_R, tau=tau, rank_floor_fraction=0) for tau in (0.5, 0.7, 0.95, 0.995)] == [1, 2, 3, 4]
    assert rule(sigma2_R, tau=0.5, rank_floor_fraction=0.5) == 3  # floor(4 * 0.5) + 1
    assert rule(sigma2_R, tau=0.5, rank_floor_fraction=1.0) == 4  # 5, but never above R
    assert rule(np.array([1.0, 0.0, 0.0]), tau=1.0, rank_floor_fraction=0) == 3
    assert rule(np.zeros(768), tau=0.5, rank_floor_fraction=0.5) == 385  # more than half, as the paper asks
    assert rule(np.zeros(512), tau=0.5, rank_floor_fraction=0.5) == 257


@SEEDS
def test_k3_full_rank_gives_the_dense_weights_back(seed: int) -> None:
    w1_HD, _, c_DD = problem(seed)
    w1_new_HD, rank, _ = cluster_aware.truncate(w1_HD, c_DD, tau=1.0)
    assert rank == min(w1_HD.shape)
    np.testing.assert_allclose(w1_new_HD, w1_HD, rtol=0, atol=1e-10)


@SEEDS
def test_k4_no_worse_on_the_cluster_than_a_plain_svd(seed: int) -> None:
    w1_HD, x_TD, c_DD = problem(seed)
    w1_new_HD, rank, _ = cluster_aware.truncate(w1_HD, c_DD, tau=0.5)
    u_HR, s_R, vt_RD = np.linalg.svd(w1_HD, full_matrices=False)
    plain_HD = (u_HR[:, :rank] * s_R[:rank]) @ vt_RD[:rank]
    loss, plain_loss = ((((w1_HD - w_HD) @ x_TD.T) ** 2).sum() for w_HD in (w1_new_HD, plain_HD))
    assert loss <= plain_loss * (1 + 1e-12) + 1e-20


@CASES
def test_k5_scale_and_choice_of_square_root_do_not_matter(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    w1_new_HD, rank, _ = cluster_aware.truncate(w1_HD, c_DD, tau=tau)
    scaled_HD, scaled_rank, _ = cluster_aware.truncate(w1_HD, 49.0 * c_DD, tau=tau)
    assert scaled_rank == rank
    np.testing.assert_allclose(scaled_HD, w1_new_HD, rtol=0, atol=1e-8)
    lambda_D, q_DD = np.linalg.eigh(c_DD)
    root_DD = q_DD * np.sqrt(lambda_D)  # another S with S S^T = C
    u_HR, s_R, vt_RD = np.linalg.svd(w1_HD @ root_DD, full_matrices=False)
    other_HD = (u_HR[:, :rank] * s_R[:rank]) @ vt_RD[:rank] @ np.linalg.inv(root_DD)
    np.testing.assert_allclose(other_HD, w1_new_HD, rtol=0, atol=1e-8)


@CASES
def test_k6_truncation_is_a_projection_of_w1(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    w1_new_HD, rank, _ = cluster_aware.truncate(w1_HD, c_DD, tau=tau)
    _, u_HH = np.linalg.eigh(w1_HD @ c_DD @ w1_HD.T)
    projector_HH = u_HH[:, -rank:] @ u_HH[:, -rank:].T
    np.testing.assert_allclose(projector_HH @ w1_HD, w1_new_HD, rtol=0, atol=1e-8)
    np.testing.assert_allclose(projector_HH @ w1_new_HD, w1_new_HD, rtol=0, atol=1e-8)


@SEEDS
def test_k6_fewer_tokens_than_width_is_exact_on_them_only(seed: int) -> None:
    w1_HD, x_TD, _ = problem(seed)
    rank_of_x = min(w1_HD.shape) // 2 + 1
    few_TD = x_TD[:rank_of_x]
    w1_new_HD, rank, _ = cluster_aware.truncate(w1_HD, few_TD.T @ few_TD, tau=0.5)
    assert rank == rank_of_x
    on_cluster = np.linalg.norm((w1_HD - w1_new_HD) @ few_TD.T) / np.linalg.norm(w1_HD @ few_TD.T)
    assert on_cluster < 3e-3  # C had 1e-6 of its mean eigenvalue added, so not to rounding
    assert np.linalg.norm(w1_HD - w1_new_HD) > 0.05 * np.linalg.norm(w1_HD)


def test_ridge_is_added_only_to_a_singular_second_moment() -> None:
    c_DD = np.array([[4.0, 2.0], [2.0, 5.0]])
    np.testing.assert_allclose(cluster_aware.square_root(c_DD), [[2, 0], [1, 2]], rtol=1e-15)
    s_DD = cluster_aware.square_root(np.ones((2, 2)))  # rank 1, trace 2: 1e-6 * 2 / 2 on the diagonal
    np.testing.assert_allclose(s_DD @ s_DD.T, [[1 + 1e-6, 1], [1, 1 + 1e-6]], rtol=1e-14)


# ---- Clusters, moments, router --------------------------------------------------------------------------------------


def cones(rng: np.random.Generator, t: int, d: int, n: int) -> tuple[NDArray[np.float32], NDArray[np.int64], Array]:
    """Tokens of different lengths around n directions, and those directions."""
    directions_ED = np.linalg.qr(rng.normal(size=(d, n)))[0].T
    labels_T = np.arange(t) % n
    x_TD = directions_ED[labels_T] + 0.1 * rng.normal(size=(t, d))
    return (x_TD * rng.uniform(0.5, 20, size=(t, 1))).astype(np.float32), labels_T, directions_ED


def test_assignment_and_moments_by_hand() -> None:
    tokens_TD = np.array([[3.0, 1.0], [0.0, 2.0], [1.0, 0.0], [5.0, 5.0]])
    centroids_ED = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    labels_T = cluster_aware.assign(tokens_TD, centroids_ED)
    assert labels_T.tolist() == [0, 1, 0, 0]  # the last is a tie
    c_EDD, counts_E = cluster_aware.second_moments(tokens_TD, labels_T, 3)
    assert counts_E.tolist() == [3, 1, 0]
    # Cluster 0: [9 3; 3 1] + [1 0; 0 0] + [25 25; 25 25].
    np.testing.assert_array_equal(c_EDD, [[[35, 28], [28, 26]], [[0, 0], [0, 4]], [[0, 0], [0, 0]]])


@pytest.mark.parametrize("pca_dim", [None, 4, 6])
def test_k7_clusters_recover_planted_directions(pca_dim: int | None) -> None:
    x_TD, planted_T, directions_ED = cones(np.random.default_rng(0), 200, 12, 4)
    centroids_ED = cluster_aware.spherical_clusters(x_TD, 4, pca_dim, niter=25, nredo=3, seed=0)
    np.testing.assert_allclose(np.linalg.norm(centroids_ED, axis=1), 1, rtol=1e-12)
    assert ((centroids_ED @ directions_ED.T).max(axis=0) > 0.99).all()
    labels_T = cluster_aware.assign(x_TD, centroids_ED)
    assert len(set(zip(labels_T.tolist(), planted_T.tolist(), strict=True))) == 4

    # Fixed point of Eq. 6 in the PCA plane, which eigh of the (uncentred) second moment finds as well.
    unit_TD = x_TD.astype(np.float64) / np.linalg.norm(x_TD.astype(np.float64), axis=1, keepdims=True)
    axes_DP = np.linalg.eigh(unit_TD.T @ unit_TD)[1][:, -(pca_dim or 12) :]
    points_TD = unit_TD @ axes_DP @ axes_DP.T
    points_TD /= np.linalg.norm(points_TD, axis=1, keepdims=True)
    for i, mu_D in enumerate(centroids_ED):
        mean_D = points_TD[labels_T == i].mean(axis=0)
        np.testing.assert_allclose(mu_D, mean_D / np.linalg.norm(mean_D), rtol=0, atol=1e-5)


def test_cluster_aware_end_to_end_with_an_empty_cluster() -> None:
    rng = np.random.default_rng(1)
    sample_TD, planted_T, _ = cones(rng, 300, 8, 3)
    w1_HD = rng.normal(size=(16, 8))
    tokens_TD = sample_TD[planted_T != 2]  # no token of the third direction

    def run() -> tuple[list[Array], Array]:
        return cluster_aware.cluster_aware(
            w1_HD,
            tokens_TD,
            sample_TD,
            3,
            pca_dim=4,
            tau=0.9,
            rank_floor_fraction=0.5,
            niter=25,
            nredo=2,
            seed=0,
        )

    w1_experts, router_ED = run()
    labels_T = cluster_aware.assign(tokens_TD, router_ED)
    same = [np.array_equal(w1_new_HD, w1_HD) for w1_new_HD in w1_experts]
    assert same == [i not in labels_T for i in range(3)]
    assert sum(same) == 1
    for i in set(labels_T.tolist()):
        x_TD = tokens_TD[labels_T == i].astype(np.float64)
        expected_HD = cluster_aware.truncate(w1_HD, x_TD.T @ x_TD, tau=0.9)[0]
        np.testing.assert_allclose(w1_experts[i], expected_HD, rtol=0, atol=1e-8)
    again, _ = run()
    assert all(np.array_equal(a, b) for a, b in zip(again, w1_experts, strict=True))
