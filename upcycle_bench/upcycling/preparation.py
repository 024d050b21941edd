"""Preparation: the workshop in which a strategy may train before its experts are made, within a budget.

    workshop = TrainingWorkshop(dense, data, protocol, rng, groups, reporter, "my-idea")
    preparation = strategy.prepare(workshop)        # branches and the model to upcycle; None for most strategies
    workshop.flops, workshop.steps                  # what it cost, charged to the strategy

The workshop gives copies of the dense model, features of the training pairs, their groups, the protocol's own training
loop on batches that the strategy chooses, and the number of steps that the budget pays.
`BranchStrategy` is the base class of the strategies that train branches.

Shape suffixes: S samples.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic.dataclasses
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from upcycle_bench.data.order import distinct
from upcycle_bench.data.pairs import PairDataset, PickedBatches
from upcycle_bench.model import padding
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.surgery import find_layers
from upcycle_bench.protocol import Protocol
from upcycle_bench.strategy import Groups, RouterInit, Strategy
from upcycle_bench.training.job import Job
from upcycle_bench.training.loop import train
from upcycle_bench.upcycling import branches
from upcycle_bench.util import distributed
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.flops import counted_flops
from upcycle_bench.util.progress import OnStep, Reporter
from upcycle_bench.util.rng import Stream

ENCODING_BATCH = 256  # pairs on each rank


class TrainingWorkshop:
    """A `strategy.Workshop` that trains by the project's own loop. Must be used inside a session, on every rank.

    dense, data: the dense CLIP and the training pairs; groups: the group of each pair, or None where only shards are
    known; label: the strategy's name, for messages and progress; work: a folder for what an interrupted preparation
    goes on from, if any. Spent so far, over all ranks, to count FLOPs too: flops; steps, the optimiser's; samples,
    trained on or encoded. earlier_seconds: of trainings, in earlier sessions.
    """

    def __init__(
        self,
        dense: Clip,
        data: PairDataset,
        protocol: Protocol,
        rng: Stream,
        groups: list[str] | None = None,
        reporter: Reporter | None = None,
        label: str = "",
        work: Path | None = None,
    ) -> None:
        self.rng, self.flops, self.steps, self.samples, self.earlier_seconds = rng, 0, 0, 0, 0.0
        self._work, self._trained = work, 0
        self.experts, self.batch_size = protocol.moe.experts, protocol.train.schedule.batch_size
        self._clip, self._data, self._protocol = dense, data, protocol
        self._groups, self._reporter, self._label = groups, reporter or Reporter(), label

    def __len__(self) -> int:
        """The number of training samples."""
        return len(self._data)

    def dense(self) -> Any:
        """A fresh copy of the dense CLIP."""
        return copy.deepcopy(self._clip.model)

    def from_main(self, value_S: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank."""
        value: Tensor = distributed.from_main(value_S)
        return value

    def groups(self) -> Groups:
        """The groups of the training samples: the lab's lineages, the digits' classes, the shards of local data."""
        if self._groups is None:
            return Groups("shard", self._data.shard_numbers())
        number = {name: place for place, name in enumerate(sorted(set(self._groups)))}
        assert len(self._groups) == len(self), "groups and training samples differ in number"
        return Groups("group", torch.tensor([number[name] for name in self._groups]))

    def steps_per_branch(
        self,
        branches: int,
        ceiling: int,
        *,
        budget: float,
        encoded_per_step: int = 0,
        trainable: Callable[[str], bool] = lambda name: True,
    ) -> int:
        """How many steps each of `branches` trainings may take, at most `ceiling`.

        `budget` is a share of the FLOPs of the protocol's training of the upcycled model. These, the FLOPs of a
        branch's step, and those of encoding `encoded_per_step` samples for each step, are counted on one batch.
        Raises UserError when the budget does not pay one step for each branch.
        """
        whole = self._training_flops() * self._protocol.train.schedule.steps
        step = self._step_flops(self.dense(), trainable)
        if encoded_per_step:
            before = self.flops
            for _ in self.encode(self.dense(), self._probe()):
                pass
            step += (self.flops - before) * encoded_per_step // self.batch_size
        paid = (budget * whole - self.flops) / (branches * step)
        if paid < 1:
            raise UserError(
                f"{self._label}: budget={budget:g} (of the training's FLOPs) pays {max(paid, 0):.2f} steps for each of "
                f"{branches} branches; raise budget to {(branches * step + self.flops) / whole:.2g} or train longer."
            )
        return min(int(paid), ceiling)

    @torch.no_grad()
    def encode(self, model: Any, index_S: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised features of the samples `index_S`, in batches: (images [B, C], texts [B, C]), float32, CPU.

        The model runs in eval mode and its own precision. Captions and crops are the same at every call.
        """
        parameter = next(model.parameters())
        device, rank, world = parameter.device, distributed.rank(), distributed.world_size()
        parts = index_S.split(ENCODING_BATCH * world) if len(index_S) else ()
        was_training = model.training
        for part_B in self._reporter.track(parts, f"preparing {self._label}: encoding"):
            share = -(-len(part_B) // world)  # samples of each rank; the last sample fills the last rank's share
            padded = torch.cat([part_B, part_B[-1:].expand(share * world - len(part_B))])
            batch = self._data.pick(padded[rank * share : (rank + 1) * share], self.rng.child("encoding"))
            images, texts = self._clip.normalise(batch.images.to(device)).to(parameter.dtype), batch.texts.to(device)
            model.eval()
            with counted_flops() as counter:
                image_BC = model.encode_image(images)
                text_BC = padding.text_encoder(model)(texts)
            model.train(was_training)
            self.flops += distributed.sum_over_ranks(counter.get_total_flops())
            self.samples += len(part_B)
            both = (F.normalize(features.float(), dim=-1) for features in (image_BC, text_BC))
            image_BC, text_BC = (distributed.gather(features)[: len(part_B)].cpu() for features in both)
            yield image_BC, text_BC

    def train(
        self,
        model: Any,
        rows_SB: Tensor,
        name: str,
        *,
        trainable: Callable[[str], bool] = lambda name: True,
        lr_factor: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        """Train `model` in place by the protocol's loop, optimiser and schedule, one step for each row of samples.

        `trainable` chooses parameters by name, `lr_factor` multiplies the protocol's peak learning rate. Afterwards
        every parameter requires a gradient again, and none has one. With a folder `work`, an interrupted training goes
        on when it is asked for again, and the weights of a finished one are taken from there.
        """
        place = self._work and self._work / f"{self._trained:03d}"
        self._trained += 1
        if place and (found := branches.finished(place, model)):
            self.flops, self.steps = self.flops + found.flops, self.steps + found.steps
            self.samples, self.earlier_seconds = self.samples + found.samples, self.earlier_seconds + found.seconds
            return
        rows_SB = branches.rows(place, rows_SB) if place else rows_SB
        with self._reporter.bar(f"preparing {self._label}: {name}", len(rows_SB)) as bar:
            flops, seconds = self._fit(model, rows_SB, name, trainable, lr_factor, label_smoothing, bar, place)
            self.flops += flops
        if place:
            branches.finish(place, model, branches.Branch(flops, len(rows_SB), rows_SB.numel(), seconds))

    def _fit(
        self,
        model: Any,
        rows_SB: Tensor,
        name: str,
        trainable: Callable[[str], bool],
        lr_factor: float,
        label_smoothing: float,
        on_step: OnStep,
        place: Path | None = None,
    ) -> tuple[int, float]:
        """Train, with checkpoints in `place`; returns FLOPs and seconds of all steps and sessions.

        FLOPs are over all ranks, by those of the few steps that are counted.
        """
        settings, was_training = self._protocol.train, model.training
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trainable(key))
        job = Job(
            purpose=f"preparation {name}",
            schedule=settings.schedule.model_copy(update={"steps": len(rows_SB)}),
            peak_lr=self._protocol.peak_lr * lr_factor,
            stop_step=len(rows_SB),
            seed=self.rng.seed(),
            label_smoothing=label_smoothing,
            zero_stage=settings.zero_stage,
            log_every=settings.log_every,
            checkpoints=place and place / "checkpoints",
            checkpoint_every=settings.checkpoint_every if place else 0,
        )
        began = time.perf_counter()
        progress = train(replace(self._clip, model=model), PickedBatches(self._data, rows_SB), job, on_step=on_step)
        self.earlier_seconds += max(0.0, progress.seconds - (time.perf_counter() - began))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        model.train(was_training)
        gc.collect()  # the engine and its optimiser refer to each other, and hold the states' memory
        self.steps += len(rows_SB)
        self.samples += rows_SB.numel()
        return progress.total_flops(), progress.seconds

    def _training_flops(self) -> int:
        """FLOPs of one training step of the upcycled model, if all experts are copies and none is over capacity.

        A step of the dense model is counted. For the other K - 1 choices and the router, FLOPs are added by the
        number of tokens that each layer sees.
        """
        model, moe = self.dense(), self._protocol.moe
        extra = 0

        def observe(mlp: Any, args: tuple[Tensor, ...]) -> None:
            nonlocal extra
            hidden, width = FFN.of(mlp).w1_HD.shape
            forward = 4 * width * hidden * (moe.top_k - 1) + 2 * width * moe.experts  # of one token
            extra += 3 * forward * (args[0].numel() // width)  # the backward pass takes twice as many as the forward

        for layer in find_layers(model, moe):
            model.get_submodule(layer.mlp_path).register_forward_pre_hook(observe)
        dense = self._step_flops(model, lambda name: True)
        return dense + distributed.sum_over_ranks(extra)

    def _step_flops(self, model: Any, trainable: Callable[[str], bool]) -> int:
        """FLOPs of one training step. The step is made to count them, and charged like all others."""
        flops, _ = self._fit(model, self._probe()[None], "probe", trainable, 1.0, 0.0, lambda done, metrics: None)
        self.flops += flops
        return flops

    def _probe(self) -> Tensor:
        """A random batch to count FLOPs on, int64 [B]."""
        if len(self) < self.batch_size:
            raise UserError(f"the training set has {len(self)} pairs, fewer than one batch of {self.batch_size}.")
        return distinct(len(self), self.batch_size, self.rng.child("probe"))


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True)
class BranchStrategy(Strategy):
    """Base class of strategies whose experts are FFNs of branches: copies of the dense CLIP that are trained."""

    lr_factor: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="branches' peak learning rate, times the protocol's"
    )
    budget: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="what all branches may cost, times the training's FLOPs"
    )
    router_init: RouterInit = "deepspeed"

    def preparation_budget(self) -> float:
        return self.budget
