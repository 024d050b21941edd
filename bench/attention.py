"""Plain matmul-softmax attention against PyTorch's default kernel, forward and backward, side by side in one run.

usage: python bench/attention.py [THREADS]     prints a Markdown table; ratio > 1: plain attention is faster

Two measurements: whole training steps of `smoke-vit` (what `smoke` does), and one attention layer over sequence
lengths, which is where the bound in `upcycle_bench.train.attention_kernel` comes from.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from upcycle_bench.dense import create_clip

ROUNDS = 7


def ratio(step: Callable[[], Any]) -> tuple[float, float, float]:
    """(default seconds, plain seconds, default / plain): medians over alternating rounds; the ratio of each pair."""
    default: list[float] = []
    plain: list[float] = []
    for number in range(ROUNDS + 1):
        for seconds, kernel in ((default, contextlib.nullcontext()), (plain, sdpa_kernel(SDPBackend.MATH))):
            with kernel:
                began = time.perf_counter()
                step()
                if number:  # the first round warms up
                    seconds.append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(default, plain, strict=True)]
    return statistics.median(default), statistics.median(plain), statistics.median(ratios)


def model_step(precision: str) -> Callable[[], Any]:
    """One forward and backward of smoke-vit on 64 pairs."""
    clip = create_clip("smoke-vit")
    images, texts = torch.rand(64, 3, 8, 8), torch.randint(1, 400, (64, 12))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            image_BD, text_BD, scale = clip.model.train()(images, texts)[:3]
        (scale * image_BD.float() @ text_BD.float().T).logsumexp(1).sum().backward()

    return step


def layer_step(length: int, width: int, heads: int, precision: str) -> Callable[[], Any]:
    """One attention layer, forward and backward, on 8,192 tokens."""
    layer = nn.MultiheadAttention(width, heads, batch_first=True)
    x_BLD = torch.randn(max(1, 8192 // length), length, width, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y_BLD = layer(x_BLD, x_BLD, x_BLD, need_weights=False)[0]
        y_BLD.float().square().sum().backward()

    return step


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    cases: list[tuple[str, Callable[[], Any]]] = []
    for precision in ("fp32", "bf16"):
        cases.append((f"smoke-vit step, {precision}", model_step(precision)))
        for length in (17, 50, 77, 197, 257, 512):
            cases.append(
                (f"layer, {length} tokens, width 512, head 64, {precision}", layer_step(length, 512, 8, precision))
            )
    print("| what | default, ms | plain, ms | default / plain |\n| --- | --- | --- | --- |")
    for name, step in cases:
        default, plain, gain = ratio(step)
        print(f"| {name} | {default * 1e3:.1f} | {plain * 1e3:.1f} | {gain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
