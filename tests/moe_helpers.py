"""A six-layer CLIP with sparse upcycling, single MoE layers, and comparisons of tensors."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from upcycle_bench import protocol
from upcycle_bench.model.config import model_config
from upcycle_bench.model.ffn import FFN, Layer, LayerInit
from upcycle_bench.model.moe import MoEFFN
from upcycle_bench.model.padding import Padding
from upcycle_bench.model.surgery import find_layers, put_experts
from upcycle_bench.planning.registry import load_registry
from upcycle_bench.util.rng import Stream

MOE = protocol.PUBLISHED_MOE
SIX_LAYERS = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 8, "layers": 6, "width": 32, "head_width": 8, "patch_size": 2},
    "text_cfg": {"context_length": 10, "vocab_size": 100, "width": 24, "heads": 3, "layers": 6},
}
END = 99  # the highest id of that vocabulary


def sparse_inits(dense: nn.Module, moe: protocol.MoE, router_init: str = "deepspeed") -> dict[str, LayerInit]:
    """What the registered sparse upcycling makes of every layer."""
    strategy = load_registry().strategies["sparse-upcycling"].target(router_init=router_init)
    return {
        layer.name: strategy.init_layer(
            FFN.of(dense.get_submodule(layer.mlp_path)), layer, None, Stream(("test", layer.name))
        )
        for layer in find_layers(dense, moe)
    }


def upcycled(dense: nn.Module, moe: protocol.MoE = MOE, **changes: Any) -> Any:
    """The dense model after sparse upcycling, under `moe` with `changes`."""
    moe = protocol.MoE(**(moe.model_dump() | changes))
    return put_experts(dense, sparse_inits(dense, moe), moe)


def create_dense(config: Mapping[str, Any] | str = SIX_LAYERS, seed: int = 0, **changes: Any) -> Any:
    """A random open_clip CLIP in eval mode whose FFN biases are not zero; `text_*` changes go to the text tower."""
    config = copy.deepcopy(model_config(config) if isinstance(config, str) else dict(config))
    for key, value in changes.items():
        config["text_cfg"][key.removeprefix("text_")] = value
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config, nonscalar_logit_scale=True)
        for parameter in model.parameters():
            if parameter.ndim == 1 and not parameter.is_meta:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def captions(lengths: list[int], context: int = 10, end: int = END, seed: int = 0) -> Tensor:
    """Random captions [B, L]: `length` words, then end-of-text, then zeros."""
    text_BL = torch.zeros(len(lengths), context, dtype=torch.long)
    words_BL = torch.randint(1, end, text_BL.shape, generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        text_BL[row, :length] = words_BL[row, :length]
        text_BL[row, length] = end
    return text_BL


def inputs_for(model: Any, count: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random images and captions of different lengths."""
    size = model.visual.image_size[0]
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    lengths = [i % (model.context_length - 1) for i in range(count)]
    return images, captions(lengths, model.context_length, model.vocab_size - 1)


def settings_of(experts: int, top_k: int, factor: float = 2.0, minimum: int = 0, **changes: Any) -> protocol.MoE:
    """`MOE` with other numbers; `factor` and `minimum` are those of the capacity."""
    changes = {"experts": experts, "top_k": top_k, "capacity_factor": factor, "min_capacity": minimum} | changes
    return protocol.MoE(**(MOE.model_dump() | changes))


def random_ffn(width: int, hidden: int, dtype: torch.dtype) -> FFN:
    """Weights of an ordinary size from torch's global generator."""
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    return FFN(*(torch.randn(shape, dtype=dtype) / width**0.5 for shape in shapes), nn.GELU())


def create_layer(
    width: int,
    moe: protocol.MoE,
    dtype: torch.dtype = torch.float64,
    *,
    hidden: int = 7,
    dense: FFN | None = None,
    router_ED: Tensor | None = None,
    padding: Padding | None = None,
) -> MoEFFN:
    """Different random experts, or copies of `dense`; a random router of ordinary sharpness unless one is given."""
    ffns = [dense or random_ffn(width, hidden, dtype) for _ in range(moe.experts)]
    if router_ED is None:
        router_ED = torch.randn(moe.experts, width, dtype=dtype)
    layer = Layer("text" if padding else "vision", 1, 2, moe.experts, moe.top_k)
    return MoEFFN(layer, [ffn.expert() for ffn in ffns], router_ED, moe, padding)


def relative_error(ours: Tensor, theirs: Tensor, scale: float = 0.0) -> float:
    """|ours - theirs| / |theirs|; `scale` is the least denominator."""
    norm = max(theirs.detach().norm().item(), scale)
    return (ours - theirs).detach().norm().item() / (norm or 1.0)


def assert_gradients(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    """Every error is at most `tolerance` times the tensor's norm, or a hundredth of the largest norm if that is more.

    The second is for gradients that are nothing but rounding.
    """
    assert all(torch.isfinite(tensor).all() for tensor in ours)
    largest = max(float(tensor.norm()) for tensor in theirs)
    errors = [relative_error(*pair, scale=largest / 100) for pair in zip(ours, theirs, strict=True)]
    assert max(errors) <= tolerance, errors


def router_of(kind: str, experts: int, width: int, dtype: torch.dtype) -> Tensor:
    """A random router: of ordinary sharpness, sharp (gates near 0 and 1), zero (all experts tie), with equal rows."""
    router_ED = torch.randn(experts, width, dtype=dtype) * (5 if kind == "sharp" else 1)
    if kind == "twins":
        router_ED[-1] = router_ED[0]
    return torch.zeros_like(router_ED) if kind == "zero" else router_ED
