"""What is known of a run so far, and the record that is made of it.

state = RunState(plan, Meter(device))           # `run` fills it in, step by step
path = write_record(state, outcome, results)    # or, of a run that fails, write_failure(state, error, results)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from upcycle_bench import record
from upcycle_bench.evaluation.score import headlines_of, scores_of, skips_of
from upcycle_bench.model import backends
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.cost import Cost
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.planning.estimate import unequal_cost, unequal_steps
from upcycle_bench.planning.fingerprint import code_fingerprint
from upcycle_bench.planning.identity import trained_on
from upcycle_bench.planning.plan import Plan, run_id
from upcycle_bench.protocol import Protocol
from upcycle_bench.suite import SuiteResult
from upcycle_bench.training.finished import Trained
from upcycle_bench.training.job import Progress
from upcycle_bench.util import distributed, first_cause, strict_json
from upcycle_bench.util.files import write_atomically
from upcycle_bench.util.flops import COUNTING_RULE
from upcycle_bench.util.meter import Meter, Phase


@dataclass
class RunState:
    """What is known of a run so far; None is what is not known yet. The record of a failed run has what is known."""

    plan: Plan
    meter: Meter
    dense: str | None = None  # identity of the dense model: the sha256 of its file
    start: Clip | None = None  # the dense model
    receipt: dict[str, Any] | None = None
    progress: Progress | None = None
    metrics: Path | None = None  # the file
    parameters: tuple[int, int] | None = None  # total, active
    built: Cost | None = None  # of the final model, as it is scored
    weights: str | None = None  # sha256 of the final model's file
    final: Clip | None = None  # with all its experts, on rank 0
    training: dict[str, Any] | None = None  # where and when the weights were trained, if not in this run
    diagnostics: dict[str, Any] | None = None
    certificate: record.CertificatePart | None = None

    def trained(self) -> Trained:
        """The finished training, as the cache stores it."""
        assert self.progress is not None
        tree = {
            "weights": self.weights,
            "parameters": self.parameters,
            "receipt": self.receipt,
            "phases": {name: asdict(phase) for name, phase in self.meter.phases.items()},
            "progress": asdict(self.progress),
            "environment": backends.machine(self.meter.device),
            "time": now(),
        }
        return Trained.model_validate_json(strict_json.dumps(tree))

    def take(self, facts: Trained, final: Clip, metrics: Path) -> None:
        """Take over a training from the cache, as if it had just finished here."""
        self.weights, self.receipt, self.progress = facts.weights, facts.receipt, facts.progress
        self.parameters, self.final, self.metrics = facts.parameters, final, metrics
        self.meter.phases |= {name: Phase(**cost.model_dump()) for name, cost in facts.phases.items()}
        self.training = {"time": facts.time, "environment": facts.environment}


def unequal(plan: Plan, built: Cost) -> str | None:
    """Why a built model does not compare with the protocol's own MoE, or None.

    A dense control compares, though it costs less, as long as it does not cost more or declares another shape.
    """
    if longer := unequal_steps(plan.protocol, plan.strategy):
        return longer
    if plan.strategy.info.status == "control" and not plan.strategy.replaces_ffn:
        return plan.unequal or unequal_cost(plan.protocol, built, only_above=True)
    return unequal_cost(plan.protocol, built)


def write_record(state: RunState, outcome: Mapping[str, SuiteResult], results: Path) -> Path:
    """Write the record of a run that succeeded, with outcomes of each sample and lines of metrics beside it.

    `outcome` has a result for each suite, by name. Returns the record's path.
    """
    plan, progress = state.plan, state.progress
    scores, skipped = scores_of(outcome), skips_of(outcome)
    assert state.final is not None
    total, active = state.parameters or parameter_counts(state.final.model)
    batch_size = plan.protocol.train.schedule.batch_size
    cost = {
        "phases": {name: asdict(phase) for name, phase in state.meter.phases.items()},
        "counting_rule": COUNTING_RULE,
        "parameters_total": total,
        "parameters_active": active,
        "tokens_dropped": progress.dropped_fraction if progress else None,
        "samples": sum(phase.steps for phase in state.meter.phases.values()) * batch_size,
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
        headlines=headlines_of(scores),
        cost=cost,
        diagnostics=state.diagnostics or {},
        certificate=state.certificate.model_dump(mode="json") if state.certificate else None,
    )
    path = record.write(made, arrays, results)
    if state.metrics is not None and state.metrics.is_file():
        try:
            write_atomically(path.with_suffix(".jsonl"), state.metrics.read_bytes())
        except BaseException:  # a record is whole, or not there
            for suffix in (".json", ".npz"):
                path.with_suffix(suffix).unlink(missing_ok=True)
            raise
    return path


def write_failure(state: RunState, error: Exception, results: Path) -> Path:
    """Write the record of a failed run, with the reason, so that tables show it; returns its path."""
    reason = first_cause.reason(error)[:2000]
    state.receipt = None  # it may hold what failed, such as NaN
    return record.write(_record(state, status="failed", reason=reason), None, results)


def _record(state: RunState, **parts: Any) -> record.Record:
    plan = state.plan if state.built is None else state.plan.as_built(unequal(state.plan, state.built))
    sessions = state.progress.sessions if state.progress else []
    plan = trained_on(plan, sessions)
    info, protocol = plan.strategy.info, plan.protocol
    tree = {
        "schema_version": record.SCHEMA_VERSION,
        "run_id": run_id(state.plan, state.dense or ""),
        "created": now(),
        "strategy": {
            "name": info.name,
            "label": plan.row,
            "config": plan.strategy.config(),
            "tuned": plan.tuned.model_dump(mode="json") if plan.tuned else None,
            "moe": plan.moe.model_dump(mode="json") if plan.moe != protocol.moe else None,
            "status": info.status,
            "reconstructed": info.reconstructed,
            "footing": info.footing,
            "paper": info.paper,
            "code": code_fingerprint(type(plan.strategy)),
            "distribution": plan.entry.distribution,
            "version": plan.entry.version,
        },
        "protocol": {
            "name": protocol.name,
            "division": plan.division,
            "overrides": protocol.overrides,
            "unequal": plan.unequal,
            "training_fingerprint": plan.training_fingerprint,
            "shared_fingerprint": trained_on(state.plan.as_built(None), sessions).training_fingerprint
            if plan.unequal
            else None,
            # Without the suites that were skipped: their tables have no row for this run.
            "suite_fingerprints": {
                name: value for name, value in plan.suite_fingerprints.items() if name not in parts.get("skipped", {})
            },
            "resolved": protocol.model_dump(mode="json"),
        },
        "dense": _dense_part(state),
        "seeds": {"init": plan.init_seed, "train": plan.train_seed},
        "receipt": state.receipt,
        "validation": _validation_part(state.progress, protocol),
        "sessions": [asdict(session) for session in sessions] or None,
        "environment": backends.machine(state.meter.device) | ({"training": state.training} if state.training else {}),
        "hashes": {
            "dense": state.dense or "not loaded",
            "data": plan.world.sha256 if plan.world else "not loaded",
            "weights": state.weights,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **parts,
    }
    return record.Record.model_validate_json(strict_json.dumps(tree))


def _validation_part(progress: Progress | None, protocol: Protocol) -> dict[str, Any] | None:
    """The curve, if it is the one that the protocol wants: a training from the cache may have another one."""
    wanted = protocol.validation
    if progress is None or progress.curve is None or not progress.curve.points or wanted is None:
        return None
    if (progress.curve.set, progress.curve.every) != (wanted.set, wanted.every):
        return None
    return {key: value for key, value in asdict(progress.curve).items() if key not in ("seconds", "flops")}


def _dense_part(state: RunState) -> dict[str, Any] | None:
    if state.start is None:
        return None
    return {
        "model": state.start.name,
        "pixels": state.start.pixels,
        "interpolated": dict(state.start.interpolated),
        "logit_bias": state.start.model.logit_bias is not None,
    }


def now() -> str:
    """The time in UTC, as records write it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
