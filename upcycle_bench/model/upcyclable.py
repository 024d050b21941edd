"""Can this model be upcycled? Told by its configuration, before weights or a tokenizer are fetched.

    require_upcyclable("ViT-B-16-SigLIP", trained=False)        # UserError for "RN50"

`UNFIT` has a row for each reason that a configuration shows; what is left is built without memory and looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from upcycle_bench.model.clip import build
from upcycle_bench.model.config import describe
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.protocol import PUBLISHED_MOE, MoE
from upcycle_bench.util.errors import UserError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Unfit:
    """A reason: what the model has, told by `fits` from its configuration. `trained`: a bar to training only."""

    what: str
    fits: Callable[[Config], bool]
    remedy: str
    trained: bool = False


UNFIT = (
    Unfit(
        "a text tower of Hugging Face's, whose FFNs have many forms",
        lambda config: bool(config["text_cfg"].get("hf_model_name")),
        "choose a model whose text tower is open_clip's, such as ViT-B-32",
    ),
    Unfit(
        "a ResNet, which has no FFNs",
        lambda config: isinstance(config["vision_cfg"].get("layers"), list | tuple),
        "choose a model with a ViT, such as ViT-B-32",
    ),
    Unfit(
        "a captioning decoder, which contrastive training leaves out",
        lambda config: "multimodal_cfg" in config,
        "`upcycle` and `evaluate` take its two towers; to train, choose a model such as ViT-B-32",
        trained=True,
    ),
)


def require_upcyclable(model: str, moe: MoE = PUBLISHED_MOE, *, trained: bool) -> None:
    """UserError, with the remedy, unless experts can take the place of FFNs in `model`, and be trained if `trained`."""
    require_configuration(model, trained=trained)
    with torch.device("meta"):
        find_layers(build(describe(model).name)[0], moe)


def require_configuration(model: str, *, trained: bool) -> None:
    """The part that needs no model."""
    described = describe(model)
    for row in UNFIT:
        if row.fits(described.config) and (trained or not row.trained):
            raise UserError(f"{model} has {row.what}: {row.remedy}.")
