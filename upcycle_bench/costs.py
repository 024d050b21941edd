"""What things cost: phases measured while they run, parameters counted, and the estimate that `--dry-run` prints.

FLOPs are those of matrix multiplications and attention, 2 per multiply-add. Measured ones come from PyTorch's
FlopCounterMode; the estimate counts the dense model on the meta device and adds the experts by formula.
"""

from __future__ import annotations

import contextlib
import copy
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from upcycle_bench.dense import Clip, create_clip
from upcycle_bench.moe import moe_layers
from upcycle_bench.protocol import Protocol
from upcycle_bench.strategy import FFN, Layer
from upcycle_bench.surgery import find_layers


@dataclass
class Phase:
    """One phase's cost; peak memory is the process's high-water mark (on a GPU, the device's) by the phase's end."""

    seconds: float = 0.0
    flops: int | None = None
    peak_memory_bytes: int = 0


@dataclass
class Meter:
    """Collects phases: `with meter.phase("train") as phase: ...`; FLOPs are counted with `count=True`."""

    device: torch.device
    phases: dict[str, Phase] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str, count: bool = False) -> Iterator[Phase]:
        phase = self.phases[name] = Phase()
        counter = FlopCounterMode(display=False) if count else contextlib.nullcontext()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        try:
            with counter:
                yield phase
        finally:
            phase.seconds = time.perf_counter() - began
            if isinstance(counter, FlopCounterMode):
                phase.flops = counter.get_total_flops()
            phase.peak_memory_bytes = peak_memory(self.device)


def peak_memory(device: torch.device) -> int:
    """High-water mark in bytes: of the device's memory on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def forget_peak_memory() -> None:
    """Let Linux begin a new high-water mark: a run's peak must not be that of the run before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(total, active per token) parameters of a model with all its experts; active: k of N in every MoE layer."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        experts = sum(p.numel() for p in layer.experts.parameters())
        idle += experts * (layer.layer.num_experts - layer.layer.top_k) // layer.layer.num_experts
    return total, total - idle


@dataclass(frozen=True)
class Estimate:
    """What a run will take; `seconds` is the estimate of `estimate_seconds`, or None."""

    layers: tuple[str, ...]
    parameters_total: int
    parameters_active: int
    steps: int
    samples: int
    forward_flops: int
    train_flops: int


def estimate(protocol: Protocol, *, moe: bool, trains: bool) -> Estimate:
    """Counts on the meta device: nothing is computed. Text is counted at full context, experts as copies of the FFN."""
    schedule = protocol.train.schedule
    with torch.device("meta"):
        clip = create_clip(protocol.model, patch_dropout=schedule.patch_dropout)
    forward = dense_forward_flops(clip)
    total = sum(p.numel() for p in clip.model.parameters())
    active = total
    layers = find_layers(clip.model, protocol.moe) if moe else []
    for layer in layers:
        ffn = FFN.of(clip.model.get_submodule(layer.mlp_path))
        size = ffn.w1_HD.numel() + ffn.b1_H.numel() + ffn.w2_DH.numel() + ffn.b2_D.numel()
        router = layer.num_experts * ffn.width
        total += size * (layer.num_experts - 1) + router
        active += size * (layer.top_k - 1) + router
        extra = 4 * ffn.width * ffn.hidden * (layer.top_k - 1) + 2 * router
        forward += extra * tokens(clip, layer, schedule.patch_dropout)
    steps = schedule.steps if trains else 0
    samples = steps * schedule.batch_size
    names = tuple(layer.name for layer in layers)
    return Estimate(names, total, active, steps, samples, forward, 3 * forward * samples)


def tokens(clip: Clip, layer: Layer, patch_dropout: float) -> int:
    """Tokens of one sample at that layer, in training."""
    if layer.tower == "text":
        return int(clip.model.context_length)
    patches = len(clip.model.visual.positional_embedding) - 1
    return 1 + max(1, int(patches * (1 - patch_dropout)))


def dense_forward_flops(clip: Clip) -> int:
    """FLOPs of one image-text pair through the dense model in training mode; nothing is computed."""
    model = copy.deepcopy(clip.model).to("meta").train()
    height, width = model.visual.image_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, height, width), torch.zeros(1, model.context_length, dtype=torch.long))
    return counter.get_total_flops()


def estimate_seconds(protocol: Protocol, train_flops: int, device: torch.device) -> float:
    """Rough training time on one device like this one: a dense step on a few random pairs, scaled by FLOPs.

    The pairs are as many as some seconds of a CPU allow, so overheads weigh as in training on small models.
    """
    from upcycle_bench.train import attention_kernel, autocast, longest_sequence

    schedule = protocol.train.schedule
    clip = create_clip(protocol.model, patch_dropout=schedule.patch_dropout)
    model = clip.model.to(device).train()
    height, width = model.visual.image_size
    pairs = min(schedule.batch_size, max(2, 10**11 // (3 * dense_forward_flops(clip))))
    images = torch.rand(pairs, 3, height, width, device=device)
    texts = torch.ones(pairs, model.context_length, dtype=torch.long, device=device)
    with attention_kernel(device, longest_sequence(model)):
        with FlopCounterMode(display=False) as counter:  # it slows the step, so this one only warms up
            _probe_step(model, images, texts, autocast(device, schedule.precision))
        seconds = min(_probe_step(model, images, texts, autocast(device, schedule.precision)) for _ in range(2))
    return seconds / counter.get_total_flops() * train_flops


def _probe_step(model: Any, images: Tensor, texts: Tensor, cast: contextlib.AbstractContextManager[Any]) -> float:
    began = time.perf_counter()
    with cast:
        image_BD, text_BD, _ = model(images, texts)[:3]
    (image_BD.float() @ text_BD.float().T).logsumexp(1).sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began
