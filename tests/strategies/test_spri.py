"""SPRI as reconstructed: its invariants P1 to P6, its options, and a literal transcription.

Shape suffixes: O outputs, I inputs, M singular values.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests import helpers
from tests.helpers import dense_forward, moe_layer, random_ffn, tiny_clip
from tests.literal import spri as literal
from tests.training.test_loop import job
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.training import session
from upcycle_bench.training.loop import train
from upcycle_bench.util.rng import Stream

Spri = load_registry().strategies["spri"].target
PARTITIONS = pytest.mark.parametrize("partition", ["interleaved", "contiguous", "random"])
HIDDEN, WIDTH, EXPERTS = 40, 20, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def ffn() -> FFN:
    return random_ffn(HIDDEN, WIDTH)


def make(ffn: FFN, num_experts: int = EXPERTS, **options: Any) -> LayerInit:
    return Spri(**options).init_layer(ffn, Layer("vision", 1, 2, num_experts, 2), None, Stream(("test", 0)))


def matrices(ffn: FFN, **options: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """For W1 and W2: the dense matrix and that of each expert, merged."""
    plain: list[Any] = [getattr(expert, "merged", lambda e=expert: e)() for expert in make(ffn, **options).experts]
    return [
        (ffn.w1_HD, [expert.c_fc.weight.detach() for expert in plain]),
        (ffn.w2_DH, [expert.c_proj.weight.detach() for expert in plain]),
    ]


def split(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B, and the tail's singular values."""
    u_OM, s_M, vt_MI = torch.linalg.svd(weight_OI, full_matrices=False)
    return (u_OM[:, :rank] * s_M[:rank]) @ vt_MI[:rank], s_M[rank:]


# ---- P1 to P5 -------------------------------------------------------------------------------------------------------


@PARTITIONS
def test_p1_p2_residuals_are_orthogonal_and_sum_to_the_tail(ffn: FFN, partition: str) -> None:
    cases = [
        (rank, matrix)
        for fraction, rank in ((0.75, 15), (0.65, 13), (0.0, 0))  # 5, 7 and 20 components
        for matrix in matrices(ffn, partition=partition, rank_fraction=fraction)
    ]
    for rank, (weight_OI, made) in cases:
        base_OI, _ = split(weight_OI, rank)
        residuals = [each - base_OI for each in made]
        assert_close(torch.stack(residuals).sum(0), weight_OI - base_OI, **CLOSE)  # P1
        flat = torch.stack([residual.flatten() for residual in residuals])
        gram = flat @ flat.T
        assert_close(gram, gram.diagonal().diag(), **CLOSE)  # P2
        assert (gram.diagonal() > 1e-3).all()
        ranks = sorted(int(torch.linalg.matrix_rank(residual, atol=1e-9)) for residual in residuals)
        assert sum(ranks) == WIDTH - rank
        assert ranks[-1] - ranks[0] <= 1


@PARTITIONS
def test_p3_the_distance_to_the_dense_matrix_is_the_energy_of_the_others_components(ffn: FFN, partition: str) -> None:
    for weight_OI, made in matrices(ffn, partition=partition):
        base_OI, tail_M = split(weight_OI, 15)
        for each in made:
            own = float((each - base_OI).square().sum())  # sum of s_j^2 over P_e
            assert float((weight_OI - each).square().sum()) == pytest.approx(
                float(tail_M.square().sum()) - own, rel=1e-9
            )
            # `own` is a sum of s_j^2 over |P_e| of the tail's values
            count = int(torch.linalg.matrix_rank(each - base_OI, atol=1e-9))
            values_M = torch.linalg.svdvals(each - base_OI)[:count]
            assert all(float((tail_M - value).abs().min()) < 1e-10 for value in values_M)


@PARTITIONS
def test_p4_the_mean_is_the_dense_matrix_at_scale_n_and_in_additive_mode_always(ffn: FFN, partition: str) -> None:
    for options in ({"scale": EXPERTS}, {"mode": "additive"}, {"mode": "additive", "scale": 2.5}):
        for weight_OI, made in matrices(ffn, partition=partition, **options):
            assert_close(torch.stack(made).mean(0), weight_OI, **CLOSE)
            assert float((made[0] - made[1]).norm()) > 1e-2
    for weight_OI, made in matrices(ffn, partition=partition):  # but not at scale 1
        assert float((torch.stack(made).mean(0) - weight_OI).norm()) > 1e-2


@pytest.mark.parametrize("rank_by", ["count", "energy"])
def test_p5_with_the_whole_spectrum_kept_it_is_sparse_upcycling(ffn: FFN, rank_by: str) -> None:
    x_TD = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mode in ("base_plus_residual", "additive"):
        init = make(ffn, rank_fraction=1.0, mode=mode, rank_by=rank_by)
        for expert in init.experts:
            parts = expert.c_fc.weight, expert.c_fc.bias, expert.c_proj.weight, expert.c_proj.bias
            if rank_by == "count":
                assert all(map(torch.equal, parts, (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)))
                assert all(parameter.requires_grad for parameter in expert.parameters())
        assert_close(moe_layer(init).eval()(x_TD), dense_forward(ffn, x_TD), **CLOSE)


