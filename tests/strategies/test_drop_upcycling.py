"""Drop-Upcycling: its invariants D1 to D6 (headings below), its edges and its options.

Statistical bounds are five standard deviations for the sample's size. No two biases of `random_ffn` are equal, so b1,
where it is kept, tells which dense neuron stands at which place.

Shape suffixes: S re-initialised neurons.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.helpers import dense_forward, moe_layer, random_ffn
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.rng import Stream

DropUpcycling = load_registry().strategies["drop-upcycling"].target
BOTH = pytest.mark.parametrize("shared_indices", [True, False])
RATIOS = pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
HIDDEN, WIDTH = 256, 64
SIGMAS = 5


def make(ffn: FFN, num_experts: int = 4, seed: int = 0, **options: Any) -> LayerInit:
    layer = Layer("vision", 1, 2, num_experts, 2)
    return DropUpcycling(**options).init_layer(ffn, layer, None, Stream(("test", seed)))


def weights(expert: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w1_HD, b1_H, w2_DH, b2_D."""
    parts = expert.c_fc.weight, expert.c_fc.bias, expert.c_proj.weight, expert.c_proj.bias
    return tuple(part.detach() for part in parts)  # type: ignore[return-value]


def origin(expert: nn.Module, ffn: FFN) -> Tensor:
    """Which dense neuron [H] stands at each place of an expert that kept its biases."""
    match_HH = weights(expert)[1][:, None] == ffn.b1_H
    assert (match_HH.sum(1) == 1).all() and (match_HH.sum(0) == 1).all()
    return match_HH.int().argmax(1)


def redrawn(expert: nn.Module, ffn: FFN) -> tuple[Tensor, Tensor]:
    """Which dense neurons [H] lost their row of W1, and which their column of W2; partly changed ones fail."""
    w1_HD, _, w2_DH, _ = weights(expert)
    place_H = origin(expert, ffn).argsort()
    changed = (w1_HD[place_H] != ffn.w1_HD), (w2_DH[:, place_H] != ffn.w2_DH).T
    assert all(torch.equal(entries.any(1), entries.all(1)) for entries in changed)
    return changed[0].any(1), changed[1].any(1)


def overlap_bound(hidden: int, count: int, other: int, samples: int) -> tuple[float, float]:
    """Mean size of the overlap of two random subsets (hypergeometric), and its deviation's bound over `samples`."""
    mean = count * other / hidden
    variance = mean * (1 - count / hidden) * (hidden - other) / (hidden - 1)
    return mean, SIGMAS * math.sqrt(variance / samples)


# ---- D1: nothing re-initialised -------------------------------------------------------------------------------------


@BOTH
def test_d1_without_new_neurons_it_is_sparse_upcycling(shared_indices: bool) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    x_TD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ratio, bias in itertools.product([0.0, 0.9 / HIDDEN], ["keep", "reinit", "zero"]):  # int(0.9) neurons
        init = make(ffn, ratio=ratio, bias=bias, shared_indices=shared_indices)
        assert init.notes == {"reinitialised_neurons": 0}
        for expert in init.experts:
            order_H = origin(expert, ffn)
            expected = ffn.w1_HD[order_H], ffn.b1_H[order_H], ffn.w2_DH[:, order_H], ffn.b2_D
            assert all(map(torch.equal, weights(expert), expected))
            assert torch.equal(order_H, torch.arange(HIDDEN)) == shared_indices
        assert_close(moe_layer(init).eval()(x_TD), dense_forward(ffn, x_TD), rtol=1e-10, atol=1e-12)


# ---- D2: the rest is the dense FFN ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shared_indices"), [(torch.float32, True), (torch.float64, False)])
def test_d2_outside_the_index_sets_every_bit_is_dense(dtype: torch.dtype, shared_indices: bool) -> None:
    ffn = random_ffn(HIDDEN, WIDTH, dtype=dtype)
    before = [tensor.clone() for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)]
    init = make(ffn, ratio=0.3, shared_indices=shared_indices)
    orders = []
    for expert in init.experts:
        assert {part.dtype for part in weights(expert)} == {dtype}
        assert torch.equal(weights(expert)[3], ffn.b2_D)
        for changed_H in redrawn(expert, ffn):
            assert int(changed_H.sum()) == 76  # floor(0.3 * 256)
        orders.append(tuple(origin(expert, ffn).tolist()))
    assert len(set(orders)) == (1 if shared_indices else 4)
    assert all(map(torch.equal, before, (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)))


# ---- D3: what the new numbers are -----------------------------------------------------------------------------------


