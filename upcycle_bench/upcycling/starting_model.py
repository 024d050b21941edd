"""The model that a run starts to train, with the step-0 receipt.

model, receipt = initialise(strategy, protocol, world, init_seed, dense, data, meter, reporter)   # receipt: rank 0
batches = diagnosed(dense, data, device)                             # what receipts and diagnostics look at
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.world import World
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.ffn import LayerInit
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.surgery import put_experts
from upcycle_bench.protocol import MoE, Protocol
from upcycle_bench.strategy import Strategy, resolve_moe
from upcycle_bench.upcycling.initialise import CalibrationSource, make_dense, make_experts
from upcycle_bench.upcycling.preparation import prepare
from upcycle_bench.util import distributed
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream

DIAGNOSED_PAIRS = 256
CALIBRATION_BATCH = 256


def initialise(
    strategy: Strategy,
    protocol: Protocol,
    world: World,
    init_seed: int,
    dense: Clip,
    data: PairDataset,
    meter: Meter,
    reporter: Reporter,
) -> tuple[Clip, dict[str, Any] | None]:
    """Prepare or calibrate, make experts and routers, put them in; with the step-0 receipt (on rank 0).

    All ranks prepare, which is training. Rank 0 does the rest and the others get the result, so that weights do not
    depend on the number of ranks.
    """
    moe = resolve_moe(strategy, protocol.moe)
    if not strategy.replaces_ffn:  # a copy: the dense model stays what diagnostics compare with
        return _initialise_dense(strategy, moe, init_seed, dense, data, meter)
    preparation = prepare(strategy, protocol, world, init_seed, dense, data, meter, reporter)
    base, branches = (preparation.model, preparation.branches) if preparation else (dense.model, None)
    inits: dict[str, LayerInit] = {}
    receipt = None
    if distributed.is_main():
        calibration, phase = _calibration(init_seed, dense, data, meter.device), partial(meter.phase, count=True)
        with reporter.task(f"initialising {strategy.info.name}"):
            inits = make_experts(strategy, base, moe, init_seed, calibration, branches, phase)
        whole = put_experts(base, inits, moe.model_copy(update={"ep_size": 1}))
        receipt = diagnose(whole, dense.model, diagnosed(dense, data, meter.device))
        if preparation:
            receipt["preparation"] = {name: float(value) for name, value in preparation.notes.items()}
        for name, init in inits.items():
            receipt["layers"][name] |= dict(init.notes)
    if distributed.world_size() > 1:  # by way of the CPU: a tensor would come back on rank 0's device
        box = [
            {
                name: replace(init, experts=[e.cpu() for e in init.experts], router_ND=init.router_ND.cpu())
                for name, init in inits.items()
            }
        ]
        inits = distributed.from_main(box[0])
    model = put_experts(base, inits, moe)
    return replace(dense, model=model.to(meter.device)), receipt


def _initialise_dense(
    strategy: Strategy, moe: MoE, init_seed: int, dense: Clip, data: PairDataset, meter: Meter
) -> tuple[Clip, dict[str, Any] | None]:
    """The dense model, or what the strategy makes of it: on every rank, and the same there; with the receipt."""
    if type(strategy).init_dense is Strategy.init_dense:
        model = copy.deepcopy(dense.model)
    else:
        with meter.phase("upcycle", count=True):
            model = make_dense(strategy, dense.model, moe, init_seed)
    receipt = diagnose(model, dense.model, diagnosed(dense, data, meter.device)) if distributed.is_main() else None
    return replace(dense, model=model), receipt


def _calibration(init_seed: int, dense: Clip, data: PairDataset, device: torch.device) -> CalibrationSource:
    def inputs(pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
        sample = Stream(("calibration", init_seed))
        return _inputs(dense, data.calibration(sample, pairs, CALIBRATION_BATCH), device)

    return inputs


def diagnosed(dense: Clip, data: PairDataset, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same few training pairs for every model: (images [B, 3, H, W], texts [B, L])."""
    return _inputs(dense, data.calibration(Stream(("diagnostics", 0)), DIAGNOSED_PAIRS, CALIBRATION_BATCH), device)


def _inputs(clip: Clip, batches: Iterable[Any], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield clip.normalise(batch.images.to(device)), batch.texts.to(device)
