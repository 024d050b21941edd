"""The Python API: upcycle an open_clip CLIP, save it, load it. It needs no process group and starts none.

model = upcycle(dense, "cluster-aware", calibration=loader, tau=0.8)
save(model, "moe.safetensors", "ViT-B-32")
clip = load("moe.safetensors")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle_bench.model import surgery, weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.config import register
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.pixels import agreed, checked
from upcycle_bench.model.rebuild import other_answers, unlike_its_file
from upcycle_bench.model.towers import context_length, image_size, image_weight, vocab_size
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


def save(model: Any, path: str | os.PathLike[str], name: str | Mapping[str, Any]) -> str:
    """Write `model`, upcycled or dense, as one safetensors file that `load` reads; returns its sha256.

    `name` says which dense model it is: open_clip's name, any other way of docs/checkpoints.md, or a configuration as
    open_clip has them, which then goes into the file. An existing file is replaced atomically. Raises UserError if a
    model of that name would compute something else with these weights, or the file cannot be written.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: {path.absolute().parent} is not a folder; make it first.")
    name = name if isinstance(name, str) else register(name, path.stem, "the configuration")
    experts = [expert for layer in moe_layers(model).values() for expert in layer.experts]
    if any(hasattr(expert, "merged") for expert in experts):  # the file holds plain experts only
        model = copy.deepcopy(model)
        surgery.merge(model)
    with torch.device("meta"):
        form = weights.blank(name, model.state_dict())
    _require_function(model, form.model, name)
    moe = next((layer.settings for layer in moe_layers(model).values()), None) or PUBLISHED_MOE
    clip = replace(form, model=model, preprocess=_preprocess(model))
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


def _require_function(model: Any, form: Any, name: str) -> None:
    """UserError unless `form`, the dense model of that name, computes what `model` does, once it has its weights.

    Modules and their settings are compared, then features of random inputs. What `form` lacks, on the meta device, is
    taken from `model`: the causal mask.
    """
    weights.take_dtypes(form, model.state_dict())
    reason = unlike_its_file(model, form, dtypes=False)  # a file keeps them
    if reason is None:
        own = dict(model.named_buffers())
        for key, value in list(form.named_buffers()):
            parent, _, leaf = key.rpartition(".")
            setattr(form.get_submodule(parent), leaf, own[key].to(value.dtype))
        reason = other_answers(model, form, *_random_inputs(model))
    if reason is not None:
        raise UserError(f"the model is no {name}: {reason}; give the name or the configuration that it was made by.")


def _random_inputs(model: Any) -> tuple[Tensor, Tensor]:
    """Two images and two texts, which need no end and no padding."""
    generator, weight = torch.Generator().manual_seed(0), image_weight(model)
    images = torch.randn(2, 3, *image_size(model), generator=generator).to(weight)
    texts = torch.randint(1, vocab_size(model), (2, context_length(model)), generator=generator)
    return images, texts.to(weight.device)


def _preprocess(model: Any) -> dict[str, Any] | None:
    """The model's own settings of transforms, where they are not open_clip's usual ones; else None."""
    own = getattr(model.visual, "preprocess_cfg", {})
    return agreed([("the model", checked(own, "the model"))]) or None
