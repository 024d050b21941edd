"""The literal MoE layer against hand-worked numbers and DeepSpeed 0.19.8."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.literal import moe_layer

GELU = torch.nn.functional.gelu


def log_probabilities(rows: list[list[float]]) -> Tensor:
    """Tokens whose router logits, under the identity router, have exactly these softmax values."""
    return torch.tensor(rows, dtype=torch.float64).log()


def constant_experts(outputs: list[list[float]], d: int) -> list[moe_layer.Expert]:
    """Experts that ignore their input."""
    return [
        (torch.zeros(3, d).double(), torch.zeros(3).double(), torch.zeros(d, 3).double(), torch.tensor(row).double())
        for row in outputs
    ]


def random_experts(n: int, d: int, h: int, dtype: torch.dtype = torch.float32) -> list[moe_layer.Expert]:
    """Normal weights of an ordinary size."""
    return [tuple(torch.randn(shape, dtype=dtype) / d**0.5 for shape in ((h, d), (h,), (d, h), (d,))) for _ in range(n)]


# ---- Hand-worked ----------------------------------------------------------------------------------------------------


def test_two_experts_by_hand() -> None:
    x_TD = log_probabilities([[0.75, 0.25], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    experts = constant_experts([[1.0, 0.0], [0.0, 1.0]], d=2)  # so y_t is the pair of weights of experts 0 and 1

    def forward(capacity: int | None) -> moe_layer.LiteralMoE:
        return moe_layer.moe_forward(x_TD, torch.eye(2).double(), experts, GELU, capacity=capacity)

    # Token 3 is a tie: expert 0 first. Queues: e0 = t0 t1 t3 | t2, e1 = t2 | t0 t1 t3 (first | second choices).
    unlimited = forward(None)
    assert unlimited.first_T.tolist() == [0, 0, 1, 0]
    assert unlimited.second_T.tolist() == [1, 1, 0, 1]
    assert unlimited.expert_counts_E.tolist() == [4, 4]
    assert unlimited.kept_TK.all()
    assert_close(unlimited.y_TD, torch.tensor([[0.75, 0.25], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]]).double())
    # f = (3/4, 1/4), P = (2.05, 1.95) / 4, so l_aux = 2 (0.75 * 0.5125 + 0.25 * 0.4875) = 1.0125.
    assert unlimited.l_aux.item() == pytest.approx(1.0125, abs=1e-12)

    # Capacity 3: e0 keeps t0 t1 t3, e1 keeps t2 t0 t1; t2 and t3 lose their second choice and put 1 on the first.
    three = forward(3)
    assert three.kept_TK.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    assert_close(three.gates_TK, torch.tensor([[0.75, 0.25], [0.6, 0.4], [1, 0], [1, 0]]).double())
    assert_close(three.y_TD, torch.tensor([[0.75, 0.25], [0.6, 0.4], [0, 1], [1, 0]]).double())

    # Capacity 1: e0 keeps t0, e1 keeps t2; t1 and t3 lose both and come out as zero.
    one = forward(1)
    assert one.kept_TK.tolist() == [[True, False], [False, False], [True, False], [False, False]]
    assert_close(one.y_TD, torch.tensor([[1, 0], [0, 0], [0, 1], [0, 0]]).double())
    assert one.expert_counts_E.tolist() == [4, 4]  # before dropping
    assert one.l_aux.item() == unlimited.l_aux.item()


def test_renormalises_over_the_two_chosen() -> None:
    # 0.5 and 0.3 of (0.5, 0.2, 0.3): 0.5 / 0.8 = 0.625 and 0.3 / 0.8 = 0.375.
    moe = moe_layer.moe_forward(
        log_probabilities([[0.5, 0.2, 0.3]]),
        torch.eye(3).double(),
        constant_experts([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], d=3),
        GELU,
        capacity=None,
    )
    assert_close(moe.y_TD, torch.tensor([[0.625, 0, 0.375]]).double())


def test_a_survivor_below_eps_keeps_less_than_one() -> None:
    # t0 fills e0 (and e2); t1 loses e0 and is left with e1 at P = e^-20 = 2.1e-9 < eps = 1.2e-7: weight P / eps.
    x_TD = torch.tensor([[1.0, -1.0, 0.0], [20.0, 0.0, -9.0]])
    moe = moe_layer.moe_forward(x_TD, torch.eye(3), random_experts(3, 3, 4), GELU, capacity=1)
    assert moe.kept_TK.tolist() == [[True, True], [False, True]]
    assert moe.gates_TK[1].tolist() == pytest.approx([0, np.exp(-20) / np.finfo(np.float32).eps], rel=1e-5)


def test_share_of_tokens_carries_no_gradient() -> None:
    # One token, P = (3/4, 1/4), f = (1, 0): l_aux = 2 P_0, so dl/dlogits = 2 P_0 (1 - P_0, -P_1) = (0.375, -0.375).
    x_TD = log_probabilities([[0.75, 0.25]]).requires_grad_()
    moe = moe_layer.moe_forward(
        x_TD, torch.eye(2).double(), constant_experts([[0.0, 0], [0, 0]], d=2), GELU, capacity=None
    )
    moe.l_aux.backward()
    assert_close(x_TD.grad, torch.tensor([[0.375, -0.375]]).double())


def test_identical_experts_are_the_dense_ffn() -> None:
    torch.manual_seed(0)
    dense = random_experts(1, 5, 7, torch.float64)[0]
    x_TD, router_ED = torch.randn(6, 5).double(), torch.randn(4, 5).double()
    moe = moe_layer.moe_forward(x_TD, router_ED, [dense] * 4, GELU, capacity=None)
    w1_HD, b1_H, w2_DH, b2_D = dense
    y_TD = GELU(x_TD @ w1_HD.T + b1_H) @ w2_DH.T + b2_D
    assert_close(moe.y_TD, y_TD, rtol=1e-12, atol=1e-12)
    loss = moe_layer.eesd_loss(x_TD, moe.y_TD, router_ED, [dense] * 4, GELU, feature_reduction="sum")
    assert loss.item() < 1e-24  # K8


def test_capacity_by_hand() -> None:
    assert moe_layer.capacity(16, 8, 1.5, 2, 4) == 6  # 2 * 3
    assert moe_layer.capacity(17, 8, 1.0, 2, 4) == 5  # ceil(4.25)
    assert moe_layer.capacity(16, 8, 0.5, 2, 4) == 4  # the minimum
    assert moe_layer.capacity(10, 3, 1.05, 2, 4) == 7  # in float64 7.000000000000001 would become 8


def test_eesd_by_hand() -> None:
    # P = (3/4, 1/4) over outputs (1, 0) and (0, 2): ensemble (0.75, 0.5); y = (1, 1) is off by (0.25, 0.5), 0.3125.
    x_TD = log_probabilities([[0.75, 0.25], [0.75, 0.25]]).requires_grad_()
    y_TD = torch.tensor([[1.0, 1.0], [0.75, 0.5]], dtype=torch.float64, requires_grad=True)
    router_ED = torch.eye(2, dtype=torch.float64, requires_grad=True)
    teacher = constant_experts([[1.0, 0.0], [0.0, 2.0]], d=2)
    loss = moe_layer.eesd_loss(x_TD, y_TD, router_ED, teacher, GELU, feature_reduction="sum")
    assert loss.item() == pytest.approx(0.3125 / 2)
    loss.backward()
    assert_close(y_TD.grad, torch.tensor([[0.25, 0.5], [0, 0]]).double())  # 2 (y - ens) / T
    assert x_TD.grad is None
    assert router_ED.grad is None
    mean = moe_layer.eesd_loss(x_TD, y_TD, router_ED, teacher, GELU, feature_reduction="mean")
    assert mean.item() == pytest.approx(0.3125 / 4)


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------


def test_capacity_is_deepspeeds() -> None:
    from deepspeed.moe.sharded_moe import _capacity

    for t in range(1, 200, 3):
        for n in (2, 3, 4, 7, 8):
            for factor in (0.5, 1.0, 1.05, 1.25, 1.4, 2.0):
                expected = int(_capacity(torch.empty(t, n), torch.tensor(factor * 2), torch.tensor(4)))
                assert moe_layer.capacity(t, n, factor, 2, 4) == expected


@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_routing_is_deepspeeds(seed: int, drop_tokens: bool) -> None:
    from deepspeed.moe.sharded_moe import top2gating

    rng = np.random.default_rng(seed)
    t, n = int(rng.integers(1, 60)), int(rng.integers(2, 12))
    factor, min_capacity = float(rng.choice([0.3, 0.5, 1.0, 1.05, 1.5, 2.0])), int(rng.integers(0, 5))
    logits_TE = torch.tensor(rng.normal(size=(t, n)) * rng.choice([0.5, 3, 30]), dtype=torch.float32)
    if seed % 2:
        logits_TE = logits_TE.round()  # many ties

    # x = logits and an identity router: the layer's own logits are then exactly these.
    slots = moe_layer.capacity(t, n, factor, 2, min_capacity) if drop_tokens else None
    moe = moe_layer.moe_forward(logits_TE, torch.eye(n), random_experts(n, n, 2), GELU, capacity=slots)
    l_aux, used, _, indices_KT, _, gates_KT, counts_E = top2gating(
        logits_TE.clone(),
        factor,
        min_capacity,
        drop_tokens=drop_tokens,
        ep_group=None,
        top2_2nd_expert_sampling=False,
        sparse_routes=True,
    )
    assert slots is None or slots == int(used)
    choices_TK = torch.stack([moe.first_T, moe.second_T], dim=1)
    assert torch.equal(indices_KT.T.long(), choices_TK.where(moe.kept_TK, -1))
    assert torch.equal(counts_E, moe.expert_counts_E)
    assert_close(moe.gates_TK, gates_KT.T, rtol=1e-6, atol=1e-6)
    assert_close(moe.l_aux, l_aux, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_outputs_and_gradients_are_deepspeeds(seed: int) -> None:
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.sharded_moe import MOELayer, TopKGate

    torch.manual_seed(seed)
    t, d, h, n, factor = 12 + 7 * seed, 6, 10, 2 + seed, (0.4, 1.0, 1.5)[seed % 3]
    gate = TopKGate(d, n, k=2, capacity_factor=factor, min_capacity=1, top2_2nd_expert_sampling=False)
    block = torch.nn.Sequential(torch.nn.Linear(d, h), torch.nn.GELU(), torch.nn.Linear(h, d))
    layer = MOELayer(gate, Experts(block, n, "experts"), "experts", 1, n)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)

    x_TD = torch.randn(t, d, requires_grad=True)
    target_TD = torch.randn(t, d)
    leaves = [x_TD, *layer.parameters()]
    y_TD = layer(x_TD, None)
    expected = torch.autograd.grad((y_TD * target_TD).sum() + layer.l_aux, leaves)

    experts = [tuple(block.parameters()) for block in layer.experts.deepspeed_experts]
    slots = moe_layer.capacity(t, n, factor, 2, 1)
    moe = moe_layer.moe_forward(x_TD, gate.wg.weight, experts, GELU, capacity=slots)
    actual = torch.autograd.grad((moe.y_TD * target_TD).sum() + moe.l_aux, leaves, allow_unused=True)

    assert_close(moe.y_TD, y_TD, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_inputs_are_routed_in_float32() -> None:
    torch.manual_seed(0)
    experts = random_experts(3, 4, 5, torch.bfloat16)
    x_TD, router_ED = torch.randn(7, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    moe = moe_layer.moe_forward(x_TD, router_ED, experts, GELU, capacity=None)
    assert (moe.y_TD.dtype, moe.gates_TK.dtype, moe.l_aux.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(moe.first_T, (x_TD.float() @ router_ED.float().T).argmax(dim=1))
