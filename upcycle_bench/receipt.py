"""Receipts without training: what strategies make of the dense model at step 0, side by side.

    made = receipts(plans, reporter)                # by the steps of a run up to its initialisation
    show(plans, made, as_json=False)

Tables have a row per strategy, means over its layers; with --json everything, layer by layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from upcycle_bench import display, engine
from upcycle_bench.costs import Meter, Phase, forget_peak_memory
from upcycle_bench.data import PairDataset
from upcycle_bench.planning.plan import Plan, check_ready, check_strategy, dense_path
from upcycle_bench.pretrain import load_dense
from upcycle_bench.progress import Reporter
from upcycle_bench.step0 import initialise


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One strategy at step 0, as its record would say it, and what it cost to get there."""

    plan: Plan
    receipt: Mapping[str, Any]
    phases: Mapping[str, Phase]


def receipts(plans: Sequence[Plan], reporter: Reporter) -> list[Receipt]:
    """The receipts of `plans`, which share a protocol; empty on ranks other than 0.

    Raises UserError, before anything is made, for what `run` would refuse.
    """
    for plan in plans:
        check_ready(plan)
        check_strategy(plan)
    made = []
    with engine.session(plans[0].protocol.threads) as device:
        protocol, world = plans[0].protocol, plans[0].world
        assert world is not None
        dense, _ = load_dense(protocol, world, dense_path(plans[0]), device, reporter)
        data = PairDataset(world.train_shards, dense, protocol.train.schedule.augmentation)
        for plan in plans:
            meter = Meter(device)
            forget_peak_memory()
            arguments = plan.strategy, protocol, world, plan.init_seed
            _, receipt = initialise(*arguments, dense, data, meter, reporter)
            if receipt is not None:
                made.append(Receipt(plan=plan, receipt=receipt, phases=meter.phases))
    return made


def show(made: Sequence[Receipt], as_json: bool) -> None:
    """Three tables, each narrow enough for a terminal, or one JSON document."""
    if as_json:
        print(json.dumps({"receipts": [_tree(each) for each in made]}, indent=2, allow_nan=False))
        return
    protocol, pairs = made[0].plan.protocol.name, made[0].receipt["training_pair_retrieval"]
    dense = {"strategy": "(dense model)"} | dict.fromkeys(_function(made[0]), "") | _retrieval(pairs["dense"])
    display.table(
        f"protocol {protocol}, step 0: drift from the dense model, and retrieval among {pairs['pairs']} training pairs "
        f"(log-likelihood, chance {pairs['chance_log_likelihood']:.2f}; recall@1)",
        [*({"strategy": each.plan.label} | _function(each) for each in made), dense],
    )
    rows = [{"strategy": each.plan.label} | _experts(each) for each in made if each.receipt["layers"]]
    if rows:
        display.table(
            "experts: cosine and distance of pairs; router: entropy (1: uniform), share of the busiest expert, how "
            "often the first choice is the cluster; how often the rank floor binds",
            rows,
        )
    display.table("cost of initialisation", [{"strategy": each.plan.label} | _cost(each) for each in made])


def _tree(made: Receipt) -> dict[str, Any]:
    plan = made.plan
    return {
        "strategy": plan.label,
        "protocol": plan.protocol.name,
        "seeds": {"init": plan.init_seed},
        "receipt": made.receipt,
        "phases": {name: asdict(phase) for name, phase in made.phases.items()},
    }


def _function(made: Receipt) -> dict[str, str]:
    cosine, drift = made.receipt["feature_cosine_with_dense"], made.receipt["feature_drift"]
    return {
        "drift": _number(_mean(made, "function_drift")),
        "img cos": _number(cosine["vision"]),
        "txt cos": _number(cosine["text"]),
        "img err": _number(drift["vision"]),
        "txt err": _number(drift["text"]),
        **_retrieval(made.receipt["training_pair_retrieval"]["model"]),
    }


def _retrieval(scores: Mapping[str, float]) -> dict[str, str]:
    return {"LL": f"{scores['log_likelihood']:.2f}", "R@1": _number(scores["recall@1"])}


def _experts(made: Receipt) -> dict[str, str]:
    loads = [layer["load"] for layer in made.receipt["layers"].values()]
    entropy = _mean(made, "router_entropy")
    return {
        "cosine": _number(_mean(made, "expert_cosine")),
        "dist": _number(_mean(made, "expert_distance")),
        "entropy": _number(entropy and entropy / math.log(made.plan.moe.experts)),
        "most load": _number(sum(map(max, loads)) / len(loads)),
        "cluster": _number(_mean(made, "router_agreement")),
        "floor": _number(_mean(made, "rank_floor_binds_share")),
    }


def _cost(made: Receipt) -> dict[str, str]:
    peak = max((phase.peak_memory_bytes for phase in made.phases.values()), default=None)
    return {
        **{
            f"{name} s": f"{made.phases[name].seconds:.2f}" if name in made.phases else ""
            for name in ("prepare", "calibrate", "upcycle")
        },
        "peak memory MiB": "" if peak is None else f"{peak / 2**20:,.0f}",
    }


def _mean(made: Receipt, key: str) -> float | None:
    """Over the layers that have that number; None if none has."""
    values = [layer[key] for layer in made.receipt["layers"].values() if key in layer]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
