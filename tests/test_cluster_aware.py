"""Cluster-aware upcycling against its literal transcription, and METHODS 6.5's invariants K1 to K10 one by one.

Shape suffixes: B batch, L sequence, T tokens, D model width, H hidden, N experts, R = min(H, D) singular values.
"""

import copy
import importlib
import io
import itertools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.helpers import (
    Initialised,
    TinyPairs,
    captions,
    cones,
    dense_forward,
    features,
    initialise,
    moe_layer,
    orthonormal,
    random_ffn,
    threads,
    tiny_clip,
    tiny_moe,
)
from tests.literal import cluster_aware as literal
from tests.literal import moe_layer as literal_moe
from upcycle_bench.calibration import calibrate
from upcycle_bench.errors import UserError
from upcycle_bench.moe import MoEFFN, moe_layers
from upcycle_bench.registry import load_registry
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, LayerInit, configure
from upcycle_bench.surgery import find_layers, upcycle

ClusterAware = load_registry().strategies["cluster-aware"].target
fast = importlib.import_module(ClusterAware.__module__)  # truncate, kept_rank, EESD, ... of the strategy's file
STREAM = Stream(("test", 0))
SEEDS = pytest.mark.parametrize("seed", range(6))
TAUS = pytest.mark.parametrize("tau", [0.5, 0.9, 0.99, 0.999])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def problem(seed: int, tokens_per_width: float = 4) -> tuple[Tensor, Tensor, Tensor]:
    """W1 [H, D], tall or wide; anisotropic tokens with a mean [T, D]; C = X^T X. All float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((6, 40), (6, 20)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing_DD = draw(width, width) * 0.8 ** torch.arange(width)
    x_TD = draw(int(tokens_per_width * width), width) @ mixing_DD.T + draw(width)
    return draw(hidden, width), x_TD, x_TD.T @ x_TD


def energy(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def layer_of(num_experts: int) -> Layer:
    return Layer("vision", 1, num_experts, 2)


def make(strategy: Any, ffn: FFN, x_TD: Tensor, num_experts: int, chunk: int | None = None) -> tuple[LayerInit, Any]:
    """Stream tokens past the calibrator and initialise one layer; (LayerInit, the calibrator)."""
    calibrator = strategy.calibrator(ffn, layer_of(num_experts), STREAM)
    for part in x_TD.split(chunk or len(x_TD)):
        calibrator.update(part)
    return strategy.init_layer(ffn, layer_of(num_experts), calibrator, STREAM.child("init")), calibrator


def w1(expert: nn.Module) -> Tensor:
    return expert.c_fc.weight.detach()


# ---- The whole layer against the literal transcription -------------------------------------------------------------


def transcription(strategy: Any, ffn: FFN, x_TD: Tensor, num_experts: int) -> tuple[list[literal.Array], literal.Array]:
    """The literal experts and router of the same tokens."""
    return literal.cluster_aware(
        ffn.w1_HD.double().numpy(),
        x_TD.numpy(),
        x_TD[: strategy.cluster_tokens].numpy(),
        num_experts,
        pca_dim=ffn.width // strategy.pca_divisor if strategy.pca_divisor > 1 else None,
        tau=strategy.tau,
        rank_floor_fraction=strategy.rank_floor,
        niter=strategy.kmeans_iterations,
        nredo=strategy.kmeans_restarts,
        seed=STREAM.child("kmeans").seed(bits=31),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("hidden", "width", "options"),
    [
        (64, 24, {"pca_divisor": 4}),
        (64, 24, {"pca_divisor": 1, "tau": 0.5, "rank_floor": 0.0}),
        (64, 24, {"pca_divisor": 2, "tau": 0.999, "kmeans_restarts": 3}),
        (16, 24, {"pca_divisor": 3, "rank_floor": 0.75}),  # H < D: R = H
        (24, 24, {"pca_divisor": 4, "tau": 1.0}),
    ],
)
def test_fast_strategy_equals_the_literal_one(
    hidden: int, width: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    strategy = ClusterAware(cluster_tokens=600, **options)
    ffn = random_ffn(hidden, width, dtype=dtype)
    x_TD, _ = cones(1500, orthonormal(4, width), seed=1, noise=0.3)  # float32, as calibration gives it
    init, calibrator = make(strategy, ffn, x_TD, 4, chunk=270)
    w1_experts, router_ND = transcription(strategy, ffn, x_TD, 4)
    # Centroids: faiss works in float32 on points that both sides rounded from another precision.
    np.testing.assert_allclose(init.router_ND.double().numpy(), router_ND, rtol=0, atol=1e-5)
    labels_T = literal.assign(x_TD.numpy(), router_ND)
    assert calibrator.count_N.tolist() == np.bincount(labels_T, minlength=4).tolist()
    # Experts: float64 of equal tokens in another order and by another algorithm (eigh and QR against Cholesky, SVD
    # and solve), so rounding times the conditioning of C; float32 weights are rounded once at the end (6e-8).
    for expert, expected_HD in zip(init.experts, w1_experts, strict=True):
        assert w1(expert).dtype == dtype
        assert relative(w1(expert), torch.from_numpy(expected_HD)) < (1e-9 if dtype == torch.float64 else 1e-7)


def test_fast_strategy_equals_the_literal_one_on_clusters_with_few_tokens() -> None:
    # About 8 tokens per cluster at D = 24 and a floor of 13: the kept rank exceeds that of every C, so both sides add
    # the ridge 1e-6 tr(C)/D (METHODS 6.3). The directions it decides have sigma^2 of about 1e-6 of the largest.
    strategy = ClusterAware(pca_divisor=4, kmeans_restarts=5)
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(32, orthonormal(4, 24), seed=2)
    init, calibrator = make(strategy, ffn, x_TD, 4)
    assert 0 < calibrator.count_N.min() <= calibrator.count_N.max() < 13
    w1_experts, router_ND = transcription(strategy, ffn, x_TD, 4)
    np.testing.assert_allclose(init.router_ND.double().numpy(), router_ND, rtol=0, atol=1e-5)
    for expert, expected_HD in zip(init.experts, w1_experts, strict=True):
        assert relative(w1(expert), torch.from_numpy(expected_HD)) < 1e-6


@SEEDS
@TAUS
@pytest.mark.parametrize("rank_floor", [0.0, 0.5, 0.75])
def test_truncate_equals_the_literal_one(seed: int, tau: float, rank_floor: float) -> None:
    w1_HD, _, c_DD = problem(seed)  # more tokens than D: no ridge on either side
    ours = fast.truncate(w1_HD, c_DD, tau=tau, rank_floor=rank_floor)
    expected_HD, rank, sigma2_R = literal.truncate(w1_HD.numpy(), c_DD.numpy(), tau=tau, rank_floor_fraction=rank_floor)
    assert ours.rank == rank
    assert_close(ours.energy_R, torch.from_numpy(sigma2_R), rtol=1e-8, atol=1e-12 * float(sigma2_R[0]))
    assert relative(ours.w1_HD, torch.from_numpy(expected_HD)) < 1e-10


@SEEDS
def test_ridge_only_where_the_kept_rank_exceeds_that_of_c(seed: int) -> None:
    w1_HD, x_TD, _ = problem(seed)
    full_rank = min(w1_HD.shape)
    floor = full_rank // 2 + 1
    # As many tokens as the floor keeps: no ridge, and U_r are the eigenvectors of W C W^T of eigenvalue > 0.
    enough_TD = x_TD[:floor]
    c_DD = enough_TD.T @ enough_TD
    ours = fast.truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.5)
    assert ours.rank == floor
    _, u_HH = torch.linalg.eigh(w1_HD @ c_DD @ w1_HD.T)
    u_HR = u_HH[:, -floor:]
    assert relative(ours.w1_HD, u_HR @ u_HR.T @ w1_HD) < 1e-10
    assert_close(ours.energy_R.sum(), energy(w1_HD @ enough_TD.T) * torch.ones(()).double(), rtol=1e-10, atol=0)
    # One token fewer: the last direction is decided by the ridge, as in the literal transcription, and the same
    # whatever basis of the null space an eigensolver returned.
    few_TD = x_TD[: floor - 1]
    c_DD = few_TD.T @ few_TD
    ours = fast.truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.5)
    expected_HD, rank, _ = literal.truncate(w1_HD.numpy(), c_DD.numpy(), tau=0.5)
    assert (ours.rank, rank) == (floor, floor)
    assert relative(ours.w1_HD, torch.from_numpy(expected_HD)) < 1e-6
    width = c_DD.shape[0]
    ridged_DD = c_DD + 1e-6 * c_DD.trace() / width * torch.eye(width).double()
    assert_close(ours.energy_R.sum(), (w1_HD @ ridged_DD @ w1_HD.T).trace(), rtol=1e-10, atol=0)
    rotation_DD = orthonormal(width, width, seed=seed + 100)
    turned = fast.truncate(w1_HD @ rotation_DD, rotation_DD.T @ c_DD @ rotation_DD, tau=0.5, rank_floor=0.5)
    assert relative(turned.w1_HD @ rotation_DD.T, ours.w1_HD) < 1e-6


# ---- K1 to K6, K10: the experts ------------------------------------------------------------------------------------


@SEEDS
@TAUS
def test_k1_truncation_loss_is_the_energy_left_out(seed: int, tau: float) -> None:
    w1_HD, x_TD, c_DD = problem(seed)
    ours = fast.truncate(w1_HD, c_DD, tau=tau, rank_floor=0.0)
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
    label_T = (x_TD @ init.router_ND.float().T).argmax(1)
    for i, expert in enumerate(init.experts):
        x_iTD = x_TD[label_T == i].double()
        ours = fast.truncate(ffn.w1_HD, calibrator.moment_NDD[i], tau=tau, rank_floor=0.0)
        loss = energy(x_iTD @ (ffn.w1_HD - w1(expert)).T)
        assert loss == pytest.approx(float(ours.energy_R[ours.rank :].sum()), rel=1e-8)
        relative_error = (loss / energy(x_iTD @ ffn.w1_HD.T)) ** 0.5  # METHODS 0.4: of the pre-activations
        assert 0 < relative_error <= (1 - tau) ** 0.5


@SEEDS
@TAUS
@pytest.mark.parametrize("rank_floor", [0.0, 0.5, 0.75])
def test_k2_rank_is_the_smallest_that_reaches_tau_or_the_floor(seed: int, tau: float, rank_floor: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    ours = fast.truncate(w1_HD, c_DD, tau=tau, rank_floor=rank_floor)
    full_rank = min(w1_HD.shape)
    assert int(torch.linalg.matrix_rank(ours.w1_HD, atol=1e-9 * float(w1_HD.norm()))) == ours.rank
    assert ours.rank > rank_floor * full_rank
    share_R = ours.energy_R.cumsum(0) / ours.energy_R.sum()
    assert (ours.energy_R.diff() <= 0).all()
    assert float(share_R[ours.rank - 1]) >= tau - 1e-12
    below = float(share_R[ours.rank - 2]) if ours.rank > 1 else 0.0
    assert ours.floor_binds == (below >= tau)


def test_k2_kept_rank_by_hand() -> None:
    energy_R = torch.tensor([60.0, 30.0, 9.0, 1.0]).double()  # cumulative shares 0.6, 0.9, 0.99, 1

    def rule(tau: float, rank_floor: float, energies: Tensor = energy_R) -> tuple[int, bool]:
        return fast.kept_rank(energies, tau, rank_floor)

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
    # tau = 1 keeps everything, zeros and rounding included; METHODS 6.2: 385 of 768, 257 of 512.
    assert rule(1.0, 0.0, torch.tensor([1.0, 0.0, 0.0]).double()) == (3, False)
    assert [rule(0.5, 0.5, torch.eye(n)[0].double())[0] for n in (768, 512)] == [385, 257]
    # Twelve times 0.1, added one by one, is less than their sum in pairs: the last share must be 1 all the same.
    assert rule(0.9999999999999999, 0.0, torch.full((12,), 0.1, dtype=torch.float64)) == (12, False)


@given(
    energies=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(any),
    tau=st.floats(0, 1, exclude_min=True),
    rank_floor=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=200)
def test_k2_kept_rank_for_any_spectrum(energies: list[float], tau: float, rank_floor: float) -> None:
    energy_R = torch.tensor(sorted(energies, reverse=True), dtype=torch.float64)
    rank, floor_binds = fast.kept_rank(energy_R, tau, rank_floor)
    share_R = energy_R.cumsum(0) / energy_R.sum()
    assert 1 <= rank <= len(energy_R)
    assert rank >= min(len(energy_R), int(len(energy_R) * rank_floor) + 1)
    assert share_R[rank - 1] >= tau - 1e-12
    if not floor_binds and rank > 1 and tau < 1:
        assert share_R[rank - 2] < tau


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
    ours = fast.truncate(w1_HD, c_DD, tau=0.5, rank_floor=0.5)
    u_HR, s_R, v_RD = torch.linalg.svd(w1_HD, full_matrices=False)
    plain_HD = (u_HR[:, : ours.rank] * s_R[: ours.rank]) @ v_RD[: ours.rank]
    loss, plain_loss = (energy((w1_HD - w_HD) @ x_TD.T) for w_HD in (ours.w1_HD, plain_HD))
    assert loss < plain_loss


@SEEDS
@TAUS
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_k5_scale_of_the_tokens_does_not_matter(seed: int, tau: float, factor: float) -> None:
    for tokens_per_width in (4, 0.4):  # with a singular C, too: the ridge scales along
        w1_HD, _, c_DD = problem(seed, tokens_per_width)
        ours, scaled = (fast.truncate(w1_HD, c * c_DD, tau=tau, rank_floor=0.5) for c in (1, factor**2))
        assert scaled.rank == ours.rank
        assert relative(scaled.w1_HD, ours.w1_HD) < 1e-7


@SEEDS
@TAUS
@pytest.mark.parametrize("root", ["cholesky", "symmetric"])
def test_k5_choice_of_the_square_root_does_not_matter(
    seed: int, tau: float, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w1_HD, _, c_DD = problem(seed)
    ours = fast.truncate(w1_HD, c_DD, tau=tau, rank_floor=0.5)

    def other_root(moment_DD: Tensor) -> tuple[Tensor, int]:
        value_D, vector_DD = torch.linalg.eigh(moment_DD)
        symmetric_DD = (vector_DD * value_D.sqrt()) @ vector_DD.T
        return (torch.linalg.cholesky(moment_DD) if root == "cholesky" else symmetric_DD), len(moment_DD)

    monkeypatch.setattr(fast, "_square_root", other_root)
    again = fast.truncate(w1_HD, c_DD, tau=tau, rank_floor=0.5)
    assert again.rank == ours.rank
    assert relative(again.w1_HD, ours.w1_HD) < 1e-10


def test_k5_scaled_tokens_give_the_same_layer() -> None:
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(1500, orthonormal(4, 24), seed=5, noise=0.3)
    first, second = (make(ClusterAware(pca_divisor=4), ffn, c * x_TD, 4)[0] for c in (1, 16))
    assert torch.equal(first.router_ND, second.router_ND)
    for a, b in zip(first.experts, second.experts, strict=True):
        assert relative(w1(a), w1(b)) < 1e-9


@SEEDS
@TAUS
def test_k6_truncation_is_a_projection_of_w1(seed: int, tau: float) -> None:
    w1_HD, _, c_DD = problem(seed)
    ours = fast.truncate(w1_HD, c_DD, tau=tau, rank_floor=0.5)
    # U_r lies in the range of W1, so W1_i W1^+ = U_r U_r^T W1 W1^+ is the projector U_r U_r^T itself.
    projector_HH = ours.w1_HD @ torch.linalg.pinv(w1_HD)
    assert relative(projector_HH.T, projector_HH) < 1e-10
    assert relative(projector_HH @ projector_HH, projector_HH) < 1e-10
    assert float(projector_HH.trace()) == pytest.approx(ours.rank, abs=1e-7)
    assert relative(projector_HH @ ours.w1_HD, ours.w1_HD) < 1e-10
    _, u_HH = torch.linalg.eigh(w1_HD @ c_DD @ w1_HD.T)  # METHODS 6.3: top-r eigenvectors of W1 C W1^T
    assert relative(u_HH[:, -ours.rank :] @ u_HH[:, -ours.rank :].T, projector_HH) < 1e-10


@SEEDS
def test_k6_fewer_tokens_than_width_is_exact_on_them_only(seed: int) -> None:
    w1_HD, x_TD, _ = problem(seed)
    few_TD = x_TD[: min(w1_HD.shape) // 2 + 1]  # as many as the floor keeps
    ours = fast.truncate(w1_HD, few_TD.T @ few_TD, tau=0.5, rank_floor=0.5)
    assert ours.rank == len(few_TD)
    assert relative(ours.w1_HD @ few_TD.T, w1_HD @ few_TD.T) < 1e-12
    elsewhere_TD = x_TD[len(few_TD) :]
    assert relative(ours.w1_HD @ elsewhere_TD.T, w1_HD @ elsewhere_TD.T) > 0.01


def test_k6_a_layer_with_few_tokens_is_nearly_exact_on_them() -> None:
    # Kept rank 13 above the rank of C (about 8): exact but for the ridge, 1e-6 of the mean eigenvalue.
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(32, orthonormal(4, 24), seed=2)
    init, _ = make(ClusterAware(pca_divisor=4, kmeans_restarts=5), ffn, x_TD, 4)
    label_T = (x_TD @ init.router_ND.float().T).argmax(1)
    for i, expert in enumerate(init.experts):
        x_iTD = x_TD[label_T == i].double()
        assert relative(x_iTD @ w1(expert).T, x_iTD @ ffn.w1_HD.T) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_k10_second_linear_and_biases_are_the_dense_ones_to_the_bit(dtype: torch.dtype) -> None:
    ffn = random_ffn(32, 16, dtype=dtype)
    before = [tensor.clone() for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)]
    x_TD, _ = cones(400, orthonormal(4, 16), seed=6)
    init, _ = make(ClusterAware(pca_divisor=4), ffn, x_TD, 4)
    for expert in init.experts:
        assert torch.equal(expert.c_fc.bias, ffn.b1_H)
        assert torch.equal(expert.c_proj.weight, ffn.w2_DH)
        assert torch.equal(expert.c_proj.bias, ffn.b2_D)
        assert not torch.equal(w1(expert), ffn.w1_HD)
        assert {parameter.dtype for parameter in expert.parameters()} == {dtype}
    assert init.router_ND.dtype == dtype
    tensors = [p for expert in init.experts for p in expert.parameters()]
    tensors += [ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)  # storage of their own
    assert all(map(torch.equal, before, (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)))


# ---- K7: the router ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pca_divisor", [1, 3, 8])
def test_k7_router_rows_are_unit_and_choose_the_cluster(pca_divisor: int) -> None:
    ffn = random_ffn(32, 24, dtype=torch.float32)
    x_TD, _ = cones(1200, orthonormal(4, 24), seed=7, noise=0.5)
    x_TD = x_TD + 5 * torch.randn(24, generator=torch.Generator().manual_seed(0))  # a mean, which PCA must not lose
    init, calibrator = make(ClusterAware(pca_divisor=pca_divisor, cluster_tokens=300), ffn, x_TD, 6, chunk=100)
    assert_close(init.router_ND.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    layer = moe_layer(init).eval()
    with torch.no_grad():
        first_T = layer.gate(x_TD)[3][0]  # DeepSpeed's index_KT
    label_T = torch.from_numpy(literal.assign(x_TD.numpy(), init.router_ND.double().numpy()))
    assert torch.equal(first_T.long(), label_T)
    assert torch.equal(torch.bincount(label_T, minlength=6), calibrator.count_N)
    moment_NDD = torch.zeros_like(calibrator.moment_NDD)
    for x_D, label in zip(x_TD.double(), label_T, strict=True):
        moment_NDD[label] += torch.outer(x_D, x_D)  # tokens as they are, not normalised
    assert relative(calibrator.moment_NDD, moment_NDD) < 1e-12


def test_k7_router_scale_multiplies_and_changes_nothing_else() -> None:
    ffn = random_ffn(32, 24)
    x_TD, _ = cones(500, orthonormal(4, 24), seed=7)
    one, four = (make(ClusterAware(pca_divisor=4, router_scale=scale), ffn, x_TD, 4)[0] for scale in (1, 4))
    assert torch.equal(four.router_ND, 4 * one.router_ND)
    assert all(torch.equal(w1(a), w1(b)) for a, b in zip(one.experts, four.experts, strict=True))
    assert one.notes == four.notes


def test_k7_on_the_calibration_tokens_of_a_clip() -> None:
    clip = tiny_clip()
    strategy = ClusterAware()
    made = initialise(strategy, clip, seed=0)
    model = upcycle(clip.model, made.inits, tiny_moe()).eval()
    for name, layer in moe_layers(model).items():
        # The same tokens go once more through the dense model, and to this layer's gate.
        counts_N = torch.zeros(4, dtype=torch.long)

        def count(x_TD: Tensor, layer: MoEFFN = layer, counts_N: Tensor = counts_N) -> None:
            counts_N.add_(torch.bincount(layer.gate(x_TD)[3][0].long(), minlength=4))

        collectors = {n: SimpleNamespace(update=count if n == name else lambda x_TD: None) for n in made.inits}
        recalibrate(clip, made, collectors, strategy.calibration_pairs)
        assert torch.equal(counts_N, made.calibrators[name].count_N), name
        assert counts_N.sum() == made.inits[name].notes["calibration_tokens"]


def recalibrate(clip: Any, made: Initialised, collectors: dict[str, Any], pairs: int) -> None:
    """Stream the data of `initialise(..., seed=0)` past other collectors."""
    batches = TinyPairs(clip).calibration(Stream(("calibration", 0)), pairs, 256)
    calibrate(clip.model, made.layers, collectors, [(clip.normalise(batch.images), batch.texts) for batch in batches])


# ---- K8: EESD ------------------------------------------------------------------------------------------------------


def random_init(num_experts: int, seed: int = 0, *, identical: bool = False, router_scale: float = 1.0) -> LayerInit:
    """Experts of one layer, H = 12 and D = 8, float64, and a random router."""
    ffns = [random_ffn(12, 8, seed=0 if identical else seed + i) for i in range(num_experts)]
    generator = torch.Generator().manual_seed(seed + 1000)
    router_ND = router_scale * torch.randn(num_experts, 8, generator=generator, dtype=torch.float64)
    return LayerInit([ffn.expert() for ffn in ffns], router_ND)


def tokens(count: int = 40, seed: int = 0, width: int = 8) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distil(layers: dict[str, MoEFFN], **options: Any) -> Any:
    return ClusterAware(**options).loss(layers, STREAM)


def student(init: LayerInit, *, top_k: int = 2, capacity_factor: float = 50.0) -> MoEFFN:
    """A layer in training mode."""
    moe = tiny_moe(experts=len(init.experts), top_k=top_k, capacity_factor=capacity_factor, min_capacity=0)
    return moe_layer(init, moe=moe).train()


def weights_of(experts: Any) -> list[literal_moe.Expert]:
    return [(e.c_fc.weight, e.c_fc.bias, e.c_proj.weight, e.c_proj.bias) for e in experts]


def perturb(layer: MoEFFN, seed: int = 5) -> None:
    """What some optimiser steps would do: student and teacher differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_k8_eesd_is_zero_for_identical_experts() -> None:
    layer = student(random_init(4, identical=True))
    loss = distil({"vision.1": layer})
    layer(tokens()[None])
    assert 0 <= loss.compute().item() < 1e-25


