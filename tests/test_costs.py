"""Costs: counted FLOPs against hand-worked ones, the estimate against what a run measures."""

import time
from typing import Any

import pytest
import torch

from upcycle_bench.costs import Meter, dense_forward_flops, estimate, estimate_seconds
from upcycle_bench.dense import create_clip
from upcycle_bench.protocol import load_protocol
from upcycle_bench.registry import load_registry
from upcycle_bench.strategy import Strategy

REGISTRY = load_registry()
PROTOCOLS = {name: load_protocol(entry.target) for name, entry in REGISTRY.protocols.items()}


def strategy(name: str, **options: Any) -> Strategy:
    return REGISTRY.strategies[name].target(**options)


def test_forward_flops_by_hand() -> None:
    """smoke-vit: vision 4 blocks, 17 tokens, text 2 blocks, 12 tokens, both 64 wide, heads of 16."""

    def block(tokens: int) -> int:
        projections = 2 * tokens * 64 * (3 * 64 + 64)  # q, k, v and out
        attention = 2 * (2 * tokens * tokens * 64)  # scores, and their product with v
        ffn = 2 * (2 * tokens * 64 * 256)
        return projections + attention + ffn

    patches = 2 * 16 * (3 * 2 * 2) * 64
    heads = 2 * 64 * 32 * 2  # both projections into the embedding
    with torch.device("meta"):
        clip = create_clip("smoke-vit")
    assert dense_forward_flops(clip) == 4 * block(17) + 2 * block(12) + patches + heads


@pytest.mark.parametrize(("name", "total"), [("clip-b32", 437_868_801), ("clip-b16", 436_212_225)])
def test_parameter_counts_of_the_published_models(name: str, total: int) -> None:
    costs = estimate(PROTOCOLS[name], strategy("sparse-upcycling"))
    dense = estimate(PROTOCOLS[name], strategy("dense"))
    assert costs.parameters_total == total
    # top-2 adds one FFN per layer, and the routers: 40,932,864 + 61,440
    assert costs.parameters_active == dense.parameters_total + 40_932_864 + 61_440
    assert len(costs.layers) == 12
    assert costs.samples == costs.steps * PROTOCOLS[name].train.schedule.batch_size


def test_experts_add_one_ffn_per_token_for_top_2() -> None:
    smoke = PROTOCOLS["smoke"]
    dense, moe = (estimate(smoke, strategy(name)) for name in ("dense", "sparse-upcycling"))
    # layers vision.1, vision.3 (17 tokens) and text.1 (12): an FFN of 4 * 64 * 256 and a router of 2 * 64 * 8 each
    assert moe.forward_flops - dense.forward_flops == (2 * 17 + 12) * (4 * 64 * 256 + 2 * 64 * 8)
    assert moe.train_flops == 3 * moe.forward_flops * 100 * 64


def test_an_untrained_control_costs_no_training() -> None:
    assert estimate(PROTOCOLS["smoke"], strategy("dense-frozen")).train_flops == 0


def test_estimated_seconds_are_positive_and_scale() -> None:
    one = estimate_seconds(PROTOCOLS["smoke"], 10**9, torch.device("cpu"))
    assert 0 < one < 600


def test_the_meter() -> None:
    meter = Meter(torch.device("cpu"))
    with meter.phase("train", count=True):
        torch.randn(8, 4) @ torch.randn(4, 16)
        time.sleep(0.01)
    with pytest.raises(RuntimeError), meter.phase("evaluate"):
        raise RuntimeError
    assert meter.phases["train"].flops == 2 * 8 * 4 * 16
    assert meter.phases["train"].seconds >= 0.01
    assert meter.phases["evaluate"].flops is None
    assert meter.phases["evaluate"].peak_memory_bytes > 10**7
