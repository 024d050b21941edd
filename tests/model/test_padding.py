"""The text tower without its padding equals open_clip's, features and gradients, dense and upcycled."""

import pytest
import torch
from torch import nn

from tests.helpers import captions, tiny_clip, upcycled
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.padding import Padding, encode_text, packs
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import configure


def model_of(kind: str) -> nn.Module:
    clip = tiny_clip(torch.float64)
    if kind == "dense":
        return clip.model.train()
    strategy = configure(load_registry().get("strategy", "drop-upcycling").target, {})
    return upcycled(strategy, clip, seed=0).model.train()


def features_and_gradients(model: nn.Module, packed: bool, text_BL: torch.Tensor) -> list[torch.Tensor]:
    """The text features, then the gradient of every parameter that has one."""
    model.zero_grad()
    text_BC = encode_text(model, text_BL) if packed else model.encode_text(text_BL)
    balance = sum((layer.l_aux for layer in moe_layers(model).values() if layer.place.tower == "text"), torch.zeros(()))
    (text_BC.square().sum() + 0.1 * balance).backward()
    # Copies: the next call writes into the same gradients.
    return [text_BC.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("lengths", [[3, 12, 5, 2], [4, 4], [2], [7, 6, 5, 4, 3, 2]])
def test_packed_equals_open_clip(kind: str, lengths: list[int]) -> None:
    model = model_of(kind)
    text_BL = captions(lengths, model.context_length, torch.Generator().manual_seed(0))
    expected = features_and_gradients(model, False, text_BL)
    actual = features_and_gradients(model, True, text_BL)
    assert len(expected) == len(actual) > 10
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11 * max(1.0, float(one.abs().max())))


def test_what_stands_behind_the_end_of_text_changes_nothing() -> None:
    model = model_of("moe")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(1, 400, (3, model.context_length), generator=generator)
    plain = captions([5, 9, 3], model.context_length, torch.Generator().manual_seed(2))
    noisy = captions([5, 9, 3], model.context_length, torch.Generator().manual_seed(2), tail=noise)
    assert not torch.equal(plain, noisy)
    assert torch.equal(encode_text(model, plain), encode_text(model, noisy))


def test_packs_only_what_it_knows() -> None:
    model = model_of("dense")
    assert packs(model)
    model.text_pool_type = "last"
    assert Padding.of(model) is None
    assert not packs(model)
