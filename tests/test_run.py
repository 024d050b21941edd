"""Runs from plan to record: what is written, what is not, and that the same run gives the same numbers."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic.dataclasses import dataclass

from tests.conftest import QUICK
from upcycle_bench import record
from upcycle_bench.data.batches import Batch
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.evaluation import certificate
from upcycle_bench.evaluation.score import score
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.model import weights
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.ffn import LayerInit
from upcycle_bench.planning.plan import Paths, Plan, make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import learning_rate, load_protocol
from upcycle_bench.run import run
from upcycle_bench.strategy import Strategy, StrategyInfo, random_router
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import Unsound, UserError
from upcycle_bench.util.files import file_sha256
from upcycle_bench.util.meter import Meter
from upcycle_bench.util.progress import OnStep, Reporter
from upcycle_bench.util.rng import Stream


@dataclass(frozen=True, kw_only=True)
class Failing(Strategy):
    """A strategy whose initialisation fails."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="failing", summary="s", paper="p", status="control")

    def init_layer(self, *_: Any) -> Any:
        raise ArithmeticError("singular matrix in vision.1")


class Plugin:
    """Brings `failing`."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Failing]


def plan(strategy: str, quick: list[str], **options: Any) -> Plan:
    registry = load_registry({"test": Plugin()})
    protocol = load_protocol(registry.get("protocol", "smoke").target, quick)
    return make_plan(registry, strategy, protocol, **options)


def scores(made: record.Record) -> dict[tuple[str, str], float]:
    return {(score.dataset, score.metric): score.value for score in made.scores}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> record.Record:
    """A run of sparse-upcycling with both seeds 0."""
    return record.read(run(plan("sparse-upcycling", QUICK), tmp_path_factory.mktemp("sparse"), Reporter()))


@pytest.fixture(scope="module")
def cluster_aware(tmp_path_factory: pytest.TempPathFactory) -> record.Record:
    """A run of cluster-aware with both seeds 0, which trains whatever the cache holds."""
    folder = tmp_path_factory.mktemp("cluster-aware")
    return record.read(run(plan("cluster-aware", QUICK), folder, Reporter(), fresh=True))


@pytest.mark.parametrize(
    "strategy",
    ["sparse-upcycling", "cluster-aware", "virtual-group", "dense", "dense-frozen", "dense-longer", "dense-wide"],
)
def test_a_run_is_recorded_whole(tmp_path: Path, quick: list[str], strategy: str) -> None:
    planned = plan(strategy, quick, init_seed=1, train_seed=2)
    path = run(planned, tmp_path, Reporter())
    assert path is not None
    made = record.read(path)
    moe, trains = not strategy.startswith("dense"), strategy != "dense-frozen"
    steps = {"dense-frozen": 0, "dense-longer": 5}.get(
        strategy, 4
    )  # the MoE costs 1.32 times as much as the dense model
    assert made.status == "ok"
    assert (made.seeds.init, made.seeds.train) == (1, 2)
    assert made.protocol.division == "open"
    assert made.cost is not None
    assert made.cost.samples == steps * 32
    assert ("train" in made.cost.phases) == trains
    assert ("calibrate" in made.cost.phases) == (strategy == "cluster-aware")
    seen = {name: (phase.samples, phase.steps) for name, phase in made.cost.phases.items()}
    expected = {"calibrate": (1079, 0), "upcycle": (0, 0), "train": (steps * 32, steps)}
    expected |= {"validate": (0, 0), "evaluate": (0, 0)}
    assert seen == {name: expected[name] for name in seen}
    assert made.strategy.footing == planned.strategy.info.footing
    assert (made.strategy.moe is not None) == (strategy == "virtual-group")
    assert bool(made.receipt["layers"]) == moe
    assert (made.cost.parameters_active < made.cost.parameters_total) == moe
    parts = [("digits-test", "log_rank")]
    parts += [("digits-retrieval", f"{way}_retrieval_log_rank") for way in ("text", "image")]
    assert [(each.dataset, each.metric) for each in made.scores if each.headline == "in-distribution"] == parts
    (headline,) = made.headlines.values()
    assert headline.value == pytest.approx(sum(scores(made)[part] for part in parts) / 3)
    assert not headline.higher_is_better and headline.standard_error > 0
    # 10 classes; 30 images, and 30 captions
    assert headline.chance == pytest.approx((math.lgamma(11) / 10 + 2 * math.lgamma(31) / 30) / 3)
    assert ("validate" in made.cost.phases) == (made.validation is not None) == trains
    if trains:
        assert [step for step, _ in made.validation.points] == [0, steps]
        assert (made.validation.set, made.validation.pairs) == ("digits-retrieval", 30)
        assert made.cost.phases["validate"].flops > 0
        assert made.cost.phases["train"].flops > 0
        assert path.with_suffix(".jsonl").is_file()
    if moe:
        assert set(made.receipt["layers"]) == set(made.diagnostics["layers"]) == {"vision.1", "vision.3", "text.1"}
    assert made.certificate is not None and made.certificate.predictions > 128
    assert sum(repeat.differing for repeat in made.certificate.repeats) == 0
    assert (made.certificate.choices_routed > 0) == moe
    assert made.certificate.reloaded is not None and made.certificate.reloaded.differing == 0
    assert [(each.dataset, each.permuted, each.draws, each.samples) for each in made.certificate.controls] == [
        ("digits-test", "labels", 4, 128),
        ("digits-test", "classes", 4, 128),
    ]
    assert made.protocol.unequal is None
    assert all(score.standard_error is not None and score.interval is not None for score in made.scores)
    outcomes = record.read_outcomes(path)
    right = outcomes["zero-shot/digits-test/correct@1"]
    assert len(right) == 359
    assert np.mean(right) == pytest.approx(scores(made)["digits-test", "acc1"])
    assert (cache_root() / "weights" / f"{made.hashes.weights}.safetensors").is_file()
    assert list((cache_root() / "runs").iterdir()) == []


def test_the_same_command_gives_the_same_scores_and_weights(
    tmp_path: Path, quick: list[str], cluster_aware: record.Record
) -> None:
    again = record.read(run(plan("cluster-aware", quick), tmp_path, Reporter(), fresh=True))
    assert scores(again) == scores(cluster_aware)
    assert again.hashes == cluster_aware.hashes
    assert again.receipt == cluster_aware.receipt


def test_the_two_seeds_are_independent(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The training seed does not change the receipt of step 0, but a strategy's own loss; the other seed vice versa."""
    drawn: list[int] = []  # from the stream of the loss

    def loss(self: Strategy, layers: object, rng: Stream, steps: int) -> None:
        drawn.append(rng.seed())

    plans = [plan("sparse-upcycling", quick, init_seed=i, train_seed=t) for i, t in ((0, 0), (0, 1), (1, 0))]
    monkeypatch.setattr(type(plans[0].strategy), "loss", loss)
    base, trained, initialised = (
        record.read(run(each, tmp_path / str(number), Reporter(), fresh=True)) for number, each in enumerate(plans)
    )
    assert drawn[0] == drawn[2] != drawn[1] and len(drawn) == 3
    assert base.receipt == trained.receipt
    assert base.receipt != initialised.receipt
    assert scores(base) != scores(trained)
    assert len({made.hashes.dense for made in (base, trained, initialised)}) == 1


