"""Cluster-aware upcycling as a whole, against its literal transcription; its edges, options and ablations."""

import copy
import sys
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cluster_data import STREAM, ClusterAware, layer_of, make, relative, truncate, two_paddings, w1
from tests.helpers import cones, features, initialise, orthonormal, random_ffn, tiny_clip, tiny_moe
from tests.literal import cluster_aware as literal
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import configure
from upcycle_bench.upcycling import eesd
from upcycle_bench.util.errors import UserError

# ---- What it makes --------------------------------------------------------------------------------------------------


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
def test_fast_strategy_equals_the_literal_one(hidden: int, width: int, options: dict[str, Any]) -> None:
    for dtype in (torch.float64, torch.float32):
        compare(hidden, width, options, dtype)


def compare(hidden: int, width: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    strategy = ClusterAware(cluster_tokens=600, **options)
    ffn = random_ffn(hidden, width, dtype=dtype)
    x_TD, _ = cones(1500, orthonormal(4, width), seed=1, noise=0.3)  # float32, as calibration gives it
    init, calibrator = make(strategy, ffn, x_TD, 4, chunk=270)
    w1_experts, router_ED = transcription(strategy, ffn, x_TD, 4)
    # Centroids: faiss works in float32 on points that both sides rounded from another precision.
    np.testing.assert_allclose(init.router_ED.double().numpy(), router_ED, rtol=0, atol=1e-5)
    labels_T = literal.assign(x_TD.numpy(), router_ED)
    assert calibrator.count_E.tolist() == np.bincount(labels_T, minlength=4).tolist()
    # Experts: float64 of equal tokens in another order and by another algorithm (eigh and QR against Cholesky, SVD
    # and solve), so rounding times the conditioning of C; float32 weights come out of two products in float32.
    for expert, expected_HD in zip(init.experts, w1_experts, strict=True):
        assert w1(expert).dtype == dtype
        assert relative(w1(expert), torch.from_numpy(expected_HD)) < (1e-9 if dtype == torch.float64 else 5e-7)


def test_fast_strategy_equals_the_literal_one_on_clusters_with_few_tokens() -> None:
    # About 8 tokens per cluster at D = 24 and a floor of 13: the kept rank exceeds that of every C, so both sides add
    # the ridge 1e-6 tr(C)/D. The directions that it decides have sigma^2 of about 1e-6 of the largest.
    strategy = ClusterAware(pca_divisor=4, kmeans_restarts=5)
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(32, orthonormal(4, 24), seed=2)
    init, calibrator = make(strategy, ffn, x_TD, 4)
    assert 0 < calibrator.count_E.min() <= calibrator.count_E.max() < 13
    w1_experts, router_ED = transcription(strategy, ffn, x_TD, 4)
    np.testing.assert_allclose(init.router_ED.double().numpy(), router_ED, rtol=0, atol=1e-5)
    for expert, expected_HD in zip(init.experts, w1_experts, strict=True):
        assert relative(w1(expert), torch.from_numpy(expected_HD)) < 1e-6


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
    assert init.router_ED.dtype == dtype
    tensors = [p for expert in init.experts for p in expert.parameters()]
    tensors += [ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)  # storage of their own
    assert all(map(torch.equal, before, (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)))


def test_an_empty_cluster_keeps_the_dense_weights_and_is_counted() -> None:
    # One direction for two clusters: faiss splits it, but all tokens are nearest to one of the two centroids.
    x_TD = torch.arange(1, 101).float()[:, None] * torch.ones(1, 16)
    ffn = random_ffn(32, 16)
    with pytest.warns(UserWarning, match="a cluster is empty"):
        init, calibrator = make(ClusterAware(pca_divisor=4), ffn, x_TD, 2)
    assert sorted(calibrator.count_E.tolist()) == [0, 100]
    empty = int((calibrator.count_E == 0).nonzero())
    assert torch.equal(w1(init.experts[empty]), ffn.w1_HD)
    assert not torch.equal(w1(init.experts[1 - empty]), ffn.w1_HD)
    assert init.notes["empty_clusters"] == 1
    assert torch.isfinite(init.router_ED).all()


def test_notes_say_what_was_done() -> None:
    ffn = random_ffn(64, 24)
    x_TD, _ = cones(1000, orthonormal(4, 24), seed=1, noise=0.2)
    init, calibrator = make(ClusterAware(pca_divisor=4), ffn, x_TD, 4)
    shares = [count / 1000 for count in calibrator.count_E.tolist()]
    made = [truncate(ffn.w1_HD, moment_DD, tau=0.9, rank_floor=0.5) for moment_DD in map(calibrator.moment, range(4))]
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


def test_a_model_from_cluster_aware_differs_from_dense_but_is_near() -> None:
    clip = tiny_clip()
    made = initialise(ClusterAware(tau=0.99), clip, seed=0)
    model = put_experts(clip.model, copy.deepcopy(made.inits), tiny_moe())
    text_BL, _, _ = two_paddings(clip)
    images = torch.randn(48, 3, *clip.model.visual.image_size, generator=torch.Generator().manual_seed(0))
    drift = relative(features(model, images, text_BL), features(clip.model, images, text_BL))
    assert 1e-4 < drift < 0.3


# ---- Its options and what it needs ----------------------------------------------------------------------------------


def test_missing_faiss_is_one_line_that_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"faiss is not installed.*upcycle-bench\[cpu\].*\[gpu\]") as error:
        initialise(ClusterAware(), tiny_clip(), seed=0)
    assert "\n" not in str(error.value)


