"""`bench/`: what is compared computes the same, in turns, and is reported as measured. Nothing is timed here."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench import initialisation, layers, pipeline, probing, steps, training
from tests.bench.report import KEYS, markdown, put_into, write_json
from tests.bench.rows import MEASURES, Row, Settings
from tests.bench.timing import Sample, interleave, ratio_row, seconds_row
from tests.moe_helpers import assert_gradients, relative_error
from upcycle_bench.model.clip import create_clip
from upcycle_bench.training import session
from upcycle_bench.training.job import Job

ROW = Row(name="a / b", goal="<= 1.1", value=1.05, min=1.0, max=1.2, cpu=1.0, sides=(1.05, 1.0), floor=0.5)


def test_every_goal_is_measured() -> None:
    assert sorted(MEASURES) == list(range(1, 16))
    assert {measure.__module__ for measure in MEASURES.values()} == {
        part.__name__ for part in (layers, steps, initialisation, pipeline, probing)
    }
    assert all(measure.__doc__ for measure in MEASURES.values())


def test_sides_take_turns() -> None:
    calls: list[str] = []

    def clock(step: Callable[[], Any], number: int, device: torch.device) -> Sample:
        assert number in (1, 3)  # 0.3 s of samples from calls of 0.1 s, after the two that warm up
        calls.append(step() * number)
        return Sample(0.1 * (2 if step() == "b" else 1), 0.0)

    samples = interleave([lambda: "a", lambda: "b"], 3, shortest=0.3, clock=clock)
    assert calls == ["a", "b"] * 2 + ["aaa", "bbb"] * 3
    assert samples == [[Sample(0.1, 0.0)] * 3, [Sample(0.2, 0.0)] * 3]


def test_ratios_by_hand() -> None:
    above = [Sample(2.0, 4.0), Sample(3.0, 3.0), Sample(9.0, 9.0)]
    below = [Sample(1.0, 1.0), Sample(3.0, 1.0), Sample(3.0, 4.5)]
    # Wall 2, 1, 3; CPU 4, 3, 2. The ratio of the medians would be 3 / 3 = 1: pairs of a round belong together.
    row = ratio_row("x", ">= 2", above, below)
    assert (row.value, row.min, row.max, row.cpu, row.sides) == (2.0, 1.0, 3.0, 3.0, (3.0, 3.0))
    assert row.reached
    assert not replace(row, goal=">= 2.5").reached
    assert replace(row, goal="").reached is None
    # Wall 1, 0, 6; CPU 3, 2, 4.5.
    row = seconds_row("x", "<= 1", above, below)
    assert (row.value, row.min, row.max, row.cpu, row.unit, row.reached) == (1.0, 0.0, 6.0, 3.0, "s", True)


def test_report(tmp_path: Path) -> None:
    results = {1: [ROW], 10: "skipped: no lab"}
    write_json(results, tmp_path / "latest.json")
    assert KEYS == ("name", "goal", "value", "min", "max", "unit")
    assert json.loads((tmp_path / "latest.json").read_text()) == [
        {"name": "a / b", "goal": "<= 1.1", "value": 1.05, "min": 1.0, "max": 1.2, "unit": "ratio"}
    ]
    table = markdown(results, "A machine.").splitlines()
    assert table[4] == "| 1 | a / b | <= 1.1 | 1.05 | 1.00 to 1.20 | 1.00 | 1.05 / 1 | 0.5 | yes |"
    assert table[5].startswith("| 10 | skipped: no lab |")
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- measured: bench -->\nold\n<!-- end -->\nafter\n")
    put_into(document, "new\\1\n")
    assert document.read_text() == "before\n<!-- measured: bench -->\nnew\\1\n<!-- end -->\nafter\n"


def test_the_document_has_a_place_for_the_table() -> None:
    assert "<!-- measured: bench -->" in (pipeline.ROOT / "docs" / "performance.md").read_text()


@pytest.mark.parametrize("factor", [2.0, 1.5])
@pytest.mark.parametrize("precision", layers.PRECISIONS)
def test_stock_layer_computes_what_ours_does(factor: float, precision: str) -> None:
    layer = layers.create_layer(32, factor)
    stock = layers.with_stock_layer(layer)
    x_TD = layers.tokens(256, 32, torch.device("cpu"))
    ours = layers.layer_step(layer, x_TD, precision)()
    theirs = layers.layer_step(stock, x_TD, precision)()
    assert len(ours) == 1 + 1 + 1 + 4 * layers.EXPERTS  # output; gradients of input, router, experts
    assert stock.moe.deepspeed_moe.exp_counts.equal(layer.moe.deepspeed_moe.exp_counts)
    assert_gradients([g.float() for g in ours], [g.float() for g in theirs], 1e-5 if precision == "fp32" else 2e-2)


def test_dense_ffn_does_the_routed_work() -> None:
    """Where all experts are that FFN, the layer gives what it gives; and it has k rows for each token."""
    layer = layers.create_layer(32, 2.0)
    dense = layers.random_ffn(32, torch.Generator().manual_seed(0)).expert()
    for expert in layer.experts:
        expert.load_state_dict(dense.state_dict())
    x_TD = layers.tokens(256, 32, torch.device("cpu"))
    ours = layers.forward_backward(layer, x_TD, "fp32")
    least = layers.forward_backward(dense, x_TD.detach().repeat(2, 1).requires_grad_(), "fp32")
    y_RD = least()[0]
    assert relative_error(ours()[0], y_RD[:256]) < 1e-5
    assert relative_error(y_RD[256:], y_RD[:256]) < 1e-6


def smoke_job(zero_stage: int = 0) -> Job:
    """A dozen pairs in fp32, so that rounding is all that two ways may differ by."""
    job = training.lab_job(12, zero_stage)
    return replace(job, schedule=job.schedule.model_copy(update={"precision": "fp32", "eps": 1e-3}))


def weights_after(step: Callable[[], Any], clip: Any) -> dict[str, torch.Tensor]:
    for _ in range(3):
        step()
    return clip.model.state_dict()


def test_training_steps_agree() -> None:
    """Engine, plain loop, open_clip's; and, where nothing is dropped, DeepSpeed's own layers on padded captions."""
    moe = training.lab_protocol().moe.model_copy(update={"capacity_factor": 8.0, "load_balance": 0.0})
    job = replace(smoke_job(), load_balance=0.0)
    batches = training.made_up_batches(create_clip("smoke-vit"), 12)
    with session.open_session(1):
        after = {}
        for name, kind, stage in (
            ("dense", training.our_step, 0),
            ("dense open_clip", training.open_clip_step, 0),
            ("moe", training.our_step, 0),
            ("moe plain", training.plain_step, 0),
            ("moe zero", training.our_step, 1),
            ("moe stock", training.stock_step, 0),
        ):
            clip = create_clip("smoke-vit")
            if name == "moe stock":
                clip = training.stock_upcycled(clip, moe)
            elif name.startswith("moe"):
                clip = training.upcycled(clip, moe)
            step = kind(clip, replace(job, zero_stage=stage), batches)
            after[name] = weights_after(step, clip)
    start = create_clip("smoke-vit").model.state_dict()
    for name, other in (
        ("dense", "dense open_clip"),
        ("moe", "moe plain"),
        ("moe", "moe zero"),
        ("moe", "moe stock"),
    ):
        assert after[name].keys() == after[other].keys()
        for key, value in after[name].items():
            torch.testing.assert_close(value, after[other][key], rtol=1e-3, atol=1e-5, msg=f"{name}, {other}: {key}")
    assert not torch.equal(after["dense"]["text_projection"], start["text_projection"])


def test_naive_experts_are_ours() -> None:
    ffn = layers.random_ffn(32, torch.Generator().manual_seed(0))
    stream = list(initialisation.token_stream(6000, 32, torch.device("cpu")))
    ours = initialisation.our_experts(ffn, stream, cluster_tokens=2000)
    w1s, router_ED = initialisation.stored_experts(ffn, stream, cluster_tokens=2000)
    assert torch.equal(ours.router_ED, router_ED)
    for expert, w1_HD in zip(ours.experts, w1s, strict=True):
        assert relative_error(expert.c_fc.weight, w1_HD) < 1e-5
        assert relative_error(ffn.w1_HD, w1_HD) > 0.1


def test_without_the_lab_its_rows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_BENCH_CACHE", str(tmp_path))
    for number in (10, 12, 13):
        with pytest.raises(pipeline.SkippedError, match="data build lab"):
            next(MEASURES[number](Settings(rounds=1, threads=1)))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_stands_after_the_rows_before_it() -> None:
    table = markdown({8: [ROW]}, "A machine.", {8: "failed: OSError"}).splitlines()
    assert [line.split(" | ")[1] for line in table[4:]] == ["a / b", "failed: OSError"]


def test_both_probes_find_the_same_classifier() -> None:
    given = probing.problem()
    found: dict[str, tuple[float, float]] = {}
    for side in probing.sides(given, 0, found):
        side()
    assert found["theirs"] == pytest.approx(found["ours"], abs=probing.TOLERANCE)
    assert 0.3 < found["ours"][1] < 0.95  # neither hopeless nor trivial
