"""Which weights does a checkpoint hold, and do they fit the model? Found by their names and shapes.

    held = checkpoint_file.read(path)
    put(weights_of(held), model, "ViT-B-32")    # UserError unless each tensor has its place

`weights_of` goes into what trainings wrap around a state dict; `put` takes off the prefixes that wrappers of a model
leave, gives other projects' weights open_clip's names, and compares both sides.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upcycle_bench.model.checkpoint_file import Held
from upcycle_bench.model.misfit import Sides, require_fit, shape
from upcycle_bench.model.moe import EXPERT_KEY
from upcycle_bench.model.transformers_clip import is_transformers, to_open_clip
from upcycle_bench.util.errors import UserError, one_line

NESTS = ("state_dict", "model", "module", "model_state_dict")  # where trainings keep the weights
AVERAGES = ("ema", "state_dict_ema", "model_ema", "ema_state_dict")  # where they keep a moving average of them
LARGEST_SCALE = 10.0  # of logit scales; CLIP's is ln 100 = 4.6 at most, SigLIP's is 4.8
DEEPEST = 4  # nests within nests
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Weights:
    """Tensors by name, as the file has them; `quick_gelu`: their activation, where the file says it."""

    path: Path
    tensors: dict[str, Tensor]
    quick_gelu: bool | None


def weights_of(held: Held) -> Weights:
    """The weights in what a file holds. A moving average is taken only where nothing else is there, and is said.

    Raises UserError for what holds none, and for a model that has experts already.
    """
    value = held.value
    for _ in range(DEEPEST):
        inner = next((name for name in (*NESTS, *AVERAGES) if _holds_tensors(value, name)), None)
        if inner is None:
            break
        if inner in AVERAGES:
            print(f"{held.path} holds a moving average ({inner}) and no other weights: it is used", file=sys.stderr)
        value = value[inner]
    if not isinstance(value, Mapping):
        what = "a single tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"{held.path} holds {what}, no weights by name; save model.state_dict() and give that.")
    named = {key: _tensor(each) for key, each in value.items() if isinstance(key, str)}
    tensors = {key: each for key, each in named.items() if each is not None}
    if tensors.pop("n_averaged", None) is not None:  # of torch's AveragedModel
        print(f"{held.path} holds a moving average (AveragedModel): it is used", file=sys.stderr)
    if not tensors:
        keys = ", ".join(map(str, list(value)[:5])) or "nothing"
        raise UserError(f"{held.path} holds no weights (but {keys}); save model.state_dict() and give that.")
    if expert := next(filter(EXPERT_KEY.fullmatch, tensors), None):
        raise UserError(
            f"{held.path} is already upcycled ({expert}); give the dense weights, or score it with "
            "`upcycle-bench evaluate FILE` without --model."
        )
    return Weights(held.path, tensors, held.quick_gelu)


def has_logit_bias(weights: Weights) -> bool:
    """Whether the model was trained with one, as by open_clip's --siglip."""
    return any(key.rpartition(".")[2] == "logit_bias" for key in weights.tensors)


