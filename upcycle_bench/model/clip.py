"""A dense model: an open_clip CLIP with its tokenizer and transforms, from a checkpoint or with random weights.

    clip = create_clip("ViT-B-32", checkpoint=Path("epoch_15.pt"), patch_dropout=0.5)
    clip.model, clip.tokenize(["a photo of a cat"]), clip.resize(pil_image), clip.normalise(uint8_B3HW)

Shape suffixes: H and W are an image's height and width in B3HW.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.assets import MODELS
from upcycle_bench.model import checkpoint_file
from upcycle_bench.model.state_dict import Weights, put, weights_of
from upcycle_bench.util.errors import UserError, unknown

Precision = Literal["fp32", "fp16", "bf16"]
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")  # the settings that an open_clip tag may change


@dataclass(frozen=True)
class Clip:
    """A CLIP with its tokenizer and transforms.

    tokenize: list of strings -> int64 [B, L];
    resize: PIL image -> uint8 [3, H, W], deterministic;
    augment: PIL image -> uint8 [3, H, W], open_clip's random resized crop; draws from torch's global generator;
    transform: PIL image -> float32 [3, H, W], open_clip's own evaluation transform;
    mean, std: of the three colours, for `normalise`;
    preprocess: settings of the transforms that differ from those of `name` (some pretrained tags have their own).
    """

    name: str
    model: Any  # open_clip.CLIP, which has no type information
    tokenize: Callable[[list[str]], Tensor]
    resize: Callable[[Any], np.ndarray]
    augment: Callable[[Any], np.ndarray]
    transform: Callable[[Any], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocess: Mapping[str, Any] | None = None

    def normalise(self, images_B3HW: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32: what open_clip's ToTensor and Normalize do image by image."""
        device = images_B3HW.device
        mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return images_B3HW.float().div_(255).sub_(mean).div_(std)


def create_clip(
    name: str,
    checkpoint: Path | None = None,
    *,
    patch_dropout: float = 0.0,
    seed: int = 0,
    precision: Precision = "fp32",
    preprocess: Mapping[str, Any] | None = None,
) -> Clip:
    """Build the model `name`, open_clip's or ours; all weights from `checkpoint`, or random ones from `seed`.

    `precision` is open_clip's: fp16 and bf16 leave LayerNorms and embeddings in float32. A state dict does not name its
    activation: weights trained with QuickGELU (OpenAI's, LAION-400M's ViT-B-32) need the name `ViT-B-32-quickgelu`.

    Raises UserError for an unknown model, a file that holds no weights, and weights that do not fit or are not finite.
    """
    import open_clip

    config = model_config(name)
    weights = None if checkpoint is None else weights_of(checkpoint_file.read(checkpoint))
    if weights is not None:
        _require_activation(weights, name, config)
    level = logging.getLogger().level
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, but here they are wanted
        try:
            model, train_transform, transform = open_clip.create_model_and_transforms(
                name,
                pretrained_text=False,  # a text tower of Hugging Face's would fetch weights
                precision=precision,
                **{f"image_{key}": value for key, value in (preprocess or {}).items()},
                force_patch_dropout=patch_dropout or None,
                device=torch.get_default_device(),  # `with torch.device("meta")` makes a model without memory
                nonscalar_logit_scale=True,  # DeepSpeed cannot broadcast a tensor without dimensions
            )
        finally:
            logging.getLogger().setLevel(level)
    if weights is not None:
        put(weights, model, name)
    tokenizer = open_clip.get_tokenizer(name)
    *resize, to_tensor, normalize = transform.transforms  # Resize, CenterCrop, RGB, ToTensor, Normalize
    *augment, _, _ = train_transform.transforms
    assert "ToTensor" in type(to_tensor).__name__ and type(normalize).__name__ == "Normalize", transform
    return Clip(
        name,
        model,
        tokenizer,
        _to_uint8(resize),
        _to_uint8(augment),
        transform,
        tuple(normalize.mean),
        tuple(normalize.std),
        preprocess or None,
    )


def model_config(name: str) -> dict[str, Any]:
    """The configuration of that name in open_clip, with our own models added; UserError for an unknown name."""
    import open_clip

    open_clip.add_model_config(MODELS)
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models())
    return open_clip.get_model_config(name)


def _require_activation(weights: Weights, name: str, config: Mapping[str, Any]) -> None:
    """UserError where the file says its activation, as OpenAI's archives do, and it is not that of the model."""
    if weights.quick_gelu is not None and weights.quick_gelu != config.get("quick_gelu", False):
        raise UserError(
            f"{weights.path} was trained with another activation than that of {name}: choose "
            f"{_with_other_activation(name)}."
        )


def _with_other_activation(name: str) -> str:
    """open_clip's name of the same model with QuickGELU in place of GELU, or the reverse."""
    return name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"


def find_pretrained(name: str, source: str) -> tuple[Path, Mapping[str, Any]]:
    """The file of weights that `source` names, and their settings of the transforms, if they have their own.

    `source` is a file, or one of open_clip's tags for the model `name`, which is downloaded into open_clip's cache.
    Raises UserError if it is neither, cannot be downloaded, or was trained with another activation than that of `name`.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    config = model_config(name)
    if (file := Path(source)).is_file():
        return file, {}
    pretrained = open_clip.get_pretrained_cfg(name, source)
    if not pretrained and (file.suffix or len(file.parts) > 1):  # no tag of open_clip's has a dot or a slash
        raise UserError(f"{source}: no such file; give one with weights of {name}, or a tag of open_clip's for it.")
    if not pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise unknown(f"pretrained weights of {name}", source, tags, "Or give a file: there is none of that name.")
    if pretrained.get("quick_gelu", False) != config.get("quick_gelu", False):
        raise UserError(
            f"{source} weights were trained with another activation than that of {name}: choose "
            f"{_with_other_activation(name)}."
        )
    try:
        path = Path(open_clip.download_pretrained(pretrained))
    except Exception as error:  # of urllib, huggingface_hub and open_clip, each with its own
        raise UserError(
            f"cannot fetch the {source} weights of {name} ({_one_line(error)}); download them where there is a "
            "network and give the file."
        ) from None
    usual = asdict(PreprocessCfg())
    return path, {key: pretrained[key] for key in PREPROCESS if pretrained.get(key, usual[key]) != usual[key]}


def _to_uint8(steps: list[Callable[[Any], Any]]) -> Callable[[Any], np.ndarray]:
    """The steps one after the other, then PIL image -> uint8 [3, H, W]."""

    def apply(image: Any) -> np.ndarray:
        for step in steps:
            image = step(image)
        return np.asarray(image).transpose(2, 0, 1)

    return apply


def _one_line(error: BaseException) -> str:
    """The beginning of its message, in one line."""
    text = " ".join(str(error).split())
    return text if len(text) < 400 else text[:400] + " ..."
