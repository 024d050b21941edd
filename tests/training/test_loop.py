"""The training loop: against a plain PyTorch loop, resumed bit for bit, independent of what strategies draw."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import threads
from upcycle_bench.data.batches import Batch
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.ffn import FFN
from upcycle_bench.model.moe import moe_layers
from upcycle_bench.model.surgery import find_layers, put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import Schedule, learning_rate, load_protocol
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training import bookkeeping
from upcycle_bench.training.bookkeeping import Bookkeeping
from upcycle_bench.training.checkpoint import MetricsFile
from upcycle_bench.training.job import Job, Progress
from upcycle_bench.training.loop import parameter_groups, train
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.rng import Stream

REGISTRY = load_registry()
PROTOCOL = load_protocol(REGISTRY.protocols["smoke"].target)
pytestmark = pytest.mark.usefixtures("session")


def schedule(**changes: Any) -> Schedule:
    return PROTOCOL.train.schedule.model_copy(update={"steps": 6, "batch_size": 32, **changes})


def job(**changes: Any) -> Job:
    return Job(**{"schedule": schedule(), "peak_lr": 1e-3, "stop_step": 6, "seed": 0, "log_every": 2, **changes})


def upcycled(seed: int = 0) -> Clip:
    clip = create_clip("smoke-vit", seed=seed)
    strategy = REGISTRY.strategies["sparse-upcycling"].target()
    inits = {}
    for layer in find_layers(clip.model, PROTOCOL.moe):
        ffn = FFN.of(clip.model.get_submodule(layer.mlp_path))
        inits[layer.name] = strategy.init_layer(ffn, layer, None, Stream(("test", layer.name)))
    return replace(clip, model=put_experts(clip.model, inits, PROTOCOL.moe))


def eesd(layers: Mapping[str, Any]) -> Any:
    """Copies are distilled to rounding alone, which Adam turns into steps: a plain sum keeps it as small as it is."""
    strategy = REGISTRY.strategies["cluster-aware"].target(eesd_ema=0.9, eesd_feature_reduction="sum")
    return strategy.loss(layers, Stream(("loss",)), 6)


def state(clip: Clip) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in clip.model.state_dict().items()}


def plain_adamw(model: Any) -> torch.optim.AdamW:
    """The recipe's optimiser, written out: decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.2},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)


