"""Curves of held-out pairs: the score against a plain loop, and a training that does not notice it."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.training.test_loop import eesd, job, schedule, state, upcycled
from upcycle_bench.data import evalset as evalsets
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.data.worlds import load_world
from upcycle_bench.evaluation.held_out import HeldOutPairs, held_out_pairs
from upcycle_bench.model.clip import Clip, create_clip
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import Validation, load_protocol
from upcycle_bench.strategy import ExtraLoss
from upcycle_bench.training.job import Curve
from upcycle_bench.training.loop import train
from upcycle_bench.util.errors import DivergedError
from upcycle_bench.util.flops import FlopCounter

PROTOCOLS = load_registry().protocols
pytestmark = pytest.mark.usefixtures("session")


def held_out(clip: Clip, every: int = 2, pairs: int = 1024) -> HeldOutPairs:
    wanted = Validation(set="digits-retrieval", pairs=pairs, every=every)
    made = held_out_pairs(wanted, clip, load_world("digits", 0).eval_root, "fp32")
    assert made is not None
    return made


def plainly(clip: Clip, numbers: list[int]) -> tuple[float, float]:
    """The score of these pairs, and that of guessing, by loops over all pairs of pairs."""
    samples = list(evalsets.samples(load_world("digits", 0).eval_root / "digits-retrieval"))
    chosen = [samples[number] for number in numbers]
    captions = [sample.label[0] for sample in chosen]
    clip.model.eval()
    with torch.no_grad():
        image_NC = F.normalize(clip.model.encode_image(torch.stack([clip.transform(s.image()) for s in chosen])), dim=1)
        text_NC = F.normalize(clip.model.encode_text(clip.tokenize(captions)), dim=1)
    clip.model.train()
    cosine_NN, log_ranks, guesses = image_NC.double() @ text_NC.double().T, [], []
    for table_NN in (cosine_NN, cosine_NN.T):
        for row, caption in enumerate(captions):
            right = [column for column, other in enumerate(captions) if other == caption]
            best = max(float(table_NN[row, column]) for column in right)
            log_ranks.append(math.log(1 + sum(float(value) > best for value in table_NN[row])))
    for caption in captions:  # the expected logarithm of the first right answer's place in a random order
        right = captions.count(caption)
        left, wrong = 1.0, len(captions) - right
        for place in range(1, wrong + 2):
            first_here = right / (len(captions) - place + 1)
            guesses.append(left * first_here * math.log(place) / len(captions))
            left *= 1 - first_here
    return sum(log_ranks) / len(log_ranks), sum(guesses)


def test_the_score_is_the_mean_log_rank_of_both_ways() -> None:
    clip = upcycled()
    clip.model.train()
    made = held_out(clip)
    score, chance = plainly(clip, list(range(30)))
    assert made.score(clip) == pytest.approx(score, abs=1e-9)
    assert 0.3 < score < chance
    assert made.curve() == Curve(made.identity, "digits-retrieval", 30, 2, pytest.approx(chance))
    assert clip.model.training


def test_pairs_are_evenly_spaced_and_another_choice_is_another_curve() -> None:
    clip = upcycled()
    some = held_out(clip, pairs=7)
    assert some.score(clip) == pytest.approx(plainly(clip, [0, 4, 8, 12, 17, 21, 25])[0], abs=1e-9)
    assert some.pairs == 7
    assert len({some.identity, held_out(clip).identity, held_out(clip, pairs=8).identity}) == 3
    assert held_out(clip, every=5).identity != held_out(clip).identity


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_training_does_not_notice_it(pairs: PairDataset, zero_stage: int) -> None:
    """Patch dropout, sampled second experts, a loss with hooks on the layers: the same bits, and the same counts."""
    settings = job(zero_stage=zero_stage, schedule=schedule(precision="bf16"), load_balance=0.01)
    made, told = [], []
    for scored in (False, True):
        torch.manual_seed(3)
        clip = upcycled()
        for module in clip.model.modules():
            if hasattr(module, "second_expert_sampling"):
                module.second_expert_sampling = True
        asked = replace(settings, held_out=held_out(clip, every=1)) if scored else settings
        told.append(train(clip, pairs, asked, make_loss=eesd))
        made.append(state(clip))
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())
    assert (told[0].dropped, told[0].routed, told[0].loss_shares) == (
        told[1].dropped,
        told[1].routed,
        told[1].loss_shares,
    )
    assert told[0].counted_flops == told[1].counted_flops
    curve = told[1].curve
    assert told[0].curve is None
    assert curve is not None
    assert [step for step, _ in curve.points] == [0, 1, 2, 3, 4, 5, 6]
    assert curve.seconds > 0
    assert curve.flops > 0


class _Naive(ExtraLoss):
    """An outsider's loss, whose hooks do not ask whether the model trains."""

    name = "naive"

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.terms: list[torch.Tensor] = []
        self.calls = 0
        self.layer = next(iter(layers.values()))
        self.handles = [
            self.layer.moe.register_forward_hook(
                lambda module, args, output: self.terms.append(output[0].square().mean())
            ),
            self.layer.moe.register_forward_pre_hook(self._count, with_kwargs=True),
        ]

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def compute(self) -> torch.Tensor:
        terms, self.terms = self.terms, []
        assert len(terms) == 1
        return terms[0] * self.calls

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def test_hooks_of_a_loss_do_not_see_it(pairs: PairDataset) -> None:
    made = []
    for scored in (False, True):
        clip, losses = upcycled(), []
        settings = job(held_out=held_out(clip, every=1)) if scored else job()
        train(clip, pairs, settings, make_loss=lambda layers, losses=losses: losses.append(_Naive(layers)) or losses[0])
        made.append(state(clip))
        assert losses[0].calls == 6
        assert not losses[0].layer.moe._forward_hooks
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())


