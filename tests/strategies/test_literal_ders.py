"""The transcription of DeRS: numbers worked by hand, and the fast strategies and compression agree with it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.helpers import random_ffn
from tests.literal import ders as literal
from upcycle_bench.model.compress import Quantise, Sparsify
from upcycle_bench.model.ffn import Layer
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.rng import Stream

STRATEGIES = {name: entry.target for name, entry in load_registry().strategies.items()}


def test_by_hand() -> None:
    shared = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    # up (2, 3)^T times down (10, 20, 30): 20 40 60 / 30 60 90.
    made = literal.low_rank(shared, torch.tensor([[10.0, 20.0, 30.0]]), torch.tensor([[2.0], [3.0]]))
    assert made.tolist() == [[21, 42, 63], [34, 65, 96]]
    # Place 1 is row 0, column 1; place 5 is row 1, column 2.
    assert literal.sparse(shared, [1, 5], torch.tensor([7.0, -1.0])).tolist() == [[1, 9, 3], [4, 5, 5]]
    # Differences 3 and -2; the second is dropped, the first doubled.
    assert literal.dare([[1.0, 1.0]], [[4.0, -1.0]], [[False, True]], 0.5) == [[7.0, 1.0]]
    # Two bits, step 1: -3, -1, 1, 3.
    assert literal.nearest([[0.0] * 4], [[9.0, 1.9, 0.1, -2.1]], 1.0, 2) == [[3, 1, 1, -3]]


@pytest.mark.parametrize("bias_deltas", [False, True])
@pytest.mark.parametrize(("name", "options"), [("ders-lm", {"rank": 2}), ("ders-sm", {"rate": 0.8})])
def test_fast_experts_equal_the_literal_ones(name: str, options: dict[str, Any], bias_deltas: bool) -> None:
    """Outputs, merged weights, and the gradients of everything that trains and of the input."""
    ffn = random_ffn(9, 5)
    strategy = STRATEGIES[name](bias_deltas=bias_deltas, **options)
    experts: list[Any] = strategy.init_layer(ffn, Layer("vision", 1, 2, 2, 2), None, Stream(("test", 0))).experts
    generator = torch.Generator().manual_seed(0)
    for expert in experts:
        with torch.no_grad():  # as training would leave it
            for parameter in expert.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        expert.zero_grad()
        own = {key: value.detach().clone().requires_grad_() for key, value in expert.named_parameters()}
        matrices = []
        for matrix, delta in (("base.c_fc.weight", "delta1"), ("base.c_proj.weight", "delta2")):
            if name == "ders-lm":
                matrices.append(literal.low_rank(own[matrix], own[f"{delta}.b_PI"], own[f"{delta}.a_OP"]))
            else:
                places = getattr(expert, delta).place_S.tolist()
                matrices.append(literal.sparse(own[matrix], places, own[f"{delta}.value_S"]))
        b1_H, b2_D = own["base.c_fc.bias"], own["base.c_proj.bias"]
        if bias_deltas:
            b1_H, b2_D = b1_H + own["bias1_H"], b2_D + own["bias2_D"]
        x_TD, cotangent_TD = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
        x_TD.requires_grad_()
        fast_x_TD = x_TD.detach().clone().requires_grad_()
        y_TD = literal.forward(x_TD, matrices[0], b1_H, matrices[1], b2_D, ffn.act)
        fast_y_TD = expert(fast_x_TD)
        y_TD.backward(cotangent_TD)
        fast_y_TD.backward(cotangent_TD)
        plain = expert.merged()
        pairs = [(fast_y_TD, y_TD), (fast_x_TD.grad, x_TD.grad)]
        pairs += [(plain.c_fc.weight, matrices[0]), (plain.c_proj.weight, matrices[1])]
        pairs += [(plain.c_fc.bias, b1_H), (plain.c_proj.bias, b2_D)]
        pairs += [(parameter.grad, own[key].grad) for key, parameter in expert.named_parameters()]
        assert len(pairs) == 6 + len(own)
        for ours, theirs in pairs:
            assert_close(ours.detach(), theirs.detach(), rtol=1e-11, atol=1e-12)


def test_compression_equals_the_literal_one() -> None:
    generator = np.random.default_rng(0)
    base, delta = generator.normal(size=(2, 6, 7))
    stream = Stream(("test", 1))
    dropped = (torch.rand(6, 7, generator=stream.generator(), dtype=torch.float64) < 0.6).tolist()
    expected = literal.dare(base.tolist(), (base + delta).tolist(), dropped, 0.6)
    np.testing.assert_allclose(base + Sparsify(0.6).apply(delta, stream), expected, rtol=1e-12, atol=1e-14)
    for bits in (1, 2, 3):
        cheap = Quantise(bits).apply(delta, stream)
        step = float(np.abs(cheap).min())  # the innermost levels are +- step
        expected = literal.nearest(base.tolist(), (base + delta).tolist(), step, bits)
        np.testing.assert_allclose(base + cheap, expected, rtol=1e-12, atol=1e-12)