def plain_step(clip: Clip, optimizer: torch.optim.Optimizer, pairs: PairDataset, settings: Job, step: int) -> None:
    """A step of `job()` written out: learning rate, both losses, clipping at 0.5."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, 6, 1e-3, 0.02)
    batch = pairs.batch(settings.stream, step, 32)
    image_BC, text_BC, scale = clip.model(clip.normalise(batch.images), batch.texts)[:3]
    logits_BB = scale * image_BC @ text_BC.T
    task = (F.cross_entropy(logits_BB, torch.arange(32)) + F.cross_entropy(logits_BB.T, torch.arange(32))) / 2
    balance = sum(layer.l_aux for layer in moe_layers(clip.model).values())
    optimizer.zero_grad()
    (task + 0.01 * balance).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
    optimizer.step()


def differing(one: Clip, other: Clip) -> list[str]:
    """Names of tensors in which two trainings differ by more than rounding, or that one of them lacks.

    Adam divides by the root of the second moment, so rounding of tiny gradients becomes whole steps.
    """
    ours, theirs = state(one), state(other)
    shared = [key for key in ours if key in theirs]
    far = [key for key in shared if not torch.allclose(ours[key], theirs[key], rtol=1e-3, atol=2e-4)]
    return far + sorted(ours.keys() ^ theirs.keys())


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_engine_equals_a_plain_pytorch_loop(pairs: PairDataset, zero_stage: int) -> None:
    """The whole recipe written out: schedule, AdamW, decay on matrices only, clipping, both losses, the clamp."""
    settings = job(load_balance=0.01, zero_stage=zero_stage, schedule=schedule(grad_clip=0.5))
    ours, plain = upcycled(), upcycled()
    train(ours, pairs, settings)
    model = plain.model.train()
    optimizer = plain_adamw(model)
    for step in range(6):
        plain_step(plain, optimizer, pairs, settings, step)
    assert differing(ours, plain) == []


def test_training_learns(pairs: PairDataset) -> None:
    clip = create_clip("smoke-vit", seed=1)
    progress = train(clip, pairs, job(schedule=schedule(steps=80), stop_step=80, log_every=79))
    assert progress.last["loss"] < 3.0  # ln 32 = 3.47 at the start
    assert progress.step == 80
    assert progress.counted_flops > 0


def test_same_seed_same_weights_other_seed_other_weights(pairs: PairDataset) -> None:
    first, again, other = upcycled(), upcycled(), upcycled()
    train(first, pairs, job())
    train(again, pairs, job())
    train(other, pairs, job(seed=1))
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in state(first).items())
    assert not torch.equal(first.model.logit_scale, other.model.logit_scale)


class _Greedy(ExtraLoss):
    """A loss that draws 1,000 numbers a step from the global generator and changes nothing."""

    name = "greedy"

    def compute(self) -> torch.Tensor:
        torch.rand(1000)
        return torch.zeros(())

    def after_step(self) -> None:
        torch.rand(1000)

    def close(self) -> None:
        pass


def test_a_strategy_that_draws_more_sees_the_same_batches(pairs: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch dropout draws from torch's global generator; still batches and weights must stay the same."""
    seen: list[list[torch.Tensor]] = []
    part = PairDataset.part

    def record(self: PairDataset, *arguments: Any) -> Batch:
        made = part(self, *arguments)
        seen[-1].append(torch.cat([made.index, made.texts.flatten()]))
        return made

    monkeypatch.setattr(PairDataset, "part", record)
    weights = []
    for make_loss in (lambda layers: None, lambda layers: _Greedy()):
        seen.append([])
        clip = create_clip("smoke-vit", seed=0, patch_dropout=0.5)
        torch.rand(len(seen) * 100)  # the generator's state before training does not matter either
        train(clip, pairs, job(), make_loss=make_loss)
        weights.append(state(clip))
    assert len(seen[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_interrupted_and_resumed_is_bit_equal(pairs: PairDataset, tmp_path: Path) -> None:
    """With checkpoints every 2 steps, stopped by Ctrl-C in step 5 of 6; the second session starts after step 4."""
    whole = upcycled()
    train(whole, pairs, job(metrics=tmp_path / "whole.jsonl"), make_loss=eesd)

    def interrupt(step: int, metrics: Mapping[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    resumable = job(metrics=tmp_path / "run.jsonl", checkpoints=tmp_path / "checkpoints", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(upcycled(), pairs, resumable, make_loss=eesd, on_step=interrupt)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step2", "step4"]
    steps: list[int] = []
    resumed = upcycled(seed=5)  # its weights come from the checkpoint
    progress = train(resumed, pairs, resumable, make_loss=eesd, on_step=lambda step, _: steps.append(step))
    assert steps == [5, 6]
    assert progress.step == 6
    assert all(torch.equal(value, resumed.model.state_dict()[key]) for key, value in state(whole).items())

    def lines(name: str) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "samples_per_second"} for row in rows]

    assert lines("run.jsonl") == lines("whole.jsonl")
    assert [row["step"] for row in lines("whole.jsonl")] == [1, 3, 5, 6]


def test_metrics_hold_every_term(pairs: PairDataset, tmp_path: Path) -> None:
    progress = train(upcycled(), pairs, job(metrics=tmp_path / "m.jsonl", load_balance=0.01), make_loss=eesd)
    row = json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])
    layers = row.pop("layers")
    assert row == progress.last
    assert list(layers) == ["vision.1", "vision.3", "text.1"]
    assert all(sum(layer["load"]) == pytest.approx(1, abs=1e-4) for layer in layers.values())
    assert all(layer["relative_compactness"] > 0 for layer in layers.values())
    assert row["loss"] == pytest.approx(row["contrastive"] + row["load_balance"] + row["eesd"], rel=1e-6)
    assert 0.01 * 3 * 0.9 < row["load_balance"] < 0.01 * 3 * 2  # three layers, each near 1
    assert row["learning_rate"] == pytest.approx(1e-3 * 1 / 6)
    assert 0 <= row["tokens_dropped"] < 1


def test_a_loss_that_is_not_finite_stops_the_run(pairs: PairDataset) -> None:
    clip = create_clip("smoke-vit", seed=0)
    with torch.no_grad():
        clip.model.text_projection.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        train(clip, pairs, job())


def test_bf16_autocast_keeps_float32_weights(pairs: PairDataset) -> None:
    clip = upcycled()
    progress = train(clip, pairs, job(schedule=schedule(precision="bf16")))
    assert {value.dtype for value in clip.model.state_dict().values()} == {torch.float32}
    reference = train(upcycled(), pairs, job())
    assert progress.last["loss"] == pytest.approx(reference.last["loss"], rel=0.02)
    assert progress.last["loss"] != reference.last["loss"]


def test_weight_decay_on_matrices_only() -> None:
    clip = upcycled()
    groups = parameter_groups(clip.model, 0.2)
    assert sum(len(group["params"]) for group in groups) == len(list(clip.model.parameters()))
    for group in groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.2) for p in group["params"])
    routers = {id(layer.router_weight) for layer in moe_layers(clip.model).values()}
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert routers <= decayed


