"""The truncation as a projection of W1: K3 full rank, K4 plain SVD, K5 scale and square root, K6 projector."""

import pytest
import torch
from torch.testing import assert_close

from tests.cluster_data import CASES, SEEDS, ClusterAware, energy, make, problem, relative, truncate, w1
from tests.helpers import cones, dense_forward, moe_layer, orthonormal, random_ffn


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"rank_floor": 0.99}])
def test_k3_full_rank_is_the_dense_ffn_through_the_whole_moe_layer(options: dict[str, float]) -> None:
    ffn = random_ffn(48, 16)
    x_TD, _ = cones(1000, orthonormal(4, 16), seed=4, noise=0.4, dtype=torch.float64)
    init, _ = make(ClusterAware(pca_divisor=4, **options), ffn, x_TD.float(), 4)
    assert init.notes["mean_rank"] == 16
    assert all(torch.equal(w1(expert), ffn.w1_HD) for expert in init.experts)
    layer = moe_layer(init).eval()
    with torch.no_grad():
        assert_close(layer(x_TD[None])[0], dense_forward(ffn, x_TD), rtol=1e-10, atol=1e-10)


def test_k3_below_full_rank_it_is_not_the_dense_ffn() -> None:
    ffn = random_ffn(48, 16)
    x_TD, _ = cones(1000, orthonormal(4, 16), seed=4, noise=0.4, dtype=torch.float64)
    init, _ = make(ClusterAware(pca_divisor=4), ffn, x_TD.float(), 4)
    with torch.no_grad():
        assert relative(moe_layer(init).eval()(x_TD[None])[0], dense_forward(ffn, x_TD)) > 0.01


@SEEDS
def test_k4_no_worse_on_the_cluster_than_a_plain_svd(seed: int) -> None:
    w1_HD, x_TD, c_DD = problem(seed)
    ours = truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.5)
    u_HR, s_R, v_RD = torch.linalg.svd(w1_HD, full_matrices=False)
    plain_HD = (u_HR[:, : ours.rank] * s_R[: ours.rank]) @ v_RD[: ours.rank]
    loss, plain_loss = (energy((w1_HD - w_HD) @ x_TD.T) for w_HD in (ours.w1_HD, plain_HD))
    assert loss < plain_loss


@CASES
def test_k5_scale_of_the_tokens_does_not_matter(seed: int, tau: float) -> None:
    for tokens_per_width in (4, 0.4):  # 0.4: C is singular, and the ridge scales with it
        w1_HD, _, c_DD = problem(seed, tokens_per_width)
        ours = truncate(w1_HD, c_DD, tau=tau, rank_floor=0.5)
        for factor in (1e-3, 7.0, 1e4):
            scaled = truncate(w1_HD, factor**2 * c_DD, tau=tau, rank_floor=0.5)
            assert scaled.rank == ours.rank
            assert relative(scaled.w1_HD, ours.w1_HD) < 1e-7


@CASES
def test_k5_it_is_the_svd_of_w1_s_for_any_square_root_s(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    ours = truncate(w1_HD, c_DD, tau=tau, rank_floor=0.5)
    value_D, vector_DD = torch.linalg.eigh(c_DD)
    scaled_DD = vector_DD * value_D.sqrt()
    for root_DD in (torch.linalg.cholesky(c_DD), scaled_DD @ vector_DD.T, scaled_DD):
        u_HR, sigma_R, _ = torch.linalg.svd(w1_HD @ root_DD, full_matrices=False)
        assert_close(ours.energy_R, sigma_R.square(), rtol=1e-8, atol=1e-12 * float(ours.energy_R[0]))
        basis_HR = u_HR[:, : ours.rank]
        assert relative(ours.w1_HD, basis_HR @ (basis_HR.T @ w1_HD)) < 1e-10


@SEEDS
def test_the_last_product_in_w1s_own_precision_costs_rounding_only(seed: int) -> None:
    for dtype, bound in ((torch.float32, 3e-7), (torch.bfloat16, 2.2e-3)):
        w1_HD, _, c_DD = problem(seed)
        w1_HD = w1_HD.to(dtype)
        ours = truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.5)
        exact = truncate(w1_HD.double(), c_DD, tau=0.5, rank_floor=0.5)
        assert ours.w1_HD.dtype == dtype
        assert ours.rank == exact.rank
        assert relative(ours.w1_HD, exact.w1_HD) < bound


def test_k5_scaled_tokens_give_the_same_layer() -> None:
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(1500, orthonormal(4, 24), seed=5, noise=0.3)
    first, second = (make(ClusterAware(pca_divisor=4), ffn, c * x_TD, 4)[0] for c in (1, 16))
    assert torch.equal(first.router_ED, second.router_ED)
    for a, b in zip(first.experts, second.experts, strict=True):
        assert relative(w1(a), w1(b)) < 1e-9


@CASES
def test_k6_truncation_is_a_projection_of_w1(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    ours = truncate(w1_HD, c_DD, tau=tau, rank_floor=0.5)
    # U_r lies in the range of W1, so W1_i W1^+ = U_r U_r^T W1 W1^+ is the projector U_r U_r^T itself.
    projector_HH = ours.w1_HD @ torch.linalg.pinv(w1_HD)
    assert relative(projector_HH.T, projector_HH) < 1e-10
    assert relative(projector_HH @ projector_HH, projector_HH) < 1e-10
    assert float(projector_HH.trace()) == pytest.approx(ours.rank, abs=1e-7)
    assert relative(projector_HH @ ours.w1_HD, ours.w1_HD) < 1e-10
    _, u_HH = torch.linalg.eigh(w1_HD @ c_DD @ w1_HD.T)  # U_r: the top r eigenvectors
    assert relative(u_HH[:, -ours.rank :] @ u_HH[:, -ours.rank :].T, projector_HH) < 1e-10


@SEEDS
def test_k6_fewer_tokens_than_width_is_exact_on_them_only(seed: int) -> None:
    w1_HD, x_TD, _ = problem(seed)
    few_TD = x_TD[: min(w1_HD.shape) // 2 + 1]  # as many as the floor keeps
    ours = truncate(w1_HD, few_TD.T @ few_TD, tau=0.5, rank_floor=0.5)
    assert ours.rank == len(few_TD)
    assert relative(ours.w1_HD @ few_TD.T, w1_HD @ few_TD.T) < 1e-12
    elsewhere_TD = x_TD[len(few_TD) :]
    assert relative(ours.w1_HD @ elsewhere_TD.T, w1_HD @ elsewhere_TD.T) > 0.01


def test_k6_a_layer_with_few_tokens_is_nearly_exact_on_them() -> None:
    # Kept rank 13 above the rank of C (about 8): exact but for the ridge, 1e-6 of the mean eigenvalue.
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(32, orthonormal(4, 24), seed=2)
    init, _ = make(ClusterAware(pca_divisor=4, kmeans_restarts=5), ffn, x_TD, 4)
    label_T = (x_TD @ init.router_ED.float().T).argmax(1)
    for i, expert in enumerate(init.experts):
        x_iTD = x_TD[label_T == i].double()
        assert relative(x_iTD @ w1(expert).T, x_iTD @ ffn.w1_HD.T) < 1e-3
