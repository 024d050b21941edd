"""Files of weights: a whole model, dense or upcycled, in one safetensors file that needs nothing else to be loaded.

    digest = save(clip, moe, folder)                 # every rank calls it; rank 0 writes folder/SHA256.safetensors
    clip = load(folder / f"{digest}.safetensors")    # one process, all experts, on any machine

The file's metadata says how to build the model: its name in open_clip, the MoE settings, and where they differ from
the name's own, the hidden widths and the settings of the transforms; the whole configuration of a model that open_clip
does not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from upcycle_bench import protocol
from upcycle_bench.model.checkpoint_file import read, require_readable
from upcycle_bench.model.clip import Clip, Precision, build, create_clip
from upcycle_bench.model.config import own_config, register
from upcycle_bench.model.ffn import FFN, LayerInit
from upcycle_bench.model.moe import EXPERT_KEY, moe_layers
from upcycle_bench.model.state_dict import UNSAVED, require_finite
from upcycle_bench.model.surgery import find_layers, hidden_widths, put_experts
from upcycle_bench.util import distributed, strict_json
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.files import file_sha256, publish, temporary

FORMAT = "upcycle-bench/1"  # the one key of the metadata: safetensors writes several in a random order


def save(clip: Clip, moe: protocol.MoE, folder: Path) -> str:
    """Write the model to `folder`/SHA256.safetensors; returns the sha256 on rank 0, "" on the other ranks."""
    with temporary(folder / "weights") as part:
        if digest := write(clip, moe, part):
            publish(part, folder / f"{digest}.safetensors")
    return digest


def write(clip: Clip, moe: protocol.MoE, path: Path) -> str:
    """Write the model to `path`, as `save` does to a path of its own; the file is not written atomically.

    Raises UserError, on every rank, for a model with a NaN or an infinity.
    """
    from safetensors.torch import save_file

    state = consolidate(clip)
    require_finite(state, "the model", UNSAVED)
    if not distributed.is_main():
        return ""
    settings: dict[str, Any] = {"model": clip.name, "moe": moe.model_dump() if moe_layers(clip.model) else None}
    with torch.device("meta"):
        usual = hidden_widths(build(clip.name)[0])
    if hidden := {path: width for path, width in hidden_widths(clip.model).items() if width != usual.get(path)}:
        settings["hidden"] = hidden  # left out where usual: files of other models keep their bytes, and their names
    if config := own_config(clip.name):
        settings["config"] = config
    if clip.preprocess:
        settings["preprocess"] = dict(clip.preprocess)
    path.parent.mkdir(parents=True, exist_ok=True)  # after the collectives: an error here must not leave ranks waiting
    save_file(state, path, metadata={FORMAT: strict_json.dumps(settings)})
    return file_sha256(path)


def consolidate(clip: Clip) -> dict[str, Tensor]:
    """The whole model's state dict on the CPU, the same on every rank.

    All ranks must call it: experts that expert parallelism spread over them are gathered under their global numbers.
    """
    state = {}
    layers = {layer.place.mlp_path: layer for layer in moe_layers(clip.model).values()}
    for key, value in clip.model.state_dict().items():
        match = EXPERT_KEY.fullmatch(key)
        layer = layers[match[1]] if match else None
        if match is None or layer is None or layer.settings.ep_size == 1:
            # A copy of each: safetensors refuses tensors that share storage.
            state[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            continue
        path, local, part = match.groups()
        shards = [torch.empty_like(value) for _ in range(layer.settings.ep_size)]
        dist.all_gather(shards, value.contiguous(), group=layer.expert_group)
        for rank, shard in enumerate(shards):
            number = rank * len(layer.experts) + int(local)
            state[f"{path}.{layer.state_key(number, part)}"] = shard.cpu()
    return state


def settings_in(path: Path) -> dict[str, Any] | None:
    """What a file that `save` or `write` wrote says of its model; None for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
    except (OSError, SafetensorError):
        return None
    try:
        return None if text is None else dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: does not fit its own metadata ({error}).") from None


def of_record(record: Path, digest: str | None) -> Path:
    """The file in the cache with the weights of a record; `digest` is the sha256 that the record names.

    Raises UserError where the record names none, and where the file is missing or damaged.
    """
    if digest is None:
        raise UserError(f"{record}: the record of a run that failed before it had weights; give one that went through.")
    file = cache_root() / "weights" / f"{digest}.safetensors"
    if not file.is_file():
        raise UserError(
            f"{record}: its weights are not in this machine's cache ({file}); copy them from where the run was made, "
            "or run it again with `run --fresh`."
        )
    if file_sha256(file) != digest:
        raise UserError(f"{file}: is not what its name says; delete it, and copy it again or train with `run --fresh`.")
    return file


def load(path: Path) -> Clip:
    """The model of a file that `save` or `write` wrote: in eval mode, with all experts, in the file's dtypes.

    Raises UserError for a file of another kind, and for one that does not fit its own metadata.
    """
    from safetensors.torch import load_file

    require_readable(path)
    if (settings := settings_in(path)) is None:
        read(path)  # says it of a damaged file
        raise UserError(f"{path}: not written by upcycle-bench ({FORMAT}); give what run, upcycle or compress wrote.")
    try:
        state = load_file(path)
        require_finite(state, path)
        name = settings["model"]
        if "config" in settings:
            name = register(settings["config"], name.rpartition("@")[0], str(path))
        clip = blank(name, state, settings.get("preprocess") or {})
        for mlp_path, hidden in settings.get("hidden", {}).items():
            mlp = clip.model.get_submodule(mlp_path)
            FFN.of(mlp).resized(hidden).put_into(mlp)
        if settings["moe"] is not None:
            moe = protocol.MoE.model_validate(settings["moe"] | {"ep_size": 1})
            inits = {}
            for layer in find_layers(clip.model, moe):
                ffn = FFN.of(clip.model.get_submodule(layer.mlp_path))
                router_ED = torch.zeros(layer.num_experts, ffn.width)
                inits[layer.name] = LayerInit([ffn.expert() for _ in range(layer.num_experts)], router_ED)
            clip = replace(clip, model=put_experts(clip.model, inits, moe))
        take_dtypes(clip.model, state)
        clip.model.load_state_dict(state, strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{path}: does not fit its own metadata ({reason}).") from None
    clip.model.eval()
    return clip


def blank(name: str, state: Mapping[str, Tensor], preprocess: Mapping[str, Any] | None = None) -> Clip:
    """The dense model of that name into which `load` puts a file with the tensors `state`, but for their dtypes."""
    return create_clip(name, precision=_precision(state), preprocess=preprocess, logit_bias="logit_bias" in state)


def _precision(state: Mapping[str, Tensor]) -> Precision:
    """The precision with which open_clip must build the model of that state.

    In mixed precision its LayerNorms are of another class. Where all tensors have one dtype, `take_dtypes` suffices.
    """
    images = ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")
    weight = next((state[key] for key in images if key in state), None)
    norm = state.get("ln_final.weight", state.get("text.ln_final.weight"))
    if weight is None or norm is None or weight.dtype == norm.dtype:
        return "fp32"
    return "bf16" if weight.dtype == torch.bfloat16 else "fp16"


def take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the tensors of `model` the dtypes of `state`, and logit scale and bias their number of dimensions."""
    for key, value in model.state_dict(keep_vars=True).items():
        if key in state:
            value.data = value.data.to(state[key].dtype)
    for name in ("logit_scale", "logit_bias"):
        given, own = state.get(name), getattr(model, name, None)
        if isinstance(own, nn.Parameter) and given is not None and given.numel() == 1:
            own.data = own.data.reshape(given.shape)
