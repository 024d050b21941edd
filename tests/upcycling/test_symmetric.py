"""W1's factors, made once a layer for the truncation of its experts, and the spectra and projections by them.

Shape suffixes: R = min(H, D), L some of these directions.
"""

import math

import pytest
import torch

from tests.cluster_data import CASES, SEEDS, energy, problem, relative, truncate
from tests.helpers import cones, orthonormal
from tests.literal import cluster_aware as literal
from upcycle_bench.upcycling.symmetric import Factors, congruent, decompose, project, spectrum


@CASES
def test_factors_made_once_serve_every_cluster_of_a_layer(seed: int, tau: float) -> None:
    w1_HD, x_TD, c_DD = problem(seed)
    factors = decompose(w1_HD)
    few_DD = x_TD[:3].T @ x_TD[:3]
    truncate(w1_HD, few_DD, factors, tau=tau, rank_floor=0.5)
    second = truncate(w1_HD, c_DD, factors, tau=tau, rank_floor=0.5)  # after another cluster
    alone = truncate(w1_HD, c_DD, decompose(w1_HD), tau=tau, rank_floor=0.5)
    assert torch.equal(second.w1_HD, alone.w1_HD)
    of_another = truncate(w1_HD, c_DD, decompose(w1_HD.flip(1)), tau=tau, rank_floor=0.5)
    assert not torch.equal(of_another.energy_R, alone.energy_R)  # they are used


def test_a_wide_w1_whose_rounding_looks_like_rank() -> None:
    """A Cholesky of W1^T W1, of rank 21, ends in 22 pivots of ordinary size."""
    mixing_DD = torch.eye(22, dtype=torch.float64) - torch.ones(22, 22, dtype=torch.float64).triu(1)
    turn_HH = torch.linalg.qr(torch.randn(21, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    w1_HD = (turn_HH @ mixing_DD[:21]).float()
    pivot_D = torch.linalg.cholesky_ex(w1_HD.double().T @ w1_HD.double(), upper=True)[0].diagonal()
    assert pivot_D.min() > 1e-3 * pivot_D.max()
    assert decompose(w1_HD).q_HR.shape == (21, 21)
    whole = truncate(w1_HD, torch.eye(22, dtype=torch.float64), tau=1.0, rank_floor=0.0)
    assert whole.rank == 21
    assert relative(whole.w1_HD, w1_HD) < 1e-6


def test_truncate_takes_a_w1_that_wants_gradients() -> None:
    w1_HD, _, c_DD = problem(0)
    ours = truncate(torch.nn.Parameter(w1_HD), c_DD, tau=0.5, rank_floor=0.1)
    assert not ours.w1_HD.requires_grad
    assert torch.equal(ours.w1_HD, truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.1).w1_HD)


@pytest.mark.parametrize("shape", [(300, 200), (100, 200)])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e7, 1e20])
def test_factors_of_any_w1(shape: tuple[int, int], condition: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """W1 is several strips wide. It takes the QR from a condition number of 1e4 on, and where it is wide."""
    rank = min(shape)
    left_HR, right_RD = orthonormal(shape[0], rank, seed=1), orthonormal(rank, shape[1], seed=2)
    w1_HD = (left_HR.double() * torch.logspace(0, -math.log10(condition), rank).double()) @ right_RD.double()
    taken = []
    monkeypatch.setattr(torch.linalg, "qr", lambda *given, qr=torch.linalg.qr: taken.append(given) or qr(*given))
    q_HR, r_RD, norm = decompose(w1_HD.float())
    assert bool(taken) == (shape[0] < shape[1] or condition > 1e3)
    assert (q_HR.dtype, r_RD.dtype) == (torch.float32, torch.float64)
    assert torch.equal(r_RD, r_RD.triu())
    assert relative(q_HR.double() @ r_RD, w1_HD.float()) < 1e-6
    assert relative(q_HR.T @ q_HR, torch.eye(rank)) < 1e-6
    assert norm == pytest.approx(float((w1_HD @ w1_HD.T).norm()), rel=1e-6)
    x_TD = cones(1000, orthonormal(4, shape[1]), seed=3, noise=0.3)[0].double()
    c_DD = x_TD.T @ x_TD
    exact_RR = r_RD @ c_DD @ r_RD.T
    assert relative(congruent(r_RD, c_DD).tril(), exact_RR.tril()) < 1e-13
    energy_R, vector_RR, above_rounding = spectrum(Factors(q_HR, r_RD, norm), c_DD)
    assert relative((vector_RR * energy_R.flip(0)) @ vector_RR.T, exact_RR) < 1e-13
    assert (energy_R.diff() <= 0).all() and energy_R.min() >= 0
    assert (above_rounding == rank) == (condition < 1e5)  # sigma^2 falls by condition^2
    u_HL = q_HR.double() @ vector_RR[:, :10]
    projected_HD = project(Factors(q_HR, r_RD, norm), vector_RR[:, :10])
    assert projected_HD.dtype == torch.float32
    assert float((projected_HD - u_HL @ u_HL.T @ w1_HD).norm()) < 1e-6 * float(w1_HD.norm())
    ours = truncate(w1_HD.float(), c_DD, tau=0.9, rank_floor=0.5)
    expected_HD, rank, _ = literal.truncate(w1_HD.float().double().numpy(), c_DD.numpy(), tau=0.9)
    assert ours.rank == rank
    assert relative(ours.w1_HD, torch.from_numpy(expected_HD)) < 1e-6


@SEEDS
def test_a_w1_of_low_rank_is_projected_like_any_other(seed: int) -> None:
    w1_HD, x_TD, c_DD = problem(seed)
    keep = min(w1_HD.shape) // 2
    u_HR, sigma_R, v_RD = torch.linalg.svd(w1_HD, full_matrices=False)
    low_HD = (u_HR[:, :keep] * sigma_R[:keep]) @ v_RD[:keep]  # of lower rank than the floor keeps: all of it is kept
    ours = truncate(low_HD, c_DD, tau=0.5, rank_floor=0.5)
    assert ours.rank > keep
    assert relative(ours.w1_HD, low_HD) < 1e-12
    below = truncate(low_HD, c_DD, tau=0.5, rank_floor=0.0)
    assert below.rank < keep
    loss = energy((low_HD - below.w1_HD) @ x_TD.T)
    assert loss == pytest.approx(float(below.energy_R[below.rank :].sum()), rel=1e-8)
