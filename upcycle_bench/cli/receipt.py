"""`upcycle-bench receipt`: what strategies make of the dense model at step 0, side by side. Imports nothing heavy.

The tables have a row for each strategy, with means over its layers; --json has everything, layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upcycle_bench.cli.common import (
    Checkpoint,
    Data,
    EvalData,
    Interpolate,
    Json,
    Options,
    Overrides,
    PixelSettings,
    ProtocolName,
    Strategies,
    interruptible,
    is_main,
    terminal_reporter,
)
from upcycle_bench.cli.plans import make_plans
from upcycle_bench.cli.tables import table
from upcycle_bench.util import strict_json

if TYPE_CHECKING:
    from upcycle_bench.receipts import Receipt


def receipt(
    strategy: Strategies,
    protocol: ProtocolName = "lab",
    option: Options = None,
    overrides: Overrides = None,
    init_seed: Annotated[int, typer.Option(min=0, help="The strategy's own randomness.")] = 0,
    data: Data = None,
    checkpoint: Checkpoint = None,
    pixels: PixelSettings = None,
    interpolate: Interpolate = False,
    eval_data: EvalData = None,
    as_json: Json = False,
) -> None:
    """Show what strategies make of the dense model at step 0, without training."""
    from upcycle_bench.receipts import receipts

    reporter = terminal_reporter()
    plans = make_plans(
        strategy, protocol, option, overrides, data, checkpoint, pixels, interpolate, eval_data, reporter
    )
    with interruptible("nothing was written"):
        made = receipts([replace(plan, init_seed=init_seed) for plan in plans], reporter)
    if is_main():
        show(made, as_json)


def show(made: Sequence[Receipt], as_json: bool) -> None:
    """Two tables, or three where strategies make experts, each narrow enough for a terminal; or one JSON document."""
    if as_json:
        print(strict_json.dumps({"receipts": [_tree(each) for each in made]}, indent=2))
        return
    protocol, pairs = made[0].plan.protocol.name, made[0].receipt["training_pair_retrieval"]
    dense = {"strategy": "(dense model)"} | dict.fromkeys(_function(made[0]), "") | _retrieval(pairs["dense"])
    table(
        f"protocol {protocol}, step 0: drift from the dense model, and retrieval among {pairs['pairs']} training pairs "
        f"(log-likelihood, chance {pairs['chance_log_likelihood']:.2f}; recall@1)",
        [*({"strategy": each.plan.label} | _function(each) for each in made), dense],
    )
    rows = [{"strategy": each.plan.label} | _experts(each) for each in made if each.receipt["layers"]]
    if rows:
        table(
            "experts: cosine and distance of pairs; router: entropy (1: uniform), share of the busiest expert, how "
            "often the first choice is the cluster; how often the rank floor binds",
            rows,
        )
    table("cost of initialisation", [{"strategy": each.plan.label} | _cost(each) for each in made])


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
    """The mean over the layers that have this number; None where no layer has it."""
    values = [layer[key] for layer in made.receipt["layers"].values() if key in layer]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