def test_preparation_is_charged_and_leaves_the_training_seed_alone(tmp_path: Path, quick: list[str]) -> None:
    settings = [*quick, "moe.capacity_factor=8.0"]  # nothing is dropped: the budget is computed so
    made = []
    for seed in (0, 1):
        planned = plan("btx", settings, options={"branches": "1"}, train_seed=seed)
        made.append(record.read(run(planned, tmp_path / str(seed), Reporter())))
    phases = made[0].cost.phases
    assert 0.5 * phases["train"].flops < phases["prepare"].flops <= 1.01 * phases["train"].flops
    assert phases["prepare"].seconds > 0
    assert made[0].receipt["preparation"]["branch 1 samples"] == 1079
    branch = made[0].receipt["preparation"]["branch 1 steps"]
    assert 2 <= branch <= 4
    steps = branch + 2  # two more, of which the FLOPs were counted to know what the budget pays
    assert (phases["prepare"].steps, phases["prepare"].samples) == (steps, steps * 32)
    assert (phases["train"].steps, phases["train"].samples) == (4, 4 * 32)
    assert made[0].cost.samples == (steps + 4) * 32
    assert made[0].receipt == made[1].receipt
    assert made[0].hashes.weights != made[1].hashes.weights


def test_the_longer_control_spends_the_flops_of_the_mixture_on_a_stretched_schedule(
    tmp_path: Path, quick: list[str]
) -> None:
    """As counted in training, where captions are shorter than the estimate takes them; nothing is dropped here."""
    settings = [each for each in quick if not each.startswith("train.schedule.steps")]
    settings += ["train.schedule.steps=40", "train.log_every=1", "moe.capacity_factor=8.0"]
    plans = {name: plan(name, settings) for name in ("sparse-upcycling", "dense-longer")}
    paths = {name: run(planned, tmp_path, Reporter()) for name, planned in plans.items()}
    flops = {name: record.read(path).cost.phases["train"].flops for name, path in paths.items()}
    assert flops["dense-longer"] == pytest.approx(flops["sparse-upcycling"], rel=0.01)
    rates = {
        name: [json.loads(line)["learning_rate"] for line in path.with_suffix(".jsonl").read_text().splitlines()]
        for name, path in paths.items()
    }
    peak, steps = plans["dense-longer"].protocol.peak_lr, plans["dense-longer"].steps
    assert (len(rates["sparse-upcycling"]), len(rates["dense-longer"])) == (40, 53)  # 40 * 1.3241
    assert rates["dense-longer"] == [learning_rate(step, steps, peak, 0.02) for step in range(53)]


