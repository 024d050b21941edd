"""The data-aware truncated SVD of the experts: its transcription, K1 what is left out, K2 the rank that is kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.cluster_data import CASES, SEEDS, ClusterAware, energy, make, problem, relative, truncate, w1
from tests.helpers import cones, orthonormal, random_ffn
from tests.literal import cluster_aware as literal

FLOORS = (0.0, 0.5, 0.75)


# ---- The literal transcription --------------------------------------------------------------------------------------


@CASES
def test_truncate_equals_the_literal_one(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)  # more tokens than D: no ridge on either side
    for floor in FLOORS:
        ours = truncate(w1_HD, c_DD, tau=tau, rank_floor=floor)
        expected_HD, rank, sigma2_R = literal.truncate(w1_HD.numpy(), c_DD.numpy(), tau=tau, rank_floor_fraction=floor)
        assert ours.rank == rank
        assert_close(ours.energy_R, torch.from_numpy(sigma2_R), rtol=1e-8, atol=1e-12 * float(sigma2_R[0]))
        assert relative(ours.w1_HD, torch.from_numpy(expected_HD)) < 1e-10


@SEEDS
def test_ridge_only_where_the_kept_rank_exceeds_that_of_w1_c_w1t(seed: int) -> None:
    w1_HD, x_TD, _ = problem(seed)
    full_rank = min(w1_HD.shape)
    floor = full_rank // 2 + 1
    # As many tokens as the floor keeps: no ridge, and U_r are the eigenvectors of W C W^T of eigenvalue > 0.
    enough_TD = x_TD[:floor]
    c_DD = enough_TD.T @ enough_TD
    ours = truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.5)
    assert ours.rank == floor
    _, u_HH = torch.linalg.eigh(w1_HD @ c_DD @ w1_HD.T)
    u_HR = u_HH[:, -floor:]
    assert relative(ours.w1_HD, u_HR @ u_HR.T @ w1_HD) < 1e-10
    assert_close(ours.energy_R.sum(), energy(w1_HD @ enough_TD.T) * torch.ones(()).double(), rtol=1e-10, atol=0)
    # One token fewer: the last direction is decided by the ridge, as in the literal transcription, and the same
    # whatever basis of the null space an eigensolver returned.
    few_TD = x_TD[: floor - 1]
    c_DD = few_TD.T @ few_TD
    ours = truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.5)
    expected_HD, rank, _ = literal.truncate(w1_HD.numpy(), c_DD.numpy(), tau=0.5)
    assert (ours.rank, rank) == (floor, floor)
    assert relative(ours.w1_HD, torch.from_numpy(expected_HD)) < 1e-6
    width = c_DD.shape[0]
    ridged_DD = c_DD + 1e-6 * c_DD.trace() / width * torch.eye(width).double()
    assert_close(ours.energy_R.sum(), (w1_HD @ ridged_DD @ w1_HD.T).trace(), rtol=1e-10, atol=0)
    rotation_DD = orthonormal(width, width, seed=seed + 100)
    turned = truncate(w1_HD @ rotation_DD, rotation_DD.T @ c_DD @ rotation_DD, tau=0.5, rank_floor=0.5)
    assert relative(turned.w1_HD @ rotation_DD.T, ours.w1_HD) < 1e-6


@pytest.mark.parametrize(("length", "gain"), [(1, 1.0), (100, 0.01), (1000, 0.01), (1e4, 1e-3)])
def test_few_long_tokens_that_w1_all_but_ignores_get_the_ridge(length: float, gain: float) -> None:
    """Tokens with a long common mean, as massive activations are: W1 C W1^T then hides the rounding of its product."""
    generator = torch.Generator().manual_seed(0)
    mean_D = orthonormal(1, 48, seed=1)[0]
    w1_HD = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    w1_HD -= (1 - gain) * torch.outer(w1_HD @ mean_D, mean_D)
    x_TD, size_T1 = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (48, 1))
    x_TD = x_TD + length * (1 + 0.01 * size_T1) * mean_D  # 12 tokens, and a floor of 25
    ours = truncate(w1_HD, x_TD.T @ x_TD, tau=0.9, rank_floor=0.5)
    assert ours.rank == 25
    turn_DD = orthonormal(48, 48, seed=2)
    turned_TD = x_TD @ turn_DD
    turned = truncate(w1_HD @ turn_DD, turned_TD.T @ turned_TD, tau=0.9, rank_floor=0.5)
    assert relative(turned.w1_HD @ turn_DD.T, ours.w1_HD) < 1e-6


def test_a_moment_of_zeros_leaves_w1() -> None:
    w1_HD, _, c_DD = problem(0)
    ours = truncate(w1_HD, 0 * c_DD, tau=0.5, rank_floor=0.0)
    assert torch.equal(ours.w1_HD, w1_HD)
    assert (ours.rank, ours.floor_binds) == (min(w1_HD.shape), False)


# ---- K1: what is left out -------------------------------------------------------------------------------------------


@CASES
def test_k1_truncation_loss_is_the_energy_left_out(seed: int, tau: float) -> None:
    w1_HD, x_TD, c_DD = problem(seed)
    ours = truncate(w1_HD, c_DD, tau=tau, rank_floor=0.0)
    loss = energy((w1_HD - ours.w1_HD) @ x_TD.T)  # over the tokens themselves
    total = energy(w1_HD @ x_TD.T)
    left_out = float(ours.energy_R[ours.rank :].sum())
    assert loss == pytest.approx(left_out, rel=1e-8, abs=1e-13 * total)
    difference_HD = w1_HD - ours.w1_HD
    assert float((difference_HD @ c_DD @ difference_HD.T).trace()) == pytest.approx(loss, rel=1e-8, abs=1e-13 * total)
    assert loss / total <= 1 - tau + 1e-12


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_k1_on_the_tokens_of_every_cluster_of_a_layer(tau: float) -> None:
    strategy = ClusterAware(tau=tau, rank_floor=0.0, pca_divisor=4, cluster_tokens=500)
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(2000, orthonormal(4, 24), seed=3, noise=0.4)
    init, calibrator = make(strategy, ffn, x_TD, 4, chunk=333)
    label_T = (x_TD @ init.router_ED.float().T).argmax(1)
    for i, expert in enumerate(init.experts):
        x_iTD = x_TD[label_T == i].double()
        ours = truncate(ffn.w1_HD, calibrator.moment(i), tau=tau, rank_floor=0.0)
        loss = energy(x_iTD @ (ffn.w1_HD - w1(expert)).T)
        assert loss == pytest.approx(float(ours.energy_R[ours.rank :].sum()), rel=1e-8)
        relative_error = (loss / energy(x_iTD @ ffn.w1_HD.T)) ** 0.5  # of the pre-activations
        assert 0 < relative_error <= (1 - tau) ** 0.5


# ---- K2: the kept rank ----------------------------------------------------------------------------------------------


@CASES
def test_k2_rank_is_the_smallest_that_reaches_tau_or_the_floor(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    for floor in FLOORS:
        ours = truncate(w1_HD, c_DD, tau=tau, rank_floor=floor)
        assert int(torch.linalg.matrix_rank(ours.w1_HD, atol=1e-9 * float(w1_HD.norm()))) == ours.rank
        assert ours.rank > floor * min(w1_HD.shape)
        share_R = ours.energy_R.cumsum(0) / ours.energy_R.sum()
        assert (ours.energy_R.diff() <= 0).all()
        assert float(share_R[ours.rank - 1]) >= tau - 1e-12
        below = float(share_R[ours.rank - 2]) if ours.rank > 1 else 0.0
        assert ours.floor_binds == (below >= tau)


def test_k2_kept_rank_by_hand() -> None:
    energy_R = torch.tensor([60.0, 30.0, 9.0, 1.0]).double()  # cumulative shares 0.6, 0.9, 0.99, 1

    def rule(tau: float, rank_floor: float, energies: Tensor = energy_R) -> tuple[int, bool]:
        return ClusterAware(tau=tau, rank_floor=rank_floor).kept_rank(energies)

    assert [rule(tau, 0)[0] for tau in (0.5, 0.7, 0.95, 0.995, 1.0)] == [1, 2, 3, 4, 4]
    assert rule(0.6, 0)[0] == 1  # 60 / 100 reaches 0.6
    assert rule(0.61, 0)[0] == 2
    assert rule(0.5, 0.5) == (3, True)  # floor(4 * 0.5) + 1 = 3 > 1
    assert rule(0.95, 0.5) == (3, False)  # tau asks for 3 by itself
    assert rule(0.995, 0.5) == (4, False)
    assert rule(0.5, 0.99) == (4, True)  # floor(3.96) + 1 = 4, never above R
    assert rule(0.5, 0.0) == (1, False)  # at least one
    assert rule(0.9, 0.5, torch.ones(1).double()) == (1, False)
    # Five equal energies: 3/5 < 0.7 <= 4/5; the floor floor(5 * 0.5) + 1 = 3 does not bind.
    assert rule(0.7, 0.5, torch.ones(5).double()) == (4, False)
    # tau = 1 keeps everything, zeros and rounding included. More than half is 385 of 768 and 257 of 512.
    assert rule(1.0, 0.0, torch.tensor([1.0, 0.0, 0.0]).double()) == (3, False)
    assert [rule(0.5, 0.5, torch.eye(n)[0].double())[0] for n in (768, 512)] == [385, 257]
    # Twelve times 0.1, added one by one, is less than their sum in pairs; still the last share must be exactly 1.
    assert rule(0.9999999999999999, 0.0, torch.full((12,), 0.1, dtype=torch.float64)) == (12, False)


@given(
    energies=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(any),
    tau=st.floats(0, 1, exclude_min=True),
    rank_floor=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=200)
def test_k2_kept_rank_for_any_spectrum(energies: list[float], tau: float, rank_floor: float) -> None:
    energy_R = torch.tensor(sorted(energies, reverse=True), dtype=torch.float64)
    rank, floor_binds = ClusterAware(tau=tau, rank_floor=rank_floor).kept_rank(energy_R)
    share_R = energy_R.cumsum(0) / energy_R.sum()
    assert 1 <= rank <= len(energy_R)
    assert rank >= min(len(energy_R), int(len(energy_R) * rank_floor) + 1)
    assert share_R[rank - 1] >= tau - 1e-12
    if not floor_binds and rank > 1 and tau < 1:
        assert share_R[rank - 2] < tau


# ---- A fixed rank ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.9, 1.0])
def test_k2_a_fixed_fraction_of_the_rank_is_kept_whatever_tau_says(fraction: float) -> None:
    ffn = random_ffn(32, 16)
    x_TD, _ = cones(800, orthonormal(4, 16), seed=3, noise=0.3)
    options = {"pca_divisor": 4, "rank_fraction": fraction}
    init, calibrator = make(ClusterAware(**options), ffn, x_TD, 4)
    again, _ = make(ClusterAware(tau=0.1, rank_floor=0.9, **options), ffn, x_TD, 4)
    rank = {0.5: 8, 0.75: 12, 0.9: 14, 1.0: 16}[fraction]  # of 16; 14.4 is rounded
    assert init.notes["mean_rank"] == rank
    assert init.notes["rank_floor_binds_share"] == 0
    for number, (expert, same) in enumerate(zip(init.experts, again.experts, strict=True)):
        assert torch.equal(w1(expert), w1(same))
        assert int(torch.linalg.matrix_rank(w1(expert), rtol=1e-9)) == rank
        moment_DD = calibrator.moment(number)
        sigma2_R = truncate(ffn.w1_HD, moment_DD, tau=1.0, rank_floor=0.0).energy_R
        rest_HD = ffn.w1_HD - w1(expert)  # K1: the loss is the energy left out
        loss = float((rest_HD @ moment_DD @ rest_HD.T).trace())
        assert loss == pytest.approx(float(sigma2_R[rank:].sum()), rel=1e-8, abs=1e-9 * float(sigma2_R[0]))


def test_k2_kept_rank_of_a_fraction_by_hand() -> None:
    energies = torch.tensor([8.0, 1.0, 0.5, 0.5])

    def rule(share: float) -> tuple[int, bool]:
        return ClusterAware(tau=0.9, rank_floor=0.5, rank_fraction=share).kept_rank(energies)

    assert [rule(share) for share in (0.01, 0.25, 0.6, 0.7, 1.0)] == [(r, False) for r in (1, 1, 2, 3, 4)]
    assert rule(0.0) == ClusterAware(tau=0.9, rank_floor=0.5).kept_rank(energies) == (3, True)
