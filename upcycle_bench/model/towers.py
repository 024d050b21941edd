"""Where open_clip's classes keep things: the two towers of a CLIP, a CustomTextCLIP, a CoCa; timm's ViT as well.

    text_tower(model).token_embedding, image_size(model), longest_sequence(model)
    for tower, path in block_paths(model): model.get_submodule(path)        # "visual.transformer.resblocks"

No other file knows whether a text tower is a module of its own (`model.text`) or spread over the model.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

Tower = Literal["vision", "text"]
BLOCKS: dict[Tower, tuple[str, ...]] = {
    "vision": ("visual.transformer.resblocks", "visual.trunk.blocks"),  # open_clip's own ViT, timm's
    "text": ("transformer.resblocks", "text.transformer.resblocks"),  # of class CLIP, of the others
}


def block_paths(model: Any) -> dict[Tower, str | None]:
    """The path of each tower's list of blocks; None for a tower that has none, as a ResNet."""
    return {tower: next((path for path in paths if _has(model, path)), None) for tower, paths in BLOCKS.items()}


def text_tower(model: Any) -> Any:
    """What has `token_embedding` and `positional_embedding`: the model itself if it is of class CLIP."""
    return getattr(model, "text", model)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def image_weight(model: Any) -> Tensor:
    """The weight of the patch embedding or of the first convolution; images have its dtype and device."""
    return next(parameter for parameter in model.visual.parameters() if parameter.ndim == 4)


def context_length(model: Any) -> int:
    """Tokens of a text as the model takes it."""
    return int(text_tower(model).context_length)


def vocab_size(model: Any) -> int:
    """Token ids are below it."""
    return int(text_tower(model).vocab_size)


def text_pooling(model: Any) -> tuple[str, int]:
    """Where the text feature is taken (`argmax`, `eos`, `first`, `last`), and the id of the end-of-text token."""
    tower = text_tower(model)
    if tower is model:
        return getattr(model, "text_pool_type", "nowhere"), getattr(model, "text_eos_id", -1)
    if not hasattr(tower, "token_embedding"):
        return "by a tower of Hugging Face's", -1
    return ("class token" if tower.cls_emb is not None else tower.pool_type), tower.eos_id


def image_tokens(model: Any) -> tuple[int, int]:
    """Tokens of an image: (patches, others such as the class token)."""
    trunk = getattr(model.visual, "trunk", None)
    if trunk is not None:
        return int(trunk.patch_embed.num_patches), int(trunk.num_prefix_tokens)
    height, width = model.visual.grid_size
    return height * width, len(model.visual.positional_embedding) - height * width


def longest_sequence(model: Any) -> int:
    """The number of tokens of an image or of a text, the larger of the two."""
    return max(sum(image_tokens(model)), context_length(model))


def _has(model: Any, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
