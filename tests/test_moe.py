"""The MoE layer: routing bit-equal to DeepSpeed's, outputs and gradients to rounding, METHODS S1 to S5, text padding.

Shape suffixes: B batch, L sequence, T tokens, D width, H hidden width, N experts, K choices per token.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from deepspeed.moe.utils import is_moe_param
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from tests.helpers import threads
from tests.literal import moe_layer as literal
from tests.test_surgery import END, MOE, captions, create_dense, inputs_for, upcycled
from upcycle_bench import protocol
from upcycle_bench.ds import MOELayer, TopKGate
from upcycle_bench.moe import MoEFFN, Padding, moe_layers
from upcycle_bench.strategy import FFN, Layer

GELU = torch.nn.functional.gelu
EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


def settings_of(experts: int, top_k: int, factor: float = 2.0, minimum: int = 0, **changes: Any) -> protocol.MoE:
    changes = {"experts": experts, "top_k": top_k, "capacity_factor": factor, "min_capacity": minimum} | changes
    return protocol.MoE(**(MOE.model_dump() | changes))


def random_ffn(width: int, hidden: int, dtype: torch.dtype) -> FFN:
    """Weights of an ordinary size from torch's global generator."""
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    return FFN(*(torch.randn(shape, dtype=dtype) / width**0.5 for shape in shapes), nn.GELU())


def create_layer(
    width: int,
    moe: protocol.MoE,
    dtype: torch.dtype = torch.float64,
    *,
    hidden: int = 7,
    dense: FFN | None = None,
    router_ND: Tensor | None = None,
    padding: Padding | None = None,
) -> MoEFFN:
    """Different random experts, or copies of `dense`; a random router of ordinary sharpness unless one is given."""
    ffns = [dense or random_ffn(width, hidden, dtype) for _ in range(moe.experts)]
    if router_ND is None:
        router_ND = torch.randn(moe.experts, width, dtype=dtype)
    layer = Layer("text" if padding else "vision", 1, moe.experts, moe.top_k)
    return MoEFFN(layer, [ffn.expert() for ffn in ffns], router_ND, moe, padding)


def relative_error(ours: Tensor, theirs: Tensor, scale: float = 0.0) -> float:
    """|ours - theirs| / |theirs|; `scale` bounds the denominator from below."""
    norm = max(theirs.detach().norm().item(), scale)
    return (ours - theirs).detach().norm().item() / (norm or 1.0)


def assert_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    """Every tensor to `tolerance` of its own norm, or of a hundredth of the largest where its own is only rounding."""
    assert all(torch.isfinite(tensor).all() for tensor in ours)
    largest = max(float(tensor.norm()) for tensor in theirs)
    errors = [relative_error(*pair, scale=largest / 100) for pair in zip(ours, theirs, strict=True)]
    assert max(errors) <= tolerance, errors


