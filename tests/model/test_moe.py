"""The MoE layer in training, against DeepSpeed's (routing to the bit) and the literal transcription."""

import pytest
import torch
from deepspeed.moe.utils import is_moe_param
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.literal import moe_layer as literal
from tests.moe_helpers import (
    assert_gradients,
    create_dense,
    create_layer,
    inputs_for,
    relative_error,
    router_of,
    settings_of,
    upcycled,
)
from upcycle_bench.model.deepspeed_import import MOELayer, TopKGate
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.routes import Routes

GELU = torch.nn.functional.gelu
EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True, database=None)
PROBLEMS = {
    "seed": st.integers(0, 2**31),
    "count": st.integers(4, 70),
    "width": st.integers(2, 9),
    "experts": st.integers(2, 8),
    "top_k": st.integers(1, 3),
    "factor": st.sampled_from([0.1, 0.3, 0.7, 1.0, 1.05, 1.5, 2.0, 8.0]),
    "minimum": st.integers(0, 4),
    "tokens": st.sampled_from(["random", "random", "duplicates", "equal"]),
    "router": st.sampled_from(["random", "random", "sharp", "zero", "twins"]),
}


def tokens_of(kind: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random tokens, or with many equal ones (ties in every queue), or all equal (most experts stay empty)."""
    x_TD = torch.randn(count, width, dtype=dtype)
    if kind == "duplicates":
        x_TD = x_TD[torch.randint(0, max(1, count // 4), (count,))]
    return x_TD[:1].repeat(count, 1) if kind == "equal" else x_TD


# ---- DeepSpeed ------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(**PROBLEMS)
def test_routing_is_bit_equal_to_deepspeeds(
    seed: int,
    count: int,
    width: int,
    experts: int,
    top_k: int,
    factor: float,
    minimum: int,
    tokens: str,
    router: str,
) -> None:
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    stock = TopKGate(
        width,
        experts,
        top_k,
        capacity_factor=factor,
        min_capacity=minimum,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).train()
    router_ED = router_of(router, experts, width, torch.float32)
    stock.wg.weight = nn.Parameter(router_ED)
    ours = create_layer(width, settings_of(experts, top_k, factor, minimum), torch.float32, router_ED=router_ED).gate
    x_TD = tokens_of(tokens, count, width, torch.float32)

    expected = Routes(*stock(x_TD, None, True, False))
    actual = ours.train()(x_TD)
    if top_k == 1:
        expected = by_position(expected, actual, x_TD @ router_ED.T)
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name
    assert actual.index_KT.shape == actual.gates_KT.shape == (top_k, count)


def by_position(expected: Routes, actual: Routes, logits_TE: Tensor) -> Routes:
    """DeepSpeed's routes of single choices, but the first of each queue are kept; it keeps as many, and any."""
    first_T = logits_TE.softmax(1).argmax(1)
    mask_TE = nn.functional.one_hot(first_T, logits_TE.shape[1])
    place_T = (mask_TE.cumsum(0) - 1).gather(1, first_T[:, None])[:, 0]
    kept_T = place_T < expected.capacity
    kept = [
        nn.functional.one_hot(index_T[index_T >= 0].long(), logits_TE.shape[1]).sum(0)
        for index_T in (expected.index_KT[0], actual.index_KT[0])
    ]
    assert torch.equal(*kept)
    raw_T = logits_TE.softmax(1).gather(1, first_T[:, None])[:, 0]
    return expected._replace(
        index_KT=torch.where(kept_T, first_T, -1).int()[None],
        location_KT=(place_T * kept_T).int()[None],
        gates_KT=(raw_T * kept_T)[None],
    )


def test_a_single_choice_keeps_the_first_tokens_of_each_expert() -> None:
    """Ten tokens want expert 1, which has room for three; the gate is the raw probability."""
    layer = create_layer(2, settings_of(2, 1, 0.6), torch.float32, router_ED=torch.tensor([[0.0, 0], [1, 0]])).train()
    x_TD = torch.linspace(1, 2, 10)[:, None].repeat(1, 2)
    routes = layer.gate(x_TD)
    assert routes.index_KT.tolist() == [[1, 1, 1, -1, -1, -1, -1, -1, -1, -1]]
    assert routes.location_KT.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0, 0, 0]]
    assert_close(routes.gates_KT[0, :3], torch.sigmoid(x_TD[:3, 0]))
    assert not routes.gates_KT[0, 3:].any() and layer.take_dropped() == (7, 10)
    assert not layer(x_TD)[3:].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@EXAMPLES
