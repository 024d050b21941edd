"""The estimate of a run's cost: against counts by hand and against the model itself."""

import re
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass

from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.model.surgery import find_layers, put_experts
from upcycle_bench.planning.estimate import dense_forward_flops, estimate, estimate_seconds, unequal_shape
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import MoE, load_protocol
from upcycle_bench.strategy import Strategy, StrategyInfo, resolve_moe
from upcycle_bench.util.errors import PluginError
from upcycle_bench.util.rng import Stream

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


def test_a_preparation_is_estimated_at_its_budget() -> None:
    smoke = PROTOCOLS["smoke"]
    sparse, whole = (estimate(smoke, strategy(name)) for name in ("sparse-upcycling", "clip-moe"))
    assert sparse.prepare_flops_at_most == 0
    assert whole.prepare_flops_at_most == whole.train_flops == sparse.train_flops
    half = estimate(smoke, strategy("btx", budget=0.5))
    assert half.prepare_flops_at_most == sparse.train_flops // 2


def test_an_untrained_control_costs_no_training() -> None:
    assert estimate(PROTOCOLS["smoke"], strategy("dense-frozen")).train_flops == 0


def test_estimated_seconds_are_positive_and_scale() -> None:
    one = estimate_seconds(PROTOCOLS["smoke"], 10**9, torch.device("cpu"))
    assert 0 < one < 600


@pytest.mark.parametrize("protocol", ["smoke", "lab", "lab-long", "clip-b32", "clip-b16"])
def test_the_longer_control_costs_what_the_mixture_costs(protocol: str) -> None:
    settings = PROTOCOLS[protocol]
    moe, longer, dense = (estimate(settings, strategy(name)) for name in ("sparse-upcycling", "dense-longer", "dense"))
    assert longer.train_flops == pytest.approx(moe.train_flops, rel=0.01)
    assert longer.samples == longer.steps * settings.train.schedule.batch_size
    assert (longer.steps > moe.steps, longer.parameters_total) == (True, dense.parameters_total)


@pytest.mark.parametrize("steps", [0, -1, 1.5, None])
def test_a_training_of_no_whole_number_of_steps_is_the_plugins_error(steps: Any) -> None:
    class Broken(Narrow):
        def training_steps(self, *_: int) -> int:
            return steps

    with pytest.raises(PluginError, match="narrow: training_steps gives"):
        estimate(PROTOCOLS["smoke"], Broken())


# ---- strategies with a shape of their own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "name", "options"),
    [
        ("smoke", "virtual-group", {"granularity": 2}),
        ("smoke", "virtual-group", {"granularity": 8}),
        ("smoke", "dense-wide", {}),
        ("lab", "virtual-group", {}),
        ("lab", "dense-wide", {}),
    ],
)
def test_the_estimate_is_what_the_model_has(protocol: str, name: str, options: dict[str, Any]) -> None:
    """Total and active parameters, counted in the model on the meta device."""
    settings, made = PROTOCOLS[protocol], strategy(name, **options)
    moe = resolve_moe(made, settings.moe)
    with torch.device("meta"):
        dense = create_clip(settings.model).model
    if made.replaces_ffn:
        inits = {}
        for layer in find_layers(dense, moe):
            ffn = FFN.of(dense.get_submodule(layer.mlp_path))
            inits[layer.name] = made.init_layer(ffn, layer, None, Stream(("test", 0)))
        model = put_experts(dense, inits, moe)
    else:
        model = dense
        for layer in find_layers(dense, moe):
            mlp = dense.get_submodule(layer.mlp_path)
            FFN.of(mlp).resized(made.ffn_hidden(FFN.of(mlp).hidden, moe)).put_into(mlp)
    costs = estimate(settings, made)
    assert parameter_counts(model) == (costs.parameters_total, costs.parameters_active)


@pytest.mark.parametrize("protocol", ["smoke", "lab", "clip-b32"])
def test_a_virtual_group_costs_a_larger_router(protocol: str) -> None:
    settings = PROTOCOLS[protocol]
    plain, fine = (estimate(settings, strategy(name)) for name in ("sparse-upcycling", "virtual-group"))
    widths = {"smoke": [64, 64, 64], "lab": [128] * 5, "clip-b32": [768] * 6 + [512] * 6}[protocol]
    experts, top_k = settings.moe.experts, settings.moe.top_k
    # Two shards for each copy: twice the router rows, and twice the second biases.
    assert fine.parameters_total - plain.parameters_total == sum(experts * d + experts * d for d in widths)
    assert fine.parameters_active - plain.parameters_active == sum(experts * d + top_k * d for d in widths)
    assert plain.forward_flops < fine.forward_flops < 1.01 * plain.forward_flops


