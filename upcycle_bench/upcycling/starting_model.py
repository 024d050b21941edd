"""The model that a run starts to train, with the step-0 receipt: what the strategy made of the dense CLIP.

start = Start(protocol, world, dense, data)
model, receipt = initialise(strategy, start, init_seed, meter, reporter, work)  # receipt: on rank 0
batches = diagnosed(dense, data, device)                    # the pairs that receipts and diagnostics look at
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.world import World
from upcycle_bench.data.worlds import training_groups
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.ffn import LayerInit
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.protocol import MoE, Protocol
from upcycle_bench.strategy import Preparation, Strategy, resolve_moe
from upcycle_bench.upcycling.initialise import CalibrationSource, make_dense, make_experts
from upcycle_bench.upcycling.kept_experts import Made, keep, look_up, on_cpu
from upcycle_bench.upcycling.preparation import TrainingWorkshop
from upcycle_bench.util import distributed
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

DIAGNOSED_PAIRS = 256
CALIBRATION_BATCH = 256
BEFORE = ("prepare", "calibrate", "upcycle")  # phases


@dataclass(frozen=True)
class Start:
    """What all strategies start from: the protocol, its world, the dense CLIP and the training pairs."""

    protocol: Protocol
    world: World
    dense: Clip
    data: PairDataset


def initialise(
    strategy: Strategy, start: Start, init_seed: int, meter: Meter, reporter: Reporter, work: Path | None = None
) -> tuple[Clip, dict[str, Any] | None]:
    """Prepare or calibrate, make experts and routers, put them in; with the step-0 receipt (on rank 0).

    All ranks prepare, because preparation is training. Rank 0 does the rest and sends the result to the others, so that
    weights do not depend on the number of ranks. What was prepared or calibrated for is kept in the folder `work`,
    and taken from there by an interrupted run that goes on.
    """
    moe, dense = resolve_moe(strategy, start.protocol.moe), start.dense
    if not strategy.replaces_ffn:
        return _initialise_dense(strategy, start, moe, init_seed, meter)
    place = work / "experts" if work and (strategy.calibration_pairs or _prepares(strategy)) else None
    kept = look_up(place, dense.model, moe) if place and distributed.is_main() else None
    if distributed.from_main(kept is not None):
        base, inits, receipt = dense.model, {}, None
        if kept is not None:
            base, inits, receipt = kept.base, dict(kept.inits), kept.receipt
            meter.phases |= kept.phases
        if _prepares(strategy) and distributed.world_size() > 1:
            base = base if kept is not None else copy.deepcopy(base)
            distributed.send_from_main(base)
    else:
        base, inits, receipt = _make(strategy, start, moe, init_seed, meter, reporter, work)
        if place and distributed.is_main():
            phases = {name: meter.phases[name] for name in BEFORE if name in meter.phases}
            keep(place, Made(base, inits, receipt or {}, phases), dense.model, moe)
        if work and _prepares(strategy) and distributed.is_main():
            shutil.rmtree(work / "preparation", ignore_errors=True)
    if distributed.world_size() > 1:  # by way of the CPU: a tensor would arrive on rank 0's device
        inits = distributed.from_main({name: on_cpu(init) for name, init in inits.items()})
    model = put_experts(base, inits, moe)
    return replace(dense, model=model.to(meter.device)), receipt


def _make(
    strategy: Strategy, start: Start, moe: MoE, init_seed: int, meter: Meter, reporter: Reporter, work: Path | None
) -> tuple[Any, dict[str, LayerInit], dict[str, Any] | None]:
    """The model that the experts go into, on every rank; on rank 0 the experts and the receipt, too."""
    dense = start.dense
    preparation = _prepare(strategy, start, init_seed, meter, reporter, work)
    base, branches = (preparation.model, preparation.branches) if preparation else (dense.model, None)
    inits: dict[str, LayerInit] = {}
    receipt = None
    if distributed.is_main():
        calibration, phase = _calibration(start, init_seed, meter.device), partial(meter.phase, count=True)
        with reporter.task(f"initialising {strategy.info.name}"):
            inits = make_experts(strategy, base, moe, init_seed, calibration, branches, phase)
        whole = put_experts(base, inits, moe.model_copy(update={"ep_size": 1}))
        receipt = diagnose(whole, dense.model, diagnosed(dense, start.data, meter.device))
        if preparation:
            receipt["preparation"] = {name: float(value) for name, value in preparation.notes.items()}
        for name, init in inits.items():
            receipt["layers"][name] |= dict(init.notes)
    return base, inits, receipt


def _prepares(strategy: Strategy) -> bool:
    return type(strategy).prepare is not Strategy.prepare


def _prepare(
    strategy: Strategy, start: Start, init_seed: int, meter: Meter, reporter: Reporter, work: Path | None
) -> Preparation | None:
    """What the strategy trains before the experts are made, as the phase `prepare`; None for most strategies."""
    if not _prepares(strategy):
        return None
    with meter.phase("prepare") as phase:
        groups, name = training_groups(start.world), strategy.info.name
        rng = Stream(("strategy", name, init_seed)).child("preparation")
        folder = work / "preparation" if work else None
        workshop = TrainingWorkshop(start.dense, start.data, start.protocol, rng, groups, reporter, name, folder)
        preparation = strategy.prepare(workshop)
        phase.flops, phase.samples, phase.steps = workshop.flops, workshop.samples, workshop.steps
    phase.seconds += workshop.earlier_seconds
    return preparation


def _initialise_dense(
    strategy: Strategy, start: Start, moe: MoE, init_seed: int, meter: Meter
) -> tuple[Clip, dict[str, Any] | None]:
    """A copy of the dense model, or what the strategy makes of it; with the receipt. All ranks make the same.

    It must be a copy, since diagnostics compare the trained model with the dense one.
    """
    dense = start.dense
    if type(strategy).init_dense is Strategy.init_dense:
        model = copy.deepcopy(dense.model)
    else:
        with meter.phase("upcycle", count=True):
            model = make_dense(strategy, dense.model, moe, init_seed)
    receipt = None
    if distributed.is_main():
        receipt = diagnose(model, dense.model, diagnosed(dense, start.data, meter.device))
    return replace(dense, model=model), receipt


def _calibration(start: Start, init_seed: int, device: torch.device) -> CalibrationSource:
    def inputs(pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        sample = Stream(("calibration", init_seed))
        return _inputs(start.dense, start.data.calibration(sample, pairs, CALIBRATION_BATCH), device)

    return inputs


def diagnosed(dense: Clip, data: PairDataset, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same few training pairs for every model: (images [B, 3, H, W], texts [B, L])."""
    return _inputs(dense, data.calibration(Stream(("diagnostics", 0)), DIAGNOSED_PAIRS, CALIBRATION_BATCH), device)


def _inputs(clip: Clip, batches: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield clip.normalise(batch.images.to(device)), batch.texts.to(device)
