"""One run, from a plan to a record. The steps of `run` are the benchmark; each is one call below.

with reporter: path = run(plan, results=Path("results"), reporter=reporter)
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from upcycle_bench import distributed, engine, environment, record, trained, weights
from upcycle_bench.cache import cache_root
from upcycle_bench.certificate import Witness
from upcycle_bench.costs import Meter, Phase, parameter_counts
from upcycle_bench.data import PairDataset
from upcycle_bench.dense import Clip
from upcycle_bench.diagnostics import diagnose
from upcycle_bench.errors import Unsound, UserError
from upcycle_bench.files import file_sha256, require_writable
from upcycle_bench.flops import counted_flops
from upcycle_bench.job import Job, Progress
from upcycle_bench.plan import Plan, fingerprint
from upcycle_bench.pretrain import load_dense, training_data
from upcycle_bench.progress import Reporter
from upcycle_bench.rng import Stream
from upcycle_bench.step0 import diagnosed, initialise
from upcycle_bench.strategy import Strategy
from upcycle_bench.suite import EvalContext, Suite, SuiteResult
from upcycle_bench.surgery import merge
from upcycle_bench.train import COUNTING_RULE, train

Scored = tuple[dict[str, SuiteResult], record.CertificatePart | None]


def run(plan: Plan, results: Path, reporter: Reporter, *, fresh: bool = False) -> Path | None:
    """Make the record; returns its path on rank 0, None elsewhere. `fresh` trains even what the cache holds trained.

    UserError before anything runs: bad input, nothing is written. Any later error is written as a failed record, then
    raised again.
    """
    check_input(plan, results)
    check_strategy(plan)
    with engine.session(plan.protocol.threads) as device:
        state = _State(plan, Meter(device))
        try:
            dense, state.dense = load_dense(plan, device, reporter)
            data = training_data(plan, dense, plan.protocol.train.schedule)
            resumable = plan.protocol.train.checkpoint_every > 0
            key = trained.key(run_id(plan, state.dense), device)
            with trained.work_folder(key, resumable, fresh) as work:
                if fresh or not reuse(state, key):
                    model, state.receipt = initialise(plan, dense, data, state.meter, reporter)
                    state.progress = train_model(plan, model, data, work, state.meter, reporter)
                    state.parameters = parameter_counts(model.model)  # of the trained form
                    merge(model.model)
                    state.weights = weights.save(model, plan.moe, cache_root() / "weights")
                    state.final = whole_model(plan, model, state.weights)
                    keep(state, key, model, dense, work)
                if distributed.is_main():
                    assert state.final is not None
                    outcome, state.certificate = evaluate(plan, state.final, state.meter, reporter, state.weights or "")
                    state.diagnostics = diagnostics(state, dense, data)
                    path = write_record(state, outcome, state.final, results)
                    _keep_metrics(state.metrics, path)
                distributed.barrier()  # the folder goes when rank 0 needs it no more
            return path if distributed.is_main() else None
        except Exception as error:
            if distributed.is_main():
                path = write_failure(state, error, results)
                print(f"the run failed; record: {path}", file=sys.stderr)
            raise


@dataclass
class _State:
    """What is known of the run so far, so that a failure can be recorded too."""

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


def train_model(
    plan: Plan, model: Clip, data: PairDataset, work: Path, meter: Meter, reporter: Reporter
) -> Progress | None:
    """The protocol's training, identical for every strategy; None for a control that is not trained."""
    if not plan.strategy.trains:
        return None
    settings = plan.protocol.train
    job = Job(
        schedule=settings.schedule,
        peak_lr=plan.protocol.peak_lr,
        stop_step=settings.schedule.steps,
        seed=plan.train_seed,
        load_balance=plan.moe.load_balance,
        zero_stage=settings.zero_stage,
        log_every=settings.log_every,
        metrics=work / "metrics.jsonl",
        checkpoints=work / "checkpoints",
        checkpoint_every=settings.checkpoint_every,
    )
    rng = Stream(("strategy loss", plan.strategy.info.name, plan.train_seed))
    with meter.phase("train") as phase, reporter.bar(f"training {plan.label}", job.stop_step) as bar:
        progress = train(
            model,
            data,
            job,
            make_loss=lambda layers: plan.strategy.loss(layers, rng),
            stages=plan.strategy.stages(job.stop_step),
            next_stage=plan.strategy.next_stage,
            on_step=bar,
        )
    phase.seconds = progress.seconds  # of all sessions, when the run was resumed
    counted = distributed.sum_over_ranks(progress.counted_flops)  # of a few steps: all of them would overflow int64
    phase.flops = counted * progress.step // max(1, progress.counted_steps)
    return progress