# ---- P6: stage 1 ----------------------------------------------------------------------------------------------------


def test_p6_stage_1_leaves_the_base_to_the_bit_and_the_rank_bounded_and_merging_is_lossless() -> None:
    """By the real training loop: four of six steps, with weight decay, then the merge."""
    strategy = Spri()
    clip = helpers.upcycled(strategy, tiny_clip(), 0)
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    seen = {}

    def next_stage(layers: Mapping[str, Any]) -> None:
        for name, layer in layers.items():
            x_TD = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
            outputs = [expert(x_TD) for expert in layer.experts]
            for number, expert in enumerate(layer.experts):
                for linear, delta in ((expert.base.c_fc, expert.delta1), (expert.base.c_proj, expert.delta2)):
                    # 64 values, 48 kept, 16 for 4 experts
                    difference = delta.added(linear.weight).double() - linear.weight.double()
                    s_M = torch.linalg.svdvals(difference)
                    assert delta.a_OP.shape[1] == 4
                    assert s_M[3] > 1e-3
                    assert s_M[4] < 1e-5 * s_M[0]  # rounding to float32
                for key, value in expert.state_dict().items():
                    frozen = key.startswith("base.")
                    assert (
                        torch.equal(value, before[f"{layer.place.mlp_path}.{layer.state_key(number, key)}"]) == frozen
                    ), key
            strategy.next_stage({name: layer})
            for expert, output in zip(layer.experts, outputs, strict=True):
                assert_close(expert(x_TD), output, rtol=1e-4, atol=1e-5)
            seen[name] = [p.detach().clone() for p in layer.experts.parameters() if p.ndim == 2]

    with session.open_session(threads=1):
        pairs = PairDataset(load_world("digits", 0).train_shards, create_clip("smoke-vit"))
        train(clip, pairs, job(), stages=strategy.stages(8), next_stage=next_stage)
    assert list(seen) == ["vision.1", "vision.3", "text.1"]
    for name, layer in moe_layers(clip.model).items():  # stage 2 trains all; a bias without tokens may stay
        assert not any(map(torch.equal, seen[name], [p for p in layer.experts.parameters() if p.ndim == 2]))
    outside = [key for key in before if ".mlp.moe." not in key and key in clip.model.state_dict()]
    moved = [key for key in outside if not torch.equal(before[key], clip.model.state_dict()[key])]
    assert len(moved) > 0.9 * len([key for key in outside if "attn_mask" not in key])


def test_p6_only_factors_train_in_stage_1(ffn: FFN) -> None:
    for expert in make(ffn).experts:
        trainable = {key for key, parameter in expert.named_parameters() if parameter.requires_grad}
        assert trainable == {f"{part}.{factor}" for part in ("delta1", "delta2") for factor in ("a_OP", "b_PI")}


def test_p6_factors_are_balanced(ffn: FFN) -> None:
    """A = U diag(s)^1/2, B = diag(s)^1/2 V^T: A^T A = B B^T = diag(s)."""
    for weight, name in ((ffn.w1_HD, "delta1"), (ffn.w2_DH, "delta2")):
        tail_M = split(weight, 15)[1]
        for number, expert in enumerate(make(ffn, scale=3.0).experts):
            part = getattr(expert, name)
            expected = (3 * tail_M[number::EXPERTS]).diag()
            assert_close(part.a_OP.detach().T @ part.a_OP.detach(), expected, **CLOSE)
            assert_close(part.b_PI.detach() @ part.b_PI.detach().T, expected, **CLOSE)


def test_stage_2_begins_inside_the_training_or_not_at_all() -> None:
    # (fraction, steps): where stage 2 begins
    expected = {(0.5, 100): (50,), (0.5, 7): (4,), (0.5, 1): (), (0.001, 100): (1,), (0.0, 100): (), (1.0, 100): ()}
    expected[0.999, 9] = ()
    found = {(fraction, steps): tuple(Spri(stage1_fraction=fraction).stages(steps)) for fraction, steps in expected}
    assert found == expected


def test_without_stage_1_experts_are_plain_from_the_start(ffn: FFN) -> None:
    staged, plain = make(ffn), make(ffn, stage1_fraction=0.0)
    for one, other in zip(staged.experts, plain.experts, strict=True):
        assert list(dict(other.named_parameters())) == ["c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"]
        assert helpers.equal(one.merged().state_dict(), other.state_dict())  # type: ignore[operator]


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["w1", "w2"])
def test_one_matrix_may_stay_dense(ffn: FFN, which: str) -> None:
    for name, (weight_OI, made) in zip(("w1", "w2"), matrices(ffn, which=which), strict=True):
        assert all(torch.equal(each, weight_OI) == (name != which) for each in made)
    notes = make(ffn, which=which).notes
    assert {key: int(value) for key, value in notes.items()} == {"w1_components": 0, "w2_components": 0} | {
        f"{which}_components": 5
    }


