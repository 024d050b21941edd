"""What every registered strategy, ours or a plugin's, must declare and make, on a tiny CLIP.

`test_model.py` says what its model must do. Strategies that replace no FFN have branches of their own.
"""

import copy
import dataclasses
import inspect
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.contract.imports import imported
from tests.helpers import (
    Initialised,
    TinyPairs,
    changes_model,
    equal,
    initialise,
    threads,
    tiny_clip,
    tiny_moe,
    upcycled,
)
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import Status, Strategy, StrategyInfo, configure, resolve_moe
from upcycle_bench.upcycling.initialise import CalibrationSource, make_dense, make_experts
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

REGISTRY = load_registry()


@pytest.fixture(params=sorted(REGISTRY.strategies))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def strategy(name: str) -> Strategy:
    return configure(REGISTRY.strategies[name].target, {})


def model_tensors(strategy: Strategy, seed: int, **changes: Any) -> dict[str, Tensor]:
    """All tensors in the model of a strategy that replaces no FFN."""
    return upcycled(strategy, tiny_clip(), seed, tiny_moe(**changes)).model.state_dict()


def tensors(made: Initialised) -> dict[str, Tensor]:
    """All tensors that a strategy made, by unique names."""
    named = {}
    for layer, init in made.inits.items():
        named[f"{layer}.router"] = init.router_ED
        for number, expert in enumerate(init.experts):
            named |= {f"{layer}.{number}.{key}": value for key, value in expert.state_dict().items()}
    return named


def calibration_inputs(clip: Clip) -> CalibrationSource:
    """Pairs for `make_experts`: the ones that `helpers.initialise` takes with seed 0."""

    def inputs(pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in TinyPairs(clip).calibration(Stream(("calibration", 0)), pairs, 256):
            yield clip.normalise(batch.images), batch.texts

    return inputs


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


# ---- What a strategy declares -------------------------------------------------------------------------------------


def test_every_plugin_loads() -> None:
    assert REGISTRY.broken == {}
    assert {"cluster-aware", "dense", "dense-frozen", "sparse-upcycling"} <= REGISTRY.strategies.keys()


def test_info_is_filled(name: str) -> None:
    entry = REGISTRY.strategies[name]
    info = entry.target.info
    assert issubclass(entry.target, Strategy)
    assert isinstance(info, StrategyInfo)
    assert info.name == name
    assert name == name.lower().replace("_", "-").strip("-")
    for text in (info.summary, info.paper):
        assert text.strip()
        assert "\n" not in text
    assert info.status in get_args(Status)
    assert isinstance(info.reconstructed, tuple)
    assert all(isinstance(part, str) and part for part in info.reconstructed)
    assert info.reconstructed or info.status != "reconstructed"  # a reconstruction says what it reconstructed
    assert len(info.footing) <= 40 and "\n" not in info.footing  # it stands in tables
    assert info.url == "" or info.url.startswith("https://")
    assert entry.distribution
    for text in (inspect.getmodule(entry.target).__doc__, entry.target.__doc__):
        assert text
        assert text.strip()


def test_facts_are_consistent(strategy: Strategy) -> None:
    assert all(type(fact) is bool for fact in (strategy.replaces_ffn, strategy.trains, strategy.preserves_function))
    factor = getattr(strategy, "compute", 1)  # controls that are trained for a given compute
    steps = [strategy.training_steps(steps, 100, 130) for steps in (1, 10, 800)]
    assert steps in ([round(factor * each) for each in counts] for counts in ([1, 10, 800], [1.3, 13, 1040]))
    assert isinstance(strategy.calibration_pairs, int)
    assert strategy.calibration_pairs >= 0
    if strategy.replaces_ffn:
        assert type(strategy).init_layer is not Strategy.init_layer
        assert (strategy.calibration_pairs > 0) == (type(strategy).calibrator is not Strategy.calibrator)
        assert type(strategy).init_dense is Strategy.init_dense
        assert strategy.calibration_pairs == 0 or type(strategy).prepare is Strategy.prepare  # not both
    else:
        assert strategy.preserves_function
        assert strategy.calibration_pairs == 0
        assert strategy.moe_settings(tiny_moe()) == tiny_moe()
        assert strategy.loss({}, Stream(("loss", 0)), 100) is None
    hidden = strategy.ffn_hidden(256, resolve_moe(strategy, tiny_moe()))
    assert type(hidden) is int and hidden > 0
    assert changes_model(strategy) or hidden == 256


def test_config_is_a_frozen_keyword_only_dataclass(strategy: Strategy) -> None:
    target = type(strategy)
    assert dataclasses.is_dataclass(target)
    assert target.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(target))
    for field in dataclasses.fields(target):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(strategy, field.name, getattr(strategy, field.name))
    assert configure(target, {}) == strategy


