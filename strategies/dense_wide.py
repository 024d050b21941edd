"""Control: a dense model whose FFNs are K times as wide. It shows what the FLOPs of an MoE give without routing.

In every block that would become an MoE layer, the FFN gets as many hidden neurons as the K experts of a token have
together. The new rows of W1 and entries of b1 are normal, with the mean and standard deviation of the block's dense
ones. The new columns of W2 are zero, so that the model computes what it did. Training moves them from the first step,
each in a direction of its own. Data, schedule and optimiser are those of every strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import FFN, Layer, MoE, Strategy, StrategyInfo, Stream
from upcycle_bench.upcycling import draws


@dataclass(frozen=True, kw_only=True)
class DenseWide(Strategy):
    """The dense model with FFNs top-k times as wide, and the same extra training."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="dense-wide",
        summary="a dense model with the FLOPs of the MoE: FFNs top-k times as wide, function kept",
        paper="control",
        status="control",
    )
    replaces_ffn: ClassVar[bool] = False
    preserves_function: ClassVar[bool] = True

    def ffn_hidden(self, hidden: int, moe: MoE) -> int:
        return hidden * moe.top_k

    def init_dense(self, model: Any, layers: Sequence[Layer], rng: Stream) -> None:
        for layer in layers:
            mlp = model.get_submodule(layer.mlp_path)
            _widened(FFN.of(mlp), layer.top_k, rng.child(layer.name)).put_into(mlp)


def _widened(ffn: FFN, factor: int, rng: Stream) -> FFN:
    """The same function with `factor` times as many neurons, the dense ones first."""
    wide = ffn.resized(factor * ffn.hidden)  # its new neurons are zeros
    more = wide.hidden - ffn.hidden
    return replace(
        wide,
        w1_HD=torch.cat([ffn.w1_HD, draws.redrawn(ffn.w1_HD, rng.child("w1"), more)]),
        b1_H=torch.cat([ffn.b1_H, draws.redrawn(ffn.b1_H, rng.child("b1"), more)]),
    )


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DenseWide]