def tokens_of(kind: str, count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random tokens, or with many equal ones (ties in every queue), or all equal (most experts stay empty)."""
    x_TD = torch.randn(count, width, dtype=dtype)
    if kind == "duplicates":
        x_TD = x_TD[torch.randint(0, max(1, count // 4), (count,))]
    return x_TD[:1].repeat(count, 1) if kind == "equal" else x_TD


def router_of(kind: str, experts: int, width: int, dtype: torch.dtype) -> Tensor:
    """Of ordinary sharpness, sharp (gates near 0 and 1), zero (all experts tie), or with two equal rows."""
    router_ND = torch.randn(experts, width, dtype=dtype) * (5 if kind == "sharp" else 1)
    if kind == "twins":
        router_ND[-1] = router_ND[0]
    return torch.zeros_like(router_ND) if kind == "zero" else router_ND


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


# ---- 1. DeepSpeed -----------------------------------------------------------------------------------------------


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
    router_ND = router_of(router, experts, width, torch.float32)
    stock.wg.weight = nn.Parameter(router_ND)
    ours = create_layer(width, settings_of(experts, top_k, factor, minimum), torch.float32, router_ND=router_ND).gate
    x_TD = tokens_of(tokens, count, width, torch.float32)

    expected = stock(x_TD, None, True, False)
    actual = ours.train()(x_TD)
    names = ("l_aux", "capacity", "N", "index_KT", "location_KT", "gates_KT", "counts_N")
    for name, a, b in zip(names, actual, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name
    assert actual[3].shape == actual[5].shape == (top_k, count)


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
    router_ND = router_of(router, experts, width, dtype)
    layer = create_layer(width, settings_of(experts, top_k, factor, minimum), dtype, router_ND=router_ND).train()
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
    (y_TD, l_aux, counts_N, ours), (expected_TD, expected_aux, expected_N, theirs) = results
    assert torch.equal(l_aux, expected_aux) and torch.equal(counts_N, expected_N)
    assert relative_error(y_TD, expected_TD) <= tolerance
    assert_gradients(ours, theirs, tolerance)


def test_the_examples_above_cover_drops_and_empty_experts() -> None:
    """Numbers of one such problem, so that a change of the generators that made them easy would show."""
    torch.manual_seed(0)
    layer = create_layer(5, settings_of(6, 2, 0.3), torch.float32).train()
    index_KT = layer.gate(tokens_of("equal", 40, 5, torch.float32))[3]
    # capacity = ceil(40 / 6 * 0.3 * 2) = 4: two experts keep 4 choices each, 72 of 80 are dropped, four are empty
    assert (index_KT < 0).sum() == 72
    assert sorted(torch.bincount(index_KT[index_KT >= 0], minlength=6).tolist()) == [0, 0, 0, 0, 4, 4]


def test_float32_routing_under_autocast() -> None:
    """METHODS 0.2 step 1: logits are float32, although torch's autocast would make any matmul's bfloat16."""
    torch.manual_seed(0)
    layer = create_layer(64, settings_of(8, 2), torch.float32).train()
    x_TD = torch.randn(2000, 64)
    expected = layer.gate(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer.gate(x_TD)
        y_BLD = layer(x_TD[None])
        half = layer.gate(x_TD.bfloat16())
    for index in (0, 3, 5, 6):
        assert torch.equal(actual[index], expected[index])
    assert half[5].dtype == torch.float32  # tokens may well be bfloat16 there, as after open_clip's LayerNorm
    assert torch.equal(half[3], layer.gate(x_TD.bfloat16())[3])
    assert y_BLD.dtype == torch.bfloat16  # the experts do run in it
    assert relative_error(y_BLD.float(), layer(x_TD[None])) < 0.02


def test_parameters_are_marked_as_deepspeed_wants_them() -> None:
    layer = create_layer(4, settings_of(3, 2))
    assert all(is_moe_param(p) and p.group_name == "ep_size_1" for p in layer.experts.parameters())
    assert not is_moe_param(layer.gate.wg.weight)
    assert len(list(layer.parameters())) == 1 + 3 * 4


# ---- 2. the literal transcription ---------------------------------------------------------------------------------


@EXAMPLES
@given(**{name: value for name, value in PROBLEMS.items() if name not in ("top_k", "router")})
def test_the_literal_transcription_in_float64(
    seed: int, count: int, width: int, experts: int, factor: float, minimum: int, tokens: str
) -> None:
    torch.manual_seed(seed)
    layer = create_layer(width, settings_of(experts, 2, factor, minimum)).train()
    x_TD = tokens_of(tokens, min(count, 24), width, torch.float64).requires_grad_()
    weight_TD = torch.randn_like(x_TD)
    leaves = [x_TD, layer.gate.wg.weight, *layer.experts.parameters()]

    y_TD = layer(x_TD[None])[0]
    reference = literal.moe_forward(
        x_TD,
        layer.gate.wg.weight,
        [tuple(expert.parameters()) for expert in layer.experts],
        GELU,
        capacity=literal.capacity(len(x_TD), experts, factor, 2, minimum),
    )
    routes = layer.gate(x_TD)
    choices_TK = torch.stack([reference.first_T, reference.second_T], dim=1).where(reference.kept_TK, -1)
    assert torch.equal(routes[3].T.long(), choices_TK)
    assert torch.equal(routes[6], reference.expert_counts_N)
    assert_close(routes[5].T, reference.gates_TK, rtol=1e-12, atol=1e-12)
    assert relative_error(y_TD, reference.y_TD) <= 1e-12
    assert_close(layer.l_aux.double(), reference.l_aux, rtol=1e-6, atol=1e-6)  # DeepSpeed's l_aux is float32

    ours = torch.autograd.grad((y_TD * weight_TD).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((reference.y_TD * weight_TD).sum(), leaves, retain_graph=True, allow_unused=True)
    theirs = [torch.zeros_like(a) if b is None else b for a, b in zip(leaves, theirs, strict=True)]
    assert_gradients(ours, theirs, 1e-12)
    ours = torch.autograd.grad(layer.l_aux, leaves[:2])
    assert_close(ours, torch.autograd.grad(reference.l_aux, leaves[:2]), rtol=1e-4, atol=1e-5)


# ---- 3. evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_evaluation_of_a_token_does_not_depend_on_the_batch(top_k: int) -> None:
    torch.manual_seed(top_k)
    layer = create_layer(6, settings_of(5, top_k, factor=0.2, minimum=4))
    x_TD = torch.randn(40, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.train()
        assert (layer.gate(x_TD)[3] < 0).any()  # the same batch drops tokens in training
        layer.eval()
        routes = layer.gate(x_TD)
        assert (routes[3] >= 0).all() and routes[6].sum() == 40 * top_k
        together_TD = layer(x_TD[None])[0]
        alone_TD = torch.cat([layer(x_D[None, None])[0] for x_D in x_TD])  # one token: fewer than min_capacity
        assert_close(alone_TD, together_TD, rtol=1e-12, atol=1e-12)
        order_T = torch.randperm(40)
        assert_close(layer(x_TD[order_T][None])[0], together_TD[order_T], rtol=1e-12, atol=1e-12)
        crowd_TD = torch.cat([x_TD[3:4].repeat(500, 1), x_TD])  # 500 rivals for the experts of token 3
        assert_close(layer(crowd_TD[None])[0, 500:], together_TD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_evaluation_of_a_caption_does_not_depend_on_the_batch(top_k: int) -> None:
    """The shortest caption alone has fewer tokens than min_capacity, which DeepSpeed's top-1 gate refuses."""
    model = upcycled(create_dense().double(), top_k=top_k, capacity_factor=0.25).eval()
    texts = captions([0, 1, 8, 3, 8, 8])
    with torch.no_grad():
        together = model.encode_text(texts)
        alone = torch.cat([model.encode_text(text[None]) for text in texts])
    assert_close(alone, together, rtol=1e-10, atol=1e-12)


def test_sampling_of_the_second_expert_in_training_only() -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(200, 6, dtype=torch.float64)
    layer = create_layer(6, settings_of(6, 2, factor=6.0, second_expert_sampling=True))

    def route(seed: int) -> Sequence[Tensor]:
        torch.manual_seed(seed)
        return layer.gate(x_TD)

    layer.train()
    once, again, other = route(1), route(1), route(2)
    assert torch.equal(once[3], again[3])
    assert torch.equal(once[3][0], other[3][0])  # first choices are never sampled
    assert (once[3][1] != other[3][1]).float().mean() > 0.1
    probs_TN = torch.softmax(x_TD @ layer.gate.wg.weight.T, dim=1)
    chosen_KT = probs_TN.T.gather(0, once[3].long())
    assert_close(once[5], chosen_KT / chosen_KT.sum(0), rtol=1e-12, atol=0)  # the clean probabilities, renormalised

    layer.eval()
    state = torch.random.get_rng_state()
    once, other = route(1)[3], route(2)[3]
    assert torch.equal(once, other)
    assert torch.equal(once.long(), probs_TN.topk(2, dim=1).indices.T)
    torch.random.set_rng_state(state)
    layer(x_TD[None])
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing at all is drawn

    layer = create_layer(6, settings_of(6, 2, factor=6.0)).train()
    torch.random.set_rng_state(state)
    layer(x_TD[None])  # nor in training without the flag
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- 4. text padding ----------------------------------------------------------------------------------------------


def positions_of_tokens(text_BL: Tensor, end: int | None) -> list[list[bool]]:
    """By hand: up to and with the first end-of-text token; that is the highest id unless `end` names it."""
    rows = []
    for ids in text_BL.tolist():
        mark = max(ids) if end is None else end
        last = ids.index(mark) if mark in ids else 0  # what `argmax` of a row without it gives, and CLIP pools there
        rows.append([position <= last for position in range(len(ids))])
    return rows


@pytest.mark.parametrize("end", [None, 7])
@pytest.mark.parametrize("seed", range(5))
def test_padding_knows_the_tokens(end: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    text_BL = torch.randint(1, 50, (9, 12))
    ends_B = torch.randint(0, 12, (8,))
    text_BL[torch.arange(8), ends_B] = END if end is None else end
    if end is not None:
        text_BL[8][text_BL[8] == end] = 6  # a text without an end
    padding = Padding(end)
    padding.observe(nn.Identity(), (text_BL,))
    keep_BL = torch.tensor(positions_of_tokens(text_BL, end))
    assert torch.equal(padding.keep_T, keep_BL.flatten().nonzero().squeeze(1))

    x_PD = torch.randn(9 * 12, 3, dtype=torch.float64, requires_grad=True)
    y_TD = padding.compact(x_PD)
    assert torch.equal(y_TD, x_PD[keep_BL.flatten()])
    z_PD = padding.expand(y_TD)
    assert torch.equal(z_PD, x_PD * keep_BL.flatten()[:, None])
    (gradient_PD,) = torch.autograd.grad(z_PD.sum(), x_PD)
    assert torch.equal(gradient_PD, keep_BL.flatten()[:, None].expand(-1, 3).double())


@pytest.mark.parametrize("end", [None, 7])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.4, 8.0])
def test_padding_takes_no_part_in_the_layer(end: int | None, top_k: int, factor: float) -> None:
    """Capacity, l_aux, counts, other tokens: all as if only the tokens existed; zeros and no gradient at padding."""
    torch.manual_seed(0)
    text_BL = torch.randint(8, 50, (6, 11))
    text_BL[torch.arange(6), torch.tensor([0, 3, 10, 5, 2, 6])] = END if end is None else end
    keep_BL = torch.tensor(positions_of_tokens(text_BL, end))
    count = int(keep_BL.sum())
    padding = Padding(end)
    layer = create_layer(5, settings_of(4, top_k, factor, 2), padding=padding).train()
    routes: list[Any] = []
    layer.gate.register_forward_hook(lambda module, args, output: routes.append(output))

    def forward(x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        padding.observe(nn.Identity(), (text_BL,))
        y_BLD = layer(x_BLD)
        weight_BLD = torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(1), dtype=y_BLD.dtype)
        gradients = torch.autograd.grad((y_BLD * weight_BLD).sum() + layer.l_aux, [x_BLD, *layer.parameters()])
        return y_BLD, layer.l_aux, routes[-1], gradients

    x_BLD = torch.randn(6, 11, 5, dtype=torch.float64, requires_grad=True)
    y_BLD, l_aux, routed, gradients = forward(x_BLD)
    assert int(routed[1]) == literal.capacity(count, 4, factor, top_k, 2)
    if factor == 0.4:
        assert int(routed[1]) < literal.capacity(text_BL.numel(), 4, factor, top_k, 2)
        assert (routed[3] < 0).any()
    assert routed[3].shape == (top_k, count) and routed[6].sum() == count * top_k
    assert (y_BLD[~keep_BL] == 0).all() and (gradients[0][~keep_BL] == 0).all()

    # Anything else behind end-of-text: the same bits everywhere.
    noise_BLD = torch.randn_like(x_BLD) * 100 * ~keep_BL[..., None]
    again = forward((x_BLD + noise_BLD).detach().requires_grad_())
    assert torch.equal(again[0], y_BLD) and torch.equal(again[1], l_aux)
    assert all(torch.equal(a, b) for a, b in zip(again[3], gradients, strict=True))

    # The compacted tokens alone, through the same modules without padding.
    x_TD = x_BLD[keep_BL].detach().requires_grad_()
    y_TD, compact_aux, _ = layer.moe(x_TD)
    weight_BLD = torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(1), dtype=y_BLD.dtype)
    compact = torch.autograd.grad((y_TD * weight_BLD[keep_BL]).sum() + compact_aux, [x_TD, *layer.parameters()])
    assert torch.equal(y_BLD[keep_BL], y_TD) and torch.equal(l_aux, compact_aux)
    assert torch.equal(gradients[0][keep_BL], compact[0])
    assert_gradients(gradients[1:], compact[1:], 1e-12)