def test_config_is_strict_json(strategy: Strategy) -> None:
    config = strategy.config()
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    assert list(config) == [field.name for field in dataclasses.fields(type(strategy))]
    text = {key: str(value) for key, value in config.items() if value is not None}  # as on the command line
    assert configure(type(strategy), text) == strategy


def test_config_refuses_what_a_record_cannot_hold(strategy: Strategy) -> None:
    for key, value in strategy.config().items():
        for bad in ("inf", "-inf", "nan") if isinstance(value, float) else ():
            with pytest.raises(UserError, match=f"^{strategy.info.name}: {key}: ") as error:
                configure(type(strategy), {key: bad})
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown option"):
        configure(type(strategy), {"no_such_option": "1"})


def test_file_imports_only_what_strategies_may(name: str) -> None:
    modules = imported(Path(inspect.getsourcefile(REGISTRY.strategies[name].target)))
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "pydantic", "upcycle_bench"}
    assert {module.partition(".")[0] for module in modules} <= allowed  # a relative import has an empty first part
    siblings = ("upcycle_bench.strategies", "upcycle_bench.suites")
    assert not [module for module in modules if module.startswith(siblings)]


# ---- What it makes ------------------------------------------------------------------------------------------------


def test_helper_walks_the_path_of_a_run(strategy: Strategy) -> None:
    clip = tiny_clip()
    if not strategy.replaces_ffn:  # the dense model stays, or init_dense changes a copy
        model = upcycled(strategy, clip, 0).model
        assert (model is clip.model) != changes_model(strategy)
        assert equal(make_dense(strategy, clip.model, tiny_moe(), 0).state_dict(), model.state_dict())
        return
    ours = initialise(strategy, clip, seed=0)
    inits = make_experts(
        strategy, ours.model, resolve_moe(strategy, tiny_moe()), 0, calibration_inputs(clip), ours.branches
    )
    assert list(inits) == list(ours.inits)
    assert equal(tensors(ours), tensors(replace(ours, inits=inits)))


def test_same_seed_same_bits_other_seed_other_weights(strategy: Strategy) -> None:
    clip = tiny_clip()
    if not strategy.replaces_ffn:
        first, again, other = (model_tensors(strategy, seed) for seed in (0, 0, 1))
        assert equal(first, again)
        assert equal(first, other) != changes_model(strategy)
        assert equal(first, snapshot(clip.model)) != changes_model(strategy)
        return
    first, again, other = (tensors(initialise(strategy, clip, seed)) for seed in (0, 0, 1))
    assert equal(first, again)
    assert not equal(first, other)
    for layer in ("vision.1", "text.1"):  # every layer has a stream of its own
        keys = [key for key in first if key.startswith(layer)]
        assert not all(torch.equal(first[key], other[key]) for key in keys)
    assert not torch.equal(first["vision.1.router"], first["vision.3.router"])


def test_init_layer_is_a_pure_function(strategy: Strategy) -> None:
    clip = tiny_clip()
    if not strategy.replaces_ffn:
        with pytest.raises(NotImplementedError):
            strategy.init_layer(*[None] * 4)  # type: ignore[arg-type]
        if changes_model(strategy):  # two calls must not hand out the same tensors
            models = [upcycled(strategy, clip, 0).model for _ in range(2)]
            pointers = [{p.data_ptr() for p in model.parameters()} for model in (*models, clip.model)]
            assert sum(map(len, pointers)) == len(set.union(*pointers))
        return
    made = initialise(strategy, clip, seed=0)
    again = {
        layer.name: strategy.init_layer(
            made.ffns[layer.name], layer, made.calibrators.get(layer.name), made.streams[layer.name]
        )
        for layer in made.layers
    }
    assert equal(tensors(made), tensors(replace(made, inits=again)))
    for layer in made.layers:
        assert dict(again[layer.name].notes) == dict(made.inits[layer.name].notes)
        shared = storages(again[layer.name]) & storages(made.inits[layer.name])
        assert not shared, "two calls must not hand out the same tensors"


def storages(init: Any) -> set[int]:
    return {tensor.data_ptr() for expert in init.experts for tensor in expert.parameters()} | {
        init.router_ED.data_ptr()
    }


def test_order_of_layers_does_not_matter(strategy: Strategy) -> None:
    clip = tiny_clip()
    if not strategy.replaces_ffn:
        model = copy.deepcopy(clip.model)
        root = Stream(("strategy", strategy.info.name, 0))
        with torch.no_grad():
            strategy.init_dense(model, find_layers(model, tiny_moe())[::-1], root)
        assert equal(model.state_dict(), model_tensors(strategy, 0))
        return
    arrangements: list[Callable[[list[Any]], list[Any]]] = [list, lambda layers: layers[::-1]]
    forward, backward = (tensors(initialise(strategy, clip, 0, arrange=arrange)) for arrange in arrangements)
    assert equal(forward, backward)


