"""Rows 1 and 2: one MoE layer, forward and backward, against the work it cannot avoid and against DeepSpeed's own.

2,048 tokens, 8 experts of four times the width, 2 of them for each token; bf16 means autocast on float32 weights, as in
training. All gradients are made (input, router, experts), the load-balancing loss's included; no optimiser steps.

Shape suffixes: T tokens, R = 2 T routed rows, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tests.bench.floor import floor
from tests.bench.rows import Row, Settings, measures
from tests.bench.timing import compare
from upcycle_bench import protocol
from upcycle_bench.model.deepspeed_import import MOELayer
from upcycle_bench.model.ffn import FFN, Layer
from upcycle_bench.model.moe import MoEFFN

TOKENS, EXPERTS, TOP_K = 2048, 8, 2
PRECISIONS = ("fp32", "bf16")


def settings_of(capacity_factor: float, experts: int = EXPERTS) -> protocol.MoE:
    """The lab's MoE with another capacity factor, and number of experts."""
    return protocol.MoE(
        experts=experts,
        top_k=TOP_K,
        every=2,
        offset=1,
        capacity_factor=capacity_factor,
        min_capacity=4,
        load_balance=0.001,
        second_expert_sampling=False,
        ep_size=1,
    )


def random_ffn(width: int, generator: torch.Generator) -> FFN:
    """A dense FFN of hidden width 4 D, weights of an ordinary size."""
    shapes = ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
    w1_HD, b1_H, w2_DH, b2_D = (torch.randn(shape, generator=generator) / width**0.5 for shape in shapes)
    return FFN(w1_HD, b1_H, w2_DH, b2_D, nn.GELU())


def create_layer(width: int, capacity_factor: float, seed: int = 0, experts: int = EXPERTS) -> MoEFFN:
    """Our layer with different random experts and a router that spreads random tokens almost evenly."""
    generator = torch.Generator().manual_seed(seed)
    ffns = [random_ffn(width, generator).expert() for _ in range(experts)]
    router_ED = torch.randn(experts, width, generator=generator) / width**0.5
    settings = settings_of(capacity_factor, experts)
    return MoEFFN(Layer("vision", 1, 2, experts, TOP_K), ffns, router_ED, settings, None).train()


def with_stock_layer(layer: MoEFFN) -> MoEFFN:
    """A copy with the backend `deepspeed`, whatever is forced: its own dispatch and compute behind the same gate."""
    stock = copy.deepcopy(layer)
    ours = stock.moe.deepspeed_moe
    stock.moe.deepspeed_moe = MOELayer(
        ours.gate, ours.experts, ours.ep_group_name, ours.ep_size, ours.num_local_experts
    ).train(layer.training)
    return stock


def tokens(count: int, width: int, device: torch.device, seed: int = 1) -> Tensor:
    """Random tokens [count, D] that want a gradient."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(device).requires_grad_()


def forward_backward(
    module: nn.Module, x_TD: Tensor, precision: str, losses: Callable[[], Sequence[Tensor]] = tuple
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the output and the gradients of its sum and `losses()` by input and parameters."""
    wanted = [x_TD, *module.parameters()]

    def step() -> tuple[Tensor, ...]:
        for tensor in wanted:
            tensor.grad = None
        with torch.autocast(x_TD.device.type, torch.bfloat16, enabled=precision == "bf16"):
            y_TD = module(x_TD)
        total = [y_TD, *losses()]
        torch.autograd.backward(total, [torch.ones_like(part) for part in total])
        return (y_TD.detach(), *(tensor.grad for tensor in wanted if tensor.grad is not None))

    return step


def layer_step(layer: MoEFFN, x_TD: Tensor, precision: str) -> Callable[[], tuple[Tensor, ...]]:
    """`forward_backward` with the load-balancing loss."""

    def losses() -> Sequence[Tensor]:
        assert layer.l_aux is not None
        return [layer.l_aux]

    return forward_backward(layer, x_TD, precision, losses)


@measures(1)
def moe_layer(settings: Settings) -> Iterator[Row]:
    """Our layer / one dense FFN on as many rows as are routed (k T = 4,096): the products that must be computed."""
    for width, goal in ((512, "<= 1.10"), (768, "<= 1.10"), (128, "<= 1.25")):
        for precision in PRECISIONS:
            layer = create_layer(width, capacity_factor=2.0).to(settings.device)
            dense = random_ffn(width, torch.Generator().manual_seed(0)).expert().to(settings.device)
            ours = layer_step(layer, tokens(TOKENS, width, settings.device), precision)
            least = forward_backward(dense, tokens(TOKENS * TOP_K, width, settings.device), precision)
            ours()
            dropped, _ = layer.gate.take_dropped()
            assert dropped == 0, "the layer must compute every row that the dense FFN does"
            yield compare(
                f"MoE layer / dense FFN on k*S rows, D={width}, {precision}",
                goal,
                ours,
                least,
                settings,
                floor=floor(ours, precision, settings),
            )


@measures(2)
def stock_layer(settings: Settings) -> Iterator[Row]:
    """DeepSpeed's own layer / ours with one gate, D=512: it computes every slot of its capacity, we the routed rows."""
    for factor, goal in ((2.0, ">= 1.8"), (1.5, ">= 1.45")):
        for precision in PRECISIONS:
            layer = create_layer(512, factor).to(settings.device)
            x_TD = tokens(TOKENS, 512, settings.device)
            ours = layer_step(layer, x_TD, precision)
            yield compare(
                f"stock DeepSpeed layer / ours, capacity factor {factor}, D=512, {precision}",
                goal,
                layer_step(with_stock_layer(layer), x_TD, precision),
                ours,
                settings,
                floor=floor(ours, precision, settings),
            )
