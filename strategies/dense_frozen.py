"""Control: the dense checkpoint as it is, from which every strategy starts. Nothing is replaced, nothing is trained."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import Strategy, StrategyInfo


@dataclass(frozen=True, kw_only=True)
class DenseFrozen(Strategy):
    """The dense checkpoint as it is."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="dense-frozen",
        summary="the dense checkpoint as it is, no extra training",
        paper="control",
        status="control",
    )
    replaces_ffn: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    preserves_function: ClassVar[bool] = True


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DenseFrozen]
