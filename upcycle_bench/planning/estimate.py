"""What a run will cost, as `--dry-run` prints it.

    costs = estimate(protocol, strategy)                                # parameters, samples, FLOPs
    reason = unequal_cost(protocol, model_cost(model))                  # of a model that was built; None: it compares
    seconds = estimate_seconds(protocol, costs.train_flops, device)     # by a few measured steps

FLOPs are those of matrix multiplications and attention, 2 for each multiply-add (`util.flops`). Those of the dense
model are counted on the meta device; those of the experts are added by formula.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.cost import Cost
from upcycle_bench.model.ffn import FFN, Layer
from upcycle_bench.model.precision import attention_kernel, autocast
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.model.towers import context_length, image_size, image_tokens, longest_sequence
from upcycle_bench.protocol import MoE, Protocol
from upcycle_bench.strategy import Strategy, resolve_moe
from upcycle_bench.util.errors import PluginError
from upcycle_bench.util.flops import FlopCounter

SHAPE_TOLERANCE = 0.01  # how far a strategy's cost may be from that of the protocol's own MoE, as a fraction


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will cost. FLOPs are for one pair (`forward_flops`) or for the whole run (the others)."""

    layers: tuple[str, ...]  # that become experts
    parameters_total: int
    parameters_active: int
    steps: int
    samples: int
    forward_flops: int
    train_flops: int
    prepare_flops_at_most: int  # what the strategy may spend before it makes experts


def estimate(protocol: Protocol, strategy: Strategy) -> Estimate:
    """The cost of one run, counted on the meta device: nothing is computed.

    Texts are counted at full length, experts as plain FFNs, the backward pass as two forward passes. Raises UserError
    for a hidden width that the strategy cannot make.
    """
    moe, steps = resolve_moe(strategy, protocol.moe), training_steps(protocol, strategy)
    schedule = protocol.train.schedule
    counts = _counts(
        protocol,
        moe,
        lambda hidden: strategy.ffn_hidden(hidden, moe),
        schedule.patch_dropout,
        experts=strategy.replaces_ffn,
    )
    samples = steps * schedule.batch_size
    train_flops = 3 * counts.forward * samples
    return Estimate(
        layers=counts.layers if strategy.replaces_ffn else (),
        parameters_total=counts.total,
        parameters_active=counts.active,
        steps=steps,
        samples=samples,
        forward_flops=counts.forward,
        train_flops=train_flops,
        prepare_flops_at_most=int(strategy.preparation_budget() * train_flops),
    )


def training_steps(protocol: Protocol, strategy: Strategy) -> int:
    """The optimiser steps of the strategy's training, 0 if it has none. PluginError unless that is a whole number."""
    steps = protocol.train.schedule.steps
    if not strategy.trains:
        return 0
    if type(strategy).training_steps is Strategy.training_steps:
        return steps
    dropout = protocol.train.schedule.patch_dropout
    dense = forward_flops(protocol.model, dropout)
    moe = _counts(protocol, protocol.moe, lambda hidden: hidden, dropout, experts=True).forward
    own = strategy.training_steps(steps, 3 * dense, 3 * moe)
    if not isinstance(own, int) or own < 1:
        raise PluginError(f"{strategy.info.name}: training_steps gives {own!r}; a training has 1, 2, 3, ... steps")
    return own


def unequal_shape(protocol: Protocol, strategy: Strategy) -> str | None:
    """Why a strategy with a shape of its own will not compare: it costs more or less than the protocol's own MoE.

    None where it keeps the shape, or where active parameters and forward FLOPs differ by at most `SHAPE_TOLERANCE`.
    This is what the strategy declares; `unequal_cost` says it of the model that was built, and decides.
    """
    if longer := unequal_steps(protocol, strategy):
        return longer
    if resolve_moe(strategy, protocol.moe) == protocol.moe and type(strategy).ffn_hidden is Strategy.ffn_hidden:
        return None
    moe = resolve_moe(strategy, protocol.moe)
    made = _counts(protocol, moe, lambda hidden: strategy.ffn_hidden(hidden, moe), 0.0, experts=strategy.replaces_ffn)
    return unequal_cost(protocol, Cost(made.active, made.forward))


def unequal_steps(protocol: Protocol, strategy: Strategy) -> str | None:
    """Why a training of more steps does not compare: it costs more than that of the protocol's own MoE; or None."""
    schedule, steps = protocol.train.schedule, training_steps(protocol, strategy)
    if steps <= schedule.steps:
        return None
    moe = _counts(protocol, protocol.moe, lambda hidden: hidden, schedule.patch_dropout, experts=True)
    made, usual = estimate(protocol, strategy).train_flops, 3 * moe.forward * schedule.steps * schedule.batch_size
    if made <= (1 + SHAPE_TOLERANCE) * usual:
        return None
    return (
        f"{steps:,} training steps and {made:.4g} FLOPs, the protocol's own MoE has {schedule.steps:,} and {usual:.4g}"
    )