def uneven_ffn() -> FFN:
    """Means far from 0, other scales for W1 and W2, and rows of W1 (columns of W2) of very different lengths."""
    ffn = random_ffn(HIDDEN, WIDTH)
    scale_H = torch.linspace(0.1, 3, HIDDEN, dtype=torch.float64)
    return replace(ffn, w1_HD=ffn.w1_HD * scale_H[:, None] + 0.2, w2_DH=0.1 * ffn.w2_DH * scale_H - 0.05)


@pytest.mark.parametrize(("ratio", "shared_indices"), [(0.1, True), (0.1, False), (0.5, True), (1.0, False)])
def test_d3_new_numbers_are_normal_with_the_moments_of_the_block_they_replace(
    ratio: float, shared_indices: bool
) -> None:
    ffn = uneven_ffn()
    for expert in make(ffn, ratio=ratio, shared_indices=shared_indices).experts:
        w1_HD, _, w2_DH, _ = weights(expert)
        place_H = origin(expert, ffn).argsort()
        first_H, second_H = redrawn(expert, ffn)
        blocks = (
            (w1_HD[place_H][first_H], ffn.w1_HD[first_H]),
            (w2_DH.T[place_H][second_H], ffn.w2_DH.T[second_H]),
        )
        for new_SD, dense_SD in blocks:
            count = new_SD.numel()
            assert count == int(ratio * HIDDEN) * WIDTH
            z_SD = (new_SD - dense_SD.mean()) / dense_SD.std()
            assert abs(float(z_SD.mean())) < SIGMAS / math.sqrt(count)
            assert abs(float(z_SD.std()) - 1) < SIGMAS / math.sqrt(2 * count)
            # Normal: 68.27 % within one standard deviation, and a kurtosis of 3 (its variance is 96 / n).
            inside = float((z_SD.abs() < 1).double().mean())
            assert abs(inside - 0.6827) < SIGMAS * math.sqrt(0.6827 * 0.3173 / count)
            assert abs(float(z_SD.pow(4).mean()) - 3) < SIGMAS * math.sqrt(96 / count)
            # One scalar for the whole block: neurons that were short are as long as any. For D normal numbers the
            # mean square has the variance 2 / D; a chi-square tail is longer than a normal one, hence 7.
            assert float((z_SD.square().mean(1) - 1).abs().max()) < 7 * math.sqrt(2 / WIDTH)
            assert float(dense_SD.std(1).min() / dense_SD.std()) < 0.5
            # Nothing of the old numbers is left.
            correlation = torch.corrcoef(torch.stack([new_SD.flatten(), dense_SD.flatten()]))[0, 1]
            assert abs(float(correlation)) < SIGMAS / math.sqrt(count)


def test_d3_statistics_are_float64_whatever_the_dtype() -> None:
    narrow = random_ffn(HIDDEN, WIDTH, dtype=torch.float32)
    narrow = replace(narrow, w1_HD=narrow.w1_HD + 100)  # float32 sums would lose the standard deviation's digits
    wide = FFN(narrow.w1_HD.double(), narrow.b1_H.double(), narrow.w2_DH.double(), narrow.b2_D.double(), narrow.act)
    for ours, theirs in zip(make(narrow).experts, make(wide).experts, strict=True):
        assert all(torch.equal(a, b.float()) for a, b in zip(weights(ours), weights(theirs), strict=True))


# ---- D4: shared index set -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 1.0])
def test_d4_an_expert_is_its_kept_dense_neurons_and_its_new_ones(ratio: float) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    x_TD = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dense_TH = ffn.act(x_TD @ ffn.w1_HD.T + ffn.b1_H)
    init = make(ffn, ratio=ratio)
    assert init.notes == {"reinitialised_neurons": int(ratio * HIDDEN)}
    for expert in init.experts:
        first_H, second_H = redrawn(expert, ffn)
        assert torch.equal(first_H, second_H)
        assert int(first_H.sum()) == math.floor(ratio * HIDDEN)
        kept_TD = dense_TH[:, ~first_H] @ ffn.w2_DH[:, ~first_H].T
        w1_HD, b1_H, w2_DH, _ = weights(expert)
        new_TS = ffn.act(x_TD @ w1_HD[first_H].T + b1_H[first_H])
        assert_close(expert(x_TD).detach(), kept_TD + new_TS @ w2_DH[:, first_H].T + ffn.b2_D, rtol=1e-10, atol=1e-12)


# ---- D5: an index set for each matrix -------------------------------------------------------------------------------