@pytest.mark.parametrize("number", [2, 4])
def test_k8_eesd_is_zero_when_every_expert_is_chosen(number: int) -> None:
    layer = student(random_init(number), top_k=number)
    loss = distil({"vision.1": layer})
    layer(tokens()[None])
    assert 0 <= loss.compute().item() < 1e-25
    fewer = student(random_init(4), top_k=2)
    loss = distil({"vision.1": fewer})
    fewer(tokens()[None])
    assert loss.compute().item() > 1e-3  # so the zeros above say something


def test_k8_eesd_falls_as_the_router_sharpens() -> None:
    values = []
    for scale in (0.0, 0.3, 1.0, 3.0, 10.0, 300.0):
        layer = student(random_init(4, router_scale=scale))
        loss = distil({"vision.1": layer})
        layer(tokens()[None])
        values.append(loss.compute().item())
    assert all(later < earlier for earlier, later in itertools.pairwise(values)), values
    assert values[-1] < 1e-3 * values[0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("capacity_factor", [50.0, 0.4])
def test_k8_eesd_value_and_gradient_equal_the_literal_ones(capacity_factor: float, reduction: str) -> None:
    layer = student(random_init(4), capacity_factor=capacity_factor)
    loss = distil({"vision.1": layer}, eesd_weight=0.7, eesd_feature_reduction=reduction)
    teacher_router_ND = layer.gate.wg.weight.detach().clone()
    teacher = [tuple(p.detach().clone() for p in expert) for expert in weights_of(layer.experts)]
    perturb(layer)
    x_TD = tokens().requires_grad_()
    leaves = [x_TD, *layer.parameters()]
    layer(x_TD[None])
    value = loss.compute()
    actual = torch.autograd.grad(value, leaves, allow_unused=True)

    slots = literal_moe.capacity(40, 4, capacity_factor, 2, 0)
    moe = literal_moe.moe_forward(x_TD, layer.gate.wg.weight, weights_of(layer.experts), nn.GELU(), capacity=slots)
    assert bool(moe.kept_TK.all()) == (capacity_factor > 1)  # dropped tokens are included in the loss
    expected_value = 0.7 * literal_moe.eesd_loss(
        x_TD, moe.y_TD, teacher_router_ND, teacher, nn.GELU(), feature_reduction=reduction
    )
    expected = torch.autograd.grad(expected_value, leaves, allow_unused=True)
    assert expected_value.item() > 0.01
    # The loss is float32 at the least; DeepSpeed decides routes in float32, values here are float64 on both sides.
    assert_close(value.double(), expected_value, rtol=1e-6, atol=0)
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs is not None
        assert relative(ours, theirs) < 1e-5


def test_k8_eesd_gives_the_teacher_no_gradient() -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer})
    perturb(layer)
    layer(tokens()[None])
    loss.compute().backward()
    teacher = list(loss.teacher["vision.1"].parameters())
    assert len(teacher) == 1 + 4 * 4  # router, and W1, b1, W2, b2 of each expert
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher)
    assert all(parameter.grad is not None for parameter in layer.parameters())
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher}


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.75])
def test_k8_ema_freezes_copies_or_moves(alpha: float) -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer}, eesd_ema=alpha)

    def teacher() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in loss.teacher["vision.1"].parameters()]

    def pupil() -> list[Tensor]:
        return [layer.gate.wg.weight.detach().clone(), *(p.detach().clone() for p in layer.experts.parameters())]

    start = teacher()
    assert all(map(torch.equal, start, pupil()))  # equal at step 0
    perturb(layer)
    assert all(map(torch.equal, teacher(), start))  # nothing moves before the step has ended
    loss.after_step()
    if alpha == 1:
        assert all(map(torch.equal, teacher(), start))
    elif alpha == 0:
        assert all(map(torch.equal, teacher(), pupil()))
    else:
        for now, before, target in zip(teacher(), start, pupil(), strict=True):
            assert_close(now, alpha * before + (1 - alpha) * target, rtol=1e-12, atol=1e-12)


