"""Plans for several strategies, and what a dry run says of them; nothing is run.

plans = make_plans(registry, ["dense", "cluster-aware"], protocol, reporter=reporter)
facts = dry_run(plans[0])                                               # shape, fingerprints, cost
facts = dry_run_of_matrix(cells, preview(cells, results, fresh=False))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upcycle_bench.planning.estimate import estimate, estimate_seconds
from upcycle_bench.planning.matrix import Cell, cost_of
from upcycle_bench.planning.plan import Paths, Plan, make_plan
from upcycle_bench.planning.registry import Registry
from upcycle_bench.protocol import Protocol
from upcycle_bench.util.distributed import choose_device
from upcycle_bench.util.progress import Reporter


def make_plans(
    registry: Registry,
    names: Sequence[str],
    protocol: Protocol,
    *,
    options: Mapping[str, str] | None = None,
    paths: Paths | None = None,
    suites: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> list[Plan]:
    """A plan for each strategy of `names`, with both seeds 0; the other arguments are those of `make_plan`."""
    plans: list[Plan] = []
    for name in names:
        plan = make_plan(
            registry,
            name,
            protocol,
            options=dict(options or {}),
            paths=paths,
            suites=suites,
            reporter=reporter,
            world=plans[0].world if plans else None,
        )
        plans.append(plan)
    return plans


def dry_run(plan: Plan) -> dict[str, Any]:
    """Identity, shape and cost of one run, as JSON; the cost is without the strategy's own loss."""
    costs = estimate(plan.protocol, plan.strategy)
    flops = costs.train_flops + costs.prepare_flops_at_most
    seconds = estimate_seconds(plan.protocol, flops, choose_device()) if flops else 0.0
    return {
        "strategy": plan.label,
        "protocol": plan.protocol.name,
        "division": plan.division,
        **({"open_because": plan.unequal} if plan.unequal else {}),
        "overrides": list(plan.protocol.overrides),
        "seeds": {"init": plan.init_seed, "train": plan.train_seed},
        "training_fingerprint": plan.training_fingerprint,
        "suite_fingerprints": plan.suite_fingerprints,
        **({"skipped": plan.skipped} if plan.skipped else {}),
        "blocks_replaced": list(costs.layers),
        **({"experts": plan.moe.experts, "top_k": plan.moe.top_k} if costs.layers else {}),
        "parameters_total": costs.parameters_total,
        "parameters_active": costs.parameters_active,
        "steps": costs.steps,
        "samples": costs.samples,
        "peak_learning_rate": plan.protocol.peak_lr,
        "calibration_pairs": plan.strategy.calibration_pairs,
        "forward_flops_per_pair": costs.forward_flops,
        "training_flops_without_strategy_loss": costs.train_flops,
        **({"preparation_flops_at_most": costs.prepare_flops_at_most} if costs.prepare_flops_at_most else {}),
        "estimated_training_seconds_on_one_such_device": round(seconds, 1),
        **_training_set(plan),
        "missing": list(plan.missing),
    }


def dry_run_of_matrix(cells: Sequence[Cell], done: Sequence[Path | None]) -> dict[str, Any]:
    """How many of the cells are to do, and what they cost, as JSON; `done` has a record, or None, for each cell."""
    to_do = [cell for cell, path in zip(cells, done, strict=True) if path is None]
    flops, seconds = cost_of(to_do)
    return {
        "runs": len(cells),
        **({"skipped": cells[0].plan.skipped} if cells[0].plan.skipped else {}),
        "to_do": len(to_do),
        "flops_without_strategy_losses": flops,
        "estimated_training_seconds_on_one_such_device": round(seconds, 1),
        **_training_set(cells[0].plan),
        "missing": list(cells[0].plan.missing),
    }


def _training_set(plan: Plan) -> dict[str, Any]:
    """Of a user's own data: how many pairs there are, and how many samples are left out or bad, by kind."""
    index = plan.world.index if plan.world else None
    if index is None:
        return {}
    bad = {"training_pairs_known_to_be_bad": len(index.bad)} if index.bad else {}
    return {"training_pairs": len(index), "training_samples_left_out": dict(index.left_out), **bad}