@pytest.mark.parametrize("changes", [{}, {"text_pool_type": "eos", "text_eos_id": 7}], ids=["argmax", "eos"])
def test_padding_takes_no_part_in_the_model(changes: dict[str, Any]) -> None:
    """Through a whole text tower in training mode, with drops: other ids behind end-of-text change no bit."""
    model = upcycled(create_dense(**changes), capacity_factor=0.5).train()
    end = changes.get("text_eos_id", END)
    texts = captions([0, 3, 9, 5, 2, 6, 8], end=end)
    texts = torch.where((texts > 0) & (texts < end), texts.clamp(max=end - 1) + (50 if end == 7 else 0), texts)
    keep_BL = torch.tensor(positions_of_tokens(texts, None if not changes else end))
    others = torch.where(keep_BL, texts, torch.randint(8, 90, texts.shape))
    assert not torch.equal(texts, others)

    results = []
    for text_BL in (texts, others):
        model.zero_grad()
        features = model.encode_text(text_BL)
        l_aux = [layer.l_aux for layer in moe_layers(model).values() if layer.layer.tower == "text"]
        (features.square().sum() + torch.stack(l_aux).sum()).backward()
        drops = [layer.gate.take_dropped() for layer in moe_layers(model).values()]
        gradients = [p.grad for name, p in model.named_parameters() if ".moe." in name and p.grad is not None]
        results.append((features, l_aux, drops, gradients))
    (features, l_aux, drops, gradients), (other_features, other_aux, other_drops, other_gradients) = results
    assert drops == other_drops and drops[-1][0] > 0 and drops[-1][1] == 2 * keep_BL.sum()
    assert torch.equal(features, other_features)
    assert torch.equal(torch.stack(l_aux), torch.stack(other_aux))
    assert len(gradients) == len(other_gradients) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


