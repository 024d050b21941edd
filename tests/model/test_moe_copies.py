"""An MoE layer whose experts are copies of one FFN computes what that FFN does."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.moe_helpers import assert_gradients, create_layer, random_ffn, relative_error, router_of, settings_of
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import MoEFFN

GELU = torch.nn.functional.gelu
ROUTERS = pytest.mark.parametrize("router", ["random", "sharp", "zero", "twins"])


def identical(top_k: int, router: str, factor: float, dtype: torch.dtype = torch.float64) -> tuple[MoEFFN, FFN]:
    """A layer of 6 copies of one FFN, and that FFN."""
    torch.manual_seed(top_k)
    dense = random_ffn(9, 12, dtype)
    router_ED = router_of(router, 6, 9, dtype)
    return create_layer(9, settings_of(6, top_k, factor), dtype, dense=dense, router_ED=router_ED).train(), dense


def dense_forward(x_TD: Tensor, weights: Iterable[Tensor]) -> Tensor:
    w1_HD, b1_H, w2_DH, b2_D = weights
    return GELU(x_TD @ w1_HD.T + b1_H) @ w2_DH.T + b2_D


@ROUTERS
@pytest.mark.parametrize("top_k", [2, 3, 6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_s1_copies_of_an_ffn_are_that_ffn(top_k: int, router: str, dtype: torch.dtype, tolerance: float) -> None:
    """S1: renormalised gates and capacity for all: MoE(x) = FFN(x) for any router and k."""
    layer, dense = identical(top_k, router, factor=6.0, dtype=dtype)
    x_TD = torch.randn(50, 9, dtype=dtype)
    expected_TD = dense_forward(x_TD, (dense.w1_HD, dense.b1_H, dense.w2_DH, dense.b2_D))
    for mode in (True, False):
        assert relative_error(layer.train(mode)(x_TD[None])[0], expected_TD) <= tolerance


@ROUTERS
def test_s2_one_choice_keeps_its_raw_probability(router: str) -> None:
    """S2: not renormalised, MoE(x) = (sum of the chosen P) FFN(x); DeepSpeed, and so we, do that for k = 1 only."""
    layer, dense = identical(1, router, factor=6.0)
    x_TD = torch.randn(50, 9, dtype=torch.float64)
    expected_TD = dense_forward(x_TD, (dense.w1_HD, dense.b1_H, dense.w2_DH, dense.b2_D))
    top_T1 = torch.softmax(x_TD @ layer.router_weight.T, dim=1).amax(1, keepdim=True)
    assert relative_error(layer(x_TD[None])[0], top_T1 * expected_TD) <= 1e-12


@ROUTERS
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 6.0])
def test_s3_copies_give_the_router_no_gradient(top_k: int, router: str, factor: float) -> None:
    """S3: with identical experts only l_aux moves a renormalising router; for k = 1 the task does too."""
    layer, _ = identical(top_k, router, factor)
    x_TD = torch.randn(50, 9, dtype=torch.float64)
    layer.router_weight.requires_grad_()
    loss = (layer(x_TD[None]) * torch.randn(50, 9, dtype=torch.float64)).sum()
    (task_ED,) = torch.autograd.grad(loss, layer.router_weight, retain_graph=True)
    (balance_ED,) = torch.autograd.grad(layer.l_aux, layer.router_weight)
    # The gradient of one choice alone has this size; renormalised, the gradients of all choices cancel to rounding.
    (scale_ED,) = torch.autograd.grad(
        torch.softmax(x_TD @ layer.router_weight.T, dim=1).amax(1).sum(), layer.router_weight
    )
    if top_k == 1:
        assert task_ED.norm() > 1e-3 * scale_ED.norm()
    else:
        assert task_ED.norm() <= 1e-12 * max(1, scale_ED.norm())
    assert balance_ED.norm() > 0


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("factor", [0.1, 0.4, 0.8])
def test_s4_capacity_leaves_survivors_dense_and_zeroes_the_rest(top_k: int, factor: float) -> None:
    """S4: a token with at least one surviving choice is dense, one with none is zero."""
    layer, dense = identical(top_k, "random", factor)
    x_TD = torch.randn(60, 9, dtype=torch.float64)
    kept_T = (layer.gate(x_TD).index_KT >= 0).any(0)
    y_TD = layer(x_TD[None])[0]
    expected_TD = dense_forward(x_TD, (dense.w1_HD, dense.b1_H, dense.w2_DH, dense.b2_D))
    assert kept_T.any()
    assert factor > 0.4 or not kept_T.all()
    assert (y_TD[~kept_T] == 0).all()
    assert_close(y_TD[kept_T], expected_TD[kept_T], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [2, 3])
def test_s5_gradients_of_the_copies_add_up_to_the_dense_one(top_k: int) -> None:
    """S5: the sum over experts of grad(W_e) is the dense gradient for the same loss, and so is that of the input."""
    layer, dense = identical(top_k, "random", factor=6.0)
    x_TD = torch.randn(50, 9, dtype=torch.float64, requires_grad=True)
    weight_TD = torch.randn(50, 9, dtype=torch.float64)
    (layer(x_TD[None])[0] * weight_TD).sum().backward()
    summed = [sum(p.grad for p in copies) for copies in zip(*(e.parameters() for e in layer.experts), strict=True)]

    weights = [w.clone().requires_grad_() for w in (dense.w1_HD, dense.b1_H, dense.w2_DH, dense.b2_D)]
    loss = (dense_forward(x_TD, weights) * weight_TD).sum()
    expected = torch.autograd.grad(loss, [x_TD, *weights])
    assert_gradients([x_TD.grad, *summed], expected, 1e-12)
