"""Whether a file of weights describes a model: what `weights.load` builds must compute what was trained.

    reason = unlike_its_file(merged_model, dense)               # None, or one line that names the first difference
    reason = other_answers(merged_model, dense, images, texts)  # likewise, by what both compute; needs all experts

A file holds tensors, and says how to build the modules around them: those of the dense model, and in MoE layers our
gate and plain FFNs. It does not hold code. So a module of a plugin's own, a hook, or a `forward` that was replaced is
lost with the process.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.model.ffn import FFN, LayerInit
from upcycle_bench.model.moe import EXPERT_KEY, moe_layers
from upcycle_bench.model.surgery import find_layers, hidden_widths, put_experts

MOVED = 1e-3  # of features of length 1: far above rounding
WITHOUT_EFFECT = ("training", "grad_checkpointing", "output_dict", "image_mean", "image_std")  # on features


def unlike_its_file(model: Any, dense: Any, dtypes: bool = True) -> str | None:
    """What `weights.load` would make otherwise, or None; `model` has no expert with a `merged` form left.

    All experts of a layer may have another hidden width than the dense model's FFN; nothing else may differ. Under
    expert parallelism each rank answers for its own experts. `dtypes=False` compares those of tensors not at all.
    """
    there = dict(dense.named_modules())
    if more := next((path for path in hidden_widths(model) if path not in there), None):
        return f"{more} is there, the file's is missing"
    file = rebuilt(model, dense)
    found, expected = _modules(model), _modules(file)
    for name in dict.fromkeys([*found, *expected]):
        ours, theirs = found.get(name), expected.get(name)
        # Under expert parallelism this rank has the first numbers alone.
        if ours != theirs and not (ours is None and EXPERT_KEY.fullmatch(f"{name}.")):
            return f"{_readable(name)} is {ours or 'missing'}, the file's is {theirs or 'missing'}"
    tensors, described = _tensors(model, dtypes), _tensors(file, dtypes)
    for name in dict.fromkeys([*tensors, *described]):
        if tensors.get(name) != described.get(name) and not (name not in tensors and EXPERT_KEY.fullmatch(name)):
            ours, theirs = tensors.get(name, "missing"), described.get(name, "missing")
            return f"{_readable(name)} is {ours}, the file's is {theirs}"
    for name, layer in moe_layers(model).items():
        # From the file each expert would get a copy of its own.
        if len(list(layer.experts.parameters())) < sum(len(list(expert.parameters())) for expert in layer.experts):
            return f"{name}: its experts share tensors, and the file has a copy for each"
    return None


@torch.no_grad()
def other_answers(model: Any, dense: Any, images: Tensor, texts: Tensor) -> str | None:
    """What computes otherwise than its tensors say, or None; for a model that has the form of its file."""
    file = rebuilt(model, dense)
    file.load_state_dict(model.state_dict(), assign=True)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        file.eval()
        pairs = [(each.encode_image(images), each.encode_text(texts)) for each in (model, file)]
    finally:
        for module, training in modes:
            module.training = training
    for ours_BC, theirs_BC in zip(*pairs, strict=True):
        if not float((ours_BC - theirs_BC).norm()) <= MOVED * float(theirs_BC.norm()):  # NaN, too
            return f"{_suspect(model, file)} does not compute what its tensors say"
    return None


def rebuilt(model: Any, dense: Any) -> Any:
    """The modules that `weights.load` would make for `model`, by its widths and settings; its tensors are on meta."""
    memo = {id(value): nn.Parameter(value.to("meta")) for value in dense.parameters()}
    made, layers, widths = copy.deepcopy(dense, memo), moe_layers(model), hidden_widths(model)
    for path, width in widths.items():
        mlp = made.get_submodule(path)
        if FFN.of(mlp).hidden != width:
            FFN.of(mlp).resized(width).put_into(mlp)
    if not layers:
        return made
    moe = next(iter(layers.values())).settings.model_copy(update={"ep_size": 1})
    inits = {}
    for layer in find_layers(made, moe):
        ffn = FFN.of(made.get_submodule(layer.mlp_path))
        router_ED = torch.zeros(layer.num_experts, ffn.width, device="meta")
        inits[layer.name] = LayerInit([ffn.expert() for _ in range(layer.num_experts)], router_ED)
    with torch.random.fork_rng(devices=[]):  # DeepSpeed's gate draws weights, which are replaced
        return put_experts(made, inits, moe)


def _modules(model: nn.Module) -> dict[str, str]:
    """Each module's class and settings by name, without patch dropout, which has none in evaluation.

    Settings that a class does not show (heads, pooling, masks) stand behind, as MODULE.SETTING.
    """
    parts = {name: part for name, part in model.named_modules() if not name.endswith(("patch_dropout", "patch_drop"))}
    shown = {name: f"{_class(part)}({part.extra_repr()})" for name, part in parts.items()}
    return shown | {
        f"{name}.{key}".strip("."): value for name, part in parts.items() for key, value in _settings(part).items()
    }


def _settings(part: nn.Module) -> dict[str, str]:
    """Heads, pooling, eps and the like, of a module that is no plugin's and none of ours: those count choices."""
    if type(part).__module__.partition(".")[0] not in ("torch", "open_clip", "timm"):
        return {}
    values = {key: value for key, value in vars(part).items() if key[0] != "_" and key not in WITHOUT_EFFECT}
    plain = {key: text for key, value in values.items() if (text := _plain(value)) is not None}
    return plain | {key: f"of shape {list(value.shape)}" for key, value in part.named_buffers(recurse=False)}


def _plain(value: Any) -> str | None:
    """A number, a word, or a pair of numbers, which may be a list; None for other values."""
    if isinstance(value, tuple | list) and all(isinstance(each, int | float) for each in value):
        return repr(tuple(value))
    return repr(value) if isinstance(value, bool | int | float | str) else None


def _class(part: nn.Module) -> str:
    """The class's name; with its module where that is a plugin's, since its name may be that of ours."""
    kind = type(part)
    known = kind.__module__.partition(".")[0] in ("torch", "open_clip", "deepspeed", "upcycle_bench")
    return kind.__qualname__ if known else f"{kind.__module__}.{kind.__qualname__}"


def _tensors(model: nn.Module, dtypes: bool) -> dict[str, str]:
    return {
        name: f"{str(value.dtype).removeprefix('torch.')} " * dtypes + f"{list(value.shape)}"
        for name, value in model.state_dict().items()
    }


def _readable(name: str) -> str:
    """`visual.transformer.resblocks.1.mlp expert 3 c_fc` in place of where DeepSpeed keeps that expert."""
    match = EXPERT_KEY.fullmatch(f"{name}.") or EXPERT_KEY.fullmatch(name)
    return " ".join([match[1], "expert", match[2], match[3]]).strip(" .") if match else name or "the model"


def _suspect(model: nn.Module, file: nn.Module) -> str:
    """The first module with forward hooks or with methods of its own that the file's lacks; else the model."""
    others = dict(file.named_modules())
    for name, part in model.named_modules():
        hooks, expected = (len(each._forward_hooks) + len(each._forward_pre_hooks) for each in (part, others[name]))
        if hooks > expected or _own_methods(part) - _own_methods(others[name]):
            return _readable(name)
    return "the model"


def _own_methods(part: nn.Module) -> set[str]:
    """Names in the instance that hide a method of its class."""
    return {name for name in vars(part) if callable(getattr(type(part), name, None))}
