"""Sparse upcycling: S1 function kept and S7 own storage, for what the strategy makes; its noises; the transcription.

S1 to S5 for copies under the gate are in `test_moe_copies.py`, S1, S6, S7 for a whole model in `test_surgery.py`.
Statistical bounds are five standard deviations.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.helpers import dense_forward, moe_layer, random_ffn
from tests.literal import sparse_upcycling as literal
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import random_router
from upcycle_bench.util.rng import Stream

SparseUpcycling = load_registry().strategies["sparse-upcycling"].target
STREAM = Stream(("test", 0))
LAYER = Layer("vision", 1, 2, 4, 2)
HIDDEN, WIDTH = 256, 64
SIGMAS = 5


def make(ffn: FFN, **options: Any) -> LayerInit:
    return SparseUpcycling(**options).init_layer(ffn, LAYER, None, STREAM)


def parts(ffn: FFN) -> list[torch.Tensor]:
    return [ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D]


@pytest.mark.parametrize("router_init", ["deepspeed", "normal", "lecun"])
def test_s1_defaults_are_bit_equal_copies_and_the_common_random_router(router_init: str) -> None:
    for dtype in (torch.float32, torch.float64):
        ffn = random_ffn(HIDDEN, WIDTH, dtype=dtype)
        init = make(ffn, router_init=router_init)
        for expert in init.experts:
            assert all(map(torch.equal, expert.parameters(), parts(ffn)))
        assert torch.equal(init.router_ED, random_router(ffn, LAYER, STREAM, router_init))  # type: ignore[arg-type]


def test_s1_noise_on_the_router_preserves_the_function_noise_on_experts_does_not() -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    x_TD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_TD = dense_forward(ffn, x_TD)
    assert_close(moe_layer(make(ffn, router_noise_std=0.5)).eval()(x_TD), expected_TD, rtol=1e-10, atol=1e-12)
    for option in ("expert_noise_std", "expert_noise_rel"):
        y_TD = moe_layer(make(ffn, **{option: 0.01})).eval()(x_TD).detach()
        assert float((y_TD - expected_TD).norm() / expected_TD.norm()) > 1e-3


def test_s7_experts_own_separate_storage() -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    experts = make(ffn).experts
    tensors = [tensor for expert in experts for tensor in expert.parameters()] + parts(ffn)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors) == 20
    with torch.no_grad():
        for tensor in experts[1].parameters():
            tensor.add_(1)
    for number, expert in enumerate(experts):
        assert all(torch.equal(a, b) == (number != 1) for a, b in zip(expert.parameters(), parts(ffn), strict=True))


@pytest.mark.parametrize(("absolute", "relative"), [(0.3, 0.0), (0.0, 0.01), (0.03, 0.2)])
def test_noise_has_the_deviation_that_is_asked_for(absolute: float, relative: float) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    ffn = FFN(ffn.w1_HD, ffn.b1_H, 3 * ffn.w2_DH, ffn.b2_D, ffn.act)  # other scales
    drawn = []
    for expert in make(ffn, expert_noise_std=absolute, expert_noise_rel=relative).experts:
        assert torch.equal(expert.c_fc.bias, ffn.b1_H)
        assert torch.equal(expert.c_proj.bias, ffn.b2_D)
        for ours, dense in ((expert.c_fc.weight, ffn.w1_HD), (expert.c_proj.weight, ffn.w2_DH)):
            z = (ours.detach() - dense).flatten() / math.hypot(absolute, relative * float(dense.std()))
            assert abs(float(z.mean())) < SIGMAS / math.sqrt(len(z))
            assert abs(float(z.std()) - 1) < SIGMAS / math.sqrt(2 * len(z))
            drawn.append(z)
    for one, other in itertools.combinations(drawn, 2):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < SIGMAS / math.sqrt(len(one))


def test_router_noise_is_added_to_the_same_router() -> None:
    ffn = random_ffn(8, 1024)
    init = make(ffn, router_noise_std=0.1)
    z_ED = (init.router_ED - make(ffn).router_ED) / 0.1
    assert abs(float(z_ED.std()) - 1) < SIGMAS / math.sqrt(2 * z_ED.numel())
    assert all(torch.equal(expert.c_fc.weight, ffn.w1_HD) for expert in init.experts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("noise", [(0.0, 0.0, 0.0), (0.1, 0.5, 0.2)])
def test_fast_strategy_equals_the_literal_one(noise: tuple[float, float, float], dtype: torch.dtype) -> None:
    ffn = random_ffn(12, 5, dtype=dtype)
    dense: Any = tuple(part.double().tolist() for part in parts(ffn))
    absolute, relative, router = noise
    init = make(ffn, expert_noise_std=absolute, expert_noise_rel=relative, router_noise_std=router)

    def normal(shape: tuple[int, ...], *name: str | int) -> Any:
        return torch.randn(shape, generator=STREAM.child(*name).generator(), dtype=torch.float64).tolist()

    uniform_ED = torch.rand((4, 5), generator=STREAM.child("router").generator(), dtype=torch.float64).tolist()
    pairs = [(init.router_ED, literal.router(uniform_ED, router, normal((4, 5), "router noise")))]
    for number, expert in enumerate(init.experts):
        normals = normal((12, 5), "expert", number, "w1"), normal((5, 12), "expert", number, "w2")
        made = literal.expert(dense, *normals, absolute, relative)
        pairs += zip(expert.parameters(), made, strict=True)
    assert len(pairs) == 17
    # float32: the router is rounded once before its noise is added and once after.
    tolerance = {"rtol": 1e-13, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert_close(ours.detach().double(), torch.tensor(theirs, dtype=torch.float64), **tolerance)
