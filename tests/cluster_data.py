"""The registered cluster-aware strategy, one layer made by it, and data for its tests.

Shape suffixes: B batch, L sequence, T tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import captions
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.upcycling.symmetric import Factors, decompose
from upcycle_bench.util.rng import Stream

ClusterAware = load_registry().strategies["cluster-aware"].target
STREAM = Stream(("test", 0))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def layer_of(num_experts: int) -> Layer:
    return Layer("vision", 1, 2, num_experts, 2)


def make(strategy: Any, ffn: FFN, x_TD: Tensor, num_experts: int, chunk: int | None = None) -> tuple[LayerInit, Any]:
    """Stream tokens past the calibrator and initialise one layer; (LayerInit, the calibrator)."""
    calibrator = strategy.calibrator(ffn, layer_of(num_experts), STREAM)
    for part in x_TD.split(chunk or len(x_TD)):
        calibrator.update(part)
    return strategy.init_layer(ffn, layer_of(num_experts), calibrator, STREAM.child("init")), calibrator


def truncate(w1_HD: Tensor, c_DD: Tensor, factors: Factors | None = None, **options: Any) -> Any:
    """W1 for a cluster with second moment C, by a strategy with these options; (w1_HD, rank, energy_R, floor_binds)."""
    return ClusterAware(**options).truncate(w1_HD, factors or decompose(w1_HD), c_DD)


def w1(expert: nn.Module) -> Tensor:
    return expert.c_fc.weight.detach()


def tokens(count: int = 40, seed: int = 0, width: int = 8) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_paddings(clip: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Captions that differ only behind their end of text, [B, L] twice, and their lengths."""
    context = clip.model.context_length
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(3, context, (48,), generator=generator).tolist()
    text_BL = captions(lengths, context, generator)
    other_BL = text_BL.clone()
    for row, length in zip(other_BL, lengths, strict=True):
        row[length:] = torch.randint(1, 49000, (context - length,), generator=generator)
    assert not torch.equal(text_BL, other_BL)
    return text_BL, other_BL, lengths