def test_the_curve_has_the_start_and_the_end_and_its_cost_is_kept_apart(
    pairs: PairDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that takes 1,000 seconds by the clock, and multiplies two matrices."""
    clip, clock, late = create_clip("smoke-vit"), time.perf_counter, [0.0]
    made = held_out(clip, every=4)
    before, score = made.score(clip), made.score

    def slowly(model: Clip) -> float:
        late[0] += 1000
        torch.zeros(700, 600) @ torch.zeros(600, 500)
        return score(model)

    monkeypatch.setattr(made, "score", slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    progress = train(clip, pairs, job(held_out=made))
    curve = progress.curve
    assert curve is not None
    assert [step for step, _ in curve.points] == [0, 4, 6]
    assert [curve.points[0][1], curve.points[-1][1]] == [before, score(clip)]
    assert curve.seconds > 3000
    assert 0 < progress.seconds < 1000
    assert progress.samples_per_second(32) > 6 * 32 / 1000
    alone = held_out(clip)
    with FlopCounter() as counter:
        alone.score(clip)
    assert curve.flops == 3 * (2 * 700 * 600 * 500 + counter.get_total_flops())


def test_a_resumed_training_has_the_same_curve(pairs: PairDataset, tmp_path: Path) -> None:
    def interrupt(step: int, metrics: Mapping[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    def settings(clip: Clip, **more: Any) -> Any:
        return job(held_out=held_out(clip, every=2), **more)

    clip = upcycled()
    whole = train(clip, pairs, settings(clip))
    resumable = {"checkpoints": tmp_path / "checkpoints", "checkpoint_every": 2}
    clip = upcycled()
    with pytest.raises(KeyboardInterrupt):
        train(clip, pairs, settings(clip, **resumable), on_step=interrupt)
    clip = upcycled(seed=5)
    resumed = train(clip, pairs, settings(clip, **resumable))
    assert whole.curve is not None
    assert resumed.curve is not None
    assert resumed.curve.points == whole.curve.points
    assert resumed.curve.flops == whole.curve.flops
    # Of other pairs a new curve begins, where the training is then.
    clip = upcycled(seed=5)
    other = job(stop_step=6, held_out=held_out(clip, every=1, pairs=9), **resumable)
    again = train(clip, pairs, other)
    assert again.curve is not None
    assert [step for step, _ in again.curve.points] == [6]
    assert again.curve.flops > whole.curve.flops  # what the first curve cost stays charged


def test_a_model_whose_embeddings_are_not_finite_is_told() -> None:
    clip = create_clip("smoke-vit")
    with torch.no_grad():
        clip.model.visual.proj.fill_(float("nan"))
    with pytest.raises(DivergedError, match="embeddings of digits-retrieval are not finite: the training has diverged"):
        held_out(clip).score(clip)
    assert clip.model.training  # as it was


def test_a_set_that_cannot_be_used_costs_the_curve_and_a_line_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, root = create_clip("smoke-vit"), load_world("digits", 0).eval_root

    def asked(name: str, pairs: int = 8, root: Path = root, **more: Any) -> str:
        assert held_out_pairs(Validation(set=name, pairs=pairs, every=2), clip, root, "fp32", **more) is None
        return capsys.readouterr().err

    assert (
        asked("coco", root=tmp_path) == f"no curve of held-out pairs: there is no evaluation set coco in {tmp_path}\n"
    )
    assert "validation.set: digits-test is a classification set; it must be a retrieval set." in asked("digits-test")
    left_out = asked("digits-retrieval", left_out={"digits-retrieval"})
    assert left_out == "no curve of held-out pairs: evaluation set digits-retrieval is left out\n"
    shutil.copytree(root / "digits-retrieval", tmp_path / "cut")
    shard = tmp_path / "cut" / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    assert asked("cut", root=tmp_path).startswith("no curve of held-out pairs: ")


def test_without_a_wish_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    clip, root = create_clip("smoke-vit"), load_world("digits", 0).eval_root
    assert held_out_pairs(None, clip, root, "fp32") is None
    assert held_out_pairs(Validation(set="digits-retrieval", pairs=8, every=0), clip, root, "fp32") is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_it_costs_at_most_two_percent_of_the_training(name: str) -> None:
    """A forward pass is a third of a step's FLOPs; without patch dropout it sees twice as many patches."""
    protocol = load_protocol(PROTOCOLS[name].target)
    found, train_settings = protocol.validation, protocol.train.schedule
    assert found is not None
    scores = 1 + -(-train_settings.steps // found.every)
    pairs = min(found.pairs, 30) if name.startswith("smoke") else found.pairs
    forward = pairs / (1 - train_settings.patch_dropout)
    assert scores * forward / (3 * train_settings.steps * train_settings.batch_size) < 0.02
