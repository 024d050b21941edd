"""From a dense CLIP to experts and routers: calibrate, then ask the strategy layer by layer. Needs no process group.

    moe = resolve_moe(strategy, protocol.moe)                               # upcycle_bench.strategy
    inits = make_experts(strategy, dense_model, moe, init_seed, calibration)
    model = put_experts(dense_model, inits, moe)                            # upcycle_bench.model.surgery

    model = make_dense(strategy, dense_model, moe, init_seed)               # of a strategy that replaces no FFN

Where a strategy trains first (`upcycling.preparation`), its model stands in place of `dense_model`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from upcycle_bench import protocol
from upcycle_bench.model.ffn import FFN, Layer, LayerInit, linears
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.strategy import Strategy
from upcycle_bench.upcycling.calibration import calibrate
from upcycle_bench.util.errors import PluginError
from upcycle_bench.util.meter import Phase
from upcycle_bench.util.rng import Stream
from upcycle_bench.util.threads import one_thread

# How many pairs are wanted -> batches of (images [B, 3, H, W] as the model takes them, texts [B, L]), on its device.
CalibrationSource = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
# The name of a part of the work -> a context that measures it (`util.meter.Meter.phase`).
Phases = Callable[[str], contextlib.AbstractContextManager[Phase]]


ONE_CHOICE = (
    "top_k=1: an expert's output is scaled by the router's probability of it, since DeepSpeed renormalises no single "
    "gate; so no strategy keeps the dense function, and the function drift says how far off the model starts"
)


def unmeasured(name: str) -> contextlib.AbstractContextManager[Phase]:
    """A phase that nobody asks for."""
    return contextlib.nullcontext(Phase())


def make_experts(
    strategy: Strategy,
    dense: Any,
    moe: protocol.MoE,
    init_seed: int,
    calibration: CalibrationSource,
    branches: Sequence[Any] | None = None,
    phase: Phases = unmeasured,
) -> dict[str, LayerInit]:
    """The strategy's experts and router for every layer of `dense` (an open_clip CLIP), by layer name.

    `moe` are the strategy's settings. `branches` are the dense CLIPs of a `Preparation`: `init_layer` gets their FFNs
    as `calibration`. The work is measured as `phase("calibrate")`, if the strategy calibrates, and `phase("upcycle")`.

    Warns of a single choice. Raises PluginError for a strategy that changes the dense FFN, makes plain experts of
    another width than its `ffn_hidden`, or notes a number that is not finite.
    """
    if branches is not None and strategy.calibration_pairs:
        raise PluginError(f"{strategy.info.name} both prepares and calibrates; a strategy may do one of them")
    if moe.top_k == 1:
        warnings.warn(ONE_CHOICE, stacklevel=2)
    root = Stream(("strategy", strategy.info.name, init_seed))
    layers = find_layers(dense, moe)
    ffns = {layer.name: FFN.of(dense.get_submodule(layer.mlp_path)) for layer in layers}
    seen: dict[str, Any] = {}  # what `init_layer` gets as `calibration`, by layer name
    if branches is not None:
        for layer in layers:
            seen[layer.name] = [FFN.of(branch.get_submodule(layer.mlp_path)) for branch in branches]
    if strategy.calibration_pairs:
        for layer in layers:
            seen[layer.name] = strategy.calibrator(ffns[layer.name], layer, root.child(layer.name, "calibration"))
        with phase("calibrate") as cost:
            cost.samples = calibrate(dense, layers, seen, calibration(strategy.calibration_pairs))
    inits = {}
    with phase("upcycle"):
        for layer in layers:
            ffn, rng = ffns[layer.name], root.child(layer.name)
            inits[layer.name] = _init_layer(strategy, ffn, layer, moe, seen.get(layer.name), rng)
    return inits


def _init_layer(
    strategy: Strategy, ffn: FFN, layer: Layer, moe: protocol.MoE, calibration: Any, rng: Stream
) -> LayerInit:
    """`Strategy.init_layer`, on one thread and with its result checked."""
    where = f"{strategy.info.name}: {layer.name}"
    versions = [tensor._version for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)]  # count changes in place
    with one_thread():
        init = strategy.init_layer(ffn, layer, calibration, rng)
    if versions != [tensor._version for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)]:
        raise PluginError(f"{where}: init_layer changed the dense FFN in place; work on copies")
    notes = {name: float(value) for name, value in init.notes.items()}
    if not all(map(math.isfinite, notes.values())):
        raise PluginError(f"{where}: a note is not a finite number: {notes}")
    hidden = strategy.ffn_hidden(ffn.hidden, moe)
    for number, expert in enumerate(init.experts):
        _check_hidden(expert, hidden, f"{where}: expert {number}", plain=hidden != ffn.hidden)
    return replace(init, notes=notes)


def make_dense(strategy: Strategy, dense: Any, moe: protocol.MoE, init_seed: int) -> Any:
    """A copy of `dense`, changed by the `init_dense` of a strategy without experts.

    Raises PluginError when an FFN's width is not that of the strategy's `ffn_hidden`, or the tensors have other names.
    """
    model = copy.deepcopy(dense)
    layers = find_layers(model, moe)
    with torch.no_grad():
        strategy.init_dense(model, layers, Stream(("strategy", strategy.info.name, init_seed)))
    if model.state_dict().keys() != dense.state_dict().keys():
        raise PluginError(f"{strategy.info.name}: init_dense adds or removes tensors; it may only change them")
    for layer in layers:
        hidden = strategy.ffn_hidden(FFN.of(dense.get_submodule(layer.mlp_path)).hidden, moe)
        mlp = model.get_submodule(layer.mlp_path)
        _check_hidden(mlp, hidden, f"{strategy.info.name}: {layer.name}", plain=True)
    return model


def _check_hidden(module: Any, hidden: int, where: str, plain: bool) -> None:
    """Hold an FFN to `ffn_hidden`, by which costs are estimated. A strategy's own module passes, if not `plain`."""
    pair = linears(module)
    found = pair[0].out_features if pair else None
    if found != hidden and (plain or found is not None):
        raise PluginError(f"{where}: its hidden width is {found}, but ffn_hidden says {hidden}")