def test_number_of_threads_does_not_matter(strategy: Strategy) -> None:
    clip = tiny_clip()
    few = {"every": 4}  # two threads crawl on a busy machine: one layer per tower will do
    made = []
    base = initialise(strategy, clip, 0, moe=tiny_moe(**few)) if strategy.replaces_ffn else None
    for number in (1, 2):
        with threads(number):
            if base is not None:  # as a run makes them
                moe = resolve_moe(strategy, tiny_moe(**few))
                inits = make_experts(strategy, base.model, moe, 0, calibration_inputs(clip), base.branches)
                made.append(tensors(replace(base, inits=inits)))
            else:
                made.append(model_tensors(strategy, 0, **few))
    assert equal(*made)
    assert torch.get_num_threads() == 1


def test_neither_the_dense_model_nor_global_generators_are_touched(strategy: Strategy) -> None:
    clip = tiny_clip()
    clip.model.train()
    before = snapshot(clip.model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    if strategy.replaces_ffn:
        initialise(strategy, clip, seed=0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])
    assert states[2] == random.getstate()
    upcycled(strategy, clip, seed=0)
    assert equal(clip.model.state_dict(), before)
    assert clip.model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in clip.model.parameters())
    hooks = [hook for module in clip.model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert hooks == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_notes(strategy: Strategy, dtype: torch.dtype) -> None:
    clip = tiny_clip(dtype)
    if not strategy.replaces_ffn:
        model = upcycled(strategy, clip, 0).model
        assert moe_layers(model) == {}
        assert {(value.dtype, bool(value.isfinite().all())) for value in model.state_dict().values()} == {(dtype, True)}
        return
    for experts in (2, 4):
        moe = resolve_moe(strategy, tiny_moe(experts=experts))
        made = initialise(strategy, clip, seed=0, moe=tiny_moe(experts=experts))
        for layer in made.layers:
            ffn, init = made.ffns[layer.name], made.inits[layer.name]
            assert init.router_ED.shape == (moe.experts, ffn.width)
            assert init.router_ED.dtype == dtype
            assert torch.isfinite(init.router_ED).all()
            assert len(init.experts) == moe.experts
            x_TD = torch.randn(5, ffn.width, generator=torch.Generator().manual_seed(0)).to(dtype)
            for expert in init.experts:
                y_TD = expert(x_TD)
                assert (y_TD.shape, y_TD.dtype) == (x_TD.shape, dtype)
                assert torch.isfinite(y_TD).all()
                assert expert(x_TD[:0]).shape == (0, ffn.width)  # an expert may get no token
            json.dumps(dict(init.notes), allow_nan=False)
            assert all(math.isfinite(value) for value in init.notes.values())


def test_every_parameter_is_accounted_for(strategy: Strategy) -> None:
    clip = tiny_clip()
    model = upcycled(strategy, clip, seed=0).model
    ours = dict(model.named_parameters())
    base = initialise(strategy, clip, seed=0).model if strategy.replaces_ffn else clip.model
    dense = dict(base.named_parameters())
    if not strategy.replaces_ffn:
        assert ours.keys() == dense.keys()
        assert all((ours[key] is dense[key]) != changes_model(strategy) for key in dense)
        assert all(parameter.requires_grad for parameter in ours.values())
        moe = tiny_moe()
        for layer in find_layers(clip.model, moe):
            found, usual = (FFN.of(each.get_submodule(layer.mlp_path)) for each in (model, clip.model))
            assert found.hidden == strategy.ffn_hidden(usual.hidden, moe)
        return
    layers = moe_layers(model)
    assert list(layers) == [layer.name for layer in initialise(strategy, clip, seed=0).layers]
    prefixes = tuple(f"{layer.place.mlp_path}." for layer in layers.values())
    kept = {key for key in dense if not key.startswith(prefixes)}
    assert {key for key in ours if not key.startswith(prefixes)} == kept
    for key in kept:
        assert torch.equal(ours[key], dense[key]), key
        assert ours[key].data_ptr() != dense[key].data_ptr(), key
    for layer in layers.values():  # inside an MoE layer: a router, experts and nothing else
        made = {id(parameter) for parameter in (layer.router_weight, *layer.experts.parameters())}
        assert made == {id(parameter) for parameter in layer.parameters()}
    for _ in strategy.stages(100):
        strategy.next_stage(layers)
    assert all(parameter.requires_grad for parameter in model.parameters())  # in the end