@RATIOS
def test_d5_independent_sets_meet_by_chance(ratio: float) -> None:
    hidden, experts = 1024, 16
    ffn = random_ffn(hidden, 4)
    count = int(ratio * hidden)
    sets = [redrawn(expert, ffn) for expert in make(ffn, experts, ratio=ratio, shared_indices=False).experts]
    both = sum(int((first_H & second_H).sum()) for first_H, second_H in sets) / experts
    mean, bound = overlap_bound(hidden, count, count, experts)
    assert mean == pytest.approx(ratio**2 * hidden)
    assert abs(both - mean) < bound
    # Untouched in both: H - 2 |S| + |overlap|, so (1 - r)^2 of them with the same deviation; (1 - r) if shared.
    untouched = sum(int((~first_H & ~second_H).sum()) for first_H, second_H in sets) / experts
    assert abs(untouched - (1 - ratio) ** 2 * hidden) < bound
    for expert in make(ffn, experts, ratio=ratio).experts:
        first_H, second_H = redrawn(expert, ffn)
        assert int((~first_H & ~second_H).sum()) == hidden - count


# ---- D6: two experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "shared_indices"), [(0.25, True), (0.5, False), (0.75, True), (0.75, False)])
def test_d6_two_experts_keep_a_neuron_together_by_chance(ratio: float, shared_indices: bool) -> None:
    hidden, experts = 1024, 8
    ffn = random_ffn(hidden, 4)
    count = int(ratio * hidden)
    made = make(ffn, experts, ratio=ratio, shared_indices=shared_indices).experts
    pairs = list(itertools.combinations([redrawn(expert, ffn) for expert in made], 2))
    # Overlaps of different pairs are uncorrelated: a random set meets any given one equally often on average.
    mean, bound = overlap_bound(hidden, hidden - count, hidden - count, len(pairs))
    assert mean == pytest.approx((1 - ratio) ** 2 * hidden)
    for matrix in (0, 1):
        kept = [int((~one[matrix] & ~other[matrix]).sum()) for one, other in pairs]
        assert abs(sum(kept) / len(kept) - mean) < bound


def test_d6_new_numbers_of_two_experts_are_unrelated() -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    for name in ("c_fc", "c_proj"):
        drawn = [getattr(expert, name).weight.detach().flatten() for expert in make(ffn, 4, ratio=1.0).experts]
        for one, other in itertools.combinations(drawn, 2):
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < SIGMAS / math.sqrt(len(one))


@BOTH
def test_an_expert_does_not_depend_on_how_many_there_are(shared_indices: bool) -> None:
    ffn = random_ffn(32, 8)
    few, many = (make(ffn, number, shared_indices=shared_indices).experts for number in (2, 6))
    for one, other in zip(few, many[:2], strict=True):
        assert all(map(torch.equal, weights(one), weights(other)))


# ---- Biases ---------------------------------------------------------------------------------------------------------


@BOTH
def test_first_biases_go_with_the_rows_of_w1(shared_indices: bool) -> None:
    ffn = random_ffn(4096, 2)
    ffn = replace(ffn, b1_H=ffn.b1_H + 3)
    kept, new, zero = (
        make(ffn, ratio=0.25, bias=bias, shared_indices=shared_indices).experts for bias in ("keep", "reinit", "zero")
    )
    for plain, reinit, zeroed in zip(kept, new, zero, strict=True):
        b1_H = weights(plain)[1]
        changed_H = redrawn(plain, ffn)[0][origin(plain, ffn)]  # by place
        assert torch.equal(weights(zeroed)[1], torch.where(changed_H, torch.zeros_like(b1_H), b1_H))
        assert torch.equal(weights(reinit)[1] != b1_H, changed_H)
        z_S = (weights(reinit)[1][changed_H] - b1_H[changed_H].mean()) / b1_H[changed_H].std()
        assert len(z_S) == 1024
        assert abs(float(z_S.mean())) < SIGMAS / math.sqrt(1024)
        assert abs(float(z_S.std()) - 1) < SIGMAS / math.sqrt(2 * 1024)
        for other in (reinit, zeroed):  # the option changes nothing else
            assert all(torch.equal(weights(plain)[part], weights(other)[part]) for part in (0, 2, 3))


@BOTH
def test_a_single_bias_has_no_spread_and_stays(shared_indices: bool) -> None:
    ffn = random_ffn(8, 4)
    for expert in make(ffn, ratio=0.125, bias="reinit", shared_indices=shared_indices).experts:
        assert [int(changed_H.sum()) for changed_H in redrawn(expert, ffn)] == [1, 1]  # `origin` finds every bias


# ---- Options --------------------------------------------------------------------------------------------------------


@BOTH
def test_ratio_one_redraws_both_matrices_whole(shared_indices: bool) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    for expert in make(ffn, ratio=1.0, shared_indices=shared_indices).experts:
        assert all(changed_H.all() for changed_H in redrawn(expert, ffn))
        assert torch.equal(weights(expert)[3], ffn.b2_D)