def test_an_unknown_option_is_one_line_with_near_matches() -> None:
    with pytest.raises(UserError, match="did you mean 'tau'") as error:
        configure(ClusterAware, {"taw": "0.9"})
    assert "\n" not in str(error.value)
    strategy = configure(ClusterAware, {"tau": "0.8", "pairs": "64", "eesd_feature_reduction": "mean"})
    assert (strategy.tau, strategy.pairs, strategy.calibration_pairs) == (0.8, 64, 64)
    assert strategy.config()["eesd_feature_reduction"] == "mean"


def test_defaults_are_the_papers_or_reconstructed() -> None:
    strategy = ClusterAware()  # the paper's section 4.1, or what `info.reconstructed` says
    assert (strategy.tau, strategy.rank_floor, strategy.pca_divisor, strategy.router_scale) == (0.9, 0.5, 8, 1.0)
    assert (strategy.calibration_pairs, strategy.kmeans_iterations) == (131072, 25)
    assert (strategy.eesd_weight, strategy.eesd_ema) == (1.0, None)
    assert pytest.approx(1000 / 79_346, rel=1e-3) == eesd.PAPER_MEMORY  # 0.999 in the training of ViT-B/32
    assert (strategy.eesd_feature_reduction, strategy.eesd_layer_reduction) == ("paper", "mean")
    assert (strategy.eesd_tokens, strategy.eesd_mask_dropped) == (1.0, False)
    assert (strategy.pca, strategy.rank_fraction) == (True, 0.0)


# ---- The paper's ablations by name ----------------------------------------------------------------------------------


def test_cluster_only_is_cluster_aware_without_its_loss() -> None:
    ClusterOnly = load_registry().strategies["cluster-only"].target
    ffn = random_ffn(32, 16)
    x_TD, _ = cones(400, orthonormal(4, 16), seed=6)
    both, only = (make(strategy(pca_divisor=4), ffn, x_TD, 4)[0] for strategy in (ClusterAware, ClusterOnly))
    assert torch.equal(both.router_ED, only.router_ED)
    assert all(torch.equal(w1(a), w1(b)) for a, b in zip(both.experts, only.experts, strict=True))
    made, other = (initialise(strategy(), tiny_clip(), 0).inits for strategy in (ClusterOnly, ClusterAware))
    assert all(torch.equal(made[name].router_ED, other[name].router_ED) for name in made)  # in a run as well
    layers = moe_layers(put_experts(tiny_clip().model, made, tiny_moe()))
    assert ClusterOnly().loss(layers, STREAM, 100) is None
    assert ClusterAware().loss(layers, STREAM, 100) is not None
    own = {field.name for field in fields(ClusterOnly)}
    assert own == {field.name for field in fields(ClusterAware) if not field.name.startswith("eesd_")}


def test_eesd_only_is_sparse_upcycling_with_cluster_awares_loss() -> None:
    registry = load_registry().strategies
    EESDOnly, sparse = registry["eesd-only"].target, registry["sparse-upcycling"].target()
    ffn = random_ffn(32, 16)
    made, copies = (s.init_layer(ffn, layer_of(4), None, STREAM) for s in (EESDOnly(), sparse))
    assert torch.equal(made.router_ED, copies.router_ED)
    for a, b in zip(made.experts, copies.experts, strict=True):
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    layers = moe_layers(put_experts(tiny_clip().model, initialise(EESDOnly(), tiny_clip(), 0).inits, tiny_moe()))
    assert type(EESDOnly().loss(layers, STREAM, 100)) is type(ClusterAware().loss(layers, STREAM, 100))
    loss_options = {field.name for field in fields(ClusterAware) if field.name.startswith("eesd_")}
    assert {field.name for field in fields(EESDOnly)} == loss_options | {"router_init"}


def test_each_ablation_starts_from_the_model_of_the_strategy_that_it_is_to_be_compared_with() -> None:
    registry = load_registry().strategies
    for ablation, whole in (("cluster-only", "cluster-aware"), ("eesd-only", "sparse-upcycling")):
        made = [initialise(configure(registry[name].target, {}), tiny_clip(), 3).inits for name in (ablation, whole)]
        first, second = made
        for name, init in first.items():
            assert torch.equal(init.router_ED, second[name].router_ED)
            for ours, theirs in zip(init.experts, second[name].experts, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