def evaluate(plan: Plan, final: Clip, meter: Meter, reporter: Reporter, digest: str = "") -> Scored:
    """All suites of the plan on the final weights, whose sha256 `digest` is, on this rank alone."""
    assert plan.world is not None
    return score(plan.suites, plan.world.eval_root, final, meter, reporter, digest)


def score(
    suites: Mapping[str, Suite], root: Path, final: Clip, meter: Meter, reporter: Reporter, digest: str
) -> Scored:
    """What each suite says of the model, and why that can be believed; Unsound (a UserError) if it cannot.

    A suite that fails is skipped, with its reason, if a primary score is left.
    """
    witness = Witness(final.model.to(meter.device).eval())
    context = EvalContext(
        model=witness.model,
        tokenizer=final.tokenize,
        transform=final.transform,
        root=root,
        device=meter.device,
        weights=digest,
        track=reporter.track,
        saw=witness.saw,
    )
    results: dict[str, SuiteResult] = {}
    errors = []
    with witness, meter.phase("evaluate", count=True):
        for name, suite in suites.items():
            try:
                results[name] = suite.evaluate(context)
            except Unsound:
                raise
            except Exception as error:  # whatever a suite does, it must not take the others down
                errors.append(error)
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                results[name] = SuiteResult([], {}, skipped={"": reason})
    if errors and not any(made.primary for result in results.values() for made in result.scores):
        raise errors[0]
    with reporter.task("certificate"), counted_flops():  # the same kernels as in the evaluation
        scored = {name: suite for name, suite in suites.items() if results[name].scores}
        return results, witness.testify(scored, context)


def scores_of(outcome: Mapping[str, SuiteResult]) -> list[dict[str, Any]]:
    """All scores, as in a record; primary are those of the first suite that has some: suites do not average."""
    first = next((name for name, result in outcome.items() if any(score.primary for score in result.scores)), "")
    return [
        {"suite": name, **asdict(score), "primary": score.primary and name == first}
        for name, result in outcome.items()
        for score in result.scores
    ]


def skips_of(outcome: Mapping[str, SuiteResult]) -> dict[str, str]:
    """Suite, or suite/part -> why it did not run."""
    parts = ((name, part, why) for name, result in outcome.items() for part, why in result.skipped.items())
    return {f"{name}/{part}" if part else name: " ".join(why.split()) for name, part, why in parts}


def diagnostics(state: _State, dense: Clip, data: PairDataset) -> dict[str, Any]:
    """The receipt's numbers again, after training, and what each term was of the loss when it began."""
    assert state.final is not None
    found = diagnose(state.final.model, dense.model, diagnosed(dense, data, state.meter.device))
    progress = state.progress
    if progress is None or not progress.share_steps:
        return found
    return found | {"loss_shares_at_start": {"steps": progress.share_steps, **progress.mean_loss_shares}}


def whole_model(plan: Plan, model: Clip, digest: str) -> Clip:
    """The trained model with all its experts on rank 0: itself, or read back where they were spread over ranks."""
    if plan.moe.ep_size == 1 or not distributed.is_main():
        return model
    return weights.load(cache_root() / "weights" / f"{digest}.safetensors")


def keep(state: _State, key: str, model: Clip, dense: Clip, work: Path) -> None:
    """Store the finished training: evaluated here or not, it need not be done again."""
    state.metrics = work / "metrics.jsonl"
    if not (state.plan.strategy.trains and trained.can_be_rebuilt(model.model, dense.model) and distributed.is_main()):
        return
    assert state.progress is not None
    tree = {
        "weights": state.weights,
        "parameters": state.parameters,
        "receipt": state.receipt,
        "phases": {name: asdict(phase) for name, phase in state.meter.phases.items()},
        "progress": asdict(state.progress),
        "environment": environment.capture(state.meter.device.type),
        "time": _now(),
    }
    facts = trained.Trained.model_validate_json(json.dumps(tree, allow_nan=False))
    trained.keep(key, facts, state.metrics)


