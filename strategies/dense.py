"""Control: the dense model with the extra training that all strategies get. It shows what training longer gives.

No FFN is replaced. Data, schedule and optimiser are those of every strategy.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import Strategy, StrategyInfo


@dataclass(frozen=True, kw_only=True)
class Dense(Strategy):
    """The dense model with the same extra training."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="dense",
        summary="the dense model with the same extra training",
        paper="control",
        status="control",
    )
    replaces_ffn: ClassVar[bool] = False
    preserves_function: ClassVar[bool] = True


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [Dense]