def test_k8_ema_after_two_steps_by_hand() -> None:
    # alpha = 1/2, a weight that goes 1 -> 3 -> 7 in the student: teacher 1, then (1 + 3)/2 = 2, then (2 + 7)/2 = 4.5.
    layer = student(random_init(2))
    with torch.no_grad():
        layer.gate.wg.weight.fill_(1)
    loss = distil({"vision.1": layer}, eesd_ema=0.5)
    for value, expected in ((3.0, 2.0), (7.0, 4.5)):
        with torch.no_grad():
            layer.gate.wg.weight.fill_(value)
        loss.after_step()
        assert (loss.teacher["vision.1"].router_ND == expected).all()


def test_k8_eesd_routes_in_float32_under_bfloat16_autocast() -> None:
    # Logits of about 30 rounded to bfloat16 are off by up to 0.06, gates by as much; experts alone by 2^-8 = 0.004.
    layer = student(random_init(4, router_scale=10.0)).float()
    loss = distil({"vision.1": layer})
    x_TD = tokens(300).float()
    plain_TD = loss.teacher["vision.1"].ensemble(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x_TD[None])
        mixed_TD = loss.teacher["vision.1"].ensemble(x_TD)
        value = loss.compute()
    assert mixed_TD.dtype == torch.float32
    assert value.dtype == torch.float32
    assert ((mixed_TD - plain_TD).norm(dim=1) / plain_TD.norm(dim=1)).max() < 0.02


