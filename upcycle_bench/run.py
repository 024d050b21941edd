"""One run, from a plan to a record. The steps of `run` are the benchmark; each is one call below.

path = run(plan, Path("results"), reporter)
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from upcycle_bench.data.bad_list import read_bad
from upcycle_bench.data.batches import Loading
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.training_pairs import training_pairs
from upcycle_bench.evaluation.held_out import HeldOutPairs, held_out_pairs
from upcycle_bench.evaluation.score import headlines_of, score, scores_of
from upcycle_bench.model import weights
from upcycle_bench.model.clip import Clip
from upcycle_bench.model.cost import model_cost
from upcycle_bench.model.measure import diagnose
from upcycle_bench.model.moe import parameter_counts
from upcycle_bench.model.surgery import merge
from upcycle_bench.planning.fingerprint import recipe_path
from upcycle_bench.planning.identity import command_of, run_facts, with_dense
from upcycle_bench.planning.plan import Plan, check_input, check_strategy, dense_source, run_id
from upcycle_bench.record import slug
from upcycle_bench.reporting.expected_curves import outside, read_curves
from upcycle_bench.run_state import RunState, write_failure, write_record
from upcycle_bench.training import finished, session
from upcycle_bench.training.job import Curve, Job, Progress
from upcycle_bench.training.loop import train
from upcycle_bench.training.pretrain import load_dense
from upcycle_bench.training.same_view import require_same_view
from upcycle_bench.training.stopping import at_steps
from upcycle_bench.training.trackers import Tracked, Trackers
from upcycle_bench.training.work_folder import about, folder_of, refuse_others, work_folder
from upcycle_bench.upcycling.final_form import require_describable
from upcycle_bench.upcycling.starting_model import Start, diagnosed, initialise
from upcycle_bench.util import distributed
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.first_cause import last_word
from upcycle_bench.util.meter import Meter, Phase
from upcycle_bench.util.progress import Reporter
from upcycle_bench.util.rng import Stream


def run(
    plan: Plan,
    results: Path,
    reporter: Reporter,
    *,
    fresh: bool = False,
    track: Sequence[str] = (),
    loading: Loading | None = None,
    done: Callable[[], Path | None] = lambda: None,
) -> Path | None:
    """Make the record; returns its path on rank 0, None on others. Every rank must call it.

    `fresh`: train even if the cache holds the finished training. `track`: names of trackers. `loading`: how batches are
    read. `done`: asked on rank 0 once no other process can be at the same training; its record is taken instead.

    Raises UserError for bad input, and where the same command left a training that cannot go on, before anything
    is written. A later error is written as a failed record, then raised again. Stopped (`training.stopping`) leaves no
    record: the same command goes on.
    """
    check_input(plan, results)
    check_strategy(plan)
    protocol, world, weights_folder = plan.protocol, plan.world, cache_root() / "weights"
    assert world is not None
    with session.open_session(protocol.threads) as device:
        require_same_view(world)
        facts, command = run_facts(plan), command_of(plan)
        refuse_others(facts, command, fresh)
        plan = plan if fresh else as_begun(plan, folder_of(facts))
        state = RunState(plan, Meter(device))
        with last_word(lambda error: say_failure(state, error, results)):
            dense, state.dense = load_dense(protocol, world, dense_source(plan), device, reporter, loading)
            state.start = dense
            data = training_pairs(world, dense, protocol.train.schedule.augmentation, protocol.data, loading)
            # A tuned run has the training of its options: what was trained for these is not trained again.
            key = finished.key_of(run_id(replace(plan, tuned=None), state.dense), device)
            with (
                work_folder(facts, command, fresh, {"dense": plan.dense_identity}) as work,
                trackers_of(plan, work.name, results, track) as trackers,
            ):
                if distributed.from_main(found := done() if distributed.is_main() else None):
                    return found
                if fresh or not recall(state, key):
                    held_out = held_out_of(plan, dense)  # first, since it may be refused
                    start = Start(protocol, world, dense, data)
                    model, state.receipt = initialise(plan.strategy, start, plan.init_seed, state.meter, reporter, work)
                    require_describable(
                        plan.strategy, model.model, dense.model, plan.steps, diagnosed(dense, data, device)
                    )
                    with at_steps():  # once it is trained, it is stored, whatever signal comes
                        state.progress = train_model(plan, model, data, held_out, work, state.meter, reporter, trackers)
                        state.metrics = work / "metrics.jsonl"
                        state.parameters = parameter_counts(model.model)  # of the trained form, before the merge
                        merge(model.model)
                        state.weights = weights.save(model, plan.moe, weights_folder)
                        state.final = whole_model(plan, model, weights_folder / f"{state.weights}.safetensors")
                        remember(state, key)
                        distributed.barrier()  # a rank that has nothing to store would take rank 0 along too early
                path = None
                if distributed.is_main():
                    assert state.final is not None and state.weights is not None
                    state.built = model_cost(state.final.model)
                    file = weights_folder / f"{state.weights}.safetensors"
                    outcome, state.certificate = score(
                        plan.suites, world.eval_root, state.final, state.meter, reporter, state.weights, file
                    )
                    state.diagnostics = diagnostics(state, dense, data)
                    path = write_record(state, outcome, results)
                    headlines = headlines_of(scores_of(outcome))
                    trackers.scores({name: each["value"] for name, each in headlines.items()}, step=plan.steps)
                distributed.barrier()  # until here rank 0 needs the work folder
        return path


def as_begun(plan: Plan, work: Path) -> Plan:
    """The plan with the dense model that an interrupted training began with, if the cache has it.

    A protocol that trains its own dense model would train another one on other ranks, or with other versions.
    """
    begun = distributed.from_main(about(work).get("dense"))
    if plan.protocol.dense.source != "pretrain" or begun in (None, plan.dense_identity):
        return plan
    return with_dense(plan, begun) if distributed.from_main(recipe_path(begun).is_file()) else plan


def say_failure(state: RunState, error: Exception, results: Path) -> None:
    """On rank 0 write the record of a failed run, and say where it is, or why there is none: the disk may have failed.

    Of several processes, the record names the one that failed first.
    """
    if distributed.is_main():
        try:
            where = f"record: {write_failure(state, error, results)}"
        except UserError as why:
            where = f"it has no record: {why}"
        print(f"the run failed; {where}", file=sys.stderr)


def trackers_of(plan: Plan, identity: str, results: Path, names: Sequence[str]) -> Trackers:
    """The trackers of that run, on rank 0; their files stand beside its record, the same for all its sessions."""
    seeds, protocol = {"init_seed": plan.init_seed, "train_seed": plan.train_seed}, plan.protocol.name
    if not distributed.is_main():
        return Trackers()
    folder = f"{slug(plan.label)}-i{plan.init_seed}-t{plan.train_seed}-{identity[:8]}"
    run = Tracked(
        name=f"{plan.label} {plan.init_seed}/{plan.train_seed}",
        id=identity,
        group=protocol,
        folder=results / slug(protocol) / "tracking" / folder,
        config={"strategy": plan.label, "protocol": protocol, "division": plan.division, **seeds, "id": identity},
    )
    return Trackers(names, run)


def held_out_of(plan: Plan, dense: Clip) -> HeldOutPairs | None:
    """The held-out pairs of a training; a set that is left out of the suites has none. Every rank must call it."""
    if not plan.strategy.trains or plan.world is None:
        return None
    left_out = {name.partition("/")[2] for name in plan.skipped}
    precision = plan.protocol.train.schedule.precision
    return held_out_pairs(plan.protocol.validation, dense, plan.world.eval_root, precision, left_out)


def train_model(
    plan: Plan,
    model: Clip,
    data: PairDataset,
    held_out: HeldOutPairs | None,
    work: Path,
    meter: Meter,
    reporter: Reporter,
    trackers: Trackers,
) -> Progress | None:
    """Train `model` in place, by the protocol and the same for every strategy; None for an untrained control.

    A strategy with a number of steps of its own gets the protocol's schedule, stretched to them.
    """
    if not plan.strategy.trains:
        return None
    settings = plan.protocol.train
    job = Job(
        schedule=settings.schedule.model_copy(update={"steps": plan.steps}),
        peak_lr=plan.protocol.peak_lr,
        stop_step=plan.steps,
        seed=plan.train_seed,
        load_balance=plan.moe.load_balance,
        zero_stage=settings.zero_stage,
        log_every=settings.log_every,
        held_out=held_out,
        on_score=functools.partial(warn_of_curve, plan),
        metrics=work / "metrics.jsonl",
        checkpoints=work / "checkpoints",
        checkpoint_every=settings.checkpoint_every,
        trackers=trackers,
    )
    rng = Stream(("strategy loss", plan.strategy.info.name, plan.train_seed))
    with meter.phase("train") as phase, reporter.bar(f"training {plan.label}", job.stop_step) as bar:
        progress = train(
            model,
            data,
            job,
            make_loss=lambda layers: plan.strategy.loss(layers, rng, plan.steps),
            stages=plan.strategy.stages(plan.steps),
            next_stage=plan.strategy.next_stage,
            on_step=bar,
        )
    phase.seconds, phase.flops = progress.seconds, progress.total_flops()  # of all sessions, if it was interrupted
    phase.joules = progress.joules
    phase.steps, phase.samples = progress.step, progress.step * job.schedule.batch_size
    if curve := progress.curve:  # in memory, both are one
        meter.phases["validate"] = Phase(curve.seconds, curve.flops, phase.peak_memory_bytes)
    return progress


def warn_of_curve(plan: Plan, curve: Curve) -> None:
    """Say on rank 0 where the newest held-out score is not where other runs of this strategy were.

    It tells a broken machine or cluster before the training is paid for.
    """
    if plan.division != "closed" or not distributed.is_main():
        return
    found = outside(read_curves(), plan.label, plan.training_fingerprint, curve.identity, curve.points[-1:])
    for point in found or ():
        print(
            f"warning: step {point.step}: the held-out score is {point.score:.4f}; {point.seeds} other runs of "
            f"{plan.label} give {point.low:.4f} to {point.high:.4f}: is something here not as it was there?",
            file=sys.stderr,
        )


def whole_model(plan: Plan, model: Clip, path: Path) -> Clip:
    """On rank 0 the trained model with all its experts; read from its file where ranks hold parts of them."""
    if plan.moe.ep_size == 1 or not distributed.is_main():
        return model
    return weights.load(path)


def diagnostics(state: RunState, dense: Clip, data: PairDataset) -> dict[str, Any]:
    """The receipt's numbers for the final model, each term's mean share of the first losses, the own loss's notes.

    Of a user's own data also how many pairs there are, and how many samples are left out or were bad, by kind.
    """
    assert state.final is not None
    found = diagnose(state.final.model, dense.model, diagnosed(dense, data, state.meter.device))
    progress = state.progress
    if state.plan.world is not None and state.plan.world.option:
        listed = len(read_bad(data.index.identity))
        found["training_samples"] = {**asdict(data.counts), **({"listed_as_bad": listed} if listed else {})}
        if progress is not None and progress.bad_samples:
            found["training_samples"] |= {"bad": progress.bad_samples, "first_bad": progress.first_bad}
    if progress is not None and progress.share_steps:
        found["loss_shares_at_start"] = {"steps": progress.share_steps, **progress.mean_loss_shares}
    if progress is not None and progress.loss_notes:
        found["loss_notes"] = progress.loss_notes
    return found


def remember(state: RunState, key: str) -> None:
    """Store the finished training in the cache, before it is evaluated: if that fails, it need not be repeated.

    A control that does not train is not stored.
    """
    if state.plan.strategy.trains and distributed.is_main():
        assert state.metrics is not None
        finished.store(key, state.trained(), state.metrics)


def recall(state: RunState, key: str) -> bool:
    """Take the weights of an earlier run of the same plan; False, on every rank, if the cache has no whole ones.

    A finished training is preferred to the checkpoints of an interrupted one: it is the same training.
    """
    found = finished.look_up(key) if distributed.is_main() else None
    if found is not None:
        facts, final = found
        state.take(facts, final, finished.metrics_of(key))
        print(f"{state.plan.label} was trained on {facts.time}: weights reused (--fresh trains again)", file=sys.stderr)
    return distributed.from_main(found is not None)
