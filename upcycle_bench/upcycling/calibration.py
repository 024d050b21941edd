"""Calibration: show a strategy's calibrators the FFN inputs of the dense model, in one pass over the data.

    calibrate(dense_model, layers, {layer.name: calibrator}, batches)

The dense model runs in eval mode (no patch dropout) and without gradient. Each calibrator sees the inputs of its
block's FFN (after ln_2) as float32 [T, D], in the order of the data and without text padding. The forward pass of a
tower stops at the last of these inputs.
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
from upcycle_bench.model.towers import text_tower
from upcycle_bench.strategy import Calibrator
from upcycle_bench.util.threads import one_thread


@torch.no_grad()
def calibrate(
    model: Any,
    layers: list[Layer],
    calibrators: Mapping[str, Calibrator],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> int:
    """Feed `calibrators` (by layer name) from `batches` of (images [B, 3, H, W], texts [B, L]) on the model's device.

    Returns the number of pairs. Afterwards, also after an error, the hooks are removed and every module is in the mode
    it was in.
    """
    padding = Padding.of(model)
    modes = [(module, module.training) for module in model.modules()]  # of each, as a part may be frozen in eval mode
    handles, pairs = [], 0
    try:
        if padding is not None:
            handles.append(text_tower(model).token_embedding.register_forward_pre_hook(padding.observe))
        for layer in layers:
            see = partial(_see, calibrators[layer.name], padding if layer.tower == "text" else None)
            handles.append(model.get_submodule(layer.mlp_path).register_forward_pre_hook(see))
        last = {layer.tower: layer for layer in sorted(layers, key=lambda layer: layer.block)}
        for layer in last.values():  # registered last, so that the calibrator's hook runs first
            handles.append(model.get_submodule(layer.mlp_path).register_forward_pre_hook(_stop))
        model.eval()
        for images, texts in batches:
            pairs += len(images)
            for tower, encode, inputs in (("vision", model.encode_image, images), ("text", model.encode_text, texts)):
                if tower in last:
                    with contextlib.suppress(_TowerSeenError):
                        encode(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return pairs


class _TowerSeenError(Exception):
    """Ends a tower's forward pass once its last layer has been seen."""


def _stop(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    raise _TowerSeenError


def _see(calibrator: Calibrator, padding: Padding | None, _module: nn.Module, args: tuple[Any, ...]) -> None:
    x_TD = args[0].flatten(0, -2)  # [B, L, D] -> [T, D]
    with one_thread():  # a calibrator's sums must not depend on the number of threads
        calibrator.update((padding.compact(x_TD) if padding is not None else x_TD).float())
