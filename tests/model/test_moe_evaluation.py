"""The MoE layer in evaluation: no token depends on its batch, and nothing is random."""

import pytest
import torch
from torch.testing import assert_close

from tests.moe_helpers import captions, create_dense, create_layer, settings_of, upcycled
from upcycle_bench.model.gate import Routes


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_evaluation_of_a_token_does_not_depend_on_the_batch(top_k: int) -> None:
    torch.manual_seed(top_k)
    layer = create_layer(6, settings_of(5, top_k, factor=0.2, minimum=4))
    x_TD = torch.randn(40, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.train()
        assert (layer.gate(x_TD).index_KT < 0).any()  # the same batch drops tokens in training
        layer.eval()
        routes = layer.gate(x_TD)
        assert (routes.index_KT >= 0).all() and routes.counts_E.sum() == 40 * top_k
        together_TD = layer(x_TD[None])[0]
        alone_TD = torch.cat([layer(x_D[None, None])[0] for x_D in x_TD])  # one token: fewer than min_capacity
        assert_close(alone_TD, together_TD, rtol=1e-12, atol=1e-12)
        order_T = torch.randperm(40)
        assert_close(layer(x_TD[order_T][None])[0], together_TD[order_T], rtol=1e-12, atol=1e-12)
        crowd_TD = torch.cat([x_TD[3:4].repeat(500, 1), x_TD])  # 500 tokens that choose the experts of token 3
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

    def route(seed: int) -> Routes:
        torch.manual_seed(seed)
        return layer.gate(x_TD)

    layer.train()
    once, again, other = route(1), route(1), route(2)
    assert torch.equal(once.index_KT, again.index_KT)
    assert torch.equal(once.index_KT[0], other.index_KT[0])  # first choices are never sampled
    assert (once.index_KT[1] != other.index_KT[1]).float().mean() > 0.1
    probs_TE = torch.softmax(x_TD @ layer.router_weight.T, dim=1)
    chosen_KT = probs_TE.T.gather(0, once.index_KT.long())
    assert_close(once.gates_KT, chosen_KT / chosen_KT.sum(0), rtol=1e-12, atol=0)  # probabilities without the noise

    layer.eval()
    state = torch.random.get_rng_state()
    once, other = route(1), route(2)
    assert torch.equal(once.index_KT, other.index_KT)
    assert torch.equal(once.index_KT.long(), probs_TE.topk(2, dim=1).indices.T)
    torch.random.set_rng_state(state)
    layer(x_TD[None])
    assert torch.equal(torch.random.get_rng_state(), state)  # evaluation draws nothing

    layer = create_layer(6, settings_of(6, 2, factor=6.0)).train()
    torch.random.set_rng_state(state)
    layer(x_TD[None])  # nor does training without the flag
    assert torch.equal(torch.random.get_rng_state(), state)
