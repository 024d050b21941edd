"""The parts of one training step: the forward pass under autocast, the terms of the loss, the clamp of the logit scale.

    engine = create_engine(Features(clip.model, "bf16"), job)           # training.loop
    losses, scale = compute_losses(engine, clip, batch, job, layers, extra)
    engine.backward(torch.stack(list(losses.values())).sum())
    engine.step()
    clamp_logit_scale(clip.model, job)

Loss: Eq. 13 of arXiv:2604.13508, of which Eq. 5 is the load-balancing term.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.data.batches import Batch
from upcycle_bench.model import padding
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.model.precision import autocast
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.job import Job
from upcycle_bench.util import distributed
from upcycle_bench.util.rng import Stream


class Features(nn.Module):
    """The CLIP under autocast: images, text_BL -> (image_BC, text_BC, logit scale), float32, features of unit length.

    DeepSpeed wraps it as a float32 model: its own mixed precision is not used.
    """

    def __init__(self, clip: nn.Module, precision: str) -> None:
        super().__init__()
        self.clip, self.precision = clip, precision
        self.encode_text = padding.text_encoder(clip)

    def forward(self, images: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clip: Any = self.clip
        with autocast(images.device, self.precision):
            image_BC = clip.encode_image(images, normalize=True)
            text_BC = F.normalize(self.encode_text(text_BL), dim=-1)
        return image_BC.float(), text_BC.float(), clip.logit_scale.exp().float().squeeze()


def compute_losses(
    engine: Any, clip: Clip, batch: Batch, job: Job, layers: Mapping[str, MoEFFN], extra: ExtraLoss | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of the loss by name, float32 scalars to be summed, and the logit scale, of this rank's `batch`.

    A term's mean over ranks is its value on the global batch. So gradients, averaged over ranks, equal those of one
    process.
    """
    from open_clip.loss import ClipLoss

    device = next(clip.model.parameters()).device
    images, texts = (each.to(device, non_blocking=True) for each in (batch.images, batch.texts))
    images = clip.normalise(images)
    image_BC, text_BC, scale = engine(images, texts)
    rank, world = distributed.rank(), distributed.world_size()
    contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    logits = contrastive.get_logits(image_BC, text_BC, scale)  # images to texts, texts to images: [B, all ranks' B]
    target_B = contrastive.get_ground_truth(device, len(image_BC))  # the column of each row's own pair
    per_direction = [F.cross_entropy(each, target_B, label_smoothing=job.label_smoothing) for each in logits]
    losses = {"contrastive": (per_direction[0] + per_direction[1]) / 2}
    if layers:
        losses["load_balance"] = load_balance(layers, job.load_balance)
    if extra is not None:
        with autocast(device, job.schedule.precision):
            losses[extra.name] = extra.compute().float()
    return losses, scale


def load_balance(layers: Mapping[str, MoEFFN], coefficient: float) -> Tensor:
    """`coefficient` times the load-balancing loss (Eq. 5) of the last forward pass, summed over `layers`; float32."""
    per_layer = torch.stack([layer.l_aux for layer in layers.values() if layer.l_aux is not None])
    return coefficient * per_layer.sum().float()


@contextlib.contextmanager
def patch_dropout_stream(key: str, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generator for one step, and restore it after: open_clip's patch dropout draws from it.

    So a strategy that draws random numbers changes no other strategy's patches.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(Stream(("patch dropout", key, step, rank)).seed())
        yield


@torch.no_grad()
def clamp_logit_scale(model: nn.Module, job: Job) -> None:
    """Keep the logarithm of the logit scale at or below `job.schedule.logit_scale_max`."""
    parameter: Any = model.logit_scale
    if not parameter.requires_grad:
        return
    if job.zero_stage:  # ZeRO's master copy is clamped too, or the next step would write the old value back
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).clamp(max=job.schedule.logit_scale_max))
    parameter.clamp_(max=job.schedule.logit_scale_max)
