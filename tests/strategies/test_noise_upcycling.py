"""Random-noise upcycling, RNU: R1 copies up to order, R2 what is touched, R3 what is added, R4 index sets.

Statistical bounds are five standard deviations for the sample's size.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.helpers import dense_forward, moe_layer, random_ffn
from tests.literal import noise_upcycling as literal
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.rng import Stream

NoiseUpcycling = load_registry().strategies["noise-upcycling"].target
HIDDEN, WIDTH = 256, 64
SIGMAS = 5
STREAM = Stream(("test", 0))


def make(ffn: FFN, num_experts: int = 4, **options: Any) -> LayerInit:
    return NoiseUpcycling(**options).init_layer(ffn, Layer("vision", 1, 2, num_experts, 2), None, STREAM)


def order_of(expert: nn.Module, ffn: FFN) -> Tensor:
    """Which dense neuron [H] stands at each place, by the biases, no two of which are equal."""
    match_HH = expert.c_fc.bias.detach()[:, None] == ffn.b1_H
    assert (match_HH.sum(1) == 1).all() and (match_HH.sum(0) == 1).all()
    return match_HH.int().argmax(1)


def difference(expert: nn.Module, ffn: FFN) -> tuple[Tensor, Tensor]:
    """What was added to W1 [H, D] and to W2's transpose [H, D], in the dense order of neurons."""
    place_H = order_of(expert, ffn).argsort()
    w1_HD, w2_DH = expert.c_fc.weight.detach(), expert.c_proj.weight.detach()
    return w1_HD[place_H] - ffn.w1_HD, w2_DH.T[place_H] - ffn.w2_DH.T


@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"ratio": 0.9 / HIDDEN}, {"std": 0.0}])
def test_r1_without_noise_it_is_sparse_upcycling_in_another_order(options: dict[str, float]) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    init = make(ffn, **options)
    orders = set()
    for expert in init.experts:
        order_H = order_of(expert, ffn)
        orders.add(tuple(order_H.tolist()))
        assert torch.equal(expert.c_fc.weight, ffn.w1_HD[order_H])
        assert torch.equal(expert.c_proj.weight, ffn.w2_DH[:, order_H])
        assert torch.equal(expert.c_proj.bias, ffn.b2_D)
    assert len(orders) == 4
    x_TD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(moe_layer(init).eval()(x_TD), dense_forward(ffn, x_TD), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("ratio", "dtype"), [(0.3, torch.float32), (0.5, torch.float64), (1.0, torch.float32)])
def test_r2_whole_neurons_are_touched_as_many_as_the_ratio_says(ratio: float, dtype: torch.dtype) -> None:
    ffn = random_ffn(HIDDEN, WIDTH, dtype=dtype)
    init = make(ffn, ratio=ratio, std=1.0)  # so much that no sum rounds to what it was
    count = math.floor(ratio * HIDDEN)
    assert init.notes == {"noisy_neurons": count}
    for expert in init.experts:
        assert expert.c_fc.weight.dtype == dtype
        assert torch.equal(expert.c_proj.bias, ffn.b2_D)
        for added_HD in difference(expert, ffn):
            touched_HD = added_HD != 0
            assert int(touched_HD.sum()) == count * WIDTH
            assert torch.equal(touched_HD.any(1), touched_HD.all(1))


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_r3_noise_is_added_and_has_the_given_deviation(std: float) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    drawn = []
    for expert in make(ffn, std=std).experts:
        dense = ffn.w1_HD, ffn.w2_DH.T
        for added_HD, dense_HD in zip(difference(expert, ffn), dense, strict=True):
            touched_H = (added_HD != 0).any(1)
            z = added_HD[touched_H].flatten() / std
            assert abs(float(z.mean())) < SIGMAS / math.sqrt(len(z))
            assert abs(float(z.std()) - 1) < SIGMAS / math.sqrt(2 * len(z))
            assert abs(float(z.pow(4).mean()) - 3) < SIGMAS * math.sqrt(96 / len(z))  # normal
            both = torch.stack([z, dense_HD[touched_H].flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) < SIGMAS / math.sqrt(len(z))  # added, not shrunk
            drawn.append(z)
    for one, other in itertools.combinations(drawn, 2):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < SIGMAS / math.sqrt(len(one))


def test_r4_each_matrix_and_expert_has_an_index_set_of_its_own() -> None:
    hidden, ratio = 1024, 0.5
    ffn = random_ffn(hidden, 4)
    experts = make(ffn, 8, ratio=ratio).experts
    sets = [(added_HD != 0).any(1) for expert in experts for added_HD in difference(expert, ffn)]
    pairs = list(itertools.combinations(sets, 2))
    # Two random halves meet in a quarter; hypergeometric variance r^2 (1 - r)^2 H^2 / (H - 1), pairs uncorrelated.
    bound = SIGMAS * math.sqrt(0.25**2 * hidden**2 / (hidden - 1) / len(pairs))
    meet = sum(int((one & other).sum()) for one, other in pairs) / len(pairs)
    assert abs(meet - 0.25 * hidden) < bound


# ---- The transcription ----------------------------------------------------------------------------------------------


def test_transcription_by_hand() -> None:
    # Places 0, 1, 2 take the neurons 2, 0, 1; W1's place 0 gets 0.5 * (1, 2), W2's place 2 gets 0.5 * (4, 6).
    dense = [[1.0, 3.0], [10.0, 20.0], [5.0, 7.0]], [2.0, 30.0, 6.0], [[1.0, 40.0, 2.0], [3.0, 50.0, 4.0]], [8.0, 9.0]
    w1, b1, w2, b2 = literal.expert(dense, [2, 0, 1], [0], [2], [[1.0, 2.0]], [[4.0], [6.0]], 0.5)
    assert w1 == [[5.5, 8.0], [1.0, 3.0], [10.0, 20.0]]
    assert (b1, b2) == ([6.0, 2.0, 30.0], [8.0, 9.0])
    assert w2 == [[2.0, 1.0, 42.0], [4.0, 3.0, 53.0]]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_fast_strategy_equals_the_literal_one(ratio: float) -> None:
    for dtype in (torch.float64, torch.float32):
        compare(ratio, dtype)


def compare(ratio: float, dtype: torch.dtype) -> None:
    ffn = random_ffn(24, 7, dtype=dtype)
    count = int(ratio * 24)
    dense: Any = tuple(part.double().tolist() for part in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D))
    for number, expert in enumerate(make(ffn, 3, ratio=ratio).experts):
        stream = STREAM.child("expert", number)
        orders = [
            torch.randperm(24, generator=stream.child(*name).generator()).tolist()
            for name in (("permutation",), ("w1", "indices"), ("w2", "indices"))
        ]
        normals = [
            torch.randn(shape, generator=stream.child(matrix, "values").generator(), dtype=torch.float64).tolist()
            for matrix, shape in (("w1", (count, 7)), ("w2", (7, count)))
        ]
        made = literal.expert(dense, orders[0], orders[1][:count], orders[2][:count], *normals, 0.02)
        for ours, theirs in zip(expert.parameters(), made, strict=True):
            assert ours.dtype == dtype
            assert torch.equal(ours, torch.tensor(theirs, dtype=torch.float64).to(dtype))