# ---- 5. METHODS S1 to S5 --------------------------------------------------------------------------------------------


def identical(top_k: int, router: str, factor: float, dtype: torch.dtype = torch.float64) -> tuple[MoEFFN, FFN]:
    """A layer of 6 copies of one FFN, and that FFN."""
    torch.manual_seed(top_k)
    dense = random_ffn(9, 12, dtype)
    router_ND = router_of(router, 6, 9, dtype)
    return create_layer(9, settings_of(6, top_k, factor), dtype, dense=dense, router_ND=router_ND).train(), dense


def dense_forward(x_TD: Tensor, weights: Iterable[Tensor]) -> Tensor:
    w1_HD, b1_H, w2_DH, b2_D = weights
    return GELU(x_TD @ w1_HD.T + b1_H) @ w2_DH.T + b2_D


ROUTERS = pytest.mark.parametrize("router", ["random", "sharp", "zero", "twins"])


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
    top_T1 = torch.softmax(x_TD @ layer.gate.wg.weight.T, dim=1).amax(1, keepdim=True)
    assert relative_error(layer(x_TD[None])[0], top_T1 * expected_TD) <= 1e-12


@ROUTERS
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 6.0])
def test_s3_copies_give_the_router_no_gradient(top_k: int, router: str, factor: float) -> None:
    """S3: with identical experts only l_aux moves a renormalising router; for k = 1 the task does too."""
    layer, _ = identical(top_k, router, factor)
    x_TD = torch.randn(50, 9, dtype=torch.float64)
    layer.gate.wg.weight.requires_grad_()
    loss = (layer(x_TD[None]) * torch.randn(50, 9, dtype=torch.float64)).sum()
    (task_ND,) = torch.autograd.grad(loss, layer.gate.wg.weight, retain_graph=True)
    (balance_ND,) = torch.autograd.grad(layer.l_aux, layer.gate.wg.weight)
    # One choice alone moves the router by this much; renormalised, they cancel to rounding.
    (scale_ND,) = torch.autograd.grad(
        torch.softmax(x_TD @ layer.gate.wg.weight.T, dim=1).amax(1).sum(), layer.gate.wg.weight
    )
    if top_k == 1:
        assert task_ND.norm() > 1e-3 * scale_ND.norm()
    else:
        assert task_ND.norm() <= 1e-12 * max(1, scale_ND.norm())
    assert balance_ND.norm() > 0


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("factor", [0.1, 0.4, 0.8])
def test_s4_capacity_leaves_survivors_dense_and_zeroes_the_rest(top_k: int, factor: float) -> None:
    """S4: a token with at least one surviving choice is dense, one with none is zero."""
    layer, dense = identical(top_k, "random", factor)
    x_TD = torch.randn(60, 9, dtype=torch.float64)
    kept_T = (layer.gate(x_TD)[3] >= 0).any(0)
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


