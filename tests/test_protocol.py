"""Protocols: parsing, overrides, derived values, and that the published ones say where every value comes from."""

import pytest
from pydantic import ValidationError

from upcycle_bench.errors import UserError
from upcycle_bench.protocol import flatten, learning_rate, load_protocol
from upcycle_bench.registry import load_registry

PATHS = {name: entry.target for name, entry in load_registry().protocols.items()}


def test_the_shipped_protocols() -> None:
    assert {"smoke", "clip-b32", "clip-b16"} <= set(PATHS)
    assert load_protocol(PATHS["smoke"]).division == "closed"


@pytest.mark.parametrize(
    ("name", "dense_batch", "batch", "steps", "capacity_factor"),
    # 1.3B samples / 16,384 = 79,345.7; / 32,768 = 39,672.9
    [("clip-b32", 16384, 16384, 79346, 2.0), ("clip-b16", 65536, 32768, 39673, 1.5)],
)
def test_published_values(name: str, dense_batch: int, batch: int, steps: int, capacity_factor: float) -> None:
    protocol = load_protocol(PATHS[name])
    assert protocol.dense.schedule.batch_size == dense_batch
    assert (protocol.train.schedule.batch_size, protocol.train.schedule.steps) == (batch, steps)
    # 5.3B samples
    assert protocol.dense.schedule.steps == 5_300_000_000 // dense_batch
    assert protocol.moe.model_dump() == {
        "experts": 8,
        "top_k": 2,
        "every": 2,
        "offset": 1,
        "capacity_factor": capacity_factor,
        "min_capacity": 4,
        "load_balance": 0.001,
        "second_expert_sampling": False,
        "ep_size": 1,
    }
    schedule = protocol.train.schedule
    assert schedule.warmup_fraction == protocol.dense.schedule.warmup_fraction == 0.02
    assert (schedule.betas, schedule.eps, schedule.weight_decay) == ((0.9, 0.98), 1e-6, 0.2)
    # 5e-4 * (1 - 0.75) / (1 - 0.02) = 1.2755e-4
    assert protocol.peak_lr == pytest.approx(1.2755e-4, rel=1e-4)


@pytest.mark.parametrize("name", ["clip-b32", "clip-b16"])
def test_every_published_value_names_its_source(name: str) -> None:
    protocol = load_protocol(PATHS[name])
    values = flatten(protocol.model_dump(mode="json", exclude={"sources", "overrides", "name", "summary"}))
    assert set(protocol.sources) == set(values)
    assert all(source.startswith(("paper", "ours", "DeepSpeed", "ln 100")) for source in protocol.sources.values())


def test_overrides_open_the_division_and_reach_their_place() -> None:
    protocol = load_protocol(PATHS["smoke"], ["moe.experts=4", 'suites.zero-shot.sets=["digits-test"]'])
    assert protocol.division == "open"
    assert protocol.moe.experts == 4
    assert protocol.suites["zero-shot"]["sets"] == ["digits-test"]
    assert protocol.overrides == ("moe.experts=4", 'suites.zero-shot.sets=["digits-test"]')


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe.expert=4", "did you mean 'moe.experts'"),
        ("moe.expert=4", "train.schedule.steps"),  # names the valid keys
        ("moe.experts=four", "moe.experts: Input should be a valid integer (got 'four')"),
        ("moe.experts=4.0", "moe.experts: Input should be a valid integer"),
        ("moe.experts=1", "moe.experts: Input should be greater than or equal to 2"),
        ("moe.ep_size=3", "must be divisible by ep_size"),
        ("moe.top_k=9", "top_k (9) exceeds experts (8)"),
        ("train.schedule.precision=fp8", "'fp32' or 'bf16'"),
        ("train.schedule.eps=nan", "not a finite number"),
        ("moe=3", "unknown protocol key 'moe'"),
        ("moe.experts", "write it as KEY=VALUE"),
        ("name=other", "unknown protocol key 'name'"),
    ],
)
def test_bad_overrides_are_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_protocol(PATHS["smoke"], [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_protocols_are_frozen() -> None:
    protocol = load_protocol(PATHS["smoke"])
    with pytest.raises(ValidationError):
        protocol.moe.experts = 4  # type: ignore[misc]


def test_learning_rate() -> None:
    # 10 steps, 20 % warm-up: steps 0, 1 climb to the peak (1/2, 2/2), then (10 - t) / 8 from t = 2 to 1/8 at t = 9.
    rates = [learning_rate(step, 10, 1.0, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate(0, 10, 1.0, 0.0) == 1.0