def put(weights: Weights, model: Any, name: str, interpolate: bool = False) -> dict[str, str]:
    """Load the weights into open_clip's `model` called `name`; UserError unless they fit and are finite.

    With `interpolate`, position embeddings of another grid or context length are resized as open_clip does it; the
    answer says which, "50x768 to 197x768" by name.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    wanted = model.state_dict()
    found = _bare(weights, wanted)
    if is_transformers(found):
        found = to_open_clip(found)
    found = convert_state_dict(model, found)  # Apple's MobileCLIP
    if "positional_embedding" in found and not hasattr(model, "positional_embedding"):
        found = convert_to_custom_text_state_dict(found)
    found.pop("text.transformer.embeddings.position_ids", None)  # transformers before 4.31 saved them
    for key, own in model.named_buffers():  # TorchScript keeps those that a state dict leaves out: the causal mask
        if key not in wanted and key in found and torch.equal(found[key].to(own), own):
            del found[key]
    if "logit_bias" in wanted:  # a model without one is as good as one with a bias of 0
        found.setdefault("logit_bias", torch.zeros(1))
    for key in ("logit_scale", "logit_bias"):
        if key in found and key in wanted and found[key].numel() == wanted[key].numel():
            found[key] = found[key].reshape(wanted[key].shape)
    resized = _resize_positions(found, model, weights.path) if interpolate else {}
    require_fit(Sides(weights.path, name, found, wanted, weights.quick_gelu))
    _require_plain(found, wanted, weights.path)
    require_finite(found, weights.path)
    _require_logarithm(found, weights.path)
    model.load_state_dict(found, strict=True)
    return resized


def _resize_positions(found: dict[str, Tensor], model: Any, path: Path) -> dict[str, str]:
    """Resize position embeddings in place by open_clip's functions; what was done, by name."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    before = {key: value for key, value in found.items() if key.endswith("positional_embedding")}
    found |= {key: value.float() for key, value in before.items()}  # there is no bicubic in half precision on a CPU
    try:
        resize_pos_embed(found, model)
        resize_text_pos_embed(found, model)
    except Exception as error:  # open_clip has no error of its own for a grid that is not square
        raise UserError(f"{path}: its position embeddings cannot be interpolated ({one_line(error)}).") from None
    changed = {key: value for key, value in before.items() if found[key].shape != value.shape}
    found |= {key: value for key, value in before.items() if key not in changed}
    return {key: f"{shape(value)} to {shape(found[key])}" for key, value in changed.items()}


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """UserError that names the first tensor with a NaN or an infinity."""
    for key, value in tensors.items():
        if value.is_floating_point() and value.itemsize > 1 and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise UserError(
                f"{path}: {key} has {bad:,} values of {value.numel():,} that are NaN or infinite; give a "
                "checkpoint from before the training diverged."
            )


def _require_logarithm(found: Mapping[str, Tensor], path: Path) -> None:
    """UserError for a logit scale that some export has exponentiated: 100 stands for a factor of e^100."""
    scale = float(found["logit_scale"].max())
    if scale > LARGEST_SCALE:
        raise UserError(
            f"{path}: logit_scale is {scale:.4g}, which would be a factor of e^{scale:.4g}; it holds the factor "
            "itself: store its logarithm, as open_clip does."
        )


def _tensor(value: Any) -> Tensor | None:
    """A tensor or an array of numbers as a tensor; None for anything else that stands among weights."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value)
    return value if isinstance(value, Tensor) else None


def _require_plain(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """UserError for weights that are not the numbers they stand for: quantised, sparse, or without values."""
    for key, value in found.items():
        plain = value.is_floating_point() and value.itemsize > 1 and value.layout is torch.strided and not value.is_meta
        if wanted[key].is_floating_point() and not plain:
            form = "without values" if value.is_meta else f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise UserError(f"{path}: {key} is {form}; give dense weights in float32, bfloat16 or float16.")


def _holds_tensors(value: Any, name: str, depth: int = DEEPEST) -> bool:
    """Whether `value[name]` is a dict with a tensor in it, or in a nest of it."""
    inner = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(inner, Mapping) or depth == 0:
        return False
    return any(isinstance(each, Tensor) for each in inner.values()) or any(
        _holds_tensors(inner, nest, depth - 1) for nest in (*NESTS, *AVERAGES)
    )


def _bare(weights: Weights, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without torch's wrappers in their names, and without what all names begin with, if none fits."""
    found = {WRAPPERS.sub("", key): value for key, value in weights.tensors.items()}
    if len(found) < len(weights.tensors):
        raise UserError(f"{weights.path} holds the same weights with and without _orig_mod; save one of them.")
    while not found.keys() & wanted.keys():
        first = {key.partition(".")[0] for key in found}
        if len(first) != 1 or not all("." in key for key in found):
            break
        found = {key.partition(".")[2]: value for key, value in found.items()}
    return found
