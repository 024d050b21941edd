"""Calibration: stream FFN inputs of the dense model past a strategy's calibrators, in one forward pass over the data.

The dense model runs in eval mode (no patch dropout), float32, without gradient. Every calibrator sees the input of
its block's FFN (after ln_2) as [T, D] float32, text padding left out, in the order of the data. What lies behind the
last of these inputs in each tower is not computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.model.ffn import Layer
from upcycle_bench.model.padding import Padding
from upcycle_bench.strategy import Calibrator
from upcycle_bench.util.threads import one_thread


@torch.no_grad()
def calibrate(
    model: Any,
    layers: list[Layer],
    calibrators: Mapping[str, Calibrator],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Feed `calibrators` (by layer name) from `batches` of (images [B, 3, H, W], texts [B, L]) on the model's device.

    The hooks are gone and the model's mode is restored afterwards, whatever happens.
    """
    padding = Padding.of(model)
    modes = [(module, module.training) for module in model.modules()]  # a part may be frozen in eval mode
    handles = []
    try:
        if padding is not None:
            handles.append(model.token_embedding.register_forward_pre_hook(padding.observe))
        for layer in layers:
            see = partial(_see, calibrators[layer.name], padding if layer.tower == "text" else None)
            handles.append(model.get_submodule(layer.mlp_path).register_forward_pre_hook(see))
        last = {layer.tower: layer for layer in sorted(layers, key=lambda layer: layer.block)}
        for layer in last.values():  # behind its calibrator's hook
            handles.append(model.get_submodule(layer.mlp_path).register_forward_pre_hook(_stop))
        model.eval()
        for images, texts in batches:
            for tower, encode, inputs in (("vision", model.encode_image, images), ("text", model.encode_text, texts)):
                if tower in last:
                    with contextlib.suppress(_TowerSeenError):
                        encode(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


class _TowerSeenError(Exception):
    """Leaves a tower's forward pass when its last layer has been seen."""


def _stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    raise _TowerSeenError


def _see(calibrator: Calibrator, padding: Padding | None, _module: nn.Module, args: tuple[Any, ...]) -> None:
    x_TD = args[0].flatten(0, -2)
    with one_thread():
        calibrator.update((padding.compact(x_TD) if padding is not None else x_TD).float())