# ---- 6. counters, 7. block 0 ----------------------------------------------------------------------------------------


def test_drop_counters() -> None:
    torch.manual_seed(0)
    layer = create_layer(5, settings_of(4, 2, factor=0.5)).train()
    expected = [0, 0]
    assert layer.gate.take_dropped() == (0, 0)
    for count in (30, 17):
        x_TD = torch.randn(count, 5, dtype=torch.float64)
        layer.eval()(x_TD[None])  # evaluation does not count
        layer.train()(x_TD[None])
        # All 2 * count choices less those that a slot of one of the 4 experts holds.
        counts_N = layer.moe.deepspeed_moe.exp_counts
        capacity = literal.capacity(count, 4, 0.5, 2, 0)
        expected[0] += 2 * count - int(counts_N.clamp(max=capacity).sum())
        expected[1] += 2 * count
    assert expected[0] > 0
    assert layer.gate.take_dropped() == tuple(expected)
    assert layer.gate.take_dropped() == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_0_can_be_upcycled(dtype: torch.dtype) -> None:
    """open_clip asks the first block's `mlp.c_fc` for its dtype before it embeds a text."""
    dense = create_dense().to(dtype)
    model = upcycled(dense, offset=0, every=1).eval()
    assert {name for name, layer in moe_layers(model).items() if layer.layer.block == 0} == {"vision.0", "text.0"}
    assert model.transformer.get_cast_dtype() == model.visual.transformer.get_cast_dtype() == dtype
    images, texts = inputs_for(dense, dtype=dtype)
    with torch.no_grad():
        for encode, data in (("encode_image", images), ("encode_text", texts)):
            ours, theirs = getattr(model, encode)(data), getattr(dense, encode)(data)
            assert ours.dtype == dtype
            assert relative_error(ours, theirs) <= (1e-5 if dtype == torch.float32 else 1e-10)
