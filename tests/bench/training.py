"""Whole training steps to be timed: ours, and what it is compared with.

`our_step` is the body of the loop of `upcycle_bench.training.loop.train`, `plain_step` the same without an engine,
`open_clip_step` and `stock_step` what open_clip's training loop does, dense and with DeepSpeed's own MoE layer. All
have the same loss, and fused AdamW with the same groups, learning rate and clipping; batches are made up and wait in
memory.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from upcycle_bench.data.batches import Batch
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.deepspeed_import import MoE, deepspeed
from upcycle_bench.model.ffn import FFN, LayerInit
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.precision import attention_kernel, autocast
from upcycle_bench.model.surgery import find_layers, put_experts
from upcycle_bench.model.towers import longest_sequence
from upcycle_bench.planning.plan import shipped_checkpoint
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import MoE as MoESettings
from upcycle_bench.protocol import Protocol, load_protocol
from upcycle_bench.strategy import ExtraLoss, configure
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import create_engine, parameter_groups
from upcycle_bench.training.step import Features, clamp_logit_scale, compute_losses
from upcycle_bench.util.rng import Stream

Step = Callable[[], Any]


def lab_protocol() -> Protocol:
    """The lab's protocol as it ships."""
    return load_protocol(load_registry().get("protocol", "lab").target)


def lab_clip(device: torch.device) -> Clip:
    """The dense model that ships with the package."""
    lab = lab_protocol()
    clip = create_clip(lab.model, shipped_checkpoint(lab))
    return replace(clip, model=clip.model.to(device))


def lab_job(batch_size: int | None = None, zero_stage: int = 0) -> Job:
    """The lab's training at its peak learning rate."""
    lab = lab_protocol()
    schedule = lab.train.schedule
    if batch_size is not None:
        schedule = schedule.model_copy(update={"batch_size": batch_size})
    return Job(
        schedule=schedule,
        peak_lr=lab.peak_lr,
        stop_step=schedule.steps,
        seed=0,
        load_balance=lab.moe.load_balance,
        zero_stage=zero_stage,
    )


def made_up_batches(clip: Clip, size: int, number: int = 4) -> list[Batch]:
    """Random pixels; captions of three to eight tokens (the lab's have 5.3 on average), end-of-text the highest id."""
    generator = torch.Generator().manual_seed(0)
    height, width = clip.model.visual.image_size
    context, end = clip.model.context_length, clip.model.vocab_size - 1
    device = next(clip.model.parameters()).device
    batches = []
    for _ in range(number):
        images = torch.randint(256, (size, 3, height, width), dtype=torch.uint8, generator=generator)
        last_B1 = torch.randint(2, 8, (size, 1), generator=generator)
        words_BL = torch.randint(1, end, (size, context), generator=generator)
        place_L = torch.arange(context)
        texts_BL = torch.where(place_L < last_B1, words_BL, torch.where(place_L == last_B1, end, 0))
        batches.append(Batch(images.to(device), texts_BL.to(device), torch.arange(size)))
    return batches


def sparse_inits(dense: Any, moe: MoESettings) -> dict[str, LayerInit]:
    """Copies of each FFN and a random router, by layer name."""
    strategy = _sparse_upcycling()
    return {
        layer.name: strategy.init_layer(
            FFN.of(dense.get_submodule(layer.mlp_path)), layer, None, Stream(("bench", layer.name))
        )
        for layer in find_layers(dense, moe)
    }


@functools.cache
def _sparse_upcycling() -> Any:
    return configure(load_registry().get("strategy", "sparse-upcycling").target, {})


def upcycled(clip: Clip, moe: MoESettings) -> Clip:
    """The clip after sparse upcycling; the dense one is not touched."""
    return replace(clip, model=put_experts(clip.model, sparse_inits(clip.model, moe), moe))


def our_step(
    clip: Clip,
    job: Job,
    batches: Sequence[Batch],
    make_loss: Callable[[Mapping[str, MoEFFN]], ExtraLoss | None] = lambda layers: None,
) -> Step:
    """A step as `upcycle_bench.training.loop.train` makes it. Needs `session.open_session`, as every engine does."""
    model = clip.model.train()
    layers = moe_layers(model)
    engine = create_engine(Features(model, job.schedule.precision), job)
    extra, turns = make_loss(layers), itertools.cycle(batches)
    device, longest = next(model.parameters()).device, longest_sequence(model)

    def step() -> None:
        with attention_kernel(device, longest):
            losses, _ = compute_losses(engine, clip, next(turns), job, layers, extra)
            engine.backward(torch.stack(list(losses.values())).sum())
            engine.step()
        clamp_logit_scale(model, job)
        if extra is not None:
            extra.after_step()

    return step


