"""Rows 3 to 6: whole training steps, forward to optimiser, under the engine; the lab's: batches of 512 in bf16.

Each is sampled when it has been called some times, as in the middle of a training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.bench.floor import floor
from tests.bench.rows import Row, Settings, measures
from tests.bench.timing import compare
from tests.bench.training import (
    Step,
    lab_clip,
    lab_job,
    lab_protocol,
    made_up_batches,
    open_clip_step,
    our_step,
    plain_step,
    stock_step,
    stock_upcycled,
    upcycled,
)
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.strategy import configure
from upcycle_bench.util.rng import Stream

# Four blocks of width 512 in both towers, 65 image tokens; a small vocabulary, so that the token embedding and its
# optimiser, equal on both sides, do not dilute the ratio. With k = 2 in every other block the ideal is 64 / 48 = 1.33.
FOUR_LAYERS = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 512, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 1024, "width": 512, "heads": 8, "layers": 4},
}
# Steps before the first sample: a training of hundreds has its memory and its compiled products after the first few.
SETTLE = 12
FOUR_LAYERS_BATCH = 96  # 6,240 image tokens: the products outweigh AdamW on the experts, as they do in real training


def _parameters(clip: Clip) -> int:
    return sum(parameter.numel() for parameter in clip.model.parameters())


def four_layer_clip(settings: Settings) -> Clip:
    """That model with random weights."""
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = open_clip.CLIP(**FOUR_LAYERS, nonscalar_logit_scale=True)
    return replace(create_clip("smoke-vit"), model=model.to(settings.device))


def our_moe_step(settings: Settings, zero_stage: int = 0, *, eesd: bool = False) -> tuple[Step, Clip]:
    """The lab's upcycled step, with cluster-aware's distillation if asked."""
    clip = upcycled(lab_clip(settings.device), lab_protocol().moe)
    job = lab_job(zero_stage=zero_stage)
    batches = made_up_batches(clip, job.schedule.batch_size)
    if not eesd:
        return our_step(clip, job, batches), clip
    strategy = configure(load_registry().get("strategy", "cluster-aware").target, {})
    return our_step(
        clip, job, batches, lambda layers: strategy.loss(layers, Stream(("bench", "eesd")), job.schedule.steps)
    ), clip


def stock_layers_step(settings: Settings) -> Step:
    """The lab's upcycled step with nothing but the MoE layers' dispatch and compute DeepSpeed's own."""
    from tests.bench.layers import with_stock_layer

    clip = upcycled(lab_clip(settings.device), lab_protocol().moe)
    for layer in moe_layers(clip.model).values():
        layer.moe.deepspeed_moe = with_stock_layer(layer).moe.deepspeed_moe
    job = lab_job()
    return our_step(clip, job, made_up_batches(clip, job.schedule.batch_size))


@measures(3)
def moe_step(settings: Settings) -> Iterator[Row]:
    """A whole step of the upcycled model / of the dense model it comes from, ours on both sides.

    The lab model; and four blocks of width 512, where products weigh more than all that is small (96 pairs a batch).
    """
    moe = lab_protocol().moe
    for name, dense, batch_size, goal in (
        ("lab model", lab_clip(settings.device), 512, "<= 1.5"),
        ("4 layers, D=512", four_layer_clip(settings), FOUR_LAYERS_BATCH, "<= 1.4"),
    ):
        sparse, job = upcycled(dense, moe), lab_job(batch_size)
        batches = made_up_batches(dense, batch_size)
        step = our_step(sparse, job, batches)
        yield compare(
            f"MoE step / dense step, {name}, batch {batch_size}, bf16",
            goal,
            step,
            our_step(dense, job, batches),
            settings,
            settle=SETTLE,
            floor=floor(step, "bf16", settings, _parameters(sparse)),
        )


@measures(4)
def engine_step(settings: Settings) -> Iterator[Row]:
    """The lab's upcycled step under DeepSpeed's engine / in a plain PyTorch loop with the same losses and optimiser."""
    clip = upcycled(lab_clip(settings.device), lab_protocol().moe)
    job = lab_job()
    plain = plain_step(clip, job, made_up_batches(clip, job.schedule.batch_size))
    for stage, goal in ((0, "<= 1.08"), (1, "<= 1.15")):
        step, ours = our_moe_step(settings, stage)
        yield compare(
            f"DeepSpeed engine, ZeRO {stage} / plain PyTorch loop, lab MoE, bf16",
            goal,
            step,
            plain,
            settings,
            settle=SETTLE,
            floor=floor(step, "bf16", settings, _parameters(ours)),
        )


@measures(5)
def eesd_step(settings: Settings) -> Iterator[Row]:
    """The lab's upcycled step with distillation (all experts on all tokens, once forward) / without.

    And with it / without it in DeepSpeed's own layers: once with nothing else taken from us, so that text padding is
    left out on both sides, and once in open_clip's step as it comes, row 6's.
    """
    with_eesd, clip = our_moe_step(settings, eesd=True)
    least = floor(with_eesd, "bf16", settings, _parameters(clip))
    without, _ = our_moe_step(settings)
    yield compare(
        "step with EESD / without, lab MoE, bf16", "<= 1.45", with_eesd, without, settings, settle=SETTLE, floor=least
    )
    yield compare(
        "step with EESD / without in stock DeepSpeed layers, lab MoE, bf16",
        "<= 0.85",
        with_eesd,
        stock_layers_step(settings),
        settings,
        settle=SETTLE,
        floor=least,
    )
    job, moe = lab_job(), lab_protocol().moe
    batches = made_up_batches(clip, job.schedule.batch_size)
    yield compare(
        "step with EESD / open_clip's without, with stock DeepSpeed MoE, lab, bf16",
        "<= 0.85",
        with_eesd,
        stock_step(stock_upcycled(lab_clip(settings.device), moe), job, batches),
        settings,
        settle=SETTLE,
        floor=least,
    )


@measures(6)
def open_clip_ratio(settings: Settings) -> Iterator[Row]:
    """The lab's step as open_clip gives it / ours: PyTorch's default attention and padded captions.

    Dense, and upcycled with DeepSpeed's own layers under its engine as it comes.
    """
    job, moe = lab_job(), lab_protocol().moe
    dense = lab_clip(settings.device)
    batches = made_up_batches(dense, job.schedule.batch_size)
    ours = our_step(dense, job, batches)
    yield compare(
        "open_clip's dense step / ours, lab, bf16",
        ">= 2.5",
        open_clip_step(lab_clip(settings.device), job, batches),
        ours,
        settings,
        settle=SETTLE,
        floor=floor(ours, "bf16", settings, _parameters(dense)),
    )
    step, sparse = our_moe_step(settings)
    yield compare(
        "open_clip's step with stock DeepSpeed MoE / ours, lab, bf16",
        ">= 2.5",
        stock_step(stock_upcycled(lab_clip(settings.device), moe), job, batches),
        step,
        settings,
        settle=SETTLE,
        floor=floor(step, "bf16", settings, _parameters(sparse)),
    )
