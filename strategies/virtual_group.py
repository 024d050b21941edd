"""Virtual-group upcycling (He et al., Upcycling LLMs into Mixture of Experts, 2024, https://arxiv.org/abs/2410.07524).

Each copy of the FFN is cut along its hidden neurons into G shards, which are experts of their own. All shards of a copy
have the same row of the router, so that a token which takes one takes all: they form a virtual group. The protocol's V
experts become E = V G experts of hidden width H / G, and a token takes G times as many. Active parameters and FLOPs
stay the same, but for a larger router.

The shards of a copy add up to the FFN, but each has only 1 / G of the copy's gate, so the weights must be scaled. For
the paper's topk-then-softmax the scale is G; our gate (softmax, top-k, renormalised) equals it. Megatron-LM gives W1
and W2 a factor sqrt(G) each (`scaling="megatron"`), which is exact only for activations like ReLU.

Where we differ: by default W2 alone is scaled, which is exact for GELU too. The paper's models have no biases, CLIP
has: b1 is cut with W1, and b2 is copied, since the gates of a token sum to 1. The paper found softmax-then-topk better,
but gate, losses and learning rate are the protocol's.

Shape suffixes: V copies (virtual groups), G shards of a copy, S = H / G hidden neurons of a shard.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from upcycle_bench.hookspecs import hookimpl
from upcycle_bench.strategy import (
    FFN,
    Layer,
    LayerInit,
    MoE,
    RouterInit,
    Strategy,
    StrategyInfo,
    Stream,
    UserError,
    random_router,
)


@dataclass(frozen=True, kw_only=True)
class VirtualGroup(Strategy):
    """Experts are shards of copies of the FFN, and the G shards of a copy share a router row."""

    info: ClassVar[StrategyInfo] = StrategyInfo(
        name="virtual-group",
        summary="copies of the FFN cut into G times as many, smaller experts; the shards of a copy share a router row",
        paper="He et al., Upcycling Large Language Models into Mixture of Experts, 2024, arXiv:2410.07524",
        url="https://arxiv.org/abs/2410.07524",
        status="published",
        reconstructed=(
            "weight scale: all of it on W2, exact for GELU (option `scaling`: the paper's split over W1 and W2)",
            "biases: b1 cut with W1, b2 copied",
            "with more than two choices DeepSpeed drops over capacity by probability, not by position",
        ),
    )
    preserves_function: ClassVar[bool] = True  # with scaling="exact"

    granularity: int = Field(default=2, ge=1, description="shards G of each copy: V experts become V G")
    scaling: Literal["exact", "megatron"] = Field(
        default="exact", description="where the scale G goes: on W2, or its square root on W1 (with b1) and on W2"
    )
    router_init: RouterInit = "deepspeed"

    def moe_settings(self, moe: MoE) -> MoE:
        shape = {"experts": moe.experts * self.granularity, "top_k": moe.top_k * self.granularity}
        return moe.model_copy(update=shape)

    def ffn_hidden(self, hidden: int, moe: MoE) -> int:
        if hidden % self.granularity:
            raise UserError(
                f"{self.info.name}: granularity {self.granularity} does not divide the {hidden} hidden neurons of the "
                "FFN; choose a divisor."
            )
        return hidden // self.granularity

    def init_layer(self, ffn: FFN, layer: Layer, calibration: Any, rng: Stream) -> LayerInit:
        copies = layer.num_experts // self.granularity
        router_VD = random_router(ffn, layer, rng, self.router_init)[:copies]
        return LayerInit(
            [self._shard(ffn, number) for _ in range(copies) for number in range(self.granularity)],
            router_VD.repeat_interleave(self.granularity, dim=0),
        )

    def _shard(self, ffn: FFN, number: int) -> nn.Sequential:
        size = ffn.hidden // self.granularity
        own = slice(number * size, (number + 1) * size)
        w1_SD, b1_S, w2_DS = ffn.w1_HD[own], ffn.b1_H[own], ffn.w2_DH[:, own]
        if self.scaling == "exact":
            return ffn.expert(w1_HD=w1_SD, b1_H=b1_S, w2_DH=w2_DS * self.granularity)
        scale = self.granularity**0.5
        return ffn.expert(w1_HD=w1_SD * scale, b1_H=b1_S * scale, w2_DH=w2_DS * scale)


@hookimpl
def register_strategies() -> list[type[Strategy]]:
    return [VirtualGroup]
