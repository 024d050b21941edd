"""What things cost: phases measured while they run, parameters counted, and the estimate that `--dry-run` prints.

FLOPs are those of matrix multiplications and attention, 2 per multiply-add (`upcycle_bench.flops`); the estimate counts
the dense model on the meta device and adds the experts by formula.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.dense import Clip, create_clip
from upcycle_bench.flops import FlopCounter, counted_flops
from upcycle_bench.moe import moe_layers
from upcycle_bench.protocol import MoE, Protocol
from upcycle_bench.strategy import FFN, Layer, Strategy, resolve_moe
from upcycle_bench.surgery import find_layers

SHAPE_TOLERANCE = 0.01  # of the protocol's own MoE, for a strategy that makes another


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
        counter: Any = counted_flops() if count else contextlib.nullcontext()
        flops = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        try:
            with counter as flops:
                yield phase
        finally:
            phase.seconds = time.perf_counter() - began
            if flops is not None:
                phase.flops = flops.get_total_flops()
            phase.peak_memory_bytes = peak_memory(self.device)


def peak_memory(device: torch.device) -> int:
    """High-water mark in bytes: of the device's memory on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return high_water(Path("/proc/self/status"))


def high_water(status: Path) -> int:
    """This program's most memory in bytes, by Linux's status file, else by getrusage.

    The latter begins with what the process held before it became this program, which a large parent makes much, and
    nothing makes it less (`forget_peak_memory`).
    """
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # bytes there, KiB elsewhere


def forget_peak_memory() -> None:
    """Let Linux begin a new high-water mark: a run's peak must not be that of the run before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(total, active per token) parameters, experts of other ranks included; active: k of N in every MoE layer.

    What all experts of a layer share counts once in both.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        shared = set.intersection(*(set(expert.parameters()) for expert in layer.experts))
        own = sum(p.numel() for p in layer.experts.parameters() if p not in shared) * layer.moe.ep_size
        total += own - own // layer.moe.ep_size
        idle += own * (layer.layer.num_experts - layer.layer.top_k) // layer.layer.num_experts
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
    prepare_flops_at_most: int


def estimate(protocol: Protocol, strategy: Strategy) -> Estimate:
    """Counts on the meta device: nothing is computed. Text is counted at full context, experts as plain FFNs.

    Raises UserError for a hidden width that the strategy cannot make.
    """
    moe, schedule = resolve_moe(strategy, protocol.moe), protocol.train.schedule
    names, total, active, forward = _counts(
        protocol, moe, lambda hidden: strategy.ffn_hidden(hidden, moe), experts=strategy.replaces_ffn
    )
    steps = schedule.steps if strategy.trains else 0
    samples = steps * schedule.batch_size
    train_flops = 3 * forward * samples
    prepare_flops = int(strategy.preparation_budget() * train_flops)
    replaced = names if strategy.replaces_ffn else ()
    return Estimate(replaced, total, active, steps, samples, forward, train_flops, prepare_flops)


def unequal_shape(protocol: Protocol, strategy: Strategy) -> str | None:
    """Why a strategy with a shape of its own does not compare: more or less active than the protocol's own MoE.

    None: it keeps the shape, or active parameters and forward FLOPs differ by at most `SHAPE_TOLERANCE`.
    """
    if resolve_moe(strategy, protocol.moe) == protocol.moe and type(strategy).ffn_hidden is Strategy.ffn_hidden:
        return None
    made = estimate(protocol, strategy)
    _, _, active, forward = _counts(protocol, protocol.moe, lambda width: width, experts=True)
    pairs = (
        ("active parameters", made.parameters_active, active),
        ("forward FLOPs per pair", made.forward_flops, forward),
    )
    reasons = [
        f"{ours:,} {what}, the protocol's own MoE has {theirs:,}"
        for what, ours, theirs in pairs
        if abs(ours - theirs) > SHAPE_TOLERANCE * theirs
    ]
    return "; ".join(reasons) or None


def _counts(
    protocol: Protocol, moe: MoE, hidden_of: Callable[[int], int], *, experts: bool
) -> tuple[tuple[str, ...], int, int, int]:
    """Layers of `moe`, parameters in all and active, and FLOPs of a pair; without `experts` one wide FFN a layer."""
    patch_dropout = protocol.train.schedule.patch_dropout
    clip = meta_clip(protocol.model, patch_dropout)
    forward = _meta_flops(protocol.model, patch_dropout)
    total = sum(p.numel() for p in clip.model.parameters())
    active = total
    layers = find_layers(clip.model, moe)
    for layer in layers:
        ffn = FFN.of(clip.model.get_submodule(layer.mlp_path))
        hidden, width = hidden_of(ffn.hidden), ffn.width
        size, dense_size = (2 * h * width + h + width for h in (hidden, ffn.hidden))
        number, chosen, router = (layer.num_experts, layer.top_k, layer.num_experts * width) if experts else (1, 1, 0)
        total += size * number - dense_size + router
        active += size * chosen - dense_size + router
        extra = 4 * width * (hidden * chosen - ffn.hidden) + 2 * router
        forward += extra * tokens(clip, layer, patch_dropout)
    return tuple(layer.name for layer in layers), total, active, forward


@functools.cache
def meta_clip(model: str, patch_dropout: float) -> Clip:
    """That CLIP without memory for its tensors; not to be changed."""
    with torch.device("meta"):
        return create_clip(model, patch_dropout=patch_dropout)


@functools.cache
def _meta_flops(model: str, patch_dropout: float) -> int:
    return dense_forward_flops(meta_clip(model, patch_dropout))


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
    with torch.device("meta"), FlopCounter() as counter:
        model(torch.empty(1, 3, height, width), torch.zeros(1, model.context_length, dtype=torch.long))
    return counter.get_total_flops()


def estimate_seconds(protocol: Protocol, train_flops: int, device: torch.device) -> float:
    """Rough training time on one device like this one: a dense step on a few random pairs, scaled by FLOPs.

    The pairs are as many as some seconds of a CPU allow, so overheads weigh as in training on small models.
    """
    from upcycle_bench.model.precision import attention_kernel, autocast, longest_sequence

    schedule = protocol.train.schedule
    clip = create_clip(protocol.model, patch_dropout=schedule.patch_dropout)
    model = clip.model.to(device).train()
    height, width = model.visual.image_size
    pairs = min(schedule.batch_size, max(2, 10**11 // (3 * dense_forward_flops(clip))))
    images = torch.rand(pairs, 3, height, width, device=device)
    texts = torch.ones(pairs, model.context_length, dtype=torch.long, device=device)
    with attention_kernel(device, longest_sequence(model)):
        with FlopCounter() as counter:  # it slows the step, so this one only warms up
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
