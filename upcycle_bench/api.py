"""The Python API: upcycle an open_clip CLIP, save it, load it. It needs no process group and starts none.

model = upcycle(dense, "cluster-aware", calibration=loader, tau=0.8)
save(model, "moe.safetensors", "ViT-B-32")
clip = load("moe.safetensors")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.model import surgery, weights
from upcycle_bench.model.clip import PREPROCESS, Clip, create_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.protocol import PUBLISHED_MOE
from upcycle_bench.strategy import resolve_moe
from upcycle_bench.upcycling.calibration_pairs import CalibrationPairs
from upcycle_bench.upcycling.from_checkpoint import choose_strategy, moe_settings
from upcycle_bench.upcycling.initialise import make_experts
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import publish, temporary


def upcycle(
    model: Any,
    strategy: str = "cluster-aware",
    *,
    calibration: Iterable[tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
    experts: int = PUBLISHED_MOE.experts,
    top_k: int = PUBLISHED_MOE.top_k,
    every: int = PUBLISHED_MOE.every,
    offset: int = PUBLISHED_MOE.offset,
    capacity_factor: float = PUBLISHED_MOE.capacity_factor,
    min_capacity: int = PUBLISHED_MOE.min_capacity,
    second_expert_sampling: bool = PUBLISHED_MOE.second_expert_sampling,
    **options: Any,
) -> Any:
    """A copy of `model` in which every `every`-th FFN from `offset` on is a mixture of experts; `model` is not changed.

    model: an open_clip CLIP with ViT towers, of any dtype, on any device; the copy has the same dtype, device and mode.
    strategy: one of `upcycle-bench list strategies`; `options` are its options, `seed` seeds its random numbers.
    calibration: batches of (images [B, 3, height, width] as the model takes them, texts [B, L]), for strategies that
    calibrate. Pairs are taken until the strategy has as many as it asks for; if there are fewer, a warning says so.
    The MoE settings have the values of arXiv:2604.13508 as defaults; capacity applies in training only.

    Raises UserError, one line, for a model, strategy, option or calibration that cannot be used.
    """
    chosen = choose_strategy(strategy, options)
    moe = moe_settings(
        experts=experts,
        top_k=top_k,
        every=every,
        offset=offset,
        capacity_factor=capacity_factor,
        min_capacity=min_capacity,
        second_expert_sampling=second_expert_sampling,
    )
    if chosen.calibration_pairs and calibration is None:
        raise UserError(
            f"{strategy} calibrates on {chosen.calibration_pairs:,} image-text pairs: give calibration=, an iterable "
            "of (images, texts) batches, or choose a strategy that needs none, such as sparse-upcycling."
        )
    moe = resolve_moe(chosen, moe)
    inits = make_experts(chosen, model, moe, seed, CalibrationPairs(strategy, model, calibration or ()))
    with torch.random.fork_rng(devices=[]):  # DeepSpeed's gate draws weights, which are replaced
        return surgery.put_experts(model, inits, moe)


def save(model: Any, path: str | os.PathLike[str], name: str) -> str:
    """Write `model`, upcycled or dense, as one safetensors file that `load` reads; returns its sha256.

    `name` is open_clip's name of the dense model; it goes into the file. An existing file is replaced atomically.
    Raises UserError if the model does not have the form of that name, or the file cannot be written.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: {path.absolute().parent} is not a folder; make it first.")
    with torch.device("meta"):
        form = create_clip(name)
    _compare(model, form.model, name)
    experts = [expert for layer in moe_layers(model).values() for expert in layer.experts]
    if any(hasattr(expert, "merged") for expert in experts):  # the file holds plain experts only
        model = copy.deepcopy(model)
        surgery.merge(model)
    moe = next((layer.settings for layer in moe_layers(model).values()), None) or PUBLISHED_MOE
    clip = replace(form, model=model, preprocess=_preprocess(model, form.model))
    try:
        with temporary(path) as part:
            if digest := weights.write(clip, moe, part):
                publish(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from None
    return digest


def load(path: str | os.PathLike[str]) -> Clip:
    """The model of a file that `save`, `upcycle-bench upcycle` or a run wrote, with its tokenizer and transform.

    `clip.model` (on the CPU, in eval mode, in the file's dtypes), `clip.tokenize(["a cat"])` -> [B, L],
    `clip.transform(pil_image)` -> [3, height, width], `clip.name`. Raises UserError for any other file.
    """
    return weights.load(Path(path))


def _compare(model: Any, form: nn.Module, name: str) -> None:
    """UserError unless `model` has the tensors and activations of `form`, apart from FFNs that became experts."""
    replaced = tuple(f"{layer.place.mlp_path}." for layer in moe_layers(model).values())
    ours, theirs = _shapes(model), _shapes(form)
    differ = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
    activations = [{repr(part) for part in module.modules() if _is_activation(part)} for module in (model, form)]
    if wrong := sorted(key for key in differ if not key.startswith(replaced)):
        raise UserError(f"the model is no {name}: {wrong[0]} differs; give the open_clip name it was made by.")
    if activations[0] != activations[1]:
        ours_text, theirs_text = (", ".join(sorted(each)) for each in activations)
        raise UserError(
            f"the model is no {name}: its activation is {ours_text}, not {theirs_text}; give the open_clip name it was "
            "made by."
        )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name; a logit scale of shape (1,) is given as a scalar."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return shapes | ({"logit_scale": ()} if shapes.get("logit_scale") == (1,) else {})


def _is_activation(module: nn.Module) -> bool:
    return type(module).__name__ in ("GELU", "QuickGELU")


def _preprocess(model: Any, form: Any) -> dict[str, Any] | None:
    """The model's own settings of transforms, where they differ from those of its name; else None."""
    usual = form.visual.preprocess_cfg
    own = getattr(model.visual, "preprocess_cfg", usual)
    changed = {key: own[key] for key in PREPROCESS if _listed(own[key]) != _listed(usual[key])}
    return changed or None


def _listed(value: Any) -> Any:
    """A tuple as a list, since JSON has no tuples; other values as they are."""
    return list(value) if isinstance(value, tuple) else value
