"""A training that diverges ends in one line and a failed record with the cause; it leaves no weights."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tests.cli.test_main import call
from tests.conftest import QUICK
from tests.helpers import SMOKE
from upcycle_bench import record, run
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.planning.plan import Plan, make_plan
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.protocol import load_protocol
from upcycle_bench.strategy import ExtraLoss, Strategy, StrategyInfo
from upcycle_bench.training import loop
from upcycle_bench.training.step import compute_losses
from upcycle_bench.util.cache import cache_root
from upcycle_bench.util.errors import UserError
from upcycle_bench.util.progress import Reporter

Sparse: Any = load_registry().strategies["sparse-upcycling"].target


class Exploding(ExtraLoss):
    """A term that is infinite in the third step."""

    name = "exploding"

    def __init__(self) -> None:
        self.steps = 0

    def compute(self) -> Tensor:
        self.steps += 1
        return torch.tensor(float("inf") if self.steps == 3 else 0.0, requires_grad=True)


@dataclass(frozen=True, kw_only=True)
class Diverging(Sparse):  # type: ignore[misc]
    """Sparse upcycling with that term."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="diverging", summary="s", paper="p", status="unpublished")

    def loss(self, *_: Any) -> ExtraLoss:
        return Exploding()


class Plugin:
    """Brings `diverging`."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [Diverging]


def plan(strategy: str) -> Plan:
    return make_plan(load_registry({"test": Plugin()}), strategy, load_protocol(SMOKE, [*QUICK, "train.log_every=1"]))


def weights() -> set[Path]:
    return set((cache_root() / "weights").glob("*"))


def failed(folder: Path) -> record.Record:
    (path,) = record.record_paths(folder)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    made = record.read(path)
    assert made.status == "failed" and not made.scores and made.hashes.weights is None
    return made


def test_a_loss_that_is_not_finite_is_the_reason_of_the_failed_record(tmp_path: Path) -> None:
    before = weights()
    message = r"the loss is inf at step 2 \(contrastive .*, exploding inf\): the training has diverged"
    with pytest.raises(UserError, match=message) as raised:
        run.run(plan("diverging"), tmp_path, Reporter())
    assert isinstance(raised.value, FloatingPointError) and "\n" not in str(raised.value)
    assert failed(tmp_path).reason == f"DivergedError: {raised.value}"
    assert weights() == before and list((cache_root() / "runs").glob("*")) == []


def test_weights_that_diverge_in_the_last_step_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_model = run.train_model

    def diverge(chosen: Plan, model: Any, *more: Any) -> Any:
        progress = train_model(chosen, model, *more)
        with torch.no_grad():
            model.model.ln_final.weight[0] = torch.nan
        return progress

    monkeypatch.setattr(run, "train_model", diverge)
    before = weights()
    with pytest.raises(UserError, match=r"the model: ln_final\.weight has 1 values of 64 that are NaN"):
        run.run(plan("sparse-upcycling"), tmp_path, Reporter(), fresh=True)
    assert "ln_final.weight" in (failed(tmp_path).reason or "")
    assert weights() == before


def test_the_command_ends_with_one_line_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_flags: list[str]
) -> None:
    def diverge(*arguments: Any) -> Any:
        losses, scale = compute_losses(*arguments)
        return {name: loss * float("nan") for name, loss in losses.items()}, scale

    monkeypatch.setattr(loop, "compute_losses", diverge)
    flags = [*quick_flags, "--set", "train.schedule.warmup_fraction=0.5"]  # no other run's training
    assert call(monkeypatch, "run", "-s", "dense", "-p", "smoke", *flags, "--results", str(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "error: the loss is nan at step 0 (contrastive nan)" in said and "Traceback" not in said
    assert (failed(tmp_path).reason or "").startswith("DivergedError: the loss is nan")
