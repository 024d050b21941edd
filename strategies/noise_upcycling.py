"""Random-noise upcycling (RNU), a baseline of Nakamura et al., ICLR 2025 (https://arxiv.org/abs/2502.19261).

Every expert is a copy of the dense FFN in which a random share of the hidden neurons gets noise: N(0, std^2) is added
to their rows of W1 and columns of W2. So nothing is lost, and experts differ a little from the start. As in the
authors' code (`conversions/noise_upcycling.py`), the neurons of each expert are first permuted, which keeps the
function, and each matrix has an index set of its own. The standard deviation is absolute: its effect depends on the
scale of the weights.

Where we differ: LLaMA has no biases, CLIP's are copied, b1 in the order of its neurons. Noise is drawn and added in
float64 (the code: bfloat16). The router is drawn as for every other strategy, so that only the experts are compared.

Shape suffixes: S neurons that get noise.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import FFN, Layer, LayerInit, RouterInit, Strategy, StrategyInfo, Stream, random_router
from upcycle_bench.upcycling import draws


@dataclass(frozen=True, kw_only=True)
class NoiseUpcycling(Strategy):
    """Experts are copies of the FFN with noise on a share of the hidden neurons, the router is random."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="noise-upcycling",
        summary="copies of the FFN with noise added to a random share of the neurons, random router",
        paper="baseline RNU of Nakamura et al., Drop-Upcycling, ICLR 2025, arXiv:2502.19261",
        url="https://arxiv.org/abs/2502.19261",
        status="published",
        reconstructed=("biases (LLaMA has none): copied, without noise",),
    )

    ratio: float = Field(default=0.5, ge=0, le=1, description="share of the neurons of each matrix that get noise")
    std: float = Field(default=0.02, ge=0, allow_inf_nan=False, description="standard deviation of the noise, absolute")
    router_init: RouterInit = "deepspeed"

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        count = int(self.ratio * ffn.hidden)
        return LayerInit(
            [self._expert(ffn, count, rng.child("expert", number)) for number in range(layer.num_experts)],
            random_router(ffn, layer, rng, self.router_init),
            {"noisy_neurons": count},  # of each matrix
        )

    def _expert(self, ffn: FFN, count: int, rng: Stream) -> nn.Sequential:
        order_H = draws.permutation(ffn.hidden, rng.child("permutation"))
        first_S = draws.permutation(ffn.hidden, rng.child("w1", "indices"))[:count]
        second_S = draws.permutation(ffn.hidden, rng.child("w2", "indices"))[:count]
        w1_HD, b1_H, w2_DH = ffn.w1_HD[order_H], ffn.b1_H[order_H], ffn.w2_DH[:, order_H]  # copies
        w1_HD[first_S] = draws.noisy(w1_HD[first_S], self.std, rng.child("w1", "values"))
        w2_DH[:, second_S] = draws.noisy(w2_DH[:, second_S], self.std, rng.child("w2", "values"))
        return ffn.expert(w1_HD=w1_HD, b1_H=b1_H, w2_DH=w2_DH)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [NoiseUpcycling]