def test_sparse_upcycling_starts_from_the_dense_function(sparse: record.Record) -> None:
    for layer in sparse.receipt["layers"].values():
        assert layer["function_drift"] < 1e-5
        assert layer["expert_cosine"] == pytest.approx(1, abs=1e-6)
    assert sparse.receipt["feature_cosine_with_dense"]["vision"] == pytest.approx(1, abs=1e-5)


def test_saved_weights_score_again(quick: list[str], cluster_aware: record.Record) -> None:
    """The weights in the cache give the scores of the record, so a new suite can score an old run."""
    planned = plan("cluster-aware", quick)
    clip = weights.load(cache_root() / "weights" / f"{cluster_aware.hashes.weights}.safetensors")
    assert planned.world is not None
    meter = Meter(torch.device("cpu"))
    again, proof = score(planned.suites, planned.world.eval_root, clip, meter, Reporter(), "")
    assert cluster_aware.certificate is not None and proof is not None
    assert proof.weights == cluster_aware.certificate.weights
    assert {(s.dataset, s.metric): s.value for s in again["zero-shot"].scores} == scores(cluster_aware)


def test_a_failure_is_a_record_with_a_reason(tmp_path: Path, quick: list[str]) -> None:
    with pytest.raises(ArithmeticError):
        run(plan("failing", quick), tmp_path, Reporter())
    (path,) = record.record_paths(tmp_path)
    made = record.read(path)
    assert (made.status, made.reason) == ("failed", "ArithmeticError: singular matrix in vision.1")
    assert made.scores == []
    assert list((cache_root() / "runs").iterdir()) == []


