"""The training loop, under DeepSpeed, the same for every strategy and for dense pre-training.

loss = contrastive (gathered over ranks) + load_balance * sum over MoE layers of L_lb + what the strategy adds (Eq. 13).
AdamW with fresh state, linear warm-up and decay, logit scale clamped. One line of metrics per `log_every` steps goes to
a JSONL file, with what the routers did (`upcycle_bench.routing`); with `checkpoint_every` an interrupted run continues,
bit for bit, where its last checkpoint stands.

A strategy may divide the training into stages: where one begins it changes the layers, and the engine is built anew.
A checkpoint at step s has the form of the stage that made step s; the next stage begins after it is loaded.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from upcycle_bench import distributed, packed, towers
from upcycle_bench.data import Batch, BatchSource
from upcycle_bench.deferred import Later
from upcycle_bench.dense import Clip
from upcycle_bench.errors import PluginError
from upcycle_bench.flops import FlopCounter
from upcycle_bench.job import SHARE_STEPS, Job, MetricsFile, Progress, last_checkpoint, resume, save
from upcycle_bench.memory import return_freed_memory
from upcycle_bench.moe import MoEFFN, moe_layers
from upcycle_bench.protocol import learning_rate
from upcycle_bench.rng import Stream
from upcycle_bench.routing import watch
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.threads import spare_thread

COUNTING_RULE = (
    "matrix multiplications, convolutions and attention at 2 FLOPs per multiply-add; training, also in preparation: at "
    "most seven evenly spaced steps are counted and extrapolated; batches of an evaluation set's "
    "images count as the first of their size did; all else is counted whole; clustering and decompositions are not"
)


class _Features(nn.Module):
    """The CLIP under autocast, so that DeepSpeed need not know of it: (image, text features, logit scale), float32."""

    def __init__(self, clip: nn.Module, precision: str) -> None:
        super().__init__()
        self.clip, self.precision = clip, precision
        self.packs = packed.packs(clip)
        self.towers_apart = False  # see `parts_towers`
        self.later = Later()  # gradients of the vision tower's weights
        self.draws = True  # random numbers; the first forward pass says whether that is so

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clip: Any = self.clip

        def image_features() -> Tensor:
            thread = spare_thread() if self.towers_apart else None
            with autocast(images.device, self.precision), self.later.products(thread):
                return clip.encode_image(images, normalize=True)

        def text_features() -> Tensor:
            with autocast(images.device, self.precision):
                return F.normalize(packed.encode_text(clip, texts), dim=-1)

        if not self.packs:
            with autocast(images.device, self.precision):
                image_BD, text_BD, scale = clip(images, texts)[:3]
        else:
            scale = clip.logit_scale.exp()
            at_once = self.towers_apart and not self.draws
            image_BD, text_BD, self.draws = towers.both(image_features, text_features, at_once=at_once)
        return image_BD.float(), text_BD.float(), scale.float().squeeze()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on float32 weights, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def attention_kernel(device: torch.device, longest: int) -> contextlib.AbstractContextManager[Any]:
    """Plain matmul-softmax attention for short sequences on a CPU, where the flash kernel's backward is slow.

    The bound is a measurement (docs/performance.md: in bf16 it pays up to 77 tokens and not from 197), and fixed, so
    that numbers do not depend on a timing.
    """
    plain = device.type == "cpu" and longest <= 128
    return sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext()


def longest_sequence(model: Any) -> int:
    """The longer of the image's tokens and the text's."""
    return max(len(model.visual.positional_embedding), model.context_length)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on tensors of two or more dimensions; experts in groups of their own, as DeepSpeed wants them."""
    from deepspeed.moe.utils import has_moe_layers, split_params_into_different_moe_groups_for_optimizer

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"name": "no decay", "params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if has_moe_layers(model)[0]:
        return split_params_into_different_moe_groups_for_optimizer(groups)
    return groups


