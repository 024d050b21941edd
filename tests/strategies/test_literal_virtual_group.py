"""The transcription of virtual-group upcycling: numbers worked by hand, and the fast strategy and layer agree with it.

Shape suffixes: V copies, S hidden neurons of a shard.
"""

import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import moe_layer, random_ffn, tiny_moe
from tests.literal import virtual_group as literal
from upcycle_bench.model.ffn import Layer
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import random_router
from upcycle_bench.util.rng import Stream

VirtualGroup = load_registry().strategies["virtual-group"].target
STREAM = Stream(("test", 0))


def test_shards_and_router_by_hand() -> None:
    # Two neurons, G = 2: shard 0 is the first, shard 1 the second; W2 doubles (exact), or both grow by sqrt 2.
    dense = (
        torch.tensor([[1.0, 3.0], [10.0, 20.0]]).double(),
        torch.tensor([2.0, 30.0]).double(),
        torch.tensor([[1.0, 40.0], [3.0, 50.0]]).double(),
        torch.tensor([8.0, 9.0]).double(),
    )
    experts, router_ED = literal.upcycle(dense, torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]), 2)
    assert router_ED.tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert [part.tolist() for part in experts[0]] == [[[1, 3]], [2], [[2], [6]], [8, 9]]
    assert [part.tolist() for part in experts[1]] == [[[10, 20]], [30], [[80], [100]], [8, 9]]
    assert all(
        torch.equal(a, b) for number in (0, 1) for a, b in zip(experts[number], experts[number + 2], strict=True)
    )
    half = literal.shard(dense, 2, 1, "megatron")
    root = 2**0.5
    assert_close(half[0], torch.tensor([[10 * root, 20 * root]]).double())
    assert_close(half[1], torch.tensor([30 * root]).double())
    assert_close(half[2], torch.tensor([[40 * root], [50 * root]]).double())
    # x = (1, 0), all gates 1/4 (k = 4 of 4): 2 / 4 * (y0 + y1) + b2 with y0 = relu(1 + 2) (2, 6) and
    # y1 = relu(10 + 30) (80, 100), which is W2 relu(W1 x + b1) + b2 = 3 (1, 3) + 40 (40, 50) + (8, 9) = (1611, 2018).
    # f = 1/4 each: l_aux = 1.
    x_TD = torch.tensor([[1.0, 0.0]]).double()
    y_TD, l_aux, chosen_T = literal.forward(x_TD, torch.zeros(4, 2).double(), experts, torch.relu, 4)
    assert_close(y_TD, torch.tensor([[1611.0, 2018.0]]).double())
    assert (float(l_aux), chosen_T) == (pytest.approx(1, abs=1e-12), [[0, 1, 2, 3]])


@pytest.mark.parametrize(("granularity", "top_k"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_fast_strategy_and_layer_equal_the_literal_ones(granularity: int, top_k: int) -> None:
    """Weights and router to the bit; outputs, load-balancing loss, and the gradients of weights, router and input."""
    for scaling, dtype in itertools.product(["exact", "megatron"], [torch.float64, torch.float32]):
        compare(granularity, top_k, scaling, dtype)


def compare(granularity: int, top_k: int, scaling: str, dtype: torch.dtype) -> None:
    strategy = VirtualGroup(granularity=granularity, scaling=scaling)
    moe = strategy.moe_settings(tiny_moe(experts=3, top_k=top_k))
    ffn = random_ffn(24, 7, dtype=dtype)
    layer = Layer("vision", 1, 2, moe.experts, moe.top_k)
    init = strategy.init_layer(ffn, layer, None, STREAM)
    dense = (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)
    made, rows_ED = literal.upcycle(dense, random_router(ffn, layer, STREAM), granularity, scaling)
    assert torch.equal(init.router_ED, rows_ED)
    assert len(init.experts) == len(made) == moe.experts
    for fast, slow in zip(init.experts, made, strict=True):
        parts = fast.c_fc.weight, fast.c_fc.bias, fast.c_proj.weight, fast.c_proj.bias
        assert all(map(torch.equal, parts, slow))

    experts = [tuple(part.double().requires_grad_() for part in expert) for expert in made]
    router_ED = rows_ED.double().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    x_TD, cotangent_TD = torch.randn(2, 30, 7, generator=generator, dtype=torch.float64)
    fast_x_TD, x_TD = x_TD.to(dtype).requires_grad_(), x_TD.requires_grad_()
    y_TD, l_aux, _ = literal.forward(x_TD, router_ED, experts, ffn.act, moe.top_k)
    # Evaluation, where capacity is unlimited; its routes are those of training without drops.
    module = moe_layer(init, moe=moe).eval()
    fast_y_TD = module(fast_x_TD)
    balanced = moe.top_k > 2  # DeepSpeed counts first choices for k <= 2
    ((y_TD * cotangent_TD).sum() + l_aux * balanced).backward()
    ((fast_y_TD * cotangent_TD.to(dtype)).sum() + module.l_aux * balanced).backward()
    fast = [module.gate.wg.weight, fast_x_TD]
    slow = [router_ED, x_TD]
    for expert, parts in zip(module.experts, experts, strict=True):
        fast += [expert.c_fc.weight, expert.c_fc.bias, expert.c_proj.weight, expert.c_proj.bias]
        slow += parts
    # l_aux of the gate is always float32, and with it its part in the gradients of router and input.
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    loose = {"rtol": 1e-5, "atol": 1e-6} if balanced and dtype == torch.float64 else tolerance
    assert_close(fast_y_TD.detach().double(), y_TD.detach(), **tolerance)
    if balanced:
        assert_close(module.l_aux.detach().double(), l_aux.detach(), rtol=1e-5, atol=0)
    for number, (ours, theirs) in enumerate(zip(fast, slow, strict=True)):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        actual = torch.zeros_like(ours) if ours.grad is None else ours.grad
        assert_close(actual.double(), expected, **(loose if number < 2 else tolerance))
