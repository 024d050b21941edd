"""Every fast path of a training against its plain twin."""

from pathlib import Path

import pytest
import torch

from tests.training.test_loop import differing, eesd, job, schedule, upcycled
from upcycle_bench.data.pairs import PairDataset
from upcycle_bench.model.padding import text_encoder
from upcycle_bench.training import finished
from upcycle_bench.training.loop import train
from upcycle_bench.training.session import open_session
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.plain import VARIABLE, plain

pytestmark = pytest.mark.usefixtures("session")


def test_fast_paths_and_plain_twins_give_the_same_weights(pairs: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, twin = upcycled(), upcycled()
    settings = job(load_balance=0.01)
    losses = [train(fast, pairs, settings, make_loss=eesd).last["loss"]]
    monkeypatch.setenv(VARIABLE, "1")
    losses.append(train(twin, pairs, settings, make_loss=eesd).last["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != losses[1]  # to rounding; not the same path
    assert differing(fast, twin) == []


def test_bf16_too(pairs: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = job(schedule=schedule(precision="bf16"))
    loss = train(upcycled(), pairs, settings).last["loss"]
    monkeypatch.setenv(VARIABLE, "1")
    assert loss == pytest.approx(train(upcycled(), pairs, settings).last["loss"], rel=2e-3)


def test_the_switch_reaches_every_fast_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, cpu = upcycled().model, torch.device("cpu")
    key = finished.key_of("run", cpu)
    assert text_encoder(model) != model.encode_text
    monkeypatch.setenv(VARIABLE, "1")
    assert text_encoder(model) == model.encode_text
    assert finished.key_of("run", cpu) != key  # what rounds otherwise is another training


def test_a_value_that_is_none_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, found in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv(VARIABLE, value)
        assert plain() is found
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(UserError, match="UPCYCLE_BENCH_PLAIN must be 0 or 1, not 'yes'"), open_session(1):
        pytest.fail("a session was opened")
