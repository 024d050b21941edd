"""The weights of transformers' `CLIPModel` under open_clip's names: the same function, by key names alone.

    if is_transformers(tensors):
        tensors = to_open_clip(tensors)

A name that has no counterpart is kept, so that who compares with a model sees it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

TOWERS = {"text_model.": "", "vision_model.": "visual."}
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
IN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
IN_TOWER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm.weight": "ln_pre.weight",  # transformers' own spelling
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
POSITION_IDS = re.compile(r"(text|vision)_model\.embeddings\.position_ids")  # 0, 1, 2, ...: older versions saved them
QUERY = re.compile(r"(.+\.self_attn)\.q_proj\.(weight|bias)")


def is_transformers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a `CLIPModel`."""
    return all(any(key.startswith(f"{tower}encoder.layers.") for key in tensors) for tower in TOWERS)


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under open_clip's names; query, key and value stand in one tensor there."""
    left = {key: value for key, value in tensors.items() if not POSITION_IDS.fullmatch(key)}
    found: dict[str, Tensor] = {}
    for key in list(left):
        if match := QUERY.fullmatch(key):
            names = [f"{match[1]}.{part}_proj.{match[2]}" for part in "qkv"]
            if all(name in left for name in names):
                attention = _renamed(match[1]).removesuffix("self_attn") + "attn"
                found[f"{attention}.in_proj_{match[2]}"] = torch.cat([left.pop(name) for name in names])
    for key, value in left.items():
        if key in PROJECTIONS:  # of a linear layer [E, D]; open_clip multiplies by [D, E]
            found[PROJECTIONS[key]] = value.T.contiguous()
        else:
            found[_renamed(key)] = value
    return found


def _renamed(key: str) -> str:
    tower = next((name for name in TOWERS if key.startswith(name)), None)
    if tower is None:
        return key
    part = key.removeprefix(tower)
    if (layer := LAYER.fullmatch(part)) is None:
        return TOWERS[tower] + IN_TOWER[part] if part in IN_TOWER else key
    name = next(
        (new + layer[2].removeprefix(old) for old, new in IN_LAYER.items() if layer[2].startswith(f"{old}.")), layer[2]
    )
    return f"{TOWERS[tower]}transformer.resblocks.{layer[1]}.{name}"
