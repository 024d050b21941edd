"""The training loop, under DeepSpeed: one for every strategy and for dense pre-training.

    progress = train(clip, data, job, make_loss=make_loss, on_step=bar)     # in place; inside `session.open_session`

Loss = contrastive loss (over all ranks' pairs) + load_balance * sum over MoE layers of L_lb (Eq. 5) + the strategy's
own term (Eq. 13). AdamW starts without state; the learning rate warms up, then decays linearly; the logit scale is
clamped.

A strategy may divide the training into stages, each with an engine, an optimiser and an extra loss of its own. With
`job.checkpoints`, an interrupted training continues from its last checkpoint; where ranks and machine are the same,
bit for bit.
A checkpoint after step s has the form of the stage that made step s; the next stage starts from it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from upcycle_bench.data.batches import Batch, BatchSource
from upcycle_bench.data.loading import lost_workers
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import MoEFFN, moe_layers
from upcycle_bench.model.precision import attention_kernel
from upcycle_bench.model.towers import longest_sequence
from upcycle_bench.protocol import learning_rate
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.allocator import return_freed_memory
from upcycle_bench.training.bookkeeping import Bookkeeping
from upcycle_bench.training.checkpoint import Checkpoints, MetricsFile
from upcycle_bench.training.job import Job, Progress, Session
from upcycle_bench.training.own_hooks import OwnHooks
from upcycle_bench.training.router_log import watch
from upcycle_bench.training.step import Features, clamp_logit_scale, compute_losses, patch_dropout_stream
from upcycle_bench.training.stopping import Stopped, asked_to_stop, at_steps
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import PluginError
from upcycle_bench.util.progress import OnStep

MakeLoss = Callable[[Mapping[str, MoEFFN]], ExtraLoss | None]


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
    """Train `clip.model` in place up to `job.stop_step`.

    Must run inside `session.open_session`, on every rank. `make_loss` makes the strategy's own loss of the MoE layers,
    by name. Before each step of `stages`, `next_stage` changes the layers; optimiser and extra loss then start afresh.
    `on_step` is called after each step with the number of steps done and the last metrics.

    Raises PluginError unless the stages ascend between 0 and `job.stop_step`, DivergedError for a loss that is not
    finite, and UserError where a process that loads batches was lost, too many samples are bad, or checkpoints cannot
    be read or written. The last checkpoints stay. Where the process is asked to stop (`training.stopping`) and
    `job.checkpoints` names a folder, a last checkpoint is written at the end of a step, and Stopped is raised on every
    rank, or the UserError NotKept, of status 1, where it could not be written.
    """
    model = clip.model.train()
    device = next(model.parameters()).device
    rank, world = distributed.rank(), distributed.world_size()
    layers, schedule = moe_layers(model), job.schedule
    if list(stages) != sorted({step for step in stages if 0 < step < job.stop_step}):
        raise PluginError(f"stages {list(stages)} must ascend and begin after step 0 and before {job.stop_step}")
    # PyTorch deprecates the gather that open_clip uses, but no other has a gradient on both gloo and nccl.
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    checkpoints = Checkpoints(job)
    done = checkpoints.step
    log = MetricsFile(job.metrics if distributed.is_main() else None, done)
    stopping, ranks = (
        (at_steps(), distributed.cpu_group("stopping")) if job.checkpoints else (contextlib.nullcontext(), None)
    )
    loaders = contextlib.ExitStack()  # innermost: a loader that dies must not cut the end of the others short
    with lost_workers(), stopping, attention_kernel(device, longest_sequence(model)), log, checkpoints, loaders:
        books = Bookkeeping(job, layers, log, data)
        batches: Generator[Batch, None, None] | None = None
        for first, stop in itertools.pairwise([0, *stages, job.stop_step]):
            if first > 0:
                next_stage(layers)
            if stop < done:  # the checkpoint is of a later stage; the layers only had to take its form
                continue
            with _stage(model, job, layers, make_loss) as (engine, extra, hooks):
                if first == 0 or first < done:
                    books.begin(checkpoints.restore(engine, extra), device)
                    _begin_session(books.progress, layers, device)
                    books.validate(clip, hooks)
                books.progress.loss_notes = extra.notes() if extra else {}
                start = books.progress.step
                if batches is None:  # its processes stay for all stages
                    batches = data.batches(job.stream, start, job.stop_step, schedule.batch_size, rank, world, device)
                    loaders.enter_context(contextlib.closing(batches))
                for step, batch in zip(range(start, stop), batches, strict=False):
                    rate = learning_rate(step, schedule.steps, job.peak_lr, schedule.warmup_fraction)
                    for group in engine.optimizer.param_groups:
                        group["lr"] = rate
                    logged = step % job.log_every == 0 or step + 1 == job.stop_step
                    with books.counting(step), patch_dropout_stream(job.stream, step, rank, device):
                        with watch(layers if logged else {}) as seen:
                            losses, scale = compute_losses(engine, clip, batch, job, layers, extra)
                        engine.backward(torch.stack(list(losses.values())).sum())
                        engine.step()
                    losses = {name: term.detach() for name, term in losses.items()}  # lets go of the graph
                    clamp_logit_scale(model, job)
                    if extra is not None:
                        extra.after_step()
                    books.count_step(losses, batch.bad)
                    if logged:
                        books.write_metrics(losses, rate, scale, seen)
                    books.validate(clip, hooks)
                    on_step(books.progress.step, books.progress.last)
                    stop_by = asked_to_stop(ranks) if job.checkpoints else None
                    if job.checkpoint_due(step + 1) or stop_by:
                        books.collect()
                        books.progress.sessions[-1].last_step = step + 1
                        checkpoints.save(engine, extra, books.progress, stop_by)
                        return_freed_memory()
                    if stop_by:
                        raise Stopped(stop_by, step + 1)
                books.collect()  # now, since the next stage's loss may have other terms
    books.progress.sessions[-1].last_step = books.progress.step
    return books.progress


def _begin_session(progress: Progress, layers: Mapping[str, MoEFFN], device: torch.device) -> None:
    """Add this process group to the sessions, and say where the training goes on, and what is not as it was before."""
    ep_size = next((layer.settings.ep_size for layer in layers.values()), 1)
    session = Session.here(ep_size, device, progress.step)
    if progress.sessions and distributed.is_main():
        print(f"an interrupted training goes on from step {progress.step}", file=sys.stderr)
        if different := session.differences(progress.sessions[-1]):
            print(
                f"since then {', '.join(different)}: bits of the weights may differ from an uninterrupted run's",
                file=sys.stderr,
            )
    progress.sessions.append(session)


@contextlib.contextmanager
def _stage(
    model: nn.Module, job: Job, layers: Mapping[str, MoEFFN], make_loss: MakeLoss
) -> Iterator[tuple[Any, ExtraLoss | None, OwnHooks]]:
    """The engine, the strategy's own loss of one stage, and its hooks; at its end none holds on to the model."""
    engine = create_engine(Features(model, job.schedule.precision), job)
    hooks = OwnHooks(model)
    extra = make_loss(layers)
    try:
        yield engine, extra, hooks
        engine.destroy()  # it removes ZeRO's hooks from the parameters
        engine.module.zero_grad()
    finally:
        if extra is not None:
            extra.close()


