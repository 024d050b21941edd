"""The MoE layer in evaluation: no token depends on its batch, and nothing is random."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.moe_helpers import captions, create_dense, create_layer, settings_of, upcycled


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
