"""Receipts without training: the command gives what a run's record says of step 0."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_run import plan
from upcycle_bench import record
from upcycle_bench.cli.receipt import show
from upcycle_bench.receipts import receipts
from upcycle_bench.run import run
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter


def test_it_is_the_receipt_of_a_run(tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = ("dense", "cluster-only", "sparse-upcycling")
    made = receipts([plan(name, quick, init_seed=3) for name in names], Reporter())
    assert [each.plan.label for each in made] == list(names)
    ran = record.read(run(plan("cluster-only", quick, init_seed=3), tmp_path, Reporter()))
    assert ran.receipt == made[1].receipt
    assert set(ran.receipt) <= set(ran.diagnostics)  # after training by the same function
    assert ran.receipt != ran.diagnostics
    assert [list(each.phases) for each in made] == [[], ["calibrate", "upcycle"], ["upcycle"]]
    assert list(ran.cost.phases) == ["calibrate", "upcycle", "train", "validate", "evaluate"]
    assert all(phase.seconds > 0 for each in made for phase in each.phases.values())

    show(made, as_json=True)
    rows = json.loads(capsys.readouterr().out)["receipts"]
    assert [row["strategy"] for row in rows] == list(names)
    assert rows[1]["receipt"] == ran.receipt
    assert rows[1]["seeds"] == {"init": 3}
    show(made, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, tables in (("dense", 2), ("cluster-only", 3), ("sparse-upcycling", 3)):
        assert sum(line.split()[:1] == [name] for line in lines) == tables


def test_a_control_has_the_part_that_needs_no_experts(quick: list[str]) -> None:
    (made,) = receipts([plan("dense-frozen", quick)], Reporter())
    assert made.receipt["layers"] == {}
    assert made.receipt["feature_drift"] == {"vision": 0.0, "text": 0.0}
    pairs = made.receipt["training_pair_retrieval"]
    assert pairs["model"] == pairs["dense"]
    assert pairs["pairs"] == 256


def test_errors_are_those_of_a_run(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan("dense", quick)

    def missing(*_: Any) -> None:
        raise AssertionError("something was made")

    monkeypatch.setattr("upcycle_bench.receipts.load_dense", missing)
    with pytest.raises(UserError, match="protocol smoke needs --data"):
        receipts([replace(planned, missing=("--data",))], Reporter())
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss is not installed"):
        receipts([planned, plan("cluster-only", quick)], Reporter())


def test_terms_of_the_loss_are_shared_out_in_the_record(tmp_path: Path, quick: list[str]) -> None:
    settings = [*quick, "train.log_every=1"]
    path = run(plan("eesd-only", settings), tmp_path, Reporter())
    shares: Any = record.read(path).diagnostics["loss_shares_at_start"]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert shares["steps"] == len(lines) == 4
    for term in ("contrastive", "load_balance", "eesd"):
        by_hand = torch.tensor([line[term] / line["loss"] for line in lines]).mean()
        assert shares[term] == pytest.approx(float(by_hand), rel=1e-4, abs=1e-9)
    assert shares["eesd"] > 0
