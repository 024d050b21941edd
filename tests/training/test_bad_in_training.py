"""Bad samples while a training goes on: counted over sessions and ranks, told once, judged by all ranks alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.data.test_bad_samples import DAMAGE, PAIRS, shard
from tests.ranks import launch
from tests.training.test_loop import job, state
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model.clip import create_clip
from upcycle_bench.protocol import Data
from upcycle_bench.training.loop import train
from upcycle_bench.util.errors import UserError


def open_pairs(tmp_path: Path, told: list[int], bound: float = 0.2) -> PairDataset:
    path = shard(tmp_path / "0.tar", {7: DAMAGE["zeros"][:2], 9: DAMAGE["a truncated JPEG"][:2]})
    settings = Data(world="local", seed=0, bad_samples=bound)
    return PairDataset(
        [path],
        create_clip("smoke-vit"),
        keep_decoded=False,
        settings=settings,
        on_bad=lambda bad: told.extend(each.number for each in bad),
    )


@pytest.mark.usefixtures("session")
def test_counts_go_on_with_a_resumed_training(tmp_path: Path) -> None:
    """Six steps of 32 of 40 pairs, stopped in step 5; the checkpoint of step 4 holds the counts of four steps."""
    told: list[int] = []
    pairs = open_pairs(tmp_path, told)
    whole = create_clip("smoke-vit", seed=1)
    expected = train(whole, pairs, job(metrics=tmp_path / "whole.jsonl"))
    assert sorted(told) == [7, 9]  # each once, however often it was met
    assert sum(expected.bad_samples.values()) >= 6 and expected.first_bad["no image (zeros)"] == "0.tar: 00007"

    def interrupt(step: int, metrics: Mapping[str, float]) -> None:
        if step == 5:
            raise KeyboardInterrupt

    resumable = job(metrics=tmp_path / "run.jsonl", checkpoints=tmp_path / "checkpoints", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(create_clip("smoke-vit", seed=1), pairs, resumable, on_step=interrupt)
    resumed = create_clip("smoke-vit", seed=2)
    progress = train(resumed, pairs, resumable)
    assert (progress.bad_samples, progress.first_bad) == (expected.bad_samples, expected.first_bad)
    assert all(value.equal(resumed.model.state_dict()[key]) for key, value in state(whole).items())
    last = [json.loads((tmp_path / name).read_text().splitlines()[-1]) for name in ("run.jsonl", "whole.jsonl")]
    assert last[0]["bad_samples"] == last[1]["bad_samples"] == sum(expected.bad_samples.values())


@pytest.mark.usefixtures("session")
def test_too_many_end_the_training_at_a_logged_step(tmp_path: Path) -> None:
    steps: list[int] = []
    with pytest.raises(
        UserError, match=r"^the training set: \d of 32 samples are bad, more than data\.bad_samples=0\.01"
    ):
        train(
            create_clip("smoke-vit"), open_pairs(tmp_path, [], 0.01), job(), on_step=lambda step, _: steps.append(step)
        )
    assert steps == [] and PAIRS == 40


def test_two_ranks_count_together_and_end_together(tmp_path: Path) -> None:
    launch(2, "-m", "tests.training.bad_worker", str(tmp_path / "facts.json"))
    main, other = json.loads((tmp_path / "facts.json").read_text())
    kinds = {"truncated image": 1, "not UTF-8": 2}
    assert main["kinds"] == other["kinds"] == kinds
    assert main["first"] == other["first"] == {"truncated image": "0.tar: a", "not UTF-8": "0.tar: b"}
    assert (main["told"], other["told"]) == ([7, 0, 1], [])
    assert main["then told"] == [7, 0, 1]  # 7 was told before
    assert main["error"] == other["error"] == "4 of 64 are bad"