@pytest.mark.parametrize("protocol", ["smoke", "lab", "clip-b32"])
def test_a_wide_dense_model_has_the_active_parameters_but_for_router_and_second_bias(protocol: str) -> None:
    settings = PROTOCOLS[protocol]
    moe, wide = (estimate(settings, strategy(name)) for name in ("sparse-upcycling", "dense-wide"))
    widths = {"smoke": [64, 64, 64], "lab": [128] * 5, "clip-b32": [768] * 6 + [512] * 6}[protocol]
    assert wide.parameters_total == wide.parameters_active
    missing = sum((settings.moe.experts + settings.moe.top_k - 1) * d for d in widths)
    assert moe.parameters_active - wide.parameters_active == missing
    assert wide.layers == ()
    assert 0.99 * moe.forward_flops < wide.forward_flops < moe.forward_flops


def test_flops_of_a_wide_dense_model_are_those_counted() -> None:
    with torch.device("meta"):
        clip = create_clip("smoke-vit")
    for layer in find_layers(clip.model, PROTOCOLS["smoke"].moe):
        mlp = clip.model.get_submodule(layer.mlp_path)
        FFN.of(mlp).resized(512).put_into(mlp)
    assert dense_forward_flops(clip) == estimate(PROTOCOLS["smoke"], strategy("dense-wide")).forward_flops


def test_what_costs_more_than_the_protocols_moe_does_not_compare() -> None:
    smoke = PROTOCOLS["smoke"]
    for name in ("sparse-upcycling", "dense", "dense-frozen", "dense-wide", "virtual-group"):
        assert unequal_shape(smoke, strategy(name)) is None
    # Sixteen times the router rows, 8 * 64 numbers each: 0.4 % of the FLOPs per doubling, of a model this small.
    reason = unequal_shape(smoke, strategy("virtual-group", granularity=16))
    assert reason == "13,214,720 forward FLOPs per pair, the protocol's own MoE has 12,508,160"
    assert unequal_shape(PROTOCOLS["clip-b32"], strategy("virtual-group", granularity=16)) is None


@dataclass(frozen=True, kw_only=True)
class Narrow(Strategy):
    """Experts of half the dense width."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="narrow", summary="s", paper="p", status="control")

    def ffn_hidden(self, hidden: int, moe: MoE) -> int:
        return hidden // 2


def test_what_costs_less_than_the_protocols_moe_does_not_compare_either() -> None:
    """Three layers with two chosen experts each: of an expert, (2 * 64 + 1) * 128 parameters are missing."""
    reason = unequal_shape(PROTOCOLS["smoke"], Narrow())
    said = re.match(r"([\d,]+) active parameters, the protocol's own MoE has ([\d,]+); .* forward FLOPs", reason or "")
    assert said is not None
    ours, theirs = (int(number.replace(",", "")) for number in said.groups())
    assert theirs - ours == 3 * 2 * (2 * 64 + 1) * 128


@dataclass(frozen=True, kw_only=True)
class Patient(type(strategy("sparse-upcycling"))):  # type: ignore[misc]
    """A strategy that trains `factor` times as long."""

    factor: float = 10.0

    def training_steps(self, steps: int, dense_flops: int, moe_flops: int) -> int:
        return round(steps * self.factor)


def test_a_longer_training_does_not_compare_unless_its_flops_do() -> None:
    """Ten times the steps of the mixture are ten times its FLOPs; half of them are less, and nobody's advantage."""
    protocol = PROTOCOLS["smoke"]
    reason = unequal_shape(protocol, Patient())
    assert reason is not None and reason.startswith("1,000 training steps and ") and "has 100 and " in reason
    assert unequal_shape(protocol, Patient(factor=0.5)) is None
    assert unequal_shape(protocol, strategy("dense-longer")) is None  # more steps, equal FLOPs
