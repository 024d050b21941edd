"""Random routers: what an MoE layer's router is before anything has trained it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from upcycle_bench.model.ffn import FFN, Layer
from upcycle_bench.util.rng import Stream

RouterInit = Literal["deepspeed", "normal", "lecun"]


def random_router(ffn: FFN, layer: Layer, rng: Stream, init: RouterInit = "deepspeed") -> Tensor:
    """A random router [E, D] in the FFN's dtype, from the child "router" of `rng`.

    deepspeed: U(-1/sqrt(D), 1/sqrt(D)), as `nn.Linear(bias=False)` and so DeepSpeed's gate draws;
    normal: standard deviation 0.02 (flaxformer); lecun: standard deviation 1/sqrt(D) (vmoe).
    """
    generator = rng.child("router").generator()
    shape = (layer.num_experts, ffn.width)
    if init == "deepspeed":
        router_ED = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(ffn.width)
    else:
        std = 0.02 if init == "normal" else 1 / math.sqrt(ffn.width)
        router_ED = torch.randn(shape, generator=generator, dtype=torch.float64) * std
    return router_ED.to(ffn.w1_HD.dtype)
