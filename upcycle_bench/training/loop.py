"""The training loop, under DeepSpeed, the same for every strategy and for dense pre-training.

loss = contrastive (gathered over ranks) + load_balance * sum over MoE layers of L_lb + what the strategy adds (Eq. 13).
AdamW starts with fresh state; the learning rate warms up and decays linearly; the logit scale is clamped.

A strategy may divide the training into stages. Each stage has an engine, an optimiser and an extra loss of its own.
With `checkpoint_every`, an interrupted training goes on from its last checkpoint, bit for bit. A checkpoint at step s
has the form of the stage that made step s; the next stage begins after it is loaded.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from upcycle_bench.data.pairs import BatchSource
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.precision import attention_kernel, longest_sequence
from upcycle_bench.protocol import learning_rate
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.allocator import return_freed_memory
from upcycle_bench.training.bookkeeping import Bookkeeping
from upcycle_bench.training.checkpoint import last_checkpoint, resume, save
from upcycle_bench.training.job import Job, Progress
from upcycle_bench.training.router_log import watch
from upcycle_bench.training.step import Features, clamp_logit_scale, compute_losses, patch_dropout_stream
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import PluginError

MakeLoss = Callable[[Mapping[str, MoEFFN]], ExtraLoss | None]
OnStep = Callable[[int, Mapping[str, float]], None]


def train(
    clip: Clip,
    data: BatchSource,
    job: Job,
    *,
    make_loss: MakeLoss = lambda layers: None,
    stages: Sequence[int] = (),
    next_stage: Callable[[Mapping[str, MoEFFN]], None] = lambda layers: None,
    on_step: OnStep = lambda step, metrics: None,
) -> Progress:
    """Train `clip.model` in place up to `job.stop_step`; `on_step` sees each step's number and the last metrics.

    Before each step of `stages`, `next_stage` changes the layers; optimiser state and extra loss then start afresh.
    PluginError if the stages do not ascend between 0 and `job.stop_step`. Must run inside `engine.session`, on every
    rank. An interruption leaves the last checkpoint, if there are any.
    """
    model = clip.model.train()
    device = next(model.parameters()).device
    rank, world = distributed.rank(), distributed.world_size()
    layers, schedule = moe_layers(model), job.schedule
    if list(stages) != sorted({step for step in stages if 0 < step < job.stop_step}):
        raise PluginError(f"stages {list(stages)} must ascend and begin after step 0 and before {job.stop_step}")
    # open_clip's gather is deprecated by PyTorch, but it is the one with a gradient on gloo and nccl alike.
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    done = last_checkpoint(job)
    with attention_kernel(device, longest_sequence(model)), Bookkeeping(job, layers, done) as books:
        for first, stop in itertools.pairwise([0, *stages, job.stop_step]):
            if first > 0:
                next_stage(layers)
            if stop < done:  # a later stage made the checkpoint
                continue
            with _stage(model, job, layers, make_loss) as (engine, extra):
                if first == 0 or first < done:
                    books.begin(resume(engine, extra, job))
                start, share = books.progress.step, (rank, world)
                batches = data.batches(job.stream, start, stop, schedule.batch_size, *share, workers=_workers(device))
                for step, batch in enumerate(batches, start):
                    rate = learning_rate(step, schedule.steps, job.peak_lr, schedule.warmup_fraction)
                    for group in engine.optimizer.param_groups:
                        group["lr"] = rate
                    logged = step % job.log_every == 0 or step + 1 == job.stop_step
                    with books.counting(step), patch_dropout_stream(job.stream, step, rank, device):
                        with watch(layers if logged else {}) as seen:
                            losses, scale = compute_losses(engine, clip, batch, job, layers, extra)
                        engine.backward(torch.stack(list(losses.values())).sum())
                        engine.step()
                    clamp_logit_scale(model, job)
                    if extra is not None:
                        extra.after_step()
                    books.count_step(losses)
                    if logged:
                        books.write_metrics(losses, rate, scale, seen)
                    on_step(books.progress.step, books.progress.last)
                    if job.checkpoint_due(step + 1):
                        books.collect()
                        save(engine, extra, job, books.progress)
                        return_freed_memory()
                books.collect()  # the next stage's loss may have other terms
    return books.progress


@contextlib.contextmanager
def _stage(
    model: nn.Module, job: Job, layers: Mapping[str, MoEFFN], make_loss: MakeLoss
) -> Iterator[tuple[Any, ExtraLoss | None]]:
    """The engine and the strategy's own loss of one stage; both let go of the model at its end."""
    engine = create_engine(Features(model, job.schedule.precision), job)
    extra = make_loss(layers)
    try:
        yield engine, extra
        engine.destroy()  # ZeRO's hooks would go on with the parameters
        engine.module.zero_grad()
    finally:
        if extra is not None:
            extra.close()


def create_engine(model: nn.Module, job: Job) -> Any:
    """DeepSpeed's engine around the model, with torch's AdamW; needs `engine.session`."""
    from upcycle_bench.model.deepspeed_import import deepspeed

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


def _workers(device: torch.device) -> int:
    """Loader processes: a GPU is fed by four; a CPU's cores all train."""
    return 4 if device.type == "cuda" else 0