def reuse(state: _State, key: str) -> bool:
    """Take the weights of an earlier run of the same plan; False, on every rank, if the cache has none that are whole.

    It wins over an interrupted run's checkpoints: it is the same training, finished.
    """
    found = trained.find(key) if distributed.is_main() else None
    if found is not None:
        facts, state.final = found
        state.weights, state.receipt, state.progress = facts.weights, facts.receipt, facts.progress
        state.parameters = facts.parameters
        state.meter.phases |= {name: Phase(**cost.model_dump()) for name, cost in facts.phases.items()}
        state.metrics = trained.metrics_of(key)
        state.training = {"time": facts.time, "environment": facts.environment}
        print(f"{state.plan.label} was trained on {facts.time}: weights reused (--fresh trains again)", file=sys.stderr)
    return distributed.from_main(found is not None)


def check_input(plan: Plan, results: Path) -> None:
    """UserError for what is wrong with any strategy: paths not given, a folder that cannot be written, ranks."""
    check_ready(plan)
    require_writable(results, "--results")


def check_ready(plan: Plan) -> None:
    """The part of `check_input` that does not write."""
    if plan.missing:
        raise UserError(f"protocol {plan.protocol.name} needs {', '.join(plan.missing)}.")
    engine.check_world(plan.protocol.train.schedule.batch_size, plan.moe.ep_size)


def check_strategy(plan: Plan) -> None:
    """UserError for what this strategy cannot do, or lacks on this machine."""
    if plan.strategy.shares_parameters and plan.moe.ep_size > 1:
        raise UserError(
            f"{plan.label}: its experts share parameters, which expert parallelism would spread over processes; "
            "run it with --set moe.ep_size=1."
        )
    plan.strategy.check()


def run_id(plan: Plan, dense_digest: str) -> str:
    """Identity of what is run: strategy, its code and configuration, protocol, dense weights, seeds, ranks."""
    what = [
        plan.label,
        plan.entry.owner,
        _source(type(plan.strategy)),
        plan.strategy.config(),
        plan.training_fingerprint,
        dense_digest,
        plan.init_seed,
        plan.train_seed,
    ]
    return fingerprint([*what, distributed.world_size()])


def _source(strategy: type[Strategy]) -> str:
    """Hash of the files of a strategy and its bases: an edited plugin must not go on from its old checkpoint.

    What strategies share beside a base class (clustering, the workshop) is covered by `plan.NUMERICS`.
    """
    bases = [base for base in strategy.__mro__ if issubclass(base, Strategy) and base is not Strategy]
    files = sorted({file for base in bases if (file := inspect.getsourcefile(base))})
    return ",".join(file_sha256(Path(file)) for file in files)


def write_record(state: _State, outcome: Mapping[str, SuiteResult], final: Clip, results: Path) -> Path:
    """The record of a run that went through, with its per-sample outcomes beside it."""
    plan, progress = state.plan, state.progress
    scores, skipped = scores_of(outcome), skips_of(outcome)
    primary = [score["value"] for score in scores if score["primary"]]
    total, active = state.parameters or parameter_counts(final.model)
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
    return record.write(made, arrays, results)


def write_failure(state: _State, error: Exception, results: Path) -> Path:
    """A failed run is a record with a reason, never a missing row."""
    reason = f"{type(error).__name__}: {error}"[:2000]
    state.receipt = None  # it may be what failed
    return record.write(_record(state, status="failed", reason=reason), None, results)


def _record(state: _State, **parts: Any) -> record.Record:
    plan = state.plan
    info, protocol = plan.strategy.info, plan.protocol
    tree = {
        "schema_version": record.SCHEMA_VERSION,
        "run_id": run_id(plan, state.dense or ""),
        "created": _now(),
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
        "environment": environment.capture(state.meter.device.type)
        | ({"training": state.training} if state.training else {}),
        "hashes": {
            "dense": state.dense or "not loaded",
            "data": plan.world.sha256 if plan.world else "not loaded",
            "weights": state.weights,
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **parts,
    }
    return record.Record.model_validate_json(json.dumps(tree, allow_nan=False))


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _keep_metrics(metrics: Path | None, path: Path) -> None:
    """The training metrics go beside the record."""
    if metrics is not None and metrics.is_file():
        shutil.copyfile(metrics, path.with_suffix(".jsonl"))
