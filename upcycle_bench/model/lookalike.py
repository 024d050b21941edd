"""Whose weights are these? The open_clip models with ViT towers that tensors of these shapes would fit.

names_of_shape(state)    # ["ViT-B-32", "ViT-B-32-quickgelu"]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upcycle_bench.model.config import own_config

Form = tuple[int, ...]
TEXT = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
PARTS = ("visual", *TEXT, "logit_scale", "logit_bias")


def names_of_shape(tensors: Mapping[str, Tensor], quick_gelu: bool | None = None) -> list[str]:
    """Names in open_clip of models of that form; with `quick_gelu`, of that activation."""
    import open_clip

    if (form := _form_of(tensors)) is None:
        return []
    found = []
    for name in filter(lambda each: own_config(each) is None, open_clip.list_models()):
        config = open_clip.get_model_config(name)
        if quick_gelu in (None, config.get("quick_gelu", False)) and _form_by(config) == form:
            found.append(name)
    return found


def _form_of(tensors: Mapping[str, Tensor]) -> Form | None:
    """Patch, grid, widths, depths and lengths of a CLIP with ViT towers; None for another model."""
    texts = {key.removeprefix("text."): value for key, value in tensors.items()}
    names = ("visual.conv1.weight", "visual.positional_embedding", "positional_embedding", "visual.proj")
    whole = all(name in texts and texts[name].ndim >= 2 for name in (*names, "token_embedding.weight"))
    if not whole or not all(key.partition(".")[0] in PARTS for key in texts):  # CoCa's and others have more parts
        return None
    conv, grid, positions, projection = (texts[name].shape for name in names)
    return (
        *(conv[0], conv[-1], grid[0], _depth(texts, "visual.transformer."), projection[1]),
        *(*positions, _depth(texts, "transformer."), texts["token_embedding.weight"].shape[0]),
    )


def _depth(tensors: Mapping[str, Tensor], tower: str) -> int:
    block = re.compile(rf"{re.escape(tower)}resblocks\.(\d+)\.")
    return len({match[1] for key in tensors if (match := block.match(key))})


def _form_by(config: Mapping[str, Any]) -> Form | None:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    if vision.timm_model_name or text.hf_model_name or not isinstance(vision.layers, int):
        return None
    height, width = vision.image_size if isinstance(vision.image_size, tuple | list) else (vision.image_size,) * 2
    grid = (height // vision.patch_size) * (width // vision.patch_size) + 1
    return (
        *(vision.width, vision.patch_size, grid, vision.layers, config["embed_dim"]),
        *(text.context_length, text.width, text.layers, text.vocab_size),
    )