def plain_step(clip: Clip, job: Job, batches: Sequence[Batch]) -> Step:
    """The same losses and optimiser in a plain PyTorch loop."""
    model = clip.model.train()
    layers, features = moe_layers(model), Features(model, job.schedule.precision)
    parameters, optimizer = list(model.parameters()), _adamw(model, job)
    turns = itertools.cycle(batches)
    device, longest = next(model.parameters()).device, longest_sequence(model)

    def step() -> None:
        optimizer.zero_grad()
        with attention_kernel(device, longest):
            losses, _ = compute_losses(features, clip, next(turns), job, layers, None)
            torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, job.schedule.grad_clip)
        optimizer.step()
        clamp_logit_scale(model, job)

    return step


def open_clip_step(clip: Clip, job: Job, batches: Sequence[Batch]) -> Step:
    """As open_clip's `train_one_epoch` (3.3.0, `--precision amp_bf16`, `--grad-clip-norm`), dense, one process.

    Normalised images come from its loader's workers, so here they wait in memory.
    """
    from open_clip.loss import ClipLoss

    model, loss = clip.model.train(), ClipLoss()
    optimizer, turns = _adamw(model, job), itertools.cycle(_normalised(clip, batches))
    device = next(model.parameters()).device

    def step() -> None:
        images, texts = next(turns)
        optimizer.zero_grad()
        with autocast(device, job.schedule.precision):
            image_BC, text_BC, scale = model(images, texts)[:3]
            total = loss(image_BC, text_BC, scale)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.schedule.grad_clip, norm_type=2.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def stock_step(clip: Clip, job: Job, batches: Sequence[Batch]) -> Step:
    """The same loop under DeepSpeed's engine as it comes, on `stock_upcycled`'s model."""
    from open_clip.loss import ClipLoss

    model, loss = clip.model.train(), ClipLoss()
    config = {
        "train_batch_size": job.schedule.batch_size,
        "gradient_clipping": job.schedule.grad_clip,
        "zero_optimization": {"stage": job.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it announces process groups there
        engine = deepspeed.initialize(model=model, optimizer=_adamw(model, job), config=config)[0]
    turns = itertools.cycle(_normalised(clip, batches))
    device = next(model.parameters()).device
    layers = [module for module in model.modules() if isinstance(module, StockMoE)]

    def step() -> None:
        images, texts = next(turns)
        with autocast(device, job.schedule.precision):
            image_BC, text_BC, scale = engine(images, texts)[:3]
            total = loss(image_BC, text_BC, scale)
            total = total + job.load_balance * torch.stack([layer.l_aux for layer in layers]).sum()
        engine.backward(total)
        engine.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


class StockMoE(nn.Module):
    """DeepSpeed's MoE as a block's `mlp`, every text position included."""

    def __init__(self, ffn: FFN, router_ED: Tensor, moe: MoESettings) -> None:
        super().__init__()
        self.moe = MoE(
            ffn.width,
            ffn.expert(),  # which it copies
            num_experts=moe.experts,
            k=moe.top_k,
            capacity_factor=moe.capacity_factor,
            min_capacity=moe.min_capacity,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.moe.deepspeed_moe.gate.wg.weight = nn.Parameter(router_ED.detach().clone())
        self.l_aux = torch.zeros(())

    @property
    def c_fc(self) -> nn.Module:
        """open_clip asks block 0 for `mlp.c_fc.weight.dtype`."""
        return self.moe.deepspeed_moe.gate.wg

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD, self.l_aux, _ = self.moe(x_BLD)
        return y_BLD


def stock_upcycled(clip: Clip, moe: MoESettings) -> Clip:
    """`upcycled` with DeepSpeed's own layers: the same experts and routers."""
    import copy

    model = copy.deepcopy(clip.model)
    inits = sparse_inits(clip.model, moe)
    device = next(model.parameters()).device
    for layer in find_layers(model, moe):
        ffn = FFN.of(model.get_submodule(layer.mlp_path))
        parent = model.get_submodule(layer.mlp_path.rpartition(".")[0])
        parent.mlp = StockMoE(ffn, inits[layer.name].router_ED, moe).to(device)
    return replace(clip, model=model)


def _adamw(model: nn.Module, job: Job) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, job.schedule.weight_decay),
        lr=job.peak_lr,
        betas=job.schedule.betas,
        eps=job.schedule.eps,
        fused=True,
    )


def _normalised(clip: Clip, batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    return [(clip.normalise(batch.images), batch.texts) for batch in batches]
