"""Measures of routers and experts: sparse upcycling at step 0, numbers worked by hand, and no hook left behind."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.moe_helpers import MOE, create_dense, inputs_for, upcycled
from upcycle_bench.model.measure import diagnose, expert_cosine, expert_distance, pair_retrieval
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import find_layers


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_sparse_upcycling_at_step_0() -> None:
    dense = create_dense().train()
    model = upcycled(dense)
    before = hooks(model), hooks(dense)
    report = diagnose(model, dense, [inputs_for(dense), inputs_for(dense, 4)])
    assert (hooks(model), hooks(dense)) == before == (1, 0)  # the padding's own
    assert not model.training and not dense.training

    assert list(report["layers"]) == [layer.name for layer in find_layers(dense, MOE)]
    assert list(report["feature_cosine_with_dense"]) == ["vision", "text"]
    for cosine in report["feature_cosine_with_dense"].values():
        assert cosine == pytest.approx(1, abs=1e-6)
    assert all(0 <= drift < 1e-5 for drift in report["feature_drift"].values())
    pairs = report["training_pair_retrieval"]
    assert pairs["pairs"] == len(inputs_for(dense)[0]) + 4
    assert pairs["chance_log_likelihood"] == -math.log(pairs["pairs"])
    assert pairs["model"] == pytest.approx(pairs["dense"], abs=1e-5)
    for layer in report["layers"].values():
        assert layer["function_drift"] < 1e-6
        assert layer["expert_cosine"] == pytest.approx(1, abs=1e-12)
        assert layer["expert_distance"] == 0
        assert 0 < layer["router_entropy"] < math.log(8)
        assert len(layer["load"]) == 8
        assert sum(layer["load"]) == pytest.approx(1, abs=8e-6)  # shares are rounded to six decimals
        assert max(layer["load"]) <= 0.5  # an expert is at most one of a token's two choices


@pytest.mark.parametrize(("moved", "drift"), [(0.0, 0.0), (0.1, 1.0)])
def test_an_ffn_that_gives_zeros_has_a_drift(moved: float, drift: float) -> None:
    """As a block that was added and starts as the identity; there is nothing to compare with."""
    dense = create_dense()
    for part in dense.transformer.resblocks[1].mlp.c_proj.parameters():
        nn.init.zeros_(part)
    model = upcycled(dense)
    for expert in moe_layers(model)["text.1"].experts:
        nn.init.constant_(expert.c_proj.bias, moved)
    assert diagnose(model, dense, [inputs_for(dense)])["layers"]["text.1"]["function_drift"] == drift


def test_a_zero_router_is_uniform() -> None:
    """Entropy ln E; all experts tie, so that every token goes to the first two."""
    dense = create_dense()
    model = upcycled(dense)
    for layer in moe_layers(model).values():
        nn.init.zeros_(layer.router_weight)
    report = diagnose(model, dense, [inputs_for(dense)])
    for layer in report["layers"].values():
        assert layer["router_entropy"] == pytest.approx(math.log(8), abs=1e-6)
        assert layer["load"] == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
        assert layer["function_drift"] < 1e-6


def test_entropy_and_load_by_hand() -> None:
    """Load and entropy of one layer from its own inputs, over two batches of different size."""
    dense = create_dense()
    model = upcycled(dense)
    layer = moe_layers(model)["text.3"]
    seen = []
    handle = layer.moe.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    report = diagnose(model, dense, [inputs_for(dense, 5), inputs_for(dense, 2)])
    handle.remove()
    x_TD = torch.cat(seen)
    assert len(x_TD) == (1 + 2 + 3 + 4 + 5) + (1 + 2)  # tokens up to end-of-text
    probs_TE = torch.softmax(x_TD.double() @ layer.router_weight.detach().double().T, dim=1)
    entropy = -(probs_TE * probs_TE.log()).sum(1).mean()
    assert report["layers"]["text.3"]["router_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    share_E = torch.bincount(probs_TE.topk(2, dim=1).indices.flatten(), minlength=8) / (2 * len(x_TD))
    assert_close(torch.tensor(report["layers"]["text.3"]["load"]), share_E, rtol=0, atol=1e-6)


def test_drift_and_cosine_see_a_change_where_it_is() -> None:
    """Experts that answer 1.5 times the dense FFN are off by half of it, in their own layer only."""
    dense = create_dense()
    model = upcycled(dense)
    with torch.no_grad():
        for expert in moe_layers(model)["vision.3"].experts:
            expert.c_proj.weight.mul_(1.5)
            expert.c_proj.bias.mul_(1.5)
    report = diagnose(model, dense, [inputs_for(dense)])
    for name, layer in report["layers"].items():
        assert layer["function_drift"] == pytest.approx(0.5 if name == "vision.3" else 0, abs=1e-6), name
        assert layer["expert_cosine"] == pytest.approx(1, abs=1e-12)
    assert report["feature_cosine_with_dense"]["vision"] < 1 - 1e-6
    assert report["feature_cosine_with_dense"]["text"] == pytest.approx(1, abs=1e-6)


def test_hooks_go_after_an_error() -> None:
    dense = create_dense()
    model = upcycled(dense)
    before = hooks(model), hooks(dense)

    def batches() -> Iterator[Any]:
        yield inputs_for(dense)
        raise OSError("a shard is gone")

    with pytest.raises(OSError, match="a shard is gone"):
        diagnose(model, dense, batches())
    assert (hooks(model), hooks(dense)) == before


def test_a_dense_model_has_no_layers() -> None:
    dense = create_dense()
    report = diagnose(dense, dense, [inputs_for(dense)])
    assert report["layers"] == {}
    assert report["feature_cosine_with_dense"] == {"vision": pytest.approx(1), "text": pytest.approx(1)}


def experts_of(*rows: list[float]) -> list[nn.Module]:
    """Experts whose flattened parameters are these rows: a weight [1, len - 1], then a bias."""
    experts = []
    for row in rows:
        expert = nn.Linear(len(row) - 1, 1)
        expert.weight.data = torch.tensor([row[:-1]])
        expert.bias.data = torch.tensor(row[-1:])
        experts.append(expert)
    return experts


def test_expert_cosine_by_hand() -> None:
    assert expert_cosine(experts_of([1.0, 0.0], [0.0, 5.0])) == pytest.approx(0)
    assert expert_cosine(experts_of([1.0, 2.0], [-3.0, -6.0])) == pytest.approx(-1)
    assert expert_cosine(experts_of([1.0, 2.0, 2.0], [2.0, 4.0, 4.0])) == pytest.approx(1)
    # pairs: (3, 4).(1, 0) / 5 = 0.6, (3, 4).(0, 1) / 5 = 0.8, (1, 0).(0, 1) = 0; mean 1.4 / 3
    assert expert_cosine(experts_of([3.0, 4.0], [1.0, 0.0], [0.0, 2.0])) == pytest.approx(1.4 / 3)


def test_expert_distance_by_hand() -> None:
    assert expert_distance(experts_of([1.0, 2.0], [1.0, 2.0])) == 0
    assert expert_distance(experts_of([3.0, 0.0], [0.0, 3.0])) == pytest.approx(2**0.5)
    assert expert_distance(experts_of([1.0, 2.0], [-1.0, -2.0])) == pytest.approx(2)
    # pairs: |(3, 4) - (0, 4)| = 3 over sqrt((25 + 16) / 2); (3, 4) twice: 0; so two of three pairs differ
    assert expert_distance(experts_of([3.0, 4.0], [0.0, 4.0], [3.0, 4.0])) == pytest.approx(2 * 3 / 20.5**0.5 / 3)


def test_pair_retrieval_by_hand() -> None:
    """Images (1, 0), (0, 1) and texts (2, 0), (3, 0) at scale ln 3: logits ln 3 for the first image's row, else 0."""
    image_BC, text_BC = torch.eye(2), torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    found = pair_retrieval(image_BC, text_BC, torch.tensor(3.0).log())
    # image to text: both rows are ties, ln 1/2; text to image: right with 3/4, wrong with 1/4
    images, texts = math.log(0.5), (math.log(0.75) + math.log(0.25)) / 2
    assert found["log_likelihood"] == pytest.approx((images + texts) / 2)
    assert found["recall@1"] == pytest.approx(0.5)  # the first of a tie


def test_feature_drift_by_hand() -> None:
    """A text projection 1.5 times as large: off by half, at cosine 1; retrieval normalises and sees nothing."""
    dense = create_dense()
    model = upcycled(dense)
    with torch.no_grad():
        model.text_projection.mul_(1.5)
    report = diagnose(model, dense, [inputs_for(dense)])
    assert report["feature_drift"] == {"vision": pytest.approx(0, abs=1e-5), "text": pytest.approx(0.5, abs=1e-5)}
    assert report["feature_cosine_with_dense"]["text"] == pytest.approx(1, abs=1e-6)
    pairs = report["training_pair_retrieval"]
    assert pairs["model"]["log_likelihood"] == pytest.approx(pairs["dense"]["log_likelihood"], abs=1e-4)
