"""Receipts without training: what strategies make of the dense model at step 0.

made = receipts(plans, reporter)                # the steps of a run up to its initialisation
made[0].receipt["layers"]["vision.1"]           # as in the record of a run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upcycle_bench.data.training_pairs import training_pairs
from upcycle_bench.planning.plan import Plan, check_ready, check_strategy, dense_source
from upcycle_bench.training import session
from upcycle_bench.training.pretrain import load_dense
from upcycle_bench.upcycling.starting_model import Start, initialise
from upcycle_bench.util.meter import Meter, Phase, forget_peak_memory
from upcycle_bench.util.progress import Reporter


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One strategy at step 0: its receipt as in a record, and what it cost, phase by phase."""

    plan: Plan
    receipt: Mapping[str, Any]
    phases: Mapping[str, Phase]


def receipts(plans: Sequence[Plan], reporter: Reporter) -> list[Receipt]:
    """The receipts of `plans`, which must have one protocol; on ranks other than 0 the list is empty.

    Raises UserError, before anything is computed, for every plan that `run` would refuse.
    """
    for plan in plans:
        check_ready(plan)
        check_strategy(plan)
    made = []
    with session.open_session(plans[0].protocol.threads) as device:
        protocol, world = plans[0].protocol, plans[0].world
        assert world is not None
        dense, _ = load_dense(protocol, world, dense_source(plans[0]), device, reporter)
        data = training_pairs(world, dense, protocol.train.schedule.augmentation, protocol.data)
        start = Start(protocol, world, dense, data)
        for plan in plans:
            meter = Meter(device)
            forget_peak_memory()
            _, receipt = initialise(plan.strategy, start, plan.init_seed, meter, reporter)
            if receipt is not None:
                made.append(Receipt(plan=plan, receipt=receipt, phases=meter.phases))
    return made