def test_eesd_weights_and_reductions() -> None:
    def value(names: list[str], **options: Any) -> float:
        layers = {name: student(random_init(4, seed=10 * i)) for i, name in enumerate(("a", "b")) if name in names}
        loss = distil(layers, **options)
        for layer in layers.values():
            layer(tokens()[None])
        return loss.compute().item()

    a, b = value(["a"]), value(["b"])
    assert a != pytest.approx(b, rel=0.01)
    assert value(["a", "b"]) == pytest.approx((a + b) / 2)
    assert value(["a", "b"], eesd_layer_reduction="sum") == pytest.approx(a + b)
    assert value(["a", "b"], eesd_weight=0.1) == pytest.approx(0.1 * (a + b) / 2)
    assert value(["a"], eesd_feature_reduction="mean") == pytest.approx(a / 8)  # D = 8
    assert ClusterAware(eesd_weight=0.0).loss({"a": student(random_init(4))}, STREAM) is None


def test_eesd_state_round_trip() -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer}, eesd_ema=0.5)
    perturb(layer)
    loss.after_step()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = distil({"vision.1": layer}, eesd_ema=0.5)  # a fresh teacher is the present student
    other.load_state_dict(torch.load(file, weights_only=True))
    perturb(layer, seed=6)
    for each in (loss, other):
        each.after_step()
    layer(tokens()[None])
    assert loss.compute().item() == other.compute().item() > 0


