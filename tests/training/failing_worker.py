"""test_first_cause starts it on every rank: a run whose strategy fails in its third step, in one of several ways.

usage: python -m tests.training.failing_worker WAY RESULTS [OPTION ...]
"""

import functools
import os
import signal
import sys
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tests.conftest import QUICK
from upcycle_bench.cli import main
from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.planning import registry
from upcycle_bench.strategy import ExtraLoss, Strategy, StrategyInfo
from upcycle_bench.util import distributed

Sparse: Any = registry.load_registry().strategies["sparse-upcycling"].target
WAY = sys.argv[1]


class Failing(ExtraLoss):
    """A term that fails in the third step."""

    name = "failing"

    def __init__(self) -> None:
        self.steps = 0

    def compute(self) -> Tensor:
        self.steps += 1
        value = self._fail(distributed.rank()) if self.steps == 3 else 0.0
        return torch.tensor(value, requires_grad=True)

    def _fail(self, rank: int) -> float:
        if rank == 1:
            match WAY:
                case "raise":
                    raise RuntimeError("a fault of this rank")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "nan":
                    return float("nan")
        return 0.0


@dataclass(frozen=True, kw_only=True)
class FailingStrategy(Sparse):  # type: ignore[misc]
    """Sparse upcycling with that term."""

    info: ClassVar[StrategyInfo] = StrategyInfo(name="failing", summary="s", paper="p", status="unpublished")

    def loss(self, *_: Any) -> ExtraLoss:
        return Failing()


class Plugin:
    """Brings `failing`."""

    @hookimpl
    def register_strategies(self) -> list[type[Strategy]]:
        return [FailingStrategy]


if __name__ == "__main__":
    registry.load_registry = functools.partial(registry.load_registry, {"test": Plugin()})  # type: ignore[assignment]
    settings = [part for setting in [*QUICK, "train.log_every=1"] for part in ("--set", setting)]
    sys.argv = ["upcycle-bench", "run", "-p", "smoke", "-s", "failing", *settings, "--results", *sys.argv[2:]]
    main()
