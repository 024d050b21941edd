"""Training in stages, and experts that share parameters: against a plain PyTorch loop, and resumed bit for bit.

The strategy that has stages is SPRI; the layers that share parameters are DeRS'.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests import helpers
from tests.helpers import threads, tiny_clip, tiny_moe
from tests.test_run import plan
from tests.training.test_loop import differing, eesd, job, plain_adamw, plain_step, schedule, state
from upcycle_bench import record
from upcycle_bench import run as module
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.model.moe import moe_layers, parameter_counts
from upcycle_bench.model.surgery import merge, put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import learning_rate
from upcycle_bench.training import finished, session
from upcycle_bench.training.loop import parameter_groups, train
from upcycle_bench.util import distributed
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import PluginError, UserError
from upcycle_bench.util.progress import Reporter

STRATEGIES = {name: entry.target for name, entry in load_registry().strategies.items()}
SPRI = STRATEGIES["spri"]()


@pytest.fixture(scope="module")
def pairs() -> Iterator[PairDataset]:
    with session.open_session(threads=1), threads(1):
        yield PairDataset(load_world("digits", 0).train_shards, create_clip("smoke-vit"))


def upcycled(name: str = "spri", seed: int = 0, moe: Any = None, **options: Any) -> Clip:
    return helpers.upcycled(STRATEGIES[name](**options), tiny_clip(), seed, moe)


# ---- Stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_stages_equal_a_plain_pytorch_loop(pairs: PairDataset, zero_stage: int) -> None:
    """At step 4 of 6 the experts are merged and AdamW starts again; schedule and batches go on."""
    settings = job(load_balance=0.01, zero_stage=zero_stage, schedule=schedule(grad_clip=0.5))
    ours, plain = upcycled(), upcycled()
    train(ours, pairs, settings, stages=(4,), next_stage=SPRI.next_stage)
    model = plain.model.train()
    for step in range(6):
        if step == 4:
            merge(model)
        if step in (0, 4):
            optimizer = plain_adamw(model)
        plain_step(plain, optimizer, pairs, settings, step)
    assert differing(ours, plain) == []
    # A training without stages gives another model.
    unstaged = upcycled()
    train(unstaged, pairs, settings)
    merge(unstaged.model)
    assert differing(unstaged, ours) != []


@pytest.mark.parametrize(("boundary", "form"), [(3, "after"), (4, "on")])
def test_interrupted_at_a_boundary_and_resumed_is_bit_equal(
    pairs: PairDataset, tmp_path: Path, boundary: int, form: str
) -> None:
    """Stopped in step 6 of 7, with checkpoints every 4 steps: that of step 4 is after the boundary, or on it."""
    stages: dict[str, Any] = {"stages": (boundary,), "next_stage": SPRI.next_stage, "make_loss": eesd}
    length = {"schedule": schedule(steps=7), "stop_step": 7}
    whole = upcycled()
    train(whole, pairs, job(metrics=tmp_path / "whole.jsonl", **length), **stages)

    def interrupt(step: int, metrics: Mapping[str, float]) -> None:
        if step == 6:
            raise KeyboardInterrupt

    resumable = job(metrics=tmp_path / "run.jsonl", checkpoints=tmp_path / "checkpoints", checkpoint_every=4, **length)
    with pytest.raises(KeyboardInterrupt):
        train(upcycled(), pairs, resumable, on_step=interrupt, **stages)
    steps: list[int] = []
    resumed = upcycled(seed=5)  # its weights come from the checkpoint
    progress = train(resumed, pairs, resumable, on_step=lambda step, _: steps.append(step), **stages)
    assert (steps, progress.step) == ([5, 6, 7], 7)
    assert progress.loss_notes == eesd(moe_layers(resumed.model)).notes()
    assert helpers.equal(state(whole), state(resumed))

    def lines(name: str) -> list[dict[str, float]]:
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "samples_per_second"} for row in rows]

    assert lines("run.jsonl") == lines("whole.jsonl")
    assert [row["step"] for row in lines("whole.jsonl")] == [1, 3, 5, 7]
    assert all("eesd" in row for row in lines("whole.jsonl"))


def test_a_finished_training_is_resumed_in_its_last_form(pairs: PairDataset, tmp_path: Path) -> None:
    """This happens when only the evaluation failed."""
    resumable = job(checkpoints=tmp_path, checkpoint_every=2)
    first, again = upcycled(), upcycled(seed=5)
    for clip in (first, again):
        train(clip, pairs, resumable, stages=(2, 5), next_stage=SPRI.next_stage)
    assert helpers.equal(state(first), state(again))


@pytest.mark.parametrize("stages", [(0,), (6,), (7,), (4, 2), (2, 2)])
def test_stages_outside_the_training_are_refused(pairs: PairDataset, stages: tuple[int, ...]) -> None:
    with pytest.raises(PluginError, match="must ascend"):
        train(upcycled(), pairs, job(), stages=stages, next_stage=SPRI.next_stage)


def test_a_strategy_with_stages_needs_next_stage() -> None:
    class Forgetful(STRATEGIES["sparse-upcycling"]):  # type: ignore[misc, name-defined]
        def stages(self, steps: int) -> tuple[int, ...]:
            return (1,)

    with pytest.raises(NotImplementedError, match="has stages but no next_stage"):
        Forgetful().next_stage({})
    assert STRATEGIES["sparse-upcycling"]().stages(100) == ()


# ---- Counting -----------------------------------------------------------------------------------------------------


def test_shared_parameters_count_once() -> None:
    """Three layers of smoke-vit, D = 64, H = 256, 4 experts, top 2; R = 2."""
    dense = tiny_clip().model
    ffn = 2 * 64 * 256 + 64 + 256
    rest = sum(p.numel() for p in dense.parameters()) - 3 * ffn + 3 * 4 * 64  # routers
    delta = 2 * 2 * (64 + 256)  # two matrices, rank 2, inputs and outputs
    model = upcycled("ders-lm", rank=2).model
    assert parameter_counts(model) == (rest + 3 * (ffn + 4 * delta), rest + 3 * (ffn + 2 * delta))
    merge(model)
    assert parameter_counts(model) == (rest + 3 * 4 * ffn, rest + 3 * 2 * ffn)


def test_experts_of_other_ranks_are_counted() -> None:
    """One rank of two holds half of the experts; here one process is made to look like it."""
    model = upcycled("sparse-upcycling").model
    expected = parameter_counts(model)
    for layer in moe_layers(model).values():
        layer.moe.deepspeed_moe.experts.deepspeed_experts = layer.experts[:2]
        layer.moe.ep_size = 2
    assert parameter_counts(model) == expected


def test_a_record_counts_the_trained_form_and_reuse_does_too(tmp_path: Path, quick: list[str]) -> None:
    planned = plan("ders-lm", quick, train_seed=50)
    first, again = (record.read(module.run(planned, tmp_path / each, Reporter()) or Path()) for each in "12")
    assert "training" in again.environment and "training" not in first.environment  # merged experts can be rebuilt
    expected = parameter_counts(upcycled("ders-lm", moe=tiny_moe(experts=8)).model)
    for made in (first, again):
        assert made.cost is not None
        assert (made.cost.parameters_total, made.cost.parameters_active) == expected
    assert again.scores == first.scores
    assert first.receipt is not None
    layers: Any = first.receipt["layers"]
    assert [layer["expert_cosine"] for layer in layers.values()] == pytest.approx([1] * 3)  # of merged experts
    # A file of an older version has no counts; it can still be read.
    (kept,) = (
        p
        for p in (cache_root() / "trained").glob("*.json")
        if json.loads(p.read_text())["weights"] == first.hashes.weights
    )
    facts = json.loads(kept.read_text())
    assert facts.pop("parameters") == list(expected)
    assert finished.Trained.model_validate_json(json.dumps(facts)).parameters is None


# ---- Expert parallelism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ders-lm", "ders-sm"])
def test_shared_parameters_and_expert_parallelism_are_refused_in_one_line(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(distributed, "check_world", lambda batch_size, ep_size: None)  # as with two processes
    with pytest.raises(UserError, match=r"^ders-..: its experts share .* moe\.ep_size=1\.$") as error:
        module.run(plan(name, [*quick, "moe.ep_size=2"]), tmp_path, Reporter())
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_that_does_not_say_it_shares_is_refused_too() -> None:
    dense = tiny_clip()
    made = helpers.initialise(STRATEGIES["ders-lm"](), dense, 0)
    with pytest.raises(PluginError, match=r"share parameters, which needs moe\.ep_size=1"):
        put_experts(dense.model, made.inits, tiny_moe(ep_size=2))


# ---- DeepSpeed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ders-lm", "ders-sm"])
def test_a_shared_base_is_one_parameter_everywhere(name: str) -> None:
    """It stands in one optimiser group, with DeepSpeed's marks and weight decay."""
    model = upcycled(name).model
    groups = parameter_groups(model, 0.2)
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    for layer in moe_layers(model).values():
        base: Any = {expert.base for expert in layer.experts}
        assert len(base) == 1
        weight = next(iter(base)).c_fc.weight
        (group,) = (group for group in groups if any(p is weight for p in group["params"]))
        assert (group["moe"], group["weight_decay"], weight.allreduce) == (True, 0.2, False)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Matrices do, and so do the sparse values of `ders-sm`, which are entries of one."""
    return parameter.ndim >= 2 or name.endswith("value_S")


@pytest.mark.parametrize("name", ["ders-lm", "ders-sm", "spri"])
def test_differences_to_a_matrix_decay_as_the_matrix_does(name: str) -> None:
    """Biases do not. A copied or loaded model has the same groups: the class says it, not the parameter."""
    model = upcycled(name).model
    for each in (model, copy.deepcopy(model)):
        each.load_state_dict(model.state_dict())
        groups = parameter_groups(each, 0.2)
        decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
        trained = {key: p for key, p in each.named_parameters() if p.requires_grad}
        assert {key: decay[p] for key, p in trained.items()} == {
            key: 0.2 * decays(key, p) for key, p in trained.items()
        }
    assert any("value_S" in key for key in trained) == (name == "ders-sm")


@pytest.mark.parametrize(("name", "zero_stage"), [("ders-lm", 0), ("ders-sm", 0), ("ders-sm", 1)])
def test_a_shared_base_trains_as_in_a_plain_loop(pairs: PairDataset, name: str, zero_stage: int) -> None:
    """Gradients are clipped: the base's gradient counts once in the norm."""
    settings = job(zero_stage=zero_stage, schedule=schedule(grad_clip=0.1, eps=1e-3))
    ours, plain = upcycled(name), upcycled(name)
    train(ours, pairs, settings)
    model = plain.model.train()
    groups = [
        {"params": [p for n, p in model.named_parameters() if decays(n, p) == matrix], "weight_decay": 0.2 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-3)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, 1e-3, 0.02)
        batch = pairs.batch(settings.stream, step, 32)
        image, text, scale = model(plain.normalise(batch.images), batch.texts)[:3]
        logits = scale * image @ text.T
        optimizer.zero_grad()
        ((F.cross_entropy(logits, torch.arange(32)) + F.cross_entropy(logits.T, torch.arange(32))) / 2).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
        optimizer.step()
    before = upcycled(name).model.state_dict()
    for key, value in state(plain).items():
        assert torch.allclose(ours.model.state_dict()[key], value, rtol=0, atol=1e-6), key
    moved = [
        key
        for key, value in state(ours).items()
        if key.endswith("base.c_fc.weight") and not torch.equal(value, before[key])
    ]
    assert len(moved) == 3 * 4
