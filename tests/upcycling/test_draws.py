"""Draws: what is drawn and with which moments, that it follows the stream alone, and the sign of singular vectors.

Statistical bounds are five standard deviations. Shape suffixes: O outputs, I inputs, M singular values.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from upcycle_bench.upcycling import draws
from upcycle_bench.util.rng import Stream

RNG = Stream(("test", 0))
SIGMAS = 5


def test_a_permutation_holds_every_number_once() -> None:
    order = draws.permutation(100, RNG)
    assert torch.equal(order.sort().values, torch.arange(100))
    assert torch.equal(order, draws.permutation(100, RNG))
    assert not torch.equal(order, draws.permutation(100, RNG.child("other")))
    assert draws.permutation(0, RNG).tolist() == []


@pytest.mark.parametrize(("draw", "variance", "fourth"), [(draws.normal, 1, 3), (draws.uniform, 1 / 3, 1 / 5)])
def test_moments(draw: object, variance: float, fourth: float) -> None:
    z = draw((100, 200), RNG)  # type: ignore[operator]
    assert (z.shape, z.dtype) == ((100, 200), torch.float64)
    assert abs(float(z.mean())) < SIGMAS * math.sqrt(variance / z.numel())
    assert abs(float(z.square().mean()) - variance) < SIGMAS * math.sqrt((fourth - variance**2) / z.numel())
    assert (float(z.abs().max()) <= 1) == (draw is draws.uniform)


def test_mean_and_standard_deviation_by_hand() -> None:
    # 1, 3, 5, 7: mean 4, squared deviations 9 + 1 + 1 + 9 = 20 over n - 1 = 3
    assert draws.mean_and_std(torch.tensor([[1.0, 3.0], [5.0, 7.0]])) == pytest.approx((4, math.sqrt(20 / 3)))
    assert draws.mean_and_std(torch.tensor([7.0])) == (7, 0)
    assert draws.mean_and_std(torch.empty(0, 3)) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_redrawn_numbers_have_the_moments_of_the_old_ones(dtype: torch.dtype) -> None:
    weight = (3 * draws.normal((50, 80), RNG.child("weight")) + 100).to(dtype)
    mean, std = draws.mean_and_std(weight)
    z = draws.normal((50, 80), RNG)
    assert torch.equal(draws.redrawn(weight, RNG), (mean + std * z).to(dtype))
    more = draws.redrawn(weight, RNG, rows=7)
    assert (more.shape, more.dtype) == ((7, 80), dtype)
    assert abs(float(more.double().mean()) - mean) < SIGMAS * std / math.sqrt(more.numel())
    for few in (torch.empty(0, 4), torch.tensor([2.5])):  # without a spread
        assert torch.equal(draws.redrawn(few, RNG), few)


def test_noise_is_added_in_float64_and_rounded_once() -> None:
    weight = draws.normal((20, 30), RNG.child("weight")).float()
    expected = weight.double() + 0.1 * draws.normal((20, 30), RNG)
    assert torch.equal(draws.noisy(weight, 0.1, RNG), expected.float())
    assert draws.noisy(weight, 0.0, RNG) is weight


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_singular_vectors_have_a_sign(shape: tuple[int, int]) -> None:
    w_OI = draws.normal(shape, RNG)
    u_OM, s_M, vt_MI = draws.svd(w_OI)
    assert_close((u_OM * s_M) @ vt_MI, w_OI, rtol=1e-12, atol=1e-12)
    assert torch.equal(s_M, s_M.sort(descending=True).values)
    assert (u_OM.max(0).values > u_OM.min(0).values.abs()).all()
    other = draws.svd(-w_OI)
    assert_close(other[0], u_OM, rtol=1e-10, atol=1e-12)
    assert_close(other[2], -vt_MI, rtol=1e-10, atol=1e-12)
