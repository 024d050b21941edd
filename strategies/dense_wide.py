"""Control: a dense model whose FFNs are as wide as the experts a token meets: what the FLOPs give without routing.

In every block that would become an MoE layer the hidden width is multiplied by top-k. The new rows of W1 (and numbers
of b1) are drawn from a normal distribution with the mean and the standard deviation of the dense ones, one scalar each
per block; the new columns of W2 are zero. So the model computes what it did, and training moves the new columns at
once, each in a direction of its own. Data, schedule, optimiser and everything else are the strategies' own.

Shape suffixes: D width, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.protocol import MoE
from upcycle_bench.rng import Stream
from upcycle_bench.strategy import FFN, Layer, Strategy, StrategyInfo


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
        w1_HD=torch.cat([ffn.w1_HD, _like(ffn.w1_HD, more, rng.child("w1"))]),
        b1_H=torch.cat([ffn.b1_H, _like(ffn.b1_H, more, rng.child("b1"))]),
    )


def _like(rows: Tensor, count: int, rng: Stream) -> Tensor:
    """`count` more rows, normal with the mean and the standard deviation (n - 1) of these."""
    numbers = rows.double().cpu().numpy()  # numpy, because torch's sums depend on the number of threads
    mean, std = float(numbers.mean()), float(numbers.std(ddof=1))
    noise = torch.randn((count, *rows.shape[1:]), generator=rng.generator(), dtype=torch.float64)
    return (mean + std * noise).to(rows)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [DenseWide]
