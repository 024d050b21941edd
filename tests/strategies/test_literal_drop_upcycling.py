"""The transcription of Drop-Upcycling: numbers worked by hand, and the fast strategy agrees with it for the same draws.

Shape suffixes: S re-initialised neurons.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.helpers import random_ffn
from tests.literal import drop_upcycling as literal
from upcycle_bench.model.ffn import FFN, Layer
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.rng import Stream

DropUpcycling = load_registry().strategies["drop-upcycling"].target
STREAM = Stream(("test", 0))


# ---- By hand --------------------------------------------------------------------------------------------------------

DENSE = (
    np.array([[1.0, 3.0], [10.0, 20.0], [5.0, 7.0]]),
    np.array([2.0, 30.0, 6.0]),
    np.array([[1.0, 40.0, 2.0], [3.0, 50.0, 4.0]]),
    np.array([8.0, 9.0]),
)
ONES, ZEROS = np.ones((2, 2)), np.zeros((2, 2))


def test_paper_version_by_hand() -> None:
    # S = {0, 2}. W1: 1, 3, 5, 7, mean 4, squared deviations 9 + 1 + 1 + 9 = 20, std sqrt(20 / 3).
    # W2: 1, 2, 3, 4, mean 2.5, squared deviations 5, std sqrt(5 / 3). All z are 1, or for W2's second row 0.
    w1_HD, b1_H, w2_DH, b2_D = literal.paper_version(DENSE, [0, 2], ONES, np.array([[1.0, 1.0], [0.0, 0.0]]))
    new = 4 + (20 / 3) ** 0.5
    np.testing.assert_allclose(w1_HD, [[new, new], [10, 20], [new, new]], rtol=1e-15)
    new = 2.5 + (5 / 3) ** 0.5
    np.testing.assert_allclose(w2_DH, [[new, 40, new], [2.5, 50, 2.5]], rtol=1e-15)
    assert (b1_H.tolist(), b2_D.tolist()) == ([2, 30, 6], [8, 9])


def test_first_bias_by_hand() -> None:
    # b1[S] = 2, 6: mean 4, std sqrt((4 + 4) / 1).
    new_H = literal.first_bias(DENSE[1], [0, 2], "reinit", np.array([1.0, -1.0]))
    np.testing.assert_allclose(new_H, [4 + 8**0.5, 30, 4 - 8**0.5], rtol=1e-15)
    assert literal.first_bias(DENSE[1], [1], "reinit", np.array([5.0])).tolist() == [2, 30, 6]  # std 0
    assert literal.first_bias(DENSE[1], [0, 2], "zero", None).tolist() == [0, 30, 0]
    assert literal.first_bias(DENSE[1], [0, 2], "keep", None).tolist() == [2, 30, 6]


def test_code_version_by_hand() -> None:
    # Places 0, 1, 2 take the neurons 2, 0, 1; then W1 loses place 0 (5, 7) and W2 places 1 and 2 (1, 40, 3, 50).
    w1_HD, b1_H, w2_DH, b2_D = literal.code_version(DENSE, [2, 0, 1], [0], [2, 1], ZEROS[:1], ZEROS)
    assert w1_HD.tolist() == [[6, 6], [1, 3], [10, 20]]
    assert b1_H.tolist() == [6, 2, 30]
    assert w2_DH.tolist() == [[2, 23.5, 23.5], [4, 23.5, 23.5]]
    assert b2_D.tolist() == [8, 9]


# ---- The fast strategy ----------------------------------------------------------------------------------------------


def transcription(strategy: Any, ffn: FFN, number: int) -> literal.Expert:
    """The literal expert of the same draws, each from its own stream."""

    def draws(*name: str) -> torch.Generator:
        return STREAM.child("expert", number).child(*name).generator()

    def order(*name: str) -> list[int]:
        return torch.randperm(ffn.hidden, generator=draws(*name)).tolist()

    def normals(matrix: str, *shape: int) -> literal.Array:
        return torch.randn(shape, generator=draws(matrix, "values"), dtype=torch.float64).numpy()

    count = int(strategy.ratio * ffn.hidden)
    dense: Any = tuple(part.double().numpy() for part in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D))
    chosen_S = order("w1", "indices")[:count]
    normal = normals("w1", count, ffn.width), normals("w2", ffn.width, count)
    bias = {"bias": strategy.bias, "b1_normal_S": normals("b1", count)}
    if strategy.shared_indices:
        return literal.paper_version(dense, chosen_S, *normal, **bias)
    return literal.code_version(dense, order("permutation"), chosen_S, order("w2", "indices")[:count], *normal, **bias)


@pytest.mark.parametrize("bias", ["keep", "reinit", "zero"])
@pytest.mark.parametrize("shared_indices", [True, False])
def test_fast_strategy_equals_the_literal_one(shared_indices: bool, bias: str) -> None:
    """Weights, outputs, and the gradients of weights and input."""
    ratios = [0.0, 0.05, 0.5, 0.7, 1.0]  # of 24 neurons: 0, 1, 12, 16, 24
    for ratio, dtype in itertools.product(ratios, [torch.float64, torch.float32]):
        compare(DropUpcycling(ratio=ratio, shared_indices=shared_indices, bias=bias), dtype)


def compare(strategy: Any, dtype: torch.dtype) -> None:
    ffn = random_ffn(24, 7, dtype=dtype)
    init = strategy.init_layer(ffn, Layer("vision", 1, 2, 3, 2), None, STREAM)
    # The draws' one rounding (6e-8 in float32) and sums in another order.
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for number, expert in enumerate(init.experts):
        expected = [torch.from_numpy(part).requires_grad_() for part in transcription(strategy, ffn, number)]
        actual = [expert.c_fc.weight, expert.c_fc.bias, expert.c_proj.weight, expert.c_proj.bias]
        generator = torch.Generator().manual_seed(number)
        x_TD, cotangent_TD = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
        x_TD.requires_grad_()
        fast_x_TD = x_TD.detach().to(dtype).requires_grad_()
        y_TD = literal.forward(x_TD, tuple(expected), ffn.act)
        fast_y_TD = expert(fast_x_TD)
        y_TD.backward(cotangent_TD)
        fast_y_TD.backward(cotangent_TD.to(dtype))
        pairs = [*zip(actual, expected, strict=True), (fast_y_TD, y_TD)]
        pairs += [(a.grad, e.grad) for a, e in [*zip(actual, expected, strict=True), (fast_x_TD, x_TD)]]
        assert len(pairs) == 10
        for ours, theirs in pairs:
            assert ours.dtype == dtype
            assert_close(ours.detach().double(), theirs.detach(), **tolerance)
