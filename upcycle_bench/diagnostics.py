"""What the experts and the router of a model do on a few batches: the step-0 receipt and the diagnostics of a record.

Per MoE layer: function drift (relative L2 error of the layer's output against the dense FFN on the same input), mean
pairwise cosine of the experts' flattened parameters, entropy of the full softmax of the router in nats (ln N is
uniform), and the load, the share of (token, choice) pairs per expert. Per tower: mean cosine of the features with the
dense model's. Sources: metrics of arXiv:2604.13508, section 4.5.

Shape suffixes: B batch, T tokens, D width, N experts, K choices per token, P parameters of an expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle_bench.moe import MoEFFN, merged, moe_layers


@torch.no_grad()
def diagnose(model: nn.Module, dense: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Compare `model` with `dense` on (images [B, 3, H, W], texts [B, L]); both are put into eval mode."""
    model.eval()
    dense.eval()
    layers = moe_layers(model)
    seen: dict[str, _Layer] = {
        name: _Layer(layer, dense.get_submodule(layer.layer.mlp_path)) for name, layer in layers.items()
    }
    handles = [layers[name].moe.register_forward_hook(statistics.observe) for name, statistics in seen.items()]
    cosines: dict[str, list[Tensor]] = defaultdict(list)
    try:
        for images, texts in batches:
            for tower, encode, inputs in (("vision", "encode_image", images), ("text", "encode_text", texts)):
                ours, theirs = getattr(model, encode)(inputs), getattr(dense, encode)(inputs)
                cosines[tower].append(F.cosine_similarity(ours, theirs, dim=-1))
    finally:
        for handle in handles:
            handle.remove()
    return {
        "feature_cosine_with_dense": {tower: float(torch.cat(values).mean()) for tower, values in cosines.items()},
        "layers": {name: statistics.summary() for name, statistics in seen.items()},
    }


class _Layer:
    """Running statistics of one MoE layer."""

    def __init__(self, layer: MoEFFN, ffn: nn.Module) -> None:
        self.layer, self.ffn = layer, ffn
        self.tokens, self.entropy, self.error, self.energy = 0, 0.0, 0.0, 0.0
        self.load_N = torch.zeros(layer.layer.num_experts)

    def observe(self, _module: nn.Module, args: tuple[Tensor, ...], output: tuple[Any, ...]) -> None:
        x_TD, y_TD = args[0], output[0]
        target_TD = self.ffn(x_TD)
        probs_TN = F.softmax(self.layer.gate.wg(x_TD).float(), dim=1)
        self.tokens += len(x_TD)
        self.entropy += float(-torch.special.xlogy(probs_TN, probs_TN).sum())
        self.error += float((y_TD - target_TD).float().square().sum())
        self.energy += float(target_TD.float().square().sum())
        self.load_N += output[2].float().cpu()

    def summary(self) -> dict[str, Any]:
        share_N = self.load_N / self.load_N.sum()
        return {
            "function_drift": (self.error / self.energy) ** 0.5,
            "expert_cosine": expert_cosine(self.layer.experts),
            "router_entropy": self.entropy / self.tokens,
            "load": [round(share, 6) for share in share_N.tolist()],
        }


def expert_cosine(experts: Iterable[nn.Module]) -> float:
    """Mean pairwise cosine of flattened (merged) expert parameters; 1 for identical experts."""
    plain = [merged(expert) for expert in experts]
    flat_NP = torch.stack([torch.cat([p.detach().flatten() for p in expert.parameters()]) for expert in plain])
    unit_NP = F.normalize(flat_NP.double(), dim=1)
    count = len(unit_NP)
    return float((unit_NP.sum(0).square().sum() - count) / (count * (count - 1)))
