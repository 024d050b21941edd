"""A dense model: an open_clip CLIP with its tokenizer and transforms, from a checkpoint or with random weights.

    clip = create_clip("ViT-B-32", checkpoint=Path("epoch_15.pt"), patch_dropout=0.5)
    clip.model, clip.tokenize(["a photo of a cat"]), clip.resize(pil_image), clip.normalise(uint8_B3HW)

Shape suffixes: H and W are an image's height and width in B3HW.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.model import checkpoint_file, hub
from upcycle_bench.model.config import describe, own_config
from upcycle_bench.model.pixels import PREPROCESS, agreed
from upcycle_bench.model.state_dict import Weights, has_logit_bias, put, weights_of
from upcycle_bench.model.towers import image_size
from upcycle_bench.model.transformers_clip import CLIP_TOKENS
from upcycle_bench.util.errors import UserError, one_line

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Clip:
    """A CLIP with its tokenizer and transforms.

    tokenize: list of strings -> int64 [B, L];
    resize: PIL image -> uint8 [3, H, W], deterministic;
    augment: PIL image -> uint8 [3, H, W], open_clip's random resized crop; draws from torch's global generator;
    transform: PIL image -> float32 [3, H, W], open_clip's own evaluation transform;
    mean, std: of the three colours, for `normalise`;
    preprocess: settings of the transforms that are not open_clip's usual ones (some pretrained tags have their own);
    interpolated: position embeddings that were resized to fit, "50x768 to 197x768" by name.
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
    interpolated: Mapping[str, str] = field(default_factory=dict)

    @property
    def pixels(self) -> dict[str, Any]:
        """All settings of the transforms, and the size in pixels, ready for JSON."""
        settings = self.model.visual.preprocess_cfg
        listed = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        return {key: listed[key] for key in (*PREPROCESS, "size")}

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
    interpolate: bool = False,
    logit_bias: bool = False,
) -> Clip:
    """Build the model `name`, in any of the ways of `config.DOORS`; weights from `checkpoint`, or random from `seed`.

    `precision` is open_clip's: fp16 and bf16 leave LayerNorms and embeddings in float32. A state dict does not name its
    activation: weights trained with QuickGELU (OpenAI's, LAION-400M's ViT-B-32) need the name `ViT-B-32-quickgelu`.
    `preprocess`: settings of the transforms (None: those that come with the name); `interpolate`: resize position
    embeddings that do not fit; `logit_bias`: the model has one, as after training with --siglip.

    Raises UserError for an unknown model, a file that holds no weights, and weights that do not fit or are not finite.
    """
    import open_clip

    found = describe(name)
    name, config = found.name, found.config
    preprocess = agreed([(found.place, found.preprocess if preprocess is None else preprocess)])
    tokenize = _tokenizer(name, config)  # first, since it may lack what only a network has
    known = config["text_cfg"].get("vocab_size", CLIP_TOKENS)
    if isinstance(tokenize, open_clip.SimpleTokenizer) and known < CLIP_TOKENS:
        line = f"vocab_size is {known:,}, but CLIP's tokenizer has {CLIP_TOKENS:,}; give hf_tokenizer_name"
        raise UserError(f"{name}: {line}.")
    weights = None if checkpoint is None else weights_of(checkpoint_file.read(checkpoint))
    if weights is not None:
        _require_activation(weights, name, config)
        logit_bias = logit_bias or has_logit_bias(weights)
    more = {"init_logit_bias": 0.0} if logit_bias and config.get("init_logit_bias") is None else {}
    model, train_transform, transform = build(
        name,
        seed,
        precision=precision,
        **{f"image_{key}": value for key, value in preprocess.items()},
        **more,
        force_patch_dropout=patch_dropout or None,
    )
    interpolated = {} if weights is None else put(weights, model, name, interpolate)
    *resize, to_tensor, normalize = transform.transforms  # Resize, CenterCrop, RGB, ToTensor, Normalize
    *augment, _, _ = train_transform.transforms
    assert "ToTensor" in type(to_tensor).__name__ and type(normalize).__name__ == "Normalize", transform
    return Clip(
        name,
        model,
        tokenize,
        _to_uint8(resize),
        _to_uint8(augment),
        transform,
        tuple(normalize.mean),
        tuple(normalize.std),
        preprocess or None,
        interpolated,
    )


def build(name: str, seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    """open_clip's model of that name with random weights from `seed`, its transforms for training and evaluation.

    `with torch.device("meta")` makes a model without memory. Raises UserError for what open_clip cannot build.
    """
    import open_clip

    level = logging.getLogger().level
    with torch.random.fork_rng(devices=[]), hub.offline():
        torch.manual_seed(seed)
        logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, but here they are wanted
        try:
            made: tuple[Any, Any, Any] = open_clip.create_model_and_transforms(
                name,
                pretrained_text=False,  # a text tower of Hugging Face's would fetch weights
                device=torch.get_default_device(),
                nonscalar_logit_scale=True,  # DeepSpeed cannot broadcast a tensor without dimensions
                **options,
            )
        except Exception as error:  # of open_clip, timm and transformers, for a configuration that is not theirs
            raise UserError(f"{name}: open_clip cannot build this model ({one_line(error)}).") from error
        finally:
            logging.getLogger().setLevel(level)
    trunk: Any = getattr(made[0].visual, "trunk", None)
    built = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if built and tuple(built) != image_size(made[0]):  # open_clip does not tell timm
        size = "x".join(map(str, built))
        raise UserError(f"{name}: timm builds this tower for images of {size}: image_size must be that, too.")
    return made


def _tokenizer(name: str, config: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    import open_clip

    text = config["text_cfg"]
    if own_config(name) and not text.get("hf_tokenizer_name"):  # open_clip would take a "siglip" in the label
        length = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
        return open_clip.SimpleTokenizer(context_length=length, **(text.get("tokenizer_kwargs") or {}))
    return hub.tokenizer_of(name, config)


def _require_activation(weights: Weights, name: str, config: Mapping[str, Any]) -> None:
    """UserError where the file says its activation, as OpenAI's archives do, and it is not that of the model."""
    if weights.quick_gelu is not None and weights.quick_gelu != config.get("quick_gelu", False):
        raise UserError(
            f"{weights.path} was trained with another activation than that of {name}: choose {other_activation(name)}."
        )


def other_activation(name: str) -> str:
    """open_clip's name of the model with QuickGELU in place of GELU, or the reverse; if it has none, what to do."""
    import open_clip

    other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    if other in open_clip.list_models():
        return other
    return f"a JSON file with the configuration of {name} and the other quick_gelu"


def _to_uint8(steps: list[Callable[[Any], Any]]) -> Callable[[Any], np.ndarray]:
    """The steps one after the other, then PIL image -> uint8 [3, H, W]."""

    def apply(image: Any) -> np.ndarray:
        for step in steps:
            image = step(image)
        return np.asarray(image).transpose(2, 0, 1)

    return apply
