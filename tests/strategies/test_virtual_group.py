"""Virtual-group upcycling: its invariants, options and errors, and the shape that it gives the model.

Shape suffixes: V copies, G shards of a copy.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.helpers import dense_forward, moe_layer, random_ffn, tiny_clip, tiny_moe, upcycled
from upcycle_bench.model import rebuild, weights
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import MoE
from upcycle_bench.strategy import resolve_moe
from upcycle_bench.util.errors import PluginError, UserError
from upcycle_bench.util.rng import Stream

VirtualGroup = load_registry().strategies["virtual-group"].target
HIDDEN, WIDTH = 24, 16


def settings(granularity: int, **changes: Any) -> MoE:
    return VirtualGroup(granularity=granularity).moe_settings(tiny_moe(**changes))


def make(ffn: FFN, granularity: int, seed: int = 0, experts: int = 4, **options: Any) -> LayerInit:
    moe = settings(granularity, experts=experts)
    layer = Layer("vision", 1, 2, moe.experts, moe.top_k)
    return VirtualGroup(granularity=granularity, **options).init_layer(ffn, layer, None, Stream(("test", seed)))


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routes(layer: MoEFFN, x_TD: Tensor) -> Tensor:
    """Which experts each token takes, [K, T]."""
    return layer.gate(x_TD)[3]


# ---- Invariants -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 2, 3, 8])
def test_virtual_group_topk_then_softmax_with_w2_scaled_is_the_dense_ffn(granularity: int) -> None:
    """Biases included, for any router: random rows here."""
    x_TD = tokens(200)
    for top_k, act in itertools.product([1, 2, 3], [nn.GELU(), nn.ReLU()]):
        ffn = random_ffn(HIDDEN, WIDTH, act=act)
        moe = settings(granularity, top_k=top_k)
        init = make(ffn, granularity)
        expected_TD = dense_forward(ffn, x_TD)
        if granularity == top_k == 1:  # DeepSpeed's top-1 keeps the raw probability
            probs_TE = torch.softmax(x_TD @ init.router_ED.T, 1)
            expected_TD = expected_TD * probs_TE.max(1, keepdim=True).values
        assert_close(moe_layer(init, moe=moe).eval()(x_TD), expected_TD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("experts", "granularity", "top_k"), [(8, 2, 2), (8, 2, 1), (4, 4, 2), (5, 3, 1), (7, 8, 2)])
def test_virtual_group_every_token_takes_whole_copies(experts: int, granularity: int, top_k: int) -> None:
    """Also where the matrix product rounds equal rows differently: a token takes all shards of a tie within a copy."""
    for dtype in (torch.float32, torch.float64):
        check_whole_copies(experts, granularity, top_k, dtype)


def check_whole_copies(experts: int, granularity: int, top_k: int, dtype: torch.dtype) -> None:
    ffn = random_ffn(HIDDEN, WIDTH, dtype=dtype)
    moe = settings(granularity, experts=experts, top_k=top_k)
    layer = moe_layer(make(ffn, granularity, experts=experts), moe=moe).eval()
    x_TD = tokens(5000).to(dtype)
    index_KT = routes(layer, x_TD)
    assert index_KT.shape == (top_k * granularity, 5000)
    assert (index_KT >= 0).all()
    assert (index_KT.sort(0).values.diff(dim=0) > 0).all()  # no expert twice
    copy_KT, shard_KT = index_KT // granularity, index_KT % granularity
    # Each shard number stands there once per copy, for the same copies.
    taken = [copy_KT.T[shard_KT.T.eq(s)].view(5000, top_k).sort(1).values for s in range(granularity)]
    assert all(torch.equal(each_TV, taken[0]) for each_TV in taken)
    best_TV = (x_TD.double() @ layer.gate.wg.weight[::granularity].double().T).topk(top_k, dim=1).indices
    # Logits are float32, so two copies that are nearly equal may change places, for hardly any of 5,000 tokens.
    agree_T = (best_TV.sort(1).values == taken[0]).all(1)
    assert agree_T.double().mean() > 0.999


def test_virtual_group_shards_of_a_copy_share_a_row_and_copies_do_not() -> None:
    init = make(random_ffn(HIDDEN, WIDTH), 3)
    assert init.router_ED.shape == (12, WIDTH)
    rows_VGD = init.router_ED.view(4, 3, WIDTH)
    assert torch.equal(rows_VGD, rows_VGD[:, :1].expand(4, 3, WIDTH))
    assert len({tuple(row.tolist()) for row in rows_VGD[:, 0]}) == 4
    assert init.router_ED.abs().max() <= WIDTH**-0.5  # as DeepSpeed draws


def test_virtual_group_shards_are_the_dense_neurons_in_order() -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    experts = make(ffn, 3).experts
    for copy in range(4):
        own = experts[3 * copy : 3 * copy + 3]
        assert torch.equal(torch.cat([e.c_fc.weight for e in own]), ffn.w1_HD)
        assert torch.equal(torch.cat([e.c_fc.bias for e in own]), ffn.b1_H)
        assert torch.equal(torch.cat([e.c_proj.weight for e in own], dim=1), 3 * ffn.w2_DH)
        assert all(torch.equal(e.c_proj.bias, ffn.b2_D) for e in own)
    pointers = {p.data_ptr() for e in experts for p in e.parameters()}
    assert len(pointers) == 4 * len(experts)  # storage of their own


def test_virtual_group_with_one_shard_is_sparse_upcycling() -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    assert settings(1) == tiny_moe()
    for expert in make(ffn, 1).experts:
        parts = expert.c_fc.weight, expert.c_fc.bias, expert.c_proj.weight, expert.c_proj.bias
        assert all(map(torch.equal, parts, (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)))


@pytest.mark.parametrize("granularity", [2, 4])
def test_virtual_group_megatron_scaling_is_exact_for_relu_only(granularity: int) -> None:
    """sqrt(G) on either matrix is exact only for homogeneous activations, like ReLU."""
    x_TD = tokens(100)
    errors = {}
    for act in (nn.ReLU(), nn.GELU()):
        ffn = random_ffn(HIDDEN, WIDTH, act=act)
        init = make(ffn, granularity, scaling="megatron")
        y_TD = moe_layer(init, moe=settings(granularity)).eval()(x_TD).detach()
        target_TD = dense_forward(ffn, x_TD)
        errors[type(act)] = float((y_TD - target_TD).norm() / target_TD.norm())
        root = granularity**0.5
        assert_close(torch.cat([e.c_fc.weight for e in init.experts[:granularity]]), ffn.w1_HD * root)
    assert errors[nn.ReLU] < 1e-12
    assert 1e-3 < errors[nn.GELU] < 0.5


def test_virtual_group_softmax_then_topk_would_give_a_share_of_the_ffn() -> None:
    """Without renormalisation a copy of gate p gives (p / G) FFN, but for b2. So the paper has another scale there."""
    ffn = random_ffn(HIDDEN, WIDTH)
    init = make(ffn, 2)
    x_TD = tokens(20)
    probs_TE = torch.softmax(x_TD @ init.router_ED.T, 1)
    for copy in range(4):
        pair = [2 * copy, 2 * copy + 1]
        # W2 without its scale G, and without b2.
        sum_TD = sum(
            probs_TE[:, [e]] * (init.experts[e](x_TD) - ffn.b2_D) / 2  # type: ignore[misc]
            for e in pair
        )
        share_T1 = probs_TE[:, pair].sum(1, keepdim=True) / 2
        assert_close(sum_TD.detach(), share_T1 * (dense_forward(ffn, x_TD) - ffn.b2_D), rtol=1e-10, atol=1e-12)


# ---- In training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [2, 4])
def test_survivors_of_capacity_are_dense_and_the_load_balance_is_that_of_the_copies(granularity: int) -> None:
    ffn = random_ffn(HIDDEN, WIDTH)
    moe = settings(granularity, capacity_factor=0.6, min_capacity=0)
    layer = moe_layer(make(ffn, granularity), moe=moe).train()
    x_TD = tokens(400)
    kept_KT = routes(layer, x_TD) >= 0
    y_TD = layer(x_TD)
    assert 0.3 < kept_KT.double().mean() < 0.9
    # Shards of a copy have equal probabilities, so they drop the same tokens: what survives is a whole copy.
    lost_T = ~kept_KT.any(0)
    assert lost_T.any() and not lost_T.all()
    assert (y_TD[lost_T] == 0).all()
    assert_close(y_TD[~lost_T], dense_forward(ffn, x_TD)[~lost_T], rtol=1e-10, atol=1e-10)
    # l_aux counts all choices: E sum_e f_e P_e with f and P a G-th of the copy's, hence V sum_v f_v P_v.
    logits_TV = x_TD @ layer.router_weight[::granularity].T
    probs_TV = torch.softmax(logits_TV, 1)
    f_V = torch.bincount(logits_TV.topk(2, dim=1).indices.flatten(), minlength=4) / (2 * 400)
    expected = 4 * (f_V * probs_TV.mean(0)).sum().item()
    assert layer.l_aux.item() == pytest.approx(expected, rel=1e-5)


def test_shards_of_a_copy_drift_apart() -> None:
    """Each shard, and each row of the router, gets a gradient of its own: the group holds at step 0 only."""
    ffn = random_ffn(HIDDEN, WIDTH)
    layer = moe_layer(make(ffn, 2), moe=settings(2)).train()
    layer(tokens(100)).square().sum().backward()
    gradient_VGD = layer.router_weight.grad.view(4, 2, WIDTH)
    assert gradient_VGD.any(-1).all()
    assert not torch.allclose(gradient_VGD[:, 0], gradient_VGD[:, 1])


# ---- Options, errors, shape -----------------------------------------------------------------------------------------


def test_neurons_that_cannot_be_shared_out_are_an_error() -> None:
    with pytest.raises(UserError, match="granularity 3 does not divide the 256 hidden neurons"):
        VirtualGroup(granularity=3).ffn_hidden(256, tiny_moe())
    assert VirtualGroup(granularity=4).ffn_hidden(256, tiny_moe()) == 64


def test_settings_by_default() -> None:
    assert resolve_moe(VirtualGroup(), tiny_moe()) == tiny_moe(experts=8, top_k=4)


def test_the_file_knows_the_experts_width(tmp_path: Any) -> None:
    clip = tiny_clip()
    strategy = VirtualGroup(granularity=4)
    made = upcycled(strategy, clip, seed=0)
    assert rebuild.unlike_its_file(made.model, clip.model) is None
    digest = weights.save(made, resolve_moe(strategy, tiny_moe()), tmp_path)
    loaded = weights.load(tmp_path / f"{digest}.safetensors")
    for layer in moe_layers(loaded.model).values():
        assert (len(layer.experts), layer.gate.k) == (16, 8)
        assert {expert.c_fc.out_features for expert in layer.experts} == {64}


class Other(VirtualGroup):
    """Changes settings that are the protocol's alone."""

    def moe_settings(self, moe: MoE) -> MoE:
        return moe.model_copy(update={"capacity_factor": 9.0, "every": 1})


class Impossible(VirtualGroup):
    """More choices than experts."""

    def moe_settings(self, moe: MoE) -> MoE:
        return moe.model_copy(update={"top_k": 100})


def test_settings_of_the_protocol_stay_its_own() -> None:
    with pytest.raises(PluginError, match="moe_settings changes every, capacity_factor, which are the protocol's"):
        resolve_moe(Other(), tiny_moe())
    with pytest.raises(PluginError, match=r"top_k \(100\) exceeds experts"):
        resolve_moe(Impossible(), tiny_moe())