def test_the_data_set_must_fill_a_batch(pairs: PairDataset) -> None:
    with pytest.raises(UserError, match="1079 pairs, fewer than one batch of 2000"):
        train(create_clip("smoke-vit"), pairs, job(schedule=schedule(batch_size=2000)))


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_logit_scale_is_clamped_and_trains_on_from_its_limit(pairs: PairDataset, zero_stage: int) -> None:
    """It starts 1 above the limit; without the clamp, six steps of 1e-3 could not lower it that far.

    Each step lowers it further. A master copy that was not clamped would set it to the limit again.
    """
    clip = create_clip("smoke-vit", seed=0)
    limit = clip.model.logit_scale.item() - 1
    train(clip, pairs, job(schedule=schedule(logit_scale_max=limit), zero_stage=zero_stage))
    assert limit - 6e-3 < clip.model.logit_scale.item() < limit - 1e-3


def test_a_resumed_training_keeps_each_line_of_metrics_once(pairs: PairDataset, tmp_path: Path) -> None:
    """The line of the checkpoint's own step stays; those of the steps after it are written again."""

    def interrupt(step: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    path = tmp_path / "metrics.jsonl"
    settings = job(stop_step=4, log_every=1, metrics=path, checkpoints=tmp_path / "checkpoints", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(create_clip("smoke-vit"), pairs, settings, on_step=interrupt)
    before = path.read_text().splitlines()
    train(create_clip("smoke-vit"), pairs, settings)
    after = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in before] == [1, 2, 3]
    assert [json.loads(line)["step"] for line in after] == [1, 2, 3, 4]
    assert after[:2] == before[:2]


def test_steps_whose_flops_are_counted_are_no_part_of_the_throughput(pairs: PairDataset) -> None:
    progress = train(create_clip("smoke-vit"), pairs, job(schedule=schedule(steps=8), stop_step=8))
    assert progress.counted_steps == 4  # of 8: 0, 2, 4, 6
    assert 0 < progress.counted_seconds < progress.seconds
    plain = 4 * 32 / (progress.seconds - progress.counted_seconds)
    assert progress.samples_per_second(32) == pytest.approx(plain)
    assert progress.last["samples_per_second"] == pytest.approx(plain)


def test_the_seconds_of_earlier_sessions_count(pairs: PairDataset) -> None:
    books = Bookkeeping(job(), {}, MetricsFile(None, 3), pairs)
    books.begin(Progress(step=3, seconds=1000.0))
    books.count_step({"contrastive": torch.ones(())})
    assert 1000 < books.progress.seconds < 1060
    assert books.progress.step == 4


def test_two_threads_give_the_same_weights_twice(pairs: PairDataset) -> None:
    """No gradient is added up in an order that threads leave to chance: captions share positions and experts rows."""
    made = []
    for _ in range(3):
        clip = upcycled()
        with threads(2):
            train(clip, pairs, job(schedule=schedule(batch_size=256, precision="bf16"), stop_step=3), make_loss=eesd)
        made.append(state(clip))
    assert all(torch.equal(value, other[key]) for other in made[1:] for key, value in made[0].items())


class _Drawn:
    """An energy counter that draws 10 J between two readings."""

    def __init__(self, device: torch.device) -> None:
        self.drawn = 0.0

    def joules(self) -> float | None:
        self.drawn += 10
        return self.drawn


class _Silent(_Drawn):
    def joules(self) -> float | None:
        return None


def test_energy_is_added_up_over_sessions(monkeypatch: pytest.MonkeyPatch, pairs: PairDataset) -> None:
    monkeypatch.setattr(bookkeeping, "EnergyCounter", _Drawn)

    def after(progress: Progress) -> float | None:
        books = Bookkeeping(job(), {}, MetricsFile(None, 0), pairs)
        books.begin(progress)
        books.collect()
        books.collect()
        return books.progress.joules

    assert after(Progress()) == 20
    assert after(Progress(step=3, joules=100.0)) == 120
    assert after(Progress(step=3)) is None  # an earlier session did not report it
    monkeypatch.setattr(bookkeeping, "EnergyCounter", _Silent)
    assert after(Progress()) is None
    assert after(Progress(step=3, joules=100.0)) is None