def test_eesd_close_removes_its_hooks() -> None:
    layer = student(random_init(4))
    before = len(layer.moe._forward_hooks)
    loss = distil({"vision.1": layer})
    assert len(layer.moe._forward_hooks) == before + 1
    loss.close()
    assert len(layer.moe._forward_hooks) == before
    layer(tokens()[None])
    assert loss.seen == {}


def test_eesd_sees_training_forwards_only_and_keeps_none() -> None:
    layer = student(random_init(4))
    loss = distil({"vision.1": layer})
    layer.eval()(tokens()[None])
    assert loss.seen == {}
    layer.train()(tokens()[None])
    loss.compute()
    assert loss.seen == {}  # the activations go with the step


# ---- K9: padding ---------------------------------------------------------------------------------------------------


def two_paddings(clip: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Captions that differ only behind their end of text, [B, L] twice, and their lengths."""
    context = clip.model.context_length
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(3, context, (48,), generator=generator).tolist()
    text_BL = captions(lengths, context, generator)
    other_BL = text_BL.clone()
    for row, length in zip(other_BL, lengths, strict=True):
        row[length:] = torch.randint(1, 49000, (context - length,), generator=generator)
    assert not torch.equal(text_BL, other_BL)
    return text_BL, other_BL, lengths


def test_k9_padding_does_not_influence_clusters_or_moments() -> None:
    clip = tiny_clip()
    *texts, lengths = two_paddings(clip)
    images = torch.randn(48, 3, *clip.model.visual.image_size, generator=torch.Generator().manual_seed(0))
    layers = find_layers(clip.model, tiny_moe())
    seen = []
    for text_BL in texts:
        calibrators = {
            layer.name: ClusterAware().calibrator(
                FFN.of(clip.model.get_submodule(layer.mlp_path)), layer, STREAM.child(layer.name)
            )
            for layer in layers
        }
        calibrate(clip.model, layers, calibrators, [(images[:20], text_BL[:20]), (images[20:], text_BL[20:])])
        for calibrator in calibrators.values():
            calibrator.finish()
        seen.append(calibrators)
    first, second = seen
    for layer in layers:
        a, b = first[layer.name], second[layer.name]
        patches = len(clip.model.visual.positional_embedding)
        assert a.count_N.sum() == (sum(lengths) if layer.tower == "text" else 48 * patches)
        assert torch.equal(a.count_N, b.count_N)
        # Attention at the padding is masked, so only the order of sums in another block of memory could differ.
        assert_close(a.centroid_ND, b.centroid_ND, rtol=0, atol=1e-6)
        assert_close(a.moment_NDD, b.moment_NDD, rtol=1e-6, atol=1e-6)


def test_k9_padding_does_not_influence_eesd() -> None:
    clip = tiny_clip()
    *texts, lengths = two_paddings(clip)
    made = initialise(ClusterAware(), clip, seed=0)
    moe = tiny_moe(capacity_factor=1.0)  # with drops: padding must not take anyone's place
    model = upcycle(clip.model, made.inits, moe).train()
    layers = {name: layer for name, layer in moe_layers(model).items() if layer.layer.tower == "text"}
    loss = distil(layers)
    values, gradients = [], []
    for text_BL in texts:
        model.zero_grad()
        model.encode_text(text_BL)
        assert all(len(x_TD) == sum(lengths) for x_TD, _ in loss.seen.values())
        value = loss.compute()
        value.backward()
        values.append(value.item())
        gradients.append(torch.cat([p.grad.flatten() for layer in layers.values() for p in layer.parameters()]))
    assert values[0] > 1e-4
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert relative(gradients[0], gradients[1]) < 1e-4


# ---- Streaming -----------------------------------------------------------------------------------------------------


def statistics(x_TD: Tensor, chunks: list[int], number: int = 4, **options: Any) -> Any:
    strategy = ClusterAware(pca_divisor=4, **options)
    calibrator = strategy.calibrator(random_ffn(8, x_TD.shape[1]), layer_of(number), STREAM)
    for part in x_TD.split(chunks):
        calibrator.update(part)
    calibrator.finish()
    return calibrator


def chunked(total: int, size: int) -> list[int]:
    return [size] * (total // size) + ([total % size] if total % size else [])


@pytest.mark.parametrize("size", [1, 7, 300, 1000, 3999])
def test_many_small_updates_equal_one(size: int) -> None:
    # 1,000 tokens are fitted whatever the chunks; 7, 300 and 3,999 run over that boundary, 1 and 1,000 meet it.
    x_TD, _ = cones(4000, orthonormal(4, 16), seed=8, noise=0.4)
    one = statistics(x_TD, [4000], cluster_tokens=1000)
    many = statistics(x_TD, chunked(4000, size), cluster_tokens=1000)
    assert torch.equal(one.centroid_ND, many.centroid_ND)
    assert torch.equal(one.count_N, many.count_N)
    assert one.count_N.sum() == 4000
    assert relative(many.moment_NDD, one.moment_NDD) < 1e-10


def test_only_the_buffer_decides_the_clusters() -> None:
    x_TD, _ = cones(4000, orthonormal(4, 16), seed=8, noise=0.8)
    first = statistics(x_TD, chunked(4000, 300), cluster_tokens=1000)
    altered_TD = x_TD.clone()
    altered_TD[1000:] = altered_TD[1000:].flip(1)
    assert torch.equal(statistics(altered_TD, chunked(4000, 300), cluster_tokens=1000).centroid_ND, first.centroid_ND)
    assert not torch.equal(statistics(x_TD, chunked(4000, 300), cluster_tokens=500).centroid_ND, first.centroid_ND)


def test_a_stream_shorter_than_the_buffer_is_fitted_at_its_end() -> None:
    x_TD, _ = cones(400, orthonormal(4, 16), seed=8)
    calibrator = statistics(x_TD, chunked(400, 64), cluster_tokens=100_000)
    exact = statistics(x_TD, [400], cluster_tokens=400)
    assert torch.equal(calibrator.centroid_ND, exact.centroid_ND)
    assert torch.equal(calibrator.count_N, exact.count_N)
    before = calibrator.moment_NDD.clone()
    calibrator.finish()  # again: nothing is counted twice
    assert torch.equal(calibrator.moment_NDD, before)


def test_tokens_are_held_by_value() -> None:
    x_TD, _ = cones(400, orthonormal(4, 16), seed=8)
    calibrator = ClusterAware(pca_divisor=4).calibrator(random_ffn(8, 16), layer_of(4), STREAM)
    reused_TD = torch.empty(100, 16)
    for part in x_TD.split(100):
        calibrator.update(reused_TD.copy_(part))
    calibrator.finish()
    assert torch.equal(calibrator.centroid_ND, statistics(x_TD, [400]).centroid_ND)


def held(calibrator: Any) -> int:
    """Bytes of all tensors that a calibrator holds."""
    tensors = [value for value in vars(calibrator).values() if isinstance(value, Tensor)] + calibrator.buffer
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_memory_does_not_grow_with_the_stream() -> None:
    x_TD, _ = cones(8000, orthonormal(4, 16), seed=8)
    calibrator = ClusterAware(pca_divisor=4, cluster_tokens=1000).calibrator(random_ffn(8, 16), layer_of(4), STREAM)
    sizes = []
    for part in x_TD.split(250):
        calibrator.update(part)
        sizes.append(held(calibrator))
    moments, centroids, counts = 4 * 16 * 16 * 8, 4 * 16 * 4, 4 * 8
    assert sizes[2] == moments + counts + 750 * 16 * 4  # three updates: the buffer
    assert set(sizes[3:]) == {moments + centroids + counts}  # the fourth fits and releases it
    assert calibrator.buffer == []


# ---- Edges ---------------------------------------------------------------------------------------------------------


def test_an_empty_cluster_keeps_the_dense_weights_and_is_counted() -> None:
    # One direction for two clusters: faiss splits it, but all tokens are nearest to one of the two centroids.
    x_TD = torch.arange(1, 101).float()[:, None] * torch.ones(1, 16)
    ffn = random_ffn(32, 16)
    with pytest.warns(UserWarning, match="a cluster is empty"):
        init, calibrator = make(ClusterAware(pca_divisor=4), ffn, x_TD, 2)
    assert sorted(calibrator.count_N.tolist()) == [0, 100]
    empty = int((calibrator.count_N == 0).nonzero())
    assert torch.equal(w1(init.experts[empty]), ffn.w1_HD)
    assert not torch.equal(w1(init.experts[1 - empty]), ffn.w1_HD)
    assert init.notes["empty_clusters"] == 1
    assert torch.isfinite(init.router_ND).all()


def test_notes_say_what_was_done() -> None:
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(1000, orthonormal(4, 24), seed=1, noise=0.2)
    init, calibrator = make(ClusterAware(pca_divisor=4), ffn, x_TD, 4)
    shares = [count / 1000 for count in calibrator.count_N.tolist()]
    made = [fast.truncate(ffn.w1_HD, moment_DD, tau=0.9, rank_floor=0.5) for moment_DD in calibrator.moment_NDD]
    assert init.notes == pytest.approx(
        {
            "router_agreement": 1.0,
            "calibration_tokens": 1000,
            "empty_clusters": 0,
            "largest_cluster_share": max(shares),
            "smallest_cluster_share": min(shares),
            "mean_rank": sum(each.rank for each in made) / 4,
            "rank_floor_binds_share": sum(each.floor_binds for each in made) / 4,
        }
    )


@pytest.mark.parametrize(("number", "cluster_tokens"), [(8, 1000), (8, 5)])
def test_fewer_tokens_than_clusters_is_one_line(number: int, cluster_tokens: int) -> None:
    x_TD = tokens(5, width=16).float()
    with pytest.raises(UserError, match="5 tokens for 8 clusters") as error:
        statistics(x_TD, [5], number, cluster_tokens=cluster_tokens)
    assert "\n" not in str(error.value)
    for option in ("pairs", "cluster_tokens"):  # what to do, by the options' own names
        assert option in str(error.value)


def test_a_stream_without_tokens_is_one_line() -> None:
    with pytest.raises(UserError, match="0 tokens for 4 clusters"):
        ClusterAware().calibrator(random_ffn(8, 16), layer_of(4), STREAM).finish()


def test_missing_faiss_is_one_line_that_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"faiss is not installed.*upcycle-bench\[cpu\].*\[gpu\]") as error:
        initialise(ClusterAware(), tiny_clip(), seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tau", "0"),
        ("tau", "1.5"),
        ("tau", "nan"),
        ("tau", "much"),
        ("rank_floor", "1"),
        ("rank_floor", "-0.1"),
        ("pca_divisor", "0"),
        ("router_scale", "0"),
        ("router_scale", "inf"),
        ("pairs", "0"),
        ("pairs", "1.5"),
        ("cluster_tokens", "0"),
        ("kmeans_iterations", "0"),
        ("kmeans_restarts", "0"),
        ("eesd_weight", "-1"),
        ("eesd_weight", "inf"),
        ("eesd_ema", "1.01"),
        ("eesd_feature_reduction", "max"),
        ("eesd_layer_reduction", ""),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_option(option: str, value: str) -> None:
    with pytest.raises(UserError) as error:
        configure(ClusterAware, {option: value})
    message = str(error.value)
    assert message.startswith(f"cluster-aware: {option}: ")
    assert repr(value) in message or value in message
    assert "\n" not in message


def test_an_unknown_option_is_one_line_with_near_matches() -> None:
    with pytest.raises(UserError, match="did you mean 'tau'") as error:
        configure(ClusterAware, {"taw": "0.9"})
    assert "\n" not in str(error.value)
    strategy = configure(ClusterAware, {"tau": "0.8", "pairs": "64", "eesd_feature_reduction": "mean"})
    assert (strategy.tau, strategy.pairs, strategy.calibration_pairs) == (0.8, 64, 64)
    assert strategy.config()["eesd_feature_reduction"] == "mean"


def test_defaults_are_the_papers_or_methods() -> None:
    strategy = ClusterAware()  # METHODS 6.2 and section 10
    assert (strategy.tau, strategy.rank_floor, strategy.pca_divisor, strategy.router_scale) == (0.9, 0.5, 8, 1.0)
    assert (strategy.calibration_pairs, strategy.kmeans_iterations) == (131072, 25)
    assert (strategy.eesd_weight, strategy.eesd_ema) == (1.0, 0.999)
    assert (strategy.eesd_feature_reduction, strategy.eesd_layer_reduction) == ("sum", "mean")


def test_a_model_from_cluster_aware_differs_from_dense_but_is_near() -> None:
    clip = tiny_clip()
    made = initialise(ClusterAware(tau=0.99), clip, seed=0)
    model = upcycle(clip.model, copy.deepcopy(made.inits), tiny_moe())
    text_BL, _, _ = two_paddings(clip)
    images = torch.randn(48, 3, *clip.model.visual.image_size, generator=torch.Generator().manual_seed(0))
    drift = relative(features(model, images, text_BL), features(clip.model, images, text_BL))
    assert 1e-4 < drift < 0.3
