"""Weight surgery: a dense CLIP in, an upcycled copy out, every tensor accounted for.

    layers = find_layers(dense, protocol.moe)
    model = upcycle(dense, {layer.name: LayerInit(...)}, protocol.moe)

    merge(model)    # after training: experts of other forms become plain FFNs

Every dense tensor is either copied bit for bit or belongs to a replaced FFN; every target tensor is a copy or belongs
to an MoE layer; anything else raises. The dense model is not touched and shares no storage with the result.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from upcycle_bench import protocol
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.padding import Padding
from upcycle_bench.util.errors import PluginError, UserError


def find_layers(model: Any, moe: protocol.MoE) -> list[Layer]:
    """The blocks to replace: every `moe.every`-th from `moe.offset` on, vision first, in block order."""
    layers = []
    towers: tuple[tuple[Literal["vision", "text"], str], ...] = (("vision", "visual."), ("text", ""))
    for tower, prefix in towers:
        try:
            depth = len(list(model.get_submodule(f"{prefix}transformer.resblocks").children()))
        except AttributeError:
            raise UserError(
                f"{type(model).__name__} has no {prefix}transformer.resblocks: only open_clip's ViT CLIP models "
                "(class CLIP) can be upcycled; choose a model such as ViT-B-32."
            ) from None
        for block in range(moe.offset, depth, moe.every):
            layers.append(Layer(tower, block, depth, moe.experts, moe.top_k))
    if not layers:
        raise UserError(f"moe.offset={moe.offset} leaves no block to replace; lower it.")
    for layer in layers:
        parts = model.get_submodule(layer.mlp_path).named_children()
        names = [name for name, part in parts if not isinstance(part, nn.Identity)]
        if names != ["c_fc", "gelu", "c_proj"]:
            raise UserError(
                f"{layer.mlp_path} consists of {', '.join(names)}: only open_clip's plain FFN (c_fc, gelu, c_proj) "
                "can be upcycled; choose a model such as ViT-B-32."
            )
    return layers


def put_experts(dense: Any, inits: Mapping[str, LayerInit], moe: protocol.MoE) -> Any:
    """A copy of `dense` in which each layer of `inits` (by layer name) is an MoE layer.

    Raises ValueError when a layer's experts or router have the wrong number or shape, or share storage with the dense
    model; AssertionError when the key accounting does not add up.
    """
    layers = find_layers(dense, moe)
    if [layer.name for layer in layers] != list(inits):
        raise PluginError(
            f"layers {list(inits)} were initialised, but the protocol replaces {[x.name for x in layers]}"
        )
    # The replaced FFNs are not copied: hand deepcopy an entry that says they stand for themselves.
    replaced = {layer.name: dense.get_submodule(layer.mlp_path) for layer in layers}
    model = copy.deepcopy(dense, {id(mlp): mlp for mlp in replaced.values()})
    padding = Padding.of(model)
    if padding is not None:
        model.token_embedding.register_forward_pre_hook(padding.observe)
    for layer in layers:
        init, ffn = inits[layer.name], FFN.of(replaced[layer.name])
        _check(layer, init, ffn, moe.ep_size)
        parent = model.get_submodule(layer.mlp_path.rpartition(".")[0])
        router_ND = init.router_ND.to(ffn.w1_HD)  # a random router is drawn on the CPU
        parent.mlp = MoEFFN(layer, init.experts, router_ND, moe, padding if layer.tower == "text" else None)
        parent.mlp.train(replaced[layer.name].training)
    _account(dense, model, layers)
    return model


def merge(model: nn.Module) -> None:
    """Replace, in place, every expert that has a `merged` form by it; DeepSpeed's marks stay on the parameters."""
    for layer in moe_layers(model).values():
        layer.merge()


def hidden_widths(model: Any) -> dict[str, int]:
    """Hidden width of every plain FFN of a CLIP, or of an MoE layer's first expert, by the `mlp`'s path."""
    widths = {}
    for path, module in model.named_modules():
        if path.endswith(".mlp"):
            plain = next(iter(module.experts)) if isinstance(module, MoEFFN) else module
            c_fc = getattr(plain, "c_fc", None)
            if isinstance(c_fc, nn.Linear):
                widths[path] = c_fc.out_features
    return widths


def _check(layer: Layer, init: LayerInit, ffn: FFN, ep_size: int) -> None:
    if len(init.experts) != layer.num_experts:
        raise PluginError(
            f"{layer.name}: {len(init.experts)} experts were made, the protocol wants {layer.num_experts}"
        )
    if len({id(expert) for expert in init.experts}) < len(init.experts):
        raise PluginError(f"{layer.name}: one module stands for several experts; make one each")
    parameters = [id(parameter) for expert in init.experts for parameter in expert.parameters()]
    if ep_size > 1 and len(set(parameters)) < len(parameters):  # their gradients would not be summed over ranks
        raise PluginError(f"{layer.name}: experts share parameters, which needs moe.ep_size=1")
    tensors = [("the router", [init.router_ND])]
    tensors += [(f"expert {number}", list(expert.parameters())) for number, expert in enumerate(init.experts)]
    for what, values in tensors:
        if not all(value.is_meta or _finite(value) for value in values):
            raise PluginError(f"{layer.name}: {what} holds values that are not finite")
    expected = (layer.num_experts, ffn.width)
    if tuple(init.router_ND.shape) != expected:
        raise PluginError(f"{layer.name}: the router's shape is {tuple(init.router_ND.shape)}, it must be {expected}")
    own = {tensor.untyped_storage()._cdata for tensor in (ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D)}
    for number, module in enumerate(init.experts):
        if any(p.untyped_storage()._cdata in own for p in module.parameters()):
            raise PluginError(f"{layer.name}: expert {number} shares storage with the dense model; copy its tensors")


def _finite(value: torch.Tensor) -> bool:
    """By the sum, which is finite only if all are: `isfinite` of every number costs as much as copying it, and more."""
    return bool(value.detach().sum().isfinite()) or bool(value.isfinite().all())  # sums of finite numbers may overflow


def _account(dense: nn.Module, model: nn.Module, layers: list[Layer]) -> None:
    """Every source key is used, every target key is filled, exactly once."""
    prefixes = tuple(f"{layer.mlp_path}." for layer in layers)
    source = {key: value for key, value in dense.state_dict().items() if not key.startswith(prefixes)}
    target = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    assert source.keys() == target.keys(), f"unaccounted keys: {sorted(source.keys() ^ target.keys())}"
    for key, value in source.items():
        assert (value.shape, value.dtype) == (target[key].shape, target[key].dtype), key
        assert value.is_meta or value.data_ptr() != target[key].data_ptr(), f"{key} is shared, not copied"