def create_engine(model: nn.Module, job: Job) -> Any:
    """DeepSpeed's engine around the model, with torch's AdamW; only inside `session.open_session`."""
    from upcycle_bench.model.deepspeed_import import require_deepspeed

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
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its process groups
        engine = require_deepspeed().initialize(model=model, optimizer=optimizer, config=config)[0]
    if world == 1 and job.zero_stage == 0:  # no gradients to average, and DeepSpeed would copy each one twice
        engine.enable_backward_allreduce = False
    return engine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser's groups: weight decay on matrices, and on what stands for entries of one; none on others.

    A parameter of two or more dimensions is a matrix. A module says in `matrix_entries` which of its parameters hold a
    matrix's entries in another form: they decay as the entries would. Experts stand in groups of their own, as
    DeepSpeed requires.
    """
    from deepspeed.moe.utils import has_moe_layers, split_params_into_different_moe_groups_for_optimizer

    entries = {getattr(module, name) for module in model.modules() for name in getattr(module, "matrix_entries", ())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p.ndim >= 2 or p in entries for p in parameters]
    groups = [
        {"name": "decay", "params": [*itertools.compress(parameters, decayed)], "weight_decay": weight_decay},
        {
            "name": "no decay",
            "params": [p for p, decays in zip(parameters, decayed, strict=True) if not decays],
            "weight_decay": 0.0,
        },
    ]
    if has_moe_layers(model)[0]:
        return split_params_into_different_moe_groups_for_optimizer(groups)
    return groups
