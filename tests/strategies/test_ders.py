"""DeRS: its invariants R1 to R5 (headings below) and its options; R6, compression, is in test_compress.

Shape suffixes: S sparse places, P rank.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import dense_forward, moe_layer, random_ffn
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

STRATEGIES = {name: entry.target for name, entry in load_registry().strategies.items() if name.startswith("ders")}
BOTH = pytest.mark.parametrize("name", ["ders-lm", "ders-sm"])
BIASES = pytest.mark.parametrize("bias_deltas", [False, True])
HIDDEN, WIDTH = 32, 12


def make(name: str, ffn: FFN | None = None, num_experts: int = 4, **options: Any) -> LayerInit:
    options = ({"rate": 0.9} if name == "ders-sm" else {}) | options
    layer = Layer("vision", 1, 2, num_experts, 2)
    return STRATEGIES[name](**options).init_layer(ffn or random_ffn(HIDDEN, WIDTH), layer, None, Stream(("test", 0)))


def tokens(count: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(init: LayerInit, steps: int = 5) -> list[Any]:
    """The experts after some steps of AdamW on tokens of their own, far from where they began."""
    experts: list[Any] = list(init.experts)
    parameters = {id(p): p for expert in experts for p in expert.parameters()}.values()
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.2)
    for step in range(steps):
        optimizer.zero_grad()
        loss = sum(expert(tokens(seed=10 * step + i)).sin().sum() for i, expert in enumerate(experts))
        loss.backward()
        optimizer.step()
    return experts


# ---- R1: the dense FFN at first -------------------------------------------------------------------------------------


@BOTH
def test_r1_every_weight_is_the_dense_one_to_the_bit(name: str) -> None:
    for dtype, bias_deltas in itertools.product([torch.float32, torch.float64], [False, True]):
        ffn = random_ffn(HIDDEN, WIDTH, dtype=dtype)
        init = make(name, ffn, bias_deltas=bias_deltas)
        for expert in init.experts:
            plain: Any = expert.merged()  # type: ignore[operator]
            for ours in (plain, expert.base):
                parts = ours.c_fc.weight, ours.c_fc.bias, ours.c_proj.weight, ours.c_proj.bias
                assert all(map(torch.equal, parts, (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)))
        x_TD = tokens().to(dtype)
        assert_close(moe_layer(init).eval()(x_TD), dense_forward(ffn, x_TD))


# ---- R2: what moves first -------------------------------------------------------------------------------------------


@BOTH
def test_r2_at_step_0_only_the_zero_factor_and_the_base_have_gradients(name: str) -> None:
    for expert in [*make(name).experts, *make(name, bias_deltas=True).experts]:
        expert(tokens()).sin().sum().backward()
        for key, parameter in expert.named_parameters():
            assert parameter.grad is not None, key
            assert bool(parameter.grad.any()) == (not key.endswith("b_PI")), key


@BOTH
def test_r2_the_gradient_of_the_base_is_the_sum_over_experts(name: str) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    experts = trained(make(name, ffn, bias_deltas=True))  # no longer equal
    batches = [tokens(20 + i, seed=i) for i in range(4)]
    separate: dict[str, Tensor] = {}
    for expert, x_TD in zip(experts, batches, strict=True):
        plain = expert.merged()
        plain(x_TD).sin().sum().backward()
        for key, parameter in plain.named_parameters():
            separate[key] = separate.get(key, torch.zeros(())) + parameter.grad
    base = experts[0].base
    base.zero_grad()
    torch.stack([expert(x_TD).sin().sum() for expert, x_TD in zip(experts, batches, strict=True)]).sum().backward()
    for key, parameter in base.named_parameters():
        assert_close(parameter.grad, separate[key], rtol=1e-10, atol=1e-12)


# ---- R3: sparse places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.99])
def test_r3_places_are_unique_in_range_counted_and_not_trained(rate: float) -> None:
    init = make("ders-sm", rate=rate)
    count = round(HIDDEN * WIDTH * (1 - rate))
    assert init.notes == {"delta_values": count}
    seen = set()
    for expert in init.experts:
        assert not [key for key, _ in expert.named_parameters() if "place" in key]
        for delta in (expert.delta1, expert.delta2):
            place_S: Any = delta.place_S
            assert len(place_S) == len(delta.value_S) == len(set(place_S.tolist())) == count
            assert int(place_S.min()) >= 0 and int(place_S.max()) < HIDDEN * WIDTH
            seen.add(tuple(place_S.tolist()))
    assert len(seen) == (1 if rate == 0 else 8)  # each expert and matrix has its own


def test_r3_places_are_uniform() -> None:
    """Half of 384 entries, 2 x 40 draws: each entry is chosen 40 times +- sqrt(20), six deviations."""
    chosen = torch.zeros(HIDDEN * WIDTH)
    for expert in make("ders-sm", num_experts=40, rate=0.5).experts:
        for delta in (expert.delta1, expert.delta2):
            chosen[delta.place_S] += 1  # type: ignore[index]
    assert (chosen - 40).abs().max() < 6 * math.sqrt(20)


def test_r3_other_entries_stay_zero_in_training() -> None:
    for expert in trained(make("ders-sm")):
        plain = expert.merged()
        for ours, base, delta in (
            (plain.c_fc, expert.base.c_fc, expert.delta1),
            (plain.c_proj, expert.base.c_proj, expert.delta2),
        ):
            moved = (ours.weight != base.weight).flatten().nonzero().squeeze(1)
            assert torch.equal(moved, delta.place_S)  # all of them have learnt something


# ---- R4: rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_r4_the_difference_to_the_base_has_rank_r_after_training(rank: int) -> None:
    experts = trained(make("ders-lm", rank=rank))
    for expert in experts:
        plain = expert.merged()
        for ours, base in ((plain.c_fc, expert.base.c_fc), (plain.c_proj, expert.base.c_proj)):
            s_P = torch.linalg.svdvals(ours.weight.detach() - base.weight.detach())
            assert s_P[rank - 1] > 1e-3
            assert s_P[rank] < 1e-12
    assert not torch.equal(experts[0].merged().c_fc.weight, experts[1].merged().c_fc.weight)


# ---- R5: how many parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "per_matrix"), [
    ("ders-lm", {"rank": 3}, 3 * (HIDDEN + WIDTH)),
    ("ders-sm", {"rate": 0.75}, HIDDEN * WIDTH // 4),
])  # fmt: skip
def test_r5_parameter_formulas(name: str, options: dict[str, Any], per_matrix: int) -> None:
    biases = HIDDEN + WIDTH
    for bias_deltas in (False, True):
        layer = moe_layer(make(name, bias_deltas=bias_deltas, **options))
        expected = 2 * (HIDDEN * WIDTH + 4 * per_matrix) + biases + 4 * biases * bias_deltas
        assert sum(p.numel() for p in layer.experts.parameters()) == expected


# ---- Forward, options -----------------------------------------------------------------------------------------------


@BOTH
@BIASES
def test_after_training_merged_experts_compute_the_same(name: str, bias_deltas: bool) -> None:
    outputs = []
    for expert in trained(make(name, bias_deltas=bias_deltas)):
        outputs.append(expert(tokens()))
        assert_close(expert.merged()(tokens()), outputs[-1], rtol=1e-10, atol=1e-12)
    assert float((outputs[0] - outputs[1]).detach().norm()) > 1e-2


def test_the_random_factor_is_kaiming_uniform() -> None:
    """U(-1/sqrt I, 1/sqrt I), std 1/sqrt(3 I); 4 x 12 x 32 numbers, five deviations of the mean and of the variance."""
    init = make("ders-lm", rank=12)
    for name, inputs in (("delta1", WIDTH), ("delta2", HIDDEN)):
        drawn = torch.cat([getattr(expert, name).b_PI.detach().flatten() for expert in init.experts])
        unit = drawn * math.sqrt(inputs)
        assert unit.abs().max() <= 1
        assert abs(float(unit.mean())) < 5 / math.sqrt(3 * len(unit))
        assert abs(float(unit.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / len(unit))
        assert len(set(drawn.tolist())) == len(drawn)  # no two experts share a draw


@BOTH
def test_an_expert_does_not_depend_on_how_many_there_are(name: str) -> None:
    few, many = (make(name, num_experts=number).experts for number in (2, 5))
    for one, other in zip(few, many[:2], strict=True):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_what_leaves_nothing_to_train_or_exceeds_full_rank_is_one_line() -> None:
    with pytest.raises(UserError, match=r"rate 0\.999 leaves no entry of a 32 x 12 matrix"):
        make("ders-sm", rate=0.999)
    with pytest.raises(UserError, match=r"rank 13 exceeds the full rank of a 32 x 12 matrix; lower it"):
        make("ders-lm", rank=13)
    assert make("ders-lm", rank=12).experts