def test_an_evaluation_that_is_not_sound_fails_the_run_and_keeps_the_weights(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan("dense", quick, train_seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(certificate, "MARGIN", -2.0)  # every answer then counts as a difference
        with pytest.raises(Unsound, match="predictions come out otherwise"):
            run(planned, tmp_path, Reporter())
    (path,) = record.record_paths(tmp_path)
    failed = record.read(path)
    assert failed.status == "failed" and failed.scores == [] and failed.certificate is None
    assert failed.reason is not None and failed.reason.startswith("Unsound: the evaluation is not sound: ")
    again = run(planned, tmp_path, Reporter())
    assert again is not None
    made = record.read(again)
    assert made.certificate is not None and "training" in made.environment  # its weights were trained in the failed run


def test_bad_input_leaves_nothing(tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'upcycle-bench\[cpu\]'"):
        run(plan("cluster-aware", quick), tmp_path, Reporter())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_with_checkpoints_goes_on(tmp_path: Path, quick: list[str], sparse: record.Record) -> None:
    """With checkpoint_every=2, interrupted in step 3 of 4; the same command finishes it with a whole run's scores."""

    class Interrupting(Reporter):
        @contextlib.contextmanager
        def bar(self, what: str, total: int) -> Iterator[OnStep]:
            def step(done: int, metrics: Any) -> None:
                if what.startswith("training") and done == 3:
                    raise KeyboardInterrupt

            yield step

    resumable = plan("sparse-upcycling", [*quick, "train.checkpoint_every=2"])
    with pytest.raises(KeyboardInterrupt):
        run(resumable, tmp_path / "parts", Interrupting(), fresh=True)  # the whole run's weights are in the cache
    assert not (tmp_path / "parts").exists()
    (work,) = (cache_root() / "runs").iterdir()
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["step2"]
    path = run(resumable, tmp_path / "parts", Reporter(), fresh=True)
    assert scores(record.read(path)) == scores(sparse)
    steps = [json.loads(line)["step"] for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert steps == [1, 4]
    assert list((cache_root() / "runs").iterdir()) == []


def test_diagnostics_of_the_dense_control_compare_with_the_checkpoint(tmp_path: Path, quick: list[str]) -> None:
    """Training must not change the checkpoint that the model is compared with."""
    trained, frozen = (record.read(run(plan(name, quick), tmp_path, Reporter())) for name in ("dense", "dense-frozen"))
    assert trained.diagnostics["feature_cosine_with_dense"]["vision"] < 0.9999
    assert frozen.diagnostics["feature_cosine_with_dense"]["vision"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("breach", "message"),
    [
        ("in place", "init_layer changed the dense FFN in place"),
        ("same module", "one module stands for several experts"),
        ("nan", "expert 0 holds values that are not finite"),
        ("note", "a note is not a finite number"),
    ],
)
def test_a_plugin_that_breaks_its_contract_is_told_in_one_line(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, breach: str, message: str
) -> None:
    def init_layer(self: Any, ffn: Any, layer: Any, calibration: Any, rng: Any) -> LayerInit:
        if breach == "in place":
            ffn.w1_HD.mul_(2)
        experts = [ffn.expert() for _ in range(8)]
        if breach == "same module":
            experts = experts[:1] * 8
        if breach == "nan":
            experts[0].c_fc.weight.data.fill_(float("nan"))
        notes = {"energy": float("inf")} if breach == "note" else {}
        return LayerInit(experts, random_router(ffn, layer, rng), notes)

    monkeypatch.setattr(Failing, "init_layer", init_layer)
    with pytest.raises(UserError, match=message) as caught:
        run(plan("failing", quick), tmp_path, Reporter())
    assert "\n" not in str(caught.value)
    (path,) = record.record_paths(tmp_path)
    assert message in (record.read(path).reason or "")


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_cluster_protocol_runs_on_local_shards_with_a_local_checkpoint(tmp_path: Path, zero_stage: int) -> None:
    """clip-b32 with bf16, patch dropout, crops and checkpoints, but with a small model, digits and three steps."""
    world = load_world("digits", 0)
    torch.save(create_clip("smoke-vit", seed=3).model.state_dict(), tmp_path / "dense.pt")
    overrides = ["model=smoke-vit", "train.schedule.steps=3", "train.schedule.batch_size=32", "train.log_every=1"]
    overrides += [f"train.zero_stage={zero_stage}", "train.checkpoint_every=2"]
    overrides += ['suites.zero-shot.sets=["digits-test", "digits-validation"]']
    overrides += ['suites.zero-shot.headlines.imagenet=["digits-test"]']
    overrides += ['suites.zero-shot.headlines.shift=["digits-validation"]']
    registry = load_registry()
    protocol = load_protocol(registry.get("protocol", "clip-b32").target, overrides)
    paths = Paths(
        data=str(world.train_shards[0].parent), checkpoint=str(tmp_path / "dense.pt"), eval_data=world.eval_root
    )
    planned = make_plan(registry, "cluster-aware", protocol, options={"pairs": "200"}, paths=paths)
    made = record.read(run(planned, tmp_path / "results", Reporter()))
    assert made.hashes.dense == file_sha256(tmp_path / "dense.pt")
    assert {name: headline.value for name, headline in made.headlines.items()} == {
        "imagenet": scores(made)["digits-test", "acc1"],
        "shift": scores(made)["digits-validation", "acc1"],
    }
    assert list(made.headlines) == ["imagenet", "shift"] and made.headlines["imagenet"].higher_is_better
    assert made.cost is not None
    assert made.cost.samples == 96


def test_an_unwritable_results_folder_is_noticed_first(tmp_path: Path, quick: list[str]) -> None:
    (tmp_path / "file").touch()
    # For root, os.access says that /proc can be written.
    for folder in (tmp_path / "file" / "results", Path("/proc/results")):
        with pytest.raises(UserError, match="not a folder that can be written"):
            run(plan("dense", quick), folder, Reporter())


def test_upcycling_does_not_replay_the_dense_models_batches(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one seed for both trainings the first batch of each is another one."""
    first: list[torch.Tensor] = []
    part = PairDataset.part

    def record_first(self: PairDataset, seed: Any, step: int, *more: Any) -> Batch:
        made = part(self, seed, step, *more)
        if step == 0:
            first.append(made.index)
        return made

    monkeypatch.setattr(PairDataset, "part", record_first)
    run(plan("dense", [*quick, "dense.seed=57"], train_seed=57), tmp_path, Reporter())
    assert len(first) == 2  # the dense model's, then that of the training under test
    assert not torch.equal(*first)
