"""What is known of a run while it goes on, and the record that is made of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from upcycle_bench import record
from upcycle_bench.evaluation.score import scores_of, skips_of
from upcycle_bench.model import backends
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.planning.plan import Plan, run_id
from upcycle_bench.suite import SuiteResult
from upcycle_bench.training.job import Progress
from upcycle_bench.util import distributed, environment
from upcycle_bench.util.flops import COUNTING_RULE
from upcycle_bench.util.meter import Meter


@dataclass
class RunState:
    """What is known of a run so far; a failed run is recorded with what it has."""

    plan: Plan
    meter: Meter
    dense: str | None = None
    receipt: dict[str, Any] | None = None
    progress: Progress | None = None
    weights: str | None = None
    parameters: tuple[int, int] | None = None  # total, active
    final: Clip | None = None  # with all its experts, on rank 0
    metrics: Path | None = None
    training: dict[str, Any] | None = None  # where and when the weights were trained, if not in this run
    diagnostics: dict[str, Any] | None = None
    certificate: record.CertificatePart | None = None


def machine(state: RunState) -> dict[str, Any]:
    """Where the run runs, and by which backend its experts are computed in bf16."""
    device = state.meter.device
    backend = backends.forced() or backends.default(device)
    return environment.capture(device.type) | {"experts": backend}


def write_record(state: RunState, outcome: Mapping[str, SuiteResult], results: Path) -> Path:
    """The record of a run that went through; per-sample outcomes and training metrics stand beside it."""
    plan, progress = state.plan, state.progress
    scores, skipped = scores_of(outcome), skips_of(outcome)
    primary = [score["value"] for score in scores if score["primary"]]
    assert state.final is not None
    total, active = state.parameters or parameter_counts(state.final.model)
    batch_size = plan.protocol.train.schedule.batch_size
    samples = progress.step * batch_size if progress else 0
    cost = {
        "phases": {name: asdict(phase) for name, phase in state.meter.phases.items()},
        "counting_rule": COUNTING_RULE,
        "parameters_total": total,
        "parameters_active": active,
        "tokens_dropped": progress.dropped_fraction if progress else None,
        "samples": samples,
        "samples_per_second": progress.samples_per_second(batch_size) if progress else None,
        "world_size": distributed.world_size(),
    }
    arrays = {
        f"{suite}/{name}": values for suite, result in outcome.items() for name, values in result.outcomes.items()
    }
    made = _record(
        state,
        status="ok",
        scores=scores,
        skipped=plan.skipped | skipped,
        suite_notes={name: result.notes for name, result in outcome.items() if result.notes},
        primary=sum(primary) / len(primary) if primary else None,
        cost=cost,
        diagnostics=state.diagnostics or {},
        certificate=state.certificate.model_dump(mode="json") if state.certificate else None,
    )
    path = record.write(made, arrays, results)
    if state.metrics is not None and state.metrics.is_file():
        shutil.copyfile(state.metrics, path.with_suffix(".jsonl"))
    return path


def write_failure(state: RunState, error: Exception, results: Path) -> Path:
    """A failed run is a record with a reason, never a missing row."""
    reason = f"{type(error).__name__}: {error}"[:2000]
    state.receipt = None  # it may be what failed
    return record.write(_record(state, status="failed", reason=reason), None, results)


def _record(state: RunState, **parts: Any) -> record.Record:
    plan = state.plan
    info, protocol = plan.strategy.info, plan.protocol
    tree = {
        "schema_version": record.SCHEMA_VERSION,
        "run_id": run_id(plan, state.dense or ""),
        "created": now(),
        "strategy": {
            "name": info.name,
            "label": plan.label,
            "config": plan.strategy.config(),
            "moe": plan.moe.model_dump(mode="json") if plan.moe != protocol.moe else None,
            "status": info.status,
            "reconstructed": info.reconstructed,
            "paper": info.paper,
            "distribution": plan.entry.distribution,
            "version": plan.entry.version,
        },
        "protocol": {
            "name": protocol.name,
            "division": plan.division,
            "overrides": protocol.overrides,
            "unequal": plan.unequal,
            "training_fingerprint": plan.training_fingerprint,
            # What was skipped shares no table with what was not.
            "suite_fingerprints": {
                name: value for name, value in plan.suite_fingerprints.items() if name not in parts.get("skipped", {})
            },
            "resolved": protocol.model_dump(mode="json"),
        },
        "seeds": {"init": plan.init_seed, "train": plan.train_seed},
        "receipt": state.receipt,
        "environment": machine(state) | ({"training": state.training} if state.training else {}),
        "hashes": {
            "dense": state.dense or "not loaded",
            "data": plan.world.sha256 if plan.world else "not loaded",
            "weights": state.weights,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **parts,
    }
    return record.Record.model_validate_json(json.dumps(tree, allow_nan=False))


def now() -> str:
    """The time, as records write it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
