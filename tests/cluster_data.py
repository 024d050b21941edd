"""The registered cluster-aware strategy, one layer made by it, and data for its tests.

Shape suffixes: R = min(H, D) singular values.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import captions
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.upcycling.symmetric import Factors, decompose
from upcycle_bench.util.rng import Stream

ClusterAware = load_registry().strategies["cluster-aware"].target
STREAM = Stream(("test", 0))
# Seeds of `problem`, and a tau for each: W1 is tall in 0 and 3, wide in 4 and 9.
SEEDS = pytest.mark.parametrize("seed", [0, 3, 4, 9])
CASES = pytest.mark.parametrize(("seed", "tau"), [(0, 0.5), (3, 0.99), (4, 0.9), (9, 0.999)])


def problem(seed: int, tokens_per_width: float = 4) -> tuple[Tensor, Tensor, Tensor]:
    """W1 [H, D], tall or wide; anisotropic tokens with a mean [T, D]; C = X^T X [D, D]. All float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((6, 40), (6, 20)))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing_DD = draw(width, width) * 0.8 ** torch.arange(width)
    x_TD = draw(int(tokens_per_width * width), width) @ mixing_DD.T + draw(width)
    return draw(hidden, width), x_TD, x_TD.T @ x_TD


def energy(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def layer_of(num_experts: int) -> Layer:
    return Layer("vision", 1, 2, num_experts, 2)


def make(strategy: Any, ffn: FFN, x_TD: Tensor, num_experts: int, chunk: int | None = None) -> tuple[LayerInit, Any]:
    """Show the tokens to a calibrator and make one layer: (LayerInit, the calibrator)."""
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
    """Captions [B, L] twice, which differ only after their ends of text, and their lengths."""
    context = clip.model.context_length
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(3, context, (48,), generator=generator).tolist()
    text_BL = captions(lengths, context, generator)
    other_BL = text_BL.clone()
    for row, length in zip(other_BL, lengths, strict=True):
        row[length:] = torch.randint(1, 49000, (context - length,), generator=generator)
    assert not torch.equal(text_BL, other_BL)
    return text_BL, other_BL, lengths
