"""transformers' `CLIPModel` as open_clip has it: the same function. Weights go by key names, a configuration by fields.

    if is_transformers(tensors):
        tensors = to_open_clip(tensors)
    config, preprocess = read_transformers_config(json.loads(path.read_text()), path)

A name that has no counterpart is kept, so that who compares with a model sees it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle_bench.util.errors import UserError, one_line

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


CLIP_TOKENS = 49408  # of CLIP's own tokenizer
EPS = 1e-5  # of PyTorch's LayerNorm
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def is_transformers_config(values: Any) -> bool:
    """Whether a JSON document is the `config.json` of a `CLIPModel`."""
    return (
        isinstance(values, Mapping)
        and values.get("model_type") == "clip"
        and "vision_config" in values
        and "text_config" in values
    )


def read_transformers_config(values: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(open_clip's configuration, settings of pixels) of the `config.json` at `path`, with transformers' own defaults.

    Pixels are those of the image processor beside it, if there is one. Raises UserError for a model that
    open_clip's towers cannot be.
    """
    from transformers import CLIPConfig

    try:
        whole = CLIPConfig.from_dict(dict(values))
        vision: Any = whole.vision_config
        text: Any = whole.text_config
        head_width = vision.hidden_size // vision.num_attention_heads
    except Exception as error:  # transformers has several of its own for values that cannot be
        raise UserError(f"{path}: transformers cannot read this configuration ({one_line(error, 200)}).") from None
    acts = {vision.hidden_act, text.hidden_act}
    if len(acts) > 1 or not acts <= {"gelu", "quick_gelu"}:
        named = " and ".join(sorted(map(str, acts)))
        raise UserError(f"{path}: its towers have the activations {named}; open_clip's share GELU or QuickGELU.")
    if text.vocab_size != CLIP_TOKENS:
        raise UserError(
            f"{path}: a vocabulary of {text.vocab_size:,} tokens is not CLIP's ({CLIP_TOKENS:,}); write an "
            "open_clip_config.json beside it, with hf_tokenizer_name."
        )
    config: dict[str, Any] = {"embed_dim": whole.projection_dim}
    if acts == {"quick_gelu"}:
        config["quick_gelu"] = True
    config["vision_cfg"] = {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": head_width,
        "patch_size": vision.patch_size,
        **_others(vision),
    }
    config["text_cfg"] = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        **_others(text),
        **_pooling(text),
    }
    return config, _pixels(path.parent)


def _pooling(text: Any) -> dict[str, Any]:
    """Where the text feature is taken: at the largest id, which CLIP's end-of-text token has, or at another id.

    transformers takes an eos_token_id of 2, which stood in all configurations once, for the largest id.
    """
    usual = text.eos_token_id in (2, text.vocab_size - 1)
    return {} if usual else {"pool_type": "eos", "eos_id": text.eos_token_id}


def _others(tower: Any) -> dict[str, Any]:
    """Settings that most models leave as they are, and that then stand in no configuration of open_clip's."""
    hidden, eps = tower.intermediate_size, tower.layer_norm_eps
    # Half a neuron more: open_clip truncates width * ratio, which rounding may have brought below the whole number.
    ratio = {} if hidden == 4 * tower.hidden_size else {"mlp_ratio": (hidden + 0.5) / tower.hidden_size}
    return ratio | ({} if eps == EPS else {"norm_kwargs": {"eps": eps}})


def _pixels(folder: Path) -> dict[str, Any]:
    """open_clip's settings of pixels for the image processor of a folder; none where it has none.

    It stands in preprocessor_config.json, and since transformers 5 in a part of processor_config.json.
    """
    found: dict[str, Any] = {}
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({one_line(error, 200)}).") from None
        values = values.get(part) if part and isinstance(values, dict) else values
        if part and values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"{path}: describes no image processor.")
        here = _processor(values, path)
        if found and found != here:
            raise UserError(f"{path} has other settings of pixels than processor_config.json beside it: remove one.")
        found = here
    return found


def _processor(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    size, crop = values.get("size"), values.get("crop_size")
    squash = isinstance(size, dict) and {"height", "width"} <= size.keys()
    shortest, cropped = (_edge(each) for each in (size, crop))
    whole = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
    odd = [f"{key} is {values[key]}" for key, usual in whole.items() if values.get(key, usual) not in (usual, None)]
    if not squash and shortest and cropped and shortest != cropped:
        odd.append(f"it resizes to {shortest} and crops to {cropped}")
    if abs(values.get("rescale_factor") or 1 / 255) - 1 / 255 > 1e-6:
        odd.append(f"rescale_factor is {values['rescale_factor']}")
    if odd:
        raise UserError(f"{path}: {odd[0]}, which open_clip's transforms do not do; give the pixels by --pixels.")
    found = {
        "mean": values.get("image_mean"),
        "std": values.get("image_std"),
        "interpolation": RESAMPLE.get(values.get("resample", 3), f"Pillow's {values.get('resample')}"),
        "resize_mode": "squash" if squash else "shortest",
    }
    return {key: value for key, value in found.items() if value is not None}


def _edge(size: Any) -> int | None:
    """The number of pixels in `224`, `{"shortest_edge": 224}` or `{"height": 224, "width": 224}`."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) else None


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
