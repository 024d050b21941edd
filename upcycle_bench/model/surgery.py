"""Weight surgery: a dense CLIP in, a copy with MoE layers out.

    layers = find_layers(dense, moe)
    model = put_experts(dense, {layer.name: LayerInit(...) for layer in layers}, moe)
    merge(model)    # after training: experts of other forms become plain FFNs

Every tensor of the dense model is copied bit for bit, but for those of the FFNs that are replaced. The dense model is
not changed and shares no storage with the result.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from upcycle_bench import protocol
from upcycle_bench.model.ffn import FFN, Layer, LayerInit, linears, not_plain
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.padding import Padding
from upcycle_bench.model.towers import BLOCKS, block_paths, text_tower
from upcycle_bench.util.errors import PluginError, UserError


def find_layers(model: Any, moe: protocol.MoE) -> list[Layer]:
    """The blocks to replace: every `moe.every`-th from `moe.offset` on, in block order, the vision tower's first.

    Raises UserError for a model whose blocks are not a transformer's with plain FFNs, and where no block is left.
    """
    layers = []
    for tower, blocks in block_paths(model).items():
        if blocks is None:
            raise UserError(
                f"{type(model).__name__} has no {' or '.join(BLOCKS[tower])}: only CLIPs whose two towers are "
                "transformers of open_clip's or ViTs of timm's can be upcycled; choose a model such as ViT-B-32."
            )
        depth = len(list(model.get_submodule(blocks).children()))
        for block in range(moe.offset, depth, moe.every):
            layers.append(Layer(tower, block, depth, moe.experts, moe.top_k, blocks))
    if not layers:
        raise UserError(f"moe.offset={moe.offset} leaves no block to replace; lower it.")
    for layer in layers:
        try:
            mlp = model.get_submodule(layer.mlp_path)
        except AttributeError:
            raise UserError(f"{layer.mlp_path} is missing: only blocks with one FFN each can be upcycled.") from None
        if reason := not_plain(mlp):
            raise UserError(
                f"{layer.mlp_path} {reason}: only a plain FFN, two linear layers with biases and an activation, can be "
                "upcycled; choose a model such as ViT-B-32."
            )
    return layers


def put_experts(dense: Any, inits: Mapping[str, LayerInit], moe: protocol.MoE) -> Any:
    """A copy of `dense` with MoE layers in the place of some FFNs: `inits` has one entry for each of `find_layers`.

    Raises PluginError when experts or router have the wrong number or shape, hold values that are not finite, or share
    storage with the dense model; AssertionError when a tensor was neither copied nor replaced.
    """
    layers = find_layers(dense, moe)
    if [layer.name for layer in layers] != list(inits):
        raise PluginError(
            f"layers {list(inits)} were initialised, but the protocol replaces {[x.name for x in layers]}"
        )
    replaced = {layer.name: dense.get_submodule(layer.mlp_path) for layer in layers}
    # The memo of deepcopy gets the replaced FFNs as if they were copied already, which saves the memory of copies.
    model = copy.deepcopy(dense, {id(mlp): mlp for mlp in replaced.values()})
    padding = Padding.of(model)
    if padding is not None:
        text_tower(model).token_embedding.register_forward_pre_hook(padding.observe)
    for layer in layers:
        init, ffn = inits[layer.name], FFN.of(replaced[layer.name])
        _check(layer, init, ffn, moe.ep_size)
        parent = model.get_submodule(layer.mlp_path.rpartition(".")[0])
        router_ED = init.router_ED.to(ffn.w1_HD)  # a random router is drawn on the CPU
        parent.mlp = MoEFFN(layer, init.experts, router_ED, moe, padding if layer.tower == "text" else None)
        parent.mlp.train(replaced[layer.name].training)
    _check_copy(dense, model, layers)
    return model


def merge(model: nn.Module) -> None:
    """Put, in place, the plain FFN for every expert that has a `merged` form."""
    for layer in moe_layers(model).values():
        layer.merge()


def hidden_widths(model: Any) -> dict[str, int]:
    """The hidden width of every plain FFN by the path of its `mlp`; of an MoE layer, that of its first expert."""
    widths = {}
    for path, module in model.named_modules():
        if path.endswith(".mlp"):
            plain = next(iter(module.experts)) if isinstance(module, MoEFFN) else module
            if found := linears(plain):
                widths[path] = found[0].out_features
    return widths


def all_finite(value: torch.Tensor) -> bool:
    """Whether no number is infinite or nan.

    A finite sum shows it, and takes less time than `isfinite` of every number. The sum of finite numbers may overflow,
    so that an infinite one shows nothing.
    """
    return bool(value.detach().sum().isfinite()) or bool(value.isfinite().all())


def _check(layer: Layer, init: LayerInit, ffn: FFN, ep_size: int) -> None:
    """Raise PluginError unless the layer can be made of `init`, in the place of `ffn`."""
    if len(init.experts) != layer.num_experts:
        raise PluginError(
            f"{layer.name}: {len(init.experts)} experts were made, the protocol wants {layer.num_experts}"
        )
    if len({id(expert) for expert in init.experts}) < len(init.experts):
        raise PluginError(f"{layer.name}: one module stands for several experts; make one each")
    parameters = [id(parameter) for expert in init.experts for parameter in expert.parameters()]
    if ep_size > 1 and len(set(parameters)) < len(parameters):  # their gradients would not be summed over ranks
        raise PluginError(f"{layer.name}: experts share parameters, which needs moe.ep_size=1")
    tensors = [("the router", [init.router_ED])]
    tensors += [(f"expert {number}", list(expert.parameters())) for number, expert in enumerate(init.experts)]
    for what, values in tensors:
        if not all(value.is_meta or all_finite(value) for value in values):
            raise PluginError(f"{layer.name}: {what} holds values that are not finite")
    expected = (layer.num_experts, ffn.width)
    if tuple(init.router_ED.shape) != expected:
        raise PluginError(f"{layer.name}: the router's shape is {tuple(init.router_ED.shape)}, it must be {expected}")
    own = {tensor.untyped_storage()._cdata for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)}
    for number, module in enumerate(init.experts):
        if any(p.untyped_storage()._cdata in own for p in module.parameters()):
            raise PluginError(f"{layer.name}: expert {number} shares storage with the dense model; copy its tensors")


def _check_copy(dense: nn.Module, model: nn.Module, layers: list[Layer]) -> None:
    """Assert that every tensor outside the replaced FFNs is a copy of the dense one, and that there is no other."""
    prefixes = tuple(f"{layer.mlp_path}." for layer in layers)
    source = {key: value for key, value in dense.state_dict().items() if not key.startswith(prefixes)}
    target = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    assert source.keys() == target.keys(), f"unaccounted keys: {sorted(source.keys() ^ target.keys())}"
    for key, value in source.items():
        assert (value.shape, value.dtype) == (target[key].shape, target[key].dtype), key
        assert value.is_meta or value.data_ptr() != target[key].data_ptr(), f"{key} is shared, not copied"
