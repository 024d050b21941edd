"""From a dense CLIP to experts and routers: calibrate, then ask the strategy layer by layer. Needs no process group.

inits = make_experts(strategy, dense_model, protocol.moe, init_seed, inputs)
model = upcycle(dense_model, inits, protocol.moe)                                  # upcycle_bench.surgery
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from upcycle_bench import protocol
from upcycle_bench.calibration import calibrate
from upcycle_bench.errors import PluginError
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Calibrator, Layer, LayerInit, Strategy
from upcycle_bench.surgery import find_layers

# Number of pairs wanted -> batches of (images [B, 3, H, W] as the model takes them, texts [B, L]), on its device.
CalibrationSource = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
# Measures the part of the work of that name (`costs.Meter.phase`).
Phases = Callable[[str], contextlib.AbstractContextManager[Any]]


def make_experts(
    strategy: Strategy,
    dense: Any,
    moe: protocol.MoE,
    init_seed: int,
    calibration: CalibrationSource,
    phase: Phases = contextlib.nullcontext,
) -> dict[str, LayerInit]:
    """The strategy's experts and router for every layer of `dense` (an open_clip CLIP), by layer name.

    Done in `phase("calibrate")`, if the strategy asks for calibration, and `phase("upcycle")`.

    Raises PluginError when the strategy changes the dense FFN or notes a number that is not finite.
    """
    root = Stream(("strategy", strategy.info.name, init_seed))
    layers = find_layers(dense, moe)
    ffns = {layer.name: FFN.of(dense.get_submodule(layer.mlp_path)) for layer in layers}
    calibrators = {}
    if strategy.calibration_pairs:
        for layer in layers:
            calibrators[layer.name] = strategy.calibrator(
                ffns[layer.name], layer, root.child(layer.name, "calibration")
            )
        with phase("calibrate"):
            calibrate(dense, layers, calibrators, calibration(strategy.calibration_pairs))
    with phase("upcycle"):
        return {layer.name: _init_layer(strategy, ffns[layer.name], layer, calibrators, root) for layer in layers}


def _init_layer(
    strategy: Strategy, ffn: FFN, layer: Layer, calibrators: Mapping[str, Calibrator], root: Stream
) -> LayerInit:
    where = f"{strategy.info.name}: {layer.name}"
    versions = [tensor._version for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)]
    init = strategy.init_layer(ffn, layer, calibrators.get(layer.name), root.child(layer.name))
    if versions != [tensor._version for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)]:
        raise PluginError(f"{where}: init_layer changed the dense FFN in place; work on copies")
    notes = {name: float(value) for name, value in init.notes.items()}
    if not all(map(math.isfinite, notes.values())):
        raise PluginError(f"{where}: a note is not a finite number: {notes}")
    return replace(init, notes=notes)
