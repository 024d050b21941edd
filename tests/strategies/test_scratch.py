"""The control `scratch`: experts are drawn as open_clip draws the FFNs of that tower.

Statistical bounds are five standard deviations for the sample's size.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import random_ffn
from upcycle_bench.model.clip import create_clip
from upcycle_bench.model.ffn import FFN, Layer
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.rng import Stream

REGISTRY = load_registry()
Scratch = REGISTRY.strategies["scratch"].target
SIGMAS = 5


@pytest.fixture(scope="module")
def untrained() -> Any:
    """A model as open_clip makes it: 4 vision blocks, 2 text blocks."""
    return create_clip("smoke-vit", seed=3).model


def experts(ffn: FFN, tower: str, depth: int, number: int = 4) -> list[nn.Module]:
    layer = Layer(tower, 1, depth, number, 2)  # type: ignore[arg-type]
    return list(Scratch().init_layer(ffn, layer, None, Stream(("test", 0))).experts)


def moments(tensors: list[Tensor]) -> tuple[int, float, float, float]:
    """n, standard deviation around 0, fourth moment over its square, largest number over it."""
    numbers = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    std = float(numbers.square().mean().sqrt())
    return len(numbers), std, float(numbers.pow(4).mean()) / std**4, float(numbers.abs().max()) / std


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_it_draws_what_open_clip_draws(untrained: Any, tower: str) -> None:
    blocks = (untrained.visual if tower == "vision" else untrained).transformer.resblocks
    made = experts(FFN.of(blocks[1].mlp), tower, depth=len(blocks))
    for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"):
        compare(tower, name, made, blocks)


def compare(tower: str, name: str, made: list[nn.Module], blocks: Any) -> None:
    ours = moments([expert.get_parameter(name) for expert in made])
    theirs = moments([block.mlp.get_parameter(name) for block in blocks])
    normal = tower == "text" and name.endswith("weight")
    kurtosis = 3 if normal else 1.8
    # Relative variance of a sampled standard deviation: (kurtosis - 1) / (4 n).
    bound = SIGMAS * math.sqrt((kurtosis - 1) / 4 * (1 / ours[0] + 1 / theirs[0]))
    assert abs(ours[1] / theirs[1] - 1) < bound
    for n, _, fourth, largest in (ours, theirs):
        if normal:
            assert abs(fourth - 3) < SIGMAS * math.sqrt(96 / n)
            assert largest > 3
        else:  # uniform: nothing beyond sqrt(3) standard deviations; Var z^4 = 9 - 1.8^2, and that of the std adds less
            assert abs(fourth - 1.8) < SIGMAS * math.sqrt(5.76 / n)
            assert largest < math.sqrt(3) * (1 + SIGMAS * math.sqrt(0.2 / n))


def test_nothing_of_the_dense_ffn_is_left_and_experts_differ() -> None:
    ffn = random_ffn(64, 16)
    for tower in ("vision", "text"):
        made = [ffn_parts(ffn), *([*expert.parameters()] for expert in experts(ffn, tower, depth=12))]
        for one, other in itertools.combinations(made, 2):
            assert all((a != b).all() for a, b in zip(one, other, strict=True))


def ffn_parts(ffn: FFN) -> list[Tensor]:
    return [ffn.w1_HD, ffn.b1_H, ffn.w2_DH, ffn.b2_D]


def test_depth_scales_w2_of_the_text_tower_only() -> None:
    ffn = random_ffn(64, 16)
    for tower, factor in (("vision", 1.0), ("text", 2.0)):
        shallow, deep = experts(ffn, tower, depth=3)[0], experts(ffn, tower, depth=12)[0]
        assert torch.equal(shallow.c_fc.weight, deep.c_fc.weight)
        torch.testing.assert_close(shallow.c_proj.weight, factor * deep.c_proj.weight)