def unequal_cost(protocol: Protocol, made: Cost, *, only_above: bool = False) -> str | None:
    """Why a model of that cost does not compare with the protocol's own MoE, or None; `only_above`: if it costs more.

    Its cost is that of an evaluation: no patch is dropped.
    """
    usual = _counts(protocol, protocol.moe, lambda hidden: hidden, 0.0, experts=True)
    pairs = (
        ("active parameters", made.parameters, usual.active),
        ("forward FLOPs per pair", made.flops, usual.forward),
    )
    reasons = [
        f"{ours:,} {what}, the protocol's own MoE has {theirs:,}"
        for what, ours, theirs in pairs
        if (ours - theirs if only_above else abs(ours - theirs)) > SHAPE_TOLERANCE * theirs
    ]
    return "; ".join(reasons) or None


class _Counts(NamedTuple):
    layers: tuple[str, ...]
    total: int  # parameters
    active: int  # parameters used for a token
    forward: int  # FLOPs of a pair


def _counts(
    protocol: Protocol, moe: MoE, hidden_of: Callable[[int], int], patch_dropout: float, *, experts: bool
) -> _Counts:
    """Counts of the model with `moe`, whose FFNs have hidden width `hidden_of(dense width)`.

    Without `experts`, each layer has a single FFN of that width and no router.
    """
    clip = meta_clip(protocol.model, patch_dropout)
    forward = forward_flops(protocol.model, patch_dropout)
    total = sum(p.numel() for p in clip.model.parameters())
    active = total
    layers = find_layers(clip.model, moe)
    for layer in layers:
        ffn = FFN.of(clip.model.get_submodule(layer.mlp_path))
        hidden, width = hidden_of(ffn.hidden), ffn.width
        size, dense_size = (2 * h * width + h + width for h in (hidden, ffn.hidden))  # two matrices, two biases
        number, chosen, router = (layer.num_experts, layer.top_k, layer.num_experts * width) if experts else (1, 1, 0)
        total += size * number - dense_size + router
        active += size * chosen - dense_size + router
        extra = 4 * width * (hidden * chosen - ffn.hidden) + 2 * router
        forward += extra * tokens(clip, layer, patch_dropout)
    return _Counts(tuple(layer.name for layer in layers), total, active, forward)


@functools.cache
def meta_clip(model: str, patch_dropout: float) -> Clip:
    """That CLIP on the meta device, without memory for its tensors; it is shared, so do not change it."""
    with torch.device("meta"):
        return create_clip(model, patch_dropout=patch_dropout)


@functools.cache
def forward_flops(model: str, patch_dropout: float) -> int:
    """FLOPs of the dense model's forward pass for one image-text pair in training."""
    return dense_forward_flops(meta_clip(model, patch_dropout))


def tokens(clip: Clip, layer: Layer, patch_dropout: float) -> int:
    """Tokens of one sample at that layer in training: with patch dropout, and the text at full length."""
    if layer.tower == "text":
        return context_length(clip.model)
    patches, others = image_tokens(clip.model)
    return others + max(1, int(patches * (1 - patch_dropout)))


def dense_forward_flops(clip: Clip) -> int:
    """FLOPs of the forward pass of one image-text pair in training mode, on the meta device: nothing is computed."""
    model = copy.deepcopy(clip.model).to("meta").train()
    with torch.device("meta"), FlopCounter() as counter:
        model(torch.empty(1, 3, *image_size(model)), torch.zeros(1, context_length(model), dtype=torch.long))
    return counter.get_total_flops()


@functools.cache
def dense_activations(model: str, patch_dropout: float) -> int:
    """Bytes that autograd keeps of one image-text pair in fp32, weights left out, on the meta device."""
    dense, kept = copy.deepcopy(meta_clip(model, patch_dropout).model).train(), dict[int, int]()
    weights = {parameter.untyped_storage()._cdata for parameter in dense.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = dense(torch.empty(1, 3, *image_size(dense)), torch.zeros(1, context_length(dense), dtype=torch.long))
    del features  # until here it holds the graph, and so each storage keeps its own number
    return sum(size for number, size in kept.items() if number not in weights)


def estimate_seconds(protocol: Protocol, train_flops: int, device: torch.device) -> float:
    """Rough seconds of `train_flops` on this device: a dense step on some random pairs is timed and scaled by FLOPs.

    There are as many pairs as take a CPU a few seconds. So for a small model, overheads weigh as they do in training.
    """
    schedule = protocol.train.schedule
    clip = create_clip(protocol.model, patch_dropout=schedule.patch_dropout)
    model = clip.model.to(device).train()
    pairs = min(schedule.batch_size, max(2, 10**11 // (3 * dense_forward_flops(clip))))
    images = torch.rand(pairs, 3, *image_size(model), device=device)
    texts = torch.ones(pairs, context_length(model), dtype=torch.long, device=device)
    with attention_kernel(device, longest_sequence(model)):
        with FlopCounter() as counter:  # it slows this step, which therefore is not timed
            _probe_step(model, images, texts, autocast(device, schedule.precision))
        seconds = min(_probe_step(model, images, texts, autocast(device, schedule.precision)) for _ in range(2))
    return seconds / counter.get_total_flops() * train_flops


def _probe_step(model: Any, images: Tensor, texts: Tensor, cast: contextlib.AbstractContextManager[Any]) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    with cast:
        image_BC, text_BC, _ = model(images, texts)[:3]
    (image_BC.float() @ text_BC.float().T).logsumexp(1).sum().backward()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - began
