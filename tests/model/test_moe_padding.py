"""Text padding takes no part: in what `Padding` keeps, in an MoE layer, in a whole text tower.

Shape suffixes: P = B L positions.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.literal import moe_layer as literal
from tests.moe_helpers import END, assert_gradients, captions, create_dense, create_layer, settings_of, upcycled
from upcycle_bench.model.gate import Routes
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.padding import Padding


def positions_of_tokens(text_BL: Tensor, end: int | None) -> list[list[bool]]:
    """By hand: up to and with the first end-of-text token; that is the highest id unless `end` names it."""
    rows = []
    for ids in text_BL.tolist():
        mark = max(ids) if end is None else end
        last = ids.index(mark) if mark in ids else 0  # `argmax` of a row without the mark, where CLIP pools
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
    routes: list[Routes] = []
    layer.gate.register_forward_hook(lambda module, args, output: routes.append(output))

    def forward(x_BLD: Tensor) -> tuple[Tensor, Tensor, Routes, tuple[Tensor, ...]]:
        padding.observe(nn.Identity(), (text_BL,))
        y_BLD = layer(x_BLD)
        weight_BLD = torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(1), dtype=y_BLD.dtype)
        gradients = torch.autograd.grad((y_BLD * weight_BLD).sum() + layer.l_aux, [x_BLD, *layer.parameters()])
        return y_BLD, layer.l_aux, routes[-1], gradients

    x_BLD = torch.randn(6, 11, 5, dtype=torch.float64, requires_grad=True)
    y_BLD, l_aux, routed, gradients = forward(x_BLD)
    assert int(routed.capacity) == literal.capacity(count, 4, factor, top_k, 2)
    if factor == 0.4:
        assert int(routed.capacity) < literal.capacity(text_BL.numel(), 4, factor, top_k, 2)
        assert (routed.index_KT < 0).any()
    assert routed.index_KT.shape == (top_k, count) and routed.counts_E.sum() == count * top_k
    assert (y_BLD[~keep_BL] == 0).all() and (gradients[0][~keep_BL] == 0).all()

    # Other values behind end-of-text change no bit.
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
        l_aux = [layer.l_aux for layer in moe_layers(model).values() if layer.place.tower == "text"]
        (features.square().sum() + torch.stack(l_aux).sum()).backward()
        drops = [layer.take_dropped() for layer in moe_layers(model).values()]
        gradients = [p.grad for name, p in model.named_parameters() if ".moe." in name and p.grad is not None]
        results.append((features, l_aux, drops, gradients))
    (features, l_aux, drops, gradients), (other_features, other_aux, other_drops, other_gradients) = results
    assert drops == other_drops and drops[-1][0] > 0 and drops[-1][1] == 2 * keep_BL.sum()
    assert torch.equal(features, other_features)
    assert torch.equal(torch.stack(l_aux), torch.stack(other_aux))
    assert len(gradients) == len(other_gradients) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
