"""One training step's parts: the forward pass under autocast, the terms of the loss, the clamp of the logit scale.

engine = create_engine(Features(clip.model, "bf16"), job)            # upcycle_bench.training.loop
losses, scale = compute_losses(engine, clip, batch, job, layers, extra)
engine.backward(torch.stack(list(losses.values())).sum())
engine.step()
clamp_logit_scale(clip.model, job)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.data.pairs import Batch
from upcycle_bench.model import padding
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.model.precision import autocast
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.job import Job
from upcycle_bench.util import distributed
from upcycle_bench.util.rng import Stream


class Features(nn.Module):
    """The CLIP under autocast, so that DeepSpeed need not know of it: (image [B, C], text [B, C], scale), float32."""

    def __init__(self, clip: nn.Module, precision: str) -> None:
        super().__init__()
        self.clip, self.precision = clip, precision
        self.packs = padding.packs(clip)

    def forward(self, images: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clip: Any = self.clip
        with autocast(images.device, self.precision):
            image_BC = clip.encode_image(images, normalize=True)
            text_BC = padding.encode_text(clip, text_BL) if self.packs else clip.encode_text(text_BL)
            text_BC = F.normalize(text_BC, dim=-1)
        return image_BC.float(), text_BC.float(), clip.logit_scale.exp().float().squeeze()


def compute_losses(
    engine: Any, clip: Clip, batch: Batch, job: Job, layers: Mapping[str, MoEFFN], extra: ExtraLoss | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of the loss by name (float32 scalars, to be summed) and the logit scale, for this rank's `batch`.

    Each term's mean over ranks is its value on the global batch, so averaged gradients equal those of one process.
    """
    from open_clip.loss import ClipLoss

    device = next(clip.model.parameters()).device
    images, texts = clip.normalise(batch.images.to(device)), batch.texts.to(device)
    image_BC, text_BC, scale = engine(images, texts)
    rank, world = distributed.rank(), distributed.world_size()
    contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    logits = contrastive.get_logits(image_BC, text_BC, scale)
    target_B = contrastive.get_ground_truth(device, len(image_BC))
    per_tower = [F.cross_entropy(each, target_B, label_smoothing=job.label_smoothing) for each in logits]
    losses = {"contrastive": (per_tower[0] + per_tower[1]) / 2}
    if layers:
        losses["load_balance"] = load_balance(layers, job.load_balance)
    if extra is not None:
        with autocast(device, job.schedule.precision):
            losses[extra.name] = extra.compute().float()
    return losses, scale


def load_balance(layers: Mapping[str, MoEFFN], coefficient: float) -> Tensor:
    """The load-balancing loss (Eq. 5) of the forward pass just made, summed over `layers`, times its coefficient."""
    per_layer = torch.stack([layer.l_aux for layer in layers.values() if layer.l_aux is not None])
    return coefficient * per_layer.sum().float()


@contextlib.contextmanager
def patch_dropout_stream(key: str, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Give the forward pass a random stream of its own: open_clip's patch dropout draws from the global one."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(Stream(("patch dropout", key, step, rank)).seed())
        yield


@torch.no_grad()
def clamp_logit_scale(model: nn.Module, job: Job) -> None:
    """Keep the logarithm of the logit scale at or below `job.schedule.logit_scale_max`."""
    parameter: Any = model.logit_scale
    if not parameter.requires_grad:
        return
    if job.zero_stage:  # ZeRO keeps a master copy, which would undo a clamp of the parameter alone
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).clamp(max=job.schedule.logit_scale_max))
    parameter.clamp_(max=job.schedule.logit_scale_max)