def create_engine(model: nn.Module, job: Job) -> Any:
    """DeepSpeed's engine around the model, with torch's AdamW; needs `engine.session`."""
    from upcycle_bench.ds import deepspeed

    world = distributed.world_size()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, job.schedule.weight_decay),
        lr=job.peak_lr,
        betas=job.schedule.betas,
        eps=job.schedule.eps,
        fused=True,
    )
    config = {
        "train_batch_size": job.schedule.batch_size,
        "train_micro_batch_size_per_gpu": job.schedule.batch_size // world,
        "gradient_clipping": job.schedule.grad_clip,
        "zero_optimization": {"stage": job.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it announces process groups there
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if world == 1 and job.zero_stage == 0:  # nothing to average, and DeepSpeed would copy every gradient twice
        engine.enable_backward_allreduce = False
    return engine


def train(
    clip: Clip,
    data: BatchSource,
    job: Job,
    *,
    make_loss: Callable[[Mapping[str, MoEFFN]], ExtraLoss | None] = lambda layers: None,
    stages: Sequence[int] = (),
    next_stage: Callable[[Mapping[str, MoEFFN]], None] = lambda layers: None,
    on_step: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
) -> Progress:
    """Train `clip.model` in place up to `job.stop_step`; `on_step` sees each step's number and the last metrics.

    Before each step of `stages`, `next_stage` changes the layers; optimiser state and extra loss then start afresh.
    PluginError if the stages do not ascend between 0 and `job.stop_step`. Must run inside `engine.session`, on every
    rank. An interruption leaves the last checkpoint, if there are any.
    """
    model = clip.model.train()
    device = next(model.parameters()).device
    layers = moe_layers(model)
    if list(stages) != sorted({step for step in stages if 0 < step < job.stop_step}):
        raise PluginError(f"stages {list(stages)} must ascend and begin after step 0 and before {job.stop_step}")
    for _ in [step for step in stages if step < last_checkpoint(job)]:
        next_stage(layers)
    engine = create_engine(_Features(model, job.schedule.precision), job)
    extra = make_loss(layers)
    engine.module.towers_apart = parts_towers(engine, extra)
    rank, world = distributed.rank(), distributed.world_size()
    # open_clip's gather is deprecated by PyTorch, but is the one with a gradient on gloo and nccl alike
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    progress = resume(engine, extra, job)
    batches = data.batches(
        job.stream, progress.step, job.stop_step, job.schedule.batch_size, rank, world, workers=_workers(device)
    )
    log = MetricsFile(job.metrics if rank == 0 else None, progress.step)
    first: list[dict[str, Tensor]] = []  # terms of the loss at the first steps that `progress` has not yet
    began = time.perf_counter() - progress.seconds
    with log, attention_kernel(device, longest_sequence(model)), contextlib.ExitStack() as ending:
        ending.callback(lambda: extra.close() if extra is not None else None)
        for step, batch in enumerate(batches, start=progress.step):
            if step in stages:
                _collect_shares(first, progress)  # the next stage's loss may have other terms
                _end_stage(engine, extra)
                next_stage(layers)
                engine = create_engine(_Features(model, job.schedule.precision), job)
                extra = make_loss(layers)
                engine.module.towers_apart = parts_towers(engine, extra)
            logged = step % job.log_every == 0 or step + 1 == job.stop_step
            rate = learning_rate(step, job.schedule.steps, job.peak_lr, job.schedule.warmup_fraction)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            counted = step % max(1, job.stop_step // 4) == 0  # counting slows a step down, so only a few are counted
            counter = FlopCounter() if counted else contextlib.nullcontext()
            with counter, _patch_dropout_stream(job.stream, step, rank, device):
                with watch(layers if logged else {}) as seen:
                    losses, scale = compute_losses(engine, clip, batch, job, layers, extra)
                loss = torch.stack(list(losses.values())).sum()
                backward(engine, loss)
                loss, losses = loss.detach(), {name: term.detach() for name, term in losses.items()}
                engine.step()
            _clamp_logit_scale(model, job)
            if extra is not None:
                extra.after_step()
            if step < SHARE_STEPS:  # kept on the device: reading them would make it wait
                first.append(losses)
            before, progress.seconds = progress.seconds, time.perf_counter() - began
            progress.step = step + 1
            if isinstance(counter, FlopCounter):
                progress.counted_seconds += progress.seconds - before
                progress.counted_flops += counter.get_total_flops()
                progress.counted_steps += 1
            if logged:
                _collect_drops(layers, progress)
                _collect_shares(first, progress)
                progress.last = _metrics(loss, losses, rate, scale, job, progress)
                log.write({**progress.last, **({"layers": seen.summary()} if layers else {})})
                if not math.isfinite(progress.last["loss"]):
                    raise FloatingPointError(f"the loss is {progress.last['loss']} at step {step}: {losses}")
            on_step(progress.step, progress.last)
            due = job.checkpoint_every and progress.step % job.checkpoint_every == 0
            if due or (job.checkpoint_every and progress.step == job.stop_step):  # the last one: evaluation may fail
                _collect_drops(layers, progress)
                _collect_shares(first, progress)
                save(engine, extra, job, progress)
                return_freed_memory()
    return progress


def parts_towers(engine: Any, extra: ExtraLoss | None) -> bool:
    """Whether the towers may be computed at once: there are no collectives, DeepSpeed does nothing as gradients arrive,
    and the strategy neither minds nor can notice."""
    alone = distributed.world_size() == 1 and engine.zero_optimization_stage() == 0
    once = engine.gradient_accumulation_steps() == 1
    return alone and once and (extra is None or extra.towers_apart) and towers.separable(engine.module)


def backward(engine: Any, loss: Tensor) -> None:
    """`engine.backward(loss)`, both towers at once where `parts_towers` said so."""
    features: _Features = engine.module
    try:
        engine.backward(towers.apart(loss, features.clip) if features.towers_apart else loss)
        features.later.wait()
    finally:  # after an error or Ctrl-C no gradient comes late
        features.later.forget()


def _end_stage(engine: Any, extra: ExtraLoss | None) -> None:
    engine.destroy()  # ZeRO's hooks would go on with the parameters
    engine.module.zero_grad()
    if extra is not None:
        extra.close()


def compute_losses(
    engine: Any, clip: Clip, batch: Batch, job: Job, layers: Mapping[str, MoEFFN], extra: ExtraLoss | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of the loss by name (float32 scalars, to be summed) and the logit scale, for this rank's `batch`.

    Each term's mean over ranks is its value on the global batch, so averaged gradients equal those of one process.
    """
    from open_clip.loss import ClipLoss

    device = next(clip.model.parameters()).device
    images, texts = clip.normalise(batch.images.to(device)), batch.texts.to(device)
    image_BD, text_BD, scale = engine(images, texts)
    rank, world = distributed.rank(), distributed.world_size()
    contrastive = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    logits = contrastive.get_logits(image_BD, text_BD, scale)
    target_B = contrastive.get_ground_truth(device, len(image_BD))
    per_tower = [F.cross_entropy(each, target_B, label_smoothing=job.label_smoothing) for each in logits]
    losses = {"contrastive": (per_tower[0] + per_tower[1]) / 2}
    if layers:
        balance = torch.stack([layer.l_aux for layer in layers.values() if layer.l_aux is not None])
        losses["load_balance"] = job.load_balance * balance.sum().float()
    if extra is not None:
        with autocast(device, job.schedule.precision):
            losses[extra.name] = extra.compute().float()
    return losses, scale


def _metrics(
    loss: Tensor, losses: Mapping[str, Tensor], rate: float, scale: Tensor, job: Job, progress: Progress
) -> dict[str, float]:
    world = distributed.world_size()
    values = torch.stack([loss.detach(), *(term.detach().float() for term in losses.values())])
    if world > 1:
        torch.distributed.all_reduce(values)
    total, *parts = (values / world).tolist()
    return {
        "step": progress.step,
        "loss": total,
        **dict(zip(losses, parts, strict=True)),
        "learning_rate": rate,
        "logit_scale": scale.item(),
        "samples_per_second": progress.samples_per_second(job.schedule.batch_size),
        **({"tokens_dropped": progress.dropped_fraction} if progress.dropped_fraction is not None else {}),
    }


def _collect_drops(layers: Mapping[str, MoEFFN], progress: Progress) -> None:
    for layer in layers.values():
        dropped, routed = layer.gate.take_dropped()
        progress.dropped += distributed.sum_over_ranks(dropped)
        progress.routed += distributed.sum_over_ranks(routed)


def _collect_shares(first: list[dict[str, Tensor]], progress: Progress) -> None:
    """Add each term's share of the loss, over all ranks, at the steps of `first`, and empty it."""
    if not first:
        return
    terms_SL = torch.stack([torch.stack([term.float() for term in terms.values()]) for terms in first])
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(terms_SL)
    shares_L = (terms_SL / terms_SL.sum(1, keepdim=True)).sum(0)
    for name, share in zip(first[0], shares_L.tolist(), strict=True):
        progress.loss_shares[name] = progress.loss_shares.get(name, 0.0) + share
    progress.share_steps += len(first)
    first.clear()


@contextlib.contextmanager
def _patch_dropout_stream(key: str, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Give the forward pass (open_clip's patch dropout draws globally) a stream of its own."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(Stream(("patch dropout", key, step, rank)).seed())
        yield


@torch.no_grad()
def _clamp_logit_scale(model: nn.Module, job: Job) -> None:
    parameter: Any = model.logit_scale
    if not parameter.requires_grad:
        return
    if job.zero_stage:  # ZeRO keeps a master copy that would undo a clamp of the parameter alone
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter).clamp(max=job.schedule.logit_scale_max))
    parameter.clamp_(max=job.schedule.logit_scale_max)


def _workers(device: torch.device) -> int:
    """Loader processes: a GPU is fed by four; a CPU's cores all train."""
    return 4 if device.type == "cuda" else 0
