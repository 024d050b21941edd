"""A training begins on two ranks with expert parallelism, goes on on one without, and ends on two."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import launch
from tests.training import other_ranks_worker as worker
from upcycle_bench.model import weights
from upcycle_bench.training import session
from upcycle_bench.training.loop import train
from upcycle_bench.training.stopping import Stopped, stoppable


def test_a_training_goes_on_on_other_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The weights are those of one uninterrupted rank to rounding, and each step has its line of metrics once."""
    checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    launch(2, "-m", "tests.training.other_ranks_worker", "begin", str(checkpoints))
    with session.open_session(threads=1):
        settings = worker.job(checkpoints=checkpoints, metrics=metrics)
        with pytest.raises(Stopped), stoppable():
            train(worker.upcycled(1, 1), worker.pairs(), settings, make_loss=worker.eesd, on_step=worker.stopping_at(4))
        said = capfd.readouterr().err
        assert "goes on from step 2" in said
        assert "since then ranks 1 (before: 2), ep_size 1 (before: 2): bits of the weights may differ" in said
        whole = worker.upcycled(1)
        train(whole, worker.pairs(), worker.job(metrics=tmp_path / "whole.jsonl"), make_loss=worker.eesd)
        name = weights.save(whole, worker.moe(1), tmp_path)
    launch(2, "-m", "tests.training.other_ranks_worker", "end", str(checkpoints))
    ours = load_file(checkpoints / f"{(checkpoints / 'weights').read_text()}.safetensors")
    theirs = load_file(tmp_path / f"{name}.safetensors")
    assert ours.keys() == theirs.keys()
    wrong = [key for key, value in theirs.items() if not torch.allclose(ours[key], value, rtol=0, atol=1e-6)]
    assert wrong == []
    mine, expected = (
        [json.loads(x) for x in path.read_text().splitlines()] for path in (metrics, tmp_path / "whole.jsonl")
    )
    assert [row["step"] for row in mine] == [3, 4]
    assert [row["loss"] for row in mine] == pytest.approx([row["loss"] for row in expected[2:4]], abs=1e-5)
    progress = json.loads((checkpoints / "step4" / "manifest.json").read_text())["progress"]
    assert [(each["world_size"], each["ep_size"]) for each in progress["sessions"]] == [(2, 2), (1, 1)]
