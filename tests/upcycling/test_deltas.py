"""Experts of a base and small differences: each way to apply a difference gives the same, rank 0 changes nothing.

The strategies that use them have tests of their own: `test_ders.py`, `test_spri.py` and the transcriptions.
Shape suffixes: O outputs, I inputs, P rank.
"""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import dense_forward, random_ffn
from upcycle_bench.upcycling import draws
from upcycle_bench.upcycling.deltas import DeltaExpert, LowRank
from upcycle_bench.util.rng import Stream

RNG = Stream(("test", 0))
HIDDEN, WIDTH = 12, 6


def low_rank(weight_OI: torch.Tensor, rank: int, name: str) -> LowRank:
    outputs, inputs = weight_OI.shape
    return LowRank(
        weight_OI,
        b_PI=draws.normal((rank, inputs), RNG.child(name, "b")),
        a_OP=draws.normal((outputs, rank), RNG.child(name, "a")),
    )


@pytest.mark.parametrize("bias_deltas", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_merged_expert_computes_the_same(rank: int, bias_deltas: bool) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    deltas = low_rank(ffn.w1_HD, rank, "first"), low_rank(ffn.w2_DH, rank, "second")
    expert: Any = DeltaExpert(ffn.expert(), *deltas, bias_deltas)
    if bias_deltas:
        with torch.no_grad():
            expert.bias1_H += 0.5
            expert.bias2_D -= 0.25
    plain: Any = expert.merged()
    assert_close(plain.c_fc.weight.detach(), ffn.w1_HD + deltas[0].a_OP.detach() @ deltas[0].b_PI.detach())
    assert_close(plain.c_proj.weight.detach(), ffn.w2_DH + deltas[1].a_OP.detach() @ deltas[1].b_PI.detach())
    assert_close(plain.c_fc.bias.detach(), ffn.b1_H + 0.5 * bias_deltas)
    assert_close(plain.c_proj.bias.detach(), ffn.b2_D - 0.25 * bias_deltas)
    x_TD = draws.normal((9, WIDTH), RNG)
    assert_close(expert(x_TD), plain(x_TD), rtol=1e-12, atol=1e-12)
    if rank == 0 and not bias_deltas:
        assert_close(expert(x_TD).detach(), dense_forward(ffn, x_TD), rtol=1e-12, atol=1e-12)
    own = {parameter.data_ptr() for parameter in plain.parameters()}
    assert not own & {parameter.data_ptr() for parameter in expert.parameters()}


def test_the_optimiser_sees_the_factors_in_the_order_given_and_in_the_weights_type() -> None:
    weight_OI = torch.zeros(4, 3)
    a_OP, b_PI = torch.ones(4, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    for names in (["a_OP", "b_PI"], ["b_PI", "a_OP"]):
        delta = LowRank(weight_OI, **{name: {"a_OP": a_OP, "b_PI": b_PI}[name] for name in names})
        assert [name for name, _ in delta.named_parameters()] == names
        assert {parameter.dtype for parameter in delta.parameters()} == {torch.float32}