def test_energy_keeps_the_fewest_components_that_hold_the_share(ffn: FFN) -> None:
    for fraction in (0.0, 0.5, 0.9, 0.99):
        notes = make(ffn, rank_by="energy", rank_fraction=fraction).notes
        for weight_OI, name in ((ffn.w1_HD, "w1"), (ffn.w2_DH, "w2")):
            energy_M = torch.linalg.svdvals(weight_OI).square()
            rank = WIDTH - int(notes[f"{name}_components"])
            assert float(energy_M[:rank].sum() / energy_M.sum()) >= fraction - 1e-12
            assert rank == 0 or float(energy_M[: rank - 1].sum() / energy_M.sum()) < fraction


def test_more_experts_than_components_leave_some_with_the_base(ffn: FFN) -> None:
    init = make(ffn, num_experts=8)  # 5 components
    assert [len(expert.delta1.b_PI) for expert in init.experts] == [1] * 5 + [0] * 3  # type: ignore[union-attr]
    x_TD = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for expert in init.experts:
        assert_close(expert(x_TD), expert.merged()(x_TD), **CLOSE)  # type: ignore[operator]


def test_biases_are_copied(ffn: FFN) -> None:
    for expert in make(ffn).experts:
        plain: Any = expert.merged()  # type: ignore[operator]
        assert torch.equal(plain.c_fc.bias, ffn.b1_H)
        assert torch.equal(plain.c_proj.bias, ffn.b2_D)


def test_it_says_that_it_is_reconstructed() -> None:
    assert Spri.info.status == "reconstructed"
    assert Spri.info.summary.startswith("SPRI (reconstructed)")


# ---- The transcription ----------------------------------------------------------------------------------------------


def test_transcription_by_hand() -> None:
    # diag(4, 3, 2, 1): half of the values kept; expert 0 gets the 2, expert 1 the 1.
    w = np.diag([4.0, 3.0, 2.0, 1.0])
    made = literal.experts(w, num_experts=2, fraction=0.5)
    np.testing.assert_allclose(made, [np.diag([4.0, 3, 2, 0]), np.diag([4.0, 3, 0, 1])], atol=1e-15)
    # Additive, scale 1: R_e less half of the tail: +1 -1/2 and -1 +1/2.
    made = literal.experts(w, num_experts=2, fraction=0.5, mode="additive")
    np.testing.assert_allclose(made, [np.diag([4.0, 3, 3, 0.5]), np.diag([4.0, 3, 1, 1.5])], atol=1e-15)
    # Energies 16, 9, 4, 1 of 30: 25 / 30 = 0.83 are two, 0.84 are three.
    s = np.array([4.0, 3.0, 2.0, 1.0])
    assert [literal.kept(s, fraction, "energy") for fraction in (0, 0.5, 0.83, 0.84, 1)] == [0, 1, 2, 3, 4]
    assert literal.groups([3, 4, 5, 6, 7], 2, "interleaved", []) == [[3, 5, 7], [4, 6]]
    assert literal.groups([3, 4, 5, 6, 7], 2, "contiguous", []) == [[3, 4, 5], [6, 7]]
    assert literal.groups([3, 4, 5, 6, 7], 2, "random", [4, 0, 2, 1, 3]) == [[7, 3, 5], [4, 6]]


@PARTITIONS
def test_fast_strategy_equals_the_literal_one(partition: str) -> None:
    modes, ranks = ("base_plus_residual", "additive"), (("count", 0.45), ("energy", 0.8))
    for mode, rank, dtype in itertools.product(modes, ranks, (torch.float64, torch.float32)):
        compare(partition, mode, *rank, dtype)


def compare(partition: str, mode: str, rank_by: str, fraction: float, dtype: torch.dtype) -> None:
    ffn = random_ffn(13, 9, dtype=dtype)
    tolerance = CLOSE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    options = {"partition": partition, "mode": mode, "scale": 1.7}
    made = matrices(ffn, rank_by=rank_by, rank_fraction=fraction, num_experts=3, **options)
    for name, (weight_OI, experts) in zip(("w1", "w2"), made, strict=True):
        w = weight_OI.double().numpy()
        count = 9 - literal.kept(np.linalg.svd(w, compute_uv=False), fraction, rank_by)
        assert count not in (0, 9)
        order = torch.randperm(count, generator=Stream(("test", 0)).child(name).generator()).tolist()
        expected = literal.experts(w, num_experts=3, fraction=fraction, by=rank_by, order=order, **options)
        for ours, theirs in zip(experts, expected, strict=True):
            assert ours.dtype == dtype
            assert_close(ours.double(), torch.from_numpy(theirs), **tolerance)