@given(**PROBLEMS)
def test_outputs_and_gradients_are_the_parents(
    dtype: torch.dtype,
    tolerance: float,
    seed: int,
    count: int,
    width: int,
    experts: int,
    top_k: int,
    factor: float,
    minimum: int,
    tokens: str,
    router: str,
) -> None:
    """RaggedMOELayer.forward against DeepSpeed's MOELayer.forward on the same modules."""
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    router_ED = router_of(router, experts, width, dtype)
    layer = create_layer(width, settings_of(experts, top_k, factor, minimum), dtype, router_ED=router_ED).train()
    ragged = layer.moe.deepspeed_moe
    x_TD = tokens_of(tokens, count, width, dtype).requires_grad_()
    weight_TD = torch.randn(count, width, dtype=dtype)
    leaves = [x_TD, *ragged.parameters()]
    assert len(leaves) == 2 + 4 * experts

    results = []
    for forward in (ragged.forward, lambda *args: MOELayer.forward(ragged, *args)):
        y_TD = forward(x_TD, None)
        gradients = torch.autograd.grad((y_TD * weight_TD).sum() + ragged.l_aux, leaves)
        results.append((y_TD, ragged.l_aux, ragged.exp_counts, gradients))
    (y_TD, l_aux, counts_E, ours), (expected_TD, expected_aux, expected_E, theirs) = results
    assert torch.equal(l_aux, expected_aux) and torch.equal(counts_E, expected_E)
    assert relative_error(y_TD, expected_TD) <= tolerance
    assert_gradients(ours, theirs, tolerance)


def test_the_examples_above_cover_drops_and_empty_experts() -> None:
    """Numbers of one such problem: they would show a change of the generators that leaves only easy problems."""
    torch.manual_seed(0)
    layer = create_layer(5, settings_of(6, 2, 0.3), torch.float32).train()
    index_KT = layer.gate(tokens_of("equal", 40, 5, torch.float32)).index_KT
    # capacity = ceil(40 / 6 * 0.3 * 2) = 4: two experts keep 4 choices each, 72 of 80 are dropped, four are empty
    assert (index_KT < 0).sum() == 72
    assert sorted(torch.bincount(index_KT[index_KT >= 0], minlength=6).tolist()) == [0, 0, 0, 0, 4, 4]


