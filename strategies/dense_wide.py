"""Control: a dense model whose FFNs are as wide as the experts a token meets: what the FLOPs give without routing.

In every block that would become an MoE layer the hidden width is multiplied by K. The new rows of W1 (and numbers of
b1) are normal with the mean and the standard deviation of the dense ones, one scalar each per block; the new columns of
W2 are zero. So the model computes what it did, and training moves the new columns at once, each in a direction of its
own. Data, schedule, optimiser and everything else are those of every strategy.
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
    """`factor` times as many neurons, the dense ones first."""
    wide = ffn.resized(factor * ffn.hidden)  # of zeros
    more = wide.hidden - ffn.hidden
    return replace(
        wide,
        w1_HD=torch.cat([ffn.w1_HD, draws.redrawn(ffn.w1_HD, rng.child("w1"), more)]),
        b1_H=torch.cat([ffn.b1_H, draws.redrawn(ffn.b1_H, rng.child("b1"), more)]),
    )


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DenseWide]
