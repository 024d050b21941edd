"""One run, from a plan to a record. The steps of `run` are the benchmark; each is one call below.

with reporter: path = run(plan, results=Path("results"), reporter=reporter)
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.evaluation.score import Scored, score
from upcycle_bench.model import weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.model.surgery import merge
from upcycle_bench.planning.plan import Plan, check_input, check_strategy, dense_path, run_id
from upcycle_bench.run_state import RunState, machine, now, write_failure, write_record
from upcycle_bench.training import finished, session
from upcycle_bench.training.job import Job, Progress
from upcycle_bench.training.loop import train
from upcycle_bench.training.pretrain import load_dense
from upcycle_bench.upcycling.starting_model import Start, diagnosed, initialise
from upcycle_bench.util import distributed
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.meter import Meter, Phase
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream


def run(plan: Plan, results: Path, reporter: Reporter, *, fresh: bool = False) -> Path | None:
    """Make the record; returns its path on rank 0, None elsewhere. `fresh` trains even what the cache holds trained.

    UserError before anything runs: bad input, nothing is written. Any later error is written as a failed record, then
    raised again.
    """
    check_input(plan, results)
    check_strategy(plan)
    protocol, weights_folder = plan.protocol, cache_root() / "weights"
    assert plan.world is not None
    with session.open_session(protocol.threads) as device:
        state = RunState(plan, Meter(device))
        try:
            dense, state.dense = load_dense(protocol, plan.world, dense_path(plan), device, reporter)
            data = PairDataset(plan.world.train_shards, dense, protocol.train.schedule.augmentation)
            key = finished.key(run_id(plan, state.dense), device)
            with finished.work_folder(key, protocol.train.checkpoint_every > 0, fresh) as work:
                if fresh or not recall(state, key):
                    start = Start(protocol, plan.world, dense, data)
                    model, state.receipt = initialise(plan.strategy, start, plan.init_seed, state.meter, reporter)
                    state.progress = train_model(plan, model, data, work, state.meter, reporter)
                    state.parameters = parameter_counts(model.model)  # of the trained form
                    merge(model.model)
                    state.weights = weights.save(model, plan.moe, weights_folder)
                    state.final = whole_model(plan, model, state.weights)
                    remember(state, key, model, dense, work)
                path = None
                if distributed.is_main():
                    outcome, state.certificate = evaluate(plan, state.final, state.meter, reporter, state.weights or "")
                    state.diagnostics = diagnostics(state, dense, data)
                    path = write_record(state, outcome, results)
                distributed.barrier()  # rank 0 needs the folder until here
            return path
        except Exception as error:
            if distributed.is_main():
                print(f"the run failed; record: {write_failure(state, error, results)}", file=sys.stderr)
            raise


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


def evaluate(plan: Plan, final: Clip | None, meter: Meter, reporter: Reporter, digest: str = "") -> Scored:
    """All suites of the plan on the final weights, whose sha256 `digest` is, on this rank alone."""
    assert plan.world is not None and final is not None
    return score(plan.suites, plan.world.eval_root, final, meter, reporter, digest)


def diagnostics(state: RunState, dense: Clip, data: PairDataset) -> dict[str, Any]:
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


def remember(state: RunState, key: str, model: Clip, dense: Clip, work: Path) -> None:
    """Store the finished training: evaluated here or not, it need not be done again."""
    state.metrics = work / "metrics.jsonl"
    if not (state.plan.strategy.trains and finished.can_be_rebuilt(model.model, dense.model) and distributed.is_main()):
        return
    assert state.progress is not None
    tree = {
        "weights": state.weights,
        "parameters": state.parameters,
        "receipt": state.receipt,
        "phases": {name: asdict(phase) for name, phase in state.meter.phases.items()},
        "progress": asdict(state.progress),
        "environment": machine(state),
        "time": now(),
    }
    facts = finished.Trained.model_validate_json(json.dumps(tree, allow_nan=False))
    finished.store(key, facts, state.metrics)


def recall(state: RunState, key: str) -> bool:
    """Take the weights of an earlier run of the same plan; False, on every rank, if the cache has none that are whole.

    It wins over an interrupted run's checkpoints: it is the same training, finished.
    """
    found = finished.look_up(key) if distributed.is_main() else None
    if found is not None:
        facts, state.final = found
        state.weights, state.receipt, state.progress = facts.weights, facts.receipt, facts.progress
        state.parameters = facts.parameters
        state.meter.phases |= {name: Phase(**cost.model_dump()) for name, cost in facts.phases.items()}
        state.metrics = finished.metrics_of(key)
        state.training = {"time": facts.time, "environment": facts.environment}
        print(f"{state.plan.label} was trained on {facts.time}: weights reused (--fresh trains again)", file=sys.stderr)
    return distributed.from_main(found is not None)