def test_float32_routing_under_autocast() -> None:
    """Logits are float32, although torch's autocast would make any matmul's bfloat16."""
    torch.manual_seed(0)
    layer = create_layer(64, settings_of(8, 2), torch.float32).train()
    x_TD = torch.randn(2000, 64)
    expected = layer.gate(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer.gate(x_TD)
        y_BLD = layer(x_TD[None])
        half = layer.gate(x_TD.bfloat16())
    for name in ("l_aux", "index_KT", "gates_KT", "counts_E"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert half.gates_KT.dtype == torch.float32  # tokens may be bfloat16, as they are after open_clip's LayerNorm
    assert torch.equal(half.index_KT, layer.gate(x_TD.bfloat16()).index_KT)
    assert y_BLD.dtype == torch.bfloat16  # the experts run in it
    assert relative_error(y_BLD.float(), layer(x_TD[None])) < 0.02


def test_parameters_are_marked_as_deepspeed_wants_them() -> None:
    layer = create_layer(4, settings_of(3, 2))
    assert all(is_moe_param(p) and p.group_name == "ep_size_1" for p in layer.experts.parameters())
    assert not is_moe_param(layer.router_weight)
    assert len(list(layer.parameters())) == 1 + 3 * 4


# ---- The literal transcription --------------------------------------------------------------------------------------


@EXAMPLES
@given(**{name: value for name, value in PROBLEMS.items() if name not in ("top_k", "router")})
def test_the_literal_transcription_in_float64(
    seed: int, count: int, width: int, experts: int, factor: float, minimum: int, tokens: str
) -> None:
    torch.manual_seed(seed)
    layer = create_layer(width, settings_of(experts, 2, factor, minimum)).train()
    x_TD = tokens_of(tokens, min(count, 24), width, torch.float64).requires_grad_()
    weight_TD = torch.randn_like(x_TD)
    leaves = [x_TD, layer.router_weight, *layer.experts.parameters()]

    y_TD = layer(x_TD[None])[0]
    reference = literal.moe_forward(
        x_TD,
        layer.router_weight,
        [tuple(expert.parameters()) for expert in layer.experts],
        GELU,
        capacity=literal.capacity(len(x_TD), experts, factor, 2, minimum),
    )
    routes = layer.gate(x_TD)
    choices_TK = torch.stack([reference.first_T, reference.second_T], dim=1).where(reference.kept_TK, -1)
    assert torch.equal(routes.index_KT.T.long(), choices_TK)
    assert torch.equal(routes.counts_E, reference.expert_counts_E)
    assert_close(routes.gates_KT.T, reference.gates_TK, rtol=1e-12, atol=1e-12)
    assert relative_error(y_TD, reference.y_TD) <= 1e-12
    assert_close(layer.l_aux.double(), reference.l_aux, rtol=1e-6, atol=1e-6)  # DeepSpeed's l_aux is float32

    ours = torch.autograd.grad((y_TD * weight_TD).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((reference.y_TD * weight_TD).sum(), leaves, retain_graph=True, allow_unused=True)
    theirs = [torch.zeros_like(a) if b is None else b for a, b in zip(leaves, theirs, strict=True)]
    assert_gradients(ours, theirs, 1e-12)
    ours = torch.autograd.grad(layer.l_aux, leaves[:2])
    assert_close(ours, torch.autograd.grad(reference.l_aux, leaves[:2]), rtol=1e-4, atol=1e-5)


# ---- Counters, block 0 ----------------------------------------------------------------------------------------------


def test_drop_counters() -> None:
    torch.manual_seed(0)
    layer = create_layer(5, settings_of(4, 2, factor=0.5)).train()
    expected = [0, 0]
    assert layer.take_dropped() == (0, 0)
    for count in (30, 17):
        x_TD = torch.randn(count, 5, dtype=torch.float64)
        layer.eval()(x_TD[None])  # evaluation does not count
        _, _, counts_E = layer.train().moe(x_TD)
        # All 2 * count choices less those that a slot of one of the 4 experts holds.
        capacity = literal.capacity(count, 4, 0.5, 2, 0)
        expected[0] += 2 * count - int(counts_E.clamp(max=capacity).sum())
        expected[1] += 2 * count
    assert expected[0] > 0
    assert layer.take_dropped() == tuple(expected)
    assert layer.take_dropped() == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_0_can_be_upcycled(dtype: torch.dtype) -> None:
    """open_clip asks the first block's `mlp.c_fc` for its dtype before it embeds a text."""
    dense = create_dense().to(dtype)
    model = upcycled(dense, offset=0, every=1).eval()
    assert {name for name, layer in moe_layers(model).items() if layer.place.block == 0} == {"vision.0", "text.0"}
    assert model.transformer.get_cast_dtype() == model.visual.transformer.get_cast_dtype() == dtype
    images, texts = inputs_for(dense, dtype=dtype)
    with torch.no_grad():
        for encode, data in (("encode_image", images), ("encode_text", texts)):
            ours, theirs = getattr(model, encode)(data), getattr(dense, encode)(data)
            assert ours.dtype == dtype
            assert relative_error(ours, theirs) <= (1e-5 if dtype == torch.float32 else 1e-10)
